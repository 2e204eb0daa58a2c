"""Rollouts on disk: `rollouts/step_000020.safetensors`, all that a step trained on.

Columns of numbers are plain tensors, which any reader of safetensors opens; nothing is pickled. `G` groups of one
prompt each hold `R` rollouts in all, with `T` tokens; prompts have `P` tokens in all.

    prompt_ids (P)  prompt_lengths (G)  group (R)
    token_ids (T)   mask (T)   logprobs (T)   lengths (R)
    rewards (R)   advantages (R)   weights (R)   policy_versions (R)   seeds (R)
    rows (bytes)    the rest of each rollout as deflated JSON: the example's id, text, finish reason, turns, grade

The header has the format's version, the stage, the step, and the sha256 of the weights before and after it. Numbers
take the narrowest type that keeps every bit.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grpo_gsm8k.datatypes import Example, Grade, Prompt, Rollout, Trajectory
from grpo_gsm8k.errors import DataError, RunDirError
from grpo_gsm8k.runs.files import atomic_path

FOLDER, FORMAT, HEADER = "rollouts", 1, "rollouts"


@dataclass(frozen=True)
class Stored:
    """The rollouts of a step as they were kept.

    Attributes:
        before, after: sha256 of the weights before and after the step; "" where the run did not hash them.
    """

    stage: str
    step: int
    before: str
    after: str
    groups: list[list[Rollout]]


def name_of(step: int) -> str:
    """The file of a step, below the run directory."""
    return f"{FOLDER}/step_{step:06d}.safetensors"


def write(run: Path, stored: Stored) -> Path:
    """Write the rollouts of a step into a run directory."""
    from safetensors.numpy import save_file

    header = {"format": FORMAT, "stage": stored.stage, "step": stored.step}
    header |= {"weights_before": stored.before, "weights_after": stored.after}
    path = run / name_of(stored.step)
    with atomic_path(path) as temporary:
        save_file(_columns(stored.groups), temporary, {HEADER: json.dumps(header)})
    return path


def read(path: Path, examples: Mapping[str, Example] | None = None) -> Stored:
    """Undo `write`. Without its example in `examples`, a prompt has only the example's id.

    Raises:
        RunDirError: a later format.
        DataError: not a file of rollouts.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            if header["format"] != FORMAT:
                raise RunDirError(f"{path}: rollouts of format {header['format']}; this version reads format {FORMAT}")
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        rows = json.loads(zlib.decompress(columns.pop("rows").tobytes()))
        lists = {name: column.tolist() for name, column in columns.items()}
        groups = _groups(lists, rows, examples or {})
        return Stored(header["stage"], header["step"], header["weights_before"], header["weights_after"], groups)
    except FileNotFoundError:
        raise DataError(path, "does not exist") from None
    except (SafetensorError, KeyError, ValueError, TypeError, IndexError, zlib.error) as fault:
        raise DataError(path, f"is not a whole file of rollouts: {fault}") from None


def grades_sha256(groups: Sequence[Sequence[Rollout]]) -> str:
    """The hash of what the grader said of a step: example, grade and advantage of each rollout, in order."""
    digest = hashlib.sha256()
    for group in groups:
        for one in group:
            row = [one.trajectory.prompt.example.id, asdict(one.grade), one.advantage]
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _columns(groups: Sequence[Sequence[Rollout]]) -> dict[str, Any]:
    import numpy as np

    each = [one for group in groups for one in group]
    taken = [one.trajectory for one in each]
    prompts = [group[0].trajectory.prompt.token_ids for group in groups]
    rows = [_row(one) for one in each]
    return {
        "prompt_ids": _whole([i for ids in prompts for i in ids]),
        "prompt_lengths": _whole([len(ids) for ids in prompts]),
        "group": _whole([number for number, group in enumerate(groups) for _ in group]),
        "token_ids": _whole([i for one in taken for i in one.token_ids]),
        "mask": _whole([m for one in taken for m in one.mask]),
        "logprobs": _real([value for one in taken for value in one.logprobs]),
        "lengths": _whole([len(one.token_ids) for one in taken]),
        "rewards": _real([one.grade.reward for one in each]),
        "advantages": _real([one.advantage for one in each]),
        "weights": _real([one.weight for one in each]),
        "policy_versions": _whole([one.policy_version for one in taken]),
        "seeds": _whole([one.seed for one in taken]),
        "rows": np.frombuffer(zlib.compress(json.dumps(rows, ensure_ascii=False).encode(), 6), np.uint8),
    }


def _row(one: Rollout) -> dict[str, Any]:
    """What is no number of a rollout."""
    trajectory = one.trajectory
    return {
        "id": trajectory.prompt.example.id,
        "opened": trajectory.prompt.opened,
        "text": trajectory.text,
        "finish_reason": trajectory.finish_reason,
        "turns": trajectory.turns,
        "grade": {name: value for name, value in asdict(one.grade).items() if name != "reward"},
    }


def _whole(values: Sequence[int]) -> Any:
    """Whole numbers in the narrowest type that holds them."""
    import numpy as np

    largest = max(values, default=0)
    kind = next(k for k in (np.uint8, np.uint16, np.int32, np.int64) if largest <= np.iinfo(k).max)
    return np.array(values, kind)


def _real(values: Sequence[float]) -> Any:
    """Numbers as float32 where that keeps every bit, else as float64."""
    import numpy as np

    wide = np.array(values, np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    return narrow if np.array_equal(narrow.astype(np.float64), wide) else wide


def _groups(columns: dict[str, list[Any]], rows: list[Any], examples: Mapping[str, Example]) -> list[list[Rollout]]:
    groups: list[list[Rollout]] = []
    prompts = _cut(columns["prompt_ids"], columns["prompt_lengths"])
    lengths = columns["lengths"]
    ids, masks, logprobs = (_cut(columns[name], lengths) for name in ("token_ids", "mask", "logprobs"))
    for r, row in enumerate(rows):
        number = columns["group"][r]
        if number == len(groups):
            groups.append([])
        prompt = Prompt(examples.get(row["id"], Example(row["id"], "")), prompts[number], row["opened"])
        version, seed = columns["policy_versions"][r], columns["seeds"][r]
        said = (row["finish_reason"], version, seed, row["text"], row["turns"])
        trajectory = Trajectory(prompt, ids[r], masks[r], logprobs[r], *said)
        grade = Grade(reward=columns["rewards"][r], **row["grade"])
        groups[number].append(Rollout(trajectory, grade, columns["advantages"][r], columns["weights"][r]))
    return groups


def _cut(values: Sequence[Any], lengths: Sequence[int]) -> list[tuple[Any, ...]]:
    """A column in pieces of these lengths."""
    found, start = [], 0
    for length in lengths:
        found.append(tuple(values[start : start + length]))
        start += length
    return found
