"""Several runs side by side: what differs in their settings, their scores, overlaid curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from grpo_gsm8k.config import SECTIONS
from grpo_gsm8k.errors import UserError
from grpo_gsm8k.evals.compare import against, corrected_for_number
from grpo_gsm8k.evals.stats import Comparison
from grpo_gsm8k.report.markup import Html, fold, join, section, table, tag
from grpo_gsm8k.report.names import data_hash, home_relative, public
from grpo_gsm8k.report.panels import OVERLAYS, Curves, overlay_lines
from grpo_gsm8k.report.parting import parting_section
from grpo_gsm8k.report.read import Evaluated, Run, evaluations
from grpo_gsm8k.report.training import figure
from grpo_gsm8k.report.words import LONG_NAMES, NAMES, STAGES, duration, label, number, p_value, pair, percent, points

Runs = Mapping[str, Run]
RUNTIME = {  # of each stage: settings that say where and how a run is done, not what it learns
    stage: {field.name for field in dataclasses.fields(cls) if field.metadata["runtime"]}
    for stage, cls in SECTIONS.items()
    if stage in LONG_NAMES
}
ABSENT = "–"


def comparison_page(runs: Runs) -> Html:
    """The body of the page about several runs, what differs first."""
    parts = [settings_section(runs), parting_section(runs)]
    parts += [section("result", "Side by side", score_table(runs), paired_table(runs))]
    for kind, panels_ in OVERLAYS.items():
        curves_of = {title: run.parts[kind] for title, run in runs.items() if kind in run.parts}
        drawn = [figure(p, lines) for p in panels_ if (lines := overlay_lines(p, curves_of))]
        parts.append(section(kind, LONG_NAMES[kind], tag("div", *drawn, class_="grid")) if drawn else Html())
    return join(part for part in parts if part)


# -- settings -----------------------------------------------------------------------------------------


def settings_section(runs: Runs) -> Html:
    """The settings that differ, then those that do not. A stage that only one run has is named and left out."""
    stages_of = {title: [kind for kind in run.folders if kind in RUNTIME] for title, run in runs.items()}
    shared = [kind for kind in RUNTIME if sum(kind in stages for stages in stages_of.values()) > 1]
    keys = sorted({key for run in runs.values() for key in run.config if _is_compared(key, shared)})
    if not keys:
        return Html()
    same = [key for key in keys if is_same(list(runs.values()), key)]
    differ = [(tag("code", key), *(_shown(run, key) for run in runs.values())) for key in keys if key not in same]
    words = [
        tag(
            "p", f"Only {title} has {', '.join(label(k) for k in alone)}; its settings are not compared.", class_="mute"
        )
        for title, stages in stages_of.items()
        if (alone := [kind for kind in stages if kind not in shared])
    ]
    table_ = table("Settings that differ, by stage", ("setting", *runs), differ)
    calm = tag("p", "No setting differs.", class_="mute")
    first = next(iter(runs.values()))
    alike = [
        (tag("code", key), _shown(next((r for r in runs.values() if key in r.config), first), key)) for key in same
    ]
    title = f"Settings that are the same ({len(same)})"
    rest = fold(title, table(title, ("setting", "value"), alike)) if alike else Html()
    return section("settings", "Settings that differ", table_ if differ else calm, *words, rest)


def _is_compared(key: str, stages: Sequence[str]) -> bool:
    """Whether a setting is of a stage that is compared and says what is learned, not where."""
    stage, _, name = key.partition(".")
    return stage in stages and name not in RUNTIME[stage]


def is_same(runs: Sequence[Run], key: str) -> bool:
    """Whether the runs that have the stage of `key` agree on it.

    A path into a run's own directory is the same as another run's, and so are two folders with the same data.
    """
    stage, _, name = key.partition(".")
    having = [run for run in runs if stage in run.folders]
    if name == "data" and all(hashes := [data_hash(run, stage) for run in having]):
        return len(set(hashes)) == 1
    raw = {repr(run.config.get(key)) for run in having}
    return len(raw) == 1 or len({repr(home_relative(run.config.get(key), run)) for run in having}) == 1


def _shown(run: Run, key: str) -> str:
    if key not in run.config:
        return ABSENT
    value = run.config[key]
    if isinstance(value, str):
        return public(str(home_relative(value, run)), run)[:80] or "(empty)"
    return str(value).lower() if isinstance(value, bool) else str(value)[:80]


# -- scores -------------------------------------------------------------------------------------------


def score_table(runs: Runs) -> Html:
    """Each run's accuracy by stage and how its training went; columns that no run fills are left out."""
    shared = [kind for kind in LONG_NAMES if all(kind in run.parts for run in runs.values())]
    kind = next((kind for kind in reversed(list(NAMES)) if kind in shared), "")
    of = f" of {label(kind)}" if kind else ""
    head = ("run", *(f"{name}, test" for name in STAGES.values()),
            f"last validation{of}", f"reward{of}", f"steps{of}", "time")  # fmt: skip
    rows = [(tag("b", title), *_scores(run), *_training(run, kind)) for title, run in runs.items()]
    kept = [i for i in range(len(head)) if any(row[i] != ABSENT for row in rows)]
    cells = [[row[i] for i in kept] for row in rows]
    return table("Scores of each run, with 95 % intervals", [head[i] for i in kept], cells)


