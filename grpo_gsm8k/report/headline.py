"""The result of a run in words: its headline, what each stage brought, and the paired comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from grpo_gsm8k.report.changes import Change, stage_change, validation_change
from grpo_gsm8k.report.findings import validation
from grpo_gsm8k.report.read import Run
from grpo_gsm8k.report.words import label, number, p_value, pair, percent, points, signed


def headline(run: Run) -> str:
    """The result of a run in one sentence."""
    stages, rewarded = run.stages, run.rewarded
    if rewarded:
        return _verdict(stage_change(run, rewarded[0], rewarded[-1]), rewarded[0], rewarded[-1], "held-out examples")
    if len(stages) > 1:
        return _verdict(stage_change(run, stages[0], stages[-1]), stages[0], stages[-1], "held-out problems")
    if stages:
        score = f"{label(stages[0]['name'])}: {percent(stages[0]['accuracy'])}"
        return f"{score} on {_count(stages[0].get('n'))} held-out problems; nothing to compare it with yet"
    for kind in reversed(run.parts):
        if said := _of_training(run, kind):
            return said
    return "Nothing recorded yet"


def _of_training(run: Run, kind: str) -> str:
    """The result of a training run: its validation, else how its reward or loss went; "" without any."""
    curves = run.parts[kind]
    if found := validation_change(run, kind):
        key = found.metric.removeprefix("val/")
        ends = [{key: score, "n": found.n} for score in (found.before, found.after)]
        where = "validation problems" if key == "accuracy" else "validation examples"
        return _verdict(found.change, ends[0], ends[1], where, [f"at step {step:,}" for step in found.steps])
    for metric, form in (("val/accuracy", percent), ("val/reward", number)):
        if scores := curves.series(metric)[1]:
            what = "on the validation problems" if form is percent else "mean reward in validation"
            return f"{form(scores[-1])} {what}; one evaluation so far"
    for metric, name in (("reward/mean", "Mean reward"), ("loss", "Loss")):
        if values := curves.ends(metric):
            steps = len(curves.series(metric)[0])
            moved = f"from {values[0]:.3g} to {values[1]:.3g} in {steps:,} step{'s'[: steps != 1]}"
            return f"{name} {moved}; accuracy not evaluated"
    return ""


def _count(n: object) -> str:
    return number(n, "{:,.0f}") or "an unknown number of"


def _verdict(
    change: Change | None,
    first: Mapping[str, Any],
    last: Mapping[str, Any],
    where: str,
    when: Sequence[str] = ("before", "after"),
) -> str:
    """One honest sentence on two scores; the interval of their difference decides."""
    graded = bool(number(first.get("accuracy")))
    a, b = (percent(row["accuracy"]) if graded else f"{row['reward']:.3f}" for row in (first, last))
    what, on = "" if graded else "mean reward ", f"on {_count(last.get('n'))} {where}"
    if change and not change.clear:
        return f"No measurable change: {what}{a} {when[0]}, {b} {when[1]}, {on}"
    if when[0] != "before":
        a, b = f"{a} {when[0]}", f"{b} {when[1]}"
    if change and change.size < 0:
        return f"It got worse: {what}from {a} to {b} {on}"
    doubt = "" if change else " (no intervals recorded)"
    return f"{what.capitalize() + 'from' if what else 'From'} {a} to {b} {on}{doubt}"


def lead_sentence(run: Run) -> str:
    """What stands below the headline: the stages' shares in it, or the interval of a training run's validation."""
    if run.stages or run.rewarded:
        return stage_story(run)
    found = next((v for kind in reversed(run.parts) if (v := validation_change(run, kind))), None)
    return " ".join(one.text for one in validation(found))


def stage_story(run: Run) -> str:
    """What each stage brought, with its interval, and whether the last one is the best."""
    stages = run.stages or run.rewarded
    if len(stages) < 2:
        return ""
    graded = bool(run.stages)
    steps = [f"{label(b['name'])} {_gain(run, a, b, graded)}" for a, b in pairwise(stages)]
    unit = "in points of accuracy" if graded else "in mean reward"
    story = f"Change at each stage, {unit}, with 95 % intervals: {'; '.join(steps)}."
    key = "accuracy" if graded else "reward"
    best = max(stages, key=lambda s: float(s[key]))
    if best[key] <= stages[-1][key]:
        return story
    fall = stage_change(run, best, stages[-1])
    noise = ", but the difference is within noise" if fall and not fall.clear else ""
    return f"{story} The best stage was {label(best['name'])}, not the last{noise}."


def _gain(run: Run, a: Mapping[str, Any], b: Mapping[str, Any], graded: bool) -> str:
    change = stage_change(run, a, b)
    if graded:
        gain = signed(100 * (b["accuracy"] - a["accuracy"]), "{:+.1f}")
        return f"{gain} ({points((change.low, change.high))})" if change else gain
    gain = signed(b["reward"] - a["reward"], "{:+.3f}")
    return f"{gain} ({signed(change.low, '{:+.3f}')} to {signed(change.high, '{:+.3f}')})" if change else gain


def comparison_sentence(c: Mapping[str, Any]) -> str:
    """A paired comparison between two stages in words."""
    a, b, ci = label(c.get("a")), label(c.get("b")), pair(c.get("ci95")) or (0.0, 0.0)
    gain = number(100 * c["difference"], "{:+.1f}") if number(c.get("difference")) else "?"
    counts = f"{b} solved {number(c.get('won'), '{:,.0f}') or '?'} that {a} missed"
    counts += f" and missed {number(c.get('lost'), '{:,.0f}') or '?'} that {a} solved"
    clear = "" if ci[0] > 0 or ci[1] < 0 else " This may be luck: the interval includes zero."
    p = f"exact McNemar p\u00a0{p_value(c.get('p_value'))}"
    n = f"n\u00a0=\u00a0{number(c.get('n'), '{:,.0f}') or '?'}"
    return f"{counts}: {gain} points (95 % CI {points(ci)}; {p}; {n}).{clear}"
