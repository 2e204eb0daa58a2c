"""What is minimised. Every objective is a per-token loss over one shared form.

The loss of an update is `sum(batch.weights * per_token_loss)`; how tokens and responses are averaged lies
in the weights (`trainer/batch.py`), what a response is credited with in the advantages (`grpo.py`), and both
are the same for all objectives. So most published algorithms are settings: `config.ALGORITHMS` lists them.
A new objective is a function of (log-probabilities, batch, settings) and an entry in `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from grpo_gsm8k.trainer.batch import MAX_LOG_RATIO, Batch, Correction, with_old_logprobs
from grpo_gsm8k.trainer.head import STATISTICS


@dataclass(frozen=True)
class Objective:
    """Which loss, and its settings.

    Attributes:
        loss: a key of `LOSSES`.
        clip_eps, clip_eps_high: the ratio is clipped to [1 - clip_eps, 1 + clip_eps_high].
        temperature: the one that was sampled with.
        dual_clip: where the advantage is negative, the ratio counts at most this; 0 for no such bound.
        kl_coef: weight of the KL to the reference model; 0 for none.
        kl_estimator, kl_bias_correction: see `kl_to_reference`.
        on_policy: the old policy is the very one that is trained, held fixed: so says who makes one update only from a
            batch. No frozen pass is needed for its log-probabilities; those of the batch are the sampler's.
        importance_correction, importance_cap: then, of that policy over the sampler; see `batch.with_old_logprobs`.
    """

    loss: str = "cross_entropy"
    clip_eps: float = 0.2
    clip_eps_high: float = 0.2
    temperature: float = 1.0
    dual_clip: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_bias_correction: bool = True
    on_policy: bool = False
    importance_correction: Correction = "none"
    importance_cap: float = 2.0


def per_token_loss(logp: torch.Tensor, batch: Batch, objective: Objective) -> torch.Tensor:
    """The objective's loss and its KL term, `(B, T)`."""
    loss = LOSSES[objective.loss](logp, batch, objective)
    if objective.kl_coef:
        loss = loss + objective.kl_coef * kl_to_reference(logp, batch, objective)
    return loss


def update_loss(logp: torch.Tensor, batch: Batch, objective: Objective) -> torch.Tensor:
    """What is minimised: the weighed sum over all targets of the batch, a scalar."""
    batch = with_its_old_policy(batch, logp, objective)
    return (batch.weights * per_token_loss(logp, batch, objective)).sum()


def with_its_old_policy(batch: Batch, logp: torch.Tensor, objective: Objective) -> Batch:
    """The batch with the old log-probabilities, and the weights, that the objective means."""
    if not objective.on_policy:
        return batch
    return with_old_logprobs(batch, logp.detach(), objective.importance_correction, objective.importance_cap)


def rows_to_train(batch: Batch, objective: Objective) -> list[int]:
    """The rows of an update that can have a gradient.

    A response without advantage has none under a loss that the advantage multiplies, unless the KL term pulls at it.
    Where no response of the update has one, the shortest stands in for all: the optimizer then steps with a gradient
    of zero, as it would have, and there is something to report.
    """
    share = batch.weights
    if objective.loss != "cross_entropy" and not objective.kl_coef:
        share = share * batch.advantages
    rows = share.abs().sum(1).ne(0).nonzero().flatten().tolist()  # what is not a number is not nothing
    return rows or sorted(batch.rows_with_targets(), key=lambda row: batch.lengths[row])[:1]


def slope(batch: Batch, objective: Objective) -> Callable[[torch.Tensor, slice], torch.Tensor] | None:
    """d `update_loss` / d logp of any run of the batch's trained targets, as soon as their logp is there.

    None where a target's loss depends on the others of its response (GSPO).
    """
    if objective.loss == "gspo":
        return None
    trained = batch.trained_targets()

    def of(logp: torch.Tensor, part: slice) -> torch.Tensor:
        with torch.enable_grad():
            leaf = logp.detach().unsqueeze(0).requires_grad_()
            return torch.autograd.grad(update_loss(leaf, trained.columns(part), objective), leaf)[0].squeeze(0)

    return of


