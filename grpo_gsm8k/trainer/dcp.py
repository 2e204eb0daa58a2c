"""Saves and loads the sharded optimizer state in safetensors, with any number of ranks.

torch.distributed.checkpoint does the work. Its default format stores a pickle beside the tensors, and we never unpickle
files from outside; its safetensors format stores each shard's position in the file header.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from grpo_gsm8k.errors import DiskError
from grpo_gsm8k.trainer.optimizer import KINDS, State

FOLDER = "optimizer"


def write(folder: Path, state: State) -> None:
    """Write this rank's part of `state` (DTensors and replicated tensors) below `folder`; all ranks call it.

    Raises:
        DiskError: on every rank, if any rank cannot write.
    """
    writer = HuggingFaceStorageWriter(str(folder / FOLDER), save_distributed=True)
    try:
        save(state, storage_writer=writer)
    except CheckpointException as fault:
        rank, (error, _) = next(iter(fault.failures.items()))
        if not isinstance(error, OSError | SafetensorError):
            raise
        raise DiskError(f"{folder}: rank {rank} cannot write: {error}; earlier checkpoints are untouched") from fault


def read(folder: Path, empty: Callable[[str, torch.Size], torch.Tensor]) -> State:
    """Read what `write` wrote, or a single process' file, into tensors that `empty` makes.

    Args:
        empty: (name, full shape) → the tensor to fill: a full one, or a DTensor with this rank's shard.
    """
    reader = HuggingFaceStorageReader(str(folder / FOLDER))
    stored = reader.read_metadata().state_dict_metadata
    sizes = {name: entry.size for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    state = {name: empty(name, size) for name, size in sizes.items() if name.split(".")[0] in KINDS}
    with warnings.catch_warnings():  # that one process is alone is no news
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    return state
