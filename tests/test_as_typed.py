"""What the documents of the forerunners say, typed as it stands there: commands, flags, files, variables."""

from __future__ import annotations

import itertools
import json
import os
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from grpo_gsm8k import cli, config, data_prep, environment, originals, workbench
from grpo_gsm8k.errors import ConfigError
from tests.toys import REPOSITORY, word_problem

SMALL = ["--device", "cpu", "--prompt_style", "gsm8k"]


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Run a command in this process, in an empty folder; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        code = 0
        try:
            cli.main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def hub(monkeypatch, gsm8k_dir, tmp_path_factory):
    """The hub's data set: the first problems of the real one, from a folder instead of the network."""
    files = {split: tmp_path_factory.mktemp("hub") / f"{split}.jsonl" for split in ("train", "test")}
    for (split, path), most in zip(files.items(), (900, 9), strict=True):
        with (gsm8k_dir / f"{split}.jsonl").open(encoding="utf-8") as lines:
            path.write_text("".join(itertools.islice(lines, most)), encoding="utf-8")
    asked = []

    def origin(revision, cache_dir):
        asked.append((revision, cache_dir))
        return data_prep._Origin(data_prep.REPO, data_prep.PINNED, lambda: files)

    monkeypatch.setattr(data_prep, "_hub", origin)
    return asked


# ------------------------------------------------------------------------------------------- eval, alone


def test_eval_alone_fetches_the_data_records_the_machine_and_writes_the_baseline(call, hub, tiny):
    code, out, err = call("eval", "--limit", "3", "--model_id", tiny.model, *SMALL, "--max_new_tokens", "4", "--json")
    assert code == 0, err
    found = json.loads(out)
    counts = {path.stem: path.read_bytes().count(b"\n") for path in Path("artifacts/gsm8k").glob("*.jsonl")}
    assert counts == {"train": 388, "val": 512, "test": 9} and "GSM8K is fetched into artifacts/gsm8k" in err
    rows = [json.loads(line) for line in Path(found["results_path"]).read_text().splitlines()]
    assert len(rows) == found["n"] == 3 and Path(found["results_path"]).parent == Path("artifacts/baselines")
    assert rows[0].keys() >= {"prompt", "response", "reward", "gold", "correct"}
    (run,) = Path("artifacts/runs").iterdir()
    assert re.fullmatch(r"\d{8}T\d{6}Z_[\w-]+", run.name) and found["run_dir"] == str(run)
    assert {path.name for path in (run / "sys").iterdir()} == {"packages.txt", "machine.json", "env.json"}
    kept = tomllib.loads((run / "config.toml").read_text())["eval"]
    assert kept["limit"] == 3 and kept["engine"] == "hf"
    data = json.loads((run / "data.json").read_text())["eval_set"]
    assert data["path"] == "artifacts/gsm8k/test.jsonl" and len(data["sha256"]) == 64
    # A second call finds the data, and asks the hub for nothing.
    code, _, err = call("eval", "--limit", "2", "--model_id", tiny.model, *SMALL, "--max_new_tokens", "4")
    assert code == 0 and "fetched" not in err and len(hub) == 1 and len(list(Path("artifacts/runs").iterdir())) == 2


def test_eval_without_data_and_without_a_hub_is_one_line_and_leaves_nothing(call, tiny):
    code, out, err = call("eval", "--limit", "100", "--model_id", tiny.model, *SMALL)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and out == "" and len(lines) == 1
    assert "artifacts/gsm8k/test.jsonl: does not exist" in lines[0] and "--source" in lines[0]
    assert not list(Path().glob("artifacts/runs/*"))


