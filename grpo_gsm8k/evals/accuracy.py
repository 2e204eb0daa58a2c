"""Accuracy of a sampler on a set of problems, one record a completion, and every figure that follows from them."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from grpo_gsm8k.datatypes import Completion, Drawer, Prompt, SamplingParams
from grpo_gsm8k.errors import DataError
from grpo_gsm8k.evals.stats import bootstrap_mean, maj_at_k, pass_at_k, rate_interval, spread
from grpo_gsm8k.repro import derive_seed
from grpo_gsm8k.runs.files import read_jsonl
from grpo_gsm8k.runs.progress import progress
from grpo_gsm8k.tasks.gsm8k.grading import extract, grade, parse_number
from grpo_gsm8k.tasks.gsm8k.prompts import Renderer

CHUNK = 256  # prompts between two movements of the progress bar
Row = dict[str, Any]
RATES: dict[str, Callable[[Row], bool]] = {
    "accuracy": lambda row: row["correct"],
    "strict_accuracy": lambda row: row["correct_strict"],
    "flexible_accuracy": lambda row: row["correct_flexible"],
    "format_accuracy": lambda row: row["format_ok"],
    "truncated": lambda row: row["finish_reason"] == "length",
}


@dataclass(frozen=True)
class Evaluation:
    """The figures, and the rows they come from.

    Attributes:
        accuracy: share of right answers; with several completions a problem, their mean (avg@k).
        ci95: of the accuracy: Wilson for one completion a problem; bootstrap over problems for several.
        strict_accuracy, flexible_accuracy: the same completions graded either way; `accuracy` is one of the two.
        format_accuracy, truncated: shares of completions in the form that was asked for, and cut at the limit.
        pass_at_k, maj_at_k: k → unbiased pass@k, and majority of k; for the powers of two up to the completions
            per problem and seed, and for that number itself.
        intervals: figure → 95 % interval, for the shares above and for pass@k and maj@k.
        by_length: quarters of the completions by length: `tokens` [shortest, longest], `n`, `accuracy`, `ci95`,
            `truncated`.
        by_seed: sampling seed → accuracy with it.
        spread: of an accuracy with one seed, between seeds and between sets of problems; see `stats.Spread`.
        rows: `id, sample, question, prompt, response, answer, gold, extracted, correct, correct_strict,
            correct_flexible, format_ok, finish_reason, tokens, weights_sha256`, and `seed` where one was given;
            `answer` is the reference solution as the data has it.
    """

    accuracy: float
    ci95: tuple[float, float]
    n: int
    pass_at_k: dict[str, float]
    maj_at_k: dict[str, float]
    strict_accuracy: float
    flexible_accuracy: float
    format_accuracy: float
    truncated: float
    mean_tokens: float
    intervals: dict[str, tuple[float, float]]
    by_length: list[dict[str, Any]]
    by_seed: dict[str, float]
    spread: dict[str, float | None]
    tokens_per_s: float
    seconds: float
    weights_sha256: str
    rows: list[Row]

    def summary(self) -> dict[str, Any]:
        """Everything but the rows."""
        return {key: value for key, value in vars(self).items() if key != "rows"}

    def metrics(self) -> dict[str, float]:
        """As the `val/` metrics of a training run."""
        return {
            "val/accuracy": self.accuracy,
            "val/strict_accuracy": self.strict_accuracy,
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
    seeds: Sequence[int] = (),
) -> Evaluation:
    """Sample `params.n` completions of each prompt, with each seed, and grade them.

    Args:
        weights_sha256: of the weights that the sampler holds; every record carries it.
        chunk_size: prompts handed to the sampler at once.
        seeds: sampling seeds; none for `params` as it is.
    """
    started, rows = time.perf_counter(), list[Row]()
    draws: list[tuple[Row, SamplingParams]] = [
        ({"seed": seed}, replace(params, seed=derive_seed(seed, "eval"))) for seed in seeds
    ]
    with progress(title, len(prompts)) as bar:
        for start in range(0, len(prompts), chunk_size):
            chunk = prompts[start : start + chunk_size]
            for named, drawn in draws or [({}, params)]:
                for prompt, completions in zip(chunk, sampler.sample(chunk, drawn), strict=True):
                    for sample, completion in enumerate(completions):
                        graded = record(prompt, completion, renderer, grading)
                        rows.append({**graded, **named, "sample": sample, "weights_sha256": weights_sha256})
            bar.update(start + len(chunk), f"accuracy {fmean(row['correct'] for row in rows):.3f}")
    return figures(rows, params.n, time.perf_counter() - started)


def figures(rows: list[Row], samples: int, seconds: float) -> Evaluation:
    """Every figure of the rows, of which each problem has `samples` with each seed."""
    by_problem = grouped(rows)
    outcomes = {name: [[of(row) for row in own] for own in by_problem.values()] for name, of in RATES.items()}
    votes = [[(_vote(row), row["correct"]) for row in own] for own in by_problem.values()]
    ks = sorted({2**i for i in range(samples.bit_length())} | {samples})
    drawn = [(len(own), sum(own)) for own in outcomes["accuracy"]]
    passed = {k: [pass_at_k(n, right, k) for n, right in drawn] for k in ks}
    voted = {k: [maj_at_k(own, k) for own in votes] for k in ks}
    rates = {name: fmean(map(of, rows)) for name, of in RATES.items()}
    intervals = {name: rate_interval(own) for name, own in outcomes.items()}
    if samples > 1:
        for name, values in (("pass", passed), ("maj", voted)):
            intervals |= {f"{name}@{k}": bootstrap_mean(own) for k, own in values.items()}
    seeds = list(dict.fromkeys(row.get("seed") for row in rows))
    right_S_P = [[sum(r["correct"] for r in own if r.get("seed") == s) for own in by_problem.values()] for s in seeds]
    return Evaluation(
        **rates,
        ci95=intervals["accuracy"],
        n=len(by_problem),
        pass_at_k={str(k): fmean(own) for k, own in passed.items()},
        maj_at_k={str(k): fmean(own) for k, own in voted.items()},
        mean_tokens=fmean(row["tokens"] for row in rows),
        intervals=intervals,
        by_length=by_length(rows),
        by_seed={str(s): fmean(own) / samples for s, own in zip(seeds, right_S_P, strict=True) if s is not None},
        spread=asdict(spread(right_S_P, samples)),
        tokens_per_s=sum(row["tokens"] for row in rows) / seconds,
        seconds=seconds,
        weights_sha256=rows[0]["weights_sha256"],
        rows=rows,
    )


def by_length(rows: Sequence[Row], parts: int = 4) -> list[dict[str, Any]]:
    """Accuracy of the shorter and the longer completions: equal shares of them, equal lengths kept together."""
    lengths = sorted(row["tokens"] for row in rows)
    edges = sorted({lengths[len(lengths) * i // parts] for i in range(1, parts)})
    bins: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        bins[bisect_right(edges, row["tokens"])].append(row)
    return [
        {
            "tokens": [min(row["tokens"] for row in part), max(row["tokens"] for row in part)],
            "n": len(part),
            "accuracy": fmean(map(RATES["accuracy"], part)),
            "ci95": rate_interval([[row["correct"] for row in own] for own in grouped(part).values()]),
            "truncated": fmean(map(RATES["truncated"], part)),
        }
        for _, part in sorted(bins.items())
    ]


def record(prompt: Prompt, completion: Completion, renderer: Renderer, grading: Literal["strict", "flexible"]) -> Row:
    """One graded completion as a row of a results or samples file."""
    problem, text = prompt.problem, completion.text
    thought: dict[str, Any] = {"tags": renderer.tags, "opened": renderer.style.opens_thought}
    strict, flexible = (grade(text, problem.gold, mode, **thought) for mode in ("strict", "flexible"))
    return {
        "id": problem.id,
        "question": problem.question,
        "prompt": renderer.spell(prompt.token_ids),
        "response": text,
        "answer": problem.answer,
        "gold": problem.gold,
        "extracted": extract(text, grading, **thought),
        "correct": strict if grading == "strict" else flexible,
        "correct_strict": strict,
        "correct_flexible": flexible,
        "format_ok": renderer.style.format_ok(text),
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.token_ids),
    }


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Problem id → its rows."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["id"]].append(row)
    return dict(groups)


def read_rows(path: Path) -> dict[str, list[Row]]:
    """Problem id → its rows, of a results file. Raises `DataError` naming a row that is not a result."""
    rows = []
    for line, row in read_jsonl(path):
        if not isinstance(row.get("id"), str) or not isinstance(row.get("correct"), bool):
            raise DataError(path, "not a result: needs `id` and `correct`", line)
        rows.append(row)
    return grouped(rows)


def accuracies(rows: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """Problem id → accuracy on it."""
    return {key: fmean(row["correct"] for row in own) for key, own in rows.items()}


def read_results(path: Path) -> dict[str, float]:
    """Problem id → accuracy on it, of a results file; see `read_rows`."""
    return accuracies(read_rows(path))


def _vote(row: Row) -> Any:
    """The value that a completion votes for, however it is written."""
    return None if row["extracted"] is None else parse_number(row["extracted"])
