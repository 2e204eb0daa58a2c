"""Runs that stop anywhere go on as if nothing had happened; damage is noticed; a full disk harms nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grpo_gsm8k import ei, grpo, sft
from grpo_gsm8k.errors import CheckpointError, DataError, DiskError, Interrupted, RunDirError
from grpo_gsm8k.runs.directory import open_run
from grpo_gsm8k.tasks.rewards import make_reward
from grpo_gsm8k.trainer import checkpoint, loop
from grpo_gsm8k.workbench import open_workbench
from tests.toys import REPOSITORY, cli, graded, load_split, stage_config

REWARD = "tests.toys:even_tokens"  # varies within the groups of a random model, so that every step moves the weights
STAGES = {"sft": sft.run, "ei": ei.run, "grpo": grpo.run, "one_step_off": grpo.run}
FLAGS = {
    "sft": {"epochs": 1, "batch_size": 8, "lr": 1e-3},
    "ei": {"rounds": 2, "steps_per_round": 3, "prompts_per_round": 12, "batch_size": 4, "lr": 1e-3},
    "one_step_off": {"steps": 6, "rollouts_per_step": 8, "group_size": 4, "lr": 1e-2, "reward": REWARD}
    | {"mode": "one_step_off"},
    "grpo": {"steps": 6, "rollouts_per_step": 8, "group_size": 4, "epochs": 2, "lr": 1e-3, "reward": REWARD},
}


def config_of(stage, tiny, out, **flags):
    common = {"model_id": str(tiny.model), "data": str(tiny.data), "out_dir": str(out), "resume": True}
    common |= {"eval_every": 2, "save_every": 1, "keep_last": 10, "deterministic": True}
    return stage_config("grpo" if stage == "one_step_off" else stage, **{**common, **FLAGS[stage], **flags})


def story(run: Path):
    """What a run said and drew, without the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]
    files = sorted(p for folder in ("samples", "evals", "rounds") for p in (run / folder).glob("*"))
    return metrics, {p.relative_to(run): p.read_bytes() for p in files}


@pytest.fixture
def every_answer_right(monkeypatch):
    """A random model solves nothing; for expert iteration to have something to learn from, say it does."""
    monkeypatch.setattr(ei, "keep_right", lambda cfg, group: list(group[:2]))


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_in_pieces_is_the_run_in_one(stage, tiny, tmp_path, every_answer_right):
    whole = STAGES[stage](config_of(stage, tiny, tmp_path / "whole"))
    assert whole["step"] == 6
    for stop in (1, 2, 4, 5, 0):
        pieces = STAGES[stage](config_of(stage, tiny, tmp_path / "pieces", max_steps=stop))
    assert pieces["weights_sha256"] == whole["weights_sha256"]
    assert story(tmp_path / "pieces") == story(tmp_path / "whole")
    assert (
        whole["weights_sha256"] != STAGES[stage](config_of(stage, tiny, tmp_path / "other", seed=1))["weights_sha256"]
    )


def test_the_kl_holds_a_resumed_run_to_the_same_reference(tiny, tmp_path):
    """To the model that the run began with, not to the checkpoint that it goes on from."""
    flags = {"kl_coef": 0.5, "steps": 4}
    whole = grpo.run(config_of("grpo", tiny, tmp_path / "whole", **flags))
    for stop in (2, 0):
        pieces = grpo.run(config_of("grpo", tiny, tmp_path / "pieces", max_steps=stop, **flags))
    assert pieces["weights_sha256"] == whole["weights_sha256"]
    assert story(tmp_path / "pieces") == story(tmp_path / "whole")
    assert whole["weights_sha256"] != grpo.run(config_of("grpo", tiny, tmp_path / "no_kl", steps=4))["weights_sha256"]


def test_a_reference_that_has_changed_since_the_run_began_is_refused(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    flags = {"kl_coef": 0.5, "model_id": str(model)}
    grpo.run(config_of("grpo", tiny, tmp_path / "run", max_steps=1, **flags))
    trained = tmp_path / "run/checkpoints/step_000001/model.safetensors"
    shutil.copy(trained, model / "model.safetensors")
    with pytest.raises(CheckpointError, match="began from other weights"):
        grpo.run(config_of("grpo", tiny, tmp_path / "run", **flags))


def test_what_was_logged_after_the_checkpoint_is_said_once(tiny, tmp_path):
    """A kill between checkpoints: the log runs ahead, half a line at its end."""
    whole = grpo.run(config_of("grpo", tiny, tmp_path / "whole"))
    run = tmp_path / "killed"
    grpo.run(config_of("grpo", tiny, run, max_steps=4))
    for step in (3, 4):
        shutil.rmtree(run / f"checkpoints/step_{step:06d}")
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "reward/me')
    (run / "checkpoints" / ".writing_000003").mkdir()
    again = grpo.run(config_of("grpo", tiny, run))
    assert again["weights_sha256"] == whole["weights_sha256"] and story(run) == story(tmp_path / "whole")


def test_the_history_follows_the_log_forward_and_back(tmp_path):
    with open_run(stage_config("grpo", out_dir=str(tmp_path / "run")), "grpo", {}) as run:
        for step in (1, 2, 3):
            run.log(step, {"loss": float(step)})
            assert [row["step"] for row in run.history()] == list(range(1, step + 1))
        run.rewind(1)
        run.log(2, {"loss": 5.0})
        assert run.history() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 5.0}]
        assert run.metric_history("loss") == {1: 1.0, 2: 5.0}


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "manifest"])
def test_a_damaged_newest_checkpoint_is_refused_and_the_one_before_it_used(tiny, tmp_path, damage, capsys):
    whole = grpo.run(config_of("grpo", tiny, tmp_path / "whole"))
    run = tmp_path / "damaged"
    grpo.run(config_of("grpo", tiny, run, max_steps=4))
    weights = run / "checkpoints/step_000004/model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "lose":
        weights.unlink()
    else:
        (run / "checkpoints/step_000004/manifest.json").write_text("{")
    again = grpo.run(config_of("grpo", tiny, run))
    assert "step_000004" in capsys.readouterr().err
    assert again["weights_sha256"] == whole["weights_sha256"] and story(run) == story(tmp_path / "whole")


