"""Evaluators for training: in the training process, or in another process that training never waits for.

A job is a step, a file with its weights, and their hash. It stays on disk (`evals/pending/`) until its result is
logged, so a resumed run finds its pending jobs. A result names the step and the hash of the weights that were loaded;
one that does not match its job is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from grpo_gsm8k.datatypes import Prompt, Sampler, SamplingParams, WeightsRef
from grpo_gsm8k.engines import handover
from grpo_gsm8k.engines.channel import ChildGone
from grpo_gsm8k.engines.process import Engine
from grpo_gsm8k.errors import GrpoError
from grpo_gsm8k.evals.accuracy import Evaluation, evaluate
from grpo_gsm8k.runs.files import read_json, write_json
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.tasks.render import Renderer
from grpo_gsm8k.trainer.policy import weights_sha256

Weights = Iterable[tuple[str, torch.Tensor]]


class InlineEvaluator:
    """Evaluates with the training run's own sampler, while training waits."""

    def __init__(
        self,
        sync: Callable[[int], WeightsRef],
        sampler: Sampler,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        renderer: Renderer,
        context: int = 0,
    ) -> None:
        """`sync(step)` hands the learner's weights to the sampler, unless it holds them."""
        self.sync, self.sampler, self.prompts, self.params = sync, sampler, prompts, params
        self.renderer, self.context = renderer, context
        self._done: list[tuple[int, Evaluation]] = []

    def submit(self, step: int, weights: Weights) -> None:
        """Evaluate now."""
        digest = self.sync(step).sha256 or weights_sha256(weights)
        more: dict[str, Any] = {"title": "validation", "context": self.context}
        self._done.append((step, evaluate(self.sampler, self.prompts, self.params, self.renderer, digest, **more)))

    def results(self) -> list[tuple[int, Evaluation]]:
        """The evaluations since the last call."""
        done, self._done = self._done, []
        return done

    def settle(self, step: int) -> None:
        """Nothing to do: no job is pending."""

    def drain(self) -> list[tuple[int, Evaluation]]:
        """As `results`."""
        return self.results()

    def metrics(self) -> dict[str, float]:
        """No metrics."""
        return {}

    def close(self) -> None:
        """Nothing to close."""


@dataclass
class _Job:
    """A pending evaluation: first a copy of the weights in memory, then a file."""

    step: int
    weights: list[tuple[str, torch.Tensor]] | None
    handover: WeightsRef | None = None


