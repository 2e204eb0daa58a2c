"""Decoding in static buffers, as on a GPU: the same tokens and log-probabilities as with a cache that grows."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GenerationConfig,
    GPTNeoXConfig,
    MistralConfig,
    Qwen3Config,
)

from grpo_gsm8k import repro
from grpo_gsm8k.datatypes import SamplingParams
from grpo_gsm8k.engines import static_cache
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.errors import NonFiniteError
from grpo_gsm8k.trainer import packing
from tests.rehearsal import CUDNN, MATH, Pretend
from tests.toys import attentive, draw, load, load_split, renderer_for

PARAMS = SamplingParams(max_new_tokens=21, temperature=0.9)
SMALL = {"vocab_size": 211, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": None}
GROUPED = {**SMALL, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def parts(tiny):
    model = attentive(AutoModelForCausalLM.from_pretrained(tiny.model))
    renderer = renderer_for(AutoTokenizer.from_pretrained(tiny.model))
    return model, renderer, [renderer.prompt(problem) for problem in load_split(tiny.data, "train")[:7]]


@pytest.fixture
def deterministic():
    repro.set_deterministic(True)
    yield
    repro.set_deterministic(False)


def both_ways(model, renderer, prompts, params, ends=(), rows=256, context=0, n=3):
    found = []
    for static in (False, True):
        sampler = HFSampler(model, renderer, rows, static=static)
        assert bool(sampler.static) == static
        sampler.stop_ids = frozenset(sampler.stop_ids | set(ends))
        if context:
            sampler.context = context
            if sampler.static:
                sampler.static.context = context
        found.append(draw(sampler, prompts, params, n, 5))
    return found


def assert_alike(plain, static):
    for one, other in zip(plain, static, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.token_ids == b.token_ids and a.finish_reason == b.finish_reason and a.seed == b.seed
            assert b.logprobs == pytest.approx(a.logprobs, abs=2e-5)


@pytest.mark.parametrize(
    ("params", "n", "ends", "rows"),
    [
        (PARAMS, 3, (), 256),
        (replace(PARAMS, max_new_tokens=40), 8, range(40, 60), 256),  # rows end one by one, and are moved together
        (replace(PARAMS, temperature=0.0, max_new_tokens=8), 1, (), 256),
        (replace(PARAMS, top_p=0.8, max_new_tokens=1), 3, (), 256),
        (PARAMS, 4, range(40, 90), 9),  # several chunks share the buffers
    ],
)
def test_static_buffers_decode_what_a_growing_cache_does(parts, params, n, ends, rows):
    assert_alike(*both_ways(*parts, params, ends, rows, n=n))


def test_deterministic_kernels_decode_the_same(parts, deterministic):
    """In buffers and without; and to the bit what the other kernels write into the same buffers."""
    params = replace(PARAMS, max_new_tokens=40)
    plain, static = both_ways(*parts, params, range(40, 60), n=8)
    assert_alike(plain, static)
    repro.set_deterministic(False)
    assert both_ways(*parts, params, range(40, 60), n=8)[1] == static


def test_rows_that_differ_in_room_and_grow_beyond_a_bucket(parts, monkeypatch):
    model, renderer, prompts = parts
    monkeypatch.setattr(static_cache, "LEAST_COLUMNS", 16)
    monkeypatch.setattr(static_cache, "LEAST_ROWS", 2)
    longest = max(len(p.token_ids) for p in prompts)
    plain, static = both_ways(
        model, renderer, prompts, replace(PARAMS, max_new_tokens=90), range(40, 46), context=longest + 70
    )
    assert_alike(plain, static)
    lengths = {len(c.token_ids) for group in static for c in group}
    assert len(lengths) > 3


@pytest.mark.parametrize(
    "config", [Qwen3Config(**GROUPED, head_dim=16), GPTNeoXConfig(**SMALL), GemmaConfig(**GROUPED, head_dim=16)]
)
def test_other_architectures(parts, config):
    _, renderer, prompts = parts
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    short = [replace(p, token_ids=tuple(i % 211 for i in p.token_ids)) for p in prompts]
    assert_alike(*both_ways(model, renderer, short, PARAMS))


def test_a_cache_of_windows_is_decoded_as_before(parts, capsys):
    _, renderer, _ = parts
    model = AutoModelForCausalLM.from_config(MistralConfig(**GROUPED, sliding_window=8))
    assert HFSampler(model, renderer, static=True).static is None
    assert "without CUDA graphs" in capsys.readouterr().err


def test_logits_that_are_no_numbers_stop_the_run(parts):
    model, renderer, prompts = parts
    for params in (PARAMS, replace(PARAMS, temperature=0.0), replace(PARAMS, top_p=0.5)):
        sampler = HFSampler(model, renderer, static=True)
        with torch.no_grad():
            for _, parameter in sampler.weights():
                parameter.fill_(float("nan"))
        with pytest.raises(NonFiniteError):
            draw(sampler, prompts[:2], params, 3, 5)


def test_new_weights_reach_the_buffers(parts):
    model, renderer, prompts = parts
    sampler = HFSampler(model, renderer, static=True)
    before = draw(sampler, prompts, PARAMS, 3, 5)
    fresh = {name: weight.clone() * 1.1 for name, weight in sampler.weights()}
    load(sampler, 1, fresh.items())
    after = draw(sampler, prompts, PARAMS, 3, 5)
    assert after != before
    other = HFSampler(model, renderer, static=False)
    load(other, 1, fresh.items())
    assert_alike(draw(other, prompts, PARAMS, 3, 5), after)


@pytest.mark.parametrize("masked", [torch.bool, torch.float32])
def test_a_token_step_reads_keys_unrepeated(masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 11, 8), torch.randn(3, 2, 11, 8)
    seen = torch.rand(3, 1, 1, 11) < 0.6
    seen[..., 0] = True
    mask = seen if masked == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    module = torch.nn.Module()
    out, _ = packing.attention(module, q, k, v, mask, scaling=0.3)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), attn_mask=mask, scale=0.3
    )
    torch.testing.assert_close(out, wanted.transpose(1, 2))


# ------------------------------------------------------------------------------------------- on a pretended GPU


def sampler_there(model, renderer, static=None):
    there = AutoModelForCausalLM.from_config(model.config).to(model.dtype)
    there.load_state_dict(model.state_dict())
    there.generation_config = model.generation_config
    return HFSampler(there.to("cuda"), renderer, static=static)


@pytest.mark.parametrize("repeatable", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_waits_for_nothing_there(parts, dtype, repeatable):
    """As a graph must: the host reads every few tokens, and no kernel is one that forms T x T scores."""
    model, renderer, prompts = parts
    model = copy.deepcopy(model).to(dtype)  # its rotary angles are rounded, too, and stay so
    params = replace(PARAMS, max_new_tokens=33)
    plain = draw(HFSampler(model, renderer, static=False), prompts, params, 3, 5)
    repro.set_deterministic(repeatable)
    with Pretend() as gpu:
        sampler = sampler_there(model, renderer)
        assert sampler.static and sampler.static.uses_graphs
        gpu.syncs.clear()
        gpu.where.clear()
        found = draw(sampler, prompts, params, 3, 5)
        assert gpu.graphs and sum(gpu.syncs.values()) <= 33 // 8 + 3, gpu.where.most_common()
    assert not {kernel for kernel, _ in gpu.attention} & {MATH, CUDNN}
    same = [a.token_ids == b.token_ids for x, y in zip(plain, found, strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(same) >= (len(same) if dtype == torch.float32 else 1)
    repro.set_deterministic(False)


def test_deterministic_kernels_draw_the_same_there(parts, deterministic):
    """A nucleus, too: its running sums are of floats, for which CUDA has no deterministic kernel."""
    model, renderer, prompts = parts
    with Pretend():
        samplers = [sampler_there(model, renderer, static) for static in (True, False)]
        for params in (PARAMS, replace(PARAMS, top_p=0.8)):
            params = replace(params, max_new_tokens=10)
            found = [draw(sampler, prompts[:3], params, 2, 5) for sampler in samplers]
            assert_alike(found[0], found[1])
            assert_alike(draw(HFSampler(model, renderer, static=False), prompts[:3], params, 2, 5), found[0])


def test_the_shapes_of_a_call_do_not_depend_on_the_calls_before_it(parts, monkeypatch):
    """Attention over more columns sums in another order, and a resumed run has not sampled what came before."""
    monkeypatch.setattr(static_cache, "LEAST_COLUMNS", 16)
    monkeypatch.setattr(static_cache, "LEAST_ROWS", 2)
    model, renderer, prompts = parts
    seen = []
    for before in (0, 90):
        with Pretend() as gpu:
            sampler = sampler_there(model, renderer)
            if before:
                draw(sampler, prompts[:3], replace(PARAMS, max_new_tokens=before), 1, 5)
            gpu.attention.clear()
            draw(sampler, prompts[:2], PARAMS, 2, 5)
            seen.append(dict(gpu.attention))
    assert seen[0] == seen[1] and len({shape for _, shape in seen[0]}) > 2


def test_a_capture_that_fails_leaves_the_steps_as_they_are(parts, monkeypatch, capsys):
    model, renderer, prompts = parts

    def refused(step, decoder):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(static_cache, "capture", refused)
    sampler = HFSampler(model, renderer, static=True)
    sampler.static.uses_graphs = True
    assert_alike(
        draw(HFSampler(model, renderer, static=False), prompts, PARAMS, 3, 5), draw(sampler, prompts, PARAMS, 3, 5)
    )
    assert "no CUDA graph of a decoding step, so it is slow (operation not permitted" in capsys.readouterr().err
    assert not sampler.static.uses_graphs
