"""One run of a study in a process of its own: train, then evaluate. `python -m grpo_gsm8k.study.worker JOB.json`.

It can be started again at any moment: a run that was killed continues from its checkpoint, one that is done is only
evaluated, and one that is evaluated is left alone.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_gsm8k import config
from grpo_gsm8k.errors import GrpoError
from grpo_gsm8k.runs.files import read_json
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.study.jobs import spent, spent_by


def work(path: Path) -> None:
    """Do what the file says."""
    job = read_json(path)
    values = dict(job["config"])
    if job["start"]:
        values["model_id"] = read_json(Path(job["start"]) / "result.json")["model"]
    result = train(job, values)
    evaluate(job, result)


def train(job: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The result of the job's run, which is made, continued, or read where it is done."""
    done = Path(values["out_dir"]) / "result.json"
    if job["budget"]:
        return train_within(job["budget"], values)
    if done.is_file():
        return read_json(done)
    found: dict[str, Any] = _stage(job["stage"])(config.build(config.SECTIONS[job["stage"]], values))
    return found


def train_within(budget: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Expert iteration, round by round, until another round would end further from the budget than this one."""
    other, run_dir = Path(budget["run"]), Path(values["out_dir"])
    what, (own, theirs) = budget["of"], budget["dollars_per_hour"]
    limit = spent_by({"config": read_config(other)}).of(what, theirs)
    size = values["steps_per_round"]
    while True:
        rounds = spent(run_dir).steps // size
        used = spent(run_dir, last=rounds * size).of(what, own)
        if rounds and (used + used / rounds / 2 > limit or rounds == values["rounds"]):
            result = run_dir / "result.json"
            if result.is_file() and read_json(result)["step"] == rounds * size:
                return read_json(result)
            rounds -= 1  # killed before the result was written: the same call writes it
        say(f"ei: {used:,.0f} of {limit:,.0f} {what} used")
        _stage("ei")(config.build(config.EiConfig, {**values, "max_steps": (rounds + 1) * size}))


def read_config(run_dir: Path) -> dict[str, Any]:
    """The settings of a run, as its directory has them."""
    tables = tomllib.loads((run_dir / "config.toml").read_text(encoding="utf-8"))
    return {**next(iter(tables.values())), "out_dir": str(run_dir)}


def evaluate(job: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Answers of the run's model to the study's problems; read back if these weights gave them."""
    from grpo_gsm8k import fast_eval_vllm

    results = Path(job["results"])
    summary = results.with_suffix(".json")
    if summary.is_file() and read_json(summary)["weights_sha256"] == result["weights_sha256"]:
        return
    cfg = config.build(config.EvalConfig, {**job["eval"], "model_id": result["model"]})
    fast_eval_vllm.run(cfg, results, "test")


def _stage(name: str) -> Any:
    return importlib.import_module(f"grpo_gsm8k.{name}").run


def _end_with(parent: int) -> None:
    """End in an orderly way when the study is gone: its next start continues this run, and needs its lock."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def main(argv: list[str]) -> int:
    """The process: exit codes as the command line's."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        work(Path(argv[0]))
    except GrpoError as fault:
        say(f"{fault}")
        return fault.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
