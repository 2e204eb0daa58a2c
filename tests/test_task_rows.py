"""The tasks beside gsm8k: how rows are read, asked, answered and graded, and the data that a task makes by seed."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from grpo_gsm8k.errors import ConfigError, DataError
from grpo_gsm8k.tasks import countdown, load_task, sort_words
from grpo_gsm8k.tasks.base import SPLITS, Task, TaskOptions, load_examples
from grpo_gsm8k.tasks.dataset import verify

NAMES = ("math", "countdown", "sort_words", "gsm8k_calculator")


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(task: Task, folder: Path, row: dict[str, Any]) -> Any:
    (example,) = load_examples(task, written(folder, row))
    return example


ROWS: dict[str, dict[str, Any]] = {
    "math": {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "level": "Level 1"},
    "countdown": {"numbers": [3, 5, 8], "target": 16},
    "sort_words": {"words": ["tun", "bel", "dra"]},
    "gsm8k_calculator": {"question": "Half of 48?", "answer": "It is 48/2 = <<48/2=24>>24.\n#### 24"},
}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_teacher_answers_is_right_and_rows_are_read_back(name: str, tmp_path: Path) -> None:
    task = load_task(name)
    example = only(task, tmp_path, ROWS[name])
    assert task.grade(example, task.target(example)) == task.grade(example, task.target(example))
    verdict = task.grade(example, task.target(example))
    assert (verdict.correct, verdict.format_ok, verdict.reward) == (True, True, pytest.approx(1.0))
    assert sum(verdict.components.values()) == pytest.approx(verdict.reward)
    assert only(task, tmp_path, task.row(example)) == example
    asked = task.prompt(example)
    assert not isinstance(asked, str) and asked[-1][0] == "user" and example.messages in asked[-1][1]
    nothing = task.grade(example, "")
    assert (nothing.correct, nothing.reward, nothing.answer) == (False, 0.0, None)


BROKEN = [
    ("math", {"problem": "x?"}, "no answer and no solution"),
    ("math", {"problem": "x?", "answer": ""}, "'answer' holds no answer"),
    ("math", {"problem": "x?", "answer": "\\boxed{}"}, "'answer' holds no answer"),
    ("math", {"problem": "x?", "answer": True}, "'answer' must be text or a number, not"),
    ("math", {"problem": "x?", "answer": ["2"]}, "'answer' must be text or a number, not an array"),
    ("math", {"problem": "x?", "solution": "It is 2."}, r"no \\boxed"),
    ("math", {"problem": "x?", "solution": 2}, "'solution' must be text"),
    ("math", {"problem": " ", "answer": "2"}, "'problem' is empty"),
    ("math", {"answer": "2"}, "no problem, question or prompt"),
    ("countdown", {"numbers": [3, 5]}, "'target' must be a whole number"),
    ("countdown", {"numbers": [3, True], "target": 8}, "'numbers' must be an array of whole numbers"),
    ("countdown", {"numbers": [3, "5"], "target": 8}, "'numbers' must be an array of whole numbers"),
    ("countdown", {"numbers": [], "target": 8}, "'numbers' must be an array of whole numbers"),
    ("countdown", {"target": 8}, "'numbers' must be an array of whole numbers"),
    ("countdown", {"numbers": [3, 5], "target": 8.0}, "'target' must be a whole number"),
    ("countdown", {"numbers": [3, 5], "target": 8, "solution": ""}, "'solution' is empty"),
    ("sort_words", {"words": "tun bel"}, "'words' must be an array of words"),
    ("sort_words", {"words": []}, "'words' must be an array of words"),
    ("sort_words", {"words": ["two words"]}, "which is not a word"),
    ("sort_words", {"words": ["a", 1]}, "which is not a word"),
    ("sort_words", {"words": ["a", ""]}, "which is not a word"),
    ("sort_words", {"words": ["b2"]}, "which is not a word"),
]


@pytest.mark.parametrize("name, row, what", BROKEN)
def test_a_broken_row_is_named_with_its_file_and_line(
    name: str, row: dict[str, Any], what: str, tmp_path: Path
) -> None:
    path = written(tmp_path, ROWS[name], row)
    with pytest.raises(DataError, match=what) as fault:
        load_examples(load_task(name), path)
    assert str(fault.value).startswith(f"{path}:2: ") or f"{path}, line 2" in str(fault.value)


def test_two_rows_of_the_same_id_are_refused(tmp_path: Path) -> None:
    for name in ("countdown", "sort_words"):
        with pytest.raises(DataError, match="duplicate id"):
            load_examples(load_task(name), written(tmp_path, ROWS[name], ROWS[name]))


# ------------------------------------------------------------------------------------------------------ math


@pytest.mark.parametrize(
    "row, id_, answer",
    [
        ({"problem": "p", "solution": "$\\boxed{\\frac12}$", "type": "Algebra"}, None, "\\frac12"),
        ({"problem": "p", "solution": "s", "answer": "$\\pi$", "unique_id": "a/1.json"}, "a/1.json", "$\\pi$"),
        ({"id": 60, "problem": "p", "solution": "s", "answer": "204", "url": "u", "year": "2024"}, "60", "204"),
        ({"ID": "2024-I-1", "Problem": "p", "Solution": "s", "Answer": 33}, "2024-I-1", "33"),
        ({"id": "train-1", "ID": 1, "unique_id": "1", "problem": "p", "answer": 33}, "train-1", "33"),
        ({"question": "p", "answer": 70.0}, None, "70"),
        ({"prompt": "p", "answer": -1.5}, None, "-1.5"),
        ({"problem": "p", "answer": None, "solution": "$\\boxed{7}$"}, None, "7"),
        ({"problem": "p", "answer": "so $\\boxed{7}$", "solution": ""}, None, "7"),
    ],
)  # fmt: skip
def test_math_sets_are_read_as_they_are(row: dict[str, Any], id_: str | None, answer: str, tmp_path: Path) -> None:
    task = load_task("math")
    example = only(task, tmp_path, row)
    assert (example.messages, example.answer) == ("p", answer)
    assert id_ is None or example.id == id_
    assert task.grade(example, f"So it is \\boxed{{{answer}}}.").correct
    assert task.grade(example, task.target(example)).correct


def test_math_reads_the_folders_of_math_and_arrays(tmp_path: Path) -> None:
    for topic, k in (("algebra", 1), ("geometry", 1), ("geometry", 2)):
        (tmp_path / topic).mkdir(exist_ok=True)
        (tmp_path / topic / f"{k}.json").write_text(json.dumps({"problem": "p", "solution": f"$\\boxed{{{k}}}$"}))
    found = load_task("math").examples(tmp_path)
    assert [example.answer for example in found] == ["1", "1", "2"]
    assert len({example.id for example in found}) == 3  # the same problem thrice, and no ids
    array = tmp_path / "rows.json"
    array.write_text(json.dumps([{"problem": "a", "answer": 1}, {"problem": "b", "answer": ""}]))
    with pytest.raises(DataError, match=r"rows\.json.*holds no answer"):
        load_task("math").examples(array)
    array.write_text("{")
    with pytest.raises(DataError, match="is no JSON"):
        load_task("math").examples(array)
    array.write_text("[3]")
    with pytest.raises(DataError, match="item 1 must be an object"):
        load_task("math").examples(array)


def test_a_problem_that_math_holds_twice_is_kept_twice(tmp_path: Path) -> None:
    row = {"problem": "p", "solution": "$\\boxed{1}$"}
    first, second = load_examples(load_task("math"), written(tmp_path, row, row))
    assert second.id == f"{first.id}-2"
    with pytest.raises(DataError, match="duplicate id"):
        load_examples(load_task("math"), written(tmp_path, {**row, "id": 1}, {**row, "id": 1}))


def test_math_is_asked_and_answered_in_every_style(tmp_path: Path) -> None:
    row = {"problem": "What is half?", "solution": "Half is 1/2.", "answer": "\\frac{1}{2}"}
    for style in ("auto", "qwen_boxed", "gsm8k", "r1_zero"):
        task = load_task("math", TaskOptions(prompt_style=style))
        example = only(task, tmp_path, row)
        verdict = task.grade(example, task.target(example))
        assert verdict.correct and verdict.format_ok and verdict.reward == pytest.approx(1.0), style
        assert task.grade(example, task.target(example).replace("1", "3")).correct is False
    assert task.prompt(example).endswith("<think>")  # type: ignore[union-attr]
    assert task.grade(example, "It is <answer>1/2</answer>").correct is False  # the thought was never closed
    with pytest.raises(ConfigError, match="prompt_style"):
        load_task("math", TaskOptions(prompt_style="haiku"))


def test_math_grades_strictly_on_demand_and_says_both(tmp_path: Path) -> None:
    for grading in ("strict", "flexible"):
        task = load_task("math", TaskOptions(grading=grading))  # type: ignore[arg-type]
        found = task.grade(only(task, tmp_path, ROWS["math"]), "The answer is $2$.")
        assert found.correct is (grading == "flexible") and found.format_ok is False
        assert found.details == {"correct_flexible": True, "correct_strict": False}


@pytest.mark.parametrize(
    "same",
    [("0.5", "\\frac12", "1/2", "$\\frac{1}{2}$"), ("x+1", "1+x"), ("(1,2)", "(1, 2)"), ("2", "2.0", "\\boxed{2}")],
)
def test_math_votes_are_counted_by_what_they_say(same: tuple[str, ...]) -> None:
    vote = load_task("math").vote
    assert len({vote(answer) for answer in same}) == 1
    assert vote("3/7") != vote(same[0]) and vote(None) is None
    assert vote("9" * 10**6) and vote("^" * 10**5)


# ------------------------------------------------------------------------------------------------- countdown


def test_a_countdown_without_a_solution_is_refused_as_a_target(tmp_path: Path) -> None:
    task = load_task("countdown")
    with pytest.raises(DataError, match=r"rows\.jsonl.*no expression with"):
        task.target(only(task, tmp_path, {"numbers": [1, 1], "target": 50}))
    with pytest.raises(DataError, match="6 at most"):
        task.target(only(task, tmp_path, {"numbers": [1] * 9, "target": 50}))
    own = only(task, tmp_path, {"numbers": [1, 1], "target": 50, "solution": "I give up."})
    assert task.target(own) == "I give up."


@pytest.mark.parametrize(
    "response, correct, format_ok",
    [
        ("<answer>3+5+8</answer>", True, True),
        ("3+5=8\n<answer> (3 + 5) + 8 </answer>\n", True, True),
        ("<answer>3+5+8</answer> is right", True, False),
        ("The answer is 3+5+8.", True, False),
        ("<answer>3+8</answer>", False, True),
        ("<answer>three</answer>", False, False),
    ],
)
def test_a_countdown_earns_for_form_and_answer(response: str, correct: bool, format_ok: bool, tmp_path: Path) -> None:
    task = load_task("countdown")
    verdict = task.grade(only(task, tmp_path, ROWS["countdown"]), response)
    assert (verdict.correct, verdict.format_ok) == (correct, format_ok)
    assert verdict.reward == pytest.approx(0.2 * format_ok + 0.8 * correct)


def test_the_search_finds_what_sums_and_differences_reach() -> None:
    for row in countdown.generate("train", 100, 3, countdown.TINY):
        text = countdown.search(row["numbers"], row["target"])
        assert text is not None and countdown.grade(text, row["numbers"], row["target"]), row
        for step in text.splitlines()[:-1]:
            left, sign, right, result = re.fullmatch(r"(\d+)([-+])(\d+)=(\d+)", step).groups()  # type: ignore[union-attr]
            assert int(left) + int(sign + right) == int(result)
    assert countdown.search([1, 2, 3], 50) is None


# ------------------------------------------------------------------------------------------- data made by seed


@pytest.mark.parametrize("name", ["countdown", "sort_words"])
def test_generated_data_are_disjoint_by_seed_and_of_mixed_quality(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, sizes = load_task(name), {"train": 300, "val": 20, "test": 30, "tiny": True}
    folder = task.generate(tmp_path / "a", 1, sizes)
    assert folder == tmp_path / "a"
    found = {split: load_examples(task, tmp_path / "a" / f"{split}.jsonl") for split in SPLITS}
    assert {split: len(examples) for split, examples in found.items()} | {"tiny": True} == sizes
    asked = {split: {example.id for example in examples} for split, examples in found.items()}
    assert not (asked["train"] & asked["test"] or asked["train"] & asked["val"] or asked["val"] & asked["test"])
    right = [task.grade(example, task.target(example)).correct for example in found["train"]]
    assert 0.35 < sum(right) / len(right) < 0.75  # a teacher of mixed quality
    assert all(
        task.grade(example, task.target(example)).correct for split in ("val", "test") for example in found[split]
    )
    task.generate(tmp_path / "b", 1, sizes), task.generate(tmp_path / "c", 2, sizes)
    texts = {run: (tmp_path / run / "train.jsonl").read_text() for run in "abc"}
    assert texts["a"] == texts["b"] != texts["c"]
    monkeypatch.setattr("grpo_gsm8k.tasks.splits.PATIENCE", 20)
    with pytest.raises(ConfigError, match="ask for fewer"):
        task.generate(tmp_path / "d", 1, {"train": 1, "val": 10**5, "test": 1, "tiny": True})


@pytest.mark.parametrize("name", ["countdown", "sort_words"])
def test_data_for_language_models_are_harder_and_bring_no_solutions(name: str, tmp_path: Path) -> None:
    task = load_task(name)
    task.generate(tmp_path, 1, {"train": 50, "val": 5, "test": 5})
    examples = load_examples(task, tmp_path / "train.jsonl")
    assert not any("solution" in example.meta for example in examples)
    assert all(task.grade(example, task.target(example)).correct for example in examples)
    assert verify(tmp_path, task).counts == {"train": 50, "val": 5, "test": 5}


def test_longer_lists_are_copied_more_often() -> None:
    rows = [sort_words.careless(row, 0) for row in sort_words.generate("train", 1000, 0, sort_words.TINY)]
    share = {
        n: sum(row["solution"] == " ".join(row["words"]) for row in own) / len(own)
        for n in (3, 4, 5)
        if (own := [row for row in rows if len(row["words"]) == n])
    }
    assert share[3] < share[4] < share[5]


# ------------------------------------------------------------------------------------------------ calculator


def calculator_example(folder: Path, answer: str) -> Any:
    return only(load_task("gsm8k_calculator"), folder, {"question": "How many?", "answer": answer})


def test_a_reference_solution_becomes_turns(tmp_path: Path) -> None:
    task = load_task("gsm8k_calculator", TaskOptions(prompt_style="gsm8k"))
    text = "Tom sold 48/2 = $<<48/2=24>>24.\nA third is 24/9 = <<24/9=2.67>>2.67, and <<2*600=1200>>1,200.\n#### 24"
    assert task.target_turns(calculator_example(tmp_path, text)) == [  # type: ignore[attr-defined]
        ("model", "Tom sold $<<48/2>>"),
        ("env", "24"),
        ("model", ".\nA third is 24/9 = 2.67, and <<2*600>>"),
        ("env", "1200"),
        ("model", ".\n#### 24"),
    ]


@pytest.mark.parametrize("style", ["gsm8k", "qwen_boxed", "r1_zero"])
def test_what_the_teacher_calls_the_calculator_answers(style: str, tmp_path: Path) -> None:
    task = load_task("gsm8k_calculator", TaskOptions(prompt_style=style))
    example = calculator_example(
        tmp_path, "He has 5+3=<<5+3=8>>8 and -2*4=<<-2*4=-8>>-8.\nThen 8*.5=<<8*.5=4>>4.\n#### 4"
    )
    turns = task.target_turns(example)  # type: ignore[attr-defined]
    env = task.env(example)
    assert env is not None and [author for author, _ in turns] == ["model", "env"] * 3 + ["model"]
    for k in range(0, 6, 2):
        assert env.reply(turns[k][1]) == turns[k + 1][1]
        assert turns[k][1].endswith(">>") and turns[k][1].count(">>") == 1
    assert env.reply(turns[-1][1]) is None
    assert task.grade(example, task.target(example)).correct
    assert ">>" in task.stop and "<<48/2>>" in str(task.prompt(example))


@pytest.mark.parametrize(
    "turn, reply",
    [
        ("Tom has <<48/2>>", "24"),
        ("Tom has <<48/2>>.", "24"),  # a token ran on
        ("<<1/3>>", "1/3"),
        ("<<48/2=25>>", "24"),
        ("<<$1,000*2>>", "2000"),
        ("<<48//2>>", "[error: unexpected '//']"),
        ("<<48/0>>", "[error: division by zero]"),
        ("<<>>", "[error: empty]"),
        ("<<apples>>", "[error: unexpected 'a']"),
        ("<<9^9^9^9>>", "[error: number too large]"),
        ("<<" + "(" * 10**5 + ">>", "[error: too long]"),
        ("5 >>", "[error: write a call as <<48/2>>]"),
        ("<<5\n+3>>", "[error: write a call as <<48/2>>]"),
        ("#### 24", None),
        ("<<48/2>>24 is the answer", None),
        ("", None),
        ("<<48/2", None),
    ],
)
def test_the_calculator_answers_calls(turn: str, reply: str | None, tmp_path: Path) -> None:
    env = load_task("gsm8k_calculator").env(calculator_example(tmp_path, "#### 24"))
    assert env is not None and env.reply(turn) == reply


def test_every_calculation_of_a_solution_becomes_a_call_or_stays_text(tmp_path: Path) -> None:
    shared = Path(__file__).resolve().parents[2] / "shared" / "gsm8k" / "test.jsonl"
    if not shared.is_file():
        pytest.skip("the real GSM8K is not at hand")
    task = load_task("gsm8k_calculator", TaskOptions(prompt_style="gsm8k"))
    calls = annotations = 0
    for example in load_examples(task, shared):
        turns = task.target_turns(example)  # type: ignore[attr-defined]
        env = task.env(example)
        assert env is not None
        assert all(env.reply(turns[k][1]) == turns[k + 1][1] for k in range(0, len(turns) - 1, 2))
        assert env.reply(turns[-1][1]) is None and task.grade(example, task.target(example)).correct
        assert len(turns) // 2 < task.max_turns
        calls += len(turns) // 2
        annotations += example.meta["solution"].count("<<")
    assert Fraction(calls, annotations) > Fraction(99, 100)
