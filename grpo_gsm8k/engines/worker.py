"""The engine process: a sampler behind a channel. Started by `engines.process`, never by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from grpo_gsm8k import config
from grpo_gsm8k.config import PolicyConfig
from grpo_gsm8k.datatypes import Drawer, Problem, Prompt, SamplingParams
from grpo_gsm8k.engines import handover
from grpo_gsm8k.engines.channel import Handler, Pulse, serve
from grpo_gsm8k.engines.handover import Handover, HandoverError
from grpo_gsm8k.tasks.gsm8k.grading import Tags
from grpo_gsm8k.tasks.gsm8k.prompts import Renderer
from grpo_gsm8k.trainer.adapter import attach
from grpo_gsm8k.trainer.policy import load_model, load_tokenizer


class FileSampler(Drawer, Protocol):
    """A sampler that takes its weights from a file: with tensor parallelism several processes read it."""

    def load_file(self, version: int, path: Path) -> None: ...


def make_sampler(cfg: PolicyConfig, renderer: Renderer, pulse: Pulse, naps: bool = False) -> FileSampler:
    """The engine that the config names, on the devices that this process sees.

    Args:
        naps: give the device back between calls, because the learner is on it too (vLLM only).
    """
    if cfg.uses_vllm:
        from grpo_gsm8k.engines.vllm import VLLMSampler

        return VLLMSampler(cfg, renderer, pulse, naps)
    from grpo_gsm8k.engines.hf import HFSampler

    model = load_model(cfg)
    if cfg.lora_rank:
        attach(model, cfg)
    return HFSampler(model, renderer, cfg.sample_rows, copy_model=False, pulse=pulse)


def take_weights(sampler: FileSampler, version: int, path: str, sha256: str) -> dict[str, Any]:
    """Check a hand-over and load it; the answer says what is held now, or why nothing was changed."""
    given = Handover(Path(path), version, sha256)
    try:
        handover.read(given)
    except HandoverError as fault:
        return {"refused": str(fault)}
    sampler.load_file(version, given.path)
    return {"version": version, "sha256": sha256}


def build(start: Mapping[str, Any], pulse: Pulse) -> dict[str, Handler]:
    """The handlers of a sampling engine. `start`: `cfg`, `style`, `tags`, `naps`."""
    cfg = config.build(PolicyConfig, start["cfg"])
    sampler = make_sampler(cfg, renderer_of(cfg, start), pulse, start["naps"])

    def sample(prompts: list[dict[str, Any]], params: dict[str, Any]) -> dict[str, Any]:
        asked = [Prompt(Problem(p["id"], "", "", ""), tuple(p["token_ids"]), p["first_sample"]) for p in prompts]
        drawn = sampler.sample(asked, SamplingParams(**{**params, "stop": tuple(params["stop"])}))
        return {"completions": [[vars(completion) for completion in group] for group in drawn]}

    def load_weights(version: int, path: str, sha256: str) -> dict[str, Any]:
        return take_weights(sampler, version, path, sha256)

    def transfer(method: str, payload: Any = None) -> dict[str, Any]:
        sampler.transfer(method, payload)  # type: ignore[attr-defined]  # asked of vLLM alone
        return {}

    def hold(version: int) -> dict[str, Any]:
        sampler.hold(version)  # type: ignore[attr-defined]
        return {}

    def ping() -> dict[str, Any]:
        return {}

    return {"ping": ping, "sample": sample, "load_weights": load_weights, "transfer": transfer, "hold": hold}


def renderer_of(cfg: PolicyConfig, start: Mapping[str, Any]) -> Renderer:
    """The renderer that the parent has: the same tokenizer, style and tags."""
    return Renderer(load_tokenizer(cfg), start["style"], Tags(**start["tags"]))


if __name__ == "__main__":
    serve(build)
