"""What a run directory holds, read for the report, and its numbers in words. Knows files, no markup.

A run that is still going or was killed is read as far as it went; what is missing or broken becomes a note.
"""

from __future__ import annotations

import json
import math
import platform
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from grpo_gsm8k.errors import RunDirError
from grpo_gsm8k.evals.accuracy import grouped
from grpo_gsm8k.report_figures import TIMES, Curves
from grpo_gsm8k.runs import diagnosis
from grpo_gsm8k.runs.diagnosis import RISING, Finding, trend

STAGES = {"base": "Base", "sft": "SFT", "ei": "EI", "grpo": "GRPO"}
LARGEST = 1e100
TRAINING = ("sft", "ei", "grpo")


@dataclass(frozen=True)
class Run:
    """What was found in one directory: the stages of a pipeline, or one training run."""

    path: Path
    summary: dict[str, Any]  # pipeline.json
    parts: dict[str, Curves]  # sft | ei | grpo -> its metrics
    folders: dict[str, Path]  # sft | ei | grpo -> its run directory
    evals: dict[str, list[dict[str, Any]]]
    notes: list[str] = field(default_factory=list)

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The evaluated stages in order; where pipeline.json lacks one, counted from its eval rows."""
        listed = [s for s in _dicts(self.summary.get("stages")) if number(s.get("accuracy")) and "name" in s]
        known = {s.get("name") for s in listed}
        graded = {name: rows for name, rows in self.evals.items() if any(_graded(row) for row in rows)}
        counted = [_count(name, rows) for name, rows in graded.items() if name not in known]
        order = list(STAGES)
        return sorted(listed + counted, key=lambda s: order.index(s["name"]) if s["name"] in order else 99)

    @property
    def rewarded(self) -> list[dict[str, Any]]:
        """The evaluated stages of a task without right answers, which have a mean reward instead of an accuracy."""
        listed = _dicts(self.summary.get("stages"))
        return [s for s in listed if "name" in s and number(s.get("reward")) and not number(s.get("accuracy"))]

    @property
    def comparisons(self) -> list[dict[str, Any]]:
        """The paired comparisons between stages."""
        return [c for c in _dicts(self.summary.get("comparisons")) if pair(c.get("ci95"))]


def _dicts(value: object) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _graded(row: Mapping[str, Any]) -> bool:
    """Whether a row of an evaluation is right or wrong; one without the key is wrong."""
    return row.get("correct", False) is not None


def _count(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    def share(key: str, value: object) -> float:
        return sum(1 for row in rows if row.get(key) == value) / len(rows)

    tokens = [row["tokens"] for row in rows if isinstance(row.get("tokens"), int)]
    return {
        "name": name,
        "accuracy": share("correct", True),
        "n": len(rows),
        "format_accuracy": share("format_ok", True),
        "truncated": share("finish_reason", "length"),
        "mean_tokens": sum(tokens) / len(tokens) if tokens else None,
        "weights_sha256": rows[0].get("weights_sha256"),
    }


def read_run(path: Path) -> Run:
    """Everything the page needs from one directory.

    Raises:
        RunDirError: there is no such directory, or no run wrote it.
    """
    if not path.is_dir():
        raise RunDirError(f"{path}: no such directory; give the directory that a run wrote")
    notes: list[str] = []
    summary = _read_json(path / "pipeline.json", path, notes)
    notes += [
        f"{entry.relative_to(path).as_posix()} is a link out of the run directory and is not followed."
        for entry in sorted(path.rglob("*"))
        if entry.is_symlink() and "wandb" not in entry.parts and not is_inside(entry, path)
    ]
    folders = {name: path / name for name in TRAINING if _is_run(path / name) and is_inside(path / name, path)}
    evals = {f.stem: read_lines(f, notes, path) for f in sorted(path.glob("evals/*.jsonl")) if f.stem in STAGES}
    if not (folders or evals or (path / "pipeline.json").exists()):
        if not _is_run(path):
            raise RunDirError(f"{path}: not a run directory: neither pipeline.json nor metrics.jsonl is in it")
        curves = _read_curves(path, notes, path)
        kind = _kind(curves)
        return Run(path, {}, {kind: curves}, {kind: path}, {}, notes)
    parts = {name: _read_curves(folder, notes, path, f"{name}/") for name, folder in folders.items()}
    run = Run(path, summary, parts, folders, evals, notes)
    seen = {s["name"] for s in [*run.stages, *run.rewarded]}
    skipped = {"ei"} if run.rewarded else set()  # it keeps what is right, and nothing is
    absent = [label for name, label in STAGES.items() if name not in seen | skipped]
    if absent:
        notes.append(f"No evaluation yet of {', '.join(absent)}: the run was stopped before, or is still going.")
    for stage in run.stages:
        rows = evals.get(stage["name"], [])
        if not rows:
            notes.append(f"evals/{stage['name']}.jsonl is missing, so its answers are not shown.")
        elif stage.get("weights_sha256") not in (None, rows[0].get("weights_sha256")):
            notes.append(f"evals/{stage['name']}.jsonl was written by other weights than pipeline.json names.")
    return run


def _is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").is_file() or (path / "config.toml").is_file()


def _kind(curves: Curves) -> str:
    names = curves.names()
    if any(n.startswith(("progress/grpo", "groups/", "reward/")) for n in names):
        return "grpo"
    return "ei" if any(n.startswith(("ei/", "progress/ei")) for n in names) else "sft"


def read_text(path: Path, root: Path) -> str:
    """A file's text, "" without one, and for a link out of the run directory `root`: its target is not ours to show."""
    return path.read_text("utf-8", errors="replace") if path.is_file() and is_inside(path, root) else ""


