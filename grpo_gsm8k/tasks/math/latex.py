r"""From what people write for mathematics (LaTeX, unicode, plain text) to tokens.

One spelling for each thing: `½` is `\frac{1}{2}`, `×` is `\times`, `\dfrac` is `\frac`, `\left(` is `(`, spaces and
sizes go. What is left is a list of tokens that `tree` parses. Linear in the text, which is bounded.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

MAX_TEXT = 4_000  # characters of an answer that are parsed
MAX_TOKENS = 1_500


class Unreadable(Exception):
    """The text is no answer that this grader can parse."""


class Unsupported(Unreadable):
    """The text is mathematics, of a kind that this grader does not know: an integral, a limit, cases."""


class Token(NamedTuple):
    """One token. `kind`: num, repeating, letter, word, text, cmd, or the character itself for an operator."""

    kind: str
    text: str
    spaced: bool = False  # white space stands before it


_SYMBOLS = {
    "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "∗": "*", "÷": r"\div ",
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "∕": "/", "⁄": "/", "∶": ":",
    "√": r"\sqrt ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ", "≦": r"\le ",
    "≥": r"\ge ", "⩾": r"\ge ", "≧": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≅": r"\approx ", "≃": r"\approx ",
    "≡": r"\equiv ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∖": r"\setminus ", "∅": r"\emptyset ",
    "⌀": r"\emptyset ", "°": r"\degree ", "º": r"\degree ", "˚": r"\degree ", "±": r"\pm ", "∓": r"\mp ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": r"\langle ", "⟩": r"\rangle ",
    "〈": r"\langle ", "〉": r"\rangle ", "∠": r"\angle ", "△": r"\triangle ", "∣": "|", "∧": r"\text{ and }",
    "∨": r"\text{ or }", "→": r"\to ", "⇒": r"\Rightarrow ", "′": "'", "’": "'", "″": "''", "…": r"\ldots ",
    "⋯": r"\ldots ", "€": r"\text{EUR}", "£": r"\text{GBP}", "￡": r"\text{GBP}", "¥": r"\text{JPY}",
    "₹": r"\text{INR}",
    "¢": r"\text{cents}", "％": r"\%", "‰": r"\permille ", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "",
    "\u2061": "", "\u2062": "", "\u2063": ",", "\ufeff": "", "、": ",", "。": ".", "ℓ": "l", "ⅈ": "i", "ⅇ": "e",
    "π": r"\pi ", "𝜋": r"\pi ", "ϕ": r"\phi ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ",
    "ε": r"\epsilon ", "ζ": r"\zeta ", "η": r"\eta ", "θ": r"\theta ", "κ": r"\kappa ", "λ": r"\lambda ",
    "μ": r"\mu ", "µ": r"\mu ", "ν": r"\nu ", "ξ": r"\xi ", "ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau ",
    "φ": r"\phi ", "χ": r"\chi ", "ψ": r"\psi ", "ω": r"\omega ", "Δ": r"\Delta ", "Σ": r"\Sigma ",
    "Ω": r"\Omega ", "Γ": r"\Gamma ", "Θ": r"\Theta ", "Λ": r"\Lambda ", "Φ": r"\Phi ", "Ψ": r"\Psi ",
}  # fmt: skip
_TABLE = str.maketrans(_SYMBOLS)
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ", "0123456789+-()nix", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₖₓ", "0123456789+-()nkx", strict=True))
_SUPER_RUN = re.compile(f"[{re.escape(''.join(_SUPERSCRIPTS))}]+")
_SUB_RUN = re.compile(f"[{re.escape(''.join(_SUBSCRIPTS))}]+")

_SPACES = re.compile(
    r"\\[,;:>]|\\ |~|\\(?:quad|qquad|thinspace|enspace|medspace|hfill|displaystyle|textstyle|scriptstyle|limits"
    r"|nolimits|mathstrut|strut|null|ldotp)(?![A-Za-z])"
    r"|\\(?:hspace|vspace|phantom|hphantom|vphantom|label|tag)\*?\{[^{}]{0,40}\}"
)
_ORDINAL = re.compile(
    r"(?<=\d)(?:\s?\^\s?\{?)?\s?(?:\\(?:text|mathrm|textrm)\s?\{\s?)?(?:st|nd|rd|th)(?![A-Za-z])\s?\}{0,2}"
)
_DECORATION = re.compile(
    r"\\(?:text)?color\s?\{[^{}]{0,40}\}|\\(?:blacksquare|square|Box|qed|checkmark)(?![A-Za-z])|[∎■□✓✅]"
    r"|\\(?:large|Large|LARGE|huge|Huge|small|normalsize|tiny)(?![A-Za-z])"
)
_SIZES = re.compile(
    r"\\(?:left|right|middle)\s?(?:\.|$)|\\(?:left|right|middle|[bB]ig[glr]?[lrm]?)(?=\s{0,2}[(\[|.)\]/\\{}<>])"
)
_SAME = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "sfrac": "frac", "nicefrac": "frac", "xfrac": "frac",
    "dbinom": "binom", "tbinom": "binom", "leq": "le", "leqslant": "le", "leqq": "le", "geq": "ge",
    "geqslant": "ge", "geqq": "ge", "neq": "ne", "lt": "<", "gt": ">", "times": "*", "cdot": "*", "ast": "*",
    "bullet": "*", "div": "/", "slash": "/", "infin": "infty", "varnothing": "emptyset", "lbrace": "{", "rbrace": "}",
    "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|",
    "lVert": "|", "rVert": "|", "Vert": "|", "|": "|", "bigcup": "cup", "bigcap": "cap", "varphi": "phi",
    "varepsilon": "epsilon", "vartheta": "theta", "dots": "ldots", "cdots": "ldots", "dotsc": "ldots",
    "dotsb": "ldots", "land": "and", "wedge": "and", "lor": "or", "vee": "or", "degree": "deg", "circ": "deg",
    "backslash": "setminus", "smallsetminus": "setminus", "colon": ":", "approxeq": "approx", "simeq": "approx",
    "cong": "approx", "measuredangle": "angle", "lg": "log", "operatorname*": "operatorname",
    "overrightarrow": "vec", "widehat": "hat", "widetilde": "tilde", "iff": "Rightarrow", "implies": "Rightarrow",
    "Longrightarrow": "Rightarrow", "textdegree": "deg", "asin": "arcsin", "acos": "arccos", "atan": "arctan",
    "plusmn": "pm", "sum ": "sum", "exists": "exists", "mod": "bmod", "lang": "langle", "rang": "rangle",
    "newline": "\\", "cr": "\\", "R": "reals", "euro": "EUR", "pounds": "GBP", "centerdot": "*", "prime": "'",
    "textdollar": "dollar", "mathdollar": "dollar",
}  # fmt: skip
_BOLD = {"mathbf", "boldsymbol", "bm", "mathit", "mathcal", "mathsf", "mathtt", "mathfrak", "mathnormal", "pmb",
         "mathop", "ensuremath", "mathord", "boxed", "fbox", "underline", "mathbin", "mathrel", "bf", "it", "cal",
         "rm", "bold"}  # fmt: skip
_TEXTS = {"text", "textbf", "textit", "textrm", "textsf", "texttt", "mbox", "hbox", "mathrm", "operatorname",
          "textnormal", "emph", "textup", "textsc", "unit"}  # fmt: skip
FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "arccot", "sinh", "cosh", "tanh",
             "log", "ln", "exp", "gcd", "lcm", "max", "min", "det", "sgn", "floor", "ceil", "abs", "sqrt", "cbrt",
             "binom", "factorial", "cis", "Re", "Im", "arg"}  # fmt: skip
_WORD_COMMANDS = {
    "pi": "pi", "Pi": "pi", "PI": "pi", "infinity": "infty", "inf": "infty", "infty": "infty", "oo": "infty",
    "Infinity": "infty", "theta": "theta", "alpha": "alpha", "beta": "beta", "lambda": "lambda", "phi": "phi",
    "or": "or", "and": "and", "union": "cup", "cup": "cup", "Or": "or", "And": "and", "OR": "or", "AND": "and",
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "ceiling": "ceil", "choose": "choose", "mod": "bmod",
    "degrees": "deg", "degree": "deg", "deg": "deg", "times": "*", "percent": "%", "omega": "omega", "intersect": "cap",
    "plus": "+", "minus": "-", "negative": "-", "pm": "pm", "emptyset": "emptyset", "frac": "frac",
    "implies": "Rightarrow",
}  # fmt: skip


def spell(text: str) -> str:
    """The text in one spelling: unicode signs as LaTeX, spacing and sizes removed, control characters gone."""
    text = _SUPER_RUN.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m[0]) + "}", text)
    text = _SUB_RUN.sub(lambda m: "_{" + "".join(_SUBSCRIPTS[c] for c in m[0]) + "}", text)
    text = "".join(_vulgar(c) if ord(c) > 127 and unicodedata.category(c) == "No" else c for c in text)
    text = unicodedata.normalize("NFKC", text.translate(_TABLE)).translate(_TABLE)
    # JSON and Python strings eat the backslashes of \frac, \times, \right, \beta and the like.
    text = text.replace("\x0crac", r"\frac").replace("\times", r"\times").replace("\text", r"\text")
    text = text.replace("\right", r"\right").replace("\x08ar", r"\bar").replace("\x08oxed", r"\boxed")
    text = "".join(" " if c in "\n\t\r" else c for c in text if c.isprintable() or c in "\n\t\r")
    text = re.sub(r"\\\\(?=(?:[dt]?frac|sqrt|text|pi|left|right|times|cdot|infty|cup|pm|boxed|le|ge|log|sin|cos)\b)",
                  r"\\", text)  # fmt: skip
    text = re.sub(r"\\\\(?:\[\d{1,3}(?:\.\d{1,3})?\s?[a-z]{2}\])?", r"\\newline ", text)
    text = _DECORATION.sub(" ", text)
    text = re.sub(r",\s{0,2}\\!\s{0,2}", ",", text.replace(r"\!\!", r"\!")).replace(r"\!", "")
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,)\s?(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=[.\d])\{(\\(?:overline|bar)\{\d{1,50}\})\}", r"\1", text)
    text = _ORDINAL.sub("", text)
    text = re.sub(r"\\\$|(?:\\text(?:rm)?|\\mathrm|\\mbox)\{\s?\\?\$\s?\}", r"\\dollar ", text)
    text = re.sub(r"(?<=\d)\s?[xX]\s?(?=10\s?\^)", r"\\times ", text)
    text = _BRACKETS.sub(_turned, text)
    text = re.sub(r"\$\$|\$|\\[()](?!\s?\\)|\\[()\[]|\\\](?!\w)", " ", text)
    text = re.sub(r"\^\s?\{?\s?\\(?:circ|degree|deg)(?![A-Za-z])\s?\}?", r"\\degree ", text)
    text = _SIZES.sub("", _SPACES.sub(" ", text))
    return re.sub(
        r"\*\*(?=[^*]{1,200}\*\*)|__|`", lambda m: "^" if m[0] == "**" and _is_power(text, m) else "", text
    ).strip()


_BRACKETS = re.compile(r"(?<!\\)([\[\]])([^\[\]()]{1,80}[,;][^\[\]()]{1,80})([\[\]])")


def _turned(match: re.Match[str]) -> str:
    """An interval with its brackets turned outward, `]0,1[`, as `(0,1)`."""
    opener, inside, closer = match.groups()
    return f"{'(' if opener == ']' else '['}{inside}{')' if closer == '[' else ']'}"


def _is_power(text: str, match: re.Match[str]) -> bool:
    """Whether `**` stands between two operands, as in Python, and does not set bold type."""
    return bool(re.search(r"[\w)]\s?$", text[: match.start()]) and re.match(r"\s?[\w(-]", text[match.end() :]))


def _vulgar(character: str) -> str:
    top, slash, bottom = unicodedata.normalize("NFKC", character).partition("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}" if slash and top and bottom else character


_REPEATING = re.compile(
    r"(?P<whole>\d{0,50})\.(?P<fixed>\d{0,50})(?:"
    r"\\(?:overline|bar|overbar)\s?(?:\{(?P<a>\d{1,50})\}|(?P<b>\d))|\((?P<c>\d{1,50})\)"
    r"|\\dot\s?\{?(?P<d>\d)\}?(?:(?P<e>\d{0,40})\\dot\s?\{?(?P<f>\d)\}?)?)(?:\s?\\ldots|\.\.\.)?"
)
_THREE_DOTS = re.compile(r"(?P<whole>\d{0,20})\.(?P<digits>\d{2,60})\s?(?:\\[lc]?dots[cb]?(?![A-Za-z])|\.\.\.)")
_NUMBER = re.compile(r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,6}(?![\dA-Za-z.]))?")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?")
_SPACED_GROUPS = re.compile(r"\d{1,3}(?: \d{3})+(?![\d/])(?:\.\d+)?")
_COMMAND = re.compile(r"\\(?:[A-Za-z]+\*?|.)", re.DOTALL)
_LETTERS = re.compile(r"[A-Za-z]+")
_TWO = {
    "<=": "le",
    ">=": "ge",
    "!=": "ne",
    "==": "=",
    "=>": "Rightarrow",
    "->": "to",
    "+-": "pm",
    "**": "^",
    "=<": "le",
}


def tokens(text: str, grouped: bool = True, unit_words: frozenset[str] = frozenset()) -> list[Token]:
    """The tokens of a text that `spell` went over. `grouped`: a comma before three digits groups thousands."""
    if len(text) > MAX_TEXT:
        raise Unreadable("too long")
    out: list[Token] = []
    position, spaced = 0, False
    while position < len(text):
        character = text[position]
        if character == " ":
            position, spaced = position + 1, True
            continue
        if len(out) > MAX_TOKENS:
            raise Unreadable("too many tokens")
        position = _next(text, position, spaced, grouped, unit_words, out)
        spaced = False
    return out


def _next(text: str, at: int, spaced: bool, grouped: bool, units: frozenset[str], out: list[Token]) -> int:
    character = text[at]
    if character.isdigit() or (character == "." and text[at + 1 : at + 2].isdigit()):
        return _digits(text, at, spaced, grouped, out)
    if character == "." and (match := _REPEATING.match(text, at)):
        out.append(Token("repeating", _repeating(match), spaced))
        return match.end()
    if character == "\\":
        return _command(text, at, spaced, out)
    if character.isalpha():
        match = _LETTERS.match(text, at)
        if not match:
            raise Unreadable(f"unknown letter {character!r}")
        _word(match[0], spaced, units, out)
        return match.end()
    if text[at : at + 3] == "...":
        out.append(Token("cmd", "ldots", spaced))
        return at + 3
    if (two := text[at : at + 2]) in _TWO:
        name = _TWO[two]
        out.append(Token(name if name in "=^" else "cmd", name, spaced))
        return at + 2
    out.append(Token(character, character, spaced))
    return at + 1


def _digits(text: str, at: int, spaced: bool, grouped: bool, out: list[Token]) -> int:
    if match := _REPEATING.match(text, at):
        out.append(Token("repeating", _repeating(match), spaced))
        return match.end()
    if (match := _THREE_DOTS.match(text, at)) and (period := _period(match["digits"])):
        out.append(Token("repeating", f"{match['whole'] or 0}||{period}", spaced))
        return match.end()
    match = (_GROUPED.match(text, at) if grouped else None) or _SPACED_GROUPS.match(text, at) or _NUMBER.match(text, at)
    if not match:  # a digit of another script
        raise Unreadable("no number")
    out.append(Token("num", match[0].replace(",", "").replace(" ", ""), spaced))
    return match.end()


def _period(digits: str) -> str | None:
    """The period of digits that show at least two periods and nothing else, as in 0.333... and 0.1818..."""
    for length in range(1, len(digits) // 2 + 1):
        period = digits[:length]
        shown = len(digits) / length
        if (period * (len(digits) // length + 1))[: len(digits)] == digits and shown >= (3 if length == 1 else 2):
            return period if period.strip("0") else None
    return None


def _repeating(match: re.Match[str]) -> str:
    if match["d"]:
        period = match["d"] + ((match["e"] or "") + match["f"] if match["f"] else "")
    else:
        period = match["a"] or match["b"] or match["c"]
    return f"{match['whole'] or 0}|{match['fixed']}|{period}"


def _command(text: str, at: int, spaced: bool, out: list[Token]) -> int:
    match = _COMMAND.match(text, at)
    if not match:
        raise Unreadable("a backslash at the end")
    name, end = match[0][1:], match.end()
    name = name if name == "*" else name.rstrip("*")
    if name in _TEXTS:
        group = re.compile(r"\s?\{").match(text, end)
        if not group:
            return end
        close = _close(text, group.end())
        _text(text[group.end() : close], name, spaced, out)
        return close + 1
    if name in _BOLD:
        return end
    name = _SAME.get(name, name)
    if len(name) == 1 and name in "*/<>|:'":
        out.append(Token(name, name, spaced))
    elif name in ("{", "}", "[", "]", "(", ")"):
        out.append(Token("cmd" if name in "{}" else name, name, spaced))
    elif name == "#" or name == "&" or name == "_":
        pass
    else:
        out.append(Token("cmd", name, spaced))
    return end


def _close(text: str, inside: int) -> int:
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, inside):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    raise Unreadable("an open brace")


def _text(content: str, name: str, spaced: bool, out: list[Token]) -> None:
    """Reads the inside of `\\text{…}`: a connective, mathematics set upright, or words."""
    bare = content.strip().strip(",;").strip()
    word = bare.lower()
    amount = re.fullmatch(r"(-?[\d.,/]+)\s*([A-Za-z][A-Za-z /.]*)", bare)
    if not bare:
        if content.strip():
            out.append(Token(",", ",", spaced))
        return
    if word in (
        "or",
        "and",
        "union",
        "infinity",
        "pi",
        "degrees",
        "degree",
        "percent",
        "mod",
        "negative",
        "minus",
        "plus",
    ):
        name = _WORD_COMMANDS[word]
        out.append(Token(name if len(name) == 1 else "cmd", name, spaced))
    elif word == "in" and content.startswith(" ") and content.endswith(" "):
        out.append(Token("cmd", "in", spaced))
    elif word == "to" and out and out[-1].kind == "num":
        out.append(Token(":", ":", spaced))
    elif re.fullmatch(r"\(?[A-J]\)?(?:\s*(?:,|and|or|&)\s*(?:and\s)?\(?[A-J]\)?)+", bare):
        letters = re.findall(r"[A-J]", bare)
        for index, letter in enumerate(letters):
            out += [Token(",", ",")] * (index > 0) + [Token("letter", letter)]
    elif name in ("mathrm", "operatorname", "mathop") and bare in FUNCTIONS | {"lcm", "Arg"}:
        out.append(Token("cmd", bare, spaced))
    elif re.fullmatch(r"[\d\s.,+\-*/^=<>()%]+", bare) and not re.fullmatch(r"[,;.]", bare):
        for token in tokens(bare):
            out.append(token)
    elif amount or "\\" in bare:
        out += tokens(amount[1]) if amount else tokens(bare)
        if amount:
            out.append(Token("text", amount[2], True))
    elif re.match(r"(?:or|and|not|but)\s", word):
        raise Unreadable("a clause")
    elif name == "mathrm" and bare in ("e", "i", "d", "T", "R", "P", "E"):
        out.append(Token("letter", bare, spaced))
    else:
        out.append(Token("text", content.strip(), spaced))


def _word(word: str, spaced: bool, units: frozenset[str], out: list[Token]) -> None:
    """A run of letters: a name we know, a word, or a product of letters."""
    before = out[-1] if out else None
    if word == "to" and before and before.kind == "num":
        out.append(Token(":", ":", spaced))
    elif word in ("in", "In") and spaced and before and before.kind == "letter":
        out.append(Token("cmd", "in", spaced))
    elif word in _WORD_COMMANDS and not (word == "min" and before and before.kind == "num"):
        name = _WORD_COMMANDS[word]
        out.append(Token(name if len(name) == 1 else "cmd", name, spaced))
    elif word == "min" and before and before.kind == "num":
        out.append(Token("word", word, spaced))
    elif word in FUNCTIONS or word.lower() in FUNCTIONS - {"Re", "Im", "arg", "abs", "det"}:
        out.append(Token("cmd", word if word in FUNCTIONS else word.lower(), spaced))
    elif word in ("U", "u") and spaced and before and before.kind in (")", "]"):
        out.append(Token("cmd", "cup", spaced))
    elif len(word) == 1:
        out.append(Token("letter", word, spaced))
    elif {word, word.lower()} & (units | _SHORT_WORDS) or len(word) > (6 if word.isupper() else 3):
        out.append(Token("word", word, spaced))
    elif word.startswith("pi") and len(word) == 3:
        out += [Token("cmd", "pi", spaced), Token("letter", word[2])]
    else:
        out += [Token("letter", letter, spaced and index == 0) for index, letter in enumerate(word)]


_SHORT_WORDS = {"the", "is", "are", "no", "yes", "all", "if", "of", "to", "for", "so", "not", "any", "one", "two",
                "six", "ten", "day", "may", "pm", "am", "dne", "odd", "red", "has", "per", "each", "both", "true",
                "can", "its", "there", "but", "only", "else", "when", "where", "none", "was", "way", "mod"}  # fmt: skip
