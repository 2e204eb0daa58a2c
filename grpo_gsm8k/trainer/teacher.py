"""The teacher of a distillation: a frozen model that scores what the student sampled, and a cache of its scores.

    teacher = load_teacher(cfg, longest)
    cached = CachedTeacher(teacher, run / "teacher", limit=256 << 20)
    scores, metrics = cached.logprobs(rows, temperature)  # a number per id, as a learner's

The cache is on disk and in memory, both bounded by the same number of bytes. Nothing is ever evicted: a step whose new
scores do not fit closes the cache for good. So a resumed run finds for each row the very number that the uninterrupted
run had, though a row scored among others can differ in its last bits.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grpo_gsm8k.config import DistillConfig
from grpo_gsm8k.datatypes import Datum
from grpo_gsm8k.errors import CheckpointError, DataError, ModelError
from grpo_gsm8k.runs.files import atomic_path, write_atomic
from grpo_gsm8k.trainer import architecture, memory, packing
from grpo_gsm8k.trainer.batch import make_batch, unshifted
from grpo_gsm8k.trainer.data import Values
from grpo_gsm8k.trainer.kernels import choose_attention
from grpo_gsm8k.trainer.logprobs import check_head, token_logprobs
from grpo_gsm8k.trainer.policy import (
    context_length,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    weights_sha256,
)

KEY_BYTES = 16
ROW_BYTES = KEY_BYTES + 8  # of a cached row, besides 4 a token


class Teacher(Protocol):
    """Scores rows; `sha256` names its weights."""

    @property
    def sha256(self) -> str: ...

    def logprobs(self, data: Sequence[Datum], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """As `Learner.logprobs`. The temperature is the student's: both distributions are softmax(logits / T)."""
        ...


class FrozenTeacher:
    """A model in this process that is never trained."""

    def __init__(self, model: Any, cells: int = 0, packs: str = "auto") -> None:
        """
        Args:
            cells: of one forward pass, as `--max_tokens_per_microbatch`; 0 for what a deterministic learner takes.
            packs: as `--packing`.
        """
        self.model = model.eval().requires_grad_(False)
        architecture.compute_all_of_attention(model)
        choose_attention(model)
        self.packs = packing.chosen(model, packs)
        check_head(model)
        self.embeddings = int(model.get_input_embeddings().weight.shape[0])
        on_cpu = model.device.type == "cpu"
        self.cells = cells or (memory.CPU_CELLS if on_cpu else memory.FIXED_CELLS)

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of its weights."""
        return weights_sha256(self.model.named_parameters())

    @torch.no_grad()
    def logprobs(self, data: Sequence[Datum], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """See `Teacher`. Raises `ModelError` for an id that the teacher has no embedding for."""
        if (largest := max(max(row.token_ids) for row in data)) >= self.embeddings:
            raise ModelError(f"the student sampled id {largest}, its teacher has {self.embeddings} embeddings")
        batch = make_batch(data)
        out = torch.zeros_like(batch.mask)
        for rows, part in packing.microbatches(batch, self.cells, batch.rows_with_targets(), self.packs):
            logp, _ = token_logprobs(self.model, part.to(self.model.device), temperature, statistics=False)
            out[rows, : logp.shape[1]] = logp.cpu()
        return unshifted(out, batch.lengths)


def check_tokenizer(cfg: DistillConfig) -> None:
    """Raise `ModelError` if there is no such teacher, or its vocabulary is not the student's. Loads no weights."""
    check_vocabulary(load_tokenizer(cfg), load_tokenizer(config_of(cfg)), cfg.teacher)


def load_teacher(cfg: DistillConfig, longest: int) -> FrozenTeacher:
    """Load `--teacher`, in the student's dtype.

    Args:
        longest: tokens of the longest row that the student can sample.

    Raises:
        ModelError: it cannot be loaded, or its context is shorter than `longest`.
    """
    theirs = config_of(cfg)
    if cfg.teacher_engine == "vllm":  # which is handed the weights from main memory, in the dtype of its device
        dtype: Any = str(pick_dtype(theirs.dtype, pick_device(theirs.device))).removeprefix("torch.")
        theirs = replace(theirs, device="cpu", dtype=dtype)
    model = load_model(theirs)
    context = context_length(model) - (cfg.teacher_engine == "vllm")  # vLLM draws a token behind what it reads
    if longest > context:
        raise ModelError(
            f"--teacher {cfg.teacher}: reads {context} tokens, and the student's rows have up to {longest}; lower "
            "--max_new_tokens"
        )
    return FrozenTeacher(model, cfg.max_tokens_per_microbatch, cfg.packing)


def config_of(cfg: DistillConfig) -> DistillConfig:
    """The student's config with its teacher in the student's place."""
    device = cfg.teacher_device or cfg.device
    own = replace(cfg, model_id=cfg.teacher, revision=cfg.teacher_revision, tokenizer_id="", device=device)
    return replace(own, learner="torch", engine="hf", vllm_device="", vllm_devices="")  # wherever the student is


def check_vocabulary(student: Any, teacher: Any, name: str) -> None:
    """Raise `ModelError` unless every token has the same id in both tokenizers: the ids are what is scored."""
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine == theirs:
        return
    strange = [token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token)]
    first = min(strange, key=lambda token: (min(mine.get(token, 1 << 40), theirs.get(token, 1 << 40)), token))
    raise ModelError(
        f"--teacher {name}: has another vocabulary than the student ({len(theirs)} tokens against {len(mine)}; "
        f"{first!r} is id {theirs.get(first)} there and {mine.get(first)} here), so it cannot score the student's "
        "tokens; take a teacher with the same tokenizer"
    )


