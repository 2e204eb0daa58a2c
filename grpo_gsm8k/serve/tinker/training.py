"""The Tinker wire: sessions, models and training.

A training request that has a number is never refused with an HTTP status: the client counts on, and would wait for ever
for the one behind. It gets 200 and a future that fails. All else is refused at once, with a status that clients raise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from fastapi import Request
from starlette.responses import Response

from grpo_gsm8k.serve import proto
from grpo_gsm8k.serve.app import Json
from grpo_gsm8k.serve.bodies import JSON_BODY, PROTO_BODY, check_optimizer, pack, refuse_unknown
from grpo_gsm8k.serve.core import Service
from grpo_gsm8k.serve.jobs import Refusal
from grpo_gsm8k.serve.tinker.schema import (
    MOST_SEQ,
    PROTOBUF,
    Answer,
    Body,
    CreateModel,
    CreateSession,
    LoadWeights,
    ModelId,
    Op,
    SessionId,
    client_version,
    service_of,
)

PARALLEL_FROM = (0, 18)  # the first client that sends the parts of a call side by side
IN_ORDER_S = 5.0  # that a request of an older one waits for a smaller number


# ---------------------------------------------------------------------------------------------------- sessions


async def health(request: Request) -> Answer:
    """Whether the server can accept requests."""
    if fault := service_of(request).store.fault:
        return Json({"detail": fault}, 503)
    return {"status": "ok"}


async def client_config(body: Body) -> Answer:
    """No flag needs another value than its default."""
    return {}


async def telemetry(request: Request) -> Answer:
    """Accepted, and thrown away."""
    return {"status": "accepted"}


async def create_session(body: CreateSession, request: Request) -> Answer:
    """A client's visit begins."""
    service = service_of(request)
    if service.draining:
        raise Refusal("the server is ending; ask again when it is back", 503)
    info = body.model_dump(include={"tags", "user_metadata", "sdk_version", "project_id", "display_name"})
    key = request.headers.get("x-idempotency-key", "")[:200]
    return {"type": "create_session", "session_id": await service.create_session(metadata=info, key=key)}


async def heartbeat(body: SessionId, request: Request) -> Answer:
    """The client lives."""
    session = service_of(request).books.session(body.session_id)
    session.seen, session.ended = time.time(), None
    return {"type": "session_heartbeat"}


async def finish_session(session_id: str, body: Body, request: Request) -> Response:
    """The client is done; what it made is kept."""
    service = service_of(request)
    session = service.books.session(session_id)
    await service.end_session(session)
    return Response(status_code=204)


# ------------------------------------------------------------------------------------------------------ models


async def create_model(body: CreateModel, request: Request) -> Answer:
    """A new model; the answer is a future."""
    body.refuse_others()
    service, lora = service_of(request), body.lora_config or {"rank": 0}
    check_base(service, body.base_model)
    check_optimizer(body.optimizer_config)
    refuse_unknown(lora, {"rank", "seed", "train_attn", "train_mlp", "train_unembed", "type"})
    rank, seed = lora.get("rank"), lora.get("seed")
    parts = {name: lora.get(name, True) for name in ("train_attn", "train_mlp", "train_unembed")}
    if type(rank) is not int or not (seed is None or type(seed) is int) or {*map(type, parts.values())} != {bool}:
        raise Refusal("lora_config: rank and seed are whole numbers, train_attn, train_mlp and train_unembed booleans")
    request_id, model_id = await service.create_model(
        body.session_id, rank=rank, seed=seed, number=body.model_seq_id, metadata=body.user_metadata, **parts
    )
    return {"request_id": request_id, "model_id": model_id}


async def load_weights(body: LoadWeights, request: Request) -> Answer:
    """A checkpoint, into a model or as a new one; the answer is a future."""
    service, sent = service_of(request), body.model_dump()
    if body.model_id is not None and body.seq_id is not None:
        return await accept(
            request, "load_weights", body.model_id, body.seq_id, pack(JSON_BODY, json.dumps(sent).encode())
        )
    if body.session_id is None or body.model_seq_id is None:
        raise Refusal("load_weights needs model_id and seq_id, or session_id and model_seq_id", 422)
    check_load(sent)
    found = service.books.checkpoint(str(body.path))
    check_base(service, sent.get("base_model") or service.base.name)
    spec = dict(service.books.model(found.owner).spec)
    parts = {name: spec[name] for name in ("train_attn", "train_mlp", "train_unembed")}
    metadata = sent.get("user_metadata")
    request_id, model_id = await service.create_model(
        body.session_id,
        rank=spec["rank"],
        seed=spec["seed"],
        number=body.model_seq_id,
        metadata=metadata if isinstance(metadata, dict) else None,
        load={"path": body.path, "optimizer": body.optimizer},
        **parts,
    )
    return {"request_id": request_id, "model_id": model_id}


