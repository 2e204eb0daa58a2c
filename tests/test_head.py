"""The head without logits: the numbers and gradients of the plain way, in memory of a chunk."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_gsm8k.trainer import head as head_module
from grpo_gsm8k.trainer.batch import make_batch
from grpo_gsm8k.trainer.data import ImportanceCorrection, weighted, with_old_logprobs, with_ref_logprobs
from grpo_gsm8k.trainer.head import LogitMap, target_logprobs
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.logprobs import token_logprobs
from grpo_gsm8k.trainer.losses import (
    LOSSES,
    GrpoClip,
    Gspo,
    Objective,
    fused_grad,
    make_loss,
    update_loss,
)
from tests.toys import gradient, rows, tensor_of, train_config, values_of

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


def dlogp_of_squares(logp, part):
    return 2 * (torch.arange(N, dtype=logp.dtype)[part] - 5) * logp, None


def loss_of_squares(logp):
    return ((torch.arange(N, dtype=logp.dtype) - 5) * logp.square()).sum()


@pytest.mark.parametrize("fused", [dlogp_of_squares, None], ids=["fused", "recomputed"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_gradient_is_that_of_finite_differences(fused, bias):
    hidden, weight, shift, targets = parts(bias=bias)
    inputs = (hidden, weight, shift) if bias else (hidden, weight)

    def loss(hidden, weight, shift=None):
        head = SimpleNamespace(weight=weight, bias=shift)
        return loss_of_squares(target_logprobs(hidden, head, targets, 0.7, fused_grad=fused)[0])

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("fused", [dlogp_of_squares, None], ids=["fused", "recomputed"])
def test_numbers_and_gradients_are_those_of_all_logits(dtype, temperature, fused):
    hidden, weight, shift, targets = parts(dtype)
    logp, said = target_logprobs(hidden, SimpleNamespace(weight=weight, bias=shift), targets, temperature)
    wanted, spread = plainly(hidden, weight, shift, targets, temperature)
    assert logp.dtype == torch.float32 and not any(x.requires_grad for x in said.values())
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert torch.allclose(logp, wanted, **near) and torch.allclose(said["entropy"], spread, **near)
    largest = ((hidden.float() @ weight.float().T + shift) / temperature).softmax(-1).max(-1).values
    assert torch.allclose(said["top_prob"], largest, **near)
    head = SimpleNamespace(weight=weight, bias=shift)
    again, _ = target_logprobs(hidden, head, targets, temperature, fused_grad=fused)
    bare = SimpleNamespace(
        weight=weight
    )  # without a bias, the entropy comes from the gradient's product where it is formed
    _, said = target_logprobs(hidden, bare, targets, temperature, fused_grad=fused)
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
        hidden, SimpleNamespace(weight=weight), none, fused_grad=lambda logp, part: (torch.ones_like(logp), None)
    )
    logp.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight)) and hidden.grad.shape == hidden.shape


def test_a_sure_token_keeps_its_gradient_in_bfloat16():
    """At p = 0.9995 bfloat16 knows only 1: the gradient 1 - p must be taken before it is rounded."""
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[7.5], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    for fused in (lambda logp, part: (torch.ones_like(logp), None), None):
        logp, _ = target_logprobs(hidden, SimpleNamespace(weight=weight), torch.tensor([0]), fused_grad=fused)
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
    for fused in (dlogp_of_squares, None):
        head = SimpleNamespace(weight=weight, bias=shift)
        loss = loss_of_squares(target_logprobs(hidden, head, targets, 0.7, fused_grad=fused)[0])
        (found,) = torch.autograd.grad(loss, weight if frozen == "hidden" else hidden)
        assert torch.allclose(found, both[1 if frozen == "hidden" else 0])


def test_a_fused_gradient_that_is_not_the_losss_is_noticed():
    hidden, weight, shift, targets = parts()
    head = SimpleNamespace(weight=weight, bias=shift)
    logp, _ = target_logprobs(hidden, head, targets, fused_grad=lambda logp, part: (torch.ones_like(logp), None))
    with pytest.raises(AssertionError, match="separable"):
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


@pytest.mark.parametrize("fused", [True, False])
def test_no_tensor_is_as_large_as_the_logits(fused):
    many, wide = 500, 4 * V
    hidden = torch.randn(many, H, requires_grad=True)
    weight = torch.randn(wide, H, requires_grad=True)
    ones = (lambda logp, part: (torch.ones_like(logp), None)) if fused else None
    with Largest() as largest:
        target_logprobs(hidden, SimpleNamespace(weight=weight), torch.zeros(many, dtype=torch.long), fused_grad=ones)[
            0
        ].sum().backward()
    assert largest.numbers < many * wide / 10  # hidden states 3,000, the weight 960, all logits 80,000


def test_an_update_has_the_gradient_of_the_plain_way_tied_and_untied():
    """Ratios away from 1 with the clip in play, T = 0.7, a masked row, two microbatches; every objective."""
    data = []
    for i, (n, prompt) in enumerate([(9, 4), (4, 1), (13, 6), (6, 2), (11, 3)]):
        data += rows((range(3 + i, 3 + i + n), prompt), advantage=(-1) ** i * (0.3 + i), logprob=-3.6 - 0.1 * i)
    data[1] = data[1].__class__(data[1].token_ids, (0,) * 4, data[1].logprobs, (1.0,) * 4)
    data = weighted(data, "sequence")
    sizes = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for tied in (True, False):
        torch.manual_seed(1)
        config = Qwen2Config(**sizes, intermediate_size=32, num_key_value_heads=2, tie_word_embeddings=tied)
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(8.0)
        frozen = tensor_of(TorchLearner(model, None, train_config()).logprobs(data, 0.7))
        data = with_old_logprobs(data, values_of(frozen + 0.3 * torch.randn(frozen.shape), data))
        batch = make_batch(data)
        clips = {"clip_eps": 0.2, "clip_eps_high": 0.2}
        for loss in (make_loss(name, clips) for name in LOSSES):
            objective = Objective(loss, temperature=0.7, kl_coef=0.1)
            learner = TorchLearner(model, None, train_config(max_tokens_per_microbatch=24))
            metrics = learner.forward_backward(data, objective)
            assert not hasattr(loss, "clip_eps") or 0 < metrics["policy/clip_frac"] < 1
            mine = gradient(learner)
            learner.optimizer.zero_grad()
            logits = model(batch.input_ids).logits / 0.7
            logp = logits.log_softmax(-1).gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1) * batch.mask
            update_loss(logp, batch, objective).backward()
            theirs = gradient(learner)
            learner.optimizer.zero_grad()
            off = sum(float((mine[k] - theirs[k]).square().sum()) for k in theirs)
            assert (off / sum(float(g.square().sum()) for g in theirs.values())) ** 0.5 < 1e-5, (tied, loss)


CLIPS = {"clip_eps": 0.2, "clip_eps_high": 0.2}
SEQUENCE_MASK = ImportanceCorrection("sequence_mask", 1.2)


@pytest.mark.parametrize(
    "terms",
    [{"kl_coef": 0.1}, {"entropy_coef": 0.3}, {"on_policy": True, "correction": SEQUENCE_MASK, "entropy_coef": 0.1}],
    ids=["kl", "entropy", "sequence correction"],
)
@pytest.mark.parametrize("name", LOSSES)
def test_the_fused_head_has_the_loss_gradient_and_figures_of_the_plain_one(name, terms):
    """`--head plain`: the model's own logits and autograd alone."""
    data = []
    for i, (n, prompt) in enumerate([(9, 4), (4, 1), (13, 6), (6, 2), (11, 3)]):
        data += rows((range(3 + i, 3 + i + n), prompt), advantage=(-1) ** i * 0.3 * i, logprob=-3.6 - 0.1 * i)
    sizes = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, intermediate_size=32, num_key_value_heads=2))
    data = weighted(data, "sequence")
    frozen = tensor_of(TorchLearner(model, None, train_config()).logprobs(data, 0.7))
    data = with_old_logprobs(data, values_of(frozen + 0.1 * torch.randn(frozen.shape), data))
    data = with_ref_logprobs(data, values_of(frozen + 0.2, data))
    objective, found = Objective(make_loss(name, CLIPS), temperature=0.7, **terms), []
    for head in ("plain", "fused"):
        learner = TorchLearner(model, None, train_config(max_tokens_per_microbatch=24, head=head))
        metrics = learner.forward_backward(data, objective)
        found.append((metrics, gradient(learner)))
        learner.optimizer.zero_grad()
    (metrics, plain), (fused_metrics, fused) = found
    for key in (key for key in metrics if not key.startswith("perf/")):
        assert fused_metrics[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-6), key
    off = sum(float((fused[k] - plain[k]).square().sum()) for k in plain)
    assert (off / sum(float(g.square().sum()) for g in plain.values())) ** 0.5 < 1e-5


