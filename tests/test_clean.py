"""What terminals must not obey, and what the public must not read."""

from __future__ import annotations

import json

import pytest

from grpo_gsm8k import r1_traces
from grpo_gsm8k.runs.clean import printable, printable_json, publishable, without_paths, without_whole_paths


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\nßü数🙂", "plain\ttext\nßü数🙂"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07a\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "alink"),
        ("\x9b31mred \x1bPdcs\x1b\\x\x1b(B\x1bc", "red x"),
        ("10%\r20%\rdone\r\nnext\r", "done\nnext"),
        ("bell\x07 back\x08 \x00 \x7f \x85", "bell\\x07 back\\x08 \\x00 \\x7f \\x85"),
        ("\u202eevil\u2066 \u2028 \ud800", "\\u202eevil\\u2066 \\u2028 \\ud800"),
        ("\x1b", "\\x1b"),
    ],
)
def test_terminals_are_told_nothing(text, shown):
    assert printable(text) == shown
    assert json.loads(printable_json(json.dumps([text], ensure_ascii=False))) == [text]
    assert r1_traces.printable(text).isprintable()


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("results: /home/me/runs/x", "results: x"),
        ("/home/me/mine.py:reward", "mine.py:reward"),
        ("a=/srv/u/a,b=~/secret/b C:\\Users\\me\\c", "a=a,b=b c"),
        ("/home/alice", "~"),
        ("file:///home/me/x", "x"),
        ("/h/.cache/hub/models--Qwen--Qwen2.5-0.5B/snapshots/0a1b", "Qwen/Qwen2.5-0.5B"),
        ("https://a.b/c/d and </think>, 3/4 + 1/2, Qwen/Qwen2.5, artifacts/data, /no_think", None),
    ],
)
def test_paths_of_this_machine_stay_here(text, public):
    assert without_paths(text) == (text if public is None else public)
    assert publishable({"k": [text, 1, None]}) == {"k": [text if public is None else public, 1, None]}


def test_a_template_is_no_path():
    assert without_whole_paths({"t": "{{ '/a/b' }} /x/y z", "p": "/home/me/a b/m"}) == {
        "t": "{{ '/a/b' }} /x/y z",
        "p": "m",
    }
