"""Processes that grade, for a grader that computes for long: `--grader_processes N`.

A call (the verdicts on one prompt's completions, or a reward) goes to a process that is free, and its result comes back
to the caller, so the order of verdicts is the callers'. A process that dies, or that takes longer than
`--grader_timeout_s`, stops the run in one line, at its last complete step.

Task and reward travel with each call, by the name of their module, which the process imports; what they keep from one
call to the next stays in the process.
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

START_S = 300.0  # to start, and to import the user's module; only what it computes is held to the caller's limit
UNPICKLABLE = (pickle.PicklingError, AttributeError, TypeError)


@functools.cache
def grader_pool(count: int) -> GraderPool:
    """The pool of this size: all graders of this process share it."""
    return GraderPool(count)


class GraderPool:
    """Processes that are started when a call first needs them, and end with this one."""

    def __init__(self, count: int) -> None:
        self._free = SimpleQueue[_Process]()
        for _ in range(count):
            self._free.put(_Process())

    def call(self, what: str, users: bool, seconds: float, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` in a process that is free, awaited there if it is async.

        Args:
            what: whose code it is, for the error.
            users: a user's own: what it raises is told in one line. What ours raises ends the process with a traceback.
            seconds: most that it may take.

        Raises:
            PluginError: the function raises, cannot be sent there, takes too long, or ends its process.
        """
        process = self._free.get()
        try:
            return process.call(what, users, seconds, function, args)
        finally:
            self._free.put(process)

    def close(self) -> None:
        """End those processes that no call is using."""
        while not self._free.empty():
            self._free.get().stop()


class _Process:
    """One of them. It is replaced when it dies."""

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
        """End the process; returns how it ended, for a person."""
        child, self._child = self._child, None
        if child is None:
            return "it did not start"
        self._pipe.close()
        try:
            code = child.wait(1.0)  # of one that is dead already
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
            [sys.executable, "-c", f"from {__name__} import serve; serve({theirs.fileno()}, {os.getpid()})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a user's function prints is talk
            env={**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()
        if not self._pipe.poll(START_S) or self._pipe.recv() != "ready":
            raise EOFError


def serve(fd: int, parent: int) -> None:
    """The process: runs what it is sent until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the run, which ends this process
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
    """(kind, value) of a call, pickled; tells `pipe` when it begins to compute."""
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
