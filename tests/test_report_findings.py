"""What the report says of curves and scores: its intervals against other libraries, its sentences on known runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from grpo_gsm8k.evals.stats import difference_interval
from grpo_gsm8k.report import write_report
from grpo_gsm8k.report.changes import over_steps, stage_change, validation_change
from grpo_gsm8k.report.findings import Reading, readings
from grpo_gsm8k.report.names import command, data_name, model_name, public
from grpo_gsm8k.report.read import read_run
from grpo_gsm8k.runs.directory import input_record
from tests.test_report import HOSTILE, check, eval_rows, grpo_rows, jsonl, make_pipeline, sft_rows


@pytest.mark.parametrize(("right", "n"), [((184, 178), (200, 200)), ((0, 7), (50, 60)), ((30, 30), (30, 40))])
def test_difference_interval_is_newcombes(right: tuple[int, int], n: tuple[int, int]) -> None:
    shares = [x / m for x, m in zip(right, n, strict=True)]
    wilson = [proportion_confint(x, m, method="wilson") for x, m in zip(right, n, strict=True)]
    expected = confint_proportions_2indep(right[1], n[1], right[0], n[0], method="newcomb", compare="diff")
    assert difference_interval(shares[0], wilson[0], shares[1], wilson[1]) == pytest.approx(expected, abs=1e-6)


def test_the_interval_of_a_curves_change_covers_the_true_change() -> None:
    """A trend of +0.1 between the means of the ends, under normal noise: 95 % of the intervals hold it."""
    rng, n, hits, ratios = np.random.default_rng(0), 100, 0, 0
    line = np.linspace(0.5, 0.61, n)
    true = line[-10:].mean() - line[:10].mean()
    for _ in range(1000):
        change = over_steps(list(line + rng.normal(0, 0.05, n)))
        assert change and change.ratio
        hits += change.low <= true <= change.high
        ratios += change.ratio[1] <= line[-10:].mean() / line[:10].mean() <= change.ratio[2]
    assert 925 <= hits <= 975 and 925 <= ratios <= 975


def said(path: Path, rows: list[dict[str, Any]], kind: str = "grpo", found: tuple[str, ...] = ()) -> list[Reading]:
    jsonl(path / "metrics.jsonl", rows)
    return readings(read_run(path), kind, found)


def by_tone(found: list[Reading]) -> dict[str, str]:
    return {tone: " ".join(one.text for one in found if one.tone == tone) for tone in {one.tone for one in found}}


def test_a_flat_reward_is_noise(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = [{"step": i, "reward/mean": 0.5 + rng.gauss(0, 0.05)} for i in range(100)]
    (one,) = said(tmp_path, rows)
    assert one.tone == "noise" and "no more than its steps differ" in one.text


def test_a_reward_that_moves_has_an_interval(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = [{"step": i, "reward/mean": i / 100 + rng.gauss(0, 0.05)} for i in range(100)]
    up, down = said(tmp_path / "up", rows), said(tmp_path / "down", [r | {"step": 100 - r["step"]} for r in rows])
    assert [one.tone for one in (*up, *down)] == ["better", "worse"]
    match = re.search(r"rose from (\S+) to (\S+): \+(\S+), 95 % CI \+(\S+) to \+(\S+) by the noise", up[0].text)
    assert match
    before, after, change, low, high = map(float, match.groups())
    assert before == pytest.approx(0.045, abs=0.05) and after == pytest.approx(0.945, abs=0.05)
    assert low < change < high and high - low == pytest.approx(2 * 1.96 * 0.05 * (2 / 10) ** 0.5, rel=0.3)
    assert said(tmp_path / "up", rows, found=("stalled",)) == []  # the diagnosis reports it


def collapsed(steps: int = 60) -> list[dict[str, Any]]:
    """A run whose reward rises, whose validation goes from 92 to 89 % and whose entropy goes to a third."""
    rows = grpo_rows(random.Random(0), steps)
    for row in rows:
        done = row["step"] / steps
        row["policy/entropy"] = 0.6 - 0.4 * done
        if "val/accuracy" in row:
            p = 0.926 - 0.036 * done
            row |= {"val/accuracy": p, "val/ci_low": p - 0.04, "val/ci_high": p + 0.03}
    return rows


def test_a_fall_within_noise_and_a_collapse_of_entropy(tmp_path: Path) -> None:
    tones = by_tone(said(tmp_path, collapsed()))
    assert "Validation accuracy fell from 92.0\u00a0% at step 10 to 89.0\u00a0% at step 60 on 200" in tones["noise"]
    # 0.03 and 0.04 on either side: hypot(0.04, 0.03) = 0.05
    assert "within noise: −3.0 points, 95 % CI −8.0 to +2.0." in tones["noise"]
    # The tenths' means are 0.6 - 0.4 * 3.5 / 60 and 0.6 - 0.4 * 57.5 / 60.
    share = (0.6 - 0.4 * 57.5 / 60) / (0.6 - 0.4 * 3.5 / 60)
    assert f"Entropy collapsed to {100 * share:.0f}\u00a0% of where it began" in tones["watch"]
    assert "From step 10 on the reward rose in training" in tones["watch"]
    assert "validation did not rise with it" in tones["watch"]
    assert said(tmp_path, collapsed())[0].tone == "watch"  # what needs a look comes first
    text = check(write_report([tmp_path]).read_text())
    assert "Nothing is seen that holds" not in text and "✓ Entropy" not in text
    assert "No measurable change: 92.0 % at step 10, 89.0 % at step 60, on 200 validation problems" in text


def test_validation_is_paired_where_its_answers_were_kept(tmp_path: Path) -> None:
    rows = collapsed()
    skills = {10: 0.9, 60: 0.8}
    for step, skill in skills.items():
        jsonl(tmp_path / f"evals/step_{step:06d}.jsonl", eval_rows("grpo", skill, 200, 3))
    jsonl(tmp_path / "metrics.jsonl", rows)
    found = validation_change(read_run(tmp_path), "grpo")
    scores = [sum(r["correct"] for r in eval_rows("grpo", skill, 200, 3)) / 200 for skill in skills.values()]
    assert found and found.change and found.change.paired and found.change.clear
    assert (found.change.before, found.change.after) == (pytest.approx(scores[0]), pytest.approx(scores[1]))
    assert found.change.high - found.change.low < 0.09  # unpaired it is 0.1 and more


def test_a_validation_that_has_been_better(tmp_path: Path) -> None:
    rows = [{"step": i, "reward/mean": 0.5} for i in range(1, 61)]
    for step, p in ((10, 0.5), (30, 0.8), (60, 0.6)):
        rows[step - 1] |= {"val/accuracy": p, "val/ci_low": p - 0.05, "val/ci_high": p + 0.05, "val/n": 400}
    tones = by_tone(said(tmp_path, rows))
    assert "Validation was best at step 30 (80.0\u00a0%, the best of 3" in tones["worse"]
    assert "has fallen since: −20.0 points, 95 % CI −27.1 to −12.9" in tones["worse"]
    assert "rose from 50.0\u00a0% at step 10 to 60.0\u00a0% at step 60 on 400 problems: +10.0 points" in tones["better"]


def test_a_validation_that_never_changes_stays(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": i, "reward/mean": 0.5} for i in range(1, 31)]
    for row in rows[9::10]:
        row |= {"val/reward": 0.5, "val/ci_low": 0.5, "val/ci_high": 0.5, "val/n": 32}
    texts = [one.text for one in said(tmp_path, rows)]
    assert "Mean reward in validation stayed at 0.500 from step 10 to step 30 on 32 examples." in texts


def test_mixed_groups_length_and_agreement(tmp_path: Path) -> None:
    rng = random.Random(2)
    rows: list[dict[str, Any]] = [
        {
            "step": i,
            "reward/mean": 0.5 + rng.gauss(0, 0.05),
            "groups/all_right_frac": 0.9 * i / 100,
            "groups/all_wrong_frac": 0.05,
            "length/mean": 100 + i + rng.gauss(0, 2),
            "mismatch/logp_abs_mean": 0.3 if i == 50 else 0.1,
            "outcome/truncated_frac": 0.25,
        }
        for i in range(100)
    ]
    tones = by_tone(said(tmp_path, rows))
    # The means of i = 0..9 and of 90..99 are 4.5 and 94.5.
    assert "9.9\u00a0% of the groups at the end are mixed" in tones["watch"]  # 1 - 0.05 - 0.009 * 94.5
    assert "(90.9\u00a0% at the start; −81.0 points" in tones["watch"]
    assert re.search(r"grew from 10\d to 19\d tokens \(\+\d\d, .*, and the reward did not rise with", tones["watch"])
    assert "never exceeded 0.3" in tones["note"] and "25.0\u00a0% of the responses" in tones["note"]
    judged = ("mismatch", "cut_off", "flat_groups")
    assert [one.tone for one in said(tmp_path, rows, found=judged)] == ["watch", "noise"]
    rows = [r | {"mismatch/logp_abs_mean": 0.0} for r in rows]
    assert "agree to the bit" in by_tone(said(tmp_path, rows))["note"]


def test_what_never_changes_stays(tmp_path: Path) -> None:
    texts = [
        one.text for one in said(tmp_path, [{"step": i, "reward/mean": 0.0, "policy/entropy": 1.5} for i in range(20)])
    ]
    assert texts == ["The reward stayed at 0 at every step.", "Entropy stayed at 1.5 nats per token."]


def test_the_interval_of_a_ratio_agrees_with_that_of_the_difference() -> None:
    rng = random.Random(0)
    for _ in range(300):
        change = over_steps([1 + i * rng.random() / 200 + rng.gauss(0, 0.1) for i in range(30)])
        assert change and change.ratio and change.clear == (not change.ratio[1] <= 1 <= change.ratio[2])


def test_numbers_at_the_edge_of_what_is_drawn(tmp_path: Path) -> None:
    huge = [{"step": i, "reward/mean": 9e99 * (-1) ** i, "policy/entropy": 9e99, "loss": -9e99} for i in range(30)]
    huge[9] |= {"val/accuracy": 0.5, "val/ci_low": 0.4, "val/ci_high": 0.6, "val/n": float("nan")}
    huge[19] |= {"val/accuracy": 0.6, "val/ci_low": 0.5, "val/ci_high": float("inf")}
    jsonl(tmp_path / "metrics.jsonl", huge)
    jsonl(tmp_path / "evals/step_²³.jsonl", [])
    text = check(write_report([tmp_path]).read_text())
    assert "no intervals were recorded" in text and "nan" not in text.lower().replace("values are nan", "")


def test_few_steps_say_nothing(tmp_path: Path) -> None:
    (one,) = said(tmp_path, [{"step": i, "reward/mean": i / 9} for i in range(9)])
    assert one.tone == "note" and one.text.startswith("Only 9 steps")


def test_the_loss_of_fine_tuning(tmp_path: Path) -> None:
    tones = by_tone(said(tmp_path, sft_rows(random.Random(0), 100, 4.0, 0.4), "sft"))
    assert "The loss fell from" in tones["better"] and "Validation accuracy rose" in tones["better"]


def test_a_task_by_preference_is_read_by_its_reward(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": i, "reward/mean": i / 100} for i in range(60)]
    for step, score in ((10, 0.3), (50, 0.8)):
        rows[step] |= {"val/reward": score, "val/ci_low": score - 0.03, "val/ci_high": score + 0.04, "val/n": 64}
    text = by_tone(said(tmp_path, rows))["better"]
    assert "Mean reward in validation rose from 0.300 at step 10 to 0.800 at step 50 on 64 examples: +0.500" in text
    page = check(write_report([tmp_path]).read_text())
    assert "Mean reward from 0.300 at step 10 to 0.800 at step 50 on 64 validation examples" in page
    assert "shaded 95 % interval" in page[page.index("Held-out examples of a task") :]
    rows = [row | {"val/accuracy": 0.5} if "val/reward" in row else row for row in rows]
    jsonl(tmp_path / "metrics.jsonl", rows)  # the interval is then the accuracy's, and so is the figure
    assert "Held-out examples of a task" not in check(write_report([tmp_path]).read_text())


def chat_pipeline(root: Path) -> None:
    rows = [
        {"id": f"c{i}", "question": f"Tell me of sea {i}.", "gold": "", "response": "", "extracted": None}
        | {"correct": None, "format_ok": None, "finish_reason": "stop", "tokens": 3, "reward": 0.5}
        for i in range(4)
    ]
    jsonl(root / "evals/sft.jsonl", rows)
    rows[0]["gold"] = "The sea is wide, and it is deep, and nobody has seen the end of it. " * 4  # of a teacher
    better = [0.9, 0.2, 0.5, 0.9]
    texts = ["wide", " \n", "deep", HOSTILE]
    after = [row | {"reward": r, "response": t} for row, r, t in zip(rows, better, texts, strict=True)]
    jsonl(root / "evals/grpo.jsonl", after)
    stages = [
        {"name": name, "accuracy": None, "reward": mean, "ci95": [mean - 0.1, mean + 0.1], "n": 4}
        for name, mean in (("sft", 0.5), ("grpo", 0.625))
    ]
    (root / "pipeline.json").write_text(json.dumps({"stages": stages, "comparisons": []}))


def test_empty_answers_are_marked_and_rewards_sort_the_samples(tmp_path: Path) -> None:
    chat_pipeline(tmp_path)
    text = check(write_report([tmp_path]).read_text())
    assert text.count("(empty)") == 4 and text.count("(only white space, 2 characters)") == 1
    assert "Rewarded more after GRPO: 2" in text and "Rewarded less after GRPO: 1" in text
    assert "Rewarded alike: 1" in text and "Fixed by" not in text and "gold" not in text
    assert text.count("reference The sea is wide") == 1
    assert "No measurable change: mean reward 0.500 before, 0.625 after, on 4 held-out examples" in text


def test_stages_are_paired_by_their_answers_where_no_comparison_is_recorded(tmp_path: Path) -> None:
    make_pipeline(tmp_path, n=200, steps=20)
    run = read_run(tmp_path)
    recorded = {(c["a"], c["b"]): c for c in run.comparisons}
    by_name = {s["name"]: s for s in run.stages}
    change = stage_change(run, by_name["sft"], by_name["grpo"])
    assert ("sft", "grpo") not in recorded and change and change.paired and change.clear
    right = {
        name: {r["id"] for r in map(json.loads, (tmp_path / f"evals/{name}.jsonl").open()) if r["correct"]}
        for name in ("sft", "grpo")
    }
    gain = len(right["grpo"]) - len(right["sft"])
    differ = len(right["grpo"] ^ right["sft"])
    error = 1.96 * (differ / 200 - (gain / 200) ** 2) ** 0.5 / 200**0.5  # the normal approximation
    assert change.size == pytest.approx(gain / 200)
    assert (change.low, change.high) == pytest.approx((gain / 200 - error, gain / 200 + error), abs=0.01)


# ---- names


def started(root: Path, **config: object) -> Path:
    """A GRPO run with these settings."""
    jsonl(root / "metrics.jsonl", [{"step": 1, "reward/mean": 0.5}])
    lines = [f"{key} = {json.dumps(value)}" for key, value in config.items()]
    (root / "config.toml").write_text("[grpo]\n" + "\n".join(lines) + "\n")
    return root


CACHE = "/home/jane/.cache/huggingface/hub/models--Qwen--Qwen2.5-Math-1.5B/snapshots/"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-1.5B"),
        (CACHE + "4a83ca6e4526a4f2da3aa259ec36c259f66b2ab2", "Qwen/Qwen2.5-Math-1.5B at 4a83ca6e"),
        ("/home/jane/runs/first/ei/checkpoints/step_000008", "checkpoint of step 8 of EI in first"),
        ("artifacts/runs/other/checkpoints/step_000120", "checkpoint of step 120 in other"),
        ("/home/jane/models/mine", "…/mine"),
    ],
)
def test_models_are_named_by_what_they_are(tmp_path: Path, value: str, name: str) -> None:
    assert model_name(read_run(started(tmp_path, model_id=value))) == name


def test_a_model_is_described_by_its_own_files(tmp_path: Path) -> None:
    root = started(tmp_path, model_id="/home/jane/m", revision="")
    folder = root / "checkpoints/step_000001"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 16}')
    assert model_name(read_run(root)) == "…/m (qwen2, 2 layers of width 16)"
    save_file({"a": np.zeros((1000, 16)), "b": np.zeros(500)}, folder / "model.safetensors")
    assert model_name(read_run(root)) == "…/m (qwen2, 2 layers of width 16, 16.5 k parameters)"
    (folder / "model.safetensors").write_bytes(b"broken")
    assert "parameters" not in model_name(read_run(root))
    (folder / "config.json").write_text("[" * 100_000)
    assert model_name(read_run(root)) == "…/m"


def test_data_is_named_by_its_source(tmp_path: Path) -> None:
    root = started(tmp_path, data="/home/jane/gsm8k")
    assert data_name(read_run(root)) == "…/gsm8k"
    manifest = {"source": "openai/gsm8k", "revision": "e53f048856ff4f594e959d75785d2c2d37b678ee", "seed": 31415}
    entry = {"path": "/home/jane/gsm8k/train.jsonl", "sha256": "ab"}
    counts = {"counts": {"train": 6961, "val": 512, "test": 1319}}
    (root / "data.json").write_text(json.dumps({"train": {**entry, "manifest": manifest | counts}}))
    assert data_name(read_run(root)) == "openai/gsm8k at e53f0488, seed 31415: 6,961 train, 512 val, 1,319 test"
    origin = {"dataset": "me/chats", "split": "train", "revision": "c" * 40}
    (root / "data.json").write_text(json.dumps({"train": {**entry, "from": origin}}))
    assert data_name(read_run(root)) == "me/chats, split train at cccccccc"


def test_a_run_records_what_the_manifest_says_of_its_data(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text('{"id": "1"}\n')
    sha256 = hashlib.sha256(train.read_bytes()).hexdigest()
    plain = {"path": str(train), "sha256": sha256}
    said = {"source": "openai/gsm8k", "revision": "e53f", "counts": {"train": 1}}
    written: list[tuple[Any, Any]] = [
        (None, plain),
        ({"format": 1, **said, "files": {"train.jsonl": sha256}, "content": {}}, {**plain, "manifest": said}),
        ({**said, "files": {"train.jsonl": "of other rows"}}, plain),
        ({"name": "an app", "files": ["train.jsonl"]}, plain),
        ([1], plain),
    ]
    for manifest, recorded in written:
        if manifest is not None:
            (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        assert input_record(train) == recorded


def test_a_pipelines_own_model_and_data_are_named(tmp_path: Path) -> None:
    root = tmp_path / "first"
    make_pipeline(root, n=20, steps=10)
    summary = json.loads((root / "pipeline.json").read_text())
    summary |= {"run_dir": "/home/jane/first", "model_id": "/home/jane/first/model", "data": "/home/jane/first/data"}
    (root / "pipeline.json").write_text(json.dumps(summary))
    (root / "data").mkdir()
    (root / "data/manifest.json").write_text('{"source": "toy", "seed": 3, "counts": {"train": 100, "val": 7}}')
    (root / "command.txt").write_text(
        "/usr/bin/python3 /home/jane/x/.venv/bin/grpo-gsm8k demo --out_dir /home/jane/first "
        "--data=/home/jane/d.jsonl --set 'grpo.judge_model=/srv/Jane Doe/judge'\n"
    )
    run = read_run(root)
    assert model_name(run) == "made for this run with random weights"
    assert data_name(run) == "made-up word problems, seed 3: 100 train, 7 val"
    text = check(write_report([root]).read_text())
    assert "grpo-gsm8k demo --out_dir first --data=…/d.jsonl" in text
    assert "jane" not in text.lower() and "/usr/bin" not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/jane/x/.venv/bin/grpo-gsm8k report", "grpo-gsm8k report"),
        (".venv/bin/grpo-gsm8k eval --model_id m", "grpo-gsm8k eval --model_id m"),
        ("/opt/py/bin/python3.11 -m grpo_gsm8k.cli sft", "python3.11 -m grpo_gsm8k.cli sft"),
        ("/home/jane/x/grpo_gsm8k/cli.py grpo --lr 1e-4", "python -m grpo_gsm8k.cli grpo --lr 1e-4"),
        ("grpo_gsm8k/bench/__main__.py gpu", "python -m grpo_gsm8k.bench gpu"),
        ("grpo-gsm8k sft --data '/home/Jane Doe/d.jsonl'", "grpo-gsm8k sft --data '…/d.jsonl'"),
        ("grpo-gsm8k sft --data ~jane/d.jsonl", "grpo-gsm8k sft --data '~/d.jsonl'"),
        ("grpo-gsm8k sft --run_name jane@host.example", "grpo-gsm8k sft --run_name [address]"),
        ("", ""),
    ],
)
def test_commands_are_shown_without_the_machine(tmp_path: Path, text: str, shown: str) -> None:
    assert command(text, read_run(started(tmp_path))) == shown


def test_paths_into_the_run_begin_with_its_name(tmp_path: Path) -> None:
    run = read_run(started(tmp_path / "mine", out_dir="/data/jane/mine"))
    text = 'model = "/data/jane/mine/checkpoints/step_1", other = "/data/jane/mine2/x", "file:///data/jane/y z/w"'
    assert public(text, run) == 'model = "mine/checkpoints/step_1", other = "…/x", "…/w"'
    assert public(str(tmp_path / "mine" / "config.toml"), run) == "mine/config.toml"


# ---- side by side


def grpo_run(root: Path, **changed: object) -> Path:
    settings: dict[str, object] = {"lr": 1e-4, "loss": "grpo_clip", "out_dir": str(root), "wandb_project": root.name}
    jsonl(root / "metrics.jsonl", grpo_rows(random.Random(1), 20))
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**settings, **changed}.items()]
    (root / "config.toml").write_text("[grpo]\n" + "\n".join(lines) + "\n")
    return root


def test_a_pipelines_stage_and_a_run_of_it_alone_match(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    make_pipeline(whole, n=60, steps=20)
    shared = {"model_id": str(whole / "ei/checkpoints/step_000008"), "data": str(tmp_path / "data")}
    grpo_run(whole / "grpo", **shared)
    alone = grpo_run(tmp_path / "alone", **shared | {"lr": 3e-4, "data": str(tmp_path / "copy")})
    hashes = json.dumps({"train": {"sha256": "ab" * 32}})
    for folder in (whole / "grpo", alone):
        (folder / "data.json").write_text(hashes)
        rows = eval_rows("grpo", 0.5 if folder == alone else 0.9, 60, 5)
        jsonl(folder / "evals/step_000020.jsonl", [row | {"id": f"val-{row['id']}"} for row in rows])
    text = check(write_report([whole, alone], tmp_path / "page.html").read_text())
    differ = text[text.index("Settings that differ, by stage") : text.index("Settings that are the same")]
    assert re.findall(r"grpo\.\S+", differ) == ["grpo.lr"] and "0.0001 0.0003" in differ
    assert "Only whole has SFT, EI" in text and "sft.train" not in text
    same = text[text.index("Settings that are the same (3)") :]
    assert re.search(r"grpo\.data .* grpo\.loss grpo_clip .*grpo\.model_id ei/checkpoints", same)
    for hidden in ("out_dir", "wandb_project"):
        assert f"grpo.{hidden}" not in text
    row = r"alone [\d.]+ % [\d.]+ % −\S+ −\S+ to −\S+ worse GRPO, validation, step 20 60"
    assert re.search(row, text)  # its validation, not against our test
    assert "steps of GRPO" in text and "Base, test" in text


def test_columns_without_a_value_are_left_out(tmp_path: Path) -> None:
    text = check(write_report([grpo_run(tmp_path / "a"), grpo_run(tmp_path / "b", lr=1e-3)]).read_text())
    head = text[text.index("Scores of each run") : text.index("Scores of each run") + 160]
    assert "SFT, test" not in head and "last validation of GRPO" in head


# ---- the bones of a page


class Outline:
    """Headings, regions and tables of a page, by regular expressions over well-formed markup."""

    def __init__(self, document: str) -> None:
        self.levels = [int(n) for n in re.findall(r"<h([1-6])", document)]
        self.regions = re.findall(r'role="region" aria-label="([^"]*)" tabindex="0"', document)
        self.tables = re.findall(r"<table.*?</table>", document, flags=re.S)
        self.document = document


def pages(tmp_path: Path) -> list[tuple[str, str]]:
    make_pipeline(tmp_path / "whole", n=60, steps=20)
    chat_pipeline(tmp_path / "chat")
    grpo_run(tmp_path / "alone")
    ways: dict[str, Callable[[], Path]] = {
        "whole": lambda: write_report([tmp_path / "whole"]),
        "chat": lambda: write_report([tmp_path / "chat"]),
        "alone": lambda: write_report([tmp_path / "alone"]),
        "compared": lambda: write_report([tmp_path / name for name in ("whole", "alone", "chat")]),
    }
    return [(name, way().read_text()) for name, way in ways.items()]


def test_headings_regions_and_tables(tmp_path: Path) -> None:
    for name, document in pages(tmp_path):
        check(document)
        outline = Outline(document)
        levels = outline.levels
        assert levels[0] == 1 and levels.count(1) == 1, name
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels)), (name, levels)
        assert len(outline.regions) == len(set(outline.regions)) and all(outline.regions), (name, outline.regions)
        assert outline.tables
        for one in outline.tables:
            assert re.match(r"<table><caption>[^<]+</caption><thead>", one), (name, one[:80])
            head, body = one.split("</thead>")
            assert all(cell for cell in re.findall(r'<th scope="col">(.*?)</th>', head)), (name, head)
            assert body.count("<tr>") == body.count('<th scope="row">')
        scrolling = document.count('class="scroll"') + document.count('class="long"')
        assert scrolling == len(outline.regions) >= len(outline.tables)
        for svg in re.findall(r'<svg role="img" aria-label="([^"]+)"', document):
            assert ": " in svg, svg  # it says what is drawn, with its values


def luminance(colour: str) -> float:
    channels = [int(c * 2 if len(colour) == 4 else c, 16) / 255 for c in re.findall(
        r"[0-9a-f]" if len(colour) == 4 else r"[0-9a-f]{2}", colour)]  # fmt: skip
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_text_stands_out_from_its_background() -> None:
    """WCAG 2.2, 1.4.3: at least 4.5 to 1, in light and in dark."""
    css = (Path(__file__).parent.parent / "grpo_gsm8k/report/page.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, flags=re.S)[:2]
    for block in (light, dark):
        colours = dict(re.findall(r"--([\w]+): (#[0-9a-f]{3,6})", block))
        for text in ("ink", "mute", "c1", "good", "bad"):
            for ground in ("bg", "card", "note") if text in ("ink",) else ("bg", "card"):
                pair = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
                assert (pair[0] + 0.05) / (pair[1] + 0.05) >= 4.5, (text, ground, colours[text], colours[ground])
