"""Writes files durably, and reads JSON lines. Standard library only.

After a kill or a power cut a file is either the old one or the complete new one: the content goes to a temporary file
in the same folder, is synced, and renamed. A full or read-only disk raises `DiskError`.

    with atomic_path(folder / "weights.safetensors") as temporary:
        save_file(tensors, temporary)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from grpo_gsm8k.errors import DataError, DiskError

_DISK_ERRNOS = frozenset(
    {
        errno.ENOSPC,  # disk full
        errno.EDQUOT,  # quota used up
        errno.EFBIG,  # beyond the limit for one file
        errno.EIO,
        errno.EROFS,  # read-only file system
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,  # a parent is a file
        errno.EEXIST,  # as above, where the parent itself was to be made
        errno.EISDIR,  # the target is a folder
        errno.ENAMETOOLONG,
        errno.ELOOP,
    }
)
SOURCE_SUFFIX = ".source.json"  # of the file beside a data file that records its source
BOM = b"\xef\xbb\xbf"  # the UTF-8 byte order mark of some editors
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})  # some network file systems


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` that means "cannot be written" into a `DiskError` about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRNOS:
            raise
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
        other = f" ({named})" if named.parent != path.parent else ""
        raise DiskError(f"{path}: cannot be written: {error.strerror}{other}; complete files are untouched") from error


def make_folder(path: Path) -> None:
    """Make a folder and its parents. Raises `DiskError` if that is impossible, as in /proc."""
    with disk_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            raise DiskError(f"{path}: cannot be made: {error.strerror}; pick another place") from error


def check_writable(path: Path) -> None:
    """Raise `DiskError` if `path` cannot be written. Leaves no file or folder behind."""
    missing = [folder for folder in path.parents if not folder.exists()]
    if path.exists() and not path.is_file():
        raise DiskError(f"{path}: cannot be written: is not a regular file")
    try:
        write_atomic(path.with_name(f".tmp-{os.getpid()}-probe"), b"x")
        path.with_name(f".tmp-{os.getpid()}-probe").unlink()
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success sync it and rename it to `path`, else remove it.

    Missing parent folders are made. The temporary name has the suffix of the final one, for writers that depend on it.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    if path.exists() and not path.is_file():  # a rename would replace a device such as /dev/null
        raise DiskError(f"{path}: cannot be written: is not a regular file")
    with disk_errors(path):
        make_folder(path.parent)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        try:
            _sync(path.parent)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a fresh folder beside `path`, which must not exist; on success sync and rename it, else remove it.

    Its name is random, so in a shared folder such as /tmp nobody can create it first.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".writing_{path.name}_", dir=path.parent))
        try:
            temporary.chmod(0o755)
            yield temporary
            sync_tree(temporary)
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Replace the file by `data` (text as UTF-8, its newlines as they are)."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path | str, obj: Any) -> None:
    """Indented JSON in the order of `obj`. NaN and infinity are a `ValueError`."""
    write_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_line(row: Mapping[str, Any]) -> bytes:
    """One line of a JSON lines file, newline included. NaN and infinity are a `ValueError`."""
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_jsonl(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        handle.writelines(json_line(row) for row in rows)


def sha256_file(path: Path | str) -> str:
    """The sha256 of a file's bytes, in hex."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_lines(path: Path | str) -> Iterator[tuple[int, bytes]]:
    """The raw lines of a file with 1-based numbers. Raises `DataError` for an empty or unreadable file."""
    path = Path(path)
    number = 0
    try:
        if path.is_char_device():  # /dev/zero never ends
            raise DataError(path, "is a device, not a file")
        with path.open("rb") as handle:
            for number, raw in enumerate(handle, 1):
                yield number, raw
    except FileNotFoundError:
        raise DataError(path, "does not exist") from None
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from error
    if number == 0:
        raise DataError(path, "is empty")


def real_path(path: Path | str) -> Path:
    """The absolute path without links. Before Python 3.13 `Path.resolve` raises for a loop of links; this does not."""
    return Path(os.path.realpath(path))


def read_jsonl(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line. Raises `DataError` with file and line for the first error."""
    for number, raw in read_lines(path):
        try:
            row = parse_line(raw)
        except ValueError as fault:
            raise DataError(path, str(fault), number) from None
        yield number, row


def read_json(path: Path | str) -> dict[str, Any]:
    """The object of a JSON file. Raises `DataError` if it is missing or invalid."""
    raw = b"".join(line for _, line in read_lines(path))
    try:
        return parse_line(raw)
    except ValueError as fault:
        raise DataError(path, str(fault)) from None


def parse_line(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`.

    Raises:
        ValueError: describes what is wrong with it.
    """
    if not raw.removeprefix(BOM).strip():
        raise ValueError("blank line")
    try:
        row = json.loads(raw.removeprefix(BOM).decode(), parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("broken JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, not {json_type(row)}")
    if b"\\u" in raw:  # an escaped lone surrogate is legal JSON, but cannot be written or tokenised
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("invalid text: half of a surrogate pair") from None
    return row


def json_type(value: Any) -> str:
    """The JSON type of a parsed value, for messages."""
    names = {dict: "an object", list: "an array", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is beyond the range of a number")
    return value


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line to a log, unbuffered: a kill can truncate only this line."""
    with disk_errors(path), path.open("ab") as handle:
        handle.write(json_line(row))


def sync_tree(folder: Path) -> None:
    """Sync all files and folders below a folder."""
    for path in [*folder.rglob("*"), folder]:
        try:
            _sync(path)
        except OSError as error:
            if not path.is_dir() or error.errno not in _NO_FOLDER_SYNC:
                raise