class AbsentTeacher:
    """Stands for the teacher of a run that is over: all that it said is in the cache."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the cache, whose first file names the teacher's weights."""
        self.folder, self.sha256 = folder, ""
        for path in sorted(folder.glob("part_*.safetensors"))[:1]:
            self.sha256 = _read_part(path)[0]

    def logprobs(self, data: Sequence[Datum], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """Raises `DataError`: these rows are not in the cache."""
        raise DataError(self.folder, "does not hold the teacher's scores of this step (--teacher_cache_mb)")


class CachedTeacher:
    """A teacher whose scores are kept in a folder: equal rows are scored once, also by a resumed run.

    The folder holds `part_000001.safetensors` and so on, one for each step that brought new rows: a hash of each row's
    ids, mask and temperature, where its scores end, and the scores of its trained tokens.
    """

    def __init__(self, teacher: Teacher, folder: Path, limit: int) -> None:
        """Read what an earlier process of this run has kept.

        Args:
            limit: bytes that the cache may hold; 0 keeps nothing.

        Raises:
            CheckpointError: a file is damaged, or was scored by another teacher.
        """
        self.teacher, self.folder, self.limit = teacher, folder, limit
        self.full = not limit or (folder / "full").exists()
        self.parts, self.bytes = 0, 0
        self._scores: dict[bytes, np.ndarray] = {}
        for path in sorted(folder.glob("part_*.safetensors")) if limit else ():
            self._read(path)

    @property
    def sha256(self) -> str:
        """The teacher's."""
        return self.teacher.sha256

    def logprobs(self, data: Sequence[Datum], temperature: float) -> tuple[list[tuple[float, ...]], dict[str, float]]:
        """Scores as the teacher's, and `perf/teacher_cached_frac`, the share of tokens that it had scored before."""
        keys = [_key(row, temperature) for row in data]
        fresh = {key: row for key, row in zip(keys, data, strict=True) if key not in self._scores}
        scored = dict(zip(fresh, self._trained_only(list(fresh.values()), temperature), strict=True))
        self._keep(scored)
        known = self._scores | scored
        values = [_spread(row, known[key]) for key, row in zip(keys, data, strict=True)]
        tokens, new = sum(sum(row.mask) for row in data), sum(map(len, scored.values()))
        return values, {"perf/teacher_cached_frac": 1 - new / max(tokens, 1)}

    def _trained_only(self, rows: Sequence[Datum], temperature: float) -> Iterator[np.ndarray]:
        found: Values = self.teacher.logprobs(rows, temperature) if rows else []
        for row, values in zip(rows, found, strict=True):
            yield np.array([value for value, m in zip(values, row.mask, strict=True) if m], np.float32)

    def _keep(self, scored: dict[bytes, np.ndarray]) -> None:
        """Store a step's new scores, all or none of them."""
        size = sum(ROW_BYTES + scores.nbytes for scores in scored.values())
        if self.full or not scored:
            return
        if self.bytes + size > self.limit:
            self.full = True
            write_atomic(self.folder / "full", "")
            return
        tensors = {
            "keys": np.frombuffer(b"".join(scored), np.uint8).reshape(-1, KEY_BYTES),
            "ends": np.cumsum([len(scores) for scores in scored.values()]),
            "logprobs": np.concatenate(list(scored.values())),
        }
        with atomic_path(self.folder / f"part_{self.parts + 1:06d}.safetensors") as temporary:
            save_file(tensors, temporary, {"teacher": self.sha256})
        self._scores |= scored
        self.parts, self.bytes = self.parts + 1, self.bytes + size

    def _read(self, path: Path) -> None:
        teacher, keys, ends, scores = _read_part(path)
        check_same_teacher(teacher, self.sha256, path)
        for key, part in zip(keys, np.split(scores, ends[:-1]), strict=True):
            self._scores[key.tobytes()] = part
        self.parts = int(path.stem.removeprefix("part_"))
        self.bytes += len(keys) * ROW_BYTES + scores.nbytes


def _read_part(path: Path) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """A file of a cache: the hash of the teacher's weights, keys, ends and scores."""
    try:
        with safe_open(path, "np") as stored:
            keys, ends, scores = (stored.get_tensor(name) for name in ("keys", "ends", "logprobs"))
            return (stored.metadata() or {}).get("teacher", ""), keys, ends, scores
    except (SafetensorError, OSError) as fault:
        raise CheckpointError(f"{path}: damaged ({fault}); delete the folder to score everything again") from None


def check_same_teacher(before: str, now: str, where: Path | str) -> None:
    """Raise `CheckpointError` where a run goes on with other teacher's weights than it began with."""
    if before != now:
        raise CheckpointError(
            f"{where}: its teacher's weights have changed since the run began ({before[:12]} then, {now[:12]} now); "
            "put them back, or pick another --out_dir"
        )


def _key(row: Datum, temperature: float) -> bytes:
    """Identifies a row by its ids and mask, and the temperature that it is scored at."""
    content = np.array([temperature]).tobytes() + np.array(row.token_ids, np.int64).tobytes() + bytes(row.mask)
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def _spread(row: Datum, scores: np.ndarray) -> tuple[float, ...]:
    """Scores of the trained tokens as one number per id."""
    found = iter(scores.tolist())
    return tuple(next(found) if m else 0.0 for m in row.mask)
