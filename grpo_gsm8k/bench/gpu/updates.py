"""Parts of `bench gpu` about an update: speed, memory, where the time goes, every default left out."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

from grpo_gsm8k import bench, repro
from grpo_gsm8k.bench.gpu.tools import (
    FAULTS,
    Row,
    Skip,
    empty,
    is_toy,
    last_line,
    peak_flops,
    shape_args,
    sizes_of,
    update_rows,
    wait,
)


def update(args: argparse.Namespace) -> Iterator[Row]:
    """An update with every default: tokens a second, share of the peak, memory as predicted and as it was."""
    for size in sizes_of(args):
        yield size, measure_update(args, size)


def large(args: argparse.Namespace) -> Iterator[Row]:
    """An update of the full recipe's size, 820k tokens, of the largest model."""
    size = sizes_of(args)[-1]
    yield f"{size} 820k tokens", measure_update(args, size, 0 if is_toy(args) else 820_000)


def measure_update(args: argparse.Namespace, size: str, tokens: int = 0, **flags: Any) -> dict[str, Any]:
    """Two updates, of which the second counts."""
    import torch

    from grpo_gsm8k.bench import update as bench_update
    from grpo_gsm8k.config import TrainConfig
    from grpo_gsm8k.trainer.data import weighted
    from grpo_gsm8k.trainer.learner import TorchLearner
    from grpo_gsm8k.trainer.losses import GrpoClip, Objective
    from grpo_gsm8k.trainer.memory import shape_of

    gpu, tokens = args.device.startswith("cuda"), tokens or args.tokens
    rows, objective = update_rows(args, size, tokens), Objective(GrpoClip())
    learner = TorchLearner(bench.make_model(shape_args(args, size)), None, TrainConfig(engine="vllm", **flags))
    data, few = weighted(rows, "token"), weighted(rows[: max(8, min(len(rows) // 4, 64))], "token")
    started = time.perf_counter()
    budget = learner.budget
    learner.forward_backward(few, objective)
    learner.step(1e-6)
    wait(args)
    first = time.perf_counter() - started
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    said = learner.forward_backward(data, objective)
    wait(args)
    passed = time.perf_counter() - started
    stepped = learner.step(1e-6)
    wait(args)
    whole = time.perf_counter() - started
    read = sum(len(row.token_ids) - 1 for row in rows)
    work = bench_update.operations(shape_of(learner.model), rows)
    peak = peak_flops(args)
    return {
        "tokens": read,
        "seconds": whole,
        "step_seconds": whole - passed,
        "first_seconds": first,
        "tokens_per_s": read / whole,
        "mfu": said.get("perf/mfu", 0.0) * passed / whole,
        "nominal_mfu": work / whole / peak if peak else 0.0,
        "microbatch": budget,
        "passes": learner.passes(data),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0,
        "predicted_gb": stepped.get("perf/predicted_peak_gb", 0.0),
        "reserved_gb": torch.cuda.memory_reserved() / 1e9 if gpu else 0.0,
        "padding": said["perf/padding_frac"],
    }


def profile(args: argparse.Namespace) -> Iterator[Row]:
    """Where the device's time goes in an update of the largest model: its kernels by name, and how often it waits."""
    from collections import Counter

    from torch.profiler import ProfilerActivity, supported_activities
    from torch.profiler import profile as profiler

    from grpo_gsm8k.config import TrainConfig
    from grpo_gsm8k.trainer.data import weighted
    from grpo_gsm8k.trainer.learner import TorchLearner
    from grpo_gsm8k.trainer.losses import GrpoClip, Objective

    size = sizes_of(args)[-1]
    rows = update_rows(args, size, min(args.tokens, 24_000))
    data = weighted(rows, "token")
    cfg = TrainConfig(engine="vllm", max_tokens_per_microbatch=64 if is_toy(args) else 12288)
    learner = TorchLearner(bench.make_model(shape_args(args, size)), None, cfg)
    learner.forward_backward(data, Objective(GrpoClip()))
    learner.step(1e-6)
    wait(args)
    gpu = args.device.startswith("cuda") and ProfilerActivity.CUDA in supported_activities()
    started = time.perf_counter()
    with profiler(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        learner.forward_backward(data, Objective(GrpoClip()))
        wait(args)
        passed = time.perf_counter() - started
        learner.step(1e-6)
        wait(args)
    whole = time.perf_counter() - started
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in seen.events() or []:
        kernel = str(getattr(event, "device_type", "")).endswith("CUDA")
        if kernel == gpu:
            microseconds = event.device_time if gpu else event.self_cpu_time_total
            spent[event.name] += microseconds
            calls[event.name] += 1
    total = sum(spent.values()) / 1e6
    yield (
        f"{size} whole",
        {"seconds": whole, "passes_seconds": passed, "busy_seconds": total, "kernels": sum(calls.values())},
    )
    for name, microseconds in spent.most_common(40):
        yield (
            f"{size} {name[:110]}",
            {"ms": microseconds / 1e3, "calls": calls[name], "share": microseconds / 1e6 / max(total, 1e-9)},
        )


def ablation(args: argparse.Namespace) -> Iterator[Row]:
    """The largest model's update, with each default exchanged: seconds and memory as multiples of the default's."""
    size, tokens = sizes_of(args)[-1], args.tokens
    cells = 64 if is_toy(args) else 16384
    ours = measure_update(args, size, tokens, max_tokens_per_microbatch=cells)
    yield f"{size} default at {cells}", ours
    variants: dict[str, dict[str, Any]] = {
        "head in torch": {},
        "not compiled": {"compile": "off"},
        "not packed, not compiled": {"packing": "off", "compile": "off"},
        "packed in blocks, compiled": {"packing": "on", "compile": "on"},
        "twice the tokens a pass": {"max_tokens_per_microbatch": cells * 2},
        "half the tokens a pass": {"max_tokens_per_microbatch": cells // 2},
        "chunk of 512 MiB": {},
        "checkpointing": {"activation_checkpointing": True},
        "deterministic": {"deterministic": True, "compile": "off"},
        "optimizer on the CPU": {"optimizer_device": "cpu"},
    }
    if lacking := repro.missing_for_compile(args.device.startswith("cuda")):
        variants = {name: flags for name, flags in variants.items() if flags.get("compile") != "on"}
        yield f"{size} compiled", {"left out": f"no {lacking}"}
    elif is_toy(args):
        del variants["packed in blocks, compiled"]  # the pretended device cannot compile
    for name, flags in variants.items():
        try:
            repro.set_deterministic(name == "deterministic")
            with _without(name):
                found = measure_update(args, size, tokens, **{"max_tokens_per_microbatch": cells, **flags})
        except FAULTS as fault:  # one variant; the others still count
            yield f"{size} {name}", {"failed": last_line(fault)}
            continue
        finally:
            repro.set_deterministic(False)
            empty(args)
        ratios = {
            "times_seconds": found["seconds"] / ours["seconds"],
            "times_memory": found["peak_gb"] / max(ours["peak_gb"], 1e-9),
        }
        yield f"{size} {name}", {**ratios, **found}


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Exchange what no flag exchanges."""
    from grpo_gsm8k.trainer import costs, head_triton, packing

    with contextlib.ExitStack() as stack:
        if name == "head in torch":
            stack.enter_context(mock.patch.object(head_triton, "serves", lambda hidden: False))
        if name.startswith("packed in blocks"):
            stack.enter_context(mock.patch.object(packing, "reads_varlen", lambda *which: False))
        if name.startswith("chunk"):
            stack.enter_context(mock.patch.dict(costs.CHUNK_BYTES, cuda=512 << 20))
        yield


def offload(args: argparse.Namespace) -> Iterator[Row]:
    """AdamW in main memory: the update's time and memory on the largest model."""
    size = sizes_of(args)[-1]
    if args.device.startswith("cpu"):
        raise Skip("on a CPU the optimizer is in main memory already")
    yield size, measure_update(args, size, args.tokens // 4, optimizer_device="cpu")
