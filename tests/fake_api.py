"""A teacher's API that misbehaves: an OpenAI-compatible chat endpoint with every fault a client must survive.

    python -m tests.fake_api --try 20                                           asks it 20 questions, and ends
    python -m tests.fake_api --data DIR/train.jsonl --port 8123 --faults 0.3    answers until Ctrl-C

It answers with the reference solutions of a file. `paid` counts what a provider would send the bill for: answers that
are whole and sound, and that have been handed to the network to their last byte.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import gzip
import json
import os
import random
import subprocess
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from time import time
from typing import Any
from urllib.parse import quote

from aiohttp import web

REFUSALS = ("429", "429_seconds", "429_date", "500", "503")
BROKEN = ("timeout", "drop", "truncated", "html", "empty_choices", "empty_answer", "drip")
ODD = ("plain_text", "duplicate")  # sound answers with a wrong content type, or twice in one body
FAULTS = (*REFUSALS, *BROKEN, *ODD)


class FakeApi:
    """One endpoint.

    Args:
        answer: prompt → (reasoning_content, content).
        faults: share of requests that meet one of `kinds`.
        delay: seconds that an answer takes.
        hang: seconds that a "timeout" and a "drip" take.
    """

    def __init__(
        self,
        answer: Callable[[str], tuple[str, str]],
        faults: float = 0.0,
        kinds: Collection[str] = FAULTS,
        delay: float = 0.0,
        hang: float = 60.0,
        seed: int = 0,
    ) -> None:
        self.answer, self.faults, self.kinds, self.delay, self.hang = answer, faults, kinds, delay, hang
        self.draw = random.Random(seed)
        self.script: list[str] = []  # faults of the next requests, before any are drawn; "" for none
        self.paid: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.met: Counter[str] = Counter()
        self.running = self.most = 0
        self.bomb, self.location = b"", ""  # of the faults "bomb" and "307"

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.chat)
        return app

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await self._chat(request)
        finally:
            self.running -= 1

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        drawn = self.draw.choice(sorted(self.kinds)) if self.draw.random() < self.faults else ""
        fault = self.script.pop(0) if self.script else drawn
        self.met[fault] += 1
        prompt = body["messages"][-1]["content"]
        await asyncio.sleep(self.delay)
        if fault == "307":
            return web.Response(status=307, headers={"Location": quote(self.location, safe=":/")})
        if fault.startswith("bomb"):
            status = int(fault[5:] or 200)
            return web.Response(body=self.bomb, status=status, headers={"Content-Encoding": "gzip"})
        if fault in ("odd_encoding", "broken_gzip"):
            encoding = "br" if fault == "odd_encoding" else "gzip"
            return web.Response(body=b"\x1f\x8bxxxxxxxxx", headers={"Content-Encoding": encoding})
        if fault in ("gzip", "two_gzips", "deflate"):
            whole = self._body(prompt, "", body["stream"])
            self.paid[prompt] += 1
            parts = [whole[:20], whole[20:]] if fault == "two_gzips" else [whole]
            packed = b"".join(map(zlib.compress if fault == "deflate" else gzip.compress, parts))
            return web.Response(body=packed, headers={"Content-Encoding": "deflate" if fault == "deflate" else "gzip"})
        if fault.isdecimal() or fault in REFUSALS:
            return self._refusal(fault, request)
        if fault == "timeout":
            await asyncio.sleep(self.hang)
        elif fault == "html":
            return web.Response(text="<html>a proxy's page</html>", content_type="text/html")
        raw = self._body(prompt, fault, body["stream"])
        if fault == "truncated":
            return web.Response(body=raw[: len(raw) // 2], content_type="application/json")
        kind = "text/plain" if fault == "plain_text" else "text/event-stream" if body["stream"] else "application/json"
        response = web.StreamResponse(headers={"Content-Type": kind, "Content-Length": str(len(raw))})
        await response.prepare(request)
        if fault == "drop":
            await response.write(raw[: len(raw) // 2])
            assert request.transport
            request.transport.abort()
            return response
        if fault == "drip":
            for i in range(len(raw)):
                await response.write(raw[i : i + 1])
                await asyncio.sleep(self.hang / 20)
        await response.write(raw)
        await response.write_eof()
        if fault not in BROKEN:
            self.paid[prompt] += 1
        return response

    def _refusal(self, fault: str, request: web.Request) -> web.Response:
        status = int(fault[:3])
        headers = {"429_seconds": {"Retry-After": "0"}, "429_date": {"Retry-After": formatdate(time(), usegmt=True)}}
        said = {"error": {"message": f"no: {dict(request.headers)}"}}  # an error that echoes the key
        return web.json_response(said, status=status, headers=headers.get(fault))

    def _body(self, prompt: str, fault: str, stream: bool) -> bytes:
        thought, content = ("", " ") if fault == "empty_answer" else self.answer(prompt)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(thought) + len(content)}
        message = {"role": "assistant", "reasoning_content": thought, "content": content}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        choices *= 0 if fault == "empty_choices" else 2 if fault == "duplicate" else 1
        whole = {"model": "fake", "choices": choices, "usage": usage}
        if not stream:
            return b"\n\n" + json.dumps(whole).encode()  # blank lines keep the connection alive
        return b"".join(self._events(thought, content, choices, usage))

    @staticmethod
    def _events(thought: str, content: str, choices: list[Any], usage: dict[str, int]) -> Iterator[bytes]:
        yield b": keep-alive\n\n"
        for name, text in (("reasoning_content", thought), ("content", content)):
            for start in range(0, len(text), 7):
                delta = {name: text[start : start + 7]}
                said = {"choices": [{"index": c["index"], "delta": delta, "finish_reason": None} for c in choices]}
                yield b"data: " + json.dumps(said).encode() + b"\n\n"
        last = [{"index": 0, "delta": {}, "finish_reason": "stop"}][: len(choices)]
        yield b"data: " + json.dumps({"choices": last, "usage": usage}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"


@contextmanager
def serve(api: FakeApi, port: int = 0) -> Iterator[str]:
    """Run it in a thread; yields its base URL."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(api.app(), shutdown_timeout=0.1, handler_cancellation=True)

    async def start() -> str:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}/v1"

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def answers(rows: Iterable[Mapping[str, str]]) -> Callable[[str], tuple[str, str]]:
    """What a teacher says to the questions of these rows: their reference solutions, with a little thinking first."""
    solutions = {row["question"]: row["answer"] for row in rows}

    def answer(prompt: str) -> tuple[str, str]:
        body, _, gold = solutions[prompt.rpartition("\n\n")[0]].rpartition("####")
        thought = f"Okay, the user wants me to solve this.\n{body}So it is{gold}."
        return thought, f"{body}\n**Final Answer**\n\\boxed{{{gold.strip()}}}"

    return answer


