r"""Countdown: reach a target from given numbers, each used exactly once, with `+ - * /` and brackets.

The grader reads the committed expression (the last `<answer>`, the last `\boxed{}`, "the answer is …", else the last
line that is a calculation; thoughts never count) and evaluates it exactly with an own parser. House rulings:

- `(3+5)*2 = 16` is `(3+5)*2` if every `=` in it is true; a false chain is wrong.
- `×`, `÷`, `−`, `\times`, `\frac{a}{b}`, `2(3+5)` and a minus before a number or a bracket are accepted.
- Powers, `//`, decimals, digits put together, a number missing or used twice, a division by zero are wrong.

The generator draws examples that are solvable by construction. Which split an example belongs to is a property of its
numbers and its target, so train, validation and test are disjoint for all seeds and sizes.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from . import splits
from .rationals import Fault, Value, evaluate
from .responses import first_sentence, last_lines, marked, own_turn, spoken, without_thoughts
from .splits import Split

MAX_EXPRESSION = 4_000  # characters of a committed answer that are read


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


def split_of(numbers: Sequence[int], target: int) -> Split:
    """The split that an example belongs to, whatever the order of its numbers."""
    return splits.split_of(_digest(numbers, target))


def _digest(numbers: Sequence[int], target: int) -> str:
    return splits.digest(f"{sorted(numbers)}->{target}")


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
        if target is None:
            return None
        digest = _digest(numbers, target)
        return digest, {"id": f"countdown-{digest[:12]}", "numbers": numbers, "target": target}

    return splits.collect(split, count, draw)


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
_Step = tuple[str, tuple[str, ...]]


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
