"""`--curriculum`: what is drawn, what is known of a prompt, and what becomes of the objective."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from statistics import fmean

import pytest
from scipy import integrate, stats

from grpo_gsm8k import curriculum, grpo
from grpo_gsm8k.curriculum import Curriculum, inclusion_probabilities, outcomes_of, systematic
from grpo_gsm8k.datatypes import Completion, Grade, Prompt, Rollout, Trajectory
from grpo_gsm8k.errors import ConfigError
from tests.test_resume import config_of, story
from tests.toys import stage_config, word_problem

N, G = 60, 8


def prompts(n=N):
    return [Prompt(word_problem(f"p{i}", "q", "", "1"), (i,)) for i in range(n)]


def make(spec="target:0.5", n=N, **flags):
    flags = {"rollouts_per_step": 12 * G, "group_size": G, **flags}
    return Curriculum(stage_config("grpo", curriculum=spec, **flags), prompts(n))


def ids(drawn):
    return [int(prompt.example.id[1:]) for prompt, _ in drawn]


def rolled(id_, reward, correct):
    prompt = Prompt(word_problem(id_, "q", "", "1"), (1,))
    return Rollout(Trajectory.of(prompt, Completion((5,), (-1.0,), "", "stop")), Grade(reward, {}, correct))


@pytest.mark.parametrize("spec", ["", "target", "target:", "target:0", "target:1", "target:x", "target:nan", "half"])
def test_what_is_no_curriculum_is_refused(spec):
    with pytest.raises(ConfigError, match="must be none, or target:T"):
        grpo.check(stage_config("grpo", curriculum=spec))


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"curriculum_unbiased": True}, "leave it out"),
        ({"curriculum": "target:0.5", "curriculum_unbiased": True, "resample_zero_variance": 1}, "leave one out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flags, word):
    with pytest.raises(ConfigError, match=word):
        grpo.check(stage_config("grpo", **flags))


def test_a_step_cannot_take_more_prompts_than_there_are():
    with pytest.raises(ConfigError, match="a step takes 12 prompts, there are 11"):
        make(n=11)


def test_the_bump_is_the_integral_over_the_posterior():
    own = make("target:0.3")
    for right, wrong in ((1.0, 1.0), (0.4, 1.6), (7.0, 3.0), (30.5, 2.5)):
        exact, _ = integrate.quad(lambda p, a=right, b=wrong: p**2.4 * (1 - p) ** 5.6 * stats.beta.pdf(p, a, b), 0, 1)
        assert own._bump(right, wrong) == pytest.approx(exact, rel=1e-6)


def test_evidence_decays_by_its_half_life_and_the_prior_is_that_of_all():
    own = make(curriculum_half_life=10.0)
    own.observe({"p0": (6.0, 8)}, step=1)
    own.observe({"p0": (1.0, 8), "p1": (8.0, 8)}, step=11)
    assert own.evidence == {"p0": (6 / 2 + 1, 2 / 2 + 7, 11), "p1": (8.0, 0.0, 11)}
    right, wrong = 1 + (4 + 8) / 2, 1 + (8 + 0) / 2  # of all, ten steps later
    prior = 2 * right / (right + wrong), 2 * wrong / (right + wrong)
    assert own._prior(21) == pytest.approx(prior)
    found = own.metrics({"p0": (2.0, 8), "p9": (8.0, 8)}, step=21)
    seen, unseen = (2 + prior[0]) / (2 + 4 + 2), prior[0] / 2
    expected = {"expected_rate": (seen + unseen) / 2, "rate_error": (abs(seen - 0.25) + abs(unseen - 1)) / 2}
    assert found == pytest.approx({f"curriculum/{k}": v for k, v in (expected | {"seen_frac": 2 / N}).items()})


def test_outcomes_count_right_answers_or_else_rewards():
    groups = [[rolled("a", 0.2, True), rolled("a", 1.0, False)], [rolled("b", 1.7, None), rolled("b", 0.5, None)]]
    assert outcomes_of([*groups, [rolled("a", 0.0, True)]]) == {"a": (2.0, 3), "b": (1.5, 2)}
    assert outcomes_of(groups[:1], by_reward=True) == {"a": (1.2, 2)}


def test_prompts_of_a_step_are_distinct_seeded_and_uniform_before_anything_is_known():
    own = make()
    first = ids(own.draw(12, step=1))
    assert len(set(first)) == 12 and first == ids(make().draw(12, step=1))
    assert first != ids(own.draw(12, step=2)) and first != ids(own.draw(12, step=1, attempt=1))
    assert first != ids(make(seed=1).draw(12, step=1))
    counts = [0] * N
    for step in range(2000):
        for i in ids(own.draw(12, step)):
            counts[i] += 1
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_each_prompt_is_drawn_with_its_inclusion_probability(seed):
    shares = [random.Random(seed).random() ** 3 for _ in range(20)]
    inclusion = inclusion_probabilities([share / sum(shares) for share in shares], 7)
    assert sum(inclusion) == pytest.approx(7) and max(inclusion) <= 1
    free = [(pi, share) for pi, share in zip(inclusion, shares, strict=True) if pi < 1]
    assert all(a[0] / a[1] == pytest.approx(b[0] / b[1]) for a, b in pairwise(free))
    draws = 4000
    counts = [0] * 20
    for k in range(draws):
        picked = systematic(inclusion, 7, seed * draws + k)
        assert len(set(picked)) == 7
        for i in picked:
            counts[i] += 1
    for n, pi in zip(counts, inclusion, strict=True):
        assert n == draws if pi == 1 else abs(n - draws * pi) < 4.5 * (draws * pi * (1 - pi)) ** 0.5


def test_a_prompt_that_is_capped_leaves_its_share_to_the_others():
    assert inclusion_probabilities([0.7, 0.2, 0.1], 2) == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert inclusion_probabilities([0.5, 0.25, 0.25], 3) == [1.0, 1.0, 1.0]


def truth(i):
    """The solve rate of prompt i, fixed: from 0 to 1."""
    return i / (N - 1)


def simulate(own, steps, seed=0):
    """Groups of G coins at each drawn prompt's own rate; the share of flat groups of each step."""
    coin, flat = random.Random(seed), []
    for step in range(1, steps + 1):
        drawn = ids(own.draw(12, step)) if own else coin.sample(range(N), 12)
        right = {i: sum(coin.random() < truth(i) for _ in range(G)) for i in drawn}
        flat.append(fmean(n in (0, G) for n in right.values()))
        if own:
            own.observe({f"p{i}": (float(n), G) for i, n in right.items()}, step)
    return flat


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
def test_prompts_near_the_target_come_more_often_and_groups_are_less_often_flat(target):
    own = make(f"target:{target}")
    flat, uniform = simulate(own, 60), simulate(None, 60)
    assert fmean(flat[20:]) < (0.6 if target == 0.5 else 0.8) * fmean(uniform)  # away from 0.5 more are flat
    drawn = [truth(i) for step in range(61, 91) for i in ids(own.draw(12, step))]
    assert abs(fmean(drawn) - target) < 0.1
    assert min(own._shares(61)) >= 0.1 / N


