"""The run store, grids of runs, and the driver behind `ibma reproduce`.

Three layers, each usable alone:

- `code_hash`, `config_hash`: what a result depends on, as short hashes;
- `RunStore`, `run_grid`: one small JSON file per run, nothing finished is run twice, a failure is a visible hole;
- `plan`, `reproduce`: the notebooks of `nbs/6_reproduction` with the parameters of a profile, through papermill.

Importing this module costs nothing but the standard library: pandas, joblib, papermill and PyYAML are imported where they are used.
"""
from __future__ import annotations

import ast
import csv
import difflib
import dis
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DATA_KINDS", "Page", "ReproductionError", "RunFailed", "RunStore", "TimeLimitExceeded", "code_hash", "config_hash", "makers", "parameters_of",
           "plan", "reproduce", "run_grid"]

PACKAGE = Path(__file__).resolve().parent
DATA_KINDS = ("paper", "open", "simulated", "stand-in", "user")
RESERVED = ("data_kind", "device", "status", "error", "duration_s", "key")   # columns of a table besides configuration and metrics
NOTEBOOKS = "nbs/6_reproduction"
STORES = {"cpu": "results", "paper": "results"}                             # any other profile: .runs/<profile>
DRIVEN = ("profile", "store", "jobs")                                       # parameters that `reproduce` itself fills in
LEDGER = "IBMA_LEDGER"                                                      # file in which a notebook's grids note what they wrote


class RunFailed(RuntimeError):
    """A run of a grid failed and `on_error="raise"` was asked for; the failure is recorded in the store."""


class TimeLimitExceeded(RuntimeError):
    """A run took longer than the grid's `time_limit`."""


class ReproductionError(RuntimeError):
    """A notebook, or a run inside one, failed; the message names notebook, cell and error."""


def _need(module):
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise ImportError(f'{module} cannot be imported ({exc}); it comes with: pip install "ibma[book]"') from exc


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _close(name, known):
    """` (did you mean 'x'? known: x, y)`: the tail of every message about an unknown name."""
    known = sorted(known)
    match = difflib.get_close_matches(str(name), known, n=1)
    return f" ({f'did you mean {match[0]!r}? ' if match else ''}known: {', '.join(known) or 'none'})"


def _write_atomically(path, text):
    """A reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- what a result depends on

class _Strip(ast.NodeTransformer):
    """Drops what cannot change a result: docstrings (and other bare strings), and the package's version number."""

    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else self.generic_visit(node)

    def visit_Assign(self, node):
        is_version = any(isinstance(target, ast.Name) and target.id == "__version__" for target in node.targets)
        return None if is_version else self.generic_visit(node)


