"""A folder of splits: train.jsonl, val.jsonl, test.jsonl, and a manifest with their hashes.

A set that is only evaluated has test.jsonl alone, and seeds.jsonl if its problems are rewritten ones.

`manifest.json` is written last. It holds no time and no path, so the same rows give the same bytes anywhere. Writing
the same rows again only verifies the files; writing other rows into an existing folder is refused. A killed command
leaves no manifest, and the next one writes the files again.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from grpo_gsm8k.errors import DataError
from grpo_gsm8k.runs.files import (
    json_line,
    parse_line,
    read_json,
    read_jsonl,
    read_lines,
    sha256_file,
    write_json,
    write_jsonl,
)
from grpo_gsm8k.tasks.base import SPLITS, Task, load_examples

FORMAT = 1
MEND = "restore it, or delete the folder and run again"
ASKED = ("question", "messages", "problem")
LAYOUTS: tuple[tuple[str, ...], ...] = (SPLITS, ("test",), ("seeds", "test"))
Row = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
        path: the file.
        provenance: what the splits were made from, for GSM8K `source`, `revision`, `seed` and `eval_n`.
        counts: problems in each split.
        files: sha256 of each split's file.
        content: sha256 of each split's ids, questions and answers in order, however the file is formatted.
    """

    path: Path
    provenance: dict[str, Any]
    counts: dict[str, int]
    files: dict[str, str]
    content: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        parts = {"counts": self.counts, "files": self.files, "content": self.content}
        return {"format": FORMAT, **self.provenance, **parts}


def write_splits(
    out_dir: Path, splits: Mapping[str, Sequence[Row]], provenance: Mapping[str, Any], task: Task | None = None
) -> Path:
    """Write a file for each split and, last, `manifest.json`; or verify them, row by row.

    Args:
        out_dir: made if missing.
        splits: the rows of exactly the splits of one of `LAYOUTS`, none empty, each with an id, no id twice.
        provenance: what the rows were made of (plain JSON values); goes into the manifest.
        task: describes the error of a row that was changed.

    Returns:
        The path of the manifest.

    Raises:
        DataError: the folder holds other data, or a row of it was changed: names the file and the line.
    """
    out_dir = Path(out_dir)
    names = next((layout for layout in LAYOUTS if set(layout) == set(splits)), ())
    assert names and all(splits.values()), f"the splits must be those of a layout, none empty: {', '.join(splits)}"
    ids = [row["id"] for rows in splits.values() for row in rows]
    assert len(set(ids)) == len(ids), "an id occurs twice"
    rows = {split: list(splits[split]) for split in names}
    manifest = Manifest(
        path=out_dir / "manifest.json",
        provenance=json.loads(json.dumps(dict(provenance))),
        counts={split: len(rows[split]) for split in names},
        files={f"{split}.jsonl": _sha256(map(json_line, rows[split])) for split in names},
        content={split: content_sha256(rows[split]) for split in names},
    )
    if manifest.path.exists():
        existing = read_manifest(out_dir)
        refuse_difference(existing, manifest.provenance)
        for split in names:
            _compare(out_dir / f"{split}.jsonl", rows[split], task)
        if existing != manifest:
            raise DataError(manifest.path, f"was changed after it was written; {MEND}")
        return manifest.path
    for split in names:
        _refuse_foreign(out_dir / f"{split}.jsonl", tuple(rows[split][0]))
    for split in names:
        write_jsonl(out_dir / f"{split}.jsonl", rows[split])
    write_json(manifest.path, manifest.as_json())
    return manifest.path


def verify(out_dir: Path, task: Task) -> Manifest:
    """Read every split and recompute every hash of the manifest.

    Raises:
        DataError: a file is missing, broken, or not what the manifest says.
    """
    manifest = read_manifest(Path(out_dir))
    line_of: dict[str, str] = {}
    for split in manifest.counts:
        path = Path(out_dir) / f"{split}.jsonl"
        if not path.exists():
            raise DataError(path, f"is missing, though the manifest lists it; {MEND}")
        for line, example in enumerate(load_examples(task, path), 1):
            first = line_of.setdefault(example.id, f"{path.name}:{line}")
            if first != f"{path.name}:{line}":
                raise DataError(path, f"duplicate id {example.id!r}: it is in {first} already", line)
        rows = [row for _, row in read_jsonl(path)]
        facts = (len(rows), sha256_file(path), content_sha256(rows))
        if facts != (manifest.counts[split], manifest.files[path.name], manifest.content[split]):
            raise DataError(path, f"is not what the manifest says: one of them was changed; {MEND}")
    return manifest


