"""GRPO with toys: groups, resampling, truncation, several updates per rollout, and the whole loop."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import threading
import traceback
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from grpo_gsm8k import config, grpo, rollout
from grpo_gsm8k.config import GrpoConfig
from grpo_gsm8k.datatypes import Completion, Grade, Prompt, Rollout, Trajectory
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.errors import ConfigError, EngineError, NonFiniteError
from grpo_gsm8k.repro import derive_seed
from grpo_gsm8k.rollout import rollout_metrics
from grpo_gsm8k.tasks import load_task
from grpo_gsm8k.tasks.rewards import Grader, make_reward, overlong_penalty
from grpo_gsm8k.trainer import checkpoint, loop
from grpo_gsm8k.trainer.batch import make_batch
from grpo_gsm8k.trainer.data import ImportanceCorrection, mismatch_metrics, weighted, with_old_logprobs
from grpo_gsm8k.trainer.losses import GrpoClip, Gspo, Objective, per_token_loss
from grpo_gsm8k.workbench import open_workbench
from tests.toys import datum, draw, even_tokens, graded, load_split, stage_config, with_advantage, word_problem


def made(group: int, reward: float, n: int = 3, finish="stop", correct=False, format_ok=True) -> Rollout:
    prompt = Prompt(word_problem(f"p{group}", "q", "#### 1", "1"), (1, 2))
    completion = Completion(tuple(range(3, 3 + n)), (-1.0,) * n, "text", finish)
    grade = Grade(reward, {"answer": reward}, correct, format_ok)
    return Rollout(Trajectory.of(prompt, completion), grade)


@pytest.fixture
def bench_of(tiny, tmp_path):
    """A workbench for GRPO on the tiny model; flags change its config."""
    numbers = itertools.count()
    with contextlib.ExitStack() as opened:

        def make(**flags):
            small = {"rollouts_per_step": 8, "group_size": 4, "steps": 3, "eval_every": 0, "save_every": 1}
            small |= {"lr": 1e-3, "out_dir": str(tmp_path / f"run{next(numbers)}")}
            where = {"model_id": str(tiny.model), "data": str(tiny.data)}
            cfg = stage_config("grpo", **(small | where | flags))
            bench = opened.enter_context(open_workbench(cfg, "grpo", {"train": tiny.data / "train.jsonl"}))
            return cfg, bench, bench.prompts(load_split(tiny.data, "train"), tiny.data)

        yield make


def metrics_of(bench):
    return [json.loads(line) for line in (bench.run.path / "metrics.jsonl").read_text().splitlines()]


def test_advantages_follow_the_group_whatever_its_prompt():
    """Search-R1#88: groups were told apart by the text of the prompt. Here they are lists, and stay so."""
    cfg = stage_config("grpo")
    rewards = [[1.0, 0.0, 0.0, 0.5], [0.2, 0.4, 0.6, 0.8], [0.3] * 4]
    groups = [[made(g, r) for r in rs] for g, rs in enumerate(rewards)]
    twins = [[made(0, r) for r in rs] for rs in rewards]  # the same problem in every group
    for variant in (groups, twins):
        found = [[r.advantage for r in group] for group in grpo.with_advantages(cfg, variant)]
        assert found == [grpo.group_advantages(rs) for rs in rewards] and found[2] == [0.0] * 4


def test_the_baseline_is_the_configured_one():
    group = [made(0, reward) for reward in (1.0, 0.0, 0.5)]
    cfg = stage_config("grpo", baseline="leave_one_out", std_norm=False)
    (found,) = grpo.with_advantages(cfg, [group])
    assert [r.advantage for r in found] == pytest.approx([0.75, -0.75, 0.0])


def test_token_rows_hold_the_sampled_ids_and_log_probabilities():
    cfg = stage_config("grpo")
    row = grpo.datum(cfg, replace(made(0, 1.0), advantage=0.5))
    assert row.token_ids == (1, 2, 3, 4, 5)
    assert row.mask == (0, 0, 1, 1, 1)
    assert row.logprobs == (0, 0, -1.0, -1.0, -1.0)
    assert row.advantages == (0, 0, 0.5, 0.5, 0.5)


def test_truncated_completions_are_left_out_by_choice_only():
    cut = made(0, 1.0, finish="length")
    assert grpo.datum(stage_config("grpo"), cut) is not None
    assert grpo.datum(stage_config("grpo", mask_truncated=True), cut) is None
    assert grpo.datum(stage_config("grpo", mask_truncated=True), made(0, 1.0)) is not None


