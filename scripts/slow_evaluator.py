"""An evaluating process that takes as long as it is told: what `bench_evaluator.py` puts in the real one's place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from grpo_gsm8k.engines import handover
from grpo_gsm8k.engines.channel import Handler, Pulse, serve
from grpo_gsm8k.evals import worker


def build(start: Mapping[str, Any], pulse: Pulse) -> dict[str, Handler]:
    """The handlers of an evaluator. `start`: as in `evals.worker`, and `seconds`, `really`."""
    judge = worker.build(start, pulse)["judge"] if start["really"] else only_read

    def slowly(version: int, sha256: str, where: str) -> Mapping[str, Any]:
        until = time.monotonic() + start["seconds"]
        answer = judge(version=version, sha256=sha256, where=where)
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))
            pulse()
        return answer

    return {"judge": slowly, "ready": lambda: {}}


def only_read(version: int, sha256: str, where: str) -> dict[str, Any]:
    """Read the weights and check their hash, as every evaluator does, and make up the rest."""
    handover.read(handover.of_json(version, sha256, where))
    figures = ("accuracy", "reward", "format_accuracy", "truncated", "mean_tokens", "tokens_per_s", "seconds")
    made_up = {**dict.fromkeys(figures, 0.0), "ci95": (0.0, 1.0), "n": 1, "pass_at_k": {}, "rows": []}
    return {"version": version, "sha256": sha256, "evaluation": {**made_up, "weights_sha256": sha256}}


if __name__ == "__main__":
    serve(build)
