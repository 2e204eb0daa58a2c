"""Per-token data of an update: loss weights, and the log-probabilities of the old policy and the reference model.

They are set over a whole pass before it is split into minibatches and microbatches, so any split, order or packing
gives the same gradient: the loss is the sum of weight x per-token loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from grpo_gsm8k.datatypes import Datum
from grpo_gsm8k.trainer.batch import Batch, make_batch, shifted, unshifted

MAX_LOG_RATIO = 20.0  # e^20 = 5e8: a larger ratio is meaningless, and must not become inf

Aggregation = Literal["sequence", "token", "constant"]
Correction = Literal["none", "truncate", "mask", "sequence_truncate", "sequence_mask", "geometric_mask"]
Values = Sequence[Sequence[float]]
"""A number for each token of each row, as `Learner.logprobs` returns them."""


def weighted(data: Sequence[Datum], aggregation: Aggregation, max_tokens: int = 0) -> list[Datum]:
    """Set the loss weights of a whole pass; see `loss_weights`."""
    lengths = [len(row.token_ids) - 1 for row in data]
    weights = loss_weights(shifted([row.mask for row in data], lengths), aggregation, max_tokens)
    return [replace(row, weights=each) for row, each in zip(data, unshifted(weights, lengths), strict=True)]


def loss_weights(mask: torch.Tensor, aggregation: Aggregation, max_tokens: int = 0) -> torch.Tensor:
    """The weight of each token's loss in the whole update, `(B, T)`; all zero if everything is masked.

    "sequence": mean over a response's tokens, then over the responses that have any (GRPO, arXiv
    2402.03300 eq. 3). "token": mean over all tokens of the update (DAPO, arXiv 2503.14476 eq. 8).
    "constant": sum over tokens / `max_tokens`, mean over responses (Dr.GRPO, arXiv 2503.20783).
    A row that is masked out counts in no denominator.
    """
    tokens = mask.sum(1, keepdim=True)  # (B, 1)
    responses = tokens.gt(0).sum().clamp(min=1)
    if aggregation == "sequence":
        return mask / tokens.clamp(min=1) / responses
    if aggregation == "constant":
        return mask / max_tokens / responses
    return mask / tokens.sum().clamp(min=1)


@dataclass(frozen=True)
class ImportanceCorrection:
    """Weights each token's loss by p = pi_old / pi_sampler, held fixed.

    The sampler drew the tokens with other kernels than the trainer's (and, one step off, other weights). The ratio in
    the loss is then pi / pi_old only (the decoupled objective of arXiv 2110.00641 and arXiv 2505.24298).

        kind                 ratio                            weight
        truncate             p of the token                   p clipped to [cap_low, cap] (TIS)
        mask                 p of the token                   p, 0 outside of the bounds (MIS)
        sequence_truncate    product of p over the response   the product, clipped
        sequence_mask        product of p over the response   the product, 0 outside
        geometric_mask       geometric mean of p              1, 0 outside (verl's geometric rejection sampling)

    Attributes:
        cap, cap_low: the bounds. Without a `cap_low` a mask's lower bound is 1 / cap, and truncation has none.
    """

    kind: Correction = "none"
    cap: float = 2.0
    cap_low: float = 0.0

    @property
    def separable(self) -> bool:
        """Whether a token's weight depends on its own ratio alone."""
        return self.kind in ("none", "truncate", "mask")

    def ratio(self, batch: Batch, logprobs: torch.Tensor) -> torch.Tensor:
        """The ratio that the bounds apply to, `(B, T)`; 1 where masked out."""
        log_p = (logprobs - batch.old_logprobs) * batch.mask
        if not self.separable:
            log_p = log_p.sum(1, keepdim=True) * batch.mask
        if self.kind == "geometric_mask":
            log_p = log_p / batch.mask.sum(1, keepdim=True).clamp(min=1)
        return log_p.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()

    def outside(self, ratio: torch.Tensor) -> torch.Tensor:
        """Where the ratio exceeds the bounds."""
        return (ratio > self.cap) | (ratio < (self.cap_low or 1 / self.cap))

    def factor(self, ratio: torch.Tensor) -> torch.Tensor:
        """The factor of each token's weight."""
        if self.kind.endswith("truncate"):
            return ratio.clamp(self.cap_low, self.cap)
        kept = torch.ones_like(ratio) if self.kind == "geometric_mask" else ratio
        return kept * ~self.outside(ratio)

    def apply(self, batch: Batch, logprobs: torch.Tensor) -> torch.Tensor:
        """The corrected weights of the batch, `(B, T)`.

        Args:
            logprobs: of the old policy, `(B, T)`, without gradient; the batch holds the sampler's.
        """
        return batch.weights if self.kind == "none" else batch.weights * self.factor(self.ratio(batch, logprobs))


NO_CORRECTION = ImportanceCorrection()


def with_old_logprobs(
    data: Sequence[Datum], logprobs: Values, correction: ImportanceCorrection = NO_CORRECTION
) -> list[Datum]:
    """Replace the sampler's log-probabilities by the old policy's, and correct the weights."""
    batch = make_batch(data)
    weights = unshifted(correction.apply(batch, shifted(logprobs, batch.lengths)), batch.lengths)
    rows = zip(data, logprobs, weights, strict=True)
    return [replace(row, logprobs=tuple(old), weights=each) for row, old, each in rows]


def with_ref_logprobs(data: Sequence[Datum], logprobs: Values) -> list[Datum]:
    """Add the reference model's log-probabilities, for the KL term."""
    return [replace(row, ref_logprobs=tuple(ref)) for row, ref in zip(data, logprobs, strict=True)]


def mismatch_metrics(
    data: Sequence[Datum], logprobs: Values, correction: ImportanceCorrection = NO_CORRECTION
) -> dict[str, float]:
    """Compare the sampler's log-probabilities, in the rows, with those of a frozen pass of the trainer."""
    batch = make_batch(data)
    frozen, mask = shifted(logprobs, batch.lengths), batch.mask.bool()
    delta = (frozen - batch.old_logprobs)[mask].abs()
    p = NO_CORRECTION.ratio(batch, frozen)[mask]
    outside = correction.outside(correction.ratio(batch, frozen))[mask]
    return {
        "mismatch/logp_abs_mean": float(delta.mean()),
        "mismatch/logp_abs_max": float(delta.max()),
        "mismatch/ratio_mean": float(p.mean()),
        "mismatch/ratio_max": float(p.max()),
        "mismatch/ess": float(p.sum() ** 2 / p.square().sum() / len(p)),
        "mismatch/capped_frac": float(outside.float().mean()),
    }
