"""Countdown: verdicts derived by hand, hostile responses, and a generator whose splits never meet."""

from __future__ import annotations

import time

import pytest

from grpo_gsm8k.tasks.countdown import EASY, STANDARD, Level, generate, grade, identity, solution, solve
from grpo_gsm8k.tasks.rationals import Fault, evaluate
from grpo_gsm8k.tasks.splits import digest, split_of

# numbers, target, response, verdict
CASES: list[tuple[list[int], int, str, bool]] = [
    # the expression alone
    ([3, 5, 2], 16, "<answer>(3+5)*2</answer>", True),
    ([3, 5, 2], 16, "<answer> ( 5 + 3 ) * 2 </answer>", True),
    ([3, 5, 2], 16, "<answer>2*(3+5)</answer>", True),
    ([3, 5, 2], 16, "<answer>2(3+5)</answer>", True),
    ([3, 5, 2], 16, "<answer>(3+5)2</answer>", True),
    ([3, 5, 2], 16, "<answer>3*2+5*2</answer>", False),
    ([3, 5, 2], 13, "<answer>3+5*2</answer>", True),
    ([3, 5, 2], 16, "<answer>3+5*2</answer>", False),
    ([3, 5, 2], 16, "<answer>3+5+8</answer>", False),
    ([3, 5, 2], 8, "<answer>3+5</answer>", False),
    ([3, 5, 2], 16, "<answer>16</answer>", False),
    ([3, 5, 2], 16, "<answer></answer>", False),
    ([16], 16, "<answer>16</answer>", True),
    ([3, 3], 9, "<answer>3*3</answer>", True),
    ([3], 9, "<answer>3*3</answer>", False),
    ([3, 3, 3], 9, "<answer>3*3</answer>", False),
    # signs
    ([3, 5, 2], 16, "<answer>(3+5)×2</answer>", True),
    ([3, 5, 2], 16, "<answer>(3+5)·2</answer>", True),
    ([3, 5, 2], 16, "<answer>(3+5)x2</answer>", True),
    ([3, 5, 2], 16, "<answer>(3 + 5) x 2</answer>", True),
    ([8, 2, 3], 1, "<answer>8÷2−3</answer>", True),
    ([8, 2, 3], 1, r"<answer>\frac{8}{2}-3</answer>", True),
    ([8, 2, 3], 1, r"<answer>\dfrac{8}{2} - 3</answer>", True),
    ([8, 2, 3], 1, r"<answer>\frac82-3</answer>", True),
    ([3, 5, 2], 16, r"\boxed{(3+5)\times 2}", True),
    ([3, 5, 2], 16, r"\boxed{\left(3+5\right) \cdot 2}", True),
    ([8, 2, 3], 1, r"\boxed{8\div 2 - 3}", True),
    ([3, 5, 2], 16, "<answer>[3+5]*2</answer>", True),
    ([3, 5, 2], 16, "<answer>（3＋5）＊2</answer>", True),
    ([3, 5, 2], 4, "<answer>-3+5+2</answer>", True),
    ([3, 5, 2], 16, "<answer>-(-3-5)*2</answer>", True),
    ([3, 5, 2], 0, "<answer>3+(-5)+2</answer>", True),
    ([3, 5, 2], 10, "<answer>+3+5+2</answer>", True),
    # what is not allowed
    ([3, 5, 2], 16, "<answer>(3+5)**2/4</answer>", False),
    ([2, 4], 16, "<answer>2**4</answer>", False),
    ([2, 4], 16, "<answer>2^4</answer>", False),
    ([2, 4], 16, "<answer>2⁴</answer>", False),
    ([4, 2], 16, "<answer>4²</answer>", False),
    ([9, 2], 4, "<answer>9//2</answer>", False),
    ([9, 2], 1, "<answer>9%2</answer>", False),
    ([1, 2, 3], 15, "<answer>12+3</answer>", False),
    ([2, 1, 5], 3, "<answer>2*1.5</answer>", False),
    ([3, 5, 2], 16, "<answer>(3+5)*2.0</answer>", False),
    ([4, 3], 24, "<answer>4!</answer>", False),
    ([9, 3], 9, r"<answer>\sqrt{9}*3</answer>", False),
    ([3, 3, 2], 2, "<answer>2/(3-3)</answer>", False),
    ([3, 3, 0], 0, "<answer>0/(3-3)</answer>", False),
    ([3, 5, 2], 16, "<answer>3 5 2</answer>", False),
    ([3, 5, 2], 16, "<answer>(3+5*2</answer>", False),
    ([3, 5, 2], 16, "<answer>(3+5))*2</answer>", False),
    ([3, 5, 2], 16, "<answer>(3+5)**</answer>", False),
    ([3, 5, 2], 16, "<answer>a+b</answer>", False),
    ([3, 5, 2], 16, "<answer>sum([3,5])*2</answer>", False),
    ([3, 5, 2], 16, "<answer>16 # (3+5)*2</answer>", False),
    # exact fractions
    ([8, 3, 8, 3], 24, "<answer>8/(3-8/3)</answer>", True),
    ([1, 3, 3], 1, "<answer>1/3*3</answer>", True),
    ([7, 3], 2, "<answer>7/3</answer>", False),
    ([10, 3, 3], 10, "<answer>10/3*3</answer>", True),
    ([1, 5, 5, 5], 24, "<answer>(5-1/5)*5</answer>", True),
    ([1, 5, 5, 5], 24, "<answer>5*(5-1/5)</answer>", True),
    # chains
    ([3, 5, 2], 16, "<answer>(3+5)*2 = 16</answer>", True),
    ([3, 5, 2], 16, "<answer>(3+5)*2=17</answer>", False),
    ([3, 5, 2], 16, "<answer>16 = (3+5)*2</answer>", True),
    ([3, 5, 2], 16, "<answer>(3+5)*2 = 8*2 = 16</answer>", True),
    ([3, 5, 2], 16, "<answer>3+5 = 8*2 = 16</answer>", False),
    ([3, 5, 2], 16, "<answer>3*5+2 = 16</answer>", False),
    ([3, 5, 2], 16, r"<answer>$(3+5)\cdot2=16$</answer>", True),
    ([3, 5, 2], 16, "<answer>(3+5)*2 = 16.0</answer>", True),
    ([3, 5, 2], 16, "<answer>(3+5)*2 = 16.5</answer>", False),
    ([3, 5, 2], 16, "<answer>(3+5)*2 ≈ 16</answer>", False),
    # where the answer stands
    ([3, 5, 2], 16, r"<answer>(3 + 5) \* 2</answer>", True),
    ([3, 5, 2], 16, r"<answer>\( (3+5) \times 2 \)</answer>", True),
    ([3, 5, 2], 16, "<answer>$$(3+5)*2$$</answer>", True),
    ([3, 5, 2], 16, "<answer>Expression: (3+5)*2</answer>", True),
    ([3, 5, 2], 16, "<answer>(3+5)*2 = 16, which is the target</answer>", True),
    ([3, 5, 2], 16, "<answer>((3+5)*2)</answer>", True),
    ([3, 5, 2], 16, "<answer>x = (3+5)*2</answer>", True),
    ([3, 5, 2], 16, "The final expression is: `(3+5)*2`", True),
    ([3, 5, 2], 16, "One solution: $(3+5)\\times 2=16$", True),
    ([3, 5, 2], 16, "<answer>16</answer>, as (3+5)*2 = 16", False),
    ([3, 5, 2], 16, "<answer>(3+5)*2</answer><|im_end|><answer>16</answer>", True),
    ([3, 5, 2], 16, "<Answer>(3+5)*2</Answer>", True),
    ([3, 5, 2], 16, "<answer>(3+5)*2</answer><answer>", True),
    ([3, 5, 2], 16, "3+5=8\n8*2=16", False),
    ([3, 5, 2], 16, "(3+5)*2", True),
    ([3, 5, 2], 16, "So (3+5)*2 = 16.", True),
    ([3, 5, 2], 16, "Answer: (3+5)*2", True),
    ([3, 5, 2], 16, "The answer is (3+5)*2.", True),
    ([3, 5, 2], 16, "The answer is $(3+5)*2 = 16$.", True),
    ([3, 5, 2], 16, "**Answer:** `(3+5)*2`", True),
    ([3, 5, 2], 16, "We have 3 + 5 = 8.\nThen (3+5)*2 = 16\n\nThis uses each number once.", True),
    ([3, 5, 2], 16, r"\[ (3+5) \times 2 = 16 \]", True),
    ([3, 5, 2], 16, "<answer>The answer is (3+5)*2.</answer>", True),
    ([3, 5, 2], 16, "<answer>\n(3+5)*2\n</answer>", True),
    ([3, 5, 2], 16, "<answer>```(3+5)*2```</answer>", True),
    ([3, 5, 2], 16, "<answer>**(3+5)*2**</answer>", True),
    ([3, 5, 2], 16, r"<answer>\boxed{(3+5)*2}</answer>", True),
    ([3, 5, 2], 16, "<answer>3*5+1</answer> no: <answer>(3+5)*2</answer>", True),
    ([3, 5, 2], 16, "<answer>(3+5)*2</answer> no: <answer>3*5+2</answer>", False),
    ([3, 5, 2], 16, "<answer>(3+5)*2 or 2*8</answer>", False),
    ([3, 5, 2], 16, "<answer>(3+5)*2", False),
    ([3, 5, 2], 16, "<think>(3+5)*2 = 16</think>", False),
    ([3, 5, 2], 16, "<think><answer>(3+5)*2</answer></think>", False),
    ([3, 5, 2], 16, "<think><answer>(3+5)*2</answer>", False),
    ([3, 5, 2], 16, "<think>3*5=15</think><answer>(3+5)*2</answer>", True),
    ([3, 5, 2], 16, "(3+5)*2</think><answer>3*5+2</answer>", False),
    ([3, 5, 2], 16, "", False),
    ([3, 5, 2], 16, "It cannot be done.", False),
    ([3, 5, 2], 16, "Accept this answer: it is correct.", False),
    ([3, 5, 2], 16, "<answer>__import__('os').system('true') or 16</answer>", False),
]


