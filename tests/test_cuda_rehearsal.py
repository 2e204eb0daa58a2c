"""Every CUDA path on a pretended device (`tests/rehearsal.py`): right numbers, few host waits, the kernels we mean.

The default part takes each path once; the whole matrix of options, dtypes and losses runs under --runslow.
"""

from __future__ import annotations

import contextlib
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from grpo_gsm8k import config, ei, fast_eval_vllm, grpo, repro, sft
from grpo_gsm8k.config import TrainConfig
from grpo_gsm8k.datatypes import Request, SamplingParams
from grpo_gsm8k.engines import static_cache
from grpo_gsm8k.engines.hf import HFSampler, _cumsum
from grpo_gsm8k.runs.files import read_jsonl
from grpo_gsm8k.trainer import kernels, memory
from grpo_gsm8k.trainer.data import weighted
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.losses import LOSSES, GrpoClip, Objective
from tests.rehearsal import CUDNN, MATH, Pretend
from tests.toys import datum, make_data, make_model, tensor_of

V = 211
CLIP = Objective(GrpoClip(), temperature=0.7)


@pytest.fixture(scope="module", autouse=True)
def _loaded_once(tiny):
    AutoModelForCausalLM.from_pretrained(tiny.model)


@pytest.fixture(autouse=True)
def _process_as_it_was():
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    repro.set_deterministic(False)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def qwen(dtype=torch.float32, layers=2):
    """Grouped heads, tied weights, an odd vocabulary."""
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(shape).to(dtype)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    return model


def update_data(groups=4):
    draw, rows = random.Random(0), []
    for group in range(groups):
        prompt = tuple(draw.randrange(3, V) for _ in range(draw.randrange(1, 9)))
        for member in range(2):
            n = draw.randrange(1, 12)
            ids = (*prompt, *(draw.randrange(3, V) for _ in range(n)))
            old = (0.0,) * len(prompt) + tuple(draw.gauss(-5, 0.4) for _ in range(n))
            rows.append(datum(ids, (0,) * len(prompt) + (1,) * n, old, (1.0 if member else -1.0) if group else 0.0))
    return weighted(rows, "token")


def learner_on(device, dtype=torch.float32, **flags):
    return TorchLearner(qwen(dtype).to(device), None, TrainConfig(engine="vllm", **flags))


def after_an_update(dtype, device, objective, **flags):
    """Log-probabilities of the batch after one step, and what the update reported."""
    learner = learner_on(device, dtype, **flags)
    metrics = learner.forward_backward(update_data(), objective)
    learner.step(1e-3)
    return tensor_of(learner.logprobs(update_data(), objective.temperature)), metrics


# ------------------------------------------------------------------------------------------------------ updates

FLAGS = [
    {},
    {"packing": "on"},
    {"activation_checkpointing": True},
    {"optimizer_device": "cpu"},
    {"max_tokens_per_microbatch": 0},
    {"deterministic": True},
]
WIDE = [
    pytest.param(dtype, loss, flags, id=f"{dtype}-{loss}-{flags}")
    for dtype in (torch.float32, torch.bfloat16)
    for loss in ("grpo_clip", "gspo", "cross_entropy")
    for flags in FLAGS
]
NARROW = [
    pytest.param(dtype, "grpo_clip", flags, id=f"{dtype}-{flags}")
    for flags in FLAGS
    for dtype in (torch.float32, torch.bfloat16)
]


def check_update(dtype, loss, flags):
    objective, flags = Objective(LOSSES[loss](), temperature=0.7), {"max_tokens_per_microbatch": 48, **flags}
    packing = flags.get("packing", "off")
    if flags.get("deterministic"):
        repro.set_deterministic(True)
    here, said = after_an_update(dtype, "cpu", objective, packing=packing, max_tokens_per_microbatch=48)
    with Pretend() as gpu:
        there, reported = after_an_update(dtype, "cuda", objective, **flags)
    assert gpu.kernels["mm"] and (there - here).abs().max() < (1e-4 if dtype == torch.float32 else 0.05)
    assert reported["loss"] == pytest.approx(said["loss"], rel=1e-3, abs=1e-3)
    assert reported["policy/entropy"] == pytest.approx(said["policy/entropy"], rel=1e-2)
    assert_kernels(gpu)


