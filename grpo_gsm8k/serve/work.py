"""The work itself, on the one thread that owns torch: training requests and snapshots.

A model that is not in memory is its last snapshot plus the requests behind it, done again in order: after a crash, and
where it made room for others. So each request here is a function of that state and its own bytes.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_gsm8k.errors import DiskError, GrpoError, NonFiniteError
from grpo_gsm8k.runs.files import atomic_folder
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.serve.adapters import BaseModel, ModelSpec
from grpo_gsm8k.serve.bodies import (
    KNOWN,
    KNOWN_FIELDS,
    adam_of,
    check_ttl,
    refuse_unknown,
    training_job,
    unpack,
)
from grpo_gsm8k.serve.books import LAST, Books, Checkpoint, Entry, Kind, Model, SamplerRow, check_name, insert
from grpo_gsm8k.serve.jobs import Refusal
from grpo_gsm8k.serve.learn import Trained
from grpo_gsm8k.serve.settings import ServeConfig
from grpo_gsm8k.serve.store import put
from grpo_gsm8k.trainer.policy import weights_sha256

CHANGES_STATE = ("forward_backward", "optim_step", "load_weights")
ROOM_S = 2.0  # between attempts to write to a full disk
MOST_REPLAYED = 32  # requests for each of `--snapshot_every`
HASH = "weights_sha256"
"""A key of a checkpoint's user_metadata that, sent with an empty text, comes back with the hash of what was saved."""


@dataclass
class Outcome:
    """What a request led to.

    Attributes:
        changes: to be written together with the result.
        after: to be done in memory when that is on disk.
        replays: whether the request's bytes are needed to make the model's state again.
    """

    value: Any
    changes: list[Callable[[sqlite3.Connection], Any]] = field(default_factory=list)
    after: list[Callable[[], Any]] = field(default_factory=list)
    replays: bool = False


