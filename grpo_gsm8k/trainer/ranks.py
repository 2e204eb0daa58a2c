"""Several processes, started by torchrun, act as one learner: rank 0 leads, the others follow.

    rank 0     stage ── Learner call ──▶ Lead ──▶ its own learner
                                          │ (method, arguments)
    rank 1 …                              └──▶ follow ──▶ theirs, the same method in lockstep

Only rank 0 has the stage, the run directory, the sampler and the evaluator. Commands go over gloo, so a follower waits
on the CPU while rank 0 samples.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from grpo_gsm8k.datatypes import Datum, WeightsRef
from grpo_gsm8k.errors import CheckpointError, DiskError, NonFiniteError
from grpo_gsm8k.trainer.losses import Objective

PATIENCE = timedelta(days=30)  # between commands; the death of a rank is noticed at once anyway
SHARED = (NonFiniteError, CheckpointError, DiskError)
"""Errors that all ranks raise at the same place of a command, so they stay in step."""


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of ranks, in all and on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def world() -> World:
    """Read torchrun's environment variables; a single process without them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return World(*(int(os.environ[name]) for name in names)) if names[-1] in os.environ else World()


def meet(device: torch.device) -> dist.ProcessGroup:
    """Join the other ranks. Returns the CPU group for commands and small sums."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=PATIENCE)
    return group


class Lead:
    """Implements `datatypes.Learner` on rank 0: makes every call on all ranks."""

    def __init__(self, learner: Any) -> None:
        """`learner` is rank 0's own `ShardedLearner`."""
        self.learner = learner
        self.in_step = True  # the followers are waiting for a command
        self._gathered: list[tuple[str, torch.Tensor]] | None = None
        self._published: WeightsRef | None = None

    def forward_backward(self, data: Sequence[Datum], objective: Objective) -> dict[str, float]:
        """See `TorchLearner.forward_backward`; each rank takes its share of the microbatches."""
        return self._on_all("forward_backward", data, objective)  # type: ignore[no-any-return]

    def step(self, lr: float) -> dict[str, float]:
        """See `MasterAdamW.step`; each rank updates its shards."""
        self._gathered = self._published = None
        return self._on_all("step", lr)  # type: ignore[no-any-return]

    def logprobs(self, data: Sequence[Datum], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """See `TorchLearner.logprobs`; each rank does its share of the rows."""
        return self._on_all("logprobs", data, temperature)  # type: ignore[no-any-return]

    def reference_logprobs(self, data: Sequence[Datum], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """See `TorchLearner.reference_logprobs`."""
        return self._on_all("reference_logprobs", data, temperature)  # type: ignore[no-any-return]

    def publish(self, version: int) -> WeightsRef:
        """See `TorchLearner.publish`."""
        if self._published is None or self._published.version != version:
            self._published = WeightsRef(version, self.learner.digest(self.weights()))
        return self._published

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """The full weights on the CPU; gathered once per step."""
        if self._gathered is None:
            self._gathered = self._on_all("weights")
        return self._gathered

    def save(self, folder: Path) -> None:
        """Each rank saves its shards of the optimizer, rank 0 the model. The ranks share a file system."""
        weights = self.weights()
        self._on_all("save_shards", folder)
        self.learner.save_model(folder, weights)

    def load(self, folder: Path) -> None:
        """Load a checkpoint of any number of ranks. Raises `CheckpointError` as `TorchLearner.load` does."""
        self._gathered = self._published = None
        self._on_all("load", folder)

    def forget(self, folder: Path) -> None:
        """See `TorchLearner.forget`."""

    def close(self) -> None:
        """Dismiss the followers. In the middle of a command they do not listen, and torchrun ends them."""
        if self.in_step:
            self._tell(None)
            dist.destroy_process_group()

    def _on_all(self, method: str, *arguments: Any) -> Any:
        self.in_step = False
        self._tell((method, arguments))
        try:
            result = getattr(self.learner, method)(*arguments)
        except SHARED:
            self.in_step = True
            raise
        self.in_step = True
        return result

    def _tell(self, command: tuple[str, tuple[Any, ...]] | None) -> None:
        dist.broadcast_object_list([command], src=0, group=self.learner.group)


def follow(learner: Any) -> None:
    """Repeat rank 0's calls until it is done. An error that is not in `SHARED` ends this rank, and so the job."""
    for number in (signal.SIGINT, signal.SIGTERM):  # torchrun signals all ranks; rank 0 finishes its step and saves
        signal.signal(number, signal.SIG_IGN)
    told: list[Any] = [None]
    while True:
        dist.broadcast_object_list(told, src=0, group=learner.group)
        if told[0] is None:
            break
        method, arguments = told[0]
        with suppress(*SHARED):
            getattr(learner, method)(*arguments)
    dist.destroy_process_group()
