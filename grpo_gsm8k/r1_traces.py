"""Stage 2: teacher traces over HTTP, every paid answer kept exactly once.

Runs by itself, with the standard library and aiohttp alone; any OpenAI-compatible endpoint will do:

    python grpo_gsm8k/r1_traces.py --infile train.jsonl --outfile traces.jsonl --offpeak 0.25 --limit 5
    grpo-gsm8k traces --base_url http://localhost:8000/v1 --model NAME --api_key_env MY_KEY --budget 20

Four files, the first three of them append-only, each of their lines synced before anything else happens:

    traces.jsonl            an answer a line: id, sample, question, answer (the reference), reasoning_content,
                            content, finish_reason, usage, cost in dollars
    traces.failures.jsonl   id, sample and reason of what was given up; `--retry-failed` asks these alone
    traces.calls.jsonl      the ledger: a line before each call, with its cost at most, and one when it has ended
    traces.manifest.json    input hash, model, parameters, counts, tokens, cost

The order of one call: its ledger line is synced, the request is sent, the answer's line is synced, the ledger line is
closed. A line that a kill has torn is cut off by the next start, or completed where only its newline is missing. So
what is recorded is never asked again. Asked again, and perhaps billed twice, is what was in flight at a kill: sent,
with its answer not yet on disk. An answer that arrives broken (cut off, no JSON, beyond a deadline) is asked again,
too. `--budget` counts both at the most that they can have cost, over all starts with the same outfile.

The key comes from the environment, goes into one header, and is blotted out of everything that is written or said
(one of less than 16 characters is taken for a placeholder).

Simplified: the lines are synced on the event loop, which costs milliseconds where a call takes seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import random
import secrets
import signal
import stat
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urljoin, urlsplit

import aiohttp

T = TypeVar("T")
Key = tuple[str, int]  # problem id, sample

SECRET_LENGTH = 16
PROMPT_OVERHEAD = 256  # tokens that a chat template may add to a prompt
HOPELESS = {
    401: "the key is not accepted; check {env}",
    402: "the account has no balance left",
    403: "the key may not do this; check {env} and --model",
    404: "no such endpoint or model; check --base_url and --model",
}
LEAST_BYTES, TOKEN_BYTES, MOST_BYTES = 4 << 20, 1 << 10, 256 << 20  # of an answer: some, for each token, and at most
MESSAGE_BYTES = 1 << 16  # of an error
METAVARS = {int: "INTEGER", float: "FLOAT", str: "TEXT"}
LINE_EVERY_S, TICK_S = 20.0, 0.5  # between two lines where there is no terminal; between two looks at the clock
RETRIED = frozenset({408, 409, 425, 429})  # and everything from 500 on


def flag(default: T, help: str) -> T:
    """A setting with its help; its name is the flag's."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """What can be asked for. Prices are DeepSeek-R1's list prices; give your provider's."""

    infile: str = flag("artifacts/data/train.jsonl", "problems: a `question` (or `prompt`) a line")
    outfile: str = flag("artifacts/traces/traces.jsonl", "where the answers go; continued if it is there")
    base_url: str = flag("https://api.deepseek.com", "of an OpenAI-compatible API")
    model: str = flag("deepseek-reasoner", "the teacher")
    api_key_env: str = flag("DEEPSEEK_API_KEY", "environment variable that holds the key")
    instruction: str = flag(
        "Please reason step by step, and put your final answer within \\boxed{}.", "follows each question"
    )
    limit: int = flag(0, "only the first so many problems; 0 for all")
    samples_per_prompt: int = flag(1, "answers per problem")
    max_tokens: int = flag(4096, "longest answer, reasoning included")
    temperature: float = flag(1.0, "sampling temperature; reasoning models may ignore it")
    stream: bool = flag(False, "have the answer sent as it is written")
    concurrency: int = flag(4, "most calls at once; halved by each burst of 429, then raised again")
    max_retries: int = flag(5, "further attempts at a problem before it is given up")
    backoff: float = flag(1.0, "seconds: attempt n waits a random time up to backoff * 2^n")
    backoff_max: float = flag(60.0, "longest of these waits; Retry-After goes before it")
    timeout: float = flag(1800.0, "seconds that a whole call may take")
    connect_timeout: float = flag(15.0, "seconds until a connection stands")
    read_timeout: float = flag(120.0, "seconds without a byte; keep-alive lines count as bytes")
    retry_failed: bool = flag(False, "ask those that failed before, and no others")
    budget: float = flag(0.0, "dollars that this outfile may cost in all; 0 for no limit")
    price_in: float = flag(0.55, "dollars per million prompt tokens")
    price_cached: float = flag(0.14, "dollars per million prompt tokens that the API had cached")
    price_out: float = flag(2.19, "dollars per million completion tokens")
    offpeak: float = flag(1.0, "factor on all prices; 0.25 in hours with 75 % off")
    json: bool = flag(False, "print one JSON object on stdout")

    def asked(self) -> dict[str, Any]:
        """What an answer depends on besides its problem: the same for every answer in a file."""
        names = ("base_url", "model", "instruction", "max_tokens", "temperature")
        return {name: getattr(self, name) for name in names}

    def cost(self, prompt: int, cached: int, completion: int) -> float:
        """Dollars of one call, from its tokens; `cached` of the prompt's are at the lower price."""
        per_million = (prompt - cached) * self.price_in + cached * self.price_cached + completion * self.price_out
        return per_million * self.offpeak / 1e6


