"""Progress events to a URL: queued, retried, signed, and never in the way of the run.

An event is `{event, message, timestamp, stage, project, repo_id}` and, where they are known, `step, reward, accuracy,
cost`, and the end of the log as `tail`. `stage` is setup, train, fetch or end. With a secret,
`X-Grpo-Gsm8k-Signature: sha256=<hex>` is the HMAC-SHA256 of the body.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import aiohttp

from grpo_gsm8k.launch.records import PROJECT

WAITING = 64  # events; when more wait, the oldest is dropped
TRIES = 4
TIMEOUT = aiohttp.ClientTimeout(total=10.0)
CLOSE_S = 15.0

FORMS: dict[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
    "plain": lambda event: event,
    "discord": lambda event: {"content": _text(event, 2000), "allowed_mentions": {"parse": []}},
    "slack": lambda event: {"text": _text(event, 3000)},
}


class Webhook:
    """A queue and the task that empties it. Without a URL it does nothing."""

    def __init__(self, url: str, form: str, secret: str, repo_id: str, backoff_s: float, close_s: float = CLOSE_S):
        self._url, self._form, self._secret, self._repo_id = url, form, secret, repo_id
        self._backoff_s, self._close_s = backoff_s, close_s
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(WAITING)
        self._task: asyncio.Task[None] | None = None
        self.dropped, self.fault = 0, "they were too many, or too slow"

    def tell(self, event: str, message: str, stage: str, **known: float | str) -> None:
        """Queue an event; returns at once."""
        if not self._url:
            return
        stamp = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        said = {"event": event, "message": message, "timestamp": stamp, "stage": stage}
        said |= {"project": PROJECT, "repo_id": self._repo_id}
        if self._queue.full():
            self._queue.get_nowait()
            self._queue.task_done()
            self.dropped += 1
        self._queue.put_nowait(json.dumps(FORMS[self._form](said | known)).encode())
        self._task = self._task or asyncio.create_task(self._deliver())

    async def close(self) -> None:
        """Give the last events a moment, then stop."""
        if self._task:
            try:
                await asyncio.wait_for(self._queue.join(), self._close_s)
            except TimeoutError:
                self.dropped += self._queue.qsize()
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _deliver(self) -> None:
        async with aiohttp.ClientSession(timeout=TIMEOUT, auto_decompress=False) as session:  # replies are not read
            while True:
                body = await self._queue.get()
                if not await self._send(session, body):
                    self.dropped += 1
                self._queue.task_done()

    async def _send(self, session: aiohttp.ClientSession, body: bytes) -> bool:
        headers = {"Content-Type": "application/json"}
        if self._secret:
            digest = hmac.new(self._secret.encode(), body, hashlib.sha256).hexdigest()
            headers["X-Grpo-Gsm8k-Signature"] = f"sha256={digest}"
        for attempt in range(TRIES):
            try:
                async with session.post(self._url, data=body, headers=headers, allow_redirects=False) as reply:
                    if reply.status < 300:
                        return True
                    self.fault = f"HTTP {reply.status}"
                    if reply.status < 400:
                        self.fault += ": a redirect, which is not followed"
                    if reply.status < 500 and reply.status != 429:
                        return False
            except (aiohttp.ClientError, TimeoutError, ValueError) as fault:  # ValueError: no URL at all
                self.fault = type(fault).__name__  # its text may hold the URL, which is a secret
            await asyncio.sleep(self._backoff_s * 2**attempt)
        return False


def _text(event: Mapping[str, Any], most: int) -> str:
    """The event's line, and as much of the log's end below it as there is room for."""
    line, tail = _line(event)[:most], str(event.get("tail", "")).strip().replace("```", "'''")
    room = most - len(line) - len("\n```\n\n```")
    return f"{line}\n```\n{tail[-room:]}\n```" if tail and room > 0 else line


def _line(event: Mapping[str, Any]) -> str:
    figures = [f"{key} {event[key]:.4g}" for key in ("step", "reward", "accuracy", "cost") if key in event]
    where = event["repo_id"] or event["project"]
    return " · ".join([f"[{event['stage']}] {event['message']}", *figures, where])
