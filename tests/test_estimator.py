"""The estimator: what it learns is what `create` and `fit` learn, and it behaves as scikit-learn expects of a classifier."""
import json
import pickle
import shutil
import struct

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.base import clone, is_classifier
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from ibma.data import MultimodalData, load
from ibma.estimator import (
    INAPPLICABLE,
    MultimodalArrays,
    MultimodalClassifier,
    NetworkEncoder,
    as_codes,
    read_column,
    unlabelled,
    vocabulary_size,
)
from ibma.methods import METHODS, create
from ibma.selection import fold_scores, folds
from ibma.training import TrainingConfig, fit

QUICK = {"max_epochs": 2, "lr": 3e-3, "dim": 8}


@pytest.fixture(scope="module")
def table():
    """Two views (n, 5) and (n, 4) of three classes, well apart."""
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    means = {name: 3 * rng.normal(size=(3, p)) for name, p in {"a": 5, "b": 4}.items()}
    return {name: (m[y] + rng.normal(size=(120, m.shape[1]))).astype(np.float32) for name, m in means.items()}, y


@pytest.fixture(scope="module")
def fitted(table):
    X, y = table
    return MultimodalClassifier(max_epochs=8, lr=1e-2, dim=8).fit(X, y)


def by_hand(data, epochs=2, lr=3e-3, valid=None, seed=0, config=None, **options):
    method = create("ibma", data, seed=seed, dim=8, **{"eta": 0.5, **options})
    fit(method, data, valid, TrainingConfig(**{"epochs": epochs, "lr": lr, "seed": seed, **(config or {})}))
    return method


def probabilities(method, data):
    return method.predict(data.inputs, data.mask, data.lengths).numpy()


# ---- the same as the longer way ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", [0, 3])
def test_equals_create_and_fit_bit_for_bit(table, seed):
    X, y = table
    data = MultimodalData.from_arrays(X, y)
    expected = by_hand(data, seed=seed)
    found = MultimodalClassifier(**QUICK, random_state=seed).fit(X, y)
    np.testing.assert_array_equal(found.predict_proba(X), probabilities(expected, data))
    with torch.no_grad():
        np.testing.assert_array_equal(found.transform(X), expected.eval()(data[:]).fused.numpy())
    np.testing.assert_array_equal(found.predict(X), probabilities(expected, data).argmax(1))


def test_every_setting_arrives(table):
    X, y = table
    data = MultimodalData.from_arrays(X, y)
    loss = {"bound": "tight", "temperature": 3.0, "normalize": False, "prototypes": "ema"}
    expected = by_hand(data, eta=0.2, loss=loss, encoders={"vector": {"hidden": 16}}, fused_bound=False,
                       config={"batch_size": 32, "weight_decay": 1e-2, "class_weights": (1.0, 2.0, 3.0), "clip_norm": 0.5})
    found = MultimodalClassifier(**QUICK, eta=0.2, bound="tight", temperature=3.0, normalize=False, encoders={"vector": {"hidden": 16}}, batch_size=32, weight_decay=1e-2,
                                 class_weight={0: 1.0, 1: 2.0, 2: 3.0}, method_options={"fused_bound": False, "loss": {"prototypes": "ema"}}, training_options={"clip_norm": 0.5}).fit(X, y)
    np.testing.assert_array_equal(found.predict_proba(X), probabilities(expected, data))


def test_auto_eta_is_the_best_of_the_folds(table):
    X, y = table
    y = np.where(np.arange(120) % 4 == 0, (y + 1) % 3, y)  # noise, so that the scores differ
    data = MultimodalData.from_arrays(X, y)
    grid, config = (0.0, 5.0, 0.5), TrainingConfig(epochs=2, lr=3e-3)
    expected = {eta: np.mean(fold_scores("ibma", data, {"eta": eta}, config, folds(data, 2, 0), options={"dim": 8})) for eta in grid}
    found = MultimodalClassifier(**QUICK, eta="auto", eta_grid=grid, eta_folds=2).fit(X, y)
    assert found.eta_scores_ == pytest.approx(expected) and len(set(expected.values())) > 1
    assert found.eta_ == max(expected, key=expected.get)
    np.testing.assert_array_equal(found.predict_proba(X), probabilities(by_hand(data, eta=found.eta_), data))


