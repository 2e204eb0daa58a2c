"""Rows of token ids become tensors. The only place in the repository that shifts.

A model that reads `input_ids[:, t]` predicts `targets[:, t]`, the token that follows. Mask,
log-probabilities, advantages and weights are all `(B, T)` and aligned **to targets**: `mask[b, t]` says
whether the prediction of `targets[b, t]` is trained. So the first response token and the end-of-turn id are
trained, no prompt token and no padding ever is, and whether padding shares an id with the end of turn does
not matter, since the mask comes from the rows and never from `id != pad`.

Rows are padded on the right. A causal model never sees what follows, so no attention mask is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from grpo_gsm8k.datatypes import Datum

MAX_LOG_RATIO = 20.0  # e^20 = 5e8: beyond it a ratio is an accident, and must not become inf

Aggregation = Literal["sequence", "token", "constant"]
Correction = Literal["none", "truncate", "mask"]


@dataclass(frozen=True)
class Batch:
    """One whole update, or a slice of it.

    Attributes:
        input_ids, targets: `(B, T)` int64.
        mask: `(B, T)` float32, 1 where the target is trained.
        old_logprobs: `(B, T)` float32, of the policy that drew the target; 0 where masked out.
        ref_logprobs: `(B, T)` float32, of the reference model of the KL term; 0 where masked out or without one.
        advantages: `(B, T)` float32.
        weights: `(B, T)` float32; the loss is the sum of weight x per-token loss. They are set from the
            whole update before it is split, so any split, order or packing gives the same gradient.
        lengths: true length of each row of `input_ids`.
        shared: how many first tokens each row has in common with the row before it, where rows are packed
            (`trainer/packing.py`); empty where they are padded.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    lengths: tuple[int, ...]
    shared: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, rows: Sequence[int], shared: tuple[int, ...] = ()) -> Batch:
        """Some rows, cut to the longest of them; `shared` where they are to be packed."""
        index, longest = list(rows), max(self.lengths[r] for r in rows)
        few = self._each(lambda x: x[index, :longest])
        return replace(few, lengths=tuple(self.lengths[r] for r in rows), shared=shared)

    def prompt_lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens of each of these rows before its first trained one; all of them where none is trained."""
        trained, first = self.mask[rows].max(1)
        return [int(at) + 1 if any_ else self.lengths[row] for row, any_, at in zip(rows, trained, first, strict=True)]

    @functools.cached_property
    def trained(self) -> torch.Tensor:
        """`(N,)` int64, where the trained targets stand among the B x T, row by row.

        `to` takes it along: counting them on a GPU makes the host wait for it.
        """
        return self.mask.flatten().nonzero().squeeze(-1)

    def at_trained(self, x: torch.Tensor) -> torch.Tensor:
        """`(N,)`, what a `(B, T)` tensor holds at the trained targets."""
        return x.flatten().index_select(0, self.trained)

    def trained_targets(self) -> Batch:
        """The N trained targets alone, `(1, N)`, in their order, row by row. Rows and lengths are no more."""
        few = self._each(lambda x: self.at_trained(x).unsqueeze(0))
        return replace(few, lengths=(len(self.trained),), shared=())

    def columns(self, part: slice) -> Batch:
        """Some targets of a batch of one row."""
        few = self._each(lambda x: x[:, part])
        return replace(few, lengths=(few.mask.shape[1],))

    @property
    def cells(self) -> int:
        """Cells of the forward pass: tokens that are read where rows are packed, else rows x longest."""
        return sum(self.lengths) - sum(self.shared) if self.shared else self.input_ids.numel()

    def rows_with_targets(self) -> list[int]:
        """The rows that have a trained token."""
        return [r for r, tokens in enumerate(self.mask.sum(1).tolist()) if tokens]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        there = self._each(lambda x: x.to(device, non_blocking=True))
        vars(there)["trained"] = self.trained.to(device, non_blocking=True)
        return there

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        mine = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(x) for name, x in mine.items() if torch.is_tensor(x)}
        return replace(self, **changed)


def make_batch(rows: Sequence[Datum], pad_id: int, aggregation: Aggregation = "token", max_tokens: int = 0) -> Batch:
    """Pad, shift and weigh the rows of one update.

    Args:
        rows: at least one.
        aggregation: see `loss_weights`.
        max_tokens: the constant of the "constant" aggregation.
    """
    lengths = tuple(len(row.token_ids) - 1 for row in rows)
    shape = (len(rows), max(lengths))
    input_ids = torch.full(shape, pad_id)
    targets = torch.full(shape, pad_id)
    mask, old_logprobs, advantages = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    for b, row in enumerate(rows):
        assert len(row.mask) == len(row.token_ids)
        assert {len(row.logprobs), len(row.advantages)} <= {0, len(row.token_ids)}
        ids = torch.tensor(row.token_ids)
        input_ids[b, : lengths[b]] = ids[:-1]
        targets[b, : lengths[b]] = ids[1:]
        mask[b, : lengths[b]] = torch.tensor(row.mask[1:], dtype=torch.float32)
        if row.logprobs:
            old_logprobs[b, : lengths[b]] = torch.tensor(row.logprobs[1:], dtype=torch.float32)
        if row.advantages:
            advantages[b, : lengths[b]] = torch.tensor(row.advantages[1:], dtype=torch.float32)
    advantages *= mask
    return Batch(
        input_ids,
        targets,
        mask,
        old_logprobs,
        torch.zeros(shape),
        advantages,
        loss_weights(mask, aggregation, max_tokens),
        lengths,
    )


def loss_weights(mask: torch.Tensor, aggregation: Aggregation, max_tokens: int = 0) -> torch.Tensor:
    """What each token's loss counts in the whole update, `(B, T)`; all zero for an all-masked update.

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


