"""A value that a thread will set and coroutines of any event loop wait for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Promise(Generic[T]):
    """Set once. A coroutine that stops waiting leaves nothing behind, which a `Future` that is wrapped would."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value: T | None = None
        self._error: BaseException | None = None
        self._done = False
        self._waiting: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    def set(self, value: T) -> None:
        """Give it its value."""
        self._end(value, None)

    def fail(self, error: BaseException) -> None:
        """Whoever waits gets this error."""
        self._end(None, error)

    def _end(self, value: T | None, error: BaseException | None) -> None:
        with self._lock:
            self._value, self._error, self._done = value, error, True
            waiting, self._waiting = self._waiting, {}
        for event, loop in waiting.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there
                loop.call_soon_threadsafe(event.set)

    def interrupt(self) -> None:
        """Whoever waits now stops waiting, as if its time were over."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for event, loop in waiting.items():
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(event.set)

    async def get(self, timeout: float | None = None) -> T:
        """The value. Raises `TimeoutError` when it has not come in time."""
        event = asyncio.Event()
        with self._lock:
            if not self._done:
                self._waiting[event] = asyncio.get_running_loop()
        if not self._done:
            try:
                await asyncio.wait_for(event.wait(), timeout)
            finally:
                with self._lock:
                    self._waiting.pop(event, None)
        if not self._done:
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]
