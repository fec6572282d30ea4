"""The run store, grids of runs, and the driver of the reproduction notebooks."""
import functools
import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import numpy as np
import pytest

from ibma import runs
from ibma.runs import ReproductionError, RunFailed, RunStore, code_hash, config_hash, parameters_of, plan, reproduce, run_grid

ROOT = Path(runs.__file__).resolve().parents[1]


# ---------------------------------------------------------------- code_hash

TOY = {
    "__init__.py": '__version__ = "1"\nsetting = 0\n',
    "a.py": '"""Module."""\nfrom .b import helper\n\n\ndef f(x):\n    """Doc."""\n    # comment\n    return helper(x) + 1\n',
    "b.py": "import toy.c as c\n\ndef helper(x):\n    return c.scale * x\n",
    "c.py": "from toy import __version__\nscale = 2\n",
    "alone.py": "value = 1\n",
    "sub/__init__.py": 'import importlib\nfrom .tools import tool\nNAMES = ["m"]\n\ndef create(name):\n'
                       '    return importlib.import_module("toy.sub." + name)\n',
    "sub/m.py": "from ..c import scale\nfrom . import n\n",
    "sub/n.py": "def g():\n    from toy import a\n    return a\n",
    "sub/tools.py": "tool = 1\n",
    "sub/user.py": "from toy.sub import create\n",
}


@pytest.fixture
def toy(tmp_path):
    for name, text in TOY.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def edit(name, old, new):
        path = tmp_path / "toy" / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    edit.hash = functools.partial(code_hash, root=tmp_path)
    edit.root = tmp_path
    return edit


@pytest.mark.parametrize(("name", "old", "new", "changes"), [
    ("a.py", "Doc.", "Another docstring.", False),
    ("a.py", "Module.", "Another module docstring.", False),
    ("a.py", "# comment\n    return", "return", False),
    ("a.py", "helper(x) + 1", "(helper(x)\n            + 1)", False),
    ("a.py", "helper(x) + 1", "helper(x) + 2", True),
    ("b.py", "c.scale * x", "x * c.scale", True),          # reached by a relative import
    ("c.py", "scale = 2", "scale = 3", True),              # reached through b
    ("alone.py", "value = 1", "value = 2", False),
    ("__init__.py", '"1"', '"2"', False),                  # a release does not invalidate results
    ("__init__.py", "setting = 0", "setting = 1", True),
    ("sub/m.py", "scale", "other", False),
], ids=["docstring", "module-docstring", "comment", "layout", "code", "import", "transitive", "unrelated",
        "version", "package", "subpackage"])
def test_code_hash_changes_with_reached_code_only(toy, name, old, new, changes):
    before = toy.hash("toy.a")
    toy(name, old, new)
    assert (toy.hash("toy.a") != before) is changes


def test_code_hash_follows_every_form_of_import(toy):
    before = toy.hash("toy.sub.m")
    toy("sub/__init__.py", '["m"]', '["m", "k"]')
    assert toy.hash("toy.sub.m") == before, "a package passed on the way to a submodule does not count"
    toy("sub/n.py", "return a", "return [a]")
    after_n = toy.hash("toy.sub.m")
    assert after_n != before, "from . import n"
    toy("b.py", "c.scale * x", "c.scale + x")
    assert toy.hash("toy.sub.m") != after_n, "an import inside a function"


def test_code_hash_counts_a_package_from_which_a_name_is_taken_but_not_its_lazy_imports(toy):
    before = toy.hash("toy.sub.user")
    toy("sub/m.py", "scale", "other")
    assert toy.hash("toy.sub.user") == before
    toy("sub/__init__.py", '["m"]', '["m", "k"]')
    registry = toy.hash("toy.sub.user")
    assert registry != before
    toy("sub/tools.py", "1", "2")
    assert toy.hash("toy.sub.user") != registry, "a relative import in a package's __init__"


def test_code_hash_survives_cycles_and_half_edited_files_and_ignores_the_order(toy):
    toy("c.py", "scale = 2", "import toy.a\nscale = 2")
    assert toy.hash("toy.a", "toy.alone") == toy.hash("toy.alone", "toy.a") != toy.hash("toy.a")
    toy("c.py", "scale = 2", "scale = (")
    half = toy.hash("toy.a")
    toy("c.py", "scale = (", "scale = [")
    assert toy.hash("toy.a") != half


def test_code_hash_is_the_same_on_every_python(tmp_path):
    """A pinned value over constructs whose `ast.dump` or `ast.unparse` differs between Python versions."""
    (tmp_path / "one.py").write_text(textwrap.dedent('''
        from dataclasses import dataclass
        @dataclass
        class A:
            x: int = 1
            def f(self, *args, key=None, **rest) -> list[int]:
                return [f"{a!r:>{self.x}}{rest['k']}" for a in args if a] or (lambda y: (y, *args))(u"t")
        match A():
            case A(x=1): pass
        async def g(): return -1e-3 if True else b"x"
        '''))
    assert code_hash("one", root=tmp_path) == "c854f97dae8e"


def test_code_hash_of_functions(tmp_path):
    def one(config):
        """Documented."""
        return {"a": 1}

    def same(config):
        return {"a": 1}

    def other(config):
        return {"a": 2}

    same.__name__ = "one"
    assert code_hash(one) != code_hash(other)
    assert code_hash(functools.partial(one, {})) == code_hash(one)
    first = lambda config: 1  # noqa: E731
    second = lambda config: 2  # noqa: E731
    assert code_hash(first) != code_hash(second)
    assert code_hash(config_hash) == code_hash("ibma.runs"), "a function of the package counts as its module"
    scope = {}
    exec("def typed(config): return 1", scope)
    with pytest.raises(ValueError, match="source of .*typed.* cannot be read"):
        code_hash(scope["typed"])


