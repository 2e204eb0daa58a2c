"""Sends metrics and samples to Weights & Biases if a key or `WANDB_MODE=offline` is set. Only this module imports
wandb.

A thread with a bounded queue talks to wandb: a slow network never blocks a run, and an error of wandb ends this sink
with one line, never the run.

wandb's own step only increases and drops late rows, such as those of an asynchronous evaluation. So it just numbers the
rows, and each metric has an axis that is logged with it: `val/…` over `val/step`,
everything else over `step`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from grpo_gsm8k.runs.clean import publishable
from grpo_gsm8k.runs.files import write_atomic
from grpo_gsm8k.runs.progress import say

QUEUE_ROWS = 10_000
CLOSE_SECONDS = 30.0
TABLE_ROWS = 128  # more than a default validation (100); a table is uploaded as a whole, at about 2 kB per row
COLUMNS = (
    *("id", "question", "response", "answer", "gold", "extracted", "correct", "format_ok", "finish_reason", "tokens"),
    "reward",  # None in a validation
)
STEP, VAL_STEP = "step", "val/step"
# A page may be public: leave out host and user names, paths, arguments, code and console output.
PRIVATE: dict[str, Any] = {
    "x_disable_meta": True,
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "console": "off",
    "host": "",
    "username": "",
    "program": "",
}
ROWS_A_STEP = 4  # metrics and a table over either axis; fixed, so that parts of a run line up that were logged offline


def wanted() -> bool:
    """Whether the environment enables W&B."""
    mode = os.environ.get("WANDB_MODE", "")
    return mode == "offline" or (mode not in ("disabled", "dryrun") and bool(os.environ.get("WANDB_API_KEY")))


class WandbSink:
    """A queue of rows for W&B."""

    def __init__(self, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.dropped = 0
        self._rows: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(QUEUE_ROWS)
        self._thread = threading.Thread(target=self._run, args=(project, name, folder, config), daemon=True)
        self._thread.start()

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
        """Wait a little for W&B to take the rest of the queue."""
        with contextlib.suppress(queue.Full):  # too slow: not even the end marker fits into the queue
            self._rows.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS)
        if self.dropped:
            say(f"W&B was too slow for {self.dropped} rows; metrics.jsonl has them all")

    def _run(self, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError  # wandb's service died or was closed

        kept = folder / "wandb_id.txt"  # so that a resumed run goes on in the same W&B run
        if not kept.is_file():
            write_atomic(kept, secrets.token_hex(4))
        try:
            run = wandb.init(
                project=project,
                name=name,
                id=kept.read_text(),
                resume="allow",
                dir=str(folder),
                config=publishable(config),
                settings=wandb.Settings(silent=True, init_timeout=60, **PRIVATE),
            )
            page = Page(run, lambda data: wandb.Table(list(COLUMNS), data, allow_mixed_types=True))
            while (item := self._rows.get()) is not None:
                page.write(*item)
            run.finish()
        except (wandb.Error, HandleAbandonedError, MailboxClosedError, OSError, ValueError) as fault:
            reason = f"{type(fault).__name__} {' '.join(str(fault).split())[:200]}"
            say(f"W&B is off for this run, metrics.jsonl has everything: {reason}")
            while self._rows.get() is not None:  # drain the queue until the run ends
                pass


class Page:
    """One run in W&B: every metric over its axis."""

    def __init__(self, run: Any, table: Callable[[list[list[Any]]], Any]) -> None:
        """`run` is wandb's; `table` makes one of its tables of rows."""
        self.run, self.table = run, table
        self.known: set[str] = set()
        self.row = run.step - 1
        # A resumed run logs the rows behind its checkpoint again; the page may have some of them.
        self.had = {axis: run.summary.get(axis, 0) for axis in (STEP, VAL_STEP)}

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log one row; a list of rows among its values becomes a table."""
        for axis in (STEP, VAL_STEP):
            own = {k: v for k, v in values.items() if (axis == VAL_STEP) == k.startswith("val/")}
            if not own or step < self.had[axis]:
                continue
            for name in own.keys() - self.known:  # one by one: a glob's * stops at a slash
                self.run.define_metric(name, step_metric=axis)
            self.known |= own.keys()
            drawn = {k: self.table(v) if isinstance(v, list) else v for k, v in own.items()}
            self.row = max(self.row + 1, ROWS_A_STEP * step)
            self.run.log({axis: step, **drawn}, step=self.row)
