"""Checkpoints: written completely or not at all, and verified by their hashes before use.

`checkpoints/step_000020/` is a model folder that transformers loads, plus `optimizer/` (one file, or one of each rank
that trained), `state.json` (the stage's own counters) and, written last, `manifest.json` with the sha256 of every file.
The folder is filled under a temporary name, fsynced, then renamed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from grpo_gsm8k.errors import CheckpointError, DiskError
from grpo_gsm8k.runs.files import disk_errors, sha256_file, sync_tree, write_json

MANIFEST = "manifest.json"
DELETED = ".deleted_"  # before its step, the name of a checkpoint that is on its way out


def write(root: Path, step: int, fill: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` below `root`.

    Args:
        fill: writes the learner's files into the given folder.
        state: the stage's counters; JSON.

    Raises:
        DiskError: the disk is full; earlier checkpoints are unchanged.
    """
    final, temporary = root / f"step_{step:06d}", root / f".writing_{step:06d}"
    with disk_errors(final):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            fill(temporary)
            write_json(temporary / "state.json", {"step": step, **state})
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            hashes = {str(path.relative_to(temporary)): sha256_file(path) for path in files}
            write_json(temporary / MANIFEST, {"step": step, "sha256": hashes})
            sync_tree(temporary)
            if final.exists():  # only one that failed its hashes can be in the way
                shutil.rmtree(final)
            temporary.rename(final)
        except SafetensorError as fault:  # safetensors wraps the operating system's error
            raise DiskError(f"{final}: cannot be written: {fault}; earlier checkpoints are untouched") from fault
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def verify(folder: Path) -> dict[str, Any]:
    """Verify all hashes of a checkpoint, and return its `state.json`.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, digest in manifest["sha256"].items():
            if sha256_file(folder / name) != digest:
                raise CheckpointError(f"{folder / name}: damaged, its sha256 is not the manifest's")
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, KeyError) as fault:
        raise CheckpointError(f"{folder}: not a whole checkpoint: {fault}") from None
    return state


def steps_present(root: Path) -> list[int]:
    """The steps that have a checkpoint folder, in ascending order."""
    matches = (re.fullmatch(r"step_(\d{6,})", path.name) for path in root.glob("step_*"))
    return sorted(int(match.group(1)) for match in matches if match)


def newest(root: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint with its state; None if there is no checkpoint.

    Reports a damaged one through `warn`, and uses the one before it.

    Raises:
        CheckpointError: all checkpoints are damaged.
    """
    present = [root / f"step_{step:06d}" for step in reversed(steps_present(root))]
    for folder in present:
        try:
            return folder, verify(folder)
        except CheckpointError as fault:
            warn(f"{fault}; trying the checkpoint before it")
    if present:
        raise CheckpointError(f"{root}: all checkpoints are damaged; start again in another --out_dir")
    return None


def retain(root: Path, keep_last: int, best: int | None, forget: Callable[[Path], None] = lambda folder: None) -> None:
    """Delete all but the last `keep_last` checkpoints and the best one.

    A kill leaves none of them half deleted: each is renamed first.

    Args:
        forget: is called with each folder before it is deleted; after a kill, perhaps once more.
    """
    for left in root.glob(f"{DELETED}*"):
        shutil.rmtree(left)
    steps = steps_present(root)
    for step in steps[: -max(keep_last, 1)]:
        if step != best:
            forget(root / f"step_{step:06d}")
            shutil.rmtree((root / f"step_{step:06d}").rename(root / f"{DELETED}{step:06d}"))
