"""The launcher against a provider that misbehaves. After every script the same holds: no pod is left that costs
money, the user was told what happened and what it cost, and no secret is anywhere."""

from __future__ import annotations

import hashlib
import hmac
import http.server
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from grpo_gsm8k import config
from grpo_gsm8k.errors import ConfigError, GrpoError
from grpo_gsm8k.launch import fetch, job, manage, records, shell, up, watchdog, webhook
from grpo_gsm8k.launch.settings import UpConfig
from tests.fake_runpod import CATALOG, FakeRunpod, Pod, serve

REPOSITORY = Path(__file__).resolve().parent.parent
SECRETS = {
    "RUNPOD_API_KEY": "rpa_KEY0123456789abcdef",
    "HF_TOKEN": "hf_TOKEN0123456789abcdef",
    "WANDB_API_KEY": "wandb0123456789abcdef",
    "GRPO_GSM8K_WEBHOOK_SECRET": "hook0123456789abcdef",
}
OWN_KEYS = ("SSH_PUBLIC_KEY", "RUNPOD_SSH_PUBLIC_KEY", "SSH_PRIVATE_KEY_PATH")
QUICK: dict[str, Any] = {
    "image": "ghcr.io/owner/image@sha256:" + "0" * 64,
    "budget": 1.0,
    "poll_s": 0.05,
    "backoff_s": 0.005,
    "round_s": 0.01,
    "place_s": 5.0,
    "pull_s": 5.0,
    "ssh_s": 5.0,
    "delete_s": 2.0,
    "fetch_s": 5.0,
}
JOB = ["sh", "-c", "mkdir -p artifacts && echo 42 > artifacts/answer && echo working && sleep 0.1 && echo done"]
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
    on_command: dict[int | str, str] = field(default_factory=dict)
    host_key_in_log: str = "own"
    command: list[str] = field(default_factory=lambda: JOB)
    settings: dict[str, Any] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    full: int = 0  # how often this machine's disk is found full


