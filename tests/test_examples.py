"""examples/: each file does what its first lines say, by hand and in a run."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from grpo_gsm8k import config, grpo
from grpo_gsm8k.datatypes import Completion, Grade, Prompt, Trajectory
from grpo_gsm8k.tasks import load_task
from grpo_gsm8k.tasks.base import load_split
from grpo_gsm8k.tasks.conversations import check_chat
from grpo_gsm8k.tasks.rewards import Grader, make_reward
from grpo_gsm8k.trainer.batch import make_batch
from grpo_gsm8k.trainer.losses import make_loss
from tests.toys import REPOSITORY, cli, rows, stage_config, word_problem

EXAMPLES = REPOSITORY / "examples"
OF_SERVICES = {"alphabetical.py"}  # clients of the training service; tests/test_serve_rollouts.py runs them


@pytest.fixture(autouse=True)
def _where_the_command_is_typed(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize(
    ("text", "tokens", "reward"),
    [("It is 72.", 10, 1.2), ("It is 72.", 200, 1.2), ("#### 72", 300, 1.1), ("72", 999, 1.0), ("It is 71.", 10, 0.0)],
)
def test_reward(text, tokens, reward):
    said = Completion(tuple(range(tokens)), (0.0,) * tokens, text, "stop")
    group = [Trajectory.of(Prompt(word_problem("a", "", "", "72"), (1,)), said)]
    ((found,),) = Grader(load_task("gsm8k"), make_reward("examples.reward:short_and_right")).grade([group])
    assert found.reward == pytest.approx(reward) and found.components.keys() == {"right", "brevity"}


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.1, 5.0, 0.2], [-1.0, 1.0, 0.0]),
        ([1.0, 0.0, 0.0, 0.0], [1.0, -1 / 3, -1 / 3, -1 / 3]),
        ([2.0, 2.0], [0.0, 0.0]),
        ([3.0], [0.0]),
    ],
)
def test_advantage(rewards, expected):
    cfg = stage_config("grpo", advantage="examples.advantage:by_rank")
    assert grpo.advantages_of(cfg, [Grade(reward) for reward in rewards]) == pytest.approx(expected)


@pytest.mark.parametrize("advantage", [2.0, -1.0])
@pytest.mark.parametrize("ratio", [0.01, 0.9, 1.0, 1.1, 50.0])
def test_loss(ratio, advantage):
    """Against its formula in plain Python; the gradient by a finite difference. Never beyond 1 + clip_eps."""
    loss = make_loss("examples.loss:Saturating", {"clip_eps": 0.3})
    batch = make_batch(rows(([1, 2], 1), advantage=advantage, logprob=math.log(0.5)), 0)

    def by_hand(logp):
        bound = math.log(1.3)
        return -math.exp(bound * math.tanh((logp - math.log(0.5)) / bound)) * advantage

    at = math.log(0.5 * ratio)
    logp = torch.tensor([[at]], requires_grad=True)
    found = loss(logp, batch).sum()
    found.backward()
    assert float(found.detach()) == pytest.approx(by_hand(at), rel=1e-4)
    assert abs(float(found.detach())) <= 1.3 * abs(advantage) * (1 + 1e-5)
    assert float(logp.grad) == pytest.approx((by_hand(at + 1e-4) - by_hand(at - 1e-4)) / 2e-4, rel=1e-2, abs=1e-5)
    above, below = loss.clipped(logp.detach(), batch)
    assert (bool(above), bool(below)) == (ratio > 1.3, ratio < 1 / 1.3)


def test_task(tmp_path):
    task = load_task("examples.task:Backwards")
    task.generate(tmp_path, 0, {"train": 30, "val": 4, "test": 4})
    example = load_split(task, tmp_path, "train")[0]
    assert task.target(example) == " ".join(reversed(example.messages.split()))
    question = {"question": "a b c d", "answer": "d c b a", "id": "x"}
    for response, reward, right in (
        ("d c b a", 1.0, True),
        (" d c b a\n", 1.0, True),
        ("d c a b", 0.25, False),
        ("", 0.0, False),
    ):
        grade = task.grade(task.example(question), response)
        assert (grade.reward, grade.correct) == (pytest.approx(reward), right), response
    assert task.grade(task.example(question), "d c b a a").format_ok is False


def test_chat():
    found = check_chat(EXAMPLES / "chat.jsonl")
    assert found.ok and found.rows == 32


def test_a_run_with_all_of_them(tiny, tmp_path):
    """Two steps on the tiny model: advantages are ranks, and the reward's parts are logged."""
    task = load_task("examples.task:Backwards")
    task.generate(tmp_path / "data", 0, {"train": 30, "val": 4, "test": 4})
    own = {name: f"examples.{name}:{what}" for name, what in {"loss": "Saturating", "advantage": "by_rank"}.items()}
    flags = {"model_id": str(tiny.model), "data": str(tmp_path / "data"), "task": "examples.task:Backwards", **own}
    flags |= {"steps": 2, "rollouts_per_step": 8, "group_size": 4, "eval_every": 2, "lr": 1e-3, "prompt_style": "auto"}
    grpo.run(stage_config("grpo", **flags, out_dir=str(tmp_path / "run")))
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(logged) == 2 and all({"reward/right", "reward/letters"} <= row.keys() for row in logged)
    assert all(-1 <= row["advantage/min"] <= row["advantage/max"] <= 1 for row in logged)


def test_every_example_is_tested_here_and_says_how_it_is_typed():
    for path in EXAMPLES.glob("*.py"):
        if path.name not in OF_SERVICES:
            assert f"def test_{path.stem}(" in (REPOSITORY / "tests/test_examples.py").read_text()
            assert re.search(rf"--{path.stem} examples\.{path.stem}:\w+", path.read_text()), path


@pytest.mark.slow
def test_a_tiny_model_learns_the_task(tmp_path):
    """The command of examples/task.py, with fewer data and steps: fine-tuning, then GRPO."""
    less = [
        "--set",
        "toy.train=2500",
        "--set",
        "toy.test=100",
        "--set",
        "grpo.steps=8",
        "--set",
        "ei.steps_per_round=2",
    ]
    done = cli(
        "pipeline",
        "--preset",
        "tiny",
        "--task",
        "examples.task:Backwards",
        "--out_dir",
        tmp_path / "run",
        *less,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    accuracy = {stage["name"]: stage["accuracy"] for stage in json.loads(done.stdout)["stages"]}
    print(accuracy)
    assert accuracy["base"] == 0 and accuracy["grpo"] > 0.1
    assert config.resolve("grpo", preset="tiny", flags={"task": "examples.task:Backwards"}).task
