"""Words in answers: units, currencies, and answers that are texts (names, days, "no solution", choices)."""

from __future__ import annotations

import re
import unicodedata

# name: (canonical unit, power). Prefix and plural forms are listed where people write them.
_UNITS: dict[str, tuple[str, int]] = {}


def _add(canonical: str, names: str, power: int = 1) -> None:
    for name in names.split():
        _UNITS[name] = (canonical, power)


_add("cm", "cm cms centimeter centimetre centimeters centimetres")
_add("mm", "mm millimeter millimetre millimeters millimetres")
_add("m", "meter metre meters metres mtr")
_add("km", "km kms kilometer kilometre kilometers kilometres")
_add("in", "in inch inches")
_add("ft", "ft foot feet")
_add("yd", "yd yds yard yards")
_add("mi", "mi mile miles")
_add("unit", "unit units")
_add("s", "sec secs second seconds")
_add("min", "min mins minute minutes")
_add("h", "hr hrs hour hours")
_add("day", "day days")
_add("week", "week weeks wk wks")
_add("month", "month months")
_add("year", "year years yr yrs")
_add("g", "gram grams gm")
_add("kg", "kg kgs kilogram kilograms kilo kilos")
_add("mg", "mg milligram milligrams")
_add("lb", "lb lbs pound pounds")
_add("oz", "oz ounce ounces")
_add("ton", "ton tons tonne tonnes")
_add("l", "liter litre liters litres")
_add("ml", "ml mL milliliter milliliters millilitre millilitres cc")
_add("gal", "gal gallon gallons")
_add("qt", "qt quart quarts")
_add("pt", "pint pints")
_add("cup", "cup cups")
_add("usd", "dollar dollars usd USD bucks dollars_")
_add("cent", "cent cents penny pennies")
_add("eur", "EUR eur euro euros")
_add("gbp", "GBP gbp")
_add("jpy", "JPY yen")
_add("inr", "INR rupee rupees Rs")
_add("deg", "degree degrees deg")
_add("rad", "radian radians rad rads")
_add("N", "newton newtons")
_add("J", "joule joules kJ")
_add("W", "watt watts")
_add("Hz", "hertz Hz")
_add("V", "volt volts")
_add("C", "Celsius celsius centigrade")
_add("F", "Fahrenheit fahrenheit")
_add("K", "Kelvin kelvin kelvins")
_add("percent", "percent percentage pct")
_add("point", "pt. points point")
UNIT_WORDS = frozenset(_UNITS) | {"mph", "kph", "mps", "kmh", "sq", "rpm", "dozen"}
_LENGTHS = {"cm", "mm", "m", "km", "in", "ft", "yd", "mi"}
_SHORT = {"m": "m", "s": "s", "h": "h", "g": "g", "l": "l", "L": "l", "in": "in", "C": "C", "F": "F", "N": "N",
          "J": "J", "W": "W", "V": "V", "A": "A", "K": "K", "t": "ton", "d": "day", "R": "rad"}  # fmt: skip
SINGLE_LETTER_UNITS = frozenset("mshgLlNJWVAKC")
_FILLERS = {"of", "the", "a", "an", "in", "total", "altogether", "exactly", "each", "long", "wide", "tall", "high",
            "all", "is", "are", "old", "about", "approximately", "only", "more", "less", "away", "different",
            "possible", "distinct", "such", "there", "apart", "to", "for", "and", "around"}  # fmt: skip

Unit = frozenset[tuple[str, int]]
NO_UNIT: Unit = frozenset()


def unit(text: str) -> Unit:
    r"""The unit that a text names, as base names with powers: `square centimeters`, `\text{cm}^2`, `cm squared`."""
    text = re.sub(r"(?<!\^)(?<!\^\{)-", " ", text.replace("·", " "))
    parts = re.findall(r"[A-Za-z]+|\^\{?\s?-?\d\s?\}?|/", text)
    powers: dict[str, int] = {}
    sign, pending, last = 1, 1, ""
    for part in parts:
        low = part.lower()
        if part == "/" or low in ("per", "every"):
            sign = -1
        elif part.startswith("^"):
            value = int(re.sub(r"[^\d-]", "", part))
            if last:
                powers[last] += (value - 1) * (1 if powers[last] > 0 else -1)
        elif low in ("square", "sq", "squared", "cubic", "cu", "cubed"):
            power = 2 if low.startswith("s") else 3
            if low.endswith("ed") and last:
                powers[last] *= power
            else:
                pending = power
        elif low in ("mph", "kph", "kmh", "mps", "rpm"):
            first, second = {"mph": ("mi", "h"), "mps": ("m", "s"), "rpm": ("rotation", "min")}.get(low, ("km", "h"))
            powers[first], powers[second], last = 1, -1, ""
        elif low not in _FILLERS or part == "A" or (low == "in" and part is parts[0]):
            last = _unit_name(part)
            powers[last] = powers.get(last, 0) + sign * pending
            pending = 1
    return frozenset(powers.items())


