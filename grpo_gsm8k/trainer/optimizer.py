"""AdamW over float32 master weights, and the learning-rate schedule.

In bfloat16 an update of 1e-6 vanishes in the weight (8 bits of mantissa). So the optimizer keeps a float32 master of
every bfloat16 weight, accumulates gradients there in float32 during each backward pass, and rounds the masters into the
model after the step. For a float32 model the master *is* the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from grpo_gsm8k.config import TrainConfig
from grpo_gsm8k.errors import CheckpointError, NonFiniteError

State = dict[str, torch.Tensor]

KINDS = ("step", "exp_avg", "exp_avg_sq", "master")  # of named state: `exp_avg.model.norm.weight`

SAMPLED_EVERY = 61  # prime, so that the sample covers all columns of a matrix


class MasterAdamW:
    """`torch.optim.AdamW` on float32 masters of the trainable weights, with its state as named tensors."""

    def __init__(self, model: nn.Module, cfg: TrainConfig) -> None:
        """`cfg` sets the betas, the weight decay (matrices only) and the gradient clip."""
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: self._master(p) for name, p in self.params.items()}
        self.dtype = next(iter(self.params.values())).dtype
        matrices = [m for m in self.masters.values() if m.ndim >= 2]
        others = [m for m in self.masters.values() if m.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": cfg.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.inner = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)
        self.grad_clip = cfg.grad_clip

    def step(self, lr: float) -> dict[str, float]:
        """Clip and check the gradient, step, and clear it.

        Returns:
            `policy/grad_norm` before clipping, `policy/lr`, and `policy/update_to_weight`: the norm of the
            step over the norm of the weights, from a sample. Of a bfloat16 model also `policy/bf16_changed_frac`: the
            share of its weights in which the step shows, from a sample.

        Raises:
            NonFiniteError: the gradient is NaN or infinite. The weights stay unchanged.
        """
        grads = [m.grad for m in self.masters.values() if m.grad is not None]
        norm = self._norm(grads)
        if not torch.isfinite(norm):
            self.zero_grad()
            raise NonFiniteError(f"the gradient's norm is {float(norm)}")
        if self.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.masters.values(), self.grad_clip, norm)
        for group in self.inner.param_groups:
            group["lr"] = lr
        before = self._sample()
        self.inner.step()
        self.zero_grad()
        with torch.no_grad():
            self._round()
            after = self._sample()
            moved = self._norm([a - b for a, b in zip(after, before, strict=True)])
            weight = self._norm(before)
        return {
            "policy/grad_norm": float(norm),
            "policy/lr": lr,
            "policy/update_to_weight": float(moved / weight.clamp(min=1e-12)),
            **self._bf16_changed_frac(before, after),
        }

    def _norm(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The 2-norm of all numbers in `tensors`."""
        return torch.nn.utils.get_total_norm(tensors)

    def _sample(self) -> list[torch.Tensor]:
        """A copy of one weight in 61; a copy of all would take a quarter more memory at the peak."""
        return [m.detach().flatten()[::SAMPLED_EVERY].clone() for m in self.masters.values()]

    def _round(self) -> None:
        """Round the masters into a bfloat16 model."""
        for name, param in self.params.items():
            if param is not self.masters[name]:
                param.copy_(self.masters[name], non_blocking=True)

    def _bf16_changed_frac(self, before: list[torch.Tensor], after: list[torch.Tensor]) -> dict[str, float]:
        """The share of sampled weights that a step changes after rounding; empty for a float32 model."""
        if self.dtype == torch.float32:
            return {}
        changed = torch.cat([b.to(self.dtype) != a.to(self.dtype) for b, a in zip(before, after, strict=True)])
        return {"policy/bf16_changed_frac": self._share(changed)}

    def _share(self, flags: torch.Tensor) -> float:
        """The share of flags that are true."""
        return float(flags.float().mean())

    def zero_grad(self) -> None:
        """Clear the accumulated gradients."""
        self.inner.zero_grad(set_to_none=True)

    def pending_state_bytes(self) -> int:
        """Bytes of AdamW's moments that the first step will allocate beside the model."""
        return sum(8 * master.numel() for master in self.masters.values() if master not in self.inner.state)

    def state(self) -> State:
        """Moments, step counts and, for bfloat16, masters as flat named tensors."""
        flat: State = {}
        for name, master in self.masters.items():
            for key, value in self.inner.state.get(master, {}).items():
                flat[f"{key}.{name}"] = value
            if self.dtype != torch.float32:  # else the model file holds the masters
                flat[f"master.{name}"] = master.detach()
        return flat

    def load_state(self, flat: State) -> None:
        """Undo `state`. Raises `CheckpointError` for tensors of another model."""
        with torch.no_grad():
            for name, master in self.masters.items():
                state = {key: flat[f"{key}.{name}"] for key in KINDS[:3] if f"{key}.{name}" in flat}
                if state and state["exp_avg"].shape != master.shape:
                    raise CheckpointError(f"optimizer state of {name} has another shape than the model's")
                # The fused step needs its counter on the weight's device.
                self.inner.state[master] = {key: value.to(master.device, copy=True) for key, value in state.items()}
                if not state:
                    del self.inner.state[master]
                if f"master.{name}" in flat:
                    master.copy_(flat[f"master.{name}"])

    def _master(self, param: nn.Parameter) -> nn.Parameter:
        if param.dtype == torch.float32:
            return param
        master = nn.Parameter(param.detach().float().clone())

        def accumulate(p: torch.Tensor) -> None:
            assert p.grad is not None
            gradient = p.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            p.grad = None

        param.register_post_accumulate_grad_hook(accumulate)
        return master


