r"""Which answer does a response commit to? Marked answers first, then prose in flexible mode.

The last commitment counts: a later box replaces an earlier one, "the answer is …" after a box replaces the box, and
so does a correction in so many words ("wait, it is …"). Boxes that one statement gives together (`\boxed{1}` and
`\boxed{2}`) are one list. In strict mode only marks count.
"""

from __future__ import annotations

import itertools
import re
from typing import Literal

from ..responses import (
    Marked,
    first_sentence,
    last_lines,
    marked,
    own_turn,
    says_anything,
    spoken,
    taken_back,
    without_thoughts,
)
from .latex import Unreadable
from .tree import parse

Mode = Literal["flexible", "strict"]

_JOINT = re.compile(r"[\s$.]{0,6}(?:,|;|\band\b|\bor\b|,\s?and\b|,\s?or\b|\\quad|\\text\{\s?(?:and|or)\s?\})[\s$]{0,6}"
                    r"(?:[A-Za-z]\w{0,3}\s?=\s?)?[$\s]{0,3}")  # fmt: skip


_ROWS = re.compile(r"\\(?:begin|end)\{(?:align|aligned|equation|gather|gathered|split)\*?\}|\\\\\s*\n")


def answers(response: str, mode: Mode) -> list[str]:
    """The texts that may be the answer of a response: none, one, or ways to read the same words."""
    text = own_turn(without_thoughts(response).strip())
    marks, fragment = marked(text)
    found: list[str] = []
    end = 0
    if marks:
        last = marks[-1]
        end = last.end
        found = _contents(text, marks, mode)
    tail = text[end:]
    if fragment is not None:  # a mark that was cut off says nothing; what was committed before it stands
        tail = re.split(r"\\?f?boxed|<\s?answer", tail)[0]
    if mode == "flexible":
        tail = _ROWS.sub("\n", tail).replace("&=", "=")
        later = _spoken(tail, bool(marks))
        if later:
            found = later
        elif not marks:
            found = _final(tail)
    if marks:
        found = _corrected(found, tail, mode)
    return [answer for answer in found if answer.strip()]


def _contents(text: str, marks: list[Marked], mode: Mode) -> list[str]:
    last = marks[-1]
    if last.kind == "tag":
        inner, fragment = marked(last.content)
        if inner:
            return _contents(last.content, inner, mode)
        if fragment is not None:
            return []
        return _tag_content(last.content)
    if last.kind == "hash":
        return _sentence_answers(last.content.strip())
    joined = [_inner(last.content)]
    for before, after in zip(marks[-2::-1], marks[:0:-1], strict=False):
        between = text[before.end : after.start]
        if before.kind != "box" or not _JOINT.fullmatch(between):
            break
        joined.append(_inner(before.content))
    if len(joined) > 1:
        return [" , ".join(reversed(joined))]
    return [joined[0]]


_NESTED = re.compile(r"\s*\\f?box(?:ed)?\s?\{(.*)\}\s*", re.DOTALL)


def _inner(content: str) -> str:
    """The content of a box in a box; a line of its own is not needed."""
    for _ in range(8):
        nested = _NESTED.fullmatch(content)
        if not nested:
            break
        content = nested[1]
    return _labelled(content)


_ANSWER_LABEL = re.compile(
    r"^\s*(?:\\text\{\s?)?(?:the\s+)?(?:final\s+)?answer\s?(?:is\b|:|=)\s?\}?\s*:?", re.IGNORECASE
)


def _labelled(content: str) -> str:
    """Drops "Answer:" at the start of a marked answer."""
    match = _ANSWER_LABEL.match(content)
    if not match or not says_anything(content[match.end() :]):
        return content
    rest = content[match.end() :]
    return rest.rstrip("}") if rest.count("}") > rest.count("{") else rest


def _tag_content(content: str) -> list[str]:
    content = content.strip()
    lines = [line for line in content.split("\n") if says_anything(line)]
    if len(lines) == 1:
        found = _sentence_answers(lines[0].strip())
        return [_labelled(content), *found]
    said = spoken(content)
    if said and said[0].content:
        return _sentence_answers(said[0].content)
    whole = [" ".join(lines)]
    return whole if "\\begin" in content else whole + _sentence_answers(lines[-1].strip())


# ---------------------------------------------------------------------------------------------------------
# Prose


def _spoken(tail: str, after_mark: bool) -> list[str]:
    """What "the answer is …" says. After a mark only mathematics or a single word replaces it."""
    for said in spoken(tail):
        if not said.content:
            return [] if after_mark else [""]
        if after_mark and not _is_mathematics(said.content):
            continue
        found = _sentence_answers(said.content)
        # "The answer is 2a + 1 = 5" gives 5; in a box that would be an equation.
        if "=" in found[-1] and not re.search(r"[<>,]|\\(?:[lg]e|text|pm)", found[-1]):
            found.append(_cleaned(found[-1].rpartition("=")[2]))
        return found
    return []


def _is_mathematics(text: str) -> bool:
    try:
        node = parse(_cleaned(text))
    except Unreadable:
        return bool(re.search(r"\$[^$]+\$", text))
    return node.head != "text"


def _cleaned(text: str) -> str:
    text = text.strip().strip("*_").strip()
    text = re.sub(r"[.!;,]+(?=[\"'”’)*_\s]*$)", "", text)
    return text.strip("*_ ")


_MATH = re.compile(r"\$\$(.{1,2000}?)\$\$|\$([^$]{1,2000})\$|\\\((.{1,2000}?)\\\)|\\\[(.{1,2000}?)\\\]", re.DOTALL)
_LINKED = re.compile(
    r"(?:.*\b(?:is|are|equals|equal to|be|gives|get|obtain|find|have|yields|=|:)\s*[:,]?)\s+", re.DOTALL | re.I
)


