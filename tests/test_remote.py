"""Runs whose learner and sampler are at a training service, through the real client and over real HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from grpo_gsm8k import config, ei, fast_eval_vllm, grpo, pipeline, sft, workbench
from grpo_gsm8k.engines.service import Service
from grpo_gsm8k.errors import ConfigError, ModelError, RefusedError, ServiceError
from grpo_gsm8k.serve import server
from grpo_gsm8k.serve.app import make_app
from grpo_gsm8k.serve.auth import Keeper, hash_of
from grpo_gsm8k.trainer.policy import load_model
from tests.serve_tools import KEY, Process, free_port, settings
from tests.toys import REPOSITORY, cli, stage_config

pytest.importorskip("tinker")

CELLS = 512  # of a microbatch, here and there
SMALL = {"seed": 7, "deterministic": True, "warmup_steps": 0, "lora_rank": 4, "lr": 1e-2, "eval_every": 2}
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (sft.run, {"epochs": 1, "batch_size": 16}),
    "ei": (ei.run, {"rounds": 2, "steps_per_round": 2, "prompts_per_round": 8, "batch_size": 4}),
    "grpo": (grpo.run, {"steps": 2, "rollouts_per_step": 16, "group_size": 4, "reward": "tests.toys:even_tokens"}),
}
CLIPPED = {"minibatches": 2, "epochs": 2, "clip_eps": 0.01, "kl_coef": 0.1, "old_logprobs": "recompute"}
ROWS = "grpo_gsm8k.serve.local:RowSampler"
UNKNOWN_THERE = {"policy/entropy", "policy/top_prob"}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)


@contextmanager
def serving(model: Path, folder: Path, **flags: Any) -> Iterator[str]:
    """The address of a server in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = settings(model, folder, max_tokens_per_microbatch=CELLS, **flags)
    with server.opened(cfg, folder) as service:
        app = make_app(service, Keeper(hash_of(KEY), "s"))
        http = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=http.run, daemon=True)
        thread.start()
        while not http.started:
            time.sleep(0.01)
        port = http.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        http.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def address(tiny, tmp_path_factory):
    with serving(tiny.model, tmp_path_factory.mktemp("service") / "data") as found:
        yield found


def run(name: str, tiny: Any, out: Path, address: str = "", **flags: Any) -> dict[str, Any]:
    """A stage's result; at a service if there is an address."""
    call, own = RUNS[name]
    there = {"learner": "tinker", "base_url": address} if address else {}
    where = {"model_id": str(tiny.model), "data": str(tiny.data), "out_dir": str(out)}
    small = {"max_tokens_per_microbatch": CELLS, **where, **SMALL, **own, **there}
    found: dict[str, Any] = call(stage_config(name, **{**small, **flags}))
    return found


