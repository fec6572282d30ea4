"""ibma.significance against SciPy, statsmodels-free enumeration and definitions."""
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ibma.significance import (
    compare,
    holm,
    mcnemar,
    mean_ranks,
    paired_t,
    rank_diagram,
    rejection_rates,
    simulated_benchmark,
    stars,
    wilcoxon,
)


@pytest.mark.parametrize("seed", range(10))
def test_paired_t_equals_scipy_and_its_interval_belongs_to_it(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, int(rng.integers(2, 30))))
    found = paired_t(a, b)
    expected = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    share = 0.25
    k, d = len(a), a - b
    t = d.mean() / math.sqrt((1 / k + share) * d.var(ddof=1))
    assert paired_t(a, b, share).p == pytest.approx(2 * stats.t.sf(abs(t), k - 1))
    edge = paired_t(a, b, share)
    assert paired_t(a - edge.low, b, share).p == pytest.approx(0.05)  # a shift to the edge of the interval is just significant


def test_constant_differences_and_holes():
    assert paired_t([1, 2, 3], [1, 2, 3]).p == 1.0
    assert paired_t([2, 3, 4], [1, 2, 3]).p == 0.0
    assert paired_t([1, 2, np.nan, 4], [1, 1, 9, 2]).pairs == 3
    assert wilcoxon([1, 2], [1, 2]).p == 1.0
    for wrong in ([1.0], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="paired by split and seed|at least two"):
            paired_t(wrong, [1.0])
    with pytest.raises(AttributeError, match="there are p, difference"):
        _ = paired_t([1, 2], [2, 4]).pvalue


def test_wilcoxon_equals_the_enumeration_of_all_signs():
    d = np.array([0.5, -1.0, 2.0, 3.5, 4.0, -0.2])
    ranks = stats.rankdata(np.abs(d))
    seen = min(ranks[d > 0].sum(), ranks[d < 0].sum())
    sums = [sum(r for r, s in zip(ranks, signs, strict=True) if s) for signs in itertools.product([0, 1], repeat=6)]
    exact = np.mean([min(s, ranks.sum() - s) <= seen for s in sums])
    assert wilcoxon(d, np.zeros(6)).p == pytest.approx(exact)


@pytest.mark.parametrize("b, c", [(0, 0), (5, 0), (7, 3), (4, 4)])
def test_mcnemar_equals_the_binomial_sum(b, c):
    right = [True] * 6 + [False] * 2
    first = right + [True] * b + [False] * c
    second = right + [False] * b + [True] * c
    n, k = b + c, min(b, c)
    exact = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0
    assert mcnemar(first, second).p == pytest.approx(exact)
    with pytest.raises(ValueError, match="same samples"):
        mcnemar([True], [True, False])


@pytest.mark.parametrize("seed", range(5))
def test_holm_equals_its_definition_step_by_step(seed):
    p = np.random.default_rng(seed).random(7) ** 2
    p[3] = p[1]
    adjusted, running = {}, 0.0
    for step, i in enumerate(sorted(range(7), key=lambda i: p[i])):
        running = max(running, (7 - step) * p[i])
        adjusted[i] = min(1.0, running)
    assert holm(p) == pytest.approx([adjusted[i] for i in range(7)])
    with_hole = holm([*p, np.nan])
    assert math.isnan(with_hole[-1]) and with_hole[:-1] == pytest.approx(holm(p))
    assert [stars(v) for v in (0.2, 0.04, 0.004, 0.0004, math.nan)] == ["", "*", "**", "***", ""]


def test_folds_and_splits_of_the_simulation_do_what_their_names_say():
    rng = np.random.default_rng(0)
    a, b, share = simulated_benchmark(rng, protocol="folds")
    assert len(a) == len(b) == 5 and share == pytest.approx(0.25)
    better = [np.mean(np.subtract(*simulated_benchmark(rng, 0.3)[:2])) for _ in range(30)]
    assert np.mean(better) > 0.05
    fair = [np.mean(np.subtract(*simulated_benchmark(rng, 0.0)[:2])) for _ in range(300)]
    assert abs(np.mean(fair)) < 3 * np.std(fair) / 300**0.5


def test_level_of_the_corrected_test_and_the_failure_of_seeds_only():
    right, other, _ = simulated_benchmark(np.random.default_rng(0), protocol="answers", n=500)
    assert right.dtype == other.dtype == bool and right.shape == other.shape == (100,) and 0.5 < right.mean() < 0.95
    found = rejection_rates(0.0, benchmarks=300, seed=1)
    assert found["McNemar, one split, one seed"][1] < 0.05 < found["Wilcoxon, 10 random splits"][1]
    assert found["corrected t, 10 random splits"][1] < 0.05 < 0.11 > found["corrected t, 10 random splits"][2]
    assert found["t, 10 random splits"][1] > 0.12 and found["t, 10 seeds on one split (as in the paper)"][1] > 0.5


def test_compare_orders_adjusts_and_shows_holes():
    rng = np.random.default_rng(0)
    split = rng.normal(0, 0.05, 10)
    results = {name: gain + split + rng.normal(0, 0.01, 10) for name, gain in (("base", 0.7), ("up", 0.75), ("same", 0.7), ("down", 0.6))}
    results["half"] = np.where(np.arange(10) < 9, np.nan, 0.9)
    table = compare(results, "base", test_share=0.25)
    assert list(table.index)[:2] == ["half", "up"] and math.isnan(table["p"]["half"]) and table["runs"]["half"] == 1
    expected = {name: paired_t(results[name], results["base"], 0.25) for name in ("up", "same", "down")}
    for name, found in expected.items():
        assert table["p"][name] == pytest.approx(found.p) and table["difference"][name] == pytest.approx(found.difference)
    names = [n for n in table.index if n in expected]
    assert table["p_holm"][names].tolist() == pytest.approx(holm(table["p"][names]).tolist())
    assert table["stars"]["same"] == "" and table["stars"]["up"].startswith("*")
    assert list(compare(results, "base", higher_is_better=False).index)[0] == "down"
    with pytest.raises(KeyError, match="'none' is not among base, up"):
        compare(results, "none")


def test_ranks_equal_friedman_and_the_published_critical_value():
    rng = np.random.default_rng(0)
    scores = pd.DataFrame(rng.normal(size=(10, 4)), columns=list("abcd"))
    scores["d"] += 3
    ranks, p, critical = mean_ranks(scores)
    assert ranks.index[0] == "d" and ranks["d"] == 1.0
    assert p == pytest.approx(stats.friedmanchisquare(*scores.to_numpy().T).pvalue)
    assert critical == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 10)), rel=1e-3)  # q(.05, 4) of Demsar's table
    two, p, critical = mean_ranks(scores[["a", "d"]])
    assert critical == pytest.approx(1.960 * math.sqrt(2 * 3 / 60), rel=1e-3) and p < 0.05
    with pytest.raises(ValueError, match="at least two of each"):
        mean_ranks(scores[:1])
    rank_diagram(ranks, critical)
