"""ibma.data.prepared: a prepared set equals the arrays in memory, is complete or not there, and survives what goes wrong."""
import csv
import errno
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_sets import calls, logged, pictures

import ibma
from ibma.data import MultimodalData
from ibma.data import prepared as module
from ibma.data.media import DECODERS
from ibma.data.prepared import PreparedError, fingerprint, open_prepared, prepare, prepared_records
from ibma.data.raw import RawFileError, RawSet, Record, Source

Image = pytest.importorskip("PIL.Image")
soundfile = pytest.importorskip("soundfile")
pa = pytest.importorskip("pyarrow")
hf = pytest.importorskip("datasets")

ROOT = Path(ibma.__file__).resolve().parents[1]


# ---------------------------------------------------------------- the same as in memory

def everything(folder, n=20):
    """Every kind of modality; each is missing somewhere."""
    from ibma.data.stand_ins import write_clip
    folder.mkdir(exist_ok=True)
    rng, records, arrays = np.random.default_rng(3), [], []
    sources = {"image": Source("image", {"size": (6, 10), "channels": 1}), "audio": Source("spectrogram", {"rate": 8000, "seconds": 0.25, "n_fft": 128, "hop": 100, "fill": "zeros"}),
               "half": Source("spectrogram", {"rate": 8000, "seconds": 0.25, "n_fft": 128, "hop": 100, "mels": 8, "dtype": "float16"}),
               "video": Source("frames", {"count": 4, "size": 16}), "text": Source("text", {"length": 12}), "genes": Source("vector"),
               "signal": Source("sequence", {"length": 5}), "spot": Source("graph")}
    for i in range(n):
        Image.fromarray(rng.integers(0, 255, (9, 12, 3)).astype(np.uint8)).save(folder / f"{i}.png")
        soundfile.write(folder / f"{i}.wav", 0.3 * rng.standard_normal(1000 + 60 * i), 8000)
        write_clip(folder / f"{i}.mp4", rng.integers(0, 255, (2 + i % 4, 16, 16, 3)).astype(np.uint8))
        media = {"image": folder / f"{i}.png", "audio": folder / f"{i}.wav", "half": folder / f"{i}.wav", "video": folder / f"{i}.mp4",
                 "text": "a word " * (1 + i % 5), "genes": rng.standard_normal(7), "signal": rng.standard_normal((1 + i % 7, 3)), "spot": rng.random((5, 4))}
        missing = list(media)[i] if i < len(media) else None
        media = {name: None if name == missing else value for name, value in media.items()}
        records.append(Record(f"id {i}", media, ("a", "b", "c")[i % 3] if i != 4 else None, (None, "train", "valid", "test")[i % 4] if i > 3 else "train",
                              f"speaker {i % 5}", f"t.tsv, row {i}", {"age": i}))
        arrays.append({name: None if value is None else DECODERS[sources[name].kind](value, **sources[name].options) for name, value in media.items()})
    raw = RawSet("everything", "stand-in", "CC0", "single_label", ("a", "b", "c"), sources, records)
    inputs, mask, lengths = {}, {}, {}
    for name in sources:
        shape = next(row[name][0].shape for row in arrays if row[name])
        inputs[name] = np.stack([np.zeros(shape) if row[name] is None else row[name][0].astype(np.float64) for row in arrays])
        mask[name] = np.array([row[name] is not None for row in arrays])
        if sources[name].kind in ("spectrogram", "frames", "text", "sequence"):
            lengths[name] = np.array([0 if row[name] is None else row[name][1] for row in arrays])
    target = [-1 if r.target is None else ("a", "b", "c").index(r.target) for r in records]
    data = MultimodalData.from_arrays(inputs, target, [r.group for r in records], mask=mask, lengths=lengths, class_names=("a", "b", "c"),
                                      kinds={name: source.kind for name, source in sources.items()}, name="everything", data_kind="stand-in", licence="CC0",
                                      splits={part: [i for i, r in enumerate(records) if r.split == part] for part in ("train", "valid", "test")})
    return raw, data


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("everything")
    raw, memory = everything(folder / "raw")
    prepare(raw, folder / "ready", jobs=2)
    shutil.rmtree(folder / "raw")   # whatever is read from here on does not decode
    return folder / "ready", memory


def same(one, two):
    assert torch.equal(one.target, two.target) and torch.equal(one.id, two.id) and torch.equal(one.group, two.group)
    assert one.mask.keys() == two.mask.keys() == one.inputs.keys() == two.inputs.keys() and one.lengths.keys() == two.lengths.keys()
    for part in ("inputs", "mask", "lengths"):
        for name, value in getattr(one, part).items():
            other = getattr(two, part)[name]
            assert value.dtype == other.dtype and torch.equal(value, other), (part, name)


