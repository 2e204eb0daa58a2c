"""torch.compile, layer by layer: they share one graph, so it takes one layer's time whatever the model's depth."""

from __future__ import annotations

from typing import Any

import torch

from grpo_gsm8k import repro
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.trainer.architecture import decoder_layers


def compile_layers(model: Any) -> None:
    """Compile every decoder layer in place, for any number of rows and tokens.

    In place: names and weights stay what they are, and a copy of the model is not compiled. What is outside of the
    layers (embedding, last norm, head) is not touched.

    Raises:
        ConfigError: there is no compiler, or the model has no layers.
    """
    missing = repro.missing_for_compile(model.device.type == "cuda")
    if missing:
        raise ConfigError(f"--compile needs {missing}, which this machine has not: install it, or leave the flag out")
    layers = decoder_layers(model)
    if not layers:
        raise ConfigError(f"--compile: {model.name_or_path} has no decoder layers that are known here; leave it out")
    torch._dynamo.reset()  # eight variants of a function are compiled, and an earlier stage's would count
    for layer in layers:
        layer.compile(dynamic=True)
