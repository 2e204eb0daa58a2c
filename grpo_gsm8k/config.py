"""Every setting of every stage: declared once here, with its help and its default.

From a field come the command-line flag, its help text and the TOML key. The layers, weakest first:
the default here, the preset (`presets/<name>.toml`, or the task's own in `presets/<task>/`), `--config FILE`, the
flags, `--set key=value`.
A layer that names an `algorithm` lays that paper's settings down first and its own over them; the flags and
`--set` count as one layer in this, so whatever is typed is stronger.
An unknown key is an error that names the nearest known one.

A TOML file has a table per stage (`[sft]`, `[ei]`, `[grpo]`, `[eval]`, `[prep-eval]`, `[pairs]`, `[tokenize]`,
`[tiny_model]`, `[toy]`)
and a table `[common]` whose keys go to every stage that knows them.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.extensions import is_users

T = TypeVar("T")
C = TypeVar("C")

PRESETS = Path(__file__).parent / "presets"
STAGES = ("base", "sft", "ei", "grpo")
ENGINES = ("hf", "vllm")


def opt(default: T, help: str, *, runtime: bool = False, also: str = "") -> T:
    """A field with its help. `runtime` fields may differ between a run and its continuation; `also`: a second flag."""
    return dataclasses.field(default=default, metadata={"help": help, "runtime": runtime, "also": also})


@dataclass(frozen=True)
class PromptConfig:
    """Which model, and how it is asked."""

    model_id: str = opt("Qwen/Qwen2.5-Math-1.5B", "model folder, or a name on the hub")
    revision: str = opt("", "revision of a model on the hub; empty for its default branch")
    cache_dir: str = opt("", "where hub models are kept; empty for the hub's default", runtime=True)
    task: str = opt("", "what is asked: gsm8k, or package.module:Class; empty: as the model was trained, else gsm8k")
    prompt_style: Literal["auto", "qwen_boxed", "r1_zero", "gsm8k"] = opt(
        "auto", "how a problem is asked; auto: as the model was trained here, else qwen_boxed"
    )
    think_open: str = opt("<think>", "opens the reasoning (r1_zero)")
    think_close: str = opt("</think>", "closes the reasoning (r1_zero)")
    answer_open: str = opt("<answer>", "opens the answer (r1_zero); empty for think-only prompts")
    answer_close: str = opt("</answer>", "closes the answer (r1_zero); empty for think-only prompts")
    date: str = opt(
        "", "what a chat template writes that asks for the date; empty: as the model was trained here, else 2024-07-26"
    )


@dataclass(frozen=True)
class PreferenceConfig(PromptConfig):
    """What the chat task prefers; see tasks/chat.py."""

    preference: str = opt(
        "length", "chat: reward by length, by a judge who compares answers (judge), or by package.module:function"
    )
    length_words: int = opt(0, "chat: length that is wished for, in words; 0: that of the reference answer")
    judge_base_url: str = opt(
        "", "chat: OpenAI-compatible endpoint of the judge, as in http://localhost:8000/v1", runtime=True
    )
    judge_model: str = opt("", "chat: the judge's name there")
    judge_api_key_env: str = opt(
        "", "chat: environment variable that holds the judge's key; empty: none is sent", runtime=True
    )
    judge_concurrency: int = opt(8, "chat: most calls of the judge at once", runtime=True)
    judge_budget: int = opt(0, "chat: most calls of the judge in this run directory; 0 for no limit", runtime=True)
    judge_timeout_s: float = opt(120.0, "chat: seconds that one call of the judge may take", runtime=True)


@dataclass(frozen=True)
class ModelConfig(PreferenceConfig):
    """Where the model is, and how its answers are taken."""

    device: str = opt("auto", "cpu, cuda, cuda:0, or auto")
    dtype: Literal["auto", "float32", "bfloat16"] = opt("auto", "auto: bfloat16 on a GPU, else float32")
    grading: Literal["strict", "flexible"] = opt("flexible", "strict demands a marked answer")
    max_new_tokens: int = opt(1024, "longest completion in tokens; the model's context may end it earlier")
    sample_rows: int = opt(256, "completions decoded side by side; vLLM on a GPU decodes at least 1024")
    seed: int = opt(0, "decides every random draw")
    deterministic: bool = opt(False, "bitwise repeatable kernels, TF32 off")
    wandb_project: str = opt(
        "grpo-gsm8k", "W&B project; used when WANDB_API_KEY is set or WANDB_MODE=offline", runtime=True
    )
    run_name: str = opt("", "name of the run; empty for the run directory's", runtime=True)


@dataclass(frozen=True)
class EngineConfig(ModelConfig):
    """Who samples, and where."""

    engine: str = opt(
        "hf", "hf: transformers in this process; vllm: in its own (as --vllm_device says); or package.module:Class"
    )
    vllm_device: str = opt(
        "", "cuda:1 or cpu; empty: a GPU that the trainer is not on, else the trainer's", runtime=True
    )
    vllm_devices: str = opt("", "several, as in cuda:1,cuda:2: an engine on each, sharing the prompts", runtime=True)
    tp_size: int = opt(1, "GPUs of one vLLM engine (tensor parallel), counted on from its device", runtime=True)
    gpu_mem_util: float = opt(
        0.0, "share of a GPU's memory that vLLM may take; 0: 0.9, or what a learner on that GPU leaves", runtime=True
    )
    max_model_len: int = opt(0, "longest sequence that vLLM plans for; 0 for the model's context", runtime=True)
    weight_transfer: Literal["file", "nccl", "ipc"] = opt(
        "file",
        "how weights reach vLLM: a file in shared memory; or its own transfer, GPU to GPU (nccl) or on one GPU (ipc)",
        runtime=True,
    )
    engine_patience_s: float = opt(600.0, "seconds without a sign of progress before an engine is lost", runtime=True)

    def __post_init__(self) -> None:
        if self.vllm_device or self.vllm_devices:  # so that the config says it, and a resumed run is held to it
            object.__setattr__(self, "engine", "vllm")
        if self.engine not in ENGINES and not is_users(self.engine):
            raise ConfigError(f"engine = {self.engine!r}: must be {', '.join(ENGINES)}, or package.module:Class")

    @property
    def uses_vllm(self) -> bool:
        """Whether vLLM samples."""
        return self.engine == "vllm"


@dataclass(frozen=True)
class PolicyConfig(EngineConfig):
    """What of the model is trained."""

    lora_rank: int = opt(0, "rank of LoRA adapters, which alone are trained; 0 trains every weight")
    lora_alpha: int = opt(32, "the adapters' product is scaled by lora_alpha / lora_rank")
    lora_targets: str = opt("all-linear", "which layers have an adapter: all-linear, or names such as q_proj,v_proj")


@dataclass(frozen=True)
class TrainConfig(PolicyConfig):
    """What SFT, expert iteration and GRPO have in common."""

    data: str = opt("artifacts/data", "folder with train.jsonl, val.jsonl and test.jsonl")
    out_dir: str = opt("", "run directory; empty for artifacts/runs/<UTC stamp>_<git sha>", runtime=True)
    resume: bool = opt(False, "continue the run if there is one, start it if there is none", runtime=True)
    max_steps: int = opt(
        0, "stop after this many steps; 0 for all. The schedule stays that of the whole run", runtime=True
    )
    save_every: int = opt(20, "steps between checkpoints", runtime=True)
    keep_last: int = opt(2, "checkpoints kept, besides the best one on validation", runtime=True)
    eval_every: int = opt(20, "steps between evaluations; 0 for none")
    eval_examples: int = opt(100, "validation problems per evaluation, answered greedily")
    eval_set_path: str = opt("", "evaluation set; empty for val.jsonl of --data")
    eval_mode: Literal["auto", "inline", "async"] = opt(
        "auto", "async: in a process of its own while training goes on; auto: so for SFT with vLLM, else inline"
    )
    eval_device: str = opt("", "where the asynchronous evaluator runs; empty for vLLM's device, else cpu", runtime=True)
    eval_backlog: Literal["all", "latest"] = opt(
        "all", "when the evaluator falls behind: keep all that wait, or only the latest", runtime=True
    )
    probe_prompts: int = opt(8, "prompts that prove each hand-over of weights to an engine process; 0 for none")
    probe_tolerance: float = opt(
        0.0, "largest mean |logp difference| of a probe; 0 for 1e-3 in float32 and 0.05 in bfloat16", runtime=True
    )
    lr: float = opt(1e-5, "peak learning rate")
    lr_schedule: Literal["constant", "cosine", "linear"] = opt("constant", "what follows the warm-up")
    warmup_steps: int = opt(0, "steps of linear warm-up")
    weight_decay: float = opt(0.0, "AdamW weight decay, on matrices only")
    beta1: float = opt(0.9, "AdamW beta1")
    beta2: float = opt(0.95, "AdamW beta2")
    grad_clip: float = opt(1.0, "largest gradient norm; 0 for no clipping")
    max_tokens_per_microbatch: int = opt(
        0,
        "tokens of one forward pass, where rows are packed, else rows x longest; 0: what fits a GPU (deterministic: "
        "8192), 3072 on a CPU",
    )
    packing: Literal["auto", "on", "off"] = opt(
        "auto", "no cell of padding, and a prompt read once for all its completions; auto: on a CPU, if the model can"
    )
    activation_checkpointing: bool = opt(
        False, "keep only each layer's input, and compute the rest again in the backward pass", runtime=True
    )
    compile: bool = opt(False, "compile each layer with torch.compile; needs a C++ compiler (CPU) or triton (GPU)")
    optimizer_device: Literal["auto", "cpu"] = opt(
        "auto", "auto: AdamW's state beside the model; cpu: in main memory, where its step is made", runtime=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile and self.deterministic:
            raise ConfigError(
                "--compile with --deterministic: kernels are made for the shapes that a process meets first, and a "
                "resumed run meets others; leave one of them out"
            )


@dataclass(frozen=True)
class SftConfig(TrainConfig):
    """Supervised fine-tuning on worked solutions."""

    data_path: str = opt(
        "",
        "JSONL of {prompt, response} or {messages}, a folder of shards, or a data set of the hub as "
        "hf:OWNER/NAME[:split][@REVISION]; empty for the solutions in --data",
    )
    train_on: Literal["last", "all"] = opt("last", "which assistant messages of a chat are trained")
    max_length: int = opt(2048, "longer examples are left out, and counted")
    epochs: int = opt(3, "passes over the data")
    batch_size: int = opt(64, "examples per optimizer step")
    lr: float = opt(1e-5, "peak learning rate")
    lr_schedule: Literal["constant", "cosine", "linear"] = opt("cosine", "what follows the warm-up")
    warmup_steps: int = opt(20, "steps of linear warm-up")


@dataclass(frozen=True)
class EiConfig(TrainConfig):
    """Expert iteration: sample, keep what is right, fine-tune on it, again."""

    rounds: int = opt(2, "rounds of sample, keep, fine-tune")
    prompts_per_round: int = opt(2048, "training problems sampled in a round")
    samples_per_prompt: int = opt(4, "completions per problem")
    keep_per_problem: int = opt(2, "right and distinct completions kept per problem")
    temperature: float = opt(1.0, "sampling temperature")
    top_p: float = opt(1.0, "nucleus mass")
    steps_per_round: int = opt(50, "optimizer steps of a round")
    batch_size: int = opt(64, "examples per optimizer step")


_PLAIN: dict[str, Any] = {
    "loss": "grpo_clip",
    "baseline": "group",
    "std_norm": True,
    "aggregation": "sequence",
    "clip_eps": 0.2,
    "clip_eps_high": 0.0,
    "dual_clip": 0.0,
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
}
"""Each paper's own settings, all of them spelled out: none is left over from the recipe below. Step counts, learning
rates and group sizes stay the recipe's."""


