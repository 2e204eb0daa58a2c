"""Measures GPU memory: the token budget from a probe, and a run's peak memory beside its prediction.

The memory of a pass is linear in its cells (SDPA keeps no scores), so two small passes of the model measure the cost of
a cell for any architecture, and no pass has to fail. The peak is either at the head or in the layers' backward pass,
depending on the size, so each gets its own line. The head's buffers are computed by `costs.py` instead: they grow with
the targets up to one chunk, which the small passes do not fill.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch

from grpo_gsm8k.config import TrainConfig
from grpo_gsm8k.datatypes import Datum
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.trainer import costs, packing
from grpo_gsm8k.trainer.batch import Batch, make_batch
from grpo_gsm8k.trainer.costs import GIB, Setup, Shape
from grpo_gsm8k.trainer.data import weighted
from grpo_gsm8k.trainer.ranks import world

CPU_CELLS = 3072  # measured: more cells take memory and save little time (artifacts/RESULTS.md)
FIXED_CELLS = 8192
PROBE_BYTES, PROBE_TOKENS, PROBE_TARGETS = GIB, 128, 64  # at most, of the smaller pass; length of a row; in all


class Meter(Protocol):
    """Reads a device's memory, in bytes."""

    def free(self) -> int:
        """What can still be allocated."""

    def held(self) -> int:
        """What is allocated."""

    def reset(self) -> None:
        """Forget the peak."""

    def peak(self) -> int:
        """The most that was allocated since `reset`."""


class CudaMeter:
    """Reads a GPU's memory from its driver and allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> int:
        """Free memory of the driver, and the allocator's cache."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def held(self) -> int:
        """What tensors take."""
        return torch.cuda.memory_allocated(self.device)

    def reset(self) -> None:
        """See `Meter`."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """See `Meter`."""
        return torch.cuda.max_memory_allocated(self.device)


def shape_of(model: Any) -> Shape:
    """The shape of a loaded model, without adapters. Raises `ConfigError` if it is not a dense transformer."""
    config = model.config.get_text_config()
    keys = ("num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size", "num_key_value_heads")
    found = {key: getattr(config, key, None) for key in (*keys, "head_dim", "vocab_size", "tie_word_embeddings")}
    weights = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    try:
        return Shape.of(found, weights)
    except TypeError:
        lacking = ", ".join(key for key in keys if found[key] is None)
        raise ConfigError(f"{model.name_or_path}: its memory cannot be planned (its config has no {lacking})") from None


# --------------------------------------------------------------------------------- predicted against measured


class Gauge:
    """Reports a learner's speed and memory on a GPU: `perf/mfu`, and the predicted and measured peak."""

    def __init__(
        self,
        shape: Shape,
        setup: Setup,
        meter: Meter,
        flops: float = 0.0,
        beside: int = 0,
        end_to_end: bool = False,
    ) -> None:
        """
        Args:
            flops: peak operations per second of all ranks' GPUs; 0 if unknown, which leaves the MFU out.
            beside: bytes of a sampler that shares the GPU during training.
            end_to_end: `packing.varlen` reads the packed rows.
        """
        self.end_to_end = end_to_end
        self.shape, self.setup, self.meter, self.flops, self.beside = shape, setup, meter, flops, beside
        self.predicted, self.printed = 0, world().rank > 0

    def start(self) -> None:
        """Start of an update: reset the peak."""
        self.meter.reset()
        self.predicted = 0

    def record(self, part: Batch) -> None:
        """Record a microbatch, still on the CPU, for the prediction."""
        cells, targets = part.cells, int(part.mask.sum())
        attended = packing.attended_cells(part, self.end_to_end)
        needed = costs.training_bytes(self.shape, self.setup, cells, targets, attended) + self.beside
        self.predicted = max(self.predicted, needed)

    def speed(self, tokens: int, targets: int, pairs: int, seconds: float) -> dict[str, float]:
        """`perf/mfu` of forward and backward passes, of the tokens that were computed: see `costs.training_flops`."""
        if not self.flops:
            return {}
        work = costs.training_flops(self.shape, tokens, targets, pairs, self.setup.lora_rank)
        return {"perf/mfu": work / seconds / self.flops}

    def finish(self) -> dict[str, float]:
        """End of an update: its predicted and measured peak in GB, printed the first time."""
        peak = self.meter.peak()
        if not self.printed:
            say(f"memory: predicted {self.predicted / 1e9:.1f} GB, measured peak {peak / 1e9:.1f} GB")
            self.printed = True
        return {"perf/peak_memory_gb": peak / 1e9, "perf/predicted_peak_gb": self.predicted / 1e9}


