"""Packed rows: every token is read once, and what comes of them is what each row gives by itself."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.trainer import packing
from grpo_gsm8k.trainer.batch import make_batch
from grpo_gsm8k.trainer.data import weighted
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.losses import Gspo, Objective
from tests.rehearsal import varlen_by_hand
from tests.toys import gradient, rows, train_config, with_advantage

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES, **HEADS, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, **HEADS, head_dim=16),
    "llama": LlamaConfig(**SIZES, **HEADS),
    "gpt2": GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
}
# Two groups of completions, of one a pair that begins alike, and a row without a prompt in common with any.
SEQUENCES = [
    ([5, 6, 7, 8, 20, 21, 22], 4),
    ([5, 6, 7, 8, 20, 30], 4),
    ([9, 10, 11, 12, 13], 2),
    ([5, 6, 7, 8, 40, 41, 42, 43, 44], 4),
    ([9, 10, 50], 2),
    ([5, 6, 33, 34], 2),
]


def make_model(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def alone(config, sequences):
    """Summed loss of the responses and its gradient, each row through the model's own logits, by itself."""
    model, total = make_model(config), 0.0
    for ids, prompt in sequences:
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[prompt - 1 :], torch.tensor(ids[prompt:]), reduction="sum")
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in model.named_parameters()}


def learner_of(model, **flags):
    return TorchLearner(model, None, train_config(**flags))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_give_the_loss_and_gradient_of_each_by_itself(name, checkpointing):
    loss, expected = alone(CONFIGS[name], SEQUENCES)
    tokens = sum(len(ids) - prompt for ids, prompt in SEQUENCES)
    for budget in (6, 13, 1000):
        learner = learner_of(
            make_model(CONFIGS[name]),
            packing="on",
            max_tokens_per_microbatch=budget,
            activation_checkpointing=checkpointing,
        )
        metrics = learner.forward_backward(weighted(rows(*SEQUENCES), "token"), Objective())
        assert metrics["loss"] * tokens == pytest.approx(loss, rel=1e-5)
        for weight, found in gradient(learner).items():
            assert torch.allclose(found * tokens, expected[weight], rtol=1e-4, atol=1e-6), (budget, weight)
    # Of the 28 tokens that go in, 17 are new: 8, 2 and 0 of the first prompt's, 4 and 0 of the second's, 3 of the last.
    assert metrics["perf/shared_frac"] == pytest.approx(1 - 17 / 28) and metrics["perf/padding_frac"] == 0


def test_the_old_policy_temperature_and_masked_rows_are_where_they_were():
    data = [with_advantage(row, (-1) ** i * (0.5 + i)) for i, row in enumerate(rows(*SEQUENCES, logprob=-4.2))]
    data[3] = replace(data[3], mask=(0,) * len(data[3].mask))
    data, objective = weighted(data, "token"), Objective(Gspo(0.02, 0.02), temperature=0.7)
    packed, padded = (learner_of(make_model(CONFIGS["qwen2"]), packing=how) for how in ("on", "off"))
    for one, other in zip(packed.logprobs(data, 0.7), padded.logprobs(data, 0.7), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    found, expected = (learner.forward_backward(data, objective) for learner in (packed, padded))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5) and 0 < found["policy/clip_frac"] < 1
    assert all(torch.allclose(gradient(packed)[k], g, rtol=1e-4, atol=1e-6) for k, g in gradient(padded).items())


def test_the_layout_of_three_rows_by_hand():
    batch = make_batch(rows(([1, 2, 3, 4, 9], 2), ([1, 2, 3, 5, 6, 9], 2), ([7, 8, 9], 1)))
    ((order, part),) = packing.microbatches(batch, 100, [0, 1, 2], packs=True)
    assert order == [1, 0, 2] and part.shared == (0, 3, 0)
    packed = packing.Packed.of(part)
    assert packed.input_ids.tolist() == [[1, 2, 3, 5, 6, 4, 7, 8]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1]]
    assert packed.cells.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 0], [6, 7, 0, 0, 0]]
    # Attention takes the two long rows together, 2 x 5, and the short one alone: 50 + 4 pairs instead of 75.
    assert [block.tolist() for block in packed.blocks] == [[[0, 1, 2, 3, 4], [0, 1, 2, 5, 0]], [[6, 7]]]
    assert packed.home.tolist() == [0, 1, 2, 3, 4, 8, 10, 11]


