"""What the server knows of sessions, models, samplers and checkpoints: read from the journal once, then kept in step.

Each record has a row in `store.SCHEMA`. A change is written first; what is in memory follows when it is on disk.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_gsm8k.serve.jobs import Refusal, Result
from grpo_gsm8k.serve.promise import Promise
from grpo_gsm8k.serve.store import Store

Kind = Literal["weights", "sampler_weights", "external_weights"]
TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
SCHEME = "tinker://"
LAST = "last"  # the notes with each model's last metrics
HISTORY = 240  # points of a model's curves
_NAME = re.compile(r"[^/\\\x00-\x1f\x7f]{1,200}")


@dataclass(eq=False)
class Entry:
    """A request that has not ended: on its way to the disk, waiting, or being worked on."""

    id: str
    kind: str
    owner: str
    body: bytes
    seq: int | None = None
    key: str | None = None
    created: float = field(default_factory=time.time)
    patience_s: float = 1e9  # for a gap before it
    accepted: Promise[None] = field(default_factory=Promise)
    done: Promise[Result] = field(default_factory=Promise)

    @property
    def digest(self) -> bytes:
        """What the request asked for, to tell its repetition from another request under its number."""
        return hashlib.sha256(self.kind.encode() + b"|" + self.body).digest()


@dataclass
class Session:
    """A client's visit; its models and samplers outlive it."""

    id: str
    created: float
    info: Mapping[str, Any]
    ended: float | None = None
    seen: float = field(default_factory=time.time)


@dataclass
class Model:
    """A model in training.

    Attributes:
        spec: fields of `adapters.ModelSpec`.
        snapshot, snapshot_seq: the folder with its state after that request; "" for none yet.
        applied: the last request that its state in memory, or after a replay, contains.
    """

    id: str
    session: str
    spec: Mapping[str, Any]
    metadata: Mapping[str, Any] | None
    created: float
    snapshot: str = ""
    snapshot_seq: int = 0
    steps: int = 0
    ended: float | None = None
    applied: int = 0
    seen: float = field(default_factory=time.time)
    history: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=HISTORY))
    last: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplerRow:
    """A sampling session: `folder` holds its weights, "" for the base; `path` where a client named them."""

    id: str
    session: str
    path: str | None
    folder: str
    owner: str
    created: float


@dataclass(frozen=True)
class Checkpoint:
    """Weights that a client named, in a folder of their own."""

    owner: str
    kind: Kind
    name: str
    folder: str
    created: float
    size: int
    public: bool = False
    expires: float | None = None
    metadata: Mapping[str, str] | None = None

    @property
    def path(self) -> str:
        """`tinker://RUN/KIND/NAME`."""
        return f"{SCHEME}{self.owner}/{self.kind}/{self.name}"

    @property
    def expired(self) -> bool:
        """Whether its time to live is over."""
        return self.expires is not None and self.expires <= time.time()