def is_inside(path: Path, root: Path) -> bool:
    """Whether a path ends below `root`, whatever links it goes through."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a circle of links
        return False


_PATH = re.compile(r"(?<![\w./~])(?:/[\w.+@%-]+){2,}/?")
_ADDRESS = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*")


def public(text: str) -> str:
    """A text of the run's provenance without what names people and machines: the page may be published.

    Of an absolute path the last part stays; addresses and this machine's name go.
    """

    def last(match: re.Match[str]) -> str:
        parts = match[0].strip("/").split("/")
        return f"…/{parts[-1]}" if len(parts) > 2 else "…"  # /home/NAME is a name

    text = _ADDRESS.sub("[address]", _PATH.sub(last, text.replace("file://", "")))
    host = platform.node()
    return re.sub(rf"\b{re.escape(host)}\b", "[host]", text) if len(host) > 3 and host != "localhost" else text


def _read_json(path: Path, root: Path, notes: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path, root) or "{}")
    except (ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({error}); shown without it.")
        return {}
    return value if isinstance(value, dict) else {}


def read_config(folder: Path, notes: list[str], root: Path) -> dict[str, Any]:
    """The tables of a run's config.toml; none where it is absent or broken."""
    try:
        return tomllib.loads(read_text(folder / "config.toml", root))
    except (ValueError, RecursionError):
        notes.append(f"{folder.name}/config.toml cannot be read.")
        return {}


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


def read_lines(path: Path, notes: list[str], root: Path, where: str = "") -> list[dict[str, Any]]:
    """The objects in a JSONL file; lines that are none are counted in `notes`."""
    rows, broken = [], 0
    for line in read_text(path, root).splitlines():
        try:
            row = json.loads(line or "null")
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            broken += 1
    if broken:
        notes.append(f"{where}{path.name}: {broken} unreadable line{'s'[: broken > 1]} skipped.")
    return rows


