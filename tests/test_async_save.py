"""Checkpoints that a thread writes: the same bytes, never a later step's, and the thread's error reaches the run."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time

import pytest
import torch

from grpo_gsm8k import grpo
from grpo_gsm8k.errors import DiskError, Interrupted
from grpo_gsm8k.runs.writer import Writer
from grpo_gsm8k.trainer import checkpoint, loop, snapshot
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.policy import load_model, load_tokenizer
from grpo_gsm8k.trainer.snapshot import Buffers, free_main_memory
from grpo_gsm8k.workbench import open_workbench
from tests.test_resume import config_of, size_of, story, unfinished
from tests.toys import train_config


@pytest.fixture
def held_back(monkeypatch):
    """Writes of checkpoints that wait for `go`; `begun` has the steps that a thread has begun to write."""
    real, go, begun = checkpoint.write, threading.Event(), []

    def write(root, step, fill, state):
        if threading.current_thread() is not threading.main_thread():
            begun.append(step)
            assert go.wait(60)
        return real(root, step, fill, state)

    monkeypatch.setattr(checkpoint, "write", write)
    yield go, begun
    go.set()


def bench_of(tiny, out, **flags):
    return open_workbench(config_of("grpo", tiny, out, **flags), "grpo", {})


def walk(bench, steps, after=lambda step: None):
    """The loop, with a weight that says which step it is of."""
    weight = next(iter(bench.learner.model.parameters()))
    for step in loop.steps(bench.run, bench.learner, steps, loop.StageState()):
        with torch.no_grad():
            weight.fill_(float(step))
        bench.run.updated = step
        after(step)


def step_in(folder):
    """The step whose weights a checkpoint holds, by `walk`."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as stored:
        found = {float(stored.get_tensor(name).flatten()[0]) for name in stored.keys()}  # noqa: SIM118
    return max(found)


