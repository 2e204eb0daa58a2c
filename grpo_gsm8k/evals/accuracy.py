"""Accuracy of a sampler on a set of problems: one record per completion, and all metrics computed from them."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo_gsm8k.datatypes import Prompt, Rollout, Sampler, SamplingParams
from grpo_gsm8k.engines.trajectories import sample_trajectories
from grpo_gsm8k.errors import DataError
from grpo_gsm8k.evals.stats import bootstrap_mean, maj_at_k, pass_at_k, rate_interval, share_interval, spread
from grpo_gsm8k.repro import derive_seed
from grpo_gsm8k.runs.files import read_jsonl
from grpo_gsm8k.runs.progress import progress
from grpo_gsm8k.tasks.render import Renderer
from grpo_gsm8k.tasks.rewards import Grader

CHUNK = 256  # prompts per update of the progress bar
Row = dict[str, Any]
RATES: dict[str, Callable[[Row], bool | None]] = {
    "accuracy": lambda row: row["correct"],
    "strict_accuracy": lambda row: row.get("correct_strict"),
    "flexible_accuracy": lambda row: row.get("correct_flexible"),
    "format_accuracy": lambda row: row["format_ok"],
    "truncated": lambda row: row["finish_reason"] == "length",
}


@dataclass(frozen=True)
class Evaluation:
    """The metrics of an evaluation, and its rows.

    Attributes:
        accuracy: share of right answers; with several completions per problem, their mean (avg@k). None for a task
            without right answers.
        ci95: of the accuracy: Wilson for one completion per problem, bootstrap over problems for several, see
            `stats.share_interval`. Of the mean reward if there is no accuracy.
        reward: mean reward.
        strict_accuracy, flexible_accuracy: the same completions graded in both modes; `accuracy` is one of the two.
        format_accuracy, truncated: shares of completions in the requested form, and cut at the token limit.
        pass_at_k, maj_at_k: k → unbiased pass@k, and majority of k; for the powers of two up to the completions
            per problem and seed, and for that number itself.
        intervals: figure → 95 % interval, for the shares above and for pass@k and maj@k.
        by_length: quarters of the completions by length: `tokens` [shortest, longest], `n`, `accuracy`, `ci95`,
            `truncated`.
        by_seed: sampling seed → accuracy with it.
        spread: standard deviations between seeds and between sets of problems; see `stats.Spread`.
        rows: `id, sample, question, prompt, response, answer, gold, extracted, correct, format_ok, reward,
            finish_reason, tokens, weights_sha256`, the `details` of the task's grade (gsm8k: correct_strict,
            correct_flexible), and `seed` where one was given; `answer` is the reference solution as the data has it.
    """

    accuracy: float | None
    ci95: tuple[float, float]
    n: int
    pass_at_k: dict[str, float]
    maj_at_k: dict[str, float]
    strict_accuracy: float | None
    flexible_accuracy: float | None
    format_accuracy: float | None
    truncated: float
    reward: float
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
        """All metrics, without the rows."""
        return {key: value for key, value in vars(self).items() if key != "rows"}

    def metrics(self) -> dict[str, float]:
        """The `val/` metrics of a training run, without those that the task does not define."""
        found = {
            "val/accuracy": self.accuracy,
            "val/strict_accuracy": self.strict_accuracy,
            "val/format_accuracy": self.format_accuracy,
            "val/reward": self.reward,
            "val/ci_low": self.ci95[0],
            "val/ci_high": self.ci95[1],
            "val/n": float(self.n),
            "val/mean_tokens": self.mean_tokens,
            "val/truncated": self.truncated,
        }
        return {name: value for name, value in found.items() if value is not None}


def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    renderer: Renderer,
    weights_sha256: str,
    *,
    samples: int = 1,
    seeds: Sequence[int] = (),
    title: str = "eval",
    chunk_size: int = CHUNK,
    context: int = 0,
) -> Evaluation:
    """Sample `samples` trajectories of each prompt with each seed, and grade each once.

    Args:
        weights_sha256: hash of the sampler's weights, stored in every record.
        seeds: sampling seeds; empty for greedy decoding.
        chunk_size: prompts per call of the sampler.
        context: the model's context in tokens, for trajectories of several turns.
    """
    grader = Grader(renderer.task)
    started, rows = time.perf_counter(), list[Row]()
    draws: list[tuple[Row, int]] = [({"seed": seed}, derive_seed(seed, "eval")) for seed in seeds]
    with progress(title, len(prompts), keep=False) as bar:
        for start in range(0, len(prompts), chunk_size):
            chunk = prompts[start : start + chunk_size]
            for named, seed in draws or [({}, 0)]:
                found = sample_trajectories(sampler, renderer, chunk, params, n=samples, seed=seed, context=context)
                for group, grades in zip(found, grader.grade(found), strict=True):
                    for sample, (trajectory, grade) in enumerate(zip(group, grades, strict=True)):
                        graded = record(Rollout(trajectory, grade), renderer)
                        rows.append({**graded, **named, "sample": sample, "weights_sha256": weights_sha256})
            bar.update(start + len(chunk), _so_far(rows))
    return figures(rows, samples, time.perf_counter() - started, renderer.task.vote)


def _so_far(rows: Sequence[Row]) -> str:
    known = [row["correct"] for row in rows if row["correct"] is not None]
    return f"accuracy {100 * fmean(known):.1f} %" if known else f"reward {fmean(row['reward'] for row in rows):.3f}"


def figures(rows: list[Row], samples: int, seconds: float, vote: Callable[[str | None], Hashable]) -> Evaluation:
    """Compute all metrics of the rows; each example has `samples` rows per seed.

    Args:
        vote: normal form of an answer, for majority voting.
    """
    by_problem = grouped(rows)
    known = {name: of for name, of in RATES.items() if all(of(row) is not None for row in rows)}
    outcomes = {name: [[bool(of(row)) for row in own] for own in by_problem.values()] for name, of in known.items()}
    rewards_P = [[row["reward"] for row in own] for own in by_problem.values()]
    graded = "accuracy" in known
    votes = [[(vote(row["extracted"]), row["correct"]) for row in own] for own in by_problem.values()] if graded else []
    ks = sorted({2**i for i in range(samples.bit_length())} | {samples}) if graded else []
    drawn = [(len(own), sum(own)) for own in outcomes.get("accuracy", [])]
    passed = {k: [pass_at_k(n, right, k) for n, right in drawn] for k in ks}
    voted = {k: [maj_at_k(own, k) for own in votes] for k in ks}
    rates: dict[str, Any] = {
        name: fmean(map(bool, map(of, rows))) if name in known else None for name, of in RATES.items()
    }
    intervals = {name: rate_interval(own) for name, own in outcomes.items()}
    if not graded:
        intervals["reward"] = bootstrap_mean([fmean(own) for own in rewards_P])
    if samples > 1 and graded:
        for name, values in (("pass", passed), ("maj", voted)):
            intervals |= {f"{name}@{k}": share_interval(own) for k, own in values.items()}
    seeds = list(dict.fromkeys(row.get("seed") for row in rows))
    right_S_P = [
        [sum(bool(r["correct"]) for r in own if r.get("seed") == s) for own in by_problem.values()] for s in seeds
    ]
    return Evaluation(
        **rates,
        reward=fmean(row["reward"] for row in rows),
        ci95=intervals["accuracy" if graded else "reward"],
        n=len(by_problem),
        pass_at_k={str(k): fmean(own) for k, own in passed.items()},
        maj_at_k={str(k): fmean(own) for k, own in voted.items()},
        mean_tokens=fmean(row["tokens"] for row in rows),
        intervals=intervals,
        by_length=by_length(rows) if graded else [],
        by_seed={str(s): fmean(own) / samples for s, own in zip(seeds, right_S_P, strict=True) if s is not None},
        spread=asdict(spread(right_S_P, samples)) if graded else {},
        tokens_per_s=sum(row["tokens"] for row in rows) / seconds,
        seconds=seconds,
        weights_sha256=rows[0]["weights_sha256"],
        rows=rows,
    )


def by_length(rows: Sequence[Row], parts: int = 4) -> list[dict[str, Any]]:
    """Accuracy by quarters of completion length; equal lengths stay together."""
    lengths = sorted(row["tokens"] for row in rows)
    edges = sorted({lengths[len(lengths) * i // parts] for i in range(1, parts)})
    bins: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        bins[bisect_right(edges, row["tokens"])].append(row)
    return [
        {
            "tokens": [min(row["tokens"] for row in part), max(row["tokens"] for row in part)],
            "n": len(part),
            "accuracy": fmean(bool(row["correct"]) for row in part),
            "ci95": rate_interval([[row["correct"] for row in own] for own in grouped(part).values()]),
            "truncated": fmean(row["finish_reason"] == "length" for row in part),
        }
        for _, part in sorted(bins.items())
    ]


def record(rollout: Rollout, renderer: Renderer) -> Row:
    """A graded trajectory as a row of a results or samples file."""
    trajectory, grade = rollout.trajectory, rollout.grade
    example = trajectory.prompt.example
    return {
        "id": example.id,
        "question": example.text,
        "prompt": renderer.spell(trajectory.prompt.token_ids),
        "response": trajectory.text,
        "answer": example.meta.get("solution", example.answer),
        "gold": example.answer,
        "extracted": grade.answer,
        "correct": grade.correct,
        **grade.details,
        "format_ok": grade.format_ok,
        "reward": grade.reward,
        "finish_reason": trajectory.finish_reason,
        "tokens": sum(trajectory.mask),
        **({"turns": trajectory.turns} if trajectory.turns > 1 else {}),
        **{key: example.meta[key] for key in ("seed_id", "perturbation") if key in example.meta},
    }


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Problem id → its rows."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["id"]].append(row)
    return dict(groups)


def read_rows(path: Path) -> dict[str, list[Row]]:
    """Read a results file: problem id → its rows. Raises `DataError` for a row that is not a result."""
    rows = []
    for line, row in read_jsonl(path):
        judged = isinstance(row.get("correct"), bool) or (row.get("correct") is None and "reward" in row)
        if not isinstance(row.get("id"), str) or not judged:
            raise DataError(path, "not a result: needs `id` and `correct`", line)
        rows.append(row)
    return grouped(rows)


def accuracies(rows: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """Problem id → accuracy, or mean reward if the task has no right answers."""
    return {
        key: fmean(row["reward"] if row["correct"] is None else row["correct"] for row in own)
        for key, own in rows.items()
    }


def read_results(path: Path) -> dict[str, float]:
    """Problem id → accuracy on it, of a results file; see `read_rows`."""
    return accuracies(read_rows(path))