class Books:
    """All records, by id."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.sessions = {
            row["id"]: Session(row["id"], row["created"], json.loads(row["info"]), row["ended"])
            for row in store.read("SELECT * FROM sessions ORDER BY created")
        }
        self.models = {row["id"]: _model(row) for row in store.read("SELECT * FROM models ORDER BY created")}
        applied = store.read("SELECT owner, max(seq) AS seq FROM requests WHERE applied GROUP BY owner")
        for row in applied:
            if row["owner"] in self.models:
                self.models[row["owner"]].applied = row["seq"] or 0
        for model_id, last in store.notes(LAST).items():
            if model_id in self.models:
                self.models[model_id].last = last
        self.unborn = {
            row["owner"]: row["error"]
            for row in store.read(
                "SELECT owner, error FROM requests WHERE key = owner || '#create' AND state = 'failed'"
            )
        }
        self.samplers = {
            row["id"]: SamplerRow(**dict(row)) for row in store.read("SELECT * FROM samplers ORDER BY created")
        }
        rows = store.read("SELECT * FROM checkpoints ORDER BY created")
        self.checkpoints = {(row["owner"], row["kind"], row["name"]): _checkpoint(row) for row in rows}

    def session(self, session_id: str) -> Session:
        """Raises `Refusal` 404 for an unknown one."""
        found = self.sessions.get(session_id)
        if found is None:
            raise Refusal(f"there is no session {session_id[:100]!r} on this server", 404)
        return found

    def model(self, model_id: str) -> Model:
        """Raises `Refusal` 404 for an unknown one."""
        found = self.models.get(model_id)
        if found is None:
            raise Refusal(f"there is no training run {model_id[:100]!r} on this server", 404)
        return found

    def checkpoint(self, path: str) -> Checkpoint:
        """The checkpoint that a `tinker://` path names. Raises `Refusal` 400 or 404."""
        owner, kind, name = parse_path(path)
        found = self.checkpoints.get((owner, kind, name))
        if found is None or found.expired:
            raise Refusal(f"there is no checkpoint {path[:200]} on this server", 404)
        return found


def parse_path(path: str) -> tuple[str, Kind, str]:
    """(run, kind, name) of a path. Raises `Refusal` for what is none."""
    parts = path.removeprefix(SCHEME).split("/")
    if not path.startswith(SCHEME) or len(parts) != 3 or parts[1] not in TYPES or not all(parts):
        raise Refusal(
            f"{path[:200]!r} is no checkpoint's path: tinker://RUN/weights/NAME, or sampler_weights, external_weights"
        )
    return parts[0], parts[1], parts[2]  # type: ignore[return-value]


def check_name(name: Any) -> str:
    """A checkpoint's name. Raises `Refusal` for one that no path could hold."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (".", ".."):
        raise Refusal(f"{str(name)[:100]!r} is no name for a checkpoint: 1 to 200 characters, without a slash")
    return name


def insert(db: sqlite3.Connection, table: str, or_ignore: bool = False, **values: Any) -> None:
    """A row of a table; `or_ignore`: none where its key is taken."""
    names, marks, how = ", ".join(values), ", ".join("?" * len(values)), "OR IGNORE " if or_ignore else ""
    db.execute(f"INSERT {how}INTO {table}({names}) VALUES({marks})", tuple(values.values()))


def _model(row: sqlite3.Row) -> Model:
    metadata = json.loads(row["metadata"]) if row["metadata"] else None
    return Model(
        row["id"],
        row["session"],
        json.loads(row["spec"]),
        metadata,
        row["created"],
        row["snapshot"],
        row["snapshot_seq"],
        row["steps"],
        row["ended"],
        applied=row["snapshot_seq"],
    )


def _checkpoint(row: sqlite3.Row) -> Checkpoint:
    metadata = json.loads(row["metadata"]) if row["metadata"] else None
    return Checkpoint(**{**dict(row), "public": bool(row["public"]), "metadata": metadata})


class SeqQueue:
    """Holds a model's requests until those before them have come: clients number them from 1."""

    def __init__(self, expected: int = 1) -> None:
        self.expected = expected
        self.held: dict[int, tuple[Entry, float]] = {}

    def arrive(self, entry: Entry) -> list[Entry]:
        """The requests whose turn has come. Raises `Refusal` for a number that is past."""
        assert entry.seq is not None
        if entry.seq < self.expected:
            raise Refusal(f"seq_id {entry.seq} comes too late: the next one of this model is {self.expected}")
        self.held[entry.seq] = (entry, time.monotonic())
        ready = []
        while self.expected in self.held:
            ready.append(self.held.pop(self.expected)[0])
            self.expected += 1
        return ready

    def expire(self, patience_s: float) -> tuple[str, list[Entry]]:
        """Give up on a gap: why, and all requests that have waited behind it; the numbering goes on after them."""
        now = time.monotonic()
        waited = [now - since >= min(patience_s, entry.patience_s) for entry, since in self.held.values()]
        if not any(waited):
            return "", []
        missing, first = self.expected, min(self.held)
        failed = [self.held[seq][0] for seq in sorted(self.held)]
        self.expected = max(self.held) + 1
        self.held.clear()
        span = f"seq_id {missing}" + (f" to {first - 1}" if first - 1 > missing else "")
        return f"{span} did not arrive in time, so what comes behind it cannot be done", failed
