"""Arms compared over seeds and problems: a mixed model, its power, and simulated results to hold both to their word.

Every arm is trained once per seed, and every run answers the same problems. The difference of two arms on problem p
with seed s is

    d_sp = delta + u_s + v_p + e_sp          u, v, e random and independent

and `crossed` tests delta = 0: other seeds and other problems both count as chance. With S seeds and P problems the
mean has the variance (MS_s + MS_p - MS_e) / SP, each mean square estimated by its moments. The two parts have unlike
degrees of freedom, so each gets its own quantile of Student's t (Banerjee 1961, Calcutta Statist. Assoc. Bull. 10:61):

    reject where  SP mean^2 > t(S-1)^2 MS_s + t(P-1)^2 max(MS_p - MS_e, 0)

which keeps its level whatever the shares of the two are. What is usual does not, with the handful of seeds that a
study has: on simulated results without any difference, one approximate number of degrees of freedom (Hillis 2007,
Statist. Med. 26:596) and a bootstrap of both seeds and problems find one too often (`python -m tests.study_errors`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_gsm8k.evals.stats import LEVEL, POWER, sign_flip

MOST_SEEDS = 64  # that `seeds_needed` and `problems_needed` look through
MOST_PROBLEMS = 1_000_000
GRID = 400  # points of a distribution that `power` averages over
LEAST_P = 1e-15  # below it a p-value is not told apart


@dataclass(frozen=True)
class Crossed:
    """A mean over seeds and problems, with the chance of both in its interval.

    Attributes:
        mean: of the values; the difference in accuracy where they are differences.
        ci: interval at `level`.
        p_value: two-sided, of a true mean of 0.
        seed_sd, problem_sd, rest_sd: estimated deviations of u, v and e.
    """

    mean: float
    ci: tuple[float, float]
    p_value: float
    se: float
    seeds: int
    problems: int
    seed_sd: float
    problem_sd: float
    rest_sd: float


@dataclass(frozen=True)
class Noise:
    """What a plan assumes of results, to compute its power.

    Attributes:
        seed_sd: deviation of one arm's true accuracy between seeds.
        disagree: share of problems on which runs of two arms differ.
        lasting: part of the variance of such differences that is the same with every seed.
        accuracy: of the reference.
    """

    seed_sd: float = 0.02
    disagree: float = 0.3
    lasting: float = 0.3
    accuracy: float = 0.5

    @property
    def variances(self) -> tuple[float, float, float]:
        """Of u, v and e. The two arms' seeds count as unrelated; common random numbers can only do better."""
        return 2 * self.seed_sd**2, self.lasting * self.disagree, (1 - self.lasting) * self.disagree


def student(level: float, n: int) -> float:
    """The two-sided quantile of Student's t for a mean of n values."""
    from scipy.special import stdtrit

    return -float(stdtrit(n - 1, level / 2))


@dataclass(frozen=True)
class Squares:
    """What decides: `of_seeds` and `of_problems` are the two parts of seeds * problems * variance of the mean."""

    mean: float
    of_seeds: float
    of_problems: float
    seeds: int
    problems: int

    def bound(self, level: float) -> float:
        """How far from 0 the mean must be at this level; half the width of the interval."""
        total = sum(
            student(level, n) ** 2 * part
            for part, n in ((self.of_seeds, self.seeds), (self.of_problems, self.problems))
        )
        return math.sqrt(total / (self.seeds * self.problems))

    @property
    def p_value(self) -> float:
        """The smallest level at which the mean is beyond its bound."""
        from scipy.optimize import brentq

        if self.bound(LEAST_P) < abs(self.mean):
            return LEAST_P
        if self.mean == 0:
            return 1.0
        log_p = brentq(lambda x: self.bound(math.exp(x)) - abs(self.mean), math.log(LEAST_P), 0.0)
        return math.exp(float(log_p))


def crossed(values_S_P: Any, level: float = LEVEL) -> Crossed:
    """Fit the mixed model to values of shape (seeds, problems), at least 2 by 2.

    Where nothing varies, the exact sign-flip test over problems gives the p-value, and the interval is as wide as the
    share of problems that could have been different unseen (3 of 100).
    """
    import numpy as np

    values = np.asarray(values_S_P, dtype=float)  # (S, P)
    seeds, problems = values.shape
    mean, of_seeds, of_problems = float(values.mean()), values.mean(1), values.mean(0)
    ms_seeds = problems * float(((of_seeds - mean) ** 2).sum()) / (seeds - 1)
    ms_problems = seeds * float(((of_problems - mean) ** 2).sum()) / (problems - 1)
    rest = values - of_seeds[:, None] - of_problems[None, :] + mean
    ms_rest = float((rest**2).sum()) / ((seeds - 1) * (problems - 1))
    squares = Squares(mean, ms_seeds, max(ms_problems - ms_rest, 0.0), seeds, problems)
    se = math.sqrt((squares.of_seeds + squares.of_problems) / (seeds * problems))
    constant = se < 1e-12  # rounding, where all values are the same
    far = 1 - level ** (1 / problems) if constant else squares.bound(level)
    return Crossed(
        mean=mean,
        ci=(mean - far, mean + far),
        p_value=sign_flip([float(value) for value in of_problems])[0] if constant else squares.p_value,
        se=se,
        seeds=seeds,
        problems=problems,
        seed_sd=math.sqrt(max(ms_seeds - ms_rest, 0.0) / problems),
        problem_sd=math.sqrt(squares.of_problems / seeds),
        rest_sd=math.sqrt(ms_rest),
    )


