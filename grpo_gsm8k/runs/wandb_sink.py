"""Metrics to Weights & Biases, when a key or `WANDB_MODE=offline` asks for it. The only importer of wandb.

A thread of its own talks to wandb, behind a bounded queue: a slow or absent network never blocks a run, and
what wandb raises ends this sink with one line, never the run.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_gsm8k.runs.files import write_atomic
from grpo_gsm8k.runs.progress import talk

QUEUE_ROWS = 10_000
CLOSE_SECONDS = 30.0


def wanted() -> bool:
    """Whether the environment asks for W&B."""
    mode = os.environ.get("WANDB_MODE", "")
    return mode == "offline" or (mode not in ("disabled", "dryrun") and bool(os.environ.get("WANDB_API_KEY")))


class WandbSink:
    """Rows go in, and reach W&B if and when it can take them."""

    def __init__(self, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.dropped = 0
        self._rows: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(QUEUE_ROWS)
        self._thread = threading.Thread(target=self._run, args=(project, name, folder, config), daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over one row; when the queue is full it is dropped and counted (metrics.jsonl has it)."""
        try:
            self._rows.put_nowait((step, dict(metrics)))
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
                config=dict(config),
                settings=wandb.Settings(silent=True, init_timeout=60),
            )
            while (item := self._rows.get()) is not None:
                run.log(item[1], step=item[0])
            run.finish()
        except (wandb.Error, HandleAbandonedError, MailboxClosedError, OSError, ValueError) as fault:
            reason = f"{type(fault).__name__} {' '.join(str(fault).split())[:200]}"
            talk(f"W&B is off for this run, metrics.jsonl goes on: {reason}")
            while self._rows.get() is not None:  # keep the queue from filling until the run ends
                pass
