"""ibma.data.core and ibma.data.load: every accepted form of data, every early error, splits and loaders against slow references."""
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ibma.data
from ibma.data import DATASETS, Batch, Modality, MultimodalData, Task, load
from ibma.data.core import as_rows, count_classes

make = MultimodalData.from_arrays


def arrays(n=12, seed=0):
    rng = np.random.default_rng(seed)
    return {"audio": rng.normal(size=(n, 3)), "image": rng.random((n, 4, 5))}


def labels(n=12, classes=3):
    return np.arange(n) % classes


# ---------------------------------------------------------------- the door: inputs

def test_shapes_kinds_and_types():
    data = make({"a": np.ones((4, 3)), "b": np.ones((4, 6, 5)), "c": np.ones((4, 3, 6, 5))}, [0, 1, 0, 1])
    assert data.task.modalities == {"a": Modality("vector", (3,)), "b": Modality("image", (1, 6, 5)), "c": Modality("image", (3, 6, 5))}
    assert all(x.dtype == torch.float32 for x in data.inputs.values())
    assert data.task == Task("single_label", 2, data.task.modalities)


@pytest.mark.parametrize("values", [
    [[0, 1], [2, 3], [4, 5]],
    np.arange(6).reshape(3, 2), np.arange(6, dtype=np.uint8).reshape(3, 2), np.arange(6, dtype=">f8").reshape(3, 2),
    torch.arange(6).reshape(3, 2), torch.arange(6.0, dtype=torch.bfloat16, requires_grad=True).reshape(3, 2),
    pd.DataFrame(np.arange(6).reshape(3, 2)),
    np.asfortranarray(np.arange(6.0).reshape(3, 2))[:, ::1], np.arange(6.0).reshape(3, 2)[::-1][::-1],
], ids=lambda v: type(v).__name__)
def test_any_numeric_container(values):
    x = make({"a": values}, [0, 0, 0]).inputs["a"]
    assert x.tolist() == [[0, 1], [2, 3], [4, 5]] and x.dtype == torch.float32 and not x.requires_grad


def test_read_only_arrays_make_no_warning():
    x = np.ones((3, 2), dtype=np.float32)
    x.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make({"a": x}, [0, 0, 0])


@pytest.mark.parametrize(("inputs", "error", "words"), [
    ({}, ValueError, ["at least one modality"]),
    (np.ones((3, 2)), TypeError, ["dict"]),
    ({"a": np.ones(3)}, ValueError, ["'a'", "(3,)", "(n, 1)"]),
    ({"a": np.ones((3, 1, 1, 1, 1))}, ValueError, ["'a'", "(3, 1, 1, 1, 1)"]),
    ({"a": np.ones((3, 0))}, ValueError, ["'a'", "(3, 0)"]),
    ({"a": np.ones((0, 3))}, ValueError, ["'a'", "(0, 3)"]),
    ({"a": 3.0}, ValueError, ["'a'"]),
    ({"a": ["x", "y", "z"]}, TypeError, ["'a'", "<U1", "reader"]),
    ({"a": np.ones((3, 2), dtype=complex)}, TypeError, ["'a'", "complex"]),
    ({"a": torch.ones(3, 2, dtype=torch.complex64)}, TypeError, ["'a'", "complex"]),
    ({"a": np.array([[1, None]] * 3)}, TypeError, ["'a'", "object"]),
    ({"a": [[1, 2], [3], [4, 5]]}, ValueError, ["'a'", "pad"]),
    ({"a": np.ones((3, 2)), "b": np.ones((4, 2))}, ValueError, ["'a': 3", "'b': 4"]),
    ({"a.b": np.ones((3, 2))}, ValueError, ["'a.b'", "dots"]),
    ({"": np.ones((3, 2))}, ValueError, ["non-empty"]),
    ({"a": [[0, 1], [2, np.nan], [np.inf, 0]]}, ValueError, ["'a'", "2 of 3", "row 1", "impute", "mask"]),
    ({"a": np.array([[0.0], [0.0], [1e300]])}, ValueError, ["'a'", "row 2"]),   # infinite in float32
])
def test_input_errors_name_modality_and_remedy(inputs, error, words):
    with pytest.raises(error) as raised:
        make(inputs, [0, 0, 0])
    assert all(word in str(raised.value) for word in words), raised.value


