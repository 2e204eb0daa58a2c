"""What must hold of every objective, whatever it estimates: each check runs the trainer's own functions.

A bias that a paper chose is no fault, and `objective.run` prints it. What fails here is a bug: in the loss that is
checked, or on the way from the sampled ids to the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace

import torch

from grpo_gsm8k import grpo
from grpo_gsm8k.config import GrpoConfig
from grpo_gsm8k.datatypes import Datum, Rollout, SamplingParams
from grpo_gsm8k.engines.hf import draw
from grpo_gsm8k.objective.estimate import EXACT, compare, moments, neutral, row_gradients, updates_of
from grpo_gsm8k.objective.world import (
    CONTEXTS,
    ROW,
    VOCABULARY,
    TablePolicy,
    World,
    log_probabilities,
    make_world,
    token_kl_gradients,
)
from grpo_gsm8k.trainer.batch import Batch, make_batch
from grpo_gsm8k.trainer.data import Aggregation, weighted
from grpo_gsm8k.trainer.logprobs import plain_logprobs, token_logprobs
from grpo_gsm8k.trainer.losses import Objective, fused_grad, per_token_loss, rows_to_train, update_loss

WARM = 0.7  # a temperature at which log-probabilities without it would be others
DRAWS = 1024  # even uniform numbers for each prefix
RATIOS = (0.01, 0.3, 0.95, 1.0, 1.05, 1.5, 100.0)
FLAT = (0.1 + 0.2, 0.7, 1 / 3)  # rewards whose sums are not exact in binary
EXTREME = 800.0  # a log-ratio whose exponential no float holds
WIDE = {"loss": "grpo_clip", "clip_eps": 1.0, "clip_eps_high": 1e9, "dual_clip": 0.0}  # the plain ratio times A


@dataclass(frozen=True)
class Check:
    """One check: what must hold, whether it does, and by how much or where it does not."""

    name: str
    ok: bool
    detail: str


def all_checks(cfg: GrpoConfig) -> list[Check]:
    """Every check, in the order of a token's way: sampler, rows, advantages, weights, loss, gradient."""
    return [check(cfg) for check in CHECKS]


# ----------------------------------------------------------------------------------------- what is sampled


def sampler(cfg: GrpoConfig) -> Check:
    """The embedded sampler draws each token as often as it says, and the trainer says the same."""
    world, worst, apart = make_world(temperature=WARM), 0.0, 0.0
    params = SamplingParams(temperature=WARM, top_p=cfg.top_p)
    evenly = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    for context in CONTEXTS:
        logits = world.policy.table.detach()[ROW[context]].repeat(DRAWS, 1)
        chosen, logp = draw(logits, evenly, params, torch.empty(DRAWS, VOCABULARY))
        trained = log_probabilities(world.policy.table.detach(), context, WARM)[chosen]
        often = torch.bincount(chosen, minlength=VOCABULARY)[chosen] / DRAWS
        worst = max(worst, float((often - logp.exp()).abs().max()))
        apart = max(apart, float((trained - logp).abs().max()))
    ok = worst <= 2 / DRAWS and apart < 1e-5
    detail = f"frequencies are within {worst:.1g} of the probabilities, log-probabilities within {apart:.1g}"
    return Check("the sampler reports the probabilities that it draws with, at the sampling temperature", ok, detail)


def rows(cfg: GrpoConfig) -> Check:
    """A row holds the prompt's ids and the sampled ids, and trains the sampled ones with their log-probabilities."""
    name, all_rows = "rows hold the sampled ids and their log-probabilities", replace(cfg, mask_truncated=False)
    for group in make_world().sampled_P:
        for one in group:
            trajectory = one.trajectory
            row, prompt = grpo.datum(all_rows, Rollout(trajectory, one.grade, 1.0)), trajectory.prompt.token_ids
            zeros = (0,) * len(prompt)
            expected = (prompt + trajectory.token_ids, zeros + trajectory.mask, zeros + trajectory.logprobs)
            if row is None or (row.token_ids, row.mask, row.logprobs) != expected:
                return Check(name, False, f"the completion {trajectory.token_ids} of {prompt} becomes {row}")
    return Check(name, True, "all of them")


