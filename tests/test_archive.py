"""An archive from a rented machine is hostile input: what comes out of it lies in its folder, whatever it holds."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import subprocess
import tarfile

import pytest

from grpo_gsm8k.errors import DiskError
from grpo_gsm8k.launch import archive, shell
from grpo_gsm8k.launch.archive import ArchiveError, Limits, unpack
from grpo_gsm8k.launch.shell import Listing
from tests.hostile_tar import archive as hostile


@pytest.fixture
def into(tmp_path):
    folder = tmp_path / "in" / "to"
    folder.mkdir(parents=True)
    return folder


def tar(*entries, kind=tarfile.PAX_FORMAT):
    """A tar of (name, data) files, and of whole `TarInfo`s."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=kind) as opened:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                opened.addfile(entry)
                continue
            member = tarfile.TarInfo(entry[0])
            member.size, member.mtime, member.mode = len(entry[1]), 1e9, 0o4777
            opened.addfile(member, io.BytesIO(entry[1]))
    return io.BytesIO(made.getvalue())


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


def test_nothing_leaves_the_folder(tmp_path, into):
    found = unpack(io.BytesIO(hostile(str(tmp_path))), into)
    assert files_of(tmp_path) == {f"in/to/{name}" for name in ("link/through", "escape/out", "twice")}
    assert found.written == {"link/through", "escape/out", "twice"}
    whys = " ".join(found.skipped.values())
    for why in ("out of the folder", "a link", "a hard link", "a device", "a FIFO", "too long", "twice", "Not a dir"):
        assert why in whys
    assert not any(path.is_symlink() for path in into.rglob("*"))


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_sound_archives_of_every_form_come_out_as_they_are(into, kind):
    long = "/".join(["d" * 90] * (2 if kind == tarfile.USTAR_FORMAT else 9)) + "/f"
    folder = tarfile.TarInfo("empty")
    folder.type = tarfile.DIRTYPE
    files = {"a": b"", "b/c": b"x" * 512, "b/d": b"y" * 513, "./e": b"z", long: b"long"}
    files |= {} if kind == tarfile.USTAR_FORMAT else {"ü\n\udcff": b"odd"}
    found = unpack(tar(*files.items(), folder, kind=kind), into)
    assert found.skipped == {} and (into / "empty").is_dir()
    assert {name: (into / name).read_bytes() for name in files} == files
    assert (into / "a").stat().st_mode & 0o7777 == 0o755 and (into / "a").stat().st_mtime == 1e9


def test_what_was_not_asked_for_or_is_there_already_is_not_written(tmp_path, into):
    (into / "there").write_text("mine")
    (into / "way").symlink_to(tmp_path)
    found = unpack(
        tar(("there", b"x"), ("way/x", b"x"), ("asked", b"x"), ("other", b"x")), into, None, {"there", "asked"}
    )
    assert found.written == {"asked"} and (into / "there").read_text() == "mine"
    assert set(unpack(tar(("way/x", b"x")), into).skipped) == {"way/x"} and files_of(tmp_path) == {
        "in/to/asked",
        "in/to/there",
        "in/to/way",
    }


def test_limits(into):
    found = unpack(tar(("a", b"123"), ("b", b"12"), ("c", b"1")), into, Limits(9, 2, 2))
    assert found.written == {"b"} and "beyond the limit" in found.skipped["a"] and "beyond" in found.skipped["c"]
    with pytest.raises(ArchiveError, match="more than 2 entries"):
        unpack(tar(*((f"f{i}", b"") for i in range(3))), into, Limits(2))


def test_a_broken_archive_leaves_whole_files_only(into):
    whole = tar(("a", b"1" * 600), ("b", b"2" * 600)).getvalue()
    for cut in (*range(0, 3072, 97), 700, 1536 + 512 + 10):
        for path in into.iterdir():
            path.unlink()
        with contextlib.suppress(ArchiveError):
            unpack(io.BytesIO(whole[:cut]), into)
        assert all(path.stat().st_size == 600 for path in into.iterdir()), cut
    for junk in (os.urandom(2048), b"1\n2\n" * 400, gzip.compress(whole)):
        with pytest.raises(ArchiveError):
            unpack(io.BytesIO(junk), into)


def test_headers_that_lie(into):
    """A negative size (an endless loop in tarfile), a size beyond every disk, and a header of a gigabyte."""
    for pax in ({"size": "-1536"}, {"size": str(1 << 63)}, {"size": "1_0"}):
        member = tarfile.TarInfo("x")
        member.pax_headers = pax
        with pytest.raises(ArchiveError):
            unpack(tar(member), into)
    member = tarfile.TarInfo("x")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": str(1 << 40)}
    assert unpack(tar(member), into).skipped == {"x": "it is a sparse file"}
    for kind in (b"L", b"x", b"g"):
        header = tarfile.TarInfo("././@LongLink")
        header.type, header.size = kind, 1 << 30
        with pytest.raises(ArchiveError, match="header of 1073741824"):
            unpack(io.BytesIO(header.tobuf(tarfile.GNU_FORMAT)), into)
    assert files_of(into) == set()


def test_a_full_disk_is_said_and_leaves_nothing_half(into, monkeypatch):
    def full(handle, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive.os, "write", full)
    with pytest.raises(DiskError, match="No space left"):
        unpack(tar(("a", b"1")), into)
    assert files_of(into) == set()


def test_a_list_is_read_with_every_odd_name(tmp_path):
    (tmp_path / "grpo-job" / "work" / "a").mkdir(parents=True)
    here = tmp_path / "grpo-job" / "work" / "a"
    for name in ("x", "a\tb", "new\nline", "'quoted\"", "-rf", b"\xff".decode("utf-8", "surrogateescape")):
        (here / name).write_text("12")
    (here / "l").symlink_to("x")
    script = shell.LIST.format(job="grpo-job", fetching="f", path="./a", most=10000)
    said = subprocess.run(["sh", "-s"], input=script.encode(), cwd=tmp_path, capture_output=True, check=True).stdout
    found = Listing.of(said)
    assert found.whole and found.others == {"a/l": "a link"}
    assert found.files == {f"a/{path.name}": 2 for path in here.iterdir() if not path.is_symlink()}
    assert not Listing.of(said[:-20]).whole and not Listing.of(b"").whole
