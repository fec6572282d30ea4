"""What stands behind `ibma train | predict | evaluate | explain | compare | methods`: plain functions that return plain values.

`ibma.cli` parses and prints. Heavy libraries are imported where they are used.
"""
from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path

__all__ = ["Stopped", "compare", "evaluate", "explain", "methods", "options_of", "predict", "read_arrays", "read_data", "train"]

PARTS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid", "test": "test"}   # names of parts in a column of splits
MAIN = ("accuracy", "f1/macro", "f1/weighted", "auc", "mauc", "mae", "acc7", "acc2/nonzero", "correlation", "auc/anomaly", "f1/anomaly")   # shown, where they exist
COLUMNS = ("target", "groups", "split")   # what a model file remembers of the names in a file of arrays


class Stopped(KeyboardInterrupt):
    """Ctrl-C; the message says what is kept."""


# ---------------------------------------------------------------- arrays in files

def _npz(path):
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except ValueError as error:
        hint = "; it holds Python objects: save arrays of numbers or of text (dtype U)" if "pickle" in str(error).lower() else ""
        raise ValueError(f"{path.name} cannot be read as .npz{hint or f' ({error})'}") from error
    except Exception as error:   # zipfile.BadZipFile, EOFError, zlib.error: a damaged file
        raise ValueError(f"{path.name} cannot be read as .npz ({type(error).__name__}: {error})") from error


def _parquet(path):
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f'{path.name}: Parquet files need pyarrow: pip install "ibma[media]"') from error
    try:
        table = parquet.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path.name} cannot be read as Parquet ({error})") from error
    return {name: _column(name, table.column(name)) for name in table.column_names if not name.startswith("__index_level_")}


def _column(name, column):
    """A column as (array, present): numbers, nested lists of one shape, or texts; nulls are absent."""
    import numpy as np

    rows = column.to_pylist()
    present = np.array([row is not None for row in rows])
    known = [row for row in rows if row is not None]
    if not known or isinstance(known[0], (str, bytes)):
        return np.array(rows, dtype=object), present
    filling = np.zeros_like(np.asarray(known[0], dtype=float))
    try:
        return np.stack([filling if row is None else np.asarray(row) for row in rows]), present
    except ValueError as error:
        raise ValueError(f"column {name!r} holds rows of different shapes ({error}): pad them to one") from error


def _labels(values, kind):
    """Targets as `MultimodalData` takes them: -1 (or NaN) where there is none. Returns them and the names of the classes, where they are texts."""
    import numpy as np

    if values.dtype == object:   # texts, some of them null
        known = sorted({str(value) for value in values if value is not None})
        index = {name: i for i, name in enumerate(known)}
        return np.array([-1 if value is None else index[str(value)] for value in values]), known
    if values.dtype.kind == "f" and values.ndim == 1 and kind in (None, "single_label", "one_class"):
        whole = np.where(np.isnan(values), -1, values)
        if (whole != np.round(whole)).any():
            raise ValueError("the target holds fractions: for a regression pass --task regression and --bins")
        return whole.astype(np.int64), None
    return values, None


