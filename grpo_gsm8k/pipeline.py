"""All stages: base → SFT → expert iteration → GRPO, each evaluated on the same held-out problems.

    grpo-gsm8k demo                                           the tiny preset, nothing needed but this package
    grpo-gsm8k pipeline --preset full --data artifacts/data   Qwen2.5-Math-1.5B on the real GSM8K

Nothing here is special to the demo. Where no data is named, the task makes some and writes it as the same three JSONL
files, and one file is split into three; where no model is named (and the preset names none), a tiny one is made as the
same kind of folder. From there on it is a model folder and three files like any other.
"""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from grpo_gsm8k import config, repro
from grpo_gsm8k.config import STAGES, EvalConfig, PipelineConfig, TinyModelConfig, ToyConfig
from grpo_gsm8k.datatypes import Example
from grpo_gsm8k.errors import ConfigError, DataError, RunDirError
from grpo_gsm8k.repro import derive_seed, shuffled
from grpo_gsm8k.runs import lock
from grpo_gsm8k.runs.chain import JUDGE, Chain, read
from grpo_gsm8k.runs.directory import RUNS, new_path
from grpo_gsm8k.runs.files import disk_errors, make_folder, read_json, sha256_file, write_json
from grpo_gsm8k.runs.progress import doing, part, say
from grpo_gsm8k.tasks.base import SPLITS, Task, load_examples, load_split
from grpo_gsm8k.tasks.dataset import verify, write_splits
from grpo_gsm8k.tasks.render import task_of

Resolve = Callable[[str, Mapping[str, Any]], Any]  # section and flags → that stage's config

STORED = "pipeline_config.json"
TRAINERS = ("sft", "ei", "grpo")
WHAT = {
    "base": "base  is evaluated as it is",
    "sft": "SFT   imitates worked solutions",
    "ei": "EI    learns its own right answers",
    "grpo": "GRPO  reinforces what beats its group",
}


def run(cfg: PipelineConfig, config_file: Path | None = None, sets: Sequence[str] = ()) -> dict[str, Any]:
    """All stages up to `cfg.stop_after`; returns what the command prints."""
    if cfg.stop_after and cfg.stop_after not in STAGES:
        raise ConfigError(f"--stop_after {cfg.stop_after!r}: must be one of {', '.join(STAGES)}")
    resolve = _resolver(cfg, config_file, sets)
    for section in (*TRAINERS, "eval", "toy", "tiny_model"):
        resolve(section, {})  # a mistake in a recipe shows before any work is done
    first = resolve("sft", {"model_id": cfg.model_id} if cfg.model_id else {})
    task = task_of(first)
    planned = [stage for stage in STAGES if stage != "ei" or task.has_right_answers]
    if cfg.stop_after and cfg.stop_after not in planned:
        raise ConfigError(f"--stop_after {cfg.stop_after}: task {task.spec!r} has the stages {', '.join(planned)}")
    planned = planned[: planned.index(cfg.stop_after) + 1] if cfg.stop_after else planned
    folder = _folder(cfg, sets)
    announce(folder, planned)
    _check(resolve)
    with _opened(folder, cfg, sets):
        return _stages(cfg, folder, planned, resolve)


def announce(folder: Path, stages: Sequence[str]) -> None:
    """Say where the pipeline works and what it will do, before anything that takes time."""
    say(f"working in {folder}")
    for number, stage in enumerate(stages, 1):
        say(f" {number} {WHAT[stage]}")
    say("each is evaluated on the test split,\nand report.html shows them all")


def _check(resolve: Resolve) -> None:
    """Refuse what a later stage would refuse. It imports torch, which takes seconds."""
    with doing("importing torch and transformers"):
        from grpo_gsm8k import grpo
        from grpo_gsm8k.trainer.ranks import world
    if world().size > 1:
        raise ConfigError("torchrun starts one stage at a time: sft, ei or grpo; the pipeline runs in one process")
    grpo.check(resolve("grpo", {}))


