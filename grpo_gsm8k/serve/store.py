"""The journal: SQLite in WAL mode, synced at each commit. What is not here was not accepted.

Writes of many requests that arrive together share one commit.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any


class Store:
    """One file, one writer thread; reads come from memory or from a connection of the reader's own."""

    def __init__(self, path: Path) -> None:
        raise NotImplementedError

    def write(self, change: Callable[[Any], Any]) -> Future[Any]:
        """Run `change(connection)` in the next transaction; the future is done when it is on disk.

        Its exception is `DiskError` where the disk is full; then nothing of it was written.
        """
        raise NotImplementedError

    async def put(self, space: str, key: str, value: Any) -> None:
        """Keep a JSON value under (space, key): for the state of a wire, such as the rewards facade."""
        raise NotImplementedError

    def notes(self, space: str) -> dict[str, Any]:
        """All that `put` kept in a space."""
        raise NotImplementedError
