"""What holds for every registered method, whatever it does: gradients, masks, kinds of tasks, predictions, checkpoints, and that it learns."""
import copy
import io
import math
from contextlib import contextmanager

import pytest
import torch
from cases_methods import KINDS, case_of, digits32, kind_of_data, regularised, short_fit, small, step

from ibma.data import load
from ibma.methods import METHODS, create
from ibma.methods.base import Method
from ibma.training import TrainingConfig, fit

NAMES = list(METHODS)
ACCEPTED = [(name, kind) for name in NAMES for kind in KINDS if kind not in case_of(name).refuses]
REFUSED = [(name, kind) for name in NAMES for kind in case_of(name).refuses]


@contextmanager
def seeded(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def unknown(batch, task):
    "The same batch without any target."
    batch = copy.copy(batch)
    batch.target = torch.full_like(batch.target, math.nan if batch.target.is_floating_point() else -1)
    return batch


def started(name, data, **options):
    method = small(name, data, **options)
    method.on_fit_start(list(data.loader(16)))
    method.on_epoch_start(case_of(name).phases[-1])
    return method


# --- the registry


def test_names_are_the_fixed_ones_in_their_order():
    fixed = "ce label_smoothing concat film bigated misa deep_ib mmib mmrlib dmib e_mib l_mib c_mib mcib clfa dclf omib ibma".split()
    assert NAMES == [name for name in fixed if name in NAMES]


def test_a_method_with_a_fusion_of_its_own_takes_no_option_of_the_shared_one():
    with pytest.raises(TypeError, match="unknown option 'heads' of method 'misa'; known: alpha, beta, dim, dropout, encoders, feedforward, gamma, hidden$"):
        create("misa", kind_of_data(), heads=4)
    with pytest.raises(TypeError, match="unknown option 'fusion' of method 'film'; known: by, dim, encoders$"):
        create("film", kind_of_data(), fusion="concat")
    create("concat", kind_of_data(), dim=8, encoders={"vector": {"hidden": 8}})


# --- gradients


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter_that_trains_and_no_other(name):
    data = kind_of_data()
    method, batch = small(name, data), data[:]
    method.on_fit_start(list(data.loader(16)))
    extra = [p for o in method.optimizers(TrainingConfig()) for group in o.param_groups for p in group["params"]]
    reached, learnt = set(), set()
    for phase in case_of(name).phases:
        method.on_epoch_start(phase)
        for loss, found in ((lambda: sum(method.loss(batch).values()), reached), (lambda: method.learning_loss(batch), learnt)):
            if found is learnt and not extra:
                continue
            method.zero_grad(set_to_none=True)
            loss().backward()
            assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
            found |= {n for n, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    apart = {n for n, p in method.named_parameters() if any(p is e for e in extra)}
    trained = {n for n, p in method.named_parameters() if p.requires_grad} - apart
    assert reached == trained, f"no gradient: {sorted(trained - reached)}; unexpected: {sorted(reached - trained)}"
    assert apart <= learnt


# --- kinds of tasks


@pytest.mark.parametrize(("name", "kind"), ACCEPTED)
def test_an_epoch_of_every_kind_of_task(name, kind):
    data = kind_of_data(kind, masks=True)
    method, batch = small(name, data), data[:]
    assert isinstance(method, Method)
    terms = short_fit(method, data.loader(16), epochs=2)
    assert terms and all(math.isfinite(v) for v in terms.values())
    p = method.predict(batch.inputs, batch.mask)
    assert p.shape == {"single_label": (33, 3), "multi_label": (33, 3)}.get(kind, (33,))
    assert p.isfinite().all() and torch.equal(p, method.predict(batch.inputs, batch.mask)) and method.training
    if kind == "single_label":
        torch.testing.assert_close(p.sum(1), torch.ones(33))
    if kind in ("single_label", "multi_label"):
        assert p.min() >= 0 and p.max() <= 1
    if kind == "one_class":
        assert p.min() >= 0 and p.std() > 0
    for rows in ([0], [5, 6, 7]):  # a sample's prediction does not depend on its neighbours
        alone = method.predict({m: x[rows] for m, x in batch.inputs.items()}, {m: h[rows] for m, h in batch.mask.items()})
        torch.testing.assert_close(alone, p[rows], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_kinds_of_task_without_meaning_are_refused_with_the_reason(name, kind):
    with pytest.raises(ValueError, match=case_of(name).refuses[kind]):
        small(name, kind_of_data(kind))


@pytest.mark.parametrize(("name", "kind"), ACCEPTED)
def test_a_batch_without_targets_has_a_finite_loss(name, kind):
    data = kind_of_data(kind, masks=True)
    method = started(name, data)
    terms = method.loss(unknown(data[:16], data.task))
    total = sum(terms.values())
    assert total.isfinite()
    if total.requires_grad:
        total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


# --- missing modalities


def with_garbage(batch):
    "The same batch with other values where a modality is missing."
    batch = copy.copy(batch)
    batch.inputs = {m: torch.where(batch.mask[m].view(-1, *[1] * (x.ndim - 1)), x, 50 * torch.ones_like(x) + torch.arange(len(x)).view(-1, *[1] * (x.ndim - 1)))
                    for m, x in batch.inputs.items()}
    return batch


@pytest.mark.parametrize("num_modalities", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_what_stands_in_the_place_of_a_missing_modality_changes_nothing(name, num_modalities):
    if num_modalities not in case_of(name).modalities:
        pytest.skip("not defined for that many modalities")
    data = kind_of_data(num_modalities=num_modalities, masks=True)
    clean = list(data.loader(16))
    results = []
    for batches in (clean, [with_garbage(b) for b in clean]):
        method = small(name, data)
        with seeded():
            short_fit(method, batches, epochs=2)
        results.append((method.state_dict(), torch.cat([method.predict(b.inputs, b.mask) for b in batches])))
    (one, p), (two, q) = results
    torch.testing.assert_close(p, q, atol=1e-4, rtol=0)
    for key in one:
        if isinstance(one[key], torch.Tensor):
            torch.testing.assert_close(one[key], two[key], atol=1e-4, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}", equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_that_shares_no_modality_has_a_finite_loss(name):
    data = kind_of_data(masks=False)
    method, batch = started(name, data), data[:16]
    odd = torch.arange(16) % 2 == 1
    for masks in ({"m0": odd, "m1": ~odd}, {"m0": torch.ones_like(odd), "m1": torch.zeros_like(odd)}):
        batch.mask = masks
        method.zero_grad()
        terms = method.loss(batch)
        assert all(v.isfinite() for v in terms.values()), terms
        sum(terms.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


# --- the engine, checkpoints


@pytest.mark.parametrize("num_modalities", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_fit_trains_it(name, num_modalities):
    if num_modalities not in case_of(name).modalities:
        pytest.skip("not defined for that many modalities")
    data = kind_of_data(num_modalities=num_modalities, masks=True)
    method = small(name, data)
    result = fit(method, data, data, TrainingConfig(epochs=2, batch_size=16, lr=1e-2, device="cpu"))
    assert len(result.history) == 2 and all(math.isfinite(v) for row in result.history for v in row.values() if isinstance(v, float))
    assert 0 <= result.metrics["valid/accuracy"] <= 1


@pytest.mark.parametrize("name", NAMES)
def test_a_state_loads_safely_into_a_fresh_method(name):
    data = kind_of_data(masks=True)
    method, batch = small(name, data), data[:]
    with seeded():
        short_fit(method, data.loader(16))
    content = io.BytesIO()
    torch.save(method.state_dict(), content)
    content.seek(0)
    other = small(name, data, seed=1)
    other.load_state_dict(torch.load(content, weights_only=True))
    other.on_epoch_start(1)
    method.on_epoch_start(1)
    assert torch.equal(method.predict(batch.inputs, batch.mask), other.predict(batch.inputs, batch.mask))
    losses = []
    for m in (method, other):
        with seeded():
            losses.append({k: v.item() for k, v in m.loss(batch).items()})
    assert losses[0] == pytest.approx(losses[1])


# --- it learns, and its regularisers regularise


@pytest.mark.parametrize("name", NAMES)
def test_it_overfits_32_digits(name):
    case, batch, data = case_of(name), digits32(), load("digits")
    method = create(name, data, seed=0, **{"dim": 16, "encoders": {"image": {"width": 4}}} | case.options | case.overfit)
    batches = [batch]
    with seeded():
        method.on_fit_start(batches)
    extra = list(method.optimizers(TrainingConfig()))
    own = {id(p) for o in extra for group in o.param_groups for p in group["params"]}
    optimiser = torch.optim.Adam([p for p in method.parameters() if id(p) not in own], case.lr)
    accuracy = 0.0
    with seeded():
        for number in range(case.steps):
            if number % 10 == 0:
                method.on_epoch_start(number // 10)
            step(method, batch, optimiser, extra)
            if number % 10 == 9:
                method.on_epoch_end(batches)
                accuracy = (method.predict(batch.inputs, batch.mask).argmax(1) == batch.target).float().mean().item()
                if accuracy >= 0.99:
                    break
    assert accuracy >= 0.99


@pytest.mark.parametrize(("name", "regulariser"), regularised(), ids=lambda v: v if isinstance(v, str) else f"{v.option}-{v.term}".replace("/", "_"))
def test_a_regulariser_lowers_its_term(name, regulariser):
    if name not in METHODS:
        pytest.skip("not registered")
    data = kind_of_data(n=32)
    batches, values = [data[:]], []
    for weight in (regulariser.weight, 0.0):
        method = small(name, data, **{regulariser.option: weight})
        with seeded():
            short_fit(method, batches, regulariser.epochs, regulariser.lr)
        measure = small(name, data, **{regulariser.option: 1.0})
        measure.load_state_dict(method.state_dict())
        measure.eval()
        with seeded():
            values.append(measure.loss(batches[0])[regulariser.term].item() - regulariser.floor(data))
        assert values[-1] > -1e-5, "below its floor"
    assert values[0] <= 0.5 * values[1] and values[1] > 0, values
