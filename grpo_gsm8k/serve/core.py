"""The heart of the service: requests are numbered, put on disk, ordered and answered.

The wires (routers of the web application) call `Service` from the event loop and only await. Whatever a request needs
to be done again after a crash is in the journal before its id is returned; its result is there before it is handed out:
that part is `ledger.py`, here is what the requests are about.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
import sqlite3
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_gsm8k.errors import DiskError
from grpo_gsm8k.repro import derive_seed
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.serve import data, upkeep, watch
from grpo_gsm8k.serve.adapters import BaseModel, ModelSpec
from grpo_gsm8k.serve.bodies import JSON_BODY, is_path, pack, unpack
from grpo_gsm8k.serve.books import Books, Entry, Model, Session, insert
from grpo_gsm8k.serve.engine import Engine, job_of
from grpo_gsm8k.serve.jobs import Base, Refusal, Result, SampledSequence, SampleJob, SampleResult
from grpo_gsm8k.serve.ledger import Ledger
from grpo_gsm8k.serve.settings import ServeConfig
from grpo_gsm8k.serve.store import Store
from grpo_gsm8k.serve.weights import SampleWeights
from grpo_gsm8k.serve.work import Workshop

MOST_SAMPLES, MOST_TOPK, MOST_TARGETS, MOST_MODELS = 1024, 128, 1024, 10_000
REFUSALS = 200  # that the page shows
SHOWN_TOKENS = 400  # of a sample there


class Service(Ledger):
    """What the wires stand on. Every coroutine that takes a `key` is idempotent: the same key, the same request."""

    def __init__(
        self, cfg: ServeConfig, base: BaseModel, store: Store, folder: Path, draws: BaseModel | None = None
    ) -> None:
        """`folder` holds the checkpoints and snapshots that `store` speaks of.

        Args:
            draws: the base once more, on the device where samples are drawn while training goes on; None to take turns.
        """
        super().__init__(store, cfg.gap_s)
        self.cfg, self.folder = cfg, folder
        name = cfg.served_name or cfg.model_id
        self.base = Base(name, base.folder, base.renderer, base.context, base.vocabulary)
        self.used: dict[str, float] = {}  # when a sampling session was last asked
        self.books = Books(store)
        self.work = Workshop(cfg, base, self.books, folder)
        self.weights = SampleWeights(draws or base, folder)
        self.engine = Engine(self.work, self.weights, self._finish)
        self.started = time.time()
        self.samples: deque[dict[str, str]] = deque(maxlen=20)
        self.refusals: deque[dict[str, Any]] = deque(maxlen=REFUSALS)
        self._next_text = 0.0

    def start(self) -> None:
        """Take up what the journal says is still to be done, and begin to work."""
        waiting = self.recall()
        upkeep.remove_orphans(self)
        if waiting:
            say(f"{waiting} requests were waiting when the server ended; they are done now")
        self.engine.start()

    def close(self) -> None:
        """End what is being done, write the models' states, and close the journal. Requests that wait are kept."""
        self.drain()
        self.engine.stop()
        with self._lock:
            held = list(self.work.models)
        try:
            for model_id in held if not self.store.fault else ():
                self.work.evict(model_id)
        except DiskError as full:  # their requests are kept, and done again at the next start
            say(f"models are not written to disk: {full}")
        self.store.close()

    def give(self, entry: Entry) -> None:
        """See `Ledger.give`."""
        self.engine.put(entry, self.folder_of(entry.owner) if entry.kind == "sample" else "")

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
        reads = job.prompt_logprobs or job.topk_prompt_logprobs or job.prompt_targets or job.max_tokens == 0
        if len(job.token_ids) > longest - (not reads):
            raise Refusal(f"the prompt has {len(job.token_ids)} tokens; the model's context is {longest}")
        within = {
            "num_samples": (job.num_samples, 1, MOST_SAMPLES),
            "max_tokens": (job.max_tokens or 0, 0, 1 << 31),
            "temperature": (job.temperature, 0, 100),
            "top_k": (job.top_k, -1, 1 << 31),
            "topk_prompt_logprobs": (job.topk_prompt_logprobs, 0, MOST_TOPK),
            "topk_sample_logprobs": (job.topk_sample_logprobs, 0, MOST_TOPK),
            "prompt_alternatives": (job.prompt_alternatives, 0, MOST_TOPK),
            "seed": (job.seed or 0, -(2**63), 2**64 - 1),
        }
        for name, (value, low, high) in within.items():
            if not low <= value <= high:
                raise Refusal(f"{name} is {value}; it must be {low} to {high}")
        if not 0 < job.top_p <= 1:
            raise Refusal(f"top_p is {job.top_p}; it must be above 0 and at most 1")
        named, rows = job.prompt_targets, len(job.token_ids) - 1
        if named and (named.shape[0] != rows or named.shape[1] > MOST_TARGETS):
            what = f"it must be [{rows}, K] with K up to {MOST_TARGETS}"
            raise Refusal(f"target_prompt_logprobs: shape {list(named.shape)}; {what}")
        if named and any(not -1 <= i < self.base.vocabulary for i in named.values):
            raise Refusal(f"target_prompt_logprobs: an id is not in the vocabulary of {self.base.vocabulary}")
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

        kind, body = ("load_weights", load) if load else ("create_model", {"spec": model.spec, "metadata": metadata})
        return await self.submit(kind, model_id, _json_body(body), key=key, changes=[write], then=take), model_id

    async def train(
        self, kind: str, model_id: str, body: bytes, seq: int | None = None, *, key: str = "", patience_s: float = 1e9
    ) -> str:
        """Accept a training request; without a `seq` it takes the model's next number."""
        model = self.books.model(model_id)
        model.seen = time.time()
        if seq is None:
            seq = self.next_number(model_id)
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

    def note(self, entry: Entry, result: Result) -> None:
        """What the page shows of a request that has ended."""
        self.totals["failed" if result.error else "done"] += 1
        if result.error:
            self.refuse(result.error, entry.kind)
            return
        if entry.kind == "sample":
            self.totals["sampled_tokens"] += sum(len(s.token_ids) for s in result.value.sequences)
            self._keep_text(entry, result.value)
        elif entry.kind == "forward_backward":
            self.totals["trained_tokens"] += sum(a.size for a in result.value.logprobs)

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
