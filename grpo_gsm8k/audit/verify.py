"""`verify RUN`: is a run what it says it is?

    grpo-gsm8k verify artifacts/runs/demo            all stages of a pipeline
    grpo-gsm8k verify artifacts/runs/demo/grpo --steps 5 --seed 1

1. Every byte: the files and the rows of the log against the hash chain.
2. Every grade: the stored text graded again; advantages, metrics, samples and evaluations computed again from it.
3. Some steps, drawn by `--seed`: sampled again and trained again from the checkpoint before them. The steps in between
   are trained again, too.

Where the files do not hold, nothing else is tried. What is proved is told apart from what agrees within a tolerance, as
on another processor, and from what could not be checked.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_gsm8k.audit import files
from grpo_gsm8k.audit.files import Damage
from grpo_gsm8k.audit.replay import judge, recorded_seconds
from grpo_gsm8k.audit.stored import (
    STAGES,
    StoredRun,
    allow_own_code,
    import_nothing_from,
    is_pipeline,
    open_run,
)
from grpo_gsm8k.errors import CheckpointError, ConfigError, DataError, RunDirError, UserError
from grpo_gsm8k.runs import chain, rollouts
from grpo_gsm8k.runs.files import read_json
from grpo_gsm8k.runs.progress import doing, progress

if TYPE_CHECKING:
    from grpo_gsm8k.audit.again import Again, Trained
    from grpo_gsm8k.audit.sampling import Drawn


@dataclass(frozen=True)
class Options:
    """What `verify` was asked for.

    Attributes:
        steps: drawn of each training stage, by `seed`.
        head: the last hash of the chain, from somewhere else than the run; "" where nobody has it.
    """

    steps: int = 3
    seed: int = 0
    own_code: bool = False
    data: str = ""
    model_id: str = ""
    head: str = ""


@dataclass
class Found:
    """What was found of one directory, in words.

    Attributes:
        damage: what is not as it was, each with its file and step.
        again: steps that were trained again; `seconds` of that, and what the run took for them.
    """

    name: str
    head: str = ""
    bitwise: list[str] = field(default_factory=list)
    close: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    again: int = 0
    seconds: float = 0.0
    recorded_seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**vars(self), "damage": [vars(one) for one in self.damage]}


def verify(folder: Path, options: Options) -> dict[str, Any]:
    """Verify a training run, or a pipeline and its stages; the command's result.

    Raises:
        RunDirError: it is no run of this program.
    """
    began = time.monotonic()
    import_nothing_from(folder)
    found = _pipeline(folder, options) if is_pipeline(folder) else [_run(folder, folder.name, options, options.head)]
    damage = [{"part": part.name, **vars(one)} for part in found for one in part.damage]
    return {
        "run_dir": str(folder),
        "ok": not damage,
        "head": found[0].head,
        "damage": damage,
        "parts": [part.as_json() for part in found],
        "seconds": round(time.monotonic() - began, 2),
        "steps_again": sum(part.again for part in found),
        "recorded_seconds": round(sum(part.recorded_seconds for part in found), 2),
    }


# ------------------------------------------------------------------------------------------------------ pipelines


def _pipeline(folder: Path, options: Options) -> list[Found]:
    """The pipeline's own files, the evaluation of each stage, and its training stages as runs of their own."""
    whole = Found("pipeline")
    _check_bytes(folder, whole, options.head)
    stages = [name for name in STAGES if (folder / name / "config.toml").is_file()]
    missing = {name for link in chain.read(folder)[0] for name in link.get("chains", {})} - set(stages)
    whole.damage += [Damage(name, None, "is missing: the whole stage") for name in sorted(missing)]
    heads = {name: hash_ for link in chain.read(folder)[0] for name, hash_ in link.get("chains", {}).items()}
    parts = [Found(name) for name in stages]
    for part in parts:
        _check_bytes(folder / part.name, part, heads.get(part.name, ""))
    if not any(part.damage for part in (whole, *parts)):
        for part in parts:
            _check_meaning(folder / part.name, part, options)
        _check_pipeline_evaluations(folder, whole, stages, options)
    return [whole, *parts]


def _check_pipeline_evaluations(folder: Path, whole: Found, stages: Sequence[str], options: Options) -> None:
    """Each stage's evaluation on the test split, from its rows; and what pipeline.json says of it."""
    if not stages or not (folder / "pipeline.json").is_file():
        whole.unchecked.append("evaluations: no stage was trained whose settings say how they are graded")
        return
    try:
        run = open_run(folder / stages[0], options.data, options.model_id)
        allow_own_code(run, options.own_code)
        with doing("evaluations"):
            counted = sum(
                1 for stage in read_json(folder / "pipeline.json")["stages"] if _one(folder, whole, run, stage)
            )
    except UserError as fault:
        whole.unchecked.append(f"evaluations: {fault}")
        return
    if counted:
        whole.bitwise.append(f"{counted} evaluations on the test split: graded again, every figure computed again")