def test_early_stopping_keeps_groups_together_and_stops(table):
    X, y = table
    groups = np.arange(120) // 6
    seen = {}

    class Spy(MultimodalClassifier):
        def _split(self, data):
            seen["parts"] = super()._split(data)
            return seen["parts"]

    found = Spy(**{**QUICK, "max_epochs": 40}, early_stopping=True, validation_fraction=0.25, patience=2).fit(X, y, groups=groups)
    train, valid = seen["parts"]
    assert not set(train.groups.tolist()) & set(valid.groups.tolist()) and len(valid.groups.unique()) == 5
    assert found.n_iter_ < 40 and found.metrics_["valid/accuracy"] == max(row["valid/accuracy"] for row in found.history_)
    expected = by_hand(train, epochs=40, valid=valid, config={"select": "valid/accuracy", "patience": 2})
    np.testing.assert_array_equal(found.predict_proba(X), probabilities(expected, MultimodalData.from_arrays(X, y)))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_can_be_named(table, name):
    X, y = table
    found = MultimodalClassifier(name, max_epochs=1, dim=8, method_options={"beta": 0.1} if name == "omib" else None).fit(X, y)  # its own choice of beta trains estimators first
    p = found.predict_proba(X)
    assert p.shape == (120, 3) and np.allclose(p.sum(1), 1, atol=1e-5)
    assert found.transform(X).shape == (120, found.get_feature_names_out().size)


# ---- manners ----------------------------------------------------------------------------------------------------------------

def test_clone_and_pickle(fitted, table, tmp_path):
    copy = clone(fitted)
    assert not hasattr(copy, "method_") and copy.get_params() == fitted.get_params() and is_classifier(copy)
    with pytest.raises(NotFittedError): copy.predict(table[0])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict_proba(table[0]), fitted.predict_proba(table[0]))


def test_parameters_are_stored_as_they_are():
    encoders, options = {"a": nn.Linear(2, 2)}, {"fused_bound": False}
    made = MultimodalClassifier(encoders=encoders, method_options=options, eta_grid=[0.1])
    assert made.encoders is encoders and made.method_options is options and made.eta_grid == [0.1]
    copied = clone(made)  # a copy of the module, so that two fits do not train one network
    assert copied.encoders["a"] is not encoders["a"] and torch.equal(copied.encoders["a"].weight, encoders["a"].weight)


