"""Stage 6: GRPO, top to bottom (arXiv 2402.03300).

A step: take P prompts, sample G completions of each, grade them, turn each group's rewards into advantages,
and update the policy on exactly the ids that were sampled, with the log-probabilities they were sampled with.

    prompts ──sample──▶ completions ──grade──▶ rewards ──group──▶ advantages ──clip──▶ gradient ──sync──▶ sampler

Simplified on purpose: one learner on one device, the sampler in step with it, no critic, and no KL term (with
verifiable rewards it is usually off). Suffixes: `_P` prompts, `_G` completions of one prompt's group.

    grpo-gsm8k grpo --model_id MODEL --data DIR
    grpo-gsm8k grpo --preset full --reward mine.rewards:my_reward
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_gsm8k.config import GrpoConfig
from grpo_gsm8k.datatypes import Prompt, RewardFn, Rollout, SamplingParams, TokenRow
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.evals.accuracy import record
from grpo_gsm8k.gsm8k.problems import load_split
from grpo_gsm8k.gsm8k.rewards import make_reward, score
from grpo_gsm8k.repro import derive_seed, shuffled
from grpo_gsm8k.runs import diagnosis
from grpo_gsm8k.trainer import loop
from grpo_gsm8k.trainer.batch import Batch, make_batch, with_old_logprobs
from grpo_gsm8k.trainer.objectives import Objective
from grpo_gsm8k.trainer.optimizer import lr_at
from grpo_gsm8k.workbench import Bench, open_bench


def train(cfg: GrpoConfig, bench: Bench, prompts: Sequence[Prompt], reward: RewardFn) -> None:
    """The algorithm. Everything that it needs is handed in, so a test can hand it toys."""
    check(cfg)
    state: dict[str, Any] = {"cursor": 0, "note": "", "said": []}  # prompts drawn so far; findings said
    for step in loop.steps(bench.run, bench.learner, cfg.steps, state):
        clock = Clock()
        bench.sync(step - 1)
        clock.lap("sync")
        rollouts = collect(cfg, bench, prompts, reward, step, state, clock)
        rollouts = with_advantages(cfg, rollouts)
        rows = [row for rollout in rollouts if (row := token_row(cfg, rollout))]
        clock.lap("build_data")
        metrics = rollout_metrics(rollouts) | update(cfg, bench, rows, step)
        clock.lap("training")
        if bench.due(step, cfg.steps):
            bench.sync(step)
            metrics |= bench.validate(step)
            bench.run.samples(step, (sample_row(bench, cfg, rollout) for rollout in rollouts))
            clock.lap("eval")
        metrics |= {"progress/grpo_step": step, "progress/done_frac": step / cfg.steps}
        bench.run.log(step, metrics | clock.metrics())
        state["said"] = diagnosis.announce(bench.run.history(), vars(cfg), state["said"])
        state["note"] = f"reward {metrics['reward/mean']:.3f}, {metrics['length/mean']:.0f} tokens"


def check(cfg: GrpoConfig) -> None:
    """Refuse settings that cannot mean what they say. Raises `ConfigError`."""
    if cfg.rollouts_per_step % cfg.group_size:
        raise ConfigError(
            f"rollouts_per_step = {cfg.rollouts_per_step} must be a multiple of group_size = {cfg.group_size}"
        )
    if cfg.group_size < 2:
        raise ConfigError("group_size must be at least 2: a group of one has no relative advantage")
    if cfg.top_p < 1:
        raise ConfigError("top_p < 1 truncates what is sampled, so ratios would be wrong; use top_p = 1")
    if cfg.temperature <= 0:
        raise ConfigError("temperature must be above 0: greedy groups have no variance")


# ---------------------------------------------------------------------------------------------- rollouts


def collect(
    cfg: GrpoConfig,
    bench: Bench,
    prompts: Sequence[Prompt],
    reward: RewardFn,
    step: int,
    state: dict[str, Any],
    clock: Clock,
) -> list[Rollout]:
    """Graded groups for one step, in order; groups without variance are replaced up to the configured times."""
    wanted = cfg.rollouts_per_step // cfg.group_size
    groups: list[list[Rollout]] = []
    spare: list[list[Rollout]] = []  # zero variance: used only when nothing better was found in time
    for attempt in range(cfg.resample_zero_variance + 1):
        missing = wanted - len(groups)
        asked = [prompt_at(prompts, state["cursor"] + i, cfg.seed) for i in range(missing)]
        state["cursor"] += missing
        sampled_P_G = bench.sampler.sample(asked, sampling_params(cfg, bench, step, attempt))
        clock.lap("sampling")
        first = len(groups) + len(spare)
        for p, (prompt, completions_G) in enumerate(zip(asked, sampled_P_G, strict=True)):
            group = [
                grade_one(cfg, bench, Rollout(prompt, c, score(reward, c, prompt.problem), first + p, False, False))
                for c in completions_G
            ]
            flat = len({rollout.reward.total for rollout in group}) == 1
            (spare if flat and cfg.resample_zero_variance else groups).append(group)
        clock.lap("compute_rewards")
        if len(groups) == wanted:
            break
    filled = groups + spare[: wanted - len(groups)]
    return [rollout for group in filled for rollout in group]


def prompt_at(prompts: Sequence[Prompt], k: int, seed: int) -> Prompt:
    """The k-th prompt of an endless stream: every epoch is a fresh shuffle of all prompts."""
    epoch, i = divmod(k, len(prompts))
    return prompts[shuffled(len(prompts), derive_seed(seed, "prompts", epoch))[i]]


def sampling_params(cfg: GrpoConfig, bench: Bench, step: int, attempt: int) -> SamplingParams:
    """Seeded per (run seed, step), and by the sampler per (prompt, sample): a resumed run draws the same."""
    return SamplingParams(
        n=cfg.group_size,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        stop=bench.renderer.style.stop,
        seed=derive_seed(cfg.seed, "grpo", step, attempt),
    )


def grade_one(cfg: GrpoConfig, bench: Bench, rollout: Rollout) -> Rollout:
    """Whether the answer is right and the form kept: for the metrics, whatever the reward was."""
    graded = record(rollout.prompt, rollout.completion, bench.renderer, cfg.grading)
    return replace(rollout, correct=graded["correct"], format_ok=graded["format_ok"])


# ------------------------------------------------------------------------------------ advantages, rows, update


def with_advantages(cfg: GrpoConfig, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Each rollout's reward relative to its own group's."""
    by_group: dict[int, list[float]] = {}
    for rollout in rollouts:
        by_group.setdefault(rollout.group, []).append(rollout.reward.total)
    advantages = {
        group: iter(group_advantages(rewards, cfg.std_norm, cfg.advantage_eps)) for group, rewards in by_group.items()
    }
    return [replace(rollout, advantage=next(advantages[rollout.group])) for rollout in rollouts]


