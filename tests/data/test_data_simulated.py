"""ibma.data.simulated: the construction re-done by hand, and the closed-form accuracy against integration and simulation."""
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from ibma.data.simulated import (
    BLOCKS,
    CASES,
    RELEVANT,
    VIEWS,
    bayes_accuracy,
    block_columns,
    block_widths,
    hyperplane,
    oracle_predict,
    simulate,
    take_blocks,
    variance_share,
)

SMALL = dict(d0=4, d0_superfluous=3, d11=5, d21=2, d12=6, d22=1)


@pytest.mark.parametrize(("case", "view1", "view2"), [("sim-1", 1400, 600), ("sim-2", 600, 1400), ("sim-3", 1000, 1000)])
def test_published_sizes(case, view1, view2):
    data = simulate(case, n=50)
    assert data.inputs["view1"].shape == (50, view1) and data.inputs["view2"].shape == (50, view2)
    assert (data.name, data.data_kind, data.task.num_classes) == (case, "simulated", 2)
    assert data.splits["train"].tolist() == list(range(45)) and data.splits["test"].tolist() == list(range(45, 50))


def test_default_size_and_published_split():
    data = simulate(None, d0=1, d0_superfluous=1, d11=1, d21=1)
    assert [len(rows) for rows in data.splits.values()] == [9000, 1000]
    assert data.split(seed=3)[2].ids.tolist() == list(range(9000, 10_000))
    assert [len(rows) for rows in simulate(None, n=2, **SMALL).splits.values()] == [1, 1]


def test_views_and_label_by_hand():
    data, widths = simulate(None, n=300, seed=7, **SMALL), block_widths(None, **SMALL)
    x1, x2, delta = data.inputs["view1"].double(), data.inputs["view2"].double(), hyperplane(widths, 7)
    assert x1.shape[1] == 4 + 3 + 5 + 6 and x2.shape[1] == 4 + 3 + 2 + 1
    assert torch.equal(x1[:, :7], x2[:, :7])                       # a0 and b0 are shared
    score = x1[:, :4] @ delta["a0"].double() + x1[:, 7:12] @ delta["a1"].double() + x2[:, 7:9] @ delta["a2"].double()
    assert torch.equal((score > 0).long(), data.target)
    assert 0.3 < data.target.float().mean() < 0.7


@pytest.mark.parametrize("sizes", [SMALL, dict(d0=4, d0_superfluous=4, d11=4, d21=4)], ids=["all different", "all equal"])
def test_blocks_are_independent_standard_normal(sizes):
    n = 20_000
    data, widths = simulate(None, n=n, seed=1, **sizes), block_widths(None, **sizes)
    x = take_blocks(data.inputs, BLOCKS, widths).double()
    assert x.shape == (n, sum(widths.values()))
    bound = 5 / math.sqrt(n)                                         # five standard deviations of a mean or a covariance
    assert x.mean(0).abs().max() < bound
    covariance = x.T @ x / n
    assert (covariance - torch.eye(x.shape[1])).abs().max() < bound * math.sqrt(2)
    assert abs(float((x**4).mean()) - 3) < 5 * math.sqrt(96 / x.numel())   # normal: fourth moment 3, its variance 105 - 9


def test_block_columns_cover_each_view_once():
    inputs = simulate("sim-2", n=2).inputs
    for view, columns in block_columns(block_widths("sim-2")).items():
        assert list(columns) == list(VIEWS[view])
        assert [i for cols in columns.values() for i in range(cols.start, cols.stop)] == list(range(inputs[view].shape[1]))


def test_take_blocks_in_the_order_asked():
    data, widths = simulate(None, n=5, **SMALL), block_widths(None, **SMALL)
    taken = take_blocks(data[:3].inputs, ["a2", "a0"], widths)
    assert torch.equal(taken, torch.cat([data.inputs["view2"][:3, 7:9], data.inputs["view1"][:3, :4]], dim=1))
    with pytest.raises(KeyError, match="c0"):
        take_blocks(data.inputs, ["c0"], widths)