def test_when_every_checkpoint_is_damaged_the_run_says_so(tiny, tmp_path):
    grpo.run(config_of("grpo", tiny, tmp_path / "run", max_steps=2))
    for folder in (tmp_path / "run/checkpoints").iterdir():
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="all checkpoints are damaged"):
        grpo.run(config_of("grpo", tiny, tmp_path / "run"))


def test_another_stage_config_or_input_is_refused(tiny, tmp_path):
    run = tmp_path / "run"
    grpo.run(config_of("grpo", tiny, run, max_steps=1))
    with pytest.raises(RunDirError, match="a run of grpo, not of sft"):
        sft.run(config_of("sft", tiny, run))
    with pytest.raises(RunDirError, match=r"clip_eps: 0\.2 then, 0\.3 now"):
        grpo.run(config_of("grpo", tiny, run, clip_eps=0.3))
    other = tmp_path / "data"
    shutil.copytree(tiny.data, other)
    lines = (other / "train.jsonl").read_text().splitlines(keepends=True)
    (other / "train.jsonl").write_text("".join(lines[1:]))
    cfg = config_of("grpo", tiny, run, data=str(other))
    stored = (run / "config.toml").read_text()
    (run / "config.toml").write_text(stored.replace(str(tiny.data), str(other)))  # the folder moved, the data changed
    with pytest.raises(DataError, match="has changed since"):
        grpo.run(cfg)


def test_two_processes_never_write_one_run(tiny, tmp_path):
    cfg = config_of("grpo", tiny, tmp_path / "run")
    with open_run(cfg, "grpo", {}), pytest.raises(RunDirError, match="another process"), open_run(cfg, "grpo", {}):
        pass
    with open_run(cfg, "grpo", {}):
        pass


