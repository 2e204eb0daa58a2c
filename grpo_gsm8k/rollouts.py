"""Where the rollouts of a GRPO step come from: sampled, graded, in order, and never sampled twice.

on_policy     step k samples with the weights of k - 1 updates; the learner waits.
one_step_off  step k trains on what was sampled while step k - 1 was trained, with the weights of k - 2 updates.
              The first step is on-policy. Neither of the two devices waits for more than the slower one.

What was sampled ahead is part of a checkpoint, so a resumed run trains on the same ids as the uninterrupted one.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from grpo_gsm8k.config import GrpoConfig
from grpo_gsm8k.datatypes import Completion, Prompt, Reward, RewardFn, Rollout, SamplingParams
from grpo_gsm8k.errors import EngineError
from grpo_gsm8k.gsm8k.grading import grade
from grpo_gsm8k.gsm8k.rewards import score
from grpo_gsm8k.repro import derive_seed, shuffled
from grpo_gsm8k.workbench import Bench

WAKE_S = 0.2


@dataclass(frozen=True)
class Collected:
    """The graded groups of one step.

    Attributes:
        cursor: how many prompts have been drawn from the stream up to here.
        seconds: what sampling and grading took.
    """

    rollouts: list[Rollout]
    cursor: int
    seconds: Mapping[str, float] = field(default_factory=dict)


class Source:
    """The rollouts of each step, sampled when they are needed or one step ahead."""

    def __init__(self, cfg: GrpoConfig, bench: Bench, prompts: Sequence[Prompt], reward: RewardFn) -> None:
        self.cfg, self.bench, self.prompts, self.reward = cfg, bench, prompts, reward
        self.cursor = 0
        self._taking = self._before = 0  # the step under way, and the cursor that it began with
        self._taken: Future[Collected] | None = None  # what was sampled ahead for it
        self._ahead: Future[Collected] | None = None
        self._pool = ThreadPoolExecutor(1)

    def take(self, step: int) -> tuple[list[Rollout], dict[str, float]]:
        """The rollouts of `step`, and with one_step_off the start of the next ones; metrics of both.

        Raises:
            EngineError: the sampler failed, or sampled with weights that are too old.
        """
        metrics, began = dict[str, float](), time.perf_counter()
        self._taking, self._before, self._taken = step, self.cursor, None
        if self._ahead is None:
            metrics |= self.bench.sync(step - 1)
            self._begin(step)
        assert self._ahead is not None
        synced = time.perf_counter()
        while not wait([self._ahead], timeout=WAKE_S).done:
            pass  # a Ctrl-C that comes while a thread is falling asleep is seen only when it wakes
        ready = self._ahead.result()
        waited = time.perf_counter() - synced
        ahead, self._ahead = self._ahead, None
        if self.cfg.mode == "one_step_off":
            self._taken = ahead
        self.cursor = ready.cursor
        if self.cfg.mode == "one_step_off" and step < self.cfg.steps:
            metrics |= self.bench.sync(step - 1)
            self._begin(step + 1)
        sync = time.perf_counter() - began - waited
        metrics |= {"time/wait": waited, "time/sync": sync, **ready.seconds, **self._staleness(step, ready.rollouts)}
        return ready.rollouts, metrics

    def stored(self) -> dict[str, Any]:
        """What a checkpoint must hold: the place in the stream of prompts, and what was sampled ahead.

        In the middle of a step (the last complete one is being rescued) that is what the step began with.
        """
        halfway = self._taking > self.bench.run.complete
        cursor = self._before if halfway else self.cursor
        future = (self._taken or self._ahead) if halfway else self._ahead
        if halfway and not (self.cfg.mode == "one_step_off" and future and future.done()):
            future = None  # nobody waits for samples while a run is being ended; they are drawn anew
        ahead: Collected | None = None
        try:
            ahead = future.result() if future else None
        except EngineError:  # the checkpoint is being written because of it; the step will be sampled anew
            ahead = None
        return {"cursor": cursor, "ahead": ahead and {"cursor": ahead.cursor, "rows": _rows(ahead.rollouts)}}

    def resume(self, state: dict[str, Any]) -> None:
        """Where `state["source"]` comes from a checkpoint, go on from it."""
        if callable(state["source"]):
            return
        stored, state["source"] = state["source"], self.stored
        self.cursor = stored["cursor"]
        if stored["ahead"]:
            self._ahead = Future()
            rollouts = _rollouts(stored["ahead"]["rows"], self.prompts)
            self._ahead.set_result(Collected(rollouts, stored["ahead"]["cursor"]))

    def settle(self) -> None:
        """Wait until nothing is being sampled: a validation needs the sampler."""
        if self._ahead:
            self._ahead.result()

    def close(self) -> None:
        """Let what is being sampled end, but not after Ctrl-C."""
        self._pool.shutdown(wait=not isinstance(sys.exc_info()[1], KeyboardInterrupt), cancel_futures=True)

    def _begin(self, step: int) -> None:
        self._ahead = self._pool.submit(collect, self.cfg, self.bench, self.prompts, self.reward, step, self.cursor)

    def _staleness(self, step: int, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Updates between the weights that sampled and those that are trained; one at most."""
        staleness = [step - 1 - rollout.completion.policy_version for rollout in rollouts]
        bound = 1 if self.cfg.mode == "one_step_off" else 0
        if not 0 <= min(staleness) <= max(staleness) <= bound:
            raise EngineError(
                f"step {step}: rollouts are {max(staleness)} updates old, {self.cfg.mode} allows {bound}; "
                "stopped before training on them, the checkpoints are good"
            )
        return {"staleness/mean": sum(staleness) / len(staleness), "staleness/max": float(max(staleness))}


