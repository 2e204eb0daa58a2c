"""Run directories in, one self-contained HTML page out: did the model learn, and why.

Reads files only and knows no trainer. Runs that are still going, were killed or lack files are shown as far
as they went, and the page says what is missing. Nothing is fetched when the page is opened, everything that
came from a file is escaped, and the same files give the same bytes.

    python -m grpo_gsm8k.cli report artifacts/runs/20260101T120000_abc1234
    python -m grpo_gsm8k.cli report RUN RUN ...        # side by side, in comparison.html of the first
"""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from os.path import commonpath, realpath
from pathlib import Path
from typing import Any

from grpo_gsm8k import report_figures as figures
from grpo_gsm8k.errors import RunDirError, UserError
from grpo_gsm8k.evals.compare import against, corrected_for_number
from grpo_gsm8k.evals.stats import Comparison
from grpo_gsm8k.report_figures import Curves, Line, Panel
from grpo_gsm8k.report_read import (
    STAGES,
    Run,
    comparison_sentence,
    duration,
    findings,
    headline,
    label,
    last_evaluation,
    number,
    p_value,
    pair,
    percent,
    points,
    public,
    read_config,
    read_lines,
    read_run,
    read_text,
    readings,
    stage_story,
)
from grpo_gsm8k.runs.diagnosis import WINDOW, Finding, loss_note
from grpo_gsm8k.runs.files import write_atomic

LONG_NAMES = {"grpo": "GRPO", "sft": "Supervised fine-tuning", "ei": "Expert iteration"}
SIGNALS = (  # (label, metric, is a share, what it tells)
    ("Mean reward", "reward/mean", False, "what is optimised; should rise"),
    ("Right answers", "outcome/right_frac", True, "of the sampled training responses"),
    ("Mixed groups", "groups/mixed_frac", True, "the only ones with a gradient"),
    ("Entropy, nats", "policy/entropy", False, "room left to explore"),
    ("Response length", "length/mean", False, "tokens"),
    ("Cut off", "outcome/truncated_frac", True, "ran into the token limit"),
    ("|Δ log p| mean", "mismatch/logp_abs_mean", False, "sampler against trainer; should stay small"),
    ("Gradient norm", "policy/grad_norm", False, "before clipping"),
)
LONG_TEXT, LONG_LINES, MOST_TEXT = 320, 8, 6000  # characters and lines shown at once; characters at all
HOW_TO_READ = (
    "Start and end are means over the first and the last tenth of the steps. In the figures thin lines are single "
    "steps, thick lines their running mean over a twentieth of the run; the number beside a name is its end."
)
PICKS = (  # (title, right before, right after, how many)
    ("Fixed by {last}", False, True, 4),
    ("Broken by {last}", True, False, 3),
    ("Wrong before and after", False, False, 3),
    ("Right before and after", True, True, 2),
)


class Html(str):
    """Text that is markup already and must not be escaped again."""


def tag(name: str, *children: object, **attributes: object) -> Html:
    """`<name …>children</name>`; children are escaped unless they are `Html`."""
    opened = "".join(f' {k.rstrip("_")}="{html.escape(str(v))}"' for k, v in attributes.items() if v)
    body = "".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children)
    return Html(f"<{name}{opened}>{body}</{name}>")


def join(parts: Iterable[Html]) -> Html:
    """The parts, one after the other."""
    return Html("\n".join(parts))


# -- pieces of the page -------------------------------------------------------------------------------


def table(head: Sequence[object], rows: Iterable[Sequence[object]], css: str = "") -> Html:
    """A table that scrolls sideways on its own where the screen is narrow."""
    top = tag("thead", tag("tr", *(tag("th", cell) for cell in head)))
    body = join(tag("tr", *(tag("td", cell) for cell in row)) for row in rows)
    return tag("div", tag("table", top, tag("tbody", body), class_=css), class_="scroll")


def fold(title: object, *body: Html) -> Html:
    """A collapsed section."""
    return tag("details", tag("summary", title), *body)


