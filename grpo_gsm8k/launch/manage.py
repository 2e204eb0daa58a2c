"""Runs that are under way, from this machine or another: status, logs, attach, down, reap."""

from __future__ import annotations

import asyncio
import io
import sys
import time
from collections.abc import Awaitable, Callable, Container
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from grpo_gsm8k import config
from grpo_gsm8k.errors import ConfigError, LaunchError
from grpo_gsm8k.launch import records
from grpo_gsm8k.launch.api import Runpod, connect
from grpo_gsm8k.launch.records import Blot, Record
from grpo_gsm8k.launch.settings import UpConfig
from grpo_gsm8k.launch.shell import PIECE, ShellError, dial
from grpo_gsm8k.launch.up import KEY, bury, launch
from grpo_gsm8k.runs.clean import printable
from grpo_gsm8k.runs.progress import say

T = TypeVar("T")
MOST_LINE = 16 * PIECE  # bytes that are kept of a line without an end


def status(state_dir: Path) -> dict[str, Any]:
    """Every pod of the project that the key sees, and every run on record here that has not ended."""
    known = {record.run: record for record in records.load_all(state_dir)}
    rows = []
    for pod in _with_api(_ours):
        record = known.pop(pod.run, None)
        rows.append(
            {
                "run": pod.run,
                "pod": pod.id,
                "status": pod.status,
                "stage": record.stage if record else "unknown here",
                "rate": pod.rate,
                "cost": round(record.cost(), 4) if record else None,
                "deadline": _stamp(pod.deadline),
                "launcher": records.is_held(state_dir / pod.run),
            }
        )
    for record in known.values():
        if record.stage != "end":
            row: dict[str, Any] = {"run": record.run, "pod": "", "status": "none", "stage": record.stage, "rate": 0.0}
            row |= {"cost": round(record.cost(), 4), "deadline": _stamp(record.deadline)}
            rows.append(row | {"launcher": records.is_held(record.folder)})
    return {"pods": rows}


def logs(state_dir: Path, run: str) -> None:
    """The job's log on stdout: from the pod while there is one, else as far as it was seen."""
    record = records.find(state_dir, run)
    blot = Blot(records.secrets_of(str(record.settings.get("pass_env", ""))))
    key = record.folder / KEY

    async def read(api: Runpod) -> None:
        pod = await api.pod(record.lease().pod_id)
        if not pod or not pod.ssh:
            raise ShellError("no address")
        shell = await dial(pod.ssh, key, record.host_key, 30.0)
        seen, line = 0, b""
        while piece := (await shell.look(seen)).log:
            seen += len(piece)
            whole, newline, line = (line + piece).rpartition(b"\n")
            print(printable(blot((whole + newline).decode("utf-8", "replace"))), end="")
            if len(piece) < PIECE:
                break
            if len(line) > MOST_LINE:
                line = line[-MOST_LINE:]
        print(printable(blot(line.decode("utf-8", "replace"))), end="")
        shell.close()

    if record.stage in ("run", "fetch") and key.exists() and record.host_key:
        try:
            _with_api(read)
            return
        except ShellError as fault:
            say(f"{fault}; this is what was seen before")
    log = record.folder / "log"
    with log.open(encoding="utf-8", errors="replace") if log.exists() else io.StringIO() as lines:
        for line in lines:
            sys.stdout.write(printable(line))


def attach(state_dir: Path, run: str) -> dict[str, Any]:
    """Go on as the launcher of a run whose own is gone."""
    record = records.find(state_dir, run)
    if record.stage == "end":
        raise ConfigError(f"{record.run} has ended; it cost about ${record.cost():.4f}")
    return launch(record, _settings(record))


def down(state_dir: Path, run: str, *, dry_run: bool = False) -> dict[str, Any]:
    """Delete a run's pods, whatever they are doing; with `dry_run` list them."""
    known = [record for record in records.load_all(state_dir) if record.run.startswith(run)]
    if len(known) > 1:
        raise ConfigError(f"{len(known)} runs on record begin with {run!r}: write more of the name")
    wanted = known[0].run if known else run
    if records.RUN.fullmatch(wanted) and records.is_held(state_dir / wanted):
        raise ConfigError(f"{wanted}: its launcher is at work on this machine; end it there with Ctrl-C")
    done = _delete(lambda doomed: "asked for" if doomed.run == wanted else "", known, dry_run=dry_run)
    if not known and not done["deleted"] and not done.get("would_delete"):
        raise ConfigError(f"no run on record and no pod is called {run}; `grpo-gsm8k launch status` lists them")
    return done


