"""Builds what a training stage needs from its config: run directory, learner, sampler, renderer, validation data.

The stages' `train` functions take them as one `Workbench`, so a test can pass toys.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo_gsm8k import preflight, repro
from grpo_gsm8k.config import ENGINES, EngineConfig, EvalConfig, GrpoConfig, ModelConfig, TrainConfig
from grpo_gsm8k.datatypes import Evaluator, Example, Learner, Prompt, Rollout, Sampler, SamplingParams, WeightsRef
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.engines.probe import TOLERANCE, probe
from grpo_gsm8k.engines.process import C, Engine, ProcessSampler, placements, settle, trained_on
from grpo_gsm8k.engines.remote import RemoteSampler
from grpo_gsm8k.engines.service import Checkpoint, Service, connected
from grpo_gsm8k.engines.users import UserSampler
from grpo_gsm8k.errors import ConfigError, EngineError, PluginError, RunDirError, ServiceError
from grpo_gsm8k.evals.accuracy import CHUNK, Evaluation, evaluate
from grpo_gsm8k.evals.evaluator import AsyncEvaluator, InlineEvaluator
from grpo_gsm8k.plugins import calling, is_users, load_object
from grpo_gsm8k.preflight import Subject, check_ids, embeddings_of
from grpo_gsm8k.runs.directory import Run, continued, open_run
from grpo_gsm8k.runs.files import atomic_folder
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.tasks import contamination
from grpo_gsm8k.tasks.base import Task, load_examples, load_split
from grpo_gsm8k.tasks.render import Renderer, check_lengths, date_of, task_of
from grpo_gsm8k.trainer import adapter, checkpoint, loop, ranks
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.memory import engine_share
from grpo_gsm8k.trainer.policy import (
    context_length,
    device_name,
    dtype_name,
    load_model,
    load_tokenizer,
    pick_device,
    prepare_to_save,
    weights_sha256,
)
from grpo_gsm8k.trainer.pretrained import generation_ends
from grpo_gsm8k.trainer.ranks import Lead, world
from grpo_gsm8k.trainer.remote import RemoteLearner

UNKNOWN_CONTEXT = 1 << 20  # tokens, where a service does not say: it refuses a longer row itself
ENGINE_CHUNK = 1024  # prompts at once: an engine schedules them itself, and each chunk ends with a slow tail


@dataclass
class Workbench:
    """The tools of one training run.

    Attributes:
        run: its directory.
        learner, sampler: `sync` hands the weights from one to the other. SFT with an asynchronous evaluator has no
            sampler.
        renderer: the task bound to the tokenizer.
        val: the validation prompts.
        context: the model's context in tokens.
        embeddings: the number of ids that the model has an embedding for.
        evaluator: runs the validations; by default the sampler does, while training waits.
    """

    run: Run
    learner: Learner
    sampler: Sampler
    renderer: Renderer
    val: list[Prompt]
    context: int
    embeddings: int
    evaluator: Evaluator | None = None
    _held: WeightsRef | None = None

    def sync(self, version: int) -> dict[str, float]:
        """Hand the learner's weights to the sampler, and probe a sampler in another process for them.

        Does nothing if the sampler already holds them, as it does in the step after a validation.
        """
        return self._handed_over(version)[1]

    def _handed_over(self, version: int) -> tuple[WeightsRef, dict[str, float]]:
        cfg, apart = self.run.cfg, isinstance(self.sampler, ProcessSampler)
        ref = self.learner.publish(version) if self._hashes else WeightsRef(version)
        if ref.same_as(self._held):
            return ref, {}
        self.sampler.load(ref, self.learner.weights)
        self._held = ref
        if not apart or not cfg.probe_prompts:
            return ref, {}
        tolerance = cfg.probe_tolerance or TOLERANCE[dtype_name(self.learner.weights())]
        prompts = self.val[: cfg.probe_prompts]
        return ref, probe(self.sampler, self.learner, prompts, version, tolerance)

    def keep_rollouts(self, step: int, groups: Sequence[Sequence[Rollout]]) -> None:
        """Keep what this step trained on, with the hash of its weights before and after.

        The hash costs nothing more where the next hand-over to the sampler needs it, too.
        """
        if self._hashes:
            self.run.weights[step] = self.learner.publish(step).sha256
        self.run.keep_rollouts(step, groups)

    @property
    def _hashes(self) -> bool:
        """Whether a hand-over to the sampler hashes the weights. Those that never leave a GPU are not."""
        return not isinstance(self.sampler, ProcessSampler) or self.sampler.proves_by_file

    def validate(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """Submit this step's weights if a validation is due, and log the results that have arrived.

        If the validation fails, the step is still complete: its metrics are logged and its update can be saved.

        Args:
            metrics: of this step; an inline validation adds its own.
        """
        if self.evaluator is None:
            self.evaluator = inline_evaluator(self)
        try:
            if self.due(step, total):
                self.evaluator.submit(step, self.learner.weights())
            metrics |= self._keep(self.evaluator.results(), step) | self.evaluator.metrics()
        except (EngineError, PluginError):
            self.run.log(step, metrics)
            self.run.complete = step
            raise

    def due(self, step: int, total: int) -> bool:
        """Whether this step ends with a validation: every `eval_every` steps, and after the last one."""
        every = self.run.cfg.eval_every
        return bool(every) and (step % every == 0 or step == total)

    def finish(self) -> dict[str, Any]:
        """Wait for pending evaluations, then write and return the run's result."""
        if self.evaluator:
            self._keep(self.evaluator.drain(), -1)
        return loop.finish(self.run, self.learner)

    def _keep(self, found: Sequence[tuple[int, Evaluation]], now: int) -> dict[str, float]:
        """Log each evaluation under its own step; return the metrics of the step `now`."""
        metrics: dict[str, float] = {}
        logged = self.run.metric_history("val/n") if any(step != now for step, _ in found) else {}
        for step, evaluation in found:
            self.run.samples(step, evaluation.rows, folder="evals")
            if step == now:
                metrics |= evaluation.metrics()
            elif step not in logged:
                self.run.log(step, evaluation.metrics())
            if self.evaluator:
                self.evaluator.settle(step)
        return metrics

    def prompts(self, examples: Sequence[Example], source: Path | str) -> list[Prompt]:
        """Render examples. Raises a `UserError` for a prompt that does not fit into the context."""
        prompts = [self.renderer.prompt(example) for example in examples]
        check_lengths(prompts, self.context, str(source))
        check_ids(prompts, self.embeddings, source)
        return prompts


