"""What is rewarded. To change it, pass `--reward package.module:function`, or edit `default_reward`.

A reward function takes the completion and its problem and returns a number, or a mapping of named
components whose sum is the reward; each component is logged by itself.

    def reward(completion: Completion, problem: Problem) -> float | dict[str, float]: ...

A completion under `r1_zero`, or under a chat template that opens a thought, starts inside that thought: a function that
calls `grade` says so with `opened=True`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from random import Random
from typing import Literal

from grpo_gsm8k.datatypes import Completion, Problem, Reward, RewardFn
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.gsm8k.grading import Tags, grade
from grpo_gsm8k.plugins import load_object


def default_reward(
    completion: Completion,
    problem: Problem,
    *,
    format_ok: Callable[[str], bool],
    format_weight: float,
    answer_weight: float,
    grading: Literal["strict", "flexible"],
    tags: Tags,
) -> dict[str, float]:
    """`format_weight` for the form that the prompt asked for, `answer_weight` for the right answer.

    `format_ok` is the style's, see `prompts.Form`, and knows whether the prompt opened a thought.
    """
    opened = getattr(format_ok, "opens_thought", False)
    return {
        "format": format_weight * format_ok(completion.text),
        "answer": answer_weight * grade(completion.text, problem.gold, grading, tags=tags, opened=opened),
    }


def random_reward(completion: Completion, problem: Problem) -> dict[str, float]:
    """The control: a fair coin, decided by the sample's seed and blind to its text (arXiv 2506.10947)."""
    return {"random": float(Random(completion.seed).random() < 0.5)}


def with_overlong_penalty(reward: RewardFn, longest: int, buffer: int) -> RewardFn:
    """`reward` plus a component `overlong`: DAPO's soft punishment of length (arXiv 2503.14476 eq. 13).

    It is 0 up to `longest - buffer` tokens, falls in a straight line over the `buffer` tokens that follow, and
    is -1 from `longest` on.
    """

    def shaped(completion: Completion, problem: Problem) -> dict[str, float]:
        beyond = len(completion.token_ids) - (longest - buffer)
        penalty = -min(max(beyond / buffer, 0.0), 1.0)
        return {**score(reward, completion, problem).components, "overlong": penalty}

    return shaped


def make_reward(
    spec: str,
    *,
    format_ok: Callable[[str], bool],
    format_weight: float = 0.2,
    answer_weight: float = 0.8,
    grading: Literal["strict", "flexible"] = "flexible",
    tags: Tags | None = None,
) -> RewardFn:
    """The reward function that `spec` names: `default`, `random`, or `package.module:function`.

    Raises:
        ConfigError: when there is no such module or function.
    """
    if spec == "random":
        return random_reward
    if spec == "default":
        return functools.partial(
            default_reward,
            format_ok=format_ok,
            format_weight=format_weight,
            answer_weight=answer_weight,
            grading=grading,
            tags=tags or Tags(),
        )
    function: RewardFn = load_object(spec, "reward", ("default", "random"))
    return function  # the user's own; its result is checked at each call


def score(reward: RewardFn, completion: Completion, problem: Problem) -> Reward:
    """Call a reward function and check what it returns. Raises `ConfigError` if that is not a finite number."""
    value = reward(completion, problem)
    if isinstance(value, Reward):
        parts: Mapping[str, float] = value.components or {"reward": value.total}
    else:
        parts = value if isinstance(value, Mapping) else {"reward": value}
    for name, number in parts.items():
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise ConfigError(f"the reward's component {name!r} is {number!r} for problem {problem.id}")
    components = {name: float(number) for name, number in parts.items()}
    return Reward(sum(components.values()), components)