HELPERS = """
import functools
import math
import numpy as np
frame = object()
EPOCHS = {epochs}
ARMS = {{"a": ("x", {{"eta": {eta}}}), "b": lambda c: c + inner({added})}}
OTHER = {other}
K = {default}
MIXED = {{"array": np.full(2, {array}), "object": frame, "rate": {rate}}}
names = {names}

class Base:
    def scale(self):
        return {base}

class Part(Base):
    width = {width}
    @staticmethod
    def size():
        return inner({size})
    @property
    def depth(self):
        return deep() + self.scale()

@functools.lru_cache
def inner(n):
    return n * {factor}

def deep():
    return {depth}

def power(a, b):
    return a ** b + {partial}

square = functools.partial(power, b={bound})

def unused():
    return {unused}

def run(config, k=K):
    def local():
        return Part.size() + EPOCHS + Part().depth + square(2) + MIXED["rate"]
    return {{"m": local(), "arm": ARMS[config["arm"]], "pi": math.pi, "frame": frame, "n": config.names}}
"""
PLAIN = dict(array=0, epochs=3, eta=0.5, other=1, default=1, rate=1, names=1, base=1, width=1, size=2, factor=2, depth=1, partial=0, bound=2, unused=0, added=1)


@pytest.mark.parametrize("name", [None, *PLAIN])
def test_code_hash_counts_what_a_run_uses_from_its_notebook(tmp_path, name):
    def hashed(**values):
        file = tmp_path / f"cell_{len(list(tmp_path.iterdir()))}.py"
        file.write_text(HELPERS.format(**PLAIN | values))
        space = {"__name__": "__main__"}
        exec(compile(file.read_text(), str(file), "exec"), space)
        return code_hash(space["run"])

    changed = {name: 77} if name else {}   # `names` is an attribute in `run`, `other` and `unused` are not mentioned there
    assert (hashed() != hashed(**changed)) == (name not in (None, "other", "unused", "names"))


def test_a_class_as_a_run_and_a_loop_of_helpers_have_a_hash(tmp_path):
    file = tmp_path / "cell.py"
    file.write_text("def a(n): return b(n)\ndef b(n): return a(n) if n else 0\nclass Run:\n    def __call__(self, config): return {'m': a(1), 'own': Run}\n")
    space = {"__name__": "__main__"}
    exec(compile(file.read_text(), str(file), "exec"), space)
    assert code_hash(space["Run"]()) == code_hash(space["Run"]())


def test_code_hash_names_an_unknown_module():
    with pytest.raises(ValueError, match="'ibma.runz' .*did you mean 'ibma.runs'"):
        code_hash("ibma.runz")


# ---------------------------------------------------------------- config_hash

def test_config_hash_is_canonical_and_pinned():
    config = {"method": "ibma", "eta": 0.5, "seed": 0, "options": {"b": [1, None], "a": True}}
    shuffled = list(config.items())
    random.Random(0).shuffle(shuffled)
    assert config_hash(dict(shuffled)) == config_hash(config) == "b6719a2a3530"
    assert config_hash(config | {"seed": 1}) != config_hash(config)


@pytest.mark.parametrize(("config", "error", "message"), [
    ({"options": {"lr": np.float32(1)}}, TypeError, r"options\.lr: float32"),
    ({"seeds": (0, 1)}, TypeError, "seeds: tuple"),
    ({"rates": [0.1, {1}]}, TypeError, r"rates\[1\]: set"),
    ({"options": {1: "a"}}, TypeError, "options: the key 1 is a int"),
    ({"eta": float("nan")}, ValueError, "eta: nan"),
    ([1], TypeError, "a dict is needed"),
])
def test_config_hash_refuses_what_json_cannot_hold(config, error, message):
    with pytest.raises(error, match=message):
        config_hash(config)


# ---------------------------------------------------------------- run_grid and RunStore

def grid(methods=("ce", "ibma"), seeds=(0, 1), **more):
    return [{"method": m, "data": "digits", **more, "seed": s} for m in methods for s in seeds]


class Counted:
    """A run that counts its calls and fails for the configurations in `broken`."""

    def __init__(self, broken=()):
        self.calls, self.broken = [], set(broken)

    def __call__(self, config):
        name = f"{config['method']}-{config['seed']}"
        self.calls.append(name)
        if name in self.broken:
            raise OSError(f"cannot open {Path.home() / 'data' / 'set' / 'x.npz'}")
        return {"metrics": {"accuracy": 0.9 + config["seed"] / 3, "aa": 1}, "data_kind": "open", "device": "cuda:0", "guarantee": "equal up to rounding"}


def test_finished_runs_are_kept_and_failed_ones_tried_again(tmp_path, capsys):
    store, run = RunStore(tmp_path), Counted(broken=["ibma-1"])
    frame = run_grid(store, "main", grid(), run)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[1/4] ce digits seed=0: accuracy 0.900 (") and lines[0].endswith(" s)")
    assert lines[3].startswith("[4/4] ibma digits seed=1: failed, OSError: cannot open .../x.npz (")
    assert list(frame["status"]) == ["finished"] * 3 + ["failed"]
    assert frame["accuracy"].isna().tolist() == [False] * 3 + [True]
    assert frame["error"].tolist() == [""] * 3 + ["OSError: cannot open .../x.npz"]

    run.calls.clear()
    run.broken.clear()
    before = {path: path.read_bytes() for path in (tmp_path / "main").iterdir()}
    frame = run_grid(store, "main", grid(), run)
    assert run.calls == ["ibma-1"]
    assert capsys.readouterr().out.splitlines()[0] == "[1/4] ce digits seed=0: accuracy 0.900 (kept)"
    assert frame["status"].eq("finished").all()
    assert sum(path.read_bytes() != text for path, text in before.items()) == 1 and len(before) == 4

    run.calls.clear()
    assert run_grid(store, "main", grid()[::-1], run, progress=False)["seed"].tolist() == [1, 0, 1, 0], "in the order asked for"
    assert run.calls == [] and capsys.readouterr().out == ""


