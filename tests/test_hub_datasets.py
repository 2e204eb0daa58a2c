"""Data sets of the hub for fine-tuning: names, columns, revisions, and a hub that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from grpo_gsm8k import hub_datasets
from grpo_gsm8k.errors import ConfigError, DataError
from grpo_gsm8k.hub_datasets import HubName, chat_row, local_path, parse
from grpo_gsm8k.tasks.conversations import load_pairs
from tests import fake_hub
from tests.toys import REPOSITORY

COMMIT = "c" * 40
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("hf:a/b", HubName("a/b", "train")),
        ("hf:a/b:test", HubName("a/b", "test")),
        ("hf:a/b:train[:10%]", None),
        ("hf:a/b:test@v1.0", HubName("a/b", "test", revision="v1.0")),
        ("hf:a/b@refs/pr/1:test", HubName("a/b", "test", revision="refs/pr/1")),
        ("hf:a/b@main", HubName("a/b", "train", revision="main")),
        ("hf:a/b/main:test", HubName("a/b", "test", "main")),
        ("hf:a", None),
        ("hf:", None),
        ("hf:a/b/c/d", None),
        ("hf:a/b:", None),
        ("hf:a/b@", None),
        ("hf:../b c", None),
    ],
)
def test_names(spec: str, name: HubName | None) -> None:
    if name:
        assert parse(spec) == name
    else:
        with pytest.raises(ConfigError, match=r"must read hf:OWNER/NAME\[/CONFIG\]"):
            parse(spec)


def test_conversational_prompts_and_completions_are_joined() -> None:
    prompt, completion = MESSAGES[:1], MESSAGES[1:]
    joined = {"messages": MESSAGES}
    assert chat_row({"prompt": prompt, "completion": completion}, ("prompt", "completion")) == joined
    assert chat_row({"prompt": "Hi", "completion": completion}, ("prompt", "completion")) == joined
    assert chat_row({"prompt": "Hi", "response": "Hello"}, ("prompt", "response")) == {
        "prompt": "Hi",
        "response": "Hello",
    }


@pytest.mark.parametrize("odd", [None, object(), float("nan"), [object()], {"a": object()}])
def test_what_is_no_text_is_refused_with_its_line(tmp_path: Path, odd: Any) -> None:
    rows = [
        chat_row({"prompt": odd, "response": "x"}, ("prompt", "response")),
        chat_row({"messages": odd}, ("messages",)),
        chat_row({"messages": [{"role": "user", "content": odd}, odd]}, ("messages",)),
    ]
    for row in rows:
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=r"rows\.jsonl:1: .*must be"):
            load_pairs(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub of one data set. The real library takes five seconds to import: `test_over_http` has it."""
    import huggingface_hub

    made = SimpleNamespace(rows=[{"messages": MESSAGES, "id": 1}], calls=[], sha=COMMIT, asked="")

    def load(name: HubName, commit: str) -> Any:
        made.calls.append((name, commit))
        return list(made.rows[0]) if made.rows else ["messages"], iter(made.rows)

    def dataset_info(self: Any, repo: str, *, revision: str | None, timeout: float) -> Any:
        made.asked = revision
        return SimpleNamespace(sha=made.sha)

    monkeypatch.setattr(hub_datasets, "load", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.chdir(tmp_path)
    return made


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{**MESSAGES[0], "name": "me"}, MESSAGES[1]], "score": 3},
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    ],
)
def test_every_form_becomes_the_same_conversation(hub: SimpleNamespace, row: dict[str, Any]) -> None:
    hub.rows = [row, row]
    path = local_path("hf:me/chats:train@v1")
    assert [c.messages for c in load_pairs(path)] == [(("user", "Hi"), ("assistant", "Hello"))] * 2
    assert hub.calls == [(HubName("me/chats", "train", revision="v1"), COMMIT)]
    assert hub.asked == "v1"
    source = json.loads(path.with_suffix(".source.json").read_text())
    assert (source["dataset"], source["revision"], source["split"], source["rows"]) == ("me/chats", COMMIT, "train", 2)
    assert COMMIT in str(path)


def test_what_is_there_is_read_without_the_library(hub: SimpleNamespace) -> None:
    first = local_path(f"hf:me/chats@{COMMIT}")
    hub.asked = "nobody"
    assert local_path(f"hf:me/chats@{COMMIT}") == first
    assert (len(hub.calls), hub.asked) == (1, "nobody")


