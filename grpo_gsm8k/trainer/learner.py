"""The local learner: one torch model on one device. `trainer/sharded.py` has that of several ranks."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from grpo_gsm8k.config import TrainConfig
from grpo_gsm8k.errors import CheckpointError, NonFiniteError
from grpo_gsm8k.trainer import shards
from grpo_gsm8k.trainer.batch import Batch
from grpo_gsm8k.trainer.logprobs import token_logprobs
from grpo_gsm8k.trainer.objectives import Objective, add_sums, per_token_loss, policy_metrics, policy_sums
from grpo_gsm8k.trainer.optimizer import MasterAdamW, State
from grpo_gsm8k.trainer.policy import weights_sha256


class TorchLearner:
    """Implements `datatypes.Learner` for a transformers model."""

    def __init__(self, model: Any, tokenizer: Any, cfg: TrainConfig, reference: bool = False) -> None:
        """`model` is trained in place; `tokenizer` (or a renderer) is saved beside its weights.

        Args:
            reference: keep a frozen copy of `model` as it is now, for the KL term.
        """
        self.tokenizer, self.cfg = tokenizer, cfg
        self.device: torch.device = next(model.parameters()).device
        self.reference_sha256 = weights_sha256(model.named_parameters()) if reference else ""
        self.reference = self._place(copy.deepcopy(model).eval().requires_grad_(False)) if reference else None
        self.model = self._place(model).train()
        if cfg.activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = self._make_optimizer()

    def forward_backward(self, batch: Batch, objective: Objective) -> dict[str, float]:
        """Accumulate the gradient of one whole update, microbatch by microbatch.

        Returns:
            the loss, `objectives.policy_metrics`, and `perf/` figures, all of the whole update.

        Raises:
            NonFiniteError: when the loss is NaN or infinite. No gradient is kept.
        """
        started, sums = time.perf_counter(), {"loss": 0.0, "cells": 0.0}
        for _, part in self._microbatches(batch):
            part = part.to(self.device)
            logp, entropies = self._token_logprobs(self.model, part, objective.temperature)
            loss = (part.weights * per_token_loss(logp, part, objective)).sum()
            loss.backward()
            add_sums(sums, {"loss": float(loss.detach()), "cells": part.input_ids.numel()})
            add_sums(sums, policy_sums(logp, entropies, part, objective))
        sums = self._of_the_update(sums)
        loss_total, cells = sums.pop("loss"), sums.pop("cells")
        if not math.isfinite(loss_total):
            self.optimizer.zero_grad()
            raise NonFiniteError(f"the loss is {loss_total}")
        seconds = time.perf_counter() - started
        return {
            "loss": loss_total,
            **policy_metrics(sums),
            "perf/tokens_per_s": sum(batch.lengths) / seconds,
            "perf/padding_frac": 1 - min(sum(batch.lengths) / max(cells, 1), 1.0),
        }

    def step(self, lr: float) -> dict[str, float]:
        """One optimizer step; see `MasterAdamW.step`."""
        return self.optimizer.step(lr)

    @torch.no_grad()
    def logprobs(self, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities of the targets from a frozen pass, `(B, T)` on the CPU."""
        return self._frozen_pass(self.model, batch, temperature)

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """The same of the model that the run began with, whatever has been trained or loaded since."""
        assert self.reference is not None, "this learner was made without a reference model"
        return self._frozen_pass(self.reference, batch, temperature)

    def _frozen_pass(self, model: Any, batch: Batch, temperature: float) -> torch.Tensor:
        out = torch.zeros_like(batch.mask)
        for rows, part in self._microbatches(batch):
            logp, _ = self._token_logprobs(model, part.to(self.device), temperature, entropy=False)
            out[rows, : logp.shape[1]] = logp.cpu()
        return out

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Names and tensors of the weights, tied ones once."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def save(self, folder: Path) -> None:
        """A model folder that transformers loads, with the optimizer and the generator's state beside it."""
        self.model.save_pretrained(folder)
        self._save_beside(folder, self.optimizer.state())

    def _save_beside(self, folder: Path, state: State) -> None:
        self.tokenizer.save_pretrained(folder)
        rng = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        state = {name: t.detach().cpu().contiguous() for name, t in state.items()}
        save_file(state | rng, folder / "optimizer.safetensors", {"reference": self.reference_sha256})

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            CheckpointError: when it is of another model, or its run had another reference model.
        """
        with safe_open(folder / "optimizer.safetensors", "pt") as stored_state:
            before = (stored_state.metadata() or {}).get("reference", "")
            rng = {name: stored_state.get_tensor(name) for name in stored_state.keys() if name.startswith("rng.")}  # noqa: SIM118
        if before != self.reference_sha256:
            raise CheckpointError(
                f"{folder}: its KL term held to another reference model: the weights of {self.cfg.model_id} "
                "have changed since the run began; put them back, or pick another --out_dir"
            )
        stored = AutoModelForCausalLM.from_pretrained(folder, dtype=self.model.dtype)
        fresh, mine = dict(stored.named_parameters()), dict(self.model.named_parameters())
        strange = [
            n for n in mine.keys() | fresh.keys() if n not in mine or n not in fresh or mine[n].shape != fresh[n].shape
        ]
        if strange:
            raise CheckpointError(f"{folder}: a checkpoint of another model; differs in {sorted(strange)[0]}")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(self._shard(fresh[name]))
        torch.set_rng_state(rng["rng.cpu"])
        if "rng.cuda" in rng:
            torch.cuda.set_rng_state(rng["rng.cuda"], self.device)
        self.optimizer.load_state(shards.read(folder, self._empty))

    # Where one process differs from the ranks of trainer/sharded.py, which see to their share alone.

    def _place(self, model: Any) -> Any:
        return model

    def _make_optimizer(self) -> MasterAdamW:
        return MasterAdamW(self.model, self.cfg)

    def _microbatches(self, batch: Batch) -> Iterable[tuple[list[int], Batch]]:
        return batch.microbatches(self.cfg.max_tokens_per_microbatch)

    def _token_logprobs(
        self, model: Any, part: Batch, temperature: float, entropy: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(model, part, temperature, entropy)

    def _of_the_update(self, sums: dict[str, float]) -> dict[str, float]:
        return sums

    def _shard(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def _empty(self, name: str, size: torch.Size) -> torch.Tensor:
        return torch.empty(size)
