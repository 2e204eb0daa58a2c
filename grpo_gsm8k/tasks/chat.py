"""Chat: conversations, for supervised fine-tuning and for reinforcement learning from preferences.

The rows are those of `validate`: `{"messages": [{"role", "content"}, …]}`, or `{"prompt", "response"}`. The prompt is
the conversation up to its last assistant message, which is the reference answer. A row may end with the user's message
if nothing needs a reference.

There are no right answers, so `Grade.correct` is None, and the mean reward picks the best checkpoint. The reward is a
preference over all completions of a prompt:

    --preference length         how near an answer's length in words is to `--length_words` (0: to the reference's):
                                the shorter of the two lengths by the longer
    --preference judge          the share of comparisons that an answer wins, by a judge at `--judge_base_url`: each
                                against each other in groups of up to 8, each against 4 others in larger groups. A
                                single answer, as in a validation, is compared with the reference
    --preference module:fn      fn(completions, example) → a number for each completion; may be async

Thoughts are not part of an answer: they are neither counted nor shown to the judge.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import numbers
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

from grpo_gsm8k import plugins
from grpo_gsm8k.datatypes import Completion, Example, Grade, Message, Prompt, Trajectory
from grpo_gsm8k.errors import ConfigError, DataError, PluginError
from grpo_gsm8k.plugins import calling
from grpo_gsm8k.tasks.base import SPLITS, Task, TaskOptions, id_of, read_examples
from grpo_gsm8k.tasks.conversations import conversation_of
from grpo_gsm8k.tasks.dataset import write_splits
from grpo_gsm8k.tasks.responses import without_thoughts

if TYPE_CHECKING:
    from grpo_gsm8k.judge import Judge, JudgeSettings

PREFERENCES = ("length", "judge")
ROUND_ROBIN = 8  # groups up to this size compare each answer with each other
OPPONENTS = 4  # of each answer in larger groups, at least


class Chat(Task):
    """Conversations; the last assistant message is the reference answer."""

    name = "chat"
    has_right_answers = False

    def __init__(self, options: TaskOptions | None = None) -> None:
        super().__init__(options)
        settings = self.options.settings
        self.preference = str(settings.get("preference", "length"))
        self.words = int(settings.get("length_words", 0))
        if self.words < 0:
            raise ConfigError(f"--length_words {self.words}: must be at least 0")
        self._judge: Judge | None = None
        self._judge_settings: JudgeSettings | None = None
        self._function: Callable[..., Any] | None = None
        if self.preference == "judge":
            if self.options.grader_processes:
                raise ConfigError("--grader_processes: the judge's calls wait together in one process; leave it out")
            from grpo_gsm8k.judge import JudgeSettings

            named = {k.removeprefix("judge_"): v for k, v in settings.items() if k.startswith("judge_")}
            self._judge_settings = JudgeSettings(**named)
            self._judge_settings.key()  # so that wrong settings fail before any work is done
        elif plugins.is_users(self.preference):
            self._function = plugins.load_object(self.preference, "--preference")
            if not callable(self._function):
                raise ConfigError(f"--preference {self.preference!r}: is not a function")
        elif self.preference not in PREFERENCES:
            raise ConfigError(f"preference {self.preference!r}: must be length, judge, or package.module:function")

    def examples(self, path: Path | str) -> list[Example]:
        """The conversations of a file. Repeated ones get distinct ids."""
        seen: Counter[str] = Counter()

        def parse(row: Mapping[str, Any]) -> Example:
            example = self.example(row)
            seen[example.id] += "id" not in row
            return example if seen[example.id] < 2 else replace(example, id=f"{example.id}-{seen[example.id]}")

        return read_examples(Path(path), parse)

    def example(self, row: Mapping[str, Any]) -> Example:
        """One conversation: the prompt, and the reference answer if there is one."""
        found, faults = conversation_of(row, answered=False)
        if found is None:
            raise ValueError(faults[0])
        (role, last), asked = found.messages[-1], found.messages
        answer = last if role == "assistant" else None
        if answer is not None:
            asked = asked[:-1]
        elif self.preference == "length" and not self.words:
            raise ValueError("the conversation has no last answer to take the length from: pass --length_words")
        meta = {k: v for k, v in row.items() if k not in ("id", "messages", "prompt", "response", "completion")}
        identity = json.dumps([found.messages, found.raw], ensure_ascii=False)
        return Example(id_of(row, identity), asked[0][1] if found.raw else asked, answer, meta)

    def prompt(self, example: Example) -> list[Message] | str:
        """The conversation; a raw row's prompt is the text as the model reads it."""
        return example.messages if isinstance(example.messages, str) else list(example.messages)

    def target(self, example: Example) -> str:
        """The reference answer."""
        if example.answer is None:
            where = example.source and (example.source.path, example.source.line)
            raise DataError(*(where or ("this conversation",))[:1], "has no answer to learn", *(where or ())[1:])
        return str(example.answer)

    def row(self, example: Example) -> dict[str, Any]:
        """The conversation with its reference answer."""
        if isinstance(example.messages, str):
            return {"id": example.id, "prompt": example.messages, "response": example.answer, **example.meta}
        said = [*example.messages, *([("assistant", str(example.answer))] if example.answer is not None else [])]
        messages = [{"role": role, "content": content} for role, content in said]
        return {"id": example.id, "messages": messages, **example.meta}

    def generate(self, folder: Path, seed: int, sizes: Mapping[str, int]) -> Path:
        """Toy conversations about animals, with answers of very different lengths; no question is in two splits."""
        drawn = toy_conversations(seed, {split: sizes[split] for split in SPLITS})
        write_splits(folder, drawn, {"source": "toy chat", "seed": seed})
        return folder

    # --------------------------------------------------------------------------------------------- preferences

    def grade(self, example: Example, response: str) -> Grade:
        """Grade a single response."""
        alone = Trajectory.of(Prompt(example, ()), Completion((), (), response, "stop"))
        return asyncio.run(self.grade_group(example, [alone]))[0]

    async def grade_group(self, example: Example, trajectories: Sequence[Trajectory]) -> list[Grade]:
        """Grade all completions of a prompt by preference."""
        answers = [answer_of(trajectory) for trajectory in trajectories]
        if self._function is not None:
            name, rewards = "preference", await self._call(self._function, trajectories, example)
        elif self._judge_settings is not None:
            name, rewards = "win_rate", await self._judged(example, answers, [t.seed for t in trajectories])
        else:
            wished = self.words or count_words(str(example.answer))
            name, rewards = "length", [closeness(count_words(answer), wished) for answer in answers]
        return [
            Grade(reward, {name: reward}, details={"words": count_words(answer)})
            for reward, answer in zip(rewards, answers, strict=True)
        ]

    async def _judged(self, example: Example, answers: Sequence[str], seeds: Sequence[int]) -> list[float]:
        """For each answer, the share of its comparisons that it wins; a tie is half a win."""
        if self._judge is None:
            from grpo_gsm8k.judge import Judge

            assert self._judge_settings is not None
            self._judge = Judge(self._judge_settings, (self.folder or Path("artifacts")) / "judge.jsonl")
        judge = self._judge
        asked = (("user", example.messages),) if isinstance(example.messages, str) else example.messages
        if len(answers) == 1:
            if example.answer is None:
                return [0.5]  # nothing to compare with
            return [await judge.prefer(asked, answers[0], str(example.answer))]
        pairs = pairings(len(answers), f"{example.id}|{list(seeds)}")
        won = await asyncio.gather(*(judge.prefer(asked, answers[a], answers[b]) for a, b in pairs))
        scores: list[list[float]] = [[] for _ in answers]
        for (a, b), score in zip(pairs, won, strict=True):
            scores[a].append(score)
            scores[b].append(1 - score)
        return [fmean(own) for own in scores]

    async def _call(
        self, function: Callable[..., Any], trajectories: Sequence[Trajectory], example: Example
    ) -> list[float]:
        """Call a user's function for a number per completion. Raises `PluginError` if it returns anything else."""
        with calling(f"--preference {self.preference!r}"):
            found = function(trajectories, example)
            if inspect.isawaitable(found):
                found = await found
        values = list(found) if isinstance(found, list | tuple) else []
        sound = all(isinstance(value, numbers.Real) and math.isfinite(value) for value in values)
        if not values or len(values) != len(trajectories) or not sound:
            raise PluginError(
                f"--preference {self.preference!r} returned {str(found)[:80]!r} for the {len(trajectories)} "
                f"completions of example {example.id}: a list with a finite number for each is needed"
            )
        return [float(value) for value in values]


