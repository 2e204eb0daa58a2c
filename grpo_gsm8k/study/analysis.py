"""What the runs of a study say: every arm against the reference, paired over seeds and problems.

Each comparison is `evals.crossed`'s mixed model; Holm's correction is over the arms. Under `stopping = "fixed"` there
is one look, when every run is done, and no p-value before. Under `always_valid` there is a look after every seed from
the second on, and each p-value is multiplied by the number of looks that the plan has, so that it holds wherever the
study stops (a union bound, which needs nothing of how the looks hang together).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.evals.crossed import Crossed, crossed
from grpo_gsm8k.evals.stats import LEVEL, holm
from grpo_gsm8k.runs.files import read_json
from grpo_gsm8k.study.jobs import START, Job, answers, spent_by
from grpo_gsm8k.study.plan import Arm, Plan, price

Answers = Mapping[str, float]  # problem id → accuracy, or mean reward


@dataclass(frozen=True)
class Verdict:
    """One arm against the reference.

    Attributes:
        found: the mixed model of the differences; its interval holds at every look.
        p_value: of this comparison alone; over the looks so far, times their planned number.
        p_holm: corrected for the number of arms.
        sign: 1 better, -1 worse, 0 not told apart.
    """

    found: Crossed
    p_value: float
    p_holm: float
    sign: int


def decide(reference_S_P: Any, others: Mapping[str, Any], looks: int = 1) -> dict[str, Verdict]:
    """The verdicts on arms whose answers have the reference's shape (seeds, problems).

    Args:
        looks: how many the plan has. With more than one, those after seeds 2, 3, … count, too.
    """
    seeds = len(reference_S_P)
    best: dict[str, Verdict] = {}
    for n in range(2, seeds + 1) if looks > 1 else [seeds]:
        found = {name: crossed(values[:n] - reference_S_P[:n], LEVEL / looks) for name, values in others.items()}
        corrected = holm([one.p_value for one in found.values()])
        for (name, one), p_holm in zip(found.items(), corrected, strict=True):
            now = Verdict(one, min(1.0, looks * one.p_value), min(1.0, looks * p_holm), 0)
            best[name] = _later(best.get(name), now)
    return best


def _later(before: Verdict | None, now: Verdict) -> Verdict:
    """The verdict after another look: a decision stays, the estimate is the newest."""
    sign = (1 if now.found.mean > 0 else -1) if now.p_holm < LEVEL else 0
    if before is None:
        return Verdict(now.found, now.p_value, now.p_holm, sign)
    decided = before.sign or sign
    return Verdict(now.found, min(before.p_value, now.p_value), min(before.p_holm, now.p_holm), decided)


# ------------------------------------------------------------------------------------------------ of a study


@dataclass(frozen=True)
class ArmResult:
    """An arm's runs.

    Attributes:
        seeds, accuracies: of the runs that are done, in the plan's order.
        ci: of the mean over other seeds and problems, of an accuracy from 0 to 1; None for fewer than two seeds.
        tokens, seconds, dollars: of a run, on average.
    """

    arm: Arm
    seeds: list[int]
    accuracies: list[float]
    mean: float | None
    ci: tuple[float, float] | None
    tokens: float
    seconds: float
    dollars: float


@dataclass(frozen=True)
class Analysis:
    """Everything that the page shows.

    Attributes:
        verdicts: arm → verdict; empty before a look that the plan allows.
        differences: arm → difference from the reference over the seeds that both have, without a verdict.
        seeds: whose runs are done in every arm, in the plan's order.
        problems: that each run answered.
        runs, done: how many the plan has, and how many are evaluated.
        stopped: the plan's stopping rule has ended the study before all runs were made.
        graded: accuracies; False for mean rewards.
    """

    arms: list[ArmResult]
    verdicts: dict[str, Verdict]
    differences: dict[str, float]
    seeds: list[int]
    problems: int
    runs: int
    done: int
    stopped: bool
    graded: bool

    @property
    def final(self) -> bool:
        """Whether the verdicts are the study's last word."""
        return self.done == self.runs or self.stopped


def collect(jobs: Sequence[Job]) -> dict[tuple[str, int], Answers]:
    """(arm, seed) → its answers, of the jobs that are done.

    Raises:
        ConfigError: two runs answered different problems.
    """
    kept: dict[tuple[str, int], Answers] = {
        (job.arm, job.seed): answers(job) for job in jobs if job.done and job.seed is not None and job.arm != START
    }
    first = next(iter(kept.values()), {})
    for (arm, seed), own in kept.items():
        if own.keys() != first.keys():
            raise ConfigError(f"{arm}, seed {seed}: answered other problems than the other runs; the data have changed")
    return kept


def complete_seeds(plan: Plan, table: Mapping[tuple[str, int], Answers]) -> list[int]:
    """The seeds with a run of every arm. Those after a gap do not count while looks are allowed: order decides."""
    have = [all((arm.name, seed) in table for arm in plan.arms) for seed in plan.seeds]
    if plan.looks > 1 and not all(have):
        have = [all(have[: i + 1]) for i in range(len(have))]
    return [seed for seed, whole in zip(plan.seeds, have, strict=True) if whole]


