"""Writes in a thread of its own while the run goes on: one job at a time, and its error reaches the run.

writer.start(20, job)      waits for the job before it, then returns at once
writer.check()             raises the error of a job that has ended
writer.wait()              the same, once the job has ended
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures

from grpo_gsm8k.errors import GrpoError
from grpo_gsm8k.runs.progress import say


class Writer:
    """One thread that writes checkpoints."""

    def __init__(self) -> None:
        self._pool: futures.ThreadPoolExecutor | None = None
        self._job: futures.Future[None] | None = None
        self._step = 0

    def start(self, step: int, job: Callable[[], None]) -> None:
        """Run `job`, which writes the checkpoint of `step`. Raises as `wait` does, and then starts nothing."""
        self.wait()
        self._pool = self._pool or futures.ThreadPoolExecutor(1, "checkpoint")
        self._step, self._job = step, self._pool.submit(job)

    def writes(self, step: int) -> bool:
        """Whether the checkpoint of this step is being written."""
        return self._job is not None and not self._job.done() and self._step == step

    def check(self) -> None:
        """Raise the error of a job that has ended: `DiskError`, or a bug with its traceback."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the job, and raise its error. A Ctrl-C ends the wait, and not the job."""
        if self._job is not None:
            futures.wait([self._job])
            job, self._job = self._job, None
            job.result()

    def close(self) -> None:
        """Wait for the job behind a run that ends with an error of its own; print the job's."""
        try:
            self.wait()
        except GrpoError as fault:
            say(f"the checkpoint of step {self._step} is lost: {fault}")
        finally:
            if self._pool:
                self._pool.shutdown()
