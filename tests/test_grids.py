"""Grids of runs under stress: killed workers, time limits, clusters, several processes on one store, full and read-only disks."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ibma import runs
from ibma.runs import RunStore, run_grid


def killer(config):
    if config["seed"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return {"value": config["seed"] ** 2}


def test_a_killed_worker_is_a_hole_and_the_others_are_kept(tmp_path):
    frame = run_grid(tmp_path, "main", [{"seed": s} for s in range(9)], killer, n_jobs=2, progress=False)
    assert frame["status"].tolist() == ["finished"] * 3 + ["failed"] + ["finished"] * 5
    assert "WorkerKilled" in frame["error"][3] and frame["value"].dropna().tolist() == [s**2 for s in range(9) if s != 3]
    assert len(RunStore(tmp_path).records("main")) == 9


def kills_once(config):
    if config["seed"] == 1 and not os.path.exists(config["mark"]):
        open(config["mark"], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"value": config["seed"]}


def test_a_function_that_cannot_travel_is_no_killed_worker(tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text(f"""
import functools
from ibma.runs import RunStore, run_grid
@functools.lru_cache
def data(): return 1
def run(config): return {{"value": data()}}
run_grid(RunStore({str(tmp_path / "store")!r}), "t", [{{"seed": 0}}, {{"seed": 1}}], run, n_jobs=2, progress=False)
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert "TypeError: the function of the runs cannot be sent to another process" in done.stderr and "functools.cache" in done.stderr
    assert not list((tmp_path / "store").rglob("*.json"))



def test_a_run_killed_by_its_neighbours_appetite_gets_a_second_chance(tmp_path):
    mark = str(tmp_path / "mark")
    frame = run_grid(tmp_path / "store", "main", [{"seed": s, "mark": mark} for s in range(4)], kills_once, n_jobs=2, progress=False)
    assert (frame["status"] == "finished").all() and frame["value"].tolist() == [0, 1, 2, 3]


def slow(config):
    end = time.monotonic() + config["seconds"]
    while time.monotonic() < end:
        sum(range(1000))
    return {"value": 1.0}


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_run_over_its_time_is_a_hole(tmp_path, n_jobs):
    configs = [{"seconds": s, "seed": 0} for s in (0.0, 30.0, 0.01)]
    began = time.monotonic()
    frame = run_grid(tmp_path, "main", configs, slow, n_jobs=n_jobs, time_limit=0.5, progress=False)
    assert frame["status"].tolist() == ["finished", "failed", "finished"] and time.monotonic() - began < 20
    assert frame["error"][1] == "TimeLimitExceeded: the run took longer than 0.5 s"
    with pytest.raises(ValueError, match="time_limit must be positive"):
        run_grid(tmp_path, "main", configs, slow, time_limit=0)


def test_the_time_limit_works_in_a_thread_and_leaves_nothing_behind():
    caught = []

    def work():
        try:
            with runs._time_limit(0.2):
                slow({"seconds": 20})
        except runs.TimeLimitExceeded as error:
            caught.append(str(error))
        with runs._time_limit(0.1):
            pass
        slow({"seconds": 0.3})
        caught.append("survived")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert caught == ["the run took longer than 0.2 s", "survived"]
    with runs._time_limit(0.1):
        pass
    time.sleep(0.2)   # no alarm is left


def square(config):
    return {"value": config["seed"] ** 2}


def test_a_local_dask_cluster_gives_the_same_table(tmp_path):
    distributed = pytest.importorskip("distributed")
    configs = [{"seed": s} for s in range(5)]
    here = run_grid(tmp_path / "here", "main", configs, square, progress=False)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster, distributed.Client(cluster):
        there = run_grid(tmp_path / "there", "main", configs, square, backend="dask", progress=False)
    columns = ["seed", "value", "status", "key"]
    assert there[columns].equals(here[columns])


def test_backends_are_checked(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="backend 'dusk' .did you mean 'dask'"):
        run_grid(tmp_path, "main", [{"seed": 0}], square, backend="dusk")
    pytest.importorskip("distributed")
    monkeypatch.delenv("IBMA_SCHEDULER", raising=False)
    monkeypatch.setenv("IBMA_BACKEND", "dask")
    with pytest.raises(RuntimeError, match="needs a cluster"):
        run_grid(tmp_path, "main", [{"seed": 0}], square, progress=False)


def counted(config):
    with open(config["log"], "a") as file:
        file.write(f"{config['seed']} {os.getpid()}\n")
    time.sleep(0.05)
    return {"value": config["seed"]}


def shares(folder, log, gate):
    gate.wait(30)
    run_grid(folder, "main", [{"seed": s, "log": log} for s in range(12)], counted, progress=False)


