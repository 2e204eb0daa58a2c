"""The head's softmax on a GPU: one kernel over a chunk's logits instead of a dozen.

`head.py` says in torch what is computed, and is what this is held against. A program takes one row: it reads the logits
once for the largest, the sum and the expectation, and once more, mostly from the L2 cache, to write in their place the
derivative that the two matrix products of the gradient need. Eagerly each of these is a pass over float32 copies of
all logits: on an H200 the head reached 31 % of the peak, its matrix products alone would reach 80 %.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from grpo_gsm8k import repro

BLOCK = 4096


def serves(hidden: torch.Tensor) -> bool:
    """Whether the kernel takes these hidden states: on a GPU, with triton and a compiler for it."""
    return hidden.is_cuda and hidden.dtype in (torch.float32, torch.bfloat16, torch.float16) and _compiler_is_there()


@functools.cache
def _compiler_is_there() -> bool:
    return not repro.missing_for_compile(gpu=True)


def fused_softmax(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    scale: float,
    cap: float,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability of each target, entropy and largest probability under softmax(map(logits) / temperature).

    Args:
        logits: `(n, V)`, the head's product, in the type of its inputs. With `gradient`, (probs - onehot) x the
            soft-cap's derivative takes their place; scale and temperature are left to the caller.
        targets: `(n,)` int64.

    Returns:
        `(n,)` float32 each.
    """
    n, vocabulary = logits.shape
    out = torch.empty(3, n, dtype=torch.float32, device=logits.device)
    if n:
        flags = {"CAPS": cap != 0, "GRADIENT": gradient, "BIASED": bias is not None, "BLOCK": BLOCK, "num_warps": 8}
        sizes = (n, vocabulary, logits.stride(0))
        _kernel()[(n,)](
            logits, targets, logits if bias is None else bias, out, *sizes, temperature, scale, cap, **flags
        )
    return out[0], out[1], out[2]


def _kernel() -> Any:
    """Imported at its first use: a CPU needs no triton."""
    return importlib.import_module("grpo_gsm8k.trainer.head_kernel").rows_of_logits
