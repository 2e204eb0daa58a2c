"""A loss of one's own: a policy gradient whose ratio saturates smoothly instead of being clipped.

    grpo-gsm8k grpo --preset quick --data artifacts/data --loss examples.loss:Saturating --clip_eps 0.2

A loss maps log-probabilities and a batch to a loss for each token; weights, advantages and sampling stay as they are. A
field takes the setting of its name, here `--clip_eps`.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Saturating:
    """-exp(c tanh(log ratio / c)) A with c = log(1 + clip_eps): within 1 + clip_eps, and never without a gradient."""

    clip_eps: float = 0.2

    separable = True  # no token's loss depends on another's log-probability: the gradient is formed on the way forward
    zero_without_advantage = True  # rows with advantage 0 are skipped

    def __call__(self, logp, batch):  # (B, T)
        bound = torch.log1p(torch.tensor(self.clip_eps))
        log_ratio = logp - batch.old_logprobs
        return -torch.exp(bound * torch.tanh(log_ratio / bound)) * batch.advantages

    def clipped(self, logp, batch):
        """Where a clip would act, above and below: what `policy/clip_frac` counts."""
        ratio = (logp - batch.old_logprobs).exp()
        return ratio > 1 + self.clip_eps, ratio < 1 / (1 + self.clip_eps)
