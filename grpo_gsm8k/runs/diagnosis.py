"""Why the reward does not move: a GRPO run's metrics in, findings in words out.

    for finding in diagnose(rows, config, samples):  # heaviest first; none for a run that learns
        print(finding.seen, finding.why, finding.todo)

A finding holds over the last `WINDOW` steps. Those of `ALWAYS` are said whatever the reward does; the others are
looked for only while it is stuck: it does not rise, and the problems are not solved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, variance
from typing import Any

from grpo_gsm8k.runs.progress import say

Row = Mapping[str, Any]

WINDOW = 10  # steps: with 64 independent rollouts each, a share is known to ± 4 points (two standard errors)
RECENT = 50  # steps that say whether the reward rises now, so that an early rise does not excuse a late plateau
RISING = 2.0  # standard errors of the slope; in runs of the demo that learned, 1.7 to 4.8 after ten steps
FALLING, FALL_STEPS = 5.0, 20  # looked for at every step: at 5, one of 200 runs of 500 steps without a trend says so
SOLVED = 0.9  # right answers: what is left moves by less than its noise, and no group is expected to vary
FLAT = 0.9  # groups of equal rewards: nine of ten prompts are sampled for nothing
LOST, MOSTLY = 0.25, 0.5  # completions without an answer to grade: when stuck; and even when the reward rises
NEVER = 0.01  # right answers: of a hundred groups of eight, fewer than eight have one to learn from
MISMATCH = 0.02  # mean |Δ log p|: twice what SkyRL's tests tolerate (0.0104); float32 on a CPU has 4e-7
CLIPPED = 0.2  # tokens: a fifth of what was sampled has no gradient
DRIFT = 0.1  # nats from the sampling policy within a step; Spinning Up's PPO stops a step at 0.015
KL_PULL = 0.1  # of an advantage's size: advantages of both signs mostly cancel, the penalty never does
ENTROPY_KEPT = 0.2  # of the entropy at the start
ENTROPY_LEFT = 1.0  # nats of a whole response: two samples are the same text with a probability above exp(-1)
TRAVEL = 1e-4  # of the weights' norm, by all steps of a run together; the demo's 50 steps come to 2e-2
BF16_CHANGED = 2e-3  # of the bfloat16 weights in a step; see `small_steps`
STALL_STEPS = 50  # before a run without any known cause is called stalled
EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """One thing that holds the reward back, or (not `alarm`) that looks like a fault and is none.

    Attributes:
        name: the same for the same finding, whatever its figures.
        seen, why, todo: what is seen, with figures; why it matters; what to do.
        examples: rows of `samples/`, of different problems.
    """

    name: str
    seen: str
    why: str
    todo: str
    examples: tuple[Row, ...] = ()
    alarm: bool = True


@dataclass(frozen=True)
class Case:
    """What the checks look at: the metrics of all steps so far, the config, some sampled rows."""

    rows: Sequence[Row]
    cfg: Mapping[str, Any]
    samples: Sequence[Row] = ()

    @property
    def stuck(self) -> bool:
        """Whether the reward does not rise although it could; of a student, whether its teacher stays as far away."""
        goal = [-kl for kl in self.values("distill/reverse_kl", RECENT)] or self.values("reward/mean", RECENT)
        rising = trend(goal) >= RISING
        return not rising and not self.mean("outcome/right_frac") >= SOLVED

    def values(self, name: str, last: int = WINDOW) -> list[float]:
        """A metric in the last steps, where it was recorded and finite."""
        return [row[name] for row in self.rows[-last:] if math.isfinite(row.get(name, math.nan))]

    def mean(self, name: str) -> float:
        """Over the last steps; NaN, which no threshold is below or above, where it was not recorded."""
        return _mean(self.values(name))

    def settled(self, name: str) -> list[float]:
        """A metric in all steps after the warm-up."""
        rows = [row for row in self.rows if row["step"] > self.cfg.get("warmup_steps", 0)]
        return Case(rows, self.cfg).values(name, len(rows))

    def setting(self, name: str) -> str:
        """`name = value` as configured, or only the name."""
        return f"{name} = {self.cfg[name]}" if name in self.cfg else name

    def pick(self, wanted: str) -> tuple[Row, ...]:
        """Up to `EXAMPLES` sampled rows with this outcome, each of another problem."""
        by_problem: dict[Any, Row] = {}
        for row in self.samples:
            if outcome(row) == wanted:
                by_problem.setdefault(row.get("id"), row)
        return tuple(by_problem.values())[:EXAMPLES]


def diagnose(rows: Sequence[Row], cfg: Mapping[str, Any], samples: Sequence[Row] = ()) -> list[Finding]:
    """What holds the reward back, heaviest first; empty for a run that learns, or is too young to tell.

    Args:
        rows: of `metrics.jsonl`, one a step, in order.
        cfg: the run's settings; what is missing is not spoken of.
        samples: rows of `samples/` of a late step, for examples and for the reward's bearing on right and wrong.
    """
    case = Case(rows, cfg, samples)
    if len(rows) < WINDOW:
        return []
    taught = "teacher" in cfg
    checks = [check for check in (TAUGHT if taught else CHECKS) if case.stuck or check in ALWAYS]
    found = [finding for check in checks if (finding := check(case))]
    if taught:
        return found
    if not found and (finding := stalled(case)):
        found = [finding]
    note = loss_note(rows) if any(finding.alarm for finding in found) else None
    return [*found, note] if note else found


def announce(rows: Sequence[Row], cfg: Mapping[str, Any], said: Sequence[str]) -> list[str]:
    """Say on stderr what `diagnose` finds and has not been said; returns the names of all that has been.

    It depends on its arguments alone: a run that continues from a checkpoint, which keeps `said`, says what the
    uninterrupted one would have said.
    """
    rows = [row for row in rows if "reward/mean" in row]  # a late evaluation has a row of its own
    fresh = [finding for finding in diagnose(rows, cfg) if finding.name not in said]
    for finding in fresh:
        kind = "warning" if finding.alarm else "note"
        say(f"{kind}: step {rows[-1]['step']:g}: {finding.seen} {finding.why} {finding.todo}")
    return [*said, *(finding.name for finding in fresh)]


def outcome(row: Row) -> str:
    """A row of `samples/` by the outcomes that the metrics count: right, truncated, format_error or wrong."""
    if row.get("correct"):
        return "right"
    if row.get("finish_reason") == "length":
        return "truncated"
    return "wrong" if row.get("format_ok") else "format_error"


def noise(values: Sequence[float]) -> float:
    """Standard deviation between steps, from the differences of neighbours, so that a trend is none of it."""
    return math.sqrt(sum((b - a) ** 2 for a, b in pairwise(values)) / (2 * max(len(values) - 1, 1)))


def trend(values: Sequence[float]) -> float:
    """Slope over its standard error."""
    n = len(values)
    middle = (n - 1) / 2
    rise = sum((i - middle) * value for i, value in enumerate(values))
    return rise / (sd * math.sqrt((n**3 - n) / 12)) if (sd := noise(values)) else 0.0


def ends(values: Sequence[float]) -> tuple[float, float]:
    """The means of the first and of the last tenth."""
    k = max(1, len(values) // 10)
    return _mean(values[:k]), _mean(values[-k:])


def end_error(values: Sequence[float]) -> float:
    """Standard error of either of the `ends`, if the steps' noise is independent."""
    return noise(values) / math.sqrt(max(1, len(values) // 10))


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


# ------------------------------------------------------------------- the checks, in the order of CHECKS


def frozen(case: Case) -> Finding | None:
    """A gradient, and weights that stay as they are."""
    steps, gradient = case.values("policy/update_to_weight"), case.mean("policy/grad_norm")
    if not steps or max(steps) > 0 or not gradient > 0:
        return None
    return Finding(
        "frozen",
        f"The weights do not move: the gradient's norm is {gradient:.2g}, and the update is 0 "
        f"({case.setting('lr')}, applied {case.mean('policy/lr'):.2g}).",
        "Nothing that is sampled can change the policy.",
        "Raise --lr.",
    )


def mismatch(case: Case) -> Finding | None:
    """Sampler and trainer give the same tokens other probabilities before the first update of a step."""
    gap = case.mean("mismatch/logp_abs_mean")
    if not gap >= MISMATCH:
        return None
    return Finding(
        "mismatch",
        f"Sampler and trainer disagree: the log-probabilities of the sampled tokens differ by {gap:.2g} on average.",
        "The ratios then correct for errors of arithmetic, or for weights that never reached the sampler, "
        "and the gradient is of a policy that was not sampled.",
        "Try --dtype float32; if the gap stays, the weights that are sampled are not those that are trained. "
        "--old_logprobs recompute takes the gap out of the ratios, not out of the samples.",
    )


def control(case: Case) -> Finding | None:
    """`--reward random` is meant to stay where it is."""
    if case.cfg.get("reward") != "random":
        return None
    return Finding(
        "control",
        f"The reward is a coin (reward = random) and stays near 0.5 whatever the policy does; "
        f"{_share(case.mean('outcome/right_frac'))} of the answers are right.",
        "This is the control: what changes under it changes without being taught.",
        "Leave --reward out to learn from right and wrong.",
        alarm=False,
    )


def blind_reward(case: Case) -> Finding | None:
    """Right answers are not rewarded more than wrong ones. Needs samples, twenty of each."""
    graded = [row for row in case.samples if isinstance(row.get("reward"), int | float)]
    right = [row["reward"] for row in graded if outcome(row) == "right"]
    wrong = [row["reward"] for row in graded if outcome(row) != "right"]
    if case.cfg.get("reward") == "random" or min(len(right), len(wrong)) < 20 or len({*right, *wrong}) == 1:
        return None
    error = math.sqrt(variance(right) / len(right) + variance(wrong) / len(wrong))
    if fmean(right) - fmean(wrong) > 2 * error:
        return None
    return Finding(
        "blind_reward",
        f"Right answers got a reward of {fmean(right):.2g} on average, wrong ones {fmean(wrong):.2g} "
        f"({len(right)} and {len(wrong)} samples).",
        "What is rewarded is not that the answer is right.",
        f"Look at the reward function ({case.setting('reward')}): its components are logged as reward/<name>.",
    )


def flat_groups(case: Case) -> Finding | None:
    """Groups of equal rewards have no advantages."""
    flat, gradient = case.mean("groups/zero_std_frac"), case.mean("policy/grad_norm")
    wrong, right = case.mean("groups/all_wrong_frac"), case.mean("groups/all_right_frac")
    if not flat >= FLAT or right >= FLAT:
        return None
    rewards = {*case.values("reward/min"), *case.values("reward/max")}
    if len(rewards) == 1 and case.cfg.get("reward", "default") != "default":
        todo = f"Look at the reward function ({case.setting('reward')}): does it ever return another number?"
    elif wrong >= flat / 2:
        todo = (
            "Begin with a model that solves some of the problems (sft, then ei), take easier ones, or sample more "
            f"completions of each ({case.setting('group_size')})."
        )
    else:
        todo = "Sample more completions of each problem, or let --resample_zero_variance look for problems that vary."
    same = f", {rewards.pop():g} for every completion" if len(rewards) == 1 else ""
    return Finding(
        "flat_groups",
        f"In {_share(flat)} of the groups all rewards are equal{same} ({_share(wrong)} of the groups are all wrong, "
        f"{_share(right)} all right).",
        "An advantage is relative to its group, so these add nothing to the gradient"
        + (f" (its norm: {gradient:.2g})." if gradient >= 0 else "."),
        todo,
    )


def cut_off(case: Case) -> Finding | None:
    """Completions that ran into the token limit before they had an answer."""
    cut = case.mean("outcome/truncated_frac")
    by_grade = case.cfg.get("reward", "default") == "default"
    if not cut >= (LOST if case.stuck else MOSTLY if by_grade else math.inf):
        return None
    why = "What is cut is graded wrong, whatever it was about to say"
    if not case.cfg.get("mask_truncated"):
        why += ": if anything is taught, it is brevity"
    else:
        why += ", and mask_truncated leaves it out of the loss"
        why += "" if case.values("policy/grad_norm") else ": no update was made at all"
    return Finding(
        "cut_off",
        f"{_share(cut)} of the completions were cut off without a right answer ({case.setting('max_new_tokens')}).",
        f"{why}.",
        "If they are on their way to an answer, raise --max_new_tokens; if they ramble, teach the model to end (sft).",
        case.pick("truncated"),
    )


def format_errors(case: Case) -> Finding | None:
    """Completions that ended by themselves, wrong and not in the form that was asked for."""
    lost = case.mean("outcome/format_error_frac")
    if not lost >= LOST:
        return None
    return Finding(
        "format_errors",
        f"{_share(lost)} of the completions ended without a well-formed answer "
        f"({case.setting('prompt_style')}, {case.setting('grading')}).",
        "A right result in the wrong form counts as wrong.",
        "If the examples hold right results, the prompt and the model disagree about the form: try another "
        "--prompt_style or --grading flexible. If not, teach the form first (sft).",
        case.pick("format_error"),
    )


def wrong_answers(case: Case) -> Finding | None:
    """Well-formed and wrong, and hardly ever right."""
    wrong, right = case.mean("outcome/wrong_frac"), case.mean("outcome/right_frac")
    if not (wrong >= LOST and right <= NEVER):
        return None
    return Finding(
        "wrong_answers",
        f"{_share(wrong)} of the completions hold a well-formed answer that is wrong; {_share(right)} are right.",
        "GRPO makes likelier what is sampled and right; it cannot find what is never sampled.",
        "See from the examples that answers and gold are as you expect; then begin with sft, or with easier problems.",
        case.pick("wrong"),
    )


def small_steps(case: Case) -> Finding | None:
    """A learning rate too small to get anywhere in this run, or to show in bfloat16.

    The optimizer's float32 masters lose nothing. But they begin on bfloat16's grid, and the rounded copy that
    samples follows only where a master has moved half a step of that grid (0.2 to 0.4 % of the weight). Measured
    on Gaussian weights of 0.02 with noisy gradients: at --lr 1e-6 1 to 3 % of the copy change in a step, and
    after 200 steps it has made 55 to 100 % of the masters' way; at 1e-7 0.1 to 0.4 %, and 6 to 18 %.
    """
    steps, changed = case.settled("policy/update_to_weight"), case.settled("policy/bf16_changed_frac")
    if len(steps) < WINDOW or not case.mean("policy/grad_norm") > 0 or not fmean(steps) > 0:
        return None
    travel, rate = fmean(steps) * case.cfg.get("steps", len(steps)), case.setting("lr")
    if travel < TRAVEL:
        seen = f"All steps of this run together move the weights by at most {_share(travel)} of their norm ({rate})."
        return Finding("small_steps", seen, "The policy stays what it was.", "Raise --lr.")
    if not _mean(changed) < BF16_CHANGED:
        return None
    return Finding(
        "small_steps",
        f"Only {_share(fmean(changed))} of the bfloat16 weights change in a step ({rate}).",
        "The float32 masters keep every update, but the copy that samples follows only where one has moved by half "
        "a bfloat16 step, 0.2 to 0.4 % of the weight: for hundreds of steps it sees little of what is learned.",
        "Raise --lr, run for longer, or try --dtype float32.",
    )


def clip(case: Case) -> Finding | None:
    """The updates of a step leave the region in which its samples can be trusted."""
    clipped, kl = case.mean("policy/clip_frac"), case.mean("policy/approx_kl")
    if not (clipped >= CLIPPED or kl >= DRIFT):
        return None
    return Finding(
        "clip",
        f"The updates of a step go too far: {_share(clipped)} of the tokens are clipped, and the policy is "
        f"{kl:.2g} nats from the one that sampled.",
        "Clipped tokens have no gradient, and the others are weighted by ratios far from 1.",
        f"Lower --lr, or make fewer updates per step ({case.setting('epochs')}, {case.setting('minibatches')}).",
    )


def kl_penalty(case: Case) -> Finding | None:
    """The penalty for leaving the reference weighs as much as the reward."""
    coefficient, kl = case.cfg.get("kl_coef", 0.0), case.mean("policy/kl_ref")
    size = 1.0 if case.cfg.get("std_norm", True) else case.mean("reward/std")
    if not coefficient * kl > 0 or not coefficient * kl >= KL_PULL * size:
        return None
    return Finding(
        "kl_penalty",
        f"The KL penalty is {coefficient * kl:.2g} per token (kl_coef = {coefficient:g}, {kl:.2g} nats from the "
        f"reference), against advantages of about {size:.2g}.",
        "Advantages of both signs mostly cancel, the penalty never does: the policy is held where it is.",
        "Lower --kl_coef; with verifiable rewards 0 is usual.",
    )


def entropy(case: Case) -> Finding | None:
    """The samples of a group have become alike."""
    now, first = case.mean("policy/entropy"), ends(case.values("policy/entropy", len(case.rows)))[0]
    whole = now * case.mean("length/mean")  # of a response, in nats
    if not (now < ENTROPY_KEPT * first or whole < ENTROPY_LEFT):
        return None
    return Finding(
        "entropy",
        f"The entropy is {now:.2g} nats per token, {whole:.2g} per response; it began at {first:.2g} per token.",
        "The samples of a group become alike, and their rewards with them"
        + (f": two are the same text with a probability of {_share(math.exp(-whole))} or more." if whole < 1 else "."),
        "Begin again from an earlier checkpoint with a lower --lr or a higher --temperature; with several updates "
        "per step a higher --clip_eps_high lets rare tokens grow (DAPO, arXiv 2503.14476).",
    )


def fell(case: Case) -> Finding | None:
    """The reward went down, by far more than its noise."""
    rewards = case.values("reward/mean", RECENT)
    if len(rewards) < FALL_STEPS or trend(rewards) > -FALLING:
        return None
    before, now = ends(rewards)
    return Finding(
        "fell",
        f"The reward fell from {before:.3g} to {now:.3g} in the last {len(rewards)} steps, far beyond its noise.",
        "Steps that are too large wear away what the model knew.",
        f"Begin again from an earlier checkpoint with a lower --lr ({case.setting('lr')}).",
    )


def too_easy(case: Case) -> Finding | None:
    """Nothing is left to compare, because everything is right."""
    right = case.mean("groups/all_right_frac")
    if not right >= FLAT or not case.mean("groups/zero_std_frac") >= FLAT:
        return None
    return Finding(
        "too_easy",
        f"The problems are solved: in {_share(right)} of the groups every completion is right.",
        "Such a group has no advantages, so further steps sample much and learn little.",
        "Stop here, take harder problems, or let --resample_zero_variance look for problems that still vary.",
    )


def stalled(case: Case) -> Finding | None:
    """A reward that never rose, for no reason that is known here."""
    rewards = case.values("reward/mean", len(case.rows))
    if not case.stuck or len(rewards) < STALL_STEPS or trend(rewards) >= RISING:
        return None
    before, now = ends(rewards)
    step = case.mean("policy/update_to_weight")
    return Finding(
        "stalled",
        f"In {len(rewards)} steps the reward has not risen beyond its noise ({before:.3g} to {now:.3g}), "
        "and none of the known reasons is seen.",
        f"A step moves the weights by {step:.1g} of their norm.",
        f"Try a higher --lr ({case.setting('lr')}), or more completions per step "
        f"({case.setting('rollouts_per_step')}): the noise falls with their square root.",
    )


def loss_note(rows: Sequence[Row]) -> Finding | None:
    """The loss of GRPO says nothing, and it should be said. None where the gradient vanishes too."""
    case = Case(rows, {})
    losses, gradient = case.values("loss"), case.mean("policy/grad_norm")
    if not losses or max(map(abs, losses)) > 0.01 or not gradient > 0:
        return None
    return Finding(
        "loss",
        f"The loss is near 0 ({_mean(losses):.1g}), and that is as it should be: the advantages of a group sum to 0 "
        f"and the ratios begin at 1. Its gradient is not 0 (norm {gradient:.2g}).",
        "The loss of GRPO does not fall while the model learns.",
        "Watch the reward instead.",
        alarm=False,
    )


Check = Callable[[Case], Finding | None]
CHECKS: tuple[Check, ...] = (  # heaviest first: what makes all else pointless before what takes a part of the gradient
    *(frozen, mismatch, control, blind_reward, flat_groups, cut_off, format_errors, wrong_answers),
    *(small_steps, clip, kl_penalty, entropy, fell, too_easy),
)
TAUGHT: tuple[Check, ...] = (frozen, mismatch, small_steps, clip)  # the others speak of learning from rewards
ALWAYS: tuple[Check, ...] = (frozen, mismatch, control, cut_off, too_easy)
