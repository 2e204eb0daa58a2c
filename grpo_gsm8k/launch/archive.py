"""Unpacks a tar archive that a rented machine has sent: hostile input, whoever wrote the job.

Python's `tarfile` follows links that its filter let through (CVE-2025-4517), loops on negative sizes (CVE-2025-8194),
and reads headers of any length into memory. What the launcher needs of the format is little, so it is read here:
regular files and folders, with the long names of GNU tar and of pax. Everything else (links of either kind, devices,
FIFOs, sparse files, unknown types) is skipped and named.

A file is written below the folder and nowhere else: its path is checked part by part, every folder on the way is opened
without following links, and the file itself must not exist. Nothing is decompressed.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from grpo_gsm8k.errors import DiskError, LaunchError

BLOCK = 512
CHUNK = 1 << 20
MOST_DEPTH = 64
MOST_NAME = 255  # bytes of a part of a path
MOST_PATH = 3072  # bytes of a path; the folder that it goes into comes before it
MOST_HEADER = 1 << 16  # bytes of an extended header
KINDS = {b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a FIFO", b"S": "a sparse file"}
# Of the errors of a write: the disk's, which every other file would meet too. The rest are about one name.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS})


class ArchiveError(LaunchError):
    """The archive is cut off or is none; what came before the fault has been unpacked."""


@dataclass(frozen=True)
class Limits:
    """The most that an archive may hold."""

    files: int = 100_000
    file_bytes: int = 1 << 37
    all_bytes: int = 1 << 38


@dataclass
class Unpacked:
    """Files that were written, by their path, and why others were not."""

    written: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """One entry. `kind` is tar's type byte."""

    name: str
    kind: bytes
    size: int
    mode: int
    mtime: float


def path_fault(name: str) -> str:
    """Why a file of this name cannot be written below a folder; "" where it can."""
    raw = name.encode("utf-8", "surrogateescape")
    parts = raw.split(b"/")
    if not raw or b"\0" in raw:
        return "it has no name that a file can have"
    if raw.startswith(b"/") or b".." in parts:
        return "its path leads out of the folder"
    if len(raw) > MOST_PATH or len(parts) > MOST_DEPTH or any(len(part) > MOST_NAME for part in parts):
        return "its path is too long"
    return ""


