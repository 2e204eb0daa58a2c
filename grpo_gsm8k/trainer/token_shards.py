"""Stores rows of token ids as tensors: shards of one width, and a manifest with their hashes.

A shard of N rows and width L holds

    input_ids       (N, L) int64, padded on the left
    labels          (N, L) int64, the id where it is trained, -100 elsewhere; unshifted, as transformers takes them
    response_mask   (N, L) uint8, 1 where it is trained
    lengths         (N,) int64, number of a row's columns without padding
    pad_token_id    the padding id, which may also end rows
    meta            the lines of the input that it was made from

as safetensors (`meta` as JSON in the header) or as a dict for `torch.load(weights_only=True)`. Neither runs code when
it is read. The bytes depend on the rows alone.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from grpo_gsm8k.datatypes import Datum
from grpo_gsm8k.errors import DataError
from grpo_gsm8k.runs.files import read_json, sha256_file, write_atomic

MANIFEST = "manifest.json"
IGNORED = -100  # torch's cross_entropy leaves such a target out


def pack(rows: Sequence[Datum], width: int, pad_id: int) -> dict[str, torch.Tensor]:
    """Pack rows of at most `width` tokens into the tensors of a shard."""
    input_ids = torch.full((len(rows), width), pad_id)  # (N, L)
    mask = torch.zeros((len(rows), width), dtype=torch.uint8)  # (N, L)
    for n, row in enumerate(rows):
        input_ids[n, width - len(row.token_ids) :] = torch.tensor(row.token_ids)
        mask[n, width - len(row.mask) :] = torch.tensor(row.mask, dtype=torch.uint8)
    return {
        "input_ids": input_ids,
        "labels": torch.where(mask.bool(), input_ids, IGNORED),
        "response_mask": mask,
        "lengths": torch.tensor([len(row.token_ids) for row in rows], dtype=torch.int64),
        "pad_token_id": torch.tensor(pad_id),
    }


def unpack(shard: Mapping[str, Any]) -> list[Datum]:
    """Undo `pack`."""
    rows = []
    for ids, mask, length in zip(shard["input_ids"], shard["response_mask"], shard["lengths"].tolist(), strict=True):
        start = len(ids) - length
        rows.append(Datum(tuple(ids[start:].tolist()), tuple(mask[start:].tolist())))
    return rows


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], format: str) -> None:
    """Write a shard atomically. Through memory, since torch.save stores the file name, and ours is temporary."""
    if format == "safetensors":
        write_atomic(path, save(dict(tensors), {"meta": json.dumps(meta)}))
        return
    buffer = io.BytesIO()
    torch.save({**tensors, "pad_token_id": int(tensors["pad_token_id"]), "meta": dict(meta)}, buffer)
    write_atomic(path, buffer.getvalue())


def read_shard(path: Path, format: str) -> dict[str, Any]:
    """Read a shard's tensors and `meta`. Raises `DataError` for another file, or one that would run code."""
    try:
        if format == "pt":
            shard: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return shard
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()} | {  # noqa: SIM118  # no dict
                "meta": json.loads(handle.metadata()["meta"])
            }
    except (OSError, EOFError, SafetensorError, pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as fault:
        what = " ".join(str(fault).split())[:200]
        raise DataError(path, f"is not a shard of format {format}: {what}") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a complete folder of shards. Raises `DataError` otherwise."""
    path = folder / MANIFEST
    manifest = read_json(path) if path.is_file() else {}
    if "made_with" not in manifest:
        raise DataError(folder, f"holds no shards; make them with `grpo-gsm8k tokenize --out_dir {folder}`")
    if "shards" not in manifest:
        raise DataError(folder, "its shards are not complete; run the same `grpo-gsm8k tokenize` again")
    return manifest


def load_rows(folder: Path, made_with: Mapping[str, str | None], train_on: str) -> list[Datum]:
    """Read all rows of a folder of shards, in the order of the original file.

    Args:
        made_with: of the current renderer, see `Renderer.made_with`.

    Raises:
        DataError: the shards belong to another tokenizer, template or style, or are incomplete or damaged.
    """
    manifest = read_manifest(folder)
    wanted = {**made_with, "train_on": train_on}
    stored = {**manifest["made_with"], "train_on": manifest["train_on"]}
    if differ := [
        f"{key}: {stored.get(key)!r} then, {wanted[key]!r} now" for key in wanted if stored.get(key) != wanted[key]
    ]:
        raise DataError(
            folder, f"was tokenized for another model or style ({'; '.join(differ)}); run `grpo-gsm8k tokenize` again"
        )
    rows: list[Datum] = []
    for entry in manifest["shards"]:
        path = folder / Path(entry["file"]).name
        if not path.is_file() or sha256_file(path) != entry["sha256"]:
            raise DataError(path, f"is missing, or differs from {MANIFEST}; tokenize again")
        rows += unpack(read_shard(path, manifest["format"]))
    return rows