def _stages(cfg: PipelineConfig, folder: Path, planned: Sequence[str], resolve: Resolve) -> dict[str, Any]:
    """Data, model, then stage after stage; `pipeline.json` is written after each."""
    from grpo_gsm8k import report

    before = _stored(folder)
    began = time.monotonic() - before.get("seconds", 0.0)
    first = resolve("sft", {"model_id": cfg.model_id} if cfg.model_id else {})
    task = task_of(first)
    with doing("preparing data and model"):
        data, model = _prepare(cfg, folder, task, first, resolve)
    chain, sealed = _chain(folder)
    result: dict[str, Any] = {
        "run_dir": str(folder),
        "data": str(data),
        "task": task.spec,
        "preset": cfg.preset,
        "seed": cfg.seed,
    }
    result |= {"model_id": model, "seconds": 0.0, "stages": [], "comparisons": []}
    finished = before.get("stages", [])
    for number, stage in enumerate(planned, 1):
        started = time.monotonic()
        with part(number, len(planned)), doing(stage):
            if stage in TRAINERS:
                flags = {"model_id": model, "data": str(data), "out_dir": str(folder / stage), "resume": True}
                model = train_stage(stage, resolve(stage, flags | {"max_steps": cfg.max_steps}))
            row = evaluate_stage(stage, model, data, folder, resolve)
        result["stages"].append(row | {"seconds": _stage_seconds(before, row, started)})
        result["comparisons"] = comparisons(result["stages"])
        result["seconds"] = round(time.monotonic() - began, 1)
        if len(result["stages"]) > len(finished) or result["stages"] != finished[: len(result["stages"])]:
            write_json(folder / "pipeline.json", result)  # never shorter than it was: a kill must not lose a stage
            sealed.discard(stage)
        if stage not in sealed:
            _seal(chain, folder, stage)
        say(f"{number}/{len(planned)} {stage}: {_outcome(row)}")
    with doing("writing the report"):
        result["report"] = str(report.write_report([folder]))
    chain.seal("end", 0, files=["report.html"])
    return result


def _chain(folder: Path) -> tuple[Chain, set[str]]:
    """The pipeline's own hash chain, over data, model and the chains of its stages; and the stages that are in it."""
    chain = Chain(folder)
    if chain.path.is_file():
        chain.resume_at_end()
    else:
        chain.open(0, code=repro.git_commit(), stage="pipeline")
    return chain, {link["stage"] for link in read(folder)[0] if link["kind"] == "stage"}


def _seal(chain: Chain, folder: Path, stage: str) -> None:
    """Link a finished stage: its evaluation, and the end of its own chain."""
    links, _ = read(folder / stage)
    ends = {stage: links[-1]["hash"]} if links else {}
    files = ["pipeline.json", f"evals/{stage}.jsonl", f"evals/{stage}.json", f"evals/{JUDGE}"]
    chain.seal("stage", 0, files=files, stage=stage, chains=ends)


def _prepare(cfg: PipelineConfig, folder: Path, task: Task, first: Any, resolve: Resolve) -> tuple[Path, str]:
    """The data folder and the model to start from, made where none are named."""
    given = cfg.data or first.data
    data = Path(given) if given else make_data(task, folder / "data", resolve("toy", {}), cfg.seed)
    if data.is_file():
        data = split_file(task, data, folder / "data", cfg.seed)
    if (data / "manifest.json").is_file():
        verify(data, task)
    examples = {split: load_split(task, data, split) for split in SPLITS}
    if first.model_id:
        return data, first.model_id
    if first.learner == "tinker":
        from grpo_gsm8k.engines.service import Service

        return data, Service(first.base_url).base_model("").name
    return data, str(make_tiny(folder / "model", resolve("tiny_model", {}), task, examples["train"], cfg.seed))


def make_data(task: Task, folder: Path, cfg: ToyConfig, seed: int) -> Path:
    """Data by seed, as three JSONL files and a manifest. Raises `ConfigError` for a task that makes none."""
    made = task.generate(folder, seed, vars(cfg))
    if made is None:
        raise ConfigError(f"task {task.spec!r} makes no data of its own: pass --data, a folder with its three splits")
    return made


