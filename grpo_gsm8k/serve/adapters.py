"""The base model, and LoRA adapters of several ranks side by side on it; or the base's own weights, once more.

`BaseModel.put` lays an adapter on the base under a name and `activate` chooses the one that the next pass reads. An
adapter's tensors bear peft's names, `base_model.model.<module>.lora_A.weight`, in memory as on disk.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from grpo_gsm8k.config import ModelConfig
from grpo_gsm8k.engines.hf import check_cache
from grpo_gsm8k.errors import ModelError
from grpo_gsm8k.runs.files import real_path
from grpo_gsm8k.serve.jobs import Refusal
from grpo_gsm8k.tasks.render import Renderer
from grpo_gsm8k.trainer import architecture, packing
from grpo_gsm8k.trainer.kernels import choose_attention
from grpo_gsm8k.trainer.logprobs import check_head
from grpo_gsm8k.trainer.policy import load_model, load_tokenizer
from grpo_gsm8k.trainer.pretrained import adapter_config

PREFIX = "base_model.model."
MOST_RANK = 512
_GENERATOR = threading.Lock()  # torch's, which peft draws a new adapter from
_ATTENTION = re.compile(r"attn|attention", re.I)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ModelSpec:
    """What of the base is trained: an adapter of this rank on these parts; rank 0 is every weight.

    Attributes:
        alpha: the adapter's product is scaled by alpha / rank.
        seed: decides the adapter's A; its B is 0 at first, so a new adapter changes nothing.
    """

    rank: int = 32
    alpha: int = 32
    seed: int = 0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True

    def as_json(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)

    def check(self) -> None:
        """Raise `Refusal` for what cannot be trained."""
        if not 0 <= self.rank <= MOST_RANK:
            raise Refusal(f"lora rank {self.rank}: it must be 1 to {MOST_RANK}, or 0 for the full weights")
        if self.rank and not (self.train_attn or self.train_mlp or self.train_unembed):
            raise Refusal("train_attn, train_mlp and train_unembed are all false: nothing would be trained")
        if not 0 <= self.seed < 2**63:
            raise Refusal(f"seed {self.seed}: it must be at least 0 and below 2^63")


class BaseModel:
    """The frozen model that all adapters lie on, proven to be read exactly."""

    def __init__(self, cfg: ModelConfig) -> None:
        """Raises `ModelError` where it cannot be loaded, trained or sampled exactly."""
        self.cfg = cfg
        if adapter_config(cfg):
            raise ModelError(f"{cfg.model_id} is an adapter: make it a model of its own first, with `grpo-gsm8k merge`")
        self.renderer = Renderer.of(cfg, load_tokenizer(cfg))
        self.model = self._loaded()
        self.packs = packing.enable(self.model) if self.model.device.type == "cpu" else False
        check_head(self.model)
        check_cache(self.model)
        self.device: torch.device = self.model.device
        self.context = architecture.context_length(self.model.config)
        self.vocabulary = int(self.model.get_input_embeddings().weight.shape[0])
        self.modules = self._linear_modules()
        ends = self.model.generation_config.eos_token_id if self.model.generation_config else None
        self.stop_ids = self.renderer.stop_ids | set([ends] if isinstance(ends, int) else ends or [])
        self.held: dict[str, ModelSpec] = {}
        self._layers: list[Any] = []
        self._active = ""

    def _loaded(self) -> Any:
        model = load_model(self.cfg).requires_grad_(False)
        architecture.compute_all_of_attention(model)
        choose_attention(model)
        architecture.silence(model, checkpointing=False)
        return model

    def copy(self) -> Any:
        """The base once more, as it is on disk: for weights of its own."""
        model = self._loaded()
        if self.packs:
            packing.enable(model)
        return model

    @property
    def folder(self) -> str:
        """Where the base is, for whoever loads an adapter elsewhere: a folder, or a name on the hub."""
        return str(real_path(self.cfg.model_id)) if Path(self.cfg.model_id).is_dir() else self.cfg.model_id

    def _linear_modules(self) -> dict[str, list[str]]:
        """The names of the layers that an adapter can lie on: attn, mlp (all others of a layer), unembed."""
        head = self.model.get_output_embeddings()
        found: dict[str, list[str]] = {"attn": [], "mlp": [], "unembed": []}
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear):
                kind = "unembed" if module is head else "attn" if _ATTENTION.search(name) else "mlp"
                found[kind].append(name)
        return found

    def targets(self, spec: ModelSpec) -> list[str]:
        """The layers that an adapter of this kind lies on. Raises `Refusal` where the model has none of a kind."""
        wanted = [kind for kind in ("attn", "mlp", "unembed") if getattr(spec, f"train_{kind}")]
        if absent := [kind for kind in wanted if not self.modules[kind]]:
            raise Refusal(f"train_{absent[0]}: {architecture.name(self.model)} has no such linear layers")
        return [name for kind in wanted for name in self.modules[kind]]

    # ------------------------------------------------------------------------------------------------ adapters

    def put(self, name: str, spec: ModelSpec, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Lay a fresh adapter on the base, or these tensors.

        Raises:
            Refusal: the tensors are not those of such an adapter.
        """
        from peft import inject_adapter_in_model

        with _GENERATOR, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # That there are several adapters, and that a tied head has one: both are meant.
            warnings.simplefilter("ignore", UserWarning)
            torch.manual_seed(spec.seed)
            inject_adapter_in_model(lora_config(spec, self.targets(spec)), self.model, name)
        self.held[name] = spec
        self._layers, self._active = [m for m in self.model.modules() if _is_lora(m)], "?"
        self.activate(name)
        for parameter in self.parameters(name).values():
            parameter.data = parameter.data.to(self.model.dtype)
        if tensors is not None:
            try:
                copy_into(self.parameters(name), tensors)
            except Refusal:
                self.drop(name)
                raise

    def drop(self, name: str) -> None:
        """Take an adapter off the base."""
        self.activate("")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that another one becomes the active one
            for module in self._layers:
                if name in module.lora_A:
                    module.delete_adapter(name)
        del self.held[name]

    def activate(self, name: str) -> Any:
        """The base with this adapter, with none for ""; it alone can have a gradient."""
        if name != self._active:
            for module in self._layers:
                module.enable_adapters(bool(name))
                if name:
                    module.set_adapter(name)
            self._active = name
        return self.model

    def parameters(self, name: str) -> dict[str, torch.nn.Parameter]:
        """An adapter's parameters under peft's names."""
        found = {}
        for where, module in self.model.named_modules():
            for part in ("lora_A", "lora_B"):
                if _is_lora(module) and name in getattr(module, part):
                    found[f"{PREFIX}{where}.{part}.weight"] = getattr(module, part)[name].weight
        return found


def _is_lora(module: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def lora_config(spec: ModelSpec, targets: list[str], base: str | None = None) -> Any:
    """The adapter as peft describes it."""
    from peft import LoraConfig

    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


@torch.no_grad()
def copy_into(parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into parameters of the same names and shapes. Raises `Refusal`, and copies nothing, for others."""
    strange = sorted(
        name
        for name in parameters.keys() | tensors.keys()
        if name not in parameters or name not in tensors or parameters[name].shape != tensors[name].shape
    )
    if strange:
        raise Refusal(f"these weights are of another model: they differ in {strange[0]} (and {len(strange) - 1} more)")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
