"""The service's sampler without the service: `--engine grpo_gsm8k.serve.local:RowSampler`.

What the embedded sampler says of a completion can differ in its last bits with what is sampled beside it; a service
samples for many, and gives each row the bits that it has alone (`sampling.py`). A local run with this engine draws and
records exactly what a run at a service does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from grpo_gsm8k.config import EngineConfig
from grpo_gsm8k.datatypes import Completion, Request, SamplingParams
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.serve.decoders import MOST_DRAWN
from grpo_gsm8k.serve.jobs import SampleJob
from grpo_gsm8k.serve.sampling import Sampler
from grpo_gsm8k.tasks.render import Renderer


class RowSampler(HFSampler):
    """Implements `datatypes.Sampler`; each completion is to the bit what it would be alone."""

    def __init__(self, model: Any, renderer: Renderer, cfg: EngineConfig) -> None:
        """`model` is copied. Where its rows cannot be decoded so, each request is decoded by itself."""
        super().__init__(model, renderer, cfg.sample_rows, static=False)
        vocabulary = int(self.model.get_input_embeddings().weight.shape[0])
        known = {"renderer": renderer, "stop_ids": self.stop_ids, "context": self.context, "vocabulary": vocabulary}
        self.rowwise = Sampler(SimpleNamespace(model=self.model, **known))

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        """A completion for each seed of each request."""
        began = time.monotonic()
        jobs = [self._job(request.token_ids, seed, params) for request in requests for seed in request.seeds]
        most = min(self.rows, MOST_DRAWN) if self.rowwise.rowwise else 1
        drawn = [
            done
            for start in range(0, len(jobs), most)
            for done in self.rowwise.decode(self.model, jobs[start : start + most])
        ]
        self.busy_s += time.monotonic() - began
        results = iter(zip(jobs, drawn, strict=True))
        return [[self._made(*next(results)) for _ in request.seeds] for request in requests]

    def _job(self, token_ids: tuple[int, ...], seed: int, params: SamplingParams) -> SampleJob:
        return SampleJob(
            token_ids,
            max_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            seed=seed,
            stop_ids=tuple(sorted(self.stop_ids)),
            stop_strings=params.stop or None,
        )

    def _made(self, job: SampleJob, result: Any) -> Completion:
        (drawn,) = result.sequences
        text, seed = self.renderer.decode(drawn.token_ids), job.seed or 0
        return Completion(drawn.token_ids, drawn.logprobs, text, drawn.stop_reason, self.version, seed)
