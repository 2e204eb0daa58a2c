"""The data types that stages pass on, and the protocols of sampler, evaluator and learner.

    Example → Prompt(token_ids) → Completion(token_ids, logprobs, finish_reason, policy_version) → Trajectory
            → Grade → Rollout(trajectory, grade, advantage) → Datum

The types are frozen dataclasses without tensors, so every module can import them cheaply. A learner makes its own
tensors from a `Datum`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from grpo_gsm8k.evals.accuracy import Evaluation
    from grpo_gsm8k.trainer.losses import Objective

FinishReason = Literal["stop", "length", "turns"]
Message = tuple[str, str]  # (role, content)


@dataclass(frozen=True)
class Rendered:
    """A prompt as `prep-eval` stored it.

    Attributes:
        text: for people and other tools; nothing tokenises it again.
        token_ids: the sampler's input.
        made_with: prompt style, tags and tokenizer, see `Renderer.made_with`.
    """

    text: str
    token_ids: tuple[int, ...]
    made_with: Mapping[str, str | None]


@dataclass(frozen=True)
class Source:
    """Where an example comes from: file, 1-based line, and the rendered prompt if the row has one."""

    path: str
    line: int | None
    rendered: Rendered | None = None


@dataclass(frozen=True)
class Example:
    """A row of a task's data.

    Attributes:
        id: stable across runs and machines, unique within a dataset.
        messages: the question as text, or a conversation, before the task adds its instructions.
        answer: as the task defines it: a number as text, an expression in LaTeX, a list of words, None.
        meta: the other columns of the row.
        source: where it was read from; ignored by comparisons.
    """

    id: str
    messages: tuple[Message, ...] | str
    answer: Any = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: Source | None = field(default=None, compare=False, repr=False)

    @property
    def text(self) -> str:
        """The question or conversation as one text."""
        return self.messages if isinstance(self.messages, str) else "\n\n".join(text for _, text in self.messages)


@dataclass(frozen=True)
class Grade:
    """The verdict on one trajectory: made once, when the rollout is collected, and read everywhere else.

    Attributes:
        reward: the number that training maximises.
        components: the named parts that add up to `reward`; each is logged.
        correct: whether the answer is right; None if the task has no right answers. Then the mean reward picks the best
            checkpoint.
        format_ok: whether the response has the requested form; None if the task requests none.
        answer: the answer that the response commits to, as text; None if there is none.
        details: further columns of an evaluation's rows, such as the verdict by another rule.
    """

    reward: float
    components: Mapping[str, float] = field(default_factory=dict)
    correct: bool | None = None
    format_ok: bool | None = None
    answer: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """An example rendered for one model. The model reads these ids; nothing tokenises the text again.

    Attributes:
        opened: text at the end of the prompt that belongs to the response: the tag of a thought that the prompt opens.
    """

    example: Example
    token_ids: tuple[int, ...]
    opened: str = ""


@dataclass(frozen=True)
class Request:
    """Asks a sampler for completions of `token_ids`, one per seed."""

    token_ids: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Datum:
    """One row to train on: ids, mask and whatever else is known per token, unshifted.

    Attributes:
        token_ids: prompt and response.
        mask: 1 on the tokens whose prediction is trained (the response), 0 elsewhere. Same length.
        logprobs: old log-probability of each trained token, 0 elsewhere; or empty. The sampler's, unless a frozen pass
            has replaced them.
        advantages: of each token, 0 where the mask is 0; or empty.
        ref_logprobs: of the reference model, for the KL term; or empty.
        weights: the loss of an update is the sum of weight x per-token loss. `trainer.data.weighted` sets them over the
            whole pass, so that any split gives the same gradient. Empty: 1 for each trained token.
    """

    token_ids: tuple[int, ...]
    mask: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()
    ref_logprobs: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class WeightsRef:
    """Names weights that a learner publishes and a sampler loads; loading them twice does nothing.

    Attributes:
        version: optimizer steps that made them.
        sha256: `trainer.policy.weights_sha256` of the tensors; "" where they never leave this process or GPU. Of
            weights at a training service that does not tell it, the hash of their name there.
        where: a safetensors file, names as the learner's model has them, tied weights once; or how a training service
            calls them; None without either.
    """

    version: int
    sha256: str = ""
    where: Path | str | None = None

    def same_as(self, other: WeightsRef | None) -> bool:
        """Whether both name the same weights, wherever they are stored."""
        return other is not None and (self.version, self.sha256) == (other.version, other.sha256)


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. A `Request` says how many completions, and with which seeds.

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
    """One sampled completion.

    Attributes:
        token_ids: the sampled ids, the end-of-turn id included when it was sampled.
        logprobs: log-probability of each sampled id under softmax(logits / temperature), before any
            top-p truncation; under temperature 1 when sampling is greedy. Same length as `token_ids`.
        text: the decoded ids without special tokens. For grading and for people, never for training.
        finish_reason: "stop" if the model ended (end-of-turn id or stop string), "length" if it was cut.
        policy_version: version of the weights that sampled it.
        seed: of this sample, derived from (run seed, step, prompt, sample).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    policy_version: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Trajectory:
    """All turns of the model on one prompt: the ids that follow the prompt.

    Attributes:
        token_ids: of the model's turns, with the environment's answers between them.
        mask: 1 on sampled tokens, 0 on the environment's. Same length.
        logprobs: as in `Completion`; 0 where the mask is.
        finish_reason: of the last turn; "turns" if the model ran out of turns.
        policy_version: the oldest version of weights among its turns.
        seed: of the first turn.
        text: of all turns, including the environment's, without special tokens.
        turns: number of turns that the model took.
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
        """The trajectory of a single turn."""
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
    """A trajectory and its verdict; `advantage` is set by the algorithm.

    Attributes:
        weight: of its group, which multiplies the advantages; not 1 where prompts are not drawn alike (`curriculum`).
    """

    trajectory: Trajectory
    grade: Grade
    advantage: float = 0.0
    weight: float = 1.0


class Sampler(Protocol):
    """Generates completions, with its own copy of the weights; `busy_s` are its seconds of work so far."""

    @property
    def busy_s(self) -> float: ...

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        """Return one completion per seed for each request, in order."""
        ...

    def load(self, ref: WeightsRef, tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]] | None = None) -> None:
        """Load weights; later completions carry `ref.version`. Does nothing if the sampler already holds them.

        Args:
            tensors: yields the weights if `ref.where` names no file.
        """
        ...


class Evaluator(Protocol):
    """Evaluates during training. Only `drain` waits for another process."""

    def submit(self, step: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Evaluate the weights of `step`."""
        ...

    def results(self) -> list[tuple[int, Evaluation]]:
        """The evaluations that have finished since the last call, with their steps."""
        ...

    def settle(self, step: int) -> None:
        """Forget this step: its result has been logged."""
        ...

    def drain(self) -> list[tuple[int, Evaluation]]:
        """Wait for all submitted evaluations and return the rest."""
        ...

    def metrics(self) -> dict[str, float]:
        """How far the evaluator lags behind."""
        ...

    def close(self) -> None: ...


class Learner(Protocol):
    """Trains the policy. `forward_backward` takes the data of one update and may split it."""

    def forward_backward(self, data: Sequence[Datum], objective: Objective) -> dict[str, float]: ...

    def step(self, lr: float) -> dict[str, float]: ...

    def logprobs(self, data: Sequence[Datum], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """Log-probabilities of each row's tokens from a frozen pass: one per id, 0 where the mask is 0."""
        ...

    def reference_logprobs(self, data: Sequence[Datum], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """The same under the reference model: the one that the run started from, also after a resume."""
        ...

    def publish(self, version: int) -> WeightsRef:
        """Name the current weights."""
        ...

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def forget(self, folder: Path) -> None:
        """A checkpoint's folder is about to be deleted: let go of what it stands for elsewhere."""
        ...
