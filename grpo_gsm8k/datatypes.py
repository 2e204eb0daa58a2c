"""The nouns that travel through the house, and the protocols at its seams.

    Example → Prompt(token_ids) → Completion(token_ids, logprobs, finish_reason, policy_version) → Trajectory
            → Grade → Rollout(trajectory, grade, advantage) → Datum → Batch (in trainer/batch.py: tensors)

Everything here is a frozen dataclass without tensors, so that any room may import it at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from grpo_gsm8k.evals.accuracy import Evaluation
    from grpo_gsm8k.trainer.batch import Batch
    from grpo_gsm8k.trainer.losses import Objective

FinishReason = Literal["stop", "length", "turns"]
Message = tuple[str, str]  # (role, content)


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
    """The row that an example was read from: file, 1-based line, and the prompt if it holds a rendered one."""

    path: str
    line: int | None
    rendered: Rendered | None = None


@dataclass(frozen=True)
class Example:
    """A row of a task's data.

    Attributes:
        id: stable across runs and machines, unique within a dataset.
        messages: what is asked, before the task dresses it: a text (the question), or a conversation.
        answer: whatever the task says: a number as text, an expression in LaTeX, a list of words, nothing.
        meta: the other columns of the row.
        source: where it was read from; no part of what the example is.
    """

    id: str
    messages: tuple[Message, ...] | str
    answer: Any = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: Source | None = field(default=None, compare=False, repr=False)

    @property
    def text(self) -> str:
        """What is asked, as one text."""
        return self.messages if isinstance(self.messages, str) else "\n\n".join(text for _, text in self.messages)


@dataclass(frozen=True)
class Grade:
    """The verdict on one trajectory, made once, where it is collected; everything else reads it.

    Attributes:
        reward: what is maximised.
        components: the named parts that `reward` is the sum of; each is logged by itself.
        correct: whether the answer is right; None where a task knows no right answer. Then the mean reward picks the
            best checkpoint.
        format_ok: whether the response has the form that was asked for; None where none was.
        answer: the answer that the response commits to, as text; None if there is none.
        details: more for the rows of an evaluation, such as the verdict by another rule.
    """

    reward: float
    components: Mapping[str, float] = field(default_factory=dict)
    correct: bool | None = None
    format_ok: bool | None = None
    answer: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """An example rendered for one model: the ids are what the model sees, nothing re-tokenises them.

    Attributes:
        opened: text at the end of the prompt that belongs to the response: a thought that the prompt opens.
    """

    example: Example
    token_ids: tuple[int, ...]
    opened: str = ""


@dataclass(frozen=True)
class Request:
    """What a sampler is asked for: completions of `token_ids`, one for each seed."""

    token_ids: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Datum:
    """One row to train on, ids and mask born together, per token and still unshifted.

    Attributes:
        token_ids: prompt and response.
        mask: 1 on the tokens whose prediction is trained (the response), 0 elsewhere. Same length.
        logprobs: the log-probability each trained token was sampled with, 0 elsewhere; or empty.
        advantages: of each token, 0 where the mask is; or empty.
    """

    token_ids: tuple[int, ...]
    mask: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()


@dataclass(frozen=True)
class WeightsRef:
    """A set of weights that a learner publishes and a sampler loads; loading the one that it holds is free.

    Attributes:
        version: optimizer steps that made them.
        sha256: `trainer.policy.weights_sha256` of the tensors; "" where they never leave this process or GPU.
        where: a safetensors file, names as the learner's model has them, tied weights once; None without one.
    """

    version: int
    sha256: str = ""
    where: Path | None = None

    def same_as(self, other: WeightsRef | None) -> bool:
        """Whether both are the same weights, wherever they lie."""
        return other is not None and (self.version, self.sha256) == (other.version, other.sha256)


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. How many completions, and with which seeds, a `Request` says.

    Attributes:
        max_new_tokens: upper limit; a completion cut there has `finish_reason == "length"`.
        temperature: 0 is greedy.
        top_p: nucleus mass; 1 is off.
        stop: strings that end a completion (the text is kept up to and including the stop string's tokens).
        top_k: only the likeliest so many tokens are drawn, before top_p; 0 is off.
    """

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    top_k: int = 0


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
class Trajectory:
    """What a model said about a prompt, in one turn or several: the ids behind the prompt, of all turns.

    Attributes:
        token_ids: of the model's turns and, between them, of what the environment answered.
        mask: 1 on what the model sampled, 0 on what the environment added. Same length.
        logprobs: as in `Completion`; 0 where the mask is.
        finish_reason: of the last turn; "turns" if the model still had something to ask after its last one.
        policy_version: the oldest of the weights that drew it.
        seed: of the first turn.
        text: of all turns, the environment's included, without special tokens.
        turns: how many the model had.
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    mask: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int
    seed: int
    text: str
    turns: int = 1

    @staticmethod
    def of(prompt: Prompt, completion: Completion) -> Trajectory:
        """A completion is the case of one turn."""
        return Trajectory(
            prompt=prompt,
            token_ids=completion.token_ids,
            mask=(1,) * len(completion.token_ids),
            logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            policy_version=completion.policy_version,
            seed=completion.seed,
            text=completion.text,
        )


RewardFn = Callable[..., Any]
"""A user's reward: (completion, example) → a number, named components or a `Grade`; or, where its first parameter is
named `completions`, of the whole group → a list of these. May be async. A completion is a `Trajectory`."""


@dataclass(frozen=True)
class Rollout:
    """A trajectory and its verdict; `advantage` is set by the algorithm."""

    trajectory: Trajectory
    grade: Grade
    advantage: float = 0.0


class Sampler(Protocol):
    """Generates completions, with its own copy of the weights; `busy_s` are its seconds of work so far."""

    @property
    def busy_s(self) -> float: ...

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        """One completion for each seed of each request, in their order."""
        ...

    def load(self, ref: WeightsRef, tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]] | None = None) -> None:
        """Replace the weights; every completion drawn from now on carries `ref.version`. Free for those it holds.

        Args:
            tensors: where they come from when `ref.where` names no file.
        """
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

    def publish(self, version: int) -> WeightsRef:
        """Name the weights as they are now."""
        ...

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...
