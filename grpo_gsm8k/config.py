"""Every setting of every stage: declared once here, with its help and its default.

From a field come the command-line flag, its help text and the TOML key. The layers, weakest first:
the default here, the preset (`presets/<name>.toml`, or the task's own in `presets/<task>/`), `--config FILE`, the
flags, `--set key=value`. An environment variable that a field names is stronger than files and weaker than flags.
`layers` finds them, `explain` says which one set what.
A layer that names an `algorithm` lays that paper's settings down first and its own over them; the flags and
`--set` count as one layer in this, so whatever is typed is stronger.
An unknown key is an error that names the nearest known one.

A TOML file has a table per stage (`[sft]`, `[ei]`, `[grpo]`, `[distill]`, `[eval]`, `[prep-eval]`, `[pairs]`,
`[tokenize]`, `[tiny_model]`, `[toy]`)
and a table `[common]` whose keys go to every stage that knows them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import operator
import os
import reprlib
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.plugins import is_users

T = TypeVar("T")
C = TypeVar("C")

PRESETS = Path(__file__).parent / "presets"
STAGES = ("base", "sft", "ei", "grpo")
ENGINES = ("hf", "vllm", "tinker")
SERVICE, SERVICE_FILE = "tinker://", "service.json"  # a checkpoint's name there, and the file that holds it here
LOGGERS = ("wandb", "tensorboard", "trackio")
DATASETS = ("gsm8k", "gsm8k_platinum", "gsm_plus", "gsm_symbolic", "math", "math500")
EVAL_SETS = "artifacts/sets"  # a folder for each of them but GSM8K
DATA, OTHER_DATA = "artifacts/data", "artifacts/gsm8k"  # where data lie that nobody names: the first that is there
MOST = 2**63 - 1  # of any whole number: what a seed of torch and a tensor's size can be


def opt(
    default: T,
    help: str,
    *,
    runtime: bool = False,
    settled: bool = False,
    expert: bool = False,
    also: str = "",
    env: str = "",
    metavar: str = "",
    many: bool = False,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> T:
    """A field with its help and its range.

    Args:
        runtime: may differ between a run and its continuation.
        settled: `auto` is replaced by what it means on this machine when a run begins; a continuation keeps that.
        expert: `--help` leaves it out, `--help_all` shows it.
        also: a second flag.
        env: an environment variable that sets it, weaker than a flag.
        metavar: what the help calls a value that is text, such as PATH.
        many: the flag may be given several times; the values are joined by commas.
        ge, gt, le, lt: bounds of a number, from whichever layer it comes.
    """
    bounds = {"at least": ge, "above": gt, "at most": le, "below": lt}
    range_ = {words: bound for words, bound in bounds.items() if bound is not None}
    told = {"help": help, "runtime": runtime, "settled": settled, "expert": expert, "also": also, "env": env}
    return dataclasses.field(default=default, metadata={**told, "metavar": metavar, "many": many, "range": range_})


def out_of_range(value: float, range_: Mapping[str, float]) -> str:
    """ "must be at least 0 and below 1" for a value that is not, "" for one that is. NaN and infinity never are."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    holds = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
    if all(holds[words](value, bound) for words, bound in range_.items()):
        return f"must be at most {MOST}" if value > MOST and isinstance(value, int) else ""
    return "must be " + " and ".join(f"{words} {bound}" for words, bound in range_.items())


@dataclass(frozen=True)
class PromptConfig:
    """The model, and how it is asked."""

    model_id: str = opt("Qwen/Qwen2.5-Math-1.5B", "model folder, or a name on the hub", metavar="MODEL")
    revision: str = opt("", "revision of a model on the hub; empty for its default branch")
    cache_dir: str = opt(
        "", "where hub models are kept; empty for the hub's default", runtime=True, metavar="PATH", expert=True
    )
    base_url: str = opt(
        "",
        "address of the training service that holds the model, as in http://127.0.0.1:8000; empty: Tinker's cloud",
        runtime=True,
        env="TINKER_BASE_URL",
        metavar="URL",
        expert=True,
    )
    tokenizer_id: str = opt(
        "",
        "the tokenizer of a model named tinker://…: a folder, or a name on the hub; empty: its base model's",
        metavar="MODEL",
        expert=True,
    )
    task: str = opt(
        "", "what is asked: gsm8k, or package.module:Class; empty: as the model was trained, else gsm8k", metavar="TASK"
    )
    prompt_style: Literal["auto", "qwen_boxed", "r1_zero", "gsm8k"] = opt(
        "auto", "how a problem is asked; auto: as the model was trained here, else qwen_boxed"
    )
    think_open: str = opt("<think>", "opens the reasoning (r1_zero)", expert=True)
    think_close: str = opt("</think>", "closes the reasoning (r1_zero)", expert=True)
    answer_open: str = opt("<answer>", "opens the answer (r1_zero); empty for think-only prompts", expert=True)
    answer_close: str = opt("</answer>", "closes the answer (r1_zero); empty for think-only prompts", expert=True)
    date: str = opt(
        "",
        "what a chat template writes that asks for the date; empty: as the model was trained here, else 2024-07-26",
        expert=True,
    )


@dataclass(frozen=True)
class PreferenceConfig(PromptConfig):
    """What the chat task prefers."""

    preference: str = opt(
        "length", "chat: reward by length, by a judge who compares answers (judge), or by package.module:function"
    )
    length_words: int = opt(
        0, "chat: length that is wished for, in words; 0: that of the reference answer", ge=0, expert=True
    )
    judge_base_url: str = opt(
        "", "chat: OpenAI-compatible endpoint of the judge, as in http://localhost:8000/v1", runtime=True, expert=True
    )
    judge_model: str = opt("", "chat: the judge's name there", expert=True)
    judge_api_key_env: str = opt(
        "", "chat: environment variable that holds the judge's key; empty: none is sent", runtime=True, expert=True
    )
    judge_concurrency: int = opt(8, "chat: most calls of the judge at once", runtime=True, ge=1, expert=True)
    judge_budget: int = opt(
        0, "chat: most calls of the judge in this run directory; 0 for no limit", runtime=True, ge=0, expert=True
    )
    judge_timeout_s: float = opt(
        120.0, "chat: seconds that one call of the judge may take", runtime=True, gt=0, expert=True
    )


