"""The enumerated task: two prompts, three tokens, completions of at most two tokens, a policy that is a table.

There are seven completions of a prompt, so every expectation is a finite sum. Token 1 reads "x" and token 2 "xx", which
makes two spellings of one text; token 0 ends a completion, and what reaches `LONGEST` without it is truncated. The
policy has a row of logits for each prefix, and one for every prefix that no sampled sequence has: a gradient there
shows that something was trained that was not sampled.

Nothing here is a loss. Probabilities, rewards and the true gradients are computed from the table in float64, apart from
the trainer; the log-probabilities of the completions are those of the embedded sampler.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from grpo_gsm8k.datatypes import Datum, Example, FinishReason, Grade, Prompt, SamplingParams, Trajectory
from grpo_gsm8k.engines.hf import draw
from grpo_gsm8k.trainer.batch import make_batch, unshifted
from grpo_gsm8k.trainer.logprobs import plain_logprobs

VOCABULARY = 3
END = 0
TEXT = {END: "", 1: "x", 2: "xx"}
LONGEST = 2
PROMPTS = ((1, 2), (2, 2))
ANSWERS = (2, 1)  # how many x each prompt asks for

Ids = tuple[int, ...]


def _contexts() -> list[Ids]:
    """Every prefix that a token can follow."""
    starts = {prompt[:n] for prompt in PROMPTS for n in range(1, len(prompt))}
    open_ends = [ids for n in range(LONGEST) for ids in itertools.product((1, 2), repeat=n)]
    return sorted(starts) + [prompt + ids for prompt in PROMPTS for ids in open_ends]


CONTEXTS = _contexts()
ROW = {context: row for row, context in enumerate(CONTEXTS)}
ELSEWHERE = len(CONTEXTS)
COMPLETIONS: tuple[Ids, ...] = tuple(
    ids
    for n in range(1, LONGEST + 1)
    for ids in itertools.product(range(VOCABULARY), repeat=n)
    if END not in ids[:-1] and (ids[-1] == END or n == LONGEST)
)


class TablePolicy(nn.Module):
    """A causal language model whose next-token logits are a row of a table, looked up by the whole prefix."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)  # (prefixes, V)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        """Logits `(B, T, V)`, where transformers has them."""
        return SimpleNamespace(logits=self.table[self._rows(input_ids)])

    @property
    def base_model(self) -> Callable[..., Any]:
        """The trunk: here the hidden states are the logits, and the head is the identity."""
        return lambda input_ids, use_cache: SimpleNamespace(last_hidden_state=self.table[self._rows(input_ids)])

    def get_output_embeddings(self) -> Any:
        """The head."""
        return SimpleNamespace(weight=torch.eye(VOCABULARY, dtype=self.table.dtype))

    def _rows(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = [[ROW.get(tuple(ids[: t + 1]), ELSEWHERE) for t in range(len(ids))] for ids in input_ids.tolist()]
        return torch.tensor(rows)


class TableLearner:
    """What `grpo.whole_pass` asks of a learner: log-probabilities of a frozen pass, and of the reference model."""

    def __init__(self, policy: TablePolicy, reference: TablePolicy) -> None:
        self.policy, self.reference = policy, reference
        self._known: dict[Any, tuple[float, ...]] = {}  # few rows stand in many groups

    def logprobs(self, data: Sequence[Datum], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """See `datatypes.Learner`."""
        return self._scored(self.policy, data, temperature)

    def reference_logprobs(self, data: Sequence[Datum], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """See `datatypes.Learner`."""
        return self._scored(self.reference, data, temperature)

    @torch.no_grad()
    def _scored(self, model: TablePolicy, data: Sequence[Datum], temperature: float) -> list[tuple[float, ...]]:
        keys = [(model, temperature, row.token_ids, row.mask) for row in data]
        new = {key: row for key, row in zip(keys, data, strict=True) if key not in self._known}
        if new:
            batch = make_batch(list(new.values()))
            rows = unshifted(plain_logprobs(model, batch, temperature)[0], batch.lengths)
            self._known.update(zip(new, rows, strict=True))
        return [self._known[key] for key in keys]


@dataclass(frozen=True)
class Sampled:
    """A completion that the sampler can draw, its probability, and its reward."""

    trajectory: Trajectory
    probability: float
    grade: Grade


@dataclass(frozen=True, eq=False)
class World:
    """A live policy, the policy that samples, and the reference model.

    Attributes:
        policy: the one whose gradient is taken.
        sampler: the one that draws; the same table where the update is on-policy.
        temperature: of sampling, and of the policy that is optimised.
        sampled_P: of each prompt, every completion.
    """

    policy: TablePolicy
    sampler: TablePolicy
    reference: TablePolicy
    temperature: float
    sampled_P: tuple[tuple[Sampled, ...], ...]

    @functools.cached_property
    def learner(self) -> TableLearner:
        """Scores rows under the live policy and the reference model."""
        return TableLearner(self.policy, self.reference)

    @property
    def mean_length(self) -> float:
        """Mean number of tokens that the sampler draws."""
        return sum(len(s.trajectory.token_ids) * s.probability for group in self.sampled_P for s in group) / len(
            self.sampled_P
        )

    def graded(self, change: Callable[[Grade, Trajectory], Grade]) -> World:
        """The same with other grades."""
        groups = (tuple(replace(s, grade=change(s.grade, s.trajectory)) for s in group) for group in self.sampled_P)
        return replace(self, sampled_P=tuple(groups))


@functools.cache
def make_world(off_policy: bool = False, temperature: float = 1.0, top_p: float = 1.0) -> World:
    """The world of the check; `off_policy`: the sampler's table is another than the live one."""
    draws = torch.Generator().manual_seed(0)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(ELSEWHERE + 1, VOCABULARY, generator=draws, dtype=torch.float64)

    live, stale, first = noise(0.6), noise(0.5), noise(0.5)
    policy, reference = TablePolicy(live), TablePolicy(live + first)
    sampler = TablePolicy(live + stale) if off_policy else policy
    params = SamplingParams(LONGEST, temperature, top_p)
    sampled = (tuple(_enumerated(sampler, k, params)) for k in range(len(PROMPTS)))
    return World(policy, sampler, reference, temperature, tuple(sampled))


