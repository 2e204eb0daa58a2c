"""A task, a reward, an advantage and a sampler of a user's own, each in one file outside of the package.

And what the seams promise: a verdict is made once, weights are handed over once, turns continue the ids of turns.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter

import pytest

from grpo_gsm8k import ei, fast_eval_vllm, grpo, plugins, rollout, sft
from grpo_gsm8k.datatypes import Completion, Example, Grade, Prompt, Request, SamplingParams, Trajectory
from grpo_gsm8k.engines.trajectories import sample_trajectories
from grpo_gsm8k.engines.users import UserSampler
from grpo_gsm8k.errors import ConfigError, DataError, PluginError, UserError
from grpo_gsm8k.tasks import load_task
from grpo_gsm8k.tasks.base import TaskOptions, load_examples
from grpo_gsm8k.tasks.grader_pool import grader_pool
from grpo_gsm8k.tasks.gsm8k.task import Gsm8k
from grpo_gsm8k.tasks.render import Renderer, task_of
from grpo_gsm8k.tasks.rewards import Grader, make_reward
from grpo_gsm8k.trainer.policy import load_tokenizer
from grpo_gsm8k.workbench import open_workbench
from tests.toys import cli, make_model, stage_config, word_problem

MINE = '''
import asyncio

from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.tasks.base import Grade, Task


class Copy(Task):
    """Say the word again."""

    name = "copy"

    def prompt(self, example):
        return [("user", f"Say {example.messages}.")]

    def target(self, example):
        return example.answer

    def grade(self, example, response):
        said = response.strip()
        share = sum(a == b for a, b in zip(said, example.answer)) / max(len(said), len(example.answer))
        return Grade(reward=share, correct=said == example.answer, answer=said)


class Taste(Copy):
    """Knows no right answer."""

    def grade(self, example, response):
        return Grade(reward=1.0 / (1 + len(response)))


class Guess(Copy):
    """Two turns: the environment says whether the first was right."""

    max_turns = 2

    def env(self, example):
        class Judge:
            def reply(self, turn):
                return None if turn.strip() == example.answer else "No."

        return Judge()


class Raises(Copy):
    def grade(self, example, response):
        return 1 / 0


class Nonsense(Copy):
    def grade(self, example, response):
        return "good"


def brevity(completion, example):
    return 1.0 / len(completion.token_ids)


def even(completion, example):
    return sum(i % 2 == 0 for i in completion.token_ids) / len(completion.token_ids)


def ranks(completions, example):
    order = sorted(range(len(completions)), key=lambda i: len(completions[i].text))
    return [{"rank": -float(order.index(i))} for i in range(len(completions))]


async def slow(completion, example):
    await asyncio.sleep(0.2)
    return 0.5


def raises(completion, example):
    return completion.no_such_thing


def nonsense(completion, example):
    return "good"


def too_few(completions, example):
    return [1.0]


def signs(grades):
    mean = sum(grade.reward for grade in grades) / len(grades)
    return [1.0 if grade.reward > mean else -1.0 if grade.reward < mean else 0.0 for grade in grades]


def one(grades):
    return [1.0]


class Counting(HFSampler):
    calls = 0

    def __init__(self, model, renderer, config):
        super().__init__(model, renderer, config.sample_rows)

    def sample(self, requests, params):
        Counting.calls += 1
        return super().sample(requests, params)
'''
WORDS = ["ba", "do", "mi", "la", "ka", "so", "te", "fi", "nu", "ro", "ze", "pa"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder with a user's module, words to copy as data, and a tiny model."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine_seams.py").write_text(MINE)
    data = folder / "data"
    data.mkdir()
    for name, few in (("train", WORDS), ("val", WORDS[:4]), ("test", WORDS[:6])):
        rows = [{"question": word, "answer": word} for word in few]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, data, make_model(folder / "model", data)


@pytest.fixture(autouse=True)
def at_home(words, monkeypatch):
    monkeypatch.chdir(words[0])
    monkeypatch.syspath_prepend(str(words[0]))


def config_of(stage, words, out, **flags):
    _, data, model = words
    small = {"model_id": str(model), "data": str(data), "out_dir": str(out), "prompt_style": "auto", "eval_every": 100}
    small |= {"max_new_tokens": 6, "task": "mine_seams:Copy"}
    if stage == "grpo":
        small |= {"rollouts_per_step": 16, "group_size": 4, "steps": 2, "lr": 1e-3, "eval_every": 2}
    return stage_config(stage, **{**small, **flags})


def metrics_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_users_task_reward_advantage_and_sampler_learn(words, tmp_path):
    """SFT on a few answers, then GRPO with a reward, a sampler and an advantage of one's own."""
    flags = {"epochs": 4, "batch_size": 4, "lr": 1e-3, "warmup_steps": 2}
    trained = sft.run(config_of("sft", words, tmp_path / "sft", **flags))
    asked = {
        "model_id": trained["model"],
        "task": "",
        "steps": 10,
        "lr": 5e-3,
        "rollouts_per_step": 48,
        "group_size": 8,
    }
    asked |= {
        "engine": "mine_seams:Counting",
        "advantage": "mine_seams:signs",
        "eval_every": 8,
        "reward": "mine_seams:even",
    }
    found = grpo.run(config_of("grpo", words, tmp_path / "grpo", **asked))  # the model remembers its task
    rows = metrics_of(tmp_path / "grpo")
    rewards = [row["reward/mean"] for row in rows]
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.1, rewards
    assert rows[0]["advantage/max"] == 1.0 and rows[0]["advantage/min"] == -1.0
    assert task_of(config_of("grpo", words, "", model_id=found["model"], task="")).spec == "mine_seams:Copy"
    counting = plugins.load_object("mine_seams:Counting", "engine")
    assert counting.calls >= 8
    result = fast_eval_vllm.run(eval_config(found["model"], words[1] / "test.jsonl", tmp_path))
    assert result["task"] == "mine_seams:Copy" and result["accuracy"] is not None and result["format_accuracy"] is None


