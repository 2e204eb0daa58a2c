"""The embedded sampler: seeded per sample, exact log-probabilities, honest finish reasons, fresh weights."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_gsm8k.datatypes import SamplingParams
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.engines.hf import draw as _draw
from grpo_gsm8k.engines.probe import logprob_differences
from grpo_gsm8k.errors import ModelError, NonFiniteError
from grpo_gsm8k.trainer.learner import TorchLearner
from tests.toys import attentive, datum, draw, load, load_split, renderer_for, train_config, word_problem

PARAMS = SamplingParams(max_new_tokens=10, temperature=1.0)


@pytest.fixture(scope="module")
def parts(tiny):
    model = attentive(AutoModelForCausalLM.from_pretrained(tiny.model))
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    renderer = renderer_for(tokenizer)
    prompts = [renderer.prompt(problem) for problem in load_split(tiny.data, "train")[:6]]
    return model, tokenizer, renderer, prompts


@pytest.fixture
def sampler(parts):
    model, _, renderer, _ = parts
    return HFSampler(model, renderer)


def as_rows(prompts, drawn):
    out = []
    for prompt, completions in zip(prompts, drawn, strict=True):
        for c in completions:
            zeros = (0,) * len(prompt.token_ids)
            ids = prompt.token_ids + c.token_ids
            out.append(datum(ids, zeros + (1,) * len(c.token_ids), zeros + c.logprobs, 1.0))
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_the_trainers(parts, sampler, temperature):
    """trl#4159: under the sampling temperature, an on-policy ratio is 1 for prompts of any length."""
    model, tokenizer, _, prompts = parts
    drawn = draw(sampler, prompts, replace(PARAMS, temperature=temperature), 3, 5)
    data = as_rows(prompts, drawn)
    mine = TorchLearner(model, tokenizer, train_config()).logprobs(data, temperature)
    assert max(logprob_differences(data, mine)) < 1e-5


def test_greedy_is_what_generate_gives(parts, sampler):
    model, _tokenizer, _, prompts = parts
    for prompt, (mine,) in zip(prompts, draw(sampler, prompts, SamplingParams(12, 0.0)), strict=True):
        ids = torch.tensor([prompt.token_ids])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert list(mine.token_ids) == theirs[0, len(prompt.token_ids) :].tolist()


def test_same_seed_same_draw_whatever_is_sampled_beside_it(parts, sampler):
    model, _, renderer, prompts = parts
    together = draw(sampler, prompts, PARAMS, 3, 5)
    for i, prompt in enumerate(prompts):
        alone = draw(sampler, [prompt], PARAMS, 3, 5)[0]
        assert [c.token_ids for c in alone] == [c.token_ids for c in together[i]]
    few_rows = draw(HFSampler(model, renderer, rows=4), prompts[::-1], PARAMS, 3, 5)[::-1]
    assert [[c.token_ids for c in g] for g in few_rows] == [[c.token_ids for c in g] for g in together]


def test_samples_of_a_prompt_differ_and_another_seed_draws_anew(parts, sampler):
    _, _, _, prompts = parts
    drawn = draw(sampler, prompts, PARAMS, 3, 5)
    assert all(len({c.token_ids for c in group}) > 1 for group in drawn)
    assert len({c.seed for group in drawn for c in group}) == 18
    assert draw(sampler, prompts, PARAMS, 3, 6) != drawn


def test_finish_reason_says_whether_the_model_ended(parts, sampler):
    model, _tokenizer, renderer, prompts = parts
    eager = HFSampler(model, renderer)
    # Any of the model's several end ids ends (trl#7039), and is kept as sampled.
    ends = set(range(40, 90))
    eager.stop_ids = frozenset(ends)
    reasons = Counter()
    for group in draw(eager, prompts, replace(PARAMS, max_new_tokens=6), 8, 5):
        for c in group:
            reasons[c.finish_reason] += 1
            assert len(c.token_ids) == len(c.logprobs) <= 6
            if c.finish_reason == "stop":
                assert c.token_ids[-1] in ends and not ends & set(c.token_ids[:-1])
            else:
                assert len(c.token_ids) == 6 and not ends & set(c.token_ids)
    assert reasons["stop"] and reasons["length"]


def test_the_context_ends_a_completion_too(parts):
    model, _, renderer, prompts = parts
    short = HFSampler(model, renderer)
    short.context = max(len(p.token_ids) for p in prompts) + 2
    for prompt, group in zip(prompts, draw(short, prompts, replace(PARAMS, max_new_tokens=30), 3, 5), strict=True):
        for c in group:
            room = short.context - len(prompt.token_ids)
            assert len(c.token_ids) <= room and (c.finish_reason == "stop" or len(c.token_ids) == min(room, 30))