def pairings(n: int, seed: str) -> list[tuple[int, int]]:
    """The pairs to compare: all of them, or in large groups `OPPONENTS` random opponents for each."""
    if n <= ROUND_ROBIN:
        return list(combinations(range(n), 2))
    draw = Random(seed)
    drawn = ((i, j) for i in range(n) for j in draw.sample([k for k in range(n) if k != i], OPPONENTS))
    return sorted({(min(pair), max(pair)) for pair in drawn})


def answer_of(trajectory: Trajectory) -> str:
    """The answer without its thoughts, including a thought that the prompt opened."""
    return without_thoughts(trajectory.prompt.opened + trajectory.text).strip()


def count_words(text: str) -> int:
    """Number of words, separated by blanks."""
    return len(text.split())


def closeness(words: int, wished: int) -> float:
    """The shorter length over the longer: 1 at the wished length."""
    return min(words, wished) / max(words, wished, 1)


# ------------------------------------------------------------------------------------------------ toy conversations

_ANIMALS = ("fox", "owl", "bear", "frog", "hare", "wolf", "crow", "deer", "swan", "goat", "mole", "newt", "crab",
            "duck", "lynx", "toad", "seal", "moth", "wasp", "hawk")  # fmt: skip
_KINDS = ("old", "young", "red", "grey", "small", "big", "wild", "tame", "quiet", "loud", "quick", "slow")
_PLACES = ("wood", "field", "river", "garden", "hills", "lake", "valley", "barn")
_FOOD = ("berries", "grass", "seeds", "fish", "nuts", "roots", "leaves", "bread")
_TIMES = ("at night", "in the morning", "in winter", "in summer", "after rain", "at noon")
_DEEDS = ("sleeps", "runs", "sings", "hides", "plays", "waits", "digs", "rests")
_QUESTIONS = (
    "Tell me about the {animal}.",
    "What do you know about the {animal}?",
    "Describe the {animal} for a child.",
    "I saw the {animal} today. What does it do?",
)
_SENTENCES = (
    "The {animal} lives in the {place}.",
    "It eats {food} and {food2}.",
    "It {deed} {time}.",
    "You may see it in the {place2} {time2}.",
    "It {deed2} when nobody is near.",
    "People like it because it {deed} so well.",
)
LONGEST_ANSWER = 8  # sentences


