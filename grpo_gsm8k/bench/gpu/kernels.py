"""Parts of `bench gpu` about single kernels: the device's peaks, the head, attention."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from grpo_gsm8k.bench.gpu.tools import (
    SHAPES,
    Row,
    Skip,
    is_toy,
    last_line,
    peak_flops,
    relative_error,
    seconds_of,
    sizes_of,
)


def peaks(args: argparse.Namespace) -> Iterator[Row]:
    """What this device can do at best: a large matrix product, a copy, and a launch."""
    import torch

    side = 256 if is_toy(args) else 8192
    dtype = getattr(torch, args.dtype)
    a, b = (torch.randn(side, side, device=args.device, dtype=dtype) for _ in range(2))
    product = seconds_of(args, lambda: a @ b, 10)
    yield "matrix product", {"tflops": 2 * side**3 / product / 1e12, "sheet_tflops": peak_flops(args) / 1e12}
    big = torch.empty(side * side * 8, device=args.device, dtype=dtype)
    copied = seconds_of(args, big.clone, 10)
    yield "copy", {"gb_per_s": 2 * big.numel() * big.element_size() / copied / 1e9}
    small = torch.zeros(8, device=args.device)

    def launches() -> None:
        for _ in range(1000):
            small.add_(1)

    yield "launch", {"us": seconds_of(args, launches, 3) * 1e3}


def head(args: argparse.Namespace) -> Iterator[Row]:
    """The head's log-probabilities and gradient: time, share of the peak, and error against float32 autograd."""
    import torch

    from grpo_gsm8k.trainer import costs, head_triton
    from grpo_gsm8k.trainer.head import target_logprobs

    dtype = getattr(torch, args.dtype)
    for size in sizes_of(args):
        shape = SHAPES[size]
        n, h, v = (32 if is_toy(args) else 8192), shape["hidden"], shape["vocabulary"]
        torch.manual_seed(0)
        weight = (torch.randn(v, h, device=args.device) * 0.05).to(dtype).requires_grad_()
        hidden = torch.randn(n, h, device=args.device).to(dtype).requires_grad_()
        targets = torch.randint(0, v, (n,), device=args.device)
        linear = argparse.Namespace(weight=weight)

        def ours(n: int = n, hidden: Any = hidden, targets: Any = targets, linear: Any = linear) -> Any:
            logp, _ = target_logprobs(
                hidden[:n], linear, targets[:n], 0.7, True, lambda logp, part: (-torch.ones_like(logp), None)
            )
            (-logp.sum()).backward()
            return logp

        def plain(n: int, hidden: Any = hidden, targets: Any = targets, weight: Any = weight) -> Any:
            logits = hidden[:n].float() @ weight.float().t() / 0.7
            logp = logits.log_softmax(-1).gather(-1, targets[:n, None])[:, 0]
            (-logp.sum()).backward()
            return logp

        few = min(n, 256)
        errors = {}
        found: list[list[Any]] = []
        for way in (ours, plain):
            logp = way(few).detach()
            grads: list[Any] = [x.grad.float() for x in (hidden, weight) if x.grad is not None]
            found.append([logp, *grads])
            hidden.grad = weight.grad = None
        for what, a, b in zip(("logp", "hidden", "weight"), *found, strict=True):
            errors[f"{what}_error"] = relative_error([a], [b])
        yield f"{size} correctness", errors
        del found, logp, grads
        ways = {f"chunk {chunk >> 20} MiB": (chunk, True) for chunk in (1 << 28, 1 << 29, 1 << 30, 1 << 31)}
        ways["in torch, chunk 1024 MiB"] = (1 << 30, False)
        for way_name, (chunk, fuses) in ways.items():
            serves = head_triton.serves if fuses else _never
            with (
                mock.patch.dict(costs.CHUNK_BYTES, dict.fromkeys(costs.CHUNK_BYTES, chunk)),
                mock.patch.object(head_triton, "serves", serves),
            ):
                seconds = seconds_of(args, ours, 3, 1)
            share = 6.0 * n * h * v / seconds / peak_flops(args) if peak_flops(args) else 0.0
            yield f"{size} {way_name}", {"ms": seconds * 1e3, "mfu": share}
            hidden.grad = weight.grad = None
            if is_toy(args):
                break


def _never(hidden: Any) -> bool:
    return False


