"""Runs that are under way, from this machine or another: status, logs, attach, down, reap."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from grpo_gsm8k import config
from grpo_gsm8k.errors import ConfigError, LaunchError
from grpo_gsm8k.launch import records
from grpo_gsm8k.launch.api import Pod, Runpod, connect
from grpo_gsm8k.launch.records import Blot, Record
from grpo_gsm8k.launch.settings import UpConfig
from grpo_gsm8k.launch.shell import PIECE, ShellError, dial
from grpo_gsm8k.launch.up import KEY, bury, launch
from grpo_gsm8k.runs.progress import talk

T = TypeVar("T")


def status(state_dir: Path) -> dict[str, Any]:
    """Every pod of the project that the key sees, and every run on record here that has not ended."""
    known = {record.run: record for record in records.load_all(state_dir)}
    rows = []
    for pod, run, deadline in _with_api(_ours):
        record = known.pop(run, None)
        rows.append(
            {
                "run": run,
                "pod": pod.id,
                "status": pod.status,
                "stage": record.stage if record else "unknown here",
                "rate": pod.rate,
                "cost": round(record.cost(), 4) if record else None,
                "deadline": _stamp(deadline),
                "launcher": bool(record and records.is_held(record.folder)),
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
    blot = Blot(records.secrets_of(_settings(record).pass_env))
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
            print(blot((whole + newline).decode("utf-8", "replace")), end="")
            if len(piece) < PIECE:
                break
        print(blot(line.decode("utf-8", "replace")), end="")
        shell.close()

    if record.stage in ("run", "fetch") and key.exists() and record.host_key:
        try:
            _with_api(read)
            return
        except ShellError as fault:
            talk(f"{fault}; this is what was seen before")
    log = record.folder / "log"
    sys.stdout.write(log.read_text(encoding="utf-8") if log.exists() else "")


def attach(state_dir: Path, run: str) -> dict[str, Any]:
    """Go on as the launcher of a run whose own is gone."""
    record = records.find(state_dir, run)
    if record.stage == "end":
        raise ConfigError(f"{record.run} has ended; it cost about ${record.cost():.4f}")
    return launch(record, _settings(record))


def down(state_dir: Path, run: str) -> dict[str, Any]:
    """Delete a run's pods, whatever they are doing."""
    known = [record for record in records.load_all(state_dir) if record.run.startswith(run)]
    if len(known) > 1:
        raise ConfigError(f"{len(known)} runs on record begin with {run!r}: write more of the name")
    if known and records.is_held(known[0].folder):
        raise ConfigError(f"{known[0].run}: its launcher is at work on this machine; end it there with Ctrl-C")
    wanted = known[0].run if known else run
    done = _delete(lambda pod, name, deadline: "asked for" if name == wanted else "", known)
    if not known and not done["deleted"]:
        raise ConfigError(f"no run on record and no pod is called {run}; `grpo-gsm8k launch status` lists them")
    return done


def reap(state_dir: Path, everything: bool) -> dict[str, Any]:
    """Delete what has outlived its deadline, here or anywhere, and what a dead launcher left before its job began.

    Args:
        everything: also pods within their deadline, unless a launcher on this machine is at work on them.
    """
    known = records.load_all(state_dir)
    by_run = {record.run: record for record in known}

    def why(pod: Pod, run: str, deadline: float) -> str:
        record = by_run.get(run)
        if time.time() >= deadline:
            return "its deadline has passed"
        if record and records.is_held(record.folder):
            return ""
        if record and record.stage in ("create", "boot", "end"):
            return "its launcher is gone"
        return "--all" if everything else ""

    return _delete(why, [record for record in known if record.stage != "end" and not records.is_held(record.folder)])


def _delete(why: Callable[[Pod, str, float], str], known: list[Record]) -> dict[str, Any]:
    """Delete the pods for which `why` has a reason, and close the records of runs that have none left."""

    async def work(api: Runpod) -> tuple[list[dict[str, Any]], set[str] | None, set[str]]:
        found = [(pod, run, why(pod, run, deadline)) for pod, run, deadline in await _ours(api)]
        doomed = {pod.id: (pod, run, reason) for pod, run, reason in found if reason}
        left = await bury(
            api, lambda pod: pod.id in doomed, set(doomed), looks=1, patience_s=120.0, poll_s=2.0, say=talk
        )
        rows = [
            {"run": run, "pod": pod.id, "why": reason, "rate": pod.rate}
            for pod, run, reason in doomed.values()
            if pod.id not in (left or set())
        ]
        return rows, left, {run for pod, run, _ in found if pod.id not in {row["pod"] for row in rows}}

    rows, left, alive = _with_api(work)
    for record in known:
        if record.run not in alive and record.stage != "end":
            for lease in record.leases:
                lease.ended = lease.ended or time.time()
            record.enter("end")
            (record.folder / KEY).unlink(missing_ok=True)
            talk(f"{record.run}: ended; it cost about ${record.cost():.4f} (price x time)")
    for row in rows:
        talk(f"deleted {row['pod']} of {row['run']}, ${row['rate']:.2f} an hour: {row['why']}")
    if left:
        raise LaunchError(f"could not be deleted, and go on costing money: {', '.join(sorted(left))}")
    return {"deleted": rows}


async def _ours(api: Runpod) -> list[tuple[Pod, str, float]]:
    """The project's pods with their run and deadline, read off their names."""
    named = [(pod, records.read_name(pod.name)) for pod in await api.pods()]
    return [(pod, *name) for pod, name in named if name]


def _with_api(work: Callable[[Runpod], Awaitable[T]]) -> T:
    async def go() -> T:
        async with connect(Blot(records.secrets_of(""))) as api:
            return await work(api)

    return asyncio.run(go())


def _settings(record: Record) -> UpConfig:
    return config.build(UpConfig, record.settings)


def _stamp(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
