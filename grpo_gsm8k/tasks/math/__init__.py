r"""Grades answers in LaTeX: MATH, MATH-500, AIME and their kind.

A response is read as a careful person reads it (`reading`), its answer and the gold are parsed by an own parser
(`latex`, `tree`) and compared as what they are (`compare`, `intervals`, `values`, `words`): exactly, within bounds.
What this package cannot read is asked of Math-Verify in a process of its own, under a deadline (`worker`). Nothing
that a model writes is evaluated by Python or SymPy in this process.

Mathematically equal is right, in any form; a decimal for an exact value is wrong unless it terminates and is equal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .compare import canonical, same
from .reading import Mode, answers
from .worker import WORKER

__all__ = ["Mode", "canonical", "extract", "gold_of", "grade", "verdict", "warm_up"]


def grade(response: str, gold: str, mode: Mode = "flexible") -> bool:
    r"""Whether a response commits to an answer that equals the gold.

    Args:
        response: what the model wrote, thoughts included. Anything but a string is wrong.
        gold: the right answer: LaTeX, `$…$`, `\boxed{…}` or a whole solution that ends in a box, a text, a list.
        mode: "strict" demands a marked answer (`\boxed{…}`, `<answer>…</answer>`, `#### …`); "flexible" also reads
            prose.
    """
    if mode not in ("flexible", "strict"):
        raise ValueError(f"mode must be 'flexible' or 'strict', not {mode!r}")
    if not isinstance(response, str) or not isinstance(gold, str):
        return False
    wanted = gold_of(gold)
    return bool(wanted) and _matches(answers(response, mode), wanted)


def verdict(found: Sequence[str], gold: str) -> bool:
    """Whether one of the readings of an answer equals the gold.

    Where only Math-Verify can tell, this waits until its process has started, so that no verdict depends on that.
    """
    return _matches(found, gold, warm=True)


def _matches(found: Sequence[str], gold: str, warm: bool = False) -> bool:
    undecided = []
    for answer in found:
        known = same(gold, answer)
        if known:
            return True
        if known is None:
            undecided.append(answer)
    if not undecided or not _is_asked(gold, undecided[0]) or (warm and not warm_up()):
        return False
    return bool(WORKER.ask(gold, undecided[0]))


def extract(response: str, mode: Mode = "flexible") -> str | None:
    """The answer that a response commits to, as it is written; None if there is none."""
    found = answers(response, mode) if isinstance(response, str) else []
    return found[0] if found else None


def gold_of(text: str) -> str:
    r"""The answer in a gold: the content of its last box if it has one, else the text; "" if it says nothing."""
    from ..responses import marked

    marks, _ = marked(text) if "boxed" in text or "fbox" in text else ([], None)
    boxes = [mark.content for mark in marks if mark.kind == "box"]
    return (boxes[-1] if boxes else text).strip()


def warm_up() -> bool:
    """Starts the process of Math-Verify and waits until it is ready, so that no verdict depends on its start."""
    return WORKER.warm_up()


def _is_asked(gold: str, answer: str) -> bool:
    """Whether Math-Verify may know more: mathematics on both sides, without words and towers of powers."""
    return all(
        text.count("^") < 12
        and re.search(r"[\d\\=^]|\b[a-zA-Z]\b", text)
        and not re.search(r"\\text|\{\s*\}|(?<![\\A-Za-z])[A-Za-z]{4,}", text)
        for text in (gold, answer)
    )