def _one(folder: Path, whole: Found, run: StoredRun, stage: dict[str, Any]) -> bool:
    """Check the evaluation of one stage; whether it was checked and holds."""
    from grpo_gsm8k.audit import grades
    from grpo_gsm8k.tasks.base import load_split
    from grpo_gsm8k.tasks.render import Renderer, date_of, task_of
    from grpo_gsm8k.trainer.policy import load_tokenizer

    name = f"evals/{stage['name']}.jsonl"
    summary = read_json(folder / name.replace(".jsonl", ".json"))
    cfg = replace(run.cfg, grading=summary["grading"], task=summary["task"])
    if not Path(cfg.model_id).is_dir():
        cfg = replace(cfg, model_id=str(_any_checkpoint(run)))
    renderer = Renderer(load_tokenizer(cfg), task_of(cfg), date=date_of(cfg))
    examples = {example.id: example for example in load_split(renderer.task, cfg.data, "test")}
    trained = folder / stage["name"] / "result.json"
    sha256 = read_json(trained)["weights_sha256"] if trained.is_file() else run.weights.get(0, "")
    found, damage = grades.check_evaluation(renderer, examples, folder / name, name, None, sha256)
    whole.damage += damage
    if found and (what := grades.unlike_summary(summary, found)):
        whole.damage.append(Damage(name.replace(".jsonl", ".json"), None, what))
    elif found and (what := grades.unlike_summary({**summary, **stage}, found)):
        whole.damage.append(Damage("pipeline.json", None, f"stage {stage['name']}: {what}"))
    return not whole.damage


def _any_checkpoint(run: StoredRun) -> Path:
    found = sorted(run.checkpoints.glob("step_*"))
    if not found:
        raise DataError(run.folder, "has no checkpoint, and the model that it began with is not here")
    return found[-1]


# ------------------------------------------------------------------------------------------------------- one run


def _run(folder: Path, name: str, options: Options, head: str) -> Found:
    part = Found(name)
    if not (folder / chain.NAME).is_file():
        open_run(folder)  # refuses what is no run
    _check_bytes(folder, part, head)
    if not part.damage:
        open_run(folder)
        _check_meaning(folder, part, options)
    return part


def _check_bytes(folder: Path, part: Found, head: str) -> None:
    """Every file against the chain, and the chain's end against a hash from elsewhere."""
    with doing(f"{part.name}: every byte"):
        checked = files.check(folder)
    part.head, part.damage = checked.head, checked.damage
    if not checked.head and not checked.damage:
        part.unchecked.append(f"no byte of it: {folder} has no {chain.NAME}, as runs of older versions have none")
        return
    part.unchecked += [f"{name}: the chain says nothing about it" for name in checked.free]
    if head and not part.damage and head not in {link["hash"] for link in chain.read(folder)[0]}:
        part.damage.append(
            Damage(chain.NAME, None, f"no link has the hash {head}: this is not the chain that ended in it")
        )
    if not part.damage:
        part.bitwise.append(f"{checked.files} files, with every row of the log, are those of the chain {checked.head}")


def _check_meaning(folder: Path, part: Found, options: Options) -> None:
    """Grades, evaluations and some steps. What cannot be tried is listed as unchecked, with the reason."""
    try:
        run = open_run(folder, options.data, options.model_id)
        allow_own_code(run, options.own_code)
        part.unchecked += [f"input: {what}; pass --data" for what in run.missing_inputs()]
        from grpo_gsm8k.audit import again
    except RunDirError:
        raise
    except UserError as fault:
        part.unchecked.append(f"grades and steps: {fault}")
        return
    try:
        with doing(f"{part.name}: loading"), again.opened(run) as learner:
            _check_grades(learner, part)
            _check_evaluations(learner, part)
            _check_steps(learner, part, options)
            _check_checkpoints(learner, part)
    except RunDirError:
        raise
    except CheckpointError as fault:
        part.damage.append(Damage(chain.CHECKPOINTS, None, str(fault)))
    except UserError as fault:
        part.unchecked.append(f"what follows in this list was not tried: {fault}")


