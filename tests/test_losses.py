"""Losses and their signs by hand, the KL term against the exact KL, an update's figures, advantages by hand."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import fields, replace

import pytest
import torch

from grpo_gsm8k.config import GrpoConfig
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.grpo import group_advantages, maxrl_advantages
from grpo_gsm8k.trainer.logprobs import token_logprobs
from grpo_gsm8k.trainer.losses import (
    LOSSES,
    Cispo,
    GrpoClip,
    Gspo,
    Luspo,
    Objective,
    Reinforce,
    Sapo,
    Vespo,
    per_token_loss,
    unread_settings,
)
from grpo_gsm8k.trainer.metrics import add_sums, policy_metrics, policy_sums
from tests.toys import TableModel, batch_of, rows

CLIP = Objective(GrpoClip(0.2, 0.2))


def loss_and_gradient(ratio: float, advantage: float, objective: Objective = CLIP) -> tuple[float, float]:
    """Of one token, with the old probability 1/2 and the given ratio."""
    batch = batch_of(rows(([1, 2], 1), advantage=advantage, logprob=math.log(0.5)))
    logp = torch.tensor([[math.log(0.5 * ratio)]], requires_grad=True)
    loss = per_token_loss(logp, batch, objective).sum()
    loss.backward()
    return float(loss.detach()), float(logp.grad)


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


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (5.0, -1.0, 3.0, 0.0),  # far above, and bad: the plain clip would push with 5
        (2.0, -1.0, 2.0, 2.0),  # above, and bad, below the second clip: as ever
        (5.0, 1.0, -1.2, 0.0),  # above, and good: as ever
        (0.5, -1.0, 0.8, 0.0),
    ],
)
def test_dual_clip_cases(ratio, advantage, loss, gradient):
    """By arXiv 1912.09729 eq. 5: max(min(r A, clip(r) A), 3 A) where A < 0."""
    found = loss_and_gradient(ratio, advantage, Objective(GrpoClip(0.2, 0.2, 3.0)))
    assert found == pytest.approx((loss, gradient), abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"),
    [(10.0, 1.0, 5.0), (10.0, -2.0, 5.0), (3.0, 1.0, 3.0), (0.1, -1.0, 0.5)],
)
def test_cispo_cases(ratio, advantage, weight):
    """The weight is clipped to [0.5, 5], and no token loses its gradient."""
    logp = math.log(0.5 * ratio)
    found = loss_and_gradient(ratio, advantage, Objective(Cispo(0.5, 4.0)))
    assert found == pytest.approx((-weight * advantage * logp, -weight * advantage), abs=1e-5)


def test_reinforce_case():
    assert loss_and_gradient(10.0, 2.0, Objective(Reinforce())) == pytest.approx((-2 * math.log(5), -2), abs=1e-6)


@pytest.mark.parametrize(
    ("advantage", "loss", "gradient"),
    [(-1.0, 4.0, 2.0), (1.0, -1.2, 0.0)],  # of the response, and of each of its two tokens
)
def test_gspo_case(advantage, loss, gradient):
    """Ratios 2 and 8: the response's is 4, sqrt(2 x 8), and each log-probability moves it by 4 / 2."""
    batch = batch_of(rows(([1, 2, 3, 4], 2), advantage=advantage, logprob=math.log(0.1)), "sequence")
    logp = torch.tensor([[0.0, math.log(0.2), math.log(0.8)]], requires_grad=True)
    value = (batch.weights * Gspo()(logp, batch)).sum()
    value.backward()
    assert float(value.detach()) == pytest.approx(loss, abs=1e-5)
    assert logp.grad[0].tolist() == pytest.approx([0.0, gradient, gradient], abs=1e-5)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.0, 2.0), (3.0, 1.0), (0.2, 1.0), (3.0, -1.5), (0.2, -1.5)])
def test_sapo_by_hand(ratio, advantage):
    """-A 4 / tau sigmoid(tau (r - 1)), whose slope in log pi is -A r 4 s (1 - s)."""
    tau = 1.0 if advantage > 0 else 1.05
    s = 1 / (1 + math.exp(-tau * (ratio - 1)))
    expected = (-advantage * 4 / tau * s, -advantage * ratio * 4 * s * (1 - s))
    assert loss_and_gradient(ratio, advantage, Objective(Sapo())) == pytest.approx(expected, rel=1e-5)
    if ratio == 1:
        assert expected[1] == -advantage  # on-policy the plain surrogate's


