r"""MATH, MATH-500, AIME and their kind as a task: problems whose answer is LaTeX.

Rows are read as the data sets have them, whatever the case of their columns:

    {"problem", "solution"}                    MATH: the answer is the solution's last \boxed{…}
    {"problem", "answer", "solution"?, …}      MATH-500, AIME: the answer is a text or a number

`question` or `prompt` may stand for `problem`; `id`, `unique_id` or `ID` is the id. A file is JSONL, or one `.json` (a
row or an array of rows); a folder is all the `.json` files in it, as MATH is shipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_gsm8k.datatypes import Example, Grade, Message, Source
from grpo_gsm8k.errors import DataError
from grpo_gsm8k.runs.files import json_type

from ..base import id_of, read_examples, text_of
from ..gsm8k.styles import StyledTask
from . import canonical, extract, gold_of, verdict
from .reading import answers

PROBE = Example("check", "What is $1+1$?", "2", {"solution": "It is $\\boxed{2}$."})


class Math(StyledTask):
    """Problems whose answer is LaTeX."""

    name = "math"

    def examples(self, path: Path | str) -> list[Example]:
        """The problems of a JSONL file, of a `.json` file, or of a folder of `.json` files."""
        path = Path(path)
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        if not path.is_dir() and path.suffix != ".json":
            return read_examples(path, Repeats(self.example))
        parse, found = Repeats(self.example), list[Example]()
        for file in files:
            for row in json_rows(file):
                try:
                    found.append(replace(parse(row), source=Source(str(file), None)))
                except ValueError as fault:
                    raise DataError(file, str(fault)) from None
        return found

    def example(self, row: Mapping[str, Any]) -> Example:
        """One problem; `answer` is the gold as LaTeX, `meta["solution"]` the solution if there is one."""
        names = {key.lower(): key for key in reversed(list(row))}
        asked = next((names[key] for key in ("problem", "question", "prompt") if key in names), None)
        if asked is None:
            raise ValueError(f"no problem, question or prompt; the row has {', '.join(row) or 'no keys'}")
        problem = text_of(row, asked)
        solution = row.get(names.get("solution", ""))
        if solution is not None and not isinstance(solution, str):
            raise ValueError(f"{names['solution']!r} must be text, not {json_type(solution)}")
        id_column = "id" if "id" in row else next((names[key] for key in ("unique_id", "id") if key in names), None)
        named = {"id": id_text(row[id_column], id_column)} if id_column else {}
        used = (asked, id_column, names.get("answer"), names.get("solution"))
        meta = {key: value for key, value in row.items() if key not in used}
        meta |= {"solution": solution} if solution and solution.strip() else {}
        return Example(id_of(named, problem), problem, gold(row, names, solution), meta)

    def row(self, example: Example) -> dict[str, Any]:
        """The columns of MATH-500."""
        return {"id": example.id, "problem": example.messages, "answer": example.answer, **example.meta}

    def prompt(self, example: Example) -> list[Message] | str:
        """As the style asks."""
        assert isinstance(example.messages, str)
        return self.style.ask(example.messages)

    def target(self, example: Example) -> str:
        """The solution, its answer marked as the style wants it; without a solution, the answer alone."""
        solution = str(example.meta.get("solution", "")).strip()
        boxed = f"The final answer is $\\boxed{{{example.answer}}}$."
        tags = self.options.tags
        if self.style.plain:
            said = f"{tags.answer_open} {example.answer} {tags.answer_close}" if tags.answer_open else boxed
            return f" {solution} {tags.think_close} {said}"
        return solution if extract(solution, "strict") is not None else f"{solution}\n\n{boxed}".strip()

    def grade(self, example: Example, response: str) -> Grade:
        """`format_weight` for a marked answer, `answer_weight` for the right one."""
        if not isinstance(response, str):
            response = ""
        if self.style.plain and not response.lstrip().startswith(self.options.tags.think_open):
            response = self.options.tags.think_open + response
        flexible, strict = (answers(response, mode) for mode in ("flexible", "strict"))
        right = {"flexible": verdict(flexible, example.answer)}
        right["strict"] = right["flexible"] if strict == flexible else verdict(strict, example.answer)
        mode, format_ok = self.options.grading, bool(strict)
        found = strict if mode == "strict" else flexible
        weights = {"format": self.options.format_weight, "answer": self.options.answer_weight}
        parts = {"format": weights["format"] * format_ok, "answer": weights["answer"] * right[mode]}
        return Grade(
            reward=sum(parts.values()),
            components=parts,
            correct=right[mode],
            format_ok=format_ok,
            answer=min(found, key=len, default=None),  # of several readings, the one with the fewest words around it
            details={f"correct_{name}": value for name, value in right.items()},
        )

    def vote(self, answer: str | None) -> Hashable:
        """The answer in a form that equal ones share, as a rule."""
        return None if answer is None else canonical(answer)

    def probe(self) -> Example:
        """A problem with its solution."""
        return PROBE


def gold(row: Mapping[str, Any], names: Mapping[str, str], solution: str | None) -> str:
    r"""The right answer: the row's own, else the last box of its solution. Raises `ValueError` if it says nothing."""
    column = names.get("answer")
    value = row[column] if column else None
    if value is None:
        if not solution:
            raise ValueError("no answer and no solution")
        if "boxed" not in solution and "fbox" not in solution:
            raise ValueError("no answer, and no \\boxed{…} in the solution")
        value, column = solution, names["solution"]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{column!r} must be text or a number, not {json_type(value)}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    found = gold_of(str(value))
    if not re.sub(r"\\?f?boxed\s*\{\s*\}|[$\s]", "", found):
        raise ValueError(f"{column!r} holds no answer: {str(value)[-80:]!r}")
    return found


def id_text(value: Any, column: str) -> str:
    """An id as text; numbers are ids, too."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_of({column: value}, column)


def json_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a JSON file: an object, or an array of objects."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except OSError as fault:
        raise DataError(file, f"cannot be read: {fault.strerror}") from None
    except (ValueError, RecursionError) as fault:
        raise DataError(file, f"is no JSON: {fault}") from None
    for i, row in enumerate(held if isinstance(held, list) else [held]):
        if not isinstance(row, dict):
            raise DataError(file, f"item {i + 1} must be an object, not {json_type(row)}")
        yield row


class Repeats:
    """Reads rows, and numbers those that a data set without ids holds twice: MATH has some."""

    def __init__(self, parse: Any) -> None:
        self.parse, self.seen = parse, dict[str, int]()

    def __call__(self, row: Mapping[str, Any]) -> Example:
        example: Example = self.parse(row)
        if any(key.lower() in ("id", "unique_id") for key in row):
            return example
        count = self.seen[example.id] = self.seen.get(example.id, 0) + 1
        return example if count == 1 else replace(example, id=f"{example.id}-{count}")
