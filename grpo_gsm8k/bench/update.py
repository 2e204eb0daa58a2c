"""One optimizer step of GRPO: ours, with each option left out, and TRL's.

The update: `--prompts` groups of `--group` completions of lognormal length around `--mean_tokens`, at most
`--max_tokens`; the policy has moved, so that the clip takes the gradient from some tokens. Ours is `weighted`,
`TorchLearner.forward_backward`, `step`. TRL's is `GRPOTrainer._compute_loss`, backward, clip and fused AdamW, 16
completions at a time; `trl` is as installed, where a CPU scores every position, and `trl_compact` has the selection of
rows that TRL keeps for GPUs switched on. Loss: DAPO's, which both average over all tokens of the update.

On a GPU that `trainer/costs.py` knows, in bfloat16, `mfu` is the share of its peak: 6 operations a weight and token of
the layers, 6 a weight of the head at response positions, attention's causal half; nominal, since shared prompts and
skipped rows count in full, and what is computed twice counts once. `predicted_gpu_mb` stands beside `peak_gpu_mb`.

In the same run the gradients of a smaller update are held against each other: T = 0.7, and a response that is masked.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from grpo_gsm8k import bench
from grpo_gsm8k.config import TrainConfig
from grpo_gsm8k.datatypes import Datum
from grpo_gsm8k.trainer import costs

FLAGS: dict[str, tuple[Any, str]] = {
    "prompts": (8, "groups"),
    "group": (8, "completions of each"),
    "mean_tokens": (120, "mean length of a completion, about"),
    "max_tokens": (384, "longest completion"),
    "prompt_tokens": (100, "mean length of a prompt"),
    "flat": (0.0, "share of the groups whose completions all got the same reward; the ablation takes 0.25"),
    "max_tokens_per_microbatch": (3072, "tokens (unpacked: padded cells) of one forward pass of ours"),
    "vs": ("", "trl"),
    "ablation": (False, "measure each of our options left out, and others put in, too"),
    "gradients": ("", "file of the gradient to compare with; set by the rounds"),
}
TRL_ROWS = 16
CLIP, TEMPERATURE = 0.2, 0.7
PEERS = ("trl", "trl_compact")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Ours against the peers, and against itself with one option less."""
    peers = PEERS if args.vs == "trl" else ()
    with tempfile.TemporaryDirectory() as scratch:
        args.gradients = str(Path(scratch) / "gradient.safetensors")
        found = bench.rounds(args, ["ours", *peers])
        ablated = bench.rounds(_for_ablation(args), ["ours", *variants(args)]) if args.ablation else {}
    result: dict[str, Any] = {name: bench.medians(runs) for name, runs in found.items()}
    for key in ("seconds", "memory"):
        unit = {"seconds": "seconds", "memory": "peak_gpu_mb" if args.device.startswith("cuda") else "peak_rss_mb"}[key]
        noisy = {name: bench.ratio(found[name], found["ours"], unit) for name in peers}
        result[f"ratio_{key}"] = {name: each["median"] for name, each in noisy.items()}
        result[f"ratio_{key}_spread"] = noisy
        for name in peers:
            result[name][f"ratio_{key}"] = noisy[name]["median"]
    if ablated:
        result["ablation"] = {name: _against_ours(name, ablated, args) for name in variants(args)}
    return {**result, "completions": args.prompts * args.group, **bench.machine(args)}


def _against_ours(name: str, found: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> dict[str, float]:
    """Seconds (of a CPU: its own) and memory of a variant as multiples of ours; medians over the rounds, and spread."""
    units = ("seconds", "peak_gpu_mb") if args.device.startswith("cuda") else ("cpu_seconds", "peak_rss_mb")
    ratios = {
        key: bench.ratio(found[name], found["ours"], unit)
        for key, unit in zip(("seconds", "memory"), units, strict=True)
    }
    return {key if of == "median" else f"{key}_{of}": x for key, each in ratios.items() for of, x in each.items()}


def _for_ablation(args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "flat": 0.25, "gradients": ""})


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """One contestant, in this process."""
    rows = make_rows(args)
    with WITHOUT[name](args) if name in WITHOUT else contextlib.nullcontext():
        measured = _measure_update(name, args, rows)
    if args.gradients:
        measured |= compare_gradients(name, args)
    return measured


