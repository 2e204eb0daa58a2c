"""The provider's REST API, version 2, and what each of its answers means for the launcher.

Errors are RFC 9457 problem documents: `{title, status, detail, errors[]}`.

| answer                      | a question, a delete        | the create                                           |
|-----------------------------|-----------------------------|------------------------------------------------------|
| 429                         | wait as it says, ask again  | the same: certainly nothing was made                 |
| 5xx, broken reply, no reply | back off, ask again         | `Unsure`: a pod may have been made                   |
| 400, 403                    | `Refused`                   | `Refused`: the next GPU                              |
| a redirect, 401, 402, 422   | `Hopeless`                  | `Hopeless`: another attempt would fail the same way  |
| 404                         | no such pod                 | `Hopeless`                                           |

The key goes into one header, and is in no message: a reply is blotted before it is quoted.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urljoin

import aiohttp

from grpo_gsm8k.errors import LaunchError
from grpo_gsm8k.launch.settings import api_base, api_key
from grpo_gsm8k.r1_traces import origin, read_body, retry_after
from grpo_gsm8k.runs.clean import one_line

TRIES = 5
LONGEST_WAIT_S = 60.0
MOST_BYTES = 16 << 20  # of a reply
MESSAGE_BYTES = 1 << 16  # of an error
TIMEOUT = aiohttp.ClientTimeout(total=60.0, sock_connect=15.0)
GONE = frozenset({"TERMINATED"})
DEAD = GONE | {"EXITED", "ERROR"}
POD_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
HOST_KEY = re.compile(r"ssh-ed25519 [A-Za-z0-9+/]{68}")


class ApiError(LaunchError):
    """The API did not do what it was asked for."""


class Refused(ApiError):
    """No capacity, or a rule against it: another GPU may do."""


class Hopeless(ApiError):
    """No account, no money, or a request that it does not take."""


class Unsure(ApiError):
    """Nobody knows whether it was done."""


@dataclass(frozen=True)
class Offer:
    """A GPU in the catalog. `price` is dollars an hour for one; `memory` its GiB."""

    gpu: str
    memory: float
    price: float
    availability: str
    most: int


@dataclass(frozen=True)
class Pod:
    """A pod as the API sees it. `rate` is dollars an hour, 0 where it is not said; `ssh` (host, port, user)."""

    id: str
    name: str
    status: str
    rate: float
    ssh: tuple[str, int, str] | None


class Runpod:
    """The client. Make it with `connect`."""

    def __init__(self, session: aiohttp.ClientSession, blot: Callable[[str], str], backoff_s: float) -> None:
        self._session, self._blot, self._backoff_s, self._base = session, blot, backoff_s, api_base()

    async def offers(self, cloud: str, count: int) -> list[Offer]:
        """The catalog with live prices."""
        query = {"include": "AVAILABILITY", "product": "POD", "count": str(count), "cloud": cloud}
        found = await self._ask("GET", "/catalog/gpus", lambda said: _offers(said, cloud.lower()), query=query)
        return [offer for offer in found if offer is not None]

    async def create(self, body: Mapping[str, Any]) -> Pod:
        """Make a pod. Raises `Refused`, `Hopeless` or `Unsure`."""
        made: Pod = await self._ask("POST", "/pods", _pod, body=body, once=True)
        return made

    async def pods(self) -> list[Pod]:
        """Every pod of the account that can still cost something."""
        found = await self._ask("GET", "/pods", lambda said: [_pod(row) for row in said["pods"]])
        return [pod for pod in found if pod.status not in GONE]

    async def pod(self, pod_id: str) -> Pod | None:
        """One pod; None when there is none."""
        found: Pod | None = await self._ask("GET", f"/pods/{pod_id}", lambda said: _pod(said) if said else None)
        return found

    async def delete(self, pod_id: str) -> None:
        """Delete it; one that is gone already is fine."""
        await self._ask("DELETE", f"/pods/{pod_id}", lambda said: None)

    async def host_key(self, pod_id: str, not_this: str) -> str | None:
        """The ssh host key that the container's log shows last; None where it shows none (yet).

        Args:
            not_this: our own public key, which the container may print as well.
        """
        url = f"{self._base}/pods/{pod_id}/logs"
        found, seen = None, 0
        try:
            async with self._session.get(
                url, params={"tail": "500"}, timeout=aiohttp.ClientTimeout(total=10), allow_redirects=False
            ) as reply:
                if reply.status == 200 and not reply.headers.get("Content-Encoding"):
                    async for line in reply.content:  # server-sent events; the stream may stay open
                        for key in HOST_KEY.findall(line.decode("utf-8", "replace")):
                            found = key if key not in not_this else found
                        seen += len(line)
                        if seen > MOST_BYTES:
                            break
        except (aiohttp.ClientError, TimeoutError, ValueError):  # ValueError: a line beyond the reader's limit
            pass
        return found

    async def _ask(
        self,
        method: str,
        path: str,
        read: Callable[[Any], Any],
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        once: bool = False,
    ) -> Any:
        """One request until it is answered; `once`: never sent again after it may have been carried out."""
        what = f"{method} {path}"
        for attempt in range(TRIES):
            wait = self._backoff_s * 2**attempt
            try:
                async with self._session.request(
                    method, self._base + path, json=body, params=query, allow_redirects=False
                ) as reply:
                    status, after = reply.status, reply.headers.get("Retry-After")
                    whole = status < 300
                    raw = (await read_body(reply, MOST_BYTES if whole else MESSAGE_BYTES, cut=not whole)).decode(
                        "utf-8", "replace"
                    )
                    target = origin(urljoin(str(reply.url), reply.headers.get("Location", "")))
                if status < 300:
                    return read(json.loads(raw) if raw.strip() else None)
                if status == 404 and method in ("GET", "DELETE"):
                    return read(None)
                fault = f"{what}: {self._problem(status, raw)}"
                if status < 400:  # the key is for this address alone
                    fault = f"{what}: HTTP {status}: a redirect to {one_line(target)}, which is not followed"
            except (aiohttp.ClientError, TimeoutError) as lost:
                status, fault = 0, f"{what}: {one_line(self._blot(str(lost))) or 'no answer in time'}"
            except (ValueError, LookupError, TypeError, AttributeError):
                status, fault = 0, f"{what}: a reply that cannot be read"
            if status == 429:
                wait = max(wait, min(retry_after(after, datetime.now(UTC)), LONGEST_WAIT_S))
            elif status in (400, 403):
                raise Refused(fault)
            elif 300 <= status < 500:
                raise Hopeless(fault)
            elif once:
                raise Unsure(fault)
            if attempt < TRIES - 1:
                await asyncio.sleep(wait)
        raise ApiError(f"{fault} ({TRIES} attempts)")

    def _problem(self, status: int, raw: str) -> str:
        """A problem document as one line."""
        try:
            said = json.loads(raw)
            parts = [said.get("title"), said.get("detail"), *said.get("errors", [])]
            text = "; ".join(str(part) for part in parts if part)
        except (ValueError, AttributeError, TypeError):
            text = raw
        return f"HTTP {status}: {one_line(self._blot(text))}"


@asynccontextmanager
async def connect(blot: Callable[[str], str], backoff_s: float = 1.0) -> AsyncIterator[Runpod]:
    """A client with the key of the environment."""
    headers = {"Authorization": f"Bearer {api_key()}", "Accept-Encoding": "identity"}
    async with aiohttp.ClientSession(headers=headers, timeout=TIMEOUT, auto_decompress=False) as session:
        yield Runpod(session, blot, backoff_s)


def _pod(said: Mapping[str, Any]) -> Pod:
    direct = (said.get("ssh") or {}).get("direct")
    ssh = (str(direct["host"]), int(direct["port"]), str(direct.get("username") or "root")) if direct else None
    if not POD_ID.fullmatch(str(said["id"])):
        raise ValueError("no id of a pod")  # it becomes part of an address
    name, status = one_line(str(said["name"])), one_line(str(said["status"]))
    return Pod(str(said["id"]), name, status, _number(said.get("cost")) or 0.0, ssh)


def _offers(said: Any, cloud: str) -> list[Offer | None]:
    rows = said["gpus"] if isinstance(said, dict) else said
    return [_offer(row, cloud) for row in rows]


def _offer(row: Mapping[str, Any], cloud: str) -> Offer | None:
    price = _number(row["price"].get(cloud))
    if price is None:
        return None  # not to be had in this cloud
    most = row.get("maxCount") or {}
    most = most.get(cloud) if isinstance(most, dict) else most
    return Offer(str(row["id"]), float(row["memory"]), price, str(row.get("availability") or "NONE"), int(most or 8))


def _number(value: Any) -> float | None:
    """None for what is no number, or one that no price is."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9
    return float(value) if known else None
