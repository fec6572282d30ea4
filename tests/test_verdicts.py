"""ibma.verdicts: the rule of the page as a table, walked through exhaustively."""
import itertools
import math

import numpy as np
import pytest

from ibma.significance import Comparison, paired_t
from ibma.verdicts import VERDICTS, Verdict, judge, judge_together


def rule(low, high, claimed, same):
    "The page's table, cell by cell."
    if low <= 0: return "not reproduced"
    if not same: return "direction only"
    return "reproduced" if math.isnan(claimed) or low <= claimed <= high else "direction only"


@pytest.mark.parametrize("same", [True, False])
def test_judge_is_the_table_of_the_page(same):
    ends = [-2.0, -0.5, 0.0, 0.5, 1.0, 3.0]
    for (low, high), claimed in itertools.product(itertools.combinations_with_replacement(ends, 2), [0.5, 1.0, 2.0, 5.0, math.nan]):
        found = judge(Comparison(difference=(low + high) / 2, low=low, high=high), claimed, same)
        assert found.word == rule(low, high, claimed, same), (low, high, claimed)


def test_no_runs_and_no_interval():
    assert judge(None, 1.0).word == VERDICTS[0] and "CheXpert" in judge(None, data="CheXpert").reason
    with pytest.raises(ValueError, match="outside its interval"):
        judge(Comparison(difference=0.0, low=0.1, high=0.2))
    with pytest.raises(ValueError, match="known are"):
        Verdict("maybe", "")


@pytest.mark.parametrize("low, high, claimed, says", [
    (-2.0, -1.0, 1.0, "other way round"), (-0.4, 0.4, 1.0, "less than half"), (-0.4, 0.6, 1.0, "too few runs"), (-1.0, 1.0, math.nan, "zero is not excluded"),
])
def test_the_reason_tells_apart_why_a_claim_was_not_reproduced(low, high, claimed, says):
    assert says in judge(Comparison(difference=(low + high) / 2, low=low, high=high), claimed, True).reason


def test_together_the_weakest_that_was_tested_counts():
    made = {word: Verdict(word, "because") for word in VERDICTS}
    for words in itertools.product(VERDICTS, repeat=3):
        tested = [w for w in words if w != VERDICTS[0]]
        expected = min(tested, key=VERDICTS.index) if tested else VERDICTS[0]
        assert judge_together([made[w] for w in words]).word == expected
    assert judge_together([made["reproduced"]]) is made["reproduced"]
    assert "2 × reproduced, 1 × direction only" in judge_together([made["reproduced"], made["direction only"], made["reproduced"]]).reason


def test_of_the_same_word_the_one_with_the_lowest_upper_end_is_the_weakest():
    three = [judge(Comparison(difference=d, low=d - 1, high=d + 1), 3.0, data=name) for d, name in ((0.5, "first"), (-4.0, "second"), (-0.5, "third"))]
    together = judge_together(three)
    assert "The weakest: the difference is -4.00 points [-5.00, -3.00] on second" in together.reason
    assert judge_together([judge_together(three), judge(Comparison(difference=-9.0, low=-9.5, high=-8.5))]).reason.count("-9.00") == 1


def test_it_takes_what_the_tests_give():
    rng = np.random.default_rng(0)
    a = rng.normal(3, 1, 10)
    assert judge(paired_t(a, a - rng.normal(2, 0.1, 10), test_share=0.25), 2.0, same_data=True).word == "reproduced"
    box = judge(paired_t(a, a + 1 + rng.normal(0, 0.1, 10)))._repr_markdown_().splitlines()
    assert box[:2] == [":::{admonition} Verdict: not reproduced", ":class: warning"] and box[-1] == ":::"


def test_a_claim_that_a_loses_is_not_judged_as_one_that_it_wins():
    with pytest.raises(ValueError, match="swap the two"):
        judge(Comparison(difference=-2.0, low=-3.0, high=-1.0), -1.5)