def _scores(run: Run) -> list[object]:
    """The test accuracy, or the mean reward, of each stage."""
    found = {s["name"]: s for s in [*run.stages, *run.rewarded]}
    cells: list[object] = []
    for name in STAGES:
        if not (s := found.get(name)):
            cells.append(ABSENT)
            continue
        graded, ci = number(s.get("accuracy")), pair(s.get("ci95"))
        score = percent(s["accuracy"]) if graded else f"{s['reward']:.3f}"
        low, high = (f"{100 * v:.1f}" if graded else f"{v:.3f}" for v in ci or (0.0, 0.0))
        cells.append(tag("span", score, tag("small", f" {low}–{high}") if ci else Html()))
    return cells


def _training(run: Run, kind: str) -> list[object]:
    """Last validation, reward, steps and time of the stage that the runs share, else of the run's last."""
    curves = run.parts.get(kind) or next(reversed(run.parts.values()), Curves(()))
    accuracies, rewards = (curves.series(f"val/{name}")[1] for name in ("accuracy", "reward"))
    last = percent(accuracies[-1]) if accuracies else f"{rewards[-1]:.3f}" if rewards else ABSENT
    ends = curves.ends("reward/mean")
    reward = f"{ends[0]:.3g} → {ends[1]:.3g}" if ends else ABSENT
    return [last, reward, f"{len(curves.rows):,}" if curves.rows else ABSENT, duration(run.summary.get("seconds"))]


# -- paired comparison --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Paired:
    """A run against the first one, over the problems that both answered."""

    name: str
    first: Evaluated
    own: Evaluated
    found: Comparison


def pair_up(name: str, first: Sequence[Evaluated], own: Sequence[Evaluated]) -> Paired | None:
    """The first two evaluations over the same problems, those of the same stage before others."""
    pairs = [(a, b) for a in first for b in own]
    for a, b in sorted(pairs, key=lambda pair_: pair_[0].stage != pair_[1].stage):
        try:
            return Paired(name, a, b, against(a.problems, b.problems, name))
        except UserError:  # other problems
            continue
    return None


def paired_table(runs: Runs) -> Html:
    """Each run against the first one, paired where both have an evaluation over the same problems."""
    kept = {name: evaluations(run) for name, run in runs.items()}
    first = next(iter(runs))
    found: list[Paired] = []
    refused = []
    for name in list(runs)[1:]:
        if not kept[first] or not kept[name]:
            bare = first if not kept[first] else name
            refused.append(f"{name} is not compared: no evaluation of {bare} kept its answers.")
        elif one := pair_up(name, kept[first], kept[name]):
            found.append(one)
        else:
            refused.append(f"{name} is not compared: its last evaluation ({kept[name][0].title}) has other problems.")
    words = [tag("p", text, class_="mute") for text in refused]
    if not found:
        return join(words)
    lead = (
        "Over the same problems, one by one. The verdict is at 5 % by the mid-p of McNemar's test after Holm's "
        "correction; the last column is how many problems show a gain of this size with 80 % power."
    )
    head = ("run", "accuracy", first, "points", "95 % CI", "verdict", "evaluation", "n",
            "won", "lost", "p exact", "p Holm", "n needed")  # fmt: skip
    title = f"Each run against {first}"
    parts = [
        tag("h3", "Paired comparison"),
        tag("p", lead, class_="mute"),
        table(title, head, _paired_rows(first, found)),
    ]
    return join([*parts, *words])


def _paired_rows(first: str, found: Sequence[Paired]) -> list[tuple[object, ...]]:
    corrected, p_holm = corrected_for_number([one.found for one in found])
    return [
        (
            tag("b", one.name),
            percent(result.accuracy_b),
            percent(result.accuracy_a),
            number(100 * result.difference, "{:+.1f}"),
            points(result.ci95),
            _verdict(result),
            one.own.title if one.own.title == one.first.title else f"{one.own.title}; {first}: {one.first.title}",
            f"{result.n:,}",
            f"{result.won:,}",
            f"{result.lost:,}",
            *(p_value(p).removeprefix("=\u00a0") for p in (result.p_value, holm)),
            number(result.problems_needed, "{:,}") or ABSENT,
        )
        for one, result, holm in zip(found, corrected, p_holm, strict=True)
    ]


def _verdict(result: Comparison) -> str:
    if not result.won and not result.lost:
        return "same answers"
    if not result.significant:
        return "within noise"
    return "better" if result.difference > 0 else "worse"
