"""The sections on one training run: its figures, its signals in words, and what holds the reward back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo_gsm8k.report import figures
from grpo_gsm8k.report.findings import TONES, Reading
from grpo_gsm8k.report.markup import Html, fold, frame, join, mark, section, table, tag
from grpo_gsm8k.report.panels import PANELS, TIME_PANEL, Curves, Line, Panel, panel_lines
from grpo_gsm8k.report.samples import answer, question
from grpo_gsm8k.report.words import LONG_NAMES, number, percent
from grpo_gsm8k.runs.diagnosis import WINDOW, Finding, loss_note

SIGNALS = (  # (label, metric, is a share, what it tells)
    ("Reverse KL to the teacher", "distill/reverse_kl", False, "nats per token; should fall"),
    ("Mean reward", "reward/mean", False, "what is optimised; should rise"),
    ("Right answers", "outcome/right_frac", True, "of the sampled training responses"),
    ("Mixed groups", "groups/mixed_frac", True, "the only ones with a gradient"),
    ("Entropy, nats", "policy/entropy", False, "room left to explore"),
    ("Response length", "length/mean", False, "tokens"),
    ("Cut off", "outcome/truncated_frac", True, "ran into the token limit"),
    ("|Δ log p| mean", "mismatch/logp_abs_mean", False, "sampler against trainer; should stay small"),
    ("Gradient norm", "policy/grad_norm", False, "before clipping"),
)
HOW_TO_READ = (
    "Start and end are means over the first and the last tenth of the steps. In the figures thin lines are single "
    "steps, thick lines their running mean over a twentieth of the run; the number beside a name is its end."
)


def figure(panel: Panel, lines: list[Line], band: Any = None) -> Html:
    """A panel drawn, with the last value of each line beside its name."""
    keys = [
        tag("span", tag("i", class_=line.colour), line.label, " ", tag("b", _last(panel, line)), class_="key")
        for line in (reversed(lines) if panel.kind == "stack" else lines)
    ]
    caption = panel.caption
    if panel.log and (zeros := sum(y <= 0 for line in lines for y in line.ys)):
        caption += f" {zeros:,} values are exactly zero and have no place on a log axis."
        lines = [kept for line in lines if (kept := line.positive()).xs]
    told = "; ".join(f"{line.label} ends at {_last(panel, line)}" for line in lines)
    zero = tag("p", "Zero at every step.", class_="empty")
    picture = Html(figures.draw(panel, lines, band, f"{panel.title}: {told}")) if lines else zero
    return frame(panel.title, picture, caption, panel.wide, keys)


def _last(panel: Panel, line: Line) -> str:
    window = 1 if panel.kind == "points" else figures.window_for(len(line.ys))
    value = figures.running_mean(line.ys, window)[-1]
    if panel.kind == "stack" and not panel.percent:
        return f"{value:.2f}"
    return percent(value) if panel.percent else number(value, "{:,.0f}" if abs(value) >= 1000 else "{:.3g}")


def panels(curves: Curves, kind: str) -> Html:
    """All figures of one training run, and a line on those it recorded nothing for."""
    drawn, absent = [], []
    for panel in PANELS[kind]:
        lines = panel_lines(panel, curves)
        if not lines:
            absent += [] if panel.unless else [panel.title]
            continue
        band = None
        if panel.band:
            bounds = [r for r in curves.rows if all(number(r.get(m)) for m in panel.band)]
            band = tuple([r[m] for r in bounds] for m in (panel.x, *panel.band)) if bounds else None
        drawn.append(figure(panel, lines, band))
    missing = tag("p", f"Not recorded: {', '.join(absent)}.", class_="mute") if absent else Html()
    return join([tag("div", *drawn, class_="grid"), missing, _other_metrics(curves, kind)])


def _other_metrics(curves: Curves, kind: str) -> Html:
    used = {metric for panel in (*PANELS[kind], TIME_PANEL) for metric, _ in panel.lines}
    rows = []
    for name in curves.names():
        ys = curves.series(name)[1]
        if ys and name not in used:
            spark = Html(figures.sparkline(ys))
            rows.append((tag("code", name), spark, len(ys), *map(number, (ys[0], ys[-1], min(ys), max(ys)))))
    head = ("metric", "course", "values", "first", "last", "min", "max")
    title = f"All other metrics of {LONG_NAMES[kind]} ({len(rows)})"
    return fold(title, table(title, head, rows)) if rows else Html()


def reading_list(said: Sequence[Reading]) -> Html:
    """The readings, each with a word that says whether it is good news."""
    items = [tag("li", tag("b", TONES[one.tone], class_="tone"), " ", one.text, class_=one.tone) for one in said]
    return tag("ul", *items, class_="readings") if items else Html()


def signals(curves: Curves, said: Sequence[Reading]) -> Html:
    """What the curves of GRPO say, and a handful of its metrics at the start and at the end."""
    rows = []
    for title, metric, share, tells in SIGNALS:
        if ends := curves.ends(metric):
            a, b = (percent(v) if share else number(v, "{:.3g}") for v in ends)
            rows.append((tag("span", title, tag("small", tells)), a, b))
    if not rows:
        return Html()
    words = tag("div", reading_list(said), tag("p", HOW_TO_READ, class_="mute"))
    return tag("div", words, table("Start and end of the run", ("signal", "start", "end"), rows), class_="halves")


def diagnosis_section(found: Sequence[Finding]) -> Html:
    """What holds the reward back, heaviest first, with completions that show it."""
    blocks = []
    for finding in found:
        sign = mark("!" if finding.alarm else "✓")
        words = (tag("h3", sign, finding.seen), tag("p", finding.why), tag("p", tag("b", "To do: "), finding.todo))
        shown = [tag("div", question(row), answer(str(row.get("id", "")), row)) for row in finding.examples]
        examples = fold("Examples", tag("div", *shown, class_="answers")) if shown else Html()
        blocks.append(tag("article", *words, examples, class_="finding warn" if finding.alarm else "finding"))
    lead = f"Judged over the last {WINDOW} steps; the heaviest reason comes first."
    return section("diagnosis", "What holds the reward back", tag("p", lead, class_="mute"), *blocks)


def calm(curves: Curves, said: Sequence[Reading]) -> Html:
    """One line for a run that gives no reason to worry."""
    note = None if curves.series("distill/reverse_kl")[1] else loss_note(curves.rows)
    uneasy = any(one.tone in ("worse", "watch") for one in said)
    words = ["Nothing is seen that holds the reward back."] if len(curves.rows) >= WINDOW and not uneasy else []
    words += [note.seen] if note else []
    return tag("p", " ".join(words), class_="mute") if words else Html()
