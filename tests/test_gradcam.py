"""ibma.gradcam: maps are those of the library called directly, masks are where the pixels are, scores are what slow loops say, and nothing is left behind."""
import copy
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ibma import gradcam as gc
from ibma.data import MultimodalData, load
from ibma.data import stand_ins as si
from ibma.data.chexpert import draw_chest
from ibma.data.core import Batch, Modality, Task
from ibma.data.media import decode_frames, decode_image, decode_spectrogram
from ibma.data.raw import Record
from ibma.encoders import NETWORKS, InputScaler
from ibma.methods import METHODS, create

try:
    cams = gc.gradcam_library()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

TINY = {"image": {"width": 4}, "frames": {"width": 4}, "spectrogram": {"width": 4}, "vector": {"hidden": 8}, "text": {"backbone": "bert-tiny"}}


def batch_of(task, n=4, seed=0, mask=None, lengths=None) -> Batch:
    g = torch.Generator().manual_seed(seed)
    inputs = {name: torch.randint(1, m.size, (n, *m.shape), generator=g) if m.kind == "text" else torch.randn(n, *m.shape, generator=g) for name, m in task.modalities.items()}
    present = {name: torch.ones(n, dtype=torch.bool) for name in inputs} | (mask or {})
    target = torch.zeros(n, task.num_classes) if task.kind == "multi_label" else torch.zeros(n) if task.kind == "regression" else torch.zeros(n, dtype=torch.int64)
    return Batch(inputs, target, present, lengths or {}, torch.arange(n))


def task_of(kind="single_label", **modalities) -> Task:
    shapes = {"image": Modality("image", (3, 32, 32)), "video": Modality("frames", (3, 3, 16, 16)), "audio": Modality("spectrogram", (1, 16, 24)), "vector": Modality("vector", (5,))}
    chosen = {name: shapes[name] for name in modalities} if modalities else shapes
    return Task(kind, 3, chosen, bins=(0.0, 1.0) if kind == "regression" else None)


def trained_looking(method):
    "Random statistics in batch normalisation, larger heads: nothing is symmetric or saturated."
    g = torch.Generator().manual_seed(1)
    for m in method.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(0.3 * torch.randn(m.running_mean.shape, generator=g))
            m.running_var.copy_(0.5 + torch.rand(m.running_var.shape, generator=g))
        if isinstance(m, gc.ImageEncoder):
            m.scaler.mean.fill_(0.1)
    return method


# ---------------------------------------------------------------- maps


class ByHand(nn.Module):
    "One picture's path through a method of a single modality, written out."

    def __init__(self, method):
        super().__init__()
        self.model = method.model

    def forward(self, x):
        return self.model.fused_head(self.model.fusion([self.model.encoders["image"](x)], [torch.ones(len(x), dtype=torch.bool)]))


@pytest.mark.parametrize("variant", gc.VARIANTS)
def test_resnet_equals_the_library_called_directly(variant):
    task = Task("single_label", 3, {"image": Modality("image", (3, 96, 96))})  # 3 x 3 places in the last stage
    method, batch = trained_looking(create("ce", task, seed=0, dim=8, encoders={"image": {"backbone": "resnet18-tiny"}})), batch_of(task)
    layer = method.model.encoders["image"].backbone.model.encoder.stages[-1]
    found = gc.cam(method, batch, "image", target=torch.tensor([0, 1, 2, 1]), variant=variant)
    other = ByHand(copy.deepcopy(method)).eval()
    direct = getattr(cams, variant)(other, [other.model.encoders["image"].backbone.model.encoder.stages[-1]])
    expected = direct(batch.inputs["image"], [ClassifierOutputTarget(k) for k in (0, 1, 2, 1)])
    assert found.shape == (4, 96, 96) and (found > 0).any() and layer is gc.target_layer(method.model.encoders["image"])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_vit_equals_the_library_called_directly():
    task = task_of(image=1)
    method, batch = create("ce", task, seed=0, dim=8, encoders={"image": {"backbone": "vit-tiny", "patch": 8}}), batch_of(task)
    with torch.no_grad():
        for p in method.parameters():
            p.mul_(4)  # far enough from its small start for maps that differ
    other = ByHand(copy.deepcopy(method)).eval()
    norm = dict(other.named_modules())["model.encoders.image.backbone.model.layers.1.layernorm_before"]
    direct = cams.HiResCAM(other, [norm], reshape_transform=lambda x: x[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2))
    for k in range(3):
        found = gc.cam(method, batch, "image", target=k, variant="HiResCAM")
        np.testing.assert_allclose(found.numpy(), direct(batch.inputs["image"], [ClassifierOutputTarget(k)] * 4), atol=1e-5)
    assert (found.amax((1, 2)) > 0).any()


def test_patches_keep_their_places():
    task = Task("single_label", 2, {"image": Modality("image", (3, 16, 24))})
    encoder = create("ce", task, seed=0, dim=8, encoders={"image": {"backbone": "vit-tiny", "patch": 8}}).model.encoders["image"]
    tokens = torch.arange(7.0).view(1, 7, 1)  # the class token, then 2 x 3 patches row by row
    assert gc.patch_grid(encoder, tokens).tolist() == [[[[1, 2, 3], [4, 5, 6]]]]


def written_out(gradient, activation, size):
    raw = (gradient.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True).relu()
    raw = raw - raw.amin((2, 3), keepdim=True)
    large = F.interpolate(raw / raw.amax((2, 3), keepdim=True).clamp(min=1e-12), size, mode="bilinear", align_corners=False)[:, 0]
    large = large - large.amin((1, 2), keepdim=True)
    return large / large.amax((1, 2), keepdim=True).clamp(min=1e-12)