def _canonical(node):
    """Text form of a syntax tree. `ast.dump` and `ast.unparse` change between Python versions (new empty fields, quoting);
    leaving empty fields out keeps one code at one hash on all of them."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if name not in ("kind", "type_comment"))
        inside = ",".join(f"{name}={_canonical(value)}" for name, value in fields if value is not None and value != [])
        return f"{type(node).__name__}({inside})"
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    return repr(node)


@functools.lru_cache(maxsize=2048)
def _parsed(path, stamp):
    """(canonical text, import statements) of a source file; `stamp` makes an edited file a new entry."""
    source = Path(path).read_text(encoding="utf-8")
    try:
        tree = ast.parse(source)
    except SyntaxError:              # half-edited: any further edit counts as a change
        return source, ()
    imports = tuple(node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))
    return _canonical(_Strip().visit(tree)), imports


def _parse(path):
    status = path.stat()
    return _parsed(str(path), (status.st_mtime_ns, status.st_size))


def _module_file(name, root):
    path = root.joinpath(*name.split("."))
    return next((file for file in (path / "__init__.py", path.parent / f"{path.name}.py") if file.is_file()), None)


def _reached(name, file, imports, root):
    """Modules of the same package that `name` imports by statement. A package's `__init__` counts where a name is taken from it,
    not because it is passed on the way to a submodule: else a new entry in a registry would invalidate every result."""
    for node in imports:
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            base = node.module or ""
            if node.level:           # relative, as nbdev writes them: one level is the package that holds the module
                parts = name.split(".")
                parts = parts[:len(parts) - node.level + (file.name == "__init__.py")]
                base = ".".join(parts + ([base] if base else []))
            found = [sub if _module_file(sub, root) else base for sub in (f"{base}.{alias.name}" for alias in node.names)]
        for module in found:
            if module.split(".")[0] == name.split(".")[0] and _module_file(module, root):
                yield module


def _function_text(function):
    if not (inspect.isroutine(function) or inspect.isclass(function)):
        function = type(function)    # a callable object: the code is its class's
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError) as exc:
        raise ValueError(f"the source of {function!r} cannot be read, so its results cannot be keyed; "
                         "define it in a module or in a notebook cell") from exc
    try:
        return _canonical(_Strip().visit(ast.parse(source)))
    except SyntaxError:              # a lambda's source is the line it stands on, which need not parse by itself
        return source


def _named(code):
    """Global names that a code object and those inside it load; attributes of the same name are none."""
    names, codes = set(), [code]
    while codes:
        code = codes.pop()
        names.update(i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
        codes.extend(const for const in code.co_consts if inspect.iscode(const))
    return names


def _functions(item):
    """The functions of Python code behind a function, class, partial, wrapped function, static or class method or property; [] for anything else."""
    while isinstance(item, functools.partial):
        item = item.func
    item = getattr(item, "__func__", item)
    if isinstance(item, property):
        return [f for f in (item.fget, item.fset, item.fdel) if f is not None]
    if inspect.isclass(item):
        return [f for value in vars(item).values() if not inspect.isclass(value) for f in _functions(value)]
    item = inspect.unwrap(item) if callable(item) else item
    return [item] if inspect.isfunction(item) else []


def _texts_of(item, space, texts, seen, label=None):
    """Add what an item of a notebook is made of to `texts`: source, or plain data and arrays; follows what it uses. Other objects have no text and do not count."""
    if id(item) in seen or inspect.ismodule(item):
        return
    if inspect.isclass(item) or _functions(item):
        seen.add(id(item))
        if not inspect.isclass(item) and isinstance(item, functools.partial):
            _texts_of([*item.args, *item.keywords.items()], space, texts, seen, label)
        found = _functions(item)
        if inspect.isclass(item):
            bases = [base for base in item.__bases__ if base is not object]
            texts[f"class {item.__qualname__}"] = f"({', '.join(base.__qualname__ for base in bases)})"
            data = {name: value for name, value in vars(item).items() if not name.startswith("__") and not _functions(value) and not inspect.isclass(value)}
            if "__annotations__" in vars(item):
                data["annotations"] = {name: str(kind) for name, kind in vars(item)["__annotations__"].items()}
            _texts_of(data, space, texts, seen, f"class {item.__qualname__}.")
            for base in bases:
                if base.__module__ == item.__module__:
                    _texts_of(base, space, texts, seen)
        for function in found:
            if function.__module__ != space["__name__"] or function.__code__.co_filename.startswith("<string"):   # a library's, or generated as by dataclass
                continue
            text = _function_text(function)
            texts[f"function {_digest(text)}"] = text
            _texts_of([function.__defaults__, function.__kwdefaults__], space, texts, seen, f"defaults of {function.__qualname__}")
            for name in sorted(_named(function.__code__) & set(space)):
                _texts_of(space[name], space, texts, seen, name)
    elif isinstance(item, (dict, list, tuple, set, frozenset)):
        parts = list(item.items()) if isinstance(item, dict) else sorted(item, key=repr) if isinstance(item, (set, frozenset)) else list(item)
        texts[f"constant {label}"] = f"{type(item).__name__} of {len(parts)}"
        for n, part in enumerate(parts):
            where = f"{label}[{part[0]!r}]" if isinstance(item, dict) else f"{label}[{n}]"
            _texts_of(part[1] if isinstance(item, dict) else part, space, texts, seen, where)
    elif item is None or isinstance(item, (bool, int, float, complex, str, bytes, Path)):
        texts[f"constant {label}"] = repr(item)
    elif callable(getattr(item, "tobytes", None)):
        texts[f"constant {label}"] = f"{getattr(item, 'dtype', '')} {getattr(item, 'shape', '')} {hashlib.sha256(item.tobytes()).hexdigest()}"


def _with_helpers(function):
    """{label: text} of a function and of what it uses from the notebook or script that defines it: functions, classes, plain data."""
    texts, seen = {}, set()
    found = _functions(function) or _functions(type(function))
    if not found:
        text = _function_text(function)
        return {f"function {_digest(text)}": text}
    _texts_of(function if _functions(function) else type(function), {"__name__": found[0].__module__, **found[0].__globals__}, texts, seen, "run")
    return texts or {"function": _function_text(function)}


def code_hash(*depends_on, root=None):
    """Hash (12 hex digits) of the code that a run depends on.

    depends_on: names of modules ("ibma.training"), followed through their `import` statements inside the same package, and functions
        (a function of a module counts as that module, one of a notebook as its own source, that of the functions and classes of the
        notebook which it uses, and the plain data and arrays among them).
    root: folder that holds the package; by default the installed `ibma` is read.

    Docstrings, comments, layout and the version number do not count. What is imported by a string (`importlib`) is not followed:
    name it. Raises ValueError for a module that does not exist.
    """
    root = PACKAGE.parent if root is None else Path(root)
    todo, texts = [], {}
    for item in depends_on:
        while isinstance(item, functools.partial):
            item = item.func
        name = item if isinstance(item, str) else getattr(item, "__module__", None) or ""
        if isinstance(item, str) or name.split(".")[0] == PACKAGE.name:
            if not _module_file(name, root):
                raise ValueError(f"no module {name!r} to hash{_close(name, _all_modules(root, name.split('.')[0]))}")
            todo.append(name)
        else:
            texts |= _with_helpers(item)
    while todo:
        name = todo.pop()
        if name not in texts:
            file = _module_file(name, root)
            texts[name], imports = _parse(file)
            todo.extend(_reached(name, file, imports, root))
    return _digest("\n".join(f"{name}\n{texts[name]}" for name in sorted(texts)))


def _all_modules(root, top):
    files = (file.relative_to(root) for file in (root / top).rglob("*.py"))
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files}


def _package_hash(root):
    """Hash of every module of the package: a notebook is executed again when any of them changes."""
    package = root / PACKAGE.name if (root / PACKAGE.name).is_dir() else PACKAGE
    return _digest("\n".join(f"{file.relative_to(package).as_posix()}\n{_parse(file)[0]}" for file in sorted(package.rglob("*.py"))))


SHOWN = ("results", "book/reference")  # folders whose files pages show beside their own runs


def _shown_hash(root, store):
    """Hash of the files that pages may show: committed tables and pictures, numbers of papers. Not of the store that the pages write to."""
    folders = [root / name for name in SHOWN if (root / name).resolve() != (root / store).resolve()]
    files = sorted(file for folder in folders if folder.is_dir() for file in folder.iterdir() if file.is_file())
    return _digest("\n".join(f"{file.relative_to(root).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files))


def _check_json(value, where):
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: the key {key!r} is a {type(key).__name__}; JSON keys are strings")
            _check_json(item, f"{where}.{key}" if where != "config" else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: {value} has no JSON form; use None or a string")
    elif not (value is None or isinstance(value, (str, int))):
        raise TypeError(f"{where}: {type(value).__name__} is no JSON type; use bool, int, float, str, None, list or dict")


def config_hash(config):
    """Hash (12 hex digits) of a configuration: canonical JSON, so the order of keys does not matter.

    Raises TypeError naming the key where a value is not a plain JSON type (a tuple or NumPy scalar would not come back as it was),
    ValueError where a float is not finite.
    """
    if not isinstance(config, dict):
        raise TypeError(f"config: a dict is needed, not a {type(config).__name__}")
    _check_json(config, "config")
    return _digest(json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False))


# ---------------------------------------------------------------- one file per run

def _hide_paths(text):
    """Absolute paths become `.../name`: records are committed and read elsewhere."""
    return re.sub(r"(?<![\w.:/\\])(?:[A-Za-z]:[\\/]|/)(?:[^\s\\/:'\"<>|]+[\\/])+([^\s\\/:'\"<>|,;)]*)", r".../\1", text)


def _describe_error(exc):
    def where(filename):
        path = Path(filename)
        if "ipykernel_" in filename:          # a cell's file name holds the process number
            return "<notebook>"
        if path.is_relative_to(PACKAGE.parent):
            path = path.relative_to(PACKAGE.parent)
        return path.as_posix().split("site-packages/")[-1] if not path.is_absolute() or "site-packages" in path.parts else path.name

    frames = [frame for frame in traceback.extract_tb(exc.__traceback__) if frame.filename != __file__][-4:]
    tail = [_hide_paths(f"{where(frame.filename)}:{frame.lineno} in {frame.name}: {frame.line}") for frame in frames]
    return {"type": type(exc).__name__, "message": _hide_paths(str(exc))[:2000], "traceback": tail}


def _one_line(error):
    message = " ".join(error["message"].split())
    return f"{error['type']}: {message[:157]}{'...' if len(message) > 157 else ''}" if message else error["type"]


def _clean_metrics(metrics):
    if not isinstance(metrics, dict) or not metrics:
        raise TypeError(f"run must return a dict of metrics, not {metrics!r:.80}")
    clean = {}
    for name, value in metrics.items():
        try:
            if not isinstance(name, str) or isinstance(value, (str, bytes)):
                raise TypeError
            clean[name] = float(value)        # ints, NumPy scalars and 0-d tensors as well
        except (TypeError, ValueError):
            raise TypeError(f"metric {name!r} must be one number under a string name, not a {type(value).__name__}") from None
        if not math.isfinite(clean[name]):
            raise ValueError(f"metric {name!r} is {clean[name]}; leave out what is undefined")
    return clean


def _commit():
    """(HEAD, dirty) of the checkout the package is imported from; (None, None) for an installed package or without git."""
    def git(*args):
        return subprocess.run(["git", "-C", str(PACKAGE.parent), *args], capture_output=True, text=True, timeout=20, check=True).stdout
    try:
        top, head = git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != PACKAGE.parent:      # an environment inside somebody else's repository
            return None, None
        return head, bool(git("status", "--porcelain", "--", PACKAGE.name).strip())
    except (OSError, ValueError, subprocess.SubprocessError):
        return None, None


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _no_constant(text):
    raise ValueError(f"{text} is no number")


def _is_record(record, key):
    try:
        finished = record["status"] == "finished"
        return (record["key"] == key and record["status"] in ("finished", "failed") and isinstance(record["seed"], int)
                and record["config_hash"] == config_hash(record["config"]) and bool(record["code_hash"]) and "data_kind" in record
                and bool(record["metrics"]) == finished and bool(record["error"]) != finished
                and all(isinstance(value, float) for value in record["metrics"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _read_record(path):
    """The record in a file, or None where it is unreadable: truncated, edited by hand into nonsense, or under another's name."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (OSError, ValueError):
        return None
    return record if _is_record(record, path.stem) else None


