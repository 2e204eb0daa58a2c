"""Stage 7: evaluation as a command.

    grpo-gsm8k eval --model_id MODEL --eval_path DIR/test.jsonl                       greedy accuracy
    grpo-gsm8k eval --model_id MODEL --samples 8 --temperature 1.0 --seeds 0,1,2      avg@8, pass@k, maj@k, spread
    grpo-gsm8k eval --model_id MODEL --shots 4 --shots_path DIR/train.jsonl           four worked examples first
    grpo-gsm8k eval --model_id MODEL --engine vllm --tp_size 2                        vLLM, on two GPUs
    python -m grpo_gsm8k.fast_eval_vllm --model_id MODEL --eval_path F --limit 200    the same command

The results file has one row a completion; every row carries the sha256 of the weights that wrote it. Figures and
samples go to W&B, too, where it is on.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpo_gsm8k.config import EvalConfig
from grpo_gsm8k.datatypes import Example, SamplingParams
from grpo_gsm8k.errors import ConfigError, DiskError
from grpo_gsm8k.repro import derive_seed, shuffled
from grpo_gsm8k.runs import wandb_sink
from grpo_gsm8k.runs.files import check_writable, write_json, write_jsonl
from grpo_gsm8k.runs.progress import talk
from grpo_gsm8k.tasks.base import Task, load_examples
from grpo_gsm8k.tasks.contamination import words
from grpo_gsm8k.tasks.render import task_of
from grpo_gsm8k.workbench import evaluate_model, settled


def run(cfg: EvalConfig, results_path: Path | None = None, title: str = "eval") -> dict[str, Any]:
    """Evaluate, write the results file and a summary beside it, return the summary.

    Args:
        results_path: where the rows go; by default a stamped name in `cfg.out_dir`.

    Raises:
        ConfigError: several completions a problem without a temperature, examples from nowhere or from the
            evaluated file, or vLLM where it is not installed.
    """
    seeds = sampling_seeds(cfg)
    if (cfg.samples > 1 or len(seeds) > 1) and cfg.temperature == 0:
        raise ConfigError(
            "several --samples or --seeds need --temperature above 0: greedy completions are all the same"
        )
    cfg, task = settled(cfg), task_of(cfg)
    task.folder = results_path.parent if results_path else Path(cfg.out_dir)
    examples = load_examples(task, cfg.eval_path)
    shots = draw_shots(cfg, task, examples)
    if results_path is None:
        name = cfg.run_name or f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}_{Path(cfg.model_id).name}"
        results_path = Path(cfg.out_dir) / f"{Path(name).name or 'eval'}.jsonl"
    check_writable(results_path)  # before an hour of sampling, not behind it
    params = SamplingParams(cfg.max_new_tokens, cfg.temperature, cfg.top_p)
    how: dict[str, Any] = {"samples": cfg.samples, "seeds": seeds, "shots": shots}
    result = evaluate_model(cfg, task, examples[: cfg.limit or None], params, cfg.eval_path, title, **how)
    asked = {key: getattr(cfg, key) for key in ("model_id", "eval_path", "grading", "samples", "temperature", "shots")}
    summary = {**result.summary(), "results_path": str(results_path), **asked, "task": task.spec}
    try:
        write_jsonl(results_path, result.rows)
        write_json(results_path.with_suffix(".json"), summary)
    except DiskError as fault:
        raise DiskError(f"{fault}; {keep_elsewhere(result.rows, summary)}") from fault
    if wandb_sink.wanted():
        page = wandb_sink.WandbSink(cfg.wandb_project, results_path.stem, results_path.with_suffix(".wandb"), vars(cfg))
        page.log(0, result.metrics())
        page.table(0, "val/samples", result.rows)
        page.close()
    return summary


def keep_elsewhere(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """Save an evaluation whose folder has filled up: its rows to the temporary folder, or else its figures to stderr.

    Returns:
        where they are, for the message.
    """
    place = Path(tempfile.gettempdir()) / f"eval_{secrets.token_hex(4)}.jsonl"
    try:
        write_jsonl(place, rows)
    except DiskError:
        figures = {key: value for key, value in summary.items() if key != "results_path"}
        talk(json.dumps(figures))
        return f"{_figure(summary)} is all that is left"
    return f"the rows are in {place}, {_figure(summary)}"


def _figure(summary: Mapping[str, Any]) -> str:
    name = "reward" if summary["accuracy"] is None else "accuracy"
    return f"{name} {summary[name]:.4f} on {summary['n']} problems"


def sampling_seeds(cfg: EvalConfig) -> list[int]:
    """The seeds of `--seeds`, or that of `--seed`."""
    if not cfg.seeds:
        return [cfg.seed]
    texts = [text.strip() for text in cfg.seeds.split(",")]
    if not all(text.isascii() and text.isdigit() for text in texts) or len(set(texts)) < len(texts):
        raise ConfigError(f"--seeds {cfg.seeds}: must be different whole numbers, as in 0,1,2")
    return [int(text) for text in texts]


def draw_shots(cfg: EvalConfig, task: Task, evaluated: Sequence[Example]) -> list[Example]:
    """The worked examples: the same for every problem, drawn by the seed, none of them an evaluated problem."""
    if not cfg.shots:
        return []
    if not cfg.shots_path:
        raise ConfigError("--shots needs --shots_path: the training problems that the examples come from")
    if any(example.source and example.source.rendered for example in evaluated):
        raise ConfigError(f"--shots: {cfg.eval_path} holds prompts rendered without examples; name the bare problems")
    known = {words(example.text) for example in evaluated}
    pool = [example for example in load_examples(task, cfg.shots_path) if words(example.text) not in known]
    if len(pool) < cfg.shots:
        raise ConfigError(
            f"--shots {cfg.shots}: {cfg.shots_path} has {len(pool)} problems that are not evaluated themselves"
        )
    return [pool[i] for i in shuffled(len(pool), derive_seed(cfg.seed, "shots"))[: cfg.shots]]


if __name__ == "__main__":
    from grpo_gsm8k.cli import run_command

    run_command("eval")
