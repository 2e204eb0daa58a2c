"""Whose turn it is: training requests round robin over models, samples in batches, neither waiting for the other's end.

One thread picks, and a worker owns torch. A batch of samples is advanced for about as long as the last training request
took, then the next one has its turn; within a model requests keep their order. Where samples are drawn on a device of
their own, they have a pair of threads of their own, and both go on at once.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grpo_gsm8k.errors import DiskError, GrpoError, NonFiniteError, UserError
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.serve.bodies import unpack
from grpo_gsm8k.serve.books import Entry
from grpo_gsm8k.serve.decoders import MOST_DRAWN
from grpo_gsm8k.serve.jobs import Result, SampledSequence, SampleJob, Table
from grpo_gsm8k.serve.sampling import Decoding
from grpo_gsm8k.serve.weights import SampleWeights
from grpo_gsm8k.serve.work import Outcome, Workshop

SLICE_S = 0.05  # of sampling, at least
GATHER_S = 0.02  # a batch begins that long after its oldest request, so that those sent together are decoded together
BATCHES = 4  # that are decoded in turns
CELLS = 1 << 15  # of the prompts of a batch, padded

Finish = Callable[[Entry, Result, Outcome, bool], None]


class Batch:
    """Sample requests that are decoded side by side."""

    def __init__(self, folder: str, entries: list[Entry], jobs: list[SampleJob]) -> None:
        self.folder, self.entries, self.jobs = folder, entries, jobs
        self.decoding: Decoding | None = None


class Engine:
    """Takes requests whose turn has come, and reports how each ended to `finish(entry, result, outcome, applied)`."""

    def __init__(self, work: Workshop, weights: SampleWeights, finish: Finish) -> None:
        self.work, self.weights, self.finish = work, weights, finish
        self.overlaps = weights.base is not work.base
        self._changed = threading.Condition()
        self._training: OrderedDict[str, deque[Entry]] = OrderedDict()
        self._samples: OrderedDict[Any, deque[tuple[Entry, SampleJob]]] = OrderedDict()
        self._batches: deque[Batch] = deque()
        self._advancing: Batch | None = None
        self._stopping = False
        self._torch = ThreadPoolExecutor(1, "torch")
        self._draws = ThreadPoolExecutor(1, "draws") if self.overlaps else self._torch
        loops = [self._run_training, self._run_samples] if self.overlaps else [self._run]
        self._threads = [threading.Thread(target=loop, name="engine", daemon=True) for loop in loops]

    def start(self) -> None:
        """Begin to work."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End what is being done at the moment, and leave the rest to the next start."""
        with self._changed:
            self._stopping = True
            self.work.stopping.set()
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident:
                thread.join()
        self._torch.shutdown()
        self._draws.shutdown()

    def call(self, do: Callable[[], Any]) -> Any:
        """Run something on the thread that owns torch."""
        return self._torch.submit(do).result()

    def put(self, entry: Entry, folder: str = "") -> None:
        """A request whose turn has come; `folder`: of a sample's weights."""
        with self._changed:
            if entry.kind == "sample":
                job = job_of(unpack(entry.body)[1])
                group: Any = (folder, job.temperature, max(job.top_k, 0), job.top_p)
                self._samples.setdefault(group, deque()).append((entry, job))
            else:
                self._training.setdefault(entry.owner, deque()).append(entry)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """Do not begin these samples, if they wait still."""
        with self._changed:
            found = [(key, item) for key, queue in self._samples.items() for item in queue if item[0].id == request_id]
            for key, item in found:
                self._samples[key].remove(item)
                if not self._samples[key]:
                    del self._samples[key]
        for _, (entry, _job) in found:
            self.finish(entry, Result("sample", error="cancelled by the client"), Outcome(None), False)

    def waiting(self) -> dict[str, Any]:
        """How many requests wait, of each kind, the training ones by model; and the age of the oldest."""
        with self._changed:
            training = {model: len(queue) for model, queue in self._training.items()}
            samples = sum(map(len, self._samples.values()))
            decoding = sum(len(batch.entries) for batch in self._batches)
            firsts = [queue[0].created for queue in self._training.values()]
            firsts += [queue[0][0].created for queue in self._samples.values()]
        oldest = time.time() - min(firsts) if firsts else 0.0
        return {"training": training, "sampling": samples, "decoding": decoding, "oldest_s": oldest}

    def partial(self, request_id: str) -> tuple[SampledSequence, ...]:
        """The tokens so far of a request that is being decoded; nothing for any other."""
        with self._changed:
            for batch in [*self._batches, *([self._advancing] if self._advancing else [])]:
                for number, entry in enumerate(batch.entries):
                    if entry.id == request_id and batch.decoding:
                        return batch.decoding.so_far(number)
        return ()

    # ------------------------------------------------------------------------------------------------- turns

    def _run(self) -> None:
        """Training and samples in turns."""
        while True:
            with self._changed:
                while not (self._stopping or self._training or self._samples or self._batches):
                    self._changed.wait()
                if self._stopping:
                    return
                entry = self._next_training()
            began = time.monotonic()
            if entry:
                self._train(entry)
            self._sample(time.monotonic() + max(SLICE_S, time.monotonic() - began))

    def _run_training(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self._training):
                    self._changed.wait()
                if self._stopping:
                    return
                entry = self._next_training()
            if entry:
                self._train(entry)

    def _run_samples(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self._samples or self._batches):
                    self._changed.wait()
                if self._stopping:
                    return
            self._sample(float("inf"))

    def _next_training(self) -> Entry | None:
        """The first request of the model that has waited longest for a turn."""
        if not self._training:
            return None
        model, queue = self._training.popitem(last=False)
        entry = queue.popleft()
        if queue:
            self._training[model] = queue  # behind all others
        return entry

    def _train(self, entry: Entry) -> None:
        task = self._torch.submit(self.work.run, entry)
        error = task.exception()
        if error is None:
            outcome = task.result()
            self.finish(entry, Result(entry.kind, outcome.value), outcome, True)
        elif isinstance(error, GrpoError):
            self.finish(entry, _failed(entry, error), Outcome(None), isinstance(error, NonFiniteError))
        else:
            self._torch.submit(self.work.lose, entry.owner).result()
            self.finish(entry, _bug(entry, error), Outcome(None), False)

    def _sample(self, until: float) -> None:
        """Advance samples until then; longer only while nothing waits for training."""
        with self._changed:
            wait_s = 0.0 if self._batches else self._gathering_s()
        if wait_s > 0:
            time.sleep(wait_s)
        while True:
            self._prove()
            with self._changed:
                self._admit()
                if not self._batches or (self._training and time.monotonic() > until) or self._stopping:
                    return
                batch = self._advancing = self._batches.popleft()
            task = self._draws.submit(self._advance, batch)
            error = task.exception()
            if error is not None:
                for entry in batch.entries:
                    result = _failed(entry, error) if isinstance(error, GrpoError) else _bug(entry, error)
                    self.finish(entry, result, Outcome(None), True)
            elif task.result():
                assert batch.decoding is not None
                for entry, value in zip(batch.entries, batch.decoding.results(), strict=True):
                    self.finish(entry, Result("sample", value), Outcome(value), True)
            else:
                with self._changed:
                    self._batches.append(batch)

    def _gathering_s(self) -> float:
        """Seconds that the oldest request that waits still waits for others, to be decoded together with them."""
        if not self._samples:
            return 0.0
        oldest = min(queue[0][0].created for queue in self._samples.values())
        return min(GATHER_S, oldest + GATHER_S - time.time())

    def _prove(self) -> None:
        """Whether samples may be decoded together is found out here, as it takes a moment, and not under the lock."""
        with self._changed:
            folders = {key[0] for key in self._samples}
        for folder in folders:
            self.weights.together(folder)

    def _admit(self) -> None:
        """Make batches of what waits, the oldest first, as long as few are being decoded."""
        while self._samples and len(self._batches) < BATCHES:
            if self._batches and self._gathering_s() > 0:
                return
            for key in sorted(self._samples, key=lambda key: self._samples[key][0][0].created):
                if not self._blocked(key[0]):
                    break
            else:
                return
            queue, entries, jobs = self._samples[key], list[Entry](), list[SampleJob]()
            most = min(self.work.cfg.sample_rows, MOST_DRAWN) if self.weights.together(key[0]) else 1
            while queue:
                job = queue[0][1]
                rows = sum(j.num_samples for j in jobs) + job.num_samples
                longest = max(len(j.token_ids) for j in [*jobs, job])
                if jobs and (most == 1 or rows > most or longest * (len(jobs) + 1) > CELLS):
                    break
                entries.append(queue[0][0])
                jobs.append(job)
                queue.popleft()
            if not queue:
                del self._samples[key]
            self._batches.append(Batch(key[0], entries, jobs))

    def _blocked(self, folder: str) -> bool:
        """Whether other weights than an adapter's are being sampled from: one set of them is in memory."""
        held = {batch.folder for batch in self._batches if self.weights.is_whole(batch.folder)}
        return self.weights.is_whole(folder) and bool(held - {folder})

    def _advance(self, batch: Batch) -> bool:
        """Decode for a moment; whether the batch is done."""
        import torch

        model, ends = self.weights.model(batch.folder), time.monotonic() + SLICE_S
        with torch.inference_mode():
            if batch.decoding is None:
                batch.decoding = Decoding(self.weights.sampler, model, batch.jobs)
            while not batch.decoding.advance():
                if time.monotonic() > ends:
                    return False
        return True


def job_of(body: bytes) -> SampleJob:
    """A sample request as `core.Service` put it into the journal."""
    sent = json.loads(body)["job"]
    if sent.get("prompt_targets"):
        table: dict[str, Any] = {k: None if v is None else tuple(v) for k, v in sent["prompt_targets"].items()}
        sent["prompt_targets"] = Table(**table)
    lists = {"token_ids", "stop_ids", "stop_strings"}
    fields: dict[str, Any] = {k: tuple(v) if k in lists and v is not None else v for k, v in sent.items()}
    return SampleJob(**fields)


def _failed(entry: Entry, error: GrpoError) -> Result:
    """What a client is told of an error that has a name: its own mistake, unless the disk or a process failed."""
    own = isinstance(error, UserError) and not isinstance(error, DiskError)
    return Result(entry.kind, error=" ".join(str(error).split()), category="user" if own else "server")


def _bug(entry: Entry, error: BaseException) -> Result:
    """What a client is told of an error that nobody has foreseen; its traceback goes to the log."""
    say(f"request {entry.id} ({entry.kind}) failed with an error of the server's own:")
    for line in "".join(traceback.format_exception(error)).splitlines():
        say(line)
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return Result(entry.kind, error=f"the server failed at this request: {what}", category="server")