@dataclass(frozen=True)
class GrpoConfig(TrainConfig):
    """Group relative policy optimisation and its kin; the defaults are arXiv 2402.03300 without the KL term."""

    algorithm: str = opt("", f"a paper's settings over the recipe, weaker than flags: {', '.join(ALGORITHMS)}")
    loss: Literal["grpo_clip", "gspo", "cispo", "reinforce"] = opt("grpo_clip", "what is minimised")
    steps: int = opt(200, "GRPO steps: sample, grade, update")
    rollouts_per_step: int = opt(256, "completions per step; a multiple of the group size")
    group_size: int = opt(8, "completions per prompt")
    epochs: int = opt(1, "passes over a step's rollouts")
    minibatches: int = opt(1, "optimizer steps per pass")
    clip_eps: float = opt(0.2, "the ratio is clipped to [1 - clip_eps, 1 + clip_eps_high]")
    clip_eps_high: float = opt(0.0, "upper clip, if it differs; 0 for the same as clip_eps")
    dual_clip: float = opt(0.0, "most that the ratio counts where the advantage is negative; 0 for no bound")
    baseline: Literal["group", "leave_one_out", "none"] = opt(
        "group", "subtracted from a reward: its group's mean, the mean of the others in its group, or nothing"
    )
    std_norm: bool = opt(True, "divide advantages by the group's standard deviation")
    advantage_eps: float = opt(1e-6, "added to the group's standard deviation")
    aggregation: Literal["sequence", "token", "constant"] = opt(
        "sequence", "mean over a response then over responses (GRPO); over all tokens; or over max_new_tokens"
    )
    kl_coef: float = opt(0.0, "weight of the KL to the model that the run began with; 0 for none, at no cost")
    kl_estimator: Literal["k1", "k2", "k3"] = opt("k3", "estimator of that KL")
    kl_bias_correction: bool = opt(
        True, "weigh the estimator by the ratio, so that its gradient is that KL's; without, k3's is another KL's"
    )
    old_logprobs: Literal["sampler", "recompute"] = opt(
        "sampler",
        "denominator of the ratio: as sampled, or as the trainer has it before the step's updates (a frozen pass, "
        "where there are several)",
    )
    mode: Literal["on_policy", "one_step_off"] = opt(
        "on_policy", "one_step_off samples the next step's rollouts while the learner updates: at most one update old"
    )
    importance_correction: Literal["none", "truncate", "mask"] = opt(
        "none", "weigh each token by trainer / sampler probability: cut at importance_cap, or left out beyond it"
    )
    importance_cap: float = opt(2.0, "largest weight of the correction; mask leaves out below 1 / cap, too")
    mask_truncated: bool = opt(False, "leave completions cut at max_new_tokens out of the loss")
    resample_zero_variance: int = opt(0, "times that groups with equal rewards are replaced by fresh prompts")
    temperature: float = opt(1.0, "sampling temperature")
    top_p: float = opt(1.0, "nucleus mass; below 1 it is refused, since ratios would be wrong")
    reward: str = opt("default", "default: the task's; random (the control); or package.module:function")
    advantage: str = opt("", "package.module:function of a group's grades; empty for baseline and std_norm")
    format_weight: float = opt(0.2, "reward for the format")
    answer_weight: float = opt(0.8, "reward for the right answer")
    estimate: str = opt(
        "", "print the predicted memory and time on this GPU (H200, H100, A100, L40S, 4090, …) and exit", runtime=True
    )
    overlong_buffer: float = opt(
        0.0, "last share of max_new_tokens, over which a length penalty grows from 0 to -1; 0 for no penalty"
    )

    @property
    def frozen_pass(self) -> bool:
        """Whether old log-probabilities take a pass of their own. A step's only update finds what it would find."""
        return self.old_logprobs == "recompute" and self.epochs * self.minibatches > 1


