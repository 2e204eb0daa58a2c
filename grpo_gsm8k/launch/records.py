"""Names, and what this machine knows of a run: written and synced before the pod is made, and after every change.

`artifacts/launch/<run>/` holds `state.json`, `log` (the job's, as far as it was seen), `results/`, and, while there is
a pod, `id_ed25519`: the key of this run alone. Only its owner may enter it, and no other secret is in it.

A pod is called `grpo-gsm8k-<run>-<deadline>`, as in `grpo-gsm8k-demo-3f2a1c-20261121T103000Z`: whoever has the API
key can tell without this record when it must be gone.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpo_gsm8k.errors import ConfigError, DataError, DiskError
from grpo_gsm8k.runs.files import atomic_path, disk_errors, read_json
from grpo_gsm8k.runs.progress import say

PROJECT = "grpo-gsm8k"
STAMP = "%Y%m%dT%H%M%SZ"
NAME = re.compile(rf"{PROJECT}-(?P<run>[a-z0-9]+-[0-9a-f]{{6}})-(?P<deadline>\d{{8}}T\d{{6}}Z)")
RUN = re.compile(r"[a-z0-9]+-[0-9a-f]{6}")
STAGES = ("create", "boot", "run", "fetch", "end")
LAST_TIME = 253402300800.0  # the year 10000, which no time stamp can show
MOST_BYTES = 1 << 24  # of a record
SECRET_LENGTH = 8


def new_run(name: str) -> str:
    """A name that no other run has."""
    return f"{name}-{secrets.token_hex(3)}"


def pod_name(run: str, deadline: float) -> str:
    """The name of a run's pod; `deadline` is in seconds since 1970."""
    return f"{PROJECT}-{run}-{datetime.fromtimestamp(deadline, UTC):{STAMP}}"


def read_name(name: str) -> tuple[str, float] | None:
    """(run, deadline) of one of our pods; None for anybody else's."""
    match = NAME.fullmatch(name)
    if not match:
        return None
    try:
        deadline = datetime.strptime(match["deadline"], STAMP).replace(tzinfo=UTC)
    except ValueError:
        return None
    return match["run"], deadline.timestamp()


@dataclass
class Lease:
    """One pod and what it costs: dollars an hour, from when it was asked for until it was seen to be gone."""

    pod_id: str
    gpu: str
    rate: float
    began: float
    ended: float = 0.0

    def cost(self, now: float) -> float:
        """Dollars so far."""
        return self.rate * max(0.0, (self.ended or now) - self.began) / 3600


