"""The chat task through the stages: fine-tuning, preferences as rewards, a judge that goes away, the pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from grpo_gsm8k import config, ei, grpo, pipeline, sft
from grpo_gsm8k.config import PipelineConfig
from grpo_gsm8k.errors import ConfigError, DataError, JudgeError
from grpo_gsm8k.tasks.chat import Chat
from grpo_gsm8k.trainer.tiny_model import make_tiny_model
from tests.fake_api import FakeApi, serve
from tests.test_judge import answers_in, longer
from tests.toys import REPOSITORY, SMALL

EXAMPLES = REPOSITORY / "examples" / "chat.jsonl"


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and `model`."""
    folder = tmp_path_factory.mktemp("chat")
    task = Chat()
    task.generate(folder / "data", 0, {"train": 24, "val": 4, "test": 6})
    texts = [f"{e.text} {e.answer}" for e in task.examples(folder / "data" / "train.jsonl")]
    make_tiny_model(folder / "model", texts, 0, **SMALL)
    return folder


def settings(section: str, toys: Path, **flags: Any) -> Any:
    small = {"device": "cpu", "task": "chat", "max_new_tokens": 8, "eval_examples": 3, "max_tokens_per_microbatch": 512}
    where = {"data": str(toys / "data"), "model_id": str(toys / "model")}
    return config.resolve(section, flags={**small, **where, **flags})


def grpo_settings(toys: Path, out: Path, **flags: Any) -> Any:
    few = {"steps": 3, "rollouts_per_step": 6, "group_size": 3, "eval_every": 0, "resume": True, "lr": 1e-3}
    return settings("grpo", toys, out_dir=str(out), **{**few, **flags})


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_by_length_has_a_reward_and_no_accuracy(toys: Path, tmp_path: Path) -> None:
    cfg = grpo_settings(toys, tmp_path / "run", length_words=3, eval_every=3, steps=3, algorithm="importance_sampling")
    result = grpo.run(cfg)
    rows = metrics(tmp_path / "run")
    assert all(0 <= row["reward/mean"] <= 1 and row["reward/length"] == row["reward/mean"] for row in rows)
    assert "val/reward" in rows[-1]
    assert "val/accuracy" not in rows[-1]
    assert json.loads((Path(result["model"]) / "prompt.json").read_text())["task"] == "chat"


def test_a_judge_without_budget_leaves_a_checkpoint_and_no_call_is_paid_twice(toys: Path, tmp_path: Path) -> None:
    api = FakeApi(lambda prompt: ("", f"[[{longer(*answers_in(prompt))}]]"))
    with serve(api) as url:
        judge = {"preference": "judge", "judge_base_url": url, "judge_model": "fake"}
        whole = grpo.run(grpo_settings(toys, tmp_path / "whole", **judge))
        calls = len(api.requests)
        assert calls > 12
        stopped = tmp_path / "stopped"
        with pytest.raises(JudgeError, match="--judge_budget 20"):
            grpo.run(grpo_settings(toys, stopped, **judge, judge_budget=20))
        assert len(api.requests) == calls + 20
        assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step_000001"]
        resumed = grpo.run(grpo_settings(toys, stopped, **judge))
        assert len(api.requests) == 2 * calls  # what was judged before the stop is read from judge.jsonl
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert "reward/win_rate" in metrics(stopped)[0]


def test_a_judge_that_is_down_stops_the_run_in_one_line(toys: Path, tmp_path: Path) -> None:
    api = FakeApi(lambda prompt: ("", "[[A]]"))
    api.script = ["401"] * 50
    with serve(api) as url, pytest.raises(JudgeError, match="HTTP 401") as caught:
        grpo.run(grpo_settings(toys, tmp_path / "run", preference="judge", judge_base_url=url, judge_model="fake"))
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_wrong_settings_are_mistakes_before_the_model_is_loaded(toys: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--judge_base_url must read"):
        grpo.run(grpo_settings(toys, tmp_path / "run", preference="judge", judge_model="fake"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="has no right answers"):
        ei.run(settings("ei", toys, out_dir=str(tmp_path / "ei")))


def test_fine_tuning_on_a_hub_data_set_records_its_revision(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpo_gsm8k import hub_datasets

    rows = [json.loads(line) for line in EXAMPLES.read_text().splitlines()][:4]
    monkeypatch.setattr(hub_datasets, "resolve", lambda name: "c" * 40)
    monkeypatch.setattr(hub_datasets, "load", lambda name, commit: (["messages"], iter(rows)))
    monkeypatch.chdir(tmp_path)
    flags = {"out_dir": "run", "epochs": 1, "batch_size": 4, "train_on": "all"}
    sft.run(settings("sft", toys, data_path="hf:me/chats:test", **flags))
    entry = json.loads(Path("run/data.json").read_text())["train"]
    assert entry["from"] | {"columns": []} == {
        "dataset": "me/chats", "config": "", "split": "test", "revision": "c" * 40, "columns": [], "rows": 4,
    }  # fmt: skip


def test_one_file_becomes_three_splits_by_the_seed(tmp_path: Path) -> None:
    folders = [pipeline.split_file(Chat(), EXAMPLES, tmp_path / str(i), seed) for i, seed in enumerate((0, 0, 1))]
    texts = [[(folder / f"{split}.jsonl").read_text() for split in ("train", "val", "test")] for folder in folders]
    assert texts[0] == texts[1] != texts[2]
    assert [len(text.splitlines()) for text in texts[0]] == [26, 3, 3]
    read = [e for split in ("train", "val", "test") for e in Chat().examples(folders[0] / f"{split}.jsonl")]
    assert sorted((e.messages, e.answer) for e in read) == sorted(
        (e.messages, e.answer) for e in Chat().examples(EXAMPLES)
    )
    (tmp_path / "two.jsonl").write_text("".join(EXAMPLES.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(DataError, match="has 2 examples"):
        pipeline.split_file(Chat(), tmp_path / "two.jsonl", tmp_path / "x", 0)


def words_of(folder: Path, stage: str) -> float:
    return fmean(json.loads(line)["words"] for line in (folder / "evals" / f"{stage}.jsonl").read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(("wish", "seed"), [(12, 0), (24, 1)])
def test_length_moves_the_mean_length_to_the_wish(tmp_path: Path, wish: int, seed: int) -> None:
    """The commands of the results."""
    sets = [f"common.length_words={wish}", "grpo.steps=40"]
    result = pipeline.run(
        PipelineConfig(preset="tiny", task="chat", seed=seed, out_dir=str(tmp_path / "run")), sets=sets
    )
    assert [stage["name"] for stage in result["stages"]] == ["base", "sft", "grpo"]
    before, after = (words_of(tmp_path / "run", stage) for stage in ("sft", "grpo"))
    assert abs(after - wish) < 0.2 * wish < abs(before - wish)
    assert result["stages"][2]["reward"] > result["stages"][1]["reward"] + 0.1
    assert "Mean reward from" in (tmp_path / "run" / "report.html").read_text()
