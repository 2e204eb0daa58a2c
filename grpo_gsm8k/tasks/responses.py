r"""What a response commits to, as text: thoughts removed, the last mark found, or the last words read.

Tasks whose answers are texts (LaTeX, a calculation, a list of words) share this reading; each of them compares in
its own way.

- *Thoughts* never count, closed or not; a closing tag without an opening one ends a thought the prompt began.
- *Marks* are `\boxed{…}`, `\fbox{…}`, `<answer>…</answer>` and `#### …`. The last one that says anything wins.
  A mark that the end of the text cut off marks nothing, and must not contradict what was marked before.
- *Prose* commits by "the answer is …", "Answer: …", an answer heading, or the last line.

Every step is linear in the response, or works on a bounded excerpt of it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_ANSWER = 20_000  # characters of one marked answer that are read
MAX_WINDOW = 20_000  # characters at the end of a text from which prose is read
MAX_MARKS = 64  # marks without content that are passed over before giving up

_THOUGHT = re.compile(
    r"<\s?(?P<close>/?)\s?(?:think|thinking|thoughts?|reasoning|scratchpad)\s?>"
    r"|\[(?P<close2>/?)THINK\]|<\|(?P<kind3>begin|end)_of_thought\|>|◁(?P<close4>/?)think▷",
    re.IGNORECASE,
)


def without_thoughts(text: str) -> str:
    """The text outside the thoughts. Thoughts nest; one that is never closed runs to the end."""
    said: list[str] = []
    depth = position = opened_at = 0
    for match in _THOUGHT.finditer(text):
        closes = any((match["close"], match["close2"], match["close4"], match["kind3"] in ("end", "END")))
        if depth == 0:
            said.append(text[position : match.start()])
        position = match.end()
        if closes:
            if depth == 0:
                said.clear()
            depth = max(depth - 1, 0)
        else:
            # `<think>` twice in a row is a stutter (prompt templates cause it), not a thought in a thought.
            stutter = depth > 0 and not text[opened_at : match.start()].strip()
            depth, opened_at = depth + (not stutter), match.end()
    if depth == 0:
        said.append(text[position:])
    return "".join(said)


_MARK = re.compile(r"boxed|fbox|\x08oxed|\x0cbox|<\s?answer\s?>|####", re.IGNORECASE)
_SPOKEN_START = re.compile(r"\banswer\b[^\n.?!]{0,40}?(?:\bis\b|:)", re.IGNORECASE)
_NEXT_TURN = re.compile(
    r"<\|[a-z_]{2,24}\|>|</s>"
    r"|\n[ #*]{0,8}(?:question|q|problem|exercise|human|user|instruction)\b[ \d*]{0,6}:",
    re.IGNORECASE,
)


def own_turn(text: str) -> str:
    """Drops what a model makes up after its turn: an end-of-turn token, or a new question once it answered."""
    starts = [match.end() for match in (_MARK.search(text), _SPOKEN_START.search(text[:MAX_WINDOW])) if match]
    answered = min(starts, default=len(text))
    for match in _NEXT_TURN.finditer(text):
        if match.start() > (0 if match.group()[0] == "<" else answered):
            return text[: match.start()].rstrip()
    return text


class Marked(NamedTuple):
    """A marked answer: what it says, where the mark starts, and where it ends."""

    content: str
    start: int
    end: int
    kind: str  # "box", "tag" or "hash"


def closing_brace(text: str, inside: int, limit: int = MAX_ANSWER) -> int:
    """The position of the brace that closes the group starting at `inside`; -1 if there is none in reach."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, inside, inside + limit):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return -1


_BOX = re.compile(r"(?:\\{0,2}(?<![A-Za-z])(?:f?boxed|fbox|framebox)|\x08oxed|\x0cbox)(?P<rest>\s{0,3}\{)?")
_BARE = re.compile(r"\s?(\\d?frac\d\d|\\[A-Za-z]+|[^\s{}$\\]{1,40})")
_TAG = re.compile(r"<\s?answer\s?>", re.IGNORECASE)
_TAG_END = re.compile(r"<\s?/\s?answer\s?>", re.IGNORECASE)
REJECTED = re.compile(r"\b(?:not|instead of|rather than|isn't)[\s$*(\[\\]{0,8}$", re.IGNORECASE)
_HEADING = re.compile(
    r"\W*(?:(?:the\s+)?(?:final\s+)?answer\W*$|(?:step|part|case|method|option|problem|question|example|stage|solution)"
    r"\b)",
    re.IGNORECASE,
)


def says_anything(content: str) -> bool:
    r"""Whether there is more than blanks and punctuation; `\emptyset` and `∅` say something."""
    return any(character.isalnum() or character in "∅∞℞ℝ" for character in content)