def _measure_update(kind: str, args: argparse.Namespace, rows: Sequence[Datum]) -> dict[str, float]:
    from grpo_gsm8k.trainer.memory import shape_of

    model = bench.make_model(args)
    shape = shape_of(model)
    update = _trl(model, args, kind) if kind in PEERS else _ours(model, args, kind)
    # So that the first use of anything is over; and what is compiled must be so for every shape.
    update(rows if kind in WITH else rows[:2], 1.0, "drop")
    with bench.measuring(args.device) as measured:
        update(rows, 1.0, "step")
    tokens = sum(len(row.token_ids) for row in rows)
    found = {**measured, "tokens_per_s": tokens / measured["seconds"]}
    if args.device.startswith("cuda") and kind not in PEERS:
        setup = costs.setup_of(_config(kind, args), next(model.parameters()).element_size())
        found["predicted_gpu_mb"] = costs.training_bytes(shape, setup, args.max_tokens_per_microbatch) / 2**20
    gpu = bench.gpu_of(args)
    return found | ({"mfu": operations(shape, rows) / measured["seconds"] / gpu.flops} if gpu else {})


def operations(shape: costs.Shape, rows: Sequence[Datum]) -> float:
    """Of an update on these rows, nominal: see `costs.training_flops`. A row's last token is no input."""
    lengths = [len(row.token_ids) - 1 for row in rows]
    return costs.training_flops(shape, sum(lengths), sum(sum(row.mask) for row in rows), costs.causal_pairs(lengths))


def compare_gradients(kind: str, args: argparse.Namespace) -> dict[str, float]:
    """The gradient of a small update with T != 1 and a masked row: ours is kept, theirs is held against it."""
    import torch
    from safetensors.torch import load_file, save_file

    rows = make_rows(args)[:4]
    rows[1] = Datum(rows[1].token_ids, (0,) * len(rows[1].mask), rows[1].logprobs, rows[1].advantages)
    model = bench.make_model(args)
    update = _trl(model, args, kind) if kind in PEERS else _ours(model, args, kind)
    update(rows, TEMPERATURE, "keep")
    mine = {name: p.grad.contiguous() for name, p in model.named_parameters() if p.grad is not None}
    if kind not in PEERS:
        save_file(mine, args.gradients)
        return {}
    ours = load_file(args.gradients, device=args.device)
    off = sum(float((mine[name] - ours[name]).double().square().sum()) for name in mine)
    assert mine.keys() == ours.keys() and torch.is_tensor(next(iter(mine.values())))
    return {"gradient_error": math.sqrt(off / sum(float(g.double().square().sum()) for g in mine.values()))}


def make_rows(args: argparse.Namespace) -> list[Datum]:
    """The update's sequences; old log-probabilities around those of a model that knows nothing, log 1/V."""
    draw, rows = random.Random(0), []
    sigma = 0.6
    flat = round(args.flat * args.prompts)
    for group in range(args.prompts):
        prompt = [draw.randrange(3, args.vocabulary) for _ in range(round(args.prompt_tokens * draw.uniform(0.5, 1.5)))]
        for member in range(args.group):
            n = round(draw.lognormvariate(math.log(args.mean_tokens) - sigma**2 / 2, sigma))
            n = min(max(n, 4), args.max_tokens)
            ids = (*prompt, *(draw.randrange(3, args.vocabulary) for _ in range(n)))
            mask = (0,) * len(prompt) + (1,) * n
            old = tuple(m * draw.gauss(-math.log(args.vocabulary), 0.3) for m in mask)
            advantage = 0.0 if group < flat else (1.0 if member % 2 else -1.0) * draw.uniform(0.5, 1.5)
            rows.append(Datum(ids, mask, old, tuple(advantage * m for m in mask)))
    return rows