def test_outcomes_partition_the_rollouts_by_hand():
    metrics = rollout_metrics(
        [
            [made(0, 1.0, n=2, correct=True), made(0, 0.2, n=4)],
            [made(1, 0.0, n=9, finish="length", format_ok=False), made(1, 0.0, n=5, format_ok=False)],
        ]
    )
    expected = {
        "outcome/right_frac": 0.25,
        "outcome/wrong_frac": 0.25,
        "outcome/truncated_frac": 0.25,
        "outcome/format_error_frac": 0.25,
        "groups/zero_std_frac": 0.5,
        "groups/all_wrong_frac": 0.5,
        "groups/all_right_frac": 0.0,
        "length/mean": 5.0,
        "length/terminated_mean": 11 / 3,
        "length/right_mean": 2.0,
        "length/wrong_mean": 6.0,
        "length/clipped_frac": 0.25,
        "reward/mean": 0.3,
        "reward/answer": 0.3,
        "reward/min": 0.0,
        "reward/max": 1.0,
    }
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)


def test_prompts_come_once_per_epoch_in_a_fresh_order():
    prompts = [Prompt(word_problem(str(i), "q", "", "1"), (i,)) for i in range(7)]
    drawn = [rollout.prompt_at(prompts, k, seed=3).token_ids[0] for k in range(21)]
    epochs = [drawn[:7], drawn[7:14], drawn[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert drawn == [rollout.prompt_at(prompts, k, seed=3).token_ids[0] for k in range(21)]


def test_the_clip_bites_only_from_the_second_update_on(bench_of):
    """`old = live.detach()` never clips; ours keeps the sampled ones through every epoch."""
    cfg, bench, prompts = bench_of(epochs=1, steps=1, lr=0.05)
    grpo.train(cfg, bench, prompts, graded(bench, even_tokens))
    cfg2, bench2, prompts = bench_of(epochs=3, steps=1, lr=0.05)
    grpo.train(cfg2, bench2, prompts, graded(bench2, even_tokens))
    one, three = metrics_of(bench)[0], metrics_of(bench2)[0]
    assert one["policy/clip_frac"] == 0.0 and one["mismatch/logp_abs_max"] < 1e-4
    assert three["policy/clip_frac"] > 0.0
    assert three["mismatch/logp_abs_max"] < 1e-4  # of the first update, where nothing has moved yet


def test_recomputed_old_logprobs_agree_with_the_sampled_ones(bench_of):
    results = []
    for how in ("sampler", "recompute"):
        cfg, bench, prompts = bench_of(old_logprobs=how, epochs=2, temperature=0.7)
        grpo.train(cfg, bench, prompts, graded(bench, even_tokens))
        results.append([row["loss"] for row in metrics_of(bench)])
    assert results[0] == pytest.approx(results[1], abs=1e-4)


def test_minibatches_cover_every_rollout_once_per_epoch(bench_of):
    cfg, bench, _prompts = bench_of(minibatches=3, epochs=2)
    data = [grpo.datum(cfg, made(0, 1.0, n=n)) for n in range(1, 9)]
    seen = []
    learn = bench.learner.forward_backward
    bench.learner.forward_backward = lambda part, objective: (seen.append(part), learn(part, objective))[1]
    grpo.update(cfg, bench, data, step=1)
    assert [len(b) for b in seen] == [3, 3, 2, 3, 3, 2]
    lengths = [sorted(len(row.token_ids) for b in half for row in b) for half in (seen[:3], seen[3:])]
    assert lengths[0] == lengths[1] == [len(r.token_ids) for r in data]


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize(("rows", "asked", "sizes"), [(9, 4, [3, 2, 2, 2]), (3, 4, [1, 1, 1]), (8, 2, [4, 4])])
def test_every_row_weighs_alike_over_a_pass(bench_of, aggregation, rows, asked, sizes):
    """Nine rows in four minibatches made three updates, ten made a last one of a single row."""
    cfg, bench, _prompts = bench_of(minibatches=asked, epochs=3, aggregation=aggregation)
    data = [grpo.datum(cfg, made(0, 1.0, n=n)) for n in range(1, rows + 1)]
    whole, _ = grpo.whole_pass(cfg, bench.learner, data, step=1)
    parts = list(grpo.minibatches(cfg, whole, step=1))
    assert [len(part) for part in parts] == sizes * 3
    lengths = [sum(row.mask) for row in data]
    share = {"sequence": lambda n: 1 / rows, "token": lambda n: n / sum(lengths)}
    share["constant"] = lambda n: n / cfg.max_new_tokens / rows
    expected = {n: share[aggregation](n) for n in lengths}
    passes = [parts[i : i + len(sizes)] for i in range(0, len(parts), len(sizes))]
    for one in passes:
        found = {sum(row.mask): sum(row.weights) / len(sizes) for part in one for row in part}
        assert found == pytest.approx(expected)
    assert len({tuple(row.token_ids for part in one for row in part) for one in passes}) == 3  # reshuffled each epoch
    assert list(grpo.minibatches(cfg, whole, step=1)) == parts


def test_more_groups_than_prompts_and_an_epochs_edge_draw_other_completions(bench_of):
    cfg, bench, prompts = bench_of(rollouts_per_step=24)
    again = [rollout.collect(cfg, bench, prompts[:4], graded(bench, even_tokens), 1, 2).groups for _ in range(2)]
    found = [r.trajectory for group in again[0] for r in group]
    assert again[0] == again[1] and len(found) == 24 and len({t.seed for t in found}) == 24
    by_prompt = {}
    for t in found:
        by_prompt.setdefault(t.prompt.example.id, []).append(t)
    params, seed = rollout.sampling_params(cfg, bench), derive_seed(cfg.seed, "grpo", 1, 0)
    for key, drawn in by_prompt.items():  # as if they had been asked for at once
        (prompt,) = (p for p in prompts if p.example.id == key)
        (together,) = draw(bench.sampler, [prompt], params, len(drawn), seed)
        assert [c.token_ids for c in together] == [t.token_ids for t in drawn]


def test_groups_without_variance_are_replaced_and_nothing_is_drawn_twice(bench_of):
    cfg, bench, prompts = bench_of(resample_zero_variance=3, rollouts_per_step=16)
    flat = {prompt.example.id for prompt in prompts[::2]}

    def reward(completion, example):
        return 1.0 if example.id in flat else even_tokens(completion, example)

    collected = rollout.collect(cfg, bench, prompts, graded(bench, reward), 1, 0)
    ids = [{r.trajectory.prompt.example.id for r in group} for group in collected.groups]
    assert [len(group) for group in collected.groups] == [4] * 4 and all(len(one) == 1 for one in ids)
    chosen = set.union(*ids)
    assert len(chosen) == 4 and not flat & chosen
    drawn = [rollout.prompt_at(prompts, k, cfg.seed).example.id for k in range(collected.cursor)]
    assert len(set(drawn)) == len(drawn) and chosen <= set(drawn)


def test_when_every_group_is_flat_the_step_goes_on_and_learns_nothing(bench_of):
    cfg, bench, prompts = bench_of(resample_zero_variance=1, steps=1)
    weights = {name: w.clone() for name, w in bench.learner.weights()}
    grpo.train(cfg, bench, prompts, graded(bench, lambda completion, example: 0.1 + 0.2))
    assert all((w == weights[name]).all() for name, w in bench.learner.weights())
    row = metrics_of(bench)[0]
    assert row["groups/zero_std_frac"] == 1.0 and row["policy/grad_norm"] == 0.0 and row["reward/mean"] == 0.1 + 0.2


def test_a_reward_on_ids_is_learned(bench_of):
    """The loop climbs a reward that a random model can change at once."""
    cfg, bench, prompts = bench_of(steps=12, rollouts_per_step=32, group_size=8, lr=2e-2, max_new_tokens=8)
    grpo.train(cfg, bench, prompts, graded(bench, even_tokens))
    rewards = [row["reward/mean"] for row in metrics_of(bench)]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.2, rewards


def test_metrics_carry_the_names_that_are_relied_upon(bench_of):
    cfg, bench, prompts = bench_of(steps=2, eval_every=1)
    grpo.train(cfg, bench, prompts, graded(bench))
    names = set(metrics_of(bench)[-1])
    times = {f"time/{t}" for t in ("save_weights", "sampling", "compute_rewards", "build_data", "training", "total")}
    assert names >= times | {"progress/grpo_step", "progress/done_frac", "val/accuracy", "val/format_accuracy"}
    assert names >= {f"reward/{r}" for r in ("mean", "std", "min", "max", "format", "answer")}
    assert names >= {"policy/entropy", "policy/grad_norm", "policy/lr", "policy/approx_kl", "policy/update_to_weight"}
    assert names >= {"mismatch/logp_abs_mean", "mismatch/logp_abs_max", "mismatch/ess", "groups/zero_std_frac"}


def test_evaluation_records_carry_the_hash_of_the_weights_of_their_step(bench_of):
    from grpo_gsm8k.trainer.policy import weights_sha256

    cfg, bench, prompts = bench_of(steps=2, eval_every=1, keep_last=5)
    seen = {}
    validate = bench.validate

    def watched(step, total, metrics):
        seen[step] = weights_sha256(bench.learner.weights())
        validate(step, total, metrics)

    bench.validate = watched
    grpo.train(cfg, bench, prompts, graded(bench, even_tokens))
    assert len(set(seen.values())) == 2
    for step, digest in seen.items():
        rows = [json.loads(line) for line in (bench.run.path / f"evals/step_{step:06d}.jsonl").read_text().splitlines()]
        assert {row["weights_sha256"] for row in rows} == {digest}
        from transformers import AutoModelForCausalLM

        stored = AutoModelForCausalLM.from_pretrained(bench.run.checkpoints / f"step_{step:06d}")
        assert weights_sha256(stored.named_parameters()) == digest


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"rollouts_per_step": 10, "group_size": 4}, "multiple"),
        ({"rollouts_per_step": 4, "group_size": 1}, "group_size"),
        ({"top_p": 0.9}, "top_p"),
        ({"temperature": 0.0}, "temperature"),
        ({"baseline": "none"}, "--no_std_norm"),
        ({"dual_clip": 1.1}, "above the clip"),
        ({"dual_clip": 1.25, "clip_eps_high": 0.28}, "above the clip"),
        ({"dual_clip": 3.0, "loss": "cispo"}, "cispo"),
        ({"kl_coef": -0.1}, "at least 0"),
        ({"kl_coef": 0.1, "kl_estimator": "k1", "kl_bias_correction": False}, "nothing"),
        ({"overlong_buffer": 4096.0}, "share"),
    ],
)
def test_settings_that_cannot_mean_what_they_say_are_refused(flags, word):
    with pytest.raises(ConfigError, match=word):
        grpo.check(stage_config("grpo", **flags))