def said(out: Path, *without: str) -> list[dict[str, Any]]:
    """The metrics of a run, but for its speed and what `without` begins them."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    left_out = ("time/", "perf/", "sync/", *UNKNOWN_THERE, *without)
    return [{name: value for name, value in row.items() if not name.startswith(left_out)} for row in rows]


def drawn(out: Path, but: tuple[str, ...] = ("weights_sha256",)) -> dict[str, Any]:
    """Every sample and every row of an evaluation; which weights answered is named otherwise at a service."""
    files = sorted([*out.glob("samples/*.jsonl"), *out.glob("evals/*.jsonl"), *out.glob("rounds/*.jsonl")])
    rows = {f"{path.parent.name}/{path.name}": path.read_text().splitlines() for path in files}
    return {
        name: [{k: v for k, v in json.loads(line).items() if k not in but} for line in lines]
        for name, lines in rows.items()
    }


def same(here: Path, there: Path, *without: str) -> None:
    """Both runs said, drew and learned the same to the last bit."""
    assert said(there, *without) == said(here, *without)
    assert drawn(there) == drawn(here) and drawn(here)
    results = [json.loads((out / "result.json").read_text()) for out in (here, there)]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]


@pytest.fixture
def every_answer_right(monkeypatch):
    monkeypatch.setattr(ei, "keep_right", lambda cfg, group: list(group[:2]))


# ------------------------------------------------------------------------------------------ the same to the bit


def test_grpo_at_a_service_is_grpo_here_to_the_bit(tiny, tmp_path, address):
    """With clipped targets, a KL term, two epochs of two minibatches."""
    run("grpo", tiny, tmp_path / "here", **CLIPPED)
    run("grpo", tiny, tmp_path / "there", address, **CLIPPED)
    assert any(row["policy/clip_frac"] > 0.1 for row in said(tmp_path / "here"))
    same(tmp_path / "here", tmp_path / "there", "mismatch/")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"minibatches": 4, "aggregation": "token"}, {"loss": "gspo", "minibatches": 2}])
def test_sampled_log_probabilities_too_are_the_same_to_the_bit(tiny, tmp_path, address, flags):
    run("grpo", tiny, tmp_path / "here", engine=ROWS, **flags)
    run("grpo", tiny, tmp_path / "there", address, **flags)
    same(tmp_path / "here", tmp_path / "there")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "ei"])
def test_fine_tuning_and_expert_iteration_are_the_same_to_the_bit(name, tiny, tmp_path, address, every_answer_right):
    run(name, tiny, tmp_path / "here")
    run(name, tiny, tmp_path / "there", address)
    same(tmp_path / "here", tmp_path / "there")


@pytest.mark.slow
def test_every_weight_is_trained_to_the_bit_as_here(tiny, tmp_path, address):
    run("sft", tiny, tmp_path / "here", lora_rank=0)
    run("sft", tiny, tmp_path / "there", address, lora_rank=0)
    same(tmp_path / "here", tmp_path / "there")


@pytest.mark.slow
def test_the_services_own_losses_learn_the_same_but_for_rounding(tiny, tmp_path, address):
    flags = {"deterministic": False, "minibatches": 2, "clip_eps": 0.05, "old_logprobs": "recompute"}
    run("grpo", tiny, tmp_path / "here", **flags)
    run("grpo", tiny, tmp_path / "there", address, **flags)
    for mine, theirs in zip(said(tmp_path / "here"), said(tmp_path / "there"), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], abs=1e-5)
        assert theirs["policy/grad_norm"] == pytest.approx(mine["policy/grad_norm"], rel=1e-3)


# ---------------------------------------------------------------------------------------------------- resuming


def test_a_run_that_ended_goes_on_as_if_it_had_not(tiny, tmp_path, address):
    flags = {"old_logprobs": "recompute", "minibatches": 2, "save_every": 1, "keep_last": 1}
    run("grpo", tiny, tmp_path / "whole", address, **flags)
    run("grpo", tiny, tmp_path / "parts", address, **flags, max_steps=1)
    record = json.loads((tmp_path / "parts/checkpoints/step_000001/service.json").read_text())
    assert record["state"].endswith("/weights/step_000001") and record["address"] == address
    run("grpo", tiny, tmp_path / "parts", address, **flags, resume=True)
    same(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(RefusedError, match=r"is not there|no such|unknown|there is no"):  # deleted with its folder
        Service(address).checkpoint(record["state"])


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not(tiny, tmp_path, address):
    flags = {"steps": 6, "save_every": 1, "learner": "tinker", "base_url": address, "lr": "1e-2", "seed": 7}
    flags |= {"model_id": tiny.model, "data": tiny.data, "lora_rank": 4, "prompt_style": "gsm8k", "max_new_tokens": 12}
    flags |= {"rollouts_per_step": 16, "group_size": 4, "reward": "tests.toys:even_tokens", "eval_examples": 4}
    words = ["grpo", "--deterministic", *(f"--{name}={value}" for name, value in flags.items())]
    assert cli(*words, f"--out_dir={tmp_path / 'whole'}").returncode == 0
    out = tmp_path / "killed"
    for step in (1, 3):
        import subprocess
        import sys

        command = [sys.executable, "-m", "grpo_gsm8k.cli", *words, f"--out_dir={out}", "--resume"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not (out / f"checkpoints/step_{step:06d}").is_dir():
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert cli(*words, f"--out_dir={out}", "--resume").returncode == 0
    same(tmp_path / "whole", out)


@pytest.mark.slow
def test_a_server_that_is_killed_costs_the_run_nothing(tiny, tmp_path):
    process = Process(tiny.model, tmp_path / "data", free_port(), max_tokens_per_microbatch=CELLS)
    process.start()
    run("grpo", tiny, tmp_path / "whole", process.url, steps=4)
    log, done = tmp_path / "parts" / "metrics.jsonl", threading.Event()

    def kill() -> None:
        while not log.is_file() or log.read_text().count("\n") < 2:
            time.sleep(0.02)
        process.end()
        process.start()
        done.set()

    threading.Thread(target=kill, daemon=True).start()
    run("grpo", tiny, tmp_path / "parts", process.url, steps=4)
    assert done.wait(300)
    same(tmp_path / "whole", tmp_path / "parts")
    process.end()


# --------------------------------------------------------------------------------- what was trained is used again


def evaluated(tiny: Any, out: Path, **flags: Any) -> tuple[dict[str, Any], list[str]]:
    """An evaluation's summary, and its rows."""
    small = {"eval_path": str(tiny.data / "test.jsonl"), "limit": 4, "max_new_tokens": 8, "prompt_style": "gsm8k"}
    cfg = config.resolve("eval", flags={**small, "out_dir": str(out.parent), "device": "cpu", **flags})
    return fast_eval_vllm.run(cfg, out), out.read_text().splitlines()


def test_a_checkpoint_is_evaluated_and_trained_on_by_its_folder_and_by_its_name(tiny, tmp_path, address):
    first = run("sft", tiny, tmp_path / "sft", address, max_steps=1)
    record = json.loads((Path(first["model"]) / "service.json").read_text())
    assert record["weights_sha256"] == first["weights_sha256"] and len(first["weights_sha256"]) == 64
    named = {"tokenizer_id": str(tiny.model), "base_url": address}
    models = ({"model_id": first["model"]}, *({"model_id": record[key], **named} for key in ("sampler", "state")))
    found = [evaluated(tiny, tmp_path / f"{number}.jsonl", **flags) for number, flags in enumerate(models)]
    assert found[0][1] == found[1][1] == found[2][1] and len(found[0][1]) == 4
    assert {summary["weights_sha256"] for summary, _ in found} == {first["weights_sha256"]}
    second = run("grpo", tiny, tmp_path / "grpo", address, model_id=record["state"], **named, lora_rank=0, max_steps=1)
    after = json.loads((Path(second["model"]) / "service.json").read_text())
    assert after["origin"] == record["state"] and after["lora_rank"] == 4


