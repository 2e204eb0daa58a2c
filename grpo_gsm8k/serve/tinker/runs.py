"""The Tinker wire, second part: training runs, checkpoints, downloads, and lists of what there is."""

from __future__ import annotations

import dataclasses
import sqlite3
import tarfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import Request
from pydantic import StrictStr
from starlette.responses import FileResponse, Response, StreamingResponse

from grpo_gsm8k.serve import upkeep
from grpo_gsm8k.serve.app import Json
from grpo_gsm8k.serve.auth import LINK_S, Keeper
from grpo_gsm8k.serve.bodies import check_ttl
from grpo_gsm8k.serve.books import TYPES, Checkpoint, Model
from grpo_gsm8k.serve.core import Service
from grpo_gsm8k.serve.jobs import Refusal
from grpo_gsm8k.serve.tinker.schema import Answer, Body, client_version, service_of

LEFT_OUT = {"optimizer", "spec.json"}  # of what is downloaded
EXTERNAL_FROM = (0, 28)  # older clients refuse a whole list for one checkpoint of the type external
BLOCK = 512  # bytes, of a tar file
CHECKPOINT = "/training_runs/{run}/checkpoints/{kind}/{name}"


class CheckpointPath(Body):
    """A checkpoint's path."""

    tinker_path: StrictStr


class Ttl(Body):
    """Seconds to live; null for ever."""

    ttl_seconds: Any = None


# ------------------------------------------------------------------------------------------------------- lists


async def capabilities(request: Request) -> Answer:
    """What can be trained and sampled."""
    base = service_of(request).base
    model = {"model_name": base.name, "max_context_length": base.context, "trainable": True, "sampleable": True}
    return {"supported_models": [model]}


async def status(request: Request) -> Answer:
    """What the server is doing; see `watch.status`. No route of the cloud's."""
    return service_of(request).status()


def page(items: list[Any], limit: int, offset: int) -> tuple[list[Any], dict[str, int]]:
    """Some items of a list, and the cursor that says which."""
    if not (0 <= offset < 2**31 and 0 <= limit < 2**31):
        raise Refusal("limit and offset must be at least 0", 422)
    limit = min(limit, 1000)
    return items[offset : offset + limit], {"offset": offset, "limit": limit, "total_count": len(items)}


async def sessions(request: Request, limit: int = 20, offset: int = 0) -> Answer:
    """The ids of all sessions, newest first."""
    every = sorted(service_of(request).books.sessions.values(), key=lambda found: -found.created)
    return {"sessions": [found.id for found in page(every, limit, offset)[0]]}


async def session(session_id: str, request: Request) -> Answer:
    """The models and samplers of a session."""
    books = service_of(request).books
    found = books.session(session_id)
    return {
        "training_run_ids": [model.id for model in books.models.values() if model.session == found.id],
        "sampler_ids": [row.id for row in books.samplers.values() if row.session == found.id],
    }


async def sampler(sampler_id: str, request: Request) -> Answer:
    """What a sampling session samples from."""
    service = service_of(request)
    row = service.books.samplers.get(sampler_id)
    if row is None:
        raise Refusal(f"there is no sampling session {sampler_id[:100]!r}", 404)
    return {"sampler_id": row.id, "base_model": service.base.name, "model_path": row.path}


async def training_runs(request: Request, limit: int = 20, offset: int = 0, access_scope: str = "owned") -> Answer:
    """All training runs, newest first."""
    service = service_of(request)
    every = sorted(service.books.models.values(), key=lambda model: -model.created)
    some, cursor = page(every, limit, offset)
    return {"training_runs": [_run(service, model, request) for model in some], "cursor": cursor}


async def training_run(run: str, request: Request) -> Answer:
    """One of them."""
    service = service_of(request)
    return _run(service, service.books.model(run), request)


def _run(service: Service, model: Model, request: Request) -> dict[str, Any]:
    mine = [c for c in _visible(service, request) if c.owner == model.id]

    def last(kind: str) -> dict[str, Any] | None:
        return next((_described(c) for c in mine if c.kind == kind), None)

    return {
        "training_run_id": model.id,
        "base_model": service.base.name,
        "model_owner": "local",
        "is_lora": model.spec["rank"] > 0,
        "lora_rank": model.spec["rank"] or None,
        "corrupted": False,
        "last_request_time": _time(model.seen),
        "last_checkpoint": last("weights"),
        "last_sampler_checkpoint": last("sampler_weights"),
        "user_metadata": _texts(model.metadata),
    }


def _texts(metadata: Any) -> dict[str, str] | None:
    """Clients take a mapping from text to text alone."""
    return None if metadata is None else {str(k): v if isinstance(v, str) else str(v) for k, v in metadata.items()}


async def checkpoints_of_run(run: str, request: Request) -> Answer:
    """A run's checkpoints, newest first."""
    service = service_of(request)
    service.books.model(run)
    return {"checkpoints": [_described(c) for c in _visible(service, request) if c.owner == run]}


async def checkpoints(request: Request, limit: int = 100, offset: int = 0) -> Answer:
    """All checkpoints, newest first."""
    some, cursor = page(_visible(service_of(request), request), limit, offset)
    return {"checkpoints": [_described(found) for found in some], "cursor": cursor}


def _visible(service: Service, request: Request) -> list[Checkpoint]:
    """The checkpoints that this client can read of, newest first."""
    hides = client_version(request) < EXTERNAL_FROM
    every = [c for c in service.books.checkpoints.values() if not c.expired]
    return sorted((c for c in every if not (hides and c.kind == "external_weights")), key=lambda found: -found.created)


