"""Parts of `bench gpu` about the sampler, and whole GRPO steps."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo_gsm8k import bench, repro
from grpo_gsm8k.bench.gpu.tools import (
    FAULTS,
    SHAPES,
    Row,
    Skip,
    dummy_requests,
    empty,
    installed,
    is_toy,
    last_line,
    sampler_of,
    shape_args,
    sizes_of,
    toy_model,
    wait,
)
from grpo_gsm8k.trainer.costs import PROMPT, Shape, causal_pairs, decoding_bytes, training_flops

HALF = {"hidden_size": 896, "layers": 24, "heads": 14, "intermediate_size": 4864}
"""The layers of Qwen2.5-0.5B; its vocabulary is that of made-up problems."""


def sampler(args: argparse.Namespace) -> Iterator[Row]:
    """The embedded sampler, with graphs and without: tokens a second, and its log-probs against the trainer's."""
    from grpo_gsm8k.datatypes import SamplingParams

    toy = is_toy(args)
    for size in reversed(sizes_of(args)):
        vocabulary = SHAPES[size]["vocabulary"]
        model = bench.make_model(shape_args(args, size)).eval()
        model.generation_config.eos_token_id = list(range(2, vocabulary, 16 if toy else 200))
        lengths = [5, 7, 9, 8] if toy else [60 + 7 * i % 80 for i in range(32)]
        ways = {"256 rows": (8, None, 200), "64 rows": (2, None, 200), "256 rows, no graphs": (8, False, 40)}
        ways["256 rows, deterministic"] = (8, None, 200)
        for name, (group, static, length) in ways.items():
            if size == "0.5b" and name not in ("256 rows", "64 rows"):
                continue
            repro.set_deterministic("deterministic" in name)
            prompts = dummy_requests(lengths, vocabulary, group)
            drawer = sampler_of(model, group * len(prompts), static)
            began = time.perf_counter()
            drawer.sample(prompts, SamplingParams(8 if toy else min(length, 24)))  # captures most graphs
            wait(args)
            started = time.perf_counter()
            drawn = drawer.sample(prompts, SamplingParams(8 if toy else length))
            wait(args)
            seconds = time.perf_counter() - started
            tokens = sum(len(c.token_ids) for g in drawn for c in g)
            steps = max(len(c.token_ids) for g in drawn for c in g)
            figures = {
                "tokens_per_s": tokens / seconds,
                "ms_per_step": seconds / steps * 1e3,
                "steps": steps,
                "first_seconds": started - began,
                "graphs": sum(graph is not None for graph in drawer.static.graphs.values()) if drawer.static else 0,
            }
            del drawer
            empty(args)
            yield f"{size} {name}", {**figures, **_against_the_trainer(args, model, prompts, drawn)}
        del model
        empty(args)


def _against_the_trainer(
    args: argparse.Namespace, model: Any, prompts: list[Any], drawn: list[Any]
) -> dict[str, float]:
    """How far the sampler's log-probabilities are from a frozen pass of the trainer."""
    from grpo_gsm8k.config import TrainConfig
    from grpo_gsm8k.engines.probe import completed, logprob_differences
    from grpo_gsm8k.trainer.learner import TorchLearner

    rows = [completed(p, c) for p, g in zip(prompts, drawn, strict=True) for c in g]
    cfg = TrainConfig(engine="vllm", max_tokens_per_microbatch=64 if is_toy(args) else 8192, compile="off")
    learner = TorchLearner(model.requires_grad_(True), None, cfg)
    off = logprob_differences(rows, learner.logprobs(rows))
    assert all(map(math.isfinite, off))
    model.requires_grad_(False)
    return {"logp_error_mean": statistics.fmean(off), "logp_error_max": max(off)}


