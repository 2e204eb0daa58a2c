"""Samples trajectories: one turn, or several with an environment that answers.

A trajectory starts with a completion of its prompt and continues while its environment answers; without an environment
it has a single turn. Turn k+1 continues the ids of turn k: only the environment's answer is tokenised, and it is
masked.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo_gsm8k.datatypes import Completion, FinishReason, Prompt, Request, Sampler, SamplingParams, Trajectory
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.repro import derive_seed, requests
from grpo_gsm8k.tasks.render import Renderer


def sample_trajectories(
    sampler: Sampler,
    renderer: Renderer,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    n: int = 1,
    seed: int = 0,
    context: int = 0,
) -> list[list[Trajectory]]:
    """Sample `n` trajectories of each prompt.

    Args:
        params: `max_new_tokens` bounds the sampled tokens of a whole trajectory.
        seed: derives, with the example and the sample's index, every sample's seed.
        context: the model's, in tokens; 0 where no trajectory has several turns.
    """
    drawn_P_G = sampler.sample(requests(prompts, n, seed), params)
    found_P_G = [
        [_Conversation(renderer, prompt, completion, params.max_new_tokens, context) for completion in drawn]
        for prompt, drawn in zip(prompts, drawn_P_G, strict=True)
    ]
    waiting = [one for group in found_P_G for one in group]
    while waiting := [one for one in waiting if one.goes_on()]:
        drawn = sampler.sample([one.request() for one in waiting], params)
        for one, (completion,) in zip(waiting, drawn, strict=True):
            one.hear(completion)
    return [[one.trajectory() for one in group] for group in found_P_G]


class _Conversation:
    """A trajectory that is being sampled."""

    def __init__(self, renderer: Renderer, prompt: Prompt, first: Completion, budget: int, context: int) -> None:
        self.renderer, self.task, self.prompt = renderer, renderer.task, prompt
        self.budget, self.context = budget, context
        with self.task.guarded():
            self.env = self.task.env(prompt.example)
        self.turns: list[Completion] = []
        self.ids: tuple[int, ...] = ()
        self.mask: tuple[int, ...] = ()
        self.logprobs: tuple[float, ...] = ()
        self.finish_reason: FinishReason = "stop"
        self.hear(first)

    def hear(self, turn: Completion) -> None:
        """Append a turn of the model, cut at the trajectory's token budget."""
        n = len(turn.token_ids)
        if self.turns:  # the sampler was asked for the budget of a whole trajectory
            n = min(n, self.budget - sum(self.mask))
        self.turns.append(turn)
        self.ids += turn.token_ids[:n]
        self.mask += (1,) * n
        self.logprobs += turn.logprobs[:n]
        self.finish_reason = turn.finish_reason if n == len(turn.token_ids) else "length"

    def goes_on(self) -> bool:
        """Append the environment's answer to the last turn; returns whether the model has another turn."""
        if self.env is None or self.finish_reason != "stop":
            return False
        with self.task.guarded():
            said = self.env.reply(self.turns[-1].text)
        if said is None:
            return False
        if not isinstance(said, str):
            raise ConfigError(f"task {self.task.spec!r}: reply() must return text or None, not {said!r}")
        if len(self.turns) == self.task.max_turns:
            self.finish_reason = "turns"
            return False
        added = self.renderer.reply(self.prompt, self.ids, said)
        whole = len(self.prompt.token_ids) + len(self.ids) + len(added)
        if sum(self.mask) >= self.budget or (self.context and whole >= self.context):
            self.finish_reason = "length"
            return False
        self.ids += added
        self.mask += (0,) * len(added)
        self.logprobs += (0.0,) * len(added)
        return True

    def request(self) -> Request:
        """The request of the next turn: it continues the ids so far, with its own seed."""
        return Request(self.prompt.token_ids + self.ids, (derive_seed(self.turns[0].seed, "turn", len(self.turns)),))

    def trajectory(self) -> Trajectory:
        """All turns as one."""
        first = self.turns[0]
        if len(self.turns) == 1 and self.finish_reason == first.finish_reason:
            return Trajectory.of(self.prompt, first)
        return Trajectory(
            prompt=self.prompt,
            token_ids=self.ids,
            mask=self.mask,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            policy_version=min(turn.policy_version for turn in self.turns),
            seed=first.seed,
            text=self.renderer.decode(self.ids),
            turns=len(self.turns),
        )
