"""The step loop that every training stage runs in: resume, checkpoints, interrupts, progress.

    for step in steps(run, learner, total, state):
        ...                         # the stage's own work for this step
        run.log(step, metrics)

A step is complete when the loop body returns. Checkpoints are made only there, so a run that is killed anywhere
resumes at the end of a step, and logs and draws the same as an uninterrupted run. With `--async_save` the next step
begins as soon as weights and optimizer are copied, and a thread writes the copy.
"""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save_file

from grpo_gsm8k import interrupts
from grpo_gsm8k.datatypes import Datum, Learner
from grpo_gsm8k.errors import Interrupted, NonFiniteError
from grpo_gsm8k.runs.directory import Run
from grpo_gsm8k.runs.files import disk_errors
from grpo_gsm8k.runs.progress import progress, say
from grpo_gsm8k.trainer import checkpoint
from grpo_gsm8k.trainer.batch import make_batch
from grpo_gsm8k.trainer.losses import Objective
from grpo_gsm8k.trainer.ranks import world

HASHED_BYTES = 1 << 28  # of weights that are hashed after every step: it takes 0.2 s at most
TORCHRUN_S = 2.0  # torchrun forwards the Ctrl-C that its ranks got from the terminal already


class StageState:
    """What a stage carries from step to step; a stage with more state overrides all three."""

    note = ""  # shown beside the progress bar

    def as_json(self) -> dict[str, Any]:
        """The state as JSON, for a checkpoint."""
        return {"note": self.note}

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Undo `as_json`."""
        self.note = stored["note"]


def steps(run: Run, learner: Learner, total: int, state: StageState) -> Iterator[int]:
    """Yield the remaining steps, 1-based, of a run of `total`.

    Args:
        state: stored with each checkpoint, and restored on resume.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, once the step is complete and its checkpoint is written.
    """
    cfg, run.state = run.cfg, state.as_json
    last = min(total, cfg.max_steps or total)
    first = resume(run, learner, state)
    if first == 0 and last == 0:
        save(run, learner, 0, state.as_json())
    with interrupts.deferred(_Presses(run)) as received, progress(run.stage, last, first) as bar:
        for step in range(first + 1, last + 1):
            yield step
            run.complete = step
            seal(run, learner, step)
            bar.update(step, ", ".join(filter(None, [state.note, _validated(run)])))
            run.writer.check()
            if step == last or received:
                save(run, learner, step, state.as_json())
            elif step % cfg.save_every == 0:
                save(run, learner, step, state.as_json(), wait=not cfg.async_save)
            if received:
                name = signal.Signals(received[0]).name
                raise Interrupted(_saved(name, step, run), 128 + received[0])


def _validated(run: Run) -> str:
    """The newest validation, beside the bar."""
    for row in reversed(run.history()):
        if row.get("val/accuracy") is not None:
            return f"accuracy {100 * row['val/accuracy']:.1f} %"
        if row.get("val/reward") is not None:
            return f"validation reward {row['val/reward']:.3f}"
    return ""


def resume(run: Run, learner: Learner, state: StageState) -> int:
    """Load the newest valid checkpoint, rewind the logs to it, and return its step; 0 if there is none."""
    found = checkpoint.newest(run.checkpoints, say)
    step = 0
    if found:
        folder, stored = found
        learner.load(folder)
        step = stored.pop("step")
        state.restore(stored)
        say(f"{run.stage}: continuing from step {step} in {run.path}")
    run.rewind(step)
    if run.cfg.learner == "torch":  # a service would keep a copy of the weights for each hash
        run.weights = {step: learner.publish(step).sha256}
    run.begin_chain(step)
    return step


def seal(run: Run, learner: Learner, step: int) -> None:
    """Append a complete step to the hash chain, with the hash of its weights where that costs little."""
    if step not in run.weights and run.cfg.learner == "torch":
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in learner.weights())
        if world().size == 1 and size <= HASHED_BYTES:
            run.weights[step] = learner.publish(step).sha256
    run.seal("step", step)


def save(run: Run, learner: Learner, step: int, state: Mapping[str, Any], wait: bool = True) -> None:
    """Write the checkpoint of a complete step, and delete old ones.

    Keeps the best one on validation: by accuracy, or by reward if the task has no right answers. Without `wait` a
    thread writes it from a copy in memory, if the learner can make one; the checkpoint before it is waited for. The
    hash chain takes in such a checkpoint with its next link.
    """
    run.writer.wait()
    scores = run.metric_history("val/accuracy") or run.metric_history("val/reward")
    snapshot = None if wait else getattr(learner, "snapshot", lambda: None)()
    stored = copy.deepcopy(dict(state))  # the stage goes on with what is in it

    def job() -> None:
        checkpoint.write(run.checkpoints, step, snapshot or learner.save, stored)
        kept = [s for s in checkpoint.steps_present(run.checkpoints) if s in scores]
        best = max(kept, key=lambda s: (scores[s], s), default=None)
        checkpoint.retain(run.checkpoints, run.cfg.keep_last, best, learner.forget)

    if snapshot:
        run.writer.start(step, job)
    else:
        job()
        run.seal("checkpoint", step)


def rescue(run: Run, learner: Learner) -> int:
    """Save the last complete step after a failure in the next one, unless the weights have changed since.

    Returns:
        the newest step that a checkpoint holds; 0 if there is none.
    """
    run.writer.wait()
    if _within_reach(run) and getattr(learner, "in_step", True):
        save(run, learner, run.complete, run.state())
    return max(checkpoint.steps_present(run.checkpoints), default=0)


def rescue_interrupted(run: Run, learner: Learner) -> None:
    """The same after a Ctrl-C in the middle of a step. Raises `Interrupted` if there is a checkpoint."""
    name = signal.Signals(interrupts.received() or signal.SIGINT).name
    if world().size == 1:  # other ranks may be in the middle of a step, and would not join a save
        with interrupts.unhurried():
            rescue(run, learner)
    if present := checkpoint.steps_present(run.checkpoints):
        raise Interrupted(_saved(name, present[-1], run), interrupts.exit_code())


def _within_reach(run: Run) -> bool:
    """Whether the weights still are those of the last complete step, and no checkpoint holds it yet."""
    if not run.complete or run.updated > run.complete:
        return False
    return not _is_kept(run)


def _is_kept(run: Run) -> bool:
    """Whether a checkpoint holds the last complete step, or will as soon as it is written."""
    return run.complete in checkpoint.steps_present(run.checkpoints) or run.writer.writes(run.complete)


def _saved(name: str, step: int, run: Run) -> str:
    return f"{name}: step {step} is saved in {run.path}; continue with --resume"


class _Presses:
    """Ctrl-C during a step: the first finishes the step, the second stops at once if nothing gets lost, the third
    always
    stops."""

    def __init__(self, run: Run) -> None:
        self.run, self.first = run, 0.0

    def __call__(self, count: int) -> bool:
        now, self.first = time.monotonic(), self.first or time.monotonic()
        if count == 1:
            say("finishing this step, then writing a checkpoint; once more to stop at once")
            return False
        if world().size > 1 and now - self.first < TORCHRUN_S:
            return False
        run = self.run
        kept = not run.complete or _is_kept(run) or _within_reach(run)
        if count == 2 and not kept:
            say(f"step {run.complete} can only be kept with the one under way, which is being finished; "
                 "once more to lose both")  # fmt: skip
            return False
        return True


def finish(run: Run, learner: Learner) -> dict[str, Any]:
    """The run's result: its last checkpoint and the hash of the weights in it."""
    step = checkpoint.steps_present(run.checkpoints)[-1]
    return run.finish(step, run.checkpoints / f"step_{step:06d}", learner.publish(step).sha256)


def update(
    run: Run, learner: Learner, data: Sequence[Datum], objective: Objective, lr: float, step: int
) -> dict[str, float]:
    """Run one update: forward, backward and optimizer step.

    Raises:
        NonFiniteError: before the weights change. The batch is kept in the run directory.
    """
    try:
        metrics = learner.forward_backward(data, objective)
        run.updated = step
        return metrics | learner.step(lr)
    except NonFiniteError as fault:
        kept = run.path / f"nonfinite_step_{step:06d}.safetensors"
        tensors = {name: t.contiguous() for name, t in vars(make_batch(data)).items() if torch.is_tensor(t)}
        with disk_errors(kept):
            save_file(tensors, kept)
        raise NonFiniteError(
            f"step {step}: {fault}; stopped before the optimizer stepped, the batch is in {kept}, earlier "
            "checkpoints are good; try a lower --lr or --dtype float32"
        ) from None