def test_the_callers_arrays_options_and_generators_stay_as_they_were(table):
    X, y = {name: x.copy() for name, x in table[0].items()}, table[1].copy()
    X["a"][3] = np.nan
    before, torch_state, numpy_state = {name: x.copy() for name, x in X.items()}, torch.get_rng_state(), np.random.get_state()[1].copy()
    MultimodalClassifier(**QUICK, early_stopping=True).fit(X, y).predict(X)
    for name in X: np.testing.assert_array_equal(X[name], before[name])
    np.testing.assert_array_equal(y, table[1])
    assert torch.equal(torch.get_rng_state(), torch_state) and (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.parametrize("form", ["frame", "container", "plain table"])
def test_cross_val_score_and_grid_search(table, form):
    X, y = table
    held = {"frame": lambda: pd.DataFrame({name: list(x) for name, x in X.items()}), "container": lambda: MultimodalArrays(X), "plain table": lambda: np.concatenate([*X.values()], 1)}[form]()
    model = MultimodalClassifier(max_epochs=4, lr=1e-2, dim=8, columns={"a": range(5), "b": slice(5, 9)} if form == "plain table" else None)
    parts = list(KFold(3, shuffle=True, random_state=0).split(y))
    scores = cross_val_score(model, held, y, cv=parts)
    expected = []
    for train, test in parts:  # the same by hand
        data = MultimodalData.from_arrays(X, y)
        method = by_hand(data.subset(train), epochs=4, lr=1e-2)
        expected.append((probabilities(method, data.subset(test)).argmax(1) == y[test]).mean())
    np.testing.assert_allclose(scores, expected)
    search = GridSearchCV(model, {"eta": [0.0, 0.9], "lr": [1e-5, 1e-2]}, cv=parts).fit(held, y)
    assert search.best_params_["lr"] == 1e-2 and search.best_score_ > 0.9 and search.predict(held).shape == (120,)


def test_groups_reach_fit_and_outer_folds(table):
    X, y = table
    groups = np.arange(120) // 4
    scores = cross_val_score(MultimodalClassifier(**QUICK, early_stopping=True), MultimodalArrays(X), y, cv=GroupKFold(3), groups=groups, params={"groups": groups})
    assert len(scores) == 3 and np.isfinite(scores).all()


def test_in_a_pipeline_and_as_data_frame(table):
    X, y = table
    flat = np.concatenate([*X.values()], 1)
    piped = make_pipeline(StandardScaler(), MultimodalClassifier(**QUICK, columns={"a": range(5), "b": range(5, 9)})).fit(flat, y)
    assert piped.score(flat, y) > 0.3 and piped.transform(flat).shape == (120, 8)
    frame = MultimodalClassifier(**QUICK).set_output(transform="pandas").fit(MultimodalArrays(X), y).transform(MultimodalArrays(X))
    assert list(frame.columns)[:2] == ["multimodalclassifier0", "multimodalclassifier1"] and frame.shape == (120, 8)


def test_container_indexes_like_an_array(table):
    X, y = table
    held = MultimodalArrays(X, {"a": y > 0})
    assert len(held) == 120 and held.shape == (120, 2) and repr(held) == "MultimodalArrays(120 samples, a, b)"
    for rows in ([5, 2], slice(3, 9), y == 1, np.array([7]), (np.array([1, 0]), ...)):
        part, plain = held[rows], rows[0] if isinstance(rows, tuple) else rows
        np.testing.assert_array_equal(part.inputs["b"], X["b"][plain])
        np.testing.assert_array_equal(part.mask["a"], (y > 0)[plain])
    train, test = train_test_split(held, test_size=30, random_state=0)
    assert (len(train), len(test)) == (90, 30)
    with pytest.raises(IndexError, match="sample 120 of 120"): held[120]


# ---- inputs -----------------------------------------------------------------------------------------------------------------

def test_all_forms_of_input_say_the_same(fitted, table):
    X, _ = table
    expected = fitted.predict_proba(X)
    frame = pd.DataFrame({name: list(x) for name, x in X.items()}, index=np.arange(120)[::-1])
    tensors = {name: torch.tensor(x) for name, x in X.items()}
    lists = {name: x.tolist() for name, x in X.items()}
    for form in (frame, tensors, lists, MultimodalArrays(X), {"b": X["b"], "a": X["a"]}):
        np.testing.assert_array_equal(fitted.predict_proba(form), expected)


def test_absence_in_every_form_means_the_same(fitted, table):
    X, y = table
    absent = np.arange(120) % 3 == 1
    rows = {**X, "a": np.where(absent[:, None], np.nan, X["a"])}
    cells = pd.DataFrame({"a": [None if gone else x for gone, x in zip(absent, X["a"], strict=True)], "b": list(X["b"])})
    garbage = {**X, "a": np.where(absent[:, None], 1e9, X["a"])}
    expected = fitted.predict_proba(rows)
    for found in (fitted.predict_proba(cells), fitted.predict_proba(garbage, mask={"a": ~absent}), fitted.predict_proba(MultimodalArrays(garbage, {"a": ~absent}))):
        np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(expected[absent], fitted.predict_proba(X)[absent])
    np.testing.assert_array_equal(fitted.predict_proba({"a": None, "b": X["b"]}), fitted.predict_proba(X, mask={"a": np.zeros(120, bool)}))
    trained = [MultimodalClassifier(**QUICK).fit(form, y, mask=mask).predict_proba(X) for form, mask in ((rows, None), (cells, None), (garbage, {"a": ~absent}))]
    np.testing.assert_array_equal(trained[0], trained[1])
    np.testing.assert_array_equal(trained[0], trained[2])


def test_pictures_with_channels_last_and_of_pillow():
    from PIL import Image

    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, (6, 8, 10, 3), dtype=np.uint8)
    expected = np.moveaxis(colours, 3, 1)
    for column in (MultimodalArrays({"x": colours}), MultimodalArrays({"x": [Image.fromarray(c) for c in colours]}), MultimodalArrays({"x": expected})):
        np.testing.assert_array_equal(read_column("x", column.inputs["x"])[0], expected)
    flat = rng.normal(size=(6, 3, 8, 3))  # ambiguous: the second axis wins
    assert read_column("x", flat)[0].shape == (6, 3, 8, 3)
    assert read_column("x", flat.transpose(0, 2, 1, 3), "image", (8, 3, 3))[0].shape == (6, 8, 3, 3)  # as it was fitted
    assert read_column("x", np.zeros((6, 8, 8)), "image")[0].shape == (6, 1, 8, 8)


def test_sequences_of_different_lengths_are_padded_and_cut(table):
    rng, y = np.random.default_rng(0), np.arange(40) % 2
    walks = [rng.normal(size=(3 + i % 4, 2)) + 2 * y[i] for i in range(40)]
    X = {"walk": walks, "b": rng.normal(size=(40, 3))}
    model = MultimodalClassifier(**QUICK, kinds={"walk": "sequence"}).fit(X, y)
    assert model.modalities_["walk"].shape == (6, 2)
    padded = np.stack([np.pad(w, ((0, 6 - len(w)), (0, 0))) for w in walks]).astype(np.float32)
    expected = MultimodalData.from_arrays({"walk": padded, "b": X["b"]}, y, kinds={"walk": "sequence"}, lengths={"walk": [len(w) for w in walks]})
    np.testing.assert_array_equal(model.predict_proba(X), probabilities(by_hand(expected), expected))
    longer = [np.concatenate([w, np.full((6, 2), 9.0)]) for w in walks]
    cut = {"walk": [w[:6] for w in longer], "b": X["b"]}
    np.testing.assert_array_equal(model.predict_proba({**X, "walk": longer}), model.predict_proba(cut))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.EmbeddingBag(vocabulary_size(), 4)

    def forward(self, tokens): return self.words(tokens)