def test_few_calls_lie_between_a_run_and_its_loss(bench_of, monkeypatch):
    """The path to read, `--head plain`: from `grpo.run` to the loss at most 10 calls within the package."""

    class Traced(GrpoClip):
        def __call__(self, logp, batch):
            frames = [f for f in traceback.extract_stack() if "/grpo_gsm8k/" in f.filename]
            hops.append([f.name for f in frames[next(i for i, f in enumerate(frames) if f.name == "train") :]])
            return super().__call__(logp, batch)

    hops: list[list[str]] = []
    cfg, bench, prompts = bench_of(steps=1, head="plain")
    monkeypatch.setattr(grpo, "make_loss", lambda spec, settings: Traced())
    grpo.train(cfg, bench, prompts, graded(bench, even_tokens))
    path = ["train", "update", "update", "forward_backward", "_passes", "_pass", "update_loss", "per_token_loss"]
    assert [name for name in hops[0] if not name.startswith("<")] == path  # run calls train, the last one the loss
    assert 1 + len(hops[0]) + 1 <= 11, hops[0]  # 11 functions, 10 calls


def test_settings_reach_the_objective(bench_of):
    settings = {"clip_eps": 0.1, "clip_eps_high": 0.4, "temperature": 0.7, "dual_clip": 2.0}
    settings |= {"loss": "gspo", "kl_coef": 0.25, "kl_estimator": "k2", "kl_bias_correction": False}
    settings |= {"importance_correction": "mask", "importance_cap": 3.0, "importance_cap_low": 0.25}
    settings |= {"entropy_coef": 0.01}
    cfg, bench, prompts = bench_of(steps=1, old_logprobs="recompute", **settings)
    seen, forward = [], bench.learner.forward_backward
    bench.learner.forward_backward = lambda batch, objective: (seen.append(objective), forward(batch, objective))[1]
    grpo.train(cfg, bench, prompts, graded(bench, even_tokens))
    clip = {key: settings.pop(key) for key in ("clip_eps", "clip_eps_high", "dual_clip")}
    del settings["loss"]
    correction = ImportanceCorrection(settings.pop("importance_correction"), settings.pop("importance_cap"), 0.25)
    settings.pop("importance_cap_low")
    assert vars(seen[0]) == settings | {"on_policy": True, "loss": Gspo(**clip), "correction": correction}