def test_the_base_model_is_evaluated_there_too(tiny, tmp_path, address):
    model = {"model_id": str(tiny.model)}
    _, here = evaluated(tiny, tmp_path / "here.jsonl", **model)
    _, there = evaluated(tiny, tmp_path / "there.jsonl", **model, engine="tinker", base_url=address)
    assert [json.loads(line)["response"] for line in here] == [json.loads(line)["response"] for line in there]


def test_weights_at_a_service_are_not_loaded_here(tmp_path):
    cfg = config.build(config.ModelConfig, {"model_id": "tinker://run/weights/x"})
    for call in (load_model, lambda cfg: workbench.merge(cfg, tmp_path / "out")):
        with pytest.raises(ModelError, match="tinker://run/weights/x: its weights are at a training service"):
            call(cfg)


# ------------------------------------------------------------------------------------------------ all the stages

STEPS = ["sft.max_steps=2", "sft.batch_size=4", "grpo.steps=2", "grpo.rollouts_per_step=8", "grpo.group_size=4"]
STEPS += ["common.max_new_tokens=12", "common.eval_examples=4", "eval.limit=4", "common.lr=1e-3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "more", "stages"),
    [
        ("gsm8k", ["ei.prompts_per_round=8", "ei.steps_per_round=1"], ["base", "sft", "ei", "grpo"]),
        ("chat", ["grpo.algorithm=ppo"], ["base", "sft", "grpo"]),
    ],
)
def test_a_pipeline_trains_stage_after_stage_at_the_service(task, more, stages, tiny, tmp_path, address):
    """`--learner tinker` alone: each stage goes on from the weights of the one before."""
    data = tiny.data if task == "gsm8k" else REPOSITORY / "examples" / "chat.jsonl"
    flags = {"task": task, "data": str(data), "model_id": str(tiny.model), "out_dir": str(tmp_path / "all")}
    there = {"learner": "tinker", "base_url": address, "lora_rank": 4}
    cfg = config.build(config.PipelineConfig, {**flags, **there})
    found = pipeline.run(cfg, None, [*STEPS, *more])
    assert [row["name"] for row in found["stages"]] == stages
    records = [
        json.loads((Path(row["model"]) / "service.json").read_text())
        for row in found["stages"]
        if row["name"] != "base"
    ]
    assert [record["origin"] for record in records] == ["", *(record["state"] for record in records[:-1])]
    assert [row["weights_sha256"] for row in found["stages"][1:]] == [record["weights_sha256"] for record in records]
    assert Path(found["report"]).is_file()


def test_a_pipeline_at_a_service_needs_a_models_name():
    cfg = config.build(config.PipelineConfig, {"preset": "tiny", "learner": "tinker"})
    with pytest.raises(ConfigError, match="a training service has models of its own; name one with --model_id"):
        pipeline.run(cfg)


# ----------------------------------------------------------------------------------------------------- mistakes


def test_what_is_wrong_with_the_service_is_one_line_and_leaves_no_run(tiny, tmp_path, address, monkeypatch):
    port = free_port()
    for where, error, words in (
        (f"http://127.0.0.1:{port}", ServiceError, f"http://127.0.0.1:{port}: no training service answers there"),
        ("ftp://there", ConfigError, "--base_url ftp://there: must read http://HOST:PORT"),
    ):
        with pytest.raises(error, match=words):
            run("sft", tiny, tmp_path / "run", where)
    with pytest.raises(ConfigError, match="--learner tinker does not take --lora_alpha 8"):
        run("sft", tiny, tmp_path / "run", address, lora_alpha=8)
    with pytest.raises(RefusedError, match="lora rank 4000"):
        run("sft", tiny, tmp_path / "run", address, lora_rank=4000)
    monkeypatch.setenv("TINKER_API_KEY", "tml-wrong")
    with pytest.raises((RefusedError, ServiceError), match=r"(?i)key"):
        run("sft", tiny, tmp_path / "run", address)
    monkeypatch.delenv("TINKER_API_KEY")
    with pytest.raises(ConfigError, match="environment variable TINKER_API_KEY"):
        run("sft", tiny, tmp_path / "run", address)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("tinker://x", ModelError, "must read tinker://RUN/weights/NAME"),
        ("tinker://nobody/weights/x", RefusedError, "tinker://nobody/weights/x"),
    ],
)
def test_a_name_that_is_none_or_nobodys(tiny, tmp_path, address, name, error, words):
    with pytest.raises(error, match=words):
        evaluated(tiny, tmp_path / "x.jsonl", model_id=name, tokenizer_id=str(tiny.model), base_url=address)
