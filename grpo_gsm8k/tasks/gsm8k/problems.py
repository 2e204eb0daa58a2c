"""Problems from JSONL files, every fault named with its file and line.

Three forms of rows are read, each with "id", "gold" and "gold_num" where it has them:

    {"question", "answer"}                                    GSM8K; the answer ends in `#### 72`
    {"prompt", "gold"}                                        made by hand; the prompt is the question
    {"question", "answer", "prompt", "prompt_token_ids",      a set that `prep-eval` rendered for one model;
     "rendered"}                                              `Renderer.prompt` holds it against the model

A row without an id gets one from its question, so the same question has the same id on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from grpo_gsm8k.datatypes import Problem, Rendered, Source
from grpo_gsm8k.errors import DataError
from grpo_gsm8k.runs.files import json_type, read_jsonl
from grpo_gsm8k.tasks.gsm8k.grading import parse_gold, parse_number

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
            source = Source(str(path), line, _rendered(row))
            problem = replace(problem_from_row(row), source=source)
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
    """One row as a problem, whatever prompt it may hold beside its question.

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
    _check_gold_num(row, gold)
    id_ = _text(row, "id") if "id" in row else hashlib.sha256(question.encode()).hexdigest()[:12]
    return Problem(id=id_, question=question, answer=answer, gold=gold)


def gold_number(gold: str) -> int | float:
    """The number of JSON that is nearest to `gold`: exact for a whole number. Raises `ValueError` if there is none."""
    value = _number(gold)
    try:
        return value.numerator if value.denominator == 1 else value.numerator / value.denominator
    except OverflowError:
        raise ValueError(f"gold {gold!r} is beyond the range of a number") from None


def _evaluation_answer(row: Mapping[str, Any]) -> tuple[str, str]:
    """Answer and gold of a row made by hand, whose `gold` is a number or a whole GSM8K answer."""
    gold = _text(row, "gold")
    return (gold, parse_gold(gold)) if "####" in gold else (f"#### {gold}", gold)


def _check_gold_num(row: Mapping[str, Any], gold: str) -> None:
    number, expected = gold_number(gold), row.get("gold_num")
    if expected is None:
        return
    if isinstance(expected, bool) or not isinstance(expected, int | float | str):
        raise ValueError(f"gold_num must be a number, not {json_type(expected)}")
    if number != (gold_number(expected) if isinstance(expected, str) else expected):
        raise ValueError(f"gold is {gold!r}, but gold_num is {expected!r}")


def _rendered(row: Mapping[str, Any]) -> Rendered | None:
    """The prompt that `prep-eval` put into a row; None for a row in another form."""
    if "prompt_token_ids" not in row and "rendered" not in row:
        if "question" in row and row.get("prompt", row["question"]) != row["question"]:
            raise ValueError(
                "'prompt' is not the question and has no 'prompt_token_ids'; text is never tokenised again: "
                "make the set with `grpo-gsm8k prep-eval`, or leave 'prompt' out"
            )
        return None
    _text(row, "question")  # without one, the rendered prompt would be taken for it
    ids, made_with = row.get("prompt_token_ids"), row.get("rendered")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError("'prompt_token_ids' must be an array of token ids; run `grpo-gsm8k prep-eval` again")
    if not isinstance(made_with, dict) or not all(v is None or isinstance(v, str) for v in made_with.values()):
        raise ValueError("'rendered' must say how the prompt was made; run `grpo-gsm8k prep-eval` again")
    return Rendered(_text(row, "prompt"), tuple(ids), made_with)


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
