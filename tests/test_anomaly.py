"""ibma.anomaly: the soft boundary against loops and brute force, spheres broken on purpose, scores against an exact likelihood ratio."""
import copy
import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from ibma.anomaly import (
    Detection,
    SoftBoundary,
    check_sphere,
    detect,
    radius_squared,
    soft_boundary,
    soft_boundary_losses,
    sphere_faults,
    sphere_of,
    sphere_outputs,
    sphere_report,
)
from ibma.data import MultimodalData, load
from ibma.methods import METHODS, create
from ibma.metrics import anomaly_metrics, predict_all
from ibma.training import TrainingConfig, fit

FILES = Path(os.environ.get("IBMA_DATA", "nowhere"), "her2st")


def one_class(rows, target=None):
    rows = np.asarray(rows, np.float32)
    half = rows.shape[1] // 2
    return MultimodalData.from_arrays({"a": rows[:, :half], "b": rows[:, half:]}, np.zeros(len(rows), int) if target is None else target, kind="one_class", num_classes=3)


def gaussian(n, seed=0): return np.random.default_rng(seed).normal(size=(n, 4))


def method_of(name="concat", data=None, **options):
    return create(name, data if data is not None else one_class(gaussian(60)), seed=0, dim=16, encoders={"vector": {"hidden": 16}}, **options)


@pytest.fixture(scope="module")
def data(): return one_class(gaussian(60))


@pytest.fixture(scope="module")
def trained(data):
    method = method_of("concat", data)
    fit(method, data, config=TrainingConfig(epochs=3, lr=3e-3, batch_size=20))
    return method


# ---------------------------------------------------------------- the soft boundary

@pytest.mark.parametrize("nu", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("radius2", [0.0, 0.7, 100.0])
def test_the_objective_is_that_of_a_loop(nu, radius2):
    d = torch.rand(20, generator=torch.Generator().manual_seed(1)) * 2
    expected = []
    for value in d.tolist():
        expected.append(radius2 + (value - radius2) / nu if value > radius2 else radius2)
    assert soft_boundary_losses(d, radius2, nu).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 10, 100])
@pytest.mark.parametrize("nu", [0.01, 0.1, 0.29, 0.5, 0.7, 0.99])
def test_the_radius_minimises_the_objective_and_leaves_at_most_nu_outside(n, nu):
    d = torch.from_numpy(np.random.default_rng(n).exponential(size=n))
    best = radius_squared(d, nu)
    at = [soft_boundary_losses(d, value, nu).mean().item() for value in (0.0, *d.tolist())]   # piecewise linear: a kink or 0 is best
    assert soft_boundary_losses(d, best, nu).mean().item() == pytest.approx(min(at), rel=1e-9)
    assert (d > best).sum().item() <= nu * n + 1e-9
    assert (d >= best).sum().item() >= nu * n - 1e-9


def test_the_radius_is_the_published_quantile_up_to_interpolation():
    d = np.random.default_rng(0).exponential(size=2001)
    theirs = np.quantile(np.sqrt(d), 1 - 0.1) ** 2
    assert float(radius_squared(torch.from_numpy(d), 0.1)) == pytest.approx(theirs, rel=5e-3)


OPTIONS = {"omib": {"beta": 0.03, "warmup_epochs": 0}, "c_mib": {"as_coded": True}}   # the second counts its fused term twice
REFUSE = {"dclf", "label_smoothing", "mcib"}   # one-class tasks


