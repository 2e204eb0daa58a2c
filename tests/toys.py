"""Toys for the tests: a tiny model folder, a few word problems, and tokenizers and models by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from grpo_gsm8k import config
from grpo_gsm8k.config import TrainConfig
from grpo_gsm8k.data_prep import write_splits
from grpo_gsm8k.datatypes import Completion, Problem, TokenRow
from grpo_gsm8k.tasks.gsm8k.toy import make_problems
from grpo_gsm8k.trainer.batch import Batch
from grpo_gsm8k.trainer.tiny_model import make_tiny_model

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = {"vocab_size": 320, "hidden_size": 32, "layers": 2, "heads": 2}


def make_data(folder: Path, train: int = 48, val: int = 12, test: int = 16) -> Path:
    """A data folder of toy problems."""
    problems = make_problems(0, {"train": train, "val": val, "test": test})
    write_splits(folder, problems, {"source": "toy", "seed": 0})
    return folder


def make_model(folder: Path, data: Path, **sizes: int) -> Path:
    """A tiny random model whose tokenizer knows the data."""
    texts = [json.loads(line)["question"] for line in (data / "train.jsonl").read_text().splitlines()]
    return make_tiny_model(folder, texts, 0, **{**SMALL, **sizes})


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


def rows(*sequences: tuple[Iterable[int], int], advantage: float = 0.0, logprob: float = 0.0) -> list[TokenRow]:
    """Rows from (ids, length of the prompt)."""
    out = []
    for ids, prompt in sequences:
        ids = tuple(ids)
        mask = (0,) * prompt + (1,) * (len(ids) - prompt)
        out.append(TokenRow(ids, mask, tuple(logprob * m for m in mask), advantage))
    return out


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


def even_tokens(completion: Completion, problem: Problem) -> float:
    """A reward that varies within the groups of a random model: the share of even ids."""
    return sum(i % 2 == 0 for i in completion.token_ids) / len(completion.token_ids)


def gradient(learner: Any) -> dict[str, torch.Tensor]:
    """What has been accumulated, by parameter."""
    return {name: m.grad.clone() for name, m in learner.optimizer.masters.items() if m.grad is not None}


def same_batch(a: Batch, b: Batch) -> bool:
    """Whether two batches hold the same numbers."""
    return all(torch.equal(x, y) for x, y in zip(list(vars(a).values())[:-1], list(vars(b).values())[:-1], strict=True))


def train_config(**flags: Any) -> TrainConfig:
    """An SFT config for a learner."""
    cfg: TrainConfig = stage_config("sft", **flags)
    return cfg