def bonus_of_squares(logp, part):
    """With `loss_of_both`: the entropy at a position counts as much as its number, with alternating signs."""
    return dlogp_of_squares(logp, part)[0], (torch.arange(N, dtype=logp.dtype)[part] - 4) / 3


def loss_of_both(logp, entropy):
    return loss_of_squares(logp) + ((torch.arange(N, dtype=logp.dtype) - 4) / 3 * entropy).sum()


@pytest.mark.parametrize("fused", [bonus_of_squares, None], ids=["fused", "recomputed"])
@pytest.mark.parametrize("logit_map", [LogitMap(), LogitMap(3.0, 1.5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_entropys_gradient_is_that_of_all_logits(dtype, logit_map, fused):
    hidden, weight, shift, targets = parts(dtype)
    head = SimpleNamespace(weight=weight, bias=shift)
    logp, found = target_logprobs(hidden, head, targets, 0.7, True, fused, logit_map, entropy_grad=True)
    mine = torch.autograd.grad(3 * loss_of_both(logp, found["entropy"]), (hidden, weight, shift))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, shift)]
    logits = torch.nn.functional.linear(*exact) * logit_map.scale
    if logit_map.cap:
        logits = logit_map.cap * torch.tanh(logits / logit_map.cap)
    spread = torch.distributions.Categorical(logits=logits / 0.7)
    theirs = torch.autograd.grad(3 * loss_of_both(spread.log_prob(targets), spread.entropy()), exact)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for one, true in zip(mine, theirs, strict=True):
        assert float((one.double() - true).norm() / true.norm()) < limit


@pytest.mark.parametrize("fused", [bonus_of_squares, None], ids=["fused", "recomputed"])
def test_the_entropys_gradient_is_that_of_finite_differences(fused):
    hidden, weight, shift, targets = parts()

    def loss(hidden, weight, shift):
        head = SimpleNamespace(weight=weight, bias=shift)
        logp, found = target_logprobs(hidden, head, targets, 0.7, fused_grad=fused, entropy_grad=True)
        return loss_of_both(logp, found["entropy"])

    assert torch.autograd.gradcheck(loss, (hidden, weight, shift))


def test_an_entropy_bonus_alone_makes_the_policy_flatter_and_skips_no_row():
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, intermediate_size=32, num_key_value_heads=2))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8.0)
    data = weighted(rows((range(3, 12), 4), (range(5, 11), 2)), "token")  # without advantage
    learner = TorchLearner(model, None, train_config())
    said = []
    for _ in range(4):
        said.append(learner.forward_backward(data, Objective(GrpoClip(), entropy_coef=0.5)))
        learner.step(1e-2)
    assert said[0]["perf/skipped_rows_frac"] == 0 and said[0]["policy/entropy"] > 0
    assert said[0]["loss"] == pytest.approx(-0.5 * said[0]["policy/entropy"], rel=1e-5)
    entropies = [metrics["policy/entropy"] for metrics in said]
    assert entropies == sorted(entropies) and entropies[-1] > entropies[0] + 0.01


