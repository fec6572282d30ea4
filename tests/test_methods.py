"""ibma.methods: the registry, the interface, the baselines and IBMA's loss, hook by hook."""
import copy
import math
import random

import numpy as np
import pytest
import torch
from cases import toy_data
from test_model import slow_cross_entropy

from ibma.assignments import assignment_table, class_centroids, log_assignments, one_hot_targets
from ibma.data import Modality, Task
from ibma.methods import METHODS, create, module_of
from ibma.methods.base import Method, cross_entropies
from ibma.methods.baselines import Concat, CrossEntropy
from ibma.methods.ibma import IBMA
from ibma.model import MultimodalModel, task_loss
from ibma.objective import IBBLoss

SMALL = {"dim": 16, "encoders": {"vector": {"hidden": 8}, "image": {"width": 4}}}
PRINTED = {"temperature": 1.0, "normalize": False}


def small(name, data, **options):
    return create(name, data, **{"seed": 0, **SMALL} | options)


def whole(data):
    return data[:]


# --- the registry


def test_registry_maps_names_to_classes():
    assert {"ce", "concat", "ibma"} <= set(METHODS) and len(METHODS) == len(list(METHODS))
    assert (METHODS["ce"], METHODS["concat"], METHODS["ibma"]) == (CrossEntropy, Concat, IBMA)
    assert "ibma" in METHODS and "gpt" not in METHODS
    assert module_of("ibma") == "ibma.methods.ibma"
    assert all(issubclass(cls, Method) for cls in METHODS.values())


