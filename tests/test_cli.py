"""The door: fixed names and keys, both spellings of a flag, one clear line for a mistake, nothing lost."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_gsm8k import cli, config

SMALL = ["--device", "cpu", "--prompt_style", "gsm8k", "--max_new_tokens", "8", "--eval_examples", "4"]


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Run a command in this process; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        code = 0
        try:
            cli.main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def one_line(err):
    """The clear line of a user's mistake, with nothing like a traceback around it."""
    assert "Traceback" not in err
    lines = [line for line in err.strip().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    return lines[0]


def test_help_needs_nothing_heavy():
    heavy = "('torch', 'transformers', 'datasets', 'wandb', 'matplotlib', 'scipy')"
    code = f"import sys, grpo_gsm8k.cli; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_config_field_is_a_flag_and_every_fixed_command_is_there():
    commands = {c.name or c.callback.__name__: c.callback for c in cli.app.registered_commands}
    assert commands.keys() >= {
        "demo",
        "pipeline",
        "data",
        "validate",
        "traces",
        "pairs",
        "tokenize",
        "eval",
        "compare",
        "sft",
        "ei",
        "grpo",
        "distill",
        "report",
        "doctor",
    }
    for name in ("sft", "ei", "grpo", "distill", "eval", "prep-eval", "pairs", "tokenize"):
        flags = inspect.signature(commands[name]).parameters
        assert set(config._fields(config.SECTIONS[name])) <= set(flags)


def test_sft_prints_one_object_and_both_spellings_of_a_flag_do(call, tiny, tmp_path):
    out_dir = tmp_path / "run"
    flags = [*SMALL, "--model-id", tiny.model, "--data", tiny.data, "--max_steps", "2", "--batch-size", "8"]
    code, out, _ = call("sft", *flags, "--out_dir", out_dir, "--json")
    assert code == 0
    result = json.loads(out)
    assert result.keys() >= {"run_dir", "model", "step", "weights_sha256", "seconds"}
    assert result["step"] == 2 and result["run_dir"] == str(out_dir)
    # What it printed is what lies on the disk: the model evaluates to the same hash.
    code, out, _ = call(
        "eval",
        *SMALL[:-2],
        "--model_id",
        result["model"],
        "--eval-path",
        tiny.data / "test.jsonl",
        "--limit",
        3,
        "--json",
    )
    scored = json.loads(out)
    assert code == 0 and scored["weights_sha256"] == result["weights_sha256"] and scored["n"] == 3
    assert scored.keys() >= {"accuracy", "ci95", "pass_at_k", "tokens_per_s", "seconds", "results_path"}
    rows = [json.loads(line) for line in Path(scored["results_path"]).read_text().splitlines()]
    assert len(rows) == 3 and rows[0].keys() >= {"id", "prompt", "response", "extracted", "correct"}
    # An existing run directory is refused, and nothing in it changes.
    before = sorted((p, p.stat().st_mtime_ns) for p in out_dir.rglob("*") if p.name != ".lock")
    code, out, err = call("sft", *flags, "--out_dir", out_dir)
    assert code == 2 and "exists already" in one_line(err) and "--resume" in err
    assert sorted((p, p.stat().st_mtime_ns) for p in out_dir.rglob("*") if p.name != ".lock") == before
    # Another config is refused with the difference shown; the same one gives the same result again.
    code, _, err = call("sft", *flags, "--out_dir", out_dir, "--resume", "--lr", "0.5")
    assert code == 2 and "lr: 1e-05 then, 0.5 now" in one_line(err)
    code, out, _ = call("sft", *flags, "--out_dir", out_dir, "--resume", "--json")
    assert code == 0 and json.loads(out)["weights_sha256"] == result["weights_sha256"]


@pytest.fixture
def no_model(monkeypatch):
    """Fail the test if a model is loaded: what can be refused before must be."""
    from grpo_gsm8k import workbench

    def refuse(cfg):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(workbench, "load_model", refuse)
    monkeypatch.setattr(workbench, "load_tokenizer", refuse)


def test_sft_without_a_valid_evaluation_set_never_loads_the_model(call, tiny, tmp_path, no_model):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "1+1?", "response": "2"}\n')
    code, _, err = call("sft", *SMALL, "--model_id", tiny.model, "--data_path", pairs, "--data", tmp_path)
    assert code == 2 and "val.jsonl" in one_line(err)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q", "answer": "no gold"}\n')
    code, _, err = call("sft", *SMALL, "--model_id", tiny.model, "--data_path", pairs, "--eval_set_path", bad)
    assert code == 2 and "bad.jsonl:1" in one_line(err)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"question": "q", "answer": "#### 1"}\n{"question": \n', ["train.jsonl:2", "broken JSON"]),
        ("", ["train.jsonl", "is empty"]),
        ('{"question": "q", "answer": "#### many"}\n', ["train.jsonl:1"]),
    ],
)
def test_broken_data_names_file_and_line(call, tiny, tmp_path, no_model, content, words):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text(content)
    (data / "val.jsonl").write_bytes((tiny.data / "val.jsonl").read_bytes())
    code, out, err = call("grpo", *SMALL, "--model_id", tiny.model, "--data", data, "--out_dir", tmp_path / "run")
    assert code == 2 and out == "" and all(word in one_line(err) for word in words)
    assert not (tmp_path / "run").exists()


