"""The grader against verdicts that were written by hand, against every real reference answer, and under attack.

The table in `data/grading/cases.jsonl` says what a careful person would rule, not what the code did; a disputed
case is changed there first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from grpo_gsm8k.tasks.gsm8k.grading import DEFAULT_TAGS, Tags, extract, grade, parse_gold, parse_number

CASES = [
    json.loads(line)
    for line in (Path(__file__).parent / "data/grading/cases.jsonl").read_text(encoding="utf-8").splitlines()
]
GSM8K = Path(__file__).resolve().parents[2] / "shared" / "gsm8k"


@pytest.mark.parametrize("case", CASES, ids=[f"{i}:{case['why']}" for i, case in enumerate(CASES)])
def test_verdict(case: dict[str, Any]) -> None:
    for mode in ("flexible", "strict"):
        assert grade(case["response"], case["gold"], mode) is case[mode], mode
        shown = extract(case["response"], mode)
        right = shown is not None and parse_number(shown) == parse_number(case["gold"])
        assert right is case[mode], f"extract says {shown!r}, grade says otherwise"


def test_the_table_is_fair() -> None:
    assert len(CASES) >= 400
    for case in CASES:
        assert case["flexible"] or not case["strict"], f"strict is a subset of flexible: {case}"
    for mode in ("flexible", "strict"):
        share = sum(case[mode] for case in CASES) / len(CASES)
        assert 0.3 < share < 0.7, f"answering always the same would agree with {share:.0%} in {mode}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", Fraction(18)),
        ("1,234,567.89", Fraction(123456789, 100)),
        ("1 000 000", Fraction(10**6)),
        ("0.1", Fraction(1, 10)),
        ("-3.5", Fraction(-7, 2)),
        ("\\frac{1}{3}", Fraction(1, 3)),
        ("2\\frac{1}{3}", Fraction(7, 3)),
        ("-2 1/3", Fraction(-7, 3)),
        ("3⅓", Fraction(10, 3)),
        ("1.8 \\times 10^{-3}", Fraction(18, 10**4)),
        ("1e-20", Fraction(1, 10**20)),
        ("12345678901234567890.5", Fraction(24691357802469135781, 2)),
        ("$1.5 million", Fraction(1_500_000)),
        ("two hundred and five", Fraction(205)),
        ("18 apples", Fraction(18)),
        ("", None),
        ("apples", None),
        ("18 19", None),
        ("20 - 2", None),
        ("x = 18", None),
        ("18 or 19", None),
        ("1,23", None),
        ("3:30", None),
        ("1/0", None),
        ("1e999999999", None),
        ("9" * 5000, None),
        ("18" + "0" * 3_000_000, None),
    ],
)
def test_parse_number_is_exact(text: str, value: Fraction | None) -> None:
    assert parse_number(text) == value


def test_no_float_stands_between() -> None:
    assert not grade("\\boxed{9007199254740993}", "9007199254740992")
    assert not grade("\\boxed{0.30000000000000004}", "0.3")
    assert grade("\\boxed{0.3}", "3/10")


@pytest.mark.parametrize(
    "gold", ["18", " 18 ", "18.0", "$18", "#### 18", "9 * 2 = <<9*2=18>>18\n#### 18", "36/2", "+18"]
)
def test_gold_in_every_sensible_form(gold: str) -> None:
    assert grade("#### 18", gold) and grade("#### 18", gold, "strict") and not grade("#### 19", gold)


@pytest.mark.parametrize("gold", ["", "eggs", "18 or 19", "nan", "inf", "#### ", "a solution without a number", "20-2"])
def test_a_broken_gold_fails_loudly(gold: str) -> None:
    with pytest.raises(ValueError, match="gold is not a number"):
        grade("#### 18", gold)
    with pytest.raises(ValueError, match="gold is not a number"):
        grade(gold, gold)


def test_other_misuse() -> None:
    with pytest.raises(ValueError, match="mode"):
        grade("18", "18", "loose")  # type: ignore[arg-type]
    for response in (None, 18, 18.0, b"18", ["18"]):
        assert not grade(response, "18")  # type: ignore[arg-type]
        assert extract(response) is None  # type: ignore[arg-type]


def test_parse_gold() -> None:
    assert parse_gold("9 * 2 = 18\n#### 18") == "18"
    assert parse_gold("#### 17\n#### 1,234,567") == "1234567"
    assert parse_gold("#### -3.5 ") == "-3.5"
    for broken, what in (
        ("18", "no '####'"),
        ("####", "no number"),
        ("#### eggs", "no number"),
        ("#### 1 or 2", "no number"),
    ):
        with pytest.raises(ValueError, match=what):
            parse_gold(broken)


# ---------------------------------------------------------------------------------------------------------
# Tags


def test_custom_tags() -> None:
    tags = Tags("[THINK]", "[/THINK]", "[ANS]", "[/ANS]")
    assert grade("[THINK]\\boxed{17}[/THINK][ANS]18[/ANS]", "18", "strict", tags=tags)
    assert not grade("[THINK][ANS]18[/ANS]", "18", tags=tags)
    assert not grade("[ANS]18[/ANS] so [/THINK] done", "18", tags=tags)
    # The default tags mean nothing now: no thought, and no marker.
    assert grade("<think>so \\boxed{18}</think>", "18", "strict", tags=tags)
    assert not grade("<answer>18</answer>", "18", "strict", tags=tags)


def test_think_tags_only() -> None:
    tags = Tags(answer_open=None, answer_close=None)
    assert grade("<think>17</think>\\boxed{18}", "18", "strict", tags=tags)
    assert not grade("<think>17</think><answer>18</answer>", "18", "strict", tags=tags)
    assert grade("<think>17</think><answer>18</answer>", "18", tags=tags)
    assert not grade("<think>\\boxed{18}", "18", tags=tags)
    assert Tags() == DEFAULT_TAGS


# ---------------------------------------------------------------------------------------------------------
# The real data set


def reference_answers() -> Iterator[str]:
    if not GSM8K.is_dir():
        pytest.skip(f"no GSM8K in {GSM8K}")
    for split in ("train", "test"):
        for line in (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["answer"]


def test_every_reference_answer_is_right_and_its_neighbour_wrong() -> None:
    for number, answer in enumerate(reference_answers()):
        gold = parse_gold(answer)
        assert grade(answer, gold) and grade(answer, gold, "strict"), answer
        if number % 8 == 0:
            neighbour = str(int(gold) + 1)
            assert not grade(answer, neighbour) and not grade(answer, neighbour, "strict"), answer


def test_reference_solutions_without_their_marker() -> None:
    """Prose by people, unmarked: rules of thumb must read nearly all of it, and strict none."""
    answers = [answer.rpartition("####") for answer in list(reference_answers())[::6]]
    read = sum(grade(body, gold) for body, _, gold in answers)
    assert read / len(answers) > 0.97
    assert not any(grade(body, gold, "strict") for body, _, gold in answers)


def test_reference_solutions_cut_off_before_their_result() -> None:
    """Cut right after the last "=": nothing was said yet."""
    for answer in list(reference_answers())[::12]:
        body, _, gold = answer.rpartition("####")
        cut = body[: body.rfind("=", 0, body.rfind("<<")) + 1] if "<<" in body else ""
        assert not grade(cut, gold) and not grade(cut + " $", gold), cut


# ---------------------------------------------------------------------------------------------------------
# Hostile responses: the time is the processor's, so a busy machine does not matter

UNITS = [
    *(
        "7",
        "{",
        "}",
        "a",
        " ",
        "\n",
        "(",
        "1,",
        "1 ",
        "1.",
        "-",
        "*",
        "**",
        "$",
        "<",
        "<<",
        "_",
        "`",
        "~~",
        "½",
        "²",
        "१",
    ),
    *(
        "\\boxed{",
        "\\boxed{18}",
        "\\boxed{}",
        "\\boxed ",
        "\\frac",
        "\\frac{1}{2}",
        "\\",
        "#",
        "####",
        "#### ",
        "#### Step 3:\n",
    ),
    *("<think>", "</think>", "<think></think>", "<answer>", "</answer>", "<answer></answer>", "<|", "\nQuestion: "),
    *(
        "The answer is ",
        "The answer is 18. ",
        "answer: 17 or ",
        "Wait, ",
        "She has 18 eggs. ",
        "because 3, ",
        "18 or ",
        "1=",
    ),
    *("one ", "...", "? ", "1e9", "\t", "\n\n18", "\u200b", "ﷺ"),
]


@pytest.mark.parametrize("unit", UNITS, ids=[repr(unit) for unit in UNITS])
def test_a_hostile_megabyte_is_answered_at_once(unit: str) -> None:
    filler = (unit * (1_000_000 // len(unit) + 1))[:1_000_000]
    started = time.process_time()
    for response in (filler, "The answer is \\boxed{" + filler + "x", "<answer>" + filler + "\n#### 18"):
        grade(response, "18")
    grade(filler, "18", "strict")
    assert time.process_time() - started < 3.0


def test_twice_the_length_is_about_twice_the_work() -> None:
    def seconds(megabytes: int) -> float:
        started = time.process_time()
        for unit in ("<think>", "<answer>", "\\boxed{}", "#### ", "{", "1 ", "a", "\n"):
            grade(unit * (megabytes * 1_000_000 // len(unit)) + "x", "18")
        return time.process_time() - started

    seconds(1)
    assert seconds(4) < 4 * 2.5 * max(seconds(1), 0.05)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("#### 18\n" + "blah " * 400_000, True),
        ("\\boxed{18}" + " " * 2_000_000 + ".", True),
        ("blah. " * 300_000 + "\n#### 18", True),
        ("blah. " * 300_000 + "The answer is 18.", True),
        ("<think>" + "hm " * 700_000 + "</think>\\boxed{18}", True),
        ("<think>" + "\\boxed{18} " * 100_000, False),
        ("\\boxed{" * 100_000 + "18" + "}" * 100_000, True),
        ("\\boxed{" * 100_000 + "18", False),
        ("#### 18" + "0" * 1_000_000, False),
        ("\\boxed{18." + "0" * 1_000_000 + "}", False),  # right in principle, but no answer to a word problem
        ("#### 1e1000000000", False),
        ("#### 10^1000000000", False),
        ("#### 1 \\times 10^{999999999}", False),
        ("#### 18\n" + "#" * 1_000_000 + "\n", True),
    ],
    ids=range(14),
)
def test_long_responses_are_read_right(response: str, right: bool) -> None:
    started = time.process_time()
    assert grade(response, "18") is right
    assert time.process_time() - started < 1.5


def test_nothing_crashes() -> None:
    """Every case, cut short at every eighth character, and reversed."""
    for case in CASES:
        for end in range(0, len(case["response"]), 8):
            grade(case["response"][:end], "18")
            grade(case["response"][end:], "18", "strict")
        grade(case["response"][::-1], "18")


# ---------------------------------------------------------------------------------------------------------
# Headings in the model's own working, and lines that label an answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The result is 9 eggs after breakfast.\nQuestion: how much money is that?\n9 * 2 = 18\n#### 18", "18"),
        ("First part: the answer is 12.\n\nProblem 2: now the cost.\n12*3=36\n\\boxed{36}", "36"),
        ("The solution is to find x.\n**Question:** how many are left?\nThere are 7.\n\n\\boxed{7}", "7"),
        ("The answer is 12.\n\nExercise 2: and twice that?\n<answer>24</answer>", "24"),
        ("The answer is 12.\nProblem 2: the cost.\n\\boxed{36}\n#### 36", "36"),
        ("I shall write it in \\boxed{}.\nQuestion: how many?\n9 * 2\n#### 18", "18"),
        ("#### Step 1: add\n9 + 9\nQuestion: how many?\n\\boxed{18}", "18"),
        ("#### 18\n\nQuestion: A new one? Answer: 5\n#### 5", "18"),
        ("The answer is 18.\n\nQuestion: Bob has 3 cats.\nAnswer: 5", "18"),
        ("The answer is 18.\n\nQuestion: Bob?\n#### 5\n\nQuestion: Eve?\n#### 6", "18"),
        ("Problem 1: eggs\nThe answer is 12.\nProblem 2: cost\n#### 36\n\nQuestion: Eve?", "36"),
        ("The answer is 12.\nProblem 2: cost\n#### 36<|im_end|>\n<|im_start|>user\nEve?\n#### 5", "36"),
    ],
)
def test_a_heading_ends_a_text_only_behind_its_answer(response: str, answer: str) -> None:
    shown = extract(response)
    assert shown == answer


LABELLED = (
    "The total ratio is 5+9 = <<5+9=14>>14\nThe proportion of women is 9/14, and as a result, there are 9/14*84 = "
    "<<9/14*84=54.00000000000001>>54 women on the bus.\n20 alight, so that is 54-20 = <<54-20=34>>34\nA: 34"
)


def test_a_labelled_last_line_is_the_answer() -> None:
    assert extract(LABELLED) == "34" and extract(LABELLED, "strict") is None
    assert extract("The answer is 54 for now.\nThen 20 leave.\nA: 34") == "34"
    assert extract("\\boxed{54}\nA: 34") == "54"  # a marked answer is not replaced by a label
    assert extract("A: 12\nB: 15\nThe answer is 15.") == "15"
    assert extract("As a result, there are 34 women.") == "34" and extract("The result is 34.") == "34"
