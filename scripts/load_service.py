"""The service under load, and what it costs over the same run in one process.

    uv run python scripts/load_service.py --seconds 300 --out load.json
    uv run python scripts/load_service.py --seconds 0 --overhead_steps 20

A server is started on the demo's tiny model (or --model_id). Clients of OpenAI's wire sample in a loop, clients of the
Tinker wire train in a loop, each with an adapter of its own; latencies, tokens, errors and the server's memory are
counted. Then one client takes --overhead_steps of sampling, gradient and optimizer step over HTTP, in protobuf as
Tinker's own client does, and in turns with it another process does the same jobs by the same sampler and learner
without a server: the median of the steps' ratios is the overhead.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
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
PROTOBUF = "application/x-protobuf"
NAME = "tiny"
PROMPT = list(range(5, 37))
SAMPLES, SAMPLED_TOKENS = 2, 24
ROWS, ROW_TOKENS = 8, 48
GROUPS, GROUP, GROUP_TOKENS, WARM_UP = 8, 8, 64, 3  # of the comparison with one process


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

    async def send(self, message: Any) -> Any:
        """A forward_backward in protobuf; not yet its value."""
        headers = {"X-API-Key": KEY, "Content-Type": PROTOBUF}
        body = message.SerializeToString()
        async with self.http.post(self.url + "/api/v1/forward_backward", data=body, headers=headers) as answer:
            return await answer.json()

    async def answer(self, sent: Any, name: str) -> Any:
        """A future's value, as the message of this name."""
        from grpo_gsm8k.serve import proto

        headers, body = {"X-API-Key": KEY, "Accept": PROTOBUF}, {"request_id": sent["request_id"]}
        while True:
            async with self.http.post(self.url + "/api/v1/retrieve_future", json=body, headers=headers) as answer:
                if answer.content_type == PROTOBUF:
                    found = proto.message(name)
                    found.ParseFromString(await answer.read())
                    return found
                if "error" in (said := await answer.json()):
                    raise ConnectionError(said["error"])

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


def row(ids: list[int]) -> dict[str, Any]:
    """A datum of the wire in JSON: position i predicts id i + 1."""
    targets = {"data": ids[1:], "dtype": "int64"}
    return {"model_input": {"chunks": [{"tokens": ids[:-1]}]}, "loss_fn_inputs": {"target_tokens": targets}}


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


def credit() -> list[float]:
    """Made-up advantages of a step's samples, which sum to zero."""
    return [(-1.0) ** k / (GROUPS * GROUP * GROUP_TOKENS) for k in range(GROUPS * GROUP)]


def tensor_message(into: Any, values: Any) -> None:
    """A tensor of the wire's protobuf."""
    from grpo_gsm8k.serve import proto

    into.dense, into.dtype = values.tobytes(), proto.INT64 if values.dtype.kind == "i" else proto.FLOAT32
    into.shape.append(len(values))


async def http_step(client: Client, step: int) -> float:
    """Seconds in which a client samples from its newest weights and trains on what it drew."""
    import numpy as np

    from grpo_gsm8k.serve import proto

    began = time.monotonic()
    saved = await client.future(await client.op("save_weights_for_sampler", sampling_session_seq_id=step))
    body = {"sampling_session_id": saved["sampling_session_id"], "num_samples": GROUP}
    body |= {"prompt": {"chunks": [{"tokens": PROMPT}]}}
    params = {"max_tokens": GROUP_TOKENS, "temperature": 1.0, "stop": []}
    asked = [{**body, "seq_id": k, "sampling_params": {**params, "seed": step * GROUPS + k}} for k in range(GROUPS)]
    sent = await asyncio.gather(*(client.post("/api/v1/asample", one) for one in asked))  # as Tinker's client does
    client.seq += 1
    request = proto.message("ForwardBackwardRequest")
    request.model_id, request.seq_id, request.loss_fn = client.model, client.seq, "importance_sampling"
    drawn = [s for one in sent for s in (await client.answer(one, "SampleResponse")).sequences]
    before = np.zeros(len(PROMPT) - 1, "<f4")
    for sample, advantage in zip(drawn, credit(), strict=True):
        new = np.frombuffer(sample.tokens, "<i4")
        ids = np.concatenate([np.array(PROMPT, "<i8"), new])
        datum = request.data.add()
        datum.model_input.add().encoded_text.tokens = ids[:-1].astype("<i4").tobytes()
        tensor_message(datum.loss_fn_inputs["target_tokens"], ids[1:])
        logprobs = np.frombuffer(sample.logprobs, "<f4")
        tensor_message(datum.loss_fn_inputs["logprobs"], np.concatenate([before, logprobs]))
        advantages = np.full(len(new), advantage, "<f4")
        tensor_message(datum.loss_fn_inputs["advantages"], np.concatenate([before, advantages]))
    futures = [await client.send(request), await client.op("optim_step", adam_params={"learning_rate": 1e-4})]
    await client.answer(futures[0], "ForwardBackwardOutput")
    await client.future(futures[1])
    return time.monotonic() - began


