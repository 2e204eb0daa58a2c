"""`launch … --dry_run`: what would be asked for, run and deleted, and nothing that costs."""

from __future__ import annotations

import json

import pytest

from grpo_gsm8k import cli
from tests.fake_runpod import FakeRunpod, Pod, serve

KEY, TOKEN = "rpa_KEY0123456789abcdef", "hf_TOKEN0123456789abcdef"
IMAGE = "ghcr.io/owner/name@sha256:" + "0" * 64
UP = ["launch", "up", "--image", IMAGE, "--budget", "5", "--dry_run"]


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("RUNPOD_API_KEY", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def run(*argv):
        code = 0
        try:
            cli.main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code or 0
        assert not list(tmp_path.glob("artifacts/*")) or "down" in argv  # nothing is recorded
        return code, *capsys.readouterr()

    return run


def test_without_a_key_it_shows_the_request_and_the_job_and_asks_nobody(call, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    flags = ["--hours", "2", "--gpu", "NVIDIA H200", "--count", "2", "--repo_id", "me/run", "--json"]
    code, out, err = call(*UP, *flags, "--", "grpo-gsm8k", "demo")
    told = json.loads(out)
    assert (code, err) == (0, "") and TOKEN not in out
    assert told["would_try"] == [{"gpu": "NVIDIA H200"}] and told["hours"] == 2.0
    assert told["request"]["gpu"] == {"id": "NVIDIA H200", "count": 2, "minCudaVersion": "13.0"}
    assert told["request"]["image"] == IMAGE and told["request"]["name"].startswith("grpo-gsm8k-run-")
    assert told["job"][:3] == ["python", "-m", "grpo_gsm8k.launch.keep"] and told["job"][-2:] == ["grpo-gsm8k", "demo"]
    assert told["passed"] == ["HF_TOKEN"] and told["not_set"] == ["WANDB_API_KEY", "RUNPOD_API_KEY"]


def test_with_a_key_it_asks_for_the_prices_alone(call, tmp_path_factory, monkeypatch):
    with serve(FakeRunpod(tmp_path_factory.mktemp("pods"), KEY)) as fake:
        monkeypatch.setenv("RUNPOD_API_KEY", KEY)
        monkeypatch.setenv("RUNPOD_API_BASE_URL", fake.url)
        code, out, _ = call(*UP, "--json", "--", "true")
        told = json.loads(out)
        assert code == 0 and not fake.pods and set(fake.met) <= {"catalog"}
        assert told["would_try"][0]["gpu"] == "NVIDIA L40S" and told["would_try"][0]["rate"] > 0
        assert told["hours"] == round(min(24.0, 5 / told["would_try"][0]["rate"]), 2)
        code, out, err = call(*UP, "--hours", "700", "--", "true")
        assert (code, out) == (2, "") and "700 hours cost $" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (UP, "give the job behind --"),
        ([*UP, "--count", "3", "--", "true"], "--count 3: must be one of"),
        (["launch", "up", "--dry_run", "--budget", "1", "--", "true"], "--image is needed"),
    ],
)
def test_it_refuses_what_the_run_would_refuse(argv, words, call):
    code, out, err = call(*argv)
    assert (code, out) == (2, "") and words in err


def test_down_lists_what_it_would_delete(call, tmp_path_factory, tmp_path, monkeypatch):
    fake = FakeRunpod(tmp_path_factory.mktemp("pods"), KEY)
    name = "grpo-gsm8k-a-000001-20990101T000000Z"
    pod = Pod(
        next(fake.numbers), {"name": name, "gpu": {"id": "NVIDIA L40S", "count": 1}, "env": {}}, "ok", fake.folder
    )
    fake.pods[pod.id] = pod
    with serve(fake):
        monkeypatch.setenv("RUNPOD_API_KEY", KEY)
        monkeypatch.setenv("RUNPOD_API_BASE_URL", fake.url)
        code, out, _ = call("launch", "down", "a-000001", "--dry_run", "--state_dir", tmp_path, "--json")
        told = json.loads(out)
        assert code == 0 and told["deleted"] == [] and [row["pod"] for row in told["would_delete"]] == [pod.id]
        assert fake.billable() == [pod.id]
        assert call("launch", "down", "b", "--dry_run", "--state_dir", tmp_path)[0] == 2
