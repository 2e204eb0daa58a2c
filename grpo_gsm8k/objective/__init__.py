"""`objective check`: the exact bias and variance of an objective's gradient, on a task small enough to enumerate.

Every group of completions that a policy can sample is graded, and trained on by the code that trains real models; the
mean of its gradients, weighted by the groups' probabilities, is the expectation, without any sampling noise. Beside it
stands the gradient of the mean reward, computed from the policy's table alone.

    grpo-gsm8k objective check --algorithm grpo
    grpo-gsm8k objective check mine:MyLoss --aggregation token
    grpo-gsm8k objective check --all

Simplified on purpose: two prompts, seven completions of each, one group an update, responses of a single turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, get_args

from grpo_gsm8k import grpo
from grpo_gsm8k.config import ALGORITHMS, GrpoConfig
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.objective.checks import all_checks, kl_pulls_along
from grpo_gsm8k.objective.estimate import EXACT, Against, compare, moments, neutral
from grpo_gsm8k.objective.stack import stack_checks
from grpo_gsm8k.objective.world import LONGEST, World, make_world, sequence_kl_gradient, token_kl_gradients
from grpo_gsm8k.trainer.data import Correction

GROUPS = (2, 6)  # smallest and largest group: an update of six has 2 x 924 cases
CORRECTIONS: tuple[Correction, ...] = get_args(Correction)
PARTS = (
    *("advantage", "baseline", "std_norm", "aggregation", "mask_truncated", "overlong_buffer"),
    *("resample_zero_variance", "entropy_coef", "kl_coef"),
)
"""Settings that are parts of an objective, beside its loss."""


def check(cfg: GrpoConfig, group_size: int) -> dict[str, Any]:
    """Everything that the command prints about one objective."""
    cfg = small(cfg, group_size)
    checks = all_checks(cfg) + stack_checks()
    worlds = {"on_policy": make_world(False, cfg.temperature), "off_policy": make_world(True, cfg.temperature)}
    return {
        "objective": settings_of(cfg),
        "group_size": group_size,
        "gradient": {name: verdict(cfg, world) for name, world in worlds.items()},
        "parts": list(parts(cfg, worlds)),
        "baselines": list(baselines(cfg, worlds["on_policy"])),
        "kl": {name: kl(cfg, world) for name, world in worlds.items()},
        "corrections": list(corrections(cfg, worlds["off_policy"])),
        "checks": [asdict(found) for found in checks],
        "ok": all(found.ok for found in checks),
    }


def table(group_size: int) -> dict[str, Any]:
    """One row for each shipped algorithm: its gradient on-policy and off, and the parts that bias it."""
    return {"group_size": group_size, "algorithms": [table_row(name, group_size) for name in ALGORITHMS]}


def table_row(algorithm: str, group_size: int) -> dict[str, Any]:
    """An algorithm's row of `table`."""
    cfg = small(replace(GrpoConfig(), **ALGORITHMS[algorithm]), group_size)
    worlds = {"on_policy": make_world(False), "off_policy": make_world(True)}
    alone = parts(cfg, {"on_policy": worlds["on_policy"]})
    biased = [part["part"] for part in alone if part["verdict"] == "biased"]
    found = {where: verdict(cfg, world) for where, world in worlds.items()}
    return {"algorithm": algorithm, **found, "biased_by": biased}


def small(cfg: GrpoConfig, group_size: int) -> GrpoConfig:
    """The settings on the enumerated task. Raises `ConfigError` for those that GRPO refuses, too."""
    if not GROUPS[0] <= group_size <= GROUPS[1]:
        raise ConfigError(
            f"--group_size {group_size}: must be from {GROUPS[0]} to {GROUPS[1]}: all groups are enumerated"
        )
    high = cfg.clip_eps_high or cfg.clip_eps
    cfg = replace(cfg, group_size=group_size, rollouts_per_step=group_size, max_new_tokens=LONGEST, clip_eps_high=high)
    grpo.check(cfg)
    return cfg


def settings_of(cfg: GrpoConfig) -> dict[str, Any]:
    """The settings of the objective that differ from the defaults, and its loss."""
    names = {name for settings in ALGORITHMS.values() for name in settings}
    names |= {"old_logprobs", "importance_correction", "importance_cap", "importance_cap_low", "temperature"}
    plain = vars(GrpoConfig(clip_eps_high=cfg.clip_eps))
    changed = {name: value for name, value in vars(cfg).items() if name in names and value != plain[name]}
    return {"algorithm": cfg.algorithm, "loss": cfg.loss, **changed}


def verdict(cfg: GrpoConfig, world: World) -> dict[str, Any]:
    """An objective's gradient against the policy gradient."""
    return _told(compare(cfg, world, moments(cfg, world)))


def _told(found: Against) -> dict[str, Any]:
    figures = {name: value if math.isfinite(value) else None for name, value in asdict(found).items()}
    return {"verdict": found.verdict, **figures}


def parts(cfg: GrpoConfig, worlds: Mapping[str, World]) -> Iterator[dict[str, Any]]:
    """Each part alone, in REINFORCE with a leave-one-out baseline; the loss off-policy, too."""
    plain, world = neutral(cfg), worlds["on_policy"]
    for name in PARTS:
        if getattr(cfg, name) != getattr(plain, name):
            value = getattr(cfg, name)
            row = {"part": name, "setting": "" if value is True else str(value), "where": "on_policy"}
            yield {**row, **verdict(replace(plain, **{name: value}), world)}
    for where, world in worlds.items():
        alone = replace(plain, loss=cfg.loss, old_logprobs=cfg.old_logprobs)
        alone = replace(alone, importance_correction=cfg.importance_correction)
        yield {"part": "loss", "setting": cfg.loss, "where": where, **verdict(alone, world)}


def baselines(cfg: GrpoConfig, world: World) -> Iterator[dict[str, Any]]:
    """The baselines in plain REINFORCE: what each costs in bias and saves in noise."""
    for name in ("none", "group", "leave_one_out"):
        yield {"baseline": name, **verdict(neutral(cfg, baseline=name), world)}


def kl(cfg: GrpoConfig, world: World) -> dict[str, Any]:
    """The gradient of the KL term at `--kl_estimator` beside the exact ones, relative distances."""
    apart = kl_pulls_along(cfg, world)
    nearest = min(apart, key=lambda name: apart[name])
    whole = sequence_kl_gradient(world)
    token = token_kl_gradients(world)["KL(pi || pi_ref)"]
    along = float(token @ whole / token.norm() / whole.norm())
    return {
        "pulls_along": nearest if apart[nearest] < EXACT else "none of these",
        "distances": apart,
        "token_kl_cosine_with_sequence_kl": along,
    }


def corrections(cfg: GrpoConfig, world: World) -> Iterator[dict[str, Any]]:
    """Off-policy, the objective with each importance correction of the trainer's policy over the sampler's."""
    for kind in CORRECTIONS:
        corrected = replace(cfg, old_logprobs="recompute", epochs=1, minibatches=1, importance_correction=kind)
        yield {"correction": kind, **verdict(corrected, world)}