def test_the_one_shot_evaluation_with_every_flag(call, hub, tiny):
    words = f"""eval --model_id {tiny.model} --eval_path artifacts/gsm8k/val.jsonl --limit 2
        --max_new_tokens 4 --gpu_mem_util 0.92 --tp_size 1 --wandb_project grpo-gsm8k --run_name qwen25_7b_eval
        --out_dir artifacts/gsm8k --seed 31415 --eval_n 800 --revision main --cache_dir cache""".split()
    code, out, err = call(*words, *SMALL, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert Path("artifacts/gsm8k/val.jsonl").read_bytes().count(b"\n") == 800
    assert found["results_path"] == "artifacts/baselines/qwen25_7b_eval.jsonl" and found["n"] == 2
    assert hub == [(data_prep.PINNED, Path("cache"))]
    assert "--gpu_mem_util 0.92: only vLLM reads this" in err and "the results go to artifacts/baselines" in err
    assert {path.name for path in Path("artifacts/gsm8k").iterdir()} == {
        *("train.jsonl", "val.jsonl", "test.jsonl", "manifest.json"),
    }
    # Another --eval_n over data that are there is said, and changes nothing.
    code, _, err = call(*words, *SMALL, "--eval_n", "9")
    assert code == 0 and "--eval_n 9: artifacts/gsm8k has 800 validation problems" in err


def test_only_the_usual_folders_are_filled(call, hub, tiny):
    for path in ("artifacts/dta/test.jsonl", "elsewhere/val.jsonl", "artifacts/gsm8k/dev.jsonl"):
        code, _, err = call("eval", "--eval_path", path, "--model_id", tiny.model, *SMALL)
        assert code == 2 and path in err
    code, _, err = call("eval", "--eval_path", "artifacts/data/test.jsonl", "--task", "countdown", *SMALL)
    assert code == 2 and hub == [] and not Path("artifacts/gsm8k").exists()


def test_an_unknown_engine_is_refused_by_name():
    for stage in ("eval", "grpo"):
        with pytest.raises(ConfigError, match="auto, hf, vllm"):
            config.resolve(stage, flags={"engine": "sglang"})


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"gpu_mem_util": 0.8, "tp_size": 2}, "--tp_size 2, --gpu_mem_util 0.8: only vLLM"),
        ({"max_model_len": 99}, "--max_model_len 99: only vLLM"),
        ({"weight_transfer": "nccl"}, "--weight_transfer nccl: only vLLM"),
        ({"tp_size": 2, "engine": "tinker", "learner": "tinker"}, "--tp_size 2: only vLLM"),
        ({}, ""),
        ({"gpu_mem_util": 0.8, "engine": "vllm"}, ""),
        ({"gpu_mem_util": 0.8, "engine": "mine:Engine"}, ""),
    ],
)
def test_what_only_vllm_reads_is_named_under_another_engine(flags, named, capsys):
    workbench.warn_of_unread(config.resolve("grpo", flags={"engine": "hf"} | flags))
    assert named in capsys.readouterr().err if named else capsys.readouterr().err == ""


def test_a_device_of_vllm_under_another_engine_is_refused():
    for stage in ("eval", "sft", "grpo"):
        with pytest.raises(ConfigError, match=r"--vllm_device cuda:1 with --engine hf: .*give --engine vllm, or leave"):
            config.resolve(stage, flags={"engine": "hf", "vllm_device": "cuda:1"})
        with pytest.raises(ConfigError, match="--vllm_devices cuda:1,cuda:2 with --engine hf"):
            config.resolve(stage, flags={"engine": "hf"}, sets=["vllm_devices=cuda:1,cuda:2"])
        assert config.resolve(stage, flags={"vllm_device": "cuda:1"}).engine == "vllm"
        own = config.resolve(stage, flags={"engine": "mine:Engine", "vllm_device": "cuda:1"})
        assert (own.engine, own.vllm_device) == ("mine:Engine", "cuda:1")  # a user's class reads what it likes


# ------------------------------------------------------------------------------------------- data and shards


