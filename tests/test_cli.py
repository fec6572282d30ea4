"""The command `ibma`: output, exit codes, one line for every wrong command."""
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import ibma
from ibma import cli, runs

ROOT = Path(ibma.__file__).resolve().parents[1]


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "nbs" / "6_reproduction"
    folder.mkdir(parents=True)
    cells = [nbformat.v4.new_code_cell('store: str = "x"\nepochs: int = 2\nname: str = "a"', metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell("from ibma.runs import run_grid\nrun_grid(store, 'tiny', [{'epochs': epochs, 'seed': 0}], "
                                       "lambda config: {'a': 1.0}, data_kind='simulated');")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "01_tiny.ipynb")
    (folder / "profiles.yml").write_text("smoke: {01_tiny: {epochs: 3}}\ncpu: {}\n")
    return tmp_path


def test_reproduce_then_results(book, capsys):
    assert cli.main(["reproduce", "--set", "name=x=y"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("[1/1] seed=0: a 1.000 (") and out[1].startswith("01_tiny: finished (")
    assert cli.main(["reproduce", "--dry-run", "--set", "name=x=y"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split("  ")[0] == "notebook" and out[1].split() == ["01_tiny", "kept", "no", "records", "epochs=3", 'name="x=y"', 'store=".runs/smoke"']

    run = next((book / ".runs/smoke/tiny").glob("*.json"))
    (run.parent / "broken.json").write_text(run.read_text()[:50])
    assert cli.main(["results"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split() == [".runs/smoke", "tiny", "1", "0", "1", "simulated"] and "tiny/broken.json is unreadable" in err
    assert cli.main(["results", "--store", ".runs/smoke"]) == 0
    assert capsys.readouterr().out == out


def test_dry_run_runs_nothing(book, capsys):
    assert cli.main(["reproduce", "--dry-run", "--profile", "cpu", "--table", "tiny", "--set", "epochs=9"]) == 0
    out = capsys.readouterr().out
    assert "epochs=9" in out and 'store="results"' in out and "no records" in out
    assert not (book / ".runs").exists() and not (book / "results").exists()


def test_dry_run_says_how_long_earlier_runs_took(book, capsys, monkeypatch):
    monkeypatch.setattr(runs.Page, "recorded", lambda page, root: (2, 7200.0))
    assert cli.main(["reproduce", "--dry-run", "--profile", "cpu", "--table", "tiny"]) == 0
    assert "2 runs, 2.0 h" in capsys.readouterr().out


def test_adopt_reaches_the_grids(monkeypatch):
    seen = []
    monkeypatch.setattr(runs, "reproduce", lambda **options: seen.append(os.environ.get("IBMA_ADOPT")))
    monkeypatch.delenv("IBMA_ADOPT", raising=False)
    assert cli.main(["reproduce"]) == 0 and cli.main(["reproduce", "--adopt", "3"]) == 0
    monkeypatch.delenv("IBMA_ADOPT")
    assert seen == [None, "3"]


def test_a_failed_notebook_is_exit_code_1(monkeypatch, capsys):
    def fail(**options):
        raise runs.ReproductionError("01_tiny failed in cell 2 of 3: ValueError: x")
    monkeypatch.setattr(runs, "reproduce", fail)
    assert cli.main(["reproduce"]) == 1
    assert capsys.readouterr().err == "ibma: 01_tiny failed in cell 2 of 3: ValueError: x\n"


def test_options_reach_reproduce(monkeypatch):
    seen = {}
    monkeypatch.setattr(runs, "reproduce", lambda **options: seen.update(options))
    assert cli.main(["reproduce", "--table", "a", "--table", "b", "--jobs", "-1", "--store", "s", "--root", "r", "--profile", "paper",
                     "--set", "seeds=[0, 1]", "--set", "eta=1e-3", "--set", "deep=true", "--set", "data=digits"]) == 0
    assert seen == {"profile": "paper", "tables": ["a", "b"], "root": "r", "store": "s", "jobs": -1,
                    "parameters": {"seeds": [0, 1], "eta": 0.001, "deep": True, "data": "digits"}}


@pytest.mark.parametrize(("argv", "message"), [
    ([], "a command is needed"),
    (["repro"], "invalid choice: 'repro'"),
    (["reproduce", "--fast"], "unrecognized arguments: --fast"),
    (["reproduce", "--profile", "smok"], "did you mean 'smoke'"),
    (["reproduce", "--table", "tinny"], "did you mean 'tiny'"),
    (["reproduce", "--set", "epoch=1"], "did you mean 'epochs'"),
    (["reproduce", "--set", "epochs=many"], "expected int"),
    (["reproduce", "--set", "epochs"], "NAME=VALUE is expected, not 'epochs'"),
    (["reproduce", "--set", "epochs=1", "--set", "epochs=2"], "--set epochs is given twice"),
    (["reproduce", "--jobs", "0"], "a number of processes is expected"),
    (["reproduce", "--root", "nowhere"], "no notebooks in nbs/6_reproduction"),
    (["results", "--store", "nowhere"], "no folder 'nowhere'"),
])
def test_a_wrong_command_is_one_line_and_exit_code_2(book, capsys, argv, message):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err and len(err.splitlines()) == 1 and out == ""
    assert not (book / ".runs").exists()


def test_a_missing_library_is_one_line(book, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "papermill", None)
    assert cli.main(["reproduce"]) == 2
    assert 'pip install "ibma[book]"' in capsys.readouterr().err


def test_ctrl_c_is_told_apart(monkeypatch, capsys):
    def stop(**options):
        raise KeyboardInterrupt
    monkeypatch.setattr(runs, "reproduce", stop)
    assert cli.main(["reproduce"]) == 130
    assert capsys.readouterr().err == "ibma: interrupted; finished runs are kept\n"


def test_no_results_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["results"]) == 0
    assert "no results yet" in capsys.readouterr().out


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ibma {ibma.__version__}\n"
    assert cli.main(["--help"]) == 0
    assert "reproduce" in capsys.readouterr().out


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "ibma.cli", "repro"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("ibma: error: ") and done.stdout == ""