class Workshop:
    """Models in memory, the least recently used one making room; and their files below `folder`."""

    def __init__(self, cfg: ServeConfig, base: BaseModel, books: Books, folder: Path) -> None:
        self.cfg, self.base, self.books, self.folder = cfg, base, books, folder
        self.models: OrderedDict[str, Trained] = OrderedDict()
        self.names = 0
        self.stopping = threading.Event()
        self.snapshot_steps: dict[str, int] = {}

    # ------------------------------------------------------------------------------------------------ requests

    def run(self, entry: Entry) -> Outcome:
        """Do a training request. Raises `GrpoError` where it fails; the model is what it was."""
        model = self.books.model(entry.owner)
        if model.ended:
            raise Refusal(f"{model.id} was unloaded")
        if model.id in self.books.unborn:
            raise Refusal(f"this model could not be made: {self.books.unborn[model.id]}")
        try:
            outcome = self._do(entry, model, self.held(model))
        except GrpoError as fault:
            if entry.seq is None:
                self.books.unborn[model.id] = str(fault)
                self.lose(model.id)
            if isinstance(fault, NonFiniteError):  # an optimizer step that is refused has dropped the gradient
                model.applied = entry.seq or 0
            raise
        model.applied = seq = entry.seq or 0
        trained = self.models.get(model.id)
        if trained is None:  # it was unloaded
            return outcome
        steps = trained.steps - self.snapshot_steps.get(model.id, 0)
        if steps >= self.cfg.snapshot_every or seq - model.snapshot_seq >= MOST_REPLAYED * self.cfg.snapshot_every:
            try:
                self._snapshot(model, trained, seq, outcome)
            except DiskError as full:
                say(f"{model.id}: no snapshot of its state now, its requests are kept: {full}")
        return outcome

    def _do(self, entry: Entry, model: Model, trained: Trained) -> Outcome:
        kind, body = unpack(entry.body)
        if entry.kind == "forward_backward":
            job = training_job(kind, body)
            found = trained.forward_backward(job)
            model.last |= found.metrics
            return Outcome(found, replays=not job.forward_only)
        if entry.kind == "create_model":
            return Outcome({"type": "create_model", "model_id": model.id})
        sent = json.loads(body)
        refuse_unknown(sent, KNOWN_FIELDS | KNOWN[entry.kind])
        if entry.kind == "optim_step":
            return self._optim_step(sent, entry, model, trained)
        if entry.kind == "load_weights":
            return self._load(sent, entry, model, trained)
        if entry.kind == "save_weights":
            return self._save(sent, entry, trained, "weights")
        if entry.kind == "save_weights_external":
            return self._save(sent, entry, trained, "external_weights")
        if entry.kind == "save_weights_for_sampler":
            if sent.get("path") is not None:
                return self._save(sent, entry, trained, "sampler_weights")
            return self._snapshot_for_sampler(sent, entry, model, trained)
        assert entry.kind == "unload_model", entry.kind
        return self._unload(entry, model)

    def _optim_step(self, sent: Any, entry: Entry, model: Model, trained: Trained) -> Outcome:
        metrics = trained.optim_step(adam_of(sent))
        model.steps = trained.steps
        model.last |= metrics
        model.history.append({"time": time.time(), "step": model.steps, **model.last})
        last = dict(model.last)
        return Outcome({"metrics": metrics}, [lambda db: put(db, LAST, model.id, last)], replays=True)

    def _load(self, sent: Any, entry: Entry, model: Model, trained: Trained) -> Outcome:
        found = self.books.checkpoint(str(sent.get("path")))
        trained.load(self.folder / found.folder, optimizer=bool(sent.get("optimizer")))
        outcome = Outcome({"type": "load_weights", "path": found.path, "model_id": model.id})
        model.steps = trained.steps
        try:  # at once: the checkpoint may be deleted before the next snapshot is due
            self._snapshot(model, trained, entry.seq or 0, outcome)
        except DiskError:
            self.lose(model.id)
            raise
        return outcome

    def _save(self, sent: Any, entry: Entry, trained: Trained, kind: Kind) -> Outcome:
        name = check_name(sent.get("path"))
        if sent.get("age_encryption_recipients"):
            raise Refusal("age_encryption_recipients: weights are not encrypted here")
        taken = self.books.checkpoints.get((entry.owner, kind, name))
        if taken and not taken.expired and not sent.get("overwrite"):
            raise Refusal(f"{taken.path} exists already; pass overwrite, or another name")
        folder = self._write(entry, trained, optimizer=kind == "weights")
        ttl, metadata = sent.get("ttl_seconds"), sent.get("user_metadata")
        if isinstance(metadata, dict) and metadata.get(HASH) == "":
            metadata = {**metadata, HASH: weights_sha256(trained.parameters.items())}
        made = Checkpoint(
            entry.owner,
            kind,
            name,
            folder,
            time.time(),
            sum(path.stat().st_size for path in (self.folder / folder).rglob("*") if path.is_file()),
            False,
            time.time() + check_ttl(ttl) if ttl is not None else None,
            metadata if isinstance(metadata, dict) else None,
        )
        value: dict[str, Any] = {"type": entry.kind, "path": made.path}
        if kind == "external_weights":
            value["size_bytes"] = made.size
        return Outcome(value, [lambda db: write_checkpoint(db, made)], [lambda: self._take(made, taken)])

    def _take(self, made: Checkpoint, taken: Checkpoint | None) -> None:
        self.books.checkpoints[made.owner, made.kind, made.name] = made
        if taken and not any(row.folder == taken.folder for row in self.books.samplers.values()):
            self.forget_folder(taken.folder)

    def _snapshot_for_sampler(self, sent: Any, entry: Entry, model: Model, trained: Trained) -> Outcome:
        number = sent.get("sampling_session_seq_id")
        name = f"{model.session}:sample:{number}" if type(number) is int else f"{entry.id}:sample"
        if name in self.books.samplers:
            raise Refusal(f"sampling session {number} of this session exists already")
        row = SamplerRow(name, model.session, None, self._write(entry, trained, optimizer=False), model.id, time.time())
        value = {"type": entry.kind, "path": None, "sampling_session_id": name}
        return Outcome(
            value,
            [lambda db: insert(db, "samplers", **vars(row))],
            [lambda: self.books.samplers.__setitem__(name, row)],
        )

    def _write(self, entry: Entry, trained: Trained, optimizer: bool) -> str:
        """The model's files in a folder named after the request, so that doing it again replaces them."""
        name = f"checkpoints/{entry.id}"
        shutil.rmtree(self.folder / name, ignore_errors=True)
        with atomic_folder(self.folder / name) as temporary:
            trained.save(temporary, optimizer)
        return name

    def _unload(self, entry: Entry, model: Model) -> Outcome:
        self.models.pop(model.id).close()
        now = time.time()
        return Outcome(
            {"type": "unload_model", "model_id": model.id},
            [lambda db: db.execute("UPDATE models SET ended = ? WHERE id = ?", (now, model.id))],
            [lambda: setattr(model, "ended", now)],
        )

    # --------------------------------------------------------------------------------------- models in memory

    def held(self, model: Model) -> Trained:
        """The model in memory, brought there if need be; the others' order of use is kept."""
        if model.id in self.models:
            self.models.move_to_end(model.id)
            return self.models[model.id]
        self.books.store.write(lambda db: None, insist=True).result()  # results and snapshots on their way to the disk
        whole = [] if model.spec["rank"] else [id for id, other in self.models.items() if other.own is not None]
        for other in whole:  # one set of whole weights at a time
            self.evict(other)
        while len(self.models) >= self.cfg.max_models:
            self.evict(next(iter(self.models)))
        self.names += 1
        trained = Trained(self.base, f"m{self.names}", ModelSpec(**model.spec), self.cfg.max_tokens_per_microbatch)
        try:
            if model.snapshot:
                trained.load(self.folder / model.snapshot, optimizer=True)
            self.snapshot_steps[model.id] = trained.steps
            self._replay(model, trained)
        except BaseException:
            trained.close()
            raise
        self.models[model.id] = trained
        return trained

    def _replay(self, model: Model, trained: Trained) -> None:
        """Do again what is behind the snapshot, with the results that it had."""
        rows = self.books.store.read(
            "SELECT * FROM requests WHERE owner = ? AND applied AND seq > ? AND seq <= ?"
            " AND body IS NOT NULL ORDER BY seq",
            *(model.id, model.snapshot_seq, model.applied),
        )
        for row in rows:
            if row["kind"] not in CHANGES_STATE or row["body"] is None:  # forward passes keep none: they change nothing
                continue
            kind, body = unpack(row["body"])
            try:
                if row["kind"] == "forward_backward":
                    trained.forward_backward(training_job(kind, body))
                elif row["kind"] == "optim_step":
                    trained.optim_step(adam_of(json.loads(body)))
            except GrpoError as again:
                if row["state"] != "failed":
                    raise GrpoError(
                        f"{model.id}: request {row['seq']} failed when it was done again: {again}"
                    ) from None
        if rows:
            say(f"{model.id}: {len(rows)} requests done again behind its snapshot")
        model.steps = trained.steps

    def evict(self, model_id: str) -> None:
        """Write a model's state to disk and let go of it; on a full disk, when there is room again.

        Raises:
            DiskError: the disk is full while the server ends.
        """
        model, trained = self.books.model(model_id), self.models[model_id]
        if model.applied > model.snapshot_seq:
            outcome = Outcome(None)
            while True:
                try:
                    self._snapshot(model, trained, model.applied, outcome)
                    break
                except DiskError as full:
                    if self.stopping.wait(ROOM_S):
                        raise
                    say(f"{model.id}: waits for room on the disk: {full}")
            self.books.store.write(lambda db: [change(db) for change in outcome.changes], insist=True).result()
            for step in outcome.after:
                step()
        self.lose(model_id)

    def lose(self, model_id: str) -> None:
        """Forget a model's state in memory; it is made anew from its snapshot and its requests."""
        if model_id in self.models:
            self.models.pop(model_id).close()

    def _snapshot(self, model: Model, trained: Trained, seq: int, outcome: Outcome) -> None:
        """Write the model's state; it counts once the outcome is on disk, and then the requests' bytes may go."""
        name = f"models/{model.id.replace(':', '_')}-{seq:09d}"
        shutil.rmtree(self.folder / name, ignore_errors=True)
        with atomic_folder(self.folder / name) as temporary:
            trained.save(temporary, optimizer=True)
        self.snapshot_steps[model.id] = steps = trained.steps

        def write(db: sqlite3.Connection) -> None:
            values = (name, seq, steps, model.id)
            db.execute("UPDATE models SET snapshot = ?, snapshot_seq = ?, steps = ? WHERE id = ?", values)
            db.execute("UPDATE requests SET body = NULL WHERE owner = ? AND seq <= ?", (model.id, seq))

        def take() -> None:
            before, model.snapshot, model.snapshot_seq = model.snapshot, name, seq
            if before and before != name:
                shutil.rmtree(self.folder / before, ignore_errors=True)

        outcome.changes.append(write)
        outcome.after.append(take)

    def forget_folder(self, folder: str) -> None:
        """Delete a checkpoint's files; what is sampled from it now may end."""
        shutil.rmtree(self.folder / folder, ignore_errors=True)


def write_checkpoint(db: sqlite3.Connection, made: Checkpoint) -> None:
    """A checkpoint's row, in place of one of its name."""
    db.execute("DELETE FROM checkpoints WHERE owner = ? AND kind = ? AND name = ?", (made.owner, made.kind, made.name))
    metadata = json.dumps(made.metadata) if made.metadata is not None else None
    insert(db, "checkpoints", **{**vars(made), "metadata": metadata})
