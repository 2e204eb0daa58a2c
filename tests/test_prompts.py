"""Prompts: exact text, ids and mask born together, and no second BOS."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grpo_gsm8k.errors import ConfigError, DataError
from grpo_gsm8k.tasks.base import make_tags
from grpo_gsm8k.tasks.gsm8k.grading import grade
from grpo_gsm8k.tasks.gsm8k.styles import STYLES
from grpo_gsm8k.tasks.render import check_lengths, remembered
from tests.toys import renderer_for, word_problem

PROBLEM = word_problem("p1", "Ann has 2 eggs and buys 3. How many?", "She has 2+3=<<2+3=5>>5 eggs.\n#### 5", "5")


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny.model)


def split(renderer, row):
    """The untrained and the trained text of a row."""
    decode = renderer.tokenizer.decode
    parts = {flag: decode([i for i, m in zip(row.token_ids, row.mask, strict=True) if m == flag]) for flag in (0, 1)}
    return parts[0], parts[1]


def test_gsm8k_style_is_the_reference_solution_as_it_stands(tokenizer):
    renderer = renderer_for(tokenizer, "gsm8k")
    prompt, response = split(renderer, renderer.target(PROBLEM))
    assert prompt == f"<|im_start|>user\n{PROBLEM.text}<|im_end|>\n<|im_start|>assistant\n"
    assert response == PROBLEM.meta["solution"] + "<|im_end|>"
    assert tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"]) == renderer.prompt(PROBLEM).token_ids


def test_qwen_style_asks_for_a_box_and_gets_one(tokenizer):
    renderer = renderer_for(tokenizer, "qwen_boxed")
    prompt, response = split(renderer, renderer.target(PROBLEM))
    assert prompt.startswith("<|im_start|>system\nPlease reason step by step") and "\\boxed{}" in prompt
    assert response == "She has 2+3=5 eggs.\n\nThe final answer is $\\boxed{5}$.<|im_end|>"
    assert renderer.task.style.format_ok(response) and not renderer.task.style.format_ok("The answer is 5.")
    assert not renderer.task.style.format_ok("the answer is \\boxed{5")


def test_r1_style_opens_the_thought_and_takes_other_tags(tokenizer):
    renderer = renderer_for(tokenizer, "r1_zero", make_tags("[t]", "[/t]", "[a]", "[/a]"))
    prompt, response = split(renderer, renderer.target(PROBLEM))
    assert prompt.endswith(f"User: {PROBLEM.text}\nAssistant: [t]") and "<|im_start|>" not in prompt
    assert response == " She has 2+3=5 eggs. [/t] [a] 5 [/a]<|im_end|>"
    assert renderer.task.style.stop == ("[/a]",)


@pytest.mark.parametrize(
    ("response", "ok"),
    [
        (" 2+3=5 </think> <answer> 5 </answer>", True),
        ("2+3</think>\n<answer>5</answer>\n", True),
        (" 2+3=5 </think> 5", False),
        (" <answer> 5 </answer>", False),
        (" 2+3 </think> so <answer> 5 </answer>", False),
        (" 2+3 </think> <answer> 5 </answer> or so", False),
        (" 2 </think> <answer> 5 </answer> <answer> 6 </answer>", False),
        (" <think> 2 </think> <answer> 5 </answer>", False),
        (" 2 </think> 3 </think> <answer> 5 </answer>", False),
        (" 2 </think> <answer> 5", False),
        ("", False),
    ],
)
def test_r1_format(tokenizer, response, ok):
    assert renderer_for(tokenizer, "r1_zero").task.style.format_ok(response) is ok


def test_think_only_tags(tokenizer):
    tags = make_tags("<think>", "</think>", "", "")
    renderer = renderer_for(tokenizer, "r1_zero", tags)
    _, response = split(renderer, renderer.target(PROBLEM))
    assert response == " She has 2+3=5 eggs. </think> The final answer is $\\boxed{5}$.<|im_end|>"
    assert renderer.task.style.stop == ()
    assert renderer.task.style.format_ok(response) and not renderer.task.style.format_ok(" \\boxed{5} </think> done")
    assert grade(response, "5", "strict", tags=tags)


@pytest.mark.parametrize(
    ("response", "ok"),
    [
        ("2+3=<<2+3=5>>5\n#### 5", True),
        ("#### 5", True),
        ("#### -1,234", True),
        ("5", False),
        ("#### 5 eggs and more", False),
        ("#### 5\nand so on", False),
        ("#### 5\n#### 5", False),
        ("####5", False),
        ("####", False),
    ],
)
def test_gsm8k_format(tokenizer, response, ok):
    assert renderer_for(tokenizer, "gsm8k").task.style.format_ok(response) is ok


@pytest.mark.parametrize("style", STYLES)
def test_every_styles_reference_is_well_formed_and_right(tokenizer, style):
    made = renderer_for(tokenizer, style).task.style
    response = made.reference(PROBLEM.meta["solution"], PROBLEM.answer)
    assert made.format_ok(response)
    assert grade(response, "5", "strict") and not grade(response, "6", "strict")


def test_tags_come_in_pairs():
    for tags in (("<t>", "", "<a>", "</a>"), ("<t>", "</t>", "<a>", ""), ("<t>", "<t>", "<a>", "</a>")):
        with pytest.raises(ConfigError):
            make_tags(*tags)


CHAT = [("system", "Be brief."), ("user", "1+1?"), ("assistant", "2"), ("user", "2+2?"), ("assistant", "4")]


def test_chat_trains_the_last_answer_or_all_of_them(tokenizer):
    renderer = renderer_for(tokenizer)
    assert split(renderer, renderer.chat(CHAT, "last"))[1] == "4<|im_end|>"
    row = renderer.chat(CHAT, "all")
    assert split(renderer, row)[1] == "2<|im_end|>4<|im_end|>"
    whole = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in CHAT], tokenize=False)
    assert tokenizer.decode(row.token_ids) == whole.rstrip("\n")
    assert renderer.chat(CHAT, "last").token_ids == row.token_ids


def test_a_template_that_rewrites_earlier_turns_is_refused_for_all():
    renderer = renderer_for(plain_tokenizer())
    turn = "{% for m in messages %}{{ m.content if loop.last else '~' }}{% endfor %}"
    renderer.tokenizer.chat_template = turn + "{% if add_generation_prompt %}>{% endif %}"
    with pytest.raises(ConfigError, match="last"):
        renderer.chat(CHAT, "all")


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without a chat template that puts a BOS before whatever it is given."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([PROBLEM.text], trainer)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("style", STYLES)
def test_a_base_model_gets_one_bos_and_its_own_end(style):
    """trl#3853: a tokenizer that adds BOS by itself, and a prompt that has one already."""
    renderer = renderer_for(plain_tokenizer(), style)
    row = renderer.target(PROBLEM)
    assert row.token_ids[0] == 0 and row.token_ids.count(0) == 1
    assert row.token_ids[-1] == renderer.end_id == 1 and row.mask[-1] == 1
    assert renderer.pad_id == 1  # padding shares the id, and nothing minds


