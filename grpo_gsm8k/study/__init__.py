"""A fair comparison of arms: planned, registered, run, analysed and written up by one command.

    grpo-gsm8k study plan.toml --dry_run          runs, tokens, time, cost, power; makes nothing
    grpo-gsm8k study plan.toml --simulate 200     how often this plan would be wrong
    grpo-gsm8k study plan.toml --jobs 2           runs it; with --resume goes on with it

A study's folder: `plan.toml` and `registration.json` (registry.py), `runs/` (ordinary run directories), `results/`
(answers of each run), `jobs/` (what each process was asked, and its log), `study.json` and `study.html`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_gsm8k.errors import GrpoError, RunDirError
from grpo_gsm8k.runs import lock
from grpo_gsm8k.runs.files import disk_errors, make_folder, write_atomic, write_json
from grpo_gsm8k.runs.progress import doing, say

if TYPE_CHECKING:
    from grpo_gsm8k.study.jobs import Job
    from grpo_gsm8k.study.plan import Plan

STUDIES = Path("artifacts/studies")


def run(
    plan_path: Path, out_dir: Path | None = None, *, resume: bool = False, jobs: int = 1, max_runs: int = 0
) -> dict[str, Any]:
    """Run what is left of a study and write its page.

    Args:
        out_dir: its folder; by default `artifacts/studies/<name of the plan>`.
        jobs: runs at a time.
        max_runs: start so many at most; 0 for all.

    Raises:
        ConfigError: a mistake in the plan.
        RunDirError: the folder holds a study, and `resume` was not given.
        GrpoError: some runs failed; the page is written without them.
    """
    with doing("importing torch and transformers"):
        from grpo_gsm8k.study.analysis import is_decided
        from grpo_gsm8k.study.jobs import jobs_of, prepare
        from grpo_gsm8k.study.plan import read_plan
        from grpo_gsm8k.study.registry import register
        from grpo_gsm8k.study.scheduler import run_jobs
    plan = read_plan(plan_path)
    folder = folder_of(plan_path, out_dir)
    with disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise RunDirError(f"{folder}: is a file, not a folder")
        lock.refuse_if_held(folder)
    make_folder(folder)
    with lock.hold(folder, "study"):
        history = register(plan, folder, resume)
        if len(history) > 1:
            say(f"the plan was changed after {history[-1].results} results existed; the page says so")
        with doing("preparing data and model"):
            material = prepare(plan, folder)
        planned = jobs_of(plan, folder, material)
        say(f"{len(planned)} runs in {folder}, {sum(job.done for job in planned)} of them done")
        failed = run_jobs(folder, planned, jobs, max_runs, lambda: is_decided(plan, planned))
        found = write_up(plan, planned, folder)
    if failed:
        raise GrpoError(f"{len(failed)} of {len(planned)} runs failed ({', '.join(failed)}); --resume tries them again")
    return found


def write_up(plan: Plan, jobs: Sequence[Job], folder: Path) -> dict[str, Any]:
    """Analyse what is done, and write `study.json` and `study.html`."""
    from grpo_gsm8k.study import page, words
    from grpo_gsm8k.study.analysis import analyse, as_json
    from grpo_gsm8k.study.registry import changes

    with doing("writing the page"):
        analysis = analyse(plan, jobs)
        found = {
            "run_dir": str(folder),
            "path": str(folder / "study.html"),
            "answer": words.headline(plan, analysis),
            "sentences": words.sentences(plan, analysis),
            "plan_sha256": plan.sha256,
            "plan_changed": bool(changes(folder)),
            "runs": len(jobs),
            "done": sum(job.done for job in jobs),
            **as_json(analysis, plan.reference),
        }
        write_json(folder / "study.json", found)
        write_atomic(folder / "study.html", page.page(plan, analysis, jobs, folder).encode(errors="replace"))
    return found


def folder_of(plan_path: Path, out_dir: Path | None) -> Path:
    """Where a study of this plan stands."""
    return out_dir or STUDIES / plan_path.stem


def dry_run(plan_path: Path, out_dir: Path | None = None) -> dict[str, Any]:
    """Runs, tokens, time and cost of a plan, see ahead.py; makes nothing."""
    from grpo_gsm8k.study import ahead
    from grpo_gsm8k.study.plan import read_plan

    return ahead.dry_run(read_plan(plan_path), folder_of(plan_path, out_dir))


def simulate(plan_path: Path, studies: int) -> dict[str, Any]:
    """How often studies of this plan are wrong, see ahead.py."""
    from grpo_gsm8k.study import ahead
    from grpo_gsm8k.study.plan import read_plan

    return ahead.simulate(read_plan(plan_path), studies)
