r"""GSM8K: word problems whose answer is a number, asked and answered in one of the `STYLES`.

The rows are `{"question", "answer"}`, the answer a solution that ends in `#### 72`; or `{"prompt", "gold"}`, made by
hand. In an `Example`, `messages` is the question, `answer` the number as text, `meta["solution"]` the solution.

The reward is `format_weight` for the form that the prompt asked for and `answer_weight` for the right answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from grpo_gsm8k.datatypes import Example, Grade, Message, Trajectory
from grpo_gsm8k.tasks.base import after_opened_thought, summed
from grpo_gsm8k.tasks.gsm8k.grading import answers, gold_value, parse_number
from grpo_gsm8k.tasks.gsm8k.problems import example_from_row, row_of
from grpo_gsm8k.tasks.gsm8k.styles import StyledTask

PROBE = Example("check", "Tom has 2 eggs and buys 3. How many?", "5", {"solution": "2+3=<<2+3=5>>5\n#### 5"})


class Gsm8k(StyledTask):
    """Word problems whose answer is a number."""

    name = "gsm8k"

    def example(self, row: Mapping[str, Any]) -> Example:
        """See `problems.example_from_row`."""
        return example_from_row(row)

    def prompt(self, example: Example) -> list[Message] | str:
        """As the style asks."""
        return self.style.ask(question_of(example))

    def target(self, example: Example) -> str:
        """The reference solution, written as the style wants it."""
        return self.style.reference(example.meta["solution"], example.answer)

    def grade(self, example: Example, response: str) -> Grade:
        """The verdict on a response; one to a plain prompt starts inside the thought that the prompt opened."""
        if self.style.plain and isinstance(response, str):
            response = response.removeprefix(self.options.tags.think_open)
        return self.verdict(example, response, self.style.plain)

    def grade_trajectory(self, example: Example, trajectory: Trajectory) -> Grade:
        """The verdict on what was said behind the prompt."""
        return self.verdict(example, trajectory.text, bool(trajectory.prompt.opened))

    def verdict(self, example: Example, response: str, opened: bool) -> Grade:
        """Form and answer, read once.

        Args:
            opened: the prompt opened a thought: until the response closes it, there is no answer and no form.
        """
        tags, options = self.options.tags, self.options
        read, gold = answers(response, tags=tags, opened=opened), gold_value(example.answer)
        strict, flexible = (found is not None and found.value == gold for found in read)
        correct, found = (strict, read.strict) if options.grading == "strict" else (flexible, read.flexible)
        closed = not opened or after_opened_thought(response, tags) is not None
        format_ok = closed and self.style.format_ok(response)
        return summed(
            {"format": options.format_weight * format_ok, "answer": options.answer_weight * correct},
            correct=correct,
            format_ok=format_ok,
            answer=found.text if found else None,
            details={"correct_strict": strict, "correct_flexible": flexible},
        )

    def generate(self, folder: Path, seed: int, sizes: Mapping[str, int]) -> Path:
        """Toy word problems, those of the demo."""
        from grpo_gsm8k.tasks.gsm8k import toy

        return toy.write(folder, seed, sizes)

    def row(self, example: Example) -> dict[str, Any]:
        """The columns that `grpo-gsm8k data` writes, and the gold as a number."""
        return row_of(example)

    def vote(self, answer: str | None) -> Hashable:
        """The number, however it is written."""
        return None if answer is None else parse_number(answer)

    def probe(self) -> Example:
        """A word problem with its solution."""
        return PROBE


def question_of(example: Example) -> str:
    """The text of a word problem."""
    assert isinstance(example.messages, str)
    return example.messages
