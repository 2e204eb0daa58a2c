r"""From tokens to an expression tree: numbers, formulas, tuples, intervals, sets, matrices, relations, lists.

A recursive descent of bounded depth. What it cannot parse raises `Unreadable`; nothing is evaluated here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from .latex import FUNCTIONS, Token, Unreadable, Unsupported, spell, tokens
from .words import UNIT_WORDS, number_word

MAX_DEPTH = 40
MAX_DIGITS = 4_000


@dataclass(frozen=True, slots=True)
class Node:
    """One node. `head` says what it is; `name` its name, brackets or operators; `value` its number."""

    head: str
    args: tuple[Node, ...] = ()
    name: str = ""
    value: Fraction | None = None


def num(value: int | Fraction) -> Node:
    return Node("num", value=Fraction(value))


INFINITY = Node("inf")
REALS = Node("reals")
_RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "in": "in", "approx": "~", "equiv": "=",
              "sim": "~", "to": "to", "Rightarrow": "=>"}  # fmt: skip
_WORD_RELATIONS = {"is": "=", "are": "=", "equals": "=", "equal": "="}
_GREEK_OR_NAME = {"alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "kappa", "lambda", "mu", "nu",
                  "xi", "rho", "sigma", "tau", "phi", "chi", "psi", "omega", "Delta", "Sigma", "Omega", "Gamma",
                  "Theta", "Lambda", "Phi", "Psi", "ell", "Pi"}  # fmt: skip
_CURRENCIES = {"dollar": "usd", "EUR": "eur", "GBP": "gbp"}
_OPEN_MATRIX = {"pmatrix", "bmatrix", "vmatrix", "matrix", "Bmatrix", "Vmatrix", "smallmatrix", "array"}
_NUMERALS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
             "twelve": 12, "sixteen": 16, "eleven": 11}  # fmt: skip


def parse(text: str, grouped: bool = True) -> Node:
    """The tree of an answer. `grouped`: a comma before three digits groups thousands.

    Raises:
        Unreadable: if the text is no mathematics of the supported kind, or too large.
    """
    found = tokens(spell(text), grouped, UNIT_WORDS)
    if not found:
        raise Unreadable("empty")
    parser = _Parser(found)
    node = parser.items(())
    if parser.at < len(found):
        raise Unreadable(f"unexpected {found[parser.at].text!r}")
    return node


class _Parser:
    def __init__(self, found: list[Token]) -> None:
        self.tokens = found
        self.at = 0
        self.depth = 0
        self.bars = 0  # absolute values that are open

    # -- reading tokens

    def peek(self, ahead: int = 0) -> Token:
        at = self.at + ahead
        return self.tokens[at] if at < len(self.tokens) else Token("end", "")

    def next(self) -> Token:
        token = self.peek()
        self.at += 1
        return token

    def is_cmd(self, *names: str, ahead: int = 0) -> bool:
        token = self.peek(ahead)
        return token.kind == "cmd" and token.text in names

    def take(self, kind: str) -> bool:
        if self.peek().kind == kind:
            self.at += 1
            return True
        return False

    def take_cmd(self, *names: str) -> bool:
        if self.is_cmd(*names):
            self.at += 1
            return True
        return False

    def expect(self, kind: str) -> None:
        if not self.take(kind):
            raise Unreadable(f"expected {kind!r}, not {self.peek().text!r}")

    def deeper(self, rule: Callable[[], Node]) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        node = rule()
        self.depth -= 1
        return node

    # -- lists and relations

    def at_end(self, closers: tuple[str, ...]) -> bool:
        token = self.peek()
        return token.kind == "end" or token.kind in closers or (token.kind == "cmd" and "\\" + token.text in closers)

    def items(self, closers: tuple[str, ...]) -> Node:
        """Items separated by commas, semicolons, `or`, `and`: a single node, or a list of them."""
        found: list[Node] = []
        separators: list[str] = []
        while True:
            if self.at_end(closers):
                break
            found.append(self.item(closers))
            separator = self.separator()
            if separator is None:
                break
            separators.append(separator)
        if not found:
            return Node("list")
        if len(found) == 1:
            return found[0]
        return Node("list", tuple(found), name="|".join(separators[: len(found) - 1]))

    def separator(self) -> str | None:
        word: str | None = None
        while True:
            if self.peek().kind in (",", ";"):
                word = word or self.peek().kind
            elif self.is_cmd("or", "and"):
                word = self.peek().text
            elif self.peek().kind == "." and self.peek(1).kind == "end":
                pass
            elif self.is_cmd("\\"):  # a line break between items
                word = word or ","
            else:
                return word
            self.at += 1

    def item(self, closers: tuple[str, ...]) -> Node:
        label = self.words()
        if label and (self.at_end(closers) or self.peek().kind in (",", ";") or self.is_cmd("or", "and")):
            value = number_word(label)
            return num(int(value)) if value else Node("text", name=label)
        relation = self.relation_sign()
        if (
            label
            and relation is None
            and label.lower() not in _LEADING
            and not label.rstrip().endswith((":", " is", " are", "=", " equals"))
        ):
            raise Unreadable(f"words before mathematics: {label[:40]!r}")
        sides: list[Node] = []
        signs: list[str] = []
        while True:
            sides.append(self.side(closers))
            sign = self.relation_sign()
            if sign is None:
                break
            signs.append(sign)
            if self.at_end(closers):
                raise Unreadable("a relation without a right side")
        if len(sides) == 1:
            return Node("approx", (sides[0],)) if relation == "~" else sides[0]
        return Node("rel", tuple(sides), name="|".join(signs))

    def words(self) -> str:
        start = self.at
        while self.peek().kind in ("text", "word"):
            self.at += 1
        return " ".join(token.text for token in self.tokens[start : self.at])

    def relation_sign(self) -> str | None:
        token = self.peek()
        if token.kind in "=<>" and token.kind:
            self.at += 1
            return _RELATIONS[token.kind]
        if token.kind == "cmd" and token.text in _RELATIONS:
            self.at += 1
            return _RELATIONS[token.text]
        if token.kind == "cmd" and token.text == "not" and (self.is_cmd("in", ahead=1) or self.peek(1).kind == "="):
            self.at += 2
            return "!=" if self.tokens[self.at - 1].kind == "=" else "notin"
        if token.kind == "word" and token.text.lower() in _WORD_RELATIONS and self.at:
            self.at += 1
            return "="
        return None

    def side(self, closers: tuple[str, ...]) -> Node:
        """One side of a relation: sets or an expression, a ratio, a residue, and the unit after it."""
        node = self.unions()
        if self.take_cmd("over"):
            node = Node("/", (node, self.unions()), name="frac")
        if self.peek().kind == ":" and ":" not in closers:
            parts = [node]
            while self.take(":"):
                parts.append(self.sum())
            node = Node("ratio", tuple(parts))
        if self.is_cmd("pmod", "bmod") or (self.peek().kind == "(" and self.is_cmd("bmod", ahead=1)):
            bracket = self.take("(")
            self.at += 1
            modulus = self.argument() if not bracket else self.sum()
            if bracket:
                self.expect(")")
            node = Node("mod", (node, modulus))
        return self.unit(node)

    def unit(self, node: Node) -> Node:
        while self.peek().kind in ("word", "text") and self.peek().text.lower() in _MULTIPLES:
            node = Node("*", (node, num(_MULTIPLES[self.next().text.lower()])))
        if self.is_cmd(*_CURRENCIES):
            return Node("unit", (node,), name=_CURRENCIES[self.next().text])
        if self.peek().kind not in ("text", "word"):
            return node
        if self.peek().kind == "word" and self.peek().text.lower() in _WORD_RELATIONS:
            return node
        parts: list[str] = []
        while True:
            token = self.peek()
            if token.kind in ("text", "word") or (parts and token.kind == "letter"):
                parts.append(token.text)
            elif parts and token.kind == "^":
                parts.append("^")
            elif parts and token.kind == "-" and parts[-1] == "^":
                parts[-1] = "^-"
            elif parts and token.kind in ("{", "}") and any(part.startswith("^") for part in parts[-1:]):
                pass
            elif parts and token.kind == "num" and parts[-1] in ("^", "^-"):
                parts[-1] += token.text
            elif parts and token.kind in "/*" and token.kind and self.peek(1).kind in ("text", "word", "letter"):
                parts.append(token.kind)
            elif parts and token.kind in "()." and token.kind and parts[0]:
                pass
            else:
                break
            self.at += 1
        return Node("unit", (node,), name=" ".join(parts))

    # -- expressions

    def unions(self) -> Node:
        node = self.sum()
        while self.is_cmd("cup", "cap", "setminus"):
            operator = self.next().text
            node = Node(operator, (node, self.sum()))
        return node

    def sum(self) -> Node:
        return self.deeper(self._sum)

    def _sum(self) -> Node:
        terms: list[Node] = []
        sign = self.sign()
        first = self.product()
        node = _signed(sign, first)
        while True:
            if self.peek().kind in "+-" and self.peek().kind:
                sign = self.next().kind
                extra = self.sign()
                term = self.product()
                if sign == "-" and term.head == "set" and not terms:
                    node = Node("setminus", (node, term))
                    continue
                terms.append(_signed(sign, _signed(extra, term)))
            elif self.is_cmd("pm", "mp"):
                operator = self.next().text
                left = Node("+", (node, *terms)) if terms else node
                node, terms = Node(operator, (left, self.product())), []
            else:
                break
        return Node("+", (node, *terms)) if terms else node

    def sign(self) -> str:
        sign = "+"
        while True:
            if self.peek().kind == "-":
                sign = "-" if sign == "+" else "+"
            elif self.is_cmd("pm", "mp") and sign == "+":
                self.at += 1
                return self.tokens[self.at - 1].text
            elif self.peek().kind != "+":
                return sign
            self.at += 1

    def product(self) -> Node:
        node = self.power()
        while True:
            kind = self.peek().kind
            if kind == "*":
                self.at += 1
                node = Node("*", (node, self.signed_power()))
            elif kind == "/":
                self.at += 1
                node = Node("/", (node, self.signed_power()))
            elif kind == "{" and self.peek(1).kind == "}":  # an empty group
                self.at += 2
            elif self.starts_operand():
                if kind in ("num", "repeating") and node.head in ("num", "base"):
                    raise Unreadable("two numbers side by side")
                node = Node("*", (node, self.power()), name="juxtaposed")
            else:
                return node

    def signed_power(self) -> Node:
        return _signed(self.sign(), self.power())

    def starts_operand(self) -> bool:
        token = self.peek()
        if token.kind in ("num", "letter", "(", "{", "repeating"):
            return not (token.kind == "(" and self.is_cmd("bmod", ahead=1))
        if token.kind == "[":
            return True
        if token.kind == "|":
            return self.bars == 0
        return token.kind == "cmd" and (token.text in _OPERAND_COMMANDS or token.text in FUNCTIONS)

    def power(self) -> Node:
        return self.deeper(self._power)

    def _power(self) -> Node:
        node = self.postfix(self.primary())
        while self.peek().kind == "^":
            self.at += 1
            if self.peek().kind == "cmd" and self.peek().text == "deg":
                self.at += 1
                node = Node("deg", (node,))
                continue
            node = Node("^", (node, self.exponent()))
            node = self.postfix(node)
        return node

    def exponent(self) -> Node:
        if self.peek().kind == "{":
            return self.argument()
        sign = self.sign()
        if self.peek().kind == "num" and self.is_cmd("frac", ahead=1):  # x^2 \frac12 has no mixed number
            return _signed(sign, num(_decimal(self.next().text)))
        return _signed(sign, self.power())

    def postfix(self, node: Node) -> Node:
        while True:
            if self.take("!"):
                node = Node("fn", (node,), name="factorial")
            elif self.take("%") or self.take_cmd("%"):
                node = Node("percent", (node,))
            elif self.take_cmd("deg"):
                if self.peek().kind == "letter" and self.peek().text in ("C", "F"):
                    node = Node("unit", (node,), name="degrees " + self.next().text)
                else:
                    node = Node("deg", (node,))
            else:
                return node

    def primary(self) -> Node:
        token = self.next()
        if token.kind == "num":
            return self.number(token)
        if token.kind == "repeating":
            return num(_repeating(token.text))
        if token.kind == "letter":
            if token.text == "m" and self.is_cmd("angle"):  # the measure of an angle
                return self.primary()
            return self.symbol(token.text)
        if token.kind in ("(", "["):
            return self.bracketed(token.kind)
        if token.kind == "{":
            return self.braced()
        if token.kind == "|":
            return self.absolute()
        if token.kind == "cmd":
            return self.command(token.text)
        raise Unreadable(f"unexpected {token.text or 'end'!r}")

    def number(self, token: Token) -> Node:
        value = _decimal(token.text)
        if self.peek().kind == "_":
            base = self.base()
            if base:
                return Node("base", name=f"{token.text}_{base}")
        # A mixed number: 1\frac{2}{3}, or "1 2/3".
        if "." not in token.text and self.is_cmd("frac"):
            start = self.at
            self.at += 1
            top, bottom = self.argument(short=True), self.argument(short=True)
            if _is_natural(top) and _is_natural(bottom) and bottom.value:
                assert top.value is not None
                return Node("num", value=value + top.value / bottom.value)
            self.at = start
        if "." not in token.text and self.peek().kind == "num" and self.peek(1).kind == "/":
            top_token, bottom_token = self.peek(), self.peek(2)
            if bottom_token.kind == "num" and "." not in top_token.text + bottom_token.text:
                top_value, bottom_value = _decimal(top_token.text), _decimal(bottom_token.text)
                if bottom_value and self.peek().spaced:
                    self.at += 3
                    return num(value + top_value / bottom_value)
        return num(value)

    def base(self) -> int | None:
        """The base after a numeral: `_5`, `_{10}`, `_{\\text{five}}`, `_\\text{two}`."""
        start = self.at
        self.at += 1
        brace = self.take("{")
        token = self.next()
        base = None
        if token.kind == "num" and token.text.isdigit() and len(token.text) < 3:
            base = int(token.text)
        elif token.kind in ("text", "word") and token.text.lower().split()[-1] in _NUMERALS:
            base = _NUMERALS[token.text.lower().split()[-1]]
        if brace and not self.take("}"):
            base = None
        if base is None or not 2 <= base <= 36:
            self.at = start
            return None
        return base

    def symbol(self, letter: str) -> Node:
        name = letter
        while True:
            if self.peek().kind == "_":
                self.at += 1
                name += "_" + self.subscript()
            elif self.take("'"):
                name += "'"
            else:
                break
        if name == "e":
            return Node("const", name="e")
        if name == "i":
            return Node("const", name="i")
        return Node("sym", name=name)

    def subscript(self) -> str:
        if not self.take("{"):
            return self.next().text
        parts: list[str] = []
        depth = 1
        while depth and self.peek().kind != "end":
            token = self.next()
            depth += {"{": 1, "}": -1}.get(token.kind, 0)
            if depth:
                parts.append(token.text)
        return "".join(parts).replace(" ", "")

    def argument(self, short: bool = False) -> Node:
        """What a command applies to: a group in braces, or a single token. `short`: one digit only, as TeX reads it."""
        if self.take("{"):
            node = self.items(("}",))
            self.expect("}")
            return node
        token = self.peek()
        if token.kind == "num" and short and token.text.isdigit():
            if len(token.text) > 1:
                self.tokens[self.at] = Token("num", token.text[1:])
            else:
                self.at += 1
            return num(int(token.text[0]))
        return self.deeper(self.primary)

    def bracketed(self, opener: str) -> Node:
        bars, self.bars = self.bars, 0
        node = self.items((")", "]"))
        self.bars = bars
        closer = self.next().kind
        if closer not in (")", "]"):
            raise Unreadable("an open bracket")
        if node.head == "list" and len(node.args) > 1 and set(node.name.split("|")) <= {",", ";"}:
            if opener == "[" and all(arg.head == "tuple" and arg.name == "[]" for arg in node.args):
                widths = {len(arg.args) for arg in node.args}
                if len(widths) == 1:
                    return Node("matrix", tuple(Node("row", arg.args) for arg in node.args))
            return Node("tuple", node.args, name=opener + closer)
        if node.head == "list" and not node.args:
            raise Unreadable("empty brackets")
        if opener == "(" and self.is_base_subscript() and node.head == "num" and node.value is not None:
            base = self.base()
            return Node("base", name=f"{node.value}_{base}") if base else node
        return node

    def is_base_subscript(self) -> bool:
        return self.peek().kind == "_"

    def braced(self) -> Node:
        node = self.items(("}",))
        if self.take_cmd("choose"):
            node = Node("fn", (node, self.items(("}",))), name="binom")
        self.expect("}")
        if node.head == "list" and node.args:
            return Node("set", node.args)
        if node.head == "list":
            # `{}_5C_2` begins so; an empty group says nothing.
            return self.postfix(self.primary())
        return node

    def absolute(self) -> Node:
        self.bars += 1
        node = self.sum()
        self.bars -= 1
        self.expect("|")
        return Node("fn", (node,), name="abs")

    def command(self, name: str) -> Node:
        if name in ("frac", "binom"):
            top = self.argument(short=True)
            bottom = self.argument(short=True)
            return Node("/", (top, bottom), name="frac") if name == "frac" else Node("fn", (top, bottom), name="binom")
        if name == "sqrt":
            return self.root()
        if name == "cbrt":
            return Node("fn", (self.argument(), num(3)), name="root")
        if name in ("pi", "infty", "emptyset", "reals"):
            return {"pi": Node("const", name="pi"), "infty": INFINITY, "emptyset": Node("set")}.get(name, REALS)
        if name == "{":
            return self.set()
        if name == "langle":
            node = self.items(("\\rangle",))
            if not self.take_cmd("rangle"):
                raise Unreadable("an open bracket")
            return Node("tuple", node.args if node.head == "list" else (node,), name="<>")
        if name in ("lfloor", "lceil"):
            node = self.sum()
            if not self.take_cmd("rfloor", "rceil"):
                raise Unreadable("an open floor")
            return Node("fn", (node,), name="floor" if name == "lfloor" else "ceil")
        if name == "mathbb":
            node = self.argument()
            return (
                REALS
                if node.name == "R"
                else Node("sym", name="ℤℕℚℂ"["ZNQC".find(node.name)] if node.name in "ZNQC" else node.name)
            )
        if name == "begin":
            return self.matrix()
        if name in FUNCTIONS:
            return self.function(name)
        if name in ("angle", "triangle"):
            return self.figure(name)
        if name in ("overline", "bar", "vec", "hat", "tilde", "widehat"):
            node = self.argument()
            return Node("sym", name=f"{'' if name == 'hat' else name} {_names(node)}")
        if name in _GREEK_OR_NAME:
            return self.symbol(name)
        if name in _CURRENCIES:
            self.take("{")  # `\${5}`
            amount = self.power()
            self.take("}")
            return Node("unit", (amount,), name=_CURRENCIES[name])
        raise Unsupported(f"unknown command \\{name}")

    def root(self) -> Node:
        index: Node | None = None
        if self.peek().kind == "[":
            self.at += 1
            index = self.sum()
            self.expect("]")
        radicand = self.argument()
        return Node("fn", (radicand, index or num(2)), name="root")

    def set(self) -> Node:
        bars, self.bars = self.bars, 1
        node = self.items(("\\}", ":", "|"))
        self.bars = bars
        if self.peek().kind in (":", "|"):
            self.at += 1
            condition = self.items(("\\}",))
            node = Node("setbuilder", (node, condition))
        elif node.head == "list":
            node = Node("set", node.args)
        else:
            node = Node("set", (node,))
        if not self.take_cmd("}"):
            raise Unreadable("an open set")
        return node

    def matrix(self) -> Node:
        name = self.group_name()
        if name == "cases" or name not in _OPEN_MATRIX:
            raise Unsupported(f"environment {name}")
        if name == "array" and self.take("{"):
            while self.peek().kind != "end" and not self.take("}"):
                self.at += 1
        rows: list[Node] = []
        row: list[Node] = []
        while True:
            if self.take("&"):
                continue
            if self.take_cmd("\\"):
                if row:
                    rows.append(Node("row", tuple(row)))
                row = []
            elif self.take_cmd("hline"):
                continue
            elif self.take_cmd("end"):
                self.group_name()
                break
            else:
                row.append(self.sum())
                if not (self.peek().kind == "&" or self.is_cmd("\\", "end")):
                    raise Unreadable("in a matrix")
        if row:
            rows.append(Node("row", tuple(row)))
        if not rows or len({len(r.args) for r in rows}) != 1:
            raise Unreadable("a ragged matrix")
        if name == "vmatrix":
            return Node("fn", (Node("matrix", tuple(rows)),), name="det")
        return Node("matrix", tuple(rows))

    def group_name(self) -> str:
        self.expect("{")
        parts: list[str] = []
        while self.peek().kind != "end" and not self.take("}"):
            parts.append(self.next().text)
        return "".join(parts)

    def function(self, name: str) -> Node:
        if name in ("abs", "floor", "ceil", "factorial", "exp", "det"):
            return Node("fn", (self.application(),), name=name)
        base: Node | None = None
        power: Node | None = None
        while self.peek().kind in ("_", "^"):
            kind = self.next().kind
            if self.peek().kind == "num" and not (kind == "_" and self.one_number_is_left()):
                plain = num(_decimal(self.next().text))
                base, power = (plain, power) if kind == "_" else (base, plain)
            elif kind == "^":
                power = self.exponent()
            else:
                base = self.argument(short=self.peek().kind == "num" and self.one_number_is_left())
        if self.peek().kind == "{":
            argument = self.argument()
            arguments = argument.args if argument.head == "list" else (argument,)
        else:
            argument = self.application()
            arguments = argument.args if argument.head in ("tuple", "list", "set") else (argument,)
        if name == "log" and base is not None:
            arguments = (arguments[0], base)
        elif base is not None:
            raise Unreadable(f"a subscript of {name}")
        if power is not None and power == Node("neg", (num(1),)) and name in ("sin", "cos", "tan", "cot"):
            return Node("fn", arguments, name="arc" + name)
        node = Node("fn", arguments, name=name)
        return Node("^", (node, power)) if power is not None else node

    def one_number_is_left(self) -> bool:
        """Whether the number after `\\log_` must hold both the base and the argument, as in `\\log_28`."""
        following = self.peek(1)
        return following.kind in ("end", "+", "-", "=", ")", ",", "*", "/", "}")

    def application(self) -> Node:
        """The argument of a function: a bracket, or the product that follows up to the next function."""
        if self.peek().kind in ("(", "["):
            self.at += 1
            return self.postfix(self.bracketed("("))
        node = _signed(self.sign(), self.power())
        while self.starts_operand() and not (self.peek().kind == "cmd" and self.peek().text in FUNCTIONS - {"sqrt"}):
            if self.peek().kind in ("(", "["):
                break
            node = Node("*", (node, self.power()))
        if self.peek().kind == "/" and self.peek(1).kind == "num" and _mentions_pi(node):
            self.at += 1
            node = Node("/", (node, self.power()))
        return node

    def figure(self, name: str) -> Node:
        if self.take("{"):
            letters = self.items(("}",))
            self.expect("}")
            return Node("sym", name=f"{name} {_names(letters)}")
        parts: list[str] = []
        while self.peek().kind in ("letter", "num"):
            parts.append(self.next().text)
        return Node("sym", name=f"{name} {''.join(parts)}")


_MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_OPERAND_COMMANDS = {"frac", "sqrt", "pi", "binom", "lfloor", "lceil", "infty", "begin", "langle", "overline", "bar",
                     "vec", "hat", "angle", "mathbb", "tilde", "{", *_GREEK_OR_NAME}  # fmt: skip
_LEADING = {"exactly", "precisely"}


def _signed(sign: str, node: Node) -> Node:
    if sign == "-":
        return Node("neg", (node,))
    if sign in ("pm", "mp"):
        return Node(sign, (num(0), node))
    return node


def _decimal(text: str) -> Fraction:
    if len(text) > MAX_DIGITS:
        raise Unreadable("too many digits")
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > MAX_DIGITS:
        raise Unreadable("too large an exponent")
    whole, _, decimals = mantissa.partition(".")
    value = Fraction(int(whole + decimals or "0"), 10 ** len(decimals))
    return value * Fraction(10) ** int(exponent or 0)


def _repeating(text: str) -> Fraction:
    whole, fixed, period = text.split("|")
    nines = 10 ** len(period) - 1
    scale = 10 ** len(fixed)
    return int(whole) + Fraction(int(fixed or 0), scale) + Fraction(int(period), nines * scale)


def _is_natural(node: Node) -> bool:
    return node.head == "num" and node.value is not None and node.value.denominator == 1


def _mentions_pi(node: Node) -> bool:
    return (node.head == "const" and node.name == "pi") or any(_mentions_pi(arg) for arg in node.args)


def _names(node: Node) -> str:
    if node.head in ("sym", "const"):
        return node.name
    if node.head == "num":
        return str(node.value)
    if node.args and node.head == "*":
        return "".join(_names(arg) for arg in node.args)
    raise Unreadable("a name was expected")


_BINDING = {"+": 1, "neg": 1, "*": 2}


def key(node: Node) -> str:
    """A text that two trees share if they are the same up to the order of sums and products."""
    if node.head == "num":
        return str(node.value)
    parts = [key(arg) for arg in _flat(node)]
    if node.head in ("+", "*", "set"):
        parts.sort()
    name = "" if node.head in ("*", "/") else node.name
    return f"{node.head}:{name}({','.join(parts)})"


def _flat(node: Node) -> list[Node]:
    if node.head not in ("+", "*"):
        return list(node.args)
    out: list[Node] = []
    for arg in node.args:
        out += _flat(arg) if arg.head == node.head else [arg]
    return out