RED = r"\033[31mred \007 \342\200\256"
HOSTILE = Path(__file__).resolve().parent / "hostile_tar.py"
LINKS = "mkdir -p artifacts/w; echo 1 > artifacts/w/x; echo 2 > artifacts/z; cd artifacts; "
LINKS += "ln -s /etc/passwd w/debug-core.log; ln -s w latest; ln z w/hard; mkfifo pipe"
SLOW = {  # near relatives of the others
    "this GPU is not allowed",
    "the catalog is garbage once",
    "create fails and made nothing",
    "create fails and made a pod",
    "create: a broken reply, a pod",
    "create: no reply, no pod",
    "too many requests",
    "ssh refuses three times",
    "two deletes fail",
    "create: no reply again and again",
    "the image is never there",
    "ssh never comes",
    "questions fail while it boots",
    "ssh drops in the fetch",
    "the container is started again",
    "all attempts at a delete fail, once",
    "a delete is refused once",
    "the list is garbage at the end",
    "what is to be fetched is not there",
}
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
    Script(
        "no machine is found", "still PROVISIONING after 0.5 s", 0, 2, lives=("stuck_place",), settings={"place_s": 0.5}
    ),
    Script(
        "the image is never there", "still STARTING after 0.5 s", 0, 2, lives=("stuck_pull",), settings={"pull_s": 0.5}
    ),
    Script(
        "the budget is gone before the job begins",
        "used up before the job began",
        1,
        lives=("stuck_pull",),
        settings={"budget": 0.99 / 3600 * 0.8, "gpu": "NVIDIA L40S"},
    ),
    Script("the pod is in error", "the pod is ERROR", 0, 2, lives=("error",)),
    Script("ssh never comes", "still RUNNING after 0.5 s", 0, 2, lives=("no_ssh",), settings={"ssh_s": 0.5}),
    Script("ssh refuses three times", "results:", 0, 1, lives=("refuse_3",)),
    Script("no pod ever works", "no GPU could be had", 1, 4, lives=("error",) * 4, settings={"rounds": 1}),
    Script(
        "another host answers",
        "Host key is not trusted",
        1,
        host_key_in_log="other",
        settings={"rounds": 1, "ssh_s": 0.3, "gpu": "NVIDIA L40S"},
    ),
    Script("the log shows no host key", "nobody knows who answers", 1, host_key_in_log="none", settings={"ssh_s": 0.3}),
    Script(
        "the log shows no host key, and that is taken",
        "is pinned from now on",
        host_key_in_log="none",
        settings={"insecure_host_key": True},
    ),
    Script("the catalog is elsewhere", "a redirect to http://localhost", 1, 0, {"catalog": ["redirect"]}),
    Script("the create is elsewhere", "a redirect to http://localhost", 1, 0, {"create": ["redirect"]}),
    Script("a delete is elsewhere", "a redirect to http://localhost", 0, 1, {"delete": ["redirect"] * 2}),
    Script("the log is elsewhere", "results:", 0, 1, {"logs": ["redirect"]}),
    Script("the catalog is a bomb", "results:", 0, 1, {"catalog": ["bomb"]}),
    Script("a hook is elsewhere", r"webhook events could not be delivered \(HTTP 307: a redirect"),
    Script(
        "links and a FIFO are in the results",
        r"skipped: .*artifacts/w/debug-core.log \(a link\)",
        command=["sh", "-c", LINKS],
    ),
    Script(
        "the archive is hostile",
        r"INCOMPLETE: 1 of 1 files are not here .*artifacts/answer \(the pod did not send it\)",
        1,
        tools={"tar": f"exec {sys.executable} {HOSTILE}"},
        command=["sh", "-c", "mkdir artifacts; head -c 999999 /dev/zero > artifacts/answer"],
    ),
    Script(
        "the archive is none",
        "INCOMPLETE: .*did not arrive whole: cut off",
        1,
        tools={"tar": "seq 99"},
        settings={"fetch_s": 0.3},
    ),
    Script(
        "the archive never ends",
        "INCOMPLETE: .*sent more than the",
        1,
        tools={"tar": "yes | head -c 9999999"},
        settings={"fetch_s": 0.3},
    ),
    Script("the disk here is full", "INCOMPLETE: .* are free", 1, full=999, settings={"fetch_s": 0.5}),
    Script("the disk here is full for a while", " are free.*missing, asking again in", full=2),
    Script(
        "every fetch fails",
        "INCOMPLETE: the results could not be fetched: .*ssh dropped",
        1,
        on_command={"find -H": "drop"},
        settings={"fetch_s": 0.5},
    ),
    Script("a file is beyond the limit", "INCOMPLETE: .*beyond --fetch_file_gb", 1, settings={"fetch_file_gb": 1e-9}),
    Script(
        "the job writes to the terminal",
        r"^\[train\] red \\x07 \\u202e 2$",
        command=[
            "sh",
            "-c",
            r"printf '\033]0;t\007\033[31mred\033[0m \007 \342\200\256 1\r\033[31mred \007 \342\200\256 2\n'",
        ],
    ),
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
    for name in ("GRPO_GSM8K_IMAGE", "DISCORD_WEBHOOK_URL", *OWN_KEYS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(job.repro, "origin", lambda: "")
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


@pytest.mark.parametrize(
    "script", [pytest.param(s, id=s.name, marks=[pytest.mark.slow] if s.name in SLOW else []) for s in SCRIPTS]
)
def test_no_pod_is_left_and_the_user_is_told(script, tmp_path, capfd, monkeypatch):
    fake = FakeRunpod(
        tmp_path / "pods",
        SECRETS["RUNPOD_API_KEY"],
        script.faults,
        script.lives,
        script.on_command,
        host_key_in_log=script.host_key_in_log,
        tools=script.tools,
    )
    if script.full:
        answers = iter([shutil.disk_usage("/")._replace(free=10)] * script.full)
        monkeypatch.setattr(shell.shutil, "disk_usage", lambda path, ask=shutil.disk_usage: next(answers, ask(path)))
    if script.name == "a hook is elsewhere":
        fake.webhook_faults = ["307"]
    with serve(fake):
        settings = {"webhook": fake.url.replace("/v2", "/hook"), **script.settings}
        code, result = run(fake, tmp_path, script.command, **settings)
    said = capfd.readouterr().err + str(result)
    assert_over(fake, tmp_path, said)
    assert re.search(script.says, said, re.MULTILINE), said
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", said) and not fake.elsewhere
    assert (code, len(fake.pods), fake.most_at_once <= 1) == (script.code, script.pods, True), said
    assert not any(any(script) for script in fake.faults.values()), fake.faults  # all of it happened
    if code == 0 and script.command is JOB and not script.settings:
        (answer,) = (tmp_path / "state").glob("*/results/artifacts/answer")
        assert answer.read_text() == "42\n"
        assert (tmp_path / "state" / result["run"] / "log").read_text() == "working\ndone\n"
        last = json.loads(fake.webhooks[-1][1])
        assert last["event"] == "end" and last["cost"] > 0


# ---- killed from outside


def start(fake, tmp_path, *flags, job=JOB):
    """`launch up` in a process of its own."""
    values = {**QUICK, "budget": 5.0, "state_dir": tmp_path / "state"}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "grpo_gsm8k.cli", "launch", "up", *words, *flags, "--", *job]
    env = {**os.environ, "RUNPOD_API_BASE_URL": fake.url}
    return subprocess.Popen(command, cwd=REPOSITORY, env=env, stderr=subprocess.PIPE, text=True)


STAGES = ("catalog", "create", "created", "running", "command_1", "command_3", "delete")


