"""Log-probabilities and entropies of a batch's targets, in float32, at the masked positions only."""

from __future__ import annotations

from typing import Any

import torch

from grpo_gsm8k.trainer.batch import Batch
from grpo_gsm8k.trainer.head import Slope, target_logprobs
from grpo_gsm8k.trainer.packing import last_hidden_states


def token_logprobs(
    model: Any, batch: Batch, temperature: float = 1.0, entropy: bool = True, slope: Slope | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each trained target, and the entropy of its distribution.

    Both are of softmax(logits / temperature): the distribution that the sampler draws from, so that an
    on-policy ratio is 1 at any temperature.

    Args:
        model: a transformers causal language model.
        batch: on the model's device.
        entropy: skip its cost with False (zeros are returned).
        slope: see `objectives.slope`; of the trained targets in their order, row by row.

    Returns:
        `(B, T)` float32 log-probabilities with gradient and `(B, T)` entropies in nats without; both are
        zero where the mask is zero.
    """
    chosen = batch.mask.bool()
    # The head is applied to the N trained positions alone: at V = 152k it is most of the memory.
    head, targets = model.get_output_embeddings(), batch.targets[chosen]
    hidden = last_hidden_states(model, batch)
    picked, spread = target_logprobs(hidden, head, targets, temperature, entropy, slope)  # (N,) each
    out = torch.zeros_like(batch.mask, dtype=picked.dtype)
    return out.masked_scatter(chosen, picked), out.masked_scatter(chosen, spread)