def cross_entropy(logp: torch.Tensor, batch: Batch, objective: Objective) -> torch.Tensor:
    """Negative log-likelihood of the targets, `(B, T)`."""
    return -logp


def reinforce(logp: torch.Tensor, batch: Batch, objective: Objective) -> torch.Tensor:
    """-A log pi, `(B, T)` (Williams 1992, doi 10.1007/BF00992696). Knows no old policy: meant for on-policy updates."""
    return -logp * batch.advantages


def grpo_clip(logp: torch.Tensor, batch: Batch, objective: Objective) -> torch.Tensor:
    """The clipped surrogate of PPO with group-relative advantages, `(B, T)` (arXiv 2402.03300 eq. 3)."""
    return _clipped_surrogate(importance_ratio(logp, batch), batch, objective)


def gspo(logp: torch.Tensor, batch: Batch, objective: Objective) -> torch.Tensor:
    """The clipped surrogate with one ratio for a whole response, `(B, T)` (arXiv 2507.18071 eq. 5).

    It stands at each of the response's tokens; under the "sequence" aggregation it counts once, as in the paper.
    """
    return _clipped_surrogate(sequence_ratio(logp, batch), batch, objective)


def cispo(logp: torch.Tensor, batch: Batch, objective: Objective) -> torch.Tensor:
    """REINFORCE weighed by the clipped ratio, which takes no gradient away, `(B, T)` (arXiv 2506.13585 eq. 4-5)."""
    weight = importance_ratio(logp, batch).detach().clamp(1 - objective.clip_eps, 1 + objective.clip_eps_high)
    return -weight * batch.advantages * logp


LOSSES: dict[str, Callable[[torch.Tensor, Batch, Objective], torch.Tensor]] = {
    "cross_entropy": cross_entropy,
    "reinforce": reinforce,
    "grpo_clip": grpo_clip,
    "gspo": gspo,
    "cispo": cispo,
}

KL_ESTIMATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(-d) + d,
}


def _clipped_surrogate(ratio: torch.Tensor, batch: Batch, objective: Objective) -> torch.Tensor:
    clipped = ratio.clamp(1 - objective.clip_eps, 1 + objective.clip_eps_high)
    if objective.dual_clip:  # above 1 + clip_eps_high, so it bites for A < 0 alone (arXiv 1912.09729 eq. 5)
        ratio = ratio.clamp(max=objective.dual_clip)
    return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)


