"""IBMA's ablations and variants: each switch removes its part exactly, each bound is what its definition says, in every kind of task."""
import copy
import math

import numpy as np
import pytest
import torch
from cases import toy_data
from cases_methods import KINDS, kind_of_data, short_fit

from ibma.methods import create
from ibma.methods.ibma import ESTIMATED, IBMA
from ibma.training import TrainingConfig, fit

SMALL = {"dim": 8, "encoders": {"vector": {"hidden": 8}}}
IBB = ("paper", "tight", "released")


def small(data, seed=0, **options):
    return create("ibma", data, seed=seed, **SMALL | options)


def started(data, **options):
    "After two refreshes, so that the tables tell something."
    method, batches = small(data, **options), list(data.loader(16))
    method.on_fit_start(batches)
    method.on_epoch_end(batches)
    return method


def twin(method, data, **options):
    "The same weights and statistics under other switches."
    other = small(data, **options)
    other.load_state_dict(method.state_dict())
    if method.clusters is not None:
        other.clusters = copy.deepcopy(method.clusters)
    return other.train(method.training)


def gradients(method, value):
    method.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


# --- slow references


def slow_assignments(z, centroids, temperature, normalize):
    rows = []
    for row in z.tolist():
        scores = []
        for centre in centroids.tolist():
            a, b = np.array(row), np.array(centre)
            if normalize:
                a, b = a / max(np.linalg.norm(a), 1e-12), b / max(np.linalg.norm(b), 1e-12)
            scores.append(-float(((a - b) ** 2).sum()) / temperature)
        top = max(scores)
        e = [math.exp(s - top) for s in scores]
        rows.append([v / sum(e) for v in e])
    return rows


def slow_terms(method, batch, bound):
    "IBB terms of a single-label batch with two modalities, all present, from centroids and tables (METHODS, section 1)"
    out, stats, loss = copy.deepcopy(method).eval()(batch), method.ibb.statistics, method.ibb
    sources = [*out.z.values(), out.fused]
    phi = [slow_assignments(z, stats.centroids[s], loss.temperature, loss.normalize) for s, z in enumerate(sources)]
    q, n, k = stats.log_table, len(batch), loss.num_classes
    terms = {}
    for j, name in enumerate(out.z):
        total = 0.0
        for i in range(n):
            for a in range(k):
                for y in range(k):
                    joint = phi[j][i][a] * phi[1 - j][i][y]
                    value = -float(q[j][a, y])
                    if bound == "tight":
                        value += math.log(max(phi[j][i][a], 1e-300))
                    total += joint * value
        terms[name] = total / sum(int(y) >= 0 for y in batch.target)  # fewer unlabelled than labelled: each counts as a labelled one does
    total, known = 0.0, 0
    marginal = stats.log_marginal[-1]
    for i in range(n):
        y = int(batch.target[i])
        if y < 0:
            continue
        known += 1
        for a in range(k):
            p = phi[2][i][a]
            value = -float(q[2][a, y])
            if bound == "tight":
                value = value + math.log(max(p, 1e-300)) + (math.log(max(p, 1e-300)) - float(marginal[a]))
            total += p * value
    terms["fused"] = total / max(known, 1)
    return terms


@pytest.mark.parametrize("bound", ["paper", "tight"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "normalize": False}], ids=["default", "printed"])
def test_the_bound_is_the_slow_one_part_by_part(bound, options):
    data = toy_data(21, unlabelled=True)
    method = started(data, eta=0.7, loss={"bound": bound, **options}).eval()
    expected = slow_terms(method, data[:], bound)
    whole = method.loss(data[:])["ibb"].item()
    assert whole == pytest.approx(0.7 * sum(expected.values()), rel=1e-4)
    same, without = {"eta": 0.7, "loss": {"bound": bound, **options}}, {}
    for switch in ("alignment", "fused_bound"):
        without[switch] = twin(method, data, **same, **{switch: False}).loss(data[:])["ibb"].item()
    assert without["alignment"] == pytest.approx(0.7 * expected["fused"], rel=1e-4, abs=1e-6)
    assert without["fused_bound"] == pytest.approx(0.7 * (expected["m0"] + expected["m1"]), rel=1e-4)


# --- what the switches remove


