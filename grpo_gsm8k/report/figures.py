"""Figures: numbers in, inline SVG out.

The SVG carries CSS variables in place of colours and no font names, so the page decides how it looks in light and
in dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from grpo_gsm8k.report.panels import Line, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe-Ito, told apart with any colour vision. The page maps each to a CSS variable of the same name.
COLOURS = {
    "c1": "#0072b2",
    "c2": "#e69f00",
    "c3": "#009e73",
    "c4": "#d55e00",
    "c5": "#cc79a7",
    "c6": "#56b4e9",
    "c7": "#f0e442",
    "mute": "#868a91",
    "ink": "#1b1d21",
    "rule": "#dcdad5",
}


def running_mean(ys: Sequence[float], window: int) -> list[float]:
    """The mean of each value and its neighbours, `window` in all, fewer at the ends."""
    sums, half, n = [0.0, *accumulate(ys)], window // 2, len(ys)
    edges = [(max(0, i - half), min(n, i + half + 1)) for i in range(n)]
    return [(sums[high] - sums[low]) / (high - low) for low, high in edges]


def window_for(n: int) -> int:
    """How many steps a drawn average spans; 1 (no average) for short runs."""
    return max(3, n // 20) if n > 20 else 1


def tick(value: float, percent: bool = False, tiny: bool = False) -> str:
    """The text beside a tick. `tiny`: all of the axis is, so that each tick has an exponent, or none has."""
    if percent:
        return f"{100 * value:g} %"
    if tiny and value:
        mantissa, exponent = f"{value:.5e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}".replace("e-0", "e-")


def _breadth(text: str) -> float:
    """About how many inches a tick's text takes at 9 points: digits and letters are twice as wide as points."""
    return sum(0.042 if char in ".,- " else 0.082 for char in text)


def svg(name: str, size: tuple[float, float], paint: Callable[[Axes], None], said: str = "", left: float = 0) -> str:
    """What `paint` draws, as an inline SVG. `said` is what a screen reader reads in its place; `name` by default.

    `left` is the margin in inches; 0: what the texts beside the ticks need.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "font.size": 9,
        "path.simplify_threshold": 0.3,
        "axes.edgecolor": COLOURS["rule"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "grid.color": COLOURS["rule"],
        "grid.linewidth": 0.6,
        "xtick.color": COLOURS["mute"],
        "ytick.color": COLOURS["mute"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "axes.labelcolor": COLOURS["mute"],
        "text.color": COLOURS["ink"],
        "lines.solid_capstyle": "round",
    }
    with mpl.rc_context(style):
        width, height = size
        fig = Figure(figsize=size)
        axes = fig.add_subplot()
        fig.patch.set_visible(False)
        axes.patch.set_visible(False)
        paint(axes)
        texts = axes.yaxis.get_major_formatter().format_ticks(list(axes.yaxis.get_majorticklocs()))
        left = left or min(width / 2, max([0.47, *(0.06 + _breadth(text) for text in texts)]))  # mostly alike
        axes.set_position((left / width, 0.4 / height, 1 - (left + 0.12) / width, 1 - 0.5 / height))
        out = io.StringIO()
        fig.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(out.getvalue(), said or name)


def _inline(svg: str, said: str) -> str:
    """Only the <svg> element, without namespaces, ids nobody refers to, global styles and fixed colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->|<defs>\s*</defs>", "", svg, flags=re.S)
    box = re.search(r'viewBox="[^"]*"', svg)
    svg = re.sub(r"<svg[^>]*>", f"<svg {box[0] if box else ''}>", svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'<(g|text) id="[^"]*"', r"<\1", svg)
    svg = re.sub(r' ?font-family: [^;"]*;?', "", svg)
    svg = re.sub(r' d="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0].replace("\n", "")), svg)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    label = escape(said, {'"': "&quot;"})
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def prefix_ids(svg: str, prefix: str) -> str:
    """The same figure with its own ids, so that several fit into one document."""
    return re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{prefix}", svg)


def draw(
    panel: Panel,
    lines: Sequence[Line],
    band: tuple[list[float], list[float], list[float]] | None = None,
    said: str = "",
) -> str:
    """The SVG of one panel. `band` is (xs, lower, upper), shaded behind the first line; `said` replaces the picture."""

    def paint(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        if panel.kind == "stack":
            xs, stack = _stacked(lines)
            axes.stackplot(xs, stack, colors=[COLOURS[line.colour] for line in lines], alpha=0.85, lw=0)
        for line in () if panel.kind == "stack" else lines:
            colour, window = COLOURS[line.colour], 1 if panel.kind == "points" else window_for(len(line.ys))
            marker = "o" if len(line.xs) <= 40 and window == 1 else ""
            if window > 1:
                axes.plot(line.xs, line.ys, color=colour, lw=0.7, alpha=0.35)
            axes.plot(line.xs, running_mean(line.ys, window), color=colour, lw=1.7, marker=marker, ms=3)
        if band:
            xs, low, high = band
            axes.fill_between(xs, low, high, color=COLOURS[lines[0].colour], alpha=0.18, lw=0)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: tick(v)))
        if len({x for line in lines for x in line.xs}) == 1:
            axes.set_xlim(lines[0].xs[0] - 1, lines[0].xs[0] + 1)
        axes.set_xlabel("round" if panel.x == "ei/round" else "step", labelpad=2)
        _scale(axes, panel, lines)

    return svg(panel.title, (5.0, 2.5) if panel.wide else (3.6, 2.2), paint, said)


