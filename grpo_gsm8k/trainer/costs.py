"""Computes the cost of a dense transformer from its shape: bytes of memory and floating-point operations.

`grpo --estimate`, `launch plan`, a run's own prediction and every MFU use it. It does not import torch.

N parameters of b bytes (N' trained: all, or LoRA's rank x (in + out) of every linear layer), L layers of width H, MLP
width I, heads and kv key-value heads of width d, vocabulary V. While a forward pass reads T cells (tokens, padding
included) and applies the head to some, a GPU holds `training_bytes`: the sum of

    state       N b, and N' (4 gradient + 8 AdamW + 4 master if b = 2), 8 and 4 of it elsewhere if offloaded; of several
                ranks 16 N / ranks, what FSDP has gathered, and rank 0's whole copy
    copies      N b each: the embedded sampler, the KL term's reference
    kept        T L layer (T L b H with activation checkpointing) and the last norm, where autograd keeps in each layer
                layer = H (8 + 4 b) + b d (2 heads + 2 kv) + 4 b I + 4 heads + 8
    and the largest of
      head      a chunk of logits (on a CPU two in float32, one more in bfloat16), hidden states, 4 V H for its gradient
      backward  gradients on their way through a layer: b I + 16 H a cell (24 H if b = 2, norms being float32), the
                largest matrix's; with checkpointing the layer, too

`layer` is, to the byte, what autograd keeps of Qwen2 on a CPU, also where torch.compile has fused it; the whole is
within 10 % of the allocator's peak there (tests/test_costs.py), and on an H200 within 0.3 % with padded rows. After
arXiv 2205.05198 sec. 4, with SDPA attention, which keeps no T x T scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_gsm8k.config import GrpoConfig, SftConfig, TrainConfig

GIB = 2**30
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
"""Size of one chunk of the head's logits (`trainer/head.py`), on a CPU in float32. Measured on both: an H200
gains 9 % from 512 MiB to 1 GiB, and 2 % to 2 GiB."""

CONTEXT = 2 * GIB  # CUDA, its libraries and NCCL, outside of the allocator's figures
FRAGMENTS = 1.08  # lost to fragmentation in the allocator: a guess
PROMPT = 100  # tokens, about GSM8K's
ENGINE_LEAST = 4 * GIB  # vLLM's context, graphs and activations, and a cache worth the name: a guess
ENGINE_MOST = 0.9  # of a GPU that vLLM does not share: its own default
SPARE = 0.85  # the share of the free memory that a plan uses
LEAST_CELLS = 256  # a short row
MOST_CELLS = 16_384  # measured on an H200: passes of 33k to 65k cells were slower, at 1.6 to 3 times the memory


@dataclass(frozen=True)
class Gpu:
    """Dense bfloat16 operations a second, bytes of memory, bytes a second, and what the driver calls it."""

    flops: float
    memory: float
    bandwidth: float
    names: tuple[str, ...]


GPUS: dict[str, Gpu] = {
    "B200": Gpu(2250e12, 180e9, 7.7e12, ("NVIDIA B200",)),
    "MI300X": Gpu(1307e12, 192e9, 5.3e12, ("AMD Instinct MI300X",)),
    "H200": Gpu(989e12, 141e9, 4.8e12, ("NVIDIA H200",)),
    "H200-NVL": Gpu(835e12, 141e9, 4.8e12, ("NVIDIA H200 NVL",)),
    "H100": Gpu(989e12, 80e9, 3.35e12, ("NVIDIA H100 80GB HBM3",)),
    "H100-NVL": Gpu(835e12, 94e9, 3.9e12, ("NVIDIA H100 NVL",)),
    "H100-PCIe": Gpu(756e12, 80e9, 2.0e12, ("NVIDIA H100 PCIe",)),
    "A100": Gpu(312e12, 80e9, 2.04e12, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")),
    "A100-40GB": Gpu(312e12, 40e9, 1.56e12, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
    "L40S": Gpu(362e12, 48e9, 0.864e12, ("NVIDIA L40S",)),
    "L4": Gpu(121e12, 24e9, 0.3e12, ("NVIDIA L4",)),
    "5090": Gpu(209e12, 32e9, 1.79e12, ("NVIDIA GeForce RTX 5090",)),
    "4090": Gpu(165e12, 24e9, 1.01e12, ("NVIDIA GeForce RTX 4090",)),
}
"""From the vendors' data sheets: without sparsity, sums in float32."""


