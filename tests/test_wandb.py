"""W&B is a guest: asked in by the environment, never able to block or fail a run."""

from __future__ import annotations

import sys
import time
import types

import pytest

from grpo_gsm8k import sft
from grpo_gsm8k.runs import wandb_sink
from tests.toys import stage_config


class FakeError(Exception):
    """What the fake wandb raises."""


@pytest.fixture
def fake(monkeypatch):
    """A wandb that records what it is told, and can be made to fail or to hang."""
    said = {"rows": [], "init": None, "fail": None, "hang": 0.0}

    class FakeRun:
        def log(self, row, step):
            time.sleep(said["hang"])
            if said["fail"] == "log":
                raise FakeError("no more")
            said["rows"].append((step, row))

        def finish(self):
            said["finished"] = True

    def init(**kwargs):
        if said["fail"] == "init":
            raise FakeError("no network")
        said["init"] = kwargs
        return FakeRun()

    wandb = types.ModuleType("wandb")
    wandb.Error, wandb.init, wandb.Settings = FakeError, init, lambda **kwargs: kwargs
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


def run(tiny, out):
    flags = {"model_id": str(tiny.model), "data": str(tiny.data), "out_dir": str(out), "resume": True}
    return sft.run(stage_config("sft", **flags, max_steps=3, batch_size=8, eval_every=0))


def test_rows_reach_it_with_their_steps_and_a_resumed_run_keeps_its_id(fake, tiny, tmp_path):
    run(tiny, tmp_path / "run")
    assert [step for step, _ in fake["rows"]] == [1, 2, 3] and fake["finished"]
    assert fake["rows"][0][1].keys() >= {"loss", "policy/grad_norm"} and fake["init"]["config"]["batch_size"] == 8
    first = fake["init"]["id"]
    flags = {"model_id": str(tiny.model), "data": str(tiny.data), "out_dir": str(tmp_path / "run"), "resume": True}
    sft.run(stage_config("sft", **flags, max_steps=4, batch_size=8, eval_every=0))
    assert fake["init"]["id"] == first and fake["rows"][-1][0] == 4


@pytest.mark.parametrize("fail", ["init", "log"])
def test_what_it_raises_ends_the_sink_and_not_the_run(fail, fake, tiny, tmp_path, capsys):
    fake["fail"] = fail
    assert run(tiny, tmp_path / "run")["step"] == 3
    assert "W&B is off for this run" in capsys.readouterr().err
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3


def test_a_slow_one_never_blocks_and_drops_are_counted(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb_sink, "QUEUE_ROWS", 5)
    monkeypatch.setattr(wandb_sink, "CLOSE_SECONDS", 0.1)
    fake["hang"] = 60.0
    sink, started = wandb_sink.WandbSink("p", "n", tmp_path, {}), time.monotonic()
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
