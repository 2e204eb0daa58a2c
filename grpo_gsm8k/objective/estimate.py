"""The exact mean and variance of an update's gradient: every group that can be sampled, weighted by its probability.

Advantages, rows, weights, log-probabilities and loss are those of training: `grpo.with_advantages`, `grpo.datum`,
`grpo.whole_pass`, `plain_logprobs` and `losses.update_loss`. Groups that differ in their order alone are computed once.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from grpo_gsm8k import grpo
from grpo_gsm8k.config import GrpoConfig
from grpo_gsm8k.datatypes import Datum, Rollout
from grpo_gsm8k.objective.world import LONGEST, World, policy_gradient
from grpo_gsm8k.plugins import is_users
from grpo_gsm8k.tasks.rewards import overlong_penalty
from grpo_gsm8k.trainer.batch import Batch, make_batch
from grpo_gsm8k.trainer.logprobs import plain_logprobs
from grpo_gsm8k.trainer.losses import Objective, update_loss

EXACT = 1e-6
"""Below this, relative, a bias is rounding: rows hold float32."""

NEUTRAL: dict[str, Any] = {
    **{"loss": "reinforce", "advantage": "group_relative", "baseline": "leave_one_out", "std_norm": False},
    **{"aggregation": "constant", "entropy_coef": 0.0, "kl_coef": 0.0, "old_logprobs": "sampler"},
    **{"importance_correction": "none", "mask_truncated": False, "overlong_buffer": 0.0, "resample_zero_variance": 0},
}
"""REINFORCE with a leave-one-out baseline and nothing else: the unbiased estimator that each part is tried in."""


@dataclass(frozen=True)
class Update:
    """An update of one group: how probable it is, and its rows; none if all of them are masked."""

    probability: float
    rows: tuple[Datum, ...]


@dataclass(frozen=True)
class Moments:
    """Mean of an update's gradient, flat, and the root of its total variance."""

    mean: torch.Tensor
    deviation: float


def neutral(cfg: GrpoConfig, **parts: Any) -> GrpoConfig:
    """The settings with every part of the objective neutral, but for these."""
    return replace(cfg, **{**NEUTRAL, **parts})


@functools.lru_cache(maxsize=256)
def moments(cfg: GrpoConfig, world: World, together: bool | None = None) -> Moments:
    """The exact moments of the gradient that training with `cfg` has in this world.

    Args:
        together: compute the loss of all updates in one batch, which any loss that is a sum over rows allows; False
            takes one update after the other; None does so for a user's loss, which may do anything.
    """
    updates = updates_of(cfg, world)
    rows = [row for update in updates for row in update.rows]
    owners = [number for number, update in enumerate(updates) for _ in update.rows]
    alone = is_users(cfg.loss) if together is None else not together
    each = row_gradients(rows, grpo.objective_of(cfg), world, owners if alone else [0] * len(rows))
    gradients = torch.zeros(len(updates), each.shape[1], dtype=torch.float64)
    gradients.index_add_(0, torch.tensor(owners), each)
    shares = torch.tensor([update.probability for update in updates], dtype=torch.float64)
    mean = shares @ gradients
    return Moments(mean, math.sqrt(float(shares @ (gradients - mean).square().sum(1))))


@functools.lru_cache(maxsize=64)
def updates_of(cfg: GrpoConfig, world: World) -> tuple[Update, ...]:
    """Every update of one prompt's group, with its probability."""
    groups, shares, size = [], [], cfg.group_size
    world = with_length_penalty(cfg, world)
    for sampled in world.sampled_P:
        for chosen in itertools.combinations_with_replacement(sampled, size):
            orders = math.factorial(size) // math.prod(
                math.factorial(n) for n in Counter(id(one) for one in chosen).values()
            )
            shares.append(orders * math.prod(one.probability for one in chosen) / len(world.sampled_P))
            groups.append([Rollout(one.trajectory, one.grade) for one in chosen])
    shares = resampled(cfg, groups, shares)
    updates = []
    for share, group in zip(shares, grpo.with_advantages(cfg, groups), strict=True):
        rows = [row for rollout in group if (row := grpo.datum(cfg, rollout))]
        data = grpo.whole_pass(cfg, world.learner, rows, step=1)[0] if rows else []  # type: ignore[arg-type]
        updates.append(Update(share, tuple(data)))
    return tuple(updates)


def with_length_penalty(cfg: GrpoConfig, world: World) -> World:
    """The world with the rewards that `--overlong_buffer` trains on; the buffer is a token at least."""
    if not cfg.overlong_buffer:
        return world
    buffer = max(1, round(cfg.overlong_buffer * LONGEST))
    return world.graded(lambda grade, one: overlong_penalty(grade, sum(one.mask), LONGEST, buffer))


