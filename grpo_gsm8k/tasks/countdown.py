r"""Countdown: reach a target from given numbers, each used exactly once, with `+ - * /` and brackets.

The rows are `{"numbers": [3, 5, 8], "target": 16}`; a `"solution"` replaces the solver's reference answer.

The grader reads the committed expression (the last `<answer>`, the last `\boxed{}`, "the answer is …", else the last
line that is a calculation; thoughts never count) and evaluates it exactly, with its own parser. Rules:

- `(3+5)*2 = 16` is `(3+5)*2` if every `=` in it is true; a false chain is wrong.
- `×`, `÷`, `−`, `\times`, `\frac{a}{b}`, `2(3+5)` and a minus before a number or a bracket are accepted.
- Powers, `//`, decimals, digits put together, a number missing or used twice, a division by zero are wrong.

The generator draws examples that are solvable by construction. An example's numbers and target determine its split, so
train, validation and test are disjoint for all seeds and sizes.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from grpo_gsm8k.datatypes import Example, Grade, Message
from grpo_gsm8k.errors import DataError
from grpo_gsm8k.runs.files import json_type

from . import splits
from .base import Split, Task, id_of, text_of
from .rationals import Fault, Value, evaluate
from .responses import first_sentence, last_lines, marked, own_turn, spoken, without_thoughts

MAX_EXPRESSION = 4_000  # characters of a committed answer that are read
MAX_NUMBERS = 6  # the solver tries all combinations of so many numbers in a few seconds


class Countdown(Task):
    """Numbers and a target."""

    name = "countdown"

    def example(self, row: Mapping[str, Any]) -> Example:
        """A row `{"numbers": […], "target": n}`; `answer` is the target."""
        numbers, target = row.get("numbers"), row.get("target")
        if not isinstance(numbers, list) or not numbers or any(type(number) is not int for number in numbers):
            raise ValueError(f"'numbers' must be an array of whole numbers, not {_kind(numbers)}")
        if type(target) is not int:
            raise ValueError(f"'target' must be a whole number, not {json_type(target)}")
        if "solution" in row:
            text_of(row, "solution")
        meta = {key: value for key, value in row.items() if key not in ("id", "target")}
        text = f"Use each of the numbers {', '.join(map(str, numbers))} exactly once to make {target}."
        return Example(id_of(row, text), text, target, meta)

    def row(self, example: Example) -> dict[str, Any]:
        """The columns that `example` reads."""
        return {"id": example.id, "target": example.answer, **example.meta}

    def prompt(self, example: Example) -> list[Message]:
        """One question that says what is allowed and how to answer."""
        rules = "Calculate with + - * / and parentheses. Work it out, then write the expression in <answer></answer>."
        return [("user", f"{example.messages} {rules}")]

    def target(self, example: Example) -> str:
        """The row's own solution, else one that the solver finds."""
        if "solution" in example.meta:
            return str(example.meta["solution"])
        source = example.source
        where = (source.path, source.line) if source else (f"example {example.id}", None)
        numbers = example.meta["numbers"]
        if len(numbers) > MAX_NUMBERS:
            raise DataError(where[0], f"{len(numbers)} numbers: the solver takes {MAX_NUMBERS} at most", where[1])
        found = solution(numbers, example.answer)
        if found is None:
            raise DataError(where[0], f"no expression with {numbers} makes {example.answer}", where[1])
        return found

    def grade(self, example: Example, response: str) -> Grade:
        """`format_weight` for an expression in answer tags at the end, `answer_weight` for the right one."""
        numbers, target = example.meta["numbers"], example.answer
        read = committed(response) if isinstance(response, str) else []
        correct = any(_reaches(reading, numbers, target) for reading in read)
        form = _FORM.search(response[-MAX_EXPRESSION:]) if isinstance(response, str) else None
        format_ok = form is not None and _value(form[1].strip()) is not None
        parts = {"format": self.options.format_weight * format_ok, "answer": self.options.answer_weight * correct}
        answer = read[0] if read else None
        return Grade(sum(parts.values()), parts, correct=correct, format_ok=format_ok, answer=answer)

    def generate(self, folder: Path, seed: int, sizes: Mapping[str, int]) -> Path:
        """Examples by seed; with `tiny`, small ones with solutions of mixed quality, see `hasty`."""

        def draw(split: Split, count: int, tiny: bool) -> list[dict[str, Any]]:
            return generate(split, count, seed, TINY if tiny else STANDARD)

        return splits.write(folder, seed, sizes, draw, hasty)


_FORM = re.compile(r"<answer>([^<>]*)</answer>\s*$")


def _kind(numbers: Any) -> str:
    wrong = [number for number in numbers if type(number) is not int] if isinstance(numbers, list) else []
    return f"one with {json_type(wrong[0])} in it" if wrong else "an empty one" if numbers == [] else json_type(numbers)


