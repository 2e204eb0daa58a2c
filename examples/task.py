"""A task of one's own: write a word backwards. It makes its own data, so that nothing else is needed to try it.

    grpo-gsm8k pipeline --preset tiny --task examples.task:Backwards --out_dir artifacts/runs/backwards

Only `grade` has no default. `target` is what fine-tuning learns; `generate` makes data where no `--data` is named. With
files of your own (`{"question": …, "answer": …}` a line) leave it out, and pass `--data FOLDER`.
"""

import random

from grpo_gsm8k.tasks import splits
from grpo_gsm8k.tasks.base import Grade, Task

LETTERS = "abcdefgh"


class Backwards(Task):
    """A word's letters, separated by blanks, in the opposite order."""

    name = "backwards"

    def prompt(self, example):
        """One question of the user's."""
        return [("user", f"Backwards: {example.messages}")]

    def target(self, example):
        """What a teacher answers."""
        return example.answer

    def grade(self, example, response):
        """Right or wrong; half of the reward for the share of letters that stand in their place."""
        wanted, given = example.answer.split(), response.split()
        share = sum(a == b for a, b in zip(wanted, given, strict=False)) / max(len(wanted), len(given), 1)
        right = given == wanted
        parts = {"right": 0.5 * right, "letters": 0.5 * share}
        return Grade(
            sum(parts.values()), parts, correct=right, format_ok=len(given) == len(wanted), answer=" ".join(given)
        )

    def generate(self, folder, seed, sizes):
        """Different words for each split: which one a word belongs to is a property of the word."""

        def draw(split, count, tiny):
            rng = random.Random(f"backwards/{split}/{seed}")
            return splits.collect("backwards", split, count, lambda: word(rng))

        return splits.write(folder, seed, sizes, draw)


def word(rng):
    """What decides a row's split and its id, and the row."""
    letters = [rng.choice(LETTERS) for _ in range(rng.randint(4, 6))]
    question = " ".join(letters)
    return question, {"question": question, "answer": " ".join(reversed(letters))}
