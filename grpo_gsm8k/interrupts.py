"""Ctrl-C and SIGTERM, from the first import to the last line. Standard library only: it is imported before all else.

A `KeyboardInterrupt` can get lost: raised in a callback, a `__del__` or an import that catches everything, it is
printed or dropped, and the program goes on. So the handler records the signal, raises, and starts a thread that raises
again if the exception was swallowed, and that ends the process if nothing else does:

    first signal                 KeyboardInterrupt, or inside `deferred()` nothing but a note
    swallowed                    raised again, until a handler of the main thread holds it
    `GRACE_S` after the raise    one line on stderr and exit code 130 (143 for SIGTERM)

The thread sees from the main thread's current exception whether it is unwinding, and does not interrupt its clean-up
again.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 8.0
EXIT_S = 2.0  # seconds for threads that the interpreter waits for
POLL_S = 0.1
LINE = "interrupted; what was complete is kept: sft, ei, grpo, distill, pipeline, demo and study continue with --resume"
COMMANDS = frozenset(
    {
        *("bench", "cli", "data_prep", "distill", "ei", "fast_eval_vllm", "grpo", "pretokenize", "sft"),
        *("study.worker", "__main__"),
    }
)
"""Modules that users start with `python -m`; engines and the watchdog end in their own ways."""


class _State:
    """The received signals and the state of the response; one per process."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.received: list[int] = []
        self.raised = False  # KeyboardInterrupt is on its way
        self.again = False  # the thread sends the next signal, which raises again
        self.deadline = 0.0  # when the process ends in any case
        self.over = False  # the command has returned, or its exception has reached the top
        self.deferral: Callable[[int], bool] | None = None
        self.guarded = False


_state = _State()


def received() -> int:
    """The first received signal, or 0."""
    return _state.received[0] if _state.received else 0


def exit_code() -> int:
    """130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (received() or signal.SIGINT)


def is_command() -> bool:
    """Whether this process runs one of our commands, rather than importing the package."""
    if sys.argv[:1] == ["-m"]:  # so runpy has it while it imports the package
        words = sys.orig_argv[1:]
        module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
        return module == "grpo_gsm8k" or module.removeprefix("grpo_gsm8k.") in COMMANDS
    return os.path.basename(sys.argv[0] if sys.argv else "") == "grpo-gsm8k"  # noqa: PTH119  (pathlib takes 10 ms)


def guard() -> None:
    """Handle both signals for the life of this process, without a traceback."""
    if _state.guarded or threading.current_thread() is not threading.main_thread():
        return
    _state.guarded = True
    for number in NUMBERS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup and background jobs of a shell ignore SIGINT
            signal.signal(number, _handle)
    sys.excepthook = _at_the_top
    sys.unraisablehook = _swallowed
    atexit.register(_ignore)  # registered first, so called last


def over() -> None:
    """The command has ended: ignore further signals on the way out.

    In a program that called a command (a notebook, a test) the signals stay its own.
    """
    if not _state.guarded:
        return
    _state.over = True
    _state.deadline = min(_state.deadline, time.monotonic() + EXIT_S)


def leave(code: int) -> None:
    """End an interrupted command after its clean-up, without the interpreter's teardown.

    The teardown waits for threads, and a thread in native code may block it forever. Outside of our commands this does
    nothing.
    """
    if not _state.guarded:
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """Suspend the deadline while a checkpoint is written. A fourth signal ends the process even here."""
    _state.deadline = float("inf")
    try:
        yield
    finally:
        _state.deadline = time.monotonic() + GRACE_S


@contextlib.contextmanager
def deferred(may_raise: Callable[[int], bool]) -> Iterator[list[int]]:
    """Ask before a signal raises: `may_raise(count)`, with how many have come. Yields the signals received in here.

    Outside a command of ours (in a notebook or a test) the handlers are installed for the time being.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def decide(number: int) -> bool:
        came.append(number)
        return may_raise(len(came))

    before = {} if _state.guarded else {number: signal.signal(number, _handle) for number in NUMBERS}
    outer, _state.deferral = _state.deferral, decide
    try:
        yield came
    finally:
        _state.deferral = outer
        for number, handler in before.items():
            signal.signal(number, handler)
        if before:
            _state.received.clear()
            _state.raised = False


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.owner:  # a forked worker: it dies as it would without us
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if _state.again:
        _state.again = False
        raise KeyboardInterrupt
    _state.received.append(number)
    if _state.raised:
        if len(_state.received) > 3:
            _exit()
        return  # it is on its way
    if _state.deferral and not _state.over and not _state.deferral(number):
        return
    _state.raised = True
    _state.deadline = time.monotonic() + (EXIT_S if _state.over else GRACE_S)
    if _state.guarded:
        threading.Thread(target=_insist, daemon=True, name="interrupt").start()
    if not _state.over:
        raise KeyboardInterrupt


def _insist() -> None:
    """Make the process end: raise a swallowed interrupt again, and exit after the grace period."""
    main, unheld = threading.main_thread().ident or 0, 0
    while time.monotonic() < _state.deadline:
        time.sleep(POLL_S)
        unheld = 0 if _state.over or _unwinding(main) else unheld + 1
        if unheld >= 2:  # between two frames no frame handles it for an instant
            unheld, _state.again = 0, True
            signal.pthread_kill(main, received())  # a real signal, which interrupts system calls
    _exit()


def _unwinding(main: int) -> bool:
    """Whether the main thread is handling our exception, or one raised during its handling."""
    found: Any = sys._current_exceptions().get(main)
    return _of_an_interrupt(found[1] if isinstance(found, tuple) else found)


def _of_an_interrupt(fault: BaseException | None) -> bool:
    """Whether an exception is ours, or was raised while ours was handled: an import may turn it into an error."""
    seen = 0
    while fault is not None and seen < 100:
        if isinstance(fault, KeyboardInterrupt | SystemExit) or type(fault).__name__ == "Interrupted":
            return True
        fault, seen = fault.__context__, seen + 1
    return False


def _exit(why: str = "") -> None:
    say(LINE + why)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(exit_code())


def say(line: str) -> None:
    """Print a line on stderr in any state of `sys.stderr`."""
    with contextlib.suppress(OSError):
        os.write(2, (line + "\n").encode())


def _at_the_top(kind: type[BaseException], fault: BaseException, trace: TracebackType | None) -> None:
    """Print a line, not a traceback, for an interrupt that no command caught, as during an import.

    Native code may drop the interrupt and fail a moment later, at a module that is half imported: that error has no
    trace of it, and is named behind the line.
    """
    if issubclass(kind, KeyboardInterrupt) or (_state.received and _of_an_interrupt(fault)):
        _exit()
    if _state.raised:
        _exit(f" ({kind.__name__}: {fault})")
    sys.__excepthook__(kind, fault, trace)


def _swallowed(unraisable: Any) -> None:
    """Python drops an exception raised in a callback; `_insist` raises ours again."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def _ignore() -> None:
    """Ignore signals at exit: the result is complete, and a signal would only change the exit code."""
    _state.over = True
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)
