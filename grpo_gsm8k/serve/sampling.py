"""Samples for many clients at once, each as if it were alone.

Requests with the same weights and temperature are decoded side by side, whoever sent them. What a row draws and its
log-probabilities are the same bits in any company (`decoders.py`); `Sampler` proves it at the start for the model, and
later for each rank of adapters. Where it does not hold (a GPU, windows, states, experts, wide layers on several
threads), each request is decoded by itself, which costs speed and not bits.

A row draws from a stream of uniform numbers that its seed decides, by inversion: see `engines/hf.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from grpo_gsm8k.datatypes import SamplingParams
from grpo_gsm8k.engines.hf import draw
from grpo_gsm8k.repro import derive_seed
from grpo_gsm8k.serve.decoders import (
    ATTENTION,
    EXCHANGEABLE,
    FEWEST_ROWS,
    LEAST_ROWS,
    PlainDecoder,
    RowDecoder,
    sums_alike,
    up,
)
from grpo_gsm8k.serve.jobs import Chosen, SampledSequence, SampleJob, SampleResult
from grpo_gsm8k.serve.prompts import Reading, likeliest

PROOF = (tuple(range(1, 8)), tuple(range(9, 2, -1)), tuple(3 + 5 * i % 11 for i in range(29)), (4,), (2, 9))


@dataclass
class _Row:
    """One sample in the making."""

    job: int
    uniforms: torch.Tensor
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[Chosen] = field(default_factory=list)
    stopped: bool = False


class Decoding:
    """Jobs that are decoded side by side; `advance` a token at a time, so that others get their turn."""

    def __init__(self, sampler: Sampler, model: Any, jobs: Sequence[SampleJob]) -> None:
        """Read the prompts. Jobs of one temperature, top_k and top_p; several only where rows are independent."""
        self.sampler, self.model = sampler, model
        self.jobs = list(jobs)
        order = sorted(range(len(jobs)), key=lambda i: len(jobs[i].token_ids))  # rows of one length stand together
        self.rows = [[self._row(i, n) for n in range(jobs[i].num_samples)] for i in range(len(jobs))]
        self.alive = [row for i in order for row in self.rows[i] if len(row.uniforms)]
        counts = [sum(len(row.uniforms) > 0 for row in self.rows[i]) for i in order]
        prompts = [jobs[i].token_ids for i in order]
        self.decoder: Any = (
            RowDecoder(model, prompts, counts, sampler.align)
            if sampler.rowwise
            else PlainDecoder(model, prompts[0], counts[0])
        )
        self.prompts = {i: self._read_prompt(jobs[i], number) for number, i in enumerate(order)}
        if not self.alive:
            self.decoder = None

    def advance(self) -> bool:
        """Draw a token for each row that has not ended; whether all have."""
        if not self.alive:
            return True
        first = self.jobs[self.alive[0].job]
        params = SamplingParams(1, first.temperature, first.top_p, top_k=max(first.top_k, 0))
        logits = self.decoder.logits()
        uniforms = torch.stack([row.uniforms[len(row.token_ids)] for row in self.alive])
        chosen, logp = draw(logits, uniforms, params)
        likeliest = self._likeliest(logits, first.temperature)
        for row, token, value, top in zip(self.alive, chosen.tolist(), logp.tolist(), likeliest, strict=True):
            row.token_ids.append(token)
            row.logprobs.append(value)
            row.topk.append(top)
            row.stopped = self.sampler.ends(row.token_ids, self.jobs[row.job])
        keep = [k for k, row in enumerate(self.alive) if not row.stopped and len(row.token_ids) < len(row.uniforms)]
        if len(keep) < len(self.alive):
            self.alive = [self.alive[k] for k in keep]
            if not keep:
                self.decoder = None
                return True
            self.decoder.select(keep)
            chosen = chosen[torch.tensor(keep, device=chosen.device)]
        self.decoder.step(chosen)
        return False

    def so_far(self, number: int) -> tuple[SampledSequence, ...]:
        """The samples of a job as they are now; called from another thread, between two tokens or within one."""
        found = []
        for row in self.rows[number]:
            n = len(row.topk)  # which gets its entry last
            topk = tuple(row.topk[:n]) if self.jobs[number].topk_sample_logprobs else ()
            found.append(SampledSequence(tuple(row.token_ids[:n]), tuple(row.logprobs[:n]), "length", topk))
        return tuple(found)

    def results(self) -> list[SampleResult]:
        """What was drawn, job by job."""
        found = []
        for number, job in enumerate(self.jobs):
            read = self.prompts[number]
            sequences = tuple(
                SampledSequence(
                    tuple(row.token_ids),
                    tuple(row.logprobs),
                    "stop" if row.stopped else "length",
                    tuple(row.topk) if job.topk_sample_logprobs else (),
                )
                for row in self.rows[number]
            )
            found.append(SampleResult(sequences, read.logprobs, read.topk, read.targets, read.alternatives))
        return found

    def _row(self, job: int, number: int) -> _Row:
        asked = self.jobs[job]
        assert asked.seed is not None, "a job that is accepted has a seed"
        room = self.sampler.context - len(asked.token_ids)
        room = max(room if asked.max_tokens is None else min(room, asked.max_tokens), 0)
        seed = asked.seed if number == 0 else derive_seed(asked.seed, "sample", number)
        generator = torch.Generator().manual_seed(seed)
        return _Row(job, torch.rand(room, generator=generator, dtype=torch.float64))

    def _likeliest(self, logits: torch.Tensor, temperature: float) -> list[Chosen]:
        most = max(self.jobs[row.job].topk_sample_logprobs for row in self.alive)
        if not most:
            return [()] * len(self.alive)
        spread = (logits / temperature if temperature else logits).log_softmax(-1)
        rows = likeliest(spread, most)
        return [tuple(row[: self.jobs[a.job].topk_sample_logprobs]) for row, a in zip(rows, self.alive, strict=True)]

    def _read_prompt(self, job: SampleJob, number: int) -> Reading:
        reading = Reading(job)
        if reading.wanted:
            hidden = self.decoder.prompt_hidden(number)
            reading.read(self.model, hidden, self.sampler.vocabulary, self.sampler.align)
        return reading


class Sampler:
    """How this base is sampled from: whether rows are independent to the bit, and what ends a sample."""

    def __init__(self, base: Any) -> None:
        """Prove whether rows are independent; `base` is an `adapters.BaseModel`."""
        self.renderer, self.stop_ids = base.renderer, base.stop_ids
        self.context, self.vocabulary = base.context, base.vocabulary
        self.align = up(LEAST_ROWS * torch.get_num_threads(), FEWEST_ROWS)
        self.rowwise = self._proven(base.model)

    def adapted(self, model: Any, layers: Sequence[str], rank: int) -> bool:
        """Whether rows are independent under adapters of this rank on these layers, too."""
        if not self.rowwise:
            return False
        wide = {(model.get_submodule(name).in_features, model.get_submodule(name).out_features) for name in layers}
        products = {(terms, rank) for terms, _ in wide} | {(rank, columns) for _, columns in wide}
        return self._alike(products, model.dtype)

    def _alike(self, products: Iterable[tuple[int, int]], dtype: torch.dtype) -> bool:
        threads = torch.get_num_threads()
        return all(sums_alike(*sizes, dtype, self.align, threads) for sizes in sorted(products))

    @torch.inference_mode()
    def decode(self, model: Any, jobs: Sequence[SampleJob]) -> list[SampleResult]:
        """All samples of these jobs at once."""
        decoding = Decoding(self, model, jobs)
        while not decoding.advance():
            pass
        return decoding.results()

    def ends(self, token_ids: Sequence[int], job: SampleJob) -> bool:
        """Whether a sample ends with its last token."""
        if job.stop_ids is None and job.stop_strings is None:
            return token_ids[-1] in self.stop_ids
        if token_ids[-1] in (job.stop_ids or ()):
            return True
        if not job.stop_strings:
            return False
        window = max(len(s.encode()) for s in job.stop_strings) + 4  # a token is at least a byte
        tail = self.renderer.spell(token_ids[-window:])
        return any(s in tail for s in job.stop_strings)

    def prepare(self, model: Any) -> None:
        """Give another copy of the base the attention that its rows need."""
        if self.rowwise:
            model.set_attn_implementation(ATTENTION)

    @torch.inference_mode()
    def _proven(self, model: Any) -> bool:
        """Whether rows get the bits together that they get alone; then the model's attention is exchanged."""
        config = model.config.get_text_config()
        before = config._attn_implementation
        experts = any("expert" in name for name, _ in model.named_modules())
        whole = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
        if model.device.type != "cpu" or experts or not whole or before not in EXCHANGEABLE:
            return False
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        if not self._alike({(layer.in_features, layer.out_features) for layer in linear}, model.dtype):
            return False
        model.set_attn_implementation(ATTENTION)
        self.rowwise = True
        top = self.vocabulary - 1
        jobs = [
            SampleJob(tuple(min(i, top) for i in ids), 1 + k % 3, 5, seed=k, stop_ids=(), prompt_logprobs=True)
            for k, ids in enumerate(PROOF)
            if len(ids) < self.context - 5
        ]
        alone = [self.decode(model, [job])[0] for job in jobs]
        if self.decode(model, jobs) == alone:
            return True
        model.set_attn_implementation(before)
        return False
