"""The calculator that a model may call: an expression in, its exact value out, as text.

Values are rational and exact: a terminating decimal is written as one, anything else as a fraction. An expression that
has no value is answered with `error: …` in a few words, which the model can read and react to.
"""

from __future__ import annotations

from fractions import Fraction

from .rationals import Fault
from .rationals import evaluate as _value

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