def _check_grades(learner: Again, part: Found) -> None:
    """All rollouts that were kept, graded again."""
    from grpo_gsm8k.audit import grades

    run: StoredRun = learner.run
    if run.stage == "sft":
        return
    if _judged(learner):
        part.unchecked.append("grades: a judge gave them, and it is not asked again")
        return
    steps = _steps_with_rollouts(run)
    if not steps:
        part.unchecked.append("grades: no rollouts were kept (--keep_rollouts 0, or a run of an older version)")
        return
    grader, before = grades.grader_of(learner), len(part.damage)
    with progress(f"{part.name}: grading again", len(steps), keep=False) as bar:
        for number, step in enumerate(steps, 1):
            part.damage += grades.check_rollouts(learner, step, grader)
            bar.update(number)
    if len(part.damage) == before:
        part.bitwise.append(
            f"rollouts of {len(steps)} steps: graded again; advantages, metrics and samples follow from the grades"
        )


def _judged(learner: Again) -> bool:
    return learner.renderer.task.spec == "chat" and learner.cfg.preference == "judge"


def _check_evaluations(learner: Again, part: Found) -> None:
    """The validations of a run, from their rows."""
    from grpo_gsm8k.audit import grades
    from grpo_gsm8k.tasks.base import load_examples

    run: StoredRun = learner.run
    paths = sorted((run.folder / "evals").glob("step_*.jsonl"))
    where, _ = run.inputs().get("eval_set", (Path(), ""))
    if not paths or _judged(learner) or not where.is_file():
        part.unchecked += [f"{len(paths)} evaluations: {where} is not here"] if paths and not where.is_file() else []
        return
    examples = {example.id: example for example in load_examples(learner.renderer.task, where)}
    before = len(part.damage)
    for path in paths:
        step, name = int(path.stem.removeprefix("step_")), f"evals/{path.name}"
        sha256 = run.weights.get(step, "")
        found, damage = grades.check_evaluation(learner.renderer, examples, path, name, step, sha256)
        part.damage += damage
        if found and (what := grades.unlike_metrics(run.metrics.get(step, {}), found)):
            part.damage.append(Damage(chain.METRICS, step, f"does not follow from {name}: {what}"))
    if len(part.damage) == before:
        part.bitwise.append(f"{len(paths)} evaluations: graded again, their metrics computed again")


def _steps_with_rollouts(run: StoredRun) -> list[int]:
    paths = (run.folder / rollouts.FOLDER).glob("step_*.safetensors")
    return sorted(int(path.stem.removeprefix("step_")) for path in paths)


def _check_checkpoints(learner: Again, part: Found) -> None:
    """The weights in each checkpoint, against the hash that its step left in the chain."""
    from grpo_gsm8k.trainer.checkpoint import steps_present

    run: StoredRun = learner.run
    known = [step for step in steps_present(run.checkpoints) if step in run.weights]
    before = len(part.damage)
    for step in known:
        name = f"{chain.CHECKPOINTS}/step_{step:06d}"
        if learner.weights_of(run.folder / name, step) != run.weights[step]:
            part.damage.append(Damage(name, step, "does not have the weights that the run had after this step"))
    if known and len(part.damage) == before:
        part.bitwise.append(f"{len(known)} checkpoints have the weights that their steps left")


# ---------------------------------------------------------------------------------------------------- some steps


def _check_steps(learner: Again, part: Found, options: Options) -> None:
    """Sample and train the drawn steps again, in one way forward through the run."""
    run: StoredRun = learner.run
    kept = _steps_with_rollouts(run)
    possible = [step for step in range(1, run.last + 1) if _can_train(run, step, kept)]
    part.drawn = drawn = sorted(random.Random(options.seed).sample(possible, min(options.steps, len(possible))))
    if not drawn:
        part.unchecked.append("steps: there is none to train again" if options.steps else "steps: none was asked for")
        return
    with_rollouts = {_step_of_rollouts(run, step) for step in drawn} & set(kept)
    sampled = {step: _sampled_by(learner, step) for step in with_rollouts}
    trained: list[int] = []
    began = time.perf_counter()
    with progress(f"{part.name}: training again", drawn[-1], keep=False) as bar:
        for stop in sorted({*drawn, *sampled.values()}):
            learner.seek(stop - 1 if stop in drawn else stop)
            for one in learner.to(stop):
                trained.append(one.step)
                bar.update(one.step)
                if not _holds(run, one, part, one.step in drawn):
                    return
            if learner.step == stop:
                _sample_at(learner, [step for step, version in sampled.items() if version == stop], part)
    part.again, part.seconds = len(trained), round(time.perf_counter() - began, 2)
    part.recorded_seconds = round(sum(recorded_seconds(run, range(step, step + 1)) for step in trained), 2)
    words = f"steps {', '.join(map(str, drawn))}, and {len(trained) - len(drawn)} on the way to them: trained again"
    if not run.elsewhere:
        part.bitwise.append(f"{words}, the same weights after each")