def preformatted(text: str, most: int = 40_000) -> Html:
    """Text as it is, cut where it is very long."""
    rest = len(text) - most
    return tag("pre", text[:most], f"\n… {rest:,} more characters" if rest > 0 else "")


def frame(title: str, picture: Html, caption: str, wide: bool = True, keys: Iterable[Html] = ()) -> Html:
    """A figure: title, legend, picture and the line that says how to read it."""
    legend, below = tag("div", *keys, class_="keys"), tag("figcaption", caption)
    return tag("figure", tag("h3", title), legend, picture, below, class_="wide" if wide else "")


def _figure(panel: Panel, lines: list[Line], band: Any = None) -> Html:
    keys = [
        tag("span", tag("i", class_=line.colour), line.label, " ", tag("b", _last(panel, line)), class_="key")
        for line in (reversed(lines) if panel.kind == "stack" else lines)
    ]
    caption = panel.caption
    if panel.log and (zeros := sum(y <= 0 for line in lines for y in line.ys)):
        caption += f" {zeros:,} values are exactly zero and have no place on a log axis."
        lines = [kept for line in lines if (kept := line.positive()).xs]
    picture = Html(figures.draw(panel, lines, band)) if lines else tag("p", "Zero at every step.", class_="empty")
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
    for panel in figures.PANELS[kind]:
        lines = figures.panel_lines(panel, curves)
        if not lines:
            absent.append(panel.title)
            continue
        band = None
        if panel.band:
            bounds = [r for r in curves.rows if all(number(r.get(m)) for m in panel.band)]
            band = tuple([r[m] for r in bounds] for m in (panel.x, *panel.band)) if bounds else None
        drawn.append(_figure(panel, lines, band))
    missing = tag("p", f"Not recorded: {', '.join(absent)}.", class_="mute") if absent else Html()
    return join([tag("div", *drawn, class_="grid"), missing, _other_metrics(curves, kind)])


def _other_metrics(curves: Curves, kind: str) -> Html:
    used = {metric for panel in (*figures.PANELS[kind], figures.TIME_PANEL) for metric, _ in panel.lines}
    rows = []
    for name in curves.names():
        ys = curves.series(name)[1]
        if ys and name not in used:
            spark = Html(figures.sparkline(ys))
            rows.append((tag("code", name), spark, len(ys), *map(number, (ys[0], ys[-1], min(ys), max(ys)))))
    head = ("metric", "", "values", "first", "last", "min", "max")
    return fold(f"All other metrics ({len(rows)})", table(head, rows)) if rows else Html()


def signals(curves: Curves, found: Sequence[Finding]) -> Html:
    """A handful of GRPO's metrics at the start and at the end."""
    rows = []
    for title, metric, share, tells in SIGNALS:
        if ends := curves.ends(metric):
            a, b = (percent(v) if share else number(v, "{:.3g}") for v in ends)
            rows.append((tag("span", title, tag("small", tells)), a, b))
    if not rows:
        return Html()
    sentences = readings(curves, {finding.name for finding in found})
    words = [tag("li", text, class_="good" if good else "warn") for good, text in sentences]
    said = tag("div", tag("ul", *words, class_="readings"), tag("p", HOW_TO_READ, class_="mute"))
    return tag("div", said, table(("", "start", "end"), rows), class_="halves")


def diagnosis_section(found: Sequence[Finding]) -> Html:
    """What holds the reward back, heaviest first, with completions that show it."""
    blocks = []
    for finding in found:
        mark = tag("span", "!" if finding.alarm else "✓", class_="mark")
        words = (tag("h3", mark, finding.seen), tag("p", finding.why), tag("p", tag("b", "To do: "), finding.todo))
        shown = [tag("div", _question(row), _answer(str(row.get("id", "")), row)) for row in finding.examples]
        examples = fold("Examples", tag("div", *shown, class_="answers")) if shown else Html()
        blocks.append(tag("article", *words, examples, class_="finding warn" if finding.alarm else "finding"))
    lead = f"Judged over the last {WINDOW} steps; the heaviest reason comes first."
    return section("diagnosis", "What holds the reward back", tag("p", lead, class_="mute"), *blocks)