def test_without_a_baseline_a_group_may_be_of_one():
    grpo.check(stage_config("grpo", rollouts_per_step=4, group_size=1, baseline="none", std_norm=False))


ALIKE = ("luspo", "sapo")  # whose parts the others have, too
LEARNING = [pytest.param(a, marks=pytest.mark.slow) if a in ALIKE else a for a in config.ALGORITHMS]


@pytest.mark.parametrize("algorithm", LEARNING)
def test_every_algorithm_learns(bench_of, algorithm):
    """Several updates a step, so that ratios are not 1; the KL, where there is one, counts."""
    sizes = {"steps": 6, "rollouts_per_step": 64, "group_size": 8, "max_new_tokens": 6, "minibatches": 2}
    cfg, bench, prompts = bench_of(algorithm=algorithm, lr=2e-2, **sizes)
    grpo.train(cfg, bench, prompts, graded(bench, even_tokens))
    rows = metrics_of(bench)
    assert rows[-1]["reward/mean"] > rows[0]["reward/mean"] + 0.1, [row["reward/mean"] for row in rows]
    assert ("policy/kl_ref" in rows[0]) == (cfg.kl_coef > 0)


def test_with_equal_rewards_the_loss_is_the_kl_to_where_the_run_began(bench_of):
    """Equal rewards leave the KL alone: 0 at the start, and coefficient times KL once the weights have moved."""
    cfg, bench, prompts = bench_of(kl_coef=2.0, aggregation="token", steps=2, lr=0.0)
    log = bench.run.log

    def move_after_the_first_step(step, metrics):
        log(step, metrics)
        with torch.no_grad():
            for i, (_, weight) in enumerate(bench.learner.weights()):
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))

    bench.run.log = move_after_the_first_step
    grpo.train(cfg, bench, prompts, graded(bench, lambda completion, example: 1.0))
    first, second = metrics_of(bench)
    assert first["policy/kl_ref"] == pytest.approx(0.0, abs=1e-6)
    assert second["policy/kl_ref"] > 0.05 and second["policy/grad_norm"] > 0.01
    assert second["loss"] == pytest.approx(2.0 * second["policy/kl_ref"], rel=1e-4)