@pytest.mark.parametrize("name", sorted(set(METHODS) - REFUSE))
def test_only_the_fused_term_changes_for_every_method(name, data):
    options = OPTIONS.get(name, {})
    hard = method_of(name, data, **options)
    batch = data[torch.arange(30)]
    batch.target[:4] = 1   # known anomalies train nothing
    hard.on_fit_start([batch])
    hard.eval()            # without noise both see the same outputs
    soft = soft_boundary(copy.deepcopy(hard), nu=0.25)
    soft.radius2.fill_(float(hard.predict(batch.inputs)[4:].median()))
    before, after = hard.loss(batch), soft.loss(batch)
    assert list(before) == list(after)
    for term in set(before) - {"ce/fused"}:
        assert after[term].item() == pytest.approx(before[term].item(), rel=1e-5, abs=1e-9), term
    r, kept = soft.radius2.item(), hard.predict(batch.inputs)[4:].tolist()
    expected = np.mean([r + max(0.0, s - r) / 0.25 for s in kept])
    weight = before["ce/fused"].item() / np.mean(kept)
    assert weight == pytest.approx(2 if name == "c_mib" else 1, rel=1e-4)
    assert after["ce/fused"].item() == pytest.approx(round(weight) * expected, rel=1e-4)


class Other(METHODS["concat"]):
    """A method whose fused term is not its head's distance."""

    def loss(self, batch):
        return {"ce/fused": super().loss(batch)["ce/fused"] * 1.3}


def test_a_method_that_decides_by_more_than_its_head_is_refused_by_name(data):
    method = soft_boundary(Other(data.task, dim=16))
    with pytest.raises(ValueError, match="Other decides by more than its fused head"):
        method.loss(data[torch.arange(30)])


def test_a_loss_that_is_not_finite_is_left_to_training_to_name(data):
    method = soft_boundary(method_of("concat", data))
    sphere_of(method).map.weight.data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="ce/fused"):
        fit(method, data, config=TrainingConfig(epochs=1, batch_size=20))


def test_a_warm_up_that_does_not_train_the_head_passes_through(data):
    method = soft_boundary(method_of("omib", data, beta=0.03, warmup_epochs=1))
    batch = data[torch.arange(30)]
    method.on_fit_start([batch])
    method.on_epoch_start(0)
    assert "ce/fused" not in method.loss(batch) and not sphere_of(method)._forward_hooks
    method.on_epoch_start(1)
    assert "ce/fused" in method.loss(batch) and not sphere_of(method)._forward_hooks


def test_samples_inside_give_no_gradient_and_those_outside_one_over_nu(data):
    hard = method_of("concat", data)
    batch = data[torch.arange(30)]
    hard.on_fit_start([batch])
    soft = soft_boundary(copy.deepcopy(hard), nu=0.2)
    soft.radius2.fill_(1e6)
    soft.loss(batch)["ce/fused"].backward()
    assert sphere_of(soft).map.weight.grad.abs().max() == 0
    soft.zero_grad()
    soft.radius2.fill_(0.0)
    soft.loss(batch)["ce/fused"].backward()
    hard.loss(batch)["ce/fused"].backward()
    assert torch.allclose(sphere_of(soft).map.weight.grad, 5 * sphere_of(hard).map.weight.grad, rtol=1e-4)


def test_the_radius_waits_for_the_warm_up_and_is_exact_afterwards(data):
    method = soft_boundary(method_of("ce", data), nu=0.2, warmup=2)
    history = fit(method, data, config=TrainingConfig(epochs=4, lr=1e-3, batch_size=20)).history
    assert history[0]["radius"] == 0 < history[1]["radius"] and history[3]["radius"] > 0
    assert not method.selectable(1) and method.selectable(2)
    scores = predict_all(method, data)
    assert float(method.radius2) == pytest.approx(float(radius_squared(scores, 0.2)), rel=1e-5)
    assert (scores > method.radius2 * (1 + 1e-5)).sum() <= 12
    again = soft_boundary(method_of("ce", data), nu=0.2, warmup=2)
    again.clusters.centres = method.clusters.centres.clone()
    again.load_state_dict(method.state_dict())
    assert again.radius2 == method.radius2 and torch.equal(predict_all(again, data), scores)