@contextmanager
def open_workbench(
    cfg: TrainConfig, stage: str, inputs: Mapping[str, Path], overlaps: bool = False
) -> Iterator[Workbench]:
    """Open the run directory and build the workbench. Cheap checks come before the model is loaded.

    Only rank 0 gets a workbench: the other ranks follow its learner, and exit when it is done.

    Args:
        inputs: name → file that the stage reads, besides the evaluation set.
        overlaps: sampler and learner work at the same time, so on one GPU neither can free memory for the other.
    """
    cfg = settled(cfg, stage)
    if cfg.learner == "tinker" and world().size > 1:
        raise ConfigError("--learner tinker trains at a service: start it in one process, without torchrun")
    if world().rank:
        ranks.follow(make_learner(cfg, load_seeded(cfg), None))
        raise SystemExit(0)
    warn_of_unread(cfg)
    eval_path = Path(cfg.eval_set_path or Path(cfg.data) / "val.jsonl")
    task = task_of(cfg)
    examples = load_examples(task, eval_path) if cfg.eval_set_path else load_split(task, cfg.data, "val")
    evaluates_apart(cfg, stage)  # refuses here
    if cfg.uses_vllm:
        placements(cfg, gpus=torch.cuda.device_count())
    with open_run(cfg, stage, {**inputs, "eval_set": eval_path}) as run, ExitStack() as open_until_the_end:
        task.folder = run.path
        contamination.warn(inputs.values(), Path(cfg.data) / "test.jsonl", task)
        # Before the model is loaded, so that a broken template fails at once.
        renderer = Renderer(load_tokenizer(cfg), task, date=date_of(cfg))
        renderer.check(examples[0])
        val = validated(examples, cfg), eval_path
        if cfg.learner == "tinker":
            bench = open_until_the_end.enter_context(_bench_at_service(run, renderer, *val))
        else:
            bench = open_until_the_end.enter_context(_bench_here(run, renderer, *val, overlaps))
        learner = bench.learner
        try:
            yield bench
        except (EngineError, PluginError):
            _rescue(run, learner)
            raise
        except KeyboardInterrupt:
            loop.rescue_interrupted(run, learner)
            raise


