"""A run directory as it was left: its config, its chain, and where its data and models are now.

A run that was copied keeps the paths of the place where it was made. Those that lay inside it are moved with it; data
and a model that lay elsewhere are looked for where they were, or where `--data` and `--model_id` say.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from grpo_gsm8k import config, repro
from grpo_gsm8k.config import TrainConfig
from grpo_gsm8k.errors import ConfigError, RunDirError
from grpo_gsm8k.plugins import is_users
from grpo_gsm8k.runs import chain
from grpo_gsm8k.runs.files import read_json, read_jsonl, real_path, sha256_file
from grpo_gsm8k.tasks.render import remembered

STAGES = ("sft", "ei", "grpo", "distill")
PLACES = ("model_id", "data", "data_path", "eval_set_path", "tokenizer_id", "teacher")  # settings that name files
SAME = ("torch", "machine", "cpu_model", "cpu_capability", "torch_threads")
"""What decides the order of sums, so far as a program can tell."""


@dataclass(frozen=True)
class StoredRun:
    """A training run that was written before.

    Attributes:
        cfg: as it was, with its paths as they are now.
        links: its hash chain; empty for a run of an older version.
    """

    folder: Path
    stage: str
    cfg: Any
    links: list[chain.Link]

    @cached_property
    def weights(self) -> dict[int, str]:
        """Step → sha256 of the weights after it, as the chain has it."""
        return {link["step"]: link["weights"] for link in self.links if link.get("weights")}

    @cached_property
    def metrics(self) -> dict[int, dict[str, Any]]:
        """Step → the row that was logged, late evaluations included."""
        rows: dict[int, dict[str, Any]] = {}
        log = self.folder / chain.METRICS
        for _, row in read_jsonl(log) if log.is_file() and log.stat().st_size else ():
            rows.setdefault(row["step"], {}).update(row)
        return rows

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / chain.CHECKPOINTS

    @cached_property
    def last(self) -> int:
        """Its last step."""
        return max(self.metrics, default=0)

    def inputs(self) -> dict[str, tuple[Path, str]]:
        """Name → where an input file should be now, and its sha256 when the run began."""
        stored, moved = read_json(self.folder / "data.json"), _moves(self.folder)
        paths = {"eval_set": self.cfg.eval_set_path or Path(self.cfg.data) / "val.jsonl"}
        if not getattr(self.cfg, "data_path", ""):
            paths["train"] = Path(self.cfg.data) / "train.jsonl"
        return {
            name: (Path(paths.get(name) or moved(entry["path"])), entry["sha256"]) for name, entry in stored.items()
        }

    def missing_inputs(self) -> list[str]:
        """The inputs that are not here, or not those that the run read."""
        return [
            f"{path} {'is not the file that the run read' if path.is_file() else 'is not here'}"
            for path, digest in self.inputs().values()
            if not path.is_file() or sha256_file(path) != digest
        ]

    def own_code(self) -> list[str]:
        """What the run names of a user's own code, as `reward mine:fn`."""
        cfg = self.cfg
        named = {name: getattr(cfg, name, "") for name in ("reward", "loss", "advantage", "engine", "task")}
        if not cfg.task and (stored := remembered(cfg.model_id)):
            named["task"] = stored["task"]
        if ":" in cfg.preference:
            named["preference"] = cfg.preference
        return [f"{name} {spec}" for name, spec in named.items() if is_users(spec)]

    @cached_property
    def elsewhere(self) -> list[str]:
        """How this machine differs from the run's in what decides the order of sums; empty where bits must agree."""
        before, now = read_json(self.folder / "sys" / "machine.json"), repro.machine()
        gpus = [("GPU", _gpu_names(found)) for found in (before, now)] if str(self.cfg.device) != "cpu" else []
        pairs = [(key, before.get(key), now.get(key)) for key in SAME]
        pairs += [("GPU", gpus[0][1], gpus[1][1])] if gpus else []
        return [f"{key} {then} then, {here} now" for key, then, here in pairs if then != here]


