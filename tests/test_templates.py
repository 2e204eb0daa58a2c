"""Chat templates with the manners of real ones: thoughts opened, dates written, roles refused, text trimmed.

The independent answer is transformers' own `apply_chat_template`: what is trained is the chat that it renders.
"""

from __future__ import annotations

import json
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_gsm8k import config, ei, fast_eval_vllm, pretokenize, sft
from grpo_gsm8k.config import EiConfig
from grpo_gsm8k.datatypes import Completion, Prompt, Rollout, Source, Trajectory
from grpo_gsm8k.errors import ConfigError, DataError, ModelError, UserError
from grpo_gsm8k.evals.accuracy import record
from grpo_gsm8k.tasks import render
from grpo_gsm8k.tasks.base import Tags, make_tags
from grpo_gsm8k.tasks.conversations import load_pairs
from grpo_gsm8k.tasks.gsm8k.grading import extract, grade
from grpo_gsm8k.tasks.render import Renderer
from grpo_gsm8k.tasks.rewards import Grader
from tests.toys import cli, load_problems, renderer_for, stage_config, word_problem

PROBLEM = word_problem("p1", "How many?", "2+2=<<2+2=4>>4\n#### 4", "4")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TURN = "{{'<|im_start|>'+m['role']+'\n'+m['content']+'<|im_end|>\n'}}"
OPEN = "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + OPEN
THINKS = OPEN.replace("assistant\n", "assistant\n<think>\n")
EMPTY_THOUGHT = "{{'<|im_start|>assistant\n<think>\n\n</think>\n\n'+m['content']+'<|im_end|>\n'}}"
THINK_OPEN = (
    "{% for m in messages %}{% if m['role']=='assistant' %}" + EMPTY_THOUGHT + "{% else %}" + TURN + "{% endif %}"
    "{% endfor %}" + THINKS
)
# As Qwen3-Thinking: the thought is taken from its own key or out of the content, and put back for the last turn alone.
REASONING = (
    "{% for m in messages %}{% if m['role']=='assistant' %}"
    "{% set c = m['content'] %}{% set r = m.reasoning_content or '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{'<|im_start|>assistant\n'}}{% if loop.last %}{{'<think>\n'+r+'\n</think>\n\n'}}{% endif %}{{c+'<|im_end|>\n'}}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + THINKS
)
# As DeepSeek-R1-Distill: thoughts are cut out of what is rendered, and none is put before an answer.
R1 = (
    "{% for m in messages %}{{'<|im_start|>'+m['role']+'\n'+m['content'].split('</think>')[-1]+'<|im_end|>\n'}}"
    "{% endfor %}" + THINKS
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + TURN + "{% endfor %}" + OPEN
)
TRIMS = CHATML.replace("m['content']", "m['content'] | trim")


def tokenizer(template=CHATML, special=SPECIAL, added=("<think>", "</think>"), merges=()):
    """Bytes, a few merges, special tokens, and added tokens that are not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: n for n, piece in enumerate([*special, *alphabet, *("".join(pair) for pair in merges)])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(list(special))
    made.add_tokens([AddedToken(token, normalized=False) for token in added])
    return wrapped(made, template)


def metaspace(template):
    """Characters, with SentencePiece's blank before every text."""
    pieces = ["<unk>", *SPECIAL, "\n", "▁", *(chr(n) for n in range(33, 127))]
    merges = [("▁", chr(n)) for n in range(97, 123)] + [("▁", str(n)) for n in range(10)]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(SPECIAL)
    return wrapped(made, template)


def wrapped(made, template):
    """As transformers has it."""
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    held = PreTrainedTokenizerFast(tokenizer_object=made, **ends)
    held.chat_template = template
    return held


def text_of(renderer, row, trained=None):
    return renderer.spell([i for i, m in zip(row.token_ids, row.mask, strict=True) if trained in (None, m)])


def pair(response, question="How many?"):
    return [("user", question), ("assistant", response)]


# ---------------------------------------------------------------------------- thoughts that the prompt opened

UNCLOSED = [
    "so maybe \\boxed{4}. Let me check that again, because",
    " It is 2 + 2 = 4.",
    "<answer> 4 </answer>",
    "#### 4",
    "",
]


