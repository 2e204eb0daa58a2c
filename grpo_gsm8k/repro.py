"""Seeds, determinism, and the snapshot that a run directory needs for a rerun.

`derive_seed` derives all seeds: sampling is seeded per (run seed, step, prompt, sample), so a resumed run draws the
same completions, in any order and batch. `snapshot` writes the command, the code and the machine into a run directory,
and never a secret.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from grpo_gsm8k.datatypes import Prompt, Request
from grpo_gsm8k.runs.files import write_atomic, write_json

# ---- seeds ---------------------------------------------------------------------------------------


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on the parts, their types and their order, and on nothing else.

    The parts are encoded as typed netstrings (`i2:42,` for 42 and `s2:42,` for "42"), which cannot be read in
    two ways; the seed is the upper 63 bits of the sha256. Platform and PYTHONHASHSEED play no part.

        derive_seed(run_seed, "sample", step, problem.id, index)
    """
    encoded = bytearray()
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"a seed is derived from int and str, not from {type(part).__name__}")
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else str(part).encode()
        encoded += b"%c%d:%b," % (b"s" if isinstance(part, str) else b"i", len(raw), raw)
    return int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big") >> 1


def requests(prompts: Sequence[Prompt], n: int, seed: int) -> list[Request]:
    """`n` completions of each prompt, each with a seed of its own, derived from (seed, example, sample).

    A prompt that occurs twice (more groups than prompts, or at the edge of an epoch) continues its sample numbers, and
    so draws other completions.
    """
    found, asked = list[Request](), Counter[str]()
    for prompt in prompts:
        first = n * asked[prompt.example.id]
        asked[prompt.example.id] += 1
        seeds = (derive_seed(seed, prompt.example.id, first + sample) for sample in range(n))
        found.append(Request(prompt.token_ids, tuple(seeds)))
    return found


