"""What a job has made, on its way home: listed in the pod, then fetched in parts until nothing is missing.

A file counts as home when it is here with the size that the pod lists, so that a connection that drops costs one part,
and another launcher (`attach`) asks for the rest alone. Links and devices are skipped and named. What cannot be written
here, or is beyond a limit, stays behind, and the run says so with its exit code.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from grpo_gsm8k.launch.archive import Limits, path_fault
from grpo_gsm8k.launch.shell import Shell, local_disk
from grpo_gsm8k.runs.clean import printable

PART_BYTES = 256 << 20  # of one archive, unless a single file is larger
PART_FILES = 2000
NAMED = 20  # paths in one message


@dataclass
class Fetch:
    """The state of a fetch.

    Attributes:
        into: the folder on this machine.
        promised: regular files that the pod has, with their sizes.
        others: links and what else is no file, skipped.
        behind: files that cannot come home, and why.
        fault: what kept the last round from its end.
    """

    into: Path
    limits: Limits
    promised: dict[str, int] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    behind: dict[str, str] = field(default_factory=dict)
    fault: str = ""
    listed: bool = False

    async def round(self, shell: Shell, path: str) -> None:
        """List, and fetch what is missing. Raises `ShellError` and `DiskError`; what has come whole stays."""
        listing = await shell.listing(path)
        self.listed, self.others, self.promised = True, listing.others, listing.files
        self.fault = "" if listing.whole else "the pod could not list everything"
        self._hold_back()
        for part in _parts(self.missing()):
            for name in part:
                self._clear(name)
            done = await shell.fetch(part, self.into, self.limits)
            self.behind |= {name: why for name, why in done.skipped.items() if name in part}

    def missing(self) -> dict[str, int]:
        """What is promised, can come, and is not here."""
        return {
            name: size
            for name, size in self.promised.items()
            if name not in self.behind and _size(self.into / name) != size
        }

    def _hold_back(self) -> None:
        """Leave what is beyond a limit or has no name for this machine."""
        total = count = 0
        for name, size in self.promised.items():
            why = path_fault(name)
            if not why and size > self.limits.file_bytes:
                why = f"{size / 1e9:.3g} GB are beyond --fetch_file_gb"
            elif not why and total + size > self.limits.all_bytes:
                why = "beyond --fetch_gb"
            elif not why and count >= self.limits.files:
                why = "beyond --fetch_files"
            if why:
                self.behind[name] = why
            else:
                total, count = total + size, count + 1

    def _clear(self, name: str) -> None:
        """Remove what an earlier attempt has left of a file."""
        with local_disk(self.into), contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            (self.into / name).unlink()

    def problem(self) -> str:
        """Why the results are not all here; "" where they are."""
        if not self.listed:
            return f"the results could not be fetched: {self.fault or 'the pod did not say what there is'}"
        missing = self.missing()
        if not missing and not self.behind:
            return self.fault
        whys = self.behind | dict.fromkeys(missing, self.fault or "the pod did not send it")
        home = len(self.promised) - len(whys)
        return f"{len(whys)} of {len(self.promised)} files are not here ({home} are): {named(whys)}"


def named(whys: Mapping[str, str]) -> str:
    """Paths with a reason each, the first of them."""
    shown = [f"{printable(name)} ({why})" for name, why in list(whys.items())[:NAMED]]
    return ", ".join(shown) + (f" and {len(whys) - NAMED} more" if len(whys) > NAMED else "")


def _size(path: Path) -> int:
    """Of a regular file; -1 for anything else."""
    try:
        found = path.lstat()
    except OSError:
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def _parts(files: Mapping[str, int]) -> Iterator[dict[str, int]]:
    part, size = dict[str, int](), 0
    for name, more in files.items():
        if part and (size + more > PART_BYTES or len(part) >= PART_FILES):
            yield part
            part, size = {}, 0
        part[name], size = more, size + more
    if part:
        yield part
