"""Tokens as text for the wires: answers piece by piece, single tokens by name, and what a stop string cuts off."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

CONTEXT = 8  # prompt tokens before an answer that decide how its first token reads
_CUT = "\ufffd"  # how a decoder shows bytes that are no whole character
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer:
    """The text of an answer while its tokens come. A token that ends within a character waits for the next ones."""

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        """`before`: the prompt's tokens. SentencePiece drops the blank before the first token of a text."""
        self._decode = decode
        self._ids = list(before[-CONTEXT:])
        self._start, self._read = 0, len(self._ids)

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        self._ids.append(token_id)
        text = self._new()
        if not text or text.endswith(_CUT):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text

    def rest(self) -> str:
        """What still waits at the end, cut characters shown as �."""
        return self._new()

    def _new(self) -> str:
        known = self._decode(self._ids[self._start : self._read]).rstrip(_CUT)
        return self._decode(self._ids[self._start :])[len(known) :]


def pieces(decode: Callable[[Sequence[int]], str], token_ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """The text that each token completes; together they are the whole text."""
    reader = Detokenizer(decode, before)
    found = [reader.push(i) for i in token_ids]
    if found:
        found[-1] += reader.rest()
    return found


def stop_at(text: str, stops: Sequence[str]) -> int:
    """Where the first of these strings begins, -1 where there is none."""
    return min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=-1)


class TokenNames:
    """Each token as text, different tokens by different texts: bytes that are no whole UTF-8 as `bytes:\\xe2\\x80`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.dumps(json.loads(backend.to_str())["decoder"]) if backend else ""
        self._byte_level = "ByteLevel" in decoder
        self._sentencepiece = "Metaspace" in decoder or "▁" in decoder or "\\u2581" in decoder
        self.name = functools.lru_cache(maxsize=1 << 17)(self._name)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for an id beyond the tokenizer's."""
        if token_id in self._added:
            return str(self._added[token_id]).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            return b"".join(_bytes_of_character(c) for c in piece)
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        if self._sentencepiece:
            return str(piece).replace("▁", " ").encode()
        return str(self._tokenizer.decode([token_id])).encode()

    def _name(self, token_id: int) -> str:
        raw, piece = self.bytes_of(token_id), self._tokenizer.convert_ids_to_tokens(token_id)
        if not raw:
            return f"token_id:{token_id}"
        if not _BYTE.fullmatch(piece):  # the token of a byte is another one than the character's
            with contextlib.suppress(UnicodeDecodeError):
                return raw.decode()
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's: a byte that Latin-1 prints stands for itself, the others for the characters from 256 on, in order."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _bytes_of_character(character: str) -> bytes:
    byte = _byte_level_alphabet().get(character)
    return character.encode() if byte is None else bytes([byte])