def read_arrays(path, *, target="y", groups="groups", split="split", modalities=None, kind=None, bins=None, kinds=None, task=None):
    """Arrays of an .npz file, or columns of a Parquet file, as `MultimodalData`.

    Every array but `target`, `groups`, `split` and `mask_<modality>`, `lengths_<modality>` is a modality; `modalities` chooses some of them.
    A null of a Parquet column is a missing modality, and one of the target an unlabelled sample, as -1 is. With a `task` (that of a trained
    method) the target may be missing, and a modality that is not in the file is missing from every sample.
    Raises FileNotFoundError, ValueError and TypeError that name the column and what to do.
    """
    import numpy as np

    from .data import MultimodalData

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".parquet", ".pq"):
        raise ValueError(f"{path.name}: arrays are read from .npz and .parquet files, data sets by their name (ibma data list)")
    found = _npz(path) if suffix == ".npz" else _parquet(path)
    columns = {name: value if isinstance(value, tuple) else (value, None) for name, value in found.items()}
    if target not in columns and task is None:
        raise ValueError(f"{path.name} has no {target!r} for the target: there are {', '.join(columns)}; name it with --target")
    extra = {name for name in (target, groups, split) if name in columns}
    extra |= {name for name in columns for prefix in ("mask_", "lengths_") if name.removeprefix(prefix) in columns and name.startswith(prefix)}
    chosen = list(modalities or ([name for name in task.modalities if name in columns] if task else [name for name in columns if name not in extra]))
    unknown = [name for name in chosen if name not in columns]
    if unknown or not chosen:
        wanted = f"no {', '.join(map(repr, unknown))}" if unknown else f"none of the modalities {', '.join(task.modalities)}" if task else "no array of a modality"
        raise ValueError(f"{path.name} has {wanted}: there are {', '.join(columns)}")
    for name in chosen:
        if columns[name][0].dtype.kind in "OUS":
            raise TypeError(f"{name!r} of {path.name} holds text, no numbers: choose the modalities with --modality, or turn texts into token numbers first")
    inputs, mask = {name: columns[name][0] for name in chosen}, {}
    for name in chosen:
        present = columns[f"mask_{name}"][0] if f"mask_{name}" in columns else columns[name][1]
        if present is not None:
            mask[name] = np.asarray(present).astype(bool)
    if task is not None:
        n = len(inputs[chosen[0]])
        for name, modality in task.modalities.items():
            if name not in inputs:
                print(f"ibma: {path.name} has no {name!r}: taken as missing from every sample", file=sys.stderr)
                inputs[name], mask[name] = np.zeros((n, *modality.shape), np.int64 if modality.kind == "text" else np.float32), np.zeros(n, bool)
        inputs = {name: inputs[name] for name in task.modalities}
    y, names = (None, None) if target not in columns else _labels(columns[target][0], task.kind if task else kind)
    if task is not None and names is not None and y is not None:
        y = _by_name(y, names, task, path.name)
    options = {"name": path.stem, "mask": mask or None, "groups": columns[groups][0] if groups in columns else None}
    lengths = {name: columns[f"lengths_{name}"][0].astype(np.int64) for name in chosen if f"lengths_{name}" in columns}
    options |= {"lengths": lengths or None, "splits": _splits(columns[split][0], split) if split in columns else None}
    if task is None:
        options |= {"kind": kind, "bins": bins, "kinds": kinds, "class_names": names}
    return MultimodalData.from_arrays(inputs, y, task=task, **options)


def _by_name(y, names, task, where):
    import numpy as np

    unknown = [name for name in names if name not in (task.class_names or ())]
    if unknown:
        raise ValueError(f"{where}: {unknown[0]!r} is no class of this model; there are {', '.join(task.class_names or ('numbers only',))}")
    index = [task.class_names.index(name) for name in names]
    return np.array([-1 if label < 0 else index[label] for label in y])


def _splits(values, name):
    import numpy as np

    values = np.asarray(["" if value is None else str(value) for value in values])
    unknown = sorted({value for value in values if value and value not in PARTS})
    if unknown:
        raise ValueError(f"the column {name!r} holds {str(unknown[0])!r}: parts are train, valid and test (empty: drawn)")
    return {part: np.flatnonzero([PARTS.get(value) == part for value in values]) for part in dict.fromkeys(PARTS.values()) if any(PARTS.get(v) == part for v in values)}


def _is_file(source) -> bool:
    return str(source).lower().endswith((".npz", ".parquet", ".pq")) or os.sep in str(source) or Path(source).is_file()