def test_a_loss_that_is_no_number_keeps_the_batch_and_the_last_checkpoint(bench_of, monkeypatch):
    from safetensors.torch import load_file

    cfg, bench, prompts = bench_of(steps=4)
    calls = itertools.count()
    whole = grpo.whole_pass

    def poisoned(*args):
        (first, *rest), mismatch = whole(*args)
        return [with_advantage(first, math.nan) if next(calls) == 2 else first, *rest], mismatch

    monkeypatch.setattr(grpo, "whole_pass", poisoned)
    with pytest.raises(NonFiniteError, match="step 3"):
        grpo.train(cfg, bench, prompts, graded(bench, even_tokens))
    kept = load_file(bench.run.path / "nonfinite_step_000003.safetensors")
    assert kept["advantages"].isnan().any() and kept["input_ids"].shape == kept["mask"].shape
    bench.run.writer.wait()  # as the command does on its way out
    folder, state = checkpoint.newest(bench.run.checkpoints, print)
    assert state["step"] == 2 and checkpoint.verify(folder)


def one(text="", tokens=2, seed=0, id="p"):
    """A group of one trajectory."""
    completion = Completion((7,) * tokens, (0.0,) * tokens, text, "stop", seed=seed)
    return [Trajectory.of(Prompt(word_problem(id, "q", "#### 1", "1"), (1, 2)), completion)]


def grade_of(group, reward, **more):
    """The grade of the one trajectory of a group."""
    ((found,),) = Grader(load_task("gsm8k"), reward, **more).grade([group])
    return found


def test_random_reward_is_a_fair_coin_that_sees_no_text():
    groups = [one(text, seed=s) for s in range(4000) for text in ("right", "wrong")]
    values = [g.reward for (g,) in Grader(load_task("gsm8k"), make_reward("random")).grade(groups)]
    assert values[::2] == values[1::2]
    assert abs(sum(values) / len(values) - 0.5) < 0.03


@pytest.mark.parametrize(("tokens", "penalty"), [(1, 0.0), (15, 0.0), (16, -0.2), (18, -0.6), (20, -1.0), (25, -1.0)])
def test_overlong_penalty_by_hand(tokens, penalty):
    """arXiv 2503.14476 eq. 13 with L_max = 20, L_cache = 5."""
    parts = {"answer": 0.8, "format": 0.2}
    found = grade_of(one(tokens=tokens), lambda completion, example: parts, overlong=(20, 5))
    assert found == overlong_penalty(grade_of(one(tokens=tokens), lambda c, e: parts), tokens, 20, 5)
    assert found.components == pytest.approx({**parts, "overlong": penalty})
    assert found.reward == pytest.approx(1.0 + penalty)


def test_the_command_lays_the_overlong_penalty_over_any_reward(tiny, tmp_path):
    where = {"model_id": str(tiny.model), "data": str(tiny.data), "out_dir": str(tmp_path / "run")}
    sizes = {"rollouts_per_step": 8, "group_size": 4, "steps": 1, "eval_every": 0, "max_new_tokens": 8}
    grpo.run(stage_config("grpo", **where, **sizes, reward="tests.toys:even_tokens", overlong_buffer=0.5))
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert row["reward/mean"] == pytest.approx(row["reward/reward"] + row["reward/overlong"])
    assert row["reward/overlong"] < 0  # a random model seldom ends


