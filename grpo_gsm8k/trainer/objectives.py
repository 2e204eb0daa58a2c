"""What is minimised. Every objective is a per-token loss over one shared form.

The loss of an update is `sum(batch.weights * per_token_loss)`; how tokens and responses are averaged lies
in the weights (`trainer/batch.py`) and is the same for all objectives. A new objective is a function of
(log-probabilities, batch, settings) and an entry in `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from grpo_gsm8k.trainer.batch import Batch

MAX_LOG_RATIO = 20.0  # e^20 = 5e8: beyond it the ratio is an accident, and must not become inf


@dataclass(frozen=True)
class Objective:
    """Which loss, and its settings.

    Attributes:
        loss: a key of `LOSSES`.
        clip_eps, clip_eps_high: the ratio is clipped to [1 - clip_eps, 1 + clip_eps_high].
        temperature: the one that was sampled with.
    """

    loss: str = "cross_entropy"
    clip_eps: float = 0.2
    clip_eps_high: float = 0.2
    temperature: float = 1.0


def cross_entropy(logp: torch.Tensor, batch: Batch, objective: Objective) -> torch.Tensor:
    """Negative log-likelihood of the targets, `(B, T)`."""
    return -logp


def grpo_clip(logp: torch.Tensor, batch: Batch, objective: Objective) -> torch.Tensor:
    """The clipped surrogate of PPO with group-relative advantages, `(B, T)` (arXiv 2402.03300 eq. 3)."""
    ratio = importance_ratio(logp, batch)
    clipped = ratio.clamp(1 - objective.clip_eps, 1 + objective.clip_eps_high)
    return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)


LOSSES: dict[str, Callable[[torch.Tensor, Batch, Objective], torch.Tensor]] = {
    "cross_entropy": cross_entropy,
    "grpo_clip": grpo_clip,
}


def importance_ratio(logp: torch.Tensor, batch: Batch) -> torch.Tensor:
    """pi / pi_old of each target, `(B, T)`; 1 where masked out."""
    return ((logp - batch.old_logprobs) * batch.mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@torch.no_grad()
def policy_sums(logp: torch.Tensor, entropies: torch.Tensor, batch: Batch, objective: Objective) -> dict[str, float]:
    """Sums (and maxima) over a slice's trained tokens, from which `policy_metrics` makes the update's figures.

    Those that speak of an old policy are left out where the loss knows none.
    """
    mask = batch.mask
    sums = {"tokens": mask.sum(), "entropy": entropies.sum()}
    if objective.loss != "cross_entropy":
        delta, ratio = (logp - batch.old_logprobs) * mask, importance_ratio(logp, batch)
        # The clip bites where it takes the gradient away: above for A > 0, below for A < 0.
        sums |= {
            "clip_high": (mask * (ratio > 1 + objective.clip_eps_high) * (batch.advantages > 0)).sum(),
            "clip_low": (mask * (ratio < 1 - objective.clip_eps) * (batch.advantages < 0)).sum(),
            "kl": ((ratio - 1 - delta) * mask).sum(),
            "delta": delta.abs().sum(),
            "ratio": (ratio * mask).sum(),
            "ratio_squared": (ratio.square() * mask).sum(),
            "max_delta": delta.abs().max(),
            "max_ratio": (ratio * mask).max(),
        }
    return {name: float(value) for name, value in sums.items()}


def add_sums(total: dict[str, float], part: dict[str, float]) -> None:
    """Add a slice's `policy_sums` to the update's, in place."""
    for name, value in part.items():
        before = total.get(name, 0.0)
        total[name] = max(before, value) if name.startswith("max_") else before + value


def policy_metrics(sums: dict[str, float]) -> dict[str, float]:
    """The figures of a whole update, means over its trained tokens.

    `policy/approx_kl` is the k3 estimator of KL(old || new) under the old policy's samples
    (http://joschu.net/blog/kl-approx.html); `mismatch/ess` the effective sample size of the importance
    ratios as a share of the tokens.
    """
    if not sums:
        return {}
    n = max(sums["tokens"], 1.0)
    metrics = {"policy/entropy": sums["entropy"] / n}
    if "ratio" in sums:
        metrics |= {
            "policy/clip_frac_high": sums["clip_high"] / n,
            "policy/clip_frac_low": sums["clip_low"] / n,
            "policy/clip_frac": (sums["clip_high"] + sums["clip_low"]) / n,
            "policy/approx_kl": sums["kl"] / n,
            "mismatch/logp_abs_mean": sums["delta"] / n,
            "mismatch/logp_abs_max": sums["max_delta"],
            "mismatch/ratio_mean": sums["ratio"] / n,
            "mismatch/ratio_max": sums["max_ratio"],
            "mismatch/ess": sums["ratio"] ** 2 / max(sums["ratio_squared"], 1e-30) / n,
        }
    return metrics
