"""Stage 7: evaluation as a command.

    grpo-gsm8k eval --limit 100                                                       data fetched where there are none
    grpo-gsm8k eval --model_id MODEL --eval_path DIR/test.jsonl                       greedy accuracy
    grpo-gsm8k eval --model_id MODEL --samples 8 --temperature 1.0 --seeds 0,1,2      avg@8, pass@k, maj@k, spread
    grpo-gsm8k eval --model_id MODEL --shots 4 --shots_path DIR/train.jsonl           four worked examples first
    grpo-gsm8k eval --model_id MODEL --dataset gsm_plus,math500                       sets by name, in one table
    grpo-gsm8k eval --model_id MODEL --engine vllm --tp_size 2                        vLLM, on two GPUs
    python -m grpo_gsm8k.fast_eval_vllm --model_id MODEL --eval_path F --limit 200    the same command

For several sets the model is loaded once; a set of rewritten problems is held against its originals (`evals/drops.py`).
The results file has one row a completion; every row carries the sha256 of the weights that wrote it. Figures and
samples go to W&B, too, where it is on. The command, the machine and the hashes of its inputs are kept in a folder of
`artifacts/runs/`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpo_gsm8k import config, data_prep, eval_sets
from grpo_gsm8k.config import DATA, EVAL_SETS, OTHER_DATA, EvalConfig
from grpo_gsm8k.datatypes import Example, SamplingParams
from grpo_gsm8k.errors import ConfigError, DataError, DiskError, UserError
from grpo_gsm8k.evals.accuracy import Evaluation, Row
from grpo_gsm8k.evals.drops import drops_of
from grpo_gsm8k.repro import derive_seed, shuffled
from grpo_gsm8k.runs import loggers, sinks
from grpo_gsm8k.runs.directory import recorded
from grpo_gsm8k.runs.files import check_writable, real_path, write_json, write_jsonl
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.tasks.base import SPLITS, Task, load_examples
from grpo_gsm8k.tasks.contamination import words
from grpo_gsm8k.tasks.dataset import read_manifest
from grpo_gsm8k.tasks.render import DEFAULT_TASK, task_of
from grpo_gsm8k.workbench import EvalJob, evaluate_model, settled


def command(cfg: EvalConfig) -> dict[str, Any]:
    """`eval`, also with nothing there: the data are fetched, the engine is chosen, and the machine is recorded.

    Raises:
        DataError: there are no data, and the hub does not give them.
    """
    paths = eval_paths(cfg)
    if len(paths) == 1:
        cfg = settled(with_data(dataclasses.replace(cfg, eval_path=paths[0])))
        with recorded(cfg, "eval", {"eval_set": Path(cfg.eval_path)}) as folder:
            summary = run(cfg) | {"run_dir": str(folder)}
            write_json(folder / "result.json", summary)
        return summary
    each = [settled(with_data(dataclasses.replace(cfg, eval_path=path))) for path in paths]
    inputs = {set_name(one.eval_path): Path(one.eval_path) for one in each}
    if len(inputs) < len(each):
        raise ConfigError(f"--eval_path {','.join(paths)}: two of these sets have the same name")
    with recorded(dataclasses.replace(cfg, eval_path=",".join(paths)), "eval", inputs) as folder:
        summary = run_several(each) | {"run_dir": str(folder)}
        write_json(folder / "result.json", summary)
    return summary


def eval_paths(cfg: EvalConfig) -> list[str]:
    """The files of `--eval_path` and those of `--dataset`, which are fetched where they are not there.

    A set of rewritten problems comes with its originals, unless GSM8K, which has them, is among the sets.
    """
    names = [name.strip() for name in cfg.dataset.split(",")] if cfg.dataset else []
    wanted = {name: eval_sets.named(name) for name in names}
    default = not cfg.eval_path or cfg.eval_path in (EvalConfig.eval_path, config.found_data(EvalConfig.eval_path))
    whole = Path(cfg.eval_path).exists() or not cfg.eval_path
    paths = [] if names and default else [cfg.eval_path] if whole else [p.strip() for p in cfg.eval_path.split(",")]
    for name in names:
        if name == "gsm8k":
            paths.append(config.found_data(EvalConfig.eval_path) or EvalConfig.eval_path)
            continue
        folder = Path(EVAL_SETS) / name
        cache = Path(cfg.cache_dir) if cfg.cache_dir else None
        if not (folder / "manifest.json").is_file():
            say(f"{folder} is not there: {name} is fetched into it")
            eval_sets.prepare(name, folder, cache_dir=cache)
        own = ["seeds.jsonl"] if wanted[name].seed and "gsm8k" not in names else []
        paths += [str(folder / file) for file in (*own, "test.jsonl")]
    if len(set(paths)) < len(paths) or "" in paths:
        raise ConfigError(f"--eval_path and --dataset: a set is named twice, or not at all: {', '.join(paths)}")
    return paths


def set_name(path: str) -> str:
    """A set's name in a table: its data set's, with the split if it is not the test split; else the file's."""
    manifest = _manifest(path)
    name = str(manifest.get("dataset", "" if manifest.get("source") != data_prep.REPO else "gsm8k"))
    split = Path(path).stem
    if not name:
        return f"{Path(path).parent.name}/{split}" if split in SPLITS else split
    return name if split == "test" else f"{name} {split}"


