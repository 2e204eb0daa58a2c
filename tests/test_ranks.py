"""Several ranks are one learner: the same numbers, the same weights, the same checkpoints, and one end.

The quick tests fork three ranks around a model so small that one of them holds no part of some weights. The slow
ones are torchrun's: whole runs on 2 and 4 ranks, resumed on other numbers of them, interrupted and killed.

    python -m tests.test_ranks FOLDER        # the three ranks, by themselves
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from grpo_gsm8k.engines import channel, process
from grpo_gsm8k.engines.process import placements, trained_on
from grpo_gsm8k.errors import ConfigError, DiskError, NonFiniteError
from grpo_gsm8k.trainer import packing
from grpo_gsm8k.trainer.batch import make_batch
from grpo_gsm8k.trainer.costs import LEAST_CELLS, Setup
from grpo_gsm8k.trainer.data import weighted, with_old_logprobs, with_ref_logprobs
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.losses import GrpoClip, Objective
from grpo_gsm8k.trainer.memory import Gauge, shape_of
from grpo_gsm8k.trainer.policy import pick_device
from grpo_gsm8k.trainer.ranks import Lead, World, follow, world
from grpo_gsm8k.trainer.sharded import ShardedLearner, share
from tests.meter import LiveMemory
from tests.rehearsal import varlen_by_hand
from tests.toys import REPOSITORY, cli, rows, train_config

RANKS = 3
SAMPLED = {"policy/bf16_changed_frac": 0.3, "policy/update_to_weight": 0.05}
"""Each rank looks at a sample of its own shards, so these may differ by so much."""
POLICY = Objective(GrpoClip(0.2, 0.2), temperature=0.7, kl_coef=0.3)
SEQUENCES = [(range(3, 3 + n), p) for n, p in [(9, 4), (4, 1), (13, 6), (6, 2), (11, 3)]]


def small_update(advantage=0.5):
    drawn = [rows(s, advantage=(-1) ** i * (advantage + i), logprob=-3.0)[0] for i, s in enumerate(SEQUENCES)]
    return weighted(drawn, "sequence")


def make_learner(kind, dtype=torch.float32, **flags):
    """On a model of width 4: of its vectors, the third of three ranks holds nothing."""
    size = {"hidden_size": 4, "intermediate_size": 6, "num_attention_heads": 1, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=23, num_hidden_layers=2, tie_word_embeddings=True, **size))
    cfg = train_config(lr=1e-2, max_tokens_per_microbatch=13, weight_decay=0.1, grad_clip=0.5, **flags)
    return kind(model.to(dtype), SimpleNamespace(save_pretrained=lambda folder: None), cfg, reference=True)


def learn(learner, steps):
    """Updates with everything that is asked of a learner; what it said."""
    data, said = small_update(), []
    for step in steps:
        frozen, reference = (f(data, 0.7) for f in (learner.logprobs, learner.reference_logprobs))
        update = with_ref_logprobs(with_old_logprobs(data, frozen), reference)
        metrics = learner.forward_backward(update, POLICY) | learner.step(1e-2 / step)
        logp = sum(map(sum, frozen))
        said.append({k: v for k, v in metrics.items() if not k.startswith("perf/")} | {"logp": logp})
    return said


def story(learner, folder, other):
    """Three steps, a checkpoint after two; an update that is no number; the third step from `other`'s checkpoint."""
    said = learn(learner, [1, 2])
    folder.mkdir()
    learner.save(folder)
    said += learn(learner, [3])
    with pytest.raises(NonFiniteError):
        learner.forward_backward(small_update(float("inf")), POLICY)
    weights = {f"whole.{name}": tensor.clone() for name, tensor in learner.weights()}
    learner.logprobs(small_update())  # must leave nothing gathered behind, or the next step would start from it
    learner.load(other)
    said += learn(learner, [3])
    weights |= {f"resumed.{name}": tensor.clone() for name, tensor in learner.weights()}
    return said, weights


def rows_end_to_end():
    """Let packed rows in bfloat16 be read as on a GPU, by a reference of its kernel; returns what counts the calls."""
    calls = []

    def varlen(*given):
        calls.append(given[0].dtype)
        return varlen_by_hand(*given)

    packing.varlen = varlen
    packing.reads_varlen = lambda model, dtype=None: (dtype or next(model.parameters()).dtype) == torch.bfloat16
    return calls


def one_rank(rank, port, folder, dtype, how):
    """One of three ranks; the first tells what it saw."""
    calls = rows_end_to_end() if how == "end to end" else None
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    make_machine_code = torch.nn.Module.compile  # tracing is what could go wrong among ranks, and machine code is slow
    torch.nn.Module.compile = lambda self, **how: make_machine_code(self, backend="aot_eager", **how)
    compiled = "on" if how == "compiled" else "off"
    learner = make_learner(ShardedLearner, dtype, activation_checkpointing=True, compile=compiled)
    assert learner.packs
    agree_on_a_budget(learner)
    if rank:
        follow(learner)
        assert calls is None or set(calls) == {torch.bfloat16}
        return
    lead = Lead(learner)
    (folder / "full").mkdir()
    (folder / "full" / "optimizer").touch()  # no rank can make its folder
    with pytest.raises(DiskError, match="earlier checkpoints are untouched"):
        lead.save(folder / "full")
    said, weights = story(lead, folder / "three", folder / "one")
    lead.close()
    assert calls is None or set(calls) == {torch.bfloat16}
    (folder / "said.json").write_text(json.dumps(said))
    save_file(weights, folder / "weights.safetensors")