@dataclass(frozen=True)
class EvalConfig(EngineConfig):
    """Accuracy of a model on a file of problems."""

    eval_path: str = opt("artifacts/data/test.jsonl", "problems, or the rows that prep-eval writes")
    limit: int = opt(0, "only the first so many problems; 0 for all")
    samples: int = opt(1, "completions per problem and seed")
    seeds: str = opt("", "several sampling seeds, as in 0,1,2; empty for --seed alone")
    temperature: float = opt(0.0, "0 is greedy")
    top_p: float = opt(1.0, "nucleus mass")
    shots: int = opt(0, "worked examples shown before each problem, drawn from --shots_path by --seed")
    shots_path: str = opt("", "training problems that the examples come from; never the evaluated ones")
    out_dir: str = opt("artifacts/baselines", "where the results file goes")


@dataclass(frozen=True)
class PrepEvalConfig(PromptConfig):
    """An evaluation set, rendered for one model."""

    data: str = opt("artifacts/data", "folder with train.jsonl, val.jsonl and test.jsonl")
    split: Literal["train", "val", "test"] = opt("val", "which of them")
    eval_path: str = opt("", "a file of problems instead", also="--infile")
    limit: int = opt(0, "only the first so many problems; 0 for all")
    out: str = opt("", "where the rows go; empty for artifacts/tokenized/<file>_for_vllm.jsonl", also="--outfile")


