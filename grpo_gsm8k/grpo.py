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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from grpo_gsm8k import curriculum, plugins
from grpo_gsm8k.config import GrpoConfig
from grpo_gsm8k.datatypes import Datum, Grade, Learner, Prompt, Rollout
from grpo_gsm8k.engines.probe import sampled_datum
from grpo_gsm8k.errors import ConfigError, PluginError
from grpo_gsm8k.evals.diversity import diversity
from grpo_gsm8k.repro import derive_seed, shuffled
from grpo_gsm8k.rollout import RolloutSource, SourceState, StepTimer, rollout_metrics, sample_row
from grpo_gsm8k.runs import diagnosis
from grpo_gsm8k.tasks.base import load_split
from grpo_gsm8k.tasks.render import task_of
from grpo_gsm8k.tasks.rewards import Grader, make_reward
from grpo_gsm8k.trainer import loop
from grpo_gsm8k.trainer.data import (
    ImportanceCorrection,
    mismatch_metrics,
    weighted,
    with_old_logprobs,
    with_ref_logprobs,
)
from grpo_gsm8k.trainer.estimate import estimate
from grpo_gsm8k.trainer.losses import Objective, make_loss, unread_settings
from grpo_gsm8k.trainer.optimizer import lr_at
from grpo_gsm8k.workbench import Workbench, open_workbench

ADVANTAGES = ("group_relative", "maxrl")


def train(cfg: GrpoConfig, bench: Workbench, prompts: Sequence[Prompt], grader: Grader) -> None:
    """The algorithm. Everything that it needs is handed in, so a test can hand it toys."""
    check(cfg)
    with closing(RolloutSource(cfg, bench, prompts, grader)) as source:
        state = GrpoState(source)
        for step in loop.steps(bench.run, bench.learner, cfg.steps, state):
            timer = StepTimer(bench.sampler)
            sampled, metrics = source.take(step)
            timer.restart()  # the source has timed itself
            groups = with_advantages(cfg, sampled)
            rows = [row for group in groups for rollout in group if (row := datum(cfg, rollout))]
            timer.lap("build_data")
            metrics |= rollout_metrics(groups) | update(cfg, bench, rows, step)
            timer.lap("training")
            bench.keep_rollouts(step, groups)
            timer.lap("keep_rollouts")
            if bench.due(step, cfg.steps):
                source.settle()
                bench.run.samples(step, (sample_row(bench, r, k) for k, group in enumerate(groups) for r in group))
                metrics |= diversity([[r.trajectory.token_ids for r in group] for group in groups])
            bench.validate(step, cfg.steps, metrics)
            timer.lap("eval")
            metrics |= {"progress/grpo_step": step, "progress/done_frac": step / cfg.steps}
            bench.run.log(step, metrics | timer.metrics(metrics["time/wait"]))
            state.said = diagnosis.announce(bench.run.history(), vars(cfg), state.said)
            state.note = f"reward {metrics['reward/mean']:.3f}, {metrics['length/mean']:.0f} tokens"


class GrpoState(loop.StageState):
    """What a checkpoint stores besides the weights: the findings printed so far, and the rollout source's state."""

    def __init__(self, source: RolloutSource) -> None:
        self.source, self.note = source, ""
        self.said: list[str] = []

    def as_json(self) -> dict[str, Any]:
        """As JSON, for a checkpoint."""
        return {"note": self.note, "said": self.said, "source": self.source.state().as_json()}

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Restore what `as_json` returned."""
        self.note, self.said = stored["note"], stored["said"]
        self.source.restore(SourceState.of_json(stored["source"], self.source.prompts))


def check(cfg: GrpoConfig) -> None:
    """Refuse settings that contradict each other. Raises `ConfigError`."""
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
        raise ConfigError("baseline none with std_norm divides plain rewards by a deviation near 0; pass --no_std_norm")
    if cfg.top_p < 1:
        raise ConfigError("top_p < 1 truncates what is sampled, so ratios would be wrong; use top_p = 1")
    if cfg.temperature <= 0:
        raise ConfigError("temperature must be above 0: greedy groups have no variance")
    if cfg.importance_correction != "none" and cfg.old_logprobs != "recompute":
        raise ConfigError("importance_correction needs the trainer's own log-probabilities: old_logprobs = recompute")
    if objective_of(cfg).loss.supervised:
        raise ConfigError(
            f"loss {cfg.loss!r} does not use advantages: it is for fine-tuning, and GRPO would learn nothing"
        )
    curriculum.check(cfg)
    if unread := unread_settings(cfg.loss, vars(cfg), vars(GrpoConfig())):
        raise ConfigError(f"{unread[0]} = {getattr(cfg, unread[0])}: --loss {cfg.loss} does not read it; leave it out")
    if cfg.kl_coef and cfg.kl_estimator == "k1" and not cfg.kl_bias_correction:
        raise ConfigError("k1 without kl_bias_correction has a gradient of mean 0: it would hold the policy to nothing")


# ------------------------------------------------------------------------------------ advantages, rows, update


def with_advantages(cfg: GrpoConfig, groups: Sequence[Sequence[Rollout]]) -> list[list[Rollout]]:
    """Set each rollout's advantage, from the grades of its group."""
    found = []
    for group in groups:
        values = advantages_of(cfg, [rollout.grade for rollout in group])
        found.append([replace(r, advantage=value * r.weight) for r, value in zip(group, values, strict=True)])
    return found


