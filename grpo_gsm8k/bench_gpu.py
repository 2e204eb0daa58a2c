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
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo_gsm8k import bench, repro
from grpo_gsm8k.errors import ConfigError, GrpoError

FLAGS: dict[str, tuple[Any, str]] = {
    "device": ("cuda", "cuda, cuda:N, or cpu to try the command itself"),
    "dtype": ("bfloat16", "of the models whose speed is measured"),
    "sizes": ("0.5b,1.5b", "models of these shapes, random weights: toy, 0.5b, 1.5b"),
    "parts": ("all", "some of the parts, separated by commas"),
    "budget_s": (540.0, "seconds; what has no room in them is left for the next call"),
    "out": ("artifacts/gpu", "folder of gpu.json and gpu.md"),
    "again": (False, "measure parts that are in gpu.json already once more"),
    "tokens": (100_000, "tokens of a measured update, about"),
}

SHAPES: dict[str, dict[str, int]] = {
    "toy": {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 128, "vocabulary": 700},
    "0.5b": {"hidden": 896, "layers": 24, "heads": 14, "kv_heads": 2, "intermediate": 4864, "vocabulary": 151_936},
    "1.5b": {"hidden": 1536, "layers": 28, "heads": 12, "kv_heads": 2, "intermediate": 8960, "vocabulary": 151_936},
}
"""Qwen2.5's, tied embeddings."""

Row = tuple[str, dict[str, Any]]
Part = Callable[[argparse.Namespace], Iterator[Row]]


FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, GrpoError, LookupError, NameError, OSError, RuntimeError),
    *(SystemExit, TypeError, ValueError),
)
"""What a part may die of on a machine that nobody has tried: written down, and the next one begins."""


class Skip(Exception):
    """Why a part, or what is left of it, cannot run here."""


# --------------------------------------------------------------------------------------------------- the frame


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
    found |= {"machine": _machine(args), "commit": repro.git_commit(), "parts": found.get("parts", {})}
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
            _say(f"{name}: {row}: " + "  ".join(f"{k} {_short(v)}" for k, v in figures.items()))
            _write(found, out)
            if time.time() - began > args.budget_s:
                raise Skip(f"cut off after {args.budget_s:.0f} s")
        part["status"] = "ok"
    except Skip as reason:
        part |= {"status": "skipped", "reason": str(reason)}
    except ImportError as fault:
        part |= {"status": "skipped", "reason": f"{fault.name or fault} is not installed"}
    except FAULTS as fault:  # the other parts still count
        part |= {"status": "failed", "reason": _last_line(fault)}
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


def _last_line(fault: BaseException) -> str:
    """`file:line: Error: message`, the line being the innermost one of this package."""
    frames = traceback.extract_tb(fault.__traceback__)
    ours = [frame for frame in frames if "grpo_gsm8k" in frame.filename] or frames
    inner = frames[-1]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    deepest = f" (in {Path(inner.filename).name}:{inner.lineno})" if inner is not ours[-1] else ""
    message = " ".join(str(fault).split())[:300]
    return f"{where}{deepest}: {type(fault).__name__}: {message}"


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
    lines += [f"- {key}: {_short(value)}" for key, value in machine.items() if key != "device"]
    lines += [f"- commit: {found['commit']}", *(f"- `{command}`" for command in found["commands"])]
    for name, part in found["parts"].items():
        seconds = f" ({part['seconds']:.0f} s)" if "seconds" in part else ""
        lines += ["", f"### {name}: {part['status']}{seconds} {part.get('reason', '')}".rstrip(), ""]
        lines += [
            f"- {row}: " + ", ".join(f"{k} {_short(v)}" for k, v in rows.items()) for row, rows in part["rows"].items()
        ]
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _installed(name: str) -> str:
    """The version of a package, or none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on, and what is there that a part may want."""
    import torch

    packages = ("transformers", "triton", "safetensors", "peft", "vllm", "liger-kernel", "flash-attn")
    there = {name: _installed(name) for name in packages}
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


# ------------------------------------------------------------------------------------------------- small tools


def shape_args(args: argparse.Namespace, size: str, **more: Any) -> argparse.Namespace:
    """The flags with which `bench update` and `bench sample` would measure a model of this size."""
    from grpo_gsm8k import bench_sample, bench_update

    flags = {**bench.SHARED, **bench_update.FLAGS, **bench_sample.FLAGS}
    values: dict[str, Any] = {name: default for name, (default, _) in flags.items()}
    values |= {"device": args.device, "dtype": args.dtype, "max_tokens_per_microbatch": 0, **SHAPES[size], **more}
    return argparse.Namespace(**values)


