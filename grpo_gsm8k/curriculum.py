"""Which prompts a step samples: `--curriculum none | target:T`.

none       each prompt once per epoch, in a shuffled order (`rollout.prompt_at`)
target:T   prompts whose solve rate is estimated near T are drawn more often, so that fewer groups have equal rewards

A group of equal rewards has no advantages: its G completions are sampled for nothing. For `target:T` each prompt has a
Beta posterior of its solve rate: right and wrong completions so far, each halved every `--curriculum_half_life` steps
since the policy moves on, over a prior of the strength of two completions whose mean is that of all prompts. (MoPPS,
arXiv 2507.04632, has such a posterior, too, and picks by Thompson sampling.) A prompt is drawn in proportion to

    E[p^(cT) (1 - p)^(c(1-T))],  c = SHARPNESS: a bump at p = T, in closed form for a Beta

and a tenth of the draws are uniform. A step's prompts are distinct (systematic sampling), so each has a known
probability pi of being in the step. The objective becomes that of the drawn prompts; with `--curriculum_unbiased` each
group counts (n / N) / pi, Horvitz and Thompson's weight, and the expected gradient is again that of uniform prompts.

No torch in here. The state is a few numbers for each prompt that was sampled, and is stored with a checkpoint.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import accumulate

from grpo_gsm8k.config import GrpoConfig
from grpo_gsm8k.datatypes import Prompt, Rollout
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.repro import derive_seed, shuffled

SHARPNESS = 8.0  # for T = 0.5, prompts that are surely solved 9 times in 10 are drawn 1 / 60 as often as those at 0.5
PRIOR = 2.0  # completions that the prior counts as
FLOOR = 0.1  # share of uniform draws; an importance weight is 1 / FLOOR at most

Outcomes = Mapping[str, tuple[float, int]]
"""Example id → right completions (or the sum of rewards in [0, 1]), and all."""
Evidence = Mapping[str, tuple[float, float, int]]
"""Example id → right, wrong, and the step at which they were counted; they decay from there on."""


def target_of(spec: str) -> float | None:
    """The solve rate that `--curriculum` aims at; None for `none`. Raises `ConfigError` for anything else."""
    kind, _, value = spec.partition(":")
    if spec == "none":
        return None
    try:
        target = float(value) if kind == "target" else math.nan
    except ValueError:
        target = math.nan
    if not 0 < target < 1:
        raise ConfigError(f"curriculum = {spec!r}: must be none, or target:T with a solve rate T between 0 and 1")
    return target


def check(cfg: GrpoConfig) -> None:
    """Refuse settings that contradict each other. Raises `ConfigError`."""
    target = target_of(cfg.curriculum)
    if cfg.curriculum_unbiased and target is None:
        raise ConfigError("curriculum_unbiased: prompts are uniform with --curriculum none; leave it out")
    if cfg.curriculum_unbiased and cfg.resample_zero_variance:
        raise ConfigError("curriculum_unbiased with resample_zero_variance: replaced groups bias it; leave one out")


def outcomes_of(groups: Sequence[Sequence[Rollout]], by_reward: bool = False) -> dict[str, tuple[float, int]]:
    """How often each prompt was solved.

    Args:
        by_reward: the reward counts instead, cut to [0, 1]: where it is the user's own, or no answer is right.
    """
    found: dict[str, tuple[float, int]] = {}
    for group in groups:
        for rollout in group:
            grade, id_ = rollout.grade, rollout.trajectory.prompt.example.id
            graded = grade.correct is not None and not by_reward
            solved = float(bool(grade.correct)) if graded else min(max(grade.reward, 0.0), 1.0)
            right, n = found.get(id_, (0.0, 0))
            found[id_] = right + solved, n + 1
    return found


class Curriculum:
    """Draws prompts near a target solve rate. `evidence` is its whole state, and is replaced, never changed."""

    def __init__(self, cfg: GrpoConfig, prompts: Sequence[Prompt]) -> None:
        """
        Raises:
            ConfigError: a step takes more prompts than there are.
        """
        target = target_of(cfg.curriculum)
        assert target is not None
        wanted = cfg.rollouts_per_step // cfg.group_size
        if wanted > len(prompts):
            raise ConfigError(f"--curriculum {cfg.curriculum}: a step takes {wanted} prompts, there are {len(prompts)}")
        self.cfg, self.prompts, self.target = cfg, prompts, target
        self.evidence: Evidence = {}

    def draw(self, n: int, step: int, attempt: int = 0) -> list[tuple[Prompt, float]]:
        """`n` distinct prompts, each with the weight of its group: 1, unless `--curriculum_unbiased`."""
        inclusion = inclusion_probabilities(self._shares(step), n)
        seed = derive_seed(self.cfg.seed, "curriculum", step, attempt)
        picked = systematic(inclusion, n, seed)
        share = n / len(self.prompts)
        return [(self.prompts[i], share / inclusion[i] if self.cfg.curriculum_unbiased else 1.0) for i in picked]

    def observe(self, outcomes: Outcomes, step: int) -> None:
        """Count what a step has found."""
        fresh = dict(self.evidence)
        for id_, (right, n) in outcomes.items():
            before = self._decayed(id_, step)
            fresh[id_] = before[0] + right, before[1] + n - right, step
        self.evidence = fresh

    def metrics(self, outcomes: Outcomes, step: int) -> dict[str, float]:
        """What was expected of a step's prompts before they were sampled, and how far off that was."""
        prior = self._prior(step)
        pairs = [(self._rate(id_, step, prior), right / n) for id_, (right, n) in outcomes.items()]
        return {
            "curriculum/expected_rate": sum(expected for expected, _ in pairs) / len(pairs),
            "curriculum/rate_error": sum(abs(expected - found) for expected, found in pairs) / len(pairs),
            "curriculum/seen_frac": len(self.evidence) / len(self.prompts),
        }

    def _decayed(self, id_: str, step: int) -> tuple[float, float]:
        right, wrong, then = self.evidence.get(id_, (0.0, 0.0, step))
        kept = 0.5 ** ((step - then) / self.cfg.curriculum_half_life)
        return right * kept, wrong * kept

    def _prior(self, step: int) -> tuple[float, float]:
        """Right and wrong completions that a prompt without evidence counts as having."""
        sums = [self._decayed(id_, step) for id_ in self.evidence]
        right, wrong = 1 + sum(r for r, _ in sums), 1 + sum(w for _, w in sums)
        return PRIOR * right / (right + wrong), PRIOR * wrong / (right + wrong)

    def _rate(self, id_: str, step: int, prior: tuple[float, float]) -> float:
        right, wrong = (count + of_all for count, of_all in zip(self._decayed(id_, step), prior, strict=True))
        return right / (right + wrong)

    def _shares(self, step: int) -> list[float]:
        """The share of the draws that each prompt would have if prompts could repeat."""
        prior = self._prior(step)
        unseen, values = self._bump(*prior), []
        for prompt in self.prompts:
            id_ = prompt.example.id
            right, wrong = self._decayed(id_, step)
            values.append(self._bump(right + prior[0], wrong + prior[1]) if id_ in self.evidence else unseen)
        whole = sum(values)
        return [(1 - FLOOR) * value / whole + FLOOR / len(values) for value in values]

    def _bump(self, right: float, wrong: float) -> float:
        """E[p^(cT) (1 - p)^(c(1-T))] of a Beta(right, wrong)."""
        more, less = SHARPNESS * self.target, SHARPNESS * (1 - self.target)
        return math.exp(_log_beta(right + more, wrong + less) - _log_beta(right, wrong))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def inclusion_probabilities(shares: Sequence[float], n: int) -> list[float]:
    """n times each share, none above 1: what is cut off goes to the others, in proportion."""
    certain: set[int] = set()
    while True:
        rest = sum(share for i, share in enumerate(shares) if i not in certain)
        scale = (n - len(certain)) / rest if rest else 0.0
        above = {i for i, share in enumerate(shares) if i not in certain and scale * share >= 1}
        if not above:
            return [1.0 if i in certain else scale * share for i, share in enumerate(shares)]
        certain |= above


def systematic(inclusion: Sequence[float], n: int, seed: int) -> list[int]:
    """`n` distinct indices, each with its inclusion probability: equally spaced marks on their sum, in random order."""
    order = shuffled(len(inclusion), seed)
    start, picked = random.Random(seed).random(), list[int]()
    for i, end in zip(order, accumulate(inclusion[i] for i in order), strict=True):
        if len(picked) < n and end > start + len(picked):
            picked.append(i)
    if len(picked) < n:  # the sum is n but for rounding, and the last mark lay behind it
        picked.append(next(i for i in reversed(order) if i not in picked))
    return picked