def _rescue(run: Run, learner: Learner) -> None:
    """Keep the last complete step, where that can be, and say how to go on. The error on its way out is the reason."""
    try:
        saved = loop.rescue(run, learner)
    except ServiceError as second:
        say(f"{run.stage}: the last complete step could not be saved: {second}")
        saved = max(checkpoint.steps_present(run.checkpoints), default=0)
    if saved:
        say(f"{run.stage}: step {saved} is saved in {run.path}; continue with --resume")


@contextmanager
def _bench_here(
    run: Run, renderer: Renderer, examples: Sequence[Example], eval_path: Path, overlaps: bool
) -> Iterator[Workbench]:
    """A bench with a model that this machine trains."""
    cfg, stage = run.cfg, run.stage
    apart = evaluates_apart(cfg, stage)
    with ExitStack() as open_until_the_end:
        model = load_seeded(cfg)
        prepare_to_save(model, end_ids(renderer))
        learner: Learner = make_learner(cfg, model, renderer)
        if world().size > 1:
            learner = open_until_the_end.enter_context(closing(Lead(learner)))
        bench = Workbench(run, learner, NoSampler(), renderer, [], context_length(model), embeddings_of(model))
        bench.val = bench.prompts(examples, eval_path)
        subject = Subject(model, renderer, bench.val, learner, None, run.path, getattr(learner, "packs", False))
        preflight.run_checks(subject)  # before an engine is started, which takes a minute
        if not (apart and stage == "sft"):
            bench.sampler = open_until_the_end.enter_context(open_sampler(cfg, model, renderer, run.path, overlaps))
            preflight.run_checks(dataclasses.replace(subject, sampler=bench.sampler))
        if apart:
            bench.evaluator = async_evaluator(bench, model, stage)
            open_until_the_end.callback(bench.evaluator.close)
        yield bench


@contextmanager
def _bench_at_service(
    run: Run, renderer: Renderer, examples: Sequence[Example], eval_path: Path
) -> Iterator[Workbench]:
    """A bench with a model that a training service trains and samples from."""
    with connected(run.cfg) as (service, start):
        learner = RemoteLearner(service, start, renderer, run.cfg)
        sampler = _remote_sampler(run.cfg, renderer, service, start)
        bench = Workbench(run, learner, sampler, renderer, [], sampler.context, len(renderer.tokenizer))
        bench.val = bench.prompts(examples, eval_path)
        if not checkpoint.steps_present(run.checkpoints):  # a run that goes on has been through it
            preflight.check_service(renderer, bench.val, learner, sampler)
        yield bench


def _remote_sampler(cfg: EngineConfig, renderer: Renderer, service: Service, model: Checkpoint) -> RemoteSampler:
    context = service.base_model(model.base_model).context or UNKNOWN_CONTEXT
    where = model.sampler or model.base_model
    return RemoteSampler(service, renderer, where, context, generation_ends(cfg))


def settled(cfg: C, stage: str = "") -> C:
    """`cfg` with the engine that `auto` means: that of the run which is continued, else this machine's."""
    before = continued(cfg, stage) if isinstance(cfg, TrainConfig) else {}
    if cfg.engine == "auto" and "engine" in before:
        return dataclasses.replace(cfg, engine=before["engine"])
    return settle(cfg, str(pick_device(cfg.device)), torch.cuda.device_count(), world().local_size)


def validated(examples: Sequence[Example], cfg: TrainConfig) -> list[Example]:
    """What every validation of a run asks: the first examples, or some drawn by its seed, in the order of the file."""
    n = cfg.eval_examples or len(examples)
    if cfg.eval_draw == "first":
        return list(examples[:n])
    drawn = repro.shuffled(len(examples), repro.derive_seed(cfg.seed, "validation"))[:n]
    return [examples[i] for i in sorted(drawn)]


