"""Word problems from rows, and back.

Three forms of rows are read, each with "id", "gold" and "gold_num" where it has them:

    {"question", "answer"}                                    GSM8K; the answer ends in `#### 72`
    {"prompt", "gold"}                                        made by hand; the prompt is the question
    {"question", "answer", "prompt", "prompt_token_ids",      a set that `prep-eval` rendered for one model;
     "rendered"}                                              `Renderer.prompt` holds it against the model

A row without an id gets one from its question, so the same question has the same id on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from grpo_gsm8k.datatypes import Example
from grpo_gsm8k.runs.files import json_type
from grpo_gsm8k.tasks.base import id_of, text_of
from grpo_gsm8k.tasks.gsm8k.grading import parse_gold, parse_number

KEYS = ("id", "question", "answer", "gold")  # of a row that `grpo-gsm8k data` writes, in this order
COLUMNS = ("id", "question", "prompt", "answer", "gold", "gold_num", "solution")


def example_from_row(row: Mapping[str, Any]) -> Example:
    """One row as an example.

    Raises:
        ValueError: says what is wrong with the row, for a person.
    """
    if "prompt" in row and "question" not in row:
        question = text_of(row, "prompt")
        solution, gold = _evaluation_answer(row)
    else:
        question = text_of(row, "question")
        if row.get("prompt", question) != question:
            raise ValueError(
                "'prompt' is not the question and has no 'prompt_token_ids'; text is never tokenised again: "
                "make the set with `grpo-gsm8k prep-eval`, or leave 'prompt' out"
            )
        solution = text_of(row, "answer")
        gold = parse_gold(solution)
        if "gold" in row and text_of(row, "gold") != gold and _number(row["gold"]) != _number(gold):
            raise ValueError(f"gold is {row['gold']!r}, but the answer ends in #### {gold}")
    _check_gold_num(row, gold)
    more = {key: value for key, value in row.items() if key not in COLUMNS}
    return Example(id_of(row, question), question, gold, {"solution": solution, **more})


def row_of(example: Example) -> dict[str, Any]:
    """The row that `example_from_row` reads back."""
    return {
        "id": example.id,
        "question": example.messages,
        "answer": example.meta["solution"],
        "gold": example.answer,
        "gold_num": gold_number(example.answer),
    }


def gold_number(gold: str) -> int | float:
    """The number of JSON that is nearest to `gold`: exact for a whole number. Raises `ValueError` if there is none."""
    value = _number(gold)
    try:
        return value.numerator if value.denominator == 1 else value.numerator / value.denominator
    except OverflowError:
        raise ValueError(f"gold {gold!r} is beyond the range of a number") from None


def _evaluation_answer(row: Mapping[str, Any]) -> tuple[str, str]:
    """Answer and gold of a row made by hand, whose `gold` is a number or a whole GSM8K answer."""
    gold = text_of(row, "gold")
    return (gold, parse_gold(gold)) if "####" in gold else (f"#### {gold}", gold)


def _check_gold_num(row: Mapping[str, Any], gold: str) -> None:
    number, expected = gold_number(gold), row.get("gold_num")
    if expected is None:
        return
    if isinstance(expected, bool) or not isinstance(expected, int | float | str):
        raise ValueError(f"gold_num must be a number, not {json_type(expected)}")
    if number != (gold_number(expected) if isinstance(expected, str) else expected):
        raise ValueError(f"gold is {gold!r}, but gold_num is {expected!r}")


def _number(text: str) -> Fraction:
    value = parse_number(text)
    if value is None:
        raise ValueError(f"gold {text!r} is not a number")
    return value
