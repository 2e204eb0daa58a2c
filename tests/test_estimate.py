"""What an update will need on a GPU: as predicted, as a probe finds it, and as it is said."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.trainer import costs, memory
from grpo_gsm8k.trainer import learner as learner_module
from grpo_gsm8k.trainer.data import weighted
from grpo_gsm8k.trainer.estimate import estimate
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.losses import Objective
from grpo_gsm8k.trainer.memory import Gauge, shape_of
from tests.meter import LiveMemory, ProfiledMemory
from tests.test_costs import make_model
from tests.toys import batch_of, gradient, rows, stage_config, train_config

MATH_1B5 = {  # Qwen2.5-Math-1.5B
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def test_an_estimate_of_the_full_recipe(tmp_path):
    Qwen2Config(**MATH_1B5, architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path)
    sizes = {"max_new_tokens": 250, "rollouts_per_step": 2048, "max_tokens_per_microbatch": 0}
    cfg = stage_config("grpo", model_id=str(tmp_path), **sizes)
    found = estimate(cfg, "H200")
    assert found["weights"] == 1_543_714_304  # as its card has it: 1.54B
    assert found["fits"] and not estimate(cfg, "4090")["fits"]
    # 6 x (1.31e9 x 716,800 + 0.233e9 x 512,000) operations at 989e12 a second; attention: 12 x 28 x 1536 for each of
    # 2,048 x 350 x 351 / 2 pairs
    assert found["update_seconds_at_peak"] == pytest.approx(6.42 + 0.066, abs=0.02)
    # 250 steps for 8 times 256 rows: 1.54e9 weights of 2 bytes and 225 tokens of 28 x 2 x 2 x 128 numbers a row
    assert found["sampling_seconds_at_bandwidth"] == pytest.approx(
        2000 * (3.087e9 + 256 * 225 * 28672) / 4.8e12, abs=0.02
    )
    # 18 bytes a weight and the sampler's 2 are 30.9 GB, its cache of 256 rows of 350 tokens 2.6; passes of 16,384
    # tokens take the rest, well within 0.85 of what CUDA leaves of 141 GB
    assert 30.9 + 2.6 < found["peak_gb"] < 0.6 * (141 - 2.147)
    again = 2 * 1.31e9 * 716_800 / 989e12 + 0.022  # the layers' forward pass a second time
    slower = estimate(replace(cfg, activation_checkpointing=True), "H200")["update_seconds_at_peak"]
    assert slower - found["update_seconds_at_peak"] == pytest.approx(again, abs=0.02)
    passes = replace(cfg, kl_coef=0.1, old_logprobs="recompute")  # with one update a step, the reference's alone
    for minibatches, share in [(1, 4 / 3), (2, 5 / 3)]:
        frozen = estimate(replace(passes, minibatches=minibatches), "H200")["update_seconds_at_peak"]
        assert frozen == pytest.approx(share * found["update_seconds_at_peak"], abs=0.02)
    taught = stage_config("distill", model_id=str(tmp_path), teacher=str(tmp_path), aggregation="sequence", **sizes)
    pass_more = estimate(taught, "H200")["update_seconds_at_peak"]
    assert pass_more == pytest.approx(4 / 3 * found["update_seconds_at_peak"], abs=0.02)
    small = replace(cfg, max_tokens_per_microbatch=4096)
    taught = replace(taught, max_tokens_per_microbatch=4096)
    weights = (
        estimate(taught, "H200")["peak_gb"] - estimate(replace(taught, teacher_device="cuda:1"), "H200")["peak_gb"]
    )
    assert weights == pytest.approx(2 * 1.543714304, abs=0.02)
    peak = estimate(small, "H200")["peak_gb"]
    saved = {"optimizer_device": 12 * 1.5437, "engine": 2 * 1.5437 + 256 * 350 * 28672 / 1e9}
    for name, value in {"optimizer_device": "cpu", "engine": "vllm"}.items():
        assert estimate(replace(small, **{name: value}), "H200")["peak_gb"] == pytest.approx(
            peak - saved[name], abs=0.02
        )
    eager = estimate(replace(small, compile="off"), "H200")["peak_gb"]
    checkpointing = estimate(replace(small, activation_checkpointing=True), "H200")["peak_gb"]
    assert peak < eager - 2 and checkpointing < peak - 2
    assert (
        estimate(replace(small, mode="one_step_off"), "H200")["peak_gb"] > peak + 0.35
    )  # logits of 256 rows; their cache stays in either mode
    with pytest.raises(ConfigError, match="H200"):
        estimate(cfg, "B9000")


def test_running_out_of_memory_says_what_to_lower(tiny, monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError

    learner = TorchLearner(Qwen2ForCausalLM.from_pretrained(tiny.model), None, train_config())
    monkeypatch.setattr(learner_module, "token_logprobs", too_large)
    four = weighted(rows(*[(range(3, 24), 1)] * 4), "token")  # 4 rows of 20 tokens, then 2 of them
    with pytest.raises(ConfigError, match="--max_tokens_per_microbatch 20"):
        learner.forward_backward(four, Objective())
    with pytest.raises(ConfigError, match="single row of 20 tokens"):
        learner.logprobs(rows((range(3, 24), 1)))


def test_running_out_of_memory_after_a_probe_says_how_much_it_was():
    said = str(memory.out_of_memory(4, 500, 4096, each=2.5e6))
    assert "4 rows x 500 tokens (5.0 GB by the probe)" in said
    assert "--max_tokens_per_microbatch 1000 (now 4096), which saves 2.5 GB" in said


def test_a_budget_on_a_cpu_is_fixed(tiny):
    model = Qwen2ForCausalLM.from_pretrained(tiny.model)
    assert TorchLearner(model, None, train_config(max_tokens_per_microbatch=0)).budget == memory.CPU_CELLS
    assert TorchLearner(model, None, train_config(max_tokens_per_microbatch=77)).budget == 77


def test_what_is_free_on_a_gpu_counts_what_its_allocator_keeps(monkeypatch):
    said = {"mem_get_info": (10, 99), "memory_reserved": 7, "memory_allocated": 3, "max_memory_allocated": 5}
    for name, value in said.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    meter = memory.CudaMeter(torch.device("cuda:1"))
    assert (meter.free(), meter.held(), meter.peak()) == (10 + 7 - 3, 3, 5)


# ------------------------------------------------------------------------- the probe, with the CPU's own meter


LIMIT = 60_000_000


class Hoarder(torch.nn.Module):
    """Stands for whatever a formula does not know: its backward pass needs 40 copies of what it read."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, **more):
        hidden = self.layer(hidden, **more)
        return hidden + 0 * torch.stack([hidden * k for k in range(40)]).square().mean(0)


