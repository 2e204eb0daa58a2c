"""Shards: what JSONL would have trained, on disk; the same bytes after a kill, for one tokenizer, and no code."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from grpo_gsm8k import config, pretokenize, sft
from grpo_gsm8k.datatypes import Datum
from grpo_gsm8k.errors import ConfigError, DataError
from grpo_gsm8k.runs.files import read_json, sha256_file, write_json
from grpo_gsm8k.trainer import token_shards
from tests.toys import REPOSITORY, cli, make_model, stage_config


@pytest.fixture(scope="module")
def pairs(tiny, tmp_path_factory):
    """20 chats and prompt/response pairs, one of them too long for 64 tokens."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    problems = [json.loads(line) for line in (tiny.data / "train.jsonl").read_text().splitlines()[:20]]
    rows = [{"prompt": row["question"][:20], "response": row["answer"][-12:]} for row in problems]
    rows[3] = {**rows[3], "raw": True}
    rows[5] = {"messages": [{"role": role, "content": "a b c"} for role in ("system", "user", "assistant")]}
    rows[7]["response"] *= 30
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokenize(tiny, pairs, out, **flags):
    given = {"model_id": str(tiny.model), "data_path": str(pairs), "out_dir": str(out), "prompt_style": "gsm8k"}
    small = {"max_total_tokens": 64, "shard_rows": 6}
    return pretokenize.tokenize(config.resolve("tokenize", flags={**given, **small, **flags}))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_shard_by_hand(tmp_path):
    rows = [Datum((5, 6, 7, 0), (0, 0, 1, 1)), Datum((8, 0), (0, 1)), Datum((0, 0, 9), (0, 1, 1))]
    tensors = token_shards.pack(rows, 5, pad_id=0)  # the id that pads ends rows, too, and begins one
    assert tensors["input_ids"].tolist() == [[0, 5, 6, 7, 0], [0, 0, 0, 8, 0], [0, 0, 0, 0, 9]]
    assert tensors["labels"].tolist() == [[-100, -100, -100, 7, 0], [-100] * 4 + [0], [-100] * 3 + [0, 9]]
    assert tensors["response_mask"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]
    for format in ("safetensors", "pt"):
        path = tmp_path / f"a.{format}"
        token_shards.write_shard(path, tensors, {"lines": 3}, format)
        shard = token_shards.read_shard(path, format)
        assert token_shards.unpack(shard) == rows
        assert shard["meta"] == {"lines": 3} and int(shard["pad_token_id"]) == 0
        assert {name: t.dtype for name, t in shard.items() if name in ("input_ids", "labels", "response_mask")} == {
            "input_ids": torch.int64,
            "labels": torch.int64,
            "response_mask": torch.uint8,
        }
    assert token_shards.unpack(token_shards.pack([], 5, 0)) == []


def test_shards_against_the_tokenizer(tiny, pairs, tmp_path):
    said = tokenize(tiny, pairs, tmp_path / "s")
    assert (said["written"], said["left_out"], said["shards"]) == (19, 1, 4)
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    assert manifest["input"] == {"sha256": sha256_file(pairs), "rows": 20}
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    asked = [json.loads(line) for line in pairs.read_text().splitlines()]
    with safe_open(tmp_path / "s/shard_00000.safetensors", framework="pt") as handle:
        ids, labels = handle.get_tensor("input_ids"), handle.get_tensor("labels")
        assert json.loads(handle.metadata()["meta"]) == {"first_line": 1, "lines": 6, "rows": 6}
    assert ids.shape == (6, 64) and (ids[:, 0] == tokenizer.pad_token_id).all()
    text = tokenizer.decode(ids[0]).replace(tokenizer.pad_token, "")
    assert text == (
        f"<|im_start|>user\n{asked[0]['prompt']}<|im_end|>\n<|im_start|>assistant\n{asked[0]['response']}<|im_end|>"
    )
    for row, line in ((0, asked[0]), (3, asked[3])):
        assert tokenizer.decode(labels[row][labels[row] >= 0]) == line["response"] + "<|im_end|>"
    raw = tokenizer.decode(ids[3]).replace(tokenizer.pad_token, "")
    assert raw == asked[3]["prompt"] + asked[3]["response"] + "<|im_end|>"


