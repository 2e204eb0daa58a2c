"""The losses. Each is a small dataclass that maps (log-probabilities, batch) to a per-token loss `(B, T)`.

The loss of an update is `sum(batch.weights * per_token_loss)`. The weights (`trainer/data.py`) say how tokens and
responses are averaged, the advantages (`grpo.py`) what a response is credited with, and both are the same for all
losses. So most published algorithms are settings: `config.ALGORITHMS` lists them. To add a loss, write a dataclass
here and enter it in `LOSSES`, or keep it in a file of your own and pass `--loss mine:MyLoss`.

    @dataclass(frozen=True)
    class MyLoss:
        clip_eps: float = 0.2  # filled from the run's config, where it has a field of this name

        def __call__(self, logp, batch):  # (B, T)
            ratio = importance_ratio(logp, batch)
            capped = ratio.clamp(max=1 + self.clip_eps)
            return -torch.minimum(ratio * batch.advantages, capped * batch.advantages)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar

import torch

from grpo_gsm8k import plugins
from grpo_gsm8k.errors import ConfigError, PluginError
from grpo_gsm8k.trainer.batch import Batch
from grpo_gsm8k.trainer.data import MAX_LOG_RATIO, NO_CORRECTION, ImportanceCorrection
from grpo_gsm8k.trainer.head import FusedGrad


class Loss:
    """A per-token loss. The defaults hold for any loss, so that a subclass need only define `__call__`.

    Attributes:
        separable: the loss of a target depends on no other target's log-probability, so the head can form the gradient
            in the forward pass. False is always right, and slower.
        zero_without_advantage: loss and gradient vanish where the advantage is 0, so such rows can be skipped.
        supervised: uses neither advantages nor an old policy, so no metrics of them are logged.
    """

    separable: ClassVar[bool] = False
    zero_without_advantage: ClassVar[bool] = False
    supervised: ClassVar[bool] = False

    def __call__(self, logp: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The loss of each target, `(B, T)`."""
        raise NotImplementedError

    def clipped(self, logp: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a clip acts, above and below: two boolean `(B, T)`, all false for a loss without a clip."""
        nowhere = torch.zeros_like(batch.mask, dtype=torch.bool)
        return nowhere, nowhere


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Negative log-likelihood of the targets."""

    separable: ClassVar[bool] = True
    supervised: ClassVar[bool] = True

    def __call__(self, logp: torch.Tensor, batch: Batch) -> torch.Tensor:
        return -logp


@dataclass(frozen=True)
class Reinforce(Loss):
    """-A log pi (Williams 1992, doi 10.1007/BF00992696). It has no old policy: meant for on-policy updates."""

    separable: ClassVar[bool] = True
    zero_without_advantage: ClassVar[bool] = True

    def __call__(self, logp: torch.Tensor, batch: Batch) -> torch.Tensor:
        return -logp * batch.advantages


@dataclass(frozen=True)
class GrpoClip(Loss):
    """PPO's clipped surrogate with group-relative advantages (arXiv 2402.03300 eq. 3).

    Attributes:
        clip_eps, clip_eps_high: the ratio is clipped to [1 - clip_eps, 1 + clip_eps_high].
        dual_clip: PPO dual-clip bound on the ratio where A < 0 (arXiv 1912.09729 eq. 5); 0 for none.
    """

    clip_eps: float = 0.2
    clip_eps_high: float = 0.2
    dual_clip: float = 0.0

    def __post_init__(self) -> None:
        if self.dual_clip and self.dual_clip <= 1 + self.clip_eps_high:
            raise ConfigError(f"dual_clip = {self.dual_clip} must lie above the clip, 1 + clip_eps_high")

    separable: ClassVar[bool] = True
    zero_without_advantage: ClassVar[bool] = True

    def ratio(self, logp: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The ratio that is clipped, `(B, T)`."""
        return importance_ratio(logp, batch)

    def __call__(self, logp: torch.Tensor, batch: Batch) -> torch.Tensor:
        ratio = self.ratio(logp, batch)
        clipped = ratio.clamp(1 - self.clip_eps, 1 + self.clip_eps_high)
        if self.dual_clip:  # above 1 + clip_eps_high, so it acts for A < 0 alone
            ratio = ratio.clamp(max=self.dual_clip)
        return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)

    def clipped(self, logp: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the clip zeroes the gradient: above its range for A > 0, below it for A < 0."""
        ratio = self.ratio(logp, batch)
        above, below = ratio > 1 + self.clip_eps_high, ratio < 1 - self.clip_eps
        dual = (ratio > self.dual_clip) if self.dual_clip else torch.zeros_like(above)
        good, bad = batch.advantages > 0, batch.advantages < 0
        return (above & good) | (dual & bad), below & bad


@dataclass(frozen=True)
class Gspo(GrpoClip):
    """The clipped surrogate with one ratio for a whole response (arXiv 2507.18071 eq. 5).

    Every token of the response carries it; under the "sequence" aggregation it counts once, as in the paper.
    """

    separable: ClassVar[bool] = False

    def ratio(self, logp: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The geometric mean of the response's ratios."""
        return sequence_ratio(logp, batch)


@dataclass(frozen=True)
class Luspo(Gspo):
    """GSPO times the length of the response (arXiv 2602.05261), for the "sequence" aggregation.

    The mean over a response's tokens makes each token of a long response count less; the length undoes that, so a
    response's loss is the sum over its tokens.
    """

    def __call__(self, logp: torch.Tensor, batch: Batch) -> torch.Tensor:
        return super().__call__(logp, batch) * batch.mask.sum(1, keepdim=True)


@dataclass(frozen=True)
class Cispo(Loss):
    """REINFORCE weighted by the clipped ratio, held fixed: no token loses its gradient (arXiv 2506.13585 eq. 4-5)."""

    clip_eps: float = 1.0
    clip_eps_high: float = 4.0

    separable: ClassVar[bool] = True
    zero_without_advantage: ClassVar[bool] = True

    def __call__(self, logp: torch.Tensor, batch: Batch) -> torch.Tensor:
        weight = importance_ratio(logp, batch).detach().clamp(1 - self.clip_eps, 1 + self.clip_eps_high)
        return -weight * batch.advantages * logp

    def clipped(self, logp: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight is clipped, whatever the advantage."""
        ratio = importance_ratio(logp, batch)
        return ratio > 1 + self.clip_eps_high, ratio < 1 - self.clip_eps


@dataclass(frozen=True)
class Sapo(Loss):
    """A soft gate instead of a clip: -A (4 / tau) sigmoid(tau (r - 1)) (arXiv 2511.20347).

    On-policy its gradient is that of the plain surrogate; away from a ratio of 1 it fades smoothly, the faster the
    larger tau.
    """

    sapo_temperature_pos: float = 1.0  # tau where A > 0
    sapo_temperature_neg: float = 1.05  # tau elsewhere

    def __post_init__(self) -> None:
        for name, tau in vars(self).items():
            if not 0 < tau < math.inf:
                raise ConfigError(f"{name} = {tau} must be above 0")

    separable: ClassVar[bool] = True
    zero_without_advantage: ClassVar[bool] = True

    def __call__(self, logp: torch.Tensor, batch: Batch) -> torch.Tensor:
        tau = torch.where(batch.advantages > 0, self.sapo_temperature_pos, self.sapo_temperature_neg)
        gate = 4 / tau * torch.sigmoid(tau * (importance_ratio(logp, batch) - 1))
        return -gate * batch.advantages


@dataclass(frozen=True)
class Vespo(Loss):
    """REINFORCE weighted by phi(W) = W^k exp(lambda (1 - W)), held fixed (arXiv 2602.10693).

    W is the ratio of the whole response, the product of its tokens' and not their mean. phi(1) = 1; k dampens
    responses that have become unlikely (W < 1), lambda those that have become likely.
    """

    vespo_k_pos: float = 2.0  # where A >= 0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0  # where A < 0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name} = {value} must not be negative")

    zero_without_advantage: ClassVar[bool] = True

    def __call__(self, logp: torch.Tensor, batch: Batch) -> torch.Tensor:
        log_ratio = ((logp - batch.old_logprobs) * batch.mask).detach()
        log_w = log_ratio.sum(1, keepdim=True).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # (B, 1)
        good = batch.advantages >= 0
        k = torch.where(good, self.vespo_k_pos, self.vespo_k_neg)
        lam = torch.where(good, self.vespo_lambda_pos, self.vespo_lambda_neg)
        phi = (k * log_w + lam * (1 - log_w.exp())).exp()
        return -phi * batch.advantages * logp


LOSSES: dict[str, type[Loss]] = {
    "cross_entropy": CrossEntropy,
    "reinforce": Reinforce,
    "grpo_clip": GrpoClip,
    "gspo": Gspo,
    "luspo": Luspo,
    "cispo": Cispo,
    "sapo": Sapo,
    "vespo": Vespo,
}


def make_loss(spec: str, settings: Mapping[str, Any]) -> Loss:
    """The loss that `spec` names, a key of `LOSSES` or `package.module:Class`, with the settings that it declares.

    Args:
        settings: by name; a dataclass takes those that it has fields for, another class none.

    Raises:
        ConfigError: there is no such loss, or the user's own class fails.
    """
    kind = LOSSES.get(spec) or plugins.load_object(spec, "loss", LOSSES)
    if not isinstance(kind, type):
        return UserLoss(spec, kind)
    names = [f.name for f in fields(kind) if f.init] if is_dataclass(kind) else []
    own = {name: settings[name] for name in names if name in settings}
    with plugins.calling(f"loss {spec!r}"):
        loss = kind(**own)
    return loss if spec in LOSSES else UserLoss(spec, loss, own)


def unread_settings(spec: str, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Settings of other losses that were changed from their defaults, though the loss of `spec` does not read them.

    The clip range does not count: recipes set it whatever the loss.
    """
    mine = LOSSES.get(spec) or plugins.load_object(spec, "loss", LOSSES)
    fields_of = {kind: {f.name for f in fields(kind)} for kind in LOSSES.values()}  # type: ignore[arg-type]
    read = {f.name for f in fields(mine)} if is_dataclass(mine) else set[str]()
    others = set().union(*fields_of.values()) - read - {"clip_eps", "clip_eps_high"}
    return sorted(name for name in others if settings[name] != defaults[name])


class UserLoss(Loss):
    """A user's loss: a callable of (logp, batch), with whatever else of `Loss` it defines.

    An exception in it, or a result that is not a `(B, T)` tensor, becomes one line that names the loss.
    """

    def __init__(self, spec: str, inner: Any, settings: Mapping[str, Any] | None = None) -> None:
        self.spec, self.inner, self.settings = spec, inner, dict(settings or {})
        if not callable(inner):
            raise ConfigError(f"loss {spec!r}: a {type(inner).__name__} cannot be called with (logp, batch)")
        for name in ("separable", "zero_without_advantage", "supervised"):
            setattr(self, name, bool(getattr(inner, name, False)))

    def __call__(self, logp: torch.Tensor, batch: Batch) -> torch.Tensor:
        with plugins.calling(f"loss {self.spec!r}", torch.OutOfMemoryError):
            loss = self.inner(logp, batch)
        return self._checked(loss, logp, "the loss")

    def clipped(self, logp: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if not hasattr(self.inner, "clipped"):
            return super().clipped(logp, batch)
        with plugins.calling(f"loss {self.spec!r}", torch.OutOfMemoryError):
            pair = self.inner.clipped(logp, batch)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise PluginError(f"loss {self.spec!r}: clipped() must return two tensors (above, below)")
        above, below = (self._checked(part, logp, "clipped()") for part in pair)
        return above, below

    def __reduce__(self) -> Any:
        return make_loss, (self.spec, self.settings)  # another rank finds the module by its name, as this one did

    def _checked(self, found: Any, logp: torch.Tensor, what: str) -> torch.Tensor:
        if not isinstance(found, torch.Tensor) or found.shape != logp.shape:
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
            raise PluginError(f"loss {self.spec!r}: {what} is {shape}, must be a tensor like logp, {tuple(logp.shape)}")
        return found


def importance_ratio(logp: torch.Tensor, batch: Batch) -> torch.Tensor:
    """pi / pi_old of each target, `(B, T)`; 1 where masked out."""
    return ((logp - batch.old_logprobs) * batch.mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_ratio(logp: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Geometric mean of a response's ratios, at each of its targets, `(B, T)`; 1 where masked out.

    A row is never split between microbatches, so every token of the response is here.
    """
    log_ratio = ((logp - batch.old_logprobs) * batch.mask).sum(1, keepdim=True)  # (B, 1)
    mean = log_ratio / batch.mask.sum(1, keepdim=True).clamp(min=1)
    return (mean * batch.mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


# ------------------------------------------------------------------------------------------ the loss of an update


@dataclass(frozen=True)
class Objective:
    """What an update minimises: a per-token loss, the terms added to it, and the old policy that it refers to.

    Attributes:
        loss: the per-token loss.
        temperature: of sampling; log-probabilities are those of softmax(logits / temperature).
        kl_coef: weight of the KL to the reference model; 0 for none.
        kl_estimator, kl_bias_correction: see `kl_to_reference`.
        on_policy: the old policy is the live one, held fixed, as in a step's only update. Its log-probabilities need no
            frozen pass; those of the batch are the sampler's.
        correction: with `on_policy`, the importance weight of the old policy over the sampler.
        entropy_coef: weight of the entropy bonus, the entropy of the policy's distribution at each target; 0 for none.
    """

    loss: Loss = field(default_factory=CrossEntropy)
    temperature: float = 1.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_bias_correction: bool = True
    on_policy: bool = False
    correction: ImportanceCorrection = NO_CORRECTION
    entropy_coef: float = 0.0

    @property
    def separable(self) -> bool:
        """Whether the gradient at a target follows from its own log-probability."""
        return self.loss.separable and (self.correction.separable or not self.on_policy)


def update_loss(
    logp: torch.Tensor, batch: Batch, objective: Objective, entropy: torch.Tensor | None = None
) -> torch.Tensor:
    """What is minimised: the weighted sum over all targets of the batch, a scalar.

    Args:
        logp: `(B, T)`, of the targets.
        entropy: `(B, T)`, of the distributions that they are from; the entropy bonus needs it.
    """
    batch = with_old_policy(batch, logp, objective)
    return (batch.weights * per_token_loss(logp, batch, objective, entropy)).sum()


def per_token_loss(
    logp: torch.Tensor, batch: Batch, objective: Objective, entropy: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss, its KL term and its entropy bonus, `(B, T)`."""
    loss = objective.loss(logp, batch)
    if objective.kl_coef:
        loss = loss + objective.kl_coef * kl_to_reference(logp, batch, objective)
    if objective.entropy_coef:
        assert entropy is not None, "the entropy bonus needs the entropies"
        loss = loss - objective.entropy_coef * entropy
    return loss


def with_old_policy(batch: Batch, logp: torch.Tensor, objective: Objective) -> Batch:
    """The batch with the old log-probabilities and the corrected weights that the objective calls for."""
    if not objective.on_policy:
        return batch
    old = logp.detach()
    return replace(batch, old_logprobs=old * batch.mask, weights=objective.correction.apply(batch, old))


def rows_to_train(batch: Batch, objective: Objective) -> list[int]:
    """The rows of an update that can have a gradient.

    A loss that is proportional to the advantage has no gradient where the advantage is 0, unless a KL term or an
    entropy bonus is added. If no row has a gradient, the shortest one is kept: the optimizer then steps with a gradient
    of zero, as it would have, and there are metrics to log.
    """
    share = batch.weights
    if objective.loss.zero_without_advantage and not (objective.kl_coef or objective.entropy_coef):
        share = share * batch.advantages
    rows = share.abs().sum(1).ne(0).nonzero().flatten().tolist()  # NaN counts as nonzero
    return rows or sorted(batch.rows_with_targets(), key=lambda row: batch.lengths[row])[:1]


def fused_grad(batch: Batch, objective: Objective) -> FusedGrad | None:
    """The derivative of `update_loss` in the log-probabilities of any slice of the batch's trained targets.

    The head calls it chunk by chunk, to form its gradient in the forward pass (`trainer/head.py`). None if a target's
    loss depends on other targets.
    """
    if not objective.separable:
        return None
    trained = batch.trained_targets()

    def derivatives(logp: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.enable_grad():
            leaf = logp.detach().unsqueeze(0).requires_grad_()
            if not objective.entropy_coef:
                loss = update_loss(leaf, trained.columns(part), objective)
                return torch.autograd.grad(loss, leaf)[0].squeeze(0), None
            entropy = torch.zeros_like(leaf).requires_grad_()  # enters linearly: any value gives its derivative
            loss = update_loss(leaf, trained.columns(part), objective, entropy)
            dlogp, dentropy = torch.autograd.grad(loss, (leaf, entropy))
            return dlogp.squeeze(0), dentropy.squeeze(0)

    return derivatives


KL_ESTIMATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(-d) + d,
}


def kl_to_reference(logp: torch.Tensor, batch: Batch, objective: Objective) -> torch.Tensor:
    """The KL term of each target, `(B, T)`; its expectation has the gradient of KL(pi || pi_ref).

    With d = log pi - log pi_ref the estimators are k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d
    (http://joschu.net/blog/kl-approx.html). An estimator of the KL's value is not one of its gradient
    (arXiv 2512.21852, trl#4967). Expected gradients as a loss, with r = pi / pi_old:

        estimator   alone, on-policy       times r (with gradient)     times r (held fixed)
        k1          0: no KL at all        KL(pi || pi_ref)            0
        k2          KL(pi || pi_ref)       biased                      KL(pi || pi_ref)
        k3          KL(pi_ref || pi)       KL(pi || pi_ref)            KL(pi_ref || pi)

    "Alone" is also off by the ratio once the policy has moved away from the one that sampled; the other two columns
    are not. So k1 and k3 are multiplied by r, and k2 by r held fixed. Per sample, the gradient is then r d times that
    of log pi for k2 and k3, and r (d + 1) times it for k1, whose 1 adds noise of mean 0. `kl_bias_correction=False`
    leaves the estimator alone, as arXiv 2402.03300 eq. 4 has it. The KL is that of each next token; the gradient leaves
    out that the policy also chose the prefix, as other trainers do. `objective check` measures both.
    """
    d = ((logp - batch.ref_logprobs) * batch.mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    kl = KL_ESTIMATORS[objective.kl_estimator](d)
    if not objective.kl_bias_correction:
        return kl
    ratio = importance_ratio(logp, batch)
    return kl * (ratio.detach() if objective.kl_estimator == "k2" else ratio)
