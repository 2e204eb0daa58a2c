"""Models and adapters from their files: tensor by tensor, or refused in one line that names the file."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config, Qwen2MoeConfig

from grpo_gsm8k import config, workbench
from grpo_gsm8k.errors import ConfigError, ModelError
from grpo_gsm8k.trainer import adapter, pretrained
from grpo_gsm8k.trainer.data import weighted
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.losses import CrossEntropy, Objective
from grpo_gsm8k.trainer.policy import load_model, load_tokenizer, pick_device, weights_sha256
from tests.toys import renderer_for, rows, train_config


class Touch:
    """Pickled, it makes a file as soon as it is unpickled by whoever runs what a pickle says."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def cfg_of(folder):
    return config.build(config.ModelConfig, {"model_id": str(folder), "device": "cpu"})


def load_both(folder):
    """What every stage loads first."""
    return load_model(cfg_of(folder)), renderer_for(load_tokenizer(cfg_of(folder)))


def tensors(change):
    def edit(folder):
        path = next(folder.glob("*.safetensors"))
        held = load_file(path)
        change(held)
        save_file(held, path, {"format": "pt"})

    return edit


def settings(file="config.json", **fields):
    def edit(folder):
        held = json.loads((folder / file).read_text()) | fields
        (folder / file).write_text(json.dumps({key: value for key, value in held.items() if value is not ...}))

    return edit


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def prefixed(held):
    for name in list(held):
        held[name.replace("model.", "model.language_model.", 1)] = held.pop(name)


def without_last_mlp(held):
    for name in [name for name in held if "layers.1.mlp" in name]:
        del held[name]


def sharded(folder, without=""):
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(held))}
    for file in set(files.values()):
        save_file({name: held[name] for name in held if files[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if without:
        (folder / without).unlink()


def own_code(folder):
    """A folder that asks for its code to be run, as `trust_remote_code` does."""
    (folder / "theirs.py").write_text("import os\nos.mkdir('ran')\nclass Config: pass\nclass Model: pass\n")
    auto = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    settings(model_type="theirs", architectures=["Model"], auto_map=auto)(folder)


def pickled(folder, *more):
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**held, **{f"x{i}": one for i, one in enumerate(more)}}, folder / "pytorch_model.bin")


BROKEN_MODELS = {
    "without some of its weights": (
        tensors(without_last_mlp),
        "model.safetensors: .*model.layers.1.mlp.down_proj.weight is missing .and 2 more.",
    ),
    "under another prefix": (
        tensors(prefixed),
        "is missing .and 26 more.; model.language_model.embed_tokens.weight is not a weight",
    ),
    "a layer more": (
        tensors(lambda held: held.update({"model.layers.2.mlp.up_proj.weight": torch.ones(128, 32)})),
        "model.safetensors: .*model.layers.2.mlp.up_proj.weight is not a weight of this model",
    ),
    "another shape": (
        tensors(lambda held: held.update({"model.norm.weight": torch.ones(7)})),
        "model.norm.weight is 7, the model's is 32",
    ),
    "not a number": (
        tensors(lambda held: held["model.norm.weight"].fill_(float("inf"))),
        "model.safetensors: the weight model.norm.weight holds NaN",
    ),
    "an untied head that is not there": (settings(tie_word_embeddings=False), "lm_head.weight is missing"),
    "cut weights": (cut("model.safetensors"), "model.safetensors is damaged"),
    "a shard that is gone": (
        lambda folder: sharded(folder, "model-00002-of-00002.safetensors"),
        "model-00002-of-00002.safetensors",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "cut config": (cut("config.json"), "config.json cannot be read"),
    "no model type": (settings(model_type=...), "model_type"),
    "no sizes": (settings(intermediate_size=...), "mlp.down_proj.weight is 32x128, the model's is 32x22016"),
    "a size of the wrong type": (settings(hidden_size="x"), "hidden_size"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer encodes no text"),
    "cut tokenizer": (cut("tokenizer.json"), "tokenizer.json cannot be read"),
    "another file as tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("[1]"), "cannot load model"),
    "its own code": (own_code, "needs its own code"),
    "a pickle of more than weights": (lambda folder: pickled(folder, Touch("ran")), "pytorch_model.bin is damaged, or"),
}


def some(kinds, quick):
    """The kinds as parameters; those that show nothing new about our own code are slow."""
    return [pytest.param(kind, marks=() if kind in quick else pytest.mark.slow) for kind in kinds]


FIRST = {"without some of its weights", "under another prefix", "another shape", "not a number", "cut weights"}
FIRST |= {"a size of the wrong type", "no tokenizer", "its own code", "a pickle of more than weights"}


@pytest.mark.parametrize("kind", some(BROKEN_MODELS, FIRST))
def test_a_model_that_its_files_do_not_hold_is_refused_in_one_line(kind, tiny, tmp_path, monkeypatch, capfd):
    change, what = BROKEN_MODELS[kind]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.model, tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(ModelError, match=what) as fault:
        load_both(tmp_path / "model")
    assert "\n" not in str(fault.value) and str(tmp_path / "model") in str(fault.value)
    assert capfd.readouterr().err == ""  # no table of transformers' beside it
    assert not (tmp_path / "ran").exists()


HARMLESS = {
    "shards": sharded,
    "weights as a pickle": pickled,
    "tables that are computed": tensors(
        lambda held: held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    ),
    "a tied head stored again": tensors(
        lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()})
    ),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_changes_no_weight_is_no_fault(kind, tiny, tmp_path):
    shutil.copytree(tiny.model, tmp_path / "model")
    HARMLESS[kind](tmp_path / "model")
    found = load_model(cfg_of(tmp_path / "model"))
    assert weights_sha256(found.named_parameters()) == weights_sha256(load_model(cfg_of(tiny.model)).named_parameters())


@pytest.mark.parametrize("where", ["", "./nothing", "/nothing/here", "a/b/c", "http://there/x", "a b", "x" * 200])
def test_what_can_be_no_model_is_not_asked_of_the_hub(where):
    with pytest.raises(ModelError, match="there is no such folder"):
        load_tokenizer(cfg_of(where))


def test_a_name_without_a_hub_costs_no_retries(monkeypatch, capfd):
    """The hub's client is offline in the tests; here it is told that it is not, and nothing listens."""
    from transformers.utils import hub

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    pretrained._reachable.cache_clear()
    began = time.monotonic()
    with pytest.raises(ModelError, match="neither a model folder nor a model that the hub gave us"):
        load_tokenizer(cfg_of("nobody/nothing"))
    assert time.monotonic() - began < 3
    assert not hub.constants.HF_HUB_OFFLINE and capfd.readouterr().err == ""
    pretrained._reachable.cache_clear()


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "cuda:99", "banana", ""])
def test_a_device_that_models_do_not_run_on_is_refused(name):
    with pytest.raises(ConfigError, match=f"device '{name}'"):
        pick_device(name)