def test_batches_equal_those_in_memory(both):
    folder, memory = both
    data = open_prepared(folder)
    assert len(data) == 20 and data.task.modalities.keys() == memory.task.modalities.keys()
    for name, modality in data.task.modalities.items():
        assert (modality.kind, modality.shape) == (memory.task.modalities[name].kind, memory.task.modalities[name].shape)
    same(data[:], memory[:])
    for index in (0, -1, [5, 3, 3], slice(15, 2, -1), np.arange(20) % 3 == 0, torch.tensor([19, 0])):
        same(data[index], memory[index])
    assert len(data[[]]) == 0 and data[[]].inputs["image"].shape == (0, 1, 6, 10)
    with pytest.raises(IndexError, match="20"):
        data[20]
    assert data.describe().splitlines()[2:] == memory.describe().splitlines()[2:]
    assert (data.name, data.data_kind, data.licence) == ("everything", "stand-in", "CC0")


def test_subsets_splits_selections_and_loaders_equal_those_in_memory(both):
    folder, memory = both
    data = open_prepared(folder)
    same(data.subset([7, 1, 12])[:], memory.subset([7, 1, 12])[:])
    same(data.subset(range(3, 18)).subset([4, 0])[:], memory.subset(range(3, 18)).subset([4, 0])[:])
    same(data.select(["text", "audio"])[2:9], memory.select(["text", "audio"])[2:9])
    assert {part: rows.tolist() for part, rows in data.splits.items()} == {part: rows.tolist() for part, rows in memory.splits.items()}
    with pytest.warns(UserWarning, match="groups on both sides"):
        parts = data.split()
    with pytest.warns(UserWarning, match="groups on both sides"):
        expected = memory.split()
    for part, other in zip(parts, expected, strict=True):
        same(part[:], other[:])
    for _ in range(2):
        for one, two in zip(data.loader(6, shuffle=True, seed=5), memory.loader(6, shuffle=True, seed=5), strict=True):
            same(one, two)


def test_survives_pickling_and_workers(both):
    folder, memory = both
    data = open_prepared(folder).subset(range(4, 20))
    data[:]   # maps are open when it is pickled
    content = pickle.dumps(data)
    assert len(content) < 40_000   # names of files, not what is in them
    same(pickle.loads(content)[:], memory.subset(range(4, 20))[:])
    sampler = torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(data), 5, False)
    loader = torch.utils.data.DataLoader(data, sampler=sampler, batch_size=None, num_workers=2)
    for batch, rows in zip(loader, sampler, strict=True):
        same(batch, memory.subset(range(4, 20))[rows])


def test_columns_are_views_of_the_memory_map(both):
    folder, _ = both
    before = pa.total_allocated_bytes()
    data = open_prepared(folder)
    for name, column in data.inputs.items():
        for i in range(len(column.shards.shards)):
            view = column.shards.view(i, name, column.shape[1:])
            assert not view.flags.owndata and not view.flags.writeable
        assert column.shape == (20, *data.task.modalities[name].shape) and len(column) == 20
    assert pa.total_allocated_bytes() - before < 20_000   # small columns only
    batch = data[0]
    batch.inputs["genes"].zero_()   # a copy: writing to it harms nobody
    assert data[0].inputs["genes"].abs().sum() > 0
    stored = {name: str(column.dtype) for name, column in data.inputs.items()}
    assert stored == {"image": "uint8", "audio": "float32", "half": "float16", "video": "uint8", "text": "int32", "genes": "float32", "signal": "float32", "spot": "float32"}


def test_the_library_datasets_opens_it_too(both):
    folder, memory = both
    table = hf.load_from_disk(folder)
    assert len(table) == 20 and table.features["image"] == hf.Array3D(shape=(1, 6, 10), dtype="uint8") and table.features["target"].names == ["a", "b", "c"]
    numbers = table.with_format("numpy")
    assert np.array_equal(np.stack(list(numbers["video"])), memory.inputs["video"].numpy()) and np.array_equal(np.stack(list(numbers["genes"])), memory.inputs["genes"].numpy())
    assert table["has_image"][:2] == [False, True] and table["id"][3] == "id 3" and table["length_text"][:] == memory.lengths["text"].tolist()


