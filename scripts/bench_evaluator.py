"""What an evaluator ten times slower than a step costs SFT: its step rate beside one, and without.

    uv run python scripts/bench_evaluator.py --json
    uv run python scripts/bench_evaluator.py --size large --really

with      `eval_mode async`: an evaluation every `--every` steps, each as long as `--slower` steps, so that the
          evaluator falls further behind from the first one on.
without   the same training from the same weights on the same rows; nothing is evaluated.

The two take turns in this process, block by block (with, without, without, with, …), so that what else the machine
does hits both: with `--every` 4, eight steps pass for each evaluation that takes ten. A block begins with the step that
submits, so what a submission starts is over before the block is. Reported are the ratios of the rates of neighbouring
blocks, their median and quartiles, and as a measure of the noise the same of blocks without, each against the one
before it. The start of the evaluating process (once a run) is not timed.

By default the evaluator reads the weights, checks their hash, and sleeps. That is the stand-in for an evaluator on
a device of its own: where there is none, its arithmetic takes cores from training, whoever waits for whom, and the
step rate says how many cores there are. `--really` evaluates before it sleeps and shows that, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])  # for the child
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from scipy.stats import binom  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from grpo_gsm8k import config, sft  # noqa: E402
from grpo_gsm8k.config import SftConfig  # noqa: E402
from grpo_gsm8k.engines.process import Engine  # noqa: E402
from grpo_gsm8k.evals.evaluator import AsyncEvaluator  # noqa: E402
from grpo_gsm8k.tasks import load_task  # noqa: E402
from grpo_gsm8k.tasks.base import load_split  # noqa: E402
from grpo_gsm8k.trainer.tiny_model import make_tiny_model  # noqa: E402
from grpo_gsm8k.workbench import Workbench, open_workbench, prompt_rows, validation_params  # noqa: E402


@dataclass(frozen=True)
class Size:
    """A model, and how it is trained."""

    hidden_size: int
    layers: int
    heads: int
    vocabulary: int
    batch_size: int


SIZES = {"tiny": Size(128, 2, 4, 0, 16), "large": Size(512, 8, 8, 32_000, 4)}


def make_inputs(folder: Path, size: Size) -> None:
    """Toy problems and a random model, its vocabulary widened with ids that no text uses."""
    task = load_task("gsm8k")
    task.generate(folder / "data", 0, {"train": 2000, "val": 100, "test": 1})
    texts = [text for p in load_split(task, folder / "data", "train") for text in (p.text, p.meta["solution"])]
    sizes = {"hidden_size": size.hidden_size, "layers": size.layers, "heads": size.heads}
    make_tiny_model(folder / "model", texts, 0, **sizes)
    if size.vocabulary:
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        model.resize_token_embeddings(size.vocabulary, mean_resizing=False)
        model.save_pretrained(folder / "model")


class Training:
    """`sft.train`, a block at a time."""

    def __init__(self, bench: Workbench, folder: Path) -> None:
        self.bench, self.step, self.submissions = bench, 0, list[float]()
        self.rows = [
            bench.renderer.target(problem) for problem in load_split(bench.renderer.task, folder / "data", "train")
        ]

    def block(self, steps: int) -> float:
        """Steps a second of so many updates, each with what validates and logs it."""
        cfg, began = self.bench.run.cfg, time.perf_counter()
        for _ in range(steps):
            self.step += 1
            metrics = sft.fit_step(cfg, self.bench, self.rows, self.step, 1e-4, seed=0)
            validating = time.perf_counter()
            metrics |= self.bench.validate(self.step, total=0)
            if self.bench.due(self.step, 0):
                self.submissions.append(time.perf_counter() - validating)
            self.bench.run.log(self.step, metrics)
        return steps / (time.perf_counter() - began)


@contextmanager
def open_training(folder: Path, size: Size, every: int) -> Iterator[Training]:
    """A training with an evaluation every so many steps; 0 for none."""
    flags = {"model_id": str(folder / "model"), "data": str(folder / "data"), "device": "cpu", "dtype": "float32"}
    flags |= {"prompt_style": "gsm8k", "max_new_tokens": 96, "eval_examples": 16, "max_tokens_per_microbatch": 1500}
    flags |= {"batch_size": size.batch_size, "out_dir": tempfile.mkdtemp(dir=folder)}
    with open_workbench(
        config.build(SftConfig, {**flags, "eval_mode": "async", "eval_every": every}), "sft", {}
    ) as bench:
        yield Training(bench, folder)


def slow_evaluator(bench: Workbench, seconds: float, really: bool) -> AsyncEvaluator:
    """As `workbench.async_evaluator` makes it, with another module in the child."""
    engine = Engine(
        dataclasses.replace(bench.run.cfg, dtype="float32"),
        bench.renderer,
        ["cpu"],
        log=bench.run.path / "evaluator.log",
        module="slow_evaluator",
        prompts=prompt_rows(bench.val),
        params=vars(validation_params(bench)),
        seconds=seconds,
        really=really,
    )
    return AsyncEvaluator(engine, bench.run.path / "evals" / "pending")


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Let the two kinds of training take turns, and compare."""
    size, steps = SIZES[args.size], args.cycles * args.every
    make_inputs(folder, size)
    with open_training(folder, size, args.every) as beside, open_training(folder, size, 0) as alone:
        evaluation = args.slower / statistics.median(alone.block(args.every - 1) for _ in range(5))
        beside.bench.evaluator = evaluator = slow_evaluator(beside.bench, evaluation, args.really)
        with closing(evaluator):
            evaluator.engine.ask("ready", dict)
            beside.block(args.every - 1)  # from here on a block begins with a submission
            rates: dict[str, list[float]] = {"with": [], "without": []}
            for number in range(args.pairs):
                for kind in ("with", "without") if number % 2 == 0 else ("without", "with"):
                    rates[kind].append((beside if kind == "with" else alone).block(steps))
            waiting = evaluator.metrics()["eval/waiting"]
        weights = sum(tensor.numel() for _, tensor in beside.bench.learner.weights())
    ratios = [a / b for a, b in zip(rates["with"], rates["without"], strict=True)]
    submit, step = statistics.median(beside.submissions), 1 / statistics.median(rates["without"])
    return {
        "size": args.size,
        "parameters": weights,
        "evaluator": "evaluates, then sleeps" if args.really else "reads, then sleeps",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "evaluation_s": evaluation,
        "every": args.every,
        "steps_per_block": steps,
        "pairs": args.pairs,
        "evaluations_submitted": len(beside.submissions),
        "evaluations_waiting_at_the_end": int(waiting),
        "steps_per_s_with": statistics.median(rates["with"]),
        "steps_per_s_without": statistics.median(rates["without"]),
        "ratio": spread(ratios),
        "noise": spread([b / a for a, b in pairwise(rates["without"])]),
        "lost_percent": 100 * (1 - statistics.median(ratios)),
        "submit_s": submit,
        "submit_percent": 100 * submit / (args.every * step),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and extremes, and a 95 % interval of the median (distribution-free, by order statistics)."""
    ordered, n = sorted(values), len(values)
    rank = int(binom.ppf(0.025, n, 0.5))  # as many values at least lie below the median, but for 2.5 %
    low, _, high = statistics.quantiles(ordered, n=4)
    return {
        "median": statistics.median(ordered),
        "median_low": ordered[max(rank - 1, 0)],
        "median_high": ordered[min(n - rank, n - 1)],
        "quartile_low": low,
        "quartile_high": high,
        "min": ordered[0],
        "max": ordered[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--pairs", type=int, default=30, help="blocks of each kind")
    parser.add_argument("--cycles", type=int, default=3, help="evaluations asked for in a block")
    parser.add_argument("--every", type=int, default=4, help="steps of one training between evaluations")
    parser.add_argument("--slower", type=float, default=10.0, help="steps that an evaluation takes")
    parser.add_argument("--really", action="store_true", help="evaluate before sleeping")
    parser.add_argument("--threads", type=int, default=0, help="of training; 0 for torch's choice")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args)
    if args.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