@pytest.mark.parametrize("bound", [*IBB, *ESTIMATED])
def test_the_parts_add_up_in_value_and_gradient(bound):
    data = toy_data(32, num_modalities=3, masks=True, unlabelled=True)
    if bound == "released":
        with pytest.raises(ValueError, match="no fused term"):
            small(data, loss={"bound": bound}, alignment=False)
        method = started(data, loss={"bound": bound}).eval()
        other = twin(method, data, loss={"bound": bound}, fused_bound=False)
        assert other.loss(data[:])["ibb"] == method.loss(data[:])["ibb"]  # it has none to remove
        return
    method = started(data, loss={"bound": bound}).eval()  # evaluation mode: VIB's codes are their means
    values = {"whole": method.loss(data[:])["ibb"]}
    found = {"whole": gradients(method, values["whole"])}
    for switch in ("alignment", "fused_bound"):
        other = twin(method, data, loss={"bound": bound}, **{switch: False})
        values[switch] = other.loss(data[:])["ibb"]
        found[switch] = gradients(other, values[switch])
    if bound != "vib":  # there a part that is gone leaves its representation unsampled, which moves the others
        assert (values["alignment"] + values["fused_bound"]).item() == pytest.approx(values["whole"].item(), rel=1e-4, abs=1e-6)
        for name, gradient in found["whole"].items():
            parts = sum(found[switch].get(name, torch.zeros_like(gradient)) for switch in ("alignment", "fused_bound"))
            torch.testing.assert_close(parts, gradient, atol=1e-6, rtol=1e-3)
    assert not any(name.startswith("model.fusion") for name in found["fused_bound"])  # nothing asks the fusion any more
    assert any(name.startswith("model.fusion") for name in found["alignment"])
    assert not any(name.startswith(("model.heads", "model.fused_head")) for name in found["whole"])


def test_a_removed_part_of_vib_has_no_code_and_no_gradient():
    data = toy_data(32)
    for switch, gone, kept in (("alignment", ("m0", "m1"), ("fused",)), ("fused_bound", ("fused",), ("m0", "m1"))):
        method = small(data, loss={"bound": "vib"}, **{switch: False})
        method.on_fit_start(list(data.loader(16)))
        found = gradients(method, sum(method.loss(data[:]).values()))
        layers = {name.split(".")[3] for name in found if name.startswith("ibb.upper.layers")}
        assert layers == set(kept) and not layers & set(gone)
        terms = method.ibb.terms
        assert set(terms) >= {"compression_m0", "compression_fused", "alignment_m0"}


def test_without_unimodal_cross_entropy_the_heads_of_modalities_stay_as_they_are():
    data = toy_data(33)
    method = small(data, unimodal_ce=False)
    before = copy.deepcopy(method.state_dict())
    short_fit(method, data.loader(16), epochs=2)
    assert list(method.loss(data[:])) == ["ce/fused", "ibb"]
    moved = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any(name.startswith("model.heads") for name in moved)
    same = small(data)  # the switch does not change what the seed draws
    assert all(torch.equal(before[name], value) for name, value in same.state_dict().items())


def test_switches_that_are_on_change_nothing():
    data = toy_data(33, masks=True, unlabelled=True)
    plain, named = started(data), started(data, alignment=True, fused_bound=True, unimodal_ce=True, loss={"bound": "paper"})
    one, two = plain.loss(data[:]), named.loss(data[:])
    assert list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def test_the_whole_bound_is_the_module_called_by_hand():
    data = toy_data(33, masks=True, unlabelled=True)
    method = started(data, eta=0.3)
    out, batch = method(data[:]), data[:]
    value = 0.3 * copy.deepcopy(method.ibb)(out.z, out.fused, batch.target, batch.mask)
    assert torch.equal(method.loss(batch)["ibb"], value)


def test_separate_terms_have_their_gradient_and_add_up():
    data = toy_data(33, num_modalities=3, masks=True)
    method = started(data)
    out, batch = method(data[:]), data[:]
    terms = method.ibb.separate(out.z, out.fused, batch.target, batch.mask)
    assert list(terms) == ["m0", "m1", "m2", "fused"] and all(v.requires_grad for v in terms.values())
    assert torch.equal(sum(terms.values()), method.ibb(out.z, out.fused, batch.target, batch.mask))
    assert all(torch.equal(method.ibb.terms[name], value) for name, value in terms.items())


def test_nothing_left_is_refused():
    data = toy_data()
    neither = {"alignment": False, "fused_bound": False}
    for options in (neither, {"alignment": False, "loss": {"bound": "released"}}, {**neither, "loss": {"bound": "vib"}}):
        with pytest.raises(ValueError, match="nothing is left of the bound.*eta=0"):
            small(data, **options)
    with pytest.raises(TypeError, match="prototypes"):
        small(data, loss={"bound": "club", "prototypes": "mean"})
    with pytest.raises(ValueError, match="two modalities"):
        small(data.select("m0"), loss={"bound": "vib"})


# --- estimators in the bound's place


