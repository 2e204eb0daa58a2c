"""What `eval`, `compare`, `contamination`, `objective check` and `study` print for a person."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from os.path import commonpath
from pathlib import Path
from textwrap import shorten
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grpo_gsm8k.runs.files import real_path
from grpo_gsm8k.runs.progress import duration

STAGES = {"base": "base", "sft": "SFT", "ei": "EI", "grpo": "GRPO"}
WIDTH = 130  # where stdout is no terminal
Result = Mapping[str, Any]


def print_eval(result: Result) -> None:
    """Figures, intervals and the spread of an evaluation; of several sets a table."""
    if "sets" in result:
        _print_sets(result)
        return
    out, k, intervals = _console(), result["samples"], result["intervals"]
    seeds = len(result["by_seed"])
    how = "greedy" if result["temperature"] == 0 else f"{k} x {seeds} at temperature {result['temperature']:g}"
    shots = f", {result['shots']} worked examples" if result["shots"] else ""
    out.print(f"{escape(result['model_id'])} on {escape(result['eval_path'])}", highlight=False, soft_wrap=True)
    out.print(f"{result['n']:,} problems, {how}{shots}; {result['grading']} grading", highlight=False, soft_wrap=True)
    table = _table("", "", "95 % interval", "")
    by = "Wilson" if k * seeds == 1 else "bootstrap over problems"
    rates = (
        ("accuracy" if k * seeds == 1 else f"accuracy (avg@{k * seeds})", "accuracy", by),
        ("  graded strictly", "strict_accuracy", "a marked answer only"),
        ("  graded flexibly", "flexible_accuracy", "an answer in prose, too"),
        ("in the asked form", "format_accuracy", ""),
        ("cut off", "truncated", "ran into the token limit"),
    )
    for label, name, note in rates:
        table.add_row(label, _percent(result[name]), _interval(intervals[name]), note)
    for name, figures in (("pass", result["pass_at_k"]), ("maj", result["maj_at_k"])):
        for size, value in list(figures.items())[1:]:  # the first, at k = 1, is the accuracy
            table.add_row(f"{name}@{size}", _percent(value), _interval(intervals[f"{name}@{size}"]), "")
    out.print(table)
    if result["spread"]["problems"] is not None:
        out.print(_spread(result), highlight=False, soft_wrap=True)
    lengths = _table("tokens", "completions", "accuracy", "95 % interval", "cut off")
    for part in result["by_length"]:
        low, high = part["tokens"]
        cells = (f"{part['n']:,}", _percent(part["accuracy"]), _interval(part["ci95"]), _percent(part["truncated"]))
        lengths.add_row(f"{low} to {high}", *cells)
    out.print(lengths)
    out.print(
        f"{result['tokens_per_s']:,.0f} tokens/s, {result['seconds']:.1f} s; {_path(result)}",
        highlight=False,
        soft_wrap=True,
    )


def _print_sets(result: Result) -> None:
    """A row for each set, and what rewritten problems cost against their originals."""
    out, sets = _console(), result["sets"]
    how = "greedy" if result["temperature"] == 0 else f"{result['samples']} at temperature {result['temperature']:g}"
    out.print(f"{escape(result['model_id'])}, {how}; {result['grading']} grading", highlight=False, soft_wrap=True)
    table = _table("set", "problems", "accuracy", "95 % interval", "in the asked form", "cut off", "tokens")
    for one in sets:
        right = one["accuracy"] is not None
        cells = (_percent(one["accuracy"]), _interval(one["ci95"])) if right else (f"reward {one['reward']:.3f}", "")
        more = (_percent(one["format_accuracy"]), _percent(one["truncated"]), f"{one['mean_tokens']:.0f}")
        table.add_row(escape(one["name"]), f"{one['n']:,}", *cells, *more)
    out.print(table)
    for drop in result["drops"]:
        head = f"{drop['set']} against {drop['originals']}: {drop['seeds']:,} originals, {drop['problems']:,} forms"
        missing = f"; of {drop['unpaired']:,} more the original was not evaluated" if drop["unpaired"] else ""
        out.print(f"{escape(head)}, paired{missing}", highlight=False, soft_wrap=True)
        falls = _table("", "originals", "rewritten", "drop in points", "95 % interval", "forms")
        for name, part in (("all", drop), *drop["by_perturbation"].items()):
            shares = (_percent(part["original"]), _percent(part["perturbed"]))
            falls.add_row(escape(name), *shares, _points(part["drop"]), _points(part["ci95"]), f"{part['problems']:,}")
        out.print(falls)
    for one in sets:
        out.print(f"{escape(one['name'])}: rows in {escape(one['results_path'])}", highlight=False, soft_wrap=True)
    out.print(f"machine, code and inputs in {escape(result['run_dir'])}", highlight=False, soft_wrap=True)


def print_pipeline(result: Result) -> None:
    """The stages as in the README, what GRPO gained over SFT, and the line that opens the report."""
    out, stages = _console(), result["stages"]
    right = all(stage["accuracy"] is not None for stage in stages)
    table = _table("stage", "accuracy" if right else "reward", "95 % interval", "seconds")
    for stage in stages:
        value, ends = (stage["accuracy"], stage["ci95"]) if right else (stage["reward"], stage["ci95"])
        cells = (_percent(value), _interval(ends)) if right else (f"{value:.3f}", " to ".join(f"{e:.3f}" for e in ends))
        table.add_row(STAGES.get(stage["name"], stage["name"]), *cells, f"{stage['seconds']:.0f}")
    out.print(table)
    for pair in result["comparisons"]:
        if (pair["a"], pair["b"]) == ("sft", "grpo"):
            won = f"{pair['won']:,} won, {pair['lost']:,} lost of {pair['n']:,}"
            out.print(f"GRPO against SFT: {_points(pair['difference'])} points, {won}", highlight=False, soft_wrap=True)
    print(f"open the report: {open_command(result['report'])}")


def open_command(path: str) -> str:
    """What a person types here to see a page."""
    tool = "open" if sys.platform == "darwin" else next(filter(shutil.which, ("xdg-open", "wslview")), "")
    return f"{tool or 'python3 -m webbrowser'} {shlex.quote(path if tool else Path(path).resolve().as_uri())}"


def print_comparison(result: Result) -> None:
    """Runs against the first one, and for two of them examples and the problems that a gain needs."""
    out, pair = _console(), "comparisons" not in result
    rows = [result] if pair else result["comparisons"]
    head = ("run", "accuracy", "difference", "95 % interval", "won", "lost", "p exact", "p mid")
    table = _table(*head, *(() if pair else ("p Holm",)), "", "problems for this gain")
    names = _names([result["a"], *(row["b"] for row in rows)])
    table.add_row(names[0], _percent(rows[0]["accuracy_a"]))
    for name, row in zip(names[1:], rows, strict=True):
        verdict = "noise?" if not row["significant"] else "better" if row["difference"] > 0 else "worse"
        tests = [_p(row[key]) for key in ("p_value", "p_mid", "p_holm") if key in row]
        needed = "" if row["problems_needed"] is None else f"{row['problems_needed']:,} for {_points(row['gain'])}"
        counts = (f"{row['won']:,}", f"{row['lost']:,}")
        difference = (_points(row["difference"]), _points(row["ci95"]))
        table.add_row(name, _percent(row["accuracy_b"]), *difference, *counts, *tests, verdict, needed)
    out.print(
        f"{rows[0]['n']:,} problems, paired; differences in points, verdict at 5 % by the last p", highlight=False
    )
    out.print(table)
    if pair:
        needed = ", ".join(f"{n:,} for {100 * float(gain):g}" for gain, n in result["needed"].items())
        out.print(
            f"problems that a gain needs, in points (80 % power, two-sided 5 %): {needed}",
            highlight=False,
            soft_wrap=True,
        )
        out.print(_flips(result["examples"]))


def print_contamination(result: Result) -> None:
    """Test problems found in training files."""
    out, n = _console(), result["ngram"]
    table = _table("file", "rows", "whole questions", f"questions, {n} words", f"solutions, {n} words", "whole")
    for entry in result["files"]:
        keys = ("rows", "questions_whole", "questions_overlapping", "solutions_overlapping", "solutions_whole")
        table.add_row(escape(entry["path"]), *(f"{entry[key]:,}" for key in keys))
    out.print(f"of {result['test_problems']:,} test problems, found in training files", highlight=False, soft_wrap=True)
    out.print(table)
    for entry in result["files"]:
        for row in entry["examples"]:
            where = f"{escape(entry['path'])}:{row['line']}"
            out.print(
                f"{where} has of {escape(row['id'])} ({row['kind']}): {escape(row['shared'])}",
                highlight=False,
                soft_wrap=True,
            )


def print_objective(result: Result) -> None:
    """An objective's exact gradient, part by part, and its checks; or the Markdown table of all algorithms."""
    if "algorithms" in result:
        print("\n".join(objective_lines(result["algorithms"])))
        return
    out, settings = _console(), result["objective"]
    shown = "  ".join(f"{key}={value}" for key, value in settings.items() if value != "")
    out.print(f"{escape(shown)}; groups of {result['group_size']}", highlight=False, soft_wrap=True)
    table = _table("gradient of", "", "scale", "sideways", "bias", "noise", "")
    for where, row in result["gradient"].items():
        table.add_row("the objective", _where(where), *_exact(row), row["verdict"])
    for row in result["parts"]:
        table.add_row(
            " ".join(filter(None, (row["part"], escape(row["setting"]), "alone"))),
            _where(row["where"]),
            *_exact(row),
            row["verdict"],
        )
    for row in result["baselines"]:
        table.add_row(f"REINFORCE, baseline {row['baseline']}", "on-policy", *_exact(row), row["verdict"])
    for row in result["corrections"]:
        name = f"old_logprobs recompute, correction {row['correction']}"
        table.add_row(name, "off-policy", *_exact(row), row["verdict"])
    out.print(table)
    for where, row in result["kl"].items():
        out.print(f"KL term, {_where(where)}: pulls along {row['pulls_along']}", highlight=False, soft_wrap=True)
    for row in result["checks"]:
        mark = "[green]ok[/]  " if row["ok"] else "[red]FAIL[/]"
        out.print(f"{mark} {escape(row['name'])}: {escape(row['detail'])}", highlight=False, soft_wrap=True)


