"""LoRA (arXiv 2106.09685): a pair of small trained matrices beside each frozen linear layer, through peft.

An adapter on disk is peft's own format, and a folder that holds one is a model folder like any other: transformers
loads it on top of the base model that it names. Only the adapter is trained, saved and handed to a sampler; the base
never moves. There is no dropout: a live pass must give the log-probabilities that a frozen one gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grpo_gsm8k.config import ModelConfig, PolicyConfig
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.trainer.policy import load_model, pick_dtype

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # peft's own names


def settings(cfg: PolicyConfig) -> Any:
    """The adapter that the config asks for, as a `peft.LoraConfig`."""
    from peft import LoraConfig

    named = [name.strip() for name in cfg.lora_targets.split(",")]
    return LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        target_modules=cfg.lora_targets if cfg.lora_targets == "all-linear" else named,
        task_type="CAUSAL_LM",
    )


def in_folder(model_id: str) -> Any:
    """The `peft.LoraConfig` of a folder that holds an adapter; None for any other model."""
    from peft import LoraConfig

    return LoraConfig.from_pretrained(model_id) if (Path(model_id) / CONFIG_FILE).is_file() else None


def has_adapter(model: Any) -> bool:
    """Whether it is a base model with an adapter on it."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def attach(model: Any, cfg: PolicyConfig) -> None:
    """Make `model` what is to be trained: with a new adapter, with the one that it came with, or as it is.

    Raises:
        ConfigError: another adapter is there already, or none was asked for; or peft cannot make one.
    """
    if has_adapter(model):
        held = model.peft_config["default"]
        if (held.r, held.lora_alpha) != (cfg.lora_rank, cfg.lora_alpha):
            raise ConfigError(
                f"{cfg.model_id} is a LoRA adapter: continue it with --lora_rank {held.r} --lora_alpha "
                f"{held.lora_alpha}, or make it a model of its own with `grpo-gsm8k merge`"
            )
    elif cfg.lora_rank:
        if Path(cfg.model_id).is_dir():  # the adapter names its base, from wherever it will be loaded
            model.name_or_path = str(Path(cfg.model_id).resolve())
        asked = settings(cfg)
        asked.revision = cfg.revision or None
        try:
            model.add_adapter(asked)
        except ValueError as fault:  # peft's word for targets that the model does not have
            raise ConfigError(f"--lora_targets {cfg.lora_targets}: {' '.join(str(fault).split())[:300]}") from None
    else:
        return
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):  # it is read weight by weight, see head.py
        raise ConfigError(f"{cfg.model_id}: an adapter on the output head cannot be trained here")
    for name, parameter in model.named_parameters():
        trained = "lora_" in name
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.to(model.dtype)  # float32 masters are the optimizer's business


def own_weights(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """What distinguishes this model from the one that it was loaded from: its adapter under peft's names, or all."""
    adapted = has_adapter(model)
    for name, parameter in model.named_parameters():
        if not adapted:
            yield name, parameter
        elif "lora_" in name:
            yield f"base_model.model.{name.replace('.default.', '.')}", parameter


@contextmanager
def swapped(model: Any, other: dict[str, torch.Tensor]) -> Iterator[None]:
    """The model with another adapter's weights, where the base is the same: no second model is needed."""
    own = dict(own_weights(model))
    kept = {name: parameter.data for name, parameter in own.items()}
    try:
        for name, parameter in own.items():
            parameter.data = other[name]
        yield
    finally:
        for name, parameter in own.items():
            parameter.data = kept[name]


def merged(cfg: ModelConfig) -> Any:
    """The adapter in `cfg.model_id` and its base as a plain model: W + (alpha / r) B A, formed in float32.

    Raises:
        ConfigError: there is no adapter.
    """
    from peft import PeftModel

    held = in_folder(cfg.model_id)
    if held is None:
        raise ConfigError(f"{cfg.model_id} is no folder of a LoRA adapter: there is nothing to merge")
    named = {"model_id": held.base_model_name_or_path, "revision": held.revision or ""}
    base = load_model(replace(cfg, **named, dtype="float32"))
    model = PeftModel.from_pretrained(base, cfg.model_id).merge_and_unload(safe_merge=True)
    return model.to(pick_dtype(cfg.dtype, base.device))