def reserve(train: Sequence[T], n: int, seed: int) -> tuple[list[T], list[T]]:
    """Train and validation rows: `random.Random(seed)` shuffles the indices, the first `n` are the validation rows.

    Both keep the order that they came in, and a smaller `n` reserves a subset of a larger one's.
    """
    order = list(range(len(train)))
    random.Random(seed).shuffle(order)
    chosen = set(order[:n])
    return [row for i, row in enumerate(train) if i not in chosen], [train[i] for i in sorted(chosen)]


def content_sha256(rows: Iterable[Row]) -> str:
    """Hash of ids, questions and answers in order: one JSON array `[id, question, answer]` a line, UTF-8."""
    arrays = ([row["id"], next((row[key] for key in ASKED if key in row), None), row.get("answer")] for row in rows)
    return _sha256((json.dumps(array, ensure_ascii=False) + "\n").encode() for array in arrays)


def read_manifest(out_dir: Path) -> Manifest:
    path = out_dir / "manifest.json"
    if not path.exists():
        raise DataError(path, f"does not exist; make the data with `grpo-gsm8k data --out_dir {out_dir}`")
    fields = read_json(path)
    if fields.pop("format", None) != FORMAT:
        raise DataError(path, f"is not a data manifest of format {FORMAT}; choose another folder")
    try:
        counts, files, content = (fields.pop(key) for key in ("counts", "files", "content"))
        whole = set(counts) == set(content) and set(files) == {f"{split}.jsonl" for split in counts}
        sound = whole and any(set(counts) == set(layout) for layout in LAYOUTS)
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise DataError(path, f"is damaged; {MEND}")
    return Manifest(path, provenance=fields, counts=counts, files=files, content=content)


def refuse_difference(manifest: Manifest, provenance: Mapping[str, Any]) -> None:
    there, asked = manifest.provenance, provenance
    keys = [key for key in dict.fromkeys([*asked, *there]) if there.get(key) != asked.get(key)]
    if keys:
        what = ", ".join(f"{key} {there.get(key)!r} and not {asked.get(key)!r}" for key in keys)
        raise DataError(manifest.path, f"was made with {what}; choose another --out_dir")


def _refuse_foreign(path: Path, keys: tuple[str, ...]) -> None:
    """Without a manifest, replace only files of an earlier, killed run."""
    if not path.exists():
        return
    try:
        _, row = next(iter(read_jsonl(path)))
    except DataError:
        row = {}
    if tuple(row) != keys:
        raise DataError(path, "was there before and is not of this command; choose another --out_dir")


def _compare(path: Path, rows: Sequence[Row], task: Task | None) -> None:
    """Raise `DataError` for the first row that differs from the expected one."""
    if not path.exists():
        raise DataError(path, f"is missing, though the manifest lists it; {MEND}")
    line = 0
    for line, raw in read_lines(path):
        if line > len(rows):
            raise DataError(path, f"has a row too many; {MEND}", line)
        expected = rows[line - 1]
        if raw != json_line(expected):
            try:
                found = parse_line(raw)
                if task:
                    task.example(found)
            except ValueError as fault:
                raise DataError(path, f"was changed after it was written: {fault}; {MEND}", line) from None
            keys = [key for key in expected if found.get(key) != expected[key]]
            what = f"{', '.join(keys)} of {expected['id']}" if keys else f"the form of {expected['id']}"
            raise DataError(path, f"{what} was changed after it was written; {MEND}", line)
    if line < len(rows):
        raise DataError(path, f"the row of {rows[line]['id']} is missing; {MEND}", line + 1)


def _sha256(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
