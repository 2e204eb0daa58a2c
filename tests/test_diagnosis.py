"""Why the reward does not move: every finding from metrics made by hand, and from real tiny runs."""

from __future__ import annotations

import json
import random
import statistics

import pytest
from scipy.stats import linregress

from grpo_gsm8k import grpo
from grpo_gsm8k.runs import diagnosis
from grpo_gsm8k.runs.diagnosis import announce, diagnose, outcome, trend
from tests.toys import stage_config

HEALTHY = {
    "reward/mean": lambda step: 0.5 + 0.02 * (-1) ** step,  # it does not rise, and nothing explains it
    "reward/std": 0.4,
    "reward/min": 0.0,
    "reward/max": 1.0,
    "outcome/right_frac": 0.4,
    "outcome/wrong_frac": 0.4,
    "outcome/format_error_frac": 0.1,
    "outcome/truncated_frac": 0.1,
    "groups/zero_std_frac": 0.4,
    "groups/all_right_frac": 0.2,
    "groups/all_wrong_frac": 0.2,
    "length/mean": 100.0,
    "loss": 0.5,
    "policy/entropy": 0.3,
    "policy/grad_norm": 0.7,
    "policy/lr": 1e-5,
    "policy/update_to_weight": 1e-4,
    "policy/clip_frac": 0.01,
    "policy/approx_kl": 1e-3,
    "mismatch/logp_abs_mean": 1e-3,
}
RISING = {"reward/mean": lambda step: 0.1 + 0.02 * step + 0.01 * (-1) ** step}


def rows_of(steps=20, **changes):
    """Metrics of `steps` steps; a change is a number, a function of the step, or None for a metric left out."""
    metrics = HEALTHY | {name.replace("__", "/"): value for name, value in changes.items()}
    return [
        {"step": step} | {name: value(step) if callable(value) else value for name, value in metrics.items()}
        for step in range(1, steps + 1)
    ]


def strip(rows):
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def names(found):
    return [finding.name for finding in found]


def sample(i=0, correct=False, finish="stop", format_ok=True, reward=0.0):
    return {
        "id": f"p{i}",
        "question": f"question {i}",
        "response": f"response {i}",
        "gold": "7",
        "correct": correct,
        "finish_reason": finish,
        "format_ok": format_ok,
        "reward": reward,
    }