def test_texts_own_networks_and_empty_cells():
    rng, y = np.random.default_rng(0), np.array(["ill", "well"] * 30)
    frame = pd.DataFrame({"note": [f"the patient is {label}" if i % 5 else None for i, label in enumerate(y)], "pulse": rng.normal(size=60)})
    torch.manual_seed(0)
    network = Reader()
    before = network.words.weight.clone()
    model = MultimodalClassifier(max_epochs=20, lr=2e-2, dim=8, text_length=10, encoders={"note": network}).fit(frame, y)
    assert model.modalities_["note"].kind == "text" and model.modalities_["note"].size == vocabulary_size() and model.modalities_["pulse"].shape == (1,)
    told = np.arange(60) % 5 > 0
    assert (model.predict(frame) == y)[told].mean() > 0.9
    assert torch.equal(network.words.weight, before), "the caller's module is not trained"
    assert model.predict(pd.DataFrame({"note": ["never seen words, entirely ill"], "pulse": [0.0]})).shape == (1,)


def test_texts_by_the_usual_encoder_are_those_of_decode_text():
    from ibma.data.media import decode_text

    texts, y, b = ["a cat", "a dog", "no cat", "the dog"] * 3, np.array([0, 1] * 6), np.arange(24.0).reshape(12, 2)
    model = MultimodalClassifier(**QUICK, text_length=6).fit({"t": texts, "b": b}, y)
    ids, lengths = zip(*(decode_text(t, 6) for t in texts), strict=True)
    ids = np.stack(ids)
    as_numbers = MultimodalClassifier(**QUICK, kinds={"t": "text"}, text_length=6).fit({"t": ids, "b": b}, y)
    assert as_numbers.modalities_ == model.modalities_
    np.testing.assert_allclose(model.predict_proba({"t": texts, "b": b}), as_numbers.predict_proba({"t": ids, "b": b}), atol=1e-6)  # without lengths token 0 is padding


def test_network_encoder_scales_inputs_and_tells_lengths(table):
    from ibma.data.core import Modality

    class Told(nn.Module):
        def forward(self, x, lengths=None): return x.sum(1) / lengths[:, None]

    encoder = NetworkEncoder(Told(), Modality("sequence", (4, 2)), 3)
    x = torch.randn(5, 4, 2)
    lengths = torch.tensor([1, 2, 3, 4, 4])
    real = torch.arange(4) < lengths[:, None]
    encoder.fit_scaler([(x, lengths)])  # on real steps only
    scaled = (x - x[real].mean(0)) / x[real].std(0, correction=0)
    torch.testing.assert_close(encoder(x, lengths), encoder.project(scaled.sum(1) / lengths[:, None]))
    with pytest.raises(ValueError, match="must return"): NetworkEncoder(nn.Identity(), Modality("image", (1, 4, 4)), 3)


# ---- targets ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("names", [["b", "a", "c"], [30, -5, 7], [2.0, 0.0, 1.0], [True, False]], ids=["strings", "integers", "floats", "bools"])
def test_classes_of_any_type(table, names):
    X, y = table
    named = np.array(names)[y % len(names)]
    model = MultimodalClassifier(max_epochs=8, lr=1e-2, dim=8).fit(X, named)
    np.testing.assert_array_equal(model.classes_, np.unique(named))
    assert model.predict(X).dtype == named.dtype and (model.predict(X) == named).mean() == model.score(X, named)
    assert len(names) < 3 or model.score(X, named) > 0.9
    series = pd.Series(named, dtype="category" if isinstance(names[0], str) else None)
    np.testing.assert_array_equal(MultimodalClassifier(**QUICK).fit(X, series).classes_, np.unique(named))


@pytest.mark.parametrize("target", [lambda y, k: np.where(k, y, -1), lambda y, k: np.where(k, y, np.nan).astype(float),
                                    lambda y, k: np.where(k, np.array(["a", "b", "c"])[y], None), lambda y, k: pd.Series(np.where(k, y, 0)).astype("Int64").mask(~k)], ids=["-1", "nan", "None", "NA"])
