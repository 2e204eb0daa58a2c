"""The kernel of `head_triton.py`. It imports triton, so it is imported where it is used."""

# mypy: ignore-errors
# (triton has no types, and what is inside of a kernel is not Python)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """By the exponential, which never overflows so."""
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def _capped(z, scale, cap, CAPS: tl.constexpr):
    """The logits of the head's product, before the temperature."""
    z = z * scale
    if CAPS:
        z = cap * _tanh(z / cap)
    return z


@triton.jit
def rows_of_logits(
    logits,
    targets,
    bias,
    out,
    rows,
    vocabulary,
    stride,
    temperature,
    scale,
    cap,
    CAPS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program: its statistics into `out` `(3, rows)`; with GRADIENT its derivative in the logits' place."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    largest = tl.full([BLOCK], -3.0e38, tl.float32)  # a lane keeps its own, so that lanes wait once, at the end
    total = tl.zeros([BLOCK], tl.float32)
    expected = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < vocabulary
        z = tl.load(base + at, mask=there, other=0.0).to(tl.float32)
        if BIASED:
            z += tl.load(bias + at, mask=there, other=0.0).to(tl.float32)
        x = tl.where(there, _capped(z, scale, cap, CAPS) / temperature, float("-inf"))
        higher = tl.maximum(largest, x)
        shrink = tl.exp(largest - higher)
        weight = tl.exp(x - higher)  # of what is no number, no number: the loss tells of it
        total = total * shrink + weight
        expected = expected * shrink + tl.where(x == float("-inf"), 0.0, weight * x)
        largest = higher
    top = tl.max(largest, 0)
    rescale = tl.exp(largest - top)
    mass = tl.sum(total * rescale, 0)
    mean = tl.sum(expected * rescale, 0) / mass
    log_mass = tl.log(mass)
    target = tl.load(targets + row)
    raw = tl.load(base + target).to(tl.float32)
    if BIASED:
        raw += tl.load(bias + target).to(tl.float32)
    chosen = _capped(raw, scale, cap, CAPS) / temperature
    tl.store(out + row, chosen - top - log_mass)
    tl.store(out + rows + row, top - mean + log_mass)
    tl.store(out + 2 * rows + row, 1.0 / mass)
    if GRADIENT:
        tl.debug_barrier()  # a thread may write where another still reads the target's logit
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            there = at < vocabulary
            z = tl.load(base + at, mask=there, other=0.0).to(tl.float32)
            if BIASED:
                z += tl.load(bias + at, mask=there, other=0.0).to(tl.float32)
            y = _capped(z, scale, cap, CAPS)
            d = tl.exp(y / temperature - top) / mass
            d = tl.where(at == target, d - 1.0, d)
            if CAPS:
                bent = y / cap
                d = d * (1.0 - bent * bent)
            tl.store(base + at, d.to(logits.dtype.element_ty), mask=there)
