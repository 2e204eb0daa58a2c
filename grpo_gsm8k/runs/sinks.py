"""Sends metrics and samples to a logger beside metrics.jsonl; `loggers.py` has the list of them.

Each logger has a thread with a bounded queue, and its library is imported there: a slow network never blocks a run, and
an error of a library ends its sink with one line, never the run.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

from grpo_gsm8k.runs.progress import say

QUEUE_ROWS = 10_000
CLOSE_SECONDS = 30.0
TABLE_ROWS = 128  # of a step: more than a default validation (100); at about 2 kB a row
COLUMNS = (
    *("id", "question", "response", "answer", "gold", "extracted", "correct", "format_ok", "finish_reason", "tokens"),
    "reward",  # None in a validation
)


@dataclass(frozen=True)
class Place:
    """What a logger is told about a run.

    Attributes:
        project, name: as it is filed.
        folder: of the run, for what a resumed run must know.
        config: its settings.
        first: the step that is logged first, above 1 in a resumed run.
    """

    project: str
    name: str
    folder: Path
    config: Mapping[str, Any]
    first: int = 1


class Page(Protocol):
    """An open logger of one run."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log one row; a list among its values holds samples, in `COLUMNS`."""

    def close(self) -> None:
        """Write what is left."""


class Off(Exception):
    """A logger cannot be used here; the message says why, and what to do."""


class Sink:
    """A queue of rows for one logger. Subclasses open its page."""

    title: ClassVar[str]
    extra: ClassVar[str] = ""  # of this package, which brings the library

    def __init__(self, place: Place) -> None:
        self.place, self.dropped = place, 0
        self._rows: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(QUEUE_ROWS)
        self._thread = threading.Thread(target=self._run, daemon=True, name=self.title)
        self._thread.start()

    def open(self) -> Page:
        """Import the library and open the run's page. Raises `Off`, or what the library raises."""
        raise NotImplementedError

    def errors(self) -> tuple[type[Exception], ...]:
        """What the library raises when it cannot go on; its import has succeeded."""
        return (OSError, ValueError, RuntimeError)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue a row; if the queue is full, drop and count it (metrics.jsonl has it)."""
        self._put(step, dict(metrics))

    def table(self, step: int, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Queue the first `TABLE_ROWS` samples of a step, in `COLUMNS`."""
        self._put(step, {name: [[row.get(column) for column in COLUMNS] for row in islice(rows, TABLE_ROWS)]})

    def _put(self, step: int, values: dict[str, Any]) -> None:
        try:
            self._rows.put_nowait((step, values))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Wait a little for the library to take the rest of the queue."""
        with contextlib.suppress(queue.Full):  # too slow: not even the end marker fits into the queue
            self._rows.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS)
        if self.dropped:
            say(f"{self.title} was too slow for {self.dropped} rows; metrics.jsonl has them all")

    def _run(self) -> None:
        try:
            page = self.open()
        except ImportError as fault:
            how = f"install the extra {self.extra}, as in `uv sync --extra {self.extra}`" if self.extra else str(fault)
            self._give_up(f"it is not installed; {how}")
            return
        except Off as reason:
            self._give_up(str(reason))
            return
        except self.errors() as fault:
            self._give_up(_short(fault))
            return
        try:
            while (item := self._rows.get()) is not None:
                page.write(*item)
            page.close()
        except self.errors() as fault:
            self._give_up(_short(fault))

    def _give_up(self, reason: str) -> None:
        say(f"{self.title} is off for this run, metrics.jsonl has everything: {reason}")
        while self._rows.get() is not None:  # drain the queue until the run ends
            pass


def _short(fault: Exception) -> str:
    return f"{type(fault).__name__} {' '.join(str(fault).split())[:200]}"