def test_a_known_anomaly_does_not_move_the_radius(data):
    rows = data[torch.arange(60)]
    method = soft_boundary(method_of("ce", data), nu=0.1, warmup=0)
    method.on_fit_start([rows])
    method.on_epoch_start(0)
    method.on_epoch_end([rows])
    before = float(method.radius2)
    far = torch.cat([rows.inputs["a"], 100 + rows.inputs["a"]]), torch.cat([rows.inputs["b"], rows.inputs["b"]])
    more = MultimodalData.from_arrays({"a": far[0].numpy(), "b": far[1].numpy()}, np.repeat([0, 1], 60), kind="one_class", num_classes=3)
    method.on_epoch_end([more[torch.arange(120)]])
    assert float(method.radius2) == pytest.approx(before, rel=1e-5)


def test_about_nu_of_new_normal_samples_lie_outside():
    method = soft_boundary(method_of("concat", one_class(gaussian(600))), nu=0.2, warmup=3)
    fit(method, one_class(gaussian(600)), config=TrainingConfig(epochs=6, lr=1e-3, batch_size=50))
    assert sphere_report(method, one_class(gaussian(600)))["outside"] <= 0.2 + 2 / 600   # the sample on the boundary falls to either side by rounding
    outside = sphere_report(method, one_class(gaussian(2000, seed=1)))["outside"]
    assert outside == pytest.approx(0.2, abs=0.05)   # training samples: 600, so 1.6 points of deviation from them alone


def test_what_makes_no_sense_is_refused(data):
    with pytest.raises(ValueError, match="nu=1"):
        soft_boundary(method_of("ce", data), nu=1)
    with pytest.raises(ValueError, match="warmup=-1"):
        soft_boundary(method_of("ce", data), warmup=-1)
    with pytest.raises(ValueError, match="already"):
        soft_boundary(soft_boundary(method_of("ce", data)))
    classes = MultimodalData.from_arrays({"a": gaussian(6), "b": gaussian(6)}, [0, 1] * 3)
    for function in (soft_boundary, sphere_of):
        with pytest.raises(ValueError, match="CrossEntropy on a single_label task has no sphere"):
            function(create("ce", classes, dim=8))


def test_a_soft_method_keeps_its_class_and_leaves_other_instances_alone(data):
    soft, other = soft_boundary(method_of("ibma", data)), method_of("ibma", data)
    assert isinstance(soft, METHODS["ibma"]) and isinstance(soft, SoftBoundary) and not isinstance(other, SoftBoundary)
    assert set(soft.state_dict()) - set(other.state_dict()) == {"radius2"}


# ---------------------------------------------------------------- the report and its faults

def test_the_report_is_that_of_a_slow_computation(trained, data):
    y, c = sphere_outputs(trained, data).double(), sphere_of(trained).centre.double()
    scores = [sum(v * v for v in row) for row in y.tolist()]
    report = sphere_report(trained, data, nu=0.1)
    assert report["samples"] == 60 and report["score/mean"] == pytest.approx(np.mean(scores)) and report["score/variance"] == pytest.approx(np.var(scores))
    assert report["centre/norm"] == pytest.approx(math.sqrt(sum(v * v for v in c.tolist())))
    assert report["centre/from_mean"] == pytest.approx(np.linalg.norm(y.numpy().mean(0)))
    assert report["score/q05"] == pytest.approx(np.quantile(scores, 0.05)) and report["score/q95"] == pytest.approx(np.quantile(scores, 0.95))
    assert report["radius"] == pytest.approx(math.sqrt(sorted(scores)[53])) and report["outside"] == pytest.approx(6 / 60)
    assert report["biases/head"] == 0 and report["biases/before"] == 5 and report["centre/smallest"] >= 0.1 - 1e-6
    assert predict_all(trained, data).tolist() == pytest.approx(scores, rel=1e-4)


def test_known_anomalies_are_left_out_of_the_report(trained, data):
    target = np.repeat([0, 1], 30)
    part = MultimodalData.from_arrays({m: data[torch.arange(60)].inputs[m].numpy() for m in "ab"}, target, kind="one_class", num_classes=3)
    assert sphere_report(trained, part)["score/mean"] == pytest.approx(sphere_report(trained, data.subset(range(30)))["score/mean"])
    with pytest.raises(ValueError, match="every sample is a known anomaly"):
        sphere_report(trained, part.subset(range(30, 60)))


