"""Durable writing: old or new, never half; and the reader that names the line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_gsm8k.errors import DataError, DiskError
from grpo_gsm8k.runs import files
from tests.toys import load_problems


def test_writes_are_complete_and_leave_nothing_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "on the way"
    files.write_atomic(folder / "a.txt", "früh\n")
    files.write_atomic(folder / "b.bin", b"\x00\xff")
    files.write_json(folder / "c.json", {"z": 1, "a": "ü"})
    files.write_jsonl(folder / "d.jsonl", ({"n": n} for n in range(2)))
    assert (folder / "a.txt").read_bytes() == b"fr\xc3\xbch\n"
    assert (folder / "b.bin").read_bytes() == b"\x00\xff"
    assert (folder / "c.json").read_text("utf-8") == '{\n  "z": 1,\n  "a": "ü"\n}\n'
    assert (folder / "d.jsonl").read_text() == '{"n": 0}\n{"n": 1}\n'
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "b.bin", "c.json", "d.jsonl"]


def test_a_new_file_has_the_ordinary_mode(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    files.write_atomic(tmp_path / "atomic", "x")
    mode = stat.S_IMODE((tmp_path / "atomic").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # the example of FIPS 180-4
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_file(tmp_path / "abc") == expected


def test_temporary_name_keeps_the_suffix_and_the_folder(tmp_path: Path) -> None:
    with files.atomic_path(tmp_path / "weights.safetensors") as temporary:
        assert (temporary.suffix, temporary.parent) == (".safetensors", tmp_path)
        temporary.write_bytes(b"w")


def test_order_is_write_sync_rename_sync_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append(f"sync {kind} of {os.fstat(descriptor).st_size if kind == 'file' else 'it'}")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    files.write_atomic(tmp_path / "f", b"12345")
    assert events == ["sync file of 5", "rename", "sync folder of it"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    target = tmp_path / "f.jsonl"
    target.write_text("old\n")

    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskError) as caught:
        files.write_jsonl(target, [{"new": True}])
    message = str(caught.value)
    assert str(target) in message and os.strerror(code) in message and "untouched" in message
    assert "\n" not in message and caught.value.exit_code == 2
    assert target.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [target]


def test_a_real_limit_in_the_middle_of_a_write(tmp_path: Path) -> None:
    """The kernel refuses the bytes beyond 64 kB, as a full disk would."""
    target = tmp_path / "f.jsonl"
    target.write_text("old\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(DiskError, match="untouched"):
            files.write_jsonl(target, ({"text": "x" * 1000} for _ in range(1000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [target]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=r"File exists|Not a directory"):
        files.write_atomic(tmp_path / "file" / "f", "x")
    with pytest.raises(DiskError, match="Not a directory"):
        files.write_atomic(tmp_path / "file" / "deep" / "f", "x")


def test_other_errors_pass_and_clean_up(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.atomic_path(tmp_path / "f") as temporary:
        temporary.write_text("half")
        Path("/nowhere/at/all").read_text()
    with pytest.raises(KeyboardInterrupt), files.atomic_path(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "f", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_another_file_names_that_file(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, int]]:
        yield {"a": 1}
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/input.jsonl")

    with pytest.raises(DiskError, match=r"/elsewhere/input\.jsonl"):
        files.write_jsonl(tmp_path / "f", rows())


def test_a_process_killed_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.write_text("old")
    script = (
        "import os, sys\n"
        "from grpo_gsm8k.runs.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(target)], check=False).returncode == -9
    assert target.read_text() == "old"
    files.write_atomic(target, "new")
    assert target.read_text() == "new"


def test_read_jsonl_gives_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes('{"a": "\u2028 stays one line"}\r\n{"b": [1, null]}'.encode())
    expected = [(1, {"a": "\u2028 stays one line"}), (2, {"b": [1, None]})]
    assert list(files.read_jsonl(path)) == expected


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (b"{oops}", "broken JSON"),
        (b'{"a": 1', "broken JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "object is needed, not an array"),
        (b'"text"', "object is needed, not text"),
        (b"null", "object is needed, not null"),
        (b'{"a": "\xff"}', "invalid UTF-8 at byte 7"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": "\\ud83d"}', "surrogate"),
        (b"", "blank line"),
        (b"  \t", "blank line"),
    ],
)
def test_read_jsonl_names_file_and_line(tmp_path: Path, bad: bytes, what: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"a": "\\ud83d\\ude00"}\n' + bad + b"\n{}\n")
    with pytest.raises(DataError, match=what) as caught:
        list(files.read_jsonl(path))
    assert (caught.value.path, caught.value.line) == (path, 2)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_read_jsonl_without_rows(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, what in (("empty", "is empty"), ("absent", "does not exist"), (".", "cannot be read")):
        with pytest.raises(DataError, match=what) as caught:
            list(files.read_jsonl(tmp_path / name))
        assert caught.value.line is None


def test_read_json(tmp_path: Path) -> None:
    files.write_json(tmp_path / "f", {"a": {"b": [1]}})
    assert files.read_json(tmp_path / "f") == {"a": {"b": [1]}}
    (tmp_path / "f").write_text("{\n")
    with pytest.raises(DataError, match="broken JSON"):
        files.read_json(tmp_path / "f")


def test_json_line_is_the_line_of_write_jsonl(tmp_path: Path) -> None:
    row = {"text": "é\n", "n": 1.5}
    files.write_jsonl(tmp_path / "f", [row, row])
    assert hashlib.sha256(files.json_line(row) * 2).hexdigest() == files.sha256_file(tmp_path / "f")
    assert json.loads(files.json_line(row)) == row


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    from grpo_gsm8k.runs.files import read_json
    from grpo_gsm8k.tasks.conversations import check_chat, load_pairs

    path = tmp_path / "bom.jsonl"
    path.write_text('{"question": "1+1?", "answer": "#### 2"}\n' * 1, encoding="utf-8-sig")
    assert load_problems(path)[0].text == "1+1?" and read_json(path)["answer"] == "#### 2"
    path.write_text('{"prompt": "1+1?", "response": "2"}\n', encoding="utf-8-sig")
    assert check_chat(path).ok and len(load_pairs(path)) == 1
    path.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(DataError, match="blank line"):
        read_json(path)
