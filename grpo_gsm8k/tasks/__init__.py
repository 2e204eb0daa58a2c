"""Tasks: how examples are asked and graded, and data generators. Nothing here imports torch.

`load_task` takes the name of a task, or `module:Class` for one of a user's own.
"""

from __future__ import annotations

import difflib
import importlib
from contextlib import nullcontext
from typing import TYPE_CHECKING

from grpo_gsm8k import plugins
from grpo_gsm8k.errors import ConfigError

if TYPE_CHECKING:
    from grpo_gsm8k.tasks.base import Task, TaskOptions

TASKS = {
    "countdown": "grpo_gsm8k.tasks.countdown:Countdown",
    "gsm8k": "grpo_gsm8k.tasks.gsm8k.task:Gsm8k",
    "gsm8k_calculator": "grpo_gsm8k.tasks.calculator:Gsm8kCalculator",
    "math": "grpo_gsm8k.tasks.math.task:Math",
    "sort_words": "grpo_gsm8k.tasks.sort_words:SortWords",
    "chat": "grpo_gsm8k.tasks.chat:Chat",
}
"""Name → class. To add a task, add its file to this folder and its line here."""


def load_task(spec: str, options: TaskOptions | None = None) -> Task:
    """Load a task by name, or as `module:Class`.

    Raises:
        ConfigError: the task does not exist.
    """
    from grpo_gsm8k.tasks.base import Task

    if spec in TASKS:
        module, _, name = TASKS[spec].partition(":")
        found = getattr(importlib.import_module(module), name)
    elif plugins.is_users(spec):
        found = plugins.load_object(spec, "task", TASKS)
    else:
        near = difflib.get_close_matches(spec, TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TASKS)}"
        raise ConfigError(f"unknown task {spec!r}; {hint}. A task of your own is package.module:Class")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"task {spec!r}: is not a subclass of grpo_gsm8k.tasks.base.Task")
    with plugins.calling(f"task {spec!r}") if plugins.is_users(spec) else nullcontext():
        task = found(options)
    task.spec = spec
    return task