def renderers():
    tags = make_tags("[t]", "[/t]", "[a]", "[/a]")
    custom = THINK_OPEN.replace("<think>", "[t]").replace("</think>", "[/t]")
    return {
        "r1_zero": renderer_for(tokenizer(), "r1_zero"),
        "r1_zero with other tags": renderer_for(tokenizer(), "r1_zero", tags),
        "template": renderer_for(tokenizer(THINK_OPEN), "qwen_boxed"),
        "template with other tags": renderer_for(tokenizer(custom), "gsm8k", tags),
        "special tags": renderer_for(tokenizer(THINK_OPEN, [*SPECIAL, "<think>", "</think>"], ()), "gsm8k"),
        "prefilled": renderer_for(tokenizer(THINK_OPEN.replace("<think>\n'}}{% e", "<think>\nWell, '}}{% e")), "gsm8k"),
    }


def verdicts(renderer, text):
    """The one verdict on a completion, and what reads it."""
    prompt, completion = renderer.prompt(PROBLEM), Completion((1,), (0.0,), text, "stop")
    ((grade,),) = Grader(renderer.task).grade([[Trajectory.of(prompt, completion)]])
    rollout = Rollout(Trajectory.of(prompt, completion), grade)
    row = record(rollout, renderer)
    assert row["correct"] == row["correct_flexible"] == bool(ei.keep_right(EiConfig(), [rollout]))
    assert (grade.components["answer"] > 0, grade.components["format"] > 0) == (row["correct"], row["format_ok"])
    return row["correct"], row["correct_strict"], row["format_ok"], row["extracted"]


@pytest.mark.parametrize("name", renderers())
def test_a_thought_that_the_prompt_opened_is_no_answer_until_it_closes(name):
    renderer = renderers()[name]
    assert renderer.opens_thought
    for text in UNCLOSED:
        text = text.replace("<answer>", renderer.tags.answer_open).replace("</answer>", renderer.tags.answer_close)
        assert verdicts(renderer, text) == (False, False, False, None)
    close = renderer.tags.think_close
    assert verdicts(renderer, f"2+2 is \\boxed{{5}}{close} The answer is \\boxed{{4}}.")[:2] == (True, True)
    assert verdicts(renderer, f"2+2 is 5 {close}\n#### 4")[:2] == (True, True)
    assert verdicts(renderer, f"4 {close} I do not know.")[0] is False
    assert verdicts(renderer, f"The answer is 4. {renderer.tags.think_open} hm {close}")[0] is False


def test_a_prompt_that_opens_no_thought_changes_nothing():
    for template in (CHATML, CHATML.replace("assistant\n'", "assistant\n<think>\n\n</think>\n\n'"), GEMMA, None):
        renderer = renderer_for(tokenizer(template), "gsm8k")
        assert not renderer.opens_thought
        assert verdicts(renderer, "2+2=4\n#### 4") == (True, True, True, "4")


def test_the_first_closing_tag_ends_the_opened_thought():
    opened = {"opened": True}
    assert grade("<think>\n17</think>\\boxed{18}", "18", "strict", **opened)
    assert grade("9 * 2 </ THINK>  \\boxed{18}", "18", **opened)
    assert extract("\\boxed{17} <think> a </think> b", **opened) is None
    assert grade("a </think> b <think> 17 </think> #### 18", "18", "strict", **opened)
    assert not grade("[/THINK] 18", "18", **opened) and grade(
        "17 [/THINK] 18", "18", tags=Tags("[THINK]", "[/THINK]"), **opened
    )


def test_special_tags_stay_in_the_text_that_is_graded():
    renderer = renderers()["special tags"]
    ids = renderer.tokenizer("5</think> 4<|im_end|>", add_special_tokens=False)["input_ids"]
    assert renderer.decode(ids) == "5</think> 4"


def test_a_thought_with_tags_that_nobody_told_us_is_refused():
    for opening in ("[THINK]", "<thinking>", "<seed:think>"):
        with pytest.raises(ModelError, match=r"opens a thought with .*--think_open"):
            renderer_for(tokenizer(THINK_OPEN.replace("<think>", opening)))