@pytest.mark.parametrize("name", ["image", "audio"])
def test_formula_written_out(name):
    "Selvaraju et al. (2017), Eq. 1 and 2, with autograd and bilinear interpolation, other modalities as constants."
    task = task_of()
    method, batch = create("ibma", task, seed=0, dim=8, encoders=TINY).eval(), batch_of(task)
    encoder, kept = method.model.encoders[name], []
    handle = encoder.backbone[2].register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
    z = {m: v if m == name else v.detach() for m, v in method.encode(batch).items()}
    handle.remove()
    outputs = method.decide(z, batch.mask)
    [gradient] = torch.autograd.grad(outputs.max(-1).values.sum(), kept[0])
    expected = written_out(gradient, kept[0], batch.inputs[name].shape[-2:])
    np.testing.assert_allclose(gc.cam(method, batch, name).numpy(), expected.detach().numpy(), atol=2e-3)


class Channels(nn.Module):
    "A network whose last convolution hands its three channels on, and then their means."

    scaler, width = InputScaler, 3

    def __init__(self, shape):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1, bias=False)
        self.convolution.weight.data = torch.eye(3).view(3, 3, 1, 1)

    def forward(self, x):
        return self.convolution(x).mean((2, 3))


def hand_built(weights, monkeypatch, shape=(3, 12, 16), kind="image"):
    monkeypatch.setitem(NETWORKS, "channels", Channels)
    task = Task("single_label", 2, {"image": Modality(kind, shape)})
    method = create("ce", task, seed=0, dim=3, fusion="concat", encoders={kind: {"backbone": "channels"}})
    encoder, head = method.model.encoders["image"], method.model.heads["image"]
    with torch.no_grad():
        encoder.project[1].weight.copy_(torch.eye(3))
        encoder.project[1].bias.zero_()
        head.weight.copy_(torch.tensor(weights))
        head.bias.zero_()
    return method


def planted_pictures(n=3):
    x, truth = torch.zeros(n, 3, 12, 16), torch.zeros(n, 12, 16, dtype=torch.bool)
    for i in range(n):
        truth[i, 2 + i : 6 + i, 3 * i + 1 : 3 * i + 5] = True
    x[:, 0] = truth.float()  # evidence
    x[:, 1, :, 12:] = 2.0  # speaks for the other class
    x[:, 2] = torch.rand(n, 12, 16, generator=torch.Generator().manual_seed(0))  # nobody cares
    return x, truth


@pytest.mark.parametrize("variant", ["GradCAM", "HiResCAM", "LayerCAM", "XGradCAM"])
def test_map_known_in_closed_form(monkeypatch, variant):
    method = hand_built([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]], monkeypatch)
    x, truth = planted_pictures()
    batch = Batch({"image": x}, torch.zeros(3, dtype=torch.int64), {"image": torch.ones(3, dtype=torch.bool)}, {}, torch.arange(3))
    found = gc.cam(method, batch, "image", target=0, head="unimodal", variant=variant)
    truth = truth & (x[:, 1] == 0) if variant != "LayerCAM" else truth  # where both channels are bright, the negative weight wins
    np.testing.assert_allclose(found.numpy(), truth.float().numpy(), atol=1e-6)
    other = gc.cam(method, batch, "image", target=1, head="unimodal", variant=variant)
    assert (other[:, :, 12:][x[:, 0, :, 12:] == 0] > 0.99).all() and (other[:, :, :12] == 0).all()
    nothing = gc.cam(hand_built([[0.0, -1.0, 0.0], [0.0, 1.0, 0.0]], monkeypatch), batch, "image", target=0, head="unimodal")
    assert (nothing == 0).all(), "a target that only has counter-evidence gets a map of zeros"


def test_target_none_is_the_prediction_of_that_head():
    task = task_of()
    method, batch = create("ce", task, seed=3, dim=8, encoders=TINY).eval(), batch_of(task, n=8)
    with torch.no_grad():
        z = method.encode(batch)
        guess = {"fused": method.decide(z, batch.mask).argmax(-1), "unimodal": method.model.heads["image"](z["image"]).argmax(-1)}
    assert (guess["fused"] != guess["unimodal"]).any()
    for head in guess:
        assert torch.equal(gc.cam(method, batch, "image", head=head), gc.cam(method, batch, "image", head=head, target=guess[head]))


class OneFrame(nn.Module):
    "A clip's method as a function of one of its frames."

    def __init__(self, method, batch, frame):
        super().__init__()
        self.method, self.batch, self.frame = method, batch, frame

    def forward(self, x):  # (1, c, H, W)
        full = self.batch.inputs["video"].clone()
        full[:, self.frame] = x
        batch = replace(self.batch, inputs={**self.batch.inputs, "video": full})
        return self.method.decide(self.method.encode(batch), batch.mask)


