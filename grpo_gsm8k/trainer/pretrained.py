"""Loads a model or a tokenizer from a folder or the hub: exactly as stored, or not at all, with a one-line error.

transformers initialises missing weights at random and drops unknown ones, with a warning; here both are errors. A
model's own code is never run, and pickled weights are read with `weights_only`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from grpo_gsm8k.config import PromptConfig, at_service
from grpo_gsm8k.engines.service import tokenizer_of
from grpo_gsm8k.errors import ModelError

ADAPTER_CONFIG = "adapter_config.json"  # peft's own name
DESCRIPTIONS = ("config.json", ADAPTER_CONFIG)  # of a model, of a LoRA adapter that names its model
TOKENIZERS = (*DESCRIPTIONS, "tokenizer.json", "tokenizer_config.json")  # a tokenizer's folder may have no model
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
HUB_PATIENCE_S = 2.0  # for a connection; the hub's own client tries for 23 seconds, once for each file
BROKEN = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, ArithmeticError),
    *(RuntimeError, AssertionError, SafetensorError, UnpicklingError),
)
"""What transformers raises on missing, truncated or invalid files."""


def read_model(cfg: PromptConfig, dtype: torch.dtype) -> Any:
    """Load the causal language model of `cfg.model_id` on the CPU, with its adapter if the folder has one.

    Raises:
        ModelError: there is none, it cannot be read, or its files and its description do not match tensor by tensor.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import LoadStateDictConfig

    hold_here(cfg.model_id)
    config = adapter_config(cfg)
    base, revision = cfg.model_id, cfg.revision
    if config:
        base, revision = _base_of(config)
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }  # so that the report says
    model, report = read(AutoModelForCausalLM, base, revision, cfg.cache_dir, **kwargs)
    _hold_to(report, base)
    if config:
        with one_line(cfg.model_id), _quiet():
            lenient = LoadStateDictConfig(ignore_mismatched_sizes=True)
            kwargs = _pickled_adapter(config.parent) or {"peft_model_id": str(config.parent)}
            report = model.load_adapter(**kwargs, is_trainable=True, load_config=lenient).to_dict()
            exact = _take_adapter(model, config.parent)
        if not exact:
            _hold_to(report, cfg.model_id, adapter=True)
        model.eval()
    _hold_to_finite(model, cfg.model_id)
    return model


def hold_here(model_id: str) -> None:
    """Raise `ModelError` for a model whose weights a training service holds."""
    if at_service(model_id):
        raise ModelError(
            f"{model_id}: its weights are at a training service: train them there with --learner tinker, or take them "
            "home with `grpo-gsm8k export --model tinker://… --out DIR`"
        )


def read(
    factory: Any,
    where: str,
    revision: str = "",
    cache_dir: str = "",
    holds: Sequence[str] = DESCRIPTIONS,
    **kwargs: Any,
) -> Any:
    """`factory.from_pretrained`, with what a user can mend printed in one line, and no code but transformers' own.

    Args:
        holds: files of which a folder must have one.

    Raises:
        ModelError: for everything in `BROKEN`.
    """
    known = _known_place(where, holds)
    if revision and not known:
        kwargs["revision"] = revision
    with one_line(where), _quiet(), _without_retries(known):
        return factory.from_pretrained(where, cache_dir=cache_dir or None, trust_remote_code=False, **kwargs)


def read_tokenizer(cfg: PromptConfig) -> Any:
    """The tokenizer of `cfg.model_id`; of an adapter that brings none, its base's.

    Raises:
        ModelError: there is none, or one that knows no text.
    """
    from transformers import AutoTokenizer

    where, revision = tokenizer_of(cfg), cfg.revision
    config = adapter_config(cfg) if where == cfg.model_id and Path(where).is_dir() else None
    if config and not any(config.parent.glob("*token*")):
        where, revision = _base_of(config)
    tokenizer = read(AutoTokenizer, where, revision, cfg.cache_dir, TOKENIZERS)
    with one_line(where):
        ids = tokenizer("3 + 4 = 7", add_special_tokens=False)["input_ids"]
    if not set(ids) - {tokenizer.unk_token_id}:  # without its files it has special tokens alone
        files = ", ".join(sorted({*tokenizer.vocab_files_names.values(), "tokenizer.json"}))
        raise ModelError(f"{where}: its tokenizer encodes no text; its files are missing or empty ({files})")
    return tokenizer


def generation_ends(cfg: PromptConfig) -> list[int]:
    """The ids that end a sequence, as the generation config beside the tokenizer has them; [] without one."""
    from transformers import GenerationConfig

    try:
        found = read(GenerationConfig, tokenizer_of(cfg), cfg.revision, cfg.cache_dir, TOKENIZERS).eos_token_id
    except ModelError:
        return []
    return [found] if isinstance(found, int) else list(found or [])