def test_estimators_get_the_scaled_inputs_of_their_width():
    data = toy_data(32, image=True)
    for bound in ("club", "apib"):
        method = small(data, loss={"bound": bound}, encoders={"vector": {"hidden": 8}, "image": {"width": 4}})
        method.on_fit_start(list(data.loader(16)))
        inputs = method._inputs(data[:])
        assert {name: x.shape for name, x in inputs.items()} == {"m0": (32, 16), "m1": (32, 16)}
        assert abs(inputs["m1"].mean().item()) < 0.05 and abs(inputs["m1"].std().item() - 1) < 0.05
        assert {name: e.dims["x"] for name, e in method.ibb.upper.own.items()} == {"m0": 16, "m1": 16}


def slow_hsic(x, z):
    "Gaussian kernels with factor 1/d (APIB), biased estimate"
    n = len(x)
    kernels = []
    for rows in (x.tolist(), z.tolist()):
        factor = 1 / len(rows[0])
        kernels.append(np.array([[math.exp(-factor * sum((a - b) ** 2 for a, b in zip(r, s, strict=True))) for s in rows] for r in rows]))
    centring = np.eye(n) - 1 / n
    return float(np.trace(kernels[0] @ centring @ kernels[1] @ centring)) / (n - 1) ** 2


def test_apib_is_the_slow_one():
    data = toy_data(20)
    method = started(data, eta=1.0, loss={"bound": "apib"}).eval()
    with torch.no_grad():
        out, inputs, target = method(data[:]), method._inputs(data[:]), data[:].target
    z = list(out.z.values())
    labels = np.array([[float(a == b) for b in target] for a in target])
    centring = np.eye(20) - 1 / 20
    rows = out.fused.tolist()
    gram = np.array([[math.exp(-sum((a - b) ** 2 for a, b in zip(r, s, strict=True)) / len(r)) for s in rows] for r in rows])
    expected = sum(slow_hsic(x, zj) + slow_hsic(x, out.fused) for x, zj in zip(inputs.values(), z, strict=True))
    expected += -2 * slow_hsic(z[0], z[1]) - float(np.trace(gram @ centring @ labels @ centring)) / 19**2
    assert method.loss(data[:])["ibb"].item() == pytest.approx(expected, rel=1e-3)


def slow_mean_kl(mean, logvar):
    "of diagonal Gaussians from N(0, I), over samples"
    rows = zip(mean.tolist(), logvar.tolist(), strict=True)
    return sum(0.5 * sum(m * m + math.exp(s) - 1 - s for m, s in zip(ms, ss, strict=True)) for ms, ss in rows) / len(mean)


def test_vib_pays_the_kl_of_every_code_and_predicts_from_their_means():
    data = toy_data(20)
    method = small(data, eta=1.0, loss={"bound": "vib", "alignment": False, "compression_weight": 2.0})
    method.on_fit_start(list(data.loader(16)))
    method.eval()
    value, expected = method.loss(data[:])["ibb"].item(), 0.0
    with torch.no_grad():
        z = {}
        for name, h in method.encode(data[:]).items():
            layer = method.ibb.upper.layers[name]
            mean, logvar = layer.mean(h), layer.logvar(h)
            expected += slow_mean_kl(mean, logvar)
            z[name] = mean
        layer, h = method.ibb.upper.layers["fused"], method.model.fusion(list(z.values()))
        mean, logvar = layer.mean(h), layer.logvar(h)
        expected += 2 * slow_mean_kl(mean, logvar)
        probabilities = method.model.fused_head(mean).softmax(-1)
    assert value == pytest.approx(2 * expected, rel=1e-4)
    torch.testing.assert_close(method.predict(data[:].inputs), probabilities)
    method.train()
    assert torch.equal(method.predict(data[:].inputs), method.predict(data[:].inputs))  # deterministic, whatever the mode
    one, two = method(data[:]), method(data[:])
    assert not torch.equal(one.fused, two.fused) and not torch.equal(one.z["m0"], two.z["m0"])


def test_clubs_networks_follow_their_own_loss_only():
    data = toy_data(32)
    method = small(data, loss={"bound": "club", "hidden": 8})
    method.on_fit_start(list(data.loader(16)))
    (optimizer,) = method.optimizers(TrainingConfig(lr=0.02))
    assert optimizer.defaults["lr"] == 0.02
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert own == {id(p) for p in method.ibb.parameters()}
    assert not any(name.startswith("ibb") for name in gradients(method, sum(method.loss(data[:]).values())))
    assert all(name.startswith("ibb") for name in gradients(method, method.learning_loss(data[:])))
    before = method.learning_loss(data[:]).item()
    for _ in range(40):
        optimizer.zero_grad()
        method.learning_loss(data[:]).backward()
        optimizer.step()
    assert method.learning_loss(data[:]).item() < before - 0.1
    assert not small(data, loss={"bound": "vib"}).optimizers(TrainingConfig()) and not small(data).optimizers(TrainingConfig())


