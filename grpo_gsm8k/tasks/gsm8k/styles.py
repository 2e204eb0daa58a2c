"""How a word problem is asked, and how its answer is written. A `Style` is a few lines of text; to add one, add an
entry to `STYLES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from grpo_gsm8k.datatypes import Message
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.tasks.base import Tags, Task, TaskOptions
from grpo_gsm8k.tasks.gsm8k.grading import extract, parse_number


@dataclass(frozen=True)
class Style:
    """One way to ask and to answer.

    Attributes:
        ask: question → chat messages, or → plain text for a model without chat turns.
        reference: solution, gold → the response that a teacher would write, from GSM8K's reference solution.
        format_ok: response → whether it has the form that was asked for; a response to an opened thought has
            closed it.
        stop: strings that end a completion.
        plain: asked as plain text whose end opens a thought, so that a response starts inside it.
    """

    ask: Callable[[str], list[Message] | str]
    reference: Callable[[str, str], str]
    format_ok: Callable[[str], bool]
    stop: tuple[str, ...] = ()
    plain: bool = False


def working(solution: str) -> str:
    """The reference solution without GSM8K's `<<a+b=c>>` annotations and without its `####` line."""
    body = solution.rpartition("####")[0]
    return re.sub(r"<<[^<>\n]*>>", "", body).strip()


def _gsm8k_format_ok(response: str) -> bool:
    last = response.rstrip().rpartition("\n")[2]
    return response.count("####") == 1 and last.startswith("#### ") and parse_number(last[5:]) is not None


def _gsm8k(tags: Tags) -> Style:
    return Style(
        ask=lambda question: [("user", question)],
        reference=lambda solution, gold: solution,
        format_ok=_gsm8k_format_ok,
    )


def _qwen_boxed(tags: Tags) -> Style:
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    return Style(
        ask=lambda question: [("system", system), ("user", question)],
        reference=lambda solution, gold: f"{working(solution)}\n\nThe final answer is $\\boxed{{{gold}}}$.".strip(),
        format_ok=lambda response: "\\boxed{" in response and extract(response, "strict") is not None,
    )


def _r1_zero(tags: Tags) -> Style:
    """Raw text for a base model; the prompt opens the thought, so the response starts inside it."""
    answered = bool(tags.answer_open and tags.answer_close)
    form = f"{tags.think_open} the reasoning {tags.think_close} "
    form += f"{tags.answer_open} the answer {tags.answer_close}" if answered else "the answer within \\boxed{}"

    def ask(question: str) -> str:
        return (
            "A user asks a question and an assistant solves it. The assistant first thinks the reasoning "
            f"through and then gives the answer, in this form: {form}\n"
            f"User: {question}\nAssistant: {tags.think_open}"
        )

    def reference(solution: str, gold: str) -> str:
        box = f"The final answer is $\\boxed{{{gold}}}$."
        said = f"{tags.answer_open} {gold} {tags.answer_close}" if answered else box
        return f" {working(solution)} {tags.think_close} {said}"

    def format_ok(response: str) -> bool:
        _thought, closed, rest = response.partition(tags.think_close)
        if not closed or tags.think_open in response or tags.think_close in rest:
            return False
        if not answered:
            return "\\boxed{" in rest and extract(rest, "strict", tags=tags) is not None
        rest = rest.strip()
        inner = rest.removeprefix(tags.answer_open or "").removesuffix(tags.answer_close or "")
        return rest == f"{tags.answer_open}{inner}{tags.answer_close}" and not any(
            tag in inner for tag in (tags.answer_open or "", tags.answer_close or "")
        )

    stop = (tags.answer_close,) if answered and tags.answer_close else ()
    return Style(ask, reference, format_ok, stop, plain=True)


DEFAULT_STYLE = "qwen_boxed"
STYLES: dict[str, Callable[[Tags], Style]] = {"gsm8k": _gsm8k, "qwen_boxed": _qwen_boxed, "r1_zero": _r1_zero}


class StyledTask(Task):
    """A task that is asked in one of the `STYLES`."""

    def __init__(self, options: TaskOptions | None = None) -> None:
        super().__init__(options)
        if self.options.prompt_style == "auto":
            self.options = replace(self.options, prompt_style=DEFAULT_STYLE)
        if self.options.prompt_style not in STYLES:
            raise ConfigError(f"prompt_style {self.options.prompt_style!r}: must be one of {', '.join(STYLES)}")
        self.style = STYLES[self.options.prompt_style](self.options.tags)
        self.stop, self.plain = self.style.stop, self.style.plain