@pytest.mark.parametrize(("advantage", "k", "lam"), [(1.0, 2.0, 3.0), (-1.0, 3.0, 2.0)])
@pytest.mark.parametrize("ratios", [(1.0, 1.0), (0.5, 0.8), (1.25, 1.6)])
def test_vespo_by_hand(advantage, k, lam, ratios):
    """Each token's loss is -phi(W) A log pi with W the product of the ratios, and phi takes no gradient."""
    batch = batch_of(rows(([1, 2, 3], 1), advantage=advantage, logprob=math.log(0.1)), "sequence")
    logp = torch.tensor([[math.log(0.1 * r) for r in ratios]], requires_grad=True)
    w = ratios[0] * ratios[1]
    phi = w**k * math.exp(lam * (1 - w))
    found = Vespo()(logp, batch)
    found.sum().backward()
    assert found[0].tolist() == pytest.approx([-phi * advantage * math.log(0.1 * r) for r in ratios], rel=1e-5)
    assert logp.grad[0].tolist() == pytest.approx([-phi * advantage] * 2, rel=1e-5)


def test_luspo_is_gspo_times_the_length_of_the_response():
    data = rows((range(1, 5), 1), (range(1, 9), 1), advantage=0.7, logprob=-1.0)
    batch = batch_of(data, "sequence")
    logp = -1.0 + 0.1 * torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    plain, scaled = Gspo()(logp, batch), Luspo()(logp, batch)
    assert torch.allclose(scaled[0], 3 * plain[0]) and torch.allclose(scaled[1], 7 * plain[1])


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: GrpoClip(0.2, 0.28, dual_clip=1.25), "dual_clip"),
        (lambda: Sapo(sapo_temperature_neg=0.0), "sapo_temperature_neg"),
        (lambda: Sapo(sapo_temperature_pos=math.nan), "sapo_temperature_pos"),
        (lambda: Vespo(vespo_k_neg=-1.0), "vespo_k_neg"),
    ],
)
def test_settings_that_a_loss_refuses(make, word):
    with pytest.raises(ConfigError, match=word):
        make()


def test_a_setting_that_the_loss_does_not_read_is_named():
    cfg, defaults = GrpoConfig(), vars(GrpoConfig())
    assert unread_settings("vespo", vars(cfg), defaults) == []
    changed = vars(cfg) | {"dual_clip": 3.0, "sapo_temperature_pos": 2.0, "clip_eps": 0.1}
    assert unread_settings("gspo", changed, defaults) == ["sapo_temperature_pos"]
    assert unread_settings("sapo", changed, defaults) == ["dual_clip"]


def test_every_loss_and_its_settings_are_options():
    named = {f.name: f.metadata["help"] for f in fields(GrpoConfig)}
    for name, kind in LOSSES.items():
        assert name in named["loss"] or kind.supervised
        assert {f.name for f in fields(kind)} <= named.keys()


@pytest.mark.parametrize(
    "objective",
    [
        CLIP,
        Objective(Sapo()),
        Objective(Luspo(0.02, 0.05)),
        Objective(GrpoClip(0.2, 0.2, 1.3)),
        Objective(Gspo(0.02, 0.05)),
        Objective(Reinforce()),
        Objective(GrpoClip(), kl_coef=0.5, kl_estimator="k1"),
        Objective(GrpoClip(), kl_coef=0.5, kl_estimator="k3"),
        Objective(Gspo(), kl_coef=0.5, kl_estimator="k2", kl_bias_correction=False),
    ],
    ids=str,
)
def test_gradient_is_that_of_the_loss_by_finite_differences(objective):
    torch.manual_seed(0)
    good, bad = ([1, 2, 3, 4], 1), ([1, 4, 2], 1)
    data = rows(good, bad, advantage=0.7, logprob=-1.0) + rows(bad, good, advantage=-0.4, logprob=-1.0)
    batch = batch_of(data)
    batch = replace(batch, ref_logprobs=(-1.0 + 0.3 * torch.randn(batch.mask.shape)) * batch.mask)
    logp = (-1.0 + 0.2 * torch.randn(batch.mask.shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: (batch.weights.double() * per_token_loss(x, batch, objective)).sum(), (logp,), eps=1e-6
    )


@pytest.mark.parametrize("objective", [Objective(kind()) for kind in LOSSES.values()], ids=str)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_an_extreme_ratio_stays_finite(objective, estimator):
    for ratio in (1e30, 1e-30):
        found = loss_and_gradient(ratio, -1.0, replace(objective, kl_coef=1.0, kl_estimator=estimator))
        assert all(map(math.isfinite, found))


# ------------------------------------------------------------------------------------------------- the KL term

POLICY = torch.tensor([0.4, -0.9, 1.1, 0.2, -0.3], dtype=torch.float64)  # logits of a vocabulary of five
REFERENCE = torch.tensor([0.30, 0.25, 0.10, 0.15, 0.20], dtype=torch.float64)
STALE = torch.tensor([0.10, 0.30, 0.20, 0.25, 0.15], dtype=torch.float64)  # an old policy that has been left behind


def exact_kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p * (p / q).log()).sum())


