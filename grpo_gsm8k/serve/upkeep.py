"""What is thrown away, and when: results that were fetched, checkpoints past their time, files that nothing names."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import time
from typing import TYPE_CHECKING

from grpo_gsm8k.serve.books import Checkpoint, SamplerRow

if TYPE_CHECKING:
    from grpo_gsm8k.serve.core import Service

FETCHED_S = 600.0  # a result that was fetched is kept so long: the answer may have been lost on its way
KEPT_S = 86400.0  # one that was not
OLD_REQUESTS = 2000  # of a model, behind its snapshot: their numbers are kept no longer
SNAPSHOTS_KEPT, SNAPSHOT_S = 8, 3600.0
"""Unnamed sampler snapshots of a model: the newest ones are kept, and all of the last hour."""


async def sweep(service: Service) -> None:
    """Throw away what nobody will ask for. Called every half minute."""
    now = time.time()
    fetched = [id for id, at in service.fetched.items() if now - at > FETCHED_S]
    idle = [s for s in service.books.sessions.values() if s.ended is None and now - s.seen > service.cfg.idle_s]
    expired = [c for c in service.books.checkpoints.values() if c.expired]
    stale = _stale_samplers(service, now)

    def write(db: sqlite3.Connection) -> None:
        db.executemany("UPDATE requests SET result = NULL WHERE id = ?", [(id,) for id in fetched])
        db.execute("UPDATE requests SET result = NULL WHERE finished < ?", (now - KEPT_S,))
        db.execute(
            "DELETE FROM requests WHERE kind = 'sample' AND state != 'waiting' AND result IS NULL AND finished < ?",
            (now - FETCHED_S,),
        )
        db.execute(
            "DELETE FROM requests WHERE seq < (SELECT snapshot_seq - ? FROM models WHERE id = requests.owner)",
            (OLD_REQUESTS,),
        )
        db.executemany("UPDATE sessions SET ended = ? WHERE id = ?", [(now, session.id) for session in idle])
        db.executemany(
            "DELETE FROM checkpoints WHERE owner = ? AND kind = ? AND name = ?",
            [(c.owner, c.kind, c.name) for c in expired],
        )
        db.executemany("DELETE FROM samplers WHERE id = ?", [(row.id,) for row in stale])

    await asyncio.wrap_future(service.store.write(write, insist=True))
    for id in fetched:
        service.fetched.pop(id, None)
    for session in idle:
        session.ended = now
    for found in expired:
        forget(service, found)
    for row in stale:
        service.books.samplers.pop(row.id, None)
        service.work.forget_folder(row.folder)


def forget(service: Service, found: Checkpoint) -> None:
    """Drop a checkpoint whose row is gone, and its files."""
    service.books.checkpoints.pop((found.owner, found.kind, found.name), None)
    service.work.forget_folder(found.folder)


def _stale_samplers(service: Service, now: float) -> list[SamplerRow]:
    """Unnamed snapshots that later ones of the same model have replaced long ago."""
    by_model: dict[str, list[SamplerRow]] = {}
    for row in service.books.samplers.values():
        if row.path is None and row.folder:
            by_model.setdefault(row.owner, []).append(row)
    return [
        row
        for rows in by_model.values()
        for row in sorted(rows, key=lambda row: row.created)[:-SNAPSHOTS_KEPT]
        if now - max(row.created, service.used.get(row.id, 0.0)) > SNAPSHOT_S
    ]


def remove_orphans(service: Service) -> None:
    """Delete what a crash left behind: temporary folders, and those that no row names."""
    named = {c.folder for c in service.books.checkpoints.values()}
    named |= {row.folder for row in service.books.samplers.values()}
    named |= {model.snapshot for model in service.books.models.values()}
    for kind in ("checkpoints", "models"):
        for path in (service.folder / kind).glob("*"):
            if f"{kind}/{path.name}" not in named:
                shutil.rmtree(path, ignore_errors=True)
