"""Metrics and samples for Trackio, which keeps them on this machine: `trackio show`. Only here is trackio imported."""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
from collections.abc import Mapping
from typing import Any

from grpo_gsm8k.errors import DataError
from grpo_gsm8k.runs.clean import publishable
from grpo_gsm8k.runs.files import read_json
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.runs.sinks import COLUMNS, Page, Place, Sink

KEPT = "trackio_run.json"  # so that a resumed run goes on in the same Trackio run


class TrackioSink(Sink):
    """A queue of rows for Trackio."""

    title, extra = "Trackio", "trackio"

    def open(self) -> Page:
        """See `Sink.open`."""
        return TrackioPage(self.place)

    def errors(self) -> tuple[type[Exception], ...]:
        """See `Sink.errors`; it keeps its runs in SQLite."""
        import sqlite3

        return (*super().errors(), sqlite3.Error)


class TrackioPage:
    """One run in Trackio.

    Trackio finds a run again by its name alone, so the name has four more hex digits. What a resumed run logs again is
    left out, for training and validation apart.
    """

    def __init__(self, place: Place) -> None:
        import trackio

        for module in ("trackio", "trackio.run", "trackio.utils"):  # stdout is for data
            vars(sys.modules[module])["print"] = _print
        self.trackio, self.path = trackio, place.folder / KEPT
        self.kept: dict[str, Any] = {"name": f"{place.name} {secrets.token_hex(2)}", "step": 0, "val/step": 0}
        with contextlib.suppress(DataError):  # a kill has cut it
            self.kept |= read_json(self.path) if self.path.is_file() else {}
        self._keep()
        how: dict[str, Any] = {"resume": "allow", "embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self.run = trackio.init(place.project, self.kept["name"], config=publishable(place.config), **how)
        self.had = dict(self.kept)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log one row; samples become a table."""
        for axis in ("step", "val/step"):
            own = {k: v for k, v in values.items() if (axis == "val/step") == k.startswith("val/")}
            if not own or step <= self.had[axis]:
                continue
            self.run.log({key: self._value(value) for key, value in own.items()}, step=step)
            if not any(isinstance(value, list) for value in own.values()):  # a step's samples come before its metrics
                self.kept[axis] = step
                self._keep()

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()

    def _value(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        rows = [["" if cell is None else cell for cell in row] for row in value]
        return self.trackio.Table(columns=list(COLUMNS), data=rows)

    def _keep(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.kept))


def _print(*parts: Any, **_: Any) -> None:
    """Trackio's words to people, on stderr."""
    if text := " ".join(map(str, parts)).strip():
        say(text)
