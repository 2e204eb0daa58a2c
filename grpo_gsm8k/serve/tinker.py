"""The Tinker wire, first part: sessions, models, training, sampling and futures.

A training request that has a number is never refused with an HTTP status: the client counts on, and would wait for ever
for the one behind. It gets 200 and a future that fails. All else is refused at once, with a status that clients raise.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr
from starlette.responses import Response

from grpo_gsm8k.repro import derive_seed
from grpo_gsm8k.serve import codec, data, proto, store
from grpo_gsm8k.serve.app import Json
from grpo_gsm8k.serve.auth import required
from grpo_gsm8k.serve.books import SamplerRow, insert
from grpo_gsm8k.serve.core import Service
from grpo_gsm8k.serve.jobs import Refusal, SampleJob
from grpo_gsm8k.serve.work import JSON_BODY, PROTO_BODY, check_optimizer, pack, refuse_unknown

POLL_S = 20.0  # that retrieve_future waits; clients give up after 45
MOST_SEQ = 2**62
PARALLEL_FROM = (0, 18)  # the first client that sends the parts of a call side by side
IN_ORDER_S = 5.0  # that a request of an older one waits for a smaller number
PROTOBUF = "application/x-protobuf"
KNOWN_SAMPLE = {
    *("type", "num_samples", "prompt", "sampling_params", "base_model", "model_path", "sampling_session_id", "seq_id"),
    *("prompt_logprobs", "topk_prompt_logprobs", "topk_sample_logprobs", "prompt_logprobs_last_n"),
}
KNOWN_PARAMS = {"max_tokens", "seed", "stop", "temperature", "top_k", "top_p", "type"}


class Body(BaseModel):
    """A JSON body; fields that are not known are refused unless they ask for nothing."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    def refuse_others(self) -> None:
        """Raise `Refusal` for a field that asks for something that is not done here."""
        refuse_unknown(self.model_extra or {}, {"type"})


class CreateSession(Body):
    """A client's visit begins."""

    tags: list[str] = Field(default_factory=list)
    user_metadata: dict[str, Any] | None = None
    sdk_version: StrictStr = ""
    project_id: StrictStr | None = None
    display_name: StrictStr | None = None


class SessionId(Body):
    """A session."""

    session_id: StrictStr


class CreateModel(SessionId):
    """A new LoRA adapter; without a lora_config, or with rank 0, all weights."""

    model_seq_id: StrictInt = Field(ge=0, le=MOST_SEQ)
    base_model: StrictStr
    user_metadata: dict[str, Any] | None = None
    lora_config: dict[str, Any] | None = None
    optimizer_config: dict[str, Any] | None = None


class ModelId(Body):
    """A training run."""

    model_id: StrictStr


class Op(ModelId):
    """A training request with its number; what else it holds is checked when its turn comes."""

    seq_id: StrictInt = Field(ge=1, le=MOST_SEQ)


class LoadWeights(Body):
    """Into a model (with model_id and seq_id), or as a new one (with session_id and model_seq_id)."""

    model_id: StrictStr | None = None
    seq_id: StrictInt | None = Field(default=None, ge=1, le=MOST_SEQ)
    session_id: StrictStr | None = None
    model_seq_id: StrictInt | None = Field(default=None, ge=0, le=MOST_SEQ)
    path: Any = None
    optimizer: Any = False


class SamplingSession(SessionId):
    """Sample from the base or from a path."""

    sampling_session_seq_id: StrictInt = Field(ge=0, le=MOST_SEQ)
    base_model: StrictStr | None = None
    model_path: StrictStr | None = None


class SamplerId(Body):
    """A sampling session."""

    sampling_session_id: StrictStr


class RequestId(Body):
    """A future."""

    request_id: StrictStr
    allow_metadata_only: bool = False


class Target(Body):
    """The requests of a sampling session whose ends are watched for."""

    sampling_session_id: StrictStr
    cloned_sampler_id: StrictInt = 0


class RetrieveFutures(Body):
    """Which requests of a sampling session have ended since `prev_cursor`."""

    target: Target
    prev_cursor: StrictInt = Field(default=0, ge=0, le=MOST_SEQ)
    timeout: float | None = None
    retrieved_request_ids: list[str] = Field(default_factory=list)


def service_of(request: Request) -> Service:
    """The service that this application stands on."""
    found: Service = request.app.state.service
    return found


Answer = dict[str, Any] | Response