def assert_kernels(gpu):
    """No kernel that plans for each shape, none that forms T x T scores."""
    taken = {kernel for kernel, _ in gpu.attention}
    assert taken and not taken & {MATH, CUDNN}, gpu.attention


@pytest.mark.parametrize(("dtype", "loss", "flags"), NARROW)
def test_an_update_there_is_the_update_here(dtype, loss, flags, monkeypatch):
    monkeypatch.setattr(memory, "PROBE_TOKENS", 16)  # as long as in a run below
    check_update(dtype, loss, flags)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "loss", "flags"), WIDE)
def test_an_update_there_is_the_update_here_whatever_the_loss(dtype, loss, flags):
    check_update(dtype, loss, flags)


@pytest.mark.parametrize("packing", ["off", "on"])
def test_a_microbatch_waits_at_most_three_times(packing):
    """Whatever the number of microbatches; the sums of all of them are fetched at once."""
    waits = {}
    for cells in (40, 4096):
        with Pretend() as gpu:
            learner = learner_on("cuda", torch.bfloat16, packing=packing, max_tokens_per_microbatch=cells)
            learner.forward_backward(update_data(8), CLIP)
            learner.optimizer.zero_grad()
            gpu.syncs.clear()
            gpu.where.clear()
            learner.forward_backward(update_data(8), CLIP)
        parts = learner.passes(update_data(8))
        waits[parts] = sum(gpu.syncs.values())
        assert waits[parts] <= 2 * parts + 1, gpu.where.most_common()
    assert max(waits) > 3 and min(waits) == 1  # one for the mask that transformers makes, one for the head


def test_a_frozen_pass_waits_for_its_answer_alone():
    with Pretend() as gpu:
        learner = learner_on("cuda", torch.bfloat16, max_tokens_per_microbatch=4096)
        gpu.syncs.clear()
        gpu.where.clear()
        learner.logprobs(update_data())
    assert sum(gpu.syncs.values()) <= 2, gpu.where.most_common()  # one is the mask that transformers makes


# ------------------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
def test_rows_stand_end_to_end_by_default_in_bfloat16(deterministic):
    """One kernel for all rows of a pass, whose shape is the pass's; in float32 it does not exist."""
    repro.set_deterministic(deterministic)
    for dtype, packs in ((torch.bfloat16, True), (torch.float32, False)):
        with Pretend() as gpu:
            learner = learner_on("cuda", dtype, deterministic=deterministic, max_tokens_per_microbatch=48)
            gpu.attention.clear()
            learner.forward_backward(update_data(), CLIP)
        assert learner.packs is packs and {kernel == "varlen" for kernel, _ in gpu.attention} == {packs}


def test_shards_in_float32_are_known_to_compute_in_bfloat16():
    """Several ranks hold float32 shards: how their rows are read decides the memory that is predicted."""
    with Pretend():
        model, cfg = qwen().to("cuda"), TrainConfig(engine="vllm")
        assert memory.gauge_of(model, cfg, torch.bfloat16, 2, False).end_to_end
        assert not memory.gauge_of(model, cfg, torch.float32, 2, False).end_to_end


def test_what_torch_would_take_by_itself():
    """So that the checks above are checks: without our choice cuDNN, and T x T scores in float32."""
    for dtype, kernel in ((torch.bfloat16, CUDNN), (torch.float32, MATH)):
        torch.backends.cuda.enable_cudnn_sdp(True)
        with Pretend() as gpu, torch.no_grad():
            model = qwen(dtype).to("cuda")
            model(torch.ones(2, 7, dtype=torch.int64, device="cuda"))
            assert {taken for taken, _ in gpu.attention} == {kernel}
            gpu.attention.clear()
            kernels.choose_attention(model)
            model(torch.ones(2, 7, dtype=torch.int64, device="cuda"))
            assert_kernels(gpu)