def test_two_processes_share_a_store_and_do_each_run_once(tmp_path):
    context = multiprocessing.get_context("forkserver")
    log, gate = str(tmp_path / "log"), context.Event()
    workers = [context.Process(target=shares, args=(str(tmp_path / "store"), log, gate), daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    gate.set()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    done = [line.split() for line in open(log)]
    assert sorted(int(seed) for seed, _ in done) == list(range(12))
    records = RunStore(tmp_path / "store").records("main")
    assert len(records) == 12 and not RunStore(tmp_path / "store").unreadable("main")


def test_a_read_only_store_is_said_before_the_first_run(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(runs, "_write_atomically", lambda path, text: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(OSError, match="run store cannot be written .Read-only file system.*nothing was run"):
        run_grid(tmp_path, "main", [{"seed": 0}], lambda config: ran.append(1) or {"value": 1}, progress=False)
    assert not ran


def test_a_disk_that_fills_up_loses_no_result(tmp_path, monkeypatch):
    real, written = runs._write_atomically, []

    def filling(path, text):
        if path.suffix == ".json":
            if len(written) >= 2:
                raise OSError(28, "No space left on device")
            written.append(path)
        real(path, text)

    monkeypatch.setattr(runs, "_write_atomically", filling)
    with pytest.raises(OSError, match="2 run record.s. could not be written .No space left on device") as caught:
        run_grid(tmp_path, "main", [{"seed": s} for s in range(4)], square, progress=False)
    told = [json.JSONDecoder().raw_decode(line.split(" ", 1)[1])[0]["seed"] for line in str(caught.value).splitlines()[1:]]
    assert told == [2, 3] and '{"value": 9.0}' in str(caught.value)
    assert [r["seed"] for r in RunStore(tmp_path).records("main")] == [0, 1]
    monkeypatch.undo()
    frame = run_grid(tmp_path, "main", [{"seed": s} for s in range(4)], square, progress=False)
    assert frame["value"].tolist() == [0, 1, 4, 9]


def test_a_record_that_finds_place_later_is_written(tmp_path, monkeypatch):
    real, refused = runs._write_atomically, []

    def once(path, text):
        if path.suffix == ".json" and not refused:
            refused.append(path)
            raise OSError(28, "No space left on device")
        real(path, text)

    monkeypatch.setattr(runs, "_write_atomically", once)
    frame = run_grid(tmp_path, "main", [{"seed": s} for s in range(3)], square, progress=False)
    assert len(frame) == len(RunStore(tmp_path).records("main")) == 3


# --- runs that go together


def doubled(config):
    if config.get("bad") == config["seed"]:
        raise ValueError("this one")
    return {"accuracy": config["seed"] / 10 + config["lr"], "together": 0}


def all_doubled(configs):
    return [{"metrics": doubled(config) | {"together": len(configs)}, "data_kind": "simulated"} for config in configs]


def test_runs_that_differ_in_the_seed_go_together(tmp_path):
    store = RunStore(tmp_path)
    configs = [{"lr": lr, "seed": seed} for seed in range(3) for lr in (0.0, 5.0)] + [{"lr": 7.0, "seed": 0}]
    asked = []

    def together(configs):
        asked.append(configs)
        return all_doubled(configs)

    frame = run_grid(store, "t", configs, doubled, together=together, progress=False)
    assert [sorted(c["seed"] for c in group) for group in asked] == [[0, 1, 2], [0, 1, 2]] and [{c["lr"] for c in group} for group in asked] == [{0.0}, {5.0}]
    assert frame["accuracy"].tolist() == [c["seed"] / 10 + c["lr"] for c in configs] and frame["together"].tolist() == [3] * 6 + [0]
    records = {(r["config"]["lr"], r["config"]["seed"]): r for r in store.records("t")}
    assert records[5.0, 2]["together"] == 3 and records[5.0, 2]["data_kind"] == "simulated" and "together" not in records[7.0, 0]
    asked.clear()
    run_grid(store, "t", [*configs, {"lr": 0.0, "seed": 9}, {"lr": 0.0, "seed": 8}], doubled, together=together, progress=False)
    assert [[c["seed"] for c in group] for group in asked] == [[9, 8]]   # finished ones are not repeated
    # other names may differ: here everything goes together
    asked.clear()
    run_grid(RunStore(tmp_path / "other"), "t", configs, doubled, together=together, differ=("seed", "lr"), progress=False)
    assert [len(group) for group in asked] == [7]


def test_results_of_runs_together_are_not_taken_for_those_of_single_runs(tmp_path):
    configs = [{"lr": 0.0, "seed": seed} for seed in range(2)]
    run_grid(tmp_path, "t", configs, doubled, progress=False)
    frame = run_grid(tmp_path, "t", configs, doubled, together=all_doubled, progress=False)
    assert frame["together"].tolist() == [2, 2]


@pytest.mark.parametrize(("wrong", "said"), [(lambda configs: [doubled(c) for c in configs], "ValueError: this one"), (lambda configs: [{"a": 1.0}], "1 results of 3 runs"),
                                             (lambda configs: [{"a": float("nan")}] * 3, "'a' is nan")], ids=["raises", "too few", "undefined"])
def test_what_fails_together_is_run_one_by_one(tmp_path, wrong, said):
    configs = [{"lr": 0.0, "seed": seed, "bad": 1} for seed in range(3)]
    with pytest.warns(RuntimeWarning, match=said):
        frame = run_grid(tmp_path, "t", configs, doubled, together=wrong, progress=False)
    assert frame["status"].tolist() == ["finished", "failed", "finished"] and frame["accuracy"].tolist()[::2] == [0.0, 0.2]


def test_runs_together_are_run_in_this_process(tmp_path):
    with pytest.raises(ValueError, match="leave n_jobs and backend"):
        run_grid(tmp_path, "t", [{"lr": 0.0, "seed": 0}], doubled, together=all_doubled, n_jobs=2)
    configs = [{"lr": 0.0, "seed": seed} for seed in range(2)]
    with pytest.warns(RuntimeWarning, match="TimeLimitExceeded"):
        run_grid(tmp_path, "t", configs, doubled, together=lambda configs: time.sleep(5), time_limit=0.1, progress=False)