def test_a_record_says_what_was_run_and_with_what(tmp_path):
    run_grid(tmp_path, "main", grid(["ce"], [3], eta=0.5), Counted(), depends_on="ibma.runs", progress=False)
    [path] = (tmp_path / "main").iterdir()
    record = json.loads(path.read_text())
    assert path.read_text() == json.dumps(record, indent=1, sort_keys=True) + "\n"
    assert record["config"] == {"method": "ce", "data": "digits", "eta": 0.5, "seed": 3} and record["seed"] == 3
    assert record["config_hash"] == config_hash(record["config"]) and record["key"] == path.stem
    assert record["metrics"] == {"accuracy": 1.9, "aa": 1.0} and record["first_metric"] == "accuracy"
    assert (record["status"], record["error"], record["device"], record["data_kind"]) == ("finished", None, "cuda:0", "open")
    assert record["guarantee"] == "equal up to rounding"
    assert record["versions"]["python"] == sys.version.split()[0] and record["versions"]["ibma"] == __import__("ibma").__version__
    assert {"code_hash", "commit", "dirty", "duration_s", "table"} <= set(record)


def test_a_failure_keeps_a_short_trace_without_absolute_paths(tmp_path):
    run_grid(tmp_path, "main", grid(["ce"], [0]), Counted(broken=["ce-0"]), progress=False)
    [path] = (tmp_path / "main").iterdir()
    error = json.loads(path.read_text())["error"]
    assert error["type"] == "OSError" and error["message"] == "cannot open .../x.npz"
    assert any("test_runs.py" in line and "in __call__: raise OSError" in line for line in error["traceback"])
    assert str(Path.home()) not in path.read_text() and str(ROOT) not in path.read_text() and str(tmp_path) not in path.read_text()


@pytest.mark.parametrize(("text", "expected"), [
    ("no /home/me/data/x.npz here", "no .../x.npz here"),
    ("'/a/b c'", "'.../b c'"),
    (r"C:\Users\me\x.csv", ".../x.csv"),
    ("1/2 of and/or https://host.org/a/b ./rel/path", "1/2 of and/or https://host.org/a/b ./rel/path"),
])
def test_hide_paths(text, expected):
    assert runs._hide_paths(text) == expected


@pytest.mark.parametrize(("result", "error"), [
    ({"accuracy": float("nan")}, "ValueError: metric 'accuracy' is nan"),
    ({"loss": np.inf}, "ValueError: metric 'loss' is inf"),
    ({"accuracy": "0.9"}, "TypeError: metric 'accuracy' must be one number"),
    ({"accuracy": [0.9, 0.8]}, "TypeError: metric 'accuracy' must be one number"),
    ({}, "TypeError: run must return a dict of metrics"),
    (None, "TypeError: run must return a dict of metrics"),
    ({"metrics": {"a": 1.0}, "data_kind": "real"}, "ValueError: data_kind 'real'"),
    ({"metrics": {"a": 1.0}, "kind": "open"}, "ValueError: run returned ['kind']"),
])
def test_a_result_that_is_no_set_of_finite_numbers_is_a_failure(tmp_path, result, error):
    frame = run_grid(tmp_path, "main", [{"seed": 0}], lambda config: result, progress=False)
    assert frame["status"].item() == "failed" and frame["error"].item().startswith(error)


def test_numbers_of_any_make_become_floats(tmp_path):
    frame = run_grid(tmp_path, "main", [{"seed": 0}], lambda config: {"a": np.float32(0.5), "b": 2, "c": np.array(3)}, progress=False)
    assert frame[["a", "b", "c"]].iloc[0].tolist() == [0.5, 2.0, 3.0]


def test_the_record_holds_the_configuration_as_asked_for(tmp_path):
    def run(config):
        config["options"]["lr"] = 99
        return {"a": config.pop("seed")}

    config = {"options": {"lr": 1}, "seed": 4}
    run_grid(tmp_path, "main", [config], run, progress=False)
    assert RunStore(tmp_path).records("main")[0]["config"] == config == {"options": {"lr": 1}, "seed": 4}


def test_changed_code_runs_again_and_replaces_the_older_record(tmp_path, toy):
    def with_code(run):
        return run_grid(tmp_path / "store", "main", grid(["ce"]), run, depends_on=lambda config: "ibma.runs", progress=False)

    run = Counted()
    with_code(run)
    first = set(RunStore(tmp_path / "store").to_frame("main")["key"])
    with_code(lambda config: {"accuracy": 0.1})
    second = RunStore(tmp_path / "store").to_frame("main")
    assert second["accuracy"].tolist() == [0.1, 0.1] and not first & set(second["key"])
    with_code(lambda config: {"accuracy": 1 / 0})
    both = RunStore(tmp_path / "store").to_frame("main")
    assert both["status"].value_counts().to_dict() == {"finished": 2, "failed": 2}, "a number outlives a failing edit"
    with_code(lambda config: {"accuracy": 0.2})
    assert RunStore(tmp_path / "store").to_frame("main")["accuracy"].tolist() == [0.2, 0.2]


