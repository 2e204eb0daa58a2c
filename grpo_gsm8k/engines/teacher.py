"""A teacher in a vLLM engine: `distill --teacher_engine vllm`.

The engine is handed the weights as a sampler is, their hash checked, and reads each row as a prompt. vLLM gives a
prompt's log-probabilities at temperature 1, so nothing else is asked of it; `preflight.check_teacher` holds what it
says against the model's own logits before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grpo_gsm8k.config import DistillConfig
from grpo_gsm8k.datatypes import Datum, WeightsRef
from grpo_gsm8k.engines.channel import ChildGone
from grpo_gsm8k.engines.process import Engine, ProcessSampler, placements
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.tasks.render import Renderer
from grpo_gsm8k.trainer import adapter
from grpo_gsm8k.trainer.policy import dtype_name
from grpo_gsm8k.trainer.teacher import FrozenTeacher, config_of


class EngineTeacher:
    """Implements `trainer.teacher.Teacher`."""

    def __init__(self, frozen: FrozenTeacher, engine: Engine, scratch: Path) -> None:
        """Hand over the weights of `frozen`, which is not needed afterwards.

        Args:
            scratch: folder for weights that do not fit into shared memory.
        """
        self.sha256, self.engine = frozen.sha256, engine
        self._sampler = ProcessSampler([engine], scratch)
        self._sampler.load(WeightsRef(0, self.sha256), lambda: adapter.own_weights(frozen.model))

    def logprobs(self, data: Sequence[Datum], temperature: float = 1.0) -> list[tuple[float, ...]]:
        """See `Teacher`; the temperature is 1. Raises `EngineError` when the engine fails for good."""
        assert temperature == 1.0, "checked before the run"

        def parse(answer: dict[str, Any]) -> list[tuple[float, ...]]:
            return scores_of(answer, data)

        return self.engine.ask("score", parse, rows=[row.token_ids for row in data])

    def close(self) -> None:
        """End the engine."""
        self._sampler.close()


def scores_of(answer: dict[str, Any], data: Sequence[Datum]) -> list[tuple[float, ...]]:
    """Scores of the trained tokens from an engine's answer. Raises `ChildGone` for one that cannot be of these rows."""
    rows = answer.get("logprobs", [])
    if [len(row) for row in rows] != [len(row.token_ids) for row in data]:
        raise ChildGone(f"answered {len(rows)} rows for {len(data)}, or of other lengths")
    found = [
        tuple(value if m else 0.0 for value, m in zip(row, one.mask, strict=True))
        for row, one in zip(rows, data, strict=True)
    ]
    if not all(math.isfinite(value) for row in found for value in row):
        raise ChildGone("answered log-probabilities that are not finite")
    return found


def check(cfg: DistillConfig) -> None:
    """Raise `ConfigError` for what a teacher in vLLM cannot do."""
    if cfg.temperature != 1:
        raise ConfigError(
            f"--teacher_engine vllm with --temperature {cfg.temperature:g}: vLLM scores at temperature 1 alone; leave "
            "it at 1, or the teacher in this process (--teacher_engine hf)"
        )
    if adapter.in_folder(cfg.teacher):
        raise ConfigError(
            f"--teacher_engine vllm: {cfg.teacher} is an adapter; make it a model with `grpo-gsm8k merge` first"
        )


@contextmanager
def opened(cfg: DistillConfig, frozen: FrozenTeacher, renderer: Renderer, learner: str, log: Path) -> Iterator[Any]:
    """A teacher in vLLM on `--teacher_device`.

    Args:
        learner: the device of the student.
        log: of the engine.

    Raises:
        ConfigError: vLLM is not installed, or has no device of its own.
    """
    if learner.startswith("cuda") and not cfg.teacher_device:
        raise ConfigError("--teacher_engine vllm: name the teacher's GPU with --teacher_device, as in cuda:1")
    theirs = replace(config_of(cfg), engine="vllm", vllm_device=cfg.teacher_device, vllm_devices="", lora_rank=0)
    theirs = replace(theirs, dtype=dtype_name(frozen.model.named_parameters()), weight_transfer="file")
    (row,) = placements(theirs, learner, torch.cuda.device_count())
    teacher = EngineTeacher(frozen, Engine(theirs, renderer, row, log=log), log.parent / "handover" / "teacher")
    del frozen  # the engine has it
    with closing(teacher):
        yield teacher