def _note(path, status="finished"):
    """Tell the driving `reproduce`, if there is one, which file this notebook answers for."""
    if os.environ.get(LEDGER):
        with open(os.environ[LEDGER], "a", encoding="utf-8") as file:
            file.write(json.dumps([str(Path(path).resolve()), status]) + "\n")


class RunStore:
    """A folder of runs, `<folder>/<table>/<key>.json`: small, sorted, made for git.

    A record holds table, key, config, config_hash, code_hash, seed, commit, dirty, device, data_kind, versions, metrics (finite floats),
    first_metric, status ("finished" or "failed"), error and duration_s. A file that cannot be read is reported by a warning that
    names it, and counts as not done.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def __repr__(self):
        return f"RunStore({str(self.folder)!r})"

    def path(self, table, key):
        """File of one run. Raises ValueError for a table name that is no plain folder name."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", table) or table == "notebooks":
            raise ValueError(f"table {table!r}: letters, digits, '_', '-' and '.', and not 'notebooks' (executed notebooks lie there)")
        return self.folder / table / f"{key}.json"

    def tables(self):
        """Names of the tables, sorted."""
        folders = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(f.name for f in folders if f.is_dir() and f.name != "notebooks" and f.name[0] != "." and any(f.glob("*.json")))

    def get(self, key, table=None):
        """The record of a key (in any table, unless one is named), or None."""
        tables = self.tables() if table is None else [table]
        paths = [path for path in (self.path(name, key) for name in tables) if path.is_file()]
        return self._read(paths[0]) if paths else None

    def write(self, record):
        """Write a record atomically and return its path. Raises ValueError for one that would not be readable again."""
        path = self.path(record["table"], record["key"])
        text = json.dumps(record, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        if not _is_record(record, path.stem):
            raise ValueError(f"run record {record['table']}/{record['key']}: fields are missing or contradict each other")
        _write_atomically(path, text + "\n")
        return path

    def records(self, table, warn=True):
        """All readable records of a table, ordered by configuration, the seed last."""
        records = [record for record in map(self._read if warn else _read_record, self._files(table)) if record]
        return sorted(records, key=lambda r: (_order(r["config"]), r["code_hash"]))

    def unreadable(self, table):
        """Names of the files of a table that hold no valid record."""
        return [path.name for path in self._files(table) if _read_record(path) is None]

    def to_frame(self, table, keys=None):
        """Data frame with one row per run: configuration, metrics, then status, error and the like. Failed runs have empty metrics.

        keys: only these runs (such as the `key` column that `run_grid` returns); by default all that lie in the folder, also
            those of configurations no longer in use.
        """
        return _frame(self._chosen(table, keys))

    def to_csv(self, table, path=None, keys=None):
        """Write `to_frame` as CSV (by default `<folder>/<table>.csv`): same runs, same bytes; floats round-trip."""
        columns, rows = _rows(self._chosen(table, keys))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: repr(value) if isinstance(value, float) else value for name, value in row.items()} for row in rows)
        path = self.folder / f"{table}.csv" if path is None else Path(path)
        _write_atomically(path, text.getvalue())
        _note(path)
        return path

    def _files(self, table):
        return sorted(path for path in self.path(table, "_").parent.glob("*.json") if path.name[0] != ".")

    def _chosen(self, table, keys):
        records = self.records(table)
        if keys is None:
            return records
        keys = set(keys)
        missing = keys - {record["key"] for record in records}
        if missing:
            raise KeyError(f"table {table!r} has no run {', '.join(sorted(missing))}")
        return [record for record in records if record["key"] in keys]

    def _read(self, path):
        record = _read_record(path)
        if record is None:
            warnings.warn(f"run record {path.parent.name}/{path.name} is unreadable and counts as not done", stacklevel=3)
        return record


def _order(config):
    """Sort key of a configuration: numbers as numbers (seed 2 before 10), everything else by its JSON text."""
    def rank(value):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (0, value, "") if number else (1, 0, value if isinstance(value, str) else json.dumps(value, sort_keys=True))
    return [(name == "seed", name, rank(config[name])) for name in sorted(config, key=lambda name: (name == "seed", name))]


def _rows(records):
    """(columns, rows) of a table; a nested configuration value is shown as JSON, a metric named like another column as `metric_...`."""
    config = sorted({name for r in records for name in r["config"]}, key=lambda name: (name == "seed", name))
    taken = {*config, *RESERVED}
    metrics = {name: f"metric_{name}" if name in taken else name for name in sorted({name for r in records for name in r["metrics"]})}
    rows = []
    for record in records:
        row = {name: json.dumps(value, sort_keys=True) if isinstance(value, (list, dict)) else value
               for name, value in record["config"].items() if value is not None}
        row.update({metrics[name]: value for name, value in record["metrics"].items()})
        row.update({name: record[name] for name in RESERVED if name != "error"})
        rows.append(row | {"data_kind": record["data_kind"] or "", "error": _one_line(record["error"]) if record["error"] else ""})
    return [*config, *metrics.values(), *RESERVED], rows


def _frame(records):
    columns, rows = _rows(records)
    return _need("pandas").DataFrame(rows, columns=columns)


# ---------------------------------------------------------------- a grid of runs

@contextmanager
def _time_limit(seconds):
    """Raise TimeLimitExceeded in the code inside once `seconds` are over (a call into C is interrupted when it returns)."""
    if seconds is None:
        yield
    elif threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        def stop(number, frame):
            raise TimeLimitExceeded(f"the run took longer than {seconds:g} s")
        previous = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
    else:                            # a thread of a cluster's worker, or Windows
        import ctypes

        thread = threading.get_ident()

        def throw(kind):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind) if kind else None)
        timer = threading.Timer(seconds, throw, (TimeLimitExceeded,))
        timer.daemon = True
        timer.start()
        try:
            yield
        except TimeLimitExceeded:    # raised from outside, it has no words of its own
            raise TimeLimitExceeded(f"the run took longer than {seconds:g} s") from None
        finally:
            timer.cancel()
            throw(None)


