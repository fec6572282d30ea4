"""Hooks for foreign loops: found losses, exact passes, both callbacks, statistics of several processes."""
import importlib.util
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from ibma import integrations
from ibma.integrations import lightning_callback, losses_of, observe_all, refresh_all, spare_statistics, trainer_callback
from ibma.objective import IMPATIENT, IBBLoss


class Pair(nn.Module):
    def __init__(self, refresh="streaming", losses=1):
        super().__init__()
        self.left, self.right, self.dropout = nn.Linear(4, 6), nn.Linear(4, 6), nn.Dropout(0.5)
        self.levels = nn.ModuleList(IBBLoss(3, ("left", "right"), dim=6, refresh=refresh) for _ in range(losses))

    def represent(self, batch):
        x, y = batch
        z = {"left": self.dropout(self.left(x)), "right": self.dropout(self.right(x))}
        return z, z["left"] + z["right"], y

    def forward(self, x, y):
        return sum(loss(*self.represent((x, y))) for loss in self.levels)


def batches(n=24, size=8, seed=0):
    x, y = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)), torch.arange(n) % 3
    return list(zip(x.split(size), y.split(size), strict=True))


def test_losses_are_found_and_a_model_without_one_is_refused():
    assert list(losses_of(Pair(losses=2))) == ["levels.0", "levels.1"]
    assert list(losses_of(IBBLoss(3, ("a", "b"), 4))) == [""]
    with pytest.raises(ValueError, match="Linear holds no IBBLoss"):
        losses_of(nn.Linear(2, 2))


def test_the_pass_is_in_evaluation_mode_and_equals_observing_by_hand():
    torch.manual_seed(0)
    model = Pair("epoch", losses=2)
    model.left.eval()   # modes are put back one by one
    by_hand = IBBLoss(3, ("left", "right"), dim=6, refresh="epoch")
    found = refresh_all(model, batches(), model.represent)
    assert model.training and not model.left.training and model.dropout.training
    model.eval()
    for batch in batches():
        by_hand.observe(*model.represent(batch))
    by_hand.refresh()
    for name, value in by_hand.state_dict().items():
        assert torch.equal(value, model.levels[1].state_dict()[name]), name
    assert set(found) == {f"levels.{i}/{s}" for i in (0, 1) for s in ("left", "right", "fused")}


def test_modes_are_put_back_after_an_error():
    model = Pair("epoch")
    with pytest.raises(ZeroDivisionError):
        observe_all(model, batches(), lambda batch: 1 / 0)
    assert model.training and model.dropout.training


def test_streaming_needs_no_pass_and_epoch_says_that_it_does():
    streaming, exact = Pair(), Pair("epoch")
    with pytest.raises(RuntimeError, match="no labelled sample"):
        refresh_all(streaming)
    for x, y in batches():
        streaming(x, y)
    assert refresh_all(streaming).keys() == {"levels.0/left", "levels.0/right", "levels.0/fused"}
    with pytest.raises(ValueError, match=r"levels\.0 has refresh='epoch'"):
        refresh_all(exact)


def test_the_loss_warns_once_when_it_is_never_refreshed():
    model = Pair()
    (x, y), = batches(6, 6)
    with pytest.warns(UserWarning, match="without a refresh") as found:
        for _ in range(IMPATIENT + 5):
            model(x, y)
    assert len(found) == 1
    model.levels[0].refresh()
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("error")   # centroids are there: an epoch may be as long as it likes
        for _ in range(IMPATIENT + 5):
            model(x, y)


def test_evaluation_mode_is_named_as_the_cause():
    model = Pair().eval()
    (x, y), = batches(6, 6)
    for _ in range(3):
        model(x, y)
    with pytest.raises(RuntimeError, match="3 steps were made in evaluation mode"):
        refresh_all(model)
    with torch.no_grad():   # validation: no step
        fresh = Pair().eval()
        fresh(x, y)
    with pytest.raises(RuntimeError) as error:
        refresh_all(fresh)
    assert "evaluation mode" not in str(error.value)


def test_a_loss_on_another_device_is_refused():
    loss = IBBLoss(3, ("a", "b"), 4).to("meta")
    z = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="statistics on meta, a on cpu"):
        loss({"a": z, "b": z}, z, torch.arange(3))


