"""Talks to a child process in lines of JSON, with a heartbeat, so that a hang never goes unnoticed.

    parent                                    child
    call("sample", …)   ──  {id, op, …}  ──▶
                        ◀──  {beat: n}   ──   twice a second; n grows while the child makes progress
                        ◀── {id, result} ──   or {id, fault} for an error that the user can fix

They share a socket pair only: no port, no file name, no pickle. `call` raises `ChildGone` at once when the child dies,
and after `patience_s` when its beat stands still. When the parent dies, the child ends with all processes that it
started.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from grpo_gsm8k.errors import EngineError, GrpoError, PluginError, UserError

BEAT_S = 0.5
OUTPUT_TAIL = 2000  # characters of the child's output that go into a message about its death

TORCHRUN = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")

Handler = Callable[..., Mapping[str, Any]]


class ChildGone(EngineError):
    """The child died, hung, or broke the protocol; another may be started. `output_tail` is the end of its output."""

    def __init__(self, what: str, output_tail: str = "") -> None:
        super().__init__(what)
        self.output_tail = output_tail


class Child:
    """A process that answers calls, one at a time."""

    def __init__(
        self,
        module: str,
        start: Mapping[str, Any],
        *,
        patience_s: float,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        """Start `python -m module`, which calls `serve`, and wait until it is ready.

        Args:
            start: arguments of the child's `build`.
            patience_s: seconds that the start may take without progress.
            environment: added to this process' own.
            log: file to append its stdout and stderr to; by default a temporary one.
        """
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
        mine, theirs = socket.socketpair()
        self._output: IO[bytes] = log.open("a+b") if log else tempfile.TemporaryFile()  # noqa: SIM115  (closed in close)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env={**_own_environment(), **(environment or {})},
                start_new_session=True,  # so that Ctrl-C reaches the parent only, which finishes its step
            )
        self._socket, self._lock, self._sent = mine, threading.Lock(), 0
        self._inbox: queue.Queue[dict[str, Any] | str] = queue.Queue()
        self._beat, self._heard = -1, time.monotonic()
        threading.Thread(target=self._listen, daemon=True).start()
        self.call("start", patience_s, **start)

    def call(self, op: str, patience_s: float, **fields: Any) -> dict[str, Any]:
        """Send a request and return the child's answer.

        Raises:
            ChildGone: it died, or made no progress for `patience_s`.
            UserError: the request cannot be done; the child goes on.
        """
        with self._lock:
            self._sent += 1
            self._heard = time.monotonic()
            try:
                self._socket.sendall(json.dumps({"id": self._sent, "op": op, **fields}).encode() + b"\n")
            except OSError:
                raise self._gone("died") from None
            return self._answer(self._sent, patience_s)

    def close(self) -> None:
        """Kill the child and all processes that it started."""
        if self.process.poll() is None:
            # The whole process group: an engine may have workers.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._socket.close()
        self._output.close()

    def _answer(self, number: int, patience_s: float) -> dict[str, Any]:
        while True:
            try:
                message = self._inbox.get(timeout=BEAT_S)
            except queue.Empty:
                if time.monotonic() - self._heard > patience_s:
                    raise self._gone(f"made no progress for {patience_s:.0f} s") from None
                continue
            if isinstance(message, str):
                raise self._gone(message)
            if message.get("id") != number:
                raise self._gone("answered another request")
            if "fault" in message:
                raise (PluginError if message["plugin"] else UserError)(message["fault"])
            result: dict[str, Any] = message["result"]
            return result

    def _gone(self, what: str) -> ChildGone:
        """Kill the child and return the error to raise, with the end of its output."""
        if self.process.poll() is None and what == "died":  # the socket closes before the process ends
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                what = "closed its end"
        code, tail = self.process.poll(), ""
        if not self._output.closed:  # closed by another thread
            self._output.seek(max(0, self._output.seek(0, os.SEEK_END) - OUTPUT_TAIL))
            tail = self._output.read().decode("utf-8", "replace").strip()
        self.close()
        how = "" if code is None else f" (signal {-code})" if code < 0 else f" (exit {code})"
        return ChildGone(f"{what}{how}", tail)

    def _listen(self) -> None:
        """Read the child's messages: record beats, and queue answers for `call`."""
        try:
            with self._socket.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    if "beat" not in message:
                        self._inbox.put(message)
                    elif message["beat"] != self._beat:
                        self._beat, self._heard = message["beat"], time.monotonic()
        except ValueError:
            self._inbox.put("wrote something that is not a line of JSON")
        except OSError:  # closed on this side
            pass
        self._inbox.put("died")


class Pulse:
    """Counts the child's progress; the heartbeat sends the count to the parent."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def serve(build: Callable[[Mapping[str, Any], Pulse], Mapping[str, Handler]]) -> None:
    """Run the child: build the handlers from the first message, then answer requests until the parent ends.

    A `GrpoError` is sent back. Any other exception is a bug or a broken engine: its traceback goes to the log, and the
    process ends, which the parent notices.
    """
    connection = socket.socket(fileno=int(sys.argv[1]))
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    pulse, lock = Pulse(), threading.Lock()

    def send(message: Mapping[str, Any]) -> None:
        with lock:
            connection.sendall(json.dumps(message, allow_nan=False).encode() + b"\n")

    def listen() -> None:
        try:
            with connection.makefile("rb") as lines:
                for line in lines:
                    requests.put(json.loads(line))
        finally:  # the parent is gone, perhaps by a connection reset: end all that this process started
            os.killpg(0, signal.SIGKILL)

    def beat() -> None:
        with contextlib.suppress(OSError):  # the parent is gone; `listen` handles that
            while True:
                send({"beat": pulse.count})
                time.sleep(BEAT_S)

    for target in (listen, beat):
        threading.Thread(target=target, daemon=True).start()
    handlers: Mapping[str, Handler] = {}
    while True:
        request = requests.get()
        number, op = request.pop("id"), request.pop("op")
        pulse()
        try:
            if op == "start":
                handlers, result = build(request, pulse), dict[str, Any]()
            else:
                result = dict(handlers[op](**request))
        except GrpoError as fault:
            send({"id": number, "fault": str(fault), "plugin": isinstance(fault, PluginError)})
        else:
            send({"id": number, "result": result})


def _own_environment() -> dict[str, str]:
    """This process' environment without torchrun's variables: a child is not a rank."""
    return {name: value for name, value in os.environ.items() if not TORCHRUN.fullmatch(name)}


def environment_of(devices: Sequence[str]) -> dict[str, str]:
    """The environment in which a child sees exactly these devices, numbered from 0.

    Args:
        devices: `cuda:N` as this process numbers them, or `cpu`.
    """
    numbers = [int(device.partition(":")[2] or 0) for device in devices if device.startswith("cuda")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else []  # this process may see only some of the machine's GPUs
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[n] if n < len(names) else str(n) for n in numbers)}
