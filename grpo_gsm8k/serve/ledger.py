"""Requests from their arrival to their end: accepted once on disk, given on when it is their turn, and answered.

A request that is sent again has the key of the first one, and is that one. What it led to is written before anyone is
told.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import sqlite3
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.serve import codec
from grpo_gsm8k.serve.books import Entry, SeqQueue, insert
from grpo_gsm8k.serve.jobs import Refusal, Result
from grpo_gsm8k.serve.store import Store
from grpo_gsm8k.serve.work import Outcome

MOST_WAITING = 100_000  # requests


class Ledger:
    """The part of `core.Service` that knows nothing of models: `give` and `note` are what it does with a request."""

    def __init__(self, store: Store, gap_s: float) -> None:
        self.store, self.gap_s = store, gap_s
        self.draining = False
        self.totals: Counter[str] = Counter()
        self.fetched: dict[str, float] = {}  # when a result was last handed out
        self._numbers = itertools.count(1 + (store.read("SELECT max(number) AS n FROM requests")[0]["n"] or 0))
        self._lock = threading.RLock()
        self._live: dict[str, Entry] = {}
        self._keys: dict[str, Entry] = {}
        self._queues: dict[str, SeqQueue] = {}

    def give(self, entry: Entry) -> None:
        """A request whose turn has come. Raises `Refusal` where it cannot be done."""
        raise NotImplementedError

    def note(self, entry: Entry, result: Result) -> None:
        """How a request ended, when it is on disk."""
        raise NotImplementedError

    def drain(self) -> None:
        """No new requests, and nobody waits for an old one: the server ends."""
        self.draining = True
        for entry in list(self._live.values()):
            entry.done.interrupt()

    def recall(self) -> int:
        """Take up what the journal says is still to be done; how many requests that is."""
        ended = (
            "SELECT owner, max(seq) AS seq FROM requests WHERE state != 'waiting' AND kind != 'sample' GROUP BY owner"
        )
        for row in self.store.read(ended):
            self._queues[row["owner"]] = SeqQueue((row["seq"] or 0) + 1)
        for row in self.store.read("SELECT * FROM requests WHERE state = 'waiting' ORDER BY created, seq"):
            entry = Entry(**{name: row[name] for name in ("id", "kind", "owner", "body", "seq", "key", "created")})
            self._register(entry)
            entry.accepted.set(None)
            self._enqueue(entry)
        return len(self._live)

    async def submit(
        self,
        kind: str,
        owner: str,
        body: bytes,
        *,
        seq: int | None = None,
        key: str | None = None,
        patience_s: float = 1e9,
        changes: Sequence[Callable[[sqlite3.Connection], Any]] = (),
        then: Callable[[], Any] = lambda: None,
    ) -> str:
        """Accept a request: its id, once it is on disk.

        Args:
            body: see `bodies.pack`.
            key: of a request that may be sent again. With another body it is a new request, which fails.
            patience_s: how long it waits for smaller numbers, at most `--gap_s`.
            changes: written together with it.
            then: called when that is done.

        Raises:
            DiskError: the disk is full, and nothing was accepted.
        """
        sent = Entry(uuid.uuid4().hex, kind, owner, body, seq, key, patience_s=patience_s)
        with self._lock:
            entry = self._keys.get(key or "")
            known = self.store.read("SELECT id, digest FROM requests WHERE key = ?", key) if key and not entry else []
            other = (entry and entry.digest != sent.digest) or (known and known[0]["digest"] != sent.digest)
            if known and not other:
                return str(known[0]["id"])
            if entry is None and not known:
                if len(self._live) >= MOST_WAITING:
                    raise Refusal(f"{MOST_WAITING} requests are waiting; try again later", 429)
                entry = sent
                self._register(entry)
                self.store.write(functools.partial(_insert_request, entry, tuple(changes))).add_done_callback(
                    functools.partial(self._accepted, entry, then)
                )
        if other or entry is None:
            await self._fail_reused(sent)
            return sent.id
        await entry.accepted.get()
        return entry.id

    async def _fail_reused(self, sent: Entry) -> None:
        """Write a request that bears another one's number: it has failed, and changes nothing."""
        what = f"seq_id {sent.seq}" if sent.seq is not None else "this number"
        why = f"{what} was given to another request already; a request that is sent again must be the same"
        result, now = Result(sent.kind, error=why), time.time()
        ended: dict[str, Any] = {"state": "failed", "error": why, "category": result.category, "finished": now}

        def write(db: sqlite3.Connection) -> None:
            names: dict[str, Any] = {"id": sent.id, "kind": sent.kind, "owner": sent.owner, "created": now}
            insert(db, "requests", **names, **ended, number=next(self._numbers))

        await asyncio.wrap_future(self.store.write(write))
        self.note(sent, result)

    async def result(self, request_id: str, timeout: float) -> Result | None:
        """How a request ended; None if it has not within `timeout` seconds. Raises `Refusal` 404 for an unknown id."""
        entry = self._live.get(request_id)
        if entry is None:
            return self._stored(request_id)
        try:
            found = await entry.done.get(timeout if not self.draining else 0.05)
        except TimeoutError:
            return None
        self.fetched[request_id] = time.time()
        return found

    async def wait(self, request_id: str) -> Any:
        """The value of a request, however long it takes. Raises `Refusal` with its error where it failed."""
        found = None
        while found is None:
            found = await self.result(request_id, 60.0)
            if found is None and self.draining:
                raise Refusal("the server is ending; ask again when it is back", 503)
        if found.error:
            raise Refusal(found.error, 400 if found.category == "user" else 500)
        return found.value

    def _stored(self, request_id: str) -> Result:
        rows = self.store.read("SELECT * FROM requests WHERE id = ?", request_id)
        if not rows:
            raise Refusal(f"there is no request {request_id[:100]!r} on this server", 404)
        row = rows[0]
        self.fetched[request_id] = time.time()
        if row["error"] is not None:
            return Result(row["kind"], error=row["error"], category=row["category"])
        if row["result"] is None:
            raise Refusal(f"the result of request {request_id[:100]!r} has been fetched and is no longer kept", 404)
        return Result(row["kind"], codec.decode(row["kind"], row["result"]), encoded=row["result"])

    def _register(self, entry: Entry) -> None:
        self._live[entry.id] = entry
        if entry.key:
            self._keys[entry.key] = entry

    def _forget(self, entry: Entry) -> None:
        self._live.pop(entry.id, None)
        if entry.key:
            self._keys.pop(entry.key, None)

    def _accepted(self, entry: Entry, then: Callable[[], Any], written: Future[Any]) -> None:
        """The request is on disk, or cannot be."""
        error = written.exception()
        if error is not None:
            with self._lock:
                self._forget(entry)
            entry.accepted.fail(error)
            return
        self.totals["requests"] += 1
        then()
        self._enqueue(entry)
        entry.accepted.set(None)

    def _enqueue(self, entry: Entry) -> None:
        """Give a request to the engine as soon as its turn has come."""
        try:
            with self._lock:
                numbered = entry.seq is not None and entry.kind != "sample"
                for ready in self._queue(entry.owner).arrive(entry) if numbered else [entry]:
                    self.give(ready)
        except Refusal as refusal:
            self._finish(entry, Result(entry.kind, error=str(refusal)), Outcome(None), False)

    def _queue(self, model_id: str) -> SeqQueue:
        return self._queues.setdefault(model_id, SeqQueue())

    def expire_gaps(self) -> None:
        """Fail requests that have waited too long for one with a smaller number. Called now and then."""
        with self._lock:
            expired = [queue.expire(self.gap_s) for queue in self._queues.values()]
        for why, entries in expired:
            for entry in entries:
                self._finish(entry, Result(entry.kind, error=why), Outcome(None), False)

    def _finish(self, entry: Entry, result: Result, outcome: Outcome, applied: bool) -> None:
        """Write how a request ended, then tell those who wait for it."""

        if not result.error:
            result = dataclasses.replace(result, encoded=codec.encode(result.value))

        def write(db: sqlite3.Connection) -> None:
            replays = applied and (outcome.replays or bool(result.error))
            db.execute(
                "UPDATE requests SET state = ?, applied = ?, result = ?, error = ?, category = ?, finished = ?,"
                " number = ?" + ("" if replays else ", body = NULL") + " WHERE id = ?",
                (
                    *("failed" if result.error else "done", applied, result.encoded or None, result.error or None),
                    *(result.category, time.time(), next(self._numbers), entry.id),
                ),
            )
            for change in outcome.changes:
                change(db)

        def tell(written: Future[Any]) -> None:
            if error := written.exception():  # the server ends while the disk is full: it is done again
                say(f"request {entry.id} ({entry.kind}) is done again at the next start: {error}")
                return
            with self._lock:
                for step in outcome.after:
                    step()
                self._forget(entry)
            self.note(entry, result)
            entry.done.set(result)

        self.store.write(write, insist=True).add_done_callback(tell)

    def next_number(self, owner: str) -> int:
        """The number that the next request of a model bears, if it comes from this process."""
        taken = [e.seq for e in list(self._live.values()) if e.owner == owner and e.seq]
        return max([self._queue(owner).expected - 1, *taken]) + 1


def _insert_request(
    entry: Entry, changes: Sequence[Callable[[sqlite3.Connection], Any]], db: sqlite3.Connection
) -> None:
    for change in changes:
        change(db)
    fields = {name: getattr(entry, name) for name in ("id", "kind", "owner", "seq", "key", "digest", "body", "created")}
    insert(db, "requests", **fields, state="waiting")
