"""A provider that misbehaves: the REST API v2 with scripted faults, a ledger, and an ssh server in every pod.

Requests are checked as strictly as the documentation says: unknown fields are refused. What a pod is told over ssh it
really does, on this machine, in a scratch folder of its own. `billable()` is what the account is paying for.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncssh
from aiohttp import web

CATALOG = {
    "NVIDIA L40S": (48, 0.99),
    "NVIDIA A100-SXM4-80GB": (80, 1.59),
    "NVIDIA H100 80GB HBM3": (80, 3.29),
    "NVIDIA H200": (141, 4.59),
}
REQUIRED = {"name": str, "image": str, "cloud": str, "gpu": dict, "disk": int, "ports": list, "env": dict}
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
OPTIONAL = {"startSsh": bool, "args": str, "registry": str, "dataCenterIds": list, "mounts": dict}


class Pod:
    """One pod. `life` is how it behaves: ok, stuck_place, stuck_pull, error, no_ssh, or refuse_<n>."""

    def __init__(self, number: int, body: dict[str, Any], life: str, folder: Path) -> None:
        self.id, self.body, self.life, self.home = f"pod{number}", body, life, folder / f"pod{number}"
        self.home.mkdir(parents=True)
        self.key = asyncssh.generate_private_key("ssh-ed25519")
        self.status, self.asked, self.commands = "PROVISIONING", 0, 0
        self.hidden = self.gone = self.terminated = False
        self.began, self.server, self.port = time.time(), None, 0
        self.connections: set[Any] = set()
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def rate(self) -> float:
        return CATALOG[self.body["gpu"]["id"]][1] * self.body["gpu"]["count"]

    def kill_job(self) -> None:
        """Everything that runs in it ends at once."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.processes.clear()
        with contextlib.suppress(OSError, ValueError):
            os.killpg(int((self.home / "grpo-job" / "pid").read_text()), signal.SIGKILL)

    def hang_up(self) -> None:
        """Cut every connection, and listen no more."""
        for connection in list(self.connections):
            connection.abort()
        if self.server:
            self.server.close()
            self.server = None


