"""Progress: bars on a terminal of 80 and of 40 columns, and a line now and then where there is none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grpo_gsm8k.runs import progress

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7530, "2 h 05 min")],
)
def test_durations_are_for_people(seconds, words):
    assert progress.duration(seconds) == words


def test_rate_and_time_left_by_hand(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    bar = progress.Progress("grpo", 500, 20)  # continued at step 20
    assert bar.line() == "grpo 20/500"
    clock[0] = 130.0
    assert bar.line() == "grpo 20/500, 30 s so far"
    bar.update(30, "reward 0.5")  # ten steps in 30 seconds: 470 are left
    assert bar.line() == "grpo 30/500, 3.0 s each, 23 min 30 s left, reward 0.5"
    clock[0] = 140.0  # in the middle of a step
    assert bar.left() == "23 min 20 s left"
    bar.update(499)
    clock[0] = 200.0  # the last one is slower than the others were
    assert bar.line() == "grpo 499/500, 12.0 a second, 1 min 40 s so far"
    clock[0] = 140.0
    bar.update(500)
    assert bar.line() == "grpo 500/500, 12.0 a second, took 40 s"


@pytest.fixture
def soon(monkeypatch):
    """Lines after a fifth of a second."""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.2)
    monkeypatch.setattr(progress, "LOOK_S", 0.02)


def until(found, patience=10.0):
    end = time.monotonic() + patience
    while not found() and time.monotonic() < end:
        time.sleep(0.02)


def test_outside_a_terminal_a_long_step_is_not_silent(soon, capfd):
    said = []

    def heard(words):
        said.append(capfd.readouterr().err)
        return words in "".join(said)

    with progress.doing("demo"):
        until(lambda: heard("demo: 0 s so far"))
        with progress.part(2, 4), progress.doing("sft"), progress.progress("sft", 300) as bar:
            time.sleep(0.05)
            bar.update(1, "loss 5.1")
            until(lambda: heard("s left, loss 5.1\n2/4 sft 1/300"))  # the thread says it again within the step
            with progress.progress("validation", 100, keep=False) as inner:
                until(lambda: heard("loss 5.1; validation 0/100"))
                inner.update(100, "accuracy 3.0 %")
    lines = "".join(said).splitlines() + capfd.readouterr().err.splitlines()
    assert "demo: 0 s so far" in lines and "validation 100/100" in lines[-1]
    assert any(re.fullmatch(r"2/4 sft 1/300, [\d.]+ a second, .* left, loss 5.1; validation 0/100", x) for x in lines)
    until(lambda: all(thread.name != "progress" for thread in threading.enumerate()))
    assert all(thread.name != "progress" for thread in threading.enumerate())


SCRIPT = """
import time
from grpo_gsm8k.runs.progress import doing, part, progress, say
with doing("demo"):
  time.sleep(0.4)
  with part(2, 4), doing("sft"):
    with progress("sft", 300) as bar:
        bar.update(150, "loss 1.234, accuracy 12.3 %")
        with progress("validation", 10, keep=False) as inner:
            time.sleep(0.6)
            say("a line in between")
        bar.update(300, "loss 0.5, accuracy 38.5 %")
print("the table")
"""


@pytest.mark.parametrize("columns", [80, 40])
def test_on_a_terminal_bars_fit_and_only_what_counts_stays(columns):
    reader, terminal = os.openpty()
    env = {**os.environ, "COLUMNS": str(columns), "LINES": "40", "TERM": "xterm"}
    done = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=REPOSITORY, env=env, stdout=terminal, stderr=terminal)
    os.close(terminal)
    raw = b""
    try:
        while piece := os.read(reader, 4096):
            raw += piece
    except OSError:  # its other end is closed
        pass
    assert done.wait(60) == 0
    text = raw.decode()
    assert "demo" in text and "validation" in text and "150/300" in text  # were shown for a while
    screen = what_stays(text)
    assert all(len(line) <= columns for line in screen)
    bar = r"2/4 sft ━+ 300/300 took \d s" + (" " if columns == 80 else r"\n  ") + "loss 0.5, accuracy 38.5 %"
    assert re.fullmatch(f"a line in between\n{bar}\nthe table", "\n".join(screen))


def what_stays(text):
    """The lines of a terminal that has been sent this; it knows the codes that rich sends."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] not in "\r\x1b":
            lines[row] += part
    return [line.rstrip() for line in lines if line.strip()]


def test_a_server_shows_no_bar_while_it_serves(monkeypatch):
    """It lasts for days, and a line every 20 seconds would fill its log."""
    from grpo_gsm8k import cli, serve

    shown = []
    monkeypatch.setattr(serve, "run", lambda cfg, status: shown.append([*progress._screen.open]) or {})
    cli.main(["serve", "--model_id", "x"])
    assert shown == [[]]
