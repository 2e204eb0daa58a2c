"""Every setting of the server, declared once: a field is a flag and its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grpo_gsm8k.config import opt


@dataclass(frozen=True)
class ServeConfig:
    """What is served, where, and how much of it."""

    model_id: str = opt("", "base model: a folder, or a name on the hub")
    served_name: str = opt("", "the name that clients use for it; empty for --model_id")
    host: str = opt("127.0.0.1", "address to listen on; others than this machine's need --api_key_env")
    port: int = opt(8000, "port to listen on; 0 for a free one", ge=0, le=65535)
    out_dir: str = opt("artifacts/serve", "journal, snapshots and checkpoints; start with it again to go on")
    api_key_env: str = opt("", "environment variable that holds the key; empty: one is minted at the first start")
    engine: Literal["hf", "vllm"] = opt("hf", "who samples: transformers in this process, or vLLM")
    device: str = opt("auto", "cpu, cuda, cuda:0, or auto")
    sample_device: str = opt("", "another device, to draw samples on while training goes on; empty: in turns")
    dtype: Literal["auto", "float32", "bfloat16"] = opt("auto", "auto: bfloat16 on a GPU, else float32")
    max_models: int = opt(8, "models in memory at once; the others wait on disk", ge=1, le=1024)
    lora_alpha: int = opt(32, "adapters are scaled by lora_alpha / rank; clients cannot choose it", ge=1)
    seed: int = opt(0, "decides adapters and samples for which a client sends no seed", ge=0)
    snapshot_every: int = opt(8, "optimizer steps of a model between snapshots of its state", ge=1)
    max_tokens_per_microbatch: int = opt(8192, "tokens of one forward pass in training", ge=1)
    sample_rows: int = opt(64, "samples decoded side by side", ge=1)
    gap_s: float = opt(30.0, "seconds that a request waits for one with a smaller seq_id", gt=0)
    idle_s: float = opt(1800.0, "seconds without a sign of life after which a session ends; what it made is kept", gt=0)
    max_body_mb: int = opt(64, "largest request in MB", ge=1, le=4096)
    rate: int = opt(0, "requests a second; 0 for no limit", ge=0)
