"""What an update will need: memory, time, and how many tokens fit into a forward pass.

Bytes of one update, of a model with N weights of b bytes each, L layers, width H, MLP width I, vocabulary V:

    state         N (b + 12), in bfloat16 N (b + 16): weights, gradients and AdamW's moments, all but the weights and
                  their copy in float32; and N b for each further copy (the sampler's, the KL term's)
    activations   L (8 H + 9 b H + 4 b I) a cell: what autograd keeps of norms (float32), attention and MLP
    head          two buffers of one chunk's logits (`head.CHUNK_BYTES`), and its gradient in float32, 4 V H

Time: 6 floating-point operations a weight and token (arXiv 2001.08361 sec. 2.1), the head's at the responses alone, at
the share of the peak that is asked for. Predictions, not measured on any GPU yet: artifacts/RESULTS.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from grpo_gsm8k.config import GrpoConfig, PromptConfig
from grpo_gsm8k.errors import ConfigError, ModelError
from grpo_gsm8k.trainer.head import CHUNK_BYTES

CPU_CELLS = 2048  # measured: fewer pad less, and fresh memory costs more the larger it is (artifacts/RESULTS.md)
FIXED_CELLS = 8192
MOST_CELLS = 65_536  # beyond it a forward pass gains nothing
SPARE = 0.85  # share of what is free that a plan takes
UTILISATION = 0.4  # of the peak, assumed


@dataclass(frozen=True)
class Gpu:
    """Dense bfloat16 operations a second, bytes of memory, bytes a second; from the vendor's data sheets."""

    flops: float
    memory: float
    bandwidth: float


GPUS: dict[str, Gpu] = {
    "H200": Gpu(989e12, 141e9, 4.8e12),
    "H100": Gpu(989e12, 80e9, 3.35e12),
    "A100": Gpu(312e12, 80e9, 2.04e12),
    "L40S": Gpu(362e12, 48e9, 0.864e12),
    "4090": Gpu(165e12, 24e9, 1.01e12),
}


def cell_bytes(config: Any, width: int) -> int:
    """Activations of one token in all layers; `width`: bytes of a weight."""
    h, i = config.hidden_size, config.intermediate_size
    return int(config.num_hidden_layers * (8 * h + 9 * width * h + 4 * width * i))


def head_bytes(config: Any, device: str) -> int:
    """The head's buffers and its gradient."""
    return int(2 * CHUNK_BYTES[device] + 4 * config.vocab_size * config.hidden_size)


def cells_that_fit(config: Any, width: int, free: float, device: str = "cuda") -> int:
    """Padded cells of a microbatch that leave a share of `free` bytes unused; at least one short row's."""
    room = SPARE * free - head_bytes(config, device)
    return int(min(max(room / cell_bytes(config, width), 256), MOST_CELLS))


def auto_cells(model: Any, deterministic: bool = False) -> int:
    """The token budget of `--max_tokens_per_microbatch 0` for a model on its device, before its first update.

    How an update is cut decides the order of its sums, so a `deterministic` run takes a fixed number of cells on a GPU:
    what is free there may be another amount when it is resumed.
    """
    first = next(model.parameters())
    if first.device.type == "cpu":
        return CPU_CELLS
    if deterministic:
        return FIXED_CELLS
    free, _ = torch.cuda.mem_get_info(first.device)
    free += torch.cuda.memory_reserved(first.device) - torch.cuda.memory_allocated(first.device)
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    width = first.element_size()
    coming = weights * (12 if width == 4 else 14)  # gradients and moments; a bfloat16 gradient on its way to its master
    return cells_that_fit(model.config.get_text_config(), width, free - coming)


def estimate(cfg: GrpoConfig, name: str) -> dict[str, Any]:
    """Predicted peak of memory, token budget and seconds of a GRPO step on one GPU of `GPUS`.

    Lengths are those that the config allows at most; prompts are taken to have 100 tokens. Raises `ConfigError`.
    """
    if name not in GPUS:
        raise ConfigError(f"--estimate {name}: known are {', '.join(GPUS)}")
    gpu, config = GPUS[name], _model_config(cfg)
    weights, width = _weights(config), 4 if cfg.dtype == "float32" else 2
    copies = (not cfg.uses_vllm) + (cfg.kl_coef > 0)
    state = weights * (16 if width == 4 else 18) + copies * weights * width
    cells = cfg.max_tokens_per_microbatch or cells_that_fit(config, width, gpu.memory - state)
    peak = state + head_bytes(config, "cuda") + cells * cell_bytes(config, width)
    head = config.vocab_size * config.hidden_size
    responses = cfg.rollouts_per_step * cfg.max_new_tokens
    body = weights - head * (1 if config.tie_word_embeddings else 2)
    work = 6 * (body * (responses + 100 * cfg.rollouts_per_step) + head * responses) * cfg.epochs
    passes = cfg.max_new_tokens * -(-cfg.rollouts_per_step // cfg.sample_rows)
    return {
        "gpu": name,
        "weights": weights,
        "peak_gb": round(peak / 1e9, 2),
        "fits": peak < gpu.memory,
        "max_tokens_per_microbatch": cells,
        "update_seconds": round(work / (UTILISATION * gpu.flops), 2),
        "update_seconds_at_peak": round(work / gpu.flops, 2),
        "sampling_seconds_at_bandwidth": round(passes * weights * width / gpu.bandwidth, 2),
    }


def out_of_memory(rows: int, longest: int, budget: int) -> ConfigError:
    """What to lower, and by how much, when a microbatch did not fit."""
    cells = rows * longest
    wanted = min(cells, budget) // 2
    if rows > 1:
        return ConfigError(
            f"out of memory at {rows} rows x {longest} tokens: pass --max_tokens_per_microbatch {wanted} (now {budget})"
        )
    return ConfigError(
        f"out of memory at a single row of {longest} tokens, which no token budget makes smaller: halve "
        "--max_new_tokens (or SFT's --max_length), take a smaller model, or let the sampler have another device"
    )


def _model_config(cfg: PromptConfig) -> Any:
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(cfg.model_id, cache_dir=cfg.cache_dir or None)
    except (OSError, ValueError) as fault:
        raise ModelError(f"cannot read the config of {cfg.model_id!r}: {' '.join(str(fault).split())[:300]}") from None
    return found.get_text_config()


def _weights(config: Any) -> int:
    """How many there are, counted without making them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        make: Callable[[Any], Any] = AutoModelForCausalLM.from_config
        return sum(p.numel() for p in make(config).parameters())