def _sentence_answers(sentence: str) -> list[str]:
    """The ways to read the answer of one sentence, the most literal one first."""
    sentence = _cleaned(sentence)
    found = [sentence]
    spans = list(_MATH.finditer(sentence))
    if spans:
        last = spans[-1]
        outside = _MATH.sub(" ", sentence)
        several = (
            len(spans) > 1
            and re.fullmatch(
                r"[\s,;.]*(?:(?:or|and)[\s,;.]*)*", sentence[spans[0].end() : last.start()].replace("$", "")
            )
            is None
        )
        joint = len(spans) > 1 and all(
            re.fullmatch(r"\s*(?:,|;|or|and|,\s?and|,\s?or)\s*", sentence[a.end() : b.start()])
            for a, b in itertools.pairwise(spans)
        )
        if joint:
            found.append(" , ".join(_span(match) for match in spans))
        elif len(spans) == 1 or several:
            after = sentence[last.end() :].strip()
            found.append(_span(last) + (rf" \text{{ {after} }}" if re.fullmatch(r"[A-Za-z ]{1,40}", after) else ""))
            if not re.search(r"\b(?:or|not)\b", outside):
                found.append(_span(last))
    else:
        linked = _LINKED.match(sentence)
        if linked:
            found.append(_cleaned(sentence[linked.end() :]))
        labels = len(re.findall(r"[A-Za-z)]\s*=", sentence))
        several = bool(re.search(r"\b(?:or|and)\b", sentence)) or ("," in sentence and labels > 1)
        if "=" in sentence and not several:
            found.append(_cleaned(sentence.rpartition("=")[2]))
        bold = re.findall(r"\*\*([^*]{1,200})\*\*", sentence)
        if bold:
            found.append(_cleaned(bold[-1]))
    if len(steps := _IMPLIES.split(found[-1])) > 1:
        found.append(_cleaned(steps[-1]))
    if not spans:
        trimmed = _cleaned(_REMARK.split(sentence, maxsplit=1)[0])
        if trimmed and trimmed != sentence:
            found += _sentence_answers(trimmed)
        quantities = _QUANTITY.findall(sentence)
        if len(quantities) == 1 and not _INEXACT.search(sentence):
            found.append(quantities[0])
    return list(dict.fromkeys(found))


_INEXACT = re.compile(
    r"[=<>≠≤≥≈^\\(\[]|\b(?:dozen|hundred|thousand|million|billion|trillion|not|or|about|around|approx\w*|roughly|almost"
    r"|nearly|over|under|least|most|than|up to)\b",
    re.I,
)
_IMPLIES = re.compile(r"\\(?:implies|Rightarrow|Longrightarrow|therefore|iff)(?![A-Za-z])|=>|⇒|⟹|∴")
_REMARK = re.compile(r",?\s+(?:which|since|because|as|where|when|so|with|for|after)\b|,?\s\((?=[A-Za-z])")
_QUANTITY = re.compile(r"(?<![\w.,])-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?(?![\w^])")


def _span(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None).strip()


_REFUSAL = re.compile(
    r"\b(?:i (?:do not|don['’]t|cannot|can['’]t|could not) (?:\w+ )?(?:know|determine|say|tell|answer|solve)|unable to"
    r"|maybe|perhaps|not sure|i guess|might be|could be|approximately|roughly)\b|\?\W*$",
    re.IGNORECASE,
)
_DANGLING = re.compile(
    r"(?:[-+/^=×÷≈,:(\[{<&…−–]|\s\*|\\(?:times|cdot|div|frac)|\.\.\.|\b(?:the|(?-i:an?)|of|to|and|or|is|are|with|by|then|so"
    r"|we|let|first|next|now))[\s$*\\(\[]*$",
    re.IGNORECASE,
)
_WORK = re.compile(r"^\W*(?:let|suppose|assume|first|consider|next|now|step|we need|to find|note)\b", re.IGNORECASE)


def _final(text: str) -> list[str]:
    """The answer in the last line of an unmarked text, unless the text ends in mid-work."""
    if not text or _DANGLING.search(text[-60:]) or text[-60:].rstrip().endswith("\\"):
        return []
    display = re.search(r"(?:\$\$([^$]{1,2000})\$\$|\\\[((?:(?!\\\[).){1,2000}?)\\\])\W*$", text[-2_100:], re.DOTALL)
    if display and "\n" in display[0].strip():
        inner = " ".join((display[1] or display[2]).split())
        return _sentence_answers(f"${inner}$")
    lines = last_lines(text, 1)
    if not lines or len(lines[0]) > 2_000:
        return []
    line = re.sub(r"^\s*(?:>|[-*•]\s|#{1,6}\s)\s*", "", lines[0])
    sentence = _last_sentence(line)
    if _REFUSAL.search(sentence) or _WORK.match(sentence):
        return []
    return _sentence_answers(sentence)


def _last_sentence(line: str) -> str:
    rest = line
    for _ in range(50):
        head = first_sentence(rest)
        following = rest[len(head) :].lstrip(".!?。\"'”’)* ]")
        if not following or not says_anything(following):
            return head if says_anything(head) else rest
        rest = following
    return rest


def _corrected(found: list[str], tail: str, mode: Mode) -> list[str]:
    """The answer after a correction in so many words: the new one, or none."""
    disowned, instead = taken_back(tail)
    for sentence in instead:
        candidate = _cleaned(sentence)
        if candidate and len(candidate) < 120 and re.search(r"\d|\\|\$", candidate) and _is_mathematics(candidate):
            return _sentence_answers(candidate) if mode == "flexible" else (found if candidate in found else [])
    if disowned:
        return _spoken(tail, True) if mode == "flexible" else []
    return found
