"""What leaves this process as text: without control codes for a terminal, without this machine's paths for the public.

Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# ECMA-48: CSI (colours, cursor), OSC, DCS, APC, PM, SOS (titles, links, clipboard), other two-byte sequences. The
# eight-bit forms of CSI and its kin are obeyed by some terminals.
_ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
# What is left of the control characters, and what reorders the text around it: bidirectional marks, line separators.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
# A path of two parts or more: absolute, below a home folder, or on a Windows drive; not a URL's, nor a closing tag.
_ROOT = r"(?:file://)?(?:~[\w.-]*/|/(?=[^/\s]+/)|[A-Za-z]:[\\/](?!/))"
_PATH = re.compile(rf"(?<![\w<>./~\\-]){_ROOT}[^\s,;:'\"`()\[\]{{}}<>|]+")
_HOME = re.compile(r"(?:file://)?(?:[A-Za-z]:)?[\\/](?:home|Users)[\\/][^\\/]+[\\/]?")
_HUB_CACHE = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]+/?$")


def printable(text: str) -> str:
    """The text without terminal sequences; other control characters are shown as escapes.

    Newlines and tabs stay. Of a line that was rewritten with carriage returns, as progress bars do, the last state
    stays.
    """
    text = _ESCAPE.sub("", text)
    if "\r" in text:
        text = "\n".join(_last_state(line) for line in text.split("\n"))
    return _CONTROL.sub(lambda match: _escaped(match[0]), text)


def one_line(text: str, most: int = 300) -> str:
    """The beginning of a text from elsewhere, on one line."""
    return printable(" ".join(text.split()))[:most]


def printable_json(text: str) -> str:
    """JSON with the characters that `printable` shows as escapes written as JSON escapes: the same value."""
    return _CONTROL.sub(lambda match: match[0] if match[0] < " " else f"\\u{ord(match[0]):04x}", text)


def _last_state(line: str) -> str:
    return next((state for state in reversed(line.split("\r")) if state), "")


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def without_paths(text: str) -> str:
    """The text with every absolute path replaced by its last part, and by the model's id where the hub's cache has it.

    A path tells names of users, machines and projects. Those of URLs stay.
    """
    return _PATH.sub(lambda match: _public_name(match[0]), text)


def _public_name(path: str) -> str:
    if cached := _HUB_CACHE.search(path):
        return f"{cached[1]}/{cached[2]}"
    if _HOME.fullmatch(path):  # its last part is the user's name
        return "~"
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def publishable(value: Any) -> Any:
    """A JSON-like value with `without_paths` applied to every text in it."""
    if isinstance(value, str):
        return _public_name(value) if _is_path(value) else without_paths(value)
    if isinstance(value, Mapping):
        return {key: publishable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [publishable(item) for item in value]
    return str(value) if isinstance(value, bytes) else value


def without_whole_paths(value: Any) -> Any:
    """A JSON-like value in which each text that is an absolute path as a whole is replaced as `without_paths` does.

    Other texts, such as a chat template, are what they were.
    """
    if isinstance(value, str):
        return _public_name(value) if _is_path(value) else value
    if isinstance(value, Mapping):
        return {key: without_whole_paths(item) for key, item in value.items()}
    return [without_whole_paths(item) for item in value] if isinstance(value, list | tuple) else value


def _is_path(value: str) -> bool:
    """Whether the whole text is one path, blanks and all."""
    return bool(re.match(_ROOT, value)) and not re.search(r"[\n,;:]", value[2:])
