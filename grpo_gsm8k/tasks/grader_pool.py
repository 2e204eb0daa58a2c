"""Runs slow graders in other processes: `--grader_processes N`.

A call (the verdicts on one prompt's completions, or a reward) goes to a free process, and its result returns to the
caller, so the verdicts keep their order. If a process dies, or takes longer than `--grader_timeout_s`, the run stops
with one line, at its last complete step.

Each call sends task and reward as pickles, by the name of their module, which the process imports. Module-level state
stays in the process from call to call.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from grpo_gsm8k import plugins
from grpo_gsm8k.errors import GrpoError, PluginError

START_S = 300.0  # for the start and the import of the user's module, which the caller's limit does not include
UNPICKLABLE = (pickle.PicklingError, AttributeError, TypeError)


@functools.cache
def grader_pool(count: int) -> GraderPool:
    """The pool of this size, shared by all graders of this process."""
    return GraderPool(count)


class GraderPool:
    """Processes that start on first use, and end with this process."""

    def __init__(self, count: int) -> None:
        self._free = SimpleQueue[_Process]()
        for _ in range(count):
            self._free.put(_Process())

    def call(self, what: str, users: bool, seconds: float, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(*args)` in a free process, which also awaits an async one.

        Args:
            what: names the code, for the error message.
            users: a user's own code: its exceptions become one line. Ours end the process with a traceback.
            seconds: time limit.

        Raises:
            PluginError: the function raises, cannot be pickled, takes too long, or ends its process.
        """
        process = self._free.get()
        try:
            return process.call(what, users, seconds, function, args)
        finally:
            self._free.put(process)

    def close(self) -> None:
        """End the idle processes."""
        while not self._free.empty():
            self._free.get().stop()


class _Process:
    """One process of the pool; restarted when it dies."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Any = None

    def call(self, what: str, users: bool, seconds: float, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        try:
            request = pickle.dumps((function, args))
        except UNPICKLABLE as fault:
            raise PluginError(
                f"{what}: cannot be sent to another process ({fault}); leave --grader_processes out"
            ) from None
        try:
            self._start()
            self._pipe.send((what, users, request))
            ready = self._pipe.poll(START_S) and self._pipe.recv() == "imported"
            if not ready or not self._pipe.poll(seconds):
                self.stop()
                raise PluginError(
                    f"{what}: a grader process took more than {seconds:g} s and was ended; raise --grader_timeout_s if "
                    "that is not enough"
                )
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            raise PluginError(f"{what}: a grader process died ({self.stop()})") from None
        if kind == "fault":
            raise PluginError(value)
        return value

    def stop(self) -> str:
        """End the process; returns how it ended, for the error message."""
        child, self._child = self._child, None
        if child is None:
            return "it did not start"
        self._pipe.close()
        try:
            code = child.wait(1.0)  # it may be dead already
        except subprocess.TimeoutExpired:
            child.kill()
            code = child.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _start(self) -> None:
        if self._child is not None and self._child.poll() is None:
            return
        if self._child is not None:
            self.stop()
        self._pipe, theirs = Pipe()
        quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._child = subprocess.Popen(
            # Unbuffered: what is printed is read while it says something, and is not lost when the process is ended.
            [sys.executable, "-u", "-c", f"from {__name__} import serve; serve({theirs.fileno()}, {os.getpid()})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # stdout is for data: what a user's function prints goes to stderr
            env={**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()
        if not self._pipe.poll(START_S) or self._pipe.recv() != "ready":
            raise EOFError


def serve(fd: int, parent: int) -> None:
    """Run the process: execute calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run handles Ctrl-C, and ends this process
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    pipe = Connection(fd)
    pipe.send("ready")
    while True:
        try:
            what, users, request = pipe.recv()
        except EOFError:
            return
        pipe.send_bytes(_answer(what, users, request, pipe))


def _answer(what: str, users: bool, request: bytes, pipe: Connection[Any, Any]) -> bytes:
    """Run a call; returns its pickled (kind, value). Sends "imported" once the user's module is loaded."""
    try:
        with plugins.calling(what) if users else nullcontext():
            try:
                function, args = pickle.loads(request)
            finally:
                pipe.send("imported")
            found = function(*args)
            if inspect.isawaitable(found):
                found = asyncio.run(_awaited(found))
            return pickle.dumps(("value", found))
    except GrpoError as fault:
        return pickle.dumps(("fault", str(fault)))


async def _awaited(found: Any) -> Any:
    return await found


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
