"""`replay RUN --step K`: train step K again without a sampler; are the weights those of the run?

    grpo-gsm8k replay artifacts/runs/demo/grpo --step 23

It starts from the checkpoint before K. Where that is not step K - 1, the steps between are trained again, too, each on
its own rollouts. On the machine that made the run, with the same torch and number of threads, the sha256 of the weights
must be the same. Elsewhere sums are taken in another order, and only the size of the difference can be told.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_gsm8k.audit.stored import StoredRun, allow_own_code, import_nothing_from, open_run
from grpo_gsm8k.errors import ConfigError, DataError
from grpo_gsm8k.runs.progress import progress

TOLERANCE = 0.05
"""Relative, of an update's metrics, where another processor or torch takes sums in another order. A step of the demo
on one thread instead of two differs by 1e-6; the differences grow from step to step."""


def replay(folder: Path, step: int, own_code: bool = False, data: str = "", model_id: str = "") -> dict[str, Any]:
    """Train a step of a run again; the command's result.

    Raises:
        ConfigError: the run has no such step.
        DataError: it kept no rollouts of the step, or of one between the checkpoint and it.
    """
    import_nothing_from(folder)
    run = open_run(folder, data, model_id)
    allow_own_code(run, own_code)
    if not 1 <= step <= run.last:
        raise ConfigError(f"--step {step}: {folder} has the steps 1 to {run.last}")
    from grpo_gsm8k.audit import again

    with again.opened(run) as learner:
        start, began = learner.seek(step - 1), time.perf_counter()
        with progress("replay", step - start) as bar:
            for trained in learner.to(step):
                bar.update(trained.step - start)
        seconds = time.perf_counter() - began
        recorded = recorded_sha256(run, step)
    off = again.differing(run.metrics.get(step, {}), trained.metrics)
    verdict, said = judge(run, trained.sha256, recorded, off)
    steps = range(start + 1, step + 1)
    return {
        "run_dir": str(folder),
        "stage": run.stage,
        "step": step,
        "from_step": start,
        "verdict": verdict,
        "said": said,
        "weights_sha256": trained.sha256,
        "recorded_sha256": recorded,
        "metrics_that_differ": {name: list(pair) for name, pair in off.items()},
        "seconds": round(seconds, 3),
        "recorded_seconds": round(recorded_seconds(run, steps), 3),
    }


def recorded_sha256(run: StoredRun, step: int) -> str:
    """The hash of the weights after a step: the chain's, else that of the rollouts' header; "" for none."""
    from grpo_gsm8k.runs import rollouts

    if known := run.weights.get(step):
        return known
    try:
        return rollouts.read(run.folder / rollouts.name_of(step)).after
    except DataError:
        return ""


def recorded_seconds(run: StoredRun, steps: range) -> float:
    """How long the run took for these steps."""
    return math.fsum(run.metrics.get(step, {}).get("time/total", 0.0) for step in steps)


def judge(run: StoredRun, found: str, recorded: str, off: Mapping[str, tuple[Any, float]]) -> tuple[str, str]:
    """`bitwise`, `close`, `different` or `unchecked`, and that in words."""
    if not recorded:
        return "unchecked", "the run did not hash the weights after this step, so there is nothing to compare with"
    if found == recorded:
        return "bitwise", "the weights are those of the run, bit for bit"
    worst = max(map(_apart, off.values()), default=0.0)
    if not run.elsewhere:
        return "different", f"the weights are others, on the same machine; metrics differ by {worst:.2g} at most"
    why = f"this is another machine ({'; '.join(run.elsewhere)})"
    if worst <= TOLERANCE:
        return "close", f"the weights differ, and the update's metrics agree within {worst:.2g}: {why}"
    return "different", f"the update's metrics differ by up to {worst:.2g}, more than {TOLERANCE:g}, though {why}"


def _apart(pair: tuple[Any, float]) -> float:
    """How far two numbers are apart, relative to the larger, from 1e-3 on."""
    recorded, found = pair
    if not isinstance(recorded, int | float):
        return math.inf
    return abs(recorded - found) / max(abs(recorded), abs(found), 1e-3)
