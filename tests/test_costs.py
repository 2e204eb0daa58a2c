"""What a model costs, against what autograd, the allocator and torch's own counter of operations say of real ones."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_gsm8k.trainer import adapter, costs
from grpo_gsm8k.trainer.compiled import compile_layers
from grpo_gsm8k.trainer.costs import Setup, Shape
from grpo_gsm8k.trainer.data import weighted
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.losses import GrpoClip, Objective
from grpo_gsm8k.trainer.memory import shape_of
from tests.meter import ProfiledMemory
from tests.toys import REPOSITORY, rows, stage_config, train_config

GROUPED = {"hidden_size": 96, "intermediate_size": 560, "num_attention_heads": 12, "num_key_value_heads": 2}
SQUARE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
ODD = {"hidden_size": 56, "intermediate_size": 128, "num_attention_heads": 7, "num_key_value_heads": 1}
WIDTH = {torch.float32: 4, torch.bfloat16: 2}
POLICY = Objective(GrpoClip(0.2, 0.2))


def make_model(sizes=GROUPED, dtype=torch.float32, layers=3, vocabulary=64, lora_rank=0, **more):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, num_hidden_layers=layers, **{"tie_word_embeddings": True, **sizes}, **more
    )
    model = Qwen2ForCausalLM(config).to(dtype).train()
    adapter.attach(model, train_config(model_id="toy", lora_rank=lora_rank))
    return model


def kept_by_autograd(model, count, length):
    """Bytes of all that a forward pass leaves for the backward one, each storage once, weights left out."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x  # held, so that no other takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model.base_model(input_ids=torch.zeros(count, length, dtype=torch.long), use_cache=False)
    assert out.last_hidden_state.requires_grad
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def kept_per_cell(model):
    """Between a few rows and many of the same length: what belongs to a position alone (rotary angles) drops out."""
    return (kept_by_autograd(model, 6, 48) - kept_by_autograd(model, 2, 48)) / (4 * 48)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [GROUPED, SQUARE, ODD])
