"""The first hour on a GPU in one command: right numbers, speed against the peak, memory, every default left out.

    python -m grpo_gsm8k.bench gpu --out artifacts/gpu
    python -m grpo_gsm8k.bench gpu --device cpu --sizes toy

torch, transformers and safetensors suffice; what needs more is skipped with a reason. Parts run one after the other in
this process, and each writes what it has to `gpu.json` and `gpu.md` in `--out` after every row: a run that is cut off
goes on where it was when the same command is given again. A part that fails names the line, and the next one begins.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from grpo_gsm8k import repro
from grpo_gsm8k.bench.gpu import kernels, parity, sampling, updates
from grpo_gsm8k.bench.gpu.tools import FAULTS, SHAPES, Part, Skip, installed, last_line, short
from grpo_gsm8k.errors import ConfigError

FLAGS: dict[str, tuple[Any, str]] = {
    "device": ("cuda", "cuda, cuda:N, or cpu to try the command itself"),
    "dtype": ("bfloat16", "of the models whose speed is measured"),
    "sizes": ("0.5b,1.5b", "models of these shapes, random weights: toy, 0.5b, 1.5b"),
    "parts": ("all", "some of the parts, separated by commas"),
    "budget_s": (540.0, "seconds; what has no room in them is left for the next call"),
    "out": ("artifacts/gpu", "folder of gpu.json and gpu.md"),
    "again": (False, "measure parts that are in gpu.json already once more"),
    "devices": (1, "2: also ranks over NCCL, and the trainer beside the sampler"),
    "tokens": (100_000, "tokens of a measured update, about"),
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All parts that are asked for and not there yet, within the budget."""
    began = float(os.environ.get("GRPO_GSM8K_BENCH_BEGAN", time.time()))
    resumed = "GRPO_GSM8K_BENCH_BEGAN" in os.environ
    names = list(PARTS) if args.parts == "all" else args.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise ConfigError(f"--parts {unknown[0]}: known are {', '.join(PARTS)}")
    if unknown := [size for size in args.sizes.split(",") if size not in SHAPES]:
        raise ConfigError(f"--sizes {unknown[0]}: known are {', '.join(SHAPES)}")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as deterministic parts need it; read once a process
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    found = _earlier(out / "gpu.json")
    found |= {
        "machine": _machine(args),
        "commit": os.environ.get("GRPO_GSM8K_COMMIT") or repro.git_commit(),
        "parts": found.get("parts", {}),
    }
    found.setdefault("commands", []).append(shlex.join(sys.argv))
    if not args.device.startswith("cpu"):
        faulthandler.dump_traceback_later(args.budget_s + 45, exit=True)  # a hang says where, and ends
    for name in names:
        done = found["parts"].get(name, {}).get("status")
        if (done == "ok" and not args.again) or (resumed and done == "failed"):
            continue
        if time.time() - began > args.budget_s:
            _say(f"{name}: left out, {args.budget_s:.0f} s are over")
            continue
        found["parts"][name] = {"status": "running", "rows": {}}
        _one(name, args, found, out, began)
    faulthandler.cancel_dump_traceback_later()
    return found


def _one(name: str, args: argparse.Namespace, found: dict[str, Any], out: Path, began: float) -> None:
    """One part; whatever happens in it is written down and does not reach the others."""
    part, started = found["parts"][name], time.perf_counter()
    try:
        for row, figures in PARTS[name](args):
            part["rows"][row] = figures
            _say(f"{name}: {row}: " + "  ".join(f"{k} {short(v)}" for k, v in figures.items()))
            _write(found, out)
            if time.time() - began > args.budget_s:
                raise Skip(f"cut off after {args.budget_s:.0f} s")
        part["status"] = "ok"
    except Skip as reason:
        part |= {"status": "skipped", "reason": str(reason)}
    except ImportError as fault:
        part |= {"status": "skipped", "reason": f"{fault.name or fault} is not installed"}
    except FAULTS as fault:  # the other parts still count
        part |= {"status": "failed", "reason": last_line(fault)}
    repro.set_deterministic(False)
    part["seconds"] = time.perf_counter() - started
    _say(f"{name}: {part['status']} in {part['seconds']:.1f} s {part.get('reason', '')}".rstrip())
    _write(found, out)
    gc.collect()
    if args.device.startswith("cuda"):
        _let_go(began)


def _let_go(began: float) -> None:
    """Free the GPU's memory. After a fault that CUDA does not recover from, go on in a process of its own."""
    import torch

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as fault:
        _say(f"CUDA is lost ({str(fault).splitlines()[0]}): going on in a new process")
        os.environ["GRPO_GSM8K_BENCH_BEGAN"] = str(began)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "grpo_gsm8k.bench", *sys.argv[1:]])


def _earlier(path: Path) -> dict[str, Any]:
    """What an earlier call of this command left; a part that it was cut off in begins anew."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _write(found: dict[str, Any], out: Path) -> None:
    for name, text in (("gpu.json", json.dumps(found, indent=1) + "\n"), ("gpu.md", markdown(found))):
        fresh = out / f".{name}"
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(out / name)


def markdown(found: dict[str, Any]) -> str:
    """The same for people: what was measured on what, and a table a part."""
    machine = found["machine"]
    lines = [f"## {machine['device']}", ""]
    lines += [f"- {key}: {short(value)}" for key, value in machine.items() if key != "device"]
    lines += [f"- commit: {found['commit']}", *(f"- `{command}`" for command in found["commands"])]
    for name, part in found["parts"].items():
        seconds = f" ({part['seconds']:.0f} s)" if "seconds" in part else ""
        lines += ["", f"### {name}: {part['status']}{seconds} {part.get('reason', '')}".rstrip(), ""]
        lines += [
            f"- {row}: " + ", ".join(f"{k} {short(v)}" for k, v in rows.items()) for row, rows in part["rows"].items()
        ]
    return "\n".join(lines) + "\n"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on, and what is there that a part may want."""
    import torch

    packages = ("transformers", "triton", "safetensors", "peft", "vllm", "liger-kernel", "flash-attn")
    there = {name: installed(name) for name in packages}
    gpu = args.device.startswith("cuda")
    if gpu and not torch.cuda.is_available():
        raise ConfigError(f"--device {args.device}: torch sees no GPU here; --device cpu --sizes toy tries the command")
    return {
        "device": torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores",
        "memory_gb": torch.cuda.mem_get_info()[1] / 1e9 if gpu else 0.0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        **there,
    }


PARTS: dict[str, Part] = {
    "peaks": kernels.peaks,
    "parity": parity.parity,
    "sampler": sampling.sampler,
    "update": updates.update,
    "step": sampling.step,
    "head": kernels.head,
    "determinism": sampling.determinism,
    "zoo": parity.zoo,
    "ablation": updates.ablation,
    "large": updates.large,
    "attention": kernels.attention,
    "profile": updates.profile,
    "offload": updates.offload,
    "vllm": sampling.vllm,
    "devices": sampling.devices,
}
"""In the order of their worth: a budget cuts off the last."""
