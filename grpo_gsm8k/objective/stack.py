"""The same questions to the real sampler, renderer, learner and optimizer, on a model of a few thousand weights.

The table policy of `world.py` replaces the model, so it cannot show what happens to a prompt on its way to the sampler,
to new weights, or to a small update in bfloat16. Each check here is one of these.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from grpo_gsm8k.config import GrpoConfig
from grpo_gsm8k.datatypes import Completion, Datum, Example, Prompt, SamplingParams, WeightsRef
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.engines.probe import completed, logprob_differences, probe
from grpo_gsm8k.errors import EngineError
from grpo_gsm8k.evals.evaluator import InlineEvaluator
from grpo_gsm8k.objective.checks import WARM, Check
from grpo_gsm8k.repro import requests
from grpo_gsm8k.tasks import load_task
from grpo_gsm8k.tasks.base import Tags, TaskOptions
from grpo_gsm8k.tasks.render import Renderer
from grpo_gsm8k.trainer.data import weighted
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.losses import GrpoClip, Objective
from grpo_gsm8k.trainer.optimizer import MasterAdamW
from grpo_gsm8k.trainer.policy import weights_sha256

BOS, EOS = 0, 1
CONFIG = GrpoConfig(device="cpu", lr=1e-2, grad_clip=0.0, max_tokens_per_microbatch=4096)
QUESTIONS = ("Two  spaces\tand é?", "How many are 3 and 4?")
SAME = 1e-4  # log-probabilities of sampler and trainer, in float32
STEPS, TINY = 50, 1e-4  # at 1.0 bfloat16 has steps of 2^-7, so each update alone is lost


@dataclass
class Stack:
    """A learner, a sampler that holds its weights, and prompts."""

    renderer: Renderer
    learner: TorchLearner
    sampler: HFSampler
    prompts: list[Prompt]

    def draw(self, temperature: float = 1.0, n: int = 4) -> list[list[Completion]]:
        """Completions of each prompt."""
        return self.sampler.sample(requests(self.prompts, n, 0), SamplingParams(6, temperature))

    def rows(self, temperature: float = 1.0) -> list[Datum]:
        """Completions as rows, with alternating advantages."""
        asked = requests(self.prompts, 4, 0)
        drawn = zip(asked, self.draw(temperature), strict=True)
        bare = [completed(request, one) for request, group in drawn for one in group]
        signs = [1.0 if number % 2 else -0.5 for number in range(len(bare))]
        data = [
            Datum(row.token_ids, row.mask, row.logprobs, tuple(sign * m for m in row.mask))
            for row, sign in zip(bare, signs, strict=True)
        ]
        return weighted(data, "token")

    def train(self) -> WeightsRef:
        """One update; returns the weights that it made."""
        self.learner.forward_backward(self.rows(), Objective(GrpoClip()))
        self.learner.step(CONFIG.lr)
        return self.learner.publish(1)


def make_stack() -> Stack:
    """A fresh stack; always the same."""
    logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(_tokenizer()), tie_word_embeddings=True, **sizes))
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    ends = list(range(2, len(_tokenizer()), 3))  # a third of all tokens: several end a completion
    model.generation_config = GenerationConfig(eos_token_id=[EOS, *ends], pad_token_id=EOS)
    renderer = Renderer(_tokenizer(), load_task("gsm8k", TaskOptions("gsm8k", Tags())))
    prompts = [renderer.prompt(Example(f"p{k}", text, "7", {"solution": ""})) for k, text in enumerate(QUESTIONS)]
    return Stack(renderer, TorchLearner(model, renderer, CONFIG), HFSampler(model, renderer), prompts)


@functools.cache
def _tokenizer() -> Any:
    """Bytes as tokens, and a BOS that the tokenizer puts before whatever it is given."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    bytes_ = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytes_.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token="<s>", eos_token="</s>")


# ------------------------------------------------------------------------------------------------------ checks


def one_bos(stack: Stack) -> Check:
    """A prompt has one BOS, though the tokenizer adds one by itself."""
    counts = [prompt.token_ids.count(BOS) for prompt in stack.prompts]
    return Check("a prompt begins with one BOS", set(counts) == {1}, f"counted {counts}")


def ids_cross(stack: Stack) -> Check:
    """The sampler's model reads the very ids of the prompt."""
    seen, inner = [], stack.sampler.model.forward

    def spy(input_ids: torch.Tensor, **more: Any) -> Any:
        seen.append(input_ids)
        return inner(input_ids=input_ids, **more)

    stack.sampler.model.forward = spy
    try:
        for prompt in stack.prompts:
            stack.sampler.sample(requests([prompt], 1, 0), SamplingParams(1))
    finally:
        stack.sampler.model.forward = inner
    same = [tuple(ids[0].tolist()) for ids in seen] == [prompt.token_ids for prompt in stack.prompts]
    return Check("the sampler reads the prompt's own ids", same, "two prompts with odd spaces and bytes")