def test_a_run_goes_on_with_the_commit_that_it_began_with(hub: SimpleNamespace, tmp_path: Path) -> None:
    first = local_path("hf:me/chats")
    made = json.loads(first.with_suffix(".source.json").read_text())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data.json").write_text(json.dumps({"train": {"path": str(first), "from": made}}))
    hub.sha = "d" * 40
    assert local_path("hf:me/chats", str(tmp_path / "run")) == first
    assert local_path("hf:me/chats", str(tmp_path / "new")) != first
    assert local_path("hf:you/chats", str(tmp_path / "run")) != first


def test_unknown_columns_and_empty_splits_are_mistakes(hub: SimpleNamespace) -> None:
    hub.rows = [{"question": "x", "answer": "y"}]
    with pytest.raises(DataError, match="has the columns question, answer; needed are messages, prompt and response"):
        local_path("hf:me/chats")
    hub.rows = []
    with pytest.raises(DataError, match=r"hf:me/chats: the split 'train' has no rows"):
        local_path("hf:me/chats")


def test_no_network_is_a_mistake_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the tests run with HF_HUB_OFFLINE
    with pytest.raises(
        ConfigError, match=r"--data_path hf:me/chats: the hub cannot be reached: .*a local JSONL"
    ) as caught:
        local_path("hf:me/chats")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ---- over HTTP, in a process of its own


class DatasetHub(fake_hub.FakeHub):
    """A hub with data sets; `me/chats` has one file."""

    def app(self) -> web.Application:
        app = super().app()
        at = "/api/datasets/{owner}/{name}"
        app.router.add_get(at, self.model)
        app.router.add_get(at + "/revision/{revision}", self.of_revision)
        app.router.add_get(at + "/tree/{revision}", self.tree)
        app.router.add_get(at + "/tree/{revision}/{path:.*}", self.tree)
        app.router.add_post(at + "/paths-info/{revision}", self.paths_info)
        app.router.add_route("*", "/datasets/{owner}/{name}/resolve/{revision}/{path:.*}", self.resolve)
        return app

    async def of_revision(self, request: web.Request) -> web.Response:
        if request.match_info["revision"] not in ("main", "v1", COMMIT):
            return web.json_response(
                {"error": "Invalid rev id"}, status=404, headers={"X-Error-Code": "RevisionNotFound"}
            )
        return await self.model(request)

    async def paths_info(self, request: web.Request) -> web.Response:
        form = await request.post() if request.content_type != "application/json" else await request.json()
        paths = form.getall("paths") if hasattr(form, "getall") else form["paths"]
        files = self.files.get(self._repo(request), {})
        rows = [
            {"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in paths if path in files
        ]
        return web.json_response(rows)


def fetch(url: str, cwd: Path, *specs: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\nfrom grpo_gsm8k.hub_datasets import local_path\nfrom grpo_gsm8k.errors import GrpoError\n"
        "for spec in sys.argv[1:]:\n"
        "    try: print(local_path(spec))\n"
        "    except GrpoError as fault: print(fault.exit_code, fault)\n"
    )
    own = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HOME": str(cwd / "home")}
    environment = {**os.environ, **own, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(REPOSITORY), "HF_TOKEN": ""}
    return subprocess.run(
        [sys.executable, "-c", code, *specs],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_over_http(tmp_path: Path) -> None:
    hub = DatasetHub("hf_token")
    rows = "".join(json.dumps({"messages": MESSAGES}) + "\n" for _ in range(3))
    hub.files["me/chats"] = {"train.jsonl": rows.encode(), "README.md": b"# chats\n"}
    hub.public.add("me/chats")
    with fake_hub.serve(hub) as running:
        done = fetch(
            running.url, tmp_path, "hf:me/chats", "hf:me/chats:train@v1", "hf:me/no", "hf:me/chats@v9", "hf:me/chats:no"
        )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0] == lines[1] == f"artifacts/hub/me--chats/{COMMIT}/train.jsonl"
    assert len(load_pairs(tmp_path / lines[0])) == 3
    assert lines[2].startswith("2 --data_path hf:me/no: the hub has no such data set")
    assert lines[3].startswith("2 --data_path hf:me/chats: the hub has no revision 'v9'")
    assert lines[4].startswith("2 --data_path hf:me/chats:no@cccccccccccc: Unknown split")
    assert len(lines) == 5


@pytest.mark.slow
def test_a_hub_that_is_not_there_is_found_out_in_a_second(tmp_path: Path) -> None:
    began = time.monotonic()
    done = fetch("http://127.0.0.1:9", tmp_path, "hf:me/chats")
    assert done.stdout.startswith("2 --data_path hf:me/chats: the hub cannot be reached")
    assert time.monotonic() - began < 10  # most of it is Python's start on a busy machine


def test_the_library_is_not_loaded_before_it_is_needed() -> None:
    assert "datasets" not in vars(hub_datasets)