def normal(name: str) -> str:
    """The path without `.` and empty parts."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def unpack(
    archive: IO[bytes], into: Path, limits: Limits | None = None, wanted: Collection[str] | None = None
) -> Unpacked:
    """Write the archive's files below `into`, which exists.

    Args:
        wanted: paths of the files that were asked for; nothing else is written. None: whatever the archive holds.

    Raises:
        ArchiveError: it is cut off, or no tar archive.
        DiskError: this machine's disk is full or cannot be written; whole files stay, the last one is removed.
    """
    limits, done, total, entries = limits or Limits(), Unpacked(), 0, 0
    root = os.open(into, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for member in members(archive):
            entries += 1
            if entries > limits.files:
                raise ArchiveError(f"more than {limits.files} entries")
            name = normal(member.name)
            why = path_fault(member.name) or _refusal(member, name, limits, total, wanted, done)
            if why:
                done.skipped.setdefault(f"{name} (again)" if name in done.written else name or member.name, why)
            elif member.kind == b"5":
                with contextlib.suppress(OSError):
                    os.close(_folder(root, name.split("/") if name else []))
            elif why := _write(root, name, member, archive):
                done.skipped[name] = why
            else:
                total += member.size
                done.written.add(name)
    finally:
        os.close(root)
    return done


def _refusal(
    member: Member, name: str, limits: Limits, total: int, wanted: Collection[str] | None, done: Unpacked
) -> str:
    if member.kind == b"5":
        return "" if wanted is None else "it was not asked for"
    if member.kind not in (b"0", b"\0", b"7"):
        return f"it is {KINDS.get(member.kind, f'of type {member.kind!r}')}"
    if wanted is not None and name not in wanted:
        return "it was not asked for"
    if name in done.written:
        return "the archive has it twice"
    if member.size > limits.file_bytes or total + member.size > limits.all_bytes:
        return f"its {member.size / 1e9:.2f} GB are beyond the limit"
    return ""


def _write(root: int, name: str, member: Member, source: IO[bytes]) -> str:
    """Write one file; why it could not be written, where that is about this file alone."""
    *folders, last = name.split("/")
    if not last:
        return "it has no name that a file can have"
    try:
        parent = _folder(root, folders)
    except OSError as fault:
        return _about_one(fault, name)
    try:
        try:
            handle = os.open(last, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=parent)
        except OSError as fault:
            return _about_one(fault, name)
        try:
            _copy(source, handle, member)
        except OSError as fault:
            os.unlink(last, dir_fd=parent)
            return _about_one(fault, name)
        except BaseException:
            os.unlink(last, dir_fd=parent)
            raise
        finally:
            os.close(handle)
    finally:
        os.close(parent)
    return ""


def _about_one(fault: OSError, name: str) -> str:
    """What a failed write says about this file; a full disk is `DiskError`."""
    if fault.errno in NO_ROOM:
        raise DiskError(f"{name}: cannot be written: {fault.strerror}") from None
    return str(fault.strerror)


def _copy(source: IO[bytes], handle: int, member: Member) -> None:
    left = member.size
    while left:
        piece = source.read(min(CHUNK, left))
        if not piece:
            raise ArchiveError("cut off")
        rest = memoryview(piece)
        while rest:
            rest = rest[os.write(handle, rest) :]
        left -= len(piece)
    os.fchmod(handle, member.mode & 0o755 | 0o600)
    if 0 <= member.mtime < 1 << 33:
        os.utime(handle, (member.mtime, member.mtime))


def _folder(root: int, parts: list[str]) -> int:
    """A descriptor of the folder, made where it is missing; no part of it is a link."""
    here = os.dup(root)
    try:
        for part in parts:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=here)
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = below
    except BaseException:
        os.close(here)
        raise
    return here


# ------------------------------------------------------------------------------------------------ the format


def members(source: IO[bytes]) -> Iterator[Member]:
    """The entries in order. The reader may take of an entry's content what it likes. Raises `ArchiveError`."""
    long_name, pax = "", dict[str, str]()
    while True:
        block = source.read(BLOCK)
        if not block or block == bytes(BLOCK):
            return
        if len(block) < BLOCK:
            raise ArchiveError("cut off")
        kind, size = _header(block)
        if kind in (b"L", b"x", b"K", b"g", b"X"):
            content = _extended(source, size)
            if kind == b"L":
                long_name = _text(content.rstrip(b"\0"))
            elif kind in (b"x", b"X"):
                pax = _pax(content)
            continue
        size = _number(pax.get("size", str(size)).encode(), 10)
        sparse = any(key.startswith("GNU.sparse") for key in pax)
        name = pax.get("path") or long_name or _name(block)
        kind = b"S" if sparse else b"5" if kind in (b"0", b"\0") and name.endswith("/") else kind
        mtime = _float(pax.get("mtime", "")) or float(_number(block[136:148], 8))
        after = source.tell() + -(-size // BLOCK) * BLOCK if kind not in (b"1", b"2", b"3", b"4", b"5", b"6") else None
        here = source.tell()
        yield Member(name, kind, size, _number(block[100:108], 8) & 0o7777, mtime)
        long_name, pax = "", {}
        source.seek(here if after is None else after)


def _header(block: bytes) -> tuple[bytes, int]:
    unsigned = sum(block[:148]) + 32 * 8 + sum(block[156:])
    if _number(block[148:156], 8) != unsigned:
        raise ArchiveError("not a tar archive")
    return block[156:157], _number(block[124:136], 8)


def _extended(source: IO[bytes], size: int) -> bytes:
    if size > MOST_HEADER:
        raise ArchiveError(f"a header of {size} bytes")
    padded = -(-size // BLOCK) * BLOCK
    content = source.read(padded)
    if len(content) < padded:
        raise ArchiveError("cut off")
    return content[:size]


def _pax(content: bytes) -> dict[str, str]:
    """Records of the form `length key=value\\n`."""
    found = dict[str, str]()
    while content:
        head, _, _ = content.partition(b" ")
        length = _number(head, 10)
        record = content[len(head) + 1 : length]
        if length <= len(head) + 1 or length > len(content) or not record.endswith(b"\n") or b"=" not in record:
            raise ArchiveError("a broken header")
        key, _, value = record[:-1].partition(b"=")
        found[_text(key)] = _text(value)
        content = content[length:]
    return found


def _name(block: bytes) -> str:
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    posix = block[257:263] == b"ustar\0"  # GNU's own form has other things in the prefix's place
    return _text(prefix + b"/" + name if posix and prefix else name)


def _number(raw: bytes, base: int) -> int:
    """A number that is not negative; octal, or GNU's binary form. Raises `ArchiveError`."""
    if base == 8 and raw[:1] == b"\x80":
        value = int.from_bytes(raw[1:], "big")
    else:
        text = raw.split(b"\0")[0].strip() or b"0"
        if not text.isdigit() or len(text) > 20:
            raise ArchiveError("a broken header")
        try:
            value = int(text, base)
        except ValueError:
            raise ArchiveError("a broken header") from None
    if value >= 1 << 62:
        raise ArchiveError("a broken header")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