def verdicts_of(plan: Plan, table: Mapping[tuple[str, int], Answers]) -> dict[str, Verdict]:
    """The verdicts, where the plan allows a look; else none."""
    import numpy as np

    seeds = complete_seeds(plan, table)
    if len(seeds) < 2 or (plan.looks == 1 and len(seeds) < len(plan.seeds)):
        return {}
    ids = sorted(table[plan.reference.name, seeds[0]])
    values = {arm.name: np.array([[table[arm.name, seed][key] for key in ids] for seed in seeds]) for arm in plan.arms}
    return decide(values[plan.reference.name], {arm.name: values[arm.name] for arm in plan.others}, plan.looks)


def is_decided(plan: Plan, jobs: Sequence[Job]) -> bool:
    """Whether an always-valid study may stop: every comparison has its verdict."""
    if plan.looks == 1:
        return False
    verdicts = verdicts_of(plan, collect(jobs))
    return bool(verdicts) and all(one.sign for one in verdicts.values())


def analyse(plan: Plan, jobs: Sequence[Job]) -> Analysis:
    """The study as far as it is done."""
    table = collect(jobs)
    verdicts = verdicts_of(plan, table)
    ended = [job for job in jobs if job.done]
    rows = [read_json(job.summary) for job in ended if job.arm != START]
    seeds, graded = complete_seeds(plan, table), all(row["accuracy"] is not None for row in rows)
    arms = [_arm_result(plan, arm, jobs, table) for arm in plan.arms]
    if graded:  # an interval by Student's t knows no bounds, an accuracy has them
        arms = [replace(one, ci=one.ci and _within(one.ci, 0.0)) for one in arms]
        verdicts = {
            name: replace(one, found=replace(one.found, ci=_within(one.found.ci, -1.0)))
            for name, one in verdicts.items()
        }
    return Analysis(
        arms=arms,
        verdicts=verdicts,
        differences={arm.name: gap for arm in plan.others if (gap := _gap(plan, arm, table)) is not None},
        seeds=seeds,
        problems=rows[0]["n"] if rows else plan.problems,
        runs=len(jobs),
        done=len(ended),
        stopped=len(ended) < len(jobs) and bool(verdicts) and plan.looks > 1 and all(v.sign for v in verdicts.values()),
        graded=graded,
    )


def _within(ci: tuple[float, float], least: float) -> tuple[float, float]:
    return max(ci[0], least), min(ci[1], 1.0)


def _arm_result(plan: Plan, arm: Arm, jobs: Sequence[Job], table: Mapping[tuple[str, int], Answers]) -> ArmResult:
    import numpy as np

    mine = [job for job in jobs if job.arm == arm.name and job.done]
    own = [table[arm.name, job.seed] for job in mine if job.seed is not None]
    used = [spent_by(job.content) for job in mine]
    found = crossed(np.array([[one[key] for key in sorted(one)] for one in own])) if len(own) > 1 else None
    accuracies = [fmean(one.values()) for one in own]

    def mean(what: str) -> float:
        return fmean(one.of(what, price(plan, arm)) for one in used) if used else 0.0

    return ArmResult(
        arm,
        [job.seed for job in mine if job.seed is not None],
        accuracies,
        fmean(accuracies) if accuracies else None,
        found.ci if found else None,
        *(mean(what) for what in ("tokens", "seconds", "dollars")),
    )


def _gap(plan: Plan, arm: Arm, table: Mapping[tuple[str, int], Answers]) -> float | None:
    pairs = [
        (table[arm.name, seed], table[plan.reference.name, seed])
        for seed in plan.seeds
        if (arm.name, seed) in table and (plan.reference.name, seed) in table
    ]
    return fmean(fmean(a.values()) - fmean(b.values()) for a, b in pairs) if pairs else None


def as_json(analysis: Analysis, reference: Arm) -> dict[str, Any]:
    """The figures as plain JSON."""
    arms = [
        {
            "arm": one.arm.name,
            "label": one.arm.label,
            "stage": one.arm.stage,
            **{key: value for key, value in asdict(one).items() if key != "arm"},
        }
        for one in analysis.arms
    ]
    rows = []
    for one in analysis.arms:
        if one.arm.name == reference.name:
            continue
        verdict = analysis.verdicts.get(one.arm.name)
        row: dict[str, Any] = {"arm": one.arm.name, "against": reference.name}
        row["difference"] = verdict.found.mean if verdict else analysis.differences.get(one.arm.name)
        row |= dict.fromkeys(("ci95", "p_value", "p_holm", "verdict"))
        if verdict:
            row |= {"ci95": verdict.found.ci, "p_value": verdict.p_value, "p_holm": verdict.p_holm}
            row |= {"verdict": {1: "better", -1: "worse", 0: "not told apart"}[verdict.sign]}
            row |= {key: getattr(verdict.found, key) for key in ("seeds", "seed_sd", "problem_sd", "rest_sd")}
        rows.append(row)
    known = {key: getattr(analysis, key) for key in ("problems", "graded", "final")}
    return {"arms": arms, "comparisons": rows, **known}