def _described(found: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{found.kind}/{found.name}",
        "checkpoint_type": TYPES[found.kind],
        "time": _time(found.created),
        "tinker_path": found.path,
        "size_bytes": found.size,
        "public": found.public,
        "user_metadata": _texts(found.metadata),
        "expires_at": None if found.expires is None else _time(found.expires),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


async def weights_info(body: CheckpointPath, request: Request) -> Answer:
    """What a checkpoint can be loaded into."""
    service = service_of(request)
    spec = service.books.model(service.books.checkpoint(body.tinker_path).owner).spec
    return {
        "base_model": service.base.name,
        "is_lora": spec["rank"] > 0,
        "lora_rank": spec["rank"],
        **{name: spec[name] for name in ("train_unembed", "train_mlp", "train_attn")},
        "optimizer_config": {"type": "adamw"},
    }


# ------------------------------------------------------------------------------------------------- one of them


def _named(service: Service, run: str, kind: str, name: str) -> Checkpoint:
    return service.books.checkpoint(f"tinker://{run}/{kind}/{name}")


async def delete(run: str, kind: str, name: str, request: Request) -> Response:
    """Delete a checkpoint and its files."""
    service = service_of(request)
    found = _named(service, run, kind, name)
    await service.write(lambda db: _update(db, found, "DELETE FROM checkpoints"))
    upkeep.forget(service, found)
    return Response(status_code=204)


async def publish(run: str, kind: str, name: str, request: Request) -> Response:
    """Mark a checkpoint as public; whoever has the key reads all of them here."""
    return await _set(request, (run, kind, name), "public", 1, True)


async def unpublish(run: str, kind: str, name: str, request: Request) -> Response:
    """Mark it as private again."""
    return await _set(request, (run, kind, name), "public", 0, False)


async def set_ttl(run: str, kind: str, name: str, body: Ttl, request: Request) -> Response:
    """Give a checkpoint a time to live, from now."""
    expires = None if body.ttl_seconds is None else time.time() + check_ttl(body.ttl_seconds)
    return await _set(request, (run, kind, name), "expires", expires, expires)


async def _set(request: Request, which: tuple[str, str, str], field: str, stored: Any, value: Any) -> Response:
    service = service_of(request)
    found = _named(service, *which)
    await service.write(lambda db: _update(db, found, f"UPDATE checkpoints SET {field} = ?", stored))
    changed: Any = {field: value}
    service.books.checkpoints[found.owner, found.kind, found.name] = dataclasses.replace(found, **changed)
    return Response(status_code=204)


def _update(db: sqlite3.Connection, found: Checkpoint, statement: str, *values: Any) -> None:
    where = " WHERE owner = ? AND kind = ? AND name = ?"
    db.execute(statement + where, (*values, found.owner, found.kind, found.name))


# --------------------------------------------------------------------------------------------------- downloads


async def urls(run: str, kind: str, name: str, request: Request) -> Answer:
    """Links to a checkpoint's files, which need no key."""
    service = service_of(request)
    found = _named(service, run, kind, name)
    expires = int(time.time() + LINK_S)
    links = {file: _link(request, found, file, expires) for file in _files(service.folder / found.folder)}
    return {"urls": links, "expires": _time(expires)}


async def archive(run: str, kind: str, name: str, request: Request) -> Response:
    """A link to all files as one tar file."""
    found = _named(service_of(request), run, kind, name)
    expires = int(time.time() + LINK_S)
    link = _link(request, found, "archive.tar", expires)
    headers = {"Location": link, "Expires": formatdate(expires, usegmt=True)}
    return Json({"url": link, "expires": _time(expires)}, 302, headers)


def _link(request: Request, found: Checkpoint, file: str, expires: int) -> str:
    keeper: Keeper = request.app.state.keeper
    path = f"training_runs/{quote(found.owner)}/checkpoints/{found.kind}/{quote(found.name, safe='')}/{quote(file)}"
    query = f"expires={expires}&signature={keeper.sign(f'{found.path}|{file}', expires)}"
    return f"{str(request.base_url).rstrip('/')}/api/v1/download/{path}?{query}"


async def download(
    run: str, kind: str, name: str, file: str, request: Request, expires: int = 0, signature: str = ""
) -> Response:
    """A file behind a signed link."""
    service, keeper = service_of(request), request.app.state.keeper
    keeper.check_link(f"tinker://{run}/{kind}/{name}|{file}", expires, signature)
    folder = service.folder / _named(service, run, kind, name).folder
    if file == "archive.tar":
        return StreamingResponse(_tar(folder), media_type="application/x-tar")
    if file not in _files(folder):
        raise Refusal(f"there is no file {file[:100]!r} in this checkpoint", 404)
    return FileResponse(folder / file, media_type="application/octet-stream")


def _files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*") if p.is_file() and p.name not in LEFT_OUT)


def _tar(folder: Path) -> Iterator[bytes]:
    """The files as a tar archive, piece by piece."""
    for name in _files(folder):
        path = folder / name
        info = tarfile.TarInfo(name)
        info.size, info.mtime = path.stat().st_size, int(path.stat().st_mtime)
        yield info.tobuf(tarfile.PAX_FORMAT)
        with path.open("rb") as handle:
            while piece := handle.read(1 << 20):
                yield piece
        yield bytes(-info.size % BLOCK)
    yield bytes(2 * BLOCK)