# name, what makes it, the config that goes with it, what the words must hold, what is just not enough
CASES = [
    (
        "frozen",
        {"policy__update_to_weight": 0.0, "policy__lr": 0.0},
        {"lr": 0.0},
        ["gradient's norm is 0.7", "lr = 0.0", "Raise --lr"],
        {"policy__update_to_weight": lambda step: 1e-4 * (step == 20)},
    ),
    ("frozen", {"policy__update_to_weight": 0.0}, {}, ["applied 1e-05"], {"policy__grad_norm": 0.0}),
    (
        "mismatch",
        {"mismatch__logp_abs_mean": 0.05},
        {},
        ["differ by 0.05", "--dtype float32"],
        {"mismatch__logp_abs_mean": 0.01},
    ),
    ("control", {}, {"reward": "random"}, ["coin", "40 % of the answers are right"], None),
    (
        "flat_groups",
        {"groups__zero_std_frac": 0.95, "groups__all_wrong_frac": 0.9, "groups__all_right_frac": 0.05},
        {"group_size": 8},
        ["In 95 % of the groups", "90 % of the groups are all wrong, 5 % all right", "sft", "group_size = 8"],
        {"groups__zero_std_frac": 0.85},
    ),
    (
        "flat_groups",
        {"groups__zero_std_frac": 0.95, "groups__all_wrong_frac": 0.3, "groups__all_right_frac": 0.65},
        {},
        ["--resample_zero_variance"],
        None,
    ),
    (
        "flat_groups",
        {"groups__zero_std_frac": 1.0, "reward__min": 1.0, "reward__max": 1.0, "policy__grad_norm": 0.0},
        {"reward": "mine:constant"},
        ["1 for every completion", "its norm: 0", "reward = mine:constant"],
        None,
    ),
    (
        "cut_off",
        {"outcome__truncated_frac": lambda step: 0.1 if step <= 10 else 0.3},
        {"max_new_tokens": 24},
        ["30 % of the completions", "max_new_tokens = 24"],
        {"outcome__truncated_frac": lambda step: 0.9 if step <= 10 else 0.2},
    ),
    (
        "cut_off",
        {"outcome__truncated_frac": 1.0, "policy__grad_norm": None, "policy__update_to_weight": None},
        {"mask_truncated": True},
        ["100 % of the completions", "no update was made at all"],
        None,
    ),
    (
        "format_errors",
        {"outcome__format_error_frac": 0.3},
        {"prompt_style": "r1_zero", "grading": "strict"},
        ["30 % of the completions", "prompt_style = r1_zero", "grading = strict"],
        {"outcome__format_error_frac": 0.2},
    ),
    (
        "wrong_answers",
        {"outcome__wrong_frac": 0.8, "outcome__right_frac": 0.004},
        {},
        ["80 % of the completions", "0.4 % are right"],
        {"outcome__wrong_frac": 0.8, "outcome__right_frac": 0.1},
    ),
    (
        "small_steps",
        {"policy__update_to_weight": 2e-7},
        {"steps": 50, "lr": 1e-8},
        ["at most 0.001 %", "lr = 1e-08"],  # 50 x 2e-7 = 1e-5
        {"policy__update_to_weight": 2e-5},
    ),
    (
        "small_steps",
        {"policy__bf16_changed_frac": 0.0005},
        {"steps": 50},
        ["Only 0.05 % of the bfloat16 weights", "float32 masters keep"],
        {"policy__bf16_changed_frac": 0.02},
    ),
    (
        "small_steps",
        {"policy__update_to_weight": lambda step: 1e-9 if step > 5 else 1e-3},
        {"steps": 50, "warmup_steps": 5},
        ["Raise --lr"],
        {"policy__update_to_weight": lambda step: 1e-3 if step > 5 else 0.0},
    ),
    (
        "clip",
        {"policy__clip_frac": 0.3},
        {"epochs": 4, "minibatches": 2},
        ["30 % of the tokens are clipped", "epochs = 4", "minibatches = 2"],
        {"policy__clip_frac": 0.1},
    ),
    ("clip", {"policy__approx_kl": 0.2}, {}, ["0.2 nats"], {"policy__approx_kl": 0.05}),
    (
        "kl_penalty",
        {"policy__kl_ref": 4.0},
        {"kl_coef": 0.05},
        ["0.2 per token", "kl_coef = 0.05", "4 nats"],
        {"policy__kl_ref": 1.0},
    ),
    (  # without std_norm advantages are as large as the rewards' spread: 0.4
        "kl_penalty",
        {"policy__kl_ref": 1.0},
        {"kl_coef": 0.05, "std_norm": False},
        ["advantages of about 0.4"],
        {"policy__kl_ref": 0.5},
    ),
    (
        "entropy",
        {"policy__entropy": lambda step: 0.6 if step <= 2 else 0.1},
        {},
        ["0.1 nats per token, 10 per response; it began at 0.6"],
        {"policy__entropy": lambda step: 0.6 if step <= 2 else 0.15},
    ),
    (  # 0.01 x 50 = 0.5 nats; exp(-0.5) = 0.607
        "entropy",
        {"policy__entropy": 0.01, "length__mean": 50.0},
        {},
        ["0.5 per response", "60.7 % or more"],
        {"policy__entropy": 0.01, "length__mean": 150.0},
    ),
    (
        "fell",
        {"reward__mean": lambda step: 0.8 - 0.02 * step + 0.01 * (-1) ** step},
        {"lr": 5e-4},
        ["fell from 0.77 to 0.41", "last 20 steps", "lr = 0.0005"],
        {"reward__mean": lambda step: 0.8 - 0.0005 * step + 0.01 * (-1) ** step},
    ),
    (
        "too_easy",
        {"groups__zero_std_frac": 0.95, "groups__all_right_frac": 0.95, "outcome__right_frac": 0.98},
        {},
        ["in 95 % of the groups every completion is right", "harder"],
        {"groups__zero_std_frac": 0.85, "groups__all_right_frac": 0.85, "outcome__right_frac": 0.95},
    ),
]


