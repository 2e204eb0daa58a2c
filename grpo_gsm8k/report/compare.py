"""Several runs side by side: scores, what differs in their configs, overlaid curves."""

from __future__ import annotations

from collections.abc import Mapping

from grpo_gsm8k.errors import UserError
from grpo_gsm8k.evals.compare import against, corrected_for_number
from grpo_gsm8k.evals.stats import Comparison
from grpo_gsm8k.report.markup import Html, join, section, table, tag
from grpo_gsm8k.report.panels import OVERLAYS, Curves, overlay_lines
from grpo_gsm8k.report.read import Run, flat_config, last_evaluation, public
from grpo_gsm8k.report.training import figure
from grpo_gsm8k.report.words import LONG_NAMES, STAGES, duration, number, p_value, pair, percent, points


def comparison_page(runs: Mapping[str, Run]) -> Html:
    """Several runs side by side: scores, what differs in their configs, overlaid curves."""
    rows = []
    for title, run in runs.items():
        scores = {s["name"]: s for s in run.stages}
        cells: list[object] = []
        for name in STAGES:
            s = scores.get(name)
            ci = pair(s.get("ci95")) if s else None
            spread = tag("small", f" {100 * ci[0]:.1f}–{100 * ci[1]:.1f}") if ci else Html()
            cells.append(tag("span", percent(s["accuracy"]), spread) if s else "–")
        curves = next(reversed(run.parts.values()), Curves(()))
        val, reward = curves.series("val/accuracy")[1], curves.ends("reward/mean")
        last = percent(val[-1]) if val else "–"
        rewards = f"{reward[0]:.3g} → {reward[1]:.3g}" if reward else "–"
        rows.append((tag("b", title), *cells, last, rewards, len(curves.rows), duration(run.summary.get("seconds"))))
    head = ("run", *STAGES.values(), "last validation", "reward", "steps", "time")
    configs = {title: flat_config(run) for title, run in runs.items()}
    keys = sorted(set().union(*configs.values()))
    differing = [
        (tag("code", key), *(public(str(c.get(key, "–")))[:80] for c in configs.values()))
        for key in keys
        if len({repr(c.get(key)) for c in configs.values()}) > 1
    ]
    parts = [section("result", "Side by side", table(head, rows), paired_table(runs))]
    differs = table(("setting", *runs), differing) if differing else tag("p", "No setting differs.", class_="mute")
    parts.append(section("settings", "Settings that differ", differs if keys else Html()))
    for kind, panels_ in OVERLAYS.items():
        curves_of = {title: run.parts[kind] for title, run in runs.items() if kind in run.parts}
        drawn = [figure(p, lines) for p in panels_ if (lines := overlay_lines(p, curves_of))]
        parts.append(section(kind, LONG_NAMES[kind], tag("div", *drawn, class_="grid")) if drawn else Html())
    return join(parts)


def paired_table(runs: Mapping[str, Run]) -> Html:
    """The last evaluation of each run against the first run's, paired where both are over the same problems."""
    evaluations = {name: last_evaluation(run) for name, run in runs.items()}
    first = next(iter(runs))
    found: list[tuple[str, Comparison]] = []
    refused = []
    for name in list(runs)[1:]:
        if not all(evaluations[one][1] for one in (first, name)):
            bare = name if evaluations[first][1] else first
            refused.append(f"{name} is not compared: no evaluation of {bare} kept its answers.")
            continue
        try:
            found.append((name, against(evaluations[first][1], evaluations[name][1], name)))
        except UserError:
            refused.append(f"{name} is not compared: its last evaluation ({evaluations[name][0]}) has other problems.")
    corrected, p_holm = corrected_for_number([one for _, one in found])
    rows = [
        (
            tag("b", name),
            evaluations[name][0],
            percent(one.accuracy_b),
            number(100 * one.difference, "{:+.1f}"),
            points(one.ci95),
            f"{one.won:,}",
            f"{one.lost:,}",
            *(p_value(p).removeprefix("=\u00a0") for p in (one.p_value, holm)),
            "noise?" if not one.significant else "better" if one.difference > 0 else "worse",
            number(one.problems_needed, "{:,}") or "–",
        )
        for (name, _), one, holm in zip(found, corrected, p_holm, strict=True)
    ]
    head = (
        "run",
        "evaluation",
        "accuracy",
        "points",
        "95 % CI",
        "won",
        "lost",
        "p exact",
        "p Holm",
        "",
        "n needed",
    )
    words = [tag("p", text, class_="mute") for text in refused]
    if not rows:
        return join(words)
    lead = (
        f"Against {first} ({evaluations[first][0]}, {percent(corrected[0].accuracy_a)}), over the same "
        f"{corrected[0].n:,} problems, one by one. The verdict is at 5 % by the mid-p of McNemar's test after Holm's "
        "correction; the last column is how many problems show a gain of this size with 80 % power."
    )
    return join([tag("h3", "Paired comparison"), tag("p", lead, class_="mute"), table(head, rows), *words])
