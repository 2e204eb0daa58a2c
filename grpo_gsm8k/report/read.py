"""What a run directory holds, read for the report. Knows files, no markup.

A run that is still going or was killed is read as far as it went; what is missing or broken becomes a note.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from grpo_gsm8k.errors import RunDirError
from grpo_gsm8k.evals.accuracy import grouped
from grpo_gsm8k.evals.stats import rate_interval
from grpo_gsm8k.report.panels import TIMES, Curves
from grpo_gsm8k.report.words import LARGEST, STAGES, label, number, pair

TRAINING = ("sft", "ei", "grpo")


@dataclass(frozen=True)
class Run:
    """What was found in one directory: the stages of a pipeline, or one training run."""

    path: Path
    summary: dict[str, Any]  # pipeline.json
    parts: dict[str, Curves]  # sft | ei | grpo -> its metrics
    folders: dict[str, Path]  # sft | ei | grpo -> its run directory
    evals: dict[str, list[dict[str, Any]]]
    notes: list[str] = field(default_factory=list)

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The evaluated stages in order; where pipeline.json lacks one, counted from its eval rows."""
        listed = [s for s in _dicts(self.summary.get("stages")) if number(s.get("accuracy")) and "name" in s]
        known = {s.get("name") for s in listed}
        graded = {name: rows for name, rows in self.evals.items() if any(_graded(row) for row in rows)}
        counted = [_count(name, rows) for name, rows in graded.items() if name not in known]
        order = list(STAGES)
        return sorted(listed + counted, key=lambda s: order.index(s["name"]) if s["name"] in order else 99)

    @property
    def rewarded(self) -> list[dict[str, Any]]:
        """The evaluated stages of a task without right answers, which have a mean reward instead of an accuracy."""
        listed = _dicts(self.summary.get("stages"))
        return [s for s in listed if "name" in s and number(s.get("reward")) and not number(s.get("accuracy"))]

    @cached_property
    def config(self) -> dict[str, object]:
        """Every setting as `stage.name`, the same for a stage of a pipeline and for a run of that stage alone."""
        flat: dict[str, object] = {}

        def walk(prefix: str, value: object) -> None:
            if isinstance(value, dict):
                for key, inner in value.items():
                    walk(f"{prefix}.{key}", inner)
            else:
                flat[prefix] = value

        for kind, folder in self.folders.items():
            for table, settings in read_config(folder, self.notes, self.path).items():
                walk(kind if table == kind else f"{kind}.{table}", settings)
        return flat

    def first_setting(self, name: str) -> str:
        """A setting in the first stage that has one; "" without."""
        values = (self.config.get(f"{kind}.{name}") for kind in self.folders)
        return str(next((value for value in values if value not in (None, "")), ""))

    @property
    def comparisons(self) -> list[dict[str, Any]]:
        """The paired comparisons between stages."""
        return [c for c in _dicts(self.summary.get("comparisons")) if pair(c.get("ci95"))]


def _dicts(value: object) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _graded(row: Mapping[str, Any]) -> bool:
    """Whether a row of an evaluation is right or wrong; one without the key is wrong."""
    return row.get("correct", False) is not None


