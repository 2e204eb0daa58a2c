"""The embedded sampler against transformers' `generate`, same model, same prompts, ends at different times.

A random model never ends by itself, so 1 id in `--ends` is made an end of sequence: lengths are geometric, cut at
`--max_new_tokens`. Both draw from the whole distribution at T = 1, and tokens are counted up to the end of each row.
Ours gives the log-probabilities along; they are held against a full forward pass in the same run. `generate` is not
asked for any: it would keep the logits of every token.

On a GPU that `trainer/costs.py` knows, in bfloat16, `bandwidth_utilisation` is what the decoding steps must read (the
weights once, keys and values of the rows that have not ended) over the whole time, prompts included, and the peak.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from grpo_gsm8k import bench
from grpo_gsm8k.datatypes import Request, SamplingParams
from grpo_gsm8k.trainer import costs

FLAGS: dict[str, tuple[Any, str]] = {
    "prompts": (16, "prompts"),
    "group": (8, "samples of each"),
    "max_new_tokens": (128, "longest completion"),
    "prompt_tokens": (100, "mean length of a prompt"),
    "ends": (64, "1 id in so many ends a completion"),
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Ours against `generate`."""
    found = bench.rounds(args, ["ours", "generate"])
    slower = bench.ratio(found["ours"], found["generate"], "tokens_per_s")
    medians = {name: bench.medians(runs) for name, runs in found.items()}
    return {
        **medians,
        "ratio_tokens_per_s": slower["median"],
        "ratio_tokens_per_s_spread": slower,
        "completions": args.prompts * args.group,
        **bench.machine(args),
    }


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """One of the two, in this process."""
    model = bench.make_model(args).eval()
    model.generation_config.eos_token_id = list(range(2, args.vocabulary, args.ends))
    prompts = make_requests(args)
    return _ours(model, prompts, args) if name == "ours" else _generate(model, prompts, args)


def make_requests(args: argparse.Namespace) -> list[Request]:
    """Random ids; half to one and a half times the mean length."""
    draw = random.Random(0)
    sizes = [round(args.prompt_tokens * draw.uniform(0.5, 1.5)) for _ in range(args.prompts)]
    ids = [tuple(draw.randrange(3, args.vocabulary) for _ in range(size)) for size in sizes]
    return [Request(row, tuple(range(i * args.group, (i + 1) * args.group))) for i, row in enumerate(ids)]


def _ours(model: Any, prompts: list[Request], args: argparse.Namespace) -> dict[str, float]:
    from grpo_gsm8k.config import TrainConfig
    from grpo_gsm8k.engines.hf import HFSampler
    from grpo_gsm8k.engines.probe import completed, logprob_differences
    from grpo_gsm8k.trainer.learner import TorchLearner

    silent: Any = SimpleNamespace(stop_ids=frozenset(), pad_id=0, decode=lambda ids: "")
    sampler = HFSampler(model, silent, args.prompts * args.group, copy_model=False)
    params = SamplingParams(args.max_new_tokens)
    sampler.sample(prompts[:2], SamplingParams(4))
    with bench.measuring(args.device) as measured:
        drawn = sampler.sample(prompts, params)
    rows = [completed(p, c) for p, group in zip(prompts, drawn, strict=True) for c in group]
    sizes = [(len(p.token_ids), len(c.token_ids)) for p, group in zip(prompts, drawn, strict=True) for c in group]
    learner = TorchLearner(model.requires_grad_(True), None, TrainConfig(max_tokens_per_microbatch=4096))
    off = logprob_differences(rows, learner.logprobs(rows))
    assert all(map(math.isfinite, off))
    return {**measured, **_speed(model, args, sizes, measured["seconds"]), "logprob_error": max(off)}


def _speed(model: Any, args: argparse.Namespace, sizes: Sequence[tuple[int, int]], seconds: float) -> dict[str, float]:
    """Figures of completions whose prompts' and own lengths are `sizes`."""
    from grpo_gsm8k.trainer.memory import shape_of

    tokens, gpu = sum(n for _, n in sizes), bench.gpu_of(args)
    found = {"tokens_per_s": tokens / seconds, "tokens": tokens}
    if gpu:
        read = bytes_read(shape_of(model), next(model.parameters()).element_size(), sizes)
        found["bandwidth_utilisation"] = read / seconds / gpu.bandwidth
    return found


def bytes_read(shape: costs.Shape, width: int, sizes: Sequence[tuple[int, int]]) -> float:
    """By all decoding steps; the first token of a completion comes with its prompt, and takes none."""
    steps = range(1, max(n for _, n in sizes))
    return sum(costs.decoding_bytes(shape, width, [p + t for p, n in sizes if n > t]) for t in steps)


def _generate(model: Any, prompts: list[Request], args: argparse.Namespace) -> dict[str, float]:
    import torch

    longest = max(len(prompt.token_ids) for prompt in prompts)
    padded = [(0,) * (longest - len(p.token_ids)) + p.token_ids for p in prompts]
    ids = torch.tensor(padded, device=args.device)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    mask = (ids != 0).long()

    def generate(few: slice, n: int, longest: int) -> Any:
        where = {"input_ids": ids[few], "attention_mask": mask[few]}
        with torch.inference_mode():
            return model.generate(**where, **settings, num_return_sequences=n, max_new_tokens=longest)

    generate(slice(2), 2, 4)
    with bench.measuring(args.device) as measured:
        out = generate(slice(None), args.group, args.max_new_tokens)
    lengths = (out[:, longest:] != 0).sum(1).tolist()
    starts = [len(prompt.token_ids) for prompt in prompts for _ in range(args.group)]
    return {**measured, **_speed(model, args, list(zip(starts, lengths, strict=True)), measured["seconds"])}