class MistakeError(Exception):
    """Something that the user can mend: one line, exit code 2."""


class CallError(Exception):
    """A call without an answer.

    Args:
        reason: for people.
        again: another attempt may help.
        free: certainly not billed.
        wait: seconds that the API asks everyone to wait.
        throttled: it asks for fewer calls at once.
    """

    def __init__(
        self, reason: str, *, again: bool = True, free: bool = False, wait: float = 0.0, throttled: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason, self.again, self.free, self.wait, self.throttled = reason, again, free, wait, throttled


# ------------------------------------------------------------------------------------------------ what is said


def parse_answer(raw: bytes) -> dict[str, Any]:
    """The answer in a response's body, sent whole or as a stream of events, whatever its content type claims.

    Returns:
        reasoning_content, content, finish_reason, usage (as the API gave it, or None) and model.

    Raises:
        ValueError: there is no whole answer in it; says why.
    """
    try:
        body = json.loads(raw) if raw.lstrip()[:1] == b"{" else _join_events(raw)
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content = message.get("content") or ""
        thought = message.get("reasoning_content") or message.get("reasoning") or ""  # vLLM has the shorter name
        texts = content.strip(), thought.strip()
    except (LookupError, TypeError, AttributeError):
        raise ValueError("no choices in it") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not any(texts):
        raise ValueError("an empty answer")
    if not isinstance(finish, str) or finish == "insufficient_system_resource":
        raise ValueError(f"broken off with finish_reason {finish!r}")
    return {
        "reasoning_content": thought,
        "content": content,
        "finish_reason": finish,
        "usage": body.get("usage"),
        "model": body.get("model"),
    }


def _join_events(raw: bytes) -> dict[str, Any]:
    """A stream of server-sent events as the one object that would have come without streaming."""
    message: dict[str, str] = {"content": "", "reasoning_content": ""}
    finish, usage, model = None, None, None
    for line in raw.splitlines():
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue  # comments keep the connection alive
        event = json.loads(data)
        usage, model = event.get("usage") or usage, event.get("model") or model
        for choice in event["choices"][:1]:
            for name, alias in (("content", "content"), ("reasoning_content", "reasoning")):
                message[name] += choice["delta"].get(name) or choice["delta"].get(alias) or ""
            finish = choice.get("finish_reason") or finish
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage, "model": model}


