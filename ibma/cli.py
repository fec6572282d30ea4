"""The command `ibma`: train on your own arrays, use what was trained, compare methods, rerun the book's tables, look after data sets.

Exit codes: 0 all is well; 1 a run or a notebook failed, or data are broken; 2 the command was wrong (one line says how); 130 Ctrl-C.
Typer parses; every command returns what is to be done, and `main` does it, so that parsing and working fail in their own ways.
"""
from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shlex
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ibma import runs

__all__ = ["app", "main", "prepare_cli"]

STORES = ("results", ".runs/smoke")     # where results lie unless --store says otherwise
UsageError = typer.BadParameter.__mro__[1]   # Typer brings its own copy of Click, or uses yours: either way it is this class

app = typer.Typer(name="ibma", rich_markup_mode="rich", pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
                  help="Information-bottleneck multimodal alignment: train, use, compare and reproduce.")
data_app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False,
                       help="List, prepare, verify and describe data sets.\n\nRaw files are looked for under IBMA_DATA, prepared data are kept under IBMA_CACHE (default ~/.cache/ibma).")
USE, RERUN = "Your data", "The book"
app.add_typer(data_app, name="data", rich_help_panel=USE)


def _examples(*lines):
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"[cyan]$ {line}[/cyan]" for line in lines)


# ---------------------------------------------------------------- what options mean

def _assignment(text, hint):
    """NAME=VALUE; the value as JSON where it is JSON (0.5, true, [0, 1]), else as text."""
    name, equals, value = text.partition("=")
    if not equals or not all(part.isidentifier() for part in name.split(".")):
        raise typer.BadParameter(f"NAME=VALUE is expected, not {text!r}", param_hint=hint)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _assignments(texts, hint):
    pairs = [_assignment(text, hint) for text in texts or ()]
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise UsageError(f"{hint} {repeated[0]} is given twice")
    return dict(pairs)


def _processes(text: str) -> int:
    if not str(text).lstrip("-").isdigit() or int(text) == 0:
        raise typer.BadParameter(f"a number of processes is expected (-1: one per core), not {text!r}")
    return int(text)


def _seconds(text: str):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise typer.BadParameter(f"a number of seconds is expected (0: no limit), not {text!r}")
    return value or None


def _numbers(text, hint):
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"numbers with commas between them are expected, not {text!r}", param_hint=hint) from None


def _method_names(incomplete: str):
    from ibma.methods import _CLASSES
    return [name for name in _CLASSES if name.startswith(incomplete)]


def _set_names(incomplete: str):
    from ibma.data import DATASETS
    return [name for name in DATASETS if name.startswith(incomplete)]


