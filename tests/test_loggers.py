"""TensorBoard and Trackio beside W&B: what reaches them, a resumed run, and that none of them can stop a run."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import time

import pytest

from grpo_gsm8k import config, sft
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.runs import loggers, sinks
from grpo_gsm8k.runs.sinks import COLUMNS, Place, Sink
from grpo_gsm8k.runs.tensorboard_sink import FOLDER, TensorBoardSink, markdown
from grpo_gsm8k.runs.trackio_sink import TrackioSink
from tests.toys import cli, stage_config

METRICS = ("loss", "policy/grad_norm", "val/reward")


def flags_of(tiny, out, **more):
    flags = {"model_id": str(tiny.model), "data": str(tiny.data), "out_dir": str(out), "resume": True}
    return {**flags, "max_steps": 3, "batch_size": 8, "eval_every": 1000, "lr": 1e-3, **more}


def run(tiny, out, **more):
    return sft.run(stage_config("sft", **flags_of(tiny, out, **more)))


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def sample(**more):
    return {**dict.fromkeys(COLUMNS), "id": "a", "question": "1 | 2\n<b>", **more}


# --- TensorBoard --------------------------------------------------------------------------------------------


def read_events(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    found.Reload()
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    texts = {tag: [(e.step, e.tensor_proto.string_val[0].decode()) for e in found.Tensors(tag)]
             for tag in found.Tags()["tensors"]}  # fmt: skip
    return scalars, texts


def test_tensorboard_has_every_metric_once_also_after_a_resume(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    run(tiny, out, log="tensorboard", max_steps=3, eval_every=2)
    (out / "checkpoints/step_000003").rename(tmp_path / "lost")  # the log ran ahead of the newest checkpoint
    run(tiny, out, log="tensorboard", max_steps=4, eval_every=2, save_every=2)
    scalars, texts = read_events(out / FOLDER)
    rows = rows_of(out)
    for name in METRICS:
        logged = [(row["step"], row[name]) for row in rows if name in row]
        assert [step for step, _ in scalars[name]] == [step for step, _ in logged]
        assert [value for _, value in scalars[name]] == pytest.approx([value for _, value in logged], rel=1e-6)
    assert {step for step, _ in texts["val/samples/text_summary"]} == {2, 4}  # this reader forgets scalars alone
    assert "| id | question |" in texts["val/samples/text_summary"][0][1]
    assert '"batch_size": 8' in texts["config/text_summary"][0][1] and str(tiny.data) not in str(
        texts["config/text_summary"]
    )


def test_a_cell_cannot_break_the_table():
    table = markdown([[sample()[column] for column in COLUMNS]])
    assert len(table.splitlines()) == 3 and "1 &#124; 2<br>&lt;b>" in table and "None" not in table


# --- Trackio ------------------------------------------------------------------------------------------------


def test_trackio_has_every_metric_once_and_stdout_stays_data(tiny, tmp_path):
    pytest.importorskip("trackio")
    out, home = tmp_path / "run", tmp_path / "trackio"
    for steps in (3, 4):
        flags = flags_of(tiny, out, log="trackio", max_steps=steps, eval_every=2, device="cpu", max_new_tokens=4)
        words = [f"--{key}={value}" for key, value in flags.items() if key != "resume"]
        done = cli("sft", *words, "--prompt_style=gsm8k", "--eval_examples=2", "--resume", "--json",
                   env={**os.environ, "TRACKIO_DIR": str(home)})  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["step"] == steps
        assert "Created new run" in done.stderr if steps == 3 else "Resumed existing run" in done.stderr
    (database,) = home.rglob("*.db")
    with sqlite3.connect(database) as connection:
        logged = [(step, json.loads(text)) for step, text in connection.execute("select step, metrics from metrics")]
    rows = rows_of(out)
    for name in METRICS:
        assert [(step, row[name]) for step, row in sorted(logged, key=lambda pair: pair[0]) if name in row] == [
            (row["step"], pytest.approx(row[name])) for row in rows if name in row
        ]
    assert [step for step, row in logged if "val/samples" in row] == [2, 4]


# --- none can stop a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TensorBoardSink, TrackioSink])
def test_a_library_that_is_not_there_is_one_line(kind, tmp_path, monkeypatch, capsys):
    for name in ("trackio", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    sink = kind(Place("p", "n", tmp_path, {}))
    sink.log(1, {"loss": 1.0})
    sink.close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"install the extra {kind.extra}" in said


class Failing(Sink):
    title, when = "Failing", "open"

    def open(self):
        if self.when == "open":
            raise OSError("no disk")
        return self

    def write(self, step, values):
        raise OSError("no disk")


@pytest.mark.parametrize("when", ["open", "write"])
def test_an_error_of_a_logger_ends_it_and_not_the_run(when, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Failing, "when", when)
    monkeypatch.setattr(loggers, "KINDS", {"trackio": Failing})
    assert run(tiny, tmp_path / "run", log="trackio")["step"] == 3
    assert "Failing is off for this run, metrics.jsonl has everything: OSError no disk" in capsys.readouterr().err
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3]


def test_a_logger_that_hangs_never_blocks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sinks, "QUEUE_ROWS", 5)
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(Failing, "open", lambda self: time.sleep(60))
    sink, started = Failing(Place("p", "n", tmp_path, {})), time.monotonic()
    for step in range(50):
        sink.log(step, {"loss": 0.0})
    sink.close()
    assert time.monotonic() - started < 20 and f"too slow for {sink.dropped} rows" in capsys.readouterr().err


def test_which_loggers_are_opened(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "")
    opened = []
    kinds = {name: lambda place, name=name: opened.append(name) for name in loggers.KINDS}
    monkeypatch.setattr(loggers, "KINDS", kinds)
    for log, env, expected in [
        ("", "", []),
        ("", "offline", ["wandb"]),
        ("trackio, tensorboard", "", ["tensorboard", "trackio"]),
        ("tensorboard", "offline", ["wandb", "tensorboard"]),
        ("wandb", "", ["wandb"]),
    ]:
        opened.clear()
        monkeypatch.setenv("WANDB_MODE", env)
        loggers.open_sinks(log, Place("p", "n", tmp_path, {}))
        assert opened == expected


def test_wandb_without_a_key_says_what_it_needs(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "")
    (sink,) = loggers.open_sinks("wandb", Place("p", "n", tmp_path, {}))
    sink.close()
    assert "W&B is off for this run, metrics.jsonl has everything: set WANDB_API_KEY" in capsys.readouterr().err


def test_an_unknown_logger_is_one_line():
    with pytest.raises(ConfigError, match="--log tensorbord: must be wandb, tensorboard, trackio"):
        config.resolve("grpo", flags={"log": "tensorbord"})
