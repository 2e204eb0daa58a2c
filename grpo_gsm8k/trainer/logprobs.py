"""Log-probabilities of a batch's trained targets, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from grpo_gsm8k.datatypes import Datum
from grpo_gsm8k.errors import ModelError
from grpo_gsm8k.trainer import architecture
from grpo_gsm8k.trainer.batch import Batch, make_batch, unshifted
from grpo_gsm8k.trainer.head import FusedGrad, target_logprobs
from grpo_gsm8k.trainer.packing import PROOF, last_hidden_states, microbatches

WIDE = (torch.float32, torch.float64)


def plain_logprobs(model: Any, batch: Batch, temperature: float = 1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`token_logprobs` by plain logits and autograd: works for any loss, with N x V memory."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits  # (B, T, V)
    spread = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    logp = spread.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1) * batch.mask  # (B, T)
    entropy = -(spread.exp() * spread).sum(-1)
    return logp, {"entropy": batch.at_trained(entropy), "top_prob": batch.at_trained(spread.amax(-1).exp())}


def token_logprobs(
    model: Any,
    batch: Batch,
    temperature: float = 1.0,
    statistics: bool = True,
    fused_grad: FusedGrad | None = None,
    entropy_grad: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probability of each trained target, with statistics of its distribution.

    Both refer to softmax(logits / temperature), the distribution that the sampler draws from, so an on-policy ratio is
    1 at any temperature.

    Args:
        model: a transformers causal language model.
        batch: on the model's device.
        statistics: False skips them and returns zeros.
        fused_grad: see `losses.fused_grad`; of the trained targets, row by row.
        entropy_grad: compute a gradient of the entropies, too.

    Returns:
        `(B, T)` float32 log-probabilities with gradient, zero where the mask is zero; and of the N trained targets
        `(N,)` of each of `head.STATISTICS`, without.
    """
    # Apply the head to the N trained positions only: at V = 152k it takes most of the memory.
    head, targets = model.get_output_embeddings(), batch.at_trained(batch.targets)
    hidden, logit_map = last_hidden_states(model, batch), architecture.logit_map(model)
    picked, found = target_logprobs(hidden, head, targets, temperature, statistics, fused_grad, logit_map, entropy_grad)
    return batch.everywhere(picked), found


@torch.no_grad()
def frozen_logprobs(model: Any, data: Sequence[Datum], packs: bool) -> list[tuple[float, ...]]:
    """The `logprobs` that a learner of this model returns for a few short rows, packed or padded."""
    batch = make_batch(data)
    out = torch.zeros_like(batch.mask)
    for rows, part in microbatches(batch, 1 << 20, range(len(batch)), packs):
        logp, _ = token_logprobs(model, part.to(model.device), statistics=False)
        out[rows, : logp.shape[1]] = logp.cpu()
    return unshifted(out, batch.lengths)


@torch.no_grad()
def own_logprobs(model: Any, data: Sequence[Datum]) -> list[tuple[float, ...]]:
    """The same by `model(...).logits`, one row at a time."""
    training, batch = model.training, make_batch(data)
    out = torch.zeros_like(batch.mask)
    model.eval()
    try:
        for row, length in enumerate(batch.lengths):
            ids = batch.input_ids[row : row + 1, :length].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0]
            logp = logits.float().log_softmax(-1).cpu()
            out[row, :length] = logp.gather(-1, batch.targets[row, :length].unsqueeze(-1)).squeeze(-1)
    finally:
        model.train(training)
    return unshifted(out * batch.mask, batch.lengths)


@torch.no_grad()
def check_head(model: Any) -> None:
    """Compare the trainer's log-probabilities with the model's own logits, on a few short rows.

    `token_logprobs` applies the head to the trunk's hidden states itself, on right-padded rows without an attention
    mask. It differs from `model(ids).logits` if the model does something behind its head that `architecture.logit_map`
    does not know, or if it is not causal.

    Raises:
        ModelError: names the architecture and what differs.
    """
    known, head = architecture.name(model), model.get_output_embeddings()
    if getattr(getattr(head, "weight", None), "ndim", 0) != 2:
        raise ModelError(f"{known}: has no linear output head; it cannot be trained here")
    if hasattr(architecture.trunk(model), "layers_are_rescaled"):  # RWKV
        raise ModelError(f"{known}: changes its weights in place when it is evaluated; it cannot be trained here")
    device = head.weight.device
    rows_of_ids = (torch.tensor([ids[:-1]], device=device) for ids in PROOF)
    logits = [model(input_ids=ids, use_cache=False).logits[0].float() for ids in rows_of_ids]
    if logits[0].shape[-1] != len(head.weight):
        raise ModelError(
            f"{known}: {logits[0].shape[-1]} logits from an output head of {len(head.weight)} rows: it does something "
            "behind its head that is not known here, and cannot be trained"
        )
    rows = [
        Datum((ids[0], *each.argmax(-1).tolist()), (0,) + (1,) * (len(ids) - 1))
        for ids, each in zip(PROOF, logits, strict=True)
    ]
    likeliest = make_batch(rows)
    read = make_batch([Datum(ids, row.mask) for ids, row in zip(PROOF, rows, strict=True)])
    batch = replace(likeliest, input_ids=read.input_ids).to(device)
    found = token_logprobs(model, batch, statistics=False)[0][batch.mask.bool()]
    own = torch.cat([each.log_softmax(-1).amax(-1) for each in logits])
    if fault := difference(found, own, model.dtype):
        raise ModelError(
            f"{known}: its own logits and its output head on its last hidden states give other probabilities "
            f"({fault}): it does something behind its head that is not known here, or sees what follows; it cannot be "
            "trained"
        )


def difference(found: torch.Tensor, own: torch.Tensor, dtype: torch.dtype) -> str:
    """How log-probabilities of likely tokens differ from a model's own, in words; empty where they are the same.

    In float32 none may be off by 1e-3. In coarser types rounding moves each; there the probabilities may differ by
    0.15 on average, since a mixture's router may choose another expert.
    """
    if dtype in WIDE:
        apart = float((found - own).abs().max())
        return "" if apart <= 1e-3 else f"log-probabilities differ by {apart:.2g}"
    apart = float((found.exp() - own.exp()).abs().mean())
    return "" if apart <= 0.15 else f"probabilities differ by {apart:.2g} on average"
