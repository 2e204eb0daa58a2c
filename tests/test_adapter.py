"""LoRA: what is trained, what it adds up to, and that a folder with an adapter is a model like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo_gsm8k import config, fast_eval_vllm, grpo, sft, workbench
from grpo_gsm8k.datatypes import SamplingParams
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.errors import CheckpointError, ConfigError, RunDirError
from grpo_gsm8k.trainer import adapter
from grpo_gsm8k.trainer.data import weighted
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.losses import Objective
from grpo_gsm8k.trainer.policy import load_model, load_tokenizer, weights_sha256
from tests.test_resume import config_of, story
from tests.toys import draw, gradient, load_split, renderer_for, rows, tensor_of, train_config

RANK, ALPHA = 4, 12
LORA = {"lora_rank": RANK, "lora_alpha": ALPHA}
SEQUENCES = [(range(3, 3 + n), p) for n, p in [(9, 4), (4, 1), (13, 6)]]


def learner_of(tiny, reference=False, **flags):
    cfg = train_config(model_id=str(tiny.model), **{**LORA, **flags})
    model = load_model(cfg)
    adapter.attach(model, cfg)
    return TorchLearner(model, renderer_for(load_tokenizer(cfg)), cfg, reference)


def randomise(model):
    """An adapter that does something: peft starts with B = 0."""
    torch.manual_seed(3)
    for _, parameter in adapter.own_weights(model):
        parameter.data.normal_(std=0.1)


def product(weights, layer):
    """(alpha / r) B A, by hand."""
    pair = [weights[f"base_model.model.{layer}.lora_{side}.weight"].detach().double() for side in "BA"]
    return ALPHA / RANK * pair[0] @ pair[1]


def test_the_gradient_is_the_chain_rule_through_the_full_one(tiny):
    """dL/dB = (alpha / r) dL/dW A^T and dL/dA = (alpha / r) B^T dL/dW, at the weights that the adapter adds up to."""
    lora, full = learner_of(tiny), learner_of(tiny, lora_rank=0)
    randomise(lora.model)
    weights = dict(lora.weights())
    plain = dict(full.model.named_parameters())
    layers = [name.removesuffix(".weight") for name in plain if "_proj.weight" in name]
    assert len(weights) == 2 * len(layers) == 28  # every linear layer but the head
    with torch.no_grad():
        for layer in layers:
            plain[f"{layer}.weight"] += product(weights, layer).float()
    data = weighted(rows(*SEQUENCES), "token")
    for learner in (lora, full):
        learner.forward_backward(data, Objective())
    mine, whole = gradient(lora), gradient(full)
    assert mine.keys() == {f"{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"}
    for layer in layers:
        a, b = (weights[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
        slope = ALPHA / RANK * whole[f"{layer}.weight"]
        by_hand = {"A": b.T @ slope, "B": slope @ a.T}
        for side, expected in by_hand.items():
            torch.testing.assert_close(mine[f"{layer}.lora_{side}.default.weight"], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_adapter_moves_and_the_reference_is_the_model_that_the_run_began_with(tiny, dtype):
    learner, data = learner_of(tiny, reference=True, dtype=dtype), weighted(rows(*SEQUENCES), "token")
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    assert {p.dtype for p in before.values()} == {getattr(torch, dtype)}
    learner.forward_backward(data, Objective())
    learner.step(1e-2)
    moved = {n for n, p in learner.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_B" in name for name in moved)  # A's gradient is 0 while B is
    base = learner_of(tiny, lora_rank=0, dtype=dtype)
    mine, own = (tensor_of(found) for found in (learner.reference_logprobs(data), base.logprobs(data)))
    torch.testing.assert_close(mine, own, rtol=0, atol=1e-6)
    assert not torch.allclose(tensor_of(learner.logprobs(data)), own, atol=1e-3)
    assert learner.reference is None  # no second model is held for it
    assert {name.partition(".")[0] for name in learner.optimizer.state()} <= {"step", "exp_avg", "exp_avg_sq", "master"}
    assert all("lora_" in name for name in learner.optimizer.state())


def greedy(model, tiny):
    cfg = train_config(model_id=str(tiny.model))
    renderer = renderer_for(load_tokenizer(cfg), "gsm8k")
    prompts = [renderer.prompt(problem) for problem in load_split(tiny.data, "test")]
    sampler = HFSampler(model, renderer)
    return [group[0].token_ids for group in draw(sampler, prompts, SamplingParams(24, temperature=0.0))]


def test_a_merged_model_is_the_base_plus_the_product_and_answers_the_same(tiny, tmp_path):
    learner = learner_of(tiny)
    randomise(learner.model)
    learner.save(tmp_path / "adapter")
    asked = {
        name: config.build(config.ModelConfig, {"model_id": str(tmp_path / name)}) for name in ("adapter", "merged")
    }
    done = workbench.merge(asked["adapter"], tmp_path / "merged")
    base, merged = (load_file(f / "model.safetensors") for f in (tiny.model, tmp_path / "merged"))
    assert base.keys() == merged.keys()
    weights = dict(learner.weights())
    for name, weight in base.items():
        layer = name.removesuffix(".weight")
        added = product(weights, layer) if f"base_model.model.{layer}.lora_A.weight" in weights else 0
        torch.testing.assert_close(merged[name].double(), weight.double() + added, rtol=1e-6, atol=1e-7)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert done == {"model": str(tmp_path / "merged"), "weights_sha256": weights_sha256(plain.named_parameters())}
    answers = greedy(learner.model, tiny)
    assert answers == greedy(plain, tiny) == greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), tiny)
    assert answers != greedy(AutoModelForCausalLM.from_pretrained(tiny.model), tiny)
    with pytest.raises(RunDirError, match="exists already"):
        workbench.merge(asked["adapter"], tmp_path / "merged")
    with pytest.raises(ConfigError, match="nothing to merge"):
        workbench.merge(asked["merged"], tmp_path / "again")


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_lora_run_in_pieces_is_the_run_in_one(stage, tiny, tmp_path):
    flags = LORA | ({"kl_coef": 0.1} if stage == "grpo" else {})
    run = {"sft": sft.run, "grpo": grpo.run}[stage]
    whole = run(config_of(stage, tiny, tmp_path / "whole", **flags))
    for stop in (1, 4, 0):
        pieces = run(config_of(stage, tiny, tmp_path / "pieces", max_steps=stop, **flags))
    assert pieces["weights_sha256"] == whole["weights_sha256"]
    assert story(tmp_path / "pieces") == story(tmp_path / "whole")
    names = {path.name for path in (tmp_path / "whole/checkpoints/step_000006").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names


def test_a_checkpoint_is_evaluated_and_continued_as_it_is(tiny, tmp_path):
    """The validation of the run, `eval` of the checkpoint and a next stage that takes it: the same adapter."""
    first = sft.run(config_of("sft", tiny, tmp_path / "sft", **LORA))
    flags = {"model_id": first["model"], "eval_path": str(tiny.data / "val.jsonl"), "out_dir": str(tmp_path)}
    shared = {"prompt_style": "gsm8k", "max_new_tokens": 12, "limit": 4, "deterministic": True}
    found = fast_eval_vllm.run(config.resolve("eval", flags=flags | shared))
    assert found["weights_sha256"] == first["weights_sha256"]
    logged = [json.loads(line) for line in (tmp_path / "sft/metrics.jsonl").read_text().splitlines()]
    assert found["accuracy"] == logged[-1]["val/accuracy"]
    next_one = {"model_id": first["model"], "kl_coef": 0.1, "max_steps": 1}
    with workbench.open_workbench(config_of("grpo", tiny, tmp_path / "peek", **next_one, **LORA), "grpo", {}) as bench:
        data = weighted(rows(*SEQUENCES), "token")
        began = bench.learner.logprobs(data)
        assert weights_sha256(bench.learner.weights()) == first["weights_sha256"]
        randomise(bench.learner.model)
        assert bench.learner.reference_logprobs(data) == began  # SFT's model, not the base
    grown = grpo.run(config_of("grpo", tiny, tmp_path / "grpo", **next_one, **LORA))
    held = json.loads((Path(grown["model"]) / "adapter_config.json").read_text())
    stored = AutoModelForCausalLM.from_pretrained(grown["model"])
    assert weights_sha256(adapter.own_weights(stored)) == grown["weights_sha256"] != first["weights_sha256"]
    assert held["base_model_name_or_path"] == str(tiny.model) and held["r"] == RANK


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({"lora_rank": 8, "lora_alpha": ALPHA}, "--lora_rank 4"),
        ({"lora_rank": RANK, "lora_alpha": 99}, "--lora_alpha 12"),
        ({"lora_rank": 0}, "merge"),
    ],
)
def test_an_adapter_of_another_rank_or_alpha_is_refused(tiny, tmp_path, flags, what):
    learner_of(tiny).save(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=what):
        sft.run(config_of("sft", tiny, tmp_path / "run", model_id=str(tmp_path / "adapter"), **flags))
    with pytest.raises(ConfigError, match="--lora_targets nothing"):
        sft.run(config_of("sft", tiny, tmp_path / "run", **LORA, lora_targets="nothing"))


def test_a_run_is_held_to_the_base_that_it_began_with(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    flags = LORA | {"model_id": str(model)}
    sft.run(config_of("sft", tiny, tmp_path / "run", max_steps=2, **flags))
    other = AutoModelForCausalLM.from_pretrained(model)
    other.model.embed_tokens.weight.data[7] += 1e-3
    other.save_pretrained(model)
    with pytest.raises(CheckpointError, match="began from other weights"):
        sft.run(config_of("sft", tiny, tmp_path / "run", **flags))