def test_a_users_own_reward(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def short(completion, example):\n    return {'short': 1.0 / len(completion.token_ids), 'x': 0.5}\n"
        "def broken(completion, example):\n    return float('nan')\n"
    )
    monkeypatch.chdir(tmp_path)
    found = grade_of(one("#### 1"), make_reward("my_rewards:short"))
    assert (found.reward, found.components, found.correct) == (1.0, {"short": 0.5, "x": 0.5}, True)
    with pytest.raises(ConfigError, match="p7"):
        grade_of(one(id="p7"), make_reward("my_rewards:broken"))
    for spec in ("my_rewards:nothing", "no_such_module:f", "defualt", "my_rewards:"):
        with pytest.raises(ConfigError, match="reward"):
            make_reward(spec)


# ------------------------------------------------------------------------------------------- one step off-policy


def test_one_step_off_trains_on_what_the_weights_of_one_update_before_drew(bench_of, tiny):
    """The rollouts of step k are those that the checkpoint of k - 2 updates draws (of step 1: the first weights)."""
    steps = 4
    cfg, bench, prompts = bench_of(mode="one_step_off", steps=steps, eval_every=1, keep_last=10, lr=1e-2)
    grpo.train(cfg, bench, prompts, graded(bench, even_tokens))
    rows = metrics_of(bench)
    assert [row["staleness/max"] for row in rows] == [0, 1, 1, 1]
    for step in range(1, steps + 1):
        version = max(step - 2, 0)
        folder = bench.run.checkpoints / f"step_{version:06d}" if version else tiny.model
        from transformers import AutoModelForCausalLM

        sampler = HFSampler(AutoModelForCausalLM.from_pretrained(folder), bench.renderer)
        asked = [rollout.prompt_at(prompts, 2 * (step - 1) + i, cfg.seed) for i in range(2)]
        seed = derive_seed(cfg.seed, "grpo", step, 0)
        drawn = draw(sampler, asked, rollout.sampling_params(cfg, bench), 4, seed)
        stored = [
            json.loads(line) for line in (bench.run.path / f"samples/step_{step:06d}.jsonl").read_text().splitlines()
        ]
        assert [row["response"] for row in stored] == [c.text for group in drawn for c in group]
        assert {row["policy_version"] for row in stored} == {version}


def test_sampling_ahead_goes_on_while_the_learner_updates(bench_of):
    """The sampler of step 2 does not return before the update of step 1 has run: in turns, this would never end."""
    cfg, bench, prompts = bench_of(mode="one_step_off", steps=2)
    sample, learn, updated = bench.sampler.sample, bench.learner.forward_backward, threading.Event()
    calls = []

    def slow_sample(asked, params):
        calls.append(asked[0].seeds)
        if len(calls) == 2:
            assert updated.wait(30), "the learner waited for the sampler"
        return sample(asked, params)

    def watched_learn(batch, objective):
        updated.set()
        return learn(batch, objective)

    bench.sampler.sample, bench.learner.forward_backward = slow_sample, watched_learn
    grpo.train(cfg, bench, prompts, graded(bench, even_tokens))
    assert len(calls) == 2


def test_rollouts_that_are_older_than_the_mode_allows_stop_the_run(bench_of):
    for mode, versions in (("on_policy", {1: 0, 2: 0}), ("one_step_off", {1: 0, 2: 0, 3: 0})):
        cfg, bench, prompts = bench_of(mode=mode, steps=5)
        bench.sampler.load = lambda ref, tensors: None  # a sync that does not arrive
        with pytest.raises(EngineError, match="updates old"):
            grpo.train(cfg, bench, prompts, graded(bench, even_tokens))
        assert len(metrics_of(bench)) == len(versions) - 1


def test_when_the_engine_fails_for_good_the_last_complete_step_is_kept(bench_of, tiny):
    flags = {"steps": 5, "save_every": 100, "lr": 1e-2}
    for mode in ("on_policy", "one_step_off"):
        cfg, bench, prompts = bench_of(mode=mode, **flags)
        sample, calls = bench.sampler.sample, []

        def failing(asked, params, sample=sample, calls=calls):
            calls.append(params)
            if len(calls) == 4:
                raise EngineError("the engine failed 3 times in a row")
            return sample(asked, params)

        bench.sampler.sample = failing
        out = bench.run.path
        with pytest.raises(EngineError), open_again(bench):
            grpo.train(cfg, bench, prompts, graded(bench, even_tokens))
        _, state = checkpoint.newest(bench.run.checkpoints, print)
        assert state["step"] == 3 and [row["step"] for row in metrics_of(bench)] == [1, 2, 3]
        assert out.is_dir()