def test_seeds_and_streams():
    a, b = simulate(None, n=40, seed=0, **SMALL), simulate(None, n=40, seed=0, **SMALL)
    assert torch.equal(a.inputs["view1"], b.inputs["view1"]) and torch.equal(a.target, b.target)
    other = simulate(None, n=40, seed=1, **SMALL)
    assert not torch.equal(a.inputs["view1"], other.inputs["view1"])
    assert not torch.equal(hyperplane(block_widths(None, **SMALL), 0)["a0"], hyperplane(block_widths(None, **SMALL), 1)["a0"])
    longer = simulate(None, n=60, seed=0, **SMALL)                    # begins with the shorter one
    assert torch.equal(longer.inputs["view2"][:40], a.inputs["view2"]) and torch.equal(longer.target[:40], a.target)
    wider = simulate(None, n=40, seed=0, **(SMALL | {"d12": 9}))      # superfluous width changes no label
    assert torch.equal(wider.target, a.target) and wider.name != a.name


def test_names_tell_changed_sets():
    assert simulate("sim-3", n=2, d12=300).name == "sim-3"
    assert simulate("sim-3", n=2, d12=299).name == "sim[a0=200,b0=200,a1=300,b1=299,a2=300,b2=300]"
    assert block_widths("sim-1", d11=50)["b1"] == 50                  # mirrored from the width given


@pytest.mark.parametrize("call", [
    lambda: block_widths(None, d11=3), lambda: block_widths("sim-1", d0=-1), lambda: simulate("sim-1", n=1),
    lambda: block_widths(None, d0=0, d11=0, d21=0, d12=1, d22=1),
    lambda: block_widths(None, d0=0, d0_superfluous=0, d11=1, d21=0), lambda: bayes_accuracy(-0.1), lambda: bayes_accuracy(1.01)])
def test_bad_parameters(call):
    with pytest.raises(ValueError):
        call()


def test_unknown_case():
    with pytest.raises(KeyError, match="known are sim-1, sim-2, sim-3"):
        simulate("sim-9")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.75, 0.99])
def test_bayes_accuracy_by_integration(share):
    # given A = a, the sign of A is right with probability Phi(|a| / sqrt(1 - share)), A being N(0, share)
    value, _ = quad(lambda a: 2 * norm.pdf(a, scale=math.sqrt(share)) * norm.cdf(a / math.sqrt(1 - share)), 0, np.inf)
    assert bayes_accuracy(share) == pytest.approx(value, abs=1e-7)


def test_bayes_accuracy_at_its_ends():
    assert bayes_accuracy(0) == 0.5 and bayes_accuracy(1) == 1.0 and bayes_accuracy(1 + 1e-12) == 1.0
    assert bayes_accuracy(0.5) == pytest.approx(0.75, abs=1e-12)


def test_variance_share_counts_relevant_blocks_once():
    delta = {"a0": torch.tensor([3.0, -4.0]), "a1": torch.tensor([3.0]), "a2": torch.tensor([4.0])}   # squares: 25, 9, 16
    assert variance_share(["a0", "b0", "a0"], delta) == pytest.approx(0.5)
    assert variance_share(VIEWS["view2"], delta) == pytest.approx(0.82) and variance_share(["b1"], delta) == 0
    assert variance_share(RELEVANT, hyperplane(block_widths("sim-1"))) == pytest.approx(1.0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("names", [("a0",), ("a1",), ("a1", "a2"), VIEWS["view1"], VIEWS["view2"], ("b0", "b2")], ids="".join)
def test_oracle_reaches_the_bayes_accuracy(case, names):
    n = 4000
    data, widths = simulate(case, n=n, seed=11), block_widths(case)
    delta = hyperplane(widths, 11)
    expected = bayes_accuracy(variance_share(names, delta))
    counted = float((oracle_predict(data.inputs, names, widths, delta) == data.target).double().mean())
    assert abs(counted - expected) < 4 * math.sqrt(expected * (1 - expected) / n)   # binomial standard deviation


def test_oracle_with_everything_is_always_right():
    data, widths = simulate("sim-1", n=500, seed=2), block_widths("sim-1")
    assert (oracle_predict(data.inputs, RELEVANT, widths, hyperplane(widths, 2)) == data.target).all()
