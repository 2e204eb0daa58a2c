"""Diversity metrics of sampled groups: does the policy still explore, and does it repeat itself?

They drop when sampling collapses: all completions of a group are equal, or one phrase repeats. They use token ids
within a group or a completion, so they do not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

Tokens = Sequence[int]
REPEATED = 4  # length of the n-grams for counting repetition


def diversity(groups: Sequence[Sequence[Tokens]]) -> dict[str, float]:
    """Metrics of completions grouped by prompt: means over groups, or over completions.

    distinct_1, distinct_2  distinct n-grams of a group, as a share of all of it (arXiv 1510.03055 sec. 5)
    unique_frac             distinct completions of a group, as a share of it
    repeated_4grams         share of a completion's 4-grams that it has written before (arXiv 1908.04319 sec. 6)
    """
    completions = [tokens for group in groups for tokens in group]
    repeated = [1 - share for tokens in completions if (share := distinct([tokens], REPEATED)) is not None]
    found = {
        **{f"distinct_{n}": [d for group in groups if (d := distinct(group, n)) is not None] for n in (1, 2)},
        "unique_frac": [len({tuple(tokens) for tokens in group}) / len(group) for group in groups],
        f"repeated_{REPEATED}grams": repeated,
    }
    return {f"diversity/{name}": fmean(values) for name, values in found.items() if values}


def distinct(group: Sequence[Tokens], n: int) -> float | None:
    """Distinct n-grams as a share of all; None if no completion is long enough."""
    grams = [tuple(tokens[i : i + n]) for tokens in group for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
