"""The evaluating process: an engine, the rendered problems, and one job at a time. Started by `evals.evaluator`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from grpo_gsm8k import config
from grpo_gsm8k.config import PolicyConfig
from grpo_gsm8k.datatypes import Problem, Prompt, SamplingParams
from grpo_gsm8k.engines.channel import Handler, Pulse, serve
from grpo_gsm8k.engines.worker import make_sampler, renderer_of, take_weights
from grpo_gsm8k.evals.accuracy import evaluate


def build(start: Mapping[str, Any], pulse: Pulse) -> dict[str, Handler]:
    """The handler of an evaluator. `start`: as for an engine, and `prompts`, `params`."""
    cfg = config.build(PolicyConfig, start["cfg"])
    renderer = renderer_of(cfg, start)
    sampler = make_sampler(cfg, renderer, pulse)
    prompts = [Prompt(Problem(**row["problem"]), tuple(row["token_ids"])) for row in start["prompts"]]
    params = SamplingParams(**{**start["params"], "stop": tuple(start["params"]["stop"])})

    def judge(version: int, path: str, sha256: str) -> dict[str, Any]:
        answer = take_weights(sampler, version, path, sha256)
        if "refused" in answer:
            return answer
        result = evaluate(sampler, prompts, params, renderer, sha256, cfg.grading, f"step {version}")
        return {**answer, "evaluation": dataclasses.asdict(result)}

    return {"judge": judge}


if __name__ == "__main__":
    serve(build)
