"""Tokens as text: pieces that add up to the whole, and names that tell tokens apart."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grpo_gsm8k.serve.text import Detokenizer, TokenNames, pieces, stop_at

TEXT = "Größe ½ of 12 → naïve 🙂🙃 <b>\n\n日本 \t end "


@pytest.fixture(scope="module")
def byte_level(tiny):
    return AutoTokenizer.from_pretrained(tiny.model)


@pytest.fixture(scope="module")
def sentencepiece():
    """A BPE of words with ▁ for blanks, and bytes for what it does not know, as Llama 2 has."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abdehlorw", "lo"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocabulary, [("l", "o")], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", clean_up_tokenization_spaces=False)


def decoder(tokenizer):
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


def test_pieces_add_up_to_the_whole_text_and_none_is_cut(byte_level):
    ids = byte_level(TEXT)["input_ids"]
    found = pieces(decoder(byte_level), ids)
    assert "".join(found) == byte_level.decode(ids) == TEXT and len(found) == len(ids)
    assert not any("\ufffd" in piece for piece in found)
    assert any(piece == "" for piece in found)  # bytes of a character that was not whole yet


def test_special_tokens_have_no_text_and_what_is_cut_at_the_end_is_shown(byte_level):
    smile = byte_level("🙂")["input_ids"]
    end = byte_level.eos_token_id
    assert pieces(decoder(byte_level), [*byte_level("ab")["input_ids"], end])[-1] == ""
    reader = Detokenizer(decoder(byte_level))
    assert [reader.push(i) for i in smile[:2]] == ["", ""]
    assert set(reader.rest()) == {"\ufffd"}


def test_random_ids_are_read_as_the_tokenizer_reads_them(byte_level):
    drawn = random.Random(0)
    for _ in range(50):
        ids = [drawn.randrange(len(byte_level)) for _ in range(30)]
        whole = decoder(byte_level)(ids)
        assert "".join(pieces(decoder(byte_level), ids)).replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_a_blank_before_the_first_token_is_kept_behind_a_prompt(sentencepiece):
    """SentencePiece's decoder drops the blank that a text begins with; an answer begins in the middle of one."""
    blank, h = sentencepiece.convert_tokens_to_ids(["▁", "h"])
    prompt = sentencepiece("lo")["input_ids"]
    assert sentencepiece.decode([blank, h]) == "h"
    assert pieces(decoder(sentencepiece), [blank, h], prompt) == [" ", "h"]


def test_names_tell_all_tokens_apart(byte_level, sentencepiece):
    for tokenizer in (byte_level, sentencepiece):
        names = TokenNames(tokenizer)
        found = [names.name(i) for i in range(len(tokenizer))]
        raw = [names.bytes_of(i) for i in range(len(tokenizer))]
        cut = [name for name, b in zip(found, raw, strict=True) if "\ufffd" in b.decode("utf-8", "replace")]
        assert cut and all(name.startswith("bytes:\\x") for name in cut)
        assert len(set(found)) == len(found)


def test_bytes_are_the_tokens_own(byte_level):
    names = TokenNames(byte_level)
    ids = byte_level(TEXT)["input_ids"]
    assert b"".join(names.bytes_of(i) for i in ids).decode() == TEXT
    assert names.name(byte_level.eos_token_id) == byte_level.eos_token
    first = byte_level("🙂")["input_ids"][0]
    assert names.name(first) == "bytes:" + "".join(f"\\x{b:02x}" for b in names.bytes_of(first))
    assert names.name(len(byte_level) + 5) == f"token_id:{len(byte_level) + 5}"


def test_a_tokenizer_of_another_kind_is_asked_itself():
    plain = SimpleNamespace(
        added_tokens_decoder={}, convert_ids_to_tokens=lambda i: f"t{i}", decode=lambda ids: f"<{ids[0]}>"
    )
    assert TokenNames(plain).name(3) == "<3>"


def test_the_first_of_several_stop_strings_counts():
    assert stop_at("one, two; three", [";", ","]) == 3
    assert stop_at("one", ["two", ""]) == -1
