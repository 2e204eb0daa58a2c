"""Teacher traces against an API that misbehaves: what is paid is kept once, and the key is seen nowhere."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import pytest

from grpo_gsm8k import r1_traces
from tests.fake_api import BROKEN, FAULTS, REFUSALS, FakeApi, serve
from tests.toys import REPOSITORY, cli

KEY = "sk-0123456789abcdef0123456789abcdef"
QUICK = ["--backoff", "0.01", "--timeout", "5"]


def question(i):
    return f"What is {i} + {i}?"


def answer(prompt):
    number = int(prompt.split()[2])
    return f"I add {number} and {number}.", f"It is \\boxed{{{2 * number}}}."


@pytest.fixture
def infile(tmp_path):
    return make_problems(tmp_path / "problems.jsonl", 6)


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("DEEPSEEK_API_KEY", KEY)


def make_problems(path, n):
    rows = [{"id": f"p{i}", "question": question(i), "answer": f"{i}+{i}\n#### {2 * i}"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(url, infile, *flags, expect=0):
    """The command in this process; the object that it prints."""
    out = infile.parent / "traces.jsonl"
    argv = ["--base_url", url, "--infile", infile, "--outfile", out, *QUICK, *flags, "--json"]
    read, write = os.pipe()
    stdout, sys.stdout = sys.stdout, os.fdopen(write, "w")
    try:
        assert r1_traces.main([str(word) for word in argv]) == expect
        sys.stdout.close()
        with os.fdopen(read) as said:
            text = said.read()
    finally:
        sys.stdout = stdout
    return json.loads(text) if text else {}


def assert_key_nowhere(folder, *texts):
    for path in folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert not any(KEY in text for text in texts)


@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_recorded_with_tokens_and_cost(infile, stream):
    api = FakeApi(answer)
    flags = ["--stream"] if stream else []
    with serve(api) as url:
        said = run(url, infile, "--offpeak", "0.25", "--price_in", "1", "--price-out", "2", "--limit", "4", *flags)
    rows = rows_of(Path(said["outfile"]))
    assert (said["written"], said["records"], said["failed"], said["left"]) == (4, 4, 0, 0)
    assert {row["id"]: (row["reasoning_content"], row["content"]) for row in rows} == {
        f"p{i}": answer(question(i)) for i in range(4)
    }
    # By hand for p3: the prompt is 14 characters of question, two newlines and 70 of instruction; the answer is
    # 14 and 16 characters long. The fake API bills a token a character.
    (row,) = (row for row in rows if row["id"] == "p3")
    assert row["usage"] == {"prompt_tokens": 86, "completion_tokens": 30}
    assert row["cost"] == pytest.approx((86 * 1 + 30 * 2) * 0.25 / 1e6)
    assert row["answer"] == "3+3\n#### 6" and row["finish_reason"] == "stop"
    manifest = json.loads(Path(said["manifest"]).read_text())
    assert manifest["cost"] == pytest.approx(sum(row["cost"] for row in rows), abs=1e-6)
    assert manifest["asked"]["model"] == "deepseek-reasoner" and manifest["prices"]["offpeak"] == 0.25
    sent = api.requests[0]
    assert (sent["max_tokens"], sent["stream"], len(sent["messages"])) == (4096, stream, 1)


@pytest.mark.parametrize(
    ("fault", "stream"),
    [*((fault, False) for fault in (*REFUSALS, *BROKEN)), *((fault, True) for fault in BROKEN[1:-1])],
)
def test_every_fault_is_retried_and_paid_once(infile, fault, stream):
    api = FakeApi(answer, hang=1.0)
    api.script = [fault, fault]
    with serve(api) as url:
        said = run(url, infile, "--limit", "2", "--timeout", "0.8", *(["--stream"] if stream else []))
    assert (said["records"], said["failed"], api.met[fault]) == (2, 0, 2)
    assert set(api.paid.values()) == {1} and len(api.paid) == 2
    calls = rows_of(infile.parent / "traces.calls.jsonl")
    costs = [row["cost"] for row in calls if "cost" in row]
    assert len(costs) == 4 and sum(cost == 0 for cost in costs) == (2 if fault in REFUSALS else 0)
    assert_key_nowhere(infile.parent)


@pytest.mark.parametrize("fault", ["plain_text", "duplicate"])
def test_a_paid_answer_in_an_odd_wrapping_is_kept(infile, fault):
    api = FakeApi(answer)
    api.script = [fault]
    with serve(api) as url:
        assert run(url, infile, "--limit", "1")["records"] == 1
    assert len(api.requests) == 1


def test_failures_have_their_own_file_and_are_retried_alone(infile):
    api = FakeApi(answer)
    api.script = ["500"] * 3 + ["400"]
    with serve(api) as url:
        said = run(url, infile, "--max-retries", "2", "--concurrency", "1", expect=1)
        assert (said["written"], said["failed"], said["left"]) == (4, 2, 0)
        failures = rows_of(Path(said["failures"]))
        assert [(row["id"], row["attempts"], row["reason"][:8]) for row in failures] == [
            ("p0", 3, "HTTP 500"),
            ("p1", 1, "HTTP 400"),
        ]
        assert "[key]" in failures[0]["reason"]
        assert run(url, infile, expect=1)["written"] == 0 and len(api.requests) == 8  # they are left alone
        said = run(url, infile, "--retry_failed")
    assert (said["written"], said["records"], said["failed"]) == (2, 6, 0)
    assert len(api.requests) == 10 and set(api.paid.values()) == {1}
    assert_key_nowhere(infile.parent)


def test_samples_and_limits_are_extended_without_asking_again(infile):
    api = FakeApi(answer)
    with serve(api) as url:
        assert run(url, infile, "--limit", "2")["written"] == 2
        assert run(url, infile, "--limit", "3", "--samples-per-prompt", "2")["written"] == 4
    rows = rows_of(infile.parent / "traces.jsonl")
    assert sorted((row["id"], row["sample"]) for row in rows) == [(f"p{i}", s) for i in range(3) for s in range(2)]


def test_the_budget_is_never_overspent_and_counts_all_starts(infile):
    # A call costs at most (86 + 256) x 1 + 100 x 1000 dollars per million: 0.1003. It does cost 0.0301.
    flags = ["--price_in", "1", "--price_out", "1000", "--max_tokens", "100", "--concurrency", "4"]
    api = FakeApi(answer)
    with serve(api) as url:
        said = run(url, infile, *flags, "--budget", "0.05")
        assert said["written"] == 0 and "budget" in said["stopped"] and not api.requests
        said = run(url, infile, *flags, "--budget", "0.165")
        assert said["records"] == 3 and api.most == 1  # no room for two at once, none after the third
        api.script = ["drop"]  # it may have been billed: no more room
        said = run(url, infile, *flags, "--budget", "0.2")
        assert said["records"] == 3 and len(api.requests) == 4
        assert said["cost"] == pytest.approx(3 * 0.0301 + 0.1003, abs=2e-3)
        assert run(url, infile, *flags, "--budget", "2")["records"] == 6


def test_429_halves_the_calls_at_once_and_retry_after_stops_all_of_them(infile):
    gate = r1_traces.Gate(8)
    gate.throttled(started=1.0, now=2.0)
    gate.throttled(started=1.5, now=2.1)  # of the same burst
    assert gate.limit == 4
    gate.throttled(started=2.5, now=3.0)
    assert gate.limit == 2
    for _ in range(2):
        gate.succeeded()
    assert gate.limit == pytest.approx(2 + 1 / 2 + 1 / 2.5)
    for now, wanted in ((9.9, False), (10.0, True)):
        gate.resume_at = 10.0
        assert gate.open(now) is wanted

    class Busy(FakeApi):
        arrived: ClassVar = []

        async def _chat(self, request):
            self.arrived.append(time.monotonic())
            return await super()._chat(request)

        def _refusal(self, fault, request):
            self.refused = time.monotonic()
            response = super()._refusal(fault, request)
            response.headers["Retry-After"] = "1"
            return response

    api = Busy(answer, delay=0.01)
    api.script = ["429"]
    with serve(api) as url:
        assert run(url, infile, "--concurrency", "2")["records"] == 6
    soon = [at for at in api.arrived if at < api.refused + 0.99]
    assert len(soon) <= 3 and len(api.arrived) == 7  # what was on the way, and then nobody for a second


def test_retry_after_in_both_forms():
    now = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
    cases = {"7": 7.0, "Thu, 01 Jan 2026 12:01:30 GMT": 90.0, "Thu, 01 Jan 2026 11:00:00 GMT": 0.0}
    cases |= {None: 0.0, "soon": 0.0, "-3": 0.0, "Thu, 01 Jan 2026 12:00:05": 5.0}
    assert {value: r1_traces.retry_after(value, now) for value in cases} == cases


def test_a_hopeless_answer_stops_at_once_and_nothing_is_marked_failed(infile, capfd):
    api = FakeApi(answer)
    with serve(api) as url:
        for status, word in (("401", "DEEPSEEK_API_KEY"), ("402", "balance"), ("404", "--model")):
            api.script, api.requests = [status] * 99, []
            run(url, infile, "--concurrency", "2", "--max_retries", "0", expect=2)
            err = capfd.readouterr().err
            assert 1 <= len(api.requests) <= 2 and err.count("error: ") == 1 and word in err and KEY not in err
    assert (infile.parent / "traces.failures.jsonl").read_bytes() == b""
    with serve(FakeApi(answer)) as url:  # nothing is recorded yet: another endpoint may take the outfile
        run(url, infile)
    with serve(FakeApi(answer)) as url:  # from the first answer on, the base URL is part of what was asked
        run(url, infile, expect=2)
    assert "was begun otherwise (base_url" in capfd.readouterr().err
    assert_key_nowhere(infile.parent)


@pytest.mark.parametrize("where", ["http://localhost:1/v1\x1b[31m", "//evil.example/x", "/v1/other", ""])
def test_a_redirect_stops_at_once_and_gets_neither_key_nor_question(infile, capfd, where):
    api = FakeApi(answer)
    api.script, api.location = ["307"] * 99, where
    with serve(api) as url:
        run(url, infile, "--concurrency", "1", expect=2)
    err = capfd.readouterr().err
    assert len(api.requests) == 1 and "HTTP 307: a redirect to" in err and err.count("\n") == 2 and "\x1b" not in err
    assert (infile.parent / "traces.failures.jsonl").read_bytes() == b""


@pytest.mark.parametrize("fault", ["bomb", "bomb_500", "odd_encoding", "broken_gzip"])
def test_a_body_is_never_held_beyond_its_limit(infile, fault):
    """40 kB of gzip that hold 40 MB, and what is no gzip at all."""
    api = FakeApi(answer)
    api.script = [fault] * 2
    api.bomb = gzip.compress(bytes(40 << 20))
    tracemalloc.start()
    with serve(api) as url:
        said = run(url, infile, "--limit", "1", "--max_retries", "1", expect=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert said["failed"] == 1 and peak < 24 << 20
    (row,) = rows_of(infile.parent / "traces.failures.jsonl")
    words = {"bomb": "more than 8388608 bytes", "bomb_500": "HTTP 500", "odd_encoding": "'br'", "broken_gzip": "broken"}
    assert words[fault] in row["reason"]


def test_a_compressed_answer_is_read(infile):
    api = FakeApi(answer)
    api.script = ["gzip", "two_gzips", "deflate"]
    with serve(api) as url:
        assert run(url, infile, "--limit", "3", "--concurrency", "1")["records"] == 3
    assert set(api.met) >= {"gzip", "two_gzips", "deflate"} and api.met[""] == 0


@pytest.mark.parametrize("name", ["traces.jsonl", "traces.failures.jsonl", "traces.calls.jsonl"])
def test_a_fifo_in_the_place_of_a_file_is_refused_at_once(infile, capfd, name):
    os.mkfifo(infile.parent / name)
    run("http://127.0.0.1:9", infile, expect=2)
    assert "is no regular file" in capfd.readouterr().err


def test_a_manifest_is_not_written_through_a_link_that_others_can_foresee(tmp_path):
    (tmp_path / ".tmp-m.json").symlink_to(tmp_path / "elsewhere")
    r1_traces.write_json(tmp_path / "m.json", {"a": 1})
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "m.json").is_symlink()


@pytest.mark.parametrize(
    ("rows", "flags", "words"),
    [
        ('{"question": "a"}\n{"quest": 1}\n', [], ["f.jsonl:2", "question"]),
        ('{"question": "a"}\n{"question": "a"}\n', [], ["f.jsonl:2", "earlier line"]),
        ('{"question": "a"}\n', ["--concurrency", "0"], ["concurrency"]),
        ('{"question": "a"}\n', ["--budget", "-1"], ["budget"]),
        ('{"question": "a"}\n', ["--base_url", "https://me:secret@host/v1"], ["base_url"]),
        ('{"question": "a"}\n', ["--api_key_env", "NOT_SET"], ["NOT_SET"]),
        ('{"question": "a"}\n', ["--nonsense"], ["nonsense"]),
    ],
)
def test_mistakes_get_one_line(tmp_path, capsys, rows, flags, words):
    (tmp_path / "f.jsonl").write_text(rows)
    argv = ["--infile", str(tmp_path / "f.jsonl"), "--outfile", str(tmp_path / "o.jsonl"), *flags]
    assert r1_traces.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and all(word in err for word in words)


def test_two_at_once_and_a_strange_outfile_are_refused(infile, capfd):
    log = r1_traces.Log(infile.parent / "traces.jsonl", r1_traces.Redact(KEY))
    run("http://127.0.0.1:9", infile, expect=2)
    assert "another process" in capfd.readouterr().err
    log.close()
    (infile.parent / "traces.jsonl").write_text('{"id": "x"}\n')
    run("http://127.0.0.1:9", infile, expect=2)
    assert "not from here" in capfd.readouterr().err


def test_an_answer_file_cut_at_any_byte_goes_on(tmp_path):
    rows = [{"id": "a", "text": 'say "}" \u00e9'}, {"id": "b", "n": [1, {"x": 2}]}]
    path = tmp_path / "log.jsonl"
    log = r1_traces.Log(path, r1_traces.Redact(""))
    for row in rows:
        log.add(row)
    log.close()
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        log = r1_traces.Log(path, r1_traces.Redact(""))
        # A row is there as soon as its closing brace is: then it has been paid, and only the newline is missing.
        expected = rows[: (cut >= first - 1) + (cut >= len(whole) - 1)]
        assert list(log.rows()) == expected, cut
        log.add({"id": "c"})
        log.close()
        assert rows_of(path) == [*expected, {"id": "c"}]


def test_half_a_surrogate_pair_and_an_echoed_key_are_written(tmp_path):
    log = r1_traces.Log(tmp_path / "log.jsonl", r1_traces.Redact(KEY))
    log.add({"content": f"x\ud800y Bearer {KEY}"})
    assert rows_of(tmp_path / "log.jsonl") == [{"content": "x?y Bearer [key]"}]
    assert r1_traces.Redact("EMPTY")("EMPTY") == "EMPTY"


def test_a_slow_call_is_not_silent(infile, capfd, monkeypatch):
    monkeypatch.setattr(r1_traces, "LINE_EVERY_S", 0.2)
    monkeypatch.setattr(r1_traces, "TICK_S", 0.05)
    with serve(FakeApi(answer, delay=1.0)) as url:
        run(url, infile, "--limit", "1")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) >= 3 and lines[0].startswith("traces 0/1, 0 failed, 1 of ") and lines[-1].startswith("traces 1/1")


def test_ctrl_c_waits_for_the_calls_under_way(infile):
    api = FakeApi(answer, delay=0.5)
    with serve(api) as url:
        process = start(url, infile, "--concurrency", "2")
        wait_until(lambda: len(api.requests) == 2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
    assert json.loads(out)["records"] == 2 and len(api.requests) == 2 and sum(api.paid.values()) == 2


def test_the_command_line_is_the_same_program(infile):
    with serve(FakeApi(answer)) as url:
        flags = ["--infile", infile, "--outfile", infile.parent / "t.jsonl", "--base-url", url, "--limit", "2"]
        done = cli("traces", *flags, "--max_retries", "0", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written"] == 2


def start(url, infile, *flags):
    """The script as the README types it, in a process of its own."""
    out = infile.parent / "traces.jsonl"
    command = [sys.executable, REPOSITORY / "grpo_gsm8k/r1_traces.py", "--base_url", url, "--infile", infile]
    command += ["--outfile", out, "--json", *flags]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(true, patience=60.0):
    deadline = time.monotonic() + patience
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def storm(tmp_path, prompts, kills, concurrency, stream, kinds=FAULTS):
    """Faults mixed at 30 %, the process killed again and again; the server counts what is paid."""
    infile, out = make_problems(tmp_path / "problems.jsonl", prompts), tmp_path / "traces.jsonl"
    api = FakeApi(answer, faults=0.3, kinds=kinds, delay=0.03, hang=4.0)
    flags = [*QUICK, "--timeout", "3", "--max-retries", "9", "--concurrency", str(concurrency)]
    flags += ["--stream"] if stream else []
    lost_at, said = [], []
    with serve(api) as url:
        for kill in range(kills):
            process = start(url, infile, *flags)
            wanted = prompts * (kill + 1) // (kills + 1)
            wait_until(lambda wanted=wanted: out.is_file() and out.read_bytes().count(b"\n") >= wanted)
            process.kill()
            said += process.communicate()
            time.sleep(0.1)  # what the kill has left in the sockets
            wait_until(lambda: not api.running)
            lost_at.append(sum(api.paid.values()) - out.read_bytes().count(b"\n") - sum(lost_at))
        process = start(url, infile, *flags)
        said += process.communicate(timeout=120)
    assert process.returncode == 0, said[-1]
    result = json.loads(said[-2])
    rows = rows_of(out)
    assert len(rows) == len({row["id"] for row in rows}) == result["records"] == prompts
    assert all((row["reasoning_content"], row["content"]) == answer(row["question"]) for row in rows)
    assert sum(api.paid.values()) == prompts + sum(lost_at)  # what was on the way at a kill, and nothing else
    assert all(0 <= lost <= concurrency for lost in lost_at), lost_at
    assert max(api.paid.values()) <= kills + 1
    assert set(kinds) <= set(api.met)
    calls = rows_of(tmp_path / "traces.calls.jsonl")
    begun, ended = ([row["call"] for row in calls if key in row] for key in ("at_most", "cost"))
    assert begun == list(range(1, len(begun) + 1)) and len(set(ended)) == len(ended)
    for unknown in (len(begun) - len(api.requests), len(begun) - len(ended)):  # noted and not sent; sent, no answer
        assert 0 <= unknown <= kills * concurrency
    assert result["cost_at_most"] > result["cost"] >= sum(row["cost"] for row in rows) - 1e-9
    assert_key_nowhere(tmp_path, *said)


def test_a_storm(tmp_path):
    storm(tmp_path, prompts=120, kills=1, concurrency=16, stream=True, kinds=set(FAULTS) - {"timeout", "drip"})


@pytest.mark.slow
def test_the_great_storm(tmp_path):
    storm(tmp_path, prompts=500, kills=5, concurrency=16, stream=False)


def test_the_try_out_ends_in_seconds_with_every_answer(tmp_path):
    command = [sys.executable, "-m", "tests.fake_api", "--try", "20", "--faults", "0.5", "--out", str(tmp_path / "try")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "try" / "traces.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 20
    for row in rows:
        a, b = map(int, re.findall(r"\d+", row["question"]))
        assert row["content"].endswith(f"\\boxed{{{a + b}}}")
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 2 and "holds a try-out already" in again.stderr


def test_a_busy_port_is_named():
    with serve(FakeApi(lambda prompt: ("", "x"))) as url:
        port = url.rpartition(":")[2].removesuffix("/v1")
        command = [sys.executable, "-m", "tests.fake_api", "--port", port]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: port {port} is busy; end what listens there")
