"""Samples and grades the rollouts of each GRPO step, in order, each once.

on_policy     step k samples with the weights of k - 1 updates; the learner waits.
one_step_off  step k trains on rollouts that were sampled during step k - 1, with the weights of k - 2 updates.
              The first step is on-policy. Sampler and learner work side by side, so the slower one sets the pace.

Its prompts are a shuffled stream, or those that the curriculum draws (`curriculum.py`). A checkpoint stores the
rollouts that were sampled ahead, so a resumed run trains on the same ids.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from grpo_gsm8k.config import GrpoConfig
from grpo_gsm8k.curriculum import Curriculum, Evidence, Outcomes, outcomes_of
from grpo_gsm8k.datatypes import Grade, Prompt, Rollout, Sampler, SamplingParams, Trajectory
from grpo_gsm8k.engines.trajectories import sample_trajectories
from grpo_gsm8k.errors import EngineError, PluginError
from grpo_gsm8k.evals.accuracy import record
from grpo_gsm8k.repro import derive_seed, shuffled
from grpo_gsm8k.tasks.rewards import Grader
from grpo_gsm8k.workbench import Workbench

WAKE_S = 0.2


@dataclass(frozen=True)
class Collected:
    """The graded groups of one step.

    Attributes:
        cursor: how many prompts the stream has yielded so far.
        outcomes: how often each prompt was solved, those of groups that were replaced included.
        seconds: the time of sampling and of grading.
    """

    groups: list[list[Rollout]]
    cursor: int
    outcomes: Outcomes = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceState:
    """The state of a `RolloutSource`: its position in the stream of prompts, the curriculum's, and the rollouts sampled
    ahead."""

    cursor: int = 0
    ahead: Collected | None = None
    evidence: Evidence = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint. JSON keeps every bit of a float."""
        ahead = self.ahead and {
            "cursor": self.ahead.cursor,
            "groups": [list(map(_row, g)) for g in self.ahead.groups],
            "outcomes": self.ahead.outcomes,
        }
        return {"cursor": self.cursor, "ahead": ahead, "evidence": self.evidence}

    @staticmethod
    def of_json(stored: Mapping[str, Any], prompts: Sequence[Prompt]) -> SourceState:
        """Undo `as_json`, given the run's prompts."""
        ahead, by_id = stored["ahead"], {prompt.example.id: prompt for prompt in prompts}
        evidence = {id_: tuple(counts) for id_, counts in stored.get("evidence", {}).items()}
        if not ahead:
            return SourceState(stored["cursor"], None, evidence)
        groups = [[_rollout(row, by_id) for row in group] for group in ahead["groups"]]
        outcomes = {id_: tuple(counts) for id_, counts in ahead.get("outcomes", outcomes_of(groups)).items()}
        return SourceState(stored["cursor"], Collected(groups, ahead["cursor"], outcomes), evidence)


def _row(rollout: Rollout) -> dict[str, Any]:
    trajectory = {name: value for name, value in vars(rollout.trajectory).items() if name != "prompt"}
    id_ = rollout.trajectory.prompt.example.id
    return {"id": id_, "trajectory": trajectory, "grade": asdict(rollout.grade), "weight": rollout.weight}


def _rollout(row: Mapping[str, Any], by_id: Mapping[str, Prompt]) -> Rollout:
    fields = dict[str, Any](row["trajectory"])
    fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    weight = row.get("weight", 1.0)
    return Rollout(Trajectory(prompt=by_id[row["id"]], **fields), Grade(**row["grade"]), weight=weight)


