"""`grpo --estimate`, `distill --estimate`: predicts memory, token budget and seconds per step on a named GPU.

The formulas are `costs.py`'s. Predictions: none has been held against a GPU yet (artifacts/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from grpo_gsm8k.config import DistillConfig, GrpoConfig, PromptConfig
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.trainer import costs, pretrained
from grpo_gsm8k.trainer.costs import CONTEXT, FRAGMENTS, GPUS, PROMPT, SPARE, Shape

UTILISATION = 0.4  # of the peak, assumed


def estimate(cfg: GrpoConfig, name: str) -> dict[str, Any]:
    """Predicted peak of memory, token budget and seconds of a GRPO step on one GPU of `GPUS`.

    Lengths are those that the config allows at most; prompts are taken to have 100 tokens. The embedded sampler's copy,
    cache and logits count, with `--engine auto` too, since what is installed there is not known; vLLM has a GPU of its
    own. A teacher on the same GPU counts, with its weights and its pass. `peak_gb` is what torch will say was
    allocated; that it `fits` leaves room for CUDA's context and between tensors. `save_copy_gb` is main memory, for the
    copy that a checkpoint is written from. Raises `ConfigError`.
    """
    if name not in GPUS:
        raise ConfigError(f"--estimate {name}: known are {', '.join(GPUS)}")
    gpu, config = GPUS[name], _model_config(cfg)
    shape, width = Shape.of(config.to_dict(), _weights(config)), 4 if cfg.dtype == "float32" else 2
    setup = costs.setup_of(cfg, width)
    length = PROMPT + cfg.max_new_tokens
    rows = min(cfg.sample_rows, cfg.rollouts_per_step)
    sampler = 0 if cfg.uses_vllm else costs.sampler_bytes(shape, setup, cfg)
    teacher = _teacher(cfg)
    scoring = width * teacher.parameters if teacher else 0
    beside = costs.beside_bytes(shape, setup, cfg) + scoring
    room = SPARE * (gpu.memory - CONTEXT) - beside
    cells = cfg.max_tokens_per_microbatch or costs.cells_that_fit(shape, setup, room)
    training = costs.training_bytes(shape, setup, cells) + beside
    peak = max(training, costs.state_bytes(shape, setup, gradients=False) + sampler + scoring)
    work = _operations(cfg, shape, length)
    work += _frozen_operations(cfg, teacher, length) if teacher else 0
    rollouts = cfg.rollouts_per_step
    read = cfg.max_new_tokens * costs.decoding_bytes(shape, width, [PROMPT + cfg.max_new_tokens // 2] * rows)
    return {
        "gpu": name,
        "weights": shape.parameters,
        "peak_gb": round(peak / 1e9, 2),
        "fits": FRAGMENTS * peak + CONTEXT < gpu.memory,
        "save_copy_gb": round(costs.copy_bytes(shape, setup) / 1e9, 2) if cfg.async_save else 0.0,
        "max_tokens_per_microbatch": cells,
        "update_seconds": round(work / (UTILISATION * gpu.flops), 2),
        "update_seconds_at_peak": round(work / gpu.flops, 2),
        "sampling_seconds_at_bandwidth": round(-(-rollouts // rows) * read / gpu.bandwidth, 2),
    }


def _operations(cfg: GrpoConfig, shape: Shape, length: int) -> float:
    """Of a step's updates, what checkpointing does again and the passes over old and reference policies included."""
    tokens, targets = cfg.rollouts_per_step * length, cfg.rollouts_per_step * cfg.max_new_tokens
    pairs = cfg.rollouts_per_step * costs.causal_pairs([length])
    update = costs.training_flops(shape, tokens, targets, pairs, cfg.lora_rank)
    again = costs.forward_flops(shape, tokens, 0, pairs) if cfg.activation_checkpointing else 0
    frozen = cfg.frozen_pass + (cfg.kl_coef > 0)
    return cfg.epochs * (update + again) + frozen * _frozen_operations(cfg, shape, length)


def _frozen_operations(cfg: GrpoConfig, shape: Shape, length: int) -> float:
    """Of a pass over a step's rollouts without gradient."""
    tokens, targets = cfg.rollouts_per_step * length, cfg.rollouts_per_step * cfg.max_new_tokens
    return costs.forward_flops(shape, tokens, targets, cfg.rollouts_per_step * costs.causal_pairs([length]))


def _teacher(cfg: GrpoConfig) -> Shape | None:
    """The teacher of a distillation, if it is on the student's GPU."""
    if not isinstance(cfg, DistillConfig) or cfg.teacher_device:
        return None
    config = _model_config(replace(cfg, model_id=cfg.teacher, revision=cfg.teacher_revision))
    return Shape.of(config.to_dict(), _weights(config))


def _model_config(cfg: PromptConfig) -> Any:
    from transformers import AutoConfig

    found = pretrained.read(AutoConfig, cfg.model_id, cfg.revision, cfg.cache_dir)
    return found.get_text_config()


def _weights(config: Any) -> int:
    """How many there are, counted without making them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        make: Callable[[Any], Any] = AutoModelForCausalLM.from_config
        return sum(p.numel() for p in make(config).parameters())