@contextlib.contextmanager
def open_again(bench):
    """What `open_workbench` does when an engine fails, for a bench that is closed only later."""
    try:
        yield
    except EngineError:
        loop.rescue(bench.run, bench.learner)
        raise


# --------------------------------------------------------------------------------------- importance correction


def test_importance_correction_by_hand():
    """Four tokens whose trainer probability is 0.5, 1, 3 and 10 times the sampler's; the cap is 2."""
    ratios = [0.4, 1.0, 3.0, 10.0]
    rows = [datum((1, 2, 3, 4, 5), (0, 1, 1, 1, 1), (0.0, -1.0, -2.0, -3.0, -4.0), 1.0)]
    data = weighted(rows, "token")
    trainer = [(0.0, *(p + math.log(ratio) for p, ratio in zip(rows[0].logprobs[1:], ratios, strict=True)))]
    kinds = ("none", "truncate", "mask")
    found = {kind: with_old_logprobs(data, trainer, ImportanceCorrection(kind))[0] for kind in kinds}
    assert found["none"].weights == pytest.approx([0.0] + [0.25] * 4)
    assert found["truncate"].weights == pytest.approx([0.0, 0.1, 0.25, 0.5, 0.5])
    assert found["mask"].weights == pytest.approx([0.0, 0.0, 0.25, 0.0, 0.0])
    assert found["truncate"].logprobs == trainer[0]  # the objective's ratio no longer sees the sampler
    found = mismatch_metrics(data, trainer, ImportanceCorrection("truncate", 2.0))
    assert found["mismatch/ratio_mean"] == pytest.approx(3.6) and found["mismatch/ratio_max"] == pytest.approx(10.0)
    assert found["mismatch/ess"] == pytest.approx(14.4**2 / (0.16 + 1 + 9 + 100) / 4)
    assert found["mismatch/capped_frac"] == 0.75
    assert found["mismatch/logp_abs_max"] == pytest.approx(math.log(10.0))


@pytest.mark.parametrize(
    ("kind", "cap", "low", "weights"),  # of a response with p = 0.5, 3 and one with p = 0.5, 0.5; the sampler's p is 1
    [
        ("truncate", 2.0, 0.0, [0.5, 2.0, 0.5, 0.5]),
        ("truncate", 2.0, 0.8, [0.8, 2.0, 0.8, 0.8]),
        ("mask", 2.0, 0.0, [0.5, 0.0, 0.5, 0.5]),
        ("mask", 4.0, 0.6, [0.0, 3.0, 0.0, 0.0]),
        ("sequence_truncate", 1.2, 0.0, [1.2, 1.2, 0.25, 0.25]),
        ("sequence_truncate", 1.2, 0.4, [1.2, 1.2, 0.4, 0.4]),
        ("sequence_mask", 2.0, 0.0, [1.5, 1.5, 0.0, 0.0]),
        ("sequence_mask", 1.2, 0.2, [0.0, 0.0, 0.25, 0.25]),
        ("geometric_mask", 1.3, 0.0, [1.0, 1.0, 0.0, 0.0]),  # means 1.22 and 0.5
        ("geometric_mask", 1.2, 0.4, [0.0, 0.0, 1.0, 1.0]),
    ],
)
def test_every_correction_by_hand(kind, cap, low, weights):
    rows = [
        datum((1, 2, 3), (0, 1, 1), (0.0, -1.0, -2.0), 1.0),
        datum((1, 4, 5), (0, 1, 1), (0.0, -3.0, -1.0), -1.0),
    ]
    data = weighted([*rows, datum((1, 2, 3, 4), (0, 0, 0, 0))], "constant", 1)
    trainer = [
        (0.0, -1.0 + math.log(0.5), -2.0 + math.log(3.0)),
        (0.0, -3.0 + math.log(0.5), -1.0 + math.log(0.5)),
        (0.0,) * 4,
    ]
    correction = ImportanceCorrection(kind, cap, low)
    found = with_old_logprobs(data, trainer, correction)
    assert [2 * weight for row in found[:2] for weight in row.weights[1:]] == pytest.approx(weights)
    assert not any(row.weights[0] for row in found) and not any(found[2].weights)
    frac = mismatch_metrics(data, trainer, correction)["mismatch/capped_frac"]
    if kind.endswith("mask"):  # what is beyond the bounds is what was left out
        assert frac == weights.count(0.0) / 4