def objective_lines(rows: Iterable[Result]) -> list[str]:
    """The algorithms as a Markdown table; docs/objective-check.md holds it."""
    head = (
        "`--algorithm`",
        "on-policy",
        "scale",
        "sideways",
        "noise",
        "off-policy: scale",
        "sideways",
        "noise",
        "biased by",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        on, off = row["on_policy"], row["off_policy"]
        figures = [_exact(one)[k] for one in (on, off) for k in (0, 1, 3)]
        named = ", ".join(f"`{part}`" for part in row["biased_by"])
        lines.append(f"| `{row['algorithm']}` | {on['verdict']} | {' | '.join(figures)} | {named} |")
    return lines


def _where(name: str) -> str:
    return name.replace("_", "-")


def _exact(row: Result) -> tuple[str, ...]:
    """Scale, direction, bias and noise; rounding is 0."""
    figures = [row[key] for key in ("scale", "sideways", "bias", "noise")]
    return tuple("" if value is None else f"{value if abs(value) > 1e-6 else 0:.3f}" for value in figures)


def print_dry_run(result: Result) -> None:
    """What a study will take, and what it can find."""
    out, power = _console(), result["power"]
    table = _table("arm", "stage", "runs", "tokens", "time", "dollars")
    for row in [*result["arms"], {**result, "label": "all", "stage": ""}]:
        time = "unknown" if row["seconds"] is None else duration(row["seconds"])
        dollars = "unknown" if row["dollars"] is None else f"{row['dollars']:,.2f}"
        table.add_row(escape(row["label"]), row["stage"], f"{row['runs']}", f"{row['tokens']:,}", time, dollars)
    out.print(table)
    _line(
        out, f"tokens are the most that the settings allow; time by {result['basis']}; {result['done']} runs are done"
    )
    size, share = _points(power["effect"], sign=False), power["power"]
    chance = "unknown, since the number of problems is" if share is None else f"{100 * share:.0f} %"
    over = f"{power['seeds']} seeds on {power['problems'] or '?'} problems, {power['comparisons']} comparisons"
    _line(out, f"chance to find a difference of {size} points with {over}: {chance}")
    needed = ", ".join(f"{n or 'more than 64'} on {size}" for size, n in power["seeds_needed"].items())
    _line(out, f"seeds that {100 * power['goal']:g} % of finding it need, by problems: {needed}")
    _line(out, f"plan: sha256 {result['plan_sha256']}")


def print_simulated(result: Result) -> None:
    """How often simulated studies of a plan were wrong, and how often they found the planted effect."""
    out, false, planted = _console(), result["false_winners"], result["planted"]
    over = f"{result['seeds']} seeds, {result['problems']:,} problems, {result['comparisons']} comparisons"
    _line(out, f"{result['studies']:,} simulated studies of each kind; {over}, {result['looks']} looks")
    table = _table("", "studies", "share", "95 % interval")
    none = ("no difference: a false winner", false["studies"], false)
    real = (f"a difference of {_points(planted['effect'])} points: found", planted["found"], planted)
    for label, count, row in (none, real):
        table.add_row(label, f"{count:,}", _percent(row["rate"]), _interval(row["ci95"]))
    out.print(table)


def print_study(result: Result) -> None:
    """The answer of a study, its arms, and the line that opens its page."""
    out = _console()
    _line(out, f"{result['answer']}.")
    for sentence in result["sentences"]:
        _line(out, f"  {sentence}")
    graded = result["graded"]
    head = ("arm", "accuracy" if graded else "reward", "95 % interval", "runs", "tokens a run", "seconds a run")
    table = _table(*head)
    for row in result["arms"]:
        ends, form = row["ci"] or (), "{:.3f}"
        mean = "" if row["mean"] is None else _percent(row["mean"]) if graded else form.format(row["mean"])
        width = _interval(ends) if ends and graded else " to ".join(map(form.format, ends))
        spent = (f"{row['tokens']:,.0f}", f"{row['seconds']:,.0f}")
        table.add_row(escape(row["label"]), mean, width, str(len(row["seeds"])), *spent)
    out.print(table)
    if result["plan_changed"]:
        _line(out, "the plan was changed after results existed, see the page")
    print(f"open the page: {open_command(result['path'])}")


def _line(out: Console, text: str) -> None:
    out.print(escape(text), highlight=False, soft_wrap=True)


def _spread(result: Result) -> str:
    spread = result["spread"]
    said = [f"another set of problems would move it by {_points(spread['problems'], sign=False)}"]
    said += [f"another seed by {_points(spread['sampling'], sign=False)}"] if spread["sampling"] is not None else []
    if spread["seeds"] is not None:
        each = ", ".join(f"{seed}: {_percent(value)}" for seed, value in result["by_seed"].items())
        said += [f"seen between the seeds {_points(spread['seeds'], sign=False)} ({each})"]
    return f"one seed's accuracy, standard deviations in points: {'; '.join(said)}"


def _flips(examples: Iterable[Result]) -> Table:
    table = _table("", "problem", "gold", "A said", "B said", "")
    for row in examples:
        said = (_said(row["extracted_a"]), _said(row["extracted_b"]))
        question = shorten(str(row["question"] or ""), 80, placeholder=" …")
        table.add_row(row["flip"], escape(row["id"]), escape(str(row["gold"] or "")), *said, escape(question))
    return table


def _names(paths: Sequence[str]) -> list[str]:
    """Paths below the folder that they have in common."""
    parents = [real_path(path).parent for path in paths]
    common = commonpath(parents)
    return [
        escape((parent / Path(path).name).relative_to(common).as_posix())
        for parent, path in zip(parents, paths, strict=True)
    ]


def _said(answers: Sequence[str | None]) -> str:
    kinds = list(dict.fromkeys("nothing" if answer is None else answer for answer in answers))
    return escape(", ".join(kinds[:3]) + (", …" if len(kinds) > 3 else ""))


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)


def _table(*head: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 or not name else "right", overflow="ellipsis" if i else "fold")
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(value: float | Sequence[float], sign: bool = True) -> str:
    form = "{:+.1f}" if sign else "{:.1f}"
    values = [value] if isinstance(value, float | int) else value
    return " to ".join(form.format(100 * one) for one in values)


def _interval(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _path(result: Result) -> str:
    record = f"; machine, code and inputs in {escape(result['run_dir'])}" if "run_dir" in result else ""
    return f"rows in {escape(str(Path(result['results_path'])))}{record}"
