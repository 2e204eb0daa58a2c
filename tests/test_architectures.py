"""What is sampled and what is trained are each architecture's own `model(ids).logits.log_softmax(-1)`, or it is refused.

Every model of `tests/architectures.py` is held against itself: its plain forward pass, one row at a time, without a
cache, padding, packing or our head.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_gsm8k.datatypes import Problem, Prompt, SamplingParams
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.errors import ConfigError, ModelError
from grpo_gsm8k.trainer.architecture import context_length
from grpo_gsm8k.trainer.batch import make_batch
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.objectives import Objective
from tests.architectures import CONFIGS, VOCAB, make
from tests.toys import gradient, rows, train_config

QUICK = ("gemma2", "cohere", "granite", "gpt2", "stablelm", "bloom", "mamba", "lfm2", "qwen3.5", "falcon-h1", "mixtral")
UNTRAINED = {}
UNSAMPLED = {}
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


def own_logprobs(model, ids, prompt, temperature=1.0):
    """Of the ids behind the prompt, through the model's logits of this row alone."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, prompt - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[prompt:]).unsqueeze(-1)).squeeze(-1)


def sampler_case(name: str, folder: Path) -> str:
    """Completions that end at different times, three a prompt, of prompts of different lengths."""
    model = make(name)
    sampler = HFSampler(model, RENDERER)
    prompts = [Prompt(Problem(str(k), "", "", ""), tuple(ids)) for k, ids in enumerate(PROMPTS)]
    drawn = sampler.sample(prompts, SamplingParams(3, 14, TEMPERATURE, seed=1))
    lengths = {len(completion.token_ids) for group in drawn for completion in group}
    assert len(lengths) > 1, lengths  # or no row would leave the batch early
    worst = 0.0
    for prompt, group in zip(prompts, drawn, strict=True):
        for completion in group:
            ids = [*prompt.token_ids, *completion.token_ids]
            with torch.no_grad():
                own = own_logprobs(model, ids, len(prompt.token_ids), TEMPERATURE)
            worst = max(worst, float((own - torch.tensor(completion.logprobs)).abs().max()))
    assert worst < 1e-5, worst
    return f"{worst:.1e}"


def trainer_case(name: str, folder: Path) -> str:
    """Log-probabilities, loss and gradient: padded, packed where it can be, checkpointed, and after save and load."""
    plain = make(name)
    total = sum(-own_logprobs(plain, ids, prompt, TEMPERATURE).sum() for ids, prompt in SEQUENCES)
    total.backward()
    expected = {key: p.grad for key, p in plain.named_parameters() if p.grad is not None}
    largest = max(float(grad.abs().max()) for grad in expected.values())
    tokens = sum(len(ids) - prompt for ids, prompt in SEQUENCES)
    batch, objective = make_batch(rows(*SEQUENCES), 0, "token"), Objective(temperature=TEMPERATURE)
    ways = ["off", "auto"]
    for packing in ways:
        for checkpointing in (False, True):
            flags = {"packing": packing, "activation_checkpointing": checkpointing}
            learner = TorchLearner(make(name), Saved(), train_config(**flags))
            check_logprobs(learner, plain, batch)
            loss = learner.forward_backward(batch, objective)["loss"]
            assert abs(loss * tokens - float(total)) < 1e-4 * float(total)
            for key, mine in gradient(learner).items():
                own = expected.get(key, torch.zeros_like(mine))
                assert torch.allclose(mine * tokens, own, rtol=1e-3, atol=1e-5 * largest), key
    learner.step(1e-2)
    learner.save(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=plain.config._attn_implementation)
    check_logprobs(learner, loaded.eval(), batch)
    return "packed" if learner.packs else "padded"


def check_logprobs(learner, plain, batch):
    for mine, (ids, prompt) in zip(learner.logprobs(batch, TEMPERATURE), SEQUENCES, strict=True):
        with torch.no_grad():
            own = own_logprobs(plain, ids, prompt, TEMPERATURE)
        worst = float((mine[prompt - 1 : len(ids) - 1] - own).abs().max())
        assert worst < 1e-5, worst


class Saved:
    """Stands for a tokenizer."""

    def save_pretrained(self, folder):
        """Writes nothing."""