def test_the_weights_make_the_objective_that_of_uniform_prompts():
    """The mean over the draws of weight x value is the plain mean over all prompts, whatever the values are."""
    own, biased = make(curriculum_unbiased=True), make()
    for one in (own, biased):
        simulate(one, 40)
    values = [random.Random(i).gauss(truth(i), 0.3) for i in range(N)]

    def estimates(one):
        return [
            sum(values[int(prompt.example.id[1:])] * weight for prompt, weight in one.draw(12, 41, attempt)) / 12
            for attempt in range(3000)
        ]

    found, exact = estimates(own), fmean(values)
    error = stats.sem(found)
    assert abs(fmean(found) - exact) < 4 * error
    assert abs(fmean(estimates(biased)) - exact) > 8 * error  # without them it is another objective
    assert all(weight <= 10 for _, weight in own.draw(12, 41)) and {w for _, w in biased.draw(12, 41)} == {1.0}


def test_a_groups_weight_multiplies_its_advantages():
    group = [rolled("a", reward, reward > 0) for reward in (1.0, 0.0)]
    weighted = [Rollout(r.trajectory, r.grade, weight=0.5) for r in group]
    plain, half = grpo.with_advantages(stage_config("grpo"), [group, weighted])
    assert [r.advantage for r in half] == [0.5 * r.advantage for r in plain] != [0.0, 0.0]
    assert [grpo.datum(stage_config("grpo"), r).advantages[-1] for r in half] == [r.advantage for r in half]


