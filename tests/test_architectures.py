"""What is sampled and trained is each architecture's own `model(ids).logits.log_softmax(-1)`, or it is refused.

Every model of `tests/architectures.py` is held against itself: its plain forward pass, one row at a time, without a
cache, padding, packing or our head.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from grpo_gsm8k.config import EvalConfig
from grpo_gsm8k.datatypes import Prompt, SamplingParams
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.engines.vllm import max_model_len
from grpo_gsm8k.errors import ConfigError, ModelError
from grpo_gsm8k.repro import requests
from grpo_gsm8k.trainer.architecture import context_length
from grpo_gsm8k.trainer.data import weighted
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.logprobs import check_head
from grpo_gsm8k.trainer.losses import Objective
from tests.architectures import CONFIGS, VOCAB, config_of, make
from tests.toys import batch_of, gradient, rows, tensor_of, train_config, word_problem

QUICK = ("gemma2", "granite", "falcon-alibi", "stablelm", "bloom", "mamba", "lfm2")
UNTRAINED = {"rwkv": "in place", "modernbert-decoder": "behind its head"}
UNSAMPLED = {
    "rwkv": "neither past_key_values nor cache_params",
    "recurrent-gemma": "log-probabilities differ",
    "minimax": "cache of its own",
    "zamba2": "least time step",
    "nemotron-h": "least time step",
}
PADDED = {  # windows, states, attention that is not SDPA or drops what it is given
    *("qwen2-window", "mistral-window", "gemma2", "gemma3", "gemma3n", "gemma4", "vaultgemma", "cohere2", "gpt-neo"),
    *("gpt-j", "codegen", "stablelm", "bloom", "mpt", "falcon", "falcon-alibi", "olmo3", "exaone4", "nemotron"),
    *("gpt-oss", "llama4", "granite-swa", "inkling", "mamba", "mamba2", "falcon-mamba", "recurrent-gemma", "lfm2"),
    *("lfm2-moe", "qwen3-next", "qwen3.5", "falcon-h1", "granite-moe-hybrid", "bamba", "jamba", "zamba", "zamba2"),
    *("nemotron-h", "minimax"),
}
RENDERER = SimpleNamespace(pad_id=0, stop_ids={3, 4, 5}, decode=lambda ids: "")  # often, so rows end early
PROMPTS = [[9, 10, 11, 12, 13, 14, 15, 16, 17], [9, 20, 21], [30, 31, 32, 33, 34, 35], [40]]
TEMPERATURE = 0.7
SEQUENCES = [
    ([15, 16, 17, 18, 20, 21, 22, 23, 24, 25], 4),
    ([15, 16, 17, 18, 20, 30, 31], 4),
    ([9, 10, 11, 12, 13], 2),
    ([15, 16, 17, 18, 40, 41, 42, 43, 44], 4),
    ([15, 16, 33, 34], 2),
]


def own_logprobs(model, ids, prompt):
    """Of the ids behind the prompt, through the model's logits of this row alone."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, prompt - 1 : -1].float() / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[prompt:]).unsqueeze(-1)).squeeze(-1)


