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
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import asyncssh

from grpo_gsm8k.errors import ConfigError, DiskError, LaunchError
from grpo_gsm8k.launch.archive import BLOCK, ArchiveError, Limits, Unpacked, normal, path_fault, unpack
from grpo_gsm8k.launch.watchdog import FETCHING, JOB

PIECE = 1 << 20  # bytes of log of one look
ANSWER_S = 60.0  # longest that one command may be silent
CHUNK = 1 << 16
MOST_LIST = 64 << 20  # bytes of a list of files
OTHERS = {"l": "a link", "p": "a FIFO", "s": "a socket", "b": "a device", "c": "a device"}

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
if [ -n "$newest" ]; then tail -n 1 "$newest" | head -c {piece}; else echo; fi
tail -c +{start} log | head -c {piece}
"""
# One entry: type, size, path, ended by a zero byte, which no path has. The last one is the exit code of find.
LIST = """\
cd {job}/work 2>/dev/null || exit 1
touch ../{fetching}
{{
    code=0
    if [ -e {path} ] || [ -L {path} ]; then find -H {path} -printf '%y\\t%s\\t%p\\0' || code=$?; fi
    printf 'end\\t%s\\t\\0' "$code"
}} | head -c {most}
"""
# tar ends with 1 or 2 where a file has changed or vanished since it was listed: the rest has been sent all the same.
# The loop tells the watchdog that somebody has come for the results, as long as this shell lives.
SEND = """\
cd {job}/work || exit 1
while kill -s 0 $$ 2>/dev/null; do touch ../{fetching}; sleep 20; done </dev/null >/dev/null 2>&1 &
printf '%s\\0' {names} | tar --format=gnu --hard-dereference --no-recursion --null -T - -cf -
kill "$!"
"""
STOP = "kill -s {signal} -- -$(cat {job}/pid)"


class ShellError(LaunchError):
    """ssh could not be reached, or dropped; another connection may do."""


@dataclass(frozen=True)
class Listing:
    """What is to come home: the size of each regular file, and what the other entries are. Paths are normal.

    `whole` is False where find met something that it could not list.
    """

    files: dict[str, int]
    others: dict[str, str]
    whole: bool

    @classmethod
    def of(cls, raw: bytes) -> Listing:
        """As `LIST` prints it; an entry that cannot be read makes it not whole."""
        files, others, whole = dict[str, int](), dict[str, str](), raw.endswith(b"\0end\t0\t\0") or raw == b"end\t0\t\0"
        for entry in raw.split(b"\0"):
            kind, _, rest = entry.decode("utf-8", "surrogateescape").partition("\t")
            size, _, path = rest.partition("\t")
            name = normal(path)
            if kind == "f" and size.isascii() and size.isdigit() and len(size) < 19:
                files[name] = int(size)
            elif path and kind != "d":
                others[name] = OTHERS.get(kind, "not a file")
        return cls(files, others, whole)


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


def own_keys() -> str:
    """Public keys of the user's own, a line each, that may log in to the pod beside the key of the run.

    `SSH_PUBLIC_KEY` (or `RUNPOD_SSH_PUBLIC_KEY`) and the public half of the key in the file `SSH_PRIVATE_KEY_PATH`.

    Raises:
        ConfigError: one of them is no key.
    """
    found = []
    for name in ("SSH_PUBLIC_KEY", "RUNPOD_SSH_PUBLIC_KEY"):
        if line := os.environ.get(name, "").strip():
            try:
                asyncssh.import_public_key(line)
            except asyncssh.KeyImportError:
                raise ConfigError(f"{name}: is no public key, as in ssh-ed25519 AAAA… you@host") from None
            found.append(line)
    if path := os.environ.get("SSH_PRIVATE_KEY_PATH", "").strip():
        private = Path(path).expanduser()
        public = private.with_name(private.name + ".pub")
        try:
            found.append(public.read_text(encoding="utf-8").strip() if public.is_file() else public_half(private))
        except (OSError, ValueError):  # asyncssh's own are ValueErrors
            raise ConfigError(
                "SSH_PRIVATE_KEY_PATH: names no key that can be read; one with a passphrase needs its .pub beside it"
            ) from None
    return "\n".join(dict.fromkeys(found))


def check_fetch(fetch: str) -> str:
    """A path below the job's folder. Raises `ConfigError`."""
    path = PurePosixPath(fetch)
    if path.is_absolute() or ".." in path.parts or "\0" in fetch or path_fault(fetch or "."):
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
        await self._run(script)

    async def look(self, offset: int) -> Look:
        """How the job is, and its log from byte `offset` on."""
        said = await self._run(LOOK.format(job=JOB, start=offset + 1, piece=PIECE))
        state, _, rest = said.partition(b"\n")
        metrics, _, log = rest.partition(b"\n")
        code = int(state) if state.strip().isdigit() else None
        return Look(code, state == b"lost", _object(metrics), log)

    async def stop(self, signal: str) -> None:
        """Send a signal to the job and its children; TERM lets it write a checkpoint."""
        await self._run(STOP.format(signal=signal, job=JOB), check=False)

    async def listing(self, path: str) -> Listing:
        """What is below a path of the job's folder. The path itself may be a link; none below it is followed."""
        script = LIST.format(job=JOB, fetching=FETCHING, path=shlex.quote(f"./{path}"), most=MOST_LIST + 1)
        said = await self._run(script, most=MOST_LIST + 1)
        if len(said) > MOST_LIST:
            raise LaunchError(f"--fetch {path}: the list of its files is longer than {MOST_LIST >> 20} MiB")
        return Listing.of(said)

    async def fetch(self, files: Mapping[str, int], into: Path, limits: Limits) -> Unpacked:
        """Copy regular files of the job, given with their sizes, into a folder. What has come whole stays.

        Raises:
            ShellError: the connection dropped, or the archive is none.
            DiskError: this machine has no room for it, or cannot write it.
        """
        most = sum(-(-size // BLOCK) * BLOCK + 4 * BLOCK + 2 * len(name.encode("utf-8", "surrogateescape"))
                   for name, size in files.items()) + 64 * BLOCK  # fmt: skip
        with local_disk(into):
            into.mkdir(parents=True, exist_ok=True, mode=0o700)
            if (free := shutil.disk_usage(into).free) < 2 * most:
                raise DiskError(f"{into}: the next files need {2 * most / 1e6:.1f} MB, and {free / 1e6:.1f} are free")
            archive = tempfile.TemporaryFile(dir=into)  # noqa: SIM115  (closed below; it has no name)
        with archive:
            names = " ".join(shlex.quote(f"./{name}") for name in files)
            await self._run(SEND.format(job=JOB, fetching=FETCHING, names=names), most=most, sink=archive, check=False)
            with local_disk(into):
                archive.flush()
            archive.seek(0)
            try:
                return await asyncio.to_thread(unpack, archive, into, limits, frozenset(files))
            except ArchiveError as fault:
                raise ShellError(f"the results did not arrive whole: {fault}") from None

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    async def _run(
        self, script: str, most: int = 2 * PIECE, check: bool = True, sink: IO[bytes] | None = None
    ) -> bytes:
        """Run a shell script; its output, of which no more than `most` bytes are taken.

        Args:
            check: raise `ShellError` where it ends with another exit code than 0.
            sink: takes the output instead.
        """
        said, taken, status = bytearray(), 0, None
        try:
            async with asyncio.timeout(ANSWER_S) as patience:
                process = await self._connection.create_process("sh -s", encoding=None, stderr=asyncssh.DEVNULL)
                process.stdin.write(script.encode("utf-8", "surrogateescape"))
                process.stdin.write_eof()
                while piece := await process.stdout.read(CHUNK):
                    taken += len(piece)
                    if taken > most:
                        process.close()
                        raise ShellError(f"a command sent more than the {most} bytes that it may")
                    if sink:
                        with local_disk(Path("the results")):
                            sink.write(piece)
                    else:
                        said += piece
                    patience.reschedule(asyncio.get_running_loop().time() + ANSWER_S)
                status = (await process.wait()).exit_status
        except (asyncssh.Error, OSError, TimeoutError) as fault:
            raise ShellError(f"ssh dropped: {type(fault).__name__}") from None
        if status is None or status < 0:
            raise ShellError("ssh dropped in the middle of an answer")
        if check and status != 0:
            raise ShellError(f"a command ended with {status}")
        return bytes(said)


@contextmanager
def local_disk(path: Path) -> Iterator[None]:
    """Every `OSError` in here is this machine's disk: a `DiskError`, which is no `OSError`."""
    try:
        yield
    except OSError as fault:
        raise DiskError(f"{path}: cannot be written on this machine: {fault.strerror or fault}") from None


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


def _object(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
