"""How much worse a model is on rewritten problems than on the originals, paired by the original problem."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from grpo_gsm8k.evals.accuracy import Row, accuracies, grouped
from grpo_gsm8k.evals.stats import paired_drop
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.tasks.base import seed_id


def drops_of(results: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """The drop of each set whose rows have a `seed_id`, against the set that holds most of their originals.

    Args:
        results: name of a set → its results.

    Returns:
        for each such set the fields of `stats.Drop`, the names of both sets, `unpaired`: how many originals were not
        evaluated, and `by_perturbation`: the same fields for each kind of change, where the rows name it.
    """
    plain = {name: _originals(rows) for name, rows in results.items() if not any("seed_id" in row for row in rows)}
    found = []
    for name, rows in results.items():
        seeds = {row["seed_id"] for row in rows if "seed_id" in row}
        against = max(plain, key=lambda other: len(seeds & plain[other].keys()), default="")
        if not seeds:
            continue
        if not against or not seeds & plain[against].keys():
            say(
                f"{name}: none of its originals were evaluated, so there is no drop; add its seeds.jsonl to --eval_path"
            )
            continue
        kinds = sorted({row["perturbation"] for row in rows if "perturbation" in row})
        parts = {kind: [row for row in rows if row.get("perturbation") == kind] for kind in kinds}
        found.append(
            {
                "set": name,
                "originals": against,
                **_drop(plain[against], rows),
                "unpaired": len(seeds - plain[against].keys()),
                "by_perturbation": {
                    kind: _drop(plain[against], part)
                    for kind, part in parts.items()
                    if any(row["seed_id"] in plain[against] for row in part)
                },
            }
        )
    return found


def _originals(rows: Sequence[Row]) -> dict[str, float]:
    """`seed_id` of each problem → the accuracy on it."""
    by_id = grouped(rows)
    return {seed_id(str(by_id[key][0]["question"])): value for key, value in accuracies(by_id).items()}


def _drop(originals: Mapping[str, float], rows: Sequence[Row]) -> dict[str, Any]:
    by_id, variants = grouped(rows), defaultdict[str, list[float]](list)
    for key, value in accuracies(by_id).items():
        variants[by_id[key][0]["seed_id"]].append(value)
    return asdict(paired_drop(originals, variants))