def _no_outcome():
    return {"metrics": {}, "error": None, "data_kind": None, "device": None, "guarantee": None, "exception": None}


def _outcome_of(result):
    """What a run returned, checked."""
    outcome = _no_outcome()
    if isinstance(result, dict) and isinstance(result.get("metrics"), dict):
        unknown = set(result) - {"metrics", "data_kind", "device", "guarantee"}
        if unknown:
            raise ValueError(f"run returned {sorted(unknown)} beside its metrics; allowed are data_kind, device and guarantee")
        device = result.get("device")
        outcome.update(data_kind=result.get("data_kind"), device=None if device is None else str(device), guarantee=result.get("guarantee"))
        result = result["metrics"]
    if outcome["data_kind"] not in (None, *DATA_KINDS):
        raise ValueError(f"data_kind {outcome['data_kind']!r}{_close(outcome['data_kind'], DATA_KINDS)}")
    return outcome | {"metrics": _clean_metrics(result)}


def _attempt(index, run, config, keep_exception, time_limit=None, notes=None):
    """Run one configuration and say what came out; every Exception becomes part of the outcome. Also runs in a worker process.

    notes: folder where a worker leaves word of what it began and finished, in case another one takes the pool down with it.
    """
    _leave_word(notes, f"{index}.begun", "")
    start, outcome = time.perf_counter(), _no_outcome()
    try:
        with _time_limit(time_limit):
            result = run(json.loads(json.dumps(config)))     # a copy: what is recorded is what was asked for
        outcome = _outcome_of(result)
    except Exception as exc:                             # not BaseException: Ctrl-C must stop the grid
        outcome.update(error=_describe_error(exc), exception=exc if keep_exception else None)
    outcome["duration_s"] = round(time.perf_counter() - start, 3)
    if notes:
        _leave_word(notes, f"{index}.json", json.dumps(outcome))
    return index, outcome


def _leave_word(folder, name, text):
    if folder and Path(folder).is_dir():                 # not there: a worker on another machine
        with suppress(OSError):                          # a full disk: the word is only needed when a worker dies
            _write_atomically(Path(folder) / name, text)


LOST = ("BrokenProcessPool", "TerminatedWorkerError", "KilledWorker", "WorkerCrashedError")   # what loky, Dask and Ray raise


def _parallel(backend, n_jobs):
    """A configured `joblib.Parallel`."""
    joblib = _need("joblib")
    if backend == "dask":
        distributed = _need("distributed")
        try:
            distributed.get_client()
        except ValueError:
            address = os.environ.get("IBMA_SCHEDULER")
            if not address:
                raise RuntimeError("backend 'dask' needs a cluster: create a distributed.Client first, or set IBMA_SCHEDULER to its address") from None
            distributed.Client(address)
    elif backend == "ray":
        importlib.import_module("ray.util.joblib").register_ray()
    n_jobs = -1 if backend in ("dask", "ray") and n_jobs == 1 else n_jobs      # a cluster knows how many it has
    context = joblib.parallel_config(backend=backend) if backend else nullcontext()
    return context, joblib.delayed, joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered", pre_dispatch="2*n_jobs")


def _outcomes(run, configs, todo, n_jobs, backend=None, time_limit=None):
    """(index, outcome) of every configuration of the iterator `todo`, as they come.

    A worker that is killed (out of memory, say) breaks the whole pool. What was finished is kept, what had not begun is done in a new
    pool, and of those under way each is tried once more alone: the one that breaks its pool again is a failure.
    """
    if n_jobs == 1 and backend in (None, "loky"):
        yield from (_attempt(i, run, configs[i], True, time_limit) for i in todo)
        return
    notes = tempfile.mkdtemp(prefix="ibma-grid-")
    try:
        alone, handed_out, todo = [], [], iter(todo)
        while True:
            def tasks(source, delayed):
                for i in source:
                    handed_out.append(i)
                    yield delayed(_attempt)(i, run, configs[i], False, time_limit, notes)

            context, delayed, parallel = _parallel(backend, 2 if alone and backend in (None, "loky") else n_jobs)
            try:
                with context:
                    for i, outcome in parallel(tasks(alone[:1] or todo, delayed)):
                        handed_out.remove(i)
                        yield i, outcome
            except Exception as exc:
                if type(exc).__name__ not in LOST:
                    raise
                if "un-serialize" in str(exc):           # no run was begun: the function itself cannot travel
                    raise TypeError("the function of the runs cannot be sent to another process: something that it uses from the notebook "
                                    "cannot be pickled, such as a function under functools.cache; use n_jobs=1, or take that away") from exc
                for i in list(handed_out):
                    word = Path(notes) / f"{i}.json"
                    if word.exists():                    # finished, but its result was on the way when the pool broke
                        handed_out.remove(i)
                        yield i, json.loads(word.read_text())
                if alone:
                    error = {"type": "WorkerKilled", "message": "the process running it was killed (out of memory?), twice", "traceback": []}
                    for i in [i for i in handed_out if i == alone[0]]:
                        handed_out.remove(i)
                        yield i, {"metrics": {}, "error": error, "data_kind": None, "device": None, "guarantee": None, "exception": None, "duration_s": 0.0}
                else:
                    begun = [i for i in handed_out if (Path(notes) / f"{i}.begun").exists()] or list(handed_out)
                    idle = [i for i in handed_out if i not in begun]
                    alone = [None, *begun]               # the None is dropped below
                    todo = itertools.chain(idle, todo)
                    for i in handed_out:
                        (Path(notes) / f"{i}.begun").unlink(missing_ok=True)
                    handed_out.clear()
            else:
                if not alone:
                    return
            alone = alone[1:]
    finally:
        shutil.rmtree(notes, ignore_errors=True)


def _outcomes_together(run, together, configs, todo, differ, time_limit=None):
    """(index, outcome) of every configuration of `todo`: groups that are equal but for the names in `differ` by one call of `together`."""
    groups = {}
    for i in todo:
        groups.setdefault(config_hash({name: value for name, value in configs[i].items() if name not in differ}), []).append(i)
    for group in groups.values():
        if len(group) == 1:
            yield _attempt(group[0], run, configs[group[0]], True, time_limit)
            continue
        start = time.perf_counter()
        try:
            with _time_limit(None if time_limit is None else time_limit * len(group)):
                results = together(json.loads(json.dumps([configs[i] for i in group])))
            if len(results) != len(group):
                raise ValueError(f"{len(results)} results of {len(group)} runs")
            found = [_outcome_of(result) for result in results]
        except Exception as exc:
            warnings.warn(f"{len(group)} runs together failed ({_one_line(_describe_error(exc))}): they are run one by one", RuntimeWarning, stacklevel=3)
            yield from (_attempt(i, run, configs[i], True, time_limit) for i in group)
            continue
        shared = {"duration_s": round((time.perf_counter() - start) / len(group), 3), "together": len(group)}
        yield from ((i, outcome | shared) for i, outcome in zip(group, found, strict=True))