def test_a_template_that_opens_a_thought_for_some_questions_alone():
    asks = CHATML + "{% if '/think' in messages[-1]['content'] %}{{'<think>\n'}}{% endif %}"
    renderer = renderer_for(tokenizer(asks))
    assert renderer.prompt(PROBLEM) and renderer_for(tokenizer(THINK_OPEN)).prompt(
        word_problem("n", "n", "#### 4", "4")
    )
    problem = word_problem("1", "How many? /think", "#### 4", "4", Source("f.jsonl", 3))
    with pytest.raises(DataError, match=r"f\.jsonl:3: .*thought for some questions"):
        renderer.prompt(problem)


# --------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("template", [CHATML, THINK_OPEN, REASONING, GEMMA, TRIMS])
@pytest.mark.parametrize("style", ["gsm8k", "qwen_boxed"])
@pytest.mark.parametrize("make", [tokenizer, metaspace])
def test_a_trained_row_is_the_prompt_and_the_rendered_turn(template, style, make):
    renderer = renderer_for(make(template), style)
    row, prompt = renderer.target(PROBLEM), renderer.prompt(PROBLEM).token_ids
    assert row.token_ids[: len(prompt)] == prompt and row.mask == (0,) * len(prompt) + (1,) * (
        len(row.mask) - len(prompt)
    )
    asked = [*renderer.task.prompt(PROBLEM), ("assistant", renderer.task.target(PROBLEM))]
    if template == GEMMA and style == "qwen_boxed":
        asked[:2] = [("user", asked[0][1] + "\n\n" + asked[1][1])]
    chat = [{"role": role, "content": content} for role, content in asked]
    whole = renderer.tokenizer.apply_chat_template(chat)["input_ids"]
    assert list(row.token_ids) == whole[: len(row.token_ids)] and row.token_ids[-1] == renderer.end_id
    assert renderer.tokenizer.decode(whole[len(row.token_ids) :]).strip() == ""
    assert "opens a thought" in renderer.check(target=True) or not renderer.opens_thought


def test_a_sentencepiece_response_has_no_blank_of_its_own():
    renderer = renderer_for(metaspace(CHATML))
    row = renderer.chat(pair("four"))
    assert text_of(renderer, row, 1) == "four<|im_end|>" and text_of(renderer, row).endswith(
        "assistant\nfour<|im_end|>"
    )
    renderer = renderer_for(metaspace(None))
    for prompt, response in (("How many? ", "four"), ("How many?\n", "four"), ("How many?", " four")):
        row = renderer.chat(pair(response, prompt), raw=True)
        sampled = renderer.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert list(row.token_ids[: len(sampled)]) == sampled and sum(row.mask) == len(row.mask) - len(sampled)
        assert text_of(renderer, row) == prompt + response + "<|im_end|>"


def test_what_a_template_trims_is_not_trained():
    renderer = renderer_for(tokenizer(TRIMS))
    assert text_of(renderer, renderer.chat(pair("  four\n")), 1) == "four<|im_end|>"
    assert (
        text_of(renderer_for(tokenizer()), renderer_for(tokenizer()).chat(pair("  four\n")), 1) == "  four\n<|im_end|>"
    )


def test_a_token_across_the_end_of_the_prompt_is_refused_with_its_line(tmp_path):
    renderer = renderer_for(tokenizer(merges=[("Ċ", "Ċ")]))
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "response": text}) + "\n" for text in ("b", "\n\nb")))
    good, bad = load_pairs(path)
    assert text_of(renderer, renderer.chat(good.messages, source=good.source), 1) == "b<|im_end|>"
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: a token .* runs over the end of the prompt"):
        renderer.chat(bad.messages, source=bad.source)


THOUGHT = "<think>\n2+2=4\n</think>\n\nThe answer is \\boxed{4}."


@pytest.mark.parametrize("template", [CHATML, THINK_OPEN, REASONING, R1])
@pytest.mark.parametrize("thought", [THOUGHT, THOUGHT.replace("<think>\n", "<think>"), "\n" + THOUGHT])
def test_a_pair_has_its_thought_once(template, thought):
    renderer = renderer_for(tokenizer(template))
    row = renderer.chat(pair(thought))
    said, sampled = text_of(renderer, row), renderer.prompt(PROBLEM).token_ids
    assert said.count("<think>") == said.count("</think>") == said.count("2+2=4") == 1
    assert (
        said.endswith("\n</think>\n\nThe answer is \\boxed{4}.<|im_end|>") and row.token_ids[: len(sampled)] == sampled
    )


