"""ibma.data.digits: nothing lost, nothing mixed up."""
import torch
from sklearn.datasets import load_digits

from ibma.data import Modality, load


def test_halves_make_the_whole():
    data, source = load("digits"), load_digits()
    whole = torch.cat([data.inputs["left"], data.inputs["right"]], dim=3)[:, 0] * 16
    assert torch.equal(whole, torch.from_numpy(source.images).float())
    assert data.target.tolist() == source.target.tolist()


def test_what_it_says_of_itself():
    data = load("digits")
    assert len(data) == 1797 and data.task.modalities == {"left": Modality("image", (1, 8, 4)), "right": Modality("image", (1, 8, 4))}
    assert data.task.class_names == tuple("0123456789") and data.splits is None and data.groups is None
    assert data.data_kind == "open" and "CC BY 4.0" in data.licence
    assert all(0 <= float(x.min()) and float(x.max()) == 1 for x in data.inputs.values())


def test_split_has_every_digit_everywhere():
    parts = load("digits").split(seed=1)
    assert [len(part) for part in parts] == [1077, 360, 360]
    assert all(part.class_counts().min() >= 34 for part in parts)