def test_padding_that_looks_like_a_token_is_not_shared():
    batch = make_batch(rows(([1, 2, 0, 0, 0, 9], 1), ([1, 2, 0, 9], 1)))
    ((_, part),) = packing.microbatches(batch, 100, [0, 1], packs=True)
    assert part.shared == (0, 3)  # not 5, as the padded ids have it


@pytest.mark.parametrize("packs", [False, True])
def test_microbatches_hold_every_row_once_within_the_budget(packs):
    for budget in range(1, 30):
        batch, seen = make_batch(rows(*SEQUENCES)), []
        for index, part in packing.microbatches(batch, budget, batch.rows_with_targets(), packs):
            if packs:
                assert part.cells == packing.Packed.of(part).input_ids.numel()
            assert part.cells <= budget or len(index) == 1
            assert part.input_ids.shape[1] == max(part.lengths)
            seen += index
        assert sorted(seen) == [0, 1, 2, 3, 4, 5]


class Mixing(torch.nn.Module):
    """A layer that looks at the token before, as a convolution or a recurrence does."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x) + x.roll(1, dims=1)


def mixing():
    model = make_model(CONFIGS["qwen2"])
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp)
    return model


REFUSED = {
    "a window": lambda: make_model(MistralConfig(**SIZES, **HEADS, sliding_window=4)),
    "layers with a window": lambda: make_model(
        Qwen2Config(**SIZES, **HEADS, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
    "no positions": lambda: make_model(MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1)),
    "attention of another kind": lambda: AutoModelForCausalLM.from_config(
        copy.deepcopy(CONFIGS["llama"]), attn_implementation="eager"
    ),
    "a layer that looks across rows": mixing,
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_model_that_cannot_read_packed_rows_is_left_as_it_was(why):
    model = REFUSED[why]()
    before = model.config._attn_implementation
    assert not packing.enable(model) and model.config._attn_implementation == before
    with pytest.raises(ConfigError, match="--packing on"):
        learner_of(model, packing="on")


def test_bfloat16_packs_too():
    learner = learner_of(make_model(CONFIGS["qwen2"], torch.bfloat16))
    assert learner.packs
    loss = learner.forward_backward(weighted(rows(*SEQUENCES), "token"), Objective())["loss"]
    assert loss == pytest.approx(alone(CONFIGS["qwen2"], SEQUENCES)[0] / 16, rel=1e-2)


def test_a_packing_model_samples_and_is_saved_like_any_other(tmp_path):
    model, plain = make_model(CONFIGS["llama"]), make_model(CONFIGS["llama"])
    assert packing.enable(model)
    ids, mask = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(
        model(input_ids=ids, attention_mask=mask).logits, plain(input_ids=ids, attention_mask=mask).logits
    )
    model.save_pretrained(tmp_path)
    assert packing.ATTENTION not in (tmp_path / "config.json").read_text()


# ----------------------------------------------------------------------------- rows end to end, as a GPU takes them


@pytest.fixture
def end_to_end(monkeypatch):
    monkeypatch.setattr(packing, "reads_varlen", lambda *which: True)
    monkeypatch.setattr(packing, "varlen", varlen_by_hand)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gpt2"])
def test_rows_end_to_end_give_the_loss_and_gradient_of_each_by_itself(name, end_to_end):
    loss, expected = alone(CONFIGS[name], SEQUENCES)
    tokens = sum(len(ids) - prompt for ids, prompt in SEQUENCES)
    for budget in (6, 13, 1000):
        learner = learner_of(make_model(CONFIGS[name]), packing="on", max_tokens_per_microbatch=budget)
        metrics = learner.forward_backward(weighted(rows(*SEQUENCES), "token"), Objective())
        assert metrics["loss"] * tokens == pytest.approx(loss, rel=1e-5)
        for weight, found in gradient(learner).items():
            assert torch.allclose(found * tokens, expected[weight], atol=2e-5), weight


def test_torchs_own_varlen_takes_what_we_give_it():
    """Names and order of the arguments; the kernel itself is a GPU's."""
    if packing.VARLEN is None:
        pytest.skip("this torch has no varlen_attn")
    assert list(inspect.signature(packing.VARLEN).parameters)[:7] == [
        "query",
        "key",
        "value",
        "cu_seq_q",
        "cu_seq_k",
        "max_q",
        "max_k",
    ]