def agree_on_a_budget(learner):
    """Each rank probes, has another amount of memory, and takes what the one with the least can."""
    before = {name: p.detach().full_tensor().clone() for name, p in learner.model.named_parameters()}
    with LiveMemory(2_000_000 * (1 + learner.rank)) as meter:
        learner.gauge = Gauge(shape_of(learner.model), Setup(4, ranks=RANKS, device="cpu"), meter)
        own, agreed = TorchLearner._cells_that_fit(learner), learner._cells_that_fit()
    learner.gauge = learner.probed = None
    found = [None] * RANKS
    dist.all_gather_object(found, (own, agreed), group=learner.group)
    owns, agreeds = zip(*found, strict=True)
    assert LEAST_CELLS < owns[0] < owns[1] / 1.5 < owns[2] / 2 and len(set(agreeds)) == 1, found
    assert agreed == pytest.approx(owns[0], rel=0.01)
    assert not any(p.grad is not None for p in learner.model.parameters())
    assert all(torch.equal(before[name], p.detach().full_tensor()) for name, p in learner.model.named_parameters())


def fork_ranks(folder, dtype, how):
    """Before this process has run anything in threads, forking it is safe, and spares three starts of torch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        multiprocessing.get_context("fork").Process(target=one_rank, args=(r, port, folder, dtype, how))
        for r in range(RANKS)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    sys.exit(max(abs(child.exitcode) for child in children))


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        ("float32", ""),
        pytest.param("bfloat16", "", marks=pytest.mark.slow),
        pytest.param("bfloat16", "end to end", marks=pytest.mark.slow),
        pytest.param("float32", "compiled", marks=pytest.mark.slow),
    ],
)
def test_three_ranks_learn_what_one_process_learns(dtype, how, tmp_path):
    near = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    one = make_learner(TorchLearner, getattr(torch, dtype))
    said = learn(one, [1, 2])
    (tmp_path / "one").mkdir()
    one.save(tmp_path / "one")
    said += 2 * learn(one, [3])
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_ranks", tmp_path, dtype, how],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(said, json.loads((tmp_path / "said.json").read_text()), strict=True):
        assert theirs.keys() == ours.keys()
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, rel=near, abs=near + SAMPLED.get(name, 0)), name
    weights = load_file(tmp_path / "weights.safetensors")
    resumed = make_learner(TorchLearner, getattr(torch, dtype))
    resumed.load(tmp_path / "three")
    learn(resumed, [3])
    for name, expected in one.weights():
        for found in (weights[f"whole.{name}"], weights[f"resumed.{name}"], dict(resumed.weights())[name]):
            assert found.dtype == expected.dtype and torch.allclose(found, expected, rtol=0, atol=near), name


def test_every_row_is_trained_by_one_rank_and_all_pass_through_the_model_as_often():
    batch = make_batch(small_update())
    shares = [share(batch, 13, range(5), rank, 4) for rank in range(4)]
    assert sorted(row for parts in shares for taken, _ in parts for row in taken) == [0, 1, 2, 3, 4]
    assert [len(parts) for parts in shares] == [1, 1, 1, 1]
    shares = [share(batch, 13, range(5), rank, 3) for rank in range(3)]
    assert [len(parts) for parts in shares] == [2, 2, 2]
    blanks = [part for parts in shares for taken, part in parts if not taken]
    assert len(blanks) == 2 and not any(blank.mask.any() or blank.weights.any() for blank in blanks)
    assert share(batch, 13, [], 0, 4) == []


@pytest.mark.parametrize(
    ("fields", "learner", "ranks", "expected"),
    [
        ({}, "cuda:0", 2, [["cuda:2"]]),
        ({"tp_size": 2}, "cuda:0", 2, [["cuda:2", "cuda:3"]]),
        ({"vllm_device": "cuda:1"}, "cuda:0", 4, [["cuda:1"]]),  # asked for
        ({}, "cuda:0", 1, [["cuda:1"]]),
    ],
)
def test_engines_keep_off_the_gpus_that_train(fields, learner, ranks, expected, monkeypatch):
    monkeypatch.setattr(process, "_installed", lambda name: name == "vllm")
    cfg = train_config(engine="vllm", **fields)
    assert placements(cfg, learner, 4, ranks) == expected
    with pytest.raises(ConfigError, match="every GPU trains"):
        placements(train_config(engine="vllm"), learner, 4, 4)


def test_what_is_trained_on():
    assert trained_on("cuda:0", 2) == {"cuda:0", "cuda:1"}
    assert trained_on("cuda:1", 1) == {"cuda:1"} and trained_on("cpu", 2) == {"cpu"}


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    assert world() == World(0, 1, 0, 1)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert world() == World(5, 8, 1, 4)
    assert pick_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="8 ranks train"):
        pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="2 GPUs"):
        pick_device("auto")


def test_an_engine_does_not_take_itself_for_a_rank(monkeypatch):
    for name in ("RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", "/models")
    environment = channel._own_environment()
    assert environment["HF_HOME"] == "/models"
    assert not {"RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"} & environment.keys()


# ------------------------------------------------------------------------------------------ torchrun, end to end

SFT = ["sft", "--epochs", "1", "--batch_size", "8", "--max_tokens_per_microbatch", "128", "--set", "warmup_steps=0"]
GRPO = ["grpo", "--rollouts_per_step", "16", "--group_size", "4", "--max_tokens_per_microbatch", "128"]
GRPO += ["--minibatches", "2", "--epochs", "2", "--kl_coef", "0.1", "--old_logprobs", "recompute"]
GRPO += ["--reward", "tests.toys:even_tokens"]


def flags(tiny, out, steps=6):
    where = ["--model_id", tiny.model, "--data", tiny.data, "--out_dir", out, "--device", "cpu", "--resume", "--json"]
    small = ["--prompt_style", "gsm8k", "--max_new_tokens", "12", "--eval_examples", "4", "--eval_every", "3"]
    return [*map(str, where), *small, "--lr", "5e-4", "--deterministic", "--save_every", "1", "--max_steps", str(steps)]


def torchrun(ranks, *args):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
            "-m", "grpo_gsm8k.cli", *args]  # fmt: skip


def run(ranks, *args):
    """A command that must do well, on so many ranks; its one JSON object."""
    if ranks == 1:
        done = cli(*args)
    else:
        done = subprocess.run(
            torchrun(ranks, *args), capture_output=True, text=True, cwd=REPOSITORY, timeout=600, check=False
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def same_run(one, other):
    """The same rows of metrics and the same weights, to 1e-5; every sample the same."""
    for a, b in zip(*((r / "metrics.jsonl").read_text().splitlines() for r in (one, other)), strict=True):
        a, b = ({k: v for k, v in json.loads(x).items() if not k.startswith(("time/", "perf/"))} for x in (a, b))
        assert b.keys() == a.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-5, abs=1e-5 + SAMPLED.get(name, 0)), name
    a, b = (load_file(r / "checkpoints/step_000006/model.safetensors") for r in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.allclose(b[name], a[name], rtol=0, atol=1e-5) for name in a)
    drawn = [[p.read_text().splitlines() for p in sorted((r / "samples").glob("*"))] for r in (one, other)]
    a, b = ([json.loads(row)["response"] for rows in files for row in rows] for files in drawn)
    assert a == b


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """Both stages in one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name, stage in (("sft", SFT), ("grpo", GRPO)):
        run(1, *stage, *flags(tiny, folder / name))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [SFT, GRPO], ids=lambda stage: stage[0])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_on_several_ranks_is_the_run_of_one(ranks, stage, alone, tiny, tmp_path):
    result = run(ranks, *stage, *flags(tiny, tmp_path / "run"), "--activation_checkpointing")
    same_run(alone / stage[0], tmp_path / "run")
    folder = Path(result["model"])
    assert len(list((folder / "optimizer").iterdir())) == ranks + 1  # their shards, and rank 0's generators
    assert not [p for p in folder.rglob("*") if p.suffix not in (".safetensors", ".json", ".jinja") and p.is_file()]
    config = json.loads((folder / "config.json").read_text())
    assert config == json.loads((alone / stage[0] / "checkpoints/step_000006/config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(
        loaded.state_dict()["model.norm.weight"], load_file(folder / "model.safetensors")["model.norm.weight"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [SFT, GRPO], ids=lambda stage: stage[0])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(before, after, stage, alone, tiny, tmp_path):
    assert run(before, *stage, *flags(tiny, tmp_path / "run", steps=3))["step"] == 3
    assert run(after, *stage, *flags(tiny, tmp_path / "run"))["step"] == 6
    same_run(alone / stage[0], tmp_path / "run")


def rank_of(number, launcher):
    """The process id of a rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return next(int(c) for c in children if f"\0RANK={number}\0" in Path(f"/proc/{c}/environ").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "victim"), [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGTERM, None)])
def test_a_rank_that_is_killed_ends_the_job_and_the_job_resumes(number, victim, alone, tiny, tmp_path):
    """SIGTERM goes to torchrun, as from a scheduler: the step is finished and saved."""
    path = tmp_path / "run"
    command = torchrun(2, *GRPO, *flags(tiny, path))
    job = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = path / "metrics.jsonl"
    while job.poll() is None and not (log.is_file() and log.read_text().count("\n") >= 2):
        time.sleep(0.05)
    os.kill(job.pid if victim is None else rank_of(victim, job.pid), number)
    _, said = job.communicate(timeout=60)
    assert job.returncode != 0
    assert (number == signal.SIGTERM) == ("is saved in" in said)
    run(2, *GRPO, *flags(tiny, path))
    same_run(alone / "grpo", path)


if __name__ == "__main__":
    fork_ranks(Path(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3])
