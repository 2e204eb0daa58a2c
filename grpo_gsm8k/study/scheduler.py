"""Runs the jobs of a study, several at a time, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from grpo_gsm8k import interrupts
from grpo_gsm8k.runs.files import make_folder
from grpo_gsm8k.runs.progress import progress, say
from grpo_gsm8k.study.jobs import Job, write_job

POLL_S = 0.2


def run_jobs(folder: Path, jobs: Sequence[Job], at_once: int, most: int, enough: Callable[[], bool]) -> dict[str, str]:
    """Run what is not done, each job once what it needs is done.

    Args:
        most: how many to start at most; 0 for all.
        enough: asked after each job; no other is started once it is true.

    Returns:
        name → last words, of the jobs that failed.
    """
    waiting = [job for job in jobs if not job.done]
    running: dict[Job, _Process] = {}
    failed: dict[str, str] = {}
    started = 0
    done = len(jobs) - len(waiting)
    with progress("study", len(jobs), done) as bar:
        try:
            while True:
                room = min(at_once - len(running), most - started if most else at_once)
                for job in [] if enough() else _ready(jobs, waiting)[:room]:
                    waiting.remove(job)
                    running[job] = _Process(folder, job, at_once)
                    started += 1
                if not running:
                    return failed
                while not (ended := [job for job, process in running.items() if process.ended]):
                    time.sleep(POLL_S)
                for job in ended:
                    if words := running.pop(job).failure:
                        failed[job.name] = words
                        say(f"{job.name} failed: {words}")
                    else:
                        done += 1
                        bar.update(done, job.name)
        except BaseException:
            _end(running)
            raise


def _ready(jobs: Sequence[Job], waiting: Sequence[Job]) -> list[Job]:
    """The jobs that can begin: everything that they need is done."""
    done = {job.name for job in jobs if job.done}
    return [job for job in waiting if done.issuperset(job.needs)]


def _end(running: dict[Job, _Process]) -> None:
    """Interrupt what is running, and wait until each run has written its checkpoint."""
    with interrupts.unhurried():
        for process in running.values():
            process.interrupt()
        for process in running.values():
            process.wait()


class _Process:
    """The process of a job, and its log. It is deaf to a Ctrl-C at the terminal: the study passes one on."""

    def __init__(self, folder: Path, job: Job, at_once: int) -> None:
        path = write_job(folder, job)
        self.log = path.with_suffix(".log")
        make_folder(self.log.parent)
        env = dict(os.environ)
        if at_once > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
        command = [sys.executable, "-m", "grpo_gsm8k.study.worker", str(path)]
        out: IO[bytes]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
            )

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return self.process.poll() is not None

    @property
    def failure(self) -> str:
        """Why it failed: the last line of its log; "" if it did not."""
        if self.process.returncode == 0:
            return ""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        words = lines[-1] if lines else f"exit {self.process.returncode}"
        return f"{words} (log: {self.log})"

    def interrupt(self) -> None:
        """Ask it to end after its step."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)

    def wait(self) -> None:
        """Until it has ended."""
        self.process.wait()
