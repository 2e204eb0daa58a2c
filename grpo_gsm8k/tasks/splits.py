"""Generated examples and their splits: the hash of an example determines its split.

So train, validation and test are disjoint for all seeds, sizes and levels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo_gsm8k.errors import ConfigError

from .base import SPLITS, Split
from .dataset import write_splits

Row = dict[str, Any]
PATIENCE = 5_000  # draws in a row without a new example, after which the level counts as exhausted


def digest(identity: str) -> str:
    """The hash of an example's identity; its first digits form the id."""
    return hashlib.sha256(identity.encode()).hexdigest()


def split_of(digest: str) -> Split:
    """The split of an example: 90 % train, 5 % validation, 5 % test."""
    share = int(digest[:8], 16) % 100
    return "train" if share < 90 else "val" if share < 95 else "test"


def collect(name: str, split: Split, count: int, draw: Callable[[], tuple[str, Row] | None]) -> list[Row]:
    """Draw the first `count` distinct examples of a split. `draw` returns (identity, row), or None to draw again.

    Args:
        name: prefix of the rows' ids.

    Raises:
        ValueError: no new example in `PATIENCE` draws.
    """
    found: dict[str, Row] = {}
    stale = 0
    while len(found) < count:
        identity, row = draw() or ("", {})
        key = digest(identity)
        if row and split_of(key) == split and key not in found:
            found[key], stale = {"id": f"{name}-{key[:12]}", **row}, 0
            continue
        stale += 1
        if stale > PATIENCE:
            raise ValueError(
                f"only {len(found)} of {count} {split} examples found: ask for fewer, or for a harder level"
            )
    return list(found.values())


def write(
    folder: Path,
    seed: int,
    sizes: Mapping[str, int],
    draw: Callable[[Split, int, bool], list[Row]],
    teach: Callable[[Row, int], Row] | None = None,
) -> Path:
    """Write the rows that `draw(split, count, tiny)` returns for each split, and their manifest.

    Args:
        sizes: of each split, and `tiny`: small examples, the training ones with the solution that `teach` adds, where
            it is given.

    Raises:
        ConfigError: there are fewer different examples than `sizes` asks for.
    """
    tiny = bool(sizes.get("tiny"))
    try:
        rows = {str(split): draw(split, sizes[split], tiny) for split in SPLITS}
    except ValueError as fault:
        raise ConfigError(str(fault)) from None
    if tiny and teach:
        rows["train"] = [teach(row, seed) for row in rows["train"]]
    provenance = {"source": "generated", "seed": seed, "tiny": tiny}
    write_splits(folder, rows, provenance)
    return folder
