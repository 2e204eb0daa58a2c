"""What the workbench makes of a config: which engines, where, and when they give their device back."""

from __future__ import annotations

import pytest

from grpo_gsm8k import config, workbench
from grpo_gsm8k.gsm8k.prompts import Renderer
from grpo_gsm8k.trainer.policy import load_model, load_tokenizer


@pytest.mark.parametrize(
    ("learner", "engine", "overlaps", "naps"),
    [
        ("cuda:0", "cuda:0", False, True),
        ("cuda:0", "cuda:0", True, False),  # both work at once
        ("cuda:0", "cuda:1", False, False),
        ("cpu", "cpu", False, False),  # vLLM cannot sleep there, and refuses to start when asked to
    ],
)
def test_an_engine_sleeps_between_calls_only_where_it_shares_a_gpu(
    tiny, tmp_path, monkeypatch, learner, engine, overlaps, naps
):
    seen = []

    class Engine:
        def __init__(self, cfg, renderer, devices, **start):
            seen.append(start["naps"])

        def close(self):
            """Nothing was started."""

    monkeypatch.setattr(workbench, "Engine", Engine)
    monkeypatch.setattr(workbench, "placements", lambda cfg, learner, gpus, ranks: [[engine]])
    monkeypatch.setattr(workbench, "device_name", lambda model: learner)
    cfg = config.build(config.EngineConfig, {"model_id": str(tiny.model), "device": "cpu", "engine": "vllm"})
    with workbench.open_sampler(cfg, load_model(cfg), Renderer(load_tokenizer(cfg)), tmp_path, overlaps):
        assert seen == [naps]