def adapter_config(cfg: PromptConfig) -> Path | None:
    """The adapter config of `cfg.model_id`; None for a model without an adapter.

    Raises:
        ModelError: the folder is a model as well.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    known = _known_place(cfg.model_id)
    with one_line(cfg.model_id), _quiet(), _without_retries(known):
        revision = None if known else cfg.revision or None
        found = find_adapter_config_file(cfg.model_id, cache_dir=cfg.cache_dir or None, revision=revision)
    if not found:
        return None
    if known and (known / "config.json").is_file():
        raise ModelError(f"{known}: holds a model (config.json) and an adapter ({ADAPTER_CONFIG}): which one is meant?")
    return Path(found)


def adapter_weights(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """All weights of an adapter under peft's names, including DoRA's magnitudes, biases and whole layers."""
    from peft import get_peft_model_state_dict

    every = dict(model.named_parameters(remove_duplicate=False))
    yield from get_peft_model_state_dict(model, every, "default", save_embedding_layers=False).items()


def _pickled_adapter(folder: Path) -> dict[str, Any]:
    """Arguments that make transformers read a pickled adapter, which it does not look for; {} without one."""
    from peft import PeftConfig

    if (folder / "adapter_model.safetensors").is_file() or not (folder / "adapter_model.bin").is_file():
        return {}
    stored = torch.load(folder / "adapter_model.bin", "cpu", weights_only=True)
    return {"peft_config": PeftConfig.from_pretrained(str(folder)), "adapter_state_dict": stored}


@torch.no_grad()
def _take_adapter(model: Any, folder: Path) -> bool:
    """Copy the adapter's weights from its file if they match exactly; transformers misses some of DoRA's.

    Returns:
        whether it does. The weights of the embedding itself, which peft adds to its file, are the model's.
    """
    files = [path for path in (folder / "adapter_model.safetensors", folder / "adapter_model.bin") if path.is_file()]
    if not files:
        return False
    path = files[0]
    stored = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    stored = {name.removeprefix("base_model.model."): tensor for name, tensor in stored.items()}
    base = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters(remove_duplicate=False)}
    own = dict(adapter_weights(model))
    for name in [name for name in stored.keys() - own.keys() if ".base_layer." in name]:
        held = base.get(name.replace(".base_layer.", "."))
        if held is not None and torch.equal(held, stored[name].to(held.dtype)):
            del stored[name]
    if stored.keys() != own.keys() or any(stored[name].shape != own[name].shape for name in own):
        return False
    for name, parameter in own.items():
        parameter.copy_(stored[name])
    return True


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: safetensors if there are any, else pickles."""
    found = sorted(folder.glob("*.safetensors"))
    return found or sorted(folder.glob("*model*.bin"))


def _base_of(config: Path) -> tuple[str, str]:
    """The model that an adapter belongs to, and its revision."""
    try:
        stored = json.loads(config.read_text(encoding="utf-8"))
        base, revision = stored["base_model_name_or_path"], stored.get("revision")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as fault:
        raise ModelError(f"{config}: does not describe an adapter: {type(fault).__name__}: {fault}") from None
    if not isinstance(base, str) or not base:
        raise ModelError(f"{config}: base_model_name_or_path does not name the adapter's model")
    return base, revision or ""


def _known_place(where: str, holds: Sequence[str] = DESCRIPTIONS) -> Path | None:
    """The folder that a model is in; None for a name on the hub. Raises `ModelError` for what is neither.

    Args:
        holds: files of which such a folder has one.
    """
    folder = Path(where)
    if where and folder.is_dir():
        if not any((folder / name).is_file() for name in holds):
            raise ModelError(f"{where}: this folder holds no model (no {' and no '.join(DESCRIPTIONS)})")
        return folder
    if folder.is_file():
        raise ModelError(f"{where}: is a file; --model_id takes a model's folder, or a name on the hub")
    if not HUB_NAME.fullmatch(where) or where.startswith((".", "-")) or ".." in where or len(where) > 96:
        raise ModelError(f"cannot load model {where!r}: there is no such folder, and it is not a name on the hub")
    return None


@contextmanager
def one_line(where: str) -> Iterator[None]:
    """Turn errors about a model's files into a `ModelError` with advice."""
    try:
        yield
    except BaseException as fault:
        # tokenizers raises Exception itself, and huggingface_hub has errors of its own.
        theirs = type(fault) is Exception or type(fault).__module__.startswith("huggingface_hub")
        if theirs or isinstance(fault, BROKEN):
            raise ModelError(_reason(where, fault)) from None
        raise


def _reason(where: str, fault: BaseException) -> str:
    """Why a model cannot be loaded, and what to do."""
    reason = " ".join(str(fault).split())[:300] or "no reason given"
    if "trust_remote_code" in reason or "custom code" in reason:
        return (
            f"{where}: needs its own code (auto_map in its config), which is never run here; choose a model that "
            "transformers knows"
        )
    if broken := _first_unreadable(Path(where)):
        return f"cannot load model {where!r}: {broken}"
    if isinstance(fault, OSError) and not Path(where).is_dir():
        return (
            f"cannot load model {where!r}: neither a model folder nor a model that the hub gave us "
            f"(pass a folder, check the name, or see `grpo-gsm8k doctor`): {reason}"
        )
    kind = "" if isinstance(fault, OSError | ValueError) else f"{type(fault).__name__}: "
    return f"cannot load model {where!r}: {kind}{reason}"


