"""The losses of the wire: sums over tokens, each a function of the log-probabilities l of the targets.

With q the log-probabilities that the tokens were sampled with, A the advantages, r = exp(l - q) and sg the identity
without a gradient:

    cross_entropy         - sum w l                               w may be negative, or above 1; 1 where not given
    importance_sampling   - sum r A
    ppo                   - sum min(r A, clip(r, low, high) A)    the bounds are those of the ratio, not an epsilon
    cispo                 - sum sg[clip(r, low, high)] l A
    dro                   - sum (l A - beta / 2 (l - q)^2)
    gspo                  as ppo, with r = sg[s] exp(l - sg l), s = exp(mean of l - q over the sequence's mask)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from grpo_gsm8k.serve.jobs import Refusal

Inputs = Mapping[str, torch.Tensor]
PerToken = Callable[[torch.Tensor, Inputs, Mapping[str, float]], torch.Tensor]

CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
NOT_HERE = {
    "stable_reinforce": "it needs what the sampler of the cloud records; use importance_sampling, ppo or cispo",
    "custom": "uploaded losses are not run here; forward_backward_custom of a client works without",
}


@dataclass(frozen=True)
class Loss:
    """A loss by its name.

    Attributes:
        per_token: from log-probabilities `(n,)`, its inputs `(n,)` and settings to each token's loss.
        required, optional: inputs beside the targets.
        config: settings with their defaults.
        carrier: the input where which is 0 a token has no gradient; "" where every token has one.
    """

    per_token: PerToken
    required: tuple[str, ...] = ("logprobs", "advantages")
    optional: tuple[str, ...] = ()
    config: Mapping[str, float] | None = None
    carrier: str = "advantages"

    def settings(self, name: str, sent: Mapping[str, Any]) -> dict[str, float]:
        """The settings of a call. Raises `Refusal` for one that this loss does not have, or that is no number."""
        known = dict(self.config or {})
        for key, value in sent.items():
            if key not in known:
                has = ", ".join(known) or "none"
                raise Refusal(f"{name} has no setting {key!r} (it has: {has})")
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise Refusal(f"{name}: {key} must be a finite number, not {value!r}")
            known[key] = float(value)
        low, high = (known.get(key, 0.0) for key in CLIP)
        if not 0 <= low <= high:
            raise Refusal(
                f"{name}: clip thresholds {low:g} and {high:g}; they are bounds of the ratio, 0 <= low <= high"
            )
        return known

    def check_inputs(self, name: str, given: Mapping[str, Any], where: str) -> None:
        """Raise `Refusal` unless these are the loss's inputs."""
        wanted = {"target_tokens", *self.required}
        if missing := sorted(wanted - given.keys()):
            raise Refusal(f"{where}: {name} needs {', '.join(missing)}")
        if strange := sorted(given.keys() - wanted - set(self.optional)):
            raise Refusal(f"{where}: {name} does not use {', '.join(strange)}")


def _cross_entropy(logp: torch.Tensor, x: Inputs, config: Mapping[str, float]) -> torch.Tensor:
    return -x["weights"] * logp


def _ratio(logp: torch.Tensor, x: Inputs) -> torch.Tensor:
    return (logp - x["logprobs"]).exp()


def _importance_sampling(logp: torch.Tensor, x: Inputs, config: Mapping[str, float]) -> torch.Tensor:
    return -_ratio(logp, x) * x["advantages"]


def _clip(ratio: torch.Tensor, config: Mapping[str, float]) -> torch.Tensor:
    return ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])


def _clipped(ratio: torch.Tensor, x: Inputs, config: Mapping[str, float]) -> torch.Tensor:
    advantages = x["advantages"]
    return -torch.minimum(ratio * advantages, _clip(ratio, config) * advantages)


def _ppo(logp: torch.Tensor, x: Inputs, config: Mapping[str, float]) -> torch.Tensor:
    return _clipped(_ratio(logp, x), x, config)


def _cispo(logp: torch.Tensor, x: Inputs, config: Mapping[str, float]) -> torch.Tensor:
    return -_clip(_ratio(logp.detach(), x), config) * logp * x["advantages"]


def _dro(logp: torch.Tensor, x: Inputs, config: Mapping[str, float]) -> torch.Tensor:
    return -(logp * x["advantages"] - config["beta"] / 2 * (logp - x["logprobs"]).square())


def _gspo(logp: torch.Tensor, x: Inputs, config: Mapping[str, float]) -> torch.Tensor:
    return _clipped(x["sequence_ratio"] * (logp - logp.detach()).exp(), x, config)


def sequence_ratio(logp: torch.Tensor, logprobs: torch.Tensor, mask: torch.Tensor) -> float:
    """GSPO's s of one datum, from all of its log-probabilities."""
    weights = mask.double()
    mean = ((logp - logprobs).double() * weights).sum() / weights.sum().clamp(min=1e-30)
    return float(mean.exp())


LOSSES = {
    "cross_entropy": Loss(_cross_entropy, required=(), optional=("weights",), carrier="weights"),
    "importance_sampling": Loss(_importance_sampling),
    "ppo": Loss(_ppo, config=CLIP),
    "cispo": Loss(_cispo, config={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
    "dro": Loss(_dro, config={"beta": 0.05}, carrier=""),
    "gspo": Loss(_gspo, required=("logprobs", "advantages", "sequence_ratio_mask"), config=CLIP),
}


def find(name: str) -> Loss:
    """The loss of this name. Raises `Refusal` for one that is not served."""
    if name in LOSSES:
        return LOSSES[name]
    why = NOT_HERE.get(name, f"it must be one of {', '.join(LOSSES)}")
    raise Refusal(f"loss_fn {name[:80]!r} is not served: {why}")
