r"""Sets of real numbers: unions of intervals and points, read from intervals, inequalities, and set builders."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import NamedTuple

from .latex import Unreadable
from .tree import INFINITY, Node, num
from .values import NotRational, TooLarge, Undefined, exact, order, variables

MAX_PIECES = 40


class Interval(NamedTuple):
    """One interval, or a point if both ends are the same and closed."""

    low: Node
    low_closed: bool
    high: Node
    high_closed: bool


MINUS_INFINITY = Node("neg", (INFINITY,))
WHOLE = (Interval(MINUS_INFINITY, False, INFINITY, False),)
RealSet = tuple[Interval, ...]


def point(node: Node) -> Interval:
    return Interval(node, True, node, True)


def is_infinite(node: Node) -> bool:
    return node.head == "inf" or (node.head == "neg" and node.args[0].head == "inf")


def _compare_starts(left: Interval, right: Interval) -> int:
    return order(left.low, right.low) or (right.low_closed - left.low_closed)


def merged(pieces: RealSet) -> RealSet:
    """The same set as disjoint intervals in ascending order."""
    kept = []
    for piece in pieces:
        direction = order(piece.low, piece.high)
        if direction < 0 or (direction == 0 and piece.low_closed and piece.high_closed):
            kept.append(piece)
    out: list[Interval] = []
    for piece in sorted(kept, key=functools.cmp_to_key(_compare_starts)):
        if out:
            last = out[-1]
            gap = order(last.high, piece.low)
            if gap > 0 or (gap == 0 and (last.high_closed or piece.low_closed)):
                end = order(last.high, piece.high)
                closed = (
                    (last.high_closed or piece.high_closed) if end == 0 else (last if end > 0 else piece).high_closed
                )
                out[-1] = Interval(last.low, last.low_closed, last.high if end >= 0 else piece.high, closed)
                continue
        out.append(piece)
    return tuple(out)


def intersection(left: RealSet, right: RealSet) -> RealSet:
    found = []
    for a in left:
        for b in right:
            low, high = order(a.low, b.low), order(a.high, b.high)
            low_closed = (a.low_closed and b.low_closed) if low == 0 else (a if low > 0 else b).low_closed
            high_closed = (a.high_closed and b.high_closed) if high == 0 else (a if high < 0 else b).high_closed
            found.append(Interval((a if low > 0 else b).low, low_closed, (a if high < 0 else b).high, high_closed))
    return merged(tuple(found))


def complement(pieces: RealSet) -> RealSet:
    rest: RealSet = WHOLE
    for piece in pieces:
        left = Interval(MINUS_INFINITY, False, piece.low, not piece.low_closed)
        right = Interval(piece.high, not piece.high_closed, INFINITY, False)
        outside = tuple(
            p for p in (left, right) if not (is_infinite(p.low) and is_infinite(p.high) and p.low == p.high)
        )
        rest = intersection(rest, outside)
    return rest


def same_set(left: RealSet, right: RealSet) -> bool:
    left, right = merged(left), merged(right)
    return len(left) == len(right) and all(
        a.low_closed == b.low_closed
        and a.high_closed == b.high_closed
        and order(a.low, b.low) == 0
        and order(a.high, b.high) == 0
        for a, b in zip(left, right, strict=True)
    )


class Described(NamedTuple):
    """A set and the variable it was described with, if any."""

    variable: str | None
    pieces: RealSet


def is_set(node: Node) -> bool:
    """Whether a node can only be a set of reals (a bare pair may be a point as well)."""
    if node.head in ("cup", "cap", "setminus", "reals", "setbuilder"):
        return True
    if node.head == "tuple" and len(node.args) == 2:
        mixed = node.name in ("(]", "[)")
        return mixed or any(is_infinite(arg) for arg in node.args)
    if node.head == "rel":
        signs = set(node.name.split("|"))
        return bool(signs & {"<", ">", "<=", ">=", "!=", "notin"}) or (
            signs == {"in"} and (is_set(node.args[1]) or node.args[1].head == "tuple")
        )
    if node.head != "list" or len(node.args) < 2 or node.args[0].head != "rel":
        return False
    excluded = node.args[0].name == "!="  # `x \\ne 0, 1` goes on with numbers
    return all((is_set(arg) and arg.head == "rel") or (excluded and arg.head != "rel") for arg in node.args)


def real_set(node: Node) -> Described | None:
    """The set that a node describes; None if it is none that is understood."""
    try:
        return _real_set(node)
    except (Unreadable, NotRational, TooLarge, Undefined):
        return None


def _real_set(node: Node) -> Described:
    head, args = node.head, node.args
    if head == "reals":
        return Described(None, WHOLE)
    if head == "tuple" and len(args) == 2 and set(node.name) <= set("()[]"):
        interval = Interval(args[0], node.name[0] == "[", args[1], node.name[1] == "]")
        if order(args[0], args[1]) >= (1 if node.name == "[]" else 0):
            raise Unreadable("no interval, a pair")
        if any(closed and is_infinite(end) for end, closed in ((args[0], interval[1]), (args[1], interval[3]))):
            interval = Interval(
                args[0],
                interval.low_closed and not is_infinite(args[0]),
                args[1],
                interval.high_closed and not is_infinite(args[1]),
            )
        return Described(None, (interval,))
    if head in ("cup", "cap", "setminus"):
        left, right = _real_set(args[0]), _real_set(args[1])
        variable = left.variable or right.variable
        if head == "cup":
            return Described(variable, merged(left.pieces + right.pieces))
        other = right.pieces if head == "cap" else complement(right.pieces)
        return Described(variable, intersection(left.pieces, other))
    if head == "set":
        return Described(None, tuple(point(arg) for arg in args[:MAX_PIECES]))
    if head == "setbuilder":
        return _builder(args[0], args[1])
    if head == "rel":
        return _relation(node)
    if head == "list" and args:
        return _conditions(node)
    if not variables(node) and head not in ("list", "text"):
        return Described(None, (point(node),))
    raise Unreadable("no set of reals")


def _builder(member: Node, condition: Node) -> Described:
    domain = Described(None, WHOLE)
    if member.head == "rel" and member.name == "in":
        if member.args[1].head != "reals":
            raise Unreadable("another domain")
        member = member.args[0]
    if member.head != "sym":
        raise Unreadable("a set of formulas")
    found = _real_set(condition)
    if found.variable != member.name:
        raise Unreadable("another variable")
    return Described(None, intersection(domain.pieces, found.pieces))


def _conditions(node: Node) -> Described:
    """Inequalities joined by `or`, `and` or commas. Commas join what has something in common, and unite the rest."""
    first = node.args[0]
    if first.name == "!=":
        node = Node(
            "list", tuple(a if a.head == "rel" else Node("rel", (first.args[0], a), "!=") for a in node.args), node.name
        )
    parts = [_real_set(arg) for arg in node.args[:MAX_PIECES]]
    names = {part.variable for part in parts}
    if len(names) != 1:
        raise Unreadable("several variables")
    union: RealSet = ()
    common: RealSet = WHOLE
    for part in parts:
        union += part.pieces
        common = intersection(common, part.pieces)
    united = "or" in node.name or not common
    return Described(names.pop(), merged(union) if united else common)


_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}


def _relation(node: Node) -> Described:
    signs = node.name.split("|")
    names = variables(node)
    if len(names) != 1:
        raise Unreadable("several variables")
    name = next(iter(names))
    found: RealSet = WHOLE
    for left, sign, right in zip(node.args, signs, node.args[1:], strict=False):
        if sign in ("in", "notin"):
            if left.head != "sym":
                raise Unreadable("a formula in a set")
            pieces = _real_set(right).pieces
            found = intersection(found, pieces if sign == "in" else complement(merged(pieces)))
        elif sign == "!=" and right.head in ("pm", "mp") and left.head == "sym":
            both = (Node("+", right.args), Node("+", (right.args[0], Node("neg", (right.args[1],)))))
            found = intersection(found, complement(merged(tuple(point(node) for node in both))))
        elif sign in _FLIPPED:
            found = intersection(found, _solved(left, sign, right, name))
        else:
            raise Unreadable(f"the relation {sign}")
    return Described(name, found)


def _solved(left: Node, sign: str, right: Node, name: str) -> RealSet:
    """Where `left sign right` holds: a variable against a constant, or up to a quadratic with rational coefficients."""
    if left.head == "sym" and not variables(right):
        return _half_line(sign, right)
    if right.head == "sym" and not variables(left):
        return _half_line(_FLIPPED[sign], left)
    if left.head == "fn" and left.name == "abs" and not variables(right):
        bound = exact(right)
        if bound < 0:
            return WHOLE if sign in (">", ">=", "!=") else ()
        square = Node("^", (left.args[0], num(2)))
        return _solved_polynomial(square, sign, num(bound * bound), name)
    if right.head == "fn" and right.name == "abs" and not variables(left):
        return _solved(right, _FLIPPED[sign], left, name)
    return _solved_polynomial(left, sign, right, name)


def _half_line(sign: str, bound: Node) -> RealSet:
    if sign == "=":
        return (point(bound),)
    if sign == "!=":
        return complement((point(bound),))
    closed = sign.endswith("=")
    if sign.startswith("<"):
        return (Interval(MINUS_INFINITY, False, bound, closed and not is_infinite(bound)),)
    return (Interval(bound, closed and not is_infinite(bound), INFINITY, False),)


def _solved_polynomial(left: Node, sign: str, right: Node, name: str) -> RealSet:
    def difference(x: int) -> Fraction:
        values = {name: Fraction(x)}
        return exact(left, values) - exact(right, values)

    c = difference(0)
    a = (difference(1) + difference(-1)) / 2 - c
    b = difference(1) - a - c
    if any(difference(x) != a * x * x + b * x + c for x in (2, 3, -5)):
        raise Unreadable("an inequality of higher degree")
    if a == 0:
        if b == 0:
            raise Unreadable("no variable left")
        return _half_line(sign if b > 0 else _FLIPPED[sign], num(-c / b))
    if a < 0:
        a, b, c, sign = -a, -b, -c, _FLIPPED[sign]
    discriminant = b * b - 4 * a * c
    if discriminant < 0:
        return WHOLE if sign in (">", ">=", "!=") else ()
    root = Node("fn", (num(discriminant), num(2)), name="root")
    low, high = (Node("/", (Node("+", (num(-b), r)), num(2 * a))) for r in (Node("neg", (root,)), root))
    if sign in ("=", "!="):
        pieces = merged((point(low), point(high)))
        return pieces if sign == "=" else complement(pieces)
    closed = sign.endswith("=")
    if sign.startswith("<"):
        return merged((Interval(low, closed, high, closed),))
    outside = (Interval(MINUS_INFINITY, False, low, closed), Interval(high, closed, INFINITY, False))
    return merged(outside)
