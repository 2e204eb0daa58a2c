"""The nouns that travel through the house, and the protocols at its seams.

    Problem → Prompt(token_ids) → Completion(token_ids, logprobs, finish_reason, policy_version)
            → Rollout(completion, reward, advantage) → Batch (in trainer/batch.py: tensors)

Everything here is a frozen dataclass without tensors, so that any room may import it at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from grpo_gsm8k.evals.accuracy import Evaluation
    from grpo_gsm8k.trainer.batch import Batch
    from grpo_gsm8k.trainer.losses import Objective

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Rendered:
    """A prompt as `prep-eval` stored it.

    Attributes:
        text: for people and other tools; never tokenised again.
        token_ids: what is sampled from.
        made_with: prompt style, tags and tokenizer, see `Renderer.made_with`.
    """

    text: str
    token_ids: tuple[int, ...]
    made_with: Mapping[str, str | None]


@dataclass(frozen=True)
class Source:
    """The row that a problem was read from: file, 1-based line, and the prompt if it holds a rendered one."""

    path: str
    line: int | None
    rendered: Rendered | None = None


@dataclass(frozen=True)
class Problem:
    """One word problem.

    Attributes:
        id: stable across runs and machines, unique within a dataset.
        question: the text that is asked.
        answer: the reference solution in GSM8K form, its last line `#### <gold>`.
        gold: the final answer as text, a number that `grading.parse_number` accepts.
        source: where it was read from; no part of what the problem is.
    """

    id: str
    question: str
    answer: str
    gold: str
    source: Source | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Prompt:
    """A problem rendered for one model: the ids are what the model sees, nothing re-tokenises them.

    Attributes:
        first_sample: the index of its first sample: above 0 where the same problem is asked for again in one step, so
            that other completions are drawn.
    """

    problem: Problem
    token_ids: tuple[int, ...]
    first_sample: int = 0


@dataclass(frozen=True)
class TokenRow:
    """One sequence to train on, ids and mask born together and still unshifted.

    Attributes:
        token_ids: prompt and response.
        mask: 1 on the tokens whose prediction is trained (the response), 0 elsewhere. Same length.
        logprobs: the log-probability each response token was sampled with, 0 elsewhere; or empty.
        advantage: of the whole response.
    """

    token_ids: tuple[int, ...]
    mask: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    advantage: float = 0.0


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    Attributes:
        n: completions per prompt.
        max_new_tokens: upper limit; a completion cut there has `finish_reason == "length"`.
        temperature: 0 is greedy.
        top_p: nucleus mass; 1 is off.
        stop: strings that end a completion (the text is kept up to and including the stop string's tokens).
        seed: with a prompt's problem id and the sample's index, decides every random draw.
    """

    n: int = 1
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What a sampler drew for a prompt.

    Attributes:
        token_ids: the sampled ids, the end-of-turn id included when it was sampled.
        logprobs: log-probability of each sampled id under softmax(logits / temperature), before any
            top-p truncation; under temperature 1 when sampling is greedy. Same length as `token_ids`.
        text: the decoded ids without special tokens. For grading and for people, never for training.
        finish_reason: "stop" if the model ended (end-of-turn id or stop string), "length" if it was cut.
        policy_version: the version of the weights that drew it.
        seed: the sample's own seed, derived from (run seed, step, prompt, sample).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    policy_version: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Reward:
    """A scalar to maximise, and the weighted components that it is the sum of."""

    total: float
    components: Mapping[str, float] = field(default_factory=dict)


RewardFn = Callable[[Completion, Problem], "Reward | float | Mapping[str, float]"]


@dataclass(frozen=True)
class Rollout:
    """A graded completion. `group` numbers the prompts of one step; `advantage` is set by the algorithm."""

    prompt: Prompt
    completion: Completion
    reward: Reward
    group: int
    correct: bool
    format_ok: bool
    advantage: float = 0.0


class Drawer(Protocol):
    """Who draws completions."""

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        """`params.n` completions for each prompt, in the order of the prompts."""
        ...


class Sampler(Drawer, Protocol):
    """Who samples for a learner. Holds its own copy of the weights; `busy_s` are its seconds of work so far."""

    @property
    def busy_s(self) -> float: ...

    def load_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights; every completion drawn from now on carries `version`."""
        ...


class Evaluator(Protocol):
    """Who evaluates while training goes on. No call but `drain` waits for another process."""

    def submit(self, step: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Evaluate these weights, which are those of `step`."""
        ...

    def results(self) -> list[tuple[int, Evaluation]]:
        """Steps and their evaluations, of what has come back since the last call."""
        ...

    def settle(self, step: int) -> None:
        """The result of this step has been logged."""
        ...

    def drain(self) -> list[tuple[int, Evaluation]]:
        """Wait for everything that was submitted."""
        ...

    def metrics(self) -> dict[str, float]:
        """How far behind it is."""
        ...

    def close(self) -> None: ...


class Learner(Protocol):
    """Who learns. `forward_backward` takes a whole update and may split it as it likes."""

    def forward_backward(self, batch: Batch, objective: Objective) -> dict[str, float]: ...

    def step(self, lr: float) -> dict[str, float]: ...

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities of the targets without gradient, `(B, T)`, zero where the mask is zero."""
        ...

    def reference_logprobs(self, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """The same of the reference model: the one that the run began with, also after a resume."""
        ...

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...
