"""Loads data sets of the Hugging Face hub for supervised fine-tuning: `--data_path hf:OWNER/NAME[:split]`.

    grpo-gsm8k sft --model_id MODEL --data_path hf:trl-lib/Capybara:train --eval_set_path DIR/val.jsonl
    hf:OWNER/NAME             the split "train" of the default configuration, as the main branch has it now
    hf:OWNER/NAME/CONFIG:test@REVISION                            a configuration, a split, a commit, branch or tag

It writes the columns `messages`, `prompt` and `response`, or `prompt` and `completion` as chat JSONL below
`artifacts/hub/`, in a folder named by the commit. From there on it is an ordinary file: hashed, checked row by row, and
read again without a network. A file beside it records its source, which each run's `data.json` repeats.

Only this module imports the `datasets` library. No code of a data set is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_gsm8k.errors import ConfigError, DataError
from grpo_gsm8k.runs.clean import one_line
from grpo_gsm8k.runs.files import SOURCE_SUFFIX, read_json, write_json, write_jsonl

FOLDER = Path("artifacts/hub")
PREFIX = "hf:"
COLUMNS = (("messages",), ("prompt", "response"), ("prompt", "completion"))
TIMEOUT = 10.0  # seconds to resolve a revision to a commit
_NAME = re.compile(
    r"(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)(?:/(?P<config>[\w.-]+))?"
    r"(?:(?::(?P<split>[^:@]+))?(?:@(?P<revision>[^:@]+))?|@(?P<revision2>[^:@]+):(?P<split2>[^:@]+))"
)


@dataclass(frozen=True)
class HubName:
    """A split of a data set on the hub; `config` and `revision` empty for the default ones."""

    repo: str
    split: str
    config: str = ""
    revision: str = ""


def parse(spec: str) -> HubName:
    """`hf:OWNER/NAME[/CONFIG][:split][@REVISION]`. Raises `ConfigError` for anything else."""
    found = _NAME.fullmatch(spec.removeprefix(PREFIX))
    if not found:
        raise ConfigError(f"--data_path {spec}: must read hf:OWNER/NAME[/CONFIG][:split][@REVISION]")
    split, revision = found["split"] or found["split2"], found["revision"] or found["revision2"]
    return HubName(f"{found['owner']}/{found['name']}", split or "train", found["config"] or "", revision or "")


def local_path(data_path: str, run: str = "") -> Path:
    """The local file of a `--data_path`: itself, or the file that `fetch` makes of a hub name.

    Args:
        run: a run directory; a resumed run uses the same commit.
    """
    if not data_path.startswith(PREFIX):
        return Path(data_path)
    name = parse(data_path)
    recorded = Path(run) / "data.json"
    before = read_json(recorded).get("train", {}).get("from", {}) if run and recorded.is_file() else {}
    return fetch(name, str(before.get("revision", "")) if before.get("dataset") == name.repo else "")


def fetch(name: HubName, commit: str = "", folder: Path = FOLDER) -> Path:
    """Download a split as a file of chat rows, unless it exists.

    Args:
        commit: of the data set, if known.

    Raises:
        ConfigError: there is no such data set, revision, configuration or split, or the hub cannot be reached.
        DataError: it lacks the columns, or has no rows.
    """
    commit = commit or (name.revision if re.fullmatch(r"[0-9a-f]{40}", name.revision) else resolve(name))
    stem = "--".join(re.sub(r"[^\w.-]", "_", part) for part in (name.config, name.split) if part)
    path = folder / name.repo.replace("/", "--") / commit / f"{stem}.jsonl"
    source = path.with_suffix(SOURCE_SUFFIX)
    if path.is_file() and source.is_file():
        return path
    columns, rows = load(name, commit)
    wanted = next((own for own in COLUMNS if set(own) <= set(columns)), None)
    if wanted is None:
        raise DataError(
            f"{PREFIX}{name.repo}",
            f"has the columns {', '.join(columns)}; needed are messages, prompt and response, or prompt and completion",
        )
    written = 0

    def chats() -> Iterator[dict[str, Any]]:
        nonlocal written
        for row in rows:
            written += 1
            yield chat_row(row, wanted)

    write_jsonl(path, chats())
    if not written:
        raise DataError(f"{PREFIX}{name.repo}", f"the split {name.split!r} has no rows")
    made = {"dataset": name.repo, "config": name.config, "split": name.split, "revision": commit}
    write_json(source, {**made, "columns": list(wanted), "rows": written})
    return path


def chat_row(row: Mapping[str, Any], columns: tuple[str, ...]) -> dict[str, Any]:
    """A row as chat JSONL. Prompts and completions may be texts or lists of messages."""
    if columns == ("messages",):
        return {"messages": _messages(row["messages"])}
    prompt, response = (row[column] for column in columns)
    if not isinstance(prompt, list) and not isinstance(response, list):
        return {"prompt": _text(prompt), "response": _text(response)}
    said = [("user", prompt), ("assistant", response)]
    parts = [_messages(part) if isinstance(part, list) else [{"role": r, "content": _text(part)}] for r, part in said]
    return {"messages": [message for part in parts for message in part]}


def _messages(value: Any) -> Any:
    """Keep roles and contents only. Anything else is left to the reader, which names the line."""
    if not isinstance(value, list):
        return _text(value)
    return [
        {key: _text(message[key]) for key in ("role", "content") if key in message} if isinstance(message, dict) else []
        for message in value
    ]


def _text(value: Any) -> Any:
    """A text unchanged; of anything else only its type, since it may not be JSON."""
    return (
        value if isinstance(value, str) else [] if isinstance(value, list) else {} if isinstance(value, dict) else None
    )


def resolve(name: HubName) -> str:
    """Resolve a revision to a commit; fails at once without a network."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    what = f"--data_path {PREFIX}{name.repo}"
    try:
        sha = HfApi().dataset_info(name.repo, revision=name.revision or None, timeout=TIMEOUT).sha
    except RevisionNotFoundError:
        raise ConfigError(f"{what}: the hub has no revision {name.revision!r} of it") from None
    except GatedRepoError:
        raise ConfigError(f"{what}: is gated, and HF_TOKEN has no access; ask for it on its page") from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{what}: the hub has no such data set, or it is private and HF_TOKEN does not open it"
        ) from None
    except hub_errors() as fault:
        raise ConfigError(f"{what}: the hub cannot be reached: {_short(fault)}; a local JSONL file will do") from None
    if not sha:
        raise ConfigError(f"{what}: the hub answers without a commit")
    return sha


def load(name: HubName, commit: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """The columns and rows of a split, through the `datasets` library."""
    import datasets

    try:
        found = datasets.load_dataset(name.repo, name.config or None, split=name.split, revision=commit)
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError, *hub_errors()) as fault:
        raise ConfigError(f"--data_path {PREFIX}{name.repo}:{name.split}@{commit[:12]}: {_short(fault)}") from None
    return list(found.column_names), iter(found)


def hub_errors() -> tuple[type[Exception], ...]:
    """The errors of a call to the hub: its own, its HTTP client's, `OSError`, invalid JSON."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError, *(b for b in HfHubHTTPError.__bases__ if issubclass(b, Exception)), OSError, ValueError


def _short(fault: Exception) -> str:
    return one_line(str(fault), 200).rstrip(".") or type(fault).__name__
