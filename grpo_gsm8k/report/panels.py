"""What the figures of a report show: which metrics, how drawn, and the line that says how to read each.

What is drawn stands in tables of `Panel`; `figures.draw` draws them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from grpo_gsm8k.runs.diagnosis import ends

Row = Mapping[str, float]


SERIES = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "mute")
TIMES = ("save_weights", "sampling", "compute_rewards", "build_data", "teacher", "training", "eval")


@dataclass(frozen=True)
class Panel:
    """One figure: which metrics, how drawn, and one line that says how to read it."""

    title: str
    lines: tuple[tuple[str, str], ...]  # (metric, label), coloured in this order
    caption: str
    kind: str = "lines"  # lines | points (no smoothing) | stack
    percent: bool = False
    log: bool = False
    wide: bool = False
    x: str = "step"
    band: tuple[str, str] | None = None  # metrics of the lower and upper bound of the first line
    colours: tuple[str, ...] = SERIES
    unless: str = ""  # a metric that takes this figure's place


def _val(with_format: bool = True) -> Panel:
    lines = (("val/accuracy", "accuracy"), ("val/format_accuracy", "right format"))
    return Panel(
        "Validation accuracy",
        lines if with_format else lines[:1],
        "Higher is better; a change smaller than the shaded 95 % interval may be luck.",
        kind="points",
        percent=True,
        wide=True,
        band=("val/ci_low", "val/ci_high"),
    )


_VAL_REWARD = Panel(
    "Mean reward in validation",
    (("val/reward", "mean reward"),),
    "Held-out examples of a task without right answers; a change smaller than the shaded 95 % interval may be luck.",
    kind="points",
    wide=True,
    band=("val/ci_low", "val/ci_high"),
    unless="val/accuracy",
)
_GRAD = Panel(
    "Gradient norm", (("policy/grad_norm", "norm"),), "Before clipping; spikes mark steps that could do harm."
)
_LR = Panel("Learning rate", (("policy/lr", "rate"),), "The schedule as it was applied.", kind="points")
_SPEED = Panel(
    "Tokens per second", (("perf/tokens_per_s", "tokens/s"),), "Throughput; dips are evaluations or a busy machine."
)
_LOSS = Panel(
    "Loss", (("loss", "loss"),), "Mean negative log-likelihood per trained token; lower is better.", wide=True
)

GRPO_PANELS = (
    Panel(
        "Reward",
        (("reward/mean", "total"), ("reward/answer", "answer"), ("reward/format", "format")),
        "Training problems, sampled at the training temperature; the answer part is the one to watch.",
        wide=True,
    ),
    _val(),
    _VAL_REWARD,
    Panel(
        "Groups by outcome",
        (
            ("groups/all_right_frac", "all right"),
            ("groups/mixed_frac", "mixed"),
            ("groups/all_wrong_frac", "all wrong"),
        ),
        "Only mixed groups carry a gradient: as they vanish, learning stops.",
        kind="stack",
        percent=True,
        colours=("c1", "c3", "c2"),
    ),
    Panel(
        "Responses by outcome",
        (
            ("outcome/right_frac", "right"),
            ("outcome/wrong_frac", "wrong"),
            ("outcome/format_error_frac", "no answer found"),
            ("outcome/truncated_frac", "cut off"),
        ),
        "Shares of all sampled responses; cut off = ran into the token limit.",
        kind="stack",
        percent=True,
        colours=("c1", "c2", "c5", "mute"),
    ),
    Panel(
        "Response length, tokens",
        (("length/mean", "all"), ("length/right_mean", "right"), ("length/wrong_mean", "wrong")),
        "Growth without reward is padding; wrong answers that run long hint at cut-offs.",
        colours=("c1", "c3", "c2"),
    ),
    Panel(
        "Entropy, nats per token",
        (("policy/entropy", "entropy"),),
        "Near zero every sample of a group is the same, and nothing is left to compare.",
    ),
    Panel(
        "Diversity of a group's samples",
        (
            ("diversity/unique_frac", "distinct samples"),
            ("diversity/distinct_2", "distinct pairs"),
            ("diversity/distinct_1", "distinct tokens"),
        ),
        "Shares within a group, where samples were kept; when they sink together, sampling collapses.",
        kind="points",
        percent=True,
    ),
    Panel(
        "Repetition",
        (("diversity/repeated_4grams", "repeated 4-grams"),),
        "Share of a response's 4-grams that it has written before; a rise is a loop in the making.",
        kind="points",
        percent=True,
    ),
    _GRAD,
    Panel(
        "Clipped tokens",
        (
            ("policy/clip_frac", "all"),
            ("policy/clip_frac_low", "lower bound"),
            ("policy/clip_frac_high", "upper bound"),
        ),
        "Tokens whose ratio met the trust region; zero when each batch is used once.",
        percent=True,
    ),
    Panel(
        "Sampler against trainer, |Δ log p|",
        (("mismatch/logp_abs_mean", "mean"), ("mismatch/logp_abs_max", "max")),
        "The same token scored by both (log axis); flat and small means the ratios can be trusted.",
        log=True,
    ),
    Panel(
        "Approximate KL per update",
        (("policy/approx_kl", "KL"),),
        "How far a step moved the policy from the one that sampled.",
    ),
    Panel(
        "Update / weight norm",
        (("policy/update_to_weight", "ratio"),),
        "Relative size of a step; about 0.001 is large, far less moves nothing.",
    ),
)
DISTILL_PANELS = (
    Panel(
        "Distance from the teacher, nats per token",
        (("distill/reverse_kl", "reverse KL"),),
        "log p of the student less that of the teacher, on the student's own samples; it should fall.",
        wide=True,
    ),
    Panel(
        "Distance from the teacher, nats per response",
        (("distill/response_kl", "reverse KL"),),
        "The same, summed over each response.",
    ),
    Panel(
        "Largest surprise of the teacher, nats",
        (("distill/surprise_max", "nats"),),
        "The token of each step that the teacher found least likely, against the student.",
    ),
    *(panel for panel in GRPO_PANELS if panel.title not in ("Groups by outcome", "Diversity of a group's samples")),
)
SFT_PANELS = (_LOSS, _val(), _VAL_REWARD, _GRAD, _LR, _SPEED)
EI_PANELS = (
    Panel(
        "Yield per round",
        (("ei/yield", "samples kept"), ("ei/solved_frac", "problems solved")),
        "Share of samples kept as right, and of problems with at least one.",
        kind="points",
        percent=True,
        x="ei/round",
    ),
    Panel(
        "Distinct solutions per problem",
        (("ei/distinct_per_problem", "distinct"),),
        "Falling means the rounds feed on ever fewer ideas.",
        kind="points",
        x="ei/round",
    ),
    Panel(
        "Samples kept per round",
        (("ei/kept", "kept"),),
        "The size of the set each round trains on.",
        kind="points",
        x="ei/round",
    ),
    *SFT_PANELS,
)
TIME_PANEL = Panel(
    "Seconds per step",
    (*((f"time/{t}", t.replace("_", " ")) for t in TIMES), ("time/other", "other")),
    "Where a step's time goes; other is the total less the named parts.",
    kind="stack",
    wide=True,
)
PANELS = {"grpo": GRPO_PANELS, "distill": DISTILL_PANELS, "sft": SFT_PANELS, "ei": EI_PANELS}
OVERLAID = {
    *(
        "reward/mean",
        "val/accuracy",
        "val/reward",
        "length/mean",
        "policy/entropy",
        "policy/grad_norm",
        "policy/clip_frac",
    ),
    *(
        "mismatch/logp_abs_mean",
        "loss",
        "distill/reverse_kl",
        "ei/yield",
        "diversity/unique_frac",
        "diversity/repeated_4grams",
    ),
}
_MIXED = Panel("Mixed groups", (("groups/mixed_frac", "mixed groups"),), "", percent=True)
OVERLAYS = {
    kind: [
        replace(panel, caption=f"One line for each run: {panel.lines[0][0]}.")
        for panel in (*panels, *([_MIXED] if kind == "grpo" else []))
        if panel.lines[0][0] in OVERLAID or panel is _MIXED
    ]
    for kind, panels in PANELS.items()
}


@dataclass(frozen=True)
class Curves:
    """The metrics of one run, one row per step."""

    rows: tuple[Row, ...]

    def series(self, metric: str, x: str = "step") -> tuple[list[float], list[float]]:
        """Where `metric` was recorded and finite: the values of `x` (the last of each) and its own."""
        rows = [r for r in self.rows if x in r and math.isfinite(r.get(metric, math.nan))]
        points = {r[x]: r[metric] for r in rows}
        return list(points), list(points.values())

    def ends(self, metric: str) -> tuple[float, float] | None:
        """The mean over the first and over the last tenth of the steps."""
        ys = self.series(metric)[1]
        return ends(ys) if ys else None

    def names(self) -> list[str]:
        """All metrics, sorted."""
        return sorted({name for row in self.rows for name in row} - {"step"})


@dataclass(frozen=True)
class Line:
    """One drawn line: its legend label, colour name and points."""

    label: str
    colour: str
    xs: list[float]
    ys: list[float]

    def positive(self) -> Line:
        """Only the points that a log axis can show."""
        kept = [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if y > 0]
        return Line(self.label, self.colour, [x for x, _ in kept], [y for _, y in kept])


def panel_lines(panel: Panel, curves: Curves) -> list[Line]:
    """The lines of `panel` that this run recorded; none where another figure takes its place."""
    if panel.unless and curves.series(panel.unless)[1]:
        return []
    found = [
        Line(label, colour, *curves.series(metric, panel.x))
        for (metric, label), colour in zip(panel.lines, panel.colours, strict=False)
    ]
    return [line for line in found if line.xs]


def overlay_lines(panel: Panel, runs: Mapping[str, Curves]) -> list[Line]:
    """The first metric of `panel`, one line for each run that recorded it, and no figure in its place."""
    found = [
        Line(label, SERIES[i % len(SERIES)], *curves.series(panel.lines[0][0], panel.x))
        for i, (label, curves) in enumerate(runs.items())
        if not (panel.unless and curves.series(panel.unless)[1])
    ]
    return [line for line in found if line.xs]
