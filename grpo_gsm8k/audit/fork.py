"""`fork RUN --at K --set clip_eps=0.28 --out_dir D`: a run from its checkpoint K on, with other settings.

The fork is a run directory like any other: the log, the samples and the rollouts of the run up to step K, its
checkpoint K, and `fork.json`, which says where it comes from and what was changed. From there on it is `--resume`.

Sampling is seeded per (run seed, step, prompt, sample), and a completion is drawn by inverting the cumulative
distribution at numbers that its seed alone decides. So a fork asks the same prompts and draws with the same numbers as
its origin: common random numbers. Until the policies part, the completions are the same; afterwards they differ only
where the policies do. An unchanged fork is its origin, bit for bit.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_gsm8k import config, repro
from grpo_gsm8k.audit.stored import StoredRun, open_run
from grpo_gsm8k.config import TrainConfig
from grpo_gsm8k.errors import ConfigError, RunDirError
from grpo_gsm8k.runs import chain, lock
from grpo_gsm8k.runs.directory import new_path
from grpo_gsm8k.runs.files import atomic_folder, disk_errors, write_atomic, write_json, write_jsonl

FORK = "fork.json"
KEPT = (
    "model_id",
    "data",
    "data_path",
    "eval_set_path",
    "task",
    "learner",
)  # what a fork has in common with its origin


def fork(folder: Path, at: int, sets: Sequence[str], out_dir: Path | None, max_steps: int = 0) -> dict[str, Any]:
    """Fork a run and train it to its end; the command's result.

    Raises:
        ConfigError: there is no checkpoint of that step, or a setting that a fork cannot change.
        RunDirError: the fork's directory exists.
    """
    run = open_run(folder)
    settings, changed = changed_config(run, sets)
    checkpoint = find_checkpoint(run, at)
    out = out_dir or new_path()
    with disk_errors(out):
        if out.exists():
            raise RunDirError(f"{out}: exists already; pick another --out_dir")
    lock.refuse_if_held(folder)
    cfg = replace(settings, out_dir=str(out), resume=True, max_steps=max_steps)
    origin = {"origin": str(folder), "at": at, "stage": run.stage, "weights_sha256": run.weights.get(at, "")}
    origin |= {"origin_chain": _head_at(run, at), "changed": {key: list(pair) for key, pair in changed.items()}}
    with atomic_folder(out) as unfinished:
        _fill(unfinished, run, at, cfg, checkpoint)
        write_json(unfinished / FORK, origin)
    stage = importlib.import_module(f"grpo_gsm8k.{run.stage}")
    result: dict[str, Any] = stage.run(cfg)
    return {**result, "forked_from": str(folder), "at": at, "changed": origin["changed"]}


def changed_config(run: StoredRun, sets: Sequence[str]) -> tuple[TrainConfig, dict[str, tuple[Any, Any]]]:
    """The run's config with what `--set` changes, and each change as (before, now).

    Raises:
        ConfigError: an unknown key or value, or a setting that a fork shares with its origin.
    """
    typed = config.set_values(run.stage, sets)
    if kept := [key for key in typed if key in KEPT]:
        raise ConfigError(f"--set {kept[0]}: a fork keeps model, data and task of its origin; start a run of its own")
    values = {**vars(run.cfg), **config.ALGORITHMS.get(str(typed.get("algorithm", "")), {}), **typed}
    cfg: TrainConfig = config.build(config.SECTIONS[run.stage], values)
    before = vars(run.cfg)
    return cfg, {key: (before[key], value) for key, value in vars(cfg).items() if before[key] != value}


def find_checkpoint(run: StoredRun, at: int) -> Path | None:
    """The checkpoint of a step, its hashes checked; None for step 0, the run's start.

    Raises:
        ConfigError: there is none; names the nearest ones.
        CheckpointError: it is damaged.
    """
    from grpo_gsm8k.trainer import checkpoint

    present = checkpoint.steps_present(run.checkpoints)
    if at == 0:
        return None
    if at not in present:
        before, after = [s for s in present if s < at][-1:], [s for s in present if s > at][:1]
        near = " and ".join(map(str, before + after)) or "0, its start: it has no checkpoint at all"
        raise ConfigError(f"--at {at}: {run.folder} has no checkpoint of this step; the nearest: {near}")
    folder = run.checkpoints / f"step_{at:06d}"
    checkpoint.verify(folder)
    return folder


def _head_at(run: StoredRun, at: int) -> str:
    """The last hash of the origin's chain up to a step; "" for a run without a chain."""
    return next((link["hash"] for link in reversed(run.links) if link["step"] <= at), "")


def _fill(folder: Path, run: StoredRun, at: int, cfg: Any, checkpoint: Path | None) -> None:
    """Everything of the run up to step `at`, as a run that was stopped there."""
    repro.snapshot(folder)
    shutil.copyfile(run.folder / "data.json", folder / "data.json")
    rows = [row for row in _logged(run.folder) if row["step"] <= at]
    if rows:
        write_jsonl(folder / chain.METRICS, rows)
    for name in ("samples", "evals", "rollouts"):
        _copy(run.folder, folder, (p for p in (run.folder / name).glob("step_*.*") if _step(p) <= at))
    _copy(run.folder, folder, (run.folder / "teacher").glob("*"))  # a cache, of which later scores do no harm
    if run.stage == "ei":
        begun = -(-at // run.cfg.steps_per_round)
        _copy(run.folder, folder, sorted((run.folder / "rounds").glob("round_*.jsonl"))[:begun])
    if checkpoint:
        shutil.copytree(checkpoint, folder / chain.CHECKPOINTS / checkpoint.name)
    write_atomic(folder / "config.toml", config.to_toml(cfg, run.stage))


def _logged(folder: Path) -> list[Mapping[str, Any]]:
    from grpo_gsm8k.runs.files import read_jsonl

    log = folder / chain.METRICS
    return [row for _, row in read_jsonl(log)] if log.is_file() and log.stat().st_size else []


def _copy(source: Path, target: Path, paths: Any) -> None:
    for path in paths:
        place = target / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))
