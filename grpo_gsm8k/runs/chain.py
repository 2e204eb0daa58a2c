"""The hash chain of a run directory: `chain.jsonl`, a link after every step, written as the run goes.

    {"link": 12, "kind": "step", "step": 10, "files": {"rollouts/step_000010.safetensors": SHA256}, "gone": [],
     "metrics": {"rows": 1, "sha256": SHA256}, "weights": SHA256, "grades": SHA256, "previous": HASH, "hash": HASH}

Each link names the files that appeared since the link before it, the rows that were logged, and the weights that the
step left behind; its `hash` covers all of that and the hash of the link before it. Whoever knows the last hash
(`verify` prints it) can prove every byte of the run. A checkpoint stands in the chain by its manifest, which has the
hash of each of its files; one that retention deletes is listed as `gone`.

A killed process can cut the last line only. A resumed run forgets the links beyond its checkpoint, as it forgets the
log, and continues the chain with a link that says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_gsm8k.errors import RunDirError
from grpo_gsm8k.runs.files import append_jsonl, json_line, sha256_file, write_atomic
from grpo_gsm8k.runs.progress import say

NAME, METRICS, MANIFEST, CHECKPOINTS = "chain.jsonl", "metrics.jsonl", "manifest.json", "checkpoints"
JUDGE = "judge.jsonl"  # verdicts of a judge; it grows until the run ends
FORMAT = 1
FOLDERS = ("samples", "evals", "rounds", "rollouts", "teacher")  # a step adds files to them
APART = frozenset(
    {
        *(NAME, METRICS, JUDGE, ".lock", "handover", "engine.log", "evaluator.log", "teacher.log", CHECKPOINTS),
        *("wandb", "tensorboard", "trackio_run.json"),
    }
)
"""What a sweep leaves out: what has a place of its own in the chain, and what is written to the very end."""

Link = dict[str, Any]


class Chain:
    """Writes the chain of one run directory. One process holds a run directory at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        self.head, self.count, self.step = "", 0, 0
        self.live: dict[str, str] = {}  # file → hash; a checkpoint's folder → hash of its manifest
        self._offset = 0  # bytes of metrics.jsonl that the chain covers

    def open(self, step: int, **facts: Any) -> None:
        """Begin the chain, or continue it from the end of `step`; links beyond it are dropped.

        Call it when the logs are rewound to `step`.
        """
        links, faults = read(self.folder)
        kept = [link for link in links if link["step"] <= step]
        if faults and faults[0].link < len(links):  # a kill can only cut the last line
            say(f"{self.path}: {faults[0].what}; verify will say so")
        if kept != links or faults:
            write_atomic(self.path, b"".join(json_line(link) for link in kept))
        self._stand_at(kept)
        if not kept:
            self.seal("begin", step, format=FORMAT, sweep=True, **facts)
        else:
            dropped = links[len(kept) :]
            self.seal("resume", step, resumed=True, dropped=len(dropped), **facts)

    def resume_at_end(self) -> None:
        """Continue the chain behind its last link, without what a kill has left of another.

        Raises:
            RunDirError: it is damaged.
        """
        links, faults = read(self.folder)
        if faults and self.path.read_bytes().endswith(b"\n"):
            raise RunDirError(f"{self.path}: {faults[0].what}")
        if faults:
            write_atomic(self.path, b"".join(json_line(link) for link in links))
        self._stand_at(links)

    def seal(
        self,
        kind: str,
        step: int,
        *,
        files: Iterable[str] = (),
        sweep: bool = False,
        resumed: bool = False,
        **facts: Any,
    ) -> None:
        """Append a link over everything that is new; no link where nothing is.

        Args:
            files: names below the run directory that were written since, or written again.
            sweep: also every other file that no link covers yet.
            resumed: the files of `rounds/` are older than the run: a round that is sampled again replaces its own.
            facts: anything else that the link states; empty values are left out.
        """
        there = {name: path for name, path in self._watched() if not (resumed and name.startswith("rounds/"))}
        if sweep:
            there |= {name: self.folder / name for name in loose_files(self.folder)}
        new = {name: path for name, path in there.items() if name not in self.live}
        new |= {name: self.folder / name for name in files}
        hashed = {name: digest for name, path in sorted(new.items()) if (digest := _hash(path))}
        gone = sorted(name for name in self.live if _is_watched(name) and not _path(self.folder, name).exists())
        metrics, end = self._logged()
        told = {"files": hashed, "gone": gone, "metrics": metrics, **facts}
        told = {key: value for key, value in told.items() if value not in ({}, [], "", None)}
        if not told.keys() - {"weights"} and kind == "checkpoint":
            return
        link: Link = {"link": self.count, "kind": kind, "step": step, **told, "previous": self.head}
        link["hash"] = hash_of(link)
        append_jsonl(self.path, link)
        self._add(link)
        self._offset = end

    def _logged(self) -> tuple[dict[str, Any], int]:
        """Number and hash of the rows logged since the last link, and where the log ends now."""
        log = self.folder / METRICS
        if not log.is_file() or log.stat().st_size <= self._offset:
            return {}, self._offset
        with log.open("rb") as handle:
            handle.seek(self._offset)
            added = handle.read()
        return {"rows": added.count(b"\n"), "sha256": hashlib.sha256(added).hexdigest()}, self._offset + len(added)

    def _watched(self) -> Iterator[tuple[str, Path]]:
        """The files that steps write, and the manifests of the checkpoints by the names of their folders."""
        for folder in FOLDERS:
            place = self.folder / folder
            for path in place.iterdir() if place.is_dir() else ():
                if path.is_file() and not path.name.startswith(".") and path.name != JUDGE:
                    yield f"{folder}/{path.name}", path
        for manifest in (self.folder / CHECKPOINTS).glob(f"step_*/{MANIFEST}"):
            yield f"{CHECKPOINTS}/{manifest.parent.name}", manifest

    def _stand_at(self, links: list[Link]) -> None:
        self.head, self.count, self.step, self.live = "", 0, 0, {}
        for link in links:
            self._add(link)
        covered = sum(link.get("metrics", {}).get("rows", 0) for link in links)
        log = self.folder / METRICS
        lines = log.read_bytes().splitlines(keepends=True) if log.is_file() else []
        self._offset = sum(map(len, lines[:covered]))

    def _add(self, link: Link) -> None:
        self.head, self.count, self.step = link["hash"], link["link"] + 1, link["step"]
        apply(self.live, link)


