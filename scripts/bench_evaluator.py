"""What an evaluator ten times slower than a step costs SFT: its step rate beside one, and without.

    uv run python scripts/bench_evaluator.py --json
    uv run python scripts/bench_evaluator.py --size large --really --rounds 7

with      `eval_mode async`: an evaluation every `--every` steps, each as long as `--slower` steps, so that the
          evaluator falls further behind from the first one on.
without   the same steps; nothing is evaluated before the last, which is not timed.

Both are whole trainings from the same weights on the same rows, one after the other in this process, in the order
with, without, without, with, … so that what else the machine does hits both. What is reported is the median of the
ratios of neighbours, and all of them. The evaluator's start (once a run) is not timed.

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
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])  # for the child
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from grpo_gsm8k import config, sft  # noqa: E402
from grpo_gsm8k.config import SftConfig  # noqa: E402
from grpo_gsm8k.data_prep import write_splits  # noqa: E402
from grpo_gsm8k.engines.process import Engine  # noqa: E402
from grpo_gsm8k.evals.evaluator import AsyncEvaluator  # noqa: E402
from grpo_gsm8k.gsm8k.problems import load_split  # noqa: E402
from grpo_gsm8k.gsm8k.toy import make_problems  # noqa: E402
from grpo_gsm8k.trainer.tiny_model import make_tiny_model  # noqa: E402
from grpo_gsm8k.workbench import Bench, open_bench, prompt_rows, validation_params  # noqa: E402

WARM_UP = 5  # steps at the start of a training that are not timed


@dataclass(frozen=True)
class Size:
    """A model, and a training of it."""

    hidden_size: int
    layers: int
    heads: int
    vocabulary: int
    batch_size: int
    steps: int


SIZES = {"tiny": Size(128, 2, 4, 0, 16, 155), "large": Size(512, 8, 8, 32_000, 4, 45)}


@dataclass
class Timing:
    """One training: when each step was logged, and how long each submission kept it waiting."""

    stamps: list[float] = field(default_factory=list)
    submissions: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Steps a second, without the warm-up and the last."""
        timed = self.stamps[WARM_UP:-1]
        return (len(timed) - 1) / (timed[-1] - timed[0])


def make_inputs(folder: Path, size: Size) -> None:
    """Toy problems and a random model, its vocabulary widened with ids that no text uses."""
    problems = make_problems(0, {"train": 2000, "val": 100, "test": 1})
    write_splits(folder / "data", problems, {"source": "toy", "seed": 0})
    texts = [text for p in load_split(folder / "data", "train") for text in (p.question, p.answer)]
    sizes = {"hidden_size": size.hidden_size, "layers": size.layers, "heads": size.heads}
    make_tiny_model(folder / "model", texts, 0, **sizes)
    if size.vocabulary:
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        model.resize_token_embeddings(size.vocabulary, mean_resizing=False)
        model.save_pretrained(folder / "model")


def train(folder: Path, size: Size, every: int, seconds: float, really: bool) -> Timing:
    """`size.steps` updates with an evaluation every `every` of them that takes `seconds`; 0 for none."""
    flags = {"model_id": str(folder / "model"), "data": str(folder / "data"), "device": "cpu", "dtype": "float32"}
    flags |= {"prompt_style": "gsm8k", "max_new_tokens": 96, "eval_examples": 16, "max_tokens_per_microbatch": 1500}
    flags |= {"epochs": 10, "batch_size": size.batch_size, "max_steps": size.steps, "save_every": 10**6}
    flags |= {"eval_mode": "async", "eval_every": every or 10**6, "out_dir": tempfile.mkdtemp(dir=folder)}
    cfg: SftConfig = config.build(SftConfig, flags)
    timing = Timing()
    with open_bench(cfg, "sft", {}) as bench:
        evaluator = bench.evaluator = slow_evaluator(bench, seconds, really)
        log, submit = bench.run.log, evaluator.submit

        def stamped(step: int, metrics: dict[str, float]) -> None:
            log(step, metrics)
            timing.stamps.append(time.perf_counter())

        def timed(step: int, weights: Any) -> None:
            began = time.perf_counter()
            submit(step, weights)
            timing.submissions.append(time.perf_counter() - began)

        bench.run.log, evaluator.submit = stamped, timed  # type: ignore[method-assign]
        if every:
            evaluator.engine.ask("ready", dict)
        sft.train(cfg, bench, [bench.renderer.example(p) for p in load_split(folder / "data", "train")])
        evaluator.close()
    return timing


def slow_evaluator(bench: Bench, seconds: float, really: bool) -> AsyncEvaluator:
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


def bench(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The two kinds of training in turn, and what one costs against the other."""
    size = SIZES[args.size]
    make_inputs(folder, size)
    step = 1 / train(folder, size, 0, 0.0, False).rate
    kinds = [kind for i in range(args.rounds) for kind in ((True, False) if i % 2 == 0 else (False, True))]
    done: list[tuple[bool, Timing]] = []
    for kind in kinds:
        done.append((kind, train(folder, size, args.every if kind else 0, args.slower * step, args.really)))
        print(f"{'with' if kind else 'without'}: {done[-1][1].rate:.3f} steps/s", file=sys.stderr)
    rates = {kind: [timing.rate for k, timing in done if k is kind] for kind in (True, False)}
    ratios = [with_it / without for with_it, without in zip(rates[True], rates[False], strict=True)]
    same = [b / a for a, b in pairwise(rates[False])]
    waits = [seconds for kind, timing in done if kind for seconds in timing.submissions]
    weights = AutoModelForCausalLM.from_pretrained(folder / "model").num_parameters()
    return {
        "size": args.size,
        "parameters": weights,
        "evaluator": "evaluates, then sleeps" if args.really else "reads, then sleeps",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "evaluation_s": args.slower * step,
        "evaluation_steps": args.slower,
        "every": args.every,
        "timed_steps": size.steps - WARM_UP - 2,
        "with": rates[True],
        "without": rates[False],
        "ratios": ratios,
        "ratios_of_neighbours_without": same,
        "median_with": statistics.median(rates[True]),
        "median_without": statistics.median(rates[False]),
        "median_ratio": statistics.median(ratios),
        "lost_percent": 100 * (1 - statistics.median(ratios)),
        "submit_s": statistics.median(waits),
        "submit_percent_of_the_steps_between": 100 * statistics.median(waits) / (args.every * step),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--rounds", type=int, default=5, help="trainings of each kind")
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--slower", type=float, default=10.0, help="steps that an evaluation takes")
    parser.add_argument("--really", action="store_true", help="evaluate before sleeping")
    parser.add_argument("--threads", type=int, default=0, help="of training; 0 for torch's choice")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = bench(Path(folder), args)
    if args.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