def test_the_files_are_those_of_a_run_that_waits(tiny, tmp_path):
    runs = {}
    for name, flag in (("thread", True), ("waits", False)):
        runs[name] = grpo.run(config_of("grpo", tiny, tmp_path / name, steps=3, async_save=flag))
    assert runs["thread"]["weights_sha256"] == runs["waits"]["weights_sha256"]
    assert story(tmp_path / "thread") == story(tmp_path / "waits")
    for step in (1, 2, 3):
        files = [
            {p.relative_to(run): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
            for run in (tmp_path / name / f"checkpoints/step_{step:06d}" for name in runs)
        ]
        assert files[0] == files[1] and len(files[0]) > 5


def test_the_next_step_begins_before_the_checkpoint_is_written_and_the_copy_stays_as_it_was(tiny, tmp_path, held_back):
    go, begun = held_back

    def after(step):
        present = checkpoint.steps_present(bench.run.checkpoints)
        if step in (3, 4):  # the checkpoint of step 2 is under way
            assert begun == [2] and present == [] and bench.run.writer.writes(2)
        if step == 4:
            go.set()

    with bench_of(tiny, tmp_path / "run", save_every=2) as bench:
        walk(bench, 5, after)
        folders = {step: bench.run.checkpoints / f"step_{step:06d}" for step in (2, 4, 5)}
        assert checkpoint.steps_present(bench.run.checkpoints) == [2, 4, 5]
        assert {step: step_in(folder) for step, folder in folders.items()} == {2: 2.0, 4: 4.0, 5: 5.0}


@pytest.mark.parametrize("fault", [DiskError("no space"), ZeroDivisionError("a bug")])
def test_an_error_of_the_thread_ends_the_run_and_the_checkpoint_before_stays(tiny, tmp_path, monkeypatch, fault):
    real = checkpoint.write

    def write(root, step, fill, state):
        if step == 2:
            raise fault
        return real(root, step, fill, state)

    monkeypatch.setattr(checkpoint, "write", write)
    with pytest.raises(type(fault), match=str(fault)), bench_of(tiny, tmp_path / "run") as bench:
        walk(bench, 9, lambda step: time.sleep(0.1))
    assert bench.run.complete < 9
    assert checkpoint.newest(bench.run.checkpoints, print)[1]["step"] == 1


def test_an_error_of_the_run_waits_for_the_thread(tiny, tmp_path, held_back, capsys):
    go, _ = held_back

    def fail(step):
        if step == 2:
            threading.Timer(0.3, go.set).start()
            raise ZeroDivisionError("the run's own")

    with pytest.raises(ZeroDivisionError, match="the run's own"), bench_of(tiny, tmp_path / "run") as bench:
        walk(bench, 5, fail)
    assert checkpoint.newest(tmp_path / "run/checkpoints", print)[1]["step"] == 1


def test_both_errors_are_said_and_the_runs_own_is_raised(capsys):
    def full():
        raise DiskError("/disk: no space")

    writer = Writer()
    writer.start(7, full)
    writer.close()
    assert "the checkpoint of step 7 is lost: /disk: no space" in capsys.readouterr().err
    writer.wait()  # is said once


@pytest.mark.parametrize("presses", [1, 2])
def test_an_interrupt_waits_for_the_thread(tiny, tmp_path, held_back, presses):
    """Pressed once in step 3, the run ends after step 3; pressed twice, with the step that was being written."""
    go, _ = held_back

    def press(step):
        if step == 3:
            threading.Timer(0.3 * presses + 0.5, go.set).start()
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
                time.sleep(0.3)

    with pytest.raises(Interrupted) as caught, bench_of(tiny, tmp_path / "run", save_every=2) as bench:
        walk(bench, 9, press)
    assert caught.value.exit_code == 130
    saved = 3 if presses == 1 else 2
    assert f"step {saved} is saved" in str(caught.value)
    folder, state = checkpoint.newest(tmp_path / "run/checkpoints", print)
    assert state["step"] == step_in(folder) == saved


def test_the_state_is_that_of_its_step(tiny, tmp_path, held_back):
    go, _ = held_back

    class Said(loop.StageState):
        def __init__(self):
            self.said = []

        def as_json(self):
            return {"note": "", "said": self.said}

    with bench_of(tiny, tmp_path / "run", save_every=2) as bench:
        for step in loop.steps(bench.run, bench.learner, 3, state := Said()):
            state.said.append(step)
            if step == 3:
                go.set()
        assert checkpoint.verify(bench.run.checkpoints / "step_000002")["said"] == [1, 2]


def test_a_copy_that_does_not_fit_is_not_made(tiny, tmp_path, monkeypatch, held_back):
    monkeypatch.setattr(snapshot, "free_main_memory", lambda: 1000)
    with bench_of(tiny, tmp_path / "run") as bench:
        assert bench.learner.snapshot() is None
        walk(bench, 2)  # writes in this thread: nothing is held back
        assert checkpoint.steps_present(bench.run.checkpoints) == [1, 2]


def test_buffers_keep_what_is_tied_and_are_allocated_once():
    a, buffers = torch.arange(6.0).reshape(2, 3), Buffers()
    tensors = {"a": a, "tied": a[:], "turned": a.T, "step": torch.tensor(3)}
    assert buffers.missing_bytes(tensors) == 2 * 24 + 8
    first = buffers.copy(tensors)
    assert first["a"].data_ptr() == first["tied"].data_ptr() != a.data_ptr()
    assert buffers.missing_bytes(tensors) == 0
    places = {name: t.data_ptr() for name, t in first.items()}
    a.add_(1)
    assert first["a"][0].tolist() == [0, 1, 2] and first["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    second = buffers.copy(tensors)
    assert {name: t.data_ptr() for name, t in second.items()} == places and second["a"][0].tolist() == [1, 2, 3]


def test_free_main_memory_heeds_the_containers_limit(tmp_path):
    meminfo = tmp_path / "meminfo"
    assert free_main_memory(meminfo, tmp_path) is None
    meminfo.write_text("MemTotal:  900 kB\nMemAvailable:     500 kB\n")
    assert free_main_memory(meminfo, tmp_path) == 512_000
    for name, text in {"max": "400000\n", "current": "300000\n", "stat": "anon 5\ninactive_file 70000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_main_memory(meminfo, tmp_path) == 170_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_main_memory(meminfo, tmp_path) == 512_000


def test_the_copy_is_predicted_to_the_byte(tiny):
    """Weights and AdamW's moments of every parameter, a step counter of each tensor."""
    cfg = train_config(model_id=str(tiny.model))
    learner = TorchLearner(load_model(cfg), load_tokenizer(cfg), cfg)
    for master in learner.optimizer.masters.values():
        master.grad = torch.ones_like(master)
    learner.step(1e-3)
    learner.snapshot()
    held = {t.data_ptr(): t.numel() * t.element_size() for t in learner._buffers._held.values()}
    counters = 4 * len(learner.optimizer.masters)
    from grpo_gsm8k.trainer import costs, memory

    shape, setup = memory.shape_of(learner.model), costs.setup_of(cfg, 4, device="cpu")
    assert sum(held.values()) == costs.copy_bytes(shape, setup) + counters


@pytest.mark.slow
def test_twenty_kills_and_the_run_is_bitwise_the_one_that_waits(tiny, tmp_path):
    """Children of this process, which are there at once; every other one dies while a checkpoint is being written."""
    flags = {"steps": 100, "save_every": 2, "eval_every": 50, "rollouts_per_step": 4}
    whole = grpo.run(config_of("grpo", tiny, tmp_path / "whole", **flags, async_save=False))
    run, forked, writing = tmp_path / "killed", multiprocessing.get_context("fork"), 0
    cfg = config_of("grpo", tiny, run, **flags)
    for kill in range(20):
        goal, left = size_of(run) + 5, unfinished(run)
        child = forked.Process(target=grpo.run, args=(cfg,))
        child.start()
        while child.is_alive() and (unfinished(run) <= left if kill % 2 else size_of(run) < goal):
            time.sleep(0.001)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, "it was done before the twentieth kill"
        writing += not unfinished(run) <= left
    assert writing >= 5
    again = grpo.run(cfg)
    assert again["weights_sha256"] == whole["weights_sha256"] and story(run) == story(tmp_path / "whole")
