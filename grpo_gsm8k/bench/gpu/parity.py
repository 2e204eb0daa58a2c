"""Parts of `bench gpu` that say whether numbers are right."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

from grpo_gsm8k import bench, repro
from grpo_gsm8k.bench.gpu.tools import (
    FAULTS,
    Row,
    dummy_requests,
    is_toy,
    last_line,
    relative_error,
    sampler_of,
    shape_args,
    update_rows,
)
from grpo_gsm8k.errors import ConfigError


def zoo(args: argparse.Namespace) -> Iterator[Row]:
    """Tiny models of several architectures: trainer's and sampler's log-probs against plain logits in float32."""
    import torch

    for name, config in zoo_configs().items():
        for dtype in (torch.float32, torch.bfloat16):
            try:
                yield f"{name} {str(dtype).removeprefix('torch.')}", _held_against_logits(args, config, dtype)
            except FAULTS as fault:  # one architecture; the others still count
                yield f"{name} {str(dtype).removeprefix('torch.')}", {"failed": last_line(fault)}


def zoo_configs() -> dict[str, Any]:
    """Architectures whose layers differ: biases, norms of queries, scaled embeddings, fused projections."""
    import transformers

    small = {
        "vocab_size": 211,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    grouped = {**small, "num_key_value_heads": 2}
    kinds = {
        "qwen2": ("Qwen2Config", grouped),
        "qwen3": ("Qwen3Config", {**grouped, "head_dim": 32}),
        "llama": ("LlamaConfig", grouped),
        "mistral": ("MistralConfig", {**grouped, "sliding_window": None}),
        "gemma": ("GemmaConfig", {**grouped, "head_dim": 32}),
        "phi3": ("Phi3Config", grouped),
        "olmo2": ("Olmo2Config", grouped),
        "gpt_neox": ("GPTNeoXConfig", small),
    }
    return {name: getattr(transformers, cls)(**values) for name, (cls, values) in kinds.items()}


def _held_against_logits(args: argparse.Namespace, config: Any, dtype: Any) -> dict[str, Any]:
    """Largest |difference| of log-probabilities from a float32 model on the CPU that reads each row by itself."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from grpo_gsm8k.config import TrainConfig
    from grpo_gsm8k.datatypes import SamplingParams
    from grpo_gsm8k.engines.probe import completed, logprob_differences
    from grpo_gsm8k.trainer.learner import TorchLearner

    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM.from_config
    model = make(config).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.15)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    plain = copy.deepcopy(model).float().eval()
    there = model.to(args.device)
    prompts = dummy_requests([5, 3, 9, 5], 211, 2)
    sampler = sampler_of(copy.deepcopy(there), rows=16)
    drawn = sampler.sample(prompts, SamplingParams(12, temperature=0.7))
    rows = [completed(p, c) for p, group in zip(prompts, drawn, strict=True) for c in group]
    expected = [_plain_logprobs(plain, row.token_ids, 0.7) for row in rows]
    found: dict[str, Any] = {"sampler": max(logprob_differences(rows, expected))}
    data = [replace(row, logprobs=own) for row, own in zip(rows, expected, strict=True)]
    for packing in ("off", "on"):
        try:
            cfg = TrainConfig(engine="vllm", packing=packing, max_tokens_per_microbatch=64)
            learner = TorchLearner(copy.deepcopy(there), None, cfg)
            found[f"packing {packing}"] = max(logprob_differences(data, learner.logprobs(data, 0.7)))
        except ConfigError as fault:
            found[f"packing {packing}"] = str(fault)[:60]
    return found


def _plain_logprobs(model: Any, ids: Sequence[int], temperature: float) -> tuple[float, ...]:
    """Log-probability of each id under the model's logits, 0 for the first."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].float()
    logp = (logits / temperature).log_softmax(-1)
    return (0.0, *logp.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())


def parity(args: argparse.Namespace) -> Iterator[Row]:
    """An update with each option: its loss and gradient against a float32 update on the CPU."""
    import torch

    from grpo_gsm8k.trainer import head_triton

    toy = argparse.Namespace(**{**vars(args), "sizes": "toy"})
    wanted, loss = _gradient(toy, "cpu", torch.float32)
    options: dict[str, dict[str, Any]] = {
        "default": {},
        "packing": {"packing": "on"},
        "no packing": {"packing": "off"},
        "checkpointing": {"activation_checkpointing": True},
        "offload": {"optimizer_device": "cpu"},
        "deterministic": {"deterministic": True},
        "head in torch": {},
        "compiled": {"compile": "on", "packing": "on"},
    }
    if is_toy(args) or repro.missing_for_compile(args.device.startswith("cuda")):
        del options["compiled"]
    for dtype in (torch.float32, torch.bfloat16):
        for name, flags in options.items():
            title = f"{name} {str(dtype).removeprefix('torch.')}"
            if name == "compiled" and dtype == torch.float32:
                continue  # half a minute for a type that is not compiled by default
            torch_head = mock.patch.object(head_triton, "serves", lambda hidden: False)
            try:
                with torch_head if name == "head in torch" else contextlib.nullcontext():
                    found, its = _gradient(toy, args.device, dtype, **flags)
            except FAULTS as fault:  # one option; the others still count
                yield title, {"failed": last_line(fault)}
                continue
            yield title, {"gradient_error": relative_error(found, wanted), "loss_error": abs(its - loss)}


def _gradient(args: argparse.Namespace, device: str, dtype: Any, **flags: Any) -> tuple[list[Any], float]:
    """The gradient of a small update, and its loss."""
    from grpo_gsm8k.config import TrainConfig
    from grpo_gsm8k.trainer.data import weighted
    from grpo_gsm8k.trainer.learner import TorchLearner
    from grpo_gsm8k.trainer.losses import GrpoClip, Objective

    at = argparse.Namespace(**{**vars(args), "device": "cpu"})
    model = bench.make_model(shape_args(at, "toy", dtype="float32")).to(dtype).to(device)
    repro.set_deterministic(bool(flags.get("deterministic")))
    cfg = TrainConfig(engine="vllm", **{"max_tokens_per_microbatch": 256, **flags})
    learner = TorchLearner(model, None, cfg)
    found = learner.forward_backward(weighted(update_rows(args, "toy", 0), "token"), Objective(GrpoClip()))
    names = sorted(learner.optimizer.masters)
    sums = getattr(learner.optimizer, "sums", {})
    params, masters = learner.optimizer.params, learner.optimizer.masters
    grads: list[Any] = [
        masters[n].grad if masters[n].grad is not None else sums.get(params[n], params[n].grad) for n in names
    ]
    repro.set_deterministic(False)
    return [grad.detach().cpu() for grad in grads], found["loss"]
