"""The routes of OpenAI's wire."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, cast

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from grpo_gsm8k.errors import DataError, ModelError
from grpo_gsm8k.runs.clean import one_line
from grpo_gsm8k.serve.app import ERROR_BODIES, Json
from grpo_gsm8k.serve.auth import required
from grpo_gsm8k.serve.core import Service
from grpo_gsm8k.serve.forms import as_json, check_ids, check_length, conversation, encode, end_ids, first_fault
from grpo_gsm8k.serve.jobs import Refusal, SampleJob
from grpo_gsm8k.serve.openai.answers import (
    ChatStream,
    CompletionStream,
    Reader,
    Wanted,
    chat_choice,
    completion_choice,
    usage,
)
from grpo_gsm8k.serve.openai.schema import (
    MOST_SAMPLES,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
)
from grpo_gsm8k.serve.openai.stream import error_body, finished, stream
from grpo_gsm8k.serve.text import TokenNames


class OpenAIRoute(APIRoute):
    """A route whose errors have OpenAI's form and status."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(as_json(request))
            except RequestValidationError as fault:
                return refused(request, 400, *first_fault(fault))
            except Refusal as refusal:
                lost = refusal.status == 404
                return refused(request, refusal.status, str(refusal), *(("model", "model_not_found") if lost else ()))
            except (DataError, ModelError) as fault:  # a conversation that the chat template cannot render
                return refused(request, 400, str(fault), "messages")
            except HTTPException as fault:
                return refused(request, fault.status_code, str(fault.detail))

        return handler


def refused(request: Request, status: int, message: str, param: str | None = None, code: str | None = None) -> Response:
    """A refusal as OpenAI's clients read it, and in the log that the page shows."""
    message = one_line(message, 1000)
    if status not in (401, 404, 429, 503):
        request.app.state.service.refuse(message, request.url.path)
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    return Json(error_body(message, status, param, code), status, headers)


ERROR_BODIES["/v1/"] = ERROR_BODIES["/oai/"] = error_body


def router() -> APIRouter:
    """All routes."""
    made = APIRouter(route_class=OpenAIRoute, tags=["OpenAI"], dependencies=[Depends(required)])
    for prefix in ("/v1", "/oai/api/v1"):
        made.add_api_route(f"{prefix}/models", models, methods=["GET"])
        made.add_api_route(f"{prefix}/models/{{name:path}}", model, methods=["GET"])
        made.add_api_route(f"{prefix}/completions", completions, methods=["POST"], response_model=None)
        made.add_api_route(f"{prefix}/chat/completions", chat_completions, methods=["POST"], response_model=None)
    made.add_api_route("/tokenize", tokenize, methods=["POST"])
    made.add_api_route("/detokenize", detokenize, methods=["POST"])
    made.add_api_route("/tokenizer_info", tokenizer_info, methods=["GET"])
    routes = APIRouter()
    routes.add_api_route("/health", health, methods=["GET"], tags=["OpenAI"])
    routes.include_router(made)
    return routes


# ------------------------------------------------------------------------------------------------- the routes


async def health() -> Response:
    """Whether the server answers; without a key, as vLLM's."""
    return Response()


async def models(request: Request) -> dict[str, Any]:
    """What can be sampled from: the base model, and every saved sampler."""
    service = _service(request)
    return {"object": "list", "data": [_card(service, name) for name in service.sampleable()]}


async def model(name: str, request: Request) -> dict[str, Any]:
    """One model."""
    service = _service(request)
    service.resolve(name)
    return _card(service, name)


def _card(service: Service, name: str) -> dict[str, Any]:
    card = {"id": name, "object": "model", "created": 0, "owned_by": "grpo-gsm8k", "root": name}
    return card | {
        "max_model_len": service.base.context,
        "parent": None if name == service.base.name else service.base.name,
    }


async def completions(body: CompletionRequest, request: Request) -> Response:
    """Go on from a text or from token ids."""
    service, wanted, n = _service(request), _wanted(body, body.logprobs, bool(body.echo)), body.n or 1
    weights = service.resolve(body.model)
    prompts = _prompts(service, body)
    accepted = await _submit(service, weights, [_job(service, body, ids, body.max_tokens, wanted) for ids in prompts])
    reader, head = _reader(request, wanted), _head("cmpl", "text_completion", body.model)
    echoes = [_echo(reader, sent, ids) for sent, ids in zip(body.prompts, prompts, strict=True)]
    if body.stream:
        streams = [
            [CompletionStream(reader, k * n + i, ids, echo) for i in range(n)]
            for k, (ids, echo) in enumerate(zip(prompts, echoes, strict=True))
        ]
        return stream(service, body, head, prompts, accepted, streams)
    results = await asyncio.gather(*(finished(service, one, n) for one in accepted))

    def choices() -> list[dict[str, Any]]:
        return [
            completion_choice(reader, k * n + i, ids, echo, result, sequence)
            for k, (ids, echo, result) in enumerate(zip(prompts, echoes, results, strict=True))
            for i, sequence in enumerate(result.sequences)
        ]

    made = await asyncio.to_thread(choices)  # a million tokens take seconds, and others are waiting
    return Json({**head, "choices": made, "usage": usage(prompts, results)})