def warn_of_unread(cfg: EngineConfig) -> None:
    """Name the settings that are vLLM's alone and were given to another engine."""
    if cfg.unread:
        say(f"{', '.join(cfg.unread)}: only vLLM reads this, and --engine is {cfg.engine}")


def evaluates_apart(cfg: TrainConfig, stage: str) -> bool:
    """Whether another process evaluates during training. On the learner's own GPU it cannot: they take turns.

    Raises:
        ConfigError: `--eval_mode async` names the learner's GPU.
    """
    if not cfg.uses_vllm or cfg.eval_mode == "inline" or (cfg.eval_mode == "auto" and stage != "sft"):
        return cfg.eval_mode == "async"
    learner = str(pick_device(cfg.device))
    learner = "cuda:0" if learner == "cuda" else learner
    wanted = dataclasses.replace(cfg, vllm_device=cfg.eval_device or cfg.vllm_device, vllm_devices="")
    row = placements(wanted, learner, torch.cuda.device_count(), world().local_size)[0]
    if (trained_on(learner, world().local_size) - {"cpu"}).isdisjoint(row):
        return True
    if cfg.eval_mode == "async":
        raise ConfigError(
            f"--eval_mode async on {row[0]}, which is trained on: pass another --eval_device, or leave it"
        )
    return False


def load_seeded(cfg: TrainConfig) -> Any:
    """The model to train, with every generator and kernel set as the config says."""
    repro.seed_everything(cfg.seed, cfg.deterministic)
    model = load_model(cfg)
    adapter.attach(model, cfg)
    return model


def make_learner(cfg: TrainConfig, model: Any, tokenizer: Any) -> TorchLearner:
    """The learner of this process: alone, or as one of several ranks."""
    held = isinstance(cfg, GrpoConfig) and cfg.kl_coef > 0  # before a resume loads later weights into the model
    if world().size == 1:
        return TorchLearner(model, tokenizer, cfg, reference=held)
    from grpo_gsm8k.trainer.sharded import ShardedLearner

    return ShardedLearner(model, tokenizer, cfg, reference=held)


def end_ids(renderer: Renderer) -> list[int]:
    """The ids that end a completion, with the end of turn first."""
    return sorted(renderer.stop_ids, key=lambda i: (i != renderer.end_id, i))


class NoSampler:
    """The sampler of a stage that never samples."""

    busy_s = 0.0

    def sample(self, requests: Any, params: SamplingParams) -> Any:
        """Is never called."""
        raise AssertionError("this stage has no sampler")

    def load(self, ref: WeightsRef, tensors: Any = None) -> None:
        """Is never called."""
        raise AssertionError("this stage has no sampler")