def numeric_gradient(f) -> list[float]:
    """Of f(probabilities) in the policy's logits, by central differences."""
    steps = 1e-5 * torch.eye(5, dtype=torch.float64)
    return [(f((POLICY + h).softmax(0)) - f((POLICY - h).softmax(0))) / 2e-5 for h in steps]


def expected_kl_term(sampled: torch.Tensor, estimator: str, correction: bool) -> tuple[float, list[float]]:
    """The term and its gradient in the logits, in expectation over tokens that `sampled` draws: a row for each."""
    data = [r for token, p in enumerate(sampled.tolist()) for r in rows(([0, token], 1), logprob=math.log(p))]
    reference, weights = REFERENCE.log().float().reshape(5, 1), sampled.float().reshape(5, 1)
    batch = replace(batch_of(data), ref_logprobs=reference, weights=weights)
    model = TableModel(POLICY.float().repeat(5, 1))
    logp, _ = token_logprobs(model, batch)
    objective = Objective(GrpoClip(), kl_coef=1.0, kl_estimator=estimator, kl_bias_correction=correction)
    value = (batch.weights * per_token_loss(logp, batch, objective)).sum()  # the advantage is 0: only the KL is left
    value.backward()
    return float(value.detach()), model.table.grad[0].tolist()


@pytest.mark.parametrize("sampled", [POLICY.softmax(0), STALE], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_gradient_is_that_of_the_exact_kl(estimator, sampled):
    """trl#4967, #6503: an estimator of the KL's value that pulls along another gradient, or along none."""
    value, gradient = expected_kl_term(sampled, estimator, correction=True)
    assert gradient == pytest.approx(numeric_gradient(lambda p: exact_kl(p, REFERENCE)), abs=2e-6)
    if estimator != "k2":  # whose value is biased
        assert value == pytest.approx(exact_kl(POLICY.softmax(0), REFERENCE), abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "kl"),
    [
        ("k1", lambda p: 0.0),  # no gradient at all
        ("k2", lambda p: exact_kl(p, REFERENCE)),
        ("k3", lambda p: exact_kl(REFERENCE, p)),  # the other KL's
    ],
)
def test_what_an_estimator_alone_pulls_along(estimator, kl):
    _, gradient = expected_kl_term(POLICY.softmax(0), estimator, correction=False)
    assert gradient == pytest.approx(numeric_gradient(kl), abs=2e-6)


def test_kl_values_by_hand():
    """Of one token with pi / pi_ref = 2, on-policy."""
    batch = batch_of(rows(([1, 2], 1), logprob=math.log(0.5)))
    batch = replace(batch, ref_logprobs=torch.tensor([[math.log(0.25)]]))
    logp = torch.tensor([[math.log(0.5)]])
    for estimator, value in [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 0.5 - 1 + math.log(2))]:
        objective = replace(CLIP, kl_coef=0.1, kl_estimator=estimator)
        assert float(per_token_loss(logp, batch, objective)) == pytest.approx(0.1 * value, abs=1e-6)
        sums = policy_sums(logp, {}, batch, objective)
        assert policy_metrics(sums)["policy/kl_ref"] == pytest.approx(value, abs=1e-6)


# ------------------------------------------------------------------------------------------ an update's figures


@pytest.mark.parametrize(
    ("objective", "high", "low"),  # of five tokens with A = 1, then five with A = -1
    [
        (Objective(GrpoClip(0.2, 0.5)), 2, 2),  # 2 and 8 with A > 0; 1/8 and 1/2 with A < 0
        (Objective(GrpoClip(0.2, 0.5, 4.0)), 3, 2),  # and 8 with A < 0
        (Objective(Cispo(0.8, 0.5)), 4, 2),  # whatever the advantage
        (Objective(Reinforce()), 0, 0),
        (Objective(Gspo(0.2, 0.5)), 0, 0),  # the geometric mean is 1
        (Objective(Gspo(0.2, -0.1)), 5, 0),
        (Objective(Sapo()), 0, 0),
        (Objective(Vespo()), 0, 0),
    ],
    ids=str,
)
def test_clip_fractions_count_where_each_clip_acts(objective, high, low):
    ratios, ids = torch.tensor([1 / 8, 1 / 2, 1, 2, 8]), (range(1, 7), 1)
    batch = batch_of(rows(ids, advantage=1.0, logprob=-3.0) + rows(ids, advantage=-1.0, logprob=-3.0))
    logp = (-3.0 + ratios.log()).repeat(2, 1)
    figures = policy_metrics(policy_sums(logp, {}, batch, objective))
    assert figures["policy/clip_frac_high"] == pytest.approx(high / 10)
    assert figures["policy/clip_frac_low"] == pytest.approx(low / 10)


