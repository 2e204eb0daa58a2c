"""On-policy distillation, top to bottom (arXiv 2306.13649): a teacher scores every token that the student samples.

A step: take P prompts, sample G completions of each from the student, let the teacher score their tokens, and update
the student with one advantage per token:

    A_t = log pi_teacher(y_t | x, y_<t) - log pi_student(y_t | x, y_<t) + reward_coef * A_task

Under the student's own samples the mean of -A_t without the task is the reverse KL(student || teacher) of the next
token, so the update descends on that KL, at the places where the student goes. GRPO has one number for a whole
response, and none where a group's rewards are equal; here each token has its own.

Simplified on purpose: only the sampled token is scored, not the vocabulary (an unbiased estimate, with more noise: no
logits of the teacher leave it); a token answers for its own KL alone, not for that of the tokens behind it (a discount
of 0), and as in arXiv 2306.13649 no gradient goes through the sampling. The step, the losses, the minibatches and the
settings are GRPO's (`grpo.py`); `--reward_coef` mixes its advantage in.

    grpo-gsm8k distill --teacher TEACHER --model_id STUDENT --data DIR
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_gsm8k import grpo, preflight
from grpo_gsm8k.config import DistillConfig, at_service
from grpo_gsm8k.datatypes import Datum, Prompt
from grpo_gsm8k.engines import teacher as engine_teacher
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.evals.diversity import diversity
from grpo_gsm8k.rollout import RolloutSource, StepTimer, rollout_metrics, sample_row
from grpo_gsm8k.runs import diagnosis
from grpo_gsm8k.tasks.base import load_split
from grpo_gsm8k.tasks.render import task_of
from grpo_gsm8k.tasks.rewards import Grader, make_reward
from grpo_gsm8k.trainer import loop
from grpo_gsm8k.trainer.data import Values
from grpo_gsm8k.trainer.estimate import estimate
from grpo_gsm8k.trainer.policy import pick_device
from grpo_gsm8k.trainer.teacher import CachedTeacher, Teacher, check_same_teacher, check_tokenizer, load_teacher
from grpo_gsm8k.workbench import Workbench, open_workbench

MIB = 1 << 20


def train(
    cfg: DistillConfig, bench: Workbench, prompts: Sequence[Prompt], grader: Grader, teacher: CachedTeacher
) -> None:
    """The algorithm. Everything that it needs is handed in, so a test can hand it toys."""
    check(cfg)
    with closing(RolloutSource(cfg, bench, prompts, grader)) as source:
        state = DistillState(source, teacher)
        for step in loop.steps(bench.run, bench.learner, cfg.steps, state):
            timer = StepTimer(bench.sampler)
            sampled, metrics = source.take(step)
            timer.restart()  # the source has timed itself
            groups = grpo.with_advantages(cfg, sampled) if cfg.reward_coef else sampled
            rows = [row for group in groups for rollout in group if (row := grpo.datum(cfg, rollout))]
            timer.lap("build_data")
            scores, cached = teacher.logprobs(rows, cfg.temperature)
            metrics |= cached | teacher_metrics(rows, scores)
            timer.lap("teacher")
            metrics |= rollout_metrics(groups) | grpo.update(cfg, bench, taught(rows, scores, cfg.reward_coef), step)
            timer.lap("training")
            bench.keep_rollouts(step, groups)
            timer.lap("keep_rollouts")
            if bench.due(step, cfg.steps):
                source.settle()
                bench.run.samples(step, (sample_row(bench, r, k) for k, group in enumerate(groups) for r in group))
                metrics |= diversity([[r.trajectory.token_ids for r in group] for group in groups])
            bench.validate(step, cfg.steps, metrics)
            timer.lap("eval")
            metrics |= {"progress/distill_step": step, "progress/done_frac": step / cfg.steps}
            bench.run.log(step, metrics | timer.metrics(metrics["time/wait"]))
            state.said = diagnosis.announce(bench.run.history(), vars(cfg), state.said)
            state.note = f"reverse KL {metrics.get('distill/reverse_kl', 0.0):.3f}, reward {metrics['reward/mean']:.3f}"


class DistillState(grpo.GrpoState):
    """GRPO's state, and which teacher the run began with."""

    def __init__(self, source: RolloutSource, teacher: CachedTeacher) -> None:
        super().__init__(source)
        self.teacher = teacher

    def as_json(self) -> dict[str, Any]:
        """As JSON, for a checkpoint."""
        return {**super().as_json(), "teacher": self.teacher.sha256}

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Restore what `as_json` returned. Raises `CheckpointError` if the teacher is another."""
        check_same_teacher(stored["teacher"], self.teacher.sha256, self.source.bench.run.path)
        super().restore(stored)


def check(cfg: DistillConfig) -> None:
    """Refuse settings that contradict each other. Raises `ConfigError`."""
    if not cfg.teacher:
        raise ConfigError("distill needs a teacher: pass --teacher, a model folder or a name on the hub")
    if at_service(cfg.teacher):
        raise ConfigError(f"--teacher {cfg.teacher}: is at a training service; distill takes a model folder, or a name")
    if cfg.resample_zero_variance:
        raise ConfigError("resample_zero_variance: groups of equal rewards learn from the teacher; leave it at 0")
    if cfg.curriculum_unbiased:
        raise ConfigError("curriculum_unbiased: weighs the task's advantages, and not a teacher's; leave it out")
    if cfg.teacher_engine == "vllm":
        engine_teacher.check(cfg)
    # Without the task's reward nothing is relative to a group.
    grpo.check(cfg if cfg.reward_coef else replace(cfg, advantage="group_relative", baseline="none", std_norm=False))


def taught(rows: Sequence[Datum], scores: Values, reward_coef: float = 0.0) -> list[Datum]:
    """The rows with the advantage of each token: see the module's docstring. `scores` are the teacher's."""
    found = []
    for row, theirs in zip(rows, scores, strict=True):
        per_token = zip(row.mask, row.advantages, theirs, row.logprobs, strict=True)
        advantages = tuple((reward_coef * task + t - s) if m else 0.0 for m, task, t, s in per_token)
        found.append(replace(row, advantages=advantages))
    return found


def teacher_metrics(rows: Sequence[Datum], scores: Values) -> dict[str, float]:
    """How far the student is from its teacher, on its own samples.

    `distill/reverse_kl` is the mean over tokens of log pi_student - log pi_teacher, `distill/response_kl` that of its
    sum over a response: estimates of KL(student || teacher), and single samples may be negative.
    `distill/surprise_max` is the largest single difference, `distill/teacher_logp` the teacher's mean.
    """
    if not rows:  # every completion was truncated, and `--mask_truncated` leaves them out
        return {}
    gaps = [
        [s - t for m, t, s in zip(row.mask, theirs, row.logprobs, strict=True) if m]
        for row, theirs in zip(rows, scores, strict=True)
    ]
    tokens = [gap for row in gaps for gap in row]
    return {
        "distill/reverse_kl": statistics.fmean(tokens),
        "distill/response_kl": statistics.fmean(map(sum, gaps)),
        "distill/surprise_max": max(tokens),
        "distill/teacher_logp": sum(map(sum, scores)) / len(tokens),
    }


# ------------------------------------------------------------------------------------------------ the command


def run(cfg: DistillConfig) -> dict[str, Any]:
    """The stage as a command: load student and teacher, train, and return the result."""
    check(cfg)
    if cfg.estimate:
        return estimate(cfg, cfg.estimate)
    check_tokenizer(cfg)  # before the student is loaded
    source, task = Path(cfg.data) / "train.jsonl", task_of(cfg)
    examples, reward = load_split(task, cfg.data, "train"), make_reward(cfg.reward)
    buffer = round(cfg.overlong_buffer * cfg.max_new_tokens)
    with open_workbench(cfg, "distill", {"train": source}, overlaps=cfg.mode == "one_step_off") as bench:
        prompts = bench.prompts(examples, source)
        longest = max(len(prompt.token_ids) for prompt in prompts) + cfg.max_new_tokens
        grader = Grader(bench.renderer.task, reward, (cfg.max_new_tokens, buffer) if buffer else None)
        with open_teacher(cfg, bench, prompts, min(longest, bench.context)) as teacher:
            cached = CachedTeacher(teacher, bench.run.path / "teacher", cfg.teacher_cache_mb * MIB)
            train(cfg, bench, prompts, grader, cached)
        return bench.finish()


@contextmanager
def open_teacher(cfg: DistillConfig, bench: Workbench, prompts: Sequence[Prompt], longest: int) -> Iterator[Teacher]:
    """The teacher, in this process or in vLLM; what it says was held against its model's logits."""
    frozen = load_teacher(cfg, longest)
    if cfg.teacher_engine == "hf":
        preflight.check_teacher(frozen, frozen.model, bench.renderer, prompts)
        yield frozen
        return
    log = bench.run.path / "teacher.log"
    with engine_teacher.opened(cfg, frozen, bench.renderer, str(pick_device(cfg.device)), log) as teacher:
        preflight.check_teacher(teacher, frozen.model, bench.renderer, prompts)
        del frozen
        yield teacher


if __name__ == "__main__":
    from grpo_gsm8k.cli import run_command

    run_command("distill")
