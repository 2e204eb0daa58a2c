"""Traces to pairs: what is kept reads as its style wants it, and what is dropped has its reason."""

from __future__ import annotations

import json

import pytest

from grpo_gsm8k import config
from grpo_gsm8k.errors import DataError
from grpo_gsm8k.tasks.conversations import Conversation, check_chat, load_pairs
from grpo_gsm8k.tasks.gsm8k import pairs
from grpo_gsm8k.tasks.gsm8k.grading import Tags
from grpo_gsm8k.tasks.gsm8k.pairs import Dropped, make_pair
from grpo_gsm8k.tasks.gsm8k.styles import STYLES
from tests.toys import cli

QUESTION = "Ann has 48 clips in April and half as many in May. How many in all?"
TRACE = {
    "id": "a",
    "sample": 0,
    "question": QUESTION,
    "answer": "48+24=<<48+24=72>>72\n#### 72",
    "reasoning_content": "Okay, the user wants the sum. In May she has 24.\nThat makes 48 + 24 = 72.",
    "content": "### Sum\nIn May she has \\boxed{48/2 = 24}. I must put the final answer in \\boxed{}.\n\n"
    "\\[\n48 + 24 = 72\n\\]\n\n**Final Answer**\n\\[\n\\boxed{72}\n\\]\n",
    "finish_reason": "stop",
    "usage": None,
}
WORKING = "Sum\nIn May she has 48/2 = 24.\n\n\\[\n48 + 24 = 72\n\\]"


def made(style="qwen_boxed", tags=None, flags=None, **changes):
    tags = tags or Tags()
    cfg = config.resolve("pairs", flags={"prompt_style": style, **(flags or {})})
    return make_pair({**TRACE, **changes}, STYLES[style](tags), tags, cfg)


def test_a_trace_in_each_style():
    assert made("gsm8k").response == WORKING + "\n#### 72"
    assert made("qwen_boxed").response == WORKING + "\n\nThe final answer is $\\boxed{72}$."
    assert made("r1_zero").response == " In May she has 24.\nThat makes 48 + 24 = 72. </think> <answer> 72 </answer>"
    assert made("r1_zero", reasoning_content="").response == f" {WORKING} </think> <answer> 72 </answer>"
    mine = made("r1_zero", Tags("[t]", "[/t]", None, None), {"part": "content"}, content=TRACE["content"] + "[/t]")
    assert mine.response == f" {WORKING} [/t] The final answer is $\\boxed{{72}}$."
    assert made(flags={"part": "reasoning"}).response.startswith("In May she has 24.\nThat makes")


def test_rows_ask_as_the_style_asks():
    style = STYLES["qwen_boxed"](Tags())
    turns = [(m["role"], m["content"]) for m in made().row(style)["messages"]]
    assert turns[:-1] == style.ask(QUESTION) and turns[-1] == ("assistant", made().response)
    style = STYLES["r1_zero"](Tags())
    row = made("r1_zero").row(style)
    assert row["prompt"] == style.ask(QUESTION) and row["raw"] is True and "messages" not in row


@pytest.mark.parametrize(
    ("text", "question", "left"),
    [
        ("The user asks for a sum. 2+2=4.", "", "2+2=4."),
        ("2+2=4.\nThe instructions say to use a box.\nSo 4.", "", "2+2=4.\nSo 4."),
        ("The instructions say 3 cups. 3*2=6.", "The instructions on the box say 3 cups.", None),
        ("As an AI language model, I cannot eat. 2 are left.", "", "2 are left."),
        ("She formats the answer sheet. 2.", "", None),
        ("Please reason step by step, and put your final answer within \\boxed{}.\n5-3=2", "", "5-3=2"),
        ("He is asked for 3.5 km. 2.", "", None),
    ],
)
def test_sentences_about_the_task_go_and_the_problems_own_words_stay(text, question, left):
    kept, removed = pairs.without_meta(text, question)
    assert kept == (text if left is None else left) and bool(removed) is (left is not None)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("1+1=2\n\nTherefore, the answer is 72.", "1+1=2"),
        ("1+1=2\n**Answer:** $72", "1+1=2"),
        ("1+1=2\n#### 72", "1+1=2"),
        ("1+1=2\n\\boxed{72\\text{ clips}}", "1+1=2"),
        ("1+1=2\nShe has \\boxed{72} clips.", "1+1=2\nShe has 72 clips."),
        ("1+1=2\nThe answer is 71, then 72.", "1+1=2\nThe answer is 71, then 72."),
        ("a \\boxed{\\frac{1}{2}} b \\boxed{3", "a \\frac{1}{2} b \\boxed{3"),
        ("\\[\n1 + 71 = 72\n\\]", "\\[\n1 + 71 = 72\n\\]"),
    ],
)
def test_the_closing_statement_goes_and_the_working_stays(text, left):
    assert pairs.without_answer(text, "72") == left


