"""Help, completion and names: panels by topic, one spelling, the nearest name for a wrong one, settings explained."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_gsm8k import bench, cli, config, flags
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.launch.settings import PlanConfig, UpConfig

PACKAGE = Path(cli.__file__).parent
CONFIGS = {**config.SECTIONS, "pipeline": config.PipelineConfig, "launch plan": PlanConfig, "launch up": UpConfig}
CONFIGS = {name: cls for name, cls in CONFIGS.items() if name not in ("tiny_model", "toy")}


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a command in this process, on a terminal of 80 columns; (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(line):
        code = 0
        try:
            cli.main(line.split() if isinstance(line, str) else line)
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def commands(group=None, words=()):
    """Every command of the application, by its words."""
    group = group or cli.app.tree
    for name, command in group.commands.items():
        yield [*words, name], command
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))


COMMANDS = {" ".join(words): command for words, command in commands()}
WORDS = list(COMMANDS)


@functools.cache
def help_page(words):
    """What `--help` prints on 80 columns."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        patch.setenv("COLUMNS", "80")
        cli.main([*words.split(), "--help"])
    return out.getvalue()


def shown(text):
    """Flag → metavar, of a help page."""
    return dict(re.findall(r"^│ (--\w+)(?:,--\w+)? +(?:-\w +)?([A-Z|a-z]+(?= {1,}\S))?", text, flags=re.M))


@pytest.mark.parametrize("name", CONFIGS)
def test_help_shows_what_most_people_set_and_help_all_everything(name, call):
    fields = dataclasses.fields(CONFIGS[name])
    code, out, err = call(f"{name} --help")
    basic = {f"--{field.name}" for field in fields if not field.metadata["expert"]}
    expert = {f"--{field.name}" for field in fields if field.metadata["expert"]}
    assert code == 0 and err == "" and basic <= shown(out).keys() and not expert & shown(out).keys()
    assert max(map(len, out.splitlines())) <= 80
    if expert:
        assert f"{len(expert)} flags for experts" in " ".join(out.replace("│", " ").split())
        assert basic | expert <= shown(call(f"{name} --help_all")[1]).keys()
        assert not expert & shown(call(f"{name} --help")[1]).keys()  # nothing stays unhidden


def test_the_help_of_grpo_is_panels_of_a_screen(call):
    _, out, _ = call("grpo --help")
    panels = re.split(r"^╭─ (.*?) ─+╮$", out, flags=re.M)
    heads = panels[1::2]
    assert heads[0] == "Options" and heads[1] == flags.panel(config.GrpoConfig)
    assert {flags.panel(cls) for cls in (config.RunConfig, config.OptimizerConfig, config.PromptConfig)} <= set(heads)
    assert max(text.count("\n") for text in panels[2::2]) <= 45 and out.count("\n") <= 170
    kinds = shown(out)
    assert (kinds["--steps"], kinds["--lr"], kinds["--data"], kinds["--loss"]) == ("INTEGER", "FLOAT", "PATH", "TEXT")
    assert kinds["--mode"] == "CHOICE" and "one_step_off)" in out and "[default: 0.2]" in out
    assert "[default: (" not in out and "<" not in re.sub(r"<(UTC|git)|stamp>|sha>", "", out)
    assert "[env: WANDB_PROJECT]" in " ".join(out.replace("│", " ").split()) and "HF_TOKEN (" in out
    assert "--no_resume" not in out  # but it is a flag
    assert call("config show grpo --resume --no-resume --json")[0] == 0
    _, out, _ = call("grpo --help_all")
    assert "trainer / sampler" in " ".join(out.replace("│", " ").split())  # rich swallows nothing in brackets
    assert "[1 - clip_eps, 1 + clip_eps_high]" in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize("words", ["grpo", "launch up", "compare", "env"])
