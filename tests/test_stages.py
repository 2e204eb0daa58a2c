"""SFT, expert iteration, evaluation and the whole pipeline, on a tiny model."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from scipy.stats import binomtest, norm

from grpo_gsm8k import config, ei, fast_eval_vllm, pipeline, sft
from grpo_gsm8k.datatypes import Completion, Prompt, SamplingParams
from grpo_gsm8k.engines import process
from grpo_gsm8k.errors import ConfigError, DataError, RunDirError, UserError
from grpo_gsm8k.evals.accuracy import evaluate
from grpo_gsm8k.evals.stats import bootstrap_mean, compare, pass_at_k, wilson
from grpo_gsm8k.tasks import load_task
from grpo_gsm8k.tasks.base import TaskOptions
from grpo_gsm8k.tasks.render import Renderer
from grpo_gsm8k.trainer.policy import load_tokenizer
from grpo_gsm8k.workbench import open_workbench
from tests.toys import load_problems, stage_config, word_problem


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sft_memorises_a_few_solutions(tiny, tmp_path):
    """The whole stage: after enough passes a tiny model answers what it was shown."""
    data = tmp_path / "data"
    data.mkdir()
    lines = (tiny.data / "val.jsonl").read_text().splitlines(keepends=True)[:4]
    for name in ("train", "val"):
        (data / f"{name}.jsonl").write_text("".join(lines))
    flags = {"model_id": str(tiny.model), "data": str(data), "out_dir": str(tmp_path / "run"), "epochs": 150}
    flags |= {
        "batch_size": 4,
        "lr": 1e-2,
        "max_new_tokens": 128,
        "eval_every": 150,
        "save_every": 150,
        "warmup_steps": 5,
    }
    result = sft.run(stage_config("sft", **flags))
    metrics = rows_of(tmp_path / "run/metrics.jsonl")
    assert metrics[0]["loss"] > 5 and metrics[-1]["loss"] < 0.1
    assert metrics[-1]["val/accuracy"] == 1.0 and metrics[-1]["val/format_accuracy"] == 1.0
    assert result["step"] == 150 and result["examples"] == 4 and result["left_out"] == 0


def test_an_epoch_holds_every_row_once(tiny, tmp_path):
    cfg = stage_config("sft", model_id=str(tiny.model), data=str(tiny.data), out_dir=str(tmp_path / "r"), batch_size=5)
    with open_workbench(cfg, "sft", {}) as bench:
        rows = [bench.renderer.target(problem) for problem in load_problems(tiny.data / "test.jsonl")]
        seen = Counter()

        def forward(data, objective):
            seen.update(row.token_ids for row in data)
            return {"loss": 0.0}

        bench.learner.forward_backward = forward
        per_epoch = sft.updates_per_epoch(len(rows), 5)
        for step in range(1, 2 * per_epoch + 1):
            sft.fit_step(cfg, bench, rows, step, 0.0, seed=0)
            if step == per_epoch:
                assert seen == Counter(row.token_ids for row in rows)
        assert set(seen.values()) == {2}


def test_examples_that_are_too_long_are_left_out_and_counted(tiny, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "1+1?", "response": "2"}, {"prompt": "1+1?", "response": "2 " * 300}]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"model_id": str(tiny.model), "data_path": str(pairs), "eval_set_path": str(tiny.data / "val.jsonl")}
    flags |= {"epochs": 1, "eval_every": 9, "max_length": 64}
    result = sft.run(stage_config("sft", **flags, out_dir=str(tmp_path / "run")))
    assert (result["examples"], result["left_out"]) == (1, 1)
    with pytest.raises(DataError, match="max_length"):
        sft.run(stage_config("sft", **{**flags, "max_length": 4}, out_dir=str(tmp_path / "none")))


class Scripted:
    """A sampler that says what it was told to say."""

    def __init__(self, tokenizer, prompts, texts):
        self.tokenizer, self.texts, self.asked = tokenizer, texts, []
        self.examples = {prompt.token_ids: prompt.example for prompt in prompts}

    def load(self, ref, tensors=None):
        """Nothing to load."""

    def sample(self, requests, params):
        """The scripted texts of each example; a text that ends in … was cut."""
        self.asked.append(params)
        texts = [self.texts(self.examples[request.token_ids])[: len(request.seeds)] for request in requests]
        return [[self.completion(text) for text in each] for each in texts]

    def completion(self, text):
        """A completion whose ids are the text's."""
        ids = tuple(self.tokenizer(text.rstrip("…"), add_special_tokens=False)["input_ids"])
        return Completion(ids, (-1.0,) * len(ids), text.rstrip("…"), "length" if text.endswith("…") else "stop")


