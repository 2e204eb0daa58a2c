#!/usr/bin/env python3
"""Build the image, run it, and check what the Dockerfile and entrypoint.sh promise. No Docker daemon, no registry.

    apt-get install --no-install-recommends buildah podman runc mmdebstrap netavark openssh-client uidmap   # Debian 12
    uv run python scripts/check_image.py                     # everything, as root; about 20 minutes on two cores
    uv run python scripts/check_image.py build ssh           # these alone (--list names them)
    uv run python scripts/check_image.py --base docker.io/library/python:3.12-slim-bookworm   # where a registry is
    uv run python scripts/check_image.py --image NAME ssh    # an image that is there already

buildah builds on a stand-in for the base image, a plain Debian made by mmdebstrap, and podman runs the result. Both
keep their storage in --store, apart from what else is on the machine (CONTAINERS_STORAGE_CONF and CONTAINERS_CONF
win where they are set). Containers use the host's network, and their sshd listens on 127.0.0.1. Where SSL_CERT_FILE is
set, the stand-in trusts the certificates in it. CHECK_IMAGE_BUILD_ARGS holds more words for `buildah bud`.

A check is a function below; it returns what it measured, and fails by an assertion. One table, or with --json one
object, goes to stdout; the exit code is 1 when a check failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
NEEDED = ("buildah", "podman", "runc", "mmdebstrap", "ssh", "ssh-keygen")
INSTALL = "apt-get install -y --no-install-recommends buildah podman runc mmdebstrap netavark openssh-client uidmap"
SOURCES = (
    "Dockerfile",
    ".dockerignore",
    "entrypoint.sh",
    "docker",
    "pyproject.toml",
    "uv.lock",
    "README.md",
    "LICENSE",
)
# crun and bridged networks need more of the machine than builders in containers have.
CONTAINERS = """\
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=30000:30000"]
netns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
CANARY = "canary-5f0c1d1be3a94d2d"
NASTY = {  # what an environment variable may hold
    "QUOTES": """it's "quoted" 'twice' \\' \\" \\\\""",
    "EXPANDS": "$HOME `id` $(id) ! * ~ # ; & | <>",
    "SPACED": "  two  spaces\tand a tab ",
    "EMPTY": "",
    "UNICODE": "naïve 数学",
}
CHECKS: dict[str, Callable[[], dict[str, Any]]] = {}
numbers = itertools.count(1)
here = argparse.Namespace()  # the flags, and `scratch`, a folder for whatever the checks write


def check(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Put it on the list, under its own name."""
    CHECKS[function.__name__.replace("_", "-")] = function
    return function


# ---- tools


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def run(*command: object, code: int | None = 0, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command; `code` is what it must end with, None for anything."""
    words = [str(word) for word in command]
    done = subprocess.run(words, check=False, capture_output=True, text=True, **more)
    said = f"{shlex.join(words)[:400]} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    assert code is None or done.returncode == code, said
    return done


def podman_run(*words: object, code: int | None = 0, **more: Any) -> subprocess.CompletedProcess[str]:
    """`podman run --rm …`: options, then --, then the command."""
    at = words.index("--")
    return run("podman", "run", "--rm", *words[:at], here.image, *words[at + 1 :], code=code, **more)


def timed(function: Callable[[], Any]) -> float:
    began = time.monotonic()
    function()
    return round(time.monotonic() - began, 1)


def volume(name: str = "", owner: int = 0) -> Path:
    """A folder to mount at /workspace; an unnamed one is new."""
    folder: Path = here.scratch / (name or f"volume{next(numbers)}")
    folder.mkdir(exist_ok=True)
    os.chown(folder, owner, owner)
    return folder


def mounted(folder: Path) -> tuple[str, str]:
    return "--volume", f"{folder}:/workspace"


@contextmanager
def container(*words: object) -> Iterator[str]:
    """A container that runs behind; options, then --, then the command. It is gone afterwards."""
    at = words.index("--")
    name = f"check-image-{os.getpid()}-{next(numbers)}"
    run("podman", "run", "--detach", "--name", name, *words[:at], here.image, *words[at + 1 :])
    try:
        yield name
    finally:
        run("podman", "rm", "--force", "--time", "0", name)


def wait_for(what: str, found: Callable[[], Any], seconds: float = 120) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if answer := found():
            return answer
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds:g} s")


