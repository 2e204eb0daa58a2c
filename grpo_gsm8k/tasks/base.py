"""The `Task` interface: how rows are read, how an example is asked, its reference answer, and the grade of a response.

To write a task, subclass `Task` in one file; only `grade` has no default:

    class Shout(Task):
        name = "shout"

        def prompt(self, example):
            return [("user", f"Write {example.messages} in capitals.")]

        def grade(self, example, response):
            right = response.strip() == example.answer
            return Grade(reward=float(right), correct=right, answer=response.strip())

and pass `--task mine:Shout`. Its data is JSONL with `question` (or `prompt`, `problem`, `messages`) and `answer`.
A task with several turns returns an `Env`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from grpo_gsm8k.datatypes import Example, Grade, Message, Rendered, Source
from grpo_gsm8k.errors import ConfigError, DataError
from grpo_gsm8k.plugins import calling, is_users
from grpo_gsm8k.runs.files import json_type, read_jsonl

if TYPE_CHECKING:
    from grpo_gsm8k.datatypes import Trajectory

__all__ = ["Env", "Example", "Grade", "Message", "Tags", "Task", "TaskOptions", "load_examples", "load_split"]

Author = Literal["model", "env"]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
QUESTION_KEYS = ("question", "prompt", "problem")


@dataclass(frozen=True)
class Tags:
    """The tags that a prompt requests. `answer_open=None`: think tags only."""

    think_open: str = "<think>"
    think_close: str = "</think>"
    answer_open: str | None = "<answer>"
    answer_close: str | None = "</answer>"


def after_opened_thought(response: str, tags: Tags) -> str | None:
    """The text behind the thought that the prompt opened; None if the thought never closes."""
    closing = re.search(tag_pattern(tags.think_close), response, re.IGNORECASE)
    return response[closing.end() :] if closing else None


def tag_pattern(tag: str) -> str:
    """A pattern of the tag that allows a blank inside its angle brackets."""
    bracketed = re.fullmatch(r"<(/?)(.+)>", tag)
    return rf"<\s?{bracketed[1]}\s?{re.escape(bracketed[2])}\s?>" if bracketed else re.escape(tag)


def make_tags(think_open: str, think_close: str, answer_open: str, answer_close: str) -> Tags:
    """Tags from configured strings; empty answer tags mean think-only. Raises `ConfigError` for half a pair."""
    if not think_open or not think_close or bool(answer_open) != bool(answer_close):
        raise ConfigError(
            "tags come in pairs: --think_open with --think_close (--reasoning_tag with --reasoning_end_tag), "
            "--answer_open with --answer_close (--answer_tag with --answer_end_tag)"
        )
    given = [tag for tag in (think_open, think_close, answer_open, answer_close) if tag]
    if len(set(given)) < len(given):
        raise ConfigError(f"tags must differ from each other: {', '.join(given)}")
    return Tags(think_open, think_close, answer_open or None, answer_close or None)


@dataclass(frozen=True)
class TaskOptions:
    """Options that the command line passes to every task; a task may ignore some.

    Attributes:
        prompt_style: how an example is asked; "auto" is the task's default.
        tags: around thoughts and answers.
        grading: "strict" requires a marked answer.
        format_weight, answer_weight: weights of the two usual reward components.
        grader_processes, grader_timeout_s: see `grader_pool`.
        settings: task-specific settings by their config names (chat: preference, judge_model, …).
    """

    prompt_style: str = "auto"
    tags: Tags = field(default_factory=Tags)
    grading: Literal["strict", "flexible"] = "flexible"
    format_weight: float = 0.2
    answer_weight: float = 0.8
    grader_processes: int = 0
    grader_timeout_s: float = 300.0
    settings: Mapping[str, Any] = field(default_factory=dict)


class Env(Protocol):
    """The environment of one conversation with the model."""

    def reply(self, turn: str) -> str | None:
        """Answer the model's turn; None ends the trajectory."""
        ...


