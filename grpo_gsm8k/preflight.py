"""Pre-flight checks: a run tries once, in a second or two, everything that it will rely on.

    for check in checks(subject):
        check.run()                 # returns what it found, or raises a UserError in one line

Loading has already checked that every weight came from its file and is finite (`trainer/pretrained.py`). Then:

    ids          prompts, end ids and padding are within the embeddings
    template     the chat template renders what the renderer expects
    trainer      its log-probabilities, padded and packed, with the adapter, match `model(...).logits`
    sampler      it answers two prompts, with log-probabilities that match `model(...).logits`
    checkpoint   it is written into the run directory, read back bit for bit, and deleted

The checks change no weight and no random generator. A check that passed is not repeated in this process for the same
model and configuration; the ids are checked each time.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from grpo_gsm8k.config import ModelConfig, TrainConfig
from grpo_gsm8k.datatypes import Datum, Example, Learner, Prompt, Sampler, SamplingParams
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.engines.probe import TOLERANCE, completed, logprob_differences, probe
from grpo_gsm8k.errors import CheckpointError, ConfigError, DataError, DiskError, ModelError, UserError
from grpo_gsm8k.repro import requests
from grpo_gsm8k.runs.files import disk_errors
from grpo_gsm8k.tasks.render import Renderer
from grpo_gsm8k.trainer import adapter
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.logprobs import frozen_logprobs, own_logprobs
from grpo_gsm8k.trainer.policy import dtype_name, load_model, load_tokenizer, prepare_to_save, weights_sha256
from grpo_gsm8k.trainer.ranks import world
from grpo_gsm8k.trainer.teacher import Teacher

LIMIT = {"float32": 1e-4, "bfloat16": TOLERANCE["bfloat16"]}  # mean difference that another order of sums can cause
SAMPLED = SamplingParams(max_new_tokens=8, temperature=1.0)
ROW = 24  # tokens of each compared row
SMALL = 50_000_000  # weights: of a larger model the check writes config and tokenizer only

ASKED = (
    Example("1", "Ann has 3 apples and buys 4 more. How many has she now?", "7", {"solution": "3 + 4 = 7\n#### 7"}),
    Example("2", "What is 9 + 8?", "17", {"solution": "9 + 8 = 17\n#### 17"}),
)
"""The prompts of `doctor --model_id`, which has no data."""

_passed: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Check:
    """One check: `run` returns what it found, or raises a `UserError`."""

    name: str
    run: Callable[[], str]


@dataclass(frozen=True)
class Subject:
    """What the checks look at.

    Attributes:
        prompts: some of the prompts that will be sampled; all of their ids are checked.
        learner, sampler: None where there is none. A sampler in another process is probed at each hand-over instead.
        folder: where the checkpoint check writes; None skips it.
        packs: whether the trainer packs rows.
    """

    model: Any
    renderer: Renderer
    prompts: Sequence[Prompt]
    learner: Learner | None = None
    sampler: Any = None
    folder: Path | None = None
    packs: bool = False


def run_checks(subject: Subject) -> None:
    """Run all checks. Raises the `UserError` of the first that fails."""
    known = _fingerprint(subject)
    with _generators_restored(subject.model):
        for check in checks(subject):
            if check.name == "ids" or (known, check.name) not in _passed:
                check.run()
                _passed.add((known, check.name))


def checks(subject: Subject) -> list[Check]:
    """The checks that apply, in order: later ones rely on earlier ones."""
    found = [Check("ids", lambda: _ids(subject))]
    example = subject.prompts[0].example if subject.prompts else None
    found.append(Check("template", lambda: subject.renderer.check(example)))
    if subject.learner is not None:
        found.append(Check("trainer", lambda: _trainer(subject)))
    if isinstance(subject.sampler, HFSampler):
        found.append(Check("sampler", lambda: _sampler(subject, subject.sampler)))
    if subject.learner is not None and (folder := subject.folder) is not None:
        found.append(Check("checkpoint", lambda: _checkpoint(subject, subject.learner, folder)))
    return found


def check_service(renderer: Renderer, prompts: Sequence[Prompt], learner: Learner, sampler: Sampler) -> None:
    """What can be tried of a model at a training service: a few samples, whose log-probabilities its trainer repeats.

    That holds the service's sampler to its trainer, and this tokenizer's ids to the model's. Raises `EngineError`.
    """
    renderer.check(prompts[0].example if prompts else None)
    ref = learner.publish(0)
    sampler.load(ref)
    probe(sampler, learner, prompts[:2], ref.version, TOLERANCE["bfloat16"])


def check_teacher(teacher: Teacher, model: Any, renderer: Renderer, prompts: Sequence[Prompt]) -> None:
    """Raise `ModelError` unless a teacher's scores are the log-probabilities of its model's own logits."""
    rows = _rows(prompts)
    data = [replace(row, logprobs=own) for row, own in zip(rows, own_logprobs(model, rows), strict=True)]
    _near(data, teacher.logprobs(data), Subject(model, renderer, prompts), "the teacher's")


def check_model(cfg: ModelConfig, folder: Path) -> Iterator[tuple[str, bool, str]]:
    """The pre-flight of a model alone, as (name, passed, what was found), up to the first that fails: `doctor`."""
    train = TrainConfig(**{**vars(cfg), "packing": "auto"})
    try:
        model = load_model(train)
        if held := adapter.in_folder(cfg.model_id):
            train = replace(train, lora_rank=held.r, lora_alpha=held.lora_alpha)
        yield "model: weights", True, f"{sum(p.numel() for p in model.parameters()):,}, each from its file"
        renderer = Renderer.of(train, load_tokenizer(train))
        yield "model: tokenizer", True, f"{len(renderer.tokenizer)} tokens, style {renderer.task.options.prompt_style}"
        prepare_to_save(model, sorted(renderer.stop_ids))
        adapter.attach(model, train)
        learner = TorchLearner(model, renderer, train)
        sampler = HFSampler(model, renderer)
        prompts = [renderer.render(example) for example in ASKED]
        subject = Subject(model, renderer, prompts, learner, sampler, folder, learner.packs)
        for check in checks(subject):
            yield f"model: {check.name}", True, check.run()
    except UserError as fault:
        yield "model", False, str(fault)


# ------------------------------------------------------------------------------------------------- the checks


def check_ids(prompts: Sequence[Prompt], embeddings: int, source: Path | str) -> None:
    """Raise `DataError` if a prompt has an id that the model has no embedding for."""
    for prompt in prompts:
        if (largest := max(prompt.token_ids, default=0)) >= embeddings:
            line = prompt.example.source.line if prompt.example.source else None
            what = f"the prompt of {prompt.example.id} has id {largest}, the model has {embeddings} embeddings"
            raise DataError(source, f"{what}; {RESIZE}", line)


def check_rows(rows: Sequence[Datum], embeddings: int, source: Path | str) -> None:
    """Raise `DataError` if a row to train on has an id that the model has no embedding for."""
    for number, row in enumerate(rows, 1):
        if (largest := max(row.token_ids, default=0)) >= embeddings:
            what = f"example {number} has id {largest}, the model has {embeddings} embeddings"
            raise DataError(source, f"{what}; {RESIZE}")


RANKS = "the ranks'"
RESIZE = "tokens were added to the tokenizer and the model was not resized: use the tokenizer that the model came with"


def embeddings_of(model: Any) -> int:
    """How many ids the model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])