def test_records_behind_the_rows(both):
    folder, _ = both
    data, records = open_prepared(folder), prepared_records(folder)
    assert len(records) == 20 and records[4] == Record("id 4", {}, None, None, "speaker 4", "t.tsv, row 4", {"age": 4})
    assert records[-1] == data.records[19] and records[-1].target == "b" and records[-1].split == "test"
    batch = data.subset([9, 2])[:]
    assert [data.records[int(i)].id for i in batch.id] == ["id 9", "id 2"]
    assert [r.meta["age"] for r in records] == list(range(20))
    with pytest.raises(IndexError, match="record 20 of 20"):
        records[20]


# ---------------------------------------------------------------- kinds of tasks

def numbers(kind, classes, targets, **changes):
    records = [Record(str(i), {"x": np.arange(3.0) + i}, target, "train", None, f"row {i}") for i, target in enumerate(targets)]
    return RawSet(**{"name": kind, "data_kind": "user", "licence": "none", "kind": kind, "classes": classes, "sources": {"x": Source("vector")}, "records": records, **changes})


@pytest.mark.parametrize(("raw", "target", "classes", "counts"), [
    (numbers("single_label", ("no", "yes"), ["yes", None, "no"]), [1, -1, 0], 2, {"no": 1, "yes": 1, "unlabelled": 1, "total": 3}),
    (numbers("multi_label", ("edema", "fracture"), [(1, 0), (math.nan, 1), None]), [[1, 0], [math.nan, 1], [math.nan, math.nan]], 2,
     {"edema = 1": 1, "fracture = 1": 1, "unlabelled": 1, "total": 3}),
    (numbers("regression", (), [-0.1, 0.7, 2.5, None], bins=(0.7, 1.0)), [-0.1, 0.7, 2.5, math.nan], 3, {"[-inf, 0.7)": 1, "[0.7, 1)": 1, "[1, inf)": 1, "unlabelled": 1, "total": 4}),
    (numbers("one_class", ("normal", "anomaly"), ["normal", "anomaly", None]), [0, 1, -1], 4, {"normal": 1, "anomaly": 1, "unlabelled": 1, "total": 3}),
], ids=lambda value: value.kind if isinstance(value, RawSet) else "")
def test_every_kind_of_task(tmp_path, raw, target, classes, counts):
    done = prepare(raw, tmp_path / "set", jobs=0)
    data = done.open()
    assert torch.equal(data.target.nan_to_num(9), torch.tensor(target).nan_to_num(9)) and data.target.dtype == torch.tensor(target).dtype
    assert data.task.kind == raw.kind and data.task.num_classes == classes and data.groups is None
    assert {name: sum(parts.values()) for name, parts in done.manifest["counts"].items()} == counts
    assert data.splits["train"].tolist() == list(range(len(target))) and raw.kind in data.describe()
    if raw.kind == "regression":
        assert data.task.bins == (0.7, 1.0) and data.class_counts().tolist() == [counts[name] for name in list(counts)[:3]]   # one border for both
    else:
        assert data.task.class_names == raw.classes
    labels = [record.target for record in data.records]
    assert labels[0] == (pytest.approx(raw.records[0].target))


def test_a_sample_without_a_group_is_one_of_its_own(tmp_path):
    raw = numbers("single_label", ("no", "yes"), ["yes", "no", "no", "yes"])
    raw.records = [replace(r, group=g) for r, g in zip(raw.records, ("b", None, "b", None), strict=True)]
    groups = prepare(raw, tmp_path / "set", jobs=0).open().groups.tolist()
    assert groups[0] == groups[2] and len(set(groups)) == 3


# ---------------------------------------------------------------- once

def test_a_finished_set_costs_nothing(tmp_path):
    raw, log = pictures(tmp_path / "raw"), tmp_path / "log"
    done = prepare(raw, tmp_path / "set", jobs=2, decoders=logged(log))
    assert sorted(calls(log)) == [f"{i:03d}.png" for i in range(24)]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    assert prepare(raw, tmp_path / "set", decoders=logged(log)) == done and len(calls(log)) == 24
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before
    data = done.open()
    for _ in range(2):
        for batch in data.loader(7, shuffle=True):
            assert len(batch.inputs["image"])
    assert len(calls(log)) == 24


def test_the_result_does_not_depend_on_the_processes(tmp_path):
    raw = pictures(tmp_path / "raw")
    one, two, none = (prepare(raw, tmp_path / f"set{jobs}", jobs=jobs).manifest for jobs in (1, 2, 0))
    assert one == two == none and len(one["shards"]) == 3


