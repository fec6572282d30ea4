"""`ibma train | predict | evaluate | explain | compare | methods`, run as a user runs them: results, exit codes, one line for every mistake."""
import csv
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ibma
from ibma import cli, commands
from ibma.checkpoints import CheckpointFolder
from ibma.methods import METHODS, create
from ibma.model_files import load_model, read_about, save_model

ROOT = Path(ibma.__file__).resolve().parents[1]
QUICK = ["--epochs", "2", "--dim", "8", "--lr", "0.01", "-q"]


def run(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def need(library):
    """Skip where it is not installed, without importing it."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


def arrays(n=120, seed=0):
    """Three classes that both modalities show."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    centres = np.random.default_rng(5).normal(size=(2, 3, 6)) * 3
    return {"sound": (centres[0][y] + rng.normal(size=(n, 6))).astype(np.float32), "sight": (centres[1][y] + rng.normal(size=(n, 6))).astype(np.float32), "y": y}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "data.npz", **arrays())
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data.npz and a model of it."""
    folder = tmp_path_factory.mktemp("trained")
    np.savez(folder / "data.npz", **arrays())
    assert cli.main(["train", str(folder / "data.npz"), "--out", str(folder / "model.safetensors"), "--epochs", "4", "--dim", "8", "--lr", "0.02", "-q"]) == 0
    return folder


@pytest.fixture
def there(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


# ---------------------------------------------------------------- train

def test_train_writes_one_model_file_and_leaves_nothing_else(here, capsys):
    code, out, err = run(capsys, "train", "data.npz", "--out", "model.safetensors", *QUICK)
    assert code == 0 and err == ""
    assert out.splitlines()[0] == "ibma on data (user data): 72 samples to train, 24 to validate, 24 kept aside"
    assert out.splitlines()[1].startswith("2 epochs in ") and "valid/accuracy" in out and out.splitlines()[-1] == "written: model.safetensors"
    assert sorted(p.name for p in here.iterdir()) == ["data.npz", "model.safetensors"]
    about = read_about("model.safetensors")
    assert about["method"] == "ibma" and about["options"] == {"dim": 8} and len(about["meta"]["history"]) == 2
    assert str(here) not in json.dumps(about)   # a model file says nothing of the machine


def test_the_command_does_what_the_interface_does(here, capsys):
    from ibma.data import MultimodalData
    from ibma.training import TrainingConfig, fit
    found = arrays()
    data = MultimodalData.from_arrays({"sound": found["sound"], "sight": found["sight"]}, found["y"])
    train, valid, _ = data.split(0.2, 0.2, 3)
    method = create("ibma", data, seed=4, dim=8, eta=0.25)
    result = fit(method, train, valid, TrainingConfig(epochs=2, batch_size=32, lr=0.01, seed=4, scheduler="cosine"))
    code, out, _ = run(capsys, "train", "data.npz", "--out", "m.safetensors", *QUICK, "--option", "eta=0.25", "--batch-size", 32, "--seed", 4, "--split-seed", 3,
                       "--set", "scheduler=cosine", "--json")
    assert code == 0 and json.loads(out)["metrics"] == pytest.approx(result.metrics)
    loaded, _ = load_model("m.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), method.state_dict().values(), strict=True))


def test_unlabelled_rows_take_part(here, capsys):
    found = arrays()
    found["y"] = np.where(np.arange(120) % 2, -1, found["y"])
    np.savez("half.npz", **found)
    code, out, _ = run(capsys, "train", "half.npz", "--out", "m.safetensors", *QUICK, "--json")
    done = json.loads(out)
    assert code == 0 and (done["labelled"], done["valid"], done["test"]) == (36, 12, 12) and done["train"] == 36 + 60   # parts to measure on are drawn from the labelled
    code, out, _ = run(capsys, "train", "half.npz", "--out", "m.safetensors", *QUICK, "--overwrite")
    assert "96 samples to train, 60 of them unlabelled" in out


@pytest.mark.parametrize("y", ["text", "labels", "numbers", "float"])
def test_every_kind_of_target(here, capsys, y):
    found, more = arrays(), []
    if y == "text":
        found["y"] = np.array(["cat", "dog", "eel"])[found["y"]]
    elif y == "labels":
        found["y"] = np.stack([found["y"] == 0, found["y"] == 1], 1).astype(np.float32)
        found["y"][3, 1] = np.nan
    elif y == "numbers":
        found["y"], more = found["y"] + 0.5, ["--task", "regression", "--bins", "1,2"]
    else:
        found["y"] = np.where(np.arange(120) == 7, np.nan, found["y"])
    np.savez("t.npz", **found)
    assert run(capsys, "train", "t.npz", "--out", "m.safetensors", *QUICK, *more)[0] == 0
    code, out, _ = run(capsys, "predict", "m.safetensors", "t.npz")
    header, first = out.splitlines()[:2]
    expected = {"text": "row,prediction,p(cat),p(dog),p(eel)", "labels": "row,p(0),p(1)", "numbers": "row,prediction", "float": "row,prediction,p(0),p(1),p(2)"}
    assert code == 0 and header == expected[y] and len(out.splitlines()) == 121
    if y == "text":
        assert first.split(",")[1] in ("cat", "dog", "eel")
    code, out, _ = run(capsys, "evaluate", "m.safetensors", "t.npz", "--resamples", 20, "--json")
    assert code == 0 and json.loads(out)["part"] == "test" and {"text": "accuracy", "labels": "mauc", "numbers": "mae", "float": "accuracy"}[y] in json.loads(out)["metrics"]


def test_parquet_with_missing_cells_groups_and_parts(here, capsys):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    found = arrays()
    columns = {"sound": [None if i == 3 else row.tolist() for i, row in enumerate(found["sound"])], "sight": found["sight"].tolist(),
               "label": [None if i == 5 else ("cat", "dog", "eel")[k] for i, k in enumerate(found["y"])], "who": [f"p{i // 6}" for i in range(120)], "note": ["x"] * 120}
    parquet.write_table(pa.table(columns), "t.parquet")
    data = commands.read_arrays("t.parquet", target="label", groups="who", modalities=["sound", "sight"])
    assert not data.mask["sound"][3] and data.mask["sound"].sum() == 119 and data.target[5] == -1 and data.task.class_names == ("cat", "dog", "eel") and len(data.groups.unique()) == 20
    np.testing.assert_array_equal(data.inputs["sound"][4], found["sound"][4])
    code, out, err = run(capsys, "train", "t.parquet", "--target", "label", "--out", "m.safetensors", *QUICK)
    assert code == 2 and "'who' of t.parquet holds text, no numbers: choose the modalities with --modality" in err
    argv = ["train", "t.parquet", "--target", "label", "--groups", "who", "--modality", "sound", "--modality", "sight", "--out", "m.safetensors", *QUICK]
    assert run(capsys, *argv)[0] == 0
    code, out, _ = run(capsys, "evaluate", "m.safetensors", "t.parquet", "--resamples", 50, "--json")   # the names of the columns are remembered
    assert code == 0 and json.loads(out)["part"] == "test" and json.loads(out)["resampled"] == "groups"
    code, out, _ = run(capsys, "predict", "m.safetensors", "t.parquet", "--out", "p.parquet")
    assert code == 0 and parquet.read_table("p.parquet").num_rows == 120


def test_published_parts_are_kept(here, capsys):
    part = np.array(["train"] * 60 + ["validation"] * 20 + ["test"] * 40)
    np.savez("s.npz", **arrays(), split=part)
    code, out, _ = run(capsys, "train", "s.npz", "--out", "m.safetensors", *QUICK, "--json")
    done = json.loads(out)
    assert code == 0 and (done["train"], done["valid"], done["test"]) == (60, 20, 40)
    np.savez("w.npz", **arrays(), split=np.array(["trial"] * 120))
    assert "holds 'trial': parts are train, valid and test" in run(capsys, "train", "w.npz", "--out", "n.safetensors")[2]


def test_without_validation_or_test(here, capsys):
    code, out, _ = run(capsys, "train", "data.npz", "--out", "m.safetensors", *QUICK, "--valid", 0, "--test", 0, "--json")
    assert code == 0 and json.loads(out)["train"] == 120 and "valid/accuracy" not in json.loads(out)["metrics"]
    code, out, err = run(capsys, "evaluate", "m.safetensors", "data.npz", "--resamples", 10)
    assert code == 0 and "part all" in out and "these data include those the model was trained on" in err


def test_patience_keeps_the_best_epoch(here, capsys):
    code, out, _ = run(capsys, "train", "data.npz", "--out", "m.safetensors", "--epochs", 30, "--dim", 8, "--lr", 0.05, "--patience", 2, "-q", "--json")
    done = json.loads(out)
    history = read_about("m.safetensors")["meta"]["history"]
    values = [row["valid/accuracy"] for row in history]
    assert code == 0 and done["epochs"] < 30 and done["kept_epoch"] == values.index(max(values)) and done["metrics"]["valid/accuracy"] == max(values)


def test_a_named_set(here, capsys):
    argv = ["train", "sim-3", "--data-option", "n=120", "--out", "m.safetensors", *QUICK]
    assert run(capsys, *argv)[0] == 0
    code, out, _ = run(capsys, "evaluate", "m.safetensors", "sim-3", "--resamples", 20)   # drawn with the options that it was trained with
    assert code == 0 and "part test" in out and "simulated data" in out
    code, _, err = run(capsys, "predict", "m.safetensors", "digits")
    assert code == 2 and "has no modality" in err and len(err.splitlines()) == 1


# ---------------------------------------------------------------- interrupted

def test_ctrl_c_leaves_a_run_that_goes_on_to_the_same_weights(here, capsys):
    argv = ["train", "data.npz", "--out", "model.safetensors", "--epochs", "30", "--dim", "8", "--lr", "0.01", "-q"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "ibma.cli", *argv], cwd=here, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder, deadline = CheckpointFolder(here / "model.safetensors.run"), time.monotonic() + 120
    while max(folder.epochs(), default=0) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and len(err.splitlines()) == 1, err
    found = re.fullmatch(r"ibma: interrupted after (\d+) of 30 epochs; go on with: (.*)\n", err)
    assert found and 2 <= int(found[1]) < 30 and not (here / "model.safetensors").exists()

    assert run(capsys, *argv)[::2] == (2, "ibma: error: 'model.safetensors.run' holds an unfinished run: --resume goes on with it, --overwrite begins anew\n")
    again = shlex.split(found[2])
    assert again == ["ibma", *argv, "--resume"] and cli.main(again[1:]) == 0
    assert not (here / "model.safetensors.run").exists()
    assert run(capsys, *argv[:3], "whole.safetensors", *argv[4:])[0] == 0
    resumed, whole = (load_model(name)[0].state_dict() for name in ("model.safetensors", "whole.safetensors"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_kept_folder_of_checkpoints_and_beginning_anew(here, capsys):
    argv = ["train", "data.npz", "--out", "m.safetensors", *QUICK, "--run-dir", "run"]
    assert run(capsys, *argv)[0] == 0 and CheckpointFolder("run").epochs()[-1] == 2
    os.unlink("m.safetensors")
    assert "--resume goes on" in run(capsys, *argv)[2]
    assert run(capsys, *argv, "--lr", "0.02", "--resume")[::2] == (2, "ibma: error: run_dir 'run' belongs to another run (lr: 0.01 then, 0.02 now); choose another folder\n")
    assert run(capsys, *argv, "--lr", "0.02", "--overwrite")[0] == 0 and CheckpointFolder("run").epochs()[-1] == 2


# ---------------------------------------------------------------- wrong commands

WRONG = [
    (["train"], "the following arguments are required: DATA"),
    (["train", "gone.npz"], "no file 'gone.npz'"),
    (["train", "digit"], "did you mean 'digits'"),
    (["train", "notes.txt"], "arrays are read from .npz and .parquet files"),
    (["train", "broken.npz"], "broken.npz cannot be read as .npz"),
    (["train", "objects.npz"], "save arrays of numbers or of text"),
    (["train", "data.npz", "--epoch", "3"], "unrecognized arguments: --epoch (did you mean --epochs?)"),
    (["train", "data.npz", "more.npz"], "unrecognized arguments: more.npz"),
    (["train", "data.npz", "--epochs", "many"], "Invalid value for '--epochs'"),
    (["train", "data.npz", "--epochs", "0"], "epochs must be positive"),
    (["train", "data.npz", "--method", "ibna"], "did you mean 'ibma'"),
    (["train", "data.npz", "--option", "etta=1"], "did you mean 'eta'"),
    (["train", "data.npz", "--option", "eta"], "NAME=VALUE is expected, not 'eta'"),
    (["train", "data.npz", "--set", "sheduler=cosine"], "did you mean 'scheduler'"),
    (["train", "data.npz", "--set", "scheduler=cosine", "--set", "scheduler=step"], "--set scheduler is given twice"),
    (["train", "data.npz", "--target", "label"], "has no 'label' for the target: there are sound, sight, y; name it with --target"),
    (["train", "data.npz", "--modality", "smell"], "data.npz has no 'smell'"),
    (["train", "data.npz", "--valid", "0.6", "--test", "0.5"], "their sum must leave something to train on"),
    (["train", "data.npz", "--task", "ranking"], "'ranking' is unknown"),
    (["train", "data.npz", "--task", "regression"], "a regression needs bins"),
    (["train", "data.npz", "--bins", "a,b"], "numbers with commas between them"),
    (["train", "data.npz", "--data-option", "n=3"], "--data-option is for sets with a name"),
    (["train", "data.npz", "--device", "cuda"], "sees no GPU"),
    (["predict", "gone.safetensors", "data.npz"], "no model file 'gone.safetensors'"),
    (["predict", "notes.txt", "data.npz"], "notes.txt is damaged or no safetensors file"),
    (["predict", "foreign.safetensors", "data.npz"], "foreign.safetensors is no model file of this version"),
    (["predict", "m.safetensors", "data.npz", "--out", "p.xls"], "written as .csv, .json, .npz or .parquet"),
    (["evaluate", "m.safetensors"], "the following arguments are required: DATA"),
    (["evaluate", "m.safetensors", "data.npz", "--part", "some"], "'some' is unknown: train, valid, test or all"),
    (["evaluate", "m.safetensors", "data.npz", "--resamples", "1"], "Invalid value for '--resamples'"),
    (["explain", "gone.safetensors", "data.npz", "--out", "e.bmp"], "pictures are written as .png"),
    (["compare", "data.npz", "ibma", "cee"], "did you mean 'ce'"),
    (["compare", "data.npz", "ibma", "ce", "--reference", "omib"], "'omib' is not among the methods compared"),
    (["compare", "data.npz", "--splits", "0"], "Invalid value for '--splits'"),
    (["compare", "data.npz", "--set", "epoch=1"], "did you mean 'epochs'"),
    (["methods", "imba"], "did you mean 'ibma'"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "")
def test_a_wrong_command_is_one_line_and_exit_code_2(here, capsys, monkeypatch, argv, message):
    from safetensors.torch import save_file
    if argv[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    Path("notes.txt").write_text("no arrays")
    Path("broken.npz").write_bytes(Path("data.npz").read_bytes()[:300])
    np.savez("objects.npz", y=np.array([{}, {}], dtype=object))
    save_file({"a": torch.zeros(2)}, "foreign.safetensors")
    before = sorted(p.name for p in here.iterdir())
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1, err
    assert [p.name for p in here.iterdir() if p.name not in before and not p.name.endswith(".run")] == []


def test_nothing_is_replaced_unasked(there, capsys):
    before = (there / "model.safetensors").read_bytes()
    assert "'model.safetensors' is there already: --overwrite replaces it" in run(capsys, "train", "data.npz", *QUICK)[2]
    Path("p.csv").write_text("mine")
    assert "is there already" in run(capsys, "predict", "model.safetensors", "data.npz", "--out", "p.csv")[2] and Path("p.csv").read_text() == "mine"
    assert run(capsys, "predict", "model.safetensors", "data.npz", "--out", "p.csv", "--overwrite")[0] == 0 and Path("p.csv").read_text() != "mine"
    assert (there / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("command", ["train", "predict", "explain", "compare"])
def test_a_folder_that_cannot_be_written(there, capsys, command):
    Path("file").write_text("")
    where = "file/folder"   # as a read-only folder is, also for the administrator
    argv = {"train": ["train", "data.npz", "--out", f"{where}/m.safetensors"], "predict": ["predict", "model.safetensors", "data.npz", "--out", f"{where}/p.csv"],
            "explain": ["explain", "model.safetensors", "data.npz", "--out", f"{where}/e.png"], "compare": ["compare", "data.npz", "ce", "--store", where, "--epochs", "1"]}[command]
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and "cannot be written" in err and len(err.splitlines()) == 1, err


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write everywhere")
def test_a_read_only_folder(there, capsys):
    folder = there / "locked"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o555)
    code, _, err = run(capsys, "train", "data.npz", "--out", "locked/m.safetensors", *QUICK)
    assert code == 2 and "choose a folder on a writable disk" in err


def test_numbers_that_run_away_are_exit_code_1(here, capsys):
    code, out, err = run(capsys, "train", "data.npz", "--out", "m.safetensors", "--epochs", 3, "--lr", "1e18", "--set", "optimizer=sgd", "-q")
    assert code == 1 and out == "" and "loss terms" in err and "lower lr" in err and not Path("m.safetensors").exists()


# ---------------------------------------------------------------- use a model

def test_predictions_are_those_of_the_method(there, capsys):
    method, _ = load_model("model.safetensors")
    found = arrays()
    p = method.predict({name: torch.from_numpy(found[name]) for name in ("sound", "sight")})
    code, out, err = run(capsys, "predict", "model.safetensors", "data.npz")
    rows = list(csv.reader(out.splitlines()))
    assert code == 0 and err == "" and [int(row[1]) for row in rows[1:]] == p.argmax(-1).tolist()
    np.testing.assert_allclose(np.array(rows[1:], dtype=float)[:, 2:], p, atol=1e-5)
    code, out, _ = run(capsys, "predict", "model.safetensors", "data.npz", "--json", "--part", "test")
    assert code == 0 and len(json.loads(out)) == 24
    assert run(capsys, "predict", "model.safetensors", "data.npz", "--out", "p.npz")[0] == 0
    np.testing.assert_array_equal(np.load("p.npz")["prediction"].astype(int), p.argmax(-1))


def test_predict_without_targets_and_with_a_modality_missing(there, capsys):
    found = arrays()
    np.savez("new.npz", sound=found["sound"][:10])
    code, out, err = run(capsys, "predict", "model.safetensors", "new.npz")
    assert code == 0 and len(out.splitlines()) == 11 and err == "ibma: new.npz has no 'sight': taken as missing from every sample\n"
    np.savez("wide.npz", sound=found["sound"][:, :4], sight=found["sight"])
    code, _, err = run(capsys, "predict", "model.safetensors", "wide.npz")
    assert code == 2 and "modality 'sound'" in err and "the task expects" in err
    np.savez("none.npz", smell=found["sound"])
    assert "none.npz has none of the modalities sound, sight: there are smell" in run(capsys, "predict", "model.safetensors", "none.npz")[2]


def test_evaluate_looks_at_what_training_did_not_see(there, capsys):
    from ibma.metrics import bootstrap, classification_metrics, predict_all
    data = commands.read_arrays("data.npz")
    _, _, test = data.split(0.2, 0.2, 0)
    method, _ = load_model("model.safetensors")
    p = predict_all(method, test)
    code, out, _ = run(capsys, "evaluate", "model.safetensors", "data.npz", "--resamples", 40, "--json")
    found = json.loads(out)
    assert code == 0 and found["part"] == "test" and found["samples"] == 24
    for name, entry in found["metrics"].items():   # intervals are those of `bootstrap`, metric by metric
        expected = bootstrap(lambda p, y, name=name: classification_metrics(p, y)[name], p, test.target, resamples=40)
        assert {k: entry[k] for k in expected} == pytest.approx(expected)
    code, out, err = run(capsys, "evaluate", "model.safetensors", "data.npz", "--metric", "accuracy", "--part", "all", "--resamples", 20)
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:]] == ["metric", "accuracy"] and "trained on" in err
    assert "no metric 'accurracy' here" in run(capsys, "evaluate", "model.safetensors", "data.npz", "--metric", "accurracy")[2]


def test_a_renamed_file_is_known_again_and_a_relabelled_one_refused(there, capsys):
    os.replace("data.npz", "other.npz")
    try:
        assert "part test: 24 samples" in run(capsys, "evaluate", "model.safetensors", "other.npz", "--resamples", 20)[1]
        found = arrays()
        np.savez("relabelled.npz", **{**found, "y": (found["y"] + 1) % 3})
        code, _, err = run(capsys, "evaluate", "model.safetensors", "relabelled.npz")
        assert code == 2 and "has the inputs that the model was trained on" in err
        np.savez("fresh.npz", **arrays(seed=9))
        assert "part all: 120 samples" in run(capsys, "evaluate", "model.safetensors", "fresh.npz", "--resamples", 20)[1]
        assert "has no published part 'test'" in run(capsys, "evaluate", "model.safetensors", "fresh.npz", "--part", "test")[2]
    finally:
        os.replace("other.npz", "data.npz")


def test_explain_draws_a_picture(here, capsys, monkeypatch):
    need("pytorch_grad_cam")
    found, rng = arrays(), np.random.default_rng(0)
    picture = rng.normal(size=(120, 1, 8, 8)).astype(np.float32)
    picture[np.arange(120), 0, 2 * found["y"], 3] += 4
    np.savez("p.npz", picture=picture, sound=found["sound"], y=found["y"])
    assert run(capsys, "train", "p.npz", "--out", "m.safetensors", *QUICK)[0] == 0
    code, out, err = run(capsys, "explain", "m.safetensors", "p.npz", "--out", "e.png", "--row", 1, "--row", 5, "--json")
    done = json.loads(out)
    assert code == 0 and done["modality"] == "picture" and len(done["rows"]) == 2 and done["maps"] == ["decision", "own head"] and done["part"] == "test"
    from PIL import Image
    assert Image.open("e.png").size[0] > 300
    assert "is there already" in run(capsys, "explain", "m.safetensors", "p.npz", "--out", "e.png")[2]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        assert 'pip install "ibma[explain]"' in run(capsys, "explain", "m.safetensors", "p.npz", "--out", "g.png")[2]
    assert "is a vector" in run(capsys, "explain", "m.safetensors", "p.npz", "--out", "f.png", "--modality", "sound")[2]
    assert run(capsys, "explain", "m.safetensors", "p.npz", "--out", "f.png", "--row", 999)[0] == 2


def test_explain_needs_a_picture(there, capsys):
    need("pytorch_grad_cam")
    assert "there is nothing to draw a map on" in run(capsys, "explain", "model.safetensors", "data.npz", "--out", "e.png")[2]


# ---------------------------------------------------------------- compare, methods

def test_compare(here, capsys):
    from ibma.significance import paired_t
    argv = ["compare", "data.npz", "ibma", "concat", "--splits", 3, "--epochs", 1, "--dim", 8, "--lr", 0.01]
    code, out, err = run(capsys, *argv, "--json", "--csv", "t.csv")
    found = json.loads(out)
    assert code == 0 and found["metric"] == "accuracy" and found["reference"] == "ibma" and len(err.splitlines()) == 6
    rows = {row["method"]: row for row in found["rows"]}
    values = {name: [] for name in rows}
    for path in Path(".runs/compare/data").glob("*.json"):
        record = json.loads(path.read_text())
        values[record["config"]["method"]].append((record["seed"], record["metrics"]["accuracy"]))
    ordered = {name: [v for _, v in sorted(pairs)] for name, pairs in values.items()}
    assert rows["concat"]["mean"] == pytest.approx(np.mean(ordered["concat"])) and rows["ibma"]["p"] is None
    expected = paired_t(ordered["concat"], ordered["ibma"], 24 / 72)
    assert rows["concat"]["difference"] == pytest.approx(expected.difference) and rows["concat"]["p"] == pytest.approx(expected.p, nan_ok=True)
    assert len(Path("t.csv").read_text().splitlines()) == 3
    code, out, err = run(capsys, *argv)   # nothing is run twice
    assert code == 0 and all("kept" in line for line in err.splitlines()) and out.splitlines()[1].split()[:3] == ["method", "mean", "sd"]
    code, out, _ = run(capsys, "results", "--store", ".runs/compare", "--json")
    assert json.loads(out) == [{"store": ".runs/compare", "table": "data", "finished": 6, "failed": 0, "unreadable": 0, "data": ["user"]}]


def test_compare_is_stopped_and_goes_on(here, capsys, monkeypatch):
    real, calls = commands._compare_run, []

    def stopped(config):
        calls.append(config)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(config)

    monkeypatch.setattr(commands, "_compare_run", stopped)
    code, _, err = run(capsys, "compare", "data.npz", "ce", "concat", "--splits", 1, "--epochs", 1, "--dim", 8)
    assert code == 130 and err.splitlines()[-1] == "ibma: interrupted; finished runs are kept, the same command goes on"


def test_a_failed_run_is_a_hole_and_exit_code_1(here, capsys):
    code, out, err = run(capsys, "compare", "data.npz", "ce", "concat", "--splits", 1, "--epochs", 1, "--lr", "1e18", "--set", "optimizer=sgd")
    assert code == 1 and "every run failed" in err and out == ""


def test_methods(capsys):
    code, out, _ = run(capsys, "methods")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:]] == list(METHODS)
    found = {row["name"]: row for row in json.loads(run(capsys, "methods", "--json")[1])}
    assert found["ibma"]["options"]["eta"] == 0.5 and "dim" in found["ce"]["all_options"] and all(row["summary"].endswith(".") or row["summary"] for row in found.values())
    assert "eta" in run(capsys, "methods", "ibma")[1]


def test_options_with_dots():
    assert commands.options_of("ibma", {"eta": 1, "encoders.image.depth": 2, "encoders.image.width": 8}) == {"eta": 1, "encoders": {"image": {"depth": 2, "width": 8}}}
    with pytest.raises(ValueError, match="contradicts"):
        commands.options_of("ibma", {"encoders": 1, "encoders.image": 2})


# ---------------------------------------------------------------- the whole

def test_every_command_has_help_with_an_example(capsys):
    for command in ["train", "predict", "evaluate", "explain", "compare", "methods", "reproduce", "results", "data list", "data prepare", "data verify", "data describe"]:
        code, out, _ = run(capsys, *command.split(), "--help")
        assert code == 0 and f"$ ibma {command}" in out, command


def test_help_and_version_import_nothing_heavy():
    code = "import sys; from ibma import cli; cli.main(['train', '--help']); print([m for m in ('torch', 'numpy', 'transformers', 'pandas', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(("words", "expected"), [("ibma tr", "train"), ("ibma train --method om", "omib"), ("ibma data describe av-d", "av-digits")])
def test_shell_completion(words, expected):
    env = {**os.environ, "_IBMA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run([sys.executable, "-m", "ibma.cli"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert expected in done.stdout.split(), done.stderr


def test_model_files(tmp_path, capsys):
    data = commands.read_data("sim-3", options={"n": 60})
    for name in ("ibma", "l_mib"):
        method = create(name, data, seed=0, dim=8)
        path = save_model(tmp_path / f"{name}.safetensors", method, name, {"dim": 8}, {"note": 1})
        loaded, about = load_model(path)
        assert about["meta"] == {"note": 1} and loaded.task == method.task and not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), method.state_dict().values(), strict=True))
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match="damaged"):
        load_model(path)
    with pytest.raises(TypeError, match="must be JSON"):
        save_model(path, method, name, {"dim": object()})
    save_model(path, method, name, {"dim": 9})
    with pytest.raises(ValueError, match="another version"):
        load_model(path)
