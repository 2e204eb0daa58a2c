"""Compares results files, paired over their problems: the command `compare`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_gsm8k.errors import UserError
from grpo_gsm8k.evals import stats
from grpo_gsm8k.evals.accuracy import Row, accuracies, read_rows
from grpo_gsm8k.evals.stats import LEVEL, Comparison

GAINS = (0.01, 0.02, 0.05)
Rows = Mapping[str, Sequence[Row]]  # problem id → its completions


def compare_files(paths: Sequence[Path], gain: float | None = None, examples: int = 3) -> dict[str, Any]:
    """Compare each results file with the first.

    Args:
        gain: a claimed difference in accuracy, to compute how many problems it needs; by default the observed one.
        examples: number of problems to show that B won, and that it lost.

    Returns:
        for two files the fields of `Comparison`, `needed` (gain → problems, at the spread of differences seen here)
        and `examples`; for more a list `comparisons` of such fields, with `p_holm`.

    Raises:
        UserError: fewer than two files, or files over different problems.
        DataError: a file is no results file.
    """
    if len(paths) < 2:
        raise UserError("compare needs two results files or more")
    first, *others = [read_rows(path) for path in paths]
    found = [against(first, other, path, gain) for other, path in zip(others, paths[1:], strict=True)]
    head = {"a": str(paths[0])}
    if len(paths) == 2:
        a, b = accuracies(first), accuracies(others[0])
        squares = sum((b[key] - a[key]) ** 2 for key in a) / len(a)
        needed = {str(size): stats.problems_needed(size, squares) for size in GAINS}
        shown = {"needed": needed, "examples": flips(first, others[0], examples)}
        return {**head, "b": str(paths[1]), **found[0].as_dict(), **shown}
    corrected, p_holm = corrected_for_number(found)
    rows = [
        {"b": str(path), **one.as_dict(), "p_holm": p}
        for path, one, p in zip(paths[1:], corrected, p_holm, strict=True)
    ]
    return {**head, "n": found[0].n, "accuracy_a": found[0].accuracy_a, "comparisons": rows}


def against(a: Rows, b: Rows, name: object, gain: float | None = None) -> Comparison:
    """Compare B with A.

    Raises:
        UserError: they cover different problems; `name` is the name of B.
    """
    for key in sorted(a.keys() & b.keys()):
        texts = [rows[0].get("question", rows[0].get("prompt")) for rows in (a[key], b[key])]
        if texts[0] != texts[1] or a[key][0].get("gold") != b[key][0].get("gold"):
            raise UserError(f"cannot compare with {name}: {key!r} is another problem there")
    return stats.compare(accuracies(a), accuracies(b), gain)


def corrected_for_number(found: Sequence[Comparison]) -> tuple[list[Comparison], list[float]]:
    """Comparisons with one and the same run: verdicts by Holm's correction of the mid-p, and the corrected p."""
    p_holm = stats.holm([one.p_mid for one in found])
    return [replace(one, significant=p < LEVEL) for one, p in zip(found, p_holm, strict=True)], p_holm


def flips(a: Rows, b: Rows, most: int) -> list[dict[str, Any]]:
    """Problems that B won and lost, by the size of the difference, then by a hash of the id."""
    was, now = accuracies(a), accuracies(b)

    def order(key: str) -> tuple[float, str]:
        return -abs(now[key] - was[key]), hashlib.sha256(key.encode()).hexdigest()

    won = sorted((key for key in was if now[key] > was[key]), key=order)[:most]
    lost = sorted((key for key in was if now[key] < was[key]), key=order)[:most]
    return [
        {
            "id": key,
            "flip": "won" if now[key] > was[key] else "lost",
            "question": a[key][0].get("question"),
            "gold": a[key][0].get("gold"),
            **{f"accuracy_{side}": share[key] for side, share in (("a", was), ("b", now))},
            **{f"extracted_{side}": [row.get("extracted") for row in rows[key]] for side, rows in (("a", a), ("b", b))},
        }
        for key in (*won, *lost)
    ]