@pytest.mark.parametrize("variant", ["GradCAM", "LayerCAM", "EigenCAM"])
def test_frames_equal_single_pictures(variant):
    task = task_of(video=1, vector=1)
    lengths = {"video": torch.tensor([3, 2, 1])}
    method, batch = create("ce", task, seed=0, dim=8, encoders=TINY), batch_of(task, n=3, lengths=lengths)
    found = gc.cam(method, batch, "video", target=1, scale="frame", variant=variant)
    together = gc.cam(method, batch, "video", target=1, variant=variant)
    assert found.shape == together.shape == (3, 3, 16, 16)
    for i in range(3):
        raw = []
        for t in range(3):
            if t >= lengths["video"][i]:
                assert (found[i, t] == 0).all() and (together[i, t] == 0).all()
                continue
            alone = copy.deepcopy(method).eval()
            one = replace(gc._rows(batch, torch.tensor([i])))
            # the layer runs over all frames of the clip: the library must be told which activations are this frame's
            engine = getattr(cams, variant)(OneFrame(alone, one, t), [alone.model.encoders["video"].backbone[2]], reshape_transform=lambda x, t=t: x[t : t + 1])
            expected = engine(one.inputs["video"][:, t], [ClassifierOutputTarget(1)])
            np.testing.assert_allclose(found[i, t].numpy(), expected[0], atol=1e-5)
            a, g = engine.activations_and_grads.activations[0].numpy(), engine.activations_and_grads.gradients
            raw.append(np.maximum(engine.get_cam_image(one.inputs["video"][:, t], None, None, a, g[0].numpy() if g else None, False), 0)[0])
        raw = (np.stack(raw) - np.min(raw)) / (np.max(raw) - np.min(raw) + 1e-12)
        expected = F.interpolate(torch.tensor(raw)[:, None], (16, 16), mode="bilinear", align_corners=False)[:, 0]
        expected = (expected - expected.min()) / (expected.max() - expected.min() + 1e-12)
        np.testing.assert_allclose(together[i, : len(raw)].numpy(), expected.numpy(), atol=2e-4)
        assert together[i].max() > 0.99


def test_spectrogram_padding_is_zero_and_without_effect():
    task, lengths = task_of(audio=1, vector=1), {"audio": torch.tensor([24, 10, 1, 0])}
    method, batch = create("ce", task, seed=0, dim=8, encoders=TINY), batch_of(task, lengths=lengths)
    found = gc.cam(method, batch, "audio", target=0)
    assert found.shape == (4, 16, 24) and found[0].max() > 0.9
    for i, length in enumerate(lengths["audio"]):
        assert (found[i, :, length:] == 0).all()
    batch.inputs["audio"][1, :, :, 10:] = 99.0
    assert torch.equal(found, gc.cam(method, batch, "audio", target=0))


def test_rows_do_not_depend_on_their_batch():
    task = task_of()
    method, batch = create("ibma", task, seed=0, dim=8, encoders=TINY), batch_of(task, lengths={"video": torch.tensor([3, 1, 2, 3])})
    for modality in ("image", "video", "audio"):
        whole = gc.cam(method, batch, modality)
        for i in range(4):
            assert torch.allclose(gc.cam(method, gc._rows(batch, torch.tensor([i])), modality)[0], whole[i], atol=1e-4)


def test_other_modalities_are_constants():
    task = task_of()
    method, batch = create("film", task, seed=0, dim=8, encoders=TINY).eval(), batch_of(task)
    expected = method.encode(batch)
    model = gc.OneModality(method, batch, "image")
    assert set(model.batch.features) == {"video", "audio", "vector"}
    assert all(torch.equal(v, expected[k]) and not v.requires_grad for k, v in model.batch.features.items())
    for name in model.batch.features:
        method.model.encoders[name].register_forward_hook(lambda *_: pytest.fail("another modality's encoder ran"))
    x = batch.inputs["image"].clone().requires_grad_(True)
    assert torch.equal(model(x), method.decide(expected, batch.mask)) and not torch.equal(model(x + 1), model(x))
    model(x).sum().backward()
    assert all(p.grad is None for name in model.batch.features for p in method.model.encoders[name].parameters())


def test_state_is_as_before():
    task = task_of()
    method, batch = create("ce", task, seed=0, dim=8, encoders={**TINY, "image": {"backbone": "resnet18-tiny"}}), batch_of(task)
    method.train()
    method.model.encoders["image"].backbone.eval()
    frozen = list(method.model.encoders["audio"].parameters())
    for p in frozen:
        p.requires_grad_(False)
    method.loss(batch)["ce/fused"].backward()
    def state():
        return ([m.training for m in method.modules()], [p.requires_grad for p in method.parameters()], [None if p.grad is None else p.grad.clone() for p in method.parameters()],
                {k: v.clone() for k, v in method.state_dict().items()}, [len(m._forward_hooks) for m in method.modules()], torch.get_rng_state(), torch.is_grad_enabled())
    def same(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a.keys() == b.keys() and all(same(a[k], b[k]) for k in a) if isinstance(a, dict) else len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b
    before, inputs = state(), {k: v.clone() for k, v in batch.inputs.items()}
    layer = "backbone.model.encoder.stages.2"
    for variant in ("GradCAM", "AblationCAM", "ScoreCAM"):
        found = gc.cam(method, batch, "image", variant=variant, layer=layer)
        assert same(before, state()), variant
    gc.deletion(method, batch, "image", found, 0, steps=2)
    with pytest.raises(ValueError, match="no gradient"):
        gc.cam(DetachedFusion(method), batch, "image", layer=layer)
    assert same(before, state()) and same(inputs, batch.inputs) and not any(v.requires_grad for v in batch.inputs.values())
    with torch.no_grad():
        assert torch.equal(gc.cam(method, batch, "image", layer=layer), gc.cam(method, batch, "image", layer=layer))
    with pytest.raises(ValueError, match="1 x 1 places.*earlier layer"):
        gc.cam(method, batch, "image")
    assert same(before, state())


class DetachedFusion(nn.Module):
    "A method that decides from the other modalities, and only looks as if the picture mattered."

    def __init__(self, method):
        super().__init__()
        self.inner = method

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def decide(self, z, mask=None):
        w = torch.ones(1, requires_grad=True)
        return self.inner.decide({k: v.detach() for k, v in z.items()}, mask) * w


def test_missing_modalities_have_empty_maps():
    task = task_of()
    mask = {"image": torch.tensor([True, False, True, False]), "video": torch.tensor([False] * 4)}
    for backbone, layer in (({"width": 4}, None), ({"backbone": "resnet18-tiny"}, "backbone.model.encoder.stages.1")):
        method, batch = create("ibma", task, seed=0, dim=8, encoders={**TINY, "image": backbone}), batch_of(task, mask=mask)
        found = gc.cam(method, batch, "image", layer=layer)
        assert (found[[1, 3]] == 0).all() and (found[[0, 2]].amax((1, 2)) > 0.9).all()
        assert torch.allclose(found[[0, 2]], gc.cam(method, gc._rows(batch, torch.tensor([0, 2])), "image", layer=layer), atol=1e-5)
        assert (gc.cam(method, batch, "video") == 0).all()
        curves, area = gc.deletion(method, batch, "image", found, 0, steps=2)
        assert curves[[1, 3]].isnan().all() and area[[1, 3]].isnan().all() and not curves[[0, 2]].isnan().any()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["single_label", "multi_label", "regression", "one_class"])
