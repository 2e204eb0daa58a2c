"""A run directory: created, resumed or refused, never silently overwritten.

config.toml    resolved config              metrics.jsonl               one object a step
command.txt    as it was typed              samples/step_000020.jsonl   graded completions
code.diff      what was not committed       checkpoints/step_000020/    see trainer/checkpoint.py
sys/           packages, machine            evals/                      see evals/accuracy.py
data.json      sha256 of every input        rollouts/                   see runs/rollouts.py
chain.jsonl    see runs/chain.py            result.json                 written when the run is done
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpo_gsm8k import config, repro
from grpo_gsm8k.config import TrainConfig
from grpo_gsm8k.datatypes import Rollout
from grpo_gsm8k.errors import DataError, RunDirError
from grpo_gsm8k.runs import chain, lock, loggers, rollouts, sinks
from grpo_gsm8k.runs.files import (
    SOURCE_SUFFIX,
    append_jsonl,
    disk_errors,
    make_folder,
    read_json,
    read_jsonl,
    sha256_file,
    write_atomic,
    write_json,
    write_jsonl,
)
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.runs.writer import Writer

RUNS = Path("artifacts/runs")
OWN = frozenset(
    {
        *(".lock", "sys", "command.txt", "code.diff", "data.json", "config.toml", "handover"),
        *("engine.log", "evaluator.log", "teacher.log"),
    }
)
"""What a run directory holds before its first step; the logs are of engines whose last words have been printed."""


class Run:
    """One training run's folder. Make it with `open_run`."""

    def __init__(self, path: Path, stage: str, cfg: TrainConfig) -> None:
        self.path, self.stage, self.cfg = path, stage, cfg
        self.started = time.monotonic()
        self.checkpoints = path / "checkpoints"
        self.complete = self.updated = 0  # the last step that ended, and the last that moved the weights
        self.state: Callable[[], dict[str, Any]] = dict  # what a checkpoint stores of the stage, see trainer/loop.py
        self.writer = Writer()  # of checkpoints, while training goes on
        self.weights: dict[int, str] = {}  # step → sha256 of the weights after it, where they were hashed
        self.chain, self._grades = chain.Chain(path), ""
        self.first = 1  # the step that is logged first; later in a resumed run
        self._sinks: list[sinks.Sink] | None = None
        self._rows: list[dict[str, Any]] | None = None  # of metrics.jsonl, once they were read

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row of metrics.jsonl, and of the loggers."""
        row = {"step": step, **metrics}
        append_jsonl(self.path / "metrics.jsonl", row)
        if self._rows is not None:
            self._rows.append(row)
        for sink in self._opened():
            sink.log(step, metrics)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]], folder: str = "samples") -> None:
        """What was sampled at a step, one row a completion; the first of them go to the loggers, too."""
        rows = list(rows)
        write_jsonl(self.path / folder / f"step_{step:06d}.jsonl", rows)
        for sink in self._opened():
            sink.table(step, "val/samples" if folder == "evals" else folder, rows)

    def keep_rollouts(self, step: int, groups: Sequence[Sequence[Rollout]]) -> None:
        """Write what a step trained on, and delete what is older than `--keep_rollouts` allows."""
        self._grades = rollouts.grades_sha256(groups)
        if not (keep := self.cfg.keep_rollouts):
            return
        before, after = self.weights.get(step - 1, ""), self.weights.get(step, "")
        rollouts.write(self.path, rollouts.Stored(self.stage, step, before, after, list(map(list, groups))))
        for path in sorted(self.rollout_files())[:-keep] if keep > 0 else ():
            path.unlink()

    def rollout_files(self) -> list[Path]:
        """The rollouts that are kept."""
        return list((self.path / rollouts.FOLDER).glob("step_*.safetensors"))

    def begin_chain(self, step: int) -> None:
        """Begin the hash chain, or continue it from `step`."""
        code = {"code": repro.git_commit(), "stage": self.stage, "weights": self.weights.get(step, "")}
        self.chain.open(step, **code)

    def seal(self, kind: str, step: int, **more: Any) -> None:
        """Append what is new to the hash chain; see `Chain.seal`."""
        grades, self._grades = self._grades, ""
        self.chain.seal(kind, step, weights=self.weights.get(step, ""), grades=grades, **more)

    def _opened(self) -> list[sinks.Sink]:
        """The loggers, from the first thing that is logged on: only then is it a run worth a page there."""
        if self._sinks is None:
            name = self.cfg.run_name or f"{self.path.parent.name}-{self.path.name}"
            place = sinks.Place(self.cfg.wandb_project, name, self.path, vars(self.cfg), self.first)
            self._sinks = loggers.open_sinks(self.cfg.log, place)
        return self._sinks

    def rewind(self, step: int) -> None:
        """Forget what was logged beyond `step`: a resumed run says it again, and nothing stands twice."""
        log = self.path / "metrics.jsonl"
        if log.is_file() and log.stat().st_size:
            whole = log.read_bytes()
            if not whole.endswith(b"\n"):  # a kill cut the last line
                write_atomic(log, whole[: whole.rfind(b"\n") + 1])
        if log.is_file() and log.stat().st_size:
            write_jsonl(log, [row for _, row in read_jsonl(log) if row["step"] <= step])
        self._rows, self.first = None, step + 1
        for folder in ("samples", "evals", "evals/pending", rollouts.FOLDER):
            for path in (self.path / folder).glob("step_*"):
                if int(path.stem.removeprefix("step_")) > step:
                    path.unlink()

    def history(self) -> list[dict[str, Any]]:
        """Every row logged so far, read once: 500 rows take 34 ms."""
        if self._rows is None:
            log = self.path / "metrics.jsonl"
            self._rows = [row for _, row in read_jsonl(log)] if log.is_file() and log.stat().st_size else []
        return self._rows

    def metric_history(self, name: str) -> dict[int, float]:
        """Step → value, of every row that has the metric."""
        return {row["step"]: row[name] for row in self.history() if name in row}

    def finish(self, step: int, model: Path, weights_sha256: str) -> dict[str, Any]:
        """Write and return the run's result, with the keys that the command line prints."""
        result = {
            "run_dir": str(self.path),
            "model": str(model),
            "step": step,
            "weights_sha256": weights_sha256,
            "seconds": round(time.monotonic() - self.started, 3),
            "rollouts_bytes": sum(path.stat().st_size for path in self.rollout_files()),
        }
        write_json(self.path / "result.json", result)
        self.seal("end", step, files=["result.json", chain.JUDGE], sweep=True)
        return result

    def close(self) -> None:
        """Wait for a checkpoint that is being written, and let go of the loggers."""
        self.writer.close()
        for sink in self._sinks or ():
            sink.close()


