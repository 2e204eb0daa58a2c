"""Pre-registration: which plan a study began with, and what was changed in it after results existed.

`plan.toml` in the study's folder is the plan that was registered last, byte by byte; `plans/` keeps every earlier one,
and `registration.json` when each came and how many results there were by then. A plan that changes before the first
result simply takes the place of the one before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpo_gsm8k.errors import RunDirError
from grpo_gsm8k.runs.files import read_json, write_atomic, write_json
from grpo_gsm8k.study.plan import Plan, flat_tables

FILE, PLAN = "registration.json", "plan.toml"
ABSENT = "–"


@dataclass(frozen=True)
class Registered:
    """A plan that a study was run with.

    Attributes:
        results: how many runs were evaluated when it came.
        changed: what it says otherwise than the plan before it.
    """

    sha256: str
    at: str
    results: int
    changed: list[str]


def registered(folder: Path) -> list[Registered]:
    """The plans of a study, oldest first; empty where it has not begun."""
    path = folder / FILE
    return [Registered(**row) for row in read_json(path)["plans"]] if path.is_file() else []


def changes(folder: Path) -> list[Registered]:
    """The plans that came when there were results already."""
    return [one for one in registered(folder)[1:] if one.results]


def register(plan: Plan, folder: Path, resume: bool) -> list[Registered]:
    """Keep the plan, unless it is the one that was registered last.

    Raises:
        RunDirError: the folder holds runs of a study, and `--resume` was not given; or it holds something else.
    """
    before = registered(folder)
    held = [path.name for path in folder.iterdir() if path.name != ".lock"] if folder.is_dir() else []
    if held and not before:
        raise RunDirError(f"{folder}: is not empty and holds no study; pick another --out_dir")
    if (folder / "runs").is_dir() and not resume:  # a study that has run nothing has nothing to lose
        raise RunDirError(f"{folder}: holds a study already; pass --resume to go on with it, or another --out_dir")
    if before and before[-1].sha256 == plan.sha256:
        return before
    results = sum(1 for _ in folder.glob("results/*/*.json"))
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    changed = differences(flat_tables((folder / PLAN).read_bytes()), flat_tables(plan.text)) if before else []
    kept = before if results else []
    found = [*kept, Registered(plan.sha256, now, results, changed if kept else [])]
    write_atomic(folder / "plans" / f"{plan.sha256[:12]}.toml", plan.text)
    write_atomic(folder / PLAN, plan.text)
    write_json(folder / FILE, {"plans": [vars(one) for one in found]})
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What two plans say differently, a line each."""
    keys = dict.fromkeys((*old, *new))
    rows = [(key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in keys]
    found = [f"{key}: {before} then, {now} now" for key, before, now in rows if before != now]
    return found or ["nothing but comments or their place"]
