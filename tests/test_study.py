"""Studies: the plan and its mistakes, the runs that it means, their order, the registration, the verdicts, the page."""

from __future__ import annotations

import asyncio
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from grpo_gsm8k import cli, study
from grpo_gsm8k.errors import ConfigError, DataError, GrpoError, RunDirError
from grpo_gsm8k.study import ahead, page, registry, scheduler, worker
from grpo_gsm8k.study.analysis import analyse, decide, is_decided
from grpo_gsm8k.study.jobs import answers, jobs_of, material_of, spent
from grpo_gsm8k.study.plan import read_plan
from tests import browser
from tests.toys import REPOSITORY, make_data
from tests.toys import cli as command_line

PLAN = """
question = "Is <b> better?"
arms = ["grpo", "random", "base", "ei"]
seeds = [0, 1, 2]
preset = "tiny"
problems = 12
[power]
effect = 0.2
[start]
stage = "sft"
epochs = 1
[arm.grpo]
steps = 4
rollouts_per_step = 8
group_size = 4
[arm.ei]
prompts_per_round = 4
steps_per_round = 2
"""


@pytest.fixture
def write(tmp_path):
    """A plan on data that are there and a model that is named; `write(old, new, …)` changes its text."""
    data = make_data(tmp_path / "data")

    def plan(*changes, text=PLAN):
        text = f'data = "{data}"\nmodel_id = "some/model-1.5B"\n{text}'
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "plan.toml"
        path.write_text(text)
        return path

    return plan


def planned(path, folder):
    """The plan and its jobs."""
    plan = read_plan(path)
    return plan, jobs_of(plan, folder, material_of(plan, folder))


def fabricate(jobs, accuracy, problems=12, only=None):
    """Run directories and results, as if the jobs had been run: `accuracy(arm, seed)` of the problems are right."""
    for one in jobs:
        if only and not only(one):
            continue
        share = accuracy(one.arm, one.seed)
        draw = random.Random(f"{one.arm} {one.seed}")
        right = [draw.random() < share if 0 < share < 1 else bool(share) for _ in range(problems)]
        one.run_dir.mkdir(parents=True, exist_ok=True)
        row = {"step": 1, "length/mean": 10.0, "ei/sampled_tokens": 0.0, "time/total": 2.0, "val/accuracy": share}
        (one.run_dir / "metrics.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps({**row, 'step': 2})}\n")
        (one.run_dir / "result.json").write_text(json.dumps({"weights_sha256": "a" * 64, "model": "m", "step": 2}))
        one.results.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"id": f"p{i}", "correct": r, "weights_sha256": "a" * 64} for i, r in enumerate(right)]
        one.results.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        summary = {"accuracy": sum(right) / problems, "reward": 0.0, "n": problems, "ci95": [0.0, 1.0]}
        one.summary.write_text(json.dumps({**summary, "weights_sha256": "a" * 64}))


