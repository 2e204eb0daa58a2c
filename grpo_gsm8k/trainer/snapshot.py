"""A copy of weights and optimizer in main memory, from which a checkpoint is written while training goes on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
SHARE = 0.8  # of the free main memory that a copy may take


class Buffers:
    """Main memory that takes a copy of the same tensors again and again.

    It is allocated once: fresh pages cost as much time as the copy. Beside a GPU it is pinned, which a copy over the
    bus needs for its full speed.
    """

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def missing_bytes(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Bytes that a copy of these tensors would still allocate."""
        new = {_place(t): t for name, t in tensors.items() if not _fits(self._held.get(name), t)}
        return sum(t.numel() * t.element_size() for t in new.values())

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy tensors; two that are one in memory, such as tied weights, are one in the copy."""
        copied: dict[Any, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if (place := _place(tensor)) not in copied:
                held = self._held.get(name)
                if held is None or not _fits(held, tensor):
                    held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                held.copy_(tensor, non_blocking=tensor.is_cuda)
                copied[place] = held
            self._held[name] = copied[place]
        for device in {t.device for t in tensors.values() if t.is_cuda}:
            torch.cuda.synchronize(device)
        return {name: self._held[name] for name in tensors}


def _place(tensor: torch.Tensor) -> Any:
    """Equal for tensors that are the same bytes in the same layout."""
    alone = tensor.data_ptr() or id(tensor)
    return tensor.device, alone, tensor.dtype, tensor.shape, tensor.stride()


def _fits(held: torch.Tensor | None, tensor: torch.Tensor) -> bool:
    return held is not None and (held.shape, held.dtype) == (tensor.shape, tensor.dtype)


def saved_files(tokenizer: Any) -> dict[str, bytes]:
    """The files that `tokenizer.save_pretrained` writes, by name; a tokenizer must not be saved while it is in use."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer.save_pretrained(folder)
        found = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write what `saved_files` returned."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def free_main_memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Bytes of main memory that can still be allocated, within the container's limit; None where nobody says."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = ((cgroup / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        reclaimable = int(stat.get("inactive_file", 0))  # the page cache counts as used
    except (OSError, ValueError):  # no container, or one of cgroups v1
        return free
    return free if limit == "max" else min(free, int(limit) - int(used) + reclaimable)
