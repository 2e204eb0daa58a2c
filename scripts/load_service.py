"""The service under load, and what it costs over the same run in one process.

    uv run python scripts/load_service.py --seconds 300 --out load.json
    uv run python scripts/load_service.py --seconds 0 --overhead_steps 20

A server is started on the demo's tiny model (or --model_id). Clients of OpenAI's wire sample in a loop, clients of the
Tinker wire train in a loop, each with an adapter of its own; latencies, tokens, errors and the server's memory are
counted. Then one client takes --overhead_steps of sampling, gradient and optimizer step over HTTP, and the same jobs
are done in this process by the same sampler and learner without a server: the ratio of the two times is the overhead.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from grpo_gsm8k.runs.files import write_json

KEY = "tml-of-the-load-test"
NAME = "tiny"
PROMPT = list(range(5, 37))
SAMPLES, SAMPLED_TOKENS = 2, 24
ROWS, ROW_TOKENS = 8, 48
GROUPS, GROUP, GROUP_TOKENS = 8, 8, 64  # of the comparison with one process


@contextmanager
def server(model: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """A server's address and process id."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--model_id", str(model), "--served_name", NAME, "--out_dir", str(folder), "--port", str(port)]
    command = [sys.executable, "-m", "grpo_gsm8k.cli", "serve", *flags, "--api_key_env", "LOAD_KEY", "--device", "cpu"]
    process = subprocess.Popen(command, env={**os.environ, "LOAD_KEY": KEY}, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline().startswith("serving"), "the server did not start"
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


class Counts:
    """What the clients saw."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.tokens: Counter[str] = Counter()
        self.errors: list[str] = []

    def add(self, what: str, seconds: float, tokens: int = 0) -> None:
        self.seconds.setdefault(what, []).append(seconds)
        self.tokens[what] += tokens

    def summary(self, seconds: float) -> dict[str, Any]:
        """Percentiles in milliseconds, and rates."""
        found: dict[str, Any] = {"errors": len(self.errors), "first_errors": self.errors[:5]}
        for what, each in self.seconds.items():
            cuts = statistics.quantiles(each, n=100, method="inclusive") if len(each) > 1 else each * 99
            found[what] = {"requests": len(each), "p50_ms": 1e3 * cuts[49], "p99_ms": 1e3 * cuts[98]}
            if self.tokens[what]:
                found[what]["tokens_per_s"] = self.tokens[what] / seconds
        return found


class Client:
    """A client of the Tinker wire and of OpenAI's."""

    def __init__(self, http: aiohttp.ClientSession, url: str, counts: Counts) -> None:
        self.http, self.url, self.counts = http, url, counts
        self.seq, self.model = 0, ""

    async def post(self, path: str, body: Any) -> Any:
        """One request; anything but 200 is an error."""
        async with self.http.post(self.url + path, json=body, headers={"X-API-Key": KEY}) as answer:
            found = await answer.json()
            if answer.status != 200 or "error" in found:
                raise ConnectionError(f"{path}: {answer.status}: {found}")
            return found

    async def future(self, sent: Any) -> Any:
        """A future's value."""
        while True:
            found = await self.post("/api/v1/retrieve_future", {"request_id": sent["request_id"]})
            if found.get("type") != "try_again":
                return found

    async def begin(self, rank: int = 8) -> None:
        """A session with an adapter."""
        session = (await self.post("/api/v1/create_session", {"tags": [], "sdk_version": "load"}))["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": NAME, "lora_config": {"rank": rank, "seed": 1}}
        self.model = (await self.future(await self.post("/api/v1/create_model", body)))["model_id"]

    async def op(self, path: str, **fields: Any) -> Any:
        """A training request with the model's next number; not yet its value."""
        self.seq += 1
        return await self.post(f"/api/v1/{path}", {"model_id": self.model, "seq_id": self.seq, **fields})

    async def learn(self, data: Any, loss: str) -> Any:
        """A gradient and a step, submitted together."""
        body = {"data": data, "loss_fn": loss}
        sent = [await self.op("forward_backward", forward_backward_input=body)]
        sent.append(await self.op("optim_step", adam_params={"learning_rate": 1e-4}))
        return [await self.future(one) for one in sent]

    async def sample(self, model: str, seed: int) -> Any:
        body = {"model": model, "prompt": PROMPT, "n": SAMPLES, "max_tokens": SAMPLED_TOKENS, "seed": seed}
        return await self.post("/v1/completions", {**body, "ignore_eos": True})


def tensor(values: list[Any]) -> dict[str, Any]:
    return {"data": values, "dtype": "int64" if isinstance(values[0], int) else "float32"}


def row(ids: list[int], **inputs: list[float]) -> dict[str, Any]:
    """A datum of the wire: position i predicts id i + 1."""
    named = {"target_tokens": tensor(ids[1:]), **{name: tensor(values) for name, values in inputs.items()}}
    return {"model_input": {"chunks": [{"tokens": ids[:-1]}]}, "loss_fn_inputs": named}


async def load(url: str, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    """All clients at once, for --seconds."""
    counts, until, memory = Counts(), time.monotonic() + args.seconds, list[float]()

    async def sampling(client: Client, number: int) -> None:
        while time.monotonic() < until:
            number += args.samplers
            began = time.monotonic()
            await client.sample(NAME, number)
            counts.add("sample", time.monotonic() - began, SAMPLES * SAMPLED_TOKENS)

    async def training(client: Client) -> None:
        await client.begin()
        ids = [[(7 * r + t) % 300 + 3 for t in range(ROW_TOKENS + 1)] for r in range(ROWS)]
        while time.monotonic() < until:
            began = time.monotonic()
            await client.learn([row(one) for one in ids], "cross_entropy")
            counts.add("train", time.monotonic() - began, ROWS * ROW_TOKENS)

    async def watching() -> None:
        while time.monotonic() < until:
            memory.append(rss_mb(pid))
            await asyncio.sleep(min(2.0, args.seconds / 20))

    limit = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=limit, timeout=aiohttp.ClientTimeout(total=600)) as http:
        clients = [Client(http, url, counts) for _ in range(args.samplers + args.trainers)]
        jobs = [sampling(client, k) for k, client in enumerate(clients[: args.samplers])]
        jobs += [training(client) for client in clients[args.samplers :]]
        ended = await asyncio.gather(watching(), *jobs, return_exceptions=True)
    counts.errors += [repr(fault)[:300] for fault in ended if isinstance(fault, BaseException)]
    third = len(memory) // 3
    grown = statistics.fmean(memory[-third:]) - statistics.fmean(memory[third : 2 * third])
    figures = {"rss_mb_first_third": statistics.fmean(memory[:third]), "rss_mb_end": memory[-1]}
    return {**counts.summary(args.seconds), **figures, "rss_mb_grown_in_the_last_third": grown}


def rss_mb(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


# --------------------------------------------------------------------------------------------------- the overhead


def advantages(count: int, length: int) -> list[list[float]]:
    """Made-up ones, which sum to zero."""
    return [[0.0] * (len(PROMPT) - 1) + [(-1.0) ** k / count / length] * length for k in range(count)]


async def over_http(url: str, steps: int) -> list[float]:
    """Seconds of each step of a client that samples from its newest weights and trains on what it drew."""
    counts, seconds = Counts(), list[float]()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as http:
        client = Client(http, url, counts)
        await client.begin()
        params = {"max_tokens": GROUP_TOKENS, "temperature": 1.0, "stop": []}
        for step in range(steps):
            began = time.monotonic()
            saved = await client.future(await client.op("save_weights_for_sampler", sampling_session_seq_id=step))
            body = {"sampling_session_id": saved["sampling_session_id"], "num_samples": GROUP}
            body |= {"prompt": {"chunks": [{"tokens": PROMPT}]}}
            asked = [
                {**body, "seq_id": k, "sampling_params": {**params, "seed": step * GROUPS + k}} for k in range(GROUPS)
            ]
            sent = await asyncio.gather(*(client.post("/api/v1/asample", one) for one in asked))  # as the SDK does
            drawn = [s for one in sent for s in (await client.future(one))["sequences"]]
            credit = advantages(len(drawn), GROUP_TOKENS)
            before = [0.0] * (len(PROMPT) - 1)
            data = [
                row([*PROMPT, *s["tokens"]], logprobs=before + s["logprobs"], advantages=a)
                for s, a in zip(drawn, credit, strict=True)
            ]
            await client.learn(data, "importance_sampling")
            seconds.append(time.monotonic() - began)
    return seconds


def in_process(model: Path, steps: int) -> list[float]:
    """The same jobs by the same sampler and learner, without a server."""
    import numpy as np
    import torch

    from grpo_gsm8k import config, repro
    from grpo_gsm8k.serve.adapters import BaseModel, ModelSpec
    from grpo_gsm8k.serve.data import TrainingJob, WireDatum
    from grpo_gsm8k.serve.jobs import SampleJob
    from grpo_gsm8k.serve.learn import Trained
    from grpo_gsm8k.serve.sampling import Sampler
    from grpo_gsm8k.serve.work import adam_of

    repro.set_deterministic(True)
    base = BaseModel(config.build(config.ModelConfig, {"model_id": str(model), "device": "cpu"}))
    sampler, trained = Sampler(base), Trained(base, "m1", ModelSpec(8, seed=1), 8192)
    seconds = []
    for step in range(steps):
        began = time.monotonic()
        jobs = [
            SampleJob(tuple(PROMPT), GROUP, GROUP_TOKENS, seed=step * GROUPS + k, stop_ids=()) for k in range(GROUPS)
        ]
        with torch.inference_mode():
            drawn = [s for result in sampler.decode(base.activate("m1"), jobs) for s in result.sequences]
        before, data = [0.0] * (len(PROMPT) - 1), []
        for s, credit in zip(drawn, advantages(len(drawn), GROUP_TOKENS), strict=True):
            ids = np.array([*PROMPT, *s.token_ids], "<i8")
            inputs = {"target_tokens": ids[1:], "logprobs": np.array(before + list(s.logprobs), "<f4")}
            data.append(WireDatum(ids[:-1], inputs | {"advantages": np.array(credit, "<f4")}))
        trained.forward_backward(TrainingJob(tuple(data), "importance_sampling", {}))
        trained.optim_step(adam_of({"adam_params": {"learning_rate": 1e-4}}))
        seconds.append(time.monotonic() - began)
    return seconds


def tiny_model(folder: Path) -> Path:
    """The demo's."""
    from grpo_gsm8k.tasks.gsm8k import toy
    from grpo_gsm8k.trainer.tiny_model import make_tiny_model

    data = toy.write(folder / "data", 0, {"train": 512, "val": 16, "test": 16}, 0.5)
    return make_tiny_model(folder / "model", [(data / "train.jsonl").read_text()], 0)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", type=Path, help="a model's folder; by default the demo's tiny model is made")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--samplers", type=int, default=50)
    parser.add_argument("--trainers", type=int, default=8)
    parser.add_argument("--overhead_steps", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"cores": os.cpu_count(), "seconds": args.seconds}
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model_id or tiny_model(Path(temporary))
        with server(model, Path(temporary) / "server") as (url, pid):
            if args.seconds:
                found |= {"samplers": args.samplers, "trainers": args.trainers, **asyncio.run(load(url, pid, args))}
            served = asyncio.run(over_http(url, args.overhead_steps)) if args.overhead_steps else []
        if served:
            # Of another process, so that nothing of the load is in its memory; the first steps warm up.
            command = [
                sys.executable,
                __file__,
                "--model_id",
                str(model),
                "--overhead_steps",
                str(-args.overhead_steps),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            alone = json.loads(done.stdout)
            ratio = statistics.median(served[2:]) / statistics.median(alone[2:])
            found["overhead"] = {
                "ratio": ratio,
                "http_s": statistics.median(served),
                "alone_s": statistics.median(alone),
            }
    if args.out:
        write_json(args.out, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    if "--overhead_steps" in sys.argv and int(sys.argv[sys.argv.index("--overhead_steps") + 1]) < 0:
        model_id = Path(sys.argv[sys.argv.index("--model_id") + 1])
        print(json.dumps(in_process(model_id, -int(sys.argv[-1]))))
    else:
        main()
