"""Nothing that was acknowledged is lost, nothing is done twice, and what comes out is the same to the bit."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from grpo_gsm8k.errors import CheckpointError, DiskError, RunDirError
from grpo_gsm8k.serve import learn, server, work
from tests.serve_tools import KEY, Client, Failed, Process, datum, free_port, in_process, settings

IDS = [5, 9, 14, 7, 22, 31, 8, 40, 12, 6]
STEPS = 4
A_ROW = {"data": [datum(IDS)], "loss_fn": "cross_entropy"}


class Stubborn:
    """Sends each request again until it is answered, as the SDK does."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=60)
        self.repeats = 0

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        until = time.monotonic() + 900
        while True:
            try:
                answer = self.http.request(method, path, **more)
                if answer.status_code < 500:
                    return answer
            except httpx.TransportError:
                if time.monotonic() > until:
                    raise
            self.repeats += 1
            time.sleep(0.05)


def a_run(client: Client, steps: int, on_step: Any = lambda step: None, rank: int = 4) -> dict[str, Any]:
    """Reinforcement learning in small: sample from a snapshot, reward even tokens, train; and what came of it."""
    session = client.session()
    model = client.model(session, rank)
    told: list[Any] = []
    for step in range(steps):
        on_step(step)
        saved = client.submit(
            "save_weights_for_sampler", model, sampling_session_seq_id=step, kind="snapshot", path=None
        )
        sampler = client.result(saved)["sampling_session_id"]
        asked = [client.submit_sample(sampler, IDS[:n], n, num_samples=2, seed=n, stop=[]) for n in (3, 5)]
        rows = []
        for n, sent in zip((3, 5), asked, strict=True):
            for one in client.result(sent)["sequences"]:
                told.append(one)
                reward = sum(t % 2 for t in one["tokens"]) / 6 - 0.5
                before = [0.0] * (n - 1)
                rows.append(
                    datum(
                        IDS[:n] + one["tokens"],
                        logprobs=before + one["logprobs"],
                        advantages=before + [reward] * len(one["tokens"]),
                    )
                )
        sent = [client.submit("forward_backward", model, **_input(part)) for part in (rows[:2], rows[2:])]
        sent.append(client.submit("optim_step", model, adam_params={"learning_rate": 3e-2}))
        told += [client.result(each) for each in sent]
        told.append(client.train("forward", model, forward_input=_input(rows[:1])["forward_backward_input"]))
    path = client.train("save_weights_external", model, path="end")["path"]
    where = path.removeprefix("tinker://").replace("/external_weights", "/checkpoints/external_weights")
    urls = client.get(f"training_runs/{where}/external_weights_urls")["urls"]
    url = httpx.URL(urls["adapter_model.safetensors"])
    weights = client.http.request("GET", f"{url.path}?{url.query.decode()}").content
    return {"told": json.loads(json.dumps(told)), "weights": hashlib.sha256(weights).hexdigest()}


def _input(rows: list[Any]) -> dict[str, Any]:
    return {"forward_backward_input": {"data": rows, "loss_fn": "importance_sampling"}}


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory) -> dict[str, Any]:
    with in_process(tiny.model, tmp_path_factory.mktemp("calm"), snapshot_every=2) as client:
        return a_run(client, STEPS)


def test_a_server_that_ended_goes_on_where_it_was(tiny, tmp_path, undisturbed) -> None:
    """SIGTERM's way: the application is closed and opened again between the steps."""
    folder, turn = tmp_path / "out", _Turn(tiny.model, tmp_path / "out")
    with turn:
        found = a_run(turn.client, STEPS, lambda step: turn.again() if step else None)
        assert turn.client.get("status")["models"][0]["last"]["step"] == STEPS
    assert found == undisturbed
    assert len(list((folder / "models").glob("*"))) == 1  # earlier snapshots are gone