def split_file(task: Task, path: Path, folder: Path, seed: int) -> Path:
    """One file of examples as three splits: a tenth of it, drawn by the seed, to validate and a tenth to test.

    Raises:
        DataError: it has too few examples.
    """
    examples = load_examples(task, path)
    part = max(1, len(examples) // 10)
    if len(examples) < 3:
        raise DataError(path, f"has {len(examples)} examples; three are the fewest to train, validate and test on")
    order = shuffled(len(examples), derive_seed(seed, "splits"))
    ends = {"test": order[:part], "val": order[part : 2 * part], "train": order[2 * part :]}
    rows = {name: [task.row(examples[i]) for i in sorted(chosen)] for name, chosen in ends.items()}
    write_splits(folder, rows, {"source": path.name, "sha256": sha256_file(path), "seed": seed})
    return folder


def make_tiny(folder: Path, cfg: TinyModelConfig, task: Task, examples: Sequence[Example], seed: int) -> Path:
    """A tiny model with random weights and a tokenizer trained on questions and reference answers."""
    from grpo_gsm8k.trainer.tiny_model import make_tiny_model

    if not folder.is_dir():
        unfinished = folder.with_name(".writing_model")
        shutil.rmtree(unfinished, ignore_errors=True)
        texts = [text for example in examples for text in texts_of(task, example)]
        make_tiny_model(unfinished, texts, seed, **vars(cfg)).rename(folder)
    return folder


def texts_of(task: Task, example: Example) -> list[str]:
    """What a tokenizer learns from an example: how it is asked, and what a teacher answers."""
    asked = task.prompt(example)
    return [*([asked] if isinstance(asked, str) else [text for _, text in asked]), task.target(example)]


def _outcome(row: Mapping[str, Any]) -> str:
    """A stage's result and its 95 % interval in one line."""
    low, high = row["ci95"]
    if row["accuracy"] is None:
        return f"reward {row['reward']:.3f} ({low:.3f}–{high:.3f})"
    return f"{100 * row['accuracy']:.1f} % right ({100 * low:.1f}–{100 * high:.1f})"


def train_stage(stage: str, cfg: Any) -> str:
    """Run a training stage, or what is left of it; returns the folder of its model."""
    run: Callable[[Any], dict[str, Any]] = importlib.import_module(f"grpo_gsm8k.{stage}").run
    model: str = run(cfg)["model"]
    return model


def evaluate_stage(stage: str, model: str, data: Path, folder: Path, resolve: Resolve) -> dict[str, Any]:
    """Greedy accuracy of a stage's model on the test split; read back if these weights were evaluated before."""
    from grpo_gsm8k import fast_eval_vllm

    results = folder / "evals" / f"{stage}.jsonl"
    summary_path = results.with_suffix(".json")
    cfg: EvalConfig = resolve("eval", {"model_id": model, "eval_path": str(data / "test.jsonl")})
    if summary_path.is_file() and read_json(summary_path)["model_id"] == model:
        summary = read_json(summary_path)
    else:
        if cfg.engine == "auto" and resolve("sft", {}).learner == "tinker":  # unless asked otherwise, as the stages do
            cfg = replace(cfg, engine="tinker")
        summary = fast_eval_vllm.run(cfg, results, f"{stage}: test")
    keys = (
        "accuracy",
        "ci95",
        "n",
        "format_accuracy",
        "reward",
        "truncated",
        "mean_tokens",
        "weights_sha256",
        "results_path",
    )
    return {"name": stage, "model": model, **{key: summary[key] for key in keys}}


def comparisons(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each stage against the one before it, and the last against SFT, paired over the test problems."""
    from grpo_gsm8k.evals.accuracy import read_results
    from grpo_gsm8k.evals.stats import compare

    if any(stage["accuracy"] is None for stage in stages):
        return []  # nothing is right or wrong
    pairs = list(pairwise(stages))
    if len(stages) == len(STAGES):
        pairs.append((stages[1], stages[-1]))
    return [
        {"a": a["name"], "b": b["name"]}
        | compare(read_results(Path(a["results_path"])), read_results(Path(b["results_path"]))).as_dict()
        for a, b in pairs
    ]


def _resolver(cfg: PipelineConfig, config_file: Path | None, sets: Sequence[str]) -> Resolve:
    """Section and flags → that stage's config, with the pipeline's own settings laid over the preset."""
    if plain := [item for item in sets if "." not in item.partition("=")[0]]:
        raise ConfigError(f"--set {plain[0]}: say which stage, as in --set grpo.{plain[0]}")

    def resolve(section: str, flags: Mapping[str, Any]) -> Any:
        return config.resolve(section, **_given(section, cfg, config_file, sets, flags))

    return resolve


def _given(
    section: str, cfg: PipelineConfig, config_file: Path | None, sets: Sequence[str], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """The layers of a stage, as `config.resolve` takes them."""
    own: dict[str, Any] = {}
    if section in (*TRAINERS, "eval"):
        own = {"seed": cfg.seed, "deterministic": cfg.deterministic} | ({"engine": cfg.engine} if cfg.engine else {})
        own |= {name: value for name in ("task", "base_url") if (value := getattr(cfg, name))}
    if section in TRAINERS:
        own |= {"learner": cfg.learner} if cfg.learner != "torch" else {}
        own |= {"lora_rank": cfg.lora_rank} if cfg.lora_rank else {}
    how = {"preset": cfg.preset, "config_file": config_file, "sets": sets, "task": cfg.task}
    return {**how, "flags": {**own, **flags}}


def explain(section: str, flags: Mapping[str, Any], config_file: Path | None, sets: Sequence[str]) -> config.Explained:
    """A stage's config and the layer of each value, as a pipeline with these flags begins it.

    Models and data that the pipeline makes, and the folders below its own, are not known before it runs.
    """
    cfg = config.build(PipelineConfig, flags)
    _resolver(cfg, config_file, sets)
    first = {key: flags[key] for key in ("model_id", "data", "max_steps") if flags.get(key) and section in TRAINERS}
    settings, origin = config.explain(section, **_given(section, cfg, config_file, sets, first))
    unasked = {name for name in ("seed", "deterministic") if name not in flags and name in origin}
    return settings, origin | dict.fromkeys(unasked, ("default", "of the pipeline"))


def _settings(cfg: PipelineConfig, sets: Sequence[str]) -> dict[str, Any]:
    """What a continued pipeline is held to."""
    runtime: dict[str, Any] = {"resume": False, "stop_after": "", "max_steps": 0, "out_dir": "", "base_url": ""}
    return {**vars(replace(cfg, **runtime)), "set": list(sets)}


def _folder(cfg: PipelineConfig, sets: Sequence[str]) -> Path:
    """Where the pipeline works: a new folder, or with `--resume` the one of the same settings. Nothing is made yet."""
    mine = _settings(cfg, sets)
    folder = Path(cfg.out_dir) if cfg.out_dir else _unfinished(mine) if cfg.resume else new_path()
    with disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise RunDirError(f"{folder}: is a file, not a folder")
        lock.refuse_if_held(folder)
        begun = _begun(folder)
    if begun and not (folder / STORED).is_file():
        raise RunDirError(f"{folder}: is not empty and holds no pipeline; pick another --out_dir")
    if begun and not cfg.resume:
        raise RunDirError(f"{folder}: exists already; pass --resume to continue it, or another --out_dir")
    return folder


def _begun(folder: Path) -> bool:
    """Whether it holds more than a pipeline that has not begun."""
    return folder.is_dir() and any(path.name not in (STORED, lock.NAME) for path in folder.iterdir())


@contextmanager
def _opened(folder: Path, cfg: PipelineConfig, sets: Sequence[str]) -> Iterator[None]:
    """The pipeline's folder, locked, with its settings in it."""
    mine, stored = _settings(cfg, sets), folder / STORED
    make_folder(folder)
    with lock.hold(folder, "pipeline"):
        begun = _begun(folder)
        before = read_json(stored) if begun else mine
        changed = [f"{k}: {before.get(k)!r} then, {v!r} now" for k, v in mine.items() if before.get(k) != v]
        if changed:
            raise RunDirError(f"{folder}: was begun differently ({'; '.join(changed)}); pick another --out_dir")
        if not begun:
            write_json(stored, mine)
        yield


def _unfinished(mine: Mapping[str, Any]) -> Path:
    """The newest pipeline of these settings that has not ended; a new folder when there is none."""
    for stored in sorted(RUNS.glob(f"*/{STORED}"), reverse=True):
        result = stored.with_name("pipeline.json")
        ended = result.is_file() and [row["name"] for row in read_json(result)["stages"]][-1:] == [STAGES[-1]]
        if read_json(stored) == mine and not ended:
            return stored.parent
    return new_path()


def _stored(folder: Path) -> dict[str, Any]:
    """What an earlier call wrote to pipeline.json; nothing if there was none."""
    path = folder / "pipeline.json"
    return read_json(path) if path.is_file() else {}


def _stage_seconds(before: Mapping[str, Any], row: Mapping[str, Any], started: float) -> float:
    """This stage's time; a stage that was complete before keeps the time it took then."""
    seconds = {old["name"]: old["seconds"] for old in before.get("stages", []) if _same(old, row)}
    return float(seconds.get(row["name"], round(time.monotonic() - started, 1)))


def _same(old: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether both are of the same stage and of the same weights."""
    return all(old.get(key) == row[key] for key in ("name", "model", "weights_sha256"))