def logs(name: str) -> str:
    return run("podman", "logs", name).stderr


def demo(folder: Path, *flags: object, options: tuple[object, ...] = ()) -> dict[str, Any]:
    """The demo in a container; what it prints on stdout must be one JSON object."""
    out = "/workspace/runs"
    done = podman_run(*mounted(folder), *options, "--", "grpo-gsm8k", "demo", "--out_dir", out, "--json", *flags)
    return dict(json.loads(done.stdout))


SHORT = ("--stop_after", "sft", "--max_steps", 4, "--set", "toy.test=16")


# ---- the image


def stand_in() -> tuple[str, float]:
    """A plain Debian as an image; (its name, seconds that it took to make)."""
    name = "localhost/base:bookworm"
    if run("podman", "image", "exists", name, code=None).returncode == 0:
        return name, 0.0
    began, archive = time.monotonic(), here.scratch / "base.tar"
    run("mmdebstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", archive)
    work = run("buildah", "from", "scratch").stdout.strip()
    run("buildah", "add", "--quiet", work, archive, "/")
    if bundle := os.environ.get("SSL_CERT_FILE"):
        run("buildah", "copy", "--quiet", work, Path(bundle).resolve(), "/etc/ssl/certs/ca-certificates.crt")
    run("buildah", "commit", "--quiet", "--rm", work, name)
    archive.unlink()
    return name, round(time.monotonic() - began, 1)


def bud(context: Path, *more: object) -> float:
    """Build; seconds. The canary in the environment must end up nowhere."""
    words = ["--isolation", "chroot", "--layers", *shlex.split(os.environ.get("CHECK_IMAGE_BUILD_ARGS", ""))]
    temporary = here.store / "tmp"  # where buildah keeps cache mounts: with the storage, not in /var/tmp
    temporary.mkdir(exist_ok=True)
    env = {**os.environ, "HF_TOKEN": CANARY, "RUNPOD_API_KEY": CANARY, "TMPDIR": str(temporary)}
    return timed(lambda: run("buildah", "bud", *words, *more, context, env=env))


def size(image: str) -> int:
    return int(run("podman", "image", "inspect", "--format", "{{.Size}}", image).stdout)


@check
def build() -> dict[str, Any]:
    """From nothing (or what the store has), unchanged, and after a change of one source file."""
    base, base_s = (here.base, 0.0) if here.base else stand_in()
    context = here.scratch / "context"
    shutil.rmtree(context, ignore_errors=True)
    context.mkdir()
    for name in (*SOURCES, "grpo_gsm8k"):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, context / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, context / name)
    (context / ".env").write_text(f"HF_TOKEN={CANARY}\n")  # as one forgets it
    commit = run("git", "-C", REPOSITORY, "rev-parse", "HEAD", code=None).stdout.strip() or "nogit"
    words = ("--build-arg", f"BASE_IMAGE={base}", "--build-arg", f"GIT_COMMIT={commit}", "--tag", here.image)
    first, again = bud(context, *words), bud(context, *words)
    with (context / "grpo_gsm8k" / "errors.py").open("a") as handle:
        handle.write("# a change of the source\n")
    changed = bud(context, *words[:-2], "--tag", f"{here.image}-changed")
    run("podman", "rmi", "--force", f"{here.image}-changed")
    return {
        "base": base,
        "base_s": base_s,
        "first_s": first,
        "unchanged_s": again,
        "source_change_s": changed,
        "image_bytes": size(here.image),
        "base_bytes": size(base),
    }