def test_absent_rows_may_hold_nan_and_become_zero():
    x = arrays()
    x["image"][2] = np.nan
    before = x["image"].copy()
    present = np.arange(12) != 2
    data = make(x, labels(), mask={"image": present})
    assert data.inputs["image"][2].eq(0).all() and data.inputs["image"][3].ne(0).any()
    assert data.mask["image"].tolist() == present.tolist() and data.mask["audio"].all()
    assert np.array_equal(x["image"], before, equal_nan=True)
    x32 = {name: value.astype(np.float32) for name, value in x.items()}   # float32 arrays are not copied: still untouched
    make(x32, labels(), mask={"image": present})
    assert np.isnan(x32["image"][2]).all()


def test_absent_rows_do_not_excuse_present_ones():
    x = arrays()
    x["image"][2] = x["image"][5] = np.nan
    with pytest.raises(ValueError, match="1 of 12 rows, the first is row 5"):
        make(x, labels(), mask={"image": np.arange(12) != 2})


@pytest.mark.parametrize(("mask", "error", "words"), [
    ({"picture": np.ones(12, bool)}, KeyError, ["picture", "image"]),
    ({"image": np.ones(11, bool)}, ValueError, ["'image'", "(12,)"]),
    ({"image": np.ones(12)}, ValueError, ["'image'", "bool"]),
    ({"image": np.arange(12) > 0, "audio": np.arange(12) > 0}, ValueError, ["row 0", "no modality present"]),
])
def test_mask_errors(mask, error, words):
    with pytest.raises(error) as raised:
        make(arrays(), labels(), mask=mask)
    assert all(word in str(raised.value) for word in words), raised.value


# ---------------------------------------------------------------- the door: targets

def test_string_labels_are_sorted_and_encoded():
    data = make({"a": np.ones((3, 2))}, np.array(["joy", "anger", "joy"]))
    assert (data.task.class_names, data.target.tolist()) == (("anger", "joy"), [1, 0, 1])
    again = make({"a": np.ones((3, 2))}, pd.Series(["joy", "anger", "joy"]), class_names=["joy", "anger"])
    assert again.target.tolist() == [0, 1, 0]


def test_labels_types_and_unlabelled():
    for target in ([0, 2, -1, 1], np.array([0, 2, -1, 1], dtype=np.int8), torch.tensor([0, 2, -1, 1]), pd.Series([0, 2, -1, 1])):
        data = make({"a": np.ones((4, 2))}, target)
        assert data.target.tolist() == [0, 2, -1, 1] and data.target.dtype == torch.int64 and data.task.num_classes == 3
    assert make({"a": np.ones((2, 2))}, [True, False]).target.tolist() == [1, 0]


def test_multi_label_with_unknown():
    data = make({"a": np.ones((3, 2))}, [[1, 0], [np.nan, 1], [0, np.nan]], class_names=["edema", "effusion"])
    assert data.task.kind == "multi_label" and data.task.num_classes == 2 and data.target.dtype == torch.float32
    assert data.class_counts().tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(("target", "options", "error", "words"), [
    ([0, 1], {}, ValueError, ["2 samples", "3"]),
    ([0, 3, 1], {"num_classes": 3}, ValueError, ["row 1", "3", "0..2"]),
    ([0, -2, 1], {}, ValueError, ["row 1", "-2", "unlabelled"]),
    ([-1, -1, -1], {}, ValueError, ["num_classes"]),
    ([0.0, 1.0, 2.0], {}, TypeError, ["float64", ".astype(int)"]),
    ([0, None, 1], {}, TypeError, ["object"]),
    (["a", "b", "c"], {"class_names": ["a", "b"]}, ValueError, ["row 2", "'c'"]),
    ([0, 1, 1], {"class_names": ["a", "b", "c"], "num_classes": 2}, ValueError, ["3 class names"]),
    ([[0, 1], [2, 0], [0, 0]], {}, ValueError, ["row 1", "label 0", "2"]),
    ([[0, 1], [1, -1], [0, 0]], {}, ValueError, ["row 1", "label 1", "NaN"]),
    ([[0, 1], [1, 0]], {}, ValueError, ["2 samples", "3"]),
    ([[0, 1], [1, 0], [0, 0]], {"num_classes": 3}, ValueError, ["2 labels", "3"]),
    (np.zeros((3, 1, 1)), {}, ValueError, ["(3, 1, 1)"]),
    (None, {}, ValueError, ["pass a task"]),
])
def test_target_errors_name_row_and_remedy(target, options, error, words):
    with pytest.raises(error) as raised:
        make({"a": np.ones((3, 2))}, target, **options)
    assert all(word in str(raised.value) for word in words), raised.value