def gauge_of(model: Any, cfg: TrainConfig, dtype: torch.dtype, ranks: int, compiled: bool) -> Gauge | None:
    """The gauge of a model on a GPU; None on a CPU, and for an unknown architecture."""
    device: torch.device = next(model.parameters()).device
    if device.type != "cuda":
        return None
    try:
        shape = shape_of(model)
    except ConfigError as fault:
        say(str(fault))
        return None
    gpu = costs.gpu_called(torch.cuda.get_device_name(device))
    flops = gpu.flops * ranks if gpu and dtype == torch.bfloat16 else 0.0
    setup = replace(costs.setup_of(cfg, dtype.itemsize, ranks), compiled=compiled)
    beside = costs.beside_bytes(shape, setup, cfg)
    return Gauge(shape, setup, CudaMeter(device), flops, beside, packing.reads_varlen(model, dtype))


def engine_share(cfg: TrainConfig, model: Any, overlaps: bool) -> float:
    """vLLM's share of the memory of the GPU that trains `model`, within what is free now; prints it.

    Args:
        overlaps: training and sampling overlap.

    Raises:
        ConfigError: both do not fit.
    """
    device: torch.device = next(model.parameters()).device
    free, total = torch.cuda.mem_get_info(device)
    shape, setup = shape_of(model), costs.setup_of(cfg, model.dtype.itemsize)
    cells = (cfg.max_tokens_per_microbatch or FIXED_CELLS) if overlaps else 0
    share = min(costs.engine_share(shape, setup, total, cells), int(100 * (free - GIB) / total) / 100)
    resting = costs.state_bytes(shape, setup, gradients=False)
    if share * total < setup.width * shape.parameters:
        raise ConfigError(
            f"vLLM has no room beside the learner on {device}: of {total / 1e9:.0f} GB the learner keeps "
            f"{resting / 1e9:.0f} GB and {free / 1e9:.0f} GB are free; pass --optimizer_device cpu, --lora_rank, "
            "another --vllm_device, --engine hf, or --gpu_mem_util to try it all the same"
        )
    say(f"vLLM takes {share:.2f} of {device}: the learner keeps {resting / 1e9:.1f} of {total / 1e9:.0f} GB")
    return share


# -------------------------------------------------------------------------------------------------- the probe


@dataclass(frozen=True)
class Probed:
    """Bytes of a pass beyond the resident memory, as (fixed, per cell), for each of its two peaks.

    Attributes:
        at_head: until the gradient of the last hidden state exists; with the head of `PROBE_TARGETS` targets.
        backward: from then on, in the layers' backward pass.
        head: number of targets → bytes of the head.
    """

    at_head: tuple[float, float]
    backward: tuple[float, float]
    head: Callable[[int], float]

    @property
    def each(self) -> float:
        """Per cell, at the higher peak."""
        return max(self.at_head[1], self.backward[1])

    def taken(self, cells: int) -> float:
        """Bytes of a pass of this many cells, all of them targets."""
        (fixed, each), (later, more) = self.at_head, self.backward
        return max(fixed + each * cells + self.head(cells) - self.head(PROBE_TARGETS), later + more * cells)


