"""Selection: folds, grids, and that the test rows are never touched."""
import multiprocessing
import os
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from engine_runs import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from ibma.data import MultimodalData, load
from ibma.selection import PAPER_GRID, fold_scores, folds, select, training_rows
from ibma.training import TrainingConfig

TINY = TrainingConfig(epochs=2, batch_size=64, lr=3e-3)
OPTIONS = {"dim": 8, "heads": 2, "encoders": {"vector": {"hidden": 8}}}


class Guarded(MultimodalData):
    """Refuses to hand out test rows."""

    touched = 0

    def __getitem__(self, index):
        rows = torch.as_tensor(index)
        if set(self.ids[rows].flatten().tolist()) & self.forbidden:
            Guarded.touched += 1
            raise AssertionError("a test row was touched")
        return super().__getitem__(index)


def guarded(n=300):
    data = load("sim-3", n=n, d0=8, d0_superfluous=8, d11=8, d21=8, d12=8, d22=8)
    data.__class__ = Guarded
    test = data.splits["test"]
    data.forbidden = set(data.ids[test].tolist())
    for view in data.inputs.values():
        view[test] = float("nan")   # whoever reads past the guard gets what he deserves
    data.target[test] = -1
    return data


def test_five_fold_selection_on_sim_3_picks_eta_without_touching_the_test_split():
    data = guarded()
    found = select("ibma", data, {"eta": (0.1, 0.5, 0.9)}, TINY, k=5, options=OPTIONS)
    assert found.best["eta"] in (0.1, 0.5, 0.9) and Guarded.touched == 0
    assert [row["eta"] for row in found.table] == [0.1, 0.5, 0.9] and all(len(row["folds"]) == 5 for row in found.table)
    assert found.score == max(row["mean"] for row in found.table) == pytest.approx(np.mean(max(found.table, key=lambda r: r["mean"])["folds"]))


def test_the_guard_would_notice(monkeypatch):
    data = guarded()
    monkeypatch.setattr("ibma.selection.training_rows", lambda data: torch.arange(len(data)))   # what a careless selection would do
    with pytest.raises(AssertionError, match="test row was touched"):
        select("ibma", data, {"eta": (0.1,)}, TINY, k=5, options=OPTIONS)


def test_the_published_training_split_is_all_that_is_used():
    data = toy(60)
    parts = MultimodalData.from_arrays({k: v.numpy() for k, v in data.inputs.items()}, data.target.numpy(), splits={"train": range(0, 30), "valid": range(30, 40), "test": range(50, 60)})
    assert training_rows(parts).tolist() == list(range(30))
    assert training_rows(data).tolist() == list(range(60))
    with pytest.raises(ValueError, match="no row is left"):
        training_rows(MultimodalData.from_arrays({k: v.numpy() for k, v in data.inputs.items()}, data.target.numpy(), splits={"test": range(60)}))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(30, 90), k=st.integers(2, 6), seed=st.integers(0, 5), grouped=st.booleans(), multi=st.booleans())
