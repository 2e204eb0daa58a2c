"""How long a step waits for its checkpoint, with `--async_save` and without: a table in Markdown.

    uv run python scripts/save_wait.py [--hidden 256] [--layers 6] [--runs 2]

It fine-tunes a tiny random model for 24 steps with a checkpoint every three, in turns with and without a thread that
writes, and times each save but the last, which waits in both. `cpu` is that of the training thread alone, so it does
not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from grpo_gsm8k import config, sft
from grpo_gsm8k.tasks.gsm8k import toy
from grpo_gsm8k.trainer import loop
from grpo_gsm8k.trainer.tiny_model import make_tiny_model

STEPS, EVERY = 24, 3


def main() -> None:
    """Train, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--runs", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data = toy.write(Path(temporary) / "data", 0, {"train": 200, "val": 12, "test": 16}, 0.5)
        texts = [json.loads(line)["question"] for line in (data / "train.jsonl").read_text().splitlines()]
        sizes = {"hidden_size": args.hidden, "layers": args.layers}
        model = make_tiny_model(Path(temporary) / "model", texts, 0, **sizes)
        found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for turn in range(args.runs):
            for flag, saves in found.items():
                out = Path(temporary) / f"{turn}_{flag}"
                saves += timed(model, data, out, flag)
                size = sum(p.stat().st_size for p in (out / "checkpoints" / f"step_{STEPS:06d}").rglob("*"))
    print("| `--async_save` | saves | MB each | a step waits, median (range) | cpu of the training thread, median |")
    print("|---|---|---|---|---|")
    for flag, saves in found.items():
        waits, cpu = zip(*saves, strict=True)
        span = f"{statistics.median(waits):.3f} s ({min(waits):.3f} to {max(waits):.3f})"
        print(f"| {flag} | {len(saves)} | {size / 1e6:.0f} | {span} | {statistics.median(cpu):.3f} s |")


def timed(model: Path, data: Path, out: Path, flag: bool) -> list[tuple[float, float]]:
    """Fine-tune; seconds and CPU seconds of each save but the last."""
    found, real = [], loop.save

    def save(*args: Any, wait: bool = True) -> None:
        began, cpu = time.perf_counter(), time.thread_time()
        real(*args, wait=wait)
        found.append((time.perf_counter() - began, time.thread_time() - cpu))

    flags = {"model_id": str(model), "data": str(data), "out_dir": str(out), "max_steps": STEPS, "save_every": EVERY}
    more = {"batch_size": 4, "eval_every": 1000, "device": "cpu", "prompt_style": "gsm8k", "async_save": flag}
    loop.save = save
    try:
        sft.run(config.resolve("sft", flags={**flags, **more}))
    finally:
        loop.save = real
    return found[:-1]


if __name__ == "__main__":
    main()
