"""Run directories in, one self-contained HTML page out: did the model learn, and why.

Reads files only and knows no trainer. Runs that are still going, were killed or lack files are shown as far
as they went, and the page says what is missing. Nothing is fetched when the page is opened, everything that
came from a file is escaped, and the same files give the same bytes.

    python -m grpo_gsm8k.cli report artifacts/runs/20260101T120000_abc1234
    python -m grpo_gsm8k.cli report RUN RUN ...        # side by side, in comparison.html of the first
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from os.path import commonpath, realpath
from pathlib import Path

from grpo_gsm8k.errors import RunDirError
from grpo_gsm8k.report import page, parting
from grpo_gsm8k.report.read import read_run
from grpo_gsm8k.runs import chain, lock
from grpo_gsm8k.runs.files import write_atomic


def labels(paths: Sequence[Path]) -> list[str]:
    """Short distinct names: each path below what they have in common."""
    if len(paths) == 1:
        return [paths[0].name]
    common = commonpath([p.parent for p in paths])
    return [p.relative_to(common).as_posix() for p in paths]


def parted(runs: Sequence[Path]) -> list[str]:
    """Where two runs part, in words; see `parting.parting`."""
    paths = list(dict.fromkeys(Path(realpath(run)) for run in runs))
    return parting.parting(dict(zip(labels(paths), map(read_run, paths), strict=True)))


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one HTML page about one run, or about several side by side, and return its path.

    Args:
        runs: pipeline directories or directories of single training runs.
        out: the page to write; by default `report.html` in the run, for several `comparison.html` in the first.

    Raises:
        RunDirError: a directory does not exist, or no run wrote it.
    """
    paths = list(dict.fromkeys(Path(realpath(run)) for run in runs))  # Path.resolve raises at a circle of links
    if not paths:
        raise RunDirError("no run directory given; try: grpo-gsm8k report artifacts/runs/NAME")
    found = dict(zip(labels(paths), (read_run(path) for path in paths), strict=True))
    target = out or paths[0] / ("report.html" if len(paths) == 1 else "comparison.html")
    write_atomic(target, page.page(found).encode(errors="replace"))
    _record(target)
    return target


def _record(page: Path) -> None:
    """Add the page to the hash chain of the run that it lies in, unless a process is at work there: that one will."""
    if not (page.parent / chain.NAME).is_file():
        return
    with contextlib.suppress(RunDirError), lock.hold(page.parent, "report"):
        links = chain.Chain(page.parent)
        links.resume_at_end()
        links.seal("report", links.step, files=[page.name])
