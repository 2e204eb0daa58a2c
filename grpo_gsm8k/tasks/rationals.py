r"""Arithmetic over exact rationals: one parser for what people and models write, of bounded size. No `eval`.

Read: digits (`1,000`, and decimals where the caller allows them), `+ - * /`, brackets, a minus before a number or
a bracket, their signs in unicode and LaTeX (`×`, `÷`, `−`, `\times`, `\cdot`, `\div`, `\frac{a}{b}`), `2(3+4)`, and
powers and percentages where the caller allows them. Everything else is a `Fault` with a short text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

MAX_LENGTH = 2_000  # characters, blanks reduced
MAX_DEPTH = 60
MAX_DIGITS = 400  # of a number that is written
MAX_BITS = 4_096  # of a number that comes out


class Fault(ValueError):
    """Why a text has no value, in a few words."""


class Value(NamedTuple):
    """The value of an expression, and the numbers that stand in it, in order."""

    value: Fraction
    numbers: tuple[Fraction, ...]


_SIGNS = str.maketrans({
    "×": "*", "·": "*", "⋅": "*", "∙": "*", "∗": "*", "✕": "*", "✖": "*", "＊": "*",
    "÷": "/", "∕": "/", "⁄": "/", "／": "/", "−": "-", "–": "-", "—": "-", "﹣": "-", "－": "-", "＋": "+",
    "（": "(", "）": ")", "[": "(", "]": ")", "＝": "=", "％": "%", "²": "^2", "³": "^3",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ",
})  # fmt: skip
_LATEX: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\[dtc]?frac\s?(\d)\s?(\d)(?!\d)"), r"((\1)/(\2))"),
    (re.compile(r"\\(?:times|cdot|ast|bullet)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:left|right|[bB]ig[glr]?)(?=\s?[()\\{}|])"), ""),
    (re.compile(r"\\[,;:! ]|\\(?:quad|qquad|displaystyle)(?![A-Za-z])|~"), " "),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\([%*+/-])"), r"\1"),
    (re.compile(r"\\[{}]"), lambda match: "(" if match[0][1] == "{" else ")"),
    (re.compile(r"(?<=[\d)\s])\s?[xX]\s?(?=[\s(\d-])"), "*"),
]
_TOKEN = re.compile(r"\s*(\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+|\*\*|//|\\frac|[-+*/()^%{}])")


def evaluate(text: str, *, decimals: bool = False, powers: bool = False) -> Value:
    """The exact value of an expression and the numbers in it.

    Args:
        text: the expression alone: no words, no equals sign.
        decimals: whether `1.5` and `50%` are numbers.
        powers: whether `^` and `**` are read; the exponent must be a small integer.

    Raises:
        Fault: if the text is no such expression, divides by zero, or outgrows the bounds.
    """
    text = re.sub(r"\s+", " ", text.translate(_SIGNS)).strip()
    if len(text) > MAX_LENGTH:
        raise Fault("too long")
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    tokens: list[str] = []
    position = 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if not match:
            raise Fault(f"unexpected {text[position:].strip()[:1]!r}")
        tokens.append(match[1])
        position = match.end()
    if not tokens:
        raise Fault("empty")
    parser = _Parser(tokens, decimals, powers)
    value = parser.sum()
    if parser.at < len(tokens):
        raise Fault(f"unexpected {tokens[parser.at]!r}")
    return Value(value, tuple(parser.numbers))


class _Parser:
    def __init__(self, tokens: list[str], decimals: bool, powers: bool) -> None:
        self.tokens, self.decimals, self.powers = tokens, decimals, powers
        self.numbers: list[Fraction] = []
        self.at = self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        token = self.peek()
        if token in wanted:
            self.at += 1
            return token
        return ""

    def expect(self, wanted: str) -> None:
        if not self.take(wanted):
            raise Fault(f"expected {wanted!r}")

    def sum(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Fault("nested too deep")
        value = self.product()
        while sign := self.take("+", "-"):
            term = self.product()
            value = _bounded(value + term if sign == "+" else value - term)
        self.depth -= 1
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while True:
            if self.take("*"):
                value = _bounded(value * self.signed())
            elif self.take("/"):
                value = _divided(value, self.signed())
            elif self.peek() in ("(", "\\frac") or (
                self.at and self.tokens[self.at - 1] == ")" and self.peek()[:1].isdigit()
            ):
                value = _bounded(value * self.power())
            else:
                return value

    def signed(self) -> Fraction:
        negative = False
        for _ in range(8):
            sign = self.take("-", "+")
            if not sign:
                break
            negative ^= sign == "-"
        value = self.power()
        return -value if negative else value

    def power(self) -> Fraction:
        base = self.operand()
        while self.take("%"):
            if not self.decimals:
                raise Fault("unexpected '%'")
            base /= 100
        if not self.take("^", "**"):
            return base
        if not self.powers:
            raise Fault("no powers")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Fault("nested too deep")
        exponent = self.signed()
        self.depth -= 1
        return _power(base, exponent)

    def operand(self) -> Fraction:
        token = self.peek()
        self.at += 1
        if token == "(" or token == "{":
            value = self.sum()
            self.expect(")" if token == "(" else "}")
            return value
        if token == "\\frac":
            parts = []
            for _ in range(2):
                self.expect("{")
                parts.append(self.sum())
                self.expect("}")
            return _divided(parts[0], parts[1])
        if token[:1].isdigit() or token[:1] == ".":
            return self.number(token)
        raise Fault(f"unexpected {token!r}" if token else "unexpected end")

    def number(self, token: str) -> Fraction:
        digits = token.replace(",", "")
        if len(digits) > MAX_DIGITS:
            raise Fault("number too large")
        if "." in digits and not self.decimals:
            raise Fault("no decimals")
        value = Fraction(digits if digits[0] != "." else "0" + digits)
        self.numbers.append(value)
        return value


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise Fault("number too large")
    return value


def _divided(value: Fraction, divisor: Fraction) -> Fraction:
    if divisor == 0:
        raise Fault("division by zero")
    return _bounded(value / divisor)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise Fault("no fractional powers")
    n = exponent.numerator
    if base == 0 and n < 0:
        raise Fault("division by zero")
    if abs(n) * max(base.numerator.bit_length(), base.denominator.bit_length()) > MAX_BITS and base not in (0, 1, -1):
        raise Fault("number too large")
    if base == -1:
        return Fraction(1 - 2 * (n % 2))
    return base if base in (0, 1) and n else _bounded(base**n)
