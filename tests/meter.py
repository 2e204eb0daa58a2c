"""A meter of memory for a CPU: every allocation that torch's profiler saw, added up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


class ProfiledMemory:
    """Implements `trainer.memory.Meter` with the allocations of torch's CPU allocator, as a context; one at a time.

    What was allocated before is not counted; what is left is so of `limit` bytes.
    """

    def __init__(self, limit: int = 1 << 40) -> None:
        self.limit, self.live, self.top = limit, 0, 0

    def __enter__(self) -> ProfiledMemory:
        self._profile: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._profile.__exit__(None, None, None)
        tree = self._profile.profiler.kineto_results.experimental_event_tree()
        for event in sorted(_events(tree), key=lambda event: event.start_time_ns):
            if event.tag == _EventType.Allocation:
                self.live += event.extra_fields.alloc_size
                self.top = max(self.top, self.live)

    def reset(self) -> None:
        """See `Meter`."""
        self.top = self.held()

    def held(self) -> int:
        """See `Meter`."""
        self.__exit__()
        self.__enter__()
        return self.live

    def peak(self) -> int:
        """See `Meter`."""
        self.held()
        return self.top

    def free(self) -> int:
        """See `Meter`."""
        return self.limit - self.held()


def _events(tree: Any) -> Iterator[Any]:
    for event in tree:
        yield event
        yield from _events(event.children)
