"""A child process that is spoken to in lines of JSON, and never waited for in silence.

    parent                                    child
    call("sample", …)   ──  {id, op, …}  ──▶
                        ◀──  {beat: n}   ──   twice a second; n grows while the work gets on
                        ◀── {id, result} ──   or {id, fault} when the user can mend it

The two share a socket pair and nothing else: no port, no name, nothing unpickled. A child that dies is noticed
at once, one whose beat stands still after the patience that the call allows; both raise `ChildGone`. A child
whose parent dies ends with everything that it has started.
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
            start: what the child's `build` receives.
            patience_s: how long the start may take without a sign of progress.
            environment: laid over this process' own.
            log: where its stdout and stderr are appended; by default a file that goes with it.
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
                start_new_session=True,  # Ctrl-C is for the parent, which may want to finish its step
            )
        self._socket, self._lock, self._sent = mine, threading.Lock(), 0
        self._inbox: queue.Queue[dict[str, Any] | str] = queue.Queue()
        self._beat, self._heard = -1, time.monotonic()
        threading.Thread(target=self._listen, daemon=True).start()
        self.call("start", patience_s, **start)

    def call(self, op: str, patience_s: float, **fields: Any) -> dict[str, Any]:
        """The child's answer.

        Raises:
            ChildGone: it died, or made no progress for `patience_s`.
            UserError: what it was asked cannot be done; the child lives.
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
        """End the child and everything that it started."""
        if self.process.poll() is None:
            # The whole group: an engine may have workers of its own.
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
                raise self._gone("answered a question that was not asked")
            if "fault" in message:
                raise (PluginError if message["plugin"] else UserError)(message["fault"])
            result: dict[str, Any] = message["result"]
            return result

    def _gone(self, what: str) -> ChildGone:
        """Kill the child and return the error to raise, with the end of its output."""
        if self.process.poll() is None and what == "died":  # its socket closes before the process is gone
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                what = "closed its end"
        code, tail = self.process.poll(), ""
        if not self._output.closed:  # by another thread, which has given this child up
            self._output.seek(max(0, self._output.seek(0, os.SEEK_END) - OUTPUT_TAIL))
            tail = self._output.read().decode("utf-8", "replace").strip()
        self.close()
        how = "" if code is None else f" (signal {-code})" if code < 0 else f" (exit {code})"
        return ChildGone(f"{what}{how}", tail)

    def _listen(self) -> None:
        """Sort what the child says: beats are noted here, answers wait for `call`."""
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
    """What a child counts while it works, so that its parent sees it getting on."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def serve(build: Callable[[Mapping[str, Any], Pulse], Mapping[str, Handler]]) -> None:
    """The child's whole life: build the handlers from the first message, then answer until the parent is gone.

    A `GrpoError` is sent as an answer. Anything else is a bug, or an engine that is beyond help: its
    traceback goes to the log and the process ends, which the parent notices.
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
        finally:  # the parent is gone (had it left words unread, by a reset): so is all that this process started
            os.killpg(0, signal.SIGKILL)

    def beat() -> None:
        with contextlib.suppress(OSError):  # the parent is gone, which `listen` sees to
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
    """This process' environment without what torchrun put there: a child is no rank, and must not look for others."""
    return {name: value for name, value in os.environ.items() if not TORCHRUN.fullmatch(name)}


def environment_of(devices: Sequence[str]) -> dict[str, str]:
    """The environment in which a child sees exactly these devices, numbered from 0.

    Args:
        devices: `cuda:N` as this process numbers them, or `cpu`.
    """
    numbers = [int(device.partition(":")[2] or 0) for device in devices if device.startswith("cuda")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else []  # this process may itself see but some
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[n] if n < len(names) else str(n) for n in numbers)}
