"""How much do common random numbers take off the variance of a difference between two arms?

    python scripts/fork_variance.py artifacts/runs/demo/grpo --at 40 --set lr=3e-4 --seeds 8 --out_dir artifacts/forks

For each seed s, the run is forked twice at step K with that seed: as it was (A), and with `--set` (B). An outcome is
the mean of a metric over the steps behind K. A and B of one seed ask the same prompts and draw with the same numbers,
so the variance of A - B is compared with what two arms of different seeds have, Var A + Var B. The interval is a
bootstrap over the seeds.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from grpo_gsm8k.audit.fork import fork
from grpo_gsm8k.runs.files import read_jsonl

DRAWS = 2000


def outcome(run: Path, at: int, metric: str) -> float:
    """The mean of a metric over the steps behind `at`."""
    return fmean(row[metric] for _, row in read_jsonl(run / "metrics.jsonl") if row["step"] > at and metric in row)


def ratio(pairs: list[tuple[float, float]]) -> float:
    """Var(A - B) of common seeds over Var A + Var B, that of independent ones."""
    a, b = zip(*pairs, strict=True)
    return variance([x - y for x, y in pairs]) / (variance(a) + variance(b))


def measure(run: Path, at: int, sets: list[str], seeds: int, out: Path, metric: str, max_steps: int) -> dict[str, Any]:
    """Fork both arms with every seed, and compare the variances."""
    pairs = []
    for seed in range(1, seeds + 1):
        found = []
        for arm, changes in (("a", []), ("b", sets)):
            folder = out / f"{arm}{seed}"
            if not (folder / "result.json").is_file():
                fork(run, at, [f"seed={seed}", *changes], folder, max_steps)
            found.append(outcome(folder, at, metric))
        pairs.append((found[0], found[1]))
    draw = random.Random(0)
    resampled = (draw.choices(pairs, k=len(pairs)) for _ in range(DRAWS))
    drawn = sorted(ratio(sample) for sample in resampled if len(set(sample)) > 1)  # one seed alone has no variance
    a, b = zip(*pairs, strict=True)
    return {
        "metric": metric,
        "seeds": seeds,
        "difference": fmean(y - x for x, y in pairs),
        "variance_common": variance([y - x for x, y in pairs]),
        "variance_independent": variance(a) + variance(b),
        "ratio": ratio(pairs),
        "ci95": [drawn[round(0.025 * len(drawn))], drawn[round(0.975 * len(drawn)) - 1]],
        "outcomes": pairs,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--at", type=int, required=True)
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument("--metric", default="reward/mean")
    parser.add_argument("--max_steps", type=int, default=0)
    args = parser.parse_args()
    found = measure(args.run, args.at, args.sets, args.seeds, args.out_dir, args.metric, args.max_steps)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
