"""Word problems in GSM8K's form, small enough for a model that trains on a laptop.

A template is a question with holes, the ranges of its numbers, and one sentence per step of the solution.
In a sentence, `[s = a + b]` is a calculation: it binds `s` and is written as GSM8K writes it, the formula, the
calculator annotation, the result: `12+5=<<12+5=17>>17`. Draws in which a value leaves 1..29, or a division has
a remainder, are thrown away.

Simplified against GSM8K: some twenty templates, small numbers (most have one digit), two operands per step.
A single step is a sum that a tiny model can learn; the answer to several at once, without working, is not.

The training references come from a teacher of mixed quality: some of them are terse, the right `#### n` and
not a word of working. How often depends on the kind of problem (`TERSE_SPREAD`), on an instance it is chance.
A model that imitates this teacher guesses on many problems that it could have worked out; that working pays
is for reinforcement learning to discover. Validation and test references are always worked.

    >>> splits = make_problems(0, {"train": 6000, "val": 200, "test": 600})
    >>> splits["train"][0].id
    'toy-train-00000'
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from grpo_gsm8k.datatypes import Example
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.tasks.base import SPLITS
from grpo_gsm8k.tasks.dataset import write_splits
from grpo_gsm8k.tasks.gsm8k.problems import KEYS, row_of

LARGEST = 29
"""No number of a problem or of its solution is larger."""

TERSE_SHARE = 0.53
"""The share of training references that give the answer without the work."""

TERSE_SPREAD = 0.15
"""The share of terse references varies over the templates from `terse_share - 0.15` to `terse_share + 0.15`."""

STEP_WEIGHTS = {1: 0.15, 2: 0.45, 3: 0.30, 4: 0.10}
"""How often a problem has so many steps."""

_HE = ("Tom", "Ben", "Sam", "Leo", "Max", "Omar", "Ivan", "Jack")
_SHE = ("Ann", "Mia", "Eva", "Zoe", "Lily", "Rosa", "Nina", "Kate")
_ITEMS = ("apples", "books", "pens", "coins", "cards", "shells", "eggs", "cakes", "toys", "stamps", "plums", "beads")
_PLACES = ("shop", "school", "park", "library", "market", "farm", "garden", "kitchen")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

_CALCULATION = re.compile(r"\[(\w+) = (\w+) ([-+*/]) (\w+)\]")


@dataclass(frozen=True)
class Template:
    """One kind of problem.

    Attributes:
        question: the text, with holes for the numbers and for the words of `_words`.
        ranges: smallest and largest value of each number in the question.
        steps: one sentence per step, each with one `[name = operand op operand]`; an operand is the name of a
            number or an integer. The last one computes the answer.
    """

    question: str
    ranges: Mapping[str, tuple[int, int]]
    steps: tuple[str, ...]


TEMPLATES: tuple[Template, ...] = (
    # One step.
    Template(
        "{name} has {a} {items} and buys {b} more. How many {items} does {name} have?",
        {"a": (2, 19), "b": (2, 9)},
        ("{name} has [t = a + b].",),
    ),
    Template(
        "There are {a} {items} at the {place}. {name} takes {b}. How many {items} are left?",
        {"a": (4, 25), "b": (2, 9)},
        ("There are [t = a - b] left.",),
    ),
    Template(
        "{name} is {a} and {friend} is {b} years older. How old is {friend}?",
        {"a": (3, 25), "b": (2, 9)},
        ("{friend} is [t = a + b].",),
    ),
    # Two steps.
    Template(
        "{name} has {a} {items}, finds {b} and loses {c}. How many {items} does {name} have?",
        {"a": (2, 9), "b": (2, 9), "c": (2, 9)},
        ("{name} has [s = a + b].", "Then [t = s - c]."),
    ),
    Template(
        "{name} buys {a} bags of {b} {items} and eats {c}. How many {items} are left?",
        {"a": (2, 4), "b": (2, 9), "c": (2, 9)},
        ("{name} buys [s = a * b].", "There are [t = s - c] left."),
    ),
    Template(
        "{name} finds {a} {items}. {friend} finds {b} more than {name}. How many do they find together?",
        {"a": (2, 12), "b": (2, 9)},
        ("{friend} finds [s = a + b].", "Together [t = a + s]."),
    ),
    Template(
        "{name} shares {a} red and {b} blue {items} among {c} friends. How many does each friend get?",
        {"a": (2, 9), "b": (2, 9), "c": (2, 5)},
        ("{name} shares [s = a + b].", "Each gets [t = s / c]."),
    ),
    Template(
        "{name} reads {a} pages. {friend} reads {b} fewer than twice that. How many pages does {friend} read?",
        {"a": (4, 15), "b": (2, 9)},
        ("Twice is [s = 2 * a].", "{friend} reads [t = s - b]."),
    ),
    Template(
        "A bus carries {a} people. At the {place} {b} get off and {c} get on. How many people are on the bus?",
        {"a": (6, 19), "b": (2, 9), "c": (2, 9)},
        ("First [s = a - b].", "Then [t = s + c]."),
    ),
    Template(
        "{name} works {a} hours for ${b} an hour and gets a ${c} tip. How many dollars does {he} earn?",
        {"a": (2, 4), "b": (2, 9), "c": (2, 9)},
        ("{name} gets $[s = a * b].", "With the tip $[t = s + c]."),
    ),
    Template(
        "{name} is {a} years old. {friend} is {b} years younger. How old is {friend} in {c} years?",
        {"a": (6, 19), "b": (2, 9), "c": (2, 9)},
        ("{friend} is [s = a - b].", "Then [t = s + c]."),
    ),
    # Three steps.
    Template(
        "{name} has {a} {items}, gets {b}, sells {c} and finds {d}. How many {items} does {name} have?",
        {"a": (2, 9), "b": (2, 9), "c": (2, 9), "d": (2, 9)},
        ("{name} has [s = a + b].", "Then [r = s - c].", "Now [t = r + d]."),
    ),
    Template(
        "{name} buys {a} pens for ${b} each and a book for ${c}, with ${d} off. How many dollars does {he} pay?",
        {"a": (2, 4), "b": (2, 9), "c": (2, 9), "d": (2, 9)},
        ("Pens cost $[s = a * b].", "With the book $[r = s + c].", "In the end $[t = r - d]."),
    ),
    Template(
        "{name} has {a} {items} and {friend} {b}. They lose {c} and share the rest. How many does each get?",
        {"a": (2, 9), "b": (2, 9), "c": (2, 9)},
        ("Together [s = a + b].", "The rest is [r = s - c].", "Each gets [t = r / 2]."),
    ),
    Template(
        "The {place} has {a} rows of {b} chairs. {c} break and {name} brings {d}. How many chairs are there?",
        {"a": (2, 4), "b": (2, 9), "c": (2, 9), "d": (2, 9)},
        ("There are [s = a * b].", "Then [r = s - c].", "Now [t = r + d]."),
    ),
    Template(
        "{name} runs {a} miles on {day}, {b} more the next day and then {c}. How many miles in all?",
        {"a": (2, 9), "b": (2, 9), "c": (2, 9)},
        ("The next day [s = a + b].", "Together [r = a + s].", "In all [t = r + c]."),
    ),
    Template(
        "{name} earns ${a} a day for {b} days, spends ${c} and finds ${d}. How many dollars is that?",
        {"a": (2, 9), "b": (2, 4), "c": (2, 9), "d": (2, 9)},
        ("{name} earns $[s = a * b].", "The rest is $[r = s - c].", "In the end $[t = r + d]."),
    ),
    Template(
        "{name} bakes {a} cakes and {friend} {b} fewer. They eat {c}. How many cakes remain?",
        {"a": (4, 12), "b": (2, 9), "c": (2, 9)},
        ("{friend} bakes [s = a - b].", "Together [r = a + s].", "Then [t = r - c] remain."),
    ),
    Template(
        "The {place} has {a} cats, twice as many dogs and {b} birds. How many animals are there?",
        {"a": (2, 11), "b": (2, 9)},
        ("Dogs are [s = 2 * a].", "With cats [r = a + s].", "With birds [t = r + b]."),
    ),
    # Four steps.
    Template(
        "{name} has ${a}, earns ${b}, pays ${c}, finds ${d} and gives {friend} ${e}. How many dollars are left?",
        {"a": (2, 9), "b": (2, 9), "c": (2, 9), "d": (2, 9), "e": (2, 9)},
        ("{name} has $[s = a + b].", "Then $[r = s - c].", "Now $[q = r + d].", "In the end $[t = q - e]."),
    ),
    Template(
        "{name} picks {a} {items}, then {b} more than that, drops {c} and fills {d} bags. How many are in a bag?",
        {"a": (2, 9), "b": (2, 9), "c": (2, 9), "d": (2, 5)},
        ("First [s = a + b].", "Together [r = a + s].", "The rest is [q = r - c].", "A bag holds [t = q / d]."),
    ),
    Template(
        "{friend} has {a} {items}, {name} has twice as many and {he} loses {b}. They find {c}. How many in all?",
        {"a": (3, 9), "b": (2, 9), "c": (2, 9)},
        ("Twice is [s = 2 * a].", "{name} has [r = s - b].", "Together [q = a + r].", "In all [t = q + c]."),
    ),
)


def make_problems(
    seed: int, counts: Mapping[str, int], terse_share: float = 0.5, largest: int = LARGEST
) -> dict[str, list[Example]]:
    """Draw the splits named in `counts`; the same arguments give the same problems on any machine.

    No question and no (template, numbers) of one split occurs in another. The smaller splits are drawn first,
    so that asking for more training problems leaves validation and test as they are.

    Args:
        seed: the seed of every draw.
        counts: how many problems each split has. Only the one named "train" has terse references.
        terse_share: the share of them, 0 to 1.
        largest: no number is larger; above `LARGEST`, the ranges of the templates grow in proportion.
    """
    if not 0 <= terse_share <= 1:
        raise ConfigError(f"terse_share is {terse_share}; it is a share, between 0 and 1")
    owner: dict[tuple[int, ...], str] = {}  # (template, *numbers) -> split
    seen: set[str] = set()
    drawn: dict[str, list[Example]] = {}
    for split in sorted(counts, key=lambda name: (name == "train", name)):
        rng = random.Random(f"{seed}/{split}")
        mood = random.Random(f"{seed}/{split}/terse")
        drawn[split] = []
        failures = 0
        while len(drawn[split]) < counts[split]:
            index = rng.choices(range(len(TEMPLATES)), _WEIGHTS)[0]
            question, answer, gold, numbers = _instance(TEMPLATES[index], rng, largest)
            if question in seen or owner.setdefault((index, *numbers), split) != split:
                failures += 1
                if failures > 10_000:
                    raise ConfigError(
                        f"{counts[split]} {split} problems are more than the templates have; ask for fewer"
                    )
                continue
            failures = 0
            seen.add(question)
            if split == "train" and mood.random() < _terse_share_of(index, terse_share):
                answer = f"#### {gold}"
            id_ = f"toy-{split}-{len(drawn[split]):05d}"
            drawn[split].append(Example(id_, question, gold, {"solution": answer}))
    return {split: drawn[split] for split in counts}


_PER_STEPS = {n: sum(len(t.steps) == n for t in TEMPLATES) for n in STEP_WEIGHTS}
_WEIGHTS = [STEP_WEIGHTS[len(t.steps)] / _PER_STEPS[len(t.steps)] for t in TEMPLATES]


def _terse_share_of(index: int, terse_share: float) -> float:
    """The template's own share: evenly spaced around `terse_share`, in an order unrelated to the steps."""
    place = (index * 7 % len(TEMPLATES)) / (len(TEMPLATES) - 1)  # 7 shares no factor with their number: each place once
    return terse_share + 2 * TERSE_SPREAD * min(terse_share, 1 - terse_share) * (2 * place - 1)