def test_folds_partition_the_rows_and_keep_groups_together(n, k, seed, grouped, multi):
    draw = np.random.default_rng(seed)
    y = draw.integers(0, 2, (n, 3)).astype(float) if multi else np.arange(n) % 3
    groups = draw.permutation(np.arange(n) % 10) if grouped else None
    data = MultimodalData.from_arrays({"a": draw.normal(size=(n, 2)), "b": draw.normal(size=(n, 2))}, y, groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = folds(data, k, seed)
        again = folds(data, k, seed)
    assert sorted(i for _, valid in parts for i in valid.tolist()) == list(range(n))
    for (train, valid), (train_again, _) in zip(parts, again, strict=True):
        assert torch.equal(train, train_again) and sorted(train.tolist() + valid.tolist()) == list(range(n))
        if grouped:
            assert not set(groups[train]) & set(groups[valid])
        elif not multi:
            shares = np.bincount(y[valid.numpy()], minlength=3)
            assert shares.max() - shares.min() <= 2


def test_a_class_without_a_sample_in_a_fold_is_reported():
    data = toy(60)
    y = data.target.clone()
    y[y == 2] = 0
    y[[5, 40]] = 2
    rare = MultimodalData.from_arrays({k: v.numpy() for k, v in data.inputs.items()}, y.numpy(), num_classes=3, class_names=("x", "y", "rare"))
    with pytest.warns(UserWarning, match="no validation sample of class rare"):
        folds(rare, 5)
    grouped = MultimodalData.from_arrays({k: v.numpy() for k, v in data.inputs.items()}, y.numpy(), np.where(y.numpy() == 2, 0, np.arange(60) % 9 + 1), num_classes=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folds(grouped, 5)
    assert any("no training sample of class 2" in str(w.message) for w in caught)


def test_the_papers_grid():
    assert PAPER_GRID == {"eta": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), "lr": (1e-4, 5e-4, 1e-3), "weight_decay": (1e-6, 1e-5, 1e-4)}


def test_a_study_resumes_and_trains_only_what_is_missing(tmp_path, monkeypatch):
    data, file, calls = toy(60), str(tmp_path / "study.db"), []
    import ibma.selection as module

    real = module.fold_scores

    def counting(method, data, point, *rest):
        calls.append(dict(point))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(method, data, point, *rest)

    monkeypatch.setattr(module, "fold_scores", counting)
    grid = {"eta": (0.1, 0.5), "lr": (1e-3, 1e-2)}
    with pytest.raises(KeyboardInterrupt):
        select("ibma", data, grid, TINY, k=2, options=OPTIONS, storage=file)
    found = select("ibma", data, grid, TINY, k=2, options=OPTIONS, storage=file)
    assert len(calls) == 5   # two finished, one broken off, the two that were left
    monkeypatch.undo()
    assert found == select("ibma", data, grid, TINY, k=2, options=OPTIONS)
    with pytest.raises(ValueError, match="other config, folds"):
        select("ibma", data, grid, TrainingConfig(epochs=3), k=3, options=OPTIONS, storage=file)


def searching(file):
    torch.set_num_threads(1)
    select("ibma", toy(60), {"eta": (0.1, 0.3, 0.5, 0.7)}, TINY, k=2, options=OPTIONS, storage=file)


def test_a_killed_search_leaves_its_finished_points(tmp_path):
    server = multiprocessing.get_context("forkserver")
    file = tmp_path / "study.db"
    victim = server.Process(target=searching, args=(str(file),), daemon=True)
    victim.start()
    while not file.exists():
        time.sleep(0.02)
    time.sleep(1.0)
    if victim.is_alive():
        os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    found = select("ibma", toy(60), {"eta": (0.1, 0.3, 0.5, 0.7)}, TINY, k=2, options=OPTIONS, storage=str(file))
    assert found == select("ibma", toy(60), {"eta": (0.1, 0.3, 0.5, 0.7)}, TINY, k=2, options=OPTIONS)


@pytest.mark.slow
def test_parallel_is_serial(tmp_path):
    data, grid = toy(60), {"eta": (0.1, 0.5), "lr": (1e-3, 1e-2)}
    parallel = select("ibma", data, grid, TINY, k=2, options=OPTIONS, storage=str(tmp_path / "study.db"), n_jobs=2)
    assert parallel == select("ibma", data, grid, TINY, k=2, options=OPTIONS)


def test_a_point_whose_numbers_run_away_is_a_hole():
    config = TrainingConfig(epochs=3, batch_size=16, optimizer="sgd")
    found = select("ce", toy(60), {"lr": (1e-2, 1e30)}, config, k=2, options=OPTIONS)
    assert found.best == {"lr": 1e-2}
    assert [row["status"] for row in found.table] == ["finished", "failed"] and "lower lr" in found.table[1]["error"]
    with pytest.raises(RuntimeError, match="every point of the grid failed.*lower lr"):
        select("ce", toy(60), {"lr": (1e30,)}, config, k=2, options=OPTIONS)


def test_loss_is_minimised_and_ties_go_to_the_first():
    data = toy(60)
    found = select("ce", data, {"lr": (1e-6, 1e-2)}, TINY, k=2, metric="valid/loss", options=OPTIONS)
    assert found.best == {"lr": 1e-2} and found.score == min(row["mean"] for row in found.table)
    tied = select("ce", data, {"weight_decay": (1e-5, 0.0)}, TrainingConfig(epochs=1, lr=1e-12), k=2, options=OPTIONS)
    assert tied.best == {"weight_decay": 1e-5}


def test_sampling_less_than_the_grid():
    found = select("ce", toy(60), {"lr": (1e-4, 1e-3, 1e-2), "weight_decay": (0.0, 1e-3)}, TINY, k=2, options=OPTIONS, n_trials=2)
    assert 1 <= len(found.table) <= 2


def test_mistakes_are_named():
    data = toy(60)
    with pytest.raises(ValueError, match="needs storage"):
        select("ce", data, {"lr": (1e-3,)}, n_jobs=2)
    with pytest.raises(TypeError, match="unknown option 'etta'"):
        select("ibma", data, {"etta": (0.1,)}, TINY, k=2)
    with pytest.raises(ValueError, match="metric='valid/f1' is unknown"):
        fold_scores("ce", data, {}, TINY, folds(data, 2), "valid/f1", OPTIONS)


@pytest.mark.parametrize("grouped", [False, True])
def test_folds_of_a_regression_are_balanced_over_its_bins(grouped):
    y = torch.linspace(-3, 3, 120)
    data = MultimodalData.from_arrays({"a": torch.randn(120, 3), "b": torch.randn(120, 2)}, y, groups=torch.arange(120) // 2 if grouped else None, kind="regression", bins=[-1.0, 1.0])
    for train, valid in folds(data, 4):
        assert not set(train.tolist()) & set(valid.tolist()) and len(train) + len(valid) == 120
        counts = data.subset(valid).class_counts()
        assert counts.min() >= 7, f"bins of a fold: {counts.tolist()}"