def alone(model: Path) -> Iterator[float]:
    """Seconds of each step in which the same sampler and learner do the same jobs, without a server."""
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
    before = np.zeros(len(PROMPT) - 1, "<f4")
    for step in itertools.count():
        began = time.monotonic()
        jobs = [
            SampleJob(tuple(PROMPT), GROUP, GROUP_TOKENS, seed=step * GROUPS + k, stop_ids=()) for k in range(GROUPS)
        ]
        with torch.inference_mode():
            drawn = [s for result in sampler.decode(base.activate("m1"), jobs) for s in result.sequences]
        data = []
        for s, advantage in zip(drawn, credit(), strict=True):
            ids = np.array([*PROMPT, *s.token_ids], "<i8")
            advantages = np.full(len(s.token_ids), advantage, "<f4")
            inputs = {"target_tokens": ids[1:], "logprobs": np.concatenate([before, np.array(s.logprobs, "<f4")])}
            data.append(WireDatum(ids[:-1], inputs | {"advantages": np.concatenate([before, advantages])}))
        trained.forward_backward(TrainingJob(tuple(data), "importance_sampling", {}))
        trained.optim_step(adam_of({"adam_params": {"learning_rate": 1e-4}}))
        yield time.monotonic() - began


async def overhead(url: str, model: Path, steps: int) -> dict[str, float]:
    """Steps by turns over HTTP and in another process, which waits at its standard input; the first ones warm up."""
    policy = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}  # as the command line has it
    command = [sys.executable, __file__, "--alone", "--model_id", str(model)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    served, unserved = list[float](), list[float]()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as http:
        client = Client(http, url, Counts())
        await client.begin()
        with subprocess.Popen(command, text=True, env={**os.environ, **policy}, **pipes) as other:  # type: ignore[call-overload]
            for step in range(steps + WARM_UP):
                served.append(await http_step(client, step))
                other.stdin.write("\n")
                other.stdin.flush()
                unserved.append(float(other.stdout.readline()))
            other.stdin.close()
    ratios = [a / b for a, b in zip(served[WARM_UP:], unserved[WARM_UP:], strict=True)]
    quarters = statistics.quantiles(ratios, n=4)
    medians = {"http_s": statistics.median(served[WARM_UP:]), "alone_s": statistics.median(unserved[WARM_UP:])}
    return {"steps": steps, "ratio": quarters[1], "quartile_1": quarters[0], "quartile_3": quarters[2], **medians}


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
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        seconds = alone(args.model_id)
        for _ in sys.stdin:
            print(next(seconds), flush=True)
        return
    found: dict[str, Any] = {"cores": os.cpu_count(), "seconds": args.seconds}
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model_id or tiny_model(Path(temporary))
        with server(model, Path(temporary) / "server") as (url, pid):
            if args.seconds:
                found |= {"samplers": args.samplers, "trainers": args.trainers, **asyncio.run(load(url, pid, args))}
            if args.overhead_steps:
                found["overhead"] = asyncio.run(overhead(url, model, args.overhead_steps))
    if args.out:
        write_json(args.out, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