def _scale(axes: Axes, panel: Panel, lines: Sequence[Line]) -> None:
    """The y axis: linear or logarithmic, its ticks, and shares kept between 0 and 100 %."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    if panel.log:
        axes.set_yscale("log")
        ys = [y for line in lines for y in line.ys]
        decade_only = max(ys) > 30 * min(ys)
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if decade_only else (1, 2, 5), numticks=8))
        axes.yaxis.set_minor_locator(LogLocator(subs=[]))
    else:
        values = {y for line in lines for y in line.ys}
        if len(values) == 1 and min(values) >= 0:  # a constant: around it there is nothing to zoom into
            axes.set_ylim(0, 1.5 * max(values) or 1)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    tiny = max(map(abs, axes.get_ylim())) < 1e-3
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: tick(v, panel.percent, tiny)))
    if panel.kind == "stack":
        axes.margins(0)
    if panel.percent:
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, -0.02 if panel.kind != "stack" else 0), min(top, 1.02))


def _stacked(lines: Sequence[Line], most: int = 300) -> tuple[list[float], list[list[float]]]:
    """The lines on shared steps (0 where one is absent), averaged down to at most `most` points."""
    tables = [dict(zip(line.xs, line.ys, strict=True)) for line in lines]
    steps = sorted(set().union(*tables))
    size = -(-len(steps) // most)
    bins = [steps[i : i + size] for i in range(0, len(steps), size)]
    values = [[sum(t.get(s, 0.0) for s in chunk) / len(chunk) for chunk in bins] for t in tables]
    return [chunk[-1] for chunk in bins], values


def draw_stages(rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Accuracy of each stage, first on top, as a dot with its 95 % interval: (label, value, low, high)."""

    def paint(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter

        for y, (_, value, low, high) in enumerate(rows):
            axes.plot([low, high], [y, y], color=COLOURS["c1"], lw=5, alpha=0.35)
            axes.plot([value], [y], color=COLOURS["c1"], marker="o", ms=6)
            text = f"{100 * value:.1f} %"
            axes.annotate(text, (value, y), (0, 7), textcoords="offset points", ha="center", weight="bold")
        axes.grid(axis="x")
        axes.set(xlim=(-0.06, 1.06), ylim=(len(rows) - 0.5, -0.7), xticks=[0, 0.25, 0.5, 0.75, 1])
        axes.set_yticks(range(len(rows)), [row[0] for row in rows], color=COLOURS["ink"])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: tick(v, True)))

    said = "; ".join(
        f"{name} {100 * value:.1f} %, {100 * low:.1f} to {100 * high:.1f}" for name, value, low, high in rows
    )
    return svg("Accuracy by stage", (5.0, 0.7 + 0.5 * len(rows)), paint, f"Accuracy by stage: {said}")


def draw_bars(title: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """Horizontal bars with their value written beside them: (label, value, text)."""

    def paint(axes: Axes) -> None:
        for y, (_, value, text) in enumerate(rows):
            axes.barh([y], [value], height=0.6, color=COLOURS["c1"], alpha=0.85)
            axes.annotate(text, (value, y), (5, 0), textcoords="offset points", va="center")
        axes.set(xlim=(0, 1.25 * max(row[1] for row in rows) or 1), ylim=(len(rows) - 0.4, -0.6), xticks=[])
        axes.set_yticks(range(len(rows)), [row[0] for row in rows], color=COLOURS["ink"])
        axes.spines["bottom"].set_visible(False)

    said = "; ".join(f"{name} {text}" for name, _, text in rows)
    return svg(title, (5.0, 2.5), paint, f"{title}: {said}")


def sparkline(ys: Sequence[float]) -> str:
    """A word-sized line without axes."""
    size = -(-len(ys) // 100)
    ys = [sum(ys[i : i + size]) / len(ys[i : i + size]) for i in range(0, len(ys), size)]
    low, high = min(ys), max(ys)
    up, right = 16 / (high - low) if high > low else 0.0, 100 / max(1, len(ys) - 1)
    points = " ".join(f"{right * i:.1f},{18 - up * (y - low):.1f}" for i, y in enumerate(ys))
    return f'<svg class="spark" viewBox="0 0 100 20" aria-hidden="true"><polyline points="{points}"/></svg>'