def test_at_40_columns_no_name_is_cut(words, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = call(f"{words} --help")
    names = {flag for p in COMMANDS[words].params if not getattr(p, "hidden", False) for flag in p.opts if "--" in flag}
    assert max(map(len, out.splitlines())) <= 40 and names <= set(re.findall(r"--\w+", out))
    if words == "grpo":
        assert "\n  --max_tokens_per_microbatch INTEGER\n    tokens of one forward pass" in out
        assert "[default: 0.2]" in out and "\\" not in out
    if words == "compare":
        assert "\n  RESULTS\n    results files" in out


@pytest.mark.parametrize("words", WORDS)
def test_every_command_has_help_in_one_spelling(words):
    out = help_page(words)
    assert len(out) > 100 and "<bool>" not in out and "<int>" not in out and "<path>" not in out
    dashed = set(re.findall(r"(?<![\w-])--[a-z]+-[\w-]+", out))
    assert not dashed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gropo", "no such command: gropo (did you mean grpo?); see `grpo-gsm8k --help`"),
        ("launch statsu", "no such command: statsu (did you mean status?); see `grpo-gsm8k launch --help`"),
        ("config shw", "no such command: shw (did you mean show?); see `grpo-gsm8k config --help`"),
        ("--verison", "no such flag: --verison (did you mean --version?); see `grpo-gsm8k --help`"),
        ("grpo --groupsize 3", "no such flag: --groupsize (did you mean --group_size?); see `grpo-gsm8k grpo --help`"),
        ("grpo --zzz 3", "no such flag: --zzz; see `grpo-gsm8k grpo --help`"),
        ("launch up --buget 3", "no such flag: --buget (did you mean --budget?); see `grpo-gsm8k launch up --help`"),
        ("data --out-dri x", "no such flag: --out_dri (did you mean --out_dir?); see `grpo-gsm8k data --help`"),
        ("config show grppo", "config show grppo: no stage (did you mean grpo?)"),
        (
            "config show sft --lrr 1",
            "no such flag: --lrr (did you mean --lr?); see `grpo-gsm8k config show sft --help`",
        ),
        ("bench step --kv-hed 3", "no such flag: --kv_hed (did you mean --kv_heads?); see `grpo-gsm8k bench --help`"),
        ("traces --infiles f", "no such flag: --infiles (did you mean --infile?)"),
        ("sft --preset fulll", "unknown preset 'fulll'; did you mean 'full'?"),
        ("sft --set bach_size=1", "--set bach_size=1: unknown key 'bach_size'; did you mean 'batch_size'?"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(line, message, call):
    assert call(line) == (2, "", f"error: {message}\n")


def test_bench_still_refuses_what_it_does_not_have(call):
    assert "choose from" in call("bench stepp")[2]
    with pytest.raises(ConfigError):
        bench.main(["step", "--kv-heads", "0"])


def test_version(call):
    version = re.search(r'^version = "(.*)"', (PACKAGE.parent / "pyproject.toml").read_text(), flags=re.M)[1]
    assert call("--version") == (0, f"grpo-gsm8k {version}\n", "")


# ------------------------------------------------------------------------------------------------ completion


def in_a_shell(*argv, **env):
    """The console script as a shell starts it, with these variables."""
    command = [sys.executable, "-m", "grpo_gsm8k.cli", *argv]
    env = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", **env}
    return subprocess.run(command, cwd=PACKAGE.parent, env=env, capture_output=True, text=True, check=True).stdout


def completed(line):
    """What bash is offered behind the last word of a line."""
    words = line.split(" ")
    how = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_GRPO_GSM8K_COMPLETE": "complete_bash"}
    return set(in_a_shell(**how).split())


def test_the_shell_completes_commands_flags_and_choices(tmp_path):
    assert completed("grpo-gsm8k gr") == {"grpo"}
    assert {"--lr", "--lr_schedule"} <= completed("grpo-gsm8k sft --lr")
    assert completed("grpo-gsm8k sft --lr_schedule co") == {"constant", "cosine"}
    assert "<bool>" not in in_a_shell("--help")
    assert "complete_bash" in in_a_shell("--show_completion", "bash")
    assert "bash completion installed" in in_a_shell("--install-completion", "bash", HOME=str(tmp_path))
    assert "grpo-gsm8k" in "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------- the environment

QUIET = {"CC", "CXX", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "XDG_CACHE_HOME", "HF_HUB_CACHE", "NETRC"}
QUIET |= {"USER", "LOGNAME", "OMP_WAIT_POLICY", "DISABLE_SAFETENSORS_CONVERSION", "VLLM_ALLOW_INSECURE_SERIALIZATION"}
QUIET |= {"VLLM_BATCH_INVARIANT", "TINKER_TELEMETRY"}  # others' own, and what we set ourselves for them


def read_of_the_environment(path):
    """Names of variables that a module reads, where they stand as text."""
    for node in ast.walk(ast.parse(path.read_text())):
        text = ast.unparse(node)
        if isinstance(node, ast.Call) and text.startswith(("os.environ.get(", "os.environ.setdefault(", "os.getenv(")):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))
        if isinstance(node, ast.Subscript) and text.startswith("os.environ[") and isinstance(node.slice, ast.Constant):
            yield node.slice.value


