"""The six routes of grpo_server's client, over the one run of this server.

Its rewards name completions by their token ids; here they are matched with an open group that has the very same, so no
client can have tokens trained that were not sampled. A batch of it is `training_batch_size` times
`gradient_accumulation_steps` prompts. Its `model_id` is echoed, and the base of this server is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field

from grpo_gsm8k.serve.auth import required
from grpo_gsm8k.serve.forms import Form, ShortText, Text, check_length, encode
from grpo_gsm8k.serve.rollouts.router import MOST_REWARD, MOST_ROLLOUTS, RolloutRoute, facade, service_of, weights_zip
from grpo_gsm8k.serve.rollouts.run import Group, Rejected, Settings, rollout_id


class TrainingSettings(Form):
    """Of a run, with that project's names and defaults."""

    model_id: ShortText = "./test_data/simple_linear_40_5"
    max_completion_length: Annotated[int, Field(ge=1, le=1 << 20)] = 6
    num_completions_per_prompt: Annotated[int, Field(ge=2, le=MOST_ROLLOUTS)] = 3
    training_batch_size: Annotated[int, Field(ge=1, le=1024)] = 1
    learning_rate: Annotated[float, Field(ge=0, le=10)] = 5e-2
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1024)] = 1
    logging_steps: Annotated[int, Field(ge=1)] = 1
    max_steps: Annotated[int, Field(ge=1, le=1 << 40)] = 201

    @property
    def settings(self) -> Settings:
        return Settings(
            n=self.num_completions_per_prompt,
            groups_per_batch=self.training_batch_size * self.gradient_accumulation_steps,
            max_tokens=self.max_completion_length,
            learning_rate=self.learning_rate,
            max_staleness=self.max_steps,  # it takes rewards whenever they come
            normalize="std",
            max_steps=self.max_steps,
        )


class CompletionsRequest(Form):
    """A prompt to complete."""

    prompt: Text


class RewardsRequest(Form):
    """Rewards of the completions of a prompt, all at once."""

    prompt: Text
    completions: Annotated[list[Text], Field(max_length=MOST_ROLLOUTS)]
    completion_tokens: Annotated[list[list[int]], Field(min_length=1, max_length=MOST_ROLLOUTS)]
    rewards: Annotated[list[Annotated[float, Field(ge=-MOST_REWARD, le=MOST_REWARD)]], Field(max_length=MOST_ROLLOUTS)]


class ModelRequest(Form):
    """Nothing is asked."""


def router() -> APIRouter:
    """All routes."""
    made = APIRouter(route_class=RolloutRoute, tags=["grpo_server"], dependencies=[Depends(required)])
    made.add_api_route("/start", start, methods=["POST"])
    made.add_api_route("/stop", stop, methods=["POST"])
    made.add_api_route("/status", status, methods=["GET"])
    made.add_api_route("/completions", completions, methods=["POST"])
    made.add_api_route("/rewards", rewards, methods=["POST"])
    made.add_api_route("/model", model, methods=["POST"], response_class=Response)
    return made


async def start(request: Request, body: TrainingSettings | None = None) -> dict[str, str]:
    """Begin a run."""
    body, base = body or TrainingSettings(), service_of(request).base
    if body.model_id not in (base.name, base.folder):
        service_of(request).refuse(f"trained is {base.name}, not the model_id {body.model_id}", "POST /start")
    await facade(request).start(body.settings, body.model_dump())
    return {"status": "started"}


async def stop(request: Request) -> dict[str, str]:
    """End the run."""
    facade(request).running()
    await facade(request).stop()
    return {"status": "stopped"}


async def status(request: Request) -> dict[str, Any]:
    """The settings as they were sent, null where no run is on, and how much was served."""
    run = facade(request).run
    on = run is not None and run.state == "running" and run.asked
    served = run.served if run else {}
    return {
        "training_settings": run.asked if run and on else None,
        "completion_requests_served": served.get("completions", 0),
        "reward_requests_served": served.get("rewards", 0),
    }


async def completions(body: CompletionsRequest, request: Request) -> dict[str, Any]:
    """A group of completions; `completion_tokens` begin with the prompt's."""
    service, run = service_of(request), facade(request)
    run.running()
    ids = encode(service, body.prompt)
    check_length(service, ids)
    version, (group,) = await run.sample([body.prompt], [ids])
    run.count("completions")
    return {
        "prompt": body.prompt,
        "completions": [sample.text for sample in group.samples],
        "completion_tokens": _tokens(group),
        "model_version": version,
    }


async def rewards(body: RewardsRequest, request: Request) -> dict[str, Any]:
    """Take the rewards of a whole group."""
    run = facade(request)
    found = run.running()
    if len(body.rewards) != len(body.completion_tokens):
        raise Rejected(422, "invalid_request", "rewards and completion_tokens differ in number")
    group = _open_group(list(run.groups.values()), body.completion_tokens)
    if group is None:
        raise Rejected(404, "unknown_rollout", "no group that waits for rewards has these completion_tokens")
    named = [(rollout_id(found.id, group.number, i), reward) for i, reward in enumerate(body.rewards)]
    said = await run.reward(named)
    run.count("rewards")
    return {"model_version": said["model_version"]}


async def model(request: Request, body: ModelRequest | None = None) -> Response:
    """The run's weights as a zip file."""
    return await weights_zip(request)


def _tokens(group: Group) -> list[list[int]]:
    return [[*group.prompt_ids, *sample.token_ids] for sample in group.samples]


def _open_group(groups: Sequence[Group], tokens: list[list[int]]) -> Group | None:
    """The first of them with these very tokens and no reward yet."""
    waiting = [group for group in groups if group.n == len(tokens) and group.samples[0].reward is None]
    return next((group for group in waiting if _tokens(group) == tokens), None)