@functools.lru_cache(maxsize=4)  # every step of an epoch needs its order
def shuffled(n: int, seed: int) -> tuple[int, ...]:
    """0 … n-1 shuffled by the seed."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return tuple(order)


def seed_everything(seed: int, deterministic: bool | None = None) -> None:
    """Seed the global generators of Python, numpy and torch (every device).

    For what draws from a global generator, such as weight initialisation and dropout. Sampling does not: it
    takes a generator of its own from `derive_seed`.

    Args:
        deterministic: also choose kernels, as `set_deterministic` does; None leaves them.
    """
    import numpy as np
    import torch

    if deterministic is not None:
        set_deterministic(deterministic)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---- determinism ---------------------------------------------------------------------------------


def set_deterministic(on: bool) -> None:
    """Choose deterministic kernels and full float32, or torch's defaults.

    Promised while on: the same program with the same inputs and seeds, on the same machine with the same
    packages and the same number of threads, ranks and GPUs, gives the same bits. An operation that has no
    deterministic kernel raises a `RuntimeError` instead of being used silently.

    Not promised: the same bits on another GPU model, driver, torch version, thread count or batch shape (a
    matrix product may sum in another order), nor from vLLM, whose batches depend on timing. TF32 is off, but
    bfloat16 stays as coarse as it is: determinism is not accuracy.

    Call it before the first CUDA operation: cuBLAS reads its two variables once per process. They remain in
    the environment afterwards, where child processes inherit them; `set_deterministic(False)` leaves them.
    """
    import torch

    if on:
        # Both values are deterministic; one that was chosen outside stays.
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in {":4096:8", ":16:8"}:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = False
    # `fp32_precision` is the interface since torch 2.9, but alone it does not override an earlier
    # set_float32_matmul_precision("high"), and whoever still reads cudnn.allow_tf32 gets a RuntimeError about
    # mixed interfaces. Set in this order, all of them agree, and none warns.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = not on
    torch.backends.fp32_precision = "ieee" if on else "none"  # type: ignore[attr-defined]


# ---- secrets -------------------------------------------------------------------------------------

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|COOKIE|WEBHOOK|BEARER", re.I)
# In flags a word must end with the stem, so that --api_key is one and --max_new_tokens is not.
_SECRET_FLAG = re.compile(
    r"(key|token|secrets?|passwd|passwords?|passphrase|credentials?|auth|authorization|cookies?|webhook|bearer)"
    r"(?![a-z0-9])",
    re.I,
)
_SECRET_VALUE = re.compile(
    r"[^\s/@]+:[^\s/@]*@"  # user:password@host
    r"|://[^\s/@]+@"  # https://token@host
    r"|[?&][^=&\s]*(?:key|token|secret|sig|signature|auth)[^=&\s]*="  # a signed link
    r"|\b(?:hf_|gh[opsu]_|sk-|xox[abp]-)[A-Za-z0-9_-]{16,}"  # the shapes of common keys
    r"|hooks\.slack\.com/services/|discord(?:app)?\.com/api/webhooks/"
    r"|\bbearer\s+\S|\bauthorization:",
    re.I,
)
_REDACTED = "[redacted]"


def _environment_secrets() -> list[str]:
    """The values of variables that look like secrets, the longest first; short ones would hit by chance."""
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 8}
    paths_and_numbers = {value for value in values if value.isdigit() or Path(value).is_absolute()}
    return sorted(values - paths_and_numbers, key=len, reverse=True)


def _without_environment_secrets(text: str) -> str:
    for secret in _environment_secrets():
        text = text.replace(secret, _REDACTED)
    return text


def redact_command(argv: Sequence[str]) -> list[str]:
    """The command with the values of secret flags, and values that look like secrets, replaced.

    Covered are `--api_key VALUE`, `--api-key=VALUE`, `NAME_TOKEN=VALUE`, links with credentials, and, wherever
    it occurs, the value of a secret-looking environment variable.
    """
    words, value_follows = [], False
    for word in argv:
        name, equals, value = word.partition("=")
        if value_follows and not word.startswith("--"):
            words.append(_REDACTED)
            value_follows = False
            continue
        is_secret = _SECRET_FLAG.search(name) is not None and re.fullmatch(r"[-\w.]+", name) is not None
        value_follows = is_secret and not equals and name.startswith("-")
        if is_secret and equals:
            words.append(f"{name}={_REDACTED}")
        elif _SECRET_VALUE.search(value if equals and name.startswith("-") else word):
            words.append(f"{name}={_REDACTED}" if equals and name.startswith("-") else _REDACTED)
        else:
            words.append(_without_environment_secrets(word))
    return words


_ENV_PREFIXES = (
    *("CUBLAS_", "CUDA_", "CUDNN_", "GOMP_", "HF_DATASETS_", "HF_HUB_", "KMP_", "LC_", "MKL_", "NCCL_"),
    *("NVIDIA_", "OMP_", "OPENBLAS_", "PYTORCH_", "SLURM_", "TORCH_", "TORCHINDUCTOR_", "TRANSFORMERS_"),
    *("TRITON_", "UV_", "VLLM_"),
)
_ENV_NAMES = frozenset(
    {
        *(
            "HF_ENDPOINT",
            "HF_HOME",
            "LANG",
            "LD_LIBRARY_PATH",
            "LD_PRELOAD",
            "PYTHONHASHSEED",
            "PYTHONPATH",
            "TZ",
        ),
        *("LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE", "WANDB_MODE", "WANDB_PROJECT"),
    }
)


def public_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that a rerun needs, by an allow-list, and never one that could carry a secret."""
    environment = os.environ if environment is None else environment
    secrets = _environment_secrets()
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name in _ENV_NAMES or name.startswith(_ENV_PREFIXES))
        and not _SECRET_NAME.search(name)
        and not _SECRET_VALUE.search(value)
        and not any(secret in value for secret in secrets)
    }


# ---- the code ------------------------------------------------------------------------------------

_CHECKOUT = Path(__file__).resolve().parent.parent
_DIFF_LIMIT = 1 << 20  # bytes; a diff beyond it is somebody's data, not code