def sizes_of(args: argparse.Namespace) -> list[str]:
    """As asked for."""
    return list(args.sizes.split(","))


def is_toy(args: argparse.Namespace) -> bool:
    """Whether this tries the command, and the figures mean nothing."""
    return "toy" in sizes_of(args)


def wait(args: argparse.Namespace) -> None:
    """Until the device has done what it was given."""
    import torch

    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds_of(args: argparse.Namespace, work: Callable[[], object], repeats: int = 5, warm: int = 2) -> float:
    """Of one call, a mean."""
    for _ in range(warm):
        work()
    wait(args)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    wait(args)
    return (time.perf_counter() - started) / repeats


def peak_flops(args: argparse.Namespace) -> float:
    """Of this GPU in bfloat16, from the data sheet; 0 where it is not known."""
    gpu = bench.gpu(args)
    return gpu.flops if gpu else 0.0


def update_rows(args: argparse.Namespace, size: str, tokens: int, group: int = 8) -> list[Any]:
    """An update of about so many tokens: prompts of 100, completions of 300 on average, 1024 at most."""
    from grpo_gsm8k import bench_update

    few = is_toy(args)
    lengths = (
        {"mean_tokens": 12, "max_tokens": 24, "prompt_tokens": 8} if few else {"mean_tokens": 300, "max_tokens": 1024}
    )
    prompts = max(2, round(tokens / group / (20 if few else 400)))
    return bench_update.make_rows(shape_args(args, size, prompts=2 if few else prompts, group=group, **lengths))