def check_base(service: Service, name: Any) -> None:
    """Raise `Refusal` 404 for another base model than the one served."""
    if name != service.base.name:
        raise Refusal(f"base model {str(name)[:200]!r} is not served here; this server has {service.base.name!r}", 404)


async def get_info(body: ModelId, request: Request) -> Answer:
    """What a model is."""
    service = service_of(request)
    model = service.books.model(body.model_id)
    return {
        "type": "get_info",
        "model_id": model.id,
        "is_lora": model.spec["rank"] > 0,
        "lora_rank": model.spec["rank"],
        "model_name": service.base.name,
        "optimizer_config": {"type": "adamw"},
        "model_data": {
            "arch": type(service.work.base.model).__name__,
            "model_name": service.base.name,
            "tokenizer_id": service.base.tokenizer_id,
        },
    }


# ---------------------------------------------------------------------------------------------------- training


async def accept(request: Request, kind: str, model_id: str, seq: int, body: bytes) -> Answer:
    """Put a numbered request on disk; its future."""
    service = service_of(request)
    if service.draining:
        raise Refusal("the server is ending; ask again when it is back", 503)
    # Older clients send one request after the other: what is missing was never sent.
    patience = IN_ORDER_S if client_version(request) < PARALLEL_FROM else service.cfg.gap_s
    return {
        "request_id": await service.train(kind, model_id, body, seq, patience_s=patience),
        "model_id": model_id,
    }


def operation(kind: str) -> Callable[..., Any]:
    """The route of a training request in JSON."""

    async def call(body: Op, request: Request) -> Answer:
        sent = pack(JSON_BODY, json.dumps(body.model_dump()).encode())
        return await accept(request, kind, body.model_id, body.seq_id, sent)

    call.__doc__ = f"Accept {kind}; the answer is a future."
    return call


async def forward_backward(request: Request) -> Answer:
    """Add a gradient, or with forward_only none; protobuf or JSON. The answer is a future."""
    raw = await request.body()
    if not request.headers.get("content-type", "").startswith(PROTOBUF):
        return await _json_training(request, raw)
    from google.protobuf.message import DecodeError

    sent = proto.message("ForwardBackwardRequest")
    try:
        sent.ParseFromString(raw)
    except DecodeError as fault:
        raise Refusal(f"the body is no ForwardBackwardRequest: {fault}") from None
    if sent.seq_id < 1:
        raise Refusal(f"seq_id is {sent.seq_id}; it must be at least 1", 422)
    return await accept(request, "forward_backward", sent.model_id, sent.seq_id, pack(PROTO_BODY, raw))


async def forward(request: Request) -> Answer:
    """Log-probabilities without a gradient, in JSON. The answer is a future."""
    return await _json_training(request, await request.body())


async def _json_training(request: Request, raw: bytes) -> Answer:
    try:
        sent = json.loads(raw)
    except (ValueError, RecursionError) as fault:
        raise Refusal(f"the body is no JSON: {str(fault)[:200]}") from None
    sent = sent if isinstance(sent, dict) else {}
    model_id, seq = sent.get("model_id"), sent.get("seq_id")
    if not isinstance(model_id, str):
        raise Refusal("model_id is missing", 422)
    if type(seq) is not int or not 1 <= seq <= MOST_SEQ:
        raise Refusal(f"seq_id is {str(seq)[:40]}; it must be a whole number, at least 1", 422)
    return await accept(request, "forward_backward", model_id, seq, pack(JSON_BODY, raw))


def check_load(sent: dict[str, Any]) -> None:
    """Raise `Refusal` for what loading a checkpoint cannot be asked."""
    refuse_unknown(
        sent,
        {
            *("type", "model_id", "seq_id", "session_id", "model_seq_id", "path", "optimizer", "base_model"),
            *("user_metadata", "optimizer_config"),
        },
    )
    check_optimizer(sent.get("optimizer_config"))
