"""Rows of tokens go in, logits come out, with a cache: side by side with the bits that each row gets alone, or plainly.

How a matrix product sums a row depends on how many rows there are. Rows are filled up to a multiple of `align`, at most
`MOST_ROWS` come from several requests, and `sums_alike` tries whether their number matters within these bounds.
Attention reads each row's own keys alone, without the padding of its neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from grpo_gsm8k.engines.hf import Decoder
from grpo_gsm8k.serve.learn import logits_of
from grpo_gsm8k.trainer import packing
from grpo_gsm8k.trainer.architecture import trunk

ATTENTION = "sdpa_row_by_row"
EXCHANGEABLE = (*packing.EXCHANGEABLE, ATTENTION)
LEAST_ROWS = 4  # of a matrix product, on each thread: fewer have kernels of their own, which sum in another order
FEWEST_ROWS = 16  # on all threads: with two or three columns, or with many terms, fewer have kernels of their own
MOST_ROWS = 2048  # of several prompts: with more, the sums may be split in other places
MOST_DRAWN = 256  # rows that draw together, so many has the head's product
WIDE = 1 << 15  # columns that the head alone has
Group = tuple[int, int, int]  # rows start ... stop - 1 of a batch have this much padding before them


def row_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_groups: Sequence[Group] = (),
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention `(B, heads, T, width)` of rows padded on the left; what comes without groups is packing's."""
    if not row_groups:
        return packing.attention(module, query, key, value, attention_mask, **kwargs)
    outs, shared, scale = [], query.shape[1] // key.shape[1], kwargs.get("scaling")
    for start, stop, pad in row_groups:
        q, k, v = query[start:stop], key[start:stop, :, pad:], value[start:stop, :, pad:]
        if query.shape[2] == 1:  # the heads of a group stand as queries of the one head that they share
            q = q.view(stop - start, key.shape[1], shared, -1)
            out = _attend(q, k, v, None, scale)
            outs.append(out.reshape(stop - start, query.shape[1], 1, -1))
            continue
        k, v = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (k, v))
        q = q[:, :, pad:]
        length = q.shape[2]
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        out = _attend(q, k, v, causal if length < LEAST_ROWS else True, scale)
        outs.append(torch.nn.functional.pad(out, (0, 0, pad, 0)))
    return torch.cat(outs).transpose(1, 2).contiguous(), None


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: torch.Tensor | bool | None, scale: float | None
) -> torch.Tensor:
    """Attention of at least `LEAST_ROWS` queries, the last one repeated where there are fewer."""
    few = q.shape[2]
    if missing := max(LEAST_ROWS - few, 0):
        q = torch.cat([q, q[:, :, -1:].expand(-1, -1, missing, -1)], 2)
        if isinstance(causal, torch.Tensor):
            causal = torch.cat([causal, causal[-1:].expand(missing, -1)])
    mask = causal if isinstance(causal, torch.Tensor) else None
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=mask, is_causal=causal is True, scale=scale)[:, :, :few]