def test_every_method_has_maps(name, kind):
    task = Task(kind, 3, {"image": Modality("image", (1, 16, 16)), "audio": Modality("spectrogram", (1, 8, 12)), "video": Modality("frames", (2, 1, 8, 8))}, bins=(0.0, 1.0) if kind == "regression" else None)
    try:
        method = create(name, task, seed=0, dim=8, encoders=TINY)
    except ValueError as error:  # of two modalities, or without this kind of task
        if "two" in str(error):
            task = Task(kind, 3, {m: task.modalities[m] for m in ("image", "audio")}, bins=task.bins)
            method = create(name, task, seed=0, dim=8, encoders=TINY)
        else:
            pytest.skip(str(error))
    batch = batch_of(task)
    for modality, shape in {"image": (16, 16), "audio": (8, 12), "video": (2, 8, 8)}.items():
        if modality in task.modalities:
            found = gc.cam(method, batch, modality)
            assert found.shape == (4, *shape) and found.isfinite().all() and 0 <= found.min() and found.max() <= 1
            assert all(p.grad is None for p in method.parameters())


def test_values_and_anomaly_scores_are_explained():
    for kind in ("regression", "one_class"):
        task = task_of(kind, image=1, vector=1)
        method, batch = create("ce", task, seed=0, dim=8, encoders=TINY).eval(), batch_of(task)
        model, kept = gc.OneModality(method, batch, "image"), []
        handle = method.model.encoders["image"].backbone[2].register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
        score = method.prediction(model(batch.inputs["image"]))
        handle.remove()
        [g] = torch.autograd.grad(score.sum(), kept[0])
        expected = written_out(g, kept[0], (32, 32)).detach()
        assert (expected.amax((1, 2)) > 0.9).any()
        np.testing.assert_allclose(gc.cam(method, batch, "image").numpy(), expected.numpy(), atol=2e-3)
        with pytest.raises(ValueError, match="leave target out"):
            gc.cam(method, batch, "image", target=0)


def test_a_layer_by_module_or_name():
    task = task_of(image=1, vector=1)
    method, batch = create("ce", task, seed=0, dim=8, encoders=TINY), batch_of(task)
    encoder = method.model.encoders["image"]
    first = gc.cam(method, batch, "image", layer="backbone.0", target=0)
    assert torch.equal(first, gc.cam(method, batch, "image", layer=encoder.backbone[0], target=0))
    assert not torch.equal(first, gc.cam(method, batch, "image", target=0))
    with pytest.raises(ValueError, match="no layer 'backbone.9'.*backbone.0.0"):
        gc.cam(method, batch, "image", layer="backbone.9")
    with pytest.raises(ValueError, match="not in this modality's encoder"):
        gc.cam(method, batch, "image", layer=method.model.encoders["vector"].net[0])


@pytest.mark.parametrize("change,error,match", [
    (dict(modality="sound"), KeyError, "'sound'.*image"),
    (dict(modality="vector"), ValueError, "is a vector"),
    (dict(target=3), ValueError, "target 3 of sample 0.*0 to 2"),
    (dict(target=torch.tensor([0, 1, -1, 0])), ValueError, "target -1 of sample 2"),
    (dict(target=torch.tensor([0, 1])), ValueError, "one per sample"),
    (dict(target=0.5), ValueError, "float32"),
    (dict(variant="SmoothGrad"), ValueError, "unknown; choose one of"),
    (dict(variant="FullGrad"), ValueError, "biases"),
    (dict(variant="ScoreCAM", modality="audio"), ValueError, "silence"),
    (dict(variant="AblationCAM", modality="video"), ValueError, "one picture"),
    (dict(variant="AblationCAM"), ValueError, "ReLU"),
    (dict(head="text"), ValueError, "head='text'"),
    (dict(scale="clip"), ValueError, "scale='clip'"),
    (dict(smooth=True), TypeError, "smooth.*eigen_smooth"),
])
def test_errors(change, error, match):
    task = task_of()
    method, batch = create("ce", task, seed=0, dim=8, encoders=TINY), batch_of(task)
    with pytest.raises(error, match=match):
        gc.cam(method, batch, **{"modality": "image", **change})
    assert method.training and all(p.grad is None and p.requires_grad for p in method.parameters())


