"""What the parts of `bench gpu` share."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo_gsm8k import bench
from grpo_gsm8k.errors import GrpoError

SHAPES: dict[str, dict[str, int]] = {
    "toy": {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 128, "vocabulary": 700},
    "0.5b": {"hidden": 896, "layers": 24, "heads": 14, "kv_heads": 2, "intermediate": 4864, "vocabulary": 151_936},
    "1.5b": {"hidden": 1536, "layers": 28, "heads": 12, "kv_heads": 2, "intermediate": 8960, "vocabulary": 151_936},
}
"""Qwen2.5's, tied embeddings."""


Row = tuple[str, dict[str, Any]]


Part = Callable[[argparse.Namespace], Iterator[Row]]


FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, GrpoError, LookupError, NameError, OSError, RuntimeError),
    *(SystemExit, TypeError, ValueError),
)
"""What a part may die of on a machine that nobody has tried: written down, and the next one begins."""


class Skip(Exception):
    """Why a part, or what is left of it, cannot run here."""


def last_line(fault: BaseException) -> str:
    """`file:line: Error: message`, the line being the innermost one of this package."""
    frames = traceback.extract_tb(fault.__traceback__)
    ours = [frame for frame in frames if "grpo_gsm8k" in frame.filename] or frames
    inner = frames[-1]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    deepest = f" (in {Path(inner.filename).name}:{inner.lineno})" if inner is not ours[-1] else ""
    message = " ".join(str(fault).split())[:300]
    return f"{where}{deepest}: {type(fault).__name__}: {message}"


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def installed(name: str) -> str:
    """The version of a package, or none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def shape_args(args: argparse.Namespace, size: str, **more: Any) -> argparse.Namespace:
    """The flags with which `bench update` and `bench sample` would measure a model of this size."""
    from grpo_gsm8k.bench import sample as bench_sample
    from grpo_gsm8k.bench import update as bench_update

    flags = {**bench.SHARED, **bench_update.FLAGS, **bench_sample.FLAGS}
    values: dict[str, Any] = {name: default for name, (default, _) in flags.items()}
    values |= {"device": args.device, "dtype": args.dtype, "max_tokens_per_microbatch": 0, **SHAPES[size], **more}
    return argparse.Namespace(**values)


def sizes_of(args: argparse.Namespace) -> list[str]:
    """As asked for."""
    return list(args.sizes.split(","))


def is_toy(args: argparse.Namespace) -> bool:
    """Whether this tries the command, and the figures mean nothing."""
    return "toy" in sizes_of(args)


def wait(args: argparse.Namespace) -> None:
    """Until the device has done what it was given."""
    import torch

    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds_of(args: argparse.Namespace, work: Callable[[], object], repeats: int = 5, warm: int = 2) -> float:
    """Of one call, a mean."""
    for _ in range(warm):
        work()
    wait(args)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    wait(args)
    return (time.perf_counter() - started) / repeats


def peak_flops(args: argparse.Namespace) -> float:
    """Of this GPU in bfloat16, from the data sheet; 0 where it is not known."""
    gpu = bench.gpu_of(args)
    return gpu.flops if gpu else 0.0


def update_rows(args: argparse.Namespace, size: str, tokens: int, group: int = 8) -> list[Any]:
    """An update of about so many tokens: prompts of 100, completions of 300 on average, 1024 at most."""
    from grpo_gsm8k.bench import update as bench_update

    few = is_toy(args)
    lengths = (
        {"mean_tokens": 12, "max_tokens": 24, "prompt_tokens": 8} if few else {"mean_tokens": 300, "max_tokens": 1024}
    )
    prompts = max(2, round(tokens / group / (20 if few else 400)))
    return bench_update.make_rows(shape_args(args, size, prompts=2 if few else prompts, group=group, **lengths))


def empty(args: argparse.Namespace) -> None:
    """Give back what nobody holds any more."""
    import torch

    gc.collect()
    if args.device.startswith("cuda"):
        torch.cuda.empty_cache()


def relative_error(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """The 2-norm of the difference of all tensors over that of the wanted ones."""
    off = sum(float((a.double() - b.to(a.device).double()).square().sum()) for a, b in zip(found, wanted, strict=True))
    return float((off / max(sum(float(b.double().square().sum()) for b in wanted), 1e-300)) ** 0.5)


def dummy_requests(lengths: Sequence[int], vocabulary: int, n: int) -> list[Any]:
    """Random ids of these lengths, for `n` completions each."""
    import random

    from grpo_gsm8k.datatypes import Request

    draw = random.Random(0)
    ids = [tuple(draw.randrange(3, vocabulary) for _ in range(length)) for length in lengths]
    return [Request(row, tuple(range(i * n, (i + 1) * n))) for i, row in enumerate(ids)]


def toy_model(folder: Path, splits: dict[str, int], sizes: dict[str, int]) -> Path:
    """Toy problems in `folder / "data"`, and a model made on the spot for them."""
    from grpo_gsm8k.tasks import load_task
    from grpo_gsm8k.tasks.base import load_split
    from grpo_gsm8k.trainer.tiny_model import make_tiny_model

    task = load_task("gsm8k")
    task.generate(folder / "data", 0, splits)
    return make_tiny_model(folder / "model", [e.text for e in load_split(task, folder / "data", "train")], 0, **sizes)


def sampler_of(model: Any, rows: int, static: bool | None = None) -> Any:
    from types import SimpleNamespace

    from grpo_gsm8k.engines.hf import HFSampler

    silent: Any = SimpleNamespace(stop_ids=frozenset(), pad_id=0, decode=lambda ids: "")
    return HFSampler(model, silent, rows, copy_model=False, static=static)