@dataclass(frozen=True)
class PairsConfig(PromptConfig):
    """Teacher traces as pairs to fine-tune on, for a model that is asked in this way."""

    traces: str = opt("artifacts/traces/traces.jsonl", "answers of a teacher", also="--infile")
    out: str = opt("artifacts/traces/pairs.jsonl", "where the pairs go", also="--outfile")
    part: Literal["auto", "content", "reasoning"] = opt(
        "auto", "what of a trace becomes the response; auto: the reasoning for r1_zero, else the content"
    )
    grading: Literal["strict", "flexible"] = opt("flexible", "strict demands a marked answer of the teacher, too")
    min_chars: int = opt(20, "shortest response in characters")
    max_chars: int = opt(8000, "longest response in characters")


@dataclass(frozen=True)
class TokenizeConfig(PromptConfig):
    """Pairs as shards of token ids, for one model."""

    data_path: str = opt("artifacts/traces/pairs.jsonl", "JSONL of {prompt, response} or {messages}", also="--infile")
    out_dir: str = opt("artifacts/tokenized/pairs", "folder of shards; continued if it was begun")
    max_total_tokens: int = opt(1024, "columns of a shard; longer examples are left out, and counted")
    train_on: Literal["last", "all"] = opt("last", "which assistant messages of a chat are trained")
    shard_rows: int = opt(1024, "lines of the file that make one shard")
    format: Literal["safetensors", "pt"] = opt("safetensors", "pt: a dict for torch.load(weights_only=True)")
    workers: int = opt(1, "processes")