def test_methods_without_own_heads_say_so():
    task = task_of()
    with pytest.raises(ValueError, match="Concat has no head of its own for 'image'"):
        gc.cam(create("concat", task, seed=0, dim=8, encoders=TINY), batch_of(task), "image", head="unimodal")
    assert set(gc.REFUSED).isdisjoint(gc.VARIANTS) and all(hasattr(cams, name) for name in (*gc.VARIANTS, *gc.REFUSED))


# ---------------------------------------------------------------- evidence


@pytest.mark.parametrize("raw,size,crop", [((40, 40), (40, 40), True), ((40, 60), (32, 32), True), ((90, 50), (30, 30), True), ((40, 60), (32, 32), False), ((64, 64), (128, 96), True), ((96, 96), (24, 24), True)])
def test_boxes_follow_the_decoder(raw, size, crop):
    rng = np.random.default_rng(0)
    for _ in range(20):
        w, h = rng.integers(12, 25, 2)
        x0, y0 = int(rng.integers(raw[1] - w + 1)), int(rng.integers(raw[0] - h + 1))
        picture = np.zeros(raw, np.uint8)
        picture[y0 : y0 + h, x0 : x0 + w] = 255
        seen = decode_image(picture, size=size, channels=1, crop=crop)[0][0] / 255
        mask = gc.box_mask([x0, y0, x0 + w, y0 + h], size, raw, crop)
        if not mask.any():  # cropped away
            continue
        for profile, marked in ((seen[mask.any(1)].max(0), mask.any(0)), (seen[:, mask.any(0)].max(1), mask.any(1))):  # a corner is darker than an edge
            assert (profile[marked] > 0.4).all() and (profile[~marked] < 0.6).all(), (x0, y0, w, h)


def test_tiny_boxes_stay_visible_and_cropped_ones_do_not():
    assert gc.box_mask([50, 50, 52, 52], (8, 8), (96, 96)).sum() == 1
    assert gc.box_mask([0, 10, 5, 20], (30, 30), (30, 90)).sum() == 0 and gc.box_mask([28, 10, 38, 20], (30, 30), (30, 90)).sum() == 8 * 10


@pytest.mark.parametrize("count,fps", [(4, None), (8, None), (3, None), (5, 2.0), (4, 4.0), (12, None), (3, 3.0)])
def test_frames_follow_the_decoder(tmp_path, count, fps):
    pytest.importorskip("av")
    frames = np.stack([np.full((32, 32, 3), 20 + 28 * i, np.uint8) for i in range(8)])
    si.write_clip(tmp_path / "a.mp4", frames)
    seen, found = decode_frames(tmp_path / "a.mp4", count=count, size=16, fps=fps)
    which = np.round((seen[:found].mean((1, 2, 3)) - 20) / 28).astype(int)
    assert which.tolist() == gc.shown_frames(count, 8, fps).tolist()


@pytest.mark.parametrize("options", [dict(rate=16000, n_fft=512, hop=256, mels=32), dict(rate=16000, n_fft=512, hop=128), dict(rate=22050, n_fft=512, hop=353, mels=64, scale="htk"), dict(rate=16000, n_fft=512, hop=256, mels=32, seconds=2.5)])
def test_tones_are_where_the_mask_says(tmp_path, options):
    pytest.importorskip("soundfile")
    rng = np.random.default_rng(0)
    for k in range(4):
        sound = np.zeros(16000)
        entry = si.plant_tones(rng, sound, 16000, k, 5)
        si.write_sound(tmp_path / "a.wav", sound)
        seconds = options.get("seconds", 1.0)
        seen = decode_spectrogram(tmp_path / "a.wav", **{"seconds": seconds, **options}, log=False)[0][0]
        seen = seen if options.get("mels") else seen**2
        both = {role: gc.evidence_mask(entry, seen.shape, role, **{k: v for k, v in options.items() if k != "seconds"}) for role in ("evidence", "distractors")}
        either = both["evidence"] | both["distractors"]
        assert seen[either].sum() > 0.85 * seen.sum() and either.mean() < 0.12
        assert seen[:, ~either.any(0)].sum() < 0.08 * seen.sum(), "tones at other times"
        for spot in entry["evidence"]:
            alone = gc.evidence_mask({"evidence": [spot]}, seen.shape, **{k: v for k, v in options.items() if k != "seconds"})
            assert abs(alone.any(0).mean() - np.diff(spot["seconds"]).item()) < 0.06
            assert alone[seen[:, alone.any(0)].sum(1).argmax()].any(), "the loudest band is not marked"


def test_evidence_of_a_radiograph_is_the_difference_to_one_without():
    for index in range(20):
        shows = (0, 3) if index % 2 else (1, 2, 4)
        sample = si.Sample(index, shows, {"image": shows}, 0)
        with_it, entry = draw_chest(sample, 0.0)
        without, _ = draw_chest(replace(sample, shows={"image": ()}), 0.0)
        mask = gc.evidence_mask(entry, (96, 96))
        changed = with_it != without
        assert not changed[~mask].any() and changed[mask].mean() > 0.9


