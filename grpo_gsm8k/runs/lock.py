"""One process at a time in a run directory: the kernel's lock, and beside it who holds it.

The lock (flock on `.lock`) ends with its process, however that ends. What a killed process has written into the file
blocks nobody: it is read only while the lock is held. Readers such as `report` take no lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from grpo_gsm8k.errors import RunDirError
from grpo_gsm8k.runs.files import disk_errors
from grpo_gsm8k.runs.progress import say

NAME = ".lock"
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS})  # some network file systems
LOOKS = 5  # at a lock that is held by nobody who has signed: its holder is about to, or only looks


@contextmanager
def hold(folder: Path, name: str) -> Iterator[None]:
    """Keep every other process out of a run directory until the context ends.

    Args:
        name: of what is done there, such as `grpo`; the process that is refused reads it.

    Raises:
        RunDirError: another process is there; it is named.
    """
    with disk_errors(folder), _locked(folder) as handle:
        handle.truncate(0)
        signed = {"name": name, "pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        handle.write(json.dumps(signed))
        handle.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a full disk has been reported by what it stopped
                handle.truncate(0)


def refuse_if_held(folder: Path) -> None:
    """Raise `RunDirError` where another process is at work, and make nothing in the folder."""
    if (folder / NAME).is_file():
        with _locked(folder):
            pass


@contextmanager
def _locked(folder: Path) -> Iterator[IO[str]]:
    """The open lock file, held."""
    for look in range(LOOKS):
        with (folder / NAME).open("a+", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if (holder := _holder(handle)) or look == LOOKS - 1:
                    raise RunDirError(_refusal(folder, holder)) from None
                time.sleep(0.05)
                continue
            except OSError as fault:
                if fault.errno not in NO_LOCKS:
                    raise
                say(f"{folder}: its file system has no locks ({fault.strerror}); let no other process write there")
            if _is_current(handle, folder):
                yield handle
                return
    raise RunDirError(_refusal(folder, {}))


def _is_current(handle: IO[str], folder: Path) -> bool:
    """Whether the file that is locked still has its name: a run that failed at its start removes its folder's files."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), (folder / NAME).stat())
    except FileNotFoundError:
        return False


def _holder(handle: IO[str]) -> dict[str, object]:
    """What the holder has written; nothing while it has not."""
    handle.seek(0)
    try:
        found = json.loads(handle.read())
        return found if isinstance(found, dict) and {"name", "pid", "host", "since"} <= found.keys() else {}
    except ValueError:
        return {}


def _refusal(folder: Path, holder: dict[str, object]) -> str:
    if not holder:
        return f"{folder}: another process is at work in it; wait for it, or pick another --out_dir"
    pid, host, since = holder["pid"], holder["host"], holder["since"]
    where = "" if host == socket.gethostname() else f" on {host}"
    began = f", since {datetime.fromtimestamp(since, UTC):%Y-%m-%d %H:%M} UTC" if isinstance(since, float) else ""
    return (
        f"{folder}: another process is at work in it: {holder['name']}, pid {pid}{where}{began}; "
        f"wait for it, end it with `kill {pid}`, or pick another --out_dir"
    )