def test_expert_iteration_keeps_what_is_right_finished_and_distinct(tiny, tmp_path):
    flags = {"rounds": 1, "steps_per_round": 2, "prompts_per_round": 10, "samples_per_prompt": 6, "batch_size": 4}
    where = {"model_id": str(tiny.model), "data": str(tiny.data), "out_dir": str(tmp_path / "run"), "eval_every": 0}
    cfg = stage_config("ei", **flags, **where)
    with open_workbench(cfg, "ei", {}) as bench:
        right = "work\n#### {0}", "more work\n#### {0}", "#### {0}"
        problems = load_problems(tiny.data / "train.jsonl")
        prompts = bench.prompts(problems, "train")
        bench.sampler = Scripted(
            bench.renderer.tokenizer,
            prompts,
            lambda p: [
                t.format(p.answer) for t in (right[0], right[0], right[1] + "…", "#### 1{0}", right[1], right[2])
            ],
        )
        ei.train(cfg, bench, prompts)
        kept = rows_of(bench.run.path / "rounds/round_01.jsonl")
        gold = {p.id: p.answer for p in problems}
        texts = {(row["id"], row["text"]) for row in kept}
        assert len(kept) == len(texts) == 20  # two of the three right and distinct ones, as drawn
        assert texts == {(i, t.format(gold[i])) for i in {row["id"] for row in kept} for t in right[:2]}
        for row in kept:  # what is trained is what was sampled, after the prompt it was sampled for
            assert (
                bench.renderer.decode([i for i, m in zip(row["token_ids"], row["mask"], strict=True) if m])
                == row["text"]
            )
        first = rows_of(bench.run.path / "metrics.jsonl")[0]
        expected = {"ei/kept": 20, "ei/yield": 20 / 60, "ei/solved_frac": 1.0, "ei/distinct_per_problem": 2.0}
        assert {key: first[key] for key in expected} == pytest.approx(expected)


def test_expert_iteration_in_which_nothing_is_right_trains_nothing_and_says_so(tiny, tmp_path, capsys):
    flags = {"rounds": 2, "steps_per_round": 2, "prompts_per_round": 4, "samples_per_prompt": 2, "eval_every": 0}
    cfg = stage_config("ei", **flags, model_id=str(tiny.model), data=str(tiny.data), out_dir=str(tmp_path / "run"))
    with open_workbench(cfg, "ei", {}) as bench:
        before = {name: w.clone() for name, w in bench.learner.weights()}
        prompts = bench.prompts(load_problems(tiny.data / "train.jsonl"), "train")
        bench.sampler = Scripted(bench.renderer.tokenizer, prompts, lambda p: ["no idea"] * 2)
        ei.train(cfg, bench, prompts)
        assert all((w == before[name]).all() for name, w in bench.learner.weights())
    assert "nothing to learn from" in capsys.readouterr().err


