"""The evaluating process, started by `evals.evaluator`: a sampler, the rendered problems, and one job at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from grpo_gsm8k import config
from grpo_gsm8k.config import PolicyConfig
from grpo_gsm8k.datatypes import Example, Prompt, SamplingParams
from grpo_gsm8k.engines.channel import Handler, Pulse, serve
from grpo_gsm8k.engines.worker import make_sampler, renderer_of, take_weights
from grpo_gsm8k.evals.accuracy import evaluate


def build(start: Mapping[str, Any], pulse: Pulse) -> dict[str, Handler]:
    """The handler of an evaluator. `start`: as for an engine, with `prompts` and `params`."""
    cfg = config.build(PolicyConfig, start["cfg"])
    renderer = renderer_of(cfg, start)
    sampler = make_sampler(cfg, renderer, pulse)
    prompts = [Prompt(example_of(row["example"]), tuple(row["token_ids"]), row["opened"]) for row in start["prompts"]]
    params = SamplingParams(**{**start["params"], "stop": tuple(start["params"]["stop"])})

    def judge(version: int, sha256: str, where: str) -> dict[str, Any]:
        answer = take_weights(sampler, version, sha256, where)
        if "refused" in answer:
            return answer
        more = {"title": f"step {version}", "context": start["context"]}
        result = evaluate(sampler, prompts, params, renderer, sha256, **more)
        return {**answer, "evaluation": dataclasses.asdict(result)}

    return {"judge": judge}


def example_of(fields: Mapping[str, Any]) -> Example:
    """An example from its fields in JSON."""
    asked = fields["messages"]
    return Example(**{**fields, "messages": asked if isinstance(asked, str) else tuple(map(tuple, asked))})


if __name__ == "__main__":
    serve(build)
