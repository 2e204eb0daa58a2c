"""The statistics against statsmodels and scipy, against simulation, and by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, permutation_test
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from grpo_gsm8k.errors import UserError
from grpo_gsm8k.evals.stats import (
    bootstrap_mean,
    compare,
    holm,
    maj_at_k,
    problems_needed,
    rate_interval,
    share_interval,
    sign_flip,
    spread,
    wilson,
)


def pair(won: int, lost: int, rest: int = 0) -> list[float]:
    return [1.0] * won + [-1.0] * lost + [0.0] * rest


@pytest.mark.parametrize(("won", "lost"), [(25, 10), (3, 3), (0, 5), (1, 0), (120, 90), (400, 8)])
def test_one_completion_a_problem_is_exact_mcnemar(won, lost):
    exact, mid = sign_flip(pair(won, lost, 50))
    assert exact == pytest.approx(mcnemar([[30, lost], [won, 20]], exact=True).pvalue, rel=1e-9)
    if won != lost:  # Fagerland et al.: the exact p less the probability of the table itself
        assert mid == pytest.approx(exact - binom.pmf(min(won, lost), won + lost, 0.5), rel=1e-9)


def test_several_completions_a_problem_are_a_permutation_test_of_the_signs():
    rng = np.random.default_rng(0)
    differences = list((rng.integers(0, 5, 14) - rng.integers(0, 4, 14)) / 4)
    by_scipy = permutation_test(
        (np.array(differences),), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    # scipy doubles the smaller tail; with signs that are symmetric that is the same
    assert sign_flip(differences)[0] == pytest.approx(by_scipy.pvalue, rel=1e-9)


def test_unlike_steps_are_rounded_and_the_p_hardly_moves():
    rng = np.random.default_rng(1)
    coarse = rng.integers(-3, 4, 12) / 7
    fine = coarse + 1e-7 * rng.random(12)
    assert sign_flip(list(fine))[0] == pytest.approx(sign_flip(list(coarse))[0], abs=0.02)
    assert sign_flip([0.0] * 9) == (1.0, 1.0)


@pytest.mark.parametrize(("n", "differing"), [(1319, 0.05), (512, 0.05), (200, 0.2), (100, 0.4)])
def test_null_pairs_are_rejected_in_three_to_seven_percent(n, differing):
    """1,000 pairs of equally good runs: the test that decides (mid-p) has its level, the exact one never exceeds it."""
    rng = np.random.default_rng(n)
    tables = rng.multinomial(n, [differing / 2, differing / 2, 1 - differing], size=1000)
    p = np.array([sign_flip(pair(won, lost)) for won, lost, _ in tables])
    assert 0.03 <= (p[:, 1] < 0.05).mean() <= 0.07
    assert 0.015 <= (p[:, 0] < 0.05).mean() <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 1000)


def test_null_pairs_with_several_completions_a_problem():
    rng = np.random.default_rng(5)
    rejected = []
    for _ in range(400):
        skill = rng.beta(0.7, 0.7, 150)
        rejected.append(sign_flip(list((rng.binomial(4, skill) - rng.binomial(4, skill)) / 4))[1] < 0.05)
    assert 0.025 <= np.mean(rejected) <= 0.08


def test_as_many_problems_as_are_said_to_be_needed_show_the_gain():
    differing, gain = 0.2, 0.05
    n = problems_needed(gain, differing)
    rng = np.random.default_rng(3)
    tables = rng.multinomial(n, [(differing + gain) / 2, (differing - gain) / 2, 1 - differing], size=600)
    power = np.mean([sign_flip(pair(won, lost))[1] < 0.05 for won, lost, _ in tables])
    assert 0.76 <= power <= 0.84
    # By hand, with z of 1.959964 and 0.841621.
    assert n == math.ceil((1.959964 * math.sqrt(0.2) + 0.841621 * math.sqrt(0.2 - 0.0025)) ** 2 / 0.0025)
    assert problems_needed(0.0, 0.2) is None
    assert problems_needed(-gain, differing) == n
    assert problems_needed(0.3, 0.01) == problems_needed(0.3, 0.3)  # no gain beyond the problems that differ


def test_holm_against_statsmodels():
    p = [0.01, 0.04, 0.03, 0.005, 0.5, 0.03]
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm([0.7, 0.9]) == [1.0, 1.0] and holm([0.02]) == [0.02]


def test_wilson_and_rates_against_statsmodels():
    for right, n in ((30, 600), (0, 10), (10, 10), (7, 9)):
        expected = proportion_confint(right, n, method="wilson")
        assert wilson(right, n) == pytest.approx(expected, abs=1e-9)
        assert rate_interval([[i < right] for i in range(n)]) == pytest.approx(expected, abs=1e-9)


def test_several_completions_of_one_problem_are_no_new_evidence():
    """All eight completions of a problem agree: the interval is that of the problems, not of eight times as many."""
    once = wilson(30, 100)
    eight = rate_interval([[i < 30] * 8 for i in range(100)])
    assert eight[1] - eight[0] == pytest.approx(once[1] - once[0], rel=0.05)
    low, high = rate_interval([[True]] * 50 + [[False] * 9] * 50)  # 50 of 500 completions
    assert low < 0.1 < high < 0.2


def test_what_never_varied_is_no_certainty():
    """Six problems, all wrong: no interval may be the point 0, however many completions each has."""
    for right in (0, 6):
        expected = proportion_confint(right, 6, method="wilson")
        assert rate_interval([[right > 0] * 2] * 6) == pytest.approx(expected, abs=1e-9)
        assert share_interval([right / 6] * 6) == pytest.approx(expected, abs=1e-9)
    low, high = rate_interval([[True, False, False]])  # one problem says next to nothing
    assert low == pytest.approx(0, abs=1e-9) and high == pytest.approx(1, abs=1e-9)
    assert share_interval([0.0, 1.0] * 8) == bootstrap_mean([0.0, 1.0] * 8)


def test_a_weighted_bootstrap_is_that_of_a_ratio():
    rng = np.random.default_rng(2)
    n, weights = 400, rng.integers(1, 5, 400).astype(float)
    values = rng.random(400)
    low, high = bootstrap_mean(list(values), list(weights))
    ratio = float(values @ weights / weights.sum())
    error = math.sqrt(((weights * (values - ratio)) ** 2).sum()) / weights.sum()  # the delta method's, by hand
    assert (low, high) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=4e-3)
    assert n == 400


def test_majority_by_hand():
    a, b, none = ("3", True), ("4", False), (None, False)
    assert maj_at_k([a, a, b], 3) == 1 and maj_at_k([a, b, b], 3) == 0
    assert maj_at_k([a, b], 2) == 0.5 and maj_at_k([none, none, a], 3) == 1 and maj_at_k([none], 1) == 0
    assert maj_at_k([a, a, b, b], 2) == 0.5  # two blocks
    assert maj_at_k([a, b, none, b, b], 3) == 0.5  # one block, and what is left over is not counted


def test_majority_of_independent_votes_is_the_binomial_tail():
    votes = [("1", True), ("2", False)]
    p, total = 0.7, 0.0
    for draw in itertools.product(votes, repeat=3):
        total += maj_at_k(list(draw), 3) * math.prod(p if right else 1 - p for _, right in draw)
    assert total == pytest.approx(binom.sf(1, 3, p))


def test_spread_finds_the_two_sources_that_made_the_numbers():
    """Draw problems and seeds with known variances; the estimates find both."""
    rng = np.random.default_rng(4)
    problems, seeds, k = 6000, 2, 1
    skill = rng.beta(2, 2, problems)  # variance 1/20, and the mean of p (1 - p) is 1/5
    right = rng.binomial(k, skill, size=(seeds, problems))
    found = spread(right.tolist(), k)
    assert found.problems == pytest.approx(math.sqrt(1 / 20 / problems), rel=0.05)
    assert found.sampling == pytest.approx(math.sqrt(1 / 5 / k / problems), rel=0.05)
    assert spread([[1, 0, 1], [1, 1, 1]], 1).seeds == pytest.approx((1 / 3) / math.sqrt(2))  # of 2/3 and 1
    assert spread([[1, 0, 1]], 1).sampling is None


def test_compare_by_hand():
    a = {str(i): float(i < 50) for i in range(100)}
    b = {str(i): float(10 <= i < 75) for i in range(100)}
    found = compare(a, b)
    assert (found.won, found.lost, found.n) == (25, 10, 100) and found.difference == pytest.approx(0.15)
    assert (found.accuracy_a, found.accuracy_b) == (0.5, 0.65) and found.significant
    assert found.problems_needed == problems_needed(0.15, 0.35)
    assert compare(a, b, 0.02).problems_needed == problems_needed(0.02, 0.35)
    half = 1.96 * math.sqrt((0.35 - 0.15**2) / 100)
    assert found.ci95 == pytest.approx((0.15 - half, 0.15 + half), abs=0.011)
    assert compare(a, a).p_value == 1.0 and not compare(a, a).significant


def test_compare_says_which_problems_differ():
    a = {"p1": 1.0, "p2": 0.0, "p3": 1.0}
    with pytest.raises(UserError, match=r"1 only in A \('p3'\), 2 only in B \('p4'\), 2 in both"):
        compare(a, {"p1": 1.0, "p2": 1.0, "p5": 0.0, "p4": 1.0})
