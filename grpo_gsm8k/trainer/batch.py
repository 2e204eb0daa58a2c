"""Converts data to tensors and back. Only this module shifts ids to targets; it is private to the trainer.

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
from typing import Any

import numpy as np
import torch

from grpo_gsm8k.datatypes import Datum


@dataclass(frozen=True)
class Batch:
    """One whole update, or a slice of it.

    Attributes:
        input_ids, targets: `(B, T)` int64.
        mask: `(B, T)` float32, 1 where the target is trained.
        old_logprobs, ref_logprobs, advantages, weights: `(B, T)` float32, see `Datum`; 0 where masked out.
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
        """Select rows, cut to the longest of them; `shared` packs them."""
        index, longest = list(rows), max(self.lengths[r] for r in rows)
        few = self._each(lambda x: x[index, :longest])
        return replace(few, lengths=tuple(self.lengths[r] for r in rows), shared=shared)

    def prompt_lengths(self, rows: Sequence[int]) -> list[int]:
        """Number of tokens before the first trained one, for each of these rows; all tokens if none is trained."""
        trained, first = self.mask[rows].max(1)
        return [int(at) + 1 if any_ else self.lengths[row] for row, any_, at in zip(rows, trained, first, strict=True)]

    @functools.cached_property
    def trained(self) -> torch.Tensor:
        """`(N,)` int64, the flat indices of the trained targets, row by row.

        `to` copies them: computing them on a GPU would force a sync.
        """
        return self.mask.flatten().nonzero().squeeze(-1)

    def at_trained(self, x: torch.Tensor) -> torch.Tensor:
        """Gather a `(B, T)` tensor at the trained targets, `(N,)`."""
        return x.flatten().index_select(0, self.trained)

    def everywhere(self, x: torch.Tensor) -> torch.Tensor:
        """Scatter an `(N,)` tensor of the trained targets to `(B, T)`; 0 elsewhere."""
        return torch.zeros_like(self.mask, dtype=x.dtype).flatten().index_copy(0, self.trained, x).view_as(self.mask)

    def trained_targets(self) -> Batch:
        """The N trained targets as a batch of one row, `(1, N)`."""
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


def make_batch(data: Sequence[Datum], pad_id: int = 0) -> Batch:
    """Pad and shift the rows, at least one, of an update."""
    lengths = tuple(len(row.token_ids) - 1 for row in data)
    ids = np.full((len(data), max(lengths) + 1), pad_id)
    for b, row in enumerate(data):
        n = len(row.token_ids)
        assert len(row.mask) == n
        assert {len(row.logprobs), len(row.advantages), len(row.ref_logprobs), len(row.weights)} <= {0, n}
        ids[b, :n] = row.token_ids
    input_ids, targets = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
    for b, n in enumerate(lengths):
        input_ids[b, n:] = pad_id  # the last token is a target alone
    mask = shifted([row.mask for row in data], lengths)
    return Batch(
        input_ids,
        targets,
        mask,
        old_logprobs=shifted([row.logprobs for row in data], lengths) * mask,
        ref_logprobs=shifted([row.ref_logprobs for row in data], lengths) * mask,
        advantages=shifted([row.advantages for row in data], lengths) * mask,
        weights=shifted([row.weights or row.mask for row in data], lengths) * mask,
        lengths=lengths,
    )


def shifted(values: Sequence[Sequence[float]], lengths: Sequence[int]) -> torch.Tensor:
    """`(B, T)` float32, what rows hold per token, aligned to targets; 0 behind a row's end, and where it is empty."""
    out = np.zeros((len(lengths), max(lengths)), np.float32)  # numpy reads a tuple in a tenth of torch's time
    for b, (row, n) in enumerate(zip(values, lengths, strict=True)):
        if row:
            out[b, :n] = row[1:]
    return torch.from_numpy(out)


def unshifted(x: torch.Tensor, lengths: Sequence[int]) -> list[tuple[float, ...]]:
    """Undo `shifted`: values per token of each row, 0 for the first token, which is never predicted."""
    return [(0.0, *row[:n]) for row, n in zip(x.tolist(), lengths, strict=True)]
