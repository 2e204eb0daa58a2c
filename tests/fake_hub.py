"""A hub for the tests: one user, small files, every upload a commit. It speaks what huggingface_hub asks for."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web


class FakeHub:
    """`files` of each repository; `gated` ones need the token, `read_only` ones take no push."""

    def __init__(self, token: str) -> None:
        self.token, self.url = token, ""
        self.files: dict[str, dict[str, bytes]] = {}
        self.info: dict[str, dict[str, Any]] = {}
        self.gated: set[str] = set()
        self.read_only: set[str] = set()
        self.public: set[str] = set()
        self.commits: list[str] = []
        self.redirect = ""  # where every request of the API is sent

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 28, middlewares=[self.send_elsewhere])
        app.router.add_post("/api/repos/create", self.create)
        app.router.add_post("/api/validate-yaml", self.card)
        app.router.add_get("/api/models/{owner}/{name}/auth-check", self.auth)
        app.router.add_get("/api/models/{owner}/{name}/auth-check/write", self.auth_write)
        app.router.add_post("/api/models/{owner}/{name}/preupload/main", self.preupload)
        app.router.add_post("/api/models/{owner}/{name}/commit/main", self.commit)
        app.router.add_get("/api/models/{owner}/{name}/tree/{revision}", self.tree)
        app.router.add_get("/api/models/{owner}/{name}", self.model)
        app.router.add_get("/api/models/{owner}/{name}/revision/{revision}", self.model)
        app.router.add_get("/{owner}/{name}/resolve/{revision}/{path:.*}", self.resolve)
        return app

    @web.middleware
    async def send_elsewhere(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.redirect:
            return web.Response(status=307, headers={"Location": self.redirect})
        answer: web.StreamResponse = await handler(request)
        return answer

    @staticmethod
    def _repo(request: web.Request) -> str:
        return f"{request.match_info['owner']}/{request.match_info['name']}"

    @staticmethod
    def _commit(request: web.Request) -> str:
        """A commit stands for itself, any branch for the one there is."""
        revision = request.match_info.get("revision", "main")
        return revision if len(revision) == 40 else "c" * 40

    def _missing(self, request: web.Request) -> web.Response | None:
        if self._repo(request) in self.files:
            return None
        return web.json_response(
            {"error": "Repository not found"}, status=404, headers={"X-Error-Code": "RepoNotFound"}
        )

    def _mine(self, request: web.Request) -> bool:
        return request.headers.get("Authorization") == f"Bearer {self.token}"

    async def create(self, request: web.Request) -> web.Response:
        body = await request.json()
        repo = f"{body.get('organization') or 'me'}/{body['name']}"
        if not self._mine(request) or body.get("organization") not in (None, "me"):
            return web.json_response({"error": "not yours"}, status=403)
        assert body["visibility"] == "private"
        self.files.setdefault(repo, {})
        return web.json_response({"url": f"{self.url}/{repo}", "id": repo, "name": repo})

    async def card(self, request: web.Request) -> web.Response:
        return web.json_response({"errors": [], "warnings": []})

    async def auth(self, request: web.Request) -> web.Response:
        if self._repo(request) in self.gated and not self._mine(request):
            return web.json_response({"error": "gated"}, status=403, headers={"X-Error-Code": "GatedRepo"})
        return self._missing(request) or web.json_response({})

    async def auth_write(self, request: web.Request) -> web.Response:
        if self._repo(request) in self.read_only or not self._mine(request):
            return self._missing(request) or web.json_response({"error": "no"}, status=403)
        return self._missing(request) or web.json_response({})

    async def model(self, request: web.Request) -> web.Response:
        repo = self._repo(request)
        siblings = [{"rfilename": path} for path in self.files.get(repo, {})]
        said = {
            "id": repo,
            "sha": self._commit(request),
            "siblings": siblings,
            "private": repo not in self.public,
            **self.info.get(repo, {}),
        }
        return self._missing(request) or web.json_response(said)

    async def tree(self, request: web.Request) -> web.Response:
        rows = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in self.files.get(self._repo(request), {}).items()
        ]
        return self._missing(request) or web.json_response(rows)

    async def preupload(self, request: web.Request) -> web.Response:
        rows = [
            {"path": row["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
            for row in (await request.json())["files"]
        ]
        return web.json_response({"files": rows})

    async def commit(self, request: web.Request) -> web.Response:
        if not self._mine(request):
            return web.json_response({"error": "no"}, status=403)
        files = self.files[self._repo(request)]
        for line in (await request.text()).splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif row["key"] == "header":
                self.commits.append(value["summary"])
        return web.json_response({"commitUrl": f"{self.url}/{self._repo(request)}/commit/c", "commitOid": "c" * 40})

    async def resolve(self, request: web.Request) -> web.Response:
        data = self.files.get(self._repo(request), {}).get(request.match_info["path"])
        if data is None:
            return web.json_response({}, status=404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": self._commit(request), "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        return web.Response(body=data, headers=headers)


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Run it in a thread."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(hub.app(), shutdown_timeout=0.1)

    async def start() -> str:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        hub.url = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        yield hub
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