def test_a_changed_set_is_not_taken_for_the_same(tmp_path):
    raw = pictures(tmp_path / "raw")
    keys = {fingerprint(raw)}
    changes = [{"sources": {"image": Source("image", {"size": 9})}}, {"classes": ("yes", "no")}, {"records": raw.records[:-1]}, {"licence": "other"},
               {"records": [replace(raw.records[0], target="yes"), *raw.records[1:]]}, {"records": [replace(raw.records[0], meta={"i": 1}), *raw.records[1:]]},
               {"records": [replace(raw.records[0], split="test"), *raw.records[1:]]}, {"records": [replace(raw.records[0], media={"image": None}), *raw.records[1:]]}]
    keys |= {fingerprint(replace(raw, **change)) for change in changes}
    file = raw.records[4].media["image"]
    before = file.stat()
    file.write_bytes(file.read_bytes()[:-30] + bytes(30))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))   # the same size and time, another content
    assert len(keys | {fingerprint(raw)}) == len(changes) + 2


def test_a_copy_of_the_raw_folder_is_the_same_set(tmp_path):
    raw = pictures(tmp_path / "raw")
    shutil.copytree(tmp_path / "raw", tmp_path / "elsewhere")
    moved = replace(raw, records=[replace(r, media={"image": tmp_path / "elsewhere" / r.media["image"].name}) for r in raw.records])
    assert fingerprint(moved) == fingerprint(raw)


def test_newer_decoders_make_older_copies_stale(tmp_path, monkeypatch):
    raw = pictures(tmp_path / "raw")
    done = prepare(raw, tmp_path / "set", jobs=0)
    assert done.current()
    monkeypatch.setitem(module.DECODER_VERSIONS, "image", 99)
    assert not done.current() and fingerprint(raw) != done.manifest["fingerprint"]
    with pytest.raises(ValueError, match="made from other files, labels or options"):
        prepare(raw, tmp_path / "set", jobs=0)


def test_another_set_is_only_replaced_when_told(tmp_path):
    prepare(pictures(tmp_path / "raw"), tmp_path / "set", jobs=0)
    other = pictures(tmp_path / "other", seed=1, classes=("yes", "no"))
    with pytest.raises(ValueError, match="overwrite=True"):
        prepare(other, tmp_path / "set", jobs=0)
    old = open_prepared(tmp_path / "set")
    before = old[:].inputs["image"]
    assert prepare(other, tmp_path / "set", jobs=0, overwrite=True).open().task.class_names == ("yes", "no")
    assert torch.equal(old[:].inputs["image"], before)   # who had the old one open still reads it
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("")
    with pytest.raises(PreparedError, match="no manifest.json"):
        prepare(other, tmp_path / "mine", jobs=0)
    (tmp_path / "empty").mkdir()
    assert len(prepare(other, tmp_path / "empty", jobs=0).open()) == 24
    assert sorted(path.name for path in tmp_path.iterdir() if "old" in path.name or "partial" in path.name) == []


def test_what_is_written_does_not_tell_when_and_where(tmp_path):
    raw = pictures(tmp_path / "raw")
    done = prepare(raw, tmp_path / "set", jobs=0, source="https://example.org/pictures")
    for path in done.folder.iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content and time.strftime("%Y-%m-%d").encode() not in content, path.name
    card = (done.folder / "dataset_card.md").read_text()
    for words in ("# pictures", "simulated", "CC0", "https://example.org/pictures", "single_label", "no, yes", "24, in 8 groups", "3 × 8 × 8", "uint8", "size=8",
                  "| published |    18 |    6 |", "Left out: 0", "image 1", "ibma.data.prepared"):
        assert words in card, words


# ---------------------------------------------------------------- broken files

def test_a_broken_file_stops_with_row_and_file(tmp_path):
    raw = pictures(tmp_path / "raw")
    raw.records[13].media["image"].write_bytes(b"no picture")
    for jobs in (0, 2):
        with pytest.raises(RawFileError, match=r"table.csv, row 15: image: 013.png: .*skip_broken=True"):
            prepare(raw, tmp_path / "set", jobs=jobs)
    assert not (tmp_path / "set").exists()
    raw.records[5].media["image"].unlink()
    with pytest.raises(RawFileError, match=r"table.csv, row 7: image file 005.png is missing"):
        prepare(raw, tmp_path / "set")