def group_advantages(rewards_G: Sequence[float], std_norm: bool = True, eps: float = 1e-6) -> list[float]:
    """(r - mean) / (std + eps), std unbiased; without std_norm r - mean (Dr.GRPO, arXiv 2503.20783).

    A group of equal rewards gives exactly 0: mean and std of 0.3 x 8 are not exact in binary, and dividing
    their rounding errors by eps would make advantages out of nothing.
    """
    if len(set(rewards_G)) == 1:
        return [0.0] * len(rewards_G)
    mean = statistics.fmean(rewards_G)
    scale = statistics.stdev(rewards_G) + eps if std_norm else 1.0
    return [(reward - mean) / scale for reward in rewards_G]


def token_row(cfg: GrpoConfig, rollout: Rollout) -> TokenRow | None:
    """The sampled ids with their mask and log-probabilities; None for a cut completion that is to be left out."""
    prompt, completion = rollout.prompt.token_ids, rollout.completion
    if cfg.mask_truncated and completion.finish_reason == "length":
        return None
    zeros = (0,) * len(prompt)
    return TokenRow(
        token_ids=prompt + completion.token_ids,
        mask=zeros + (1,) * len(completion.token_ids),
        logprobs=zeros + completion.logprobs,
        advantage=rollout.advantage,
    )


def update(cfg: GrpoConfig, bench: Bench, rows: Sequence[TokenRow], step: int) -> dict[str, float]:
    """`epochs` passes of `minibatches` optimizer steps over the step's rollouts; means over them.

    `mismatch/` is of the first update, where the weights are still those that sampled: whatever differs there
    differs between sampler and trainer.
    """
    high = cfg.clip_eps_high or cfg.clip_eps
    objective = Objective("grpo_clip", cfg.clip_eps, high, cfg.temperature)
    lr = lr_at(step, cfg.steps, cfg)
    updates = minibatches(cfg, bench, rows, step)
    history = [loop.update(bench.run, bench.learner, batch, objective, lr, step) for batch in updates]
    if not history:  # every completion was cut, and cut ones are masked
        return {}
    mean = {key: statistics.fmean(metrics[key] for metrics in history) for key in history[0]}
    return mean | {key: value for key, value in history[0].items() if key.startswith("mismatch/")}


