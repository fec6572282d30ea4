"""ibma.probing against scikit-learn done by hand, planted cases, poisoned test labels, and batches masked by hand."""
import warnings

import numpy as np
import pytest
import torch
from cases import toy_data
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, mean_absolute_error, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ibma.data import MultimodalData
from ibma.data.core import Modality, Task
from ibma.methods import METHODS, create
from ibma.metrics import UndefinedMetric, measure
from ibma.probing import GRID, keep_only, linear_probe, missing_modality, probe, representations, untrained
from ibma.training import TrainingConfig, fit

SIZES = {"train": 60, "valid": 50, "test": 40}
FORMS = {"single_label": {}, "multi_label": {"multi_label": True}}


def task_of(kind, classes=3, width=6):
    return Task(kind, classes, {"m": Modality("vector", (width,))}, bins=(-1.0, 1.0) if kind == "regression" else None)


def drawn(seed=0, classes=3, width=6, sizes=SIZES, strength=1.0):
    rng = np.random.default_rng(seed)
    means = strength * rng.normal(size=(classes, width))
    y = {part: rng.integers(classes, size=n) for part, n in sizes.items()}
    return {part: means[labels] + rng.normal(size=(len(labels), width)) * (1 + np.arange(width)) + 5 for part, labels in y.items()}, y


def tensors(parts):
    return {part: torch.as_tensor(v) for part, v in parts.items()}


def quiet(*args, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*edge of its grid.*")
        return probe(*args, **options)


@pytest.mark.parametrize("seed", range(5))
def test_probe_of_classes_is_scikit_learns(seed):
    x, y = drawn(seed)
    found = quiet(tensors(x), tensors(y), task_of("single_label"))
    models = {c: make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(x["train"], y["train"]) for c in GRID}
    scores = {c: accuracy_score(y["valid"], m.predict(x["valid"])) for c, m in models.items()}
    best = min(c for c in GRID if scores[c] == max(scores.values()))
    assert found.scores == pytest.approx(scores) and found.c == best and found.score == "accuracy"
    assert found.value == pytest.approx(accuracy_score(y["test"], models[best].predict(x["test"])))
    assert found.samples == tuple(SIZES.values())


def test_refit_trains_the_chosen_model_on_both_parts():
    x, y = drawn(3)
    alone, both = (quiet(tensors(x), tensors(y), task_of("single_label"), refit=refit) for refit in ("train", "train+valid"))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=both.c, max_iter=2000))
    model.fit(np.concatenate([x["train"], x["valid"]]), np.concatenate([y["train"], y["valid"]]))
    assert (both.c, both.scores) == (alone.c, alone.scores)
    from sklearn.metrics import log_loss
    assert both.metrics["nll"] == pytest.approx(log_loss(y["test"], model.predict_proba(x["test"])), rel=1e-4)
    assert both.metrics["nll"] != pytest.approx(alone.metrics["nll"], rel=1e-4)


def test_probe_of_values_is_ridge_regression():
    x, _ = drawn(1)
    y = {part: (v - 5) @ np.linspace(-0.1, 0.3, 6) + np.random.default_rng(2).normal(size=len(v)) for part, v in x.items()}
    hidden = {part: np.where(np.arange(len(v)) % 7 == 3, np.nan, v) for part, v in y.items()}
    found = quiet(tensors(x), tensors(hidden), task_of("regression"))
    scaler, known = StandardScaler().fit(x["train"]), ~np.isnan(hidden["train"])
    z = {part: scaler.transform(v) for part, v in x.items()}
    models = {c: Ridge(alpha=1 / c).fit(z["train"][known], y["train"][known]) for c in GRID}
    errors = {part: {c: mean_absolute_error(y[part][k], m.predict(z[part][k])) for c, m in models.items()} for part in ("valid", "test") for k in [~np.isnan(hidden[part])]}
    assert found.scores == pytest.approx(errors["valid"])
    assert found.c == min(errors["valid"], key=errors["valid"].get)  # the lower the better
    assert found.value == pytest.approx(errors["test"][found.c])


