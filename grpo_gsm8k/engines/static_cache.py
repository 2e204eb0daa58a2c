"""Decodes on a GPU with a static key-value cache, so that a whole token step is one CUDA graph.

Launched kernel by kernel, a step of a 1.5B model takes 46 ms on an H200 for any number of rows: the GPU waits for
Python (artifacts/RESULTS.md). Here a step (forward pass, draw, bookkeeping) uses the same addresses each time, so it is
captured once per number of rows and columns, and replayed by one call. The host reads the drawn tokens every
`READ_EVERY` steps and discards those behind the end of a row. When half of the rows have finished, the rest moves into
a graph of half the size.

    columns   0 ......... longest-1   longest, longest + 1, ...
    row       padding, its prompt     its completion; every row writes the same column in a step

Prompts are read by the plain decoder, and their keys and values copied into the buffers. On a CPU, or where a capture
fails, the same steps run one kernel after the other.

How many rows and columns a step reads follows from its own call, not from what was sampled before: sums over another
number of columns are rounded differently, and a resumed run has not sampled what came before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from grpo_gsm8k.errors import NonFiniteError
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.trainer import architecture
from grpo_gsm8k.trainer.packing import EXCHANGEABLE

READ_EVERY = 8  # steps; a row that has ended costs at most as many more
LEAST_ROWS, LEAST_COLUMNS = 8, 256  # of a graph; the next one has twice as many

Choose = Callable[[torch.Tensor, torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor]]
"""Maps logits `(rows, V)` and uniform numbers `(rows,)` to tokens and log-probabilities, without a device sync."""


class Row(Protocol):
    """A completion that is being decoded."""

    uniforms: torch.Tensor


class _Layer(DynamicLayer):
    """Keys and values `(rows, heads, columns, width)` of one layer, views of its buffers; a step writes one column."""

    def __init__(self, column: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.column = column

    def see(self, keys: torch.Tensor, values: torch.Tensor, columns: torch.Tensor) -> None:
        """What the next step reads and writes; `columns` are the numbers of those that it reads."""
        self.keys, self.values, self.columns, self.is_initialized = keys, values, columns, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's column; all columns, of which the mask hides those behind it."""
        assert self.keys is not None and self.values is not None
        _write(self.keys, 2, self.columns, self.column, key_states)
        _write(self.values, 2, self.columns, self.column, value_states)
        return self.keys, self.values


def _write(buffer: torch.Tensor, dim: int, numbers: torch.Tensor, at: torch.Tensor, entry: torch.Tensor) -> None:
    """Put `entry` at index `at`, `(1,)`, of a dimension whose indices are `numbers`; waits for nothing.

    torch's deterministic `index_copy_` copies a view to and fro and sorts. One pass over the buffer does less.
    """
    if torch.are_deterministic_algorithms_enabled():
        here = (numbers == at).view(-1, *(1,) * (buffer.ndim - dim - 1))
        torch.where(here, entry, buffer, out=buffer)
    else:
        buffer.index_copy_(dim, at, entry)


def serves(model: Any) -> bool:
    """Whether each layer is plain attention over a whole row, by SDPA: windows and states have caches of their own."""
    config = model.config.get_text_config()
    takes = inspect.signature(type(model).forward).parameters
    return (
        all(name in takes for name in ("past_key_values", "position_ids", "attention_mask"))
        and config._attn_implementation in EXCHANGEABLE
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    )


