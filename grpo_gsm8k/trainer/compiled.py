"""torch.compile, layer by layer: they share one graph, so it takes one layer's time whatever the model's depth.

Measured on an H200, 1.5B, 100k tokens: with rows packed 51 % of the peak, without 33 %, after 20 s of compiling; rows
that are padded come in shapes of which some are compiled anew, and are better left alone (artifacts/RESULTS.md).
"""

from __future__ import annotations

from typing import Any

import torch

from grpo_gsm8k import repro
from grpo_gsm8k.config import TrainConfig
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.runs.progress import talk
from grpo_gsm8k.trainer import packing
from grpo_gsm8k.trainer.architecture import context_length, decoder_layers

LEAST_PARAMETERS = 100_000_000  # below it an update takes so little that half a minute never comes back: a guess
WARM_ROWS, WARM_LENGTH = 8, 256  # of the rows that are compiled for first


def compiles(model: Any, cfg: TrainConfig, packs: bool, ranks: int) -> bool:
    """Compile the model's layers where the config asks for it, or leaves it open and it is worth it; whether they are.

    Left open, a model whose compiled layers give other numbers, or none, stays as it is, with a line why.

    Raises:
        ConfigError: it is asked for, and there is no compiler, or the model has no layers.
    """
    if cfg.compile == "on":
        compile_layers(model)
        return True
    worth = packs and packing.reads_varlen(model) and sum(p.numel() for p in model.parameters()) >= LEAST_PARAMETERS
    if cfg.compile == "off" or cfg.deterministic or ranks > 1 or not worth:
        return False
    if repro.missing_for_compile(gpu=True) or not decoder_layers(model):
        return False
    if fault := _fault_of_compiling(model):
        for layer in decoder_layers(model):
            layer._compiled_call_impl = None
        talk(f"layers are not compiled: {fault}")
        return False
    return True


def compile_layers(model: Any) -> None:
    """Compile every decoder layer in place, for any number of rows and tokens.

    In place: names and weights stay what they are, and a copy of the model is not compiled. What is outside of the
    layers (embedding, last norm, head) is not touched.

    Raises:
        ConfigError: there is no compiler, or the model has no layers.
    """
    missing = repro.missing_for_compile(model.device.type == "cuda")
    if missing:
        raise ConfigError(f"--compile needs {missing}, which this machine has not: install it, or pass --compile off")
    layers = decoder_layers(model)
    if not layers:
        raise ConfigError(f"--compile: {model.name_or_path} has no decoder layers that are known here; leave it out")
    torch._dynamo.reset()  # eight variants of a function are compiled, and an earlier stage's would count
    for layer in layers:
        layer.compile(dynamic=True)


def _fault_of_compiling(model: Any) -> str:
    """Compile; what differs then in the last hidden states of packed rows and a weight's gradient, or fails."""
    expected = _hidden_and_gradient(model)
    compile_layers(model)
    try:
        found = _hidden_and_gradient(model)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, OSError) as refusal:
        return " ".join(f"{type(refusal).__name__}: {refusal}".split())[:200]
    apart = max(
        float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-9))
        for a, b in zip(found, expected, strict=True)
    )
    limit = 1e-3 if model.dtype == torch.float32 else 0.25  # of two roundings of every layer; another function is at 1
    return "" if apart <= limit else f"numbers differ by {apart:.2g}"


def _hidden_and_gradient(model: Any) -> list[torch.Tensor]:
    """Of rows about as long as those to come: the compiler chooses its kernels by the first sizes that it meets."""
    weight = next(p for p in decoder_layers(model)[0].parameters() if p.requires_grad)
    length, vocabulary = min(WARM_LENGTH, context_length(model.config)), model.config.get_text_config().vocab_size
    ids = [
        [(7 * i + 3 * (row + 1) * (i >= length // 8)) % vocabulary for i in range(length)] for row in range(WARM_ROWS)
    ]
    with torch.enable_grad():
        hidden = packing.last_hidden_states(model, packing.packed_batch(ids).to(model.device))
        (gradient,) = torch.autograd.grad(hidden.float().square().mean(), weight)
    return [hidden.detach(), gradient]