def eval_config(model, path, out, **flags):
    from grpo_gsm8k import config

    small = {"model_id": str(model), "eval_path": str(path), "out_dir": str(out), "device": "cpu", "max_new_tokens": 6}
    return config.resolve("eval", flags={**small, **flags})


@pytest.mark.parametrize("reward", ["brevity", "ranks", "slow"])
def test_a_users_reward_of_each_kind(words, tmp_path, reward):
    grpo.run(config_of("grpo", words, tmp_path, reward=f"mine_seams:{reward}", steps=1, eval_every=0))
    (row,) = metrics_of(tmp_path)
    assert row["reward/mean"] == pytest.approx(row["reward/rank" if reward == "ranks" else "reward/reward"])
    assert row["outcome/right_frac"] == 0.0  # the task's own verdict is made all the same
    if reward == "slow":
        assert row["time/compute_rewards"] < 1.5  # sixteen of 0.2 s, awaited together


def test_without_right_answers_the_mean_reward_chooses(words, tmp_path):
    flags = {"task": "mine_seams:Taste", "steps": 3, "eval_every": 1, "save_every": 1, "keep_last": 1}
    grpo.run(config_of("grpo", words, tmp_path, **flags))
    rows = metrics_of(tmp_path)
    assert all("val/reward" in row and "val/accuracy" not in row and "outcome/right_frac" not in row for row in rows)
    scores = [row["val/reward"] for row in rows]
    best = max(range(3), key=lambda i: (scores[i], i)) + 1
    kept = {int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step_*")}
    assert kept == {best, 3}
    with pytest.raises(ConfigError, match="no right answers"):
        ei.run(config_of("ei", words, tmp_path / "ei", task="mine_seams:Taste", batch_size=4, rounds=1))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"task": "mine_seams:Raises"}, r"task 'mine_seams:Raises': .*mine_seams\.py:\d+: ZeroDivisionError"),
        ({"task": "mine_seams:Nonsense"}, "'good', not a Grade"),
        ({"task": "mine_seams:brevity"}, "not a subclass"),
        ({"task": "mine_seams:Nobody"}, "has no 'Nobody'"),
        ({"task": "gsm9k"}, "did you mean 'gsm8k'"),
        ({"reward": "mine_seams:raises"}, r"reward mine_seams:raises: .*mine_seams\.py:\d+: AttributeError"),
        ({"reward": "mine_seams:nonsense"}, "'good' for example"),
        ({"reward": "mine_seams:too_few"}, "for the 4 completions of example"),
        ({"advantage": "mine_seams:one"}, "must be as many numbers"),
        ({"advantage": "mine_seams:raises"}, "advantage 'mine_seams:raises': TypeError"),
        ({"engine": "hff"}, "engine = 'hff'"),
    ],
)
def test_what_a_user_got_wrong_is_one_line(words, tmp_path, flags, said):
    with pytest.raises(UserError, match=said) as caught:
        grpo.run(config_of("grpo", words, tmp_path, steps=1, eval_every=0, **flags))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_broken_row_names_its_line(words, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "ba", "answer": "ba"}\n{"answer": "ba"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: no question"):
        load_examples(load_task("mine_seams:Copy"), path)
    done = cli("validate", "--data", path, "--task", "mine_seams:Copy", cwd=words[0])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "rows.jsonl:2" in done.stderr


# ------------------------------------------------------------------------------------------------ one verdict


@pytest.fixture
def verdicts(monkeypatch):
    """How often each (example, response) was graded."""
    seen, verdict = Counter(), Gsm8k.verdict

    def counted(self, example, response, opened):
        seen[example.id, response] += 1
        return verdict(self, example, response, opened)

    monkeypatch.setattr(Gsm8k, "verdict", counted)
    return seen


@pytest.mark.parametrize("stage", ["grpo", "ei", "eval"])
def test_nothing_is_graded_twice(tiny, tmp_path, verdicts, stage):
    """As many verdicts as completions: of a GRPO step with samples and validation, of a round, of an evaluation."""
    where = {"model_id": str(tiny.model), "data": str(tiny.data), "out_dir": str(tmp_path)}
    if stage == "grpo":
        grpo.run(stage_config("grpo", **where, rollouts_per_step=8, group_size=4, steps=1, eval_every=1))
        expected = 8 + 4
    elif stage == "ei":
        flags = {"rounds": 1, "prompts_per_round": 6, "samples_per_prompt": 3, "steps_per_round": 1, "eval_every": 0}
        ei.run(stage_config("ei", **where, **flags))
        expected = 18
    else:
        fast_eval_vllm.run(eval_config(tiny.model, tiny.data / "test.jsonl", tmp_path, prompt_style="gsm8k"))
        expected = 16
    assert sum(verdicts.values()) == expected


def test_weights_are_handed_over_once_after_a_validation(tiny, tmp_path, monkeypatch):
    flags = {"rollouts_per_step": 8, "group_size": 4, "steps": 3, "eval_every": 1, "lr": 1e-3}
    where = {"model_id": str(tiny.model), "data": str(tiny.data), "out_dir": str(tmp_path)}
    cfg = stage_config("grpo", **where, **flags)
    with open_workbench(cfg, "grpo", {}) as bench:
        given, load = [], bench.sampler.load
        bench.sampler.load = lambda ref, tensors: (given.append(ref.version), load(ref, tensors))
        examples = load_examples(bench.renderer.task, tiny.data / "train.jsonl")
        grpo.train(cfg, bench, bench.prompts(examples, "train"), Grader(bench.renderer.task))
    assert given == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------ several turns


class Script:
    """A sampler that says what it was told, one text a call, and ends each turn."""

    def __init__(self, renderer, *texts):
        self.renderer, self.texts, self.asked = renderer, list(texts), []

    def sample(self, requests, params):
        self.asked += requests
        text = self.texts.pop(0)
        ids = (*self.renderer.tokenizer(text, add_special_tokens=False)["input_ids"], self.renderer.end_id)
        return [[Completion(ids, (-0.5,) * len(ids), text, "stop", 3, seed) for seed in r.seeds] for r in requests]


@pytest.fixture
def renderer(words):
    task = load_task("mine_seams:Guess")
    return Renderer(load_tokenizer(config_of("grpo", words, "")), task)


def test_a_turn_continues_the_very_ids_of_the_turn_before(renderer):
    prompt = renderer.prompt(Example("a", "ba", "ba"))
    script = Script(renderer, "do", "ba")
    ((one, _two),) = sample_trajectories(script, renderer, [prompt], SamplingParams(20), n=2, seed=1, context=500)
    first, second = script.asked[0], script.asked[1]
    assert second.token_ids[: len(first.token_ids)] == first.token_ids == prompt.token_ids
    sampled = tuple(i for i, m in zip(one.token_ids, one.mask, strict=True) if m)
    spelled = renderer.tokenizer.decode
    assert spelled(sampled) == "do<|im_end|>ba<|im_end|>" and one.turns == 2 and one.finish_reason == "stop"
    whole = [("user", "Say ba."), ("assistant", "do"), ("user", "No."), ("assistant", "ba")]
    chat = [{"role": role, "content": content} for role, content in whole]
    rendered = renderer.tokenizer.apply_chat_template(chat, tokenize=False)
    assert spelled(prompt.token_ids + one.token_ids) == rendered.rstrip("\n")
    assert second.token_ids + one.token_ids[len(second.token_ids) - len(prompt.token_ids) :] == (
        prompt.token_ids + one.token_ids
    )
    assert all(p == 0.0 for p, m in zip(one.logprobs, one.mask, strict=True) if not m)
    assert len({seed for request in script.asked for seed in request.seeds}) == 4  # each turn draws anew


def test_a_conversation_ends_by_its_answer_its_turns_its_tokens_or_the_context(renderer):
    prompt = renderer.prompt(Example("a", "ba", "ba"))

    def run(*texts, budget=20, context=500):
        script = Script(renderer, *texts)
        ((found,),) = sample_trajectories(script, renderer, [prompt], SamplingParams(budget), context=context)
        return found

    right = run("ba")
    assert right == Trajectory.of(prompt, Script(renderer, "ba").sample([_request(prompt, right)], None)[0][0])
    wrong = run("do", "mi")
    assert (wrong.turns, wrong.finish_reason) == (2, "turns")
    n = len(right.token_ids)
    cut = run("do", "do do do", budget=n + 1)
    assert (cut.turns, cut.finish_reason, sum(cut.mask)) == (2, "length", n + 1)
    full = run("do", context=len(prompt.token_ids) + n + 2)
    assert (full.turns, full.finish_reason, full.mask) == (1, "length", (1,) * n)


def _request(prompt, trajectory):
    return Request(prompt.token_ids, (trajectory.seed,))


def test_several_turns_are_trained_with_the_environment_masked(words, tmp_path):
    cfg = config_of("grpo", words, tmp_path, task="mine_seams:Guess", eval_every=1, steps=1, max_new_tokens=24)
    with open_workbench(cfg, "grpo", {}) as bench:
        sample = bench.sampler.sample

        def ends(requests, params):  # a random model seldom ends its turn
            short = sample(requests, SamplingParams(2, params.temperature))
            end = bench.renderer.end_id
            return [
                [
                    Completion(
                        (*c.token_ids[:2], end), (*c.logprobs[:2], -1.0), c.text, "stop", c.policy_version, c.seed
                    )
                    for c in group
                ]
                for group in short
            ]

        bench.sampler.sample = ends
        seen, learn = [], bench.learner.forward_backward
        bench.learner.forward_backward = lambda data, *more: (seen.append(data), learn(data, *more))[1]
        examples = load_examples(bench.renderer.task, words[1] / "train.jsonl")
        grpo.train(cfg, bench, bench.prompts(examples, "train"), Grader(bench.renderer.task))
    (row,) = metrics_of(tmp_path)
    assert row["turns/mean"] == 2.0 and row["length/mean"] == 6.0
    assert [sum(row.mask) for row in seen[0]] == [6] * 16  # three sampled tokens a turn
    assert max(len(row.token_ids) for row in seen[0]) > 7 + 12


# -------------------------------------------------------------------------------------------------- resuming


def test_what_was_sampled_ahead_is_the_same_after_a_checkpoint():
    prompt = Prompt(word_problem("a", "q", "#### 1", "1"), (1, 2))
    trajectory = Trajectory.of(prompt, Completion((5, 6), (-0.1, math.pi), "text", "stop", 4, 9))
    held = [[rollout.Rollout(trajectory, Grade(0.3, {"x": 0.3}, True, None, "1", {"correct_strict": True}))]]
    state = rollout.SourceState(7, rollout.Collected(held, 9))
    stored = json.loads(json.dumps(state.as_json()))
    assert rollout.SourceState.of_json(stored, [prompt]) == state
    assert rollout.SourceState.of_json(rollout.SourceState(3).as_json(), []) == rollout.SourceState(3)


def test_graders_that_wait_are_asked_side_by_side():
    import threading
    import time

    both = threading.Barrier(2, timeout=20)

    def waits(completion, example):
        both.wait()
        time.sleep(0.01)
        return 1.0

    waits.threads = 2
    prompt = Prompt(word_problem("a", "q", "#### 1", "1"), (1, 2))
    group = [Trajectory.of(prompt, Completion((5,), (0.0,), "#### 1", "stop"))]
    found = Grader(load_task("gsm8k"), waits).grade([group, group])
    assert [grade.reward for (grade,) in found] == [1.0, 1.0] and make_reward("default") is None


# ---------------------------------------------------------------------------------- what fails in the middle of a run

FLAKY = """
from collections import Counter

from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.tasks.base import Grade
from grpo_gsm8k.trainer.losses import GrpoClip
from mine_seams import Copy

LIMIT, SEEN = {}, Counter()


def tick(name):
    SEEN[name] += 1
    if SEEN[name] == LIMIT.get(name):
        raise KeyError(name)


class Task(Copy):
    def grade(self, example, response):
        tick("task")
        return super().grade(example, response)


class Sampler(HFSampler):
    def __init__(self, model, renderer, config):
        super().__init__(model, renderer, config.sample_rows)

    def sample(self, requests, params):
        tick("engine")
        return super().sample(requests, params)


class Loss(GrpoClip):
    def __call__(self, logp, batch):
        tick("loss")
        return super().__call__(logp, batch)


def reward(completion, example):
    tick("reward")
    return sum(i % 2 == 0 for i in completion.token_ids) / len(completion.token_ids)


def advantage(grades):
    tick("advantage")
    mean = sum(grade.reward for grade in grades) / len(grades)
    return [grade.reward - mean for grade in grades]
"""
GRADERS = """
import os, signal, time
from collections import Counter

from grpo_gsm8k.tasks.base import Grade, Task

SEEN = Counter()


class Copy(Task):
    def grade(self, example, response):
        return Grade(float(response == example.answer), answer=response)


def odd(completion, example):
    print("a grader may print")
    return sum(i % 2 for i in completion.token_ids) / len(completion.token_ids)


async def later(completions, example):
    return [os.getpid() for _ in completions]


def hangs(completion, example):
    time.sleep(60)


def dies(completion, example):
    os.kill(os.getpid(), signal.SIGKILL)


def dies_later(completion, example):
    SEEN["dies"] += 1
    return odd(completion, example) if SEEN["dies"] <= 32 else dies(completion, example)


class Unsent:
    def __init__(self):
        self.lock = open(os.devnull)

    def __call__(self, completion, example):
        return 0.0


unsent = Unsent()
"""
OWN = {"task": "Task", "engine": "Sampler", "loss": "Loss", "reward": "reward", "advantage": "advantage"}


@pytest.fixture(scope="module")
def flaky(words):
    (words[0] / "mine_flaky.py").write_text(FLAKY)
    (words[0] / "mine_graders.py").write_text(GRADERS)
    return {name: f"mine_flaky:{thing}" for name, thing in OWN.items()}


def flaky_run(words, out, **flags):
    return grpo.run(config_of("grpo", words, out, steps=4, **{"eval_every": 0, "loss": "grpo_clip", **flags}))


@pytest.fixture(scope="module")
def unbroken(words, flaky, tmp_path_factory):
    """What the run gives that nothing breaks, and how often it calls each seam in its first two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(words[0])
        patch.syspath_prepend(str(words[0]))
        seen = plugins.load_object("mine_flaky:tick", "tick").__globals__["SEEN"]
        seen.clear()
        flaky_run(words, tmp_path_factory.mktemp("two"), max_steps=2, **flaky)
        calls = dict(seen)
        return calls, flaky_run(words, tmp_path_factory.mktemp("four"), **flaky)["weights_sha256"]


AHEAD = [("one_step_off", name) for name in ("engine", "reward")]


@pytest.mark.parametrize(("mode", "name"), [*(("on_policy", name) for name in OWN), *AHEAD])
def test_a_users_function_that_raises_in_step_3_costs_nothing(words, flaky, unbroken, tmp_path, capsys, mode, name):
    """One line that names the place, the two complete steps in a checkpoint, and the same end after --resume."""
    module = plugins.load_object("mine_flaky:tick", "tick").__globals__
    calls, expected = unbroken
    flags = {**flaky, "mode": mode}
    module["SEEN"].clear()
    module["LIMIT"] |= {key: calls[key] + 1 if key == name else 0 for key in OWN}
    with pytest.raises(PluginError, match=rf"mine_flaky\.py:\d+: KeyError: '{name}'") as caught:
        flaky_run(words, tmp_path / "run", **flags)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert f"step 2 is saved in {tmp_path / 'run'}; continue with --resume" in capsys.readouterr().err
    module["LIMIT"].clear()
    found = flaky_run(words, tmp_path / "run", resume=True, **flags)
    assert found["step"] == 4 and [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]
    if mode == "on_policy":
        assert found["weights_sha256"] == expected


def test_a_step_whose_validation_fails_is_not_lost(words, flaky, tmp_path, capsys):
    module = plugins.load_object("mine_flaky:tick", "tick").__globals__
    module["SEEN"].clear()
    module["LIMIT"] |= {**dict.fromkeys(OWN, 0), "task": 2 * 16 + 1}  # the first answer of the validation
    with pytest.raises(PluginError, match="KeyError: 'task'"):
        flaky_run(words, tmp_path / "run", eval_every=2, **flaky)
    assert f"step 2 is saved in {tmp_path / 'run'}" in capsys.readouterr().err
    module["LIMIT"].clear()
    assert flaky_run(words, tmp_path / "run", eval_every=2, resume=True, **flaky)["step"] == 4
    assert ["val/n" in row for row in metrics_of(tmp_path / "run")] == [False, False, False, True]


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        ([[]], r"groups of \[0\] completions for \[2\] seeds"),
        ([["ba", "ba"]], "'ba', not a Completion"),
        ([[Completion((5,), (), "ba", "stop")] * 2], "1 ids and 0 log-probabilities"),
        ([[Completion((5,), (math.nan,), "ba", "stop")] * 2], "not finite"),
        (7, "TypeError"),
    ],
)
def test_a_sampler_that_returns_nonsense_is_one_line(drawn, said):
    class Mine:
        def sample(self, requests, params):
            return drawn

    with pytest.raises(PluginError, match=said) as caught:
        UserSampler("mine:Mine", Mine()).sample([Request((1, 2), (0, 1))], SamplingParams(4))
    assert str(caught.value).startswith("engine 'mine:Mine': ") and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- grader processes


def in_processes(reward, groups=2, timeout_s=60.0, processes=2):
    """Grades of a few groups whose ids are all different."""
    task = load_task("mine_graders:Copy", TaskOptions(grader_processes=processes, grader_timeout_s=timeout_s))
    prompts = [Prompt(Example(f"{g}", "ba", "ba"), (1, 2)) for g in range(groups)]

    def drawn(g, i):
        return Completion((g, *range(i)), (0.0,) * (i + 1), "ba", "stop")

    made = [[Trajectory.of(prompt, drawn(g, i)) for i in range(4)] for g, prompt in enumerate(prompts)]
    return Grader(task, plugins.load_object(reward, "reward")).grade(made)


@pytest.fixture
def pool(flaky):
    """The processes of a test, ended with it."""
    grader_pool.cache_clear()
    yield
    grader_pool(2).close()
    grader_pool.cache_clear()


def test_grader_processes_give_the_same_grades_in_the_same_order(pool, capfd):
    found = in_processes("mine_graders:odd", groups=5)
    assert found == in_processes("mine_graders:odd", groups=5, processes=0)
    assert len({grade.reward for group in found for grade in group}) > 3 and found[0][0].answer == "ba"
    out, err = capfd.readouterr()
    assert "a grader may print" in err and out.count("may print") == 20  # in a process of ours stdout is data
    pids = {grade.reward for group in in_processes("mine_graders:later", groups=8) for grade in group}
    assert os.getpid() not in pids and len(pids) <= 2


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("hangs", r"reward mine_graders:hangs: a grader process took more than 1 s .* --grader_timeout_s"),
        ("dies", r"reward mine_graders:dies: a grader process died \(signal 9\)"),
        ("unsent", r"reward .*: cannot be sent to another process .* leave --grader_processes out"),
    ],
)
def test_a_grader_process_that_is_lost_is_one_line_and_the_next_call_has_another(pool, reward, said):
    with pytest.raises(PluginError, match=said) as caught:
        in_processes(f"mine_graders:{reward}", timeout_s=1.0)
    assert "\n" not in str(caught.value)
    assert len(in_processes("mine_graders:odd")) == 2


def test_a_run_with_grader_processes_is_the_same_and_a_crash_keeps_its_steps(words, pool, tmp_path, capsys):
    flags = {"task": "mine_graders:Copy", "reward": "mine_graders:dies_later", "steps": 3, "eval_every": 0}
    same = [
        grpo.run(config_of("grpo", words, tmp_path / f"{n}", max_steps=2, grader_processes=n, **flags)) for n in (0, 2)
    ]
    assert same[0]["weights_sha256"] == same[1]["weights_sha256"]
    with pytest.raises(PluginError, match="signal 9"):
        grpo.run(config_of("grpo", words, tmp_path / "1", **flags, grader_processes=1))
    assert f"step 2 is saved in {tmp_path / '1'}" in capsys.readouterr().err
    assert len(metrics_of(tmp_path / "1")) == 2
