"""A server in this process, for the wires of text: its core, and a client that bears its key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.serve_tools import KEY, in_process


@dataclass(frozen=True)
class Served:
    """`client` is Starlette's test client; `service` the core behind it."""

    client: Any
    service: Any


@contextmanager
def serving(model: Path, folder: Path, **flags: Any) -> Iterator[Served]:
    """Serve a model as `tiny`; a folder that has served before goes on."""
    with in_process(model, folder, served_name="tiny", **flags) as made:
        made.http.headers["X-API-Key"] = KEY
        yield Served(made.http, made.service)  # type: ignore[attr-defined]
