"""Stage 4: supervised fine-tuning on worked solutions.

Simplified on purpose: one shuffle per epoch, and an example that is too long is left out, never split. The response and
its end-of-turn id are trained; the loss is the mean over the response tokens of the whole update.

    grpo-gsm8k sft --model_id MODEL --data DIR                         # the reference solutions of train.jsonl
    grpo-gsm8k sft --model_id MODEL --data_path pairs.jsonl --eval_set_path DIR/val.jsonl   # or a folder of shards
    grpo-gsm8k sft --model_id MODEL --data_path hf:OWNER/NAME --eval_set_path DIR/val.jsonl # a data set of the hub
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_gsm8k.config import SftConfig, TrainConfig
from grpo_gsm8k.datatypes import Datum, Example
from grpo_gsm8k.errors import ConfigError, DataError
from grpo_gsm8k.hub_datasets import local_path
from grpo_gsm8k.preflight import check_rows
from grpo_gsm8k.repro import derive_seed, shuffled
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.tasks.base import load_split
from grpo_gsm8k.tasks.conversations import Conversation, load_pairs
from grpo_gsm8k.tasks.render import task_of
from grpo_gsm8k.trainer import loop
from grpo_gsm8k.trainer.data import weighted
from grpo_gsm8k.trainer.losses import CrossEntropy, Objective
from grpo_gsm8k.trainer.optimizer import lr_at
from grpo_gsm8k.trainer.token_shards import MANIFEST, load_rows, read_manifest
from grpo_gsm8k.workbench import Workbench, open_workbench


def train(cfg: SftConfig, bench: Workbench, rows: Sequence[Datum]) -> None:
    """Fine-tune on `rows` for `cfg.epochs` epochs, validating as it goes."""
    total = cfg.epochs * updates_per_epoch(len(rows), cfg.batch_size)
    for step in loop.steps(bench.run, bench.learner, total, state := loop.StageState()):
        started = time.perf_counter()
        metrics = fit_step(cfg, bench, rows, step, lr_at(step, total, cfg), seed=cfg.seed)
        metrics |= {"progress/sft_step": step, "progress/done_frac": step / total}
        bench.validate(step, total, metrics)
        bench.run.log(step, metrics | {"time/total": time.perf_counter() - started})
        state.note = f"loss {metrics['loss']:.3f}"


def fit_step(
    cfg: TrainConfig,
    bench: Workbench,
    rows: Sequence[Datum],
    step: int,
    lr: float,
    *,
    seed: int,
    start: int = 0,
) -> dict[str, float]:
    """One update on the step's rows. Expert iteration uses it too.

    Args:
        step: 1-based; `step - start` counts the updates on these rows.
        seed: of the shuffle, which is new in every epoch.
    """
    batch_size: int = cfg.batch_size  # type: ignore[attr-defined]  # SFT and EI have one, GRPO has rollouts
    epoch, k = divmod(step - start - 1, updates_per_epoch(len(rows), batch_size))
    order = shuffled(len(rows), derive_seed(seed, "order", epoch))
    chosen = [rows[i] for i in order[k * batch_size : (k + 1) * batch_size]]
    return loop.update(bench.run, bench.learner, weighted(chosen, "token"), Objective(CrossEntropy()), lr, step)


def updates_per_epoch(rows: int, batch_size: int) -> int:
    """Updates of one pass over the rows; the last one may be smaller."""
    return -(-rows // batch_size)


def run(cfg: SftConfig) -> dict[str, Any]:
    """The stage as a command: load, train, and return the result."""
    if not cfg.eval_every:
        raise ConfigError("eval_every = 0: fine-tuning is always evaluated; give the steps between evaluations")
    source = local_path(cfg.data_path, cfg.out_dir) if cfg.data_path else Path(cfg.data) / "train.jsonl"
    sharded, examples = read_source(cfg, source)
    with open_workbench(cfg, "sft", {"train": source / MANIFEST if sharded else source}) as bench:
        rows, left_out = fitting_rows(cfg, bench, source, examples)
        if left_out:
            longest, of = min(cfg.max_length, bench.context), left_out + len(rows)
            say(f"sft: {left_out} of {of} examples are longer than {longest} tokens and are left out")
        train(cfg, bench, rows)
        return {**bench.finish(), "examples": len(rows), "left_out": left_out}


def read_source(cfg: SftConfig, source: Path) -> tuple[bool, Sequence[Conversation | Example]]:
    """Whether the data are shards of token ids, and the examples where they are not."""
    if cfg.data_path and source.is_dir():
        read_manifest(source)
        return True, []
    return False, load_pairs(source) if cfg.data_path else load_split(task_of(cfg), cfg.data, "train")


def fitting_rows(
    cfg: SftConfig, bench: Workbench, source: Path, examples: Sequence[Conversation | Example]
) -> tuple[list[Datum], int]:
    """The rows to train on, and how many examples are too long. Without examples, the rows are read from shards."""
    rows = (
        [render(cfg, bench, item) for item in examples]
        if examples
        else load_rows(source, bench.renderer.made_with(), cfg.train_on)
    )
    longest = min(cfg.max_length, bench.context)
    fitting = [row for row in rows if len(row.token_ids) <= longest]
    if not fitting:
        raise DataError(source, f"no example fits into {longest} tokens; raise --max_length")
    check_rows(fitting, bench.embeddings, source)
    return fitting, len(rows) - len(fitting)


def render(cfg: SftConfig, bench: Workbench, item: Conversation | Example) -> Datum:
    """Ids and mask of a conversation, or of an example with its reference answer."""
    if isinstance(item, Conversation):
        return bench.renderer.chat(item.messages, cfg.train_on, item.raw, item.source)
    return bench.renderer.target(item)


if __name__ == "__main__":
    from grpo_gsm8k.cli import run_command

    run_command("sft")