@dataclass(frozen=True)
class TinyModelConfig:
    """The model that a pipeline makes on the spot when none is named."""

    vocab_size: int = opt(1024, "at most so many byte-level BPE tokens")
    hidden_size: int = opt(128, "width")
    layers: int = opt(2, "transformer layers")
    heads: int = opt(4, "attention heads; of 32 each at this width, the smallest that vLLM has kernels for")


@dataclass(frozen=True)
class ToyConfig:
    """The data that a pipeline makes on the spot when none is named: how many examples of each split."""

    train: int = opt(18000, "training examples")
    val: int = opt(200, "validation examples")
    test: int = opt(600, "held-out test examples")


@dataclass(frozen=True)
class PipelineConfig:
    """What the pipeline itself needs to know; the stages' settings come from the preset, `--set`, `--config`."""

    preset: str = opt("tiny", "recipe: tiny, quick or full")
    task: str = opt("", "what is asked: gsm8k, or package.module:Class; empty for the preset's")
    data: str = opt("", "folder with train.jsonl, val.jsonl, test.jsonl; empty for the preset's")
    model_id: str = opt("", "model to start from; empty for the preset's")
    out_dir: str = opt("", "pipeline directory; empty for artifacts/runs/<UTC stamp>_<git sha>")
    engine: str = opt("", "who samples in every stage, hf or vllm; empty for the preset's")
    stop_after: str = opt("", "last stage to run: base, sft, ei or grpo")
    max_steps: int = opt(0, "stop every training stage after this many steps; 0 for all")
    seed: int = opt(0, "decides every random draw")
    deterministic: bool = opt(False, "bitwise repeatable kernels, TF32 off")
    resume: bool = opt(False, "continue where an earlier call stopped")


TASK_SETTINGS = tuple(field.name for field in dataclasses.fields(PreferenceConfig) if "chat:" in field.metadata["help"])
"""Fields that reach a task as `TaskOptions.settings`."""

SECTIONS: dict[str, type] = {
    "sft": SftConfig,
    "ei": EiConfig,
    "grpo": GrpoConfig,
    "eval": EvalConfig,
    "prep-eval": PrepEvalConfig,
    "pairs": PairsConfig,
    "tokenize": TokenizeConfig,
    "tiny_model": TinyModelConfig,
    "toy": ToyConfig,
}


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
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise ConfigError(f"{path}: not a TOML file: {fault}") from None
    everywhere = {name for cls in SECTIONS.values() for name in _fields(cls)}
    for table, values in tables.items():
        _known(table, [*SECTIONS, "common"], f"{path}: unknown table")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {table!r} must stand in a table such as [grpo] or [common]")
        known = everywhere if table == "common" else _fields(SECTIONS[table])
        for key in values:
            _known(key, known, f"{path}: [{table}] unknown key")
    return tables


