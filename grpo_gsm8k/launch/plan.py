"""Which GPU, how long, how much: before anything is rented.

Bytes and operations are those of `trainer/costs.py`. A GPU must hold, with the sampler on the same one,

    need   = 1.08 max(training + C0 + (0 if the sampler sleeps, else VLLM),
                      training's state without gradients + C0 + VLLM)
    VLLM   = 2 N + 4 L kv hd (sampled tokens) + 1.5 GiB, with N parameters, L layers, kv key-value heads of size hd
    C0     = 2 GiB

On n GPUs the state is sharded, the rest is on each, and the first has a whole copy of the weights besides. An estimate:
it has not been held against measured peaks. A rule of thumb with 16 bytes a parameter comes out about 10 % lower: here
gradients are summed in float32, which makes it 18 on one GPU, and the head has a gradient and buffers in float32.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from grpo_gsm8k import config
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.launch import hub, records
from grpo_gsm8k.launch.api import Offer, connect
from grpo_gsm8k.launch.hub import ModelFacts
from grpo_gsm8k.launch.settings import COUNTS, PREFERENCE, PlanConfig
from grpo_gsm8k.trainer import costs
from grpo_gsm8k.trainer.costs import CONTEXT, FRAGMENTS, GIB, GPUS

USABLE = 0.94  # of the GiB in a card's name: an L40S of 48 shows 45
MFU = 0.4
SAMPLING = 1.5  # a GRPO step takes so many times its training: 8 s of sampling to 17 s were estimated for 1.5B
SETUP_H = 0.25


def plan(values: Mapping[str, Any]) -> dict[str, Any]:
    """GPUs on which it fits, in order of preference, with live prices and an estimate of time and cost."""
    cfg = config.build(PlanConfig, values)
    if cfg.count and cfg.count not in COUNTS:
        raise ConfigError(f"--count {cfg.count}: must be one of {', '.join(map(str, COUNTS))}")
    if cfg.repo_id:
        hub.check_push(cfg.repo_id, public=True)
    facts = hub.model_facts(cfg.model_id)
    options = [row for count, offers in asyncio.run(_catalogs(cfg)) for row in _options(cfg, facts, count, offers)]
    wanted = records.names_in(cfg.gpu) or list(PREFERENCE)
    best = sorted(options, key=lambda row: (row["count"], wanted.index(row["gpu"])))
    first = {name: next((row for row in best if row["gpu"] == name), None) for name in wanted}
    return {
        "model_id": facts.model_id,
        "sha": facts.sha,
        "gated": facts.gated,
        "parameters": facts.shape.parameters,
        "method": cfg.method,
        "need_gib": round(need(facts, cfg) / GIB, 1),
        "may_push": cfg.repo_id or None,
        "gpus": [row for row in first.values() if row],
        "too_small": [name for name, row in first.items() if row is None],
    }


def need(facts: ModelFacts, cfg: PlanConfig, count: int = 1) -> float:
    """Bytes on each of `count` GPUs, by the formula of this module's docstring."""
    shape, setup = facts.shape, setup_of(cfg, count)
    cache = costs.cache_bytes(shape, 2, cfg.sampled_tokens)
    sampler = 2 * shape.parameters + cache + 1.5 * GIB if "grpo" in cfg.method else 0
    training = costs.training_bytes(shape, setup, cfg.microbatch_tokens) + CONTEXT + (0 if cfg.sleep else sampler)
    sampling = costs.state_bytes(shape, setup, gradients=False) + CONTEXT + sampler
    return FRAGMENTS * max(training, sampling)


def setup_of(cfg: PlanConfig, count: int = 1) -> costs.Setup:
    """In bfloat16. An adapter, and an optimizer in main memory, are trained on one GPU, however many there are."""
    lora, offload = "lora" in cfg.method, cfg.optimizer_device == "cpu"
    ranks = 1 if lora or offload else count
    return costs.Setup(
        lora_rank=cfg.lora_rank if lora else 0,
        checkpointing=cfg.activation_checkpointing,
        offload=offload,
        ranks=ranks,
        copies=int(ranks > 1),
        reference=cfg.kl and not lora,
    )


async def _catalogs(cfg: PlanConfig) -> list[tuple[int, list[Offer]]]:
    counts = (cfg.count,) if cfg.count else COUNTS
    async with connect(records.Blot(records.secrets_of(""))) as api:
        return [(count, await api.offers(cfg.cloud, count)) for count in counts]


def _options(cfg: PlanConfig, facts: ModelFacts, count: int, offers: list[Offer]) -> list[dict[str, Any]]:
    """Those on which it fits."""
    wanted = records.names_in(cfg.gpu) or list(PREFERENCE)
    size = need(facts, cfg, count)
    tokens, rank = int(cfg.total_tokens), setup_of(cfg).lora_rank
    flops = costs.training_flops(facts.shape, tokens, tokens, lora_rank=rank)
    flops *= SAMPLING if "grpo" in cfg.method else 1
    rows = []
    for offer in offers:
        if offer.gpu not in wanted or offer.most < count or size > USABLE * offer.memory * GIB:
            continue
        peak = (costs.gpu_called(offer.gpu) or min(GPUS.values(), key=lambda gpu: gpu.flops)).flops
        hours = SETUP_H + flops / (peak * MFU * count) / 3600
        price = offer.price * count
        row = {"gpu": offer.gpu, "count": count, "need_gib": round(size / GIB, 1), "memory_gib": offer.memory}
        row |= {"price": round(price, 2), "availability": offer.availability}
        rows.append(row | {"hours": round(hours, 2), "cost": round(hours * price, 2)})
    return rows
