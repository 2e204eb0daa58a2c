"""Stage 1: the split, its manifest, and what happens when something is in the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from grpo_gsm8k import data_prep
from grpo_gsm8k.data_prep import prepare
from grpo_gsm8k.errors import ConfigError, DataError, DiskError, UserError
from grpo_gsm8k.tasks import dataset, load_task
from grpo_gsm8k.tasks.dataset import content_sha256, write_splits
from grpo_gsm8k.tasks.gsm8k.problems import row_of
from tests.toys import load_split

OUTPUTS = ["manifest.json", "test.jsonl", "train.jsonl", "val.jsonl"]


def rows(kind: str, n: int) -> list[dict[str, str]]:
    return [{"question": f"{kind} question {i}?", "answer": f"It is {i}.\n#### {1000 + i:,}"} for i in range(n)]


def write_rows(path: Path, content: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten problems to train on and four to test."""
    write_rows(tmp_path / "source" / "train.jsonl", rows("train", 10))
    write_rows(tmp_path / "source" / "test.jsonl", rows("test", 4))
    return tmp_path / "source"


def ids(folder: Path, split: Any) -> list[str]:
    return [problem.id for problem in load_split(folder, split)]


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


# --- the split ----------------------------------------------------------------------------------------------


def test_small_split(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    summary = prepare(out, source, eval_n=3)
    assert (summary.train, summary.val, summary.test, summary.verified) == (7, 3, 4, False)
    assert sorted(path.name for path in out.iterdir()) == OUTPUTS
    # Python 3.11 shuffles 0…9 under seed 31415 to 2 1 6 3 5 8 0 7 4 9: a change here changes every result.
    assert ids(out, "val") == ["gsm8k-train-00001", "gsm8k-train-00002", "gsm8k-train-00006"]
    assert ids(out, "train") == [f"gsm8k-train-0000{i}" for i in (0, 3, 4, 5, 7, 8, 9)]
    assert ids(out, "test") == [f"gsm8k-test-0000{i}" for i in range(4)]
    row = json.loads((out / "val.jsonl").read_text().splitlines()[1])
    assert list(row) == ["id", "question", "answer", "gold"]
    assert row["question"] == "train question 2?"
    assert row["gold"].replace(",", "") == "1002"


def test_a_smaller_eval_n_reserves_a_subset_under_the_same_ids(tmp_path: Path, source: Path) -> None:
    questions: dict[int, dict[str, str]] = {}
    for n in (2, 5):
        prepare(tmp_path / str(n), source, eval_n=n)
        questions[n] = {problem.id: problem.text for problem in load_split(tmp_path / str(n), "val")}
    assert questions[2].items() < questions[5].items()
    assert {len(questions[2]), len(questions[5])} == {2, 5}


def test_another_seed_reserves_other_problems(tmp_path: Path) -> None:
    write_rows(tmp_path / "source" / "train.jsonl", rows("train", 100))
    write_rows(tmp_path / "source" / "test.jsonl", rows("test", 1))
    for seed in (1, 2):
        prepare(tmp_path / str(seed), tmp_path / "source", eval_n=50, seed=seed)
    assert ids(tmp_path / "1", "val") != ids(tmp_path / "2", "val")


def test_the_callers_random_state_is_left_alone(tmp_path: Path, source: Path) -> None:
    before = random.getstate()
    prepare(tmp_path / "out", source, eval_n=3)
    assert random.getstate() == before


def test_real_data(tmp_path: Path, gsm8k_dir: Path) -> None:
    out = tmp_path / "out"
    summary = prepare(out, gsm8k_dir)
    assert (summary.train, summary.val, summary.test) == (6961, 512, 1319)
    splits = {split: load_split(out, split) for split in ("train", "val", "test")}
    train, val, test = ({problem.id for problem in problems} for problems in splits.values())
    assert train | val == {f"gsm8k-train-{i:05d}" for i in range(7473)} and not train & val
    assert test == {f"gsm8k-test-{i:05d}" for i in range(1319)}
    asked = [{problem.text for problem in problems} for problems in splits.values()]
    assert len(set.union(*asked)) == 7473 + 1319  # no question in two splits

    # The first problems of both files: Natalia's 72 clips and Janet's 18 dollars.
    by_id = {problem.id: problem for problems in splits.values() for problem in problems}
    assert by_id["gsm8k-train-00000"].text.startswith("Natalia sold clips")
    assert by_id["gsm8k-train-00000"].answer == "72"
    assert by_id["gsm8k-test-00000"].answer == "18"
    # As drawn when this was written.
    assert [problem.id[-5:] for problem in splits["val"][:4]] == ["00000", "00027", "00034", "00050"]

    manifest = json.loads(summary.manifest.read_text())
    shell = "sha256sum train.jsonl test.jsonl | sha256sum"
    listed = subprocess.run(shell, shell=True, cwd=gsm8k_dir, capture_output=True, text=True, check=True)
    assert manifest["revision"] == "sha256:" + listed.stdout.split()[0]
    before = state(out)
    assert prepare(out, gsm8k_dir).verified
    assert state(out) == before


# --- the manifest -------------------------------------------------------------------------------------------


def test_manifest(tmp_path: Path, source: Path) -> None:
    prepare(tmp_path / "out", source, eval_n=3, seed=7)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("format", "source", "seed", "eval_n", "counts")} == {
        "format": 1,
        "source": "folder",
        "seed": 7,
        "eval_n": 3,
        "counts": {"train": 7, "val": 3, "test": 4},
    }
    for name, sha256 in manifest["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == sha256
    assert set(manifest["files"]) == {"train.jsonl", "val.jsonl", "test.jsonl"}
    assert str(tmp_path) not in json.dumps(manifest)


def test_content_hash_by_hand() -> None:
    problem = {"id": "a", "question": 'Say "é"?', "answer": "#### 1", "gold": "1"}
    by_hand = '["a", "Say \\"é\\"?", "#### 1"]\n'
    assert content_sha256([problem]) == hashlib.sha256(by_hand.encode()).hexdigest()


def test_the_same_arguments_give_the_same_bytes_anywhere(tmp_path: Path, source: Path) -> None:
    prepare(tmp_path / "one", source, eval_n=3)
    (tmp_path / "moved").mkdir()
    source.rename(tmp_path / "moved" / "source")
    prepare(tmp_path / "two", tmp_path / "moved" / "source", eval_n=3)
    for name in OUTPUTS:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_running_again_changes_nothing(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    prepare(out, source, eval_n=3)
    before = state(out)
    summary = prepare(out, source, eval_n=3)
    assert summary.verified and (summary.train, summary.val, summary.test) == (7, 3, 4)
    assert state(out) == before


def test_other_arguments_over_an_existing_folder_are_refused(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    prepare(out, source, eval_n=3, seed=1)
    before = state(out)
    with pytest.raises(DataError, match="seed 1 and not 2"):
        prepare(out, source, eval_n=3, seed=2)
    with pytest.raises(DataError, match="eval_n 3 and not 4"):
        prepare(out, source, eval_n=4, seed=1)
    write_rows(source / "test.jsonl", rows("other", 4))
    with pytest.raises(DataError, match=r"revision 'sha256:.*' and not 'sha256:"):
        prepare(out, source, eval_n=3, seed=1)
    assert state(out) == before


# --- damage -------------------------------------------------------------------------------------------------


def replace_line(path: Path, line: int, row: bytes) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = row
    path.write_bytes(b"".join(lines))


def changed(path: Path, line: int, old: str, new: str) -> None:
    row = path.read_text().splitlines(keepends=True)[line - 1]
    assert old in row
    replace_line(path, line, row.replace(old, new).encode())


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("It is 5", "It is 6", "answer of gsm8k-train-00005 was changed"),
        ("question 5", "question 55", "question of gsm8k-train-00005 was changed"),
        ("gsm8k-train-00005", "gsm8k-train-00055", "id of gsm8k-train-00005 was changed"),
        ('", "', '","', "form of gsm8k-train-00005 was changed"),
    ],
)
def test_a_changed_row_is_named(tmp_path: Path, source: Path, old: str, new: str, what: str) -> None:
    out = tmp_path / "out"
    prepare(out, source, eval_n=3)
    changed(out / "train.jsonl", 4, old, new)  # the rows are 0 3 4 5 …
    with pytest.raises(DataError, match=what) as caught:
        prepare(out, source, eval_n=3)
    assert (caught.value.path, caught.value.line) == (out / "train.jsonl", 4)
    with pytest.raises(DataError, match=r"train\.jsonl: is not what the manifest says"):
        verify(out)  # without the source, the file at least


def test_unparsable_gold_is_named(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    prepare(out, source, eval_n=3)
    changed(out / "val.jsonl", 2, "#### 1,002", "#### a lot")
    for check in (lambda: verify(out), lambda: prepare(out, source, eval_n=3)):
        with pytest.raises(DataError, match="a lot") as caught:
            check()
        assert (caught.value.path, caught.value.line) == (out / "val.jsonl", 2)

    changed(source / "test.jsonl", 3, "#### 1,002", "none")
    with pytest.raises(DataError) as caught:
        prepare(tmp_path / "new", source, eval_n=3)
    assert (caught.value.path, caught.value.line) == (source / "test.jsonl", 3)
    assert not (tmp_path / "new").exists()


def test_missing_and_additional_rows_are_named(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    prepare(out, source, eval_n=3)
    path = out / "train.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    with pytest.raises(DataError, match=r":6: the row of gsm8k-train-00008 is missing"):
        prepare(out, source, eval_n=3)
    path.write_bytes(whole + b'{"id": "x", "question": "?", "answer": "#### 1", "gold": "1"}\n')
    with pytest.raises(DataError, match=r":8: has a row too many"):
        prepare(out, source, eval_n=3)
    path.unlink()
    with pytest.raises(DataError, match=r"train\.jsonl: is missing"):
        prepare(out, source, eval_n=3)
    path.write_bytes(whole)
    assert prepare(out, source, eval_n=3).verified


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "counts": 3}'])
def test_a_broken_manifest(tmp_path: Path, source: Path, text: str) -> None:
    out = tmp_path / "out"
    prepare(out, source, eval_n=3)
    (out / "manifest.json").write_text(text)
    for check in (lambda: verify(out), lambda: prepare(out, source, eval_n=3)):
        with pytest.raises(DataError, match=r"manifest\.json"):
            check()


def test_a_changed_manifest(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    prepare(out, source, eval_n=3)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["counts"]["val"] = 4
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json: was changed"):
        prepare(out, source, eval_n=3)
    with pytest.raises(DataError, match=r"val\.jsonl: is not what the manifest says"):
        verify(out)


# --- interruptions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("survivors", [0, 1, 2, 3])
def test_a_killed_run_is_made_anew(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    out = tmp_path / "out"
    real_replace = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if sum(1 for path in out.iterdir() if not path.name.startswith(".")) == survivors:
            raise KeyboardInterrupt
        return real_replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            prepare(out, source, eval_n=4, seed=2)
    assert not (out / "manifest.json").exists()
    with pytest.raises(DataError, match="does not exist; make the data"):
        verify(out)
    prepare(out, source, eval_n=3)
    prepare(tmp_path / "clean", source, eval_n=3)
    assert {name: data for name, (data, _) in state(out).items()} == {
        name: data for name, (data, _) in state(tmp_path / "clean").items()
    }


def test_a_full_disk(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    real_fsync, calls = os.fsync, iter(range(100))

    def fsync(descriptor: int) -> None:
        if next(calls) == 2:  # file, folder, and then the second file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(DiskError, match=r"val\.jsonl: cannot be written: No space left"):
            prepare(out, source, eval_n=3)
    assert [path.name for path in out.iterdir()] == ["train.jsonl"]
    assert prepare(out, source, eval_n=3).val == 3


def test_files_of_other_origin_are_not_overwritten(tmp_path: Path, source: Path) -> None:
    write_rows(tmp_path / "mine" / "test.jsonl", rows("my own", 3))
    before = state(tmp_path / "mine")
    with pytest.raises(DataError, match=r"test\.jsonl: was there before"):
        prepare(tmp_path / "mine", source, eval_n=3)
    assert state(tmp_path / "mine") == before
    with pytest.raises(ConfigError, match="--out_dir and --source are both"):
        prepare(source, source, eval_n=3)
    with pytest.raises(ConfigError, match="--out_dir and --snapshot_dir are both"):
        prepare(tmp_path / "out", source, eval_n=3, snapshot_dir=tmp_path / "source" / ".." / "out")


# --- what cannot be asked -----------------------------------------------------------------------------------


@pytest.mark.parametrize("eval_n", [10, 11, 512])
def test_eval_n_beyond_the_data(tmp_path: Path, source: Path, eval_n: int) -> None:
    with pytest.raises(ConfigError, match=f"eval_n {eval_n} leaves no problem.*has 10"):
        prepare(tmp_path / "out", source, eval_n=eval_n)
    assert not (tmp_path / "out").exists()


def test_eval_n_must_be_positive(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        prepare(tmp_path / "out", source, eval_n=0)
    assert prepare(tmp_path / "out", source, eval_n=9).train == 1


def test_sources_that_are_none(tmp_path: Path, source: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        prepare(tmp_path / "out", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"train\.jsonl: does not exist"):
        prepare(tmp_path / "out", tmp_path)
    prepare(tmp_path / "out", source, eval_n=3)
    with pytest.raises(DataError, match="is split already"):
        prepare(tmp_path / "again", tmp_path / "out", eval_n=3)


# --- other problems than GSM8K ------------------------------------------------------------------------------


def verify(folder: Path) -> dataset.Manifest:
    return dataset.verify(folder, load_task("gsm8k"))


def toys(n: int) -> dict[str, list[dict[str, str]]]:
    return {
        split: [
            {"id": f"toy-{split}-{i}", "question": f"{split} {i}?", "answer": f"#### {i}", "gold": f"{i}"}
            for i in range(n)
        ]
        for split in ("train", "val", "test")
    }


def test_write_splits(tmp_path: Path) -> None:
    manifest = write_splits(tmp_path / "toy", toys(3), {"source": "toy", "seed": 5})
    assert manifest == tmp_path / "toy" / "manifest.json"
    assert [row_of(example) for example in load_split(tmp_path / "toy", "val")] == [
        {**row, "gold_num": int(row["gold"])} for row in toys(3)["val"]
    ]
    found = verify(tmp_path / "toy")
    assert found.provenance == {"source": "toy", "seed": 5}
    assert found.counts == {"train": 3, "val": 3, "test": 3}

    before = state(tmp_path / "toy")
    assert write_splits(tmp_path / "toy", toys(3), {"seed": 5, "source": "toy"}) == manifest
    assert state(tmp_path / "toy") == before
    with pytest.raises(DataError, match="seed 5 and not 6"):
        write_splits(tmp_path / "toy", toys(3), {"source": "toy", "seed": 6})
    with pytest.raises(DataError, match=r"train\.jsonl:4: the row of toy-train-3 is missing"):
        write_splits(tmp_path / "toy", toys(4), {"source": "toy", "seed": 5})
    with pytest.raises(AssertionError):
        write_splits(tmp_path / "none", {**toys(1), "val": []}, {})
    with pytest.raises(AssertionError):
        write_splits(tmp_path / "none", {**toys(1), "val": toys(1)["train"]}, {})


def test_verify_finds_a_problem_in_two_splits(tmp_path: Path) -> None:
    write_splits(tmp_path, toys(2), {"source": "toy"})
    row = (tmp_path / "train.jsonl").read_bytes().splitlines(keepends=True)[1]
    replace_line(tmp_path / "test.jsonl", 1, row)
    with pytest.raises(DataError, match=r"test\.jsonl:1: duplicate id 'toy-train-1': it is in train\.jsonl:2"):
        verify(tmp_path)


# --- the hub ------------------------------------------------------------------------------------------------

COMMIT, OLD_COMMIT = "a1" * 20, "b2" * 20


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """A server that answers as the hub does for a dataset of two parquet files; `main` is COMMIT."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    blobs = {}
    for split, n in (("train", 10), ("test", 4)):
        path = tmp_path / f"{split}-blob"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(split, n)), path)
        blobs[f"main/{split}-00000-of-00001.parquet"] = path.read_bytes()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            revision, _, name = self.path.rpartition("/resolve/")[2].partition("/")
            commit = {"main": COMMIT, COMMIT: COMMIT}.get(revision)
            if commit is None or name not in blobs:
                return self.missing()
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha256(blobs[name]).hexdigest()}"')
            self.send_header("Content-Length", str(len(blobs[name])))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(blobs[name])
            return None

        def do_GET(self) -> None:
            if "/resolve/" in self.path:
                return self.do_HEAD()
            revision = self.path.partition("?")[0].rpartition("/revision/")[2]
            if not self.path.startswith("/api/datasets/openai/gsm8k/") or revision not in ("main", COMMIT):
                return self.missing()
            body = json.dumps({"id": "openai/gsm8k", "sha": COMMIT, "siblings": []}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return None

        def missing(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def command(endpoint: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in its own process, where `HF_ENDPOINT` can still be chosen."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **settings, "NO_PROXY": "127.0.0.1"}
    arguments = [sys.executable, "-m", "grpo_gsm8k.data_prep", *map(str, args)]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)


NO_HUB = "http://127.0.0.1:9"  # the discard port: nobody listens


def test_the_hub(tmp_path: Path, hub: str, source: Path) -> None:
    out, cache, snapshot = tmp_path / "out", tmp_path / "cache", tmp_path / "snapshot"
    folders: list[str | Path] = ["--out-dir", out, "--cache-dir", cache, "--snapshot-dir", snapshot]
    done = command(hub, "--eval-n", "3", "--seed", "31415", "--revision", "main", "--json", *folders)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "train": 7,
        "val": 3,
        "test": 4,
        "manifest": str(out / "manifest.json"),
    }
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["source"], manifest["revision"]) == ("openai/gsm8k", COMMIT)
    assert "main" not in (out / "manifest.json").read_text()
    assert "main" not in (snapshot / "snapshot.json").read_text()

    # The same problems as from a folder; another provenance.
    prepare(tmp_path / "from_folder", source, eval_n=3)
    for split in ("train", "val", "test"):
        name = f"{split}.jsonl"
        assert (out / name).read_bytes() == (tmp_path / "from_folder" / name).read_bytes()

    # Without the hub: from its cache, and from the snapshot, to the byte. Verifying needs neither.
    prepare(tmp_path / "from_cache", eval_n=3, revision=COMMIT, cache_dir=cache)
    prepare(tmp_path / "from_snapshot", snapshot, eval_n=3)
    for name in OUTPUTS:
        assert (tmp_path / "from_cache" / name).read_bytes() == (out / name).read_bytes()
        assert (tmp_path / "from_snapshot" / name).read_bytes() == (out / name).read_bytes()
    assert prepare(out, eval_n=3, revision=COMMIT, cache_dir=tmp_path / "nothing").verified


def test_a_revision_that_is_not_on_the_hub(tmp_path: Path, hub: str) -> None:
    done = command(hub, "--out-dir", tmp_path / "out", "--cache-dir", tmp_path, "--revision", OLD_COMMIT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: openai/gsm8k has no revision '{OLD_COMMIT}' on the hub\n"


def test_no_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--out-dir", str(tmp_path / "out"), "--cache-dir", str(tmp_path)]
    done = command(NO_HUB, *folders, "--revision", "main")
    assert (done.returncode, done.stdout) == (2, "")
    assert "openai/gsm8k at main cannot be fetched from the hub" in done.stderr
    # The tests themselves are offline; the pinned commit is not in the cache either.
    assert data_prep.main([*folders, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "offline mode is enabled" in err and data_prep.PINNED in err
    for text in (done.stderr, err):
        assert text.count("\n") == 1
        assert all(part in text for part in ("--source DIR", "HF_ENDPOINT", "--cache-dir"))
    assert not (tmp_path / "out").exists()


def test_the_pin_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file.parquet").write_bytes(b"not what OpenAI published")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "file.parquet"))
    with pytest.raises(DataError, match=f"sha256 is .*, not ea82612e.* at {data_prep.PINNED}"):
        prepare(tmp_path / "out")


def test_damage_is_named_although_the_hub_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provenance = {"source": data_prep.REPO, "revision": data_prep.PINNED, "seed": 31415, "eval_n": 512}
    write_splits(tmp_path, toys(2), provenance)
    changed(tmp_path / "val.jsonl", 1, "val 0?", "val zero?")

    def download(*_: object) -> dict[str, Path]:
        raise UserError("no network")

    monkeypatch.setattr(data_prep, "_download", download)
    with pytest.raises(DataError, match=r"val\.jsonl: is not what the manifest says"):
        prepare(tmp_path)


# --- snapshots ----------------------------------------------------------------------------------------------


def test_a_snapshot_of_a_folder(tmp_path: Path, source: Path) -> None:
    snapshot = tmp_path / "snapshot"
    prepare(tmp_path / "one", source, eval_n=3, snapshot_dir=snapshot)
    assert (snapshot / "train.jsonl").read_bytes() == (source / "train.jsonl").read_bytes()
    before = state(snapshot)
    prepare(tmp_path / "two", snapshot, eval_n=3, snapshot_dir=snapshot)
    assert state(snapshot) == before
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (tmp_path / "two" / "manifest.json").read_bytes()


def test_a_changed_snapshot(tmp_path: Path, source: Path) -> None:
    snapshot = tmp_path / "snapshot"
    prepare(tmp_path / "one", source, eval_n=3, snapshot_dir=snapshot)
    changed(snapshot / "train.jsonl", 1, "It is", "it is")
    with pytest.raises(DataError, match=r"train\.jsonl: was changed after the snapshot"):
        prepare(tmp_path / "two", snapshot, eval_n=3)
    with pytest.raises(DataError, match=r"train\.jsonl: is there already and differs"):
        prepare(tmp_path / "one", source, eval_n=3, snapshot_dir=snapshot)
    (snapshot / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"train\.jsonl: is missing"):
        prepare(tmp_path / "two", snapshot, eval_n=3)
    for record in ("{}", '{"files": 3}', '{"files": {}, "source": "x", "revision": "y"}'):
        (snapshot / "snapshot.json").write_text(record)
        with pytest.raises(DataError, match=r"snapshot\.json: "):
            prepare(tmp_path / "two", snapshot, eval_n=3)


# --- the command --------------------------------------------------------------------------------------------


def test_main(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out_dir", str(tmp_path / "out"), "--source", str(source), "--eval-n", "3", "--seed", "7"]
    assert data_prep.main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    expected = {"train": 7, "val": 3, "test": 4, "manifest": str(tmp_path / "out" / "manifest.json")}
    assert json.loads(out) == expected and out.count("\n") == 1
    assert err.startswith("wrote ")
    assert data_prep.main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == expected and err.startswith("verified ")
    assert data_prep.main([*arguments, "--seed", "8"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "seed 7 and not 8" in err and err.count("\n") == 1


def test_importing_is_light() -> None:
    heavy = "{'huggingface_hub', 'datasets', 'pyarrow', 'torch'}"
    script = f"import sys, grpo_gsm8k.data_prep; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")
