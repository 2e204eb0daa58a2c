"""Sort words: write a list of words back in alphabetical order, exactly and with nothing else.

The rows are `{"words": ["tun", "bel"]}`; a `"solution"` replaces the sorted list as the reference answer. A small
task that a tiny model learns in minutes. The reward is 0 for a wrong list; for the right one it falls with the length
beyond what is needed: half of it is left when a response is twice as long as the list.

Words are built from syllables, so no word list is needed. An example's words determine its split.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from grpo_gsm8k.datatypes import Example, Grade, Message
from grpo_gsm8k.runs.files import json_type

from . import splits
from .base import Split, Task, id_of, text_of
from .responses import marked, own_turn, without_thoughts

_ONSETS = [*"bcdfghjklmnprstvwz", "br", "cl", "dr", "fl", "gr", "pl", "st", "tr"]
_VOWELS = "aeiou"
_ENDS = ["", "", "", "n", "r", "s", "t", "l", "m"]


class Verdict(NamedTuple):
    """Whether the list is right, what it earns, and the words that were read."""

    correct: bool
    reward: float
    answer: tuple[str, ...]


@dataclass(frozen=True)
class Level:
    """How many words, of how many syllables; `letters` cuts words short. Or words drawn from a `vocabulary`."""

    smallest_count: int = 3
    largest_count: int = 6
    syllables: int = 2
    letters: int = 12
    vocabulary: tuple[str, ...] = ()


STANDARD = Level()
EASY = Level(smallest_count=2, largest_count=3, syllables=1, letters=3)
ANIMALS = (
    "ant ape bat bee cat cow dog duck elk emu fox frog goat hen ibis jay kiwi lynx mole newt owl pig quail rat seal "
    "toad viper wolf yak zebra"
)
TINY = Level(smallest_count=3, largest_count=5, vocabulary=tuple(ANIMALS.split()))


class SortWords(Task):
    """Lists of words to be sorted."""

    name = "sort_words"

    def example(self, row: Mapping[str, Any]) -> Example:
        """A row `{"words": […]}`; `answer` is the sorted list."""
        words = row.get("words")
        if not isinstance(words, list) or not words:
            raise ValueError(f"'words' must be an array of words, not {json_type(words)}")
        for word in words:
            if not isinstance(word, str) or _words(word) != [word]:
                raise ValueError(f"'words' holds {word!r}, which is not a word: letters only, with - or ' between them")
        if "solution" in row:
            text_of(row, "solution")
        meta = {key: value for key, value in row.items() if key not in ("id", "words")}
        text = " ".join(words)
        return Example(id_of(row, text), text, reference(words).split(), meta)

    def row(self, example: Example) -> dict[str, Any]:
        """The columns that `example` reads."""
        return {"id": example.id, "words": asked(example), **example.meta}

    def prompt(self, example: Example) -> list[Message]:
        """One question, the words in it."""
        return [("user", f"Sort alphabetically. Write only the words, with blanks between them: {example.messages}")]

    def target(self, example: Example) -> str:
        """The row's own solution, else the sorted list."""
        return str(example.meta.get("solution") or " ".join(example.answer))

    def grade(self, example: Example, response: str) -> Grade:
        """1 for the right list, less what it is too long by (`length`); 0 for any other."""
        verdict = grade(response, asked(example))
        same_words = sorted(map(str.casefold, verdict.answer)) == sorted(map(str.casefold, asked(example)))
        return Grade(
            reward=verdict.reward,
            components={"sorted": float(verdict.correct), "length": verdict.reward - float(verdict.correct)},
            correct=verdict.correct,
            format_ok=same_words,
            answer=" ".join(verdict.answer) or None,
        )

    def generate(self, folder: Path, seed: int, sizes: Mapping[str, int]) -> Path:
        """Lists by seed; with `tiny`, small ones with solutions of mixed quality, see `careless`."""

        def draw(split: Split, count: int, tiny: bool) -> list[dict[str, Any]]:
            return generate(split, count, seed, TINY if tiny else STANDARD)

        return splits.write(folder, seed, sizes, draw, careless)


def asked(example: Example) -> list[str]:
    """The words in the order of the question."""
    assert isinstance(example.messages, str)
    return example.messages.split()


CARELESS_SHARE = {3: 0.35, 4: 0.5, 5: 0.65}
"""The share of lists of so many words that the teacher of the generated training data does not sort."""


def careless(row: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A row with a solution that may be wrong: the longer the list, the more often it is copied as it stands.

    A model that imitates this teacher copies many lists that it could have sorted; reinforcement learning finds out.
    """
    share = CARELESS_SHARE.get(len(row["words"]), 0.5)
    copied = random.Random(f"{seed}/{row['id']}/careless").random() < share
    return {**row, "solution": " ".join(row["words"]) if copied else reference(row["words"])}


def reference(words: Sequence[str]) -> str:
    """The right answer: the words in alphabetical order, separated by spaces."""
    return " ".join(sorted(words, key=lambda word: (word.casefold(), word)))


def grade(response: str, words: Sequence[str]) -> Verdict:
    """Judges a response: the words must stand at its end (or in `<answer>` tags) in order, with none before or between.

    Commas, line breaks, numbering and bullets between the words are fine. Words that are not of the list may precede
    it ("Sorted: …"), at the price of their length.
    """
    if not isinstance(response, str):
        return Verdict(False, 0.0, ())
    text = own_turn(without_thoughts(response).strip())
    marks, fragment = marked(text)
    content = marks[-1].content if marks else text
    wanted = reference(words).split()
    read = _words(content[-20 * len(" ".join(words)) - 400 :])
    end = read[len(read) - len(wanted) :] if len(read) >= len(wanted) else read
    before = read[: len(read) - len(wanted)]
    inside = {word.casefold() for word in words}
    repeats = any(word.casefold() in inside for word in before)
    correct = bool(wanted) and fragment is None and [w.casefold() for w in end] == [w.casefold() for w in wanted]
    correct = correct and not repeats
    needed = len(" ".join(wanted))
    length = len(response.strip())
    return Verdict(correct, needed / max(needed, length) if correct else 0.0, tuple(end))


def _words(text: str) -> list[str]:
    text = re.sub(r"(?m)^\s*(?:\d{1,3}[.)]|[-*•])\s+", " ", text)
    return re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text)


def generate(split: Split, count: int, seed: int, level: Level = STANDARD) -> list[dict[str, Any]]:
    """`count` different examples of a split, as rows `{"id", "words"}`; the words of an example differ.

    Raises:
        ValueError: if the level holds too few different examples.
    """
    rng = random.Random(f"sort_words|{split}|{seed}|{level}")

    def draw() -> tuple[str, dict[str, Any]] | None:
        size = rng.randint(level.smallest_count, level.largest_count)
        words = list(dict.fromkeys(_word(level, rng) for _ in range(size)))
        if len(words) < level.smallest_count or words == sorted(words):
            return None
        return " ".join(sorted(words)), {"words": words}

    return splits.collect("sort", split, count, draw)


def _word(level: Level, rng: random.Random) -> str:
    if level.vocabulary:
        return rng.choice(level.vocabulary)
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, level.syllables))]
    return ("".join(parts) + rng.choice(_ENDS))[: level.letters]
