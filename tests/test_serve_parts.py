"""The parts of the service by themselves: the journal, the order of requests, protobuf, keys, and what is read."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zstandard

from grpo_gsm8k.errors import ConfigError, DiskError
from grpo_gsm8k.serve import auth, codec, data, proto, server, weights
from grpo_gsm8k.serve.books import Entry, SeqQueue, check_name, parse_path
from grpo_gsm8k.serve.jobs import Refusal, SampledSequence, SampleResult, TrainingResult
from grpo_gsm8k.serve.store import Store
from tests.serve_tools import HEADERS, KEY, NAME, Client, datum, in_process, loss_input, settings
from tests.test_serve_crash import a_run

IDS = [5, 9, 14, 7, 22, 31, 8, 40, 12, 6]


# ------------------------------------------------------------------------------------------------- the journal


def put_meta(key: str) -> Any:
    return lambda db: db.execute("INSERT INTO meta VALUES(?, 'x')", (key,)).lastrowid


def test_a_change_that_raises_is_undone_by_itself(tmp_path: Path) -> None:
    store = Store(tmp_path / "journal")
    futures = [store.write(put_meta(key)) for key in ("a", "b", "a", "c")]
    assert isinstance(futures[2].exception(), sqlite3.IntegrityError)
    assert [f.exception() for f in futures if f is not futures[2]] == [None] * 3
    store.close()
    again = Store(tmp_path / "journal")
    assert {row["key"] for row in again.read("SELECT key FROM meta")} == {"format", "a", "b", "c"}
    again.close()


def test_many_changes_share_a_commit(tmp_path: Path) -> None:
    store, commits = Store(tmp_path / "journal"), []
    store._writer.set_trace_callback(lambda text: commits.append(text) if text == "COMMIT" else None)
    blocked = threading.Event()
    first = store.write(lambda db: blocked.wait(10) and None)
    rest = [store.write(put_meta(str(k))) for k in range(100)]
    blocked.set()
    for future in [first, *rest]:
        future.result(10)
    assert len(commits) <= 2
    store.close()


class Full:
    """A disk without room: stands where the journal's connection would."""

    in_transaction = False

    def execute(self, *_: Any) -> None:
        fault = sqlite3.OperationalError("database or disk is full")
        fault.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise fault


def test_what_insists_is_written_when_there_is_room_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "journal")
    works, store._writer = store._writer, Full()  # type: ignore[assignment]
    order: list[str] = []
    insisting = [store.write(lambda db, k=k: order.append(k), insist=True) for k in "ab"]
    with pytest.raises(DiskError, match="disk is full"):
        store.write(lambda db: order.append("never")).result(10)
    assert store.fault
    store._writer = works
    insisting.append(store.write(lambda db: order.append("c"), insist=True))
    for future in insisting:
        future.result(10)
    assert (order, store.fault) == (["a", "b", "c"], "")
    store.close()


# ------------------------------------------------------------------------------------------------- order


def entry(seq: int) -> Entry:
    return Entry(str(seq), "optim_step", "m", b"", seq)


def test_any_order_of_arrival_is_the_same_order_of_work() -> None:
    draw = random.Random(0)
    for _ in range(50):
        queue, done = SeqQueue(), []
        arrivals = list(range(1, 12))
        draw.shuffle(arrivals)
        for seq in arrivals:
            done += [ready.seq for ready in queue.arrive(entry(seq))]
        assert done == list(range(1, 12))


def test_a_gap_fails_what_waits_behind_it_alone() -> None:
    queue = SeqQueue()
    assert [e.seq for e in queue.arrive(entry(1))] == [1]
    queue.arrive(entry(4))
    queue.arrive(entry(5))
    assert queue.expire(60) == ("", [])
    why, failed = queue.expire(0)
    assert why.startswith("seq_id 2 to 3 did not arrive") and [e.seq for e in failed] == [4, 5]
    assert [e.seq for e in queue.arrive(entry(6))] == [6]
    with pytest.raises(Refusal, match="too late"):
        queue.arrive(entry(3))


@pytest.mark.parametrize(
    "path", ["", "tinker://", "tinker://a/b", "tinker://a/other/c", "tinker://a/weights/", "/etc/x"]
)
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(Refusal, match="no checkpoint's path"):
        parse_path(path)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", "a\x00b", "x" * 201, None, 3, "a\\b"])
def test_names_that_are_none(name: Any) -> None:
    with pytest.raises(Refusal, match="no name"):
        check_name(name)


# ------------------------------------------------------------------------------------------------- formats


