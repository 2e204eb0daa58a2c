"""The head without logits: the numbers and gradients of the plain way, in memory of a chunk."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_gsm8k.trainer import head as head_module
from grpo_gsm8k.trainer.batch import make_batch, with_old_logprobs
from grpo_gsm8k.trainer.head import LogitMap, target_logprobs
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.logprobs import token_logprobs
from grpo_gsm8k.trainer.objectives import Objective, slope, update_loss
from tests.toys import gradient, rows, train_config

N, H, V = 11, 6, 40


@pytest.fixture(autouse=True)
def three_positions_a_chunk(monkeypatch):
    monkeypatch.setitem(head_module.CHUNK_BYTES, "cpu", 3 * 4 * V)


def parts(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(N, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    shift = torch.randn(V, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, shift, torch.randint(0, V, (N,))


def plainly(hidden, weight, bias, targets, temperature):
    """The same through all logits, by torch's own functions."""
    logits = torch.nn.functional.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    spread = torch.distributions.Categorical(logits=logits / temperature)
    return spread.log_prob(targets), spread.entropy()


def slope_of_squares(logp, part):
    return 2 * (torch.arange(N, dtype=logp.dtype)[part] - 5) * logp


def loss_of_squares(logp):
    return ((torch.arange(N, dtype=logp.dtype) - 5) * logp.square()).sum()


@pytest.mark.parametrize("foretold", [slope_of_squares, None], ids=["foretold", "recomputed"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_gradient_is_that_of_finite_differences(foretold, bias):
    hidden, weight, shift, targets = parts(bias=bias)
    inputs = (hidden, weight, shift) if bias else (hidden, weight)

    def loss(hidden, weight, shift=None):
        head = SimpleNamespace(weight=weight, bias=shift)
        return loss_of_squares(target_logprobs(hidden, head, targets, 0.7, slope=foretold)[0])

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("foretold", [slope_of_squares, None], ids=["foretold", "recomputed"])
def test_numbers_and_gradients_are_those_of_all_logits(dtype, temperature, foretold):
    hidden, weight, shift, targets = parts(dtype)
    logp, said = target_logprobs(hidden, SimpleNamespace(weight=weight, bias=shift), targets, temperature)
    wanted, spread = plainly(hidden, weight, shift, targets, temperature)
    assert logp.dtype == torch.float32 and not any(x.requires_grad for x in said.values())
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert torch.allclose(logp, wanted, **near) and torch.allclose(said["entropy"], spread, **near)
    largest = ((hidden.float() @ weight.float().T + shift) / temperature).softmax(-1).max(-1).values
    assert torch.allclose(said["top_prob"], largest, **near)
    again, _ = target_logprobs(hidden, SimpleNamespace(weight=weight, bias=shift), targets, temperature, slope=foretold)
    bare = SimpleNamespace(
        weight=weight
    )  # without a bias, the entropy comes from the gradient's product where it is formed
    _, said = target_logprobs(hidden, bare, targets, temperature, slope=foretold)
    assert torch.allclose(said["entropy"], plainly(hidden, weight, 0 * shift, targets, temperature)[1], **near)
    mine = torch.autograd.grad(loss_of_squares(again), (hidden, weight, shift))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, shift)]
    theirs = torch.autograd.grad(loss_of_squares(plainly(*exact, targets, temperature)[0]), exact)
    for found, true, x in zip(mine, theirs, (hidden, weight, shift), strict=True):
        assert found.dtype == x.dtype
        assert float((found.double() - true).norm() / true.norm()) < (1e-6 if dtype == torch.float32 else 2e-2)


def test_no_targets_give_a_gradient_of_zero():
    """A rank that has no row left goes through the same motions."""
    _, weight, _, _ = parts()
    hidden = torch.zeros(0, weight.shape[1], dtype=weight.dtype, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    logp, _ = target_logprobs(
        hidden, SimpleNamespace(weight=weight), none, slope=lambda logp, part: torch.ones_like(logp)
    )
    logp.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight)) and hidden.grad.shape == hidden.shape


def test_a_sure_token_keeps_its_gradient_in_bfloat16():
    """At p = 0.9995 bfloat16 knows only 1: the gradient 1 - p must be taken before it is rounded."""
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[7.5], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    for foretold in (lambda logp, part: torch.ones_like(logp), None):
        logp, _ = target_logprobs(hidden, SimpleNamespace(weight=weight), torch.tensor([0]), slope=foretold)
        (found,) = torch.autograd.grad(logp.sum(), weight)
        assert found[:, 0].tolist() == pytest.approx([5.5278e-4, -5.5278e-4], rel=5e-3)  # 1 / (1 + e^7.5)


def test_a_token_beyond_the_reach_of_float32_probabilities_keeps_its_logarithm():
    head, hidden = SimpleNamespace(weight=torch.tensor([[200.0], [0.0]])), torch.ones(1, 1)
    assert float(target_logprobs(hidden, head, torch.tensor([1]))[0]) == -200.0


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    hidden, weight, shift, targets = parts()
    both = torch.autograd.grad(loss_of_squares(plainly(hidden, weight, shift, targets, 0.7)[0]), (hidden, weight))
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    for foretold in (slope_of_squares, None):
        head = SimpleNamespace(weight=weight, bias=shift)
        loss = loss_of_squares(target_logprobs(hidden, head, targets, 0.7, slope=foretold)[0])
        (found,) = torch.autograd.grad(loss, weight if frozen == "hidden" else hidden)
        assert torch.allclose(found, both[1 if frozen == "hidden" else 0])


