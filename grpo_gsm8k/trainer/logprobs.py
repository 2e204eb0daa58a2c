"""Log-probabilities of a batch's targets, in float32, at the masked positions only."""

from __future__ import annotations

from typing import Any

import torch

from grpo_gsm8k.trainer.batch import Batch
from grpo_gsm8k.trainer.head import Slope, target_logprobs
from grpo_gsm8k.trainer.packing import last_hidden_states


def token_logprobs(
    model: Any, batch: Batch, temperature: float = 1.0, statistics: bool = True, slope: Slope | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probability of each trained target, and what the distribution that it is from is like.

    Both are of softmax(logits / temperature): the distribution that the sampler draws from, so that an
    on-policy ratio is 1 at any temperature.

    Args:
        model: a transformers causal language model.
        batch: on the model's device.
        statistics: skip their cost with False (zeros are returned).
        slope: see `objectives.slope`; of the trained targets in their order, row by row.

    Returns:
        `(B, T)` float32 log-probabilities with gradient, zero where the mask is zero; and of the N trained targets
        `(N,)` of each of `head.STATISTICS`, without.
    """
    # The head is applied to the N trained positions alone: at V = 152k it is most of the memory.
    head, targets = model.get_output_embeddings(), batch.at_trained(batch.targets)
    hidden = last_hidden_states(model, batch)
    picked, found = target_logprobs(hidden, head, targets, temperature, statistics, slope)
    everywhere = torch.zeros_like(batch.mask, dtype=picked.dtype).flatten()
    return everywhere.index_copy(0, batch.trained, picked).view_as(batch.mask), found
