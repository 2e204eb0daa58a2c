r"""Is the response right? Reads a model's answer as a careful person would, and compares it exactly.

Four layers, each small enough to check by eye:

1. *Thoughts* are removed. What stands between the think tags never counts, closed or not. A thought that the prompt
   opened (`opened=True`) runs to the first closing tag; without one, nothing has been answered.
2. *Marked commitments*: `#### 18`, `\boxed{18}`, `<answer>18</answer>`. The last one that says anything wins,
   whatever remarks follow it, unless the model takes it back in so many words.
3. *Unmarked answers*, in flexible mode only: "The answer is 18", then the statement the text ends on.
4. *One quantity*, parsed to a `Fraction`. Two candidates, a range, an estimate, a sum left to do: no answer.

`strict` stops after layer 2: it demands a marker outside the thoughts, and "the answer is 18" is prose.
Nothing is evaluated but a plain fraction and a power of ten; there is no `eval`, no float, no symbolic algebra.

Rules for debatable cases:
- Units and currency are ignored, and percent is a unit: `50%` is 50, not 1/2. "2 dozen" is 2; "2 thousand" is 2000.
- `20 - 2 = 18` is 18 (the last side of an equation); a bare `20 - 2` is work left to do, and no answer.
- "18 apples and 3 pears", "17, 18", "15-18", "about 18", "at least 18", "maybe 18", "18?" commit to no number.
- `3,14` is no number in English; a comma groups thousands (western or Indian), as do a space, `\,`, `{,}`, `'`, `_`.
- A box or an answer tag that is never closed was cut off, and so was a text that ends in mid-calculation.
- Inventing another question after the answer ("Question: ...") does not replace the answer. A heading behind an
  answer in prose, with a single marked answer under it, is the model's own working: "Problem 2: … \boxed{36}".

Simplified: English only, beyond digits and signs; the reading of free prose is a set of rules of thumb.
Every step is linear in the response, or works on a bounded excerpt of it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from typing import Literal, NamedTuple

from grpo_gsm8k.tasks.base import Tags, after_opened_thought, tag_pattern
from grpo_gsm8k.tasks.responses import DISOWNED, DOUBT, REJECTED, closing_brace, line_end

Mode = Literal["flexible", "strict"]


DEFAULT_TAGS = Tags()

MAX_DIGITS = 400  # a longer number, or a larger exponent, is no answer to a word problem
MAX_STATEMENT = 1_000  # characters of one statement that are read
MAX_WINDOW = 20_000  # characters from which unmarked answers are read
MAX_TOKENS = 250  # tokens of one statement that are read
MAX_MARKERS = 64  # markers without content that are passed over before giving up


class Quantity(NamedTuple):
    """A number as the model wrote it (LaTeX, markdown and currency removed), and its exact value."""

    text: str
    value: Fraction


def grade(
    response: str, gold: str, mode: Mode = "flexible", *, tags: Tags = DEFAULT_TAGS, opened: bool = False
) -> bool:
    """Whether `response` commits to exactly the number `gold`.

    Args:
        response: what the model wrote, thoughts included. Anything but a string is wrong.
        gold: a number ("18", "1,000", "-3.5", "1/2", "$18"), or a text that ends in `#### 18`.
        mode: "strict" demands a marker; "flexible" also takes the answer from plain prose.
        tags: the tags of the prompt.
        opened: the prompt opened a thought, so the response starts inside it.

    Raises:
        ValueError: if `gold` is not a number, or `mode` is unknown. A broken reference never counts as right.
    """
    value = gold_value(gold)
    answer = _answer(response, mode, tags, opened)
    return answer is not None and answer.value == value


def gold_value(gold: str) -> Fraction:
    """The number of a gold. Raises `ValueError` if it is none."""
    value = parse_number(str(gold).rpartition("####")[2])
    if value is None:
        raise ValueError(f"gold is not a number: {str(gold)[:80]!r}")
    return value


class Answers(NamedTuple):
    """What a response commits to, read either way."""

    strict: Quantity | None
    flexible: Quantity | None


def answers(response: str, *, tags: Tags = DEFAULT_TAGS, opened: bool = False) -> Answers:
    """Both readings of a response in one pass over it."""
    heard = _heard(response, tags, opened)
    if heard is None:
        return Answers(None, None)
    return Answers(_committed(heard, "strict", tags), _committed(heard, "flexible", tags))


def extract(response: str, mode: Mode = "flexible", *, tags: Tags = DEFAULT_TAGS, opened: bool = False) -> str | None:
    """The number that `response` commits to, as text that `parse_number` accepts; None if there is none."""
    answer = _answer(response, mode, tags, opened)
    return answer.text if answer else None


def parse_number(text: str) -> Fraction | None:
    """The exact value of a text that is one quantity and nothing else (units and currency allowed)."""
    if not isinstance(text, str) or len(text := text.strip()) > MAX_STATEMENT:
        return None
    quantity = _whole(_tokens(text))
    return quantity.value if quantity else None


def parse_gold(answer: str) -> str:
    """The gold of a GSM8K `answer` field: what follows its last `####`, thousands commas removed.

    Raises:
        ValueError: if there is no `####`, or no number after it.
    """
    _, marker, tail = answer.rpartition("####")
    gold = re.sub(r"(?<=\d),(?=\d)", "", tail.strip())
    if not marker:
        raise ValueError(f"no '####' in the answer: {answer[-80:]!r}")
    if parse_number(tail) is None:
        raise ValueError(f"no number after the last '####': {tail[:80]!r}")
    return gold


def _answer(response: str, mode: Mode, tags: Tags, opened: bool) -> Quantity | None:
    """The one path from a response to its answer."""
    if mode not in ("flexible", "strict"):
        raise ValueError(f"mode must be 'flexible' or 'strict', not {mode!r}")
    heard = _heard(response, tags, opened)
    return None if heard is None else _committed(heard, mode, tags)


class _Heard(NamedTuple):
    """A response without its thoughts: the text, an answer that was cut off at its end, and the last marked one."""

    text: str
    fragment: str | None
    marked: _Found | None


def _heard(response: str, tags: Tags, opened: bool) -> _Heard | None:
    """The part of reading that both modes share; None for what says nothing."""
    said = after_opened_thought(response, tags) if opened and isinstance(response, str) else response
    if not isinstance(said, str):
        return None
    text, fragment = _without_fragment(_own_turn(_without_thoughts(said, tags).strip(), tags), tags)
    return _Heard(text, fragment, _last_marked(text, tags))


def _committed(heard: _Heard, mode: Mode, tags: Tags) -> Quantity | None:
    text, fragment, found = heard
    tail = text[found.end :] if found else text
    if mode == "flexible":
        tail = _prose(tail, tags)
        if spoken := (None if found else _labelled_line(tail)) or _last_spoken(tail):
            found, tail = spoken, tail[spoken.end :]
    elif not found:
        return None
    if found:
        answer = found.quantity
        taken_back, new = _correction(tail)
        if taken_back and new != answer:
            answer = new if mode == "flexible" else None
    else:
        answer = _final_statement(tail)
    # A marker that was cut off may repeat the answer so far, and must not contradict it.
    return answer if answer and (fragment is None or answer.text.startswith(fragment)) else None


# ---------------------------------------------------------------------------------------------------------
# Layer 1: what the model said, without what it thought


def _bare(tag: str) -> str:
    return re.sub(r"\s", "", tag).lower()


def _without_thoughts(text: str, tags: Tags) -> str:
    """The text outside the thoughts, its answer tags spelled as in `tags`.

    Thoughts nest. One that is never closed runs to the end. A closing tag without an opening one ends a
    thought that the prompt began: all before it was thought.
    """
    kinds = (tags.think_open, tags.think_close, tags.answer_open, tags.answer_close)
    pattern = re.compile("|".join(tag_pattern(tag) for tag in kinds if tag) or r"(?!)", re.IGNORECASE)
    spellings: dict[str, str] = {}
    said: list[str] = []
    depth = position = opened_at = 0
    for match in pattern.finditer(text):
        if match[0] not in spellings:
            spellings[match[0]] = next(tag for tag in kinds if tag and _bare(tag) == _bare(match[0]))
        kind = spellings[match[0]]
        if depth == 0:
            said.append(text[position : match.start()])
        position = match.end()
        if kind == tags.think_open:
            # `<think>` twice in a row is a stutter (prompt templates cause it), not a thought in a thought.
            stutter = depth > 0 and not text[opened_at : match.start()].strip()
            depth, opened_at = depth + (not stutter), match.end()
        elif kind == tags.think_close:
            if depth == 0:
                said.clear()
            depth = max(depth - 1, 0)
        elif depth == 0:
            said.append(kind)
    if depth == 0:
        said.append(text[position:])
    return "".join(said)


_NEXT_TURN = re.compile(r"<\|[a-z_]{2,24}\|>|</s>", re.IGNORECASE)
_NEXT_QUESTION = re.compile(
    r"\n[ #*]{0,8}(?:question|q|problem|exercise|human|user|instruction)\b[ \d*]{0,6}:", re.IGNORECASE
)


def _own_turn(text: str, tags: Tags) -> str:
    """Drops what a model makes up after its turn: an end-of-turn token, or a new question once it answered.

    A question behind a marked answer is made up. Behind an answer in prose it may be the next part of the model's own
    working: it is, when the one marked answer of the text stands under it.
    """
    if token := next((match for match in _NEXT_TURN.finditer(text) if match.start()), None):
        text = text[: token.start()].rstrip()
    if not _NEXT_QUESTION.search(text):
        return text
    first, several = _first_marked(text, tags)
    spoken = _SPOKEN.search(text[:MAX_WINDOW])
    in_prose = spoken.end() if spoken and (first is None or several) else len(text)
    if first is None:  # a marker without content, or a heading's hashes
        first = min((position for mark in _literals(tags) if (position := text.find(mark)) >= 0), default=len(text))
    for heading in _NEXT_QUESTION.finditer(text):
        if heading.start() > min(first, in_prose):
            return text[: heading.start()].rstrip()
    return text


def _first_marked(text: str, tags: Tags) -> tuple[int | None, bool]:
    """Where the first marked answer stands, and whether a later one differs from it."""
    first, values = None, set[Fraction | None]()
    marks = re.finditer("|".join(map(re.escape, _literals(tags))), text)
    for match in islice(marks, MAX_MARKERS):
        if found := _marked_at(text, match.start(), match.group(), tags):
            first = match.start() if first is None else first
            values.add(found.quantity.value if found.quantity else None)
            if len(values) > 1:
                break
    return first, len(values) > 1


# ---------------------------------------------------------------------------------------------------------
# Layer 2: marked commitments


class _Found(NamedTuple):
    """Where an answer was committed to, and what it is (None: to no single number)."""

    quantity: Quantity | None
    end: int


def _literals(tags: Tags) -> list[str]:
    return ["####", "boxed", "fbox", *([tags.answer_open] if tags.answer_open else [])]


def _without_fragment(text: str, tags: Tags) -> tuple[str, str | None]:
    """Splits off a box or an answer tag that the end of the text cut off, and returns its content so far."""
    starts = [text.rfind(mark) for mark in ("boxed{", "fbox{", tags.answer_open) if mark]
    start = max(starts)
    if start < 0:
        return text, None
    if tags.answer_open and start == starts[-1] and text.startswith(tags.answer_open, start):
        closed, inside = text.find(tags.answer_close or "\n", start) >= 0, start + len(tags.answer_open)
    else:
        inside = text.index("{", start) + 1
        closed = closing_brace(text, inside, MAX_STATEMENT) >= 0
    fragment = text[inside : inside + MAX_STATEMENT].strip()
    # With further lines after it, the marker was merely malformed: it marks nothing, but the text goes on.
    if closed or "\n" in fragment:
        return text, None
    return text[:start].rstrip("\\ "), _plain(fragment).strip(" $")


def _last_marked(text: str, tags: Tags) -> _Found | None:
    """The last marker that says anything. Empty boxes and headings are passed over."""
    last = {mark: text.rfind(mark) for mark in _literals(tags)}
    for _ in range(MAX_MARKERS):
        mark, start = max(last.items(), key=lambda item: item[1])
        if start < 0:
            return None
        if found := _marked_at(text, start, mark, tags):
            return found
        last[mark] = text.rfind(mark, 0, len(text[:start].rstrip("#")))  # past the whole of a ruler of hashes
    return None


def _marked_at(text: str, start: int, mark: str, tags: Tags) -> _Found | None:
    """What the marker at `start` commits to; None if it says nothing."""
    inside = start + len(mark)
    if mark == "####":
        return _hashed(text, inside, tags)
    return _tagged(text, inside, tags) if mark == tags.answer_open else _boxed(text, start, inside)


_ALTERNATIVE_AFTER = re.compile(r"[\s$.)\]\\*}]{0,8}(?:\bor\b|\bto\b|±|\\pm)[^.\n]{0,20}?(?:\d|boxed)")
_ALTERNATIVE_BEFORE = re.compile(
    r"(?:[\d}][\s$*)\]\\]{0,8}(?:\w{1,9} )?,?\s{0,2}\bor|\}[\s$*)\]\\]{0,8}(?:,|,?\s?\band\b))[\s$*([\\]{0,8}$"
)


def _boxed(text: str, start: int, inside: int) -> _Found | None:
    r"""Reads `\boxed{18}`, `\boxed 18`, and `boxed{18}` whose backslash was lost on the way."""
    if text.startswith("{", inside) or text.startswith(" {", inside):
        inside = text.index("{", inside) + 1
        end = closing_brace(text, inside, MAX_STATEMENT)
        content = text[inside:end] if end >= 0 else ""
    else:
        bare = re.compile(r"\s?([^\s{}$\\]{1,40})").match(text, inside)
        end = bare.end() if bare else inside
        content = bare.group(1) if bare and text[start - 1 : start] in ("\\", "f") else ""
    if not _says_anything(content) or REJECTED.search(text[max(0, start - 40) : start]):
        return None
    hedged = _ALTERNATIVE_AFTER.match(text, end) or _ALTERNATIVE_BEFORE.search(text[max(0, start - 40) : start])
    return _Found(None if hedged else _read(content, leading=True), end)


def _tagged(text: str, inside: int, tags: Tags) -> _Found | None:
    """Reads what stands between answer tags: a number, a phrase, or a whole solution."""
    end = text.find(tags.answer_close, inside) if tags.answer_close else -1
    content = text[inside:end].strip() if end >= 0 else ""
    if not _says_anything(content[:MAX_WINDOW]):
        return None
    content = _prose(content, tags)
    sentences = [sentence for sentence, _ in _sentences(content) if _says_anything(sentence)]
    if len(sentences) < 2:
        return _Found(_read(content, leading=True), end)
    stated = {q.value: q for s in sentences[:20] if (q := _whole(_without_remarks(_tokens(s))))}
    if len(stated) == 1 and _whole(_without_remarks(_tokens(sentences[0]))):
        return _Found(next(iter(stated.values())), end)
    spoken = _last_spoken(content)
    return _Found(spoken.quantity if spoken else _final_statement(content, closed=True), end)


_STEP = re.compile(r"\W*(?:step|part|case|method|option|problem|question|example|stage|phase|day|week)\b", re.I)
_ANSWER_HEADING = re.compile(r"\W*(?:the\s+)?(?:final\s+)?answer\W*", re.IGNORECASE)


def _hashed(text: str, inside: int, tags: Tags) -> _Found | None:
    """Reads the line after `####`, or the next one if it is empty. None for a markdown heading."""
    if text[inside : inside + 1] == "#" or text[inside - 5 : inside - 4] == "#":
        return None
    end = line_end(text, inside, MAX_STATEMENT)
    if not _says_anything(text[inside:end]) or _ANSWER_HEADING.fullmatch(text[inside:end]):
        inside = end
        ahead = text[end : end + 9]
        end = line_end(text, end + 1 + len(ahead) - len(ahead.lstrip()), MAX_STATEMENT)
    content = text[inside:end].strip(" #\n\r\t")
    if tags.answer_close and tags.answer_close in content:
        content = content[: content.index(tags.answer_close)]
    follows = bool(text[end : end + MAX_WINDOW].strip())
    numbered = re.match(r"\d{1,2}[.)]\s+[A-Z*]", content) and follows and content[-1] not in ".!"
    if _STEP.match(content) or numbered or content.endswith(":") or not _says_anything(content):
        return None
    if not re.search(r"\d", _plain(content)) and not _REFUSAL.search(content):
        quantity = _read(content, leading=True)
        return _Found(quantity, end) if quantity else None
    for sentence, _ in _sentences(content):
        if _quantities(_tokens(sentence)):
            return _Found(_read(sentence, leading=True), end)
    return _Found(None, end)


def _says_anything(content: str) -> bool:
    return any(character.isalnum() for character in content)


_TAKEN_BACK = re.compile(
    r"(?:^|[.!?\n)}])[\s*>($]{0,6}(?:but\s+)?"
    r"(?:wait|actually|no|oops|hmm+|hold on|sorry|correction|scratch that|on second thought|my mistake|edit)"
    r"\b[\s,.:!…—–-]{0,6}",
    re.IGNORECASE,
)
_RESTATED = re.compile(r"(?:(?:it|this|that|the \w+)\s?(?:is|'s|’s|should be|must be|equals|=)\s)?", re.IGNORECASE)


def _correction(tail: str) -> tuple[bool, Quantity | None]:
    """Whether the text after an answer takes it back in so many words, and the new answer if it gives one."""
    tail = tail[:MAX_WINDOW]
    for match in list(_TAKEN_BACK.finditer(tail))[:-9:-1]:
        rest = tail[match.end() : match.end() + MAX_STATEMENT]
        if spoken := _last_spoken(rest):
            return True, spoken.quantity
        sentence = next((sentence for sentence, _ in _sentences(rest)), "")
        restated = _whole(_without_remarks(_tokens(sentence[_RESTATED.match(sentence).end() :])))  # type: ignore[union-attr]
        if restated:
            return True, restated
    if disowned := DISOWNED.search(tail):
        return True, _final_statement(tail[disowned.end() :])
    return False, None


# ---------------------------------------------------------------------------------------------------------
# Layer 3: unmarked answers

_SPOKEN = re.compile(
    r"\b(?:answer|ans|(?<!as a )result(?! in\b| of\b)|solution)\b[^\n.:=?!\d]{0,80}?"
    r"(?P<link>\bis\b|\bare\b|\bequals\b|\b(?:should|must|would|will) be\b|[:=]|\s[-–—]\s|[^\w\n]{0,12}$)",
    re.IGNORECASE | re.MULTILINE,
)
_LEAD_IN = re.compile(
    r"[\s*:]*(?:(?:therefore|thus|simply|just|exactly|equal to|a total of|then|indeed|now)\b[\s,:]*)*", re.I
)
_DENIED = re.compile(
    r"\b(?:cannot|can['’]t) be\b|\bis(?:n['’]t| not) (?:the|correct|right)\b|\bis (?:wrong|incorrect)\b", re.I
)
_REFUSAL = re.compile(
    r"\b(?:(?:do not|don['’]t|cannot|can['’]t|could not|couldn['’]t) (?:\w+ )?"
    r"(?:know|determine|say|tell|answer|solve|be (?:determined|solved|found|answered))"
    r"|unable to|(?:not|\w*n['’]t have|not have) enough information|insufficient|impossible to|no answer"
    r"|is (?:unknown|undefined))\b|^\W*(?:unknown|none|null|n/?a|nan|undefined|inf(?:inity)?)\W*$",
    re.IGNORECASE,
)


def _prose(text: str, tags: Tags) -> str:
    """The end of the text, long enough for any statement, with answer tags and other markup blanked."""
    text = text.strip()
    if len(text) > MAX_WINDOW:
        text = text[-MAX_WINDOW:].partition(" ")[2]
    text = re.sub(r"\\(?:begin|end)\{[^{}\n]{0,40}\}|</?[A-Za-z][^<>\n]{0,40}>", " ", text)
    for tag in (tags.answer_open, tags.answer_close):
        text = text.replace(tag, " ") if tag else text
    return text


_HEADING = re.compile(r"\s*#{1,6}\s*(?:step|part|case|method|\d{1,2}[.)]\s)", re.IGNORECASE)


def _sentences(text: str) -> Iterator[tuple[str, bool]]:
    """The sentences of a text, and of each whether it is finished (by punctuation, or by the line's end)."""
    lines = [line for line in text.split("\n") if _says_anything(line) and not _HEADING.match(line)]
    for number, line in enumerate(lines, 1):
        line = re.sub(r"^\s*(?:>|[-*•]\s|#{1,6}\s)\s*", "", line)
        parts = re.split(r"(?<=[.!?。])(?<!\bapprox\.)(?<!\bRs\.)(?<!\bvs\.)[\"'”’)*\]$]{0,4}\s+", line.strip())
        for index, part in enumerate(parts, 1):
            ended = re.search(r"[.!?。][\"'”’)*\]$\\`_]{0,6}$", part) and not part.endswith("...")
            yield part, bool(ended) or number < len(lines) or index < len(parts)


_LABELLED = re.compile(r"\n[^\w\n]{0,4}A:[^\n]{1,80}$")


def _labelled_line(text: str) -> _Found | None:
    """ "A: 18" as the last line, as OpenAI's labelled solutions end."""
    label = _LABELLED.search(text, max(0, len(text) - 100))
    quantity = _whole(_tokens(label.group().partition(":")[2])) if label else None
    return _Found(quantity, len(text)) if quantity else None


def _last_spoken(text: str) -> _Found | None:
    """The last "the answer is 18", "Answer: 18" or answer heading with a number under it."""
    for match in list(_SPOKEN.finditer(text))[:-33:-1]:
        start = match.end()
        clause = text[start : start + 300]
        if not _says_anything(clause.partition("\n")[0]):
            clause = clause.strip()
        clause, _ = next(_sentences(clause), ("", True))
        clause = clause[_LEAD_IN.match(clause).end() :]  # type: ignore[union-attr]
        if clause.endswith("?"):
            continue
        tokens = _tokens(clause)
        opens = bool(_quantities(tokens[:4]) and _quantities(tokens)[0].start == 0)
        end = start + len(clause)
        if DOUBT.search(match.group()) or re.match(r"(?:either|between|about|approx|around|roughly)", clause, re.I):
            return _Found(None, end)
        if match["link"].strip()[-1:].isalpha():
            if opens or any(token.text == "=" for token in tokens):
                return _Found(_read(clause, leading=True), end)
        elif opens:
            # After a colon there may stand a whole solution; only a lone quantity is an answer here.
            dash = next((i for i, token in enumerate(tokens) if token.text in ("—", ";")), len(tokens))
            quantity = _whole(_without_remarks(tokens[:dash]))
            if quantity or any(token.text in ("or", "to") for token in tokens):
                return _Found(quantity, end)
    return None


_BEGINNING = re.compile(r"\W*(?:first|firstly|step 1|suppose|assume|let(?! me know))\b", re.IGNORECASE)
_PLANNING = re.compile(
    r"^\W*(?:(?:next|then|now)\b,? )?(?:add|subtract|multiply|divide|calculate|find|to (?:find|solve|calculate|get))\b"
    r"|\b(?:(?:we|i)(?: \w+)? (?:need|have to|must|will now|can now)|let['’]s|let us|next,? we|now we)\b",
    re.IGNORECASE,
)
_CONCLUDING = re.compile(
    r"=|\b(?:so|therefore|thus|hence|total|altogether|in all|answer|left|remain\w*|finally|conclu\w+)\b", re.I
)
_DANGLING = re.compile(
    r"(?:\b(?:the|an?|of|to|and|or|(?<!sq )in|for|is|are|was|were|has|have|had|with|by|from|then|so|that|which|who"
    r"|she|he|they|we|you|it|her|his|their|its|needs?|will|can|at|as|on|per|be|but|if|because|since|when|every)"
    r"|[-+/^=×÷≈,:;(\[{<>&…−–]|\s\*|\\(?:times|cdot|div|frac)|<<[^<>]*|\.\.\.)[\s$*\\(\[]*$",
    re.IGNORECASE,
)


def _final_statement(text: str, closed: bool = False) -> Quantity | None:
    """The number in the statement that an unmarked text ends on, unless it ends in mid-work.

    Closing remarks (in parentheses, or whole sentences without a number) are passed over. `closed` says that
    the end of the text is known to be its end, so a missing full stop means nothing.
    """
    sentences = list(_sentences(text[-MAX_STATEMENT * 2 :]))
    opening = _whole(_tokens(sentences[0][0])) if len(sentences) > 1 and len(text) < MAX_STATEMENT else None
    if any(_REFUSAL.search(sentence) for sentence, _ in sentences[-3:]):
        return None
    if not closed and _DANGLING.search(text[-80:]):
        return None
    for sentence, finished in sentences[:-5:-1]:
        if (re.fullmatch(r"\(.*\)\W*", sentence) and len(sentences) > 1) or re.match(
            r"(?:because|since|note)\b[^,]*$", sentence, re.I
        ):
            continue
        sentence = sentence if len(sentence) < MAX_STATEMENT // 2 else sentence[-MAX_STATEMENT // 2 :].partition(" ")[2]
        tokens = _tokens(sentence)
        quantities = _quantities(tokens)
        asks = sentence.rstrip("*_ \"')").endswith("?")
        planning = _PLANNING.search(sentence) and "=" not in sentence
        if _BEGINNING.match(sentence) or planning or (asks and quantities):
            return None
        if quantities:
            answer = _read(sentence)
            trailing = len(tokens) - quantities[-1].end
            terse = len(tokens) <= 6 or _CONCLUDING.search(sentence)
            if not (finished or closed) and (trailing > (12 if "=" in sentence else 5) or not terse):
                return None
            return opening if opening and not _CONCLUDING.search(sentence) else answer
        if not (finished or closed):
            return None
    return opening


# ---------------------------------------------------------------------------------------------------------
# Layer 4a: from text to tokens


class _Token(NamedTuple):
    kind: Literal["num", "word", "op", "stop"]
    text: str  # lower case
    start: int
    end: int
    source: str  # the whole statement, so that a quantity can be shown as it was written
    value: Fraction | None = None  # of a number; None if it is malformed (3,14 or 3:30)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COMMANDS = {
    **dict.fromkeys(_words("times cdot ast"), "*"),
    **dict.fromkeys(_words("approx sim simeq approxeq"), "≈"),
    **dict.fromkeys(_words("implies Rightarrow rightarrow to Longrightarrow longrightarrow"), " = "),
    **dict.fromkeys(_words("circ degree"), "° "),
    **dict.fromkeys(_words("left right big Big bigl bigr displaystyle boxed fbox framebox"), ""),
    **dict.fromkeys(_words("bf rm it underline emph color large Large"), ""),
    **dict.fromkeys(_words("quad qquad therefore pounds euro"), " "),
    **dict.fromkeys(_words("dots ldots cdots"), "…"),
    **{"div": "÷", "pm": "±", "!": "", "%": "%", "$": "$", "#": "", "&": " and ", "_": "_", "*": "*", "-": "-"},
}
_FOLDED = str.maketrans(
    dict.fromkeys("−–‐‑‒﹣－", "-")
    | dict.fromkeys("×✕∙⋅·", "*")
    | dict.fromkeys("→⇒⟹", "=")
    | dict.fromkeys("€£¥₹₩₽", "$")
    | {"⁄": "/", "∕": "/", "٫": ".", "٬": ",", "’": "'", "—": " — ", "º": "°", "≃": "≈", "，": ",", "¢": " cents"}
    | dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad")
)


