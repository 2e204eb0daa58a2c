"""What `launch up` would do: the checks, the machine, the request, the job. Nothing is rented, recorded or pushed.

Without RUNPOD_API_KEY nobody is asked anything: the settings and the request are shown, and no price.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_gsm8k import config
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.launch import records
from grpo_gsm8k.launch.api import Offer, connect
from grpo_gsm8k.launch.settings import PREFERENCE, UpConfig
from grpo_gsm8k.launch.up import LEAST_S, MOST_HOURS, body, prepared, ranked, wrapped


def rehearse(values: Mapping[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """What a run with these settings would ask for; raises `ConfigError` as the run would."""
    cfg, words = prepared(config.build(UpConfig, values), command)
    job = wrapped(cfg, words)
    blot = records.Blot(records.secrets_of(cfg.pass_env) | {"webhook": cfg.webhook})
    gpus = [{"gpu": name} for name in records.names_in(cfg.gpu) or PREFERENCE]
    if os.environ.get("RUNPOD_API_KEY"):
        gpus = _paid(ranked(asyncio.run(_offers(cfg, blot)), cfg), cfg)
    first = Offer(gpus[0]["gpu"], 0.0, cfg.count, "", 0)
    name = records.pod_name(records.new_run(cfg.name), deadline := time.time() + _hours(cfg, gpus[0]) * 3600)
    passed = records.names_in(cfg.pass_env)
    return {
        "would_try": gpus,
        "hours": round(_hours(cfg, gpus[0]), 2),
        "request": body(cfg, first, name, "(a key made for this run)", deadline),
        "job": [blot(word) for word in job],
        "passed": [name for name in passed if os.environ.get(name)],
        "not_set": [name for name in (*passed, "RUNPOD_API_KEY") if not os.environ.get(name)],
        "fetched": cfg.fetch,
        "pushed_to": cfg.repo_id,
    }


async def _offers(cfg: UpConfig, blot: records.Blot) -> list[Offer]:
    async with connect(blot, cfg.backoff_s) as api:
        return await api.offers(cfg.cloud, cfg.count)


def _paid(offers: Sequence[Offer], cfg: UpConfig) -> list[dict[str, Any]]:
    """Those that the budget pays for as long as a run needs at least. Raises `ConfigError` where it pays for none."""
    rows: list[dict[str, Any]] = [
        {"gpu": o.gpu, "rate": round(o.price * cfg.count, 4), "availability": o.availability} for o in offers
    ]
    hours = cfg.hours or LEAST_S / 3600
    if not (found := [row for row in rows if row["rate"] * hours <= cfg.budget]):
        rate = min(row["rate"] for row in rows)
        raise ConfigError(f"--budget {cfg.budget:g}: {hours:g} hours cost ${rate * hours:.2f} at the lowest price")
    return found


def _hours(cfg: UpConfig, gpu: Mapping[str, Any]) -> float:
    """How long the budget and --hours allow at most."""
    return min(cfg.hours or MOST_HOURS, cfg.budget / gpu["rate"] if gpu.get("rate") else MOST_HOURS)
