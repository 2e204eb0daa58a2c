"""From a plan to its runs: a job for every arm and seed, in an order in which what one needs comes before it.

A job is an ordinary run directory, `runs/<arm>-<digest>/seed_0`, and an evaluation of its model. The digest is of the
arm's settings, so a plan that changes an arm makes new runs and leaves the old ones as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_gsm8k import config
from grpo_gsm8k.errors import ConfigError, DataError
from grpo_gsm8k.evals.accuracy import accuracies, read_rows
from grpo_gsm8k.pipeline import make_data, make_tiny, split_file
from grpo_gsm8k.runs.files import read_json, read_jsonl, write_json
from grpo_gsm8k.study.plan import Arm, Plan, price
from grpo_gsm8k.tasks.base import SPLITS, Task, load_split
from grpo_gsm8k.tasks.dataset import verify
from grpo_gsm8k.tasks.render import task_of

START = "start"  # the name of the jobs that train what arms start from
MANY_ROUNDS = 1_000  # of expert iteration, more than any budget has been seen to take


@dataclass(frozen=True, eq=False)
class Job:
    """One run and the evaluation of its model.

    Attributes:
        arm: name in the plan, or `START`.
        seed: of the run; None for a start that all seeds share.
        needs: names of the jobs that come first.
        run_dir, results: what it writes.
        content: what the process that does it reads, see study/worker.py.
    """

    name: str
    arm: str
    seed: int | None
    stage: str
    needs: tuple[str, ...]
    run_dir: Path
    results: Path
    content: dict[str, Any]

    @property
    def summary(self) -> Path:
        """Beside the results, written last."""
        return self.results.with_suffix(".json")

    @property
    def done(self) -> bool:
        """Whether its model is evaluated."""
        return self.summary.is_file()


@dataclass(frozen=True)
class Material:
    """What all arms share: the data and the base model."""

    data: Path
    model: str
    task: Task


def base_settings(plan: Plan) -> dict[str, Any]:
    """The settings that say what the base model and the data are; those of the reference's stage."""
    named = {key: value for key in ("model_id", "data") if (value := getattr(plan.top, key))}
    return plan.settings(plan.reference.stage, {**plan.reference.settings, **named})


def material_of(plan: Plan, folder: Path) -> Material:
    """Where data and base model are, or will be once `prepare` has made them."""
    settings = base_settings(plan)
    task = task_of(config.build(config.SECTIONS[plan.reference.stage], settings))
    made = {section: plan.settings(section, {}) for section in ("toy", "tiny_model")}
    place = folder / "made" / digest({"task": task.spec, "seed": plan.top.seed, "data": settings["data"], **made})
    given = settings["data"] and not Path(settings["data"]).is_file()
    data = Path(settings["data"]) if given else place / "data"
    return Material(data, settings["model_id"] or str(place / "model"), task)


def prepare(plan: Plan, folder: Path) -> Material:
    """Data and base model, made in the study's folder where the plan names none.

    Raises:
        DataError: the data are not there, or have fewer test problems than the plan asks for.
    """
    material, settings, seed = material_of(plan, folder), base_settings(plan), plan.top.seed
    data, task = material.data, material.task
    if not settings["data"]:
        make_data(task, data, config.build(config.ToyConfig, plan.settings("toy", {})), seed)
    elif data != Path(settings["data"]):
        split_file(task, Path(settings["data"]), data, seed)
    if (data / "manifest.json").is_file():
        verify(data, task)
    examples = {split: load_split(task, data, split) for split in SPLITS}
    if plan.problems > len(examples["test"]):
        wanted = f"the plan needs {plan.problems:,}"
        raise DataError(data / "test.jsonl", f"has {len(examples['test']):,} problems, and {wanted}")
    if not settings["model_id"]:
        tiny = config.build(config.TinyModelConfig, plan.settings("tiny_model", {}))
        make_tiny(Path(material.model), tiny, task, examples["train"], seed)
    return material


def jobs_of(plan: Plan, folder: Path, material: Material) -> list[Job]:
    """Every run of the plan, seed by seed; what a run needs stands before it."""
    found: list[Job] = []
    shared = _start(plan, folder, material, None) if plan.start and not plan.start.per_seed else None
    if shared and any(arm.start == START for arm in plan.arms):
        found.append(shared)
    for seed in plan.seeds:
        start = _start(plan, folder, material, seed) if plan.start and plan.start.per_seed else shared
        if start and start is not shared:
            found.append(start)
        first = _of_arm(plan, folder, material, plan.reference, seed, start, None)
        found.append(first)
        found += [_of_arm(plan, folder, material, arm, seed, start, first) for arm in plan.others]
    return found


def _start(plan: Plan, folder: Path, material: Material, seed: int | None) -> Job:
    assert plan.start
    settings = dict(plan.start_settings)
    return _job(plan, folder, material, START, plan.start.stage, settings, seed, None, None)


