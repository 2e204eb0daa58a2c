"""Packs the rows of a microbatch into one sequence without padding; each shared prompt prefix is computed once.

The rows stand end to end in one sequence of S tokens. A row that shares a prefix with the row before it, as completions
of one prompt do, reuses the prefix's cells, where the gradients of all of them add up:

    rows (B, T)   p0 p1 p2 a0 a1     packed (1, S)   p0 p1 p2 a0 a1 b0 b1 b2
                  p0 p1 p2 b0 b1 b2  positions        0  1  2  3  4  3  4  5

Embedding, norms, projections and MLPs work token by token, on the S tokens. Only attention needs rows. On a GPU in half
precision torch's `varlen_attn` takes them end to end: each row's new tokens are its queries, and its keys and values
are gathered, prefix included. Elsewhere queries, keys and values are copied into padded rows, in two blocks of similar
lengths, for the plain causal kernel, and the output is copied back. Both compute the same function of the same tokens,
so the gradient is the same.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo_gsm8k.datatypes import Datum
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.trainer.architecture import trunk
from grpo_gsm8k.trainer.batch import Batch, make_batch

ATTENTION = "sdpa_of_packed_rows"
EXCHANGEABLE = ("sdpa", ATTENTION)
PROOF = ((1, 2, 3, 4, 5), (1, 2, 6, 7, 8, 9), (9, 3, 1, 2))  # the second shares a prefix with the first


def microbatches(batch: Batch, max_tokens: int, rows: Sequence[int], packs: bool) -> Iterator[tuple[list[int], Batch]]:
    """Split these rows into slices for one forward pass each, longest rows first; yields row numbers and slice.

    A slice has at most `max_tokens` cells: distinct tokens if it `packs`, else rows x longest. A longer row is a slice
    of its own.
    """
    order = _neighbours(batch, rows) if packs else sorted(rows, key=lambda row: (-batch.lengths[row], row))
    shared = _in_common(batch, order) if packs else [0] * len(order)
    start = 0
    while start < len(order):
        end, tokens = start + 1, batch.lengths[order[start]]
        longest = tokens
        while end < len(order):
            tokens += batch.lengths[order[end]] - shared[end]
            if (tokens if packs else longest * (end + 1 - start)) > max_tokens:
                break
            end += 1
        yield order[start:end], batch.select(order[start:end], (0, *shared[start + 1 : end]) if packs else ())
        start = end


def _neighbours(batch: Batch, rows: Sequence[int]) -> list[int]:
    """The rows grouped by prompt, groups with long rows first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in zip(rows, batch.prompt_lengths(rows), strict=True):
        groups.setdefault(tuple(batch.input_ids[row, :prompt].tolist()), []).append(row)
    longest_first = [sorted(group, key=lambda row: (-batch.lengths[row], row)) for group in groups.values()]
    longest_first.sort(key=lambda group: (-batch.lengths[group[0]], group[0]))
    return [row for group in longest_first for row in group]


def _in_common(batch: Batch, order: Sequence[int]) -> list[int]:
    """The length of the prefix that each row shares with the previous one, in this order."""
    ids = batch.input_ids[list(order)]
    lengths = torch.tensor([batch.lengths[row] for row in order])
    shorter = torch.minimum(lengths[1:], lengths[:-1]).unsqueeze(1)
    alike = (ids[1:] == ids[:-1]) & (torch.arange(ids.shape[1]) < shorter)
    return [0, *alike.long().cumprod(1).sum(1).tolist()]


