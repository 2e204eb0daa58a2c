"""End to end: the launcher rents a pod from a fake provider that starts the real image, and does a job in it over ssh.

    GRPO_GSM8K_IMAGE=localhost/grpo-gsm8k uv run pytest tests/test_image.py

`scripts/check_image.py launch` builds the image and calls this. A pod is a container on the host's network.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fake_runpod import FakeRunpod, Pod, serve
from tests.test_launch import SECRETS, assert_over, run

IMAGE = os.environ.get("GRPO_GSM8K_IMAGE", "")
SHORT = "demo --stop_after sft --max_steps 4 --set toy.test=16"
PATIENT = {"poll_s": 0.5, "place_s": 60.0, "pull_s": 60.0, "ssh_s": 60.0, "delete_s": 30.0, "fetch_s": 60.0}
pytestmark = pytest.mark.skipif(
    not IMAGE or not shutil.which("podman"),
    reason="needs podman and an image, named by GRPO_GSM8K_IMAGE; scripts/check_image.py launch has both",
)


def podman(*words, **more):
    return subprocess.run(["podman", *words], check=True, capture_output=True, text=True, **more)


class ContainerRunpod(FakeRunpod):
    """The fake provider, with containers for pods: their own sshd, their own log, the watchdog as their command."""

    def start(self, pod: Pod) -> None:
        with socket.socket() as door:
            door.bind(("127.0.0.1", 0))
            pod.port = door.getsockname()[1]
        here = {"SSHD_PORT": str(pod.port), "SSHD_ADDRESS": "127.0.0.1"}
        env = {**pod.body["env"], **self.pod_env(pod), **here}
        names = [word for name in env for word in ("--env", name)]  # the values are in no command line
        words = ["run", "--detach", "--network", "host", "--name", self.name(pod), *names, pod.body["image"]]
        podman(*words, *shlex.split(pod.body["args"]), env={**os.environ, **env})

    def name(self, pod: Pod) -> str:
        return f"{pod.body['name']}-{pod.id}"

    def log(self, pod: Pod) -> list[str]:
        return podman("logs", self.name(pod)).stderr.splitlines()

    async def listen(self, pod: Pod) -> None:
        """The container's own sshd does."""

    def shut(self, pod: Pod) -> None:
        if not pod.terminated:
            self.last_log = self.log(pod)
            podman("rm", "--force", "--time", "0", self.name(pod))


@contextmanager
def command_lines():
    """Every command line that was seen on this machine meanwhile, containers' included."""
    seen, over = set(), threading.Event()

    def look():
        while not over.wait(0.1):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(path.read_bytes())
                except OSError:  # it has ended
                    continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_the_demo_runs_in_a_rented_container(tmp_path, capfd, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    job = f'test -n "$HF_TOKEN" && exec grpo-gsm8k {os.environ.get("GRPO_GSM8K_IMAGE_JOB") or SHORT}'
    fake = ContainerRunpod(tmp_path / "pods", SECRETS["RUNPOD_API_KEY"])
    with serve(fake), command_lines() as seen:
        settings = {**PATIENT, "image": IMAGE, "webhook": fake.url.replace("/v2", "/hook")}
        code, result = run(fake, tmp_path, ["sh", "-c", f"{job} --out_dir artifacts/runs/demo"], **settings)
    said = capfd.readouterr().err
    print(said, *fake.last_log, json.dumps(result, default=str), sep="\n")
    assert code == 0, result
    assert_over(fake, tmp_path, said)

    # The host key came from the container's log, and its watchdog sat beside the job.
    assert "is pinned from now on" not in said and len(fake.pods) == 1
    assert any("its host key: ssh-ed25519 " in line for line in fake.last_log)
    assert any("watchdog: this pod's own key sees it" in line for line in fake.last_log)

    # What the job made is here, and the container is gone.
    made = Path(result["results"]) / "artifacts" / "runs" / "demo"
    assert (made / "report.html").stat().st_size > 10_000
    stages = json.loads((made / "pipeline.json").read_text())["stages"]
    assert f"{stages[-1]['name']}: {stages[-1]['accuracy']:.1%} right" in Path(result["log"]).read_text()
    assert fake.name(fake.pods["pod1"]) not in podman("ps", "--all", "--format", "{{.Names}}").stdout

    # The events, in order, from the create to the end, with what it cost.
    events = [json.loads(body) for _, body in fake.webhooks]
    order = [event["event"] for event in events if event["event"] not in ("state", "step")]
    assert order == ["create", "run", "fetch", "end"] and re.search(r"about \$0\.\d+", events[-1]["message"])
    assert any(event["event"] == "step" for event in events)

    # No secret in a command line of this machine or the container's, nor in the container's log.
    assert seen and not [line for line in seen if any(secret.encode() in line for secret in SECRETS.values())]
    assert not [line for line in fake.last_log if any(secret in line for secret in SECRETS.values())]