def _of_arm(
    plan: Plan, folder: Path, material: Material, arm: Arm, seed: int, start: Job | None, reference: Job | None
) -> Job:
    from_start = start if arm.start == START else None
    settings = dict(arm.settings)
    budget = None
    if arm.equal and reference:
        settings["rounds"] = MANY_ROUNDS
        prices = [price(plan, one) for one in (arm, plan.reference)]
        budget = {"of": arm.equal, "run": reference, "dollars_per_hour": prices}
    return _job(plan, folder, material, arm.name, arm.stage, settings, seed, from_start, budget)


def _job(
    plan: Plan,
    folder: Path,
    material: Material,
    arm: str,
    stage: str,
    settings: Mapping[str, Any],
    seed: int | None,
    start: Job | None,
    budget: Mapping[str, Any] | None,
) -> Job:
    """The job, its settings resolved. `budget` names the run that it may use up as much as."""
    values = plan.settings(stage, settings)
    values |= {"data": str(material.data), "model_id": "" if start else material.model, "resume": True}
    runtime = {f.name for f in dataclasses.fields(config.SECTIONS[stage]) if f.metadata["runtime"]}
    fixed = {key: value for key, value in values.items() if key not in runtime | {"seed"}}
    of: dict[str, Any] = {"stage": stage, "settings": fixed}
    of |= {"start": start.run_dir.parent.name} if start else {}
    of |= {"budget": {**budget, "run": budget["run"].run_dir.parent.name}} if budget else {}
    place = f"{arm}-{digest(of, folder)}"
    name = f"{place}/seed_{'all' if seed is None else seed}"
    run_dir = folder / "runs" / name
    asked = plan.settings("eval", {})
    asked |= {"eval_path": str(material.data / "test.jsonl"), "limit": plan.problems, "task": material.task.spec}
    asked |= {key: values[key] for key in ("engine", "device", "dtype", "prompt_style") if asked[key] == "auto"}
    results = folder / "results" / digest({**asked, "out_dir": ""}, folder) / f"{name.replace('/', '_')}.jsonl"
    content = {
        "stage": stage,
        "config": {**values, "seed": plan.top.seed if seed is None else seed, "out_dir": str(run_dir)},
        "start": str(start.run_dir) if start else "",
        "budget": {**budget, "run": str(budget["run"].run_dir)} if budget else None,
        "eval": asked,
        "results": str(results),
    }
    needs = tuple(job.name for job in (start, budget and budget["run"]) if job)
    return Job(name, arm, seed, stage, needs, run_dir, results, content)


def digest(value: Any, folder: Path | None = None) -> str:
    """Eight letters that stand for a value. What the study made in its `folder` counts the same wherever that is."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    if folder is not None:
        text = text.replace(json.dumps(f"{folder}/", ensure_ascii=False)[:-1], '"')
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def write_job(folder: Path, job: Job) -> Path:
    """The file that the job's process reads."""
    path = folder / "jobs" / f"{job.name.replace('/', '_')}.json"
    write_json(path, job.content)
    return path


# ------------------------------------------------------------------------------------------------ what was spent


@dataclass(frozen=True)
class Spent:
    """What training used up, and nothing of the final evaluation.

    Attributes:
        tokens: sampled in GRPO and expert iteration; 0 for SFT, which samples none.
        seconds: of all steps, their validation included; a step that was made again after a kill counts once.
    """

    tokens: float
    seconds: float
    steps: int

    def of(self, what: str, dollars_per_hour: float = 0.0) -> float:
        """As a budget counts it: tokens, seconds or dollars."""
        return {"tokens": self.tokens, "seconds": self.seconds, "dollars": self.seconds / 3600 * dollars_per_hour}[what]


def spent(run_dir: Path, completions_per_step: int = 0, last: int = config.MOST) -> Spent:
    """What a run has used up, by its metrics as far as step `last`."""
    path = run_dir / "metrics.jsonl"
    rows = [row for _, row in read_jsonl(path)] if path.is_file() and path.stat().st_size else []
    rows = [row for row in rows if row["step"] <= last]
    tokens = sum(row.get("ei/sampled_tokens", 0.0) for row in rows)
    tokens += sum(row.get("length/mean", 0.0) * completions_per_step for row in rows)
    return Spent(tokens, sum(row.get("time/total", 0.0) for row in rows), len(rows))


def spent_by(job: Mapping[str, Any]) -> Spent:
    """What a job's run has used up; its file says how many completions a step samples."""
    return spent(Path(job["config"]["out_dir"]), job["config"].get("rollouts_per_step", 0))


def answers(job: Job) -> dict[str, float]:
    """Problem id → accuracy on it (or mean reward), of a job that is done.

    Raises:
        ConfigError: the results are of other weights than the run has.
    """
    summary, result = read_json(job.summary), read_json(job.run_dir / "result.json")
    if summary["weights_sha256"] != result["weights_sha256"]:
        raise ConfigError(f"{job.results}: was made with other weights than {job.run_dir} has; delete it, and go on")
    return accuracies(read_rows(job.results))
