"""Where two runs part: up to which step they are the same, and what differs first.

Two runs that began alike (a fork and its origin, the same command twice) log the same numbers until something differs.
The clock is left out. Where both have a hash chain, the weights are compared, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_gsm8k.errors import RunDirError
from grpo_gsm8k.report.markup import Html, section, tag
from grpo_gsm8k.report.read import Run, read_lines, read_text
from grpo_gsm8k.report.words import label
from grpo_gsm8k.runs import chain

CLOCKS = ("time/", "perf/")
SAMPLED = ("reward/", "length/", "outcome/", "groups/", "ei/")  # what depends on the completions alone
SHOWN = 3  # metrics that are named
Rows = Mapping[int, Mapping[str, Any]]


def parting(runs: Mapping[str, Run]) -> list[str]:
    """For each stage that two runs have in common, where they part; nothing for one run, or for more than two."""
    if len(runs) != 2:
        return []
    (name_a, a), (name_b, b) = runs.items()
    said = []
    for kind in a.folders.keys() & b.folders.keys():
        text = _of_stage((name_a, a, kind), (name_b, b, kind))
        said.append(f"{label(kind)}: {text}" if len(a.folders) > 1 else text)
    return sorted(said)


def parting_section(runs: Mapping[str, Run]) -> Html:
    """The same for the page."""
    said = parting(runs)
    return section("parting", "Where they part", *(tag("p", text) for text in said)) if said else Html()


def _of_stage(first: tuple[str, Run, str], second: tuple[str, Run, str]) -> str:
    names = [one[0] for one in (first, second)]
    rows_a, rows_b = (_rows(run, kind) for _, run, kind in (first, second))
    origin = _origin(*first) or _origin(*second)
    common = sorted(rows_a.keys() & rows_b.keys())
    if not common:
        return f"{origin}{names[0]} and {names[1]} have no step in common."
    weights = [_weights(run.folders[kind]) for _, run, kind in (first, second)]
    off = {step: _differing(rows_a[step], rows_b[step], *(held.get(step) for held in weights)) for step in common}
    parted = [step for step in common if off[step]]
    if not parted:
        more = ", metrics and weights" if all(weights) else ""
        return f"{origin}{_extent(common, rows_a, rows_b)} the same, bit for bit{more}."
    step, sampled = parted[0], [s for s in parted if any(name.startswith(SAMPLED) for name in off[s])]
    same = f"the same, bit for bit, up to step {step - 1}; " if step > common[0] else ""
    text = f"{origin}{names[0]} and {names[1]} are {same}step {step} is the first that differs, in {_named(off[step])}."
    if sampled and sampled[0] > step:
        text += f" What they sample is the same up to step {sampled[0] - 1}, and first differs at step {sampled[0]}."
    return text


def _rows(run: Run, kind: str) -> Rows:
    """Step → what was logged, late evaluations included."""
    rows: dict[int, dict[str, Any]] = {}
    for row in read_lines(run.folders[kind] / chain.METRICS, [], run.path):
        if isinstance(row.get("step"), int):
            rows.setdefault(row["step"], {}).update(row)
    return rows


def _differing(a: Mapping[str, Any], b: Mapping[str, Any], weights_a: str | None, weights_b: str | None) -> list[str]:
    """Names of the metrics that two rows do not share, and `the weights`."""
    names = [name for name in {**a, **b} if not name.startswith(CLOCKS) and a.get(name) != b.get(name)]
    return names + (["the weights"] if weights_a and weights_b and weights_a != weights_b else [])


def _named(names: Sequence[str]) -> str:
    shown = sorted(names, key=lambda name: (name != "loss", name))[:SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _extent(common: Sequence[int], rows_a: Rows, rows_b: Rows) -> str:
    """Which steps are compared, as the beginning of a sentence."""
    every = len(common) == len(rows_a) == len(rows_b)
    return f"All {len(common)} steps are" if every else f"The {len(common)} steps that both have are"


def _weights(folder: Path) -> dict[int, str]:
    """Step → sha256 of the weights after it, as a chain has it."""
    try:
        return {link["step"]: link["weights"] for link in chain.read(folder)[0] if link.get("weights")}
    except RunDirError:  # a chain of another format
        return {}


def _origin(name: str, run: Run, kind: str) -> str:
    """What `fork.json` says, as a sentence; "" for a run that is no fork."""
    folder = run.folders[kind]
    try:
        fork = json.loads(read_text(folder / "fork.json", run.path) or "{}")
        changed = [f"{key} {before} → {now}" for key, (before, now) in fork["changed"].items()]
        return f"{name} was forked at step {fork['at']} with {', '.join(changed) or 'nothing changed'}. "
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
