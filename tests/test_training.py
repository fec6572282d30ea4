"""ibma.training: steps, hooks, determinism, measuring, and early refusals."""
import random
import warnings

import numpy as np
import pytest
import torch
from cases import toy_data
from sklearn.metrics import accuracy_score
from test_methods import small

from ibma.methods import METHODS
from ibma.methods.base import Method
from ibma.training import OPTIMIZERS, Result, TrainingConfig, evaluate, fit, train_epoch

QUICK = TrainingConfig(epochs=2, batch_size=16)  # toy data have 33 samples: the last batch is a batch of one


def trained(name="ibma", data=None, valid=None, config=QUICK, **options):
    data = toy_data() if data is None else data
    method = small(name, data, **options)
    return method, fit(method, data, valid, config)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Recorder(Method):
    "Does next to nothing, and writes down what is asked of it."

    def __init__(self, task):
        super().__init__(task, dim=8)
        self.seen, self.weight = [], torch.nn.Parameter(torch.tensor(1.0))

    def loss(self, batch):
        assert self.training
        self.seen.append(("step", batch.id.tolist()))
        return {"mean": self.weight * batch.id.double().mean(), "one": self.weight * 0 + 1}

    def on_fit_start(self, batches):
        self.seen.append(("start", [i for batch in batches for i in batch.id.tolist()]))

    def on_epoch_start(self, epoch):
        self.seen.append(("epoch", epoch))

    def on_epoch_end(self, batches):
        once, twice = ([i for batch in batches for i in batch.id.tolist()] for _ in range(2))
        assert once == twice
        self.seen.append(("end", once))


# --- the loop


def test_hooks_come_in_the_order_of_algorithm_1_and_every_sample_once_per_epoch():
    data = toy_data(20)
    method = Recorder(data.task)
    result = fit(method, data, config=TrainingConfig(epochs=3, batch_size=6, lr=1e-9))
    kinds = [kind for kind, _ in method.seen]
    assert kinds == ["start", *["epoch", *["step"] * 4, "end"] * 3]
    assert [value for kind, value in method.seen if kind == "epoch"] == [0, 1, 2]
    assert all(value == list(range(20)) for kind, value in method.seen if kind in ("start", "end"))  # in order
    orders = [[i for _, ids in method.seen[k:k + 4] for i in ids] for k in (2, 8, 14)]
    assert all(sorted(order) == list(range(20)) and order != list(range(20)) for order in orders)
    assert orders[0] != orders[1]
    assert [len(ids) for _, ids in method.seen[2:6]] == [6, 6, 6, 2]
    assert [row["epoch"] for row in result.history] == [0, 1, 2]
    assert result.history[0]["mean"] == pytest.approx(9.5, abs=1e-4)  # mean over samples, not over batches
    assert result.history[0]["one"] == pytest.approx(1)


