"""A server in this process: its service, and a client that bears its key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "tml-key-of-the-tests"


@dataclass(frozen=True)
class Served:
    """`client` is Starlette's test client; `service` the core behind it."""

    client: Any
    service: Any
    folder: Path


@contextmanager
def serving(model: Path, folder: Path, **flags: Any) -> Iterator[Served]:
    """Serve a model as `tiny`; a folder that has served before goes on."""
    from starlette.testclient import TestClient

    from grpo_gsm8k.serve import auth, server
    from grpo_gsm8k.serve.app import make_app
    from grpo_gsm8k.serve.settings import ServeConfig

    folder.mkdir(exist_ok=True)
    cfg = ServeConfig(model_id=str(model), served_name="tiny", out_dir=str(folder), **flags)
    keeper, _ = auth.open_keys(folder, KEY, cfg.rate)
    with server.opened(cfg, folder) as service:
        app = make_app(service, keeper)
        with TestClient(app, headers={"X-API-Key": KEY}) as client:
            yield Served(client, service, folder)
