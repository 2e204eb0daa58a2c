"""The page and the metrics: no data without the key, nothing from elsewhere, every text inert."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import httpx
import pytest

from grpo_gsm8k.serve.page.metrics import exposition
from tests import browser
from tests.serve_tools import KEY, Process, free_port
from tests.serving import serving

HOSTILE = '<img src=x onerror="document.title=1">"\\\n</script>'
RUN = {"n": 2, "groups_per_batch": 1, "max_tokens": 4, "lora_rank": 4}


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    with serving(tiny.model, tmp_path_factory.mktemp("serve") / "out") as found:
        play(lambda path, body: found.client.post(path, json=body), updates=3)
        yield found


def play(post, updates):
    """A run with some updates, a sample, and refusals, all with a hostile text."""
    post("/v1/start", RUN)
    for _ in range(updates):
        found = post("/v1/rollouts", {"prompts": [HOSTILE]}).json()["rollouts"][0]["completions"]
        rewards = [{"rollout_id": one["rollout_id"], "reward": k} for k, one in enumerate(found)]
        assert post("/v1/rewards", {"rewards": rewards}).status_code == 200
    name = post("/v1/completions", {"model": "tiny", "prompt": HOSTILE, "max_tokens": 4}).json()
    assert name["choices"]
    post("/v1/completions", {"model": "tiny", "prompt": "x", HOSTILE: 1})


def test_the_page_needs_no_key_and_holds_no_data(served):
    no_key = {"X-API-Key": ""}
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        answer = served.client.get(path, headers=no_key)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/page/status", "/metrics"):
        assert served.client.get(path, headers=no_key).status_code == 401


def test_the_page_takes_nothing_from_elsewhere_and_writes_no_markup(served):
    html, css, script = (served.client.get(path).text for path in ("/", "/page.css", "/page.js"))
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert sorted(links) == ["data:,", "page.css", "page.js"]
    assert "url(" not in css and "@import" not in css
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)
    assert re.findall(r"https?://[^\s\"']+", html + css + script) == ["http://www.w3.org/2000/svg"] * 2
    assert "style=" not in html and "onclick" not in html and "<script>" not in html


def test_what_the_page_shows(served):
    found = served.client.get("/page/status").json()
    run, (model, *_) = found["rollouts"], found["models"]
    assert found["base"] == "tiny" and model["steps"] == 3 and len(model["history"]) == 3
    assert [row["version"] for row in run["history"]] == [1, 2, 3] and run["history"][0]["reward/mean"] == 0.5
    assert found["models_in_all"] == len(found["models"]) and set(model["history"][0]) == {"step", "loss:sum"}
    assert any(sample["prompt"] == HOSTILE for sample in run["samples"])
    assert any(HOSTILE in sample["prompt"] for sample in found["samples"])
    assert any("unknown field" in refusal["reason"] for refusal in found["refusals"])


def families(text):
    """By Prometheus' own parser: {name: {labels: value}}."""
    parser = pytest.importorskip("prometheus_client.parser", reason="uv run --group service pytest")
    found = {}
    for family in parser.text_string_to_metric_families(text):
        assert family.documentation and family.type in ("gauge", "counter")
        found |= {sample.name: {} for sample in family.samples if sample.name not in found}
        for sample in family.samples:
            found[sample.name][tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_prometheus_reads_the_metrics(served):
    answer = served.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found, status = families(answer.text), served.client.get("/page/status").json()
    model = status["models"][0]["model_id"]
    assert found["grpo_gsm8k_model_steps_total"][("model", model),] == 3
    assert found["grpo_gsm8k_rollouts_version"][()] == 3 and found["grpo_gsm8k_rollouts_running"][()] == 1
    assert found["grpo_gsm8k_rollouts_last_update"][("metric", "reward/mean"),] == 0.5
    assert found["grpo_gsm8k_queue_requests"].keys() == {(("kind", k),) for k in ("training", "sampling", "decoding")}
    assert found["grpo_gsm8k_sampled_tokens_total"][()] == status["totals"]["sampled_tokens"] > 0
    assert found["grpo_gsm8k_model_metric"][("metric", "loss:sum"), ("model", model)] == pytest.approx(0, abs=1e-3)


def test_hostile_names_and_numbers_survive_the_metrics():
    names = {"steps": 1, "queued": 0, "resident": True, "last": {"a:b": float("nan"), "c": float("inf")}}
    status = {
        "uptime_s": 1.5,
        "sessions": {"live": 1, "all": 2},
        "queue": {"training": 0, "sampling": 1, "decoding": 0, "oldest_s": None},
        "disk": {"free": 10, "fault": ""},
        "checkpoints": 0,
        "totals": {},
        "models_in_all": 1,
        "models": [{"model_id": HOSTILE, **names}],
    }
    found = families(exposition(status))
    assert found["grpo_gsm8k_model_steps_total"][("model", HOSTILE),] == 1
    values = found["grpo_gsm8k_model_metric"]
    assert values[("metric", "c"), ("model", HOSTILE)] == float("inf")
    assert str(values[("metric", "a:b"), ("model", HOSTILE)]) == "nan"


needs_chromium = pytest.mark.skipif(not browser.PROGRAM, reason="no chromium")


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_in_a_browser(tiny, tmp_path, width, height, scheme):
    """The key is asked for, all is shown and stays text, nothing overflows, and a server that is gone is told."""
    process = Process(tiny.model, tmp_path / "out", free_port(), served_name="tiny")
    process.start()
    try:
        headers = {"X-API-Key": KEY}
        play(lambda path, body: httpx.post(process.url + path, json=body, headers=headers, timeout=60), updates=12)
        asyncio.run(look(process, tmp_path, width, height, scheme))
    finally:
        if process.process and process.process.poll() is None:
            process.end()


async def look(process, folder, width, height, scheme):
    async with browser.opened(process.url, folder / "browser", width, height, scheme) as page:
        await page.until("!document.getElementById('ask').hidden")
        assert await page.value("document.getElementById('main').hidden")

        async def enter(key):
            await page.value(f"document.getElementById('key').value = {key!r}")
            await page.value("document.getElementById('ask').requestSubmit() || true")

        await enter("tml-wrong")
        await page.until("document.getElementById('state').textContent.includes('does not know this key')")
        await enter(KEY)
        await page.until("!document.getElementById('main').hidden && document.querySelectorAll('svg').length >= 3")
        shown = await page.value("document.getElementById('samples').textContent")
        assert '<img src=x onerror="document.title=1">' in shown
        assert await page.value("document.querySelectorAll('main img, main script, main iframe').length") == 0
        assert await page.value("document.title") == "grpo_gsm8k service"
        assert "unknown field" in await page.value("document.getElementById('refusals').textContent")
        wide = await page.value("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide[0] <= wide[1]
        out = Path(os.environ.get("GRPO_GSM8K_PICTURES") or folder)
        await page.picture(out / f"service-{width}-{scheme}.png", width)
        hosts = {httpx.URL(event["request"]["url"]).host for event in page.of("Network.requestWillBeSent")}
        assert hosts <= {"127.0.0.1", ""} and page.of("Runtime.exceptionThrown") == []
        assert KEY not in await page.value("document.documentElement.outerHTML")
        process.end()
        await page.until("document.getElementById('state').textContent.includes('does not answer')")