def test_empty_class_is_a_warning_that_names_it():
    with pytest.warns(UserWarning, match="no sample of class fear, joy:"):
        data = make({"a": np.ones((2, 2))}, ["anger", "sad"], class_names=["anger", "fear", "joy", "sad"])
    assert data.class_counts().tolist() == [1, 0, 0, 1]
    with pytest.warns(UserWarning, match="no sample of class 1 = 1:"):
        make({"a": np.ones((2, 2))}, [[1, 0], [0, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make({"a": np.ones((2, 2))}, [0, 1])
        make({"a": np.ones((2, 2))}, [0, 1]).subset([0])   # a subset is not new data: no warning


def test_warning_points_at_the_caller():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make({"a": np.ones((2, 2))}, [0, 2])
    assert caught[0].filename == __file__


def test_task_is_checked_and_allows_missing_targets():
    task = Task("single_label", 3, {"a": Modality("vector", (2,))}, ("x", "y", "z"))
    data = make({"a": np.ones((4, 2))}, None, task=task)
    assert data.target.tolist() == [-1] * 4 and data.task is task
    assert make({"a": np.ones((2, 2))}, ["z", "x"], task=Task("single_label", 2, task.modalities, ("z", "x"))).target.tolist() == [0, 1]
    labelled = make({"a": np.ones((4, 2))}, None, task=Task("multi_label", 3, task.modalities))
    assert labelled.target.shape == (4, 3) and labelled.target.isnan().all()
    with pytest.raises(ValueError, match="'a' is .*shape=\\(5,\\).*expects"):
        make({"a": np.ones((4, 5))}, None, task=task)
    with pytest.raises(ValueError, match="same names"):
        make({"b": np.ones((4, 2))}, None, task=task)
    with pytest.raises(ValueError, match="the task is single_label"):
        make({"a": np.ones((4, 2))}, np.zeros((4, 3)), task=task)


def test_groups_and_ids():
    assert make(arrays(4), labels(4), groups=["b", "a", "b", "c"]).groups.tolist() == [1, 0, 1, 2]
    assert make(arrays(4), labels(4), groups=[7, 7, 3, 3]).groups.tolist() == [7, 7, 3, 3]
    with pytest.raises(ValueError, match="one group per sample"):
        make(arrays(4), labels(4), groups=[1, 2, 3])
    assert make(arrays(4), labels(4), ids=[9, 8, 7, 6])[1:3].id.tolist() == [8, 7]


def test_data_kind_is_one_of_five():
    with pytest.raises(ValueError, match="known are paper, open, simulated, stand-in, user"):
        make(arrays(), labels(), data_kind="real")


# ---------------------------------------------------------------- indexing, parts

def reference_batch(data, rows):
    "One row at a time, stacked."
    def stack(values):
        return torch.stack([values[row] for row in rows])

    def stack_all(values):
        return {modality: stack(x) for modality, x in values.items()}
    return Batch(stack_all(data.inputs), stack(data.target), stack_all(data.mask), stack_all(data.lengths), torch.tensor(list(rows)),
                 None if data.groups is None else stack(data.groups))


def assert_same(one, other):
    for field, value in vars(one).items():
        twin = vars(other)[field]
        if isinstance(value, dict):
            assert value.keys() == twin.keys() and all(torch.equal(value[m], twin[m]) for m in value), field
        else:
            assert (value is None and twin is None) or torch.equal(value, twin), field


@pytest.mark.parametrize(("index", "rows"), [
    (0, [0]), (-1, [11]), (np.int64(3), [3]), (torch.tensor(5), [5]), (slice(2, 5), [2, 3, 4]), (slice(None, None, -4), [11, 7, 3]),
    (slice(-2, None), [10, 11]), ([4, 4, -2], [4, 4, 10]), ((1, 2), [1, 2]), (range(3), [0, 1, 2]), (np.array([6, 1]), [6, 1]),
    (torch.tensor([8]), [8]), (np.arange(12) > 9, [10, 11]), (torch.arange(12) < 2, [0, 1])], ids=str)
def test_indexing_equals_row_by_row(index, rows):
    data = make(arrays(), labels(), groups=np.arange(12) // 4, mask={"image": np.arange(12) % 5 > 0}, lengths={"audio": np.arange(12)})
    assert_same(data[index], reference_batch(data, rows))
    assert len(data[index]) == len(rows)


@pytest.mark.parametrize(("index", "error"), [
    (12, IndexError), (-13, IndexError), ([0, 12], IndexError), ([True, False], IndexError),
    ("audio", TypeError), (1.0, TypeError), ([0.5], TypeError), (None, TypeError), ([[0, 1]], TypeError)])
def test_bad_indices(index, error):
    with pytest.raises(error):
        make(arrays(), labels())[index]


def test_empty_index_is_an_empty_batch():
    data = make(arrays(), labels())
    assert len(data[[]]) == len(data[5:5]) == 0 and data[[]].inputs["image"].shape == (0, 1, 4, 5)
    assert as_rows([], 3).dtype == torch.int64


def test_iterating_ends():
    assert [batch.id.item() for batch in make(arrays(3), [0, 0, 0])] == [0, 1, 2]


def test_subset_keeps_ids_groups_and_splits():
    data = make(arrays(), labels(), groups=np.arange(12), splits={"train": range(8), "test": range(8, 12)}, name="x", licence="free")
    part = data.subset([9, 0, 3]).subset([0, 2])
    assert isinstance(part, MultimodalData) and part.ids.tolist() == part.groups.tolist() == [9, 3]
    assert {name: rows.tolist() for name, rows in part.splits.items()} == {"test": [0], "train": [1]}
    assert data.subset([0]).splits.keys() == {"train"} and len(data) == 12
    assert (part.name, part.licence, part.task) == ("x", "free", data.task)
    assert torch.equal(part.inputs["audio"], data.inputs["audio"][[9, 3]])
    twice = data.subset([8, 8, 0])   # a bootstrap sample: both copies of row 8 belong to the test split
    assert twice.splits["test"].tolist() == [0, 1]


def test_select():
    data = make(arrays(), labels(), mask={"image": np.arange(12) > 2}, lengths={"audio": np.arange(12)})
    image = data.select("image")
    assert list(image.inputs) == list(image.mask) == list(image.task.modalities) == ["image"] and image.lengths == {}
    assert list(data.select(["image", "audio"]).inputs) == ["image", "audio"] and list(data.inputs) == ["audio", "image"]
    with pytest.raises(KeyError, match="'text'.*'audio', 'image'"):
        data.select(["audio", "text"])
    with pytest.raises(ValueError, match="no modality selected"):
        data.select([])


def test_batch_moves_every_tensor():
    data = make(arrays(), labels(), groups=np.arange(12), lengths={"audio": np.arange(12)})
    moved = data[:2].to("meta")
    tensors = [*moved.inputs.values(), *moved.mask.values(), *moved.lengths.values(), moved.target, moved.id, moved.group]
    assert len(tensors) == 8 and all(t.device.type == "meta" for t in tensors)


@pytest.mark.cuda
def test_batch_moves_to_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert make(arrays(), labels())[:2].to("cuda").inputs["audio"].is_cuda


# ---------------------------------------------------------------- splits

def check_partition(data, parts):
    assert sorted(torch.cat([part.ids for part in parts]).tolist()) == list(range(len(data)))


@settings(max_examples=30, deadline=None)
@given(classes=st.integers(1, 5), per_class=st.integers(12, 40), unlabelled=st.integers(0, 9), seed=st.integers(0, 10**6),
       valid=st.sampled_from([0.1, 0.2, 0.3]), test=st.sampled_from([0.1, 0.2, 0.3]))
def test_stratified_split(classes, per_class, unlabelled, seed, valid, test):
    target = np.random.default_rng(seed).permutation(np.r_[np.repeat(np.arange(classes), per_class), -np.ones(unlabelled, int)])
    data = make({"a": np.ones((len(target), 1))}, target)
    parts = data.split(valid, test, seed)
    check_partition(data, parts)
    for part, share in zip(parts, (1 - valid - test, valid, test), strict=True):
        assert (part.class_counts() - share * per_class).abs().max() <= 2   # each of the two draws rounds by less than one
    assert [(part.target < 0).sum() for part in parts] == [unlabelled, 0, 0]
    again = data.split(valid, test, seed)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(parts, again, strict=True))


@settings(max_examples=30, deadline=None)
@given(n_groups=st.integers(3, 30), seed=st.integers(0, 10**6), multi=st.booleans())
def test_no_group_on_two_sides(n_groups, seed, multi):
    rng = np.random.default_rng(seed)
    groups = np.r_[np.arange(n_groups), rng.integers(0, n_groups, 5 * n_groups)]
    target = rng.integers(0, 2, (len(groups), 3)) if multi else rng.integers(-1, 2, len(groups))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # a random target may lack a class
        data = make({"a": np.ones((len(groups), 1))}, target, groups=groups, **({} if multi else {"num_classes": 2}))
    parts = data.split(seed=seed)
    check_partition(data, parts)
    sides = [set(part.groups.tolist()) for part in parts]
    assert sum(map(len, sides)) == n_groups and min(map(len, sides)) >= 1


def test_group_split_is_fair_and_varies_with_the_seed():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), rng.integers(1, 9, 60))
    target = (groups % 10 == 0).astype(int)   # a class of six groups: plain group draws often leave it out of a part
    data = make({"a": np.ones((len(groups), 1))}, target, groups=groups)
    tests = [data.split(seed=seed)[2] for seed in range(10)]
    assert all(test.class_counts().min() > 0 for test in tests)
    assert all(abs(len(test) / len(data) - 0.2) < 0.03 for test in tests)
    assert len({tuple(test.ids.tolist()) for test in tests}) == 10


def test_group_shares_do_not_round_up():
    data = make({"a": np.ones((120, 1))}, np.tile([0, 1], 60), groups=np.arange(120) // 10)
    assert [len(part.groups.unique()) for part in data.split()] == [8, 2, 2]


def test_seeds_differ_and_global_state_is_untouched():
    data = make({"a": np.ones((100, 1))}, np.arange(100) % 2)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    tests = {tuple(data.split(seed=seed)[2].ids.tolist()) for seed in range(5)}
    assert len(tests) == 5
    assert torch.equal(torch.get_rng_state(), torch_state) and np.array_equal(np.random.get_state()[1], numpy_state)


def test_published_splits_are_kept():
    target = np.arange(100) % 4
    for splits, drawn_from in (({"test": range(80, 100)}, 80), ({"train": range(60), "test": range(80, 100)}, 60)):
        data = make({"a": np.ones((100, 1))}, target, splits=splits)
        for seed in range(4):
            train, valid, test = data.split(valid=0.25, test=0.5, seed=seed)
            assert test.ids.tolist() == list(range(80, 100))
            assert sorted(torch.cat([train.ids, valid.ids]).tolist()) == list(range(drawn_from)) and len(valid) == drawn_from // 4
            assert all(abs(count - len(train) / 4) < 1 for count in train.class_counts().tolist())
    data = make({"a": np.ones((100, 1))}, target, splits={"train": range(50), "valid": range(50, 60), "test": range(60, 99)})
    assert [part.ids.tolist() for part in data.split(seed=5)] == [list(range(50)), list(range(50, 60)), list(range(60, 99))]
    train = data.split()[0]   # the training part has no test split left: one is drawn
    assert [len(part) for part in train.split()] == [30, 10, 10]


def test_published_split_across_groups_warns_and_is_kept():
    data = make({"a": np.ones((40, 1))}, np.arange(40) % 2, groups=np.arange(40) % 8, splits={"test": range(32, 40)})
    with pytest.warns(UserWarning, match="groups on both sides"):
        train, valid, test = data.split()
    assert test.ids.tolist() == list(range(32, 40)) and not set(train.groups.tolist()) & set(valid.groups.tolist())


@pytest.mark.parametrize(("target", "groups", "options", "words"), [
    ([0, 1] * 20, None, {"valid": 0.0}, ["valid"]),
    ([0, 1] * 20, None, {"valid": 0.5, "test": 0.5}, ["0.5"]),
    ([0, 1] * 20, None, {"test": -0.1}, ["test"]),
    ([0, 1] * 20 + [2, 2], None, {}, ["class 2 (2)"]),
    ([0, 1] * 20, [0, 1] * 20, {}, ["2 group(s)", "3 parts"]),
    ([0, 0, 0, 1, 1, 1], None, {"test": 0.1}, ["cannot draw"]),
    ([0], None, {}, ["class 0 (1)"]),
    ([[0, 1]], None, {}, ["cannot draw"]),
    ([0, 1] * 3, list("aabbcc"), {"test": 0.9, "valid": 0.05}, ["cannot draw"]),
])
def test_splits_that_cannot_be(target, groups, options, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = make({"a": np.ones((len(target), 1))}, target, groups=groups)
    with pytest.raises(ValueError) as raised:
        data.split(**options)
    assert all(word in str(raised.value) for word in words), raised.value


def test_nothing_labelled_or_nothing_left_to_split():
    task = Task("single_label", 2, {"a": Modality("vector", (1,))})
    with pytest.raises(ValueError, match="no labelled sample among 9"):
        make({"a": np.ones((9, 1))}, None, task=task).split()
    with pytest.raises(ValueError, match="none is left to train on"):
        make({"a": np.ones((4, 1))}, [0, 1, 0, 1], splits={"test": range(4)}).split()


def test_splits_are_checked():
    with pytest.raises(ValueError, match="row 2 is in the splits 'train' and 'test'"):
        make(arrays(), labels(), splits={"train": range(3), "test": range(2, 5)})
    with pytest.raises(IndexError, match="sample 12 of 12"):
        make(arrays(), labels(), splits={"test": [12]})


# ---------------------------------------------------------------- loader

def order(loader):
    return [batch.id.tolist() for batch in loader]


def test_loader_covers_everything_in_order():
    data = make(arrays(), labels(), mask={"image": np.arange(12) > 0})
    loader = data.loader(5)
    assert len(loader) == 3 and order(loader) == order(loader) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert len(data.loader(5, drop_last=True)) == 2 and order(data.loader(5, drop_last=True)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    for batch in loader:
        assert_same(batch, reference_batch(data, batch.id.tolist()))


def test_shuffled_loader_is_a_stream_of_its_own():
    data = make({"a": np.arange(40.0)[:, None]}, np.arange(40) % 2)
    one, two = data.loader(7, shuffle=True, seed=1), data.loader(7, shuffle=True, seed=1)
    state = torch.get_rng_state()
    first, second = order(one), order(one)
    assert torch.equal(torch.get_rng_state(), state)   # the global generator is left alone
    assert first != second and sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(40))
    torch.rand(5)
    assert [order(two), order(two)] == [first, second]
    assert order(data.loader(7, shuffle=True, seed=2)) != first


def test_loader_takes_whole_batches():
    class Counted(MultimodalData):
        calls = 0

        def __getitem__(self, index):
            Counted.calls += 1
            return super().__getitem__(index)

    data = Counted.from_arrays(arrays(), labels())
    order(data.loader(5))
    assert Counted.calls == 3


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 13, "drop_last": True}])
def test_loader_without_batches(options):
    with pytest.raises(ValueError, match="batch"):
        make(arrays(), labels()).loader(**options)