def _echo(reader: Reader, sent: str | list[int], ids: Sequence[int]) -> str:
    """A prompt as text, where it is wanted back."""
    if not reader.wanted.echo:
        return ""
    return sent if isinstance(sent, str) else reader.text(ids)


async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    service, n = _service(request), body.n or 1
    wanted = _wanted(body, (body.top_logprobs or 0) if body.logprobs else None)
    weights = service.resolve(body.model)
    prompt = conversation(service, body.messages)
    check_length(service, prompt)
    longest = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    accepted = await _submit(service, weights, [_job(service, body, prompt, longest, wanted)])
    reader, head = _reader(request, wanted), _head("chatcmpl", "chat.completion", body.model)
    if body.return_token_ids:
        head["prompt_token_ids"] = prompt
    if body.stream:
        streams = [[ChatStream(reader, i, prompt) for i in range(n)]]
        return stream(service, body, head | {"object": "chat.completion.chunk"}, [prompt], accepted, streams)
    result = await finished(service, accepted[0], n)

    def choices() -> list[dict[str, Any]]:
        return [chat_choice(reader, i, prompt, sequence) for i, sequence in enumerate(result.sequences)]

    made = await asyncio.to_thread(choices)
    if wanted.prompt_top is not None:
        head["prompt_logprobs"] = reader.prompt_logprobs(reader.prompt(prompt, result))
    return Json({**head, "choices": made, "usage": usage([prompt], [result])})


async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Text or a conversation → token ids."""
    service = _service(request)
    if body.messages is not None:
        ids: Sequence[int] = conversation(service, body.messages)
    else:
        ids = encode(service, body.prompt or "", bool(body.add_special_tokens))
    said = {"tokens": list(ids), "count": len(ids), "max_model_len": service.base.context}
    return said | ({"token_strs": [_names(request).name(i) for i in ids]} if body.return_token_strs else {})


async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    """Token ids → text, special tokens spelled out."""
    service = _service(request)
    check_ids(service, body.tokens, "tokens")
    return {"prompt": service.base.renderer.spell(body.tokens)}


async def tokenizer_info(request: Request) -> dict[str, Any]:
    """What lm-eval's remote tokenizer asks."""
    tokenizer = _service(request).base.renderer.tokenizer
    special = ("bos_token", "eos_token", "pad_token", "unk_token")
    said = {name: getattr(tokenizer, name, None) for name in special}
    return {
        "tokenizer_class": type(tokenizer).__name__,
        **{name: None if token is None else str(token) for name, token in said.items()},
        "chat_template": tokenizer.chat_template,
        "model_max_length": _service(request).base.context,
    }


# ------------------------------------------------------------------------------------------- prompts and jobs


def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


def _names(request: Request) -> TokenNames:
    """One for the whole application: it remembers the names."""
    state = request.app.state
    if not hasattr(state, "token_names"):
        state.token_names = TokenNames(_service(request).base.renderer.tokenizer)
    return cast(TokenNames, state.token_names)


def _reader(request: Request, wanted: Wanted) -> Reader:
    return Reader(_names(request), _service(request).base.renderer.decode, wanted)


def _wanted(body: Sampling, top: int | None, echo: bool = False) -> Wanted:
    ids, as_ids = bool(body.return_token_ids), bool(body.return_tokens_as_token_ids)
    return Wanted(body.stops, top, echo, as_ids, ids, body.prompt_logprobs)


def _prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    """The prompts' token ids. Raises `Refusal` for an empty one, and for one that leaves no room in the context."""
    if len(body.prompts) * (body.n or 1) > MOST_SAMPLES:
        raise Refusal(f"{len(body.prompts)} prompts with n = {body.n} are more than {MOST_SAMPLES} samples")
    found = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            ids = encode(service, prompt, bool(body.add_special_tokens))
        else:
            check_ids(service, prompt, "prompt")
            ids = prompt
        check_length(service, ids, int(body.max_tokens != 0))
        found.append(ids)
    if not found:
        raise Refusal("prompt: there is none")
    return found


def _job(service: Service, body: Sampling, ids: Sequence[int], max_tokens: int | None, wanted: Wanted) -> SampleJob:
    renderer = service.base.renderer
    added = {token.content: i for i, token in renderer.tokenizer.added_tokens_decoder.items()}
    stop_ids = set() if body.ignore_eos else set(end_ids(service))
    # A special token is in no text that is searched for stop strings: it stops by its id.
    stop_ids |= {added[text] for text in body.stops if text in added} | set(body.stop_token_ids or ())
    reads = (wanted.echo and wanted.top is not None) or wanted.prompt_top is not None
    room = service.base.context - len(ids)
    return SampleJob(
        token_ids=tuple(ids),
        num_samples=body.n or 1,
        max_tokens=room if max_tokens is None else min(max_tokens, room),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop_ids=tuple(sorted(stop_ids)),
        stop_strings=tuple(body.stops),
        prompt_logprobs=reads,
        topk_prompt_logprobs=max(wanted.top or 0, wanted.prompt_top or 0) if reads else 0,
        topk_sample_logprobs=wanted.top or 0,
    )


async def _submit(service: Service, weights: str, jobs: Sequence[SampleJob]) -> list[str]:
    """Have all jobs accepted; their request ids."""
    return list(await asyncio.gather(*(service.sample(weights, job) for job in jobs)))


# ------------------------------------------------------------------------------------------------- the answers


def _head(prefix: str, kind: str, name: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}
