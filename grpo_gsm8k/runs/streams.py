"""Handles stdout and stderr: any encoding, a full disk, a reader that closed the pipe."""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from grpo_gsm8k.errors import DiskError, GrpoError

PLAIN = {"→": "->", "←": "<-", "×": "x", "…": "...", "–": "-", "—": "-", "−": "-", "‘": "'", "’": "'", "Δ": "d"}
PLAIN |= {"“": '"', "”": '"', "\u00a0": " ", "·": "-", "✓": "ok", "±": "+-", "•": "*"}


class ReaderGone(GrpoError):
    """The reader of stdout closed the pipe, as `| head` does."""


def _plainly(fault: UnicodeError) -> tuple[str, int]:
    if not isinstance(fault, UnicodeEncodeError):
        raise fault
    return "".join(PLAIN.get(letter, "?") for letter in fault.object[fault.start : fault.end]), fault.end


def serve_any_encoding() -> None:
    """Escape characters that the terminal's encoding lacks, instead of failing."""
    sys.stdout = sys.stdout or _nowhere()  # None if it was closed at the start
    sys.stderr = sys.stderr or _nowhere()
    codecs.register_error("grpo_gsm8k.plain", _plainly)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a test's replacement, or closed
            stream.reconfigure(errors="grpo_gsm8k.plain")  # type: ignore[union-attr]


def as_json(result: Mapping[str, Any]) -> str:
    """A JSON object in characters that stdout can encode."""
    text = json.dumps(result, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeError:
        return json.dumps(result)
    return text


@contextlib.contextmanager
def stdout_errors() -> Iterator[None]:
    """Flush stdout here, where an error can still be reported in one line.

    Raises:
        ReaderGone: the reader closed the pipe.
        DiskError: stdout is a file on a full disk.
    """
    try:
        yield
        with contextlib.suppress(ValueError):  # closed
            sys.stdout.flush()
    except OSError as fault:
        if fault.filename is not None or fault.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EBADF):
            raise  # files have names, and are written through `disk_errors`
        _drop_stdout()
        if fault.errno == errno.EPIPE:
            raise ReaderGone("stdout was closed before everything was written") from None
        raise DiskError(f"stdout: cannot be written: {fault.strerror}; results on disk are complete") from None


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123  (for as long as the process lives)


def _drop_stdout() -> None:
    """Replace stdout, which the interpreter flushes again at exit, and would report a second time."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