@dataclass(frozen=True)
class ModelConfig(PreferenceConfig):
    """Device, length, seed, loggers."""

    device: str = opt("auto", "cpu, cuda, cuda:0, or auto")
    dtype: Literal["auto", "float32", "bfloat16"] = opt("auto", "auto: bfloat16 on a GPU, else float32")
    grading: Literal["strict", "flexible"] = opt("flexible", "strict demands a marked answer", expert=True)
    grader_processes: int = opt(
        0,
        "processes that grade, for a task or a reward that computes for long; 0: graded in this one",
        runtime=True,
        expert=True,
        ge=0,
        le=1024,
    )
    grader_timeout_s: float = opt(
        300.0,
        "seconds that such a process may take for one call (a prompt's completions); then the run is saved and stops",
        runtime=True,
        expert=True,
        gt=0,
    )
    max_new_tokens: int = opt(1024, "longest completion in tokens; the model's context may end it earlier", ge=1)
    sample_rows: int = opt(
        256, "completions decoded side by side; vLLM on a GPU decodes at least 1024", ge=1, expert=True
    )
    seed: int = opt(0, "decides every random draw", ge=0)
    deterministic: bool = opt(False, "bitwise repeatable kernels, TF32 off")
    log: str = opt(
        "",
        f"where metrics and samples go besides metrics.jsonl: {', '.join(LOGGERS)}, several separated by commas; W&B "
        "also without it, when WANDB_API_KEY is set or WANDB_MODE=offline",
        runtime=True,
        metavar="NAME",
        many=True,
    )
    wandb_project: str = opt(
        "grpo-gsm8k",
        "project in W&B and Trackio",
        runtime=True,
        env="WANDB_PROJECT",
    )
    run_name: str = opt("", "name of the run; empty for the run directory's", runtime=True)


@dataclass(frozen=True)
class EngineConfig(ModelConfig):
    """Who samples, and where."""

    ONLY_VLLM: typing.ClassVar[tuple[str, ...]] = ("tp_size", "gpu_mem_util", "max_model_len", "weight_transfer")

    engine: str = opt(
        "auto",
        "hf: transformers in this process; vllm: in its own (as --vllm_device says); tinker: a training service (as "
        "--base_url says); or package.module:Class; auto: the service where the model is at one, else vllm where it is "
        "installed and the model is on a GPU, unless deterministic, else hf",
        settled=True,
    )
    vllm_device: str = opt(
        "", "cuda:1 or cpu; empty: a GPU that the trainer is not on, else the trainer's", runtime=True
    )
    vllm_devices: str = opt(
        "", "several, as in cuda:1,cuda:2: an engine on each, sharing the prompts", runtime=True, expert=True
    )
    tp_size: int = opt(1, "GPUs of one vLLM engine (tensor parallel), counted on from its device", runtime=True, ge=1)
    gpu_mem_util: float = opt(
        0.0,
        "share of a GPU's memory that vLLM may take; 0: 0.9, or what a learner on that GPU leaves",
        runtime=True,
        ge=0,
        le=1,
    )
    max_model_len: int = opt(
        0, "longest sequence that vLLM plans for; 0 for the model's context", runtime=True, ge=0, expert=True
    )
    weight_transfer: Literal["file", "nccl", "ipc"] = opt(
        "file",
        "how weights reach vLLM: a file in shared memory; or its own transfer, GPU to GPU (nccl) or on one GPU (ipc)",
        runtime=True,
        expert=True,
    )
    engine_patience_s: float = opt(
        600.0, "seconds without a sign of progress before an engine is lost", runtime=True, gt=0, le=1e9, expert=True
    )

    def __post_init__(self) -> None:
        device = self.vllm_devices or self.vllm_device
        if device and self.engine == "auto":  # so that the config says it, and a resumed run is held to it
            object.__setattr__(self, "engine", "vllm")
        elif device and self.engine in ("hf", "tinker"):
            flag = "--vllm_devices" if self.vllm_devices else "--vllm_device"
            raise ConfigError(
                f"{flag} {device} with --engine {self.engine}: only vLLM runs there; give --engine vllm, or leave "
                f"{flag} out"
            )
        elif at_service(self.model_id) and self.engine == "auto":
            object.__setattr__(self, "engine", "tinker")
        if self.engine not in ("auto", *ENGINES) and not is_users(self.engine):
            raise ConfigError(f"engine = {self.engine!r}: must be auto, {', '.join(ENGINES)}, or package.module:Class")
        unknown = [name for name in self.log.split(",") if self.log and name.strip() not in LOGGERS]
        if unknown:
            raise ConfigError(
                f"--log {self.log}: must be {', '.join(LOGGERS)}, with commas between; not {unknown[0]!r}"
            )
        if at_service(self.model_id) and self.engine != "tinker":
            raise ConfigError(
                f"{self.model_id} is at a training service, which samples itself: leave --engine and vLLM's flags out"
            )

    @property
    def uses_vllm(self) -> bool:
        """Whether vLLM samples. False for `auto`, which a stage settles before it opens anything."""
        return self.engine == "vllm"

    @property
    def unread(self) -> list[str]:
        """vLLM's settings, as `--name value`, that were given and that another engine of ours does not read."""
        if self.engine not in ("hf", "tinker"):
            return []
        given = [f for f in dataclasses.fields(self) if f.name in self.ONLY_VLLM and getattr(self, f.name) != f.default]
        return [f"--{field.name} {getattr(self, field.name)}" for field in given]


@dataclass(frozen=True)
class PolicyConfig(EngineConfig):
    """LoRA."""

    lora_rank: int = opt(0, "rank of LoRA adapters, which alone are trained; 0 trains every weight", ge=0)
    lora_alpha: int = opt(32, "the adapters' product is scaled by lora_alpha / lora_rank", ge=1, expert=True)
    lora_targets: str = opt(
        "all-linear", "which layers have an adapter: all-linear, or names such as q_proj,v_proj", expert=True
    )


@dataclass(frozen=True)
class LearnerConfig(PolicyConfig):
    """Who trains."""

    learner: Literal["torch", "tinker"] = opt(
        "torch", "torch: this machine; tinker: a training service, which samples too (as --base_url says)"
    )
    wire_loss: Literal["auto", "custom"] = opt(
        "auto",
        "at a service, custom: the loss is computed here, from log-probabilities that take a forward pass more; auto: "
        "so where the service's own losses are not ours, and in a deterministic run",
        expert=True,
    )


