"""Toys for the tests: a tiny model folder, a few word problems, and tokenizers and models by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from grpo_gsm8k import config
from grpo_gsm8k.config import TrainConfig
from grpo_gsm8k.datatypes import Datum, Example, Prompt, SamplingParams, Source, Trajectory, WeightsRef
from grpo_gsm8k.repro import requests
from grpo_gsm8k.tasks import base, load_task
from grpo_gsm8k.tasks.base import Tags, TaskOptions, load_examples
from grpo_gsm8k.tasks.gsm8k import toy
from grpo_gsm8k.tasks.render import Renderer
from grpo_gsm8k.tasks.rewards import Grader
from grpo_gsm8k.trainer.batch import Batch, make_batch, shifted, unshifted
from grpo_gsm8k.trainer.data import weighted
from grpo_gsm8k.trainer.policy import weights_sha256
from grpo_gsm8k.trainer.tiny_model import make_tiny_model

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = {"vocab_size": 320, "hidden_size": 32, "layers": 2, "heads": 2}


def make_data(folder: Path, train: int = 48, val: int = 12, test: int = 16) -> Path:
    """A data folder of toy problems."""
    return toy.write(folder, 0, {"train": train, "val": val, "test": test}, 0.5)


def word_problem(id: str, question: str, solution: str = "", gold: str = "", source: Source | None = None) -> Example:
    """A word problem with its solution."""
    return Example(id, question, gold, {"solution": solution}, source)


def load_problems(path: Path) -> list[Example]:
    """The word problems of a file."""
    return load_examples(load_task("gsm8k"), path)


def load_split(folder: Path, split: Any) -> list[Example]:
    """The word problems of a split."""
    return base.load_split(load_task("gsm8k"), folder, split)


def renderer_for(tokenizer: Any, style: str = "gsm8k", tags: Tags | None = None, **more: Any) -> Renderer:
    """GSM8K in a style, bound to a tokenizer."""
    return Renderer(tokenizer, load_task("gsm8k", TaskOptions(style, tags or Tags())), **more)


def graded(bench: Any, reward: Any = None) -> Grader:
    """Grades as the bench's task does, with a reward of one's own."""
    return Grader(bench.renderer.task, reward)


def draw(sampler: Any, prompts: Sequence[Prompt], params: SamplingParams, n: int = 1, seed: int = 0) -> Any:
    """`n` completions of each prompt."""
    return sampler.sample(requests(prompts, n, seed), params)


def load(sampler: Any, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Hand weights over, under their hash."""
    held = list(tensors)
    sampler.load(WeightsRef(version, weights_sha256(held)), lambda: held)


def datum(ids: Iterable[int], mask: Iterable[int], logprobs: Iterable[float] = (), advantage: float = 0.0) -> Datum:
    """A row whose trained tokens all have the same advantage."""
    mask = tuple(mask)
    return Datum(tuple(ids), mask, tuple(logprobs), tuple(advantage * m for m in mask))


def make_model(folder: Path, data: Path, **sizes: int) -> Path:
    """A tiny random model whose tokenizer knows the data."""
    texts = [json.loads(line)["question"] for line in (data / "train.jsonl").read_text().splitlines()]
    return make_tiny_model(folder, texts, 0, **{**SMALL, **sizes})


def attentive(model: Any) -> Any:
    """A new model whose tokens depend on what it attends to: it is made with residual branches of zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def cli(*args: str | Path, cwd: Path | None = None, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "grpo_gsm8k.cli", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd or REPOSITORY, timeout=600, check=False, **kwargs
    )


def stage_config(section: str, **flags: Any) -> Any:
    """A stage's config with everything small."""
    small = {
        "device": "cpu",
        "prompt_style": "gsm8k",
        "max_new_tokens": 12,
        "eval_examples": 4,
        "max_tokens_per_microbatch": 512,
    }
    return config.resolve(section, flags={**small, **flags})


def rows(*sequences: tuple[Iterable[int], int], advantage: float = 0.0, logprob: float = 0.0) -> list[Datum]:
    """Rows from (ids, length of the prompt)."""
    out = []
    for ids, prompt in sequences:
        ids = tuple(ids)
        mask = (0,) * prompt + (1,) * (len(ids) - prompt)
        out.append(datum(ids, mask, (logprob * m for m in mask), advantage))
    return out


def with_advantage(row: Datum, advantage: float) -> Datum:
    """The same row with another advantage on every trained token."""
    return replace(row, advantages=tuple(advantage * m for m in row.mask))


class TableModel(nn.Module):
    """A language model whose logits are a table looked up by the current token: known by heart."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.head = SimpleNamespace(weight=torch.eye(table.shape[1]))

    @property
    def base_model(self) -> Any:
        """What `token_logprobs` calls for hidden states; here the hidden state is the logits."""

        class Output:
            def __init__(self, hidden: torch.Tensor) -> None:
                self.last_hidden_state = hidden

        return lambda input_ids, use_cache: Output(self.table[input_ids])

    def get_output_embeddings(self) -> SimpleNamespace:
        """The head that turns hidden states into logits: the identity."""
        return self.head


def even_tokens(completion: Trajectory, example: Example) -> float:
    """A reward that varies within the groups of a random model: the share of even ids."""
    return sum(i % 2 == 0 for i in completion.token_ids) / len(completion.token_ids)


def gradient(learner: Any) -> dict[str, torch.Tensor]:
    """What has been accumulated, by parameter."""
    return {name: m.grad.clone() for name, m in learner.optimizer.masters.items() if m.grad is not None}


def batch_of(data: Sequence[Datum], aggregation: Any = "token", max_tokens: int = 0) -> Batch:
    """The tensors of one update."""
    return make_batch(weighted(data, aggregation, max_tokens))


def tensor_of(values: Sequence[Sequence[float]]) -> torch.Tensor:
    """What a learner says per token of each row, `(B, T)` as in a batch."""
    return shifted(values, [len(row) - 1 for row in values])


def values_of(x: torch.Tensor, data: Sequence[Datum]) -> list[tuple[float, ...]]:
    """The other way round."""
    return unshifted(x, [len(row.token_ids) - 1 for row in data])


def train_config(**flags: Any) -> TrainConfig:
    """An SFT config for a learner."""
    cfg: TrainConfig = stage_config("sft", **flags)
    return cfg
