"""The README's picture: accuracy after each stage, and the GRPO curves, of one or several demo runs.

uv run python scripts/plot_demo.py docs/demo.svg RUN [RUN ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update(
    {"svg.hashsalt": "demo", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
)
import matplotlib.pyplot as plt  # noqa: E402  # the backend comes first

COLOURS = ("#0072b2", "#d55e00", "#009e73")


def main(out: Path, runs: list[Path]) -> None:
    """Draw `runs` into the SVG file `out`."""
    figure, (stages, reward, length) = plt.subplots(1, 3, figsize=(11, 3.2), width_ratios=(1.1, 1, 1))
    for colour, run in zip(COLOURS, runs, strict=False):
        result = json.loads((run / "pipeline.json").read_text())
        names = [stage["name"] for stage in result["stages"]]
        accuracy = [100 * stage["accuracy"] for stage in result["stages"]]
        low = [100 * (stage["accuracy"] - stage["ci95"][0]) for stage in result["stages"]]
        high = [100 * (stage["ci95"][1] - stage["accuracy"]) for stage in result["stages"]]
        label = f"seed {result['seed']}"
        stages.errorbar(names, accuracy, (low, high), color=colour, marker="o", capsize=3, lw=1.5, label=label)
        rows = [json.loads(line) for line in (run / "grpo/metrics.jsonl").read_text().splitlines()]
        for axes, key in ((reward, "reward/mean"), (length, "length/mean")):
            axes.plot([row["step"] for row in rows], [row[key] for row in rows], color=colour, lw=1.5)
    stages.set(title="held-out accuracy, % (95 % intervals)", ylim=(-3, 103))
    stages.legend(frameon=False)
    reward.set(title="GRPO: mean reward", xlabel="step", ylim=(None, 1))
    length.set(title="GRPO: tokens per response", xlabel="step")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(arg) for arg in sys.argv[2:]])