# ------------------------------------------------------------------------------------------------ planning


def power(effect: float, noise: Noise, seeds: int, problems: int, level: float = LEVEL) -> float:
    """Chance that a true difference of `effect` is found: over the chi-square of MS_s, the rest at its mean."""
    import numpy as np
    from scipy.special import chdtri, ndtr

    of_seeds, of_problems, rest = noise.variances
    ms_seeds, lasting = problems * of_seeds + rest, seeds * of_problems
    deviation = math.sqrt((ms_seeds + lasting) / (seeds * problems))
    if deviation == 0:
        return float(effect != 0)
    drawn = ms_seeds * chdtri(seeds - 1, (np.arange(GRID) + 0.5) / GRID) / (seeds - 1)
    wide, narrow = (student(level, n) ** 2 for n in (seeds, problems))
    bounds = np.sqrt((wide * drawn + narrow * lasting) / (seeds * problems))
    return float(ndtr((abs(effect) - bounds) / deviation).mean())


def seeds_needed(effect: float, noise: Noise, problems: int, level: float = LEVEL, goal: float = POWER) -> int | None:
    """The fewest seeds that find the effect with a chance of `goal`; None where `MOST_SEEDS` do not."""
    enough = (n for n in range(2, MOST_SEEDS + 1) if power(effect, noise, n, problems, level) >= goal)
    return next(enough, None)


def problems_needed(effect: float, noise: Noise, seeds: int, level: float = LEVEL, goal: float = POWER) -> int | None:
    """The fewest problems that do, with this many seeds; None where no number does."""
    low, high = 1, 2
    while power(effect, noise, seeds, high, level) < goal:
        low, high = high, 2 * high
        if high > MOST_PROBLEMS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, noise, seeds, middle, level) >= goal else (middle, high)
    return high


# ------------------------------------------------------------------------------------------------ simulated results


@dataclass(frozen=True)
class Copula:
    """How much of a run's answer to a problem is the problem's, the arm's on that problem, and its own."""

    problem: float
    arm: float


def copula(noise: Noise) -> Copula:
    """The correlations of `simulate` at which two arms differ as the noise says.

    An answer is right where a standard normal z is below a threshold. Runs of two arms share the correlation
    `problem` of their z, two runs of an arm `problem + arm`; with Owen's T, the chance that both are right is
    Phi(h) - 2 T(h, sqrt((1 - r) / (1 + r))).

    Raises:
        ValueError: runs that have nothing in common differ less than `disagree`.
    """
    from scipy.optimize import brentq
    from scipy.special import owens_t
    from scipy.stats import norm

    accuracy, h = noise.accuracy, float(norm.ppf(noise.accuracy))

    def both_right(r: float) -> float:
        return accuracy - 2 * float(owens_t(h, math.sqrt((1 - r) / (1 + r))))

    def correlation(both: float) -> float:
        return 1.0 if both >= accuracy else float(brentq(lambda r: both_right(r) - both, 0.0, 1.0))

    most = 2 * accuracy * (1 - accuracy)
    if noise.disagree > most + 1e-9:
        raise ValueError(f"runs of accuracy {accuracy:g} differ on {most:.3f} of the problems at most")
    across = correlation(max(accuracy - noise.disagree / 2, accuracy**2))
    within = correlation(accuracy - noise.disagree * (1 - noise.lasting) / 2)
    return Copula(across, within - across)


def simulate(gains: Sequence[float], noise: Noise, seeds: int, problems: int, rng: Any, shares: Copula) -> Any:
    """Right (1) or wrong (0) answers of shape (arms, seeds, problems), made without the model that analyses them.

    Args:
        gains: of each arm's accuracy over that of the reference.
        shares: `copula(noise)`.
    """
    import numpy as np
    from scipy.stats import norm

    arms = len(gains)
    accuracy = noise.accuracy + np.asarray(gains)[:, None] + noise.seed_sd * rng.standard_normal((arms, seeds))
    threshold = norm.ppf(np.clip(accuracy, 0.001, 0.999))[:, :, None]  # (A, S, 1)
    z = math.sqrt(shares.problem) * rng.standard_normal(problems)
    z = z + math.sqrt(shares.arm) * rng.standard_normal((arms, 1, problems))
    own = math.sqrt(max(0.0, 1 - shares.problem - shares.arm))
    z = z + own * rng.standard_normal((arms, seeds, problems))
    return (z < threshold).astype(float)
