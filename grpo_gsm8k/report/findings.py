"""What a run shows, in sentences: its result, how each stage changed it, and what its curves say."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

from grpo_gsm8k.report.panels import Curves
from grpo_gsm8k.report.read import Run, read_config, read_lines
from grpo_gsm8k.report.words import label, number, p_value, pair, percent, points
from grpo_gsm8k.runs import diagnosis
from grpo_gsm8k.runs.diagnosis import RISING, Finding, trend


def change(first: Mapping[str, Any], last: Mapping[str, Any], paired: Mapping[str, Any] | None, where: str) -> str:
    """One honest sentence on two scores: the paired interval decides, else whether their own overlap."""
    a, b = percent(first["accuracy"]), percent(last["accuracy"])
    on = f"on {number(last.get('n'), '{:,.0f}') or 'an unknown number of'} {where}"
    ci_a, ci_b, ci = pair(first.get("ci95")), pair(last.get("ci95")), pair((paired or {}).get("ci95"))
    gain = last["accuracy"] - first["accuracy"]
    if ci:
        clear = ci[0] > 0 or ci[1] < 0
    elif ci_a and ci_b:
        clear = ci_a[1] < ci_b[0] or ci_b[1] < ci_a[0]
    else:
        return f"From {a} to {b} {on} (no intervals recorded)"
    if not clear:
        return f"No measurable change: {a} before, {b} after, {on}"
    return f"From {a} to {b} {on}" if gain > 0 else f"It got worse: from {a} to {b} {on}"


def headline(run: Run) -> str:
    """The result of a run in one sentence."""
    stages = run.stages
    if rewarded := run.rewarded:
        count = number(rewarded[-1].get("n"), "{:,.0f}") or "an unknown number of"
        before, after = rewarded[0]["reward"], rewarded[-1]["reward"]
        return f"Mean reward from {before:.3f} to {after:.3f} on {count} held-out examples"
    if len(stages) > 1:
        ends = (stages[0]["name"], stages[-1]["name"])
        paired = next((c for c in run.comparisons if (c.get("a"), c.get("b")) == ends), None)
        return change(stages[0], stages[-1], paired, "held-out problems")
    if stages:
        score = f"{label(stages[0]['name'])}: {percent(stages[0]['accuracy'])}"
        count = number(stages[0].get("n"), "{:,.0f}") or "an unknown number of"
        return f"{score} on {count} held-out problems; nothing to compare it with yet"
    for curves in reversed(run.parts.values()):
        scores = [_score(row) for row in curves.rows if number(row.get("val/accuracy"))]
        if len(scores) > 1:
            return change(scores[0], scores[-1], None, "validation problems")
        if scores:
            return f"{percent(scores[0]['accuracy'])} on the validation problems; one evaluation so far"
        for metric, name in (("reward/mean", "Mean reward"), ("loss", "Loss")):
            if values := curves.ends(metric):
                steps = len(curves.series(metric)[0])
                return f"{name} from {values[0]:.3g} to {values[1]:.3g} in {steps:,} steps; accuracy not evaluated"
    return "Nothing recorded yet"


def _score(row: Mapping[str, float]) -> dict[str, Any]:
    """A validation row in the form of a stage."""
    interval = [row.get("val/ci_low"), row.get("val/ci_high")]
    return {"accuracy": row["val/accuracy"], "n": row.get("val/n"), "ci95": interval}


def stage_story(run: Run) -> str:
    """Which stage brought how much, and whether the last one is the best."""
    stages = run.stages
    steps = [
        f"{label(b['name'])} {100 * (b['accuracy'] - a['accuracy']):+.1f}".replace("-", "−")
        for a, b in pairwise(stages)
    ]
    if not steps:
        return ""
    best = max(stages, key=lambda s: float(s["accuracy"]))
    behind = best["accuracy"] - stages[-1]["accuracy"]
    story = f"Change at each stage, in points: {', '.join(steps)}."
    return story + (f" The best stage was {label(best['name'])}, not the last." if behind > 0 else "")


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


def findings(run: Run) -> list[Finding]:
    """What holds the reward of its GRPO stage back, with examples from the last step that kept its samples."""
    curves = run.parts.get("grpo", Curves(()))
    if not curves.rows:
        return []
    folder = run.folders["grpo"]
    config = read_config(folder, run.notes, run.path).get("grpo", {})
    kept = sorted(folder.glob("samples/step_*.jsonl"))
    samples = read_lines(kept[-1], run.notes, run.path, "grpo/samples/") if kept else []
    return diagnosis.diagnose(curves.rows, config, samples)


def readings(curves: Curves, found: Collection[str] = ()) -> list[tuple[bool, str]]:
    """The signals in plain sentences: (nothing to worry about, sentence).

    Args:
        found: names of the findings; what is judged there is not judged again here.
    """
    said = []
    rewards = curves.series("reward/mean")[1]
    if ends := curves.ends("reward/mean"):
        span, slope = f"{ends[0]:.3g} to {ends[1]:.3g}", trend(rewards)
        if len(rewards) < diagnosis.WINDOW:
            said.append((False, f"Only {len(rewards)} steps: too few to say whether the reward moves ({span})."))
        elif abs(slope) < RISING or (slope > 0) != (ends[1] > ends[0]):
            said.append((False, f"The reward did not move beyond its step-to-step noise ({span})."))
        else:
            way = "rose" if slope > 0 else "fell"
            said.append((way == "rose", f"The reward {way} from {span}, beyond its step-to-step noise."))
    if mixed := curves.ends("groups/mixed_frac"):
        text = f"{percent(mixed[1])} of the groups at the end are mixed and still carry a gradient."
        said.append((not {"flat_groups", "too_easy"} & {*found}, text))
    if entropy := curves.ends("policy/entropy"):
        text = f"Entropy went from {entropy[0]:.3g} to {entropy[1]:.3g} nats per token."
        said.append(("entropy" not in found, text))
    if gaps := curves.series("mismatch/logp_abs_mean")[1]:
        text = f"The mean |Δ log p| between sampler and trainer never exceeded {max(gaps):.2g}."
        said.append(("mismatch" not in found, text if max(gaps) else "Sampler and trainer agree to the bit."))
    if cut := curves.ends("outcome/truncated_frac"):
        text = f"{percent(cut[1])} of the responses at the end ran into the token limit."
        said += [("cut_off" not in found, text)] if cut[1] else []
    return said