def test_a_step_descends_the_sum_of_the_terms():
    data = toy_data(12)
    method = Recorder(data.task)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    method.weight.grad = torch.tensor(1000.0)  # left over from elsewhere
    train_epoch(method.eval(), data.loader(6), optimizer)
    assert method.weight.item() == pytest.approx(1 - 0.1 * (2.5 + 8.5), abs=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_settings_reach_the_optimizer(optimizer, monkeypatch):
    made = []
    real = OPTIMIZERS[optimizer]
    monkeypatch.setitem(OPTIMIZERS, optimizer, lambda parameters, **options: made.append(options) or real(parameters, **options))
    data = toy_data()
    fit(Recorder(data.task), data, config=TrainingConfig(epochs=1, lr=0.002, weight_decay=0.03, optimizer=optimizer))
    assert made == [{"lr": 0.002, "weight_decay": 0.03}]
    assert real.__name__.lower() == optimizer


@pytest.mark.parametrize("name", [name for name in METHODS if name != "omib"])  # it has two phases and tests of its own
def test_training_learns(name):
    data = toy_data(99)
    _, result = trained(name, data, toy_data(60, seed=7), TrainingConfig(epochs=12, batch_size=32, lr=3e-3))
    assert result.metrics["train/accuracy"] > 0.9 and result.metrics["valid/accuracy"] > 0.8  # chance is 0.33
    assert result.history[-1]["ce/fused"] < 0.7 * result.history[0]["ce/fused"]


OPTIONS = [
    {"loss": {"bound": "paper"}}, {"loss": {"bound": "tight"}}, {"loss": {"bound": "released"}},
    {"loss": {"temperature": 1.0, "normalize": False}}, {"loss": {"table": "optimal", "prototypes": "ema"}},
    {"loss": {"refresh": "streaming", "prototypes": "learnable"}}, {"fusion": "concat", "unimodal_heads": False},
]
DATA = [
    {}, {"num_modalities": 3}, {"num_modalities": 3, "masks": True, "unlabelled": True}, {"multi_label": True},
    {"multi_label": True, "masks": True, "num_modalities": 3}, {"image": True, "masks": True},
]


@pytest.mark.parametrize("kind", DATA, ids=lambda kind: ", ".join(kind) or "plain")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ibma_trains_in_every_combination(kind, options):
    data = toy_data(**kind)
    method, result = trained("ibma", data, config=TrainingConfig(epochs=2, batch_size=16, lr=1e-2), **options)
    assert all(np.isfinite(v) for row in result.history for v in row.values())
    assert all(v.isfinite().all() for v in method.state_dict().values())
    fresh = small("ibma", data, **options)
    moved = [not torch.equal(a, b) for a, b in zip(method.parameters(), fresh.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    assert ("ibb.statistics.centroids" in dict(method.named_parameters())) == (options.get("loss", {}).get("prototypes") == "learnable")


def test_the_bound_falls_when_it_is_trained():
    data = toy_data(99)
    falls = {}
    for eta in (0.0, 1.0):
        method, _ = trained("ibma", data, config=TrainingConfig(epochs=10, batch_size=33, lr=3e-3), eta=eta, loss={"temperature": 1.0, "normalize": True})
        batch = data[:]
        out = method(batch)
        falls[eta] = method.ibb(out.z, out.fused, batch.target).item()
    assert falls[1.0] < falls[0.0] - 0.05


# --- determinism


@pytest.mark.parametrize("options", [{}, {"loss": {"refresh": "streaming"}, "dropout": 0.3}])
def test_the_same_seed_gives_the_same_bits_and_another_one_others(options):
    (one, first), (two, second) = trained(**options), trained(**options)
    assert same(one, two) and first.history == second.history and first.metrics == second.metrics
    other, _ = trained(config=TrainingConfig(epochs=2, batch_size=16, seed=1), **options)
    assert not same(one, other)
    assert not same(one, trained(seed=1, **options)[0])


def test_the_global_generators_are_left_alone_and_do_not_matter():
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = trained(valid=toy_data(), dropout=0.3)[0]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate() and states[2] == np.random.get_state()[1].tolist()
    torch.manual_seed(6)
    assert same(first, trained(dropout=0.3)[0])


def test_validation_data_are_measured_only():
    with_valid, result = trained(valid=toy_data(30, seed=3), dropout=0.3)
    without, plain = trained(dropout=0.3)
    assert same(with_valid, without)
    assert result.metrics["valid/accuracy"] == evaluate(with_valid, toy_data(30, seed=3))["accuracy"] == result.history[-1]["valid/accuracy"]
    assert set(plain.metrics) == {"train/accuracy"} and not any(k.startswith("valid") for k in plain.history[0])


# --- measuring


def test_accuracy_is_that_of_scikit_learn_over_the_labelled():
    data = toy_data(50, unlabelled=True, masks=True)
    method, result = trained(data=data)
    known = data.target >= 0
    predicted = method.predict(data.inputs, data.mask).argmax(1)
    expected = accuracy_score(data.target[known], predicted[known])
    assert 0 < expected < 1
    for batch_size in (7, 49, 512):
        assert evaluate(method, data, batch_size) == {"accuracy": pytest.approx(expected)}
    assert result.metrics["train/accuracy"] == pytest.approx(expected)


def test_accuracy_of_labels_is_the_share_of_known_labels_that_are_right():
    data = toy_data(40, multi_label=True)
    method, _ = trained(data=data)
    known = ~data.target.isnan()
    predicted = method.predict(data.inputs)[known] > 0.5
    expected = accuracy_score(data.target[known], predicted.float())
    assert 0 < expected < 1
    assert evaluate(method, data, 11)["accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("multi_label", [False, True])
def test_nothing_known_is_nothing_to_measure(multi_label):
    data = toy_data(multi_label=multi_label)
    method = small("ce", data)
    data.target = torch.full_like(data.target, float("nan") if multi_label else -1)
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        evaluate(method, data)


def test_measuring_leaves_method_and_mode_as_they_were():
    data = toy_data()
    method, other = small("ce", data, dropout=0.5), small("ce", data, dropout=0.5)
    assert evaluate(method, data) == evaluate(method, data)
    assert method.training and same(method, other)


def test_a_result_says_what_was_done():
    method, result = trained()
    assert isinstance(result, Result) and not method.training
    assert result.config["epochs"] == 2 and result.config["batch_size"] == 16 and result.checkpoint is None
    assert 0 < result.timings["per_epoch"] < result.timings["total"] == pytest.approx(2 * result.timings["per_epoch"])


def test_a_checkpoint_holds_the_trained_weights_and_nothing_that_needs_trust(tmp_path):
    path = tmp_path / "deep" / "weights.pt"
    data = toy_data()
    method, result = trained(data=data, config=TrainingConfig(epochs=1, checkpoint=str(path)))
    assert result.checkpoint == str(path)
    other = small("ibma", data, seed=9)
    other.load_state_dict(torch.load(path, weights_only=True))
    assert same(method, other)
    assert torch.equal(method.predict(data.inputs), other.predict(data.inputs))


# --- refusals


class Breaks(Recorder):
    "One term is not finite at a given step."

    def __init__(self, task, step, value):
        super().__init__(task)
        self.step, self.value, self.before = step, value, None

    def loss(self, batch):
        terms = super().loss(batch)
        steps = sum(kind == "step" for kind, _ in self.seen)
        if steps == self.step + 1:
            self.before = self.weight.item()
            return {**terms, "loud": terms["one"] * self.value}
        return {**terms, "loud": terms["one"]}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_at_the_step_naming_term_epoch_and_samples(value):
    data = toy_data(20)
    method = Breaks(data.task, 6, value)  # four steps per epoch: the third of the second epoch
    with pytest.raises(FloatingPointError) as error:
        fit(method, data, config=TrainingConfig(epochs=3, batch_size=6))
    message, ids = str(error.value), [ids for kind, ids in method.seen if kind == "step"][-1]
    assert f"'loud': {value}" in message and "'mean'" not in message and "'one'" not in message
    assert "epoch 1" in message and "batch 2" in message and str(ids[:5]) in message and "lower lr" in message
    assert method.weight.item() == method.before  # no step was taken on it
    assert sum(kind == "step" for kind, _ in method.seen) == 7


def test_a_learning_rate_beyond_reason_is_found_out():
    with pytest.raises(FloatingPointError, match="ce/.*epoch.*sample ids"):
        trained(config=TrainingConfig(epochs=30, lr=1e30, optimizer="sgd"))


@pytest.mark.parametrize(("other", "words"), [
    (toy_data(num_modalities=3), ["m2"]), (toy_data(num_classes=4), ["4 classes", "3 classes"]),
    (toy_data(multi_label=True), ["multi_label", "single_label"]), (toy_data(image=True), ["image", "vector"]), (toy_data().select("m0"), ["m1"]),
])
@pytest.mark.parametrize("part", ["train", "valid"])
def test_data_that_do_not_fit_are_refused_before_the_first_step(other, words, part):
    data = toy_data()
    method = Recorder(data.task)
    with pytest.raises(ValueError, match=f"the {part} set .*does not fit the method.*create") as error:
        fit(method, other, config=QUICK) if part == "train" else fit(method, data, other, QUICK)
    assert all(word in str(error.value) for word in words) and not method.seen


@pytest.mark.parametrize("part", ["train", "valid"])
def test_empty_data_are_refused(part):
    data = toy_data()
    nobody = data.subset([])
    with pytest.raises(ValueError, match=f"the {part} set is empty"):
        fit(Recorder(data.task), *((nobody,) if part == "train" else (data, nobody)), config=QUICK)


@pytest.mark.parametrize(("options", "message"), [
    ({"epochs": 0}, "epochs must be positive, got 0"), ({"batch_size": -1}, "batch_size must be positive"), ({"lr": 0.0}, "lr must be positive"),
    ({"lr": float("nan")}, "lr must be positive, got nan"), ({"weight_decay": -1e-3}, "weight_decay must not be negative"),
    ({"optimizer": "lion"}, "optimizer='lion'.*adam.*adamw.*sgd"),
])
def test_bad_settings_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)
    with pytest.raises(TypeError, match="epoch"):
        TrainingConfig(epoch=3)


def test_ibma_on_data_without_labels_says_so():
    data = toy_data(unlabelled=True)
    data.target = torch.full_like(data.target, -1)
    with pytest.raises(ValueError, match="no labelled sample"):
        trained(data=data)


def test_an_empty_class_is_said_once_in_a_whole_training():
    data = toy_data(num_classes=4)
    data = data.subset(data.target != 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, result = trained(data=data)
    assert len([w for w in caught if "no sample of class [2]" in str(w.message)]) == 1
    assert np.isfinite(result.history[-1]["ibb"])


def test_training_one_sample_at_a_time():
    _, result = trained(data=toy_data(9), config=TrainingConfig(epochs=1, batch_size=1))
    assert all(np.isfinite(v) for v in result.history[0].values())