def advantages_of(cfg: GrpoConfig, grades_G: Sequence[Grade]) -> list[float]:
    """The advantage of each completion of a group, as `--advantage` defines it.

    Raises:
        PluginError: the user's own function fails, or returns something other than a finite number for each.
    """
    rewards_G = [grade.reward for grade in grades_G]
    if cfg.advantage == "group_relative":
        return group_advantages(rewards_G, cfg.std_norm, cfg.advantage_eps, cfg.baseline)
    if cfg.advantage == "maxrl":
        return maxrl_advantages(rewards_G)
    own, what = plugins.load_object(cfg.advantage, "advantage", ADVANTAGES), f"advantage {cfg.advantage!r}"
    with plugins.calling(what):
        found = [float(value) for value in own(grades_G)]
    if len(found) != len(grades_G) or not all(map(math.isfinite, found)):
        raise PluginError(
            f"{what}: returned {str(found)[:80]} for rewards {str(rewards_G)[:80]}; must be as many numbers"
        )
    return found


def maxrl_advantages(rewards_G: Sequence[float]) -> list[float]:
    """r / mean - 1 (MaxRL, arXiv 2602.02710): a right answer counts more the rarer it is, as in log-likelihood."""
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


def datum(cfg: GrpoConfig, rollout: Rollout) -> Datum | None:
    """The row to train on; None for a truncated trajectory under `--mask_truncated`."""
    if cfg.mask_truncated and rollout.trajectory.finish_reason == "length":
        return None
    return sampled_datum(rollout.trajectory, rollout.advantage)


def update(cfg: GrpoConfig, bench: Workbench, rows: Sequence[Datum], step: int) -> dict[str, float]:
    """`epochs` passes of `minibatches` optimizer steps over the step's rollouts; means over them.

    `mismatch/` is measured at the first update, where the weights are still those that sampled: any difference is one
    between sampler and trainer.
    """
    if not rows:  # every completion was truncated, and `--mask_truncated` leaves them out
        return {}
    objective, lr = objective_of(cfg), lr_at(step, cfg.steps, cfg)
    data, mismatch = whole_pass(cfg, bench.learner, rows, step)
    updates = minibatches(cfg, data, step)
    history = [loop.update(bench.run, bench.learner, part, objective, lr, step) for part in updates]
    mean = {key: statistics.fmean(metrics[key] for metrics in history) for key in history[0]}
    return mean | {key: value for key, value in history[0].items() if key.startswith("mismatch/")} | mismatch


def objective_of(cfg: GrpoConfig) -> Objective:
    """The loss and its terms. Raises `ConfigError` for an unknown loss, or one that refuses its settings."""
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


def whole_pass(
    cfg: GrpoConfig, learner: Learner, rows: Sequence[Datum], step: int
) -> tuple[list[Datum], dict[str, float]]:
    """All rows of a step, shuffled and weighted; and the `mismatch/` metrics if a frozen pass measured them.

    The loss weights are set over the whole pass, so a row weighs the same in any minibatch. The old log-probabilities
    stay the same between the updates: the clip is for that.
    """
    order = shuffled(len(rows), derive_seed(cfg.seed, "minibatches", step))
    data = weighted([rows[r] for r in order], cfg.aggregation, cfg.max_new_tokens)
    mismatch: dict[str, float] = {}
    if cfg.frozen_pass:  # before the first update moves the weights
        frozen = learner.logprobs(data, cfg.temperature)
        correction = objective_of(cfg).correction
        mismatch = mismatch_metrics(data, frozen, correction)
        data = with_old_logprobs(data, frozen, correction)
    if cfg.kl_coef:
        data = with_ref_logprobs(data, learner.reference_logprobs(data, cfg.temperature))
    return data, mismatch


def minibatches(cfg: GrpoConfig, data: Sequence[Datum], step: int) -> Iterator[list[Datum]]:
    """The updates of a step: `minibatches` per pass, or as many as there are rows, reshuffled in each pass.

    Their sizes differ by one at most. Their weights are multiplied by their number, so the mean of their losses is the
    loss of the whole pass.
    """
    parts = min(cfg.minibatches, len(data))
    scaled = [replace(row, weights=tuple(weight * parts for weight in row.weights)) for row in data]
    for epoch in range(cfg.epochs):
        order: Sequence[int] = range(len(data))  # of the first pass: `whole_pass` has shuffled
        if epoch:
            order = shuffled(len(data), derive_seed(cfg.seed, "minibatches", step, epoch))
        ends = [-(-len(data) * k // parts) for k in range(parts + 1)]
        for start, end in pairwise(ends):
            yield [scaled[i] for i in order[start:end]]


# ------------------------------------------------------------------------------------------------ the command


def run(cfg: GrpoConfig) -> dict[str, Any]:
    """The stage as a command: load, train, and return the result."""
    check(cfg)
    if cfg.estimate:
        return estimate(cfg, cfg.estimate)
    source, task = Path(cfg.data) / "train.jsonl", task_of(cfg)
    examples, reward = load_split(task, cfg.data, "train"), make_reward(cfg.reward)
    buffer = round(cfg.overlong_buffer * cfg.max_new_tokens)
    with open_workbench(cfg, "grpo", {"train": source}, overlaps=cfg.mode == "one_step_off") as bench:
        grader = Grader(bench.renderer.task, reward, (cfg.max_new_tokens, buffer) if buffer else None)
        train(cfg, bench, bench.prompts(examples, source), grader)
        return bench.finish()


if __name__ == "__main__":
    from grpo_gsm8k.cli import run_command

    run_command("grpo")
