"""The heart of the service: requests are numbered, put on disk, ordered and answered.

The wires (routers of the web application) call `Service` from the event loop and only await. Whatever a request needs
to be done again after a crash is in the journal before its id is returned; its result is there before it is handed out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import json
import secrets
import sqlite3
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from grpo_gsm8k.repro import derive_seed
from grpo_gsm8k.runs.progress import talk
from grpo_gsm8k.serve import codec, data, upkeep, watch
from grpo_gsm8k.serve.adapters import BaseModel, ModelSpec
from grpo_gsm8k.serve.books import Books, Entry, Model, SeqQueue, Session, insert
from grpo_gsm8k.serve.engine import Engine, job_of
from grpo_gsm8k.serve.jobs import Base, Refusal, Result, SampledSequence, SampleJob, SampleResult
from grpo_gsm8k.serve.settings import ServeConfig
from grpo_gsm8k.serve.store import Store
from grpo_gsm8k.serve.work import JSON_BODY, Outcome, Workshop, is_path, pack, unpack

MOST_SAMPLES, MOST_TOPK, MOST_MODELS = 1024, 128, 10_000
REFUSALS = 200  # that the page shows
SHOWN_TOKENS = 400  # of a sample there
MOST_WAITING = 100_000  # requests


class Service:
    """What the wires stand on. Every coroutine that takes a `key` is idempotent: the same key, the same request."""

    def __init__(self, cfg: ServeConfig, base: BaseModel, store: Store, folder: Path) -> None:
        """`folder` holds the checkpoints and snapshots that `store` speaks of."""
        self.cfg, self.store, self.folder = cfg, store, folder
        name = cfg.served_name or cfg.model_id
        self.base = Base(name, base.folder, base.renderer, base.context, base.vocabulary)
        self.used: dict[str, float] = {}  # when a sampling session was last asked
        self._numbers = itertools.count(1 + (store.read("SELECT max(number) AS n FROM requests")[0]["n"] or 0))
        self.books = Books(store)
        self.work = Workshop(cfg, base, self.books, folder)
        self.engine = Engine(self.work, self._finish)
        self.started, self.draining = time.time(), False
        self.totals: Counter[str] = Counter()
        self.samples: deque[dict[str, str]] = deque(maxlen=20)
        self.refusals: deque[dict[str, Any]] = deque(maxlen=REFUSALS)
        self.fetched: dict[str, float] = {}
        self._lock = threading.RLock()
        self._next_text = 0.0
        self._live: dict[str, Entry] = {}
        self._keys: dict[str, Entry] = {}
        self._queues: dict[str, SeqQueue] = {}

    def start(self) -> None:
        """Take up what the journal says is still to be done, and begin to work."""
        for row in self.store.read(
            "SELECT owner, max(seq) AS seq FROM requests WHERE state != 'waiting' GROUP BY owner"
        ):
            if row["owner"] in self.books.models:
                self._queues[row["owner"]] = SeqQueue((row["seq"] or 0) + 1)
        for row in self.store.read("SELECT * FROM requests WHERE state = 'waiting' ORDER BY created, seq"):
            fields = {name: row[name] for name in ("id", "kind", "owner", "body", "seq", "key", "created")}
            entry = Entry(**fields)
            self._register(entry)
            entry.accepted.set(None)
            self._enqueue(entry)
        upkeep.remove_orphans(self)
        if self._live:
            talk(f"{len(self._live)} requests were waiting when the server ended; they are done now")
        self.engine.start()

    def close(self) -> None:
        """End what is being done, write the models' states, and close the journal. Requests that wait are kept."""
        self.draining = True
        self.engine.stop()
        with self._lock:
            held = list(self.work.models)
        for model_id in held if not self.store.fault else ():
            self.work.evict(model_id)
        self.store.close()

    # --------------------------------------------------------------------------------------------- any request

    async def submit(
        self,
        kind: str,
        owner: str,
        body: bytes,
        *,
        seq: int | None = None,
        key: str | None = None,
        patience_s: float = 1e9,
        changes: Sequence[Callable[[sqlite3.Connection], Any]] = (),
        then: Callable[[], Any] = lambda: None,
    ) -> str:
        """Accept a request: its id, once it is on disk.

        Args:
            body: see `work.pack`.
            key: of a request that may be sent again.
            patience_s: how long it waits for smaller numbers, at most `--gap_s`.
            changes: written together with it.
            then: called when that is done.

        Raises:
            DiskError: the disk is full, and nothing was accepted.
        """
        with self._lock:
            entry = self._keys.get(key or "")
            if entry is None and key and (known := self.store.read("SELECT id FROM requests WHERE key = ?", key)):
                return str(known[0]["id"])
            if entry is None:
                if len(self._live) >= MOST_WAITING:
                    raise Refusal(f"{MOST_WAITING} requests are waiting; try again later", 429)
                entry = Entry(uuid.uuid4().hex, kind, owner, body, seq, key, patience_s=patience_s)
                self._register(entry)
                self.store.write(functools.partial(_insert_request, entry, tuple(changes))).add_done_callback(
                    functools.partial(self._accepted, entry, then)
                )
        await entry.accepted.get()
        return entry.id

    async def result(self, request_id: str, timeout: float) -> Result | None:
        """How a request ended; None if it has not within `timeout` seconds. Raises `Refusal` 404 for an unknown id."""
        entry = self._live.get(request_id)
        if entry is None:
            return self._stored(request_id)
        try:
            found = await entry.done.get(timeout if not self.draining else 0.05)
        except TimeoutError:
            return None
        self.fetched[request_id] = time.time()
        return found

    async def wait(self, request_id: str) -> Any:
        """The value of a request, however long it takes. Raises `Refusal` with its error where it failed."""
        found = None
        while found is None:
            found = await self.result(request_id, 60.0)
            if found is None and self.draining:
                raise Refusal("the server is ending; ask again when it is back", 503)
        if found.error:
            raise Refusal(found.error, 400 if found.category == "user" else 500)
        return found.value

    def _stored(self, request_id: str) -> Result:
        rows = self.store.read("SELECT * FROM requests WHERE id = ?", request_id)
        if not rows:
            raise Refusal(f"there is no request {request_id[:100]!r} on this server", 404)
        row = rows[0]
        self.fetched[request_id] = time.time()
        if row["error"] is not None:
            return Result(row["kind"], error=row["error"], category=row["category"])
        if row["result"] is None:
            raise Refusal(f"the result of request {request_id[:100]!r} has been fetched and is no longer kept", 404)
        return Result(row["kind"], codec.decode(row["kind"], row["result"]), encoded=row["result"])

    def _register(self, entry: Entry) -> None:
        self._live[entry.id] = entry
        if entry.key:
            self._keys[entry.key] = entry

    def _forget(self, entry: Entry) -> None:
        self._live.pop(entry.id, None)
        if entry.key:
            self._keys.pop(entry.key, None)

    def _accepted(self, entry: Entry, then: Callable[[], Any], written: Future[Any]) -> None:
        """The request is on disk, or cannot be."""
        error = written.exception()
        if error is not None:
            with self._lock:
                self._forget(entry)
            entry.accepted.fail(error)
            return
        self.totals["requests"] += 1
        then()
        self._enqueue(entry)
        entry.accepted.set(None)

    def _enqueue(self, entry: Entry) -> None:
        """Give a request to the engine as soon as its turn has come."""
        try:
            with self._lock:
                if entry.kind == "sample":
                    self.engine.put(entry, self.folder_of(entry.owner))
                elif entry.seq is None:
                    self.engine.put(entry)
                else:
                    for ready in self._queue(entry.owner).arrive(entry):
                        self.engine.put(ready)
        except Refusal as refusal:
            self._finish(entry, Result(entry.kind, error=str(refusal)), Outcome(None), False)

    def _queue(self, model_id: str) -> SeqQueue:
        return self._queues.setdefault(model_id, SeqQueue())

    def expire_gaps(self) -> None:
        """Fail requests that have waited too long for one with a smaller number. Called now and then."""
        with self._lock:
            expired = [queue.expire(self.cfg.gap_s) for queue in self._queues.values()]
        for why, entries in expired:
            for entry in entries:
                self._finish(entry, Result(entry.kind, error=why), Outcome(None), False)

    def _finish(self, entry: Entry, result: Result, outcome: Outcome, applied: bool) -> None:
        """Write how a request ended, then tell those who wait for it."""

        if not result.error:
            result = dataclasses.replace(result, encoded=codec.encode(result.value))

        def write(db: sqlite3.Connection) -> None:
            replays = applied and (outcome.replays or bool(result.error))
            db.execute(
                "UPDATE requests SET state = ?, applied = ?, result = ?, error = ?, category = ?, finished = ?,"
                " number = ?" + ("" if replays else ", body = NULL") + " WHERE id = ?",
                (
                    *("failed" if result.error else "done", applied, result.encoded or None, result.error or None),
                    *(result.category, time.time(), next(self._numbers), entry.id),
                ),
            )
            for change in outcome.changes:
                change(db)

        def tell(written: Future[Any]) -> None:
            if error := written.exception():  # the server ends while the disk is full: it is done again
                talk(f"request {entry.id} ({entry.kind}) is done again at the next start: {error}")
                return
            with self._lock:
                for step in outcome.after:
                    step()
                self._forget(entry)
            self._note(entry, result)
            entry.done.set(result)

        self.store.write(write, insist=True).add_done_callback(tell)

    # ---------------------------------------------------------------------------------------------- sampling

    def resolve(self, name: str) -> str:
        """What `sample` takes for the name that a client uses: the base's name, a `tinker://RUN/sampler_weights/NAME`
        path (or `weights`), or a sampling session's id. Raises `Refusal` 404 for what there is not."""
        self.folder_of(name)
        return name

    def folder_of(self, name: str) -> str:
        """The folder of the weights that a name means, "" for the base's."""
        if name == self.base.name:
            return ""
        if name in self.books.samplers:
            folder = self.books.samplers[name].folder
            if folder and not (self.folder / folder).is_dir():
                raise Refusal(f"the weights of {name[:200]} have been deleted", 404)
            return folder
        if is_path(name):
            found = self.books.checkpoint(name)
            if found.kind == "external_weights":
                raise Refusal(f"{name[:200]} is for download; sample from sampler_weights")
            return found.folder
        raise Refusal(f"there is no model {name[:200]!r} on this server; it serves {self.base.name!r}", 404)

    def sampleable(self) -> list[str]:
        """Every name that can be sampled from: the base's, then the saved paths, newest first."""
        saved = [c for c in self.books.checkpoints.values() if c.kind == "sampler_weights" and not c.expired]
        return [self.base.name, *(c.path for c in sorted(saved, key=lambda c: -c.created))]

    async def sample(self, weights: str, job: SampleJob, *, key: str = "", seq: int | None = None) -> str:
        """Accept a job; its request id. Raises `Refusal` for what cannot be sampled.

        Args:
            seq: its number in a sampling session, for `ended_since`.
        """
        self.check(job)
        self.folder_of(weights)
        self.used[weights] = time.time()
        if job.seed is None:
            job = dataclasses.replace(job, seed=secrets.randbits(62))
        body = pack(JSON_BODY, json.dumps({"job": dataclasses.asdict(job)}).encode())
        return await self.submit("sample", weights, body, key=key or None, seq=seq)

    async def ended_since(self, sampler_id: str, clone: int, cursor: int, timeout: float) -> list[sqlite3.Row]:
        """id, number and error of a sampler's requests that ended after `cursor`; waits for one if there is none."""
        until = time.monotonic() + timeout
        while True:
            rows = self.store.read(
                "SELECT id, number, error FROM requests WHERE owner = ? AND number > ? AND seq / 1000000000 = ?"
                " ORDER BY number LIMIT 1000",
                *(sampler_id, cursor, clone),
            )
            if rows or time.monotonic() > until or self.draining:
                return rows
            await asyncio.sleep(0.05)

    def check(self, job: SampleJob) -> None:
        """Raise `Refusal` unless the job can be done."""
        longest = self.base.context
        if not job.token_ids:
            raise Refusal("the prompt is empty")
        if strange := next((i for i in job.token_ids if not 0 <= i < self.base.vocabulary), None):
            raise Refusal(f"prompt: id {strange} is not in the vocabulary of {self.base.vocabulary}")
        reads = job.prompt_logprobs or job.topk_prompt_logprobs or job.max_tokens == 0
        if len(job.token_ids) > longest - (not reads):
            raise Refusal(f"the prompt has {len(job.token_ids)} tokens; the model's context is {longest}")
        within = {
            "num_samples": (job.num_samples, 1, MOST_SAMPLES),
            "max_tokens": (job.max_tokens or 0, 0, 1 << 31),
            "temperature": (job.temperature, 0, 100),
            "top_k": (job.top_k, -1, 1 << 31),
            "topk_prompt_logprobs": (job.topk_prompt_logprobs, 0, MOST_TOPK),
            "topk_sample_logprobs": (job.topk_sample_logprobs, 0, MOST_TOPK),
            "seed": (job.seed or 0, -(2**63), 2**64 - 1),
        }
        for name, (value, low, high) in within.items():
            if not low <= value <= high:
                raise Refusal(f"{name} is {value}; it must be {low} to {high}")
        if not 0 < job.top_p <= 1:
            raise Refusal(f"top_p is {job.top_p}; it must be above 0 and at most 1")
        if any(not s for s in job.stop_strings or ()):
            raise Refusal("stop holds an empty string")

    # ------------------------------------------------------------------------------------- sessions, models

    async def write(self, change: Callable[[sqlite3.Connection], Any]) -> Any:
        """Run a change of the journal, and wait until it is on disk. Raises `DiskError`."""
        return await asyncio.wrap_future(self.store.write(change))

    async def end_session(self, session: Session) -> None:
        """The client is done."""
        session.ended = now = time.time()
        await self.write(lambda db: db.execute("UPDATE sessions SET ended = ? WHERE id = ?", (now, session.id)))

    async def sweep(self) -> None:
        """See `upkeep.sweep`."""
        await upkeep.sweep(self)

    async def create_session(self, *, metadata: Mapping[str, Any] | None = None, key: str = "") -> str:
        """A session's id."""
        session = Session(str(uuid.uuid4()), time.time(), dict(metadata or {}))

        def write(db: sqlite3.Connection) -> str:
            if key and (known := db.execute("SELECT id FROM sessions WHERE key = ?", (key,)).fetchone()):
                return str(known[0])
            info = json.dumps(session.info)
            insert(db, "sessions", id=session.id, key=key or None, created=session.created, info=info)
            return session.id

        found: str = await self.write(write)
        if found == session.id:
            self.books.sessions[session.id] = session
        return found

    async def create_model(
        self,
        session_id: str,
        *,
        rank: int = 32,
        seed: int | None = None,
        number: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        load: Mapping[str, Any] | None = None,
        **parts: bool,
    ) -> tuple[str, str]:
        """(request id, model id) of a new LoRA adapter on the base, or with rank 0 of its full weights.

        Args:
            number: of the model in its session; the same one again is the same request.
            load: a `load_weights` request that the model begins with.
            parts: train_attn, train_mlp, train_unembed.
        """
        self.books.session(session_id)
        mine = [m for m in self.books.models.values() if m.session == session_id]
        number = len(mine) if number is None else number
        model_id = f"{session_id}:train:{number}"
        key = f"{model_id}#create"
        if len(self.books.models) >= MOST_MODELS:
            raise Refusal(f"this server holds {MOST_MODELS} training runs; start one with another --out_dir")
        seed = derive_seed(self.cfg.seed, "adapter", number) if seed is None else seed
        spec = ModelSpec(rank, self.cfg.lora_alpha, seed, **parts)
        self.work.base.targets(spec)
        spec.check()
        model = Model(model_id, session_id, spec.as_json(), metadata, time.time())
        stored = json.dumps(metadata) if metadata is not None else None
        row: dict[str, Any] = {"id": model_id, "session": session_id, "spec": json.dumps(model.spec)}

        def write(db: sqlite3.Connection) -> None:
            insert(db, "models", **row, metadata=stored, created=model.created)

        def take() -> None:
            self.books.models[model_id] = model

        kind = "load_weights" if load else "create_model"
        return await self.submit(kind, model_id, _json_body(load or {}), key=key, changes=[write], then=take), model_id

    async def train(
        self, kind: str, model_id: str, body: bytes, seq: int | None = None, *, key: str = "", patience_s: float = 1e9
    ) -> str:
        """Accept a training request; without a `seq` it takes the model's next number."""
        model = self.books.model(model_id)
        model.seen = time.time()
        if seq is None:
            taken = [e.seq for e in self._live.values() if e.owner == model_id and e.seq]
            seq = max([self._queue(model_id).expected - 1, *taken]) + 1
        key = key or f"{model_id}#{seq}"
        return await self.submit(kind, model_id, body, seq=seq, key=key, patience_s=patience_s)

    async def forward_backward(
        self,
        model_id: str,
        rows: Sequence[Mapping[str, Any]],
        loss_fn: str,
        config: Mapping[str, float] | None = None,
        *,
        key: str = "",
    ) -> str:
        """Add a gradient. A row is {"tokens": [int], "inputs": {name: [number]}}; the model's next seq_id is taken.

        The value is a `TrainingResult`.
        """
        body = pack(JSON_BODY, data.as_json(rows, loss_fn, config))
        return await self.train("forward_backward", model_id, body, key=key)

    async def optim_step(self, model_id: str, adam: Mapping[str, float], *, key: str = "") -> str:
        """One AdamW step: learning_rate, beta1, beta2, eps, weight_decay, grad_clip_norm."""
        return await self.train("optim_step", model_id, _json_body({"adam_params": dict(adam)}), key=key)

    async def save_for_sampler(self, model_id: str, name: str = "", *, key: str = "") -> str:
        """A snapshot to sample from: its value has `path` where it is named, else `sampling_session_id`."""
        return await self.train("save_weights_for_sampler", model_id, _json_body({"path": name or None}), key=key)

    # ---------------------------------------------------------------------------------------- watching it

    def _note(self, entry: Entry, result: Result) -> None:
        """What the page shows of a request that has ended."""
        self.totals["failed" if result.error else "done"] += 1
        if result.error:
            self.refuse(result.error, entry.kind)
            return
        if entry.kind == "sample":
            self.totals["sampled_tokens"] += sum(len(s.token_ids) for s in result.value.sequences)
            self._keep_text(entry, result.value)
            return
        model = self.books.models.get(entry.owner)
        if model is None:
            return
        if entry.kind == "forward_backward":
            self.totals["trained_tokens"] += sum(a.size for a in result.value.logprobs)
            model.last |= result.value.metrics
        elif entry.kind == "optim_step":
            model.last |= result.value["metrics"]
            model.history.append({"time": time.time(), "step": model.steps, **model.last})

    def _keep_text(self, entry: Entry, found: SampleResult) -> None:
        """At most one sample a second, for the page."""
        if not found.sequences or time.time() < self._next_text:
            return
        self._next_text = time.time() + 1.0
        prompt, said = job_of(unpack(entry.body)[1]).token_ids[-SHOWN_TOKENS:], found.sequences[0].token_ids
        spell = self.base.renderer.spell
        shown = {"weights": entry.owner, "prompt": spell(prompt), "completion": spell(said[:SHOWN_TOKENS])}
        self.samples.append(shown)

    def partial(self, request_id: str) -> tuple[SampledSequence, ...]:
        """What is sampled so far of a request that is being decoded; nothing before and after that."""
        return self.engine.partial(request_id)

    def refuse(self, reason: str, where: str = "") -> None:
        """Write a refusal into the log that the page shows."""
        self.totals["refusals"] += 1
        self.refusals.append({"time": time.time(), "where": where, "reason": reason})

    def status(self) -> dict[str, Any]:
        """For the page, /metrics and `serve --status`; see `watch.status`."""
        return watch.status(self)


def _json_body(sent: Mapping[str, Any]) -> bytes:
    return pack(JSON_BODY, json.dumps(sent).encode())


def _insert_request(
    entry: Entry, changes: Sequence[Callable[[sqlite3.Connection], Any]], db: sqlite3.Connection
) -> None:
    for change in changes:
        change(db)
    fields = {name: getattr(entry, name) for name in ("id", "kind", "owner", "seq", "key", "body", "created")}
    insert(db, "requests", **fields, state="waiting")