def _can_train(run: StoredRun, step: int, kept: Sequence[int]) -> bool:
    """Whether the rollouts of a step are there, and those of the steps between it and the checkpoint before it.

    Of a distillation the teacher's scores must be there, too.
    """
    from grpo_gsm8k.trainer.checkpoint import steps_present

    if run.stage not in ("grpo", "distill"):
        return True
    scores = run.folder / "teacher"
    if run.stage == "distill" and (not scores.is_dir() or (scores / "full").exists()):
        return False  # not all that its teacher said was kept
    before = max((found for found in steps_present(run.checkpoints) if found < step), default=0)
    return set(range(before + 1, step + 1)) <= set(kept)


def _step_of_rollouts(run: StoredRun, step: int) -> int:
    """The step that holds the rollouts which a step trained on: in expert iteration, the first of its round."""
    return step if run.stage != "ei" else step - (step - 1) % run.cfg.steps_per_round


def _sampled_by(learner: Again, step: int) -> int:
    """The version of the weights that sampled a step's rollouts."""
    return min(one.trajectory.policy_version for group in learner.rollouts(step).groups for one in group)


def _holds(run: StoredRun, one: Trained, part: Found, drawn: bool) -> bool:
    """Whether a step that was trained again is the run's, or near enough to go on."""
    from grpo_gsm8k.audit.again import differing

    off = differing(run.metrics.get(one.step, {}), one.metrics)
    if one.same and not off:
        return True
    if one.same or (not one.recorded and not run.elsewhere):
        if not off:
            return True
        name, (then, now) = next(iter(off.items()))
        part.damage.append(Damage(chain.METRICS, one.step, f"{name} {then!r} was recorded, {now!r} comes out"))
        return False
    verdict, said = judge(run, one.sha256, one.recorded, off)
    if verdict == "different":
        part.damage.append(Damage("checkpoints", one.step, f"step {one.step} trained again: {said}"))
    elif drawn:
        words = part.close if verdict == "close" else part.unchecked
        words.append(f"step {one.step} trained again: {said}")
    return verdict != "different"


def _sample_at(learner: Again, steps: Sequence[int], part: Found) -> None:
    """Sample the rollouts of these steps again; the learner has the weights that sampled them."""
    from grpo_gsm8k.audit import sampling

    for step in steps:
        stored, name = learner.rollouts(step, examples=True), rollouts.name_of(step)
        if strange := sampling.strange_prompt(learner, stored):
            part.damage.append(Damage(name, step, strange))
            continue
        try:
            found = sampling.draw_again(learner, stored)
        except ConfigError as fault:
            part.unchecked.append(f"step {step}: its completions were not sampled again: {fault}")
            continue
        _judge_samples(learner.run, step, found, part)


def _judge_samples(run: StoredRun, step: int, found: Drawn, part: Found) -> None:
    from grpo_gsm8k.audit.sampling import LOGPROB_TOLERANCE

    if found.unmatched:
        part.unchecked.append(f"step {step}: {found.unmatched} groups have seeds of a prompt that was drawn twice")
    if found.same == found.of:
        part.bitwise.append(f"step {step}: {found.of} completions sampled again, the same ids and log-probabilities")
    elif run.elsewhere and found.apart <= LOGPROB_TOLERANCE:
        part.close.append(
            f"step {step}: {found.same} of {found.of} completions sampled again are the same; log-probabilities differ "
            f"by {found.apart:.2g} at most up to where the others part ({'; '.join(run.elsewhere)})"
        )
    else:
        what = f"sampled again: {found.of - found.same} of {found.of} completions are others; {found.first}"
        part.damage.append(Damage(rollouts.name_of(step), step, what))


# ------------------------------------------------------------------------------------------------------- in words


def lines_of(result: dict[str, Any]) -> Iterator[str]:
    """What `verify` prints for a person."""
    titles = {"bitwise": "proved, bit for bit", "close": "within a tolerance", "unchecked": "not checked"}
    for part in result["parts"]:
        yield f"{part['name']}"
        for key, title in titles.items():
            yield from (f"  {title}: {text}" for text in part[key])
        for one in part["damage"]:
            step = f", step {one['step']}" if one["step"] is not None else ""
            yield f"  DAMAGED: {one['file']}{step}: {one['what']}"
    again, seconds = result["steps_again"], result["recorded_seconds"]
    verdict = (
        "the run is what it says it is" if result["ok"] else f"{len(result['damage'])} things are not as they were"
    )
    yield f"{verdict}; {result['seconds']:.0f} s, with {again} steps that took the run {seconds:.0f} s"
    yield f"the chain ends in {result['head'] or '(none)'}"