def test_masks_of_a_prepared_set(tmp_path, monkeypatch):
    monkeypatch.setenv("IBMA_CACHE", str(tmp_path))
    data = load("standin-chexpert", n=30, missing=0.2)
    masks, false = gc.evidence_masks(data, "image"), gc.evidence_masks(data, "image", "distractors")
    assert masks.shape == (len(data), 96, 96) and masks.dtype == torch.bool and not (masks & false).any()
    assert (masks[~data.mask["image"]] == 0).all() and (false.sum((1, 2)) == 200 * data.mask["image"]).all()
    single = torch.stack([gc.evidence_masks(data, "image", target=k) for k in range(5)])
    assert torch.equal(single.any(0), masks) and (single.sum((2, 3)) == 100 * (data.target.nan_to_num(0) == 1).T * data.mask["image"])[~data.target.isnan().T].all()
    rows = torch.tensor([7, 3, 11])
    assert torch.equal(gc.evidence_masks(data.subset(rows), "image"), masks[rows])
    record = data.records[0]
    assert np.array_equal(gc.evidence_mask(record, (96, 96), modality="image"), masks[0].numpy())
    for what, error, match in [(lambda: gc.evidence_masks(data, "text"), ValueError, "is a text"), (lambda: gc.evidence_masks(data, "sound"), KeyError, "sound"),
                               (lambda: gc.evidence_mask(record, (96, 96)), ValueError, "name one"), (lambda: gc.evidence_mask(record, (96, 96), "noise", modality="image"), ValueError, "role='noise'"),
                               (lambda: gc.evidence_mask(record, (96, 96), "distractors", modality="image", label="Edema"), ValueError, "told apart"),
                               (lambda: gc.evidence_mask(data.records[int(data.mask["text"].nonzero()[0])], (96, 96), modality="text"), ValueError, "only boxes"),
                               (lambda: gc.evidence_masks(MultimodalData.from_arrays({"image": np.zeros((4, 8, 8))}, [0, 1, 0, 1]), "image"), ValueError, "user data")]:
        with pytest.raises(error, match=match):
            what()
    assert not gc.evidence_mask(Record("a", {}, None), (4, 4), modality="image").any(), "a record without evidence has none"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["meld", "cremad", "iemocap", "mosi"])
def test_masks_of_clips_are_where_the_glyphs_are(name, tmp_path, monkeypatch):
    monkeypatch.setenv("IBMA_CACHE", str(tmp_path))
    data = load(f"standin-{name}", n=30, noise=0.0)
    grey = data[:].inputs["video"].mean(2) / 255
    extreme, planted = (grey < 0.12) | (grey > 0.88), gc.evidence_masks(data, "video") | gc.evidence_masks(data, "video", "distractors")
    assert extreme[planted].float().mean() > 0.98 and extreme[~planted].float().mean() < 0.005
    loud = data[:].inputs["audio"][:, 0].exp()
    heard = gc.evidence_masks(data, "audio") | gc.evidence_masks(data, "audio", "distractors")
    assert ((loud * heard).sum((1, 2)) / loud.sum((1, 2))).min() > 0.8 and heard.float().mean() < 0.1


# ---------------------------------------------------------------- scores


def slow_scores(cam, mask):
    cam, inside = cam.flatten().tolist(), mask.flatten().tolist()
    best = max(cam)
    pointing = [m for c, m in zip(cam, inside, strict=True) if c == best]
    total = sum(cam)
    energy = sum(c for c, m in zip(cam, inside, strict=True) if m) / total if total else sum(inside) / len(inside)
    rng, overlaps = np.random.default_rng(0), []
    for _ in range(400):  # ties at the border are drawn
        order = sorted(range(len(cam)), key=lambda i: (-cam[i], rng.random()))[: sum(inside)]
        overlaps.append(sum(inside[i] for i in order))
    both = np.mean(overlaps)
    return sum(pointing) / len(pointing), energy, both / (2 * sum(inside) - both)


def test_scores_against_loops():
    g = torch.Generator().manual_seed(0)
    cam, mask = torch.rand(6, 5, 7, generator=g), torch.rand(6, 5, 7, generator=g) < 0.3
    cam[1] = (cam[1] * 3).round() / 3
    cam[2] = 0
    cam[3] = mask[3].float()
    cam[4] = (~mask[4]).float()
    found = gc.localisation_scores(cam, mask)
    for i in range(6):
        pointing, energy, overlap = slow_scores(cam[i], mask[i])
        assert found["pointing_game"][i] == pytest.approx(pointing) and found["energy_inside"][i] == pytest.approx(energy)
        assert found["iou"][i] == pytest.approx(overlap, abs=0.03)
        area = mask[i].float().mean().item()
        assert found["energy_inside_chance"][i] == found["pointing_game_chance"][i] == pytest.approx(area)
    assert [found[k][3].item() for k in ("pointing_game", "energy_inside", "iou")] == [1, 1, 1]
    assert [found[k][4].item() for k in ("pointing_game", "energy_inside")] == [0, 0]
    assert [found[k][2].item() for k in ("pointing_game", "energy_inside", "iou")] == pytest.approx([found[f"{k}_chance"][2].item() for k in ("pointing_game", "energy_inside", "iou")])
    for t in (0.25, 1.0):
        expected = [((c >= t) & m).sum() / ((c >= t) | m).sum() for c, m in zip(cam, mask, strict=True)]
        assert torch.allclose(gc.iou(cam, mask, t), torch.stack(expected).double())


def test_chance_is_what_random_maps_reach():
    g = torch.Generator().manual_seed(0)
    mask = torch.zeros(3000, 10, 10, dtype=torch.bool)
    mask[:, 2:6, 3:8] = True
    found = gc.localisation_scores(torch.rand(3000, 10, 10, generator=g), mask)
    for name in ("pointing_game", "energy_inside", "iou"):
        assert found[name].mean() == pytest.approx(found[f"{name}_chance"].mean().item(), abs=0.02), name


