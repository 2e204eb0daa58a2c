"""`export`: all that is needed to serve a model elsewhere, in one folder.

    grpo-gsm8k export --model RUN/checkpoints/step_000100 --out deploy --modal --compose

`--modal` writes `modal_app.py` (vLLM on a GPU that Modal rents while somebody asks) and `modal_client.py`; `--compose`
writes `compose.yaml` (vLLM on a GPU of this machine) and `client.py`. The model's files go into `model/` beside them, a
LoRA adapter merged into its base; a model on the hub is named, and fetched by the server. The Python files lie in
`templates/` as they are: valid programs, whose settings this module fills in.

    grpo-gsm8k export --model tinker://RUN/weights/NAME --out weights --base_url http://127.0.0.1:8000

brings a checkpoint home from a training service; with `--modal` or `--compose` it is served like any other.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grpo_gsm8k import config
from grpo_gsm8k.config import ModelConfig
from grpo_gsm8k.errors import ConfigError, RunDirError
from grpo_gsm8k.launch import checkpoints
from grpo_gsm8k.launch.settings import ExportConfig
from grpo_gsm8k.runs.files import atomic_folder, read_json, write_atomic, write_json

VLLM = "0.32.0"  # as the extra `vllm` of pyproject.toml pins it
TEMPLATES = Path(__file__).parent / "templates"
STAND_IN = "grpo-model"  # the name in the templates
TRAINING_STATE = ("optimizer*", "state.json", "manifest.json", ".*")
COMPOSE = """\
# A model on a GPU of this machine: vLLM's OpenAI-compatible server. Written by `grpo-gsm8k export --compose`.
#
#   export VLLM_API_KEY=$(openssl rand -hex 32)
#   docker compose up --wait                                    # returns once the model is loaded
#   python client.py http://127.0.0.1:8000 "What is 12 * 7?"
#
# It listens on the loopback address alone. To serve other machines, put a proxy with TLS in front of it.
"""


def export(values: Mapping[str, Any]) -> dict[str, Any]:
    """Write the folder; returns its `path` and `files`.

    Raises:
        ConfigError: nothing to write was named, or there is no model in the folder or at the service.
        LaunchError: the service cannot be reached.
        RunDirError: `--out` exists.
    """
    cfg = config.build(ExportConfig, values)
    out = Path(cfg.out)
    if out.exists():
        raise RunDirError(f"{out}: exists already; pick another --out")
    remote, local = checkpoints.is_path(cfg.model), Path(cfg.model).is_dir()
    if not cfg.modal and not cfg.compose and not remote:
        raise ConfigError("say what to write: --modal, --compose, or both")
    if not local and not remote and not re.fullmatch(r"[\w.-]+/[\w.-]+", cfg.model):
        raise ConfigError(f"--model {cfg.model}: neither a folder nor a name on the hub (owner/name)")
    with atomic_folder(out) as folder:
        if remote and not cfg.modal and not cfg.compose:
            fetch(cfg, folder)
        elif remote:
            with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
                fetch(cfg, Path(temporary))
                put_model(Path(temporary), folder / "model")
        elif local:
            put_model(Path(cfg.model), folder / "model")
        hub_model = "" if local or remote else cfg.model
        if cfg.modal:
            write_modal(cfg, folder, hub_model)
        if cfg.compose:
            write_compose(cfg, folder, hub_model)
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {"path": str(out), "files": files, "name": cfg.name}


def fetch(cfg: ExportConfig, folder: Path) -> None:
    """The files of a `tinker://` checkpoint; an adapter's base is `--base`, where that is given."""
    checkpoints.download(cfg.model, folder, cfg.base_url)
    config_file = folder / "adapter_config.json"
    if cfg.base and config_file.is_file():
        write_json(config_file, read_json(config_file) | {"base_model_name_or_path": cfg.base})


def put_model(source: Path, into: Path) -> None:
    """A folder that vLLM can load: the model's files without the training state, or an adapter merged into its base.

    Raises:
        ConfigError: it holds no model.
    """
    if (source / "adapter_config.json").is_file():
        from grpo_gsm8k import workbench

        workbench.merge(config.build(ModelConfig, {"model_id": str(source), "dtype": "bfloat16"}), into)
        return
    if not (source / "config.json").is_file():
        raise ConfigError(f"--model {source}: holds no model (config.json is missing)")
    into.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and not any(fnmatch(path.name, pattern) for pattern in TRAINING_STATE):
            shutil.copyfile(path, into / path.name)


