"""Stage 6: GRPO, top to bottom (arXiv 2402.03300).

A step: take P prompts, sample G completions of each, grade them, turn each group's rewards into advantages,
and update the policy on exactly the ids that were sampled, with the log-probabilities they were sampled with.

    prompts ──sample──▶ completions ──grade──▶ rewards ──group──▶ advantages ──clip──▶ gradient ──sync──▶ sampler

Simplified on purpose: one learner, the sampler in step with it, no critic; rewards are of whole
responses; the KL to the starting model is a term of the loss, not of the reward, and off unless asked for (with
verifiable rewards it usually is). Dr.GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE and dual-clip PPO are this file with
other settings: `--algorithm`. Suffixes: `_P` prompts, `_G` completions of one prompt's group.

    grpo-gsm8k grpo --model_id MODEL --data DIR
    grpo-gsm8k grpo --preset full --reward mine.rewards:my_reward
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from grpo_gsm8k import plugins
from grpo_gsm8k.config import GrpoConfig
from grpo_gsm8k.datatypes import Prompt, Reward, RewardFn, Rollout, Sampler, TokenRow
from grpo_gsm8k.engines.probe import sampled_row
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.evals.accuracy import record
from grpo_gsm8k.evals.diversity import diversity
from grpo_gsm8k.gsm8k.problems import load_split
from grpo_gsm8k.gsm8k.rewards import make_reward, with_overlong_penalty
from grpo_gsm8k.repro import derive_seed, shuffled
from grpo_gsm8k.rollouts import Source
from grpo_gsm8k.runs import diagnosis
from grpo_gsm8k.trainer import loop
from grpo_gsm8k.trainer.batch import (
    Batch,
    ImportanceCorrection,
    make_batch,
    mismatch_metrics,
    with_old_logprobs,
    with_ref_logprobs,
)
from grpo_gsm8k.trainer.losses import Objective, make_loss, unread_settings
from grpo_gsm8k.trainer.optimizer import lr_at
from grpo_gsm8k.trainer.plan import estimate
from grpo_gsm8k.workbench import Bench, open_bench

ADVANTAGES = ("group_relative", "maxrl")


def train(cfg: GrpoConfig, bench: Bench, prompts: Sequence[Prompt], reward: RewardFn) -> None:
    """The algorithm. Everything that it needs is handed in, so a test can hand it toys."""
    check(cfg)
    with closing(Source(cfg, bench, prompts, reward)) as source:
        state: dict[str, Any] = {"note": "", "said": [], "source": source.stored}  # said: findings already voiced
        for step in loop.steps(bench.run, bench.learner, cfg.steps, state):
            clock = Clock(bench.sampler)
            source.resume(state)
            rollouts, metrics = source.take(step)
            clock.skip()  # the source has timed itself
            rollouts = with_advantages(cfg, rollouts)
            rows = [row for rollout in rollouts if (row := token_row(cfg, rollout))]
            clock.lap("build_data")
            metrics |= rollout_metrics(rollouts) | update(cfg, bench, rows, step)
            clock.lap("training")
            if bench.due(step, cfg.steps):
                source.settle()
                bench.run.samples(step, (sample_row(bench, cfg, rollout) for rollout in rollouts))
                metrics |= diversity([[r.completion.token_ids for r in group] for group in grouped(rollouts)])
            metrics |= bench.validate(step, cfg.steps)
            clock.lap("eval")
            metrics |= {"progress/grpo_step": step, "progress/done_frac": step / cfg.steps}
            bench.run.log(step, metrics | clock.metrics(metrics["time/wait"]))
            state["said"] = diagnosis.announce(bench.run.history(), vars(cfg), state["said"])
            state["note"] = f"reward {metrics['reward/mean']:.3f}, {metrics['length/mean']:.0f} tokens"


def check(cfg: GrpoConfig) -> None:
    """Refuse settings that cannot mean what they say. Raises `ConfigError`."""
    if cfg.rollouts_per_step % cfg.group_size:
        raise ConfigError(
            f"rollouts_per_step = {cfg.rollouts_per_step} must be a multiple of group_size = {cfg.group_size}"
        )
    relative = cfg.advantage == "group_relative"
    if cfg.advantage not in ADVANTAGES:
        plugins.load_object(cfg.advantage, "advantage", ADVANTAGES)
    if cfg.group_size < 2 and ((relative and cfg.baseline != "none") or cfg.advantage == "maxrl"):
        raise ConfigError("group_size must be at least 2: a group of one has no relative advantage")
    if cfg.advantage == "maxrl" and cfg.overlong_buffer:
        raise ConfigError("advantage maxrl needs rewards that are not negative: leave overlong_buffer at 0")
    if relative and cfg.baseline == "none" and cfg.std_norm:
        raise ConfigError("baseline none with std_norm divides plain rewards by a deviation near 0; pass --no-std-norm")
    if cfg.top_p < 1:
        raise ConfigError("top_p < 1 truncates what is sampled, so ratios would be wrong; use top_p = 1")
    if cfg.temperature <= 0:
        raise ConfigError("temperature must be above 0: greedy groups have no variance")
    if cfg.importance_correction != "none" and cfg.old_logprobs != "recompute":
        raise ConfigError("importance_correction needs the trainer's own log-probabilities: old_logprobs = recompute")
    if objective_of(cfg).loss.supervised:
        raise ConfigError(f"loss {cfg.loss!r} knows no advantages: it is for fine-tuning, and GRPO would learn nothing")
    if unread := unread_settings(cfg.loss, vars(cfg), vars(GrpoConfig())):
        raise ConfigError(f"{unread[0]} = {getattr(cfg, unread[0])}: --loss {cfg.loss} does not read it; leave it out")
    if cfg.kl_coef and cfg.kl_estimator == "k1" and not cfg.kl_bias_correction:
        raise ConfigError("k1 without kl_bias_correction has a gradient of mean 0: it would hold the policy to nothing")


# ------------------------------------------------------------------------------------ advantages, rows, update


def with_advantages(cfg: GrpoConfig, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Each rollout's reward relative to its own group's."""
    by_group: dict[int, list[Reward]] = {}
    for rollout in rollouts:
        by_group.setdefault(rollout.group, []).append(rollout.reward)
    advantages = {group: iter(advantages_of(cfg, rewards)) for group, rewards in by_group.items()}
    return [replace(rollout, advantage=next(advantages[rollout.group])) for rollout in rollouts]