@dataclass(frozen=True)
class Packed:
    """A batch packed into one sequence.

    Attributes:
        input_ids, position_ids: `(1, S)` int64.
        cells: `(B, T)` int64, where each position of the batch stands among the S; 0 where there is none.
        blocks: for attention, the rows of `cells` again, those of like length together, cut to the longest of them.
        home: `(S,)` int64, where each token's output stands in the blocks.
        keys: `(K,)` int64, the cells of all rows end to end, whole, K in all.
        starts: `(B + 1,)` int32 each, where each row's new tokens begin among the S, and its cells among the K.
        longest: new tokens and cells of the longest row, each or somewhat more.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cells: torch.Tensor
    blocks: tuple[torch.Tensor, ...]
    home: torch.Tensor
    keys: torch.Tensor
    starts: tuple[torch.Tensor, torch.Tensor]
    longest: tuple[int, int]

    @classmethod
    def of(cls, batch: Batch) -> Packed:
        """Pack a batch whose `shared` is set.

        The layout depends on lengths only, so it is computed on the CPU, without a device sync.
        """
        ids, device = batch.input_ids, batch.input_ids.device
        blocks, places, at = _alike(batch.lengths), [0] * len(batch), 0
        for rows in blocks:
            for row in rows:
                places[row], at = at, at + batch.lengths[rows[0]]
        shared, length, place = torch.tensor([batch.shared, batch.lengths, places]).unsqueeze(-1)
        columns = torch.arange(ids.shape[1]).expand(ids.shape)  # (B, T); the others are (B, 1)
        there, new = columns < length, columns >= shared
        first = there & new  # in this row for the first time
        begins = (length - shared).cumsum(0) - length  # where a row's position 0 would stand, had it cells of its own
        number = torch.arange(len(batch)).unsqueeze(1)
        owner = (number * new).cummax(0).values  # the last row before that did not take the cell over
        cells = (begins.squeeze(-1)[owner] + columns) * there
        cut = tuple(cells[rows, : batch.lengths[rows[0]]] for rows in blocks)
        fresh = (length - shared).squeeze(-1)
        starts = [torch.cat([n.new_zeros(1), n.cumsum(0)]).int() for n in (fresh, length.squeeze(-1))]
        longest = _rounded(int(fresh.max())), _rounded(max(batch.lengths))

        def upload(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, non_blocking=True)

        tokens = ids.flatten().index_select(0, upload(first.flatten().nonzero().squeeze(-1)))
        positions, home = upload(columns[first]), upload((place + columns)[first])
        return cls(
            tokens.unsqueeze(0),
            positions.unsqueeze(0),
            upload(cells),
            tuple(map(upload, cut)),
            home,
            upload(cells[there]),
            (upload(starts[0]), upload(starts[1])),
            longest,
        )


def attended_cells(batch: Batch, end_to_end: bool) -> tuple[int, int]:
    """Of how many cells attention keeps queries, and keys and values: for the prediction of memory."""
    if not batch.shared:
        return batch.cells, batch.cells
    if end_to_end:
        return batch.cells, sum(batch.lengths)
    padded = sum(len(rows) * batch.lengths[rows[0]] for rows in _alike(batch.lengths))
    return padded + batch.cells // 2, padded  # half of a query's two is what comes out: kept in rows, and put together


def _rounded(longest: int) -> int:
    """The next power of two, since each new number recompiles the layers."""
    return max(128, 1 << (longest - 1).bit_length())


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of these lengths, longest first, in the two blocks for which padded attention costs the least; or in one."""
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])

    def cost(cut: int) -> int:
        return cut * lengths[rows[0]] ** 2 + (len(rows) - cut) * lengths[rows[cut]] ** 2

    cut = min(range(len(rows)), key=cost)
    return [rows[:cut], rows[cut:]] if cut else [rows]


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_blocks: Sequence[torch.Tensor] = (),
    packed_home: torch.Tensor | None = None,
    packed_keys: torch.Tensor | None = None,
    packed_starts: tuple[torch.Tensor, ...] = (),
    packed_longest: tuple[int, ...] = (),
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA attention, `(1, heads, S, width)` of a `Packed` sequence, each row by itself.

    Returns:
        `(1, S, heads, width)`. Whatever comes without a `Packed` is answered as by "sdpa".
    """
    if packed_keys is not None:
        tokens = (x[0].transpose(0, 1) for x in (query, key, value))  # (S, heads, width)
        q, k, v = (x if number == 0 else x.index_select(0, packed_keys) for number, x in enumerate(tokens))
        return varlen(q, k, v, packed_starts, packed_longest, kwargs.get("scaling")).unsqueeze(0), None
    if packed_home is None and _is_token_step(query, key, attention_mask):
        return _attend_to_cache(query, key, value, attention_mask, kwargs.get("scaling"))
    if query.is_cuda and query.dtype == torch.float32:  # no kernel but that of T x T scores takes groups of heads
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # whose heads need no repeating
    if packed_home is None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return found

    def in_rows(x: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        spread = x[0].transpose(0, 1).index_select(0, cells.flatten())  # (B T, heads, width)
        return spread.view(*cells.shape, *spread.shape[1:]).transpose(1, 2)  # (B, heads, T, width)

    outs = []
    for cells in packed_blocks:
        q, k, v = (in_rows(x, cells) for x in (query, key, value))
        out, _ = sdpa_attention_forward(module, q, k, v, None, **kwargs)
        outs.append(out.flatten(0, 1))  # (B T, heads, width)
    return torch.cat(outs).index_select(0, packed_home).unsqueeze(0), None


def _find_varlen() -> Callable[..., torch.Tensor] | None:
    """torch's attention over rows end to end; None where this torch has none that serves."""
    try:
        found: Callable[..., torch.Tensor] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    return found if {"scale", "window_size"} <= inspect.signature(found).parameters.keys() else None  # from 2.11


VARLEN = _find_varlen()
TELLS_GQA = {"enable_gqa": True} if VARLEN and "enable_gqa" in inspect.signature(VARLEN).parameters else {}
"""torch 2.11 takes grouped heads unasked, 2.13 wants to be told."""


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: Sequence[torch.Tensor],
    longest: Sequence[int],
    scaling: float | None,
) -> torch.Tensor:
    """Attention of rows end to end, `(S, heads, width)`, keys and values `(K, kv_heads, width)`: the last query of a
    row sees all of its keys, the one before it one fewer.

    Measured on an H200: equal to the padded kernel, also for the last tokens of a row alone. Under torch's
    deterministic algorithms its backward pass keeps a sum for each block of keys and adds them in order
    (`_flash_attention_backward` in aten hands the flag on), so that a run can be repeated bit for bit.
    """
    assert VARLEN, "whoever packs so has asked `reads_varlen`"
    return VARLEN(query, key, value, *starts, *longest, scale=scaling, window_size=(-1, 0), **TELLS_GQA)