@dataclass(frozen=True)
class RunConfig(LearnerConfig):
    """Data, run directory, checkpoints."""

    data: str = opt("artifacts/data", "folder with train.jsonl, val.jsonl and test.jsonl", metavar="PATH")
    out_dir: str = opt(
        "", "run directory; empty for artifacts/runs/<UTC stamp>_<git sha>", runtime=True, metavar="PATH"
    )
    resume: bool = opt(False, "continue the run if there is one, start it if there is none", runtime=True)
    max_steps: int = opt(
        0,
        "stop after this many steps; 0 for all. The schedule stays that of the whole run",
        runtime=True,
        ge=0,
    )
    save_every: int = opt(20, "steps between checkpoints", runtime=True, ge=1)
    async_save: bool = opt(
        True,
        "write checkpoints while training goes on, from a copy in main memory; not where several ranks or a service "
        "train, or where the copy does not fit",
        runtime=True,
        expert=True,
    )
    keep_last: int = opt(2, "checkpoints kept, besides the best one on validation", runtime=True, ge=1, expert=True)
    keep_rollouts: int = opt(
        -1,
        "GRPO and expert iteration: steps whose rollouts are kept on disk, the newest; -1 for all, 0 for none",
        runtime=True,
        ge=-1,
        expert=True,
    )


@dataclass(frozen=True)
class ValidationConfig(RunConfig):
    """Validation, and proof of the weights that are sampled from."""

    eval_every: int = opt(20, "steps between evaluations; 0 for none", ge=0)
    eval_examples: int = opt(100, "validation problems per evaluation, answered greedily; 0 for all", ge=0)
    eval_draw: Literal["first", "random"] = opt(
        "first", "which problems: the first, or as many drawn by the seed", expert=True
    )
    eval_set_path: str = opt("", "evaluation set; empty for val.jsonl of --data", metavar="PATH")
    eval_mode: Literal["auto", "inline", "async"] = opt(
        "auto",
        "async: in a process of its own while training goes on; auto: so for SFT with vLLM, else inline",
        expert=True,
    )
    eval_device: str = opt(
        "", "where the asynchronous evaluator runs; empty for vLLM's device, else cpu", runtime=True, expert=True
    )
    eval_backlog: Literal["all", "latest"] = opt(
        "all", "when the evaluator falls behind: keep all that wait, or only the latest", runtime=True, expert=True
    )
    probe_prompts: int = opt(
        8, "prompts that prove each hand-over of weights to an engine process; 0 for none", ge=0, expert=True
    )
    probe_tolerance: float = opt(
        0.0,
        "largest mean |logp difference| of a probe; 0 for 1e-3 in float32 and 0.05 in bfloat16",
        runtime=True,
        ge=0,
        expert=True,
    )


@dataclass(frozen=True)
class OptimizerConfig(ValidationConfig):
    """The optimizer."""

    lr: float = opt(1e-5, "peak learning rate", ge=0)
    lr_schedule: Literal["constant", "cosine", "linear"] = opt("constant", "what follows the warm-up")
    warmup_steps: int = opt(0, "steps of linear warm-up", ge=0)
    weight_decay: float = opt(0.0, "AdamW weight decay, on matrices only", ge=0, expert=True)
    beta1: float = opt(0.9, "AdamW beta1", ge=0, lt=1, expert=True)
    beta2: float = opt(0.95, "AdamW beta2", ge=0, lt=1, expert=True)
    grad_clip: float = opt(1.0, "largest gradient norm; 0 for no clipping", ge=0, expert=True)


@dataclass(frozen=True)
class MemoryConfig(OptimizerConfig):
    """Memory and speed."""

    max_tokens_per_microbatch: int = opt(
        0,
        "tokens of one forward pass, where rows are packed, else rows x longest; 0: what fits a GPU (deterministic: "
        "8192), 3072 on a CPU",
        ge=0,
    )
    head: Literal["fused", "plain"] = opt(
        "fused", "plain: all logits and autograd, in much more memory; to read, and to debug a loss", expert=True
    )
    packing: Literal["auto", "on", "off"] = opt(
        "auto",
        "no cell of padding, and a prompt read once for all its completions; auto: on a CPU, and on a GPU in bfloat16, "
        "if the model can",
        expert=True,
    )
    activation_checkpointing: bool = opt(
        False,
        "keep only each layer's input, and compute the rest again in the backward pass",
        runtime=True,
        expert=True,
    )
    compile: Literal["auto", "on", "off"] = opt(
        "auto",
        "compile each layer with torch.compile; needs a C++ compiler (CPU) or triton (GPU); auto: large models with "
        "packed rows on one GPU, where it gives the same numbers",
        expert=True,
    )
    optimizer_device: Literal["auto", "cpu"] = opt(
        "auto",
        "auto: AdamW's state beside the model; cpu: in main memory, where its step is made",
        runtime=True,
        expert=True,
    )


