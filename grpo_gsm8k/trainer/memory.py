"""Memory as a GPU really has it: the token budget from a probe, and a run's measured peak beside the predicted one.

How much a pass through a model takes is linear in its cells (attention is SDPA's, which keeps no scores), so two small
passes of the model itself say what a cell costs, whatever its layers are made of, and no pass has to fail. A pass is
highest either at the head or in the layers' backward pass; which of them depends on its size, so each has a line of its
own. The head is not left to the passes: its buffers grow with the targets only up to a chunk, which small ones do not
fill, and they are our own, so `costs.py` knows them.
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
from grpo_gsm8k.runs.progress import talk
from grpo_gsm8k.trainer import costs, packing
from grpo_gsm8k.trainer.batch import Batch, make_batch
from grpo_gsm8k.trainer.costs import GIB, Setup, Shape
from grpo_gsm8k.trainer.data import weighted
from grpo_gsm8k.trainer.ranks import world

CPU_CELLS = 3072  # measured: more take memory, and save little time (artifacts/RESULTS.md)
FIXED_CELLS = 8192
PROBE_BYTES, PROBE_TOKENS, PROBE_TARGETS = GIB, 128, 64  # at most, of the smaller pass; length of a row; in all


class Meter(Protocol):
    """What a device says of its memory, in bytes."""

    def free(self) -> int:
        """What may still be allocated."""

    def held(self) -> int:
        """What is allocated."""

    def reset(self) -> None:
        """Forget the peak."""

    def peak(self) -> int:
        """The most that was allocated since `reset`."""


class CudaMeter:
    """The meter of a GPU: its driver's and its allocator's own figures."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> int:
        """What the driver has left, and what the allocator keeps for later."""
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
    """The shape of a loaded model, adapters not counted. Raises `ConfigError` where it is no dense transformer."""
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
    """What a learner on a GPU says of its own speed and memory: `perf/mfu`, and the peak as predicted and measured."""

    def __init__(
        self,
        shape: Shape,
        setup: Setup,
        meter: Meter,
        flops: float = 0.0,
        beside: int = 0,
        end_to_end: bool = False,
    ) -> None:
        """Of one learner.

        Args:
            flops: peak operations a second of all ranks' GPUs; 0 where it is not known, and no MFU is given.
            beside: bytes that a sampler on the same GPU takes while the learner learns.
            end_to_end: packed rows are read by `packing.varlen`.
        """
        self.end_to_end = end_to_end
        self.shape, self.setup, self.meter, self.flops, self.beside = shape, setup, meter, flops, beside
        self.predicted, self.printed = 0, world().rank > 0

    def start(self) -> None:
        """An update begins."""
        self.meter.reset()
        self.predicted = 0

    def record(self, part: Batch) -> None:
        """One of its microbatches, still on the CPU."""
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
        """The update has ended: its peak in GB, predicted and as the allocator says; the first time on stderr, too."""
        peak = self.meter.peak()
        if not self.printed:
            talk(f"memory: predicted {self.predicted / 1e9:.1f} GB, measured peak {peak / 1e9:.1f} GB")
            self.printed = True
        return {"perf/peak_memory_gb": peak / 1e9, "perf/predicted_peak_gb": self.predicted / 1e9}


def gauge_of(model: Any, cfg: TrainConfig, dtype: torch.dtype, ranks: int, compiled: bool) -> Gauge | None:
    """The gauge of a model on a GPU; None on a CPU, where no allocator tells its peak, and for a shape unknown here."""
    device: torch.device = next(model.parameters()).device
    if device.type != "cuda":
        return None
    try:
        shape = shape_of(model)
    except ConfigError as fault:
        talk(str(fault))
        return None
    gpu = costs.gpu_called(torch.cuda.get_device_name(device))
    flops = gpu.flops * ranks if gpu and dtype == torch.bfloat16 else 0.0
    setup = replace(costs.setup_of(cfg, dtype.itemsize, ranks), compiled=compiled)
    beside = costs.beside_bytes(shape, setup, cfg)
    return Gauge(shape, setup, CudaMeter(device), flops, beside, packing.reads_varlen(model, dtype))


def engine_share(cfg: TrainConfig, model: Any, overlaps: bool) -> float:
    """vLLM's share of the GPU that `model` is trained on, of its memory and of what is free there now; prints it.

    Args:
        overlaps: the learner learns while vLLM samples.

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
    talk(f"vLLM takes {share:.2f} of {device}: the learner keeps {resting / 1e9:.1f} of {total / 1e9:.0f} GB")
    return share


# -------------------------------------------------------------------------------------------------- the probe


@dataclass(frozen=True)
class Probed:
    """Bytes that a pass takes beside all that stays: fixed, and for each cell, at each of its two heights.

    Attributes:
        at_head: until the gradient of the last hidden state is there; with the head of `PROBE_TARGETS` targets.
        backward: from then on, while the layers are gone through.
        head: what the head takes for so many targets.
    """

    at_head: tuple[float, float]
    backward: tuple[float, float]
    head: Callable[[int], float]

    @property
    def each(self) -> float:
        """Of a cell."""
        return max(self.at_head[1], self.backward[1])

    def taken(self, cells: int) -> float:
        """By a pass of so many cells, all of them targets."""
        (fixed, each), (later, more) = self.at_head, self.backward
        return max(fixed + each * cells + self.head(cells) - self.head(PROBE_TARGETS), later + more * cells)


def probe(run: Callable[[Batch], object], model: Any, gauge: Gauge, context: int) -> Probed:
    """Measure what a pass takes, by one of a few short rows and one of twice as many, with as many targets.

    A pass before them makes what only a first one makes: gradients, workspaces, compiled code. The generators are left
    as they were. By the formula, the larger takes a quarter of what is free at most.

    Args:
        run: forward and backward pass of a microbatch; adds to gradients that stay.
        context: longest row that the model reads.

    Raises:
        torch.OutOfMemoryError: not even these fit.
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
    """The peak of a pass until the last hidden state's gradient is there, and from then on to the embedding's.

    What the embedding's own gradient takes is left out: by then nothing is kept of the layers, and it is the same for
    any number of cells. In a small pass it would be the peak.
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
    """A microbatch of `rows` x `length` cells, `PROBE_TARGETS` of them trained; no two rows begin alike."""
    trained = PROBE_TARGETS // rows
    mask = (0,) * (length + 1 - trained) + (1,) * trained
    advantages = tuple(map(float, mask))
    data = [Datum((row % vocabulary, *(0,) * length), mask, (), advantages) for row in range(rows)]
    return make_batch(weighted(data, "token"))


def out_of_memory(rows: int, longest: int, budget: int, each: float = 0.0) -> ConfigError:
    """What to lower, and by how much, when a microbatch did not fit; `each`: bytes of a cell, where that is known."""
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