def write_modal(cfg: ExportConfig, folder: Path, hub_model: str) -> None:
    """`modal_app.py` and `modal_client.py`."""
    gpu, gpus = cfg.gpu_and_count
    settings = {
        "MODEL": hub_model,
        "REVISION": cfg.revision,
        "HUB_SECRET": cfg.hub_secret,
        "GPU": gpu,
        "GPUS": gpus,
        "DTYPE": dtype(gpu),
        "MAX_MODEL_LEN": cfg.max_model_len,
        "SCALEDOWN_S": cfg.scaledown_s,
        "MOST_CONTAINERS": cfg.max_containers,
        "PROXY_AUTH": cfg.proxy_auth,
        "VLLM": VLLM,
        "TRANSFORMERS": version("transformers"),  # the one that wrote the folder
    }
    write_atomic(folder / "modal_app.py", filled("modal_app.py", cfg.name, settings))
    write_atomic(folder / "modal_client.py", filled("modal_client.py", cfg.name, {}))


def write_compose(cfg: ExportConfig, folder: Path, hub_model: str) -> None:
    """`compose.yaml` and `client.py`."""
    import yaml  # type: ignore[import-untyped]

    gpu, gpus = cfg.gpu_and_count
    words = [hub_model or "/model", "--served-model-name", cfg.name, "--host", "0.0.0.0", "--port", "8000"]
    words += ["--dtype", dtype(gpu), "--tensor-parallel-size", str(gpus), "--generation-config", "vllm"]
    words += ["--revision", cfg.revision] if cfg.revision else []
    words += ["--max-model-len", str(cfg.max_model_len)] if cfg.max_model_len else []
    health = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"
    service = {
        "image": f"vllm/vllm-openai:v{VLLM}",
        "entrypoint": ["vllm", "serve"],
        "command": words,
        "ports": [f"127.0.0.1:{cfg.port}:8000"],
        "environment": {
            "VLLM_API_KEY": "${VLLM_API_KEY:?set VLLM_API_KEY to the key that clients must send}",
            "HF_TOKEN": "${HF_TOKEN:-}",
        },
        "volumes": ["hub:/root/.cache/huggingface"] if hub_model else ["./model:/model:ro"],
        "shm_size": "8g",  # tensor parallelism talks through shared memory
        "restart": "unless-stopped",
        "healthcheck": {
            "test": ["CMD", "python3", "-c", health],
            "interval": "10s",
            "timeout": "10s",
            "retries": 3,
            "start_period": "20m",
        },
        "deploy": {"resources": {"reservations": {"devices": [_devices(gpus)]}}},
    }
    said: dict[str, Any] = {"name": cfg.name, "services": {"vllm": service}}
    if hub_model:
        said["volumes"] = {"hub": {}}
    else:
        del service["environment"]["HF_TOKEN"]  # type: ignore[attr-defined]
    text = COMPOSE.replace(":8000", f":{cfg.port}")
    write_atomic(folder / "compose.yaml", text + yaml.safe_dump(said, sort_keys=False, width=120))
    client = filled("modal_client.py", cfg.name, {}).replace("modal_client.py", "client.py")
    write_atomic(folder / "client.py", client)


def _devices(gpus: int) -> dict[str, Any]:
    return {"driver": "nvidia", "count": gpus, "capabilities": ["gpu"]}


def dtype(gpu: str) -> str:
    """vLLM's `--dtype`: a T4 has no bfloat16."""
    return "half" if gpu == "T4" else "auto"


def filled(template: str, name: str, settings: Mapping[str, Any]) -> str:
    """A template with other values at its top-level assignments; each setting must have one."""
    source = (TEMPLATES / template).read_text(encoding="utf-8").replace(STAND_IN, name)
    lines = source.splitlines(keepends=True)
    pending = dict(settings)
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in pending:
            value, old = pending.pop(node.targets[0].id), node.value
            written = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
            line = lines[old.lineno - 1].encode()
            lines[old.lineno - 1] = (line[: old.col_offset] + written.encode() + line[old.end_col_offset :]).decode()
    assert not pending, f"{template} has no {', '.join(pending)}"
    return "".join(lines)