def test_mistakes_get_one_line_and_exit_2(call, tiny, tmp_path):
    model, data = ["--model_id", tiny.model], ["--data", tiny.data]
    long = tmp_path / "long"
    long.mkdir()
    for name in ("train", "val"):
        row = {"id": "p-long", "question": "How many? " * 500, "answer": "#### 1"}
        (long / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    cases = [
        (["grpo", *SMALL, *data, "--model_id", tmp_path / "nowhere"], "nowhere"),
        (["grpo", *SMALL, *data, "--model_id", "no/such-model"], "no/such-model"),
        (["grpo", *SMALL, *model, "--data", tmp_path / "nodata"], "nodata"),
        (["grpo", *SMALL, *model, "--data", long], "p-long"),
        (["grpo", *SMALL, *model, *data, "--device", "cuda:7"], "cuda:7"),
        (["grpo", *SMALL, *model, *data, "--set", "lrr=1"], "lrr"),
        (["grpo", *SMALL, *model, *data, "--dtype", "float8"], "float8"),
        (["grpo", *SMALL, *model, *data, "--reward", "nope:f"], "nope"),
        (["grpo", *SMALL, *model, *data, "--think_open", ""], "pairs"),
        (["eval", *SMALL[:-2], *model, "--eval_path", tiny.data / "test.jsonl", "--samples", "3"], "temperature"),
        (["eval", *SMALL[:-2], *model, "--eval_path", tmp_path / "none.jsonl"], "none.jsonl"),
        (["prep-eval", *model, "--data", tmp_path / "nodata"], "nodata"),
        (["prep-eval", *model, *data, "--split", "dev"], "split"),
        (["demo", "--stop_after", "rl"], "stop_after"),
        (["pipeline", "--preset", "huge"], "huge"),
        (["compare", tiny.data / "test.jsonl", tiny.data / "test.jsonl"], "not a result"),
        (["report", tmp_path], str(tmp_path)),
    ]
    for argv, word in cases:
        code, out, err = call(*argv)
        assert (code, out) == (2, ""), (argv, out, err)
        assert word in one_line(err), (argv, err)
        assert not list(tmp_path.glob("artifacts/runs/*")), argv  # nothing to stumble over at the next try


def test_unknown_flags_and_commands_exit_2(call):
    for argv in (["grpo", "--groupsize", "3"], ["gropo"], ["grpo", "--lr", "fast"]):
        code, out, err = call(*argv)
        assert code == 2 and out == "" and "Traceback" not in err


def test_no_hub_is_said_in_one_line(call, tmp_path):
    code, _, err = call("data", "--out_dir", tmp_path / "d", "--revision", "main", "--cache_dir", tmp_path / "cache")
    assert code == 2 and "--source" in one_line(err)


def test_validate_prints_every_fault(call, tmp_path):
    path = tmp_path / "chat.jsonl"
    good = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}
    path.write_text(json.dumps(good) + "\n{\n" + json.dumps({"messages": []}) + "\n")
    code, out, _ = call("validate", "--data", path, "--json")
    found = json.loads(out)
    assert code == 2 and not found["ok"] and [e["line"] for e in found["errors"]] == [2, 3]
    path.write_text(json.dumps(good) + "\n")
    code, out, _ = call("validate", "--data", path, "--json")
    assert code == 0 and json.loads(out)["ok"] and json.loads(out)["rows"] == 1


def test_compare_by_hand(call, tmp_path):
    verdicts = {"a": "1110000000", "b": "1101111110"}
    for name, line in verdicts.items():
        rows = [json.dumps({"id": str(i), "correct": c == "1"}) for i, c in enumerate(line)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    code, out, _ = call("compare", "a.jsonl", "b.jsonl", "--json")
    result = json.loads(out)
    # 6 won, 1 lost: two-sided binomial 2 * (1 + 7) / 2^7
    assert code == 0 and (result["won"], result["lost"], result["n"]) == (6, 1, 10)
    assert result["difference"] == pytest.approx(0.5) and result["p_value"] == pytest.approx(0.125)
    assert result["ci95"][0] < 0.5 < result["ci95"][1]
    (tmp_path / "b.jsonl").write_text('{"id": "77", "correct": true}\n')
    code, _, err = call("compare", "a.jsonl", "b.jsonl")
    assert (code == 2 and "same problems" in err) or "one of the results only" in err


def test_doctor_prints_checks(call, monkeypatch):
    code, out, _ = call("doctor", "--json")
    checks = json.loads(out)["checks"]
    assert code == 0 and checks and all(check.keys() == {"name", "ok", "detail"} for check in checks)
