"""The same job as a SkyPilot task, for other clouds and several nodes. SkyPilot itself is not needed to write it.

grpo-gsm8k launch sky --image ghcr.io/owner/name@sha256:… --budget 10 -- grpo-gsm8k pipeline …
sky jobs launch task.yaml
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from grpo_gsm8k import config
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.launch import records
from grpo_gsm8k.launch.settings import PREFERENCE, UpConfig
from grpo_gsm8k.launch.up import prepared, wrapped
from grpo_gsm8k.runs.files import write_atomic

ACCELERATORS = {
    "NVIDIA L40S": "L40S",
    "NVIDIA A100-SXM4-80GB": "A100-80GB",
    "NVIDIA A100 80GB PCIe": "A100-80GB",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
}
IDLE_MINUTES = 10


def write_task(values: Mapping[str, Any], command: Sequence[str], nodes: int, out: Path) -> Path:
    """Write the task. Raises `ConfigError` as `task` does."""
    write_atomic(out, task(values, command, nodes))
    return out


def task(values: Mapping[str, Any], command: Sequence[str], nodes: int = 1) -> str:
    """The task as YAML. Secrets are named, to be given with `--secret NAME`; none is written. Raises `ConfigError`."""
    cfg, command = prepared(config.build(UpConfig, values), command)
    command = wrapped(cfg, command)
    wanted = records.names_in(cfg.gpu) or list(PREFERENCE)
    if unknown := [name for name in wanted if name not in ACCELERATORS]:
        raise ConfigError(f"--gpu {unknown[0]}: must be one of {', '.join(ACCELERATORS)}")
    if nodes < 1:
        raise ConfigError("--nodes must be at least 1")
    resources = {
        "image_id": f"docker:{cfg.image}",
        "disk_size": cfg.disk,
        "job_recovery": {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": cfg.restarts},
        "autostop": {"idle_minutes": IDLE_MINUTES, "down": True},
        "ordered": [{"accelerators": f"{ACCELERATORS[name]}:{cfg.count}"} for name in wanted],
    }
    said = {"name": cfg.name, "num_nodes": nodes, "resources": resources}
    said |= {"secrets": dict.fromkeys(records.names_in(cfg.pass_env))}
    hours = f"timeout --signal=TERM {round(cfg.hours * 3600)} " if cfg.hours else ""
    return str(yaml.safe_dump(said | {"run": hours + shlex.join(command) + "\n"}, sort_keys=False, allow_unicode=True))
