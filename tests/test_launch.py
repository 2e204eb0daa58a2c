"""The launcher against a provider that misbehaves. After every script the same holds: no pod is left that costs
money, the user was told what happened and what it cost, and no secret is anywhere."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from grpo_gsm8k.errors import ConfigError, GrpoError
from grpo_gsm8k.launch import manage, records, up
from tests.fake_runpod import FakeRunpod, serve
from tests.toys import REPOSITORY

SECRETS = {
    "RUNPOD_API_KEY": "rpa_KEY0123456789abcdef",
    "HF_TOKEN": "hf_TOKEN0123456789abcdef",
    "WANDB_API_KEY": "wandb0123456789abcdef",
    "GRPO_GSM8K_WEBHOOK_SECRET": "hook0123456789abcdef",
}
QUICK: dict[str, Any] = {
    "image": "ghcr.io/owner/image@sha256:" + "0" * 64,
    "budget": 1.0,
    "poll_s": 0.02,
    "backoff_s": 0.005,
    "round_s": 0.01,
    "place_s": 0.3,
    "pull_s": 0.3,
    "ssh_s": 0.4,
    "delete_s": 2.0,
    "fetch_s": 5.0,
}
JOB = ["sh", "-c", "mkdir -p artifacts && echo 42 > artifacts/answer && echo working && sleep 0.15 && echo done"]
NO_JOB = ["sh", "-c", "exit 3"]


@dataclass
class Script:
    """What befalls a run, and what must come of it: words said, the exit code (0 for success), pods that were made."""

    name: str
    says: str
    code: int = 0
    pods: int = 1
    faults: dict[str, list[str]] = field(default_factory=dict)
    lives: tuple[str, ...] = ()
    on_command: dict[int, str] = field(default_factory=dict)
    host_key_in_log: str = "own"
    command: list[str] = field(default_factory=lambda: JOB)
    settings: dict[str, Any] = field(default_factory=dict)


SCRIPTS = [
    Script("nothing happens", "results:"),
    Script("no capacity anywhere", "no GPU could be had in 3 rounds", 1, 0, {"create": ["400"] * 12}),
    Script("capacity for the third choice alone", r"NVIDIA H100 80GB HBM3 at \$3.29", 0, 1, {"create": ["400", "400"]}),
    Script("no money", "HTTP 402", 1, 0, {"create": ["402"]}),
    Script("this GPU is not allowed", "HTTP 403", 0, 1, {"create": ["403"]}),
    Script("the request is not taken", "HTTP 422", 1, 0, {"create": ["422"]}),
    Script("too many requests", "results:", 0, 1, {"create": ["429", "429"], "get": ["429"]}),
    Script("the key is not known", "HTTP 401", 1, 0, {"catalog": ["401"]}),
    Script("the API is down", "HTTP 503", 1, 0, {"catalog": ["503"] * 5}),
    Script("the catalog is garbage once", "results:", 0, 1, {"catalog": ["malformed", "html"]}),
    Script("create fails and made nothing", "looking for", 0, 1, {"create": ["503"]}),
    Script("create fails and made a pod", "looking for", 0, 1, {"create": ["500_after"]}),
    Script("create: no reply, no pod", "looking for", 0, 1, {"create": ["drop"]}),
    Script("create: no reply, a pod", "looking for", 0, 1, {"create": ["drop_after"]}),
    Script("create: no reply, a pod that turns up late", "looking for", 0, 1, {"create": ["late"]}),
    Script("create: a broken reply, a pod", "looking for", 0, 1, {"create": ["malformed_after"]}),
    Script(
        "create: no reply again and again", "no clear answer in 3", 0, 1, {"create": ["drop"] * 3, "list": [""] * 2}
    ),
    Script("create: no reply, and no list", "no GPU|HTTP 500", 1, 1, {"create": ["late"], "list": ["500"] * 5}),
    Script("no machine is found", "still PROVISIONING after 0.3 s", 0, 2, lives=("stuck_place",)),
    Script("the image is never there", "still STARTING after 0.3 s", 0, 2, lives=("stuck_pull",)),
    Script("the pod is in error", "the pod is ERROR", 0, 2, lives=("error",)),
    Script("ssh never comes", "still RUNNING after 0.4 s", 0, 3, lives=("no_ssh", "no_ssh")),
    Script("ssh refuses three times", "results:", 0, 1, lives=("refuse_3",)),
    Script("no pod ever works", "no GPU could be had", 1, 4, lives=("error",) * 4, settings={"rounds": 1}),
    Script("another host answers", "Host key is not trusted", 1, 4, host_key_in_log="other", settings={"rounds": 1}),
    Script("the log shows no host key", "is pinned from now on", host_key_in_log="none"),
    Script("questions fail while it boots", "HTTP 500", 0, 1, {"get": ["500"] * 5 + ["malformed", "drop", "404"]}),
    Script("ssh drops at the start", "connecting again", on_command={1: "drop"}),
    Script("ssh drops in the run, the port changes", "connecting again", on_command={2: "move", 4: "move"}),
    Script("ssh drops in the fetch", "connecting again|did not arrive", on_command={5: "drop", 6: "drop", 7: "drop"}),
    Script("the host dies", "is EXITED; with --repo_id", 1, on_command={3: "die"}),
    Script("the pod vanishes", "is gone; with --repo_id", 1, on_command={3: "vanish"}),
    Script("the container is started again", "the job is gone", 1, on_command={3: "restart"}),
    Script("the list forgets the pod", "results:", on_command={2: "hide"}),
    Script("two deletes fail", "results:", faults={"delete": ["500", "drop"]}),
    Script("all attempts at a delete fail, once", "5 attempts", faults={"delete": ["500"] * 5}),
    Script("a delete is not answered, and was done", "results:", faults={"delete": ["drop_after"]}),
    Script("a delete is refused once", "HTTP 403", faults={"delete": ["403"]}),
    Script("the list is garbage at the end", "results:", faults={"list": ["malformed"] * 4}),
    Script("the job fails", "exit code 3", 1, command=NO_JOB),
    Script("what is to be fetched is not there", "results:", settings={"fetch": "nowhere"}),
    Script("the job prints its secrets", r"token \[secret\]", command=["sh", "-c", "echo token $HF_TOKEN; env"]),
    Script(
        "the budget is used up",
        "told to stop",
        1,
        command=["sh", "-c", "trap 'mkdir artifacts; echo saved; exit 0' TERM; while :; do sleep 0.05; done"],
        settings={"budget": 0.99 / 3600 * 1.5, "fetch_s": 0.8, "gpu": "NVIDIA L40S"},
    ),
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(up, "LEAST_S", 0.5)


def run(fake, tmp_path, command=JOB, **settings):
    """`up` in this process; (exit code, its result or its error)."""
    os.environ["RUNPOD_API_BASE_URL"] = fake.url
    try:
        return 0, up.up({**QUICK, "state_dir": str(tmp_path / "state"), **settings}, command)
    except GrpoError as fault:
        return fault.exit_code, fault
    finally:
        del os.environ["RUNPOD_API_BASE_URL"]


def assert_no_secret(fake, tmp_path, *texts):
    """Neither in what was said, sent and logged, nor in a file, but for the one in the pod that holds the job's."""
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.parts[-2:] != ("grpo-job", "env") and path.parts[-2:] != ("grpo-job", "log"):
            assert not [s for s in SECRETS.values() if s.encode() in path.read_bytes()], path
        if path.name in ("env", "state.json", "id_ed25519"):
            assert path.stat().st_mode & 0o077 == 0, path
    sent = json.dumps(fake.requests) + "".join(body.decode() for _, body in fake.webhooks)
    assert not [s for s in SECRETS.values() for text in (*texts, sent) if s in text]