def read_data(source, *, root=None, options=None, task=None, **reading):
    """`MultimodalData` of a file of arrays or of a set by its name in DATASETS (prepared, or built in). Raises what the readers raise."""
    from . import data

    if _is_file(source):
        if options:
            raise ValueError(f"--data-option is for sets with a name, {source} is a file")
        return read_arrays(source, task=task, **{key: value for key, value in reading.items() if value is not None})
    if source not in data.DATASETS:
        raise ValueError(f"no file {str(source)!r}, and {data.unknown(source)}")
    found = data.load(source, root, **(options or {}))
    if reading.get("modalities"):
        found = found.select(list(reading["modalities"]))
    if task is not None:
        missing = [name for name in task.modalities if name not in found.task.modalities]
        if missing:
            raise ValueError(f"{source} has no modality {', '.join(map(repr, missing))} that the model needs: it has {', '.join(found.task.modalities)}")
        found = found.select(list(task.modalities))
        have, want = found.task, task
        if have.modalities != want.modalities or (have.kind, have.num_classes) != (want.kind, want.num_classes):
            raise ValueError(f"{source} ({have.kind}, {have.num_classes} classes, {have.modalities}) does not fit the model ({want.kind}, {want.num_classes} classes, {want.modalities})")
    return found


def _fingerprints(data) -> dict:
    """Hashes by which data are known again: of the inputs that lie in memory (else of the set's name), and of what decides the parts."""
    from torch import Tensor

    inputs, rest = hashlib.sha256(str(len(data)).encode()), hashlib.sha256()
    for name, value in data.inputs.items():
        inputs.update(value.contiguous().numpy().tobytes() if isinstance(value, Tensor) else f"{data.name} {name}".encode())
    for value in (data.target, data.groups, *(rows for _, rows in sorted((data.splits or {}).items()))):
        rest.update(b"none" if value is None else value.contiguous().numpy().tobytes())
    return {"inputs": inputs.hexdigest()[:16], "parts": rest.hexdigest()[:16]}


def _parts(data, valid, test, seed):
    """Train, valid and test; a share of 0 leaves a part empty."""
    import torch

    data = copy.copy(data)
    empty = {name: torch.empty(0, dtype=torch.int64) for name, share in (("valid", valid), ("test", test)) if share == 0 and name not in (data.splits or {})}
    data.splits = {**(data.splits or {}), **empty} or None
    return data.split(valid, test, seed)


# ---------------------------------------------------------------- train

def options_of(name, options):
    """What `create` gets for --option NAME=VALUE; dotted names fall into place: encoders.image.depth=2."""
    out = {}
    for key, value in options.items():
        *path, last = key.split(".")
        place = functools.reduce(lambda found, step: found.setdefault(step, {}), path, out)
        if not isinstance(place, dict) or last in place:
            raise ValueError(f"--option {key} contradicts another --option")
        place[last] = value
    return out


def _config(**settings):
    from .training import TrainingConfig

    known = {field.name for field in fields(TrainingConfig)}
    wrong = [name for name in settings if name not in known]
    if wrong:
        from .runs import _close
        raise ValueError(f"--set {wrong[0]}: no such setting of training{_close(wrong[0], known)}")
    return TrainingConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})


