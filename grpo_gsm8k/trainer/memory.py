"""Memory as a GPU really has it: the token budget from a probe, and a run's measured peak beside the predicted one.

How much a pass through a model takes is linear in its cells (attention is SDPA's, which keeps no scores), so two small
passes of the model itself say what a cell costs, whatever its layers are made of, and no pass has to fail. The head is
not left to them: its buffers grow with the targets only up to a chunk, which the small passes do not fill, and they are
our own, so `costs.py` knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from grpo_gsm8k.config import TrainConfig
from grpo_gsm8k.datatypes import TokenRow
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.runs.progress import talk
from grpo_gsm8k.trainer import costs
from grpo_gsm8k.trainer.batch import Batch, make_batch
from grpo_gsm8k.trainer.costs import Setup, Shape
from grpo_gsm8k.trainer.ranks import world

CPU_CELLS = 2048  # measured: fewer pad less, and fresh memory costs more the larger it is (artifacts/RESULTS.md)
FIXED_CELLS = 8192
PROBE_TOKENS, PROBE_TARGETS = 128, 32


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

    def __init__(self, shape: Shape, setup: Setup, meter: Meter, flops: float = 0.0, beside: int = 0) -> None:
        """Of one learner.

        Args:
            flops: peak operations a second of all ranks' GPUs; 0 where it is not known, and no MFU is given.
            beside: bytes that a sampler on the same GPU takes while the learner learns.
        """
        self.shape, self.setup, self.meter, self.flops, self.beside = shape, setup, meter, flops, beside
        self.predicted, self.said = 0, world().rank > 0

    def start(self) -> None:
        """An update begins."""
        self.meter.reset()
        self.predicted = 0

    def saw(self, part: Batch) -> None:
        """One of its microbatches, still on the CPU."""
        cells, targets = part.input_ids.numel(), int(part.mask.sum())
        needed = costs.training_bytes(self.shape, self.setup, cells, targets) + self.beside
        self.predicted = max(self.predicted, needed)

    def speed(self, lengths: Sequence[int], targets: int, seconds: float) -> dict[str, float]:
        """`perf/mfu` of forward and backward passes over rows of these lengths: nominal, see `costs.training_flops`."""
        if not self.flops:
            return {}
        pairs = costs.causal_pairs(lengths)
        work = costs.training_flops(self.shape, sum(lengths), targets, pairs, self.setup.lora_rank)
        return {"perf/mfu": work / seconds / self.flops}

    def finish(self) -> dict[str, float]:
        """The update has ended: its peak in GB, predicted and as the allocator says; the first time on stderr, too."""
        peak = self.meter.peak()
        if not self.said:
            talk(f"memory: predicted {self.predicted / 1e9:.1f} GB, measured peak {peak / 1e9:.1f} GB")
            self.said = True
        return {"perf/peak_memory_gb": peak / 1e9, "perf/predicted_peak_gb": self.predicted / 1e9}


def gauge_of(model: Any, cfg: TrainConfig, dtype: torch.dtype, ranks: int) -> Gauge | None:
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
    setup = costs.setup_of(cfg, dtype.itemsize, ranks)
    return Gauge(shape, setup, CudaMeter(device), flops, costs.beside_bytes(shape, setup, cfg))


# -------------------------------------------------------------------------------------------------- the probe


@dataclass(frozen=True)
class Line:
    """Bytes that a pass takes beside all that stays: `fixed`, `each` for every cell, and what the head adds to them."""

    fixed: float
    each: float
    head: Callable[[int], float]

    def taken(self, cells: int) -> float:
        """By a pass of so many cells, all of them targets."""
        return self.fixed + self.each * cells + self.head(cells) - self.head(PROBE_TARGETS)


def probe(run: Callable[[Batch], object], gauge: Gauge, device: torch.device, context: int) -> Line:
    """Measure what a pass takes, by passes of 2 and 4 short rows with as many targets.

    A pass before them makes what only a first one makes: gradients, workspaces, compiled code. The generators are left
    as they were.

    Args:
        run: forward and backward pass of a microbatch; adds to gradients that stay.
        context: longest row that the model reads.

    Raises:
        torch.OutOfMemoryError: not even these fit.
    """
    length, meter = min(PROBE_TOKENS, context), gauge.meter
    taken: list[int] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        run(made_up(2, length))
        for rows in (2, 4):
            meter.reset()
            before = meter.held()
            run(made_up(rows, length))
            taken.append(meter.peak() - before)
    each = (taken[1] - taken[0]) / (2 * length)
    assert each > 0, f"passes of {2 * length} and {4 * length} cells took {taken} bytes"
    line = Line(taken[0] - 2 * length * each, each, partial(costs.head_bytes, gauge.shape, gauge.setup))
    if not gauge.said:
        talk(f"memory: a probe found {each / 1e6:.3g} MB a token")
    return line


def made_up(rows: int, length: int) -> Batch:
    """A microbatch of `rows` x `length` cells, of which `PROBE_TARGETS` in all are trained."""
    trained = PROBE_TARGETS // rows
    row = TokenRow((0,) * (length + 1), (0,) * (length + 1 - trained) + (1,) * trained, (), 1.0)
    return make_batch([row] * rows, 0)


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