def gpu_called(name: str) -> Gpu | None:
    """The GPU with this driver name; None if it is not on the list."""
    return next((gpu for gpu in GPUS.values() if name in gpu.names), None)


@dataclass(frozen=True)
class Shape:
    """A dense transformer with grouped attention and a gated MLP. Tied parameters count once."""

    parameters: int
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any], parameters: int) -> Shape:
        """From a transformers config. Raises `KeyError`, `TypeError` or `ValueError` for other architectures."""
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return cls(
            parameters=parameters,
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            mlp=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def head(self) -> int:
        """Weights of the output head."""
        return self.vocab * self.hidden

    @property
    def attention(self) -> int:
        """Total width of the queries, and of keys and values, per token."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def matrices(self) -> int:
        """Weights of the layers' linear maps, which apply to every token."""
        return self.layers * self.hidden * (self.attention + self.heads * self.head_dim + 3 * self.mlp)

    def adapters(self, rank: int) -> int:
        """LoRA's parameters on every linear layer but the head: rank x (in + out) of each."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * (self.hidden + queries) + 2 * (self.hidden + keys)
        return rank * self.layers * (attention + 3 * (self.hidden + self.mlp))


# ------------------------------------------------------------------------------------------------- operations


def forward_flops(shape: Shape, tokens: int, targets: int, pairs: int = 0) -> float:
    """Operations of the matrix products of a forward pass; see `training_flops`."""
    return 2.0 * (shape.matrices * tokens + shape.head * targets) + _attention_flops(shape, pairs)


def _attention_flops(shape: Shape, pairs: int) -> float:
    """Operations of attention: queries with keys, and scores with values."""
    return 4.0 * shape.layers * shape.heads * shape.head_dim * pairs


def training_flops(shape: Shape, tokens: int, targets: int, pairs: int = 0, lora_rank: int = 0) -> float:
    """Operations of forward and backward passes (6 a weight and token: arXiv 2001.08361 sec. 2.1).

    Counted are matrix products: the layers' on every token, the head's on the targets alone, attention's on `pairs`.
    Of frozen weights no gradient is formed, so with LoRA 4 instead of 6. Not counted is work that is done twice, by
    activation checkpointing or inside a fused attention: this is the numerator of an MFU (arXiv 2204.02311 app. B).

    Args:
        tokens: that pass through the layers. A prompt that several rows share is computed once and counts once for an
            MFU; who counts each row in full gets a nominal figure, which may exceed 1.
        pairs: of a query and a key that it sees, see `causal_pairs`.
    """
    forward = forward_flops(shape, tokens, targets, pairs)
    if not lora_rank:
        return 3 * forward
    return 2 * forward + _attention_flops(shape, pairs) + 6.0 * shape.adapters(lora_rank) * tokens


def causal_pairs(lengths: Iterable[int]) -> int:
    """Number of (query, key) pairs of causal attention, in rows of these lengths."""
    return sum(n * (n + 1) // 2 for n in lengths)


def decoding_bytes(shape: Shape, width: int, lengths: Iterable[int]) -> float:
    """Bytes that a decoding step reads for rows of these lengths: the weights, and each row's keys and values."""
    return width * (shape.matrices + shape.head) + cache_bytes(shape, width, sum(lengths))


# ------------------------------------------------------------------------------------------------------ memory


@dataclass(frozen=True)
class Setup:
    """The settings of training that memory depends on.

    Attributes:
        width: bytes of a weight while it computes, 2 or 4.
        compiled: torch.compile's partition of the graph keeps fewer of a layer's tensors and computes them again.
        offload: AdamW's masters and moments are in main memory.
        copies: whole further copies of the weights on this GPU.
        reference: a frozen copy for the KL term; of several ranks each holds its shards.
        device: cuda or cpu, which differ in how large a chunk of logits is, and how its gradient is formed.
        cached: tokens of which the embedded sampler on this GPU keeps keys and values, also while the learner works.
    """

    width: int = 2
    lora_rank: int = 0
    checkpointing: bool = False
    compiled: bool = False
    offload: bool = False
    ranks: int = 1
    copies: int = 0
    reference: bool = False
    device: str = "cuda"
    cached: int = 0


def setup_of(cfg: TrainConfig, width: int, ranks: int = 1, device: str = "cuda") -> Setup:
    """That of a run, with what stands beside the learner: the embedded sampler, or rank 0's model to save from."""
    sampler = not cfg.uses_vllm and not (isinstance(cfg, SftConfig) and cfg.eval_mode == "async")
    return Setup(
        width=width,
        lora_rank=cfg.lora_rank,
        checkpointing=cfg.activation_checkpointing,
        compiled=cfg.compile == "on" or (cfg.compile == "auto" and _compiles(cfg, width, ranks, device)),
        offload=cfg.optimizer_device == "cpu",
        ranks=ranks,
        copies=int(sampler or ranks > 1),
        reference=isinstance(cfg, GrpoConfig) and cfg.kl_coef > 0 and not cfg.lora_rank,
        device=device,
        cached=_sampled_rows(cfg) * (PROMPT + cfg.max_new_tokens) if sampler and device == "cuda" else 0,
    )


def _compiles(cfg: TrainConfig, width: int, ranks: int, device: str) -> bool:
    """What `compiled.compiles` comes to for a large model, if the machine has a compiler."""
    return device == "cuda" and width == 2 and ranks == 1 and cfg.packing != "off" and not cfg.deterministic


def _sampled_rows(cfg: TrainConfig) -> int:
    """Completions that the embedded sampler decodes side by side."""
    return min(cfg.sample_rows, cfg.rollouts_per_step) if isinstance(cfg, GrpoConfig) else cfg.sample_rows


def state_bytes(shape: Shape, setup: Setup, gradients: bool = True) -> int:
    """Weights, gradients, optimizer and copies, on the GPU that holds most of them."""
    n, b = shape.parameters, setup.width
    trained = shape.adapters(setup.lora_rank) if setup.lora_rank else n
    master = 4 if b == 2 or setup.ranks > 1 else 0
    each = (0 if setup.offload else 8 + master) + 4 * gradients
    copies = b * n * setup.copies + (b * n * setup.reference if setup.ranks == 1 else 0)
    copies += cache_bytes(shape, b, setup.cached)
    if setup.ranks == 1:
        return b * n + (b * trained if setup.lora_rank else 0) + each * trained + copies
    # The root's weights stay gathered; of the layers this one and the next, one whole gradient and its float32 sum.
    layer = shape.matrices // shape.layers
    gathered = b * (n - shape.matrices + 3 * layer) + 4 * layer
    return (each * n + 4 * n * setup.reference) // setup.ranks + gathered + copies


def copy_bytes(shape: Shape, setup: Setup) -> int:
    """Main memory that `--async_save` keeps for its copy: what is saved of weights, moments and masters."""
    trained = shape.adapters(setup.lora_rank) if setup.lora_rank else shape.parameters
    return (setup.width + 8 + (4 if setup.width == 2 else 0)) * trained


def layer_bytes(shape: Shape, setup: Setup) -> int:
    """What autograd keeps of one cell in one layer that is run in full."""
    b, h, i = setup.width, shape.hidden, shape.mlp
    attended = (
        2 * b * shape.head_dim * (shape.heads + _kept_kv_heads(shape, setup)) + 4 * shape.heads
    )  # q, out, k, v; log-sum-exp
    if setup.compiled:  # input, two normed inputs, attention's output twice, the MLP's three
        return b * (3 * h + shape.heads * shape.head_dim + 3 * i) + attended + 8 + 7 * b * setup.lora_rank
    if setup.lora_rank:  # frozen norms keep no normed input; every adapter keeps what stands between its matrices
        return (8 + 2 * b) * h + attended + 4 * b * i + 8 + 7 * b * setup.lora_rank
    return (8 + 4 * b) * h + attended + 4 * b * i + 8


def _kept_kv_heads(shape: Shape, setup: Setup) -> int:
    """A GPU's kernel takes no groups of heads in float32: keys and values are repeated (`packing.attention`)."""
    return shape.heads if setup.width == 4 and setup.device == "cuda" else shape.kv_heads


def cell_bytes(shape: Shape, setup: Setup) -> int:
    """What autograd keeps of one cell between forward and backward: all layers, the last norm, the id."""
    each = setup.width * shape.hidden if setup.checkpointing else layer_bytes(shape, setup)
    return shape.layers * each + (4 + setup.width) * shape.hidden + 12


def head_bytes(shape: Shape, setup: Setup, targets: int) -> int:
    """The head's buffers, hidden states and gradient while it works on so many targets."""
    trained = not setup.lora_rank
    if setup.device == "cuda":  # one buffer of logits, and their derivative in its place
        buffers = max(1, min(CHUNK_BYTES["cuda"] // (setup.width * shape.vocab), targets)) * shape.vocab * setup.width
        return buffers + 2 * setup.width * shape.hidden * targets + (4 * shape.head if trained else 0)
    rows = max(1, min(CHUNK_BYTES[setup.device] // (4 * shape.vocab), targets))
    narrow = 0 if setup.width == 4 else 2
    widened = 4 if narrow and trained and setup.device == "cpu" else 0  # for the product that is the weight's gradient
    buffers = rows * shape.vocab * (8 + narrow + widened)
    return buffers + 2 * setup.width * shape.hidden * targets + (4 * shape.head if trained else 0)


def training_bytes(
    shape: Shape, setup: Setup, cells: int, targets: int | None = None, attended: tuple[int, int] | None = None
) -> int:
    """The most that is allocated while an update is made in passes of so many cells.

    Args:
        targets: all cells, unless given.
        attended: cells of which attention keeps queries, and keys and values, where rows are packed; else all.
    """
    queries, keys = (n - cells for n in attended) if attended else (0, 0)
    width = 2 * setup.width * shape.head_dim * (shape.layers if not setup.checkpointing else 1)
    apart = width * (shape.heads * queries + _kept_kv_heads(shape, setup) * keys)
    b, h, trained_head = setup.width, shape.hidden, not setup.lora_rank
    sums = b + (4 if b == 2 else 0)  # a gradient in the model's type, and as it goes to its float32 master
    at_head = b * h * cells + head_bytes(shape, setup, cells if targets is None else targets)
    waiting = b * shape.head if trained_head and shape.tied else 0  # for the embedding's, with which it is summed
    turning = sums * shape.head if trained_head and b == 2 else 0
    again = layer_bytes(shape, setup) if setup.checkpointing else 0
    matrix = 0 if setup.lora_rank else sums * h * shape.mlp
    norms = 4 * b * h if again or b == 4 else 24 * h
    backward = waiting + matrix + cells * (again + b * shape.mlp + norms)
    ending = (b + sums) * shape.head if trained_head else 0  # what the layers kept is gone by then
    kept = cells * cell_bytes(shape, setup) + apart
    return state_bytes(shape, setup) + max(kept + max(at_head, turning, backward), ending)


def cache_bytes(shape: Shape, width: int, tokens: int) -> int:
    """Keys and values of so many tokens."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * width * tokens


def sampler_bytes(shape: Shape, setup: Setup, cfg: TrainConfig) -> int:
    """What the embedded sampler needs beside its copy of the weights: cache, one layer's anew, logits and softmax.

    Of prompts of `PROMPT` tokens and completions of the greatest length.
    """
    rows = _sampled_rows(cfg)
    cache = cache_bytes(shape, setup.width, rows * (PROMPT + cfg.max_new_tokens))
    held = cache if setup.cached else 0  # counted with the state
    return cache - held + cache // (2 * shape.layers) + rows * shape.vocab * (setup.width + 8)


def beside_bytes(shape: Shape, setup: Setup, cfg: TrainConfig) -> int:
    """What the embedded sampler takes while the learner learns; 0 where they take turns, or it is elsewhere."""
    overlaps = isinstance(cfg, GrpoConfig) and cfg.mode == "one_step_off" and not cfg.uses_vllm
    return sampler_bytes(shape, setup, cfg) if overlaps else 0


def engine_share(shape: Shape, setup: Setup, total: float, cells: int = 0) -> float:
    """The share of a GPU of `total` bytes that vLLM may take beside the learner on it; 0 where it has no room.

    While vLLM is awake the learner rests, with its weights, masters and moments; with `cells` it goes on learning in
    passes of so many.
    """
    learner = training_bytes(shape, setup, cells) if cells else state_bytes(shape, setup, gradients=False)
    room = total - FRAGMENTS * learner - CONTEXT
    needed = 1.1 * setup.width * shape.parameters + ENGINE_LEAST
    return min(ENGINE_MOST, int(100 * room / total) / 100) if room > needed else 0.0


def cells_that_fit(shape: Shape, setup: Setup, room: float) -> int:
    """The largest passes whose `training_bytes` stay within `room`, in cells; at least those of a short row."""
    return most_cells(lambda cells: training_bytes(shape, setup, cells), room)


def most_cells(taken: Callable[[int], float], room: float) -> int:
    """The most cells of which `taken`, which grows with them, stays within `room`."""
    few, many = LEAST_CELLS, MOST_CELLS
    while few < many:
        middle = (few + many + 1) // 2
        few, many = (middle, many) if taken(middle) <= room else (few, middle - 1)
    return few