def grpo_run(
    args: argparse.Namespace, sizes: dict[str, int], stops: Sequence[int] = (), **flags: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`grpo.run` on made-up problems with a model made on the spot; its result and its metrics.

    Args:
        stops: steps behind which the run is ended and then resumed.
    """
    import tempfile

    from grpo_gsm8k import config, grpo

    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        folder = Path(scratch)
        model = toy_model(folder, {"train": 300, "val": 20, "test": 1}, sizes)
        given = {
            "model_id": str(model),
            "data": str(folder / "data"),
            "out_dir": str(folder / "run"),
            "device": args.device,
            "dtype": args.dtype,
            "engine": "hf",
            "reward": "random",
            "eval_every": 0,
            "max_tokens_per_microbatch": 0,
            **flags,
        }
        for stop in (*stops, 0):
            result = grpo.run(config.resolve("grpo", preset="tiny", flags={**given, "max_steps": stop, "resume": True}))
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return result, [json.loads(line) for line in lines]


def step(args: argparse.Namespace) -> Iterator[Row]:
    """Whole GRPO steps: what sampling and the update take of them, and what the device's peaks allow."""
    toy = is_toy(args)
    tiny = {"hidden_size": 64, "heads": 4} if toy else {}
    runs: dict[str, tuple[dict[str, int], dict[str, Any]]] = {}
    if not toy:
        runs["24 layers of 896"] = (HALF, {"rollouts_per_step": 256, "max_new_tokens": 200})
    runs["demo's model"] = (tiny, {"rollouts_per_step": 8 if toy else 256, "max_new_tokens": 8 if toy else 96})
    for name, (sizes, flags) in runs.items():
        more = {"steps": 3, "group_size": 4 if toy else 8, "sample_rows": 256, "save_every": 100, **flags}
        _, metrics = grpo_run(args, sizes, **more)
        last = metrics[-1]
        keys = ("time/total", "time/sampling", "time/training", "length/mean", "perf/mfu", "perf/tokens_per_s")
        figures = {key: last[key] for key in keys if key in last}
        yield name, {**figures, **_floor(args, name, more, last["length/mean"])}


def _floor(args: argparse.Namespace, name: str, flags: dict[str, Any], length: float) -> dict[str, float]:
    """Seconds of the update at the sheet's peak, and of sampling at its bandwidth, for the model of 0.5B's layers."""
    gpu = bench.gpu_of(args)
    if gpu is None or name != "24 layers of 896":
        return {}
    shape = Shape(0, 24, 896, 4864, 14, 14, 64, 1024)
    rows, tokens = flags["rollouts_per_step"], round(length)
    work = training_flops(shape, rows * (tokens + PROMPT), rows * tokens, causal_pairs([tokens + PROMPT] * rows))
    read = tokens * decoding_bytes(shape, 2, [PROMPT + tokens // 2] * rows)
    return {"floor/training": work / gpu.flops, "floor/sampling": read / gpu.bandwidth}


def determinism(args: argparse.Namespace) -> Iterator[Row]:
    """A deterministic run once more, and once with a stop in between: the same weights to the last bit."""
    small: dict[str, Any] = {"rollouts_per_step": 16, "max_new_tokens": 16}
    runs: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
        dtype: ({"hidden_size": 64, "heads": 4}, {"dtype": dtype, **small}) for dtype in ("float32", "bfloat16")
    }
    if not is_toy(args):
        large = {"dtype": "bfloat16", "rollouts_per_step": 64, "max_new_tokens": 200}
        runs["bfloat16, 24 layers of 896"] = (HALF, large)
    for name, (sizes, flags) in runs.items():
        more = {"steps": 3, "group_size": 4, "deterministic": True, **flags}
        first = grpo_run(args, sizes, **more)[0]["weights_sha256"]
        for how, stops in (("once more", ()), ("resumed", (1,))):
            again = grpo_run(args, sizes, stops, **more)[0]["weights_sha256"]
            yield f"{name}, {how}", {"equal": first == again, "sha256": first[:12]}


def devices(args: argparse.Namespace) -> Iterator[Row]:
    """Two GPUs: ranks over NCCL against one process, and the trainer beside a sampler with a GPU of its own."""
    import subprocess
    import tempfile

    import torch

    if args.devices < 2:
        raise Skip("asked for by --devices 2")
    if args.device.startswith("cuda") and torch.cuda.device_count() < 2:
        raise Skip(f"{torch.cuda.device_count()} GPU is here")
    with tempfile.TemporaryDirectory() as scratch:
        losses = {}
        for ranks in (1, 2):
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command = [*launcher, "-m", "grpo_gsm8k.bench.gpu.ranks", scratch, args.device, str(ranks)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
            if done.returncode:
                yield f"{ranks} ranks", {"failed": done.stderr[-600:]}
                continue
            text = Path(scratch, f"run{ranks}", "metrics.jsonl").read_text(encoding="utf-8")
            losses[ranks] = [float(json.loads(line)["loss"]) for line in text.splitlines()]
            yield (
                f"{ranks} ranks",
                {"loss": losses[ranks][-1], "seconds": json.loads(text.splitlines()[-1])["time/total"]},
            )
        if len(losses) == 2:
            apart = max(abs(a - b) for a, b in zip(losses[1], losses[2], strict=True))
            yield "two ranks against one", {"loss_error": apart}
    if installed("vllm") == "none":
        return
    flags: dict[str, Any] = {"vllm_device": "cuda:1", "steps": 3, "rollouts_per_step": 64, "group_size": 8}
    for transfer in ("file", "nccl"):
        for mode in ("on_policy", "one_step_off"):
            try:
                _, metrics = grpo_run(
                    args, {"heads": 4}, **flags, weight_transfer=transfer, mode=mode, max_new_tokens=64
                )
            except FAULTS as fault:  # one way; the other still counts
                yield f"{transfer}, {mode}", {"failed": last_line(fault)}
                continue
            keys = ("time/total", "time/sampling", "time/training", "sync/probe_logp_abs_mean")
            yield f"{transfer}, {mode}", {key: metrics[-1][key] for key in keys if key in metrics[-1]}


def vllm(args: argparse.Namespace) -> Iterator[Row]:
    """vLLM beside the trainer on one GPU: tokens a second, sleep and wake, each hand-over with its proof."""
    if installed("vllm") == "none":
        raise Skip("vLLM is not installed")
    if args.device.startswith("cpu"):
        raise Skip("measured on a GPU alone; tests/test_vllm.py has the CPU")
    for transfer in ("file", "ipc"):
        flags: dict[str, Any] = {"engine": "vllm", "weight_transfer": transfer, "steps": 3}
        flags |= {"rollouts_per_step": 256, "group_size": 8}
        try:
            _, metrics = grpo_run(args, {"heads": 4}, **flags, max_new_tokens=200)
        except FAULTS as fault:  # one way; the other still counts
            yield transfer, {"failed": last_line(fault)}
            continue
        keys = ("time/total", "time/sampling", "time/training", "sync/probe_logp_abs_mean", "mismatch/logp_abs_mean")
        yield transfer, {key: metrics[-1][key] for key in keys if key in metrics[-1]}