def advantages_of(cfg: GrpoConfig, grades_G: Sequence[Reward]) -> list[float]:
    """What each completion of a group is credited with, as `--advantage` says.

    Raises:
        ConfigError: the user's own function fails, or returns something other than a finite number for each.
    """
    rewards_G = [grade.total for grade in grades_G]
    if cfg.advantage == "group_relative":
        return group_advantages(rewards_G, cfg.std_norm, cfg.advantage_eps, cfg.baseline)
    if cfg.advantage == "maxrl":
        return maxrl_advantages(rewards_G)
    own, what = plugins.load_object(cfg.advantage, "advantage", ADVANTAGES), f"advantage {cfg.advantage!r}"
    with plugins.calling(what):
        found = [float(value) for value in own(grades_G)]
    if len(found) != len(grades_G) or not all(map(math.isfinite, found)):
        raise ConfigError(
            f"{what}: returned {str(found)[:80]} for rewards {str(rewards_G)[:80]}; must be as many numbers"
        )
    return found


def maxrl_advantages(rewards_G: Sequence[float]) -> list[float]:
    """r / mean - 1 (MaxRL, arXiv 2602.02710): the rarer a right answer, the more it counts, as in log-likelihood."""
    mean = statistics.fmean(rewards_G)
    if min(rewards_G) < 0:
        raise ConfigError(f"advantage maxrl divides by a group's mean: rewards must not be negative ({min(rewards_G)})")
    return [reward / mean - 1 if len(set(rewards_G)) > 1 else 0.0 for reward in rewards_G]


