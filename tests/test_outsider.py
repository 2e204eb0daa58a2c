"""An outsider's test of README, CONTRIBUTING and docs/: each command of each block is run, or as much of it as can be.

shown     its settings are resolved from all layers (`config show`), as it would run with them
dry       it is run with --dry_run
run       --runslow: it is run, in a folder that has what the pages speak of; a stage takes one small step
parsed    its flags exist and its values parse, see test_docs.py; `NEEDS` says why it goes no further
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from grpo_gsm8k import cli
from tests.fake_api import answers
from tests.test_docs import PAGES, ROOT, blocks, check, commands, split_at
from tests.toys import cli as command_line
from tests.toys import make_data, make_model

STAGES = ("sft", "ei", "grpo", "distill", "eval", "prep-eval", "pairs", "tokenize")
ELSEWHERE = {  # a GPU or a network
    *("--vllm_device", "--vllm_devices", "--estimate", "--judge_base_url", "--base_url", "--dataset"),
}
NEEDS = {
    "git": "network",
    "cd": "the clone",
    "curl": "a server; test_serve_docs.py runs these lines",
    "serve": "runs until it is stopped; test_serve_crash.py starts it",
    "python examples/alphabetical.py": "a server; test_serve_rollouts.py runs it",
    "python -c": "a server; test_serve_docs.py runs it",
    "export": "a shell of one's own",
    "uv sync": "network",
    "uv venv": "network",
    "uv pip": "network",
    "uvx": "network",
    "ssh": "a container",
    "docker": "docker",
    "pytest": "is this",
    "ruff": "is CI's",
    "mypy": "is CI's",
    "pre-commit": "a checkout of one's own",
    "mkdocs": "the group docs; test_docs.py builds the site",
    "tensorboard": "the extra tensorboard, and runs until it is stopped",
    "trackio": "the extra trackio, and runs until it is stopped",
    "python deploy": "what export has written, and a server",
    "python scripts/against_lm_eval.py": "the extra lm-eval",
    "python scripts/check_image.py": "an image",
    "python grpo_gsm8k/r1_traces.py": "a teacher's key; test_traces.py runs it",
    "python -m tests.test_golden": "would write the goldens anew",
    "python -m tests.test_parity": "minutes; test_parity.py runs the same",
    "study": "minutes of training; test_study.py runs one, and reads the plan",
    "data": "network",
    "doctor --gpu": "a GPU",
    "doctor --model_id": "network",
    "launch plan": "network",
    "launch status": "a key",
    "launch logs": "a key",
    "launch reap": "a key",
    "push": "a key",
    "replay": "a run of its own; test_replay.py and test_verify.py replay some",
    "fork": "a run of its own; test_replay.py forks some",
    "verify": "a run of its own; test_verify.py verifies some",
    "python scripts/fork_variance.py": "minutes; test_replay.py runs it on a toy",
    "merge": "an adapter of a run of hours; test_adapter.py merges one",
    "grpo-gsm8k export": "a checkpoint of a run of hours; test_deploy.py exports one",
}


def bare(words):
    """The command without what starts it: uv, its options, torchrun."""
    program, *rest = words
    if program in ("uv", "scripts/uv") and rest[0] == "run":
        rest = rest[1:]
        while rest and rest[0].startswith("--"):
            rest = rest[1 if rest[0] == "--no-project" else 2 :]
        return bare(rest) if rest else words
    if program == "torchrun":
        return ["grpo-gsm8k", *rest[rest.index("-m") + 2 :]]
    return ["grpo-gsm8k", *rest] if program.endswith("bin/grpo-gsm8k") else words


def verb(words):
    """What this test does with a command, and what it is called in `NEEDS`."""
    program, *rest = bare(words)
    flags = {word.partition("=")[0].replace("-", "_").replace("__", "--", 1) for word in rest if word.startswith("--")}
    elsewhere = bool(flags & ELSEWHERE) or "torchrun" in words or bool({"vllm", "tinker"} & {*rest})
    elsewhere |= any(word.startswith(("hf:", "tinker:")) or word == "math" for word in rest)
    if program == "python":
        if rest[:2] == ["-m", "grpo_gsm8k.bench"] or rest[:2] == ["-m", "tests.fake_api"]:
            return "run", ""
        return "parsed", f"python -m {rest[1]}" if rest[
            0
        ] == "-m" else f"python {rest[0].replace('deploy/', 'deploy ')}"
    if program in ("uv", "scripts/uv"):
        return "parsed", f"uv {rest[0]}"
    if program != "grpo-gsm8k":
        return "parsed", program
    name = " ".join(rest[:2]) if rest[0] == "launch" else rest[0]
    if "--help" in rest or name.startswith("-"):
        return "run", name
    if name in STAGES:
        return ("shown" if elsewhere else "shown, run"), name
    if name in ("pipeline", "demo"):
        return ("shown, run" if name == "demo" or "tiny" in rest else "shown"), name
    if name == "launch up":
        return "dry", name
    if name == "doctor" and flags:
        return "parsed", f"doctor {min(flags & {'--gpu', '--model_id'})}"
    if name == "data" and not flags & {"--task", "--source"}:
        return "parsed", name
    name = "grpo-gsm8k export" if name == "export" else name  # the shell has one, too
    runs = (
        "data",
        "doctor",
        "validate",
        "compare",
        "contamination",
        "report",
        "launch sky",
        "env",
        "config",
        "objective",
    )
    return ("run", name) if name in runs else ("parsed", name)


FOUND = [
    (page, words)
    for page in PAGES
    for language, text, _ in blocks(page)
    if language == "bash"
    for words in commands(text)
]


def those(wanted):
    """The commands with which this is done."""
    return [(page, words) for page, words in FOUND if wanted in verb(words)[0].split(", ")]


def test_every_command_is_dealt_with_and_every_excuse_is_needed():
    done = defaultdict(list)
    for _, words in FOUND:
        what, name = verb(words)
        for each in what.split(", "):
            done[each].append(name)
    assert {name.partition(" /")[0].split(" deploy")[0] for name in done["parsed"]} - {"python"} <= NEEDS.keys()
    used = {key for key in NEEDS if any(name == key or name.startswith(f"{key} ") for name in done["parsed"])}
    assert used == NEEDS.keys()
    assert len(done["shown"]) > 40 and len(done["run"]) > 35 and len(done["dry"]) >= 2
    elsewhere = [key for key, why in NEEDS.items() if "test_" in why]
    idle = [name for name in done["parsed"] if not name.startswith(tuple(elsewhere))]
    assert len(idle) < len(FOUND) / 2
    for _, words in FOUND:
        check(words)


def typed(words, monkeypatch, folder, capsys):
    """Run a command of ours in this process; (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)
    code = 0
    try:
        cli.main(words)
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


