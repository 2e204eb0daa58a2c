"""Loads a policy, and hashes its weights."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch

from grpo_gsm8k.config import ModelConfig, PromptConfig
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.runs.progress import doing, say
from grpo_gsm8k.trainer import architecture, pretrained
from grpo_gsm8k.trainer.ranks import world


def pick_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`; each of several ranks gets its own GPU.

    Raises:
        ConfigError: the device does not exist, or several ranks would share one GPU.
    """
    here = world()
    if here.size > 1 and name.startswith("cuda:"):
        raise ConfigError(f"device {name!r} is one GPU, and {here.size} ranks train; pass --device auto, cuda or cpu")
    if here.size > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        name = f"cuda:{here.local_rank}"
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r}: must be cpu, cuda, cuda:N or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r}: models run on cpu and cuda alone; try --device auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: this machine has {torch.cuda.device_count()} GPUs; try --device cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_tokenizer(cfg: PromptConfig) -> Any:
    """Load the tokenizer of `cfg.model_id`. Raises `ModelError` if there is none."""
    return pretrained.read_tokenizer(cfg)


def load_model(cfg: ModelConfig) -> Any:
    """Load the causal language model of `cfg.model_id` to its device, with its adapter if it is one.

    Raises:
        ModelError: the model does not exist, or its files do not match its weights exactly.
    """
    device = pick_device(cfg.device)
    with doing(f"loading {cfg.model_id}"):
        return pretrained.read_model(cfg, pick_dtype(cfg.dtype, device)).to(device)


def prepare_to_save(model: Any, end_ids: Sequence[int]) -> None:
    """Make the generation config writable by transformers, and add the ids that end this model's answers.

    transformers reads some settings that it refuses to write; greedy decoding does not need them. `generate` and vLLM
    read the end-of-sequence ids of a checkpoint from this config.

    Args:
        end_ids: ids that end a completion, with the end of turn first. The model's own ids are kept.
    """
    held = model.generation_config
    if held is None:
        return
    ends = held.eos_token_id if isinstance(held.eos_token_id, list) else [held.eos_token_id]
    known = list(dict.fromkeys(end for end in (*end_ids, *ends) if end is not None))
    held.eos_token_id = known[0] if len(known) == 1 else known
    kept = type(held)()
    settings = [(key, value) for key, value in held.to_diff_dict().items() if key != "transformers_version"]
    dropped = []
    if _is_written(held):
        return
    for key, value in sorted(settings, key=lambda pair: not pair[0].endswith("token_id")):
        before = getattr(kept, key, None)
        setattr(kept, key, value)
        if not _is_written(kept):
            setattr(kept, key, before)
            dropped.append(f"{key} = {value}")
    model.generation_config = kept
    say(f"generation_config.json: transformers refuses to write {', '.join(dropped)}; left out of what is saved")


def _is_written(settings: Any) -> bool:
    """Whether transformers would write this generation config."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings.save_pretrained(folder)
    except ValueError:
        return False
    return True


def device_name(model: Any) -> str:
    """`cpu` or `cuda:N`."""
    device: torch.device = next(model.parameters()).device
    return "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"


def dtype_name(tensors: Iterable[tuple[str, torch.Tensor]]) -> Literal["float32", "bfloat16"]:
    """The dtype of the first weight."""
    return "bfloat16" if next(iter(tensors))[1].dtype == torch.bfloat16 else "float32"


def context_length(model: Any) -> int:
    """The longest row that the model can read; see `architecture.context_length`."""
    return architecture.context_length(model.config)


def weights_sha256(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash names, dtypes, shapes and bytes of all weights; tied weights count once.

    The hash does not depend on the file format, so the record of an evaluation can be checked against a checkpoint or a
    live model.
    """

    def digest(pair: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = pair
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        head = f"{name}|{flat.dtype}|{tuple(tensor.shape)}|".encode()
        return hashlib.sha256(head + hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()).digest()

    # sha256 releases the GIL, so threads share the work.
    with ThreadPoolExecutor() as pool:
        parts = pool.map(digest, sorted(tensors, key=lambda pair: pair[0]))
        return hashlib.sha256(b"".join(parts)).hexdigest()
