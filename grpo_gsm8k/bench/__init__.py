"""Benchmarks, side by side with others in one run; torch and transformers are all that they need.

    python -m grpo_gsm8k.bench update --prompts 4 --group 4 --vs trl --json
    python -m grpo_gsm8k.bench sample --json
    python -m grpo_gsm8k.bench step --json
    python -m grpo_gsm8k.bench gpu --out artifacts/gpu

Every contestant is measured in a process of its own, one after the other and in turns, so that what else the machine
does hits all of them. Figures are medians over the rounds; a ratio is the median of the ratios within a round, given
with the smallest and the largest, which is how noisy it was. `--threads` is the same for all.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from grpo_gsm8k import config
from grpo_gsm8k.argv import Parser
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.trainer import costs

METAVARS = {int: "INTEGER", float: "FLOAT", str: "TEXT"}
COMMANDS = ("update", "sample", "step", "gpu")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    args = parser().parse_args([spelled(word) for word in (sys.argv[1:] if argv is None else argv)])
    check(args)
    module = importlib.import_module(f"grpo_gsm8k.bench.{args.command}")
    if args.alone and args.threads:
        import torch

        torch.set_num_threads(args.threads)
    found = module.measure(args.alone, args) if args.alone else module.run(args)
    if args.json or args.alone:
        print(json.dumps(found))
    else:
        print("\n".join(table(found)))


def parser() -> argparse.ArgumentParser:
    """The door; `-` and `_` are the same in flags."""
    top = Parser(prog="grpo-gsm8k bench", description=(__doc__ or "").split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        imported = importlib.import_module(f"grpo_gsm8k.bench.{name}")
        one = commands.add_parser(name, help=(imported.__doc__ or "").split("\n")[0])
        flags: dict[str, tuple[Any, str]] = {**SHARED, **imported.FLAGS}
        for flag, (default, text) in flags.items():
            if default is False:
                one.add_argument(f"--{flag}", action="store_true", help=text)
            else:
                kind, told = type(default), f"{text} [default: {default}]" if default != "" else text
                one.add_argument(f"--{flag}", default=default, type=kind, metavar=METAVARS[kind], help=told)
    return top


def spelled(word: str) -> str:
    """A flag with `_` for `-`; what is no flag stays."""
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if flag.startswith("--") else word


def check(args: argparse.Namespace) -> None:
    """Refuse numbers and names that cannot be measured. Raises `ConfigError`."""
    flags = {**SHARED, **importlib.import_module(f"grpo_gsm8k.bench.{args.command}").FLAGS}
    for name, (default, text) in flags.items():
        value = getattr(args, name)
        if isinstance(default, bool) or not isinstance(default, int | float):
            continue
        bounds = {"at least": 0 if name in MAY_BE_0 else 1, "at most": SHARES.get(name, 10**9)}
        if why := config.out_of_range(value, bounds):
            raise ConfigError(f"bench {args.command} --{name} {value}: {why} ({text})")
    for name, known in CHOICES.items():
        value = getattr(args, name, "")
        if value and value not in known and not (name == "device" and value.startswith("cuda:")):
            raise ConfigError(f"bench {args.command} --{name} {value}: must be one of {', '.join(known)}")
    for size in getattr(args, "completions", "1").split(","):
        if not (size.isascii() and size.isdigit() and 0 < len(size) < 10 and int(size)):
            raise ConfigError(f"--completions {args.completions}: must be whole numbers above 0, as in 32,128")
    if args.hidden % (2 * args.heads) or args.heads % args.kv_heads:
        raise ConfigError("--hidden must be a multiple of 2 * heads, and --heads one of kv_heads")


MAY_BE_0 = frozenset({"threads", "flat", "temperature"})
SHARES = {"flat": 1}
CHOICES = {"device": ("cpu", "cuda"), "dtype": ("float32", "bfloat16"), "vs": ("trl",)}

SHARED: dict[str, tuple[Any, str]] = {
    "json": (False, "print one JSON object"),
    "repeats": (3, "rounds"),
    "threads": (0, "threads of each process; 0 for torch's own choice"),
    "device": ("cpu", "cpu or cuda"),
    "dtype": ("float32", "float32 or bfloat16"),
    "hidden": (256, "width of the Qwen2-shaped model, its weights random"),
    "layers": (4, "its layers"),
    "heads": (4, "its attention heads"),
    "kv_heads": (2, "its heads of keys and values"),
    "intermediate": (1024, "width of its MLP"),
    "vocabulary": (151_936, "its tokens"),
    "alone": ("", "measure this one contestant, here; what the rounds call"),
}
"""Flags of every benchmark: name → default, help."""


def rounds(args: argparse.Namespace, contestants: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What each contestant measured, round by round, in turns."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    given = [f"--{k}={v}" for k, v in vars(args).items() if k not in ("command", "json", "alone") and v is not False]
    given = [flag.removesuffix("=True") for flag in given]
    for number in range(args.repeats):
        for name in contestants:
            print(f"round {number + 1} of {args.repeats}: {name}", file=sys.stderr)
            command = [sys.executable, "-m", "grpo_gsm8k.bench", args.command, f"--alone={name}", *given]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ConfigError(f"bench {args.command}: {name} failed:\n{done.stderr[-2000:]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of every figure over the rounds."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def ratio(theirs: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]], key: str) -> dict[str, float]:
    """Median, smallest and largest of theirs / ours within a round."""
    each = [a[key] / b[key] for a, b in zip(theirs, ours, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


class Measured(dict[str, float]):
    """`seconds`, `cpu_seconds` and the peak of memory: `peak_rss_mb` of the process, on a GPU `peak_gpu_mb`, too."""


@contextmanager
def measuring(device: str) -> Iterator[Measured]:
    """Time what stands inside; the memory is that of the process so far."""
    import torch

    gpu, found = device.startswith("cuda"), Measured()
    wait: Callable[[], None] = torch.cuda.synchronize if gpu else lambda: None
    wait()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    wall, cpu = time.perf_counter(), time.process_time()
    yield found
    wait()
    found |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    kilo = 1024 if sys.platform == "darwin" else 1  # bytes there, kibibytes here
    found["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / kilo / 1024
    if gpu:
        found["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20


def gpu_of(args: argparse.Namespace) -> costs.Gpu | None:
    """The peaks of the GPU that is measured; None on a CPU, in float32, and for one that `costs.GPUS` has not."""
    import torch

    if not args.device.startswith("cuda") or args.dtype != "bfloat16":
        return None
    return costs.gpu_called(torch.cuda.get_device_name())


def make_model(args: argparse.Namespace) -> Any:
    """The Qwen2-shaped model with random weights, the same in every process."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.device(args.device):
        model = Qwen2ForCausalLM(config).to(args.device, getattr(torch, args.dtype))
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    return model


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch
    import transformers

    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": where, "threads": args.threads or torch.get_num_threads(), "dtype": args.dtype, **versions}


def table(found: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """The same as the JSON object, for people."""
    for key, value in found.items():
        if isinstance(value, Mapping) and any(isinstance(v, Mapping) for v in value.values()):
            yield f"{indent}{key}"
            yield from table(value, indent + "  ")
        elif isinstance(value, Mapping):
            yield f"{indent}{key:28}" + "  ".join(f"{k} {_short(v)}" for k, v in value.items())
        else:
            yield f"{indent}{key:28}{_short(value)}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
