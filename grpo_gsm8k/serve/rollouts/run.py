"""A run that learns from rewards, as the journal holds it: settings, groups of rollouts, and what a batch trains."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from grpo_gsm8k.serve.jobs import Refusal

STD_EPS = 1e-6
State = Literal["running", "stopped"]


class Rejected(Refusal):
    """A request of this wire that is refused.

    Attributes:
        kind: unknown_rollout, duplicate_reward, stale_rollout, not_running, invalid_request or update_failed.
        rollout_ids: those that are the reason.
    """

    def __init__(self, status: int, kind: str, message: str, rollout_ids: Sequence[str] = ()) -> None:
        super().__init__(message, status)
        self.kind, self.rollout_ids = kind, list(rollout_ids)


@dataclass(frozen=True)
class Settings:
    """Of a run.

    Attributes:
        n: rollouts of a prompt, unless the request says otherwise.
        groups_per_batch: whole groups of one update.
        max_staleness: updates that may lie between a rollout and its reward.
        normalize: advantages are rewards minus their group's mean, or that over its standard deviation ("std").
        max_steps: the run stops after so many updates; 0 for never.
    """

    n: int = 8
    groups_per_batch: int = 4
    max_tokens: int = 128
    temperature: float = 1.0
    learning_rate: float = 1e-4
    max_staleness: int = 0
    loss_fn: str = "importance_sampling"
    normalize: Literal["mean", "std"] = "mean"
    lora_rank: int = 32
    seed: int = 0
    max_steps: int = 0


@dataclass
class Sample:
    """One completion of a group; `logprobs` are those of the trained distribution, at temperature 1."""

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str
    reward: float | None = None


@dataclass
class Group:
    """The rollouts of one prompt."""

    number: int
    version: int
    prompt: Any
    prompt_ids: list[int]
    samples: list[Sample]

    @property
    def n(self) -> int:
        return len(self.samples)

    @property
    def complete(self) -> bool:
        return all(sample.reward is not None for sample in self.samples)

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> Group:
        return cls(**{**stored, "samples": [Sample(**sample) for sample in stored["samples"]]})


@dataclass(frozen=True)
class Ended:
    """What is left of a group that was trained, or of which these rollouts never got a reward in time."""

    n: int
    without_reward: list[int]


@dataclass
class Run:
    """What is known of the run, as it is in the journal.

    Attributes:
        weights: what `Service.sample` takes for the current version.
        served: answers of grpo_server's two endpoints, which its status counts.
    """

    id: str
    settings: Settings
    state: State = "running"
    version: int = 0
    model_id: str = ""
    weights: str = ""
    last_update: dict[str, float] = field(default_factory=dict)
    served: dict[str, int] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)  # the settings as grpo_server's client sent them

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> Run:
        return cls(**{**stored, "settings": Settings(**stored["settings"])})


def group_id(run_id: str, number: int) -> str:
    """The name of a group: nothing of another run can be taken for it."""
    return f"{run_id}-{number}"


def rollout_id(run_id: str, group: int, i: int) -> str:
    """The name of a rollout."""
    return f"{group_id(run_id, group)}-{i}"


def advantages(rewards: Sequence[float], normalize: str) -> list[float]:
    """Rewards minus their mean; with "std" over their standard deviation. Equal rewards give exactly 0."""
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards) + STD_EPS if normalize == "std" else 1.0
    return [(reward - mean) / scale for reward in rewards]


def data_of(batch: Sequence[Group], settings: Settings) -> list[dict[str, Any]]:
    """What the learner is sent: position i predicts target i; the loss is divided by the tokens of the batch."""
    tokens = sum(len(sample.token_ids) for group in batch for sample in group.samples)
    data = []
    for group in batch:
        credit = advantages([cast(float, sample.reward) for sample in group.samples], settings.normalize)
        for sample, advantage in zip(group.samples, credit, strict=True):
            ids, before = [*group.prompt_ids, *sample.token_ids], len(group.prompt_ids) - 1
            inputs = {
                "target_tokens": ids[1:],
                "logprobs": [0.0] * before + sample.logprobs,
                "advantages": [0.0] * before + [advantage / tokens] * len(sample.token_ids),
            }
            if settings.loss_fn == "gspo":  # the ratio is that of the whole response
                inputs["sequence_ratio_mask"] = [0.0] * before + [1.0] * len(sample.token_ids)
            data.append({"tokens": ids[:-1], "inputs": inputs})
    return data