def resolve(
    section: str,
    *,
    preset: str | None = None,
    task: str = "",
    config_file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: typing.Sequence[str] = (),
) -> Any:
    """The config of one stage from all layers (see the module's docstring).

    Args:
        section: a key of `SECTIONS`.
        task: whose preset it is; by default that of the flags.
        flags: only those that were given.
        sets: `key=value` strings; `section.key=value` is for that section alone.

    Raises:
        ConfigError: for an unknown preset, key or value.
    """
    cls = SECTIONS[section]
    values: dict[str, Any] = {}
    typed = dict(flags or {})
    if preset:
        _known(preset, preset_names(), "unknown preset")
        values |= _over_algorithm(_layer(read_toml(preset_path(preset, task or str(typed.get("task", "")))), section))
    if config_file:
        values |= _over_algorithm(_layer(read_toml(config_file), section))
    for item in sets:
        key, equals, text = item.partition("=")
        table, dot, name = key.strip().rpartition(".")
        if not equals:
            raise ConfigError(f"--set {item}: must read key=value")
        if dot:
            _known(table, [*SECTIONS, "common"], f"--set {item}: unknown section")
            known = [key for stage in SECTIONS.values() for key in _fields(stage)]
            _known(name, known if table == "common" else _fields(SECTIONS[table]), f"--set {item}: unknown key")
        else:
            _known(name, _fields(cls), f"--set {item}: unknown key")
        if not dot or table == section or (table == "common" and name in _fields(cls)):
            typed[name] = text.strip()
    return build(cls, values | _over_algorithm(typed))


def build(cls: type[C], values: Mapping[str, Any]) -> C:
    """`cls(**values)` with every key known and every value of its field's type."""
    hints = typing.get_type_hints(cls)
    for key in values:
        _known(key, _fields(cls), "unknown key")
    return cls(**{key: _coerce(key, hints[key], value) for key, value in values.items()})


def to_toml(config: Any, table: str) -> str:
    """A config as one TOML table, every field spelled out."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in dataclasses.asdict(config).items()]
    return f"[{table}]\n" + "\n".join(lines) + "\n"


def differences(old: Mapping[str, Any], new: Any) -> list[str]:
    """How a stored config differs from `new`, in the fields that a continuation must not change."""
    fixed = [f for f in dataclasses.fields(new) if not f.metadata["runtime"]]
    pairs = [(f.name, old.get(f.name), getattr(new, f.name)) for f in fixed]
    return [f"{name}: {before!r} then, {now!r} now" for name, before, now in pairs if before != now]


def _fields(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _layer(tables: Mapping[str, dict[str, Any]], section: str) -> dict[str, Any]:
    known = _fields(SECTIONS[section])
    common = {key: value for key, value in tables.get("common", {}).items() if key in known}
    return common | tables.get(section, {})


def _over_algorithm(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer, with the settings of the algorithm that it names (if it names one) laid under it."""
    if not (name := layer.get("algorithm")):
        return dict(layer)
    _known(str(name), ALGORITHMS, "unknown algorithm")
    return {**ALGORITHMS[name], **layer}


def _known(name: str, names: typing.Iterable[str], message: str) -> None:
    names = sorted(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
        raise ConfigError(f"{message} {name!r}{hint}")


def _coerce(key: str, hint: Any, value: Any) -> Any:
    """`value` as the field's type; text (from `--set`) is parsed, nothing else is converted silently."""
    wrong = ConfigError(f"{key} = {value!r}: must be {getattr(hint, '__name__', str(hint).split('.')[-1])}")
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{key} = {value!r}: must be one of {', '.join(typing.get_args(hint))}")
        return value
    if hint is bool and isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise wrong
        return value.lower() == "true"
    if hint in (int, float) and isinstance(value, str):
        try:
            return hint(value)
        except ValueError:
            raise wrong from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise wrong
    return value