# ---------------------------------------------------------------- several processes

def _process(rank, inside, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Pair().eval()
    model.levels.train()
    wrapped = nn.parallel.DistributedDataParallel(spare_statistics(model) if inside == "spared" else model)
    for x, y in batches(32)[rank::2]:   # as many for each, else they wait for ever
        wrapped(x, y).backward()
    refresh_all(model)
    torch.save(model.levels[0].statistics.centroids, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["spared", "overwritten"])
def test_statistics_of_two_processes(tmp_path, inside):
    """Spared, two processes have the centroids of one that saw all; not spared, they have not: that is what the helper is for."""
    mp.spawn(_process, (inside, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.manual_seed(0)
    alone = Pair().eval()
    alone.levels.train()
    for x, y in batches(32):
        alone(x, y)
    refresh_all(alone)
    whole = alone.levels[0].statistics.centroids
    assert torch.equal(a, b)
    assert torch.allclose(a, whole, atol=1e-6) == (inside == "spared")


def test_spared_buffers_are_those_of_the_losses_only():
    model = nn.Sequential(nn.BatchNorm1d(3), Pair(losses=2))
    model._ddp_params_and_buffers_to_ignore = ["mine"]
    names = set(spare_statistics(model)._ddp_params_and_buffers_to_ignore)
    assert names == {"mine"} | {name for name, _ in model.named_buffers() if "levels" in name}
    learnable = IBBLoss(3, ("a", "b"), 4, prototypes="learnable")   # prototypes are trained, hence shared
    assert "statistics.centroids" not in spare_statistics(learnable)._ddp_params_and_buffers_to_ignore


# ---------------------------------------------------------------- the two libraries

def test_the_module_imports_without_either(monkeypatch):
    for name in ("pytorch_lightning", "lightning", "lightning.pytorch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    importlib.reload(integrations)
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    with pytest.raises(ImportError, match="pip install lightning"):
        integrations.lightning_callback()
    with pytest.raises(ImportError, match="transformers"):
        integrations.trainer_callback()


def test_lightning():
    if importlib.util.find_spec("pytorch_lightning") is None:
        pytest.skip("pytorch_lightning is not installed")
    from ibma.encoders import declare_torchvision_operators
    declare_torchvision_operators()
    import pytorch_lightning as pl

    class Module(Pair, pl.LightningModule):
        def training_step(self, batch, _):
            return self(*batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    def fitted(refresh, **options):
        torch.manual_seed(0)
        module = Module(refresh)
        module.dropout.p = 0.0
        trainer = pl.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                             callbacks=[lightning_callback(**{name: getattr(module, value) for name, value in options.items()})])
        trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
        return module, trainer
    streaming, trainer = fitted("streaming")
    exact, _ = fitted("epoch", represent="represent")   # weights stand still: both see the same
    torch.testing.assert_close(streaming.levels[0].state_dict(), exact.levels[0].state_dict())
    assert trainer.callback_metrics["levels.0/fused"].item() == pytest.approx(streaming.levels[0].information["fused"])
    assert streaming.levels[0].statistics.started.all()


def test_transformers(tmp_path):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    from ibma.encoders import transformers_library
    transformers = transformers_library()

    class Model(Pair):
        def forward(self, x, labels):
            return {"loss": super().forward(x, labels)}

    torch.manual_seed(0)
    model, rows = Model(), [{"x": x, "labels": y} for xs, ys in batches() for x, y in zip(xs, ys, strict=True)]
    settings = transformers.TrainingArguments(output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=8, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no")
    trainer = transformers.Trainer(model, settings, train_dataset=rows, callbacks=[trainer_callback()])
    trainer.train()
    logged = [row for row in trainer.state.log_history if "levels.0/fused" in row]
    assert len(logged) == 2 and logged[-1]["levels.0/fused"] == pytest.approx(model.levels[0].information["fused"])
    torch.testing.assert_close(model.levels[0].statistics.log_prior.exp(), torch.full((3,), 1 / 3), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="Linear holds no IBBLoss"):
        transformers.Trainer(nn.Linear(2, 2), settings, train_dataset=rows, callbacks=[trainer_callback()]).train()