def test_older_records_are_taken_over_where_a_sample_gives_the_same_numbers_again(tmp_path):
    calls = []

    def before(config):
        return {"accuracy": config["seed"] / 10, "seconds_per_epoch": 1.0}

    def after(config):                                       # the same for ce, something else for ibma, and another time
        calls.append(config["method"])
        return {"accuracy": config["seed"] / 10 + (config["method"] == "ibma") * 1e-12, "seconds_per_epoch": 2.0}

    def last(config):
        calls.append(config["method"])
        return {"accuracy": 0.5}

    def with_code(run, adopt):
        calls.clear()
        return run_grid(tmp_path, "main", grid(("ce", "ibma"), range(6)), run, adopt=adopt, progress=False,
                        depends_on=lambda config: "ibma.runs" if config["method"] == "ce" else "ibma.metrics")

    with_code(before, 0)
    frame = with_code(after, 2)
    assert calls.count("ce") == 2, "two repeated, four taken over"
    assert calls.count("ibma") == 6, "a difference in the last digits: all of them anew"
    assert frame["accuracy"].tolist() == [after({"method": m, "seed": s})["accuracy"] for m, s in zip(frame["method"], frame["seed"], strict=True)]
    records = RunStore(tmp_path).records("main")
    adopted = [r for r in records if "adopted" in r]
    assert len(records) == 12 and len(adopted) == 4 and all(r["adopted"]["repeated"] == 2 and r["config"]["method"] == "ce" for r in adopted)
    with_code(after, 2)
    assert calls == [], "found under the new key"
    with_code(last, 0)
    assert len(calls) == 12, "nothing is taken over unasked"


def test_depends_on_may_differ_between_configurations(tmp_path, monkeypatch, toy):
    real, calls = runs.code_hash, Counted()
    monkeypatch.setattr(runs, "code_hash", lambda run, *names: real(*names, root=toy.root))

    def run_all():
        run_grid(tmp_path / "s", "main", grid(), calls, progress=False,
                 depends_on=lambda config: ("toy.alone", "toy.a" if config["method"] == "ce" else "toy.sub.user"))
    run_all()
    calls.calls.clear()
    toy("a.py", "+ 1", "+ 2")
    run_all()
    assert calls.calls == ["ce-0", "ce-1"]


def test_ctrl_c_stops_the_grid_and_keeps_what_is_done(tmp_path):
    def run(config):
        if config["seed"] == 1:
            raise KeyboardInterrupt
        return {"a": 1.0}

    with pytest.raises(KeyboardInterrupt):
        run_grid(tmp_path, "main", [{"seed": s} for s in range(3)], run, progress=False)
    assert RunStore(tmp_path).to_frame("main")["seed"].tolist() == [0]


def test_on_error_raise_records_first(tmp_path):
    with pytest.raises(RunFailed, match="main, ce digits seed=0: OSError") as caught:
        run_grid(tmp_path, "main", grid(), Counted(broken=["ce-0"]), on_error="raise", progress=False)
    assert isinstance(caught.value.__cause__, OSError)
    assert RunStore(tmp_path).to_frame("main")["status"].tolist() == ["failed"]


@pytest.mark.parametrize(("configs", "options", "message"), [
    (grid() + grid(["ce"], [1]), {}, "configurations 1 and 4 are the same"),
    ([{"method": "ce"}], {}, "needs an int 'seed'"),
    ([{"seed": True}], {}, "needs an int 'seed'"),
    ([{"seed": 0, "status": "x"}], {}, "status names a column"),
    (grid(), {"on_error": "ignore"}, "on_error 'ignore'"),
    (grid(), {"data_kind": "standin"}, "did you mean 'stand-in'"),
    (grid(), {"depends_on": ("ibma.nothing",)}, "no module 'ibma.nothing'"),
])
def test_a_wrong_grid_is_refused_before_anything_runs(tmp_path, configs, options, message):
    run = Counted()
    with pytest.raises(ValueError, match=message):
        run_grid(tmp_path, "main", configs, run, **options)
    assert run.calls == []


def test_labels_tell_apart_what_differs():
    configs = [{"method": "ce", "eta": eta, "epochs": 3, "seed": 0} for eta in (0.1, 0.2)]
    assert runs._labels(configs) == ["ce eta=0.1 seed=0", "ce eta=0.2 seed=0"]


def _parallel_run(config):
    if config["seed"] == 2:
        raise ValueError("two")
    return {"pid": float(os.getpid()), "value": config["seed"] ** 2}


def test_processes_give_the_same_as_one_process(tmp_path, capsys):
    configs = [{"seed": s} for s in range(4)]
    frame = run_grid(tmp_path / "a", "main", configs, _parallel_run, n_jobs=2, data_kind="simulated")
    alone = run_grid(tmp_path / "b", "main", configs, _parallel_run, progress=False, data_kind="simulated")
    same = ["seed", "value", "status", "error", "data_kind", "key"]
    assert frame[same].equals(alone[same]) and frame["status"].tolist() == ["finished", "finished", "failed", "finished"]
    assert os.getpid() not in set(frame["pid"].dropna())
    assert sorted(line[:5] for line in capsys.readouterr().out.splitlines()) == [f"[{k}/4]" for k in range(1, 5)]


