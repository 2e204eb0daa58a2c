"""Problems and chats from JSONL: good files, and every fault with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_gsm8k.datatypes import Example, Rendered
from grpo_gsm8k.errors import DataError
from grpo_gsm8k.tasks.conversations import Conversation, check_chat, load_pairs
from grpo_gsm8k.tasks.gsm8k.problems import gold_number
from tests.toys import load_problems, load_split, word_problem

GOOD = {"id": "a", "question": "How many?", "answer": "2 + 3 = 5\n#### 5"}
PREPARED = {"id": "b", "question": "Q?", "answer": "#### 5", "gold": "5", "gold_num": 5, "prompt": "<Q?>"}
PREPARED |= {"prompt_token_ids": [7, 8], "rendered": {"prompt_style": "gsm8k", "answer_open": None}}


def write(path: Path, *rows: Any) -> Path:
    """Rows as JSON lines; bytes as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


# --- problems -----------------------------------------------------------------------------------------------


def test_gsm8k_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path / "f.jsonl",
        {**GOOD, "gold": "5.0", "source": "ignored"},
        {"question": "What is the sum?", "answer": "#### 1,234"},
    )
    first, second = load_problems(path)
    kept = {"solution": "2 + 3 = 5\n#### 5", "source": "ignored"}
    assert first == Example("a", "How many?", "5", kept)
    # printf 'What is the sum?' | sha256sum | head -c 12
    assert second.id == "71d5e27655fc"
    assert second.answer in ("1234", "1,234")


def test_evaluation_rows(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "How many?", "gold": "5", "gold_num": 5},
        {"id": "b", "prompt": "How much?", "gold": "0.1", "gold_num": 0.1},
        {"id": "c", "prompt": "And now?", "gold": "1 + 1 = 2\n#### 2", "gold_num": "2"},
        {"id": "d", "prompt": "Without a number?", "gold": "-7", "gold_num": None},
    ]
    assert load_problems(write(tmp_path / "f.jsonl", *rows)) == [
        word_problem("a", "How many?", "#### 5", "5"),
        word_problem("b", "How much?", "#### 0.1", "0.1"),
        word_problem("c", "And now?", "1 + 1 = 2\n#### 2", "2"),
        word_problem("d", "Without a number?", "#### -7", "-7"),
    ]


def test_prepared_rows_keep_their_prompt_apart(tmp_path: Path) -> None:
    row = {**PREPARED, "answer": "1/3 of it\n#### 1/3", "gold": "1/3", "gold_num": 0.3333333333333333}
    (problem,) = load_problems(write(tmp_path / "f.jsonl", row))
    assert problem == word_problem("b", "Q?", "1/3 of it\n#### 1/3", "1/3") and problem.source is not None
    assert (problem.source.path, problem.source.line) == (str(tmp_path / "f.jsonl"), 1)
    assert problem.source.rendered == Rendered("<Q?>", (7, 8), {"prompt_style": "gsm8k", "answer_open": None})