def reap(state_dir: Path, everything: bool, *, yes: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Delete what has outlived its deadline, here or anywhere, and what a dead launcher left before its job began.

    Args:
        everything: also pods within their deadline, unless a launcher on this machine is at work on them.
        yes: do not ask about those of them that no record here knows, which may be a colleague's.
        dry_run: list them, and delete nothing.

    Raises:
        ConfigError: some may be a colleague's, and nobody can be asked.
    """
    known = records.load_all(state_dir)
    by_run = {record.run: record for record in known}

    def why(pod: Found) -> str:
        record = by_run.get(pod.run)
        if time.time() >= pod.deadline:
            return "its deadline has passed"
        if records.is_held(state_dir / pod.run):
            return ""
        if record and record.stage in ("create", "boot", "end"):
            return "its launcher is gone"
        return "--all" if everything else ""

    def agreed(doomed: list[Found]) -> bool:
        others = [pod for pod in doomed if pod.run not in by_run and time.time() < pod.deadline]
        return not others or yes or _ask(others)

    open_here = [record for record in known if record.stage != "end" and not records.is_held(record.folder)]
    return _delete(why, open_here, agreed, dry_run=dry_run, here=set(by_run))


def _ask(pods: list[Found]) -> bool:
    """Whether pods that no record here knows may be deleted. Raises `ConfigError` where nobody can be asked."""
    shown = "; ".join(f"{pod.id} of {pod.run}, until {_stamp(pod.deadline)}" for pod in pods)
    what = f"{len(pods)} pods within their deadline are not on record here and may be a colleague's: {shown}"
    if not sys.stdin.isatty() or not sys.stderr.isatty():
        raise ConfigError(f"{what}. Nothing was deleted: add --yes to delete them, --dry_run to see everything")
    say(what)
    print("delete them as well? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _delete(
    why: Callable[[Found], str],
    known: list[Record],
    agreed: Callable[[list[Found]], bool] = lambda doomed: True,
    *,
    dry_run: bool = False,
    here: Container[str] = (),
) -> dict[str, Any]:
    """Delete the pods for which `why` has a reason, and close the records of runs that have none left.

    Args:
        agreed: is shown what will be deleted first; False keeps all of it.
        here: runs on record on this machine.
    """
    found = _with_api(_ours)
    doomed = {pod.id: pod for pod in found if why(pod)}
    rows = [
        {
            "run": pod.run,
            "pod": pod.id,
            "why": why(pod),
            "rate": pod.rate,
            "deadline": _stamp(pod.deadline),
            "record": "here" if pod.run in here or pod.run in {record.run for record in known} else "elsewhere",
        }
        for pod in doomed.values()
    ]
    if dry_run:
        return {"deleted": [], "would_delete": rows}
    if not agreed(list(doomed.values())):
        say("nothing was deleted")
        return {"deleted": []}

    async def work(api: Runpod) -> set[str] | None:
        return await bury(
            api, lambda pod: pod.id in doomed, set(doomed), looks=1, patience_s=120.0, poll_s=2.0, say=say
        )

    left = _with_api(work) if doomed else set()
    rows = [row for row in rows if row["pod"] not in (left or set())]
    gone = {row["pod"] for row in rows}
    alive = {pod.run for pod in found if pod.id not in gone}
    for record in known:
        if record.run not in alive and record.stage != "end":
            for lease in record.leases:
                lease.ended = lease.ended or time.time()
            record.enter("end")
            (record.folder / KEY).unlink(missing_ok=True)
            say(f"{record.run}: ended; it cost about ${record.cost():.4f} (price x time)")
    for row in rows:
        whose = f"{row['run']} (on record {row['record']})"
        say(f"deleted {row['pod']} of {whose}, ${row['rate']:.2f} an hour: {row['why']}")
    if left:
        raise LaunchError(f"could not be deleted, and go on costing money: {', '.join(sorted(left))}")
    return {"deleted": rows}


@dataclass(frozen=True)
class Found:
    """A pod of the project, with what its name says."""

    id: str
    status: str
    rate: float
    run: str
    deadline: float


async def _ours(api: Runpod) -> list[Found]:
    named = [(pod, records.read_name(pod.name)) for pod in await api.pods()]
    return [Found(pod.id, pod.status, pod.rate, *name) for pod, name in named if name]


def _with_api(work: Callable[[Runpod], Awaitable[T]]) -> T:
    async def go() -> T:
        async with connect(Blot(records.secrets_of(""))) as api:
            return await work(api)

    return asyncio.run(go())


def _settings(record: Record) -> UpConfig:
    return config.build(UpConfig, record.settings)


def _stamp(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
