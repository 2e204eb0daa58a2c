"""What is known before anything is rented: memory, prices, access; and what is pushed and restored."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from grpo_gsm8k import config
from grpo_gsm8k.errors import ConfigError, ModelError
from grpo_gsm8k.launch import hub, keep
from grpo_gsm8k.launch.hub import ModelFacts
from grpo_gsm8k.launch.plan import GIB, lora_parameters, need, plan
from grpo_gsm8k.launch.settings import PlanConfig
from grpo_gsm8k.launch.up import up
from tests import fake_hub
from tests.fake_runpod import FakeRunpod, serve
from tests.test_launch import QUICK

TOKEN = "hf_TOKEN0123456789abcdef"
KEY = "rpa_KEY0123456789abcdef"
SMALL = ModelFacts("Qwen2.5-Math-1.5B", "", "", 1_543_714_304, 28, 1536, 8960, 12, 2, 128, 151936)
LARGE = ModelFacts("Qwen2.5-Math-7B", "", "", 7_615_616_512, 28, 3584, 18944, 28, 4, 128, 152064)
WORKED = {"microbatch_tokens": 16384, "sampled_tokens": 16384, "lora_rank": 64}


def settings(**values):
    return config.build(PlanConfig, {**WORKED, **values})


@pytest.mark.parametrize(
    ("facts", "values", "gib"),
    [
        (SMALL, {"sleep": False}, 37),
        (SMALL, {"sleep": True}, 32),
        (LARGE, {"sleep": False}, 151),
        (LARGE, {"method": "grpo-lora", "sleep": False}, 46),
    ],
)
def test_memory_of_the_worked_examples(facts, values, gib):
    assert need(facts, settings(**values)) / GIB == pytest.approx(gib, abs=0.6)


def test_memory_term_by_term():
    """By hand, for a model of round numbers: N 1000, L 2, d 10, ff 30, H 2 and kv 1 of 5, V 100; T 8, chunk 4."""
    toy = ModelFacts("toy", "", "", 1000, 2, 10, 30, 2, 1, 5, 100)
    values = {"microbatch_tokens": 8, "logit_chunk": 4, "sampled_tokens": 7, "lora_rank": 2, "sleep": False}
    # Act: 8 (2*2*10 + 2 (100 + 90) + 4 * 4 * 5) = 8 * 500 = 4000; logits 10 * 100 * 4 = 4000
    # sampler: 2000 + 4 * 2 * 1 * 5 * 7 = 2280, and 1.5 GiB; with the 2 GiB of the context 3.5 GiB
    fixed = 3.5 * GIB
    assert need(toy, settings(**values)) == pytest.approx(1.08 * (16000 + 8000 + 2280 + fixed), abs=1e-3)
    assert need(toy, settings(**values, kl=True)) == pytest.approx(1.08 * (18000 + 8000 + 2280 + fixed), abs=1e-3)
    assert need(toy, settings(**values, method="sft")) == pytest.approx(1.08 * (16000 + 8000 + 2 * GIB), abs=1e-3)
    # q and o 2 (10 + 10), k and v 2 (10 + 5), the MLP 3 (10 + 30): 190 a layer and rank
    assert lora_parameters(toy, 2) == 2 * 2 * 190
    asleep = settings(**(values | {"sleep": True}))
    assert need(toy, asleep) == pytest.approx(1.08 * (14000 + 2280 + fixed), abs=1e-3)  # awake is the larger half
    assert need(toy, settings(**values), 4) == pytest.approx(1.08 * (4000 + 8000 + 2280 + fixed), abs=1e-3)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A fake hub and a fake provider, and the environment that points at them."""
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with fake_hub.serve(fake_hub.FakeHub(TOKEN)) as the_hub, serve(FakeRunpod(tmp_path / "pods", KEY)) as provider:
        monkeypatch.setenv("RUNPOD_API_BASE_URL", provider.url)
        who = {"token": TOKEN}
        monkeypatch.setattr(hub, "api", lambda: HfApi(endpoint=the_hub.url, token=who["token"]))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        the_hub.who = who
        yield the_hub, provider


def put_model(the_hub, facts, gated=False):
    repo = f"Qwen/{facts.model_id}"
    shape = {"num_hidden_layers": facts.layers, "hidden_size": facts.hidden, "intermediate_size": facts.mlp}
    shape |= {"num_attention_heads": facts.heads, "num_key_value_heads": facts.kv_heads, "vocab_size": facts.vocab}
    the_hub.files[repo] = {"config.json": json.dumps(shape).encode()}
    the_hub.info[repo] = {
        "safetensors": {"parameters": {"BF16": facts.parameters}, "total": facts.parameters},
        "gated": gated,
    }
    the_hub.gated |= {repo} if gated else set()
    return repo