def _ids(subject: Subject) -> str:
    embeddings, renderer = embeddings_of(subject.model), subject.renderer
    check_ids(subject.prompts, embeddings, "tokenizer")
    for what, token in [("padding", renderer.pad_id), *(("end of a sequence", i) for i in sorted(renderer.stop_ids))]:
        if token >= embeddings:
            raise ModelError(
                f"tokenizer: the {what} {renderer.spell([token])} has id {token}, the model has {embeddings} "
                f"embeddings; {RESIZE}"
            )
    beyond = len(renderer.tokenizer) - embeddings
    more = f"; the tokenizer has {beyond} tokens beyond them, and texts with one of those are refused"
    return f"within the model's {embeddings} embeddings{more if beyond > 0 else ''}"


def _rows(prompts: Sequence[Prompt]) -> list[Datum]:
    """Short rows of the prompts' ids; the first two share a prefix."""
    first, last = prompts[0].token_ids, prompts[-1].token_ids
    ids = [first[:ROW], (*first[: ROW // 2], *last[-ROW // 3 :]), last[: ROW // 2]]
    return [Datum(row, (0, *(1,) * (len(row) - 1))) for row in ids if len(row) > 1]


def _near(data: Sequence[Datum], logprobs: Sequence[Sequence[float]], subject: Subject, who: str) -> float:
    """The mean difference from `data`'s log-probabilities. Raises `ModelError` if rounding cannot explain it."""
    limit = LIMIT[dtype_name(subject.model.named_parameters())]
    distance = statistics.fmean(logprob_differences(data, logprobs))
    if not distance <= limit:
        raise ModelError(
            f"{type(subject.model).__name__}: {who} log-probabilities differ from the model's own logits by "
            f"{distance:.3g} on average (allowed: {limit:g}); this kind of model is not served exactly here"
        )
    return distance


def _trainer(subject: Subject) -> str:
    rows = _rows(subject.prompts)
    expected = own_logprobs(subject.model, rows)
    data = [replace(row, logprobs=own) for row, own in zip(rows, expected, strict=True)]
    assert subject.learner is not None
    if world().size > 1:  # all ranks take part
        return f"within {_near(data, subject.learner.logprobs(data), subject, RANKS):.1g} of the logits'"
    distance = 0.0
    for packs in {False, subject.packs}:
        who = f"the trainer's ({'packed' if packs else 'padded'} rows)"
        distance = max(distance, _near(data, frozen_logprobs(subject.model, data, packs), subject, who))
    return f"log-probabilities within {distance:.1g} of the logits'{', packed too' if subject.packs else ''}"


def _sampler(subject: Subject, sampler: Sampler) -> str:
    prompts = [subject.prompts[0], subject.prompts[-1]]
    if prompts[0] is prompts[1]:
        prompts = prompts[:1]
    busy = sampler.busy_s if isinstance(sampler, HFSampler) else 0.0
    asked = requests(prompts, 2, 0)
    drawn = sampler.sample(asked, SAMPLED)
    if isinstance(sampler, HFSampler):
        sampler.busy_s = busy
    rows = [completed(one, completion) for one, group in zip(asked, drawn, strict=True) for completion in group]
    distance = _near(rows, own_logprobs(subject.model, rows), subject, "the sampler's")
    return f"log-probabilities within {distance:.1g} of the logits'"


def _checkpoint(subject: Subject, learner: Any, folder: Path) -> str:
    """Write a checkpoint (of a large model: config and tokenizer), read it back, and delete it."""
    trial, model = folder / ".preflight", subject.model
    whole = sum(p.numel() for _, p in adapter.own_weights(model)) <= SMALL
    with disk_errors(trial):
        shutil.rmtree(trial, ignore_errors=True)
        try:
            trial.mkdir(parents=True)
            if whole:
                before = weights_sha256(learner.weights())
                learner.save(trial)
                learner.load(trial)
                if weights_sha256(learner.weights()) != before:
                    raise CheckpointError("a checkpoint does not read back as it was written: its weights differ")
            else:
                model.config.save_pretrained(trial)
                if model.generation_config is not None:
                    model.generation_config.save_pretrained(trial)
                subject.renderer.save_pretrained(trial)
            load_tokenizer(replace(ModelConfig(), model_id=str(trial)))
        except SafetensorError as fault:  # safetensors wraps the operating system's error
            raise DiskError(f"{folder}: no checkpoint can be written: {fault}") from None
        except (ValueError, TypeError, NotImplementedError) as fault:  # transformers refuses to write it
            reason = " ".join(str(fault).split())[:300]
            raise ConfigError(f"no checkpoint of this model can be written: {reason}") from None
        finally:
            shutil.rmtree(trial, ignore_errors=True)
    return "written and read back" if whole else "config and tokenizer are written and read back"


# ----------------------------------------------------------------------------------------- generators, caching


@contextmanager
def _generators_restored(model: Any) -> Iterator[None]:
    """Restore the random generators, so that the checks change no draw of the run."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _fingerprint(subject: Subject) -> str:
    """What the result of the checks depends on, besides the values of the weights and the data."""
    model, renderer = subject.model, subject.renderer
    parts = [model.config.to_json_string(use_diff=False), str(model.generation_config), str(renderer.made_with())]
    parts += [str(model.dtype), str(model.device), str(subject.packs), str(world())]
    if adapter.has_adapter(model):
        parts.append(str(model.peft_config["default"].to_dict()))
    return "\n".join(parts)