@dataclass(frozen=True)
class TrainConfig(MemoryConfig):
    """What SFT, expert iteration and GRPO have in common."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if at_service(self.model_id):
            object.__setattr__(self, "learner", "tinker")
        if self.learner == "tinker" and self.engine == "auto":
            object.__setattr__(self, "engine", "tinker")
        if (self.learner == "tinker") != (self.engine == "tinker"):
            raise ConfigError(
                f"--learner {self.learner} with --engine {self.engine}: a training service samples from the "
                "weights that it trains, and hands them to no other engine; give --learner tinker alone"
            )
        if self.compile == "on" and self.deterministic:
            raise ConfigError(
                "--compile on with --deterministic: kernels are made for the shapes that a process meets first, and a "
                "resumed run meets others; leave one of them out"
            )


@dataclass(frozen=True)
class SftConfig(TrainConfig):
    """Supervised fine-tuning on worked solutions."""

    data_path: str = opt(
        "",
        "JSONL of {prompt, response} or {messages}, a folder of shards, or a data set of the hub as "
        "hf:OWNER/NAME[:split][@REVISION]; empty for the solutions in --data",
        metavar="PATH",
    )
    train_on: Literal["last", "all"] = opt("last", "which assistant messages of a chat are trained", expert=True)
    max_length: int = opt(2048, "longer examples are left out, and counted", ge=1)
    epochs: int = opt(3, "passes over the data", ge=1)
    batch_size: int = opt(64, "examples per optimizer step", ge=1)
    lr: float = opt(1e-5, "peak learning rate", ge=0)
    lr_schedule: Literal["constant", "cosine", "linear"] = opt("cosine", "what follows the warm-up")
    warmup_steps: int = opt(20, "steps of linear warm-up", ge=0)


@dataclass(frozen=True)
class EiConfig(TrainConfig):
    """Expert iteration: sample, keep what is right, fine-tune on it, again."""

    rounds: int = opt(2, "rounds of sample, keep, fine-tune", ge=1)
    prompts_per_round: int = opt(2048, "training problems sampled in a round", ge=1)
    samples_per_prompt: int = opt(4, "completions per problem", ge=1, le=100_000)
    keep_per_problem: int = opt(2, "right and distinct completions kept per problem", ge=1, expert=True)
    temperature: float = opt(1.0, "sampling temperature", ge=0)
    top_p: float = opt(1.0, "nucleus mass", gt=0, le=1, expert=True)
    steps_per_round: int = opt(50, "optimizer steps of a round", ge=1)
    batch_size: int = opt(64, "examples per optimizer step", ge=1)


_PLAIN: dict[str, Any] = {
    "loss": "grpo_clip",
    "advantage": "group_relative",
    "baseline": "group",
    "std_norm": True,
    "aggregation": "sequence",
    "clip_eps": 0.2,
    "clip_eps_high": 0.0,
    "dual_clip": 0.0,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "entropy_coef": 0.0,
    "kl_coef": 0.0,
    "kl_estimator": "k3",
    "kl_bias_correction": True,
    "overlong_buffer": 0.0,
    "mask_truncated": False,
    "resample_zero_variance": 0,
}
# DAPO asks for fresh prompts until every group has variance; ten times is where we stop.
_DAPO = {"aggregation": "token", "overlong_buffer": 4096 / 20480, "resample_zero_variance": 10}
_REINFORCE = {"loss": "reinforce", "std_norm": False, "aggregation": "constant"}

ALGORITHMS: dict[str, dict[str, Any]] = {
    # arXiv 2402.03300 sec. 4.2. Gives no clip range: 0.2 is PPO's.
    "grpo": {**_PLAIN, "kl_coef": 0.04, "kl_bias_correction": False},
    # arXiv 2503.20783 sec. 3.2
    "dr_grpo": {**_PLAIN, "std_norm": False, "aggregation": "constant"},
    # arXiv 2503.14476 sec. 3 and 4.1
    "dapo": {**_PLAIN, **_DAPO, "clip_eps_high": 0.28},
    # arXiv 2507.18071 sec. 5.1; made for several updates a step, the paper takes `minibatches = 4`
    "gspo": {**_PLAIN, "loss": "gspo", "clip_eps": 3e-4, "clip_eps_high": 4e-4},
    # arXiv 2506.13585 sec. 3.1: no lower bound; gives no upper one: 5 is arXiv 2510.13786's
    "cispo": {**_PLAIN, **_DAPO, "loss": "cispo", "clip_eps": 1.0, "clip_eps_high": 4.0},
    # arXiv 2402.14740 sec. 3; its KL penalty, a part of its reward, is left to kl_coef
    "rloo": {**_PLAIN, **_REINFORCE, "baseline": "leave_one_out"},
    # Williams 1992, doi 10.1007/BF00992696
    "reinforce": {**_PLAIN, **_REINFORCE, "baseline": "none"},
    "reinforce_baseline": {**_PLAIN, **_REINFORCE},
    # the ratio times the advantage, unclipped, summed over tokens: the loss `importance_sampling` of the Tinker API
    "importance_sampling": {
        **_PLAIN,
        "std_norm": False,
        "aggregation": "constant",
        "clip_eps": 1.0,
        "clip_eps_high": 1e9,
    },
    # arXiv 1707.06347 eq. 7 over all tokens, with group-relative advantages instead of a critic's
    "ppo": {**_PLAIN, "aggregation": "token"},
    # arXiv 1912.09729 eq. 5, with group-relative advantages instead of a critic's
    "ppo_dual_clip": {**_PLAIN, "aggregation": "token", "dual_clip": 3.0},
    # arXiv 2511.20347
    "sapo": {**_PLAIN, "loss": "sapo"},
    # arXiv 2602.05261 sec. 5.1
    "luspo": {**_PLAIN, "loss": "luspo", "clip_eps": 2e-3, "clip_eps_high": 2.5e-3},
    # arXiv 2602.10693; made for rollouts that are several updates old
    "vespo": {**_PLAIN, "loss": "vespo", "aggregation": "token"},
    # arXiv 2602.02710: for rewards of 0 and 1
    "maxrl": {**_PLAIN, **_REINFORCE, "advantage": "maxrl"},
}
"""Each paper's own settings, all of them spelled out: none is left over from the recipe below. Step counts, learning
rates and group sizes stay the recipe's."""


