"""The chat task: how conversations are read, and what is preferred among the completions of a prompt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from grpo_gsm8k.datatypes import Completion, Example, Grade, Prompt, Trajectory
from grpo_gsm8k.errors import ConfigError, DataError
from grpo_gsm8k.tasks import load_task
from grpo_gsm8k.tasks.base import TaskOptions, load_examples
from grpo_gsm8k.tasks.chat import OPPONENTS, Chat, closeness, pairings

CHAT = {"messages": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello there, you."}]}


def chat(**settings: Any) -> Chat:
    task = load_task("chat", TaskOptions(settings=settings))
    assert isinstance(task, Chat)
    return task


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(example: Example, *answers: str, opened: str = "") -> list[Trajectory]:
    prompt = Prompt(example, (1,), opened=opened)
    return [Trajectory.of(prompt, Completion((2,), (0.0,), text, "stop", seed=i)) for i, text in enumerate(answers)]


def rewards(task: Chat, example: Example, trajectories: Sequence[Trajectory]) -> list[float]:
    return [grade.reward for grade in asyncio.run(task.grade_group(example, trajectories))]


# ---- reading


def test_a_conversation_is_asked_up_to_its_last_answer(tmp_path: Path) -> None:
    long = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]
    task = chat()
    (example,) = load_examples(task, write(tmp_path / "a.jsonl", {"messages": long, "topic": "manners"}))
    assert task.prompt(example) == [(m["role"], m["content"]) for m in long[:-1]]
    assert task.target(example) == "See you" == example.answer
    assert example.meta == {"topic": "manners"}
    assert task.example(task.row(example)) == example


@pytest.mark.parametrize("answer", ["response", "completion"])
def test_pairs_are_conversations_of_one_turn(tmp_path: Path, answer: str) -> None:
    task = chat()
    (example,) = task.examples(write(tmp_path / "a.jsonl", {"prompt": "Hi", answer: "Hello"}))
    assert (task.prompt(example), task.target(example)) == ([("user", "Hi")], "Hello")


def test_a_raw_prompt_stays_the_text_that_the_model_reads(tmp_path: Path) -> None:
    task = chat()
    (example,) = task.examples(write(tmp_path / "a.jsonl", {"prompt": "Q: 1\nA:", "response": " 2", "raw": True}))
    assert task.prompt(example) == "Q: 1\nA:"
    assert task.example(task.row(example)) == example


def test_the_same_conversation_twice_is_two_examples(tmp_path: Path) -> None:
    first, second, third = chat().examples(write(tmp_path / "a.jsonl", CHAT, CHAT, {**CHAT, "id": "mine"}))
    assert second.id == f"{first.id}-2"
    assert third.id == "mine"
    with pytest.raises(DataError, match=r"a\.jsonl:2: duplicate id 'x'"):
        chat().examples(write(tmp_path / "a.jsonl", {**CHAT, "id": "x"}, {**CHAT, "id": "x"}))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({}, "messages is missing"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hi"}, "messages must be an array, not text"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content is missing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "which is none of system, user, assistant"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "comes before any user message"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no user message"),
        ({"messages": [{"role": "user", "content": "x"}]}, "pass --length_words"),
        ({"prompt": "x"}, "response is missing"),
        ({"prompt": "x", "completion": 3}, "completion must be text, not a number"),
    ],
)
def test_a_broken_row_is_named_with_its_line(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{complaint}"):
        load_examples(chat(), write(tmp_path / "a.jsonl", CHAT, row))


def test_without_a_reference_there_is_nothing_to_fine_tune_on(tmp_path: Path) -> None:
    task = chat(length_words=5)
    (example,) = task.examples(write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "x"}]}))
    assert rewards(task, example, said(example, "a b c d e")) == [1.0]
    with pytest.raises(DataError, match=r"a\.jsonl:1: has no answer to learn"):
        task.target(example)


# ---- preferences


@pytest.mark.parametrize(("words", "value"), [(10, 1.0), (5, 0.5), (20, 0.5), (0, 0.0), (1, 0.1), (40, 0.25)])
def test_closeness(words: int, value: float) -> None:
    assert closeness(words, 10) == value


def test_length_counts_the_answer_without_its_thoughts() -> None:
    task, example = chat(length_words=2), Example("x", (("user", "hi"),), "a b c d")
    found = asyncio.run(
        task.grade_group(example, said(example, "one two", "<think>a b c</think> one", "one two three four"))
    )
    assert [g.reward for g in found] == [1.0, 0.5, 0.5]
    assert found[0] == Grade(1.0, {"length": 1.0}, None, None, None, {"words": 2})
    assert rewards(task, example, said(example, "so so so</think> one two", opened="<think>")) == [1.0]
    assert task.grade(example, "one two").reward == 1.0


def test_length_zero_wishes_for_the_length_of_the_reference() -> None:
    example = Example("x", (("user", "hi"),), "a b c d")
    assert rewards(chat(), example, said(example, "one two three four", "one")) == [1.0, 0.25]


def longest_wins(completions: Sequence[Trajectory], example: Example) -> list[float]:
    most = max(len(c.text) for c in completions)
    return [float(len(c.text) == most) for c in completions]


async def later(completions: Sequence[Trajectory], example: Example) -> list[float]:
    await asyncio.sleep(0)
    return longest_wins(completions, example)


def nonsense(completions: Sequence[Trajectory], example: Example) -> Any:
    return {"raises": lambda: 1 / 0, "few": lambda: [1.0], "nan": lambda: [float("nan")] * 2, "text": lambda: "ab"}[
        example.id
    ]()


@pytest.mark.parametrize("name", ["longest_wins", "later"])
def test_a_function_of_ones_own_sees_the_whole_group(name: str) -> None:
    task, example = chat(preference=f"tests.test_chat_task:{name}"), Example("x", (("user", "hi"),), None)
    assert rewards(task, example, said(example, "a", "abc", "ab")) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("id_", "complaint"),
    [("raises", "ZeroDivisionError"), ("few", "for the 2 completions"), ("nan", "finite number"), ("text", "'ab'")],
)
def test_a_function_that_returns_nonsense_is_blamed_in_one_line(id_: str, complaint: str) -> None:
    task, example = chat(preference="tests.test_chat_task:nonsense"), Example(id_, (("user", "hi"),), None)
    with pytest.raises(ConfigError, match=complaint) as caught:
        rewards(task, example, said(example, "a", "b"))
    assert "\n" not in str(caught.value)
    assert "--preference 'tests.test_chat_task:nonsense'" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"preference": "lenght"}, "must be length, judge"),
        ({"preference": "tests.no_such:fn"}, "no module"),
        ({"preference": "tests.test_chat_task:CHAT"}, "cannot be called"),
        ({"preference": "judge", "judge_base_url": "", "judge_model": "m"}, "--judge_base_url must read"),
        ({"preference": "judge", "judge_base_url": "http://[", "judge_model": "m"}, "--judge_base_url must read"),
        ({"preference": "judge", "judge_base_url": "http://k:s@x/v1", "judge_model": "m"}, "without a user"),
        ({"preference": "judge", "judge_base_url": "http://x/v1", "judge_model": ""}, "needs --judge_model"),
        (
            {"preference": "judge", "judge_base_url": "http://x", "judge_model": "m", "judge_concurrency": 0},
            "at least 1",
        ),
        ({"preference": "judge", "judge_base_url": "http://x", "judge_model": "m", "judge_timeout_s": 0.0}, "above 0"),
        ({"preference": "judge", "judge_base_url": "http://x", "judge_model": "m", "judge_budget": -1}, "at least 0"),
        ({"length_words": -1}, "--length_words -1: must be at least 0"),
        (
            {"preference": "judge", "judge_base_url": "http://x", "judge_model": "m", "judge_api_key_env": "NOT_SET"},
            "NOT_SET holds no API key.*--judge_api_key_env",
        ),
    ],
)
def test_a_wrong_setting_is_refused_before_any_work(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        chat(**settings)


def test_pairings() -> None:
    assert pairings(8, "x") == list(combinations(range(8), 2))
    many = pairings(16, "x")
    assert many == pairings(16, "x") != pairings(16, "y")
    assert all(sum(i in pair for pair in many) >= OPPONENTS for i in range(16))
    assert len(many) <= 16 * OPPONENTS < len(list(combinations(range(16), 2)))


def test_toy_conversations_come_from_the_seed_and_their_splits_are_disjoint(tmp_path: Path) -> None:
    sizes = {"train": 300, "val": 20, "test": 30}
    folders = [chat().generate(tmp_path / name, seed, sizes) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    texts = [[(folder / f"{split}.jsonl").read_text() for split in sizes] for folder in folders]
    assert texts[0] == texts[1] != texts[2]
    splits = {split: load_examples(chat(), folders[0] / f"{split}.jsonl") for split in sizes}
    assert {split: len(found) for split, found in splits.items()} == sizes
    asked = {split: {example.messages[-1] for example in found} for split, found in splits.items()}
    assert not asked["train"] & asked["val"] and not asked["train"] & asked["test"] and not asked["val"] & asked["test"]
    lengths = [len(str(example.answer).split()) for example in splits["train"]]
    assert min(lengths) < 10 < 40 < max(lengths)
    with pytest.raises(ConfigError, match="ask for fewer"):
        chat().generate(tmp_path / "d", 0, {"train": 1, "val": 900, "test": 100})