class Task:
    """A task.

    Attributes:
        name: the task's name; `spec` is what `load_task` got: a name, or `module:Class`.
        stop: strings that end a turn of the model.
        plain: prompts are plain text, for models without a chat template.
        max_turns: limit of the model's turns in one trajectory.
        threads: how many groups are graded at once; above 1 for graders that wait for a service. For slow computation
            use `--grader_processes`.
    """

    name: str = ""
    stop: tuple[str, ...] = ()
    plain: bool = False
    max_turns: int = 1
    threads: int = 1

    def __init__(self, options: TaskOptions | None = None) -> None:
        self.options = options or TaskOptions()
        self.spec = self.name

    def examples(self, path: Path | str) -> list[Example]:
        """Read the rows of a JSONL file, in order. Override `example` for rows of another form.

        Raises:
            DataError: names the file and the line of the first fault.
        """
        return read_examples(Path(path), self.example)

    def example(self, row: Mapping[str, Any]) -> Example:
        """Read one row: a question or a conversation, its answer, and the other columns.

        Raises:
            ValueError: describes what is wrong with the row.
        """
        asked: tuple[Message, ...] | str
        key = next((key for key in QUESTION_KEYS if key in row), None)
        if key is None and "messages" in row:
            key, asked = "messages", messages_of(row["messages"])
        elif key is None:
            raise ValueError(f"no {', '.join(QUESTION_KEYS)} or messages; the row has {', '.join(row) or 'no keys'}")
        else:
            asked = text_of(row, key)
        meta = {k: v for k, v in row.items() if k not in ("id", key, "answer")}
        return Example(id_of(row, str(asked)), asked, row.get("answer"), meta)

    def prompt(self, example: Example) -> list[Message] | str:
        """How an example is asked: messages for the chat template, or plain text."""
        return [("user", example.messages)] if isinstance(example.messages, str) else list(example.messages)

    def target(self, example: Example) -> str:
        """The reference answer that supervised fine-tuning trains on. Raises `ConfigError` if the task has none."""
        raise ConfigError(f"task {self.spec} has no reference answers to learn: pass pairs as --data_path")

    def target_turns(self, example: Example) -> list[tuple[Author, str]]:
        """The reference answer turn by turn, each text with its author.

        The environment's turns are part of it, and never trained.
        """
        return [("model", self.target(example))]

    def grade(self, example: Example, response: str) -> Grade:
        """Grade a response."""
        raise NotImplementedError(f"{type(self).__name__}.grade")

    def grade_trajectory(self, example: Example, trajectory: Trajectory) -> Grade:
        """Grade a trajectory: by default its text, behind the thought that the prompt opened."""
        return self.grade(example, trajectory.prompt.opened + trajectory.text)

    def grade_group(
        self, example: Example, trajectories: Sequence[Trajectory]
    ) -> Sequence[Grade] | Awaitable[Sequence[Grade]]:
        """Grade all trajectories of one prompt, by default one by one. May be `async`."""
        return [self.grade_trajectory(example, trajectory) for trajectory in trajectories]

    def env(self, example: Example) -> Env | None:
        """The environment of this example; None for a single turn."""
        return None

    def probe(self) -> Example | None:
        """An example to try a chat template on when there is no data; None for a bare question."""
        return None

    def generate(self, folder: Path, seed: int, sizes: Mapping[str, int]) -> Path | None:
        """Make data by seed: `train.jsonl`, `val.jsonl` and `test.jsonl` of these sizes, and return their folder.

        Returns None if the task cannot generate data.
        """
        return None

    def row(self, example: Example) -> dict[str, Any]:
        """The columns that `prep-eval` writes and `examples` reads back."""
        if isinstance(example.messages, str):
            return {"id": example.id, "question": example.messages, "answer": example.answer, **example.meta}
        messages = [{"role": role, "content": content} for role, content in example.messages]
        return {"id": example.id, "messages": messages, "answer": example.answer, **example.meta}

    has_right_answers: bool = True
    """Whether grades set `correct`. Otherwise the mean reward is reported, and expert iteration refuses the task."""
    folder: Path | None = None
    """Where the task may keep files; set when the run directory opens."""

    def vote(self, answer: str | None) -> Hashable:
        """The normal form of an answer for majority voting."""
        return answer

    def guarded(self) -> AbstractContextManager[None]:
        """Wraps calls of the task: exceptions of a user's own task become one line; ours keep their traceback."""
        return calling(f"task {self.spec!r}") if is_users(self.spec) else nullcontext()


