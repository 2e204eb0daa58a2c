"""An engine process with one thing broken in it, to show that its parent notices. Started by tests/test_vllm.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from grpo_gsm8k.engines import worker
from grpo_gsm8k.engines.channel import Handler, Pulse, serve


def stale_head() -> None:
    """The packed copy of a tied head keeps the weights that it was made of."""
    from grpo_gsm8k.engines.vllm import Weights

    Weights.repack_tied_head = lambda self: None  # type: ignore[method-assign]


def stale_cache() -> None:
    """What was cached under the old weights is read under the new ones."""
    from vllm import LLM

    LLM.reset_prefix_cache = lambda self: True


BREAKS: dict[str, Callable[[], None]] = {"head": stale_head, "cache": stale_cache, "nothing": lambda: None}


def build(start: Mapping[str, Any], pulse: Pulse) -> dict[str, Handler]:
    """The handlers of a sampling engine. `start`: as in `engines.worker`, and `broken`."""
    BREAKS[start["broken"]]()
    return worker.build(start, pulse)


if __name__ == "__main__":
    serve(build)
