"""What may be said of an accuracy: intervals for one, paired tests for two."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from grpo_gsm8k.errors import UserError
from grpo_gsm8k.repro import derive_seed

RESAMPLES = 2000


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion."""
    from scipy.stats import binomtest

    interval = binomtest(right, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_mean(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean, resampling the values; the same every time."""
    import numpy as np

    rng = np.random.default_rng(derive_seed("bootstrap", len(values)))
    data = np.asarray(values, dtype=float)
    draws = np.array([data[rng.integers(0, len(data), len(data))].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased chance that one of k completions is right, given `right` of n (arXiv 2107.03374 eq. 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


@dataclass(frozen=True)
class Comparison:
    """B against A on the same problems; `difference` is B - A in accuracy.

    `won` problems were right only in B, `lost` only in A; `p_value` is the exact McNemar test's (for several
    completions a problem: of the sign of the per-problem difference). `ci95` is a paired bootstrap's.
    """

    difference: float
    ci95: tuple[float, float]
    p_value: float
    n: int
    won: int
    lost: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def compare(a: Mapping[str, float], b: Mapping[str, float]) -> Comparison:
    """Paired comparison of two results, problem id → accuracy on it.

    Raises:
        UserError: when the two are not over the same problems.
    """
    from scipy.stats import binomtest

    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise UserError(f"cannot compare: {len(odd)} problems are in one of the results only, {odd[0]} first")
    differences = [b[key] - a[key] for key in sorted(a)]
    won, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    p_value = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    mean = sum(differences) / len(differences)
    return Comparison(mean, bootstrap_mean(differences), p_value, len(differences), won, lost)