def _writable(path: Path, what: str) -> None:
    """Raise OSError before the work rather than after it."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{path.name}.{os.getpid()}.probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(f"{what} cannot be written to {str(folder)!r} ({error.strerror or error}): choose a folder on a writable disk") from error


def train(source, out, *, method="ibma", options=None, config=None, valid=0.2, test=0.2, split_seed=0, run_dir=None, resume=False, overwrite=False,
          root=None, data_options=None, **reading):
    """Train a method on arrays or a named set, and write one model file. Returns a summary of plain values.

    Checkpoints go to `run_dir` (by default a folder beside the model file, which is removed at the end): the same call with resume=True goes on.
    Raises Stopped at Ctrl-C, FileExistsError where the model or an unfinished run is there already.
    """
    from .checkpoints import CheckpointFolder
    from .methods import create
    from .model_files import save_model
    from .training import LOWER_IS_BETTER, fit

    out, config = Path(out), dict(config or {})
    folder = Path(run_dir) if run_dir else out.with_name(out.name + ".run")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{str(out)!r} is there already: --overwrite replaces it, --out writes another")
    begun = bool(CheckpointFolder(folder).epochs())
    if begun and overwrite and not resume:
        shutil.rmtree(folder)
    elif begun and not resume:
        raise FileExistsError(f"{str(folder)!r} holds an unfinished run: --resume goes on with it, --overwrite begins anew")
    _writable(out, "the model")
    data = read_data(source, root=root, options=data_options, **reading)
    created = create(method, data, seed=config.get("seed", 0), **(options or {}))
    train_data, valid_data, test_data = _parts(data, valid, test, split_seed)
    valid_data = valid_data if len(valid_data) else None
    if config.get("patience") and not config.get("select"):
        config["select"] = {"regression": "valid/mae", "one_class": "valid/distance"}.get(data.task.kind, "valid/accuracy")
    settings = _config(**config, run_dir=str(folder), resume=resume)
    try:
        result = fit(created, train_data, valid_data, settings)
    except KeyboardInterrupt:
        done = CheckpointFolder(folder).epochs()
        raise Stopped(f"interrupted after {done[-1] if done else 0} of {settings.epochs} epochs") from None
    # the guarantee and the settings travel with the weights; where they were trained does not
    hidden = ("run_dir", "resume", "progress", "checkpoint", "log_dir")
    meta = {"source": {"name": data.name, "data_kind": data.data_kind, "licence": data.licence, "fingerprints": _fingerprints(data), "samples": len(data),
                       "options": data_options or {}, "columns": {name: reading[name] for name in COLUMNS if reading.get(name)}},
            "split": {"valid": valid, "test": test, "seed": split_seed, "sizes": [len(train_data), len(valid_data or ()), len(test_data)]},
            "training": {name: value for name, value in result.config.items() if name not in hidden}, "metrics": result.metrics, "best_epoch": result.best_epoch,
            "history": result.history, "guarantee": result.guarantee, "seconds": result.timings["total"]}
    save_model(out, created, method, options, meta)
    if not run_dir:
        shutil.rmtree(folder, ignore_errors=True)
    known = sum((train_data.target >= 0).flatten(1).any(1) if train_data.target.ndim > 1 else train_data.target >= 0).item() if data.task.kind in ("single_label", "multi_label") else len(train_data)
    return {"model": str(out), "method": method, "data": data.name, "data_kind": data.data_kind, "train": len(train_data), "labelled": known, "valid": len(valid_data or ()),
            "test": len(test_data), "epochs": len(result.history), "kept_epoch": result.best_epoch, "metrics": result.metrics, "seconds": result.timings["total"],
            "lower_is_better": [name for name in result.metrics if name.split("/")[-1] in LOWER_IS_BETTER]}


# ---------------------------------------------------------------- use a model

def _part_of(data, about, part, said=True):
    """The rows that a command looks at, and what they are called. By default: of the data that the model was trained on the test part, of others all."""
    meta, now = about["meta"], _fingerprints(data)
    then = meta.get("source", {}).get("fingerprints", {})
    known = then == now
    if part != "all" and not known and then.get("inputs") == now["inputs"]:
        raise ValueError(f"{data.name} has the inputs that the model was trained on, but another target, groups or split: which part it has not seen is not known; "
                         "name them as for ibma train, or look at --part all")
    if part == "auto":
        part = "test" if known and meta["split"]["sizes"][2] else "all"
    if part == "all":
        if known and said:
            print("ibma: these data include those the model was trained on", file=sys.stderr)
        return data, "all"
    if known:
        split = meta["split"]
        found = dict(zip(("train", "valid", "test"), _parts(data, split["valid"], split["test"], split["seed"]), strict=True))[part]
    elif part in (data.splits or {}):
        found = data.subset(data.splits[part])
    else:
        raise ValueError(f"{data.name} is not what the model was trained on, and has no published part {part!r}: use --part all")
    if not len(found):
        raise ValueError(f"the part {part!r} of {data.name} is empty")
    return found, part


def _load(model, source, part, device, root, data_options, reading, said=True):
    import torch

    from .model_files import load_model

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    method, about = load_model(model, device)
    same = about["meta"].get("source", {})
    options = data_options or (same.get("options") if same.get("name") == source else None)
    reading = {**same.get("columns", {}), **{key: value for key, value in reading.items() if value is not None}}
    data, part = _part_of(read_data(source, root=root, options=options, task=method.task, **reading), about, part, said)
    return method, about, data, part


def predict(model, source, *, part="all", batch_size=512, device="auto", root=None, data_options=None, **reading):
    """Predictions of a model file for arrays or a named set: (columns, rows of plain values, name of the part)."""
    from .metrics import predict_all

    method, about, data, part = _load(model, source, part, device, root, data_options, reading, said=False)
    task, p = method.task, predict_all(method, data, batch_size)
    names = [task.class_name(i) for i in range(task.num_classes)]
    ids = data.ids.tolist()
    if task.kind == "single_label":
        return ["row", "prediction", *(f"p({name})" for name in names)], [[i, names[row.argmax()], *row.tolist()] for i, row in zip(ids, p, strict=True)], part
    if task.kind == "multi_label":
        return ["row", *(f"p({name})" for name in names)], [[i, *row.tolist()] for i, row in zip(ids, p, strict=True)], part
    return ["row", "score" if task.kind == "one_class" else "prediction"], [[i, value] for i, value in zip(ids, p.tolist(), strict=True)], part


def evaluate(model, source, *, part="auto", metrics=None, resamples=1000, level=0.95, seed=0, batch_size=512, device="auto", root=None, data_options=None, **reading):
    """Metrics of a model file on arrays or a named set, with percentile intervals over samples (over groups, where the data have them)."""
    from .metrics import measures_of, predict_all

    method, about, data, part = _load(model, source, part, device, root, data_options, reading)
    task, p = method.task, predict_all(method, data, batch_size)
    everything = measures_of(task, p, data.target)
    wrong = [name for name in metrics or () if name not in everything]
    if wrong:
        raise ValueError(f"no metric {wrong[0]!r} here: there are {', '.join(everything)}")
    shown = list(metrics or [name for name in MAIN if name in everything] or everything)
    groups = data.groups if data.groups is not None and len(data.groups.unique()) > 1 else None
    found = _intervals(task, p, data.target, groups, shown, resamples, level, seed)
    return {"model": str(model), "method": about["method"], "data": data.name, "data_kind": data.data_kind, "part": part, "samples": len(data), "resampled": "samples" if groups is None else "groups",
            "resamples": resamples, "level": level, "metrics": found, "all": everything}


def _intervals(task, p, target, groups, names, resamples, level, seed):
    """`bootstrap` of several metrics, each resample measured once: the draws are the same for every metric."""
    from .metrics import UndefinedMetric, bootstrap, measures_of

    seen, out = [], {}
    for name in names:
        calls = itertools.count()

        def metric(p, target, name=name, calls=calls):
            number = next(calls)
            if number == len(seen):
                try:
                    seen.append(measures_of(task, p, target))
                except UndefinedMetric as error:
                    seen.append(error)
            found = seen[number]
            if isinstance(found, UndefinedMetric) or name not in found:
                raise UndefinedMetric(f"{name} does not exist in this resample")
            return found[name]

        try:
            out[name] = bootstrap(metric, p, target, groups=groups, resamples=resamples, level=level, seed=seed)
        except UndefinedMetric as error:
            out[name] = {"value": measures_of(task, p, target)[name], "low": math.nan, "high": math.nan, "undefined": 1.0, "reason": str(error)}
    return out


def explain(model, source, out, *, modality=None, rows=None, count=6, part="auto", target_class=None, variant="GradCAM", device="auto", overwrite=False, root=None, data_options=None, **reading):
    """Draw Grad-CAM maps of some samples, of the deciding head and of the modality's own, as one picture. Returns what it shows."""
    out = Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{str(out)!r} is there already: --overwrite replaces it, --out writes another")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        raise ValueError(f"{out.name}: pictures are written as .png, .jpg, .pdf or .svg")
    _writable(out, "the picture")
    from .encoders import ImageEncoder

    method, about, data, part = _load(model, source, part, device, root, data_options, reading)
    task = method.task
    pictures = [name for name, encoder in method.model.encoders.items() if isinstance(encoder, ImageEncoder)]
    if not pictures:
        raise ValueError(f"none of the modalities {', '.join(task.modalities)} is a picture, a clip or a spectrogram: there is nothing to draw a map on")
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('the maps are drawn with matplotlib: pip install "ibma[explain]"') from error
    matplotlib.use("agg")
    from .gradcam import cam, contact_sheet

    modality = modality or pictures[0]
    chosen = data.subset(list(rows)) if rows else data.subset(range(min(count, len(data))))
    batch = chosen[:].to(next(method.parameters()).device)
    if modality in batch.mask and not batch.mask[modality].any():
        raise ValueError(f"{modality!r} is missing from all {len(batch)} samples: choose others with --row")
    cams = {"decision": cam(method, batch, modality, target=target_class, variant=variant)}
    if modality in method.model.heads:
        cams["own head"] = cam(method, batch, modality, target=target_class, variant=variant, head="unimodal")
    p = method.predict(batch.inputs, batch.mask, batch.lengths, batch.features).cpu()
    titles = [_title(task, p[i], batch.target[i].cpu(), int(batch.id[i])) for i in range(len(batch))]
    x, maps = batch.inputs[modality].cpu(), {name: value.cpu() for name, value in cams.items()}
    if x.shape[-3] not in (1, 3):
        x = x.mean(-3, keepdim=True)
    figure = contact_sheet(x, maps, titles=titles)
    figure.savefig(out, dpi=200)
    return {"picture": str(out), "model": str(model), "method": about["method"], "data": data.name, "part": part, "modality": modality, "rows": batch.id.tolist(), "maps": list(maps)}


