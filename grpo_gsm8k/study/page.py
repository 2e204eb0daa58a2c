"""The page of a study: the answer in words, the figures, what was spent, every run, and the plan as registered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from grpo_gsm8k.report import figures
from grpo_gsm8k.report.figures import COLOURS
from grpo_gsm8k.report.markup import Html, fold, frame, join, preformatted, section, table, tag
from grpo_gsm8k.report.page import document
from grpo_gsm8k.report.panels import SERIES
from grpo_gsm8k.report.words import duration, number, p_value
from grpo_gsm8k.runs.files import read_json, read_jsonl
from grpo_gsm8k.study.ahead import power_of
from grpo_gsm8k.study.analysis import Analysis
from grpo_gsm8k.study.jobs import Job, spent_by
from grpo_gsm8k.study.plan import Plan
from grpo_gsm8k.study.registry import changes, registered
from grpo_gsm8k.study.words import capital, gap, headline, listed, score, sentences

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OFF_BUDGET = 0.1  # share by which an arm may miss its budget before the page says so
METHOD = (
    "Differences are taken problem by problem and seed by seed, and fitted by a mixed model in which seeds and "
    "problems are both random: an interval says what other seeds and other problems could have given. The part of its "
    "variance that comes from seeds and the part that comes from problems each get their own quantile of Student's t "
    "(Banerjee 1961), which keeps the error rate with few seeds, where a bootstrap does not. P-values are corrected by "
    "Holm over the arms; intervals are not."
)


def page(plan: Plan, analysis: Analysis, jobs: Sequence[Job], folder: Path) -> str:
    """The whole document."""
    body = join(
        part
        for part in (
            section("answer", "Answer", _sentences(plan, analysis)),
            section("figures", "Figures", _figures(plan, analysis, jobs)),
            section("spent", "What each arm used", _spent(plan, analysis), _budgets(plan, analysis)),
            section("comparisons", "Comparisons in numbers", _comparisons(plan, analysis)),
            section("runs", "Runs", _runs(jobs, analysis, folder)),
            section("plan", "The plan", *_plan(plan, folder)),
        )
        if part
    )
    question = [tag("p", plan.top.question, class_="lead")] if plan.top.question else []
    lead = join([*question, _facts(plan, analysis, folder)])
    return document(f"study · {plan.path.stem}", headline(plan, analysis), lead, _notes(plan, analysis, folder), body)


def _sentences(plan: Plan, analysis: Analysis) -> Html:
    tones = {1: ("better", "better"), -1: ("worse", "worse"), 0: ("", "not told apart")}
    said = sentences(plan, analysis)
    signs = [one.sign for one in analysis.verdicts.values()] or [0] * len(said)
    rows = []
    for sign, text in zip(signs, said, strict=True):
        css, word = tones[sign]
        head = [tag("span", word, class_="tone"), " "] if analysis.verdicts else []
        rows.append(tag("li", *head, text, class_=css))
    return tag("ul", *rows, class_="readings")


def _facts(plan: Plan, analysis: Analysis, folder: Path) -> Html:
    last = registered(folder)[-1]
    when = f"after {last.results} results" if last.results else "before any result"
    stopping = "one look, when all runs are done" if plan.looks == 1 else f"always valid, {plan.looks} looks"
    facts = (
        ("plan (sha256)", plan.sha256),
        ("registered", f"{last.at}, {when}"),
        ("arms", len(plan.arms)),
        ("seeds", listed([str(seed) for seed in plan.seeds])),
        ("problems", f"{analysis.problems:,}" if analysis.problems else "all"),
        ("runs", f"{analysis.done} of {analysis.runs}"),
        ("stopping", stopping),
    )
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts), class_="facts")


def _notes(plan: Plan, analysis: Analysis, folder: Path) -> dict[str, list[str]]:
    changed = [
        f"at {one.at}, after {one.results} results: {change}" for one in changes(folder) for change in one.changed
    ]
    left = []
    if analysis.stopped:
        left.append(
            f"The stopping rule ended the study after {len(analysis.seeds)} seeds: every comparison was decided."
        )
    elif not analysis.final:
        left.append(f"{analysis.runs - analysis.done} of {analysis.runs} runs are not done.")
    return {
        "The plan was changed after results existed": changed,
        "Incomplete" if not analysis.stopped else "Ended": left,
    }


# ------------------------------------------------------------------------------------------------ figures


def _figures(plan: Plan, analysis: Analysis, jobs: Sequence[Job]) -> Html:
    drawn = []
    if any(one.mean is not None for one in analysis.arms):
        caption = "Bars are 95 % intervals over other seeds and problems, circles the single seeds."
        drawn.append(frame(_title(analysis), Html(_draw_arms(analysis)), caption))
    if analysis.verdicts:
        caption = (
            f"Intervals of {100 - 5 / plan.looks:.4g} %, not corrected for the number of arms. Between the dashed "
            "lines lie differences smaller than the planned effect."
        )
        drawn.append(frame(f"Difference from {plan.reference.label}", Html(_draw_differences(plan, analysis)), caption))
    curves = _curves(plan, jobs)
    if curves:
        keys = [
            tag("span", tag("i", class_=SERIES[i % len(SERIES)]), arm.label, class_="key")
            for i, arm in enumerate(plan.arms)
        ]
        what = "Mean accuracy" if analysis.graded else "Mean reward"
        caption = f"{what} on the validation problems against the tokens sampled so far, a line a seed."
        drawn.append(frame("While training", Html(_draw_curves(analysis, curves)), caption, keys=keys))
    return tag("div", *drawn, class_="grid") if drawn else Html()


def _title(analysis: Analysis) -> str:
    return "Accuracy on the test problems" if analysis.graded else "Mean reward on the test examples"


def _draw_arms(analysis: Analysis) -> str:
    rows = [one for one in analysis.arms if one.mean is not None]

    def paint(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        for y, one in enumerate(rows):
            if one.ci:
                axes.plot(one.ci, [y, y], color=COLOURS["c1"], lw=5, alpha=0.35)
            dots = {"color": COLOURS["mute"], "marker": "o", "ms": 4, "mfc": "none", "lw": 0}
            axes.plot(one.accuracies, [y + 0.22] * len(one.accuracies), **dots)  # type: ignore[arg-type]
            axes.plot([one.mean or 0.0], [y], color=COLOURS["c1"], marker="o", ms=6)
            text = score(analysis, one.mean)
            axes.annotate(text, (one.mean or 0.0, y), (0, 7), textcoords="offset points", ha="center", weight="bold")
        axes.grid(axis="x")
        axes.set_ylim(len(rows) - 0.5, -0.7)
        axes.set_yticks(range(len(rows)), [_wrapped(one.arm.label) for one in rows], color=COLOURS["ink"])
        if analysis.graded:
            axes.set_xlim(-0.06, 1.06)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: figures.tick(v, analysis.graded)))

    told = "; ".join(f"{one.arm.label} {score(analysis, one.mean)}" for one in rows)
    size = (5.0, 0.7 + 0.55 * len(rows))
    return figures.svg(_title(analysis), size, paint, f"{_title(analysis)}: {told}", left=1.35)


def _draw_differences(plan: Plan, analysis: Analysis) -> str:
    rows = [(plan.arm(name).label, one) for name, one in analysis.verdicts.items()]
    scale = 100 if analysis.graded else 1

    def paint(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes.axvline(0, color=COLOURS["mute"], lw=1)
        for edge in (-plan.power.effect, plan.power.effect):
            axes.axvline(scale * edge, color=COLOURS["mute"], lw=1, ls=(0, (3, 3)))
        for y, (_, one) in enumerate(rows):
            colour = COLOURS[{1: "c3", -1: "c4", 0: "mute"}[one.sign]]
            low, high = one.found.ci
            axes.plot([scale * low, scale * high], [y, y], color=colour, lw=5, alpha=0.4)
            axes.plot([scale * one.found.mean], [y], color=colour, marker="o", ms=6)
            text = gap(analysis, one.found.mean, unit=False)
            axes.annotate(
                text, (scale * one.found.mean, y), (0, 7), textcoords="offset points", ha="center", weight="bold"
            )
        axes.grid(axis="x")
        axes.margins(x=0.12)
        axes.set_ylim(len(rows) - 0.5, -0.7)
        axes.set_yticks(range(len(rows)), [_wrapped(label) for label, _ in rows], color=COLOURS["ink"])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}".replace("-", "−")))
        axes.set_xlabel("points" if analysis.graded else "mean reward", labelpad=2)

    told = "; ".join(
        f"{label} {gap(analysis, one.found.mean)}, {gap(analysis, one.found.ci[0], False)} to "
        f"{gap(analysis, one.found.ci[1], False)}"
        for label, one in rows
    )
    title = f"Difference from {plan.reference.label}"
    return figures.svg(title, (5.0, 0.9 + 0.55 * len(rows)), paint, f"{title}: {told}", left=1.35)


def _wrapped(label: str, most: int = 17) -> str:
    """A label in lines that fit beside the axis."""
    return "\n".join(wrap(label, most)[:2])


Curve = tuple[int, list[float], list[float]]  # number of the arm, tokens so far, validation


def _curves(plan: Plan, jobs: Sequence[Job]) -> list[Curve]:
    """Validation against sampled tokens, of every run that logged both."""
    number_of = {arm.name: i for i, arm in enumerate(plan.arms)}
    found = []
    for job in jobs:
        path = job.run_dir / "metrics.jsonl"
        if job.arm not in number_of or not path.is_file() or not path.stat().st_size:
            continue
        rows = [row for _, row in read_jsonl(path)]
        per_step = job.content["config"].get("rollouts_per_step", 0)
        tokens, xs, ys = 0.0, list[float](), list[float]()
        for row in rows:
            tokens += row.get("ei/sampled_tokens", 0.0) + row.get("length/mean", 0.0) * per_step
            if (value := row.get("val/accuracy", row.get("val/reward"))) is not None:
                xs.append(tokens)
                ys.append(value)
        if len(xs) > 1:
            found.append((number_of[job.arm], xs, ys))
    return found


def _draw_curves(analysis: Analysis, curves: Sequence[Curve]) -> str:
    def paint(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        for i, xs, ys in curves:
            axes.plot(xs, ys, color=COLOURS[SERIES[i % len(SERIES)]], lw=1.3, alpha=0.85)
        axes.grid(axis="y")
        axes.set_xlabel("sampled tokens", labelpad=2)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: figures.tick(v)))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: figures.tick(v, analysis.graded)))

    return figures.svg("While training", (5.0, 2.6), paint, "Validation while training, by sampled tokens")


# ------------------------------------------------------------------------------------------------ tables


def _spent(plan: Plan, analysis: Analysis) -> Html:
    """Per run, and as a share of the reference."""
    reference = next(one for one in analysis.arms if one.arm.name == plan.reference.name)
    head = ["arm", "runs", "tokens a run", "of the reference's", "time a run", "of the reference's"]
    priced = any(one.dollars for one in analysis.arms)
    rows = []
    for one in analysis.arms:
        cells = [
            tag("b", one.arm.label),
            len(one.seeds),
            number(one.tokens, "{:,.0f}") if one.tokens else "–",
            _share(one.tokens, reference.tokens),
            duration(one.seconds) if one.seconds else "–",
            _share(one.seconds, reference.seconds),
        ]
        rows.append([*cells, f"${one.dollars:,.2f}"] if priced else cells)
    caption = "Sampled tokens and time of training, on average; the final evaluation is not counted"
    return table(caption, [*head, "dollars a run"] if priced else head, rows)


def _share(value: float, reference: float) -> str:
    return f"{value / reference:.2f}" if value and reference else "–"


def _budgets(plan: Plan, analysis: Analysis) -> Html:
    """How well the arms of equal budget met it."""
    reference = next(one for one in analysis.arms if one.arm.name == plan.reference.name)
    said = []
    for one in analysis.arms:
        what = one.arm.equal
        used, limit = (getattr(arm, what, 0.0) if what else 0.0 for arm in (one, reference))
        if not used or not limit:
            continue
        miss = used / limit - 1
        note = "" if abs(miss) <= OFF_BUDGET else " Its rounds are too large to come closer: make them smaller."
        text = f"{capital(one.arm.label)} was given the {what} of {reference.arm.label} with the same seed, and used"
        said.append(tag("p", f"{text} {used / limit:.2f} of them.{note}", class_="mute"))
    return join(said)


def _comparisons(plan: Plan, analysis: Analysis) -> Html:
    if not analysis.verdicts:
        return Html()
    head = ("arm", "difference", f"{100 - 5 / plan.looks:.4g} % interval", "p", "p Holm", "verdict",
            "sd of seeds", "sd of problems", "sd of the rest")  # fmt: skip
    words = {1: "better", -1: "worse", 0: "not told apart"}
    planned = power_of(plan, analysis.problems)["power"] or 0.0
    rows = [
        (
            tag("b", plan.arm(name).label),
            gap(analysis, one.found.mean, unit=False),
            " to ".join(gap(analysis, edge, unit=False) for edge in one.found.ci),
            *(p_value(p).removeprefix("=\u00a0") for p in (one.p_value, one.p_holm)),
            words[one.sign],
            *(f"{value:.3f}" for value in (one.found.seed_sd, one.found.problem_sd, one.found.rest_sd)),
        )
        for name, one in analysis.verdicts.items()
    ]
    seeds = next(iter(analysis.verdicts.values())).found.seeds
    caption = f"Each arm against {plan.reference.label}, {seeds} seeds on {analysis.problems:,} problems"
    effect = gap(analysis, plan.power.effect).lstrip("+")
    note = f"By the plan's assumptions, a true difference of {effect} is found with a chance of {100 * planned:.0f} %."
    return join([table(caption, head, rows), tag("p", f"{METHOD} {note}", class_="mute")])


def _runs(jobs: Sequence[Job], analysis: Analysis, folder: Path) -> Html:
    rows: list[tuple[object, ...]] = []
    for job in jobs:
        if not job.done:
            rows.append((tag("b", job.name), "not done", *["–"] * 4))
            continue
        summary: dict[str, Any] = read_json(job.summary)
        used = spent_by(job.content)
        low, high = summary["ci95"]
        value = summary["accuracy"] if analysis.graded else summary["reward"]
        width = tag("small", f"{100 * low:.1f}–{100 * high:.1f}" if analysis.graded else f"{low:.3f}–{high:.3f}")
        rows.append(
            (
                tag("b", job.name),
                tag("span", score(analysis, value), " ", width),
                f"{used.steps:,}",
                number(used.tokens, "{:,.0f}") if used.tokens else "–",
                duration(used.seconds),
                tag("code", summary["weights_sha256"][:12]),
            )
        )
    caption = f"Every run is an ordinary run directory below {folder.name}/runs"
    return table(caption, ("run", "test", "steps", "sampled tokens", "time", "weights"), rows)


def _plan(plan: Plan, folder: Path) -> list[Html]:
    history = registered(folder)
    rows = [(tag("code", one.sha256[:12]), one.at, one.results, "; ".join(one.changed) or "–") for one in history]
    said = f"sha256 {plan.sha256}, as `sha256sum {plan.path.name}` prints it; the registered copy is plan.toml."
    found = [tag("p", said, class_="mute")]
    if len(history) > 1:
        found.append(table("Plans of this study", ("sha256", "registered", "results by then", "changed"), rows))
    found.append(fold("The plan as registered", preformatted(plan.text.decode("utf-8", errors="replace"))))
    old = [one for one in history[:-1] if (folder / "plans" / f"{one.sha256[:12]}.toml").is_file()]
    found += [
        fold(
            f"Before: {one.sha256[:12]}, {one.at}",
            preformatted((folder / "plans" / f"{one.sha256[:12]}.toml").read_text("utf-8", errors="replace")),
        )
        for one in old
    ]
    return found