def test_unknown_labels_take_no_part():
    x, _ = drawn(4)
    rng = np.random.default_rng(5)
    y = {part: (v[:, :2] - 5 + rng.normal(size=(len(v), 2)) > 0).astype(float) for part, v in x.items()}
    hidden = {part: np.where(rng.random(v.shape) < 0.3, np.nan, v) for part, v in y.items()}
    found = quiet(tensors(x), tensors(hidden), task_of("multi_label", 2), grid=(0.3,))
    scaler, areas = StandardScaler().fit(x["train"]), []
    for j in range(2):
        known = {part: ~np.isnan(v[:, j]) for part, v in hidden.items()}
        model = LogisticRegression(C=0.3, max_iter=2000).fit(scaler.transform(x["train"])[known["train"]], y["train"][known["train"], j])
        areas.append(roc_auc_score(y["test"][known["test"], j], model.predict_proba(scaler.transform(x["test"])[known["test"]])[:, 1]))
    assert found.value == pytest.approx(np.mean(areas)) and found.score == "mauc"
    for part in hidden:  # and what stands behind an unknown label is never read
        assert np.isnan(hidden[part]).any()


def test_a_label_of_one_value_is_predicted_by_it():
    x, _ = drawn(4)
    y = {part: np.stack([v[:, 0] > 5, np.ones(len(v)) if part == "train" else v[:, 1] > 5, v[:, 2] > 5], 1).astype(float) for part, v in x.items()}
    y["train"][:, 2] = np.nan  # a label nobody knows in training
    found = quiet(tensors(x), tensors(y), task_of("multi_label", 3))
    assert found.metrics["auc/1"] == found.metrics["auc/2"] == 0.5 < found.metrics["auc/0"]


def test_classes_that_training_lacks_and_unlabelled_samples():
    x, y = drawn(6, strength=4.0)
    kept = {**y, "train": np.where(y["train"] == 1, -1, y["train"])}
    found = quiet(tensors(x), tensors(kept), task_of("single_label"), grid=(1.0,))
    seen = y["train"] != 1
    scaler = StandardScaler().fit(x["train"])  # an unlabelled sample still has features
    model = LogisticRegression(C=1.0, max_iter=2000).fit(scaler.transform(x["train"])[seen], y["train"][seen])
    assert found.value == pytest.approx(accuracy_score(y["test"], model.predict(scaler.transform(x["test"]))))
    only = {**y, "train": np.full(SIZES["train"], 2)}
    assert quiet(tensors(x), tensors(only), task_of("single_label"), grid=(1.0,)).value == pytest.approx((y["test"] == 2).mean())


def planted(seed=0):
    "Training with wrong labels wants no regularisation, validation much, and test (with flipped labels) would want the worst model."
    rng = np.random.default_rng(seed)
    y = {part: rng.integers(2, size=n) for part, n in (("train", 100), ("valid", 400), ("test", 400))}
    x = {part: rng.normal(size=(len(v), 100)) + 0.5 * (np.arange(100) < 10) * (2 * v[:, None] - 1) for part, v in y.items()}
    y["train"] = np.where(rng.random(100) < 0.25, 1 - y["train"], y["train"])
    return x, y


@pytest.mark.parametrize("seed", range(3))
def test_validation_chooses_where_train_and_test_would_choose_otherwise(seed):
    x, y = planted(seed)
    y["test"] = 1 - y["test"]
    found = probe(tensors(x), tensors(y), task_of("single_label", 2, 100))
    models = {c: make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(x["train"], y["train"]) for c in GRID}
    accuracy = {part: {c: m.score(x[part], y[part]) for c, m in models.items()} for part in x}
    best = {part: max(scores, key=scores.get) for part, scores in accuracy.items()}
    assert found.c == best["valid"] and accuracy["train"][found.c] < 1 == accuracy["train"][GRID[-1]]
    assert accuracy["test"][found.c] < accuracy["test"][best["test"]] - 0.05
    assert not found.edge


