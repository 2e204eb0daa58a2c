"""The routes of the rewards wire: /v1/start /v1/stop /v1/status /v1/rollouts /v1/rewards, and the run's weights."""

from __future__ import annotations

import asyncio
import os
import tempfile
import zipfile
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from pydantic import Field, model_validator
from starlette.background import BackgroundTask

from grpo_gsm8k.errors import DataError, ModelError
from grpo_gsm8k.runs.clean import one_line
from grpo_gsm8k.serve.app import Json
from grpo_gsm8k.serve.auth import required
from grpo_gsm8k.serve.core import Service
from grpo_gsm8k.serve.forms import (
    MOST_SEED,
    ChatMessage,
    Form,
    ShortText,
    Stops,
    Text,
    as_json,
    check_length,
    conversation,
    encode,
    first_fault,
    stop_list,
)
from grpo_gsm8k.serve.jobs import Refusal
from grpo_gsm8k.serve.rollouts.facade import Rollouts
from grpo_gsm8k.serve.rollouts.run import Group, Rejected, Settings, group_id, rollout_id

MOST_PROMPTS = 256
MOST_ROLLOUTS = 1024  # of one request, and of one group
MOST_REWARDS = 65536
MOST_REWARD = 1e9  # in size; a product with a gradient must stay finite
LossName = Literal["importance_sampling", "ppo", "cispo", "dro", "gspo"]
Temperature = Annotated[float, Field(ge=0, le=100)]


class StartRequest(Form):
    """Settings of a run; those that are left out have defaults."""

    n: Annotated[int, Field(ge=2, le=MOST_ROLLOUTS)] = Settings.n
    groups_per_batch: Annotated[int, Field(ge=1, le=1024)] = Settings.groups_per_batch
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = Settings.max_tokens
    temperature: Temperature = Settings.temperature
    learning_rate: Annotated[float, Field(ge=0, le=10)] = Settings.learning_rate
    max_staleness: Annotated[int, Field(ge=0, le=1 << 20)] = Settings.max_staleness
    loss_fn: LossName = "importance_sampling"
    normalize: Literal["mean", "std"] = "mean"
    lora_rank: Annotated[int, Field(ge=0, le=1024)] = Settings.lora_rank
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] = Settings.seed
    max_steps: Annotated[int, Field(ge=0, le=1 << 40)] = Settings.max_steps

    @model_validator(mode="before")
    @classmethod
    def _defaults_for_null(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None or name not in cls.model_fields}


