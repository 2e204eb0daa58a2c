"""What a training run's curves say, in sentences with their intervals, and what holds its reward back.

A curve that ends lower than it began may have fallen or may only be noisy, and a long slow loss of entropy looks like
a calm line. Each reading says which it is, and by how much.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from grpo_gsm8k.report.changes import Change, Validated, over_steps, validation_change
from grpo_gsm8k.report.panels import Curves
from grpo_gsm8k.report.read import Run, read_config, read_lines
from grpo_gsm8k.report.words import number, percent, points, signed
from grpo_gsm8k.runs import diagnosis
from grpo_gsm8k.runs.diagnosis import Finding

TONES = {  # in the order in which they are listed: what needs a look comes first
    "worse": "worse",
    "watch": "watch",
    "better": "better",
    "noise": "within noise",
    "note": "note",
}
COLLAPSED, WILD, LONGER = 0.4, 2.0, 1.5  # of the entropy at the start; of the length at the start
FEW_MIXED = 0.2  # groups with a gradient
MOVED = 0.1  # of the length at the start: less is not worth a sentence


@dataclass(frozen=True)
class Reading:
    """One thing that the curves say, and whether it is good news: a key of `TONES`."""

    tone: str
    text: str


def findings(run: Run, kind: str = "grpo") -> list[Finding]:
    """What holds its GRPO stage (or a distillation) back, with examples from the last step that kept its samples."""
    curves = run.parts.get(kind, Curves(()))
    if not curves.rows:
        return []
    folder = run.folders[kind]
    config = read_config(folder, run.notes, run.path).get(kind, {})
    kept = sorted(folder.glob("samples/step_*.jsonl"))
    samples = read_lines(kept[-1], run.notes, run.path, f"{kind}/samples/") if kept else []
    return diagnosis.diagnose(curves.rows, config, samples)


def readings(run: Run, kind: str = "grpo", found: Collection[str] = ()) -> list[Reading]:
    """What the curves of a training run say, what needs a look first.

    Args:
        kind: sft, ei, grpo or distill.
        found: names of the findings; what is judged there is not judged again here.
    """
    curves, validated = run.parts[kind], validation_change(run, kind)
    if kind == "grpo":
        moved = None if {"stalled", "fell"} & {*found} else reward(curves)
        rose = moved is not None and moved.tone == "better"
        said = [
            moved,
            *validation(validated),
            unshared(curves, validated),
            None if "entropy" in found else entropy(curves),
            None if {"flat_groups", "too_easy"} & {*found} else mixed_groups(curves),
            length(curves, rose),
            None if "mismatch" in found else agreement(curves),
            None if "cut_off" in found else cut_off(curves),
        ]
    elif kind == "distill":
        near = distance(curves)
        closer = near is not None and near.tone == "better"
        said = [near, *validation(validated), length(curves, closer), agreement(curves), cut_off(curves)]
    else:
        said = [*validation(validated), loss(curves)]
    order = list(TONES)
    return sorted((one for one in said if one), key=lambda one: order.index(one.tone))


def reward(curves: Curves) -> Reading | None:
    """Whether the mean reward moved by more than its steps differ from each other."""
    ends, values = curves.ends("reward/mean"), curves.series("reward/mean")[1]
    if not ends:
        return None
    if not (change := over_steps(values)):
        few = f"Only {len(values)} steps: too few to say whether the reward moves"
        return Reading("note", f"{few} ({ends[0]:.3g} to {ends[1]:.3g}).")
    if change.still:
        return Reading("note", f"The reward stayed at {change.after:.3g} at every step.")
    return _trend(change, "The reward", rising_is_better=True)


def distance(curves: Curves) -> Reading | None:
    """Whether a student came nearer to its teacher by more than its steps differ from each other."""
    change = over_steps(curves.series("distill/reverse_kl")[1])
    return _trend(change, "The reverse KL to the teacher") if change else None


def validation(found: Validated | None) -> list[Reading]:
    """How the held-out score moved, whether that is more than noise, and whether it has been better."""
    if not found:
        return []
    share = found.metric == "val/accuracy"
    name = "Validation accuracy" if share else "Mean reward in validation"
    a, b = (_score(v, share) for v in (found.before, found.after))
    way = "rose" if found.after > found.before else "fell" if found.after < found.before else "went"
    count = number(found.n, "{:,.0f}")
    on = f" on {count} {'problems' if share else 'examples'}" if count else ""
    said = f"{name} {way} from {a} at step {found.steps[0]:,} to {b} at step {found.steps[1]:,}{on}"
    if not found.change:
        return [Reading("note", f"{said}; no intervals were recorded.")]
    if found.change.still:
        steps = f"from step {found.steps[0]:,} to step {found.steps[1]:,}{on}"
        return [Reading("note", f"{name} stayed at {b} {steps}.")]
    tone = ("better" if found.change.size > 0 else "worse") if found.change.clear else "noise"
    within = "" if found.change.clear else ", within noise"
    told = [Reading(tone, f"{said}{within}: {_held_out(found.change, share)}.")]
    if found.fall and found.fall.clear and found.best[1] != found.steps[0]:
        top = f"{_score(found.best[0], share)}, the best of {found.count} and so in part luck"
        fell = f"Validation was best at step {found.best[1]:,} ({top}) and has fallen since"
        told.append(Reading("worse", f"{fell}: {_held_out(found.fall, share)}."))
    return told


def unshared(curves: Curves, found: Validated | None) -> Reading | None:
    """Whether the reward rose between the first and the last validation, and these did not."""
    if not found or not found.change or found.change.size > 0:
        return None
    steps, rewards = curves.series("reward/mean")
    since = over_steps([y for x, y in zip(steps, rewards, strict=True) if found.steps[0] <= x <= found.steps[1]])
    if not since or not since.clear or since.size < 0:
        return None
    rose = f"From step {found.steps[0]:,} on the reward rose in training ({_moved('', since).strip()})"
    return Reading("watch", f"{rose}, and validation did not rise with it.")


def entropy(curves: Curves) -> Reading | None:
    """What is left of the room to explore."""
    change = over_steps(curves.series("policy/entropy")[1])
    if not change or not change.ratio:
        return None
    if change.still:
        return Reading("note", f"Entropy stayed at {change.after:.3g} nats per token.")
    share, low, high = change.ratio
    span = f"from {change.before:.3g} to {change.after:.3g} nats per token"
    left = f"to {_whole(share)} of where it began (95 % CI {_whole(low)} to {_whole(high)})"
    if share < COLLAPSED and change.clear:
        return Reading("watch", f"Entropy collapsed {left}, {span}: the samples of a group grow alike.")
    if share > WILD and change.clear:
        return Reading("watch", f"Entropy rose {left}, {span}: the policy grows less sure of what it writes.")
    if not change.clear:
        return Reading("noise", f"Entropy went {span}, no more than its steps differ: {_interval(change)}.")
    return Reading("note", f"Entropy {'rose' if change.size > 0 else 'fell'} {left}, {span}.")


def mixed_groups(curves: Curves) -> Reading | None:
    """How many groups still teach something."""
    ends, change = curves.ends("groups/mixed_frac"), over_steps(curves.series("groups/mixed_frac")[1])
    if not ends:
        return None
    text = f"{percent(ends[1])} of the groups at the end are mixed and carry a gradient"
    if not change:
        return Reading("note", f"{text}.")
    since = f"{percent(ends[0])} at the start; {signed(100 * change.size, '{:+.1f}')} points"
    interval = max(change.low, -change.before), min(change.high, 1 - change.before)  # of shares
    tone = "watch" if change.after < FEW_MIXED else "note"
    return Reading(tone, f"{text} ({since}, 95 % CI {points(interval)}).")


def length(curves: Curves, reward_rose: bool) -> Reading | None:
    """Whether responses grew or shrank, and whether the reward grew with them."""
    change = over_steps(curves.series("length/mean")[1])
    if not change or not change.clear or not change.ratio or abs(change.ratio[0] - 1) < MOVED:
        return None
    way = "grew" if change.size > 0 else "shrank"
    ci = f"95 % CI {signed(change.low, '{:+.0f}')} to {signed(change.high, '{:+.0f}')}"
    text = f"Responses {way} from {change.before:.0f} to {change.after:.0f} tokens"
    text += f" ({signed(change.size, '{:+.0f}')}, {ci})"
    if change.ratio[1] > LONGER and not reward_rose:
        return Reading("watch", f"{text}, and the reward did not rise with them.")
    return Reading("note", f"{text}.")


def agreement(curves: Curves) -> Reading | None:
    """How far sampler and trainer are apart at most."""
    gaps = curves.series("mismatch/logp_abs_mean")[1]
    if not gaps:
        return None
    if not max(gaps):
        return Reading("note", "Sampler and trainer agree to the bit.")
    return Reading(
        "note", f"The mean |Δ log p| between sampler and trainer never exceeded {number(max(gaps), '{:.2g}')}."
    )


def cut_off(curves: Curves) -> Reading | None:
    """How many responses the token limit ends, where it ends any."""
    ends = curves.ends("outcome/truncated_frac")
    if not ends or not ends[1]:
        return None
    text = f"{percent(ends[1])} of the responses at the end ran into the token limit ({percent(ends[0])} at the start)."
    return Reading("note", text)


def loss(curves: Curves) -> Reading | None:
    """Whether the training loss fell by more than its steps differ from each other."""
    change = over_steps(curves.series("loss")[1])
    return _trend(change, "The loss") if change else None


def _trend(change: Change, what: str, rising_is_better: bool = False) -> Reading:
    """Whether `what` moved by more than its steps differ from each other, and the right way."""
    if not change.clear:
        span = f"from {change.before:.3g} to {change.after:.3g}"
        return Reading("noise", f"{what} went {span}, no more than its steps differ: {_interval(change)}.")
    rose = change.size > 0
    tone = "better" if rose == rising_is_better else "worse"
    return Reading(tone, f"{what} {_moved('rose' if rose else 'fell', change)}.")


def _moved(way: str, change: Change) -> str:
    return f"{way} from {change.before:.3g} to {change.after:.3g}: {_interval(change)}"


def _interval(change: Change) -> str:
    return f"{signed(change.size)}, 95 % CI {signed(change.low)} to {signed(change.high)} by the noise between steps"


def _held_out(change: Change, share: bool) -> str:
    same = ", over the same problems" if change.paired else ""
    if share:
        return f"{signed(100 * change.size, '{:+.1f}')} points, 95 % CI {points((change.low, change.high))}{same}"
    low, high = (signed(v, "{:+.3f}") for v in (change.low, change.high))
    return f"{signed(change.size, '{:+.3f}')}, 95 % CI {low} to {high}"


def _score(value: float, share: bool) -> str:
    return percent(value) if share else f"{value:.3f}"


def _whole(share: float) -> str:
    return number(100 * share, "{:.0f}\u00a0%")
