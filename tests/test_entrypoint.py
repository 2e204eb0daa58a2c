"""entrypoint.sh, as far as it can be tried without a container; scripts/check_image.py tries the rest in one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "entrypoint.sh"
NASTY = {
    "QUOTES": """it's "quoted" 'twice' \\' \\" \\\\""",
    "EXPANDS": "$HOME `id` $(id) ! * ~ # ; & | <>",
    "LINES": "one\n two\n\n",
    "SPACED": "  two  spaces\tand a tab ",
    "EMPTY": "",
    "UNICODE": "naïve 数学",
    "SETS": "A=b=c",
}


def bash(script, env):
    words = ["bash", "-c", f". {SCRIPT}; {script}"]
    env = {"PATH": os.environ["PATH"], **env}
    return subprocess.run(words, check=False, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_an_environment_survives_the_file_that_ssh_sessions_read(tmp_path, shell):
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell}")
    file, sshd = tmp_path / "environment", tmp_path / "setenv"
    of_a_session = {"HOME": "/root", "PWD": "/", "UID": "0", "SSH_CONNECTION": "x", "not.a.name": "x"}
    assert bash(f"write_environment {file} {sshd}", {**NASTY, **of_a_session}).returncode == 0
    script = f"set -a; . {file}; exec env -0"
    printed = subprocess.run([shell, "-c", script], env={"PATH": os.environ["PATH"]}, capture_output=True, check=True)
    got = dict(pair.split("=", 1) for pair in printed.stdout.decode().split("\0") if pair)
    assert {name: got.get(name) for name in NASTY} == NASTY
    assert not of_a_session.keys() & got.keys() - {"PWD"}  # PWD: the new shell's own
    # sshd knows double quotes and backslashes; a line break would end its directive.
    written = sshd.read_text()
    assert written.startswith("SetEnv ") and written.count("\n") == 1 and "LINES" not in written
    assert r'"QUOTES=it' in written and r"'s \"quoted\" 'twice' \\' \\\" \\\\" in written


def test_places_to_write_are_found_and_what_is_set_wins(tmp_path):
    show = 'find_places; echo "$HOME|$TRITON_CACHE_DIR|${HF_HOME:-}"'
    given = {"HOME": str(tmp_path), "TRITON_CACHE_DIR": "/t", "HF_HOME": "/h"}
    assert bash(show, given).stdout == f"{tmp_path}|/t|/h\n"
    found = bash(show, {"HOME": "/nowhere"}).stdout.split("|")
    assert Path(found[0]).is_dir() and found[0] != "/nowhere"
    assert found[1].endswith("/.cache/triton")
    Path(found[0]).rmdir()


def test_a_checkout_that_is_not_there_is_one_line_and_exit_code_2(tmp_path):
    asked = bash("use_checkout", {"GRPO_GSM8K_CHECKOUT": str(tmp_path)})
    assert asked.returncode == 2 and asked.stderr.count("\n") == 1 and str(tmp_path) in asked.stderr
    took = bash('use_checkout; echo "$PYTHONPATH"', {"GRPO_GSM8K_CHECKOUT": str(REPOSITORY), "PYTHONPATH": "/more"})
    assert took.stdout == f"{REPOSITORY}:/more\n"


def test_without_a_key_nothing_listens():
    assert bash("start_sshd", {"PUBLIC_KEY": " \n"}).returncode == 1