def grade(response: str, numbers: list[int], target: int) -> bool:
    """Whether a response commits to an expression that uses every number exactly once and equals the target."""
    if not isinstance(response, str):
        return False
    return any(_reaches(candidate, numbers, target) for candidate in committed(response))


def committed(response: str) -> list[str]:
    """The ways to read the expression that a response commits to; none if it commits to nothing."""
    text = own_turn(without_thoughts(response).strip())
    marks, _ = marked(text)
    if marks:
        tags = [mark for mark in marks if mark.kind == "tag"]
        content = (tags or marks)[-1].content
        inner = [mark for mark in marked(content)[0] if mark.kind == "box"]
        return _readings(inner[-1].content if inner else content)
    if said := spoken(text):
        readings = _readings(said[0].content)
        if any(_value(part) is not None for reading in readings for part in _sides(reading)):
            return readings
    for line in last_lines(text, 6):
        readings = _readings(first_sentence(line)) + _readings(line)
        for reading in readings:
            if any(len(value.numbers) > 1 for part in _sides(reading) if (value := _value(part))):
                return readings
    return []


_MATH = re.compile(r"\$\$?([^$]{1,2000})\$\$?|\\[(\[](.{1,2000}?)\\[)\]]", re.DOTALL)
_LEAD = re.compile(
    r"^.*(?:\b(?:is|as|by|equation|expression|answer|solution|get|have|use|using|so|therefore|thus|hence|then)\b|:)[\s:,]*",
    re.DOTALL | re.I,
)
_TAIL = re.compile(
    r"(?<=[\d)\]}])[\s,.;!]*(?:\b(?:which|equals|gives|is|to get|this|using|as|and it)\b.*)?[\s,.;!*]*$",
    re.DOTALL | re.I,
)


def _readings(content: str) -> list[str]:
    """A committed text as the expression it holds: literally, in dollars, or behind a few words."""
    if len(content) > MAX_EXPRESSION:
        content = re.sub(r"\s+", " ", content)
        if len(content) > MAX_EXPRESSION:
            return []
    content = content.strip().replace("**", "") if re.search(r"\*\*\s*$|^\s*\*\*", content) else content.strip()
    content = content.strip("`_ \n\t\"'")
    if re.search(r"\b(?:or|not|maybe|perhaps)\b", content, re.IGNORECASE):
        return []
    found = [content]
    if spans := _MATH.findall(content):
        found.append(spans[-1][0] or spans[-1][1])
    lead = _LEAD.match(content)
    found += [_TAIL.sub("", text) for text in (content, content[lead.end() :] if lead else "") if text]
    stripped = [re.sub(r"\\text\{[^{}]*\}|\$", "", text).strip().rstrip(".,;!").strip("`* ") for text in found]
    return [text for text in dict.fromkeys(stripped) if text]


def _sides(expression: str) -> list[str]:
    return [part.strip() for part in expression.replace("＝", "=").split("=")][:20]


def _value(text: str, decimals: bool = False) -> Value | None:
    try:
        return evaluate(text, decimals=decimals)
    except Fault:
        return None