def test_unlabelled_samples_go_to_fit_as_such(table, target):
    X, y = table
    known = np.arange(120) % 4 == 0
    data = MultimodalData.from_arrays(X, np.where(known, y, -1))
    model = MultimodalClassifier(**QUICK).fit(X, target(y, known))
    assert len(model.classes_) == 3 and sum(model.class_counts_) == 30
    np.testing.assert_array_equal(model.predict_proba(X), probabilities(by_hand(data), data))
    assert model.score(X, target(y, known)) == (model.predict_proba(X).argmax(1) == y)[known].mean()
    without = MultimodalClassifier(**QUICK).fit(MultimodalArrays(X)[known], y[known])
    assert not np.array_equal(without.predict_proba(X), model.predict_proba(X)), "unlabelled samples are not just dropped"


def test_unlabelled_values_row_by_row():
    assert unlabelled(np.array([0, -1, 2])).tolist() == [False, True, False]
    assert unlabelled(np.array(["-1", "a"])).tolist() == [False, False]
    assert unlabelled(np.array(["a", None, float("nan"), pd.NA, -1], object)).tolist() == [False, True, True, True, True]
    codes, classes = as_codes(np.array(["z", None, "a"], object))
    assert codes.tolist() == [1, -1, 0] and classes.tolist() == ["a", "z"]


def test_multi_label_with_unknown_labels(table):
    X, y = table
    labels = np.stack([y == 0, y > 0], 1).astype(float)
    labels[::7, 0], labels[::5, 1] = np.nan, np.nan
    data = MultimodalData.from_arrays(X, labels)
    model = MultimodalClassifier(**QUICK, class_weight="balanced").fit(X, pd.DataFrame(labels, columns=["zero", "more"]))
    assert model.classes_.tolist() == ["zero", "more"]
    p = model.predict_proba(X)
    np.testing.assert_array_equal(p, probabilities(by_hand(data, config={"class_weights": "balanced"}), data))
    known = ~np.isnan(labels)
    assert model.score(X, labels) == pytest.approx(((p > 0.5) == labels)[known].mean())
    weights = np.arange(120.0)
    assert model.score(X, labels, sample_weight=weights) == pytest.approx(np.average(((p > 0.5) == labels)[known], weights=np.repeat(weights[:, None], 2, 1)[known]))
    assert cross_val_score(MultimodalClassifier(**QUICK), MultimodalArrays(X), labels, cv=KFold(2)).shape == (2,)


# ---- one file ---------------------------------------------------------------------------------------------------------------

CASES = {
    "plain": lambda X, y: (MultimodalClassifier(**QUICK).fit(X, y), X),
    "strings and auto": lambda X, y: (MultimodalClassifier(**QUICK, eta="auto", eta_grid=(0.1, 0.5), eta_folds=2, class_weight={"b": 2.0}).fit(X, np.array(["a", "b", "c"])[y]), X),
    "labels": lambda X, y: (MultimodalClassifier("misa", **QUICK).fit(X, np.stack([y == 0, y == 1], 1)), X),
    "columns": lambda X, y: (MultimodalClassifier(**QUICK, columns={"a": slice(0, 5), "b": np.arange(5, 9)}).fit(np.concatenate([*X.values()], 1), y), np.concatenate([*X.values()], 1)),
    "objects": lambda X, y: (MultimodalClassifier(**QUICK, bound="tight", random_state=np.random.RandomState(1)).fit(X, np.array(["a", "b", None], object)[y]), X),
}


@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_again(table, tmp_path, case):
    model, X = CASES[case](*table)
    again = MultimodalClassifier.load(model.save(tmp_path / "model.safetensors"))
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    assert again.classes_.dtype == model.classes_.dtype and again.classes_.tolist() == model.classes_.tolist()
    for name in ("seed_", "eta_", "metrics_", "n_iter_", "modalities_", "n_samples_"): assert getattr(again, name) == getattr(model, name), name
    assert getattr(again, "eta_scores_", None) == getattr(model, "eta_scores_", None)
    twice = MultimodalClassifier.load(again.save(tmp_path / "twice.safetensors"))
    np.testing.assert_array_equal(twice.predict_proba(X), model.predict_proba(X))
    if case == "plain":
        assert again.get_params() == model.get_params()
        np.testing.assert_array_equal(clone(again).fit(*table).predict_proba(X), model.predict_proba(X))


def test_own_networks_have_to_be_given_again(tmp_path):
    rng = np.random.default_rng(0)
    X, y = {"a": rng.normal(size=(20, 4)), "b": rng.normal(size=(20, 3))}, np.arange(20) % 2
    model = MultimodalClassifier(**QUICK, encoders={"a": nn.Linear(4, 6), "vector": {"hidden": 5}}).fit(X, y)
    path = model.save(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"own networks for \['a'\]"): MultimodalClassifier.load(path)
    again = MultimodalClassifier.load(path, encoders={"a": nn.Linear(4, 6)})
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    with pytest.raises(ValueError, match="does not fit this version of ibma, or your own networks"): MultimodalClassifier.load(path, encoders={"a": nn.Linear(4, 7)})