def group_advantages(
    rewards_G: Sequence[float], std_norm: bool = True, eps: float = 1e-6, baseline: str = "group"
) -> list[float]:
    """(r - mean) / (std + eps), std unbiased; without std_norm r - mean (Dr.GRPO, arXiv 2503.20783).

    `baseline` "leave_one_out" takes the mean of the others instead (RLOO, arXiv 2402.14740 sec. 3), "none" takes
    nothing off. A group of equal rewards gives exactly 0: mean and std of 0.3 x 8 are not exact in binary, and dividing
    their rounding errors by eps would make advantages out of nothing.
    """
    if baseline == "none":
        return [float(reward) for reward in rewards_G]
    if len(set(rewards_G)) == 1:
        return [0.0] * len(rewards_G)
    mean, n = statistics.fmean(rewards_G), len(rewards_G)
    scale = statistics.stdev(rewards_G) + eps if std_norm else 1.0
    if baseline == "leave_one_out":
        scale *= (n - 1) / n  # r less the mean of the others is n / (n - 1) times r less the mean of all
    return [(reward - mean) / scale for reward in rewards_G]


def token_row(cfg: GrpoConfig, rollout: Rollout) -> TokenRow | None:
    """The sampled ids with their mask and log-probabilities; None for a cut completion that is to be left out."""
    if cfg.mask_truncated and rollout.completion.finish_reason == "length":
        return None
    return sampled_row(rollout.prompt, rollout.completion, rollout.advantage)


def update(cfg: GrpoConfig, bench: Bench, rows: Sequence[TokenRow], step: int) -> dict[str, float]:
    """`epochs` passes of `minibatches` optimizer steps over the step's rollouts; means over them.

    `mismatch/` is of the first update, where the weights are still those that sampled: whatever differs there
    differs between sampler and trainer.
    """
    if not rows:  # every completion was cut, and cut ones are masked
        return {}
    objective, lr = objective_of(cfg), lr_at(step, cfg.steps, cfg)
    batch, mismatch = whole_batch(cfg, bench, rows, step)
    updates = minibatches(cfg, batch, step)
    history = [loop.update(bench.run, bench.learner, part, objective, lr, step) for part in updates]
    mean = {key: statistics.fmean(metrics[key] for metrics in history) for key in history[0]}
    return mean | {key: value for key, value in history[0].items() if key.startswith("mismatch/")} | mismatch


def objective_of(cfg: GrpoConfig) -> Objective:
    """The loss and its terms. Raises `ConfigError` where the loss is not there, or refuses its settings."""
    return Objective(
        loss=make_loss(cfg.loss, vars(cfg) | {"clip_eps_high": cfg.clip_eps_high or cfg.clip_eps}),
        temperature=cfg.temperature,
        kl_coef=cfg.kl_coef,
        kl_estimator=cfg.kl_estimator,
        kl_bias_correction=cfg.kl_bias_correction,
        on_policy=cfg.old_logprobs == "recompute" and not cfg.frozen_pass,
        correction=ImportanceCorrection(cfg.importance_correction, cfg.importance_cap, cfg.importance_cap_low),
        entropy_coef=cfg.entropy_coef,
    )


def whole_batch(cfg: GrpoConfig, bench: Bench, rows: Sequence[TokenRow], step: int) -> tuple[Batch, dict[str, float]]:
    """All rows of a step, and how far apart sampler and trainer were, where that was looked at.

    The loss weights are those of the whole pass: a row weighs the same in whichever minibatch it comes to stand. Old
    log-probabilities never change between the updates: that is what the clip is for.
    """
    order = shuffled(len(rows), derive_seed(cfg.seed, "minibatches", step))
    chosen = [rows[r] for r in order]
    batch = make_batch(chosen, bench.renderer.pad_id, cfg.aggregation, cfg.max_new_tokens)
    assert all(  # what is trained is what was sampled
        tuple(batch.targets[b, :n].tolist()) == row.token_ids[1:]
        for b, (n, row) in enumerate(zip(batch.lengths, chosen, strict=True))
    )
    mismatch: dict[str, float] = {}
    if cfg.frozen_pass:  # before the first update moves the weights
        frozen = bench.learner.logprobs(batch, cfg.temperature)
        correction = objective_of(cfg).correction
        mismatch = mismatch_metrics([batch], [frozen], correction)
        batch = with_old_logprobs(batch, frozen, correction)
    if cfg.kl_coef:
        batch = with_ref_logprobs(batch, bench.learner.reference_logprobs(batch, cfg.temperature))
    return batch, mismatch