# --------------------------------------------------------------------------------------------------- adapters

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BASES = {
    "untied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False),
    "tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=512, eos_token_id=2, bos_token_id=2, pad_token_id=0
    ),
    "moe": lambda: Qwen2MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
}
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
TRAINED_HERE = {
    "linear": ("untied", "all-linear"),
    "embedding": ("untied", "q_proj,embed_tokens"),
    "tied embedding": ("tied", "q_proj,embed_tokens"),
    "gpt2": ("gpt2", "all-linear"),
    "moe": ("moe", "all-linear"),
}
MADE_ELSEWHERE = {
    "dora": ("untied", {"target_modules": "all-linear", "use_dora": True}),
    "dora on the embedding": ("untied", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "rslora": ("untied", {"target_modules": "all-linear", "use_rslora": True}),
    "biases": ("untied", {**ATTENTION, "bias": "all"}),
    "biases of its layers": ("untied", {**ATTENTION, "bias": "lora_only"}),
    "biases of its own": ("untied", {**ATTENTION, "lora_bias": True}),
    "a whole embedding": ("untied", {**ATTENTION, "modules_to_save": ["embed_tokens"]}),
    "a whole tied embedding": ("tied", {**ATTENTION, "modules_to_save": ["embed_tokens"]}),
    "a whole norm": ("untied", {**ATTENTION, "modules_to_save": ["norm"]}),
    "patterns": ("untied", {**ATTENTION, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    "one layer": ("untied", {**ATTENTION, "layers_to_transform": [1]}),
    "some tokens": ("untied", {**ATTENTION, "trainable_token_indices": [3, 5]}),
    "experts": ("moe", {**ATTENTION, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "a tied embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
}
QUICK = {"tied embedding", "dora"}
SEQUENCES = [(range(3, 14), 4), (range(5, 9), 1), (range(7, 20), 6)]


def make_base(kind, tiny, folder):
    """A random model of this kind with the tiny model's tokenizer."""
    shutil.copytree(tiny.model, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(tiny.model / "tokenizer_config.json", folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BASES[kind]())
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.08)
    model.save_pretrained(folder)
    return folder


def logits(model):
    """What the model says, by itself."""
    ids = torch.tensor([list(range(3, 14)), list(range(7, 18))])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def adapter_of(base, folder, fields):
    """An adapter as peft writes it, and the logits of its model."""
    torch.manual_seed(1)
    given = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice on tied embeddings
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), given)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.05
        model.save_pretrained(folder)
    for path in base.glob("*token*"):
        shutil.copy(path, folder)
    return logits(model)


@pytest.mark.parametrize("kind", some({**TRAINED_HERE, **MADE_ELSEWHERE}, QUICK))
@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_adapter_is_trained_resumed_and_merged_exactly(kind, tiny, tmp_path, capsys):
    base, made = {**TRAINED_HERE, **MADE_ELSEWHERE}[kind]
    folder = make_base(base, tiny, tmp_path / "base")
    flags = {"model_id": str(folder), "lora_rank": 4, "lora_alpha": 12}
    if isinstance(made, str):
        flags["lora_targets"] = made
    else:
        expected = adapter_of(folder, tmp_path / "given", made)
        flags["model_id"] = str(tmp_path / "given")
        assert torch.equal(logits(load_model(train_config(**flags))), expected)

    def learner():
        torch.manual_seed(5)
        model = load_model(cfg := train_config(**flags))
        adapter.attach(model, cfg)
        return TorchLearner(model, renderer_for(load_tokenizer(cfg)), cfg)

    def train(one):
        one.forward_backward(weighted(rows(*SEQUENCES), "token"), Objective(CrossEntropy()))
        one.step(1e-2)

    first, second = learner(), learner()
    for _ in range(2):
        train(first)
    first.save(tmp_path / "checkpoint")
    now = logits(first.model)
    second.load(tmp_path / "checkpoint")
    assert torch.equal(logits(second.model), now)
    train(first), train(second)
    assert weights_sha256(first.weights()) == weights_sha256(second.weights())
    assert torch.equal(logits(load_model(cfg_of(tmp_path / "checkpoint"))), now)
    workbench.merge(cfg_of(tmp_path / "checkpoint"), tmp_path / "merged")
    torch.testing.assert_close(logits(load_model(cfg_of(tmp_path / "merged"))), now, rtol=1e-4, atol=1e-5)
    assert ("experts" in capsys.readouterr().err) == (kind == "moe")  # what has no adapter is named


def test_an_adapter_on_the_head_is_refused_at_the_start(tiny, tmp_path):
    cfg = train_config(model_id=str(make_base("untied", tiny, tmp_path / "base")), lora_rank=4, lora_targets="lm_head")
    with pytest.raises(ConfigError, match="an adapter on the output head"):
        adapter.attach(load_model(cfg), cfg)


def pickled_adapter(*more):
    def edit(folder):
        held = load_file(folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").unlink()
        torch.save({**held, **{f"x{i}": one for i, one in enumerate(more)}}, folder / "adapter_model.bin")

    return edit


def drop_first(held):
    del held[min(held)]


FILE = "adapter_config.json"
BROKEN_ADAPTERS = {
    "another rank": (settings(FILE, r=8), "lora_A.default.weight is 4x32, the model's is 8x32"),
    "said to be DoRA": (settings(FILE, use_dora=True), "lora_magnitude_vector.default.weight is missing"),
    "fewer layers than its tensors": (settings(FILE, target_modules=["q_proj"]), "v_proj.* is not a weight"),
    "more layers than its tensors": (settings(FILE, target_modules=["q_proj", "v_proj", "o_proj"]), "o_proj.*missing"),
    "a tensor less": (tensors(drop_first), "adapter_model.safetensors: .*q_proj.lora_A.default.weight is missing"),
    "a tensor more": (tensors(lambda held: held.update({"base_model.model.x.lora_A.weight": torch.ones(2)})), "x.lora"),
    "cut weights": (cut("adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    "cut config": (cut(FILE), f"{FILE}.*"),
    "no base": (settings(FILE, base_model_name_or_path=None), "base_model_name_or_path"),
    "a base that is gone": (settings(FILE, base_model_name_or_path="/nothing/here"), "'/nothing/here'"),
    "another kind": (settings(FILE, peft_type="PROMPT_TUNING"), "cannot load model"),
    "a model as well": (lambda folder: (folder / "config.json").write_text("{}"), "which one is meant"),
    "a pickle of more than weights": (pickled_adapter(Touch("ran")), "adapter_model.bin is damaged, or"),
}


@pytest.fixture(scope="module")
def plain_adapter(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "given"
    return folder, adapter_of(tiny.model, folder, ATTENTION)


QUICKLY = {"another rank", "said to be DoRA", "fewer layers than its tensors", "a tensor less", "cut config"}


@pytest.mark.parametrize("kind", some(BROKEN_ADAPTERS, QUICKLY))
def test_an_adapter_that_its_files_do_not_hold_is_refused_in_one_line(
    kind, plain_adapter, tmp_path, monkeypatch, capfd
):
    change, what = BROKEN_ADAPTERS[kind]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(plain_adapter[0], tmp_path / "x")
    change(tmp_path / "x")
    for use in (load_model, lambda cfg: workbench.merge(cfg, tmp_path / "out")):
        with pytest.raises(ModelError, match=what) as fault:
            use(cfg_of(tmp_path / "x"))
        assert "\n" not in str(fault.value)
    assert capfd.readouterr().err == "" and not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_a_pickled_adapter_is_read_as_weights_only(plain_adapter, tmp_path):
    shutil.copytree(plain_adapter[0], tmp_path / "x")
    pickled_adapter()(tmp_path / "x")
    assert torch.equal(logits(load_model(cfg_of(tmp_path / "x"))), plain_adapter[1])