def read_rows(path: str) -> list[dict[str, str]]:
    """The problems of a file, or a few made up on the spot."""
    if path:
        return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [
        {
            "question": f"Ann has {a} apples and buys {b} more. How many has she?",
            "answer": f"{a} + {b} = {a + b}\n#### {a + b}",
        }
        for a in range(2, 12)
        for b in range(3, 13)
    ]


def try_out(rows: Sequence[Mapping[str, str]], faults: float, folder: Path) -> int:
    """Ask a stand-in these questions with the real program, and be done in seconds; returns its exit code."""
    infile, outfile = folder / "questions.jsonl", folder / "traces.jsonl"
    infile.write_text("".join(json.dumps(row) + "\n" for row in rows))
    quick = {"read_timeout": 1, "backoff": 0.05, "backoff_max": 0.5, "max_retries": 20, "concurrency": 8}
    flags = [f"--{name}={value}" for name, value in quick.items()]
    kinds = [kind for kind in FAULTS if kind != "drip"]  # a byte now and then takes a minute, and no deadline ends it
    with serve(FakeApi(answers(rows), faults, kinds, delay=0.02, hang=1.5)) as url:
        flags += [f"--infile={infile}", f"--outfile={outfile}", f"--base_url={url}", "--api_key_env=TRY_OUT_KEY"]
        command = [sys.executable, "-m", "grpo_gsm8k.r1_traces", *flags]
        code = subprocess.run(command, env={**os.environ, "TRY_OUT_KEY": "not-a-secret"}, check=False).returncode
    print(
        f"to go on: grpo-gsm8k pairs --traces {outfile} --out {folder / 'pairs.jsonl'} --model_id MODEL",
        file=sys.stderr,
    )
    return code


def main() -> int:
    """Answer with the reference solutions of a file, until Ctrl-C or until the try-out is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="JSONL of question and answer; some are made up without it")
    parser.add_argument("--port", type=int, default=8123, help="0 for any")
    parser.add_argument("--faults", type=float, default=0.3, help="share of the calls that fail")
    parser.add_argument("--try", type=int, default=0, dest="count", metavar="N", help="ask N questions, and end")
    parser.add_argument("--out", default="artifacts/traces/try", help="where --try writes")
    flags = parser.parse_args()
    rows = read_rows(flags.data)
    if flags.count:
        folder = Path(flags.out)
        if (folder / "traces.jsonl").exists():
            parser.exit(2, f"error: {folder}: holds a try-out already; pass another --out, or remove it\n")
        folder.mkdir(parents=True, exist_ok=True)
        return try_out(rows[: flags.count], flags.faults, folder)
    try:
        with serve(FakeApi(answers(rows), flags.faults, delay=0.05, hang=5.0), flags.port) as url:
            print(url, flush=True)
            threading.Event().wait()
    except OSError as fault:
        if fault.errno != errno.EADDRINUSE:
            raise
        parser.exit(
            2, f"error: port {flags.port} is busy; end what listens there, or pass another --port (0 for any)\n"
        )
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
