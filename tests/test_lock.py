"""Two processes and one run directory: the second is refused by name and pid, and a dead one blocks nobody."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from grpo_gsm8k import cli, config, pipeline, report
from grpo_gsm8k.errors import RunDirError
from grpo_gsm8k.runs import lock
from grpo_gsm8k.runs.directory import open_run
from tests.toys import REPOSITORY, stage_config

HOLDER = "import pathlib, sys; from grpo_gsm8k.runs import lock\n"
HOLDER += "with lock.hold(pathlib.Path(sys.argv[1]), sys.argv[2]): print('held', flush=True); sys.stdin.read()"


@contextlib.contextmanager
def another(folder, name):
    """A process that is at work in a folder until the test has ended, however long that takes."""
    command = [sys.executable, "-c", HOLDER, str(folder), name]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_process_is_refused_by_name_and_pid(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    with open_run(stage_config("grpo", out_dir=str(run)), "grpo", {}) as first:
        first.log(1, {"loss": 0.5})
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with another(run, "grpo") as process:
        for more in ([], ["--resume"]):
            flags = ["--model_id", tiny.model, "--data", tiny.data, "--device", "cpu", "--prompt_style", "gsm8k"]
            with pytest.raises(SystemExit) as stop:
                cli.main([str(word) for word in ["grpo", *flags, "--out_dir", run, *more]])
            said = capsys.readouterr().err
            assert stop.value.code == 2 and said.count("\n") == 1
            assert f"{run}: another process is at work in it: grpo, pid {process.pid}, since" in said
        assert report.write_report([run], tmp_path / "page.html").is_file()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert f'"pid": {process.pid}' in (run / ".lock").read_text()  # what it wrote is still there, and stops nobody
    assert {path: path.read_bytes() for path in before} == before
    with open_run(stage_config("grpo", out_dir=str(run), resume=True), "grpo", {}) as again:
        assert [row["step"] for row in again.history()] == [1]
    assert (run / ".lock").read_text() == ""


@pytest.mark.parametrize("resume", [False, True])
def test_a_pipeline_that_is_under_way_is_refused(tmp_path, resume):
    flags = {"out_dir": str(tmp_path / "p"), "resume": resume, "stop_after": "base"}
    (tmp_path / "p").mkdir()
    with another(tmp_path / "p", "pipeline") as process, pytest.raises(RunDirError, match=f"pid {process.pid}"):
        pipeline.run(config.build(config.PipelineConfig, flags))
    assert [path.name for path in (tmp_path / "p").iterdir()] == [".lock"]


def test_a_look_makes_nothing_and_a_file_without_a_signature_names_nobody(tmp_path):
    lock.refuse_if_held(tmp_path)
    assert not list(tmp_path.iterdir())
    with another(tmp_path, "sft") as process:
        (tmp_path / ".lock").write_text('["an older version"]')
        with pytest.raises(RunDirError, match="another process is at work in it; wait"):
            lock.refuse_if_held(tmp_path)
        (tmp_path / ".lock").write_text(f'{{"name": "sft", "pid": {process.pid}, "host": "far-away", "since": 0.0}}')
        with pytest.raises(RunDirError, match=rf"sft, pid {process.pid} on far-away, since 1970-01-01 00:00 UTC"):
            lock.refuse_if_held(tmp_path)


def test_a_folder_that_was_emptied_meanwhile_is_locked_under_its_new_file(tmp_path):
    with lock.hold(tmp_path, "sft"):
        (tmp_path / ".lock").unlink()  # as a run that fails at its start does
        with lock.hold(tmp_path, "grpo"):
            assert f'"name": "grpo", "pid": {os.getpid()}' in (tmp_path / ".lock").read_text()


def test_where_the_file_system_has_no_locks_the_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    def flock(handle, how):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with lock.hold(tmp_path, "sft"):
        pass
    assert "its file system has no locks (No locks available)" in capsys.readouterr().err
