"""AdamW over float32 master weights, and the learning-rate schedule.

Where the model is bfloat16, an update of 1e-6 vanishes in the weight itself (8 bits of mantissa). So the
optimizer owns a float32 master of every such weight, gradients are accumulated there in float32 as each
microbatch's backward delivers them, and the model gets a rounded copy after the step. Where the model is
float32, the master *is* the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from grpo_gsm8k.config import TrainConfig
from grpo_gsm8k.errors import CheckpointError, NonFiniteError

State = dict[str, torch.Tensor]

SAMPLED_EVERY = 61  # prime, so that it meets every column of a matrix in turn


class MasterAdamW:
    """`torch.optim.AdamW` on float32 masters of a model's trainable weights, state as named tensors."""

    def __init__(self, model: nn.Module, cfg: TrainConfig) -> None:
        """`cfg` gives the betas, the weight decay (on matrices only) and the gradient clip."""
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: self._master(p) for name, p in self.params.items()}
        matrices = [m for m in self.masters.values() if m.ndim >= 2]
        others = [m for m in self.masters.values() if m.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": cfg.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.inner = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)
        self.grad_clip = cfg.grad_clip

    def step(self, lr: float) -> dict[str, float]:
        """Clip, check, update, and clear the gradients.

        Returns:
            `policy/grad_norm` before clipping, `policy/lr`, and `policy/update_to_weight`: the norm of the
            step over the norm of the weights, from a sample. Of a bfloat16 model also `policy/bf16_changed_frac`: the
            share of its weights in which the step shows, from a sample.

        Raises:
            NonFiniteError: when the gradient is NaN or infinite. The weights are untouched.
        """
        grads = [m.grad for m in self.masters.values() if m.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
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
            shown = self._round()
            moved = torch.nn.utils.get_total_norm([m - b for m, b in zip(self._sample(), before, strict=True)])
            weight = torch.nn.utils.get_total_norm(before)
        return {
            "policy/grad_norm": float(norm),
            "policy/lr": lr,
            "policy/update_to_weight": float(moved / weight.clamp(min=1e-12)),
            **shown,
        }

    def _sample(self) -> list[torch.Tensor]:
        """A copy of one weight in 61: a copy of all would be a quarter more memory, at the peak."""
        return [m.detach().flatten()[::SAMPLED_EVERY].clone() for m in self.masters.values()]

    def _round(self) -> dict[str, float]:
        """Give a bfloat16 model its rounded copy of the masters, and look at a sample of it before and after.

        The look at one weight in 61 costs a twentieth of an update (42M weights on one CPU core: 12 of 244 ms); at
        all of them it would cost half.
        """
        changed: list[torch.Tensor] = []
        for name, param in self.params.items():
            master = self.masters[name]
            if param is not master:
                rounded = master.flatten()[::SAMPLED_EVERY].to(param.dtype)
                changed.append(param.flatten()[::SAMPLED_EVERY] != rounded)
                param.copy_(master)
        return {"policy/bf16_changed_frac": float(torch.cat(changed).float().mean())} if changed else {}

    def zero_grad(self) -> None:
        """Forget what has been accumulated."""
        self.inner.zero_grad(set_to_none=True)

    def state(self) -> State:
        """Moments, step counts and bfloat16 models' masters as flat named tensors."""
        flat: State = {}
        for name, master in self.masters.items():
            for key, value in self.inner.state.get(master, {}).items():
                flat[f"{key}.{name}"] = value
            if master is not self.params[name]:
                flat[f"master.{name}"] = master.detach()
        return flat

    def load_state(self, flat: State) -> None:
        """Undo `state`. Raises `CheckpointError` when the tensors are of another model."""
        with torch.no_grad():
            for name, master in self.masters.items():
                state = {
                    key: flat[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in flat
                }
                if state and state["exp_avg"].shape != master.shape:
                    raise CheckpointError(f"optimizer state of {name} has another shape than the model's")
                self.inner.state[master] = {
                    key: value.clone() if key == "step" else value.to(master.device, copy=True)
                    for key, value in state.items()
                }
                if not state:
                    del self.inner.state[master]
                if f"master.{name}" in flat:
                    master.copy_(flat[f"master.{name}"])

    @staticmethod
    def _master(param: nn.Parameter) -> nn.Parameter:
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
