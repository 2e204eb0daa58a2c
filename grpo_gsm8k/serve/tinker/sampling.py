"""The Tinker wire: sampling sessions, samples, and the futures of all requests."""

from __future__ import annotations

import dataclasses
import sqlite3
import time
from typing import Any

from fastapi import Request
from starlette.responses import Response

from grpo_gsm8k.repro import derive_seed
from grpo_gsm8k.serve import codec, data, store
from grpo_gsm8k.serve.app import Json
from grpo_gsm8k.serve.bodies import refuse_unknown
from grpo_gsm8k.serve.books import SamplerRow, insert
from grpo_gsm8k.serve.core import Service
from grpo_gsm8k.serve.jobs import Refusal, SampleJob
from grpo_gsm8k.serve.tinker.schema import (
    MOST_SEQ,
    PROTOBUF,
    Answer,
    Body,
    RequestId,
    RetrieveFutures,
    SamplerId,
    SamplingSession,
    service_of,
)

POLL_S = 20.0  # that retrieve_future waits; clients give up after 45
KNOWN_SAMPLE = {
    *("type", "num_samples", "prompt", "sampling_params", "base_model", "model_path", "sampling_session_id", "seq_id"),
    *("prompt_logprobs", "topk_prompt_logprobs", "topk_sample_logprobs", "prompt_logprobs_last_n"),
    *("target_prompt_logprobs", "prompt_alt_tokens_k"),
}
KNOWN_PARAMS = {"max_tokens", "seed", "stop", "temperature", "top_k", "top_p", "type"}


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
    if service.books.samplers[sampler_id].path != body.model_path:
        raise Refusal(f"sampling session {body.sampling_session_seq_id} of this session samples from other weights")
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
        prompt_targets=data.table(sent.get("target_prompt_logprobs"), "target_prompt_logprobs"),
        prompt_alternatives=whole(sent, "prompt_alt_tokens_k", 0),
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
