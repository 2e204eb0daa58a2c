"""Requests of OpenAI's wire: their fields, ranges and defaults, and the fields that are understood but not served.

A field that is not listed here is refused by name. So is one that is listed and would change the answer in a way that
this server does not have: it may only be sent with the value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo_gsm8k.serve.forms import MOST_SEED, MOST_STOPS, ChatMessage, Form, ShortText, Stops, Text, stop_list

MOST_SAMPLES = 1024  # of one request, all prompts together
MOST_TOP = 128  # likeliest tokens at a position
# Fields of OpenAI's and of vLLM's that are not served, and the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "metadata": (None, {}),
    "min_p": (None, 0),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),  # of tools, which there are none of
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}


class StreamOptions(Form):
    include_usage: bool | None = False
    include_obfuscation: bool | None = False  # padding against eavesdroppers; none is added in any case


class Sampling(Form):
    """What both endpoints take."""

    model: ShortText
    n: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] | None = 1
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MOST_SEED)] | None = None
    seed: Annotated[int, Field(ge=-MOST_SEED - 1, le=MOST_SEED)] | None = None
    stop: Stops = None
    stop_token_ids: Annotated[list[int], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: ShortText | None = None  # names who asks, and changes nothing
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_served(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        others = [name for name in body if name in NEUTRAL and name not in cls.model_fields]
        for name in others:
            if not any(_same(body[name], neutral) for neutral in NEUTRAL[name]):
                raise ValueError(f"{name} is not supported")
        return {name: value for name, value in body.items() if name not in others}

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream")
        return self

    @property
    def stops(self) -> list[str]:
        """Stop strings, however many."""
        return stop_list(self.stop)


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and not as 1 equals True."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


class CompletionRequest(Sampling):
    """Texts or token ids to go on from."""

    prompt: Text | list[int] | list[Text] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0, le=MOST_SEED)] | None = 16
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    add_special_tokens: bool | None = True

    @model_validator(mode="after")
    def _together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of is not supported")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, or 0 together with echo")
        return self

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """One entry a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class ChatRequest(Sampling):
    """A conversation to answer."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_SEED)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_SEED)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    add_generation_prompt: Literal[True] | None = True

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        return self


class TokenizeRequest(Form):
    """A text, or a conversation, to turn into token ids."""

    model: ShortText | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool | None = True
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages must be given")
        return self


class DetokenizeRequest(Form):
    """Token ids to turn into text."""

    model: ShortText | None = None
    tokens: list[int]