def open_run(folder: Path, data: str = "", model_id: str = "") -> StoredRun:
    """Read the directory of one training run.

    Args:
        data: where its data are now.
        model_id: where the model is now that it began with.

    Raises:
        RunDirError: it is no training run, or one of another version of this program.
    """
    file = folder / "config.toml"
    if not folder.is_dir():
        raise RunDirError(f"{folder}: no such directory; give the directory that a run wrote")
    if is_pipeline(folder):
        stages = [str(folder / name) for name in STAGES if (folder / name / "config.toml").is_file()]
        raise RunDirError(f"{folder}: is a pipeline; name one of its stages: {', '.join(stages) or 'it has none yet'}")
    if not file.is_file():
        raise RunDirError(f"{folder}: is not a run directory: it has no config.toml")
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise RunDirError(f"{file}: cannot be read: {fault}") from None
    stage = next((name for name in STAGES if isinstance(tables.get(name), dict)), "")
    if not stage:
        raise RunDirError(f"{folder}: is a run of {', '.join(tables) or 'nothing'}, not of {', '.join(STAGES)}")
    moved = {"data": data, "model_id": model_id}
    cfg = _config(file, stage, tables[stage], {key: value for key, value in moved.items() if value})
    return StoredRun(folder, stage, cfg, chain.read(folder)[0])


def is_pipeline(folder: Path) -> bool:
    """Whether a directory holds the stages of a pipeline."""
    return (folder / "pipeline_config.json").is_file()


def _config(file: Path, stage: str, stored: Mapping[str, Any], given: Mapping[str, str]) -> TrainConfig:
    """The stored config with its paths moved. A field that is younger than the run has its default."""
    cls = config.SECTIONS[stage]
    if unknown := sorted(set(stored) - {field.name for field in fields(cls)}):
        raise RunDirError(
            f"{file}: has {unknown[0]!r}, which this version does not know: another version made this run"
        )
    moved = _moves(file.parent, str(stored.get("out_dir", "")))
    places = {name: moved(stored[name]) for name in PLACES if stored.get(name)}
    try:
        cfg: TrainConfig = config.build(cls, {**stored, **places, **given})
    except ConfigError as fault:
        raise RunDirError(f"{file}: {fault}") from None
    return cfg


def _moves(folder: Path, out_dir: str | None = None) -> Any:
    """A function that moves a path which lay in the run, or in the pipeline that the run is a stage of."""
    if out_dir is None:
        stored = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        out_dir = str(next(iter(stored.values())).get("out_dir", ""))
    pairs = [(Path(out_dir), folder)] if out_dir else []
    if out_dir and is_pipeline(folder.parent if folder.name else real_path(folder).parent):
        pairs.append((Path(out_dir).parent, real_path(folder).parent))

    def move(path: str) -> str:
        for before, now in pairs:
            if Path(path).is_relative_to(before):
                return str(now / Path(path).relative_to(before))
        return path

    return move


def _gpu_names(machine: Mapping[str, Any]) -> list[str]:
    return [gpu["name"] for gpu in machine.get("gpus", [])]


def import_nothing_from(folder: Path) -> None:
    """Take a run directory off Python's search path: `python -m` puts the current directory there."""
    inside = real_path(folder)
    sys.path[:] = [entry for entry in sys.path if not real_path(entry or Path.cwd()).is_relative_to(inside)]


def allow_own_code(run: StoredRun, allowed: bool) -> None:
    """Raise `ConfigError` where a run names a user's own code, which is imported only if that was asked for."""
    named = run.own_code()
    if named and not allowed:
        raise ConfigError(
            f"{run.folder}: names code of its author's own ({', '.join(named)}); look at it, and pass --own_code to "
            "import it from the current directory"
        )
    if named and real_path(Path.cwd()).is_relative_to(real_path(run.folder)):
        raise ConfigError(f"{run.folder}: nothing is imported from a run directory; start in another folder")


def trainable(run: StoredRun) -> StoredRun:
    """The run with settings that only matter where it was made replaced: its directory, and a device that is absent.

    Raises:
        ConfigError: a training service trained it.
    """
    if run.cfg.learner != "torch":
        raise ConfigError(f"{run.folder}: a training service trained this run; its steps cannot be trained again here")
    import torch

    device = run.cfg.device if run.cfg.device == "cpu" or torch.cuda.is_available() else "auto"
    return replace(run, cfg=replace(run.cfg, out_dir="", resume=False, max_steps=0, device=device))