def every_end(stack: Stack) -> Check:
    """Each of the model's end-of-sequence ids ends a completion, and nothing else does before the limit."""
    name, ends = "any end-of-sequence id ends a completion", set(stack.learner.model.generation_config.eos_token_id)
    drawn = [one for group in stack.draw(n=16) for one in group]
    for one in drawn:
        stopped = one.token_ids[-1] in ends
        if ends & set(one.token_ids[:-1]) or (one.finish_reason == "stop") != stopped:
            return Check(name, False, f"{one.token_ids} is {one.finish_reason!r}")
    stops = sum(one.finish_reason == "stop" for one in drawn)
    return Check(name, stops > 0, f"{stops} of {len(drawn)} ended")


def same_logprobs(stack: Stack) -> Check:
    """At a temperature, the sampler's log-probabilities are the trainer's."""
    rows = stack.rows(WARM)
    apart = max(logprob_differences(rows, stack.learner.logprobs(rows, WARM)))
    return Check("sampler and trainer agree on log-probabilities at a temperature", apart < SAME, f"within {apart:.1g}")


def fresh_weights(stack: Stack) -> Check:
    """After an update the sampler samples from the new weights, and says which."""
    name, ref = "an update's weights reach the sampler, with their version", stack.train()
    stack.sampler.load(ref, stack.learner.weights)
    versions = {one.policy_version for group in stack.draw() for one in group}
    try:
        found = probe(stack.sampler, stack.learner, stack.prompts, 1, SAME)
    except EngineError as fault:
        return Check(name, False, str(fault))
    return Check(name, versions == {1}, f"version {versions}, within {found['sync/probe_logp_abs_max']:.1g}")


def evaluated_weights(stack: Stack) -> Check:
    """An evaluation's records carry the hash of the weights that it scored."""

    def sync(step: int) -> WeightsRef:
        ref = stack.learner.publish(step)
        stack.sampler.load(ref, stack.learner.weights)
        return ref

    evaluator = InlineEvaluator(sync, stack.sampler, stack.prompts, SamplingParams(2, 0.0), stack.renderer)
    wrong = 0
    for step in (1, 2):
        stack.train()
        with contextlib.redirect_stderr(io.StringIO()):  # its bar would speak of a validation
            evaluator.submit(step, stack.learner.weights())
        digest = weights_sha256(stack.learner.weights())
        found = [row["weights_sha256"] for at, one in evaluator.results() if at == step for row in one.rows]
        wrong += found != [digest] * len(stack.prompts) or weights_sha256(stack.sampler.weights()) != digest
    return Check("evaluation records carry the hash of their step's weights", not wrong, f"{2 - wrong} of 2 steps")


def small_updates(stack: Stack) -> Check:
    """Updates smaller than a bfloat16 weight can show add up."""
    del stack
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    optimizer = MasterAdamW(layer, CONFIG)
    for _ in range(STEPS):
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step(TINY)
    moved = 1 - float(layer.weight.detach())
    ok = abs(moved - STEPS * TINY) < 2**-8
    return Check(f"updates of {TINY:g} add up in bfloat16", ok, f"{STEPS} of them moved a weight by {moved:.2g}")


def resumed(stack: Stack) -> Check:
    """A learner loaded from a checkpoint takes the next step, bit for bit."""
    stack.train()
    rows = stack.rows()
    with tempfile.TemporaryDirectory() as folder:
        stack.learner.save(Path(folder))
        other = make_stack().learner
        other.load(Path(folder))
    digests = set()
    for learner in (stack.learner, other):
        learner.forward_backward(rows, Objective(GrpoClip()))
        learner.step(CONFIG.lr)
        digests.add(weights_sha256(learner.weights()))
    return Check("a resumed learner takes the same next step, bitwise", len(digests) == 1, "weights, moments, counters")


def readable_gold(stack: Stack) -> Check:
    """A gold that is no number is refused where it is read, and no answer is right against it."""
    name, task, gold = "no answer is right against a gold that cannot be read", stack.renderer.task, "I do not know"
    example = Example("bad", "How many?", gold)
    try:
        read = task.example({"question": "How many?", "answer": gold})
        return Check(name, False, f"the row is read, with the answer {read.answer!r}")
    except ValueError:
        pass  # as it must be
    try:
        right = task.grade(example, f"It is 7.\n#### {gold}").correct
    except ValueError:
        right = False
    return Check(name, not right, "counted as right" if right else "the row is refused")


CHECKS: tuple[Callable[[Stack], Check], ...] = (
    *(one_bos, ids_cross, every_end, same_logprobs, fresh_weights, evaluated_weights, small_updates, resumed),
    readable_gold,
)
TRAIN = (fresh_weights, evaluated_weights, resumed)
"""Checks that change the weights: each has a stack of its own."""


def stack_checks() -> list[Check]:
    """Every check."""
    untrained = make_stack()
    return [check(make_stack() if check in TRAIN else untrained) for check in CHECKS]
