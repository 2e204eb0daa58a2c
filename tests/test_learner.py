"""The learner: one update is one gradient however it is split, and small steps are not lost."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_gsm8k.errors import NonFiniteError
from grpo_gsm8k.trainer.batch import make_batch
from grpo_gsm8k.trainer.data import weighted, with_old_logprobs, with_ref_logprobs
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.logprobs import token_logprobs
from grpo_gsm8k.trainer.losses import Cispo, GrpoClip, Gspo, Objective, Reinforce, update_loss
from grpo_gsm8k.trainer.optimizer import MasterAdamW, lr_at
from grpo_gsm8k.trainer.policy import weights_sha256
from tests.toys import gradient, rows, tensor_of, train_config, with_advantage

SEQUENCES = [(range(3, 3 + n), p) for n, p in [(9, 4), (4, 1), (13, 6), (6, 2), (11, 3), (5, 4)]]
POLICY = Objective(GrpoClip(0.2, 0.2), temperature=0.7)
GSPO_KL = Objective(Gspo(0.02, 0.02), temperature=0.7, kl_coef=0.3)
CISPO = Objective(Cispo(1.0, 0.5), temperature=0.7)


@pytest.fixture
def make_learner(tiny):
    def make(dtype=torch.float32, reference=False, **flags):
        model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=dtype)
        return TorchLearner(model, AutoTokenizer.from_pretrained(tiny.model), train_config(**flags), reference)

    return make


def policy_rows():
    out = []
    for i, sequence in enumerate(SEQUENCES):
        out += rows(sequence, advantage=(-1) ** i * (0.3 + i), logprob=-5.8)
    return out


@pytest.mark.parametrize("objective", [Objective(), POLICY, GSPO_KL, CISPO], ids=lambda o: type(o.loss).__name__)
@pytest.mark.parametrize("how", ["sequence", "token", "constant"])
def test_gradient_is_the_same_for_any_split_and_order(make_learner, objective, how):
    def update(data):
        reference = [[-5.5 + i % 5 / 5 for i in row.token_ids] for row in data]  # known by its id, in any order
        return with_ref_logprobs(weighted(data, how, 20), reference)

    whole, data = make_learner(max_tokens_per_microbatch=10_000), policy_rows()
    whole_metrics = whole.forward_backward(update(data), objective)
    for budget, order in [(1, data), (13, data), (30, data[::-1]), (10_000, data[::-1])]:
        other = make_learner(max_tokens_per_microbatch=budget)
        metrics = other.forward_backward(update(order), objective)
        for name, expected in gradient(whole).items():
            assert torch.allclose(gradient(other)[name], expected, rtol=1e-4, atol=1e-6), (budget, name)
        assert metrics.keys() == whole_metrics.keys()
        for name in (key for key in metrics if not key.startswith("perf/")):
            assert metrics[name] == pytest.approx(whole_metrics[name], rel=1e-4), name


def test_on_policy_every_policy_loss_has_the_same_gradient(make_learner):
    """Where the ratio is 1 nothing is clipped, and what is left of each is A times the gradient of log pi."""
    data = weighted(policy_rows(), "sequence")
    data = with_old_logprobs(data, make_learner().logprobs(data, 0.7))
    gradients = []
    for loss in (Reinforce(), GrpoClip(), Gspo(), Cispo()):
        learner = make_learner(max_tokens_per_microbatch=20)
        learner.forward_backward(data, replace(POLICY, loss=loss))
        gradients.append(gradient(learner))
    for other in gradients[1:]:
        assert all(torch.allclose(x, gradients[0][name], rtol=1e-3, atol=1e-6) for name, x in other.items())


def test_the_reference_stays_the_model_that_it_began_with(make_learner, tmp_path):
    plain = make_learner()
    assert plain.reference is None  # no KL, no cost
    learner, data = make_learner(reference=True), weighted(policy_rows(), "token")
    began = plain.logprobs(data, 0.7)
    assert learner.reference_logprobs(data, 0.7) == began
    learner.forward_backward(data, POLICY)
    learner.step(0.1)
    learner.save(tmp_path)
    again = make_learner(reference=True)
    again.load(tmp_path)
    for one in (learner, again):
        assert not torch.allclose(tensor_of(one.logprobs(data, 0.7)), tensor_of(began), atol=1e-3)
        assert one.reference_logprobs(data, 0.7) == began


def test_a_masked_row_changes_neither_numerator_nor_denominator(make_learner):
    data = policy_rows()
    silent = [r.__class__(r.token_ids, (0,) * len(r.mask), r.logprobs, r.advantages) for r in data[:2]]
    for how in ("sequence", "token", "constant"):
        a, b = make_learner(), make_learner()
        loss_a = a.forward_backward(weighted(data, how, 20), POLICY)["loss"]
        loss_b = b.forward_backward(weighted(data + silent, how, 20), POLICY)["loss"]
        assert loss_a == pytest.approx(loss_b, rel=1e-6)
        assert all(torch.allclose(x, gradient(b)[name], atol=1e-7) for name, x in gradient(a).items())


def test_an_all_masked_update_is_a_finite_zero(make_learner):
    learner = make_learner()
    silent = [r.__class__(r.token_ids, (0,) * len(r.mask), r.logprobs, r.advantages) for r in policy_rows()]
    before = weights_sha256(learner.weights())
    metrics = learner.forward_backward(weighted(silent, "token"), POLICY) | learner.step(0.1)
    assert metrics["loss"] == 0.0 and all(math.isfinite(v) for v in metrics.values())
    assert weights_sha256(learner.weights()) == before


def test_rows_without_advantage_are_skipped_and_change_nothing(make_learner):
    data = [with_advantage(row, 0.0) if i in (0, 3, 4) else row for i, row in enumerate(policy_rows())]
    data = with_ref_logprobs(weighted(data, "token"), [[-5.5] * len(row.mask) for row in data])
    learner, batch = make_learner(), make_batch(data)
    metrics = learner.forward_backward(data, POLICY)
    assert metrics["perf/skipped_rows_frac"] == 0.5
    for loss in (Objective(), replace(POLICY, kl_coef=0.1)):  # these pull at every row
        assert make_learner().forward_backward(data, loss)["perf/skipped_rows_frac"] == 0
    whole = make_learner()
    logp, _ = token_logprobs(whole.model, batch, POLICY.temperature)
    update_loss(logp, batch, POLICY).backward()
    assert metrics["loss"] == pytest.approx(float(update_loss(logp, batch, POLICY).detach()), rel=1e-5)
    for name, expected in gradient(whole).items():
        assert torch.allclose(gradient(learner)[name], expected, rtol=1e-4, atol=1e-7), name


def test_an_update_without_any_advantage_steps_as_with_a_gradient_of_zero(make_learner):
    """AdamW goes on by its momentum; the figures come from one row that stands in for all."""
    learner, other = make_learner(weight_decay=0.1), make_learner(weight_decay=0.1)
    for one in (learner, other):
        one.forward_backward(weighted(policy_rows(), "token"), POLICY)
        one.step(1e-2)
    flat = weighted([with_advantage(row, 0.0) for row in policy_rows()], "token")
    metrics = learner.forward_backward(flat, POLICY) | learner.step(1e-2)
    assert metrics["loss"] == 0 and metrics["policy/entropy"] > 1 and metrics["policy/grad_norm"] == 0
    assert metrics["perf/skipped_rows_frac"] == pytest.approx(5 / 6)
    for master in other.optimizer.masters.values():
        master.grad = torch.zeros_like(master)
    other.step(1e-2)
    assert weights_sha256(learner.weights()) == weights_sha256(other.weights())


def test_old_logprobs_of_a_frozen_pass_make_the_ratio_one(make_learner):
    learner, data = make_learner(), weighted(policy_rows(), "token")
    frozen = learner.logprobs(data, POLICY.temperature)
    metrics = learner.forward_backward(with_old_logprobs(data, frozen), POLICY)
    assert metrics["mismatch/logp_abs_max"] < 1e-5 and metrics["mismatch/ess"] == pytest.approx(1.0, abs=1e-5)


def test_tiny_updates_accumulate_in_bfloat16(make_learner):
    """areal#1369: at 1.0 bfloat16 has steps of 2^-7; a thousand updates of 1e-5 must still move it by 1e-2."""
    layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(layer.weight)
    optimizer = MasterAdamW(layer, train_config(grad_clip=0.0))
    for _ in range(1000):
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step(1e-5)
    assert float(optimizer.masters["weight"]) == pytest.approx(0.99, abs=1e-4)
    assert float(layer.weight) == pytest.approx(0.99, abs=2**-8)