@pytest.fixture
def probing():
    """Makes a learner that takes the CPU's allocations for those of a GPU with `limit` bytes left."""
    with ExitStack() as meters:

        def make(limit=LIMIT, hoards=False, dtype=torch.float32, vocabulary=300, **flags):
            model = make_model(vocabulary=vocabulary, dtype=dtype, lora_rank=flags.get("lora_rank", 0))
            if hoards:
                model.model.layers[1] = Hoarder(model.model.layers[1])
            learner = TorchLearner(model, None, train_config(max_tokens_per_microbatch=0, **flags))
            setup = replace(costs.setup_of(learner.cfg, dtype.itemsize, device="cpu"), copies=0)
            meters.close()
            learner.gauge = Gauge(shape_of(model), setup, meters.enter_context(LiveMemory(limit)))
            return learner

        yield make


def peak_of_a_pass(learner, cells):
    """What a pass of about so many cells, all of them targets, really takes beside gradients and moments."""
    length = 64
    batch = batch_of(rows(*[(range(3, 4 + length), 1)] * (cells // length)))
    learner._pass(batch, Objective())
    with ProfiledMemory() as meter:
        learner._pass(batch, Objective())
    return meter.top


@pytest.mark.parametrize("hoards", [False, True])
@pytest.mark.parametrize("flags", [{}, {"activation_checkpointing": True}, {"lora_rank": 4}], ids=str)
@pytest.mark.parametrize(("dtype", "vocabulary"), [(torch.float32, 300), (torch.bfloat16, 20_000)])
def test_the_probe_finds_what_fits_and_fills_it(probing, hoards, flags, dtype, vocabulary):
    """With a large vocabulary the peak of a small pass is somewhere else than that of a large one."""
    limit = 40_000_000 if vocabulary == 300 else 160_000_000
    learner = probing(limit, hoards, dtype, vocabulary, **flags)
    before, cells = torch.get_rng_state(), learner.budget
    assert torch.equal(torch.get_rng_state(), before) and not gradient(learner)
    trained = sum(m.numel() for m in learner.optimizer.masters.values())
    room = costs.SPARE * (limit - (4 + 8) * trained)  # gradients, and moments that will come
    taken = peak_of_a_pass(learner, cells)
    assert (0.7 if hoards else 0.85) * room < taken <= 1.01 * room
    shape, setup = learner.gauge.shape, learner.gauge.setup
    formula = costs.cells_that_fit(shape, setup, room + costs.state_bytes(shape, setup))
    if not hoards:
        assert cells == pytest.approx(formula, rel=0.15)
    elif vocabulary == 300:  # elsewhere the head takes most
        assert cells < 0.8 * formula and peak_of_a_pass(learner, formula) > 1.2 * room  # too large by the formula


def test_a_budget_that_was_probed_changes_no_number(probing):
    data = weighted(rows(*[(range(3, 24), 1)] * 4), "token")
    plain = TorchLearner(make_model(vocabulary=300), None, train_config())
    probed = probing()
    assert probed.budget > 512 == plain.budget
    said = [one.forward_backward(data, Objective()) | one.step(1e-3) for one in (plain, probed)]
    assert said[0]["loss"] == said[1]["loss"] and said[0]["policy/grad_norm"] == said[1]["policy/grad_norm"]
    assert probing().budget == probed.budget


def test_what_is_not_probed(probing):
    assert probing(deterministic=True).budget == memory.FIXED_CELLS
    assert probing(0).budget == costs.LEAST_CELLS
    learner = probing()
    learner.gauge.beside = beside = 7_000_000
    room = costs.SPARE * LIMIT - beside
    assert learner.budget == costs.cells_that_fit(learner.gauge.shape, learner.gauge.setup, room)
    assert learner.probed is None


def test_a_probe_that_does_not_fit_says_so(probing, monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError

    learner = probing()
    monkeypatch.setattr(learner_module, "token_logprobs", too_large)
    with pytest.raises(ConfigError, match="single row of 128 tokens"):
        _ = learner.budget


# ------------------------------------------------------------------------------- predicted against measured


def test_a_run_says_what_was_predicted_and_what_it_was(probing, capsys):
    learner = probing()
    learner.gauge.flops = 1e12
    data = weighted(rows((range(3, 24), 6), (range(30, 41), 6)), "token")
    first = learner.forward_backward(data, Objective())
    meter = learner.gauge.meter
    there = 4 * 4 * learner.gauge.shape.parameters
    found = learner.step(1e-3)
    assert found["perf/peak_memory_gb"] == meter.peak() / 1e9
    predicted = costs.training_bytes(learner.gauge.shape, learner.gauge.setup, 20 + 10, 15 + 5, (30 + 15, 30))
    assert found["perf/predicted_peak_gb"] == predicted / 1e9 > there / 1e9
    assert f"memory: predicted {predicted / 1e9:.1f} GB, measured peak" in capsys.readouterr().err
    # By hand: 20 and 10 tokens, 15 and 5 targets, pairs 210 and 55.
    work = 6 * (learner.gauge.shape.matrices * 30 + 300 * 96 * 20) + 12 * 3 * 96 * 265
    seconds = 30 / first["perf/tokens_per_s"]
    assert first["perf/mfu"] == pytest.approx(work / seconds / 1e12)
    learner.forward_backward(data, Objective())
    learner.step(1e-3)
    assert "predicted" not in capsys.readouterr().err  # said once


def test_what_rows_share_is_computed_once_and_counts_once(probing):
    learner = probing()
    learner.gauge.flops = 1e12
    data = weighted(rows((range(3, 24), 6), ((*range(3, 9), *range(50, 56)), 6)), "token")
    found = learner.forward_backward(data, Objective())
    assert found["perf/shared_frac"] == pytest.approx(6 / 31)
    # By hand: 20 tokens and 11, of which 6 are there already; 15 targets and 6; pairs 210 and 66 less 21.
    work = 6 * (learner.gauge.shape.matrices * 25 + 300 * 96 * 21) + 12 * 3 * 96 * 255
    assert found["perf/mfu"] == pytest.approx(work / (31 / found["perf/tokens_per_s"]) / 1e12)


def test_a_cpu_says_nothing_of_a_gpu(tiny):
    learner = TorchLearner(Qwen2ForCausalLM.from_pretrained(tiny.model), None, train_config())
    data = weighted(rows((range(3, 24), 6)), "token")
    found = learner.forward_backward(data, Objective()) | learner.step(1e-3)
    assert not found.keys() & {"perf/mfu", "perf/peak_memory_gb", "perf/predicted_peak_gb"}
    assert all(math.isfinite(value) for value in found.values())


def test_a_model_that_is_no_dense_transformer_is_refused():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=2))
    with pytest.raises(ConfigError, match="its config has no num_attention_heads"):
        shape_of(mamba)
