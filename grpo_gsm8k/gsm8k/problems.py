"""Problems from JSONL files, every fault named with its file and line.

Two forms of rows are read:

    {"question", "answer"}  and, optionally, "id" and "gold"     GSM8K; the answer ends in `#### 72`
    {"prompt", "gold"}      and, optionally, "id", "gold_num"    an evaluation set; the prompt is the question

A row without an id gets one from its question, so the same question has the same id on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from grpo_gsm8k.datatypes import Problem
from grpo_gsm8k.errors import DataError
from grpo_gsm8k.gsm8k.grading import parse_gold, parse_number
from grpo_gsm8k.runs.files import json_type, read_jsonl

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def load_problems(path: Path) -> list[Problem]:
    """The problems of a JSONL file, in its order.

    Raises:
        DataError: names the file and the line of the first fault.
    """
    problems: list[Problem] = []
    line_of: dict[str, int] = {}
    for line, row in read_jsonl(path):
        try:
            problem = problem_from_row(row)
        except ValueError as fault:
            raise DataError(path, str(fault), line) from None
        first = line_of.setdefault(problem.id, line)
        if first != line:
            what = "the id" if "id" in row else "the question, and so the id"
            raise DataError(path, f"duplicate id {problem.id!r}: line {first} has {what} already", line)
        problems.append(problem)
    return problems


def load_split(data_dir: Path, split: Split) -> list[Problem]:
    """`<data_dir>/<split>.jsonl` as `grpo-gsm8k data` writes it."""
    path = Path(data_dir) / f"{split}.jsonl"
    missing = next((part for part in (path.parent, path) if not part.exists()), None)
    if missing is not None:
        raise DataError(missing, f"does not exist; make it with `grpo-gsm8k data --out_dir {data_dir}`")
    return load_problems(path)


def problem_from_row(row: Mapping[str, Any]) -> Problem:
    """One row in either form as a problem.

    Raises:
        ValueError: says what is wrong with the row, for a person.
    """
    if "prompt" in row and "question" not in row:
        question = _text(row, "prompt")
        answer, gold = _evaluation_answer(row)
    else:
        question, answer = _text(row, "question"), _text(row, "answer")
        gold = parse_gold(answer)
        if "gold" in row and _text(row, "gold") != gold and _number(row["gold"]) != _number(gold):
            raise ValueError(f"gold is {row['gold']!r}, but the answer ends in #### {gold}")
    id_ = _text(row, "id") if "id" in row else hashlib.sha256(question.encode()).hexdigest()[:12]
    return Problem(id=id_, question=question, answer=answer, gold=gold)


def _evaluation_answer(row: Mapping[str, Any]) -> tuple[str, str]:
    """Answer and gold of an evaluation row, whose `gold` is a number or a whole GSM8K answer."""
    gold = _text(row, "gold")
    if "####" in gold:
        answer, gold = gold, parse_gold(gold)
    else:
        answer = f"#### {gold}"
    value = _number(gold)
    expected = row.get("gold_num")
    if expected is not None:
        if isinstance(expected, bool) or not isinstance(expected, int | float | str):
            raise ValueError(f"gold_num must be a number, not {json_type(expected)}")
        if value != (_number(expected) if isinstance(expected, str) else Fraction(str(expected))):
            raise ValueError(f"gold is {gold!r}, but gold_num is {expected!r}")
    return answer, gold


def _text(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f"{key!r} is missing; the row has {', '.join(map(repr, row)) or 'no keys'}")
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be text, not {json_type(value)}")
    if not value.strip():
        raise ValueError(f"{key!r} is empty")
    return value


def _number(text: str) -> Fraction:
    value = parse_number(text)
    if value is None:
        raise ValueError(f"gold {text!r} is not a number")
    return value