def _title(task, p, target, row):
    if task.kind == "single_label":
        truth = task.class_name(int(target)) if int(target) >= 0 else "unknown"
        return f"{row}: {truth}, predicted {task.class_name(int(p.argmax()))}"
    if task.kind == "multi_label":
        return f"{row}: highest {task.class_name(int(p.argmax()))}"
    return f"{row}: {float(p):.3g}"


# ---------------------------------------------------------------- several methods

@functools.lru_cache(maxsize=1)
def _cached(source, stamp, reading):
    """Data read once per process; `stamp` changes with the file."""
    return read_data(source, **json.loads(reading))


def _stamp(source):
    path = Path(source)
    return f"{path.stat().st_mtime_ns} {path.stat().st_size}" if path.is_file() else ""


def _compare_run(config):
    """One method on one split: train, choose on the validation part where that is asked for, measure on the test part."""
    from .metrics import measure
    from .methods import create
    from .training import fit

    data = _cached(config["data"], _stamp(config["data"]), json.dumps(config["reading"]))
    train_data, valid_data, test_data = _parts(data, config["valid"], config["test"], config["seed"])
    created = create(config["method"], data, seed=config["seed"], **config["options"])
    result = fit(created, train_data, valid_data if len(valid_data) else None, _config(**config["training"], seed=config["seed"]))
    return {"metrics": measure(created, test_data), "data_kind": data.data_kind, "guarantee": result.guarantee}


