"""Recipes of tinker-cookbook as they are, offline, against a server of this project: minutes each, so slow.

    uv run pytest -n 0 --runslow tests/test_serve_cookbook.py

uv fetches the cookbook into an environment of its own. The recipes look data sets and the tokenizer up by their names
on the hub, so the working directory holds folders of these names: toy word problems that all have the answer 7, and a
tiny model that serves as Qwen/Qwen3-8B and puts a random digit into its box. A reward therefore starts near 0.1 and
rises when the recipe learns.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_gsm8k.trainer.tiny_model import make_tiny_model
from tests.serve_tools import KEY, Process, free_port
from tests.toys import REPOSITORY, make_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

COOKBOOK = ["--from", "tinker-cookbook[math-rl]==0.6.1", "--with", "torch==2.13.0"]
OVERRIDES = "tml-renderers>=0.0.1\n"  # the cookbook asks for 0.4.1, which the index lacks; other models need it
NAME = "Qwen/Qwen3-8B"  # the smallest that the recipes' fixed tables know with a chat template like the toy's
SUFFIX = " Provide a numerical answer without units, written inside \\boxed{}."
STRAWBERRY = "How many r's are in strawberry?" + SUFFIX
SPELLED = (  # the example that math_rl puts before each problem
    "Let's spell the word out and number all the letters: 1) s 2) t 3) r 4) a 5) w 6) b 7) e 8) r 9) r 10) y. "
    "We have r's at positions 3, 8, and 9. \\boxed{3}"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The working directory of the recipes."""
    folder = tmp_path_factory.mktemp("cookbook")
    data = make_data(folder / "toy", 200, 20, 20)
    questions = [json.loads(line)["question"] for line in (data / "train.jsonl").read_text().splitlines()]
    boxed = [f"\\boxed{{{digit}}}" for digit in range(10)]
    chat = [
        {
            **{"prompt": "x", "prompt_id": str(k), "category": "c"},
            "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": boxed[7]}],
        }
        for k, q in enumerate(questions)
    ]
    pairs = [
        {side: f"\n\nHuman: {q}\n\nAssistant: {said}" for side, said in (("chosen", boxed[7]), ("rejected", boxed[k]))}
        for k, q in zip([0, 1, 2, 3] * 50, questions, strict=True)
    ]
    write_dataset(folder / "openai/gsm8k", [{"question": q, "answer": "work\n#### 7"} for q in questions], "main")
    write_dataset(folder / "HuggingFaceH4/no_robots", chat)
    write_dataset(folder / "Anthropic/hh-rlhf", pairs)
    write_dataset(folder / "zwhe99/DeepMath-103K", [{"question": q, "final_answer": "7"} for q in questions])
    texts = [q + SUFFIX for q in questions] + [SPELLED, STRAWBERRY] * 20 + boxed * 20
    make_tiny_model(folder / NAME, texts, 0, vocab_size=700, hidden_size=64, heads=4)
    teach_digits(folder / NAME, questions)
    (folder / "overrides.txt").write_text(OVERRIDES)
    return folder


def write_dataset(folder: Path, rows: list[Any], name: str = "default") -> None:
    """A data set with the splits train and test, as the hub keeps one."""
    files = {"train": f"{name}/train.jsonl", "test": f"{name}/test.jsonl"}
    for path, part in zip(files.values(), (rows[16:], rows[:16]), strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in part))
    listed = "".join(f"  - split: {split}\n    path: {path}\n" for split, path in files.items())
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{listed}---\n")


