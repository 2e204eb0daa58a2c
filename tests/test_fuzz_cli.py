"""Odd words after every command and flag end with exit 0, 1 or 2 and never with a traceback.

The flags are read from the application, so that a new one is tried from its first day.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import sys
import traceback

import pytest

from grpo_gsm8k import bench, cli, r1_traces

SECONDS = 90  # a case that takes longer is a fault, too

NUMBERS = ["-1", "0", "1", "2", "3", "1e30", "-1e30", str(10**400), "nan", "inf", "-inf", "0.5", "1e-400", "0x10", ""]
TEXTS = [
    "",
    " ",
    "x",
    "é→",
    "\udcff",
    "a\nb",
    "[bold]",
    "{}",
    "%s",
    "..",
    ".",
    "-",
    "a" * 300,
    "cuda:99",
    "mps",
    "a,b,,",
]
PATHS = [
    "",
    ".",
    "..",
    "nowhere",
    "nowhere/deep",
    "file",
    "file/below",
    "empty",
    "binary",
    "bom.jsonl",
    "folder",
    "loop",
]
PATHS += ["/proc/x", "/dev/full", "x" * 300, "\udcff", "rows.jsonl", "recipe.toml", "locked/out"]
ODD = [*NUMBERS, *TEXTS, *PATHS]
LONG = {"repeats", "alone", "gradients"}  # of benchmarks: what the rounds use themselves


def commands():
    """(words of the command, its flags with how many values they take, its arguments) of the whole application."""

    def walk(command, words):
        for name, sub in getattr(command, "commands", {}).items():
            yield from walk(sub, [*words, name])
        if not hasattr(command, "commands"):
            flags = {p.opts[0]: not p.is_flag for p in command.params if p.param_type_name == "option"}
            flags.pop("--help", None)
            yield words, flags, sum(p.param_type_name == "argument" for p in command.params)

    for words, flags, arguments in walk(cli.app.tree, []):
        if words == ["bench"]:
            subs = next(a for a in bench.parser()._actions if a.dest == "command").choices
            for name, sub in subs.items():
                own = {a.option_strings[0]: a.nargs != 0 for a in sub._actions if a.dest not in {*LONG, "help"}}
                yield ["bench", name], own, 0
        elif words == ["traces"]:
            yield words, {f"--{f.name}": f.default is not False for f in dataclasses.fields(r1_traces.Settings)}, 0
        else:
            yield words, flags, arguments


def base_of(words, model, data):
    """Flags that make a command do its work, on little."""
    common = ["--model_id", model, "--device", "cpu", "--prompt_style", "gsm8k", "--max_new_tokens", "4"]
    train = [*common, "--data", data, "--out_dir", "run", "--max_steps", "1", "--eval_examples", "2"]
    small = {"rollouts_per_step": 4, "group_size": 2}
    return {
        "sft": [*train, "--batch_size", "2"],
        "ei": [*train, "--prompts_per_round", "2", "--samples_per_prompt", "2", "--batch_size", "2"],
        "grpo": [*train, *(word for key, value in small.items() for word in (f"--{key}", str(value)))],
        "distill": [*train, "--teacher", model, *(w for key, value in small.items() for w in (f"--{key}", str(value)))],
        "eval": [*common, "--eval_path", f"{data}/test.jsonl", "--limit", "2", "--out_dir", "out"],
        "prep-eval": ["--model_id", model, "--data", data, "--out", "prepared.jsonl"],
        "tokenize": ["--model_id", model, "--data_path", "pairs.jsonl", "--out_dir", "shards"],
        "pairs": ["--model_id", model, "--traces", "pairs.jsonl", "--out", "out.jsonl"],
        "data": ["--source", data, "--out_dir", "splits", "--eval_n", "2"],
        "validate": ["--data", "rows.jsonl"],
        "merge": ["--model_id", model, "--out_dir", "merged"],
        "push": ["--repo_id", "me/x"],
        "pipeline": ["--stop_after", "base", "--model_id", model, "--data", "nowhere"],
        "demo": ["--stop_after", "nothing"],
        "traces": ["--infile", f"{data}/test.jsonl", "--outfile", "traces.jsonl"],
    }.get(words[-1], [])


def cases(seed, number, model, data):
    """Command lines: a command that works on little, and one or two of its flags (or arguments) odd."""
    draw, known = random.Random(seed), list(commands())
    for _ in range(number):
        words, flags, arguments = draw.choice(known)
        argv = [*words, *base_of(words, model, data)]
        if words[0] == "bench":
            argv += ["--hidden", "0"]  # nothing is measured
        for flag in draw.sample(sorted(flags), min(len(flags), draw.choice([1, 1, 2]))):
            argv += [flag, draw.choice(ODD)] if flags[flag] else [flag]
        for _ in range(draw.choice([arguments, 1]) if arguments else draw.random() < 0.03):
            argv.append(draw.choice(ODD))
        yield argv


class TookTooLong(BaseException):
    """Not an Exception, so that nothing on the way takes it for an error of its own."""


@pytest.fixture
def outcome(monkeypatch, tmp_path, capsys):
    """Run a command line in a fresh folder of odd files; "" or what is wrong with how it ended."""
    for name in ("RUNPOD_API_KEY", "DEEPSEEK_API_KEY", "HF_TOKEN", "GRPO_GSM8K_WEBHOOK"):
        monkeypatch.delenv(name, raising=False)

    def late(number, frame):
        raise TookTooLong

    monkeypatch.setattr(sys, "argv", ["grpo-gsm8k"])
    number = iter(range(10**6))

    def run(argv):
        folder = tmp_path / f"case{next(number)}"
        odd_files(folder)
        monkeypatch.chdir(folder)
        before, code = signal.signal(signal.SIGALRM, late), 0
        signal.alarm(SECONDS)
        try:
            cli.main(argv)
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:  # noqa: BLE001  (whatever it is, it would have been a traceback)
            return f"{argv}: {traceback.format_exc(limit=-6)}"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            monkeypatch.chdir(tmp_path)
            shutil.rmtree(folder, ignore_errors=True)
        err = capsys.readouterr().err
        if code not in (0, 1, 2) or "Traceback" in err:
            return f"{argv}: exit {code}: {err}"
        if code == 2 and not err.strip() and argv[:1] != ["validate"]:
            return f"{argv}: exit 2 without a word"
        return ""

    return run


def odd_files(folder):
    (folder / "folder").mkdir(parents=True)
    (folder / "locked").mkdir(mode=0o500)
    for name, content in {
        "file": b"hello\n",
        "empty": b"",
        "binary": bytes(range(256)),
        "bom.jsonl": b'\xef\xbb\xbf{"question": "1+1?", "answer": "#### 2"}\n',
        "rows.jsonl": b'{"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]}\n',
        "pairs.jsonl": b'{"prompt": "1?", "response": "it is 2"}\n{"prompt": "2?", "response": "it is 3"}\n',
        "recipe.toml": b"\xef\xbb\xbf[grpo]\nlr = inf\n",
    }.items():
        (folder / name).write_bytes(content)
    (folder / "loop").symlink_to("loop")


def test_forty_odd_command_lines(outcome, tiny):
    wrong = [why for argv in cases(1, 40, "nowhere/model", str(tiny.data)) if (why := outcome(argv))]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_odd_command_lines(seed, outcome, tiny):
    wrong = [why for argv in cases(100 + seed, 100, str(tiny.model), str(tiny.data)) if (why := outcome(argv))]
    assert not wrong, f"{len(wrong)} of 100:\n" + "\n\n".join(wrong)


def test_every_command_is_tried():
    tried = {json.dumps(words) for words, _, _ in commands()}
    assert {json.dumps([name]) for name in ("demo", "eval", "grpo", "traces", "report", "doctor")} <= tried
    assert json.dumps(["launch", "up"]) in tried and json.dumps(["bench", "step"]) in tried