def relative_error(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """The 2-norm of the difference of all tensors over that of the wanted ones."""
    off = sum(float((a.double() - b.to(a.device).double()).square().sum()) for a, b in zip(found, wanted, strict=True))
    return float((off / max(sum(float(b.double().square().sum()) for b in wanted), 1e-300)) ** 0.5)


# ------------------------------------------------------------------------------------------------ what is there


def peaks(args: argparse.Namespace) -> Iterator[Row]:
    """What this device can do at best: a large matrix product, a copy, and a launch."""
    import torch

    side = 256 if is_toy(args) else 8192
    dtype = getattr(torch, args.dtype)
    a, b = (torch.randn(side, side, device=args.device, dtype=dtype) for _ in range(2))
    product = seconds_of(args, lambda: a @ b, 10)
    yield "matrix product", {"tflops": 2 * side**3 / product / 1e12, "sheet_tflops": peak_flops(args) / 1e12}
    big = torch.empty(side * side * 8, device=args.device, dtype=dtype)
    copied = seconds_of(args, big.clone, 10)
    yield "copy", {"gb_per_s": 2 * big.numel() * big.element_size() / copied / 1e9}
    small = torch.zeros(8, device=args.device)

    def launches() -> None:
        for _ in range(1000):
            small.add_(1)

    yield "launch", {"us": seconds_of(args, launches, 3) * 1e3}


# ---------------------------------------------------------------------------------------------- right numbers


def zoo(args: argparse.Namespace) -> Iterator[Row]:
    """Tiny models of several architectures: trainer's and sampler's log-probs against plain logits in float32."""
    import torch

    for name, config in zoo_configs().items():
        for dtype in (torch.float32, torch.bfloat16):
            try:
                yield f"{name} {str(dtype).removeprefix('torch.')}", _held_against_logits(args, config, dtype)
            except FAULTS as fault:  # one architecture; the others still count
                yield f"{name} {str(dtype).removeprefix('torch.')}", {"failed": _last_line(fault)}


def zoo_configs() -> dict[str, Any]:
    """Architectures whose layers differ: biases, norms of queries, scaled embeddings, fused projections."""
    import transformers

    small = {
        "vocab_size": 211,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    grouped = {**small, "num_key_value_heads": 2}
    kinds = {
        "qwen2": ("Qwen2Config", grouped),
        "qwen3": ("Qwen3Config", {**grouped, "head_dim": 32}),
        "llama": ("LlamaConfig", grouped),
        "mistral": ("MistralConfig", {**grouped, "sliding_window": None}),
        "gemma": ("GemmaConfig", {**grouped, "head_dim": 32}),
        "phi3": ("Phi3Config", grouped),
        "olmo2": ("Olmo2Config", grouped),
        "gpt_neox": ("GPTNeoXConfig", small),
    }
    return {name: getattr(transformers, cls)(**values) for name, (cls, values) in kinds.items()}


def _held_against_logits(args: argparse.Namespace, config: Any, dtype: Any) -> dict[str, Any]:
    """Largest |difference| of log-probabilities from a float32 model on the CPU that reads each row by itself."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from grpo_gsm8k.config import TrainConfig
    from grpo_gsm8k.datatypes import SamplingParams
    from grpo_gsm8k.engines.probe import completed
    from grpo_gsm8k.trainer.batch import make_batch
    from grpo_gsm8k.trainer.learner import TorchLearner

    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM.from_config
    model = make(config).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.15)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    plain = copy.deepcopy(model).float().eval()
    there = model.to(args.device)
    prompts = _requests([5, 3, 9, 5], 211, 2)
    sampler = _sampler(copy.deepcopy(there), rows=16)
    drawn = sampler.sample(prompts, SamplingParams(12, temperature=0.7))
    rows = [completed(p, c) for p, group in zip(prompts, drawn, strict=True) for c in group]
    batch = make_batch(rows, 0)
    expected = torch.zeros_like(batch.mask)
    with torch.no_grad():
        for row, ids in enumerate(batch.input_ids):
            n = batch.lengths[row]
            logp = (plain(ids[None, :n]).logits[0].float() / 0.7).log_softmax(-1)
            expected[row, :n] = logp.gather(-1, batch.targets[row, :n, None])[:, 0]
    expected *= batch.mask
    found: dict[str, Any] = {"sampler": float((batch.old_logprobs - expected).abs().max())}
    for packing in ("off", "on"):
        try:
            cfg = TrainConfig(engine="vllm", packing=packing, max_tokens_per_microbatch=64)
            learner = TorchLearner(copy.deepcopy(there), None, cfg)
            found[f"packing {packing}"] = float((learner.logprobs(batch, 0.7) - expected).abs().max())
        except ConfigError as fault:
            found[f"packing {packing}"] = str(fault)[:60]
    return found


def _requests(lengths: Sequence[int], vocabulary: int, n: int) -> list[Any]:
    import random

    from grpo_gsm8k.datatypes import Request

    draw = random.Random(0)
    ids = [tuple(draw.randrange(3, vocabulary) for _ in range(length)) for length in lengths]
    return [Request(row, tuple(range(i * n, (i + 1) * n))) for i, row in enumerate(ids)]


def _sampler(model: Any, rows: int) -> Any:
    from types import SimpleNamespace

    from grpo_gsm8k.engines.hf import HFSampler

    silent: Any = SimpleNamespace(stop_ids=frozenset(), pad_id=0, decode=lambda ids: "")
    return HFSampler(model, silent, rows, copy_model=False)


def parity(args: argparse.Namespace) -> Iterator[Row]:
    """An update with each option: its loss and gradient against a float32 update on the CPU."""
    import torch

    toy = argparse.Namespace(**{**vars(args), "sizes": "toy"})
    wanted, loss = _gradient(toy, "cpu", torch.float32)
    options: dict[str, dict[str, Any]] = {
        "default": {},
        "packing": {"packing": "on"},
        "no packing": {"packing": "off"},
        "checkpointing": {"activation_checkpointing": True},
        "offload": {"optimizer_device": "cpu"},
        "deterministic": {"deterministic": True},
    }
    for dtype in (torch.float32, torch.bfloat16):
        for name, flags in options.items():
            title = f"{name} {str(dtype).removeprefix('torch.')}"
            try:
                found, its = _gradient(toy, args.device, dtype, **flags)
            except FAULTS as fault:  # one option; the others still count
                yield title, {"failed": _last_line(fault)}
                continue
            yield title, {"gradient_error": relative_error(found, wanted), "loss_error": abs(its - loss)}


def _gradient(args: argparse.Namespace, device: str, dtype: Any, **flags: Any) -> tuple[list[Any], float]:
    """The gradient of a small update, and its loss."""
    from grpo_gsm8k.config import TrainConfig
    from grpo_gsm8k.trainer.batch import make_batch
    from grpo_gsm8k.trainer.learner import TorchLearner
    from grpo_gsm8k.trainer.objectives import Objective

    at = argparse.Namespace(**{**vars(args), "device": "cpu"})
    model = bench.make_model(shape_args(at, "toy", dtype="float32")).to(dtype).to(device)
    repro.set_deterministic(bool(flags.get("deterministic")))
    cfg = TrainConfig(engine="vllm", **{"max_tokens_per_microbatch": 256, **flags})
    learner = TorchLearner(model, None, cfg)
    found = learner.forward_backward(make_batch(update_rows(args, "toy", 0), 0, "token"), Objective("grpo_clip"))
    names = sorted(learner.optimizer.masters)
    sums = getattr(learner.optimizer, "sums", {})
    params, masters = learner.optimizer.params, learner.optimizer.masters
    grads: list[Any] = [
        masters[n].grad if masters[n].grad is not None else sums.get(params[n], params[n].grad) for n in names
    ]
    repro.set_deterministic(False)
    return [grad.detach().cpu() for grad in grads], found["loss"]


# ----------------------------------------------------------------------------------------------------- kernels


def head(args: argparse.Namespace) -> Iterator[Row]:
    """The head's log-probabilities and gradient: time, share of the peak, and error against float32 autograd."""
    import torch

    from grpo_gsm8k.trainer import costs
    from grpo_gsm8k.trainer.head import target_logprobs

    dtype = getattr(torch, args.dtype)
    chunks = dict(costs.CHUNK_BYTES)
    for size in sizes_of(args):
        shape = SHAPES[size]
        n, h, v = (32 if is_toy(args) else 8192), shape["hidden"], shape["vocabulary"]
        torch.manual_seed(0)
        weight = (torch.randn(v, h, device=args.device) * 0.05).to(dtype).requires_grad_()
        hidden = torch.randn(n, h, device=args.device).to(dtype).requires_grad_()
        targets = torch.randint(0, v, (n,), device=args.device)
        linear = argparse.Namespace(weight=weight)

        def ours(n: int = n, hidden: Any = hidden, targets: Any = targets, linear: Any = linear) -> Any:
            logp, _ = target_logprobs(
                hidden[:n], linear, targets[:n], 0.7, True, lambda logp, part: -torch.ones_like(logp)
            )
            (-logp.sum()).backward()
            return logp

        def plain(n: int, hidden: Any = hidden, targets: Any = targets, weight: Any = weight) -> Any:
            logits = hidden[:n].float() @ weight.float().t() / 0.7
            logp = logits.log_softmax(-1).gather(-1, targets[:n, None])[:, 0]
            (-logp.sum()).backward()
            return logp

        few = min(n, 256)
        errors = {}
        found: list[list[Any]] = []
        for way in (ours, plain):
            logp = way(few).detach()
            grads: list[Any] = [x.grad.float() for x in (hidden, weight) if x.grad is not None]
            found.append([logp, *grads])
            hidden.grad = weight.grad = None
        for what, a, b in zip(("logp", "hidden", "weight"), *found, strict=True):
            errors[f"{what}_error"] = relative_error([a], [b])
        yield f"{size} correctness", errors
        del found, logp, grads
        for chunk in (1 << 27, 1 << 28, 1 << 29, 1 << 30, 1 << 31):
            costs.CHUNK_BYTES.update(dict.fromkeys(chunks, chunk))
            try:
                seconds = seconds_of(args, ours, 3, 1)
            finally:
                costs.CHUNK_BYTES.update(chunks)
            share = 6.0 * n * h * v / seconds / peak_flops(args) if peak_flops(args) else 0.0
            yield f"{size} chunk {chunk >> 20} MiB", {"ms": seconds * 1e3, "mfu": share}
            hidden.grad = weight.grad = None
            if is_toy(args):
                break


def attention(args: argparse.Namespace) -> Iterator[Row]:
    """Each attention kernel at the shapes of an update, and what a new shape costs."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if is_toy(args):
        raise Skip("kernels of a GPU are chosen by shape, and toys have none that counts")
    dtype, rows, length = getattr(torch, args.dtype), 16, 1024
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    backends |= {"cudnn": SDPBackend.CUDNN_ATTENTION}

    def inputs(shape: dict[str, int], length: int) -> list[Any]:
        torch.manual_seed(0)
        width = shape["hidden"] // shape["heads"]
        sizes = [(rows, length, n, width) for n in (shape["heads"], shape["kv_heads"], shape["kv_heads"])]
        made = [torch.randn(s, device=args.device, dtype=dtype).transpose(1, 2) for s in sizes]
        return [x.requires_grad_() for x in made]

    def attend(name: str, q: Any, k: Any, v: Any) -> Any:
        groups = q.shape[1] // k.shape[1]
        if name == "efficient":  # takes no groups
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(q, k, v, is_causal=True, enable_gqa=name != "efficient")

    for size in sizes_of(args):
        shape = SHAPES[size]
        heads, kv, width = shape["heads"], shape["kv_heads"], shape["hidden"] // shape["heads"]
        flops = 3.5 * 2.0 * rows * heads * length * length * width  # causal half of 4, and 2.5 times that backward
        for name, backend in backends.items():
            given, lengths = inputs(shape, length), iter(range(500, 600, 3))

            def both(name: str = name, given: list[Any] = given) -> None:
                attend(name, *given).sum().backward()

            def fresh(name: str = name, shape: dict[str, int] = shape, lengths: Iterator[int] = lengths) -> None:
                attend(name, *inputs(shape, next(lengths))).sum().backward()

            try:
                with sdpa_kernel([backend]):
                    seconds, new = seconds_of(args, both), seconds_of(args, fresh, 4, 1)
                share = flops / seconds / peak_flops(args) if peak_flops(args) else 0.0
                yield f"{size} {name} {rows} x {length}", {"ms": seconds * 1e3, "mfu": share, "new_shape_ms": new * 1e3}
            except RuntimeError as fault:
                yield f"{size} {name} {rows} x {length}", {"failed": _last_line(fault)}
        yield f"{size} varlen {rows} x {length}", _varlen(args, rows, length, heads, kv, width, flops)


def _varlen(
    args: argparse.Namespace, rows: int, length: int, heads: int, kv: int, width: int, flops: float
) -> dict[str, Any]:
    """torch's attention over rows that stand end to end, as far as this torch has it."""
    import inspect

    import torch

    try:
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return {"failed": f"torch {torch.__version__} has no torch.nn.attention.varlen"}
    takes = inspect.signature(varlen).parameters
    more: dict[str, Any] = {"is_causal": True} if "is_causal" in takes else {"window_size": (-1, 0)}
    more |= {"enable_gqa": True} if "enable_gqa" in takes else {}
    attend: Callable[..., Any] = varlen
    torch.manual_seed(0)
    dtype, tail = getattr(torch, args.dtype), length // 4
    q, k, v = (torch.randn(rows * length, n, width, device=args.device, dtype=dtype) for n in (heads, kv, kv))
    starts = torch.arange(0, rows * length + 1, length, device=args.device, dtype=torch.int32)
    figures: dict[str, Any] = {}
    try:
        out = attend(q, k, v, starts, starts, length, length, **more)
        plain = [x.unflatten(0, (rows, length)).transpose(1, 2) for x in (q, k, v)]
        sdpa: Callable[..., Any] = torch.nn.functional.scaled_dot_product_attention
        wanted = sdpa(*plain, is_causal=True, enable_gqa=True)
        figures["error"] = relative_error([out], [wanted.transpose(1, 2).flatten(0, 1)])
        ends = out.unflatten(0, (rows, length))[:, -tail:].flatten(0, 1)
        queries = q.unflatten(0, (rows, length))[:, -tail:].flatten(0, 1)  # of the last tokens, over whole rows
        found = attend(queries, k, v, starts // 4, starts, tail, length, **more)
        figures["error_of_tails"] = relative_error([found], [ends])

        def both() -> None:
            attend(q, k, v, starts, starts, length, length, **more).sum().backward()

        for x in (q, k, v):
            x.requires_grad_()
        seconds = seconds_of(args, both)
        figures |= {"ms": seconds * 1e3, "mfu": flops / seconds / peak_flops(args) if peak_flops(args) else 0.0}
    except (RuntimeError, ValueError, TypeError) as fault:
        figures["failed"] = _last_line(fault)
    return {**figures, "takes": " ".join(takes)}


# ----------------------------------------------------------------------------------------------------- updates


def update(args: argparse.Namespace) -> Iterator[Row]:
    """An update with every default: tokens a second, share of the peak, memory as predicted and as it was."""
    for size in sizes_of(args):
        yield size, measure_update(args, size)
        if not is_toy(args):
            yield f"{size}, 16384 tokens a pass", measure_update(args, size, max_tokens_per_microbatch=16384)


def measure_update(args: argparse.Namespace, size: str, tokens: int = 0, **flags: Any) -> dict[str, Any]:
    """Two updates, of which the second counts."""
    import torch

    from grpo_gsm8k import bench_update
    from grpo_gsm8k.config import TrainConfig
    from grpo_gsm8k.trainer.batch import make_batch
    from grpo_gsm8k.trainer.learner import TorchLearner
    from grpo_gsm8k.trainer.memory import shape_of
    from grpo_gsm8k.trainer.objectives import Objective

    gpu, tokens = args.device.startswith("cuda"), tokens or args.tokens
    rows, objective = update_rows(args, size, tokens), Objective("grpo_clip")
    learner = TorchLearner(bench.make_model(shape_args(args, size)), None, TrainConfig(engine="vllm", **flags))
    batch, few = make_batch(rows, 0, "token"), make_batch(rows[: max(8, len(rows) // 4)], 0, "token")
    started = time.perf_counter()
    budget = learner.budget
    learner.forward_backward(few, objective)
    learner.step(1e-6)
    wait(args)
    first = time.perf_counter() - started
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    said = learner.forward_backward(batch, objective)
    wait(args)
    passed = time.perf_counter() - started
    stepped = learner.step(1e-6)
    wait(args)
    whole = time.perf_counter() - started
    read = sum(len(row.token_ids) - 1 for row in rows)
    work = bench_update.operations(shape_of(learner.model), rows)
    peak = peak_flops(args)
    return {
        "tokens": read,
        "seconds": whole,
        "step_seconds": whole - passed,
        "first_seconds": first,
        "tokens_per_s": read / whole,
        "mfu": work / whole / peak if peak else 0.0,
        "microbatch": budget,
        "passes": len(list(learner._microbatches(batch, range(len(rows))))),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0,
        "predicted_gb": stepped.get("perf/predicted_peak_gb", 0.0),
        "reserved_gb": torch.cuda.memory_reserved() / 1e9 if gpu else 0.0,
        "padding": said["perf/padding_frac"],
    }


def profile(args: argparse.Namespace) -> Iterator[Row]:
    """Where the device's time goes in an update of the largest model: its kernels by name, and how often it waits."""
    from collections import Counter

    from torch.profiler import ProfilerActivity, supported_activities
    from torch.profiler import profile as profiler

    from grpo_gsm8k.config import TrainConfig
    from grpo_gsm8k.trainer.batch import make_batch
    from grpo_gsm8k.trainer.learner import TorchLearner
    from grpo_gsm8k.trainer.objectives import Objective

    size = sizes_of(args)[-1]
    rows = update_rows(args, size, min(args.tokens, 24_000))
    batch = make_batch(rows, 0, "token")
    cfg = TrainConfig(engine="vllm", max_tokens_per_microbatch=64 if is_toy(args) else 12288)
    learner = TorchLearner(bench.make_model(shape_args(args, size)), None, cfg)
    learner.forward_backward(batch, Objective("grpo_clip"))
    learner.step(1e-6)
    wait(args)
    gpu = args.device.startswith("cuda") and ProfilerActivity.CUDA in supported_activities()
    started = time.perf_counter()
    with profiler(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        learner.forward_backward(batch, Objective("grpo_clip"))
        wait(args)
        passed = time.perf_counter() - started
        learner.step(1e-6)
        wait(args)
    whole = time.perf_counter() - started
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in seen.events() or []:
        kernel = str(getattr(event, "device_type", "")).endswith("CUDA")
        if kernel == gpu:
            microseconds = event.device_time if gpu else event.self_cpu_time_total
            spent[event.name] += microseconds
            calls[event.name] += 1
    total = sum(spent.values()) / 1e6
    yield (
        f"{size} whole",
        {"seconds": whole, "passes_seconds": passed, "busy_seconds": total, "kernels": sum(calls.values())},
    )
    for name, microseconds in spent.most_common(40):
        yield (
            f"{size} {name[:110]}",
            {"ms": microseconds / 1e3, "calls": calls[name], "share": microseconds / 1e6 / max(total, 1e-9)},
        )


def ablation(args: argparse.Namespace) -> Iterator[Row]:
    """The smallest model's update, with each default exchanged: seconds and memory as multiples of the default's."""
    import torch

    from grpo_gsm8k.trainer import costs

    size, tokens = sizes_of(args)[0], args.tokens
    cells = 64 if is_toy(args) else 16384
    ours = measure_update(args, size, tokens, max_tokens_per_microbatch=cells)
    yield f"{size} default at {cells}", ours
    variants: dict[str, dict[str, Any]] = {
        "packing on": {"packing": "on"},
        "packing off": {"packing": "off"},
        "checkpointing": {"activation_checkpointing": True},
        "half the tokens a pass": {"max_tokens_per_microbatch": cells // 2},
        "a quarter of the tokens a pass": {"max_tokens_per_microbatch": cells // 4},
        "twice the tokens a pass": {"max_tokens_per_microbatch": cells * 2},
        "optimizer on the CPU": {"optimizer_device": "cpu"},
        "deterministic": {"deterministic": True},
        "cudnn attention": {},
        "chunk of 256 MiB": {},
    }
    chunks = dict(costs.CHUNK_BYTES)
    for name, flags in variants.items():
        if name == "cudnn attention" and not args.device.startswith("cuda"):
            continue
        try:
            repro.set_deterministic(name == "deterministic")
            if name.startswith("chunk"):
                costs.CHUNK_BYTES.update(dict.fromkeys(chunks, 256 << 20))
            with _cudnn(name == "cudnn attention"):
                found = measure_update(args, size, tokens, **{"max_tokens_per_microbatch": cells, **flags})
        except FAULTS as fault:  # one variant; the others still count
            yield f"{size} {name}", {"failed": _last_line(fault)}
            continue
        finally:
            repro.set_deterministic(False)
            costs.CHUNK_BYTES.update(chunks)
            gc.collect()
            if args.device.startswith("cuda"):
                torch.cuda.empty_cache()
        ratios = {
            "times_seconds": found["seconds"] / ours["seconds"],
            "times_memory": found["peak_gb"] / max(ours["peak_gb"], 1e-9),
        }
        yield f"{size} {name}", {**ratios, **found}


def _cudnn(on: bool) -> Any:
    """Let torch choose cuDNN's attention after all."""
    import contextlib
    from unittest import mock

    if not on:
        return contextlib.nullcontext()
    import torch

    torch.backends.cuda.enable_cudnn_sdp(True)
    return mock.patch("grpo_gsm8k.trainer.learner.choose_attention", lambda model: None)


# ---------------------------------------------------------------------------------------------------- sampling


def sampler(args: argparse.Namespace) -> Iterator[Row]:
    """The embedded sampler: tokens a second, and its log-probabilities against the trainer's."""
    import torch

    from grpo_gsm8k.config import TrainConfig
    from grpo_gsm8k.datatypes import SamplingParams
    from grpo_gsm8k.engines.probe import completed
    from grpo_gsm8k.trainer.batch import make_batch
    from grpo_gsm8k.trainer.learner import TorchLearner

    for size in sizes_of(args):
        vocabulary = SHAPES[size]["vocabulary"]
        model = bench.make_model(shape_args(args, size)).eval()
        model.generation_config.eos_token_id = list(range(2, vocabulary, 200 if not is_toy(args) else 16))
        lengths = [5, 7, 9, 8] if is_toy(args) else [60 + 7 * i % 80 for i in range(32)]
        for group in (8, 2):
            prompts = _requests(lengths, vocabulary, group)
            rows = group * len(prompts)
            drawer = _sampler(model, rows)
            drawer.sample(prompts[:2], SamplingParams(4))
            wait(args)
            started = time.perf_counter()
            drawn = drawer.sample(prompts, SamplingParams(8 if is_toy(args) else 200))
            wait(args)
            seconds = time.perf_counter() - started
            tokens = sum(len(c.token_ids) for g in drawn for c in g)
            steps = max(len(c.token_ids) for g in drawn for c in g)
            batch = make_batch([completed(p, c) for p, g in zip(prompts, drawn, strict=True) for c in g], 0)
            cells = 64 if is_toy(args) else 8192
            learner = TorchLearner(
                model.requires_grad_(True), None, TrainConfig(engine="vllm", max_tokens_per_microbatch=cells)
            )
            off = (learner.logprobs(batch) - batch.old_logprobs).abs() * batch.mask
            del learner
            assert torch.isfinite(off).all()
            yield (
                f"{size} {rows} rows",
                {
                    "tokens_per_s": tokens / seconds,
                    "ms_per_step": seconds / steps * 1e3,
                    "steps": steps,
                    "logp_error_mean": float(off.sum() / batch.mask.sum()),
                    "logp_error_max": float(off.max()),
                },
            )
        del model, drawer
        gc.collect()
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------- whole steps


def grpo_run(
    args: argparse.Namespace, sizes: dict[str, int], **flags: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`grpo.run` on made-up problems with a model made on the spot; its result and its metrics."""
    import contextlib
    import tempfile

    from grpo_gsm8k import config, grpo
    from grpo_gsm8k.tasks import load_task
    from grpo_gsm8k.tasks.base import load_split
    from grpo_gsm8k.trainer.tiny_model import make_tiny_model

    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        folder = Path(scratch)
        task = load_task("gsm8k")
        task.generate(folder / "data", 0, {"train": 300, "val": 20, "test": 1})
        examples = load_split(task, folder / "data", "train")
        model = make_tiny_model(folder / "model", [example.text for example in examples], 0, **sizes)
        given = {
            "model_id": str(model),
            "data": str(folder / "data"),
            "out_dir": str(folder / "run"),
            "device": args.device,
            "dtype": args.dtype,
            "reward": "random",
            "eval_every": 0,
            "max_tokens_per_microbatch": 0,
            **flags,
        }
        result = grpo.run(config.resolve("grpo", preset="tiny", flags=given))
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return result, [json.loads(line) for line in lines]


def step(args: argparse.Namespace) -> Iterator[Row]:
    """Whole GRPO steps: what sampling and the update take of them, and what is neither."""
    toy = is_toy(args)
    tiny = {"hidden_size": 64, "heads": 4} if toy else {}
    runs: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
        "demo's model": (tiny, {"rollouts_per_step": 8 if toy else 256, "max_new_tokens": 8 if toy else 96}),
    }
    if not toy:
        half = {"hidden_size": 896, "layers": 24, "heads": 14, "intermediate_size": 4864}
        runs["24 layers of 896"] = (half, {"rollouts_per_step": 256, "max_new_tokens": 200})
    for name, (sizes, flags) in runs.items():
        more = {"steps": 3, "group_size": 4 if toy else 8, "sample_rows": 256, "save_every": 100, **flags}
        _, metrics = grpo_run(args, sizes, **more)
        last = metrics[-1]
        keys = ("time/total", "time/sampling", "time/training", "length/mean", "perf/mfu", "perf/tokens_per_s")
        yield name, {key: last[key] for key in keys if key in last}


def determinism(args: argparse.Namespace) -> Iterator[Row]:
    """A deterministic run, twice: the same weights to the last bit."""
    tiny = {"hidden_size": 64, "heads": 4}
    more = {"steps": 2, "rollouts_per_step": 16, "group_size": 4, "max_new_tokens": 16, "deterministic": True}
    try:
        for dtype in ("float32", "bfloat16"):
            pair = [grpo_run(args, tiny, **more, dtype=dtype)[0]["weights_sha256"] for _ in range(2)]
            yield dtype, {"equal": pair[0] == pair[1], "sha256": pair[0][:12]}
    finally:
        repro.set_deterministic(False)


def compiled(args: argparse.Namespace) -> Iterator[Row]:
    """Layers compiled: the same gradient, and the update's time without the compiler's own."""
    import torch

    if lacking := repro.missing_for_compile(args.device.startswith("cuda")):
        raise Skip(f"no {lacking}")
    toy = argparse.Namespace(**{**vars(args), "sizes": "toy"})
    wanted, _ = _gradient(toy, "cpu", torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        found, _ = _gradient(toy, args.device, dtype, compile=True)
        yield f"gradient {str(dtype).removeprefix('torch.')}", {"gradient_error": relative_error(found, wanted)}
    if is_toy(args):
        return
    for size in sizes_of(args):
        for packing in ("off", "on"):
            flags = {"compile": True, "packing": packing, "max_tokens_per_microbatch": 16384}
            yield f"{size} compile, packing {packing}", measure_update(args, size, args.tokens, **flags)


def offload(args: argparse.Namespace) -> Iterator[Row]:
    """AdamW in main memory: the update's time and memory on the largest model."""
    size = sizes_of(args)[-1]
    if args.device.startswith("cpu"):
        raise Skip("on a CPU the optimizer is in main memory already")
    yield size, measure_update(args, size, args.tokens // 4, optimizer_device="cpu")


def vllm(args: argparse.Namespace) -> Iterator[Row]:
    """vLLM beside the trainer on one GPU: tokens a second, sleep and wake, each hand-over with its proof."""
    if _installed("vllm") == "none":
        raise Skip("vLLM is not installed")
    if args.device.startswith("cpu"):
        raise Skip("measured on a GPU alone; tests/test_vllm.py has the CPU")
    for transfer in ("file", "ipc"):
        flags = {"engine": "vllm", "weight_transfer": transfer, "steps": 3, "rollouts_per_step": 256, "group_size": 8}
        try:
            _, metrics = grpo_run(args, {"heads": 4}, **flags, max_new_tokens=200)
        except FAULTS as fault:  # one way; the other still counts
            yield transfer, {"failed": _last_line(fault)}
            continue
        keys = ("time/total", "time/sampling", "time/training", "sync/probe_logp_abs_mean", "mismatch/logp_abs_mean")
        yield transfer, {key: metrics[-1][key] for key in keys if key in metrics[-1]}


PARTS: dict[str, Part] = {
    "peaks": peaks,
    "zoo": zoo,
    "parity": parity,
    "head": head,
    "attention": attention,
    "update": update,
    "profile": profile,
    "sampler": sampler,
    "determinism": determinism,
    "step": step,
    "ablation": ablation,
    "offload": offload,
    "compiled": compiled,
    "vllm": vllm,
}
