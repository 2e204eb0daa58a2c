"""Chat JSONL: checks a whole file, and reads conversations for SFT.

A row is `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}`: at most
one system message, which comes first, then user and assistant in turns, the assistant last. Or it is
`{"prompt": "…", "response": "…"}` (or `completion`), a user and an assistant message; with `"raw": true` its prompt is
the text as the model reads it, without a chat's turns. Other keys are allowed and ignored.

`validate` and every training command read through `read_chat`, so they share one check.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from grpo_gsm8k.datatypes import Source
from grpo_gsm8k.errors import DataError
from grpo_gsm8k.runs.files import json_type, parse_line, read_lines

ROLES = ("system", "user", "assistant")
ANSWER_KEYS = ("response", "completion")  # of a row with a prompt


class Fault(TypedDict):
    """An error in one line (1-based; 0 for the whole file)."""

    line: int
    what: str


@dataclass(frozen=True)
class ChatReport:
    """The result of `check_chat`.

    Attributes:
        ok: the file has rows, and none has an error.
        rows: number of non-blank lines.
        errors: all errors, in file order.
        stats: of the valid rows: `rows`; `turns` (messages of a row) and `characters` (all contents of a row)
            with `min`, `mean` and `max`; `roles`, the number of messages of each.
    """

    ok: bool
    rows: int
    errors: list[Fault]
    stats: dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """A conversation to train on: (role, content) pairs, the assistant last; `raw`: plain text without chat turns."""

    messages: tuple[tuple[str, str], ...]
    raw: bool = False
    source: Source | None = field(default=None, compare=False, repr=False)


def check_chat(path: Path) -> ChatReport:
    """Check a chat JSONL file in one pass, line by line, and collect all errors.

    Raises:
        DataError: the file does not exist or cannot be read.
    """
    errors: list[Fault] = []
    stats = _Stats()
    rows = 0
    if Path(path).is_file() and Path(path).stat().st_size == 0:
        return ChatReport(False, 0, [{"line": 0, "what": "the file is empty"}], stats.as_dict())
    for line, raw in read_lines(path):
        rows += bool(raw.strip())
        example, faults = read_chat(raw)
        errors.extend({"line": line, "what": what} for what in faults)
        if example:
            stats.add(example)
    return ChatReport(ok=not errors, rows=rows, errors=errors, stats=stats.as_dict())


def iter_pairs(path: Path) -> Iterator[Conversation]:
    """The conversations of a file of chat rows or prompt/response rows, in its order.

    Raises:
        DataError: names the file and the line of the first fault.
    """
    for line, raw in read_lines(path):
        example, faults = read_chat(raw)
        if example is None:
            raise DataError(path, f"{faults[0]}; `grpo-gsm8k validate --data {path}` lists every error", line)
        yield replace(example, source=Source(str(path), line))


def load_pairs(path: Path) -> list[Conversation]:
    """All of `iter_pairs`."""
    return list(iter_pairs(path))


def read_chat(raw: bytes) -> tuple[Conversation | None, list[str]]:
    """The conversation in one line of a file, or all of its errors."""
    try:
        row = parse_line(raw)
    except ValueError as fault:
        return None, [str(fault)]
    return conversation_of(row)


def conversation_of(row: Mapping[str, Any], answered: bool = True) -> tuple[Conversation | None, list[str]]:
    """The conversation in one row, or all of its errors.

    Args:
        answered: the last message must be the assistant's.
    """
    pair = "messages" not in row and any(key in row for key in ("prompt", *ANSWER_KEYS))
    if pair:
        answer = next((key for key in ANSWER_KEYS if key in row), ANSWER_KEYS[0])
        faults = _pair_faults(row, answer)
        said = () if faults else (("user", row["prompt"]), ("assistant", row[answer]))
        return (None, faults) if faults else (Conversation(said, row.get("raw", False)), [])
    if faults := _faults(row, answered):
        return None, faults
    return Conversation(tuple((message["role"], message["content"]) for message in row["messages"])), []


def _pair_faults(row: Mapping[str, Any], answer: str) -> list[str]:
    raw = row.get("raw", False)
    wrong = [] if isinstance(raw, bool) else [f"raw must be true or false, not {json_type(raw)}"]
    return [*_text_faults(row, "prompt", "prompt"), *_text_faults(row, answer, answer), *wrong]


def _text_faults(row: Mapping[str, Any], key: str, name: str) -> list[str]:
    if key not in row:
        return [f"{name} is missing"]
    if not isinstance(row[key], str):
        return [f"{name} must be text, not {json_type(row[key])}"]
    return [] if row[key].strip() else [f"{name} is empty"]


def _faults(row: Mapping[str, Any], answered: bool = True) -> list[str]:
    """All errors of a row; checks the order of roles only if every role is known."""
    messages = row.get("messages")
    if "messages" not in row:
        return [f"messages is missing; the row has {', '.join(map(repr, row)) or 'no keys'}"]
    if not isinstance(messages, list):
        return [f"messages must be an array, not {json_type(messages)}"]
    if not messages:
        return ["messages is empty"]
    faults: list[str] = []
    roles: list[str] = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            faults.append(f"messages[{i}] must be an object, not {json_type(message)}")
            continue
        role = message.get("role")
        if role in ROLES:
            roles.append(role)
        elif "role" in message:
            faults.append(f"messages[{i}].role is {role!r}, which is none of {', '.join(ROLES)}")
        else:
            faults.append(f"messages[{i}].role is missing")
        faults += _text_faults(message, "content", f"messages[{i}].content")
    return faults + _order_faults(roles, answered) if len(roles) == len(messages) else faults


def _order_faults(roles: Sequence[str], answered: bool) -> list[str]:
    faults = [
        f"messages[{i}].role is system, which may only be the first message"
        for i, role in enumerate(roles)
        if role == "system" and i > 0
    ]
    turns = [(i, role) for i, role in enumerate(roles) if role != "system"]
    for turn, (i, role) in enumerate(turns):
        previous = turns[turn - 1][1] if turn else "assistant"  # a conversation begins with the user
        if role == previous:
            where = f"follows another {role} message" if turn else "comes before any user message"
            faults.append(f"messages[{i}].role is {role}, which {where}; user and assistant take turns")
    if not answered:
        if "user" not in roles:
            faults.append("messages has no user message, so there is nothing to answer")
    elif "assistant" not in roles:
        faults.append("messages has no assistant message, so there is nothing to learn")
    elif roles[-1] != "assistant":
        faults.append(f"messages ends with {roles[-1]}; the last message must be the assistant's")
    return faults


class _Stats:
    """Counts turns, characters and roles."""

    def __init__(self) -> None:
        self.roles: Counter[str] = Counter()
        self.turns, self.characters = _Spread(), _Spread()

    def add(self, example: Conversation) -> None:
        self.roles.update(role for role, _ in example.messages)
        self.turns.add(len(example.messages))
        self.characters.add(sum(len(text) for _, text in example.messages))

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.turns.n,
            "turns": self.turns.as_dict(),
            "characters": self.characters.as_dict(),
            "roles": {role: self.roles[role] for role in ROLES},
        }


class _Spread:
    """Minimum, mean and maximum of the numbers so far."""

    def __init__(self) -> None:
        self.n = self.total = self.least = self.most = 0

    def add(self, value: int) -> None:
        self.least = min(self.least, value) if self.n else value
        self.n, self.total, self.most = self.n + 1, self.total + value, max(self.most, value)

    def as_dict(self) -> dict[str, float]:
        return {"min": self.least, "mean": self.total / max(self.n, 1), "max": self.most}