def test_unknown_names_and_options_are_refused_with_what_is_known():
    data = toy_data()
    with pytest.raises(KeyError, match="unknown method 'ibna'; did you mean 'ibma'.*Known: ce, label_smoothing, concat, .*ibma"):
        create("ibna", data)
    with pytest.raises(TypeError, match="unknown option 'etta' of method 'ibma'; did you mean 'eta'.*known: .*dim, .*loss"):
        create("ibma", data, etta=1)
    with pytest.raises(TypeError, match="unknown option 'eta' of method 'ce'"):
        create("ce", data, eta=1)
    with pytest.raises(TypeError, match="unknown option 'num_modalities'"):
        create("ce", data, num_modalities=3)
    with pytest.raises(ValueError, match="bound='loose'"):
        create("ibma", data, loss={"bound": "loose"})
    with pytest.raises(TypeError, match="bond"):
        create("ibma", data, loss={"bond": "paper"})
    with pytest.raises(ValueError, match="eta must not be negative, got -0.5"):
        create("ibma", data, eta=-0.5)
    with pytest.raises(ValueError, match="dim=10 must be a multiple of heads=8"):
        create("ce", data, dim=10)
    with pytest.raises(ValueError, match=r"modalities=\('m0',\) must be two or more"):
        create("ibma", data.select("m0"))


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_fixes_the_weights_and_leaves_the_generators_alone(name):
    data = toy_data()
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    one, two, other = (small(name, data, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate() and states[2] == np.random.get_state()[1].tolist()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)
    create(name, data.task, **SMALL)  # without a seed, from a task: as PyTorch does it
    assert not torch.equal(states[0], torch.get_rng_state())


def test_options_reach_model_and_loss():
    data = toy_data(num_modalities=3)
    method = small("ibma", data, eta=0.3, heads=4, fusion="attention", loss={"bound": "tight", "refresh": "streaming", "temperature": 5.0, "normalize": False})
    assert (method.eta, method.model.fusion.attention.num_heads, method.model.dim) == (0.3, 4, 16)
    loss = method.ibb
    assert (loss.bound, loss.refresh_mode, loss.temperature, loss.normalize, loss.dim, loss.modalities, loss.num_classes) == (
        "tight", "streaming", 5.0, False, 16, ("m0", "m1", "m2"), 3)
    assert small("ibma", toy_data(multi_label=True)).ibb.multi_label
    assert small("ce", data, smoothing=0.1).smoothing == 0.1


# --- the interface


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_predictions_are_deterministic_probabilities_and_leave_the_mode(name, multi_label):
    data = toy_data(multi_label=multi_label)
    method = small(name, data, encoders={"vector": {"hidden": 8, "dropout": 0.5}})
    batch = whole(data)
    p = method.predict(batch.inputs, batch.mask)
    assert method.training and not p.requires_grad and p.shape == (33, 3)
    assert torch.equal(p, method.predict(batch.inputs, batch.mask))
    logits = method.eval().decide(method.encode(batch), batch.mask)
    expected = 1 / (1 + torch.exp(-logits)) if multi_label else torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    torch.testing.assert_close(p, expected.detach())
    torch.testing.assert_close(method.predict({k: v[:1] for k, v in batch.inputs.items()})[0], p[0], atol=1e-5, rtol=0)  # a batch of one, no mask
    assert not method.training


def test_the_mode_comes_back_after_an_error_too():
    method = small("ce", toy_data())
    with pytest.raises(KeyError, match="m1"):
        method.predict({"m0": torch.zeros(2, 16)})
    assert method.training


def test_the_base_class_asks_for_a_loss_by_name():
    class Half(Method):
        pass

    with pytest.raises(NotImplementedError, match=r"Half does not implement loss"):
        Half(toy_data().task, **SMALL).loss(whole(toy_data()))


def test_cross_entropies_ask_only_the_heads_of_present_modalities():
    data = toy_data(masks=True, unlabelled=True)
    batch, method = whole(data), small("ce", data)
    out = method(batch)
    terms = cross_entropies(out, batch.target, data.task, mask=batch.mask)
    assert list(terms) == ["ce/m0", "ce/m1", "ce/fused"]
    for name in ("m0", "m1"):
        here = batch.mask[name]
        assert terms[f"ce/{name}"].item() == pytest.approx(slow_cross_entropy(out.logits[name][here], batch.target[here]), abs=1e-5)
    assert terms["ce/fused"].item() == pytest.approx(slow_cross_entropy(out.fused_logits, batch.target), abs=1e-5)
    assert not torch.equal(terms["ce/m0"], cross_entropies(out, batch.target, data.task)["ce/m0"])
    smooth = cross_entropies(out, batch.target, data.task, 0.2, batch.mask)["ce/m1"]
    here = batch.mask["m1"]
    assert smooth.item() == pytest.approx(slow_cross_entropy(out.logits["m1"][here], batch.target[here], 0.2), abs=1e-5)


def test_cross_entropies_of_labels_ask_only_the_heads_of_present_modalities():
    data = toy_data(masks=True, multi_label=True)
    batch, method = whole(data), small("ce", data)
    out = method(batch)
    terms = cross_entropies(out, batch.target, data.task, mask=batch.mask)
    here = batch.mask["m0"]
    assert terms["ce/m0"].item() == pytest.approx(task_loss(out.logits["m0"][here], batch.target[here], data.task).item(), abs=1e-6)
    assert all(v.isfinite() for v in terms.values())


def test_hooks_do_nothing_but_fit_the_input_scaling():
    data = toy_data(masks=True)
    method, net = small("ce", data), MultimodalModel(data.task, dim=16, encoders=SMALL["encoders"])
    before = copy.deepcopy(method.state_dict())
    method.on_epoch_start(0)
    method.on_epoch_end(data.loader(8))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), method.state_dict().values(), strict=True))
    method.on_fit_start(list(data.loader(8)))
    net.fit_inputs(list(data.loader(8)))
    changed = {k for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"model.encoders.{m}.scaler.{s}" for m in ("m0", "m1") for s in ("mean", "scale")}
    assert torch.equal(method.model.encoders["m1"].scaler.scale, net.encoders["m1"].scaler.scale)


# --- the baselines


def test_cross_entropy_has_every_head_and_concat_only_the_fused_one():
    data = toy_data(masks=True)
    batch = whole(data)
    method = small("ce", data, smoothing=0.1)
    terms, expected = method.loss(batch), cross_entropies(method(batch), batch.target, data.task, 0.1, batch.mask)
    assert terms.keys() == expected.keys() and all(torch.equal(terms[k], expected[k]) for k in terms)
    method = small("concat", data)
    assert list(method.loss(batch)) == ["ce/fused"]
    assert not method.model.heads and type(method.model.fusion).__name__ == "Concatenation"


def test_ibma_without_weight_is_cross_entropy():
    data = toy_data()
    batch, ibma, ce = whole(data), small("ibma", data, eta=0), small("ce", data)
    ibma.on_fit_start(list(data.loader(8)))
    ce.on_fit_start(list(data.loader(8)))
    for method in (ibma, ce):
        sum(method.loss(batch).values()).backward()
    gradients = [dict(m.model.named_parameters()) for m in (ibma, ce)]
    for name, parameter in gradients[1].items():
        torch.testing.assert_close(gradients[0][name].grad, parameter.grad, atol=1e-7, rtol=0)


# --- IBMA


def outputs(method, batch):
    "Representations in evaluation mode, the fused one last."
    with torch.no_grad():
        out = copy.deepcopy(method).eval()(batch)
    return [*out.z.values(), out.fused]


