"""Trains steps of a stored run again, without a sampler: from a checkpoint, on its own rollouts or data."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from grpo_gsm8k import distill, ei, grpo, sft
from grpo_gsm8k.audit.stored import StoredRun, trainable
from grpo_gsm8k.datatypes import Datum, Example
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.errors import CheckpointError, ConfigError, DataError
from grpo_gsm8k.hub_datasets import local_path
from grpo_gsm8k.preflight import embeddings_of
from grpo_gsm8k.repro import derive_seed
from grpo_gsm8k.runs import rollouts
from grpo_gsm8k.runs.directory import Run
from grpo_gsm8k.runs.files import read_json
from grpo_gsm8k.runs.rollouts import Stored
from grpo_gsm8k.tasks.base import load_split
from grpo_gsm8k.tasks.render import Renderer, date_of, task_of
from grpo_gsm8k.trainer import checkpoint
from grpo_gsm8k.trainer.optimizer import lr_at
from grpo_gsm8k.trainer.policy import context_length, load_tokenizer, prepare_to_save
from grpo_gsm8k.trainer.teacher import AbsentTeacher, CachedTeacher
from grpo_gsm8k.workbench import NoSampler, Workbench, end_ids, load_seeded, make_learner

CLOCKS = ("time/", "perf/", "sync/")  # metrics that no two runs have in common


@dataclass(frozen=True)
class Trained:
    """A step that was trained again.

    Attributes:
        sha256: of the weights after it; `recorded`, as the run has it, "" where it did not hash them.
        metrics: of its update.
    """

    step: int
    sha256: str
    recorded: str
    metrics: dict[str, float]

    @property
    def same(self) -> bool:
        """Whether the weights are those of the run, bit for bit."""
        return self.sha256 == self.recorded


class Again:
    """The learner of a stored run, at one of its steps."""

    def __init__(self, run: StoredRun, scratch: Path) -> None:
        """Load the model. Make it with `opened`."""
        self.run = trainable(run)
        self.cfg = _with_model(self.run)
        machine = read_json(run.folder / "sys" / "machine.json")
        torch.set_num_threads(machine.get("torch_threads", torch.get_num_threads()))
        model = load_seeded(self.cfg)
        self.renderer = Renderer(load_tokenizer(self.cfg), task_of(self.cfg), date=date_of(self.cfg))
        prepare_to_save(model, end_ids(self.renderer))
        learner = make_learner(self.cfg, model, self.renderer)
        made = Run(scratch, run.stage, self.cfg)
        sizes = (context_length(model), embeddings_of(model))
        self.bench = Workbench(made, learner, NoSampler(), self.renderer, [], *sizes)
        self.model, self.step = model, 0

    @cached_property
    def examples(self) -> dict[str, Example]:
        """The training examples by their ids."""
        found = load_split(self.renderer.task, self.cfg.data, "train")
        return {example.id: example for example in found}

    def seek(self, step: int) -> int:
        """Go forward to the nearest checkpoint at or before `step`, unless the learner is beyond it already.

        Returns:
            the step where it stands now.

        Raises:
            CheckpointError: the checkpoint is damaged, or does not have the weights of the run's chain.
            ConfigError: the model is not the one that the run began with.
        """
        root = self.run.checkpoints
        start = max((found for found in checkpoint.steps_present(root) if self.step < found <= step), default=0)
        if start:
            checkpoint.verify(folder := root / f"step_{start:06d}")
            self.bench.learner.load(folder)
            self.step = start
        recorded, found = self.run.weights.get(self.step, ""), self.bench.learner.publish(self.step).sha256
        if recorded and found != recorded and start:
            raise CheckpointError(f"checkpoint {start} does not have the weights that the run had after step {start}")
        if recorded and found != recorded and not self.step:
            raise ConfigError(
                f"{self.run.folder}: did not begin with the weights of {self.cfg.model_id}; pass --model_id, the model "
                "that it began with"
            )
        return self.step

    def to(self, step: int) -> Iterator[Trained]:
        """Train every step as far as `step` again."""
        while self.step < step:
            yield self.advance()

    def advance(self) -> Trained:
        """Train the next step again."""
        step = self.step + 1
        metrics = getattr(self, f"_{self.run.stage}")(step)
        self.step = step
        sha256 = self.bench.learner.publish(step).sha256
        return Trained(step, sha256, self.run.weights.get(step, ""), metrics)

    def weights_of(self, checkpoint: Path, step: int) -> str:
        """The sha256 of a checkpoint's weights. The learner holds them afterwards."""
        self.bench.learner.load(checkpoint)
        self.step = step
        return self.bench.learner.publish(step).sha256

    def rollouts(self, step: int, examples: bool = False) -> Stored:
        """The rollouts of a step. Raises `DataError` where the run has not kept them."""
        path = self.run.folder / rollouts.name_of(step)
        if not path.is_file():
            raise DataError(path, "does not exist: the run kept no rollouts of this step (--keep_rollouts)")
        return rollouts.read(path, self.examples if examples else None)

    def sampler(self) -> HFSampler:
        """A sampler with the learner's weights, as the run had it. Raises `ConfigError` for another engine's."""
        if self.cfg.engine != "hf":
            raise ConfigError(f"sampled by --engine {self.cfg.engine}, not by the embedded engine")
        if isinstance(self.bench.sampler, NoSampler):
            self.bench.sampler = HFSampler(self.model, self.renderer, self.cfg.sample_rows)
        self.bench.sync(self.step)
        return self.bench.sampler  # type: ignore[return-value]  # just made

    def _grpo(self, step: int) -> dict[str, float]:
        groups = self.rollouts(step).groups
        rows = [row for group in groups for one in group if (row := grpo.datum(self.cfg, one))]
        return grpo.update(self.cfg, self.bench, rows, step)

    def _sft(self, step: int) -> dict[str, float]:
        total = self.cfg.epochs * sft.updates_per_epoch(len(self._sft_rows), self.cfg.batch_size)
        lr = lr_at(step, total, self.cfg)
        return sft.fit_step(self.cfg, self.bench, self._sft_rows, step, lr, seed=self.cfg.seed)

    def _distill(self, step: int) -> dict[str, float]:
        rows = [row for group in self.rollouts(step).groups for one in group if (row := grpo.datum(self.cfg, one))]
        scores, _ = self._kept_scores.logprobs(rows, self.cfg.temperature)
        return grpo.update(self.cfg, self.bench, distill.taught(rows, scores, self.cfg.reward_coef), step)

    @cached_property
    def _kept_scores(self) -> CachedTeacher:
        """The run's cache of its teacher's scores; the teacher itself is not needed."""
        folder = self.run.folder / "teacher"
        return CachedTeacher(AbsentTeacher(folder), folder, sys.maxsize)

    @cached_property
    def _sft_rows(self) -> list[Datum]:
        cfg = self.cfg
        if missing := self.run.missing_inputs():
            raise DataError(self.run.folder, f"fine-tuning reads its data again: {missing[0]}; pass --data")
        source = local_path(cfg.data_path, str(self.run.folder)) if cfg.data_path else Path(cfg.data) / "train.jsonl"
        _, examples = sft.read_source(cfg, source)
        return sft.fitting_rows(cfg, self.bench, source, examples)[0]

    def _ei(self, step: int) -> dict[str, float]:
        done = (step - 1) // self.cfg.steps_per_round
        rows = ei.stored_rows(self.run.folder / ei.round_name(done))
        if not rows:
            return {}
        lr = lr_at(step, self.cfg.rounds * self.cfg.steps_per_round, self.cfg)
        how = {"seed": derive_seed(self.cfg.seed, "ei", done), "start": done * self.cfg.steps_per_round}
        return sft.fit_step(self.cfg, self.bench, rows, step, lr, **how)


@contextmanager
def opened(run: StoredRun) -> Iterator[Again]:
    """The learner of a stored run. Nothing is written into the run's directory."""
    with tempfile.TemporaryDirectory(prefix="replay-") as scratch:
        yield Again(run, Path(scratch))


def _with_model(run: StoredRun) -> Any:
    """The config with a model that is here: the one that the run began with, else the newest checkpoint.

    Adapters and the KL term rest on the model that the run began with, so it alone will do.
    """
    cfg, here = run.cfg, Path(run.cfg.model_id).is_dir()
    rests = cfg.lora_rank > 0 or getattr(cfg, "kl_coef", 0.0) > 0
    present = checkpoint.steps_present(run.checkpoints)
    if here or rests or not present:
        return cfg
    return replace(cfg, model_id=str(run.checkpoints / f"step_{present[-1]:06d}"))


def differing(recorded: dict[str, Any], found: dict[str, float]) -> dict[str, tuple[Any, float]]:
    """The metrics of an update that are not, to the last bit, as they were recorded."""
    alike = {name: value for name, value in found.items() if not name.startswith(CLOCKS)}
    return {name: (recorded.get(name), value) for name, value in alike.items() if recorded.get(name) != value}