def token_counts(usage: Any) -> tuple[int, int, int] | None:
    """Prompt, cached prompt and completion tokens; None where the API did not say."""
    if not isinstance(usage, dict):
        return None
    found = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    cached = usage.get("prompt_cache_hit_tokens") or 0
    if not all(type(n) is int and n >= 0 for n in (*found, cached)):
        return None
    prompt, completion = found
    return prompt, min(cached, prompt), completion  # type: ignore[type-var, return-value]  # checked just above


async def read_body(response: aiohttp.ClientResponse, most: int, cut: bool = False) -> bytes:
    """The body, of which no more than `most` bytes are ever held; its session has `auto_decompress=False`.

    A megabyte of gzip can hold a gigabyte: it is unpacked piece by piece, up to the limit.

    Args:
        cut: return the beginning of a longer body.

    Raises:
        ValueError: it is longer, broken, or in an encoding that was not asked for.
    """
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "gzip", "x-gzip", "deflate"):
        raise ValueError(f"a body in the encoding {encoding[:20]!r}, which was not asked for")
    packed, body = encoding not in ("identity", ""), bytearray()
    unpacker = zlib.decompressobj(wbits=47)  # gzip or zlib
    async for piece in response.content.iter_chunked(1 << 16):
        while piece and len(body) <= most:
            if not packed:
                body, piece = body + piece, b""
                continue
            try:
                body += unpacker.decompress(piece, most + 1 - len(body))
            except zlib.error:
                raise ValueError("a broken gzip body") from None
            piece = unpacker.unconsumed_tail
            if unpacker.eof:  # another member may follow
                piece, unpacker = unpacker.unused_data, zlib.decompressobj(wbits=47)
        if len(body) > most:
            if cut:
                break
            raise ValueError(f"a body of more than {most} bytes")
    return bytes(body[:most])


def origin(url: str) -> str:
    """Scheme, host and port, for a message; "" for what is no URL."""
    try:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}" if parts.hostname else ""
    except ValueError:
        return ""


def printable(text: str) -> str:
    """One line of it: a terminal must not obey what an API has sent."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def retry_after(value: str | None, now: datetime) -> float:
    """Seconds to wait, from a Retry-After header in either form (RFC 9110, 10.2.3); 0 where it says nothing."""
    if not value:
        return 0.0
    if value.strip().isdecimal():
        return float(value)
    try:
        then = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - now).total_seconds())


def read_prompts(path: Path) -> list[dict[str, str]]:
    """id, question and (where there is one) answer of each problem; a row without an id gets its question's hash."""
    found: dict[str, dict[str, str]] = {}
    if path.is_char_device():  # /dev/zero never ends
        raise MistakeError(f"{path}: is a device, not a file")
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            try:
                row = json.loads(line)
                question = row["question"] if "question" in row else row["prompt"]
                gold = str(row.get("gold", ""))
                answer = row.get("answer", f"#### {gold}" if gold and "####" not in gold else gold)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise MistakeError(f"{path}:{number}: not a JSON object with a question or a prompt") from None
            if not isinstance(question, str) or not question.strip() or not isinstance(answer, str):
                raise MistakeError(f"{path}:{number}: question and answer must be text")
            id_ = str(row.get("id") or hashlib.sha256(question.encode()).hexdigest()[:12])
            if id_ in found:
                raise MistakeError(f"{path}:{number}: {id_!r} stands in an earlier line already")
            found[id_] = {"id": id_, "question": question} | ({"answer": answer} if answer else {})
    return list(found.values())


# --------------------------------------------------------------------------------------------- what is written


