"""Steps trained again, runs forked, runs held to their word."""

from __future__ import annotations

import json
import shutil

import pytest

from grpo_gsm8k import ei, grpo, sft
from grpo_gsm8k.audit.fork import fork
from grpo_gsm8k.audit.replay import replay
from grpo_gsm8k.audit.verify import Options, verify
from grpo_gsm8k.errors import ConfigError, RunDirError
from grpo_gsm8k.report import parted, write_report
from grpo_gsm8k.runs import rollouts
from scripts.fork_variance import measure
from tests.test_chain import config_of

EI = {
    "rounds": 2,
    "save_every": 1,
    "keep_last": 9,
    "steps_per_round": 2,
    "prompts_per_round": 4,
    "samples_per_prompt": 3,
    "batch_size": 3,
}


def slow(*values):
    """A case of the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


STAGES = [slow("sft"), slow("ei"), "grpo"]


class Runs:
    """A run of each stage, with a checkpoint after every second step, made when it is first asked for."""

    def __init__(self, tiny, folder):
        self.tiny, self.folder = tiny, folder

    def __truediv__(self, stage):
        if not (run := self.folder / stage).exists():
            more = {"ei": EI, "grpo": {"minibatches": 2, "epochs": 2, "old_logprobs": "recompute"}}.get(stage, {})
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ei, "keep_right", lambda cfg, group: list(group[:2]))
                {"sft": sft, "ei": ei, "grpo": grpo}[stage].run(config_of(self.tiny, run, stage, **more))
        return run


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """See `Runs`."""
    return Runs(tiny, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("stage", STAGES)
def test_every_step_is_trained_again_to_the_same_weights(runs, stage):
    for step in (1, 3, 4):
        found = replay(runs / stage, step, own_code=True)
        assert found["verdict"] == "bitwise" and not found["metrics_that_differ"]
        assert found["from_step"] == (step - 1 if stage == "ei" else 2 if step > 2 else 0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_what_it_says_it_is(runs, stage, monkeypatch):
    monkeypatch.setattr(ei, "keep_right", lambda cfg, group: list(group[:2]))
    found = verify(runs / stage, Options(steps=2, own_code=True))
    (part,) = found["parts"]
    assert found["ok"] and not part["close"] and not part["unchecked"], part
    said = "\n".join(part["bitwise"])
    assert "trained again, the same weights after each" in said and "evaluations: graded again" in said
    if stage != "sft":
        assert "the same ids and log-probabilities" in said and "rollouts of" in said


def figures_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


@pytest.mark.parametrize(("stage", "at"), [slow("sft", 2), slow("ei", 3), slow("grpo", 0), ("grpo", 2)])
def test_an_unchanged_fork_is_its_origin_bit_for_bit(runs, stage, at, tmp_path, monkeypatch):
    monkeypatch.setattr(ei, "keep_right", lambda cfg, group: list(group[:2]))
    found = fork(runs / stage, at, [], tmp_path / "fork")
    assert found["at"] == at and not found["changed"]
    assert found["weights_sha256"] == json.loads((runs / stage / "result.json").read_text())["weights_sha256"]
    assert figures_of(tmp_path / "fork") == figures_of(runs / stage)
    for folder in ("samples", "evals", "rounds", "rollouts"):
        names = [
            {p.name: p.read_bytes() for p in (run / folder).glob("*")} for run in (runs / stage, tmp_path / "fork")
        ]
        assert names[0] == names[1]
    assert verify(tmp_path / "fork", Options(steps=0))["ok"]


def test_a_changed_fork_has_its_own_settings_and_the_same_draws(runs, tmp_path):
    found = fork(runs / "grpo", 2, ["lr=0.02", "clip_eps=0.3"], tmp_path / "fork", max_steps=3)
    assert found["changed"] == {"clip_eps": [0.2, 0.3], "lr": [0.01, 0.02]} and found["step"] == 3
    mine, other = (rollouts.read(run / rollouts.name_of(3)) for run in (tmp_path / "fork", runs / "grpo"))
    assert mine.groups == other.groups and mine.before == other.before and mine.after != other.after
    with pytest.raises(RunDirError, match="exists already"):
        fork(runs / "grpo", 2, [], tmp_path / "fork")


@pytest.mark.parametrize(
    ("at", "sets", "what"),
    [
        (3, [], "no checkpoint of this step; the nearest: 2 and 4"),
        (9, [], "no checkpoint of this step; the nearest: 4"),
        (2, ["clip_epz=1"], "did you mean 'clip_eps'"),
        (2, ["data=elsewhere"], "keeps model, data and task"),
    ],
)
def test_a_fork_that_cannot_be_is_one_line(runs, tmp_path, at, sets, what):
    with pytest.raises(ConfigError, match=what):
        fork(runs / "grpo", at, sets, tmp_path / "fork")
    assert not (tmp_path / "fork").exists()


@pytest.mark.slow
def test_the_report_of_a_fork_says_where_it_left_its_origin(runs, tmp_path):
    shutil.copytree(runs / "grpo", tmp_path / "origin")
    fork(tmp_path / "origin", 2, [], tmp_path / "same")
    fork(tmp_path / "origin", 2, ["lr=0.02"], tmp_path / "faster")
    (same,) = parted([tmp_path / "same", tmp_path / "origin"])
    assert (
        same
        == "same was forked at step 2 with nothing changed. All 4 steps are the same, bit for bit, metrics and weights."
    )
    (other,) = parted([tmp_path / "faster", tmp_path / "origin"])
    assert other.startswith("faster was forked at step 2 with lr 0.01 → 0.02. faster and origin are the same, bit for ")
    assert "up to step 2; step 3 is the first that differs, in loss, policy/" in other
    assert "What they sample is the same up to step 3, and first differs at step 4." in other
    page = write_report([tmp_path / "faster", tmp_path / "origin"]).read_text()
    assert "step 3 is the first that differs" in page and "Where they part" in page
    assert parted([tmp_path / "same"]) == []


@pytest.mark.slow
def test_common_random_numbers_halve_the_variance_of_a_difference_at_least(tiny, tmp_path):
    grpo.run(config_of(tiny, tmp_path / "origin", rollouts_per_step=16, steps=6, eval_every=0, keep_last=9, lr=3e-4))
    how = {"seeds": 64, "out": tmp_path / "forks", "metric": "reward/mean", "max_steps": 0}
    found = measure(tmp_path / "origin", 2, ["lr=4e-4"], **how)
    assert found["ratio"] <= found["ci95"][1] <= 0.5, found
