"""The pre-flight: what would fail later fails first, in one line; and a run is the same with it as without."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from grpo_gsm8k import config, doctor, fast_eval_vllm, grpo, preflight, sft, workbench
from grpo_gsm8k.errors import DataError, ModelError, UserError
from grpo_gsm8k.trainer import packing
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.policy import load_model, load_tokenizer, prepare_to_save, weights_sha256
from tests.test_pretrained import settings
from tests.toys import load_split, renderer_for, stage_config, train_config


@pytest.fixture(autouse=True)
def _nothing_proven_yet(monkeypatch):
    monkeypatch.setattr(preflight, "_passed", set())


def copied(tiny, folder, *changes):
    shutil.copytree(tiny.model, folder)
    for change in changes:
        change(folder)
    return folder


def stage(name, model, tiny, out, **flags):
    small = {"sft": {"epochs": 1, "batch_size": 8, "eval_every": 9}, "grpo": {"steps": 1, "rollouts_per_step": 8}}[name]
    where = {"model_id": str(model), "data": str(tiny.data), "out_dir": str(out), "max_steps": 1}
    return {"sft": sft, "grpo": grpo}[name].run(stage_config(name, **where, **small, **flags))


def evaluate(model, tiny, out, **flags):
    where = {"model_id": str(model), "eval_path": str(tiny.data / "test.jsonl"), "out_dir": str(out), "limit": 2}
    small = {"max_new_tokens": 4, "device": "cpu", "prompt_style": "gsm8k"}
    return fast_eval_vllm.run(config.resolve("eval", flags={**where, **small, **flags}))


# ----------------------------------------------------------------------------------------- what is written

UNWRITABLE = [
    {"temperature": 0.6, "top_p": 0.9, "do_sample": False},
    {"temperature": 1e-6},
    {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
]


@pytest.mark.parametrize(
    "fields", [UNWRITABLE[0], *(pytest.param(fields, marks=pytest.mark.slow) for fields in UNWRITABLE[1:])]
)
def test_a_generation_config_that_transformers_does_not_write_is_mended_before_the_first_step(
    fields, tiny, tmp_path, capsys
):
    model = copied(tiny, tmp_path / "model", settings("generation_config.json", **{"do_sample": ..., **fields}))
    with pytest.raises(ValueError, match="invalid"):
        GenerationConfig.from_pretrained(model).save_pretrained(tmp_path / "not")
    done = stage("sft", model, tiny, tmp_path / "run", lora_rank=4)
    err = capsys.readouterr().err
    assert err.count("generation_config.json: transformers refuses to write") == 1
    workbench.merge(config.build(config.ModelConfig, {"model_id": done["model"]}), tmp_path / "merged")
    for folder in (done["model"], tmp_path / "merged"):
        kept = GenerationConfig.from_pretrained(folder)
        assert kept.eos_token_id == [2, 0] and kept.pad_token_id == 0
        assert any(getattr(kept, key) != value for key, value in fields.items())


def base_model(folder):
    """As many base models are: a chat template, and another end of sequence than its turns have."""
    settings("tokenizer_config.json", eos_token="<|endoftext|>")(folder)
    settings("generation_config.json", eos_token_id=0)(folder)


@pytest.mark.parametrize("lora_rank", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_checkpoint_knows_the_end_of_turn_that_it_was_taught(lora_rank, tiny, tmp_path):
    model = copied(tiny, tmp_path / "model", base_model)
    assert AutoTokenizer.from_pretrained(model).eos_token_id == 0
    done = stage("sft", model, tiny, tmp_path / "run", lora_rank=lora_rank)
    assert json.loads((tmp_path / "run/checkpoints/step_000001/generation_config.json").read_text())[
        "eos_token_id"
    ] == [2, 0]
    if lora_rank:
        merged = workbench.merge(config.build(config.ModelConfig, {"model_id": done["model"]}), tmp_path / "merged")
        done = {**done, "model": merged["model"]}
    found = AutoModelForCausalLM.from_pretrained(done["model"])
    assert found.generation_config.eos_token_id == [2, 0]
    with torch.no_grad():  # `generate` ends where the end of turn is likeliest, and at the other end, too
        found.model.norm.weight.zero_()
        found.lm_head = torch.nn.Linear(32, 320)
        for end in (2, 0):
            found.lm_head.bias.copy_(torch.eye(320)[end])
            out = found.generate(torch.tensor([[5, 6]]), max_new_tokens=9, do_sample=False)
            assert out[0].tolist() == [5, 6, end]


def test_the_ends_that_a_model_had_are_kept(tiny, tmp_path):
    model = load_model(config.build(config.ModelConfig, {"model_id": str(tiny.model), "device": "cpu"}))
    model.generation_config.eos_token_id = [7, 0]
    before = weights_sha256(model.named_parameters())
    prepare_to_save(model, [2, 0])
    assert model.generation_config.eos_token_id == [2, 0, 7]
    assert weights_sha256(model.named_parameters()) == before


# ---------------------------------------------------------------------------------- ids beyond the embeddings


def more_tokens(folder):
    """Two tokens are added to the tokenizer, and the model is as it was."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def unresized(tiny, tmp_path_factory):
    return copied(tiny, tmp_path_factory.mktemp("unresized") / "model", more_tokens)


