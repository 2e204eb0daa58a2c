"""Facts about transformers' architectures, each in one place.

The rest of trainer and sampler treats a model as `head(trunk(ids))`. This module knows models that do more (a scale or
soft-cap behind the head), that name their parts differently, or that have no dropout-free training mode.
`logprobs.check_head` and `engines.hf.check_cache` verify these facts against each loaded model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from grpo_gsm8k.errors import ModelError
from grpo_gsm8k.trainer.head import LogitMap

UNBOUNDED = 1 << 20  # tokens, for models without positions (ALiBi, recurrent): no row is that long
REACH = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "max_sequence_length")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIES = {"hyperclovax"}  # by `logits_scaling`; Granite and MiniCPM3 divide by what bears the same name
NOISE = re.compile(r"drop|jitter|noise")  # attn_pdrop, layerdrop, attention_dropout, router_jitter_noise


def name(model: Any) -> str:
    """The architecture's name for error messages."""
    return type(model).__name__


def trunk(model: Any) -> Any:
    """The module that maps ids to hidden states."""
    base = model.base_model
    return model.model if base is model else base  # Llama 4 calls it by another name than its own prefix


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers in order; empty if the trunk does not hold them in one list."""
    wanted = model.config.get_text_config().num_hidden_layers
    lists = (module for module in trunk(model).modules() if isinstance(module, nn.ModuleList))
    return next((list(found) for found in lists if len(found) == wanted), [])


def logit_map(model: Any) -> LogitMap:
    """The scale and soft-cap that the model applies behind its head, from its attributes and config."""
    if not hasattr(model, "config"):
        return LogitMap()
    config = model.config.get_text_config()
    scale = getattr(model, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(model.base_model, "lm_head_multiplier", 1.0)  # Falcon-H1
    for field in ("logits_scaling", "logits_mup_width_multiplier"):
        factor = getattr(config, field, None) or 1.0
        scale = scale * factor if config.model_type in MULTIPLIES else scale / factor
    return LogitMap(float(scale), float(next(filter(None, (getattr(config, cap, None) for cap in CAPS)), 0.0)))


def attention_implementation(config: Any) -> str | None:
    """The `attn_implementation` that computes all of the model's attention; None where transformers' choice does.

    SDPA silently ignores a soft-cap on the attention scores (Gemma 2, VaultGemma).
    """
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def compute_all_of_attention(model: Any) -> None:
    """Replace an attention implementation that ignores part of the model's attention."""
    wanted = attention_implementation(model.config)
    if wanted and model.config.get_text_config()._attn_implementation != wanted:
        model.set_attn_implementation(wanted)


def context_length(config: Any) -> int:
    """The longest row that the model reads independently of the rest of the batch.

    Dynamic and long RoPE rotate all rows of a batch differently once the longest exceeds the original context, and the
    cache keeps the old rotation, so a row's probabilities would depend on its neighbours.
    """
    config = config.get_text_config()
    reach = [value for field in REACH if isinstance(value := getattr(config, field, None), int) and value > 0]
    return min([*reach[:1], *_rope_limits(config)], default=UNBOUNDED)


def rope_limit(config: Any) -> int | None:
    """The context beyond which dynamic or long RoPE changes; None for other models."""
    return min(_rope_limits(config.get_text_config()), default=None)


def _rope_limits(config: Any) -> Iterator[int]:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [fields for fields in rope.values() if isinstance(fields, Mapping)]  # one a kind of layer
    for fields in nested or [rope]:
        kind = str(fields.get("rope_type") or fields.get("type"))
        original = fields.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if original and (kind == "longrope" or "dynamic" in kind):
            yield int(original)


def silence(model: Any, checkpointing: bool) -> None:
    """Switch off dropout, layer drop and router noise for training.

    The model stays in evaluation mode. Activation checkpointing requires `training`, so with `checkpointing` the layers
    themselves, but not their submodules, are in training mode, with all rates at 0.

    Raises:
        ModelError: the model does not support activation checkpointing.
    """
    model.eval()
    if not checkpointing:
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ModelError(f"{name(model)} has no activation checkpointing; leave --activation_checkpointing out")
    from transformers import PreTrainedConfig
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            _without_noise(module)
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                module.config = copy.copy(module.config)  # the model's own is what is saved
                _without_noise(module.config)


def _without_noise(owner: Any) -> None:
    for field, value in list(vars(owner).items()):
        if isinstance(value, float) and NOISE.search(field):
            setattr(owner, field, 0.0)


def router_loss(model: Any) -> float:
    """The coefficient of the configured load-balancing loss of a mixture of experts; 0 without one."""
    config = model.config.get_text_config()
    wanted = getattr(config, "output_router_logits", False)
    return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0) if wanted else 0.0
