"""Progress for people, on stderr: bars on a terminal, a line now and then elsewhere.

    with progress("sft", 300) as bar:           a stage and its steps
        bar.update(step, "loss 0.412")
    with doing("loading the model"):            work that cannot be counted

What is open is shown together: the bar of a stage, and below it that of the validation inside it. Where stderr is no
terminal, a thread prints a line every `LINE_EVERY_S` seconds, also in the middle of a long step.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grpo_gsm8k.runs.clean import printable

LINE_EVERY_S = 20.0
NARROW = 60  # columns of a terminal below which a bar's note stands under it
LOOK_S = 0.5


def say(message: str) -> None:
    """Print one line on stderr, without control codes; stdout is for data. A run goes on when nobody can read it."""
    _screen.spoke_at = time.monotonic()
    with contextlib.suppress(OSError, ValueError):
        print(printable(message), file=sys.stderr, flush=True)


class Progress:
    """How far a loop is, and the figures that matter in it.

    Args:
        total: units of work; 0 where they cannot be counted.
        done: of them, before this process began.
        keep: its bar stays on the terminal when it has ended.
    """

    def __init__(self, title: str, total: int, done: int = 0, keep: bool = False) -> None:
        self.title, self.total, self.done, self.keep, self.note = title, total, done, keep, ""
        self._first = done
        self._began = self._moved = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        """`done` of `total`; `note` is shown behind."""
        began = self.done == self._first
        self.done, self.note, self._moved = done, note, time.monotonic()
        if not _screen.live and (began or done == self.total):
            say(self.line())

    def seconds(self) -> float:
        """Since it began in this process."""
        return time.monotonic() - self._began

    def pace(self) -> float:
        """Seconds that a unit has taken on average; 0 before the first is done."""
        return (self._moved - self._began) / (self.done - self._first) if self.done > self._first else 0.0

    def left(self) -> str:
        """The time that is left at this pace, for people."""
        if not self.total:
            return duration(self.seconds())
        if self.done >= self.total:
            return f"took {duration(self._moved - self._began)}"
        ahead = self.pace() * (self.total - self.done) - (time.monotonic() - self._moved)
        if self.pace() and ahead >= 1:
            return f"{duration(ahead)} left"
        # Nothing is done yet, or the unit under way takes longer than all that were left should have.
        return f"{duration(self.seconds())} so far" if self.seconds() >= 1 else ""

    def line(self) -> str:
        """Stage, step, rate, time left and the figures, where there is no bar."""
        if not self.total:
            return f"{self.title}: {duration(self.seconds())} so far"
        rate = f"{1 / self.pace():.1f} a second" if 0 < self.pace() < 1 else f"{self.pace():.1f} s each"
        said = [f"{self.title} {self.done}/{self.total}", rate if self.pace() else "", self.left(), self.note]
        return ", ".join(filter(None, said))


@contextmanager
def progress(title: str, total: int, done: int = 0, keep: bool = True) -> Iterator[Progress]:
    """A `Progress` that is shown until the context ends."""
    with _screen.showing(Progress(title, total, done, keep)) as bar:
        yield bar


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Show that something is done which cannot be counted; on a terminal it vanishes when it is over."""
    with _screen.showing(Progress(what, 0)):
        yield


@contextmanager
def part(number: int, of: int) -> Iterator[None]:
    """Begin the title of every outermost bar in here with `2/4`."""
    before, _screen.part = _screen.part, f"{number}/{of} "
    try:
        yield
    finally:
        _screen.part = before


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {s:02d} s" if minutes else f"{s} s"


class _Screen:
    """What is open in this process, and who shows it: rich's live display, or the thread."""

    def __init__(self) -> None:
        self.open: list[Progress] = []
        self.part = ""
        self.live: Any = None
        self.spoke_at = time.monotonic()
        self._spinner: Any = None
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()

    @contextmanager
    def showing(self, bar: Progress) -> Iterator[Progress]:
        """Show a bar below those that are open already."""
        with self._lock:  # engines are started from threads of their own
            if not any(other.total for other in self.open):
                bar.title = f"{self.part}{bar.title}"
            self.open.append(bar)
            self._begin()
        try:
            yield bar
        finally:
            with self._lock:
                self.open.remove(bar)
                self._end(bar)

    def shown(self) -> list[Progress]:
        """What is counted, and what is going on in the innermost of it."""
        bars = list(self.open)
        return [bar for i, bar in enumerate(bars) if bar.total or i == len(bars) - 1]

    def _begin(self) -> None:
        if sys.stderr.isatty():
            if not self.live:
                from rich.console import Console, Group
                from rich.live import Live
                from rich.spinner import Spinner

                out, self._spinner = Console(stderr=True), Spinner("dots")
                self.live = Live(
                    console=out,
                    get_renderable=lambda: Group(*(self._row(bar, out.width) for bar in self.shown())),
                    redirect_stdout=False,
                    transient=True,
                )
                self.live.start()
        elif not self._thread or not self._thread.is_alive():
            self.spoke_at = time.monotonic()
            self._thread = threading.Thread(target=self._speak, daemon=True, name="progress")
            self._thread.start()

    def _end(self, bar: Progress) -> None:
        if self.live and not self.open:
            self.live.stop()
        if self.live and bar.keep:
            self.live.console.print(self._row(bar, self.live.console.width))
        if not self.open:
            self.live = None

    def _speak(self) -> None:
        """Say how far everything is whenever nothing has been said for a while, until nothing is open."""
        while self.open:
            time.sleep(LOOK_S)
            bars = self.shown()
            if bars and time.monotonic() - self.spoke_at >= LINE_EVERY_S:
                say("; ".join(bar.line() for bar in bars))

    def _row(self, bar: Progress, width: int) -> Any:
        """A bar for rich; its note stands under it where the terminal is narrow."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        narrow, row = width < NARROW, Table.grid(padding=(0, 1))
        mark = ProgressBar(bar.total, bar.done, width=8 if narrow else 16) if bar.total else self._spinner
        count = f"{bar.done}/{bar.total}" if bar.total else ""
        cells = [Text(bar.title, "bold"), mark, Text(count, "green"), Text(bar.left(), "cyan"), Text(bar.note)]
        for cell in cells[: 4 if narrow else 5]:
            least = cell.cell_len if isinstance(cell, Text) and cell is not cells[4] else None
            row.add_column(no_wrap=True, overflow="ellipsis", min_width=least)
        row.add_row(*cells[: len(row.columns)])
        under = [Text(f"  {bar.note}", overflow="ellipsis", no_wrap=True)] if narrow and bar.note else []
        return Group(row, *under)


_screen = _Screen()