def minibatches(cfg: GrpoConfig, bench: Bench, rows: Sequence[TokenRow], step: int) -> Iterator[Batch]:
    """The updates of a step. Old log-probabilities never change between them: that is what the clip is for."""

    def build(chosen: Sequence[TokenRow]) -> Batch:
        batch = make_batch(chosen, bench.renderer.pad_id, cfg.aggregation, cfg.max_new_tokens)
        assert all(  # what is trained is what was sampled
            tuple(batch.targets[b, :n].tolist()) == row.token_ids[1:]
            for b, (n, row) in enumerate(zip(batch.lengths, chosen, strict=True))
        )
        return batch

    if not rows:
        return
    size = -(-len(rows) // cfg.minibatches)
    order = shuffled(len(rows), derive_seed(cfg.seed, "minibatches", step))
    batches = [build([rows[r] for r in order[i : i + size]]) for i in range(0, len(rows), size)]
    if cfg.old_logprobs == "recompute":  # all of them before the first update moves the weights
        batches = [with_old_logprobs(batch, bench.learner.logprobs(batch, cfg.temperature)) for batch in batches]
    for _ in range(cfg.epochs):
        yield from batches


# --------------------------------------------------------------------------------------------------- metrics


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What the rewards, groups, outcomes and lengths of one step look like."""
    rewards = [r.reward.total for r in rollouts]
    lengths = [len(r.completion.token_ids) for r in rollouts]
    ended = [n for n, r in zip(lengths, rollouts, strict=True) if r.completion.finish_reason == "stop"]
    right = [n for n, r in zip(lengths, rollouts, strict=True) if r.correct]
    wrong = [n for n, r in zip(lengths, rollouts, strict=True) if not r.correct]
    by_group: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        by_group.setdefault(rollout.group, []).append(rollout)
    groups = list(by_group.values())
    cut = [r.completion.finish_reason == "length" for r in rollouts]
    advantages = [r.advantage for r in rollouts]
    means: dict[str, Sequence[float]] = {
        "length/terminated_mean": ended,
        "length/right_mean": right,
        "length/wrong_mean": wrong,
        "groups/zero_std_frac": [len({r.reward.total for r in g}) == 1 for g in groups],
        "groups/all_right_frac": [all(r.correct for r in g) for g in groups],
        "groups/all_wrong_frac": [not any(r.correct for r in g) for g in groups],
        # Each completion is in exactly one of these four.
        "outcome/right_frac": [r.correct for r in rollouts],
        "outcome/truncated_frac": [not r.correct and c for r, c in zip(rollouts, cut, strict=True)],
        "outcome/format_error_frac": [
            not r.correct and not c and not r.format_ok for r, c in zip(rollouts, cut, strict=True)
        ],
        "outcome/wrong_frac": [not r.correct and not c and r.format_ok for r, c in zip(rollouts, cut, strict=True)],
        "reward/mean": rewards,
        "length/mean": lengths,
        "length/clipped_frac": cut,
        "advantage/mean": advantages,
        **{
            f"reward/{name}": [r.reward.components.get(name, 0.0) for r in rollouts]
            for name in sorted({name for r in rollouts for name in r.reward.components})
        },
    }
    return {
        **{name: statistics.fmean(values) for name, values in means.items() if values},
        "reward/std": statistics.pstdev(rewards),
        "reward/min": min(rewards),
        "reward/max": max(rewards),
        "length/min": min(lengths),
        "length/max": max(lengths),
        "advantage/min": min(advantages),
        "advantage/max": max(advantages),
    }


def sample_row(bench: Bench, cfg: GrpoConfig, rollout: Rollout) -> dict[str, Any]:
    """One rollout as a row of `samples/`."""
    return {
        **record(rollout.prompt, rollout.completion, bench.renderer, cfg.grading),
        "group": rollout.group,
        "reward": rollout.reward.total,
        "components": dict(rollout.reward.components),
        "advantage": rollout.advantage,
        "policy_version": rollout.completion.policy_version,
        "seed": rollout.completion.seed,
    }


class Clock:
    """Where the time of a step goes: `time/<lap>` and `time/total`, in seconds."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        names = ("sampling", "compute_rewards", "build_data", "training", "sync", "eval")
        self.laps = dict.fromkeys(names, 0.0)

    def lap(self, name: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.laps[name] += now - self.last
        self.last = now

    def metrics(self) -> dict[str, float]:
        """All laps, and the whole."""
        laps = {f"time/{name}": seconds for name, seconds in self.laps.items()}
        return laps | {"time/total": time.perf_counter() - self.started}


# ------------------------------------------------------------------------------------------------ the command


def run(cfg: GrpoConfig) -> dict[str, Any]:
    """The stage as a command: load, train, return the result."""
    check(cfg)
    source = Path(cfg.data) / "train.jsonl"
    problems = load_split(Path(cfg.data), "train")
    with open_bench(cfg, "grpo", {"train": source}) as bench:
        reward = make_reward(
            cfg.reward,
            format_ok=bench.renderer.style.format_ok,
            format_weight=cfg.format_weight,
            answer_weight=cfg.answer_weight,
            grading=cfg.grading,
            tags=bench.renderer.tags,
        )
        train(cfg, bench, bench.prompts(problems, source), reward)
        return loop.finish(bench.run, bench.learner)


if __name__ == "__main__":
    from grpo_gsm8k.cli import run_command

    run_command("grpo")
