"""The routes of the rewards wire: /v1/start /v1/stop /v1/status /v1/rollouts /v1/rewards, and the run's weights."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import Field, model_validator

from grpo_gsm8k.errors import DataError, ModelError
from grpo_gsm8k.runs.clean import one_line
from grpo_gsm8k.serve.core import Service
from grpo_gsm8k.serve.forms import (
    MOST_SEED,
    ChatMessage,
    Form,
    ShortText,
    Stops,
    Text,
    check_length,
    conversation,
    encode,
    first_fault,
    stop_list,
)
from grpo_gsm8k.serve.jobs import Refusal
from grpo_gsm8k.serve.rollouts.facade import Rollouts
from grpo_gsm8k.serve.rollouts.run import Group, Rejected, Settings, rollout_id

MOST_PROMPTS = 256
MOST_ROLLOUTS = 1024  # of one request, and of one group
MOST_REWARDS = 65536
MOST_REWARD = 1e9  # in size; a product with a gradient must stay finite
LossName = Literal["importance_sampling", "ppo", "cispo", "dro", "gspo"]
Rate = Annotated[float, Field(gt=0, le=100)]


class StartRequest(Form):
    """Settings of a run; those that are left out have defaults."""

    n: Annotated[int, Field(ge=2, le=MOST_ROLLOUTS)] = Settings.n
    groups_per_batch: Annotated[int, Field(ge=1, le=1024)] = Settings.groups_per_batch
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = Settings.max_tokens
    temperature: Rate = Settings.temperature
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
    temperature: Rate | None = None
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
    """A route whose errors are {error: {type, message, rollout_ids?}}, and in the page's log of refusals."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as fault:
                answer = self.error(422, "invalid_request", first_fault(fault)[0])
            except Rejected as refusal:
                answer = self.error(refusal.status, refusal.kind, str(refusal), refusal.rollout_ids)
            except Refusal as refusal:
                answer = self.error(422 if refusal.status == 400 else refusal.status, "invalid_request", str(refusal))
            except (DataError, ModelError) as fault:  # a conversation that the chat template cannot render
                answer = self.error(422, "invalid_request", str(fault))
            except HTTPException as fault:  # a body that is no JSON
                answer = self.error(
                    422 if fault.status_code == 400 else fault.status_code, "invalid_request", fault.detail
                )
            message = bytes(answer.body).decode()
            service_of(request).refuse(one_line(message), f"{request.method} {request.url.path}")
            return answer

        return handler

    @staticmethod
    def error(status: int, kind: str, message: str, rollout_ids: Sequence[str] = ()) -> JSONResponse:
        """An error as this wire's clients read it."""
        said: dict[str, Any] = {"type": kind, "message": one_line(message)}
        if rollout_ids:
            said["rollout_ids"] = list(rollout_ids)
        return JSONResponse({"error": said}, status)


def router() -> APIRouter:
    """All routes; the application adds the key."""
    made = APIRouter(prefix="/v1", route_class=RolloutRoute, tags=["Rewards over HTTP"])
    made.add_api_route("/start", start, methods=["POST"])
    made.add_api_route("/stop", stop, methods=["POST"])
    made.add_api_route("/status", status, methods=["GET"])
    made.add_api_route("/rollouts", rollouts, methods=["POST"])
    made.add_api_route("/rewards", rewards, methods=["POST"])
    return made


def service_of(request: Request) -> Service:
    return cast(Service, request.app.state.service)


def facade(request: Request) -> Rollouts:
    """The run of this server, read from the journal with the first request."""
    state = request.app.state
    if not hasattr(state, "rollouts"):
        state.rollouts = Rollouts(service_of(request))
    return cast(Rollouts, state.rollouts)


async def start(body: StartRequest, request: Request) -> dict[str, Any]:
    """Begin a run from the base model, at version 0; the run before, if any, ends and its rollouts are void."""
    return await facade(request).start(Settings(**body.model_dump()))


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


def _shown(run_id: str, group: Group) -> dict[str, Any]:
    return {
        "prompt": group.prompt,
        "group_id": f"{run_id}-{group.number}",
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
