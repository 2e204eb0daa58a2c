"""Two meters of a CPU's memory, which know nothing of each other: the allocator's events, and the tensors there are."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ProfiledMemory:
    """Every allocation in a `with` block that torch's profiler saw: `top`, the most at once, in bytes."""

    def __enter__(self) -> ProfiledMemory:
        self._profile: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._profile.__exit__(None, None, None)
        tree, live, self.top = self._profile.profiler.kineto_results.experimental_event_tree(), 0, 0
        for event in sorted(_events(tree), key=lambda event: event.start_time_ns):
            if event.tag == _EventType.Allocation:
                live += event.extra_fields.alloc_size
                self.top = max(self.top, live)


class LiveMemory(TorchDispatchMode):
    """Implements `trainer.memory.Meter` with the storages of all tensors that operations gave, while they live.

    What an operation takes for itself alone is not seen. It can be read at any time, in a backward pass, too.
    """

    def __init__(self, limit: int) -> None:
        """`limit` bytes are there in all."""
        super().__init__()
        self.limit, self.live, self.top = limit, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                self._meet(tensor.untyped_storage())
        return out

    def _meet(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone() -> None:
            self._known.discard(key)
            self.live -= size

        self._known.add(key)
        self.live += size
        self.top = max(self.top, self.live)
        weakref.finalize(storage, gone)

    def reset(self) -> None:
        """See `Meter`."""
        self.top = self.live

    def held(self) -> int:
        """See `Meter`."""
        return self.live

    def peak(self) -> int:
        """See `Meter`."""
        return self.top

    def free(self) -> int:
        """See `Meter`."""
        return self.limit - self.live


def _events(tree: Any) -> Iterator[Any]:
    for event in tree:
        yield event
        yield from _events(event.children)