@check
def contents() -> dict[str, Any]:
    """What is in it, what is not, and how long the command line takes to answer."""
    config = json.loads(run("podman", "image", "inspect", here.image).stdout)[0]["Config"]
    assert config["Entrypoint"] == ["tini", "--", "entrypoint.sh"] and not config.get("User")
    assert {"title", "revision", "licenses", "base.name"} <= {
        label.removeprefix("org.opencontainers.image.") for label in config["Labels"]
    }
    inside = """
      ls /etc/ssh | grep -c '^ssh_host' ; stat -c '%a' /workspace; command -v tar find setsid sshd gcc tini
      printf '#include <Python.h>\\n' > /tmp/x.c
      include=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')
      gcc -fsyntax-only -I"$include" /tmp/x.c && echo compiles
      find / -xdev \\( -name .git -o -name .env -o -name 'ssh_host_*' -o -name authorized_keys \\)
      du -sm /opt/venv | cut -f 1"""
    lines = podman_run("--", "bash", "-c", inside).stdout.split()
    assert lines[:2] == ["0", "1777"] and lines[-2] == "compiles", lines
    said = podman_run("--", "python", "-c", "print('data')")
    assert said.stdout == "data\n" and said.stderr.count("\n") == 1 and "CPU is used" in said.stderr
    seconds = timed(lambda: podman_run("--", "python", "-m", "grpo_gsm8k.cli", "--help"))
    assert "Usage" in podman_run("--").stdout  # no command: the help
    return {"venv_mb": int(lines[-1]), "help_s": seconds}


@check
def secrets() -> dict[str, Any]:
    """Neither the builder's environment, nor an .env beside the Dockerfile, nor a container's -e is in any layer."""
    podman_run("--env", f"HF_TOKEN={CANARY}", "--env", "PUBLIC_KEY=ssh-ed25519 AAAA", "--", "true")
    written = run("podman", "history", "--no-trunc", "--format", "{{.CreatedBy}} {{.Comment}}", here.image).stdout
    written += run("podman", "image", "inspect", here.image).stdout
    assert CANARY not in written
    where = json.loads(run("podman", "image", "inspect", "--format", "{{json .GraphDriver.Data}}", here.image).stdout)
    layers = [where["UpperDir"], *where.get("LowerDir", "").split(":")]
    layers = [layer for layer in layers if layer]
    assert any((Path(layer) / "usr/local/bin/entrypoint.sh").is_file() for layer in layers), layers
    found = run("grep", "--recursive", "--files-with-matches", "--fixed-strings", CANARY, *layers, code=1)
    return {"layers": len(layers), "files_with_the_canary": len(found.stdout.split())}


# ---- running it


@check
def whole_demo() -> dict[str, Any]:
    """`demo`, all of it: GRPO ends far above SFT, and the report is there."""
    folder = volume("demo")
    seconds = timed(lambda: demo(folder))
    shown = json.loads((folder / "runs" / "pipeline.json").read_text())
    accuracy = {stage["name"]: round(stage["accuracy"], 4) for stage in shown["stages"]}
    assert accuracy["grpo"] > accuracy["sft"] + 0.2, accuracy
    assert (folder / "runs" / "report.html").stat().st_size > 10_000
    return {"seconds": seconds, **accuracy}


@check
def evaluation() -> dict[str, Any]:
    """`python -m grpo_gsm8k.cli eval` on the demo's model finds what the demo itself has found."""
    folder = volume("demo")
    told = folder / "runs" / "pipeline.json"
    shown = json.loads(told.read_text()) if told.is_file() else demo(folder, *SHORT)
    stage = shown["stages"][-1]
    command = f"python -m grpo_gsm8k.cli eval --preset tiny --model_id {stage['model']}"
    command += f" --eval_path {shown['data']}/test.jsonl --json"
    began = time.monotonic()
    got = json.loads(podman_run(*mounted(folder), "--", *command.split()).stdout)
    for key in ("accuracy", "n", "weights_sha256"):
        assert got[key] == stage[key], (key, got[key], stage[key])
    return {"accuracy": got["accuracy"], "n": got["n"], "seconds": round(time.monotonic() - began, 1)}