def _git(*arguments: str, ok: tuple[int, ...] = (0,)) -> bytes | None:
    """The output of git in the package's checkout; None if git is missing, fails or hangs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(_CHECKOUT), *arguments],
            env=environment | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            check=False,
            capture_output=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode in ok else None


def _head(*options: str) -> str | None:
    """The commit, if this very package is tracked by git; a venv inside a foreign checkout does not count."""
    if not _git("ls-files", "--", "grpo_gsm8k/__init__.py"):
        return None
    head = _git("rev-parse", *options, "HEAD")
    return head.decode().strip() if head else None


def _untracked() -> list[str]:
    """Untracked files of the package: they run, so they belong to the snapshot."""
    listed = _git("ls-files", "-z", "--others", "--exclude-standard", "--", "grpo_gsm8k") or b""
    return [os.fsdecode(name) for name in listed.split(b"\0") if name]


def git_commit() -> str:
    """The short commit of the package's checkout, with "-dirty" if the code differs from it, else "nogit".

    An image without git tells its commit by GRPO_GSM8K_COMMIT.
    """
    head = _head("--short=8")
    if head is None:
        return os.environ.get("GRPO_GSM8K_COMMIT") or "nogit"
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return head + ("-dirty" if changed or _untracked() else "")


def origin() -> str:
    """The address that this checkout was cloned from; "" for none."""
    found = _git("remote", "get-url", "origin") if _head() else None
    return found.decode().strip() if found else ""


def _code_diff() -> str:
    """The diff of the running code to the commit, for `git apply`; at most about 1 MiB."""
    head = _head()
    if head is None:
        return f"# no git commit to compare with (commit {git_commit()})\n"
    options = ("--no-ext-diff", "--no-textconv", "--no-color", "--binary")
    diff = _git("diff", *options, "HEAD")
    if diff is None:
        return f"# commit {head}\n# git diff failed\n"
    for name in _untracked():
        diff += _git("diff", *options, "--no-index", "--", os.devnull, name, ok=(0, 1)) or b""
    text = f"# commit {head}\n"
    if len(diff) > _DIFF_LIMIT:
        digest = hashlib.sha256(diff).hexdigest()
        text += f"# cut: the first {_DIFF_LIMIT} of {len(diff)} bytes, sha256 of all {digest}\n"
        diff = diff[: diff.rfind(b"\n", 0, _DIFF_LIMIT) + 1]
    return text + _without_environment_secrets(diff.decode("utf-8", "replace"))


# ---- the machine ---------------------------------------------------------------------------------


def cpu_count() -> int:
    """The cores this process may use: affinity and the container's quota count, not the machine's number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def memory_bytes() -> int | None:
    """The memory this process may use: the machine's, or the container's limit where that is lower."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(limit).strip()
        if text.isdigit():
            memory = min(memory, int(text))
    return memory


def nvidia_gpus() -> list[dict[str, Any]]:
    """Name, memory, driver and compute capability of each NVIDIA GPU, as nvidia-smi tells; [] without it.

    It needs no CUDA context. All of the machine's GPUs are listed, whatever CUDA_VISIBLE_DEVICES says.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = "name,memory.total,driver_version,compute_cap"
    try:
        done = subprocess.run(
            [tool, f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            stdin=subprocess.DEVNULL,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    gpus = []
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4:
            name, memory, driver, capability = fields
            mebibytes = int(memory) if memory.isdigit() else None  # some devices answer [N/A]
            gpus.append({"name": name, "memory_mib": mebibytes, "driver": driver, "compute_capability": capability})
    return gpus


def compiler(gpu: bool) -> str | None:
    """The compiler that triton (on a GPU) or torch's inductor (on a CPU) would call; None where there is none."""
    ours = "clang++" if sys.platform == "darwin" else "g++"
    wanted = (os.environ.get("CC") or "cc", "gcc", "clang") if gpu else (os.environ.get("CXX") or ours,)
    return next(filter(None, map(shutil.which, wanted)), None)


def missing_for_compile(gpu: bool) -> str:
    """What torch.compile lacks on this machine; "" if nothing."""
    if gpu and importlib.util.find_spec("triton") is None:
        return "triton"
    if not compiler(gpu):
        return "a C compiler (gcc)" if gpu else "a C++ compiler (g++)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.is_file() else f"Python's headers ({header}, of python3-dev)"


def machine() -> dict[str, Any]:
    """The machine: everything that numbers and speed of a run may depend on."""
    import torch

    model = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.M)
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpu_model": model.group(1) if model else platform.processor(),
        "cpu_count": os.cpu_count(),
        "cpu_usable": cpu_count(),
        "memory_bytes": memory_bytes(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": nvidia_gpus(),
        "gpus_visible": torch.cuda.device_count(),
    }


def packages() -> list[str]:
    """`name==version` of everything installed, sorted."""
    found = {(d.metadata["Name"], d.version) for d in metadata.distributions() if d.metadata["Name"]}
    return sorted({f"{name}=={version}" for name, version in found}, key=str.lower)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


# ---- the snapshot --------------------------------------------------------------------------------


def snapshot(folder: Path, argv: Sequence[str] | None = None) -> None:
    """Write `command.txt`, `code.diff` and `sys/{packages.txt,machine.json,env.json}` into a run directory.

    What stands there from an earlier start is replaced: the caller decides which folder a resumed run gets.

    Args:
        folder: the run directory.
        argv: the command; by default the one this process was started with.

    Raises:
        DiskError: `folder` cannot be written.
    """
    command = shlex.join(redact_command(sys.orig_argv if argv is None else argv))
    # argv may hold bytes that are not UTF-8, as lone surrogates.
    write_atomic(folder / "command.txt", (command + "\n").encode("utf-8", "surrogateescape"))
    write_atomic(folder / "code.diff", _code_diff())
    write_atomic(folder / "sys" / "packages.txt", "".join(f"{line}\n" for line in packages()))
    write_json(folder / "sys" / "machine.json", machine())
    write_json(folder / "sys" / "env.json", public_environment())