def with_old_logprobs(
    batch: Batch,
    logprobs: torch.Tensor,
    correction: Correction = "none",
    cap: float = 2.0,
) -> Batch:
    """The same batch with other log-probabilities, `(B, T)` and without a gradient, as its old ones.

    The tokens were drawn by the sampler, whose kernels (and, one step off, whose weights) are others. A correction
    weighs each token's loss by p = pi_old / pi_sampler, held fixed: "truncate" by min(p, cap), "mask" by p where
    1 / cap <= p <= cap and 0 elsewhere. The objective's ratio is then pi / pi_old alone (the decoupled objective of
    arXiv 2110.00641 and arXiv 2505.24298).
    """
    weights = batch.weights
    if correction != "none":
        p = _sampler_ratio(batch, logprobs)
        kept = p.clamp(max=cap) if correction == "truncate" else p * (p <= cap) * (p >= 1 / cap)
        weights = weights * kept
    return replace(batch, old_logprobs=logprobs * batch.mask, weights=weights)


def mismatch_metrics(batches: Sequence[Batch], logprobs: Sequence[torch.Tensor], cap: float) -> dict[str, float]:
    """How far the sampler's log-probabilities are from a frozen pass of the trainer, over one pass of updates.

    Args:
        batches: with the sampler's log-probabilities as their old ones.
        logprobs: the trainer's, `(B, T)` each.
        cap: of the importance correction.
    """
    chosen = [batch.mask.bool() for batch in batches]
    pairs = list(zip(batches, logprobs, chosen, strict=True))
    delta = torch.cat([(logp - batch.old_logprobs)[mask].abs() for batch, logp, mask in pairs])
    p = torch.cat([_sampler_ratio(batch, logp)[mask] for batch, logp, mask in pairs])
    return {
        "mismatch/logp_abs_mean": float(delta.mean()),
        "mismatch/logp_abs_max": float(delta.max()),
        "mismatch/ratio_mean": float(p.mean()),
        "mismatch/ratio_max": float(p.max()),
        "mismatch/ess": float(p.sum() ** 2 / p.square().sum() / len(p)),
        "mismatch/capped_frac": float(((p > cap) | (p < 1 / cap)).float().mean()),
    }


def _sampler_ratio(batch: Batch, logprobs: torch.Tensor) -> torch.Tensor:
    """pi_old / pi_sampler of each target, `(B, T)`; 1 where masked out."""
    return ((logprobs - batch.old_logprobs) * batch.mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def with_ref_logprobs(batch: Batch, logprobs: torch.Tensor) -> Batch:
    """The same batch with the log-probabilities of the reference model, `(B, T)`."""
    return replace(batch, ref_logprobs=logprobs * batch.mask)