def pipeline(cfg: GrpoConfig) -> Check:
    """REINFORCE with a leave-one-out baseline, from ids to gradient, is the policy gradient."""
    plain, warm = neutral(cfg, temperature=WARM), make_world(temperature=WARM)
    found = compare(plain, warm, moments(plain, warm))
    name = "ids, mask, shift, temperature and weights give the policy gradient (REINFORCE, leave-one-out)"
    return Check(name, found.bias < EXACT, f"bias {found.bias:.1g}")


def ratio(cfg: GrpoConfig) -> Check:
    """On-policy the ratio is 1, so the unclipped surrogate has the same gradient."""
    plain, warm = neutral(cfg, temperature=WARM, **WIDE), make_world(temperature=WARM)
    found = compare(plain, warm, moments(plain, warm))
    return Check("on-policy the importance ratio is 1", found.bias < EXACT, f"bias {found.bias:.1g}")


# ----------------------------------------------------------------------------------------- advantages


def flat_groups(cfg: GrpoConfig) -> Check:
    """Equal rewards have no advantage; not their rounding errors over a tiny deviation."""
    name = "a group of equal rewards has advantages of exactly 0"
    if ":" in cfg.advantage or (cfg.advantage == "group_relative" and cfg.baseline == "none"):
        return Check(name, True, "not asked of an advantage without the group's baseline")
    found = [a for reward in FLAT for size in (3, 7, 8) for a in _advantages(cfg, [reward] * size)]
    return Check(name, not any(found), f"largest {max(map(abs, found)):.1g}")


def group_order(cfg: GrpoConfig) -> Check:
    """A completion's advantage depends on its reward and its group's, on nothing else."""
    rewards = [0.2, 1.0, 0.0, 0.8]
    there, back = _advantages(cfg, rewards), _advantages(cfg, rewards[::-1])[::-1]
    apart = max(abs(a - b) for a, b in zip(there, back, strict=True))
    return Check("advantages follow their completions in any order", apart < 1e-9, f"apart by {apart:.1g}")


def groups_apart(cfg: GrpoConfig) -> Check:
    """Two examples with the same prompt are two groups."""
    sampled = make_world().sampled_P[0]
    group = [Rollout(one.trajectory, one.grade) for one in sampled[:4]]
    other = [replace(rollout, grade=replace(rollout.grade, reward=rollout.grade.reward / 2 + 1)) for rollout in group]
    together = grpo.with_advantages(cfg, [group, other])
    alone = [grpo.with_advantages(cfg, [each])[0] for each in (group, other)]
    same = [[r.advantage for r in g] for g in together] == [[r.advantage for r in g] for g in alone]
    return Check("each group has its own baseline, also of one prompt twice", same, "advantages of two groups")


def deviation(cfg: GrpoConfig) -> Check:
    """Normalised advantages have unit variance, in the unbiased convention."""
    name = "normalised advantages have an unbiased variance of 1"
    if cfg.advantage != "group_relative" or not cfg.std_norm or cfg.baseline == "none":
        return Check(name, True, "they are not normalised")
    found = _advantages(replace(cfg, baseline="group", advantage_eps=0.0), [0.2, 1.0, 0.0, 0.8])
    variance = math.fsum(a * a for a in found) / (len(found) - 1)
    return Check(name, abs(variance - 1) < 1e-9, f"it is {variance:.6g}")


def _advantages(cfg: GrpoConfig, rewards: Sequence[float]) -> list[float]:
    some = make_world().sampled_P[0][0]
    group = [Rollout(some.trajectory, replace(some.grade, reward=reward)) for reward in rewards]
    return [rollout.advantage for rollout in grpo.with_advantages(cfg, [group])[0]]


# ----------------------------------------------------------------------------------------- weights and batches


