"""ssh into a pod: start a job that ssh does not own, look at it, fetch what it made.

The connection is direct TCP, with a key made for this run alone and the host key pinned. It may drop at any time: the
job was started detached, writes a log and, at its end, a status file; every call here asks for what is on disk, and can
be asked again on another connection.

Secrets go through the connection into a file that only its owner reads. No command line ever holds one.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import asyncssh

from grpo_gsm8k.errors import ConfigError, LaunchError
from grpo_gsm8k.launch.watchdog import JOB

PIECE = 1 << 20  # bytes of log of one look
ANSWER_S = 60.0  # longest that one command may take

# What runs in the pod. `trap` keeps the script alive through a SIGTERM that is meant for the job, so that the job's
# checkpoint and exit status are not lost. ssh sessions do not inherit the container's environment: hence the files.
RUN = """\
trap : TERM INT
cd "$HOME/{job}/work" || exit 1
echo $$ > ../pid
set -a
[ -r /etc/environment ] && . /etc/environment
. ../env
set +a
{command}
echo $? > ../status.new && mv ../status.new ../status
"""
# `mkdir` is the guard: a start whose answer was lost may be sent again, and starts nothing twice.
START = """\
umask 077
mkdir -p {job}/work && cd {job} || exit 1
cat > env <<'END_OF_ENV'
{env}
END_OF_ENV
cat > run.sh <<'END_OF_RUN'
{run}
END_OF_RUN
mkdir started 2>/dev/null || exit 0
setsid sh run.sh < /dev/null > log 2>&1 &
"""
# `status` is looked at twice: the job may end just before it is asked for, and writes it before it is gone.
LOOK = """\
cd {job} 2>/dev/null || {{ echo lost; exit; }}
if [ ! -e started ]; then echo lost
elif [ -e status ]; then cat status
elif [ ! -s pid ] || kill -s 0 -- "-$(cat pid)" 2>/dev/null; then echo running
elif [ -e status ]; then cat status
else echo lost
fi
newest=$(find work -name metrics.jsonl -printf '%T@ %p\\n' | sort -n | tail -n 1 | cut -d ' ' -f 2-)
if [ -n "$newest" ]; then tail -n 1 "$newest"; else echo; fi
tail -c +{start} log | head -c {piece}
"""
STOP = "kill -s {signal} -- -$(cat {job}/pid)"


class ShellError(LaunchError):
    """ssh could not be reached, or dropped; another connection may do."""


@dataclass(frozen=True)
class Look:
    """How the job is: its exit code, or None while it runs; whether it vanished; its last metrics; more of its log."""

    exit_code: int | None
    lost: bool
    metrics: dict[str, Any]
    log: bytes


def make_key(path: Path, run: str) -> str:
    """A fresh ed25519 key, private half in `path` (0600); returns the public half."""
    key = asyncssh.generate_private_key("ssh-ed25519", comment=run)
    path.touch(mode=0o600)
    path.write_bytes(key.export_private_key())
    return public_half(path)


def public_half(path: Path) -> str:
    """The line for authorized_keys."""
    return asyncssh.read_private_key(path).export_public_key().decode().strip()


def check_fetch(fetch: str) -> str:
    """A path below the job's folder. Raises `ConfigError`."""
    path = PurePosixPath(fetch)
    if path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"--fetch {fetch}: must be a path below the job's folder")
    return fetch


def start_script(command: Sequence[str], env: Mapping[str, str]) -> str:
    """The shell script that starts a job. It travels over stdin."""
    lines = "\n".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
    return START.format(job=JOB, env=lines, run=RUN.format(job=JOB, command=shlex.join(command)))


class Shell:
    """One connection. Every method raises `ShellError` when it drops."""

    def __init__(self, connection: asyncssh.SSHClientConnection) -> None:
        self._connection = connection

    @property
    def host_key(self) -> str:
        """The key that the host has shown."""
        key = self._connection.get_server_host_key()
        return " ".join(key.export_public_key().decode().split()[:2]) if key else ""

    async def start(self, script: str) -> None:
        """Start the job, once."""
        await self._run("sh -s", script)

    async def look(self, offset: int) -> Look:
        """How the job is, and its log from byte `offset` on."""
        said = await self._run("sh -s", LOOK.format(job=JOB, start=offset + 1, piece=PIECE))
        state, _, rest = said.partition(b"\n")
        metrics, _, log = rest.partition(b"\n")
        code = int(state) if state.strip().isdigit() else None
        return Look(code, state == b"lost", _object(metrics), log)

    async def stop(self, signal: str) -> None:
        """Send a signal to the job and its children; TERM lets it write a checkpoint."""
        await self._run("sh -s", STOP.format(signal=signal, job=JOB), check=False)

    async def fetch(self, path: str, into: Path) -> None:
        """Copy a file or folder of the job into `into`; what is not there is left out."""
        into.mkdir(parents=True, exist_ok=True, mode=0o700)
        archive = into / ".fetching.tar"
        name = shlex.quote(path)
        command = f"cd {JOB}/work && if [ -e {name} ]; then tar -cf - -- {name}; else tar -cf - -T /dev/null; fi"
        try:
            with archive.open("wb") as handle:
                done = await self._connection.run(
                    command, stdin=asyncssh.DEVNULL, stdout=handle, encoding=None, check=False
                )
            if done.exit_status != 0:
                raise ShellError(f"tar ended with {done.exit_status}")
            await asyncio.to_thread(_unpack, archive, into)
        except (asyncssh.Error, OSError, tarfile.TarError) as fault:
            raise ShellError(f"the results did not arrive: {fault}") from None
        finally:
            archive.unlink(missing_ok=True)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    async def _run(self, command: str, script: str, check: bool = True) -> bytes:
        try:
            done = await self._connection.run(
                command, input=script.encode(), encoding=None, check=False, timeout=ANSWER_S
            )
        except (asyncssh.Error, OSError, TimeoutError) as fault:
            raise ShellError(f"ssh dropped: {type(fault).__name__}") from None
        if check and done.exit_status != 0:
            raise ShellError(f"a command ended with {done.exit_status}")
        return done.stdout if isinstance(done.stdout, bytes) else b""


async def dial(address: tuple[str, int, str], key: Path, host_key: str, patience_s: float) -> Shell:
    """Connect; `host_key` is the only one that is accepted, and "" accepts any. Raises `ShellError`."""
    host, port, user = address
    trusted: Any = ([asyncssh.import_public_key(host_key)], [], []) if host_key else None
    try:
        connection = await asyncssh.connect(
            host,
            port,
            username=user,
            client_keys=[str(key)],
            known_hosts=trusted,
            server_host_key_algs=["ssh-ed25519"],
            config=None,
            agent_path=None,
            connect_timeout=min(patience_s, 30.0),
            keepalive_interval=15,
        )
    except (asyncssh.Error, OSError, TimeoutError) as fault:
        raise ShellError(f"ssh to {host}:{port}: {fault or type(fault).__name__}") from None
    return Shell(connection)


def _unpack(archive: Path, into: Path) -> None:
    """Extract: nothing outside the folder, no devices, no odd permissions."""
    with tarfile.open(archive) as opened:
        if hasattr(tarfile, "data_filter"):
            opened.extractall(into, filter="data")
            return
        for member in opened:  # Python 3.11 before 3.11.4, as Debian 12 has it: files and folders, and no links
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                continue
            member.mode, member.uid, member.gid = member.mode & 0o755 | 0o600, os.getuid(), os.getgid()
            opened.extract(member, into)


def _object(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
