"""Unlabelled samples: batches of two parts, what is refused and said, and the weight of unlabelled pairs in IBMA."""
import copy
import math
import warnings

import engine_runs
import numpy as np
import pytest
import torch
from cases import toy_data
from engine_runs import ibma, member, toy
from sklearn.metrics import cohen_kappa_score
from test_engine import free_port, server, start  # noqa: F401  (server is a fixture)

from ibma.data import MultimodalData
from ibma.methods import create
from ibma.methods.ibma import kappa
from ibma.training import MixedBatches, TrainingConfig, _mixed_loader, evaluate, fit, labelled_rows


def hidden(data, labelled):
    "The same data, of which only these rows keep their target."
    part = copy.copy(data)
    keep = torch.zeros(len(data), dtype=torch.bool)
    keep[labelled] = True
    unknown = float("nan") if data.target.is_floating_point() else -1
    part.target = torch.where(keep.view(-1, *[1] * (data.target.ndim - 1)), data.target, torch.tensor(unknown, dtype=data.target.dtype))
    return part


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- without unlabelled samples nothing changes


def test_with_all_labels_batches_and_generator_are_the_plain_ones():
    data = toy_data()
    plain, ours = data.loader(8, shuffle=True, seed=3), _mixed_loader(data, TrainingConfig(batch_size=8, seed=3, unlabelled_ratio=2.0), 1)
    for _ in range(2):
        assert [b.id.tolist() for b in plain] == [b.id.tolist() for b in ours]
        assert torch.equal(plain.generator.get_state(), ours.generator.get_state())


@pytest.mark.parametrize("name", ["ce", "ibma"])
def test_with_all_labels_every_setting_of_unlabelled_samples_is_without_effect(name):
    data, runs = toy(), []
    for config, options in (({}, {}), ({"unlabelled_ratio": 3.0}, {"eta_unlabelled": 2.0, "ramp": 1, "guard": False, "confident": 0.6, "balance": 1.0})):
        method = create(name, data, seed=0, dim=8, encoders={"vector": {"hidden": 16, "dropout": 0.2}}, **(options if name == "ibma" else {}))
        with torch.random.fork_rng():
            torch.manual_seed(5)
            result = fit(method, data, data, TrainingConfig(epochs=4, batch_size=20, **config))
            runs.append((method, result.history, torch.rand(1)))
    (a, one, draw), (b, two, other) = runs
    assert same(a, b) and one == two and draw == other


# --- batches of two parts


@pytest.mark.parametrize(("n", "m", "size", "ratio"), [(10, 90, 4, 2.0), (90, 10, 16, 0.5), (7, 3, 64, None), (40, 1160, 64, None), (5, 5, 2, 1.0), (100, 1, 10, None)])
def test_an_epoch_passes_once_over_the_larger_part_and_no_batch_repeats_a_sample(n, m, size, ratio):
    labelled = torch.arange(n + m) < n
    batches = MixedBatches(labelled, size, ratio, torch.Generator().manual_seed(0))
    for _ in range(2):
        rows = list(batches)
        assert len(rows) == len(batches) and all(len(set(batch)) == len(batch) for batch in rows)
        assert [(sum(i < n for i in batch), sum(i >= n for i in batch)) for batch in rows] == batches.sizes()
        counts = np.bincount([i for batch in rows for i in batch], minlength=n + m)
        whole = [part for part, take in ((counts[:n], batches.takes[0]), (counts[n:], batches.takes[1])) if math.ceil(len(part) / take) == len(rows)]
        assert whole and all((part == 1).all() for part in whole)
    assert batches.takes[0] == min(size, n)
    assert batches.takes[1] == min(m, max(1, round((min(m / n, 4) if ratio is None else ratio) * min(size, n))))


def test_the_smaller_part_is_used_evenly_over_epochs():
    batches = MixedBatches(torch.arange(110) < 10, 4, 2.5, torch.Generator().manual_seed(0))
    counts = np.bincount([i for _ in range(60) for batch in batches for i in batch if i < 10])  # 60 · 10 batches · 4 places for 10 samples
    assert counts.min() > 0.9 * counts.mean()


def test_ratio_zero_is_training_on_the_labelled_alone():
    data = toy_data(40)
    part, only = hidden(data, range(0, 24)), data.subset(range(24))
    one, two = (create("ce", data, seed=0, dim=8) for _ in range(2))
    two.on_fit_start([part[:]])
    two.on_fit_start = lambda batches: None  # the scaling of the inputs may look at all
    fit(one, part, config=TrainingConfig(epochs=3, batch_size=24, unlabelled_ratio=0))
    fit(two, only, config=TrainingConfig(epochs=3, batch_size=24))
    torch.testing.assert_close(one.predict(data[:].inputs), two.predict(data[:].inputs), rtol=1e-4, atol=1e-5)


