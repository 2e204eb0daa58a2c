"""Options that change where and how an update is computed, and not what comes out: offloading, compiled layers."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from grpo_gsm8k import config, repro
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.errors import ConfigError, NonFiniteError
from grpo_gsm8k.trainer import compiled, packing
from grpo_gsm8k.trainer.data import weighted
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.losses import GrpoClip, Objective
from grpo_gsm8k.trainer.optimizer import MasterAdamW, OffloadedAdamW
from grpo_gsm8k.trainer.policy import weights_sha256
from grpo_gsm8k.trainer.sharded import ShardedLearner
from tests.test_costs import make_model
from tests.toys import gradient, rows, tensor_of, train_config

POLICY = Objective(GrpoClip(0.2, 0.2), temperature=0.7)
SEQUENCES = [(range(3, 3 + n), p) for n, p in [(9, 4), (4, 1), (13, 6), (6, 2), (11, 3), (5, 4)]]
SETTINGS = {"lr": 1e-2, "max_tokens_per_microbatch": 26, "weight_decay": 0.1, "grad_clip": 0.05}


class Offloading(TorchLearner):
    """What a GPU's learner does with `--optimizer_device cpu`, of a model on a CPU."""

    def _make_optimizer(self):
        return OffloadedAdamW(self.model, self.cfg)


def make(kind=TorchLearner, dtype=torch.float32, lora_rank=0, **flags):
    model = make_model(dtype=dtype, layers=2, vocabulary=64, lora_rank=lora_rank)
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    return kind(model, tokenizer, train_config(**SETTINGS, lora_rank=lora_rank, **flags))


def update(step):
    """A batch whose shape is another at each step."""
    drawn = [rows(s, advantage=(-1) ** i * (0.3 + i), logprob=-4.0)[0] for i, s in enumerate(SEQUENCES[step % 3 :])]
    return weighted(drawn, "sequence")


def learn(learner, steps):
    """What a learner said in these steps, but for its speed."""
    said = []
    for step in steps:
        metrics = learner.forward_backward(update(step), POLICY) | learner.step(1e-2 / step)
        said.append({name: value for name, value in metrics.items() if not name.startswith("perf/")})
    return said


# --------------------------------------------------------------------------------------------------- offloading


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_optimizer_is_the_same_to_the_bit(dtype, lora_rank, tmp_path):
    plain, other = make(dtype=dtype, lora_rank=lora_rank), make(Offloading, dtype, lora_rank)
    assert type(plain.optimizer) is MasterAdamW
    own = {id(p) for p in other.model.parameters()}
    assert not any(id(m) in own or m.dtype != torch.float32 for m in other.optimizer.masters.values())
    assert learn(plain, [1, 2]) == learn(other, [1, 2])
    assert weights_sha256(plain.weights()) == weights_sha256(other.weights())
    for learner, name in ((plain, "plain"), (other, "other")):
        (tmp_path / name).mkdir()
        learner.save(tmp_path / name)
    files = [(tmp_path / name / "optimizer" / "state.safetensors").read_bytes() for name in ("plain", "other")]
    assert files[0] == files[1]
    said, digest = learn(plain, [3]), weights_sha256(plain.weights())
    for kind, name in ((Offloading, "plain"), (TorchLearner, "other"), (Offloading, "other")):
        resumed = make(kind, dtype, lora_rank)
        resumed.load(tmp_path / name)
        assert learn(resumed, [3]) == said and weights_sha256(resumed.weights()) == digest


def test_an_offloaded_gradient_that_is_no_number_moves_nothing():
    learner = make(Offloading, torch.bfloat16)
    before = weights_sha256(learner.weights())
    learner.forward_backward(update(1), POLICY)
    next(iter(learner.optimizer.sums.values())).fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        learner.step(1e-2)
    assert weights_sha256(learner.weights()) == before and not learner.optimizer.sums
    assert learn(learner, [1]) == learn(make(Offloading, torch.bfloat16), [1])  # nothing of it is left


def test_an_offloaded_optimizer_is_for_one_process_and_a_gpu():
    assert type(make(optimizer_device="cpu").optimizer) is MasterAdamW  # the model is there already
    with pytest.raises(ConfigError, match="--optimizer_device cpu is for one process"):
        make(ShardedLearner, optimizer_device="cpu")


# ---------------------------------------------------------------------------------------------- compiled layers


@pytest.fixture
def quickly(monkeypatch):
    """Compile with what traces like torch's compiler but makes no machine code, which takes half a minute a graph and a
    C++ compiler."""
    monkeypatch.setattr(repro, "missing_for_compile", lambda gpu: "")
    own = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: own(self, backend="aot_eager", **how))