def test_the_end_of_turn_comes_from_the_template_not_from_the_tokenizers_eos(tiny):
    """Base Qwen names <|endoftext|> as its EOS while its chat template ends turns with <|im_end|>."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    tokenizer.eos_token = "<|endoftext|>"
    renderer = renderer_for(tokenizer)
    assert tokenizer.decode([renderer.end_id]) == "<|im_end|>"
    assert {tokenizer.decode([i]) for i in renderer.stop_ids} == {"<|im_end|>", "<|endoftext|>"}


def test_a_prompt_beyond_the_context_names_the_problem_and_the_room(tokenizer):
    prompt = renderer_for(tokenizer).prompt(PROBLEM)
    length = len(prompt.token_ids)
    check_lengths([prompt], length + 1, "f.jsonl")
    with pytest.raises(DataError, match=rf"f\.jsonl: p1: .* {length} tokens"):
        check_lengths([prompt], length, "f.jsonl")


def test_a_saved_model_remembers_how_it_was_asked(tokenizer, tmp_path):
    renderer = renderer_for(tokenizer, "r1_zero", make_tags("[t]", "[/t]", "", ""))
    assert remembered(str(tmp_path)) is None and remembered("Qwen/Qwen2.5-0.5B") is None
    renderer.save_pretrained(tmp_path)
    asked = {"task": "gsm8k", "prompt_style": "r1_zero", **vars(renderer.tags), "date": None}
    assert remembered(str(tmp_path)) == asked
    stored = {key: value for key, value in asked.items() if key not in ("task", "date")}
    (tmp_path / "prompt.json").write_text(json.dumps(stored))  # as folders said it before there were tasks
    assert remembered(str(tmp_path)) == asked
    (tmp_path / "prompt.json").write_text('{"prompt_style": "mine"}')
    with pytest.raises(DataError, match="prompt_style"):
        remembered(str(tmp_path))


def test_a_raw_pair_is_the_text_as_it_stands(tokenizer):
    row = renderer_for(tokenizer, "r1_zero").chat((("user", "User: 1+1?\nAssistant:"), ("assistant", " 2")), raw=True)
    assert split(renderer_for(tokenizer), row) == ("User: 1+1?\nAssistant:", " 2<|im_end|>")
    asked = (
        renderer_for(tokenizer, "r1_zero").prompt(PROBLEM).token_ids
    )  # what pairs of this style hold, and sampling sees
    text = STYLES["r1_zero"](make_tags("<think>", "</think>", "<answer>", "</answer>")).ask(PROBLEM.text)
    row = renderer_for(tokenizer, "r1_zero").chat((("user", text), ("assistant", " 2")), raw=True)
    assert row.token_ids[: len(asked)] == asked and row.mask == (0,) * len(asked) + (1,) * (len(row.mask) - len(asked))
