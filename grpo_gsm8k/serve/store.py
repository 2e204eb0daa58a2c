"""The journal: SQLite in WAL mode, synced at each commit. What is not in it was not accepted.

One thread writes. Changes that arrive while it waits for the disk share the next commit, so fifty requests cost little
more than one. Readers have a connection of their own.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from grpo_gsm8k.errors import CheckpointError, DiskError

T = TypeVar("T")
Change = Callable[[sqlite3.Connection], Any]

SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE notes(space TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY(space, key));
CREATE TABLE sessions(
    id TEXT PRIMARY KEY, key TEXT UNIQUE, created REAL NOT NULL, ended REAL, info TEXT NOT NULL);
CREATE TABLE models(
    id TEXT PRIMARY KEY, session TEXT NOT NULL, spec TEXT NOT NULL, metadata TEXT, created REAL NOT NULL,
    snapshot TEXT NOT NULL DEFAULT '', snapshot_seq INTEGER NOT NULL DEFAULT 0, steps INTEGER NOT NULL DEFAULT 0,
    ended REAL);
CREATE TABLE requests(
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, owner TEXT NOT NULL, seq INTEGER, key TEXT UNIQUE, digest BLOB,
    body BLOB, state TEXT NOT NULL, applied INTEGER NOT NULL DEFAULT 0, result BLOB, error TEXT, category TEXT,
    created REAL NOT NULL, finished REAL, number INTEGER);
CREATE INDEX requests_of_owner ON requests(owner, seq);
CREATE INDEX unfinished ON requests(created) WHERE state = 'waiting';
CREATE TABLE samplers(
    id TEXT PRIMARY KEY, session TEXT NOT NULL, path TEXT, folder TEXT NOT NULL, owner TEXT NOT NULL,
    created REAL NOT NULL);
CREATE TABLE checkpoints(
    owner TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, folder TEXT NOT NULL, created REAL NOT NULL,
    size INTEGER NOT NULL, public INTEGER NOT NULL DEFAULT 0, expires REAL, metadata TEXT,
    PRIMARY KEY(owner, kind, name));
"""
FORMAT = "2"
_DISK = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
MOST_AT_ONCE = 256  # changes of one commit
RETRY_S = 0.5


class _Item(NamedTuple):
    change: Change
    future: Future[Any]
    insists: bool


class Store:
    """One database; `write` is durable when its future is done."""

    def __init__(self, path: Path) -> None:
        """Open or make the database.

        Raises:
            CheckpointError: the file is no database, or one of another format.
            DiskError: it cannot be written.
        """
        self.path = path
        try:
            self._writer = self._open()
            self._reader = self._open()
            if not self._writer.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                with self._writer:
                    self._writer.executescript(f"BEGIN; {SCHEMA} INSERT INTO meta VALUES('format', '{FORMAT}'); COMMIT")
        except sqlite3.DatabaseError as fault:
            if isinstance(fault, sqlite3.OperationalError):
                raise DiskError(f"{path}: cannot be written: {fault}") from None
            raise CheckpointError(f"{path}: is no journal of a server: {fault}; pick another --out_dir") from None
        found = self.meta("format")
        if found != FORMAT:
            raise CheckpointError(f"{path}: written by another version (format {found}); pick another --out_dir")
        self._reading = threading.Lock()
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self.fault = ""  # why the last commit failed, "" if it did not
        self._closing = False
        self._thread = threading.Thread(target=self._write_all, name="journal", daemon=True)
        self._thread.start()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=30)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = OFF")
        return connection

    def meta(self, key: str) -> str:
        """A setting of the database, "" for none."""
        row = self._writer.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else ""

    def write(self, change: Callable[[sqlite3.Connection], T], *, insist: bool = False) -> Future[T]:
        """Run `change(connection)` in the next transaction; the future is done when it is on disk.

        Its exception is what the change raised; or a `DiskError` where the disk is full, and then nothing of the change
        was written. With `insist` it is tried again until there is room, before all that insists later.
        """
        future: Future[T] = Future()
        self._queue.put(_Item(change, future, insist))
        return future

    def read(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """Rows as they are on disk."""
        with self._reading:
            return self._reader.execute(query, values).fetchall()

    async def put(self, space: str, key: str, value: Any) -> None:
        """Keep a JSON value under (space, key), None to forget it: for the state of a wire.

        Raises:
            DiskError: the disk is full.
        """
        await asyncio.wrap_future(self.write(lambda db: put(db, space, key, value)))

    def notes(self, space: str) -> dict[str, Any]:
        """All that `put` kept in a space, in the order in which the keys were first put."""
        rows = self.read("SELECT key, value FROM notes WHERE space = ? ORDER BY rowid", space)
        return {row["key"]: json.loads(row["value"]) for row in rows}

    def close(self) -> None:
        """Write what is waiting, then close; while the disk is full, without it."""
        self._closing = True
        self._queue.put(None)
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def _write_all(self) -> None:
        owed: list[_Item] = []
        while True:
            batch, ends = owed, False
            while len(batch) < MOST_AT_ONCE and (not batch or not self._queue.empty()):
                item = self._queue.get()
                if item is None:
                    ends = True
                    break
                batch.append(item)
            owed = self._commit(batch) if batch else []
            if ends or (owed and self._closing):
                for item in owed:
                    item.future.set_exception(DiskError(self.fault))
                return
            if owed:
                time.sleep(RETRY_S)

    def _commit(self, batch: list[_Item]) -> list[_Item]:
        """All changes in one transaction, a change that raises is undone by itself; what must be tried again."""
        results: list[tuple[Future[Any], Any, BaseException | None]] = []
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            results.extend((item.future, *self._savepoint(item.change)) for item in batch)
            self._writer.execute("COMMIT")
        except sqlite3.OperationalError as fault:
            if not _is_of_the_disk(fault):
                raise
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            self.fault = f"{self.path}: cannot be written: {fault}"
            for item in batch:
                if not item.insists:
                    item.future.set_exception(DiskError(self.fault))
            return [item for item in batch if item.insists]
        self.fault = ""
        for future, value, error in results:
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)
        return []

    def _savepoint(self, change: Change) -> tuple[Any, BaseException | None]:
        self._writer.execute("SAVEPOINT change")
        try:
            value = change(self._writer)
        except (sqlite3.IntegrityError, ValueError, TypeError, KeyError) as error:
            self._writer.execute("ROLLBACK TO change")
            self._writer.execute("RELEASE change")
            return None, error
        self._writer.execute("RELEASE change")
        return value, None


def put(db: sqlite3.Connection, space: str, key: str, value: Any) -> None:
    """`Store.put` as a part of a larger change."""
    if value is None:
        db.execute("DELETE FROM notes WHERE space = ? AND key = ?", (space, key))
        return
    db.execute(
        "INSERT INTO notes VALUES(?, ?, ?) ON CONFLICT(space, key) DO UPDATE SET value = excluded.value",
        (space, key, json.dumps(value)),
    )


def _is_of_the_disk(fault: sqlite3.OperationalError) -> bool:
    return (fault.sqlite_errorcode & 0xFF) in _DISK
