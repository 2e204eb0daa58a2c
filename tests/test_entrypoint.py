"""entrypoint.sh, as far as it can be tried without a container; scripts/check_image.py tries the rest in one."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import venv
from pathlib import Path

import pytest
import yaml

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


def test_a_volume_keeps_caches_and_settings_and_the_template_wins(tmp_path):
    names = (
        "XDG_CACHE_HOME",
        "HF_HOME",
        "PIP_CACHE_DIR",
        "XDG_CONFIG_HOME",
        "GIT_CONFIG_GLOBAL",
        "VSCODE_AGENT_FOLDER",
    )
    show = f"volume() {{ echo {tmp_path}; }}; find_places; printf '%s\\n' " + " ".join(f'"${name}"' for name in names)
    found = bash(show, {"HOME": str(tmp_path)}).stdout.splitlines()
    below = [".cache", ".cache/huggingface", ".cache/pip", ".config", "dotfiles/gitconfig", ".vscode-server"]
    assert found == [str(tmp_path / path) for path in below]
    template = {name: str(tmp_path / "of" / name / "x") for name in names}
    assert bash(show, {"HOME": str(tmp_path), **template}).stdout.splitlines() == list(template.values())
    # `git config -f FILE`, as the first README has it, needs the file's folder.
    for file in (found[4], template["GIT_CONFIG_GLOBAL"]):
        subprocess.run(["git", "config", "-f", file, "user.name", "me"], check=True)


def test_a_venv_on_the_volume_sees_the_image_and_keeps_what_is_added(tmp_path):
    image, own = tmp_path / "image", tmp_path / "volume" / ".venv"
    venv.create(image, with_pip=False)
    (purelib,) = image.glob("lib/python*/site-packages")
    (purelib / "of_the_image.py").write_text("")
    env = {"PATH": f"{image}/bin:{os.environ['PATH']}", "UV_PROJECT_ENVIRONMENT": str(own)}
    show = "use_venv; python -c 'import of_the_image, sys; print(sys.prefix)'; "
    assert bash(show, env).stdout == f"{own}\n"
    (there,) = own.glob("lib/python*/site-packages")
    (there / "added.py").write_text("")
    assert bash(show + "python -c 'import added'; echo $? $VIRTUAL_ENV", env).stdout == f"{own}\n0 {own}\n"
    unmade = bash("use_venv; command -v python", env | {"UV_PROJECT_ENVIRONMENT": "/proc/x"})
    assert unmade.returncode == 0 and unmade.stdout == f"{image}/bin/python\n" and "no venv: /proc/x" in unmade.stderr
    assert (
        bash('use_venv; echo "${VIRTUAL_ENV:-none}"', env | {"UV_PROJECT_ENVIRONMENT": "/opt/venv"}).stdout == "none\n"
    )


CODE = '#!/bin/sh\necho "$@"\necho "$VSCODE_CLI_DATA_DIR"\nexit 3\n'


def test_a_tunnel_is_started_where_it_has_a_name_and_code_is_there_or_can_be_had(tmp_path):
    (tmp_path / "bin").mkdir()
    env = {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    assert bash("start_tunnel; wait", env).stderr == ""
    env["VSCODE_TUNNEL_NAME"] = "runpod-gpu"
    nowhere = bash("start_tunnel file:///nowhere; wait; echo waits for nothing", env)
    assert nowhere.stdout == "waits for nothing\n" and "no VS Code tunnel: there is no `code`" in nowhere.stderr
    code = tmp_path / "code"
    code.write_text(CODE)
    code.chmod(0o755)
    with tarfile.open(tmp_path / "cli.tar.gz", "w:gz") as archive:
        archive.add(code, "code")
    said = "tunnel --accept-server-license-terms --name runpod-gpu\n{}\nentrypoint: the VS Code tunnel ended with 3\n"
    fetched = bash(f"start_tunnel file://{tmp_path}/cli.tar.gz; wait", env)
    assert fetched.stdout == "" and fetched.stderr == said.format(tmp_path / ".config/vscode-cli")
    (tmp_path / "cli.tar.gz").unlink()  # the next container on this volume has it
    assert bash("start_tunnel file:///nowhere; wait", env).stderr == fetched.stderr
    code.rename(tmp_path / "bin" / "code")
    there = bash("start_tunnel file:///nowhere; wait", env | {"XDG_CONFIG_HOME": "/c", "XDG_CACHE_HOME": "/none"})
    assert there.stderr == said.format("/c/vscode-cli")


def test_a_release_is_latest_and_the_image_has_git():
    steps = yaml.safe_load((REPOSITORY / ".github/workflows/image.yml").read_text())["jobs"]["image"]["steps"]
    (meta,) = (step["with"] for step in steps if step.get("id") == "meta")
    assert meta["flavor"].split() == ["latest=auto", "suffix=${{", "matrix.suffix", "}},onlatest=true"]
    assert "type=pep440,pattern={{version}}" in meta["tags"].split()  # of which `auto` makes the latest
    assert " git " in (REPOSITORY / "Dockerfile").read_text().partition("apt-get install")[2].partition("\n")[0]
