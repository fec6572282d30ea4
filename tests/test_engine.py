"""The training engine: interruptions, processes, guards, memory. Other processes come from a fork server that has the imports done."""
import copy
import gc
import multiprocessing
import socket
import time
import warnings
from pathlib import Path

import engine_runs
import numpy as np
import psutil
import pytest
import torch
from engine_runs import ibma, toy

from ibma.checkpoints import CheckpointFolder, write_atomically
from ibma.data import MultimodalData
from ibma.methods import create
from ibma.methods.base import Method, cross_entropies
from ibma.training import TrainingConfig, evaluate, fit, train_epoch


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "accelerate", "torch.nn.parallel.distributed", "ibma.training", "ibma.methods.ibma", "ibma.data"])
    return context


def start(server, function, *args):
    process = server.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- interruptions ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def uninterrupted(server):
    queue, began = server.Queue(), time.perf_counter()
    start(server, engine_runs.killable, None, queue)
    first = queue.get(timeout=120)
    began = time.perf_counter()
    start(server, engine_runs.killable, None, queue)
    assert queue.get(timeout=60) == first
    return first, time.perf_counter() - began


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_gives_the_same_bits(server, uninterrupted, tmp_path, kills):
    expected, seconds = uninterrupted
    draw, killed, epochs = np.random.default_rng(0), 0, set()
    folder, number = tmp_path / "0", 0
    while killed < kills:
        victim = start(server, engine_runs.killable, str(folder), None, float(draw.uniform(0.05, 1.1) * seconds))
        victim.join(60)
        if victim.exitcode == 0:   # finished before the shot: a new folder for the next
            number += 1
            folder = tmp_path / str(number)
            continue
        assert victim.exitcode == -9
        killed += 1
        epochs.add(max(CheckpointFolder(folder).epochs(), default=-1))
        if draw.random() < 0.5:    # else it is killed again while it resumes
            queue = server.Queue()
            start(server, engine_runs.killable, str(folder), queue)
            assert queue.get(timeout=60) == expected
            number += 1
            folder = tmp_path / str(number)
    queue = server.Queue()
    start(server, engine_runs.killable, str(folder), queue)
    assert queue.get(timeout=60) == expected
    assert len(epochs) > kills // 6   # the shots fell in different epochs


def test_resume_of_a_finished_run_returns_its_result(tmp_path):
    folder = str(tmp_path / "run")
    first = engine_runs.long_run(folder, epochs=3)
    assert engine_runs.long_run(folder, epochs=3) == first == engine_runs.long_run(epochs=3)


def test_a_finished_run_can_go_on_for_more_epochs(tmp_path):
    folder = str(tmp_path / "run")
    engine_runs.long_run(folder, epochs=2, scheduler="constant")
    assert engine_runs.long_run(folder, epochs=4, scheduler="constant") == engine_runs.long_run(epochs=4, scheduler="constant")


def test_early_stopping_resumes_as_it_was(tmp_path):
    settings = {"epochs": 12, "patience": 2, "lr": 2e-2}
    whole, folder = engine_runs.long_run(**settings), tmp_path / "run"
    engine_runs.long_run(str(folder), **settings)
    run = CheckpointFolder(folder)
    for epoch in run.epochs()[-1:]:
        run._remove(epoch)   # as if killed before the last checkpoint
    assert engine_runs.long_run(str(folder), **settings) == whole


@pytest.mark.parametrize("harm", ["truncated", "empty", "flipped", "no payload"])
def test_a_damaged_checkpoint_is_noticed_and_the_previous_one_used(tmp_path, harm):
    run = CheckpointFolder(tmp_path / "run")
    whole = engine_runs.long_run(str(run.folder), epochs=4, select=None)
    path = run.path(4)
    content = path.read_bytes()
    if harm == "no payload":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "flipped": content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]}[harm])
    with pytest.warns(UserWarning, match="epoch-0004.pt .*going back"):
        assert engine_runs.long_run(str(run.folder), epochs=4, select=None) == whole


