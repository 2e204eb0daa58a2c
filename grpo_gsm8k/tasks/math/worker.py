r"""Math-Verify in a process of its own: what the exact layers cannot read is asked here, under a deadline.

Math-Verify parses with ANTLR and simplifies with SymPy: that may take forever, or all memory. So it runs in a child
process with a limit on its memory and its processor time a request; the parent waits until a deadline, kills a child
that misses it, and starts another one. One child serves a process (any number of threads), and dies with it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time

MEMORY_LIMIT = 2 << 30  # bytes of address space of the child
DEADLINE = 0.6  # seconds for one request, waiting for a child that starts included
MAX_TEXT = 400  # characters of an answer that the child is asked about


class Worker:
    """A child process that compares two answers. `ask` never raises for what the answers say."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._ready = False
        self._buffer = b""
        atexit.register(self.close)

    def start(self) -> None:
        """Starts the child if there is none, without waiting for it."""
        with self._lock:
            self._start()

    def warm_up(self, seconds: float = 60.0) -> bool:
        """Starts the child and waits until it answers."""
        with self._lock:
            self._start()
            return self._until_ready(time.monotonic() + seconds)

    def ask(self, gold: str, answer: str, seconds: float = DEADLINE) -> bool | None:
        """Whether Math-Verify finds the two answers equal; None if it does not say so in time."""
        if len(gold) > MAX_TEXT or len(answer) > MAX_TEXT:
            return None
        deadline = time.monotonic() + seconds
        if not self._lock.acquire(timeout=seconds):
            return None
        try:
            self._start()
            # A child that is still starting is left alone: the next request may find it ready.
            if not self._until_ready(deadline):
                return None
            assert self._process and self._process.stdin
            try:
                self._process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                self._process.stdin.flush()
            except OSError:  # the child died
                self._kill()
                return None
            line = self._line(deadline)
            if line is None:
                self._kill()
                return None
            return {b"yes": True, b"no": False}.get(line)
        finally:
            self._lock.release()

    def close(self) -> None:
        """Ends the child."""
        if self._owner == os.getpid():
            self._kill()

    def _command(self) -> list[str]:
        return [sys.executable, "-c", "from grpo_gsm8k.tasks.math.worker import serve; serve()"]

    def _start(self) -> None:
        if self._owner != os.getpid():  # after a fork the child belongs to the parent
            self._owner, self._process, self._ready, self._buffer = os.getpid(), None, False, b""
        if self._process and self._process.poll() is None:
            return
        self._kill()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            self._command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    def _until_ready(self, deadline: float) -> bool:
        if not self._ready:
            self._ready = self._line(deadline) == b"ready"
        return self._ready

    def _line(self, deadline: float) -> bytes | None:
        assert self._process and self._process.stdout
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return None
            chunk = os.read(self._process.stdout.fileno(), 4096)
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe:
                    with contextlib.suppress(OSError):  # what was written to a dead child is lost
                        pipe.close()
        self._process, self._ready, self._buffer = None, False, b""


WORKER = Worker()

# What parsers and SymPy raise for odd input; anything else ends the child, and the next request starts another.
_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NotImplementedError, RuntimeError,
           TypeError, ValueError, SyntaxError)  # fmt: skip


def serve() -> None:
    """The child: reads one pair a line, writes `yes`, `no` or `?`."""
    import logging
    import resource
    import signal

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    logging.disable()
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not be taken for an answer

    from math_verify import parse, verify

    # The first integral and the first sum import what the next ones need.
    for text in ("\\int_0^1 x dx", "\\sum_{k=1}^{3} k^2", "\\frac{1}{2}"):
        value = parse(f"${text}$", parsing_timeout=None)
        verify(value, value, timeout_seconds=None)
    out.write(b"ready\n")
    for line in sys.stdin.buffer:
        gold, answer = json.loads(line)
        try:
            left, right = (parse(f"${text.replace('$', '')}$", parsing_timeout=None) for text in (gold, answer))
            # Two texts that Math-Verify cannot read either come back as the strings they are.
            read = len(left) > 1 and len(right) > 1
            out.write(b"yes\n" if read and verify(left, right, float_rounding=15, timeout_seconds=None) else b"no\n")
        except _FAULTS:
            out.write(b"?\n")
