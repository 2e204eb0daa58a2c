"""Statistics of accuracies: intervals for one, paired tests for two, and the number of problems that a gain needs.

The unit is the problem: completions of the same problem are not independent, so everything but Wilson's interval
resamples, flips or counts problems.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from grpo_gsm8k.errors import UserError
from grpo_gsm8k.repro import derive_seed

RESAMPLES = 10_000
LEVEL, POWER = 0.05, 0.8  # two-sided
FINEST = 1_000  # steps in a difference of 1, see `sign_flip`

# ------------------------------------------------------------------------------------------------ one accuracy


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion."""
    from scipy.stats import binomtest

    interval = binomtest(right, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean, resampling the values; the same every time.

    Args:
        weights: one a value, for a weighted mean: `sum(values * weights) / sum(weights)`.

    If all values are equal, the interval is a point: the data shows no variation.
    """
    import numpy as np

    pairs = np.column_stack([values, np.ones(len(values)) if weights is None else weights]).astype(float)
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)  # resampling n values is a multinomial over the kinds
    rng = np.random.default_rng(derive_seed("bootstrap", len(values)))
    drawn = rng.multinomial(len(values), counts / len(values), size=RESAMPLES)  # (RESAMPLES, kinds)
    sums, totals = drawn @ (kinds[:, 0] * kinds[:, 1]), drawn @ kinds[:, 1]
    low, high = np.quantile(sums / totals, [0.025, 0.975])
    return float(low), float(high)


def rate_interval(outcomes: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """95 % interval of the share of true outcomes, given a problem's outcomes each.

    Wilson's for one completion a problem; for several see `share_interval`.
    """
    if all(len(one) == 1 for one in outcomes):
        return wilson(sum(one[0] for one in outcomes), len(outcomes))
    return share_interval([sum(one) / len(one) for one in outcomes], [len(one) for one in outcomes])


def share_interval(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """95 % interval of the mean of shares, one a problem: a bootstrap over problems.

    Where all are equal, as with a model that gets nothing right, a bootstrap would claim certainty. There it is
    Wilson's, each problem counted as one trial: too wide rather than too narrow, whatever varies within a problem.
    """
    if len(set(values)) > 1:
        return bootstrap_mean(values, weights)
    n, right = len(values), values[0] * len(values)
    return wilson(math.floor(right), n)[0], wilson(math.ceil(right), n)[1]


def difference_interval(
    a: float, ci_a: tuple[float, float], b: float, ci_b: tuple[float, float]
) -> tuple[float, float]:
    """95 % interval of `b - a`, two independent estimates with their own intervals.

    Newcombe's hybrid score interval where these are Wilson's (1998, Statist. Med. 17:873, method 10). For scores of
    the same problems it is too wide, since what the problems have in common does not cancel: pair them, see `compare`.
    """
    low = math.hypot(b - ci_b[0], ci_a[1] - a)
    high = math.hypot(ci_b[1] - b, a - ci_a[0])
    return b - a - low, b - a + high


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased chance that one of k completions is right, given `right` of n (arXiv 2107.03374 eq. 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def maj_at_k(votes: Sequence[tuple[Hashable | None, bool]], k: int) -> float:
    """Chance that the most frequent answer of k completions is right (self-consistency, arXiv 2203.11171).

    Args:
        votes: (answer, whether it is right) of each completion; the answer None is no vote.

    The mean over disjoint blocks of k; a tie counts the share of right answers in it, as a fair coin would.
    """
    blocks = [votes[i : i + k] for i in range(0, len(votes) - k + 1, k)]
    return sum(_majority(block) for block in blocks) / len(blocks)


def _majority(votes: Sequence[tuple[Hashable | None, bool]]) -> float:
    counts = Counter(vote for vote in votes if vote[0] is not None)
    leaders = [right for (_, right), count in counts.items() if count == max(counts.values())]
    return sum(leaders) / len(leaders) if leaders else 0.0


@dataclass(frozen=True)
class Spread:
    """Sources of noise of an accuracy, as standard deviations of the accuracy with one seed.

    Attributes:
        seeds: observed deviation between seeds on these problems; None for a single seed.
        sampling: the same as predicted from the completions per problem; None for one completion per problem.
        problems: deviation between sets of problems of this size, without the sampling noise.
    """

    seeds: float | None
    sampling: float | None
    problems: float | None


def spread(right_S_P: Sequence[Sequence[int]], k: int) -> Spread:
    """Separate the two sources of noise by the law of total variance (arXiv 2411.00640 sec. 3).

    Args:
        right_S_P: right completions, of k, of each problem with each seed.
    """
    import numpy as np

    right = np.asarray(right_S_P, dtype=float)  # (seeds, problems)
    seeds, problems = right.shape
    n = seeds * k
    between = float(np.std(right.mean(1) / k, ddof=1)) if seeds > 1 else None
    if n < 2 or problems < 2:
        return Spread(between, None, None)
    share = right.sum(0) / n
    within = share * (1 - share) * n / (n - 1)  # unbiased variance of one completion's verdict, each problem
    across = max(0.0, float(share.var(ddof=1) - (within / n).mean()))
    return Spread(between, math.sqrt(within.mean() / k / problems), math.sqrt(across / problems))


# ------------------------------------------------------------------------------------------------ two accuracies


@dataclass(frozen=True)
class Comparison:
    """B against A on the same problems.

    Attributes:
        difference: B - A in accuracy; `ci95` is a paired bootstrap's over problems.
        p_value, p_mid: see `sign_flip`; exact McNemar and its mid-p variant for one completion a problem.
        significant: `p_mid` (Holm-corrected, where several are compared) is below 5 %.
        n: number of problems; B is better on `won` of them and worse on `lost`.
        gain: the gain of `problems_needed`: the claimed one, or the observed difference.
        problems_needed: see `problems_needed`; None for a gain of 0.
    """

    difference: float
    ci95: tuple[float, float]
    p_value: float
    n: int
    won: int
    lost: int
    accuracy_a: float
    accuracy_b: float
    p_mid: float
    significant: bool
    gain: float
    problems_needed: int | None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def compare(a: Mapping[str, float], b: Mapping[str, float], gain: float | None = None) -> Comparison:
    """Paired comparison of two results, problem id → accuracy on it.

    Raises:
        UserError: when the two are not over the same problems.
    """
    if a.keys() != b.keys():
        odd = [(name, keys) for name, keys in (("A", a.keys() - b), ("B", b.keys() - a)) if keys]
        sides = ", ".join(f"{len(keys)} only in {name} ({min(keys)!r})" for name, keys in odd)
        raise UserError(f"cannot compare, these are not the same problems: {sides}, {len(a.keys() & b)} in both")
    differences = [b[key] - a[key] for key in sorted(a)]
    n, squares = len(differences), sum(d * d for d in differences)
    mean = sum(differences) / n
    p_value, p_mid = sign_flip(differences)
    claimed = mean if gain is None else gain
    return Comparison(
        difference=mean,
        ci95=bootstrap_mean(differences),
        p_value=p_value,
        n=n,
        won=sum(d > 0 for d in differences),
        lost=sum(d < 0 for d in differences),
        accuracy_a=sum(a.values()) / n,
        accuracy_b=sum(b.values()) / n,
        p_mid=p_mid,
        significant=p_mid < LEVEL,
        gain=claimed,
        problems_needed=problems_needed(claimed, squares / n),
    )


@dataclass(frozen=True)
class Drop:
    """Accuracy on original problems against that on rewritten forms of them.

    Attributes:
        drop: `original` - `perturbed`; positive where the rewritten problems are harder for the model.
        ci95: its interval, a paired bootstrap over the originals: forms of one problem are not independent.
        original, perturbed: accuracies over the paired originals, each of which counts the same, however many forms
            it has.
        seeds: number of paired originals; `problems` of their forms.
    """

    drop: float
    ci95: tuple[float, float]
    original: float
    perturbed: float
    seeds: int
    problems: int


def paired_drop(originals: Mapping[str, float], variants: Mapping[str, Sequence[float]]) -> Drop:
    """Pair each original with its rewritten forms.

    Args:
        originals: id of an original → accuracy on it.
        variants: the same id → accuracy on each form. What has no partner is left out.
    """
    paired = sorted(originals.keys() & variants.keys())
    means = [sum(variants[key]) / len(variants[key]) for key in paired]
    before = [originals[key] for key in paired]
    differences = [a - b for a, b in zip(before, means, strict=True)]
    return Drop(
        drop=sum(differences) / len(paired),
        ci95=bootstrap_mean(differences),
        original=sum(before) / len(paired),
        perturbed=sum(means) / len(paired),
        seeds=len(paired),
        problems=sum(len(variants[key]) for key in paired),
    )


def sign_flip(differences: Sequence[float]) -> tuple[float, float]:
    """Two-sided p of a mean difference of 0: exact, and mid-p.

    If A and B are equally good, each problem's difference could as well have the other sign. The exact p is the
    share of all 2^n choices of signs with a sum at least as far from 0; for one completion a problem that is the
    exact McNemar test. It never rejects too often, and with few differing problems too seldom: of null pairs at
    5 % it rejects 4.5 % with 500 of them, 4.0 % with 100, 3.0 % with 26, 2.2 % with 10 (the mean over tables of 512
    to 1,319 problems). Counting the sums that are just as far by half gives the mid-p (Fagerland, Lydersen and
    Laake 2013, doi 10.1186/1471-2288-13-91): 5.0, 4.9, 4.5 and 4.1 %. So the exact p is what is quoted, and the
    mid-p what decides.

    Differences that have no common step down to 1 / `FINEST` are rounded to it; the test stays exact for those.
    With unlike numbers of completions in A and B the signs are exchangeable in the limit only.
    """
    import numpy as np

    steps = math.lcm(*(Fraction(d).limit_denominator(FINEST).denominator for d in differences))
    units = [round(d * min(steps, FINEST)) for d in differences]
    sizes = [abs(unit) for unit in units if unit]
    if not sizes:
        return 1.0, 1.0
    total = sum(sizes)
    null = np.ones(1)  # probability of each sum so far, from the smallest to the largest
    for size in sizes:
        more = np.zeros(len(null) + 2 * size)
        more[: len(null)] = null / 2
        more[2 * size :] += null / 2
        null = more
    far, distance = abs(sum(units)), np.abs(np.arange(-total, total + 1))
    beyond, level = float(null[distance > far].sum()), float(null[distance == far].sum())
    return min(1.0, beyond + level), min(1.0, beyond + level / 2)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected for their number by Holm's step-down method (1979, Scand. J. Statist. 6:65)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def problems_needed(gain: float, squares: float) -> int | None:
    """How many problems show this gain with 80 % power in a two-sided test at 5 %; None for a gain of 0.

        n = (z_0.975 sqrt(s) + z_0.8 sqrt(s - gain^2))^2 / gain^2

    Args:
        gain: the true difference in accuracy, 0.01 for a point.
        squares: s, the mean squared difference of a problem; for one completion a problem the share of problems
            on which the two differ, and the formula is that for McNemar's test (Connor 1987, doi 10.2307/2531961).
            For several it is the same argument, the variance of a paired difference (arXiv 2411.00640 sec. 5).
            No gain can come from fewer differing problems than itself: s is at least |gain|.
    """
    from scipy.stats import norm

    if gain == 0:
        return None
    s = max(squares, abs(gain))
    z_level, z_power = norm.ppf(1 - LEVEL / 2), norm.ppf(POWER)
    return math.ceil((z_level * math.sqrt(s) + z_power * math.sqrt(s - gain * gain)) ** 2 / gain**2)
