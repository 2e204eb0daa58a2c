"""The learner of several ranks: FSDP2 shards the model, and each rank computes a share of every update.

The loss weights are those of the whole update (`trainer/data.py`), so gradients are summed over the ranks, not
averaged, and any number of ranks gives the same gradient. Each rank holds float32 shards; in bfloat16 training, FSDP
rounds them for the forward pass and sums gradients in float32.

Simplified on purpose: no tensor parallelism, no CPU offloading, and every microbatch's gradient is reduced at once,
which saves the memory of a full gradient. Tested only with gloo on a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor import empty as empty_dtensor

from grpo_gsm8k.config import TrainConfig
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.trainer import adapter, architecture, dcp, ranks
from grpo_gsm8k.trainer.batch import Batch
from grpo_gsm8k.trainer.learner import Scored, TorchLearner
from grpo_gsm8k.trainer.logprobs import token_logprobs
from grpo_gsm8k.trainer.metrics import add_sums
from grpo_gsm8k.trainer.optimizer import MasterAdamW, State
from grpo_gsm8k.trainer.packing import microbatches


class ShardedLearner(TorchLearner):
    """One rank's part of a learner. All ranks call every method, but `save_model`, with the same arguments."""

    def __init__(self, model: Any, tokenizer: Any, cfg: TrainConfig, reference: bool = False) -> None:
        """Join the other ranks and shard a copy of `model`: rank 0 samples from the original, and saves in its form."""
        if adapter.has_adapter(model):
            raise ConfigError("LoRA is trained in one process; start it without torchrun")
        if cfg.optimizer_device == "cpu":
            raise ConfigError(
                "--optimizer_device cpu is for one process: ranks share the optimizer's state; leave it out"
            )
        self.dtype: torch.dtype = model.dtype
        self.group = ranks.meet(model.device)
        self.rank, self.ranks = self.group.rank(), self.group.size()
        self.mesh = init_device_mesh(model.device.type, (self.ranks,))
        self.plain = model if self.rank == 0 else None
        super().__init__(copy.deepcopy(model), tokenizer, cfg, reference)

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Names and full tensors on rank 0's CPU, in the training dtype; nothing on other ranks."""
        whole: list[tuple[str, torch.Tensor]] = []
        for name, parameter in self.model.named_parameters():
            tensor = parameter.detach().to(self.dtype).full_tensor()
            if self.rank == 0:
                whole.append((name, tensor.cpu()))
        return whole

    def save_shards(self, folder: Path) -> None:
        """This rank's part of the optimizer's state. Raises `DiskError` on all ranks."""
        dcp.write(folder, self.optimizer.state())

    def save_model(self, folder: Path, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Rank 0 writes the rest of what `TorchLearner.save` writes."""
        assert self.plain is not None
        self._write(folder, self.plain, dict(weights), self._generators())
        self.tokenizer.save_pretrained(folder)

    def _frozen_pass(self, model: Any, batch: Batch, temperature: float, retried: bool = False) -> torch.Tensor:
        out = super()._frozen_pass(model, batch, temperature, retried)
        model.reshard()  # without a backward pass the root would stay gathered, and go stale
        dist.all_reduce(out, group=self.group)
        return out

    def _place(self, model: Any) -> Any:
        # The batch passes through the forward and must stay float32: cast the parameters only.
        policy = MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        model.float().token_logprobs = MethodType(token_logprobs, model)
        for module in (*architecture.decoder_layers(model), model):
            fully_shard(module, mesh=self.mesh, mp_policy=policy)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo supports sums only
        register_fsdp_forward_method(model, "token_logprobs")  # gathers the root's parameters: embedding, norm, head
        return model

    def _make_optimizer(self) -> MasterAdamW:
        return ShardedAdamW(self.model, self.cfg, self.dtype, self.group)

    def _microbatches(self, batch: Batch, rows: Sequence[int]) -> Iterable[tuple[list[int], Batch]]:
        return share(batch, self.budget, rows, self.rank, self.ranks, self.packs)

    def _cells_that_fit(self) -> int:
        least = torch.tensor(super()._cells_that_fit())  # all ranks must split an update the same way
        dist.all_reduce(least, dist.ReduceOp.MIN, self.group)
        return int(least)

    def _token_logprobs(self, model: Any, part: Batch, *how: Any, **more: Any) -> Scored:
        found: Scored = model.token_logprobs(part, *how, **more)  # through FSDP, which gathers the parameters
        return found

    def _of_the_update(self, sums: dict[str, float]) -> dict[str, float]:
        parts: list[Any] = [None] * self.ranks
        dist.all_gather_object(parts, sums, group=self.group)
        total: dict[str, float] = {}
        for part in parts:
            add_sums(total, part)
        return total

    def _shard(self, tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor.to(self.device), self.mesh, [Shard(0)], src_data_rank=None)

    def _empty(self, name: str, size: torch.Size) -> torch.Tensor:
        return empty_dtensor(size, device_mesh=self.mesh, placements=[Shard(0)]) if size else torch.empty(())


def share(
    batch: Batch, max_tokens: int, rows: Sequence[int], rank: int, size: int, packs: bool = False
) -> list[tuple[list[int], Batch]]:
    """A rank's microbatches of an update: every `size`-th of those that a single process would take.

    All ranks need the same number, since they run each pass together; a rank without one gets a row with zero mask and
    weights.
    """
    parts = list(microbatches(batch, max_tokens, rows, packs))
    if missing := -len(parts) % size:
        row = batch.select(parts[-1][0][-1:])  # one of the shortest rows
        blank = replace(row, mask=torch.zeros_like(row.mask), weights=torch.zeros_like(row.weights))
        parts += [([], blank)] * missing
    return parts[rank::size]


class ShardedAdamW(MasterAdamW):
    """`MasterAdamW` on this rank's shards, which are the float32 masters. Norms are global."""

    def __init__(self, model: nn.Module, cfg: TrainConfig, dtype: torch.dtype, group: dist.ProcessGroup) -> None:
        """`dtype` is the training dtype, `group` the process group of small sums."""
        self.group = group
        super().__init__(model, cfg)
        self.dtype = dtype

    def step(self, lr: float) -> dict[str, float]:
        """See `MasterAdamW.step`."""
        for name, parameter in self.params.items():
            if parameter.grad is not None:
                self.masters[name].grad, parameter.grad = local(parameter.grad), None
        return super().step(lr)

    def zero_grad(self) -> None:
        """Clear the accumulated gradients."""
        super().zero_grad()
        for parameter in self.params.values():
            parameter.grad = None

    def state(self) -> State:
        """The optimizer state under the names of a single process, as this rank's shards."""
        return {key: self._whole(key.partition(".")[2], value) for key, value in super().state().items()}

    def load_state(self, flat: State) -> None:
        """Undo `state`."""
        super().load_state({key: local(value) for key, value in flat.items()})

    def _master(self, param: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(local(param.detach()))  # shares its memory with FSDP's

    def _norm(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        square = super()._norm(tensors).double().square().cpu()
        dist.all_reduce(square, group=self.group)
        return square.sqrt().float()

    def _round(self) -> None:
        """Nothing to do: FSDP rounds for each forward pass."""

    def _share(self, flags: torch.Tensor) -> float:
        counts = torch.tensor([float(flags.sum()), len(flags)], dtype=torch.float64)
        dist.all_reduce(counts, group=self.group)
        return float(counts[0] / counts[1])

    def _whole(self, name: str, shard: torch.Tensor) -> torch.Tensor:
        """A shard as a DTensor laid out like its parameter; a scalar stays a scalar."""
        if not shard.ndim:
            return shard
        param = self.params[name]
        assert isinstance(param, DTensor)
        mesh, placements = param.device_mesh, param.placements
        return DTensor.from_local(shard, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor; a plain tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