def _read_curves(folder: Path, notes: list[str], root: Path, where: str = "") -> Curves:
    steps: dict[float, dict[str, float]] = {}
    for row in read_lines(folder / "metrics.jsonl", notes, root, where):
        numbers = {k: _drawable(v) for k, v in row.items() if isinstance(v, int | float)}
        if 0 <= numbers.get("step", math.nan) < 1e15:
            steps.setdefault(numbers["step"], {}).update(numbers)  # a resumed step, or a late evaluation
    bad = sum(not math.isfinite(v) for row in steps.values() for v in row.values())
    if bad:
        notes.append(f"{where}metrics.jsonl: {bad} values are NaN, infinite or beyond 1e100, and not drawn.")
    if not steps:
        notes.append(f"{where}metrics.jsonl has no steps yet.")
    return Curves(tuple(_derive(steps[step]) for step in sorted(steps)))


def _drawable(value: float) -> float:
    """A number as it is; NaN for one so large that sums of it, or a figure's axis, would overflow."""
    return float(value) if -LARGEST < value < LARGEST else math.nan


def _derive(row: dict[str, float]) -> dict[str, float]:
    """The row with what follows from it: mixed groups, and time that no part accounts for."""
    if "groups/all_right_frac" in row and "groups/all_wrong_frac" in row:
        row["groups/mixed_frac"] = 1 - row["groups/all_right_frac"] - row["groups/all_wrong_frac"]
    if "time/total" in row:
        named = sum(row.get(f"time/{name}", 0.0) for name in TIMES)
        row["time/other"] = max(0.0, row["time/total"] - named)
    return row


def last_evaluation(run: Run) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """The last evaluation that kept its answers: what it is called, and its rows by problem; ("", {}) without one."""
    names = [s["name"] for s in run.stages if run.evals.get(s["name"])]
    if names:
        title, rows = f"{label(names[-1])}, test", run.evals[names[-1]]
    else:
        kept = [path for folder in run.folders.values() for path in sorted(folder.glob("evals/step_*.jsonl"))]
        if not kept:
            return "", {}
        title = f"validation, step {int(kept[-1].stem.removeprefix('step_')):,}"
        rows = read_lines(kept[-1], run.notes, run.path, "evals/")
    return title, grouped([r for r in rows if isinstance(r.get("id"), str) and isinstance(r.get("correct"), bool)])


# -- numbers in words ---------------------------------------------------------------------------------


def number(value: object, form: str = "{:.4g}") -> str:
    """A finite number as text, else ''."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST
    return form.format(value).replace("e-0", "e-").replace("-", "−") if ok else ""


def percent(share: object) -> str:
    """0.123 -> '12.3 %', with a space that does not break."""
    return number(100 * share, "{:.1f}\u00a0%") or "–" if isinstance(share, int | float) else "–"


def duration(seconds: object) -> str:
    """3700 -> '1 h 2 min', 95 -> '1 min 35 s'."""
    if not isinstance(seconds, int | float) or not number(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.{0 if seconds >= 10 else 1}f}\u00a0s"
    large, small, units = (round(seconds), 60, "min s") if seconds < 3600 else (round(seconds / 60), 60, "h min")
    unit, rest = units.split()
    return f"{large // small}\u00a0{unit} {large % small}\u00a0{rest}"


def label(stage: object) -> str:
    return STAGES.get(str(stage), str(stage))


def pair(value: object) -> tuple[float, float] | None:
    if isinstance(value, list) and len(value) == 2 and all(number(v) for v in value):
        return float(value[0]), float(value[1])
    return None


def p_value(p: object) -> str:
    if not isinstance(p, int | float) or not number(p):
        return "not recorded"
    if p >= 0.001:
        return f"=\u00a0{p:.3f}"
    if p < 1e-12:
        return "<\u00a010⁻¹²"
    mantissa, exponent = f"{p:.1e}".split("e")
    return (
        f"=\u00a0{mantissa}\u00a0×\u00a010{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    )


def points(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}".replace("-", "−")


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


# -- what the GRPO curves say -------------------------------------------------------------------------


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
