"""`push`: a checkpoint folder to the hub, with a model card that says what the run itself has recorded.

Nothing in the card is typed by hand: the evaluation with its interval, the hashes of the data and of the weights, the
config and the commit are read from the run directory that the checkpoint lies in.
"""

from __future__ import annotations

import json
import platform
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCardData

from grpo_gsm8k.errors import ConfigError, DataError, LaunchError
from grpo_gsm8k.launch import hub
from grpo_gsm8k.launch.archive import path_fault
from grpo_gsm8k.launch.records import Blot, secrets_of
from grpo_gsm8k.runs.clean import one_line, publishable, without_whole_paths
from grpo_gsm8k.runs.files import read_json, read_jsonl, real_path, sha256_file
from grpo_gsm8k.trainer.checkpoint import MANIFEST, verify

NOT_UPLOADED = ["optimizer*", "state.json", "manifest.json", ".*", "*/.*", "README.md", *hub.SECRET]
# Settings that name the folder a model came from. Other JSON (a tokenizer's vocabulary) has no paths in it.
CONFIGS = frozenset(
    {"config.json", "adapter_config.json", "generation_config.json", "tokenizer_config.json", "prompt.json"}
)
MOST_TEXT = 4 << 20  # bytes of a file that is searched for keys
KEY_SHAPE = re.compile(r"\b(?:hf_|gh[opsu]_|sk-|xox[abp]-|rpa_)[A-Za-z0-9_-]{16,}")


def preview(checkpoint: Path, repo_id: str) -> dict[str, Any]:
    """What `push` would upload, and what it would leave here. Raises as `push` does; asks the hub nothing."""
    step = verify(checkpoint)["step"]
    files = published(checkpoint, model_card(checkpoint, step))
    there = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    sizes = {name: len(what) if isinstance(what, bytes) else what.stat().st_size for name, what in files.items()}
    return {
        "repo_id": repo_id,
        "step": step,
        "upload": [{"path": name, "bytes": size} for name, size in sizes.items()],
        "left_here": sorted(there - files.keys()),
        "card": files["README.md"].decode(),  # type: ignore[union-attr]  # made here
    }


def published(checkpoint: Path, card: str) -> dict[str, Path | bytes]:
    """What is uploaded, by its path in the repository: the card, and what the checkpoint's manifest lists.

    A file that somebody has put beside them stays here, and so does what continues the training alone. Configs go
    without this machine's paths.

    Raises:
        ConfigError: a text in it holds what looks like a key.
    """
    files: dict[str, Path | bytes] = {"README.md": card.encode()}
    for name in read_json(checkpoint / MANIFEST)["sha256"]:
        path = checkpoint / name
        if any(fnmatch(name, pattern) for pattern in NOT_UPLOADED) or path_fault(name) or path.is_symlink():
            continue
        files[name] = path
        if name in CONFIGS:
            config = read_json(path)
            if (cleaned := without_whole_paths(config)) != config:
                files[name] = (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()
    blot = Blot(secrets_of(""))
    for name, what in files.items():
        if isinstance(what, bytes) or (name.endswith((".json", ".jinja", ".txt", ".md")) and _small(what)):
            text = (what if isinstance(what, bytes) else what.read_bytes()).decode("utf-8", "replace")
            if blot(text) != text or KEY_SHAPE.search(text):
                raise ConfigError(f"{checkpoint / name}: holds what looks like a key; nothing was uploaded")
    return files


def _small(path: Path) -> bool:
    return path.stat().st_size <= MOST_TEXT


def push(checkpoint: Path, repo_id: str, public: bool = False, instead_of: str = "") -> dict[str, Any]:
    """Upload a checkpoint with its card; the repository is made, private by default.

    Args:
        public: make the repository public, or push to one that is.
        instead_of: files below this path are deleted in the same commit.

    Raises:
        CheckpointError: a file of it is damaged.
        DataError: it does not lie in a run directory.
        ConfigError: this token may not push there, the repository is public, or a text holds a key.
        LaunchError: the upload failed.
    """
    step = verify(checkpoint)["step"]
    files = published(checkpoint, model_card(checkpoint, step))
    hub.check_push(repo_id, public)
    client = hub.api()
    changes: list[Any] = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=what) for name, what in files.items()]
    try:
        if public:
            client.update_repo_settings(repo_id, private=False)
        if instead_of:
            there = [name for name in client.list_repo_files(repo_id) if name.startswith(instead_of)]
            changes += [CommitOperationDelete(path_in_repo=name) for name in there]
        done = client.create_commit(repo_id, changes, commit_message=f"Step {step}")
    except hub.UNREACHABLE as fault:
        raise LaunchError(f"{repo_id}: not uploaded: {one_line(str(fault), 200)}") from None
    return {
        "repo_id": repo_id,
        "commit": str(done.oid),
        "step": step,
        "model": str(checkpoint),
        "files": sorted(files),
    }