def resampled(cfg: GrpoConfig, groups: Sequence[Sequence[Rollout]], shares: Sequence[float]) -> list[float]:
    """The probabilities of the groups where fresh prompts replace flat ones, `--resample_zero_variance` times."""
    flat = [len({rollout.grade.reward for rollout in group}) == 1 for group in groups]
    stays = math.fsum(share for share, is_flat in zip(shares, flat, strict=True) if is_flat)
    tries = cfg.resample_zero_variance
    factors = {True: stays**tries, False: math.fsum(stays**n for n in range(tries + 1))}
    return [share * factors[is_flat] for share, is_flat in zip(shares, flat, strict=True)]


# ----------------------------------------------------------------------------------------- the gradient of each row


def row_gradients(
    rows: Sequence[Datum], objective: Objective, world: World, owners: Sequence[int] = ()
) -> torch.Tensor:
    """Gradient of `update_loss` in the policy's table, by row, `(B, parameters)`.

    The loss's derivatives in log-probability and entropy, times theirs in the table.

    Args:
        owners: rows of the same owner are one batch; by default all rows are.
    """
    kinds = tuple(sorted({(row.token_ids, row.mask) for row in rows}))
    number = {kind: k for k, kind in enumerate(kinds)}
    logp, entropy, of_logp, of_entropy = _scored(kinds, world)
    which = torch.tensor([number[row.token_ids, row.mask] for row in rows])
    whole, found = make_batch(rows), torch.zeros(len(rows), of_logp.shape[-1], dtype=torch.float64)
    for _, numbered in itertools.groupby(enumerate(owners or [0] * len(rows)), key=lambda pair: pair[1]):
        part = [number for number, _ in numbered]
        batch, kind = whole.select(part), which[part]
        columns = batch.mask.shape[1]
        d_logp, d_entropy = loss_derivatives(batch, objective, logp[kind, :columns], entropy[kind, :columns])
        found[part] = torch.einsum("bt,btp->bp", d_logp, of_logp[kind, :columns])
        found[part] += torch.einsum("bt,btp->bp", d_entropy, of_entropy[kind, :columns])
    return found


def loss_derivatives(
    batch: Batch, objective: Objective, logp: torch.Tensor, entropy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """d `update_loss` in log-probability and entropy of each target, both `(B, T)`."""
    leaf, bonus = logp.detach().clone().requires_grad_(), entropy.detach().clone().requires_grad_()
    loss = update_loss(leaf, batch, objective, bonus)
    if not loss.requires_grad:
        return torch.zeros_like(leaf), torch.zeros_like(bonus)
    found = torch.autograd.grad(loss, (leaf, bonus), allow_unused=True)
    d_logp, d_entropy = (torch.zeros_like(leaf) if d is None else d for d in found)
    return d_logp, d_entropy


@functools.lru_cache(maxsize=64)
def _scored(kinds: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], world: World) -> tuple[torch.Tensor, ...]:
    """Log-probability and entropy of each target `(B, T)`, and their derivatives in the table `(B, T, parameters)`.

    Args:
        kinds: ids and mask of each row.
    """
    batch = make_batch([Datum(*kind) for kind in kinds])
    logp, found = plain_logprobs(world.policy, batch, world.temperature)
    entropy = batch.everywhere(found["entropy"])
    derivatives = []
    for values in (logp, entropy):
        flat = values.flatten()
        each = torch.eye(len(flat), dtype=flat.dtype)
        (of_table,) = torch.autograd.grad(flat, world.policy.table, each, retain_graph=True, is_grads_batched=True)
        derivatives.append(of_table.flatten(1).unflatten(0, values.shape))
    return logp.detach(), entropy.detach(), *derivatives


# -------------------------------------------------------------------------------------------------- against the truth


@dataclass(frozen=True)
class Against:
    """An estimator beside the policy gradient t that it estimates, as -mean = scale t + the part across t.

    Attributes:
        scale: along t, of the aggregation's own factor: 1 / max_new_tokens for "constant", else 1 / mean length. A
            scale is a learning rate.
        sideways: the part across t as a share of the mean: the sine of the angle. Another objective's direction.
        bias: |mean - t| / |t|, both of scale and of direction.
        noise: root of the total variance over the mean, of an update of one group.
    """

    scale: float
    sideways: float
    bias: float
    noise: float

    @property
    def verdict(self) -> str:
        """In a word."""
        if not math.isfinite(self.bias):
            return "not finite"
        if self.scale == self.sideways == 0:
            return "no gradient"
        if self.bias < EXACT:
            return "unbiased"
        if self.sideways < EXACT:
            return "scaled"
        return "biased"


def compare(cfg: GrpoConfig, world: World, found: Moments) -> Against:
    """An estimator against the gradient of the mean reward."""
    factor = 1 / (LONGEST if cfg.aggregation == "constant" else world.mean_length)
    truth, mine = policy_gradient(world), -found.mean / factor
    along = float(mine @ truth / (truth @ truth))
    size = float(mine.norm())
    return Against(
        scale=along,
        sideways=float((mine - along * truth).norm()) / size if size else 0.0,
        bias=float((mine - truth).norm() / truth.norm()),
        noise=found.deviation / factor / size if size else 0.0,
    )
