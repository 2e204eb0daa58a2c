"""The answer of a study in words."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_gsm8k.report.words import number, p_value, percent
from grpo_gsm8k.study.analysis import Analysis, ArmResult, Verdict
from grpo_gsm8k.study.plan import Plan


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def capital(text: str) -> str:
    """With a capital letter in front."""
    return text[:1].upper() + text[1:]


def score(analysis: Analysis, value: float | None) -> str:
    """An accuracy in percent, or a mean reward."""
    if value is None:
        return "–"
    return percent(value) if analysis.graded else number(value, "{:.3f}")


def gap(analysis: Analysis, value: float, unit: bool = True) -> str:
    """A difference in points of accuracy, or of mean reward."""
    if not analysis.graded:
        return number(value, "{:+.3f}")
    return number(100 * value, "{:+.1f}") + ("\u00a0points" if unit else "")


def headline(plan: Plan, analysis: Analysis) -> str:
    """One sentence: who beats the reference, whom it beats, and who is not told apart."""
    if not analysis.verdicts:
        return f"Not decided yet: {analysis.done} of {analysis.runs} runs are done"
    labels = {arm.name: arm.label for arm in plan.arms}
    groups = {
        sign: [labels[name] for name, verdict in analysis.verdicts.items() if verdict.sign == sign]
        for sign in (1, -1, 0)
    }
    reference = plan.reference.label
    parts = []
    if groups[-1]:
        parts.append(f"{reference} beats {listed(groups[-1])}")
    if groups[1]:
        parts.append(f"{listed(groups[1])} {'beats' if len(groups[1]) == 1 else 'beat'} {reference}")
    if groups[0]:
        told = "is" if len(groups[0]) == 1 else "are"
        whom = "it" if groups[-1] and not groups[1] else reference
        parts.append(f"{listed(groups[0])} {told} not told apart from {whom}")
    early = "" if analysis.final else f" (so far: {analysis.done} of {analysis.runs} runs)"
    return capital("; ".join(parts)) + early


def sentences(plan: Plan, analysis: Analysis) -> list[str]:
    """A sentence on each comparison; before the planned look, on what is withheld."""
    by_name = {one.arm.name: one for one in analysis.arms}
    if analysis.verdicts:
        return [_sentence(plan, analysis, by_name[name], verdict) for name, verdict in analysis.verdicts.items()]
    missing = [one.arm.label for one in analysis.arms if len(one.seeds) < len(plan.seeds)]
    return [
        f"{capital(listed(missing))} {'lacks' if len(missing) == 1 else 'lack'} runs."
        if missing
        else "No run of a seed is complete.",
        "The plan has one look at the results, when all runs are done; until then the page gives no interval and no "
        "p-value: who stops at a good moment is fooled by it."
        if plan.looks == 1
        else "The first look is when two seeds are complete in every arm.",
    ]


def _sentence(plan: Plan, analysis: Analysis, one: ArmResult, verdict: Verdict) -> str:
    reference = next(other for other in analysis.arms if other.arm.name == plan.reference.name)
    means = f"{score(analysis, one.mean)} against {score(analysis, reference.mean)}"
    low, high = verdict.found.ci
    width = f"{100 - 5 / plan.looks:.4g}\u00a0%"
    interval = f"{width} interval {gap(analysis, low, False)} to {gap(analysis, high, False)}"
    p = f"p\u00a0{p_value(verdict.p_holm)} after Holm"
    what = f"{gap(analysis, verdict.found.mean)} ({interval}; {p})"
    name, other = capital(one.arm.label), reference.arm.label
    if verdict.sign:
        return f"{name} is {'better' if verdict.sign > 0 else 'worse'} than {other}: {means}, {what}."
    effect = plan.power.effect
    size = gap(analysis, effect).lstrip("+")
    bound = (
        f"A difference of the planned {size} either way is ruled out"
        if max(abs(low), abs(high)) < effect
        else f"A difference of the planned {size} is not ruled out"
    )
    return f"{name} is not told apart from {other}: {means}, {what}. {bound}."