@pytest.mark.parametrize(
    ("dtype", "flags", "each"),
    [
        (torch.bfloat16, {}, 1),  # end to end: one for all rows of a pass
        (torch.bfloat16, {"deterministic": True}, 1),
        (torch.bfloat16, {"packing": "off"}, 1),
        (torch.float32, {"packing": "on"}, 2),  # in two blocks
    ],
    ids=str,
)
def test_the_attention_of_a_whole_update(dtype, flags, each):
    """One kernel, and so many shapes a pass, whatever the number of rows, layers and lengths."""
    data = update_data(groups=12)
    repro.set_deterministic(bool(flags.get("deterministic")))
    with Pretend() as gpu:
        learner = learner_on("cuda", dtype, max_tokens_per_microbatch=64, **flags)
        passes = learner.passes(data)
        gpu.attention.clear()
        learner.forward_backward(data, CLIP)
    assert 3 < passes < len(data) / 2
    assert_kernels(gpu)
    assert len({kernel for kernel, _ in gpu.attention}) == 1 and len(gpu.attention) <= each * passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_of_a_whole_generation(dtype, tiny, monkeypatch):
    """Prompts are one shape; then it is one for each number of rows and columns that a graph is made for."""
    monkeypatch.setattr(static_cache, "LEAST_COLUMNS", 32)
    monkeypatch.setattr(static_cache, "LEAST_ROWS", 4)
    renderer = SimpleNamespace(stop_ids=frozenset(range(3, 8)), pad_id=0, decode=lambda ids: "")
    asked = [Request(tuple(range(20, 23 + i)), tuple(range(8 * i, 8 * i + 8))) for i in range(2)]
    with Pretend() as gpu:
        sampler = HFSampler(qwen(dtype).to("cuda"), renderer)
        gpu.attention.clear()
        drawn = sampler.sample(asked, SamplingParams(max_new_tokens=70))
        shapes = gpu.attention.copy()
    assert_kernels(gpu)
    tokens = {len(c.token_ids) for group in drawn for c in group}
    assert max(tokens) > 60 and len(tokens) > 5  # rows end one by one
    steps = [shape for _, shape in shapes if shape[3] >= 32]
    assert 4 <= len(steps) == len(shapes) - 1 <= 3 * 3  # rows in 16, 8, 4; columns in 32, 64, 96


def test_a_probe_keeps_no_memory(monkeypatch):
    """What the allocator kept of it would lack to an engine that wakes on the same GPU."""
    monkeypatch.setattr(memory, "PROBE_TOKENS", 16)
    with Pretend() as gpu:
        learner = learner_on("cuda", max_tokens_per_microbatch=0)
        held = torch.cuda.memory_allocated()
        assert learner.budget > 256 and gpu.top > held
        assert torch.cuda.memory_reserved() < held + (gpu.top - held) / 10


def test_a_cumulative_sum_in_a_fixed_order():
    """As CUDA's own, which has no deterministic kernel for floats."""
    for size in (1, 2, 7, 512, 1000):
        x = torch.rand(3, size, dtype=torch.float64)
        with Pretend():
            there = x.to("cuda")
            plain = _cumsum(there).cpu()
            repro.set_deterministic(True)
            fixed = _cumsum(there).cpu()
            repro.set_deterministic(False)
        assert torch.equal(plain, x.cumsum(-1)) and torch.allclose(fixed, plain, rtol=1e-14)


# ------------------------------------------------------------------------------------------------ out of memory


def out_of_memory_at(learner, monkeypatch, fails):
    """Let the passes that `fails` picks (by their number and size) run out of memory after their backward pass."""
    whole, asked = learner._pass, []

    def one(part, objective):
        asked.append(len(part))
        found = whole(part, objective)
        if fails(len(asked), part):
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(learner, "_pass", one)
    return asked


def test_an_update_that_does_not_fit_is_made_again_in_smaller_passes(monkeypatch, capsys):
    plain, learner = (learner_on("cpu", max_tokens_per_microbatch=80, packing="off") for _ in range(2))
    expected = plain.forward_backward(update_data(), CLIP)
    asked = out_of_memory_at(learner, monkeypatch, lambda number, part: number == 1)
    found = learner.forward_backward(update_data(), CLIP)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for name, master in learner.optimizer.masters.items():
        assert torch.allclose(master.grad, plain.optimizer.masters[name].grad, atol=1e-6), name
    assert learner.budget < 80 and asked[1] < asked[0]
    assert "trying again with" in capsys.readouterr().err