@pytest.mark.parametrize(
    ("name", "changes", "cfg", "words", "less"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_finding(name, changes, cfg, words, less):
    found = diagnose(strip(rows_of(**changes)), cfg)
    assert names(found) == [name]
    text = " ".join([found[0].seen, found[0].why, found[0].todo])
    for word in words:
        assert word in text
    if less is not None:
        assert diagnose(strip(rows_of(**(changes | less))), cfg) == []


@pytest.mark.parametrize(("name", "changes", "cfg"), [case[:3] for case in CASES])
def test_a_rising_reward_is_an_excuse_for_all_but_a_few(name, changes, cfg):
    rising = {key.replace("/", "__"): value for key, value in RISING.items()}
    found = diagnose(strip(rows_of(**(changes | rising))), cfg)
    whatever = {"frozen", "mismatch", "control", "too_easy"} | ({"cut_off"} if cfg.get("mask_truncated") else set())
    assert names(found) == ([name] if name in whatever else [])


def test_the_heaviest_comes_first_and_a_young_run_is_left_alone():
    changes = {"policy__clip_frac": 0.5, "outcome__truncated_frac": 0.6, "mismatch__logp_abs_mean": 1.0}
    assert names(diagnose(rows_of(10, **changes), {})) == ["mismatch", "cut_off", "clip"]
    assert diagnose(rows_of(9, **changes), {}) == []


def test_a_late_plateau_is_not_excused_by_an_early_rise():
    def reward(step):
        return min(step, 30) / 60 + 0.02 * (-1) ** step

    flat = {"groups__zero_std_frac": 0.95, "groups__all_wrong_frac": 0.9, "groups__all_right_frac": 0.0}
    assert names(diagnose(rows_of(40, reward__mean=reward, **flat), {})) == []
    assert names(diagnose(rows_of(100, reward__mean=reward, **flat), {})) == ["flat_groups"]


def test_stalled_is_said_last_and_only_where_nothing_else_is_known():
    cfg = {"lr": 1e-6, "rollouts_per_step": 64}
    assert diagnose(rows_of(49), cfg) == []
    (found,) = diagnose(rows_of(50), cfg)
    assert found.name == "stalled" and "In 50 steps" in found.seen and "(0.496 to 0.504)" in found.seen
    assert "lr = 1e-06" in found.todo and "rollouts_per_step = 64" in found.todo
    assert names(diagnose(rows_of(50, policy__clip_frac=0.5), cfg)) == ["clip"]
    assert diagnose(rows_of(50, outcome__right_frac=0.95), cfg) == []  # solved, and therefore flat


def test_a_loss_near_zero_is_called_normal_only_while_there_is_a_gradient():
    stuck = {"policy__clip_frac": 0.5, "loss": lambda step: 1e-8 * (-1) ** step}
    *_, note = diagnose(rows_of(**stuck), {})
    assert note.name == "loss" and not note.alarm
    assert "as it should be" in note.seen and "not 0 (norm 0.7)" in note.seen
    assert names(diagnose(rows_of(**stuck, policy__grad_norm=0.0), {})) == ["clip"]
    assert names(diagnose(rows_of(**stuck | {"loss": 0.3}), {})) == ["clip"]
    assert diagnose(rows_of(loss=0.0), {}) == []  # nobody has a reason to worry
    assert diagnosis.loss_note(rows_of(loss=0.0)) is not None  # the page may say it all the same


def test_examples_are_of_the_kind_that_is_complained_about_and_of_different_problems():
    kinds = {
        "truncated": sample(finish="length"),
        "format_error": sample(format_ok=False),
        "wrong": sample(),
        "right": sample(correct=True, finish="length"),
    }
    assert {kind: outcome(row) for kind, row in kinds.items()} == {kind: kind for kind in kinds}
    samples = [row | {"id": f"{kind}{i // 2}"} for kind, row in kinds.items() for i in range(10)]
    changes = {
        "outcome__truncated_frac": 0.3,
        "outcome__format_error_frac": 0.35,
        "outcome__wrong_frac": 0.35,
        "outcome__right_frac": 0.0,
    }
    found = diagnose(rows_of(**changes), {}, samples)
    assert {finding.name: [row["id"] for row in finding.examples] for finding in found} == {
        "cut_off": ["truncated0", "truncated1", "truncated2"],
        "format_errors": ["format_error0", "format_error1", "format_error2"],
        "wrong_answers": ["wrong0", "wrong1", "wrong2"],
    }


def test_a_reward_that_does_not_see_right_from_wrong():
    def samples(right, wrong, n=40):
        """A coin each, with these chances."""
        rng = random.Random(1)
        return [
            sample(i, correct=ok, reward=float(rng.random() < chance))
            for i in range(n)
            for ok, chance in ((True, right), (False, wrong))
        ]

    cfg = {"reward": "mine:coin"}
    (found,) = diagnose(rows_of(), cfg, samples(0.5, 0.5))
    assert found.name == "blind_reward" and "(40 and 40 samples)" in found.seen and "reward = mine:coin" in found.todo
    assert names(diagnose(rows_of(), cfg, samples(0.0, 1.0))) == ["blind_reward"]  # the wrong way round
    assert diagnose(rows_of(), cfg, samples(0.9, 0.3)) == []
    assert diagnose(rows_of(), cfg, samples(0.5, 0.5, n=19)) == []  # too few to tell
    assert diagnose(rows_of(), cfg, samples(1.0, 1.0)) == []  # a constant shows in the groups


def test_trend_is_a_t_statistic():
    """Against scipy's regression on white noise with and without a slope, and 0 where there is nothing to see."""
    rng = random.Random(0)
    for slope in (0.0, 0.01, -0.03):
        ys = [slope * i + rng.gauss(0, 0.3) for i in range(400)]
        fit = linregress(range(400), ys)
        assert trend(ys) == pytest.approx(fit.slope / fit.stderr, rel=0.1, abs=0.1)
    chance = [trend([rng.gauss(0, 1) for _ in range(50)]) for _ in range(2000)]
    assert statistics.stdev(chance) == pytest.approx(1.0, abs=0.1)
    assert trend([0.5] * 20) == trend([0.5]) == trend([]) == 0.0


def test_findings_are_said_once_each_on_stderr(capsys):
    rows = rows_of(30, policy__clip_frac=0.5, mismatch__logp_abs_mean=lambda step: 0.1 if step > 15 else 0.0)
    said = []
    for step in range(1, 31):
        said = announce(rows[:step], {}, said)
    out, err = capsys.readouterr()
    assert out == "" and said == ["clip", "mismatch"]
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("warning: step 10: The updates of a step go too far: 50 % of the tokens are clipped")
    assert lines[1].startswith("warning: step 17: Sampler and trainer disagree")  # 2 of 10 steps at 0.1 make 0.02


# ---- real runs


def tiny_run(tiny, out, **flags):
    small = {"steps": 14, "rollouts_per_step": 8, "group_size": 4, "save_every": 1, "lr": 1e-3, "resume": True}
    where = {"model_id": str(tiny.model), "data": str(tiny.data), "out_dir": str(out), "deterministic": True}
    grpo.run(stage_config("grpo", **(small | {"eval_every": 12} | where | flags)))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def warnings(capsys):
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith(("warning: ", "note: "))]


def test_a_random_model_is_told_that_nothing_is_right_and_why(tiny, tmp_path, capsys):
    rows = tiny_run(tiny, tmp_path / "run")
    first, *others = warnings(capsys)
    assert first.startswith("warning: step 10: In 100 % of the groups all rewards are equal, 0 for every completion")
    assert others and all("of the completions" in line for line in others)
    samples = [json.loads(line) for line in (tmp_path / "run/samples/step_000012.jsonl").read_text().splitlines()]
    for kind in ("right", "truncated", "format_error", "wrong"):  # the samples are sorted as the metrics count them
        share = sum(outcome(row) == kind for row in samples) / len(samples)
        assert rows[11][f"outcome/{kind}_frac"] == pytest.approx(share)


def test_a_run_in_pieces_says_what_the_run_in_one_says(tiny, tmp_path, capsys):
    flags = {"lr": 0.0, "reward": "tests.toys:even_tokens"}
    whole = tiny_run(tiny, tmp_path / "whole", **flags)
    said = warnings(capsys)
    assert [line.split(": ")[:2] for line in said] == [[kind, "step 10"] for kind in ("warning", "warning", "note")]
    assert "The weights do not move" in said[0] and "(lr = 0.0, applied 0)" in said[0]
    for stop in (4, 9, 10, 11, 0):
        pieces = tiny_run(tiny, tmp_path / "pieces", max_steps=stop, **flags)
    assert warnings(capsys) == said
    for rows in (whole, pieces):
        assert not any("said" in key or "warning" in key for row in rows for key in row)


def test_a_run_that_learns_is_left_alone(tiny, tmp_path, capsys):
    flags = {"lr": 2e-2, "rollouts_per_step": 32, "group_size": 8, "max_new_tokens": 8, "eval_every": 0}
    rows = tiny_run(tiny, tmp_path / "run", reward="tests.toys:even_tokens", **flags)
    assert rows[-1]["reward/mean"] > rows[0]["reward/mean"] + 0.2
    assert warnings(capsys) == []
