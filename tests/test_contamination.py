"""Test problems in training files: found whatever the form of the row, and nothing where there is nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_gsm8k.tasks import load_task
from grpo_gsm8k.tasks.contamination import Index, check, scan, texts_of, warn, words
from tests.toys import load_problems, make_data, word_problem

QUESTION = "Ann buys 12 red apples, eats 3 of them, and gives half of what is left to her old friend Ben. How many?"
ANSWER = "After eating, there are 12-3=<<12-3=9>>9 apples left in the basket on the table by the window.\n#### 4.5"

GSM8K = load_task("gsm8k")


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def held_out(tmp_path):
    return write(tmp_path / "test.jsonl", {"id": "t1", "question": QUESTION, "answer": ANSWER})


def counts(path, test, n=13):
    found = check([path], test, GSM8K, n)["files"][0]
    kinds = ("questions_whole", "questions_overlapping", "solutions_whole", "solutions_overlapping")
    return tuple(found[kind] for kind in kinds)


@pytest.mark.parametrize(
    "row",
    [
        {"question": QUESTION.upper(), "answer": "#### 1"},
        {"prompt": "Solve: " + QUESTION.replace(",", " ,"), "response": "4.5"},
        {"messages": [{"role": "user", "content": f"Q: {QUESTION}\n"}, {"role": "assistant", "content": "4.5"}]},
        {"meta": {"trace": ["no", "thinking about: " + QUESTION]}},
    ],
)
def test_a_whole_question_is_found_in_any_form(row, tmp_path, held_out):
    other = {
        "question": "Something else entirely, of which there are many words and none in common.",
        "answer": "#### 2",
    }
    path = write(tmp_path / "train.jsonl", other, row)
    assert counts(path, held_out) == (1, 1, 0, 0)
    report = check([path], held_out, GSM8K)
    assert not report["clean"] and report["files"][0]["examples"][0]["line"] == 2


def test_thirteen_words_in_common_are_an_overlap_and_twelve_are_not(tmp_path, held_out):
    asked = words(QUESTION)
    for size, expected in ((13, (0, 1, 0, 0)), (12, (0, 0, 0, 0))):
        text = "x y " + " ".join(asked[2 : 2 + size]) + " z"
        path = write(tmp_path / f"{size}.jsonl", {"question": text, "answer": "#### 1"})
        assert counts(path, held_out) == expected
        assert check([path], held_out, GSM8K)["clean"]
    assert counts(path, held_out, 12) == (0, 1, 0, 0)
    path = write(tmp_path / "5.jsonl", {"question": "x " + " ".join(asked[2:7]), "answer": "#### 1"})
    assert counts(path, held_out, 5) == (0, 1, 0, 0) and counts(path, held_out, 6) == (0, 0, 0, 0)


def test_a_solution_is_found_without_its_annotations(tmp_path, held_out):
    plain = ANSWER.replace("<<12-3=9>>", "").replace("\n#### 4.5", "")
    assert counts(write(tmp_path / "a.jsonl", {"response": plain}), held_out) == (0, 0, 1, 1)
    assert counts(write(tmp_path / "b.jsonl", {"response": ANSWER}), held_out) == (0, 0, 1, 1)


def test_short_texts_are_looked_for_as_a_whole_or_not_at_all(tmp_path):
    nine, seven = "Tom is 3 and Ben is 4 years older", "Tom is 3, how old in May?"
    index = Index([word_problem("a", nine, "#### 1", "1"), word_problem("b", seven, "#### 1", "1")])
    path = write(tmp_path / "t.jsonl", {"x": nine + " than him"}, {"x": seven}, {"x": nine[:-6]})
    rows, found = scan(path, index)
    assert rows == 3 and [(o.example.id, o.whole, o.line) for o in found] == [("a", True, 1)]


def test_texts_are_values_not_keys():
    assert list(texts_of({"a": ["b", {"c": "d"}, 1, None], "e": "f"})) == ["b", "d", "f"]


def test_training_warns_of_test_questions_and_of_nothing_else(tmp_path, capsys):
    data = make_data(tmp_path / "data")
    test = data / "test.jsonl"
    warn([data / "train.jsonl", tmp_path / "shards"], test, GSM8K)
    warn([data / "train.jsonl"], tmp_path / "absent.jsonl", GSM8K)
    assert capsys.readouterr().err == ""
    long = next(p for p in load_problems(test) if len(words(p.text)) > 12)
    leaked = write(tmp_path / "leaked.jsonl", {"prompt": "hello"}, {"prompt": f"Please: {long.text}"})
    warn([leaked], test, GSM8K)
    said = capsys.readouterr().err
    assert f"{leaked} holds 1 of the 16 test problems ({long.id} in line 2)" in said and said.count("\n") == 1


def test_the_warning_stands_at_the_start_of_training(tiny, tmp_path, capsys):
    from grpo_gsm8k.workbench import open_workbench
    from tests.toys import stage_config

    cfg = stage_config("sft", model_id=str(tiny.model), data=str(tiny.data), out_dir=str(tmp_path / "run"))
    with open_workbench(cfg, "sft", {"train": tiny.data / "test.jsonl"}):
        assert "test problems" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_splits_share_no_question(gsm8k_dir):
    found = check([gsm8k_dir / "train.jsonl"], gsm8k_dir / "test.jsonl", GSM8K)
    assert found["clean"] and found["test_problems"] == 1319 and found["files"][0]["questions_overlapping"] < 10


def test_the_command_prints_a_table_or_one_object(tmp_path, held_out, capsys):
    from grpo_gsm8k.cli import main

    path = write(tmp_path / "train.jsonl", {"prompt": QUESTION})
    for argv in (["--json"], []):
        main(["contamination", str(path), "--test", str(held_out), *argv])
        out = capsys.readouterr().out
        assert json.loads(out)["files"][0]["questions_whole"] == 1 if argv else "t1 (question): ann buys 12" in out
