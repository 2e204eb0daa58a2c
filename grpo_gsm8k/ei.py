"""Stage 5: expert iteration. Sample, keep what is right, fine-tune on it, again (arXiv 2203.14465).

Simplified on purpose: each round goes on from the current weights, its number of updates is fixed
(`steps_per_round`), and a round in which nothing was right trains nothing and says so.

    grpo-gsm8k ei --model_id MODEL --data DIR
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_gsm8k.config import EiConfig
from grpo_gsm8k.datatypes import Completion, Prompt, SamplingParams, TokenRow
from grpo_gsm8k.repro import derive_seed, shuffled
from grpo_gsm8k.runs.files import read_jsonl, write_jsonl
from grpo_gsm8k.runs.progress import talk
from grpo_gsm8k.sft import fit_step
from grpo_gsm8k.tasks.gsm8k.grading import grade
from grpo_gsm8k.tasks.gsm8k.problems import load_split
from grpo_gsm8k.trainer import loop
from grpo_gsm8k.trainer.optimizer import lr_at
from grpo_gsm8k.workbench import Bench, open_bench


def train(cfg: EiConfig, bench: Bench, prompts: Sequence[Prompt]) -> None:
    """All rounds, each `cfg.steps_per_round` updates long."""
    total = cfg.rounds * cfg.steps_per_round
    rows: list[TokenRow] = []
    for step in loop.steps(bench.run, bench.learner, total, state := {"note": ""}):
        started = time.perf_counter()
        done, k = divmod(step - 1, cfg.steps_per_round)
        metrics: dict[str, float] = {"progress/ei_step": step, "progress/done_frac": step / total}
        if k == 0 or not rows:  # a round begins, or a resumed run is in the middle of one
            rows, found = round_rows(cfg, bench, prompts, done, fresh=k == 0)
            metrics |= found
        if rows:
            seed = derive_seed(cfg.seed, "ei", done)
            lr, start = lr_at(step, total, cfg), done * cfg.steps_per_round
            metrics |= fit_step(cfg, bench, rows, step, lr, seed=seed, start=start)
        metrics |= bench.validate(step, total)
        bench.run.log(step, metrics | {"time/total": time.perf_counter() - started})
        state["note"] = f"round {done + 1}, {len(rows)} solutions"


def round_rows(
    cfg: EiConfig, bench: Bench, prompts: Sequence[Prompt], done: int, fresh: bool
) -> tuple[list[TokenRow], dict[str, float]]:
    """The rows of a round and its `ei/` metrics: sampled when it begins, read back when it is resumed."""
    path = bench.run.path / "rounds" / f"round_{done + 1:02d}.jsonl"
    if not fresh:
        stored = [row for _, row in read_jsonl(path)] if path.stat().st_size else []
        return [TokenRow(tuple(row["token_ids"]), tuple(row["mask"])) for row in stored], {}
    synced = bench.sync(done * cfg.steps_per_round)
    order = shuffled(len(prompts), derive_seed(cfg.seed, "ei-prompts", done))
    chosen = [prompts[i] for i in order[: cfg.prompts_per_round]]
    params = SamplingParams(
        n=cfg.samples_per_prompt,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        stop=bench.renderer.style.stop,
        seed=derive_seed(cfg.seed, "ei-sample", done),
    )
    sampled = bench.sampler.sample(chosen, params)
    kept = [
        (prompt, completion)
        for prompt, completions in zip(chosen, sampled, strict=True)
        for completion in keep_right(cfg, bench, prompt, completions)
    ]
    write_jsonl(path, (_row(prompt, completion) for prompt, completion in kept))
    metrics = yield_metrics(kept, len(chosen), len(chosen) * cfg.samples_per_prompt, done) | synced
    note = "nothing to learn from" if not kept else f"{metrics['ei/solved_frac']:.0%} of problems solved"
    talk(f"ei: round {done + 1}: {len(kept)} right and distinct solutions of {len(chosen)} problems, {note}")
    return [TokenRow(tuple(r["token_ids"]), tuple(r["mask"])) for r in (_row(p, c) for p, c in kept)], metrics


def keep_right(cfg: EiConfig, bench: Bench, prompt: Prompt, completions: Sequence[Completion]) -> list[Completion]:
    """The right, finished and distinct completions of one problem, at most `cfg.keep_per_problem`, as drawn."""
    kept: dict[tuple[int, ...], Completion] = {}
    tags, opened = bench.renderer.tags, bench.renderer.style.opens_thought
    for completion in completions:
        right = grade(completion.text, prompt.problem.gold, cfg.grading, tags=tags, opened=opened)
        if right and completion.finish_reason == "stop":
            kept.setdefault(completion.token_ids, completion)
    return list(kept.values())[: cfg.keep_per_problem]


def yield_metrics(
    kept: Sequence[tuple[Prompt, Completion]], problems: int, sampled: int, done: int
) -> dict[str, float]:
    """Yield and diversity of a round."""
    per_problem = Counter(prompt.problem.id for prompt, _ in kept)
    lengths = [len(completion.token_ids) for _, completion in kept]
    return {
        "ei/round": done + 1,
        "ei/kept": len(kept),
        "ei/yield": len(kept) / sampled,
        "ei/solved_frac": len(per_problem) / problems,
        "ei/distinct_per_problem": len(kept) / max(len(per_problem), 1),
        "ei/mean_tokens": sum(lengths) / max(len(lengths), 1),
    }


def run(cfg: EiConfig) -> dict[str, Any]:
    """The stage as a command: load, train, return the result."""
    problems = load_split(Path(cfg.data), "train")
    source = Path(cfg.data) / "train.jsonl"
    with open_bench(cfg, "ei", {"train": source}) as bench:
        train(cfg, bench, bench.prompts(problems, source))
        return bench.finish()


def _row(prompt: Prompt, completion: Completion) -> dict[str, Any]:
    ids = (*prompt.token_ids, *completion.token_ids)
    mask = [0] * len(prompt.token_ids) + [1] * len(completion.token_ids)
    return {"id": prompt.problem.id, "text": completion.text, "token_ids": ids, "mask": mask}


if __name__ == "__main__":
    from grpo_gsm8k.cli import run_command

    run_command("ei")
