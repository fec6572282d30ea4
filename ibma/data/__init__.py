"""Multimodal data: `MultimodalData.from_arrays` for your own arrays, `load(name)` for the sets in `DATASETS`.

Adding a set is one line in `DATASETS`: its name, where its loader is, the kind of data, and a summary. Loaders are
imported when they are first used, so importing this package costs what importing PyTorch costs.
"""
import difflib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .core import DATA_KINDS, Batch, Modality, MultimodalData, Task

__all__ = ["DATASETS", "DATA_KINDS", "Batch", "DatasetInfo", "Modality", "MultimodalData", "Task", "load"]


@dataclass(frozen=True)
class DatasetInfo:
    """One known data set: what it is, and where the function that loads it can be found."""

    loader: str                                  # "module:function", returns MultimodalData
    data_kind: str                               # one of DATA_KINDS
    summary: str                                 # one line
    fixed: dict = field(default_factory=dict)    # options of the loader that make it this set: not the user's to change

    def function(self) -> Callable[..., MultimodalData]:
        """The loader, imported now."""
        module, name = self.loader.split(":")
        return getattr(importlib.import_module(module), name)

    def options(self) -> tuple[str, ...]:
        """Names of the options that `load` takes for this set."""
        parameters = inspect.signature(self.function()).parameters
        return tuple(name for name in parameters if name != "root" and name not in self.fixed)


DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo("ibma.data.digits:digits", "open", "1,797 handwritten digits, left and right halves as two images"),
    "sim-1": DatasetInfo("ibma.data.simulated:simulate", "simulated", "two Gaussian views, the first dominates (OMIB)", {"case": "sim-1"}),
    "sim-2": DatasetInfo("ibma.data.simulated:simulate", "simulated", "two Gaussian views, the second dominates (OMIB)", {"case": "sim-2"}),
    "sim-3": DatasetInfo("ibma.data.simulated:simulate", "simulated", "two Gaussian views, equally relevant (OMIB)", {"case": "sim-3"}),
}


def load(name: str, root: str | Path | None = None, **options) -> MultimodalData:
    """Load a data set by its name in `DATASETS`.

    `root` is the folder of the raw files, for the sets that read files; the others have no use for it. `options` go to
    the set's loader, for instance `load("sim-1", n=2000, seed=3)`; `DATASETS[name].options()` lists them.
    Raises KeyError for an unknown name, TypeError for an option that the set does not have.
    """
    if name not in DATASETS:
        close = difflib.get_close_matches(str(name).lower(), DATASETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise KeyError(f"unknown data set {name!r}: {hint}known are {', '.join(DATASETS)}")
    info = DATASETS[name]
    known = info.options()
    unknown = [option for option in options if option not in known]
    if unknown:
        raise TypeError(f"data set {name!r} has no option {', '.join(map(repr, unknown))}: it takes {', '.join(known) or 'none'}")
    function = info.function()
    if "root" in inspect.signature(function).parameters:
        options["root"] = root
    return function(**info.fixed, **options)