def test_results_survive_the_journal() -> None:
    sampled = SampleResult(
        (
            SampledSequence((1, 2), (-0.5, -1.25), "stop", (((3, -0.5), (4, -2.0)), ((1, -0.25),))),
            SampledSequence((), (), "length"),
        ),
        (None, -1.5),
        ((), ((9, -0.125),)),
    )
    assert codec.decode("sample", codec.encode(sampled)) == sampled
    trained = TrainingResult((np.float32([1, 2]), np.float32([[1, 2], [3, 4], [5, 6]])), {"loss:sum": 3.5})
    again = codec.decode("forward_backward", codec.encode(trained))
    assert [a.tolist() for a in again.logprobs] == [a.tolist() for a in trained.logprobs]
    assert again.metrics == trained.metrics
    other = {"type": "x", "path": None}
    assert codec.decode("save_weights", codec.encode(other)) == other


def proto_request(model: str, seq: int, rows: list[dict[str, Any]], **more: Any) -> Any:
    """A forward_backward as newer clients send it."""
    sent = proto.message("ForwardBackwardRequest")
    sent.model_id, sent.seq_id, sent.loss_fn = model, seq, more.pop("loss_fn", "cross_entropy")
    for key, value in more.items():
        setattr(sent, key, value)
    for row in rows:
        one = sent.data.add()
        for chunk in row["model_input"]["chunks"]:
            one.model_input.add().encoded_text.tokens = np.array(chunk["tokens"], "<i4").tobytes()
        for name, tensor in row["loss_fn_inputs"].items():
            kind = np.dtype("<i8" if tensor["dtype"] == "int64" else "<f4")
            field = one.loss_fn_inputs[name]
            field.dense = np.array(tensor["data"], kind).tobytes()
            field.dtype = proto.INT64 if tensor["dtype"] == "int64" else proto.FLOAT32
            field.shape.extend(tensor.get("shape", []))
    return sent


def test_protobuf_and_json_say_the_same() -> None:
    rows = [datum(IDS, weights=np.linspace(-1, 2, 9)), datum(IDS[:4])]
    a = data.from_proto(proto_request("m", 1, rows).SerializeToString())
    b = data.from_json(loss_input(rows)["forward_backward_input"])
    assert (a.loss_fn, a.forward_only, len(a.data)) == (b.loss_fn, b.forward_only, len(b.data))
    for x, y in zip(a.data, b.data, strict=True):
        assert x.tokens.tolist() == y.tokens.tolist() and x.inputs.keys() == y.inputs.keys()
        assert all(np.array_equal(x.inputs[name], y.inputs[name]) for name in x.inputs)


def test_a_sparse_tensor_is_filled_with_zeros() -> None:
    tensor = proto.message("Tensor")
    tensor.dtype = proto.FLOAT32
    tensor.shape.extend([3, 4])
    tensor.sparse_csr.values = np.float32([5, 6, 7]).tobytes()
    tensor.sparse_csr.crow_indices = np.int64([0, 2, 2, 3]).tobytes()
    tensor.sparse_csr.col_indices = np.int64([0, 3, 1]).tobytes()
    dense = data._proto_tensor(tensor, "x")
    assert dense.tolist() == [[5, 0, 0, 6], [0, 0, 0, 0], [0, 7, 0, 0]]
    for rows in ([0, 2, 1, 3], [0, 2, 2], [1, 2, 2, 3], [0, 2, 2, 9]):
        tensor.sparse_csr.crow_indices = np.int64(rows).tobytes()
        with pytest.raises(Refusal, match="do not describe a matrix"):
            data._proto_tensor(tensor, "x")


# ------------------------------------------------------------------------------------------------- the wire's edge


@pytest.fixture(scope="module")
def client(tiny, tmp_path_factory):
    with in_process(tiny.model, tmp_path_factory.mktemp("serve"), max_body_mb=1) as made:
        yield made


