r"""Are two formulas equal? Decided exactly where that can be, and to hundreds of digits where it cannot.

1. *Rational* formulas are evaluated to a `Fraction`.
2. *Algebraic* numbers (radicals of radicals, i) are evaluated beyond their separation bound (Burnikel, Funke,
   Mehlhorn, Schirra, Schmitt 2001): a difference that is not zero has at least so many leading bits. That is a proof.
3. *Transcendental* constants (pi, e, logarithms, trigonometric values) are compared to at least 1,000 bits, and to
   more than the digits that the answers themselves carry: pi is no decimal, however long.
4. *Formulas with variables* are compared at points drawn by a hash of both formulas: rational functions exactly
   (two that differ agree at a point with a probability below 2^-50), others as constants are.

Nothing here is `eval`; every size is bounded, and what grows beyond the bounds raises `TooLarge`.
"""

from __future__ import annotations

import functools
import hashlib
import math
import threading
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import mpmath

from .latex import Unreadable
from .tree import Node, key

MAX_BITS = 60_000  # of an exact number
MAX_PRECISION = 16_000  # bits to which an algebraic number is compared
BASE_PRECISION = 1_024
MAX_SPAN = 5_000  # bits lost on the way that are made up for
MAX_GAMMA_PRECISION = 2_000
MAX_NODES = 600
POINTS = 4

Values = Mapping[str, Any]
NO_VALUES: Values = {}


class TooLarge(Exception):
    """A number beyond the bounds: a tower of powers, a huge factorial."""


class NotRational(Exception):
    """The formula has no rational value, or none that rational arithmetic shows."""


class Undefined(Exception):
    """A division by zero, or a function outside its domain."""


# ---------------------------------------------------------------------------------------------------------
# Exact


def exact(node: Node, values: Values = NO_VALUES) -> Fraction:
    """The rational value of a formula.

    Raises:
        NotRational: if it has none.
        Undefined: if it divides by zero.
        TooLarge: if a number in it outgrows the bounds.
    """
    head, args = node.head, node.args
    if head == "num":
        assert node.value is not None
        return node.value
    if head == "sym":
        value = values.get(node.name)
        if not isinstance(value, Fraction):
            raise NotRational(node.name)
        return value
    if head == "+":
        return _bounded(sum((exact(arg, values) for arg in args), Fraction(0)))
    if head == "*":
        product = Fraction(1)
        for arg in args:
            product = _bounded(product * exact(arg, values))
        return product
    if head == "neg":
        return -exact(args[0], values)
    if head == "/" or head == "ratio":
        value = exact(args[0], values)
        for arg in args[1:]:
            divisor = exact(arg, values)
            if divisor == 0:
                raise Undefined("division by zero")
            value = _bounded(value / divisor)
        return value
    if head == "^":
        return _power(exact(args[0], values), exact(args[1], values))
    if head == "base":
        return _numeral(node.name)
    if head == "percent":
        return exact(args[0], values) / 100
    if head == "unit" or head == "approx":
        return exact(args[0], values)
    if head == "fn":
        return _exact_function(node, values)
    raise NotRational(head)


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise TooLarge
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        if exponent.denominator > 64 or base < 0:
            raise NotRational("a root")
        root = _root(base, exponent.denominator)
        return _power(root, Fraction(exponent.numerator))
    n = exponent.numerator
    if base == 0 and n <= 0:
        if n == 0:
            return Fraction(1)
        raise Undefined("division by zero")
    if base in (0, 1):
        return base
    if base == -1:
        return Fraction(1 - 2 * (n % 2))
    if abs(n) * max(base.numerator.bit_length(), base.denominator.bit_length()) > MAX_BITS:
        raise TooLarge
    return base**n


def _root(value: Fraction, degree: int) -> Fraction:
    """The exact root of a rational number.

    Raises:
        NotRational: if it is irrational.
    """
    if value < 0:
        if degree % 2 == 0:
            raise NotRational("a root of a negative number")
        return -_root(-value, degree)
    parts = [_integer_root(part, degree) for part in (value.numerator, value.denominator)]
    if parts[0] is None or parts[1] is None:
        raise NotRational("an irrational root")
    return Fraction(parts[0], parts[1])


