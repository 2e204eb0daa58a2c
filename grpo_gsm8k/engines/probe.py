"""Checks that a hand-over of weights took effect: the sampler draws, the learner scores, and both must agree."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from grpo_gsm8k.datatypes import Completion, Datum, Learner, Prompt, Request, Sampler, SamplingParams, Trajectory
from grpo_gsm8k.errors import EngineError
from grpo_gsm8k.repro import requests

PARAMS = SamplingParams(max_new_tokens=16, temperature=1.0)
"""Few tokens of many prompts: a stale prefix cache shows in the first token, a stale head in every one."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Mean |logp difference| to allow for other kernels. Engines stay far below it (1e-7 in float32 on a CPU). It catches a
sync that failed, not a single wrong bit."""


def sampled_datum(trajectory: Trajectory, advantage: float = 0.0) -> Datum:
    """A trajectory as a row to train on or to score: the sampled ids with their log-probabilities."""
    prompt, zeros = trajectory.prompt.token_ids, (0,) * len(trajectory.prompt.token_ids)
    return Datum(
        token_ids=prompt + trajectory.token_ids,
        mask=zeros + trajectory.mask,
        logprobs=zeros + trajectory.logprobs,
        advantages=zeros + tuple(advantage * m for m in trajectory.mask),
    )


def completed(request: Request, completion: Completion) -> Datum:
    """A request and a completion of it as a row to score."""
    zeros = (0,) * len(request.token_ids)
    mask = zeros + (1,) * len(completion.token_ids)
    return Datum(request.token_ids + completion.token_ids, mask, zeros + completion.logprobs)


def logprob_differences(data: Sequence[Datum], logprobs: Sequence[Sequence[float]]) -> list[float]:
    """|difference| between these log-probabilities and those that the rows hold, for each trained token."""
    rows = [zip(row.mask, row.logprobs, other, strict=True) for row, other in zip(data, logprobs, strict=True)]
    return [abs(mine - other) for row in rows for masked, mine, other in row if masked]


def probe(
    sampler: Sampler, learner: Learner, prompts: Sequence[Prompt], version: int, tolerance: float
) -> dict[str, float]:
    """Sample a few tokens and score them with the learner.

    Args:
        tolerance: largest mean |logp difference|.

    Returns:
        `sync/probe_logp_abs_mean` and `sync/probe_logp_abs_max`.

    Raises:
        EngineError: the sampler does not hold the learner's weights.
    """
    asked = requests(prompts, 1, 0)
    rows = [completed(one, drawn) for one, (drawn,) in zip(asked, sampler.sample(asked, PARAMS), strict=True)]
    delta = logprob_differences(rows, learner.logprobs(rows))
    mean, largest = statistics.fmean(delta), max(delta)
    if not mean <= tolerance:
        raise EngineError(
            f"version {version} was handed over, but the sampler does not sample from it: its log-probabilities are "
            f"{mean:.3g} away from the trainer's on average (allowed: {tolerance:g}); stopped before training on "
            "stale weights, the checkpoints are good"
        )
    return {"sync/probe_logp_abs_mean": mean, "sync/probe_logp_abs_max": largest}
