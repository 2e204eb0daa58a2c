"""Rollouts from the core: completions as text for the client, as ids and log-probabilities for the update."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

from grpo_gsm8k.serve.core import Service
from grpo_gsm8k.serve.jobs import SampleJob, SampleResult
from grpo_gsm8k.serve.rollouts.run import Sample
from grpo_gsm8k.serve.text import pieces, stop_at

Logprobs = Sequence[float]


async def draw(service: Service, weights: str, jobs: Sequence[SampleJob], stop: Sequence[str]) -> list[list[Sample]]:
    """The samples of each job, their texts without what follows a stop string. Raises `Refusal`."""
    results = await _sampled(service, weights, jobs)
    logprobs = await _at_temperature_1(service, weights, jobs, results)

    def made() -> list[list[Sample]]:
        return [
            [
                Sample(list(s.token_ids), list(values), _text(service, job.token_ids, s.token_ids, stop), s.stop_reason)
                for s, values in zip(result.sequences, known, strict=True)
            ]
            for job, result, known in zip(jobs, results, logprobs, strict=True)
        ]

    return await asyncio.to_thread(made)  # the texts of many tokens take a while, and others are waiting


async def _sampled(service: Service, weights: str, jobs: Sequence[SampleJob]) -> list[SampleResult]:
    requests = await asyncio.gather(*(service.sample(weights, job) for job in jobs))
    return list(await asyncio.gather(*(service.wait(request) for request in requests)))


async def _at_temperature_1(
    service: Service, weights: str, jobs: Sequence[SampleJob], results: Sequence[SampleResult]
) -> list[list[Logprobs]]:
    """Log-probabilities of each completion's tokens, as the losses compare them: sampled so, or read again."""
    if all(job.temperature == 1 for job in jobs):
        return [[sequence.logprobs for sequence in result.sequences] for result in results]
    rows = [
        SampleJob((*job.token_ids, *sequence.token_ids), max_tokens=0, prompt_logprobs=True)
        for job, result in zip(jobs, results, strict=True)
        for sequence in result.sequences
    ]
    reads, found = iter(await _sampled(service, weights, rows)), list[list[Logprobs]]()
    for job, result in zip(jobs, results, strict=True):
        known = [cast(Logprobs, next(reads).prompt_logprobs) for _ in result.sequences]
        found.append([values[len(job.token_ids) :] for values in known])
    return found


def _text(service: Service, prompt: Sequence[int], token_ids: Sequence[int], stop: Sequence[str]) -> str:
    whole = "".join(pieces(service.base.renderer.decode, token_ids, prompt))
    return whole[:end] if (end := stop_at(whole, stop)) >= 0 else whole
