"""Ctrl-C and SIGTERM at any moment: the process ends in seconds, with one line, and complete steps are kept."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.toys import REPOSITORY

PATIENCE_S = 25.0  # of a busy machine; the process promises 8 s and the step that is under way


@dataclass
class Ended:
    code: int
    err: str
    seconds: float  # from the last signal


def pressed(argv, moments, number=signal.SIGINT, ready=None):
    """Start a process, send it signals at these moments (seconds after its start, or after `ready()`)."""
    process = subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while ready and not ready() and process.poll() is None:
        time.sleep(0.01)
    began = time.monotonic()
    for moment in moments:
        time.sleep(max(0.0, began + moment - time.monotonic()))
        if process.poll() is None:
            process.send_signal(number)
    sent = time.monotonic()
    try:
        _, err = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"went on after {moments}: {process.communicate()[1]}") from None
    return Ended(process.returncode, err, time.monotonic() - sent)


def python(code):
    return [sys.executable, "-c", f"import sys\nsys.argv = ['grpo-gsm8k']\nimport grpo_gsm8k\n{code}"]


def check_ending(end, run: Path | None = None):
    assert "Traceback" not in end.err and "Exception ignored" not in end.err, end.err
    if end.code not in (130, 143):
        return  # done before, or Python itself had not begun
    assert "--resume" in end.err, end.err
    log = run / "metrics.jsonl" if run else None
    if log and log.is_file() and log.read_bytes().count(b"\n"):
        assert list(run.glob("checkpoints/step_*/manifest.json")), end.err


SWALLOWS = {
    "an except": "try:\n    time.sleep(60)\nexcept BaseException:\n    pass\ntime.sleep(60)",
    "a callback": "class A:\n    def __del__(self):\n        time.sleep(60)\na = A()\ndel a\ntime.sleep(60)",
    "a deaf loop": "while True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        continue",
    "a thread": "from threading import Thread\nThread(target=time.sleep, args=(60,)).start()\nwhile True: pass",
}


@pytest.mark.parametrize("name", SWALLOWS)
@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_that_is_swallowed_comes_back(name, times):
    if times == 2 and name != "a callback":
        pytest.skip("once is enough here")
    grace = "grpo_gsm8k.interrupts.GRACE_S = grpo_gsm8k.interrupts.EXIT_S = 1.5"
    code = f"import time\nimport grpo_gsm8k.interrupts\n{grace}\n{SWALLOWS[name]}\nraise SystemExit('it went on')"
    end = pressed(python(code), [0.5 + 0.3 * k for k in range(times)])
    assert end.code == 130 and "--resume" in end.err and "went on" not in end.err
    assert end.seconds < 12 and "Traceback" not in end.err and "Exception ignored" not in end.err


def test_during_an_import_there_is_a_line_and_no_traceback(tmp_path):
    (tmp_path / "slowly.py").write_text("import time\ntime.sleep(30)\n")
    end = pressed(python(f"sys.path.insert(0, {str(tmp_path)!r})\nimport slowly"), [0.5], signal.SIGTERM)
    assert end.code == 143 and "--resume" in end.err and "Traceback" not in end.err


def test_an_import_that_turns_it_into_an_error_ends_with_the_line(tmp_path):
    """As transformers' lazy modules do."""
    body = (
        "import time\ntry:\n    time.sleep(30)\nexcept BaseException as e:\n    raise ModuleNotFoundError('x') from e\n"
    )
    (tmp_path / "wraps.py").write_text(body)
    end = pressed(python(f"sys.path.insert(0, {str(tmp_path)!r})\nimport wraps"), [0.5])
    assert end.code == 130 and "--resume" in end.err and "Traceback" not in end.err


def test_an_import_that_drops_it_and_then_fails_ends_with_the_line(tmp_path):
    """As torch does, whose native code imports numpy and does not mind that this fails; the next import of it does."""
    body = "import time\ntry:\n    time.sleep(30)\nexcept BaseException:\n    pass\nraise RuntimeError('half there')\n"
    (tmp_path / "drops.py").write_text(body)
    end = pressed(python(f"sys.path.insert(0, {str(tmp_path)!r})\nimport drops"), [0.5])
    assert end.code == 130 and "--resume" in end.err and "half there" in end.err and "Traceback" not in end.err


def grpo(tiny, run, steps=400):
    flags = ["--model_id", tiny.model, "--data", tiny.data, "--out_dir", run, "--device", "cpu", "--steps", steps]
    flags += ["--prompt_style", "gsm8k", "--max_new_tokens", 8, "--rollouts_per_step", 8, "--group_size", 4]
    flags += ["--eval_examples", 2, "--eval_every", 50, "--save_every", 100_000, "--minibatches", 2, "--lr", "1e-3"]
    return [sys.executable, "-m", "grpo_gsm8k.cli", "grpo", *map(str, flags)]


@pytest.mark.slow
@pytest.mark.parametrize("gaps", [(0.3,), (0.2, 0.25)])
def test_a_complete_step_is_kept_whether_it_is_pressed_once_or_twice(gaps, tiny, tmp_path):
    run = tmp_path / "run"
    log = run / "metrics.jsonl"
    end = pressed(grpo(tiny, run), gaps, ready=lambda: log.is_file() and log.stat().st_size > 0)
    assert end.code == 130, end
    check_ending(end, run)
    assert list(run.glob("checkpoints/step_*/manifest.json"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_at_hundreds_of_random_moments(tiny, tmp_path):
    """From exec to exit, once and twice, Ctrl-C and SIGTERM."""
    draw = random.Random(20)
    began = time.monotonic()
    subprocess.run(grpo(tiny, tmp_path / "whole", steps=12), cwd=REPOSITORY, capture_output=True, check=True)
    whole = time.monotonic() - began
    codes = []
    for trial in range(240):
        run = tmp_path / f"run{trial}"
        first = draw.uniform(0.1, 1.1 * whole)
        moments = [first] if trial % 2 else [first, first + draw.choice([0.02, 0.1, 0.5])]
        number = signal.SIGTERM if trial % 3 == 0 else signal.SIGINT
        end = pressed(grpo(tiny, run, steps=12), moments, number)
        check_ending(end, run)
        codes.append(end.code)
    assert codes.count(130) > 60 and codes.count(143) > 30 and set(codes) <= {0, 130, 143}, codes


def test_an_interrupted_command_does_not_wait_for_a_thread_that_never_ends():
    """The interpreter's teardown joins threads; a command that was interrupted and has cleaned up does not."""
    code = "import threading, time\nfrom grpo_gsm8k import cli, interrupts\ninterrupts.EXIT_S = 1e6\n"
    code += "threading.Thread(target=time.sleep, args=(60,)).start()\n"
    code += "cli._run = lambda argv: (interrupts._state.received.append(2), 130)[1]\ncli.main([])"
    end = pressed(python(code), [])
    assert end.code == 130 and end.seconds < 20, end