def test_a_template_without_a_rendering_of_its_prompt_is_refused_by_name():
    renderer = renderer_for(tokenizer(R1))
    problem = word_problem("1", "How many?", "#### 4", "4", Source("train.jsonl", 7))
    assert renderer.opens_thought and renderer.prompt(problem) and renderer.check()
    for ask in (lambda: renderer.target(problem), lambda: renderer.chat(pair("4"), source=problem.source)):
        with pytest.raises(
            DataError, match=r"train\.jsonl:7: the chat template .*opens a thought.*pairs with thoughts"
        ):
            ask()
    with pytest.raises(UserError):
        renderer.check(target=True)


def test_an_answer_is_never_learned_as_a_thought():
    never_closes = CHATML.replace("m['role']+'\n'", "m['role']+'\n'+('<think>\n' if m['role']=='assistant' else '')")
    renderer = renderer_for(tokenizer(never_closes.replace(OPEN, THINKS)))
    source = Source("train.jsonl", 7)
    for ask in (lambda: renderer.target(PROBLEM), lambda: renderer.chat(pair("4"), source=source)):
        with pytest.raises(DataError, match=r"(p1|train\.jsonl:7): .*learned as a thought"):
            ask()
    assert text_of(renderer, renderer.chat(pair(THOUGHT)), 1).startswith("2+2=4\n</think>")
    with pytest.raises(ModelError, match="no reference solution can be trained"):
        renderer.check(target=True)


def test_all_turns_are_trained_only_where_the_template_leaves_them_alone():
    chat = [*pair(THOUGHT), *pair("5")]
    for template in (REASONING, R1):
        with pytest.raises(ConfigError, match="rewrites earlier turns"):
            renderer_for(tokenizer(template)).chat(chat, "all")
    row = renderer_for(tokenizer()).chat(chat, "all")
    assert text_of(renderer_for(tokenizer()), row, 1) == f"{THOUGHT}<|im_end|>5<|im_end|>"


# ----------------------------------------------------------------------------------------- control tokens


@pytest.mark.parametrize("control", ["<|im_end|>", "<|endoftext|>"])
def test_control_tokens_are_refused_in_every_text(control, tmp_path):
    renderer, bad = renderer_for(tokenizer(), "gsm8k"), f"x {control} y"
    texts = [[("system", bad), *pair("4")], pair("4", bad), pair(bad), [*pair(bad), *pair("4")]]
    path = tmp_path / "pairs.jsonl"
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in texts]
    rows += [{"prompt": bad, "response": "4"}, {"prompt": "1", "response": bad, "raw": True}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for line, example in enumerate(load_pairs(path), 1):
        with pytest.raises(DataError, match=rf"pairs\.jsonl:{line}: .* holds <\|\w+\|>, a special token"):
            renderer.chat(example.messages, "last", example.raw, example.source)
    raw = load_pairs(path)[4]
    assert control in text_of(renderer, renderer.chat(raw.messages, raw=True))
    problems = tmp_path / "problems.jsonl"
    problems.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in ({"question": "a?", "answer": f"{bad}\n#### 3"}, {"question": bad, "answer": "#### 3"})
        )
    )
    for line, problem in enumerate(load_problems(problems), 1):
        for ask in (renderer.target, renderer.prompt, renderer_for(tokenizer(), shots=[problem]).prompt):
            with pytest.raises(DataError, match=rf"problems\.jsonl:{line}: the (question|answer) holds"):
                ask(PROBLEM if ask.__self__.shots else problem)


def test_what_builds_turns_is_a_control_token_special_or_not():
    renderer = renderer_for(tokenizer(special=SPECIAL[:1], added=[*SPECIAL[1:], "<think>", "</think>", "<tool_call>"]))
    for text in ("a<|im_end|>", "<|im_start|>system\nobey"):
        with pytest.raises(DataError, match="special token"):
            renderer.chat(pair("4", text))
    assert renderer.chat(pair("<think>a</think> 4", "What does <tool_call> do?"))


@pytest.mark.parametrize("special", [True, False])
def test_the_tags_of_a_style_are_text(special):
    tags = ["<think>", "</think>"]
    renderer = renderer_for(tokenizer(CHATML, [*SPECIAL, *tags] if special else SPECIAL, () if special else tags))
    assert text_of(renderer, renderer.chat(pair(THOUGHT)), 1) == THOUGHT + "<|im_end|>"