def test_protobuf_over_the_wire(client: Client) -> None:
    """Newer clients send and read protobuf; older ones read JSON of the same future. zstd is unpacked."""
    model, rows = client.model(), [datum(IDS), datum(IDS[2:])]
    headers = {**HEADERS, "Content-Type": "application/x-protobuf"}
    raw = proto_request(model, 1, rows).SerializeToString()
    sent = client.send("POST", "forward_backward", content=raw, headers=headers)
    packed = zstandard.compress(proto_request(model, 2, rows, forward_only=True).SerializeToString())
    second = client.send("POST", "forward_backward", content=packed, headers={**headers, "Content-Encoding": "zstd"})
    read = client.send(
        "POST",
        "retrieve_future",
        json={"request_id": sent["request_id"]},
        headers={**HEADERS, "Accept": "application/x-protobuf"},
    )
    assert read.headers["content-type"] == "application/x-protobuf"
    found = codec.decode("forward_backward", read.content)
    as_json = client.result(sent)
    assert as_json["metrics"] == found.metrics == client.result(second)["metrics"]
    for a, b in zip(found.logprobs, as_json["loss_fn_outputs"], strict=True):
        assert a.tolist() == b["logprobs"]["data"] and list(a.shape) == b["logprobs"]["shape"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "what"),
    [
        (b"\xff\xff\xff", {"Content-Type": "application/x-protobuf"}, 400, "no ForwardBackwardRequest"),
        (b"", {"Content-Type": "application/x-protobuf"}, 422, "seq_id is 0"),
        (b"{", {}, 400, "no JSON"),
        (b"[" * 100_000, {}, 400, "no JSON"),
        (b"[1]", {}, 422, "model_id is missing"),
        (b'{"model_id": "\\ud800", "seq_id": 1}', {}, 404, "no training run"),
        (b"x" * (1 << 20) + b"xx", {}, 413, "larger than 1 MB"),
        (b"no zstd", {"Content-Encoding": "zstd"}, 400, "no zstd"),
        (zstandard.compress(b"\0" * (8 << 20)), {"Content-Encoding": "zstd"}, 413, "when unpacked"),
        (b"{}", {"Content-Encoding": "gzip"}, 400, "is not read here"),
    ],
)
def test_bodies_that_cannot_be_read(client: Client, body, headers, status, what) -> None:
    answer = client.send("POST", "forward_backward", status, content=body, headers={**HEADERS, **headers})
    assert what in answer["detail"] and "\n" not in answer["detail"]


def test_the_key_in_any_header(client: Client) -> None:
    basic = base64.b64encode(f"any:{KEY}".encode()).decode()
    for headers in (
        {"X-API-Key": KEY},
        {"api-key": KEY},
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"Basic {basic}"},
    ):
        assert client.get("get_server_capabilities", headers=headers)["supported_models"][0]["model_name"] == NAME
    for headers in ({}, {"X-API-Key": KEY + "x"}, {"Authorization": "Basic ???"}, {"Authorization": "Bearer"}):
        assert "key" in client.get("get_server_capabilities", 401, headers=headers)["detail"]
    assert client.get("healthz", headers={}) == {"status": "ok"}


def test_a_flood_is_told_to_slow_down() -> None:
    keeper = auth.Keeper("", "s", rate=10)
    for _ in range(10):
        keeper.take_turn()
    with pytest.raises(Refusal, match="more than 10 requests") as refusal:
        for _ in range(20):
            keeper.take_turn()
    assert refusal.value.status == 429


def test_a_key_is_minted_once_and_kept_as_its_hash(tmp_path: Path) -> None:
    keeper, key = auth.open_keys(tmp_path, None, 0)
    again, nothing = auth.open_keys(tmp_path, None, 0)
    assert key.startswith("tml-") and len(key) > 30 and nothing == ""
    assert again.digest == keeper.digest == auth.hash_of(key)
    kept = tmp_path / auth.FILE
    assert key not in kept.read_text() and kept.stat().st_mode & 0o777 == 0o600
    own, _ = auth.open_keys(tmp_path, "a key of one's own", 0)
    assert own.digest == auth.hash_of("a key of one's own") and own.secret == keeper.secret
    with pytest.raises(ConfigError, match="fewer than 8"):
        auth.open_keys(tmp_path, "short", 0)