class Log:
    """An append-only file of JSON lines. What `add` has returned from is on the disk."""

    def __init__(self, path: Path, redact: Redact) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._redact = path, redact
        self._handle = open_log(path)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MistakeError(f"{path}: another process is writing it") from None
        sync_folder(path.parent)
        self.close = self._handle.close

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row so far; then the file ends with a whole line, whatever a kill has left at its end."""
        self._handle.seek(0)
        whole = 0
        for number, line in enumerate(self._handle, 1):
            torn = not line.endswith(b"\n")
            try:
                row = json.loads(line)
            except ValueError:
                if torn:
                    break
                raise MistakeError(f"{self.path}:{number}: not JSON; mend the line or remove it") from None
            yield row
            whole += len(line)
            if torn:  # no object ends before its last brace: only the newline is missing
                self._write(b"\n")
                whole += 1
                break
        os.ftruncate(self._handle.fileno(), whole)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row and sync it. Half a surrogate pair becomes a question mark: an answer is never refused."""
        self._write((self._redact(json.dumps(row, ensure_ascii=False)) + "\n").encode("utf-8", "replace"))

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._handle.fileno(), rest) :]
        os.fsync(self._handle.fileno())


class Redact:
    """Blots the key out of a text."""

    def __init__(self, secret: str) -> None:
        self._secret = secret if len(secret) >= SECRET_LENGTH else None

    def __call__(self, text: str) -> str:
        return text.replace(self._secret, "[key]") if self._secret else text


def sync_folder(folder: Path) -> None:
    """Make new and renamed entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, obj: Mapping[str, Any]) -> None:
    """Replace a file as a whole, or not at all."""
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}-{path.name}")
    try:
        with temporary.open("x", encoding="utf-8") as handle:  # never somebody else's file, or behind a link
            handle.write(json.dumps(obj, indent=2, ensure_ascii=False) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def open_log(path: Path) -> IO[bytes]:
    """Open a file to append to. A FIFO of that name, which would be waited for for ever, is a `MistakeError`."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise MistakeError(f"{path}: is no regular file; pick another --outfile")
    return os.fdopen(descriptor, "a+b")


class Ledger:
    """Every call and its cost in dollars, over all starts."""

    def __init__(self, log: Log) -> None:
        self._log, self._open, self.cost, self._last = log, dict[int, float](), 0.0, 0
        for row in log.rows():
            self._last = max(self._last, row["call"])  # calls do not end in the order in which they began
            if "at_most" in row:
                self._open[row["call"]] = row["at_most"]
            else:
                self._close(row["call"], row["cost"])

    @property
    def at_most(self) -> float:
        """What has been billed if every call without an end has cost what it could."""
        return self.cost + sum(self._open.values())

    def begin(self, key: Key, at_most: float) -> int:
        """Note a call before it is sent."""
        self._last += 1
        self._log.add({"call": self._last, "id": key[0], "sample": key[1], "at_most": at_most})
        self._open[self._last] = at_most
        return self._last

    def end(self, call: int, cost: float) -> None:
        """Note what it has cost."""
        self._log.add({"call": call, "cost": cost})
        self._close(call, cost)

    def _close(self, call: int, cost: float) -> None:
        self._open.pop(call, None)
        self.cost += cost


# ------------------------------------------------------------------------------------------------- who decides


class Gate:
    """How many calls may run at once: additive increase, multiplicative decrease (Chiu and Jain 1989)."""

    def __init__(self, most: int) -> None:
        self.most, self.limit, self.running = most, float(most), 0
        self.resume_at = self._cut_at = 0.0

    def succeeded(self) -> None:
        """An answer: one more call at once for each round of them."""
        self.limit = min(self.most, self.limit + 1 / self.limit)

    def throttled(self, started: float, now: float) -> None:
        """A 429: half as many, once for all the calls that were under way."""
        if started >= self._cut_at:
            self.limit, self._cut_at = max(1.0, self.limit / 2), now

    def open(self, now: float) -> bool:
        """Whether a call may start."""
        return now >= self.resume_at and self.running < int(self.limit)