@contextmanager
def open_run(cfg: TrainConfig, stage: str, inputs: Mapping[str, Path]) -> Iterator[Run]:
    """Create the run directory of `cfg`, or continue it; it is locked until the context ends.

    Args:
        inputs: name → file that the run reads; their hashes are kept, and must not change under a run.

    Raises:
        RunDirError: it exists and `--resume` was not given; it is another stage's or another config's; or
            another process is writing it.
        DataError: an input is missing, or differs from what the run began with.
    """
    path = Path(cfg.out_dir) if cfg.out_dir else _default_path(cfg, stage)
    hashes = {name: input_record(file) for name, file in inputs.items()}
    with disk_errors(path):  # a name that is too long, a circle of links
        made = not path.exists()
        if not made and not path.is_dir():
            raise RunDirError(f"{path}: is a file, not a run directory")
        lock.refuse_if_held(path)
        if not made and any(path.iterdir()) and not cfg.resume:
            raise RunDirError(f"{path}: exists already; pass --resume to continue it, or another --out_dir")
    make_folder(path)
    with lock.hold(path, stage):
        if (path / "config.toml").is_file():
            _same_run(path, stage, cfg, hashes)
        else:
            _begin(path, stage, cfg, hashes)
        run = Run(path, stage, cfg)
        try:
            yield run
        except BaseException:
            _leave_no_trace(path, made)
            raise
        finally:
            run.close()


def continued(cfg: TrainConfig, stage: str) -> Mapping[str, Any]:
    """The stored config of the run that `cfg` continues; empty where it begins one."""
    path = Path(cfg.out_dir) if cfg.out_dir else _unfinished(cfg, stage)
    return _stored(path, stage) if cfg.resume and path else {}


def _stored(path: Path, stage: str) -> Mapping[str, Any]:
    """What a run directory says of this stage; nothing where it is of another stage, or of no run."""
    file = path / "config.toml"
    table: Mapping[str, Any] = tomllib.loads(file.read_text(encoding="utf-8")).get(stage, {}) if file.is_file() else {}
    return table