def task_named(cfg: EvalConfig) -> str:
    """`--task`, else that of the data set where it is not GSM8K's: a model may be trained to use a task like that."""
    manifest = _manifest(cfg.eval_path)
    own = str(manifest.get("task", "")) if "dataset" in manifest else ""
    return cfg.task or ("" if own == DEFAULT_TASK else own)


def _manifest(path: str) -> Mapping[str, Any]:
    file = Path(path).with_name("manifest.json")
    return read_manifest(file.parent).provenance if file.is_file() else {}


def with_data(cfg: EvalConfig) -> EvalConfig:
    """The config whose evaluation set is there: one of GSM8K's splits is fetched into its usual folder, or `--out_dir`.

    Where `--out_dir` is the data's own folder, as in `--eval_path artifacts/gsm8k/val.jsonl --out_dir artifacts/gsm8k`,
    results go to their usual folder instead.
    """
    if cfg.eval_path == EvalConfig.eval_path and not Path(cfg.eval_path).exists():
        cfg = dataclasses.replace(cfg, eval_path=f"{OTHER_DATA}/{Path(cfg.eval_path).name}")
    path, folder = Path(cfg.eval_path), Path(cfg.eval_path).parent
    usual = {Path(DATA), Path(OTHER_DATA), Path(cfg.out_dir)}
    if not path.exists() and folder in usual and path.stem in SPLITS and task_of(cfg).spec == DEFAULT_TASK:
        fetch(cfg, path)
    if not (folder / "manifest.json").is_file():
        return cfg
    reserved = read_manifest(folder).counts.get("val", 0)
    if reserved and cfg.eval_n not in (0, reserved):
        say(f"--eval_n {cfg.eval_n}: {folder} has {reserved} validation problems, and stays as it is")
    if real_path(cfg.out_dir) == real_path(folder):
        cfg = dataclasses.replace(cfg, out_dir=EvalConfig.out_dir)
        say(f"{folder} holds the data; the results go to {cfg.out_dir}")
    return cfg


def fetch(cfg: EvalConfig, path: Path) -> None:
    """GSM8K's three splits, in the folder of `path`. Raises `DataError` if they cannot be had."""
    say(f"{path} is not there: GSM8K is fetched into {path.parent}")
    cache = Path(cfg.cache_dir) if cfg.cache_dir else None
    try:
        data_prep.prepare(path.parent, eval_n=cfg.eval_n or data_prep.EVAL_N, cache_dir=cache)
    except UserError as fault:
        how = f"make it with `grpo-gsm8k data --out_dir {path.parent}`"
        raise DataError(path, f"does not exist; {how} ({fault})") from None