def _enumerated(sampler: TablePolicy, k: int, params: SamplingParams) -> Iterator[Sampled]:
    """Every completion of prompt k."""
    prompt = Prompt(Example(f"prompt {k}", "".join(TEXT[i] for i in PROMPTS[k]), str(ANSWERS[k])), PROMPTS[k])
    drawn = {context: logprobs_of_draws(sampler, context, params) for context in CONTEXTS}
    for seed, ids in enumerate(COMPLETIONS):
        contexts = [PROMPTS[k] + ids[:t] for t in range(len(ids))]
        logps = [log_probabilities(sampler.table, c, params.temperature)[i] for c, i in zip(contexts, ids, strict=True)]
        reason: FinishReason = "stop" if ids[-1] == END else "length"
        text = "".join(TEXT[i] for i in ids)
        reported = tuple(drawn[context][i] for context, i in zip(contexts, ids, strict=True))
        trajectory = Trajectory(prompt, ids, (1,) * len(ids), reported, reason, 0, seed, text)
        parts = {"answer": 0.8 * (len(text) == ANSWERS[k]), "format": 0.2 * (reason == "stop")}
        grade = Grade(sum(parts.values()), parts, parts["answer"] > 0, reason == "stop", str(len(text)))
        yield Sampled(trajectory, math.exp(math.fsum(float(logp.detach()) for logp in logps)), grade)