def test_unknown_means_every_label_in_a_set_and_no_gap_in_one_class():
    target = torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [1.0, 1.0], [float("nan"), float("nan")]])
    data = MultimodalData.from_arrays({"a": torch.randn(4, 2)}, target)
    assert labelled_rows(data).tolist() == [True, True, True, False]
    one = MultimodalData.from_arrays({"a": torch.randn(3, 2)}, torch.tensor([0, -1, 1]), kind="one_class", num_classes=2)
    assert not isinstance(_mixed_loader(one, TrainingConfig(), 1).sampler, MixedBatches)


def test_two_parts_are_continued_after_an_interruption(tmp_path):
    data = hidden(toy(), range(0, 30))

    def run(epochs, **options):
        method = ibma(data, dropout=0.2)
        return method, fit(method, data, config=TrainingConfig(epochs=epochs, batch_size=16, **options))

    whole, one = run(4)
    run(2, run_dir=str(tmp_path))
    parts, two = run(4, run_dir=str(tmp_path), resume=True)
    assert one.history == two.history and same(whole, parts)
    assert "unlabelled/agreement" in one.history[0] and parts.agreement is not None
    with pytest.raises(ValueError, match="unlabelled_ratio: None then, 1.0 now"):
        run(5, run_dir=str(tmp_path), resume=True, unlabelled_ratio=1.0)


@pytest.mark.parametrize("refresh", ["epoch", "streaming"])
def test_two_processes_are_one_with_unlabelled_samples(server, refresh):  # noqa: F811
    settings = {"epochs": 4, "batch_size": 8, "lr": 5e-3, "unlabelled_ratio": 1.0, "hidden": 32}  # 32 labelled, 40 not: both parts even
    history, statistics, metrics = engine_runs.statistics_run(settings, refresh)
    queue, port = server.Queue(), free_port()
    for rank in range(2):
        start(server, member, rank, 2, port, settings, refresh, queue)
    for _ in range(2):
        _, theirs, stats, measured = queue.get(timeout=120)
        for mine, other in zip(history, theirs, strict=True):
            assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)
        np.testing.assert_allclose(stats["centroids"], statistics["centroids"], rtol=0, atol=1e-5)
        assert measured == pytest.approx(metrics)


# --- what is refused, and what is said


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
@pytest.mark.parametrize("name", ["ce", "ibma"])
def test_training_data_without_any_label_are_refused(kind, name):
    data = toy_data(multi_label=kind == "multi")
    if kind == "regression":
        data = MultimodalData.from_arrays(data[:].inputs, data.target.float(), kind="regression", bins=(0.5, 1.5))
    method = create(name, data, seed=0, dim=8)
    with pytest.raises(ValueError, match="the train set has no labelled sample: .*must be known"):
        fit(method, hidden(data, []), config=TrainingConfig(epochs=1))
    with pytest.raises(ValueError, match="the valid set has no labelled sample"):
        fit(method, data, hidden(data, []), TrainingConfig(epochs=1))