def test_a_sound_sphere_has_no_fault(trained, data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_sphere(trained, data) == [] == check_sphere(trained, data, "raise")


def test_one_sample_is_no_collapse(trained, data):
    assert check_sphere(trained, data.subset([3]), "list") == []


def constant(method):
    with torch.no_grad():
        sphere_of(method).map.weight.zero_()


def reaches_the_centre(method):
    """Everything at the centre itself, scores tiny but different: their ratio to each other shows nothing."""
    head = sphere_of(method)
    with torch.no_grad():
        weight = 1e-5 * head.map.weight
        head.map = nn.Linear(head.map.in_features, head.map.out_features)
        head.map.weight.copy_(weight)
        head.map.bias.copy_(head.centre)


def half_dead(method):
    with torch.no_grad():
        sphere_of(method).map.weight[:16] = 0


def zero_centre(method): sphere_of(method).centre.zero_()


def not_finite(method): sphere_of(method).centre[0] = math.nan


@pytest.mark.parametrize("harm, words", [(constant, ["all samples lie at one distance", "collapse: every output"]), (reaches_the_centre, ["collapse: every output", "bias term"]),
                                         (half_dead, ["50 % of the outputs"]), (zero_centre, ["centre lies at zero"]), (not_finite, ["not finite"])])
def test_harm_done_on_purpose_is_found_and_named(harm, words, trained, data):
    method = copy.deepcopy(trained)
    harm(method)
    faults = check_sphere(method, data, "list")
    assert len(faults) == len(words) and all(any(word in fault for fault in faults) for word in words), faults
    with pytest.raises(RuntimeError, match=words[0]):
        check_sphere(method, data, "raise")
    with pytest.warns(UserWarning) as said:
        check_sphere(method, data)
    assert [str(w.message) for w in said] == faults


def test_a_network_with_biases_before_a_sound_head_is_found_when_it_collapses(data):
    method = method_of("concat", data)
    with torch.no_grad():
        method.model.fusion.project.weight.zero_()   # what strong weight decay does: the bias is all that is left
        method.model.fusion.project.bias.normal_(generator=torch.Generator().manual_seed(0))
    assert any("every output" in fault for fault in check_sphere(method, data, "list"))


def test_omib_has_its_sphere_behind_hidden_layers(data):
    method = method_of("omib", data, beta=0.03, head_hidden=(8,))
    assert sphere_of(method).map.in_features == 8 and sphere_of(method) is method.fused_head[-1]
    method.fused_head[0] = nn.Linear(16, 8)   # with a bias
    assert sphere_report(method, data)["biases/head"] == 1


def test_an_unknown_answer_to_faults_is_refused(trained, data):
    with pytest.raises(ValueError, match="choose 'warn', 'raise' or 'list'"):
        check_sphere(trained, data, "ignore")


def test_faults_of_a_plain_report():
    good = {"samples": 50.0, "score/mean": 1.0, "score/variance": 0.5, "centre/norm": 1.0, "dead": 0.0, "biases/head": 0.0}
    assert sphere_faults(good) == []
    assert "one distance" in sphere_faults(good | {"score/variance": 1e-8})[0]
    assert sphere_faults(good | {"samples": 1.0, "score/variance": 0.0}) == []   # one sample has no deviation


# ---------------------------------------------------------------- the threshold

def test_the_threshold_is_the_conformal_order_statistic_of_normal_samples_only(trained):
    held = one_class(gaussian(99, seed=2))
    scores = predict_all(trained, held)
    found = detect(trained, held, held, nu=0.1)
    assert isinstance(found, Detection) and found.normals == 99 and found.threshold == pytest.approx(scores.sort().values[89].item()) and int(found.flags.sum()) == 9
    target = np.r_[np.zeros(50, int), np.ones(24, int), -np.ones(25, int)]
    mixed = MultimodalData.from_arrays({m: held[torch.arange(99)].inputs[m].numpy() for m in "ab"}, target, kind="one_class", num_classes=3)
    assert detect(trained, mixed, held, 0.1).threshold == detect(trained, held.subset(range(50)), held, 0.1).threshold


def test_too_few_normal_samples_are_refused(trained, data):
    assert detect(trained, data.subset(range(19)), data, 0.05).normals == 19
    with pytest.raises(ValueError, match="18 normal samples.*at least 19"):
        detect(trained, data.subset(range(18)), data, 0.05)
    with pytest.raises(ValueError, match="nu=0"):
        detect(trained, data, data, 0)


def test_a_new_normal_sample_is_flagged_as_often_as_promised(trained):
    many = predict_all(trained, one_class(gaussian(40000, seed=3))).numpy()
    share = [(many[20:] > np.sort(many[rng.integers(40000, size=39)])[35]).mean() for rng in map(np.random.default_rng, range(400))]   # 36th of 39: nu = 0.1
    assert np.mean(share) == pytest.approx(0.1, abs=0.01)
    held = one_class(gaussian(39, seed=4))
    assert detect(trained, held, held, 0.1).threshold == pytest.approx(np.sort(predict_all(trained, held).numpy())[35])


# ---------------------------------------------------------------- how good the score is

@pytest.mark.parametrize("boundary", ["hard", "soft"])
def test_wide_anomalies_are_found_nearly_as_well_as_by_the_likelihood_ratio(boundary):
    """N(0, I) against N(0, 9 I): the exact ratio grows with |x|², whose two chi-square laws give the AUC."""
    train, y = one_class(gaussian(400)), np.repeat([0, 1], 1000)
    rows = np.r_[gaussian(1000, 5), 3 * gaussian(1000, 6)]
    grid = stats.chi2(4).ppf((np.arange(4000) + 0.5) / 4000)
    exact = stats.chi2(4).sf(grid / 9).mean()
    assert anomaly_metrics((rows ** 2).sum(1), y)["auc"] == pytest.approx(exact, abs=0.01)
    method = method_of("concat", train)
    if boundary == "soft":
        soft_boundary(method, 0.1, warmup=5)
    fit(method, train, config=TrainingConfig(epochs=10, lr=3e-3, batch_size=50))
    auc = anomaly_metrics(predict_all(method, one_class(rows)), y)["auc"]
    assert exact - 0.06 < auc <= exact + 0.01


# ---------------------------------------------------------------- real files

@pytest.mark.slow
@pytest.mark.skipif(not FILES.is_dir(), reason="needs the files of her2st under IBMA_DATA: data_prep/her2st/README.md")
def test_a_short_run_on_real_tissue(tmp_path, monkeypatch):
    monkeypatch.setenv("IBMA_CACHE", os.environ.get("IBMA_CACHE", str(tmp_path)))
    data = load("her2st")
    train, valid, test = (data.subset(data.splits[part]) for part in ("train", "valid", "test"))
    method = create("ce", data, seed=0, dim=16, encoders={"graph": {"hidden": 16}, "image": {"width": 4}})
    fit(method, train, config=TrainingConfig(epochs=2, lr=1e-3, batch_size=64))
    found = anomaly_metrics(predict_all(method, test), test.target)
    assert all(math.isfinite(value) and 0 <= value <= 1 for value in found.values())
    assert found["baseline/anomaly"] == pytest.approx(302 / 340) and found["baseline/normal"] == pytest.approx(38 / 340)
    assert {"auc", "f1/anomaly", "f1/normal"} <= set(found)
    report = sphere_report(method, train)
    assert report["samples"] == 455 and report["centre/smallest"] >= 0.1 - 1e-6 and report["score/variance"] > 0 and sphere_faults(report) == []
    flags = detect(method, valid, test).flags
    assert len(flags) == 345