def collect(
    cfg: GrpoConfig, bench: Bench, prompts: Sequence[Prompt], reward: RewardFn, step: int, cursor: int
) -> Collected:
    """Graded groups for one step, in order; groups without variance are replaced up to the configured times."""
    wanted = cfg.rollouts_per_step // cfg.group_size
    groups: list[list[Rollout]] = []
    spare: list[list[Rollout]] = []  # zero variance: used only when nothing better was found in time
    seconds = {"time/sampling": 0.0, "time/compute_rewards": 0.0}
    for attempt in range(cfg.resample_zero_variance + 1):
        missing = wanted - len(groups)
        asked = drawn_apart([prompt_at(prompts, cursor + i, cfg.seed) for i in range(missing)], cfg.group_size)
        cursor += missing
        began = time.perf_counter()
        sampled_P_G = bench.sampler.sample(asked, sampling_params(cfg, bench, step, attempt))
        sampled = time.perf_counter()
        first = len(groups) + len(spare)
        for p, (prompt, completions_G) in enumerate(zip(asked, sampled_P_G, strict=True)):
            group = [
                grade_one(cfg, bench, Rollout(prompt, c, score(reward, c, prompt.problem), first + p, False, False))
                for c in completions_G
            ]
            flat = len({rollout.reward.total for rollout in group}) == 1
            (spare if flat and cfg.resample_zero_variance else groups).append(group)
        seconds["time/sampling"] += sampled - began
        seconds["time/compute_rewards"] += time.perf_counter() - sampled
        if len(groups) == wanted:
            break
    filled = groups + spare[: wanted - len(groups)]
    return Collected([rollout for group in filled for rollout in group], cursor, seconds)


def drawn_apart(prompts: Sequence[Prompt], n: int) -> list[Prompt]:
    """The same prompts; one that stood there before (more groups than prompts, an epoch's edge) goes on counting its
    samples where the earlier one ends, n each, and so draws others."""
    groups: Counter[str] = Counter()
    counted = []
    for prompt in prompts:
        counted.append(replace(prompt, first_sample=n * groups[prompt.problem.id]))
        groups[prompt.problem.id] += 1
    return counted


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
    text, renderer = rollout.completion.text, bench.renderer
    gold = rollout.prompt.problem.gold
    correct = grade(text, gold, cfg.grading, tags=renderer.tags, opened=renderer.style.opens_thought)
    return replace(rollout, correct=correct, format_ok=renderer.style.format_ok(text))


def _rows(rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    """Rollouts as JSON; floats keep every bit."""
    return [
        {
            "id": rollout.prompt.problem.id,
            "completion": asdict(rollout.completion),
            "reward": asdict(rollout.reward),
            "group": rollout.group,
            "correct": rollout.correct,
            "format_ok": rollout.format_ok,
        }
        for rollout in rollouts
    ]


def _rollouts(rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> list[Rollout]:
    by_id = {prompt.problem.id: prompt for prompt in prompts}

    def completion(fields: Mapping[str, Any]) -> Completion:
        ids, logprobs = tuple(fields["token_ids"]), tuple(fields["logprobs"])
        return Completion(**{**fields, "token_ids": ids, "logprobs": logprobs})

    return [
        Rollout(
            by_id[row["id"]],
            completion(row["completion"]),
            Reward(**row["reward"]),
            row["group"],
            row["correct"],
            row["format_ok"],
        )
        for row in rows
    ]