@torch.no_grad()
def logprobs_of_draws(sampler: TablePolicy, context: Ids, params: SamplingParams) -> tuple[float, ...]:
    """The log-probability that the embedded sampler reports with each token, drawn at the middle of its interval.

    A token that it does not draw there, as top-p may have it, keeps its own; `checks.sampler` tells of that.
    """
    exact = log_probabilities(sampler.table, context, params.temperature)
    middles = exact.exp().cumsum(0) - exact.exp() / 2
    logits = sampler.table[ROW[context]].repeat(VOCABULARY, 1)
    chosen, logp = draw(logits, middles, params, torch.empty(VOCABULARY, VOCABULARY))
    found = dict(zip(chosen.tolist(), logp.tolist(), strict=True))
    return tuple(found.get(token, value) for token, value in enumerate(exact.tolist()))


# ----------------------------------------------------------------------------------- the truth, from the table alone


def log_probabilities(table: torch.Tensor, context: Ids, temperature: float) -> torch.Tensor:
    """Of each next token, `(V,)`."""
    return (table[ROW[context]] / temperature).log_softmax(0)


def probability(table: torch.Tensor, prompt: Ids, ids: Ids, temperature: float) -> torch.Tensor:
    """Of a completion, a scalar."""
    steps = [log_probabilities(table, prompt + ids[:t], temperature)[ids[t]] for t in range(len(ids))]
    return torch.stack([*steps, table.new_zeros(())]).sum().exp()  # of nothing it is 1


def gradient_of(value: Callable[[torch.Tensor], torch.Tensor], policy: TablePolicy) -> torch.Tensor:
    """Of a scalar function of the policy's table, flat."""
    table = policy.table.detach().clone().requires_grad_()
    return torch.autograd.grad(value(table), table)[0].flatten()


def policy_gradient(world: World) -> torch.Tensor:
    """The gradient of the mean reward, over the prompts and over what the live policy would sample."""

    def mean_reward(table: torch.Tensor) -> torch.Tensor:
        terms = [
            s.grade.reward * probability(table, prompt, s.trajectory.token_ids, world.temperature)
            for prompt, group in zip(PROMPTS, world.sampled_P, strict=True)
            for s in group
        ]
        return torch.stack(terms).sum() / len(PROMPTS)

    return gradient_of(mean_reward, world.policy)


def token_kl_gradients(world: World) -> dict[str, torch.Tensor]:
    """Gradients of both KLs of the next token, summed over the prefixes that the sampler visits, as often as it does.

    That the policy chose the prefix is left out of them; `sequence_kl_gradient` has it.
    """
    visits = [
        (prompt + ids, float(probability(world.sampler.table.detach(), prompt, ids, world.temperature)) / len(PROMPTS))
        for prompt in PROMPTS
        for ids in [(), *itertools.chain(*(itertools.product((1, 2), repeat=n) for n in range(1, LONGEST)))]
    ]

    def summed(kl: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        reference = world.reference.table.detach()

        def value(table: torch.Tensor) -> torch.Tensor:
            both = [[log_probabilities(t, c, world.temperature) for t in (table, reference)] for c, _ in visits]
            return torch.stack([share * kl(*each) for (_, share), each in zip(visits, both, strict=True)]).sum()

        return gradient_of(value, world.policy)

    return {
        "KL(pi || pi_ref)": summed(lambda p, q: (p.exp() * (p - q)).sum()),
        "KL(pi_ref || pi)": summed(lambda p, q: (q.exp() * (q - p)).sum()),
    }


def sequence_kl_gradient(world: World) -> torch.Tensor:
    """Gradient of KL(pi || pi_ref) between whole completions."""

    def value(table: torch.Tensor) -> torch.Tensor:
        terms = []
        for prompt, ids in itertools.product(PROMPTS, COMPLETIONS):
            p = probability(table, prompt, ids, world.temperature)
            terms.append(p * (p / probability(world.reference.table.detach(), prompt, ids, world.temperature)).log())
        return torch.stack(terms).sum() / len(PROMPTS)

    return gradient_of(value, world.policy)
