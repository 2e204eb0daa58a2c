"""Stored text graded again, and what follows from the grades: advantages, metrics, samples, evaluations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from grpo_gsm8k import ei, grpo
from grpo_gsm8k.audit.again import Again
from grpo_gsm8k.audit.files import Damage
from grpo_gsm8k.datatypes import Example, Rollout, Trajectory
from grpo_gsm8k.evals.accuracy import Evaluation, Row, figures, record
from grpo_gsm8k.rollout import rollout_metrics, sample_row
from grpo_gsm8k.runs import rollouts
from grpo_gsm8k.runs.files import read_jsonl
from grpo_gsm8k.tasks.render import Renderer
from grpo_gsm8k.tasks.rewards import Grader, make_reward

FREE = frozenset({"seconds", "tokens_per_s"})  # of an evaluation: how long it took
Groups = Sequence[Sequence[Rollout]]


def grader_of(again: Again) -> Grader:
    """The grader that the run had."""
    cfg = again.cfg
    if again.run.stage == "ei":
        return Grader(again.renderer.task)
    buffer = round(cfg.overlong_buffer * cfg.max_new_tokens)
    overlong = (cfg.max_new_tokens, buffer) if buffer else None
    return Grader(again.renderer.task, make_reward(cfg.reward), overlong)


def check_rollouts(again: Again, step: int, grader: Grader) -> Iterator[Damage]:
    """Grade the rollouts of a step again, and compute from the grades what the run computed."""
    name, stored = rollouts.name_of(step), again.rollouts(step, examples=True)
    taken = [[one.trajectory for one in group] for group in stored.groups]
    if strange := [group[0].prompt.example.id for group in taken if group[0].prompt.example.id not in again.examples]:
        yield Damage(name, step, f"example {strange[0]} is not in the training data")
        return
    grades = grader.grade(taken)
    for number, (one, grade) in enumerate(
        (one, grade)
        for group, own in zip(stored.groups, grades, strict=True)
        for one, grade in zip(group, own, strict=True)
    ):
        if what := _unlike(_as_json(asdict(one.grade)), _as_json(asdict(grade))):
            yield Damage(name, step, f"rollout {number} (example {one.trajectory.prompt.example.id}): {what}")
            return
    fresh = [
        [replace(one, grade=grade) for one, grade in zip(group, own, strict=True)]
        for group, own in zip(stored.groups, grades, strict=True)
    ]
    derived = _check_ei if again.run.stage == "ei" else _check_grpo
    yield from derived(again, step, fresh, stored.groups)


def _check_grpo(again: Again, step: int, fresh: Groups, stored: Groups) -> Iterator[Damage]:
    """Advantages, the step's metrics and its samples, from the fresh grades."""
    taught_alone = again.run.stage == "distill" and not again.cfg.reward_coef  # by the teacher
    groups = fresh if taught_alone else grpo.with_advantages(again.cfg, fresh)
    yield from _check_advantages(groups, stored, step)
    if what := _unlike(again.run.metrics.get(step, {}), rollout_metrics(groups), only_second=True):
        yield Damage("metrics.jsonl", step, f"does not follow from the rollouts: {what}")
    samples = again.run.folder / "samples" / f"step_{step:06d}.jsonl"
    if samples.is_file():
        rows = (sample_row(again.bench, one, k) for k, group in enumerate(groups) for one in group)
        yield from _check_rows(samples, rows, step, "is not the rollout of that number")


def _check_ei(again: Again, step: int, fresh: Groups, stored: Groups) -> Iterator[Damage]:
    """What is kept of a round, and the round's metrics."""
    done = (step - 1) // again.cfg.steps_per_round
    trajectories, grades = [[r.trajectory for r in g] for g in fresh], [[r.grade for r in g] for g in fresh]
    groups, kept = ei.choose(again.cfg, trajectories, grades)
    yield from _check_advantages(groups, stored, step)
    found = ei.yield_metrics(kept, len(fresh), sum(map(len, fresh)), done)
    if what := _unlike(again.run.metrics.get(step, {}), found, only_second=True):
        yield Damage("metrics.jsonl", step, f"does not follow from the rollouts: {what}")
    rows = map(ei.solution_row, kept)
    yield from _check_rows(again.run.folder / ei.round_name(done), rows, step, "is not the solution that was kept")