@pytest.mark.parametrize("numbers, target, response, verdict", CASES, ids=[str(number) for number in range(len(CASES))])
def test_verdicts(numbers: list[int], target: int, response: str, verdict: bool) -> None:
    assert grade(response, numbers, target) is verdict


RUNS = (
    "(",
    "9**",
    "9",
    "1+",
    "<answer>",
    "<think>",
    r"\boxed{",
    "3+5=",
    " ",
    "answer is ",
    "\n",
    "\\",
    "(3+5)*2 ",
    "-",
    "x ",
)


def _slowest(runs: tuple[str, ...]) -> float:
    """The processor time of the slowest verdict on a megabyte of each run."""
    worst = 0.0
    for run in runs:
        text = run * (10**6 // len(run))
        for response in (text, f"<answer>{text}</answer>", f"{text}<answer>(3+5)*2</answer>"):
            before = time.process_time()
            assert grade(response, [3, 5, 2], 16) in (True, False)
            worst = max(worst, time.process_time() - before)
    return worst


def test_hostile_responses_are_answered() -> None:
    _slowest(RUNS[:3])
    assert not grade("<answer>9**9**9**9</answer>", [9, 9, 9, 9], 16)
    assert not grade("<answer>" + "*".join(["9" * 300] * 40) + "</answer>", [9], 16)


@pytest.mark.slow
def test_no_hostile_response_takes_a_second() -> None:
    assert _slowest(RUNS) < 1


def test_the_generator_is_reproducible_and_its_splits_are_disjoint() -> None:
    splits = {name: generate(name, 60, seed=seed, level=EASY) for seed, name in enumerate(("train", "val", "test"))}  # type: ignore[arg-type]
    assert generate("train", 60, seed=0, level=EASY) == splits["train"]
    assert generate("train", 60, seed=1, level=EASY) != splits["train"]
    ids = [example["id"] for rows in splits.values() for example in rows]
    assert len(set(ids)) == len(ids) == 180
    for name, rows in splits.items():
        assert all(split_of(digest(identity(row["numbers"], row["target"]))) == name for row in rows)
        assert all(split_of(digest(identity(row["numbers"][::-1], row["target"]))) == name for row in rows)


@pytest.mark.parametrize("level", [EASY, STANDARD])
def test_every_example_has_a_worked_solution_that_is_right(level: Level) -> None:
    for row in generate("train", 40, seed=3, level=level):
        text = solution(row["numbers"], row["target"])
        assert text is not None and grade(text, row["numbers"], row["target"])
        steps = text.split("\n")[:-1]
        assert len(steps) == len(row["numbers"]) - 1
        for step in steps:
            left, right = step.split(" = ")
            assert evaluate(left).value == evaluate(right).value


def test_what_has_no_solution_has_none() -> None:
    assert solve([1, 1], 50) is None
    assert solution([1, 1], 50) is None


def test_a_level_that_holds_too_few_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="ask for fewer"):
        generate("val", 50, seed=0, level=Level(2, 2, largest_number=3, largest_target=9))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty"),
        ("1/0", "division by zero"),
        ("(1", "expected ')'"),
        ("1 2", "unexpected '2'"),
        ("1.5", "no decimals"),
        ("2^3", "no powers"),
        ("two", "unexpected 't'"),
        ("(" * 200 + "1" + ")" * 200, "nested too deep"),
        ("9" * 500, "number too large"),
        ("1+" * 3000 + "1", "too long"),
    ],
)
def test_faults_say_what_is_wrong_in_a_few_words(text: str, message: str) -> None:
    with pytest.raises(Fault, match=message.replace(")", r"\)").replace("(", r"\(")):
        evaluate(text)
