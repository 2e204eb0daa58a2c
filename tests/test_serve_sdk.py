"""The service driven by the real `tinker` SDK, over faults, and from its own OpenAPI: minutes, so slow.

uv run --group tinker pytest --runslow tests/test_serve_sdk.py
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from grpo_gsm8k.serve import proto
from tests.serve_tools import HEADERS, KEY, NAME, Client, Process, datum, free_port
from tests.test_serve_crash import a_run
from tests.test_serve_parts import proto_request
from tests.toys import REPOSITORY

pytestmark = pytest.mark.slow

OLDER = ("0.16.1", "0.25.0")
CHECKS = Path(__file__).with_name("sdk_checks.py")


@pytest.fixture(scope="module")
def process(tiny, tmp_path_factory) -> Iterator[Process]:
    made = Process(tiny.model, tmp_path_factory.mktemp("serve") / "out", free_port(), gap_s=5)
    made.start()
    yield made
    assert made.end(signal.SIGTERM) == 0
    log = made.log.read_text()
    assert "Traceback" not in log and KEY not in log


def drive(url: str, *command: str) -> dict[str, Any]:
    """The checks in an SDK's own environment; what they found."""
    done = subprocess.run(
        [*command, str(CHECKS), url, NAME],
        env={**os.environ, "TINKER_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_three_versions_of_the_sdk_find_the_same(process: Process) -> None:
    pytest.importorskip("tinker")
    newest = drive(process.url, sys.executable)
    for version in OLDER:
        uv = [str(REPOSITORY / "scripts/uv"), "run", "--no-project", "-q", "--with", f"tinker=={version}", "python"]
        assert drive(process.url, *uv) == newest


def test_the_protobuf_messages_are_the_sdks() -> None:
    theirs = pytest.importorskip("tinker.proto.tinker_public_pb2").DESCRIPTOR.message_types_by_name
    for name in proto.MESSAGES:
        ours = proto.message(name).DESCRIPTOR
        if name not in theirs:  # nested or inlined there; the wire knows no names
            continue
        mine = {f.name: (f.number, f.type, f.is_repeated) for f in ours.fields}
        real = {f.name: (f.number, f.type, f.is_repeated) for f in theirs[name].fields}
        assert {k: real[k] for k in mine if k in real} == {k: mine[k] for k in mine if k in real}, name
        assert not {f.number for f in ours.fields} - {f.number for f in theirs[name].fields}, name


# ------------------------------------------------------------------------------------------------- faults


class FaultyProxy:
    """Between client and server: loses requests, answers with 503, or closes the connection instead of answering."""

    def __init__(self, target: int, share: float, seed: int) -> None:
        self.target, self.share, self.draw, self.faults = target, share, random.Random(seed), 0
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self.serve, "127.0.0.1", 0))
        self.port = self.server.sockets[0].getsockname()[1]
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request a connection."""
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
                writer.write(await self.answer(reader))
                await writer.drain()
        finally:
            writer.close()

    async def answer(self, reader: asyncio.StreamReader) -> bytes:
        """What comes back; nothing where the request or the answer is lost."""
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        lengths = [int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:")]
        body = await reader.readexactly(lengths[0]) if lengths else b""
        fate = self.draw.random() / self.share
        self.faults += fate < 1
        if fate < 1 / 3:
            return b""
        if fate < 2 / 3:
            return b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
        kept = [line for line in lines if line and not line.lower().startswith("connection:")]
        sent, back = await asyncio.open_connection("127.0.0.1", self.target)
        back.write("\r\n".join([*kept, "Connection: close", "", ""]).encode("latin-1") + body)
        answer = await sent.read()
        back.close()
        return answer if fate >= 1 else b""


SDK_RUN = """
import json, os, sys
import numpy as np, tinker
from tinker import types
service = tinker.ServiceClient()
client = service.create_lora_training_client(base_model=sys.argv[1], rank=4, seed=7).result()
ids, told = [5, 9, 14, 7, 22, 31, 8, 40, 12, 6], []
for step in range(int(sys.argv[2])):
    sampler = client.save_weights_and_get_sampling_client().result()
    rows = []
    asked = [sampler.sample(prompt=types.ModelInput.from_ints(ids[:n]), num_samples=2,
             sampling_params=types.SamplingParams(max_tokens=6, seed=step, stop=[])) for n in (3, 5)]
    for n, sent in zip((3, 5), asked):
        for one in sent.result().sequences:
            tokens, logprobs = list(one.tokens), [float(x) for x in one.logprobs]
            told.append([tokens, logprobs])
            whole, reward = ids[:n] + tokens, sum(t % 2 for t in tokens) / 6 - 0.5
            rows.append(types.Datum(model_input=types.ModelInput.from_ints(whole[:-1]), loss_fn_inputs={
                "target_tokens": whole[1:],
                "logprobs": np.array([0.0] * (n - 1) + logprobs, np.float32),
                "advantages": np.array([0.0] * (n - 1) + [reward] * len(tokens), np.float32)}))
    first = client.forward_backward(rows, "importance_sampling")
    second = client.optim_step(types.AdamParams(learning_rate=3e-2))
    told.append([first.result().metrics, second.result().metrics])