Jobs = Annotated[str, typer.Option("--jobs", metavar="N", callback=_processes, help="Processes (-1: one per core).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SetName = Annotated[str, typer.Argument(metavar="NAME", help="A data set: see ibma data list.", autocompletion=_set_names)]
RawRoot = Annotated[str, typer.Option("--root", metavar="DIR", help="Folder of the raw files (default: the set's folder under IBMA_DATA).")]
Cache = Annotated[str, typer.Option("--cache", metavar="DIR", help="Folder of prepared data (default: IBMA_CACHE, or ~/.cache/ibma).")]
ReaderOptions = Annotated[list[str], typer.Option("--option", metavar="NAME=VALUE", help="An option of the set's reader; may be repeated.")]
TimeLimit = Annotated[str, typer.Option("--time-limit", metavar="S", callback=_seconds, help="Seconds that one sample may take (0: no limit).")]
Bar = Annotated[bool, typer.Option("--progress", help="Show a bar.")]

Source = Annotated[str, typer.Argument(metavar="DATA", help="A file of arrays (.npz, .parquet), or a data set by its name.", autocompletion=_set_names)]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model file that ibma train wrote.")]
Target = Annotated[str, typer.Option("--target", metavar="NAME", help="Array or column of the target; -1 or empty: unlabelled (default: y, or as in training).")]
Groups = Annotated[str, typer.Option("--groups", metavar="NAME", help="Array or column of groups (speakers, patients): a group stays in one part (default: groups, or as in training).")]
Split = Annotated[str, typer.Option("--split", metavar="NAME", help="Array or column that says train, valid or test (default: split, or as in training).")]
Modality = Annotated[list[str], typer.Option("--modality", metavar="NAME", help="Only this modality; may be repeated (default: all arrays).")]
Kind = Annotated[list[str], typer.Option("--kind", metavar="MODALITY=KIND", help="What an array is, where its shape does not tell: sequence, text, spectrogram, frames; may be repeated.")]
SetOptions = Annotated[list[str], typer.Option("--data-option", metavar="NAME=VALUE", help="An option of the named set's reader; may be repeated.")]
TaskKind = Annotated[str, typer.Option("--task", metavar="KIND", help="regression or one_class, which a target does not tell.")]
Bins = Annotated[str, typer.Option("--bins", metavar="A,B,...", help="Of a regression: the cut points that make classes of its values for the bound.")]
MethodOptions = Annotated[list[str], typer.Option("--option", metavar="NAME=VALUE", help="An option of the method, as ibma methods lists them (eta=0.3, encoders.image.depth=2); may be repeated.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of TrainingConfig (scheduler=cosine); may be repeated.")]
Part = Annotated[str, typer.Option("--part", metavar="PART", help="train, valid, test or all (default: of the data it was trained on the test part, of others all).")]
PartOrAll = Annotated[str, typer.Option("--part", metavar="PART", help="train, valid, test or all.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1; auto takes a GPU where there is one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Valid = Annotated[float, typer.Option("--valid", metavar="SHARE", help="Share for validation, where the data publish no such part (0: none).")]
Test = Annotated[float, typer.Option("--test", metavar="SHARE", help="Share kept aside for ibma evaluate, where the data publish no such part (0: none).")]
Epochs = Annotated[int, typer.Option("--epochs", metavar="N", help="Passes over the training part.")]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", help="Samples per step of the optimiser.")]
PredictBatch = Annotated[int, typer.Option("--batch-size", metavar="N", help="Samples at a time: more take more memory, the result is the same.")]
Rate = Annotated[float, typer.Option("--lr", metavar="X", help="Learning rate.")]
Patience = Annotated[int, typer.Option("--patience", metavar="N", help="Keep the best epoch on the validation part, and stop after N epochs without a better one.")]
Dim = Annotated[int, typer.Option("--dim", metavar="D", help="Width of the representations (the paper: 512).")]


def _reading(target, groups, split, modality, kind, root, data_option, task=None, bins=None):
    kinds = _assignments(kind, "--kind")
    if task not in (None, "single_label", "multi_label", "regression", "one_class"):
        raise typer.BadParameter(f"{task!r} is unknown: single_label, multi_label, regression or one_class", param_hint="--task")
    found = {"target": target, "groups": groups, "split": split, "modalities": modality or None, "kinds": kinds or None, "root": root,
             "data_options": _assignments(data_option, "--data-option") or None}
    return found | ({"kind": task, "bins": _numbers(bins, "--bins")} if task or bins else {})


def _using(target, groups, split, root, data_option):
    return {"target": target, "groups": groups, "split": split, "root": root, "data_options": _assignments(data_option, "--data-option") or None}


def _part(part):
    if part not in ("auto", "train", "valid", "test", "all"):
        raise typer.BadParameter(f"{part!r} is unknown: train, valid, test or all", param_hint="--part")
    return part


# ---------------------------------------------------------------- output

def _table(rows):
    """Rows of text under a heading: a drawn table on a terminal, plain columns in files and pipes."""
    numbers = [all(re.fullmatch(r"-?[\d.]*", row[i]) for row in rows[1:]) for i in range(len(rows[0]))]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name, number in zip(rows[0], numbers, strict=True):
            table.add_column(name, justify="right" if number else "left")
        for row in rows[1:]:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.rjust(width) if number else cell.ljust(width) for cell, width, number in zip(row, widths, numbers, strict=True))
        print("  ".join(cells).rstrip())


def _number(value, digits=3):
    return "" if value is None or value != value else f"{value:.{digits}f}"


def _plain(value):
    """JSON without NaN, which is none."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_json(value):
    print(json.dumps(_plain(value), indent=1, default=str))


# ---------------------------------------------------------------- your data

@app.command(rich_help_panel=USE, epilog=_examples(
    "ibma train data.npz --out model.safetensors",
    "ibma train table.parquet --target label --groups patient --method ibma --option eta=0.3 --patience 10 --out model.safetensors",
    "ibma train digits --epochs 20 --dim 32 --lr 0.002 --out digits.safetensors"))
def train(
    ctx: typer.Context,
    source: Source,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="The model file.")] = "model.safetensors",
    method: Annotated[str, typer.Option("--method", "-m", metavar="NAME", help="See ibma methods.", autocompletion=_method_names)] = "ibma",
    option: MethodOptions = None, dim: Dim = 64, epochs: Epochs = 50, batch_size: BatchSize = 64, lr: Rate = 1e-3, patience: Patience = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the initial weights and the order of batches.")] = 0,
    settings: Settings = None, valid: Valid = 0.2, test: Test = 0.2,
    split_seed: Annotated[int, typer.Option("--split-seed", help="Of the drawn parts.")] = 0,
    target: Target = None, groups: Groups = None, split: Split = None, modality: Modality = None, kind: Kind = None, task: TaskKind = None, bins: Bins = None,
    root: RawRoot = None, data_option: SetOptions = None, device: Device = "auto",
    run_dir: Annotated[str, typer.Option("--run-dir", metavar="DIR", help="Folder of the checkpoints, kept (default: FILE.run, removed at the end).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Overwrite = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False, as_json: Json = False,
):
    """Train a method on your arrays, or on a data set by its name, and write one model file.

    An .npz file holds one array per modality, vectors (n, p) or images (n, H, W) or (n, channels, H, W), and y; a Parquet file one column per modality.
    Texts, class numbers or 0/1 per label are targets; -1 or an empty cell is an unlabelled sample. After Ctrl-C the same command with --resume goes on.
    """
    given = _assignments(settings, "--set")
    reading = _reading(target, groups, split, modality, kind, root, data_option, task, bins)
    options = {"dim": dim, **_assignments(option, "--option")}

    def work():
        from ibma import commands
        config = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "device": device, "patience": patience, "progress": not (quiet or as_json), **given}
        try:
            done = commands.train(source, out, method=method, options=commands.options_of(method, options), config=config, valid=valid, test=test,
                                  split_seed=split_seed, run_dir=run_dir, resume=resume, overwrite=overwrite, **reading)
        except commands.Stopped as stop:
            again = ctx.obj["argv"] + ([] if resume else ["--resume"])
            raise commands.Stopped(f"{stop}; go on with: {shlex.join(['ibma', *again])}") from None
        if as_json:
            _print_json(done)
            return 0
        unlabelled = f", {done['train'] - done['labelled']} of them unlabelled" if done["labelled"] < done["train"] else ""
        print(f"{done['method']} on {done['data']} ({done['data_kind']} data): {done['train']} samples to train{unlabelled}, {done['valid']} to validate, {done['test']} kept aside")
        kept = "" if done["kept_epoch"] is None else f", best on validation: {done['kept_epoch'] + 1}"
        print(f"{done['epochs']} epochs in {done['seconds']:.1f} s{kept}; " + ", ".join(f"{name} {value:.3f}" for name, value in done["metrics"].items()))
        print(f"written: {done['model']}")
        return 0

    return work


@app.command(rich_help_panel=USE, epilog=_examples("ibma predict model.safetensors new.npz --out predictions.csv", "ibma predict model.safetensors new.parquet | head"))
def predict(
    model: Model, source: Source,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="A .csv, .json, .npz or .parquet file (default: CSV on the screen).")] = None,
    part: PartOrAll = "all", target: Target = None, groups: Groups = None, split: Split = None, root: RawRoot = None, data_option: SetOptions = None,
    batch_size: PredictBatch = 512, device: Device = "auto", overwrite: Overwrite = False, as_json: Json = False,
):
    """Predict with a model file: the class and the probability of each, per sample.

    A modality that the file lacks counts as missing, and so does a null of a Parquet column.
    """
    reading, part = _using(target, groups, split, root, data_option), _part(part)
    if out and Path(out).suffix not in (".csv", ".json", ".npz", ".parquet"):
        raise typer.BadParameter(f"{out!r}: predictions are written as .csv, .json, .npz or .parquet", param_hint="--out")

    def work():
        from ibma import commands
        if out:
            if Path(out).exists() and not overwrite:
                raise FileExistsError(f"{out!r} is there already: --overwrite replaces it")
            commands._writable(Path(out), "predictions")
        columns, rows, shown = commands.predict(model, source, part=part, batch_size=batch_size, device=device, **reading)
        rows = [[float(f"{value:.6g}") if isinstance(value, float) else value for value in row] for row in rows]
        if out:
            Path(out).write_bytes(_encoded(columns, rows, Path(out).suffix))
            print(f"{len(rows)} predictions ({shown}) written: {out}")
        else:
            sys.stdout.write(_encoded(columns, rows, ".json" if as_json else ".csv").decode())
        return 0

    return work


def _encoded(columns, rows, suffix):
    if suffix == ".csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        return text.getvalue().encode()
    if suffix == ".json":
        return (json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=1) + "\n").encode()
    import numpy as np
    arrays, file = {name: np.array([row[i] for row in rows]) for i, name in enumerate(columns)}, io.BytesIO()
    if suffix == ".npz":
        np.savez_compressed(file, **arrays)
    else:
        import pyarrow as pa
        from pyarrow import parquet
        parquet.write_table(pa.table(arrays), file)
    return file.getvalue()


@app.command(rich_help_panel=USE, epilog=_examples("ibma evaluate model.safetensors data.npz", "ibma evaluate model.safetensors other.npz --metric accuracy --resamples 5000 --json"))
def evaluate(
    model: Model, source: Source,
    metric: Annotated[list[str], typer.Option("--metric", metavar="NAME", help="Only this metric; may be repeated.")] = None,
    resamples: Annotated[int, typer.Option("--resamples", metavar="N", min=10, help="Of the bootstrap.")] = 1000,
    level: Annotated[float, typer.Option("--level", metavar="P", min=0.5, max=0.999, help="Of the interval.")] = 0.95,
    part: Part = "auto", target: Target = None, groups: Groups = None, split: Split = None, root: RawRoot = None, data_option: SetOptions = None,
    batch_size: PredictBatch = 512, device: Device = "auto", as_json: Json = False,
):
    """Metrics of a model file, each with a bootstrap interval.

    On the data it was trained on this looks at the part that was kept aside. Where the data have groups (speakers, patients), groups are resampled.
    """
    reading, part = _using(target, groups, split, root, data_option), _part(part)

    def work():
        from ibma import commands
        found = commands.evaluate(model, source, part=part, metrics=metric or None, resamples=resamples, level=level, batch_size=batch_size, device=device, **reading)
        if as_json:
            _print_json(found)
            return 0
        print(f"{found['method']} on {found['data']} ({found['data_kind']} data), part {found['part']}: {found['samples']} samples; "
              f"{100 * found['level']:.3g} % interval over {found['resamples']} resamples of {found['resampled']}")
        _table([["metric", "value", "low", "high"], *([name, *(_number(row[key]) for key in ("value", "low", "high"))] for name, row in found["metrics"].items())])
        return 0

    return work


@app.command(rich_help_panel=USE, epilog=_examples("ibma explain model.safetensors data.npz --out maps.png", "ibma explain model.safetensors data.npz --modality image --row 3 --row 17 --out maps.png"))
def explain(
    model: Model, source: Source,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="The picture (.png, .jpg, .pdf or .svg).")] = "explained.png",
    modality: Annotated[str, typer.Option("--modality", metavar="NAME", help="Whose pictures (default: the first that has some).")] = None,
    row: Annotated[list[int], typer.Option("--row", metavar="N", help="This sample of the part; may be repeated.")] = None,
    count: Annotated[int, typer.Option("--count", metavar="N", min=1, max=50, help="How many, from the first on, where --row is not given.")] = 6,
    target_class: Annotated[int, typer.Option("--class", metavar="N", help="What speaks for this class (default: for the one predicted).")] = None,
    variant: Annotated[str, typer.Option("--variant", help="GradCAM, LayerCAM, ScoreCAM, ...: see ibma.gradcam.VARIANTS.")] = "GradCAM",
    part: Part = "auto", target: Target = None, groups: Groups = None, split: Split = None, root: RawRoot = None, data_option: SetOptions = None,
    device: Device = "auto", overwrite: Overwrite = False, as_json: Json = False,
):
    """Draw where the model looked: Grad-CAM maps of some samples as one picture.

    One column for the head that decides, one for the modality's own head.
    """
    reading, part = _using(target, groups, split, root, data_option), _part(part)

    def work():
        from ibma import commands
        done = commands.explain(model, source, out, modality=modality, rows=row or None, count=count, part=part, target_class=target_class, variant=variant, device=device,
                                overwrite=overwrite, **reading)
        if as_json:
            _print_json(done)
        else:
            print(f"{len(done['rows'])} samples of {done['data']} ({done['part']}), {done['modality']}: maps for {', '.join(done['maps'])}\nwritten: {done['picture']}")
        return 0

    return work


@app.command(rich_help_panel=USE, epilog=_examples("ibma compare data.npz", "ibma compare digits ibma ce concat --splits 5 --epochs 20", "ibma compare data.parquet ibma omib --groups patient --metric f1/macro --csv table.csv"))
def compare(
    source: Source,
    names: Annotated[list[str], typer.Argument(metavar="[METHOD]...", help="Two or more methods (default: ibma ce concat).", autocompletion=_method_names)] = None,
    splits: Annotated[int, typer.Option("--splits", metavar="N", min=1, help="Random splits, each with its seed.")] = 5,
    metric: Annotated[str, typer.Option("--metric", metavar="NAME", help="What is compared (default: accuracy; mauc of several labels; mae of a regression).")] = None,
    reference: Annotated[str, typer.Option("--reference", metavar="METHOD", help="What the others are compared with (default: ibma).")] = None,
    settings: Settings = None, dim: Dim = 64, epochs: Epochs = 50, batch_size: BatchSize = 64, lr: Rate = 1e-3, patience: Patience = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the first split.")] = 0, valid: Valid = 0.2, test: Test = 0.2,
    target: Target = None, groups: Groups = None, split: Split = None, modality: Modality = None, kind: Kind = None, task: TaskKind = None, bins: Bins = None,
    root: RawRoot = None, data_option: SetOptions = None, device: Device = "auto", jobs: Jobs = "1",
    store: Annotated[str, typer.Option("--store", metavar="DIR", help="Where runs are recorded: none is repeated.")] = ".runs/compare",
    csv_file: Annotated[str, typer.Option("--csv", metavar="FILE", help="Write the table there too.")] = None, as_json: Json = False,
):
    """Train several methods on the same random splits, and say which differ.

    Differences come with the interval and p-value of a t-test that is corrected for overlapping splits, and p-values are adjusted for the number of methods (Holm).
    """
    given, reading = _assignments(settings, "--set"), _reading(target, groups, split, modality, kind, root, data_option, task, bins)

    def work():
        from ibma import commands
        if csv_file:
            commands._writable(Path(csv_file), "the table")
        config = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "device": device, "patience": patience, **given}
        found = commands.compare(source, names or ["ibma", "ce", "concat"], splits=splits, seed=seed, metric=metric, reference=reference, options={"dim": dim}, config=config,
                                 valid=valid, test=test, store=store, jobs=jobs, **reading)
        columns = ["method", "mean", "sd", "runs", "difference", "low", "high", "p", "p_holm", "stars"]
        if csv_file:
            with open(csv_file, "w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows([columns, *([row[name] for name in columns] for row in found["rows"])])
        for line in found["failed"]:
            print(f"ibma: a run failed: {line}", file=sys.stderr)
        if as_json:
            _print_json(found)
        else:
            print(f"{found['metric']} on {found['data']} ({found['data_kind']} data), {found['splits']} splits; differences from {found['reference']}")
            _table([columns, *([str(row[n]) if n in ("method", "runs", "stars") else _number(row[n], 4 if n in ("p", "p_holm") else 3) for n in columns] for row in found["rows"])])
            if found["splits"] < 5:
                print("few splits: the intervals are wide, and nothing but large differences can be told")
        return int(bool(found["failed"]))

    return work


@app.command("methods", rich_help_panel=USE, epilog=_examples("ibma methods", "ibma methods omib", "ibma methods --json"))
def list_methods(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="The options of this one.", autocompletion=_method_names)] = None, as_json: Json = False,
):
    """List the methods, or the options of one."""
    def work():
        from ibma import commands
        from ibma.methods import METHODS
        if name is not None and name not in METHODS:
            METHODS[name]   # raises with what is known
        found = [row for row in commands.methods() if name in (None, row["name"])]
        if as_json:
            _print_json(found if name is None else found[0])
        elif name is None:
            _table([["name", "what it is"], *([row["name"], row["summary"]] for row in found)])
        else:
            print(f"{found[0]['name']}: {found[0]['summary']}\n{found[0]['class']}\n")
            _table([["option", "default"], *([key, "" if value is None else json.dumps(value, default=str)] for key, value in found[0]["options"].items())])
            print(f"\nand of the model: {', '.join(n for n in found[0]['all_options'] if n not in found[0]['options'])}")
        return 0

    return work


# ---------------------------------------------------------------- the book

def _took(count, seconds):
    unit, size = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 0)) if seconds >= s)
    return f"{count} runs, {seconds / max(size, 1):.1f} {unit}" if count else "no records"


@app.command(rich_help_panel=RERUN, epilog=_examples("ibma reproduce --dry-run", "ibma reproduce --profile cpu --table 10_benchmark --jobs 2", "ibma reproduce --set epochs=5"))
def reproduce(
    profile: Annotated[str, typer.Option("--profile", help="smoke (minutes), cpu (hours), paper (a GPU), or another of profiles.yml.")] = "smoke",
    table: Annotated[list[str], typer.Option("--table", metavar="NAME", help="Only this notebook, or what a table or figure of the paper takes: 2, figure1; may be repeated.")] = None,
    settings: Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help="A parameter for the notebooks that declare it; may be repeated.")] = None,
    jobs: Jobs = "1",
    store: Annotated[str, typer.Option("--store", metavar="DIR", help="Where runs are recorded, relative to the root.")] = None,
    root: Annotated[str, typer.Option("--root", metavar="DIR", help="Root of the repository.")] = ".",
    adopt: Annotated[int, typer.Option("--adopt", metavar="N", min=0, help="After an edit that should change no number: repeat N runs of each kind, and take over the older records of those that give the same again.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and with which parameters.")] = False,
):
    """Execute the notebooks behind the tables and figures.

    The notebooks of nbs/6_reproduction run with the parameters of a profile. Finished runs and unchanged notebooks are kept, so it can be stopped and resumed.
    """
    chosen = {"profile": profile, "tables": table or None, "root": root, "store": store, "jobs": jobs, "parameters": _assignments(settings, "--set")}

    def work():
        if dry_run:
            pages = runs.plan(**chosen)
            _table([["notebook", "would be", "took before", "parameters"], *(
                [page.name, "kept" if page.kept else "run", _took(*page.recorded(root)), " ".join(f"{name}={json.dumps(value)}" for name, value in page.parameters.items())]
                for page in pages)])
            print("took before: recorded runs of this profile's store and their time in one process; finished runs are not repeated")
            return 0
        if adopt:
            os.environ["IBMA_ADOPT"] = str(adopt)      # the kernels inherit it
        runs.reproduce(**chosen)
        return 0

    return work


@app.command(rich_help_panel=RERUN, epilog=_examples("ibma results", "ibma results --store .runs/compare --json"))
def results(
    stores: Annotated[list[str], typer.Option("--store", metavar="DIR", help=f"A store of runs; may be repeated (default: {' and '.join(STORES)}).")] = None,
    as_json: Json = False,
):
    """Count finished and failed runs per recorded table."""
    def work():
        for folder in stores or ():
            if not Path(folder).is_dir():
                raise ValueError(f"no folder {folder!r}")
        rows = []
        for folder in stores or STORES:
            store = runs.RunStore(folder)
            for name in store.tables():
                unreadable = store.unreadable(name)
                for file in unreadable:
                    print(f"ibma: {folder}/{name}/{file} is unreadable and counts as not done", file=sys.stderr)
                records = store.records(name, warn=False)
                states = Counter(record["status"] for record in records)
                kinds = sorted({record["data_kind"] or "not said" for record in records})
                rows.append({"store": folder, "table": name, "finished": states["finished"], "failed": states["failed"], "unreadable": len(unreadable), "data": kinds})
        if as_json:
            _print_json(rows)
        elif not rows:
            print("no results yet: ibma reproduce makes them")
        else:
            _table([list(rows[0]), *([", ".join(value) if isinstance(value, list) else str(value) for value in row.values()] for row in rows)])
        return 0

    return work


# ---------------------------------------------------------------- data sets

def _known(name):
    from ibma import data
    if name not in data.DATASETS:
        raise ValueError(data.unknown(name))
    return data


def _caching(cache):
    if cache:
        os.environ["IBMA_CACHE"] = cache


@data_app.command("list", epilog=_examples("ibma data list", "ibma data list --json"))
def data_list(as_json: Json = False):
    """The known data sets, and which of them are here."""
    def work():
        from ibma import data
        rows = []
        for name, info in data.DATASETS.items():
            here = data.available(name)
            state = "no" if not here else "yes" if not info.raw else "prepared" if data.is_prepared(name) else "to prepare"
            rows.append({"name": name, "kind": info.data_kind, "here": state, "licence": info.licence, "summary": info.summary, "how_to_get": data.how_to_get(name)})
        if as_json:
            _print_json(rows)
        else:
            _table([["name", "kind", "here", "licence", "summary"], *([row[key] for key in ("name", "kind", "here", "licence", "summary")] for row in rows)])
        return 0

    return work


@data_app.command("prepare", epilog=_examples("ibma data prepare av-digits", "ibma data prepare standin-meld --option n=200 --jobs -1 --progress"))
def data_prepare(
    name: SetName, root: RawRoot = None, cache: Cache = None, option: ReaderOptions = None, jobs: Jobs = "2", time_limit: TimeLimit = "60", progress: Bar = False,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out samples that cannot be read, and list them.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Prepare again what has been prepared.")] = False,
):
    """Decode the raw files of a set once, into the cache. It can be stopped and resumed."""
    options = _assignments(option, "--option")

    def work():
        _caching(cache)
        done = _known(name).prepare(name, root, jobs=jobs, skip_broken=skip_broken, progress=progress, time_limit=time_limit, overwrite=overwrite, **options)
        print(f"{done}\nin {done.folder}")
        for line in done.differences():
            print(f"differs from what is published: {line}")
        if done.skipped:
            print(f"left out: {len(done.skipped)}, listed in skipped.csv there; the first: {done.skipped[0].reason}")
        return 0

    return work


@data_app.command("verify", epilog=_examples("ibma data verify covid-cxr --decode"))
def data_verify(
    name: SetName, root: RawRoot = None, cache: Cache = None, option: ReaderOptions = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every file, and compare the checksums of prepared copies.")] = False,
    jobs: Jobs = "2", time_limit: TimeLimit = "60", progress: Bar = False, as_json: Json = False,
):
    """Compare the raw files of a set with the published counts.

    Exit code 1 where counts differ from the published ones, or files are missing or (with --decode) unreadable.
    """
    options = _assignments(option, "--option")

    def work():
        _caching(cache)
        found = _known(name).verify(name, root, decode=decode, jobs=jobs, time_limit=time_limit, progress=progress, **options)
        wrong = bool(found["differences"] or found["broken"] or found["damaged"])
        if as_json:
            _print_json(found)
            return int(wrong)
        parts = found["parts"] | {part: found["parts"].get(part, 0) for part in found["published"] or {}}
        _table([["part", "samples", "published"], *([part, str(n), str((found["published"] or {}).get(part, ""))] for part, n in parts.items())])
        for line in [*found["differences"], *(f"{item['where'] or item['id']}: {item['reason']}" for item in found["broken"]), *found["damaged"]]:
            print(line)
        checked = "every file was decoded" if decode else "every file is there (--decode tries to read them)"
        print("not as it should be" if wrong else f"all is well: {checked}" if found["files"] else "all is well")
        return int(wrong)

    return work


@data_app.command("describe", epilog=_examples("ibma data describe digits"))
def data_describe(name: SetName, root: RawRoot = None, cache: Cache = None, option: ReaderOptions = None, as_json: Json = False):
    """Modalities, counts, splits and licence of a data set that is here."""
    options = _assignments(option, "--option")

    def work():
        _caching(cache)
        found = _known(name).describe(name, root, **options)
        print(json.dumps(found, indent=1) if as_json else found["text"])
        return 0

    return work


def prepare_cli(name, argv=None):
    """What `data_prep/<name>/prepare.py` runs: `ibma data prepare NAME` for one data set. Returns the exit code."""
    return main(["data", "prepare", name, *(sys.argv[1:] if argv is None else argv)])


# ---------------------------------------------------------------- the whole

def _version(wanted: bool):
    if wanted:
        from ibma import __version__
        print(f"ibma {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _start(ctx: typer.Context, version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False):
    if ctx.invoked_subcommand is None:
        raise UsageError(f"a command is needed: {', '.join(ctx.command.commands)}", ctx)


@data_app.callback(invoke_without_command=True)
def _start_data(ctx: typer.Context):
    if ctx.invoked_subcommand is None:
        raise UsageError("the following arguments are required: action (list, prepare, verify or describe)", ctx)


def _one_line(exc):
    """A parser's complaint as one line that says where help is."""
    import difflib

    message, ctx = " ".join(exc.format_message().split()), getattr(exc, "ctx", None)
    if wrong := getattr(exc, "option_name", None) if type(exc).__name__ == "NoSuchOption" else None:
        close = difflib.get_close_matches(wrong, [name for p in ctx.command.params for name in p.opts] if ctx else [], n=1)
        message = f"unrecognized arguments: {wrong}{f' (did you mean {close[0]}?)' if close else ''}"
    elif found := re.match(r"No such command '([^']*)'", message):
        known = list(ctx.command.commands) if ctx else []
        close = difflib.get_close_matches(found[1], known, n=1)
        message = f"invalid choice: {found[1]!r} ({f'did you mean {close[0]!r}? ' if close else ''}choose from {', '.join(known)})"
    elif found := re.match(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", message):
        message = f"unrecognized arguments: {found[1]}"
    elif type(exc).__name__ == "MissingParameter":
        message = f"the following arguments are required: {(exc.param.metavar or exc.param.name) if exc.param else ''}"
    command = ctx.command_path if ctx else "ibma"
    return f"{command}: error: {message} (see {command} --help)"


@contextmanager
def _one_line_warnings():
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message, category, *rest, **options):
            if issubclass(category, UserWarning):
                print(f"ibma: {' '.join(str(message).split())}", file=sys.stderr)
            else:
                shown(message, category, *rest, **options)

        warnings.showwarning = show
        yield


def main(argv=None):
    """Run the command line and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        todo = app(args=argv, prog_name="ibma", standalone_mode=False, obj={"argv": argv})
        if not callable(todo):
            return int(todo or 0)
        with _one_line_warnings():
            return todo()
    except Exception as exc:
        if os.environ.get("IBMA_TRACEBACK") and not isinstance(exc, UsageError):
            raise                        # for those who look for the cause
        return _complain(exc)
    except SystemExit as exc:            # shell completion
        return int(exc.code or 0)
    except KeyboardInterrupt as exc:
        kept = "what is decoded is kept, the same command goes on" if argv[:1] == ["data"] else "finished runs are kept"
        print(f"ibma: {str(exc) or f'interrupted; {kept}'}", file=sys.stderr)
        return 130


def _complain(exc):
    """One line about an error, and the exit code. What nobody foresaw is raised again."""
    line = " ".join(str(exc).split())
    if isinstance(exc, UsageError):
        print(_one_line(exc), file=sys.stderr)
        return 2
    if isinstance(exc, runs.ReproductionError) or type(exc).__name__ == "RawFileError":   # the command was right, a notebook or the files are not
        print(f"ibma: {exc}", file=sys.stderr)
        return 1
    if isinstance(exc, (FloatingPointError, RuntimeError)):                                # the command was right, the run went wrong
        print(f"ibma: {line}", file=sys.stderr)
        return 1
    if isinstance(exc, (ValueError, TypeError, LookupError, OSError, ImportError)):
        if isinstance(exc, OSError) and exc.strerror and not exc.filename:
            line = exc.strerror
        elif isinstance(exc, KeyError) and exc.args:
            line = " ".join(str(exc.args[0]).split())
        print(f"ibma: error: {line}", file=sys.stderr)
        return 2
    raise exc


if __name__ == "__main__":
    raise SystemExit(main())