@dataclass
class Record:
    """A run. `stage` is one of create, boot, run, fetch, end; `deadline` in seconds since 1970."""

    run: str
    command: list[str]
    budget: float
    deadline: float
    settings: dict[str, Any]
    stage: str = "create"
    host_key: str = ""
    began: float = field(default_factory=time.time)
    leases: list[Lease] = field(default_factory=list)
    exit_code: int | None = None
    folder: Path = Path()

    def save(self) -> None:
        """Write it whole or not at all, for its owner's eyes."""
        stored = dataclasses.asdict(self)
        del stored["folder"]
        with atomic_path(self.folder / "state.json") as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text(json.dumps(stored, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def enter(self, stage: str) -> None:
        """Note the stage."""
        self.stage = stage
        self.save()

    def cost(self) -> float:
        """Dollars so far, over all pods: price times time, not the provider's bill."""
        now = time.time()
        return sum(lease.cost(now) for lease in self.leases)

    def lease(self) -> Lease:
        """The pod that is there now."""
        return self.leases[-1]

    @property
    def prefix(self) -> str:
        """What the names of all pods of this run begin with."""
        return f"{PROJECT}-{self.run}-"


def begin(record: Record, root: Path) -> Record:
    """Make the run's folder and write the record."""
    record.folder = root / record.run
    with disk_errors(record.folder):
        record.folder.mkdir(parents=True, mode=0o700)
    record.save()
    return record


def load(folder: Path) -> Record:
    """Read a record back. Raises `DataError`."""
    path = folder / "state.json"
    try:
        found = path.lstat()
    except OSError as fault:
        raise DataError(path, f"cannot be read: {fault.strerror}") from None
    if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
        raise DataError(path, "is no record of a run")
    stored = read_json(path)
    try:
        leases = [Lease(**lease) for lease in stored.pop("leases")]
        record = Record(**stored, leases=leases, folder=folder)
    except (KeyError, TypeError, AttributeError):
        raise DataError(path, "is no record of a run; was it written by another version?") from None
    if not _is_sound(record):
        raise DataError(path, "is no record of a run: a field has a value that it cannot have")
    return record


def _is_sound(record: Record) -> bool:
    """Whether every field has the type and the range that the rest relies upon."""
    texts = [record.run, record.host_key, *(text for lease in record.leases for text in (lease.pod_id, lease.gpu))]
    times = [record.began, record.deadline, *(t for lease in record.leases for t in (lease.began, lease.ended))]
    dollars = [record.budget, *(lease.rate for lease in record.leases)]
    return (
        all(isinstance(text, str) for text in texts)
        and RUN.fullmatch(record.run) is not None
        and record.stage in STAGES
        and isinstance(record.settings, dict)
        and isinstance(record.command, list)
        and all(isinstance(word, str) for word in record.command)
        and all(_is_number(value) and 0 <= value < LAST_TIME for value in times)
        and all(_is_number(value) for value in dollars)
        and (record.exit_code is None or type(record.exit_code) is int)
        and bool(record.leases or record.stage in ("create", "end"))
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def load_all(root: Path) -> list[Record]:
    """Every record on this machine, oldest first. One that cannot be read is named and skipped: others cost money."""
    found = []
    for path in sorted(root.glob("*/state.json")):
        try:
            found.append(load(path.parent))
        except DataError as fault:
            say(f"{fault}; skipped, its pods are known by their names alone")
    return sorted(found, key=lambda record: record.began)


def find(root: Path, run: str) -> Record:
    """The record of a run, by its name or the beginning of it. Raises `ConfigError`."""
    found = [record for record in load_all(root) if record.run.startswith(run)]
    if len(found) != 1:
        what = "no run" if not found else f"{len(found)} runs"
        raise ConfigError(f"{what} on record in {root} begin with {run!r}; `grpo-gsm8k launch status` lists them")
    return found[0]


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Be the one launcher of a run; a lock that dies with its holder. Raises `ConfigError` if there is another."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with disk_errors(folder), os.fdopen(os.open(folder / ".lock", flags, 0o600), "r+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder.name}: another launcher on this machine is at work on it") from None
        yield


def is_held(folder: Path) -> bool:
    """Whether a living launcher on this machine is at work on the run; also true where that cannot be told."""
    if not folder.is_dir():
        return False
    try:
        with hold(folder):
            return False
    except (ConfigError, DiskError, OSError):
        return True


class Blot:
    """Takes secrets out of whatever is said or written."""

    def __init__(self, values: Mapping[str, str]) -> None:
        # Longest first: a secret may hold another one.
        self._values = sorted({v for v in values.values() if len(v) >= SECRET_LENGTH}, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, "[secret]")
        return text


SECRETS = (
    *("RUNPOD_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "GRPO_GSM8K_WEBHOOK", "GRPO_GSM8K_WEBHOOK_SECRET"),
    *("DISCORD_WEBHOOK_URL", "PROGRESS_WEBHOOK_URL", "HUGGINGFACE_HUB_TOKEN"),
)


def names_in(text: str) -> list[str]:
    """The names in a comma separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def environment(names: Iterable[str]) -> dict[str, str]:
    """Those of these variables that are set."""
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def secrets_of(pass_env: str) -> dict[str, str]:
    """The secrets of this environment by name: those known, and those that the job is to get."""
    return environment([*SECRETS, *names_in(pass_env)])