def model_card(checkpoint: Path, step: int) -> str:
    """The README of a checkpoint, from its run directory. Raises `DataError` where there is none."""
    run = real_path(checkpoint).parent.parent
    if not (run / "config.toml").is_file():
        raise DataError(checkpoint, "lies in no run directory (RUN/checkpoints/step_…), whose records the card needs")
    ((stage, settings),) = tomllib.loads((run / "config.toml").read_text(encoding="utf-8")).items()
    base = str(settings["model_id"])
    on_hub = base.count("/") == 1 and not Path(base).exists()
    source = base if on_hub else publishable(str(real_path(base)))
    about = ModelCardData(library_name="transformers", base_model=base if on_hub else None, tags=["gsm8k", stage])
    data = read_json(run / "data.json")
    inputs = [f"| {publishable(name)} | `{entry['sha256']}` |" for name, entry in data.items()]
    weights = next(iter(sorted(checkpoint.glob("*.safetensors"))), None)
    kept = {key: publishable(value) for key, value in settings.items() if key not in ("data", "out_dir", "cache_dir")}
    recorded = [f"{key} = {value!r}" for key, value in kept.items()]
    parts = [
        f"---\n{about.to_yaml()}\n---",
        f"# {stage} on GSM8K, step {step}",
        f"Trained from `{source}` with grpo_gsm8k at commit `{_commit(run)}`.",
        "## Evaluation\n\n" + "\n".join(_evaluation(run, checkpoint, step)),
        "## Data\n\n| input | sha256 |\n|---|---|\n" + "\n".join(inputs),
        f"Weights: `{weights.name}`, sha256 `{sha256_file(weights)}`." if weights else "",
        "## Config\n\n```toml\n" + "\n".join([f"[{stage}]", *recorded]) + "\n```",
    ]
    card = "\n\n".join(part for part in parts if part) + "\n"
    host = platform.node()
    return re.sub(rf"\b{re.escape(host)}\b", "[host]", card) if len(host) > 3 else card


def _evaluation(run: Path, checkpoint: Path, step: int) -> list[str]:
    """A table row per evaluation of these very weights: on validation in the run, on test in its pipeline."""
    rows = ["| set | accuracy | 95 % interval | problems |", "|---|---|---|---|"]
    for _, row in read_jsonl(run / "metrics.jsonl"):
        if row["step"] == step and "val/accuracy" in row:
            rows.append(_row("validation", row["val/accuracy"], row["val/ci_low"], row["val/ci_high"], row["val/n"]))
    if (run.parent / "pipeline.json").is_file():
        stages = read_json(run.parent / "pipeline.json")["stages"]
        mine = [row for row in stages if real_path(row["model"]) == real_path(checkpoint)]
        rows += [_row("test", row["accuracy"], row["ci95"][0], row["ci95"][1], row["n"]) for row in mine]
    return rows if len(rows) > 2 else ["None of this step is on record."]


def _row(name: str, accuracy: float, low: float, high: float, n: float) -> str:
    return f"| {name} | {accuracy:.1%} | {low:.1%} to {high:.1%} | {n:.0f} |"


def _commit(run: Path) -> str:
    """As `repro.snapshot` wrote it: `# commit abc`, or `# no git commit to compare with (commit abc)`."""
    first = (run / "code.diff").read_text(encoding="utf-8").partition("\n")[0]
    return first.rpartition("commit ")[2].rstrip(")")