def kill_at(stage, number, tmp_path):
    """Send a signal when the fake sees `stage`; what became of it."""
    fake = FakeRunpod(tmp_path / "pods", SECRETS["RUNPOD_API_KEY"])
    shown = []
    with serve(fake):
        process = start(fake, tmp_path, job=["sh", "-c", "mkdir -p artifacts; sleep 0.5"])

        def watch(event):
            if event == stage and not shown:
                shown.append(Path(f"/proc/{process.pid}/cmdline").read_bytes())
                shown.append(Path(f"/proc/{process.pid}/status").read_bytes())
                process.send_signal(number)

        fake.watch = watch
        said = process.communicate(timeout=180)[1]
        left = fake.billable()
        os.environ["RUNPOD_API_BASE_URL"] = fake.url
        reaped = manage.reap(tmp_path / "state", everything=True) if number == signal.SIGKILL else {"deleted": []}
        del os.environ["RUNPOD_API_BASE_URL"]
        again = fake.billable()
    assert shown and not any(secret.encode() in shown[0] for secret in SECRETS.values())
    return process.returncode, said, left, reaped["deleted"], again, fake


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        pytest.param(
            stage, number, marks=[] if (stage, number) == ("command_3", signal.SIGTERM) else [pytest.mark.slow]
        )
        for stage in STAGES
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ],
)
def test_a_signal_ends_the_run_and_its_pod(stage, number, tmp_path):
    code, said, _, _, left, fake = kill_at(stage, number, tmp_path)
    assert left == [] and code == (0 if stage == "delete" else 128 + number), said
    assert_over(fake, tmp_path, said)


@pytest.mark.parametrize("stage", [s if s == "created" else pytest.param(s, marks=pytest.mark.slow) for s in STAGES])
def test_what_a_killed_launcher_leaves_is_reaped(stage, tmp_path, capfd):
    code, _, before, deleted, left, fake = kill_at(stage, signal.SIGKILL, tmp_path)
    assert code == -signal.SIGKILL and left == []
    assert [row["pod"] for row in deleted] == before
    said = capfd.readouterr().err
    assert "ended; it cost about $" in said
    assert_no_secret(fake, tmp_path, said)


# ---- from another machine, and later


@pytest.fixture
def account(tmp_path, monkeypatch):
    """A fake that serves, and the function that puts a pod of that name on its ledger."""
    fake = FakeRunpod(tmp_path / "pods", SECRETS["RUNPOD_API_KEY"])

    def put(name):
        pod = Pod(
            next(fake.numbers), {"name": name, "gpu": {"id": "NVIDIA L40S", "count": 2}, "env": {}}, "ok", fake.folder
        )
        fake.pods[pod.id] = pod
        return pod.id

    with serve(fake):
        monkeypatch.setenv("RUNPOD_API_BASE_URL", fake.url)
        yield fake, put


def test_reap_needs_only_the_name(account, tmp_path):
    fake, put = account
    old, new = put("grpo-gsm8k-a-000001-20200101T000000Z"), put("grpo-gsm8k-b-000002-20990101T000000Z")
    put("somebody-elses-20200101T000000Z"), put("grpo-gsm8k-c-000003-20209999T000000Z")
    assert [row["run"] for row in manage.status(tmp_path)["pods"]] == ["a-000001", "b-000002"]
    assert [row["pod"] for row in manage.reap(tmp_path, everything=False)["deleted"]] == [old]
    assert manage.down(tmp_path, "b-000002")["deleted"][0]["pod"] == new
    assert fake.billable() == ["pod3", "pod4"]
    with pytest.raises(ConfigError, match="no run on record"):
        manage.down(tmp_path, "b-000002")


def test_a_pod_that_could_not_be_deleted_is_named_and_reaped_later(tmp_path, capfd, monkeypatch):
    fake = FakeRunpod(tmp_path / "pods", SECRETS["RUNPOD_API_KEY"], {"delete": ["500"] * 60})
    with serve(fake):
        code, result = run(fake, tmp_path, delete_s=0.2)
        said = capfd.readouterr().err
        assert code == 1 and "pod1 could not be deleted" in str(result)
        assert "AND MAY GO ON COSTING: pod1" in said and fake.billable() == ["pod1"]
        fake.faults.clear()
        monkeypatch.setenv("RUNPOD_API_BASE_URL", fake.url)
        manage.reap(tmp_path / "state", everything=True)
    assert fake.billable() == []


@pytest.mark.slow
def test_attach_goes_on_where_a_killed_launcher_was(tmp_path, capfd, monkeypatch):
    fake = FakeRunpod(tmp_path / "pods", SECRETS["RUNPOD_API_KEY"])
    with serve(fake):
        monkeypatch.setenv("RUNPOD_API_BASE_URL", fake.url)
        process = start(
            fake, tmp_path, job=["sh", "-c", "mkdir artifacts; echo one; sleep 1; echo two; echo 7 > artifacts/x"]
        )
        fake.watch = lambda event: process.kill() if event == "command_3" else None
        process.communicate(timeout=60)
        fake.watch = lambda event: None
        assert manage.reap(tmp_path / "state", everything=False) == {"deleted": []}  # its job runs: it may be wanted
        manage.logs(tmp_path / "state", "run")
        assert capfd.readouterr().out.startswith("one\n")
        done = manage.attach(tmp_path / "state", "run")
    assert fake.billable() == [] and done["exit_code"] == 0 and len(fake.pods) == 1
    assert Path(done["log"]).read_text() == "one\ntwo\n"
    assert (Path(done["results"]) / "artifacts" / "x").read_text() == "7\n"


UNREADABLE: dict[str, Any] = {
    "empty": "",
    "truncated": '{"run": "run-00000',
    "nan": '{"run": "run-000001", "deadline": NaN}',
    "version": '{"run": "run-000001", "colour": "blue", "leases": []}',
    "list": "[]",
    "types": None,
    "leases": None,
    "deep": "[" * 100_000,
    "bytes": "\xff\x00",
}