def test_single_sample_works_throughout():
    data = make({"a": np.ones((1, 2))}, [0])
    assert order(data.loader(4, shuffle=True)) == [[0]] and data[0].inputs["a"].shape == (1, 2)
    assert data.class_counts().tolist() == [1] and "1 sample, single_label" in data.describe()


# ---------------------------------------------------------------- words

def test_counts_against_a_loop():
    target = torch.randint(-1, 4, (50,), generator=torch.Generator().manual_seed(0))
    assert count_classes(target, 5).tolist() == [sum(int(t == c) for t in target) for c in range(5)]


def test_describe_and_repr():
    data = make(arrays(), [*labels(11), -1], groups=np.arange(12) // 3, mask={"image": np.arange(12) > 1}, splits={"test": [0, 1]},
                name="toy", licence="CC0", class_names=["x", "y", "z"])
    text = data.describe()
    for words in ("toy: user data, 12 samples, single_label, 3 classes", "audio vector (3,)", "image image (1, 4, 5) absent in 2 samples",
                  "x: 4, y: 4, z: 3", "1 sample\n", "test 2", "CC0"):
        assert words in text, words
    assert repr(text) == str(text) and len(repr(data)) < 140 and "toy" in repr(data)
    assert "edema: 1 of 2" in make({"a": np.ones((3, 1))}, [[0, 1], [1, 0], [np.nan, 1]], class_names=["edema", "b"]).describe()