def test_the_corrected_gradient_is_the_on_policy_one_in_expectation():
    """On a vocabulary of 3, drawn from another policy q: sum q w A grad log p = sum p A grad log p.

    The left side is the loss's gradient over every token the sampler could have drawn, each as often as it would.
    """
    logits = torch.tensor([0.3, -0.2, 0.5])
    sampler = torch.tensor([0.2, 0.5, 0.3])
    advantage = [1.0, -0.5, 2.0]
    live = logits.clone().requires_grad_()
    expected = (torch.softmax(live, 0) * torch.tensor(advantage)).sum()
    expected.backward()
    table = logits.clone().requires_grad_()
    total = torch.zeros(())
    for y in range(3):
        data = weighted([datum((9, y), (0, 1), (0.0, float(sampler[y].log())), advantage[y])], "token")
        logp = torch.log_softmax(table, 0)[y].reshape(1, 1)
        batch = make_batch(with_old_logprobs(data, [(0.0, float(logp))], ImportanceCorrection("truncate", 100.0)))
        total = total + sampler[y] * (batch.weights * per_token_loss(logp, batch, Objective(GrpoClip()))).sum()
    (-total).backward()
    assert table.grad is not None and live.grad is not None
    assert table.grad.tolist() == pytest.approx(live.grad.tolist(), abs=1e-6)


def test_metrics_of_a_recomputed_pass_are_those_of_the_sampler(bench_of):
    """With old log-probabilities from the trainer the mismatch must not vanish from the metrics."""
    cfg, bench, prompts = bench_of(old_logprobs="recompute", steps=1, importance_correction="truncate")
    sample = bench.sampler.sample

    def off(asked, params):
        return [[replace(c, logprobs=tuple(x - 0.5 for x in c.logprobs)) for c in g] for g in sample(asked, params)]

    bench.sampler.sample = off
    grpo.train(cfg, bench, prompts, graded(bench, even_tokens))
    row = metrics_of(bench)[0]
    assert row["mismatch/logp_abs_mean"] == pytest.approx(0.5, abs=1e-4)
    assert row["mismatch/ratio_mean"] == pytest.approx(math.exp(0.5), rel=1e-4)
    assert row["mismatch/ess"] == pytest.approx(1.0, abs=1e-4) and row["mismatch/capped_frac"] == 0


CORRECTED = [*itertools.product(["grpo_clip", "gspo", "cispo"], ["none", "truncate", "mask"])]
CORRECTED += itertools.product(["grpo_clip"], ["sequence_truncate", "sequence_mask", "geometric_mask"])


@pytest.mark.parametrize(("loss", "correction"), CORRECTED)
def test_a_single_update_needs_no_frozen_pass(bench_of, loss, correction, monkeypatch):
    """Its own log-probabilities, held fixed, are what the pass would find: same metrics, same weights."""
    flags = {"old_logprobs": "recompute", "loss": loss, "importance_correction": correction, "importance_cap": 1.3}
    flags |= {"kl_coef": 0.1, "steps": 2, "lr": 1e-3}
    found = []
    for passes in (0, 2):
        cfg, bench, prompts = bench_of(**flags)
        bench.sampler.sample = drifting(bench.sampler.sample)
        frozen = Mock(wraps=bench.learner.logprobs)
        monkeypatch.setattr(bench.learner, "logprobs", frozen)
        if passes:
            monkeypatch.setattr(GrpoConfig, "frozen_pass", True)
        grpo.train(cfg, bench, prompts, graded(bench, even_tokens))
        assert frozen.call_count == passes
        found.append((metrics_of(bench), dict(bench.learner.weights())))
    (rows, weights), (expected_rows, expected) = found
    # A pass that comes first knows which responses will be masked, and their rows are skipped: other means over tokens.
    alike = (
        ("mismatch/", "loss") if correction in ("sequence_mask", "geometric_mask") else ("mismatch/", "policy/", "loss")
    )
    assert all(torch.allclose(weights[name], tensor, atol=1e-6) for name, tensor in expected.items())
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert 0 < row["mismatch/capped_frac"] < 1
        for name in [key for key in expected_row if key.startswith(alike)]:
            assert row[name] == pytest.approx(expected_row[name], rel=1e-3, abs=1e-5), name


def drifting(sample):
    """A sampler whose log-probabilities are too low, right and too high by turns."""

    def off(asked, params):
        def moved(n, c):  # by another amount in each completion, too
            off = [0.4 * (i % 3 - 1) + 0.3 * (n % 3 - 1) for i in range(len(c.logprobs))]
            return replace(c, logprobs=tuple(x + o for x, o in zip(c.logprobs, off, strict=True)))

        return [[moved(n, c) for n, c in enumerate(group)] for group in sample(asked, params)]

    return off
