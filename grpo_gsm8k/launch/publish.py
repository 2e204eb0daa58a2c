"""`push`: a checkpoint folder to the hub, with a model card that says what the run itself has recorded.

Nothing in the card is typed by hand: the evaluation with its interval, the hashes of the data and of the weights, the
config and the commit are read from the run directory that the checkpoint lies in.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from grpo_gsm8k.errors import DataError, LaunchError
from grpo_gsm8k.launch import hub
from grpo_gsm8k.runs.files import read_json, read_jsonl, sha256_file
from grpo_gsm8k.trainer.checkpoint import verify

NOT_UPLOADED = ["optimizer*", "optimizer/*", "state.json", "manifest.json", ".*", "README.md"]


def push(checkpoint: Path, repo_id: str, public: bool = False) -> dict[str, Any]:
    """Upload a checkpoint with its card; the repository is made, private by default.

    Raises:
        CheckpointError: a file of it is damaged.
        DataError: it does not lie in a run directory.
        ConfigError: this token may not push there.
        LaunchError: the upload failed.
    """
    step = verify(checkpoint)["step"]
    card = model_card(checkpoint, step)
    hub.check_push(repo_id)
    client = hub.api()
    try:
        if public:
            client.update_repo_settings(repo_id, private=False)
        client.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repo_id)
        done = client.upload_folder(
            repo_id=repo_id,
            folder_path=checkpoint,
            commit_message=f"Step {step}",
            ignore_patterns=NOT_UPLOADED,
        )
    except hub.UNREACHABLE as fault:
        raise LaunchError(f"{repo_id}: not uploaded: {' '.join(str(fault).split())[:200]}") from None
    return {"repo_id": repo_id, "commit": str(done.oid), "step": step, "model": str(checkpoint)}


def model_card(checkpoint: Path, step: int) -> str:
    """The README of a checkpoint, from its run directory. Raises `DataError` where there is none."""
    run = checkpoint.resolve().parent.parent
    if not (run / "config.toml").is_file():
        raise DataError(checkpoint, "lies in no run directory (RUN/checkpoints/step_…), whose records the card needs")
    ((stage, settings),) = tomllib.loads((run / "config.toml").read_text(encoding="utf-8")).items()
    base = str(settings["model_id"])
    on_hub = base.count("/") == 1 and not Path(base).exists()
    about = ModelCardData(library_name="transformers", base_model=base if on_hub else None, tags=["gsm8k", stage])
    inputs = [f"| {name} | `{entry['sha256']}` |" for name, entry in read_json(run / "data.json").items()]
    weights = next(iter(sorted(checkpoint.glob("*.safetensors"))), None)
    recorded = [f"{key} = {value!r}" for key, value in settings.items() if key not in ("data", "out_dir", "cache_dir")]
    parts = [
        f"---\n{about.to_yaml()}\n---",
        f"# {stage} on GSM8K, step {step}",
        f"Trained from `{base if on_hub else Path(base).name}` with grpo_gsm8k at commit `{_commit(run)}`.",
        "## Evaluation\n\n" + "\n".join(_evaluation(run, checkpoint, step)),
        "## Data\n\n| input | sha256 |\n|---|---|\n" + "\n".join(inputs),
        f"Weights: `{weights.name}`, sha256 `{sha256_file(weights)}`." if weights else "",
        "## Config\n\n```toml\n" + "\n".join([f"[{stage}]", *recorded]) + "\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _evaluation(run: Path, checkpoint: Path, step: int) -> list[str]:
    """A table row per evaluation of these very weights: on validation in the run, on test in its pipeline."""
    rows = ["| set | accuracy | 95 % interval | problems |", "|---|---|---|---|"]
    for _, row in read_jsonl(run / "metrics.jsonl"):
        if row["step"] == step and "val/accuracy" in row:
            rows.append(_row("validation", row["val/accuracy"], row["val/ci_low"], row["val/ci_high"], row["val/n"]))
    if (run.parent / "pipeline.json").is_file():
        stages = read_json(run.parent / "pipeline.json")["stages"]
        mine = [row for row in stages if Path(row["model"]).resolve() == checkpoint.resolve()]
        rows += [_row("test", row["accuracy"], row["ci95"][0], row["ci95"][1], row["n"]) for row in mine]
    return rows if len(rows) > 2 else ["None of this step is on record."]


def _row(name: str, accuracy: float, low: float, high: float, n: float) -> str:
    return f"| {name} | {accuracy:.1%} | {low:.1%} to {high:.1%} | {n:.0f} |"


def _commit(run: Path) -> str:
    """As `repro.snapshot` wrote it: `# commit abc`, or `# no git commit to compare with (commit abc)`."""
    first = (run / "code.diff").read_text(encoding="utf-8").partition("\n")[0]
    return first.rpartition("commit ")[2].rstrip(")")
