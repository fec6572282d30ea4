"""Several small models trained in one program end where they end one by one; what cannot be trained so is refused."""
import pytest
import torch
from cases import toy_data

from ibma.data import load
from ibma.many import _rows_of, _scaled, _Stack, fit_many
from ibma.methods import create
from ibma.training import TrainingConfig, fit, labelled_rows

OPTIONS = {"dim": 8, "encoders": {"vector": {"hidden": 8}}}


@pytest.fixture(scope="module")
def data():
    return load("sim-3", n=90, seed=0)


def built(name, data, seeds, **options):
    return [create(name, data, seed=s, **OPTIONS, **options) for s in seeds]


CASES = {"ce": ("ce", {}), "ibma": ("ibma", {}), "tight": ("ibma", {"loss": {"bound": "tight"}}), "released": ("ibma", {"loss": {"bound": "released"}}),
         "streaming": ("ibma", {"loss": {"refresh": "streaming"}}), "ema": ("ibma", {"loss": {"prototypes": "ema"}}), "without alignment": ("ibma", {"alignment": False}),
         "without unimodal ce": ("ibma", {"unimodal_ce": False}), "concat": ("ibma", {"fusion": "concat"})}


@pytest.mark.parametrize("case", CASES)
def test_weights_and_statistics_are_those_of_single_trainings(data, case):
    name, options = CASES[case]
    settings = {"epochs": 3, "batch_size": 32, "lr": 2e-3, "scheduler": "cosine", "warmup_epochs": 1}
    together, alone = built(name, data, (3, 5), **options), built(name, data, (3, 5), **options)
    start = [p.clone() for p in together[0].parameters()]
    history = fit_many(together, data, TrainingConfig(**settings), seeds=(3, 5))
    for s, seed in enumerate((3, 5)):
        result = fit(alone[s], data, config=TrainingConfig(**settings, seed=seed))
        assert history[s] == pytest.approx([sum(v for k, v in row.items() if k.startswith("ce/") or k == "ibb") for row in result.history], rel=1e-4)
        for key, value in alone[s].state_dict().items():
            torch.testing.assert_close(together[s].state_dict()[key], value, atol=2e-4, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")
    assert max((a - b).abs().max() for a, b in zip(start, together[0].parameters(), strict=True)) > 1e-3
    assert not torch.equal(together[0].model.fused_head.weight, together[1].model.fused_head.weight)


@pytest.mark.parametrize("options", [{"masks": True, "num_modalities": 3}, {"multi_label": True}], ids=str)
def test_missing_modalities_and_several_labels(options):
    data = toy_data(40, **options)
    data = data.subset(labelled_rows(data).nonzero()[:, 0])
    together, alone = built("ibma", data, (0, 1)), built("ibma", data, (0, 1))
    fit_many(together, data, TrainingConfig(epochs=2, batch_size=16), seeds=(0, 1))
    for s in (0, 1):
        fit(alone[s], data, config=TrainingConfig(epochs=2, batch_size=16, seed=s))
        for a, b in zip(together[s].parameters(), alone[s].parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_values_of_eta_share_everything_else(data):
    zero, large = (create("ibma", data, seed=0, eta=eta, **OPTIONS) for eta in (0.0, 0.9))
    fit_many([zero, large], data, TrainingConfig(epochs=3, batch_size=32))
    (plain,) = built("ce", data, (0,))
    fit(plain, data, config=TrainingConfig(epochs=3, batch_size=32))
    torch.testing.assert_close(zero.model.fused_head.weight, plain.model.fused_head.weight, atol=2e-4, rtol=1e-3)
    first, second = (m.model.encoders["view1"].net[0].weight for m in (zero, large))
    assert (first - second).abs().max() > 1e-3


def test_options_of_the_bound_may_differ_and_each_keeps_its_own(data):
    options = [{"eta": 0.9}, {"loss": {"bound": "tight"}, "eta": 0.2}, {"loss": {"refresh": "streaming"}}, {"alignment": False}, {"fused_bound": False}, {"loss": {"prototypes": "ema", "momentum": 0.5}}]
    together, alone = ([create("ibma", data, seed=s, **OPTIONS, **o) for s, o in enumerate(options)] for _ in range(2))
    fit_many(together, data, TrainingConfig(epochs=2, batch_size=32, lr=2e-3), seeds=range(len(options)))
    for s, method in enumerate(alone):
        fit(method, data, config=TrainingConfig(epochs=2, batch_size=32, lr=2e-3, seed=s))
        for key, value in method.state_dict().items():
            torch.testing.assert_close(together[s].state_dict()[key], value, atol=2e-4, rtol=1e-3, msg=lambda m, key=key, s=s: f"model {s}, {key}: {m}")
    # each owns its memory: saving one must not save all, and renewing one must not renew another
    for method in together:
        assert all(b.untyped_storage().nbytes() == b.numel() * b.element_size() for b in method.ibb.buffers())


@pytest.mark.parametrize(("name", "options", "settings", "message"), [
    ("misa", {}, {}, "one method"),
    ("label_smoothing", {}, {}, "one method"),
    ("ce", {"dropout": 0.1}, {}, "dropout"),
    ("ibma", {"loss": {"prototypes": "learnable"}}, {}, "without parameters"),
    ("ibma", {"loss": {"bound": "club"}}, {}, "IBBLoss"),
    ("ce", {}, {"clip_norm": 1.0}, "without clip_norm"),
    ("ce", {}, {"mixed_precision": "bf16"}, "without mixed_precision"),
    ("ce", {}, {"select": "valid/accuracy", "patience": 2}, "without select, patience"),
])
def test_what_cannot_be_trained_so_is_refused_before_training(data, name, options, settings, message):
    method = create(name, data, seed=0, **options)
    before = [p.clone() for p in method.parameters()]
    with pytest.raises(ValueError, match=message):
        fit_many([method], data, TrainingConfig(epochs=1, **settings))
    assert all(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


def test_other_refusals(data):
    with pytest.raises(ValueError, match="0 models"):
        fit_many([], data, TrainingConfig())
    with pytest.raises(ValueError, match="2 seeds"):
        fit_many(built("ce", data, (0,)), data, TrainingConfig(), seeds=(0, 1))
    with pytest.raises(ValueError, match="one shape"):
        fit_many([*built("ce", data, (0,)), create("ce", data, dim=16)], data, TrainingConfig())
    with pytest.raises(ValueError, match="labelled"):
        some = toy_data(32, unlabelled=True)
        fit_many(built("ce", some, (0,)), some, TrainingConfig())
    with pytest.raises(FloatingPointError, match=r"models \[0\]"):
        fit_many(built("ce", data, (0,)), data, TrainingConfig(epochs=3, lr=1e30))


def test_a_stack_computes_of_scaled_inputs_what_its_models_compute_of_raw_ones(data):
    methods = built("ce", data, (3, 5))
    batch, scaled = data[:7], _rows_of(_scaled(data, methods[0].model, torch.device("cpu")), torch.arange(7))
    methods[1].model.fit_inputs([data[:]])
    z, fused, _, logits = _Stack(methods)(scaled, shared=True)
    for s, method in enumerate(methods):
        expected = method.model(batch.inputs, batch.mask)
        torch.testing.assert_close(fused[s], expected.fused, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits[s], expected.fused_logits, atol=1e-5, rtol=1e-4)
        for name in z:
            torch.testing.assert_close(z[name][s], expected.z[name], atol=1e-5, rtol=1e-4)