def _first_unreadable(folder: Path) -> str:
    """Name the damaged file of a folder, and the damage; "" if there is none."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as fault:
            return f"{path} cannot be read: {fault}"
    for path in weight_files(folder):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            else:
                torch.load(path, map_location="meta", weights_only=True)
        except (OSError, SafetensorError) as fault:
            return f"{path} is damaged: {fault}"
        except (UnpicklingError, RuntimeError, EOFError, ValueError):
            return f"{path} is damaged, or a pickle of more than weights, which is not opened here"
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars, warnings and tables."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours are on stderr, and theirs would stand between them
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# ------------------------------------------------------------------------------------------------- the report


def _hold_to(report: Mapping[str, Any], where: str, adapter: bool = False) -> None:
    """Raise `ModelError` unless the files hold exactly the model's tensors."""
    found = []
    missing, strange = sorted(report["missing_keys"]), sorted(filter(_matters, report["unexpected_keys"]))
    if missing:
        found.append(f"{missing[0]} is missing{_others(missing)}")
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, wanted = mismatched[0][:3]
        found.append(f"{name} is {_shape(stored)}, the model's is {_shape(wanted)}{_others(mismatched)}")
    if strange:
        found.append(f"{strange[0]} is not a weight of this model{_others(strange)}")
    if errors := report.get("error_msgs"):
        found.append(" ".join(str(errors[0]).split())[:300])
    if found:
        what = "adapter" if adapter else "model"
        first = next(iter([*missing, *(m[0] for m in mismatched), *strange]), "")
        raise ModelError(
            f"{_file_of(Path(where), strange[:1] or [first])}: not the weights of the {what} that "
            f"{DESCRIPTIONS[adapter]} describes: {'; '.join(found)}"
        )


def _matters(name: str) -> bool:
    """Whether an unknown tensor matters: recomputed buffers do not."""
    return not re.search(r"(rotary_emb\.inv_freq|position_ids|attn\.masked_bias|attention\.masked_bias)$", name)


def _others(names: Iterable[Any]) -> str:
    more = len(list(names)) - 1
    return f" (and {more} more)" if more else ""


def _shape(size: Iterable[int]) -> str:
    return "x".join(map(str, size)) or "a number"


def _file_of(folder: Path, names: Iterable[str]) -> Path:
    """The file that holds the first of these tensors, or should hold it."""
    files = weight_files(folder) if folder.is_dir() else []
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as stored:
                if set(names) & set(stored.keys()):
                    return path
    index = next(iter(sorted(folder.glob("*.index.json"))), None) if files else None
    return index or (files[0] if len(files) == 1 else folder)


def _hold_to_finite(model: Any, where: str) -> None:
    """Raise `ModelError` for a weight that is NaN or infinite."""
    for name, weight in model.named_parameters():
        if weight.numel() and weight.is_floating_point():
            low, high = torch.aminmax(weight.detach())
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise ModelError(f"{_file_of(Path(where), [name])}: the weight {name} holds NaN or infinite numbers")


# ---------------------------------------------------------------------------------------------------- the hub


@contextmanager
def _without_retries(known: Path | None) -> Iterator[None]:
    """If the hub cannot be reached, use its cache only."""
    from transformers.utils import hub as transformers_hub

    hub: Any = transformers_hub
    before = hub.constants.HF_HUB_OFFLINE
    if known is None and not before and not _reachable(os.environ.get("HF_ENDPOINT") or "https://huggingface.co"):
        hub.constants.HF_HUB_OFFLINE = True
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # no weights from a bot's branch
    try:
        yield
    finally:
        hub.constants.HF_HUB_OFFLINE = before


@functools.lru_cache(maxsize=1)
def _reachable(endpoint: str) -> bool:
    """Whether the hub, or the proxy to it, accepts connections. In a thread, since name resolution may hang."""
    scheme = urlsplit(endpoint).scheme
    names = (f"{scheme}_proxy", f"{scheme.upper()}_PROXY", "all_proxy", "ALL_PROXY")
    proxy = next((os.environ[name] for name in names if os.environ.get(name)), "")
    parts = urlsplit(proxy if "//" in proxy else f"http://{proxy}") if proxy else urlsplit(endpoint)
    answered: list[bool] = []

    def connect() -> None:
        try:
            address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
            socket.create_connection(address, HUB_PATIENCE_S).close()
            answered.append(True)
        except (OSError, ValueError):
            answered.append(False)

    asking = threading.Thread(target=connect, daemon=True)
    asking.start()
    asking.join(HUB_PATIENCE_S)
    return bool(answered and answered[0])