def test_no_usable_checkpoint_starts_anew_with_a_message(tmp_path):
    run = CheckpointFolder(tmp_path / "run")
    whole = engine_runs.long_run(str(run.folder), epochs=2)
    for epoch in run.epochs():
        run.path(epoch).write_bytes(b"nonsense")
    with pytest.warns(UserWarning, match="is damaged"):
        assert engine_runs.long_run(str(run.folder), epochs=2) == whole


def test_best_and_last_are_kept_and_the_rest_is_pruned(tmp_path):
    run = CheckpointFolder(tmp_path)
    for epoch in range(8):
        run.save(epoch, {"epoch": epoch, "best_epoch": 2 if epoch >= 2 else epoch}, best=2 if epoch >= 2 else epoch)
    assert run.epochs() == [2, 6, 7] and len(list(tmp_path.glob("*.pt"))) == 3
    assert run.latest()["epoch"] == 7
    run.path(2).write_bytes(b"")   # without its best weights no state is usable
    with pytest.warns(UserWarning):
        assert run.latest() is None


def test_checkpoints_load_safely_with_plain_torch(tmp_path):
    engine_runs.long_run(str(tmp_path / "run"), epochs=1)
    state = torch.load(tmp_path / "run" / "epoch-0001.pt", weights_only=True)
    assert {"method", "optimizers", "schedule", "rng", "sampler", "history", "best"} <= set(state)
    assert "ibb.statistics.centroids" in state["method"]


def test_another_runs_folder_is_refused(tmp_path):
    folder = str(tmp_path / "run")
    engine_runs.long_run(folder, epochs=1)
    with pytest.raises(ValueError, match="belongs to another run .*lr: 0.005 then, 0.1 now"):
        engine_runs.long_run(folder, epochs=1, lr=0.1)
    data = toy()
    with pytest.raises(FileExistsError, match="resume=True"):
        fit(ibma(data), data, config=TrainingConfig(epochs=1, run_dir=folder))


def test_a_second_writer_is_turned_away(server, tmp_path):
    ready, release = server.Event(), server.Event()
    other = start(server, engine_runs.hold, str(tmp_path), ready, release)
    assert ready.wait(30)
    with pytest.raises(RuntimeError, match="another process is training in run_dir"):
        engine_runs.long_run(str(tmp_path), epochs=1)
    release.set()
    other.join(30)
    engine_runs.long_run(str(tmp_path), epochs=1)


def test_a_full_disk_costs_checkpoints_and_not_the_run(server, tmp_path):
    queue = server.Queue()
    start(server, engine_runs.full_disk, str(tmp_path), queue)
    epochs, checkpoint, messages = queue.get(timeout=60)
    assert epochs == 4 and checkpoint is None   # trained to the end; the weights stay in the method
    assert sum("checkpoint epoch-000" in m and "cannot be written" in m and "training goes on" in m for m in messages) == 2
    assert any("weights.pt" in m and "the weights are in the method" in m for m in messages)
    assert CheckpointFolder(tmp_path).latest()["epoch"] == 2
    assert not list(tmp_path.glob(".*.part"))


def test_an_unwritable_store_is_said_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    data = toy()
    with pytest.raises(OSError, match="run_dir 'run' cannot be written"):
        fit(ibma(data), data, config=TrainingConfig(epochs=1, run_dir=str(tmp_path / "file" / "run")))


def test_a_read_only_folder_is_said_before_training(tmp_path, monkeypatch):
    import os

    real = os.open   # the tests may run as root, whom permissions do not stop
    monkeypatch.setattr(os, "open", lambda path, flags, *a, **k: (_ for _ in ()).throw(OSError(30, "Read-only file system")) if str(tmp_path) in str(path) and flags & (os.O_WRONLY | os.O_RDWR) else real(path, flags, *a, **k))
    data = toy()
    with pytest.raises(OSError, match="Read-only file system.*writable disk"):
        fit(ibma(data), data, config=TrainingConfig(epochs=1, run_dir=str(tmp_path / "run")))


