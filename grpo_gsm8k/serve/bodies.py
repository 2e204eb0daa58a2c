"""Requests as bytes in the journal, and what may stand in them: each field is known, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import zstandard

from grpo_gsm8k.serve import data
from grpo_gsm8k.serve.books import SCHEME
from grpo_gsm8k.serve.jobs import Refusal

JSON_BODY, PROTO_BODY = b"J", b"P"
MOST_BODY = 1 << 29  # bytes of a request when unpacked

ADAM = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0, "grad_clip_norm": 0.0}
"""The wire's AdamW and its defaults."""
KNOWN_FIELDS = {"type", "model_id", "seq_id"}
_SAVE = {"path", "ttl_seconds", "overwrite", "user_metadata"}
KNOWN = {
    "optim_step": {"adam_params", "optimizer_params"},
    "load_weights": {"path", "optimizer"},
    "save_weights": _SAVE,
    "save_weights_external": _SAVE | {"age_encryption_recipients"},
    "save_weights_for_sampler": _SAVE | {"sampling_session_seq_id", "kind"},
    "unload_model": set[str](),
}
"""What a training request may hold beside `KNOWN_FIELDS`."""


def pack(kind: bytes, body: bytes) -> bytes:
    """A request's bytes for the journal."""
    return kind + zstandard.compress(body, 1)


def unpack(stored: bytes) -> tuple[bytes, bytes]:
    """(JSON_BODY or PROTO_BODY, the request's bytes)."""
    return stored[:1], zstandard.decompress(stored[1:], max_output_size=MOST_BODY)


def training_job(kind: bytes, body: bytes) -> data.TrainingJob:
    """A forward_backward or forward as it was sent. Raises `Refusal` for what cannot be read."""
    if kind == PROTO_BODY:
        return data.from_proto(body)
    sent = json.loads(body)
    forward_only = "forward_input" in sent
    return data.from_json(sent.get("forward_input" if forward_only else "forward_backward_input"), forward_only)


def adam_of(sent: Mapping[str, Any]) -> dict[str, float]:
    """AdamW's settings as they were sent. Raises `Refusal` for another optimizer, or settings that are none."""
    if sent.get("optimizer_params") is not None:
        kind = sent["optimizer_params"].get("type") if isinstance(sent["optimizer_params"], dict) else None
        raise Refusal(f"optimizer {str(kind)[:40]!r} is not served: AdamW alone is (adam_params)")
    given = sent.get("adam_params")
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise Refusal("adam_params must be an object")
    if strange := sorted(given.keys() - ADAM.keys() - {"type"}):
        raise Refusal(f"adam_params has no {str(strange[0])[:40]!r} (it has: {', '.join(ADAM)})")
    settings = {}
    for name, default in ADAM.items():
        value = given.get(name, default)
        number = not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < float("inf")
        low_enough = value < 1 if number and name.startswith("beta") else True
        if not number or not low_enough or value < 0:
            bounds = "at least 0 and below 1" if name.startswith("beta") else "a finite number, at least 0"
            raise Refusal(f"adam_params.{name} is {str(value)[:40]}; it must be {bounds}")
        settings[name] = float(value)
    return settings


def check_optimizer(config: Any) -> None:
    """Raise `Refusal` for another optimizer than AdamW."""
    kind = config.get("type", "adamw") if isinstance(config, dict) else "adamw" if config is None else config
    if kind != "adamw":
        raise Refusal(f"optimizer {str(kind)[:40]!r} is not served: adamw alone is")


def refuse_unknown(sent: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise `Refusal` for a field that asks for something that is not done here; nothing asked is nothing refused."""
    for name, value in sent.items():
        if name not in known and value not in (None, False, 0, "", [], {}):
            raise Refusal(f"{str(name)[:80]} is not served here")


def check_ttl(ttl: Any) -> float:
    """Seconds that a checkpoint lives. Raises `Refusal` for what is no number of them."""
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl < 1e10:
        raise Refusal(f"ttl_seconds is {str(ttl)[:40]}; it must be a number of seconds above 0")
    return float(ttl)


def is_path(name: str) -> bool:
    """Whether a name is a checkpoint's path."""
    return name.startswith(SCHEME)