def test_gold_numbers() -> None:
    assert [gold_number(gold) for gold in ("72", "1,234", "-3.5", "0.1", "1/4")] == [72, 1234, -3.5, 0.1, 0.25]
    assert gold_number("12345678901234567890") == 12345678901234567890  # exact, where a float is not


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ({"question": "Q?"}, "'answer' is missing; the row has 'question'"),
        ({"answer": "#### 1"}, "'question' is missing"),
        ({}, "no keys"),
        ({"question": 7, "answer": "#### 1"}, "'question' must be text, not a number"),
        ({"question": "Q?", "answer": None}, "'answer' must be text, not null"),
        ({"question": " \n", "answer": "#### 1"}, "'question' is empty"),
        ({"question": "Q?", "answer": ""}, "'answer' is empty"),
        ({"question": "Q?", "answer": "five"}, "f.jsonl:2: "),
        ({"question": "Q?", "answer": "#### a few"}, "f.jsonl:2: .*a few"),
        ({"question": "Q?", "answer": "#### 5", "gold": "6"}, "gold is '6', but the answer ends in #### 5"),
        ({"question": "Q?", "answer": "#### 5", "gold": 5}, "'gold' must be text"),
        ({"question": "Q?", "answer": "#### 5", "gold": "many"}, "'many' is not a number"),
        ({"id": 3, "question": "Q?", "answer": "#### 5"}, "'id' must be text"),
        ({**GOOD, "question": "Another?"}, "duplicate id 'a': line 1"),
        ({"prompt": "Q?"}, "'gold' is missing"),
        ({"prompt": "Q?", "gold": "many"}, "'many' is not a number"),
        ({"prompt": "Q?", "gold": "5", "gold_num": 6}, "gold is '5', but gold_num is 6"),
        ({"prompt": "Q?", "gold": "5", "gold_num": True}, "gold_num must be a number, not true or false"),
        ({"prompt": "Q?", "gold": "5", "gold_num": [5]}, "gold_num must be a number, not an array"),
        ({"prompt": "Q?", "gold": "5", "gold_num": "6"}, "gold is '5', but gold_num is '6'"),
        ({"prompt": "Q?", "gold": "5", "gold_num": "many"}, "'many' is not a number"),
        ({"prompt": "Q?", "gold": "1" + "0" * 330 + ".5"}, "beyond the range"),
        ({"question": "Q?", "answer": "#### 5", "gold_num": 6}, "gold is '5', but gold_num is 6"),
        ({"question": "Q?", "answer": "#### 0.5", "gold_num": 0.25}, "gold is '0.5', but gold_num is 0.25"),
        ({"question": "Q?", "answer": "#### 5", "gold_num": True}, "gold_num must be a number, not true or false"),
        ({"question": "Q?", "answer": "#### 5", "prompt": "<Q?>"}, "no 'prompt_token_ids'.*prep-eval"),
        ({"question": "Q?", "gold": "5", "prompt": "<Q?>"}, "no 'prompt_token_ids'.*prep-eval"),
        ({**PREPARED, "gold_num": 6}, "gold is '5', but gold_num is 6"),
        ({**PREPARED, "gold": "6"}, "gold is '6', but the answer ends in #### 5"),
        ({k: v for k, v in PREPARED.items() if k != "question"}, "'question' is missing"),
        ({k: v for k, v in PREPARED.items() if k != "answer"}, "'answer' is missing"),
        ({k: v for k, v in PREPARED.items() if k != "prompt"}, "'prompt' is missing"),
        ({k: v for k, v in PREPARED.items() if k != "prompt_token_ids"}, "'prompt_token_ids' must be"),
        ({k: v for k, v in PREPARED.items() if k != "rendered"}, "'rendered' must say"),
        ({**PREPARED, "prompt_token_ids": []}, "'prompt_token_ids' must be"),
        ({**PREPARED, "prompt_token_ids": [1, True]}, "'prompt_token_ids' must be"),
        ({**PREPARED, "prompt_token_ids": [1, -1]}, "'prompt_token_ids' must be"),
        ({**PREPARED, "prompt_token_ids": "12"}, "'prompt_token_ids' must be"),
        ({**PREPARED, "rendered": {"prompt_style": 7}}, "'rendered' must say"),
        ({**PREPARED, "prompt": ""}, "'prompt' is empty"),
        (b"{", "broken JSON"),
        (b"7", "object is needed"),
    ],
)
def test_every_fault_names_file_and_line(tmp_path: Path, bad: Any, what: str) -> None:
    path = write(tmp_path / "f.jsonl", GOOD, bad, {**GOOD, "id": "z"})
    with pytest.raises(DataError, match=what) as caught:
        load_problems(path)
    assert (caught.value.path, caught.value.line) == (path, 2)


def test_the_same_question_twice_without_ids(tmp_path: Path) -> None:
    row = {"question": "Q?", "answer": "#### 5"}
    with pytest.raises(DataError, match="line 1 has the question") as caught:
        load_problems(write(tmp_path / "f.jsonl", row, {**GOOD, "id": "b"}, row))
    assert caught.value.line == 3


def test_load_split(tmp_path: Path) -> None:
    write(tmp_path / "val.jsonl", GOOD)
    assert [problem.id for problem in load_split(tmp_path, "val")] == ["a"]
    with pytest.raises(DataError, match=r"test\.jsonl: does not exist; make it with `grpo-gsm8k data --out_dir"):
        load_split(tmp_path, "test")
    with pytest.raises(DataError, match=r"nowhere: does not exist; make it with .* --out_dir .*nowhere`"):
        load_split(tmp_path / "nowhere", "test")


# --- chats --------------------------------------------------------------------------------------------------