@contextmanager
def _claims():
    """A function that claims a run, so that several processes on this machine can share a store without doing a run twice."""
    filelock = _need("filelock")
    held = {}

    def claim(path, wait=False):
        name = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:24]
        folder = Path(tempfile.gettempdir()) / f"ibma-locks-{os.getuid() if hasattr(os, 'getuid') else 0}"
        lock = filelock.FileLock(folder / f"{name}.lock", timeout=-1 if wait else 0, thread_local=False)   # joblib asks from another thread
        try:
            folder.mkdir(exist_ok=True)
            lock.acquire()
        except filelock.Timeout:
            return False
        except OSError:              # no place for locks: at worst a run is done twice
            return True
        held[path] = lock
        return True

    def let_go(path):
        if path in held:
            held.pop(path).release()
    try:
        yield claim, let_go
    finally:
        for path in list(held):
            let_go(path)


def _labels(configs):
    """Short names for the terminal: string values, whatever else differs within the grid, and the seed."""
    varying = {name for name in {n for c in configs for n in c} - {"seed"} if len({json.dumps(c.get(name)) for c in configs}) > 1}
    labels = []
    for config in configs:
        words = [value if isinstance(value, str) else f"{name}={json.dumps(value)}" for name, value in config.items()
                 if name != "seed" and (isinstance(value, str) or name in varying)]
        labels.append(" ".join([*words, f"seed={config['seed']}"]))
    return labels


def _result_text(record):
    if record["error"]:
        return f"failed, {_one_line(record['error'])}"
    value = record["metrics"][record["first_metric"]]
    return f"{record['first_metric']} {value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{record['first_metric']} {value:.3g}"


def _check_grid(configs):
    hashes = {}
    for i, config in enumerate(configs):
        this = config_hash(config)
        if this in hashes:
            raise ValueError(f"configurations {hashes[this]} and {i} are the same: {config}")
        hashes[this] = i
        if not isinstance(config.get("seed"), int) or isinstance(config["seed"], bool):
            raise ValueError(f"configuration {i} needs an int 'seed': {config}")
        clash = set(config) & set(RESERVED)
        if clash:
            raise ValueError(f"configuration {i}: {', '.join(sorted(clash))} names a column of every table; choose another name")
    return list(hashes)


