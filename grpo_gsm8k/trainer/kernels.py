"""Which kernels a model's attention takes on a GPU, chosen once for trainer and sampler."""

from __future__ import annotations

from typing import Any

import torch

from grpo_gsm8k.trainer import packing


def choose_attention(model: Any) -> None:
    """Keep a model on a GPU away from the attention kernels that are slow for its rows. On a CPU nothing changes.

    torch prefers cuDNN's attention on Hopper, which plans anew for every shape: half a second to a second each, and
    rows of text come in dozens of shapes. The choice is the process's. Measured on an H200: 90 ms for each new
    shape, 0.8 ms with flash. In float32, and for a token step's mask, torch has no kernel but the one that forms all
    T x T scores where keys have fewer heads than queries: `packing.attention` knows what to do.
    """
    weight = next(model.parameters())
    if not weight.is_cuda:
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(packing.ATTENTION)
