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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from grpo_gsm8k import extensions
from grpo_gsm8k.config import GrpoConfig
from grpo_gsm8k.datatypes import Datum, Grade, Prompt, Rollout
from grpo_gsm8k.engines.probe import sampled_datum
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.evals.diversity import diversity
from grpo_gsm8k.extensions import users_code
from grpo_gsm8k.repro import derive_seed, shuffled
from grpo_gsm8k.rollout import RolloutSource, SourceState, StepTimer, rollout_metrics, sample_row
from grpo_gsm8k.runs import diagnosis
from grpo_gsm8k.tasks.base import load_split
from grpo_gsm8k.tasks.render import task_of
from grpo_gsm8k.tasks.rewards import Grader, make_reward
from grpo_gsm8k.trainer import loop
from grpo_gsm8k.trainer.batch import Batch, make_batch, mismatch_metrics, with_old_logprobs, with_ref_logprobs
from grpo_gsm8k.trainer.objectives import Objective
from grpo_gsm8k.trainer.optimizer import lr_at
from grpo_gsm8k.trainer.plan import estimate
from grpo_gsm8k.workbench import Bench, open_bench


def train(
    cfg: GrpoConfig, bench: Bench, prompts: Sequence[Prompt], grader: Grader, advantage: Advantage | None = None
) -> None:
    """The algorithm. Everything that it needs is handed in, so a test can hand it toys."""
    check(cfg)
    with closing(RolloutSource(cfg, bench, prompts, grader)) as source:
        progress = Progress(source)
        for step in loop.steps(bench.run, bench.learner, cfg.steps, progress):
            timer = StepTimer(bench.sampler)
            sampled, metrics = source.take(step)
            timer.restart()  # the source has timed itself
            groups = with_advantages(cfg, sampled, advantage)
            rows = [row for group in groups for rollout in group if (row := datum(cfg, rollout))]
            timer.lap("build_data")
            metrics |= rollout_metrics(groups) | update(cfg, bench, rows, step)
            timer.lap("training")
            if bench.due(step, cfg.steps):
                source.settle()
                bench.run.samples(step, (sample_row(bench, r, k) for k, group in enumerate(groups) for r in group))
                metrics |= diversity([[r.trajectory.token_ids for r in group] for group in groups])
            metrics |= bench.validate(step, cfg.steps)
            timer.lap("eval")
            metrics |= {"progress/grpo_step": step, "progress/done_frac": step / cfg.steps}
            bench.run.log(step, metrics | timer.metrics(metrics["time/wait"]))
            progress.said = diagnosis.announce(bench.run.history(), vars(cfg), progress.said)
            progress.note = f"reward {metrics['reward/mean']:.3f}, {metrics['length/mean']:.0f} tokens"


class Progress(loop.Progress):
    """What the steps carry along: findings already voiced, and where the source of rollouts stands."""

    def __init__(self, source: RolloutSource) -> None:
        self.source, self.note = source, ""
        self.said: list[str] = []

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"note": self.note, "said": self.said, "source": self.source.state().as_json()}

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.note, self.said = stored["note"], stored["said"]
        self.source.restore(SourceState.of_json(stored["source"], self.source.prompts))


def check(cfg: GrpoConfig) -> None:
    """Refuse settings that cannot mean what they say. Raises `ConfigError`."""
    if cfg.rollouts_per_step % cfg.group_size:
        raise ConfigError(
            f"rollouts_per_step = {cfg.rollouts_per_step} must be a multiple of group_size = {cfg.group_size}"
        )
    if cfg.group_size < 2 and cfg.baseline != "none":
        raise ConfigError("group_size must be at least 2: a group of one has no relative advantage")
    if cfg.baseline == "none" and cfg.std_norm:
        raise ConfigError("baseline none with std_norm divides plain rewards by a deviation near 0; pass --no-std-norm")
    if cfg.top_p < 1:
        raise ConfigError("top_p < 1 truncates what is sampled, so ratios would be wrong; use top_p = 1")
    if cfg.temperature <= 0:
        raise ConfigError("temperature must be above 0: greedy groups have no variance")
    if cfg.importance_correction != "none" and cfg.old_logprobs != "recompute":
        raise ConfigError("importance_correction needs the trainer's own log-probabilities: old_logprobs = recompute")
    if cfg.importance_cap < 1:
        raise ConfigError(f"importance_cap = {cfg.importance_cap} must be at least 1")
    if cfg.dual_clip and cfg.loss not in ("grpo_clip", "gspo"):
        raise ConfigError(f"dual_clip bounds the clipped surrogate; {cfg.loss} is none: use dual_clip = 0")
    if cfg.dual_clip and cfg.dual_clip <= 1 + (cfg.clip_eps_high or cfg.clip_eps):
        raise ConfigError(f"dual_clip = {cfg.dual_clip} must lie above the clip, 1 + clip_eps_high")
    if cfg.kl_coef < 0:
        raise ConfigError(f"kl_coef = {cfg.kl_coef} must not be negative")
    if cfg.kl_coef and cfg.kl_estimator == "k1" and not cfg.kl_bias_correction:
        raise ConfigError("k1 without kl_bias_correction has a gradient of mean 0: it would hold the policy to nothing")
    if not 0 <= cfg.overlong_buffer <= 1:
        raise ConfigError(f"overlong_buffer = {cfg.overlong_buffer} is a share of max_new_tokens: from 0 to 1")