def test_no_evidence_is_nan_and_shapes_are_checked():
    found = gc.localisation_scores(torch.rand(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.bool))
    assert all(v.shape == (2,) and v.isnan().all() for v in found.values()) and gc.iou(torch.rand(1, 2), torch.zeros(1, 2), 0.5).isnan().all()
    for cam, mask in ((torch.rand(2, 4), torch.ones(2, 5)), (-torch.ones(2, 4), torch.ones(2, 4)), (torch.tensor([[float("nan"), 1]]), torch.ones(1, 2))):
        with pytest.raises(ValueError):
            gc.energy_inside(cam, mask)
    with pytest.raises(ValueError, match="threshold='half'"):
        gc.iou(torch.rand(1, 2), torch.ones(1, 2), "half")


def slow_curve(method, batch, name, cam, target, steps, inserting):
    "One sample, one step at a time, pixels by pixels."
    values = np.zeros((len(batch), steps + 1))
    for i in range(len(batch)):
        x, clip = batch.inputs[name][i], batch.inputs[name].ndim == 5
        length = int(batch.lengths[name][i]) if name in batch.lengths else x.shape[0 if clip else -1]
        real = x[:length] if clip else x[..., :length]
        mean = real.mean((0, 2, 3) if clip else (1, 2))
        places = [(t, r, c) for t in range(length if clip else 1) for r in range(x.shape[-2]) for c in range(x.shape[-1] if clip or name != "audio" else length)]
        order = sorted(places, key=lambda p: -(cam[i][p] if clip else cam[i][p[1:]]).item())
        for step in range(steps + 1):
            y = x.clone()
            gone = order[: int(np.ceil(step / steps * len(order) - 1e-6))]
            gone = [p for p in order if p not in set(gone)] if inserting else gone
            for t, r, c in gone:
                if clip:
                    y[t, :, r, c] = mean
                else:
                    y[:, r, c] = mean
            one = gc._rows(batch, torch.tensor([i]))
            one = replace(one, inputs={**one.inputs, name: y[None]})
            values[i, step] = method.predict(one.inputs, one.mask, one.lengths)[0, target]
    return values


@pytest.mark.parametrize("name", ["image", "video", "audio"])
def test_curves_against_loops(name):
    task = Task("single_label", 3, {"image": Modality("image", (3, 6, 5)), "video": Modality("frames", (3, 2, 5, 4)), "audio": Modality("spectrogram", (1, 6, 9))})
    lengths = {"video": torch.tensor([3, 2]), "audio": torch.tensor([9, 5])}
    method, batch = create("ce", task, seed=0, dim=8, encoders=TINY), batch_of(task, n=2, lengths=lengths)
    cam = torch.rand(*{"image": (2, 6, 5), "video": (2, 3, 5, 4), "audio": (2, 6, 9)}[name], generator=torch.Generator().manual_seed(0))
    for function, inserting in ((gc.deletion, False), (gc.insertion, True)):
        curves, area = function(method, batch, name, cam, 1, steps=5)
        expected = slow_curve(method, batch, name, cam, 1, 5, inserting)
        np.testing.assert_allclose(curves.numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(area.numpy(), (expected[:, :-1] + expected[:, 1:]).mean(1) / 2, atol=1e-5)
    whole = method.predict(batch.inputs, batch.mask, batch.lengths)[:, 1].double()
    for fill in ("mean", "blur"):
        down, up = (f(method, batch, name, cam, 1, steps=5, fill=fill)[0] for f in (gc.deletion, gc.insertion))
        assert torch.allclose(down[:, 0], whole, atol=1e-5) and torch.allclose(up[:, -1], whole, atol=1e-5) and torch.allclose(down[:, -1], up[:, 0], atol=1e-5)
    for bad, match in ((dict(fill="black"), "fill='black'"), (dict(steps=0), "steps=0"), (dict(cam=cam[..., :-1]), "expected")):
        with pytest.raises(ValueError, match=match):
            gc.deletion(method, batch, name, **{"cam": cam, "target": 1, **bad})


def test_a_true_map_deletes_faster_than_a_false_one(monkeypatch):
    method = hand_built([[40.0, 0.0, 0.0], [-40.0, 0.0, 0.0]], monkeypatch)
    x, truth = planted_pictures()
    batch = Batch({"image": x}, torch.zeros(3, dtype=torch.int64), {"image": torch.ones(3, dtype=torch.bool)}, {}, torch.arange(3))
    true, false = truth.float(), (~truth).float()
    for maps, first in ((true, True), (false, False)):
        down, up = (f(method, batch, "image", maps, 0, steps=12, head="unimodal") for f in (gc.deletion, gc.insertion))
        assert ((down[0][:, 1] < down[0][:, 0]).all() and (up[0][:, 1] > up[0][:, 0]).all()) == first
    assert (gc.deletion(method, batch, "image", true, 0, head="unimodal")[1] < gc.deletion(method, batch, "image", false, 0, head="unimodal")[1]).all()
    assert (gc.insertion(method, batch, "image", true, 0, head="unimodal")[1] > gc.insertion(method, batch, "image", false, 0, head="unimodal")[1]).all()


# ---------------------------------------------------------------- the control, and pictures


def test_randomised_changes_all_weights_and_nothing_else():
    task = task_of()
    method = trained_looking(create("ibma", task, seed=0, dim=8, encoders={**TINY, "image": {"backbone": "vit-tiny"}}))
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.01)  # away from what any initialisation gives
    before, generator = {k: v.clone() for k, v in method.state_dict().items()}, torch.get_rng_state()
    other = gc.randomised(method, seed=3)
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items()) and torch.equal(generator, torch.get_rng_state())
    assert [n for (n, p), q in zip(method.named_parameters(), other.parameters(), strict=True) if p.numel() > 1 and torch.equal(p, q)] == []
    assert all(torch.equal(a.scaler.mean, b.scaler.mean) for a, b in zip(method.model.encoders.values(), other.model.encoders.values(), strict=True) if hasattr(a.scaler, "mean"))
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), gc.randomised(method, seed=3).parameters(), strict=True))
    assert not torch.equal(other.model.fused_head.weight, gc.randomised(method, seed=4).model.fused_head.weight)