def attention(args: argparse.Namespace) -> Iterator[Row]:
    """Each attention kernel at the shapes of an update, and what a new shape costs."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if is_toy(args):
        raise Skip("kernels of a GPU are chosen by shape, and toys have none that counts")
    dtype, rows, length = getattr(torch, args.dtype), 16, 1024
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    backends |= {"cudnn": SDPBackend.CUDNN_ATTENTION}

    def inputs(shape: dict[str, int], length: int) -> list[Any]:
        torch.manual_seed(0)
        width = shape["hidden"] // shape["heads"]
        sizes = [(rows, length, n, width) for n in (shape["heads"], shape["kv_heads"], shape["kv_heads"])]
        made = [torch.randn(s, device=args.device, dtype=dtype).transpose(1, 2) for s in sizes]
        return [x.requires_grad_() for x in made]

    def attend(name: str, q: Any, k: Any, v: Any) -> Any:
        groups = q.shape[1] // k.shape[1]
        if name == "efficient":  # takes no groups
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(q, k, v, is_causal=True, enable_gqa=name != "efficient")

    for size in sizes_of(args):
        shape = SHAPES[size]
        heads, kv, width = shape["heads"], shape["kv_heads"], shape["hidden"] // shape["heads"]
        flops = 3.5 * 2.0 * rows * heads * length * length * width  # causal half of 4, and 2.5 times that backward
        for name, backend in backends.items():
            given, lengths = inputs(shape, length), iter(range(500, 600, 3))

            def both(name: str = name, given: list[Any] = given) -> None:
                attend(name, *given).sum().backward()

            def fresh(name: str = name, shape: dict[str, int] = shape, lengths: Iterator[int] = lengths) -> None:
                attend(name, *inputs(shape, next(lengths))).sum().backward()

            try:
                with sdpa_kernel([backend]):
                    seconds, new = seconds_of(args, both), seconds_of(args, fresh, 4, 1)
                share = flops / seconds / peak_flops(args) if peak_flops(args) else 0.0
                yield f"{size} {name} {rows} x {length}", {"ms": seconds * 1e3, "mfu": share, "new_shape_ms": new * 1e3}
            except RuntimeError as fault:
                yield f"{size} {name} {rows} x {length}", {"failed": last_line(fault)}
        yield f"{size} varlen {rows} x {length}", _varlen(args, rows, length, heads, kv, width, flops)


def _varlen(
    args: argparse.Namespace, rows: int, length: int, heads: int, kv: int, width: int, flops: float
) -> dict[str, Any]:
    """torch's attention over rows that stand end to end, as far as this torch has it."""
    import inspect

    import torch

    try:
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return {"failed": f"torch {torch.__version__} has no torch.nn.attention.varlen"}
    takes = inspect.signature(varlen).parameters
    more: dict[str, Any] = {"is_causal": True} if "is_causal" in takes else {"window_size": (-1, 0)}
    more |= {"enable_gqa": True} if "enable_gqa" in takes else {}
    attend: Callable[..., Any] = varlen
    torch.manual_seed(0)
    dtype, tail = getattr(torch, args.dtype), length // 4
    q, k, v = (torch.randn(rows * length, n, width, device=args.device, dtype=dtype) for n in (heads, kv, kv))
    starts = torch.arange(0, rows * length + 1, length, device=args.device, dtype=torch.int32)
    figures: dict[str, Any] = {}
    try:
        out = attend(q, k, v, starts, starts, length, length, **more)
        plain = [x.unflatten(0, (rows, length)).transpose(1, 2) for x in (q, k, v)]
        sdpa: Callable[..., Any] = torch.nn.functional.scaled_dot_product_attention
        wanted = sdpa(*plain, is_causal=True, enable_gqa=True)
        figures["error"] = relative_error([out], [wanted.transpose(1, 2).flatten(0, 1)])
        ends = out.unflatten(0, (rows, length))[:, -tail:].flatten(0, 1)
        queries = q.unflatten(0, (rows, length))[:, -tail:].flatten(0, 1)  # of the last tokens, over whole rows
        found = attend(queries, k, v, starts // 4, starts, tail, length, **more)
        figures["error_of_tails"] = relative_error([found], [ends])

        def both() -> None:
            attend(q, k, v, starts, starts, length, length, **more).sum().backward()

        for x in (q, k, v):
            x.requires_grad_()
        seconds = seconds_of(args, both)
        figures |= {"ms": seconds * 1e3, "mfu": flops / seconds / peak_flops(args) if peak_flops(args) else 0.0}
    except (RuntimeError, ValueError, TypeError) as fault:
        figures["failed"] = last_line(fault)
    return {**figures, "takes": " ".join(takes)}
