"""Chat JSONL: checking a whole file, and reading the conversations that SFT learns from.

A row is `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}`: at most
one system message, which comes first, then user and assistant in turns, the assistant last. Other keys are
allowed and ignored. `load_pairs` also takes `{"prompt": "…", "response": "…"}`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from grpo_gsm8k.errors import DataError
from grpo_gsm8k.runs.files import json_type, parse_line, read_jsonl, read_lines

ROLES = ("system", "user", "assistant")


class Fault(TypedDict):
    """What is wrong in one line (1-based; 0 for the file as a whole)."""

    line: int
    what: str


@dataclass(frozen=True)
class ChatReport:
    """What `check_chat` found.

    Attributes:
        ok: there are rows, and none has a fault.
        rows: lines that are not blank, sound or not.
        errors: every fault, in the order of the file.
        stats: of the sound rows: `rows`; `turns` (messages of a row) and `characters` (all contents of a row)
            with `min`, `mean` and `max`; `roles`, the number of messages of each.
    """

    ok: bool
    rows: int
    errors: list[Fault]
    stats: dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A conversation to learn from: (role, content) pairs, the assistant last."""

    messages: tuple[tuple[str, str], ...]


def check_chat(path: Path) -> ChatReport:
    """Check every line of a chat JSONL file and name every fault in one pass.

    Raises:
        DataError: the file does not exist or cannot be read.
    """
    errors: list[Fault] = []
    sound: list[Example] = []
    rows = 0
    if Path(path).is_file() and Path(path).stat().st_size == 0:
        return ChatReport(False, 0, [{"line": 0, "what": "the file is empty"}], _stats([]))
    for line, raw in read_lines(path):
        rows += bool(raw.strip())
        try:
            row = parse_line(raw)
        except ValueError as fault:
            errors.append({"line": line, "what": str(fault)})
            continue
        faults = _faults(row)
        errors.extend({"line": line, "what": what} for what in faults)
        if not faults:
            sound.append(_example(row))
    return ChatReport(ok=not errors, rows=rows, errors=errors, stats=_stats(sound))


def load_pairs(path: Path) -> list[Example]:
    """The conversations of a file of chat rows or prompt/response rows.

    Raises:
        DataError: names the file and the line of the first fault.
    """
    examples = []
    for line, row in read_jsonl(path):
        if "messages" not in row and ("prompt" in row or "response" in row):
            messages: list[dict[str, Any]] = [{"role": "user"}, {"role": "assistant"}]
            for message, key in zip(messages, ("prompt", "response"), strict=True):
                if key in row:
                    message["content"] = row[key]
            row = {"messages": messages}
            names = {"messages[0].content": "prompt", "messages[1].content": "response"}
        else:
            names = {}
        for what in _faults(row):
            place, _, rest = what.partition(" ")
            raise DataError(path, f"{names.get(place, place)} {rest}", line)
        examples.append(_example(row))
    return examples


def _faults(row: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with a row; the order of roles is judged only where every role is known."""
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
        content = message.get("content")
        if "content" not in message:
            faults.append(f"messages[{i}].content is missing")
        elif not isinstance(content, str):
            faults.append(f"messages[{i}].content must be text, not {json_type(content)}")
        elif not content.strip():
            faults.append(f"messages[{i}].content is empty")
    return faults + _order_faults(roles) if len(roles) == len(messages) else faults


def _order_faults(roles: Sequence[str]) -> list[str]:
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
    if "assistant" not in roles:
        faults.append("messages has no assistant message, so there is nothing to learn")
    elif roles[-1] != "assistant":
        faults.append(f"messages ends with {roles[-1]}; the last message must be the assistant's")
    return faults


def _example(row: Mapping[str, Any]) -> Example:
    return Example(tuple((message["role"], message["content"]) for message in row["messages"]))


def _stats(examples: Sequence[Example]) -> dict[str, Any]:
    roles = Counter(role for example in examples for role, _ in example.messages)
    return {
        "rows": len(examples),
        "turns": _spread([len(example.messages) for example in examples]),
        "characters": _spread([sum(len(text) for _, text in example.messages) for example in examples]),
        "roles": {role: roles[role] for role in ROLES},
    }


def _spread(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {"min": 0, "mean": 0.0, "max": 0}
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
