"""Sends metrics and samples to Weights & Biases if a key or `WANDB_MODE=offline` is set. Only this module imports
wandb.

wandb's own step only increases and drops late rows, such as those of an asynchronous evaluation. So it just numbers the
rows, and each metric has an axis that is logged with it: `val/…` over `val/step`,
everything else over `step`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from grpo_gsm8k.runs import sinks
from grpo_gsm8k.runs.clean import publishable
from grpo_gsm8k.runs.files import write_atomic
from grpo_gsm8k.runs.sinks import COLUMNS, Off, Sink

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


class WandbSink(Sink):
    """A queue of rows for W&B."""

    title = "W&B"

    def open(self) -> sinks.Page:
        """See `Sink.open`."""
        import wandb

        if not wanted():
            raise Off("set WANDB_API_KEY, or WANDB_MODE=offline")
        place = self.place
        kept = place.folder / "wandb_id.txt"  # so that a resumed run goes on in the same W&B run
        if not kept.is_file():
            write_atomic(kept, secrets.token_hex(4))
        run = wandb.init(
            project=place.project,
            name=place.name,
            id=kept.read_text(),
            resume="allow",
            dir=str(place.folder),
            config=publishable(place.config),
            settings=wandb.Settings(silent=True, init_timeout=60, **PRIVATE),
        )
        return Page(run, lambda columns: wandb.Table(columns, [], allow_mixed_types=True, log_mode="INCREMENTAL"))

    def errors(self) -> tuple[type[Exception], ...]:
        """See `Sink.errors`; wandb's service may have died or been closed, too."""
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        return (wandb.Error, HandleAbandonedError, MailboxClosedError, OSError, ValueError)


class Page:
    """One run in W&B: every metric over its axis, and the samples of all steps in one table.

    wandb uploads only the rows that a table has gained since it was last logged. A table that is logged anew at each
    step would show its last step alone.
    """

    def __init__(self, run: Any, table: Callable[[list[str]], Any]) -> None:
        """`run` is wandb's; `table` makes an empty one of its tables that grows."""
        self.run, self.table = run, table
        self.tables: dict[str, Any] = {}
        self.known: set[str] = set()
        self.row = run.step - 1
        # A resumed run logs the rows behind its checkpoint again; the page may have some of them.
        self.had = {axis: run.summary.get(axis, 0) for axis in (STEP, VAL_STEP)}

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log one row; a list of samples among its values is added to the table of that name."""
        for axis in (STEP, VAL_STEP):
            own = {k: v for k, v in values.items() if (axis == VAL_STEP) == k.startswith("val/")}
            if not own or step < self.had[axis]:
                continue
            for name in own.keys() - self.known:  # one by one: a glob's * stops at a slash
                self.run.define_metric(name, step_metric=axis)
            self.known |= own.keys()
            drawn = {k: self._grown(k, step, v) if isinstance(v, list) else v for k, v in own.items()}
            self.row = max(self.row + 1, ROWS_A_STEP * step)
            self.run.log({axis: step, **drawn}, step=self.row)

    def close(self) -> None:
        """See `sinks.Page`."""
        self.run.finish()

    def _grown(self, name: str, step: int, rows: list[list[Any]]) -> Any:
        table = self.tables.get(name) or self.tables.setdefault(name, self.table([STEP, *COLUMNS]))
        for row in rows:
            table.add_data(step, *row)
        return table
