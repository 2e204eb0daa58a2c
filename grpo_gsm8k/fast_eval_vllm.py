"""Stage 7: evaluation as a command.

    grpo-gsm8k eval --model_id MODEL --eval_path DIR/test.jsonl                       greedy accuracy
    grpo-gsm8k eval --model_id MODEL --samples 8 --temperature 1.0 --json             avg@8 and pass@k
    grpo-gsm8k eval --model_id MODEL --engine vllm --tp_size 2                        vLLM, on two GPUs
    python -m grpo_gsm8k.fast_eval_vllm --model_id MODEL --eval_path F --limit 200    the same command

The results file has one row a completion; every row carries the sha256 of the weights that wrote it. Figures and
samples go to W&B, too, where it is on.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpo_gsm8k.config import EvalConfig
from grpo_gsm8k.datatypes import SamplingParams
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.gsm8k.problems import load_problems
from grpo_gsm8k.repro import derive_seed
from grpo_gsm8k.runs import wandb_sink
from grpo_gsm8k.runs.files import write_json, write_jsonl
from grpo_gsm8k.workbench import evaluate_model


def run(cfg: EvalConfig, results_path: Path | None = None, title: str = "eval") -> dict[str, Any]:
    """Evaluate, write the results file and a summary beside it, return the summary.

    Args:
        results_path: where the rows go; by default a stamped name in `cfg.out_dir`.

    Raises:
        ConfigError: several completions a problem without a temperature, or vLLM where it is not installed.
    """
    if cfg.samples > 1 and cfg.temperature == 0:
        raise ConfigError("--samples above 1 needs --temperature above 0: greedy completions are all the same")
    if cfg.samples < 1:
        raise ConfigError("--samples must be at least 1")
    problems = load_problems(Path(cfg.eval_path))[: cfg.limit or None]
    params = SamplingParams(
        cfg.samples, cfg.max_new_tokens, cfg.temperature, cfg.top_p, seed=derive_seed(cfg.seed, "eval")
    )
    result = evaluate_model(cfg, problems, params, cfg.eval_path, title)
    if results_path is None:
        name = cfg.run_name or f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}_{Path(cfg.model_id).name}"
        results_path = Path(cfg.out_dir) / f"{Path(name).name}.jsonl"
    write_jsonl(results_path, result.rows)
    summary = {**result.summary(), "results_path": str(results_path), "model_id": cfg.model_id}
    write_json(results_path.with_suffix(".json"), summary)
    if wandb_sink.wanted():
        page = wandb_sink.WandbSink(cfg.wandb_project, results_path.stem, results_path.with_suffix(".wandb"), vars(cfg))
        page.log(0, result.metrics())
        page.table(0, "val/samples", result.rows)
        page.close()
    return summary


if __name__ == "__main__":
    from grpo_gsm8k.cli import run_command

    run_command("eval")
