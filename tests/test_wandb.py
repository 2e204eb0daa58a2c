"""W&B is a guest: asked in by the environment, never able to block or fail a run."""

from __future__ import annotations

import json
import sys
import time
import types

import pytest

from grpo_gsm8k import grpo, sft
from grpo_gsm8k.runs import sinks, wandb_sink
from grpo_gsm8k.runs.sinks import Place
from tests.toys import stage_config


class FakeError(Exception):
    """What the fake wandb raises."""


class FakeTable:
    """A table that keeps its rows by column, and grows."""

    def __init__(self, columns, data, allow_mixed_types, log_mode):
        assert allow_mixed_types  # an answer may be missing in the first row and a text in the second
        assert log_mode == "INCREMENTAL" and not data  # any other mode forgets, or uploads every row again
        self.columns, self.rows = columns, []

    def add_data(self, *row):
        self.rows.append(dict(zip(self.columns, row, strict=True)))


@pytest.fixture
def fake(monkeypatch):
    """A wandb that records what it is told, and can be made to fail or to hang."""
    said = {"rows": [], "numbers": [], "axes": {}, "summary": {}, "init": None, "fail": None, "hang": 0.0}

    class FakeRun:
        summary, step = said["summary"], 0

        def define_metric(self, name, step_metric):
            assert name not in said["axes"]
            said["axes"][name] = step_metric

        def log(self, row, step):
            time.sleep(said["hang"])
            if said["fail"] == "log":
                raise FakeError("no more")
            assert all(name in said["axes"] for name in row if name not in said["axes"].values())
            said["rows"].append(row)
            said["numbers"].append(step)

        def finish(self):
            said["finished"] = True

    def init(**kwargs):
        if said["fail"] == "init":
            raise FakeError("no network")
        said["init"], said["axes"] = kwargs, {}
        return FakeRun()

    wandb = types.ModuleType("wandb")
    wandb.Error, wandb.init, wandb.Settings = FakeError, init, lambda **kwargs: kwargs
    wandb.Table = FakeTable
    mailbox = types.ModuleType("wandb.sdk.mailbox")
    mailbox.HandleAbandonedError = mailbox.MailboxClosedError = FakeError
    for name, module in {
        "wandb": wandb,
        "wandb.sdk": types.ModuleType("wandb.sdk"),
        "wandb.sdk.mailbox": mailbox,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return said


def run(tiny, out, **more):
    flags = {"model_id": str(tiny.model), "data": str(tiny.data), "out_dir": str(out), "resume": True}
    return sft.run(stage_config("sft", **{**flags, "max_steps": 3, "batch_size": 8, "eval_every": 1000, **more}))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_reach_it_with_their_steps_and_a_resumed_run_keeps_its_id(fake, tiny, tmp_path):
    run(tiny, tmp_path / "run")
    assert [row["step"] for row in fake["rows"]] == [1, 2, 3] and fake["finished"]
    assert fake["rows"][0].keys() >= {"loss", "policy/grad_norm"} and fake["init"]["config"]["batch_size"] == 8
    assert set(fake["axes"].values()) == {"step"}
    first = fake["init"]["id"]
    run(tiny, tmp_path / "run", max_steps=4)
    assert fake["init"]["id"] == first and fake["rows"][-1]["step"] == 4
    assert fake["numbers"] == sorted(set(fake["numbers"]))  # also without a server to say where the first part ended


def test_a_late_evaluation_stands_over_its_own_step(fake, tmp_path):
    """What an evaluator says about step 2 while step 5 is being trained; wandb drops what goes back on its own step."""
    sink = wandb_sink.WandbSink(Place("p", "n", tmp_path, {}))
    for step in (4, 5):
        sink.log(step, {"loss": 1.0 / step})
    sink.log(2, {"val/accuracy": 0.2})
    sink.log(4, {"val/accuracy": 0.4})
    sink.log(6, {"loss": 0.1, "val/accuracy": 0.6})
    sink.close()
    training = [{"step": 4, "loss": 0.25}, {"step": 5, "loss": 0.2}, {"step": 6, "loss": 0.1}]
    validation = [{"val/step": step, "val/accuracy": step / 10} for step in (2, 4, 6)]
    assert [row for row in fake["rows"] if "step" in row] == training
    assert [row for row in fake["rows"] if "step" not in row] == validation
    assert fake["axes"] == {"loss": "step", "val/accuracy": "val/step"}
    assert fake["numbers"] == sorted(set(fake["numbers"]))  # wandb drops a row whose number is not above the last


def test_what_a_resumed_run_says_again_is_there_already(fake, tmp_path):
    fake["summary"].update({"step": 5, "val/step": 4})
    sink = wandb_sink.WandbSink(Place("p", "n", tmp_path, {}))
    for step in (4, 5, 6):
        sink.log(step, {"loss": 0.0, "val/accuracy": 0.0})
    sink.close()
    # of the last step the page may have had the samples only
    assert [row.get("step") or -row["val/step"] for row in fake["rows"]] == [-4, 5, -5, 6, -6]


def test_validation_samples_are_a_table_with_the_reference_solutions(fake, tiny, tmp_path):
    run(tiny, tmp_path / "run", max_steps=2, eval_every=2)
    problems = rows_of(tiny.data / "val.jsonl")[:4]
    (row,) = [row for row in fake["rows"] if "val/samples" in row]
    table = row["val/samples"].rows
    assert row["val/step"] == 2 and [(t["id"], t["answer"]) for t in table] == [
        (p["id"], p["answer"]) for p in problems
    ]
    kept = rows_of(tmp_path / "run/evals/step_000002.jsonl")
    assert [k["answer"] for k in kept] == [p["answer"] for p in problems]
    for key in ("question", "response", "gold", "correct", "tokens"):
        assert [t[key] for t in table] == [k[key] for k in kept]


def test_rollouts_are_a_table_with_their_rewards_of_bounded_length(fake, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "TABLE_ROWS", 5)
    flags = {"model_id": str(tiny.model), "data": str(tiny.data), "out_dir": str(tmp_path / "run"), "eval_every": 1}
    flags |= {"rollouts_per_step": 8, "group_size": 4, "max_steps": 1, "reward": "tests.toys:even_tokens"}
    grpo.run(stage_config("grpo", **flags))
    kept = rows_of(tmp_path / "run/samples/step_000001.jsonl")
    (row,) = [row for row in fake["rows"] if "samples" in row]
    assert row["step"] == 1 and len(kept) == 8
    assert [t["reward"] for t in row["samples"].rows] == [k["reward"] for k in kept[:5]]
    assert len({t["reward"] for t in row["samples"].rows}) > 1


@pytest.mark.parametrize("fail", ["init", "log"])
def test_what_it_raises_ends_the_sink_and_not_the_run(fail, fake, tiny, tmp_path, capsys):
    fake["fail"] = fail
    assert run(tiny, tmp_path / "run")["step"] == 3
    assert "W&B is off for this run" in capsys.readouterr().err
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3


def test_a_slow_one_never_blocks_and_drops_are_counted(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sinks, "QUEUE_ROWS", 5)
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.1)
    fake["hang"] = 60.0
    sink, started = wandb_sink.WandbSink(Place("p", "n", tmp_path, {})), time.monotonic()
    for step in range(50):
        sink.log(step, {"loss": 0.0})
    sink.close()
    assert time.monotonic() - started < 20 and sink.dropped >= 40
    assert f"too slow for {sink.dropped} rows" in capsys.readouterr().err