@contextmanager
def recorded(cfg: Any, stage: str, inputs: Mapping[str, Path]) -> Iterator[Path]:
    """A new folder of `artifacts/runs` for a command that trains nothing: config, command, code, machine, inputs.

    It is removed again if the command fails. Raises as `open_run` does.
    """
    hashes = {name: input_record(file) for name, file in inputs.items()}
    while True:
        path = new_path()
        with disk_errors(path), contextlib.suppress(FileExistsError):  # another process has just taken the name
            path.mkdir(parents=True)
            break
    try:
        _begin(path, stage, cfg, hashes)
        yield path
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _leave_no_trace(path: Path, made: bool) -> None:
    """Empty the folder of a run that never took a step. A folder that was there before (a mount, a link) stays.

    The error on its way out is the one to be seen, so that none is raised here.
    """
    with contextlib.suppress(OSError):
        found = list(path.iterdir())
        if not {entry.name for entry in found} <= OWN:
            return
        for entry in found:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()
        if made:
            path.rmdir()


def _begin(path: Path, stage: str, cfg: Any, hashes: Mapping[str, Any]) -> None:
    """What every run starts with. The config comes last: a folder without one is a run that never began."""
    strange = sorted(p.name for p in path.iterdir() if p.name not in OWN and not p.name.startswith(".tmp-"))
    if strange:
        raise RunDirError(f"{path}: holds other files ({strange[0]}) and no run; pick another --out_dir")
    repro.snapshot(path, sys.argv)
    write_json(path / "data.json", hashes)
    write_atomic(path / "config.toml", config.to_toml(cfg, stage))


def _same_run(path: Path, stage: str, cfg: TrainConfig, hashes: Mapping[str, Mapping[str, str]]) -> None:
    stored = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
    if stage not in stored:
        raise RunDirError(f"{path}: is a run of {', '.join(stored)}, not of {stage}")
    if changed := config.differences(stored[stage], cfg):
        raise RunDirError(f"{path}: was begun with another config ({'; '.join(changed)}); pick another --out_dir")
    before = read_json(path / "data.json")
    for name, entry in hashes.items():
        if before.get(name, {}).get("sha256") != entry["sha256"]:
            raise DataError(entry["path"], f"has changed since the run in {path} began; pick another --out_dir")


def input_record(file: Path) -> dict[str, Any]:
    """Path and hash of an input, and what it was made from where a file beside it says so."""
    found: dict[str, Any] = {"path": str(file), "sha256": _hash(file)}
    source = file.with_suffix(SOURCE_SUFFIX)
    if source.is_file():
        found["from"] = read_json(source)
    if manifest := _manifest(file, found["sha256"]):
        found["manifest"] = manifest
    return found


def _manifest(file: Path, sha256: str) -> dict[str, Any]:
    """What the manifest of the file's folder says of its rows; {} where there is none, or one of other rows."""
    path = file.with_name("manifest.json")
    try:
        manifest = read_json(path) if path.is_file() else {}
    except DataError:  # anyone may call a file so
        return {}
    files = manifest.get("files")
    if not isinstance(files, dict) or files.get(file.name) != sha256:
        return {}
    return {key: value for key, value in manifest.items() if key not in ("format", "files", "content")}


def _hash(file: Path) -> str:
    if not file.is_file():
        raise DataError(file, "does not exist; make it with `grpo-gsm8k data --out_dir DIR`")
    return sha256_file(file)


def _default_path(cfg: TrainConfig, stage: str) -> Path:
    """A new stamped folder; with `--resume`, the newest unfinished one of the same stage and config."""
    path = _unfinished(cfg, stage)
    if path is None:
        return new_path()
    say(f"resuming {path}")
    return path


def _unfinished(cfg: TrainConfig, stage: str) -> Path | None:
    """With `--resume`, the newest unfinished run of the same stage and config."""
    for path in sorted(RUNS.glob("*"), reverse=True) if cfg.resume else ():
        table = {} if (path / "result.json").is_file() else _stored(path, stage)
        if table and not config.differences(table, cfg):
            return path
    return None


def new_path() -> Path:
    """`artifacts/runs/<UTC stamp>_<git sha>`, with a number behind it where two begin in the same second."""
    path = RUNS / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}_{repro.git_commit()}"
    numbered = (path.with_name(f"{path.name}_{n}") for n in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())