def assert_over(fake, tmp_path, said):
    """The invariant."""
    assert fake.billable() == []
    assert re.search(r"it cost about \$\d+\.\d{4} \(price x time\), no pod is left", said)
    assert_no_secret(fake, tmp_path, said)
    assert not list((tmp_path / "state").glob("*/id_ed25519"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_no_pod_is_left_and_the_user_is_told(script, tmp_path, capfd):
    fake = FakeRunpod(
        tmp_path / "pods",
        SECRETS["RUNPOD_API_KEY"],
        script.faults,
        script.lives,
        script.on_command,
        host_key_in_log=script.host_key_in_log,
    )
    with serve(fake):
        settings = {"webhook": fake.url.replace("/v2", "/hook"), **script.settings}
        code, result = run(fake, tmp_path, script.command, **settings)
    said = capfd.readouterr().err + str(result)
    assert_over(fake, tmp_path, said)
    assert re.search(script.says, said), said
    assert (code, len(fake.pods), fake.most_at_once <= 1) == (script.code, script.pods, True), said
    assert not any(any(script) for script in fake.faults.values()), fake.faults  # all of it happened
    if code == 0 and script.command is JOB and not script.settings:
        (answer,) = (tmp_path / "state").glob("*/results/artifacts/answer")
        assert answer.read_text() == "42\n"
        assert (tmp_path / "state" / result["run"] / "log").read_text() == "working\ndone\n"
        last = json.loads(fake.webhooks[-1][1])
        assert last["event"] == "end" and last["cost"] > 0