def test_a_folder_with_other_files_is_left_alone(tiny, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RunDirError, match="thesis"):
        grpo.run(config_of("grpo", tiny, tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) in (["thesis.txt"], [".lock", "thesis.txt"])


def test_retention_keeps_the_last_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        checkpoint.write(tmp_path, step, lambda folder: (folder / "w").write_text("x"), {})
    checkpoint.retain(tmp_path, keep_last=2, best=2)
    assert checkpoint.steps_present(tmp_path) == [2, 4, 5]


def test_a_kill_in_the_middle_of_a_deletion_leaves_whole_checkpoints(tmp_path, monkeypatch):
    """Half a checkpoint has no record any more of what it stands for at a service, and could not be forgotten."""
    for step in (1, 2):
        checkpoint.write(tmp_path, step, lambda folder: (folder / "w").write_text("x"), {})
    forgotten, rmtree = [], shutil.rmtree

    def killed(folder: Path) -> None:
        (folder / checkpoint.MANIFEST).unlink()
        raise KeyboardInterrupt

    def forget(folder: Path) -> None:
        forgotten.append(checkpoint.verify(folder)["step"])

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.retain(tmp_path, 1, None, forget)
    assert [
        checkpoint.verify(tmp_path / f"step_{step:06d}")["step"] for step in checkpoint.steps_present(tmp_path)
    ] == [2]
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    checkpoint.retain(tmp_path, 1, None, forget)
    assert forgotten == [1] and [path.name for path in tmp_path.iterdir()] == ["step_000002"]


def test_a_full_disk_stops_the_run_and_the_last_checkpoint_stays_good(tiny, tmp_path):
    """On a real, tiny file system where the machine allows one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(p.stat().st_size for p in tiny.model.glob("*"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={8 * size}", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs rights that this process lacks")
    try:
        run = disk / "run"
        with pytest.raises(DiskError, match="cannot be written"):
            grpo.run(config_of("grpo", tiny, run))
        _folder, state = checkpoint.newest(run / "checkpoints", print)
        assert state["step"] >= 1 and not list((run / "checkpoints").glob(".writing*"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_while_weights_are_written(tmp_path):
    from safetensors import SafetensorError

    checkpoint.write(tmp_path, 1, lambda folder: (folder / "w").write_text("x"), {})

    def full(folder):
        (folder / "half").write_text("half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(DiskError, match="No space left"):
        checkpoint.write(tmp_path, 2, full, {})
    assert checkpoint.newest(tmp_path, print)[1]["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def test_an_interrupt_finishes_the_step_and_writes_its_checkpoint(tiny, tmp_path):
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs have none
    whole = grpo.run(config_of("grpo", tiny, tmp_path / "whole"))
    run = tmp_path / "run"
    with pytest.raises(Interrupted) as caught:
        interrupted_at(3, config_of("grpo", tiny, run, save_every=100))
    assert caught.value.exit_code == 130 and "--resume" in str(caught.value)
    assert checkpoint.steps_present(run / "checkpoints") == [3]
    assert signal.getsignal(signal.SIGINT) is before
    again = grpo.run(config_of("grpo", tiny, run, save_every=100))
    assert again["weights_sha256"] == whole["weights_sha256"] and story(run) == story(tmp_path / "whole")


def test_pressed_twice_the_last_complete_step_is_kept_and_goes_on_bitwise(tiny, tmp_path):
    whole = grpo.run(config_of("grpo", tiny, tmp_path / "whole"))
    run = tmp_path / "run"
    with pytest.raises(Interrupted) as caught:
        interrupted_at(3, config_of("grpo", tiny, run, save_every=100), times=2)
    assert caught.value.exit_code == 130 and "step 2 is saved" in str(caught.value)
    assert checkpoint.steps_present(run / "checkpoints") == [2]
    again = grpo.run(config_of("grpo", tiny, run, save_every=100))
    assert again["weights_sha256"] == whole["weights_sha256"] and story(run) == story(tmp_path / "whole")


def interrupted_at(step, cfg, times=1):
    """Run GRPO, with Ctrl-C pressed in the middle of a step."""
    with open_workbench(cfg, "grpo", {"train": Path(cfg.data) / "train.jsonl"}) as bench:
        sample = bench.sampler.sample

        def pressing(prompts, params):
            if bench.sampler.version == step - 1 and len(prompts[0].seeds) > 1:
                for _ in range(times):
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # sampling has its own thread
                    time.sleep(0.3)
            return sample(prompts, params)

        bench.sampler.sample = pressing
        prompts = bench.prompts(load_split(Path(cfg.data), "train"), cfg.data)
        grpo.train(cfg, bench, prompts, graded(bench, make_reward(cfg.reward)))


def grpo_flags(tiny, out):
    flags = ["--model_id", tiny.model, "--data", tiny.data, "--out_dir", out, "--device", "cpu"]
    flags += ["--prompt_style", "gsm8k", "--max_new_tokens", "12", "--rollouts_per_step", "16", "--group_size", "4"]
    flags += ["--eval_examples", "4", "--eval_every", "2", "--save_every", "2", "--deterministic", "--lr", "1e-3"]
    flags += ["--reward", REWARD]
    return [*map(str, flags), "--set", "steps=12", "--resume", "--json"]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20])
@pytest.mark.parametrize("flag", ["--async_save", "--no_async_save"])
def test_kill_9_and_resume_is_bitwise_the_uninterrupted_run(flag, kills, tiny, tmp_path):
    """One command line in a restart loop; killed at moments spread over sampling, updates and checkpoints.

    Every other kill comes as soon as a checkpoint is being written.
    """
    whole = cli("grpo", *grpo_flags(tiny, tmp_path / "whole"), "--no_async_save")
    assert whole.returncode == 0, whole.stderr
    run, killed, writing = tmp_path / "killed", 0, 0
    command = [sys.executable, "-m", "grpo_gsm8k.cli", "grpo", *grpo_flags(tiny, run), flag]
    while killed < kills:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        goal, left = size_of(run) + 1 + killed % 5, unfinished(run)
        while process.poll() is None and size_of(run) < goal:
            time.sleep(0.002)
        if killed % 2:
            while process.poll() is None and unfinished(run) <= left:
                time.sleep(0.001)
        else:
            time.sleep(0.013 * (killed % 7))  # not always at the same place of a step
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        killed += 1
        writing += not unfinished(run) <= left
    assert killed >= min(kills, 2) and writing  # a quick machine is done before the twentieth
    print(f"{killed} kills, {writing} of them while a checkpoint was written")
    again = cli("grpo", *grpo_flags(tiny, run), flag)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["weights_sha256"] == json.loads(whole.stdout)["weights_sha256"]
    assert story(run) == story(tmp_path / "whole")


def unfinished(run: Path) -> set[tuple[str, int]]:
    """The checkpoints that a kill has left, or that are being written: names and inodes."""
    found = set()
    for path in run.glob("checkpoints/.writing_*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def size_of(run: Path) -> int:
    """Rows logged so far."""
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def test_step_zero_is_a_checkpoint_when_there_is_nothing_to_do(tiny, tmp_path):
    cfg = config_of("grpo", tiny, tmp_path / "run")
    with open_workbench(cfg, "grpo", {}) as bench:
        assert list(loop.steps(bench.run, bench.learner, 0, loop.StageState())) == []
        assert checkpoint.steps_present(bench.run.checkpoints) == [0]