def test_a_class_without_label_is_named_where_samples_of_it_may_be_unlabelled():
    data = MultimodalData.from_arrays(toy_data()[:].inputs, [("ant", "bee", "cow")[i % 3] for i in range(33)])
    part = hidden(data, [i for i in range(33) if i % 3 != 1])
    with pytest.warns(UserWarning, match="no labelled sample of class bee"):
        fit(create("ce", data, dim=8), part, config=TrainingConfig(epochs=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(create("ce", data, dim=8), hidden(data, range(12)), config=TrainingConfig(epochs=1))
    assert not [w for w in caught if "no labelled" in str(w.message)]


# --- unlabelled pairs in IBMA


def warm(data, **options):
    "A method with tables that say something."
    method = create("ibma", data, seed=0, dim=8, heads=2, encoders={"vector": {"hidden": 16}}, loss={"temperature": 0.5}, **options)
    settings = TrainingConfig(epochs=12, batch_size=16, lr=1e-2)
    fit(method, data, config=settings)
    return method.eval()


def test_an_unlabelled_pair_adds_its_alignment_and_a_lone_modality_nothing():
    data = toy_data(90, masks=True, unlabelled=True)
    method = warm(data, eta=0.7, eta_unlabelled=0.3, guard=False, ramp=0)
    batch = data[:]
    known = batch.target >= 0
    pairs = ~known & batch.mask["m0"] & batch.mask["m1"]
    assert 0 < pairs.sum() < (~known).sum()
    out = method(batch)
    stats, loss = method.ibb.statistics, method.ibb

    def assigned(j, name):
        z, c = (torch.nn.functional.normalize(v, dim=-1) for v in (out.z[name], stats.centroids[j]))
        return (-(z[:, None] - c).square().sum(-1) / loss.temperature).softmax(-1)

    phi = [assigned(j, name) for j, name in enumerate(("m0", "m1"))]
    slow = 0.0
    for j in range(2):
        for i in pairs.nonzero()[:, 0].tolist():
            slow -= (phi[j][i] @ stats.log_table[j] @ phi[1 - j][i]).item() / int(pairs.sum())
    supervised = method.loss(data[known.nonzero()[:, 0]])["ibb"]
    expected = float(supervised) + 0.3 * slow * int((~known).sum()) / int(known.sum())
    assert method.loss(batch)["ibb"].item() == pytest.approx(expected, rel=1e-4)
    method.trust = 0.25
    assert method.loss(batch)["ibb"].item() == pytest.approx(float(supervised) + 0.25 * (expected - float(supervised)), rel=1e-4)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("bound", ["paper", "tight"])
def test_unlabelled_pairs_train_in_every_kind_and_missing_modality(multi_label, bound):
    data = hidden(toy_data(60, num_modalities=3, multi_label=multi_label, masks=True), range(30))
    method = create("ibma", data, seed=0, dim=8, heads=2, loss={"bound": bound, "temperature": 0.5}, ramp=2, confident=0.9, balance=0.1)
    result = fit(method, data, config=TrainingConfig(epochs=6, batch_size=8, lr=1e-2))
    assert all(math.isfinite(v) for v in result.history[-1].values())
    assert -1 <= result.history[-1]["unlabelled/agreement"] <= 1


def test_kappa_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    b[:120] = a[:120]
    joint = torch.zeros(4, 4)
    for x, y in zip(a, b, strict=True):
        joint[x, y] += 1
    assert float(kappa(joint)) == pytest.approx(cohen_kappa_score(a, b))
    assert float(kappa(torch.diag(torch.tensor([5.0, 0.0])))) == pytest.approx(0, abs=1e-6)  # a collapse is no agreement
    assert kappa(torch.stack([joint, joint.T])).shape == (2,)


def test_the_guard_follows_the_agreement_and_shuffled_pairs_are_complained_of():
    data = toy_data(300, noise=0.5)
    part = hidden(data, range(30))
    shuffled = copy.copy(part)
    order = 30 + torch.randperm(270, generator=torch.Generator().manual_seed(0))
    shuffled.inputs = {"m0": part.inputs["m0"], "m1": torch.cat([part.inputs["m1"][:30], part.inputs["m1"][order]])}
    found = {}
    for name, this in {"paired": part, "shuffled": shuffled}.items():
        method = create("ibma", data, seed=0, dim=8, heads=2, encoders={"vector": {"hidden": 16}}, loss={"temperature": 0.5}, ramp=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history = fit(method, this, config=TrainingConfig(epochs=8, batch_size=16, lr=1e-2)).history
        found[name] = history[-1]["unlabelled/agreement"], history[-1]["unlabelled/trust"], any("hardly agree" in str(w.message) for w in caught)
        assert history[-1]["unlabelled/trust"] == pytest.approx(max(0.0, history[-2]["unlabelled/agreement"]))
        assert history[1]["unlabelled/trust"] == pytest.approx(0.5 * max(0.0, history[0]["unlabelled/agreement"]))
    assert found["paired"][0] > 0.8 and not found["paired"][2]
    assert found["shuffled"][0] < 0.15 and found["shuffled"][2]


def test_confident_samples_join_the_statistics_after_the_ramp():
    data = hidden(toy_data(90, noise=0.3), range(30))
    method = create("ibma", data, seed=0, dim=8, heads=2, loss={"temperature": 0.5}, ramp=3, confident=0.6)
    seen = []
    observe = method.ibb.observe
    method.ibb.observe = lambda z, fused, targets, mask=None: (seen.append(int((targets >= 0).sum())), observe(z, fused, targets, mask))[1]
    fit(method, data, config=TrainingConfig(epochs=8, batch_size=16, lr=1e-2))
    assert seen[:4] == [30] * 4 and seen[-1] > 60
    with pytest.raises(ValueError, match="confident=1.5"):
        create("ibma", data, confident=1.5)


def test_balance_pulls_the_mean_assignment_to_the_class_frequencies():
    data = toy_data(60)
    method = warm(data, ramp=0)
    phi = {"m0": torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).log_softmax(-1)}
    mask = {"m0": torch.arange(20) < 15}
    mean = phi["m0"][:15].exp().mean(0)
    expected = float((mean * (mean.log() - method.ibb.statistics.log_prior)).sum())
    assert float(method._imbalance(phi, mask)) == pytest.approx(expected, abs=1e-6)


def test_few_labels_and_many_pairs_do_better_than_few_labels():
    "Two views with independent noise; measured gains over five seeds with these settings: .08, -.03, .09, .05, .05."
    gains = []
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        y = torch.arange(400) % 4
        centres = torch.randn(4, 10, generator=draw)
        views = {name: centres[y] + 1.3 * torch.randn(400, 10, generator=draw) for name in ("a", "b")}
        data = MultimodalData.from_arrays(views, y)
        train, test = hidden(data, range(8)).subset(range(200)), data.subset(range(200, 400))
        accuracy = {}
        for ratio in (0, None):
            method = create("ibma", data, seed=seed, dim=16, heads=2, encoders={"vector": {"hidden": 32}}, loss={"temperature": 0.2}, ramp=5)
            fit(method, train, config=TrainingConfig(epochs=60 if ratio == 0 else 20, batch_size=32, lr=3e-3, unlabelled_ratio=ratio))
            accuracy[ratio] = evaluate(method, test)["accuracy"]
        gains.append(accuracy[None] - accuracy[0])
    assert np.mean(gains) > 0.02, gains
