"""The page about one run: its result, its training, its time, its answers, and where it comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_gsm8k.report import figures
from grpo_gsm8k.report.findings import findings, readings
from grpo_gsm8k.report.headline import comparison_sentence
from grpo_gsm8k.report.markup import Html, fold, frame, join, preformatted, region, section, table, tag
from grpo_gsm8k.report.names import command, data_name, model_name, public
from grpo_gsm8k.report.panels import TIME_PANEL, Curves, panel_lines
from grpo_gsm8k.report.read import Run, read_text
from grpo_gsm8k.report.samples import samples_section, training_samples
from grpo_gsm8k.report.training import calm, diagnosis_section, figure, panels, reading_list, signals
from grpo_gsm8k.report.words import LONG_NAMES, duration, label, number, pair, percent

SAMPLING = {
    "grpo": "GRPO: is it learning, and from what",
    "distill": "Distillation: does the student come nearer to its teacher",
}
"""The parts that sample as they train, and the titles of their sections."""
TEXTS = {".txt", ".toml", ".json", ".diff", ".md", ""}


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
        tag("div", tag("h3", f"{label(c.get('a'))} to {label(c.get('b'))}"), tag("p", comparison_sentence(c)))
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
    return section("result", "Accuracy by stage", grid, table("Each stage on the test problems", head, rows))


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
    return table("Each stage on the test examples", head, rows)


def time_section(run: Run) -> Html:
    """Seconds per stage, and where the seconds of a step go that samples."""
    stages = [s for s in run.stages if number(s.get("seconds"))]
    parts = []
    if stages:
        bars = [(label(s["name"]), float(s["seconds"]), duration(s["seconds"])) for s in stages]
        svg = Html(figures.draw_bars("Time per stage", bars))
        parts.append(frame("Time per stage", svg, "Wall-clock time as the pipeline recorded it."))
    curves = next((run.parts[kind] for kind in SAMPLING if kind in run.parts), Curves(()))
    if lines := panel_lines(TIME_PANEL, curves):
        parts.append(figure(TIME_PANEL, lines))
    totals = Html()
    if lines:
        whole = sum(sum(line.ys) for line in lines)
        rows = [(line.label, duration(sum(line.ys)), percent(sum(line.ys) / (whole or 1))) for line in lines]
        title = "Totals over all steps"
        totals = fold(title, table(title, ("part", "time", "share"), rows))
    return section("time", "Time", tag("div", *parts, class_="grid"), totals) if parts else Html()


def provenance(run: Run) -> Html:
    """Config, command, data hashes and the system, as the run wrote them."""
    texts: dict[str, str] = {}
    for folder in dict.fromkeys([run.path, *run.folders.values()]):
        names = ["command.txt", "config.toml", "pipeline_config.json", "data.json", "code.diff"]
        found = [folder / name for name in names] + sorted((folder / "sys").glob("*"))
        for path in found:  # the environment may name people and machines: it stays behind
            text = "" if path.stem.startswith("env") or path.suffix not in TEXTS else read_text(path, run.path)
            if text.strip():
                shown = command(text, run) if path.name == "command.txt" else public(text, run)
                texts[path.relative_to(run.path).as_posix()] = shown
    if run.summary:
        texts["pipeline.json"] = public(json.dumps(run.summary, indent=2, ensure_ascii=False), run)
    folds = [fold(name, region(name, preformatted(text), css="long")) for name, text in texts.items()]
    return section("provenance", "Configuration and provenance", *folds)


def facts(run: Run) -> list[tuple[str, object]]:
    """What one wants to know about a run before reading on."""
    found: dict[str, object] = {"model": model_name(run), "data": data_name(run)}
    for name in ("task", "preset", "seed"):
        found[name] = public(str(run.summary.get(name, run.first_setting(name))), run)
    found["time"] = duration(run.summary["seconds"]) if number(run.summary.get("seconds")) else ""
    for kind, curves in run.parts.items():
        found[f"{label(kind)} steps"] = f"{len(curves.rows):,}" if curves.rows else ""
    folders = (run.path, *run.folders.values())
    begins = [read_text(folder / "code.diff", run.path)[:200] for folder in folders]  # "# commit 0123abcd…"
    commits = [re.search(r"^# .*?commit ([0-9a-f]{7,8})", text) for text in begins]
    commits.append(re.search(r"_([0-9a-f]{7,8})(?:-dirty)?$", run.path.name))
    found["commit"] = next((tag("code", match[1]) for match in commits if match), "")
    commands = [command(read_text(folder / "command.txt", run.path), run) for folder in folders]
    found["command"] = next((tag("code", text[:400]) for text in commands if text), "")
    return [(name, value) for name, value in found.items() if value != ""]


def run_page(run: Run) -> Html:
    """The body of the page for one run."""
    parts = [result_section(run)]
    for kind, title in SAMPLING.items():
        if not (curves := run.parts.get(kind)) or not curves.rows:
            continue
        found = findings(run, kind)
        parts.append(diagnosis_section(found) if found else Html())
        said = readings(run, kind, {finding.name for finding in found})
        story = (signals(curves, said), Html() if found else calm(curves, said), panels(curves, kind))
        parts.append(section(kind, title, *story))
    for kind in ("sft", "ei"):
        if kind in run.parts and run.parts[kind].rows:
            words = reading_list(readings(run, kind))
            parts.append(section(kind, LONG_NAMES[kind], words, panels(run.parts[kind], kind)))
    parts += [time_section(run), samples_section(run), training_samples(run, run.notes), provenance(run)]
    return join(part for part in parts if part)
