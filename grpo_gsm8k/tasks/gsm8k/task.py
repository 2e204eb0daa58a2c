"""GSM8K as a task."""

from __future__ import annotations

from grpo_gsm8k.tasks.base import Task


class Gsm8k(Task):
    """Word problems whose answer is a number."""

    name = "gsm8k"
