"""Stage 5: expert iteration. Sample, keep what is right, fine-tune on it, again (arXiv 2203.14465).

Simplified on purpose: each round goes on from the current weights, its number of updates is fixed
(`steps_per_round`), and a round without a right answer prints that and trains nothing.

    grpo-gsm8k ei --model_id MODEL --data DIR
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_gsm8k.config import EiConfig
from grpo_gsm8k.datatypes import Datum, Grade, Prompt, Rollout, SamplingParams, Trajectory
from grpo_gsm8k.engines.probe import sampled_datum
from grpo_gsm8k.engines.trajectories import sample_trajectories
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.repro import derive_seed, shuffled
from grpo_gsm8k.runs.files import read_jsonl, write_jsonl
from grpo_gsm8k.runs.progress import doing, say
from grpo_gsm8k.sft import fit_step
from grpo_gsm8k.tasks.base import load_split
from grpo_gsm8k.tasks.render import task_of
from grpo_gsm8k.tasks.rewards import Grader
from grpo_gsm8k.trainer import loop
from grpo_gsm8k.trainer.optimizer import lr_at
from grpo_gsm8k.workbench import Workbench, open_workbench


def train(cfg: EiConfig, bench: Workbench, prompts: Sequence[Prompt]) -> None:
    """Run all rounds, each of `cfg.steps_per_round` updates."""
    total = cfg.rounds * cfg.steps_per_round
    rows: list[Datum] = []
    for step in loop.steps(bench.run, bench.learner, total, state := loop.StageState()):
        started = time.perf_counter()
        done, k = divmod(step - 1, cfg.steps_per_round)
        metrics: dict[str, float] = {"progress/ei_step": step, "progress/done_frac": step / total}
        sampled: list[list[Rollout]] = []
        if k == 0 or not rows:  # a new round, or a run that was resumed inside one
            rows, sampled, found = round_rows(cfg, bench, prompts, done, fresh=k == 0)
            metrics |= found
        if rows:
            seed = derive_seed(cfg.seed, "ei", done)
            lr, start = lr_at(step, total, cfg), done * cfg.steps_per_round
            metrics |= fit_step(cfg, bench, rows, step, lr, seed=seed, start=start)
        if sampled:
            bench.keep_rollouts(step, sampled)
        bench.validate(step, total, metrics)
        bench.run.log(step, metrics | {"time/total": time.perf_counter() - started})
        state.note = f"round {done + 1}, {len(rows)} solutions"


def round_rows(
    cfg: EiConfig, bench: Workbench, prompts: Sequence[Prompt], done: int, fresh: bool
) -> tuple[list[Datum], list[list[Rollout]], dict[str, float]]:
    """The rows of a round, what was sampled for it, and its `ei/` metrics; a resumed run reads the rows back."""
    path = bench.run.path / round_name(done)
    if not fresh:
        return stored_rows(path), [], {}
    synced = bench.sync(done * cfg.steps_per_round)
    order = shuffled(len(prompts), derive_seed(cfg.seed, "ei-prompts", done))
    chosen = [prompts[i] for i in order[: cfg.prompts_per_round]]
    params = SamplingParams(cfg.max_new_tokens, cfg.temperature, cfg.top_p, bench.renderer.stop)
    how = {"n": cfg.samples_per_prompt, "seed": derive_seed(cfg.seed, "ei-sample", done), "context": bench.context}
    with doing(f"round {done + 1}: sampling {cfg.samples_per_prompt} x {len(chosen)}"):
        sampled_P_G = sample_trajectories(bench.sampler, bench.renderer, chosen, params, **how)
    grades_P_G = Grader(bench.renderer.task).grade(sampled_P_G)
    if any(grade.correct is None for grades in grades_P_G for grade in grades):
        raise ConfigError(f"task {cfg.task!r} has no right answers, which expert iteration keeps: use grpo instead")
    groups, kept = choose(cfg, sampled_P_G, grades_P_G)
    rows = [solution_row(rollout) for rollout in kept]
    write_jsonl(path, rows)
    metrics = yield_metrics(kept, len(chosen), len(chosen) * cfg.samples_per_prompt, done) | synced
    metrics["ei/sampled_tokens"] = sum(sum(one.mask) for group in sampled_P_G for one in group)
    note = "nothing to learn from" if not kept else f"{metrics['ei/solved_frac']:.0%} of problems solved"
    say(f"ei: round {done + 1}: {len(kept)} right and distinct solutions of {len(chosen)} problems, {note}")
    return [Datum(tuple(row["token_ids"]), tuple(row["mask"])) for row in rows], groups, metrics


def round_name(done: int) -> str:
    """The file of the rows of a round, below the run directory; `done` rounds came before it."""
    return f"rounds/round_{done + 1:02d}.jsonl"


def stored_rows(path: Path) -> list[Datum]:
    """The rows of a round that was sampled before."""
    stored = [row for _, row in read_jsonl(path)] if path.stat().st_size else []
    return [Datum(tuple(row["token_ids"]), tuple(row["mask"])) for row in stored]


def choose(
    cfg: EiConfig, sampled_P_G: Sequence[Sequence[Trajectory]], grades_P_G: Sequence[Sequence[Grade]]
) -> tuple[list[list[Rollout]], list[Rollout]]:
    """All rollouts of a round, with advantage 1 where they are kept and 0 elsewhere; and those that are kept."""
    groups, kept = list[list[Rollout]](), list[Rollout]()
    for sampled, grades in zip(sampled_P_G, grades_P_G, strict=True):
        group = [Rollout(one, grade) for one, grade in zip(sampled, grades, strict=True)]
        chosen = keep_right(cfg, group)
        groups.append([replace(one, advantage=float(any(one is other for other in chosen))) for one in group])
        kept += chosen
    return groups, kept


def keep_right(cfg: EiConfig, group: Sequence[Rollout]) -> list[Rollout]:
    """The right, finished and distinct trajectories of one prompt, at most `cfg.keep_per_problem`, in order."""
    kept: dict[tuple[int, ...], Rollout] = {}
    for rollout in group:
        if rollout.grade.correct and rollout.trajectory.finish_reason == "stop":
            kept.setdefault(rollout.trajectory.token_ids, rollout)
    return list(kept.values())[: cfg.keep_per_problem]


def yield_metrics(kept: Sequence[Rollout], problems: int, sampled: int, done: int) -> dict[str, float]:
    """Yield and diversity of a round."""
    per_problem = Counter(rollout.trajectory.prompt.example.id for rollout in kept)
    lengths = [sum(rollout.trajectory.mask) for rollout in kept]
    return {
        "ei/round": done + 1,
        "ei/kept": len(kept),
        "ei/yield": len(kept) / sampled,
        "ei/solved_frac": len(per_problem) / problems,
        "ei/distinct_per_problem": len(kept) / max(len(per_problem), 1),
        "ei/mean_tokens": sum(lengths) / max(len(lengths), 1),
    }


def run(cfg: EiConfig) -> dict[str, Any]:
    """The stage as a command: load, train, and return the result."""
    task = task_of(cfg)
    if not task.has_right_answers:
        raise ConfigError(f"task {task.spec!r} has no right answers, which expert iteration keeps: use grpo instead")
    examples, source = load_split(task, cfg.data, "train"), Path(cfg.data) / "train.jsonl"
    with open_workbench(cfg, "ei", {"train": source}) as bench:
        train(cfg, bench, bench.prompts(examples, source))
        return bench.finish()


def solution_row(rollout: Rollout) -> dict[str, Any]:
    row, trajectory = sampled_datum(rollout.trajectory), rollout.trajectory
    return {
        "id": trajectory.prompt.example.id,
        "text": trajectory.text,
        "token_ids": row.token_ids,
        "mask": row.mask,
    }


if __name__ == "__main__":
    from grpo_gsm8k.cli import run_command

    run_command("ei")
