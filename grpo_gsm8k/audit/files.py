"""Every byte of a run directory against its hash chain. Reads files, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grpo_gsm8k.runs import chain
from grpo_gsm8k.runs.files import sha256_file


@dataclass(frozen=True)
class Damage:
    """What is not as it was.

    Attributes:
        file: below the run directory.
        step: to which it belongs; None for a file of the whole run.
    """

    file: str
    step: int | None
    what: str


@dataclass(frozen=True)
class Checked:
    """What a look at all files found.

    Attributes:
        files: how many the chain covers.
        head: the chain's last hash; "" without a chain.
        free: files that the chain says nothing about.
    """

    files: int
    head: str
    damage: list[Damage]
    free: list[str]


def check(folder: Path) -> Checked:
    """Compare all files of one run directory with its chain; those of a pipeline's stages are not among them.

    Where the chain itself is damaged, that is all that can be told.
    """
    links, faults = chain.read(folder)
    head, damage = links[-1]["hash"] if links else "", list[Damage]()
    if faults or not links:  # what a damaged link said is not known, and a later link may have replaced it
        return Checked(0, head, [Damage(chain.NAME, fault.step, fault.what) for fault in faults], [])
    live: dict[str, tuple[str, int | None]] = {}
    for link in links:
        for name, digest in link.get("files", {}).items():
            live[name] = (digest, step_of(name, link))
        for name in link.get("gone", ()):
            live.pop(name, None)
    known = {chain.NAME, chain.METRICS, *live}
    for name, (digest, step) in live.items():
        if name.startswith(f"{chain.CHECKPOINTS}/"):
            damage += check_checkpoint(folder, name, digest, step)
            known |= {f"{name}/{file}" for file in (*manifest_of(folder / name), chain.MANIFEST)}
        elif what := _difference(folder / name, digest):
            damage.append(Damage(name, step, what))
    damage += check_log(folder, links)
    free = [name for name in all_files(folder) if name not in known]
    return Checked(len(known), head, damage, free)


def step_of(name: str, link: chain.Link) -> int | None:
    """The step that a file belongs to: by its name, else by the link that has it; None for one of the whole run."""
    if numbered := re.search(r"step_(\d+)", name):
        return int(numbered[1])
    return link["step"] if name.startswith("rounds/") else None


def check_checkpoint(folder: Path, name: str, digest: str, step: int | None) -> Iterator[Damage]:
    """A checkpoint's manifest against the chain, and its files against the manifest."""
    manifest = f"{name}/{chain.MANIFEST}"
    if not (folder / name).is_dir():
        yield Damage(name, step, "is missing")
        return
    if what := _difference(folder / manifest, digest):
        yield Damage(manifest, step, what)
        return
    for file, own in manifest_of(folder / name).items():
        if what := _difference(folder / name / file, own):
            yield Damage(f"{name}/{file}", step, what)


def manifest_of(checkpoint: Path) -> dict[str, str]:
    """File → hash, as a checkpoint's manifest has it; nothing where that is damaged."""
    try:
        found = json.loads((checkpoint / chain.MANIFEST).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def check_log(folder: Path, links: list[chain.Link]) -> Iterator[Damage]:
    """The rows of the log against the links of their steps."""
    log = folder / chain.METRICS
    covered = [(link["step"], link["metrics"]) for link in links if "metrics" in link]
    if not log.is_file():
        if covered:
            yield Damage(chain.METRICS, covered[0][0], "is missing")
        return
    lines, start = log.read_bytes().splitlines(keepends=True), 0
    for step, logged in covered:
        part = b"".join(lines[start : start + logged["rows"]])
        if hashlib.sha256(part).hexdigest() != logged["sha256"]:
            yield Damage(chain.METRICS, step, f"the row of step {step} was changed or is missing")
            return  # a changed newline moves every row behind it
        start += logged["rows"]
    if start < len(lines):
        yield Damage(chain.METRICS, None, "has rows behind those that the chain knows")


def all_files(folder: Path) -> Iterator[str]:
    """Every file of a run directory but those that other processes write, and those of a pipeline's stages."""
    for entry in sorted(folder.iterdir()):
        if (entry.name in chain.APART and entry.name != chain.CHECKPOINTS) or (entry / chain.NAME).is_file():
            continue
        paths = sorted(entry.rglob("*")) if entry.is_dir() and not entry.is_symlink() else [entry]
        yield from (path.relative_to(folder).as_posix() for path in paths if not path.is_dir())


def _difference(path: Path, digest: str) -> str:
    """How a file differs from what was recorded; "" for the same bytes."""
    try:
        return "" if sha256_file(path) == digest else "was changed: its sha256 is another"
    except OSError as fault:
        return "is missing" if isinstance(fault, FileNotFoundError) else f"cannot be read: {fault.strerror}"