def summed(components: Mapping[str, float], **more: Any) -> Grade:
    """A grade whose reward is the sum of its components."""
    parts = {name: float(value) for name, value in components.items()}
    return Grade(sum(parts.values()), parts, **more)


# ------------------------------------------------------------------------------------------- reading examples


def load_examples(task: Task, path: Path | str) -> list[Example]:
    """`task.examples`; exceptions of a user's own task become one line."""
    with task.guarded():
        found = task.examples(Path(path))
    if not isinstance(found, list) or not all(isinstance(example, Example) for example in found):
        raise ConfigError(f"task {task.spec!r}: examples({path}) must return a list of Example")
    if not found:
        raise DataError(path, f"task {task.spec!r} finds no example in it")
    return found


def load_split(task: Task, data_dir: Path | str, split: Split) -> list[Example]:
    """The examples of `<data_dir>/<split>.jsonl`."""
    path = Path(data_dir) / f"{split}.jsonl"
    missing = next((part for part in (path.parent, path) if not part.exists()), None)
    if missing is not None:
        how = f"; make it with `grpo-gsm8k data --out_dir {data_dir}`" if not is_users(task.spec) else ""
        raise DataError(missing, f"does not exist{how}")
    return load_examples(task, path)


def read_examples(path: Path, parse: Callable[[Mapping[str, Any]], Example]) -> list[Example]:
    """Read the rows of a JSONL file with `parse`. Checks that ids are unique, and keeps prompts stored by `prep-eval`.

    Raises:
        DataError: names the file and the line of the first fault.
    """
    examples: list[Example] = []
    line_of: dict[str, int] = {}
    for line, row in read_jsonl(path):
        try:
            source = Source(str(path), line, stored_prompt(row))
            bare = row if source.rendered is None else {k: v for k, v in row.items() if k not in STORED_KEYS}
            example = replace(parse(bare), source=source)
        except ValueError as fault:
            raise DataError(path, str(fault), line) from None
        first = line_of.setdefault(example.id, line)
        if first != line:
            what = "the id" if "id" in row else "the question, and so the id"
            raise DataError(path, f"duplicate id {example.id!r}: line {first} has {what} already", line)
        examples.append(example)
    return examples


STORED_KEYS = ("prompt", "prompt_token_ids", "rendered")


def stored_prompt(row: Mapping[str, Any]) -> Rendered | None:
    """The prompt that `prep-eval` stored in a row, or None."""
    if "prompt_token_ids" not in row and "rendered" not in row:
        return None
    ids, made_with = row.get("prompt_token_ids"), row.get("rendered")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError("'prompt_token_ids' must be an array of token ids; run `grpo-gsm8k prep-eval` again")
    if not isinstance(made_with, dict) or not all(v is None or isinstance(v, str) for v in made_with.values()):
        raise ValueError("'rendered' must say how the prompt was made; run `grpo-gsm8k prep-eval` again")
    return Rendered(text_of(row, "prompt"), tuple(ids), made_with)


def text_of(row: Mapping[str, Any], key: str) -> str:
    """A column that must be text. Raises `ValueError` otherwise."""
    if key not in row:
        raise ValueError(f"{key!r} is missing; the row has {', '.join(map(repr, row)) or 'no keys'}")
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be text, not {json_type(value)}")
    if not value.strip():
        raise ValueError(f"{key!r} is empty")
    return value


def id_of(row: Mapping[str, Any], identity: str) -> str:
    """A row's id, or a hash of `identity`, so that the same question has the same id on every machine."""
    return text_of(row, "id") if "id" in row else hashlib.sha256(identity.encode()).hexdigest()[:12]


def seed_id(question: str) -> str:
    """The id under which the rewritten forms of a question name it: a hash that does not depend on blanks."""
    return f"seed-{hashlib.sha256(' '.join(question.split()).encode()).hexdigest()[:12]}"


def messages_of(value: Any) -> tuple[Message, ...]:
    """A conversation from a JSON array of {role, content}. Raises `ValueError` for anything else."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"'messages' must be an array of messages, not {json_type(value)}")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{i}] must be an object, not {json_type(message)}")
        text_of(message, "role"), text_of(message, "content")
    return tuple((message["role"], message["content"]) for message in value)
