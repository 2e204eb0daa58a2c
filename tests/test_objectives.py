"""The clipped surrogate, its signs, its figures; advantages by hand."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_gsm8k.grpo import group_advantages
from grpo_gsm8k.trainer.batch import make_batch
from grpo_gsm8k.trainer.objectives import LOSSES, Objective, add_sums, policy_metrics, policy_sums
from tests.toys import rows

CLIP = Objective("grpo_clip", 0.2, 0.2)


def loss_and_gradient(ratio: float, advantage: float) -> tuple[float, float]:
    """Of one token, with the old probability 1/2 and the given ratio."""
    batch = make_batch(rows(([1, 2], 1), advantage=advantage, logprob=math.log(0.5)), 0)
    logp = torch.tensor([[math.log(0.5 * ratio)]], requires_grad=True)
    loss = LOSSES["grpo_clip"](logp, batch, CLIP).sum()
    loss.backward()
    return float(loss), float(logp.grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # on-policy: the gradient of log p times the advantage
        (1.5, 1.0, -1.2, 0.0),  # already far above, and good: clipped, no gradient
        (0.5, 1.0, -0.5, -0.5),  # below, and good: pulled back up
        (1.5, -1.0, 1.5, 1.5),  # above, and bad: pushed down
        (0.5, -1.0, 0.8, 0.0),  # already far below, and bad: clipped, no gradient
    ],
)
def test_clip_cases(ratio, advantage, loss, gradient):
    assert loss_and_gradient(ratio, advantage) == pytest.approx((loss, gradient), abs=1e-6)


def test_gradient_is_that_of_the_loss_by_finite_differences():
    torch.manual_seed(0)
    batch = make_batch(rows(([1, 2, 3, 4], 1), ([1, 4, 2], 1), advantage=0.7, logprob=-1.0), 0)
    logp = (-1.0 + 0.15 * torch.randn(batch.mask.shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: (batch.weights.double() * LOSSES["grpo_clip"](x, batch, CLIP)).sum(), (logp,), eps=1e-6
    )


def test_an_extreme_ratio_stays_finite():
    loss, gradient = loss_and_gradient(1e30, -1.0)
    assert math.isfinite(loss) and math.isfinite(gradient)


def test_figures_of_an_update_by_hand():
    batch = make_batch(rows(([1, 2, 3], 1), advantage=1.0, logprob=math.log(0.25)), 0)
    logp = torch.tensor([[math.log(0.25), math.log(0.5)]])  # ratios 1 and 2
    sums: dict[str, float] = {}
    add_sums(sums, policy_sums(logp, torch.tensor([[0.5, 1.5]]), batch, CLIP))
    figures = policy_metrics(sums)
    assert figures["policy/entropy"] == pytest.approx(1.0)
    assert figures["policy/clip_frac_high"] == pytest.approx(0.5)
    assert figures["policy/clip_frac_low"] == 0.0
    assert figures["policy/approx_kl"] == pytest.approx((2 - 1 - math.log(2)) / 2, abs=1e-6)
    assert figures["mismatch/logp_abs_mean"] == pytest.approx(math.log(2) / 2, abs=1e-6)
    assert figures["mismatch/logp_abs_max"] == pytest.approx(math.log(2), abs=1e-6)
    assert figures["mismatch/ratio_mean"] == pytest.approx(1.5)
    assert figures["mismatch/ratio_max"] == pytest.approx(2.0)
    assert figures["mismatch/ess"] == pytest.approx((1 + 2) ** 2 / (1 + 4) / 2)


def test_approximate_kl_is_the_true_one_in_expectation():
    old, new = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    exact = float((old * (old / new).log()).sum())
    estimate = 0.0
    for token, p in enumerate(old.tolist()):  # the expectation over what the old policy would draw
        batch = make_batch(rows(([1, token], 1), logprob=math.log(p)), 0)
        part = policy_sums(new[token].log().reshape(1, 1), torch.zeros(1, 1), batch, CLIP)
        estimate += p * policy_metrics(part)["policy/approx_kl"]
    assert estimate == pytest.approx(exact, abs=1e-6)


def test_advantages_by_hand():
    # mean 0.5; unbiased variance (4 * 0.25) / 3
    std = math.sqrt(1 / 3)
    assert group_advantages([1, 0, 0, 1]) == pytest.approx([0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std], rel=1e-5)
    assert group_advantages([1.0, 0.2, 0.0, 0.0], std_norm=False) == pytest.approx([0.7, -0.1, -0.3, -0.3])
    eps = group_advantages([1, 0], eps=1.0)
    assert eps == pytest.approx([0.5 / (math.sqrt(0.5) + 1), -0.5 / (math.sqrt(0.5) + 1)])


@pytest.mark.parametrize("reward", [0.1 + 0.2, 0.7, 1 / 3, 1e-9, 0.2 + 0.8])
@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_constant_rewards_give_advantage_exactly_zero(reward, size):
    assert group_advantages([reward] * size) == [0.0] * size
