"""Hands weights from the learner to an engine: a safetensors file in shared memory, with its hash.

The reader checks the hash before it changes its model, so after a truncated file or a flipped byte the engine keeps its
weights.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grpo_gsm8k.datatypes import WeightsRef
from grpo_gsm8k.errors import DiskError, EngineError
from grpo_gsm8k.runs.files import disk_errors
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.trainer.policy import weights_sha256

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "grpo_gsm8k-"
NAMES = 10  # attempts to find a free name in shared memory


class HandoverError(EngineError):
    """The file is truncated, damaged, or gone."""


def as_json(ref: WeightsRef) -> dict[str, Any]:
    """A `WeightsRef` as JSON, for the channel."""
    return {"version": ref.version, "sha256": ref.sha256, "where": str(ref.where)}


def of_json(version: int, sha256: str, where: str) -> WeightsRef:
    """Undo `as_json`."""
    return WeightsRef(version, sha256, Path(where))


def write(path: Path, version: int, tensors: Iterable[tuple[str, torch.Tensor]], sha256: str = "") -> WeightsRef:
    """Write weights, and hash them unless the hash is given. Raises `DiskError` if there is no room; leaves no file."""
    held = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors}
    try:
        with disk_errors(path):
            save_file(held, path)
    except SafetensorError as fault:  # safetensors wraps the operating system's error
        path.unlink(missing_ok=True)
        raise DiskError(f"{path}: cannot be written: {fault}") from None
    return WeightsRef(version, sha256 or weights_sha256(held.items()), path)


def read(ref: WeightsRef) -> dict[str, torch.Tensor]:
    """Read the tensors of a hand-over. Raises `HandoverError` unless their hash matches."""
    assert ref.where is not None, "these weights are in no file"
    try:
        tensors = load_file(ref.where)
    except (SafetensorError, OSError) as fault:
        raise HandoverError(f"version {ref.version}: cannot be read: {fault}") from None
    found = weights_sha256(tensors.items())
    if found != ref.sha256:
        raise HandoverError(f"version {ref.version}: hash {found[:12]} is not {ref.sha256[:12]}")
    return tensors


class Outbox:
    """Writes hand-overs: to shared memory if they fit, else to a folder on disk.

    It keeps the newest one, for an engine that restarts.
    """

    def __init__(self, fallback: Path) -> None:
        sweep()
        self.fallback = fallback
        self._shared: Path | None = None
        self._lock: IO[bytes] | None = None
        if SHARED_MEMORY.is_dir():
            try:
                self._shared, self._lock = _locked_folder()
            except OSError as fault:
                say(f"{SHARED_MEMORY}: cannot be used ({fault.strerror}); handing over by way of {fallback}")
        self.newest: WeightsRef | None = None

    def put(self, ref: WeightsRef, tensors: Iterable[tuple[str, torch.Tensor]]) -> WeightsRef:
        """Write a new version and delete the previous one. Raises `DiskError` if it fits nowhere."""
        held = list(tensors)
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in held)
        name = f"weights_{ref.version:06d}.safetensors"
        before = self.newest
        if before and _file(before).name == name:  # written again after a refusal
            _file(before).unlink(missing_ok=True)
        if self._shared and shutil.disk_usage(SHARED_MEMORY).free > 1.05 * size:
            try:
                self.newest = write(self._shared / name, ref.version, held, ref.sha256)
            except DiskError as fault:  # another process filled it in the meantime
                say(f"{fault}; handing over by way of {self.fallback}")
                self.newest = write(self._on_disk(name), ref.version, held, ref.sha256)
        else:
            if before is None or _file(before).parent != self.fallback:
                say(f"shared memory has no room for {size / 1e9:.2f} GB; handing over by way of {self.fallback}")
            self.newest = write(self._on_disk(name), ref.version, held, ref.sha256)
        if before and before.where != self.newest.where:
            _file(before).unlink(missing_ok=True)
        return self.newest

    def close(self) -> None:
        """Delete the files."""
        if self.newest:
            _file(self.newest).unlink(missing_ok=True)
        if self._shared and self._lock:
            shutil.rmtree(self._shared, ignore_errors=True)
            self._lock.close()

    def _on_disk(self, name: str) -> Path:
        self.fallback.mkdir(parents=True, exist_ok=True)
        return self.fallback / name


def _file(ref: WeightsRef) -> Path:
    assert isinstance(ref.where, Path)
    return ref.where


def sweep() -> None:
    """Delete what killed processes left in shared memory. A live owner holds a lock on its folder.

    Anybody can create names there, so `sweep` touches only folders of this user, follows no link, creates nothing, and
    waits for no FIFO.
    """
    for folder in SHARED_MEMORY.glob(f"{PREFIX}*"):
        try:
            with _own_lock(folder) as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # alive, another user's, a link, or gone by now
            continue


def _own_lock(folder: Path) -> IO[bytes]:
    """Open the lock file of a folder that only this user can write. Raises `OSError` for any other folder."""
    inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(inside)
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(f"{folder}: another user's")
        handle = os.fdopen(os.open("lock", os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=inside), "r+b", 0)
    finally:
        os.close(inside)
    if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise PermissionError(f"{folder}: its lock is not a file")
    return handle


def _locked_folder() -> tuple[Path, IO[bytes]]:
    """Create a folder that only this user can enter, and lock it while this process lives.

    Raises:
        OSError: no folder can be made there, or every attempted name was taken.
    """
    unnamed = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=SHARED_MEMORY))
    handle = (unnamed / "lock").open("xb", buffering=0)
    fcntl.flock(handle, fcntl.LOCK_EX)
    for attempt in range(NAMES):
        try:  # seen by `sweep` only now
            return unnamed.rename(SHARED_MEMORY / f"{PREFIX}{secrets.token_hex(8)}"), handle
        except OSError:
            if attempt == NAMES - 1:
                shutil.rmtree(unnamed, ignore_errors=True)
                handle.close()
                raise
    raise AssertionError
