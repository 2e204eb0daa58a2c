"""Wraps a user's own sampler, `--engine mine:Sampler`: an exception or a malformed completion becomes one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from grpo_gsm8k.datatypes import Completion, Request, SamplingParams, WeightsRef
from grpo_gsm8k.errors import PluginError
from grpo_gsm8k.plugins import calling

if TYPE_CHECKING:
    import torch


class UserSampler:
    """Implements `datatypes.Sampler` around a user's own."""

    def __init__(self, spec: str, inner: Any) -> None:
        self.what, self.inner = f"engine {spec!r}", inner

    @property
    def busy_s(self) -> float:
        """Seconds of work so far; 0 for a sampler that does not count them."""
        return float(getattr(self.inner, "busy_s", 0.0))

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        """See `datatypes.Sampler`. Raises `PluginError`."""
        with calling(self.what):
            found = [list(group) for group in self.inner.sample(requests, params)]
        asked = [len(request.seeds) for request in requests]
        if [len(group) for group in found] != asked:
            sizes = str([len(group) for group in found])
            raise PluginError(f"{self.what}: returned groups of {sizes[:80]} completions for {str(asked)[:80]} seeds")
        for completion in (one for group in found for one in group):
            if fault := _fault(completion):
                raise PluginError(f"{self.what}: {fault}")
        return found

    def load(self, ref: WeightsRef, tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]] | None = None) -> None:
        """See `datatypes.Sampler`. Raises `PluginError`."""
        with calling(self.what):
            self.inner.load(ref, tensors)


def _fault(completion: Any) -> str:
    """What is wrong with a completion, for a person."""
    if not isinstance(completion, Completion):
        return f"returned {str(completion)[:80]!r}, not a Completion"
    ids, logprobs = completion.token_ids, completion.logprobs
    if not ids or len(ids) != len(logprobs):
        return f"a completion has {len(ids)} ids and {len(logprobs)} log-probabilities"
    if not all(map(math.isfinite, logprobs)):
        return "a log-probability is not finite"
    return ""