def _instance(template: Template, rng: random.Random, largest: int) -> tuple[str, str, str, tuple[int, ...]]:
    """Question, worked answer, gold and numbers of one draw."""
    words, ranges = _words(rng), template.ranges.items()
    lines = None
    while lines is None:
        numbers = {name: rng.randint(low, high * largest // LARGEST) for name, (low, high) in ranges}
        lines, result = _solution(template, numbers, largest)
    question = template.question.format(**words, **numbers)
    answer = "\n".join([*lines, f"#### {result}"]).format(**words)
    return question, answer, str(result), tuple(numbers.values())


def _solution(template: Template, numbers: Mapping[str, int], largest: int) -> tuple[list[str] | None, int]:
    """The sentences with their calculations written out, and the last result; no sentences if a value is bad."""
    values, lines, result = dict(numbers), [], 0
    for step in template.steps:
        match = _CALCULATION.search(step)
        assert match is not None, step
        target, left, operator, right = match.groups()
        a, b = (int(operand) if operand.isdigit() else values[operand] for operand in (left, right))
        if operator == "/" and a % b:
            return None, 0
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]
        if not 1 <= result <= largest:
            return None, 0
        values[target] = result
        formula = f"{a}{operator}{b}"
        lines.append(f"{step[: match.start()]}{formula}=<<{formula}={result}>>{result}{step[match.end() :]}")
    return lines, result


def _words(rng: random.Random) -> dict[str, str]:
    male = rng.random() < 0.5
    name = rng.choice(_HE if male else _SHE)
    friend = rng.choice([other for other in _HE + _SHE if other != name])
    return {
        "name": name,
        "friend": friend,
        "he": "he" if male else "she",
        "He": "He" if male else "She",
        "items": rng.choice(_ITEMS),
        "place": rng.choice(_PLACES),
        "day": rng.choice(_DAYS),
    }


def write(
    folder: Path, seed: int, sizes: Mapping[str, int], terse_share: float = TERSE_SHARE, largest: int = LARGEST
) -> Path:
    """Splits of these sizes as GSM8K's rows, and their manifest."""
    splits = make_problems(seed, {split: sizes[split] for split in SPLITS}, terse_share, largest)
    rows = {split: [{key: row_of(example)[key] for key in KEYS} for example in splits[split]] for split in splits}
    more = {} if largest == LARGEST else {"largest": largest}
    write_splits(folder, rows, {"source": "toy", "seed": seed, "terse_share": terse_share, **more})
    return folder