@pytest.mark.parametrize(
    ("why", "changes"),
    [
        ("truncated", {"finish_reason": "length"}),
        ("wrong_answer", {"content": "It is \\boxed{71}."}),
        ("no_answer", {"content": "I do not know."}),
        ("no_working", {"content": "The answer is \\boxed{72}."}),
        ("special_token", {"content": "<|im_end|>48 + 24 = 72, so \\boxed{72}"}),
        ("special_token", {"content": "48 + 24 = 72<｜end▁of▁sentence｜>\n\\boxed{72}"}),
        ("too_short", {"content": "2\n\\boxed{72}", "flags": {"min_chars": 60}}),
        ("too_long", {"flags": {"max_chars": 50}}),
        ("not_in_form", {"style": "r1_zero", "reasoning_content": "<th<th<think>ink>ink> 48 + 24 = 72"}),
    ],
)
def test_every_reason_to_drop_a_trace(why, changes):
    dropped = made(**changes)
    assert isinstance(dropped, Dropped) and dropped.why == why


def test_reasoning_left_in_the_content_is_told_apart():
    whole = made("r1_zero", reasoning_content="", content=f"<think>48/2=24 and 48+24=72.</think>{TRACE['content']}")
    assert whole.response == " 48/2=24 and 48+24=72. </think> <answer> 72 </answer>"
    # A thought alone commits to nothing: its number is no answer.
    assert made(content="<think>72</think> Sorry.").why == "no_answer"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("style", ["qwen_boxed", "r1_zero"])
def test_the_command_keeps_counts_and_reports(tmp_path, style):
    rows = [
        TRACE,
        {**TRACE, "sample": 1, "content": TRACE["content"].replace("In May", "In  MAY"), "reasoning_content": ""},
        {**TRACE, "sample": 2, "content": "It is 7."},
        {**TRACE, "sample": 3, "content": "It is 8."},
        {**TRACE, "sample": 4, "finish_reason": "length"},
    ]
    rows[0] = {**rows[0], "reasoning_content": ""}
    out = tmp_path / "pairs.jsonl"
    done = cli("pairs", "--traces", write(tmp_path / "t.jsonl", *rows), "--out", out, "--prompt_style", style, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["read"], said["written"], said["cleaned"]) == (5, 1, 1)
    dropped = {entry["why"]: (entry["count"], entry["line"]) for entry in said["dropped"]}
    assert dropped == {"wrong_answer": (2, 3), "duplicate": (1, 2), "truncated": (1, 5)}
    assert "gold 72, said 7" in said["dropped"][0]["example"]
    assert json.loads((tmp_path / "pairs.report.json").read_text())["dropped"] == said["dropped"]
    found = check_chat(out)
    assert found.ok and found.rows == 1 and found.stats["roles"]["assistant"] == 1
    (example,) = load_pairs(out)
    assert isinstance(example, Conversation) and example.raw is (style == "r1_zero")


def test_traces_that_cannot_be_used_leave_no_file(tmp_path):
    for rows, words in (
        ([{**TRACE, "content": "7"}], "none of its 1 traces can be kept: wrong_answer 1"),
        ([TRACE, {"id": "x"}], r"t\.jsonl:2: not a trace: 'question'"),
        ([TRACE, {**TRACE, "answer": "many"}], r"t\.jsonl:2: not a trace: .*####"),
    ):
        flags = {"traces": str(write(tmp_path / "t.jsonl", *rows)), "out": str(tmp_path / "p.jsonl")}
        with pytest.raises(DataError, match=words):
            pairs.run(config.resolve("pairs", flags=flags))
    assert {path.name for path in tmp_path.iterdir()} == {"t.jsonl"}