def test_figures_of_an_update_by_hand():
    batch = batch_of(rows(([1, 2, 3], 1), advantage=1.0, logprob=math.log(0.25)))
    logp = torch.tensor([[math.log(0.25), math.log(0.5)]])  # ratios 1 and 2
    sums: dict[str, float] = {}
    said = {"entropy": torch.tensor([0.5, 1.5]), "top_prob": torch.tensor([0.5, 0.3])}
    add_sums(sums, policy_sums(logp, said, batch, CLIP))
    figures = policy_metrics(sums)
    assert figures["policy/entropy"] == pytest.approx(1.0) and figures["policy/top_prob"] == pytest.approx(0.4)
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
        batch = batch_of(rows(([1, token], 1), logprob=math.log(p)))
        part = policy_sums(new[token].log().reshape(1, 1), {}, batch, CLIP)
        estimate += p * policy_metrics(part)["policy/approx_kl"]
    assert estimate == pytest.approx(exact, abs=1e-6)


def test_advantages_by_hand():
    # mean 0.5; unbiased variance (4 * 0.25) / 3
    std = math.sqrt(1 / 3)
    assert group_advantages([1, 0, 0, 1]) == pytest.approx([0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std], rel=1e-5)
    assert group_advantages([1.0, 0.2, 0.0, 0.0], std_norm=False) == pytest.approx([0.7, -0.1, -0.3, -0.3])
    eps = group_advantages([1, 0], eps=1.0)
    assert eps == pytest.approx([0.5 / (math.sqrt(0.5) + 1), -0.5 / (math.sqrt(0.5) + 1)])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [  # of rewards 1, 0, 0, 0: mean 1/4, unbiased deviation 1/2, mean of the others 0 and 1/3
        ({"baseline": "group", "std_norm": True, "eps": 0.0}, [1.5, -0.5]),
        ({"baseline": "group", "std_norm": True, "eps": 0.5}, [0.75, -0.25]),
        ({"baseline": "group", "std_norm": False}, [0.75, -0.25]),
        ({"baseline": "leave_one_out", "std_norm": False}, [1.0, -1 / 3]),
        ({"baseline": "leave_one_out", "std_norm": True, "eps": 0.0}, [2.0, -2 / 3]),
        ({"baseline": "none", "std_norm": False}, [1.0, 0.0]),
    ],
    ids=str,
)
def test_every_baseline_by_hand(settings, expected):
    assert group_advantages([1, 0, 0, 0], **settings) == pytest.approx([expected[0]] + [expected[1]] * 3, abs=1e-12)


@pytest.mark.parametrize(
    ("rewards", "advantages"),
    [
        ([1, 0, 0, 0], [3, -1, -1, -1]),
        ([1, 1, 0, 1], [1 / 3, 1 / 3, -1, 1 / 3]),
        ([0.0] * 4, [0.0] * 4),
        ([1, 1], [0, 0]),
    ],
)
def test_maxrl_by_hand(rewards, advantages):
    assert maxrl_advantages(rewards) == pytest.approx(advantages, abs=1e-12)


def test_maxrl_has_the_gradient_of_the_log_likelihood_up_to_an_order():
    """In expectation over all groups of G tosses of a coin: that of -sum_k (1 - p)^k / k for k < G, log p's series."""
    p, size, expected = 0.3, 4, 0.0
    for tosses in itertools.product((0, 1), repeat=size):
        share = math.prod(p if toss else 1 - p for toss in tosses)
        scores = [toss - p for toss in tosses]  # d log pi / d logit
        expected += share * statistics.fmean(a * s for a, s in zip(maxrl_advantages(tosses), scores, strict=True))
    assert expected == pytest.approx(sum((1 - p) ** (k - 1) for k in range(1, size)) * p * (1 - p), abs=1e-12)


def test_maxrl_refuses_what_it_cannot_divide_by():
    with pytest.raises(ConfigError, match="not be negative"):
        maxrl_advantages([1.0, -0.5])


@pytest.mark.parametrize("reward", [0.1 + 0.2, 0.7, 1 / 3, 1e-9, 0.2 + 0.8])
@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_constant_rewards_give_advantage_exactly_zero(reward, size):
    assert group_advantages([reward] * size) == [0.0] * size
    assert group_advantages([reward] * size, std_norm=False, baseline="leave_one_out") == [0.0] * size
    assert group_advantages([reward] * size, std_norm=False, baseline="none") == [reward] * size