class RolloutSource:
    """Yields the rollouts of each step, sampled on demand or one step ahead."""

    def __init__(self, cfg: GrpoConfig, bench: Workbench, prompts: Sequence[Prompt], grader: Grader) -> None:
        self.cfg, self.bench, self.prompts, self.grader = cfg, bench, prompts, grader
        self.cursor = 0
        self.curriculum = Curriculum(cfg, prompts) if cfg.curriculum != "none" else None
        self._taking, self._before = 0, SourceState()  # the current step, and the state at its start
        self._taken: Future[Collected] | None = None  # its rollouts, if they were sampled ahead
        self._ahead: Future[Collected] | None = None
        self._pool = ThreadPoolExecutor(1)

    def take(self, step: int) -> tuple[list[list[Rollout]], dict[str, float]]:
        """Return the groups of `step` and their metrics; with one_step_off, start sampling the next ones.

        Raises:
            EngineError: the sampler failed, or its weights are too old.
        """
        metrics, began = dict[str, float](), time.perf_counter()
        self._taking, self._before, self._taken = step, SourceState(self.cursor, None, self._evidence()), None
        if self._ahead is None:
            metrics |= self.bench.sync(step - 1)
            self._begin(step)
        assert self._ahead is not None
        synced = time.perf_counter()
        while not wait([self._ahead], timeout=WAKE_S).done:
            pass  # Python handles a Ctrl-C only when the main thread wakes up
        ready = self._ahead.result()
        waited = time.perf_counter() - synced
        ahead, self._ahead = self._ahead, None
        if self.cfg.mode == "one_step_off":
            self._taken = ahead
        self.cursor = ready.cursor
        if self.curriculum:
            metrics |= self.curriculum.metrics(ready.outcomes, step)
            self.curriculum.observe(ready.outcomes, step)
        if self.cfg.mode == "one_step_off" and step < self.cfg.steps:
            metrics |= self.bench.sync(step - 1)
            self._begin(step + 1)
        sync = time.perf_counter() - began - waited
        metrics |= {
            "time/wait": waited,
            "time/save_weights": sync,
            **ready.seconds,
            **self._staleness(step, ready.groups),
        }
        return ready.groups, metrics

    def state(self) -> SourceState:
        """The state for a checkpoint. Waits for rollouts that are being sampled ahead.

        When the last complete step is saved in the middle of the next one, this is the state at its start.
        """
        halfway = self._taking > self.bench.run.complete
        now = self._before if halfway else SourceState(self.cursor, None, self._evidence())
        future = (self._taken or self._ahead) if halfway else self._ahead
        if halfway and not (self.cfg.mode == "one_step_off" and future and future.done()):
            future = None  # a run that is ending does not wait for samples; the resumed run draws them again
        try:
            return replace(now, ahead=future.result() if future else None)
        except (
            EngineError,
            PluginError,
        ):  # why this checkpoint is written; the resumed run samples again
            return now

    def restore(self, state: SourceState) -> None:
        """Restore a checkpoint's state."""
        self.cursor, self._ahead = state.cursor, None
        if self.curriculum:
            self.curriculum.evidence = state.evidence
        if state.ahead:
            self._ahead = Future()
            self._ahead.set_result(state.ahead)

    def settle(self) -> None:
        """Wait until the sampler is idle, for a validation."""
        if self._ahead:
            self._ahead.result()

    def close(self) -> None:
        """Wait for rollouts that are being sampled, except after a Ctrl-C."""
        self._pool.shutdown(wait=not isinstance(sys.exc_info()[1], KeyboardInterrupt), cancel_futures=True)

    def _begin(self, step: int) -> None:
        asked = self.cfg, self.bench, self.prompts, self.grader, step, self.cursor, self.curriculum
        self._ahead = self._pool.submit(collect, *asked)

    def _evidence(self) -> Evidence:
        return self.curriculum.evidence if self.curriculum else {}

    def _staleness(self, step: int, groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
        """Updates between the sampling and the trained weights. Raises `EngineError` above the mode's bound."""
        staleness = [step - 1 - rollout.trajectory.policy_version for group in groups for rollout in group]
        bound = 1 if self.cfg.mode == "one_step_off" else 0
        if not 0 <= min(staleness) <= max(staleness) <= bound:
            raise EngineError(
                f"step {step}: rollouts are {max(staleness)} updates old, {self.cfg.mode} allows {bound}; "
                "stopped before training on them, the checkpoints are good"
            )
        return {"staleness/mean": sum(staleness) / len(staleness), "staleness/max": float(max(staleness))}


def collect(
    cfg: GrpoConfig,
    bench: Workbench,
    prompts: Sequence[Prompt],
    grader: Grader,
    step: int,
    cursor: int,
    curriculum: Curriculum | None = None,
) -> Collected:
    """Sample and grade the groups of one step, in order; replace groups without variance as often as configured."""
    wanted = cfg.rollouts_per_step // cfg.group_size
    groups: list[list[Rollout]] = []
    spare: list[list[Rollout]] = []  # without variance: used if the replacements do not suffice
    tried: list[list[Rollout]] = []
    seconds = {"time/sampling": 0.0, "time/compute_rewards": 0.0}
    params = sampling_params(cfg, bench)
    for attempt in range(cfg.resample_zero_variance + 1):
        missing = wanted - len(groups)
        if curriculum:
            drawn = curriculum.draw(missing, step, attempt)
        else:
            drawn = [(prompt_at(prompts, cursor + i, cfg.seed), 1.0) for i in range(missing)]
        asked = [prompt for prompt, _ in drawn]
        cursor += missing
        began = time.perf_counter()
        seed = derive_seed(cfg.seed, "grpo", step, attempt)  # so a resumed run draws the same
        how = {"n": cfg.group_size, "seed": seed, "context": bench.context}
        sampled_P_G = sample_trajectories(bench.sampler, bench.renderer, asked, params, **how)
        sampled = time.perf_counter()
        for (_, weight), group, grades in zip(drawn, sampled_P_G, grader.grade(sampled_P_G), strict=True):
            rollouts = [Rollout(t, grade, weight=weight) for t, grade in zip(group, grades, strict=True)]
            tried.append(rollouts)
            flat = len({grade.reward for grade in grades}) == 1
            (spare if flat and cfg.resample_zero_variance else groups).append(rollouts)
        seconds["time/sampling"] += sampled - began
        seconds["time/compute_rewards"] += time.perf_counter() - sampled
        if len(groups) == wanted:
            break
    return Collected(
        groups + spare[: wanted - len(groups)], cursor, outcomes_of(tried, cfg.reward != "default"), seconds
    )


def prompt_at(prompts: Sequence[Prompt], k: int, seed: int) -> Prompt:
    """The k-th prompt of an endless stream that shuffles all prompts anew in every epoch."""
    epoch, i = divmod(k, len(prompts))
    return prompts[shuffled(len(prompts), derive_seed(seed, "prompts", epoch))[i]]


def sampling_params(cfg: GrpoConfig, bench: Workbench) -> SamplingParams:
    """The sampling parameters of all steps."""
    return SamplingParams(cfg.max_new_tokens, cfg.temperature, cfg.top_p, bench.renderer.stop)


# --------------------------------------------------------------------------------------------------- metrics


def rollout_metrics(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Metrics of one step: rewards, groups, outcomes, lengths, advantages."""
    rollouts = [rollout for group in groups for rollout in group]
    rewards = [r.grade.reward for r in rollouts]
    lengths = [sum(r.trajectory.mask) for r in rollouts]
    cut = [r.trajectory.finish_reason == "length" for r in rollouts]
    advantages = [r.advantage for r in rollouts]
    means: dict[str, Sequence[float]] = {
        "length/terminated_mean": [n for n, c in zip(lengths, cut, strict=True) if not c],
        **(outcome_metrics(groups) if all(r.grade.correct is not None for r in rollouts) else {}),
        "groups/zero_std_frac": [len({r.grade.reward for r in g}) == 1 for g in groups],
        "reward/mean": rewards,
        "length/mean": lengths,
        "length/clipped_frac": cut,
        "advantage/mean": advantages,
        **{
            f"reward/{name}": [r.grade.components.get(name, 0.0) for r in rollouts]
            for name in sorted({name for r in rollouts for name in r.grade.components})
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
        **turn_metrics(rollouts),
    }


def outcome_metrics(groups: Sequence[Sequence[Rollout]]) -> dict[str, Sequence[float]]:
    """Metrics of a task with right answers; each trajectory has exactly one of the four outcomes."""
    rollouts = [rollout for group in groups for rollout in group]
    right = [bool(r.grade.correct) for r in rollouts]
    cut = [r.trajectory.finish_reason == "length" for r in rollouts]
    formless = [r.grade.format_ok is False for r in rollouts]
    each = list(zip(right, cut, formless, strict=True))
    return {
        "length/right_mean": [sum(r.trajectory.mask) for r in rollouts if r.grade.correct],
        "length/wrong_mean": [sum(r.trajectory.mask) for r in rollouts if not r.grade.correct],
        "groups/all_right_frac": [all(r.grade.correct for r in g) for g in groups],
        "groups/all_wrong_frac": [not any(r.grade.correct for r in g) for g in groups],
        "outcome/right_frac": right,
        "outcome/truncated_frac": [not r and c for r, c, _ in each],
        "outcome/format_error_frac": [not r and not c and f for r, c, f in each],
        "outcome/wrong_frac": [not r and not c and not f for r, c, f in each],
    }


def turn_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """How many turns the model took, if any trajectory has several."""
    turns = [r.trajectory.turns for r in rollouts]
    return {"turns/mean": statistics.fmean(turns), "turns/max": float(max(turns))} if max(turns) > 1 else {}


def sample_row(bench: Workbench, rollout: Rollout, group: int) -> dict[str, Any]:
    """One rollout as a row of `samples/`; `group` numbers the prompts of the step."""
    return {
        **record(rollout, bench.renderer),
        "group": group,
        "reward": rollout.grade.reward,
        "components": dict(rollout.grade.components),
        "advantage": rollout.advantage,
        "policy_version": rollout.trajectory.policy_version,
        "seed": rollout.trajectory.seed,
    }


class StepTimer:
    """Times the phases of a step in seconds, `time/<phase>` and `time/total`, and the idle share of each side."""

    def __init__(self, sampler: Sampler) -> None:
        self.started = self.last = time.perf_counter()
        self.sampler, self.busy_before = sampler, sampler.busy_s
        self.laps = dict.fromkeys(("build_data", "training", "keep_rollouts", "eval"), 0.0)

    def restart(self) -> None:
        """Restart the lap timer without recording."""
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Record the time since the last lap."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now

    def metrics(self, waited: float) -> dict[str, float]:
        """All laps and the total. The learner is idle while it waits for rollouts, the sampler while it is not busy."""
        total = time.perf_counter() - self.started
        busy = min(self.sampler.busy_s - self.busy_before, total)
        laps = {f"time/{name}": seconds for name, seconds in self.laps.items()}
        idle = {"perf/learner_idle_frac": waited / total, "perf/sampler_idle_frac": 1 - busy / total}
        return laps | idle | {"time/total": total}
