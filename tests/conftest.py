"""What every test may rely on: no network, no W&B, one torch thread, and slow tests only when asked for."""

from __future__ import annotations

import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parent.parent

# Before anything imports torch or the hub's libraries, and inherited by the processes that tests start.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
)
os.environ.pop("WANDB_API_KEY", None)
os.environ.pop("PYTHONUNBUFFERED", None)  # few users have it, and it hides output that stays in a buffer
# Toy models gain nothing from threads, and one thread gives the same bits whatever the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests start some hundred processes that import torch and transformers: compiling those takes most of their time.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(_REPOSITORY / ".pytest_cache" / "bytecode")
# A shell starts its background jobs with Ctrl-C ignored, and so would be every process that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--runslow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --runslow"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches beyond this machine fails at once, instead of depending on the weather."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if self.family in (socket.AF_INET, socket.AF_INET6) and not (
            host in ("localhost", "::1") or str(host).startswith("127.")
        ):
            raise OSError(f"a test tried to connect to {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def gsm8k_dir() -> Path:
    """The real GSM8K (`train.jsonl`, `test.jsonl`), where a checkout has it beside it."""
    folder = _REPOSITORY.parent / "shared" / "gsm8k"
    if not (folder / "train.jsonl").is_file() or not (folder / "test.jsonl").is_file():
        pytest.skip("GSM8K is not at hand: put train.jsonl and test.jsonl into ../shared/gsm8k")
    return folder


@dataclass(frozen=True)
class Tiny:
    """A tiny model and toy data that tests share; nobody writes into them."""

    model: Path
    data: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random model of 2 layers, and 48 / 12 / 16 toy problems."""
    from tests.toys import make_data, make_model

    folder = tmp_path_factory.mktemp("tiny")
    data = make_data(folder / "data")
    return Tiny(make_model(folder / "model", data), data)