def router() -> APIRouter:
    """All routes of this part."""
    routes = APIRouter(prefix="/api/v1", tags=["tinker"])
    routes.get("/healthz", response_model=None)(health)
    secured = APIRouter(dependencies=[Depends(required)])
    posts: dict[str, Callable[..., Any]] = {
        "client/config": client_config,
        "client/dynamic_config": client_config,
        "create_session": create_session,
        "session_heartbeat": heartbeat,
        "sessions/{session_id}/finish": finish_session,
        "telemetry": telemetry,
        "create_model": create_model,
        "get_info": get_info,
        "forward_backward": forward_backward,
        "forward": forward,
        "load_weights": load_weights,
        "create_sampling_session": create_sampling_session,
        "join_sampling_session": join_sampling_session,
        "asample": asample,
        "retrieve_future": retrieve_future,
        "retrieve_futures": retrieve_futures,
        "cancel_future": cancel_future,
        "copy_weights": not_here("copy_weights: there is one project here; load the checkpoint as it is"),
        "create_custom_loss": not_here(
            "create_custom_loss: losses are not uploaded here; forward_backward_custom works"
        ),
    }
    for path, call in posts.items():
        secured.post(f"/{path}", response_model=None, name=path)(call)
    for kind in ("optim_step", "save_weights", "save_weights_for_sampler", "save_weights_external", "unload_model"):
        secured.post(f"/{kind}", response_model=None, name=kind)(operation(kind))
    routes.include_router(secured)
    return routes


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


def client_version(request: Request) -> tuple[int, ...]:
    """The first two numbers of the client's version; large ones for a client that does not say."""
    parts = request.headers.get("x-stainless-package-version", "").split(".")[:2]
    return tuple(map(int, parts)) if len(parts) == 2 and all(map(str.isdecimal, parts)) else (1 << 30, 0)


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


# ---------------------------------------------------------------------------------------------------- sampling


async def create_sampling_session(body: SamplingSession, request: Request) -> Answer:
    """Something to sample from: the base, or saved weights."""
    body.refuse_others()
    service = service_of(request)
    service.books.session(body.session_id)
    name = body.model_path or body.base_model
    if not name:
        raise Refusal("create_sampling_session needs model_path or base_model", 422)
    folder, sampler_id = service.folder_of(name), f"{body.session_id}:sample:{body.sampling_session_seq_id}"
    if sampler_id not in service.books.samplers:
        row = SamplerRow(sampler_id, body.session_id, body.model_path, folder, "", time.time())
        await service.write(lambda db: insert(db, "samplers", or_ignore=True, **vars(row)))
        service.books.samplers.setdefault(sampler_id, row)
    return {"type": "create_sampling_session", "sampling_session_id": sampler_id}


async def join_sampling_session(body: SamplerId, request: Request) -> Answer:
    """A number for a copy of a client, which numbers its requests from there times 10⁹."""
    service = service_of(request)
    if body.sampling_session_id not in service.books.samplers:
        raise Refusal(f"there is no sampling session {body.sampling_session_id[:100]!r}", 404)
    return {"type": "join_sampling_session", "client_counter": await _next_clone(service, body)}


async def _next_clone(service: Service, body: SamplerId) -> int:
    def write(db: sqlite3.Connection) -> int:
        values = ("clones", body.sampling_session_id)
        known = db.execute("SELECT value FROM notes WHERE space = ? AND key = ?", values).fetchone()
        number = int(known[0]) + 1 if known else 1
        store.put(db, *values, number)
        return number

    return int(await service.write(write))


async def asample(body: Body, request: Request) -> Answer:
    """Samples of a prompt; the answer is a future, and an id for each sample to be."""
    service, sent = service_of(request), dict(body.model_extra or {})
    if service.draining:
        raise Refusal("the server is ending; ask again when it is back", 503)
    job = job_of(sent)
    sampler_id, seq = sent.get("sampling_session_id"), sent.get("seq_id")
    weights = sampler_id or sent.get("model_path") or sent.get("base_model")
    if not isinstance(weights, str):
        raise Refusal("asample needs sampling_session_id, model_path or base_model", 422)
    if sampler_id and (type(seq) is not int or not 0 <= seq <= MOST_SEQ):
        raise Refusal(f"seq_id is {str(seq)[:40]}; it must be a whole number", 422)
    if sampler_id and type(seq) is int and job.seed is None:  # the same script draws the same, run again
        number = sampler_id.rpartition(":")[2]
        job = dataclasses.replace(job, seed=derive_seed(service.cfg.seed, "unseeded", number, seq))
    request_id = await service.sample(weights, job, key=f"{sampler_id}#{seq}" if sampler_id else "", seq=seq)
    return {
        "request_id": request_id,
        "sample_sequence_ids": [f"{request_id}:{i}" for i in range(job.num_samples)],
    }