class AsyncEvaluator:
    """Evaluates in another process. `submit` and `results` return at once.

    One thread writes weights to disk, another one waits for the process.
    """

    def __init__(self, engine: Engine, pending: Path, backlog: Literal["all", "latest"] = "all") -> None:
        """Starts nothing before the first call.

        Args:
            engine: its `judge` evaluates a hand-over.
            pending: folder of waiting weights; files in it are pending jobs of an earlier start.
            backlog: whether a new job is queued behind waiting ones (all), or replaces them (latest).
        """
        self.engine, self.pending, self.backlog = engine, pending, backlog
        self.dropped = self.lost = 0
        self._jobs: list[_Job] = []  # in order of submission; the first one may be running
        self._done: list[tuple[int, Evaluation]] = []
        self._fault: BaseException | None = None
        self._changed = threading.Condition()
        self._running: _Job | None = None
        self._started = self._closed = False

    def submit(self, step: int, weights: Weights) -> None:
        """Queue a copy of the weights, and return."""
        job = _Job(step, [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in weights])
        with self._changed:
            self._start()
            if self.backlog == "latest":
                for waiting in [j for j in self._jobs if j is not self._running]:
                    self._jobs.remove(waiting)
                    self.settle(waiting.step)
                    self.dropped += 1
            self._jobs.append(job)
            self._changed.notify_all()

    def results(self) -> list[tuple[int, Evaluation]]:
        """The results since the last call. Raises the error that ended the evaluator, if any."""
        with self._changed:
            self._start()
            if self._fault:
                raise self._fault
            done, self._done = self._done, []
        return done

    def settle(self, step: int) -> None:
        """Delete a job whose result is logged."""
        for suffix in (".json", ".safetensors"):
            self._file(step).with_suffix(suffix).unlink(missing_ok=True)

    def drain(self) -> list[tuple[int, Evaluation]]:
        """Wait for all pending jobs, and return their results."""
        with self._changed:
            self._start()
            if self._jobs:
                say(f"waiting for {len(self._jobs)} evaluations")
            self._changed.wait_for(lambda: not self._jobs or self._fault)
        return self.results()

    def metrics(self) -> dict[str, float]:
        """Number of waiting and dropped jobs."""
        return {
            "eval/waiting": float(len(self._jobs)),
            "eval/dropped": float(self.dropped),
            "eval/lost": float(self.lost),
            "eval/restarts": float(self.engine.restarts),
        }

    def close(self) -> None:
        """End the process; pending jobs stay on disk for a resumed run."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.engine.close()

    # ------------------------------------------------------------------------------------- the two threads

    def _start(self) -> None:
        if self._started:
            return
        self._started = True
        for note in sorted(self.pending.glob("step_*.json")):
            stored = read_json(note)
            given = WeightsRef(stored["version"], stored["sha256"], note.with_suffix(".safetensors"))
            self._jobs.append(_Job(given.version, None, given))
            say(f"the evaluation of step {given.version} is still pending")
        for target in (self._write, self._judge):
            threading.Thread(target=self._guard, args=(target,), daemon=True).start()

    def _guard(self, target: Callable[[], None]) -> None:
        try:
            target()
        except GrpoError as fault:
            self._end(fault)
        except BaseException as fault:  # a bug: keep its traceback, and wake those who wait
            self._end(fault)
            raise

    def _end(self, fault: BaseException) -> None:
        with self._changed:
            self._fault = fault
            self._changed.notify_all()

    def _next(self, wanted: Callable[[_Job], bool]) -> _Job | None:
        """Wait for a job; returns None once the evaluator is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or any(map(wanted, self._jobs)))
            return None if self._closed else next(filter(wanted, self._jobs))

    def _write(self) -> None:
        """Thread: write copies in memory to files."""
        while job := self._next(lambda job: job.weights is not None):
            self.pending.mkdir(parents=True, exist_ok=True)
            given = handover.write(self._file(job.step), job.step, job.weights or [])
            write_json(self._file(job.step).with_suffix(".json"), handover.as_json(given))
            with self._changed:
                job.weights, job.handover = None, given
                if job not in self._jobs:  # dropped while it was being written
                    self.settle(job.step)
                self._changed.notify_all()

    def _judge(self) -> None:
        """Thread: evaluate the files in order."""
        while job := self._next(lambda job: job.handover is not None):
            with self._changed:
                if job not in self._jobs:
                    continue
                self._running = job
            assert job.handover is not None
            found = self.engine.ask("judge", _checked(job.handover), **handover.as_json(job.handover))
            with self._changed:
                self._jobs.remove(job)
                self._running = None
                if isinstance(found, str):
                    say(f"the evaluation of step {job.step} is lost: {found}")
                    self.lost += 1
                    self.settle(job.step)
                else:
                    self._done.append((job.step, found))
                self._changed.notify_all()

    def _file(self, step: int) -> Path:
        return self.pending / f"step_{step:06d}.safetensors"


def _checked(given: WeightsRef) -> Callable[[dict[str, Any]], Evaluation | str]:
    """Parse an answer: an evaluation, or the reason why the file was refused."""

    def parse(answer: dict[str, Any]) -> Evaluation | str:
        if "refused" in answer:
            return str(answer["refused"])
        fields = answer["evaluation"]
        found = {answer["sha256"], fields["weights_sha256"], *(row["weights_sha256"] for row in fields["rows"])}
        if answer["version"] != given.version or found != {given.sha256}:
            raise ChildGone(f"evaluated other weights than those of step {given.version}")
        return Evaluation(**{**fields, "ci95": tuple(fields["ci95"])})

    return parse