class RolloutsRequest(Form):
    """Prompts to complete, each a text or a conversation."""

    prompts: Annotated[list[Text | list[ChatMessage]], Field(min_length=1, max_length=MOST_PROMPTS)]
    n: Annotated[int, Field(ge=2, le=MOST_ROLLOUTS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Temperature | None = None
    stop: Stops = None
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] | None = None


class Reward(Form):
    """Of one rollout."""

    rollout_id: ShortText
    reward: Annotated[float, Field(ge=-MOST_REWARD, le=MOST_REWARD)]


class RewardsRequest(Form):
    """Rewards of rollouts, in any order and any number of requests."""

    rewards: Annotated[list[Reward], Field(min_length=1, max_length=MOST_REWARDS)]


class RolloutRoute(APIRoute):
    """A route whose errors are {error: {type, message, rollout_ids?}}."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(as_json(request))
            except RequestValidationError as fault:
                return refused(request, 422, "invalid_request", first_fault(fault)[0])
            except Rejected as refusal:
                return refused(request, refusal.status, refusal.kind, str(refusal), refusal.rollout_ids)
            except Refusal as refusal:
                status = 422 if refusal.status == 400 else refusal.status
                kind = {401: "authentication_error", 429: "rate_limit", 503: "ending"}.get(status, "invalid_request")
                return refused(request, status, kind, str(refusal))
            except (DataError, ModelError) as fault:  # a conversation that the chat template cannot render
                return refused(request, 422, "invalid_request", str(fault))
            except HTTPException as fault:  # a body that is no JSON
                return refused(request, 422, "invalid_request", str(fault.detail))

        return handler


def refused(request: Request, status: int, kind: str, message: str, rollout_ids: Sequence[str] = ()) -> Response:
    """A refusal as this wire's clients read it, and in the log that the page shows."""
    said: dict[str, Any] = {"type": kind, "message": one_line(message, 1000)}
    if rollout_ids:
        said["rollout_ids"] = list(rollout_ids)
    if status not in (401, 429, 503):
        service_of(request).refuse(f"{kind}: {said['message']}", request.url.path)
    return Json({"error": said}, status, {"Retry-After": "1"} if status in (429, 503) else {})


def router() -> APIRouter:
    """All routes."""
    made = APIRouter(
        prefix="/v1", route_class=RolloutRoute, tags=["Rewards over HTTP"], dependencies=[Depends(required)]
    )
    made.add_api_route("/start", start, methods=["POST"])
    made.add_api_route("/stop", stop, methods=["POST"])
    made.add_api_route("/status", status, methods=["GET"])
    made.add_api_route("/rollouts", rollouts, methods=["POST"])
    made.add_api_route("/rewards", rewards, methods=["POST"])
    made.add_api_route("/model", model, methods=["GET"], response_class=FileResponse)
    return made


def service_of(request: Request) -> Service:
    return cast(Service, request.app.state.service)


def facade(request: Request) -> Rollouts:
    """The run of this server, read from the journal with the first request."""
    state = request.app.state
    if not hasattr(state, "rollouts"):
        state.rollouts = Rollouts(service_of(request))
        state.catching_up = asyncio.create_task(state.rollouts.catch_up())
    return cast(Rollouts, state.rollouts)


async def start(request: Request, body: StartRequest | None = None) -> dict[str, Any]:
    """Begin a run from the base model, at version 0; the run before, if any, ends and its rollouts are void."""
    return await facade(request).start(Settings(**(body or StartRequest()).model_dump()))


async def stop(request: Request) -> dict[str, Any]:
    """End the run."""
    return await facade(request).stop()


async def status(request: Request) -> dict[str, Any]:
    """Whether a run is on, its version, its settings, what waits, and what the last update found."""
    return facade(request).status()


async def rollouts(body: RolloutsRequest, request: Request) -> dict[str, Any]:
    """A group of completions of each prompt, from the model as it is now."""
    run = facade(request)
    n = body.n or run.running().settings.n
    if n * len(body.prompts) > MOST_ROLLOUTS:
        raise Refusal(f"{len(body.prompts)} prompts with n = {n} are more than {MOST_ROLLOUTS} rollouts")
    service = service_of(request)
    ids = [encode(service, p) if isinstance(p, str) else conversation(service, p) for p in body.prompts]
    for each in ids:
        check_length(service, each)
    shown = [p if isinstance(p, str) else [{"role": m.role, "content": m.text} for m in p] for p in body.prompts]
    version, groups = await run.sample(
        shown,
        ids,
        n=body.n,
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        stop=stop_list(body.stop),
        seed=body.seed,
    )
    return {"model_version": version, "rollouts": [_shown(version[0], group) for group in groups]}


async def rewards(body: RewardsRequest, request: Request) -> dict[str, Any]:
    """Take rewards, all or none; a full batch of whole groups is trained on before the answer."""
    return await facade(request).reward([(one.rollout_id, one.reward) for one in body.rewards])


async def model(request: Request) -> Response:
    """The weights of the run as it is now, with the tokenizer, as a zip file: an adapter, or a whole model."""
    return await weights_zip(request)


async def weights_zip(request: Request) -> Response:
    """The same for both wires. Raises `Rejected` where no run was started."""
    service, run = service_of(request), facade(request).run
    if run is None:
        raise Rejected(409, "not_running", "no run was started; there are no weights")
    folder = service.folder / service.books.samplers[run.weights].folder
    written = await asyncio.to_thread(_zipped, folder, service.base.renderer)
    name = f"{run.id}-{run.version}.zip"
    return FileResponse(written, media_type="application/zip", filename=name, background=BackgroundTask(written.unlink))


def _zipped(folder: Path, renderer: Any) -> Path:
    """A zip file of a checkpoint, in the folder of temporary files."""
    handle, name = tempfile.mkstemp(suffix=".zip")
    with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive, tempfile.TemporaryDirectory() as more:
        renderer.save_pretrained(Path(more))
        found = {path.name: path for path in [*Path(more).iterdir(), *folder.iterdir()] if path.is_file()}
        for path in found.values():
            if path.name != "spec.json":
                archive.write(path, path.name)
    return Path(name)


def _shown(run_id: str, group: Group) -> dict[str, Any]:
    return {
        "prompt": group.prompt,
        "group_id": group_id(run_id, group.number),
        "completions": [
            {
                "rollout_id": rollout_id(run_id, group.number, i),
                "text": sample.text,
                "finish_reason": sample.finish_reason,
                "num_tokens": len(sample.token_ids),
            }
            for i, sample in enumerate(group.samples)
        ],
    }