def test_the_share_of_bfloat16_weights_in_which_a_step_shows():
    """A first step of AdamW is lr. Below 1.0 bfloat16's neighbour is 2^-8 away, so a copy of 1.0 changes at 2^-9."""
    layer = torch.nn.Linear(122, 1, bias=False, dtype=torch.bfloat16)
    optimizer = MasterAdamW(layer, train_config(grad_clip=0.0))
    for weights, lr, share in [((1.0, 1.0), 1e-3, 0.0), ((1.0, 1.0), 3e-3, 1.0), ((1.0, 2**-9), 1e-3, 0.5)]:
        with torch.no_grad():
            layer.weight[0, :61], layer.weight[0, 61:] = weights
            optimizer.masters["weight"].copy_(layer.weight)
        optimizer.inner.state.clear()
        layer(torch.ones(1, 122, dtype=torch.bfloat16)).sum().backward()
        assert optimizer.step(lr)["policy/bf16_changed_frac"] == share
    full = torch.nn.Linear(3, 1)
    full(torch.ones(1, 3)).sum().backward()
    assert "policy/bf16_changed_frac" not in MasterAdamW(full, train_config()).step(0.1)


def test_the_sample_of_bfloat16_weights_stands_for_all_of_them():
    torch.manual_seed(0)
    layer = torch.nn.Linear(1024, 512, bias=False, dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.weight, std=0.02)
    optimizer, before = MasterAdamW(layer, train_config(grad_clip=0.0)), layer.weight.detach().clone()
    layer(torch.randn(8, 1024, dtype=torch.bfloat16)).square().sum().backward()
    share = optimizer.step(1e-5)["policy/bf16_changed_frac"]
    everywhere = float((layer.weight != before).float().mean())
    assert 0.05 < everywhere < 0.5 and share == pytest.approx(everywhere, rel=0.1)