def _check_advantages(groups: Groups, stored: Groups, step: int) -> Iterator[Damage]:
    found, before = ([one.advantage for group in side for one in group] for side in (groups, stored))
    for number, (now, then) in enumerate(zip(found, before, strict=True)):
        if now != then:
            what = f"rollout {number}: advantage {then!r}, computed again {now!r}"
            yield Damage(rollouts.name_of(step), step, what)
            return


def check_evaluation(
    renderer: Renderer, examples: Mapping[str, Example], path: Path, name: str, step: int | None, sha256: str
) -> tuple[Evaluation | None, list[Damage]]:
    """Grade the rows of an evaluation again; its figures, computed again, if the rows hold.

    Args:
        sha256: of the weights that were evaluated; "" where that is not known.
    """
    rows = [row for _, row in read_jsonl(path)]
    if strange := [row["id"] for row in rows if row.get("id") not in examples]:
        return None, [Damage(name, step, f"example {strange[0]} is not in the evaluation set")]
    groups = [[_trajectory(renderer, examples[id], row) for row in own] for (id, _), own in _groups(rows)]
    graded = Grader(renderer.task).grade(groups)
    pairs = [pair for group, grades in zip(groups, graded, strict=True) for pair in zip(group, grades, strict=True)]
    for number, ((trajectory, grade), row) in enumerate(zip(pairs, rows, strict=True)):
        if what := _unlike(row, _as_json(record(Rollout(trajectory, grade), renderer)), only_second=True):
            return None, [Damage(name, step, f"row {number + 1} (example {row['id']}): {what}")]
        if sha256 and row["weights_sha256"] != sha256:
            return None, [Damage(name, step, f"row {number + 1} was written by other weights than the run's")]
    samples = max(row.get("sample", 0) for row in rows) + 1
    return figures(rows, samples, 1.0, renderer.task.vote), []


def unlike_summary(recorded: Mapping[str, Any], found: Evaluation) -> str:
    """The first figure of an evaluation that is not as it was recorded; "" where all are."""
    again = {key: value for key, value in _as_json(found.summary()).items() if key not in FREE}
    return _unlike(recorded, again, only_second=True)


def unlike_metrics(recorded: Mapping[str, Any], found: Evaluation) -> str:
    """The first `val/` metric that is not as it was logged."""
    return _unlike(recorded, found.metrics(), only_second=True)


def _groups(rows: Sequence[Row]) -> Iterable[tuple[tuple[str, Any], Iterable[Row]]]:
    return groupby(rows, key=lambda row: (row["id"], row.get("seed")))


def _trajectory(renderer: Renderer, example: Example, row: Row) -> Trajectory:
    """What a row says of a completion; its ids were not kept."""
    said = (row["finish_reason"], 0, 0, row["response"], row.get("turns", 1))
    return Trajectory(renderer.render(example), (), (1,) * row["tokens"], (), *said)


def _check_rows(path: Path, rows: Iterable[Mapping[str, Any]], step: int, what: str) -> Iterator[Damage]:
    """Compare the rows of a file with rows made again."""
    name = f"{path.parent.name}/{path.name}"
    stored = [row for _, row in read_jsonl(path)] if path.is_file() and path.stat().st_size else []
    fresh = [_as_json(row) for row in rows]
    if len(stored) != len(fresh):
        yield Damage(name, step, f"has {len(stored)} rows, not {len(fresh)}")
        return
    for number, (then, now) in enumerate(zip(stored, fresh, strict=True), 1):
        if then != now:
            yield Damage(name, step, f"row {number} {what}: {_unlike(then, now)}")
            return


def _unlike(recorded: Mapping[str, Any], found: Mapping[str, Any], only_second: bool = False) -> str:
    """The first value that differs, in words; "" for none. `only_second` leaves out what only `recorded` has."""
    for key in found if only_second else {**recorded, **found}:
        if recorded.get(key) != found.get(key):
            return f"{key} {recorded.get(key)!r} was recorded, {found.get(key)!r} comes out"
    return ""


def _as_json(row: Any) -> Any:
    """A value as a file gives it back: tuples are lists."""
    return json.loads(json.dumps(row))