def calm(curves: Curves) -> Html:
    """One line for a run that gives no reason to worry."""
    note = loss_note(curves.rows)
    words = ["Nothing is seen that holds the reward back."] if len(curves.rows) >= WINDOW else []
    words += [note.seen] if note else []
    return tag("p", " ".join(words), class_="mute") if words else Html()


def section(anchor: str, title: str, *body: Html) -> Html:
    """A titled section, or nothing where it has no content."""
    return tag("section", tag("h2", title), *body, id=anchor) if any(body) else Html()


def result_section(run: Run) -> Html:
    """Accuracy of each stage: figure, paired comparisons in words, table. Without right answers, the mean rewards."""
    stages = run.stages
    if run.rewarded:
        return section("result", "Mean reward by stage", reward_table(run.rewarded))
    if not stages:
        return Html()
    dots = []
    for s in stages:
        low, high = pair(s.get("ci95")) or (s["accuracy"], s["accuracy"])
        dots.append((label(s["name"]), s["accuracy"], low, high))
    caption = "Dots are accuracies, bars 95 % intervals; where bars overlap, the paired comparison decides."
    picture = frame("Share of test problems solved", Html(figures.draw_stages(dots)), caption)
    words = [
        tag("div", tag("h3", f"{label(c.get('a'))} → {label(c.get('b'))}"), tag("p", comparison_sentence(c)))
        for c in run.comparisons
    ] or [tag("p", "No paired comparisons recorded.", class_="mute")]
    head = ("stage", "accuracy", "95 % CI", "n", "right format", "tokens", "cut off", "time", "weights")
    rows = [
        (
            label(s["name"]),
            tag("b", percent(s["accuracy"])),
            " – ".join(percent(v) for v in pair(s.get("ci95")) or ()) or "–",
            number(s.get("n"), "{:,.0f}") or "–",
            percent(s.get("format_accuracy")),
            number(s.get("mean_tokens"), "{:,.0f}") or "–",
            percent(s.get("truncated")),
            duration(s.get("seconds")),
            tag("code", str(s.get("weights_sha256") or "–")[:12]),
        )
        for s in stages
    ]
    grid = tag("div", picture, tag("div", *words, class_="wide words"), class_="grid")
    return section("result", "Accuracy by stage", grid, table(head, rows))


def reward_table(stages: Sequence[Mapping[str, Any]]) -> Html:
    """The mean reward of each stage on the test examples."""
    head = ("stage", "mean reward", "95 % CI", "n", "tokens", "cut off", "time", "weights")
    rows = [
        (
            label(s["name"]),
            tag("b", f"{s['reward']:.3f}"),
            " – ".join(f"{v:.3f}" for v in pair(s.get("ci95")) or ()) or "–",
            number(s.get("n"), "{:,.0f}") or "–",
            number(s.get("mean_tokens"), "{:,.0f}") or "–",
            percent(s.get("truncated")),
            duration(s.get("seconds")),
            tag("code", str(s.get("weights_sha256") or "–")[:12]),
        )
        for s in stages
    ]
    return table(head, rows)


def time_section(run: Run) -> Html:
    """Seconds per stage, and where the seconds of a GRPO step go."""
    stages = [s for s in run.stages if number(s.get("seconds"))]
    parts = []
    if stages:
        bars = [(label(s["name"]), float(s["seconds"]), duration(s["seconds"])) for s in stages]
        svg = Html(figures.draw_bars("Time per stage", bars))
        parts.append(frame("Time per stage", svg, "Wall-clock time as the pipeline recorded it."))
    curves = run.parts.get("grpo", Curves(()))
    if lines := figures.panel_lines(figures.TIME_PANEL, curves):
        parts.append(_figure(figures.TIME_PANEL, lines))
    totals = Html()
    if lines:
        whole = sum(sum(line.ys) for line in lines)
        rows = [(line.label, duration(sum(line.ys)), percent(sum(line.ys) / (whole or 1))) for line in lines]
        totals = fold("Totals over all GRPO steps", table(("part", "time", "share"), rows))
    return section("time", "Time", tag("div", *parts, class_="grid"), totals) if parts else Html()