def test_only_a_key_or_offline_mode_asks_for_it(monkeypatch):
    for mode, key, expected in [("", "", False), ("", "k", True), ("offline", "", True), ("disabled", "k", False)]:
        monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.setenv("WANDB_API_KEY", key)
        assert wandb_sink.wanted() is expected


def test_eval_has_a_page_of_its_own(fake, tiny, tmp_path, monkeypatch):
    from grpo_gsm8k import config, fast_eval_vllm

    monkeypatch.setenv("WANDB_MODE", "offline")
    where = {"model_id": str(tiny.model), "eval_path": str(tiny.data / "val.jsonl"), "out_dir": str(tmp_path)}
    flags = {**where, "limit": 3, "max_new_tokens": 4, "prompt_style": "gsm8k", "device": "cpu", "run_name": "mine"}
    result = fast_eval_vllm.run(config.resolve("eval", flags=flags))
    assert fake["init"]["name"] == "mine" and fake["init"]["project"] == "grpo-gsm8k" and fake["finished"]
    logged = {key: value for row in fake["rows"] for key, value in row.items()}
    assert logged["val/accuracy"] == result["accuracy"] and len(logged["val/samples"].rows) == 3


def test_the_samples_of_all_steps_stay_in_one_table(fake, tmp_path):
    sink = wandb_sink.WandbSink(Place("p", "n", tmp_path, {}))
    for step in (2, 4):
        sink.table(step, "val/samples", [{"id": f"{step}-{k}", "tokens": k} for k in range(3)])
    sink.close()
    tables = [row["val/samples"] for row in fake["rows"]]
    assert tables[0] is tables[1] and [row["val/step"] for row in fake["rows"]] == [2, 4]
    assert [(row["step"], row["id"]) for row in tables[1].rows] == [(s, f"{s}-{k}") for s in (2, 4) for k in range(3)]
