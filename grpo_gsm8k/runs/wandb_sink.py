"""Metrics and samples to Weights & Biases, when a key or `WANDB_MODE=offline` asks. The only importer of wandb.

A thread of its own talks to wandb, behind a bounded queue: a slow or absent network never blocks a run, and
what wandb raises ends this sink with one line, never the run.

wandb's own step only goes forward and drops what comes late, as an evaluation does that ran beside the training.
So it only numbers the rows, and each metric is drawn over an axis that is logged with it: `val/…` over `val/step`,
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
from grpo_gsm8k.runs.progress import talk

QUEUE_ROWS = 10_000
CLOSE_SECONDS = 30.0
TABLE_ROWS = 128  # a default validation (100) whole; a table goes up whole every time, at about 2 kB a row
COLUMNS = (
    *("id", "question", "response", "answer", "gold", "extracted", "correct", "format_ok", "finish_reason", "tokens"),
    "reward",  # None in a validation
)
STEP, VAL_STEP = "step", "val/step"
# A page may be public: no host or user name, no paths and arguments, no code, and nothing of what is printed.
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
    """Whether the environment asks for W&B."""
    mode = os.environ.get("WANDB_MODE", "")
    return mode == "offline" or (mode not in ("disabled", "dryrun") and bool(os.environ.get("WANDB_API_KEY")))


class WandbSink:
    """Rows go in, and reach W&B if and when it can take them."""

    def __init__(self, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.dropped = 0
        self._rows: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(QUEUE_ROWS)
        self._thread = threading.Thread(target=self._run, args=(project, name, folder, config), daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over one row; when the queue is full it is dropped and counted (metrics.jsonl has it)."""
        self._put(step, dict(metrics))

    def table(self, step: int, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Hand over what was sampled at a step: the first `TABLE_ROWS` rows, in `COLUMNS`."""
        self._put(step, {name: [[row.get(column) for column in COLUMNS] for row in islice(rows, TABLE_ROWS)]})

    def _put(self, step: int, values: dict[str, Any]) -> None:
        try:
            self._rows.put_nowait((step, values))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Give W&B a little time to take what is left."""
        with contextlib.suppress(queue.Full):  # so slow that not even the end fits in
            self._rows.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS)
        if self.dropped:
            talk(f"W&B was too slow for {self.dropped} rows; metrics.jsonl has them all")

    def _run(self, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError  # its service died or was closed

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
            talk(f"W&B is off for this run, metrics.jsonl goes on: {reason}")
            while self._rows.get() is not None:  # keep the queue from filling until the run ends
                pass


class Page:
    """One run in W&B: every metric over its axis."""

    def __init__(self, run: Any, table: Callable[[list[list[Any]]], Any]) -> None:
        """`run` is wandb's; `table` makes one of its tables of rows."""
        self.run, self.table = run, table
        self.known: set[str] = set()
        self.row = run.step - 1
        # A resumed run says again what came after its checkpoint: the page has it, but perhaps for half of the last.
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