def test_evaluation_by_hand(tiny):
    tokenizer = load_tokenizer(config.build(config.ModelConfig, {"model_id": str(tiny.model)}))
    renderer = Renderer(tokenizer, load_task("gsm8k", TaskOptions("gsm8k", grading="strict")))
    problems = [word_problem(f"p{i}", "q", "#### 7", "7") for i in range(4)]
    said = {"p0": ["#### 7"] * 4, "p1": ["#### 7", "#### 7", "#### 8", "…"], "p2": ["#### 7", "8", "", "9"]}
    prompts = [Prompt(p, (i,)) for i, p in enumerate(problems)]
    sampler = Scripted(renderer.tokenizer, prompts, lambda p: said.get(p.id, ["no"] * 4))
    result = evaluate(sampler, prompts, SamplingParams(8, 1.0), renderer, "abc", samples=4)
    assert result.accuracy == pytest.approx((4 + 2 + 1 + 0) / 16) and result.n == 4
    # pass@2 of 4, 2, 1 and 0 right of four: 1, 1 - 1/6, 1 - 3/6, 0
    assert result.pass_at_k["2"] == pytest.approx((1 + 5 / 6 + 1 / 2) / 4)
    assert result.pass_at_k["4"] == pytest.approx(3 / 4) and set(result.pass_at_k) == {"1", "2", "4"}
    # The majority: of p0 right; of p1 right (7 twice, 8 once); of p2 the only vote is right; of p3 there is none.
    assert result.maj_at_k["4"] == pytest.approx(3 / 4) and result.maj_at_k["1"] == pytest.approx(7 / 16)
    assert result.strict_accuracy == result.accuracy and result.flexible_accuracy == pytest.approx(7 / 16)
    assert result.ci95 == result.intervals["accuracy"] and result.by_seed == {}
    assert result.format_accuracy == pytest.approx((4 + 3 + 1) / 16) and result.truncated == pytest.approx(1 / 16)
    assert [row["sample"] for row in result.rows[:4]] == [0, 1, 2, 3]
    assert {row["weights_sha256"] for row in result.rows} == {"abc"}
    assert result.rows[6]["extracted"] == "8" and not result.rows[6]["correct"]


def test_wilson_by_its_formula():
    z, n, p = norm.ppf(0.975), 600, 30 / 600
    centre, half = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2),
    )
    assert wilson(30, 600) == pytest.approx((centre - half, centre + half), abs=1e-9)
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == 1.0


def test_bootstrap_covers_like_the_normal_interval_and_repeats():
    values = [1.0] * 300 + [0.0] * 700
    low, high = bootstrap_mean(values)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=4e-3)
    assert bootstrap_mean(values) == (low, high)


def test_pass_at_k_is_the_chance_of_a_draw():
    from itertools import combinations

    for right in range(6):
        draws = list(combinations([1] * right + [0] * (5 - right), 3))
        assert pass_at_k(5, right, 3) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_compare_is_exact_mcnemar_and_refuses_other_problems():
    a = {str(i): float(i < 50) for i in range(100)}
    b = {str(i): float(10 <= i < 75) for i in range(100)}
    result = compare(a, b)
    assert (result.won, result.lost, result.n) == (25, 10, 100) and result.difference == pytest.approx(0.15)
    assert result.p_value == pytest.approx(binomtest(10, 35).pvalue)
    assert result.ci95[0] < 0.15 < result.ci95[1]
    with pytest.raises(UserError, match="1 only in B"):
        compare(a, {**b, "101": 1.0})
    assert compare(a, a).p_value == 1.0


def test_eval_command_on_prep_eval_rows(tiny, tmp_path, monkeypatch):
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "1+1?", "gold": "2", "gold_num": 2}\n')
    flags = {"model_id": str(tiny.model), "eval_path": str(path), "out_dir": str(tmp_path), "samples": 2}
    cfg = config.resolve("eval", flags={**flags, "temperature": 1.0, "prompt_style": "gsm8k", "max_new_tokens": 4})
    result = fast_eval_vllm.run(cfg)
    assert result["n"] == 1 and len(rows_of(tmp_path / result["results_path"])) == 2
    monkeypatch.setattr(process, "_installed", lambda name: False)
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        fast_eval_vllm.run(config.resolve("eval", flags={**flags, "engine": "vllm", "temperature": 1.0}))


FEW = ["toy.train=40", "toy.val=6", "toy.test=10", "tiny_model.hidden_size=32", "tiny_model.layers=1"]
FEW += [
    "ei.prompts_per_round=6",
    "grpo.rollouts_per_step=8",
    "grpo.group_size=4",
    "sft.batch_size=8",
    "ei.batch_size=8",
]
FEW += [f"{stage}.max_new_tokens=12" for stage in ("sft", "ei", "grpo", "eval")]


