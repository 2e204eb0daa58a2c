"""Accuracy of a sampler on a set of problems, one record a completion."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_gsm8k.datatypes import Completion, Drawer, Prompt, SamplingParams
from grpo_gsm8k.errors import DataError
from grpo_gsm8k.evals.stats import bootstrap_mean, pass_at_k, wilson
from grpo_gsm8k.gsm8k.grading import extract, grade
from grpo_gsm8k.gsm8k.prompts import Renderer
from grpo_gsm8k.runs.files import read_jsonl
from grpo_gsm8k.runs.progress import progress

CHUNK = 256  # prompts between two movements of the progress bar


@dataclass(frozen=True)
class Evaluation:
    """The figures, and the rows they come from.

    Attributes:
        accuracy: share of right answers; with several completions a problem, their mean (avg@k).
        ci95: Wilson for one completion a problem; bootstrap over problems for several.
        pass_at_k: k → unbiased pass@k, for the powers of two up to the completions per problem.
        rows: `id, sample, question, prompt, response, answer, gold, extracted, correct, format_ok, finish_reason,
            tokens, weights_sha256`; `answer` is the reference solution as the data has it.
    """

    accuracy: float
    ci95: tuple[float, float]
    n: int
    pass_at_k: dict[str, float]
    format_accuracy: float
    truncated: float
    mean_tokens: float
    tokens_per_s: float
    seconds: float
    weights_sha256: str
    rows: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """Everything but the rows."""
        return {key: value for key, value in vars(self).items() if key != "rows"}

    def metrics(self) -> dict[str, float]:
        """As the `val/` metrics of a training run."""
        return {
            "val/accuracy": self.accuracy,
            "val/format_accuracy": self.format_accuracy,
            "val/ci_low": self.ci95[0],
            "val/ci_high": self.ci95[1],
            "val/n": float(self.n),
            "val/mean_tokens": self.mean_tokens,
            "val/truncated": self.truncated,
        }


def evaluate(
    sampler: Drawer,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    renderer: Renderer,
    weights_sha256: str,
    grading: Literal["strict", "flexible"] = "flexible",
    title: str = "eval",
    chunk_size: int = CHUNK,
) -> Evaluation:
    """Sample `params.n` completions of each prompt and grade them.

    Args:
        weights_sha256: of the weights that the sampler holds; every record carries it.
        chunk_size: prompts handed to the sampler at once.
    """
    started, rows = time.perf_counter(), list[dict[str, Any]]()
    with progress(title, len(prompts)) as bar:
        for start in range(0, len(prompts), chunk_size):
            chunk = prompts[start : start + chunk_size]
            for prompt, completions in zip(chunk, sampler.sample(chunk, params), strict=True):
                for sample, completion in enumerate(completions):
                    graded = record(prompt, completion, renderer, grading)
                    rows.append({**graded, "sample": sample, "weights_sha256": weights_sha256})
            bar.update(start + len(chunk), f"accuracy {_mean(rows, 'correct'):.3f}")
    seconds = time.perf_counter() - started
    right: dict[str, int] = defaultdict(int)
    for row in rows:
        right[row["id"]] += row["correct"]
    n, k = len(right), params.n
    shares = [count / k for count in right.values()]
    return Evaluation(
        accuracy=sum(shares) / n,
        ci95=wilson(sum(right.values()), n) if k == 1 else bootstrap_mean(shares),
        n=n,
        pass_at_k={
            str(j): sum(pass_at_k(k, count, j) for count in right.values()) / n
            for j in (2**i for i in range(k.bit_length()))
        },
        format_accuracy=_mean(rows, "format_ok"),
        truncated=sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        mean_tokens=_mean(rows, "tokens"),
        tokens_per_s=sum(row["tokens"] for row in rows) / seconds,
        seconds=seconds,
        weights_sha256=weights_sha256,
        rows=rows,
    )


def record(
    prompt: Prompt, completion: Completion, renderer: Renderer, grading: Literal["strict", "flexible"]
) -> dict[str, Any]:
    """One graded completion as a row of a results or samples file."""
    problem = prompt.problem
    return {
        "id": problem.id,
        "question": problem.question,
        "prompt": renderer.spell(prompt.token_ids),
        "response": completion.text,
        "answer": problem.answer,
        "gold": problem.gold,
        "extracted": extract(completion.text, grading, tags=renderer.tags),
        "correct": grade(completion.text, problem.gold, grading, tags=renderer.tags),
        "format_ok": renderer.style.format_ok(completion.text),
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.token_ids),
    }


def read_results(path: Path) -> dict[str, float]:
    """Problem id → accuracy on it, of a results file. Raises `DataError` naming a row that is not a result."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for line, row in read_jsonl(path):
        if not isinstance(row.get("id"), str) or not isinstance(row.get("correct"), bool):
            raise DataError(path, "not a result: needs `id` and `correct`", line)
        verdicts[row["id"]].append(row["correct"])
    return {key: sum(values) / len(values) for key, values in verdicts.items()}


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return float(sum(row[key] for row in rows)) / len(rows)
