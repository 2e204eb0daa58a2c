"""The metrics of an update: entropy, clip fractions, KL, and the mismatch of sampler and trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from grpo_gsm8k.trainer.batch import Batch
from grpo_gsm8k.trainer.head import STATISTICS
from grpo_gsm8k.trainer.losses import Objective, importance_ratio, kl_to_reference, with_old_policy


@torch.no_grad()
def policy_sums(
    logp: torch.Tensor, statistics: Mapping[str, torch.Tensor], batch: Batch, objective: Objective
) -> dict[str, torch.Tensor]:
    """Sums (and maxima) over the trained tokens of a microbatch, from which `policy_metrics` computes the metrics.

    They stay on the device until `read_sums` fetches those of all microbatches. `statistics` are those of
    `token_logprobs`. A supervised loss has no old policy, so it logs no ratios.
    """
    mask, sampled = batch.mask, batch
    batch = with_old_policy(batch, logp, objective)
    sums = {"tokens": mask.sum(), **{name: values.sum() for name, values in statistics.items()}}
    if not objective.loss.supervised:
        above, below = objective.loss.clipped(logp, batch)
        moved = (logp - batch.old_logprobs) * mask
        delta, ratio = (logp - sampled.old_logprobs) * mask, importance_ratio(logp, sampled)
        sums |= {
            "clip_high": (mask * above).sum(),
            "clip_low": (mask * below).sum(),
            "kl": ((importance_ratio(logp, batch) - 1 - moved) * mask).sum(),
            "delta": delta.abs().sum(),
            "ratio": (ratio * mask).sum(),
            "ratio_squared": (ratio.square() * mask).sum(),
            "max_delta": delta.abs().max(),
            "max_ratio": (ratio * mask).max(),
        }
    if objective.on_policy:
        correction = objective.correction
        sums["capped"] = (mask * correction.outside(correction.ratio(sampled, logp))).sum()
    if objective.kl_coef:
        sums["kl_ref"] = (mask * kl_to_reference(logp, batch, objective)).sum()
    return sums


def read_sums(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """Add up the sums of all microbatches, with one device sync."""
    total: dict[str, float] = {}
    if parts:
        values = torch.stack([torch.stack([value.double() for value in part.values()]) for part in parts]).tolist()
        for part, row in zip(parts, values, strict=True):
            add_sums(total, dict(zip(part, row, strict=True)))
    return total


def add_sums(total: dict[str, float], part: dict[str, float]) -> None:
    """Add the `policy_sums` of a microbatch to the update's, in place."""
    for name, value in part.items():
        before = total.get(name, 0.0)
        total[name] = max(before, value) if name.startswith("max_") else before + value


def policy_metrics(sums: dict[str, float]) -> dict[str, float]:
    """The metrics of a whole update: means over the trained tokens of `rows_to_train`.

    `policy/entropy` and `policy/top_prob` are of the distributions that the tokens were drawn from (`head.STATISTICS`).
    `policy/kl_ref` is the KL term to the reference as the loss has it, without its coefficient;
    `policy/approx_kl` is the k3 estimator of KL(old || new) under the old policy's samples
    (http://joschu.net/blog/kl-approx.html); `mismatch/ess` the effective sample size of the importance
    ratios as a share of the tokens.
    """
    if not sums:
        return {}
    n = max(sums["tokens"], 1.0)
    metrics = {f"policy/{name}": sums[name] / n for name in STATISTICS if name in sums}
    if "kl_ref" in sums:
        metrics["policy/kl_ref"] = sums["kl_ref"] / n
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
    if "capped" in sums:
        metrics["mismatch/capped_frac"] = sums["capped"] / n
    return metrics