def chat(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


U, A, S = ("user", "hello"), ("assistant", "hi"), ("system", "be kind")


def test_a_good_chat_file(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", chat(U, A, note="kept apart"), chat(S, U, A, U, A))
    report = check_chat(path)
    assert (report.ok, report.rows, report.errors) == (True, 2, [])
    # 5 + 2 characters; 7 + 5 + 2 + 5 + 2
    assert report.stats == {
        "rows": 2,
        "turns": {"min": 2, "mean": 3.5, "max": 5},
        "characters": {"min": 7, "mean": 14.0, "max": 21},
        "roles": {"system": 1, "user": 3, "assistant": 3},
    }
    assert load_pairs(path)[0] == Conversation((("user", "hello"), ("assistant", "hi")))


FAULTS: list[tuple[Any, list[str]]] = [
    (b"{oops", ["broken JSON"]),
    (b"[]", ["object is needed, not an array"]),
    (b'{"messages": "\xfe"}', ["invalid UTF-8"]),
    (b"", ["blank line"]),
    ({"text": "x"}, ["messages is missing; the row has 'text'"]),
    ({"messages": "hello"}, ["messages must be an array, not text"]),
    ({"messages": []}, ["messages is empty"]),
    ({"messages": [7]}, ["messages[0] must be an object, not a number"]),
    (chat(("human", "hello"), A), ["messages[0].role is 'human'"]),
    (chat((["user"], "hello"), A), ["messages[0].role is ['user']"]),  # type: ignore[arg-type]
    ({"messages": [{"content": "x"}, {"role": "user"}]}, ["[0].role is missing", "[1].content is missing"]),
    (chat(("user", 5), ("assistant", None)), ["[0].content must be text, not a number", "not null"]),
    (chat(("user", " "), A), ["messages[0].content is empty"]),
    (chat(U, S, A), ["messages[1].role is system, which may only be the first"]),
    (chat(S, S, U, A), ["messages[1].role is system"]),
    (chat(U, U, A), ["messages[1].role is user, which follows another user"]),
    (chat(U, A, A), ["messages[2].role is assistant, which follows another assistant"]),
    (chat(A), ["messages[0].role is assistant, which comes before any user"]),
    (chat(S, A), ["messages[1].role is assistant, which comes before any user"]),
    (chat(U), ["no assistant message"]),
    (chat(S), ["no assistant message"]),
    (chat(U, A, U), ["messages ends with user"]),
    (chat(U, U), ["messages[1].role is user", "no assistant message"]),
]


def test_every_fault_in_one_pass(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", chat(U, A), *(row for row, _ in FAULTS))
    report = check_chat(path)
    assert not report.ok
    assert report.rows == 1 + len(FAULTS) - 1  # the blank line is no row
    assert report.stats["rows"] == 1
    expected = [(line, what) for line, (_, whats) in enumerate(FAULTS, 2) for what in whats]
    assert [error["line"] for error in report.errors] == [line for line, _ in expected]
    for error, (_, what) in zip(report.errors, expected, strict=True):
        assert what in error["what"]
    assert json.loads(json.dumps(report.errors)) == report.errors


@pytest.mark.parametrize(("row", "whats"), FAULTS)
def test_load_pairs_stops_at_the_first_fault(tmp_path: Path, row: Any, whats: list[str]) -> None:
    path = write(tmp_path / "f.jsonl", chat(U, A), row)
    with pytest.raises(DataError) as caught:
        load_pairs(path)
    assert (caught.value.path, caught.value.line) == (path, 2)
    assert whats[0] in caught.value.what


def test_an_empty_chat_file_is_not_ok(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").touch()
    report = check_chat(tmp_path / "f.jsonl")
    assert (report.ok, report.rows, report.errors) == (False, 0, [{"line": 0, "what": "the file is empty"}])
    with pytest.raises(DataError, match="is empty"):
        load_pairs(tmp_path / "f.jsonl")
    with pytest.raises(DataError, match="does not exist"):
        check_chat(tmp_path / "absent.jsonl")


def test_pairs_become_user_and_assistant(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", {"prompt": "2 + 2?", "response": "4", "id": "x"}, chat(S, U, A))
    assert load_pairs(path) == [Conversation((("user", "2 + 2?"), ("assistant", "4"))), Conversation((S, U, A))]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "x"}, "response is missing"),
        ({"response": "x"}, "prompt is missing"),
        ({"prompt": "", "response": "x"}, "prompt is empty"),
        ({"prompt": "x", "response": ["y"]}, "response must be text, not an array"),
        ({"prompt": "x", "response": "y", "raw": 1}, "raw must be true or false, not a number"),
    ],
)
def test_faults_of_pairs(tmp_path: Path, row: Any, what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        load_pairs(write(tmp_path / "f.jsonl", row))
    assert caught.value.line == 1


def test_validate_takes_what_training_takes(tmp_path: Path) -> None:
    rows = [{"prompt": "2 + 2?", "response": "4", "raw": True}, chat(S, U, A), {"prompt": 2, "raw": "no"}]
    path = write(tmp_path / "f.jsonl", *rows)
    report = check_chat(path)
    assert [(error["line"], error["what"]) for error in report.errors] == [
        (3, "prompt must be text, not a number"),
        (3, "response is missing"),
        (3, "raw must be true or false, not text"),
    ]
    assert report.stats["roles"] == {"system": 1, "user": 2, "assistant": 2}
    with pytest.raises(
        DataError, match=r"prompt must be text, not a number; `grpo-gsm8k validate .* lists every error"
    ):
        load_pairs(path)
    assert load_pairs(write(tmp_path / "f.jsonl", rows[0]))[0].raw