def same_as_eager(tmp_path, **flags):
    """A compiled learner beside one that is not, with names, weights, copies and checkpoints."""
    plain, compiled = make(**flags), make(compile="on", **flags)
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())
    assert weights_sha256(compiled.weights()) == weights_sha256(plain.weights())
    assert all(layer._compiled_call_impl for layer in compiled.model.base_model.layers)
    assert not any(layer._compiled_call_impl for layer in copy.deepcopy(compiled.model).base_model.layers)
    for step in (1, 2):
        data = update(step)
        for learner in (plain, compiled):
            learner.said = learner.forward_backward(data, POLICY)
        assert compiled.said["loss"] == pytest.approx(plain.said["loss"], abs=1e-5)
        for name, expected in gradient(plain).items():
            noise = 1e-4 * float(expected.abs().max())  # sums in another order, of which small entries have their share
            torch.testing.assert_close(gradient(compiled)[name], expected, rtol=1e-3, atol=noise)
        mine, own = (tensor_of(learner.logprobs(data)) for learner in (compiled, plain))
        torch.testing.assert_close(mine, own, rtol=0, atol=1e-5)
        for learner in (plain, compiled):
            learner.step(1e-3)
    plain.save(tmp_path)
    resumed, again = make(compile="on", **flags), make(**flags)
    for learner in (resumed, again):
        learner.load(tmp_path)
    assert weights_sha256(resumed.weights()) == weights_sha256(plain.weights())
    assert learn(resumed, [3])[0] == pytest.approx(learn(again, [3])[0], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        *(
            pytest.param(flags, marks=pytest.mark.slow)
            for flags in ({"lora_rank": 4}, {"activation_checkpointing": True})
        ),
    ],
    ids=str,
)
def test_compiled_layers_compute_the_same(flags, quickly, tmp_path):
    same_as_eager(tmp_path, **flags)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"activation_checkpointing": True}, {"lora_rank": 4}], ids=str)
def test_layers_compiled_to_machine_code_compute_the_same(flags, tmp_path):
    same_as_eager(tmp_path, **flags)


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="--compile on with --deterministic"):
        config.resolve("grpo", flags={"compile": "on", "deterministic": True})
    monkeypatch.setattr(repro.shutil, "which", lambda tool: None)
    with pytest.raises(ConfigError, match=r"--compile needs a C\+\+ compiler"):
        make(compile="on")
    assert repro.missing_for_compile(gpu=True) in ("triton", "a C compiler (gcc)")


def test_the_sampler_of_a_compiled_model_is_not_compiled(quickly):
    learner = make(compile="on")
    renderer = SimpleNamespace(stop_ids=frozenset())
    sampler = HFSampler(learner.model, renderer)
    assert not any(layer._compiled_call_impl for layer in sampler.model.base_model.layers)


@pytest.fixture
def as_on_a_gpu(monkeypatch, quickly):
    """Rows end to end by a stand-in whose numbers mean nothing, and no model too small."""
    monkeypatch.setattr(packing, "reads_varlen", lambda *which: True)
    monkeypatch.setattr(
        packing,
        "varlen",
        lambda q, k, v, starts, longest, scaling: q + (k.mean() + v.mean() + starts[0][-1]) / longest[1],
    )
    monkeypatch.setattr(packing, "enable", lambda model: model.set_attn_implementation(packing.ATTENTION) or True)
    monkeypatch.setattr(compiled, "LEAST_PARAMETERS", 0)
    monkeypatch.setattr(repro, "missing_for_compile", lambda gpu: "")


def is_compiled(learner):
    return all(layer._compiled_call_impl for layer in learner.model.base_model.layers)


@pytest.mark.slow
def test_on_a_gpu_layers_are_compiled_by_default_once_for_all_shapes(as_on_a_gpu):
    torch._dynamo.utils.counters.clear()
    learner = make(packing="on")
    assert is_compiled(learner)
    for step in (1, 2, 3):
        learner.forward_backward(update(step), POLICY)
        learner.step(1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for flags in ({"compile": "off"}, {"deterministic": True}):
        assert not is_compiled(make(packing="on", **flags))
    assert not is_compiled(make(packing="off"))


@pytest.mark.parametrize("fails", [pytest.param(True, marks=pytest.mark.slow), False])
def test_layers_whose_compiled_numbers_differ_stay_as_they_are(fails, as_on_a_gpu, monkeypatch, capsys):
    calls = []

    def looked_at(model, own=compiled._hidden_and_gradient):
        calls.append(own(model))
        if fails and len(calls) == 2:
            raise RuntimeError("no such kernel")
        return [x * len(calls) for x in calls[-1]]

    monkeypatch.setattr(compiled, "_hidden_and_gradient", looked_at)
    assert not is_compiled(make(packing="on"))
    assert ("no such kernel" if fails else "numbers differ by 1") in capsys.readouterr().err
