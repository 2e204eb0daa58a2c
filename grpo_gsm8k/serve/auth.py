"""Who may come in: one key, compared in constant time; signed links for downloads; and how often."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import time
from pathlib import Path
from typing import Any

from fastapi import Request

from grpo_gsm8k.errors import CheckpointError, ConfigError
from grpo_gsm8k.runs.files import atomic_path, read_json
from grpo_gsm8k.serve.jobs import Refusal

PREFIX = "tml-"  # clients of the Tinker wire refuse other keys before they send anything
FILE = "key.json"
LINK_S = 3600.0


class Keeper:
    """Knows the key's hash, never the key."""

    def __init__(self, digest: str, secret: str, rate: int = 0) -> None:
        """`secret` signs links; `rate`: requests a second, 0 for no limit."""
        self.digest, self.secret, self.rate = digest, secret.encode(), rate
        self._left, self._at = float(rate), time.monotonic()

    def check(self, request: Request) -> None:
        """Raise `Refusal` 401 unless the request bears the key, in whichever header."""
        given = key_of(request)
        if not given:
            raise Refusal("no key: send it as X-API-Key, api-key, or Authorization: Bearer", 401)
        if not hmac.compare_digest(hash_of(given), self.digest):
            raise Refusal("this key is not the server's", 401)

    def take_turn(self) -> None:
        """Raise `Refusal` 429 where requests come faster than `rate`; twice as many may come at once."""
        if not self.rate:
            return
        now = time.monotonic()
        self._left = min(self._left + (now - self._at) * self.rate, 2.0 * self.rate)
        self._at = now
        if self._left < 1:
            raise Refusal(f"more than {self.rate} requests a second; try again in a moment", 429)
        self._left -= 1

    def sign(self, what: str, expires: int) -> str:
        """The signature of a link."""
        return hmac.new(self.secret, f"{what}|{expires}".encode(), hashlib.sha256).hexdigest()

    def check_link(self, what: str, expires: int, signature: str) -> None:
        """Raise `Refusal` 403 for a link that was not made here, or is over."""
        if not hmac.compare_digest(self.sign(what, expires).encode(), signature.encode("utf-8", "replace")):
            raise Refusal("this link was not signed by the server", 403)
        if time.time() > expires:
            raise Refusal("this link has expired; ask for a new one", 403)


async def required(request: Request) -> None:
    """The dependency of every route that needs the key; a coroutine, since others are sent to a thread pool."""
    keeper: Keeper = request.app.state.keeper
    keeper.check(request)
    if not request.url.path.endswith("/retrieve_future"):  # clients would wait longer and longer
        keeper.take_turn()


def key_of(request: Request) -> str:
    """The key that a request bears, "" for none."""
    for header in ("x-api-key", "api-key"):
        if key := request.headers.get(header):
            return key
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8", "replace").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def hash_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def open_keys(folder: Path, given: str | None, rate: int) -> tuple[Keeper, str]:
    """The keeper of a server's folder; and the key, if it was minted now.

    Args:
        given: the user's own key; None to use the folder's, or to mint one.

    Raises:
        ConfigError: the user's key is too short.
    """
    path, minted = folder / FILE, ""
    stored: dict[str, Any] = read_json(path) if path.is_file() else {"secret": secrets.token_hex(32)}
    if not isinstance(stored.get("secret"), str) or not isinstance(stored.get("sha256", ""), str):
        raise CheckpointError(f"{path}: is not the server's file of its key; remove it, and a new key is minted")
    if given is not None:
        if len(given) < 8:
            raise ConfigError("the key of --api_key_env has fewer than 8 characters")
        _write(path, stored)
        return Keeper(hash_of(given), stored["secret"], rate), ""
    if "sha256" not in stored:
        minted = PREFIX + secrets.token_urlsafe(24)
        stored["sha256"] = hash_of(minted)
        _write(path, stored)
    return Keeper(stored["sha256"], stored["secret"], rate), minted


def _write(path: Path, stored: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(stored))