@dataclass(frozen=True)
class GrpoConfig(TrainConfig):
    """Group relative policy optimisation and its kin; the defaults are arXiv 2402.03300 without the KL term."""

    algorithm: str = opt("", f"a paper's settings, over the preset and under the flags: {', '.join(ALGORITHMS)}")
    loss: str = opt(
        "grpo_clip", "per-token loss: grpo_clip, gspo, luspo, cispo, sapo, vespo, reinforce, or package.module:Class"
    )
    steps: int = opt(200, "GRPO steps: sample, grade, update", ge=1)
    rollouts_per_step: int = opt(256, "completions per step; a multiple of the group size", ge=1)
    group_size: int = opt(8, "completions per prompt", ge=1)
    epochs: int = opt(1, "passes over a step's rollouts", ge=1, expert=True)
    minibatches: int = opt(1, "optimizer steps per pass", ge=1, expert=True)
    clip_eps: float = opt(0.2, "the ratio is clipped to [1 - clip_eps, 1 + clip_eps_high]", ge=0)
    clip_eps_high: float = opt(0.0, "upper clip, if it differs; 0 for the same as clip_eps", ge=0, expert=True)
    dual_clip: float = opt(
        0.0, "PPO dual-clip bound on the ratio where the advantage is negative; 0 for none", ge=0, expert=True
    )
    sapo_temperature_pos: float = opt(
        1.0, "SAPO: how fast the gate closes away from a ratio of 1, where A > 0", gt=0, expert=True
    )
    sapo_temperature_neg: float = opt(1.05, "SAPO: the same where A <= 0", gt=0, expert=True)
    vespo_k_pos: float = opt(2.0, "VESPO: damps responses that became less likely, where A >= 0", ge=0, expert=True)
    vespo_lambda_pos: float = opt(
        3.0, "VESPO: damps responses that became more likely, where A >= 0", ge=0, expert=True
    )
    vespo_k_neg: float = opt(3.0, "VESPO: damps responses that became less likely, where A < 0", ge=0, expert=True)
    vespo_lambda_neg: float = opt(2.0, "VESPO: damps responses that became more likely, where A < 0", ge=0, expert=True)
    advantage: str = opt(
        "group_relative",
        "group_relative (by baseline and std_norm), maxrl (reward over its group's mean, less 1), or "
        "package.module:function of a group's grades",
    )
    baseline: Literal["group", "leave_one_out", "none"] = opt(
        "group",
        "subtracted from a reward: its group's mean, the mean of the others in its group, or nothing",
        expert=True,
    )
    std_norm: bool = opt(True, "divide advantages by the group's standard deviation", expert=True)
    advantage_eps: float = opt(1e-6, "added to the group's standard deviation", ge=0, expert=True)
    aggregation: Literal["sequence", "token", "constant"] = opt(
        "sequence",
        "how token losses are averaged: over each response, then over responses (GRPO); over all tokens (DAPO); or "
        "their sum over max_new_tokens (Dr. GRPO)",
        expert=True,
    )
    entropy_coef: float = opt(0.0, "weight of the entropy bonus; 0 for none", ge=0, expert=True)
    kl_coef: float = opt(0.0, "weight of the KL to the starting model; 0 for none, at no cost", ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = opt("k3", "estimator of that KL", expert=True)
    kl_bias_correction: bool = opt(
        True,
        "weight the estimator by the importance ratio, so that it has the gradient of KL(pi || pi_ref); alone, k3 has "
        "that of KL(pi_ref || pi)",
        expert=True,
    )
    old_logprobs: Literal["sampler", "recompute"] = opt(
        "sampler",
        "old policy in the ratio: the sampler's log-probabilities, or the trainer's own before the step's updates (a "
        "frozen pass, if there are several)",
        expert=True,
    )
    mode: Literal["on_policy", "one_step_off"] = opt(
        "on_policy", "one_step_off samples the next step's rollouts while the learner updates: at most one update old"
    )
    importance_correction: Literal[
        "none", "truncate", "mask", "sequence_truncate", "sequence_mask", "geometric_mask"
    ] = opt(
        "none",
        "weight each token by the ratio trainer / sampler probability, per token or per response: truncated at "
        "importance_cap, or masked beyond it; geometric_mask only masks",
        expert=True,
    )
    importance_cap: float = opt(2.0, "upper bound of the correction's ratio", ge=1, expert=True)
    importance_cap_low: float = opt(
        0.0, "lower bound; 0: none for truncate, 1 / importance_cap for mask", ge=0, le=1, expert=True
    )
    mask_truncated: bool = opt(False, "leave completions cut at max_new_tokens out of the loss", expert=True)
    resample_zero_variance: int = opt(
        0, "how many times to replace groups of equal rewards by fresh prompts", ge=0, expert=True
    )
    curriculum: str = opt(
        "none",
        "which prompts are sampled: none, each once per epoch; target:T, more often those whose solve rate is near T",
    )
    curriculum_half_life: float = opt(
        50.0, "steps after which what a prompt's completions have shown counts half", gt=0, le=1e9, expert=True
    )
    curriculum_unbiased: bool = opt(
        False, "weigh each group so that the objective stays that of uniform prompts", expert=True
    )
    temperature: float = opt(1.0, "sampling temperature", ge=0)
    top_p: float = opt(1.0, "nucleus mass; below 1 it is refused, since ratios would be wrong", gt=0, le=1, expert=True)
    reward: str = opt("default", "default: the task's; random (the control); or package.module:function")
    format_weight: float = opt(0.2, "reward for the format", ge=0, expert=True)
    answer_weight: float = opt(0.8, "reward for the right answer", ge=0, expert=True)
    estimate: str = opt(
        "", "print the predicted memory and time on this GPU (H200, H100, A100, L40S, 4090, …) and exit", runtime=True
    )
    overlong_buffer: float = opt(
        0.0,
        "last share of max_new_tokens, over which a length penalty grows from 0 to -1; 0 for no penalty",
        ge=0,
        le=1,
        expert=True,
    )

    @property
    def frozen_pass(self) -> bool:
        """Whether old log-probabilities take a pass of their own. A step's only update finds what it would find."""
        return self.old_logprobs == "recompute" and self.epochs * self.minibatches > 1


@dataclass(frozen=True)
class DistillConfig(GrpoConfig):
    """On-policy distillation: a teacher scores every token that the student samples; the rest is GRPO's."""

    teacher: str = opt(
        "", "who scores the student's samples: a model folder, or a name on the hub; same vocabulary", metavar="MODEL"
    )
    teacher_revision: str = opt("", "revision of a teacher on the hub; empty for its default branch", expert=True)
    teacher_device: str = opt("", "where the teacher computes, as in cuda:1; empty: where the student is trained")
    teacher_engine: Literal["hf", "vllm"] = opt(
        "hf", "hf: in this process; vllm: in an engine of its own, at temperature 1 (as --teacher_device says)"
    )
    teacher_cache_mb: int = opt(
        256,
        "scores of the teacher that are kept, in MiB, in the run directory and in memory; what does not fit is scored "
        "again; 0: none",
        ge=0,
        le=1 << 20,
        expert=True,
    )
    reward_coef: float = opt(0.0, "weight of the task's advantage beside the teacher's; 0: the teacher alone", ge=0)
    group_size: int = opt(4, "completions per prompt", ge=1)
    aggregation: Literal["sequence", "token", "constant"] = opt(
        "token",
        "mean over all tokens; over a response then over responses (GRPO); or over max_new_tokens",
        expert=True,
    )

    @property
    def unread(self) -> list[str]:
        """See `EngineConfig.unread`; a teacher in vLLM reads these, too."""
        return [] if self.teacher_engine == "vllm" else super().unread


@dataclass(frozen=True)
class EvalConfig(EngineConfig):
    """Accuracy of a model on a file of problems."""

    eval_path: str = opt(
        "artifacts/data/test.jsonl",
        "problems, or the rows that prep-eval writes; several with commas between; GSM8K is fetched if there is none",
        metavar="PATH",
        many=True,
    )
    dataset: str = opt(
        "",
        f"sets by name, separated by commas, fetched into {EVAL_SETS} where they are not there: {', '.join(DATASETS)}",
        metavar="NAME",
        many=True,
    )
    eval_n: int = opt(
        0, "validation problems that are reserved when the data are fetched; 0 for 512", ge=0, expert=True
    )
    limit: int = opt(0, "only the first so many problems; 0 for all", ge=0)
    samples: int = opt(1, "completions per problem and seed", ge=1, le=100_000)
    seeds: str = opt("", "several sampling seeds, as in 0,1,2; empty for --seed alone")
    temperature: float = opt(0.0, "0 is greedy", ge=0)
    top_p: float = opt(1.0, "nucleus mass", gt=0, le=1, expert=True)
    shots: int = opt(0, "worked examples shown before each problem, drawn from --shots_path by --seed", ge=0)
    shots_path: str = opt("", "training problems that the examples come from; never the evaluated ones", metavar="PATH")
    out_dir: str = opt("artifacts/baselines", "where the results file goes", metavar="PATH")


@dataclass(frozen=True)
class PrepEvalConfig(PromptConfig):
    """An evaluation set, rendered for one model."""

    data: str = opt("artifacts/data", "folder with train.jsonl, val.jsonl and test.jsonl", metavar="PATH")
    split: Literal["train", "val", "test"] = opt("val", "which of them")
    eval_path: str = opt("", "a file of problems instead", also="--infile", metavar="PATH")
    limit: int = opt(0, "only the first so many problems; 0 for all", ge=0)
    out: str = opt(
        "", "where the rows go; empty for artifacts/tokenized/<file>_for_vllm.jsonl", also="--outfile", metavar="PATH"
    )


@dataclass(frozen=True)
class PairsConfig(PromptConfig):
    """Teacher traces as pairs to fine-tune on, for a model that is asked in this way."""

    traces: str = opt("artifacts/traces/traces.jsonl", "answers of a teacher", also="--infile", metavar="PATH")
    out: str = opt("artifacts/traces/pairs.jsonl", "where the pairs go", also="--outfile", metavar="PATH")
    part: Literal["auto", "content", "reasoning"] = opt(
        "auto", "what of a trace becomes the response; auto: the reasoning for r1_zero, else the content"
    )
    grading: Literal["strict", "flexible"] = opt("flexible", "strict demands a marked answer of the teacher, too")
    min_chars: int = opt(20, "shortest response in characters", ge=0)
    max_chars: int = opt(8000, "longest response in characters", ge=1)


@dataclass(frozen=True)
class TokenizeConfig(PromptConfig):
    """Pairs as shards of token ids, for one model."""

    data_path: str = opt(
        "artifacts/traces/pairs.jsonl", "JSONL of {prompt, response} or {messages}", also="--infile", metavar="PATH"
    )
    out_dir: str = opt("artifacts/tokenized/pairs", "folder of shards; continued if it was begun", metavar="PATH")
    max_total_tokens: int = opt(1024, "columns of a shard; longer examples are left out, and counted", ge=1)
    train_on: Literal["last", "all"] = opt("last", "which assistant messages of a chat are trained")
    shard_rows: int = opt(1024, "lines of the file that make one shard", ge=1, expert=True)
    format: Literal["safetensors", "pt"] = opt("safetensors", "pt: a dict for torch.load(weights_only=True)")
    workers: int = opt(1, "processes", ge=1, le=1024)


@dataclass(frozen=True)
class TinyModelConfig:
    """The model that a pipeline makes on the spot when none is named."""

    vocab_size: int = opt(1024, "at most so many byte-level BPE tokens", ge=259, le=1_000_000)
    hidden_size: int = opt(128, "width", ge=2, le=65_536)
    layers: int = opt(2, "transformer layers", ge=1, le=1024)
    heads: int = opt(
        4, "attention heads; of 32 each at this width, the smallest that vLLM has kernels for", ge=1, le=1024
    )


@dataclass(frozen=True)
class ToyConfig:
    """The data that a pipeline makes on the spot when none is named: how many examples of each split."""

    train: int = opt(18000, "training examples", ge=1, le=10_000_000)
    val: int = opt(200, "validation examples", ge=1, le=10_000_000)
    test: int = opt(600, "held-out test examples", ge=1, le=10_000_000)
    tiny: bool = opt(False, "small examples, from a teacher of mixed quality: what the tiny model learns from")


@dataclass(frozen=True)
class PipelineConfig:
    """What the pipeline itself needs to know; the stages' settings come from the preset, `--set`, `--config`."""

    preset: str = opt("tiny", "recipe: tiny, quick or full")
    task: str = opt("", "what is asked: gsm8k, or package.module:Class; empty for the preset's", metavar="TASK")
    data: str = opt("", "folder with train.jsonl, val.jsonl, test.jsonl; empty for the preset's", metavar="PATH")
    model_id: str = opt("", "model to start from; empty for the preset's", metavar="MODEL")
    out_dir: str = opt("", "pipeline directory; empty for artifacts/runs/<UTC stamp>_<git sha>", metavar="PATH")
    engine: str = opt("", "who samples in every stage, auto, hf or vllm; empty for the preset's")
    learner: Literal["torch", "tinker"] = opt("torch", "who trains, and with tinker also samples, in every stage")
    base_url: str = opt(
        "", "address of the training service; empty: Tinker's cloud", env="TINKER_BASE_URL", metavar="URL", expert=True
    )
    lora_rank: int = opt(0, "rank of the LoRA adapters that are trained; 0 for the preset's", ge=0)
    stop_after: str = opt("", "last stage to run: base, sft, ei or grpo")
    max_steps: int = opt(0, "stop every training stage after this many steps; 0 for all", ge=0)
    seed: int = opt(0, "decides every random draw", ge=0)
    deterministic: bool = opt(False, "bitwise repeatable kernels, TF32 off")
    resume: bool = opt(False, "continue where an earlier call stopped")


TASK_SETTINGS = tuple(field.name for field in dataclasses.fields(PreferenceConfig) if "chat:" in field.metadata["help"])
"""Fields that reach a task as `TaskOptions.settings`."""

SECTIONS: dict[str, type] = {
    "sft": SftConfig,
    "ei": EiConfig,
    "grpo": GrpoConfig,
    "distill": DistillConfig,
    "eval": EvalConfig,
    "prep-eval": PrepEvalConfig,
    "pairs": PairsConfig,
    "tokenize": TokenizeConfig,
    "tiny_model": TinyModelConfig,
    "toy": ToyConfig,
}


def at_service(model_id: str) -> bool:
    """Whether a training service holds this model: it is named tinker://…, or is a checkpoint made there."""
    return model_id.startswith(SERVICE) or (Path(model_id) / SERVICE_FILE).is_file()


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset_path(preset: str, task: str = "") -> Path:
    """The file of a preset: the task's own where it has one (`presets/<task>/<name>.toml`)."""
    own = PRESETS / task / f"{preset}.toml"
    return own if task.isidentifier() and own.is_file() else PRESETS / f"{preset}.toml"


def read_toml(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a recipe file, every key checked. Raises `ConfigError` naming the file and the key."""
    try:
        if path.is_char_device():
            raise ConfigError(f"{path}: is a device, not a config file")
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        hint = f"; the preset is --preset {path}" if str(path) in preset_names() else ""
        raise ConfigError(f"{path}: no such config file{hint}") from None
    except OSError as fault:
        raise ConfigError(f"{path}: cannot be read: {fault.strerror}") from None
    except (ValueError, RecursionError) as fault:  # broken TOML, broken UTF-8, a number of 5000 digits, NUL in the path
        raise ConfigError(f"{path}: not a TOML file: {fault}") from None
    of_tasks = tables.get("task", {})
    if not isinstance(of_tasks, dict) or not all(isinstance(own, dict) for own in of_tasks.values()):
        raise ConfigError(f"{path}: what is for one task must stand in a table such as [task.countdown.grpo]")
    _check_tables({name: table for name, table in tables.items() if name != "task"}, path, "")
    for task, own in of_tasks.items():
        _check_tables(own, path, f"task.{task}.")
    return tables


def _check_tables(tables: Mapping[str, Any], path: Path, before: str) -> None:
    """Raise `ConfigError` for a table or a key that is not known."""
    everywhere = {name for cls in SECTIONS.values() for name in _fields(cls)}
    for table, values in tables.items():
        check_known(table, [*SECTIONS, "common"], f"{path}: unknown table" + (f" in [{before[:-1]}]" if before else ""))
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {table!r} must stand in a table such as [{before}grpo] or [{before}common]")
        known = everywhere if table == "common" else _fields(SECTIONS[table])
        for key, value in values.items():
            check_known(key, known, f"{path}: [{before}{table}] unknown key")
            for cls in SECTIONS.values() if table == "common" else [SECTIONS[table]]:
                if key in _fields(cls):
                    _coerce(cls, key, value, f"{path}: [{before}{table}] {key} =")


@dataclass(frozen=True)
class Layer:
    """Some settings of a stage, and where they come from.

    Attributes:
        kind: preset, task, file, env or flag; what no layer names is the default.
        where: for people, such as `presets/quick.toml [grpo]` or `--lr`.
    """

    kind: str
    where: str
    values: Mapping[str, Any]


def resolve(section: str, **given: Any) -> Any:
    """The config of one stage from all of its `layers`, whose arguments it takes."""
    values: dict[str, Any] = {}
    for layer in layers(section, **given):
        values |= layer.values
    return build(SECTIONS[section], values)


Explained = tuple[Any, dict[str, tuple[str, str]]]


def explain(section: str, **given: Any) -> Explained:
    """The config as `resolve` makes it, and for each of its fields the kind and the place of the layer that set it."""
    cfg = resolve(section, **given)
    origin, values = dict.fromkeys(_fields(SECTIONS[section]), ("default", "")), vars(SECTIONS[section]())
    for layer in layers(section, **given):
        values |= layer.values
        origin |= dict.fromkeys(layer.values, (layer.kind, layer.where))
    implied = {name for name, value in vars(cfg).items() if values[name] != value and type(values[name]) is type(value)}
    return cfg, origin | dict.fromkeys(implied, ("implied", "by other settings"))


def layers(
    section: str,
    *,
    preset: str | None = None,
    task: str = "",
    config_file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: typing.Sequence[str] = (),
) -> list[Layer]:
    """All layers of one stage, the weakest first (see the module's docstring).

    Args:
        section: a key of `SECTIONS`.
        task: whose presets and whose tables `[task.NAME.section]` count; by default the task that the flags or the
            files name.
        flags: only those that were given.
        sets: `key=value` strings; `section.key=value` is for that section alone.

    Raises:
        ConfigError: for an unknown preset, key or value.
    """
    if preset:
        check_known(preset, preset_names(), "unknown preset")
    flags, typed = dict(flags or {}), set_values(section, sets)
    task = task or str({**flags, **typed}.get("task", ""))
    paths = [path for path in (preset and preset_path(preset, task), config_file) if path]
    tables = {path: read_toml(path) for path in paths}
    task = task or next((t for path in paths[::-1] if (t := _layer(tables[path], section).get("task"))), "")
    found = _other_data(SECTIONS[section])
    for path in paths:
        shipped = path.is_relative_to(PRESETS)
        name = path.relative_to(PRESETS.parent) if shipped else path
        kind = "file" if not shipped else "preset" if path.parent == PRESETS else "task"
        found += _of_file(tables[path], section, kind, f"{name} [")
        found += _of_file(tables[path].get("task", {}).get(task, {}), section, "task", f"{name} [task.{task}.")
    found += _environment(SECTIONS[section])
    by_flag = [Layer("flag", f"--{key}", {key: value}) for key, value in flags.items()]
    by_set = [Layer("flag", f"--set {key}=…", {key: value}) for key, value in typed.items()]
    return found + _over_algorithm(*by_flag, *by_set)


def set_values(section: str, sets: typing.Sequence[str]) -> dict[str, Any]:
    """The values of `--set` that are for this section."""
    cls, typed = SECTIONS[section], dict[str, Any]()
    for item in sets:
        key, equals, text = item.partition("=")
        table, dot, name = key.strip().rpartition(".")
        if not equals:
            raise ConfigError(f"--set {item}: must read key=value")
        if dot:
            check_known(table, [*SECTIONS, "common"], f"--set {item}: unknown section")
            known = [key for stage in SECTIONS.values() for key in _fields(stage)]
            check_known(name, known if table == "common" else _fields(SECTIONS[table]), f"--set {item}: unknown key")
        else:
            check_known(name, _fields(cls), f"--set {item}: unknown key")
        if not dot or table == section or (table == "common" and name in _fields(cls)):
            owner = SECTIONS.get(table, cls)
            typed[name] = _coerce(owner, name, text.strip(), f"--set {key.strip()} =")
    return typed


def _other_data(cls: type) -> list[Layer]:
    """The defaults below `artifacts/data`, in `artifacts/gsm8k` where that folder alone is there."""
    moved = {f.name: found for f in dataclasses.fields(cls) if (found := found_data(f.default))}
    return [Layer("default", f"{OTHER_DATA}, since there is no {DATA}", moved)] if moved else []


def found_data(default: Any) -> str:
    """A default below `artifacts/data`, in `artifacts/gsm8k` where that folder alone is there; "" for any other."""
    if not isinstance(default, str) or Path(DATA).exists() or not Path(OTHER_DATA).is_dir():
        return ""
    return default.replace(DATA, OTHER_DATA, 1) if f"{default}/".startswith(f"{DATA}/") else ""


def _environment(cls: type) -> list[Layer]:
    """What variables of the environment set, a layer each."""
    named = {f.name: f.metadata["env"] for f in dataclasses.fields(cls) if os.environ.get(f.metadata["env"])}
    return [Layer("env", env, {key: _coerce(cls, key, os.environ[env], f"{env} =")}) for key, env in named.items()]


def build(cls: type[C], values: Mapping[str, Any]) -> C:
    """`cls(**values)` with every key known and every value of its field's type and in its range."""
    for key in values:
        check_known(key, _fields(cls), "unknown key")
    return cls(**{key: _coerce(cls, key, value, f"--{key}") for key, value in values.items()})


def of_table(cls: type[C], values: Mapping[str, Any], where: str, also: typing.Iterable[str] = ()) -> C:
    """A config from a table of a TOML file, every key known and every value checked; keys in `also` are left out.

    Args:
        where: the file and the table, for the message, as in `plan.toml: [power]`.
    """
    skipped, found = set(also), dict[str, Any]()
    for key, value in values.items():
        check_known(key, [*_fields(cls), *skipped], f"{where} unknown key".lstrip())
        if key not in skipped:
            found[key] = _coerce(cls, key, value, f"{where} {key} =")
    return cls(**found)


def to_toml(config: Any, table: str, origin: Mapping[str, tuple[str, str]] | None = None) -> str:
    """A config as one TOML table, every field spelled out; `origin` of `explain` becomes comments."""
    # JSON's strings are TOML's, but for escaped pairs of surrogates and for DEL as it is.
    values = {name: json.dumps(value, ensure_ascii=False) for name, value in dataclasses.asdict(config).items()}
    lines = [f"{name} = {text}".replace("\x7f", "\\u007f") for name, text in values.items()]
    if origin:
        comments = (": ".join(filter(None, origin[name])) for name in values)
        comments = ("".join(c if c.isprintable() else "?" for c in comment) for comment in comments)
        lines = [f"{line}  # {comment}" for line, comment in zip(lines, comments, strict=True)]
    return f"[{table}]\n" + "\n".join(lines) + "\n"


def differences(old: Mapping[str, Any], new: Any) -> list[str]:
    """How a stored config differs from `new`, in the fields that a continuation must not change.

    A field that is younger than the stored config had its default then.
    """
    fixed = [f for f in dataclasses.fields(new) if not f.metadata["runtime"]]
    kept = {f.name for f in fixed if f.metadata["settled"] and getattr(new, f.name) == "auto"}
    pairs = [(f.name, old.get(f.name, f.default), getattr(new, f.name)) for f in fixed if f.name not in kept]
    return [f"{name}: {before!r} then, {now!r} now" for name, before, now in pairs if before != now]


def _fields(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _layer(tables: Mapping[str, dict[str, Any]], section: str) -> dict[str, Any]:
    known = _fields(SECTIONS[section])
    common = {key: value for key, value in tables.get("common", {}).items() if key in known}
    return common | tables.get(section, {})


def _of_file(tables: Mapping[str, dict[str, Any]], section: str, kind: str, where: str) -> list[Layer]:
    """The layers of a file, or of its tables for one task: what is common to the stages, and over it the stage's own.

    Args:
        where: the file, and the beginning of a table's name.
    """
    common = {key: value for key, value in tables.get("common", {}).items() if key in _fields(SECTIONS[section])}
    own = tables.get(section, {})
    return _over_algorithm(Layer(kind, f"{where}common]", common), Layer(kind, f"{where}{section}]", own))


def _over_algorithm(*layers: Layer) -> list[Layer]:
    """Layers that count as one, and under them the settings of the algorithm that they name, if they name one."""
    naming = [layer for layer in layers if "algorithm" in layer.values]
    if not naming or not (name := naming[-1].values["algorithm"]):
        return list(layers)
    check_known(str(name), ALGORITHMS, "unknown algorithm")
    return [Layer(naming[-1].kind, f"algorithm {name}, {naming[-1].where}", ALGORITHMS[name]), *layers]


def check_known(name: str, names: typing.Iterable[str], message: str) -> None:
    """Raise `ConfigError` for a name that is not one of `names`, with the nearest of them."""
    names = sorted(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
        raise ConfigError(f"{message} {name!r}{hint}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _coerce(cls: type, key: str, value: Any, said: str) -> Any:
    """`value` as the field's type and in its range; text (from `--set`) is parsed, nothing else is converted silently.

    Args:
        said: how the value was given, for the message: `--lr`, or `recipe.toml: [sft] lr =`.
    """
    hint, field = _hints(cls)[key], cls.__dataclass_fields__[key]  # type: ignore[attr-defined]
    if field.metadata.get("many") and isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = ",".join(value)

    def refuse(why: str) -> ConfigError:
        return ConfigError(f"{said} {_SHORT.repr(value)}: {why}")

    wrong = refuse(f"must be {getattr(hint, '__name__', str(hint).split('.')[-1])}")
    if isinstance(value, str) and ("\0" in value or not _is_text(value)):
        raise refuse("must be UTF-8 text without NUL")
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise refuse(f"must be one of {', '.join(choice or '(empty)' for choice in typing.get_args(hint))}")
        return value
    if hint is bool and isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise wrong
        return value.lower() == "true"
    number = value
    if hint in (int, float) and isinstance(value, str):
        try:
            number = hint(value)
        except ValueError:
            raise wrong from None
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        number = float(value) if abs(value) <= MOST else math.inf
    if type(number) is not hint:
        raise wrong
    if isinstance(number, int | float) and (why := out_of_range(number, field.metadata.get("range", {}))):
        raise refuse(f"{why} ({field.metadata['help']})")
    return number


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def _is_text(value: str) -> bool:
    """Whether it can be written: argv may hold bytes that are not UTF-8, as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)