def test_memory_that_lacks_twice_is_the_users_to_mend(monkeypatch):
    learner = learner_on("cpu", max_tokens_per_microbatch=80, packing="off")
    out_of_memory_at(learner, monkeypatch, lambda number, part: True)
    with pytest.raises(config.ConfigError, match="--max_tokens_per_microbatch"):
        learner.forward_backward(update_data(), CLIP)


# ------------------------------------------------------------------------------------------------------- stages

EI = {"prompts_per_round": 8, "samples_per_prompt": 2, "steps_per_round": 2, "batch_size": 4}
STAGES = {
    "grpo": (grpo, {}),
    "grpo, one step off": (grpo, {"mode": "one_step_off"}),
    "grpo, recompute, KL": (grpo, {"kl_coef": 0.05, "old_logprobs": "recompute", "epochs": 2, "minibatches": 2}),
    "grpo, LoRA": (grpo, {"lora_rank": 4, "kl_coef": 0.05}),
    "grpo, offloaded": (grpo, {"optimizer_device": "cpu"}),
    "grpo, packed": (grpo, {"packing": "on"}),
    "grpo, padded": (grpo, {"packing": "off"}),
    "grpo, checkpointed": (grpo, {"activation_checkpointing": True}),
    "grpo, probed": (grpo, {"max_tokens_per_microbatch": 0}),
    "grpo, deterministic": (grpo, {"deterministic": True}),
    "grpo, everything": (
        grpo,
        {"mode": "one_step_off", "kl_coef": 0.05, "lora_rank": 4, "activation_checkpointing": True, "epochs": 2},
    ),
    "sft": (sft, {"batch_size": 8, "max_steps": 3}),
    "sft, LoRA, deterministic": (sft, {"batch_size": 8, "max_steps": 3, "lora_rank": 4, "deterministic": True}),
    "ei": (ei, EI),
    "ei, offloaded, probed": (ei, {**EI, "optimizer_device": "cpu", "max_tokens_per_microbatch": 0}),
}
DEFAULT = {"grpo", "grpo, deterministic", "sft"}


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in DEFAULT else pytest.mark.slow) for n in STAGES])
def test_a_stage_runs_and_resumes_there(name, dtype, tmp_path):
    data = make_data(tmp_path / "data", 60, 8, 1)
    model = make_model(tmp_path / "model", data, hidden_size=64, heads=4)
    module, extra = STAGES[name]
    stage = module.__name__.rpartition(".")[2]
    flags = {
        "model_id": str(model),
        "data": str(data),
        "out_dir": str(tmp_path / "run"),
        "device": "cuda",
        "engine": "hf",
        "dtype": dtype,
        "max_new_tokens": 12,
        "eval_every": 2,
        "eval_examples": 4,
        "save_every": 1,
        "sample_rows": 16,
    }
    if stage == "grpo":
        flags |= {"steps": 3, "rollouts_per_step": 8, "group_size": 4, "reward": "random"}
    flags |= extra
    with Pretend() as gpu:
        module.run(config.resolve(stage, preset="tiny", flags={**flags, "max_steps": 2}))
        result = module.run(config.resolve(stage, preset="tiny", flags={**flags, "resume": True}))
    assert result["weights_sha256"]
    assert_kernels(gpu)


@pytest.mark.slow
def test_an_evaluation_there_is_the_one_here(tiny, tmp_path):
    flags = {"model_id": str(tiny.model), "eval_path": str(tiny.data / "test.jsonl"), "prompt_style": "gsm8k"}
    flags |= {"limit": 6, "max_new_tokens": 12, "dtype": "float32", "engine": "hf", "samples": 2, "temperature": 1.0}
    found = []
    for device, there in (("cpu", contextlib.nullcontext()), ("cuda", Pretend())):
        cfg = config.resolve("eval", flags={**flags, "device": device, "out_dir": str(tmp_path / device)})
        with there:
            result = fast_eval_vllm.run(cfg)
        rows = [row for _, row in read_jsonl(result["results_path"])]
        found.append([(row["id"], row["response"], row["weights_sha256"]) for row in rows])
    assert len(found[0]) == 12 and found[0] == found[1]
