"""The sampler of a training service: requests of ids and seeds go over the wire, completions come back.

Each seed is a request of its own, since the wire seeds a request and not its samples. All of a call are sent at once;
the service decodes them side by side, with those of its other clients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from grpo_gsm8k.datatypes import Completion, FinishReason, Request, SamplingParams, WeightsRef
from grpo_gsm8k.engines.service import Service
from grpo_gsm8k.errors import NonFiniteError, ServiceError
from grpo_gsm8k.tasks.render import Renderer


class RemoteSampler:
    """Implements `datatypes.Sampler` for weights that a training service holds."""

    def __init__(
        self, service: Service, renderer: Renderer, where: str, context: int = 0, ends: Iterable[int] = ()
    ) -> None:
        """It samples from `where` until it is told to `load` other weights.

        Args:
            where: a tinker:// path, or a base model's name at the service.
            context: its longest row in tokens; 0 where that is not known.
            ends: the ids that end a completion, besides the renderer's.
        """
        self.service, self.renderer, self.context = service, renderer, context
        self.stop_ids = renderer.stop_ids | set(ends)
        self.held: WeightsRef | None = None
        self.version, self.busy_s = 0, 0.0
        self._where = where
        self._client: Any = None

    def load(self, ref: WeightsRef, tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]] | None = None) -> None:
        """Sample from what `ref.where` names at the service from now on; free for the weights that it holds."""
        if ref.same_as(self.held):
            return
        assert isinstance(ref.where, str), "a training service samples from weights that it has itself"
        self._where, self._client = ref.where, None
        self.version, self.held = ref.version, ref

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        """A completion for each seed of each request.

        Raises:
            RefusedError, ServiceError: the service refuses, or fails.
        """
        began = time.monotonic()
        if self._client is None:
            self._client = self.service.sampler(self._where)
        pending = [[self._submit(request.token_ids, seed, params) for seed in request.seeds] for request in requests]
        found = [
            [self._drawn(future, seed) for future, seed in zip(futures, request.seeds, strict=True)]
            for futures, request in zip(pending, requests, strict=True)
        ]
        self.busy_s += time.monotonic() - began
        return found

    def _submit(self, token_ids: Sequence[int], seed: int, params: SamplingParams) -> Any:
        sdk, room = self.service.sdk, params.max_new_tokens
        if self.context:
            room = min(room, self.context - len(token_ids))
        how = sdk.SamplingParams(
            max_tokens=room, seed=seed, stop=self._stop(params), temperature=params.temperature, top_p=params.top_p
        )
        prompt = sdk.ModelInput.from_ints(list(token_ids))
        client = self._client
        return self.service.call("sampling", lambda: client.sample(prompt, 1, how))

    def _stop(self, params: SamplingParams) -> list[int] | list[str]:
        """What ends a completion. The wire takes ids or texts: beside texts, the ends of a turn are spelled."""
        ends = sorted(self.stop_ids)
        return [*params.stop, *(self.renderer.spell([end]) for end in ends)] if params.stop else ends

    def _drawn(self, future: Any, seed: int) -> Completion:
        (drawn,) = self.service.call("sampling", future.result).sequences
        token_ids, logprobs = tuple(drawn.tokens), tuple(drawn.logprobs or ())
        if not token_ids or len(logprobs) != len(token_ids) or drawn.stop_reason not in ("stop", "length"):
            raise ServiceError(
                f"{self.service}: a sample of {len(token_ids)} tokens has {len(logprobs)} log-probabilities, and ended "
                f"with {drawn.stop_reason!r}: nothing can be made of it"
            )
        if not all(map(math.isfinite, logprobs)):
            raise NonFiniteError(f"{self.service}: a sample has log-probabilities that are not finite")
        reason: FinishReason = "stop" if drawn.stop_reason == "stop" else "length"
        end = next((at for at, token in enumerate(token_ids, 1) if token in self.stop_ids), None)
        if end is not None:  # a service may take an end of turn for a text among others
            token_ids, logprobs, reason = token_ids[:end], logprobs[:end], "stop"
        return Completion(token_ids, logprobs, self.renderer.decode(token_ids), reason, self.version, seed)