@pytest.mark.parametrize("how", [*UNREADABLE, "folder", "fifo", "link"])
def test_an_unreadable_record_is_named_and_the_others_are_served(account, tmp_path, capfd, how):
    fake, put = account
    state = tmp_path / "state"
    mine = records.Record("b-000002", ["x"], 1.0, 4e9, {}, leases=[records.Lease("pod2", "g", 1.0, 1.0)], stage="boot")
    records.begin(mine, state)
    good = json.loads((state / "b-000002" / "state.json").read_text())
    path = state / "a-000001" / "state.json"
    path.parent.mkdir()
    if how == "folder":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "link":
        path.symlink_to("/dev/zero")
    else:
        wrong = {"types": {**good, "deadline": "soon"}, "leases": {**good, "leases": [{"pod_id": 3}]}}
        text = json.dumps(wrong[how]) if how in wrong else UNREADABLE[how]
        path.write_text(text, encoding="latin-1")
    for name in ("a-000001-20990101T000000Z", "b-000002-20990101T000000Z", "c-000003-20200101T000000Z"):
        put(f"grpo-gsm8k-{name}")
    rows = manage.status(state)["pods"]
    assert [(row["run"], row["stage"]) for row in rows] == [
        ("a-000001", "unknown here"),
        ("b-000002", "boot"),
        ("c-000003", "unknown here"),
    ]
    assert "a-000001/state.json" in capfd.readouterr().err
    manage.logs(state, "b")
    assert [row["pod"] for row in manage.reap(state, everything=False)["deleted"]] == ["pod2", "pod3"]
    assert [row["pod"] for row in manage.down(state, "a-000001")["deleted"]] == ["pod1"]
    assert fake.billable() == []


def test_reap_all_asks_before_it_deletes_what_may_be_a_colleagues(account, tmp_path, capfd, monkeypatch):
    fake, put = account
    state = tmp_path / "state"
    mine = records.Record("a-000001", ["x"], 1.0, 4e9, {}, leases=[records.Lease("pod1", "g", 1.0, 1.0)], stage="run")
    records.begin(mine, state)
    for name in ("a-000001-20990101T000000Z", "b-000002-20990101T000000Z", "c-000003-20200101T000000Z"):
        put(f"grpo-gsm8k-{name}")
    dry = manage.reap(state, everything=True, dry_run=True)
    assert [(row["pod"], row["record"]) for row in dry["would_delete"]] == [
        ("pod1", "here"),
        ("pod2", "elsewhere"),
        ("pod3", "elsewhere"),
    ]
    with pytest.raises(ConfigError, match=r"may be a colleague's: pod2 of b-000002, until 2099.*--yes"):
        manage.reap(state, everything=True)
    assert len(fake.billable()) == 3
    for answer, left in (("n\n", 3), ("\n", 3), ("y\n", 0)):
        read, write = pty.openpty()
        with os.fdopen(read, "r+b", 0) as ours, os.fdopen(write, "r") as theirs, monkeypatch.context() as patch:
            ours.write(answer.encode())
            patch.setattr(sys, "stdin", theirs)
            patch.setattr(sys.stderr, "isatty", lambda: True)
            manage.reap(state, everything=True)
        assert len(fake.billable()) == left
    put("grpo-gsm8k-d-000004-20990101T000000Z")
    assert [row["pod"] for row in manage.reap(state, everything=True, yes=True)["deleted"]] == ["pod4"]


