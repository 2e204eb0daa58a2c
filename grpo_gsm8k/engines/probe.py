"""Proof that a hand-over took effect: what the sampler draws, the learner scores, and they must agree."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_gsm8k.datatypes import Completion, Learner, Prompt, Sampler, SamplingParams, TokenRow
from grpo_gsm8k.errors import EngineError
from grpo_gsm8k.trainer.batch import make_batch

PARAMS = SamplingParams(n=1, max_new_tokens=16, temperature=1.0)
"""Few tokens, many prompts: a stale prefix cache shows in the first token, a stale head in every one."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Mean |logp difference| that another kernel may make. Engines are far below it (1e-7 in float32 on a CPU); weights
that differ by less than it makes visible pass, so it catches a sync that failed, not one last bit."""


def sampled_row(prompt: Prompt, completion: Completion, advantage: float = 0.0) -> TokenRow:
    """A completion as a row to train on or to score: the sampled ids, with what they were sampled with."""
    zeros = (0,) * len(prompt.token_ids)
    return TokenRow(
        token_ids=prompt.token_ids + completion.token_ids,
        mask=zeros + (1,) * len(completion.token_ids),
        logprobs=zeros + completion.logprobs,
        advantage=advantage,
    )


def probe(
    sampler: Sampler, learner: Learner, prompts: Sequence[Prompt], pad_id: int, version: int, tolerance: float
) -> dict[str, float]:
    """Draw a few tokens and score them.

    Args:
        tolerance: largest mean |logp difference|.

    Returns:
        `sync/probe_logp_abs_mean` and `sync/probe_logp_abs_max`.

    Raises:
        EngineError: the sampler does not hold the learner's weights.
    """
    drawn = sampler.sample(prompts, PARAMS)
    rows = [sampled_row(prompt, group[0]) for prompt, group in zip(prompts, drawn, strict=True)]
    batch = make_batch(rows, pad_id)
    delta = ((learner.logprobs(batch) - batch.old_logprobs) * batch.mask).abs()
    mean, largest = float(delta.sum() / batch.mask.sum()), float(delta.max())
    if not mean <= tolerance:
        raise EngineError(
            f"version {version} was handed over, but the sampler does not sample from it: its log-probabilities are "
            f"{mean:.3g} away from the trainer's on average (allowed: {tolerance:g}); stopped before training on "
            "stale weights, the checkpoints are good"
        )
    return {"sync/probe_logp_abs_mean": mean, "sync/probe_logp_abs_max": largest}