AttentionInterface.register(ATTENTION, row_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@functools.cache
def sums_alike(terms: int, columns: int, dtype: torch.dtype, align: int, threads: int) -> bool:
    """Whether a matrix product of these sizes sums a row alike in any company: tried with many numbers of rows.

    Args:
        threads: torch's, which decide the kernel too.
    """
    del threads
    most = MOST_DRAWN if columns > WIDE else MOST_ROWS
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(most + 3, terms, generator=draws).to(dtype)
    weight = torch.randn(columns, terms, generator=draws).to(dtype)
    whole = torch.nn.functional.linear(x[:most], weight)
    return all(  # three rows further down, so that each stands elsewhere
        torch.equal(torch.nn.functional.linear(x[3 : rows + 3].clone(), weight)[:-3], whole[3:rows])
        for rows in _sizes(align, most)
    )


def _sizes(align: int, most: int) -> Iterator[int]:
    """Every number of rows that may draw together, and behind them one in each eighth."""
    rows = align
    while rows <= most:
        yield rows
        rows = up(rows + max(align, rows // 8 if rows >= MOST_DRAWN else 0), align)


class RowDecoder:
    """Decodes rows of which each gets the bits that it would get alone. They are padded on the left."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], copies: Sequence[int], align: int) -> None:
        """`copies`: how many rows of each prompt. The prompts are sorted by length."""
        self.model, self.align = model, align
        self.hidden: list[torch.Tensor] = []  # of each prompt (N, H)
        caches = [self._prefill(part) for part in _parts(prompts, align)]
        longest = up(len(prompts[-1]), align)
        self.cache = _joined(caches, longest, model.config)
        self.pads = [longest - len(ids) for ids in prompts]
        self.positions = torch.tensor([[len(ids) - 1] for ids in prompts], device=model.device)
        self.last = torch.stack([hidden[-1] for hidden in self.hidden])
        if index := [number for number, count in enumerate(copies) for _ in range(count)]:
            self.select(index)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> DynamicCache:
        """Read these prompts, `hidden` of each; their keys and values."""
        longest, device = up(len(prompts[-1]), self.align), self.model.device
        pads = [longest - len(ids) for ids in prompts]
        ids = torch.tensor([[0] * pad + list(p) for pad, p in zip(pads, prompts, strict=True)]).to(device)
        positions = (torch.arange(longest) - torch.tensor(pads).unsqueeze(1)).clamp(min=0).to(device)
        cache = DynamicCache(config=self.model.config)
        found = self._read(ids, positions, _groups(pads), cache)  # (P, T, H)
        self.hidden += [row[pad:] for row, pad in zip(found, pads, strict=True)]
        return cache

    def prompt_hidden(self, number: int) -> torch.Tensor:
        """`(N, H)`, the last hidden states of a prompt."""
        return self.hidden[number]

    def select(self, index: Sequence[int]) -> None:
        """Keep these rows, filled up with the last of them."""
        self.real = len(index)
        filled = [*index, *[index[-1]] * (up(len(index), self.align) - len(index))]
        at = torch.tensor(filled, device=self.model.device)
        self.cache.batch_select_indices(at)
        self.pads, self.positions = [self.pads[i] for i in filled], self.positions[at]
        self.last = self.last[at]

    def logits(self) -> torch.Tensor:
        """The logits `(rows, V)` behind each row, float32."""
        return logits_of(self.model, self.last)[: self.real]

    def step(self, tokens: torch.Tensor) -> None:
        """Append a token to each row."""
        filled = torch.cat([tokens, tokens[-1:].expand(len(self.pads) - len(tokens))])
        self.positions = self.positions + 1
        self.last = self._read(filled.unsqueeze(1), self.positions, _groups(self.pads), self.cache)[:, -1]

    def _read(
        self, ids: torch.Tensor, positions: torch.Tensor, groups: list[Group], cache: DynamicCache
    ) -> torch.Tensor:
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # of four dimensions, so that none is made
        out = trunk(self.model)(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            row_groups=groups,
        )
        hidden: torch.Tensor = out.last_hidden_state
        return hidden


class PlainDecoder:
    """Decodes the rows of one request, with the model's own attention and cache."""

    def __init__(self, model: Any, prompt: Sequence[int], copies: int) -> None:
        self.model, self.prompt = model, prompt
        self.decoder = Decoder(model, 0)
        self.last_logits = self.decoder.prefill([prompt], copies).float() if copies else None

    def prompt_hidden(self, number: int) -> torch.Tensor:
        """`(N, H)`, the last hidden states of the prompt."""
        ids = torch.tensor([list(self.prompt)], device=self.model.device)
        hidden: torch.Tensor = trunk(self.model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        return hidden

    def select(self, index: Sequence[int]) -> None:
        """Keep these rows."""
        at = torch.tensor(index, device=self.model.device)
        self.decoder.select(at)
        assert self.last_logits is not None
        self.last_logits = self.last_logits[at]

    def logits(self) -> torch.Tensor:
        """The logits `(rows, V)` behind each row, float32."""
        assert self.last_logits is not None
        return self.last_logits

    def step(self, tokens: torch.Tensor) -> None:
        """Append a token to each row."""
        self.last_logits = self.decoder.step(tokens).float()


def _parts(prompts: Sequence[Sequence[int]], align: int) -> Iterator[list[Sequence[int]]]:
    """Prompts that are read together: as many as have `MOST_ROWS` tokens, padded; a longer one by itself."""
    part: list[Sequence[int]] = []
    for ids in prompts:
        if part and (len(part) + 1) * up(len(ids), align) > MOST_ROWS:
            yield part
            part = []
        part.append(ids)
    yield part


def _joined(caches: Sequence[DynamicCache], longest: int, config: Any) -> DynamicCache:
    """The keys and values of all rows, padded on the left to one length."""
    if len(caches) == 1:
        return caches[0]
    found = DynamicCache(config=config)
    for number, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        keys = torch.cat([_padded(layer.keys, longest) for layer in layers])
        found.update(keys, torch.cat([_padded(layer.values, longest) for layer in layers]), number)
    return found


def _padded(x: torch.Tensor, longest: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 0, longest - x.shape[2], 0))


def _groups(pads: Sequence[int]) -> list[Group]:
    """Neighbouring rows with the same padding."""
    found: list[Group] = []
    for row, pad in enumerate(pads):
        if found and found[-1][2] == pad:
            found[-1] = (found[-1][0], row + 1, pad)
        else:
            found.append((row, row + 1, pad))
    return found


def up(n: int, multiple: int) -> int:
    """The next multiple that is not below n."""
    return -(-n // multiple) * multiple