def apply(live: dict[str, str], link: Link) -> None:
    """Bring file → hash up to date with a link."""
    live |= link.get("files", {})
    for name in link.get("gone", ()):
        live.pop(name, None)


def loose_files(folder: Path) -> list[str]:
    """Every file of a run directory that stands alone: no log, no checkpoint, no other run's directory."""
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.name in APART or entry.name.startswith(".") or (entry / NAME).is_file():
            continue
        paths = sorted(entry.rglob("*")) if entry.is_dir() and not entry.is_symlink() else [entry]
        found += [path.relative_to(folder).as_posix() for path in paths if path.is_file() and _is_settled(path, folder)]
    return found


def _is_settled(path: Path, folder: Path) -> bool:
    """Whether nobody is still writing it: not a temporary file, not an evaluation that waits."""
    parts = path.relative_to(folder).parts
    return not any(part.startswith(".") for part in parts) and "pending" not in parts and not path.is_symlink()


@dataclass(frozen=True)
class Fault:
    """A link that does not hold, by its number, and what is wrong with it."""

    link: int
    what: str
    step: int | None = None


def read(folder: Path) -> tuple[list[Link], list[Fault]]:
    """The links as far as they hold, and the first fault. A run without a chain has no link and no fault.

    Raises:
        RunDirError: the chain is of a later format.
    """
    path = folder / NAME
    links: list[Link] = []
    previous = ""
    for number, raw in enumerate(path.read_bytes().splitlines(keepends=True) if path.is_file() else ()):
        link = _link(raw)
        step = links[-1]["step"] if links else None
        if link is None or json_line(link) != raw:
            return links, [Fault(number, f"line {number + 1} is not a whole link", step)]
        if number == 0 and link.get("format", FORMAT) != FORMAT:
            raise RunDirError(f"{path}: a chain of format {link['format']}; this version reads format {FORMAT}")
        if link["hash"] != hash_of(link):
            return links, [Fault(number, f"line {number + 1} was changed: its hash is another", step)]
        if link["previous"] != previous or link["link"] != number:
            return links, [Fault(number, f"line {number + 1} does not continue the line before it", step)]
        previous = link["hash"]
        links.append(link)
    return links, []


def _link(raw: bytes) -> Link | None:
    """The link in a line; None for anything else."""
    try:
        link = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    known = {"link": int, "kind": str, "step": int, "previous": str, "hash": str}
    whole = isinstance(link, dict) and all(type(link.get(key)) is kind for key, kind in known.items())
    return link if whole else None


def hash_of(link: Mapping[str, Any]) -> str:
    """The hash of a link: of its line without `hash`."""
    return hashlib.sha256(json_line({key: value for key, value in link.items() if key != "hash"})).hexdigest()


def _is_watched(name: str) -> bool:
    return name.partition("/")[0] in (*FOLDERS, CHECKPOINTS)


def _path(folder: Path, name: str) -> Path:
    """The file that stands for a name of the chain: of a checkpoint, its manifest."""
    return folder / name / MANIFEST if name.startswith(f"{CHECKPOINTS}/") else folder / name


def _hash(path: Path) -> str:
    """A file's hash; "" for one that is gone again: retention may delete a checkpoint meanwhile."""
    try:
        return sha256_file(path)
    except FileNotFoundError:
        return ""
