"""The web application: one key, bounded bodies, and a router for each wire."""

from __future__ import annotations

from typing import Any

from grpo_gsm8k.serve.core import Service


def make_app(service: Service, key_hash: str) -> Any:
    """A FastAPI application. `request.app.state.service` is the service; routers come from each wire's
    `router() -> APIRouter` and depend on `auth.required`."""
    raise NotImplementedError
