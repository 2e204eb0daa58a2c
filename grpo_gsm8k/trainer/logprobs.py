"""Log-probabilities and entropies of a batch's targets, in float32, at the masked positions only."""

from __future__ import annotations

from typing import Any

import torch

from grpo_gsm8k.trainer.batch import Batch


def token_logprobs(
    model: Any, batch: Batch, temperature: float = 1.0, entropy: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each trained target, and the entropy of its distribution.

    Both are of softmax(logits / temperature): the distribution that the sampler draws from, so that an
    on-policy ratio is 1 at any temperature.

    Args:
        model: a transformers causal language model.
        batch: on the model's device.
        entropy: skip its cost with False (zeros are returned).

    Returns:
        `(B, T)` float32 log-probabilities with gradient and `(B, T)` entropies in nats without; both are
        zero where the mask is zero.
    """
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # (B, T, H)
    chosen = batch.mask.bool()
    # The head is applied to the N trained positions alone: at V = 152k it is most of the memory.
    logits = model.get_output_embeddings()(hidden[chosen]).float() / temperature  # (N, V)
    log_z = logits.logsumexp(-1)  # (N,)
    picked = logits.gather(-1, batch.targets[chosen].unsqueeze(-1)).squeeze(-1) - log_z  # (N,)
    logp = torch.zeros_like(batch.mask).masked_scatter(chosen, picked)
    entropies = torch.zeros_like(batch.mask)
    if entropy:
        with torch.no_grad():
            logits = logits.detach()
            exact = log_z.detach() - (torch.softmax(logits, -1) * logits).sum(-1)
            entropies.masked_scatter_(chosen, exact)
    return logp, entropies