def test_ids_that_have_no_embedding_are_refused_before_anything_is_computed(unresized, tiny, tmp_path):
    what = "has id 32[01], the model has 320 embeddings"
    with pytest.raises(DataError, match=f"the prompt of .* {what}"):
        evaluate(unresized, tiny, tmp_path, prompt_style="r1_zero")
    for name in ("sft", "grpo"):
        with pytest.raises(DataError, match=f"the prompt of .* {what}"):
            stage(name, unresized, tiny, tmp_path / name, prompt_style="r1_zero")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "1+1?", "response": "2"}\n{"prompt": "1+1?", "response": "<think>2"}\n')
    flags = {"data_path": str(pairs), "eval_set_path": str(tiny.data / "val.jsonl")}
    with pytest.raises(DataError, match=f"pairs.jsonl: example 2 {what}"):
        stage("sft", unresized, tiny, tmp_path / "pairs", **flags)


@pytest.mark.slow
def test_a_tokenizer_with_more_tokens_serves_texts_without_them(unresized, tiny, tmp_path):
    assert evaluate(unresized, tiny, tmp_path)["n"] == 2


@pytest.mark.parametrize("which", ["pad_token", "eos_token"])
def test_padding_and_ends_must_have_an_embedding_too(which, unresized, tiny, tmp_path):
    shutil.copytree(unresized, tmp_path / "model")
    settings("tokenizer_config.json", **{which: "<think>"})(tmp_path / "model")
    with pytest.raises(ModelError, match="<think> has id 320, the model has 320 embeddings"):
        evaluate(tmp_path / "model", tiny, tmp_path)


# ---------------------------------------------------------------------------------------------- the pre-flight


@pytest.fixture
def subject(tiny, tmp_path):
    from grpo_gsm8k.engines.hf import HFSampler

    cfg = train_config(model_id=str(tiny.model))
    model = load_model(cfg)
    torch.manual_seed(0)
    for parameter in model.parameters():  # a fresh tiny model's attention adds nothing yet
        parameter.data.normal_(std=0.2)
    renderer = renderer_for(load_tokenizer(cfg), "gsm8k")
    prompts = [renderer.prompt(problem) for problem in load_split(tiny.data, "val")]
    learner, sampler = TorchLearner(model, renderer, cfg), HFSampler(model, renderer)
    return preflight.Subject(model, renderer, prompts, learner, sampler, tmp_path / "run", learner.packs)


def test_it_moves_neither_weights_nor_generators_and_leaves_nothing_behind(subject):
    (subject.folder).mkdir()
    torch.manual_seed(3)
    before = torch.get_rng_state(), weights_sha256(subject.learner.weights()), subject.sampler.busy_s
    preflight.run_checks(subject)
    after = torch.get_rng_state(), weights_sha256(subject.learner.weights()), subject.sampler.busy_s
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert list(subject.folder.iterdir()) == []
    assert [check.name for check in preflight.checks(subject) if check.name != "template"] == [
        "ids",
        "trainer",
        "sampler",
        "checkpoint",
    ]


def test_what_was_shown_once_is_not_shown_again(subject, monkeypatch):
    preflight.run_checks(subject)
    monkeypatch.setattr(preflight, "_trainer", None)
    monkeypatch.setattr(preflight, "_checkpoint", None)
    preflight.run_checks(subject)
    with pytest.raises(TypeError):  # another model is another matter
        subject.model.config.rope_parameters["rope_theta"] = 5.0
        preflight.run_checks(subject)


def scaled_logits(model):
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 0.25
        return out

    model.forward = scaled


def test_a_model_that_does_something_behind_its_head_is_refused_by_name(subject):
    scaled_logits(subject.model)
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM: the trainer's \(.*\) log-probabilities differ"):
        preflight.run_checks(subject)


def test_a_sampler_that_draws_from_another_distribution_is_refused(subject):
    subject.sampler.model.lm_head.weight.data.mul_(0.5)
    with pytest.raises(ModelError, match="the sampler's log-probabilities differ"):
        preflight.run_checks(subject)


def test_packed_rows_that_are_read_otherwise_are_refused(subject, monkeypatch):
    of = packing.Packed.of

    def wrong(batch):
        packed = of(batch)
        return dataclasses.replace(packed, position_ids=packed.position_ids * 0)

    monkeypatch.setattr(packing.Packed, "of", wrong)
    with pytest.raises(ModelError, match=r"the trainer's \(packed rows\)"):
        preflight.run_checks(subject)


def test_a_model_that_cannot_be_written_is_refused_before_it_is_trained(subject, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("no\nsuch thing")

    monkeypatch.setattr(subject.model, "save_pretrained", refuse)
    with pytest.raises(UserError, match="no checkpoint of this model can be written: no such thing"):
        preflight.run_checks(subject)
    assert not (subject.folder / ".preflight").exists()


def test_of_a_large_model_only_the_descriptions_are_written(subject, monkeypatch):
    monkeypatch.setattr(preflight, "SMALL", 0)
    monkeypatch.setattr(subject.learner, "save", None)
    preflight.run_checks(subject)


def test_the_doctor_tries_a_model_and_prints_each_line(tiny, unresized, tmp_path, capsys):
    from grpo_gsm8k.cli import main

    found = doctor.model_checks(str(tiny.model), "cpu", "gsm8k")
    names = [check.name for check in found]
    assert all(check.ok for check in found)
    assert {"model: weights", "model: ids", "model: trainer", "model: sampler", "model: checkpoint"} <= set(names)
    assert any("2 tokens beyond" in check.detail for check in doctor.model_checks(str(unresized), "cpu", "gsm8k"))
    broken = copied(tiny, tmp_path / "broken", settings(intermediate_size=64))
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--model_id", str(broken), "--device", "cpu", "--json"])
    last = json.loads(capsys.readouterr().out)["checks"][-1]
    assert stop.value.code == 2 and not last["ok"] and "down_proj" in last["detail"]
