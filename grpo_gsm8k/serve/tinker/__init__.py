"""The Tinker wire: its routes, and what answers each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, Request

from grpo_gsm8k.serve.auth import required
from grpo_gsm8k.serve.jobs import Refusal
from grpo_gsm8k.serve.tinker import runs, sampling, training
from grpo_gsm8k.serve.tinker.schema import PROTOBUF, Op

CHECKPOINT = "training_runs/{run}/checkpoints/{kind}/{name}"
OPERATIONS = ("optim_step", "save_weights", "save_weights_for_sampler", "save_weights_external", "unload_model")
NOT_HERE = {
    "copy_weights": "there is one project here; load the checkpoint as it is",
    "create_custom_loss": "losses are not uploaded here; forward_backward_custom of a client works without",
}


def not_here(name: str) -> Callable[..., Any]:
    """A route that refuses."""

    async def call(request: Request) -> None:
        raise Refusal(f"{name}: {NOT_HERE[name]}")

    return call


ROUTES: dict[str, Callable[..., Any]] = {
    "POST client/config": training.client_config,
    "POST client/dynamic_config": training.client_config,
    "POST create_session": training.create_session,
    "POST session_heartbeat": training.heartbeat,
    "POST sessions/{session_id}/finish": training.finish_session,
    "POST telemetry": training.telemetry,
    "POST create_model": training.create_model,
    "POST get_info": training.get_info,
    "POST forward_backward": training.forward_backward,
    "POST forward": training.forward,
    "POST load_weights": training.load_weights,
    **{f"POST {kind}": training.operation(kind) for kind in OPERATIONS},
    "POST create_sampling_session": sampling.create_sampling_session,
    "POST join_sampling_session": sampling.join_sampling_session,
    "POST asample": sampling.asample,
    "POST retrieve_future": sampling.retrieve_future,
    "POST retrieve_futures": sampling.retrieve_futures,
    "POST cancel_future": sampling.cancel_future,
    "GET get_server_capabilities": runs.capabilities,
    "GET status": runs.status,
    "GET sessions": runs.sessions,
    "GET sessions/{session_id}": runs.session,
    "GET samplers/{sampler_id}": runs.sampler,
    "GET training_runs": runs.training_runs,
    "GET training_runs/{run}": runs.training_run,
    "GET training_runs/{run}/checkpoints": runs.checkpoints_of_run,
    "GET checkpoints": runs.checkpoints,
    "POST weights_info": runs.weights_info,
    f"DELETE {CHECKPOINT}": runs.delete,
    f"POST {CHECKPOINT}/publish": runs.publish,
    f"DELETE {CHECKPOINT}/publish": runs.unpublish,
    f"PUT {CHECKPOINT}/ttl": runs.set_ttl,
    f"GET {CHECKPOINT}/external_weights_urls": runs.urls,
    f"GET {CHECKPOINT}/archive": runs.archive,
    **{f"POST {name}": not_here(name) for name in NOT_HERE},
}
RAW = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": Op.model_json_schema()},
            PROTOBUF: {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
"""Of the routes that read their bodies by themselves."""


def router() -> APIRouter:
    """All routes of this wire; those without a key are health and signed links."""
    routes = APIRouter(prefix="/api/v1", tags=["tinker"])
    routes.get("/healthz", response_model=None)(training.health)
    routes.get(f"/download/{CHECKPOINT}/{{file:path}}", response_model=None)(runs.download)
    secured = APIRouter(dependencies=[Depends(required)])
    for route, call in ROUTES.items():
        method, path = route.split(" ")
        extra = RAW if call in (training.forward_backward, training.forward) else None
        secured.api_route(f"/{path}", methods=[method], response_model=None, name=route, openapi_extra=extra)(call)
    routes.include_router(secured)
    return routes
