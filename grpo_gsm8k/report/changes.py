"""Before and after, with the 95 % interval of the change: between two stages, two validations, the ends of a curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_gsm8k.errors import UserError
from grpo_gsm8k.evals.compare import against
from grpo_gsm8k.evals.stats import difference_interval
from grpo_gsm8k.report.read import Problems, Run, by_problem, read_lines, validations
from grpo_gsm8k.report.words import number, pair
from grpo_gsm8k.runs.diagnosis import WINDOW, end_error, ends

Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Change:
    """A quantity before and after, and the 95 % interval of the difference.

    Attributes:
        paired: whether the interval comes from the same problems, one by one.
        ratio: `after / before` with its interval; None where the start is not above its noise.
    """

    before: float
    after: float
    low: float
    high: float
    paired: bool = False
    ratio: tuple[float, float, float] | None = None

    @property
    def size(self) -> float:
        """The difference."""
        return self.after - self.before

    @property
    def clear(self) -> bool:
        """Whether the interval excludes no change at all."""
        return self.low > 0 or self.high < 0

    @property
    def still(self) -> bool:
        """Whether nothing changed, and nothing varies."""
        return self.low == self.high == 0


@dataclass(frozen=True)
class Validated:
    """The first and the last validation of a training run.

    Attributes:
        metric: `val/accuracy`, or `val/reward` for a task without right answers.
        steps: of the first and of the last.
        count: validations in all.
        best: the highest score, and its step.
        fall: from the best to the last; None where the best is the last.
    """

    metric: str
    n: float | None
    steps: tuple[int, int]
    count: int
    change: Change | None  # None where no intervals were recorded
    before: float
    after: float
    best: tuple[float, int]
    fall: Change | None


def over_steps(values: Sequence[float]) -> Change | None:
    """From the first to the last tenth of a curve; the interval is by the noise between its steps."""
    if len(values) < WINDOW:
        return None
    (before, after), reach = ends(values), Z * end_error(values)
    half = reach * math.sqrt(2)
    return Change(before, after, after - before - half, after - before + half, ratio=_ratio(before, after, reach))


def _ratio(before: float, after: float, reach: float) -> tuple[float, float, float] | None:
    """`after / before` with Fieller's interval, which holds 1 where that of the difference holds 0.

    None where the start is not above its own noise.
    """
    known = before * before - reach * reach
    if before <= 0 or known <= 0:
        return None
    product = before * after
    root = math.sqrt(max(0.0, product * product - known * (after * after - reach * reach)))
    return after / before, (product - root) / known, (product + root) / known


def paired_change(a: Problems, b: Problems) -> Change | None:
    """Between two evaluations of the same problems; None where they are of others."""
    if not a or not b:
        return None
    try:
        found = against(a, b, "the other")
    except UserError:
        return None
    return Change(found.accuracy_a, found.accuracy_b, *found.ci95, paired=True)


def unpaired_change(
    before: float, ci_before: tuple[float, float] | None, after: float, ci_after: tuple[float, float] | None
) -> Change | None:
    """Between two scores that carry their own intervals; None without these."""
    if not ci_before or not ci_after:
        return None
    return Change(before, after, *difference_interval(before, ci_before, after, ci_after))


def stage_change(run: Run, first: Mapping[str, Any], last: Mapping[str, Any]) -> Change | None:
    """Between two stages: as pipeline.json compares them, else paired by their answers, else by their intervals."""
    names = (first.get("name"), last.get("name"))
    paired = next((c for c in run.comparisons if (c.get("a"), c.get("b")) == names), None)
    key = "accuracy" if number(first.get("accuracy")) else "reward"
    before, after = float(first[key]), float(last[key])
    if key == "accuracy":
        if paired and (ci := pair(paired["ci95"])):
            return Change(before, after, *ci, paired=True)
        a, b = (by_problem(run.evals.get(str(name), [])) for name in names)
        if found := paired_change(a, b):
            return found
    return unpaired_change(before, pair(first.get("ci95")), after, pair(last.get("ci95")))


def validation_change(run: Run, kind: str) -> Validated | None:
    """Between the first and the last validation of a training run; None with fewer than two."""
    rows = run.parts[kind].rows
    metric = "val/accuracy" if any(number(row.get("val/accuracy")) for row in rows) else "val/reward"
    scored = [row for row in rows if number(row.get(metric))]
    if len(scored) < 2:
        return None
    first, last = scored[0], scored[-1]
    best = max(scored, key=lambda row: row[metric])
    kept = validations(run, kind) if metric == "val/accuracy" else {}

    def between(a: Mapping[str, float], b: Mapping[str, float]) -> Change | None:
        answers = [_answers(run, kind, kept, row) for row in (a, b)]
        intervals = [pair([row.get("val/ci_low"), row.get("val/ci_high")]) for row in (a, b)]
        return paired_change(*answers) or unpaired_change(a[metric], intervals[0], b[metric], intervals[1])

    return Validated(
        metric=metric,
        n=last.get("val/n"),
        steps=(int(first["step"]), int(last["step"])),
        count=len(scored),
        change=between(first, last),
        before=first[metric],
        after=last[metric],
        best=(best[metric], int(best["step"])),
        fall=between(best, last) if best[metric] > last[metric] else None,
    )


def _answers(run: Run, kind: str, kept: Mapping[int, Any], row: Mapping[str, float]) -> Problems:
    """The graded answers of the validation that a row of the metrics reports."""
    path = kept.get(int(row["step"]))
    return by_problem(read_lines(path, run.notes, run.path, f"{kind}/evals/")) if path else {}