def _pass_rows(cfg: GrpoConfig, world: World) -> list[Datum]:
    """A pass over a few groups: rows of both lengths, good and bad."""
    few = [row for update in updates_of(cfg, world)[3::40] for row in update.rows]
    return grpo.whole_pass(cfg, world.learner, [replace(row, weights=()) for row in few], 1)[0]  # type: ignore[arg-type]


def microbatches(cfg: GrpoConfig) -> Check:
    """The gradient of an update is the sum of its microbatches', down to single rows."""
    world = make_world(off_policy=True, temperature=cfg.temperature)
    data, objective = _pass_rows(cfg, world), grpo.objective_of(cfg)
    whole = row_gradients(data, objective, world).sum(0)
    parts = torch.stack([row_gradients([row], objective, world).sum(0) for row in data]).sum(0)
    apart = _relative(parts, whole)
    return Check("any split into microbatches gives the same gradient", apart < EXACT, f"apart by {apart:.1g}")


def minibatches(cfg: GrpoConfig) -> Check:
    """The mean over the minibatches of a pass is the pass."""
    world = make_world(off_policy=True, temperature=cfg.temperature)
    data, objective = _pass_rows(cfg, world), grpo.objective_of(cfg)
    whole = row_gradients(data, objective, world).sum(0)
    parts = list(grpo.minibatches(replace(cfg, minibatches=3, epochs=1), data, step=1))
    mean = torch.stack([row_gradients(part, objective, world).sum(0) for part in parts]).mean(0)
    apart = _relative(mean, whole)
    return Check("the minibatches of a pass average to the pass", apart < EXACT, f"apart by {apart:.1g}")


def masked_rows(cfg: GrpoConfig) -> Check:
    """A row that is masked out changes neither numerator nor denominator."""
    world = make_world()
    data = [replace(row, weights=()) for row in _pass_rows(cfg, world)]
    silent = [replace(row, mask=(0,) * len(row.mask)) for row in data[:3]]
    kinds: tuple[Aggregation, ...] = ("sequence", "token", "constant")
    wrong = [k for k in kinds if _weights(data + silent, k)[: len(data)] != _weights(data, k)]
    return Check("masked rows count in no denominator", not wrong, ", ".join(wrong) or "in all three aggregations")


def all_masked(cfg: GrpoConfig) -> Check:
    """An update without a trained token is a finite zero."""
    world, worst = make_world(), 0.0
    kinds: tuple[Aggregation, ...] = ("sequence", "token", "constant")
    for kind in kinds:
        silent = [replace(row, mask=(0,) * len(row.mask), weights=()) for row in _pass_rows(cfg, world)]
        batch = make_batch(weighted(silent, kind, 2))
        logp, found = plain_logprobs(world.policy, batch, cfg.temperature)
        value = update_loss(logp, batch, grpo.objective_of(cfg), batch.everywhere(found["entropy"])) + 0 * logp.sum()
        (gradient,) = torch.autograd.grad(value, world.policy.table)
        worst = max(worst, abs(float(value.detach())), float(gradient.abs().nan_to_num(math.inf).max()))
    return Check("a fully masked update is a finite zero", worst == 0, f"largest {worst:.1g}")


def _weights(data: Sequence[Datum], kind: Aggregation) -> list[tuple[float, ...]]:
    return [row.weights for row in weighted(data, kind, 2)]


# ----------------------------------------------------------------------------------------- the loss


def fused(cfg: GrpoConfig) -> Check:
    """The fused head and autograd through plain logits have the same gradient."""
    name = "the fused head has the gradient of plain logits"
    world, objective = make_world(off_policy=True, temperature=cfg.temperature), grpo.objective_of(cfg)
    batch, gradients = make_batch(_pass_rows(cfg, world)), []
    for head in ("plain", "fused"):
        policy = TablePolicy(world.policy.table.detach().float())
        if head == "plain":
            logp, found = plain_logprobs(policy, batch, cfg.temperature)
        else:
            bonus = bool(cfg.entropy_coef)
            grad = fused_grad(batch, objective)
            logp, found = token_logprobs(policy, batch, cfg.temperature, True, grad, bonus)
        try:
            update_loss(logp, batch, objective, batch.everywhere(found["entropy"])).backward()
        except AssertionError as fault:  # the head compares its own derivative with autograd's
            return Check(name, False, str(fault))
        assert policy.table.grad is not None
        gradients.append(policy.table.grad)
    apart = _relative(gradients[1], gradients[0])
    return Check(name, apart < 1e-4, f"apart by {apart:.1g}, in float32")