# ------------------------------------------------------------------------------------ advantages, rows, update


Advantage = Callable[[Sequence[Grade]], Sequence[float]]
"""Of the grades of one group."""


def with_advantages(
    cfg: GrpoConfig, groups: Sequence[Sequence[Rollout]], advantage: Advantage | None = None
) -> list[list[Rollout]]:
    """Each rollout's reward relative to its own group's, or what a user's `advantage` makes of the group's grades."""
    found = []
    for group in groups:
        grades_G = [rollout.grade for rollout in group]
        if advantage:
            values = users_advantages(advantage, grades_G)
        else:
            rewards_G = [grade.reward for grade in grades_G]
            values = group_advantages(rewards_G, cfg.std_norm, cfg.advantage_eps, cfg.baseline)
        found.append([replace(rollout, advantage=value) for rollout, value in zip(group, values, strict=True)])
    return found


def users_advantages(advantage: Advantage, grades_G: Sequence[Grade]) -> list[float]:
    """What a user's function returns for a group. Raises `ConfigError` unless it is a finite number for each grade."""
    with users_code("the --advantage function"):
        values = [float(value) for value in advantage(grades_G)]
    if len(values) != len(grades_G) or not all(map(math.isfinite, values)):
        raise ConfigError(f"the --advantage function returned {values} for {len(grades_G)} grades: one number each")
    return values


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


def datum(cfg: GrpoConfig, rollout: Rollout) -> Datum | None:
    """The sampled ids with their mask and log-probabilities; None for a cut trajectory that is to be left out."""
    if cfg.mask_truncated and rollout.trajectory.finish_reason == "length":
        return None
    return sampled_datum(rollout.trajectory, rollout.advantage)


def update(cfg: GrpoConfig, bench: Bench, rows: Sequence[Datum], step: int) -> dict[str, float]:
    """`epochs` passes of `minibatches` optimizer steps over the step's rollouts; means over them.

    `mismatch/` is of the first update, where the weights are still those that sampled: whatever differs there
    differs between sampler and trainer.
    """
    objective = Objective(
        cfg.loss,
        cfg.clip_eps,
        cfg.clip_eps_high or cfg.clip_eps,
        cfg.temperature,
        cfg.dual_clip,
        cfg.kl_coef,
        cfg.kl_estimator,
        cfg.kl_bias_correction,
        cfg.old_logprobs == "recompute" and not cfg.frozen_pass,
        cfg.importance_correction,
        cfg.importance_cap,
    )
    lr = lr_at(step, cfg.steps, cfg)
    if not rows:  # every completion was cut, and cut ones are masked
        return {}
    batch, mismatch = whole_batch(cfg, bench, rows, step)
    updates = minibatches(cfg, batch, step)
    history = [loop.update(bench.run, bench.learner, part, objective, lr, step) for part in updates]
    mean = {key: statistics.fmean(metrics[key] for metrics in history) for key in history[0]}
    return mean | {key: value for key, value in history[0].items() if key.startswith("mismatch/")} | mismatch


def whole_batch(cfg: GrpoConfig, bench: Bench, rows: Sequence[Datum], step: int) -> tuple[Batch, dict[str, float]]:
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
        mismatch = mismatch_metrics([batch], [frozen], cfg.importance_cap)
        batch = with_old_logprobs(batch, frozen, cfg.importance_correction, cfg.importance_cap)
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


# ------------------------------------------------------------------------------------------------ the command


def run(cfg: GrpoConfig) -> dict[str, Any]:
    """The stage as a command: load, train, return the result."""
    check(cfg)
    if cfg.estimate:
        return estimate(cfg, cfg.estimate)
    source, task = Path(cfg.data) / "train.jsonl", task_of(cfg)
    examples, reward = load_split(task, cfg.data, "train"), make_reward(cfg.reward)
    advantage = extensions.load(cfg.advantage, "--advantage") if cfg.advantage else None
    buffer = round(cfg.overlong_buffer * cfg.max_new_tokens)
    with open_bench(cfg, "grpo", {"train": source}, overlaps=cfg.mode == "one_step_off") as bench:
        grader = Grader(bench.renderer.task, reward, (cfg.max_new_tokens, buffer) if buffer else None)
        train(cfg, bench, bench.prompts(examples, source), grader, advantage)
        return bench.finish()


if __name__ == "__main__":
    from grpo_gsm8k.cli import run_command

    run_command("grpo")
