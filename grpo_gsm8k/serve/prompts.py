"""What is read off a prompt: log-probabilities of its tokens, of the likeliest and of named ones, and draws beside it.

All of it is of the model's distribution at temperature 1, at every position behind the first; only the draws follow the
job's temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from grpo_gsm8k.datatypes import SamplingParams
from grpo_gsm8k.engines.hf import draw
from grpo_gsm8k.repro import derive_seed
from grpo_gsm8k.serve.decoders import up
from grpo_gsm8k.serve.jobs import Chosen, SampleJob, Table
from grpo_gsm8k.serve.learn import logits_of

LOGITS_AT_ONCE = 1 << 24


class Reading:
    """What a job asks of its prompt; None where it does not ask."""

    def __init__(self, job: SampleJob) -> None:
        self.job = job
        self.logprobs: tuple[float | None, ...] | None = None
        self.topk: tuple[Chosen, ...] | None = None
        self.targets: Table | None = None
        self.alternatives: tuple[Table, Table] | None = None
        self.wanted = bool(
            job.prompt_logprobs or job.topk_prompt_logprobs or job.prompt_targets or job.prompt_alternatives
        )

    def read(self, model: Any, hidden: torch.Tensor, vocabulary: int, align: int) -> None:
        """Read it off the prompt's last hidden states `(N, H)`, so many positions at once that logits fit.

        Args:
            align: rows of the head's product come in multiples of it, see `decoders.RowDecoder`.
        """
        job, length = self.job, len(self.job.token_ids) - 1
        skipped = length - min(job.prompt_logprobs_last_n or length, length)
        logp, top = list[float](), list[Chosen]()
        named, drawn = _Named(job.prompt_targets), _Drawn(job, length)
        every = bool(job.prompt_targets or job.prompt_alternatives)
        ids = torch.tensor(job.token_ids[1:], device=hidden.device)
        for part in _parts(0 if every else skipped, length, max(LOGITS_AT_ONCE // vocabulary // align, 1) * align):
            rows = hidden[:-1][part]
            filled = torch.nn.functional.pad(rows, (0, 0, 0, up(len(rows), align) - len(rows)))
            logits = logits_of(model, filled)[: len(rows)]
            spread = logits.log_softmax(-1)
            logp += spread.gather(-1, ids[part].unsqueeze(-1)).squeeze(-1).tolist()
            if job.topk_prompt_logprobs:
                top += likeliest(spread, job.topk_prompt_logprobs)
            named.take(spread, part)
            drawn.take(logits, spread, part)
        if job.prompt_logprobs:
            self.logprobs = (*[None] * (1 + skipped), *logp[-(length - skipped) or len(logp) :])
        if job.topk_prompt_logprobs:
            self.topk = (*[()] * (1 + skipped), *top[-(length - skipped) or len(top) :])
        self.targets, self.alternatives = named.table(), drawn.tables()


class _Named:
    """Log-probabilities of the ids that a table names; 0 for -1."""

    def __init__(self, asked: Table | None) -> None:
        self.asked = asked
        self.found = [0.0] * (len(asked.values) if asked else 0)
        self.places: dict[int, list[int]] = {}
        for place, row in enumerate(asked.rows() if asked else ()):
            if asked and asked.values[place] >= 0:
                self.places.setdefault(row, []).append(place)

    def take(self, spread: torch.Tensor, part: slice) -> None:
        """The rows of these positions."""
        if not self.asked:
            return
        for row in range(part.start, part.stop):
            for place in self.places.get(row, ()):
                self.found[place] = float(spread[row - part.start, int(self.asked.values[place])])

    def table(self) -> Table | None:
        """In the layout in which they were asked for."""
        asked = self.asked
        return Table(asked.shape, tuple(self.found), asked.crow, asked.col) if asked else None


class _Drawn:
    """Draws from the distribution at each position, `prompt_alternatives` each."""

    def __init__(self, job: SampleJob, length: int) -> None:
        self.k, self.shape = job.prompt_alternatives, (length, job.prompt_alternatives)
        self.params = SamplingParams(1, job.temperature)
        generator = torch.Generator().manual_seed(derive_seed(job.seed or 0, "alternatives"))
        self.uniforms = torch.rand(self.shape, generator=generator, dtype=torch.float64)
        self.tokens, self.logprobs = list[list[int]](), list[list[float]]()

    def take(self, logits: torch.Tensor, spread: torch.Tensor, part: slice) -> None:
        """The rows of these positions."""
        if not self.k:
            return
        columns = [draw(logits, self.uniforms[part, k], self.params)[0] for k in range(self.k)]
        chosen = torch.stack(columns, 1)
        self.tokens += chosen.tolist()
        self.logprobs += spread.gather(-1, chosen).tolist()

    def tables(self) -> tuple[Table, Table] | None:
        """Ids and log-probabilities."""
        if not self.k:
            return None
        flat: Callable[[list[list[Any]]], tuple[Any, ...]] = lambda rows: tuple(x for row in rows for x in row)  # noqa: E731
        return Table(self.shape, flat(self.tokens)), Table(self.shape, flat(self.logprobs))


def likeliest(spread: torch.Tensor, k: int) -> list[Chosen]:
    """The k likeliest of each row and their log-probabilities, equal ones by id."""
    values, ids = spread.sort(dim=-1, descending=True, stable=True)
    rows = zip(values[:, :k].tolist(), ids[:, :k].tolist(), strict=True)
    return [tuple(zip(i, v, strict=True)) for v, i in rows]


def _parts(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))
