"""The embedded task and the tiny model: what a problem promises, recomputed from its text alone."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_gsm8k.datatypes import Example
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.tasks.gsm8k.toy import TEMPLATES, make_problems
from grpo_gsm8k.trainer.tiny_model import make_tiny_model

COUNTS = {"train": 3000, "val": 100, "test": 400}
STEP = re.compile(r"(\d+)([-+*/])(\d+)=<<(\d+[-+*/]\d+)=(\d+)>>(\d+)(?!\d)")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Example]]:
    return make_problems(7, COUNTS)


def is_terse(problem: Example) -> bool:
    return problem.meta["solution"] == f"#### {problem.answer}"


def instance(problem: Example) -> tuple[str, ...]:
    """What is left of a question without its names and things: the words all templates' instances share, and
    the numbers. Two questions of one template with the same numbers look the same."""
    words = re.findall(r"\d+|[A-Za-z]+", problem.text)
    return tuple(word for word in words if word.isdigit() or word in SKELETON)


def skeleton() -> set[str]:
    holes = re.compile(r"\$?\{\w+\}")
    return {word for t in TEMPLATES for word in re.findall(r"[A-Za-z]+", holes.sub(" ", t.question))}


SKELETON = skeleton()


def test_the_same_seed_gives_the_same_problems_and_another_seed_others(splits: dict[str, list[Example]]) -> None:
    assert make_problems(7, COUNTS) == splits
    assert make_problems(8, COUNTS)["test"] != splits["test"]
    digest = hashlib.sha256("\n".join(p.text + p.meta["solution"] for p in splits["test"]).encode()).hexdigest()
    assert digest == "4bc3903d6f8f594ead1293e7e3f37ca72265661ed81752b37f31d122bff0381c"  # golden: the demo's task


def test_more_training_problems_leave_the_other_splits_alone(splits: dict[str, list[Example]]) -> None:
    more = make_problems(7, {**COUNTS, "train": 3500})
    assert more["test"] == splits["test"] and more["val"] == splits["val"]
    assert more["train"][:3000] == splits["train"]


def test_counts_and_ids(splits: dict[str, list[Example]]) -> None:
    assert {split: len(problems) for split, problems in splits.items()} == COUNTS
    assert splits["train"][12].id == "toy-train-00012"
    ids = [p.id for problems in splits.values() for p in problems]
    assert len(set(ids)) == len(ids)


def test_no_split_knows_another_ones_questions_or_instances(splits: dict[str, list[Example]]) -> None:
    for of in (lambda p: p.text, instance):
        train, val, test = ({of(p) for p in splits[name]} for name in ("train", "val", "test"))
        assert not (train & test or train & val or val & test)
    questions = [p.text for problems in splits.values() for p in problems]
    assert len(set(questions)) == len(questions)


def test_every_annotation_is_right_and_the_chain_ends_in_the_gold(splits: dict[str, list[Example]]) -> None:
    for problem in (p for problems in splits.values() for p in problems if not is_terse(p)):
        *lines, last = problem.meta["solution"].split("\n")
        assert last == f"#### {problem.answer}"
        known = {int(n) for n in re.findall(r"\d+", problem.text)} | {2}  # "twice", "half"
        result = None
        for line in lines:
            (left, operator, right, formula, annotated, result) = STEP.findall(line)[0]
            assert line.count("<<") == line.count(">>") == 1
            assert formula == left + operator + right and annotated == result
            exact = {
                "+": Fraction(left) + int(right),
                "-": Fraction(left) - int(right),
                "*": Fraction(left) * int(right),
                "/": Fraction(left) / int(right),
            }[operator]
            assert exact == int(result) and 1 <= exact <= 99
            assert {int(left), int(right)} <= known, problem  # nothing falls from the sky
            known.add(int(result))
        assert result == problem.answer


def test_one_to_four_steps_in_many_wordings(splits: dict[str, list[Example]]) -> None:
    steps = Counter(p.meta["solution"].count("<<") for p in splits["test"])
    assert set(steps) == {1, 2, 3, 4} and min(steps.values()) > 30
    kinds = Counter(tuple(w for w in instance(p) if not w.isdigit()) for p in splits["test"])
    assert len(TEMPLATES) >= 15 and len(kinds) >= len(TEMPLATES)
    assert all("{" not in p.text + p.meta["solution"] for p in splits["test"])


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_terse_teacher_answers_only_training_problems(share: float) -> None:
    splits = make_problems(3, COUNTS, share)
    terse = sum(map(is_terse, splits["train"])) / COUNTS["train"]
    assert abs(terse - share) < (0.04 if 0 < share < 1 else 1e-9)
    assert not any(is_terse(p) for name in ("val", "test") for p in splits[name])
    assert [p.text for p in splits["train"]] == [p.text for p in make_problems(3, COUNTS)["train"]]


def test_terseness_cannot_be_read_off_the_kind_of_problem(splits: dict[str, list[Example]]) -> None:
    by_steps_word: dict[str, list[bool]] = {}
    for p in splits["train"]:
        by_steps_word.setdefault(" ".join(w for w in instance(p) if not w.isdigit()), []).append(is_terse(p))
    shares = [sum(terse) / len(terse) for terse in by_steps_word.values() if len(terse) > 60]
    assert len(shares) > 15 and 0.2 < min(shares) < 0.42 < 0.58 < max(shares) < 0.8


def test_impossible_requests_are_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match="terse_share"):
        make_problems(0, {"train": 1}, terse_share=1.5)


# The tiny model.


@pytest.fixture(scope="module")
def folder(splits: dict[str, list[Example]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [f"{p.text}\n{p.meta['solution']}" for p in splits["train"]]
    return make_tiny_model(
        tmp_path_factory.mktemp("tiny") / "model", texts, 0, hidden_size=32, layers=2, heads=2, context=256
    )


@pytest.mark.parametrize(
    "text",
    [
        "12+345=<<12+345=357>>357\n#### 357",
        "  two blanks,\ttab\r\n\r\nnewlines \x00\x07 ",
        "naïve ½ 中文 עברית 🤖👩‍👩‍👧 \U0010ffff",
        bytes(range(256)).decode("latin-1"),
    ],
)
def test_any_text_survives_the_tokenizer(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and max(ids) < len(tokenizer)


def test_digits_are_single_tokens_and_words_whole(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert [tokenizer.decode(i) for i in tokenizer("Tom has 12+7=<<12+7=19>>19.").input_ids] == (
        ["Tom", " has", " ", "1", "2", "+", "7", "=<<", "1", "2", "+", "7", "=", "1", "9", ">>", "1", "9", "."]
    )


def test_special_tokens_have_their_ids_and_survive_decoding(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("<|endoftext|><|im_start|><|im_end|>").input_ids == [0, 1, 2]
    assert tokenizer.decode([1, 2]) == "<|im_start|><|im_end|>"
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)


def test_the_chat_template_to_the_letter(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    user = {"role": "user", "content": "How many?"}
    turns = [{"role": "system", "content": "Be brief."}, user, {"role": "assistant", "content": "#### 3"}]
    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\n#### 3<|im_end|>\n"
    )
    ids = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids[:3]) == ["<|im_start|>", "user", "Ċ"]


def test_an_ordinary_folder_that_generates(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen2" and model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) and model.config.max_position_embeddings == 256
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == [2, 0] and model.generation_config.pad_token_id == 0
    with torch.no_grad():
        out = model.generate(torch.tensor([[1, 300, 2]]), max_new_tokens=4)
    assert out.shape[1] > 3


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    def digests(name: str, seed: int) -> dict[str, str]:
        torch.manual_seed(len(name))  # what the caller did before must not matter
        before = torch.get_rng_state()
        made = make_tiny_model(tmp_path / name, ["Tom has 3 pens."] * 9, seed, hidden_size=16, layers=1, heads=2)
        assert torch.equal(torch.get_rng_state(), before)  # nor what the caller does next
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in made.iterdir()}

    first, again, other = digests("a", 1), digests("again", 1), digests("other", 2)
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


def test_impossible_sizes_are_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        make_tiny_model(tmp_path / "m", [], 0, vocab_size=100)
    with pytest.raises(ConfigError, match="multiple"):
        make_tiny_model(tmp_path / "m", [], 0, hidden_size=30, heads=4)