def skipped_rows(cfg: GrpoConfig) -> Check:
    """Rows that the learner leaves out have no gradient."""
    world = make_world(off_policy=True, temperature=cfg.temperature)
    data, objective = _pass_rows(cfg, world), grpo.objective_of(cfg)
    kept = set(rows_to_train(make_batch(data), objective))
    left_out = [row for number, row in enumerate(data) if number not in kept]
    largest = float(row_gradients(left_out, objective, world).abs().max()) if left_out else 0.0
    return Check("rows that are skipped have no gradient", largest == 0, f"{len(left_out)} skipped")


def _probe(cfg: GrpoConfig, log_ratios: Sequence[float], advantage: float) -> tuple[torch.Tensor, Batch, torch.Tensor]:
    """Responses of one token with these ratios: -d loss / d logp of each, the batch, and the log-probabilities."""
    old = math.log(0.1)
    row = Datum((1, 2, 1), (0, 0, 1), (0.0, 0.0, old), (0.0, 0.0, advantage), (0.0, 0.0, old), (0.0, 0.0, 1.0))
    batch = make_batch([row] * len(log_ratios))
    logp = (batch.old_logprobs.double() + torch.tensor(log_ratios, dtype=torch.float64).unsqueeze(1)) * batch.mask
    leaf = logp.requires_grad_()
    loss = (per_token_loss(leaf, batch, Objective(grpo.objective_of(cfg).loss)) * batch.weights).sum()
    if not loss.requires_grad:
        return torch.zeros(len(log_ratios)), batch, leaf
    return -torch.autograd.grad(loss, leaf)[0][:, -1], batch, leaf


def direction(cfg: GrpoConfig) -> Check:
    """A token is pushed along its advantage, or not at all; and pushed where it has moved against it."""
    name, wrong = "the loss pushes along the advantage, and pulls back what moved against it", []
    limit = cfg.dual_clip or math.inf
    for sign in (1.0, -1.0):
        found = _probe(cfg, list(map(math.log, RATIOS)), sign)[0].tolist()
        for at, push in zip(RATIOS, found, strict=True):
            against = at < 1 if sign > 0 else 1 < at < min(2.0, limit)
            if push * sign < 0:
                wrong.append(f"A = {sign:g} at a ratio of {at:g}: pushed the wrong way")
            elif not push and (at == 1 or (against and at != RATIOS[0])):
                wrong.append(f"A = {sign:g} at a ratio of {at:g}: no gradient")
    return Check(name, not wrong, "; ".join(wrong) or "at ratios from 0.01 to 100")


def clip(cfg: GrpoConfig) -> Check:
    """A loss with a clip range reads the old policy, and its clip acts on ratios far outside."""
    name, loss = "the clip acts where the ratio has left its range", grpo.objective_of(cfg).loss
    inner = getattr(loss, "inner", loss)
    has_range = is_dataclass(inner) and "clip_eps" in {f.name for f in fields(inner)}
    high = getattr(inner, "clip_eps_high", getattr(inner, "clip_eps", math.inf)) if has_range else math.inf
    if not 1 + high < RATIOS[-1]:
        return Check(name, True, "it has no clip range" if not has_range else "its range has no upper end")
    push, batch, logp = _probe(cfg, list(map(math.log, RATIOS)), 1.0)
    if float(push[-1]) > 1 + high + 1e-9:
        return Check(name, False, f"A > 0 at a ratio of {RATIOS[-1]:g}: a push of {float(push[-1]):g}")
    if float(push.max() - push.min()) < 1e-9:
        return Check(name, False, "the gradient is the same at every ratio: the old policy is not read")
    with torch.no_grad():
        above = loss.clipped(logp, batch)[0][-1, -1]
    if not bool(above) and hasattr(inner, "clipped"):
        return Check(name, False, f"clipped() denies it at a ratio of {RATIOS[-1]:g}")
    return Check(name, True, f"at a ratio of {RATIOS[-1]:g} the push is {float(push[-1]):.3g}")