@contextmanager
def open_sampler(
    cfg: EngineConfig, model: Any, renderer: Renderer, folder: Path, overlaps: bool = False
) -> Iterator[Sampler]:
    """Open the configured sampler: a copy of the model in this process, or vLLM engines in their own processes.

    Args:
        model: the engines take over its dtype, and keep off its device where they can.
        folder: takes the engines' log, and weights that do not fit into shared memory.
        overlaps: see `open_workbench`.
    """
    here = world()
    assert cfg.engine != "auto", "whoever opens a sampler has settled the engine"
    if is_users(cfg.engine):
        make = load_object(cfg.engine, "engine", ENGINES)
        with calling(f"engine {cfg.engine!r}"):
            own = make(model, renderer, cfg)
        yield UserSampler(cfg.engine, own)
        return
    if not cfg.uses_vllm:
        yield HFSampler(model, renderer, cfg.sample_rows, copy_model=here.size == 1)  # several ranks train a copy
        return
    learner, log = device_name(model), folder / "engine.log"
    rows = placements(cfg, learner, torch.cuda.device_count(), here.local_size)
    cfg = dataclasses.replace(cfg, dtype=dtype_name(model.named_parameters()))
    trained = trained_on(learner, here.local_size) - {"cpu"}
    beside = [not trained.isdisjoint(row) for row in rows]  # engines that share a GPU with the learner
    if any(beside) and not cfg.gpu_mem_util and isinstance(cfg, TrainConfig):
        cfg = dataclasses.replace(cfg, gpu_mem_util=engine_share(cfg, model, overlaps))
    engines = [
        Engine(cfg, renderer, row, log=log, sleep_when_idle=mine and not overlaps)
        for row, mine in zip(rows, beside, strict=True)
    ]
    connect = None
    if cfg.weight_transfer != "file":
        if adapter.has_adapter(model):
            raise ConfigError("a LoRA adapter is handed to vLLM as a file: leave --weight_transfer at file")
        if len(engines) > 1 or learner == "cpu" or here.size > 1:
            raise ConfigError("--weight_transfer nccl and ipc go from one GPU to one engine; several take files")
        if (cfg.weight_transfer == "ipc") != beside[0]:
            raise ConfigError(
                f"--weight_transfer {cfg.weight_transfer} with the learner on {learner} and vLLM on {rows[0][0]}: take "
                + (
                    "nccl or file, ipc is for one GPU"
                    if cfg.weight_transfer == "ipc"
                    else "ipc or file, nccl is for two"
                )
            )
        from grpo_gsm8k.engines.vllm import NativeTransfer

        kind, workers = cfg.weight_transfer, cfg.tp_size

        def connect(engine: Engine) -> Callable[[], None]:
            with torch.cuda.device(learner):
                transfer = NativeTransfer(kind, model, workers, lambda op, **fields: engine.ask(op, dict, **fields))

            def send() -> None:
                with torch.cuda.device(learner):
                    transfer.send()

            return send

    sampler = ProcessSampler(engines, folder / "handover", connect)
    try:
        yield sampler
    finally:
        sampler.close()


def async_evaluator(bench: Workbench, model: Any, stage: str) -> AsyncEvaluator:
    """An evaluator in its own process, for the validation prompts."""
    cfg = bench.run.cfg
    device = cfg.eval_device
    if cfg.uses_vllm:
        if stage != "sft" and not device:
            raise ConfigError("--eval_mode async beside a vLLM sampler needs its own device: pass --eval_device")
        wanted = dataclasses.replace(cfg, vllm_device=device or cfg.vllm_device, vllm_devices="")
        row = placements(wanted, device_name(model), torch.cuda.device_count(), world().local_size)[0]
    else:
        row = [device or "cpu"]
    engine = Engine(
        dataclasses.replace(cfg, dtype=dtype_name(model.named_parameters())),
        bench.renderer,
        row,
        log=bench.run.path / "evaluator.log",
        module="grpo_gsm8k.evals.worker",
        prompts=prompt_rows(bench.val),
        params=vars(validation_params(bench)),
        context=bench.context,
    )
    return AsyncEvaluator(engine, bench.run.path / "evals" / "pending", cfg.eval_backlog)