def minibatches(cfg: GrpoConfig, batch: Batch, step: int) -> Iterator[Batch]:
    """The updates of a step: `minibatches` a pass, or as many as there are rows, each pass in an order of its own.

    Their sizes differ by one at most, and their weights are multiplied by their number, so that the mean over a pass is
    the loss of the whole batch.
    """
    parts = min(cfg.minibatches, len(batch))
    for epoch in range(cfg.epochs):
        order: Sequence[int] = range(len(batch))  # of the first pass: `whole_batch` has shuffled
        if epoch:
            order = shuffled(len(batch), derive_seed(cfg.seed, "minibatches", step, epoch))
        ends = [-(-len(batch) * k // parts) for k in range(parts + 1)]
        for start, end in pairwise(ends):
            part = batch.select(order[start:end])
            yield replace(part, weights=part.weights * parts)


# --------------------------------------------------------------------------------------------------- metrics


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What the rewards, groups, outcomes and lengths of one step look like."""
    rewards = [r.reward.total for r in rollouts]
    lengths = [len(r.completion.token_ids) for r in rollouts]
    ended = [n for n, r in zip(lengths, rollouts, strict=True) if r.completion.finish_reason == "stop"]
    right = [n for n, r in zip(lengths, rollouts, strict=True) if r.correct]
    wrong = [n for n, r in zip(lengths, rollouts, strict=True) if not r.correct]
    groups = grouped(rollouts)
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


def grouped(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """The rollouts of each prompt."""
    by_group: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        by_group.setdefault(rollout.group, []).append(rollout)
    return list(by_group.values())


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
    """Where the time of a step goes: `time/<lap>` and `time/total`, in seconds, and who was idle."""

    def __init__(self, sampler: Sampler) -> None:
        self.started = self.last = time.perf_counter()
        self.sampler, self.busy_before = sampler, sampler.busy_s
        self.laps = dict.fromkeys(("build_data", "training", "eval"), 0.0)

    def skip(self) -> None:
        """Book the time since the last lap nowhere."""
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.laps[name] += now - self.last
        self.last = now

    def metrics(self, waited: float) -> dict[str, float]:
        """All laps and the whole; the learner was idle while it `waited` for rollouts, the sampler when not busy."""
        total = time.perf_counter() - self.started
        busy = min(self.sampler.busy_s - self.busy_before, total)
        laps = {f"time/{name}": seconds for name, seconds in self.laps.items()}
        idle = {"perf/learner_idle_frac": waited / total, "perf/sampler_idle_frac": 1 - busy / total}
        return laps | idle | {"time/total": total}


# ------------------------------------------------------------------------------------------------ the command


def run(cfg: GrpoConfig) -> dict[str, Any]:
    """The stage as a command: load, train, return the result."""
    check(cfg)
    if cfg.estimate:
        return estimate(cfg, cfg.estimate)
    source = Path(cfg.data) / "train.jsonl"
    problems = load_split(Path(cfg.data), "train")
    with open_bench(cfg, "grpo", {"train": source}, overlaps=cfg.mode == "one_step_off") as bench:
        reward = make_reward(
            cfg.reward,
            format_ok=bench.renderer.style.format_ok,
            format_weight=cfg.format_weight,
            answer_weight=cfg.answer_weight,
            grading=cfg.grading,
            tags=bench.renderer.tags,
        )
        if buffer := round(cfg.overlong_buffer * cfg.max_new_tokens):
            reward = with_overlong_penalty(reward, cfg.max_new_tokens, buffer)
        train(cfg, bench, bench.prompts(problems, source), reward)
        return bench.finish()


if __name__ == "__main__":
    from grpo_gsm8k.cli import run_command

    run_command("grpo")
