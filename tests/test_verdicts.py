"""GSM8K's verdicts stay what they are: 10,000 responses made by seed, and the digest of what was said of them.

To see which verdicts a change of the grader moves, print `verdicts()` before and after it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

from grpo_gsm8k.tasks.gsm8k.grading import extract, grade

RESPONSES = 10_000
DIGEST = "26ae97101c12580917d76e233b27eb63556f904efbc01fd0c8729c313a3856ba"

_OPENINGS = ("", "Let's see. ", "<think>", "< think >", "First, ", "Step 1: ", "\n\n", "**Solution**\n")
_STEPS = (
    "{a} + {b} = {c}.",
    "So {a} of {b} are left.",
    "She has {a} apples and {b} pears.",
    "{a}*{b}=<<{a}*{b}={c}>>{c}",
    "$\\frac{{{a}}}{{{b}}}$ of it is {c}.",
    "Wait, that is {a}, not {b}.",
    "\\boxed{{{a}}} would be too small.",
    "#### {b}",
    "about {a}, say",
    "Question: how many are {a} and {b}?",
    "{a}% of {b} is {c}.",
)
_CLOSINGS = ("", "</think>", "</think>\n", " </ think> ", "\n", " ")
_ANSWERS = (
    "#### {g}",
    "\n#### ${g}",
    "The answer is {g}.",
    "The final answer is $\\boxed{{{g}}}$.",
    "<answer> {g} </answer>",
    "<answer>{g}",
    "\\boxed{{{g}",
    "\\boxed{{{a}}} or \\boxed{{{g}}}",
    "So she has {g} apples",
    "{a} + {b} = {g}",
    "Answer: {g} dollars",
    "{g}",
    "I am not sure, maybe {g}?",
    "####",
    "The answer is {a}. No, it is {g}.",
    "\\boxed{{{g}\\text{{ apples}}}}",
    "**{g}**",
)
_ENDS = ("", "<|im_end|>", "\n\nQuestion: What is 2 + 2?\n#### 4", " I hope it is correct.", "\n", " (approximately)")


def responses(seed: int = 0) -> Iterator[tuple[str, str, bool]]:
    """Response, gold, and whether the prompt opened a thought."""
    rng = random.Random(seed)
    for _ in range(RESPONSES):
        numbers = {name: rng.choice((rng.randint(0, 99), rng.randint(0, 9_999))) for name in "abc"}
        gold = rng.choice((str(numbers["c"]), f"{numbers['c']:,}", f"-{numbers['a']}", f"{numbers['b']}.5", "1/2"))
        said = rng.choice((gold, gold, gold.replace(",", ""), str(numbers["a"]), f"{gold}.0"))
        parts = [rng.choice(_OPENINGS), *(rng.choice(_STEPS) for _ in range(rng.randint(0, 3))), rng.choice(_CLOSINGS)]
        parts += [rng.choice(_ANSWERS), rng.choice(_ENDS)]
        text = rng.choice(("", " ", "\n")).join(part.format(**numbers, g=said) for part in parts)
        yield text[: rng.choice((len(text), len(text), len(text), rng.randint(0, len(text))))], gold, rng.random() < 0.3


def verdicts() -> Iterator[str]:
    """One line a response: right strictly, right flexibly, and the answer that was read either way."""
    for text, gold, opened in responses():
        for mode in ("strict", "flexible"):
            yield f"{grade(text, gold, mode, opened=opened)} {extract(text, mode, opened=opened)}"


def test_ten_thousand_verdicts_are_what_they_were():
    lines = list(verdicts())
    assert 0.2 < sum(line.startswith("True") for line in lines) / len(lines) < 0.6
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == DIGEST