def prompt_rows(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Prompts as JSON rows for the evaluating process."""
    text = ("id", "messages", "answer", "meta")
    return [
        {"example": {key: getattr(p.example, key) for key in text}, "token_ids": p.token_ids, "opened": p.opened}
        for p in prompts
    ]


def inline_evaluator(bench: Workbench) -> InlineEvaluator:
    """An evaluator that uses the workbench's own sampler."""

    def sync(step: int) -> WeightsRef:
        return bench._handed_over(step)[0]

    params = validation_params(bench)
    return InlineEvaluator(sync, bench.sampler, bench.val, params, bench.renderer, bench.context)


def validation_params(bench: Workbench) -> SamplingParams:
    """Greedy decoding, one completion per example."""
    cfg = bench.run.cfg
    return SamplingParams(cfg.max_new_tokens, temperature=0.0, stop=bench.renderer.stop)


@dataclass(frozen=True)
class EvalJob:
    """A set to evaluate: its task and examples, the file that errors name, a title for the bar, worked examples."""

    task: Task
    examples: Sequence[Example]
    source: str
    title: str = "eval"
    shots: Sequence[Example] = ()


def evaluate_model(
    cfg: EvalConfig, jobs: Sequence[EvalJob], params: SamplingParams, *, samples: int = 1, seeds: Sequence[int] = ()
) -> Generator[Evaluation, None, None]:
    """Load a model, evaluate it on each set (with each of `seeds`), let it go. Every prompt is checked at the start."""
    how: dict[str, Any] = {"samples": samples, "seeds": seeds}
    warn_of_unread(cfg)
    if cfg.engine == "tinker":
        yield from _evaluate_at_service(cfg, jobs, params, how)
        return
    repro.set_deterministic(cfg.deterministic)
    # An engine gets the weights from a copy on the CPU, as in training, so their hash names what was evaluated.
    if cfg.uses_vllm:
        gpu = placements(cfg, gpus=torch.cuda.device_count())[0][0] != "cpu"
        cfg = dataclasses.replace(cfg, device="cpu", dtype="bfloat16" if cfg.dtype == "auto" and gpu else cfg.dtype)
    tokenizer = load_tokenizer(cfg)
    renderers = [Renderer(tokenizer, job.task, job.shots, date_of(cfg)) for job in jobs]
    prompts = [[renderer.prompt(e) for e in job.examples] for renderer, job in zip(renderers, jobs, strict=True)]
    model = load_model(cfg)
    context = context_length(model)
    for own, job in zip(prompts, jobs, strict=True):
        check_lengths(own, context, job.source)
        check_ids(own, embeddings_of(model), job.source)
    ref = WeightsRef(0, weights_sha256(adapter.own_weights(model)))
    with open_sampler(cfg, model, renderers[0], Path(cfg.out_dir)) as sampler:
        sampler.load(ref, functools.partial(adapter.own_weights, model))
        preflight.run_checks(Subject(model, renderers[0], prompts[0], sampler=sampler))
        del model
        how |= {"context": context, "chunk_size": ENGINE_CHUNK if cfg.uses_vllm else CHUNK}
        yield from _evaluations(sampler, jobs, renderers, prompts, params, ref.sha256, how)


def _evaluations(
    sampler: Sampler,
    jobs: Sequence[EvalJob],
    renderers: Sequence[Renderer],
    prompts: Sequence[Sequence[Prompt]],
    params: SamplingParams,
    sha256: str,
    how: Mapping[str, Any],
) -> Iterator[Evaluation]:
    for job, renderer, own in zip(jobs, renderers, prompts, strict=True):
        stopped = dataclasses.replace(params, stop=renderer.stop)
        yield evaluate(sampler, own, stopped, renderer, sha256, title=job.title, **how)


def _evaluate_at_service(
    cfg: EvalConfig, jobs: Sequence[EvalJob], params: SamplingParams, how: Mapping[str, Any]
) -> Iterator[Evaluation]:
    """Evaluate a model that a training service holds; the records carry what `Checkpoint` calls its weights' hash."""
    tokenizer = load_tokenizer(cfg)
    renderers = [Renderer(tokenizer, job.task, job.shots, date_of(cfg)) for job in jobs]
    prompts = [[renderer.prompt(e) for e in job.examples] for renderer, job in zip(renderers, jobs, strict=True)]
    with connected(cfg) as (service, model):
        sampler = _remote_sampler(cfg, renderers[0], service, model)
        for own, job in zip(prompts, jobs, strict=True):
            check_lengths(own, sampler.context, job.source)
            check_ids(own, len(tokenizer), job.source)
        more = {**how, "context": sampler.context, "chunk_size": ENGINE_CHUNK}
        yield from _evaluations(sampler, jobs, renderers, prompts, params, model.identity(), more)


def merge(cfg: ModelConfig, out: Path) -> dict[str, Any]:
    """Merge a LoRA adapter into its base model, in `out`; returns its `model` and `weights_sha256`.

    Raises:
        ConfigError: `cfg.model_id` is not an adapter.
        RunDirError: `out` exists.
    """
    if out.exists():
        raise RunDirError(f"{out}: exists already; pick another --out_dir")
    model, renderer = adapter.merged(cfg), Renderer.of(cfg, load_tokenizer(cfg))
    prepare_to_save(model, end_ids(renderer))
    with atomic_folder(out) as unfinished:
        model.save_pretrained(unfinished)
        renderer.save_pretrained(unfinished)
    return {"model": str(out), "weights_sha256": weights_sha256(model.named_parameters())}
