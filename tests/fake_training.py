"""A training client whose model is a table of logits, with the losses of the Tinker wire written a second time.

`FakeService` stands where `engines.service.Service` does; its models are `Table`s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

Inputs = Mapping[str, torch.Tensor]


def _r(logp: torch.Tensor, x: Inputs) -> torch.Tensor:
    return (logp - x["logprobs"]).exp()


def _ppo(ratio: torch.Tensor, x: Inputs, low: float, high: float) -> torch.Tensor:
    a = x["advantages"]
    return -torch.minimum(ratio * a, ratio.clamp(low, high) * a)


def _gspo(logp: torch.Tensor, x: Inputs, low: float, high: float) -> torch.Tensor:
    mask = x["sequence_ratio_mask"]
    whole = (((logp - x["logprobs"]) * mask).sum() / mask.sum()).exp().detach()
    return _ppo(whole * (logp - logp.detach()).exp(), x, low, high)


LOSSES: dict[str, tuple[Callable[..., torch.Tensor], tuple[float, ...], set[str]]] = {
    "cross_entropy": (lambda logp, x: -x["weights"] * logp, (), {"weights"}),
    "importance_sampling": (lambda logp, x: -_r(logp, x) * x["advantages"], (), {"logprobs", "advantages"}),
    "ppo": (lambda logp, x, low, high: _ppo(_r(logp, x), x, low, high), (0.8, 1.2), {"logprobs", "advantages"}),
    "cispo": (
        lambda logp, x, low, high: -_r(logp, x).detach().clamp(low, high) * logp * x["advantages"],
        (0.0, 4.0),
        {"logprobs", "advantages"},
    ),
    "gspo": (_gspo, (0.8, 1.2), {"logprobs", "advantages", "sequence_ratio_mask"}),
}
"""Name → the loss of each token, the default bounds of its clip, its inputs beside the targets."""


class Future:
    def __init__(self, value: Any) -> None:
        self.value = value

    def result(self) -> Any:
        return self.value


class Array:
    def __init__(self, values: Any) -> None:
        self.values = values

    def to_numpy(self) -> Any:
        return self.values


class Table:
    """Implements what `RemoteLearner` asks of a training client. `sent` names the losses of its backward passes."""

    def __init__(self, logits: torch.Tensor, number: int = 0) -> None:
        self.logits = logits.clone().double().requires_grad_()
        self.sent: list[str] = []
        self.model_id, self.steps = f"run{number}", 0

    def forward(self, data: Sequence[Any], loss_fn: str, loss_fn_config: Any = None) -> Future:
        with torch.no_grad():
            return Future(self._pass(data, loss_fn, loss_fn_config)[1])

    def forward_backward(self, data: Sequence[Any], loss_fn: str, loss_fn_config: Any = None) -> Future:
        loss, outputs = self._pass(data, loss_fn, loss_fn_config)
        loss.backward()
        self.sent.append(loss_fn)
        return Future(outputs)

    def _pass(self, data: Sequence[Any], name: str, config: Any) -> tuple[torch.Tensor, Any]:
        per_token, bounds, wanted = LOSSES[name]
        if config:
            assert config.keys() == {"clip_low_threshold", "clip_high_threshold"}
            bounds = (config["clip_low_threshold"], config["clip_high_threshold"])
            assert 0 <= bounds[0] <= bounds[1]
        total, outputs = torch.zeros((), dtype=torch.float64), []
        for row in data:
            given = dict(row.loss_fn_inputs)
            targets = torch.as_tensor(given.pop("target_tokens"))
            assert given.keys() == wanted and {len(values) for values in given.values()} == {len(row.tokens)}
            inputs = {key: torch.as_tensor(values).double() for key, values in given.items()}
            logp = self.logits[torch.as_tensor(row.tokens)].log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
            total = total + per_token(logp, inputs, *bounds).sum()
            outputs.append({"logprobs": Array(logp.detach().float().numpy())})
        return total, SimpleNamespace(loss_fn_outputs=outputs, metrics={"loss:sum": float(total.detach())})

    def optim_step(self, adam: Any) -> Future:
        self.steps += 1
        self.adam = adam
        return Future(SimpleNamespace(metrics={"grad_norm": 1.5, "step": 1.0}))

    def save_state(self, name: str, **more: Any) -> Future:
        return Future(SimpleNamespace(path=f"tinker://{self.model_id}/weights/{name}"))

    def save_weights_for_sampler(self, name: str, **more: Any) -> Future:
        return Future(SimpleNamespace(path=f"tinker://{self.model_id}/sampler_weights/{name}"))


class FakeService:
    """Implements what `RemoteLearner` asks of a service."""

    sdk = SimpleNamespace(AdamParams=SimpleNamespace)
    address = "http://127.0.0.1:1"

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
        self.made: list[Any] = []
        self.deleted: list[str] = []

    def create(self, base_model: str, rank: int, seed: int) -> Table:
        self.made.append((base_model, rank, seed))
        return Table(self.logits, len(self.made))

    def restore(self, path: str, optimizer: bool) -> Table:
        self.made.append((path, optimizer))
        return Table(self.logits, len(self.made))

    def snapshot(self, training: Table, name: str) -> str:
        return name

    def delete(self, path: str) -> None:
        self.deleted.append(path)

    def recorded_sha256(self, path: str) -> str:
        return ""

    def datum(self, tokens: Sequence[int], inputs: Mapping[str, Any]) -> Any:
        assert all(isinstance(values, np.ndarray) and values.ndim == 1 for values in inputs.values())
        return SimpleNamespace(tokens=list(tokens), loss_fn_inputs=inputs)

    def call(self, doing: str, request: Callable[[], Any]) -> Any:
        return request()
