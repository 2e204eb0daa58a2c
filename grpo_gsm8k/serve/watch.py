"""What the server is doing, as one object, and for a terminal."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any

from grpo_gsm8k import __version__

if TYPE_CHECKING:
    from grpo_gsm8k.serve.core import Service


def status(service: Service) -> dict[str, Any]:
    """Models, queues, counters, the last losses and refusals.

    `models` are newest first, each with its curves (`history`: points of time, step and metrics) and `last` metrics.
    """
    waiting, books, now = service.engine.waiting(), service.books, time.time()
    disk = shutil.disk_usage(service.folder)
    live = [session for session in books.sessions.values() if session.ended is None]
    models = [
        {
            "model_id": model.id,
            "rank": model.spec["rank"],
            "steps": model.steps,
            "queued": waiting["training"].get(model.id, 0),
            "resident": model.id in service.work.models,
            "idle_s": now - model.seen,
            "last": dict(model.last),
            "history": list(model.history),
        }
        for model in sorted(books.models.values(), key=lambda model: -model.created)
    ]
    return {
        "base": service.base.name,
        "version": __version__,
        "uptime_s": now - service.started,
        "sessions": {"live": len(live), "all": len(books.sessions)},
        "models": models,
        "queue": {
            "training": sum(waiting["training"].values()),
            "sampling": waiting["sampling"],
            "decoding": waiting["decoding"],
            "oldest_s": waiting["oldest_s"],
        },
        "totals": dict(service.totals),
        "checkpoints": len(books.checkpoints),
        "samples": list(service.samples),
        "refusals": list(service.refusals),
        "disk": {"free": disk.free, "fault": service.store.fault},
        "rows_independent": service.weights.sampler.rowwise,
    }
