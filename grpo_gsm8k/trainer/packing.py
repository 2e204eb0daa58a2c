"""What a forward pass reads: every token once, without padding, and what rows begin with alike once for all of them.

The rows of a microbatch stand end to end in one sequence of S tokens. A row that begins like the row before it, as the
completions of one prompt do, takes those cells over, and the gradients of all of them meet there:

    rows (B, T)   p0 p1 p2 a0 a1     packed (1, S)   p0 p1 p2 a0 a1 b0 b1 b2
                  p0 p1 p2 b0 b1 b2  positions        0  1  2  3  4  3  4  5

Embedding, norms, projections and MLPs work token by token, on the S tokens. Attention alone needs rows: queries, keys
and values are copied into rows for it, in two blocks of like lengths, where the kernel of plain causal rows serves, and
its output back. It is the same function of the same tokens, so the gradient is the same, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo_gsm8k.datatypes import Datum
from grpo_gsm8k.trainer.architecture import trunk
from grpo_gsm8k.trainer.batch import Batch, make_batch

ATTENTION = "sdpa_of_packed_rows"
EXCHANGEABLE = ("sdpa", ATTENTION)
PROOF = ((1, 2, 3, 4, 5), (1, 2, 6, 7, 8, 9), (9, 3, 1, 2))  # the second branches off in the middle of the first


def microbatches(batch: Batch, max_tokens: int, rows: Sequence[int], packs: bool) -> Iterator[tuple[list[int], Batch]]:
    """Slices of these rows that a forward pass reads at once, longest rows first; with the rows' numbers.

    A slice has at most `max_tokens` cells: tokens, each read once, where it `packs`; else rows x longest, padded. A
    single row that is longer is a slice of its own.
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
    """These rows, those with the same prompt together, prompts with long rows first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in zip(rows, batch.prompt_lengths(rows), strict=True):
        groups.setdefault(tuple(batch.input_ids[row, :prompt].tolist()), []).append(row)
    longest_first = [sorted(group, key=lambda row: (-batch.lengths[row], row)) for group in groups.values()]
    longest_first.sort(key=lambda group: (-batch.lengths[group[0]], group[0]))
    return [row for group in longest_first for row in group]


def _in_common(batch: Batch, order: Sequence[int]) -> list[int]:
    """How many first tokens each row of this order has in common with the one before it."""
    ids = batch.input_ids[list(order)]
    lengths = torch.tensor([batch.lengths[row] for row in order])
    shorter = torch.minimum(lengths[1:], lengths[:-1]).unsqueeze(1)
    alike = (ids[1:] == ids[:-1]) & (torch.arange(ids.shape[1]) < shorter)
    return [0, *alike.long().cumprod(1).sum(1).tolist()]


@dataclass(frozen=True)
class Packed:
    """A batch as one sequence.

    Attributes:
        input_ids, position_ids: `(1, S)` int64.
        cells: `(B, T)` int64, where each position of the batch stands among the S; 0 where there is none.
        blocks: for attention, the rows of `cells` again, those of like length together, cut to the longest of them.
        home: `(S,)` int64, the position among those of all blocks that each token is read from.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cells: torch.Tensor
    blocks: tuple[torch.Tensor, ...]
    home: torch.Tensor

    @classmethod
    def of(cls, batch: Batch) -> Packed:
        """A batch that says what its rows share, on its device.

        The layout follows from lengths alone, so it is made on the CPU: a GPU would be waited for.
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
        starts = (length - shared).cumsum(0) - length  # where a row's position 0 would stand, had it cells of its own
        number = torch.arange(len(batch)).unsqueeze(1)
        owner = (number * new).cummax(0).values  # the last row before that did not take the cell over
        cells = (starts.squeeze(-1)[owner] + columns) * there
        cut = tuple(cells[rows, : batch.lengths[rows[0]]] for rows in blocks)

        def upload(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, non_blocking=True)

        tokens = ids.flatten().index_select(0, upload(first.flatten().nonzero().squeeze(-1)))
        positions, home = upload(columns[first]), upload((place + columns)[first])
        return cls(tokens.unsqueeze(0), positions.unsqueeze(0), upload(cells), tuple(map(upload, cut)), home)


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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA attention, `(1, heads, S, width)` of a `Packed` sequence, each row by itself.

    Returns:
        `(1, S, heads, width)`. Whatever comes without a `Packed` is answered as by "sdpa".
    """
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


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def last_hidden_states(model: Any, batch: Batch) -> torch.Tensor:
    """The model's last hidden state at each trained position, `(N, H)`, row by row."""
    if batch.shared:
        packed = Packed.of(batch)
        inputs = {
            "input_ids": packed.input_ids,
            "position_ids": packed.position_ids,
            "attention_mask": packed.cells.bool()[None, None],  # never looked at; of four dimensions, so none is made
            "packed_blocks": packed.blocks,
            "packed_home": packed.home,
        }
        at = batch.at_trained(packed.cells)
    else:
        inputs, at = {"input_ids": batch.input_ids}, batch.trained
    hidden: torch.Tensor = trunk(model)(**inputs, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, at)


def enable(model: Any) -> bool:
    """Let the model read packed batches; False, and nothing changed, where it cannot.

    It must take positions, have SDPA attention that can be exchanged, and no layers but those that attend to a whole
    row: windows, convolutions and recurrent states would look across rows. Then it is asked: a few short rows must come
    out alike, packed and not.
    """
    config = model.config.get_text_config()
    layers = DynamicCache(config=config).layers  # where transformers keeps what kind each layer is
    if any(type(layer) is not DynamicLayer for layer in layers) or config._attn_implementation not in EXCHANGEABLE:
        return False
    takes = inspect.signature(trunk(model).forward).parameters
    if "position_ids" not in takes or "kwargs" not in takes or not model._can_set_attn_implementation():
        return False
    rows = [Datum(ids, (1,) * len(ids)) for ids in PROOF]
    padded = make_batch(rows, 0)
    with torch.no_grad():
        expected = last_hidden_states(model, padded.to(next(model.parameters()).device))
    model.set_attn_implementation(ATTENTION)
    if all(_reads_alike(model, padded, shared, expected) for shared in (_in_common(padded, range(len(rows))), [])):
        return True
    model.set_attn_implementation("sdpa")
    return False


@torch.no_grad()
def _reads_alike(model: Any, padded: Batch, shared: Sequence[int], expected: torch.Tensor) -> bool:
    """Whether the model finds what is expected in rows that share so much; nothing, where they stay padded."""
    try:
        packed = replace(padded, shared=tuple(shared))
        found = last_hidden_states(model, packed.to(expected.device))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False  # the model's own code, at a loss: it drops what its attention needs, or reads the mask itself
    limit = 1e-3 if model.dtype == torch.float32 else 0.1
    return bool((found.float() - expected.float()).abs().max() <= limit * expected.float().abs().max())
