"""The local learner: one torch model on one device. `trainer/sharded.py` extends it to several ranks."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from grpo_gsm8k.config import PromptConfig, TrainConfig
from grpo_gsm8k.datatypes import Datum, WeightsRef
from grpo_gsm8k.errors import CheckpointError, NonFiniteError
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.trainer import adapter, architecture, costs, dcp, memory, packing, pretrained, snapshot
from grpo_gsm8k.trainer.batch import Batch, make_batch, unshifted
from grpo_gsm8k.trainer.compiled import compiles
from grpo_gsm8k.trainer.kernels import choose_attention
from grpo_gsm8k.trainer.logprobs import check_head, plain_logprobs, token_logprobs
from grpo_gsm8k.trainer.losses import Objective, fused_grad, rows_to_train, update_loss
from grpo_gsm8k.trainer.metrics import policy_metrics, policy_sums, read_sums
from grpo_gsm8k.trainer.optimizer import MasterAdamW, OffloadedAdamW, State
from grpo_gsm8k.trainer.policy import context_length, weights_sha256
from grpo_gsm8k.trainer.ranks import world

Scored = tuple[torch.Tensor, dict[str, torch.Tensor]]  # what `token_logprobs` returns
OPTIMIZER = f"{dcp.FOLDER}/state.safetensors"  # in a subfolder: vLLM reads every *.safetensors beside a model


class TorchLearner:
    """Implements `datatypes.Learner` for a transformers model."""

    digest = staticmethod(weights_sha256)

    def __init__(self, model: Any, tokenizer: Any, cfg: TrainConfig, reference: bool = False) -> None:
        """Trains `model` in place; saves `tokenizer` (or a renderer) beside its weights.

        Dropout is off in every pass (`architecture.silence`), so that an update sees the probabilities of a frozen pass
        and of the sampler. A mixture of experts is trained without its router loss.

        Args:
            reference: keep a frozen copy of `model`, or of its adapter, for the KL term.
        """
        self.tokenizer, self.cfg = tokenizer, cfg
        self.device: torch.device = next(model.parameters()).device
        architecture.compute_all_of_attention(model)
        choose_attention(model)
        self.packs = packing.chosen(model.eval(), cfg.packing)
        check_head(model)
        adapted = adapter.has_adapter(model)
        self.origin_sha256 = weights_sha256(model.named_parameters()) if reference or adapted else ""
        self.reference = self.first_adapter = None
        if reference and adapted:
            self.first_adapter = {name: p.detach().clone() for name, p in adapter.own_weights(model)}
        elif reference:
            self.reference = self._place(copy.deepcopy(model).eval().requires_grad_(False))
        self.model = self._place(model)
        architecture.silence(self.model, cfg.activation_checkpointing)
        if coefficient := architecture.router_loss(model):
            say(f"{architecture.name(model)}: its router loss (router_aux_loss_coef {coefficient:g}) is left out")
        compiled = compiles(self.model, cfg, self.packs, world().size)
        self.optimizer = self._make_optimizer()
        self.gauge = memory.gauge_of(self.model, cfg, self.optimizer.dtype, world().size, compiled)
        self.probed: memory.Probed | None = None
        self._buffers = snapshot.Buffers()
        self._published: WeightsRef | None = None

    @functools.cached_property
    def budget(self) -> int:
        """Maximum cells of a microbatch (`Batch.cells`): as configured, or what fits, measured on first use."""
        return self.cfg.max_tokens_per_microbatch or self._cells_that_fit()

    def forward_backward(self, data: Sequence[Datum], objective: Objective) -> dict[str, float]:
        """Accumulate the gradient of one whole update, microbatch by microbatch.

        It skips rows without a gradient (`losses.rows_to_train`); the weights are set over the whole pass, so the
        gradient stays the same.

        Returns:
            the loss, `metrics.policy_metrics` and `perf/` metrics of the whole update, over the rows that were not
            skipped. `perf/skipped_rows_frac` is the share of skipped rows, `perf/padding_frac` of padded cells, and
            `perf/shared_frac` of tokens whose prefix another row had computed.

        Raises:
            NonFiniteError: the loss is NaN or infinite. The gradient is cleared.
            ConfigError: a microbatch does not fit into GPU memory; says what to lower.
        """
        batch = make_batch(data)
        rows = rows_to_train(batch, objective)
        self.budget  # noqa: B018  (its probe leaves no gradient, so it comes before the first pass)
        if self.gauge:
            self.gauge.start()
        started = time.perf_counter()
        sums = self._of_the_update(self._passes(batch, rows, objective))
        loss_total, cells, pairs = (sums.pop(name) for name in ("loss", "cells", "pairs"))
        if not math.isfinite(loss_total):
            self.optimizer.zero_grad()
            raise NonFiniteError(f"the loss is {loss_total}")
        seconds, lengths = time.perf_counter() - started, [batch.lengths[row] for row in rows]
        tokens = sum(lengths)
        targets = int(batch.mask[rows].sum())
        speed = self.gauge.speed(min(tokens, int(cells)), targets, int(pairs), seconds) if self.gauge else {}
        return {
            "loss": loss_total,
            **policy_metrics(sums),
            "perf/tokens_per_s": tokens / seconds,
            "perf/padding_frac": _missing(tokens, cells),
            "perf/shared_frac": _missing(cells, tokens),
            "perf/skipped_rows_frac": 1 - len(rows) / len(batch),
            **speed,
        }

    def _passes(
        self, batch: Batch, rows: Sequence[int], objective: Objective, retried: bool = False
    ) -> dict[str, float]:
        """Run all microbatches of an update; if one runs out of memory, start again with smaller ones."""
        sums, cells, pairs, stuck = [], 0, 0, None
        for _, part in self._microbatches(batch, rows):
            if self.gauge:
                self.gauge.record(part)
            try:
                sums.append(self._pass(part, objective))
            except torch.OutOfMemoryError:
                stuck = part  # handled below: the traceback keeps the tensors of the pass alive
                break
            cells += part.cells
            pairs += costs.causal_pairs(part.lengths) - costs.causal_pairs(part.shared)
        if stuck is None:
            work = {"cells": float(cells), "pairs": float(pairs)}
            return {**work, **({"loss": 0.0} if not sums else {}), **read_sums(sums)}
        self._halve_budget(stuck, retried)
        self.optimizer.zero_grad()  # the pass may have accumulated some gradients
        return self._passes(batch, rows, objective, retried=True)

    def _halve_budget(self, part: Batch, retried: bool) -> None:
        """Out of memory at `part`: use half as many cells per pass from here on.

        Raises:
            ConfigError: this update was halved before, or halving cannot help; names the setting to lower.
        """
        each, longest = self.probed.each if self.probed else 0.0, max(part.lengths)
        if retried or len(part) == 1 or world().size > 1:  # ranks that split differently would deadlock
            raise memory.out_of_memory(len(part), longest, self.budget, each) from None
        vars(self)["budget"] = half = max(min(self.budget, len(part) * longest) // 2, 1)
        say(f"out of memory at {len(part)} rows x {longest} tokens: trying again with {half} tokens a forward pass")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _pass(self, part: Batch, objective: Objective) -> dict[str, torch.Tensor]:
        """Forward and backward pass of one microbatch; returns its terms of the update's sums.

        `--head plain` is the readable path and the reference: logits, log-softmax, loss, `backward()`. The fused head
        computes the same numbers and gradient without holding the logits of all targets (`trainer/head.py`).
        """
        part, bonus = part.to(self.device), bool(objective.entropy_coef)
        if self.cfg.head == "plain":
            logp, found = plain_logprobs(self.model, part, objective.temperature)
        else:
            fused = fused_grad(part, objective)
            logp, found = self._token_logprobs(self.model, part, objective.temperature, True, fused, bonus)
        loss = update_loss(logp, part, objective, part.everywhere(found["entropy"]) if bonus else None)
        loss.backward()
        return {**policy_sums(logp, found, part, objective), "loss": loss.detach()}

    def step(self, lr: float) -> dict[str, float]:
        """One optimizer step, see `MasterAdamW.step`; on a GPU also the update's peak memory, see `memory.Gauge`."""
        self._published = None
        metrics = self.optimizer.step(lr)
        return metrics | (self.gauge.finish() if self.gauge else {})

    @torch.no_grad()
    def logprobs(self, data: Sequence[Datum], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """Log-probabilities of the rows' trained tokens from a frozen pass; see `datatypes.Learner`."""
        return self._frozen_logprobs(self.model, data, temperature)

    @torch.no_grad()
    def reference_logprobs(self, data: Sequence[Datum], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """The same under the reference model, the one that the run started from."""
        if self.first_adapter is not None:
            with adapter.swapped(self.model, self.first_adapter):
                return self._frozen_logprobs(self.model, data, temperature)
        assert self.reference is not None, "this learner was made without a reference model"
        return self._frozen_logprobs(self.reference, data, temperature)

    def passes(self, data: Sequence[Datum]) -> int:
        """Number of forward passes of an update on all of these rows."""
        return sum(1 for _ in self._microbatches(make_batch(data), range(len(data))))

    def _frozen_logprobs(self, model: Any, data: Sequence[Datum], temperature: float) -> list[tuple[float, ...]]:
        batch = make_batch(data)
        return unshifted(self._frozen_pass(model, batch, temperature), batch.lengths)

    def _frozen_pass(self, model: Any, batch: Batch, temperature: float, retried: bool = False) -> torch.Tensor:
        out, stuck = torch.zeros_like(batch.mask), None
        for rows, part in self._microbatches(batch, batch.rows_with_targets()):
            try:
                logp, _ = self._token_logprobs(model, part.to(self.device), temperature, statistics=False)
            except torch.OutOfMemoryError:
                stuck = part
                break
            out[rows, : logp.shape[1]] = logp.cpu()
        if stuck is None:
            return out
        self._halve_budget(stuck, retried)
        return TorchLearner._frozen_pass(self, model, batch, temperature, retried=True)

    def publish(self, version: int) -> WeightsRef:
        """Name the current weights. The hash is cached until they change."""
        if self._published is None or self._published.version != version:
            self._published = WeightsRef(version, self.digest(self.weights()))
        return self._published

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Names and tensors of the weights, tied ones once; with an adapter, only the adapter's."""
        for name, parameter in adapter.own_weights(self.model):
            yield name, parameter.detach()

    def save(self, folder: Path) -> None:
        """Save a model or adapter that transformers loads, and the state of optimizer and random generators."""
        self._write(folder, self.model, self._weights_to_save(), self.optimizer.state() | self._generators())
        self.tokenizer.save_pretrained(folder)

    def snapshot(self) -> Callable[[Path], None] | None:
        """Copy what `save` saves to main memory, and return what writes the copy, in any thread.

        Returns None where the copy does not fit into main memory. The next snapshot overwrites this one.
        """
        weights, state = self._weights_to_save(), self.optimizer.state()
        held = {f"weights.{n}": t for n, t in weights.items()} | {f"state.{n}": t for n, t in state.items()}
        free = snapshot.free_main_memory()
        if free is not None and self._buffers.missing_bytes(held) > snapshot.SHARE * free:
            return None
        copied = self._buffers.copy(held)
        weights = {name: copied[f"weights.{name}"] for name in weights}
        state = {name: copied[f"state.{name}"] for name in state} | self._generators()
        files = self._tokenizer_files

        def write(folder: Path) -> None:
            self._write(folder, self.model, weights, state)
            snapshot.write_files(folder, files)

        return write

    def forget(self, folder: Path) -> None:
        """Nothing: a checkpoint's folder is all there is of it."""

    @functools.cached_property
    def _tokenizer_files(self) -> dict[str, bytes]:
        return snapshot.saved_files(self.tokenizer)

    def _weights_to_save(self) -> State:
        if adapter.has_adapter(self.model):
            return dict(self.weights())
        found: State = self.model.state_dict()
        return dict(found)

    def _generators(self) -> State:
        """The states of the random generators."""
        found = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            found["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return found

    def _write(self, folder: Path, model: Any, weights: State, state: Mapping[str, torch.Tensor]) -> None:
        if adapter.has_adapter(model):
            adapter.save(model, folder, weights)
        else:
            model.save_pretrained(folder, state_dict=weights)
        state = {name: t.detach().cpu().contiguous() for name, t in state.items()}
        (folder / OPTIMIZER).parent.mkdir(exist_ok=True)
        save_file(state, folder / OPTIMIZER, {"origin": self.origin_sha256})

    def load(self, folder: Path) -> None:
        """Load what `save` wrote.

        Raises:
            CheckpointError: it belongs to another model, or its run started from other weights.
        """
        self._published = None
        with safe_open(folder / OPTIMIZER, "pt") as stored:
            before = (stored.metadata() or {}).get("origin", "")
            rng = {name: stored.get_tensor(name) for name in stored.keys() if name.startswith("rng.")}  # noqa: SIM118
        if before != self.origin_sha256:
            raise CheckpointError(
                f"{folder}: its run began from other weights: those of {self.cfg.model_id} have changed since, and "
                "its adapter or its KL term rests on them; put them back, or pick another --out_dir"
            )
        fresh, mine = self._stored_weights(folder), dict(adapter.own_weights(self.model))
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
        self.optimizer.load_state(dcp.read(folder, self._empty))

    def _stored_weights(self, folder: Path) -> dict[str, torch.Tensor]:
        if adapter.has_adapter(self.model):
            return load_file(folder / adapter.WEIGHTS_FILE)
        stored = pretrained.read_model(PromptConfig(model_id=str(folder)), self.model.dtype)
        return dict(stored.named_parameters())

    # Hooks that `ShardedLearner` overrides.

    def _place(self, model: Any) -> Any:
        return model

    def _make_optimizer(self) -> MasterAdamW:
        offloads = self.cfg.optimizer_device == "cpu" and self.device.type != "cpu"
        return (OffloadedAdamW if offloads else MasterAdamW)(self.model, self.cfg)

    def _microbatches(self, batch: Batch, rows: Sequence[int]) -> Iterable[tuple[list[int], Batch]]:
        return packing.microbatches(batch, self.budget, rows, self.packs)

    def _cells_that_fit(self) -> int:
        """The token budget of `--max_tokens_per_microbatch 0`.

        The split of an update decides the order of its sums, so a deterministic run on a GPU uses a fixed number of
        cells: the free memory may differ after a resume.
        """
        if self.device.type == "cpu" and not self.gauge:
            return memory.CPU_CELLS
        if self.cfg.deterministic or not self.gauge:
            return memory.FIXED_CELLS
        return self._probed_cells(self.gauge)

    def _probed_cells(self, gauge: memory.Gauge) -> int:
        meter, context = gauge.meter, context_length(self.model)
        if gauge.beside:  # a sampler works at the same time, and the probe would count its memory
            room = costs.SPARE * (meter.free() + meter.held()) - gauge.beside
            return costs.cells_that_fit(gauge.shape, gauge.setup, room)

        def run(dummy: Batch) -> None:  # like a microbatch of an update
            ((_, part),) = packing.microbatches(dummy, dummy.cells, range(len(dummy)), self.packs)
            self._pass(part, Objective())

        try:
            self.probed = memory.probe(run, self.model, gauge, context)
        except torch.OutOfMemoryError:
            raise memory.out_of_memory(1, memory.PROBE_TOKENS, 0) from None
        room = costs.SPARE * (meter.free() - self.optimizer.pending_state_bytes())
        self.optimizer.zero_grad()
        torch.cuda.empty_cache() if self.device.type == "cuda" else None  # free it for an engine on this GPU
        cells = costs.most_cells(self.probed.taken, room)
        if not gauge.printed:
            say(f"memory: {self.probed.each / 1e6:.3g} MB a token by a probe, so {cells} tokens a forward pass")
        return cells

    def _token_logprobs(self, model: Any, part: Batch, *how: Any, **more: Any) -> Scored:
        return token_logprobs(model, part, *how, **more)

    def _of_the_update(self, sums: dict[str, float]) -> dict[str, float]:
        return sums

    def _shard(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def _empty(self, name: str, size: torch.Size) -> torch.Tensor:
        return torch.empty(size)


def _missing(part: float, whole: float) -> float:
    """1 - part / whole, at least 0; 0 if `whole` is 0."""
    return max(0.0, 1 - part / whole) if whole else 0.0
