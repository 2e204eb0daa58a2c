"""What the models wrote: the same test problems answered by each stage, and what training sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from grpo_gsm8k.report.markup import Html, fold, join, mark, preformatted, section, tag
from grpo_gsm8k.report.read import Run, read_lines
from grpo_gsm8k.report.words import LONG_NAMES, label, number

LONG_TEXT, LONG_LINES, MOST_TEXT = 320, 8, 6000  # characters and lines shown at once; characters at all
LONG_GOLD = 60  # characters: what is longer is a text to compare with, not an answer to match
Row = Mapping[str, Any]


def _right(row: Row) -> bool:
    return bool(row.get("correct"))


def _reward(row: Row) -> float:
    return float(row["reward"]) if number(row.get("reward")) else 0.0


Pick = tuple[str, Callable[[Row, Row], bool], int]
PICKS: tuple[Pick, ...] = (  # (title, whether a problem belongs there by its answers before and after, how many)
    ("Fixed by {last}", lambda a, b: not _right(a) and _right(b), 4),
    ("Broken by {last}", lambda a, b: _right(a) and not _right(b), 3),
    ("Wrong before and after", lambda a, b: not _right(a) and not _right(b), 3),
    ("Right before and after", lambda a, b: _right(a) and _right(b), 2),
)
PICKS_BY_REWARD: tuple[Pick, ...] = (  # of a task without right answers
    ("Rewarded more after {last}", lambda a, b: _reward(b) > _reward(a), 5),
    ("Rewarded less after {last}", lambda a, b: _reward(b) < _reward(a), 4),
    ("Rewarded alike", lambda a, b: _reward(b) == _reward(a), 2),
)


def _answered(run: Run) -> list[str]:
    """The stages whose answers were kept, in order."""
    return [s["name"] for s in run.stages or run.rewarded if run.evals.get(s["name"])]


def pick_problems(run: Run) -> list[tuple[str, int, list[str]]]:
    """(title, how many such problems, ids of those shown); chosen by a hash of the id, not by taste."""
    names = _answered(run)
    if not names:
        return []
    answers = {name: first_samples(run.evals[name]) for name in names}
    before, last = answers[names[max(0, len(names) - 2)]], answers[names[-1]]
    shared = sorted(before.keys() & last.keys(), key=lambda i: hashlib.sha256(i.encode()).hexdigest())
    picked = []
    for title, belongs, most in PICKS if run.stages else PICKS_BY_REWARD:
        ids = [i for i in shared if belongs(before[i], last[i])]
        picked.append((title.format(last=label(names[-1])), len(ids), ids[:most]))
    return picked


def first_samples(rows: Iterable[Row]) -> dict[str, Row]:
    """id -> the first sample of that problem."""
    return {str(r["id"]): r for r in rows if "id" in r and not r.get("sample")}


def question(row: Row) -> Html:
    """The problem, and its gold answer where it has one."""
    text = str(row.get("question") or row.get("prompt") or row.get("id"))[:MOST_TEXT]
    gold = str(row.get("gold") if row.get("gold") is not None else "")[:MOST_TEXT]
    if len(gold) > LONG_GOLD:
        return join([tag("p", text), tag("p", "reference ", gold, class_="mute")])
    return tag("p", text, " ", tag("span", "gold\u00a0", tag("b", gold), class_="gold")) if gold else tag("p", text)


def answer(title: str, row: Row | None, heading: str = "h4") -> Html:
    """What was answered and how it was graded; `heading` is one level below what stands above."""
    if row is None:
        return tag("div", tag(heading, title), tag("p", "not answered", class_="mute"), class_="answer")
    judged = row.get("correct", False) is not None  # a task by preference knows no right answers
    sign = mark("✓" if _right(row) else "✗") if judged else Html()
    css = ("answer right" if _right(row) else "answer wrong") if judged else "answer"
    facts = tag("p", " · ".join(_facts(row, judged)), class_="mute")
    return tag("div", tag(heading, sign, title), facts, *_response(str(row.get("response", ""))), class_=css)


def _facts(row: Row, judged: bool) -> list[str]:
    facts = ["right" if _right(row) else "wrong"] if judged else []
    found = row.get("extracted") not in (None, "")
    facts += [f"answer {str(row['extracted'])[:40]}"] if found else ["no answer found"] if judged else []
    facts += [f"{row['tokens']} tokens"] if number(row.get("tokens")) else []
    facts += ["cut off"] if row.get("finish_reason") == "length" else []
    facts += [f"reward {row['reward']:.3g}"] if number(row.get("reward")) else []
    parts = row.get("components")
    return facts + [f"{k} {number(v)}" for k, v in parts.items() if number(v)] if isinstance(parts, dict) else facts


def _response(text: str) -> list[Html]:
    """The response as it is; an empty one reads “(empty)”, a long one is folded."""
    if not text.strip():
        blank = f"(only white space, {len(text):,} characters)" if text else "(empty)"
        return [tag("p", blank, class_="blank")]
    start = "\n".join(text.split("\n")[:LONG_LINES])[:LONG_TEXT]
    if len(text) <= len(start):
        return [preformatted(text, MOST_TEXT)]
    return [tag("pre", start, " …"), fold(f"all {len(text):,} characters", preformatted(text, MOST_TEXT))]


def samples_section(run: Run) -> Html:
    """The same test problems answered by each stage."""
    names = _answered(run)
    answers = {name: first_samples(run.evals[name]) for name in names}
    blocks = []
    for title, count, ids in pick_problems(run):
        blocks.append(tag("h3", f"{title}: {count:,}", Html("" if ids else " problems"), class_="group"))
        for i in ids:
            row = answers[names[-1]][i]
            columns = [answer(label(name), answers[name].get(i)) for name in names]
            blocks.append(tag("article", question(row), tag("div", *columns, class_="answers")))
    lead = "The same test problems, answered by every stage. A hash of the id decides which ones are shown."
    return section("samples", "Before and after", tag("p", lead, class_="mute"), *blocks) if blocks else Html()


def training_samples(run: Run, notes: list[str]) -> Html:
    """What the first and the last recorded steps of training sampled."""
    folds = []
    for kind, folder in run.folders.items():
        files = sorted(folder.glob("samples/step_*.jsonl"))
        for path in dict.fromkeys([*files[:1], *files[-1:]]):
            blocks = [
                tag("article", question(row), tag("div", answer(str(row.get("id", "")), row, "h3")))
                for row in read_lines(path, notes, run.path, f"{kind}/samples/")[:4]
            ]
            step = path.stem.removeprefix("step_").lstrip("0") or "0"
            folds.append(fold(f"{LONG_NAMES[kind]}, step {step}", *blocks))
    return section("training-samples", "Sampled during training", *folds)
