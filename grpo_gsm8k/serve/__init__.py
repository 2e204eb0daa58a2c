"""The training service: this project's learner and sampler behind HTTP.

    store.py      SQLite journal: a request is accepted when it is on disk
    core.py       Service: numbers, orders and answers requests; books.py has its records
    engine.py     whose turn it is; work.py does the work: learn.py trains, sampling.py samples
    app.py        the web application: keys, limits, and the routers of the wires
    tinker.py     the Tinker wire, with tinker_runs.py; proto.py and data.py read it, codec.py writes it
    server.py     the process, from its start to SIGTERM

Nothing here imports the `tinker` package, and nothing heavy is imported before a server starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_gsm8k.serve.settings import ServeConfig


def run(cfg: ServeConfig, status: bool = False) -> Mapping[str, Any]:
    """Serve until the process is told to end; or with `status` ask the server that runs there what it is doing."""
    from grpo_gsm8k.serve import server

    if status:
        return server.show_status(cfg)
    server.run(cfg)
    return {}
