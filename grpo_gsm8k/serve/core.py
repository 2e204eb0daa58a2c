"""The heart of the service: requests are numbered, put on disk, ordered and answered.

The wires (routers of the web application) call `Service` from the event loop and only await; one engine thread owns
torch. Whatever a request needs to be done again after a crash is in the journal before its id is returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo_gsm8k.serve.jobs import Base, Result, SampleJob
from grpo_gsm8k.serve.store import Store


class Service:
    """What the wires stand on. Every coroutine that takes a `key` is idempotent: the same key, the same request."""

    base: Base
    store: Store

    # --------------------------------------------------------------------------------------------- any request

    async def result(self, request_id: str, timeout: float) -> Result | None:
        """How a request ended; None if it has not within `timeout` seconds. Raises `Refusal` 404 for an unknown id."""
        raise NotImplementedError

    async def wait(self, request_id: str) -> Any:
        """The value of a request, however long it takes. Raises `Refusal` with its error where it failed."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------------- sampling

    def resolve(self, name: str) -> str:
        """What `sample` takes for the name that a client uses: the base's name, a `tinker://RUN/sampler_weights/NAME`
        path (or `weights`), or a sampling session's id. Raises `Refusal` 404 for what there is not."""
        raise NotImplementedError

    def sampleable(self) -> list[str]:
        """Every name that can be sampled from: the base's, then the saved paths, newest first."""
        raise NotImplementedError

    async def sample(self, weights: str, job: SampleJob, *, key: str = "") -> str:
        """Accept a job; its request id. Raises `Refusal` for what cannot be sampled."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------------- training

    async def create_session(self, *, metadata: Mapping[str, Any] | None = None, key: str = "") -> str:
        """A session's id."""
        raise NotImplementedError

    async def create_model(
        self, session_id: str, *, rank: int = 32, seed: int | None = None, key: str = "", **more: Any
    ) -> tuple[str, str]:
        """(request id, model id) of a new LoRA adapter on the base, or with rank 0 of its full weights."""
        raise NotImplementedError

    async def forward_backward(
        self,
        model_id: str,
        data: Sequence[Mapping[str, Any]],
        loss_fn: str,
        config: Mapping[str, float] | None = None,
        *,
        key: str = "",
    ) -> str:
        """Add a gradient. A datum is {"tokens": [int], "inputs": {name: [number]}}; the model's next seq_id is taken.

        The value is a `TrainingResult`.
        """
        raise NotImplementedError

    async def optim_step(self, model_id: str, adam: Mapping[str, float], *, key: str = "") -> str:
        """One AdamW step: learning_rate, beta1, beta2, eps, weight_decay, grad_clip_norm."""
        raise NotImplementedError

    async def save_for_sampler(self, model_id: str, name: str = "", *, key: str = "") -> str:
        """A snapshot to sample from: its value has `path` where it is named, else `sampling_session_id`."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------- watching it

    def refuse(self, reason: str, where: str = "") -> None:
        """Write a refusal into the log that the page shows."""
        raise NotImplementedError

    def status(self) -> dict[str, Any]:
        """For the page, /metrics and `serve --status`.

        {"base", "uptime_s", "version", "sessions": {"live", "all"},
         "models": [{"model_id", "rank", "steps", "queued", "resident", "last": {metric: value}, "history": [...]}],
         "queue": {"training", "sampling", "oldest_s"}, "totals": {counter: number}, "samples": [{"weights", "prompt",
         "completion"}], "refusals": [{"time", "where", "reason"}], "disk": {"free", "used"}}
        """
        raise NotImplementedError