@pytest.mark.parametrize("form", FORMS)
def test_poisoned_test_labels_and_samples_choose_nothing(form):
    data = toy_data(150, masks=True, noise=2.0, **FORMS[form])
    method = create("ce", data, seed=0, dim=8, encoders={"vector": {"hidden": 8}})
    train, valid, test = data.split(seed=0)
    poisoned = test.subset(torch.arange(len(test)))
    poisoned.target = test.target.flip(0) if form == "multi_label" else (test.target + 1) % 3
    poisoned.inputs = {name: -3 * x for name, x in test.inputs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, other = (linear_probe(method, train, valid, t) for t in (test, poisoned))
    for name in one:
        assert (one[name].c, one[name].scores) == (other[name].c, other[name].scores)
        assert one[name].metrics != other[name].metrics


def test_edge_of_the_grid_is_said():
    x, y = planted()
    with pytest.warns(UserWarning, match="lies on the edge of its grid 1 ... 100"):
        assert probe(tensors(x), tensors(y), task_of("single_label", 2, 100), grid=(100, 1, 10)).edge
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not probe(tensors(x), tensors(y), task_of("single_label", 2, 100), grid=(1,)).edge


def test_refusals():
    x, y = drawn()
    for kind, options, said in (("one_class", {}, "no labels to train a probe on"), ("single_label", {"grid": (0, 1)}, "positive values of C"),
                                ("single_label", {"grid": ()}, "positive values of C"), ("single_label", {"refit": "test"}, "refit='test' is unknown")):
        with pytest.raises(ValueError, match=said):
            probe(tensors(x), tensors(y), task_of(kind), **options)
    data = toy_data(60)
    train, valid, test = data.split(seed=0)
    method = create("ce", data, seed=0, dim=8)
    with pytest.raises(ValueError, match="of='random' is unknown"):
        linear_probe(method, train, valid, test, of="random")
    with pytest.raises(UndefinedMetric, match="no sample of test has modality 'm1'"):
        linear_probe(method, train, valid, keep_only(test, ["m0"]))
    with pytest.raises(KeyError, match="unknown modality"):
        keep_only(test, ["m7"])
    renamed = MultimodalData.from_arrays({"fused": data.inputs["m0"], "m1": data.inputs["m1"]}, data.target)
    with pytest.raises(ValueError, match="a modality is called 'fused'"):
        representations(create("ce", renamed, seed=0, dim=8), renamed)


@pytest.mark.parametrize("name", METHODS)
def test_the_fused_vector_is_what_decides(name):
    data = toy_data(24, masks=True)
    method = create(name, data, seed=0, dim=8, **({"beta": 0.1} if name == "omib" else {})).train()
    method.on_fit_start(list(data.loader(12)))
    before = torch.random.get_rng_state()
    z, mask = representations(method, data, batch_size=7)
    assert torch.equal(before, torch.random.get_rng_state()) and method.training
    assert list(z) == ["m0", "m1", "fused"] == list(mask) and mask["fused"].all()
    for m in data.inputs:
        assert torch.equal(mask[m], data.mask[m])
        assert not z[m][~mask[m]].any() and z[m][mask[m]].abs().sum(1).min() > 0
        encoded = method._in_eval_mode(lambda: method.encode(data[:]))[m]
        torch.testing.assert_close(z[m][mask[m]], encoded[mask[m]])
    head = getattr(method, "fused_head", None) or method.model.fused_head
    with torch.no_grad():
        decided = method.eval().prediction(head(z["fused"]))
    same = torch.allclose(decided, method.predict(data.inputs, data.mask), atol=1e-5)
    assert same == (name != "dclf")  # the one that the page names


def test_probes_take_the_samples_that_have_the_modality():
    data = toy_data(200, masks=True, noise=1.5)
    train, valid, test = data.split(seed=1)
    method = create("ce", data, seed=0, dim=8, encoders={"vector": {"hidden": 8}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = linear_probe(method, train, valid, test)
        by_hand = {}
        for name in ("m0", "fused"):
            rows = {p: d.mask.get(name, torch.ones(len(d), dtype=torch.bool)) for p, d in (("train", train), ("valid", valid), ("test", test))}
            x = {p: representations(method, d)[0][name][rows[p]] for p, d in (("train", train), ("valid", valid), ("test", test))}
            by_hand[name] = probe(x, {p: d.target[rows[p]] for p, d in (("train", train), ("valid", valid), ("test", test))}, data.task)
    assert found["m0"].samples == tuple(int(d.mask["m0"].sum()) for d in (train, valid, test)) != found["fused"].samples == (len(train), len(valid), len(test))
    assert all(found[name] == by_hand[name] for name in by_hand)


def test_baselines():
    data = toy_data(150, noise=1.5)
    train, valid, test = data.split(seed=0)
    method = create("ibma", data, seed=0, dim=8, encoders={"vector": {"hidden": 8}})
    fit(method, train, None, TrainingConfig(epochs=2, device="cpu"))
    state = {name: value.clone() for name, value in method.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs, fresh = (linear_probe(method, train, valid, test, of=of, seed=3) for of in ("inputs", "untrained"))
        raw = probe({p: d.inputs["m0"] for p, d in (("train", train), ("valid", valid), ("test", test))}, {p: d.target for p, d in (("train", train), ("valid", valid), ("test", test))}, data.task)
        again = linear_probe(untrained(method, 3), train, valid, test)
    assert inputs["m0"].value == pytest.approx(raw.value)  # standardised twice is standardised
    assert fresh == again
    assert all(torch.equal(value, state[name]) for name, value in method.state_dict().items())


@pytest.mark.parametrize("name", ["ibma", "omib", "misa", "mmrlib", "clfa"])
def test_untrained_keeps_nothing_but_the_scaling(name):
    data = toy_data(40, image=True)
    method = create(name, data, seed=0, dim=8, encoders={"image": {"width": 4}}, **({"beta": 0.1} if name == "omib" else {}))
    method.on_fit_start(list(data.loader(20)))
    with torch.no_grad():
        for p in method.parameters():
            p.add_(7 * torch.rand_like(p))
    before = torch.random.get_rng_state()
    fresh, again, other = untrained(method, 1), untrained(method, 1), untrained(method, 2)
    assert torch.equal(before, torch.random.get_rng_state())
    for (key, trained), new, same in zip(method.named_parameters(), fresh.parameters(), again.parameters(), strict=True):
        assert torch.equal(new, same) and (trained.numel() == 1 or not torch.equal(new, trained)), key
    assert any(not torch.equal(a, b) for a, b in zip(fresh.parameters(), other.parameters(), strict=True))
    assert max(p.detach().abs().max().item() for p in fresh.model.encoders.parameters()) < 3  # what was added is gone
    for encoder, old in zip(fresh.model.encoders.values(), method.model.encoders.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(encoder.scaler.buffers(), old.scaler.buffers(), strict=True))


@pytest.mark.parametrize("name", ["ce", "concat", "ibma", "omib", "dclf", "misa"])
@pytest.mark.parametrize("modalities", [2, 3])
def test_a_dropped_modality_is_a_masked_batch(name, modalities):
    data = toy_data(60, modalities, masks=True)
    method = create(name, data, seed=0, dim=8, **({"beta": 0.1} if name == "omib" else {}))
    method.on_fit_start(list(data.loader(30)))
    table = missing_modality(method, data, batch_size=17)
    own = table[table["decides"] == "method"].set_index("kept")
    assert len(own) == 2**modalities - 1
    everything = " + ".join(data.inputs)
    assert own.loc[everything, "accuracy"] == pytest.approx(measure(method, data)["accuracy"]) and own.loc[everything, "samples"] == 60
    for kept in own.index:
        names = kept.split(" + ")
        rows = torch.stack([data.mask[m] for m in names]).any(0)
        inputs = {m: x[rows] * (m in names) for m, x in data.inputs.items()}
        mask = {m: here[rows] & (m in names) for m, here in data.mask.items()}
        p = method.predict(inputs, mask)
        assert own.loc[kept, "samples"] == int(rows.sum())
        assert own.loc[kept, "nll"] == pytest.approx(-p[torch.arange(len(p)), data.target[rows]].clamp(min=1e-12).log().mean().item(), rel=1e-4)
    heads = table[table["decides"] == "head"]["kept"].tolist()
    assert heads == (list(data.inputs) if name in ("ce", "ibma", "omib", "dclf") else [])
    if name == "ce":
        with torch.no_grad():
            z = method.eval().encode(data[data.mask["m1"]])["m1"]
            hit = method.model.heads["m1"](z).argmax(1) == data.target[data.mask["m1"]]
        assert table.query("kept == 'm1' and decides == 'head'")["accuracy"].item() == pytest.approx(hit.double().mean().item())


def test_a_dropped_modality_cannot_be_seen_and_nothing_is_changed():
    data = toy_data(30)
    data.features = {"m0": torch.randn(30, 8), "m1": torch.randn(30, 8)}
    before = data[:]
    part = keep_only(data, ["m0"])
    assert not part.mask["m1"].any() and not part.inputs["m1"].any() and part.mask["m0"].all() and not part.features
    assert torch.equal(data.inputs["m1"], before.inputs["m1"]) and data.mask["m1"].all() and data.features
    absent = toy_data(30, masks=True)
    assert len(keep_only(absent, ["m1"])) == int(absent.mask["m1"].sum())


def test_what_cannot_be_measured_is_a_hole_in_the_table():
    data = toy_data(40, multi_label=True)
    data.target[:, :] = 1.0
    table = missing_modality(create("ce", data, seed=0, dim=8), data)
    assert len(table) == 5 and "mauc" not in table.columns
