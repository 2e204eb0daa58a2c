"""Every setting of the launcher, declared once: a field is a flag and its help."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from grpo_gsm8k.config import opt
from grpo_gsm8k.errors import ConfigError

API = "https://api.runpod.io/v2"
PREFERENCE = ("NVIDIA L40S", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200")
COUNTS = (1, 2, 4, 6, 8)
MODAL_GPUS = ("T4", "L4", "A10", "L40S", "A100-40GB", "A100-80GB", "H100", "H200", "B200")


@dataclass(frozen=True)
class PlanConfig:
    """What is to be trained, and on what."""

    model_id: str = opt("Qwen/Qwen2.5-Math-1.5B", "model on the hub", metavar="MODEL")
    method: Literal["sft", "lora", "grpo", "grpo-lora"] = opt("grpo", "what is trained, and whether it samples too")
    lora_rank: int = opt(32, "rank of the adapters (lora, grpo-lora)", ge=1)
    microbatch_tokens: int = opt(8192, "tokens of one forward pass, as max_tokens_per_microbatch", ge=1, expert=True)
    activation_checkpointing: bool = opt(
        True, "as in training; on here, where the least that suffices is asked for", expert=True
    )
    optimizer_device: Literal["auto", "cpu"] = opt(
        "auto", "cpu: AdamW's state in main memory, as in training", expert=True
    )
    sampled_tokens: int = opt(65536, "tokens in the sampler's cache: sequences x length", ge=0, expert=True)
    kl: bool = opt(False, "with a KL term: a reference model beside the trained one", expert=True)
    sleep: bool = opt(True, "the sampler sleeps while the trainer trains", expert=True)
    total_tokens: float = opt(1e8, "tokens trained in all, for the estimate of time", gt=0)
    gpu: str = opt("", "GPU ids in order, comma separated; empty for L40S, A100 SXM, H100 SXM, H200")
    count: int = opt(0, "GPUs of a pod: 1, 2, 4, 6 or 8; 0 for the fewest that suffice (`up`: 1)", ge=0, le=8)
    cloud: Literal["SECURE", "COMMUNITY"] = opt("SECURE", "whose machines")
    repo_id: str = opt("", "hub repository that checkpoints are pushed to; push rights are checked first")


@dataclass(frozen=True)
class UpConfig:
    """One job on one pod."""

    image: str = opt(
        "",
        "container image, best by digest: ghcr.io/owner/name@sha256:…; empty: the environment's GRPO_GSM8K_IMAGE, else "
        "the latest release of the repository on GitHub that this checkout is a clone of",
    )
    model_id: str = opt(
        "",
        "model on the hub that the job trains: access, size and memory are checked first; empty: as the job says. "
        "Without a job, GRPO trains it on GSM8K",
    )
    sft: bool = opt(False, "without a job: supervised fine-tuning instead of GRPO")
    skip_setup: bool = opt(False, "without a job: do not try machine and model with `doctor` first")
    preflight: bool = opt(True, "ask the hub about the job's model before anything is rented")
    report_to: Literal["", "none", "wandb"] = opt(
        "",
        "wandb: the job must get WANDB_API_KEY; none: it does not get it; empty: it does if --pass_env and you have it",
    )
    budget: float = opt(0.0, "dollars that the run may cost in all; must be given", ge=0, le=1e6)
    hours: float = opt(0.0, "hours that it may take in all; 0 for what the budget pays, at most 24", ge=0, le=720)
    gpu: str = opt("", "GPU ids in order, comma separated; empty for L40S, A100 SXM, H100 SXM, H200")
    count: int = opt(1, "GPUs of the pod: 1, 2, 4, 6 or 8", ge=0, le=8)
    min_memory: float = opt(0.0, "GiB that a GPU must have at least; 0: what the job's model needs, if known", ge=0)
    cloud: Literal["SECURE", "COMMUNITY"] = opt("SECURE", "whose machines")
    min_cuda: str = opt("13.0", "oldest CUDA version of the driver; empty for any", expert=True)
    disk: int = opt(120, "GB of the container's disk", ge=1, le=100_000)
    volume: str = opt("", "id of a network volume, mounted at /workspace", expert=True)
    registry: str = opt("", "id of the provider's stored login for a private image", expert=True)
    name: str = opt("run", "short name of the run: letters and digits")
    fetch: str = opt("artifacts", "what to bring home, relative to the job's folder; empty for nothing but the log")
    fetch_gb: float = opt(256.0, "GB of results that may come home in all", gt=0, le=1e6, expert=True)
    fetch_file_gb: float = opt(128.0, "GB of a single file of them", gt=0, le=1e6, expert=True)
    fetch_files: int = opt(200_000, "number of them", ge=1, le=10_000_000, expert=True)
    repo_id: str = opt(
        "",
        "hub repository that checkpoints are pushed to, and continued from after a dead host; in the end it holds the "
        "trained model with its card",
    )
    public: bool = opt(False, "--repo_id may be a public repository: all that is pushed is published")
    push_every_s: float = opt(600.0, "seconds between pushes", gt=0, le=1e7, expert=True)
    restarts: int = opt(2, "new pods after a dead host; only with --repo_id", ge=0, le=1000, expert=True)
    pass_env: str = opt("HF_TOKEN,WANDB_API_KEY", "environment variables that the job gets, over ssh")
    think_open: str = opt(
        "",
        "opens the reasoning; tags are appended to the command, and come in pairs; empty: <think>",
        expert=True,
    )
    think_close: str = opt("", "closes the reasoning; empty: </think>", expert=True)
    answer_open: str = opt(
        "", "opens the answer; empty, beside other tags or without a job: think-only prompts", expert=True
    )
    answer_close: str = opt("", "closes the answer", expert=True)
    insecure_host_key: bool = opt(False, "take any ssh host key where the container's log shows none", expert=True)
    webhook: str = opt("", "URL for progress events; better in GRPO_GSM8K_WEBHOOK, which no process list shows")
    webhook_form: Literal["plain", "discord", "slack"] = opt("plain", "shape of the events", expert=True)
    state_dir: str = opt("artifacts/launch", "where runs are recorded on this machine", metavar="PATH", expert=True)
    rounds: int = opt(3, "times that the list of GPUs is walked when none is free", ge=0, le=1000, expert=True)
    round_s: float = opt(
        30.0, "seconds before the second round; then twice as long each time", ge=0, le=1e7, expert=True
    )
    place_s: float = opt(300.0, "deadline for a machine", gt=0, le=1e7, expert=True)
    pull_s: float = opt(1500.0, "deadline for the image", gt=0, le=1e7, expert=True)
    ssh_s: float = opt(180.0, "deadline for ssh, also when it comes back", gt=0, le=1e7, expert=True)
    fetch_s: float = opt(1800.0, "deadline for the results", gt=0, le=1e7, expert=True)
    delete_s: float = opt(300.0, "how long a failing delete is tried again", gt=0, le=1e7, expert=True)
    poll_s: float = opt(5.0, "seconds between questions", gt=0, le=1e7, expert=True)
    backoff_s: float = opt(
        1.0, "first wait after a failed request; then twice as long each time", ge=0, le=1e7, expert=True
    )
    grace_s: float = opt(
        900.0,
        "how long a pod whose job has ended waits for the launcher before it ends itself",
        ge=0,
        le=1e7,
        expert=True,
    )
    stale_s: float = opt(3600.0, "silence of a job after which the pod ends itself", gt=0, le=1e7, expert=True)

    def __post_init__(self) -> None:
        if self.count not in COUNTS:
            raise ConfigError(f"--count {self.count}: must be one of {', '.join(map(str, COUNTS))}")
        if not self.name.isascii() or not self.name.isalnum() or not self.name.islower() or len(self.name) > 20:
            raise ConfigError(f"--name {self.name!r}: at most 20 lower-case letters and digits")


@dataclass(frozen=True)
class ExportConfig:
    """How a model is served elsewhere."""

    model: str = opt(
        "", "folder of a model or a LoRA adapter, such as a checkpoint; a name on the hub; or tinker://RUN/weights/NAME"
    )
    out: str = opt("", "folder that is written; must not exist")
    modal: bool = opt(False, "write modal_app.py and modal_client.py: vLLM on Modal, scaled to zero")
    compose: bool = opt(False, "write compose.yaml and client.py: vLLM on a GPU of one's own machine")
    base_url: str = opt("", "service that a tinker:// path is downloaded from; empty for TINKER_BASE_URL")
    base: str = opt("", "base model of a downloaded adapter, where the service's own name for it is unknown here")
    name: str = opt("grpo-model", "of the app, and of the model in requests: lower-case letters, digits and -")
    gpu: str = opt("L4", f"GPU as Modal names it, :N for several: {', '.join(MODAL_GPUS)}")
    max_model_len: int = opt(0, "longest prompt and answer in tokens; 0 for the model's context", ge=0)
    revision: str = opt("", "revision of a model on the hub; empty for its default branch")
    scaledown_s: int = opt(300, "idle seconds after which Modal gives the GPU back", ge=2, le=3600)
    max_containers: int = opt(1, "GPUs, or groups of :N, that Modal rents at most at once", ge=1, le=1000)
    proxy_auth: bool = opt(True, "Modal asks for a proxy token, too, so that strangers cannot start the GPU")
    hub_secret: str = opt("", "name of a Modal secret with HF_TOKEN, for a gated model on the hub")
    port: int = opt(8000, "of compose.yaml, on the loopback address", ge=1, le=65535)

    def __post_init__(self) -> None:
        for flag in ("model", "out"):
            if not getattr(self, flag):
                raise ConfigError(f"--{flag} must be given")
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", self.name):
            raise ConfigError(f"--name {self.name!r}: at most 40 lower-case letters, digits and -")
        if self.hub_secret and not re.fullmatch(r"[\w.-]{1,64}", self.hub_secret):
            raise ConfigError(f"--hub_secret {self.hub_secret!r}: a Modal secret's name has letters, digits, - . and _")
        if self.revision and not re.fullmatch(r"[\w.][\w./-]{0,199}", self.revision):
            raise ConfigError(f"--revision {self.revision!r}: is no branch, tag or commit")
        if self.gpu_and_count[0] not in MODAL_GPUS or not 1 <= self.gpu_and_count[1] <= 8:
            raise ConfigError(f"--gpu {self.gpu}: must be one of {', '.join(MODAL_GPUS)}, with :1 to :8 behind it")

    @property
    def gpu_and_count(self) -> tuple[str, int]:
        """("H100", 2) of H100:2."""
        name, _, count = self.gpu.partition(":")
        return name, int(count or 1) if count.isdecimal() or not count else 0


def api_key() -> str:
    """The provider's key, from the environment and nowhere else. Raises `ConfigError`."""
    key = os.environ.get("RUNPOD_API_KEY", "").strip()
    if not key:
        raise ConfigError("the environment variable RUNPOD_API_KEY holds no key; set it")
    return key


def api_base() -> str:
    """The API's address; RUNPOD_API_BASE_URL overrides it."""
    return os.environ.get("RUNPOD_API_BASE_URL", API).rstrip("/")
