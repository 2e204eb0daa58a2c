"""The routes of the page: `/` and its two files without a key, `/page/status` and `/metrics` with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse, Response

from grpo_gsm8k.serve.auth import required
from grpo_gsm8k.serve.page.metrics import exposition
from grpo_gsm8k.serve.rollouts.router import facade, service_of

FOLDER = Path(__file__).parent
MOST_SHOWN, MOST_POINTS = 100, 240  # models, and points of a curve
KINDS = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
# Nothing from elsewhere, nothing inline but the widths that page.js sets, no frame around it, no form sent away.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    """All routes; the page itself holds no data and needs no key."""
    routes = APIRouter()
    for path, send in (("/", page), ("/page.css", css), ("/page.js", script)):
        routes.add_api_route(path, send, methods=["GET"], include_in_schema=False)
    secured = APIRouter(tags=["Watching it"], dependencies=[Depends(required)])
    secured.add_api_route("/page/status", status, methods=["GET"], response_model=None)
    secured.add_api_route("/metrics", metrics, methods=["GET"], response_class=PlainTextResponse)
    routes.include_router(secured)
    return routes


async def page() -> Response:
    return _file("page.html")


async def css() -> Response:
    return _file("page.css")


async def script() -> Response:
    return _file("page.js")


def _file(name: str) -> Response:
    text = (FOLDER / name).read_text(encoding="utf-8")
    return Response(text, media_type=KINDS[name], headers=HEADERS)


async def status(request: Request) -> dict[str, Any]:
    """All that the page shows."""
    found = _status(request)
    models = [model | {"history": _points(model["history"], "step", "loss:sum")} for model in found["models"]]
    run = found["rollouts"] | {"history": _points(found["rollouts"]["history"], "version", "reward/mean", "loss")}
    return found | {"models": models[:MOST_SHOWN], "models_in_all": len(models), "rollouts": run}


async def metrics(request: Request) -> Response:
    """The same for Prometheus; of the models, the newest."""
    found = _status(request)
    text = exposition(found | {"models": found["models"][:MOST_SHOWN], "models_in_all": len(found["models"])})
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _points(history: Iterable[Mapping[str, float]], *keys: str) -> list[dict[str, float]]:
    """The end of a curve, with these of its values."""
    return [{key: point[key] for key in keys if key in point} for point in list(history)[-MOST_POINTS:]]


def _status(request: Request) -> dict[str, Any]:
    run = facade(request)
    shown = run.status() | {"history": list(run.history), "samples": list(run.shown)}
    return {**service_of(request).status(), "rollouts": shown}