def test_every_variable_that_is_read_is_named_in_help():
    pages = " ".join(help_page(words) for words in WORDS)
    read = {name for path in PACKAGE.rglob("*.py") for name in read_of_the_environment(path)}
    assert len(read) > 10
    ours = {f"GRPO_GSM8K_{end}" for end in ("DEADLINE", "GRACE_S", "STALE_S", "WATCH_S", "COMMIT", "BENCH_BEGAN")}
    assert {name for name in read - QUIET - ours if name not in pages} == set()


# ------------------------------------------------------------------------------------------------ config, env


def test_config_show_says_value_and_layer_and_is_a_recipe(call, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    line = "config show grpo --preset quick --algorithm dapo --lr 3e-6 --set seed=4"
    code, out, err = call(line)
    assert (code, err) == (0, "")
    rows = dict(row.split(" = ", 1) for row in out.splitlines()[1:])
    assert rows["lr"] == "3e-06  # flag: --lr" and rows["seed"] == "4  # flag: --set seed=…"
    assert rows["steps"] == "100  # preset: presets/quick.toml [grpo]" and rows["beta1"] == "0.9  # default"
    assert rows["wandb_project"] == '"mine"  # env: WANDB_PROJECT'
    assert rows["clip_eps_high"] == "0.28  # flag: algorithm dapo, --algorithm"
    (tmp_path / "again.toml").write_text(out)
    flags = {"algorithm": "dapo", "lr": 3e-6}
    expected = config.resolve("grpo", preset="quick", flags=flags, sets=["seed=4"])
    assert config.resolve("grpo", config_file=tmp_path / "again.toml") == expected
    told = json.loads(call(f"{line} --json")[1])
    assert told["stage"] == "grpo" and told["settings"]["grpo"]["lr"] == {
        "value": 3e-6,
        "layer": "flag",
        "where": "--lr",
    }
    assert {name: entry["value"] for name, entry in told["settings"]["grpo"].items()} == vars(expected)


def test_config_show_of_a_pipeline_is_that_of_its_stages(call):
    told = json.loads(call("config show pipeline --preset tiny --seed 3 --set grpo.steps=7 --json")[1])["settings"]
    assert list(told) == ["sft", "ei", "grpo", "eval"]
    assert all(stage["seed"] == {"value": 3, "layer": "flag", "where": "--seed"} for stage in told.values())
    assert told["grpo"]["steps"]["value"] == 7 and told["ei"]["lr"]["where"] == "presets/tiny.toml [ei]"
    assert told["sft"]["deterministic"] == {"value": False, "layer": "default", "where": "of the pipeline"}
    assert call("config show demo --set steps=7")[0] == 2
    assert call("config show pipeline --preset tinny")[2].endswith("did you mean 'tiny'?\n")


def test_env_names_versions_and_no_one(call, monkeypatch):
    secret = {"HF_TOKEN": "hf_0123456789abcdefghij", "WANDB_API_KEY": "0123456789abcdef", "USER": "alice"}
    told = {"HF_HOME": "/home/alice/hub", "HF_ENDPOINT": "https://hub.corp.example", "NCCL_SOCKET_IFNAME": "10.1.2.3"}
    told |= {"OMP_NUM_THREADS": "2", "SLURM_JOB_NODELIST": "node17", "PYTHONPATH": "alice"}
    for name, value in (secret | told).items():
        monkeypatch.setenv(name, value)
    code, out, _ = call("env --json")
    found = json.loads(out)
    assert code == 0 and found.keys() >= {"grpo-gsm8k", "commit", "python", "platform", "gpus", "packages"}
    assert found["packages"].keys() >= {"torch", "transformers", "huggingface-hub", "typer"}
    assert found["environment"]["OMP_NUM_THREADS"] == "2" and found["environment"]["HF_HOME"] == "(set)"
    hidden = [*secret.values(), *told.values(), "corp", str(Path.home()), str(PACKAGE), "node17"]
    assert not [word for word in hidden if word != "2" and word in out]
    lines = call("env")[1].splitlines()
    assert lines[0].startswith("grpo-gsm8k: ") and any(line.startswith("packages: torch=") for line in lines)
