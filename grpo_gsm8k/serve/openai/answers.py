"""Answers of OpenAI's wire: choices with their log-probabilities, usage, and the same as a stream of events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_gsm8k.serve.jobs import Chosen, SampledSequence, SampleResult
from grpo_gsm8k.serve.text import TokenNames, pieces, stop_at

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
        texts = pieces(self.decode, sequence.token_ids, prompt)
        if (end := stop_at("".join(texts), self.wanted.stops)) >= 0:
            texts = list(_cut(texts, end))
        tops = sequence.topk or ((),) * len(texts)
        return [Token(*row) for row in zip(sequence.token_ids, texts, sequence.logprobs, tops, strict=True)]

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


def completion_choices(
    reader: Reader, first: int, prompt: Sequence[int], echo_text: str, result: SampleResult
) -> Iterator[tuple[dict[str, Any], list[Token], list[Token]]]:
    """The choices of one prompt, numbered from `first`; with each, the tokens of the prompt and of the answer.

    Args:
        echo_text: the prompt as it was sent, "" where no echo is wanted.
    """
    wanted = reader.wanted
    read = reader.prompt(prompt, result) if wanted.echo or wanted.prompt_top is not None else []
    for i, sequence in enumerate(result.sequences):
        said = reader.answer(prompt, sequence)
        logprobs = reader.completion_logprobs(said, len(echo_text))
        if wanted.echo and logprobs is not None:
            before = reader.completion_logprobs(read)
            assert before is not None
            logprobs = {key: before[key] + values for key, values in logprobs.items()}
        choice = {
            "index": first + i,
            "text": echo_text + "".join(token.text for token in said),
            "logprobs": logprobs,
            "finish_reason": sequence.stop_reason,
        }
        if wanted.token_ids:
            choice |= {"token_ids": list(sequence.token_ids), "prompt_token_ids": list(prompt)}
        if wanted.prompt_top is not None:
            choice["prompt_logprobs"] = reader.prompt_logprobs(read)
        yield choice, read, said


def completion_events(
    reader: Reader, choice: Mapping[str, Any], echo_text: str, read: list[Token], said: list[Token]
) -> Iterator[dict[str, Any]]:
    """A choice as a stream: the echo, then the answer token by token; the last event has the reason of its end."""
    index, offset = choice["index"], len(echo_text)
    more = {key: choice[key] for key in ("prompt_token_ids", "prompt_logprobs") if key in choice}
    if reader.wanted.echo:
        logprobs = reader.completion_logprobs(read)
        yield {"index": index, "text": echo_text, "logprobs": logprobs, "finish_reason": None, **more}
        more = {}
    for token in said:
        ids = {"token_ids": [token.token_id]} if reader.wanted.token_ids else {}
        logprobs = reader.completion_logprobs([token], offset)
        if token.text or logprobs or ids:
            yield {"index": index, "text": token.text, "logprobs": logprobs, "finish_reason": None, **ids, **more}
            offset, more = offset + len(token.text), {}
    yield {"index": index, "text": "", "logprobs": None, "finish_reason": choice["finish_reason"], **more}


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


def chat_events(
    reader: Reader, index: int, prompt: Sequence[int], sequence: SampledSequence
) -> Iterator[dict[str, Any]]:
    """A choice of a chat as a stream: its role, its text token by token, the reason of its end."""
    yield _delta(index, {"role": "assistant", "content": ""})
    for token in reader.answer(prompt, sequence):
        logprobs = reader.chat_logprobs([token])
        ids = {"token_ids": [token.token_id]} if reader.wanted.token_ids else {}
        if token.text or logprobs or ids:
            yield {**_delta(index, {"content": token.text}), "logprobs": logprobs, **ids}
    yield _delta(index, {}, sequence.stop_reason)


def _delta(index: int, delta: Mapping[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": dict(delta), "logprobs": None, "finish_reason": finish_reason}
