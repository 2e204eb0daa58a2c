"""Numbers out of range, folders where files belong, terminals of any encoding: one line, and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_gsm8k import bench, cli, config, fast_eval_vllm, report
from grpo_gsm8k.errors import ConfigError, DiskError, RunDirError
from grpo_gsm8k.launch.settings import PlanConfig, UpConfig
from grpo_gsm8k.runs import files
from grpo_gsm8k.runs.directory import open_run
from tests.toys import REPOSITORY, stage_config

ALL = {**config.SECTIONS, "pipeline": config.PipelineConfig, "plan": PlanConfig, "up": UpConfig}


def error_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert stop.value.code == 2 and out == "" and len(lines) == 1 and lines[0].startswith("error: "), (argv, out, err)
    return lines[0]


def test_every_number_has_a_range_and_refuses_what_is_none():
    for cls in ALL.values():
        for field in dataclasses.fields(cls):
            if type(field.default) in (int, float):
                assert field.metadata["range"], (cls, field.name)
                below = "-2" if field.name == "keep_rollouts" else "-1"  # there -1 keeps all
                for odd in ("nan", "inf", "-inf", below, "1e999", str(10**400)):
                    with pytest.raises(ConfigError, match=rf"--{field.name} "):
                        config.build(cls, {field.name: odd})
                if isinstance(field.default, float):
                    with pytest.raises(ConfigError, match="finite"):
                        config.build(cls, {field.name: 10**400})


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("eval --limit -1", "--limit -1: must be at least 0 (only the first so many problems; 0 for all)"),
        ("eval --temperature -1", "--temperature -1.0: must be at least 0"),
        ("eval --top_p 0", "--top_p 0.0: must be above 0 and at most 1"),
        ("eval --max_new_tokens 0", "--max_new_tokens 0: must be at least 1"),
        ("grpo --minibatches -1", "--minibatches"),
        ("grpo --epochs 0", "--epochs"),
        ("sft --eval_examples -1", "0 for all"),
        ("sft --max_steps -1", "0 for all"),
        ("sft --save_every 0", "--save_every"),
        ("sft --batch_size 0", "--batch_size"),
        ("sft --lr nan", "--lr nan: must be a finite number"),
        ("sft --beta2 1", "--beta2 1.0: must be at least 0 and below 1"),
        ("sft --set beta1=1", "--set beta1 ="),
        ("demo --set sft.lr=nan", "--set sft.lr ="),
        ("demo --max_steps -1", "--max_steps"),
        (f"sft --seed {10**400}", "--seed"),
        ("compare a b --gain nan", "--gain nan: must be a finite number"),
        ("compare a b --examples -1", "'--examples'"),
        ("data --out_dir d --eval_n 0", "'--eval_n'"),
        ("contamination a --ngram 0", "'--ngram'"),
        ("bench update --repeats 0", "--repeats 0: must be at least 1"),
        ("bench sample --hidden -8", "--hidden"),
        ("launch up --hours nan --image x --budget 1 -- true", "--hours nan"),
        ("launch plan --lora_rank 0", "--lora_rank"),
        ("sft --config .", "Is a directory"),
        ("sft --config=", "Is a directory"),
    ],
)
def test_numbers_out_of_range_name_flag_and_range(argv, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert words in error_line(argv.split(), capsys)
    assert not list(tmp_path.iterdir())


def test_a_recipe_is_held_to_the_same_ranges_whatever_stage_reads_it(tmp_path):
    recipe = tmp_path / "r.toml"
    for text, words in {
        "[common]\nlr = nan\n": r"r.toml: \[common\] lr = nan: must be a finite number",
        "[sft]\nbatch_size = 0\n": r"\[sft\] batch_size = 0: must be at least 1",
        f"[common]\nseed = {'9' * 5000}\n": "not a TOML file",
        '[common]\nmodel_id = "a\\u0000b"\n': "without NUL",
    }.items():
        recipe.write_text(text)
        with pytest.raises(ConfigError, match=words):
            config.resolve("grpo", config_file=recipe)
    recipe.write_bytes(b"\xef\xbb\xbf[common]\nlr = 0.5\n")  # a byte order mark
    assert config.resolve("grpo", config_file=recipe).lr == 0.5


def test_any_text_in_a_config_reads_back(tmp_path):
    cfg = config.resolve("grpo", flags={"think_open": "🤔 \x7f \u2028", "run_name": "é"})
    (tmp_path / "c.toml").write_text(config.to_toml(cfg, "grpo"), encoding="utf-8")
    assert config.resolve("grpo", config_file=tmp_path / "c.toml") == cfg


@pytest.mark.parametrize("place", ["/proc/nowhere/x", "file/below", "x" * 300])
def test_out_dirs_that_cannot_be_made_are_one_line(place, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises((DiskError, RunDirError)), open_run(stage_config("sft", out_dir=place), "sft", {}):
        raise AssertionError("it was made")


def test_a_failed_start_leaves_the_folder_that_was_there(tmp_path):
    mine, link = tmp_path / "mine", tmp_path / "link"
    mine.mkdir()
    link.symlink_to(mine)
    for out in (mine, link, tmp_path / "new"):
        with pytest.raises(KeyError), open_run(stage_config("sft", out_dir=str(out)), "sft", {}):
            raise KeyError("the true error")
    assert mine.is_dir() and not list(mine.iterdir()) and link.is_symlink() and not (tmp_path / "new").exists()


def test_an_evaluation_tries_its_folder_first_and_keeps_its_rows_when_the_disk_fills(tiny, tmp_path, monkeypatch):
    def cfg(out):
        flags = {"device": "cpu", "prompt_style": "gsm8k", "max_new_tokens": 4, "limit": 2, "out_dir": str(out)}
        flags |= {"model_id": str(tiny.model), "eval_path": str(tiny.data / "test.jsonl")}
        return config.resolve("eval", flags=flags)

    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(fast_eval_vllm, "evaluate_model", None)  # a model is never loaded
        with pytest.raises(DiskError):
            fast_eval_vllm.run(cfg(tmp_path / "file" / "out"))

    def full(path, rows):
        if Path(path).is_relative_to(tmp_path / "out"):
            raise DiskError(f"{path}: cannot be written: No space left on device")
        files.write_jsonl(path, rows)

    monkeypatch.setattr(fast_eval_vllm, "write_jsonl", full)
    monkeypatch.setattr(fast_eval_vllm.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(DiskError, match=r"No space left.*the rows are in"):
        fast_eval_vllm.run(cfg(tmp_path / "out"))
    (kept,) = tmp_path.glob("eval_*.jsonl")
    assert len(kept.read_text().splitlines()) == 2


def test_nothing_is_renamed_over_a_device():
    with pytest.raises(DiskError, match="not a regular file"):
        files.write_atomic("/dev/full", "x")


def in_a_process(*argv, stdout=subprocess.PIPE, **env):
    command = [sys.executable, "-m", "grpo_gsm8k.cli", *argv]
    return subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **env}, stdout=stdout, stderr=subprocess.PIPE, check=False
    )


def test_a_terminal_without_utf8_and_a_full_or_closed_stdout():
    ascii_only = in_a_process("--help", PYTHONIOENCODING="ascii")
    assert ascii_only.returncode == 0 and b"SFT -> expert iteration -> GRPO" in ascii_only.stdout
    with Path("/dev/full").open("w") as full:
        done = in_a_process("launch", "--help", stdout=full)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    gone = in_a_process("launch", "--help", stdout=writer)
    os.close(writer)
    assert gone.returncode == 1 and b"Traceback" not in gone.stderr and gone.stderr.count(b"\n") <= 1


def test_bench_refuses_before_it_measures():
    for argv in (["step", "--completions", "a"], ["update", "--dtype", "int8"], ["sample", "--heads", "3"]):
        with pytest.raises(ConfigError):
            bench.main(argv)


def test_the_report_follows_no_link_out_and_names_no_one(tmp_path):
    run, secret = tmp_path / "run", tmp_path / "secret"
    (run / "samples").mkdir(parents=True)
    secret.write_text('{"id": "a", "response": "PRIVATE", "step": 1, "loss": 777.25}\n')
    (run / "samples" / "step_000001.jsonl").symlink_to(secret)
    (run / "code.diff").symlink_to(secret)
    (run / "sys").symlink_to(tmp_path)
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 10**400}, {"step": 1e308, "loss": 1}, {"loss": 3}]
    rows += [
        {"step": "x"},
        {"step": 3, "loss": "0.1", "val/accuracy": 1e308, "reward/mean": -1e308},
        {"step": -(10**30)},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "loss": NaN}\n{"step": 5, "lo'
    (run / "metrics.jsonl").write_bytes(text.encode() + b"\xff\xfe")
    (run / "config.toml").write_text('[sft]\nmodel_id = "/home/alice/models/qwen"\ndata = "/home/alice"\n')
    (run / "command.txt").write_text(
        "grpo-gsm8k sft --data=/Users/alice/gsm8k --eval_set_path file:///home/alice/v.jsonl"
    )
    page = report.write_report([run]).read_text()
    assert "PRIVATE" not in page and "777" not in page and "alice" not in page
    assert "…/qwen" in page and "…/gsm8k" in page and page.count("not followed") >= 3