def test_a_cell_keeps_to_the_byte_what_autograd_keeps(sizes, dtype, checkpointing):
    model = make_model(sizes, dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = costs.cell_bytes(shape_of(model), Setup(WIDTH[dtype], checkpointing=checkpointing, device="cpu"))
    assert found == pytest.approx(kept_per_cell(model), abs=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cell_of_a_model_with_adapters(dtype):
    model = make_model(dtype=dtype, layers=6, lora_rank=4)
    assert shape_of(model) == shape_of(make_model(layers=6))
    # The first layer's input needs no gradient; the formula counts it like the others.
    setup = Setup(WIDTH[dtype], 4, device="cpu")
    assert costs.cell_bytes(shape_of(model), setup) == pytest.approx(kept_per_cell(model), rel=0.02)


def test_a_gpu_keeps_repeated_keys_and_values_in_float32():
    """Its kernel takes no groups of heads: 12 instead of 2 of keys and of values, 8 wide."""
    shape = shape_of(make_model())
    there, here = (costs.layer_bytes(shape, Setup(4, device=device)) for device in ("cuda", "cpu"))
    assert there - here == 2 * 4 * 8 * (12 - 2)
    assert costs.layer_bytes(shape, Setup(2, device="cuda")) == costs.layer_bytes(shape, Setup(2, device="cpu"))


@pytest.mark.slow  # torch.compile takes half a minute
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cell_of_a_compiled_model(dtype):
    model = make_model(dtype=dtype)
    compile_layers(model)
    found = costs.cell_bytes(shape_of(model), Setup(WIDTH[dtype], compiled=True))
    assert found == pytest.approx(kept_per_cell(model), abs=4)


@pytest.mark.parametrize("vocabulary", [300, 8000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "flags", [{}, {"activation_checkpointing": True}, {"lora_rank": 4}], ids=["plain", "checkpointing", "lora"]
)
def test_the_whole_of_an_update_against_the_allocator(flags, dtype, vocabulary):
    """After a first step, so that moments are there, and with the gradients of an earlier microbatch."""
    model = make_model(dtype=dtype, vocabulary=vocabulary, lora_rank=flags.get("lora_rank", 0))
    learner = TorchLearner(model, None, train_config(max_tokens_per_microbatch=8 * 64, **flags))
    sequences = [([3 + (i + j) % 200 for j in range(65)], 20) for i in range(8)]
    data = weighted(rows(*sequences, advantage=1.0, logprob=-5.0), "token")
    learner.forward_backward(data, POLICY)
    learner.step(1e-3)
    learner.forward_backward(data, POLICY)
    masters = learner.optimizer.masters.values()
    tensors = [*model.parameters(), *(m.grad for m in masters), *learner.optimizer.state().values()]
    there = sum(t.numel() * t.element_size() for t in tensors if t.ndim)
    with ProfiledMemory() as meter:
        learner.forward_backward(data, POLICY)
    setup = replace(costs.setup_of(learner.cfg, WIDTH[dtype], device="cpu"), copies=0)
    assert costs.state_bytes(shape_of(model), setup) == there
    predicted = costs.training_bytes(shape_of(model), setup, 8 * 64, 8 * 45)
    assert predicted == pytest.approx(there + meter.top, rel=0.05)
    assert predicted - there == pytest.approx(meter.top, rel=0.1)


def test_operations_are_what_torch_counts():
    """Eager attention is made of plain products, which torch counts; it multiplies the upper triangle, too."""
    model = make_model(attn_implementation="eager")
    shape, count, length = shape_of(model), 3, 20
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model(input_ids=torch.zeros(count, length, dtype=torch.long), use_cache=False)[0]
        model.get_output_embeddings()(hidden[:, 5:]).sum().backward()
    pairs = count * length**2
    assert costs.training_flops(shape, count * length, count * 15, pairs) == counter.get_total_flops()
    assert costs.causal_pairs([1, 2, 3]) == 1 + 3 + 6


def test_operations_with_adapters():
    model = make_model(attn_implementation="eager", layers=8, lora_rank=4)
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model(input_ids=torch.zeros(2, 20, dtype=torch.long), use_cache=False)[0]
        model.get_output_embeddings()(hidden).sum().backward()
    found = costs.training_flops(shape_of(model), 40, 40, 2 * 20**2, lora_rank=4)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)  # the first layer's input has no gradient


def test_a_decoding_step_reads_every_weight_once_and_the_cache():
    shape = Shape(0, 2, 10, 30, 2, 1, 5, 100)
    # A layer: q and o 10 x 10, k and v 10 x 5, the MLP 3 x 10 x 30: 1200. Keys and values: 2 x 2 x 5 of each token.
    assert costs.decoding_bytes(shape, 2, [4, 3]) == 2 * (2 * 1200 + 1000 + 20 * 7)


def test_the_state_by_hand():
    """N 1000; rank 2 on q and o (10 + 10), k and v (10 + 5), three of the MLP (10 + 30): 190 a layer and rank."""
    toy = Shape(1000, 2, 10, 30, 2, 1, 5, 100)
    assert toy.adapters(2) == 2 * 2 * 190
    by_hand = {
        Setup(2): 18_000,  # weights 2, gradients 4, master 4, moments 8
        Setup(4): 16_000,
        Setup(2, offload=True): 6_000,
        Setup(4, offload=True): 8_000,
        Setup(2, copies=1, reference=True): 22_000,
        Setup(2, lora_rank=2): 2_000 + 18 * 760,
        # 16 N / 4, a reference of 4 N / 4, rank 0's copy; root 1000 - 2400 and 3 layers of 1200, and 4 x 1200
        Setup(2, ranks=4, copies=1, reference=True): 4_000 + 1_000 + 2_000 + 2 * (1000 - 2400 + 3600) + 4_800,
    }
    for setup, expected in by_hand.items():
        assert costs.state_bytes(toy, setup) == expected, setup
    assert costs.state_bytes(toy, Setup(2), gradients=False) == 14_000


def test_a_budget_fills_the_room_and_no_more():
    shape, setup = shape_of(make_model()), Setup(2)
    room = costs.training_bytes(shape, setup, 5000) + 1
    assert costs.cells_that_fit(shape, setup, room) == 5000
    assert costs.cells_that_fit(shape, setup, 0) == costs.LEAST_CELLS
    assert costs.cells_that_fit(shape, setup, 1e15) == costs.MOST_CELLS
    leaner = (replace(setup, checkpointing=True), replace(setup, offload=True), replace(setup, compiled=True))
    assert all(costs.cells_that_fit(shape, other, room) > 5000 for other in leaner)


def test_what_stands_beside_the_learner():
    shape = Shape(1000, 2, 10, 30, 2, 1, 5, 100)
    cfg = stage_config("grpo", max_new_tokens=20, sample_rows=64, rollouts_per_step=32, kl_coef=0.1)
    setup = costs.setup_of(cfg, 2)
    assert setup.copies == 1 and setup.reference and costs.beside_bytes(shape, setup, cfg) == 0
    # 32 rows of 120 tokens x 20 numbers of 2 bytes, one of its four tensors once more; logits and softmax 2 + 4 + 4
    cache = 32 * 120 * 20 * 2
    overlaps = replace(cfg, mode="one_step_off")
    assert costs.cache_bytes(shape, 2, setup.cached) == cache  # stays between the turns
    assert costs.beside_bytes(shape, setup, overlaps) == cache // 4 + 32 * 100 * 10
    assert costs.beside_bytes(shape, replace(setup, cached=0), overlaps) == cache + cache // 4 + 32 * 100 * 10
    elsewhere = replace(overlaps, engine="vllm", lora_rank=4)
    assert costs.beside_bytes(shape, setup, elsewhere) == 0
    assert not costs.setup_of(elsewhere, 2).copies and not costs.setup_of(elsewhere, 2).reference


def test_the_formulas_need_no_torch():
    code = "import sys, grpo_gsm8k.trainer.costs, grpo_gsm8k.launch.plan; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