def ids(found):
    return [f"{page.stem}: {' '.join(words)[:60]}" for page, words in found]


SHOWN = list({tuple(bare(words)): (page, words) for page, words in those("shown")}.values())


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=ids(SHOWN))
def test_settings_are_those_that_the_command_would_run_with(page, words, monkeypatch, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    code, out, err = typed(["config", "show", *bare(words)[1:]], monkeypatch, tmp_path, capsys)
    assert code == 0, err
    assert out.startswith("[") and "  # default" in out
    for word in bare(words)[1:]:
        if word.startswith("--") and word[2:].replace("-", "_") in ("lr", "steps", "loss", "advantage", "lora_rank"):
            assert f"# flag: {word}" in out


@pytest.mark.parametrize(("page", "words"), those("dry"), ids=ids(those("dry")))
def test_rented_runs_are_tried_dry(page, words, monkeypatch, tmp_path, capsys):
    for name in ("RUNPOD_API_KEY", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GRPO_GSM8K_IMAGE", "ghcr.io/owner/name@sha256:" + "0" * 64)  # as the page has it set
    before, job = split_at(bare(words)[1:], "--") if "--" in words else (bare(words)[1:], [])
    code, out, err = typed(
        [*before, "--dry_run", "--json", *(["--", *job] if job else [])], monkeypatch, tmp_path, capsys
    )
    assert code == 0, err
    assert json.loads(out)["request"]["image"] and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ really run

RECIPE = next(text for page in PAGES for language, text, _ in blocks(page) if language == "toml")
DATA = ["--data", "artifacts/data", "--eval_examples", "2"]
SMALL = {
    "sft": ["--batch_size", "2", "--max_steps", "1", "--eval_examples", "2"],
    "ei": ["--prompts_per_round", "2", "--steps_per_round", "1", "--max_steps", "1", "--eval_examples", "2"],
    "grpo": ["--rollouts_per_step", "4", "--group_size", "2", "--max_steps", "1", *DATA],
    "distill": ["--rollouts_per_step", "4", "--group_size", "2", "--max_steps", "1", "--teacher", "tiny", *DATA],
    "eval": ["--limit", "2"],
}
TINY = ["toy.train=40", "toy.val=6", "toy.test=10", "tiny_model.hidden_size=32", "tiny_model.layers=1"]
TINY += ["common.max_new_tokens=4", "common.eval_examples=2", "ei.prompts_per_round=4", "grpo.rollouts_per_step=8"]
TINY += ["grpo.group_size=4", "sft.batch_size=8", "ei.batch_size=8"]
BENCH = ["--repeats=1", "--hidden=64", "--intermediate=64", "--layers=1", "--vocabulary=512"]
BENCHES = {
    "update": [],
    "sample": ["--max_new_tokens=4", "--prompts=2", "--group=2"],
    "step": ["--max_new_tokens=4", "--completions=8,16", "--counted=16"],
}


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    """A folder with the files that the pages speak of."""
    folder = tmp_path_factory.mktemp("outsider")
    data = make_data(folder / "artifacts" / "data")
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    make_model(folder / "tiny", data)
    shutil.copytree(folder / "tiny", folder / "artifacts" / "models" / "merged")
    shutil.copytree(ROOT / "examples", folder / "examples")
    make_data(folder / "my_folder", train=300)
    for name in ("val.jsonl", "manifest.json"):
        (folder / "my_folder" / name).unlink()
    (folder / "recipe.toml").write_text(RECIPE)
    mine = [
        text for page in PAGES for language, text, _ in blocks(page) if language == "python" and "# mine.py" in text
    ]
    (folder / "mine.py").write_text("\n".join(mine))
    for name in ("a", "b"):
        shutil.copy(data / "test.jsonl", folder / f"{name}.jsonl")
    for number, name in enumerate(("base", "sft", "grpo")):
        verdicts = [{"id": str(i), "correct": i % 3 <= number} for i in range(30)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in verdicts))
    pairs = [{"prompt": row["question"], "response": row["answer"]} for row in rows]
    taught = answers(rows)
    traces = [
        {"id": row["id"], "sample": 0, "question": row["question"], "answer": row["answer"], "finish_reason": "stop"}
        | dict(zip(("reasoning_content", "content"), taught(f"{row['question']}\n\n"), strict=True))
        for row in rows
    ]
    (folder / "artifacts" / "traces").mkdir()
    for place, lines in {"pairs": pairs, "artifacts/traces/pairs": pairs, "artifacts/traces/traces": traces}.items():
        (folder / f"{place}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    flags = [
        *SMALL["grpo"],
        "--model_id",
        "tiny",
        "--data",
        "artifacts/data",
        "--device",
        "cpu",
        "--max_new_tokens",
        "4",
    ]
    for name in ("grpo", "other", "full", "wider", "demo/grpo"):
        where = folder / "artifacts" / "runs" / name
        command_line("grpo", *flags, "--prompt_style", "gsm8k", "--out_dir", str(where), cwd=folder)
    return folder


def smaller(words, folder):
    """The same command on a tiny model, and of little."""
    name = words[0]
    if name in ("pipeline", "demo"):
        return [*words, "--max_steps", "1", *(word for item in TINY for word in ("--set", item))]
    if name not in STAGES:
        return words
    more = ["--model_id", str(folder / "tiny"), "--prompt_style", "gsm8k"]
    if name in SMALL:
        more += ["--device", "cpu", "--max_new_tokens", "4", *SMALL[name]]
    return [*words, *more]


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({page for page, _ in those("run")}), ids=lambda page: page.stem)
def test_commands_run_one_after_the_other(page, furnished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "here"
    shutil.copytree(furnished, folder)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for _, words in (found for found in those("run") if found[0] == page):
        program, *rest = bare(words)
        if program == "python":
            command = [sys.executable, *rest, *([*BENCH, *BENCHES[rest[2]]] if rest[1].endswith("bench") else [])]
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
            code, err = done.returncode, done.stderr
        else:
            if "--out_dir" in rest and "--resume" not in rest:  # of another page, or of an earlier command
                shutil.rmtree(folder / rest[rest.index("--out_dir") + 1], ignore_errors=True)
            code, _, err = typed(smaller(rest, folder), monkeypatch, folder, capsys)
        assert code == 0, f"{' '.join(words)}\n{err[-2000:]}"
