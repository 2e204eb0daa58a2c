"""Seeds against values computed with `printf ... | sha256sum`, and snapshots in which no secret is found."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo_gsm8k import repro

# ---- seeds

# printf '%s' 'i2:42,s6:sample,i2:17,s10:train-0003,i1:3,' | sha256sum: the first 16 hex digits, halved.
GOLDEN: list[tuple[tuple[int | str, ...], int]] = [
    ((), 8203414616412130826),
    (("a",), 7039649837613907456),
    ((0,), 3871264661725187893),
    ((1,), 7367417215368090224),
    (("1",), 762777911293071854),
    ((-5,), 625320819206943214),
    (("ab", "c"), 7401567709360478214),
    (("a", "bc"), 8607619689119782564),
    (("é!",), 2897909185801838705),
    ((42, "sample", 17, "train-0003", 3), 1161833523836992270),
]


@pytest.mark.parametrize(("parts", "seed"), GOLDEN)
def test_seeds_are_golden(parts: tuple[int | str, ...], seed: int) -> None:
    assert repro.derive_seed(*parts) == seed


def test_encoding_has_one_reading() -> None:
    # Each pair would collide under a naive join, str() or concatenation.
    pairs: list[tuple[tuple[int | str, ...], tuple[int | str, ...]]] = [
        (("ab", "c"), ("a", "bc")),
        (("a", "b"), ("b", "a")),
        ((1,), ("1",)),
        ((12, 3), (1, 23)),
        (("a", ""), ("a",)),
        ((), ("",)),
        (("a,s1:b",), ("a", "b")),
    ]
    for left, right in pairs:
        assert repro.derive_seed(*left) != repro.derive_seed(*right), (left, right)


def test_seeds_fill_63_bits_without_collision() -> None:
    seeds = [
        repro.derive_seed(7, "sample", step, f"p{p}", i) for step in range(10) for p in range(50) for i in range(8)
    ]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0
    assert max(seeds).bit_length() == 63
    torch.Generator().manual_seed(max(seeds))  # torch takes them as they are


def test_seed_does_not_depend_on_the_hash_seed() -> None:
    code = "from grpo_gsm8k.repro import derive_seed; print(derive_seed('a'))"
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "7039649837613907456\n"


@pytest.mark.parametrize("part", [True, 1.0, None, b"a", np.int64(1)])
def test_other_types_are_refused(part: object) -> None:
    with pytest.raises(TypeError, match=type(part).__name__):
        repro.derive_seed(part)  # type: ignore[arg-type]


def test_seed_everything_repeats_every_generator() -> None:
    def draw(seed: int) -> tuple[float, float, float]:
        repro.seed_everything(seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    large = repro.derive_seed("large")
    assert draw(large) == draw(large)
    assert all(a != b for a, b in zip(draw(1), draw(2), strict=True))


# ---- determinism


@pytest.fixture
def torch_flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone afterwards
    yield
    repro.set_deterministic(False)


@pytest.mark.usefixtures("torch_flags")
def test_deterministic_on_and_off() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no deprecated interface
        torch.set_float32_matmul_precision("high")  # an earlier choice must not survive
        repro.set_deterministic(True)
        backends: Any = torch.backends  # its stubs lag behind
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert (backends.cudnn.deterministic, backends.cudnn.benchmark) == (True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
        for precision in (
            backends.cuda.matmul.fp32_precision,
            backends.cudnn.conv.fp32_precision,
            backends.cudnn.rnn.fp32_precision,
        ):
            assert precision == "ieee"
        # The older readers agree instead of raising over mixed interfaces.
        assert backends.cuda.matmul.allow_tf32 is False
        assert backends.cudnn.allow_tf32 is False
        assert torch.get_float32_matmul_precision() == "highest"

        repro.set_deterministic(False)
        assert not torch.are_deterministic_algorithms_enabled()
        assert backends.cudnn.deterministic is False
        assert backends.cudnn.allow_tf32 is True


@pytest.mark.usefixtures("torch_flags")
def test_a_deterministic_workspace_chosen_outside_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    repro.set_deterministic(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


# ---- secrets

SECRET = "hunter2-hunter2-hunter2"


def test_no_written_file_has_a_secret(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _commit(checkout)
    (checkout / "grpo_gsm8k" / "oops.py").write_text(f"key = '{SECRET}'\n")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("VLLM_API_KEY", SECRET)  # an allowed prefix, a secret name
    monkeypatch.setenv("UV_INDEX_PRIVATE_PASSWORD", SECRET)
    monkeypatch.setenv("UV_INDEX_URL", f"https://user:{SECRET}@index.example/simple")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://tok-only@index.example/simple")
    monkeypatch.setenv("HF_ENDPOINT", f"https://hub.example/?x={SECRET}")  # the value of another secret
    monkeypatch.setenv("MY_SETTING", "neither listed nor secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    argv = [
        *("grpo-gsm8k", "grpo", "--max_new_tokens", "384", "--out_dir", "a folder"),
        *("--api_key", SECRET, f"--token={SECRET}", "--webhook", f"https://hooks.example/{SECRET}"),
        *(
            "--base_url",
            f"https://user:{SECRET}@api.example/v1",
            f"--set=launch.hf_token={SECRET}",
            f"plain-{SECRET}",
        ),
    ]
    run = tmp_path / "run"
    repro.snapshot(run, argv)
    files = {str(f.relative_to(run)): f.read_text() for f in run.rglob("*") if f.is_file()}
    assert set(files) == {*("command.txt", "code.diff", "sys/packages.txt", "sys/machine.json", "sys/env.json")}
    for name, text in files.items():
        assert SECRET not in text, name
        assert "tok-only" not in text, name
        assert "neither listed" not in text, name
    assert "+key = '[redacted]'" in files["code.diff"]
    env = json.loads(files["sys/env.json"])
    assert env["CUDA_VISIBLE_DEVICES"] == "1"
    assert env["HF_HUB_OFFLINE"] == "1"
    assert not {"UV_INDEX_URL", "HF_TOKEN", "WANDB_API_KEY", "MY_SETTING"} & set(env)
    assert files["command.txt"].startswith("grpo-gsm8k grpo --max_new_tokens 384 --out_dir 'a folder' --api_key ")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--api_key", "x1"], ["--api_key", "[redacted]"]),
        (["--api-key=x1"], ["--api-key=[redacted]"]),
        (["--apiKey", "x1"], ["--apiKey", "[redacted]"]),
        (["--webhook", "-x1", "after"], ["--webhook", "[redacted]", "after"]),
        (["--auth", "--json"], ["--auth", "--json"]),  # a flag without a value hides nothing
        (["DEEPSEEK_API_KEY=x1", "run"], ["DEEPSEEK_API_KEY=[redacted]", "run"]),
        (["--set", "traces.password=x1"], ["--set", "traces.password=[redacted]"]),
        (["-H", "Authorization: Bearer abc"], ["-H", "[redacted]"]),
        (["--url=https://u:p@h/x"], ["--url=[redacted]"]),
        (["--url", "https://h/x?sig=abc&n=1"], ["--url", "[redacted]"]),
        (["--max_new_tokens", "384", "--max-tokens=2048"], ["--max_new_tokens", "384", "--max-tokens=2048"]),
        (["--model_id", "Qwen/Qwen2.5-Math-1.5B"], ["--model_id", "Qwen/Qwen2.5-Math-1.5B"]),
        (["--tokenizer", "t", "--author", "a"], ["--tokenizer", "t", "--author", "a"]),
        (["--lr=1e-6", "--set", "grpo.kl=0.0"], ["--lr=1e-6", "--set", "grpo.kl=0.0"]),
    ],
)
def test_redacted_command(argv: list[str], expected: list[str]) -> None:
    assert repro.redact_command(argv) == expected


def test_a_second_snapshot_replaces_the_first(tmp_path: Path) -> None:
    for name in ("first", "second"):
        repro.snapshot(tmp_path, [name])
    assert {f.name for f in tmp_path.iterdir()} == {"command.txt", "code.diff", "sys"}
    assert (tmp_path / "command.txt").read_text() == "second\n"


def test_machine_and_packages(tmp_path: Path) -> None:
    repro.snapshot(tmp_path, ["x"])
    machine = json.loads((tmp_path / "sys" / "machine.json").read_text())
    assert machine["torch"] == torch.__version__
    assert machine["python"] == ".".join(str(n) for n in sys.version_info[:3])
    assert 1 <= machine["cpu_usable"] <= machine["cpu_count"]
    lines = (tmp_path / "sys" / "packages.txt").read_text().splitlines()
    assert lines == sorted(lines, key=str.lower)
    assert f"torch=={torch.__version__.split('+')[0]}" in {line.split("+")[0] for line in lines}


# ---- the code


def _git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "checkout"
    (folder / "grpo_gsm8k").mkdir(parents=True)
    (folder / "grpo_gsm8k" / "__init__.py").write_text("x = 1\n")
    _git(folder, "init", "-q")
    monkeypatch.setattr(repro, "_CHECKOUT", folder)
    monkeypatch.delenv("GRPO_GSM8K_COMMIT", raising=False)
    return folder


def _commit(checkout: Path) -> str:
    _git(checkout, "add", "-A")
    _git(checkout, "commit", "-q", "-m", "one")
    return _git(checkout, "rev-parse", "HEAD")


def test_commit_and_diff_restore_the_code(checkout: Path, tmp_path: Path) -> None:
    head = _commit(checkout)
    assert repro.git_commit() == head[:8]
    (checkout / "grpo_gsm8k" / "__init__.py").write_text("x = 2\n")
    (checkout / "grpo_gsm8k" / "new.py").write_text("y = 3\n")  # not yet known to git, but it runs
    (checkout / "notes.txt").write_text("not code\n")
    assert repro.git_commit() == head[:8] + "-dirty"
    repro.snapshot(tmp_path / "run", ["x"])
    diff = tmp_path / "run" / "code.diff"
    assert diff.read_text().startswith(f"# commit {head}\n")
    assert "not code" not in diff.read_text()

    _git(checkout, "checkout", "-q", "--", ".")
    (checkout / "grpo_gsm8k" / "new.py").unlink()
    _git(checkout, "apply", str(diff))
    assert (checkout / "grpo_gsm8k" / "__init__.py").read_text() == "x = 2\n"
    assert (checkout / "grpo_gsm8k" / "new.py").read_text() == "y = 3\n"


def test_a_huge_diff_is_cut(checkout: Path, tmp_path: Path) -> None:
    _commit(checkout)
    (checkout / "grpo_gsm8k" / "data.py").write_text("x = 1\n" * 500_000)
    repro.snapshot(tmp_path / "run", ["x"])
    diff = tmp_path / "run" / "code.diff"
    assert diff.stat().st_size < 1.1e6
    assert "\n# cut: the first 1048576 of " in diff.read_text()


def test_no_commit_no_git_foreign_git(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repro.git_commit() == "nogit"  # a repository without a commit
    _git(checkout, "commit", "-q", "--allow-empty", "-m", "foreign")
    assert repro.git_commit() == "nogit"  # like a venv inside somebody else's checkout
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert repro.git_commit() == "nogit"
    monkeypatch.setenv("GRPO_GSM8K_COMMIT", "0123abcd")  # an image that was told its commit
    assert repro.git_commit() == "0123abcd"
    repro.snapshot(tmp_path / "run", ["x"])
    assert (tmp_path / "run" / "code.diff").read_text() == ("# no git commit to compare with (commit 0123abcd)\n")


# ---- GPUs


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 9", []),
        ("echo 'NVIDIA-SMI has failed'", []),
        ("echo 'NVIDIA H200, 143771, 580.65.06, 9.0'", [("NVIDIA H200", 143771, "580.65.06", "9.0")]),
        ("echo 'Orin, [N/A], 540.4.0, 8.7'", [("Orin", None, "540.4.0", "8.7")]),
    ],
)
def test_nvidia_smi(
    script: str, expected: list[tuple[object, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [tuple(gpu.values()) for gpu in repro.nvidia_gpus()] == expected