@check
def stop_and_resume() -> dict[str, Any]:
    """SIGTERM: a checkpoint, within the grace period. A new container goes on, to the bits of a run that was let be."""
    flags = ("--stop_after", "sft", "--max_steps", 60, "--set", "toy.test=16")
    whole = demo(volume(), *flags)
    folder = volume()
    command = ("grpo-gsm8k", "demo", "--out_dir", "/workspace/runs", *flags)
    with container(*mounted(folder), "--", *command) as name:
        metrics = folder / "runs" / "sft" / "metrics.jsonl"
        wait_for("ten steps", lambda: metrics.is_file() and metrics.read_text().count("\n") >= 10)
        seconds = timed(lambda: run("podman", "stop", "--time", "60", name))
        code = int(run("podman", "inspect", "--format", "{{.State.ExitCode}}", name).stdout)
        assert code == 143, (code, logs(name))
    saved = [path.parent.name for path in (folder / "runs" / "sft" / "checkpoints").glob("*/manifest.json")]
    assert len(saved) == 1 and saved[0] != "step_000060", saved
    resumed = demo(folder, *flags, "--resume")
    assert [row["weights_sha256"] for row in resumed["stages"]] == [row["weights_sha256"] for row in whole["stages"]]
    return {"stop_s": seconds, "exit_code": code, "stopped_at": saved[0], "same_weights": True}


@check
def unprivileged() -> dict[str, Any]:
    """A user id that is not root's, known to the image (1000) or not (4321), with a volume and without."""
    for uid in (1000, 4321):
        folder = volume(owner=uid)
        shown = demo(folder, *SHORT, options=("--user", f"{uid}:{uid}"))
        assert len(shown["stages"]) == 2
        assert {path.stat().st_uid for path in folder.rglob("*")} == {uid}
        podman_run("--user", f"{uid}:{uid}", "--", "grpo-gsm8k", "demo", *SHORT[2:], "--stop_after", "base")
    return {"uids": "1000 4321"}


@check
def read_only() -> dict[str, Any]:
    """A read-only root file system: with podman's tmpfs at /tmp, and with nothing to write to but the volume."""
    places = "for d in $HOME ${TMPDIR:-/tmp} $MPLCONFIGDIR $TRITON_CACHE_DIR; do mkdir -p $d/x; touch $d/x/y; done"
    strict = ("--read-only-tmpfs=false",)
    for more, uid in (((), 1000), (strict, 0), (strict, 1000), (strict, 4321)):
        options = ("--read-only", *more, "--user", f"{uid}:{uid}")
        folder = volume(owner=uid)
        shown = demo(folder, *SHORT, options=options)
        assert len(shown["stages"]) == 2
        podman_run(*mounted(folder), *options, "--", "bash", "-euc", places)
        podman_run(*mounted(folder), *options, "--", "touch", "/opt/x", code=1)
    nowhere = podman_run("--read-only", "--read-only-tmpfs=false", "--", "true", code=2)
    assert "mount a folder at /workspace" in nowhere.stderr
    return {"variants": 4}


@check
def caches() -> dict[str, Any]:
    """Under /workspace where it is mounted, under HOME where not; what is set from outside wins."""
    show = ("--", "bash", "-c", 'echo "$HF_HOME|$XDG_CACHE_HOME|$TRITON_CACHE_DIR|$(command -v python)"')
    inside = podman_run(*mounted(volume()), *show).stdout.strip()
    assert inside == "/workspace/.cache/huggingface|/workspace/.cache|/workspace/.cache/triton|/opt/venv/bin/python"
    assert podman_run(*show).stdout.strip() == "||/root/.cache/triton|/opt/venv/bin/python"
    assert podman_run("--env", "HF_HOME=/x", *mounted(volume()), *show).stdout.startswith("/x|")
    return {}


@check
def template() -> dict[str, Any]:
    """A pod template's variables: venv, settings and git's identity on the volume, and a tunnel that delays nobody."""
    folder = volume()
    own = {"XDG_CONFIG_HOME": ".config", "XDG_CACHE_HOME": ".cache", "HF_HOME": ".cache/huggingface"}
    own |= {"UV_PROJECT_ENVIRONMENT": ".venv", "PIP_CACHE_DIR": ".cache/pip", "VSCODE_AGENT_FOLDER": ".vscode-server"}
    own |= {"GIT_CONFIG_GLOBAL": "dotfiles/gitconfig"}
    words = [word for name, path in own.items() for word in ("--env", f"{name}=/workspace/{path}")]
    inside = """
      git config -f /workspace/dotfiles/gitconfig user.name me && git config --global user.name
      git init -q /workspace/c && chown -R 4321 /workspace/c && git -C /workspace/c status --short && echo trusted
      python -c 'import sys, grpo_gsm8k.cli; print(sys.prefix)'"""
    for _ in range(2):  # the second container finds what the first has left
        said = podman_run(
            *mounted(folder), *words, "--env", "VSCODE_TUNNEL_NAME=box", "--network", "none", "--", "bash", "-c", inside
        )
        assert said.stdout.split() == ["me", "trusted", "/workspace/.venv"], said
    return {"venv": said.stdout.split()[-1]}