@pytest.mark.parametrize("flag", ["hours", "budget", "fetch_s", "poll_s", "min_memory", "delete_s"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_numbers_that_no_record_can_hold_are_refused(tmp_path, flag, value):
    with pytest.raises(ConfigError, match=flag):
        up.up({**QUICK, "state_dir": str(tmp_path / "state"), flag: value}, JOB)
    assert not (tmp_path / "state").exists()


# ---- the pod's own end


@pytest.mark.parametrize(
    ("files", "limits", "why"),
    [
        ({}, (1e10, 900, 3600), ""),
        ({}, (0, 900, 3600), "deadline has passed"),
        ({}, (1e10, 900, 0), "nothing was heard"),
        ({"log": ""}, (1e10, 900, 3600), ""),
        ({"log": "", "status": "0"}, (1e10, 900, 0), ""),
        ({"log": "", "status": "0"}, (1e10, 0, 3600), "nobody came"),
        ({"log": "", "status": "0", "fetching": ""}, (1e10, 0.5, 3600), "nobody came"),
        ({"log": "", "status": "-600", "fetching": ""}, (1e10, 300, 3600), ""),
        ({"log": "", "status": "-600", "fetching": "-400"}, (1e10, 300, 3600), "nobody came"),
        ({"DONE": ""}, (1e10, 900, 3600), "started again after its job"),
        ({"boots": "6"}, (1e10, 900, 3600), "started 6 times"),
    ],
)
def test_a_pod_knows_when_to_end(tmp_path, files, limits, why):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        if text.startswith("-"):  # seconds ago
            os.utime(tmp_path / name, (time.time() + int(text),) * 2)
    now = time.time()
    found = watchdog.reason_to_end(tmp_path, watchdog.Limits(*limits), now, now + 1)
    assert why in found and bool(found) == bool(why)


@pytest.mark.slow
@pytest.mark.parametrize("refused", [False, True])
def test_the_watchdog_ends_a_forgotten_pod_or_its_job(tmp_path, refused):
    """The launcher is killed; the job ends in the pod, and nobody comes."""
    faults = {"action": ["403"] * 400} if refused else {}
    fake = FakeRunpod(tmp_path / "pods", SECRETS["RUNPOD_API_KEY"], faults, run_args=True)
    with serve(fake):
        job = ["sleep", "30"] if refused else ["true"]
        process = start(fake, tmp_path, "--grace_s", "0.2", "--stale_s", "0.8", job=job)
        fake.watch = lambda event: process.kill() if event == "command_2" else None
        process.communicate(timeout=60)
        home, until = tmp_path / "pods" / "pod1", time.monotonic() + 20
        ended = "CANNOT END THIS POD (HTTP 403), IT GOES ON COSTING MONEY; its job was killed" if refused else "asked"
        while ended not in (home / "container.log").read_text() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.2)
        log = (home / "container.log").read_text()
        assert "own key sees it" in log and ended in log
        assert fake.billable() == (["pod1"] if refused else [])
        assert "pod1-key" not in log


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_watchdog_keeps_its_key_to_itself(tmp_path, status):
    met = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            met.append((self.headers.get("Host"), self.headers.get("Authorization")))
            self.send_response(status if self.path.startswith("/v2") else 200)
            self.send_header("Location", f"http://localhost:{server.server_port}/elsewhere")
            self.end_headers()

        do_GET = do_POST = answer

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    base = f"http://127.0.0.1:{server.server_port}/v2/"
    env = {"RUNPOD_POD_ID": "p", "RUNPOD_API_KEY": "k", "RUNPOD_API_BASE_URL": base}
    said = watchdog.end(tmp_path / "job", env)
    server.shutdown()
    thread.join()
    server.server_close()
    assert said.startswith(f"CANNOT END THIS POD (HTTP {status}, a redirect, which is not followed)")
    assert met == [(f"127.0.0.1:{server.server_port}", "Bearer k")]
    for base in ("file:///etc/passwd", "data:,x", "http://["):
        assert "CANNOT END" in watchdog.end(tmp_path / "job", {**env, "RUNPOD_API_BASE_URL": base})
    assert "ValueError" in watchdog.end(tmp_path / "job", {**env, "RUNPOD_API_KEY": "k\nk"})


def test_a_deadline_that_never_comes_does_not_keep_a_pod_alive():
    limits = watchdog.Limits.of({"GRPO_GSM8K_DEADLINE": "nan", "GRPO_GSM8K_GRACE_S": "inf", "GRPO_GSM8K_STALE_S": "x"})
    assert limits.deadline < time.time() + 86401 and (limits.grace_s, limits.stale_s) == (900, 3600)


# ---- words to the outside


def test_a_webhook_that_fails_hangs_or_lies_never_slows_the_run(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(webhook.Webhook.__init__, "__defaults__", (0.3,))
    fake = FakeRunpod(tmp_path / "pods", SECRETS["RUNPOD_API_KEY"])
    fake.webhook_faults = ["503", "429", "404", "hang"]
    with serve(fake):
        code, done = run(fake, tmp_path, webhook=fake.url.replace("/v2", "/hook"))
    assert code == 0 and done["seconds"] < 4
    assert "webhook events could not be delivered" in capfd.readouterr().err


def test_events_are_signed_and_shaped(tmp_path, monkeypatch):
    fake = FakeRunpod(tmp_path / "pods", SECRETS["RUNPOD_API_KEY"])
    metrics = '{"step": 4, "reward/mean": 0.5, "val/accuracy": 0.25}'
    job = ["sh", "-c", f"mkdir -p artifacts/a; echo '{metrics}' > artifacts/a/metrics.jsonl; sleep 0.2"]
    with serve(fake):
        monkeypatch.setenv("GRPO_GSM8K_WEBHOOK", fake.url.replace("/v2", "/hook"))
        run(fake, tmp_path, job)
        run(fake, tmp_path, job, webhook_form="discord")
    secret = SECRETS["GRPO_GSM8K_WEBHOOK_SECRET"].encode()
    for headers, body in fake.webhooks:
        assert headers["X-Grpo-Gsm8k-Signature"] == f"sha256={hmac.new(secret, body, hashlib.sha256).hexdigest()}"
    said = [json.loads(body) for _, body in fake.webhooks]
    plain = [event for event in said if "event" in event]
    assert {"event", "message", "timestamp", "stage", "project", "repo_id"} <= plain[0].keys()
    (step,) = (event for event in plain if event["event"] == "step")
    assert (step["step"], step["reward"], step["accuracy"], step["stage"]) == (4, 0.5, 0.25, "train")
    assert {event["event"]: event["stage"] for event in plain} == {
        **{"create": "setup", "state": "setup", "run": "train", "step": "train", "fetch": "fetch", "end": "end"},
    }
    assert [e["event"] for e in plain][-1] == "end"
    assert any("step 4" in event.get("content", "") and "accuracy 0.25" in event["content"] for event in said)
    assert "reward 0.5" in webhook.FORMS["slack"](step)["text"]


# ---- how a job is, and what comes home


@pytest.mark.parametrize(
    ("files", "kill", "state"),
    [
        ({"status": "3"}, "false", "3"),
        ({"pid": "1"}, "true", "running"),
        ({}, "false", "running"),
        ({"pid": ""}, "false", "running"),
        ({"pid": "1"}, "false", "lost"),
        ({"pid": "1"}, "echo 0 > status; false", "0"),  # it ends between one question and the next
    ],
)
def test_a_job_that_ends_while_it_is_looked_at_is_not_lost(tmp_path, files, kill, state):
    (tmp_path / "grpo-job" / "work").mkdir(parents=True)
    for name, text in {"started": "", "log": "", **files}.items():
        (tmp_path / "grpo-job" / name).write_text(text)
    script = f"kill() {{ {kill}; }}\n" + shell.LOOK.format(job="grpo-job", start=1, piece=100)
    said = subprocess.run(["sh", "-s"], input=script, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[0] == state


WANDB_JOB = """
from pathlib import Path
from grpo_gsm8k.runs.sinks import Place
from grpo_gsm8k.runs.wandb_sink import WandbSink
sink = WandbSink(Place("project", "run", Path("artifacts/run"), {"data": "/home/alice/secret.jsonl", "lr": 1.0}))
sink.log(1, {"loss": 1.0})
sink.close()
Path("artifacts/model.safetensors").write_bytes(b"weights")
"""


def test_results_with_real_wandb_runs_come_home_whole(tmp_path, capfd):
    """wandb leaves absolute links in every run directory."""
    fake = FakeRunpod(tmp_path / "pods", SECRETS["RUNPOD_API_KEY"])
    job = ["sh", "-c", f"WANDB_MODE=offline WANDB_API_KEY= HF_TOKEN= exec python -c {shlex.quote(WANDB_JOB)}"]
    with serve(fake):
        code, done = run(fake, tmp_path, job, fetch_s=60.0)
    said = capfd.readouterr().err
    assert code == 0 and re.search(r"skipped: .*debug-core.log \(a link\)", said), (done, said)
    there, here = tmp_path / "pods" / "pod1" / "grpo-job" / "work", Path(done["results"])
    files = {path.relative_to(there) for path in there.rglob("*") if path.is_file() and not path.is_symlink()}
    assert len(files) == done["files"] >= 6
    assert all((here / path).read_bytes() == (there / path).read_bytes() for path in files)
    assert {path.relative_to(here) for path in here.rglob("*") if not path.is_dir()} == files
    assert len(done["skipped"]) == 4 and len(list(here.rglob("run-*.wandb"))) == 1
    public = b"".join(path.read_bytes() for path in here.rglob("*") if path.suffix in (".wandb", ".json", ".txt"))
    hidden = (b"alice", str(tmp_path).encode(), str(Path.home()).encode() + b"/", b"/home/")
    assert b"loss" in public and not [word for word in hidden if word in public]


def test_what_is_here_is_not_asked_for_again(tmp_path, monkeypatch):
    """Parts of two files; the second is cut off behind its first file, and the next round brings the rest."""
    monkeypatch.setattr(fetch, "PART_FILES", 2)
    log, tar = tmp_path / "asked", shutil.which("tar")
    script = f"cat > {log}.new; tr '\\0' '\\n' < {log}.new >> {log}; echo >> {log}; most=9999999; "
    script += f"[ $(grep -c '^$' {log}) != 2 ] || most=900; {tar} \"$@\" < {log}.new | head -c $most"
    fake = FakeRunpod(tmp_path / "pods", SECRETS["RUNPOD_API_KEY"], tools={"tar": script})
    job = ["sh", "-c", "mkdir artifacts; for i in 1 2 3 4 5; do echo $i > artifacts/$i; done"]
    with serve(fake):
        code, done = run(fake, tmp_path, job)
    asked = [part.split() for part in log.read_text().split("\n\n") if part]
    assert code == 0 and done["files"] == 5, (done, asked)
    assert [len(part) for part in asked] == [2, 2, 1, 1] and asked[3] == asked[1][1:]
    results = Path(done["results"]) / "artifacts"
    assert all((results / f"{i}").read_text() == f"{i}\n" for i in range(1, 6))


# ---- refused before anything is rented


@pytest.mark.parametrize(
    ("command", "settings", "says"),
    [
        ([], {}, "behind --"),
        (JOB, {"image": ""}, "--image"),
        (JOB, {"budget": 0.0}, "--budget"),
        (JOB, {"budget": 1.9, "hours": 2.0, "gpu": "NVIDIA L40S"}, r"2 hours cost \$1.98"),
        (JOB, {"count": 3}, "must be one of 1, 2, 4, 6, 8"),
        (JOB, {"name": "A b"}, "lower-case"),
        (JOB, {"gpu": "NVIDIA ABACUS"}, "the catalog has no NVIDIA ABACUS"),
        (JOB, {"min_memory": 200.0}, "with 200 GiB"),
        (JOB, {"fetch": "../../etc"}, "below the job's folder"),
        (["echo", "hf_TOKEN0123456789abcdef"], {}, "holds the value of HF_TOKEN"),
        (JOB, {"think_open": "<r>"}, "tags come in pairs"),
        (JOB, {"think_open": "<r>", "think_close": "</r>", "answer_open": "<a>"}, "tags come in pairs"),
        (JOB, {"think_open": "<r>", "think_close": "<r>"}, "differ from each other"),
        (JOB, {"answer_open": "<a>"}, "tags come in pairs"),
        (["--max_steps", "5"], {}, "behind --.*--model_id"),
        ([], {"repo_id": "unsloth/gemma-2b"}, "or --model_id, which.* --repo_id is where it is pushed to"),
        (JOB, {"report_to": "mlflow"}, "must be one of"),
    ],
)
def test_refused_before_anything_is_rented(tmp_path, capfd, command, settings, says):
    fake = FakeRunpod(tmp_path / "pods", SECRETS["RUNPOD_API_KEY"])
    with serve(fake):
        code, fault = run(fake, tmp_path, command, **settings)
    assert code == 2 and re.search(says, str(fault)), fault
    assert not fake.requests["create"]
    assert_no_secret(fake, tmp_path, str(fault), capfd.readouterr().err)


@pytest.mark.parametrize("name", OWN_KEYS)
def test_a_key_that_is_none_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, str(tmp_path / "no key"))
    fake = FakeRunpod(tmp_path / "pods", SECRETS["RUNPOD_API_KEY"])
    with serve(fake):
        code, fault = run(fake, tmp_path)
    assert code == 2 and name in str(fault) and not fake.met


def test_ones_own_key_may_log_in_too(tmp_path, monkeypatch, capfd):
    locked, mine = tmp_path / "locked", asyncssh.generate_private_key("ssh-ed25519")
    mine.write_private_key(str(locked), "pkcs8-pem", passphrase="x")
    monkeypatch.setenv("SSH_PRIVATE_KEY_PATH", str(locked))
    with pytest.raises(ConfigError, match=r"passphrase needs its \.pub"):
        shell.own_keys()
    mine.write_public_key(f"{locked}.pub")
    other = asyncssh.generate_private_key("ssh-rsa").export_public_key().decode().strip()
    monkeypatch.setenv("RUNPOD_SSH_PUBLIC_KEY", other)
    fake = FakeRunpod(tmp_path / "pods", SECRETS["RUNPOD_API_KEY"])
    with serve(fake):
        assert run(fake, tmp_path)[0] == 0
    env = fake.requests["create"][0]["env"]
    assert env["SSH_PUBLIC_KEY"].splitlines() == [other, Path(f"{locked}.pub").read_text().strip()]
    assert env["PUBLIC_KEY"] not in env["SSH_PUBLIC_KEY"]
    assert re.search(r"your own key may log in, too: ssh -p \d+ \w+@127.0.0.1", capfd.readouterr().err)


def test_an_error_is_an_event_with_the_end_of_the_log_here_and_on_discord(tmp_path, monkeypatch):
    fake = FakeRunpod(tmp_path / "pods", SECRETS["RUNPOD_API_KEY"])
    command = ["sh", "-c", "seq 900; echo the last words of $HF_TOKEN; exit 3"]
    with serve(fake):
        monkeypatch.setenv("DISCORD_WEBHOOK_URL", fake.url.replace("/v2", "/hook"))
        run(fake, tmp_path, command, webhook=fake.url.replace("/v2", "/hook"))
    said = [json.loads(body) for _, body in fake.webhooks]
    (error,) = (event for event in said if event.get("event") == "error")
    assert error["message"] == "the job ended with exit code 3" and error["tail"].endswith(
        "\n900\nthe last words of [secret]\n"
    )
    (discord,) = (event["content"] for event in said if "exit code 3" in event.get("content", ""))
    assert discord.endswith("the last words of [secret]\n```") and 1900 < len(discord) <= 2000


@pytest.mark.parametrize(("report_to", "passed"), [("", True), ("wandb", True), ("none", False)])
def test_report_to_decides_whether_the_job_has_the_key(tmp_path, report_to, passed):
    fake = FakeRunpod(tmp_path / "pods", SECRETS["RUNPOD_API_KEY"])
    with serve(fake):
        _, done = run(fake, tmp_path, ["sh", "-c", "echo ${WANDB_API_KEY:+has it}"], report_to=report_to)
    assert (Path(done["log"]).read_text() == "has it\n") is passed


def test_report_to_wandb_needs_the_key(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(ConfigError, match="WANDB_API_KEY holds no key"):
        up.up({**QUICK, "report_to": "wandb"}, JOB)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("L40S", "NVIDIA L40S"),
        ("A100 SXM", "NVIDIA A100-SXM4-80GB"),
        ("H100 SXM", "NVIDIA H100 80GB HBM3"),
        ("h200", "NVIDIA H200"),
        ("NVIDIA H200", "NVIDIA H200"),
        ("H", "H"),  # of two
        ("V100", "V100"),
    ],
)
def test_gpus_have_short_names(name, gpu):
    assert up.gpu_called(name, CATALOG) == gpu


def test_the_image_is_the_latest_release_of_ones_own_repository(monkeypatch):
    def image(*command, **flags):
        return job.with_image(config.build(UpConfig, flags), command).image

    with pytest.raises(ConfigError, match="--image is needed"):
        image("true")
    monkeypatch.setattr(job.repro, "origin", lambda: "git@github.com:Some-One/grpo-gsm8k.git")
    assert image("true") == "ghcr.io/some-one/grpo-gsm8k:latest"
    assert image("grpo-gsm8k", "grpo", "--engine", "vllm") == "ghcr.io/some-one/grpo-gsm8k:latest-vllm"
    assert image("sh", "-c", "exec grpo-gsm8k ei --vllm_device cuda:1").endswith("-vllm")
    monkeypatch.setenv("GRPO_GSM8K_IMAGE", "i@sha256:0")
    assert image("true") == "i@sha256:0" and image("true", image="mine") == "mine"


THINK_ONLY = ["--think_open", "<think>", "--think_close", "</think>", "--answer_open", "", "--answer_close", ""]


@pytest.mark.parametrize(
    ("flags", "words", "tags"),
    [
        ({}, [], THINK_ONLY),
        ({}, ["--max_steps", "5"], THINK_ONLY),
        ({"answer_open": "<a>", "answer_close": "</a>"}, [], [*THINK_ONLY[:5], "<a>", "--answer_close", "</a>"]),
        (
            {"think_open": "<r>", "think_close": "</r>"},
            [],
            ["--think_open", "<r>", "--think_close", "</r>", *THINK_ONLY[4:]],
        ),
    ],
)
def test_without_a_job_the_model_is_trained_with_think_only_prompts(flags, words, tags):
    def steps(**more):
        shell_, c, script = job.job_of(config.build(UpConfig, {"model_id": "a/b", **flags, **more}), words)
        assert (shell_, c) == ("sh", "-c")
        return [shlex.split(step) for step in script.split(" && ")]

    doctor, data, train = steps()
    assert doctor == ["grpo-gsm8k", "doctor", "--model_id", "a/b"]
    assert data == ["grpo-gsm8k", "data", "--out_dir", "artifacts/data"]
    assert train[:3] == ["exec", "grpo-gsm8k", "grpo"] and train[-len(words + tags) :] == [*tags, *words]
    cfg = parsed_settings(train[2:])
    assert (cfg.model_id, cfg.engine, cfg.prompt_style, cfg.resume) == ("a/b", "vllm", "r1_zero", True)
    assert steps(skip_setup=True) == [data, train]
    sft = parsed_settings(steps(sft=True)[-1][2:])
    assert isinstance(sft, config.SftConfig) and sft.data == "artifacts/data" and not sft.uses_vllm


def parsed_settings(words):
    """The config that a stage's command line makes."""
    from grpo_gsm8k import cli

    asked = cli.app.tree.commands[words[0]].make_context(words[0], list(words[1:]), **cli.app.info.context_settings)
    given = {key: value for key, value in asked.params.items() if value is not None}
    return config.resolve(words[0], flags={key: given[key] for key in given if key not in ("as_json", "sets")})


@pytest.mark.parametrize(
    ("command", "model", "stage"),
    [
        ("grpo-gsm8k sft --model_id A/b-1.5", "A/b-1.5", "sft"),
        ("python -m grpo_gsm8k.cli grpo --model-id=A/b --lora_rank 8", "A/b", "grpo"),
        ("grpo-gsm8k grpo --model_name A/b", "A/b", "grpo"),
        ("grpo-gsm8k pipeline --preset full --data d", "Qwen/Qwen2.5-Math-1.5B", "pipeline"),
        ("grpo-gsm8k pipeline --preset quick --task chat", "Qwen/Qwen2.5-0.5B-Instruct", "pipeline"),
        ("grpo-gsm8k demo", "", "demo"),
        ("grpo-gsm8k pipeline --preset tiny", "", "pipeline"),
        ("grpo-gsm8k grpo --model_id artifacts/model", "", "grpo"),
        ("sh -c 'nvidia-smi && grpo-gsm8k sft --model_id A/b'", "A/b", "sft"),
        ("""sh -c "echo it's" """, "", None),
        ("true", "", None),
    ],
)
def test_the_model_of_a_job_is_read_from_its_command(command, model, stage):
    asked = job.asked_of(shlex.split(command))
    assert (job.model_of(asked), asked.get("stage")) == (model, stage)


def test_tags_travel_to_the_job_as_pairs(tmp_path):
    fake = FakeRunpod(tmp_path / "pods", SECRETS["RUNPOD_API_KEY"])
    tags = {"think_open": "<r x>", "think_close": "</r>", "answer_open": "<a>", "answer_close": "</a>"}
    with serve(fake):
        _, done = run(fake, tmp_path, ["printf", "%s|"], **tags)
    assert (
        Path(done["log"]).read_text() == "--think_open|<r x>|--think_close|</r>|--answer_open|<a>|--answer_close|</a>|"
    )
