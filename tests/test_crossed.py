"""The mixed model over seeds and problems: against formulas spelled out, against simulated answers, at its edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm, t, ttest_1samp

from grpo_gsm8k.evals import crossed as module
from grpo_gsm8k.evals.crossed import Noise, copula, crossed, power, problems_needed, seeds_needed, simulate
from grpo_gsm8k.study.analysis import decide
from tests import study_errors


def by_hand(d):
    """The three mean squares, by loops."""
    seeds, problems = len(d), len(d[0])
    mean = sum(map(sum, d)) / seeds / problems
    row = [sum(r) / problems for r in d]
    column = [sum(r[p] for r in d) / seeds for p in range(problems)]
    ms_s = problems * sum((r - mean) ** 2 for r in row) / (seeds - 1)
    ms_p = seeds * sum((c - mean) ** 2 for c in column) / (problems - 1)
    rest = sum((d[s][p] - row[s] - column[p] + mean) ** 2 for s in range(seeds) for p in range(problems))
    return mean, ms_s, ms_p, rest / (seeds - 1) / (problems - 1)


@pytest.mark.parametrize("level", [0.05, 0.01])
def test_the_interval_is_the_formula_and_the_p_value_is_its_level(level):
    d = np.random.default_rng(1).integers(-1, 2, size=(4, 30)) + 0.2
    mean, ms_s, ms_p, ms_e = by_hand(d.tolist())
    wide, narrow = (t.ppf(1 - level / 2, df) for df in (3, 29))
    far = math.sqrt((wide**2 * ms_s + narrow**2 * max(ms_p - ms_e, 0)) / d.size)
    found = crossed(d, level)
    assert found.mean == pytest.approx(mean)
    assert found.ci == pytest.approx((mean - far, mean + far))
    assert (found.seeds, found.problems) == (4, 30)
    assert found.rest_sd == pytest.approx(math.sqrt(ms_e))
    again = crossed(d, found.p_value)  # at the level of its p-value, the interval ends at 0
    assert min(map(abs, again.ci)) == pytest.approx(0, abs=1e-9)


def test_where_problems_say_the_same_it_is_students_test_of_the_seeds():
    of_seeds = np.array([0.1, 0.3, 0.2, 0.15])
    found = crossed(np.repeat(of_seeds[:, None], 50, axis=1))
    assert found.p_value == pytest.approx(ttest_1samp(of_seeds, 0).pvalue, rel=1e-6)
    assert found.problem_sd == pytest.approx(0, abs=1e-9)
    assert found.seed_sd == pytest.approx(of_seeds.std(ddof=1))


def test_where_seeds_say_the_same_it_is_students_test_of_the_problems():
    of_problems = np.random.default_rng(0).standard_normal(40)
    found = crossed(np.repeat(of_problems[None], 3, axis=0))
    assert found.p_value == pytest.approx(ttest_1samp(of_problems, 0).pvalue, rel=1e-6)
    assert found.seed_sd == pytest.approx(0, abs=1e-7)
    assert found.problem_sd == pytest.approx(of_problems.std(ddof=1))


@pytest.mark.parametrize(("value", "p_value"), [(0.0, 1.0), (1.0, 2 * 0.5**10), (-1.0, 2 * 0.5**10)])
def test_answers_that_never_differ_are_no_certainty(value, p_value):
    found = crossed(np.full((3, 10), value))
    assert found.p_value == pytest.approx(p_value) and found.se == pytest.approx(0)
    assert found.ci[1] - found.mean == pytest.approx(1 - 0.05**0.1)  # what 10 problems can have missed


def test_simulated_answers_have_the_noise_that_was_asked_for():
    noise, rng = Noise(seed_sd=0.03, disagree=0.3, lasting=0.4, accuracy=0.7), np.random.default_rng(0)
    shares = copula(noise)
    found, accuracy, differ = [], [], []
    for _ in range(300):
        y = simulate([0.0, 0.0], noise, 6, 200, rng, shares)
        accuracy.append(y.mean())
        differ.append((y[0] != y[1]).mean())
        one = crossed(y[1] - y[0])
        found.append((one.seed_sd**2, one.problem_sd**2, one.rest_sd**2))
    of_seeds, of_problems, rest = np.mean(found, axis=0)
    wanted = noise.variances
    assert np.mean(accuracy) == pytest.approx(0.7, abs=0.01) and np.mean(differ) == pytest.approx(0.3, abs=0.01)
    assert of_seeds == pytest.approx(wanted[0], rel=0.15)
    assert of_problems == pytest.approx(wanted[1], rel=0.1) and rest == pytest.approx(wanted[2], rel=0.05)


def test_more_disagreement_than_chance_allows_is_refused():
    with pytest.raises(ValueError, match=r"differ on 0\.320"):
        copula(Noise(accuracy=0.8, disagree=0.4))


def test_power_grows_with_all_that_should_help_and_plans_meet_their_goal():
    noise = Noise()
    assert power(0.05, noise, 4, 500) < power(0.05, noise, 8, 500) < power(0.05, noise, 8, 2000)
    assert power(0.1, noise, 4, 500, 0.05 / 3) < power(0.1, noise, 4, 500)
    for effect in (0.08, 0.15):
        n = seeds_needed(effect, noise, 400)
        assert power(effect, noise, n, 400) >= 0.8 > power(effect, noise, n - 1, 400)
        n = problems_needed(effect, noise, 6)
        assert power(effect, noise, 6, n) >= 0.8 > power(effect, noise, 6, n - 1)
    assert seeds_needed(0.01, noise, 100) is None  # the problems alone vary more
    assert problems_needed(0.02, Noise(seed_sd=0.05), 3) is None  # and here the seeds


def test_power_is_the_normal_test_where_seeds_are_many_and_problems_all_there_is():
    noise = Noise(seed_sd=0.0, disagree=0.3, lasting=1.0)
    deviation = math.sqrt(0.3 / 500)
    assert power(0.06, noise, 64, 500) == pytest.approx(norm.sf(1.96 - 0.06 / deviation), abs=0.01)


def test_power_is_what_simulated_studies_find():
    noise, rng = Noise(0.02, 0.2, 0.3, 0.7), np.random.default_rng(3)
    shares, hits = copula(noise), 0
    for _ in range(200):
        y = simulate([0.0, 0.1], noise, 4, 300, rng, shares)
        hits += decide(y[0], {"b": y[1]})["b"].sign == 1
    assert hits / 200 == pytest.approx(power(0.1, noise, 4, 300), abs=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("name", study_errors.MIXES)
def test_no_mix_of_noise_gives_more_false_winners_than_allowed(name):
    """400 studies without a difference: at 5 % there would be 20, and 33 or more once in 200 times."""
    found = study_errors.rates(*study_errors.MIXES[name], 400)
    assert found["shipped"] <= 32 / 400
    assert found["found"] >= found["predicted"] - 0.07


@pytest.mark.slow
def test_a_bootstrap_is_wrong_more_often_where_seeds_are_the_noise():
    found = study_errors.rates(*study_errors.MIXES["seeds alone"], 200)
    assert found["bootstrap"] > 0.1 > found["shipped"]


def test_the_plan_looks_through_what_it_says(monkeypatch):
    monkeypatch.setattr(module, "MOST_SEEDS", 3)
    assert seeds_needed(0.05, Noise(), 400) is None