def test_atomic_writing_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- several processes -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("refresh", "settings"), [
    ("epoch", {"epochs": 4, "batch_size": 16, "lr": 5e-3, "select": "valid/loss"}),
    ("streaming", {"epochs": 3, "batch_size": 8, "accumulate": 2, "lr": 5e-3, "clip_norm": 1.0, "class_weights": "balanced"}),
])
def test_two_processes_are_one(server, refresh, settings):
    history, statistics, metrics = engine_runs.statistics_run(settings, refresh)
    queue, port = server.Queue(), free_port()
    for rank in range(2):
        start(server, engine_runs.member, rank, 2, port, settings, refresh, queue)
    both = dict((rank, rest) for rank, *rest in (queue.get(timeout=120) for _ in range(2)))
    for theirs, stats, measured in both.values():
        assert len(theirs) == len(history)
        for mine, other in zip(history, theirs, strict=True):
            assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)
        for name, value in statistics.items():
            tables = [np.exp(v) if name.startswith("log_") else v for v in (stats[name], value)]   # as probabilities
            np.testing.assert_allclose(*tables, rtol=0, atol=1e-6, err_msg=name)
        assert measured == pytest.approx(metrics)
    # 73 rows in batches of 16 (or 8): the last batch has one row, so one process had none


def test_a_folder_that_is_refused_stops_every_process_at_once(server, tmp_path):
    folder = str(tmp_path / "run")
    engine_runs.statistics_run({"epochs": 1, "batch_size": 32, "run_dir": folder}, "epoch")
    queue, port = server.Queue(), free_port()
    for rank in range(2):
        start(server, engine_runs.refused_member, rank, 2, port, {"epochs": 1, "batch_size": 32, "run_dir": folder}, queue)
    said = {rank: (kind, text) for rank, kind, text in (queue.get(timeout=60) for _ in range(2))}
    assert said[0][0] == "FileExistsError" and "continue it with resume=True" in said[0][1]
    assert said[1][0] == "RuntimeError" and "the first process cannot begin: FileExistsError" in said[1][1]


# ---- guards ----------------------------------------------------------------------------------------------------------------

class Planted(Method):
    """Cross entropies, and a term whose value or gradient breaks at a given call."""

    def __init__(self, task, broken, at):
        super().__init__(task, dim=8, encoders={"vector": {"hidden": 8}}, fusion="concat")
        self.broken, self.at, self.calls = broken, at, 0

    def loss(self, batch):
        out = self(batch)
        self.calls += self.training
        planted = out.fused.square().mean() * 0
        if self.calls >= self.at:
            if self.broken == "value":
                planted = planted + float("nan")
            else:
                planted = planted + (out.fused * 0).sum().abs().sqrt()   # the root's slope at 0 is infinite: value 0, gradient NaN
        return {**cross_entropies(out, batch.target, self.task), "planted": planted}


def test_a_broken_term_is_named_with_batch_and_epoch_and_a_checkpoint_from_before_exists(tmp_path):
    data = toy(96)
    method = Planted(data.task, "value", at=10)   # 3 batches an epoch: epoch 3, batch 0
    order = data.loader(32, shuffle=True, seed=0)
    ids = [[batch.id for batch in order] for _ in range(4)][3][0][:5].tolist()
    with pytest.raises(FloatingPointError, match="planted.*nan") as caught:
        fit(method, data, config=TrainingConfig(epochs=5, batch_size=32, run_dir=str(tmp_path / "run")))
    message = str(caught.value)
    assert "at epoch 3, batch 0" in message and str(ids)[1:-1] in message and "checkpoint after 3 epoch(s) is in run_dir 'run'" in message
    saved = CheckpointFolder(tmp_path / "run").latest()
    assert saved["epoch"] == 3 and all(torch.isfinite(v).all() for v in saved["method"].values())


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    data = toy(96)
    method = Planted(data.task, "gradient", at=2)
    with pytest.raises(FloatingPointError, match=r"gradient of loss terms \['planted'\] is not finite at epoch 0, batch 1 \(sample ids"):
        fit(method, data, config=TrainingConfig(epochs=1, batch_size=32))
    assert all(torch.isfinite(p).all() for p in method.parameters())


def test_a_nan_input_is_named_by_modality_and_id():
    data = toy(64)
    method = create("ce", data, seed=0, dim=8)
    method.on_fit_start = lambda batches: None
    data.inputs["b"][11, 2] = float("nan")
    with pytest.raises(FloatingPointError, match=r"modality 'b' of sample ids \[11\] is not finite at epoch 0"):
        fit(method, data, config=TrainingConfig(epochs=1))


