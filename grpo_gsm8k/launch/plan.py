"""Which GPU, how long, how much: before anything is rented.

The memory that training takes, in bytes, with N parameters, L layers of width d, MLP width ff, H heads and kv key-value
heads of size hd, vocabulary V, and T tokens in a forward pass (activation checkpointing; ZeRO, arXiv 1910.02054 sec.
3.1, for the 16 bytes of mixed-precision Adam; activations after arXiv 2205.05198):

    need   = 1.08 max(W + G + O + Ref + Act + Logits + C0 + (0 if the sampler sleeps, else VLLM),
                      W + O + Ref + C0 + VLLM)
    W+G+O  = 16 N: bf16 weights 2, gradients 2, float32 master and Adam 12; with LoRA 2 N + 16 P
    Ref    = 2 N with a KL term and without LoRA (whose reference is the model with its adapter off)
    Act    = 2 T L d + T (2 (10 d + 3 ff) + 4 (H + 2 kv) hd)       every layer's input, and one layer in full
    Logits = 10 V min(T, chunk)
    VLLM   = 2 N + 4 L kv hd (sampled tokens) + 1.5 GiB
    C0     = 2 GiB

On n GPUs W, G, O and Ref are sharded, the rest is on each. An estimate: it has not been held against measured peaks.
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

GIB = 2**30
USABLE = 0.94  # of the GiB in a card's name: an L40S of 48 shows 45
MFU = 0.4
SAMPLING = 1.5  # a GRPO step takes so many times its training: 8 s of sampling to 17 s were estimated for 1.5B
SETUP_H = 0.25
TFLOPS = {"NVIDIA L40S": 362, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100 80GB PCIe": 312}
TFLOPS |= {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H200": 989, "NVIDIA B200": 2250}
"""Dense bf16 peaks from the data sheets."""


def plan(values: Mapping[str, Any]) -> dict[str, Any]:
    """GPUs on which it fits, in order of preference, with live prices and an estimate of time and cost."""
    cfg = config.build(PlanConfig, values)
    if cfg.count and cfg.count not in COUNTS:
        raise ConfigError(f"--count {cfg.count}: must be one of {', '.join(map(str, COUNTS))}")
    if cfg.repo_id:
        hub.check_push(cfg.repo_id)
    facts = hub.model_facts(cfg.model_id)
    options = [row for count, offers in asyncio.run(_catalogs(cfg)) for row in _options(cfg, facts, count, offers)]
    wanted = records.names_in(cfg.gpu) or list(PREFERENCE)
    best = sorted(options, key=lambda row: (row["count"], wanted.index(row["gpu"])))
    first = {name: next((row for row in best if row["gpu"] == name), None) for name in wanted}
    return {
        "model_id": facts.model_id,
        "sha": facts.sha,
        "gated": facts.gated,
        "parameters": facts.parameters,
        "method": cfg.method,
        "need_gib": round(need(facts, cfg) / GIB, 1),
        "may_push": cfg.repo_id or None,
        "gpus": [row for row in first.values() if row],
        "too_small": [name for name, row in first.items() if row is None],
    }


def need(facts: ModelFacts, cfg: PlanConfig, count: int = 1) -> float:
    """Bytes on each of `count` GPUs, by the formula of this module's docstring."""
    n, tokens = facts.parameters, cfg.microbatch_tokens
    if "lora" in cfg.method:
        p = lora_parameters(facts, cfg.lora_rank)
        held, optimizer_only = 2 * n + 16 * p, 2 * n + 14 * p
    else:
        held, optimizer_only = 16 * n, 14 * n
    reference = 2 * n if cfg.kl and "lora" not in cfg.method else 0
    one_layer = 2 * (10 * facts.hidden + 3 * facts.mlp) + 4 * (facts.heads + 2 * facts.kv_heads) * facts.head_dim
    activations = tokens * (2 * facts.layers * facts.hidden + one_layer)
    logits = 10 * facts.vocab * min(tokens, cfg.logit_chunk)
    cache = 4 * facts.layers * facts.kv_heads * facts.head_dim * cfg.sampled_tokens
    sampler = 2 * n + cache + 1.5 * GIB if "grpo" in cfg.method else 0
    context = 2 * GIB
    training = (held + reference) / count + activations + logits + context + (0 if cfg.sleep else sampler)
    sampling = (optimizer_only + reference) / count + context + sampler
    return 1.08 * max(training, sampling)


def lora_parameters(facts: ModelFacts, rank: int) -> int:
    """Adapters on every linear layer but the head: rank (in + out) of each."""
    attention = 2 * (facts.hidden + facts.heads * facts.head_dim) + 2 * (facts.hidden + facts.kv_heads * facts.head_dim)
    return rank * facts.layers * (attention + 3 * (facts.hidden + facts.mlp))


async def _catalogs(cfg: PlanConfig) -> list[tuple[int, list[Offer]]]:
    counts = (cfg.count,) if cfg.count else COUNTS
    async with connect(records.Blot(records.secrets_of(""))) as api:
        return [(count, await api.offers(cfg.cloud, count)) for count in counts]


def _options(cfg: PlanConfig, facts: ModelFacts, count: int, offers: list[Offer]) -> list[dict[str, Any]]:
    """Those on which it fits."""
    wanted = records.names_in(cfg.gpu) or list(PREFERENCE)
    size = need(facts, cfg, count)
    flops = 6 * facts.parameters * cfg.total_tokens * (SAMPLING if "grpo" in cfg.method else 1)
    rows = []
    for offer in offers:
        if offer.gpu not in wanted or offer.most < count or size > USABLE * offer.memory * GIB:
            continue
        peak = TFLOPS.get(offer.gpu, min(TFLOPS.values())) * 1e12
        hours = SETUP_H + flops / (peak * MFU * count) / 3600
        price = offer.price * count
        row = {"gpu": offer.gpu, "count": count, "need_gib": round(size / GIB, 1), "memory_gib": offer.memory}
        row |= {"price": round(price, 2), "availability": offer.availability}
        rows.append(row | {"hours": round(hours, 2), "cost": round(hours * price, 2)})
    return rows