@pytest.mark.parametrize("format", ["safetensors", "pt"])
def test_training_on_shards_is_training_on_the_file_bitwise(tiny, pairs, tmp_path, format):
    tokenize(tiny, pairs, tmp_path / "shards", format=format)
    flags = {"model_id": str(tiny.model), "eval_set_path": str(tiny.data / "val.jsonl"), "max_length": 64}
    flags |= {"batch_size": 4, "epochs": 1, "eval_every": 100, "eval_examples": 2, "lr": 1e-3}
    results = []
    for n, path in enumerate((pairs, tmp_path / "shards")):
        results.append(sft.run(stage_config("sft", **flags, data_path=str(path), out_dir=str(tmp_path / f"run{n}"))))
    from_file, from_shards = results
    assert from_file["weights_sha256"] == from_shards["weights_sha256"]
    assert (from_file["examples"], from_shards["examples"]) == (19, 19)
    recorded = json.loads((tmp_path / "run1/data.json").read_text())["train"]
    assert recorded["sha256"] == sha256_file(tmp_path / "shards/manifest.json")


def test_a_run_killed_anywhere_ends_with_the_same_bytes(tiny, pairs, tmp_path):
    tokenize(tiny, pairs, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert len(whole) == 5
    for kept in range(4):  # after a kill: the plan, some shards, and a temporary file
        folder = tmp_path / f"killed{kept}"
        shutil.copytree(tmp_path / "whole", folder)
        plan = {key: value for key, value in read_json(folder / "manifest.json").items() if key in PLAN}
        write_json(folder / "manifest.json", plan)
        for path in sorted(folder.glob("shard_*"))[kept:]:
            path.rename(path.with_name(f".tmp-1-2-{path.name}"))
        with pytest.raises(DataError, match="not complete"):
            token_shards.read_manifest(folder)
        untouched = {path: path.stat().st_mtime_ns for path in folder.glob("shard_*")}
        tokenize(tiny, pairs, folder)
        assert contents(folder) == whole
        assert all(path.stat().st_mtime_ns == before for path, before in untouched.items())
    assert tokenize(tiny, pairs, tmp_path / "whole")["written"] == 19 and contents(tmp_path / "whole") == whole


PLAN = ("made_with", "input", "pad_token_id", "train_on", "max_total_tokens", "shard_rows", "format")


def test_other_settings_other_inputs_and_other_files_are_refused(tiny, pairs, tmp_path):
    folder = tmp_path / "s"
    tokenize(tiny, pairs, folder)
    before = contents(folder)
    other = tmp_path / "other.jsonl"
    other.write_text(pairs.read_text() + '{"prompt": "a", "response": "b"}\n')
    for flags, words in (
        ({"max_total_tokens": 65}, "another max_total_tokens;"),
        ({"data_path": str(other)}, "another input;"),
        ({"prompt_style": "qwen_boxed"}, "another made_with;"),
        ({"shard_rows": 0}, "--shard_rows 0: must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            tokenize(tiny, pairs, folder, **flags)
    assert contents(folder) == before
    with pytest.raises(ConfigError, match="a manifest of something else"):
        tokenize(tiny, pairs, tiny.data)
    with pytest.raises(DataError, match="no example fits into 5 tokens"):
        tokenize(tiny, pairs, tmp_path / "narrow", max_total_tokens=5)


def test_a_fault_is_found_before_anything_is_written(tiny, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "response": "b"}\n' * 9 + '{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:10: response is missing.*validate"):
        tokenize(tiny, bad, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_shards_of_another_tokenizer_template_or_style_are_refused(tiny, pairs, tmp_path):
    tokenize(tiny, pairs, tmp_path / "s")
    template = tmp_path / "template"
    shutil.copytree(tiny.model, template)
    (template / "chat_template.jinja").write_text((tiny.model / "chat_template.jinja").read_text() + " ")
    splits = tmp_path / "splits"  # the same vocabulary and template, but digits apart
    shutil.copytree(tiny.model, splits)
    spec = json.loads((splits / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    before = spec["pre_tokenizer"]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, before]}
    spec["model"]["merges"] = spec["model"]["merges"][:-40]
    (splits / "tokenizer.json").write_text(json.dumps(spec))
    flags = {"eval_set_path": str(tiny.data / "val.jsonl"), "data_path": str(tmp_path / "s")}
    for model, more, words in (
        (make_model(tmp_path / "other", tiny.data, vocab_size=400), {}, "tokenizer: '"),
        (template, {}, "tokenizer: '"),
        (splits, {}, "tokenizer: '"),
        (tiny.model, {"prompt_style": "r1_zero"}, "prompt_style: 'gsm8k' then, 'r1_zero' now"),
        (tiny.model, {"train_on": "all"}, "train_on: 'last' then, 'all' now"),
    ):
        with pytest.raises(DataError, match=words):
            sft.run(stage_config("sft", **flags, **more, model_id=str(model), out_dir=str(tmp_path / "run")))
        assert not (tmp_path / "run").exists()


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_damaged_shards_are_refused_and_no_code_is_run(tiny, pairs, tmp_path):
    folder = tmp_path / "s"
    tokenize(tiny, pairs, folder, format="pt")
    manifest = read_json(folder / "manifest.json")
    made_with = manifest["made_with"]
    shard = folder / "shard_00001.pt"
    torch.save({"input_ids": Bomb(tmp_path / "boom")}, shard)
    with pytest.raises(DataError, match=r"shard_00001\.pt: is missing, or differs from"):
        token_shards.load_rows(folder, made_with, "last")
    manifest["shards"][1]["sha256"] = sha256_file(shard)  # and the manifest vouches for it
    write_json(folder / "manifest.json", manifest)
    for bad in (None, b"", b"PK\x03\x04", pickle.dumps({"a": 1}, protocol=2)):
        if bad is not None:
            shard.write_bytes(bad)
            manifest["shards"][1]["sha256"] = sha256_file(shard)
            write_json(folder / "manifest.json", manifest)
        with pytest.raises(DataError, match=r"shard_00001\.pt: is not a shard"):
            token_shards.load_rows(folder, made_with, "last")
    assert not (tmp_path / "boom").exists()
    with pytest.raises(DataError, match="tokenize --out_dir"):
        token_shards.read_manifest(tiny.data)  # has a manifest, of problems


@pytest.mark.slow
def test_the_command_in_two_processes_killed_and_continued(tiny, pairs, tmp_path):
    """The same bytes from two processes, after kill -9, and from the first README's script."""
    many = tmp_path / "many.jsonl"
    many.write_text(pairs.read_text() * 100)
    flags = ["--model_id", tiny.model, "--prompt_style", "gsm8k", "--max_total_tokens", "64", "--shard_rows", "200"]
    flags += ["--format", "pt"]  # the script's own
    done = cli("tokenize", *flags, "--data_path", many, "--out_dir", tmp_path / "one", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["written"] == 1900, done.stderr
    script = [sys.executable, REPOSITORY / "scripts/shell/pretokenize_r1_pairs.py", *flags, "--infile", many]
    script += ["--out_dir", tmp_path / "two", "--workers", "2"]
    process = subprocess.Popen(list(map(str, script)), start_new_session=True)
    while len(list((tmp_path / "two").glob("shard_*"))) < 3:
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    done = subprocess.run(list(map(str, script)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
