"""ibma.model: cross entropy against loops, the network's outputs, its input scaling."""
import math

import pytest
import torch
from cases import toy_data

from ibma.data import Modality, Task
from ibma.fusion import Concatenation, CrossModalAttention
from ibma.model import MultimodalModel, task_loss


def task(kind="single_label", num_classes=4):
    return Task(kind, num_classes, {"a": Modality("vector", (5,)), "b": Modality("image", (1, 4, 4))})


def slow_cross_entropy(logits, targets, smoothing=0.0):
    values = []
    for row, y in zip(logits.tolist(), targets.tolist(), strict=True):
        if y >= 0:
            log_p = [v - math.log(sum(math.exp(u) for u in row)) for v in row]
            k = len(row)
            values.append(-sum(((1 - smoothing) * (a == y) + smoothing / k) * log_p[a] for a in range(k)))
    return sum(values) / len(values) if values else 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets", [[0, 3, 1, 1, 2], [0, -1, 1, -1, 2], [-1] * 5, [-1, -1, 3, -1, -1]])
def test_cross_entropy_is_the_mean_over_the_known(targets, smoothing):
    logits, targets = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(), torch.tensor(targets)
    value = task_loss(logits, targets, task(), smoothing)
    assert value.item() == pytest.approx(slow_cross_entropy(logits, targets, smoothing), abs=1e-5)
    value.backward()
    assert logits.grad.isfinite().all() and not logits.grad[targets < 0].any()


@pytest.mark.parametrize("unknown", [0.0, 0.4, 1.0])
def test_multi_label_cross_entropy_is_the_mean_over_the_known_labels(unknown):
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 4, generator=g).requires_grad_(), (torch.rand(6, 4, generator=g) < 0.5).float()
    targets[torch.rand(6, 4, generator=g) < unknown] = math.nan
    values = []
    for s, y in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        if not math.isnan(y):
            p = 1 / (1 + math.exp(-s))
            values.append(-(y * math.log(p) + (1 - y) * math.log(1 - p)))
    value = task_loss(logits, targets, task("multi_label"))
    assert value.item() == pytest.approx(sum(values) / len(values) if values else 0, abs=1e-5)
    value.backward()
    assert logits.grad.isfinite().all() and not logits.grad[targets.isnan()].any()


@pytest.mark.parametrize("kind", ["single_label", "multi_label"])
def test_cross_entropy_of_half_precision_logits_is_computed_in_single(kind):
    logits = 30 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.tensor([0, 3, 1, 1, 2]) if kind == "single_label" else torch.eye(5, 4)
    value = task_loss(logits, targets, task(kind))
    assert value.dtype == torch.float32
    assert value == task_loss(logits.float(), targets, task(kind))


def inputs(n):
    g = torch.Generator().manual_seed(1)
    return {"a": torch.randn(n, 5, generator=g), "b": torch.randn(n, 1, 4, 4, generator=g)}


def model(**options):
    torch.manual_seed(0)
    return MultimodalModel(task(), **{"dim": 8} | options)


def test_outputs_by_name_and_shape_and_samples_apart():
    net, x = model(), inputs(5)
    out = net(x)
    assert list(out.z) == list(out.logits) == ["a", "b"]
    assert {v.shape for v in (*out.z.values(), out.fused)} == {(5, 8)}
    assert {v.shape for v in (*out.logits.values(), out.fused_logits)} == {(5, 4)}
    torch.testing.assert_close(out.z["a"], net.encoders["a"](x["a"]))
    torch.testing.assert_close(out.logits["b"], net.heads["b"](out.z["b"]))
    torch.testing.assert_close(out.fused, net.fusion([out.z["a"], out.z["b"]]))
    torch.testing.assert_close(out.fused_logits, net.fused_head(out.fused))
    for i in range(5):  # a batch of one
        one = net({k: v[i:i + 1] for k, v in x.items()})
        torch.testing.assert_close(one.fused_logits[0], out.fused_logits[i], atol=1e-5, rtol=0)


def test_an_absent_modality_changes_neither_fusion_nor_its_gradient():
    net, x = model(), inputs(5)
    mask = {"a": torch.tensor([True, False, True, True, False]), "b": torch.ones(5, dtype=torch.bool)}
    expected = net(x, mask).fused_logits
    x["a"] = torch.where(mask["a"][:, None], x["a"], 30.0)
    torch.testing.assert_close(net(x, mask).fused_logits, expected, atol=1e-6, rtol=0)
    assert not torch.allclose(net(x).fused_logits, expected)


def test_parts_are_chosen_by_name():
    assert isinstance(model().fusion, CrossModalAttention)
    net = model(fusion="concat", unimodal_heads=False, encoders={"vector": {"hidden": 3}})
    assert isinstance(net.fusion, Concatenation) and not net.heads and net(inputs(2)).logits == {}
    assert net.encoders["a"].net[0].out_features == 3
    assert model(heads=4).fusion.attention.num_heads == 4


def test_unknown_fusion_and_missing_modality_are_refused_by_name():
    with pytest.raises(ValueError, match="fusion='sum' is unknown.*attention.*concat"):
        model(fusion="sum")
    with pytest.raises(KeyError, match=r"lack modality \['b'\].*mask"):
        model()({"a": torch.zeros(2, 5)})
    with pytest.raises(TypeError, match="depth"):
        model(depth=3)


def test_a_mask_of_some_modalities_means_the_others_are_present():
    net, x = model(), inputs(3)
    torch.testing.assert_close(net(x, {"a": torch.ones(3, dtype=torch.bool)}).fused, net(x).fused)


def test_encoder_options_of_an_unknown_kind_are_refused_by_name():
    with pytest.raises((KeyError, ValueError, TypeError), match="vectr"):
        model(encoders={"vectr": {"hidden": 3}})


def test_input_scaling_is_fitted_on_the_present_samples():
    data = toy_data(40, masks=True, image=True)
    net = MultimodalModel(data.task, dim=8)
    net.fit_inputs(list(data.loader(7)))
    for name in data.inputs:
        x = data.inputs[name][data.mask[name]]
        axes = (0,) if x.ndim == 2 else (0, 2, 3)
        scaler = net.encoders[name].scaler
        assert scaler.mean.flatten().tolist() == pytest.approx(x.mean(axes).tolist(), abs=1e-5)
        assert scaler.scale.flatten().tolist() == pytest.approx(x.std(axes, correction=0).tolist(), rel=1e-4)