class ProgressLine:
    """One line on stderr, rewritten on a terminal, said now and then elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._every = 0.2 if self._terminal else LINE_EVERY_S
        self._next = time.monotonic() + (0 if self._terminal else self._every)

    def show(self, text: str, last: bool = False) -> None:
        """Show it if it is time to."""
        if last or time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every
            end = "\n" if last or not self._terminal else ""
            print(f"\r\x1b[K{text}" if self._terminal else text, end=end, file=sys.stderr, flush=True)


class Collector:
    """Asks what is still to be asked, and writes down what comes back."""

    def __init__(self, cfg: Settings, key: str, files: contextlib.ExitStack) -> None:
        self.cfg, self._key, self._redact = cfg, key, Redact(key)
        source, self.outfile = Path(cfg.infile), Path(cfg.outfile)
        self.prompts = read_prompts(source)[: cfg.limit or None]
        self.keys = [(row["id"], sample) for sample in range(cfg.samples_per_prompt) for row in self.prompts]
        self.asked = {"input_sha256": hashlib.sha256(source.read_bytes()).hexdigest(), **cfg.asked()}
        self.manifest, self.failures = self._beside("manifest.json"), self._beside("failures.jsonl")
        self._answers, self._failures, calls = (
            files.enter_context(contextlib.closing(Log(path, self._redact)))
            for path in (self.outfile, self.failures, self._beside("calls.jsonl"))
        )
        self._claim()
        self.tokens = {"prompt": 0, "completion": 0}
        self.done: set[Key] = {self._count(row) for row in self._answers.rows()}
        self.failed = {(row["id"], row["sample"]) for row in self._failures.rows()} - self.done
        self.ledger = Ledger(calls)
        self.gate, self.line = Gate(cfg.concurrency), ProgressLine()
        self.stopped, self._hopeless, self._changed = "", False, asyncio.Event()
        self._began, self._before = time.monotonic(), len(self.done)

    def _beside(self, suffix: str) -> Path:
        return self.outfile.with_name(f"{self.outfile.stem}.{suffix}")

    def _claim(self) -> None:
        """Begin an outfile, or make sure that this one was begun with the same question."""
        if self.manifest.is_file() and self.outfile.stat().st_size:
            before = json.loads(self.manifest.read_text(encoding="utf-8"))["asked"]
            changed = [f"{k}: {before.get(k)!r} then, {v!r} now" for k, v in self.asked.items() if before.get(k) != v]
            if changed:
                raise MistakeError(
                    f"{self.outfile}: was begun otherwise ({'; '.join(changed)}); pick another --outfile"
                )
        elif self.outfile.stat().st_size:
            raise MistakeError(f"{self.outfile}: holds rows that are not from here; pick another --outfile")
        else:  # nothing is recorded yet, so that another endpoint may be asked than the one that refused
            if self.manifest.is_file() and json.loads(self.manifest.read_text("utf-8")).get("asked") != self.asked:
                os.truncate(self.failures, 0)
            write_json(self.manifest, {"asked": self.asked})

    def _count(self, row: Mapping[str, Any]) -> Key:
        prompt, _, completion = token_counts(row["usage"]) or (0, 0, 0)
        self.tokens["prompt"] += prompt
        self.tokens["completion"] += completion
        return row["id"], row["sample"]

    # -------------------------------------------------------------------------------------------- the run

    async def run(self) -> dict[str, Any]:
        """Ask until nothing is left, the budget is used up or a signal arrives; return the manifest's summary."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled, number, loop)
        cfg, jobs = self.cfg, iter(self._jobs())
        timeout = aiohttp.ClientTimeout(cfg.timeout, sock_connect=cfg.connect_timeout, sock_read=cfg.read_timeout)
        headers = {"Authorization": f"Bearer {self._key}", "Accept-Encoding": "gzip, deflate"}
        connector = aiohttp.TCPConnector(limit=0)  # the gate decides
        async with aiohttp.ClientSession(
            headers=headers, timeout=timeout, connector=connector, auto_decompress=False
        ) as session:
            ticker = asyncio.create_task(self._tick())
            try:
                await asyncio.gather(*(self._work(session, jobs) for _ in range(cfg.concurrency)))
            finally:
                ticker.cancel()
        self.line.show(self._status(), last=True)
        summary = self._summary()
        if self._hopeless:
            raise MistakeError(self.stopped)
        return summary

    async def _tick(self) -> None:
        """Say how far it is while every call takes its time."""
        while True:
            await asyncio.sleep(TICK_S)
            self.line.show(self._status())

    def _jobs(self) -> list[tuple[Key, dict[str, str]]]:
        rows = {row["id"]: row for row in self.prompts}
        wanted = self.failed if self.cfg.retry_failed else set(self.keys) - self.failed - self.done
        return [(key, rows[key[0]]) for key in self.keys if key in wanted]

    async def _work(self, session: aiohttp.ClientSession, jobs: Iterator[tuple[Key, dict[str, str]]]) -> None:
        for key, row in jobs:  # shared by all workers
            await self._ask(session, key, row)
            self.line.show(self._status())
            if self.stopped:
                return

    async def _ask(self, session: aiohttp.ClientSession, key: Key, row: Mapping[str, str]) -> None:
        """One problem until it is answered, given up, or the run stops."""
        body = self._request(row["question"])
        size = len(body["messages"][0]["content"].encode())  # no tokenizer makes more tokens than there are bytes
        at_most = self.cfg.cost(size + PROMPT_OVERHEAD, 0, self.cfg.max_tokens)
        for attempt in range(self.cfg.max_retries + 1):
            if not await self._enter(at_most):
                return
            call, started = self.ledger.begin(key, at_most), time.monotonic()
            try:
                answer = await self._call(session, body)
            except CallError as fault:
                self.ledger.end(call, 0.0 if fault.free else at_most)
                if self.stopped:
                    return
                if not fault.again or attempt == self.cfg.max_retries:
                    self._give_up(key, fault, attempt + 1)
                    return
                self._slow_down(fault, started)
                wait = max(fault.wait, random.uniform(0, min(self.cfg.backoff_max, self.cfg.backoff * 2**attempt)))
            else:
                self._keep(key, row, answer, call, at_most, time.monotonic() - started)
                return
            finally:
                self.gate.running -= 1
                self._notify()
            await self._wait(wait)

    async def _enter(self, at_most: float) -> bool:
        """Wait for a slot, for the end of a pause, and for room in the budget; False when the run stops."""
        budget = self.cfg.budget
        while not self.stopped:
            now = time.monotonic()
            if self.gate.open(now):
                if not budget or self.ledger.at_most + at_most <= budget:
                    self.gate.running += 1
                    return True
                if not self.gate.running:  # nothing under way that could turn out cheaper than feared
                    self._stop(f"the budget of ${budget:g} has no room for another call")
                    break
            pause = self.gate.resume_at - now
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), pause if pause > 0 else None)
        return False

    async def _wait(self, seconds: float) -> None:
        """Sleep, but not while the run is stopping."""
        until = time.monotonic() + seconds
        while not self.stopped and (left := until - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _stop(self, why: str) -> None:
        self.stopped = self.stopped or why
        self._notify()

    def _signalled(self, number: signal.Signals, loop: asyncio.AbstractEventLoop) -> None:
        self._stop(number.name)
        print(f"\n{number.name}: waiting for {self.gate.running} calls; once more to drop them", file=sys.stderr)
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(each)

    # ------------------------------------------------------------------------------------------- one call

    def _request(self, question: str) -> dict[str, Any]:
        cfg = self.cfg
        content = f"{question}\n\n{cfg.instruction}" if cfg.instruction else question
        body = {"model": cfg.model, "messages": [{"role": "user", "content": content}], "stream": cfg.stream}
        body |= {"max_tokens": cfg.max_tokens, "temperature": cfg.temperature}
        return body | ({"stream_options": {"include_usage": True}} if cfg.stream else {})

    async def _call(self, session: aiohttp.ClientSession, body: Mapping[str, Any]) -> dict[str, Any]:
        """One request, one answer. Raises `CallError`."""
        url = self.cfg.base_url.rstrip("/") + "/chat/completions"
        try:
            async with session.post(url, json=body, allow_redirects=False) as response:
                most = min(MOST_BYTES, LEAST_BYTES + TOKEN_BYTES * self.cfg.max_tokens)
                good = response.status == 200
                raw = await read_body(response, most if good else MESSAGE_BYTES, cut=not good)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as fault:
            raise CallError(f"no connection: {self._said(str(fault))}", free=True) from None
        except (aiohttp.ClientError, TimeoutError) as fault:  # an error's repr may hold the headers: never shown
            raise CallError(f"{type(fault).__name__}: {self._said(str(fault)) or 'past its deadline'}") from None
        except ValueError as fault:
            raise CallError(f"unusable answer: {fault}") from None
        if response.status == 200:
            try:
                return parse_answer(raw)
            except ValueError as fault:
                raise CallError(f"unusable answer: {fault}: {self._said(raw)}") from None
        if 300 <= response.status < 400:
            self._redirected(response)
        raise self._refusal(response.status, response.headers.get("Retry-After"), raw)

    def _redirected(self, response: aiohttp.ClientResponse) -> None:
        """The key goes where --base_url says and nowhere else, so every other call would end the same way."""
        target = origin(urljoin(str(response.url), response.headers.get("Location", "")))
        self._hopeless = True
        self._stop(f"HTTP {response.status}: a redirect to {self._said(target)} is not followed; check --base_url")

    def _refusal(self, status: int, after: str | None, raw: bytes) -> CallError:
        reason = f"HTTP {status}: {self._said(raw)}"
        if status in HOPELESS:
            self._hopeless = True
            self._stop(f"{reason} ({HOPELESS[status].format(env=self.cfg.api_key_env)})")
        again = status in RETRIED or status >= 500
        wait = retry_after(after, datetime.now(UTC)) if again else 0.0
        return CallError(reason, again=again, free=True, wait=wait, throttled=status == 429)

    def _said(self, raw: bytes | str) -> str:
        """The beginning of what came back, on one line, the key blotted out before anything is cut."""
        text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
        return printable(self._redact(text))[:200]

    # ---------------------------------------------------------------------------------------- what follows

    def _keep(
        self, key: Key, row: Mapping[str, str], answer: Mapping[str, Any], call: int, at_most: float, seconds: float
    ) -> None:
        counts = token_counts(answer["usage"])
        cost = self.cfg.cost(*counts) if counts else at_most
        said = {**answer, "cost": cost, "seconds": round(seconds, 3), "created": f"{datetime.now(UTC):%FT%TZ}"}
        record = {"id": key[0], "sample": key[1], **row, **said}
        self._answers.add(record)
        self.ledger.end(call, cost)
        self.done.add(self._count(record))
        self.failed.discard(key)
        self.gate.succeeded()

    def _give_up(self, key: Key, fault: CallError, attempts: int) -> None:
        self._failures.add({"id": key[0], "sample": key[1], "reason": fault.reason, "attempts": attempts})
        self.failed.add(key)

    def _slow_down(self, fault: CallError, started: float) -> None:
        now = time.monotonic()
        if fault.throttled:
            self.gate.throttled(started, now)
        self.gate.resume_at = max(self.gate.resume_at, now + fault.wait)

    def _status(self) -> str:
        new, seconds = len(self.done) - self._before, time.monotonic() - self._began
        millions = sum(self.tokens.values()) / 1e6
        return (
            f"traces {len(self.done)}/{len(self.keys)}, {len(self.failed)} failed, "
            f"{self.gate.running} of {int(self.gate.limit)} calls, {millions:.3f} M tokens, "
            f"${self.ledger.cost:.4f}, {new / max(seconds, 1e-9):.2f}/s"
        )

    def _summary(self) -> dict[str, Any]:
        """Counts over the problems that were asked for; the manifest gets the same."""
        keys = set(self.keys)
        summary = {
            "written": len(self.done) - self._before,
            "records": len(self.done),
            "failed": len(self.failed & keys),
            "left": len(keys - self.done - self.failed),
            "stopped": self.stopped or None,
            "tokens": dict(self.tokens),
            "cost": round(self.ledger.cost, 6),
            "cost_at_most": round(self.ledger.at_most, 6),
            "seconds": round(time.monotonic() - self._began, 3),
        }
        names = ("price_in", "price_cached", "price_out", "offpeak")
        prices = {name: getattr(self.cfg, name) for name in names}
        parts = {"asked": self.asked, "infile": self.cfg.infile, "prompts": len(self.prompts), "prices": prices}
        write_json(self.manifest, {**parts, **summary, "finished": f"{datetime.now(UTC):%FT%TZ}"})
        files = {"outfile": self.outfile, "failures": self.failures, "manifest": self.manifest}
        return {**summary, **{name: str(path) for name, path in files.items()}}


# --------------------------------------------------------------------------------------------------- the door


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise MistakeError(message)


def parse_flags(argv: Sequence[str]) -> Settings:
    """Settings from flags, `-` and `_` alike."""
    parser = _Parser(prog="traces", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    for item in fields(Settings):
        name, text = f"--{item.name}", item.metadata["help"].replace("%", "%%")
        if isinstance(item.default, bool):
            parser.add_argument(name, action="store_true", help=text)
        else:
            shown = "" if item.name == "instruction" else f" [default: {item.default}]"
            kind, metavar = type(item.default), METAVARS[type(item.default)]
            parser.add_argument(name, type=kind, default=item.default, metavar=metavar, help=text + shown)
    given = []
    for word in argv:
        head, equals, tail = word.partition("=")
        given.append((f"--{head[2:].replace('-', '_')}" if word.startswith("--") else head) + equals + tail)
    known, unknown = parser.parse_known_args(given)
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], [f"--{f.name}" for f in fields(Settings)], n=1)
        raise MistakeError(f"no such flag: {unknown[0]}" + (f" (did you mean {near[0]}?)" if near else ""))
    cfg = Settings(**vars(known))
    for name in ("concurrency", "samples_per_prompt", "max_tokens", "timeout", "connect_timeout", "read_timeout"):
        if not getattr(cfg, name) > 0:
            raise MistakeError(f"--{name} must be above 0")
    for item in fields(Settings):
        if isinstance(item.default, int | float) and not 0 <= getattr(cfg, item.name) < float("inf"):
            raise MistakeError(f"--{item.name} must not be negative")
    parts = urlsplit(cfg.base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise MistakeError("--base_url must read https://host/path, without a user or password in it")
    return cfg


def api_key(name: str) -> str:
    """The key, from the environment and nowhere else."""
    key = os.environ.get(name, "").strip()
    if not key:
        raise MistakeError(f"the environment variable {name} holds no API key; set it (or name another: --api_key_env)")
    if not key.isascii() or not key.isprintable() or set(key) & set(' "\\'):
        raise MistakeError(f"the environment variable {name} holds characters that no API key has")
    return key


async def collect(cfg: Settings) -> dict[str, Any]:
    """Run to the end; return what the command prints."""
    with contextlib.ExitStack() as files:
        return await Collector(cfg, api_key(cfg.api_key_env), files).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 done or stopped by the budget, 1 something failed, 2 a mistake, 130 or 143 after a signal."""
    try:
        cfg = parse_flags(sys.argv[1:] if argv is None else argv)
        result = asyncio.run(collect(cfg))
    except MistakeError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except OSError as fault:
        print(f"error: {fault.filename or 'the disk'}: {fault.strerror}; what was recorded is kept", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was recorded is kept, the same command continues", file=sys.stderr)
        return 130
    if cfg.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name}: {value}" for name, value in result.items()))
    if result["stopped"] in ("SIGINT", "SIGTERM"):
        return 128 + signal.Signals[result["stopped"]]
    if result["failed"]:
        print(f"{result['failed']} failed, see {result['failures']}; ask them with --retry-failed", file=sys.stderr)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
