"""Grades each trajectory once: the task's `Grade`, or the same with the reward of a user's function.

    def reward(completion, example): ...            # one completion: a number, named components, or a Grade
    def reward(completions, example): ...           # all completions of a prompt: a list of these
    async def reward(completion, example): ...      # awaited together with those of the other prompts

A completion is a `Trajectory`: `text`, `token_ids`, `logprobs`, `finish_reason`, `prompt`. The reward is the sum of the
components, and each is logged. If the prompt opens a thought, `text` starts inside it, and `completion.prompt.opened`
holds the opening.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import numbers
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from grpo_gsm8k import plugins
from grpo_gsm8k.datatypes import Example, Grade, RewardFn, Trajectory
from grpo_gsm8k.errors import PluginError
from grpo_gsm8k.tasks.base import Task, summed
from grpo_gsm8k.tasks.grader_pool import grader_pool

PENDING = 64  # async rewards awaited at once


def random_reward(completion: Trajectory, example: Example) -> dict[str, float]:
    """The control: a fair coin from the sample's seed, independent of its text (arXiv 2506.10947)."""
    return {"random": float(Random(completion.seed).random() < 0.5)}


def make_reward(spec: str) -> RewardFn | None:
    """The reward function that `spec` names: `random` or `package.module:function`; None for the task's own.

    Raises:
        ConfigError: there is no such module or function.
    """
    if spec == "default":
        return None
    if spec == "random":
        return random_reward
    return plugins.load_object(spec, "reward", ["default", "random"])  # type: ignore[no-any-return]  # the user's own; its result is checked at each call


@dataclass(frozen=True)
class Grader:
    """Grades the groups of a step.

    Attributes:
        reward: replaces the reward of the task's grade; None keeps it.
        overlong: (longest, buffer) adds a component `overlong`, see `overlong_penalty`.
    """

    task: Task
    reward: RewardFn | None = None
    overlong: tuple[int, int] | None = None

    def grade(self, groups: Sequence[Sequence[Trajectory]]) -> list[list[Grade]]:
        """A grade for each trajectory of each group, made once.

        Raises:
            PluginError: a user's task or reward raises, returns no grade, or its grader process dies or hangs.
        """
        return asyncio.run(self._grade_all(groups)) if groups else []

    async def _grade_all(self, groups: Sequence[Sequence[Trajectory]]) -> list[list[Grade]]:
        processes, seconds = self.task.options.grader_processes, self.task.options.grader_timeout_s
        threads = processes or max(self.task.threads, getattr(self.reward, "threads", 1))
        pool, slots = ThreadPoolExecutor(threads), asyncio.Semaphore(PENDING)

        async def call(what: str, users: bool, function: Callable[..., Any], *args: Any) -> Any:
            if processes:
                function = functools.partial(grader_pool(processes).call, what, users, seconds, function)
            elsewhere = processes or threads > 1
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(pool, function, *args) if elsewhere else function(*args)
            if not inspect.isawaitable(found):
                return found
            async with slots:
                return await found

        try:
            return await asyncio.gather(*(self._grade_group(call, group) for group in groups))
        finally:  # after an error, drop the calls that have not started
            pool.shutdown(cancel_futures=True)

    async def _grade_group(self, call: Callable[..., Awaitable[Any]], group: Sequence[Trajectory]) -> list[Grade]:
        example = group[0].prompt.example
        task, reward = self.task, self.reward
        with task.guarded():
            grades = await call(f"task {task.spec!r}", plugins.is_users(task.spec), task.grade_group, example, group)
        grades = [_checked(grade, task.spec, example) for grade in _one_each(grades, group, "task", example)]
        if reward is not None:
            what = f"reward {_name(reward)}"
            with plugins.calling(what):
                if _wants_group(reward):
                    values = await call(what, True, reward, group, example)
                else:
                    values = await asyncio.gather(*(call(what, True, reward, one, example) for one in group))
            values = _one_each(values, group, "reward", example)
            grades = [_rewarded(grade, value, example) for grade, value in zip(grades, values, strict=True)]
        if self.overlong:
            grades = [
                overlong_penalty(grade, sum(one.mask), *self.overlong) for grade, one in zip(grades, group, strict=True)
            ]
        return grades


def overlong_penalty(grade: Grade, length: int, longest: int, buffer: int) -> Grade:
    """DAPO's soft punishment of length as a component `overlong` (arXiv 2503.14476 eq. 13).

    It is 0 up to `longest - buffer` tokens, falls in a straight line over the `buffer` tokens that follow, and
    is -1 from `longest` on.
    """
    beyond = length - (longest - buffer)
    components = {**(grade.components or {"reward": grade.reward}), "overlong": -min(max(beyond / buffer, 0.0), 1.0)}
    return replace(grade, reward=sum(components.values()), components=components)


def _rewarded(grade: Grade, value: Any, example: Example) -> Grade:
    """The grade with the reward of a user's function."""
    if isinstance(value, Grade):
        return _checked(value, "reward", example)
    parts: Mapping[str, Any] = value if isinstance(value, Mapping) else {"reward": value}
    for name, number in parts.items():
        if not _finite(number):
            raise PluginError(f"the reward's component {name!r} is {number!r} for example {example.id}")
    fresh = summed(parts)
    return replace(grade, reward=fresh.reward, components=fresh.components)


def _checked(grade: Any, who: str, example: Example) -> Grade:
    if not isinstance(grade, Grade):
        raise PluginError(f"{who}: the grade of example {example.id} is {grade!r}, not a Grade")
    for name, number in {"reward": grade.reward, **grade.components}.items():
        if not _finite(number):
            raise PluginError(f"{who}: the {name} of example {example.id} is {number!r}, not a finite number")
    for name in ("correct", "format_ok"):
        if not isinstance(getattr(grade, name), bool | None):
            raise PluginError(
                f"{who}: {name} of example {example.id} is {getattr(grade, name)!r}, not true, false or None"
            )
    return grade


def _finite(number: Any) -> bool:
    return isinstance(number, numbers.Real) and math.isfinite(number)


def _one_each(values: Any, group: Sequence[Trajectory], who: str, example: Example) -> Sequence[Any]:
    if not isinstance(values, list | tuple) or len(values) != len(group):
        raise PluginError(
            f"the {who} returned {str(values)[:80]!r} for the {len(group)} completions of example {example.id}: "
            "a list with one for each is needed"
        )
    return values


def _wants_group(function: Callable[..., Any]) -> bool:
    return next(iter(inspect.signature(function).parameters), "") == "completions"


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', type(function).__name__)}"