def importance_ratio(logp: torch.Tensor, batch: Batch) -> torch.Tensor:
    """pi / pi_old of each target, `(B, T)`; 1 where masked out."""
    return ((logp - batch.old_logprobs) * batch.mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_ratio(logp: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Geometric mean of a response's ratios, at each of its targets, `(B, T)`; 1 where masked out.

    A row is never split between microbatches, so every token of the response is here.
    """
    log_ratio = ((logp - batch.old_logprobs) * batch.mask).sum(1, keepdim=True)  # (B, 1)
    mean = log_ratio / batch.mask.sum(1, keepdim=True).clamp(min=1)
    return (mean * batch.mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def kl_to_reference(logp: torch.Tensor, batch: Batch, objective: Objective) -> torch.Tensor:
    """The KL term of each target, `(B, T)`; its expectation has the gradient of KL(pi || pi_ref).

    With d = log pi - log pi_ref the estimators are k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d
    (http://joschu.net/blog/kl-approx.html). An estimator of the value is not one of the gradient (arXiv 2512.21852,
    trl#4967). Expected gradients as a loss, with r = pi / pi_old:

        estimator   alone, on-policy       times r (with gradient)     times r (held fixed)
        k1          0: no KL at all        KL(pi || pi_ref)            0
        k2          KL(pi || pi_ref)       biased                      KL(pi || pi_ref)
        k3          KL(pi_ref || pi)       KL(pi || pi_ref)            KL(pi_ref || pi)

    "Alone" is off by the ratio, too, once the policy has moved from the one that sampled; the other two columns are
    not. So k1 and k3 are multiplied by r and k2 by r held fixed: per sample, k2 and k3 then pull with r d, and k1
    with r (d + 1), whose 1 is noise without mean. `kl_bias_correction=False` leaves the estimator alone, as
    arXiv 2402.03300 eq. 4 has it. The KL is that of each next token; that the policy also chose the tokens before
    it is left out of the gradient, as everywhere.
    """
    d = ((logp - batch.ref_logprobs) * batch.mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    kl = KL_ESTIMATORS[objective.kl_estimator](d)
    if not objective.kl_bias_correction:
        return kl
    ratio = importance_ratio(logp, batch)
    return kl * (ratio.detach() if objective.kl_estimator == "k2" else ratio)


@torch.no_grad()
def policy_sums(
    logp: torch.Tensor, statistics: Mapping[str, torch.Tensor], batch: Batch, objective: Objective
) -> dict[str, torch.Tensor]:
    """Sums (and maxima) over a slice's trained tokens, from which `policy_metrics` makes the update's figures.

    They stay where they are until `read_sums` fetches those of all slices. `statistics` are those of `token_logprobs`.
    What speaks of an old policy is left out where the loss knows none.
    """
    mask, drawn = batch.mask, batch
    batch = with_its_old_policy(batch, logp, objective)
    sums = {"tokens": mask.sum(), **{name: values.sum() for name, values in statistics.items()}}
    if objective.loss != "cross_entropy":
        above, below = where_clipped(logp, batch, objective)
        moved = (logp - batch.old_logprobs) * mask
        delta, ratio = (logp - drawn.old_logprobs) * mask, importance_ratio(logp, drawn)
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
        cap = objective.importance_cap
        sums["capped"] = (mask * ((ratio > cap) | (ratio < 1 / cap))).sum()
    if objective.kl_coef:
        sums["kl_ref"] = (mask * kl_to_reference(logp, batch, objective)).sum()
    return sums


def read_sums(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """The sums of an update from those of its slices; the host waits for a GPU once."""
    total: dict[str, float] = {}
    if parts:
        values = torch.stack([torch.stack([value.double() for value in part.values()]) for part in parts]).tolist()
        for part, row in zip(parts, values, strict=True):
            add_sums(total, dict(zip(part, row, strict=True)))
    return total


def where_clipped(logp: torch.Tensor, batch: Batch, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the clip acts, above and below, two `(B, T)` of bool."""
    ratio = sequence_ratio(logp, batch) if objective.loss == "gspo" else importance_ratio(logp, batch)
    above, below = ratio > 1 + objective.clip_eps_high, ratio < 1 - objective.clip_eps
    if objective.loss == "reinforce":
        return torch.zeros_like(above), torch.zeros_like(below)
    if objective.loss == "cispo":  # the weight is cut, whatever the advantage
        return above, below
    # A surrogate's clip takes the gradient away: above for A > 0, below for A < 0.
    dual = (ratio > objective.dual_clip) if objective.dual_clip else torch.zeros_like(above)
    good, bad = batch.advantages > 0, batch.advantages < 0
    return (above & good) | (dual & bad), below & bad


def add_sums(total: dict[str, float], part: dict[str, float]) -> None:
    """Add a slice's `policy_sums` to the update's, in place."""
    for name, value in part.items():
        before = total.get(name, 0.0)
        total[name] = max(before, value) if name.startswith("max_") else before + value


def policy_metrics(sums: dict[str, float]) -> dict[str, float]:
    """The figures of a whole update, means over its trained tokens: those of `rows_to_train`.

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