def toy_conversations(seed: int, counts: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Conversations by seed: a question about an animal, now and then after a greeting, and 1 to 8 sentences.

    Raises:
        ConfigError: more are asked for than there are questions.
    """
    draw = Random(f"chat/{seed}")
    questions = [(q, f"{kind} {animal}") for q in _QUESTIONS for kind in _KINDS for animal in _ANIMALS]
    draw.shuffle(questions)
    held_out = sum(count for split, count in counts.items() if split != "train")
    if held_out >= len(questions):
        raise ConfigError(f"{held_out} held-out conversations of {len(questions)} toy questions: ask for fewer")
    drawn: dict[str, list[dict[str, Any]]] = {}
    for split in sorted(counts, key=lambda name: (name == "train", name)):
        asked = [questions.pop() for _ in range(counts[split])] if split != "train" else []
        asked = asked or [draw.choice(questions) for _ in range(counts[split])]
        drawn[split] = [
            {"id": f"chat-{split}-{i:05d}", "messages": _toy_messages(question, animal, draw)}
            for i, (question, animal) in enumerate(asked)
        ]
    return {split: drawn[split] for split in counts}


def _toy_messages(question: str, animal: str, draw: Random) -> list[dict[str, str]]:
    places, foods, times, deeds = (draw.sample(words, 2) for words in (_PLACES, _FOOD, _TIMES, _DEEDS))
    fill = dict(zip(("place", "place2", "food", "food2", "time", "time2", "deed", "deed2"),
                    [*places, *foods, *times, *deeds], strict=True))  # fmt: skip
    first, *others = _SENTENCES
    chosen = [first, *(draw.choice(others) for _ in range(draw.randrange(LONGEST_ANSWER)))]
    said = [("user", question.format(animal=animal)), ("assistant", " ".join(chosen).format(animal=animal, **fill))]
    if draw.random() < 0.2:
        said = [("user", "Hello!"), ("assistant", "Hello! What would you like to know?"), *said]
    return [{"role": role, "content": content} for role, content in said]