def teach_digits(folder: Path, questions: list[str], steps: int = 220) -> None:
    """Train the model to answer a problem with a random digit in a box, with and without an example before it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=3e-3), random.Random(0)
    for _ in range(steps):
        rows = []
        for _ in range(8):
            before = [("user", STRAWBERRY), ("assistant", SPELLED)] if draw.random() < 0.7 else []
            said = [*before, ("user", draw.choice(questions) + SUFFIX)]
            prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said)
            answer = f"\\boxed{{{draw.randrange(10)}}}<|im_end|>"
            ids = [tokenizer(text)["input_ids"] for text in (prompt + "<|im_start|>assistant\n", answer)]
            rows.append((ids[0] + ids[1], [-100] * len(ids[0]) + ids[1]))
        longest = max(len(ids) for ids, _ in rows)
        inputs = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
        labels = torch.tensor([each + [-100] * (longest - len(each)) for _, each in rows])
        model(input_ids=inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def process(world) -> Iterator[Process]:
    made = Process(world / NAME, world / "served", free_port(), served_name=NAME)
    made.start()
    yield made
    assert made.end(signal.SIGTERM) == 0
    log = made.log.read_text()
    assert "Traceback" not in log and KEY not in log


@pytest.fixture
def cook(world, process):
    """Runs a recipe; what it logged."""

    def run(recipe: str, name: str, **flags: Any) -> list[dict[str, Any]]:
        log = world / "logs" / name
        settings = {"model_name": NAME, "log_path": log, **flags}
        command = ["tool", "run", "-q", "--overrides", str(world / "overrides.txt"), *COOKBOOK, "python"]
        done = subprocess.run(
            [
                *[str(REPOSITORY / "scripts/uv"), *command, "-W", "ignore", "-m", f"tinker_cookbook.recipes.{recipe}"],
                *(f"{key}={value}" for key, value in settings.items()),
            ],
            cwd=world,
            env={
                **os.environ,
                **{"TINKER_BASE_URL": process.url, "TINKER_API_KEY": KEY, "TINKER_TELEMETRY": "0"},
                **{"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
                "HF_DATASETS_CACHE": str(world / "cache"),  # the user's knows the names, with an earlier run's rows
            },
            capture_output=True,
            text=True,
            timeout=1500,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
        return [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]

    return run


def series(rows: list[dict[str, Any]], key: str) -> list[float]:
    """A metric over the steps."""
    found = [row[key] for row in rows if key in row]
    print(key, found)
    assert found and all(map(math.isfinite, found)), sorted({name for row in rows for name in row})
    return found


SMALL: dict[str, Any] = {"lora_rank": 8, "learning_rate": 3e-3}
RENDERED = {"renderer_name": "qwen3_instruct"}


def test_sl_loop_learns_and_resumes(cook, world) -> None:
    """A run that ended after its checkpoint of step 4 goes on there, with the losses that it had."""
    flags = {**SMALL, "batch_size": 16, "save_every": 2, "max_length": 900, "max_steps": 6}
    first = series(cook("sl_loop", "sl", **flags), "train_mean_nll")
    assert first[-1] < 0.9 * first[0]
    written = world / "logs/sl/checkpoints.jsonl"
    kept = [line for line in written.read_text().splitlines(keepends=True) if json.loads(line)["name"] != "final"]
    written.write_text("".join(kept))
    both = series(cook("sl_loop", "sl", **flags), "train_mean_nll")
    assert both == pytest.approx([*first, *first[4:]], rel=1e-6)


@pytest.mark.parametrize("loss", ["importance_sampling", "cispo", "gspo"])
def test_rl_loop_learns(cook, loss: str) -> None:
    flags = {"lora_rank": 8, "learning_rate": 5e-3, "batch_size": 16, "group_size": 8, "max_tokens": 12}
    rewards = series(cook("rl_loop", f"rl_{loss}", loss_fn=loss, max_steps=6, save_every=3, **flags), "reward/total")
    assert rewards[0] < 0.35 and rewards[-1] > rewards[0] + 0.3


MATH = {**SMALL, **RENDERED, "group_size": 4, "groups_per_batch": 8, "save_every": 2}


def test_math_rl_on_gsm8k_learns(cook) -> None:
    clip = json.dumps({"clip_low_threshold": 0.8, "clip_high_threshold": 1.2})
    flags = {**MATH, "learning_rate": 5e-3, "max_tokens": 12, "loss_fn": "ppo", "loss_fn_config": clip}
    rows = cook("math_rl.train", "math_gsm8k", env="gsm8k", num_substeps=2, max_steps=8, eval_every=4, **flags)
    rewards = series(rows, "env/all/reward/total")
    assert max(rewards[-2:]) > rewards[0] + 0.2
    assert abs(series(rows, "optim/kl_sample_train_v2")[0]) < 1e-2  # the second substep is off policy


def test_math_rl_on_arithmetic(cook) -> None:
    flags = {**MATH, "max_tokens": 8, "loss_fn": "importance_sampling", "eval_every": 0}
    rows = cook("math_rl.train", "arithmetic", env="arithmetic", max_steps=3, **flags)
    assert len(series(rows, "env/all/reward/total")) == 3
    assert max(map(abs, series(rows, "optim/kl_sample_train_v2"))) < 1e-6


def test_math_rl_one_step_off_policy(cook) -> None:
    flags = {**MATH, "max_tokens": 8, "loss_fn": "importance_sampling", "eval_every": 0}
    rows = cook("math_rl.train", "asynchronous", env="arithmetic", max_steps=4, max_steps_off_policy=1, **flags)
    assert len(series(rows, "env/all/reward/total")) == 4


def test_chat_sl_learns(cook) -> None:
    flags = {**SMALL, **RENDERED, "dataset": "no_robots", "batch_size": 16, "max_length": 900, "num_epochs": 1}
    rows = cook("chat_sl.train", "chat", max_steps=6, eval_every=4, save_every=4, rolling_save_every=2, **flags)
    losses = series(rows, "train_mean_nll")
    assert losses[-1] < losses[0]


def test_sl_basic_learns(cook) -> None:
    losses = series(cook("sl_basic", "sl_basic", num_epochs=4, max_steps=4, **SMALL), "train_mean_nll")
    assert losses[-1] < losses[0]


def test_rl_basic_with_a_kl_reference(cook) -> None:
    reference = {
        "kl_penalty_coef": 0.01,
        "kl_reference_config": "tinker_cookbook.rl.train:KLReferenceConfig",
        "kl_reference_config.base_model": NAME,
    }
    flags = {**SMALL, "max_tokens": 12, "loss_fn": "importance_sampling", "max_steps": 2}
    rows = cook("rl_basic", "rl_basic", **flags, **reference)
    assert abs(series(rows, "kl_policy_base")[0]) < 1e-3  # nothing is learned yet
    assert series(rows, "env/all/reward/total")


def test_preference_shorter(cook) -> None:
    cook("preference.shorter.train", "shorter", **RENDERED, group_size=4, batch_size=4, max_tokens=12, max_steps=2)


def test_preference_dpo_learns(cook) -> None:
    flags = {**RENDERED, "dataset": "hhh", "batch_size": 16, "max_length": 500, "reference_model_name": NAME}
    losses = series(cook("preference.dpo.train", "dpo", max_steps=4, learning_rate=1e-3, **flags), "dpo_loss")
    assert abs(losses[0] - math.log(2)) < 1e-5  # the reference's log-probabilities are the trainer's
    assert losses[-1] < losses[0]


def test_on_policy_distillation(cook) -> None:
    flags = {**RENDERED, "lora_rank": 8, "group_size": 2, "groups_per_batch": 8, "max_tokens": 12, "eval_every": 0}
    rows = cook(
        "distillation.on_policy_distillation", "opd", teacher_model=NAME, learning_rate=1e-3, max_steps=3, **flags
    )
    assert len(series(rows, "env/all/ac_tokens_per_turn")) == 3