def test_the_loss_is_eq_2():  # unlabelled pairs have a weight of their own: tests/test_unlabelled.py
    data = toy_data(masks=True, num_modalities=3)
    method, batch = small("ibma", data, eta=0.7), whole(data)
    method.on_fit_start(list(data.loader(8)))
    method.on_epoch_end(list(data.loader(8)))
    out = method(batch)
    terms = method.loss(batch)
    bound = copy.deepcopy(method.ibb)(out.z, out.fused, batch.target, batch.mask)
    assert list(terms) == ["ce/m0", "ce/m1", "ce/m2", "ce/fused", "ibb"]
    assert terms["ibb"].item() == pytest.approx(0.7 * bound.item(), abs=1e-6)
    expected = cross_entropies(out, batch.target, data.task, mask=batch.mask)
    assert all(terms[k].item() == pytest.approx(expected[k].item(), abs=1e-6) for k in expected)
    assert bound.item() > 0.1


def test_first_centroids_come_from_one_forward_pass_and_tables_stay_uniform():
    """Algorithm 1, lines 5, 7 and 8; in evaluation mode and with the scaled inputs."""
    data = toy_data(unlabelled=True)
    method = small("ibma", data, encoders={"vector": {"hidden": 8, "dropout": 0.5}}, dropout=0.2)
    method.on_fit_start(list(data.loader(8)))
    stats, batch = method.ibb.statistics, whole(data)
    weights = one_hot_targets(batch.target, 3)
    for s, z in enumerate(outputs(method, batch)):
        torch.testing.assert_close(stats.centroids[s], class_centroids(z, weights), atol=1e-6, rtol=0)
    torch.testing.assert_close(stats.log_table.exp(), torch.full((3, 3, 3), 1 / 3))
    assert method.training and not any(p.grad is not None for p in method.parameters())


def test_an_epoch_ends_with_q_under_the_old_centroids_and_then_the_new_ones():
    """Algorithm 1, lines 13 to 19."""
    data = toy_data(unlabelled=True)
    method = small("ibma", data, loss=PRINTED, encoders={"vector": {"hidden": 8, "dropout": 0.5}})
    method.on_fit_start(list(data.loader(8)))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.5)
    sum(method.loss(whole(data)).values()).backward()
    optimizer.step()
    old, batch = method.ibb.statistics.centroids.clone(), whole(data)
    weights = one_hot_targets(batch.target, 3)
    method.on_epoch_end(list(data.loader(8)))
    stats = method.ibb.statistics
    for s, z in enumerate(outputs(method, batch)):
        assert not torch.allclose(old[s], stats.centroids[s], atol=1e-3)
        torch.testing.assert_close(stats.centroids[s], class_centroids(z, weights), atol=1e-6, rtol=0)
        torch.testing.assert_close(stats.log_table[s].exp(), assignment_table(log_assignments(z, old[s]).exp(), weights), atol=1e-5, rtol=0)


def test_streaming_takes_the_statistics_of_the_training_steps():
    data = toy_data()
    method = small("ibma", data, loss={"refresh": "streaming"})
    method.on_fit_start(list(data.loader(8)))
    means, batch = method.ibb.statistics.centroids.clone(), whole(data)
    features = outputs(method, batch)
    with torch.no_grad():
        method.loss(data[:5])  # not a training step
    for part in data.loader(8):
        method.loss(part)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.1)  # a pass now would find something else
    method.on_epoch_end(None)  # no pass over the data
    torch.testing.assert_close(method.ibb.statistics.centroids, means, atol=1e-5, rtol=0)
    torch.testing.assert_close(means[0], class_centroids(features[0], one_hot_targets(batch.target, 3)), atol=1e-5, rtol=0)


def test_a_state_dict_carries_the_statistics():
    data = toy_data()
    method, other = small("ibma", data), small("ibma", data, seed=5)
    method.on_fit_start(list(data.loader(8)))
    method.on_epoch_end(list(data.loader(8)))
    other.load_state_dict(method.state_dict())
    batch = whole(data)
    a, b = (sum(m.loss(batch).values()).item() for m in (method, other))
    assert a == b and not math.isnan(a)
    assert any(name.startswith("ibb.statistics.") for name in method.state_dict())


def test_a_task_without_data_is_enough():
    task = Task("single_label", 4, {"a": Modality("vector", (5,)), "b": Modality("image", (1, 4, 4))})
    method = create("ibma", task, seed=1, **SMALL)
    assert isinstance(method.ibb, IBBLoss) and method.predict({"a": torch.zeros(1, 5), "b": torch.zeros(1, 1, 4, 4)}).shape == (1, 4)
