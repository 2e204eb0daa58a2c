"""The learner at a training service: the gradient is made there, everything else stays here.

    data ── tokens, old log-probabilities, weight x advantage ──▶ forward_backward
    step ── AdamW's settings and the learning rate ─────────────▶ optim_step
    save ── a name ─────────────────────────────────────────────▶ save_state; its tinker:// path comes back
    load ── that path ──────────────────────────────────────────▶ a new model there, optimizer included

The run directory, metrics, samples and the schedule are those of any run. A checkpoint's folder holds the tokenizer and
`service.json`, which says where the weights are. How our losses are put on the wire: `trainer/wire.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from grpo_gsm8k.config import SERVICE_FILE, GrpoConfig, TrainConfig
from grpo_gsm8k.datatypes import Datum, WeightsRef
from grpo_gsm8k.engines.service import HASH, Checkpoint, Service, name_sha256, recorded
from grpo_gsm8k.errors import CheckpointError, ConfigError, NonFiniteError, RefusedError
from grpo_gsm8k.runs.files import write_json
from grpo_gsm8k.trainer import memory, wire
from grpo_gsm8k.trainer.batch import Batch, make_batch, unshifted
from grpo_gsm8k.trainer.losses import Objective, rows_to_train
from grpo_gsm8k.trainer.metrics import policy_metrics

EPS = 1e-8  # of AdamW, as torch has it; the wire's default is another
TOLD = {"grad_norm": "policy/grad_norm", "update_to_weight": "policy/update_to_weight"}
"""What a service may tell of an optimizer step, and our names for it."""

ELSEWHERE = {
    "lora_alpha": "the wire does not carry it, and the service takes 32",
    "lora_targets": "the service puts adapters on all linear layers but the head",
    "dtype": "the service decides in which type it trains",
    "compile": "the service decides how it computes",
    "head": "the service decides how it computes",
    "activation_checkpointing": "the service decides what it keeps in memory",
    "optimizer_device": "the service decides where its optimizer is",
}
"""Settings that a training service cannot be told, and why."""


def check(cfg: TrainConfig, rank: int) -> None:
    """Refuse by name what the wire cannot say.

    Args:
        rank: of the adapter that is trained; 0 for all weights.

    Raises:
        ConfigError: names the setting.
    """

    def refuse(name: str, why: str) -> ConfigError:
        return ConfigError(f"--learner tinker does not take --{name} {getattr(cfg, name)}: {why}")

    plain = TrainConfig()
    for name, why in ELSEWHERE.items():
        if getattr(cfg, name) != getattr(plain, name):
            raise refuse(name, f"{why}; leave it out")
    if cfg.packing == "on":
        raise refuse("packing", "the service decides how it computes; leave it out")
    if cfg.eval_mode == "async":
        raise refuse("eval_mode", "the service that trains also validates; leave it out")
    if cfg.weight_decay and not rank:
        raise refuse("weight_decay", "of all weights the service would decay norms and biases too; train an adapter")
    if not isinstance(cfg, GrpoConfig):
        return
    if cfg.temperature != 1:
        raise refuse(
            "temperature", "the service trains the distribution at temperature 1, and ratios would be wrong; use 1"
        )
    if cfg.entropy_coef:
        raise refuse("entropy_coef", "its gradient needs whole distributions, the wire carries the targets'; use 0")


class RemoteLearner:
    """Implements `datatypes.Learner` for a model at a training service."""

    def __init__(self, service: Service, start: Checkpoint, tokenizer: Any, cfg: TrainConfig) -> None:
        """Nothing is made at the service before the first use.

        Args:
            start: what is trained: a base model, or the weights of a checkpoint.
            tokenizer: (or a renderer) is saved with each checkpoint.

        Raises:
            ConfigError: for settings that the wire cannot say.
        """
        if start.state and cfg.lora_rank not in (0, start.lora_rank):
            raise ConfigError(
                f"{cfg.model_id} was trained with --lora_rank {start.lora_rank}: leave --lora_rank {cfg.lora_rank} out"
            )
        self.service, self.start, self.tokenizer, self.cfg = service, start, tokenizer, cfg
        self.rank = start.lora_rank if start.state else cfg.lora_rank
        check(cfg, self.rank)
        self.exact = cfg.deterministic or cfg.wire_loss == "custom"
        tokens = cfg.max_tokens_per_microbatch or memory.CPU_CELLS
        self.layout = wire.Layout(tokens, packs=cfg.packing != "off")
        self._published: WeightsRef | None = None
        self._names: set[str] = set()

    @property
    def in_step(self) -> bool:
        """Whether the service can still be asked to save a step."""
        return not self.service.lost

    @cached_property
    def client(self) -> Any:
        """The model that is trained, at the service."""
        return self._made()

    @cached_property
    def reference(self) -> Any:
        """Another one with the weights that the run began with, which nobody trains."""
        return self._made()

    def _made(self) -> Any:
        if self.start.state:
            return self.service.restore(self.start.state, optimizer=False)
        return self.service.create(self.start.base_model, self.rank, self.cfg.seed)

    # ------------------------------------------------------------------------------------------- an update

    def forward_backward(self, data: Sequence[Datum], objective: Objective) -> dict[str, float]:
        """Accumulate the gradient of one whole update at the service; see `TorchLearner.forward_backward`.

        Entropy and top probability are not logged: the wire does not carry them.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
            ConfigError: the objective cannot be put on the wire.
        """
        if objective.temperature != 1 or objective.entropy_coef:
            raise ConfigError("a training service knows neither a temperature nor an entropy bonus in training")
        started, batch = time.perf_counter(), make_batch(data)
        rows = rows_to_train(batch, objective)
        loss = None if self.exact else wire.native(objective, batch)
        if loss is None:
            logp = self._logprobs(self.client, batch, rows)
        else:
            logp = self._send(self.client.forward_backward, batch, rows, loss)
        sums = wire.loss_sums(logp, batch, rows, objective, self.layout)
        total = sums.pop("loss")
        if not math.isfinite(total):
            raise NonFiniteError(f"the loss is {total}")
        if loss is None:
            loss = wire.surrogate(logp, batch, rows, objective, self.layout)
            self._send(self.client.forward_backward, batch, rows, loss)
        seconds = time.perf_counter() - started
        return {
            "loss": total,
            **policy_metrics(sums),
            "perf/tokens_per_s": sum(batch.lengths[row] for row in rows) / seconds,
            "perf/skipped_rows_frac": 1 - len(rows) / len(batch),
        }

    def step(self, lr: float) -> dict[str, float]:
        """One AdamW step with the run's settings. Returns `policy/lr`, and what the service tells of `TOLD`."""
        self._published = None
        adam = self.service.sdk.AdamParams(
            learning_rate=lr,
            beta1=self.cfg.beta1,
            beta2=self.cfg.beta2,
            eps=EPS,
            weight_decay=self.cfg.weight_decay,
            grad_clip_norm=self.cfg.grad_clip,
        )
        client = self.client
        answer = self.service.call("an optimizer step", lambda: client.optim_step(adam).result())
        told = answer.metrics or {}
        return {"policy/lr": lr, **{ours: float(told[theirs]) for theirs, ours in TOLD.items() if theirs in told}}

    def logprobs(self, data: Sequence[Datum], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """Log-probabilities of the rows' trained tokens from a forward pass there; see `datatypes.Learner`."""
        return self._of_data(self.client, data, temperature)

    def reference_logprobs(self, data: Sequence[Datum], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """The same under the weights that the run began with."""
        return self._of_data(self.reference, data, temperature)

    def _of_data(self, client: Any, data: Sequence[Datum], temperature: float) -> list[tuple[float, ...]]:
        assert temperature == 1, "`check` has refused every other one"
        batch = make_batch(data)
        return unshifted(self._logprobs(client, batch, batch.rows_with_targets()), batch.lengths)

    def _logprobs(self, client: Any, batch: Batch, rows: Sequence[int]) -> torch.Tensor:
        """`(B, T)`, of the trained targets of these rows."""
        return self._send(client.forward, batch, rows, wire.WireLoss("cross_entropy", {"weights": batch.mask}))

    def _send(self, submit: Any, batch: Batch, rows: Sequence[int], loss: wire.WireLoss) -> torch.Tensor:
        """Send rows; `(B, T)` log-probabilities of their trained targets, 0 elsewhere."""
        out = torch.zeros_like(batch.mask)
        if not rows:
            return out
        data = [self._datum(batch, row, loss) for row in rows]
        config = dict(loss.config) or None
        answer = self.service.call(f"a pass with {loss.name}", lambda: submit(data, loss.name, config).result())
        for row, found in zip(rows, answer.loss_fn_outputs, strict=True):
            logp = torch.as_tensor(found["logprobs"].to_numpy(), dtype=torch.float32)
            out[row, : batch.lengths[row]] = logp
        return out * batch.mask

    def _datum(self, batch: Batch, row: int, loss: wire.WireLoss) -> Any:
        length = batch.lengths[row]
        inputs = {name: values[row, :length].numpy() for name, values in loss.inputs.items()}
        targets = {"target_tokens": batch.targets[row, :length].numpy()}
        return self.service.datum(batch.input_ids[row, :length].tolist(), {**targets, **inputs})

    # --------------------------------------------------------------------------------------------- weights

    def publish(self, version: int) -> WeightsRef:
        """Name the weights as they are now, and keep them at the service to be sampled from."""
        if self._published is None or self._published.version != version:
            name = self.service.snapshot(self.client, f"{self.client.model_id} after {version} steps")
            self._published = WeightsRef(version, name_sha256(name), name)
        return self._published

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """None: they are at the service."""
        return iter(())

    def save(self, folder: Path) -> None:
        """Save weights and optimizer at the service, and write where they are; beside it the tokenizer."""
        step = int("".join(filter(str.isdigit, folder.name)))
        name, client = self._unused(f"step_{step:06d}"), self.client
        how = {"user_metadata": {HASH: ""}}
        state = self.service.call(f"saving {name}", lambda: client.save_state(name, **how).result()).path
        sampler = self.service.call(
            f"saving {name}", lambda: client.save_weights_for_sampler(name, **how).result()
        ).path
        sha256 = self.service.recorded_sha256(sampler) or name_sha256(sampler)
        saved = Checkpoint(
            base_model=self.start.base_model,
            lora_rank=self.rank,
            training_run=client.model_id,
            state=state,
            sampler=sampler,
            weights_sha256=sha256,
            origin=self.start.state,
            address=self.service.address,
        )
        write_json(folder / SERVICE_FILE, asdict(saved))
        self.tokenizer.save_pretrained(folder)
        self._published = WeightsRef(step, sha256, sampler)

    def _unused(self, name: str) -> str:
        """A name that this model has given to no checkpoint: of a step that was saved twice, both are there."""
        names = (name, *(f"{name}_{n}" for n in range(2, len(self._names) + 3)))
        found = next(each for each in names if each not in self._names)
        self._names.add(found)
        return found

    def load(self, folder: Path) -> None:
        """Continue from what `save` saved, in a new model at the service.

        Raises:
            CheckpointError: it began from other weights, or the service no longer has it.
        """
        saved = recorded(folder)
        if (saved.origin, saved.base_model, saved.lora_rank) != (self.start.state, self.start.base_model, self.rank):
            raise CheckpointError(
                f"{folder}: its run began from other weights: {saved.origin or saved.base_model}, an adapter of rank "
                f"{saved.lora_rank}; pick another --out_dir"
            )
        try:
            vars(self)["client"] = self.service.restore(saved.state, optimizer=True)
        except RefusedError as refusal:
            raise CheckpointError(f"{folder}: {refusal}; it was saved at {saved.address or 'Tinker'}") from None
        self._published, self._names = None, set()

    def forget(self, folder: Path) -> None:
        """Delete at the service what a checkpoint's folder stands for."""
        saved = recorded(folder)
        for path in (saved.state, saved.sampler):
            self.service.delete(path)