# -- samples ------------------------------------------------------------------------------------------


def pick_problems(run: Run) -> list[tuple[str, int, list[str]]]:
    """(title, how many such problems, ids of those shown); chosen by a hash of the id, not by taste."""
    names = [s["name"] for s in run.stages if run.evals.get(s["name"])]
    if not names:
        return []
    answers = {name: first_samples(run.evals[name]) for name in names}
    before, last = answers[names[max(0, len(names) - 2)]], answers[names[-1]]
    shared = sorted(before.keys() & last.keys(), key=lambda i: hashlib.sha256(i.encode()).hexdigest())
    picked = []
    for title, was, now, most in PICKS:
        ids = [i for i in shared if (bool(before[i].get("correct")), bool(last[i].get("correct"))) == (was, now)]
        picked.append((title.format(last=label(names[-1])), len(ids), ids[:most]))
    return picked


def first_samples(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """id -> the first sample of that problem."""
    return {str(r["id"]): r for r in rows if "id" in r and not r.get("sample")}


def _question(row: Mapping[str, Any]) -> Html:
    text = str(row.get("question") or row.get("prompt") or row.get("id"))[:MOST_TEXT]
    return tag("p", text, " ", tag("span", "gold ", tag("b", str(row.get("gold", "–"))[:200]), class_="gold"))


def _answer(title: str, row: Mapping[str, Any] | None) -> Html:
    if row is None:
        return tag("div", tag("h4", title), tag("p", "not answered", class_="mute"), class_="answer")
    right, response = bool(row.get("correct")), str(row.get("response", ""))
    judged = row.get("correct", False) is not None  # a task by preference knows no right answers
    facts = ["right" if right else "wrong"] if judged else []
    found = row.get("extracted") not in (None, "")
    facts += [f"answer {str(row['extracted'])[:40]}"] if found else ["no answer found"] if judged else []
    facts += [f"{row['tokens']} tokens"] if number(row.get("tokens")) else []
    facts += ["cut off"] if row.get("finish_reason") == "length" else []
    facts += [f"reward {row['reward']:.3g}"] if number(row.get("reward")) else []
    parts = row.get("components")
    facts += [f"{k} {number(v)}" for k, v in parts.items() if number(v)] if isinstance(parts, dict) else []
    body = [preformatted(response, MOST_TEXT)]
    start = "\n".join(response.split("\n")[:LONG_LINES])[:LONG_TEXT]
    if len(response) > len(start):
        body = [tag("pre", start, " …"), fold(f"all {len(response):,} characters", *body)]
    mark = tag("span", "✓" if right else "✗", class_="mark") if judged else Html()
    return tag("div", tag("h4", mark, title), tag("p", " · ".join(facts), class_="mute"), *body,
               class_="answer right" if right else "answer wrong" if judged else "answer")  # fmt: skip


def samples_section(run: Run) -> Html:
    """The same test problems answered by each stage."""
    names = [s["name"] for s in run.stages if run.evals.get(s["name"])]
    answers = {name: first_samples(run.evals[name]) for name in names}
    blocks = []
    for title, count, ids in pick_problems(run):
        blocks.append(tag("h3", f"{title}: {count:,}", Html("" if ids else " problems"), class_="group"))
        for i in ids:
            row = answers[names[-1]][i]
            columns = [_answer(label(name), answers[name].get(i)) for name in names]
            blocks.append(tag("article", _question(row), tag("div", *columns, class_="answers")))
    lead = "The same test problems, answered by every stage. A hash of the id decides which ones are shown."
    return section("samples", "Before and after", tag("p", lead, class_="mute"), *blocks) if blocks else Html()


def training_samples(run: Run, notes: list[str]) -> Html:
    """What the first and the last recorded steps of training sampled."""
    folds = []
    for kind, folder in run.folders.items():
        files = sorted(folder.glob("samples/step_*.jsonl"))
        for path in dict.fromkeys([*files[:1], *files[-1:]]):
            blocks = [
                tag("article", _question(row), tag("div", _answer(str(row.get("id", "")), row)))
                for row in read_lines(path, notes, run.path, f"{kind}/samples/")[:4]
            ]
            step = path.stem.removeprefix("step_").lstrip("0") or "0"
            folds.append(fold(f"{LONG_NAMES[kind]}, step {step}", *blocks))
    return section("training-samples", "Sampled during training", *folds)


# -- provenance, comparison, page ---------------------------------------------------------------------


def provenance(run: Run) -> Html:
    """Config, command, data hashes and the system, as the run wrote them."""
    folds = []
    for folder in dict.fromkeys([run.path, *run.folders.values()]):
        names = ["command.txt", "config.toml", "pipeline_config.json", "data.json", "code.diff"]
        found = [folder / name for name in names] + sorted((folder / "sys").glob("*"))
        for path in found:  # the environment may name people and machines: it stays behind
            text = "" if path.stem.startswith("env") or path.suffix not in TEXTS else read_text(path, run.path)
            if text.strip():
                folds.append(fold(path.relative_to(run.path).as_posix(), preformatted(public(text))))
    if run.summary:
        folds.append(fold("pipeline.json", preformatted(public(json.dumps(run.summary, indent=2, ensure_ascii=False)))))
    return section("provenance", "Configuration and provenance", *folds)


TEXTS = {".txt", ".toml", ".json", ".diff", ".md", ""}


def facts(run: Run) -> list[tuple[str, object]]:
    """What one wants to know about a run before reading on."""
    config = {key.rpartition(".")[2]: value for key, value in _flat_config(run).items()}
    inside = f"{run.summary.get('run_dir', run.path)}/"
    found: dict[str, object] = {}
    for name, key in (("model", "model_id"), ("data", "data"), ("preset", "preset"), ("seed", "seed")):
        value = run.summary[key] if key in run.summary else config.get(key, "")
        found[name] = public(str(value).replace(inside, ""))
    found["time"] = duration(run.summary["seconds"]) if number(run.summary.get("seconds")) else ""
    for kind, curves in run.parts.items():
        found[f"{STAGES[kind]} steps"] = f"{len(curves.rows):,}" if curves.rows else ""
    folders = (run.path, *run.folders.values())
    begins = [read_text(folder / "code.diff", run.path)[:200] for folder in folders]  # "# commit 0123abcd…"
    commits = [re.search(r"^# .*?commit ([0-9a-f]{7,8})", text) for text in begins]
    commits.append(re.search(r"_([0-9a-f]{7,8})(?:-dirty)?$", run.path.name))
    found["commit"] = next((tag("code", match[1]) for match in commits if match), "")
    commands = [public(read_text(folder / "command.txt", run.path)).strip() for folder in folders]
    found["command"] = next((tag("code", text[:400]) for text in commands if text), "")
    return [(name, value) for name, value in found.items() if value != ""]


def _flat_config(run: Run) -> dict[str, object]:
    flat: dict[str, object] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}".lstrip("."), inner)
        else:
            flat[prefix] = value

    for folder in dict.fromkeys([run.path, *run.folders.values()]):
        walk("" if folder == run.path else folder.name, read_config(folder, run.notes, run.path))
    return flat


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
    configs = {title: _flat_config(run) for title, run in runs.items()}
    keys = sorted(set().union(*configs.values()))
    differing = [
        (tag("code", key), *(public(str(c.get(key, "–")))[:80] for c in configs.values()))
        for key in keys
        if len({repr(c.get(key)) for c in configs.values()}) > 1
    ]
    parts = [section("result", "Side by side", table(head, rows), paired_table(runs))]
    differs = table(("setting", *runs), differing) if differing else tag("p", "No setting differs.", class_="mute")
    parts.append(section("settings", "Settings that differ", differs if keys else Html()))
    for kind, panels_ in figures.OVERLAYS.items():
        curves_of = {title: run.parts[kind] for title, run in runs.items() if kind in run.parts}
        drawn = [_figure(p, lines) for p in panels_ if (lines := figures.overlay_lines(p, curves_of))]
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