class OffloadedAdamW(MasterAdamW):
    """`MasterAdamW` with masters, moments and step in main memory, for a model on a GPU (arXiv 2101.06840).

    Gradients are summed in float32 on the GPU and copied at the step. This saves 12 bytes per trained weight on the
    GPU, for 16 in main memory (8 of them pinned) and 8 over the bus. Its state is that of `MasterAdamW`.
    """

    def __init__(self, model: nn.Module, cfg: TrainConfig) -> None:
        """See `MasterAdamW`."""
        self.sums: dict[torch.Tensor, torch.Tensor] = {}  # of bfloat16 weights, which have no float32 gradient
        super().__init__(model, cfg)
        self._await_copies()

    def step(self, lr: float) -> dict[str, float]:
        """See `MasterAdamW.step`."""
        for name, param in self.params.items():
            gradient = param.grad if param.dtype == torch.float32 else self.sums.pop(param, None)
            if gradient is not None:
                self.masters[name].grad = _to_main_memory(gradient)
            param.grad = None
        self._await_copies()
        return super().step(lr)

    def zero_grad(self) -> None:
        """Clear the gradients in both places."""
        super().zero_grad()
        self.sums.clear()
        for param in self.params.values():
            param.grad = None

    def pending_state_bytes(self) -> int:
        """0: the moments are in main memory."""
        return 0

    def load_state(self, flat: State) -> None:
        """Undo `state`, of this class or of `MasterAdamW`; the model's weights must be loaded."""
        super().load_state(flat)
        if self.dtype == torch.float32:
            with torch.no_grad():
                for name, param in self.params.items():
                    self.masters[name].copy_(param)

    def _master(self, param: nn.Parameter) -> nn.Parameter:
        if param.dtype != torch.float32:
            param.register_post_accumulate_grad_hook(self._accumulate)
        return nn.Parameter(_to_main_memory(param.detach().float()))

    def _await_copies(self) -> None:
        device = next(iter(self.params.values())).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _accumulate(self, param: torch.Tensor) -> None:
        assert param.grad is not None
        gradient = param.grad.float()
        self.sums[param] = self.sums[param].add_(gradient) if param in self.sums else gradient
        param.grad = None


def _to_main_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on that device, pinned if it comes from a GPU; complete after a synchronisation."""
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return there.copy_(tensor, non_blocking=True)


SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the way after warm-up → share of the peak
    "constant": lambda t: 1.0,
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
}


def lr_at(step: int, total: int, cfg: TrainConfig) -> float:
    """Learning rate of step 1..`total`: linear warm-up to `cfg.lr`, then `cfg.lr_schedule` towards 0."""
    if step <= cfg.warmup_steps:
        return cfg.lr * step / (cfg.warmup_steps + 1)
    t = (step - cfg.warmup_steps) / max(total - cfg.warmup_steps + 1, 1)
    return cfg.lr * SCHEDULES[cfg.lr_schedule](min(t, 1.0))