@check
def checkout() -> dict[str, Any]:
    """A checkout in /workspace runs when it is asked for, by any way of starting it, and else does not."""
    folder = volume()
    shutil.copytree(REPOSITORY / "grpo_gsm8k", folder / "grpo_gsm8k", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(REPOSITORY / "uv.lock", folder)
    with (folder / "grpo_gsm8k" / "cli.py").open("a") as handle:
        handle.write("\n\nif __name__ != '__main__':\n    print('the checkout')\n")
    here, elsewhere = (("--volume", f"{folder}:{at}") for at in ("/workspace", "/elsewhere"))
    program, module = ("--", "grpo-gsm8k", "--help"), ("--", "python", "-c", "import grpo_gsm8k.cli")
    for command in (program, module):
        asked = [(here, "1"), (elsewhere, "/elsewhere"), (("--volume", f"{folder}:/workspace/grpo_gsm8k"), "1")]
        for mount, value in asked:
            done = podman_run(*mount, "--env", f"GRPO_GSM8K_CHECKOUT={value}", *command)
            assert "the checkout" in done.stdout and "the code is that of" in done.stderr and "lock" not in done.stderr
        assert "the checkout" not in podman_run(*here, *command).stdout
    assert "no checkout in /nowhere" in podman_run("--env", "GRPO_GSM8K_CHECKOUT=/nowhere", *program, code=2).stderr
    assert not list(folder.rglob("*.pyc"))
    return {}


@check
def hooks() -> dict[str, Any]:
    """/pre_start.sh and /post_start.sh: before the command, in this order, off stdout; one that fails is fatal."""
    folder = volume()
    for name in ("pre", "post"):
        (folder / name).write_text(f"echo {name}; exit ${{FAIL_{name}:-0}}\n")
    hooked = [word for name in ("pre", "post") for word in ("--volume", f"{folder / name}:/{name}_start.sh:ro")]
    done = podman_run(*hooked, "--", "echo", "command")
    assert done.stdout == "command\n" and done.stderr.endswith("pre\npost\n")
    assert "/post_start.sh ended with 7" in podman_run(*hooked, "--env", "FAIL_post=7", "--", "true", code=2).stderr
    return {}


# ---- ssh


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


class Login:
    """A container with sshd, and a client that trusts the host key of its log and nothing else."""

    def __init__(self, name: str, key: Path, port: int, user: str) -> None:
        self.name = name
        found = wait_for("a host key in the log", lambda: re.search(r"ssh-ed25519 [A-Za-z0-9+/]{68}", logs(name)), 20)
        self.host_key, known = found.group(), key.with_name(f"known_{port}")
        known.write_text(f"[127.0.0.1]:{port} {self.host_key}\n")
        options = {"IdentitiesOnly": "yes", "UserKnownHostsFile": known, "StrictHostKeyChecking": "yes"}
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        self.words = ["-F", "/dev/null", *words, "-o", f"Port={port}", "-i", str(key)]
        self.to = f"{user}@127.0.0.1"

    def ssh(self, command: str, *more: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        return run("ssh", "-o", "BatchMode=yes", *more, *self.words, self.to, command, code=code)


@contextmanager
def login(user: str = "root", *options: object) -> Iterator[Login]:
    folder, port = Path(tempfile.mkdtemp(dir=here.scratch)), free_port()
    for name in ("mine", "another"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / name)
    public = (folder / "mine.pub").read_text().strip()
    env = {"PUBLIC_KEY": public, "SSHD_PORT": port, "SSHD_ADDRESS": "127.0.0.1", "HF_TOKEN": CANARY, **NASTY}
    words = [word for name, value in env.items() for word in ("--env", f"{name}={value}")]
    with container(*words, *options, "--", "sleep", "infinity") as name:
        yield Login(name, folder / "mine", port, user)


def environment(printed: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in printed.split("\0") if "=" in pair)


def same_environment(door: Login) -> None:
    """By a plain command, by a login shell, and by reading /etc/environment as the launcher does."""
    for command in ("env -0", "bash -lc 'env -0'", "sh -lc 'env -0'"):
        got = environment(door.ssh(command).stdout)
        assert {name: got.get(name) for name in NASTY} == NASTY, (command, got)
        assert got["PATH"].startswith("/opt/venv/bin:") and got["HF_TOKEN"] == CANARY


@check
def ssh() -> dict[str, Any]:
    """Root logs in: by key alone, to the host key of the log, which no other container has, into its environment."""
    with login() as door, login() as other:
        began = time.monotonic()
        assert "Usage" in door.ssh("python -m grpo_gsm8k.cli --help").stdout
        seconds = round(time.monotonic() - began, 1)
        assert door.host_key != other.host_key
        same_environment(door)
        read = "env -i PATH=/usr/bin:/bin sh -c 'set -a; . /etc/environment; env -0'"
        got = environment(door.ssh(read).stdout)
        assert {name: got.get(name) for name in NASTY} == NASTY
        assert door.ssh("stat -c '%a %U' /etc/environment").stdout == "600 root\n"
        nobody = "setpriv --reuid 1000 --regid 1000 --clear-groups env -i"
        look = "cat /etc/environment /run/sshd.*/* /proc/*/environ"
        spied = door.ssh(f"ps -eo args; {nobody} sh -c '{look}' 2>&1", code=1).stdout
        assert "Permission denied" in spied and CANARY not in spied
        door.words[-1] = door.words[-1].replace("mine", "another")
        assert "Permission denied (publickey)" in door.ssh("true", code=255).stderr
        assert "Permission denied (publickey)" in door.ssh("true", "-o", "PubkeyAuthentication=no", code=255).stderr
        stop = timed(lambda: run("podman", "stop", "--time", "30", door.name))
        assert CANARY not in logs(door.name) + logs(other.name)
    return {"first_command_s": seconds, "stop_s": stop}


@check
def ssh_unprivileged() -> dict[str, Any]:
    """--user 1000:1000 logs in as `trainer`, also with a read-only root file system; a nameless id is told why not."""
    read_only = ("--read-only", "--read-only-tmpfs=false")
    for options in ((), read_only):
        user = ("--user", "1000:1000", *mounted(volume(owner=1000)), *options)
        with login("trainer", *user) as door:
            assert door.ssh("id -u; python -c 'import grpo_gsm8k'").stdout == "1000\n"
            same_environment(door)
    with login("root", *mounted(volume()), *read_only) as door:
        same_environment(door)
    key = ("--env", "PUBLIC_KEY=ssh-ed25519 AAAA")
    nameless = podman_run("--user", "4321:4321", "--passwd=false", *key, "--", "echo", "on")
    assert "user id 4321 has no name" in nameless.stderr and nameless.stdout == "on\n"
    assert "PUBLIC_KEY holds no public key" in podman_run(*key, "--", "true").stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = ("--env", f"SSHD_PORT={taken.getsockname()[1]}", "--env", "SSHD_ADDRESS=127.0.0.1")
        public = next(here.scratch.glob("*/mine.pub")).read_text().strip()
        said = podman_run("--env", f"PUBLIC_KEY={public}", *words, "--", "echo", "on")
        assert "no sshd: " in said.stderr and "ddress" in said.stderr and said.stdout == "on\n", said.stderr
    return {}


# ---- the long ones


@check
def launch() -> dict[str, Any]:
    """The launcher, end to end, on a fake provider whose pods are containers of this image (tests/test_image.py)."""
    env = {**os.environ, "GRPO_GSM8K_IMAGE": here.image, "GRPO_GSM8K_IMAGE_JOB": here.launch_job}
    command = (sys.executable, "-m", "pytest", "-rA", "tests/test_image.py")
    done = run(*command, cwd=REPOSITORY, env=env, code=None)
    say(done.stdout[-12000:])
    assert done.returncode == 0 and "1 passed" in done.stdout
    return {"job": here.launch_job}


@check
def pytest() -> dict[str, Any]:
    """The tests in the image, with the test packages on top (tests/Dockerfile), from a mounted checkout."""
    tests = f"{here.image}-tests"
    seconds = bud(
        REPOSITORY, "--build-arg", f"IMAGE={here.image}", "--file", REPOSITORY / "tests/Dockerfile", "--tag", tests
    )
    folder = volume()
    listed = run("git", "-C", REPOSITORY, "ls-files").stdout.split()
    for name in listed:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, folder / name)
    words = ("--rm", "--env", "GRPO_GSM8K_CHECKOUT=1", *mounted(folder), tests)
    began = time.monotonic()
    done = run("podman", "run", *words, "pytest", *shlex.split(here.pytest_args), code=None)
    say(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {"build_s": seconds, "seconds": round(time.monotonic() - began, 1), "said": done.stdout.splitlines()[-1]}


# ---- the command


def prepare(store: Path) -> None:
    """Storage and settings of its own, unless the environment names some."""
    store.mkdir(parents=True, exist_ok=True, mode=0o755)
    found = store.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise SystemExit(f"{store}: is not a folder of this user's alone; name another --store")
    storage = f'[storage]\ndriver = "overlay"\nrunroot = "{store}/run"\ngraphroot = "{store}/storage"\n'
    for name, file, text in (
        ("CONTAINERS_STORAGE_CONF", "storage.conf", storage),
        ("CONTAINERS_CONF", "containers.conf", CONTAINERS),
    ):
        (store / file).write_text(text)
        os.environ.setdefault(name, str(store / file))


def perform(name: str) -> dict[str, Any]:
    say(f"== {name}")
    began, row = time.monotonic(), {"name": name, "ok": True}
    try:
        row |= {"figures": CHECKS[name]()}
    except AssertionError as fault:
        at = traceback.extract_tb(fault.__traceback__)[-1]
        detail = f"{at.name}, line {at.lineno}: {at.line}\n{fault}"
        say(f"FAILED: {detail}")
        row |= {"ok": False, "figures": {}, "detail": detail[:2000]}
    return row | {"wall_s": round(time.monotonic() - began, 1)}


def parse() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="all of them, if none is named")
    parser.add_argument("--list", action="store_true", help="name the checks, and what each is about")
    parser.add_argument("--image", default="localhost/grpo-gsm8k", help="name of the image to make, or that is there")
    parser.add_argument("--base", default="", help="base image; a stand-in is made if none is named")
    parser.add_argument("--store", type=Path, default=Path(tempfile.gettempdir()) / "grpo-gsm8k-image")
    parser.add_argument("--pytest_args", default="", help="for the tests in the image")
    parser.add_argument("--launch_job", default="demo", help="what the rented pod runs: `grpo-gsm8k` and these words")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.parse_args(namespace=here)


def main() -> int:
    parse()
    if here.list:
        for name, function in CHECKS.items():
            print(f"{name:18}{(function.__doc__ or '').splitlines()[0]}")
        return 0
    if unknown := [name for name in here.checks if name not in CHECKS]:
        say(f"no check is called {unknown[0]}; there are {', '.join(CHECKS)}")
        return 2
    if missing := [tool for tool in NEEDED if not shutil.which(tool)]:
        say(f"{', '.join(missing)}: not installed; {INSTALL}")
        return 2
    if os.geteuid() != 0:
        say("this needs root, to build without a daemon and to mount folders of several owners")
        return 2
    prepare(here.store)
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=here.store) as folder:
        here.scratch = Path(folder)
        here.scratch.chmod(0o755)  # users of several ids come here
        rows = [perform(name) for name in here.checks or CHECKS]
    if here.json:
        print(json.dumps({"image": here.image, "checks": rows}, indent=1))
    else:
        for row in rows:
            figures = ", ".join(f"{key} {value}" for key, value in row["figures"].items())
            print(f"{row['name']:18}{'ok' if row['ok'] else 'FAILED':8}{row['wall_s']:8.1f} s  {figures}")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