def run_page(run: Run) -> Html:
    """The body of the page for one run."""
    grpo = run.parts.get("grpo")
    parts = [result_section(run)]
    if grpo and grpo.rows:
        found = findings(run)
        parts.append(diagnosis_section(found) if found else Html())
        story = (signals(grpo, found), Html() if found else calm(grpo), panels(grpo, "grpo"))
        parts.append(section("grpo", "GRPO: is it learning, and from what", *story))
    early = {kind: run.parts[kind] for kind in ("sft", "ei") if kind in run.parts}
    parts += [section(k, LONG_NAMES[k], panels(curves, k)) for k, curves in early.items() if curves.rows]
    parts += [time_section(run), samples_section(run), training_samples(run, run.notes), provenance(run)]
    return join(part for part in parts if part)


def labels(paths: Sequence[Path]) -> list[str]:
    """Short distinct names: each path below what they have in common."""
    if len(paths) == 1:
        return [paths[0].name]
    common = commonpath([p.parent for p in paths])
    return [p.relative_to(common).as_posix() for p in paths]


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one HTML page about one run, or about several side by side, and return its path.

    Args:
        runs: pipeline directories or directories of single training runs.
        out: the page to write; by default `report.html` in the run, for several `comparison.html` in the first.

    Raises:
        RunDirError: a directory does not exist, or no run wrote it.
    """
    paths = list(dict.fromkeys(Path(realpath(run)) for run in runs))  # Path.resolve raises at a circle of links
    if not paths:
        raise RunDirError("no run directory given; try: grpo-gsm8k report artifacts/runs/NAME")
    found = dict(zip(labels(paths), (read_run(path) for path in paths), strict=True))
    target = out or paths[0] / ("report.html" if len(paths) == 1 else "comparison.html")
    write_atomic(target, page(found).encode(errors="replace"))
    return target


def page(runs: Mapping[str, Run]) -> str:
    """The whole document."""
    first = next(iter(runs.values()))
    if len(runs) == 1:
        title, body = headline(first), run_page(first)
        pairs = tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in facts(first)), class_="facts")
        lead = join([tag("p", stage_story(first), class_="lead"), pairs])
    else:
        title, body = f"{len(runs)} runs side by side", comparison_page(runs)
        lead = tag("ul", *(tag("li", tag("b", name), ": ", headline(run)) for name, run in runs.items()))
    notes = [n if len(runs) == 1 else f"{name}: {n}" for name, run in runs.items() for n in dict.fromkeys(run.notes)]
    box = tag("aside", tag("b", "Incomplete"), tag("ul", *(tag("li", n) for n in notes))) if notes else Html()
    count = itertools.count(1)
    unique = re.compile("<svg role.*?</svg>", re.S)
    body = Html(unique.sub(lambda m: figures.prefix_ids(m[0], f"f{next(count)}-"), body))
    anchors = re.findall(r'<section id="([\w-]+)"><h2>(.*?)</h2>', body)
    nav = tag("nav", *(tag("a", Html(text.split(":")[0]), href=f"#{anchor}") for anchor, text in anchors))
    name = " · ".join(runs)
    top = tag("header", tag("p", name, class_="mute"), tag("h1", title), lead, box, nav)
    style = Path(__file__).with_suffix(".css").read_text("utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = f"""<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
{tag("title", f"{title} – {name}")}<style>{style}</style>"""
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{top}\n<main>{body}</main></body></html>\n'
