"""A server in this process or in its own, and a client that speaks the Tinker wire by hand."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi.testclient import TestClient

from grpo_gsm8k import config
from grpo_gsm8k.serve import server
from grpo_gsm8k.serve.app import make_app
from grpo_gsm8k.serve.auth import Keeper, hash_of
from grpo_gsm8k.serve.settings import ServeConfig
from tests.toys import REPOSITORY

KEY = "tml-a-key-of-the-tests"
HEADERS = {"X-API-Key": KEY}
NAME = "toy/model"
PARAMS = {"max_tokens", "seed", "stop", "temperature", "top_k", "top_p"}


class Failed(Exception):
    """A future that failed; `category` as it came over the wire."""

    def __init__(self, sent: dict[str, Any]) -> None:
        super().__init__(sent["error"])
        self.category = sent["category"]


class Client:
    """Talks JSON to a server; `http` is httpx's, or a test client with the same methods."""

    def __init__(self, http: Any) -> None:
        self.http, self.numbers = http, {}

    def post(self, path: str, body: Any = None, status: int = 200, **more: Any) -> Any:
        """The answer's JSON."""
        return self.send("POST", path, status, json={} if body is None else body, **more)

    def get(self, path: str, status: int = 200, **more: Any) -> Any:
        return self.send("GET", path, status, **more)

    def send(self, method: str, path: str, status: int = 200, **more: Any) -> Any:
        answer = self.http.request(method, f"/api/v1/{path}", **{"headers": HEADERS, **more})
        assert answer.status_code == status, (path, answer.status_code, answer.text)
        return answer.json() if answer.content and "json" in answer.headers["content-type"] else answer

    def result(self, sent: dict[str, Any]) -> Any:
        """The value of a future. Raises `Failed`."""
        while True:
            found = self.post("retrieve_future", {"request_id": sent["request_id"]})
            if found.get("type") == "try_again":
                continue
            if "error" in found:
                raise Failed(found)
            return found

    def session(self) -> str:
        return str(self.post("create_session", {"tags": [], "sdk_version": "test"})["session_id"])

    def model(self, session: str = "", rank: int = 4, number: int = 0, **lora: Any) -> str:
        """A new model's id."""
        body = {
            "session_id": session or self.session(),
            "model_seq_id": number,
            "base_model": NAME,
            "lora_config": {"rank": rank, "seed": 7, **lora},
        }
        return str(self.result(self.post("create_model", body))["model_id"])

    def submit(self, op: str, model: str, seq: int | None = None, **fields: Any) -> dict[str, Any]:
        """A training request with the model's next number; its future."""
        numbers = self.numbers.setdefault(model, itertools.count(1))
        body = {"model_id": model, "seq_id": next(numbers) if seq is None else seq, **fields}
        sent: dict[str, Any] = self.post(op, body)
        return sent

    def train(self, op: str, model: str, **fields: Any) -> Any:
        return self.result(self.submit(op, model, **fields))

    def learn(self, model: str, data: list[Any], loss: str = "cross_entropy", settings: Any = None) -> Any:
        return self.train("forward_backward", model, **loss_input(data, loss, settings))

    def forward(self, model: str, data: list[Any], loss: str = "cross_entropy") -> Any:
        return self.train("forward", model, forward_input=loss_input(data, loss)["forward_backward_input"])

    def step(self, model: str, lr: float = 1e-2, **adam: Any) -> Any:
        return self.train("optim_step", model, adam_params={"learning_rate": lr, **adam})

    def sampler(self, session: str, number: int = 100, path: str = "") -> str:
        """A sampling session of the base, or of a path."""
        what = {"model_path": path} if path else {"base_model": NAME}
        body = {"session_id": session, "sampling_session_seq_id": number, **what}
        return str(self.post("create_sampling_session", body)["sampling_session_id"])

    def sample(self, sampler: str, prompt: list[int], seq: int = 0, **fields: Any) -> Any:
        return self.result(self.submit_sample(sampler, prompt, seq, **fields))

    def submit_sample(self, sampler: str, prompt: list[int], seq: int = 0, **fields: Any) -> Any:
        params = {k: fields.pop(k) for k in list(fields) if k in PARAMS}
        body = {
            "sampling_session_id": sampler,
            "seq_id": seq,
            "num_samples": 1,
            "prompt": {"chunks": [{"tokens": prompt}]},
            "sampling_params": {"max_tokens": 6, "seed": 3, **params},
            **fields,
        }
        return self.post("asample", body)


def loss_input(data: list[Any], loss: str = "cross_entropy", settings: Any = None) -> dict[str, Any]:
    sent = {"data": data, "loss_fn": loss} | ({"loss_fn_config": settings} if settings is not None else {})
    return {"forward_backward_input": sent}


def tensor(values: Any, shape: Any = None) -> dict[str, Any]:
    """A tensor as JSON has it."""
    kind = "int64" if all(isinstance(v, int) for v in values) else "float32"
    return {"data": list(values), "dtype": kind} | ({"shape": shape} if shape else {})


def datum(tokens: list[int], targets: list[int] | None = None, **inputs: Any) -> dict[str, Any]:
    """A row; by default each token's target is the one behind it."""
    targets = tokens[1:] if targets is None else targets
    named = {"target_tokens": tensor(targets), **{name: tensor([float(x) for x in v]) for name, v in inputs.items()}}
    return {"model_input": {"chunks": [{"tokens": tokens[: len(targets)]}]}, "loss_fn_inputs": named}


def settings(model: Path, folder: Path, **flags: Any) -> ServeConfig:
    """A server's settings."""
    small = {"model_id": str(model), "served_name": NAME, "device": "cpu", "gap_s": 0.2, "port": 0}
    return config.build(ServeConfig, {**small, "out_dir": str(folder), **flags})


@contextmanager
def in_process(model: Path, folder: Path, **flags: Any) -> Iterator[Client]:
    """A server in this process. Its service is `client.service`."""
    cfg = settings(model, folder, **flags)
    folder.mkdir(parents=True, exist_ok=True)
    with server.opened(cfg, folder) as service, TestClient(make_app(service, Keeper(hash_of(KEY), "s"))) as http:
        client = Client(http)
        client.service = service  # type: ignore[attr-defined]
        yield client


class Process:
    """A server in a process of its own, which can be killed and started again."""

    def __init__(self, model: Path, folder: Path, port: int, **flags: Any) -> None:
        self.model, self.folder, self.port, self.flags = model, folder, port, flags
        self.process: subprocess.Popen[str] | None = None
        self.log = folder.with_suffix(".log")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = {"model_id": self.model, "served_name": NAME, "device": "cpu", "out_dir": self.folder}
        options |= {"port": self.port, "api_key_env": "SERVE_TEST_KEY", **self.flags}
        flags = [f"--{name}={value}" for name, value in options.items()]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "grpo_gsm8k.cli", "serve", *flags],
                cwd=REPOSITORY,
                env={**os.environ, "SERVE_TEST_KEY": KEY},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        until = time.monotonic() + 600  # on a machine that is busy with other work
        while time.monotonic() < until:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/api/v1/healthz", timeout=2).status_code == 200:
                    return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"the server did not start: {self.log.read_text()}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def end(self, number: int = signal.SIGKILL) -> int:
        """Kill it, or tell it to end; its exit code."""
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(60)


def free_port() -> int:
    """A port that nobody has at the moment."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
