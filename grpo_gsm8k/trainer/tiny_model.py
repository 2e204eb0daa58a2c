"""A tiny chat model from nothing: the embedded default of the demo, and a model for tests.

It trains a byte-level BPE tokenizer on the given texts and writes it, with a randomly initialised
Qwen2ForCausalLM, as an ordinary transformers folder. Nothing downstream knows that it is tiny.

Differences from Qwen: the chat template has no default system message, and no tools.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging

from grpo_gsm8k.errors import ConfigError

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
"""The special tokens; their ids are 0, 1 and 2."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tiny_model(
    folder: Path,
    texts: Iterable[str],
    seed: int,
    *,
    vocab_size: int = 1024,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 8,
    intermediate_size: int | None = None,
    context: int = 1024,
) -> Path:
    """Write tokenizer and model to `folder` and return it. The same arguments write the same bytes.

    Args:
        folder: is created if need be.
        texts: what the tokenizer is trained on. It encodes any other text too, byte by byte at worst.
        seed: of the initial weights.
        vocab_size: upper limit; on few texts the vocabulary is smaller. At least 256 bytes and 3 special tokens.
        hidden_size: width, a multiple of `2 * heads`.
        layers: depth.
        heads: attention heads, each with its own keys and values.
        intermediate_size: width of the MLP; `4 * hidden_size` by default.
        context: positions.
    """
    if vocab_size < 259:
        raise ConfigError(f"vocab_size is {vocab_size}; 256 bytes and 3 special tokens need at least 259")
    if hidden_size % (2 * heads):
        raise ConfigError(f"hidden_size is {hidden_size}; it must be a multiple of 2 * heads = {2 * heads}")
    tokenizer = train_tokenizer(texts, vocab_size, context)
    pad_id, end_id = tokenizer.get_vocab()[PAD], tokenizer.get_vocab()[END]
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        initialise(model)
    model.generation_config = GenerationConfig(eos_token_id=[end_id, pad_id], pad_token_id=pad_id, do_sample=False)
    folder.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def initialise(model: Qwen2ForCausalLM) -> None:
    """Scale weights by their fan-in, start every residual branch at zero.

    Qwen2's flat 0.02 is meant for wide models: at this width learning starts much later (artifacts/RESULTS.md).
    """
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight)
        elif weight.ndim == 2:
            std = 0.05 if "embed_tokens" in name else weight.shape[1] ** -0.5
            torch.nn.init.normal_(weight, std=std)


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int = 1024) -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE (NFC, every digit a token of its own), its merges learned from `texts`."""
    bpe = Tokenizer(models.BPE())
    qwen = Qwen2Tokenizer().backend_tokenizer
    bpe.normalizer, bpe.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = repeat("system\nuser\nassistant\n", 1000)  # often enough that each role becomes one token
    bpe.train_from_iterator(chain(texts, roles), trainer)
    learned: dict[str, Any] = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learned["merges"]]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=merges,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