def test_a_loss_that_was_foretold_wrongly_is_noticed():
    hidden, weight, shift, targets = parts()
    head = SimpleNamespace(weight=weight, bias=shift)
    logp, _ = target_logprobs(hidden, head, targets, slope=lambda logp, part: torch.ones_like(logp))
    with pytest.raises(AssertionError, match="foretold"):
        loss_of_squares(logp).backward()


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor held that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("foretold", [True, False])
def test_no_tensor_is_as_large_as_the_logits(foretold):
    many, wide = 500, 4 * V
    hidden = torch.randn(many, H, requires_grad=True)
    weight = torch.randn(wide, H, requires_grad=True)
    ones = (lambda logp, part: torch.ones_like(logp)) if foretold else None
    with Largest() as largest:
        target_logprobs(hidden, SimpleNamespace(weight=weight), torch.zeros(many, dtype=torch.long), slope=ones)[
            0
        ].sum().backward()
    assert largest.numbers < many * wide / 10  # hidden states 3,000, the weight 960, all logits 80,000


def test_an_update_has_the_gradient_of_the_plain_way_tied_and_untied():
    """Ratios away from 1 with the clip in play, T = 0.7, a masked row, two microbatches; every objective."""
    data = []
    for i, (n, prompt) in enumerate([(9, 4), (4, 1), (13, 6), (6, 2), (11, 3)]):
        data += rows((range(3 + i, 3 + i + n), prompt), advantage=(-1) ** i * (0.3 + i), logprob=-3.6 - 0.1 * i)
    data[1] = data[1].__class__(data[1].token_ids, (0,) * 4, data[1].logprobs, (1.0,) * 4)
    batch = make_batch(data, 0, "sequence")
    sizes = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for tied in (True, False):
        torch.manual_seed(1)
        config = Qwen2Config(**sizes, intermediate_size=32, num_key_value_heads=2, tie_word_embeddings=tied)
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(8.0)
        frozen = TorchLearner(model, None, train_config()).logprobs(batch, 0.7)
        batch = with_old_logprobs(batch, frozen + 0.3 * torch.randn(frozen.shape))
        for loss in ("cross_entropy", "reinforce", "grpo_clip", "gspo", "cispo"):
            objective = Objective(loss, 0.2, 0.2, temperature=0.7, kl_coef=0.1)
            learner = TorchLearner(model, None, train_config(max_tokens_per_microbatch=24))
            metrics = learner.forward_backward(batch, objective)
            assert loss in ("cross_entropy", "reinforce") or 0 < metrics["policy/clip_frac"] < 1
            mine = gradient(learner)
            learner.optimizer.zero_grad()
            logits = model(batch.input_ids).logits / 0.7
            logp = logits.log_softmax(-1).gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1) * batch.mask
            update_loss(logp, batch, objective).backward()
            theirs = gradient(learner)
            learner.optimizer.zero_grad()
            off = sum(float((mine[k] - theirs[k]).square().sum()) for k in theirs)
            assert (off / sum(float(g.square().sum()) for g in theirs.values())) ** 0.5 < 1e-5, (tied, loss)


def test_the_slope_of_some_targets_is_their_part_of_the_whole():
    data = [r for i in range(3) for r in rows((range(5, 12 + i), 3), advantage=1.0 - i, logprob=-2.0)]
    batch, objective = make_batch(data, 0, "token"), Objective("grpo_clip", 0.2, 0.2, kl_coef=0.1)
    torch.manual_seed(0)
    logp = (-2 + 0.5 * torch.randn(batch.mask.shape)).requires_grad_()
    (whole,) = torch.autograd.grad(update_loss(logp, batch, objective), logp)
    chosen, foretold = batch.mask.bool(), slope(batch, objective)
    assert foretold is not None and slope(batch, Objective("gspo")) is None
    some = slice(2, 9)
    assert torch.equal(foretold(logp.detach()[chosen][some], some), whole[chosen][some])


def test_a_frozen_pass_makes_no_gradient(tiny):
    model = Qwen2ForCausalLM.from_pretrained(tiny.model)
    with torch.no_grad():
        logp, _ = token_logprobs(model, make_batch(rows((range(3, 9), 2)), 0))
    assert not logp.requires_grad


@pytest.mark.parametrize("foretold", [slope_of_squares, None], ids=["foretold", "recomputed"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("logit_map", [LogitMap(0.3), LogitMap(1.0, 2.0), LogitMap(3.0, 1.5)], ids=str)
def test_logits_are_scaled_and_capped_behind_the_head(logit_map, bias, foretold):
    hidden, weight, shift, targets = parts(bias=bias)
    inputs = (hidden, weight, shift) if bias else (hidden, weight)
    logits = torch.nn.functional.linear(hidden, weight, shift) * logit_map.scale
    if logit_map.cap:
        logits = logit_map.cap * torch.tanh(logits / logit_map.cap)
    spread = torch.distributions.Categorical(logits=logits / 0.7)
    expected = torch.autograd.grad(loss_of_squares(spread.log_prob(targets)), inputs, retain_graph=True)
    head = SimpleNamespace(weight=weight, bias=shift)
    logp, found = target_logprobs(hidden, head, targets, 0.7, slope=foretold, logit_map=logit_map)
    assert torch.allclose(logp, spread.log_prob(targets)) and torch.allclose(found["entropy"], spread.entropy())
    for mine, own in zip(torch.autograd.grad(loss_of_squares(logp), inputs), expected, strict=True):
        assert torch.allclose(mine, own)