def compare(source, names, *, splits=5, seed=0, metric=None, reference=None, options=None, config=None, valid=0.2, test=0.2, store=".runs/compare", jobs=1,
            root=None, data_options=None, **reading):
    """Train several methods on the same random splits and compare them. Returns plain values: one row per method, best first.

    Runs are recorded in `store` and not repeated. p-values are those of the t-test corrected for overlapping training sets (Nadeau and Bengio), adjusted by Holm.
    Raises Stopped at Ctrl-C.
    """
    from . import runs
    from .methods import METHODS, module_of
    from .significance import compare as against

    names = list(dict.fromkeys(names))
    for name in names:
        if name not in METHODS:
            METHODS[name]   # raises with what is known
    if reference is not None and reference not in names:
        raise ValueError(f"--reference {reference!r} is not among the methods compared: {', '.join(names)}")
    reference = reference or ("ibma" if "ibma" in names else names[0])
    reading = {"root": root, "options": data_options, **{key: value for key, value in reading.items() if value is not None}}
    data = _cached(str(source), _stamp(source), json.dumps(reading))
    config = {key: value for key, value in (config or {}).items() if value is not None}
    _config(**config)   # refuses a wrong setting before any run
    if (data.splits or {}).get("test") is not None and splits > 1:
        print("ibma: the test part is published: splits differ in their validation part and seed only, and p-values are those of this one test set", file=sys.stderr)
    configs = [{"method": name, "data": str(source), "fingerprints": _fingerprints(data), "reading": reading, "valid": valid, "test": test, "training": config,
                "options": options or {}, "seed": seed + i} for name in names for i in range(splits)]
    table = f"{data.name}"
    try:
        with redirect_stdout(sys.stderr):   # progress is no result
            frame = runs.run_grid(store, table, configs, _compare_run, n_jobs=jobs, data_kind=data.data_kind,
                                  depends_on=lambda c: (module_of(c["method"]), "ibma.training", "ibma.metrics", "ibma.data.core"))
    except KeyboardInterrupt:
        raise Stopped("interrupted; finished runs are kept, the same command goes on") from None
    failed = [f"{row['method']}, seed {row['seed']}: {row['error']}" for row in frame.to_dict("records") if row["status"] != "finished"]
    measured = [c for c in frame.columns if c in MAIN or "/" in c]
    metric = metric or next((name for name in MAIN if name in frame.columns), None)
    if metric not in frame.columns:
        raise RuntimeError(f"every run failed; the first: {failed[0]}") if len(failed) == len(configs) else ValueError(f"no metric {metric!r}: there are {', '.join(measured)}")
    lower = metric in ("mae", "ece", "brier", "nll")
    results = {name: frame.loc[frame["method"] == name].sort_values("seed")[metric].to_numpy(dtype=float) for name in names}
    first = _parts(data, valid, test, seed)
    share = len(first[2]) / len(first[0])
    rows = against(results, reference, share, higher_is_better=not lower).reset_index(names="method").to_dict("records")
    rows = [{key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()} for row in rows]
    return {"data": data.name, "data_kind": data.data_kind, "metric": metric, "reference": reference, "splits": splits, "test_share": share, "rows": rows, "failed": failed, "store": str(store)}


def methods():
    """One dict per method: name, summary, options with their defaults."""
    import inspect

    from .methods import METHODS, _options

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, cls in METHODS.items():
            own = [p for base in cls.__mro__ if "__init__" in vars(base) and base.__module__.startswith("ibma.methods") and base.__module__ != "ibma.methods.base"
                   for p in inspect.signature(base.__init__).parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in ("self", "task")]
            text = " ".join((cls.__doc__ or "").split())
            summary = re.split(r"(?<=\.)\s+(?=[A-Z])", text)[0]   # the first sentence
            found.append({"name": name, "class": f"{cls.__module__}.{cls.__qualname__}", "summary": summary,
                          "options": {p.name: None if p.default is p.empty else p.default for p in reversed(own)}, "all_options": sorted(_options(cls))})
    return found