CURRICULUM = {"curriculum": "target:0.3", "curriculum_half_life": 2.0, "lr": 1e-2}
MODES = {
    "plain": {},
    "unbiased": {"curriculum_unbiased": True},
    "one_step_off": {"mode": "one_step_off", "curriculum_unbiased": True, "steps": 6, "epochs": 1},
    "resampled": {"resample_zero_variance": 2},
}
LONG = ("plain", "resampled")


@pytest.mark.parametrize("mode", [pytest.param(m, marks=pytest.mark.slow) if m in LONG else m for m in MODES])
def test_a_run_in_pieces_is_the_run_in_one(mode, tiny, tmp_path):
    flags = {**CURRICULUM, **MODES[mode], "reward": "tests.test_curriculum:sometimes", "eval_every": 0}
    flags |= {"rollouts_per_step": 16}
    whole = grpo.run(config_of("grpo", tiny, tmp_path / "whole", **flags))
    for stop in (3, 0):
        pieces = grpo.run(config_of("grpo", tiny, tmp_path / "pieces", max_steps=stop, **flags))
    assert pieces["weights_sha256"] == whole["weights_sha256"]
    assert story(tmp_path / "pieces") == story(tmp_path / "whole")
    state = json.loads((tmp_path / "whole/checkpoints/step_000006/state.json").read_text())
    assert len(state["source"]["evidence"]) > 10
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["curriculum/expected_rate"] <= 1 for row in rows)
    seen = [row["curriculum/seen_frac"] for row in rows]
    assert seen[0] == 0.0 and all(a <= b for a, b in pairwise(seen)) and seen[-1] > 0.2


def sometimes(completion, example):
    """Right for a share of the completions that depends on the problem."""
    return float(sum(completion.token_ids) % 7 < int(example.id[-1]) % 8)


def rate_of(completion, example):
    """Right for k of 8 sums of ids, where k is the problem's own: solve rates from 0 to 1."""
    return float(sum(completion.token_ids) % 8 < int(example.id.rsplit("-", 1)[1]) % 9)


def test_fewer_groups_are_flat_than_with_uniform_prompts(tiny, tmp_path):
    flat = {}
    for spec in ("none", "target:0.5"):
        flags = {"curriculum": spec, "reward": "tests.test_curriculum:rate_of", "steps": 24, "lr": 1e-5, "epochs": 1}
        flags |= {"rollouts_per_step": 64, "group_size": 8, "max_new_tokens": 4, "eval_every": 0, "save_every": 99}
        out = tmp_path / spec.replace(":", "_")
        grpo.run(config_of("grpo", tiny, out, **flags))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        flat[spec] = fmean(row["groups/zero_std_frac"] for row in rows[6:])  # by then each prompt has come once
    assert flat["target:0.5"] < 0.75 * flat["none"], flat


def test_without_a_curriculum_nothing_is_counted(tiny, tmp_path):
    grpo.run(config_of("grpo", tiny, tmp_path / "run", max_steps=1))
    state = json.loads((tmp_path / "run/checkpoints/step_000001/state.json").read_text())
    assert state["source"]["evidence"] == {}
    assert "curriculum/seen_frac" not in (tmp_path / "run/metrics.jsonl").read_text()
    assert curriculum.target_of("none") is None