def marked(text: str) -> tuple[list[Marked], str | None]:
    """The marked answers of a text that say anything (the last `MAX_MARKS`), and the fragment of one cut off."""
    fragment: str | None = None
    found: list[Marked] = []
    starts = [match.start() for match in re.finditer(r"boxed|fbox|framebox|\x08oxed|\x0cbox", text)]
    end_of_last = -1
    tail_starts = starts[-MAX_MARKS:]
    for start in tail_starts:
        if start < end_of_last:  # a box in a box
            continue
        mark, cut = _box_at(text, start)
        if mark:
            found.append(mark)
            end_of_last = mark.end
        elif cut is not None and fragment is None:
            fragment = cut
    tags, cut = _tags(text)
    if cut is not None:
        fragment = cut
    found = [mark for mark in found if not any(tag.start < mark.start < tag.end for tag in tags)]
    found += tags + _hashes(text)
    return sorted(found, key=lambda mark: mark.end), fragment


def _box_at(text: str, start: int) -> tuple[Marked | None, str | None]:
    r"""Reads `\boxed{18}`, `\boxed 18`, and `boxed{18}` whose backslash was lost on the way."""
    name_start = start
    while name_start > 0 and text[name_start - 1] == "\\" and start - name_start < 2:
        name_start -= 1
    match = _BOX.match(text, name_start)
    if not match:
        return None, None
    if match["rest"]:
        inside = match.end()
        end = closing_brace(text, inside)
        if end < 0:
            fragment = text[inside : inside + MAX_ANSWER].strip()
            # With further lines after it, the mark was merely malformed: it marks nothing, but the text goes on.
            return None, (fragment if "\n" not in fragment else None)
        content, end = text[inside:end], end + 1
    else:
        bare = _BARE.match(text, match.end())
        if not bare or name_start == start:  # the word "boxed" in prose
            return None, None
        content, end = bare[1], bare.end()
    before = text[max(0, name_start - 40) : name_start]
    if not says_anything(content) and not re.search(r"\\(?:emptyset|varnothing|infty|\{)", content):
        return None, None
    if REJECTED.search(before):
        return None, None
    return Marked(content, name_start, end, "box"), None


def _tags(text: str) -> tuple[list[Marked], str | None]:
    """The contents of the last answer tags, and the fragment of one that is never closed."""
    opens = [match.span() for match in _TAG.finditer(text)][-MAX_MARKS:]
    closes = [match.span() for match in _TAG_END.finditer(text)]
    found: list[Marked] = []
    fragment = None
    index = 0
    for number, (start, inside) in enumerate(opens):
        following = opens[number + 1][0] if number + 1 < len(opens) else len(text)
        while index < len(closes) and closes[index][0] < inside:
            index += 1
        if index < len(closes) and closes[index][0] <= following:
            content = text[max(inside, closes[index][0] - MAX_ANSWER) : closes[index][0]]
            if says_anything(content[:MAX_WINDOW]):
                found.append(Marked(content, start, closes[index][1], "tag"))
        elif number + 1 == len(opens):
            fragment = text[inside : inside + MAX_ANSWER].strip()
    return found, fragment


def _hashes(text: str) -> list[Marked]:
    """The last line after `####`, or the next one if that is empty. A markdown heading is none."""
    end_of_search = len(text)
    for _ in range(MAX_MARKS):
        start = text.rfind("####", 0, end_of_search)
        if start < 0:
            break
        if text[start - 1 : start] == "#" or text[start + 4 : start + 5] == "#":
            end_of_search = len(text[:start].rstrip("#"))
            continue
        inside = start + 4
        end = line_end(text, inside)
        if not says_anything(text[inside:end]) or re.fullmatch(
            r"\W*(?:the\s+)?(?:final\s+)?answer\W*", text[inside:end], re.IGNORECASE
        ):
            inside = end
            end = line_end(text, end + 1 + len(text[end : end + 9]) - len(text[end : end + 9].lstrip()))
        content = text[inside:end].strip(" #\n\r\t")
        boxed = "boxed" in content
        if says_anything(content) and not boxed and not _HEADING.match(content) and not content.endswith(":"):
            return [Marked(content, start, end, "hash")]
        end_of_search = start
    return []


def line_end(text: str, start: int, limit: int = MAX_ANSWER) -> int:
    """Where the line ends, or where as much of it as is read."""
    end = text.find("\n", start, start + limit)
    return end if end >= 0 else min(len(text), start + limit)


class Spoken(NamedTuple):
    """What "the answer is …" says, and where it ends in the text it was found in."""

    content: str
    end: int