def test_a_negative_club_is_said():
    data = toy_data(32)
    method = small(data, loss={"bound": "club"})
    method.ibb.terms = {"compression_m0": torch.tensor(-0.5), "compression_m1": torch.tensor(1.0), "alignment_m0": torch.tensor(-2.0)}
    (complaint,) = method.complaints()
    assert "negative for compression_m0," in complaint
    assert method.diagnostics()["estimate/compression_m0"] == -0.5


# --- kinds of tasks


@pytest.mark.parametrize("bound", [*IBB, *ESTIMATED])
@pytest.mark.parametrize("kind", KINDS)
def test_every_bound_trains_in_every_kind_of_task(kind, bound):
    data = kind_of_data(kind, num_modalities=3, masks=True)
    method = small(data, loss={"bound": bound})
    method.optimizers = lambda config: IBMA.optimizers(method, TrainingConfig())
    terms = short_fit(method, data.loader(16), epochs=2)
    assert set(terms) == {"ce/m0", "ce/m1", "ce/m2", "ce/fused", "ibb"} and all(math.isfinite(v) for v in terms.values())
    p = method.predict(data[:].inputs, data[:].mask)
    assert p.isfinite().all() and p.shape == ((33, 3) if "label" in kind else (33,))
    assert all(math.isfinite(v) for v in method.diagnostics().values())


def test_a_regression_is_bound_by_its_bins():
    data = kind_of_data("regression")
    method = started(data)
    targets, batch = method.bound_targets(data[:]), data[:]
    expected = [-1 if math.isnan(y) else sum(y >= b for b in data.task.bins) for y in batch.target.tolist()]
    assert targets.tolist() == expected and -1 in expected
    known = (torch.tensor(expected) >= 0).nonzero()[:, 0]
    out, batch = method(data[known]), data[known]
    assert torch.equal(method.loss(batch)["ibb"], 0.5 * method.ibb(out.z, out.fused, torch.tensor(expected)[known], batch.mask))
    counts = torch.bincount(torch.tensor([y for y in expected if y >= 0]), minlength=3)
    torch.testing.assert_close(method.ibb.statistics.log_prior.exp(), counts / counts.sum(), atol=1e-5, rtol=0)


def test_a_one_class_task_is_bound_by_its_pseudo_classes_and_anomalies_by_none():
    data = kind_of_data("one_class")
    method = started(data)
    targets, batch = method.bound_targets(data[:]), data[:]
    assert (targets[batch.target == 1] == -1).all() and (targets[batch.target != 1] >= 0).all()
    assert len(targets[targets >= 0].unique()) == data.task.num_classes
    out = method(batch)
    assert torch.equal(method.loss(batch)["ibb"], 0.5 * method.ibb(out.z, out.fused, targets, batch.mask))


# --- prototypes


@pytest.mark.parametrize("prototypes", ["mean", "learnable", "ema"])
@pytest.mark.parametrize("switch", ["alignment", "fused_bound"])
def test_prototypes_of_a_removed_part_do_not_learn(prototypes, switch):
    data = toy_data(32)
    method = small(data, loss={"prototypes": prototypes}, **{switch: False})
    method.on_fit_start(list(data.loader(16)))
    method.on_epoch_end(list(data.loader(16)))
    found = gradients(method, method.loss(data[:])["ibb"])
    if prototypes != "learnable":
        assert "ibb.statistics.centroids" not in found
        return
    rows = found["ibb.statistics.centroids"].abs().flatten(1).sum(1) > 0
    assert rows.tolist() == ([False, False, True] if switch == "alignment" else [True, True, False])


def test_an_ablation_survives_interruption(tmp_path):
    data = toy_data(40)
    config = {"batch_size": 16, "lr": 1e-2, "device": "cpu", "run_dir": str(tmp_path / "run")}
    for bound in ("paper", "vib", "club"):
        runs = {}
        for resumed in (False, True):
            folder = config | {"run_dir": str(tmp_path / f"{bound}{resumed}")}
            if resumed:
                fit(small(data, loss={"bound": bound}, fused_bound=False), data, config=TrainingConfig(epochs=1, **folder))
            method = small(data, loss={"bound": bound}, fused_bound=False)
            fit(method, data, config=TrainingConfig(epochs=2, resume=resumed, **folder))
            runs[resumed] = method.state_dict()
        assert all(torch.equal(runs[False][key], runs[True][key]) for key in runs[False])