def _integer_root(value: int, degree: int) -> int | None:
    if value < 2:
        return value
    if value.bit_length() <= degree:
        return None
    if degree == 2:
        root = math.isqrt(value)
    else:
        low, high = 1, 1 << (value.bit_length() // degree + 1)
        if value.bit_length() > 4_096:
            raise NotRational("a large root")
        while low < high:
            middle = (low + high + 1) // 2
            if middle**degree <= value:
                low = middle
            else:
                high = middle - 1
        root = low
    return root if root**degree == value else None


def _numeral(name: str) -> Fraction:
    digits, _, base = name.partition("_")
    try:
        if "." in digits or not digits.isalnum():
            raise NotRational(name)
        return Fraction(int(digits, int(base)))
    except ValueError:
        raise Unreadable(f"no numeral of base {base}") from None


def _exact_function(node: Node, values: Values) -> Fraction:
    args = [exact(arg, values) for arg in node.args if arg.head != "matrix"]
    name = node.name
    if name == "root":
        degree = args[1]
        if degree.denominator != 1 or not 1 <= degree <= 64:
            raise NotRational("a root")
        return _root(args[0], degree.numerator)
    if name == "sqrt":
        return _root(args[0], 2)
    if name == "abs" and args:
        return abs(args[0])
    if name == "floor":
        return Fraction(math.floor(args[0]))
    if name == "ceil":
        return Fraction(math.ceil(args[0]))
    if name == "factorial" and args[0].denominator == 1:
        if args[0] < 0:
            raise Undefined("a factorial of a negative number")
        if args[0] > 2_000:
            raise TooLarge
        return _bounded(Fraction(math.factorial(args[0].numerator)))
    if name == "binom" and args[0].denominator == args[1].denominator == 1 and args[0] >= 0:
        if args[1] < 0 or args[1] > args[0]:
            return Fraction(0)
        if min(args[1], args[0] - args[1]) * args[0].numerator.bit_length() > MAX_BITS:
            raise TooLarge
        return Fraction(math.comb(args[0].numerator, args[1].numerator))
    if name in ("max", "min") and args:
        return max(args) if name == "max" else min(args)
    if name in ("gcd", "lcm") and args and all(arg.denominator == 1 for arg in args):
        integers = [arg.numerator for arg in args]
        return _bounded(Fraction(math.gcd(*integers) if name == "gcd" else math.lcm(*integers)))
    raise NotRational(name)


# ---------------------------------------------------------------------------------------------------------
# Numeric, at any precision


class _Contexts(threading.local):
    """One multiprecision context a thread: their precision is state."""

    def __init__(self) -> None:
        self.mp = mpmath.mp.clone()


@functools.cache
def _contexts() -> _Contexts:
    return _Contexts()


MAX_MAGNITUDE = 1 << 40  # bits before the binary point, of a number that is not exact


def numeric(
    node: Node, precision: int, values: Values = NO_VALUES, decimal_log: bool = False, real: bool = False
) -> Any:
    """The value of a formula as a complex number of `precision` bits. `real`: no root or logarithm may leave the reals.

    Raises:
        Unreadable: if there is no value, as of a set.
        Undefined, TooLarge: see there.
    """
    return _measured(node, precision, values, decimal_log, real)[0]


def _measured(
    node: Node, precision: int, values: Values = NO_VALUES, decimal_log: bool = False, real: bool = False
) -> tuple[Any, int]:
    """The value, and how many bits it may have lost on the way: where sums cancel, and where functions are flat."""
    mp = _contexts().mp
    mp.prec = precision + 64
    evaluation = _Numeric(mp, values, decimal_log, real)
    try:
        return evaluation.value(node), evaluation.span
    except (ZeroDivisionError, ValueError):
        raise Undefined from None
    except (OverflowError, MemoryError, mp.NoConvergence):
        raise TooLarge from None


class _Numeric:
    def __init__(self, mp: Any, values: Values, decimal_log: bool, real: bool) -> None:
        self.mp, self.values, self.decimal_log, self.real = mp, values, decimal_log, real
        self.span = 0

    def value(self, node: Node) -> Any:
        value = self._value(node)
        if not self.mp.isfinite(value):
            raise Undefined
        if self.real and self.mp.im(value) != 0:
            raise Undefined
        if value and abs(self.mp.mag(value)) > MAX_MAGNITUDE:
            raise TooLarge
        return value

    def _value(self, node: Node) -> Any:
        mp, head, args = self.mp, node.head, node.args
        try:
            return self.fraction(exact(node))
        except (NotRational, TooLarge):
            pass
        if head == "num":
            return self.fraction(node.value)
        if head == "const":
            return {"pi": mp.pi, "e": mp.e, "i": mp.mpc(0, 1)}[node.name] * mp.mpf(1)
        if head == "sym":
            value = self.values.get(node.name)
            if value is None:
                raise Unreadable(f"a free variable {node.name}")
            return self.fraction(value) if isinstance(value, Fraction) else value
        if head == "+":
            terms = [self.value(arg) for arg in args]
            total = mp.fsum(terms)
            magnitudes = [mp.mag(term) for term in (*terms, total) if term]
            self.spans(max(magnitudes, default=0) - min(magnitudes, default=0))
            return total
        if head == "*":
            return mp.fprod([self.value(arg) for arg in args])
        if head == "neg":
            return -self.value(args[0])
        if head in ("/", "ratio"):
            value = self.value(args[0])
            for arg in args[1:]:
                value /= self.value(arg)
            return value
        if head == "^":
            return self.power(args[0], args[1])
        if head == "percent":
            return self.value(args[0]) / 100
        if head == "deg":
            return self.value(args[0]) * mp.pi / 180
        if head in ("unit", "approx"):
            return self.value(args[0])
        if head == "fn":
            return self.function(node)
        raise Unreadable(head)

    def spans(self, bits: Any) -> None:
        """Notes how many bits a step may lose; beyond the bound nobody can tell, as of 10^(10^10) + 1."""
        if bits > MAX_SPAN:
            raise TooLarge
        self.span = max(self.span, int(bits))

    def fraction(self, value: Any) -> Any:
        return self.mp.mpf(value.numerator) / value.denominator

    def power(self, base_node: Node, exponent_node: Node) -> Any:
        mp = self.mp
        base = self.value(base_node)
        try:
            exponent = exact(exponent_node, self.values)
        except (NotRational, TooLarge):
            exponent = None
        if base == 0:
            power = self.value(exponent_node)
            if mp.re(power) <= 0:
                raise Undefined
            return mp.mpf(0)
        if exponent is not None and exponent.denominator == 1:
            if abs(exponent) * (abs(mp.mag(base)) + 1) > MAX_MAGNITUDE:
                raise TooLarge
            return base**exponent.numerator
        if exponent is not None and exponent.denominator % 2 and mp.im(base) == 0 and base < 0:
            # The real root, as schools teach it.
            root = -((-base) ** (mp.mpf(1) / exponent.denominator))
            return root**exponent.numerator
        power = self.value(exponent_node)
        if power:
            self.spans(-mp.mag(power))
        if mp.mag(power) + mp.mag(abs(mp.log(base)) + 1) > 40:
            raise TooLarge
        return base**power

    def function(self, node: Node) -> Any:
        mp, name = self.mp, node.name
        if name in ("det", "abs") and node.args[0].head == "matrix":
            raise Unreadable("a determinant")
        args = [self.value(arg) for arg in node.args]
        first = args[0]
        if any(abs(mp.mag(arg)) > 4_000 for arg in args if arg) and name not in ("abs", "root", "sqrt", "log", "ln"):
            raise TooLarge
        if name in ("root", "sqrt"):
            degree = exact(node.args[1], self.values) if len(args) > 1 else Fraction(2)
            if degree.denominator != 1 or not 1 <= abs(degree) <= 10_000:
                return first ** (1 / args[1])
            if degree % 2 and mp.im(first) == 0 and mp.re(first) < 0:
                return -((-mp.re(first)) ** (mp.mpf(1) / degree.numerator))
            return mp.sqrt(first) if degree == 2 else first ** (mp.mpf(1) / degree.numerator)
        if name in ("log", "ln"):
            if first == 0:
                raise Undefined
            if len(args) > 1:
                return mp.log(first) / mp.log(args[1])
            return mp.log(first) / mp.log(10) if name == "log" and self.decimal_log else mp.log(first)
        if name not in ("log", "ln", "root", "sqrt", "abs", "max", "min"):
            self.spans(2 * max((abs(mp.mag(arg)) for arg in args if arg), default=0))
        if name == "exp" and mp.mag(first) > 40:
            raise TooLarge
        if name in ("tanh", "cosh", "sinh"):  # they hide an exponential
            self.spans(abs(first) * 3)
        if name in ("factorial", "binom"):
            # Between the integers only where a variable stands for any number; elsewhere nobody writes it.
            costly = mp.prec > MAX_GAMMA_PRECISION or any(mp.im(arg) != 0 for arg in args)
            if costly or not variables(node):
                raise TooLarge
        if name == "factorial":
            if mp.mag(first) > 22:
                raise TooLarge
            return mp.gamma(first + 1)
        if name == "binom":
            if any(mp.mag(arg) > 22 for arg in args):
                raise TooLarge
            return mp.binomial(*args)
        if name == "cis":
            return mp.cos(first) + mp.mpc(0, 1) * mp.sin(first)
        simple = _FUNCTIONS.get(name)
        if simple is None:
            raise Unreadable(f"the function {name}")
        if name in ("floor", "ceil", "max", "min", "sgn") and any(mp.im(arg) != 0 for arg in args):
            raise Undefined
        if name in ("max", "min"):
            return (max if name == "max" else min)(args)
        if name in ("tan", "sec") and abs(mp.cos(first)) < mp.mpf(2) ** (-mp.prec // 2):
            raise Undefined
        if name in ("cot", "csc") and abs(mp.sin(first)) < mp.mpf(2) ** (-mp.prec // 2):
            raise Undefined
        return getattr(mp, simple)(first)


_FUNCTIONS = {"sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot", "sec": "sec", "csc": "csc", "arcsin": "asin",
              "arccos": "acos", "arctan": "atan", "arccot": "acot", "sinh": "sinh", "cosh": "cosh", "tanh": "tanh",
              "exp": "exp", "abs": "fabs", "floor": "floor", "ceil": "ceil", "max": "max", "min": "min", "sgn": "sign",
              "Re": "re", "Im": "im", "arg": "arg"}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# Equality


def variables(node: Node) -> frozenset[str]:
    """The names of the variables in a formula."""
    if node.head == "sym":
        return frozenset((node.name,))
    return frozenset().union(*(variables(arg) for arg in node.args))


def size(node: Node) -> int:
    """The number of nodes."""
    return 1 + sum(size(arg) for arg in node.args)


def equal(left: Node, right: Node) -> bool:
    """Whether two formulas are equal wherever both are defined.

    Raises:
        Unreadable: if one of them has no value, as a set has none.
    """
    if key(left) == key(right):
        return True
    if size(left) + size(right) > MAX_NODES:
        return False
    names = variables(left) | variables(right)
    try:
        return _equal_formulas(left, right, names) if names else equal_constants(left, right)
    except (TooLarge, Undefined):
        return False


def equal_constants(left: Node, right: Node, values: Values = NO_VALUES) -> bool:
    """Whether two formulas have the same value at a point (by default: of no variables)."""
    first: Fraction | None = None
    second: Fraction | None = None
    try:
        first = exact(left, values)
        second = exact(right, values)
        return first == second
    except (NotRational, TooLarge):
        pass
    return any(_equal_numbers(left, right, values, log) for log in _log_readings(left, right))


def _log_readings(left: Node, right: Node) -> tuple[bool, ...]:
    r"""`\log` without a base is read both ways: natural, and decimal."""
    return (False, True) if _has_bare_log(left) or _has_bare_log(right) else (False,)


def _has_bare_log(node: Node) -> bool:
    bare = node.head == "fn" and node.name == "log" and len(node.args) == 1
    return bare or any(_has_bare_log(arg) for arg in node.args)


def _equal_numbers(left: Node, right: Node, values: Values, log: bool) -> bool:
    mp = _contexts().mp
    measured = _measured(left, 96, values, log), _measured(right, 96, values, log)
    rough, span = (measured[0][0], measured[1][0]), max(measured[0][1], measured[1][1])
    scale = max(abs(rough[0]), abs(rough[1]))
    if (
        scale
        and span < 96
        and abs(rough[0] - rough[1]) > scale / 2**20
        and min(abs(rough[0]), abs(rough[1])) > scale / 2**20
    ):
        return False
    if values:  # a formula at a point: chance decides, not rounding
        precision = 192 + 8 * _digits(left, right) + 2 * span
    else:
        bound = _separation_bound(left, right)
        if bound is None:
            precision = BASE_PRECISION + 8 * _digits(left, right) + 2 * span
        else:
            precision = (bound + span + 64) * 4 // 3 + 64  # three quarters of the bits are compared
    differences = []
    for bits in (precision, 2 * precision):
        first, second = numeric(left, bits, values, log), numeric(right, bits, values, log)
        difference = abs(first - second)
        scale = max(abs(first), abs(second))
        if difference <= scale * mp.mpf(2) ** (-bits + bits // 4):
            return True
        differences.append(difference)
    # Two values that are zero but for rounding shrink with the precision; two that differ keep their difference.
    return bool(differences[1] < differences[0] * mp.mpf(2) ** (-precision // 2))


def _digits(*nodes: Node) -> int:
    """About how many decimal digits the numbers in the formulas carry."""
    total = 0
    for node in nodes:
        if node.value is not None:
            total += (node.value.numerator.bit_length() + node.value.denominator.bit_length()) // 3
        total += _digits(*node.args)
    return min(total, 3_000)


def _separation_bound(left: Node, right: Node) -> int | None:
    """The b with |left - right| >= 2^-b for two algebraic numbers that differ; None if it is unknown or too large."""
    try:
        roots: dict[str, int] = {}
        upper, lower = _separation(Node("+", (left, Node("neg", (right,)))), roots)
    except NotRational:
        return None
    degree = math.prod(roots.values())
    bits = (degree - 1) * upper + lower
    return int(bits) + 1 if bits <= MAX_PRECISION else None


def _separation(node: Node, roots: dict[str, int]) -> tuple[float, float]:
    """The logarithms (base 2) of u and l in the BFMSS bound; gathers the distinct radicals and their degrees."""
    head, args = node.head, node.args
    if head == "num" and node.value is not None:
        return math.log2(max(abs(node.value.numerator), 1)), math.log2(node.value.denominator)
    if head == "const" and node.name == "i":
        roots["i"] = 2
        return 0.0, 0.0
    if head == "neg":
        return _separation(args[0], roots)
    if head == "+":
        upper, lower = _separation(args[0], roots)
        for arg in args[1:]:
            u, v = _separation(arg, roots)
            upper, lower = max(upper + v, u + lower) + 1, lower + v
        return upper, lower
    if head == "*":
        pairs = [_separation(arg, roots) for arg in args]
        return sum(u for u, _ in pairs), sum(v for _, v in pairs)
    if head == "/":
        u1, l1 = _separation(args[0], roots)
        u2, l2 = _separation(args[1], roots)
        return u1 + l2, l1 + u2
    if head == "^":
        exponent = exact(args[1])
        upper, lower = _separation(args[0], roots)
        if exponent < 0:
            upper, lower = lower, upper
        numerator, degree = abs(exponent.numerator), exponent.denominator
        if numerator > 1_000 or degree > 64:
            raise NotRational("a large power")
        if degree > 1:
            upper, lower = _rooted(args[0], degree, upper, lower, roots)
        return upper * numerator, lower * numerator
    if head == "fn" and node.name in ("root", "sqrt"):
        degree_value = exact(args[1]) if len(args) > 1 else Fraction(2)
        if degree_value.denominator != 1 or not 1 <= degree_value <= 64:
            raise NotRational("a large root")
        upper, lower = _separation(args[0], roots)
        return _rooted(args[0], degree_value.numerator, upper, lower, roots)
    raise NotRational(head)


def _rooted(radicand: Node, degree: int, upper: float, lower: float, roots: dict[str, int]) -> tuple[float, float]:
    roots[f"{degree}:{key(radicand)}"] = degree
    if upper >= lower:
        return (upper + (degree - 1) * lower) / degree, lower
    return upper, ((degree - 1) * upper + lower) / degree


def points(names: frozenset[str], *nodes: Node, count: int = POINTS) -> list[dict[str, Fraction]]:
    """Rational points for the variables, drawn by a hash of the formulas; the signs alternate."""
    seed = "|".join(key(node)[:2_000] for node in nodes)
    found = []
    for number in range(count):
        point = {}
        for index, name in enumerate(sorted(names)):
            digest = hashlib.sha256(f"{number}|{name}|{seed}".encode()).digest()
            fraction = Fraction(int.from_bytes(digest[:6], "big"), 1 << 48)
            value = Fraction(1, 4) + fraction * 3
            point[name] = -value if number % 2 and (number + index) % 3 else value
        found.append(point)
    return found


def _equal_formulas(left: Node, right: Node, names: frozenset[str]) -> bool:
    """Whether two formulas agree at all points where both have real values, and at two such points at least."""
    if len(names) > 12:
        return False
    candidates = points(names, left, right, count=3 * POINTS)
    # Over the complex numbers where they mention i, or are real nowhere, as (-1)^n between the integers.
    for real in (False,) if _mentions_i(left) or _mentions_i(right) else (True, False):
        agreed = 0
        for number, point in enumerate(candidates):
            if number >= POINTS and agreed >= 2:
                break
            try:
                if real and not _real_at(left, right, point):
                    continue
                if not equal_constants(left, right, point):
                    return False
                agreed += 1
            except Undefined:
                continue
        if agreed >= 2:
            return True
    return False


def _real_at(left: Node, right: Node, point: dict[str, Fraction]) -> bool:
    for node in (left, right):
        try:
            exact(node, point)
        except (NotRational, TooLarge):
            try:
                numeric(node, 96, point, real=True)
            except Undefined:
                return False
    return True


def _mentions_i(node: Node) -> bool:
    return (node.head == "const" and node.name == "i") or any(_mentions_i(arg) for arg in node.args)


def order(left: Node, right: Node) -> int:
    """-1, 0 or 1 as a real constant is less than, equal to, or greater than another; infinities allowed.

    Raises:
        Unreadable: if one of them is no real constant.
    """
    signs = [_infinite(node) for node in (left, right)]
    if any(signs):
        return (signs[0] > signs[1]) - (signs[0] < signs[1])
    if equal(left, right):
        return 0
    try:
        first, second = numeric(left, 256), numeric(right, 256)
    except (TooLarge, Undefined):
        raise Unreadable("no order") from None
    mp = _contexts().mp
    if abs(mp.im(first)) + abs(mp.im(second)) > mp.mpf(2) ** -200:
        raise Unreadable("no real number")
    return -1 if mp.re(first) < mp.re(second) else 1


def _infinite(node: Node) -> int:
    if node.head == "inf":
        return 1
    if node.head == "neg" and node.args[0].head == "inf":
        return -1
    return 0