def _count(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    def share(key: str, value: object) -> float:
        return sum(1 for row in rows if row.get(key) == value) / len(rows)

    tokens = [row["tokens"] for row in rows if isinstance(row.get("tokens"), int)]
    outcomes: dict[str, list[bool]] = {}
    for row in rows:
        outcomes.setdefault(str(row.get("id")), []).append(row.get("correct") is True)
    return {
        "name": name,
        "accuracy": share("correct", True),
        "ci95": list(rate_interval(list(outcomes.values()))),
        "n": len(rows),
        "format_accuracy": share("format_ok", True),
        "truncated": share("finish_reason", "length"),
        "mean_tokens": sum(tokens) / len(tokens) if tokens else None,
        "weights_sha256": rows[0].get("weights_sha256"),
    }


def read_run(path: Path) -> Run:
    """Everything the page needs from one directory.

    Raises:
        RunDirError: there is no such directory, or no run wrote it.
    """
    if not path.is_dir():
        raise RunDirError(f"{path}: no such directory; give the directory that a run wrote")
    notes: list[str] = []
    summary = _read_json(path / "pipeline.json", path, notes)
    notes += [
        f"{entry.relative_to(path).as_posix()} is a link out of the run directory and is not followed."
        for entry in sorted(path.rglob("*"))
        if entry.is_symlink() and "wandb" not in entry.parts and not is_inside(entry, path)
    ]
    folders = {name: path / name for name in TRAINING if _is_run(path / name) and is_inside(path / name, path)}
    evals = {f.stem: read_lines(f, notes, path) for f in sorted(path.glob("evals/*.jsonl")) if f.stem in STAGES}
    if not (folders or evals or (path / "pipeline.json").exists()):
        if not _is_run(path):
            raise RunDirError(f"{path}: not a run directory: neither pipeline.json nor metrics.jsonl is in it")
        curves = _read_curves(path, notes, path)
        kind = _kind(curves)
        return Run(path, {}, {kind: curves}, {kind: path}, {}, notes)
    parts = {name: _read_curves(folder, notes, path, f"{name}/") for name, folder in folders.items()}
    run = Run(path, summary, parts, folders, evals, notes)
    seen = {s["name"] for s in [*run.stages, *run.rewarded]}
    skipped = {"ei"} if run.rewarded else set()  # it keeps what is right, and nothing is
    absent = [label for name, label in STAGES.items() if name not in seen | skipped]
    if absent:
        notes.append(f"No evaluation yet of {', '.join(absent)}: the run was stopped before, or is still going.")
    for stage in run.stages:
        rows = evals.get(stage["name"], [])
        if not rows:
            notes.append(f"evals/{stage['name']}.jsonl is missing, so its answers are not shown.")
        elif stage.get("weights_sha256") not in (None, rows[0].get("weights_sha256")):
            notes.append(f"evals/{stage['name']}.jsonl was written by other weights than pipeline.json names.")
    return run


def _is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").is_file() or (path / "config.toml").is_file()


def _kind(curves: Curves) -> str:
    names = curves.names()
    if any(n.startswith(("progress/distill", "distill/")) for n in names):
        return "distill"
    if any(n.startswith(("progress/grpo", "groups/", "reward/")) for n in names):
        return "grpo"
    return "ei" if any(n.startswith(("ei/", "progress/ei")) for n in names) else "sft"


def read_text(path: Path, root: Path) -> str:
    """A file's text, "" without one, and for a link out of the run directory `root`: its target is not ours to show."""
    return path.read_text("utf-8", errors="replace") if path.is_file() and is_inside(path, root) else ""


def is_inside(path: Path, root: Path) -> bool:
    """Whether a path ends below `root`, whatever links it goes through."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a circle of links
        return False


def _read_json(path: Path, root: Path, notes: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path, root) or "{}")
    except (ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({error}); shown without it.")
        return {}
    return value if isinstance(value, dict) else {}


def read_config(folder: Path, notes: list[str], root: Path) -> dict[str, Any]:
    """The tables of a run's config.toml; none where it is absent or broken."""
    try:
        return tomllib.loads(read_text(folder / "config.toml", root))
    except (ValueError, RecursionError):
        notes.append(f"{folder.name}/config.toml cannot be read.")
        return {}


def read_lines(path: Path, notes: list[str], root: Path, where: str = "") -> list[dict[str, Any]]:
    """The objects in a JSONL file; lines that are none are counted in `notes`."""
    rows, broken = [], 0
    for line in read_text(path, root).splitlines():
        try:
            row = json.loads(line or "null")
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            broken += 1
    if broken:
        notes.append(f"{where}{path.name}: {broken} unreadable line{'s'[: broken > 1]} skipped.")
    return rows


def _read_curves(folder: Path, notes: list[str], root: Path, where: str = "") -> Curves:
    steps: dict[float, dict[str, float]] = {}
    for row in read_lines(folder / "metrics.jsonl", notes, root, where):
        numbers = {k: _drawable(v) for k, v in row.items() if isinstance(v, int | float)}
        if 0 <= numbers.get("step", math.nan) < 1e15:
            steps.setdefault(numbers["step"], {}).update(numbers)  # a resumed step, or a late evaluation
    bad = sum(not math.isfinite(v) for row in steps.values() for v in row.values())
    if bad:
        notes.append(f"{where}metrics.jsonl: {bad} values are NaN, infinite or beyond 1e100, and not drawn.")
    if not steps:
        notes.append(f"{where}metrics.jsonl has no steps yet.")
    return Curves(tuple(_derive(steps[step]) for step in sorted(steps)))


def _drawable(value: float) -> float:
    """A number as it is; NaN for one so large that sums of it, or a figure's axis, would overflow."""
    return float(value) if -LARGEST < value < LARGEST else math.nan


def _derive(row: dict[str, float]) -> dict[str, float]:
    """The row with what follows from it: mixed groups, and time that no part accounts for."""
    if "groups/all_right_frac" in row and "groups/all_wrong_frac" in row:
        row["groups/mixed_frac"] = 1 - row["groups/all_right_frac"] - row["groups/all_wrong_frac"]
    if "time/total" in row:
        named = sum(row.get(f"time/{name}", 0.0) for name in TIMES)
        row["time/other"] = max(0.0, row["time/total"] - named)
    return row


Problems = dict[str, list[dict[str, Any]]]  # problem id -> its graded completions


@dataclass(frozen=True)
class Evaluated:
    """An evaluation that kept its answers."""

    title: str  # "GRPO, test" or "GRPO, validation, step 20"
    stage: str
    problems: Problems


def evaluations(run: Run) -> list[Evaluated]:
    """The evaluations that two runs can be compared on: the test of the last stage, and each part's last validation."""
    names = [s["name"] for s in run.stages if run.evals.get(s["name"])][-1:]
    found = [Evaluated(f"{label(name)}, test", name, by_problem(run.evals[name])) for name in names]
    for kind in reversed(list(run.folders)):
        if steps := validations(run, kind):
            step, path = list(steps.items())[-1]
            rows = read_lines(path, run.notes, run.path, f"{kind}/evals/")
            found.append(Evaluated(f"{label(kind)}, validation, step {step:,}", kind, by_problem(rows)))
    return [one for one in found if one.problems]


def validations(run: Run, kind: str) -> dict[int, Path]:
    """Step -> the answers of that validation, for those of a training run that were kept."""
    kept = sorted(run.folders[kind].glob("evals/step_*.jsonl"))
    return {int(path.stem.removeprefix("step_")): path for path in kept if path.stem.removeprefix("step_").isdecimal()}


def by_problem(rows: Sequence[dict[str, Any]]) -> Problems:
    """The rows that are graded right or wrong, by their problem."""
    return grouped([r for r in rows if isinstance(r.get("id"), str) and isinstance(r.get("correct"), bool)])
