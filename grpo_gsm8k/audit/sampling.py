"""The completions of a step sampled again with the embedded sampler, from the weights that sampled them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_gsm8k.audit.again import Again
from grpo_gsm8k.datatypes import Prompt, SamplingParams, Trajectory
from grpo_gsm8k.engines.trajectories import sample_trajectories
from grpo_gsm8k.repro import derive_seed, requests
from grpo_gsm8k.rollout import prompt_at
from grpo_gsm8k.runs.rollouts import Stored

LOGPROB_TOLERANCE = 1e-3  # another processor's sums, in float32; see `engines.probe.TOLERANCE`


@dataclass(frozen=True)
class Drawn:
    """What came out.

    Attributes:
        same: completions that are those of the run, ids and log-probabilities bit for bit; of `of`.
        apart: the largest difference of log-probabilities up to where two completions part.
        first: the first completion that differs, and where, in words.
        unmatched: groups whose seeds are not the run's.
    """

    same: int
    of: int
    apart: float
    first: str
    unmatched: int


def draw_again(again: Again, stored: Stored) -> Drawn:
    """Sample the prompts of a step again. The learner stands at the version of weights that sampled them."""
    cfg, waiting = again.cfg, [[one.trajectory for one in group] for group in stored.groups]
    sampler, seeds = again.sampler(), _seeds(again, stored.step)
    params = SamplingParams(cfg.max_new_tokens, cfg.temperature, cfg.top_p, again.renderer.stop)
    how = {"n": len(waiting[0]), "context": again.bench.context}
    pairs = list[tuple[Trajectory, Trajectory]]()
    for seed in seeds:
        mine = waiting if len(seeds) == 1 else [group for group in waiting if _is_of(group, seed)]
        waiting = [group for group in waiting if not any(group is one for one in mine)]
        prompts = [group[0].prompt for group in mine]
        drawn = sample_trajectories(sampler, again.renderer, prompts, params, seed=seed, **how) if mine else []
        pairs += [pair for then, now in zip(mine, drawn, strict=True) for pair in zip(then, now, strict=True)]
    differ = [(k, then, now) for k, (then, now) in enumerate(pairs) if then != now]
    first = _where(*differ[0]) if differ else ""
    apart = max((_apart(then, now) for _, then, now in differ), default=0.0)
    return Drawn(len(pairs) - len(differ), len(pairs), apart, first, len(waiting))


def strange_prompt(again: Again, stored: Stored) -> str:
    """How the prompts of a step are not those that the run's seed asks for; "" where they are, or cannot be told.

    They are told where every step takes the next prompts of the shuffled stream, and only those.
    """
    cfg, prompts = again.cfg, [group[0].trajectory.prompt for group in stored.groups]
    for prompt in prompts:
        if again.renderer.prompt(again.examples[prompt.example.id]).token_ids != prompt.token_ids:
            return f"example {prompt.example.id} renders to other ids than those that were sampled from"
    plain = (
        again.run.stage == "grpo" and not cfg.resample_zero_variance and getattr(cfg, "curriculum", "none") == "none"
    )
    if not plain:
        return ""
    every, first = list(again.examples), (stored.step - 1) * len(prompts)
    asked = [prompt_at(_as_prompts(every), first + i, cfg.seed).example.id for i in range(len(prompts))]
    differ = [i for i, prompt in enumerate(prompts) if prompt.example.id != asked[i]]
    return (
        f"prompt {differ[0]} is {prompts[differ[0]].example.id}, the seed asks for {asked[differ[0]]}" if differ else ""
    )


def _as_prompts(ids: Sequence[str]) -> list[Prompt]:
    from grpo_gsm8k.datatypes import Example

    return [Prompt(Example(id, ""), ()) for id in ids]


def _seeds(again: Again, step: int) -> list[int]:
    """The seeds of a step's requests: one for each time that groups may have been replaced."""
    cfg = again.cfg
    if again.run.stage == "ei":
        return [derive_seed(cfg.seed, "ei-sample", (step - 1) // cfg.steps_per_round)]
    return [derive_seed(cfg.seed, "grpo", step, attempt) for attempt in range(cfg.resample_zero_variance + 1)]


def _is_of(group: Sequence[Trajectory], seed: int) -> bool:
    """Whether the completions of a group have the seeds of this attempt."""
    (asked,) = requests([group[0].prompt], len(group), seed)
    return asked.seeds == tuple(one.seed for one in group)


def _common(then: Trajectory, now: Trajectory) -> int:
    """Tokens before two completions part."""
    pairs = zip(then.token_ids, now.token_ids, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(then.token_ids), len(now.token_ids)))


def _apart(then: Trajectory, now: Trajectory) -> float:
    n = _common(then, now)
    return max((abs(a - b) for a, b in zip(then.logprobs[:n], now.logprobs[:n], strict=True)), default=0.0)


def _where(number: int, then: Trajectory, now: Trajectory) -> str:
    at = _common(then, now)
    if at == len(then.token_ids) == len(now.token_ids):
        parts = [name for name, value in vars(then).items() if value != getattr(now, name)]
        return f"completion {number} has the same ids and another {parts[0]}"
    return f"completion {number} differs from its token {at} on"
