"""The process: one server a folder, from its start to SIGTERM."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_gsm8k import __version__, config
from grpo_gsm8k.errors import CheckpointError, ConfigError, RunDirError
from grpo_gsm8k.runs.clean import printable
from grpo_gsm8k.runs.files import disk_errors, make_folder
from grpo_gsm8k.runs.progress import doing, say
from grpo_gsm8k.serve import watch
from grpo_gsm8k.serve.settings import ServeConfig

DATABASE = "journal.sqlite"
SWITCH_S = 5e-4  # the thread that answers waits no longer than this for the one that computes; Python's own is 5e-3
BACKLOG = 2048  # connections that wait to be accepted


def run(cfg: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        ConfigError: for settings that do not go together.
        RunDirError: another server has this folder.
        CheckpointError: the folder belongs to another base model or version.
    """
    given = check(cfg)
    folder = Path(cfg.out_dir).absolute()
    make_folder(folder)
    with locked(folder), contextlib.closing(listen(cfg)) as listening:
        from grpo_gsm8k.serve import auth

        keeper, minted = auth.open_keys(folder, given, cfg.rate)
        with contextlib.ExitStack() as stack:
            with doing("loading the model"):
                service = stack.enter_context(opened(cfg, folder))
                serving = _server(service, keeper)
            listening.listen(BACKLOG)  # before the address is announced: whoever reads it may connect at once
            announce(cfg, service, listening.getsockname()[1], minted)
            sys.setswitchinterval(SWITCH_S)
            serving.run(sockets=[listening])
    say("the server has ended; start it with the same --out_dir to go on")


def check(cfg: ServeConfig) -> str | None:
    """The user's own key, if one is named. Raises `ConfigError` for what is not safe, or not there."""
    if not cfg.model_id:
        raise ConfigError("serve needs --model_id, a folder or a name on the hub")
    if cfg.engine == "vllm":
        raise ConfigError(
            "--engine vllm is not served: vLLM's samples are not the same bits again after a crash; leave it at hf"
        )
    if not cfg.api_key_env:
        if not is_local(cfg.host):
            raise ConfigError(f"--host {cfg.host} is open to others: name your key with --api_key_env")
        return None
    key = os.environ.get(cfg.api_key_env)
    if not key:
        raise ConfigError(f"--api_key_env {cfg.api_key_env}: this environment variable is not set")
    return key


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other servers."""
    with disk_errors(folder), (folder / ".lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunDirError(f"{folder}: another server has this --out_dir") from None
        yield


def listen(cfg: ServeConfig) -> socket.socket:
    """The socket, before the model is loaded. Raises `ConfigError` where the address is taken."""
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    # By its protocol's name, or asyncio leaves Nagle's algorithm on: each answer's body waits 40 ms for the head's ack.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((cfg.host, cfg.port))
    except OSError as fault:
        listening.close()
        raise ConfigError(f"--host {cfg.host} --port {cfg.port}: {fault.strerror}; pick another") from None
    return listening


@contextmanager
def opened(cfg: ServeConfig, folder: Path) -> Iterator[Any]:
    """The service of a folder, at work; its journal is closed at the end.

    Raises:
        CheckpointError: the folder belongs to another base model or version.
    """
    import torch

    from grpo_gsm8k import repro
    from grpo_gsm8k.serve.adapters import BaseModel
    from grpo_gsm8k.serve.core import Service
    from grpo_gsm8k.serve.store import Store
    from grpo_gsm8k.trainer.policy import weights_sha256

    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    store = Store(folder / DATABASE)
    try:
        threads = int(store.meta("threads") or torch.get_num_threads())
        torch.set_num_threads(threads)  # another number sums in another order
        repro.set_deterministic(True)
        named = {"model_id": cfg.model_id, "device": cfg.device, "dtype": cfg.dtype}
        base = BaseModel(config.build(config.ModelConfig, named))
        apart = {**named, "device": cfg.sample_device}
        draws = BaseModel(config.build(config.ModelConfig, apart)) if cfg.sample_device else None
        mine = {
            "base": weights_sha256(base.model.named_parameters()),
            "version": __version__,
            "alpha": str(cfg.lora_alpha),
            "threads": str(threads),
        }
        _hold_to(store, mine, folder)
        service = Service(cfg, base, store, folder, draws)
        service.start()
    except BaseException:
        store.close()
        raise
    try:
        yield service
    finally:
        service.close()


def _hold_to(store: Any, mine: Mapping[str, str], folder: Path) -> None:
    """Keep what a folder was begun with, or raise `CheckpointError` where it was begun with other things."""
    names = {
        "base": "base model",
        "version": "version of this package",
        "alpha": "--lora_alpha",
    }
    for key, what in names.items():
        if store.meta(key) and store.meta(key) != mine[key]:
            raise CheckpointError(f"{folder}: belongs to another {what}; pick another --out_dir")

    def write(db: Any) -> None:
        db.executemany("INSERT OR IGNORE INTO meta VALUES(?, ?)", list(mine.items()))

    store.write(write).result()


def announce(cfg: ServeConfig, service: Any, port: int, minted: str) -> None:
    """What a client needs, on stdout: the key is shown once, and kept as its hash."""
    host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
    key = minted or (f"${cfg.api_key_env}" if cfg.api_key_env else "the key that the first start printed")
    lines = [
        f"serving {service.base.name} at http://{host}:{port} from {service.folder}",
        f"export TINKER_BASE_URL=http://{host}:{port}",
        f"export TINKER_API_KEY={key}" + ("   # shown once; kept as a hash" if minted else ""),
        f"service_client.create_lora_training_client(base_model={service.base.name!r}, rank=32)",
    ]
    for line in lines:
        print(printable(line), flush=True)


def _server(service: Any, keeper: Any) -> Any:
    import uvicorn

    from grpo_gsm8k.serve.app import make_app

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """As uvicorn's, but the signal is not raised again when all is done: the server has ended well."""
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def handle_exit(self, sig: int, frame: Any) -> None:
            """Long polls are answered, and then it ends."""
            service.drain()
            super().handle_exit(sig, frame)

    settings = uvicorn.Config(
        make_app(service, keeper),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=30,
        timeout_keep_alive=75,
        server_header=False,
        backlog=BACKLOG,
    )
    return Server(settings)


def show_status(cfg: ServeConfig) -> Mapping[str, Any]:
    """What a running server says of itself. Raises `ConfigError` where there is none, or the key is not its."""
    named = (cfg.host, cfg.port) != (ServeConfig.host, ServeConfig.port)
    url = (not named and os.environ.get("TINKER_BASE_URL")) or f"http://{cfg.host}:{cfg.port}"
    import urllib.error
    import urllib.request

    key = os.environ.get(cfg.api_key_env or "TINKER_API_KEY", "")
    address = f"{url.rstrip('/')}/api/v1/status"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers={"X-API-Key": key}), timeout=10) as answer:
            return watch.summary(json.load(answer))
    except urllib.error.HTTPError as fault:
        raise ConfigError(f"{url}: {json.loads(fault.read()).get('detail', fault.reason)}") from None
    except (OSError, ValueError) as fault:
        raise ConfigError(f"{url}: no server answers there ({fault}); give --host and --port") from None
