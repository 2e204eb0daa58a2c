"""What an evaluator that falls behind costs fine-tuning: the step rate with it over the step rate without.

    uv run python scripts/bench_evaluator.py                                     the demo's model
    uv run python scripts/bench_evaluator.py --hidden 512 --layers 8 --json      25 million weights

An evaluation takes ten times as long as a training step and is asked for every fourth, so the evaluator is always
behind. It sleeps instead of sampling: the machine has no second device, and an evaluator that really computed would
compete with training for the same cores, which says nothing about two devices. Everything that the training process
and its host do for a real one is done: the copy of the weights, the file, both hashes, the channel.

Blocks of steps with and without it alternate in one process; the figure is the median of their pairwise ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_gsm8k.engines.channel import Handler, Pulse, serve

SLOWER, EVERY = 10, 4


def build(start: Mapping[str, Any], pulse: Pulse) -> dict[str, Handler]:
    """The evaluating process: reads and checks the weights as a real one does, then sleeps."""
    from grpo_gsm8k.engines import handover
    from grpo_gsm8k.engines.handover import Handover

    def judge(version: int, path: str, sha256: str) -> dict[str, Any]:
        handover.read(Handover(Path(path), version, sha256))
        time.sleep(start["seconds"])
        row = {"id": "p", "correct": False, "weights_sha256": sha256}
        figures = dict.fromkeys(("accuracy", "format_accuracy", "truncated", "mean_tokens", "tokens_per_s"), 0.0)
        evaluation = {**figures, "ci95": [0.0, 1.0], "n": 1, "pass_at_k": {}, "seconds": 1.0}
        return {
            "version": version,
            "sha256": sha256,
            "evaluation": {**evaluation, "weights_sha256": sha256, "rows": [row]},
        }

    return {"judge": judge}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Alternate blocks of steps, and compare their rates."""
    from grpo_gsm8k import config, data_prep, sft
    from grpo_gsm8k.engines.process import Engine
    from grpo_gsm8k.evals.evaluator import AsyncEvaluator
    from grpo_gsm8k.gsm8k.problems import load_split
    from grpo_gsm8k.gsm8k.toy import make_problems
    from grpo_gsm8k.trainer.tiny_model import make_tiny_model
    from grpo_gsm8k.workbench import open_bench

    data_prep.write_splits(folder / "data", make_problems(0, {"train": 512, "val": 8, "test": 8}), {"source": "toy"})
    texts = [text for problem in load_split(folder / "data", "train") for text in (problem.question, problem.answer)]
    sizes = {"hidden_size": args.hidden, "layers": args.layers, "heads": args.hidden // 32, "vocab_size": 1024}
    model = make_tiny_model(folder / "model", texts, 0, **sizes)
    where = {"model_id": str(model), "data": str(folder / "data"), "out_dir": str(folder / "run"), "device": "cpu"}
    cfg = config.resolve("sft", flags={**where, "prompt_style": "gsm8k", "batch_size": 16, "eval_every": EVERY})
    with open_bench(cfg, "sft", {"train": folder / "data/train.jsonl"}) as bench:
        rows = [bench.renderer.example(problem) for problem in load_split(folder / "data", "train")]
        steps = iter(range(1, 1_000_000))

        def block(evaluates: bool) -> float:
            began = time.perf_counter()
            for _ in range(args.steps):
                step = next(steps)
                sft.fit_step(cfg, bench, rows, step, 1e-4, seed=0)
                if evaluates:
                    bench.validate(step, 1_000_000)
            return args.steps / (time.perf_counter() - began)

        block(False)  # warm
        seconds = 1 / block(False)
        engine = Engine(cfg, bench.renderer, ["cpu"], module="scripts.bench_evaluator", seconds=SLOWER * seconds)
        bench.evaluator = AsyncEvaluator(engine, bench.run.path / "evals/pending", args.backlog)
        bench.evaluator.results()
        pairs = []
        for k in range(args.pairs):
            order = (False, True) if k % 2 else (True, False)
            rates = {evaluates: block(evaluates) for evaluates in order}
            pairs.append(rates[True] / rates[False])
        counts = bench.evaluator.metrics()
        bench.evaluator.close()
    return {
        "weights": sum(t.numel() for _, t in bench.learner.weights()),
        "ms_per_step": round(1000 * seconds, 1),
        "ratio": round(statistics.median(pairs), 4),
        "lowest": round(min(pairs), 4),
        "highest": round(max(pairs), 4),
        "pairs": args.pairs,
        "steps_per_block": args.steps,
        **{key: counts[key] for key in ("eval/waiting", "eval/dropped", "eval/lost")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="a block")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--backlog", choices=("all", "latest"), default="all")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    print(json.dumps(found) if args.json else "\n".join(f"{key}: {value}" for key, value in found.items()))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].isdecimal():  # the number of a socket: this is the evaluating process
        serve(build)
    else:
        main()