_SPOKEN = re.compile(
    r"\b(?:answer|ans|result(?! in\b| of\b)|solution(?:s| set)?)\b[^\n.:=?!]{0,80}?"
    r"(?P<link>\bis\b|\bare\b|\bequals\b|\b(?:should|must|would|will) be\b|[:=]|\s[-–—]\s|[^\w\n$\\]{0,12}$)"
    r"|(?P<link2>^\W{0,8}a\W{0,4}:)"
    r"|(?:答案|antwort|respuesta|réponse|risposta|resposta)\W{0,4}(?:是|为|為|ist|es|est|è|é|[:：])\s?[:：]?",
    re.IGNORECASE | re.MULTILINE,
)
DOUBT = re.compile(
    r"\b(?:maybe|perhaps|possibly|might|could be|may be|guess|unsure|not (?:\w+ )?(?:sure|certain))\b", re.I
)
_LEAD_IN = re.compile(
    r"[\s*:_`]*(?:(?:therefore|thus|simply|just|exactly|equal to|a total of|then|indeed|now|given by|as follows)\b"
    r"[\s,:*]*)*",
    re.I,
)


def spoken(text: str) -> list[Spoken]:
    """What the last statements of the form "the answer is …" say, the last one first. Doubts say nothing ("")."""
    offset = max(0, len(text) - MAX_WINDOW)
    window = text[offset:]
    found = []
    for match in list(_SPOKEN.finditer(window))[:-17:-1]:
        clause = window[match.end() : match.end() + 2_000]
        if not says_anything(clause.partition("\n")[0]) and "\\" not in clause.partition("\n")[0]:
            clause = clause.lstrip("*_ \t:\n\r")
            if clause.startswith(("$$", r"\[")):  # a display of several lines
                close = clause.find("$$" if clause[0] == "$" else r"\]", 2)
                clause = clause[: close + 2].replace("\n", " ") if close > 0 else clause
        elif clause.strip().startswith(("$$", r"\[")) and "\n" in clause.strip():
            clause = clause.strip()
            close = clause.find("$$" if clause[0] == "$" else r"\]", 2)
            clause = clause[: close + 2].replace("\n", " ") if close > 0 else clause
        clause = first_sentence(clause.partition("\n")[0])
        lead = _LEAD_IN.match(clause)
        clause = clause[lead.end() :] if lead else clause
        if not clause.strip() or clause.rstrip("*_ ").endswith("?"):
            continue
        doubtful = DOUBT.search(match.group()) or re.match(
            r"(?:either|between|roughly|not|maybe|perhaps)\b", clause, re.I
        )
        found.append(Spoken("" if doubtful else clause, offset + match.end() + len(clause)))
    return found


_SENTENCE_END = re.compile(r"[.!?。][\"'”’)*\]$]{0,4}\s+(?=[A-Z*\\\"$(#>]|$)")


def first_sentence(text: str) -> str:
    """The text up to the end of its first sentence; a full stop inside `$…$` ends none."""
    for match in _SENTENCE_END.finditer(text):
        before = text[: match.start()]
        if before.count("$") % 2 == 0 and not re.search(r"\b(?:approx|vs|sq|cu|e\.g|i\.e|a\.m|p\.m|Rs)$", before):
            return before
    return text


def last_lines(text: str, count: int = 4) -> list[str]:
    """The last lines that say anything, the last one first."""
    lines = text[-MAX_WINDOW:].split("\n")
    return [line.strip() for line in reversed(lines) if says_anything(line)][:count]


_TAKEN_BACK = re.compile(
    r"(?:^|[.!?\n)}$])[\s*>($]{0,6}(?:but\s+)?"
    r"(?:wait|actually|no|oops|hmm+|hold on|sorry|correction|scratch that|on second thought|my mistake|edit)"
    r"\b[\s,.:!…—–-]{0,6}",
    re.IGNORECASE,
)
DISOWNED = re.compile(
    r"(?:^|[.!?\n)}]|\b(?:wait|actually|no|oops|sorry|hmm+),?)\s{0,3}(?:but\s+)?(?:"
    r"(?:that|this|it|the above|my (?:previous )?answer|the (?:answer|result) above|the previous answer)"
    r"(?: answer| result)?\s?(?:is|was|'s|’s)\s(?:actually )?(?:wrong|incorrect|not right|not correct|a mistake)"
    r"|i (?:made|have made) an? (?:\w+ )?(?:mistake|error)|scratch that|i meant)",
    re.IGNORECASE,
)
_RESTATED = re.compile(
    r"(?:(?:it|this|that|the \w+(?: \w+)?)\s?(?:is|'s|’s|should be|must be|equals|=)\s|i meant\s)?"
    r"(?:actually |really )?",
    re.IGNORECASE,
)


def taken_back(tail: str) -> tuple[bool, list[str]]:
    """Whether the text after an answer takes it back in so many words, and what it may say instead."""
    tail = tail[:MAX_WINDOW]
    instead: list[str] = []
    for match in list(_TAKEN_BACK.finditer(tail))[:-9:-1]:
        sentence = first_sentence(tail[match.end() : match.end() + 1_000].partition("\n")[0])
        restated = _RESTATED.match(sentence)
        instead.append(sentence[restated.end() :] if restated else sentence)
    disowned = DISOWNED.search(tail)
    return bool(disowned), instead