@pytest.mark.filterwarnings("ignore:run record")
def test_an_unreadable_record_is_named_and_done_again(tmp_path):
    store, run = RunStore(tmp_path), Counted()
    frame = run_grid(store, "main", grid(), run, progress=False)
    key, other, nan, _ = frame["key"]
    path = store.path("main", key)
    path.write_text(path.read_text()[:40])
    store.path("main", other).rename(store.path("main", "renamed"))
    store.path("main", nan).write_text(store.path("main", nan).read_text().replace("0.9", "NaN"))
    (tmp_path / "main" / ".half.json.12.part").write_text("{")
    with pytest.warns(UserWarning, match=f"main/{key}.json is unreadable"):
        assert len(store.to_frame("main")) == 1
    assert store.unreadable("main") == sorted([f"{key}.json", f"{nan}.json", "renamed.json"])
    with pytest.warns(UserWarning):
        assert store.get(key) is None and store.get(key, "main") is None
    run.calls.clear()
    with pytest.warns(UserWarning):
        run_grid(store, "main", grid(), run, progress=False)
    assert run.calls == ["ce-0", "ce-1", "ibma-0"] and store.unreadable("main") == ["renamed.json"]


def test_get_write_and_tables(tmp_path):
    store = RunStore(tmp_path)
    assert store.tables() == [] and store.get("0" * 12) is None and len(store.to_frame("main")) == 0
    frame = run_grid(store, "main", grid(), Counted(), progress=False)
    record = store.get(frame["key"][0])
    assert record["config"] == grid()[0] and store.get(frame["key"][0], "other") is None
    store.write(record | {"table": "copy"})
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "x.json").write_text("{}")
    assert store.tables() == ["copy", "main"]
    with pytest.raises(ValueError, match="contradict"):
        store.write(record | {"status": "failed"})
    for name in ("a/b", "..", "notebooks", ""):
        with pytest.raises(ValueError, match="table"):
            store.records(name)


def test_a_write_that_dies_leaves_the_old_record_whole(tmp_path, monkeypatch):
    store = RunStore(tmp_path)
    key = run_grid(store, "main", grid(["ce"], [0]), Counted(), progress=False)["key"].item()
    record = store.get(key)

    def die(*args):
        raise OSError("disk full")
    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="disk full"):
        store.write(record | {"duration_s": 1e9})
    assert store.get(key) == record and [path.name for path in (tmp_path / "main").iterdir()] == [f"{key}.json"]


def test_csv_is_the_same_for_the_same_runs_and_keeps_every_digit(tmp_path):
    import pandas as pd

    def run(config):
        if config["seed"] == 10:
            raise ValueError("a, b\nand c")
        return {"third": config["seed"] / 3, "tiny": 1e-17, "eta": 5.0}

    configs = [{"method": "ce", "eta": 0.1, "layers": [1, 2], "note": None, "seed": s} for s in (10, 2, 1)]
    texts = set()
    for i, order in enumerate((configs, configs[::-1])):
        store = RunStore(tmp_path / str(i))
        run_grid(store, "main", order, run, progress=False)
        for path in (tmp_path / str(i) / "main").iterdir():      # the one thing that differs between machines
            path.write_text(json.dumps(json.loads(path.read_text()) | {"duration_s": 1.0}))
        texts.add(store.to_csv("main").read_bytes())
    assert len(texts) == 1 and store.to_csv("main") == tmp_path / "1" / "main.csv"
    table = pd.read_csv(tmp_path / "1" / "main.csv")
    assert table["seed"].tolist() == [1, 2, 10], "numbers in numeric order"
    assert table["third"].tolist()[:2] == [1 / 3, 2 / 3] and table["tiny"][0] == 1e-17
    assert table["eta"].tolist() == [0.1] * 3 and table["metric_eta"][0] == 5.0, "a metric never hides a setting"
    assert table["layers"][0] == "[1, 2]"
    hole = table.iloc[2]
    assert hole["status"] == "failed" and hole["error"] == "ValueError: a, b and c" and hole[["third", "tiny"]].isna().all()
    assert list(table.columns[-6:]) == list(runs.RESERVED)


def test_a_table_may_be_restricted_to_the_runs_of_a_grid(tmp_path):
    store = RunStore(tmp_path)
    run_grid(store, "main", grid(epochs=1), Counted(), progress=False)
    frame = run_grid(store, "main", grid(epochs=2), Counted(), progress=False)
    assert len(store.to_frame("main")) == 8
    assert store.to_frame("main", keys=frame["key"])["epochs"].tolist() == [2] * 4
    assert len(store.to_csv("main", tmp_path / "x.csv", keys=frame["key"]).read_text().splitlines()) == 5
    with pytest.raises(KeyError, match="has no run"):
        store.to_frame("main", keys=["f" * 12])


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path, monkeypatch):
    package = tmp_path / "ibma"
    package.mkdir()
    (package / "x.py").write_text("a = 1\n")
    monkeypatch.setattr(runs, "PACKAGE", package.resolve())
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.resolve().parent))
    assert runs._commit() == (None, None)

    def git(*args):
        author = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *author, *args], check=True, capture_output=True)
    git("init")
    git("add", "ibma")
    git("commit", "-m", "one")
    head, dirty = runs._commit()
    assert len(head) == 40 and dirty is False
    (tmp_path / "elsewhere.txt").write_text("not code")
    assert runs._commit() == (head, False)
    (package / "new.py").write_text("")
    assert runs._commit() == (head, True)
    (tmp_path / "env" / "ibma").mkdir(parents=True)
    monkeypatch.setattr(runs, "PACKAGE", tmp_path.resolve() / "env" / "ibma")
    assert runs._commit() == (None, None), "an environment inside another repository"


def test_importing_the_module_is_cheap_and_what_is_missing_is_named(monkeypatch):
    heavy = {"pandas", "joblib", "papermill", "yaml", "torch", "tqdm", "numpy"}
    code = f"import sys, ibma.runs, ibma.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    monkeypatch.setitem(sys.modules, "papermill", None)
    with pytest.raises(ImportError, match=r'papermill .*pip install "ibma\[book\]"'):
        runs._need("papermill")