def test_pipeline_stops_goes_on_and_repeats(tmp_path):
    """The same pipeline in one go and in pieces: the same weights, the same answers, one report."""
    results = {}
    for name, stops in {"whole": [""], "pieces": ["base", "sft", "ei", ""]}.items():
        for stop in stops:
            flags = {"out_dir": str(tmp_path / name), "stop_after": stop, "max_steps": 2, "resume": True}
            results[name] = pipeline.run(config.build(config.PipelineConfig, flags), sets=FEW)
    whole, pieces = results["whole"], results["pieces"]
    assert [stage["name"] for stage in whole["stages"]] == ["base", "sft", "ei", "grpo"]
    for a, b in zip(whole["stages"], pieces["stages"], strict=True):
        assert (a["weights_sha256"], a["accuracy"], a["n"]) == (b["weights_sha256"], b["accuracy"], b["n"])
        assert a.keys() >= {"name", "model", "accuracy", "ci95", "n", "seconds"}
    assert (tmp_path / "whole/report.html").is_file() and whole.keys() >= {"run_dir", "data", "seconds", "stages"}
    assert [(c["a"], c["b"]) for c in whole["comparisons"]] == [
        ("base", "sft"),
        ("sft", "ei"),
        ("ei", "grpo"),
        ("sft", "grpo"),
    ]
    test_ids = {row["id"] for row in rows_of(tmp_path / "whole/data/test.jsonl")}
    assert {row["id"] for row in rows_of(tmp_path / "whole/evals/grpo.jsonl")} == test_ids
    with pytest.raises(RunDirError, match="seed: 0 then, 1 now"):
        other = {"out_dir": str(tmp_path / "whole"), "seed": 1, "resume": True}
        pipeline.run(config.build(config.PipelineConfig, other), sets=FEW)
    with pytest.raises(RunDirError, match="exists already"):
        pipeline.run(config.build(config.PipelineConfig, {"out_dir": str(tmp_path / "whole")}), sets=FEW)


@pytest.mark.slow
def test_pipeline_runs_every_stage_on_the_real_questions(gsm8k_dir, tmp_path):
    from grpo_gsm8k.data_prep import prepare

    summary = prepare(tmp_path / "data", str(gsm8k_dir))
    assert (summary.train, summary.val, summary.test) == (6961, 512, 1319)
    flags = {"data": str(tmp_path / "data"), "out_dir": str(tmp_path / "run"), "max_steps": 1}
    sets = [*FEW, "eval.limit=20", "eval.max_new_tokens=8"]
    result = pipeline.run(config.build(config.PipelineConfig, flags), sets=sets)
    assert [stage["accuracy"] for stage in result["stages"]] == [pytest.approx(0, abs=0.11)] * 4
    assert result["data"] == str(tmp_path / "data")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_rewards_do_not_get_there(tmp_path):
    """The control: the demo's own recipe, rewarded by a coin, stays where expert iteration left it."""
    flags = {"out_dir": str(tmp_path / "run"), "seed": 0}
    result = pipeline.run(config.build(config.PipelineConfig, flags), sets=["grpo.reward=random"])
    accuracy = {stage["name"]: stage["accuracy"] for stage in result["stages"]}
    assert accuracy["grpo"] < 0.8 and accuracy["grpo"] < accuracy["ei"] + 0.1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_learns(seed, tmp_path):
    """What the README promises, for three seeds."""
    result = pipeline.run(config.build(config.PipelineConfig, {"out_dir": str(tmp_path / "run"), "seed": seed}))
    accuracy = {stage["name"]: stage["accuracy"] for stage in result["stages"]}
    assert all(stage["n"] >= 500 for stage in result["stages"])
    assert accuracy["base"] <= 0.05 and 0.15 <= accuracy["sft"] <= 0.70 and accuracy["ei"] > accuracy["sft"]
    assert accuracy["grpo"] >= 0.90 and accuracy["grpo"] >= accuracy["sft"] + 0.20
    assert next(c for c in result["comparisons"] if (c["a"], c["b"]) == ("sft", "ei"))["p_value"] < 0.05