def test_an_exploding_learning_rate_is_reported(tmp_path):
    data = toy()
    with pytest.raises(FloatingPointError, match="at epoch .* lower lr"):
        fit(ibma(data), data, config=TrainingConfig(epochs=20, lr=1e20, optimizer="sgd", batch_size=16))


def test_a_collapse_of_assignments_is_reported_once_and_a_healthy_run_is_silent():
    data = toy()
    cold = create("ibma", data, seed=0, dim=8, heads=2, loss={"temperature": 1e7})
    with pytest.warns(UserWarning, match="assignments of a, b, fused have collapsed") as caught:
        result = fit(cold, data, config=TrainingConfig(epochs=8, lr=5e-3))
    assert sum("collapsed" in str(w.message) for w in caught) == 1
    assert result.history[-1]["information/fused"] < 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(ibma(data), data, config=TrainingConfig(epochs=8, batch_size=16, lr=5e-3))
    assert result.history[-1]["information/fused"] > 0.1


def test_fifty_epochs_leave_memory_as_it_was():
    data = toy()
    method, seen = ibma(data), {}

    def look(epoch):
        if epoch in (10, 49):
            gc.collect()
            seen[epoch] = psutil.Process().memory_info().rss, sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    method.on_epoch_start = look
    fit(method, data, data, TrainingConfig(epochs=50, batch_size=16, select="valid/accuracy"))
    assert seen[49][1] == seen[10][1]                   # not one tensor more
    assert seen[49][0] - seen[10][0] < 8 * 2**20


# ---- settings --------------------------------------------------------------------------------------------------------------

