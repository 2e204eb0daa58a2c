"""Applies torch.compile per layer: the layers share one graph, so compiling takes the time of one layer.

Measured on an H200, 1.5B, 100k tokens: 51 % of the peak with packed rows, 33 % without, after 20 s of compiling. Padded
rows have many shapes, some of which recompile, so they are not compiled by default (artifacts/RESULTS.md).
"""

from __future__ import annotations

from typing import Any

import torch

from grpo_gsm8k import repro
from grpo_gsm8k.config import TrainConfig
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.trainer import packing
from grpo_gsm8k.trainer.architecture import context_length, decoder_layers

LEAST_PARAMETERS = 100_000_000  # smaller models never win back half a minute of compiling: a guess
WARM_ROWS, WARM_LENGTH = 8, 256  # of the rows that are compiled for first


def compiles(model: Any, cfg: TrainConfig, packs: bool, ranks: int) -> bool:
    """Compile the layers if configured, or on `auto` if it pays off; returns whether they are compiled.

    On `auto`, a model whose compiled layers fail or give other numbers stays uncompiled; a line says why.

    Raises:
        ConfigError: `--compile on` without a compiler, or with a model without known layers.
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
        say(f"layers are not compiled: {fault}")
        return False
    return True


def compile_layers(model: Any) -> None:
    """Compile every decoder layer in place, for any number of rows and tokens.

    In place: names and weights stay, and a copy of the model is not compiled. Embedding, last norm and head are not
    compiled.

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
    """Compile, and compare hidden states and a gradient on packed rows; returns what differs or fails, else ""."""
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
    """Rows of about the expected length, since the compiler chooses kernels by the first sizes that it sees."""
    weight = next(p for p in decoder_layers(model)[0].parameters() if p.requires_grad)
    length, vocabulary = min(WARM_LENGTH, context_length(model.config)), model.config.get_text_config().vocab_size
    ids = [
        [(7 * i + 3 * (row + 1) * (i >= length // 8)) % vocabulary for i in range(length)] for row in range(WARM_ROWS)
    ]
    with torch.enable_grad():
        hidden = packing.last_hidden_states(model, packing.packed_batch(ids).to(model.device))
        (gradient,) = torch.autograd.grad(hidden.float().square().mean(), weight)
    return [hidden.detach(), gradient]