Update = Callable[[Sequence[Datum], float, str], None]
"""Of rows at a temperature; then the optimizer steps ("step"), or the gradient is let go ("drop") or kept ("keep")."""


def _config(kind: str, args: argparse.Namespace) -> TrainConfig:
    """Ours, or with an option put in. No sampler stands beside the learner."""
    cells = args.max_tokens_per_microbatch
    return TrainConfig(engine="vllm", max_tokens_per_microbatch=cells, **WITH.get(kind, {}))


def _ours(model: Any, args: argparse.Namespace, kind: str) -> Update:
    from grpo_gsm8k.trainer.data import weighted
    from grpo_gsm8k.trainer.learner import TorchLearner
    from grpo_gsm8k.trainer.losses import GrpoClip, Objective

    learner = TorchLearner(model, None, _config(kind, args))

    def update(rows: Sequence[Datum], temperature: float, then: str) -> None:
        objective = Objective(GrpoClip(CLIP, CLIP), temperature)
        learner.forward_backward(weighted(rows, "token"), objective)
        if then == "step":
            learner.step(1e-6)
        elif then == "drop":
            learner.optimizer.zero_grad()

    return update


# ---------------------------------------------------------------------------------------- our options, left out


def _head_everywhere(args: argparse.Namespace) -> Any:
    """The head at every cell, padding and prompt included, in one piece, by autograd."""
    return _with_token_logprobs(lambda batch: batch.mask.bool().logical_not() | batch.mask.bool())


def _whole_head(args: argparse.Namespace) -> Any:
    """The head at the responses, in one piece, by autograd."""
    return _with_token_logprobs(lambda batch: batch.mask.bool())


def _with_token_logprobs(cells: Callable[[Any], Any]) -> Any:
    import torch

    from grpo_gsm8k.trainer.packing import last_hidden_states

    def token_logprobs(model: Any, batch: Any, temperature: float, *_: Any) -> Any:
        chosen = cells(batch)
        hidden = last_hidden_states(model, replace(batch, mask=chosen.float()))
        logp = (model.get_output_embeddings()(hidden).float() / temperature).log_softmax(-1)
        picked = logp.gather(-1, batch.targets[chosen].unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1)
        out = torch.zeros_like(batch.mask).masked_scatter(chosen, picked) * batch.mask
        return out, {"entropy": entropy[batch.mask[chosen].bool()], "top_prob": logp.amax(-1).exp()}

    return mock.patch("grpo_gsm8k.trainer.learner.token_logprobs", token_logprobs)


def _recomputed(args: argparse.Namespace) -> Any:
    """The head's gradient by a second softmax in the backward."""
    return mock.patch("grpo_gsm8k.trainer.learner.fused_grad", lambda batch, objective: None)


def _padded(args: argparse.Namespace) -> Any:
    """16 completions a microbatch as they come, instead of sorted ones up to a number of tokens."""

    def microbatches(batch: Any, max_tokens: int, rows: Sequence[int], packs: bool) -> Iterator[Any]:
        for at in range(0, len(rows), TRL_ROWS):
            yield rows[at : at + TRL_ROWS], batch.select(rows[at : at + TRL_ROWS])

    return mock.patch("grpo_gsm8k.trainer.packing.microbatches", microbatches)


def _unpacked(args: argparse.Namespace) -> Any:
    """Rows of like length side by side, padded, each with its prompt."""
    return mock.patch("grpo_gsm8k.trainer.packing.enable", lambda model: False)


def _unskipped(args: argparse.Namespace) -> Any:
    """Rows without advantage are trained like any other."""
    return mock.patch("grpo_gsm8k.trainer.learner.rows_to_train", lambda batch, objective: batch.rows_with_targets())


WITHOUT: dict[str, Callable[[argparse.Namespace], Any]] = {
    "without:response_only_head": _head_everywhere,
    "without:chunked_head": _whole_head,
    "without:gradient_in_forward": _recomputed,
    "without:packing": _unpacked,
    "without:packing_and_token_budget": _padded,
    "without:skipped_rows": _unskipped,
}

