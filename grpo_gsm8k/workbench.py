"""What every training stage needs, made ready from its config: the run, the learner, the sampler, the data.

The stages' `train` functions receive these; a test hands them toys instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from grpo_gsm8k import repro
from grpo_gsm8k.config import ModelConfig, PromptConfig, TrainConfig
from grpo_gsm8k.datatypes import Learner, Problem, Prompt, Sampler, SamplingParams
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.evals.accuracy import Evaluation, evaluate
from grpo_gsm8k.gsm8k.grading import Tags
from grpo_gsm8k.gsm8k.problems import load_problems
from grpo_gsm8k.gsm8k.prompts import Renderer, check_lengths, make_tags, remembered
from grpo_gsm8k.runs.directory import Run, open_run
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.policy import context_length, load_model, load_tokenizer, weights_sha256


@dataclass
class Bench:
    """The tools of one training run.

    Attributes:
        run: its directory.
        learner, sampler: who learns and who samples; `sync` hands the weights from one to the other.
        renderer: the prompt style bound to the tokenizer.
        val: the validation prompts.
        context: the model's context in tokens.
    """

    run: Run
    learner: Learner
    sampler: Sampler
    renderer: Renderer
    val: list[Prompt]
    context: int

    def sync(self, version: int) -> None:
        """Hand the learner's weights to the sampler."""
        self.sampler.load_weights(version, self.learner.weights())

    def validate(self, step: int) -> dict[str, float]:
        """Greedy accuracy on the validation set, its records kept under `evals/`. The sampler must be in sync."""
        cfg = self.run.cfg
        params = SamplingParams(1, cfg.max_new_tokens, temperature=0.0, stop=self.renderer.style.stop)
        digest = weights_sha256(self.learner.weights())
        result = evaluate(self.sampler, self.val, params, self.renderer, digest, cfg.grading, "validation")
        self.run.samples(step, result.rows, folder="evals")
        return result.metrics()

    def due(self, step: int, total: int) -> bool:
        """Whether this step ends with a validation: every `eval_every`, and the last."""
        every = self.run.cfg.eval_every
        return bool(every) and (step % every == 0 or step == total)

    def prompts(self, problems: Sequence[Problem], source: Path | str) -> list[Prompt]:
        """Rendered problems, each known to fit into the context with its completion."""
        prompts = [self.renderer.prompt(problem) for problem in problems]
        check_lengths(prompts, self.context, str(source))
        return prompts


@contextmanager
def open_bench(cfg: TrainConfig, stage: str, inputs: Mapping[str, Path]) -> Iterator[Bench]:
    """Everything ready-made from a config; what is cheap to refuse is refused before the model is loaded.

    Args:
        inputs: name → file that the stage reads, besides the evaluation set.
    """
    eval_path = Path(cfg.eval_set_path or Path(cfg.data) / "val.jsonl")
    problems = load_problems(eval_path)
    asked = how_to_ask(cfg)
    with open_run(cfg, stage, {**inputs, "eval_set": eval_path}) as run:
        repro.set_deterministic(cfg.deterministic)
        repro.seed_everything(cfg.seed)
        model = load_model(cfg)
        renderer = Renderer(load_tokenizer(cfg), *asked)
        sampler = HFSampler(model, renderer, cfg.sample_rows)
        bench = Bench(run, TorchLearner(model, renderer, cfg), sampler, renderer, [], context_length(model))
        bench.val = bench.prompts(problems[: cfg.eval_examples], eval_path)
        yield bench


def how_to_ask(cfg: PromptConfig) -> tuple[str, Tags]:
    """Prompt style and tags: as configured, or (auto) as the model folder remembers, else qwen_boxed."""
    tags = make_tags(cfg.think_open, cfg.think_close, cfg.answer_open, cfg.answer_close)
    if cfg.prompt_style != "auto":
        return cfg.prompt_style, tags
    return remembered(cfg.model_id) or ("qwen_boxed", tags)


def evaluate_model(
    cfg: ModelConfig, problems: Sequence[Problem], params: SamplingParams, source: str, title: str
) -> Evaluation:
    """Load a model, evaluate it on `problems`, let it go."""
    asked = how_to_ask(cfg)
    repro.set_deterministic(cfg.deterministic)
    model = load_model(cfg)
    renderer = Renderer(load_tokenizer(cfg), *asked)
    prompts = [renderer.prompt(problem) for problem in problems]
    check_lengths(prompts, context_length(model), source)
    params = dataclasses.replace(params, stop=renderer.style.stop)
    sampler = HFSampler(model, renderer, cfg.sample_rows)
    digest = weights_sha256(model.named_parameters())
    return evaluate(sampler, prompts, params, renderer, digest, cfg.grading, title)
