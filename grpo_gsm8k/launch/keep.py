"""In the pod: a job whose run folder is pushed to the hub while it runs, and restored before it begins; then its model.

    python -m grpo_gsm8k.launch.keep --repo_id owner/name --folder artifacts --every_s 600 -- COMMAND

The folder lies in the repository under `run/`. Checkpoints are renamed into place whole, and a push is one commit, so
what a new pod restores is a state from which `--resume` goes on; what is half written is left out. A push that fails is
tried again at the next turn, and does not disturb the job.

When the job has ended well, the model that it trained takes the place of `run/`: the repository is then a model with
its card, which loads by its name. A job that trained none leaves its folder there.
"""

from __future__ import annotations

import argparse
import glob
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from grpo_gsm8k.errors import GrpoError
from grpo_gsm8k.launch import hub
from grpo_gsm8k.runs.files import read_json
from grpo_gsm8k.runs.progress import say

WHERE = "run"
# Not pushed to a public repository: what tells of the machine and of whoever started the job.
PERSONAL = [
    *(f"{start}{name}" for start in ("", "*/") for name in ("wandb/*", "tensorboard/*", "sys/*", "command.txt", "log")),
    "*.log",
]
UNFINISHED = [".tmp-*", "**/.tmp-*", ".writing*", "**/.writing*/**", "**/.lock", ".lock"]


def restore(repo_id: str, folder: Path) -> bool:
    """What was pushed last, put back into `folder`; whether there was anything. Errors of the hub end the job."""
    found = hub.api().snapshot_download(repo_id, allow_patterns=[f"{WHERE}/*"], local_dir=folder / ".restoring")
    pushed = Path(found) / WHERE
    files = [path for path in pushed.rglob("*") if path.is_file()]
    for path in files:
        target = folder / path.relative_to(pushed)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return bool(files)


def push(repo_id: str, folder: Path, public: bool = False) -> None:
    """The folder as one commit; what is no longer there is removed. A failure is printed, no more.

    Args:
        public: everybody can read it.
    """
    if not folder.is_dir():
        return
    links = [glob.escape(str(path.relative_to(folder))) for path in folder.rglob("*") if path.is_symlink()]
    left_out = [*UNFINISHED, ".restoring/**", *hub.SECRET, *links, *(PERSONAL if public else [])]
    try:
        hub.api().upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=WHERE,
            commit_message="The run so far",
            ignore_patterns=left_out,
            delete_patterns="*",
        )
    except hub.UNREACHABLE as fault:  # also a checkpoint that was retired while it was read
        say(f"not pushed this time: {type(fault).__name__}")


def run(repo_id: str, folder: Path, every_s: float, command: Sequence[str], public: bool = False) -> int:
    """Restore, run, push every so often and at the end; the command's exit code."""
    if restore(repo_id, folder):
        say(f"going on from what was pushed to {repo_id}")
    ended = threading.Event()

    def keep_pushing() -> None:
        while not ended.wait(every_s):
            push(repo_id, folder, public)

    thread, code = threading.Thread(target=keep_pushing), 1
    thread.start()
    try:
        code = subprocess.run(command, check=False).returncode
    finally:
        ended.set()
        thread.join()
        model = None if code else trained(folder)
        if model is None or not deliver(repo_id, model, public):
            push(repo_id, folder, public)
            code = code or (1 if model else 0)
    return code if code >= 0 else 128 - code


def trained(folder: Path) -> Path | None:
    """The checkpoint of the training in `folder` that ended last; None where there is none."""
    from grpo_gsm8k.trainer.checkpoint import MANIFEST

    results = [path for name in ("pipeline.json", "result.json") for path in folder.rglob(name)]
    for path in sorted(results, key=lambda path: path.stat().st_mtime, reverse=True):
        found = read_json(path)
        model = found.get("model") or next((stage["model"] for stage in reversed(found.get("stages", []))), "")
        if model and (Path(model) / MANIFEST).is_file():
            return Path(model)
    return None


def deliver(repo_id: str, model: Path, public: bool, tries: int = 3, wait_s: float = 10.0) -> bool:
    """Put the model in the place of the run; whether that was done. What keeps it away is printed."""
    from grpo_gsm8k.launch import publish

    for attempt in range(tries):
        try:
            done = publish.push(model, repo_id, public, instead_of=f"{WHERE}/")
        except GrpoError as fault:
            say(f"{repo_id}: the model is NOT there: {fault}")
            time.sleep(wait_s if attempt + 1 < tries else 0)
        else:
            say(f"{repo_id}: step {done['step']} of {model} is the model there, with its card")
            return True
    return False


def main() -> int:
    """Read the flags. SIGTERM is for the job, which shares this process's group."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repo_id", required=True)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--every_s", required=True, type=float)
    parser.add_argument("--public", action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    flags = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    command = flags.command[1:] if flags.command[:1] == ["--"] else flags.command
    return run(flags.repo_id, flags.folder, flags.every_s, command, flags.public)


if __name__ == "__main__":
    sys.exit(main())
