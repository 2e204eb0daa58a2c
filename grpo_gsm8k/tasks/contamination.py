"""Finds test problems in training files by shared word n-grams, 13 words by default (arXiv 2005.14165 app. C).

Words are runs of letters and digits without case: punctuation, layout and GSM8K's `<<…>>` annotations do not hide a
copy. The check reads every text of a row under any key, so it takes any training JSONL: problems, pairs, chats, traces.

    grpo-gsm8k contamination artifacts/pairs.jsonl --test artifacts/data/test.jsonl

A shared n-gram is a reason to look, not a verdict: word problems of one kind share phrases. A whole question is one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_gsm8k.datatypes import Example
from grpo_gsm8k.runs.files import read_jsonl
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.tasks.base import Task, load_examples
from grpo_gsm8k.tasks.gsm8k.styles import working

NGRAM = 13
SHORTEST = 8  # the smallest n of the paper; shorter texts coincide by chance and are skipped
GLANCE = 300  # words of a text that the check before training reads

Kind = Literal["question", "solution"]
Words = tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """Words that a training text shares with a test problem.

    Attributes:
        kind: the part of the problem they come from.
        whole: whether the whole part occurs in one piece.
        line: the first line of the training file with this overlap.
        shared: the words.
    """

    example: Example
    kind: Kind
    whole: bool
    line: int
    shared: str


class Index:
    """The n-grams of test problems, to look up in training texts."""

    def __init__(self, examples: Sequence[Example], n: int = NGRAM, whole_questions: bool = False) -> None:
        """Looks for a text shorter than `n` words as a whole.

        Args:
            whole_questions: look for whole questions only, which is faster.
        """
        self.whole_questions = whole_questions
        self.texts: list[tuple[Example, Kind, Words]] = []
        self.grams: dict[Words, list[tuple[int, int]]] = defaultdict(list)  # n-gram → (text, position in it)
        for example in examples:
            self._add(example, "question", words(example.text), n)
            solution = example.meta.get("solution")
            if isinstance(solution, str) and not whole_questions:
                self._add(example, "solution", words(working(solution)), n)
        self.sizes = sorted({len(gram) for gram in self.grams})

    def _add(self, example: Example, kind: Kind, text: Words, n: int) -> None:
        if len(text) < SHORTEST:
            return
        size = min(n, len(text))
        for start in range(1 if self.whole_questions else len(text) - size + 1):
            self.grams[text[start : start + size]].append((len(self.texts), start))
        self.texts.append((example, kind, text))

    def overlaps(self, text: Words, line: int) -> Iterator[Overlap]:
        """All overlaps with one training text."""
        for at in range(len(text) - min(self.sizes, default=0) + 1):
            for size in self.sizes:
                for number, start in self.grams.get(text[at : at + size], ()):
                    example, kind, full = self.texts[number]
                    whole = start == 0 and text[at : at + len(full)] == full
                    if whole or not self.whole_questions:
                        shared = full if whole else text[at : at + size]
                        yield Overlap(example, kind, whole, line, " ".join(shared))


def words(text: str) -> Words:
    """Runs of letters and digits, without case."""
    return tuple(re.findall(r"[^\W_]+", text.casefold()))


def scan(path: Path, index: Index, most_words: int | None = None) -> tuple[int, list[Overlap]]:
    """Count the rows of a training file, and find the first overlap with each test text, preferring a whole one.

    Raises:
        DataError: the file cannot be read.
    """
    found: dict[tuple[str, Kind], Overlap] = {}
    seen: set[Words] = set()
    rows = 0
    for line, row in read_jsonl(path):
        rows += 1
        for raw in texts_of(row):
            text = words(re.sub(r"<<[^<>\n]*>>", "", raw))[:most_words]
            if text in seen:
                continue
            seen.add(text)
            for overlap in index.overlaps(text, line):
                key = (overlap.example.id, overlap.kind)
                if key not in found or (overlap.whole and not found[key].whole):
                    found[key] = overlap
    return rows, list(found.values())


def texts_of(value: Any) -> Iterator[str]:
    """All texts in a JSON value, without keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_of(inner)


def check(files: Sequence[Path], test: Path, task: Task, n: int = NGRAM, examples: int = 3) -> dict[str, Any]:
    """For each training file, count the test problems in it and show a few overlaps."""
    problems = load_examples(task, test)
    index, report = Index(problems, n), list[dict[str, Any]]()
    for path in files:
        rows, found = scan(path, index)
        found.sort(key=lambda o: (not o.whole, o.kind, o.line))
        counts = {
            f"{kind}s_{name}": sum(o.kind == kind and (o.whole or not only_whole) for o in found)
            for kind in ("question", "solution")
            for name, only_whole in (("whole", True), ("overlapping", False))
        }
        shown = [
            {"line": o.line, "id": o.example.id, "kind": o.kind, "whole": o.whole, "shared": o.shared}
            for o in found[:examples]
        ]
        report.append({"path": str(path), "rows": rows, **counts, "examples": shown})
    clean = not any(entry["questions_whole"] for entry in report)
    return {"clean": clean, "ngram": n, "test_problems": len(problems), "files": report}


def warn(files: Iterable[Path], test: Path, task: Task) -> None:
    """At the start of training, print a line for each JSONL file that contains whole test questions."""
    if not test.is_file():
        return
    problems = load_examples(task, test)
    index = Index(problems, SHORTEST, whole_questions=True)
    for path in files:
        found = scan(path, index, GLANCE)[1] if path.suffix == ".jsonl" and path.is_file() else []
        if found:
            first = min(found, key=lambda overlap: overlap.line)
            say(
                f"warning: {path} holds {len(found)} of the {len(problems)} test problems ({first.example.id} in line "
                f"{first.line}): accuracy on them will say little; see `grpo-gsm8k contamination`"
            )
