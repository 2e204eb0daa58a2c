"""The web application: one key, bounded bodies, errors in one line, and a router for each wire."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import zstandard
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grpo_gsm8k import __version__
from grpo_gsm8k.errors import DiskError
from grpo_gsm8k.serve.auth import Keeper
from grpo_gsm8k.serve.core import Service
from grpo_gsm8k.serve.jobs import Refusal

WIRES = ("tinker", "openai", "rollouts", "page")
"""Modules beside this one whose `router()` is an APIRouter."""
BODY_S = 120.0  # within which a request must have arrived

ErrorBody = Callable[[str, int], Any]
ERROR_BODIES: dict[str, ErrorBody] = {}
"""Beginning of a path → what an error's body is there; {"detail": message} elsewhere."""


class Json(Response):
    """JSON in ASCII, so that no text that a client sent can break it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """NaN is a bug here: what may be none is null."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def make_app(service: Service, keeper: Keeper) -> FastAPI:
    """The application around a service that has been started."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tending = asyncio.create_task(_tend(service))
        yield
        tending.cancel()

    app = FastAPI(
        title="grpo-gsm8k serve",
        version=__version__,
        description="Training and sampling over HTTP: the Tinker wire, OpenAI's, and rewards.",
        lifespan=lifespan,
        default_response_class=Json,
    )
    app.state.service, app.state.keeper = service, keeper
    for name in WIRES:
        if importlib.util.find_spec(f"grpo_gsm8k.serve.{name}"):
            router: APIRouter = importlib.import_module(f"grpo_gsm8k.serve.{name}").router()
            app.include_router(router)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(DiskError, _disk_full)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_middleware(Bodies, limit=service.cfg.max_body_mb << 20)
    return app


async def _tend(service: Service) -> None:
    """What has to be looked after now and then."""
    seconds = 0
    while True:
        await asyncio.sleep(1.0)
        seconds += 1
        service.expire_gaps()
        if seconds % 30 == 0:
            await service.sweep()


# ------------------------------------------------------------------------------------------------------ errors


def error(request: Request, message: str, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """An error of one line in the form of the wire that the path belongs to."""
    message = " ".join(message.split())
    body: ErrorBody = next(
        (make for begin, make in ERROR_BODIES.items() if request.url.path.startswith(begin)),
        lambda text, _: {"detail": text},
    )
    service: Service = request.app.state.service
    if status not in (401, 404, 429, 503):  # those that scanners and polls cause would fill the log
        service.refuse(message, request.url.path)
    return Json(body(message, status), status, dict(headers or {}))


async def _refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
    if refusal.status in (429, 503):
        headers["Retry-After"] = "1"
    return error(request, str(refusal), refusal.status, headers)


async def _disk_full(request: Request, full: Exception) -> Response:
    """Not the client's fault, and over when there is room: clients try again."""
    return error(request, f"nothing was accepted: {full}", 503, {"Retry-After": "5"})


async def _http(request: Request, fault: Exception) -> Response:
    assert isinstance(fault, HTTPException)
    known = {404: f"{request.url.path[:200]} is not served here", 405: f"{request.method} is not served here"}
    return error(request, known.get(fault.status_code, str(fault.detail)), fault.status_code, fault.headers)


async def _invalid(request: Request, fault: Exception) -> Response:
    assert isinstance(fault, RequestValidationError)
    first, more = fault.errors()[0], len(fault.errors()) - 1
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path", "header"))
    message = f"{where}: {first['msg']}" if where else str(first["msg"])
    return error(request, message + (f" (and {more} more)" if more else ""), 422)


# ------------------------------------------------------------------------------------------------------ bodies


class Bodies:
    """Reads each request's body whole, up to a limit, and unpacks zstd."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), BODY_S)
            body = self._unpacked(scope, body)
        except (Refusal, TimeoutError) as fault:
            refusal = fault if isinstance(fault, Refusal) else Refusal(f"no whole request within {BODY_S:.0f} s", 400)
            await error(Request(scope), str(refusal), refusal.status, {"Connection": "close"})(scope, receive, send)
            return
        await self.app(scope, _Again(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        parts, size = list[bytes](), 0
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        while True:
            if size > self.limit or (declared.isdigit() and int(declared) > self.limit):
                raise Refusal(f"the request is larger than {self.limit >> 20} MB", 413)
            message = await receive()
            if message["type"] != "http.request":
                return b"".join(parts)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if not message.get("more_body"):
                if size > self.limit:
                    continue
                return b"".join(parts)

    def _unpacked(self, scope: Scope, body: bytes) -> bytes:
        encoding = dict(scope["headers"]).get(b"content-encoding", b"").decode("latin-1").lower()
        if encoding in ("", "identity"):
            return body
        if encoding != "zstd":
            raise Refusal(f"Content-Encoding {encoding[:40]!r} is not read here; zstd is")
        try:
            reader = zstandard.ZstdDecompressor().stream_reader(body)
            unpacked = reader.read(self.limit + 1)
        except zstandard.ZstdError as fault:
            raise Refusal(f"the body is no zstd: {fault}") from None
        if len(unpacked) > self.limit:
            raise Refusal(f"the request is larger than {self.limit >> 20} MB when unpacked", 413)
        return unpacked


class _Again:
    """A body that was read, once more; then whatever the connection says."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self.body: bytes | None = body
        self.receive = receive

    async def __call__(self) -> Message:
        if self.body is None:
            return await self.receive()
        body, self.body = self.body, None
        return {"type": "http.request", "body": body, "more_body": False}
