"""What the models wrote: the same test problems answered by each stage, and what training sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from grpo_gsm8k.report.markup import Html, fold, preformatted, section, tag
from grpo_gsm8k.report.read import Run, read_lines
from grpo_gsm8k.report.words import LONG_NAMES, label, number

LONG_TEXT, LONG_LINES, MOST_TEXT = 320, 8, 6000  # characters and lines shown at once; characters at all


PICKS = (  # (title, right before, right after, how many)
    ("Fixed by {last}", False, True, 4),
    ("Broken by {last}", True, False, 3),
    ("Wrong before and after", False, False, 3),
    ("Right before and after", True, True, 2),
)


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


def question(row: Mapping[str, Any]) -> Html:
    text = str(row.get("question") or row.get("prompt") or row.get("id"))[:MOST_TEXT]
    return tag("p", text, " ", tag("span", "gold ", tag("b", str(row.get("gold", "–"))[:200]), class_="gold"))


def answer(title: str, row: Mapping[str, Any] | None) -> Html:
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
                tag("article", question(row), tag("div", answer(str(row.get("id", "")), row)))
                for row in read_lines(path, notes, run.path, f"{kind}/samples/")[:4]
            ]
            step = path.stem.removeprefix("step_").lstrip("0") or "0"
            folds.append(fold(f"{LONG_NAMES[kind]}, step {step}", *blocks))
    return section("training-samples", "Sampled during training", *folds)