def test_bfloat16_gradients_are_accumulated_in_float32(make_learner):
    learner = make_learner(torch.bfloat16, max_tokens_per_microbatch=1)
    learner.forward_backward(weighted(policy_rows(), "token"), Objective())
    assert all(grad.dtype == torch.float32 for grad in gradient(learner).values())
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_log_probabilities_are_float32_in_a_bfloat16_model(make_learner):
    logp, _ = token_logprobs(make_learner(torch.bfloat16).model, make_batch(policy_rows()))
    assert logp.dtype == torch.float32


def test_adamw_follows_the_formula_by_hand():
    """Two steps of AdamW (arXiv 1711.05101) on one weight, computed by hand with beta1 = 0.9, beta2 = 0.95."""
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 2.0)
    optimizer = MasterAdamW(layer, train_config(grad_clip=0.0, weight_decay=0.1))
    layer(torch.tensor([[3.0]])).sum().backward()  # gradient 3
    optimizer.step(0.5)
    assert float(layer.weight) == pytest.approx(2.0 * (1 - 0.05) - 0.5, abs=1e-5)  # the first step is lr * sign
    layer(torch.tensor([[1.0]])).sum().backward()  # gradient 1
    m, v = (0.9 * 0.3 + 0.1) / (1 - 0.81), (0.95 * 0.45 + 0.05) / (1 - 0.9025)
    expected = 1.4 * 0.95 - 0.5 * m / math.sqrt(v)
    metrics = optimizer.step(0.5)
    assert float(layer.weight) == pytest.approx(expected, abs=1e-5)
    assert metrics["policy/grad_norm"] == pytest.approx(1.0)
    assert metrics["policy/update_to_weight"] == pytest.approx(abs(expected - 1.4) / 1.4, abs=1e-5)


def test_clipping_scales_the_gradient_to_the_limit():
    layer = torch.nn.Linear(2, 1, bias=False)
    optimizer = MasterAdamW(layer, train_config(grad_clip=1.0))
    seen = []
    optimizer.inner.step = lambda: seen.append(layer.weight.grad.clone())  # what the inner optimizer gets
    layer(torch.tensor([[3.0, 4.0]])).sum().backward()
    assert optimizer.step(0.1)["policy/grad_norm"] == pytest.approx(5.0)
    assert seen[0].tolist()[0] == pytest.approx([0.6, 0.8], abs=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_stops_before_the_step(poison):
    layer = torch.nn.Linear(1, 1, bias=False)
    before = layer.weight.detach().clone()
    optimizer = MasterAdamW(layer, train_config())
    layer(torch.tensor([[poison]])).sum().backward()
    with pytest.raises(NonFiniteError):
        optimizer.step(0.1)
    assert torch.equal(layer.weight, before) and layer.weight.grad is None


def test_schedules_by_hand():
    cfg = train_config(lr=1.0, lr_schedule="linear", warmup_steps=1)
    assert [lr_at(s, 3, cfg) for s in (1, 2, 3)] == pytest.approx([0.5, 2 / 3, 1 / 3])
    cfg = train_config(lr=2.0, lr_schedule="cosine", warmup_steps=0)
    assert [lr_at(s, 3, cfg) for s in (1, 2, 3)] == pytest.approx([2 * 0.8535534, 1.0, 2 * 0.1464466], abs=1e-6)
    cfg = train_config(lr=1.0, lr_schedule="constant", warmup_steps=3)
    assert [lr_at(s, 9, cfg) for s in (1, 3, 4, 9)] == pytest.approx([0.25, 0.75, 1.0, 1.0])


def test_hash_of_weights_counts_tied_ones_once_and_sees_every_bit(make_learner):
    learner = make_learner()
    first = weights_sha256(learner.weights())
    assert first == weights_sha256(reversed(list(learner.weights())))
    with torch.no_grad():
        weight = learner.model.base_model.norm.weight
        weight[0] = torch.nextafter(weight[0], torch.tensor(2.0))
    assert weights_sha256(learner.weights()) != first