def job_of(sent: dict[str, Any]) -> SampleJob:
    """The job that an asample body asks for. Raises `Refusal`."""
    refuse_unknown(sent, KNOWN_SAMPLE)
    params = sent.get("sampling_params") or {}
    if not isinstance(params, dict):
        raise Refusal("sampling_params must be an object")
    refuse_unknown(params, KNOWN_PARAMS)

    def whole(values: dict[str, Any], name: str, default: Any) -> Any:
        value = values.get(name)
        if value is not None and type(value) is not int:
            raise Refusal(f"{name} is {str(value)[:40]}; it must be a whole number")
        return default if value is None else value

    def number(name: str, default: float) -> float:
        value = params.get(name, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise Refusal(f"{name} is {str(value)[:40]}; it must be a number")
        return float(value)

    stop_ids, stop_strings = _stop(params.get("stop"))
    last_n, prompt_logprobs = whole(sent, "prompt_logprobs_last_n", None), bool(sent.get("prompt_logprobs"))
    ids = tuple(data.token_ids(sent.get("prompt")).tolist())
    if last_n is not None and not (prompt_logprobs and 1 <= last_n < len(ids)):
        raise Refusal("prompt_logprobs_last_n needs prompt_logprobs, and must be 1 to the prompt's length less one")
    return SampleJob(
        token_ids=ids,
        num_samples=whole(sent, "num_samples", 1),
        max_tokens=whole(params, "max_tokens", None),
        temperature=number("temperature", 1.0),
        top_k=whole(params, "top_k", -1),
        top_p=number("top_p", 1.0),
        seed=whole(params, "seed", None),
        stop_ids=stop_ids,
        stop_strings=stop_strings,
        prompt_logprobs=prompt_logprobs,
        topk_prompt_logprobs=whole(sent, "topk_prompt_logprobs", 0),
        topk_sample_logprobs=whole(sent, "topk_sample_logprobs", 0),
        prompt_logprobs_last_n=last_n,
    )


def _stop(stop: Any) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    """Ids and strings that end a sample; both None for the model's own ends, nothing for an empty list."""
    if stop is None:
        return None, None
    stops = [stop] if isinstance(stop, str) else stop
    if isinstance(stops, list) and len(stops) <= 64:
        if all(type(s) is int for s in stops):
            return tuple(stops), None
        if all(isinstance(s, str) and 0 < len(s) <= 1000 for s in stops):
            return None, tuple(stops)
    raise Refusal("stop must be a string, up to 64 strings, or up to 64 token ids")


# ----------------------------------------------------------------------------------------------------- futures


async def retrieve_future(body: RequestId, request: Request) -> Answer:
    """The result of a request, its error, or after a while the advice to ask again."""
    service = service_of(request)
    found = await service.result(body.request_id, POLL_S)
    if found is None:
        state = {"queue_state": "active"}
        if service.store.fault:
            state = {"queue_state": "paused_capacity", "queue_state_reason": service.store.fault}
        return {"type": "try_again", "request_id": body.request_id, **state}
    if found.error:
        return {"error": found.error, "category": found.category}
    if codec.is_binary(found.kind) and PROTOBUF in request.headers.get("accept", ""):
        return Response(found.encoded, media_type=PROTOBUF)
    return Json(codec.as_json(found.value))


async def retrieve_futures(body: RetrieveFutures, request: Request) -> Answer:
    """The requests of a sampling session that have ended since the cursor."""
    service, sampler_id = service_of(request), body.target.sampling_session_id
    if sampler_id not in service.books.samplers:
        raise Refusal(f"there is no sampling session {sampler_id[:100]!r}", 404)
    timeout = min(max(body.timeout if body.timeout is not None else POLL_S, 0.0), POLL_S)
    ended = await service.ended_since(sampler_id, body.target.cloned_sampler_id, body.prev_cursor, timeout)
    completions = [
        {"state": "failed" if row["error"] is not None else "finished", "request_id": row["id"]} for row in ended
    ]
    return {"completions": completions, "cursor": ended[-1]["number"] if ended else body.prev_cursor}


async def cancel_future(body: RequestId, request: Request) -> Response:
    """Nobody waits for these samples any more: they are not begun."""
    service_of(request).engine.cancel(body.request_id)
    return Response(status_code=204)


def not_here(why: str) -> Callable[..., Any]:
    """A route that refuses."""

    async def call(request: Request) -> Answer:
        raise Refusal(why)

    return call


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