def _plain(text: str) -> str:
    """One spelling for what reads the same: Unicode, LaTeX and markdown folded into plain ASCII arithmetic."""
    text = re.sub("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]), text)
    text = unicodedata.normalize("NFKC", text).translate(_FOLDED)
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    text = re.sub(r"<<[^<>]*>>|~~[^~]*~~|</?[A-Za-z][^<>]{0,40}>", "", text)  # calculator notes, struck out, HTML
    # LaTeX
    text = re.sub(r"&\s?=|[=-]>", "=", text).replace("{,}", ",").replace("\\!", "").replace("\\,", " ")
    text = re.sub(r"\\(?:text\w*|math\w+|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", _fraction_text, text)
    text = re.sub(r"\\([A-Za-z]+|.)", _command_text, text, flags=re.DOTALL)
    text = re.sub(r"\^\s*\{\s*([-+]?\w+|°)\s*\}", r"^\1", text).replace("^°", "°").replace("^ °", "°")
    # Markdown, once Python's power is out of the way
    text = re.sub(r"(?<=[\d)])\s?\*\*\s?(?=[\d(])", "^", text)
    text = re.sub(r"(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])|\*\*|`|[{}]", lambda m: m[1] or " " * (m[0] in "{}"), text)
    text = re.sub(r"(?<!\w)_+|_+(?!\w)", "", text)
    # Signs that look like operators
    text = re.sub(r"(?<=\w)~\s?(?=\w)", " ", text)
    text = re.sub(r"(?<=\d)\s?[xX]\s?(?=\d)", "*", text)
    text = re.sub(r"(?<=\d)-(?=[A-Za-z]{2})", " ", text)
    text = re.sub(r"\s-+\s(?=[A-Za-z]{2}|I\s)|(?<=[\sA-Za-z])--+(?=[\sA-Za-z])", " — ", text)
    text = re.sub(r"\b(?:US|AU|CA|NZ|HK|A|C|S)\$|\b(?:USD|EUR|GBP|INR|CAD|AUD|Rs\.?)\s?(?=-?\d)", "$", text)
    return re.sub(r"-\s?\$\s?(?=[\d.])", "$-", text)


def _fraction_text(match: re.Match[str]) -> str:
    return f" {(match[1] or match[2] or '').strip()}/{(match[3] or match[4] or '').strip()} "


def _command_text(match: re.Match[str]) -> str:
    """What a LaTeX command contributes. An unknown one becomes an operator, which nothing parses."""
    name = match[1]
    if name.startswith(("text", "math")):
        return ""
    return _COMMANDS.get(name, "�" if name.isalpha() and len(name) > 1 else " ")


_TOKEN = re.compile(
    r"(?P<num>[1-9]\d{0,2}(?:\ \d{3})+(?![\d,:]|\.\d)(?:\.\d+)?|\.?\d+(?:[.,:'_]\d+)*(?:[eE][-+]?\d+)?)"
    r"|(?P<word>(?:[kcm]?m|ft|in)[23]\b|[^\W\d_]+(?:['-][^\W\d_]+)*|[%°])"
    r"|(?P<op>[-+*/^=÷±≈<>~_√∞≠≤≥:�])"
    r"|(?P<stop>[,;.()!?…—&|\[\]])"
)
_NUMBER = re.compile(
    r"(\d+|[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+|(?:'\d{3})+|(?:_\d{3})+)|[1-9]\d?(?:,\d\d)+,\d{3})?"
    r"(\.\d+)?(?:[eE]([-+]?\d{1,4}))?"
)


def _number_value(text: str) -> Fraction | None:
    """The value of one run of digits and separators; None if it is malformed, or absurdly long or large."""
    match = _NUMBER.fullmatch(text) if len(text) <= MAX_DIGITS else None
    power = int(match[3] or 0) if match else 0
    if not match or abs(power) > MAX_DIGITS:
        return None
    return Fraction(re.sub(r"[, '_]", "", match[1] or "0") + (match[2] or "")) * Fraction(10) ** power


def _tokens(text: str) -> list[_Token]:
    """The numbers, words, operators and stops of a statement. Dollar signs and stray symbols are dropped."""
    if len(text) > MAX_STATEMENT:
        text = text[:MAX_STATEMENT].rpartition(" ")[0]
    source = _plain(text)
    tokens = []
    for m in islice(_TOKEN.finditer(source), MAX_TOKENS):
        value = _number_value(m[0]) if m.lastgroup == "num" else None
        tokens.append(_Token(m.lastgroup, m[0].lower(), m.start(), m.end(), source, value))  # type: ignore[arg-type]
    return _shares_as_products(tokens if _has_number(tokens) else _spelled(tokens))


_SHARES = _words("% percent half halves third thirds quarter quarters fourth fourths fifth fifths tenth tenths")


def _shares_as_products(tokens: list[_Token]) -> list[_Token]:
    """ "20% of her 90", "1/2 of 50": a product, still to be worked out; "18 of the 50" is 18."""
    folded: list[_Token] = []
    i = 0
    while i < len(tokens):
        number = i + 1
        while _at(tokens, number) in _DETERMINERS:
            number += 1
        share = _at(tokens, i - 1) in _SHARES or (i > 2 and tokens[i - 2].text == "/" and tokens[i - 1].kind == "num")
        if tokens[i].text == "of" and share and number < len(tokens) and tokens[number].kind == "num":
            folded.append(tokens[i]._replace(kind="op", text="*"))
            i = number
        else:
            folded.append(tokens[i])
            i += 1
    return folded


def _at(tokens: list[_Token], i: int) -> str:
    """The text of a token, empty beyond either end."""
    return tokens[i].text if 0 <= i < len(tokens) else ""


def _has_number(tokens: list[_Token]) -> bool:
    return any(token.kind == "num" for token in tokens)


_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen \
seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL = {word: number for number, word in enumerate(_ONES.split())}
_SMALL |= {word: 10 * number for number, word in enumerate(_TENS.split(), 2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def _spelled(tokens: list[_Token]) -> list[_Token]:
    """Joins number words ("twenty-one", "two hundred and five") into number tokens."""
    merged: list[_Token] = []
    i = 0
    while i < len(tokens):
        end = i
        while set(_at(tokens, end).split("-")) <= (_SMALL.keys() | _SCALES.keys() if end > i else _SMALL.keys()) or (
            _at(tokens, end) == "and" and _at(tokens, end - 1) in _SCALES and _at(tokens, end + 1) in _SMALL
        ):
            end += 1
        words = "-".join(token.text for token in tokens[i:end] if token.text != "and").split("-")
        pronoun = words == ["one"] and (
            _at(tokens, i - 1) in ("no", "any", "every", "each", "this", "that", "which", "the")
            or _at(tokens, end) == "of"
        )
        value = _words_value(words) if end > i and not pronoun else None
        if value is not None:
            first, last = tokens[i], tokens[end - 1]
            text = first.source[first.start : last.end].lower()
            merged.append(_Token("num", text, first.start, last.end, first.source, Fraction(value)))
        else:
            merged += tokens[i : max(end, i + 1)]
        i = max(end, i + 1)
    return merged


def _words_value(words: list[str]) -> int | None:
    """twenty, one → 21; None for a mere sequence such as "two three"."""
    total = group = 0
    below = 10**15  # what may still be added to the group: after "twenty" ones only, after "two" nothing
    for word in words:
        if word == "hundred":
            group, below = group * 100, 100
        elif word in _SCALES:
            total, group, below = total + group * _SCALES[word], 0, 1000
        elif _SMALL[word] < below:
            group, below = group + _SMALL[word], 10 if _SMALL[word] >= 20 else 1
        else:
            return None
    return total + group


# ---------------------------------------------------------------------------------------------------------
# Layer 4b: quantities among tokens


class _Span(NamedTuple):
    """A quantity within a list of tokens; its value is None where the number is malformed."""

    start: int
    end: int
    value: Fraction | None
    text: str

    @property
    def quantity(self) -> Quantity | None:
        return None if self.value is None else Quantity(self.text, self.value)


_GLUED_UNITS = _words(
    "% ° kg g mg km m cm mm mi ft in yd lb oz l ml h hr s am pm mb gb kb c f st nd rd th m2 m3 cm2 cm3 km2 ft2 in2"
)


def _quantity_at(tokens: list[_Token], start: int) -> _Span | None:
    """The quantity that starts at this token: sign, then integer, decimal, a/b, mixed number, a*10^b, or 2 million."""
    first = start + (_at(tokens, start) in ("+", "-"))
    if first >= len(tokens) or tokens[first].kind != "num":
        return None
    value, end = tokens[first].value, first + 1
    if part := _fraction_at(tokens, first):
        value, end = part
    elif (
        value is not None
        and value.denominator == 1
        and (part := _fraction_at(tokens, end + (_at(tokens, end) == "and")))
    ):
        if 0 < part[0] < 1:
            value, end = value + part[0], part[1]
    elif value is not None and [_at(tokens, end + i) for i in range(3)] == ["*", "10", "^"]:
        power = re.fullmatch(
            r"(-?)(\d{1,3})", _at(tokens, end + 3) + (_at(tokens, end + 4) if _at(tokens, end + 3) == "-" else "")
        )
        if power and int(power[2]) <= MAX_DIGITS:
            value, end = value * Fraction(10) ** int(power[0]), end + 4 + len(power[1])
    unit = _at(tokens, end)
    glued = bool(unit) and tokens[end].kind == "word" and tokens[end].start == tokens[end - 1].end
    if value is not None and (unit in _SCALES or (glued and unit == "k")):
        value, end = value * _SCALES.get(unit, 1000), end + 1
    elif glued and unit.isascii() and len(unit) < 3 and unit not in _GLUED_UNITS:
        value = None  # 18x, 0x12: algebra, or another base
    if value is not None and tokens[start].text == "-":
        value = -value
    return _Span(start, end, value, tokens[start].source[tokens[start].start : tokens[end - 1].end])


def _fraction_at(tokens: list[_Token], i: int) -> tuple[Fraction, int] | None:
    """The value of `a/b` at this token, and where it ends."""
    below = i + 2 + (_at(tokens, i + 2) == "-")
    if _at(tokens, i + 1) != "/" or below >= len(tokens):
        return None
    top, bottom = tokens[i].value, tokens[below].value
    if top is None or not bottom:
        return None
    return top / (-bottom if below > i + 2 else bottom), below + 1


def _quantities(tokens: list[_Token]) -> list[_Span]:
    """Every quantity in the statement, signs included where they are signs and not subtractions."""
    spans: list[_Span] = []
    i = 0
    while i < len(tokens):
        span = _quantity_at(tokens, i) if tokens[i].kind == "num" or _is_sign(tokens, i) else None
        if span:
            spans.append(span)
        i = span.end if span else i + 1
    return spans


def _is_sign(tokens: list[_Token], i: int) -> bool:
    """Whether a plus or minus belongs to the number after it: "is -5", but not "20 - 5"."""
    if tokens[i].text not in ("+", "-") or i + 1 == len(tokens):
        return False
    if i == 0 or tokens[i - 1].kind == "op" or tokens[i - 1].text in ("(", "[", ",", ";", "is", "are", "be", "equals"):
        return True
    attached = tokens[i].source[tokens[i].end : tokens[i + 1].start].strip("$") == ""
    return tokens[i - 1].kind == "word" and attached and tokens[i - 1].end < tokens[i].start


_NOT_UNITS = _words(
    "is are was were be has have had do does or and to but not plus minus times divided multiplied equals than less"
    " more because since as after before if so then which therefore thus"
)

_MULTIPLIED = _words("as the that his her its their")  # "3 times as many", but "3 times per week"


def _units_end(tokens: list[_Token], i: int) -> int:
    """Where the unit words that follow a quantity end ("dollars per day", "km/h", "m^2", "more eggs", "times")."""
    while i < len(tokens):
        text, following = tokens[i].text, tokens[i + 1] if i + 1 < len(tokens) else None
        if (
            (tokens[i].kind == "word" and text not in _NOT_UNITS)
            or (text == "more" and _at(tokens, i + 1) != "than")
            or (text == "times" and not (following and (following.kind == "num" or following.text in _MULTIPLIED)))
        ):
            i += 1
        elif following and (
            (text == "/" and following.kind == "word")
            or (text == "^" and following.kind == "num" and tokens[i - 1].kind == "word")
        ):
            i += 2
        else:
            break
    return i


def _whole(tokens: list[_Token]) -> Quantity | None:
    """The quantity that the tokens are, with at most a few unit words; None if there is anything else."""
    while tokens and tokens[-1].text in (".", "!", ",", ";"):
        tokens = tokens[:-1]
    while len(tokens) > 2 and tokens[0].text + tokens[-1].text in ("()", "[]"):
        tokens = tokens[1:-1]
    span = _quantity_at(tokens, 0)
    if not span or _units_end(tokens, span.end) < len(tokens) or len(tokens) - span.end > 5:
        return None
    variable = len(tokens) == span.end + 1 and tokens[-1].text in ("x", "y", "z", "n")
    return None if variable else span.quantity


# ---------------------------------------------------------------------------------------------------------
# Layer 4c: the one quantity that a statement commits to

_CLAUSE = _words("because since as after before when while if given where once until unless considering due")
_RESULT = _words("so thus hence therefore then which giving leaving meaning making totaling totalling")
_ESTIMATE = _words("about approximately approx around roughly nearly almost least most circa between")
_SPOILS = _ESTIMATE | _words("not isn't never than times plus minus")  # directly before a number: not its value
_CIRCUMSTANCE = _words("after in within during over every each per from than at with among by on until before for")
_DETERMINERS = _words("the all these those her his their its only just another next first last past a an")


def _read(text: str, leading: bool = False) -> Quantity | None:
    """The one quantity that a statement commits to.

    Args:
        leading: a quantity at the start of the statement is the answer, and what follows a remark. Right for
            text after a marker ("18, which is 3 more than 15"), wrong for free prose ("3 eggs cost $18").
    """
    tokens = _tokens(text)
    while _at(tokens, len(tokens) - 1) in (".", "!", ",", ";"):
        tokens.pop()
    if DOUBT.search(text) or _at(tokens, len(tokens) - 1) == "?":
        return None
    if not leading and _DENIED.search(text):
        return None
    if leading and (quantity := _leading(_without_remarks(tokens))):
        return quantity
    tokens = _last_clause(tokens)
    equals = [i for i, token in enumerate(tokens) if token.text in ("=", "equals")]
    if not equals:
        return _last_candidate(_without_remarks(tokens))
    right = tokens[equals[-1] + 1 :]
    span = _quantity_at(right, 0)
    if span and not _is_entangled(right, span):
        return span.quantity
    return _whole(_without_remarks(tokens[: equals[0]])) if right else None  # "18 = 9 * 2"


def _last_clause(tokens: list[_Token]) -> list[_Token]:
    """Drops "Since she had 20 eggs, " from the front, and reasons; what follows a last "so" or "leaving" is left."""
    for i, token in enumerate(tokens):
        if token.text in ("because", "since") and _has_number(tokens[:i]):
            end = next((j for j in range(i, len(tokens)) if tokens[j].text == ","), len(tokens))
            tokens = tokens[:i] + tokens[end:]
            break
    if _at(tokens, 0) in _CLAUSE:
        comma = next((i for i, token in enumerate(tokens) if token.text == ","), None)
        if comma and _has_number(tokens[comma:]):
            tokens = tokens[comma + 1 :]
    for i in range(len(tokens) - 1, -1, -1):
        if tokens[i].text in _RESULT and _has_number(tokens[i:]):
            return tokens[i + 1 :]
    return tokens


def _without_remarks(tokens: list[_Token]) -> list[_Token]:
    """Drops parentheses, subordinate clauses, "not 17" and "of the 20", as long as a number remains."""
    tokens = _without_parentheses(tokens)
    i = 0
    while i < len(tokens):
        word, following = tokens[i].text, _at(tokens, i + 1)
        numbers = (j for j in range(i + 1, len(tokens)) if tokens[j].kind == "num")
        end = i
        if word in _CLAUSE or (word in ("out", "instead") and following == "of"):
            end = next((j for j in range(i, len(tokens)) if tokens[j].text in (",", ";")), len(tokens))
        elif word in ("not", "isn't", "wasn't") or (word == "than" and _at(tokens, i - 1) == "rather"):
            end = next(numbers, i - 1) + 1
        elif word == "of" and following in ("which", "them", "whom"):
            i -= 1  # ", 3 of which are red"
            end = len(tokens)
        elif word == "of" and i and tokens[i - 1].kind == "num" and (number := next(numbers, len(tokens))) < i + 4:
            end = number + 1
        rest = tokens[:i] + tokens[end:]
        if end > i and _has_number(rest):
            tokens = rest
        else:
            i += 1
    return tokens


def _without_parentheses(tokens: list[_Token]) -> list[_Token]:
    """Drops remarks in parentheses; keeps operands ("2(9)", "20 - (2)") and alternatives ("(or 19)")."""
    kept: list[_Token] = []
    depth = 0
    for i, token in enumerate(tokens):
        if token.text in ("(", "["):
            operand = i > 0 and (tokens[i - 1].kind == "op" or tokens[i - 1].end == token.start)
            depth += bool(depth or not (operand or _at(tokens, i + 1) == "or"))
        if not depth:
            kept.append(token)
        elif token.text in (")", "]"):
            depth -= 1
    return kept if _has_number(kept) else tokens


def _leading(tokens: list[_Token]) -> Quantity | None:
    """The quantity at the start, if what follows are units or a remark, and no second number or operation."""
    if whole := _whole(tokens):
        return whole
    span = _quantity_at(tokens, 0)
    if not span or _is_entangled(tokens, span):
        return None
    for token in tokens[span.end :]:
        if token.kind == "num":  # "3 dozen eggs cost $18"
            return None
        if token.text in (",", ";", ":", ".", "(", "!", "—", "and", "but"):  # a remark begins
            break
    return span.quantity


def _is_entangled(tokens: list[_Token], span: _Span) -> bool:
    """Whether an operation or an alternative follows the quantity, so that it is no result by itself."""
    i = _units_end(tokens, span.end)
    if i == len(tokens):
        return False
    text = tokens[i].text
    if text == "(":  # 2(9) and 18 (or 19), but not 18 (in dollars)
        return tokens[i].start == tokens[i - 1].end or _at(tokens, i + 1) == "or"
    if text in (",", "to", "and", "&"):
        return _at(tokens, i + 1) in ("or", "maybe") or _quantity_at(tokens, i + 1) is not None
    comparison = text in ("more", "less", "fewer") and _at(tokens, i + 1) == "than" and _has_number(tokens[i:])
    juxtaposed = i == span.end and tokens[i].kind == "num"
    return (
        comparison or juxtaposed or tokens[i].kind == "op" or text in ("or", "plus", "minus", "times", "divided", "…")
    )


def _last_candidate(tokens: list[_Token]) -> Quantity | None:
    """The last number of a prose statement that is no mere circumstance ("after 3 days"), if it stands alone."""
    spans = _quantities(tokens)
    main = [span for span in spans if not _is_circumstance(tokens, span)] or spans[-1:]
    if not main or _is_spoilt(tokens, main[-1]):
        return None
    chosen = main[-1]
    for other in spans:
        first, second = sorted((other, chosen))
        if other.value != chosen.value and _is_alternative(tokens[first.end : second.start]):
            return None
    return chosen.quantity


def _is_spoilt(tokens: list[_Token], span: _Span) -> bool:
    """Whether the number is an operand, an estimate, a bound or a label, not a value that is stated."""
    before = tokens[span.start - 1] if span.start else None
    follower = _at(tokens, _units_end(tokens, span.end))
    # Lists and ranges are judged by `_is_alternative`, with the units in between.
    if follower not in (",", "to", "and", "&") and _is_entangled(tokens, span):
        return True
    if not before:
        return False
    glued = before.end == tokens[span.start].start and len(before.text) == 1 and before.text.isalpha()  # x1, A18
    argument = before.text == "(" and span.start > 1 and tokens[span.start - 2].end == before.start  # f(18)
    return glued or argument or (before.kind == "op" and before.text not in ":=") or before.text in _SPOILS


def _is_alternative(between: list[_Token]) -> bool:
    """Whether the words between two numbers make them alternatives, a range or a list."""
    words = [token.text for token in between]
    links = [word for word in words if word in (",", "and", "or", "to", "&", "|", "-", "/", ";")]
    return bool(links) and len(words) - len(links) <= (2 if "or" in links or "to" in links else 1)


def _is_circumstance(tokens: list[_Token], span: _Span) -> bool:
    """Whether the number says when, where, or from what ("in 3 days", "at $2 each"), but not "for $18"."""
    i = span.start - 1
    if i >= 2 and tokens[i].text == "of" and tokens[i - 1].text not in ("total", "sum"):
        i -= 2  # "on an investment of $130"
    while _at(tokens, i) in _DETERMINERS:
        i -= 1
    priced = tokens[span.start].source[: tokens[span.start].start].rstrip().endswith("$")
    return _at(tokens, i) in _CIRCUMSTANCE and not (_at(tokens, i) == "for" and priced)
