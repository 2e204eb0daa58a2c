"""The asynchronous evaluator: training never waits for it, no job is lost, no record has another step's weights."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_gsm8k import config, sft
from grpo_gsm8k.config import EngineConfig
from grpo_gsm8k.engines.process import Engine
from grpo_gsm8k.errors import ConfigError, DataError, EngineError
from grpo_gsm8k.evals.evaluator import AsyncEvaluator
from grpo_gsm8k.trainer.policy import weights_sha256
from grpo_gsm8k.workbench import open_workbench
from tests.toys import load_split, stage_config


def weights(step):
    return [("w", torch.full((3,), float(step)))]


@pytest.fixture
def evaluator(tmp_path):
    """Evaluators over a fake engine that answers once the gate is open."""
    made = []

    def make(fault="", backlog="all", gate="gate", **start):
        cfg = config.build(EngineConfig, {"device": "cpu", "engine_patience_s": 20.0})
        renderer = SimpleNamespace(as_json=dict)
        start |= {"fault": fault, "marker": str(tmp_path / "marker"), "gate": str(tmp_path / gate)}
        engine = Engine(cfg, renderer, ["cpu"], module="tests.fake_engine", **start)
        made.append(AsyncEvaluator(engine, tmp_path / "pending", backlog))
        return made[-1]

    yield make
    for each in made:
        each.close()


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def named(found):
    return [(step, evaluation.weights_sha256) for step, evaluation in found]


def test_training_goes_on_while_jobs_wait_and_each_comes_back_under_its_own_step(evaluator, tmp_path):
    judge = evaluator()
    live = torch.full((3,), 1.0)  # changed after it was handed in, as a training model is
    judge.submit(1, [("w", live)])
    live += 1
    judge.submit(2, [("w", live)])
    live += 1
    judge.submit(3, [("w", live)])
    assert judge.results() == [] and judge.metrics()["eval/waiting"] == 3
    (tmp_path / "gate").touch()
    assert named(judge.drain()) == [(step, weights_sha256(weights(step))) for step in (1, 2, 3)]
    assert judge.results() == [] and judge.metrics()["eval/waiting"] == 0


def test_what_waits_is_dropped_for_the_latest_when_so_chosen(evaluator, tmp_path):
    judge = evaluator(backlog="latest")
    judge.submit(1, weights(1))
    until(lambda: judge._running)
    for step in (2, 3, 4):
        judge.submit(step, weights(step))
    (tmp_path / "gate").touch()
    assert [step for step, _ in judge.drain()] == [1, 4]
    assert judge.metrics()["eval/dropped"] == 2
    until(lambda: {p.stem for p in (tmp_path / "pending").glob("*")} == {"step_000001", "step_000004"})


def test_a_killed_evaluator_is_started_again_and_loses_nothing(evaluator, tmp_path):
    (tmp_path / "gate").touch()
    judge = evaluator("die_in_judge")
    judge.submit(1, weights(1))
    judge.submit(2, weights(2))
    assert named(judge.drain()) == [(step, weights_sha256(weights(step))) for step in (1, 2)]
    assert judge.metrics()["eval/restarts"] == 1


def test_an_evaluator_that_fails_for_good_stops_the_run(evaluator):
    judge = evaluator("die_in_judge", always=True)
    judge.submit(1, weights(1))
    with pytest.raises(EngineError, match="times in a row"):
        judge.drain()
    with pytest.raises(EngineError):
        judge.results()


def test_a_record_of_other_weights_is_never_believed(evaluator, tmp_path):
    (tmp_path / "gate").touch()
    judge = evaluator("other_weights")
    judge.submit(1, weights(1))
    assert named(judge.drain()) == [(1, weights_sha256(weights(1)))]  # asked again
    assert judge.metrics()["eval/restarts"] == 1
    liar = evaluator("other_weights", always=True)
    liar.submit(2, weights(2))
    with pytest.raises(EngineError, match="other weights"):
        liar.drain()


def test_a_bug_in_its_threads_reaches_whoever_waits(evaluator, monkeypatch):
    judge = evaluator()
    monkeypatch.setattr(judge.engine, "ask", lambda *args, **fields: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # it is raised there, too
    judge.submit(1, weights(1))
    with pytest.raises(ZeroDivisionError):
        judge.drain()


def test_what_a_killed_run_still_owes_is_found_by_the_next(evaluator, tmp_path):
    first = evaluator(gate="closed")
    for step in (1, 2, 3):
        first.submit(step, weights(step))
    notes = [tmp_path / "pending" / f"step_00000{step}.json" for step in (1, 2, 3)]
    until(lambda: all(note.exists() for note in notes))
    first.close()
    damaged = tmp_path / "pending" / "step_000002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / "gate").touch()
    second = evaluator(check=True)
    assert named(second.drain()) == [(step, weights_sha256(weights(step))) for step in (1, 3)]
    assert second.metrics()["eval/lost"] == 1
    second.settle(1)
    second.settle(3)
    assert not list((tmp_path / "pending").glob("*"))


def sft_flags(tiny, out, **flags):
    where = {"model_id": str(tiny.model), "data": str(tiny.data), "out_dir": str(out)}
    sizes = {"epochs": 1, "batch_size": 8, "lr": 1e-3, "eval_every": 2, "save_every": 1, "keep_last": 10}
    return {**where, **sizes, "eval_mode": "async", **flags}


def test_fine_tuning_is_evaluated_by_another_process_under_the_right_hashes(tiny, tmp_path):
    """The real thing: six steps, evaluated at 2, 4 and 6, and the same records as inline."""
    run = tmp_path / "run"
    sft.run(stage_config("sft", **sft_flags(tiny, run)))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(row["step"] for row in rows if "val/accuracy" in row) == [2, 4, 6]
    for step in (2, 4, 6):
        stored = AutoModelForCausalLM.from_pretrained(run / f"checkpoints/step_{step:06d}")
        digest = weights_sha256(stored.named_parameters())
        records = [json.loads(line) for line in (run / f"evals/step_{step:06d}.jsonl").read_text().splitlines()]
        assert len(records) == 4 and {record["weights_sha256"] for record in records} == {digest}
    assert not list((run / "evals/pending").glob("*"))
    inline = tmp_path / "inline"
    sft.run(stage_config("sft", **sft_flags(tiny, inline, eval_mode="inline")))
    for step in (2, 4, 6):
        name = f"evals/step_{step:06d}.jsonl"
        assert (run / name).read_bytes() == (inline / name).read_bytes()


class Killed(BaseException):
    """Ends a run as a kill would: nobody handles it."""


def test_a_resumed_run_evaluates_what_it_owed_and_nothing_twice(tiny, tmp_path, evaluator, monkeypatch):
    """Killed in step 5 with the evaluations of 2 and 4 owed; the newest checkpoint is that of step 3."""
    run, fit = tmp_path / "run", sft.fit_step

    def train(gate, killed_at):
        def fit_step(cfg, bench, rows, step, lr, **more):
            if step == killed_at:
                until(lambda: len(list((run / "evals/pending").glob("*.json"))) == 2)
                raise Killed
            return fit(cfg, bench, rows, step, lr, **more)

        monkeypatch.setattr(sft, "fit_step", fit_step)
        cfg = stage_config("sft", **sft_flags(tiny, run, eval_mode="inline", save_every=3, resume=True))
        with open_workbench(cfg, "sft", {"train": tiny.data / "train.jsonl"}) as bench:
            bench.evaluator = evaluator(gate=gate, check=True)
            bench.evaluator.pending = run / "evals/pending"
            rows = [bench.renderer.target(problem) for problem in load_split(tiny.data, "train")]
            sft.train(cfg, bench, rows)
            bench.finish()

    with pytest.raises(Killed):
        train("closed", killed_at=5)
    (tmp_path / "gate").touch()
    train("gate", killed_at=0)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(row["step"] for row in rows if "val/accuracy" in row) == [2, 4, 6]
    assert sorted(row["step"] for row in rows if "loss" in row) == [1, 2, 3, 4, 5, 6]
    whole = tmp_path / "whole"
    sft.run(stage_config("sft", **sft_flags(tiny, whole, eval_mode="inline")))
    for step in (2, 4, 6):
        mine, theirs = (
            json.loads((folder / f"evals/step_{step:06d}.jsonl").read_text().splitlines()[0])["weights_sha256"]
            for folder in (run, whole)
        )
        assert mine == theirs
    assert not list((run / "evals/pending").glob("*"))


def test_fine_tuning_refuses_to_start_without_an_evaluation_set(tiny, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        sft.run(stage_config("sft", **sft_flags(tiny, tmp_path / "run", eval_set_path=str(tmp_path / "none.jsonl"))))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "1+1?", "answer": "two"}\n')
    with pytest.raises(DataError, match=r"broken\.jsonl:1"):
        sft.run(stage_config("sft", **sft_flags(tiny, tmp_path / "run", eval_set_path=str(broken))))
    with pytest.raises(ConfigError, match="always evaluated"):
        sft.run(stage_config("sft", **sft_flags(tiny, tmp_path / "run", eval_every=0)))
    assert not (tmp_path / "run").exists()