WITH: dict[str, dict[str, Any]] = {
    "with:activation_checkpointing": {"activation_checkpointing": True},
    "with:compile": {"compile": "on"},
    "with:optimizer_on_cpu": {"optimizer_device": "cpu"},
}
"""Options of the recipe that are off by default."""


def variants(args: argparse.Namespace) -> list[str]:
    """What the ablation holds against ours; on a CPU the optimizer is there already."""
    on_cpu = not args.device.startswith("cuda")
    return [*WITHOUT, *(name for name in WITH if not (on_cpu and name == "with:optimizer_on_cpu"))]


# --------------------------------------------------------------------------------------------------------- TRL


def _trl(model: Any, args: argparse.Namespace, kind: str) -> Update:
    import torch

    trainers: dict[float, Any] = {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def update(rows: Sequence[Datum], temperature: float, then: str) -> None:
        if temperature not in trainers:
            trainers[temperature] = _trl_trainer(model, args, temperature)
        trainer, total = trainers[temperature], sum(map(sum, (row.mask for row in rows)))
        with _compact(kind == "trl_compact"):
            for at in range(0, len(rows), TRL_ROWS):
                trainer._compute_loss(model, _trl_inputs(rows[at : at + TRL_ROWS], total, args.device)).backward()
        if then == "step":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if then != "keep":
            optimizer.zero_grad()

    return update


@contextlib.contextmanager
def _compact(on: bool) -> Iterator[None]:
    """Let TRL select rows on a CPU as it does on a GPU; its kernels stay those of the CPU."""
    if not on:
        yield
        return
    with mock.patch("trl.trainer.utils._use_triton", lambda device: True):
        yield


def _trl_trainer(model: Any, args: argparse.Namespace, temperature: float) -> Any:
    trl: Any = importlib.import_module("trl")
    from grpo_gsm8k.trainer.tiny_model import train_tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        config = trl.GRPOConfig(
            output_dir=scratch,
            use_cpu=args.device == "cpu",
            bf16=args.dtype == "bfloat16",
            gradient_checkpointing=False,
            report_to=[],
            per_device_train_batch_size=TRL_ROWS,
            num_generations=TRL_ROWS,
            max_completion_length=args.max_tokens,
            temperature=temperature,
            loss_type="dapo",
            epsilon=CLIP,
            beta=0.0,
        )
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=lambda **_: [0.0],
            args=config,
            train_dataset=importlib.import_module("trl.trainer.grpo_trainer").Dataset.from_list(
                [{"prompt": "1"}] * TRL_ROWS
            ),
            processing_class=train_tokenizer(["1 2 3"], 300),
        )
    trainer.current_gradient_accumulation_steps = 1  # what its loop would set
    trainer.model.train()
    return trainer


def _trl_inputs(rows: Sequence[Datum], tokens: int, device: str) -> dict[str, Any]:
    """Prompts padded on the left, completions on the right; a row that is masked out has an empty completion mask."""
    import torch

    starts = [next(i for i, old in enumerate(row.logprobs) if old) for row in rows]
    sizes = [len(row.token_ids) - start for row, start in zip(rows, starts, strict=True)]
    prompt, prompt_mask = (torch.zeros(len(rows), max(starts), dtype=torch.long) for _ in range(2))
    ids, mask = (torch.zeros(len(rows), max(sizes), dtype=torch.long) for _ in range(2))
    old = torch.zeros(len(rows), max(sizes))
    for b, (row, start, size) in enumerate(zip(rows, starts, sizes, strict=True)):
        prompt[b, max(starts) - start :] = torch.tensor(row.token_ids[:start])
        prompt_mask[b, max(starts) - start :] = 1
        ids[b, :size] = torch.tensor(row.token_ids[start:])
        mask[b, :size] = torch.tensor(row.mask[start:])
        old[b, :size] = torch.tensor(row.logprobs[start:])
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt_mask,
        "completion_ids": ids,
        "completion_mask": mask,
        "old_per_token_logps": old,
        "advantages": torch.tensor([row.advantages[-1] for row in rows]),
        "num_items_in_batch": torch.tensor(tokens),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}