@pytest.mark.parametrize("build", [
    lambda: Modality("vector", (2, 3)), lambda: Modality("image", (3, 0, 2)), lambda: Modality("sound", (3,)),
    lambda: Task("regression", 1, {}), lambda: Task("single_label", 0, {}), lambda: Task("single_label", 2, {}, ("a",)),
    lambda: make(arrays(), labels(), ids=[1, 2]), lambda: make(arrays(), labels(), lengths={"audio": [3]})])
def test_task_and_modality_are_checked(build):
    with pytest.raises(ValueError):
        build()


# ---------------------------------------------------------------- load

def test_load_by_name():
    assert set(DATASETS) >= {"digits", "sim-1", "sim-2", "sim-3"}
    data = load("sim-2", n=30, seed=4, d0=3, d0_superfluous=2, d11=4, d21=5)
    assert len(data) == 30 and data.inputs["view1"].shape == (30, 3 + 2 + 4 + 4)
    assert all(info.data_kind in ibma.data.DATA_KINDS for info in DATASETS.values())
    assert len(load("digits", root="nowhere")) == 1797   # a set without files has no use for root


@pytest.mark.parametrize(("name", "hint"), [
    ("sim1", "did you mean 'sim-1'"), ("DIGITS", "did you mean 'digits'"), ("xyzzy", "known are digits, sim-1")])
def test_unknown_names_are_answered(name, hint):
    with pytest.raises(KeyError) as raised:
        load(name)
    assert hint in str(raised.value) and repr(name) in str(raised.value)


def test_unknown_options_are_answered():
    with pytest.raises(TypeError, match="'sim-1' has no option 'samples', 'case': it takes n, seed, d0"):
        load("sim-1", samples=3, case="sim-2")
    with pytest.raises(TypeError, match="'digits' has no option 'seed': it takes none"):
        load("digits", seed=0)


def test_root_reaches_loaders_that_read_files(monkeypatch, tmp_path):
    import ibma.data.digits as module
    monkeypatch.setattr(module, "from_files", lambda root=None, size=1: (root, size), raising=False)
    monkeypatch.setitem(DATASETS, "files", ibma.data.DatasetInfo("ibma.data.digits:from_files", "open", "a set with files"))
    assert load("files", root=tmp_path, size=2) == (tmp_path, 2)


def test_import_is_cheap():
    heavy = "('sklearn', 'pandas', 'matplotlib', 'ibma.data.simulated', 'ibma.data.digits')"
    code = f"import sys, ibma.data; sys.exit(any(module in sys.modules for module in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