def test_stop_ids_come_from_the_template_the_tokenizer_and_the_model(parts, sampler):
    _, tokenizer, _, _ = parts
    assert sampler.stop_ids >= {tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")}


def test_a_stop_string_ends_a_completion(parts, sampler):
    _, _, renderer, prompts = parts
    free = draw(sampler, prompts[:1], replace(PARAMS, max_new_tokens=10), 1, 5)[0][0]
    word = renderer.decode(free.token_ids[2:4])
    cut = draw(sampler, prompts[:1], replace(PARAMS, max_new_tokens=10, stop=(word,)), 1, 5)[0][0]
    assert cut.finish_reason == "stop" and word in cut.text and len(cut.token_ids) <= 4
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]


def test_new_weights_reach_the_sampler_and_carry_their_version(parts, sampler):
    """trl#5312: perturb the weights, and the sampler's log-probabilities follow."""
    model, tokenizer, _, prompts = parts
    other = AutoModelForCausalLM.from_config(model.config)
    other.load_state_dict(model.state_dict())
    learner = TorchLearner(other, tokenizer, train_config())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    before = draw(sampler, prompts, PARAMS, 3, 5)
    stale = as_rows(prompts, before)
    assert max(logprob_differences(stale, learner.logprobs(stale))) > 0.01
    load(sampler, 7, learner.weights())
    drawn = draw(sampler, prompts, PARAMS, 3, 5)
    assert {c.policy_version for group in drawn for c in group} == {7}
    fresh = as_rows(prompts, drawn)
    assert max(logprob_differences(fresh, learner.logprobs(fresh))) < 5e-5


def test_training_does_not_reach_into_the_sampler(parts, sampler):
    model = parts[0]
    assert all(
        a.data_ptr() != b.data_ptr() for a, b in zip(model.parameters(), (p for _, p in sampler.weights()), strict=True)
    )


def test_a_hand_over_that_does_not_fit_is_refused(sampler):
    weights = dict(sampler.weights())
    name = next(iter(weights))
    with pytest.raises(ModelError, match="missing"):
        load(sampler, 1, [(n, w) for n, w in weights.items() if n != name])
    with pytest.raises(ModelError, match=name):
        load(sampler, 1, [(name, weights[name][:-1])])


def test_draws_follow_the_distribution():
    """Inversion over an even grid of uniforms gives each token its probability, exactly to the grid."""
    probs = torch.tensor([0.5, 0.2, 0.0, 0.3])
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    chosen, logp = _draw(probs.log().expand(1000, 4), grid, SamplingParams())
    assert Counter(chosen.tolist()) == {0: 500, 1: 200, 3: 300}
    assert float(logp[0]) == pytest.approx(math.log(0.5), abs=1e-6)
    # T = 1/2 squares the odds: 25 : 4 : 9
    chosen, _ = _draw(probs.log().expand(1000, 4), grid, SamplingParams(temperature=0.5))
    counts = Counter(chosen.tolist())
    assert [counts[i] / 1000 for i in (0, 1, 3)] == pytest.approx([25 / 38, 4 / 38, 9 / 38], abs=2e-3)


@pytest.mark.parametrize("vocabulary", [5, 512, 513, 2000])
def test_two_levels_of_inversion_draw_what_one_would(vocabulary):
    """Against numpy's search in the whole cumulative distribution; many tokens have no probability at all."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(300, vocabulary, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < 0.5] = float("-inf")
    logits[:, 1] = 0.0
    uniforms = torch.rand(300, generator=generator, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
    chosen, _ = _draw(logits, uniforms, SamplingParams())
    mass = np.cumsum(np.exp(logits.double().numpy()), axis=1)
    wanted = [
        int(np.searchsorted(row, u * row[-1], side="right")) for row, u in zip(mass, uniforms.numpy(), strict=True)
    ]
    assert sum(a == b for a, b in zip(chosen.tolist(), wanted, strict=True)) >= 299  # one may lie on an edge
    assert torch.isfinite(logits.gather(-1, chosen.unsqueeze(-1))).all()


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    probs = torch.tensor([0.1, 0.5, 0.15, 0.25])
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    chosen, logp = _draw(probs.log().expand(1000, 4), grid, SamplingParams(top_p=0.7))
    counts = Counter(chosen.tolist())
    assert counts.keys() == {1, 3} and counts[1] == pytest.approx(667, abs=1)
    assert float(logp[0]) in [pytest.approx(math.log(p), abs=1e-5) for p in (0.5, 0.25)]  # before truncation


def test_logits_that_are_no_numbers_stop_the_run(parts, sampler):
    with torch.no_grad():
        for _, parameter in sampler.weights():
            parameter.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        draw(sampler, parts[3][:1], PARAMS, 3, 5)


def test_a_prompt_keeps_the_ids_it_was_rendered_with(parts, sampler):
    """Only token ids cross the boundary: nothing adds a second BOS, and the text is not tokenised again."""
    _, _tokenizer, renderer, _ = parts
    seen = []
    inner = sampler.model.forward

    def spy(input_ids, **kwargs):
        seen.append(input_ids.clone())
        return inner(input_ids=input_ids, **kwargs)

    sampler.model.forward = spy
    prompt = renderer.prompt(word_problem("x", "Two  spaces\tand é?", "#### 1", "1"))
    draw(sampler, [prompt], SamplingParams(2))
    assert seen[0][0].tolist() == list(prompt.token_ids)