def reference_fit(method, data, epochs, batch_size, lr, weight_decay=1e-5):
    """The plain loop: what `fit` with default settings must equal to the last bit."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method.on_fit_start(data.loader(512))
        optimizer = torch.optim.Adam(method.parameters(), lr=lr, weight_decay=weight_decay)
        batches = data.loader(batch_size, shuffle=True, seed=0)
        for _ in range(epochs):
            method.train()
            for batch in batches:
                optimizer.zero_grad()
                sum(method.loss(batch).values()).backward()
                optimizer.step()
            method.on_epoch_end(data.loader(512))


def test_default_settings_are_the_plain_loop_to_the_last_bit():
    data = toy()
    plain, ours = ibma(data, dropout=0.3), ibma(data, dropout=0.3)
    reference_fit(plain, data, 3, 20, 1e-3)
    fit(ours, data, config=TrainingConfig(epochs=3, batch_size=20))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


def test_global_generators_task_and_frozen_parameters_are_left_as_they_were():
    data, method = toy(), ibma(toy())
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), method.task
    fit(method, data, config=TrainingConfig(epochs=1, class_weights="balanced", lr_scale={"model.encoders.a": 0}, deterministic=True))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all() and method.task is before[2]
    assert all(p.requires_grad for p in method.model.encoders["a"].parameters()) and not torch.are_deterministic_algorithms_enabled()


def test_a_users_accelerator_survives():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    mine = Accelerator(cpu=True, mixed_precision="bf16")
    fit(ibma(toy()), toy(), config=TrainingConfig(epochs=1))
    assert mine.mixed_precision == "bf16" and AcceleratorState().mixed_precision == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)


def test_frozen_and_slow_groups():
    data, method = toy(), ibma(toy())
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    fit(method, data, config=TrainingConfig(epochs=1, batch_size=96, optimizer="sgd", lr=1e-2, weight_decay=0, lr_scale={"model.encoders.a": 0, "model.encoders.b": 0.1}))
    slow, fast = ibma(data), ibma(data)
    fit(fast, data, config=TrainingConfig(epochs=1, batch_size=96, optimizer="sgd", lr=1e-2, weight_decay=0))
    after, full = dict(method.named_parameters()), dict(fast.named_parameters())
    del slow
    for name, old in before.items():
        if name.startswith("model.encoders.a"):
            assert torch.equal(old, after[name])
        elif name.startswith("model.encoders.b"):
            torch.testing.assert_close(after[name] - old, 0.1 * (full[name] - old), rtol=1e-2, atol=1e-7)


def test_class_weights_reach_every_cross_entropy():
    data = toy(90)
    method = create("ce", data, seed=0, dim=8)
    seen = {}
    method.after_step = lambda batch: seen.update({name: value.item() for name, value in method.loss(batch).items()})
    fit(method, data, config=TrainingConfig(epochs=1, batch_size=90, lr=1e-9, class_weights=(0.0, 0.0, 1.0)))
    rows = data[data.target == 2]
    alone = {name: value.item() / 3 for name, value in method.train().loss(rows).items()}
    assert seen == pytest.approx(alone, rel=1e-4)


def test_clipping_bounds_the_step():
    data = toy()
    moved = {}
    for clip in (None, 1e-3):
        method = ibma(data)
        before = torch.nn.utils.parameters_to_vector(method.parameters()).detach().clone()
        fit(method, data, config=TrainingConfig(epochs=1, batch_size=96, optimizer="sgd", lr=1.0, weight_decay=0, clip_norm=clip))
        moved[clip] = (torch.nn.utils.parameters_to_vector(method.parameters()) - before).norm().item()
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert moved[None] > 0.1


class WithCritic(Method):
    """A critic with its own optimiser, a running count, and a warm-up: every hook at once."""

    def __init__(self, task):
        super().__init__(task, dim=8, encoders={"vector": {"hidden": 8}}, fusion="concat")
        self.critic = torch.nn.Linear(8, 1)
        self.register_buffer("steps", torch.tensor(0))
        self.phases = []

    def loss(self, batch):
        return cross_entropies(self(batch), batch.target, self.task)

    def optimizers(self, config):
        return [torch.optim.Adam(self.critic.parameters(), lr=10 * config.lr)]

    def learning_loss(self, batch):
        return (self.critic(self(batch).fused.detach()) - 1).square().mean()

    def after_step(self, batch):
        self.steps += 1

    def on_epoch_start(self, epoch):
        self.phases.append(epoch)

    def selectable(self, epoch):
        return epoch >= 2


def test_every_hook_is_called_and_survives_an_interruption(tmp_path):
    data = toy()

    def run(folder=None, epochs=5):
        torch.manual_seed(0)
        method = WithCritic(data.task)
        config = TrainingConfig(epochs=epochs, batch_size=32, lr=1e-2, run_dir=folder, resume=folder is not None, select="valid/accuracy")
        return method, fit(method, data, data, config)

    method, result = run()
    assert method.phases == list(range(5)) and result.best_epoch >= 2
    batch = data[:]
    assert method.learning_loss(batch) < 0.5 * WithCritic(data.task).learning_loss(batch).detach() + 0.1
    run(str(tmp_path), epochs=3)
    again, again_result = run(str(tmp_path))
    assert again.phases == [3, 4] and result.history == again_result.history
    assert all(torch.equal(a, b) for a, b in zip(method.state_dict().values(), again.state_dict().values(), strict=True))


def test_tensorboard_log(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data = toy()
    result = fit(ibma(data), data, data, TrainingConfig(epochs=3, log_dir=str(tmp_path)))
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [e.value for e in events.Scalars("loss/ibb")] == pytest.approx([row["ibb"] for row in result.history])


def test_progress_is_quiet_without_a_terminal(capfd):
    fit(ibma(toy()), toy(), config=TrainingConfig(epochs=1, progress=True))
    assert capfd.readouterr() == ("", "")


def test_train_epoch_works_alone():
    data = toy()
    method = ibma(data)
    method.on_fit_start(data.loader(64))
    terms = train_epoch(method, data.loader(32, shuffle=True), torch.optim.Adam(method.parameters()))
    assert set(terms) == {"ce/a", "ce/b", "ce/fused", "ibb"}


@pytest.mark.slow
def test_a_compiled_model_trains_alike():
    data = toy()
    histories = [fit(ibma(data), data, config=TrainingConfig(epochs=2, batch_size=32, compile=c)).history for c in (False, True)]
    for plain, compiled in zip(*histories, strict=True):
        assert plain == pytest.approx(compiled, rel=1e-3, abs=1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{}, {"mixed_precision": "bf16"}, {"mixed_precision": "fp16"}, {"deterministic": True}])
def test_gpu_and_cpu_agree(settings, tmp_path):
    data = toy(300)
    train, valid = data.subset(range(240)), data.subset(range(240, 300))
    config = {"epochs": 4, "batch_size": 32, "lr": 3e-3}
    cpu = fit(ibma(data), train, valid, TrainingConfig(device="cpu", **config))
    method = ibma(data)
    gpu = fit(method, train, valid, TrainingConfig(device="cuda", **config, **settings))
    tolerance = 0.05 if "mixed_precision" in settings else 1e-3
    for a, b in zip(cpu.history, gpu.history, strict=True):
        assert {k: v for k, v in a.items() if k[:2] in ("ce", "ib")} == pytest.approx({k: v for k, v in b.items() if k[:2] in ("ce", "ib")}, rel=tolerance, abs=tolerance)
    assert abs(evaluate(method, valid)["accuracy"] - cpu.metrics["valid/accuracy"]) <= 2 / 60
    if settings.get("deterministic"):
        again = ibma(data)
        fit(again, train, valid, TrainingConfig(device="cuda", **config, **settings))
        assert all(torch.equal(a, b) for a, b in zip(method.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_checkpoint_option_still_writes_plain_weights(tmp_path):
    data, path = toy(), Path(tmp_path / "deep" / "weights.pt")
    method = ibma(data)
    result = fit(method, data, config=TrainingConfig(epochs=1, checkpoint=str(path)))
    assert result.checkpoint == str(path)
    other = ibma(data)
    other.load_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(other.model.fused_head.weight, method.model.fused_head.weight)


# ---- frozen encoders -------------------------------------------------------------------------------------------------------

class Noisy(Method):
    """A frozen encoder with dropout and batch statistics: only evaluation mode makes it a fixed map."""

    def __init__(self, task):
        super().__init__(task, dim=8, encoders={"vector": {"hidden": 8, "dropout": 0.5}})
        name = next(iter(self.model.encoders))
        self.model.encoders[name].net.append(torch.nn.BatchNorm1d(8))
        self.frozen = self.model.encoders[name]

    def loss(self, batch):
        return cross_entropies(self(batch), batch.target, self.task, mask=batch.mask)


def frozen_run(cache, accumulate=1):
    data = toy(96, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method = Noisy(data.task)
    calls, before = [], copy.deepcopy(method.frozen.state_dict())
    method.frozen.register_forward_hook(lambda module, args, out: calls.append((len(out), module.training)))
    prefix = f"model.encoders.{method.model.modalities[0]}"
    config = TrainingConfig(epochs=3, batch_size=32, lr_scale={prefix: 0}, cache_features=cache, accumulate=accumulate)
    result = fit(method, data.subset(range(64)), data.subset(range(64, 96)), config)
    same = all(torch.equal(before[k], v) for k, v in method.frozen.state_dict().items() if "scaler" not in k)
    return method, result, calls, same


def test_cached_features_of_a_frozen_encoder_change_nothing_but_the_number_of_passes():
    cached, one, few, untouched = frozen_run(True)
    slow, two, many, _ = frozen_run(False)
    assert untouched
    for now, then in zip([*one.history, one.metrics], [*two.history, two.metrics], strict=True):
        assert now == pytest.approx(then, abs=1e-5)  # batches of another size round differently
    for name, value in cached.state_dict().items():
        torch.testing.assert_close(value, slow.state_dict()[name], atol=1e-4, rtol=1e-4)
    assert sum(n for n, _ in few) == 64 + 32  # every sample once
    assert sum(n for n, _ in many) == 3 * (64 + 32) + 64
    assert not any(training for _, training in few + many)


def test_a_resumed_run_caches_what_the_run_it_continues_has_frozen(tmp_path):
    data = toy(64, seed=1)
    prefix = f"model.encoders.{next(iter(data.task.modalities))}"

    def go(epochs, seed, **options):
        method = create("ce", data, seed=seed, dim=8, encoders={"vector": {"hidden": 8}})
        return method, fit(method, data, config=TrainingConfig(epochs=epochs, lr_scale={prefix: 0}, **options))

    whole, expected = go(4, seed=0)
    go(2, seed=0, run_dir=str(tmp_path / "run"))
    resumed, result = go(4, seed=7, run_dir=str(tmp_path / "run"), resume=True)  # other initial weights: those of the run count
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert result.history == expected.history


def test_data_given_to_fit_keep_no_cache():
    data = toy(64, seed=1)
    prefix = f"model.encoders.{next(iter(data.task.modalities))}"
    fit(create("ce", data, seed=0, dim=8), data, config=TrainingConfig(epochs=1, lr_scale={prefix: 0}))
    assert data.features == {} and data[:3].features == {}


# ---- other kinds of tasks --------------------------------------------------------------------------------------------------

def test_measures_of_a_regression_and_of_one_class_equal_their_definitions():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    y = x[:, 0].clone()
    y[3] = float("nan")
    data = MultimodalData.from_arrays({"a": x, "b": x}, y, kind="regression", bins=(-0.5, 0.5))
    method = create("ce", data, seed=0, dim=8)
    p, known = method.predict(data[:].inputs), ~y.isnan()
    found = evaluate(method, data, batch_size=7)
    assert found["mae"] == pytest.approx(float((p - y)[known].abs().mean()), rel=1e-6)
    bins = [int(v > -0.5) + int(v > 0.5) for v in p.tolist()]
    truth = [int(v > -0.5) + int(v > 0.5) for v in y.tolist()]
    assert found["accuracy"] == pytest.approx(np.mean([a == b for a, b, k in zip(bins, truth, known.tolist(), strict=True) if k]))
    result = fit(method, data, data, TrainingConfig(epochs=8, lr=1e-2, select="valid/mae"))
    maes = [row["valid/mae"] for row in result.history]
    assert result.best_epoch == int(np.argmin(maes)) and min(maes) < 0.9 * maes[0]

    target = torch.tensor([0, -1, 1] * 10)
    one = MultimodalData.from_arrays({"a": x[:30], "b": x[:30]}, target, kind="one_class", num_classes=3)
    method = create("ce", one, seed=0, dim=8)
    method.on_fit_start([one[:]])
    assert evaluate(method, one) == pytest.approx({"distance": float(method.predict(one[:].inputs)[target != 1].mean())})


def test_a_collapsed_hypersphere_is_reported_and_a_working_one_is_not():
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    data = MultimodalData.from_arrays({"a": x, "b": x}, torch.zeros(60, dtype=torch.int64), kind="one_class", num_classes=3)

    def warned(collapse):
        method = create("ce", data, seed=0, dim=8)
        if collapse:
            method.after_step = lambda batch: [p.data.zero_() for p in method.parameters()]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(method, data, config=TrainingConfig(epochs=6, lr=1e-4))
        return ["one distance from the centre" in str(w.message) for w in caught]

    assert sum(warned(True)) == 1 and not any(warned(False))


def test_a_dead_output_is_reported_before_all_of_them_die():
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    data = MultimodalData.from_arrays({"a": x, "b": x}, torch.zeros(60, dtype=torch.int64), kind="one_class", num_classes=3)

    def dead(rows):
        method = create("ce", data, seed=0, dim=8)
        method.after_step = lambda batch: method.model.fused_head.map.weight.data.index_fill_(0, torch.tensor(rows, dtype=torch.int64), 0.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(method, data, config=TrainingConfig(epochs=7, lr=1e-4))
        return [str(w.message) for w in caught if "outputs of the anomaly score" in str(w.message)]

    assert not dead([]) and [message.split(": ")[1][:4] for message in dead([1, 2, 5, 7])] == ["12 %"]  # 4 of 32


def test_class_weights_are_refused_where_there_are_no_classes():
    x = torch.randn(12, 3)
    data = MultimodalData.from_arrays({"a": x}, x[:, 0], kind="regression", bins=(0,))
    with pytest.raises(ValueError, match="a regression task has no classes to weigh"):
        fit(create("ce", data, dim=8), data, config=TrainingConfig(epochs=1, class_weights="balanced"))