def extremes(cfg: GrpoConfig) -> Check:
    """Loss and gradient are finite at any ratio, of old policy and of reference."""
    wrong, both = [], (-EXTREME, EXTREME)
    for sign in (1.0, -1.0):
        for at, push in zip(both, _probe(cfg, both, sign)[0].tolist(), strict=True):
            if not math.isfinite(push):
                wrong.append(f"A = {sign:g} at a ratio of e^{at:g}: {push}")
    return Check("extreme ratios stay finite", not wrong, "; ".join(wrong) or f"at e^{EXTREME:g} and its inverse")


def loss_alone(cfg: GrpoConfig) -> Check:
    """With nothing else beside it, the loss has the policy gradient on-policy, up to a factor."""
    name, world = "on-policy, the loss alone is the policy gradient up to a factor", make_world()
    best = min(
        (compare(plain, world, moments(plain, world)) for plain in _loss_alone(cfg)), key=lambda found: found.sideways
    )
    ok = best.sideways < EXACT and best.scale > 0
    return Check(name, ok, f"scale {best.scale:.4g}, sideways {best.sideways:.1g}")


def _loss_alone(cfg: GrpoConfig) -> list[GrpoConfig]:
    """The loss in the aggregation that it may be made for: LUSPO counts on the mean over a response's tokens."""
    kinds: tuple[Aggregation, ...] = ("constant", "sequence")
    return [neutral(cfg, loss=cfg.loss, aggregation=kind) for kind in kinds]


# ----------------------------------------------------------------------------------------- the KL term

DECLARED = {
    **{("k1", True): "KL(pi || pi_ref)", ("k2", True): "KL(pi || pi_ref)", ("k3", True): "KL(pi || pi_ref)"},
    **{("k1", False): "nothing", ("k2", False): "KL(pi || pi_ref)", ("k3", False): "KL(pi_ref || pi)"},
}
"""(estimator, weighted by the ratio) → the KL whose gradient it has on-policy; see `losses.kl_to_reference`."""


def kl_pulls_along(cfg: GrpoConfig, world: World) -> dict[str, float]:
    """The expected gradient of the KL term beside each exact one: relative distances, and "nothing" its size."""
    plain = neutral(cfg, temperature=world.temperature)
    with_kl = replace(plain, kl_coef=1.0)
    term = (moments(with_kl, world).mean - moments(plain, world).mean) * 2  # "constant" divides by two tokens
    exact = token_kl_gradients(world)
    size = float(exact["KL(pi || pi_ref)"].norm())
    return {**{name: _relative(term, truth) for name, truth in exact.items()}, "nothing": float(term.norm()) / size}


def kl_term(cfg: GrpoConfig) -> Check:
    """The KL term pulls along the KL that its settings name, on-policy and, weighted by the ratio, off."""
    named, wrong = DECLARED[cfg.kl_estimator, cfg.kl_bias_correction], []
    for off in (False, True) if cfg.kl_bias_correction else (False,):
        found = kl_pulls_along(cfg, make_world(off, cfg.temperature))
        if found[named] >= EXACT:
            wrong.append(f"{'off' if off else 'on'}-policy it is {found[named]:.2g} away from {named}")
    how = "weighted by the ratio" if cfg.kl_bias_correction else "alone"
    return Check(f"{cfg.kl_estimator} {how} pulls along {named}", not wrong, "; ".join(wrong) or "to 1e-6")


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    size = float(exact.norm())
    return float((found - exact).norm()) / (size or 1.0)


CHECKS: tuple[Callable[[GrpoConfig], Check], ...] = (
    *(sampler, rows, pipeline, ratio, flat_groups, group_order, groups_apart, deviation, microbatches, minibatches),
    *(masked_rows, all_masked, fused, skipped_rows, direction, clip, extremes, loss_alone, kl_term),
)