# ---------------------------------------------------------------- notebooks and profiles

PARAMETERS = """
profile: str = "smoke"  # which profile
store: str = ".runs/smoke"
jobs: int = 1
epochs: int = 2  # passes over the data
eta: float = 0.5
seeds: list = [0, 1]
deep: bool = False
limit: int = None
"""
GRID = """
def run(config):
    from pathlib import Path
    if config["seed"] == 1 and not Path("mended").exists():
        raise ValueError("seed 1 is broken")
    return {"metrics": {"accuracy": config["epochs"] / 10}, "data_kind": "simulated"}

frame = run_grid(store, "tiny", [{"method": "ce", "epochs": epochs, "eta": eta, "seed": s} for s in seeds], run, n_jobs=jobs)
RunStore(store).to_csv("tiny", keys=frame["key"])
print("[1, 2] is no run line")
(profile, store, jobs, epochs)
"""


def write_notebook(path, *sources, parameters=None, **metadata):
    cells = [nbformat.v4.new_markdown_cell("# Title")]
    if parameters is not None:
        cells.append(nbformat.v4.new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]}))
    cells += [nbformat.v4.new_code_cell(source.strip()) for source in sources]
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}} | metadata
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))          # the kernel starts in tmp_path
    folder = tmp_path / "nbs" / "6_reproduction"
    write_notebook(folder / "01_tiny.ipynb", "from ibma.runs import RunStore, run_grid", GRID, parameters=PARAMETERS)
    write_notebook(folder / "02_broken.ipynb", "x = 1", "def f():\n    return 1 / 0\n\nf()", parameters="epochs: int = 1")
    write_notebook(folder / "_draft.ipynb", "raise SystemError")
    (folder / "profiles.yml").write_text("smoke:\n  02_broken: {epochs: 2}\ncpu:\n  01_tiny: {epochs: 3, eta: 1e-3}\n")
    return tmp_path


def profiles(book, text):
    (book / "nbs/6_reproduction/profiles.yml").write_text(text)


def test_notebooks_run_fail_visibly_resume_and_are_kept(book, capfd):
    """The whole life of a page, in three executions."""
    output = book / ".runs/smoke/notebooks"
    with pytest.raises(ReproductionError) as caught:
        reproduce(root=book)
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "[1/2] ce seed=0: accuracy 0.200", "[2/2] ce seed=1: failed, ValueError: seed 1 is broken",
        "01_tiny: finished, 1 of 2 runs failed", "02_broken failed in cell 4 of 4: ZeroDivisionError: division by zero"]
    assert "\r" not in out + err and "IPKernelApp" not in err
    message = str(caught.value)
    assert "01_tiny: 1 of 2 runs failed" in message and "02_broken failed in cell 4 of 4: ZeroDivisionError" in message
    assert "----> 4 f()" in message and str(book) not in message
    assert sorted(path.name for path in output.iterdir()) == ["01_tiny.ipynb", "01_tiny.json", "02_broken.failed.ipynb"]
    executed = nbformat.read(output / "01_tiny.ipynb", 4)
    assert executed.cells[-1].outputs[-1].data["text/plain"] == "('smoke', '.runs/smoke', 1, 2)"
    frame = RunStore(book / ".runs/smoke").to_frame("tiny")
    assert frame["status"].tolist() == ["finished", "failed"] and frame["data_kind"].tolist() == ["simulated", ""]

    [page] = plan(root=book, tables=["tiny"])
    assert not page.kept, "a page with a hole is tried again"
    (book / "mended").touch()
    [result] = reproduce(root=book, tables=["tiny"])
    assert (result["status"], result["failed_runs"], result["output"]) == ("finished", 0, output / "01_tiny.ipynb")
    assert capfd.readouterr().out.splitlines()[0] == "[1/2] ce seed=0: accuracy 0.200 (kept)"

    assert reproduce(root=book, tables=["tiny"])[0]["status"] == "kept"
    assert capfd.readouterr().out == "01_tiny: kept\n"

    def kept(**options):
        return plan(root=book, tables=["tiny"], **options)[0].kept
    assert kept(jobs=2) and not kept(parameters={"epochs": 7}) and not kept(store="elsewhere") and not kept(profile="cpu")
    record = next((book / ".runs/smoke/tiny").glob("*.json"))
    for name in (record, book / ".runs/smoke/tiny.csv", output / "01_tiny.ipynb", output / "01_tiny.json"):
        text = name.read_bytes()
        name.write_bytes(text[:30])
        assert kept() == (name.suffix != ".json"), f"{name.name} cut short"
        name.unlink()
        assert not kept(), f"{name.name} gone"
        name.write_bytes(text)
        assert kept()
    path = book / "nbs/6_reproduction/01_tiny.ipynb"
    path.write_text(path.read_text().replace("Title", "Other title"))
    assert not kept(), "an edited cell"
    path.write_text(path.read_text().replace("Other title", "Title"))
    notebook = nbformat.read(path, 4)
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="x")]
    nbformat.write(notebook, path)
    assert kept(), "outputs stored in the source do not matter"
    (book / "ibma").mkdir()
    (book / "ibma" / "x.py").write_text("a = 1\n")
    assert not kept(), "other package code"


