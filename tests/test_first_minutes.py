"""The first five minutes: what the demo says, how it ends, and the browser that it opens."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_gsm8k import cli, pipeline
from grpo_gsm8k.evals import tables

SMALL = ["--set", "toy.train=24", "--set", "toy.val=4", "--set", "toy.test=8", "--set", "eval.max_new_tokens=4"]
SMALL += ["--set", "tiny_model.hidden_size=32", "--set", "tiny_model.vocab_size=300"]


def result_of(stages, compared=()):
    """What a pipeline returns, by hand."""
    keys = ("name", "accuracy", "ci95", "seconds")
    rows = [dict(zip(keys, stage, strict=True)) | {"reward": 0.25} for stage in stages]
    return {"stages": rows, "comparisons": list(compared), "report": "runs/my demo/report.html"}


README_ROWS = [
    ("base", 0.0, [0.0, 0.006], 7.5),
    ("sft", 0.385, [0.347, 0.425], 41.4),
    ("ei", 0.732, [0.695, 0.766], 60.8),
    ("grpo", 0.923, [0.899, 0.942], 191.0),
]


def test_it_ends_with_the_table_of_the_readme_and_the_line_that_opens_the_report(capsys, monkeypatch):
    monkeypatch.setattr(tables.shutil, "which", lambda tool: f"/usr/bin/{tool}" if tool == "xdg-open" else None)
    monkeypatch.setattr(tables.sys, "platform", "linux")
    pair = {"a": "sft", "b": "grpo", "difference": 0.538, "won": 334, "lost": 11, "n": 600}
    tables.print_pipeline(result_of(README_ROWS, [{**pair, "a": "base"}, pair]))
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()[:5]] == [
        ["stage", "accuracy", "95", "%", "interval", "seconds"],
        ["base", "0.0", "%", "0.0", "to", "0.6", "8"],
        ["SFT", "38.5", "%", "34.7", "to", "42.5", "41"],
        ["EI", "73.2", "%", "69.5", "to", "76.6", "61"],
        ["GRPO", "92.3", "%", "89.9", "to", "94.2", "191"],
    ]
    assert out.splitlines()[5:] == [
        "GRPO against SFT: +53.8 points, 334 won, 11 lost of 600",
        "open the report: xdg-open 'runs/my demo/report.html'",
    ]
    assert max(map(len, out.splitlines()[:5])) <= 40


@pytest.mark.parametrize(
    ("platform", "there", "line"),
    [
        ("darwin", (), "open 'a b/report.html'"),
        ("linux", ("wslview",), "wslview 'a b/report.html'"),
        ("linux", (), f"python3 -m webbrowser {Path('a b').resolve().as_uri()}/report.html"),
    ],
)
def test_the_command_that_opens_a_page_is_one_that_is_there(platform, there, line, monkeypatch):
    monkeypatch.setattr(tables.sys, "platform", platform)
    monkeypatch.setattr(tables.shutil, "which", lambda tool: tool if tool in there else None)
    assert tables.open_command("a b/report.html") == line


def test_a_task_without_right_answers_ends_with_rewards(capsys):
    tables.print_pipeline(result_of([("base", None, [0.125, 0.5], 3.0)]))
    head, row, _ = capsys.readouterr().out.splitlines()
    assert head.split()[1] == "reward" and row.split() == ["base", "0.250", "0.125", "to", "0.500", "3"]


def test_the_demo_says_where_and_what_before_it_imports_torch():
    code = "import sys; from grpo_gsm8k import pipeline; print('torch' in sys.modules)\n"
    code += "pipeline._check = lambda resolve: sys.exit('torch' in sys.modules and 'too late')\n"
    code += "from grpo_gsm8k import cli; cli.main(['demo', '--out_dir', 'nowhere'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n" and not Path("nowhere").exists()
    lines = done.stderr.splitlines()
    assert lines[0] == "working in nowhere"
    assert [line.split()[1] for line in lines[1:5]] == ["base", "SFT", "EI", "GRPO"]
    assert all(len(line) <= 40 for line in lines)


def test_open_opens_the_report_in_the_browser(tmp_path, monkeypatch, capfd):
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/seen\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    run = tmp_path / "run"
    cli.main(["demo", "--stop_after", "base", "--out_dir", str(run), "--open", *SMALL])
    out, err = capfd.readouterr()
    assert re.fullmatch(r"stage .*\nbase .*\nopen the report: .*report.html\n", out)
    assert re.search(r"^working in .*run\n 1 base ", err) and "1/1 base: 0.0 % right (" in err
    cli.main(["report", str(run), "--out", str(tmp_path / "page.html"), "--open", "--json"])
    assert json.loads(capfd.readouterr().out) == {"path": str(tmp_path / "page.html")}
    seen = (tmp_path / "seen").read_text().split()
    assert seen == [(run / "report.html").as_uri(), (tmp_path / "page.html").as_uri()]


def test_no_browser_is_one_line(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.html"
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    monkeypatch.setattr(pipeline, "run", lambda *given: result_of(README_ROWS[:1]) | {"report": str(page)})
    cli.main(["demo", "--open"])
    assert capsys.readouterr().err == f"--open: no browser on this machine; the page is {page}\n"