def probe(run: Callable[[Batch], object], model: Any, gauge: Gauge, context: int) -> Probed:
    """Measure the memory of two passes: a few short rows, and twice as many with the same number of targets.

    A warm-up pass comes first: it allocates gradients and workspaces, and compiles. Random generators are restored. By
    the formula of `costs.py`, the larger pass takes at most a quarter of the free memory.

    Args:
        run: forward and backward pass of a microbatch; accumulates gradients.
        context: longest row that the model reads.

    Raises:
        torch.OutOfMemoryError: even these passes do not fit.
    """
    device: torch.device = next(model.parameters()).device
    length = min(PROBE_TOKENS, context)
    cell = costs.cell_bytes(gauge.shape, gauge.setup)
    cell += costs.layer_bytes(gauge.shape, gauge.setup) if gauge.setup.checkpointing else 0
    fits = min(PROBE_BYTES, gauge.meter.free() / 8) / cell / length
    rows = 2 ** max(min(int(fits).bit_length() - 1, 5), 1)  # at most half of the targets, which are shared out evenly
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        run(dummy_batch(rows, length, gauge.shape.vocab))
        passes = [dummy_batch(n, length, gauge.shape.vocab) for n in (rows, 2 * rows)]
        few, many = (_peak_memory(run, model, gauge.meter, part) for part in passes)
    lines = []
    for before, after in zip(few, many, strict=True):
        each = (after - before) / (rows * length)
        assert each > 0, f"passes of {rows} and {2 * rows} x {length} cells took {few} and {many} bytes"
        lines.append((before - rows * length * each, each))
    return Probed(lines[0], lines[1], partial(costs.head_bytes, gauge.shape, gauge.setup))


def _peak_memory(run: Callable[[Batch], object], model: Any, meter: Meter, part: Batch) -> tuple[int, int]:
    """The peak until the last hidden state's gradient exists, and from then on until the embedding's backward.

    The embedding's own gradient is left out: by then the layers' activations are freed, and its size does not depend on
    the number of cells. In a small pass it would be the peak.
    """
    peaks: list[int] = []

    def read(_: torch.Tensor) -> None:
        peaks.append(meter.peak() - before)
        meter.reset()

    def watch(tensor: torch.Tensor) -> None:
        if tensor.requires_grad:
            tensor.register_hook(read)

    hooks = [
        model.base_model.register_forward_hook(lambda *called: watch(called[-1].last_hidden_state)),
        model.get_input_embeddings().register_forward_hook(lambda *called: watch(called[-1])),
    ]
    try:
        meter.reset()
        before = meter.held()
        run(part)
    finally:
        for hook in hooks:
            hook.remove()
    at_head, backward = (*peaks, meter.peak() - before)[:2]  # a frozen embedding has no gradient
    return at_head, backward


def dummy_batch(rows: int, length: int, vocabulary: int) -> Batch:
    """A microbatch of `rows` x `length` cells with `PROBE_TARGETS` targets; no two rows share a prefix."""
    trained = PROBE_TARGETS // rows
    mask = (0,) * (length + 1 - trained) + (1,) * trained
    advantages = tuple(map(float, mask))
    data = [Datum((row % vocabulary, *(0,) * length), mask, (), advantages) for row in range(rows)]
    return make_batch(weighted(data, "token"))


def out_of_memory(rows: int, longest: int, budget: int, each: float = 0.0) -> ConfigError:
    """The error for a microbatch that did not fit: what to lower, and by how much. `each`: bytes per cell, if known."""
    cells = rows * longest
    wanted = min(cells, budget) // 2
    size = f" ({each * cells / 1e9:.1f} GB by the probe)" if each else ""
    if rows > 1:
        saved = f", which saves {each * (cells - wanted) / 1e9:.1f} GB" if each else ""
        return ConfigError(
            f"out of memory at {rows} rows x {longest} tokens{size}: pass --max_tokens_per_microbatch {wanted} "
            f"(now {budget}){saved}"
        )
    return ConfigError(
        f"out of memory at a single row of {longest} tokens{size}, which no token budget makes smaller: halve "
        "--max_new_tokens (or SFT's --max_length), pass --activation_checkpointing or --optimizer_device cpu, take a "
        "smaller model, or let the sampler have another device"
    )
