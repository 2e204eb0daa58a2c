"""GSM8K with a calculator: the model writes `<<48/2>>`, and the environment goes on with `24`.

    Tom buys <<3*4>>12 eggs and eats 2, so <<12-2>>10 are left.
    #### 10
             ^^^^^^^ ^^            ^^^^^^^ ^^
             model   environment   model   environment: masked, never trained

A turn of the model ends with a call, the next one continues the very ids. `>>` is a stop string, so this works within
one message of a chat and in plain text alike. A call without a value is answered with `[error: …]`, which the model can
read and react to. Rows, prompt styles, grading and rewards are gsm8k's; what a teacher answers is a reference solution
whose `48/2=<<48/2=24>>24` became calls and answers.

Values are rational and exact: a terminating decimal is written as one, anything else as a fraction. An expression that
has no value is answered with `error: …` in a few words, which the model can read and react to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from grpo_gsm8k.datatypes import Example, Message

from .base import Author, Env, TaskOptions
from .gsm8k.task import Gsm8k
from .rationals import Fault
from .rationals import evaluate as _value

OPEN, CLOSE = "<<", ">>"
HOW = "You have a calculator: write <<48/2>> and the value of 48/2 follows at once."
MAX_CALLS = 12  # in one trajectory; no solution of GSM8K has more than 9 calculations


class Gsm8kCalculator(Gsm8k):
    """Word problems, with a calculator at hand."""

    name = "gsm8k_calculator"
    max_turns = MAX_CALLS + 1

    def __init__(self, options: TaskOptions | None = None) -> None:
        super().__init__(options)
        self.stop = (*self.stop, CLOSE)

    def prompt(self, example: Example) -> list[Message] | str:
        """As the style asks, and how to call."""
        return self.style.ask(f"{example.messages}\n\n{HOW}")

    def target(self, example: Example) -> str:
        """The text of all turns."""
        return "".join(text for _, text in self.target_turns(example))

    def target_turns(self, example: Example) -> list[tuple[Author, str]]:
        """The reference solution: each annotated calculation is a call, and its value is the environment's."""
        calls: list[tuple[str, str]] = []

        def called(match: re.Match[str]) -> str:
            value = evaluate(match["call"])
            if not _is_number(value) or Fraction(value) != Fraction(match["result"].replace(",", "")):
                return (
                    match["formula"] + match["sign"] + match["result"]
                )  # rounded, or beyond the calculator: the teacher's own words
            calls.append((match["call"], value))
            said_before = re.sub(r"[\s$]", "", match["formula"]).replace("x", "*") == f"{match['call']}="
            return ("" if said_before else match["formula"]) + match["sign"] + _HERE

        solution = re.sub(r"<<[^<>\n]*>>", "", _ANNOTATED.sub(called, example.meta["solution"]))
        first, *pieces = self.style.reference(solution, example.answer).split(_HERE)
        turns: list[tuple[Author, str]] = [("model", first)]
        for (call, value), piece in zip(calls, pieces, strict=True):
            turns[-1] = ("model", f"{turns[-1][1]}{OPEN}{call}{CLOSE}")
            turns += [("env", value), ("model", piece)]
        return turns

    def env(self, example: Example) -> Env:
        """A calculator."""
        return Calculator()

    def generate(self, folder: Path, seed: int, sizes: Mapping[str, int]) -> Path:
        """Toy word problems with numbers that a small model does not add up at a glance."""
        from .gsm8k import toy

        return toy.write(folder, seed, sizes, largest=LARGEST)


LARGEST = 49  # beyond, a model as small as the demo's copies numbers wrongly
_HERE = "\ue000"  # stands where a call will
_ANNOTATED = re.compile(
    r"(?P<formula>(?:[\d.($][\d.,()+*/x$ -]*=[ ]*|)(?<!\$))(?P<sign>\$*)<<(?P<call>[^<>=\n]*)=[^<>\n]*>>"
    r"(?P<result>-?\d[\d,]*(?:\.\d+)?|-?\.\d+)"
)
"""A calculation of GSM8K, `48/2 = $<<48/2=24>>24`. The formula in front says the same as the call, as a rule."""


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d+(?:\.\d+)?", text) is not None


class Calculator:
    """Answers the call that ends a turn; a turn that ends without one ends the trajectory."""

    def reply(self, turn: str) -> str | None:
        """The value of the call, or `[error: …]`. A result that the model wrote itself (`<<48/2=25>>`) is ignored."""
        before, closed, behind = turn.rpartition(CLOSE)
        if not closed or len(behind) > 3 or behind.strip(" .,;:!?)$%\n"):  # a token may run on behind the call
            return None
        _, opened, call = before.rpartition(OPEN)
        if not opened or "\n" in call:
            return f"[error: write a call as {OPEN}48/2{CLOSE}]"
        value = evaluate(call.partition("=")[0])
        return f"[{value}]" if value.startswith("error") else value


MAX_DECIMALS = 12
MAX_ANSWER_DIGITS = 40


def evaluate(text: str) -> str:
    """The value of an arithmetic expression (`+ - * / ^`, brackets, decimals, percentages), or `error: …`."""
    if not isinstance(text, str):
        return "error: no text"
    expression = text.strip().rstrip("=").replace("$", "").strip()
    try:
        value = _value(expression, decimals=True, powers=True).value
        return shown(value)
    except Fault as fault:
        return f"error: {fault}"


def shown(value: Fraction) -> str:
    """A rational number as an integer, a terminating decimal of at most `MAX_DECIMALS` places, or a fraction.

    Raises:
        Fault: if it takes more than `MAX_ANSWER_DIGITS` digits.
    """
    scaled = value * 10**MAX_DECIMALS
    if scaled.denominator == 1:
        sign, digits = "-" if value < 0 else "", str(abs(scaled.numerator)).rjust(MAX_DECIMALS + 1, "0")
        decimals = digits[-MAX_DECIMALS:].rstrip("0")
        text = sign + digits[:-MAX_DECIMALS] + (f".{decimals}" if decimals else "")
    else:
        text = f"{value.numerator}/{value.denominator}"
    if len(text) > MAX_ANSWER_DIGITS:
        raise Fault("number too large")
    return text
