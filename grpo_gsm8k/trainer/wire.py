"""Our losses on the Tinker wire, whose losses are sums over tokens and know no weights of their own.

An update's loss is the sum of weight x per-token loss. So the weights go into the wire's advantages (or its weights,
where it has any), and the gradient is ours:

    ours                                        wire                  inputs beside the targets
    cross_entropy                               cross_entropy         weights = w
    reinforce                                   cross_entropy         weights = w A
    grpo_clip                                   ppo                   logprobs, advantages = w A; bounds of the ratio
    grpo_clip whose clip no ratio reaches       importance_sampling   logprobs, advantages = w A
    cispo                                       cispo                 logprobs, advantages = w A; bounds of the ratio
    gspo, where w A is the same in a response   gspo                  logprobs, advantages = w A, sequence_ratio_mask
    any of the first four, on-policy            cross_entropy         weights = w A, the gradient at a ratio of 1

Everything else (a KL term, a dual clip, LUSPO, SAPO, VESPO, corrections, a loss of one's own) is computed here, from
the log-probabilities of a forward pass: cross_entropy with weights = -d loss / d log p has its gradient. What needs
more than the log-probabilities of the targets has no place on the wire: `remote.check` refuses it by name.

Ratios are clamped to e^±20 here and nowhere there; that is the only difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from grpo_gsm8k.trainer import packing
from grpo_gsm8k.trainer.batch import Batch
from grpo_gsm8k.trainer.data import MAX_LOG_RATIO
from grpo_gsm8k.trainer.losses import (
    Cispo,
    CrossEntropy,
    GrpoClip,
    Gspo,
    Objective,
    Reinforce,
    Sapo,
    Vespo,
    fused_grad,
    update_loss,
)
from grpo_gsm8k.trainer.metrics import policy_sums, read_sums

TINY = 2.0**-149  # the smallest float32: a gradient of 0 at a target that is trained, see `surrogate`


@dataclass(frozen=True)
class WireLoss:
    """A loss of the wire, its configuration, and its inputs `(B, T)`, aligned to the targets."""

    name: str
    inputs: Mapping[str, torch.Tensor]
    config: Mapping[str, float] = field(default_factory=dict)


def native(objective: Objective, batch: Batch) -> WireLoss | None:
    """The wire's own loss with this objective's gradient; None where it has none."""
    kind = type(objective.loss)
    if objective.kl_coef or (objective.on_policy and objective.correction.kind != "none"):
        return None
    if objective.on_policy and kind in (GrpoClip, Cispo, Sapo, Vespo):
        return _reinforce(objective.loss, batch)
    return NATIVE[kind](objective.loss, batch) if kind in NATIVE and not objective.on_policy else None


def _cross_entropy(loss: Any, batch: Batch) -> WireLoss:
    return WireLoss("cross_entropy", {"weights": batch.weights})


def _reinforce(loss: Any, batch: Batch) -> WireLoss:
    return WireLoss("cross_entropy", {"weights": batch.weights * batch.advantages})


def _surrogate_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    return {"logprobs": batch.old_logprobs, "advantages": batch.weights * batch.advantages}


def _bounds(loss: Any) -> dict[str, float]:
    """The clip as the wire has it: bounds of the ratio, no distances from 1."""
    return {"clip_low_threshold": max(1 - loss.clip_eps, 0.0), "clip_high_threshold": 1 + loss.clip_eps_high}


def _grpo_clip(loss: GrpoClip, batch: Batch) -> WireLoss | None:
    if loss.dual_clip:
        return None
    bounds = _bounds(loss)
    if bounds["clip_low_threshold"] == 0 and bounds["clip_high_threshold"] > math.exp(MAX_LOG_RATIO):
        return WireLoss("importance_sampling", _surrogate_inputs(batch))
    return WireLoss("ppo", _surrogate_inputs(batch), bounds)


def _cispo(loss: Cispo, batch: Batch) -> WireLoss:
    return WireLoss("cispo", _surrogate_inputs(batch), _bounds(loss))


def _gspo(loss: Gspo, batch: Batch) -> WireLoss | None:
    """The wire leaves a token its own advantage, where ours shares them all: the same if they are alike in a row."""
    inputs = _surrogate_inputs(batch)
    first = inputs["advantages"].gather(1, batch.mask.argmax(1, keepdim=True))
    if loss.dual_clip or not torch.equal(inputs["advantages"], first * batch.mask):
        return None
    return WireLoss("gspo", {**inputs, "sequence_ratio_mask": batch.mask}, _bounds(loss))


NATIVE: dict[type, Callable[[Any, Batch], WireLoss | None]] = {
    CrossEntropy: _cross_entropy,
    Reinforce: _reinforce,
    GrpoClip: _grpo_clip,
    Cispo: _cispo,
    Gspo: _gspo,
}


# ------------------------------------------------------------------------------------------- computed here


@dataclass(frozen=True)
class Layout:
    """How a service that is ours cuts an update into microbatches, see `packing.microbatches`.

    Sums are formed in its order, so that they are to the bit what a local run logs.
    """

    tokens: int
    packs: bool

    def parts(self, batch: Batch, rows: Sequence[int]) -> Iterator[tuple[list[int], Batch]]:
        """The numbers of the rows of each microbatch, and their batch."""
        return packing.microbatches(batch, self.tokens, rows, self.packs)


def loss_sums(
    logp: torch.Tensor, batch: Batch, rows: Sequence[int], objective: Objective, layout: Layout
) -> dict[str, float]:
    """The loss of an update under the key `loss`, and the sums that `policy_metrics` reads.

    Args:
        logp: `(B, T)` log-probabilities of the targets, 0 where they are not trained.
    """
    sums = []
    for numbers, part in layout.parts(batch, rows):
        found = logp[numbers, : part.mask.shape[1]]
        with torch.no_grad():
            loss = update_loss(found, part, objective)
        sums.append({**policy_sums(found, {}, part, objective), "loss": loss})
    return {"loss": 0.0, **read_sums(sums)}


def surrogate(logp: torch.Tensor, batch: Batch, rows: Sequence[int], objective: Objective, layout: Layout) -> WireLoss:
    """Cross-entropy with the gradient of the objective at these log-probabilities.

    A trained target without a gradient (a clip) weighs `TINY` instead of 0: which targets are trained decides how our
    service packs the rows, and so the order of its sums. In a gradient it is lost to rounding.
    """
    weights = torch.zeros_like(logp)
    for numbers, part in layout.parts(batch, rows):
        weights[numbers, : part.mask.shape[1]] = -_derivative(logp[numbers, : part.mask.shape[1]], part, objective)
    return WireLoss("cross_entropy", {"weights": torch.where((weights == 0) & batch.mask.bool(), TINY, weights)})


def _derivative(logp: torch.Tensor, part: Batch, objective: Objective) -> torch.Tensor:
    """d loss / d logp, `(B, T)`, formed as the trainer here forms it."""
    if derivatives := fused_grad(part, objective):
        dlogp, _ = derivatives(part.at_trained(logp), slice(None))
        return part.everywhere(dlogp)
    leaf = logp.detach().clone().requires_grad_()
    (dlogp,) = torch.autograd.grad(update_loss(leaf, part, objective), leaf)
    return dlogp * part.mask