class FakeRunpod:
    """The API.

    Args:
        key: the account's.
        faults: route → what befalls its next requests, in order; "" for nothing. Routes: catalog, create, list, get,
            delete, logs, action. Faults: a status, drop, drop_after, 500_after, late, malformed, hang, redirect, bomb.
        lives: how the pods made behave, in order; then "ok".
        on_command: number of the ssh command in a pod → what befalls it; the first one starts the job. Or a text →
            what befalls every command that holds it.
        run_args: really run the container's command (the watchdog).
        tools: programs of the pods, by name: a shell script each, before those of this machine.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        faults: dict[str, list[str]] | None = None,
        lives: tuple[str, ...] = (),
        on_command: Mapping[int | str, str] | None = None,
        run_args: bool = False,
        host_key_in_log: str = "own",
        tools: dict[str, str] | None = None,
    ) -> None:
        self.tools = folder / "bin"
        self.tools.mkdir(parents=True)
        for name, script in (tools or {}).items():
            (self.tools / name).write_text(f"#!/bin/sh\n{script}\n")
            (self.tools / name).chmod(0o755)
        self.elsewhere: list[tuple[str, str]] = []  # what was sent after a redirect: path, key
        self.folder, self.key, self.run_args, self.host_key_in_log = folder, key, run_args, host_key_in_log
        self.faults = {route: list(them) for route, them in (faults or {}).items()}
        self.lives, self.on_command = list(lives), dict(on_command or {})
        self.pods: dict[str, Pod] = {}
        self.met: Counter[str] = Counter()
        self.requests: dict[str, list[Any]] = defaultdict(list)
        self.late: list[Pod] = []
        self.watch: Callable[[str], None] = lambda event: None
        self.url, self.numbers, self.most_at_once = "", itertools.count(1), 0
        self.webhooks: list[tuple[dict[str, str], bytes]] = []
        self.webhook_faults: list[str] = []

    def billable(self) -> list[str]:
        return [pod.id for pod in self.pods.values() if not pod.terminated]

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v2/catalog/gpus", self.catalog)
        app.router.add_get("/v2/pods", self.list)
        app.router.add_post("/v2/pods", self.create)
        app.router.add_get("/v2/pods/{id}", self.get)
        app.router.add_delete("/v2/pods/{id}", self.delete)
        app.router.add_get("/v2/pods/{id}/logs", self.logs)
        app.router.add_post("/v2/pods/{id}/action", self.action)
        app.router.add_post("/hook", self.hook)
        app.router.add_route("*", "/elsewhere/{path:.*}", self.another_origin)
        return app

    # ---- faults

    async def _befall(self, route: str, request: web.Request) -> tuple[str, web.StreamResponse | None]:
        """The fault of this request, and the answer where there is one instead of the true one."""
        self.watch(route)
        script = self.faults.get(route) or [""]
        fault = script.pop(0) if len(script) > 1 or script[0] != "always" else "always"
        self.met[f"{route}:{fault}" if fault else route] += 1
        if not fault.endswith(("_after", "late")) and request.headers.get("Authorization") not in self._keys(request):
            return fault, problem(401, f"who is {request.headers.get('Authorization')}?")
        if fault[:3].isdecimal() and not fault.endswith("_after"):
            headers = {"Retry-After": "0"} if fault == "429" else None
            return fault, problem(int(fault[:3]), f"no: {dict(request.headers)}", headers)  # it echoes the key
        if fault == "drop":
            assert request.transport
            request.transport.abort()
            return fault, web.Response()
        if fault == "hang":
            await asyncio.sleep(5)
        if fault == "redirect":
            return fault, web.Response(status=307, headers={"Location": self.other_url})
        if fault == "bomb":
            return fault, web.Response(body=gzip.compress(bytes(40 << 20)), headers={"Content-Encoding": "gzip"})
        if fault == "malformed":
            return fault, web.Response(text='{"id": "pod', content_type="application/json")
        if fault == "html":
            return fault, web.Response(text="<html>a proxy's page</html>", content_type="text/html")
        return fault, None

    def _keys(self, request: web.Request) -> set[str]:
        own = request.match_info.get("id")
        return {f"Bearer {self.key}", f"Bearer {own}-key"} if own else {f"Bearer {self.key}"}

    @staticmethod
    def _lose(request: web.Request) -> web.Response:
        assert request.transport
        request.transport.abort()
        return web.Response()

    # ---- routes

    async def catalog(self, request: web.Request) -> web.StreamResponse:
        _, instead = await self._befall("catalog", request)
        if instead:
            return instead
        if set(request.query) - {"include", "product", "count", "cloud"}:
            return problem(422, f"query: {dict(request.query)}")
        rows = [
            {
                "id": name,
                "name": name,
                "memory": memory,
                "price": {"secure": price, "community": None},
                "maxCount": {"secure": 8},
                "availability": "LOW",
                "dataCenters": [],
                "cudaVersions": ["13.0"],
            }
            for name, (memory, price) in CATALOG.items()
        ]
        return web.json_response({"gpus": rows})

    async def create(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests["create"].append(body)
        fault, instead = await self._befall("create", request)
        if instead:
            return instead
        if wrong := what_is_wrong(body):
            return problem(422, "the body is not valid", errors=wrong)
        life = self.lives.pop(0) if self.lives else "ok"
        pod = Pod(next(self.numbers), body, life, self.folder)
        self.most_at_once = max(self.most_at_once, len(self.billable()) + 1)
        self.pods[pod.id] = pod
        self.start(pod)
        self.watch("created")
        if fault == "late":
            pod.hidden = True
            self.late.append(pod)
        if fault in ("drop_after", "late"):
            return self._lose(request)
        if fault == "malformed_after":
            return web.Response(text='{"id": "pod', status=201, content_type="application/json")
        if fault == "500_after":
            return problem(500, "something went wrong")
        return web.json_response(self._shown(pod), status=201)

    async def list(self, request: web.Request) -> web.StreamResponse:
        _, instead = await self._befall("list", request)
        if instead:
            return instead
        rows = [self._shown(pod) for pod in self.pods.values() if not (pod.hidden or pod.gone or pod.terminated)]
        while self.late:  # on the list from the next time on
            self.late.pop().hidden = False
        return web.json_response({"pods": rows})

    async def get(self, request: web.Request) -> web.StreamResponse:
        _, instead = await self._befall("get", request)
        pod = self.pods.get(request.match_info["id"])
        if instead:
            return instead
        if not pod or pod.gone:
            return problem(404, "no such pod")
        await self._live(pod)
        return web.json_response(self._shown(pod))

    async def delete(self, request: web.Request) -> web.StreamResponse:
        fault, instead = await self._befall("delete", request)
        pod = self.pods.get(request.match_info["id"])
        if instead:
            return instead
        if not pod or pod.terminated:
            return problem(404, "no such pod")
        self.end(pod)
        return self._lose(request) if fault == "drop_after" else web.Response(status=204)

    async def action(self, request: web.Request) -> web.StreamResponse:
        _, instead = await self._befall("action", request)
        if instead:
            return instead
        assert await request.json() == {"action": "terminate"}
        asyncio.get_running_loop().call_later(0.05, self.end, self.pods[request.match_info["id"]])
        return web.json_response({}, status=200)

    async def logs(self, request: web.Request) -> web.StreamResponse:
        _, instead = await self._befall("logs", request)
        if instead:
            return instead
        lines = self.log(self.pods[request.match_info["id"]])
        said = "".join(f"data: {json.dumps({'source': 'container', 'line': x, 'ts': 0})}\n\n" for x in lines)
        return web.Response(text=said, content_type="text/event-stream")

    @property
    def other_url(self) -> str:
        """The same server under another name: another origin."""
        return self.url.replace("127.0.0.1", "localhost").replace("/v2", "/elsewhere/x")

    async def another_origin(self, request: web.Request) -> web.StreamResponse:
        self.elsewhere.append((request.path, request.headers.get("Authorization", "")))
        return web.json_response({"gpus": [], "pods": []})

    async def hook(self, request: web.Request) -> web.StreamResponse:
        fault = self.webhook_faults.pop(0) if self.webhook_faults else ""
        if fault == "hang":
            await asyncio.sleep(5)
        elif fault == "307":
            return web.Response(status=307, headers={"Location": self.other_url})
        elif fault:
            return web.Response(status=int(fault))
        self.webhooks.append((dict(request.headers), await request.read()))
        return web.Response(status=204)

    # ---- the life of a pod

    async def _live(self, pod: Pod) -> None:
        """One state further with each question."""
        pod.asked += 1
        goal = {"stuck_place": "PROVISIONING", "stuck_pull": "STARTING"}.get(pod.life, "RUNNING")
        if pod.status == "PROVISIONING" != goal:
            pod.status = "ERROR" if pod.life == "error" else "STARTING"
        elif pod.status == "STARTING" != goal:
            pod.status = "RUNNING"
            self.watch("running")
            await self.listen(pod)

    def log(self, pod: Pod) -> list[str]:
        """What the container has said."""
        shown = {"own": pod.key, "other": asyncssh.generate_private_key("ssh-ed25519"), "none": None}
        key = shown[self.host_key_in_log]
        lines = ["starting", f"authorized {pod.body['env'].get('PUBLIC_KEY')}"]
        return lines + ([f"host key {key.export_public_key().decode().strip()}"] if key else [])

    async def listen(self, pod: Pod) -> None:
        """An ssh server at a new port, that takes the key of the pod's environment and no other."""

        class Door(asyncssh.SSHServer):
            def connection_made(self, connection: Any) -> None:
                self.connection = connection
                pod.connections.add(connection)

            def connection_lost(self, fault: Exception | None) -> None:
                pod.connections.discard(self.connection)

            def begin_auth(self, user: str) -> bool:
                return True

            def public_key_auth_supported(self) -> bool:
                return True

            def validate_public_key(self, user: str, key: Any) -> bool:
                wanted = pod.body["env"]["PUBLIC_KEY"].split()[:2]
                return user == "root" and key.export_public_key().decode().split()[:2] == wanted

        pod.server = await asyncssh.listen(
            "127.0.0.1",
            0,
            server_factory=Door,
            server_host_keys=[pod.key],
            process_factory=lambda process: self._run(pod, process),
            encoding=None,
        )
        pod.port = pod.server.sockets[0].getsockname()[1]

    async def _run(self, pod: Pod, process: Any) -> None:
        pod.commands += 1
        self.watch(f"command_{pod.commands}")
        told = await process.stdin.read() if process.command == "sh -s" else b""
        fault = self.on_command.pop(pod.commands, "") or next(
            (fault for text, fault in self.on_command.items() if isinstance(text, str) and text.encode() in told), ""
        )
        self.met[f"command:{fault}"] += 1
        if fault in ("drop", "move", "die", "vanish", "exit", "hide"):
            if fault in ("die", "vanish", "exit"):
                pod.kill_job()
                pod.status = "EXITED"
                pod.gone = pod.terminated = fault == "vanish"  # the host is lost, and with it the bill
            pod.hidden = pod.hidden or fault == "hide"
            if fault != "hide":
                pod.hang_up()
                if fault in ("drop", "move"):
                    await self.listen(pod)
                return
        if fault == "restart":  # of the container: its disk is new, its processes are gone
            pod.kill_job()
            subprocess.run(["rm", "-rf", str(pod.home / "grpo-job")], check=True)
        path = f"{self.tools}:{PATH}"
        env = {"HOME": str(pod.home), "PATH": path, "LANG": "C.UTF-8", **self.pod_env(pod)}
        command = ["sh", "-c", process.command or "sh"]
        ran = await asyncio.to_thread(subprocess.run, command, cwd=pod.home, env=env, input=told, capture_output=True)
        process.stdout.write(ran.stdout)
        process.exit(ran.returncode)

    def pod_env(self, pod: Pod) -> dict[str, str]:
        """What the provider sets in a pod, and what lets it reach this API and the hub."""
        own = {"RUNPOD_POD_ID": pod.id, "RUNPOD_API_KEY": f"{pod.id}-key", "RUNPOD_API_BASE_URL": self.url}
        return own | {name: os.environ[name] for name in ("HF_ENDPOINT", "PYTHONPATH") if name in os.environ}

    def start(self, pod: Pod) -> None:
        """Run the container's command, where that is asked for."""
        if not self.run_args:
            return
        words = [sys.executable if word == "python" else word for word in shlex.split(pod.body["args"])]
        env = {"HOME": str(pod.home), "GRPO_GSM8K_WATCH_S": "0.05", **self.pod_env(pod), **pod.body["env"]}
        with (pod.home / "container.log").open("wb") as log:
            pod.processes.append(subprocess.Popen(words, env=env, stderr=log, start_new_session=True))

    def shut(self, pod: Pod) -> None:
        """Nothing of it runs any more."""
        pod.kill_job()
        pod.hang_up()

    def end(self, pod: Pod) -> None:
        """It is deleted: nothing of it runs, and nobody pays for it."""
        self.shut(pod)
        pod.status, pod.terminated, pod.gone = "TERMINATED", True, True

    def _shown(self, pod: Pod) -> dict[str, Any]:
        direct = None
        refusals = int(pod.life.removeprefix("refuse_")) if pod.life.startswith("refuse_") else 0
        if pod.status == "RUNNING" and pod.life != "no_ssh":
            port = pod.port if pod.asked > refusals + 2 else 1  # nobody listens at 1
            direct = {"host": "127.0.0.1", "port": port, "username": "root", "command": f"ssh -p {port} root@…"}
        return {
            "id": pod.id,
            "name": pod.body["name"],
            "status": pod.status,
            "actions": ["terminate"],
            "gpu": pod.body["gpu"],
            "dataCenterId": "EU-1",
            "cudaVersion": "13.0",
            "cost": pod.rate,
            "runtime": {"uptime": 1, "ports": []} if pod.status == "RUNNING" else None,
            "ssh": {"proxy": None, "direct": direct},
            "createdAt": "2026-11-21T00:00:00Z",
            "startedAt": None,
            "env": pod.body["env"],
        }