def test_randomised_is_not_the_initialisation_again():
    method = create("ce", task_of(), seed=0, dim=8, encoders=TINY)
    new = dict(gc.randomised(method, seed=0).named_parameters())
    assert [n for n, p in method.named_parameters() if p.ndim > 1 and torch.equal(p, new[n])] == []


def test_randomised_from_the_output_down():
    method = create("ce", task_of(), seed=0, dim=8, encoders=TINY)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.01)
    def changed(upto):
        return {n for (n, p), q in zip(method.named_parameters(), gc.randomised(method, 1, upto).parameters(), strict=True) if not torch.equal(p, q)}
    assert changed("model.fused_head") == {"model.fused_head.weight", "model.fused_head.bias"}
    down = changed("model.encoders.image.backbone.2")
    assert any(n.startswith("model.fusion") for n in down) and {n.split(".")[2] for n in down if "encoders" in n} == {"image"}
    assert not any("image.backbone.0" in n or "image.backbone.1" in n for n in down) and "model.encoders.image.project.1.weight" in down
    assert changed(None) == {n for n, p in method.named_parameters()}
    with pytest.raises(ValueError, match="upto='model.nothing'"):
        gc.randomised(method, upto="model.nothing")


def test_overlay_shows_the_picture_where_the_map_is_zero():
    picture, cam = torch.randint(0, 256, (3, 8, 9)).float(), torch.zeros(8, 9)
    cam[2:4] = 1.0
    found = gc.overlay(picture, cam)
    grey = picture.mean(0).round()
    assert found.dtype == np.uint8 and found.shape == (8, 9, 3) and (abs(found[0].astype(int) - grey[0][:, None].numpy()) <= 1).all()
    assert abs(found[2].astype(float) - (0.4 * grey[2][:, None].numpy() + 0.6 * 255 * np.array(matplotlib.colormaps["inferno"](1.0)[:3]))).max() < 1.5
    assert np.array_equal(gc.overlay(picture[0], cam), gc.overlay(picture[0] / 255, cam))
    with pytest.raises(ValueError, match="over a picture"):
        gc.overlay(picture, cam[1:])
    with pytest.raises(ValueError, match="channels"):
        gc.overlay(torch.zeros(2, 8, 9), cam)


def test_contact_sheet_has_a_row_per_sample_and_a_column_per_method(tmp_path):
    images, maps = 255 * torch.rand(3, 1, 16, 16), {"a": torch.rand(3, 16, 16), "b": torch.zeros(3, 16, 16)}
    boxes = [{"evidence": [{"box": [1, 2, 5, 6]}]}, [[3, 3, 8, 8], [9, 9, 12, 12]], torch.zeros(16, 16, dtype=torch.bool)]
    figure = gc.contact_sheet(images, maps, texts=["one", "two", "three"], boxes=boxes, titles=["x", "y", "z"])
    axes = [a for a in figure.axes if a.images]
    assert len(axes) == 9 and [a.get_title() for a in axes[:3]] == ["input", "a", "b"] and [len(a.patches) for a in axes] == [1] * 3 + [2] * 3 + [0] * 3
    assert np.array_equal(axes[4].images[0].get_array(), gc.overlay(images[1], maps["a"][1])) and any(t.get_text() == "two" for a in figure.axes for t in a.texts)
    assert figure.legends and any(a.get_ylabel() == "class activation" for a in figure.axes)
    figure.savefig(tmp_path / "a.png", dpi=40)
    clips, clip_maps = torch.rand(2, 3, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    clip_maps[0, 2], clip_maps[1, 1, 0, 0] = 0.5, 1.0
    mask = torch.zeros(2, 3, 8, 8, dtype=torch.bool)
    mask[0, 2, 2:4, 2:4] = True
    figure = gc.contact_sheet(clips, {"a": clip_maps}, boxes=mask)
    axes = [a for a in figure.axes if a.images]
    assert [a.get_xlabel() for a in axes[::2]] == ["frame 2", "frame 1"] and np.array_equal(axes[1].images[0].get_array(), gc.overlay(clips[0, 2], clip_maps[0, 2]))
    assert [len(a.collections) for a in axes] == [1, 1, 0, 0]
    assert [a for a in gc.contact_sheet(clips, {"a": clip_maps}, frames=[0, 0]).axes if a.images][0].get_xlabel() == "frame 0"
    for bad in (dict(cams={"a": maps["a"][:2]}), dict(cams={}), dict(texts=["one"]), dict(boxes=[[]])):
        with pytest.raises(ValueError, match="one map at least"):
            gc.contact_sheet(images, **{"cams": maps, **bad})
