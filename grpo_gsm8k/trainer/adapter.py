"""LoRA (arXiv 2106.09685) through peft: a pair of small trained matrices beside each frozen linear layer.

An adapter is stored in peft's format, and its folder is a model folder like any other: transformers loads it on top of
the base model that it names. Only the adapter is trained, saved and handed to a sampler. There is no dropout, since a
live pass must give the log-probabilities of a frozen one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from grpo_gsm8k.config import ModelConfig, PolicyConfig
from grpo_gsm8k.errors import ConfigError, ModelError
from grpo_gsm8k.runs.files import real_path
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.trainer import pretrained
from grpo_gsm8k.trainer.policy import load_model, pick_dtype

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # peft's own names


def settings(cfg: PolicyConfig) -> Any:
    """The configured adapter, as a `peft.LoraConfig`."""
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

    if not (Path(model_id) / CONFIG_FILE).is_file():
        return None
    with pretrained.one_line(model_id):
        return LoraConfig.from_pretrained(model_id)


def has_adapter(model: Any) -> bool:
    """Whether the model has an adapter."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def attach(model: Any, cfg: PolicyConfig) -> None:
    """Prepare `model` for training: add an adapter, keep its own, or train all weights.

    Raises:
        ConfigError: the model has another adapter, or one that the config does not name; or peft cannot make one.
    """
    if has_adapter(model):
        held = model.peft_config["default"]
        if str(held.peft_type.value) != "LORA":
            raise ConfigError(
                f"{cfg.model_id}: an adapter of the kind {held.peft_type.value}; only LoRA is trained here"
            )
        if (held.r, held.lora_alpha) != (cfg.lora_rank, cfg.lora_alpha):
            raise ConfigError(
                f"{cfg.model_id} is a LoRA adapter: continue it with --lora_rank {held.r} --lora_alpha "
                f"{held.lora_alpha}, or merge it with `grpo-gsm8k merge`"
            )
    elif cfg.lora_rank:
        if Path(cfg.model_id).is_dir():  # the adapter names its base, from wherever it will be loaded
            model.name_or_path = str(real_path(cfg.model_id))
        asked = settings(cfg)
        asked.revision = cfg.revision or None
        try:
            model.add_adapter(asked)
        except ValueError as fault:  # peft's word for targets that the model does not have
            raise ConfigError(f"--lora_targets {cfg.lora_targets}: {' '.join(str(fault).split())[:300]}") from None
    else:
        return
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):  # head.py reads its weight directly
        raise ConfigError(f"{cfg.model_id}: an adapter on the output head cannot be trained here")
    if experts := _bare_experts(model):
        say(
            f"lora: {len(experts)} weights of experts, {experts[0]} first, have no adapter and stay as they are: "
            "they are no linear layers; what is beside them is trained"
        )
    trained = {id(parameter) for _, parameter in own_weights(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
        if id(parameter) in trained:
            parameter.data = parameter.data.to(model.dtype)  # the optimizer keeps float32 masters


def own_weights(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The trained weights: the adapter's under peft's names, or all.

    An adapter's weights are its matrices, DoRA's magnitudes, biases, and whole layers.
    """
    if not has_adapter(model):
        yield from model.named_parameters()
        return
    for name, parameter in pretrained.adapter_weights(model):
        yield f"base_model.model.{name}", parameter


def save(model: Any, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Save the adapter as peft does, without the embedding weights that peft adds for an adapter on the embedding.

    Args:
        weights: its `own_weights`, or a copy of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.detach().to("cpu").contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    held = copy.copy(model.peft_config["default"])
    held.inference_mode = True
    held.base_model_name_or_path = model.peft_config["default"].base_model_name_or_path or model.name_or_path
    held.save_pretrained(str(folder))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)  # the end-of-turn ids, which the base does not know


def _bare_experts(model: Any) -> list[str]:
    """Expert weights without an adapter: transformers stores them as one tensor per layer."""
    if any("experts" in name for name, _ in own_weights(model)):
        return []
    return [name for name, weight in model.named_parameters() if "experts" in name and weight.ndim == 3]


@contextmanager
def swapped(model: Any, other: dict[str, torch.Tensor]) -> Iterator[None]:
    """Swap in another adapter's weights for a while, so that no second model is needed."""
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
    """Merge the adapter in `cfg.model_id` into its base: W + (alpha / r) B A, computed in float32.

    A tied model becomes an untied one where its embedding has an adapter, or its head.

    Raises:
        ConfigError: there is no adapter.
        ModelError: the adapter cannot be read, or the merged model gives other outputs.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    pretrained.hold_here(cfg.model_id)
    held = in_folder(cfg.model_id)
    if held is None:
        raise ConfigError(f"{cfg.model_id} is not the folder of a LoRA adapter: there is nothing to merge")
    before = _probe(load_model(replace(cfg, dtype="float32")))  # refuses what the folder does not hold exactly
    named = {"model_id": held.base_model_name_or_path, "revision": held.revision or ""}
    base = load_model(replace(cfg, **named, dtype="float32"))
    with pretrained.one_line(cfg.model_id):
        model = PeftModel.from_pretrained(base, cfg.model_id)
    if any(isinstance(end, BaseTunerLayer) for end in (base.get_input_embeddings(), base.get_output_embeddings())):
        _untie(base)
    with pretrained.one_line(cfg.model_id):  # peft merges some kinds alone
        model = model.merge_and_unload(safe_merge=True)
    if not torch.allclose(_probe(model), before, rtol=1e-3, atol=1e-3):
        raise ModelError(f"{cfg.model_id}: merged into its base it answers differently; it cannot be merged")
    return model.to(pick_dtype(cfg.dtype, base.device))


@torch.no_grad()
def _probe(model: Any) -> torch.Tensor:
    """Next-token log-probabilities of a short row."""
    ids = torch.arange(1, 1 + min(16, model.get_input_embeddings().weight.shape[0] - 1), device=model.device)
    logits: torch.Tensor = model.eval()(input_ids=ids.unsqueeze(0)).logits
    return logits.float().log_softmax(-1)


def _untie(model: Any) -> None:
    """Give the head a matrix of its own: an adapter on the embedding leaves the head as it is, and the other way."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    head = getattr(head, "base_layer", head)
    if config.tie_word_embeddings:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
