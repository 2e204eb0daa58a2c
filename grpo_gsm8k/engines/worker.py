"""The engine process: a sampler behind a channel. Started by `engines.process`, never by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo_gsm8k import config
from grpo_gsm8k.config import PolicyConfig
from grpo_gsm8k.datatypes import Request, Sampler, SamplingParams
from grpo_gsm8k.engines import handover
from grpo_gsm8k.engines.channel import Handler, Pulse, serve
from grpo_gsm8k.engines.handover import HandoverError
from grpo_gsm8k.tasks.render import Renderer
from grpo_gsm8k.trainer.adapter import attach
from grpo_gsm8k.trainer.policy import load_model, load_tokenizer


def make_sampler(cfg: PolicyConfig, renderer: Renderer, pulse: Pulse, sleep_when_idle: bool = False) -> Sampler:
    """The engine that the config names, on the devices that this process sees.

    Args:
        sleep_when_idle: give the device back between calls, because the learner is on it too (vLLM only).
    """
    if cfg.uses_vllm:
        from grpo_gsm8k.engines.vllm import VLLMSampler

        return VLLMSampler(cfg, renderer, pulse, sleep_when_idle)
    from grpo_gsm8k.engines.hf import HFSampler

    model = load_model(cfg)
    if cfg.lora_rank:
        attach(model, cfg)
    return HFSampler(model, renderer, cfg.sample_rows, copy_model=False, pulse=pulse)


def take_weights(sampler: Sampler, version: int, sha256: str, where: str) -> dict[str, Any]:
    """Load a hand-over; the answer says what is held now, or why nothing was changed. The sampler checks its hash."""
    try:
        sampler.load(handover.of_json(version, sha256, where))
    except HandoverError as fault:
        return {"refused": str(fault)}
    return {"version": version, "sha256": sha256}


def build(start: Mapping[str, Any], pulse: Pulse) -> dict[str, Handler]:
    """The handlers of a sampling engine. `start`: `cfg`, what `Renderer.as_json` says, `sleep_when_idle`."""
    cfg = config.build(PolicyConfig, start["cfg"])
    sampler = make_sampler(cfg, renderer_of(cfg, start), pulse, start["sleep_when_idle"])

    def sample(requests: list[dict[str, Any]], params: dict[str, Any]) -> dict[str, Any]:
        asked = [Request(tuple(r["token_ids"]), tuple(r["seeds"])) for r in requests]
        drawn = sampler.sample(asked, SamplingParams(**{**params, "stop": tuple(params["stop"])}))
        return {"completions": [[vars(completion) for completion in group] for group in drawn]}

    def score(rows: list[list[int]]) -> dict[str, Any]:
        return {"logprobs": sampler.score(rows)}  # type: ignore[attr-defined]  # asked of vLLM alone

    def load(version: int, sha256: str, where: str) -> dict[str, Any]:
        return take_weights(sampler, version, sha256, where)

    def transfer(method: str, payload: Any = None) -> dict[str, Any]:
        sampler.transfer(method, payload)  # type: ignore[attr-defined]  # asked of vLLM alone
        return {}

    def hold(version: int) -> dict[str, Any]:
        sampler.hold(version)  # type: ignore[attr-defined]
        return {}

    def ping() -> dict[str, Any]:
        return {}

    return {"ping": ping, "sample": sample, "score": score, "load": load, "transfer": transfer, "hold": hold}


def renderer_of(cfg: PolicyConfig, start: Mapping[str, Any]) -> Renderer:
    """The renderer that the parent has: the same tokenizer, task and date."""
    return Renderer.of_json(load_tokenizer(cfg), start)


if __name__ == "__main__":
    serve(build)
