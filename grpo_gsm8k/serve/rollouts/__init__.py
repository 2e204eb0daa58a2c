"""Rewards over HTTP: prompts in, completions out, rewards in whenever they come; the server takes the steps.

    run.py          a run as the journal holds it: settings, groups of rollouts, what a batch trains
    draw.py         completions from the core
    facade.py       the run: what is refused, and the update when a batch is full
    router.py       /v1/start /v1/stop /v1/status /v1/rollouts /v1/rewards /v1/model
    grpo_server.py  the six routes of grpo_server's own client, over the same run

Token ids and log-probabilities stay here under a rollout's id, so what is trained is what was sampled. Everything that
is acknowledged is in the journal first: after a crash the run goes on where it was.
"""

from fastapi import APIRouter

from grpo_gsm8k.serve.rollouts import grpo_server
from grpo_gsm8k.serve.rollouts import router as facade


def router() -> APIRouter:
    """The routes of both."""
    routes = APIRouter()
    routes.include_router(facade.router())
    routes.include_router(grpo_server.router())
    return routes