def _unit_name(word: str) -> str:
    known = _UNITS.get(word) or _UNITS.get(word.lower())
    if known:
        return known[0]
    if word in _SHORT:
        return _SHORT[word]
    low = word.lower()
    return re.sub(r"(?<=[a-z]{2})(?:ies|y)$", "i", re.sub(r"(?<=[a-z]{3})s$", "", low)) if len(low) > 3 else low


def units_agree(gold: Unit, other: Unit) -> bool:
    """Whether two units do not contradict each other. A missing one never does, nor `units` for a length."""
    if not gold or not other or gold == other:
        return True
    generic = [
        {("u" if name in _LENGTHS or name == "unit" else name, power) for name, power in u} for u in (gold, other)
    ]
    if any(name == "unit" for name, _ in gold | other) and generic[0] == generic[1]:
        return True
    degrees = {"deg", "C", "F"}
    if all(name in degrees for name, _ in gold | other):
        return not {("C", 1), ("F", 1)} <= gold | other
    known = {canonical for canonical, _ in _UNITS.values()} | set(_SHORT.values())
    free = [{name for name, _ in u} for u in (gold, other)]
    nouns = not any(names & known for names in free)
    return nouns and bool(free[0] <= free[1] or free[1] <= free[0])


# ---------------------------------------------------------------------------------------------------------
# Texts

_ALIKE = (
    "no solution|no solutions|none|no real solution|no real solutions|there is no solution|there are no solutions|"
    "no such solution|no solution exists|no solutions exist|empty set|the empty set|empty|null set|∅|no roots|"
    "no real roots|no values|no value|nothing|inconsistent|no such number exists|no such numbers|no such number",
    "does not exist|dne|doesnt exist|limit does not exist|the limit does not exist|not exist|doesn t exist",
    "infinitely many|infinite|infinitely many solutions|infinite solutions|an infinite number|infinite number|"
    "infinite number of solutions|there are infinitely many solutions|infinitely many solution",
    "true|t|correct",
    "false|f|incorrect",
    "yes|y",
    "no|n",
    "undefined|not defined|is undefined|it is undefined",
    "all real numbers|all reals|the set of all real numbers|any real number|every real number|real numbers|"
    "all real values|set of real numbers|all of the real numbers|x is any real number|the real numbers",
    "not possible|impossible|cannot be determined|cannot determine|can t be determined|not enough information|"
    "insufficient information|it cannot be determined|not determinable",
)
_GROUPS = {phrase: number for number, group in enumerate(_ALIKE) for phrase in group.split("|")}
_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ]
    )
}
_TENS = {"thirty": "30", "forty": "40", "fifty": "50", "sixty": "60", "seventy": "70", "eighty": "80", "ninety": "90"}


def number_word(text: str) -> str | None:
    """`seven` as "7", `twenty-five` as "25"; None if the text is no such word."""
    words = re.findall(r"[a-z]+", text.lower())
    values = {**_NUMBER_WORDS, **_TENS}
    if len(words) == 1 and words[0] in values:
        return values[words[0]]
    if len(words) == 2 and (words[0] in _TENS or words[0] == "twenty") and words[1] in list(_NUMBER_WORDS)[1:10]:
        return str(int(values[words[0]]) + int(_NUMBER_WORDS[words[1]]))
    return None


def meaning(words: str) -> int | None:
    """The number of the group of phrases that mean the same as this one."""
    return _GROUPS.get(words)