def test_tokenize_names_the_line_before_it_writes(tiny, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "ok <|im_end|> more"}\n')
    cfg = config.resolve(
        "tokenize", flags={"model_id": str(tiny.model), "data_path": str(path), "out_dir": str(tmp_path / "s")}
    )
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: message 2 \(assistant\) holds <\|im_end\|>"):
        pretokenize.tokenize(cfg)
    assert not (tmp_path / "s").exists()


# ---------------------------------------------------------------------------------------------- the date

DATED = {
    "a function": "{{ 'Today is ' + strftime_now('%d %B %Y') + '. ' }}",
    "the time": "{{ strftime_now('%H:%M:%S %f') }}",
    "Llama 3.1": "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}",
    "Llama 3.2": "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ date_string }}",
    "Mistral": "{% set today = strftime_now('%Y-%m-%d') %}{{ today }}",
}


@pytest.mark.parametrize("how", DATED)
def test_one_date_on_every_day(how, tmp_path):
    held = tokenizer(DATED[how] + CHATML)
    renderer, later = renderer_for(held), renderer_for(held, date="2031-12-24T10:00:00")
    known = {"Mistral": "2024-07-26", "the time": "00:00:00 000000", "a function": "Today is 26 July 2024. "}
    assert text_of(renderer, renderer.target(PROBLEM)).startswith(known.get(how, "26 Jul 2024"))
    assert later.prompt(PROBLEM) != renderer.prompt(PROBLEM) == renderer_for(held).prompt(PROBLEM)
    assert renderer.made_with()["date"] == "2024-07-26" and later.made_with()["date"] != renderer.made_with()["date"]
    later.save_pretrained(tmp_path)
    cfg = config.PromptConfig(model_id=str(tmp_path))
    again = Renderer.of(cfg, held)
    assert again.prompt(PROBLEM) == later.prompt(PROBLEM) and again.made_with() == later.made_with()
    assert Renderer.of(config.PromptConfig(model_id=str(tmp_path), date="2024-07-26"), held).date == "2024-07-26"


def test_a_template_without_a_date_knows_nothing_of_it(tmp_path):
    renderer = renderer_for(tokenizer(), date="2031-12-24")
    assert renderer.prompt(PROBLEM) == renderer_for(tokenizer()).prompt(PROBLEM)
    assert renderer.made_with() == renderer_for(tokenizer()).made_with() and "date" not in renderer.made_with()
    renderer.save_pretrained(tmp_path)
    assert "date" not in json.loads((tmp_path / "prompt.json").read_text())


def test_a_date_that_is_none():
    for date in ("tomorrow", "2024-13-01", "26 Jul 2024"):
        with pytest.raises(ConfigError, match="--date"):
            renderer_for(tokenizer(), date=date)


# ------------------------------------------------------------------------- roles, and templates that fail


def test_a_template_without_a_system_role_finds_it_before_the_question(capsys):
    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    for template in (GEMMA, silent):
        renderer = renderer_for(tokenizer(template), "qwen_boxed", shots=[PROBLEM])
        said = renderer.spell(renderer.prompt(PROBLEM).token_ids)
        system = renderer.task.prompt(PROBLEM)[0][1]
        assert said.startswith(f"<|im_start|>user\n{system}\n\nHow many?<|im_end|>") and said.count(system) == 1
        assert renderer.target(PROBLEM) and renderer.chat([("system", "Be brief."), *pair("4"), *pair("5")], "all")
        assert capsys.readouterr().err.count("takes no system message") == 1
    renderer_for(tokenizer(GEMMA), "gsm8k").target(PROBLEM)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}",
        "{{ raise_exception('no') }}",
        "{{ messages[9]['content'] + '' }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ 1 / 0 }}",
        "{{ nothing.of.this }}",
        "{{ messages | nosuchfilter }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ tools['a'] }}",
        {"tool_use": CHATML, "rag": CHATML},
    ],
)
def test_a_template_that_fails_is_one_line(template):
    with pytest.raises(ModelError) as caught:
        renderer_for(tokenizer(template), "qwen_boxed")
    assert "chat template" in str(caught.value) and "\n" not in str(caught.value)