def test_a_page_that_shows_a_file_is_made_again_when_the_file_changes(book):
    def key(**options):
        return plan(root=book, tables=["tiny"], **options)[0].key

    (book / "results" / "table").mkdir(parents=True)
    table, paper = book / "results" / "table.csv", book / "book" / "reference" / "table2.csv"
    paper.parent.mkdir(parents=True)
    keys = [key()]
    for path, text in ((table, "accuracy\n0.5\n"), (table, "accuracy\n0.6\n"), (paper, "value\n1\n"), (table.with_suffix(".png"), "x")):
        path.write_text(text)
        assert key() not in keys, f"{path.name} shows on the page"
        keys.append(key())
    own = key(profile="cpu", store="results")
    table.write_text("accuracy\n0.7\n")
    (book / "results" / "table" / "1.json").write_text("{}")
    assert key(profile="cpu", store="results") == own, "what a page writes itself does not make it stale"


def test_a_page_that_fails_takes_its_older_success_away(book, monkeypatch):
    import papermill
    [page] = plan(root=book, tables=["broken"])
    page.output.parent.mkdir(parents=True)
    page.output.write_text("old")
    page.sidecar.write_text("{}")

    def interrupted(source, target, **options):
        Path(target).write_text("half")
        raise error
    monkeypatch.setattr(papermill, "execute_notebook", interrupted)
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        reproduce(root=book, tables=["broken"], progress=False)
    assert sorted(p.name for p in page.output.parent.iterdir()) == ["02_broken.failed.ipynb", "02_broken.ipynb", "02_broken.json"]
    error = RuntimeError("kernel died")
    with pytest.raises(ReproductionError, match="02_broken failed before its first cell: RuntimeError: kernel died"):
        reproduce(root=book, tables=["broken"], progress=False)
    assert [p.name for p in page.output.parent.iterdir()] == ["02_broken.failed.ipynb"]
    assert runs.LEDGER not in os.environ


def test_plan_fills_in_profile_store_and_jobs(book):
    pages = plan(root=book, profile="cpu", jobs=2)
    assert [page.name for page in pages] == ["01_tiny", "02_broken"], "a name that begins with _ is left out"
    assert pages[0].parameters == {"profile": "cpu", "store": "results", "jobs": 2, "epochs": 3, "eta": 0.001}
    assert pages[1].parameters == {}, "only what a notebook declares"
    [page] = plan(root=book, tables=["01_tiny"], parameters={"eta": 1, "limit": 5}, store="x")
    assert page.parameters == {"profile": "smoke", "store": "x", "jobs": 1, "eta": 1.0, "limit": 5}
    assert isinstance(page.parameters["eta"], float), "eta=1 and eta=1.0 must not be two configurations"
    assert page.output == book.resolve() / ".runs/smoke/notebooks/01_tiny.ipynb"


def test_a_table_may_be_named_by_its_number(book):
    write_notebook(book / "nbs/6_reproduction/17_table9.ipynb", "x = 1", parameters="epochs: int = 1")
    assert [page.name for page in plan(root=book, tables=["9"])] == ["17_table9"] == [page.name for page in plan(root=book, tables=["table9"])]
    with pytest.raises(ValueError, match="unknown table '1'"):        # the number in front of a file's name is none
        plan(root=book, tables=["1"])


def test_every_table_of_the_paper_has_a_command_that_makes_its_runs():
    root = Path(runs.__file__).resolve().parents[1]
    if not (root / "nbs").is_dir():
        pytest.skip("an installed package has no notebooks")
    def asked(table):
        return [page.name for page in plan(root=root, tables=[table])]
    assert asked("2") == asked("table2") == ["10_benchmark", "13_table4", "11_table2"], "the page of Table 2 has no runs of its own, and comes last"
    assert asked("7") == ["05_anomaly"] and asked("16") == ["06_probes"] and asked("8") == ["18_table8"] and asked("figure3") == ["07_gradcam_figures"]
    assert asked("13") == ["05_anomaly", "14_significance"]
    assert all(asked(str(number)) for number in range(1, 17))
    makers = runs.makers(root)
    assert makers["table9_sizes"] == ["17_table9"] and makers["temperature"] == ["02_temperature"]
    assert {path.stem for path in (root / "results").glob("*.csv")} <= set(makers), "a table of results that no page makes"


def test_what_earlier_runs_of_a_page_took(book):
    def recorded(profile):
        [page] = plan(root=book, profile=profile, tables=["tiny"])
        return page.recorded(book)
    assert recorded("cpu") == (0, 0.0)
    profiles(book, "smoke: {}\ncpu: {}\npaper: {}\n")
    (book / "results").mkdir()
    (book / "results/tiny.csv").write_text("seed,device,duration_s\n0,cpu,2.5\n1,cpu,\n2,cuda,4\n")
    assert recorded("cpu") == (2, 6.5) and recorded("paper") == (1, 4.0), "a GPU's profile is not judged by runs on a CPU"
    assert recorded("smoke") == (0, 0.0)
    (book / "results/tiny.csv").write_bytes(b"\xff\xfe broken")
    assert recorded("cpu") == (0, 0.0)


def test_parameters_of(book, tmp_path):
    declared = parameters_of(book / "nbs/6_reproduction/01_tiny.ipynb")
    assert declared["epochs"] == {"default": 2, "type": "int", "help": "passes over the data"}
    assert declared["seeds"]["default"] == [0, 1] and declared["deep"]["default"] is False and declared["limit"]["default"] is None
    folder = tmp_path / "{braces}"                        # papermill formats paths
    write_notebook(folder / "a.ipynb", parameters='colour: str = "#fff"  # hex')
    assert parameters_of(folder / "a.ipynb")["colour"]["default"] == "#fff"
    write_notebook(folder / "b.ipynb", "x = 1")
    assert parameters_of(folder / "b.ipynb") == {}


