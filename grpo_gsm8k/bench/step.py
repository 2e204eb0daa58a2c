"""Whole GRPO steps of a tiny model: does the cost grow linearly, and what do data, grading and logging take of it?

`grpo.run` as it is, on made-up problems, rewards by a coin so that there is something to learn from at any size; the
first step is not counted. The sampler decodes equally many completions side by side at every size: more of them are
faster, but that is its setting and not the step's size. `overhead_frac` is what is neither sampling nor the update:
data, grading, hand-over of weights, metrics, samples and checkpoints, up to the end of the run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from grpo_gsm8k import bench

FLAGS: dict[str, tuple[Any, str]] = {
    "completions": ("32,128,512,2048", "completions a step, of which each is a contestant"),
    "group": (8, "completions of a prompt"),
    "max_new_tokens": (96, "longest completion; a random model seldom ends before"),
    "sample_rows": (32, "completions that the sampler decodes side by side, at every size"),
    "counted": (2048, "completions counted at each size, in as many steps as that takes"),
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second and the shares of a step, at each size."""
    sizes = args.completions.split(",")
    found = bench.rounds(args, sizes)
    medians = {size: bench.medians(runs) for size, runs in found.items()}
    first = found[sizes[0]]
    return {
        "completions": medians,
        "ratio_tokens_per_s": {s: bench.ratio(found[s], first, "tokens_per_s")["median"] for s in sizes},
        "ratio_tokens_per_cpu_s": {s: bench.ratio(found[s], first, "tokens_per_cpu_s")["median"] for s in sizes},
        **bench.machine(args),
    }


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """One size, in this process."""
    from grpo_gsm8k import config, grpo
    from grpo_gsm8k.runs.directory import Run
    from grpo_gsm8k.tasks import load_task
    from grpo_gsm8k.tasks.base import load_split
    from grpo_gsm8k.trainer.tiny_model import make_tiny_model

    size = int(name)
    steps = max(args.counted // size, 2) + 1
    clock: list[tuple[float, float]] = []
    log = Run.log

    def logged(self: Run, step: int, metrics: Any) -> None:
        log(self, step, metrics)
        clock.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        folder = Path(scratch)
        task = load_task("gsm8k")
        task.generate(folder / "data", 0, {"train": 300, "val": 20, "test": 1})
        examples = load_split(task, folder / "data", "train")
        model = make_tiny_model(folder / "model", [example.text for example in examples], 0)
        flags = {
            "model_id": str(model),
            "data": str(folder / "data"),
            "out_dir": str(folder / "run"),
            "device": args.device,
            "engine": "hf",
            "steps": steps,
            "rollouts_per_step": size,
            "group_size": args.group,
            "max_new_tokens": args.max_new_tokens,
            "sample_rows": args.sample_rows,
            "reward": "random",
            "eval_every": 0,
        }
        with mock.patch.object(Run, "log", logged):
            grpo.run(config.resolve("grpo", preset="tiny", flags=flags))
        ended = time.perf_counter()
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    wall, cpu = (b - a for a, b in zip(clock[0], clock[-1], strict=True))
    tokens = sum(row["length/mean"] * size for row in rows)
    worked = sum(row["time/sampling"] + row["time/training"] for row in rows)
    grading = sum(row["time/compute_rewards"] for row in rows)
    return {
        "steps": len(rows),
        "tokens_per_s": tokens / wall,
        "tokens_per_cpu_s": tokens / cpu,
        "step_seconds": statistics.median(row["time/total"] for row in rows),
        "sampling_frac": sum(row["time/sampling"] for row in rows) / wall,
        "training_frac": sum(row["time/training"] for row in rows) / wall,
        "grading_frac": grading / wall,
        "overhead_frac": 1 - worked / wall,
        "last_checkpoint_s": ended - clock[-1][0],
    }
