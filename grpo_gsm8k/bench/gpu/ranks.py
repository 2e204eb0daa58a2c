"""One rank of a short SFT, as `bench gpu --devices 2` starts it under torchrun.

python -m torch.distributed.run --nproc-per-node 2 -m grpo_gsm8k.bench.gpu.ranks FOLDER DEVICE NAME
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(folder: Path, device: str, name: str) -> None:
    """Train four steps on made-up problems; the first rank of the first run makes them."""
    from grpo_gsm8k import config, sft
    from grpo_gsm8k.bench.gpu.tools import toy_model

    if name == "1":
        toy_model(folder, {"train": 100, "val": 8, "test": 1}, {})
    flags = {
        "model_id": str(folder / "model"),
        "data": str(folder / "data"),
        "out_dir": str(folder / f"run{name}"),
        "device": device,
        "engine": "hf",
        "dtype": "float32",
        "batch_size": 16,
        "max_steps": 4,
        "eval_every": 4,
        "eval_examples": 2,
        "max_new_tokens": 4,
    }
    sft.run(config.resolve("sft", preset="tiny", flags=flags))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