def run(cfg: EvalConfig, results_path: Path | None = None, title: str = "eval") -> dict[str, Any]:
    """Evaluate, write the results file and a summary beside it, return the summary.

    Args:
        results_path: where the rows go; by default a stamped name in `cfg.out_dir`.

    Raises:
        ConfigError: several completions a problem without a temperature, examples from nowhere or from the
            evaluated file, or vLLM where it is not installed.
    """
    (summary,) = (summary for summary, _ in _summaries([cfg], [results_path or _results_path(cfg)], [title]))
    return summary


def run_several(each: Sequence[EvalConfig]) -> dict[str, Any]:
    """Evaluate one model on several sets, and hold the rewritten problems against their originals.

    Args:
        each: configs that differ in `eval_path` alone.
    """
    names = [set_name(cfg.eval_path) for cfg in each]
    paths = [_results_path(cfg, re.sub(r"[^\w.-]+", "_", name)) for cfg, name in zip(each, names, strict=True)]
    found = dict(zip(names, _summaries(each, paths, names), strict=True))
    sets = [{"name": name, **summary} for name, (summary, _) in found.items()]
    shared = {key: sets[0][key] for key in ("model_id", "grading", "samples", "temperature", "shots", "weights_sha256")}
    drops = [drop for drop in drops_of({name: rows for name, (_, rows) in found.items()}) if drop]
    return {**shared, "sets": sets, "drops": drops, "seconds": sum(one["seconds"] for one in sets)}


def _summaries(
    each: Sequence[EvalConfig], paths: Sequence[Path], titles: Sequence[str]
) -> Iterator[tuple[dict[str, Any], list[Row]]]:
    """Evaluate set by set; each one's rows and summary are written as soon as they are there, and returned."""
    seeds = sampling_seeds(each[0])
    if (each[0].samples > 1 or len(seeds) > 1) and each[0].temperature == 0:
        raise ConfigError(
            "several --samples or --seeds need --temperature above 0: greedy completions are all the same"
        )
    jobs, settings = [], []
    for cfg, path, title in zip(each, paths, titles, strict=True):
        cfg = settled(dataclasses.replace(cfg, task=task_named(cfg)))
        task = task_of(cfg)
        task.folder = path.parent
        examples = load_examples(task, cfg.eval_path)
        shots = draw_shots(cfg, task, examples)
        check_writable(path)  # before an hour of sampling, not behind it
        jobs.append(EvalJob(task, examples[: cfg.limit or None], cfg.eval_path, title, shots))
        settings.append(cfg)
    params = SamplingParams(each[0].max_new_tokens, each[0].temperature, each[0].top_p)
    with closing(evaluate_model(settings[0], jobs, params, samples=each[0].samples, seeds=seeds)) as found:
        for cfg, path, job, result in zip(settings, paths, jobs, found, strict=True):
            yield _keep(cfg, job.task.spec, result, path), result.rows


def _results_path(cfg: EvalConfig, part: str = "") -> Path:
    name = cfg.run_name or f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}_{Path(cfg.model_id).name}"
    stem = "_".join(filter(None, [Path(name).name or "eval", part]))
    return Path(cfg.out_dir) / f"{stem}.jsonl"


def _keep(cfg: EvalConfig, task: str, result: Evaluation, results_path: Path) -> dict[str, Any]:
    """Write an evaluation's rows and summary, log them, and return the summary."""
    asked = {key: getattr(cfg, key) for key in ("model_id", "eval_path", "grading", "samples", "temperature", "shots")}
    summary = {**result.summary(), "results_path": str(results_path), **asked, "task": task}
    try:
        write_jsonl(results_path, result.rows)
        write_json(results_path.with_suffix(".json"), summary)
    except DiskError as fault:
        raise DiskError(f"{fault}; {keep_elsewhere(result.rows, summary)}") from fault
    place = sinks.Place(cfg.wandb_project, results_path.stem, results_path.with_suffix(".logs"), vars(cfg))
    for sink in loggers.open_sinks(cfg.log, place):
        sink.log(0, result.metrics())
        sink.table(0, "val/samples", result.rows)
        sink.close()
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
        say(json.dumps(figures))
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