def test_links_end(monkeypatch) -> None:
    keeper, soon = auth.Keeper("", "s"), int(time.time()) + 5
    signature = keeper.sign("x", soon)
    keeper.check_link("x", soon, signature)
    for what, expires in (("y", soon), ("x", soon + 1)):
        with pytest.raises(Refusal, match="not signed"):
            keeper.check_link(what, expires, signature)
    monkeypatch.setattr(time, "time", lambda: soon + 1.0)
    with pytest.raises(Refusal, match="expired"):
        keeper.check_link("x", soon, signature)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({"model_id": ""}, "needs --model_id"),
        ({"host": "0.0.0.0"}, "name your key"),
        ({"host": "example.org"}, "name your key"),
        ({"engine": "vllm"}, "--engine vllm"),
        ({"api_key_env": "NO_SUCH_VARIABLE"}, "not set"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, flags: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        server.check(settings(Path("m"), tmp_path, **flags))


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    with server.listen(settings(Path("m"), tmp_path)) as taken:
        taken.listen()
        again = settings(Path("m"), tmp_path, port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="pick another"):
            server.listen(again)


def test_an_answer_does_not_wait_for_an_acknowledgement(tmp_path: Path) -> None:
    """Its head and its body are two packets; with Nagle's algorithm the second one leaves 40 ms later."""

    async def nodelay(listening: socket.socket) -> int:
        connected: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        serving = await asyncio.start_server(lambda _, writer: connected.put(writer), sock=listening)
        async with serving:
            _, mine = await asyncio.open_connection(*listening.getsockname())
            theirs = await connected.get()
            found: int = theirs.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            theirs.close()
            mine.close()
        return found

    assert asyncio.run(nodelay(server.listen(settings(Path("m"), tmp_path)))) != 0


# ------------------------------------------------------------------------------------------------- company


class Flaky:
    """Loses requests before they arrive, and answers on their way back; in between a 503."""

    def __init__(self, http: Any, share: float, seed: int) -> None:
        self.http, self.share, self.draw = http, share, random.Random(seed)

    def request(self, method: str, path: str, **more: Any) -> Any:
        while True:
            fate = self.draw.random() / self.share
            if fate < 0.6:  # lost, or refused by something in between
                continue
            answer = self.http.request(method, path, **more)
            if fate >= 1:
                return answer


def test_a_third_of_the_answers_lost_changes_nothing(client: Client) -> None:
    assert a_run(Client(Flaky(client.http, 0.3, 4)), 3) == a_run(client, 3)


def test_two_clients_at_once_get_what_each_gets_alone(tiny, tmp_path: Path) -> None:
    with in_process(tiny.model, tmp_path / "alone") as client:
        alone = [a_run(client, 3, rank=rank) for rank in (2, 5)]
    together: list[Any] = [None, None]
    with in_process(tiny.model, tmp_path / "together") as client:

        def run(number: int, rank: int) -> None:
            together[number] = a_run(Client(client.http), 3, rank=rank)

        threads = [threading.Thread(target=run, args=each) for each in enumerate((2, 5))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert together == alone


def test_drawing_while_training_changes_nothing(tiny, tmp_path: Path) -> None:
    found = []
    for flags in ({}, {"sample_device": "cpu"}):
        with in_process(tiny.model, tmp_path / str(len(found)), **flags) as client:
            assert client.service.engine.overlaps == bool(flags)  # type: ignore[attr-defined]
            found.append(a_run(client, 3))
    assert found[0] == found[1]


def test_samples_of_many_clients_are_those_of_each(client: Client, monkeypatch) -> None:
    """The same requests one after the other, and all at once: decoded side by side, the same bits."""
    sampler = client.sampler(client.session())
    draw = random.Random(2)
    asked = [
        {
            "prompt": [draw.randrange(300) for _ in range(draw.randrange(1, 60))],
            "seed": k,
            "num_samples": draw.randrange(1, 4),
            "max_tokens": draw.randrange(1, 12),
            "stop": [],
            "prompt_logprobs": k % 3 == 0,
        }
        for k in range(16)
    ]
    alone = [client.sample(sampler, seq=k, **one) for k, one in enumerate(asked)]
    engine = client.service.engine  # type: ignore[attr-defined]
    monkeypatch.setattr("grpo_gsm8k.serve.engine.GATHER_S", 1.0)  # however long a busy machine takes to send them
    batches = []
    admit = engine._admit
    engine._admit = lambda: (admit(), batches.append(max((len(b.jobs) for b in engine._batches), default=0)))
    with held_up(client):
        sent = [client.submit_sample(sampler, seq=100 + k, **one) for k, one in enumerate(asked)]
    assert [client.result(each) for each in sent] == alone
    assert max(batches) > 8
    engine._admit = admit


@contextmanager
def held_up(client: Client) -> Iterator[None]:
    """The thread that owns torch has something else to do."""
    began, ends = threading.Event(), threading.Event()
    engine = client.service.engine  # type: ignore[attr-defined]
    busy = threading.Thread(target=lambda: engine.call(lambda: began.set() or ends.wait(30)))
    busy.start()
    began.wait(10)
    yield
    ends.set()
    busy.join()


def test_a_long_queue_of_one_model_does_not_hold_up_another(client: Client) -> None:
    first, second = client.model(), client.model()
    with held_up(client):
        many = [client.submit("forward_backward", first, **loss_input([datum(IDS)])) for _ in range(12)]
        quick = client.submit("forward_backward", second, **loss_input([datum(IDS)]))
    for sent in [*many, quick]:
        client.result(sent)
    rows = client.service.store.read("SELECT id, number FROM requests")  # type: ignore[attr-defined]
    ended = {row["id"]: row["number"] for row in rows}
    later = [sent for sent in many if ended[sent["request_id"]] > ended[quick["request_id"]]]
    assert len(later) >= 10


def test_what_the_server_says_of_itself(client: Client) -> None:
    model = client.model()
    client.learn(model, [datum(IDS)])
    client.step(model)
    client.post("create_model", {"session_id": "x"}, 422)
    found = client.get("status")
    mine = next(m for m in found["models"] if m["model_id"] == model)
    assert mine["steps"] == 1 and mine["last"]["loss:sum"] > 0 and mine["resident"]
    assert found["base"] == NAME and found["rows_independent"] and found["totals"]["done"] > 2
    assert "model_seq_id" in found["refusals"][-1]["reason"]
    json.dumps(found, allow_nan=False)


def test_what_is_thrown_away_in_time(client: Client, monkeypatch) -> None:
    from grpo_gsm8k.serve import upkeep

    service = client.service  # type: ignore[attr-defined]
    session = client.session()
    model = client.model(session)
    path = client.train("save_weights", model, path="short", ttl_seconds=50)["path"]
    sent = client.submit_sample(client.sampler(session), IDS)
    client.result(sent)
    kept = SimpleNamespace(now=time.time())
    monkeypatch.setattr(time, "time", lambda: kept.now)
    assert service.books.checkpoint(path)
    kept.now += 3000
    client.http.portal.call(upkeep.sweep, service)
    with pytest.raises(Refusal):
        service.books.checkpoint(path)
    assert not list((service.folder / "checkpoints").glob(sent["request_id"]))
    client.post("retrieve_future", {"request_id": sent["request_id"]}, 404)
    assert service.books.session(session).ended
    client.post("session_heartbeat", {"session_id": session})
    assert service.books.session(session).ended is None


# ------------------------------------------------------------------------------------------------- the process


def test_the_address_can_be_reached_when_it_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    @contextmanager
    def opened(cfg: Any, folder: Path) -> Iterator[None]:
        yield None

    def announce(cfg: Any, service: Any, port: int, minted: str) -> None:
        socket.create_connection((cfg.host, port), timeout=5).close()
        reached.append(port)

    monkeypatch.setattr(server, "opened", opened)
    monkeypatch.setattr(server, "announce", announce)
    monkeypatch.setattr(server, "_server", lambda *_: SimpleNamespace(run=lambda sockets: None))
    server.run(settings(tmp_path, tmp_path / "out"))
    assert len(reached) == 1


def test_requests_that_arrive_together_are_decoded_together(tiny, tmp_path, monkeypatch) -> None:
    """One pass over the model serves them all, and each gets what it would have got alone."""
    from grpo_gsm8k.serve import engine

    sizes: list[int] = []
    real = engine.Decoding
    monkeypatch.setattr(engine, "Decoding", lambda *how: (sizes.append(len(how[2])), real(*how))[1])
    with in_process(tiny.model, tmp_path / "data") as client:
        sampler = client.sampler(client.session())
        alone = [client.sample(sampler, [5, 6, 7 + k], seq=k) for k in range(4)]
        assert sizes == [1] * 4
        monkeypatch.setattr(engine, "GATHER_S", 1.0)
        sent = [client.submit_sample(sampler, [5, 6, 7 + k], seq=10 + k) for k in range(4)]
        assert [client.result(one)["sequences"] for one in sent] == [one["sequences"] for one in alone]
    assert sizes == [1, 1, 1, 1, 4]


def test_an_adapter_holds_one_snapshot_after_the_other(client: Client) -> None:
    """What is sampled from a snapshot stays the same when its place was taken, and memory holds no more of them."""
    session = client.session()
    model = client.model(session)
    rows = [datum([5, 9, 14, 7, 22, 31])]
    kept = []
    for number in range(6):
        client.learn(model, rows)
        client.step(model)
        kept.append(client.train("save_weights_for_sampler", model, path=f"s{number}")["path"])
    samplers = [client.sampler(session, 200 + k, path) for k, path in enumerate(kept)]
    drawn = [client.sample(one, [5, 9, 14], seed=4, stop=[])["sequences"] for one in samplers]
    assert len({str(each) for each in drawn}) == 6
    held = client.service.weights._adapters  # type: ignore[attr-defined]
    assert sum(slot.kind.rank == 4 for slot in held.values()) == weights.ALIKE
    assert [client.sample(one, [5, 9, 14], seq=1, seed=4, stop=[])["sequences"] for one in samplers] == drawn
