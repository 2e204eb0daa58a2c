"""The embedded sampler: transformers, on a CPU or a GPU, in this process.

The sampler prefills each prompt once and repeats its cache for the n completions; finished rows leave the batch. For
any kind of cache (keys and values, sliding windows, states of convolutions and recurrences) `check_cache` verifies at
the start that a row's logits do not depend on its neighbours. On a GPU a token step is one CUDA graph
(`static_cache.py`). Each completion has its own stream of uniform numbers, seeded by its request, and draws by
inverting the cumulative distribution, so its tokens do not depend on the rest of the batch.

Convention of the log-probabilities: log-softmax(logits / temperature) in float32, before any top-p
truncation; with temperature 0 (greedy) those of temperature 1.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grpo_gsm8k.datatypes import Completion, FinishReason, Request, SamplingParams, WeightsRef
from grpo_gsm8k.engines import handover, static_cache
from grpo_gsm8k.errors import ModelError, NonFiniteError
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.tasks.render import Renderer
from grpo_gsm8k.trainer import adapter, architecture
from grpo_gsm8k.trainer.kernels import choose_attention
from grpo_gsm8k.trainer.logprobs import difference
from grpo_gsm8k.trainer.packing import PROOF

Weights = Iterable[tuple[str, torch.Tensor]]


@dataclass
class _Row:
    """A completion that is being decoded."""

    seed: int
    uniforms: torch.Tensor  # float64, one for each token up to the limit
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class HFSampler:
    """Implements `datatypes.Sampler` with a transformers model in this process."""

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        rows: int = 256,
        *,
        copy_model: bool = True,
        pulse: Callable[[], None] = lambda: None,
        static: bool | None = None,
    ) -> None:
        """Copies `model`, so that training does not change the sampler's weights.

        Args:
            rows: completions decoded in one batch.
            copy_model: False uses the model itself, which must not be trained.
            pulse: called every few tokens, to report progress.
            static: decode in buffers of fixed sizes; None: on a GPU, where the model can. Measured on an H200: a step
                of 256 rows of a 1.5B model takes 46 ms without (artifacts/RESULTS.md).
        """
        self.model = (copy.deepcopy(model) if copy_model else model).eval().requires_grad_(False)
        architecture.compute_all_of_attention(self.model)
        choose_attention(self.model)
        check_cache(self.model)
        self.renderer, self.rows, self.version, self.pulse = renderer, rows, 0, pulse
        self.held: WeightsRef | None = None
        self.busy_s = 0.0
        self.device: torch.device = next(model.parameters()).device
        self.context = architecture.context_length(model.config)
        self.static = self._static_decoder() if (self.device.type == "cuda" if static is None else static) else None
        ends = model.generation_config.eos_token_id if model.generation_config else None
        # A model may have several end-of-sequence ids; the tokenizer names one of them.
        self.stop_ids = renderer.stop_ids | set([ends] if isinstance(ends, int) else ends or [])

    def load(self, ref: WeightsRef, tensors: Callable[[], Weights] | None = None) -> None:
        """Load new weights; does nothing if the sampler already holds them.

        Raises:
            HandoverError: the file is damaged or gone; the model is unchanged.
            ModelError: a weight is missing, unknown, or of another shape.
        """
        if ref.same_as(self.held):
            return
        fresh = tensors() if tensors else handover.read(ref).items()
        mine: dict[str, torch.Tensor] = dict(adapter.own_weights(self.model))
        with torch.no_grad():
            for name, tensor in fresh:
                target = mine.pop(name, None)
                if target is None or target.shape != tensor.shape:
                    raise ModelError(f"hand-over of weights: {name} does not fit into the sampler's model")
                target.copy_(tensor)
        if mine:
            raise ModelError(f"hand-over of weights: {len(mine)} weights are missing, {next(iter(mine))} first")
        self.version, self.held = ref.version, ref

    def weights(self) -> Weights:
        """The sampler's current weights."""
        return adapter.own_weights(self.model)

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        """See `datatypes.Sampler`. Raises `NonFiniteError` if the logits are not finite."""
        began = time.monotonic()
        # Batches of similar lengths need the least padding; the original order is restored at the end.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].seeds), len(requests[i].token_ids)))
        done: dict[int, list[Completion]] = {}
        for n, alike in itertools.groupby(order, key=lambda i: len(requests[i].seeds)):
            each, per_chunk = list(alike), max(1, self.rows // n)
            for start in range(0, len(each), per_chunk):
                chunk = each[start : start + per_chunk]
                rows = [self._row(requests[i].token_ids, seed, params) for i in chunk for seed in requests[i].seeds]
                self._decode([requests[i].token_ids for i in chunk], n, rows, params)
                completions = [self._completion(row) for row in rows]
                for k, i in enumerate(chunk):
                    done[i] = completions[k * n : (k + 1) * n]
        self.busy_s += time.monotonic() - began
        return [done[i] for i in range(len(requests))]

    def _static_decoder(self) -> static_cache.StaticDecoder | None:
        """None, with a line why, where the model does not decode in static buffers as it does without."""
        if not static_cache.serves(self.model):
            say(f"{architecture.name(self.model)}: its cache has no fixed size, so it is decoded without CUDA graphs")
            return None
        graphs = self.device.type == "cuda"
        made = static_cache.StaticDecoder(
            self.model, lambda: Decoder(self.model, self.renderer.pad_id), _choose, graphs
        )
        if fault := _fault_of_decoding(self.model, made):
            say(f"{architecture.name(self.model)}: decoded without CUDA graphs; with static buffers {fault}")
            return None
        made.forget()
        return made

    @torch.inference_mode()
    def _decode(self, prompts: Sequence[Sequence[int]], n: int, rows: list[_Row], params: SamplingParams) -> None:
        """Fill `rows`, which belong to `prompts` in order, n each."""
        if self.static:
            self.static.decode(prompts, rows, params, functools.partial(self._append, stop=params.stop), self.pulse)
            return
        decoder = Decoder(self.model, self.renderer.pad_id)
        logits = decoder.prefill(prompts, n)
        alive, scratch = rows, torch.empty_like(logits, dtype=torch.float32)
        for t in itertools.count():
            chosen, logp = draw(logits, torch.stack([row.uniforms[t] for row in alive]), params, scratch)
            for row, token, value in zip(alive, chosen.tolist(), logp.tolist(), strict=True):
                self._append(row, token, value, params.stop)
            self.pulse()
            keep = [k for k, row in enumerate(alive) if row.finish_reason is None]
            if not keep:
                break
            if len(keep) < len(alive):
                index = torch.tensor(keep, device=self.device)
                decoder.select(index)
                chosen = chosen[index]
                alive = [alive[k] for k in keep]
            logits = decoder.step(chosen)  # (rows, V)

    def _row(self, prompt: Sequence[int], seed: int, params: SamplingParams) -> _Row:
        generator = torch.Generator().manual_seed(seed)
        room = min(params.max_new_tokens, self.context - len(prompt))
        return _Row(seed, torch.rand(room, generator=generator, dtype=torch.float64))

    def _append(self, row: _Row, token: int, logprob: float, stop: tuple[str, ...]) -> bool:
        """Append a token to a row; returns whether the row is finished."""
        row.token_ids.append(token)
        row.logprobs.append(logprob)
        if token in self.stop_ids or self._hit_stop(row, stop):
            row.finish_reason = "stop"
        elif len(row.token_ids) == len(row.uniforms):
            row.finish_reason = "length"
        return row.finish_reason is not None

    def _hit_stop(self, row: _Row, stop: tuple[str, ...]) -> bool:
        if not stop:
            return False
        window = max(len(s.encode()) for s in stop) + 4  # a token is at least a byte
        tail = self.renderer.decode(row.token_ids[-window:])
        return any(s in tail for s in stop)

    def _completion(self, row: _Row) -> Completion:
        assert row.finish_reason is not None
        return Completion(
            token_ids=tuple(row.token_ids),
            logprobs=tuple(row.logprobs),
            text=self.renderer.decode(row.token_ids),
            finish_reason=row.finish_reason,
            policy_version=self.version,
            seed=row.seed,
        )


class Decoder:
    """A model, and the cache of the rows that it is decoding."""

    def __init__(self, model: Any, pad_id: int) -> None:
        """Raises `ValueError` for a model with an unknown kind of cache."""
        self.model, self.pad_id = model, pad_id
        self.takes = inspect.signature(type(model).forward).parameters
        known = [field for field in ("past_key_values", "cache_params") if field in self.takes]
        if not known:
            raise ValueError("it has neither past_key_values nor cache_params")
        self.cache_field = known[0]
        self.cache: Any = None

    def prefill(self, prompts: Sequence[Sequence[int]], n: int) -> torch.Tensor:
        """Prefill each prompt once, for n rows each; returns the next-token logits `(rows, V)`."""
        device, longest = next(self.model.parameters()).device, max(map(len, prompts))
        pads = [longest - len(ids) for ids in prompts]
        padded = [[self.pad_id] * pad + list(ids) for pad, ids in zip(pads, prompts, strict=True)]
        input_ids = torch.tensor(padded, device=device)  # (P, T), padded on the left
        columns = torch.arange(longest, device=device)
        self.attention = (columns >= torch.tensor(pads, device=device).unsqueeze(1)).long()
        positions = (self.attention.cumsum(1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=self.model.config)
        few = {"logits_to_keep": 1} if "logits_to_keep" in self.takes else {}
        out = self.model(input_ids=input_ids, attention_mask=self.attention, **few, **self._inputs(positions))
        self.attention, self.positions = (x.repeat_interleave(n, 0) for x in (self.attention, positions[:, -1:]))
        if n > 1:
            self._take_rows(torch.arange(len(prompts), device=device).repeat_interleave(n), n)
        return out.logits[:, -1].repeat_interleave(n, 0)  # type: ignore[no-any-return]

    def select(self, index: torch.Tensor) -> None:
        """Keep only these rows."""
        self._take_rows(index)
        self.attention, self.positions = self.attention[index], self.positions[index]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append a token to each row; returns the next-token logits `(rows, V)`."""
        self.attention = torch.cat([self.attention, self.attention.new_ones(len(tokens), 1)], 1)
        self.positions = self.positions + 1
        # Models of the cache_params kind have no attention; their mask is of the tokens that go in.
        mask = self.attention if self.cache_field == "past_key_values" else self.attention[:, -1:]
        out = self.model(input_ids=tokens.unsqueeze(1), attention_mask=mask, **self._inputs(self.positions))
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def _inputs(self, positions: torch.Tensor) -> dict[str, Any]:
        wanted = {
            self.cache_field: self.cache,
            "use_cache": True,
            "position_ids": positions,  # ALiBi takes them from the mask, a recurrence needs none
            "output_router_logits": False,  # unused here, and incompatible with a cache
        }
        return {field: value for field, value in wanted.items() if field in self.takes}

    def _take_rows(self, index: torch.Tensor, repeats: int = 0) -> None:
        """Select rows of the cache, in this order, each repeated `repeats` times."""
        if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self.cache.layers):
            if repeats:
                self.cache.batch_repeat_interleave(repeats)
            else:
                self.cache.batch_select_indices(index)
        else:  # layers with states of convolutions and recurrences know this name for it alone
            self.cache.reorder_cache(index)


def check_cache(model: Any) -> None:
    """Compare the sampler's decoding with the model's own logits, on a few short rows.

    Raises:
        ModelError: names the architecture and what differs.
    """
    clamped = any(getattr(module, "time_step_limit", (0.0,))[0] for module in model.modules())
    if clamped:  # Zamba 2, Nemotron-H: too small a difference to be seen on a few short rows
        fault = "its forward pass has a least time step that transformers leaves out when it decodes"
    else:
        fault = _fault_of_decoding(model)
    if fault:
        raise ModelError(f"{architecture.name(model)}: the embedded sampler cannot decode it exactly ({fault})")


@torch.inference_mode()
def _fault_of_decoding(model: Any, decoder: Any = None) -> str:
    """Decode a few rows of different lengths: prefill, repeat, append two tokens, drop rows in between.

    Returns what differs: the log-probability of each likeliest next token must equal that of `model(ids).logits` of the
    row alone.
    """
    prompts, device = [ids[:-2] for ids in PROOF], next(model.parameters()).device
    found, own = list[torch.Tensor](), list[torch.Tensor]()

    def compare(rows: Sequence[Sequence[int]], logits: torch.Tensor) -> None:
        for ids, mine in zip(rows, logits.float().log_softmax(-1), strict=True):
            alone = model(input_ids=torch.tensor([list(ids)], device=device)).logits[0, -1].float().log_softmax(-1)
            own.append(alone.amax())
            found.append(mine[alone.argmax()])

    try:
        decoder, rows = decoder or Decoder(model, 0), [ids for ids in prompts for _ in range(2)]
        compare(rows, decoder.prefill(prompts, 2)[: len(rows)])
        rows = [(*ids, k) for k, ids in enumerate(rows, start=3)]
        compare(rows, decoder.step(torch.tensor([ids[-1] for ids in rows], device=device)))
        decoder.select(torch.arange(1, len(rows), 2, device=device))
        rows = [(*ids, k) for k, ids in enumerate(rows[1::2], start=5)]
        compare(rows, decoder.step(torch.tensor([ids[-1] for ids in rows], device=device)))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as refusal:
        return " ".join(f"{type(refusal).__name__}: {refusal}".split())[:200]  # raised by the model's own code
    return difference(torch.stack(found), torch.stack(own), model.dtype)


def draw(
    logits: torch.Tensor, uniforms: torch.Tensor, params: SamplingParams, scratch: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row; returns tokens and log-probabilities.

    Args:
        logits: `(rows, V)`.
        uniforms: `(rows,)` float64 in [0, 1).
        scratch: `(rows, V)` float32 or larger: allocating it for each token costs as much as the softmax.
    """
    return _choose(logits, uniforms, params, scratch, checks=True)


def _choose(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    params: SamplingParams,
    scratch: torch.Tensor | None = None,
    checks: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`draw`; unless it `checks`, it waits for nothing, and a log-probability that is not finite tells of logits."""
    logits = logits.float()
    if params.temperature not in (0.0, 1.0):
        logits = logits / params.temperature
    probs = torch.empty_like(logits) if scratch is None else scratch[: len(logits)]
    torch.softmax(logits, -1, out=probs)
    log_z = logits.amax(-1) - probs.amax(-1).log()  # of the likeliest token, which is never too small for float32
    if checks and not torch.isfinite(log_z).all():
        raise NonFiniteError("the model's logits are not finite while sampling")
    if params.temperature == 0:
        chosen = logits.argmax(-1)
    else:
        chosen = _invert(_truncated(probs, params), uniforms.to(probs.device))
    return chosen, logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) - log_z


def _truncated(probs: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The probabilities with those at 0 that top-k leaves out, then those that top-p does of what is left."""
    if 0 < params.top_k < probs.shape[-1]:
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        ranked[:, params.top_k :] = 0.0
        probs = torch.zeros_like(ranked).scatter(-1, order, ranked)
        probs = probs / probs.sum(-1, keepdim=True)
    return _nucleus(probs, params.top_p) if params.top_p < 1 else probs


def _nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities with everything outside of the smallest set of mass `top_p` set to 0, float64."""
    ranked, order = probs.double().sort(dim=-1, descending=True, stable=True)
    ranked.masked_fill_(_cumsum(ranked) - ranked >= top_p, 0.0)  # the first to reach the mass stays
    return torch.zeros_like(ranked).scatter(-1, order, ranked)


def _invert(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first token of each row at which the cumulative distribution exceeds the uniform number, `(rows,)`.

    In two levels, so that float64 is needed for few numbers: which block of 512 tokens, then which token in it.
    """
    width = min(512, probs.shape[-1])
    even = probs.shape[-1] // width * width
    blocks = torch.cat([probs[:, :even].unflatten(-1, (-1, width)).sum(-1), probs[:, even:].sum(-1, keepdim=True)], -1)
    mass = _cumsum(blocks.double())
    block, below = _exceeds(mass, uniforms.unsqueeze(-1) * mass[:, -1:])
    index = block * width + torch.arange(width, device=probs.device)
    inside = probs.gather(-1, index.clamp(max=probs.shape[-1] - 1)).double() * (index < probs.shape[-1])
    inner = _cumsum(inside)
    rest = (uniforms.unsqueeze(-1) * mass[:, -1:] - below) / blocks.gather(-1, block)  # in [0, 1) of the block
    token, _ = _exceeds(inner, rest * inner[:, -1:])
    return (block * width + token).squeeze(-1).clamp(max=probs.shape[-1] - 1)  # for what are no numbers


def _cumsum(x: torch.Tensor) -> torch.Tensor:
    """Cumulative sum along the last dimension; in a fixed order where torch has no deterministic kernel (CUDA)."""
    if not (x.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return x.cumsum(-1)
    distance = 1
    while distance < x.shape[-1]:  # each number gains the sum of as many before it (Hillis and Steele 1986)
        x = torch.cat([x[..., :distance], x[..., distance:] + x[..., :-distance]], -1)
        distance *= 2
    return x


def _exceeds(mass: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a cumulative sum first exceeds the threshold, and its value before that; both `(rows, 1)`."""
    last = torch.searchsorted(mass, mass[:, -1:].contiguous())  # what lies behind has no probability
    at = torch.searchsorted(mass, threshold, right=True).minimum(last).clamp(max=mass.shape[-1] - 1)
    return at, torch.where(at > 0, mass.gather(-1, (at - 1).clamp(min=0)), 0.0)
