"""Small training runs for test_engine.py: top-level functions, so that other processes can import them."""
import hashlib
import json
import os
import resource
import signal
import threading
import time
import warnings

import torch

from ibma.data import MultimodalData
from ibma.methods import create
from ibma.training import TrainingConfig, fit


def toy(n=96, seed=0, classes=3):
    """Two noisy vector views of three classes."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centers = torch.randn(classes, 6, generator=draw)
    views = {name: (centers[y] + 0.7 * torch.randn(n, 6, generator=draw)).numpy() for name in ("a", "b")}
    return MultimodalData.from_arrays(views, y)


def ibma(data, dropout=0.0, refresh="epoch", **options):
    return create("ibma", data, seed=0, dim=8, encoders={"vector": {"hidden": 16, "dropout": dropout}}, loss={"refresh": refresh}, heads=2, **options)


def digest(method, result):
    """One string for the final weights, statistics, metrics and history: equal only where every bit is."""
    h = hashlib.sha256()
    for name, value in sorted(method.state_dict().items()):
        h.update(name.encode() + value.numpy().tobytes())
    return h.hexdigest() + json.dumps([result.metrics, result.history, result.best_epoch])


def long_run(folder=None, epochs=8, **settings):
    data = toy()
    method = ibma(data, dropout=0.2)   # noise: the global generator counts too
    settings = {"lr": 5e-3, "scheduler": "cosine", "warmup_epochs": 1, "select": "valid/accuracy", **settings}
    config = TrainingConfig(epochs=epochs, batch_size=16, run_dir=folder, resume=folder is not None, **settings)
    return digest(method, fit(method, data.subset(range(72)), data.subset(range(72, 96)), config))


def killable(folder, queue=None, delay=None, beat=None):
    """A run that a timer kills; without a delay it finishes and reports."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if delay is not None:
        threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
    outcome = long_run(folder)
    if queue is not None:
        queue.put(outcome)


def hold(folder, ready, release):
    """Holds a run folder until told to let go."""
    from ibma.checkpoints import CheckpointFolder

    with CheckpointFolder(folder).lock():
        ready.set()
        release.wait(30)


def member(rank, world, port, settings, refresh, queue):
    """One process of a run on several, as `accelerate launch` would start it."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    try:
        queue.put((rank, *statistics_run(settings, refresh)))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def refused_member(rank, world, port, settings, queue):
    """One process of a run that may not begin."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    try:
        statistics_run(settings, "epoch")
        queue.put((rank, "no error", ""))
    except Exception as error:
        queue.put((rank, type(error).__name__, str(error)))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def statistics_run(settings, refresh):
    data, settings = toy(n=97), dict(settings)
    method, train = ibma(data, refresh=refresh), data.subset(range(73))
    if keep := settings.pop("hidden", 0):   # so many labels, the others unlabelled, even numbers of both
        train = data.subset(range(72))
        train.target = train.target.masked_fill(torch.arange(72) >= keep, -1)
    result = fit(method, train, data.subset(range(73, 97)), TrainingConfig(**settings))
    statistics = {name: value.double().numpy() for name, value in method.ibb.statistics.state_dict().items()}
    return result.history, statistics, result.metrics


def full_disk(folder, queue):
    """A run on a disk that takes the first checkpoints and then no more than a few bytes per file."""
    torch.set_num_threads(1)
    data = toy()
    method = ibma(data)

    def fill(epoch):
        if epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    method.on_epoch_start = fill
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit(method, data, config=TrainingConfig(epochs=4, batch_size=32, run_dir=folder, checkpoint=f"{folder}/weights.pt"))
    queue.put((len(result.history), result.checkpoint, [str(w.message) for w in caught]))