def what_is_wrong(body: dict[str, Any]) -> list[str]:
    """Every fault of a create request, as the strict schema sees it."""
    known = REQUIRED | OPTIONAL
    wrong = [f"unknown field {name}" for name in body if name not in known]
    wrong += [f"missing field {name}" for name in REQUIRED if name not in body]
    wrong += [f"{name} is of the wrong type" for name in body if name in known and type(body[name]) is not known[name]]
    if wrong:
        return wrong
    gpu = body["gpu"]
    if set(gpu) - {"id", "count", "minCudaVersion"} or gpu.get("id") not in CATALOG:
        wrong.append(f"gpu: {gpu}")
    if type(gpu.get("count")) is not int or not 1 <= gpu["count"] <= 8:
        wrong.append("gpu.count")
    if not re.fullmatch(r"\d+\.\d+", gpu.get("minCudaVersion", "13.0")):
        wrong.append("gpu.minCudaVersion")
    if body["cloud"] not in ("SECURE", "COMMUNITY"):
        wrong.append("cloud")
    if not re.fullmatch(r"[a-zA-Z0-9._-]{1,191}", body["name"]):
        wrong.append("name")
    if not all(re.fullmatch(r"\d+/(tcp|http)", port) for port in body["ports"]):
        wrong.append("ports")
    if not all(type(value) is str for value in body["env"].values()):
        wrong.append("env")
    for mount in body.get("mounts", {}).get("network", []):
        wrong += [] if set(mount) == {"volumeId", "path"} else ["mounts"]
    return wrong


def problem(
    status: int, detail: str, headers: dict[str, str] | None = None, errors: list[str] | None = None
) -> web.Response:
    """RFC 9457."""
    said = {"title": "It was not done", "status": status, "detail": detail, "errors": errors or []}
    return web.json_response(said, status=status, headers=headers, content_type="application/problem+json")


@contextmanager
def serve(fake: FakeRunpod) -> Iterator[FakeRunpod]:
    """Run it in a thread, and end every pod's processes behind it."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(fake.app(), shutdown_timeout=0.1, handler_cancellation=True)

    async def start() -> str:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}/v2"

    async def stop() -> None:
        for pod in fake.pods.values():
            fake.shut(pod)
        await runner.cleanup()
        await loop.shutdown_default_executor()

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        fake.url = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