def reads_varlen(model: Any, dtype: torch.dtype | None = None) -> bool:
    """Whether packed rows of this model go through `varlen`: its kernel is a GPU's, in half precision.

    Args:
        dtype: what the model computes in, where its weights do not say it: the shards of several ranks are float32
            until a forward pass gathers them.
    """
    weight = next(model.parameters())
    return weight.is_cuda and (dtype or weight.dtype) in (torch.bfloat16, torch.float16) and VARLEN is not None


def _is_token_step(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> bool:
    grouped = query.shape[2] == 1 and query.shape[1] > key.shape[1]
    return grouped and mask is not None and mask.ndim == 4 and mask.shape[1] == 1


def _attend_to_cache(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> tuple[torch.Tensor, None]:
    """Attention of one new token a row: the heads of a group stand as queries of the one head that they share.

    Keys and values are read as they are. With a mask, torch's fused kernels take no groups, and would read them
    repeated for every head.
    """
    rows, heads, _, width = query.shape
    shared = query.view(rows, key.shape[1], heads // key.shape[1], width)
    out = torch.nn.functional.scaled_dot_product_attention(shared, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, heads, value.shape[3]), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def last_hidden_states(model: Any, batch: Batch) -> torch.Tensor:
    """The last hidden states at the trained positions, `(N, H)`, row by row."""
    if batch.shared:
        packed = Packed.of(batch)
        inputs: dict[str, Any] = {
            "input_ids": packed.input_ids,
            "position_ids": packed.position_ids,
            "attention_mask": packed.cells.bool()[None, None],  # never looked at; of four dimensions, so none is made
        }
        if reads_varlen(model):
            inputs |= {
                "packed_keys": packed.keys,
                "packed_starts": packed.starts,
                "packed_longest": packed.longest,
            }
        else:
            inputs |= {"packed_blocks": packed.blocks, "packed_home": packed.home}
        at = batch.at_trained(packed.cells)
    else:
        inputs, at = {"input_ids": batch.input_ids}, batch.trained
    hidden: torch.Tensor = trunk(model)(**inputs, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, at)


def packed_batch(sequences: Sequence[Sequence[int]]) -> Batch:
    """A packed batch of these ids in which every token is a target."""
    rows = [Datum(tuple(ids), (1,) * len(ids)) for ids in sequences]
    padded = make_batch(rows)
    return replace(padded, shared=tuple(_in_common(padded, range(len(rows)))))


def chosen(model: Any, wanted: str) -> bool:
    """Switch the model to packed batches if `--packing` asks for it. Raises `ConfigError` where it cannot read them."""
    blocks = model.device.type != "cpu" and not reads_varlen(model)  # not measured there without a compiler
    if wanted == "off" or (wanted == "auto" and blocks):
        return False
    able = enable(model)
    if wanted == "on" and not able:
        raise ConfigError("--packing on: this model does not read packed rows as it reads others; leave it at auto")
    return able


def enable(model: Any) -> bool:
    """Switch the model to packed batches; returns False and leaves it unchanged if it cannot read them.

    The model must accept positions, have exchangeable SDPA attention, and attend to whole rows only: windows,
    convolutions and recurrent states would look across rows. A trial then compares a few short rows, packed and padded.
    """
    config = model.config.get_text_config()
    layers = DynamicCache(config=config).layers  # where transformers keeps what kind each layer is
    if any(type(layer) is not DynamicLayer for layer in layers) or config._attn_implementation not in EXCHANGEABLE:
        return False
    takes = inspect.signature(trunk(model).forward).parameters
    if "position_ids" not in takes or "kwargs" not in takes or not model._can_set_attn_implementation():
        return False
    packed = packed_batch(PROOF)
    padded = replace(packed, shared=())
    with torch.no_grad():
        expected = last_hidden_states(model, padded.to(next(model.parameters()).device))
    before = config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    if all(_reads_alike(model, padded, shared, expected) for shared in (packed.shared, ())):
        return True
    model.set_attn_implementation(before)
    return False


@torch.no_grad()
def _reads_alike(model: Any, padded: Batch, shared: Sequence[int], expected: torch.Tensor) -> bool:
    """Whether the model gives the expected outputs for rows with these shared prefixes; empty means padded rows."""
    try:
        packed = replace(padded, shared=tuple(shared))
        found = last_hidden_states(model, packed.to(expected.device))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False  # the model's own code, at a loss: it drops what its attention needs, or reads the mask itself
    limit = 1e-3 if model.dtype == torch.float32 else 0.1
    return bool((found.float() - expected.float()).abs().max() <= limit * expected.float().abs().max())
