"""Progress for people, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from grpo_gsm8k.runs.clean import printable

LINE_EVERY_S = 30.0


def talk(message: str) -> None:
    """Print one line on stderr, without control codes; stdout is for data. A run goes on when nobody can read it."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(message), file=sys.stderr, flush=True)


class Progress:
    """How far a loop is, and the figures that matter in it."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self._bar = None
        self._said = time.monotonic() - LINE_EVERY_S
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = ("{task.description}", BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=total, completed=done, note="")
            self._bar.start()

    def update(self, done: int, note: str = "") -> None:
        """`done` of `total`; `note` is shown behind."""
        self.done = done
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._said >= LINE_EVERY_S or done == self.total:
            self._said = time.monotonic()
            talk(f"{self.title} {done}/{self.total} {note}".rstrip())

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self._bar:
            self._bar.stop()


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Progress]:
    """A `Progress` that is closed whatever happens."""
    bar = Progress(title, total, done)
    try:
        yield bar
    finally:
        bar.close()
