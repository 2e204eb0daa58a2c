"""Sort words and the calculator."""

from __future__ import annotations

import pytest

from grpo_gsm8k.tasks import calculator, sort_words
from grpo_gsm8k.tasks.sort_words import EASY, Level

WORDS = ["tun", "bel", "dra"]


@pytest.mark.parametrize(
    "text, answer",
    [
        ("2+3*4", "14"),
        ("(2+3)*4", "20"),
        ("16 - 3 - 4", "9"),
        ("48/2", "24"),
        ("48/2=", "24"),
        ("$9*2", "18"),
        ("1/3", "1/3"),
        ("-1/3", "-1/3"),
        ("0.1+0.2", "0.3"),
        ("3/8", "0.375"),
        ("-0.5", "-0.5"),
        ("2^10", "1024"),
        ("2**10", "1024"),
        ("2^-2", "0.25"),
        ("20%*50", "10"),
        ("1,000*3", "3000"),
        ("3 × 4 ÷ 6", "2"),
        (".5*4", "2"),
        ("", "error: empty"),
        ("1/0", "error: division by zero"),
        ("1/(2-2)", "error: division by zero"),
        ("0^-1", "error: division by zero"),
        ("2^0.5", "error: no fractional powers"),
        ("9^9^9^9", "error: number too large"),
        ("10^100", "error: number too large"),
        ("2+", "error: unexpected end"),
        ("(2+3", "error: expected ')'"),
        ("apples", "error: unexpected 'a'"),
        ("__import__('os')", "error: unexpected '_'"),
        ("1+" * 5000 + "1", "error: too long"),
    ],
)
def test_the_calculator(text: str, answer: str) -> None:
    assert calculator.evaluate(text) == answer


def test_the_calculator_answers_what_is_no_text() -> None:
    assert calculator.evaluate(None) == "error: no text"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "response, correct",
    [
        ("bel dra tun", True),
        ("bel, dra, tun", True),
        ("bel\ndra\ntun", True),
        ("1. bel\n2. dra\n3. tun", True),
        ("- bel\n- dra\n- tun", True),
        ("Bel dra tun.", True),
        ("Sorted: bel dra tun", True),
        ("<answer>bel dra tun</answer>", True),
        ("<think>tun last</think>bel dra tun", True),
        ("tun bel dra", False),
        ("bel dra", False),
        ("bel dra tun tun", False),
        ("tun bel dra tun", False),
        ("bel dra tun and more", False),
        ("bel drat un", False),
        ("<think>bel dra tun</think>", False),
        ("<answer>bel dra tun", False),
        ("", False),
    ],
)
def test_sorted_words_are_read_exactly(response: str, correct: bool) -> None:
    verdict = sort_words.grade(response, WORDS)
    assert verdict.correct is correct
    assert (verdict.reward > 0) is correct


def test_the_reward_falls_with_the_length_beyond_what_is_needed() -> None:
    rewards = [
        sort_words.grade(extra + "bel dra tun", WORDS).reward for extra in ("", "Sorted: ", "Here they are, sorted: ")
    ]
    assert rewards[0] == 1.0
    assert rewards == sorted(rewards, reverse=True) and len(set(rewards)) == 3
    assert sort_words.grade("x" * 10**6 + " bel dra tun", WORDS).reward < 1e-4


def test_the_reference_is_what_earns_everything() -> None:
    for row in sort_words.generate("train", 50, seed=0):
        assert sort_words.grade(sort_words.reference(row["words"]), row["words"]) == (
            True,
            1.0,
            tuple(sorted(row["words"])),
        )
        assert not sort_words.grade(" ".join(row["words"]), row["words"]).correct


def test_the_splits_are_disjoint_and_reproducible() -> None:
    rows = {name: sort_words.generate(name, 50, seed=1, level=EASY) for name in ("train", "val", "test")}  # type: ignore[arg-type]
    assert rows["train"] == sort_words.generate("train", 50, seed=1, level=EASY)
    assert len({row["id"] for split in rows.values() for row in split}) == 150
    with pytest.raises(ValueError, match="ask for fewer"):
        sort_words.generate("val", 10**4, seed=0, level=Level(2, 2, 1, 1))