class _Turn:
    """A server in this process that is closed and opened again, behind one client."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.client = Client(None)

    def __enter__(self) -> None:
        self.opened = in_process(self.model, self.folder, snapshot_every=2)
        self.client.http = self.opened.__enter__().http

    def __exit__(self, *error: object) -> None:
        self.opened.__exit__(None, None, None)

    def again(self) -> None:
        self.__exit__()
        self.__enter__()


def kill_at_random(process: Process, kills: int, seed: int, stop: threading.Event) -> int:
    """Kill the server now and then, and start it again."""
    draw, done = random.Random(seed), 0
    while done < kills and not stop.wait(draw.uniform(0.1, 1.5)):
        process.end(signal.SIGKILL)
        done += 1
        process.start()
    return done


def disturbed(model: Path, folder: Path, steps: int, kills: int, seed: int) -> tuple[dict[str, Any], int, int, Process]:
    """A run whose server is killed; its results, how often, how many requests were sent again, and the process."""
    process = Process(model, folder, free_port(), snapshot_every=2, gap_s=30)
    process.start()
    http, stop, done = Stubborn(process.url), threading.Event(), [0]

    def kill() -> None:
        done[0] = kill_at_random(process, kills, seed, stop)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        return a_run(Client(http), steps), done[0], http.repeats, process
    finally:
        stop.set()
        killer.join()
        process.end(signal.SIGTERM)


def test_kill_9_in_the_middle_of_a_run(tiny, tmp_path, undisturbed) -> None:
    found, kills, repeats, process = disturbed(tiny.model, tmp_path / "out", STEPS, 1, seed=3)
    assert (kills, repeats > 0) == (1, True)
    assert found == undisturbed
    assert process.process.returncode == 0  # SIGTERM, at the end
    log = process.log.read_text()
    assert "Traceback" not in log and KEY not in log
    kept = tmp_path / "out" / "key.json"
    assert kept.stat().st_mode & 0o777 == 0o600 and KEY not in kept.read_text()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_at_random_moments(tiny, tmp_path) -> None:
    steps = 150  # more than a server takes in the 16 s that it lives between so many kills
    with in_process(tiny.model, tmp_path / "calm", snapshot_every=2) as client:
        expected = a_run(client, steps)
    found, kills, _, _ = disturbed(tiny.model, tmp_path / "out", steps, 20, seed=11)
    assert kills == 20
    assert found == expected


def test_a_folder_of_another_server_is_refused(tiny, tmp_path) -> None:
    folder = tmp_path / "out"
    with server.locked(tmp_path), pytest.raises(RunDirError, match="another server"), server.locked(tmp_path):
        pass
    with in_process(tiny.model, folder):
        pass
    for flags, what in (({"lora_alpha": 16}, "another --lora_alpha"), ({}, "another base model")):
        model = tiny.model if flags else _other_model(tmp_path)
        with pytest.raises(CheckpointError, match=what), server.opened(settings(model, folder, **flags), folder):
            pass
    (folder / "journal.sqlite").write_bytes(b"not a database, but of some length" * 200)
    for rest in ("journal.sqlite-wal", "journal.sqlite-shm"):
        (folder / rest).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="no journal"), server.opened(settings(tiny.model, folder), folder):
        pass


def _other_model(folder: Path) -> Path:
    from tests.toys import make_data, make_model

    return make_model(folder / "model", make_data(folder / "data"), hidden_size=16)


def test_models_make_room_for_each_other_and_nothing_changes(tiny, tmp_path) -> None:
    """Three models in one place: each is written to disk and read again between its steps, gradients included."""

    def run(most: int) -> list[Any]:
        with in_process(tiny.model, tmp_path / str(most), max_models=most) as client:
            session, found = client.session(), []
            models = [client.model(session, number=k, rank=2 + k) for k in range(3)]
            for _ in range(3):
                found += [client.learn(model, [datum(IDS)]) for model in models]
                found += [client.learn(model, [datum(IDS[3:])]) for model in models]
                found += [client.step(model) for model in models]
            resident = len(client.service.work.models)  # type: ignore[attr-defined]
            assert resident == most
            return found

    assert run(1) == run(3)


def test_a_full_disk_refuses_and_loses_nothing(tiny, tmp_path, monkeypatch) -> None:
    """The journal cannot be written for a while: requests are refused with 503, results wait, then all goes on."""
    import sqlite3

    with in_process(tiny.model, tmp_path / "out") as client:
        model = client.model()
        expected = client.learn(model, [datum(IDS)])["metrics"]
        store = client.service.store  # type: ignore[attr-defined]
        full = sqlite3.OperationalError("database or disk is full")
        full.sqlite_errorcode = sqlite3.SQLITE_FULL

        class Full:
            in_transaction = False

            def execute(self, *_: Any) -> None:
                raise full

        works, store._writer = store._writer, Full()
        body = {"model_id": model, "seq_id": 2, **_input([datum(IDS)]), "forward_backward_input": {}}
        refused = client.send("POST", "forward_backward", 503, json=body)
        assert "disk is full" in refused["detail"] and refused["detail"].startswith("nothing was accepted")
        assert client.get("healthz", 503)["detail"]
        store._writer = works
        again = client.learn(model, [datum(IDS)])["metrics"]
        assert again == expected
        assert client.get("healthz") == {"status": "ok"}


def test_a_result_that_finds_no_room_waits_for_it(tiny, tmp_path) -> None:
    """The disk fills up between a request and its result."""
    with in_process(tiny.model, tmp_path / "out") as client:
        model = client.model()
        work, store = client.service.work, client.service.store  # type: ignore[attr-defined]
        run, works = work.run, store._writer

        class Full:
            in_transaction = False

            def execute(self, *_: Any) -> None:
                import sqlite3

                fault = sqlite3.OperationalError("database or disk is full")
                fault.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise fault

        def fills_the_disk(entry: Any) -> Any:
            found = run(entry)
            store._writer = Full()
            threading.Timer(0.6, lambda: setattr(store, "_writer", works)).start()
            return found

        work.run = fills_the_disk
        found = client.learn(model, [datum(IDS)])
        assert found["metrics"]["tokens:sum"] == 9


def test_forward_passes_between_updates_are_not_done_again(tiny, tmp_path):
    """They change nothing, so their bytes are not kept."""
    with in_process(tiny.model, tmp_path / "data") as client:
        model = client.model()
        client.forward(model, [datum(IDS)])
        client.learn(model, [datum(IDS)])
        client.step(model)
        found = client.forward(model, [datum(IDS)])
        client.service.work.lose(model)  # type: ignore[attr-defined]  # as after a crash
        assert client.forward(model, [datum(IDS)]) == found


def test_a_snapshot_that_finds_no_room_is_made_later(tiny, tmp_path, monkeypatch) -> None:
    """No step fails for it; a model that has to make room for another waits until it can be written."""
    monkeypatch.setattr(work, "ROOM_S", 0.05)

    def run(folder: str, full: int) -> list[Any]:
        with in_process(tiny.model, tmp_path / folder, max_models=1, snapshot_every=1) as client:
            save, tries = learn.Trained.save, []

            def fails_at_first(self: Any, where: Path, optimizer: bool) -> None:
                tries.append(where)
                if len(tries) <= full:
                    raise DiskError(f"{where}: no space left on device")
                save(self, where, optimizer)

            monkeypatch.setattr(learn.Trained, "save", fails_at_first)
            session = client.session()
            models = [client.model(session, number=k) for k in range(2)]
            found = []
            for _ in range(2):
                for model in models:
                    found += [client.learn(model, [datum(IDS)]), client.step(model)]
            monkeypatch.setattr(learn.Trained, "save", save)
            assert len(tries) > full
            return found

    assert run("full", 4) == run("calm", 0)


def test_a_model_is_made_again_from_its_requests(tiny, tmp_path) -> None:
    """Also where some of them leave no gradient, or have failed: a forward pass, a mistake, a gradient of NaN."""

    def run(folder: str, loses: bool) -> list[Any]:
        with in_process(tiny.model, tmp_path / folder, snapshot_every=100) as client:
            model, found = client.model(), []
            service = client.service  # type: ignore[attr-defined]
            for _ in range(2):
                found.append(client.learn(model, [datum(IDS)]))
                found.append(client.step(model))
                found.append(client.train("forward", model, forward_input=_input([])["forward_backward_input"] | A_ROW))
                with pytest.raises(Failed):
                    client.learn(model, [datum([10**6, 3])])
                found.append(client.learn(model, [datum(IDS[2:])]))
                with pytest.raises(Failed, match="norm"):
                    client.learn(model, [datum(IDS, weights=[2e37] * 9)])
                    client.step(model)
                found.append(client.learn(model, [datum(IDS[4:])]))
                if loses:
                    service.engine.call(lambda: service.work.lose(model))
            return found

    assert run("lost", True) == run("kept", False)