# ------------------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (('"base", "ei"]', '"base", "eii"]'), "unknown arm 'eii'; did you mean 'ei'?"),
        (("preset", 'reference = "grp"\npreset'), "unknown arm 'grp'; did you mean 'grpo'?"),
        (("[arm.ei]", '[arm.ei]\nlike = "gpro"'), "unknown arm 'gpro'"),
        (("[arm.ei]", "[arm.other]"), "[arm.other] is in no list"),
        (("[arm.ei]", "[arm.ei]\nroundz = 2"), "[arm.ei] unknown key 'roundz'; did you mean 'rounds'?"),
        (("steps = 4", "steps = 0"), "[arm.grpo] steps = 0: must be at least 1"),
        (("steps = 4", "seed = 4"), "[arm.grpo] seed: is the study's to set"),
        (("steps = 4", 'equal = "tokens"'), "only expert iteration goes on until a budget is used up"),
        (("steps = 4", 'stage = "ppo"'), "[arm.grpo] stage = 'ppo': must be one of"),
        (("question", "questoin"), "unknown key 'questoin'; did you mean 'question'?"),
        (("[power]", "[powers]"), "unknown table 'powers'; did you mean 'power'?"),
        (("effect", "efect"), "[power] unknown key 'efect'; did you mean 'effect'?"),
        (("effect = 0.2", "effect = 1.5"), "[power] effect = 1.5: must be above 0 and below 1"),
        (("effect = 0.2", "accuracy = 0.95"), "[power] disagree = 0.3: two runs of accuracy 0.95 differ on 0.095"),
        (("seeds = [0, 1, 2]\n", ""), "seeds is missing"),
        (("[0, 1, 2]", "[]"), "seeds = []: needs at least two"),
        (("[0, 1, 2]", "[0]"), "needs at least two, all different"),
        (("[0, 1, 2]", "[0, 0]"), "needs at least two, all different"),
        (("[0, 1, 2]", '"many"'), "seeds = 'many': must be a list"),
        (("[0, 1, 2]", "[0, true]"), "must be a list"),
        (("problems = 12", "problems = 1"), "problems = 1: must be a number from 2 on"),
        (("problems = 12", 'problems = "all"'), "problems = 'all'"),
        (("problems = 12", "problems = 99"), "has 16 problems, and the plan needs 99"),
        (("[0, 1, 2]", '"auto"'), "64 seeds on 12 problems do not find a difference of 0.2"),
        (("[0, 1, 2]", "2", "problems = 12", 'problems = "auto"', "effect = 0.2", "effect = 0.02"), "plan more seeds"),
        (("epochs = 1", "epochz = 1"), "[start] unknown key 'epochz'; did you mean 'epochs'?"),
        (('preset = "tiny"', 'preset = "tinny"'), "unknown preset 'tinny'; did you mean 'tiny'?"),
        (('["grpo", "random", "base", "ei"]', '["grpo"]'), "at least two"),
        (('["grpo", "random", "base", "ei"]', '["grpo", "grpo"]'), "'grpo' stands twice"),
        (('arms = ["grpo", "random", "base", "ei"]', ""), "arms is missing"),
        (("[arm.ei]", '[arm.ei]\nequal = "dollars"'), "needs dollars_per_hour in [cost]"),
        (("[arm.ei]", '[arm.ei]\nlr_schedule = "cosine"'), "its end is not known before"),
        (("[arm.ei]", '[arm.ei]\nlike = "ei"'), "is like itself"),
        (("question = ", "question "), "not a TOML file"),
        (("[arm.ei]", '[common]\nlr = "a"\n[arm.ei]'), "[common] lr = 'a': must be float"),
        (("[arm.ei]", "[eval]\nsamples = 4\n[arm.ei]"), "[eval] samples = 4: several need a temperature above 0"),
        (("group_size = 4", "group_size = 3"), "[arm.grpo] rollouts_per_step = 8 must be a multiple of group_size = 3"),
        (("group_size = 4", 'algorithm = "dap"'), "[arm.grpo] unknown algorithm 'dap'; did you mean 'dapo'?"),
        ((PLAN, 'arms = ["grpo"]\nseeds = 2'), "at least two"),
    ],
    ids=str,
)
def test_a_mistake_in_a_plan_is_one_line_and_nothing_is_made(changes, message, write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write(*changes)
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", str(path), "--out_dir", "made"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line and ("plan.toml: " in line or "test.jsonl: " in line or "preset" in line)
    assert not (tmp_path / "made/results").exists() and not (tmp_path / "made/runs").exists()


def test_a_plan_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", "nowhere.toml", "--dry_run"])
    assert stop.value.code == 2 and "error: nowhere.toml: no such plan" in capsys.readouterr().err


def test_controls_take_the_settings_of_the_arm_that_they_control(write, tmp_path):
    text = PLAN.replace('["grpo", "random", "base", "ei"]', '["mine", "random", "base", "warm"]')
    text = text.replace("[arm.grpo]", '[arm.warm]\nlike = "mine"\nlr = 0.5\n[arm.mine]\nlabel = "My arm"')
    text = text.replace("[arm.ei]\nprompts_per_round = 4\nsteps_per_round = 2\n", "")
    plan = read_plan(write(text=text))
    own = {"steps": 4, "rollouts_per_step": 8, "group_size": 4}
    assert plan.arm("mine").settings == own and plan.reference.label == "My arm"
    assert plan.arm("random").settings == {**own, "reward": "random"} and plan.arm("random").start == "start"
    assert plan.arm("base").settings == own and plan.arm("base").start == "base"
    assert plan.arm("warm").settings == {**own, "lr": 0.5} and plan.arm("warm").label == "warm"
    assert [arm.name for arm in plan.others] == ["random", "base", "warm"]


def test_the_power_sets_seeds_or_problems(write):
    plan = read_plan(write("problems = 12", "problems = 400", "[0, 1, 2]", '"auto"'))
    needed = ahead.crossed.seeds_needed(0.2, plan.noise, 400, 0.05 / 3)
    assert plan.seeds == tuple(range(needed)) and plan.planned == ("seeds",)
    plan = read_plan(write("problems = 12", 'problems = "auto"', "[0, 1, 2]", "4"))
    assert plan.problems == ahead.crossed.problems_needed(0.2, plan.noise, 4, 0.05 / 3)
    sequential = read_plan(write("problems = 12", 'problems = "auto"\nstopping = "always_valid"', "[0, 1, 2]", "4"))
    assert sequential.looks == 3 and sequential.problems > plan.problems  # looks cost power


# ------------------------------------------------------------------------------------------------ its runs


def test_a_run_comes_after_what_it_needs_and_is_known_by_its_settings(write, tmp_path):
    _, jobs = planned(write(), tmp_path)
    assert [(one.arm, one.seed) for one in jobs[:5]] == [
        ("start", None), ("grpo", 0), ("random", 0), ("base", 0), ("ei", 0)
    ]  # fmt: skip
    assert len(jobs) == 13
    seen = set()
    for one in jobs:
        assert seen.issuperset(one.needs)
        seen.add(one.name)
    by_name = {(one.arm, one.seed): one for one in jobs}
    start, grpo, base, ei = (by_name[key] for key in (("start", None), ("grpo", 1), ("base", 1), ("ei", 1)))
    assert grpo.needs == (start.name,) and base.needs == () and ei.needs == (start.name, grpo.name)
    assert grpo.content["config"]["seed"] == 1 and grpo.content["config"]["steps"] == 4
    assert base.content["config"]["model_id"] == "some/model-1.5B" and grpo.content["start"] == str(start.run_dir)
    assert ei.content["budget"]["run"] == str(grpo.run_dir) and ei.content["budget"]["of"] == "tokens"
    assert grpo.content["eval"]["limit"] == 12 and grpo.content["eval"]["device"] == "cpu"
    _, others = planned(write("steps = 4", "steps = 5"), tmp_path)
    changed = {one.arm for one, other in zip(jobs, others, strict=True) if one.name != other.name}
    assert changed == {"grpo", "random", "base", "ei"}  # EI is held to another budget; the start is the same
    _, others = planned(write("prompts_per_round = 4", "prompts_per_round = 8"), tmp_path)
    assert {one.arm for one, other in zip(jobs, others, strict=True) if one.name != other.name} == {"ei"}
    _, others = planned(write('stage = "sft"', 'stage = "sft"\nper_seed = true'), tmp_path)
    assert sum(one.arm == "start" for one in others) == 3 and len(others) == 15


def test_dry_run_counts_what_the_settings_allow(write, tmp_path, capsys):
    path = write("[arm.ei]", "[cost]\ntokens_per_s = 100\ndollars_per_hour = 3.6\n[arm.ei]")
    before = sorted(tmp_path.rglob("*"))
    cli.main(["study", str(path), "--out_dir", str(tmp_path / "d"), "--dry_run", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert sorted(tmp_path.rglob("*")) == before
    rows = {row["arm"]: row for row in found["arms"]}
    of_grpo = 3 * 4 * 8 * 96  # seeds, steps, completions, tokens of the tiny preset
    assert {rows[name]["tokens"] for name in ("grpo", "random", "base", "ei")} == {of_grpo}
    assert rows["start"]["tokens"] == 48 * (ahead.PROMPT + 96) and rows["start"]["runs"] == 1
    assert found["runs"] == 13 and found["tokens"] == 4 * of_grpo + rows["start"]["tokens"]
    assert found["seconds"] == pytest.approx(found["tokens"] / 100, rel=1e-3)
    assert found["dollars"] == pytest.approx(found["seconds"] / 3600 * 3.6, abs=0.03)
    assert found["power"]["level"] == pytest.approx(0.05 / 3, abs=1e-6) and found["basis"].startswith("the plan")
    cli.main(["study", str(path), "--dry_run"])
    assert f"sha256 {found['plan_sha256']}" in capsys.readouterr().out


def test_without_a_speed_the_guess_says_so_and_finished_runs_replace_it(write, tmp_path):
    plan, jobs = planned(write(), tmp_path)
    assert ahead.dry_run(plan, tmp_path)["basis"].startswith("a rough guess: 2 tokens/s, of 1.5e+03 M parameters")
    fabricate(jobs, lambda arm, seed: 0.5, only=lambda one: one.arm == "grpo")
    found = ahead.dry_run(plan, tmp_path)
    assert found["done"] == 3 and found["basis"] == "measured: 40 tokens/s in 3 runs of this study"


def test_what_a_run_used(write, tmp_path):
    rows = [{"step": 1, "length/mean": 5.0, "time/total": 1.5}, {"step": 2, "ei/sampled_tokens": 7, "time/total": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    used = spent(tmp_path, 8)
    assert (used.tokens, used.seconds, used.steps) == (47.0, 2.5, 2)
    assert spent(tmp_path, 8, last=1).tokens == 40.0 and used.of("dollars", 7200.0) == 5.0
    assert spent(tmp_path / "nothing").of("tokens") == 0.0


@pytest.mark.parametrize(("limit", "rounds"), [(1000, 1), (5200, 1), (6500, 2), (9999, 2), (10001, 3)])
def test_expert_iteration_ends_at_the_round_nearest_to_its_budget(limit, rounds, tmp_path, monkeypatch):
    """Rounds of 4,000 tokens; killed and started again, it comes to the same."""
    other, own = tmp_path / "grpo", tmp_path / "ei"
    for folder in (other, own):
        folder.mkdir()
    (other / "config.toml").write_text("[grpo]\nrollouts_per_step = 10\n")
    (other / "metrics.jsonl").write_text(json.dumps({"step": 1, "length/mean": limit / 10}) + "\n")
    calls = []

    def fake(cfg):
        calls.append(cfg.max_steps)
        first = spent(own).steps
        rows = [
            {"step": s, **({"ei/sampled_tokens": 4000} if s % 2 else {})} for s in range(first + 1, cfg.max_steps + 1)
        ]
        with (own / "metrics.jsonl").open("a") as log:
            log.writelines(f"{json.dumps(row)}\n" for row in rows)
        (own / "result.json").write_text(json.dumps({"step": cfg.max_steps}))

    monkeypatch.setattr(worker, "_stage", lambda name: fake)
    budget = {"of": "tokens", "run": str(other), "dollars_per_hour": [0, 0]}
    values = {"out_dir": str(own), "steps_per_round": 2, "rounds": 50, "model_id": "m", "resume": True}
    assert worker.train_within(budget, values)["step"] == 2 * rounds == calls[-1]
    before = list(calls)
    assert worker.train_within(budget, values)["step"] == 2 * rounds and calls == before  # nothing is left to do
    (own / "result.json").unlink()  # killed just before it was written
    assert worker.train_within(budget, values)["step"] == 2 * rounds and calls == [*before, 2 * rounds]


class FakeProcess:
    """Ends after some looks at it."""

    alive: ClassVar[list[str]] = []
    log: ClassVar[list[str]] = []
    fails: ClassVar[tuple[str, ...]] = ()

    def __init__(self, folder, one, at_once):
        self.job, self.looks = one, random.Random(one.name).randint(1, 4)
        self.alive.append(one.name)
        self.log.append(one.name)
        assert len(self.alive) <= at_once

    @property
    def ended(self):
        self.looks -= 1
        if self.looks:
            return False
        self.alive.remove(self.job.name)
        if not self.failure:
            self.job.summary.parent.mkdir(parents=True, exist_ok=True)
            self.job.summary.write_text("{}")
        return True

    @property
    def failure(self):
        return "it broke" if self.job.arm in self.fails else ""


@pytest.fixture
def faked(monkeypatch):
    """No process is started, and none is waited for."""
    monkeypatch.setattr(scheduler, "_Process", FakeProcess)
    monkeypatch.setattr(scheduler, "POLL_S", 0.0)
    monkeypatch.setattr(FakeProcess, "alive", [])
    monkeypatch.setattr(FakeProcess, "log", [])
    return FakeProcess


@pytest.mark.parametrize("at_once", [1, 3, 20])
def test_runs_are_made_once_each_after_what_they_need(at_once, write, tmp_path, faked):
    _, jobs = planned(write(), tmp_path)
    assert scheduler.run_jobs(tmp_path, jobs, at_once, 0, lambda: False) == {}
    assert sorted(faked.log) == sorted(one.name for one in jobs)
    for one in jobs:
        assert all(faked.log.index(name) < faked.log.index(one.name) for name in one.needs)
    assert scheduler.run_jobs(tmp_path, jobs, at_once, 0, lambda: False) == {} and len(faked.log) == len(jobs)


def test_a_run_that_fails_stops_only_what_needs_it(write, tmp_path, faked, monkeypatch):
    monkeypatch.setattr(faked, "fails", ("grpo",))
    _, jobs = planned(write(), tmp_path)
    failed = scheduler.run_jobs(tmp_path, jobs, 2, 0, lambda: False)
    assert set(failed.values()) == {"it broke"} and {name.split("-")[0] for name in failed} == {"grpo"}
    assert {name.split("-")[0] for name in faked.log} == {"start", "grpo", "random", "base"}  # EI waits for grpo


def test_as_many_as_asked_and_no_more_than_needed(write, tmp_path, faked):
    _, jobs = planned(write(), tmp_path)
    scheduler.run_jobs(tmp_path, jobs, 2, 3, lambda: False)
    assert len(faked.log) == 3
    scheduler.run_jobs(tmp_path, jobs, 2, 0, lambda: len(faked.log) >= 7)
    assert len(faked.log) in (7, 8)  # one more may have been under way


# ------------------------------------------------------------------------------------------------ registration


def registered_with(path, folder, resume=True):
    return registry.register(read_plan(path), folder, resume)


def test_a_plan_is_registered_and_a_later_change_is_marked(write, tmp_path):
    folder = tmp_path / "study"
    path = write()
    (first,) = registered_with(path, folder, resume=False)
    assert (folder / "plan.toml").read_bytes() == path.read_bytes() and first.results == 0
    assert registered_with(path, folder, resume=False) == [first]
    (second,) = registered_with(write("effect = 0.2", "effect = 0.25"), folder)  # nothing was known yet
    assert second.sha256 != first.sha256 and not registry.changes(folder)
    _, jobs = planned(path, folder)
    fabricate(jobs, lambda arm, seed: 0.5, only=lambda one: one.seed == 0)
    with pytest.raises(RunDirError, match="pass --resume"):
        registered_with(path, folder, resume=False)
    registered_with(write("effect = 0.2", "effect = 0.3", "[0, 1, 2]", "[0, 1]"), folder)
    (change,) = registry.changes(folder)
    assert change.results == 4
    assert change.changed == ["seeds: [0, 1, 2] then, [0, 1] now", "power.effect: 0.25 then, 0.3 now"]
    registered_with(write("effect = 0.2", "effect = 0.3 # more", "[0, 1, 2]", "[0, 1]"), folder)
    assert registry.changes(folder)[-1].changed == ["nothing but comments or their place"]
    assert len(list((folder / "plans").iterdir())) == 4


def test_a_folder_of_something_else_is_refused(write, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("all of it")
    with pytest.raises(RunDirError, match="holds no study"):
        study.run(write(), tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir() if p.name != ".lock"] == ["thesis.tex"]


# ------------------------------------------------------------------------------------------------ verdicts


def test_verdicts_by_hand():
    rng = np.random.default_rng(0)
    reference = (rng.random((4, 200)) < 0.5).astype(float)
    better = np.maximum(reference, rng.random((4, 200)) < 0.5)
    found = decide(reference, {"better": better, "same": reference, "worse": reference * (rng.random((4, 200)) < 0.4)})
    assert {name: one.sign for name, one in found.items()} == {"better": 1, "same": 0, "worse": -1}
    assert found["better"].found.mean == pytest.approx((better - reference).mean())
    assert found["better"].p_holm <= 3 * found["better"].p_value and found["same"].p_holm == 1.0


def test_looks_at_every_seed_are_paid_for():
    rng = np.random.default_rng(0)
    reference, other = (rng.random((4, 100)) < 0.4).astype(float), (rng.random((4, 100)) < 0.7).astype(float)
    once, often = decide(reference, {"a": other})["a"], decide(reference, {"a": other}, looks=3)["a"]
    ps = [decide(reference[:n], {"a": other[:n]})["a"].p_value for n in (2, 3, 4)]
    assert often.p_value == pytest.approx(min(1.0, 3 * min(ps)))
    width, wider = (one.found.ci[1] - one.found.ci[0] for one in (once, often))
    assert wider > width and once.found.mean == often.found.mean


@pytest.mark.parametrize(
    ("stopping", "seeds", "verdicts"), [("fixed", 1, 0), ("fixed", 2, 0), ("fixed", 3, 3), ("always_valid", 2, 3)]
)
def test_a_fixed_plan_gives_no_verdict_before_its_end(stopping, seeds, verdicts, write, tmp_path):
    path = write("preset", f'stopping = "{stopping}"\npreset')
    plan, jobs = planned(path, tmp_path)
    fabricate(jobs, lambda arm, seed: 1.0 if arm in ("grpo", "ei") else 0.0, only=lambda one: (one.seed or 0) < seeds)
    found = analyse(plan, jobs)
    assert len(found.verdicts) == verdicts and found.seeds == list(range(seeds))
    assert found.differences["random"] == -1.0
    registry.register(plan, tmp_path / "s", False)
    text = re.sub(r"<[^>]+>", " ", page.page(plan, found, jobs, tmp_path / "s").split("<main>")[1])
    assert ("after Holm" in text) == bool(verdicts) and ("one look" in text or stopping != "fixed" or verdicts)


def test_an_interval_holds_nothing_that_cannot_be(write, tmp_path):
    """Seeds that disagree make a wide one, which ends where accuracies and their differences do."""
    plan, jobs = planned(write(), tmp_path)
    fabricate(jobs, lambda arm, seed: {"grpo": 1.0, "random": float(seed == 1)}.get(arm, 0.0))
    found = analyse(plan, jobs)
    assert next(one.ci for one in found.arms if one.arm.name == "random") == (0.0, 1.0)
    assert found.verdicts["random"].found.ci[0] == -1.0 < found.verdicts["random"].found.ci[1]


def test_an_always_valid_study_stops_when_everything_is_decided(write, tmp_path):
    path = write("preset", 'stopping = "always_valid"\npreset', '"random", "base", "ei"', '"random"', "[arm.ei]\n", "",
                 "prompts_per_round = 4\nsteps_per_round = 2\n", "", "problems = 12", "problems = 0")  # fmt: skip
    plan, jobs = planned(path, tmp_path)

    def accuracy(arm, seed):
        return 1.0 if arm == "grpo" else 0.0

    fabricate(jobs, accuracy, problems=40, only=lambda one: one.seed is None or one.seed < 1)
    assert not is_decided(plan, jobs)
    fabricate(jobs, accuracy, problems=40, only=lambda one: one.seed == 1)
    assert is_decided(plan, jobs)
    found = analyse(plan, jobs)
    assert found.stopped and found.final and found.verdicts["random"].sign == -1
    fixed, _ = planned(write(), tmp_path)
    assert not is_decided(fixed, jobs)


def test_results_of_other_weights_or_problems_are_refused(write, tmp_path):
    plan, jobs = planned(write(), tmp_path)
    fabricate(jobs, lambda arm, seed: 0.5)
    (jobs[1].run_dir / "result.json").write_text(json.dumps({"weights_sha256": "b" * 64}))
    with pytest.raises(ConfigError, match="other weights"):
        answers(jobs[1])
    fabricate(jobs, lambda arm, seed: 0.5, only=lambda one: one is jobs[1], problems=11)
    with pytest.raises(ConfigError, match="answered other problems"):
        analyse(plan, jobs)


# ------------------------------------------------------------------------------------------------ a whole study


def test_the_command_writes_answer_and_page_of_what_is_done(write, tmp_path, capsys):
    folder, path = tmp_path / "study", write("[arm.grpo]", '[arm.grpo]\nlabel = "A <script>"')
    plan, jobs = planned(path, folder)
    registry.register(plan, folder, False)
    shares = {"grpo": 1.0, "random": 0.0, "base": 0.0, "ei": 0.5, "start": 0.5}
    fabricate(jobs, lambda arm, seed: shares[arm])
    cli.main(["study", str(path), "--out_dir", str(folder), "--resume", "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["final"] and found["runs"] == found["done"] == 13 and not found["plan_changed"]
    assert found["answer"].startswith("A <script> beats GRPO with a random reward") and "13 of them done" in err
    rows = {row["arm"]: row for row in found["comparisons"]}
    assert rows["random"]["difference"] == -1.0 and rows["random"]["verdict"] == "worse"
    assert rows["random"]["p_holm"] == pytest.approx(3 * 2 * 0.5**12, rel=0.01)
    html = Path(found["path"]).read_text()
    assert found["plan_sha256"] in html and "<script" not in html and "Is &lt;b&gt; better?" in html
    assert html.index('id="answer"') < html.index('id="figures"') < html.index("<svg role")
    assert "was changed after results existed" not in html and "sha256sum plan.toml" in html
    changed = write("[arm.grpo]", '[arm.grpo]\nlabel = "B"')
    cli.main(["study", str(changed), "--out_dir", str(folder), "--resume"])
    assert "changed after results existed" in capsys.readouterr().out
    html = Path(found["path"]).read_text()
    assert "The plan was changed after results existed" in html
    assert "arm.grpo.label: A &lt;script&gt; then, B now" in html
    assert found["plan_sha256"][:12] in html and read_plan(changed).sha256 in html


def test_failed_runs_are_named_and_the_page_is_written(write, tmp_path, faked, monkeypatch):
    monkeypatch.setattr(faked, "fails", ("start",))
    plan, jobs = planned(write(), tmp_path / "s")
    registry.register(plan, tmp_path / "s", False)
    fabricate(jobs, lambda arm, seed: 0.5, only=lambda one: one.arm == "base")
    with pytest.raises(GrpoError, match=r"1 of 13 runs failed \(start-\w+/seed_all\)"):
        study.run(write(), tmp_path / "s", resume=True)
    assert "Not decided yet: 3 of 13 runs are done" in (tmp_path / "s/study.html").read_text()


def test_fewer_problems_than_planned(write, tmp_path):
    with pytest.raises(DataError, match="has 16 problems"):
        study.run(write("problems = 12", "problems = 17"), tmp_path / "s")


@pytest.mark.parametrize("text", ["", "stopping = 'always_valid'\n"])
def test_simulated_studies_of_a_plan(text, write, capsys):
    path = write("problems = 12", f"problems = 200\n{text}", "effect = 0.2", "effect = 0.3")
    cli.main(["study", str(path), "--simulate", "40", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["false_winners"]["studies"] <= 6  # of 40 at 5 %, once in 100 times more
    low, high = found["planted"]["ci95"]
    assert low - 0.1 <= found["power_planned"] <= high + 0.1
    cli.main(["study", str(path), "--simulate", "2"])
    assert "a false winner" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("stopping", ["fixed", "always_valid"])
def test_two_hundred_simulated_studies(stopping, write):
    """At most 5 % false winners within the interval's reach, and the planned effect in at least 80 %."""
    changes = ("[0, 1, 2]", '"auto"', "effect = 0.2", "effect = 0.08")
    path = write("problems = 12", f'problems = 400\nstopping = "{stopping}"', *changes)
    found = ahead.simulate(read_plan(path), 200)
    assert found["false_winners"]["rate"] <= 0.05 and found["planted"]["rate"] >= 0.8, found


def test_the_example_is_a_plan():
    plan = read_plan(REPOSITORY / "examples/study.toml")
    assert [arm.name for arm in plan.arms] == ["grpo", "random", "base", "ei"] and len(plan.seeds) == 3
    assert ahead.power_of(plan, plan.problems)["power"] >= 0.8


@pytest.mark.slow
@pytest.mark.skipif(not browser.PROGRAM, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_fits_the_screen_and_fetches_nothing(width, write, tmp_path):
    plan, jobs = planned(write(), tmp_path / "s")
    registry.register(plan, tmp_path / "s", False)
    fabricate(jobs, lambda arm, seed: {"grpo": 0.8, "base": 0.0}.get(arm, 0.5))
    url = Path(study.run(write("effect = 0.2", "effect = 0.1"), tmp_path / "s", resume=True)["path"]).as_uri()

    async def look():
        async with browser.opened(url, tmp_path / "profile", width, 900) as tab:
            assert await tab.value("document.documentElement.scrollWidth") <= width
            assert await tab.value("document.querySelectorAll('section, figure').length") == 9
            assert [event["request"]["url"] for event in tab.of("Network.requestWillBeSent")] == [url]
            assert not tab.of("Log.entryAdded")

    asyncio.run(look())


SMALL = """
arms = ["grpo", "ei"]
seeds = 2
preset = "tiny"
[start]
stage = "sft"
batch_size = 8
epochs = 1
eval_every = 100
[toy]
train = 40
val = 6
test = 10
[tiny_model]
hidden_size = 32
layers = 1
[common]
max_new_tokens = 4
eval_examples = 2
[arm.grpo]
steps = 2
rollouts_per_step = 8
group_size = 4
[arm.ei]
prompts_per_round = 2
steps_per_round = 1
batch_size = 4
"""


@pytest.mark.slow
def test_a_study_for_real_in_pieces_and_whole_comes_to_the_same(tmp_path):
    """The start first; then all of it, two at a time. Another folder makes it in one go, with the same weights."""
    (tmp_path / "plan.toml").write_text(SMALL)
    common = ["study", "plan.toml", "--json", "--out_dir"]
    pieces = command_line(*common, "a", "--max_runs", "2", cwd=tmp_path)
    assert pieces.returncode == 0, pieces.stderr
    assert json.loads(pieces.stdout)["done"] == 2 and not json.loads(pieces.stdout)["final"]
    refused = command_line(*common, "a", cwd=tmp_path)
    assert refused.returncode == 2 and "pass --resume" in refused.stderr
    for words in (["a", "--resume", "--jobs", "2"], ["b"]):
        done = command_line(*common, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["done"] == 5

    def weights(folder):
        found = [
            (path.name, json.loads(path.read_text())["weights_sha256"]) for path in folder.glob("results/*/*.json")
        ]
        return sorted(found)

    assert len(weights(tmp_path / "a")) == 5 and weights(tmp_path / "a") == weights(tmp_path / "b")
    run_dir = next((tmp_path / "a/runs").glob("ei-*/seed_0"))
    assert {"config.toml", "metrics.jsonl", "result.json", "checkpoints"} <= {path.name for path in run_dir.iterdir()}
    assert SimpleNamespace(**json.loads((tmp_path / "a/study.json").read_text())).final
