"""What travels between the wires and the core: requests for samples, their results, and refusals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_gsm8k.errors import UserError

Category = Literal["user", "server"]
Chosen = tuple[tuple[int, float], ...]
"""The likeliest tokens at one position and their log-probabilities, sorted; empty where none are known."""


class Refusal(UserError):
    """A request that cannot be served; the client is told why, at once.

    Attributes:
        status: of the HTTP answer, where it is refused there: 400, 401, 403, 404, 410, 413 or 422.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Table:
    """A matrix of ids or log-probabilities: dense, row by row, or what its CSR indices list of it."""

    shape: tuple[int, int]
    values: tuple[Any, ...]
    crow: tuple[int, ...] | None = None
    col: tuple[int, ...] | None = None

    def rows(self) -> list[int]:
        """The row of each value."""
        if self.crow is None:
            return [row for row in range(self.shape[0]) for _ in range(self.shape[1])]
        counts = (after - before for before, after in itertools.pairwise(self.crow))
        return [row for row, count in enumerate(counts) for _ in range(count)]


@dataclass(frozen=True)
class SampleJob:
    """Samples of one prompt.

    Attributes:
        max_tokens: at most so many each; None for what is left of the context. 0 only reads the prompt.
        top_k: 0 or -1 is off.
        seed: sample i is drawn from a stream that (seed, i) decides, whatever is sampled beside it; None for a random
            one, which is recorded with the request.
        stop_ids, stop_strings: what ends a sample; both None for the model's own ends of turn. The token that ends it
            is kept. An empty tuple stops nowhere.
        prompt_logprobs: also the log-probability of each prompt token (the first has none), at temperature 1.
        topk_prompt_logprobs, topk_sample_logprobs: of the likeliest so many tokens at each position.
        prompt_logprobs_last_n: only the last so many prompt tokens are scored; None for all.
        prompt_targets: ids to score at the prompt's positions behind the first, a row each; -1 is none.
        prompt_alternatives: so many tokens are drawn at each of these positions.
    """

    token_ids: tuple[int, ...]
    num_samples: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] | None = None
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    prompt_targets: Table | None = None
    prompt_alternatives: int = 0


@dataclass(frozen=True)
class SampledSequence:
    """One sample.

    Attributes:
        logprobs: of each token, under the distribution that it was drawn from before any truncation.
        topk: one row a token, where the job asked for them.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: Literal["stop", "length"]
    topk: tuple[Chosen, ...] = ()


@dataclass(frozen=True)
class SampleResult:
    """The samples of a job, and what it asked for of its prompt; `prompt_logprobs` are None at position 0.

    Attributes:
        targets: log-probabilities in the layout of `prompt_targets`.
        alternatives: ids and log-probabilities of the `prompt_alternatives`.
    """

    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: tuple[float | None, ...] | None = None
    topk_prompt: tuple[Chosen, ...] | None = None
    targets: Table | None = None
    alternatives: tuple[Table, Table] | None = None


@dataclass(frozen=True)
class Result:
    """How a request ended: with a value, or with an error of one line and its category.

    Attributes:
        value: a `SampleResult` of "sample", a `TrainingResult` of "forward_backward", of all others what the Tinker
            wire answers, as a mapping.
        encoded: the value as the journal has it, see `codec.encode`.
    """

    kind: str
    value: Any = None
    error: str = ""
    category: Category = "user"
    encoded: bytes = b""


@dataclass(frozen=True)
class TrainingResult:
    """What forward_backward found: a float32 array of log-probabilities for each datum, in its targets' shape."""

    logprobs: tuple[Any, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """The base model, as the wires name it.

    Attributes:
        name: under which it is served.
        folder: where it was loaded from: a folder, or a name on the hub.
        renderer: tokenizer and chat template.
        context: the longest row, prompt and completion together.
        vocabulary: ids 0 … vocabulary - 1 have an embedding.
    """

    name: str
    folder: str
    renderer: Any
    context: int
    vocabulary: int

    @property
    def tokenizer_id(self) -> str:
        """What a client on this machine loads the tokenizer from."""
        return self.folder