last = client.forward(rows, "importance_sampling").result().loss_fn_outputs
told.append([float(x) for o in last for x in o["logprobs"].to_numpy().ravel()])
print(json.dumps(told)); sys.stdout.flush(); os._exit(0)
"""


def sdk_run(url: str, steps: int) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SDK_RUN, NAME, str(steps)],
        env={**os.environ, "TINKER_API_KEY": KEY, "TINKER_BASE_URL": url, "TINKER_TELEMETRY": "0"},
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_third_of_the_answers_lost_on_the_real_wire(process: Process) -> None:
    pytest.importorskip("tinker")
    proxy = FaultyProxy(process.port, 0.3, 5)
    expected = sdk_run(process.url, 6)
    assert sdk_run(f"http://127.0.0.1:{proxy.port}", 6) == expected
    assert proxy.faults > 20


@pytest.mark.timeout(3600)
def test_twenty_kills_inside_one_run_of_the_sdk(tiny, tmp_path, process: Process) -> None:
    pytest.importorskip("tinker")
    expected, kills = sdk_run(process.url, 40), 0
    other = Process(tiny.model, tmp_path / "killed", free_port(), snapshot_every=3, gap_s=30)
    other.start()
    ends, draw = threading.Event(), random.Random(8)

    def kill() -> None:
        nonlocal kills
        while kills < 20 and not ends.wait(draw.uniform(0.2, 3.0)):
            other.end(signal.SIGKILL)
            kills += 1
            other.start()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = sdk_run(other.url, 40)
    finally:
        ends.set()
        killer.join()
    assert kills == 20
    assert found == expected
    assert other.end(signal.SIGTERM) == 0


def test_two_clients_of_the_sdk_at_once(process: Process) -> None:
    pytest.importorskip("tinker")
    alone = sdk_run(process.url, 5)
    together: list[Any] = [None, None]
    threads = [threading.Thread(target=lambda n=n: together.__setitem__(n, sdk_run(process.url, 5))) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [alone, alone]


# ------------------------------------------------------------------------------------------------- fuzzing


def test_no_request_that_its_openapi_allows_is_a_500(process: Process) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, settings

    schema = schemathesis.openapi.from_url(f"{process.url}/openapi.json")
    for operation in schema.get_all_operations():
        case_strategy = operation.ok().as_strategy()

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @__import__("hypothesis").given(case=case_strategy)
        def check(case: Any) -> None:
            answer = case.call(base_url=process.url, headers=HEADERS, timeout=60)
            ended = answer.status_code == 409 and answer.json()["error"]["type"] == "not_running"  # of a rollouts run
            assert (ended or answer.status_code not in (402, 409)) and answer.status_code < 500, (case, answer.text)

        check()
    assert httpx.get(f"{process.url}/api/v1/healthz").json() == {"status": "ok"}


def test_mutated_protobuf_is_never_a_500(process: Process) -> None:
    draw = np.random.default_rng(0)
    with httpx.Client(base_url=process.url, timeout=60) as http:
        client = Client(http)
        model = client.model()
        whole = proto_request(model, 1, [datum([5, 9, 14, 7], weights=[1, 2, 3])]).SerializeToString()
        futures, headers = [], {**HEADERS, "Content-Type": "application/x-protobuf"}
        for _ in range(600):
            raw = bytearray(whole)
            for _ in range(draw.integers(1, 6)):
                at = draw.integers(0, len(raw))
                match draw.integers(0, 3):
                    case 0:
                        raw[at] = draw.integers(0, 256)
                    case 1:
                        del raw[at : at + draw.integers(1, 9)]
                    case _:
                        raw[at:at] = draw.bytes(int(draw.integers(1, 9)))
                if not raw:
                    break
            answer = http.post("/api/v1/forward_backward", content=bytes(raw), headers=headers)
            assert answer.status_code in (200, 400, 404, 422), answer.text
            if answer.status_code == 200:
                futures.append(answer.json())
        for sent in futures:
            found = http.post("/api/v1/retrieve_future", json=sent, headers=HEADERS).json()
            assert found.get("category", "user") == "user", found
        assert a_run(client, 1)["told"]