def some(names):
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", some(CONFIGS))
def test_what_is_sampled_has_the_log_probabilities_of_the_models_own_logits(name):
    """Completions that end at different times, three a prompt, of prompts of different lengths."""
    model = make(name)
    if name in UNSAMPLED:
        with pytest.raises(ModelError, match=f"{type(model).__name__}.*{UNSAMPLED[name]}"):
            HFSampler(model, RENDERER)
        return
    prompts = [Prompt(word_problem(str(k), "", "", ""), tuple(ids)) for k, ids in enumerate(PROMPTS)]
    drawn = HFSampler(model, RENDERER).sample(requests(prompts, 3, 1), SamplingParams(14, TEMPERATURE))
    assert len({len(completion.token_ids) for group in drawn for completion in group}) > 1
    for prompt, group in zip(prompts, drawn, strict=True):
        for completion in group:
            with torch.no_grad():
                own = own_logprobs(model, [*prompt.token_ids, *completion.token_ids], len(prompt.token_ids))
            assert torch.allclose(own, torch.tensor(completion.logprobs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", some(CONFIGS))
def test_what_is_trained_has_the_log_probabilities_and_gradients_of_the_models_own_logits(name, tmp_path):
    """Padded, packed where it can be, with activation checkpointing, and after save and load."""
    if name in UNTRAINED:
        with pytest.raises(ModelError, match=f"ForCausalLM.*{UNTRAINED[name]}"):
            TorchLearner(make(name), Saved(), train_config())
        return
    plain = make(name)
    total = sum(-own_logprobs(plain, ids, prompt).sum() for ids, prompt in SEQUENCES)
    total.backward()
    expected = {key: p.grad for key, p in plain.named_parameters() if p.grad is not None}
    largest = max(float(grad.abs().max()) for grad in expected.values())
    tokens = sum(len(ids) - prompt for ids, prompt in SEQUENCES)
    data, objective = weighted(rows(*SEQUENCES), "token"), Objective(temperature=TEMPERATURE)
    for packing, checkpointing in (("off", False), ("auto", False), ("off", True), ("auto", True)):
        flags = {"packing": packing, "activation_checkpointing": checkpointing}
        learner = TorchLearner(make(name), Saved(), train_config(**flags))
        assert learner.packs == (packing == "auto" and name not in PADDED)
        check_logprobs(learner, plain, data)
        loss = learner.forward_backward(data, objective)["loss"]
        assert loss * tokens == pytest.approx(float(total.detach()), rel=1e-5)
        for key, mine in gradient(learner).items():
            own = expected.get(key, torch.zeros_like(mine))
            assert torch.allclose(mine * tokens, own, rtol=1e-3, atol=1e-5 * largest), key
    learner.step(1e-2)
    learner.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=plain.config._attn_implementation)
    check_logprobs(learner, loaded.eval(), data)


def test_as_many_architectures_as_promised_are_served():
    assert len(CONFIGS.keys() - UNTRAINED.keys() - UNSAMPLED.keys()) >= 60


def check_logprobs(learner, plain, data):
    for mine, (ids, prompt) in zip(learner.logprobs(data, TEMPERATURE), SEQUENCES, strict=True):
        with torch.no_grad():
            own = own_logprobs(plain, ids, prompt)
        assert torch.allclose(torch.tensor(mine[prompt:]), own, rtol=0, atol=1e-5)


class Saved:
    """Stands for a tokenizer."""

    def save_pretrained(self, folder):
        """Writes nothing."""


# ------------------------------------------------------------------------------------------- single architectures


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2-dropout", "opt", "falcon-alibi", "mixtral"])
def test_no_pass_has_dropout_layer_drop_or_router_noise(name, checkpointing):
    learner = TorchLearner(make(name), Saved(), train_config(activation_checkpointing=checkpointing))
    data = weighted(rows(*SEQUENCES), "token")
    assert learner.logprobs(data) == learner.logprobs(data)
    again = [(learner.forward_backward(data, Objective())["loss"], gradient(learner)) for _ in range(2)]
    assert again[0][0] == again[1][0]
    for key, once in again[0][1].items():
        assert torch.allclose(again[1][1][key], 2 * once, rtol=1e-4, atol=1e-6)
    before = config_of(name).to_dict()
    assert {k: v for k, v in learner.model.config.to_dict().items() if "drop" in k and k in before} == {
        k: v for k, v in before.items() if "drop" in k
    }


def test_an_adapter_that_came_with_dropout_has_none():
    from peft import LoraConfig

    model = make("llama")
    model.add_adapter(LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    learner = TorchLearner(model, Saved(), train_config(activation_checkpointing=True))
    data = weighted(rows(*SEQUENCES), "token")
    losses = {learner.forward_backward(data, Objective())["loss"] for _ in range(3)}
    frozen = -float((tensor_of(learner.logprobs(data)) * batch_of(data).weights).sum())
    assert len(losses) == 1 and losses.pop() == pytest.approx(frozen, abs=1e-5)


def test_a_router_loss_that_the_config_asks_for_is_named_and_left_out(capsys):
    TorchLearner(make("qwen2-moe"), Saved(), train_config())
    assert "router_aux_loss_coef 0.001" in capsys.readouterr().err
    TorchLearner(make("qwen3-moe"), Saved(), train_config())
    assert "router" not in capsys.readouterr().err


def test_the_context_ends_where_rows_would_depend_on_their_neighbours():
    assert context_length(config_of("phi3-longrope")) == 32  # not 96: beyond, a long row turns the short ones, too
    assert context_length(config_of("llama-dynamic")) == context_length(config_of("llama")) == 96
    assert context_length(config_of("gpt2")) == context_length(config_of("mpt")) == 96
    assert context_length(config_of("mamba")) == context_length(config_of("bloom")) == 1 << 20
    model = make("phi3-longrope")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.qkv_proj.weight *= 2
    ids = torch.arange(5, 45).unsqueeze(0)
    short, beside = ids[:, :20], torch.cat([torch.cat([ids[:, :20], ids[:, :20] * 0], 1), ids])
    alone = model(input_ids=short).logits
    assert torch.allclose(model(input_ids=beside[:, :32]).logits[:1, :20], alone, atol=1e-4)
    assert not torch.allclose(model(input_ids=beside).logits[:1, :20], alone, atol=1e-2)


def test_vllm_keeps_to_the_factors_of_short_rows(tmp_path):
    for name, asked, expected in (
        ("phi3-longrope", 0, 32),
        ("phi3-longrope", 20, 20),
        ("phi3", 0, None),
        ("phi3", 50, 50),
    ):
        config_of(name).save_pretrained(tmp_path)
        assert max_model_len(EvalConfig(model_id=str(tmp_path), max_model_len=asked)) == expected


def test_completions_end_with_the_context():
    prompts = [Prompt(word_problem("0", "", "", ""), tuple(range(9, 39)))]
    (drawn,) = HFSampler(make("phi3-longrope"), RENDERER).sample(
        requests(prompts, 4, 0), SamplingParams(14, TEMPERATURE)
    )
    assert {len(completion.token_ids) for completion in drawn} <= {1, 2}


def test_packing_is_refused_where_attention_drops_what_it_is_given():
    assert not TorchLearner(make("stablelm"), Saved(), train_config(packing="auto")).packs
    with pytest.raises(ConfigError, match="--packing on"):
        TorchLearner(make("stablelm"), Saved(), train_config(packing="on"))


def test_a_model_that_does_more_behind_its_head_is_refused_by_name(monkeypatch):
    model = make("llama")
    plain = type(model).forward

    def doubled(self, **inputs):
        out = plain(self, **inputs)
        out.logits = out.logits * 1.5
        return out

    monkeypatch.setattr(type(model), "forward", doubled)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*behind its head"):
        check_head(model)


def test_a_model_that_sees_what_follows_is_refused():
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelError, match="BertLMHeadModel"):
        check_head(model)


def test_the_same_prompt_twice_draws_on():
    prompt = Prompt(word_problem("7", "", "", ""), (9, 20, 21))
    sampler, params = HFSampler(make("qwen3"), RENDERER), SamplingParams(8, 1.0)
    first, second, third = sampler.sample(requests([prompt] * 3, 2, 3), params)
    (six,) = sampler.sample(requests([prompt], 6, 3), params)
    assert [c.token_ids for c in first + second + third] == [c.token_ids for c in six]
    assert len({c.seed for c in six}) == 6
