"""What a pod is to do, and what is known of it before a cent is spent: command, image, model and memory."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from grpo_gsm8k import config, originals, repro
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.launch import records
from grpo_gsm8k.launch.settings import PlanConfig, UpConfig
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.tasks.base import Tags, make_tags
from grpo_gsm8k.trainer.costs import GIB

IMAGE = "GRPO_GSM8K_IMAGE"
HERE = ("artifacts/", ".", "/", "~")  # how a path begins that is no name on the hub
DATA = "artifacts/data"


def job_of(cfg: UpConfig, command: Sequence[str]) -> list[str]:
    """The command of the pod, tags appended. Flags alone belong to the training of `--model_id`.

    Raises:
        ConfigError: there is neither a command nor a model, or half a pair of tags.
    """
    tags = {name: getattr(cfg, name) for name in ("think_open", "think_close", "answer_open", "answer_close")}
    given = bool(command) and not command[0].startswith("-")
    if given and not any(tags.values()):
        return list(command)
    if not (tags["think_open"] or tags["think_close"]):
        tags |= {"think_open": Tags.think_open, "think_close": Tags.think_close}
    make_tags(**tags)
    words = [word for name, tag in tags.items() for word in (f"--{name}", tag)]
    return [*command, *words] if given else training(cfg, [*words, *command])


def training(cfg: UpConfig, flags: Sequence[str]) -> list[str]:
    """A shell's command: try the machine and the model, fetch GSM8K, train. It goes on in a pod that comes after."""
    if not cfg.model_id:
        raise ConfigError(
            "give the job behind --, as in: launch up --budget 5 -- grpo-gsm8k demo; or --model_id, which is then "
            "trained by GRPO (--sft: fine-tuned) on GSM8K; --repo_id is where it is pushed to"
        )
    stage = "sft" if cfg.sft else "grpo"
    model = ["--model_id", cfg.model_id]
    train = ["grpo-gsm8k", stage, *model, "--data", DATA, "--out_dir", f"artifacts/runs/{stage}", "--resume"]
    train += ["--prompt_style", "r1_zero", *([] if cfg.sft else ["--engine", "vllm"]), *flags]
    setup = [] if cfg.skip_setup else [["grpo-gsm8k", "doctor", *model]]
    steps = [*setup, ["grpo-gsm8k", "data", "--out_dir", DATA], ["exec", *train]]
    return ["sh", "-c", " && ".join(map(shlex.join, steps))]


def with_image(cfg: UpConfig, command: Sequence[str]) -> UpConfig:
    """The config with an image: as given, as the environment says, or the latest release of this repository."""
    if cfg.image:
        return cfg
    image = records.environment([IMAGE]).get(IMAGE, "")
    owner = re.search(r"github\.com[:/]([\w.-]+)/", repro.origin())
    if not image and owner:
        samples = "-vllm" if any("vllm" in word for word in words_of(command)) else ""
        image = f"ghcr.io/{owner[1].lower()}/grpo-gsm8k:latest{samples}"
    if not image:
        raise ConfigError(f"--image is needed, best by digest: ghcr.io/owner/name@sha256:…; or set {IMAGE}")
    return replace(cfg, image=image)


def with_secrets(cfg: UpConfig) -> UpConfig:
    """The config whose job gets WANDB_API_KEY, or does not, as `--report_to` says. Raises `ConfigError`."""
    names = [name for name in records.names_in(cfg.pass_env) if cfg.report_to != "none" or name != "WANDB_API_KEY"]
    if cfg.report_to == "wandb":
        names = list(dict.fromkeys([*names, "WANDB_API_KEY"]))
        if not records.environment(["WANDB_API_KEY"]):
            raise ConfigError("--report_to wandb: the environment variable WANDB_API_KEY holds no key; set it")
    return replace(cfg, pass_env=",".join(names))


def with_memory(cfg: UpConfig, command: Sequence[str]) -> UpConfig:
    """The config that asks for GPUs on which the job's model fits, after the hub was asked for the model.

    Raises:
        ModelError: there is no such model, or this token may not load it.
    """
    asked = asked_of(command)
    model = cfg.model_id or model_of(asked)
    if not model or not cfg.preflight:
        return cfg
    from grpo_gsm8k.launch import hub, plan  # its client takes half a second to load

    access = hub.check_access(model)
    lora = int(asked.get("lora-rank") or 0)
    method = ("lora" if lora else "sft") if asked.get("stage") == "sft" else ("grpo-lora" if lora else "grpo")
    facts, why = hub.facts_of(access)
    if facts is None:
        say(f"{model}: this token may load it; {why}, so nobody knows what it needs: --min_memory {cfg.min_memory:g}")
        return cfg
    wanted = config.build(PlanConfig, {"model_id": model, "method": method, "lora_rank": lora or 32})
    gib = plan.need(facts, wanted, cfg.count) / GIB
    say(
        f"{model}: this token may load it; {facts.shape.parameters / 1e9:.2f} billion parameters, {method} needs about "
        f"{gib:.0f} GiB on each of {cfg.count} x GPU"
    )
    return cfg if cfg.min_memory else replace(cfg, min_memory=round(gib / plan.USABLE, 1))


# ------------------------------------------------------------------------------------------ reading a command


def words_of(command: Sequence[str]) -> Iterator[str]:
    """The words of a command, and of a script that a shell is given with -c."""
    for before, word in zip(["", *command], command, strict=False):
        if before == "-c":
            try:
                yield from shlex.split(word)
            except ValueError:  # a script that only a shell can read
                yield word
        else:
            yield word


def asked_of(command: Sequence[str]) -> dict[str, str]:
    """The stage that a command trains, and the values of its flags under their names here; the last one counts."""
    words, found = list(words_of(command)), dict[str, str]()
    for word, after in zip(words, [*words[1:], ""], strict=False):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[originals.name_here(name)] = value if equals else after
        elif word in ("sft", "ei", "grpo", "distill", "pipeline", "demo") and "stage" not in found:
            found["stage"] = word
    return found


def model_of(asked: dict[str, Any]) -> str:
    """The model on the hub that a command names, by itself or by its preset; "" for a folder or none."""
    model = asked.get("model-id", "")
    if not model and asked.get("preset") in config.preset_names():
        preset = config.preset_path(asked["preset"], asked.get("task", ""))
        model = config.read_toml(preset).get("common", {}).get("model_id", "")
    return model if model.count("/") == 1 and not model.startswith(HERE) else ""
