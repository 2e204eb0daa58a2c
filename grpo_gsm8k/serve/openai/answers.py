"""Answers of OpenAI's wire: choices with their log-probabilities, usage, and the same as a stream of events."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_gsm8k.serve.jobs import Chosen, SampledSequence, SampleResult
from grpo_gsm8k.serve.text import Detokenizer, TokenNames, pieces, stop_at

LEAST = -9999.0  # what vLLM writes for a probability of 0: JSON has no infinity
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Wanted:
    """What a request wants to see of its samples.

    Attributes:
        stops: strings before which the text ends.
        top: likeliest tokens to show at each position; None for no log-probabilities at all.
        echo: the prompt comes first.
        as_ids: tokens are named token_id:12.
        token_ids: ids of prompt and answer beside the text.
        prompt_top: vLLM's `prompt_logprobs`.
    """

    stops: Sequence[str] = ()
    top: int | None = None
    echo: bool = False
    as_ids: bool = False
    token_ids: bool = False
    prompt_top: int | None = None


@dataclass(frozen=True)
class Token:
    """One token of an answer: its name, the text that it adds, and what was likely in its place."""

    token_id: int
    text: str
    logprob: float | None
    top: Chosen


class Reader:
    """Turns sampled ids into text as this model's clients see it."""

    def __init__(self, names: TokenNames, decode: Decode, wanted: Wanted) -> None:
        self.names, self.decode, self.wanted = names, decode, wanted

    def name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.wanted.as_ids else str(self.names.name(token_id))

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of ids that were sent as such."""
        return "".join(pieces(self.decode, token_ids))

    def prompt(self, token_ids: Sequence[int], result: SampleResult) -> list[Token]:
        """The prompt's tokens; the first has no log-probability."""
        texts = pieces(self.decode, token_ids)
        logprobs = result.prompt_logprobs or (None,) * len(token_ids)
        tops = result.topk_prompt or ((),) * len(token_ids)
        return [Token(*row) for row in zip(token_ids, texts, logprobs, tops, strict=True)]

    def answer(self, prompt: Sequence[int], sequence: SampledSequence) -> list[Token]:
        """The sampled tokens, their texts cut where a stop string begins."""
        return Telling(self, prompt).tokens(sequence, True)

    def top(self, token: Token) -> dict[str, float]:
        """Names and log-probabilities of the likeliest tokens, and of the token itself whether it is one or not."""
        found = {self.name(i): finite(value) for i, value in token.top[: self.wanted.top]}
        if token.logprob is not None:
            found[self.name(token.token_id)] = finite(token.logprob)
        return found

    def completion_logprobs(self, tokens: Sequence[Token], offset: int = 0) -> dict[str, Any] | None:
        """The `logprobs` of a completion's choice."""
        if self.wanted.top is None:
            return None
        offsets = []
        for token in tokens:
            own = self.names.name(token.token_id)  # before it may stand what earlier tokens left of a character
            offsets.append(offset + (len(token.text) - len(own) if token.text.endswith(own) else 0))
            offset += len(token.text)
        return {
            "tokens": [self.name(token.token_id) for token in tokens],
            "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
            "top_logprobs": [None if token.logprob is None else self.top(token) for token in tokens],
            "text_offset": offsets,
        }

    def chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """The `logprobs` of a chat's choice."""
        if self.wanted.top is None:
            return None
        content = []
        for token in tokens:
            assert token.logprob is not None
            top = [self._entry(i, value) for i, value in token.top[: self.wanted.top]]
            content.append({**self._entry(token.token_id, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = list(self.names.bytes_of(token_id))
        return {"token": self.name(token_id), "logprob": finite(logprob), "bytes": raw}

    def prompt_logprobs(self, tokens: Sequence[Token]) -> list[dict[str, Any] | None] | None:
        """vLLM's: {id: {logprob, rank, decoded_token}} at each position; ranks behind the last shown are one more."""
        if self.wanted.prompt_top is None:
            return None
        found: list[dict[str, Any] | None] = []
        for token in tokens:
            if token.logprob is None:
                found.append(None)
                continue
            top = token.top[: self.wanted.prompt_top]
            ranks = {i: (rank, value) for rank, (i, value) in enumerate(top, start=1)}
            ranks.setdefault(token.token_id, (len(top) + 1, token.logprob))
            found.append({str(i): self._ranked(i, rank, value) for i, (rank, value) in ranks.items()})
        return found

    def _ranked(self, token_id: int, rank: int, value: float) -> dict[str, Any]:
        return {"logprob": finite(value), "rank": rank, "decoded_token": str(self.names.name(token_id))}


class Telling:
    """One sample while it comes: its tokens as soon as no stop string can cut their text off any more."""

    def __init__(self, reader: Reader, prompt: Sequence[int]) -> None:
        self.stops, self.text = reader.wanted.stops, Detokenizer(reader.decode, prompt)
        self.texts: list[str] = []
        self.told = 0
        self.held = max((len(stop) for stop in self.stops), default=1) - 1  # characters that may begin a stop string

    def tokens(self, sequence: SampledSequence, whole: bool) -> list[Token]:
        """The tokens of `sequence` that were not told yet; `whole`: nothing comes behind them."""
        self.texts += [self.text.push(i) for i in sequence.token_ids[len(self.texts) :]]
        if whole and self.texts:
            self.texts[-1] += self.text.rest()
        said = "".join(self.texts)
        stop = stop_at(said, self.stops)
        if whole and stop >= 0:
            self.texts = list(_cut(self.texts, stop))
        safe, told = stop if stop >= 0 else len(said) - self.held, self.told
        ends = itertools.accumulate(map(len, self.texts[:-1]))  # the last one gets what is left of a character
        self.told = len(self.texts) if whole else max(told, sum(1 for end in ends if end <= safe))
        tops = sequence.topk or ((),) * len(sequence.token_ids)
        rows = zip(sequence.token_ids, self.texts, sequence.logprobs, tops, strict=True)
        return [Token(*row) for row in itertools.islice(rows, told, self.told)]


def finite(logprob: float) -> float:
    """A log-probability as JSON can hold it."""
    return max(logprob, LEAST)


def _cut(texts: Sequence[str], end: int) -> Iterator[str]:
    """Texts of tokens, without what lies at or behind this offset of all of them."""
    for text in texts:
        yield text[: max(end, 0)]
        end -= len(text)


def usage(prompts: Sequence[Sequence[int]], results: Sequence[SampleResult]) -> dict[str, int]:
    """Tokens read and tokens sampled."""
    read = sum(map(len, prompts))
    sampled = sum(len(sequence.token_ids) for result in results for sequence in result.sequences)
    return {"prompt_tokens": read, "completion_tokens": sampled, "total_tokens": read + sampled}


def completion_choice(
    reader: Reader, index: int, prompt: Sequence[int], echo_text: str, result: SampleResult, sequence: SampledSequence
) -> dict[str, Any]:
    """A choice of a completion. `echo_text`: the prompt as it was sent, "" where no echo is wanted."""
    wanted, said = reader.wanted, reader.answer(prompt, sequence)
    logprobs = reader.completion_logprobs(said, len(echo_text))
    if wanted.echo and logprobs is not None:
        before = reader.completion_logprobs(reader.prompt(prompt, result))
        assert before is not None
        logprobs = {key: before[key] + values for key, values in logprobs.items()}
    choice: dict[str, Any] = {
        "index": index,
        "text": echo_text + "".join(token.text for token in said),
        "logprobs": logprobs,
        "finish_reason": sequence.stop_reason,
    }
    if wanted.token_ids:
        choice |= {"token_ids": list(sequence.token_ids), "prompt_token_ids": list(prompt)}
    if wanted.prompt_top is not None:
        choice["prompt_logprobs"] = reader.prompt_logprobs(reader.prompt(prompt, result))
    return choice


class CompletionStream:
    """A choice of a completion as events: the echo, the tokens, the reason of the end."""

    def __init__(self, reader: Reader, index: int, prompt: Sequence[int], echo_text: str) -> None:
        self.reader, self.index, self.prompt, self.echo_text = reader, index, prompt, echo_text
        self.telling, self.offset, self.first = Telling(reader, prompt), len(echo_text), True

    def events(self, sequence: SampledSequence, result: SampleResult | None) -> Iterator[dict[str, Any]]:
        """What is new; the last with the `result`, which ends it."""
        wanted = self.reader.wanted
        if wanted.echo and self.first:
            assert result is not None, "an echo is told when the prompt has been read"
            logprobs = self.reader.completion_logprobs(self.reader.prompt(self.prompt, result))
            yield self._event(self.echo_text, logprobs, result)
        for token in self.telling.tokens(sequence, result is not None):
            logprobs = self.reader.completion_logprobs([token], self.offset)
            if token.text or logprobs or wanted.token_ids:
                yield self._event(token.text, logprobs, result, [token.token_id])
                self.offset += len(token.text)
        if result is not None:
            yield self._event("", None, result) | {"finish_reason": sequence.stop_reason}

    def _event(
        self, text: str, logprobs: Any, result: SampleResult | None, token_ids: Sequence[int] = ()
    ) -> dict[str, Any]:
        wanted = self.reader.wanted
        event: dict[str, Any] = {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": None}
        if wanted.token_ids:
            event["token_ids"] = list(token_ids)
        if self.first and wanted.token_ids:
            event["prompt_token_ids"] = list(self.prompt)
        if self.first and wanted.prompt_top is not None and result is not None:
            event["prompt_logprobs"] = self.reader.prompt_logprobs(self.reader.prompt(self.prompt, result))
        self.first = False
        return event


def chat_choice(reader: Reader, index: int, prompt: Sequence[int], sequence: SampledSequence) -> dict[str, Any]:
    """A choice of a chat."""
    said = reader.answer(prompt, sequence)
    choice = {
        "index": index,
        "message": {"role": "assistant", "content": "".join(token.text for token in said), "refusal": None},
        "logprobs": reader.chat_logprobs(said),
        "finish_reason": sequence.stop_reason,
    }
    return choice | ({"token_ids": list(sequence.token_ids)} if reader.wanted.token_ids else {})


class ChatStream:
    """A choice of a chat as events: its role, the tokens, the reason of the end."""

    def __init__(self, reader: Reader, index: int, prompt: Sequence[int]) -> None:
        self.reader, self.index, self.telling, self.first = reader, index, Telling(reader, prompt), True

    def events(self, sequence: SampledSequence, result: SampleResult | None) -> Iterator[dict[str, Any]]:
        """What is new; the last with the `result`, which ends it."""
        if self.first:
            self.first = False
            yield self._event({"role": "assistant", "content": ""})
        for token in self.telling.tokens(sequence, result is not None):
            logprobs, ids = self.reader.chat_logprobs([token]), self.reader.wanted.token_ids
            if token.text or logprobs or ids:
                event = self._event({"content": token.text}) | {"logprobs": logprobs}
                yield event | ({"token_ids": [token.token_id]} if ids else {})
        if result is not None:
            yield self._event({}) | {"finish_reason": sequence.stop_reason}

    def _event(self, delta: Mapping[str, str]) -> dict[str, Any]:
        return {"index": self.index, "delta": dict(delta), "logprobs": None, "finish_reason": None}