def phrase(text: str) -> str:
    """A text as its bare words: no markup, case, punctuation or articles."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|emph|textrm|operatorname)\s?(?=\{)", " ", text[:4_000])
    text = re.sub(r"\\[,;:! ]|\\quad|\\left|\\right|~", " ", text)
    text = re.sub(
        r"\b(?:[Tt]he|[Aa]n|a(?=\s+[A-Za-z]{2}))\b|^\W*A(?=\s+[a-z]{3})", " ", unicodedata.normalize("NFKC", text)
    )
    text = text.lower().replace("\\emptyset", " ∅ ").replace("\\varnothing", " ∅ ")
    text = re.sub(r"(?<=\w)['’](?=s\b|t\b)", " ", text)
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text)
    text = re.sub(r"\b([ap])\.?\s?m\.?(?![a-z])", r"\1m", text)
    text = re.sub(r"(?<=\d)(?=[ap]m\b)", " ", text)
    # Signs that carry meaning stay, the rest is punctuation.
    text = re.sub(r"[^\w\s\\+\-*/^=<>∅%:]|_", " ", text)
    return re.sub(r"(?<=[a-z])-(?=[a-z])", " ", " ".join(text.split())).strip(" -:=")


_ASSERTION = re.compile(r"^(?:.{0,80}\b(?:is|are|was|on|be|in|by|must be|called|answer|to)|[\w ]{1,30}[:=])\s")
_NEGATION = re.compile(r"\b(?:not|never|neither|nor|no|isn t|aren t)\b")
_GENERIC_NOUNS = {"function", "number", "numbers", "shape", "curve", "graph", "triangle", "it", "he", "she", "month",
                  "person", "this", "solution", "solutions", "one", "option", "case", "quadrant"}  # fmt: skip
_MONTHS = {name[:3]: name for name in ("january", "february", "march", "april", "may", "june", "july", "august",
                                       "september", "october", "november", "december")}  # fmt: skip
_DAYS = {name[:3]: name for name in ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")}


def texts_agree(gold: str, other: str) -> bool:
    """Whether two answers in words say the same: the same words, or a phrase that means the same."""
    left, right = phrase(gold), phrase(other)
    if not left or not right:
        return False
    if left == right or left.replace(" ", "") == right.replace(" ", ""):
        return True
    if left in _GROUPS or right in _GROUPS:
        group = _GROUPS.get(left)
        if group is not None and group == _GROUPS.get(right):
            return True
    left_words, right_words = _dates(left).split(), _dates(right).split()
    if sorted(left_words) == sorted(right_words) and any(word in _MONTHS.values() for word in left_words):
        return True
    if left_words == right_words:
        return True
    reasoned = left in ("yes", "no", "true", "false") and rf"\W*(?:\\text\W*)?{left}\s*[,.;:]"
    if reasoned and re.match(reasoned, other, re.IGNORECASE):
        return True
    if not re.fullmatch(r"[a-z∅ ]+", left) or len(left) < 2:
        return False
    # The other says it in a sentence: "f is odd", or adds a noun: "an odd function".
    assertion = _ASSERTION.match(right)
    if assertion:
        rest = right[assertion.end() :]
        negated = _NEGATION.search(right[: assertion.end()])
        if not negated and (rest == left or (rest in _GROUPS and _GROUPS[rest] == _GROUPS.get(left))):
            return True
    shared = [word for word in right_words if word not in _GENERIC_NOUNS]
    return shared == [word for word in left_words if word not in _GENERIC_NOUNS] != []


def _dates(text: str) -> str:
    words = ["september" if word == "sept" else _MONTHS.get(word, word) for word in text.split()]
    return " ".join(_DAYS.get(word, word) for word in words if word != "of" or len(words) > 3)


_CHOICE = re.compile(
    r"\s*(?:(?:option|choice|answer)s?\s*:?\s*)?[(\[]?\s*((?-i:[A-Ja-dfgh]))\s*(?:[)\].:]\s*(?P<rest>.*)|(?P<rest2>))",
    re.DOTALL | re.I,
)


def choice(text: str) -> tuple[str, str] | None:
    """The letter of a multiple choice and what follows it: `(A)`, `\\text{(A) } 5`, `Option A`, `A.`; else None."""
    text = re.sub(
        r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|textrm|bf|rm|quad|qquad)(?![a-z])|\\[ ,;:!~]|[{}$*~]",
        " ",
        text[:400],
    )
    text = text.replace("\\left", "").replace("\\right", "")
    match = _CHOICE.fullmatch(text.strip().rstrip("."))
    if not match:
        return None
    rest = (match["rest"] or "").strip()
    return None if rest[:1] in set("^+-*/=_!<>") else (match[1].upper(), rest)