def test_the_fused_gradient_of_some_targets_is_their_part_of_the_whole():
    data = [r for i in range(3) for r in rows((range(5, 12 + i), 3), advantage=1.0 - i, logprob=-2.0)]
    batch, objective = make_batch(weighted(data, "token")), Objective(GrpoClip(0.2, 0.2), kl_coef=0.1)
    torch.manual_seed(0)
    logp = (-2 + 0.5 * torch.randn(batch.mask.shape)).requires_grad_()
    (whole,) = torch.autograd.grad(update_loss(logp, batch, objective), logp)
    chosen, fused = batch.mask.bool(), fused_grad(batch, objective)
    assert fused is not None and fused_grad(batch, Objective(Gspo())) is None
    some = slice(2, 9)
    assert torch.equal(fused(logp.detach()[chosen][some], some)[0], whole[chosen][some])


def test_a_frozen_pass_makes_no_gradient(tiny):
    model = Qwen2ForCausalLM.from_pretrained(tiny.model)
    with torch.no_grad():
        logp, _ = token_logprobs(model, make_batch(rows((range(3, 9), 2))))
    assert not logp.requires_grad


@pytest.mark.parametrize("fused", [dlogp_of_squares, None], ids=["fused", "recomputed"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("logit_map", [LogitMap(0.3), LogitMap(1.0, 2.0), LogitMap(3.0, 1.5)], ids=str)
def test_logits_are_scaled_and_capped_behind_the_head(logit_map, bias, fused):
    hidden, weight, shift, targets = parts(bias=bias)
    inputs = (hidden, weight, shift) if bias else (hidden, weight)
    logits = torch.nn.functional.linear(hidden, weight, shift) * logit_map.scale
    if logit_map.cap:
        logits = logit_map.cap * torch.tanh(logits / logit_map.cap)
    spread = torch.distributions.Categorical(logits=logits / 0.7)
    expected = torch.autograd.grad(loss_of_squares(spread.log_prob(targets)), inputs, retain_graph=True)
    head = SimpleNamespace(weight=weight, bias=shift)
    logp, found = target_logprobs(hidden, head, targets, 0.7, fused_grad=fused, logit_map=logit_map)
    assert torch.allclose(logp, spread.log_prob(targets)) and torch.allclose(found["entropy"], spread.entropy())
    for mine, own in zip(torch.autograd.grad(loss_of_squares(logp), inputs), expected, strict=True):
        assert torch.allclose(mine, own)
