"""Results of the core as they come: whole, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, cast

from fastapi import Response
from fastapi.responses import StreamingResponse

from grpo_gsm8k.serve.core import Service
from grpo_gsm8k.serve.jobs import Refusal, SampledSequence, SampleResult
from grpo_gsm8k.serve.openai.answers import ChatStream, CompletionStream, usage
from grpo_gsm8k.serve.openai.schema import Sampling

LOOK_S = 0.05  # between two looks at what was sampled since
PING_S = 10.0  # an event stream says something at least so often, so that no proxy cuts it off


async def finished(service: Service, request_id: str, n: int) -> SampleResult:
    """A job's result; one that only read its prompt has empty samples."""
    result = cast(SampleResult, await service.wait(request_id))
    if result.sequences:
        return result
    empty = (SampledSequence((), (), "length"),) * n
    return SampleResult(empty, result.prompt_logprobs, result.topk_prompt)


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """{error: {message, type, param, code}}."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = "invalid_api_key" if status == 401 else code
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def stream(
    service: Service,
    body: Sampling,
    head: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    accepted: Sequence[str],
    streams: Sequence[Sequence[CompletionStream | ChatStream]],
) -> Response:
    """Server-sent events: the tokens of each prompt's samples while they are drawn, one prompt after the other."""
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    # What stands at the beginning is known when the prompt has been read, which the whole result says.
    live = not getattr(body, "echo", False) and body.prompt_logprobs is None

    def lines_of(told: Sequence[CompletionStream | ChatStream], result: SampleResult | None, sequences: Any) -> str:
        events = [
            event for one, sequence in zip(told, sequences, strict=False) for event in one.events(sequence, result)
        ]
        more = {"usage": None} if with_usage else {}
        return "".join(_event({**head, "choices": [event], **more}) for event in events)

    async def lines() -> AsyncIterator[str]:
        results: list[SampleResult] = []
        for request_id, told in zip(accepted, streams, strict=True):
            waiting, said_at = asyncio.ensure_future(finished(service, request_id, body.n or 1)), time.monotonic()
            try:
                while not (await asyncio.wait([waiting], timeout=LOOK_S))[0]:
                    new = lines_of(told, None, service.partial(request_id)) if live else ""
                    if new or time.monotonic() > said_at + PING_S:
                        said_at = time.monotonic()
                        yield new or ": waiting\n\n"
                results.append(waiting.result())
            except Refusal as refusal:
                yield _event(error_body(str(refusal), refusal.status))
                return
            finally:
                waiting.cancel()  # the client may have gone
            yield lines_of(told, results[-1], results[-1].sequences)
        if with_usage:
            yield _event({**head, "choices": [], "usage": usage(prompts, results)})
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _event(said: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(said, ensure_ascii=False, allow_nan=False)}\n\n"