def test_broken_files_are_left_out_and_listed(tmp_path):
    raw, log = pictures(tmp_path / "raw"), tmp_path / "log"
    raw.records[13].media["image"].write_bytes(b"no picture")
    raw.records[0].media["image"].write_bytes(b"")
    raw.records[5].media["image"].unlink()
    done = prepare(raw, tmp_path / "set", skip_broken=True, decoders=logged(log))
    with open(done.folder / "skipped.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["where"]) for row in rows] == [("r5", "table.csv, row 7"), ("r0", "table.csv, row 2"), ("r13", "table.csv, row 15")]
    assert "005.png is missing" in rows[0]["reason"] and "empty" in rows[1]["reason"] and "013.png: cannot be read" in rows[2]["reason"]
    data = done.open()
    assert len(data) == 21 and [r.id for r in data.records] == [f"r{i}" for i in range(24) if i not in (0, 5, 13)]
    expected, _ = DECODERS["image"](raw.records[14].media["image"], size=8)
    assert np.array_equal(data[11].inputs["image"][0].numpy(), expected) and data[11].target.item() == 0
    assert done.differences() == ["train: 15 samples, 18 published"] and [item.id for item in done.skipped] == ["r5", "r0", "r13"]
    assert "Left out: 3" in (done.folder / "dataset_card.md").read_text() and len(raw.records) == 24   # the caller's set is as it was
    again = len(calls(log))
    assert prepare(raw, tmp_path / "set", skip_broken=True, decoders=logged(log)) == done and len(calls(log)) == again
    with pytest.raises(RawFileError, match="005.png is missing"):   # without, it is an error as before
        prepare(raw, tmp_path / "set", decoders=logged(log))
    there = replace(raw, records=[r for r in raw.records if r.id != "r5"])
    prepare(there, tmp_path / "there", jobs=0, skip_broken=True)
    with pytest.raises(RawFileError, match="table.csv, row 2: image: 000.png: is empty .*skip_broken=True"):   # also where all that could be decoded has been
        prepare(there, tmp_path / "there", jobs=0)


def test_nothing_of_a_broken_sample_is_left_in_the_next(tmp_path):
    records = [Record("a", {"x": np.ones(2), "y": np.array([np.nan])}, "no", where="row 1"), Record("b", {"x": None, "y": np.ones(1)}, "no", where="row 2"),
               Record("c", {"x": np.ones(2), "y": np.ones(1)}, "no", where="row 3")]
    raw = RawSet("numbers", "user", "none", "single_label", ("no",), {"x": Source("sequence", {"length": 3, "size": 1}), "y": Source("vector", {"size": 1})}, records)
    raw.records = [replace(r, media={"x": None if r.media["x"] is None else np.ones((2, 1)), "y": r.media["y"]}) for r in records]
    batch = prepare(raw, tmp_path / "set", jobs=0, skip_broken=True).open()[:]
    assert batch.inputs["x"][0].tolist() == [[0], [0], [0]] and batch.lengths["x"].tolist() == [0, 2] and batch.mask["x"].tolist() == [False, True]


def test_what_was_decoded_before_a_broken_file_is_kept(tmp_path):
    raw, log = pictures(tmp_path / "raw"), tmp_path / "log"
    content = raw.records[20].media["image"].read_bytes()
    raw.records[20].media["image"].write_bytes(b"no picture")
    with pytest.raises(RawFileError, match="020.png"):
        prepare(raw, tmp_path / "set", jobs=0, decoders=logged(log))
    assert len(calls(log)) == 21
    raw.records[20].media["image"].write_bytes(content)   # fetched again
    prepare(raw, tmp_path / "set", jobs=0, decoders=logged(log))
    assert calls(log)[21:] == [f"{i:03d}.png" for i in range(16, 24)]   # only the shard that was not finished


def test_what_the_reader_left_out_is_listed_but_not_broken(tmp_path):
    from ibma.data.raw import Skipped
    raw = pictures(tmp_path / "raw", skipped=[Skipped("x", "table.csv, row 99", "no report, as asked for")])
    done = prepare(raw, tmp_path / "set", jobs=0)
    assert done.skipped == raw.skipped and prepare(raw, tmp_path / "set", jobs=0) == done


def test_nothing_left_is_an_error(tmp_path):
    raw = pictures(tmp_path / "raw", n=4)
    for record in raw.records:
        record.media["image"].write_bytes(b"x")
    with pytest.raises(RawFileError, match="no sample is left, 4 could not be read"):
        prepare(raw, tmp_path / "set", jobs=0, skip_broken=True)
    assert not (tmp_path / "set").exists()


def test_numbers_that_do_not_fit(tmp_path):
    def one(values, **options):
        raw = numbers("single_label", ("no", "yes"), ["yes", "no", "no"])
        raw.sources = {"x": Source("vector", options)}
        raw.records[1] = replace(raw.records[1], media={"x": values})
        return prepare(raw, tmp_path / "set", jobs=0)
    with pytest.raises(RawFileError, match="row 1: x: vector: value .* is not finite"):
        one(np.array([0, np.nan, 1]))
    with pytest.raises(RawFileError, match=r"row 1: x has shape \(4,\), expected \(3,\)"):
        one(np.arange(4.0))
    with pytest.raises(TypeError, match="sizes"):
        one(np.arange(3.0), sizes=3)
    raw = numbers("single_label", ("no", "yes"), ["yes", "no"])
    with pytest.raises(RawFileError, match="x is missing in every sample"):
        prepare(replace(raw, records=[replace(r, media={"x": None}) for r in raw.records]), tmp_path / "set", jobs=0)
    raw.sources["y"] = Source("vector")
    raw.records = [replace(r, media={"x": r.media["x"], "y": np.ones(2)}) for r in raw.records] + [Record("2", {"x": None, "y": None}, "no", where="row 2")]
    with pytest.raises(RawFileError, match="row 2: has no modality at all"):
        prepare(raw, tmp_path / "set", jobs=0)
    with pytest.raises(ValueError, match="modality 'target'"):
        prepare(replace(raw, sources={"target": Source("vector")}, records=[Record("a", {"target": np.ones(1)}, "no")]), tmp_path / "set", jobs=0)
    bad = {"vector": lambda value: (np.array([1e6, 1, 1]), None)}
    output = module.Output("vector", (3,), "float16")
    with pytest.raises(RawFileError, match="beyond float16"):
        module.decoded(Record("a", {"x": None}, None, where="row 9"), "x", Source("vector"), output, bad)


def test_meta_may_hold_numbers_of_numpy(tmp_path):
    raw = numbers("single_label", ("no",), ["no"])
    raw.records = [replace(raw.records[0], meta={"a": np.float32(0.5), "b": np.arange(2), "c": Path("x")})]
    assert prepare(raw, tmp_path / "set", jobs=0).open().records[0].meta == {"a": 0.5, "b": [0, 1], "c": "x"}


# ---------------------------------------------------------------- decoders that crash, hang, or are at fault

def test_crashing_and_hanging_decoders_cost_their_samples_only(tmp_path):
    raw = pictures(tmp_path / "raw")
    others = multiprocessing.active_children()   # idle workers that tests before this one may have left

    def decode(value, **options):
        if value.name == "003.png":
            os.kill(os.getpid(), signal.SIGSEGV)
        if value.name == "010.png":
            os.kill(os.getpid(), signal.SIGSTOP)   # deaf to everything but SIGKILL
        if value.name == "011.png":
            os._exit(7)
        from ibma.data.media import decode_image
        return decode_image(value, **options)

    done = prepare(raw, tmp_path / "set", skip_broken=True, time_limit=1.0, decoders={"image": decode})
    reasons = {item.id: item.reason for item in done.skipped}
    assert set(reasons) == {"r3", "r10", "r11"} and "signal 11" in reasons["r3"] and "longer than 1 seconds" in reasons["r10"] and "exit code 7" in reasons["r11"]
    assert len(done.open()) == 21
    with pytest.raises(RawFileError, match="table.csv, row 5: its decoder ended the process"):
        prepare(replace(raw, records=raw.records[:8]), tmp_path / "strict", time_limit=1.0, decoders={"image": decode})
    time.sleep(0.2)
    assert not [child for child in multiprocessing.active_children() if child.is_alive() and child not in others]


def test_a_fault_of_the_program_is_no_broken_file(tmp_path):
    raw = pictures(tmp_path / "raw")

    def decode(value, **options):
        if value.name == "012.png":
            raise ZeroDivisionError("a bug")
        from ibma.data.media import decode_image
        return decode_image(value, **options)

    with pytest.raises(RuntimeError, match=r"ZeroDivisionError: a bug; while decoding r12 \(table.csv, row 14\)"):
        prepare(raw, tmp_path / "set", skip_broken=True, decoders={"image": decode})
    with pytest.raises(ZeroDivisionError):
        prepare(raw, tmp_path / "set", skip_broken=True, jobs=0, decoders={"image": decode})

    def missing(value, **options):
        raise ImportError('pip install "ibma[media]"')

    with pytest.raises(ImportError, match="ibma.media"):
        prepare(raw, tmp_path / "set", skip_broken=True, decoders={"image": missing})


def test_processes_import_neither_torch_nor_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    raw = pictures(tmp_path / "raw", n=2)
    log = tmp_path / "log"

    def decode(value, **options):
        with open(log, "a") as file:
            file.write(f"{sorted({'torch', 'datasets', 'pandas'} & set(sys.modules))} {os.environ['OMP_NUM_THREADS']}\n")
        from ibma.data.media import decode_image
        return decode_image(value, **options)

    prepare(raw, tmp_path / "set", jobs=1, decoders={"image": decode})
    assert set(log.read_text().splitlines()) == {"[] 1"}


# ---------------------------------------------------------------- killed, together, full, read-only

SCRIPT = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from small_sets import logged, pictures
from ibma.data.prepared import prepare
folder = Path({folder!r})
{before}
prepare(pictures(folder / "raw", n=64), folder / "set", jobs=2, decoders=logged(folder / "log", delay={delay}))
"""


def script(tmp_path, delay, before=""):
    """A user's script, without `if __name__ == "__main__"`."""
    code = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path), delay=delay, before=before)
    (tmp_path / "script.py").write_text(textwrap.dedent(code))
    return subprocess.Popen([sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_half_way_the_next_call_decodes_what_is_missing(tmp_path, how):
    log = tmp_path / "log"
    pictures(tmp_path / "raw", n=64)
    process = script(tmp_path, delay=0.1)   # slow enough for a machine that is busy with other things
    wait_for(lambda: len(list((tmp_path / ".set.partial").glob("*.arrow.json"))) >= 3 if (tmp_path / ".set.partial").is_dir() else False)
    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)   # Ctrl-C reaches the whole group
    process.wait(30)
    workers = {int(line.split()[1]) for line in log.read_text().splitlines()}
    wait_for(lambda: not any(alive(pid) for pid in workers), 10)   # they do not outlive their parent
    assert not (tmp_path / "set").exists()
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_prepared(tmp_path / "set")
    with pytest.raises(PreparedError, match="was not finished"):
        open_prepared(tmp_path / ".set.partial")
    finished = {path.name.removesuffix(".json") for path in (tmp_path / ".set.partial").glob("*.arrow.json")}
    stamps = {name: (tmp_path / ".set.partial" / name).stat().st_mtime_ns for name in finished}
    first = len(calls(log))
    assert 3 <= len(finished) < 8 and first < 64
    raw = pictures(tmp_path / "raw", n=64)
    done = prepare(raw, tmp_path / "set", decoders=logged(log))
    again = calls(log)[first:]
    assert sorted(again) == [f"{i:03d}.png" for i in range(64) if f"data-{i // 8:05d}-of-00008.arrow" not in finished]
    assert {name: (tmp_path / "set" / name).stat().st_mtime_ns for name in finished} == stamps
    assert done.manifest["rows"] == 64 and not done.check() and not list((tmp_path / "set").glob("*.part")) and not list((tmp_path / "set").glob("*.arrow.json"))
    expected = np.stack([DECODERS["image"](r.media["image"], size=8)[0] for r in raw.records])
    assert np.array_equal(done.open()[:].inputs["image"].numpy(), expected)


def test_shards_that_do_not_fit_any_more_are_decoded_again(tmp_path):
    raw, seen, stop = pictures(tmp_path / "raw", n=64), [], ["040.png"]

    def decode(value, **options):
        if value.name in stop:
            raise KeyboardInterrupt
        seen.append(int(value.stem))
        return DECODERS["image"](value, **options)

    with pytest.raises(KeyboardInterrupt):
        prepare(raw, tmp_path / "set", jobs=0, decoders={"image": decode})
    partial = tmp_path / ".set.partial"
    shards = sorted(partial.glob("*.arrow"))
    assert len(shards) == 5 and seen == list(range(40))
    with open(shards[1], "r+b") as file:
        file.truncate(100)
    (partial / f"{shards[2].name}.json").write_text("{")
    raw.records[30] = replace(raw.records[30], target="yes" if raw.records[30].target == "no" else "no")   # in the fourth
    (partial / "data-00007-of-00008.arrow.123.part").write_bytes(b"what a killed process left")
    seen.clear()
    stop.clear()
    done = prepare(raw, tmp_path / "set", jobs=0, decoders={"image": decode})
    assert seen == [*range(8, 32), *range(40, 64)] and not list(done.folder.glob("*.part"))
    assert done.open().target.tolist() == [int(r.target == "yes") for r in raw.records]


def test_two_processes_at_once_share_the_work(tmp_path):
    pictures(tmp_path / "raw", n=64)
    both = [script(tmp_path, delay=0.01, before="while not (folder / 'go').exists(): time.sleep(0.01)") for _ in range(2)]
    time.sleep(1)
    (tmp_path / "go").touch()
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert sorted(calls(tmp_path / "log")) == [f"{i:03d}.png" for i in range(64)]   # each file once in all
    assert not prepare(pictures(tmp_path / "raw", n=64), tmp_path / "set", decoders=logged(tmp_path / "log")).check()


def test_a_full_disk_is_said_before_and_during(tmp_path, monkeypatch):
    raw = pictures(tmp_path / "raw")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(OSError, match=r"no space left for .*set.*0.0 GB are needed") as caught:
            prepare(raw, tmp_path / "set", jobs=0)
    assert caught.value.errno == errno.ENOSPC
    write, written = module._write_bytes, []

    def full(path, content):
        written.append(path)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_bytes", full)
        with pytest.raises(OSError, match="no space left for .*What is done is kept"):
            prepare(raw, tmp_path / "set", jobs=0)
    assert not (tmp_path / "set").exists()
    assert len(prepare(raw, tmp_path / "set", jobs=0).open()) == 24


def test_processes_report_a_disk_that_takes_no_more(tmp_path):
    pictures(tmp_path / "raw", n=64)
    process = script(tmp_path, delay=0.0, before="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and f"no space left for {tmp_path / 'set'}" in err.splitlines()[-1] and not (tmp_path / "set").exists()
    assert not list((tmp_path / ".set.partial").glob("*.part"))


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    raw = pictures(tmp_path / "raw")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to .*file.set: name a folder"):
        prepare(raw, tmp_path / "file" / "set", jobs=0)

    def refuse(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    done = prepare(raw, tmp_path / "set", jobs=0)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match="IBMA_CACHE for all prepared data"):
        prepare(raw, tmp_path / "elsewhere" / "set", jobs=0)
    assert prepare(raw, tmp_path / "set", jobs=0) == done and len(done.open()) == 24   # what is there can be used all the same


# ---------------------------------------------------------------- damaged copies

@pytest.fixture
def ready(tmp_path):
    return prepare(pictures(tmp_path / "raw"), tmp_path / "set", jobs=0)


def shard_of(done):
    return done.folder / done.manifest["shards"][1]["file"]


@pytest.mark.parametrize(("damage", "message"), [
    (lambda done: shard_of(done).write_bytes(shard_of(done).read_bytes()[:-64]), "the copy broke off"),
    (lambda done: shard_of(done).write_bytes(b""), "has 0 bytes"),
    (lambda done: shard_of(done).unlink(), "is missing"),
    (lambda done: (done.folder / "manifest.json").unlink(), "was not finished"),
    (lambda done: (done.folder / "manifest.json").write_text((done.folder / "manifest.json").read_text()[:300]), "manifest.json is damaged"),
    (lambda done: (done.folder / "manifest.json").write_text((done.folder / "manifest.json").read_text().replace('"CC0"', '"CC1"')), "manifest.json is damaged"),
    (lambda done: (done.folder / "manifest.json").write_text("[1, 2]"), "manifest.json is damaged"),
    (lambda done: shard_of(done).write_bytes(bytes(shard_of(done).stat().st_size)), "cannot be read"),
    (lambda done: shutil.copy(done.folder / done.manifest["shards"][0]["file"], shard_of(done)), None),
], ids=["truncated", "empty", "missing", "no manifest", "half a manifest", "edited manifest", "no object", "zeros", "swapped"])
def test_damage_is_refused_and_repaired_by_overwriting(tmp_path, ready, damage, message):
    damage(ready)
    if message:
        with pytest.raises(PreparedError, match=f"{message}.*overwrite=True"):
            open_prepared(ready.folder)
    else:   # same size, other content: only the checksums tell
        assert ready.check() and shard_of(ready).name in ready.check()[0]
    raw = pictures(tmp_path / "raw")
    assert not prepare(raw, ready.folder, jobs=0, overwrite=True).check()
    assert len(open_prepared(ready.folder)) == 24


def test_flipped_bits_are_found_by_check(ready):
    content = bytearray(shard_of(ready).read_bytes())
    content[len(content) // 2] ^= 4
    shard_of(ready).write_bytes(bytes(content))
    assert ready.check() == [f"{shard_of(ready).name} is damaged: delete the folder (or pass overwrite=True) and prepare it again"]


def test_a_later_format_is_not_guessed_at(ready):
    manifest = json.loads((ready.folder / "manifest.json").read_text())
    manifest.pop("checksum")
    module.write_manifest(ready.folder, {**manifest, "recipe": {**manifest["recipe"], "format": 2}})
    with pytest.raises(PreparedError, match="has format 2, this version reads 1"):
        open_prepared(ready.folder)


def test_no_folder():
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        open_prepared("nowhere")
