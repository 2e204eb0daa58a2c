"""What an update will need, against models that were made and numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.trainer import learner as learner_module
from grpo_gsm8k.trainer import plan
from grpo_gsm8k.trainer.batch import make_batch
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.objectives import Objective
from tests.toys import rows, stage_config, train_config

MATH_1B5 = {  # Qwen2.5-Math-1.5B
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def saved_activations(length):
    """Bytes that autograd keeps in the layers of a small model, each storage once, weights left out."""
    config = Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    model, kept = Qwen2ForCausalLM(config), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x  # held, so that no other takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model.base_model(input_ids=torch.zeros(1, length, dtype=torch.long))
    assert out.last_hidden_state.requires_grad
    return sum(x.untyped_storage().nbytes() for x in kept.values()), config


def test_the_activations_of_a_cell_are_what_autograd_keeps():
    (few, config), (many, _) = saved_activations(64), saved_activations(128)
    assert plan.cell_bytes(config, 4) == pytest.approx((many - few) / 64, rel=0.15)


def test_an_estimate_of_the_full_recipe(tmp_path):
    Qwen2Config(**MATH_1B5, architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path)
    cfg = stage_config("grpo", model_id=str(tmp_path), max_new_tokens=250, rollouts_per_step=2048)
    found = plan.estimate(cfg, "H200")
    assert found["weights"] == 1_543_714_304  # as its card has it: 1.54B
    assert found["fits"] and not plan.estimate(cfg, "4090")["fits"]
    # 6 x (1.31e9 x 716,800 + 0.233e9 x 512,000) operations at 989e12 a second
    assert found["update_seconds_at_peak"] == pytest.approx(6.42, abs=0.02)
    with pytest.raises(ConfigError, match="H200"):
        plan.estimate(cfg, "B9000")


def test_running_out_of_memory_says_what_to_lower(tiny, monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError

    learner = TorchLearner(Qwen2ForCausalLM.from_pretrained(tiny.model), None, train_config())
    monkeypatch.setattr(learner_module, "token_logprobs", too_large)
    four = make_batch(rows(*[(range(3, 24), 1)] * 4), 0)  # 4 rows of 20 tokens, the budget is 512
    with pytest.raises(ConfigError, match="--max_tokens_per_microbatch 40"):
        learner.forward_backward(four, Objective())
    with pytest.raises(ConfigError, match="single row of 20 tokens"):
        learner.logprobs(make_batch(rows((range(3, 24), 1)), 0))


def test_a_budget_is_found_on_a_cpu(tiny):
    model = Qwen2ForCausalLM.from_pretrained(tiny.model)
    assert TorchLearner(model, None, train_config(max_tokens_per_microbatch=0)).budget == plan.CPU_CELLS
    assert TorchLearner(model, None, train_config(max_tokens_per_microbatch=77)).budget == 77
