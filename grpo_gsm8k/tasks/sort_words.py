"""Sort words: write a list of words back in alphabetical order, exactly and with nothing else.

A small task that a tiny model learns in minutes. The reward is 0 for a wrong list; for the right one it falls with the
length beyond what is needed: half of it is left when a response is twice as long as the list.

Words are made of syllables, so there is no list of words to ship; an example's split is a property of its words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import splits
from .responses import marked, own_turn, without_thoughts
from .splits import Split

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
    """How many words, of how many syllables; `letters` cuts words short."""

    smallest_count: int = 3
    largest_count: int = 6
    syllables: int = 2
    letters: int = 12


STANDARD = Level()
EASY = Level(smallest_count=2, largest_count=3, syllables=1, letters=3)


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


def split_of(words: Sequence[str]) -> Split:
    """The split that an example belongs to, whatever the order of its words."""
    return splits.split_of(_digest(words))


def _digest(words: Sequence[str]) -> str:
    return splits.digest(" ".join(sorted(words)))


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
        digest = _digest(words)
        return digest, {"id": f"sort-{digest[:12]}", "words": words}

    return splits.collect(split, count, draw)


def _word(level: Level, rng: random.Random) -> str:
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, level.syllables))]
    return ("".join(parts) + rng.choice(_ENDS))[: level.letters]
