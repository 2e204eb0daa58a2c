"""What is known before anything is rented: memory, prices, access; and what is pushed and restored."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import HfApi

from grpo_gsm8k import config
from grpo_gsm8k.errors import CheckpointError, ConfigError, ModelError, UserError
from grpo_gsm8k.launch import hub, keep, publish
from grpo_gsm8k.launch.hub import ModelFacts
from grpo_gsm8k.launch.job import with_memory
from grpo_gsm8k.launch.plan import GIB, USABLE, need, plan
from grpo_gsm8k.launch.settings import PlanConfig, UpConfig
from grpo_gsm8k.launch.sky import write_task
from grpo_gsm8k.launch.up import up
from grpo_gsm8k.runs.files import write_json, write_jsonl
from grpo_gsm8k.trainer import checkpoint
from grpo_gsm8k.trainer.costs import CHUNK_BYTES, Shape
from tests import fake_hub
from tests.fake_runpod import FakeRunpod, serve
from tests.test_launch import QUICK

TOKEN = "hf_TOKEN0123456789abcdef"
KEY = "rpa_KEY0123456789abcdef"
SMALL = ModelFacts("Qwen2.5-Math-1.5B", "", "", Shape(1_543_714_304, 28, 1536, 8960, 12, 2, 128, 151936))
LARGE = ModelFacts("Qwen2.5-Math-7B", "", "", Shape(7_615_616_512, 28, 3584, 18944, 28, 4, 128, 152064, False))
WORKED = {"microbatch_tokens": 16384, "sampled_tokens": 16384, "lora_rank": 64}


def settings(**values):
    return config.build(PlanConfig, {**WORKED, **values})


@pytest.mark.parametrize(
    ("facts", "values", "gib", "float32_gradients"),
    [
        (SMALL, {"sleep": False}, 37, True),
        (SMALL, {"sleep": True}, 32, True),
        (LARGE, {"sleep": False}, 151, True),
        (LARGE, {"method": "grpo-lora", "sleep": False}, 46, False),
    ],
)
def test_memory_of_the_worked_examples(facts, values, gib, float32_gradients):
    """Their 16 bytes a parameter have gradients in bfloat16; ours are summed in float32, which is 2 more."""
    more = 1.08 * 2 * facts.shape.parameters / GIB if float32_gradients else 0
    assert need(facts, settings(**values)) / GIB == pytest.approx(gib + more, abs=0.7)


def test_memory_term_by_term(monkeypatch):
    """By hand, for a model of round numbers: N 1000, L 2, d 10, ff 30, H 2 and kv 1 of 5, V 100; T 8, chunk 4."""
    monkeypatch.setitem(CHUNK_BYTES, "cuda", 4 * 400)
    toy = ModelFacts("toy", "", "", Shape(1000, 2, 10, 30, 2, 1, 5, 100))
    values = {"microbatch_tokens": 8, "sampled_tokens": 7, "lora_rank": 2, "sleep": False}
    # Kept of a cell: two layers' inputs 2 x 20, the last norm 60, the id and the log-probability's 12: 112 x 8 = 896
    # The head: 4 x 100 logits of 10 bytes, 3 x 20 of hidden states for each of 8, its gradient 4000: 8480 in all. The
    # backward pass takes more: 2000 for the tied embedding, 6 x 300 of the largest matrix, and 8 cells of a layer that
    # is run again, 60 and 80.
    again = 160 + 2 * 2 * 5 * 3 + 4 * 2 + 8 * 30 + 8
    backward = 2000 + 6 * 300 + 8 * (again + 60 + 80)
    assert (again, backward) == (476, 8728)
    # sampler: 2000 + 4 * 2 * 1 * 5 * 7 = 2280, and 1.5 GiB; with the 2 GiB of the context 3.5 GiB
    fixed = 3.5 * GIB
    update = 896 + backward
    assert need(toy, settings(**values)) == pytest.approx(1.08 * (18000 + update + 2280 + fixed), abs=1e-3)
    assert need(toy, settings(**values, kl=True)) == pytest.approx(1.08 * (20000 + update + 2280 + fixed), abs=1e-3)
    assert need(toy, settings(**values, method="sft")) == pytest.approx(1.08 * (18000 + update + 2 * GIB), abs=1e-3)
    asleep = settings(**(values | {"sleep": True}))
    assert need(toy, asleep) == pytest.approx(1.08 * (14000 + 2280 + fixed), abs=1e-3)  # awake is the larger half
    offloaded = settings(**values, optimizer_device="cpu")
    assert need(toy, offloaded, 4) == pytest.approx(
        1.08 * (6000 + update + 2280 + fixed), abs=1e-3
    )  # on one of the four


REAL_API = hub.api


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
    own = facts.shape
    shape = {"num_hidden_layers": own.layers, "hidden_size": own.hidden, "intermediate_size": own.mlp}
    shape |= {"num_attention_heads": own.heads, "num_key_value_heads": own.kv_heads, "vocab_size": own.vocab}
    the_hub.files[repo] = {"config.json": json.dumps({**shape, "tie_word_embeddings": own.tied}).encode()}
    the_hub.info[repo] = {
        "safetensors": {"parameters": {"BF16": own.parameters}, "total": own.parameters},
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
    full = plan({**WORKED, "model_id": large})
    counts = {row["gpu"]: row["count"] for row in full["gpus"]}
    assert counts == {"NVIDIA A100-SXM4-80GB": 4, "NVIDIA H100 80GB HBM3": 4, "NVIDIA H200": 2}
    lora = plan({**WORKED, "model_id": large, "method": "grpo-lora", "sleep": False, "count": 1})
    assert lora["too_small"] == ["NVIDIA L40S"] and lora["gpus"][0]["gpu"] == "NVIDIA A100-SXM4-80GB"
    the_hub.who["token"] = "hf_somebody_else"
    with pytest.raises(ModelError, match="gated, and this HF_TOKEN has no access"):
        plan({"model_id": large})
    with pytest.raises(ModelError, match="no such model"):
        plan({"model_id": "Qwen/none"})
    assert provider.pods == {}


def test_push_rights_are_known_before_a_cent_is_spent(world, monkeypatch):
    the_hub, provider = world
    hub.check_push("me/new")
    assert the_hub.files == {"me/new": {}}  # made, private
    the_hub.read_only.add("me/new")
    for repo in ("me/new", "others/new"):
        with pytest.raises(ConfigError, match="cannot be pushed to with this HF_TOKEN"):
            plan({"repo_id": repo})
    with pytest.raises(ConfigError, match="must read owner/name"):
        hub.check_push("a/b/c")
    monkeypatch.setattr(hub, "api", lambda: HfApi(endpoint="http://127.0.0.1:1", token=TOKEN))
    with pytest.raises(ConfigError, match="nothing was rented"):
        hub.check_push("me/new")
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


def test_nothing_is_published_without_a_word(world):
    the_hub, provider = world
    the_hub.files["me/open"], the_hub.public = {}, {"me/open"}
    with pytest.raises(ConfigError, match=r"is a public repository.*--public"):
        up({**QUICK, "repo_id": "me/open"}, ["true"])
    hub.check_push("me/open", public=True)
    assert not provider.requests["create"]


@pytest.mark.parametrize("public", [False, True])
def test_what_looks_secret_is_not_pushed_and_no_link_is_followed(world, tmp_path, public):
    the_hub, _ = world
    hub.check_push("me/run")
    kept = {"runs/a/metrics.jsonl", "runs/a/checkpoints/step_1/model.safetensors", "runs/a/tokenizer.json"}
    personal = {"runs/a/wandb/x/run-1.wandb", "runs/a/sys/machine.json", "runs/a/command.txt", "job.log"}
    secret = {".env", "runs/a/.env.local", "runs/a/id_rsa", "x.pem", ".netrc", "runs/.git/config", "a/.ssh/known"}
    for name in kept | personal | secret | {".git/config", "c/credentials.json", "token"}:
        (tmp_path / "artifacts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "artifacts" / name).write_text("x")
    (tmp_path / "outside").write_text("private")
    (tmp_path / "artifacts" / "runs" / "a" / "link[1]").symlink_to(tmp_path / "outside")
    keep.push("me/run", tmp_path / "artifacts", public)
    assert set(the_hub.files["me/run"]) == {f"run/{name}" for name in (kept if public else kept | personal)}


def test_the_hub_sends_the_token_and_the_files_nowhere_else(world, monkeypatch):
    the_hub, provider = world
    REAL_API()
    client = HfApi(endpoint=the_hub.url, token=TOKEN)
    monkeypatch.setattr(hub, "api", lambda: client)
    the_hub.files["me/run"], the_hub.redirect = {}, provider.other_url
    with pytest.raises(ConfigError, match="a redirect to http://localhost, which is not followed"):
        hub.check_push("me/run")
    with pytest.raises(ConnectionError, match="not followed"):
        client.create_commit("me/run", [], commit_message="x")
    assert provider.elsewhere == []


@pytest.mark.slow  # two pods load the hub's client
def test_after_a_dead_host_a_new_pod_goes_on_from_the_last_push(world, tmp_path, monkeypatch, capfd):
    the_hub, provider = world
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", the_hub.url)

    def watch(event):
        if event.startswith("command_") and the_hub.commits:
            provider.watch = lambda event: None  # once
            provider.on_command[int(event.removeprefix("command_")) + 1] = "die"

    provider.watch = watch
    job = "mkdir -p artifacts; cat artifacts/step && exit; echo pushed > artifacts/step; sleep 100"
    settings = {"repo_id": "me/run", "push_every_s": 0.1, "ssh_s": 5.0, "state_dir": str(tmp_path / "state")}
    done = up({**QUICK, **settings}, ["sh", "-c", job])
    said = capfd.readouterr().err
    assert provider.billable() == [] and done["pods"] == ["pod1", "pod2"] and provider.most_at_once == 1
    assert "pod1 is EXITED; a new pod will go on from the last pushed checkpoint" in said
    assert "going on from what was pushed" in said and "\n[train] pushed\n" in said
    assert (tmp_path / "state" / done["run"] / "results" / "artifacts" / "step").read_text() == "pushed\n"


def test_up_knows_the_model_before_a_cent_is_spent(world, tmp_path, capfd):
    """Gated, missing, too large for the GPUs; then memory is asked for as `plan` would."""
    the_hub, provider = world
    small, large = put_model(the_hub, SMALL), put_model(the_hub, LARGE, gated="manual")
    the_hub.files["a/bin"], the_hub.info["a/bin"] = {"config.json": b"{}"}, {"gated": False}
    quick = {**QUICK, "state_dir": str(tmp_path / "state")}

    def refused(command, **flags):
        with pytest.raises(UserError) as caught:
            up({**quick, **flags}, command)
        assert not provider.requests["create"] and not list(tmp_path.glob("state/*/id_ed25519"))
        return str(caught.value)

    train = ["grpo-gsm8k", "grpo", "--model_id"]
    assert "no such model" in refused([*train, "Qwen/none"])
    the_hub.who["token"] = "hf_somebody_else"
    assert "gated, and this HF_TOKEN has no access" in refused([*train, large])
    the_hub.who["token"] = TOKEN
    assert re.search(r"the catalog has no .* x1 with 1\d\d", refused([*train, large]))
    assert f"{large}: this token may load it; 7.62 billion parameters, grpo needs about" in capfd.readouterr().err
    assert "nothing was rented" in refused([*train, small], repo_id="others/run")
    cfg = config.build(UpConfig, {"count": 4})
    for words, method in (
        ("sft", "sft"),
        ("sft --lora_rank 8", "lora"),
        ("grpo --lora_rank 64", "grpo-lora"),
        ("ei", "grpo"),
    ):
        flags = {"method": method, "lora_rank": int(words.split()[-1]) if "rank" in words else 32}
        gib = need(LARGE, config.build(PlanConfig, flags), 4) / GIB
        found = with_memory(cfg, ["grpo-gsm8k", *words.split(), "--model_id", large])
        assert found.min_memory == pytest.approx(gib / USABLE, abs=0.06), words
    assert with_memory(replace(cfg, min_memory=7.0), [*train, large]).min_memory == 7.0
    assert with_memory(replace(cfg, preflight=False), [*train, "Qwen/none"]).min_memory == 0
    assert with_memory(cfg, [*train, "a/bin"]).min_memory == 0
    assert "a/bin: this token may load it; it has no safetensors weights" in capfd.readouterr().err
    assert with_memory(replace(cfg, model_id=small), ["my-program"]).min_memory > 0


def trained(folder, step):
    """A run directory below `folder` with a checkpoint and its result."""
    run = folder / "runs" / "grpo"
    model = checkpoint.write(run / "checkpoints", step, lambda path: (path / "model.safetensors").write_text("w"), {})
    write_json(run / "data.json", {})
    (run / "config.toml").write_text('[grpo]\nmodel_id = "Qwen/Qwen2.5-0.5B"\n')
    (run / "code.diff").write_text("# commit 43ac3f93\n")
    write_jsonl(run / "metrics.jsonl", [{"step": step}])
    write_json(run / "result.json", {"model": str(model), "step": step})
    return model


def test_in_the_end_the_repository_is_the_model_with_its_card(world, tmp_path, capfd):
    the_hub, _ = world
    hub.check_push("me/run")
    folder = tmp_path / "artifacts"
    trained(folder, 7)
    write_json(folder / "runs" / "an_eval" / "result.json", {"accuracy": 0.5})  # newer, and no training
    assert keep.run("me/run", folder, 0.05, ["sh", "-c", "sleep 0.5; exit 3"]) == 3
    assert all(path.startswith("run/runs/") for path in the_hub.files["me/run"])  # a job that failed leaves its folder
    assert keep.run("me/run", folder, 0.05, ["sleep", "0.5"]) == 0
    assert set(the_hub.files["me/run"]) == {"README.md", "model.safetensors"}
    card = the_hub.files["me/run"]["README.md"].decode()
    assert (
        "# grpo on GSM8K, step 7" in card and yaml.safe_load(card.split("---")[1])["base_model"] == "Qwen/Qwen2.5-0.5B"
    )
    assert the_hub.commits[-1] == "Step 7" and "step 7 of" in capfd.readouterr().err


def test_a_model_that_cannot_be_delivered_fails_the_job_and_leaves_the_run(world, tmp_path, capfd, monkeypatch):
    the_hub, _ = world
    hub.check_push("me/run")
    (trained(tmp_path, 7) / "model.safetensors").write_text("damaged")
    monkeypatch.setattr(keep.deliver, "__defaults__", (2, 0.0))
    assert keep.run("me/run", tmp_path, 60, ["true"]) == 1
    assert "run/runs/grpo/result.json" in the_hub.files["me/run"] and "README.md" not in the_hub.files["me/run"]
    assert capfd.readouterr().err.count("me/run: the model is NOT there") == 2


# ---- the same job elsewhere


def sky_task(tmp_path):
    flags = {"image": QUICK["image"], "budget": 5.0, "hours": 2.0, "count": 4, "repo_id": "me/run"}
    path = write_task(flags, ["grpo-gsm8k", "pipeline", "--preset", "full"], 2, tmp_path / "task.yaml")
    return path, yaml.safe_load(path.read_text())


def test_a_sky_task_says_the_same_job(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    path, said = sky_task(tmp_path)
    assert [row["accelerators"] for row in said["resources"]["ordered"]] == [
        "L40S:4",
        "A100-80GB:4",
        "H100:4",
        "H200:4",
    ]
    assert said["num_nodes"] == 2 and said["secrets"] == {"HF_TOKEN": None, "WANDB_API_KEY": None}
    assert said["run"].startswith("timeout --signal=TERM 7200 python -m grpo_gsm8k.launch.keep --repo_id me/run")
    assert said["run"].endswith("-- grpo-gsm8k pipeline --preset full\n")
    assert TOKEN not in path.read_text()
    with pytest.raises(ConfigError, match="must be one of"):
        write_task({"image": "i", "budget": 1.0, "gpu": "Abacus"}, ["true"], 1, tmp_path / "no.yaml")


@pytest.mark.slow
def test_skypilots_own_parser_takes_the_task(tmp_path):
    sky = pytest.importorskip("sky", reason="needs SkyPilot: uv run --with skypilot pytest --runslow")
    path, _ = sky_task(tmp_path)
    read = sky.Task.from_yaml_config(
        yaml.safe_load(path.read_text()), secrets_overrides=[("HF_TOKEN", "x"), ("WANDB_API_KEY", "y")]
    )
    assert read.num_nodes == 2 and len(read.resources) == 4


# ---- publishing


def test_a_checkpoint_is_pushed_with_what_its_run_recorded(world, tmp_path):
    the_hub, _ = world
    run = tmp_path / "runs" / "grpo"
    fill = lambda folder: [(folder / name).write_text(name) for name in ("model.safetensors", "optimizer.safetensors")]  # noqa: E731
    model = checkpoint.write(run / "checkpoints", 3, fill, {})
    write_json(run / "data.json", {"train": {"path": "/home/me/train.jsonl", "sha256": "ab" * 32}})
    (run / "config.toml").write_text('[grpo]\nmodel_id = "Qwen/Qwen2.5-0.5B"\nlr = 1e-05\ndata = "/home/me"\n')
    (run / "code.diff").write_text("# commit 43ac3f93\n")
    counted = {"val/accuracy": 0.9, "val/ci_low": 0.85, "val/ci_high": 0.94, "val/n": 100.0}
    write_jsonl(run / "metrics.jsonl", [{"step": 2, **counted, "val/accuracy": 0.1}, {"step": 3, **counted}])
    stage = {"name": "grpo", "model": str(model), "accuracy": 0.95, "ci95": [0.93, 0.97], "n": 600}
    write_json(run.parent / "pipeline.json", {"stages": [stage]})
    done = publish.push(model, "me/model")
    files = the_hub.files["me/model"]
    assert done["step"] == 3 and set(files) == {"README.md", "model.safetensors"}
    card = files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "Qwen/Qwen2.5-0.5B"
    for said in (
        "| validation | 90.0% | 85.0% to 94.0% | 100 |",
        "| test | 95.0% | 93.0% to 97.0% | 600 |",
        f"| train | `{'ab' * 32}` |",
        "commit `43ac3f93`",
        "lr = 1e-05",
        hashlib.sha256(b"model.safetensors").hexdigest(),
    ):
        assert said in card
    assert "10.0%" not in card and "/home/me" not in card
    assert publish.preview(model, "me/model")["left_here"] == ["manifest.json", "optimizer.safetensors", "state.json"]
    (model / "model.safetensors").write_text("other")
    with pytest.raises(CheckpointError, match="damaged"):
        publish.push(model, "me/model")


def test_what_is_published_says_nothing_of_this_machine(world, tmp_path, monkeypatch):
    """Paths, names of users and hosts, and keys, in the card and in the files of an adapter."""
    the_hub, _ = world
    monkeypatch.setattr(publish.platform, "node", lambda: "alices-laptop")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run = tmp_path / "alice" / "runs" / "grpo"
    base = str(tmp_path / "alice" / "models" / "my-base")
    Path(base).mkdir(parents=True)
    cached = "/home/alice/.cache/huggingface/hub/models--Qwen--Qwen2.5-0.5B/snapshots/0123abcd"
    template = "{{ '/home/alice/x' }}"
    files = {
        "adapter_config.json": {"base_model_name_or_path": base, "r": 8, "revision": None},
        "config.json": {"_name_or_path": cached, "hidden_size": 8},
        "tokenizer_config.json": {"name_or_path": base, "chat_template": template},
        "tokenizer.json": {"model": {"vocab": {"/home/alice/": 1}}},
    }

    def fill(folder):
        (folder / "adapter_model.safetensors").write_bytes(b"w")
        for name, obj in files.items():
            write_json(folder / name, obj)

    model = checkpoint.write(run / "checkpoints", 3, fill, {})
    write_json(run / "data.json", {f"{tmp_path}/alice/train.jsonl": {"sha256": "ab" * 32}})
    settings = {"model_id": base, "reward": f"{base}/mine.py:fn", "run_name": "on alices-laptop", "data": base}
    (run / "config.toml").write_text("[grpo]\n" + "".join(f'{key} = "{value}"\n' for key, value in settings.items()))
    (run / "code.diff").write_text("# commit 43ac3f93\n")
    write_jsonl(run / "metrics.jsonl", [{"step": 3}])
    (model / ".env").write_text("KEY=1")
    (model / "notes.txt").write_text("private")
    seen = publish.preview(model, "me/model")
    assert {row["path"] for row in seen["upload"]} == {"README.md", "adapter_model.safetensors", *files}
    assert seen["left_here"] == [".env", "manifest.json", "notes.txt", "state.json"] and not the_hub.commits
    publish.push(model, "me/model")
    pushed = the_hub.files["me/model"]
    assert set(pushed) == {row["path"] for row in seen["upload"]}
    assert json.loads(pushed["adapter_config.json"]) == {
        **files["adapter_config.json"],
        "base_model_name_or_path": "my-base",
    }
    assert json.loads(pushed["config.json"])["_name_or_path"] == "Qwen/Qwen2.5-0.5B"
    assert json.loads(pushed["tokenizer_config.json"]) == {"name_or_path": "my-base", "chat_template": template}
    card = pushed["README.md"].decode()
    assert (
        "alice" not in card
        and str(tmp_path) not in card
        and "reward = 'mine.py:fn'" in card
        and "| train.jsonl |" in card
    )
    the_hub.public = {"me/model"}
    with pytest.raises(ConfigError, match="--public"):
        publish.push(model, "me/model")
    (run / "config.toml").write_text(f'[grpo]\nmodel_id = "x"\nnote = "{TOKEN}"\n')
    with pytest.raises(ConfigError, match=r"README.md: holds what looks like a key"):
        publish.push(model, "me/other")
    assert "me/other" not in the_hub.files