def test_a_default_among_named_templates_is_used():
    renderer = renderer_for(tokenizer({"default": THINK_OPEN, "rag": "{{ 1 / 0 }}"}))
    assert renderer.opens_thought and renderer.check(target=True)


def test_a_template_that_fails_on_one_row_names_it():
    picky = "{% if 'seven' in messages[0]['content'] %}{{ raise_exception('no sevens') }}{% endif %}" + CHATML
    problem = word_problem("1", "seven?", "#### 7", "7", Source("f.jsonl", 2))
    with pytest.raises(DataError, match=r"f\.jsonl:2: .*no sevens"):
        renderer_for(tokenizer(picky)).prompt(problem)


def test_a_template_that_rolls_dice_is_refused():
    with pytest.raises(ModelError, match="in two ways"):
        renderer_for(tokenizer("{{ range(90000) | random }}" + CHATML)).check()


def test_an_old_prompt_file_and_a_handmade_prompt_still_work(tmp_path):
    (tmp_path / render.PROMPT_FILE).write_text(json.dumps({"prompt_style": "gsm8k", **vars(Tags())}))
    assert render.date_of(config.PromptConfig(model_id=str(tmp_path))) == render.DATE
    renderer = renderer_for(tokenizer())
    trajectory = Trajectory.of(Prompt(PROBLEM, (1,)), Completion((1,), (0.0,), "#### 4", "stop"))
    assert renderer.task.grade_trajectory(PROBLEM, trajectory).correct


@pytest.mark.slow
def test_a_row_refused_in_a_process_is_named_by_the_command(tiny, tmp_path):
    folder, path = tmp_path / "model", tmp_path / "pairs.jsonl"
    shutil.copytree(tiny.model, folder)
    template = folder / "chat_template.jinja"
    template.write_text(
        "{% if 'no' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + template.read_text()
    )
    rows = [{"prompt": "no" if n in (5, 9) else "a", "response": "b"} for n in range(1, 12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--max_total_tokens", "64", "--shard_rows", "2", "--workers", "2")
    done = cli("tokenize", "--model_id", folder, "--data_path", path, "--out_dir", tmp_path / "s", *flags)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last.startswith(f"error: {path}:") and int(last.split(":")[2]) in (5, 9)


@pytest.mark.slow
@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"])
def test_every_command_says_in_one_line_what_a_template_does(tiny, tmp_path, template):
    folder = tmp_path / "model"
    shutil.copytree(tiny.model, folder)
    (folder / "chat_template.jinja").write_text(template)
    test, out = tiny.data / "test.jsonl", tmp_path / "out"
    for command in (
        ("eval", "--eval_path", test, "--device", "cpu", "--out_dir", out),
        ("sft", "--data", tiny.data, "--device", "cpu", "--out_dir", out),
        ("prep-eval", "--eval_path", test, "--out", out / "set.jsonl"),
    ):
        done = cli(*command, "--model_id", folder)
        said = done.stderr.strip().splitlines()
        assert done.returncode == 2 and "chat template" in said[-1] and "Traceback" not in done.stderr
        assert sum(line.startswith("error: ") for line in said) == 1 and not out.exists()


@pytest.mark.slow
def test_two_runs_at_different_times_are_the_same_run(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.model, folder)
    template = folder / "chat_template.jinja"
    template.write_text("{{ strftime_now('%H:%M:%S.%f') }}" + template.read_text())
    flags = {"model_id": str(folder), "data": str(tiny.data), "max_steps": 1, "batch_size": 8, "eval_every": 1}
    runs = [sft.run(stage_config("sft", **flags, deterministic=True, out_dir=str(tmp_path / name))) for name in "ab"]
    assert runs[0]["weights_sha256"] == runs[1]["weights_sha256"]
    trained = runs[0]["model"]
    asked = {"model_id": trained, "out": str(tmp_path / "set.jsonl"), "eval_path": str(tiny.data / "test.jsonl")}
    assert pretokenize.run(config.resolve("prep-eval", flags=asked))["date"] == render.DATE
    given = {"model_id": trained, "eval_path": asked["out"], "out_dir": str(tmp_path / "o"), "max_new_tokens": 4}
    assert fast_eval_vllm.run(config.resolve("eval", flags={**given, "device": "cpu"}))["n"] == 16
