"""One model in training: its gradient, its optimizer, and its state as files.

Everything here is a function of the state and the request alone, to the bit: a model that is restored from a snapshot
and given the same requests again becomes what it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from grpo_gsm8k.config import PromptConfig, TrainConfig
from grpo_gsm8k.errors import NonFiniteError
from grpo_gsm8k.runs.files import write_json
from grpo_gsm8k.serve import losses
from grpo_gsm8k.serve.adapters import BaseModel, ModelSpec, Tensors, copy_into, lora_config
from grpo_gsm8k.serve.data import TrainingJob, WireDatum, check
from grpo_gsm8k.serve.jobs import Refusal, TrainingResult
from grpo_gsm8k.trainer import architecture, pretrained
from grpo_gsm8k.trainer.batch import Batch
from grpo_gsm8k.trainer.head import target_logprobs
from grpo_gsm8k.trainer.optimizer import MasterAdamW
from grpo_gsm8k.trainer.packing import last_hidden_states, microbatches

KEPT_LOGITS = 1 << 24  # logits that are kept for the backward pass; of more, each chunk is computed again
WEIGHTS, OPTIMIZER, CONFIG = "adapter_model.safetensors", "optimizer/state.safetensors", "adapter_config.json"


class Trained:
    """An adapter on the base, or a copy of the base, with its optimizer and the gradient so far."""

    def __init__(self, base: BaseModel, name: str, spec: ModelSpec, tokens: int) -> None:
        """A new model.

        Args:
            name: the adapter's on the base: no dots.
            tokens: of one forward pass, see `packing.microbatches`.
        """
        self.base, self.name, self.spec, self.tokens = base, name, spec, tokens
        self.steps = 0
        self.own: Any = None
        if spec.rank:
            base.put(name, spec)
            self.parameters: Mapping[str, torch.nn.Parameter] = base.parameters(name)
        else:
            self.own = base.copy().requires_grad_(True)
            self.parameters = dict(self.own.named_parameters())
        self._fresh_optimizer()

    def _fresh_optimizer(self) -> None:
        self.model()  # only the adapter that is active has parameters that learn
        owner: Any = SimpleNamespace(named_parameters=self.parameters.items)
        self.optimizer = MasterAdamW(owner, TrainConfig(grad_clip=0.0))

    def close(self) -> None:
        """Let go of the adapter."""
        if self.own is None:
            self.base.drop(self.name)

    def model(self) -> Any:
        """What a forward pass reads."""
        return self.own if self.own is not None else self.base.activate(self.name)

    # ------------------------------------------------------------------------------------------------ training

    def forward_backward(self, job: TrainingJob) -> TrainingResult:
        """Add the gradient of a loss, unless `forward_only`; with log-probabilities of all targets.

        Raises:
            Refusal, NonFiniteError: for what cannot be trained; the gradient is what it was.
        """
        loss = losses.find(job.loss_fn)
        settings = loss.settings(job.loss_fn, job.config)
        for number, datum in enumerate(job.data):
            loss.check_inputs(job.loss_fn, datum.inputs, f"data[{number}]")
        check(job, self.base.vocabulary, self.base.context)
        before = {master: master.grad for master in self.optimizer.masters.values()}
        self.optimizer.zero_grad()
        sums = _Sums()
        try:
            found = self._passes(job, loss, settings, sums)
            if not math.isfinite(sums.loss):
                raise NonFiniteError(f"the loss is {sums.loss}; the gradient of this call is dropped")
        except BaseException:
            for master, gradient in before.items():
                master.grad = gradient
            raise
        for master, gradient in before.items():
            if gradient is not None:
                master.grad = gradient if master.grad is None else gradient + master.grad
        return TrainingResult(found, sums.metrics())

    def _passes(self, job: TrainingJob, loss: losses.Loss, settings: Any, sums: _Sums) -> tuple[Any, ...]:
        """All forward and backward passes of a call; the log-probabilities of each datum."""
        carried = [_carried(datum, loss) for datum in job.data]  # where a target can have a gradient
        batch = _batch(job.data, carried)
        found: list[Any] = [None] * len(job.data)
        for learns, rows in _groups(job, carried):
            for numbers, part in microbatches(batch, self.tokens, rows, self.base.packs):
                data = [job.data[number] for number in numbers]
                with torch.set_grad_enabled(learns):
                    logp = self._logprobs(data, part, [carried[number] for number in numbers] if learns else None)
                    total = self._loss(data, logp, loss, settings, sums)
                    if learns:
                        total.backward()
                for number, each in zip(numbers, logp, strict=True):
                    shape = job.data[number].inputs["target_tokens"].shape
                    found[number] = each.detach().cpu().numpy().astype("<f4").reshape(shape)
        return tuple(found)

    def _logprobs(self, data: Sequence[WireDatum], part: Batch, carried: Sequence[Any] | None) -> list[torch.Tensor]:
        """`(n, K)` log-probabilities of each row's targets; a gradient only where one can be carried."""
        device, lengths = self.base.device, [len(datum.tokens) for datum in data]
        model, everywhere = self.model(), torch.zeros_like(part.mask)
        for row, length in enumerate(lengths):
            everywhere[row, :length] = 1.0
        hidden = last_hidden_states(model, replace(part, mask=everywhere).to(device))  # (N, H), row by row
        targets = torch.cat([_torch(x.inputs["target_tokens"]).view(len(x.tokens), -1) for x in data]).to(device)
        if carried is None:
            return list(head_logprobs(model, hidden, targets).split(lengths))
        learns = torch.from_numpy(np.concatenate(carried)).to(device)
        at, rest = learns.nonzero().squeeze(-1), (~learns).nonzero().squeeze(-1)
        logp = torch.zeros(targets.shape, device=device)
        with torch.no_grad():
            logp = logp.index_copy(0, rest, head_logprobs(model, hidden[rest], targets[rest]))
        # Of these alone the head's gradient is formed, as where a batch has a mask.
        logp = logp.index_copy(0, at, head_logprobs(model, hidden.index_select(0, at), targets[at]))
        return list(logp.split(lengths))

    def _loss(
        self,
        data: Sequence[WireDatum],
        logp: list[torch.Tensor],
        loss: losses.Loss,
        settings: Mapping[str, float],
        sums: _Sums,
    ) -> torch.Tensor:
        """The loss of a microbatch, summed in float64."""
        total = torch.zeros((), dtype=torch.float64, device=self.base.device)
        for datum, each in zip(data, logp, strict=True):
            inputs = {name: _torch(x).view(each.shape).to(each) for name, x in datum.inputs.items()}
            inputs.setdefault("weights", torch.ones_like(each))
            if "sequence_ratio_mask" in inputs:
                ratio = losses.sequence_ratio(each.detach(), inputs["logprobs"], inputs["sequence_ratio_mask"])
                inputs["sequence_ratio"] = torch.full_like(each, ratio)
            total = total + loss.per_token(each, inputs, settings).double().sum()
            sums.add(each.detach(), inputs)
        sums.loss += float(total.detach())
        return total

    def optim_step(self, adam: Mapping[str, float]) -> dict[str, float]:
        """One step of AdamW with these settings, and the gradient is zero again.

        Raises:
            NonFiniteError: the gradient is not finite; the weights are what they were, and the gradient is dropped.
        """
        for group in self.optimizer.inner.param_groups:
            group["betas"], group["eps"] = (adam["beta1"], adam["beta2"]), adam["eps"]
            group["weight_decay"] = adam["weight_decay"]
        self.optimizer.grad_clip = max(adam["grad_clip_norm"], 0.0)
        found = self.optimizer.step(adam["learning_rate"])
        self.steps += 1
        return {
            "grad_norm": found["policy/grad_norm"],
            "learning_rate": found["policy/lr"],
            "update_to_weight": found["policy/update_to_weight"],
            "step": float(self.steps),
        }

    # --------------------------------------------------------------------------------------------------- files

    def save(self, folder: Path, optimizer: bool) -> None:
        """Write the weights as peft or transformers loads them; with `optimizer` also its state and the gradient."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.own is None:
            tensors = {name: p.detach().to("cpu", copy=True).contiguous() for name, p in self.parameters.items()}
            save_file(tensors, folder / WEIGHTS, {"format": "pt"})
            config = lora_config(self.spec, self.base.targets(self.spec), self.base.folder)
            config.inference_mode = True
            config.save_pretrained(str(folder))
        else:
            self.own.save_pretrained(folder)
            self.base.renderer.save_pretrained(folder)
        write_json(folder / "spec.json", self.spec.as_json())
        if optimizer:
            state = dict(self.optimizer.state())
            state |= {f"grad.{n}": m.grad for n, m in self.optimizer.masters.items() if m.grad is not None}
            state["steps"] = torch.tensor(self.steps)
            (folder / OPTIMIZER).parent.mkdir(exist_ok=True)
            save_file({n: t.detach().to("cpu", copy=True).contiguous() for n, t in state.items()}, folder / OPTIMIZER)

    def load(self, folder: Path, optimizer: bool) -> None:
        """Take over what `save` wrote; without `optimizer`, AdamW starts anew and the gradient is zero.

        Raises:
            Refusal: it is of another kind of model.
        """
        copy_into(self.parameters, stored_weights(folder, self.base.model.dtype))
        self._fresh_optimizer()
        if not optimizer:
            self.steps = 0
            return
        if not (folder / OPTIMIZER).is_file():
            raise Refusal("this checkpoint has no optimizer state; load its weights alone")
        state = load_file(folder / OPTIMIZER)
        self.steps = int(state.pop("steps"))
        gradients = {n.removeprefix("grad."): state.pop(n) for n in list(state) if n.startswith("grad.")}
        self.optimizer.load_state(state)
        for name, gradient in gradients.items():
            self.optimizer.masters[name].grad = gradient.to(self.base.device)


def stored_weights(folder: Path, dtype: torch.dtype) -> Tensors:
    """The weights that a checkpoint holds: an adapter's, or a model's."""
    if (folder / WEIGHTS).is_file():
        return load_file(folder / WEIGHTS)
    return dict(pretrained.read_model(PromptConfig(model_id=str(folder)), dtype).named_parameters())


def head_logprobs(model: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`(N, K)` float32 log-probabilities of targets `(N, K)` under the model's head, whatever it does behind it."""
    head, logit_map = model.get_output_embeddings(), architecture.logit_map(model)
    if targets.shape[1] == 1 and isinstance(head, torch.nn.Linear) and type(head).__module__.startswith("torch."):
        logp, _ = target_logprobs(hidden, head, targets[:, 0], statistics=False, logit_map=logit_map)
        return logp.unsqueeze(1)

    def of_chunk(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return logits_of(model, h).log_softmax(-1).gather(-1, t)

    rows = max(1, KEPT_LOGITS // head.weight.shape[0])
    if len(hidden) <= rows or not torch.is_grad_enabled():
        parts = [of_chunk(h, t) for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)]
    else:
        run: Callable[..., torch.Tensor] = checkpoint
        parts = [
            run(of_chunk, h, t, use_reentrant=False)
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
    return torch.cat(parts) if parts else targets.new_zeros(targets.shape, dtype=torch.float32)


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The model's logits in float32 from its last hidden states: head, scale and soft-cap."""
    logits, how = model.get_output_embeddings()(hidden).float(), architecture.logit_map(model)
    if how.scale != 1:
        logits = logits * how.scale
    if how.cap:
        logits = how.cap * (logits / how.cap).tanh()
    found: torch.Tensor = logits
    return found


@dataclass
class _Sums:
    """What a call's metrics are made of, over all targets."""

    loss: float = 0.0
    tokens: float = 0.0
    gap: float = 0.0
    largest_gap: float = 0.0

    def add(self, logp: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> None:
        """Count a row's targets, those with weight or advantage."""
        counts = inputs["advantages" if "advantages" in inputs else "weights"] != 0
        self.tokens += float(counts.sum())
        if "logprobs" in inputs and bool(counts.any()):
            gap = (logp - inputs["logprobs"])[counts].abs()
            self.gap += float(gap.double().sum())
            self.largest_gap = max(self.largest_gap, float(gap.max()))

    def metrics(self) -> dict[str, float]:
        """Under names of the form `name:reduction`, which clients split."""
        found = {"loss:sum": self.loss, "tokens:sum": self.tokens}
        if self.gap or self.largest_gap:
            found |= {"logprob_gap:sum": self.gap, "logprob_gap:max": self.largest_gap}
        return found


def _carried(datum: WireDatum, loss: losses.Loss) -> Any:
    """`(N,)` bool: the positions at which a target can have a gradient."""
    carrier = datum.inputs.get(loss.carrier)
    if carrier is None:
        return np.ones(len(datum.tokens), bool)
    return carrier.reshape(len(datum.tokens), -1).any(-1)


def _batch(data: Sequence[WireDatum], carried: Sequence[Any]) -> Batch:
    """The rows padded; the mask is where a target can have a gradient, and plans who stands beside whom."""
    lengths = tuple(len(datum.tokens) for datum in data)
    ids = torch.zeros(len(data), max(lengths), dtype=torch.int64)
    mask = torch.zeros(ids.shape)
    for row, (datum, at) in enumerate(zip(data, carried, strict=True)):
        ids[row, : lengths[row]] = _torch(datum.tokens)
        mask[row, : lengths[row]] = torch.from_numpy(at).float()
    none = torch.zeros(ids.shape)
    return Batch(ids, ids, mask, none, none, none, none, lengths)


def _groups(job: TrainingJob, carried: Sequence[Any]) -> Iterator[tuple[bool, list[int]]]:
    """Rows that can be read together, and whether they have a gradient: those with as many targets a position."""
    groups: dict[tuple[bool, int], list[int]] = {}
    for row, (datum, at) in enumerate(zip(job.data, carried, strict=True)):
        width = datum.inputs["target_tokens"].size // len(datum.tokens)
        groups.setdefault((not job.forward_only and bool(at.any()), width), []).append(row)
    for (learns, _), rows in sorted(groups.items(), key=lambda group: (not group[0][0], group[0][1])):
        yield learns, rows


def _torch(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))