def run_grid(store, table, configs, run, *, depends_on=(), data_kind=None, progress=True, n_jobs=1, on_error="record",
             backend=None, time_limit=None, adopt=None, together=None, differ=("seed",)):
    """Run every configuration that is not finished yet, and return the data frame of exactly these configurations, in their order.

    store: `RunStore` or folder; table: name of the table, one grid owns it.
    configs: dicts of JSON values, each with an int "seed".
    run: config -> dict of metrics (finite numbers), or {"metrics": ..., "data_kind": ..., "device": ..., "guarantee": `Result.guarantee`}.
    depends_on: modules (and functions) whose code the results depend on, see `code_hash`; or a function of a configuration that
        returns them, so that an edit of one method leaves the others' results alone. The source of `run` always counts.
    data_kind: where the data come from, one of `DATA_KINDS`, for runs that do not say it themselves.
    n_jobs: processes (joblib); on_error: "record" a failure and go on, or record it and "raise" RunFailed.
    backend: "loky" (processes here), "dask" (the current distributed.Client, or the scheduler at IBMA_SCHEDULER) or "ray"; None: IBMA_BACKEND,
        else what `joblib.parallel_config` says. time_limit: seconds per run, after which it counts as failed.

    adopt: number of finished runs under older code to repeat, of each group that shares old and new code; where all of them give the same
        metrics again (times aside), the others are taken over under the new key and say so (`adopted`). None: IBMA_ADOPT, else 0.

    together: function of a list of configurations that returns what `run` returns for each, for runs that are faster at once, such as seeds
        with `ibma.many.fit_many`. It gets those that are to be run and are equal but for the names in `differ`; where it raises, a warning
        says so and they are run one by one. Records say how many ran together. In this process only.

    A run is keyed by configuration and code: finished ones are kept, failed ones are tried again, and a finished run replaces the
    record of the same configuration under older code. Several processes may work on one store: each run is done by one of them. A worker
    that is killed is a failure of its run alone. Raises ValueError for duplicates, a missing seed or an unknown option, OSError where the
    store cannot be written, before the first run; where it fills up later, after the last, with the results that found no place.
    """
    backend = backend or os.environ.get("IBMA_BACKEND") or None
    if backend not in (None, "loky", "dask", "ray"):
        raise ValueError(f"backend {backend!r}{_close(backend, ['loky', 'dask', 'ray'])}")
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit must be positive, got {time_limit}")
    if on_error not in ("record", "raise"):
        raise ValueError(f"on_error {on_error!r}{_close(on_error, ['record', 'raise'])}")
    if data_kind not in (None, *DATA_KINDS):
        raise ValueError(f"data_kind {data_kind!r}{_close(data_kind, DATA_KINDS)}")
    if together is not None and (n_jobs != 1 or backend not in (None, "loky")):
        raise ValueError("runs that go together are run in this process: leave n_jobs and backend, or leave together")
    store = store if isinstance(store, RunStore) else RunStore(store)
    configs = list(configs)
    hashes = _check_grid(configs)
    modules = [depends_on(config) if callable(depends_on) else depends_on for config in configs]
    modules = [(names,) if isinstance(names, str) else tuple(names) for names in modules]
    codes = {used: code_hash(run, *([together] if together else []), *used) for used in set(modules)}
    keys = [_digest(f"{hashes[i]}-{codes[modules[i]]}") for i in range(len(configs))]
    labels, width = _labels(configs), len(str(len(configs)))
    records, older, place = {}, {}, {key: i for i, key in enumerate(keys)}
    for record in store.records(table):
        older.setdefault(record["config_hash"], []).append(record)
        if record["key"] in place and record["status"] == "finished":
            records[place[record["key"]]] = record

    shown = iter(range(1, len(configs) + 1))

    def report(i, note):
        _note(store.path(table, keys[i]), records[i]["status"])
        if progress:
            print(f"[{next(shown):{width}}/{len(configs)}] {labels[i]}: {_result_text(records[i])} ({note})", flush=True)

    for i in sorted(records):
        report(i, "kept")
    todo = [i for i in range(len(configs)) if i not in records]
    if todo:
        head, dirty = _commit()
        versions = {"ibma": getattr(sys.modules.get(PACKAGE.name), "__version__", None), "python": platform.python_version(),
                    "torch": _version("torch")}
        _check_writable(store, table)
    began, homeless = time.perf_counter(), []

    def keep(i, outcome):
        exception = outcome.pop("exception")
        records[i] = {
            **outcome, "table": table, "key": keys[i], "config": configs[i], "config_hash": hashes[i], "code_hash": codes[modules[i]],
            "seed": configs[i]["seed"], "commit": head, "dirty": dirty, "versions": versions, "device": outcome["device"] or "cpu",
            "data_kind": outcome["data_kind"] or data_kind, "status": "failed" if outcome["error"] else "finished",
            "first_metric": next(iter(outcome["metrics"]), None)}
        try:
            store.write(records[i])
        except OSError as exc:                           # the other runs may still find place; what does not is told at the end
            homeless.append((i, exc))
        else:
            for past in older.get(hashes[i], ()):        # the same configuration under older code; a number outlives a failure
                if past["key"] != keys[i] and (past["status"] == "failed" or not outcome["error"]):
                    store.path(table, past["key"]).unlink(missing_ok=True)
        report(i, f"{outcome['duration_s']:.1f} s{_time_left(began, len(records) - len(configs) + len(todo), len(todo))}")
        if outcome["error"] and on_error == "raise":
            raise RunFailed(f"{table}, {labels[i]}: {_one_line(outcome['error'])}") from exception

    adopt = int(os.environ.get("IBMA_ADOPT", "0")) if adopt is None else adopt
    groups = _groups_of_older([(i, older.get(hashes[i], ()), codes[modules[i]]) for i in todo]) if adopt > 0 else {}
    samples = [i for group in groups.values() for i in list(group)[::max(1, len(group) // adopt)][:adopt]]
    todo = samples + [i for i in todo if i not in set(samples)]

    def take_over():
        """Records of groups whose sample gave the same numbers again."""
        for (_, code), group in groups.items():
            again = [i for i in group if i in records]
            if again and all(_same_metrics(records[i]["metrics"], group[i]["metrics"]) for i in again):
                for i, past in group.items():
                    if i not in records:
                        records[i] = past | {"key": keys[i], "code_hash": codes[modules[i]], "adopted": {"from_code": code, "repeated": len(again), "commit": head}}
                        store.write(records[i])
                        store.path(table, past["key"]).unlink(missing_ok=True)
                        report(i, f"taken over: {len(again)} of its kind gave the same again")

    busy = []
    with _claims() as (claim, let_go):
        def mine(indices, wait):
            """Those that no other process is at, and none has finished meanwhile."""
            for i in indices:
                path = store.path(table, keys[i])
                if not claim(path, wait):
                    busy.append(i)
                    continue
                record = _read_record(path)
                if record and record["status"] == "finished":
                    let_go(path)
                    records[i] = record
                    report(i, "done by another process")
                else:
                    yield i

        for part in (samples, todo):
            for indices, wait in (([i for i in part if i not in records], False), (busy, True)):
                mine_now = mine(list(indices), wait)
                for i, outcome in (_outcomes_together(run, together, configs, mine_now, differ, time_limit) if together
                                   else _outcomes(run, configs, mine_now, n_jobs, backend, time_limit)):
                    keep(i, outcome)
                    let_go(store.path(table, keys[i]))
            busy.clear()
            if part is samples:
                take_over()
    _house(store, records, homeless)
    return _frame([records[i] for i in range(len(configs))])


def _groups_of_older(candidates):
    """(new code, old code) -> {index: finished record under the old code}; only groups with something left to take over."""
    groups = {}
    for i, past, code in candidates:
        finished = [record for record in past if record["status"] == "finished"]
        if finished:
            groups.setdefault((code, finished[-1]["code_hash"]), {})[i] = finished[-1]
    return {key: group for key, group in groups.items() if len(group) > 1}


def _same_metrics(a, b):
    """Equal, apart from what a clock says."""
    timed = re.compile(r"second|_ms$|time")
    return all(a.get(name) == b.get(name) for name in a.keys() | b.keys() if not timed.search(name))


def _check_writable(store, table):
    try:
        _write_atomically(store.path(table, "_").parent / ".writable", "")
        (store.path(table, "_").parent / ".writable").unlink()
    except OSError as exc:
        raise OSError(exc.errno, f"the run store cannot be written ({exc.strerror or exc}): table {table!r}; nothing was run") from exc


def _house(store, records, homeless):
    """Try once more to write what found no place; else say the results, so that they are not lost."""
    lost = []
    for i, _ in homeless:
        try:
            store.write(records[i])
        except OSError as error:
            exc = error
            lost.append(f"{records[i]['key']} {json.dumps(records[i]['config'])}: {json.dumps(records[i]['metrics'] or records[i]['error']['type'])}")
    if lost:
        raise OSError(exc.errno, f"{len(lost)} run record(s) could not be written ({exc.strerror or exc}); earlier ones are kept. Make room and run again, "
                                 "or take the results from here:\n" + "\n".join(lost))


def _time_left(began, done, total):
    """`, about 3 min left` on a terminal, nothing elsewhere: logs stay the same from run to run."""
    if not sys.stdout.isatty() or done >= total:
        return ""
    seconds = (time.perf_counter() - began) / max(done, 1) * (total - done)
    return f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"


# ---------------------------------------------------------------- notebooks and profiles

@dataclass(frozen=True)
class Page:
    """One reproduction notebook with its parameters, ready to run."""
    name: str                # file name without .ipynb
    notebook: Path           # the source
    output: Path             # the executed copy
    parameters: dict         # what papermill injects
    key: str                 # hash of cells, parameters, package and the files that pages show

    @property
    def sidecar(self):
        return self.output.with_suffix(".json")

    @property
    def kept(self):
        """Already executed with this key, every file it wrote is still there, and no run of it failed."""
        try:
            past = json.loads(self.sidecar.read_text(encoding="utf-8"))
            return past["key"] == self.key and self.output.is_file() and all(
                status == "finished" and (_read_record(Path(path)) if path.endswith(".json") else Path(path).is_file())
                for path, status in past["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def recorded(self, root="."):
        """Runs and seconds of one process that the tables of this page took in this profile, from their CSV files; (0, 0.0) without records."""
        store = Path(root) / self.parameters.get("store", STORES["cpu"])
        code = "\n".join("".join(cell["source"]) for cell in json.loads(self.notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code")
        runs, seconds = 0, 0.0
        for table in sorted(set(re.findall(r"""to_csv\(\s*["']([^"']+)["']""", code))):
            try:
                with open(store / f"{table}.csv", newline="", encoding="utf-8") as file:
                    taken = [float(row["duration_s"]) for row in csv.DictReader(file) if row.get("duration_s") and (row.get("device") != "cpu" or self.parameters.get("profile") != "paper")]
            except (OSError, ValueError):
                continue
            runs, seconds = runs + len(taken), seconds + sum(taken)
        return runs, seconds


def _cells(notebook):
    """[(cell type, source, tags)] of a notebook: everything that makes it what it is, outputs and other metadata left out."""
    try:
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
        return [(cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in cells]
    except (ValueError, KeyError, TypeError) as exc:
        raise ValueError(f"{Path(notebook).name} is no readable notebook ({exc})") from exc


def _literal(path):
    """papermill formats paths with `str.format`: braces in a folder's name must survive that."""
    return str(path).replace("{", "{{").replace("}", "}}")


def parameters_of(notebook):
    """{name: {"default", "type", "help"}} of the cell tagged `parameters`; {} where there is none.

    Raises ValueError where a default is no literal, where papermill would overlook a parameter (it reads line by line, one
    `name: type = value  # help` each, and one `=` per line), or where the notebook names no kernel.
    """
    notebook = Path(notebook)
    source = next((source for kind, source, tags in _cells(notebook) if kind == "code" and "parameters" in tags), None)
    if source is None:
        return {}
    try:
        seen = _need("papermill").inspect_notebook(_literal(notebook))
    except ValueError as exc:
        raise ValueError(f"{notebook.name}: {exc} Set its kernel to python3 and save it") from exc
    parameters = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            name = ast.unparse(target)
            try:
                default = ast.literal_eval(node.value)
            except (ValueError, TypeError):
                raise ValueError(f"{notebook.name}: the default of parameter {name!r} must be a literal; "
                                 "compute derived values in the next cell") from None
            if name not in seen:
                raise ValueError(f"{notebook.name}: papermill does not see parameter {name!r}; "
                                 "write it alone on its line as `name: type = value  # help`, without a second '='")
            kind = seen[name]["inferred_type_name"]
            parameters[name] = {"default": default, "type": None if kind == "None" else kind, "help": seen[name]["help"]}
    return parameters


def _as_declared(value, default):
    """`value` in the type of `default` (an int passes for a float, a list for a tuple). Raises TypeError saying what is expected."""
    if default is None:
        return value
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        kinds = {type(item): item for item in default}
        return [_as_declared(item, next(iter(kinds.values()))) if len(kinds) == 1 else item for item in value]
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise TypeError(f"expected {type(default).__name__} (such as {default!r}), got {value!r}")
    return value


def _load_yaml(path):
    yaml = _need("yaml")

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            names = [key.value for key, _ in node.value]
            twice = {str(name) for name in names if names.count(name) > 1}
            if twice:                                   # YAML would silently take the last
                raise ValueError(f"{path.name}, line {node.start_mark.line + 1}: {', '.join(sorted(twice))} occurs twice")
            return super().construct_mapping(node, deep)

    # PyYAML reads 1e-3 as text (it wants 1.0e-3)
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except yaml.YAMLError as exc:
        raise ValueError(f"{path.name}: {' '.join(str(exc).split())}") from exc


def _checked(values, declared, where):
    """`values` in the types of the declared defaults; unknown names and other types raise, where papermill would only warn."""
    checked = {}
    for name, value in values.items():
        if name in DRIVEN:
            raise ValueError(f"{where}: {name!r} is filled in by `reproduce` and not set here")
        if name not in declared:
            raise ValueError(f"{where}: unknown parameter {name!r}{_close(name, set(declared) - set(DRIVEN))}")
        try:
            checked[name] = _as_declared(value, declared[name]["default"])
        except TypeError as exc:
            raise TypeError(f"{where}: parameter {name!r}: {exc}") from None
    return checked


def _profiles(path, declared):
    """{profile: {notebook: parameters}} of `profiles.yml`. All profiles are checked, so that the rarely run ones do not rot."""
    if not path.is_file():
        raise FileNotFoundError(f"{NOTEBOOKS}/{path.name} is missing: it names the profiles")
    profiles = _load_yaml(path)
    if not isinstance(profiles, dict):
        raise ValueError(f"{path.name}: a mapping of profiles is expected")
    for title, entries in profiles.items():
        where = f"{path.name}, profile {title!r}"
        for name, values in (entries or {}).items():
            if name not in declared:
                raise ValueError(f"{where}: no notebook {name!r}{_close(name, declared)}")
            if not isinstance(values or {}, dict):
                raise ValueError(f"{where}, {name}: a mapping of parameters is expected")
        profiles[title] = {name: _checked(values or {}, declared[name], f"{where}, {name}") for name, values in (entries or {}).items()}
    return profiles


def makers(root="."):
    """Table of results -> names of the notebooks in `nbs/6_reproduction` that run a grid of that name."""
    found = {}
    for path in sorted((Path(root) / NOTEBOOKS).glob("*.ipynb")):
        # either run_grid(RunStore(store), "name", ...), or the name with the function of its runs
        for name in re.findall(r'RunStore\(store\), \\"(\w+)\\"|\\"(\w+)\\": run_', path.read_text(encoding="utf-8")):
            found.setdefault(next(filter(None, name)), {})[path.stem] = None
    return {name: list(pages) for name, pages in found.items()}


def _artefacts(root):
    """Number of a table of the paper, "table2", "figure1" -> its page and the pages that make the runs that it is judged by."""
    def rows(name):
        path = Path(root) / "book" / "reference" / f"{name}.csv"
        return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))) if path.is_file() else []

    made_by, judged, found = makers(root), rows("tests"), {}
    for row in rows("pages"):
        kind, _, number = row["artefact"].partition(" ")
        if kind not in ("Table", "Figure") or not row["page"].startswith("6_reproduction/"):
            continue
        results = {test["results"] for test in judged if test["claim"] in row["tests"].split("|")}
        pages = {row["page"].split("/")[1], *(page for name in results for page in made_by.get(name, ()))}
        found |= {f"{kind.lower()}{number}": pages} | ({number: pages} if kind == "Table" else {})
    return found


def _select(tables, names, root="."):
    """Names of the notebooks to run: those that make runs come before those that only show them."""
    working = {page for pages in makers(root).values() for page in pages}
    names = sorted(names, key=lambda name: name not in working)
    if tables is None:
        return names
    short = {re.sub(r"^\d+_", "", name): {name} for name in names} | {name: {name} for name in names}
    short |= {name.removeprefix("table"): pages for name, pages in short.items() if re.fullmatch(r"table\d+", name)}     # "2": table2
    short |= _artefacts(root)
    for table in tables:
        if table not in short:
            raise ValueError(f"unknown table {table!r}{_close(table, short)}")
    chosen = set().union(*(short[table] for table in tables))
    return [name for name in names if name in chosen]


def plan(profile="smoke", tables=None, root=".", store=None, jobs=1, parameters=None):
    """What `reproduce` would run: a list of `Page`, every parameter checked. Nothing is executed.

    Raises ValueError for an unknown profile, notebook, table or parameter, TypeError for a value of another type than the
    parameter's default, FileNotFoundError where there is nothing to reproduce.
    """
    root = Path(root).resolve()
    folder = root / NOTEBOOKS
    paths = {path.stem: path for path in sorted(folder.glob("*.ipynb")) if path.name[0] not in "_."}
    if not paths:
        raise FileNotFoundError(f"no notebooks in {NOTEBOOKS}: run from the repository's root, or name that root (--root)")
    declared = {name: parameters_of(path) for name, path in paths.items()}
    profiles = _profiles(folder / "profiles.yml", declared)
    if profile not in profiles:
        raise ValueError(f"unknown profile {profile!r}{_close(profile, profiles)}")
    given, selected = parameters or {}, _select(tables, list(paths), root)
    known = {name for page in selected for name in declared[page]} - set(DRIVEN)
    for name in given:
        if name in DRIVEN:
            raise ValueError(f"{name!r} is an argument of `reproduce` itself, not of a notebook alone")
        if name not in known:
            raise ValueError(f"no notebook to be run has a parameter {name!r}{_close(name, known)}")
    driven = {"profile": profile, "store": str(STORES.get(profile, f".runs/{profile}") if store is None else store), "jobs": jobs}
    package, shown, pages = _package_hash(root), _shown_hash(root, driven["store"]), []
    for name in selected:
        values = profiles[profile].get(name, {}) | _checked({k: v for k, v in given.items() if k in declared[name]}, declared[name], name)
        values |= {key: value for key, value in driven.items() if key in declared[name]}
        counted = {key: value for key, value in values.items() if key != "jobs"}
        key = _digest(json.dumps([_cells(paths[name]), counted, package, shown], sort_keys=True))
        pages.append(Page(name, paths[name], root / ".runs" / profile / "notebooks" / f"{name}.ipynb", values, key))
    return pages


class _Relay:
    """What papermill takes for a file: passes a notebook's run lines (`[ 3/18] ...`) on and advances the bar."""
    run_line = re.compile(r"\[ *(\d+)/(\d+)\] ")

    def __init__(self, bar, say):
        self.bar, self.say, self.rest = bar, say, ""

    def write(self, text):
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            match = self.run_line.match(line)
            if match:
                if match[1] == "1":             # a new grid: so many more runs to come
                    self.bar.total = (self.bar.total or 0) + int(match[2])
                if line.endswith("(kept)") and not self.bar.disable:
                    self.bar.initial += 1       # no work of today's: left out of the time per run
                self.bar.update(1)
                self.say(line)

    def flush(self):
        """Nothing is held back but an unfinished line."""


@contextmanager
def _ledger(path):
    """Collects what the grids of the notebook executed meanwhile report: {file: status}, filled at the end."""
    files, before = {}, os.environ.get(LEDGER)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("", encoding="utf-8")
    os.environ[LEDGER] = str(path)       # the kernel inherits it
    try:
        yield files
    finally:
        os.environ.pop(LEDGER)
        if before is not None:
            os.environ[LEDGER] = before
        files.update(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        path.unlink()


def _failure(page, exc, executed, root):
    """Message for a notebook that stopped: cell, error and the end of the traceback."""
    # papermill marks a cell that ran out of time as completed: the last one started is the one
    cells = [cell for cell in _executed_cells(executed) if "injected-parameters" not in cell["metadata"].get("tags", [])]
    started = [i for i, cell in enumerate(cells, 1) if (cell["metadata"].get("papermill") or {}).get("start_time")]
    where = f"in cell {started[-1]} of {len(cells)}" if started else "before its first cell"
    tail = "\n".join(getattr(exc, "traceback", None) or [f"{type(exc).__name__}: {exc}"])
    lines = _hide_paths(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", tail)).strip().splitlines()
    error = f"{exc.ename}: {exc.evalue}" if hasattr(exc, "ename") else f"{type(exc).__name__}: {exc}".strip()
    return (f"{page.name} failed {where}: {_hide_paths(error).splitlines()[0]}\n"
            + textwrap.indent("\n".join(lines[-12:]), "    ") + f"\n    (as far as it came: {executed.relative_to(root)})")


def _executed_cells(path):
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return []
    return [cell for cell in cells if "papermill-error-cell-tag" not in cell["metadata"].get("tags", [])]


def _execute(page, root, relay, timeout):
    """Execute one notebook; returns {file: status} of what it wrote. Only a complete run ever gets the page's own name."""
    papermill = _need("papermill")
    running, failed = (page.output.with_name(f"{page.name}.{state}.ipynb") for state in ("running", "failed"))
    try:
        with _ledger(page.output.with_name(f"{page.name}.ledger")) as files:
            papermill.execute_notebook(
                _literal(page.notebook), _literal(running), parameters=page.parameters, kernel_name="python3", progress_bar=False,
                log_output=False, stdout_file=relay, cwd=str(root), execution_timeout=timeout,
                extra_arguments=["--log-level=CRITICAL"])     # the kernel's start-up warnings would land between the lines
    except BaseException as exc:
        if running.is_file():
            os.replace(running, failed)
        if not isinstance(exc, Exception):
            raise
        page.output.unlink(missing_ok=True)      # an older success would pass for this one's
        page.sidecar.unlink(missing_ok=True)
        raise ReproductionError(_failure(page, exc, failed, root)) from exc
    os.replace(running, page.output)
    failed.unlink(missing_ok=True)
    _write_atomically(page.sidecar, json.dumps({"key": page.key, "files": files}, sort_keys=True, indent=1) + "\n")
    return files


def reproduce(profile="smoke", tables=None, root=".", store=None, jobs=1, progress=True, parameters=None, timeout=None):
    """Execute the notebooks of `nbs/6_reproduction` with the parameters of a profile, and return one dict per notebook.

    profile: a key of `profiles.yml`; tables: only these notebooks (with or without their number), or "2", "table2", "figure1" for what the paper's
        Table 2 or Figure 1 takes: the page and the pages that make its runs. None for all.
    store: folder of the run store, relative to root; default `results` for the profiles cpu and paper, else `.runs/<profile>`.
    jobs: processes per grid, for notebooks that declare `jobs`; parameters: override the profile where a notebook declares them.
    timeout: seconds per cell; default 1800 for smoke, none otherwise.

    A notebook that declares `profile: str`, `store: str` or `jobs: int` is given them. Executed copies go to `.runs/<profile>/notebooks`;
    one whose cells, parameters and package code are unchanged, and none of whose runs failed, is kept. All notebooks are tried;
    then ReproductionError names what failed. What `plan` raises is raised before anything runs.
    """
    root = Path(root).resolve()
    pages = plan(profile, tables, root, store, jobs, parameters)
    from tqdm import tqdm
    timeout = 1800 if timeout is None and profile == "smoke" else timeout
    # no bar into files and pipes: only plain lines there
    bar = tqdm(unit="run", dynamic_ncols=True, leave=False, disable=not (progress and sys.stderr.isatty()))

    def say(line):
        if progress:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    results, problems = [], []
    with bar:
        for page in pages:
            result, start = {"notebook": page.name, "status": "kept", "failed_runs": 0, "output": page.output}, time.perf_counter()
            results.append(result)
            if page.kept:
                say(f"{page.name}: kept")
                continue
            bar.set_description(page.name)
            try:
                files = _execute(page, root, _Relay(bar, say), timeout)
            except ReproductionError as exc:
                result["status"] = "failed"
                problems.append(str(exc))
                say(str(exc).splitlines()[0])
                continue
            states = [status for path, status in files.items() if path.endswith(".json")]
            holes = states.count("failed")
            result.update(status="finished", failed_runs=holes)
            say(f"{page.name}: finished{f', {holes} of {len(states)} runs failed' if holes else ''} ({time.perf_counter() - start:.1f} s)")
            if holes:
                problems.append(f"{page.name}: {holes} of {len(states)} runs failed: holes in its table, tried again next time")
    if problems:
        raise ReproductionError("\n".join(problems))
    return results