def _reaches(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Whether all sides of a chain equal the target, and one of them uses exactly the numbers."""
    sides = _sides(expression)
    if len(sides) > 1 and re.fullmatch(r"[A-Za-z]\w{0,9}", sides[0]):
        sides = sides[1:]  # `x = …` names the result
    results = [_value(side, decimals=True) for side in sides]
    if any(result is None or result.value != target for result in results):
        return False
    wanted = Counter(Fraction(number) for number in numbers)
    values = (_value(side) for side in sides)
    return any(value is not None and Counter(value.numbers) == wanted for value in values)


# ---------------------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True)
class Level:
    """How hard the generated examples are."""

    smallest_count: int = 3
    largest_count: int = 4
    largest_number: int = 99
    largest_target: int = 999
    operators: str = "+-*/"


STANDARD = Level()
EASY = Level(smallest_count=2, largest_count=3, largest_number=9, largest_target=60, operators="+-*")
TINY = Level(smallest_count=3, largest_count=3, largest_number=19, largest_target=57, operators="+-")


def identity(numbers: Sequence[int], target: int) -> str:
    """Identifies an example, in any order of its numbers."""
    return f"{sorted(numbers)}->{target}"


def generate(split: Split, count: int, seed: int, level: Level = STANDARD) -> list[dict[str, Any]]:
    """`count` different examples of a split, as rows `{"id", "numbers", "target"}`.

    Raises:
        ValueError: if the level holds too few different examples.
    """
    rng = random.Random(f"countdown|{split}|{seed}|{level}")

    def draw() -> tuple[str, dict[str, Any]] | None:
        size = rng.randint(level.smallest_count, level.largest_count)
        numbers = [rng.randint(1, level.largest_number) for _ in range(size)]
        target = _drawn_target(numbers, level, rng)
        return None if target is None else (identity(numbers, target), {"numbers": numbers, "target": target})

    return splits.collect("countdown", split, count, draw)


def _drawn_target(numbers: Sequence[int], level: Level, rng: random.Random) -> int | None:
    """What a random expression over all numbers gives, if that is a target that is not among them."""
    values = [Fraction(number) for number in numbers]
    while len(values) > 1:
        rng.shuffle(values)
        right, left = values.pop(), values.pop()
        operator = rng.choice(level.operators)
        if operator == "/" and (right == 0 or (left / right).denominator != 1):
            operator = "+"
        values.append(_applied(operator, left, right))
    value = values[0]
    if value.denominator != 1 or not 0 < value <= level.largest_target or value in numbers:
        return None
    return value.numerator


def _applied(operator: str, left: Fraction, right: Fraction) -> Fraction:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right if operator == "*" else left / right


# ---------------------------------------------------------------------------------------------------------
# A teacher's solution

_Term = tuple[Fraction, str, int]  # value, text, binding of its outermost operator (1: + -, 2: * /, 3: a number)


def solve(numbers: Sequence[int], target: int) -> tuple[str, list[str]] | None:
    """An expression that reaches the target, and its steps (`3 + 5 = 8`); None if there is none."""
    terms: list[_Term] = [(Fraction(number), str(number), 3) for number in numbers]
    seen: set[tuple[Fraction, ...]] = set()

    def search(terms: list[_Term], steps: list[str]) -> tuple[str, list[str]] | None:
        if len(terms) == 1:
            return (terms[0][1], steps) if terms[0][0] == target else None
        state = tuple(sorted(term[0] for term in terms))
        if state in seen:
            return None
        seen.add(state)
        for i in range(len(terms)):
            for j in range(len(terms)):
                if i == j:
                    continue
                rest = [term for k, term in enumerate(terms) if k not in (i, j)]
                for joined, step in _joined(terms[i], terms[j], i < j):
                    if found := search([*rest, joined], [*steps, step]):
                        return found
        return None

    return search(terms, [])


def _joined(left: _Term, right: _Term, first: bool) -> Iterator[tuple[_Term, str]]:
    (a, left_text, left_binding), (b, right_text, right_binding) = left, right
    for operator in "+-*/":
        if operator in "+*" and not first:  # either order is the same
            continue
        if (operator == "/" and b == 0) or (operator == "-" and a < b):
            continue
        binding = 1 if operator in "+-" else 2
        left_part = f"({left_text})" if left_binding < binding else left_text
        tight = right_binding < binding or (right_binding == binding and operator in "-/")
        right_part = f"({right_text})" if tight else right_text
        value = _applied(operator, a, b)
        yield (
            (value, f"{left_part} {operator} {right_part}", binding),
            f"{_text(a)} {operator} {_text(b)} = {_text(value)}",
        )


def _text(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"({value})"


def solution(numbers: Sequence[int], target: int) -> str | None:
    """A concise worked solution, as a teacher would write it; None if there is none."""
    found = solve(numbers, target)
    if found is None:
        return None
    expression, steps = found
    return "\n".join([*steps, f"<answer>{expression}</answer>"])


def search(numbers: Sequence[int], target: int) -> str | None:
    """A solution that tries sums and differences, each step written down, until one makes the target.

    The largest number comes first, and last it is taken from the others: with `+` and `-` there is nothing else, as
    long as no step falls below 0.
    """
    steps: list[str] = []
    largest, *others = sorted(numbers, reverse=True)
    found = _extended(str(largest), largest, others, target, steps)
    if found is None and others:
        found = _extended(str(others[0]), others[0], [*others[1:], -largest], target, steps)
    return found and "\n".join([*steps, f"<answer>{found}</answer>"])


def _extended(expression: str, value: int, rest: Sequence[int], target: int, steps: list[str]) -> str | None:
    """The first expression that goes on from this one, over all of `rest`, and makes the target.

    A number of `rest` below 0 is subtracted, others are added or subtracted.
    """
    if not rest:
        return expression if value == target else None
    for term in (rest[0], -rest[0]) if rest[0] > 0 else rest[:1]:
        reached = value + term
        if reached < 0:
            continue
        sign = f"{'+' if term > 0 else '-'}{abs(term)}"
        steps.append(f"{value}{sign}={reached}")
        if found := _extended(expression + sign, reached, rest[1:], target, steps):
            return found
    return None


HASTY_SHARE = 0.55
"""The share of generated training solutions that give an expression without having tried any."""


def hasty(row: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A row with a solution: a search, or an expression that was not tried and is seldom right.

    A model that imitates this teacher guesses where it could have searched; reinforcement learning finds out.
    """
    rng = random.Random(f"{seed}/{row['id']}/hasty")
    if rng.random() >= HASTY_SHARE:
        return {**row, "solution": search(row["numbers"], row["target"])}
    first, *rest = row["numbers"]
    guess = str(first) + "".join(f"{rng.choice('+-')}{number}" for number in rest)
    return {**row, "solution": f"<answer>{guess}</answer>"}
