r"""Do two answers say the same? Compared as what they are: choices, texts, sets, lists, tuples, equations, numbers.

Rules for debatable cases:
- A label (`x =`, `f(x) =`, `\angle ABC =`) or a unit may be missing or added; two that contradict each other are wrong.
  So are another unit (`1 m` for `100 cm`) and another letter (`y = 5` for `x = 5`).
- A percentage may be written as a percentage, as its number, or as the fraction it is.
- Tuples, matrices, vectors and ratios are ordered; sets, lists, unions and both signs of ± are not.
- An interval equals the inequality that describes it; equations with the same solutions are equal.
- A bare list equals a tuple in the same order; a set in braces does not.
- A numeral with a base (`12_5`) equals the same digits without it, and any number of the same value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from . import words
from .intervals import is_infinite, is_set, real_set, same_set
from .latex import MAX_TEXT, Unreadable, Unsupported, spell
from .tree import REALS, Node, key, num, parse
from .values import (
    NotRational,
    TooLarge,
    Undefined,
    equal,
    exact,
    numeric,
    points,
    variables,
)

MAX_MEMBERS = 64


def same(gold: str, answer: str) -> bool | None:
    """Whether an answer says what the gold says; None if that is mathematics that this module cannot read."""
    gold, answer = _bare(gold), _bare(answer)
    if not gold or not answer:
        return False
    if len(gold) > MAX_TEXT or len(answer) > MAX_TEXT:
        return gold == answer
    compact = [re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", spell(text)) for text in (gold, answer)]
    if compact[0] == compact[1] and compact[0]:
        return True
    chosen = _choices(gold, answer)
    if chosen is not None:
        return chosen
    clock = _times(gold, answer)
    if clock is not None:
        return clock
    return _same_readings(gold, answer)


def canonical(answer: str) -> str:
    """A text that answers share if they are the same number, or the same but for the order of sums and products."""
    text = _bare(answer)
    plain = " ".join(spell(text[:MAX_TEXT]).split())
    if len(text) > MAX_TEXT:
        return plain
    try:
        node = _read(text, True)
        try:
            return str(exact(node))
        except (TooLarge, Undefined, NotRational):
            return key(node)
    except Unreadable:
        return plain


_ENVIRONMENT = re.compile(
    r"\\begin\{(align|aligned|equation|gather|gathered|split|displaymath|math|center|multline)(?:\*?)\}(.*)\\end\{\1\*?\}",
    re.DOTALL,
)


def _bare(text: str) -> str:
    """The answer without what surrounds it: dollars, bold type, quotes, a full stop."""
    for _ in range(4):
        before = text
        text = text.lstrip("&").strip(" \t\n\r\x00\u200b\u00a0")  # a form feed may be what is left of \\frac
        if len(text) > 1 and text[-1] in ".,;:。" and not text.endswith(("...", "\\,", "\\;", "\\:")):
            text = text[:-1]
        if wrapped := _ENVIRONMENT.fullmatch(text):
            text = re.split(r"\\\\\s*(?=\S)", wrapped[2])[-1].replace("&", " ").replace("\\\\", " ")
        for opener, closer in (("**", "**"), ("__", "__"), ("`", "`"), ('"', '"'), ("“", "”"), ("$$", "$$"), ("$", "$"),
                               (r"\(", r"\)"), (r"\[", r"\]"), ("*", "*")):  # fmt: skip
            inner = text[len(opener) : -len(closer)]
            if (
                len(text) > 2 * len(opener)
                and text.startswith(opener)
                and text.endswith(closer)
                and opener not in inner
            ):
                text = inner
        if text == before:
            break
    return text


# ---------------------------------------------------------------------------------------------------------
# Choices, times, texts


def _choices(gold: str, answer: str) -> bool | None:
    """Whether two multiple choices agree; None if the gold is no choice."""
    wanted = words.choice(gold)
    letter = re.search(r"[A-Ja-j]", re.sub(r"\\[A-Za-z]+", "", gold))
    if wanted is None or letter is None or (letter[0].islower() and not re.search(r"[(\[]\s*[a-j]\s*[)\]]", gold)):
        return None
    if wanted[1] and not re.search(r"[)\].:]", gold):
        return None
    given = words.choice(answer)
    if given is None:
        if wanted[1]:
            return same(wanted[1], answer)
        asserted = re.search(r"(?:option|choice|answer(?: is)?:?)\s*\(?([A-J])\)?\s*$", words.phrase(answer), re.I)
        return asserted[1].upper() == wanted[0] if asserted else None
    if re.search(r"\b(?:or|and)\b|,\s*\(?[A-E]\b", given[1]) or re.search(r"[=<>]", given[1][:1]):
        return False
    return given[0] == wanted[0]


_TIME = re.compile(r"(\d{1,2})(?::(\d{2}))?(?:\s*([ap])m)?")


def _times(gold: str, answer: str) -> bool | None:
    """Whether two times of day agree; None if the gold is none."""
    found = [_TIME.fullmatch(re.sub(r"\s+", " ", words.phrase(text))) for text in (gold, answer)]
    if not found[0]:
        return None
    clock = any(match and (match[3] or (match[2] or "1")[0] == "0") for match in found)
    if not clock:
        return None
    if not found[1]:
        return False
    first, second = found[0], found[1]
    halves = {first[3], second[3]} - {None}
    minutes = [match[2] or "00" for match in (first, second)]
    return int(first[1]) == int(second[1]) and minutes[0] == minutes[1] and len(halves) < 2


_REMARK = re.compile(
    r"(?:,|\s|\\quad)*(?:"
    r"\\text\s?\{\s*,?\s*(?:\(|(?:since|because|where|when|for|with|if|as|provided|which)\b).*"  # a clause
    r"|(?:,|\\quad)(?:\s|\\[ ,;:]|\\quad)*(?:\\text\{[^{}]{0,20}\})?\s*"
    r"\(?[a-z]\s*(?:\\in|∈)\s*(?:\\mathbb\s?\{?[ZN]\}?|[ℤℕ])\S{0,4}"  # k in Z
    r"|\((?:since|because|where|for|with|as|by)\b.*"
    r")$",
    re.DOTALL,
)


_DOTS = re.compile(r"[^=]*(?:\\[lc]?dots[cb]?|\.\.\.|[…⋯])[^=]*=([^=]+)", re.DOTALL)  # `1 + 2 + \\cdots + 5 = 15`


def _without_remark(text: str) -> str:
    """The answer without a condition or a reason behind it: `5 \\text{ (since } x > 0)`, `2k, k \\in \\mathbb{Z}`."""
    match = _REMARK.search(text[:MAX_TEXT])
    return text[: match.start()] if match and re.search(r"[\w})\]]", text[: match.start()]) else text


_EXCEPT = re.compile(
    r"\s*(?:x\s+is\s+)?(?:the set of )?all (?:real numbers|reals|real values|real)(?:\s+\$?x\$?)?,?\s+"
    r"(?:except|other than|but|excluding)(?:\s+for)?\s+(?:\$?x\s*=)?([^A-Za-z]+)",
    re.IGNORECASE,
)


def _read(text: str, grouped: bool) -> Node:
    """The tree of an answer, in words or in signs."""
    text = _without_remark(text)
    phrase = words.phrase(text)
    if words.meaning(phrase) == words.meaning("no solution"):
        return Node("set")
    if words.meaning(phrase) == words.meaning("all real numbers"):
        return REALS
    if phrase in ("all integers", "integers", "set of all integers", "set of integers", "any integer"):
        return parse(r"\mathbb{Z}")
    if excepted := _EXCEPT.fullmatch(re.sub(r"\\(?:text|mathrm|mbox)\s?\{([^{}]*)\}", r" \1 ", text)):
        outside = parse(excepted[1], grouped)
        return Node("setminus", (REALS, Node("set", outside.args if outside.head == "list" else (outside,))))
    if value := words.number_word(phrase) if re.fullmatch(r"[a-z -]+", phrase) else None:
        return num(int(value))
    numeral = re.fullmatch(
        r"\(?([0-9A-Fa-f]{1,400})\)?\s?(?:_\{?\s?(?:\\text\{)?(\d{1,2}|[a-z]{3,7})\}?\s?\}?|(?:\\text)?[{(\s]*base[-\s}]+(\d{1,2}|[a-z]{3,7})[)}\s]*)",
        spell(text).strip(),
    )
    if numeral:
        written = numeral[2] or numeral[3]
        base = written if written.isdigit() else words.number_word(written)
        if base and 2 <= int(base) <= 16 and (numeral[1].isdigit() or int(base) > 10):
            return Node("base", name=f"{numeral[1]}_{base}")
    if shortened := _DOTS.fullmatch(text):
        text = shortened[1]
    return parse(text, grouped)


def _same_readings(gold: str, answer: str) -> bool | None:
    """Compares every reading of both: a comma may group thousands, or separate members."""
    outcomes: list[bool | None] = []
    both = {"," in text and bool(re.search(r"\d,\s?\d{3}(?!\d)", spell(text))) for text in (gold, answer)}
    # No member of a list is written `000` or `050`.
    separate = any(both) and not any(re.search(r"\d,0\d\d(?!\d)", text) for text in (gold, answer))
    for grouped in (True, False) if separate else (True,):
        outcomes.append(_same_trees(gold, answer, grouped))
        if outcomes[-1]:
            return True
    return None if None in outcomes else False


def _same_trees(gold: str, answer: str, grouped: bool) -> bool | None:
    wordy = bool(re.search(r"[A-Za-z∅]{2,}", re.sub(r"\\[A-Za-z]+", " ", gold)))
    try:
        gold_tree = _read(gold, grouped)
    except Unreadable as fault:
        if wordy and words.texts_agree(gold, answer):
            return True
        return None if isinstance(fault, Unsupported) else False
    if gold_tree.head == "text":
        return words.texts_agree(gold, answer)
    try:
        answer_tree = _read(answer, grouped)
    except Unreadable as fault:
        if wordy and words.texts_agree(gold, answer):
            return True
        return None if isinstance(fault, Unsupported) else False
    if _is_wordy(gold_tree) and words.texts_agree(gold, answer):
        return True
    try:
        return agree(gold_tree, answer_tree)
    except Unreadable as fault:
        return None if isinstance(fault, Unsupported) else False
    except (TooLarge, Undefined, NotRational):
        return False


def _is_wordy(node: Node) -> bool:
    return node.head == "text" or any(_is_wordy(arg) for arg in node.args)


# ---------------------------------------------------------------------------------------------------------
# Trees


def agree(gold: Node, answer: Node) -> bool:
    """Whether two trees say the same.

    Raises:
        Unreadable: if there is no telling.
    """
    gold, answer = _plain(gold), _plain(answer)
    if key(gold) == key(answer):
        return True
    if is_set(gold) or is_set(answer):
        verdict = _sets(gold, answer)
        if verdict is not None:
            return verdict
    if _is_equation(gold) or _is_equation(answer):
        verdict = _equations(gold, answer)
        if verdict is not None:
            return verdict
    members = _members(gold), _members(answer)
    if members[0] is not None or members[1] is not None:
        return _collections(gold, answer, members[0], members[1])
    return _ordered(gold, answer)


def _plain(node: Node) -> Node:
    while node.head == "approx":
        node = node.args[0]
    if node.head == "rel" and node.name == "in" and node.args[1].head == "sym" and node.args[1].name in "ℤℕℚℂ":
        return node.args[1]
    return node


def _sets(gold: Node, answer: Node) -> bool | None:
    described = real_set(gold), real_set(answer)
    if described[0] is not None and described[1] is not None:
        names = {described[0].variable, described[1].variable} - {None}
        if len(names) > 1:
            return False
        for node in (gold, answer):  # a number is no set, and a point is no interval
            if not is_set(node) and node.head not in ("tuple", "set", "list", "rel"):
                return False
        return same_set(described[0].pieces, described[1].pieces)
    if gold.head == answer.head == "rel" and gold.name != "=" and answer.name != "=":
        return _same_inequality(gold, answer)
    if gold.head == answer.head and gold.head in ("cup", "cap", "setminus"):
        pairs = (gold.args, answer.args), (gold.args, answer.args[::-1])
        return any(
            all(agree(a, b) for a, b in zip(*pair, strict=True)) for pair in pairs[: 2 if gold.head == "cup" else 1]
        )
    labelled = _labelled(answer if is_set(gold) else gold)
    if labelled is not None and labelled[0] is not None:
        return None
    if gold.head == answer.head == "tuple":
        return None
    if is_set(gold) != is_set(answer):
        other = answer if is_set(gold) else gold
        if other.head in ("num", "const", "text") or (described[0] is None) != (described[1] is None):
            return False
    return None


def _members(node: Node) -> list[Node] | None:
    """The members of a list, a set or a ±; None if the node is a single answer."""
    if node.head in ("list", "set"):
        found: list[Node] = []
        for arg in node.args[: MAX_MEMBERS + 1]:
            inner = _members(_plain(arg)) if node.head == "list" or arg.head in ("pm", "mp") else None
            found += inner if inner is not None else [_plain(arg)]
        if len(found) > MAX_MEMBERS:
            raise TooLarge
        return found
    if node.head == "rel" and node.name in ("in", "=") and node.args[1].head == "set":
        return _members(node.args[1])
    if node.head == "setbuilder":
        return _members(node.args[1])
    if node.head == "cup" and all(arg.head in ("set", "cup") for arg in node.args):
        left, right = _members(node.args[0]), _members(node.args[1])
        return None if left is None or right is None else left + right
    signs = _count_signs(node)
    if not signs:
        return None
    if signs > 3:
        raise TooLarge
    tied = _has(node, "mp")
    choices = [(True,) * signs, (False,) * signs] if tied else _products(signs)
    return [_with_signs(node, list(choice)) for choice in choices]


def _products(count: int) -> list[tuple[bool, ...]]:
    return [tuple(bool(number >> bit & 1) for bit in range(count)) for number in range(2**count)]


def _has(node: Node, head: str) -> bool:
    return node.head == head or any(_has(arg, head) for arg in node.args)


def _count_signs(node: Node) -> int:
    return (node.head in ("pm", "mp")) + sum(_count_signs(arg) for arg in node.args)


def _with_signs(node: Node, upper: list[bool]) -> Node:
    if node.head in ("pm", "mp"):
        plus = upper.pop() == (node.head == "pm")
        left, right = _with_signs(node.args[0], upper), _with_signs(node.args[1], upper)
        return Node("+", (left, right if plus else Node("neg", (right,))))
    return Node(node.head, tuple(_with_signs(arg, upper) for arg in node.args), node.name, node.value)


def _collections(gold: Node, answer: Node, left: list[Node] | None, right: list[Node] | None) -> bool:
    if left is None or right is None:
        other = gold if left is None else answer
        members = left if left is not None else right
        assert members is not None
        if other.head == "tuple" and other.name in ("()", "<>"):
            return _tuple_and_list(other, answer if left is None else gold, members)
        if len(members) == 1:
            return agree(members[0], other)
        left = [gold] if left is None else left
        right = [answer] if right is None else right
    for members, others in ((left, right), (_unlabelled(left), _unlabelled(right))):
        if _matches(members, others) and _matches(others, members):
            return True
    return False


def _tuple_and_list(other: Node, collection: Node, members: list[Node]) -> bool:
    """A bare list in the order of the tuple, or values labelled x, y, z."""
    if collection.head != "list" or len(members) != len(other.args):
        return False
    labelled = [_labelled(member) for member in members]
    if all(pair is not None and pair[0] is not None for pair in labelled):
        pairs = [(str(pair[0]), pair[1]) for pair in labelled if pair is not None]
        values = [value for _, value in sorted(pairs, key=lambda pair: pair[0])]
        given = [value for _, value in pairs]
        return any(all(agree(a, b) for a, b in zip(other.args, order, strict=True)) for order in (values, given))
    if "or" in collection.name:
        return False
    return all(agree(a, b) for a, b in zip(other.args, members, strict=True))


def _unlabelled(members: list[Node]) -> list[Node]:
    """The values alone, if all members carry the same label, or the first one carries it for all."""
    labelled = [_labelled(member) for member in members]
    labels = {pair[0] for pair in labelled if pair is not None and pair[0] is not None}
    if len(labels) == 1 and None not in labelled:
        return [pair[1] for pair in labelled if pair is not None]
    return members


def _matches(members: Sequence[Node], others: Sequence[Node]) -> bool:
    return all(any(_quick_agree(member, other) for other in others) for member in members)


def _quick_agree(left: Node, right: Node) -> bool:
    try:
        return agree(left, right)
    except (TooLarge, Undefined, NotRational, Unreadable):
        return False


# -- equations and labels


def _is_equation(node: Node) -> bool:
    return node.head == "rel" and set(node.name.split("|")) <= {"=", "~"}


def _is_label(left: Node, right: Node, lenient: bool) -> bool:
    """Whether the left side only names what the right side gives: `x`, `f(x)`, `AB`; leniently `a + b`, too."""
    names = variables(left)
    if not names or left.head in ("num", "const"):
        return False
    if left.head == "sym":
        return left.name not in variables(right)
    if left.head == "*" and left.name == "juxtaposed" and left.args[0].head in ("sym", "^") and not _numbers(left):
        function = left.args[0].args[0].name if left.args[0].head == "^" else left.args[0].name
        return function not in variables(right)
    if (
        left.head == "*"
        and left.args[0].head in ("sym", "^")
        and left.args[0].name
        and left.args[0].name not in variables(right)
    ):
        return left.args[0].name[0] in "fghpqPTSEQFGAVrR"
    if left.head == "tuple":
        return right.head in ("tuple", "set") and all(arg.head == "sym" for arg in left.args)
    if left.head == "matrix":
        return right.head == "matrix"
    if lenient and not variables(right) and _applies_function(left):
        return True
    if variables(right) & names:
        return False
    if lenient and not variables(right) and _has_pi(left):
        return True
    return not variables(right) and (
        (lenient and len(names) > 1) or left.head == "fn" or (left.head == "^" and left.args[0].head == "fn")
    )


def _applies_function(node: Node) -> bool:
    """Whether a value of a function stands in it, as in `f(2) + f(3)`."""
    if (
        node.head == "*"
        and node.args[0].head == "sym"
        and node.args[0].name in "fghPpFG"
        and node.args[1].head == "num"
    ):
        return True
    return any(_applies_function(arg) for arg in node.args)


def _has_pi(node: Node) -> bool:
    return (node.head == "const" and node.name == "pi") or any(_has_pi(arg) for arg in node.args)


def _numbers(node: Node) -> bool:
    return node.head == "num" or any(_numbers(arg) for arg in node.args if node.head != "^")


def _labelled(node: Node, lenient: bool = False) -> tuple[str | None, Node] | None:
    """The label and the value of an answer like `x = 5`, or no label and the value of `2^3 = 8`.

    None if it is an equation that has to be solved, or a chain that contradicts itself.
    """
    node = _plain(node)
    if node.head != "rel":
        return None, node
    if not _is_equation(node):
        return None
    sides, signs = list(node.args), node.name.split("|")
    label: str | None = None
    if _is_label(sides[0], sides[-1], lenient):
        label = _label_name(sides[0])
        sides, signs = sides[1:], signs[1:]
    elif len(sides) == 2 and sides[1].head == "sym" and not variables(sides[0]):
        return _label_name(sides[1]), sides[0]
    while sides and len(sides) > 1 and _is_label(sides[0], sides[-1], lenient):
        sides, signs = sides[1:], signs[1:]
    if label is None and any(variables(side) for side in sides) and len(sides) > 1:
        # `(x+1)^2 = x^2+2x+1` is one formula in two forms.
        if not all(_equal(sides[0], side) for side in sides[1:]):
            return None
        return None, sides[0]
    value = sides[0]
    for sign, side in zip(signs, sides[1:], strict=False):
        if sign == "~":
            break
        if not _quick_agree(value, side):
            return None
    return label, value


def _equal(left: Node, right: Node) -> bool:
    try:
        return equal(left, right)
    except Unreadable:
        return False


def _label_name(node: Node) -> str:
    if node.head == "sym":
        return node.name
    if node.head == "*" and node.args[0].head == "sym":
        return node.args[0].name + "()"
    return "?" + key(node)


def _labels_agree(left: str | None, right: str | None) -> bool:
    if left is None or right is None or left == right:
        return True
    pair = {left, right}
    if "y" in pair and any(label.endswith("()") for label in pair):
        return True
    bases = {label.removesuffix("()") for label in pair}
    return len(bases) == 1


def _equations(gold: Node, answer: Node) -> bool | None:
    both = _is_equation(gold) and _is_equation(answer)
    if both and len(gold.args) == len(answer.args) == 2 and _same_solutions(gold, answer):
        return True
    left, right = _labelled(gold), _labelled(answer, lenient=not both)
    if both:
        if left is None or right is None:
            return False
        return _labels_agree(left[0], right[0]) and agree(left[1], right[1])
    pair = left if _is_equation(gold) else right
    other = answer if _is_equation(gold) else gold
    if pair is None:
        approximate = _approximation(answer)
        return approximate is not None and agree(gold, approximate) if _is_equation(answer) else False
    if other.head in ("list", "set") and len(other.args) != 1:
        return agree(pair[1], other) if pair[1].head == "tuple" else None
    if agree(pair[1], other):
        return True
    approximate = _approximation(answer)
    return approximate is not None and agree(gold, approximate)


def _approximation(node: Node) -> Node | None:
    """The rounded value at the end of `x = \\frac{1}{3} \\approx 0.33`: right where the gold is rounded as well."""
    if node.head == "rel" and node.name.split("|")[-1] == "~":
        return node.args[-1]
    return None


def _difference(node: Node) -> Node:
    return Node("+", (node.args[0], Node("neg", (node.args[1],))))


def _same_solutions(left: Node, right: Node) -> bool:
    """Whether two equations have the same solutions: proportional, or solved for the same variable alike."""
    names = variables(left)
    if not names or names != variables(right) or len(names) > 8:
        return False
    first, second = _difference(left), _difference(right)
    try:
        return _proportional(first, second, names, signed=False) or (
            _solves(first, second, names) and _solves(second, first, names)
        )
    except (NotRational, TooLarge, Undefined, Unreadable):
        return False


def _proportional(first: Node, second: Node, names: frozenset[str], signed: bool) -> bool:
    ratio: Node | None = None
    for point in points(names, first, second):
        try:
            values = exact(first, point), exact(second, point)
            if values[0] == 0 or values[1] == 0:
                return False
            here = num(values[0] / values[1])
            if signed and values[0] / values[1] < 0:
                return False
            if ratio is not None and ratio != here:
                return False
            ratio = here
        except (NotRational, TooLarge):
            return _proportional_numbers(first, second, names, signed)
    return ratio is not None


def _proportional_numbers(first: Node, second: Node, names: frozenset[str], signed: bool) -> bool:
    ratios = []
    for point in points(names, first, second):
        values = numeric(first, 512, point), numeric(second, 512, point)
        if not values[0] or not values[1]:
            return False
        ratios.append(values[0] / values[1])
    if signed and not (ratios[0].real > 0 and abs(ratios[0].imag) < abs(ratios[0]) / 2**200):
        return False
    return all(abs(ratio - ratios[0]) <= abs(ratios[0]) / 2**400 for ratio in ratios)


def _solves(solved: Node, other: Node, names: frozenset[str]) -> bool:
    """Whether an equation is linear in a variable, and its solutions solve the other one, too."""
    for name in sorted(names):
        for point in points(names - {name}, solved, other):
            root = _linear_root(solved, name, point)
            if root is None or exact(other, {**point, name: root}) != 0:
                break
        else:
            return True
    return False


def _linear_root(node: Node, name: str, point: dict[str, Fraction]) -> Fraction | None:
    at = [exact(node, {**point, name: Fraction(x)}) for x in (1, 2, 3, 5)]
    slope = at[1] - at[0]
    if slope == 0 or at[2] - at[1] != slope or at[3] - at[2] != 2 * slope:
        return None
    return 1 - at[0] / slope


_TURNED = {">": "<", ">=": "<="}


def _same_inequality(left: Node, right: Node) -> bool:
    """Whether two inequalities in several variables are positive multiples of each other."""
    if len(left.args) != 2 or len(right.args) != 2:
        return False
    names = variables(left)
    if not names or names != variables(right):
        return False
    differences, signs = [], []
    for node in (left, right):
        turned = node.name in _TURNED
        difference = _difference(node)
        differences.append(Node("neg", (difference,)) if turned else difference)
        signs.append(_TURNED.get(node.name, node.name))
    if signs[0] != signs[1]:
        return False
    try:
        return _proportional(differences[0], differences[1], names, signed=signs[0] != "!=")
    except (NotRational, TooLarge, Undefined):
        return False


# -- tuples, matrices, ratios, numbers with units


def _ordered(gold: Node, answer: Node) -> bool:
    labels = _point_label(gold), _point_label(answer)
    if labels != (None, None):
        gold, answer = (node.args[1] if label else node for node, label in zip((gold, answer), labels, strict=True))
        return len({*labels} - {None}) < 2 and agree(gold, answer)
    matrices = _matrix(gold), _matrix(answer)
    if matrices[0] is not None and matrices[1] is not None:
        shapes = [(len(m), len(m[0])) for m in matrices if m is not None]
        if shapes[0] != shapes[1]:
            return False
        return all(
            agree(a, b)
            for row, other in zip(matrices[0], matrices[1], strict=True)
            for a, b in zip(row, other, strict=True)
        )
    vectors = _vector(gold), _vector(answer)
    if vectors[0] is not None and vectors[1] is not None:
        same_brackets = gold.head != "tuple" or answer.head != "tuple" or _brackets_agree(gold.name, answer.name)
        return (
            same_brackets
            and len(vectors[0]) == len(vectors[1])
            and all(agree(a, b) for a, b in zip(vectors[0], vectors[1], strict=True))
        )
    if any(v is not None for v in (*vectors, *matrices)):
        return False
    if gold.head == answer.head == "ratio":
        return len(gold.args) == len(answer.args) and all(
            equal(Node("*", (gold.args[0], b)), Node("*", (a, answer.args[0])))
            for a, b in zip(gold.args[1:], answer.args[1:], strict=True)
        )
    if "mod" in (gold.head, answer.head):
        return _residues(gold, answer)
    if gold.head == "text" or answer.head == "text":
        return gold.head == answer.head and words.texts_agree(gold.name, answer.name)
    return _quantities(gold, answer)


def _brackets_agree(left: str, right: str) -> bool:
    return left == right or {left, right} <= {"()", "<>"}


def _point_label(node: Node) -> str | None:
    """`P` for `P(3, 4)`: a letter before a point names it."""
    named = node.head == "*" and node.args[0].head == "sym" and node.args[1].head == "tuple"
    return node.args[0].name if named else None


def _matrix(node: Node) -> list[list[Node]] | None:
    if node.head == "matrix":
        return [list(row.args) for row in node.args]
    if node.head == "neg" and (rows := _matrix(node.args[0])):
        return [[Node("neg", (entry,)) for entry in row] for row in rows]
    if node.head in ("*", "/"):
        first, second = _matrix(node.args[0]), _matrix(node.args[1])
        if node.head == "*" and (first is None) != (second is None):
            rows, factor = (first, node.args[1]) if first else (second, node.args[0])
            assert rows is not None
            if factor.head in ("tuple", "set", "sym"):
                return None
            return [[Node("*", (factor, entry)) for entry in row] for row in rows]
        if node.head == "/" and first is not None and second is None:
            return [[Node("/", (entry, node.args[1])) for entry in row] for row in first]
    return None


def _vector(node: Node) -> list[Node] | None:
    if node.head == "tuple":
        return list(node.args)
    rows = _matrix(node)
    if rows is None:
        return None
    if len(rows) == 1:
        return rows[0]
    return [row[0] for row in rows] if len(rows[0]) == 1 else None


def _residues(gold: Node, answer: Node) -> bool:
    if gold.head == answer.head == "mod":
        modulus = exact(gold.args[1])
        difference = exact(gold.args[0]) - exact(answer.args[0])
        return modulus != 0 and modulus == exact(answer.args[1]) and (difference / modulus).denominator == 1
    residue = gold if gold.head == "mod" else answer
    return equal(residue.args[0], answer if gold.head == "mod" else gold)


def _quantities(gold: Node, answer: Node) -> bool:
    """Compares two numbers or formulas, each with its unit if it has one."""
    parts = [_split(gold), _split(answer)]
    for mine, theirs in ((0, 1), (1, 0)):
        value, unit = parts[mine]
        other = parts[theirs]
        # `5 m`: letters after a number are a unit where the other has it, or where the gold has no variable at all.
        letters = _letter_unit(value) if not unit and not variables(other[0]) else None
        if letters is not None and (letters[1] == other[1] or (mine == 1 and words.units_agree(letters[1], other[1]))):
            parts[mine] = letters
    (left, left_unit), (right, right_unit) = parts
    if is_infinite(left) or is_infinite(right):
        return key(left) == key(right)
    percents = [("percent", 1) in unit for unit in (left_unit, right_unit)]
    plain = [frozenset(pair for pair in unit if pair[0] != "percent") for unit in (left_unit, right_unit)]
    if not words.units_agree(plain[0], plain[1]):
        return False
    if equal(left, right):
        return True
    if percents[0] != percents[1]:
        hundredth = Node("/", (left if percents[0] else right, num(100)))
        return equal(hundredth, right if percents[0] else left)
    if ("deg", 1) in left_unit | right_unit and (not left_unit or not right_unit):
        degrees, radians = (left, right) if left_unit else (right, left)
        return equal(Node("deg", (degrees,)), radians)
    if gold.head == "base" or answer.head == "base":
        return _numerals(gold, answer)
    return False


def _numerals(gold: Node, answer: Node) -> bool:
    """A numeral without its base, where the gold has one: the same digits."""
    if gold.head != "base" or answer.head != "num" or answer.value is None:
        return False
    return gold.name.partition("_")[0] == str(answer.value)


def _split(node: Node) -> tuple[Node, words.Unit]:
    """A value and its unit."""
    node = _plain(node)
    if node.head == "*" and node.args[1].head == "/" and all(arg.head == "text" for arg in node.args[1].args):
        return node.args[0], words.unit(" / ".join(arg.name for arg in node.args[1].args))
    if node.head == "unit":
        value, inner = _split(node.args[0])
        return value, words.unit(node.name) | inner
    if node.head == "deg":
        return node.args[0], frozenset({("deg", 1)})
    if node.head == "percent":
        return node.args[0], frozenset({("percent", 1)})
    if node.head == "neg":
        value, unit = _split(node.args[0])
        return Node("neg", (value,)), unit
    if node.head == "/" and node.args[0].head == "unit" and node.name != "frac":
        value, unit = _split(node.args[0])
        return Node("/", (value, node.args[1])), unit
    return node, words.NO_UNIT


def _letter_unit(node: Node) -> tuple[Node, words.Unit] | None:
    """`5m` as 5 and metres, `9.8 m/s^2`, `12 L`: a monomial in letters that are units."""
    powers = _monomial(node)
    if not powers or node.head == "sym" or not set(powers) <= words.SINGLE_LETTER_UNITS:
        return None
    text = " ".join(f"{name} ^{power}" if power != 1 else name for name, power in powers.items())
    return _without_symbols(node), words.unit(text)


def _monomial(node: Node) -> dict[str, int] | None:
    """The powers of the letters in a product; None if there is a sum of them."""
    if not variables(node):
        return {}
    if node.head == "sym":
        return {node.name: 1}
    if node.head in ("*", "/"):
        parts = [_monomial(arg) for arg in node.args]
        total: dict[str, int] = {}
        for index, part in enumerate(parts):
            if part is None:
                return None
            for name, power in part.items():
                total[name] = total.get(name, 0) + (power if node.head == "*" or index == 0 else -power)
        return total
    if (
        node.head == "^"
        and node.args[0].head == "sym"
        and node.args[1].head == "num"
        and node.args[1].value is not None
    ):
        exponent = node.args[1].value
        return {node.args[0].name: int(exponent)} if exponent.denominator == 1 and abs(exponent) < 10 else None
    return None


def _without_symbols(node: Node) -> Node:
    if node.head == "sym":
        return num(1)
    return Node(node.head, tuple(_without_symbols(arg) for arg in node.args), node.name, node.value)