class StaticDecoder:
    """A model with the buffers of the rows that it decodes; buffers and graphs are kept between calls."""

    def __init__(self, model: Any, prefill: Callable[..., Any], choose: Choose, graphs: bool) -> None:
        """`prefill`: makes the decoder that reads the prompts, see `engines.hf.Decoder`."""
        self.model, self.make_prefill, self.choose = model, prefill, choose
        self.uses_graphs = graphs
        self.takes = inspect.signature(type(model).forward).parameters
        self.device: torch.device = next(model.parameters()).device
        self.context = architecture.context_length(model.config)
        self.forget()

    def forget(self) -> None:
        """Free buffers and graphs."""
        self.graphs: dict[Any, Callable[[], None] | None] = {}
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.capacity = (0, 0)
        self.pool: Any = None

    # ---------------------------------------------------------------------------------------------- whole calls

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Row],
        params: Any,
        take: Callable[[Any, int, float], bool],
        pulse: Callable[[], None],
    ) -> None:
        """Draw tokens for `rows`, equally many for each of `prompts` in order, until all have finished.

        Args:
            take: appends a token and its log-probability to a row; returns whether the row is finished.
            pulse: called whenever the drawn tokens are read.

        Raises:
            NonFiniteError: the model's logits are not finite.
        """
        logits = self.prefill(prompts, len(rows) // len(prompts), max(len(row.uniforms) for row in rows))
        self._upload_uniforms(rows)
        self._draw(logits, params)
        slots, seen, drawn = dict(enumerate(rows)), 0, 1  # place in the buffers → row
        while slots:
            last = max(len(row.uniforms) for row in slots.values())
            while drawn < min(seen + READ_EVERY, last):
                self._advance(params)
                drawn += 1
            tokens, logprobs = torch.stack(
                [x[: self.rows, seen:drawn].double() for x in (self.chosen, self.logp)]
            ).tolist()
            pulse()
            for slot, row in list(slots.items()):
                for token, logp in zip(tokens[slot], logprobs[slot], strict=True):
                    if not abs(logp) < float("inf"):
                        self.forget()
                        raise NonFiniteError("the model's logits are not finite while sampling")
                    if take(row, int(token), logp):
                        del slots[slot]
                        break
            seen = drawn
            if slots and _bucket(len(slots), LEAST_ROWS) < self.rows:
                self.select(torch.tensor(list(slots)).to(self.device))
                slots = dict(enumerate(slots.values()))

    def _advance(self, params: Any) -> None:
        """Run one step: replay its graph, capture it, or, the first time, run it eagerly to load the kernels."""
        rows, columns = self.rows, self._columns()
        draws = (params.temperature, params.top_p, params.top_k)
        key = (rows, columns, *draws, torch.are_deterministic_algorithms_enabled())

        def step() -> None:
            self._draw(self._forward(rows, columns), params)

        if self.uses_graphs and key in self.graphs:
            replay = self.graphs[key] or self._captured(step)
            if replay:
                self.graphs[key] = replay
                replay()
            else:
                step()
        else:
            self.graphs[key] = None
            step()
        self.width += 1

    def _captured(self, step: Callable[[], None]) -> Callable[[], None] | None:
        try:
            return capture(step, self)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as refusal:
            why = " ".join(str(refusal).split())[:160]
            say(f"{architecture.name(self.model)}: no CUDA graph of a decoding step, so it is slow ({why})")
            self.uses_graphs = False
            return None

    # ---------------------------------------------------------------------------------------------- the pieces

    def prefill(self, prompts: Sequence[Sequence[int]], n: int, room: int = 8) -> torch.Tensor:
        """Prefill each prompt once, for n rows of up to `room` new tokens; returns the next logits `(rows, V)`."""
        longest, count = max(map(len, prompts)), n * len(prompts)
        reader = self.make_prefill()
        logits = reader.prefill(prompts, 1)
        self.most_columns = -(-(longest + room) // LEAST_COLUMNS) * LEAST_COLUMNS
        self._reserve(_bucket(count, LEAST_ROWS), self.most_columns, reader.cache)
        for mine, layer in zip(self.buffers, reader.cache.layers, strict=True):
            for buffer, read in zip(mine, (layer.keys, layer.values), strict=True):
                buffer[:count, :, :longest].unflatten(0, (-1, n)).copy_(read.unsqueeze(1))
        for state in (self.pads, self.tokens, self.positions):
            state.zero_()
        pads = torch.tensor([longest - len(ids) for ids in prompts]).repeat_interleave(n)
        self.pads[:count] = pads.to(self.device).unsqueeze(1)
        self.positions[:count] = longest - self.pads[:count]
        self.step_number.zero_()
        self.column.fill_(longest)
        self.rows, self.width = _bucket(count, LEAST_ROWS), longest
        return torch.cat([logits.repeat_interleave(n, 0), logits[:1].expand(self.rows - count, -1)])

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append a token to each row; returns the next-token logits: a step of `decode` without the draw."""
        self.tokens[: len(tokens)] = tokens
        logits = self._forward(self.rows, self._columns())
        self.width += 1
        return logits[: len(tokens)]

    def select(self, index: torch.Tensor) -> None:
        """Move these rows to the front, into the smallest size that holds them."""
        fewer = _bucket(len(index), LEAST_ROWS)
        for buffer in (*(part for pair in self.buffers for part in pair),):
            buffer[: len(index), :, : self.width] = buffer[:, :, : self.width].index_select(0, index)
        for state in (self.pads, self.tokens, self.positions, self.uniforms):
            state[: len(index)] = state.index_select(0, index)
        self.rows = min(fewer, self.rows)

    def _reserve(self, rows: int, columns: int, read: Any) -> None:
        """Buffers for so many rows and columns, of the kind that the prompts' cache has."""
        if self.buffers and rows <= self.capacity[0] and columns <= self.capacity[1]:
            return
        rows, columns = max(rows, self.capacity[0]), max(columns, self.capacity[1])
        self.forget()  # free the old ones before larger ones are allocated
        self.capacity = rows, columns
        self.buffers = [
            (x.keys.new_zeros(rows, *_heads(x.keys, columns)), x.values.new_zeros(rows, *_heads(x.values, columns)))
            for x in read.layers
        ]
        whole: dict[str, Any] = {"dtype": torch.int64, "device": self.device}
        self.pads, self.positions = (torch.zeros(rows, 1, **whole) for _ in range(2))
        self.tokens, self.step_number, self.column = (torch.zeros(n, **whole) for n in (rows, 1, 1))
        self.all_columns = torch.arange(columns).to(self.device)
        self.uniforms = torch.zeros(rows, columns, dtype=torch.float64, device=self.device)
        self.chosen = torch.zeros(rows, columns, **whole)
        self.logp = torch.zeros(rows, columns, dtype=torch.float32, device=self.device)
        self.layers = [_Layer(self.column) for _ in self.buffers]
        self.cache = Cache(layers=[*self.layers])

    def _upload_uniforms(self, rows: Sequence[Row]) -> None:
        drawn = torch.zeros(len(rows), max(len(row.uniforms) for row in rows), dtype=torch.float64)
        for mine, row in zip(drawn, rows, strict=True):
            mine[: len(row.uniforms)] = row.uniforms
        self.uniforms[: len(rows), : drawn.shape[1]] = drawn.to(self.device)

    def _columns(self) -> int:
        """Columns that the next step reads: enough for what is there, and few different numbers."""
        return min(_bucket(self.width + 1, LEAST_COLUMNS), self.most_columns)

    def _forward(self, rows: int, columns: int) -> torch.Tensor:
        """Read the last token of each row; the logits `(rows, V)` behind it."""
        there = self.all_columns[:columns]
        for layer, (keys, values) in zip(self.layers, self.buffers, strict=True):
            layer.see(keys[:rows, :, :columns], values[:rows, :, :columns], there)
        hidden = (there < self.pads[:rows]) | (there > self.column)  # (rows, columns)
        mask = torch.zeros_like(hidden, dtype=self.model.dtype).masked_fill(hidden, float("-inf"))
        more = {"output_router_logits": False} if "output_router_logits" in self.takes else {}
        out = self.model(
            input_ids=self.tokens[:rows].unsqueeze(1),
            attention_mask=mask[:, None, None],  # of four dimensions: taken as it is
            position_ids=self.positions[:rows],
            past_key_values=self.cache,
            use_cache=True,
            **more,
        )
        self.column.add_(1)
        self.positions.add_(1).clamp_(max=self.context - 1)  # rows that have ended go on until they are moved out
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def _draw(self, logits: torch.Tensor, params: Any) -> None:
        """Draw a token for each row, and store it for the next step."""
        rows, at = len(logits), self.step_number
        uniforms = self.uniforms[:rows].index_select(1, at).squeeze(1)
        tokens, logp = self.choose(logits, uniforms, params)
        self.tokens[:rows].copy_(tokens)
        _write(self.chosen[:rows], 1, self.all_columns, at, tokens.unsqueeze(1))
        _write(self.logp[:rows], 1, self.all_columns, at, logp.unsqueeze(1))
        at.add_(1)


def capture(step: Callable[[], None], decoder: StaticDecoder) -> Callable[[], None]:
    """Capture the step as a CUDA graph, without running it. All graphs share one memory pool."""
    decoder.pool = decoder.pool or torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=decoder.pool, capture_error_mode="thread_local"):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


def _bucket(count: int, least: int) -> int:
    """The first of least, 2 least, 4 least ... that is not below `count`."""
    return least << max(0, -(-count // least) - 1).bit_length()


def _heads(cached: torch.Tensor, columns: int) -> tuple[int, int, int]:
    return cached.shape[1], columns, cached.shape[3]