def header(path):
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:8 + size]), content[8 + size:]


def rewrite(path, change):
    """The same weights under a changed header."""
    found, weights = header(path)
    about = json.loads(found["__metadata__"]["ibma"])
    change(about)
    found["__metadata__"]["ibma"] = json.dumps(about)
    text = json.dumps(found).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + weights)


def test_damaged_and_foreign_files_are_refused(fitted, tmp_path):
    from safetensors.torch import save_file

    path = fitted.save(tmp_path / "good.safetensors")
    good = path.read_bytes()
    assert b"pickle" not in good and not good.startswith(b"PK")

    def refused(match, error=ValueError):
        with pytest.raises(error, match=match): MultimodalClassifier.load(path)

    path.write_bytes(good[:-3] + bytes([good[-3] ^ 64]) + good[-2:])
    refused("damaged or was changed")
    path.write_bytes(good[:len(good) // 2])
    refused("damaged or no safetensors file")
    path.write_bytes(pickle.dumps({"a": 1}))
    refused("damaged or no safetensors file")
    path.write_bytes(good)
    rewrite(path, lambda about: about["meta"]["estimator"]["classes"].update(values=[2, 1, 0]))
    refused("damaged or was changed")
    save_file({"w": torch.ones(2)}, path)
    refused("is no model file of this version")
    path.write_bytes(good)
    rewrite(path, lambda about: about["meta"].pop("estimator"))
    refused("without a classifier around it")
    path.unlink()
    refused("no model file", FileNotFoundError)


def test_what_is_no_json_is_refused_before_a_file_is_written(table, tmp_path):
    model = MultimodalClassifier(**QUICK).fit(*table)
    model.set_params(method_options={"x": object()})
    with pytest.raises(TypeError, match="method_options=.* cannot be written"): model.save(tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(NotFittedError): MultimodalClassifier().save(tmp_path / "m.safetensors")


def test_the_command_lines_reader_takes_the_same_file(fitted, table, tmp_path):
    from ibma.model_files import load_model

    method, about = load_model(fitted.save(tmp_path / "m.safetensors"))
    data = MultimodalData.from_arrays(*table)
    np.testing.assert_array_equal(probabilities(method, data), fitted.predict_proba(table[0]))
    assert about["method"] == "ibma" and about["options"] == {"dim": 8, "eta": 0.5, "encoders": {}} and about["meta"]["estimator"]["params"]["max_epochs"] == 8


def test_folder_of_the_hub_and_back(fitted, table, tmp_path, monkeypatch):
    import huggingface_hub

    folder = fitted.save_pretrained(tmp_path / "model", title="Two views")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["params"]["max_epochs"] == 8
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "ibma" and "ibma" in card.data.tags and "# Two views" in card.text and "0 (40), 1 (40), 2 (40)" in card.text
    np.testing.assert_array_equal(MultimodalClassifier.from_pretrained(folder).predict_proba(table[0]), fitted.predict_proba(table[0]))

    class Hub:  # what HfApi does, on this disk
        def __init__(self, token=None): assert token == "secret"
        def create_repo(self, name, private=None, exist_ok=False):
            assert exist_ok and private
            (tmp_path / name).mkdir(parents=True)
        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert fitted.push_to_hub("me/views", private=True, token="secret") == "https://huggingface.co/me/views"
    assert 'from_pretrained("me/views")' in (tmp_path / "me/views/README.md").read_text()
    np.testing.assert_array_equal(MultimodalClassifier.from_pretrained(tmp_path / "me/views").predict(table[0]), fitted.predict(table[0]))


def test_from_the_hubs_own_cache_without_network(fitted, table, tmp_path):
    """The folder structure that huggingface_hub keeps: refs name a commit, snapshots hold its files."""
    repo = tmp_path / "models--me--views"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    fitted.save_pretrained(repo / "snapshots" / ("a" * 40))
    found = MultimodalClassifier.from_pretrained("me/views", cache_dir=tmp_path, local_files_only=True)
    np.testing.assert_array_equal(found.predict(table[0]), fitted.predict(table[0]))


# ---- wrong input ------------------------------------------------------------------------------------------------------------

def changed(x, row, value):
    x = x.copy()
    x[row] = value
    return x


WRONG = {
    "row of another shape": (lambda X, y: ({**X, "a": [*X["a"][:-1], np.zeros(4)]}, y), ValueError, r"modality 'a' has shape \(5,\) in row 0 and \(4,\) in row 119"),
    "one NaN": (lambda X, y: ({**X, "b": changed(X["b"], (7, 1), np.nan)}, y), ValueError, r"modality 'b' has NaN or infinite values in 1 of 120 rows, the first is row 7"),
    "a word among numbers": (lambda X, y: ({**X, "b": [*X["b"][:5], "five", *X["b"][6:]]}, y), TypeError, r"modality 'b', row 5 is a str"),
    "a number among words": (lambda X, y: ({**X, "t": ["word"] * 119 + [3]}, y), TypeError, r"modality 't' has texts, and a int in row 119"),
    "a row without anything": (lambda X, y: ({name: changed(x, 4, np.nan) for name, x in X.items()}, y), ValueError, "row 4 has no modality present"),
    "a modality that is nowhere": (lambda X, y: ({**X, "c": np.full((120, 2), np.nan)}, y), ValueError, "modality 'c' is absent in every row"),
    "different lengths": (lambda X, y: ({**X, "a": X["a"][:9]}, y), ValueError, "different numbers of samples, {'a': 9, 'b': 120}"),
    "too few targets": (lambda X, y: (X, y[:50]), ValueError, "X has 120, y has 50"),
    "no target": (lambda X, y: (X, None), ValueError, "y is None"),
    "numbers that are no classes": (lambda X, y: (X, y + 0.5), ValueError, "Unknown label type: continuous"),
    "one class": (lambda X, y: (X, np.ones(120, int)), ValueError, "one class only, 1"),
    "-1 and 1": (lambda X, y: (X, np.where(y > 0, 1, -1)), ValueError, r"recode \{-1, 1\} as \{0, 1\}"),
    "nothing labelled": (lambda X, y: (X, np.full(120, -1)), ValueError, "every one of the 120 samples is unlabelled"),
    "an empty string": (lambda X, y: (X, np.where(y > 0, "", "a").astype(object)), ValueError, "empty string in row 1"),
    "a label of 2": (lambda X, y: (X, np.stack([y, y], 1)), ValueError, "target row 2, label 0 is 2"),
    "infinite target": (lambda X, y: (X, np.where(y > 1, np.inf, y)), ValueError, "Input y contains infinity, first in row 2"),
    "no dictionary": (lambda X, y: ({}, y), TypeError, "inputs is empty"),
    "a stack of pictures": (lambda X, y: (np.zeros((120, 4, 4)), y), ValueError, "name the modality"),
    "one table": (lambda X, y: (X["a"], y), ValueError, "one modality, 'x': the bound aligns two or more"),
    "data of this package": (lambda X, y: (MultimodalData.from_arrays(X, y), y), TypeError, "pass X=data.inputs"),
    "a sparse modality": (lambda X, y: ({**X, "a": csr_matrix(X["a"])}, y), TypeError, "a modality is sparse"),
    "a scalar": (lambda X, y: ({**X, "a": 3}, y), TypeError, "a modality is a int"),
    "a dot in a name": (lambda X, y: ({"a.b": X["a"], "b": X["b"]}, y), ValueError, "without dots"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(table, case):
    make, error, match = WRONG[case]
    X, y = make(*table)
    with pytest.raises(error, match=match): MultimodalClassifier(max_epochs=1, dim=8).fit(X, y)


WRONG_SETTINGS = {
    "unknown method": ({"method": "ibna"}, KeyError, "did you mean 'ibma'"),
    "unknown option": ({"method_options": {"fused_bond": 1}}, TypeError, "did you mean 'fused_bound'"),
    "an option that is a parameter": ({"method_options": {"eta": 1}}, TypeError, "set them there"),
    "a setting that is a parameter": ({"training_options": {"epochs": 1}}, TypeError, "set the classifier's parameter max_epochs"),
    "an unknown setting": ({"training_options": {"clip": 1}}, TypeError, "TrainingConfig has .*clip_norm"),
    "a bound for a method without": ({"method": "ce", "temperature": 2.0}, ValueError, "temperature: settings of the bound, which method 'ce' does not have"),
    "eta for a method without": ({"method": "ce", "eta": "auto"}, ValueError, "eta: settings of the bound"),
    "no epochs": ({"max_epochs": 0}, ValueError, "epochs must be positive"),
    "weight of an unknown class": ({"class_weight": {7: 1.0}}, ValueError, r"class_weight names \[7\]"),
    "kinds of an unknown modality": ({"kinds": {"c": "sequence"}}, KeyError, r"kinds names \['c'\]"),
    "network of an unknown modality": ({"encoders": {"c": nn.Linear(5, 2)}}, KeyError, r"encoders names \['c'\]"),
    "a share of 1": ({"early_stopping": True, "validation_fraction": 1.0}, ValueError, "validation_fraction=1.0"),
    "negative eta": ({"eta": -1}, ValueError, "eta must not be negative"),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_wrong_settings_are_named(table, case):
    options, error, match = WRONG_SETTINGS[case]
    with pytest.raises(error, match=match): MultimodalClassifier(**{"max_epochs": 1, "dim": 8, **options}).fit(*table)


def test_wrong_input_to_predict_is_named(fitted, table):
    X, y = table
    with pytest.raises(ValueError, match=r"fitted on the modalities \['a', 'b'\], and X has \['a', 'c'\]"): fitted.predict({"a": X["a"], "c": X["b"]})
    with pytest.raises(ValueError, match="modality 'a' is .*the task expects"): fitted.predict({**X, "a": X["a"][:, :3]})
    with pytest.raises(TypeError, match="modality 'b' has a text in row 0, and was of kind 'vector'"): fitted.predict({**X, "b": ["x"] * 120})
    with pytest.raises(KeyError, match=r"mask names \['c'\]"): fitted.predict(X, mask={"c": np.ones(120, bool)})
    with pytest.raises(ValueError, match=r"mask of modality 'a' is int64"): fitted.predict(X, mask={"a": np.ones(120, int)})
    with pytest.raises(ValueError, match="nothing to score"): fitted.score(X, np.full(120, -1))
    with pytest.raises(TypeError, match="only the size of a vocabulary"): MultimodalClassifier(**QUICK, tokenizer=50).fit({"a": X["a"], "t": ["x"] * 120}, y)


def test_columns_of_a_table_by_name_number_and_slice(table):
    X, y = table
    flat = np.concatenate([*X.values()], 1)
    frame = pd.DataFrame(flat, columns=[f"c{i}" for i in range(9)])
    expected = MultimodalClassifier(**QUICK).fit(X, y).predict_proba(X)
    for held, columns in ((flat, {"a": slice(0, 5), "b": range(5, 9)}), (flat, {"a": [0, 1, 2, 3, 4], "b": slice(5, None)}), (frame, {"a": frame.columns[:5], "b": ["c5", "c6", "c7", "c8"]})):
        np.testing.assert_allclose(MultimodalClassifier(**QUICK, columns=columns).fit(held, y).predict_proba(held), expected, atol=1e-6)
    with pytest.raises(KeyError, match=r"columns\['a'\] names 9, and the table has the columns 0 to 8"): MultimodalClassifier(columns={"a": [9], "b": [0]}).fit(flat, y)
    with pytest.raises(KeyError, match=r"columns\['a'\] names 'd'"): MultimodalClassifier(columns={"a": ["d"], "b": ["c1"]}).fit(frame, y)


def test_a_class_that_the_validation_part_cannot_get_is_named(table):
    X, y = table
    rare = np.where(np.arange(120) == 0, 9, y)
    with pytest.raises(ValueError, match="cannot draw a share"): MultimodalClassifier(**QUICK, early_stopping=True).fit(X, rare)


# ---- scikit-learn's own checks ----------------------------------------------------------------------------------------------

class Halves(MultimodalClassifier):
    """Two modalities from any table, as scikit-learn's checks hand out tables of all widths."""

    def _parts(self, X, reset):
        X = super()._parts(X, reset)["x"]
        half = max(1, X.shape[1] // 2)
        return {"left": X[:, :half], "right": X[:, -half:]}


CHECKED = {"max_epochs": 8, "lr": 3e-2, "dim": 8, "batch_size": 32}


@parametrize_with_checks([MultimodalClassifier("ce", **CHECKED)], expected_failed_checks=lambda estimator: INAPPLICABLE)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks([Halves(**CHECKED)], expected_failed_checks=lambda estimator: INAPPLICABLE)
def test_scikit_learns_checks_of_ibma(estimator, check):
    check(estimator)


def test_no_check_is_excused_that_would_pass():
    """What the page lists as inapplicable fails or cannot run, for the reason given there."""
    X, y = {"a": np.random.default_rng(0).normal(size=(20, 2)), "b": np.ones((20, 2))}, np.array([-1, 1] * 10)
    with pytest.raises(ValueError, match="-1 means unlabelled"): MultimodalClassifier(**QUICK).fit(X, y)
    assert not hasattr(MultimodalClassifier(), "decision_function")


def test_column_vectors_warn_as_in_scikit_learn(table):
    X, y = table
    with pytest.warns(DataConversionWarning): model = MultimodalClassifier(**QUICK).fit(X, y[:, None])
    np.testing.assert_array_equal(model.predict_proba(X), MultimodalClassifier(**QUICK).fit(X, y).predict_proba(X))


def test_the_embedded_digits_in_five_lines():
    digits = load("digits").subset(range(500))
    train, test, y_train, y_test = train_test_split(MultimodalArrays(digits.inputs), digits.target.numpy(), stratify=digits.target.numpy(), random_state=0)
    assert MultimodalClassifier(max_epochs=6, lr=3e-3, dim=16, encoders={"image": {"width": 4}}).fit(train, y_train).score(test, y_test) > 0.85
