"""The local learner: one torch model on one device."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from grpo_gsm8k.config import TrainConfig
from grpo_gsm8k.errors import CheckpointError, NonFiniteError
from grpo_gsm8k.trainer.batch import Batch
from grpo_gsm8k.trainer.logprobs import token_logprobs
from grpo_gsm8k.trainer.objectives import (
    Objective,
    add_sums,
    policy_metrics,
    policy_sums,
    rows_to_train,
    slope,
    update_loss,
)
from grpo_gsm8k.trainer.optimizer import MasterAdamW
from grpo_gsm8k.trainer.plan import auto_cells, out_of_memory
from grpo_gsm8k.trainer.policy import weights_sha256


class TorchLearner:
    """Implements `datatypes.Learner` for a transformers model."""

    def __init__(self, model: Any, tokenizer: Any, cfg: TrainConfig, reference: bool = False) -> None:
        """`model` is trained in place; `tokenizer` (or a renderer) is saved beside its weights.

        Args:
            reference: keep a frozen copy of `model` as it is now, for the KL term.
        """
        self.model, self.tokenizer, self.cfg = model, tokenizer, cfg
        self.reference = copy.deepcopy(model).eval().requires_grad_(False) if reference else None
        self.reference_sha256 = weights_sha256(model.named_parameters()) if reference else ""
        self.device: torch.device = next(model.parameters()).device
        self.model.train()
        self.optimizer = MasterAdamW(model, cfg)

    @functools.cached_property
    def budget(self) -> int:
        """Padded cells of a microbatch: as configured, or what fits beside all that is there at its first use."""
        return self.cfg.max_tokens_per_microbatch or auto_cells(self.model)

    def forward_backward(self, batch: Batch, objective: Objective) -> dict[str, float]:
        """Accumulate the gradient of one whole update, microbatch by microbatch.

        Rows that cannot have a gradient are skipped (`objectives.rows_to_train`); the weights of the others are set
        from the whole update, so the gradient is the same.

        Returns:
            the loss, `objectives.policy_metrics`, and `perf/` figures, all of the whole update, over the rows that
            were not skipped; `perf/skipped_rows_frac` says how many were.

        Raises:
            NonFiniteError: when the loss is NaN or infinite. No gradient is kept.
            ConfigError: when a microbatch does not fit into the GPU's memory; says what to lower.
        """
        rows = rows_to_train(batch, objective)
        started, loss_total, sums, cells = time.perf_counter(), 0.0, dict[str, float](), 0
        for _, part in batch.microbatches(self.budget, rows):
            with self._room_for(part):
                part = part.to(self.device)
                foretold = slope(part, objective)
                logp, entropies = token_logprobs(self.model, part, objective.temperature, slope=foretold)
                loss = update_loss(logp, part, objective)
                if not math.isfinite(value := float(loss.detach())):
                    self.optimizer.zero_grad()
                    raise NonFiniteError(f"the loss is {value}")
                loss.backward()
            loss_total += value
            cells += part.input_ids.numel()
            add_sums(sums, policy_sums(logp, entropies, part, objective))
        seconds, tokens = time.perf_counter() - started, sum(batch.lengths[row] for row in rows)
        return {
            "loss": loss_total,
            **policy_metrics(sums),
            "perf/tokens_per_s": tokens / seconds,
            "perf/padding_frac": 1 - tokens / cells if cells else 0.0,
            "perf/skipped_rows_frac": 1 - len(rows) / len(batch),
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
        for rows, part in batch.microbatches(self.budget, batch.rows_with_targets()):
            with self._room_for(part):
                logp, _ = token_logprobs(model, part.to(self.device), temperature, entropy=False)
            out[rows, : logp.shape[1]] = logp.cpu()
        return out

    @contextmanager
    def _room_for(self, part: Batch) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise out_of_memory(len(part), max(part.lengths), self.budget) from None

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors of the weights, tied ones once."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def save(self, folder: Path) -> None:
        """A model folder that transformers loads, with the optimizer and the generator's state beside it."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        rng = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        state = {name: t.detach().cpu().contiguous() for name, t in self.optimizer.state().items()}
        save_file(state | rng, folder / "optimizer.safetensors", {"reference": self.reference_sha256})

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            CheckpointError: when it is of another model, or its run had another reference model.
        """
        with safe_open(folder / "optimizer.safetensors", "pt") as stored_state:
            before = (stored_state.metadata() or {}).get("reference", "")
        if before != self.reference_sha256:
            raise CheckpointError(
                f"{folder}: its KL term held to another reference model: the weights of {self.cfg.model_id} "
                "have changed since the run began; put them back, or pick another --out_dir"
            )
        stored = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        fresh, mine = dict(stored.named_parameters()), dict(self.model.named_parameters())
        strange = [
            n for n in mine.keys() | fresh.keys() if n not in mine or n not in fresh or mine[n].shape != fresh[n].shape
        ]
        if strange:
            raise CheckpointError(f"{folder}: a checkpoint of another model; differs in {sorted(strange)[0]}")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(fresh[name])
        flat = load_file(folder / "optimizer.safetensors")
        torch.set_rng_state(flat.pop("rng.cpu"))
        if "rng.cuda" in flat:
            torch.cuda.set_rng_state(flat.pop("rng.cuda"), self.device)
        self.optimizer.load_state(flat)