def test_a_plan_names_the_gpus_that_suffice_at_the_live_price(world, tmp_path):
    the_hub, provider = world
    repo = put_model(the_hub, SMALL)
    found = plan({**WORKED, "model_id": repo, "sleep": False})
    assert [(row["gpu"], row["count"], row["price"]) for row in found["gpus"]] == [
        ("NVIDIA L40S", 1, 0.99),
        ("NVIDIA A100-SXM4-80GB", 1, 1.59),
        ("NVIDIA H100 80GB HBM3", 1, 3.29),
        ("NVIDIA H200", 1, 4.59),
    ]
    # 6 * 1.5437e9 * 1e8 * 1.5 FLOP at 0.4 * 362e12 a second are 2.665 hours; a quarter of an hour to set up
    assert found["gpus"][0]["hours"] == pytest.approx(2.665 + 0.25, abs=0.01)
    assert found["gpus"][0]["cost"] == pytest.approx(2.915 * 0.99, abs=0.02)
    large = put_model(the_hub, LARGE, gated="manual")
    full = plan({**WORKED, "model_id": large, "sleep": False})
    assert [(row["gpu"], row["count"]) for row in full["gpus"]][1:3] == [
        ("NVIDIA A100-SXM4-80GB", 4),
        ("NVIDIA H100 80GB HBM3", 4),
    ]
    lora = plan({**WORKED, "model_id": large, "method": "grpo-lora", "sleep": False, "count": 1})
    assert lora["too_small"] == ["NVIDIA L40S"] and lora["gpus"][0]["gpu"] == "NVIDIA A100-SXM4-80GB"
    the_hub.who["token"] = "hf_somebody_else"
    with pytest.raises(ModelError, match="gated, and this HF_TOKEN has no access"):
        plan({"model_id": large})
    with pytest.raises(ModelError, match="no such model"):
        plan({"model_id": "Qwen/none"})
    assert provider.pods == {}


def test_push_rights_are_known_before_a_cent_is_spent(world):
    the_hub, provider = world
    hub.check_push("me/new")
    assert the_hub.files == {"me/new": {}}  # made, private
    the_hub.read_only.add("me/new")
    for repo in ("me/new", "others/new"):
        with pytest.raises(ConfigError, match="cannot be pushed to with this HF_TOKEN"):
            plan({"repo_id": repo})
    with pytest.raises(ConfigError, match="must read owner/name"):
        hub.check_push("a/b/c")
    assert not provider.met


def test_a_run_folder_is_pushed_and_a_new_machine_goes_on_from_it(world, tmp_path):
    the_hub, _ = world
    hub.check_push("me/run")
    first, second = tmp_path / "a", tmp_path / "b"
    job = (
        "mkdir -p {0}/checkpoints/step_1 {0}/.writing_2; echo 1 >> {0}/checkpoints/step_1/w; echo x > {0}/.writing_2/w"
    )
    assert keep.run("me/run", first, 0.05, ["sh", "-c", job.format(first) + "; sleep 0.5; kill -9 $$"]) == 137
    assert the_hub.files["me/run"] == {"run/checkpoints/step_1/w": b"1\n"} and the_hub.commits
    then = job.format(second).replace("step_1", "step_3") + f"; rm -r {second}/checkpoints/step_1"
    assert keep.run("me/run", second, 60, ["sh", "-c", f"cat {second}/checkpoints/step_1/w && {then}"]) == 0
    assert the_hub.files["me/run"] == {"run/checkpoints/step_3/w": b"1\n"}


@pytest.mark.slow  # two pods load the hub's client
def test_after_a_dead_host_a_new_pod_goes_on_from_the_last_push(world, tmp_path, monkeypatch, capfd):
    the_hub, provider = world
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", the_hub.url)

    def watch(event):
        if event.startswith("command_") and the_hub.commits and len(provider.pods) == 1:
            provider.on_command.setdefault(int(event.removeprefix("command_")) + 1, "die")

    provider.watch = watch
    job = "mkdir -p artifacts; cat artifacts/step && exit; echo pushed > artifacts/step; sleep 100"
    settings = {"repo_id": "me/run", "push_every_s": 0.1, "ssh_s": 5.0, "state_dir": str(tmp_path / "state")}
    done = up({**QUICK, **settings}, ["sh", "-c", job])
    said = capfd.readouterr().err
    assert provider.billable() == [] and done["pods"] == ["pod1", "pod2"] and provider.most_at_once == 1
    assert "pod1 is EXITED; a new pod will go on from the last pushed checkpoint" in said
    assert "going on from what was pushed" in said and "\npushed\n" in said
    assert (tmp_path / "state" / done["run"] / "results" / "artifacts" / "step").read_text() == "pushed\n"