@pytest.mark.parametrize(("cell", "message"), [
    ("epochs: int = 3  # eta=0.5 is fixed", "does not see parameter 'epochs'"),
    ("a = 1; b = 2", "does not see parameter"),
    ("epochs: int = 3\ntotal = epochs * 2", "default of parameter 'total' must be a literal"),
])
def test_a_parameters_cell_that_papermill_would_misread_is_refused(tmp_path, cell, message):
    write_notebook(tmp_path / "a.ipynb", parameters=cell)
    with pytest.raises(ValueError, match=message):
        parameters_of(tmp_path / "a.ipynb")


def test_a_notebook_without_a_kernel_or_that_is_none_is_refused(tmp_path):
    write_notebook(tmp_path / "a.ipynb", parameters="a: int = 1")
    (tmp_path / "a.ipynb").write_text((tmp_path / "a.ipynb").read_text().replace('"kernelspec"', '"other"'))
    with pytest.raises(ValueError, match="a.ipynb: .*kernel"):
        parameters_of(tmp_path / "a.ipynb")
    (tmp_path / "b.ipynb").write_text("{")
    with pytest.raises(ValueError, match="b.ipynb is no readable notebook"):
        parameters_of(tmp_path / "b.ipynb")


@pytest.mark.parametrize(("yml", "error", "message"), [
    ("smoke: {01_tiny: {epoch: 3}}", ValueError,
     r"profile 'smoke', 01_tiny: unknown parameter 'epoch' \(did you mean 'epochs'\? known: deep, epochs"),
    ("smoke:\npaper: {01_tiny: {epoch: 3}}", ValueError, "profile 'paper', 01_tiny: unknown parameter 'epoch'"),
    ("smoke: {01_tniy: {epochs: 3}}", ValueError, "no notebook '01_tniy' .*did you mean '01_tiny'"),
    ("smoke: {_draft: {}}", ValueError, "no notebook '_draft'"),
    ("smoke: {01_tiny: {epochs: true}}", TypeError, r"01_tiny: parameter 'epochs': expected int \(such as 2\), got True"),
    ("smoke: {01_tiny: {epochs: 1.5}}", TypeError, "expected int"),
    ("smoke: {01_tiny: {eta: high}}", TypeError, "expected float"),
    ("smoke: {01_tiny: {deep: 1}}", TypeError, "expected bool"),
    ("smoke: {01_tiny: {seeds: 3}}", TypeError, "expected list"),
    ("smoke: {01_tiny: {seeds: [0, a]}}", TypeError, "parameter 'seeds': expected int"),
    ("smoke: {01_tiny: {epochs: }}", TypeError, "got None"),
    ("smoke: {01_tiny: {store: x}}", ValueError, "'store' is filled in by `reproduce`"),
    ("smoke: {01_tiny: [1]}", ValueError, "a mapping of parameters is expected"),
    ("smoke:\n  01_tiny: {epochs: 3}\n  01_tiny: {eta: 1}", ValueError, "line 2: 01_tiny occurs twice"),
    ("cpu:", ValueError, "unknown profile 'smoke'"),
    ("smoke: {", ValueError, "profiles.yml: while parsing"),
    ("", ValueError, "a mapping of profiles is expected"),
])
def test_a_wrong_profile_is_refused_before_anything_runs(book, yml, error, message):
    profiles(book, yml)
    with pytest.raises(error, match=message):
        reproduce(root=book)
    assert not (book / ".runs").exists()


@pytest.mark.parametrize(("options", "message"), [
    ({"tables": ["tinny"]}, "unknown table 'tinny' .*did you mean 'tiny'"),
    ({"profile": "smok"}, "unknown profile 'smok' .*did you mean 'smoke'"),
    ({"parameters": {"epoch": 1}}, "parameter 'epoch' .*did you mean 'epochs'"),
    ({"parameters": {"eta": 1.0}, "tables": ["broken"]}, r"no notebook to be run has a parameter 'eta' \(known: epochs\)"),
    ({"parameters": {"jobs": 2}}, "'jobs' is an argument of `reproduce`"),
])
def test_wrong_arguments_are_refused_before_anything_runs(book, options, message):
    with pytest.raises(ValueError, match=message):
        reproduce(root=book, **options)
    assert not (book / ".runs").exists()


def test_nothing_to_reproduce_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no notebooks in nbs/6_reproduction"):
        reproduce(root=tmp_path)
    write_notebook(tmp_path / "nbs/6_reproduction/a.ipynb", "1")
    with pytest.raises(FileNotFoundError, match=r"profiles\.yml is missing"):
        reproduce(root=tmp_path)


def test_the_projects_own_profiles_are_there():
    loaded = runs._load_yaml(ROOT / "nbs/6_reproduction/profiles.yml")
    assert {"smoke", "cpu", "paper"} <= set(loaded)


class Bar:
    disable, total, n, initial = False, None, 0, 0

    def update(self, k):
        self.n += k


def test_the_relay_joins_pieces_and_counts_every_grid():
    bar, said = Bar(), []
    relay = runs._Relay(bar, said.append)
    for piece in ("loading\n[ 1/", "10] ce: a 1 (kept)\n[ 2/10] c", "e: a 1 (0.1 s)\n", "[1, 2]\n[1/3] x: a 1 (0.1 s)\n", "[2/3] cut"):
        relay.write(piece)
    assert said == ["[ 1/10] ce: a 1 (kept)", "[ 2/10] ce: a 1 (0.1 s)", "[1/3] x: a 1 (0.1 s)"]
    assert (bar.total, bar.n, bar.initial) == (13, 3, 1)