def test_data_prep_without_flags_and_from_a_script(call, hub):
    assert data_prep.main([]) == 0
    assert sorted(path.name for path in Path("artifacts/gsm8k").iterdir()) == [
        *("manifest.json", "test.jsonl", "train.jsonl", "val.jsonl"),
    ]
    again = data_prep.main(out_dir="artifacts/other", seed=31415, eval_n=800, revision="main", cache_dir="cache")
    assert again == 0 and Path("artifacts/other/val.jsonl").read_bytes().count(b"\n") == 800
    assert hub == [(data_prep.PINNED, None), ("main", "cache")]


def script(name, *words):
    """A script of scripts/, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(REPOSITORY / "scripts" / name), run_name="__main__")


def test_the_scripts_of_the_first_readme_one_after_the_other(call, tiny):
    """The evaluation set, then the shards beside it, in either order; then SFT on them, validated on that set."""
    pairs = Path("artifacts/r1_sft_pairs.jsonl")
    pairs.parent.mkdir()
    rows = [{"prompt": f"What is {n} + 1?", "response": f"It is {n + 1}.\n#### {n + 1}"} for n in range(6)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ["--model_id", tiny.model, "--prompt_style", "gsm8k"]
    val = ["--infile", tiny.data / "val.jsonl", "--outfile", "artifacts/tokenized/val_for_vllm.jsonl"]
    script("shell/prep_val_for_vllm.py", *model, *val)
    script("shell/pretokenize_r1_pairs.py", *model)  # its own --infile, --out_dir and width
    script("shell/prep_val_for_vllm.py", *model, *val)
    script("shell/pretokenize_r1_pairs.py", *model, "--infile", pairs, "--out_dir", "artifacts/tokenized")
    found = sorted(path.name for path in Path("artifacts/tokenized").iterdir())
    assert found == ["manifest.json", "shard_00000.pt", "val_for_vllm.jsonl"]
    shard = torch.load("artifacts/tokenized/shard_00000.pt", weights_only=True)
    assert shard.keys() >= {"input_ids", "labels", "response_mask", "pad_token_id", "meta"}
    assert shard["input_ids"].shape == shard["labels"].shape == shard["response_mask"].shape == (6, 2048)
    assert (shard["input_ids"][:, 0] == shard["pad_token_id"]).all()  # padded on the left
    assert (shard["labels"] != -100).equal(shard["response_mask"].bool()) and shard["response_mask"].any(1).all()
    row = json.loads(Path("artifacts/tokenized/val_for_vllm.jsonl").read_text().splitlines()[0])
    assert row.keys() >= {"prompt", "gold", "gold_num"}
    flags = ["--data_path", "artifacts/tokenized", "--eval_set_path", "artifacts/tokenized/val_for_vllm.jsonl"]
    flags += [
        "--eval_every",
        "4",
        "--eval_examples",
        "2",
        "--max_steps",
        "1",
        "--max_new_tokens",
        "4",
        "--device",
        "cpu",
    ]
    code, out, err = call("sft", *model, *flags, "--out_dir", "run", "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["step"] == 1  # behind what the scripts printed


def test_sft_without_a_valid_evaluation_set_halts_before_it_loads_a_model(call):
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "response": "2"}) + "\n")
    Path("empty.jsonl").touch()
    Path("bad.jsonl").write_text('{"prompt": "1 + 1?"}\n')
    said = {
        "": "artifacts/data: does not exist; make it with `grpo-gsm8k data --out_dir artifacts/data`",
        "nowhere.jsonl": "nowhere.jsonl: does not exist",
        "empty.jsonl": "empty.jsonl: is empty",
        "bad.jsonl": "bad.jsonl:1: 'gold' is missing",
    }
    for path, why in said.items():
        words = ["--eval_set_path", path] if path else []
        code, out, err = call("sft", "--model_id", "nowhere", "--data_path", "pairs.jsonl", *words, "--out_dir", "run")
        assert (code, out) == (2, "") and f"error: {why}" in err and not Path("run").exists()


# ------------------------------------------------------------------------------------------- where data lie


def test_data_lie_in_artifacts_gsm8k_where_that_alone_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = {"grpo": ("data", ""), "eval": ("eval_path", "/test.jsonl"), "prep-eval": ("data", "")}

    def found():
        return {getattr(config.resolve(section), name).removesuffix(end) for section, (name, end) in fields.items()}

    assert found() == {"artifacts/data"}
    Path("artifacts/gsm8k").mkdir(parents=True)
    assert found() == {"artifacts/gsm8k"}
    assert config.resolve("grpo", flags={"data": "artifacts/data"}).data == "artifacts/data"
    Path("r.toml").write_text('[common]\ndata = "elsewhere"\n')
    assert config.resolve("sft", config_file=Path("r.toml")).data == "elsewhere"
    Path("artifacts/data").mkdir()
    assert found() == {"artifacts/data"}


# ------------------------------------------------------------------------------------------- names and variables


def options():
    """Every option of every command, as it is declared."""

    def walk(command):
        for parameter in command.params:
            yield from (name.replace("_", "-") for name in (*parameter.opts, *parameter.secondary_opts))
        for below in getattr(command, "commands", {}).values():
            yield from walk(below)

    return set(walk(cli.app.tree))


def test_another_name_of_a_flag_stands_for_one_and_hides_none():
    there = options()
    assert {f"--{name}".replace("_", "-") for name in originals.ALIASES.values()} <= there
    assert not {f"--{name}".replace("_", "-") for name in originals.ALIASES} & there


def test_names_of_grpo_with_tinker_are_understood():
    words = """--model_name M --n_grpo_steps=5 --learning_rate=2e-5 --group_size=2 --advantage_eps=1e-5
        --use_std_normalization --cliprange=0.3 --sampling_temperature=0.7 --sampling_max_tokens=512 --log_path=d
        --lora_rank 4 --save_every=2 --eval_every=3 --wandb_project=p --wandb_name=w"""
    command = cli.app.tree.commands["grpo"]
    given = command.make_context("grpo", words.split(), **cli.app.info.context_settings).params
    expected = {"model_id": "M", "steps": 5, "lr": 2e-5, "group_size": 2, "advantage_eps": 1e-5, "std_norm": True}
    expected |= {"clip_eps": 0.3, "temperature": 0.7, "max_new_tokens": 512, "out_dir": "d", "lora_rank": 4}
    expected |= {"save_every": 2, "eval_every": 3, "wandb_project": "p", "run_name": "w"}
    assert {name: given[name] for name in expected} == expected


# ------------------------------------------------------------------------------------------- GRPO with Tinker


def translated(words, monkeypatch):
    """What the script makes of a command line: the settings of `grpo`."""
    typed = []
    monkeypatch.setattr(cli, "main", typed.append)
    script("grpo_train_tinker.py", *words.split())
    *before, (stage, *flags) = typed
    command = cli.app.tree.commands[stage]
    given = command.make_context(stage, flags, **cli.app.info.context_settings).params
    cfg = config.resolve(
        stage, flags={k: v for k, v in given.items() if v is not None and k not in ("as_json", "sets")}
    )
    return before, cfg


def test_the_script_of_grpo_with_tinker_has_its_names_and_defaults(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    before, cfg = translated("", monkeypatch)
    assert before == [["data", "--out_dir=artifacts/gsm8k"]]  # none is there
    expected = {"model_id": "Qwen/Qwen3-8B", "lora_rank": 32, "steps": 200, "lr": 1e-5, "rollouts_per_step": 2048}
    expected |= {"group_size": 8, "advantage_eps": 1e-6, "std_norm": True, "clip_eps": 0.2, "temperature": 1.0}
    expected |= {"max_new_tokens": 1024, "prompt_style": "r1_zero", "out_dir": "/tmp/grpo-tinker", "save_every": 20}
    expected |= {"eval_every": 20, "eval_examples": 100, "eval_draw": "random", "resume": True}
    expected |= {"eval_set_path": "artifacts/gsm8k/test.jsonl", "format_weight": 0.2, "answer_weight": 0.8}
    assert {name: getattr(cfg, name) for name in expected} == expected
    Path("artifacts/data").mkdir(parents=True)
    words = "--n_grpo_steps=5 --rollout_batch_size=8 --group_size 2 --wandb_project=p --wandb_name=w --kl_coef 0.1"
    before, cfg = translated(f"{words} --use_r1_zero_format=False --use_std_normalization=false", monkeypatch)
    assert before == [] and (cfg.steps, cfg.rollouts_per_step, cfg.group_size) == (5, 16, 2)
    assert (cfg.prompt_style, cfg.std_norm, cfg.kl_coef) == ("qwen_boxed", False, 0.1)
    assert (cfg.wandb_project, cfg.run_name, cfg.eval_set_path) == ("p", "w", "artifacts/data/test.jsonl")
    assert cfg.learner == "torch"
    _, cfg = translated("--base_url=http://127.0.0.1:8000", monkeypatch)
    assert (cfg.learner, cfg.engine, cfg.base_url) == ("tinker", "tinker", "http://127.0.0.1:8000")
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    assert translated("", monkeypatch)[1].learner == "tinker"
    assert translated("--learner torch", monkeypatch)[1].learner == "torch"
    for wrong in ("--rollout_batch_size=many", "--use_r1_zero_format=maybe"):
        with pytest.raises(SystemExit) as stop:
            translated(wrong, monkeypatch)
        assert stop.value.code == 2


def test_the_script_of_grpo_with_tinker_goes_on_where_its_log_path_is(call, tiny):
    words = f"""--model_name={tiny.model} --n_grpo_steps=2 --rollout_batch_size=2 --group_size=2 --sampling_max_tokens=6
        --save_every=1 --eval_every=2 --log_path=log --lora_rank=2 --data={tiny.data} --device cpu""".split()
    script("grpo_train_tinker.py", *words, "--max_steps", "1")
    script("grpo_train_tinker.py", *words)
    rows = [json.loads(line) for line in Path("log/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    times = ("save_weights", "sampling", "compute_rewards", "build_data", "training", "total")
    assert all(row[f"time/{name}"] >= 0 for row in rows for name in times)
    named = ("progress/grpo_step", "progress/done_frac", "reward/mean", "reward/std", "reward/min", "reward/max")
    assert all(name in row for row in rows for name in named)
    assert rows[1]["val/n"] == 16 and {"val/accuracy", "val/format_accuracy"} <= rows[1].keys()


def test_validation_asks_what_the_seed_draws():
    examples = [word_problem(str(n), f"q{n}", "", "1") for n in range(40)]

    def asked(**flags):
        return [int(e.id) for e in workbench.validated(examples, config.resolve("grpo", flags=flags))]

    assert asked(eval_examples=5) == list(range(5)) and asked(eval_examples=0) == list(range(40))
    drawn = asked(eval_examples=5, eval_draw="random")
    assert drawn == sorted(set(drawn)) and len(drawn) == 5 and drawn != list(range(5))
    assert asked(eval_examples=5, eval_draw="random") == drawn != asked(eval_examples=5, eval_draw="random", seed=1)
    assert asked(eval_examples=0, eval_draw="random") == list(range(40))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("grpo --rollout_batch_size 256", "--rollouts_per_step counts completions"),
        ("grpo --use_r1_zero_format=False", "--prompt_style qwen_boxed"),
        ("launch up --volume-gb 500", "is --disk here"),
        ("launch up --max-steps 500", "behind --"),
        ("pipeline --mode all", "each stage is a command"),
        ("pipeline --config tiny", "the preset is --preset tiny"),
        ("eval --batch_size 8", "an evaluation has --sample_rows"),
        ("grpo --num-generations 4", "is --group_size here"),
        ("sft --lora_dropout 0.1", "dropout is off in every pass"),
        ("serve --api_key=K", "is --api_key_env here, the name of a variable"),
        ("unified_eval --eval_suites gsm8k", "no such command: unified_eval (here: eval)"),
        ("deploy", "no such command: deploy (here: export)"),
        ("launch deploy", "no such command: deploy; see `grpo-gsm8k launch --help`"),
    ],
)
def test_a_name_that_means_something_else_here_says_the_new_one(call, words, says):
    code, out, err = call(*words.split())
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_a_line_of_an_env_file_that_sets_nothing_is_named(call, monkeypatch):
    monkeypatch.setenv("GOOD", "x")  # so that it is put back
    monkeypatch.delenv("GOOD")
    Path(".env").write_text("# keys\nGOOD=1\nBAD LINE hf_secret\n")
    assert call("validate", "--data", "nowhere") == (
        *(2, "", ".env:3: is no NAME=value, and sets nothing\nerror: nowhere: does not exist\n"),
    )
    assert os.environ["GOOD"] == "1"


def test_every_name_of_another_command_leads_to_one_that_is_there():
    assert set(originals.COMMANDS.values()) <= cli.app.tree.commands.keys()
    assert not originals.COMMANDS.keys() & cli.app.tree.commands.keys()


def test_an_env_file_is_read_and_never_over_the_environment(tmp_path, monkeypatch, capsys):
    for name in ("HF_TOKEN", "HUGGINGFACE_HUB_TOKEN", "TINKER_TOKEN", "TINKER_API_KEY", "B", "EMPTY"):
        monkeypatch.setenv(name, "x")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("A", "mine")
    monkeypatch.setenv("WANDB_API_KEY", "")
    path = tmp_path / ".env"
    path.write_text("A=theirs\nexport B='two words' # note\nEMPTY=\nWANDB_API_KEY=k\nHUGGINGFACE_HUB_TOKEN=hf_secret\n")
    environment.load(path)
    assert {name: os.environ.get(name) for name in ("A", "B", "EMPTY", "WANDB_API_KEY", "HF_TOKEN")} == {
        **{"A": "mine", "B": "two words", "EMPTY": None, "WANDB_API_KEY": "", "HF_TOKEN": "hf_secret"}
    }
    monkeypatch.setenv("TINKER_TOKEN", "t")
    environment.load(tmp_path / "none")
    assert os.environ["TINKER_API_KEY"] == "t" and capsys.readouterr() == ("", "")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        environment.load(path)


def test_a_command_reads_the_env_file_and_no_run_keeps_its_secrets(call, tiny, tmp_path, monkeypatch):
    secret = "hf_" + "abcdefgh" * 4
    for name in ("HF_TOKEN", "UV_INDEX"):
        monkeypatch.setenv(name, "x")  # so that it is put back
        monkeypatch.delenv(name)
    (tmp_path / ".env").write_text(f"HF_TOKEN={secret}\nUV_INDEX=seen\n")
    flags = [*SMALL, "--max_new_tokens", "4", "--limit", "2", "--model_id", tiny.model]
    code, out, err = call("eval", *flags, "--eval_path", tiny.data / "test.jsonl")
    assert code == 0 and os.environ["HF_TOKEN"] == secret
    (run,) = (tmp_path / "artifacts/runs").iterdir()
    kept = [path.read_bytes() for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]
    assert len(kept) > 6 and secret.encode() not in b"".join([*kept, out.encode(), err.encode()])
    assert json.loads((run / "sys/env.json").read_text())["UV_INDEX"] == "seen"


def test_the_example_env_file_sets_nothing_and_names_what_is_read(monkeypatch):
    text = (REPOSITORY / ".env.example").read_text()
    names = re.findall(r"^(\w+)=(.*)$", text, flags=re.M)
    assert len(names) > 8 and not any(value for _, value in names)
    source = "".join(path.read_text() for path in (REPOSITORY / "grpo_gsm8k").rglob("*.py"))
    source += (REPOSITORY / "entrypoint.sh").read_text()
    assert [name for name, _ in names if name not in source] == []
