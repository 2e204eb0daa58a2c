"""What the JSON wires of text share: strict bodies, conversations, and how text becomes the model's token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, model_validator

from grpo_gsm8k.serve.core import Service
from grpo_gsm8k.serve.jobs import Refusal

MOST_SEED = 2**63 - 1
MOST_STOPS = 64
CHARACTERS_A_TOKEN = 64  # a text longer than the context by this factor is refused unread
# A length bound also makes pydantic refuse half of a surrogate pair, which JSON can spell and no tokenizer can read.
Text = Annotated[str, Field(max_length=1 << 22)]
ShortText = Annotated[str, Field(max_length=1000)]
Stops = ShortText | Annotated[list[ShortText], Field(max_length=MOST_STOPS)] | None


class Form(BaseModel):
    """A body whose every field is known and has the very type that JSON gives it; its texts are whole Unicode."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def as_json(request: Request) -> Request:
    """The request with its body declared as JSON: curl's `-d` and urllib declare it a form."""
    headers = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
    request.scope["headers"] = [*headers, (b"content-type", b"application/json")]
    return Request(request.scope, request.receive)


class Part(Form):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class ChatMessage(Form):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: ShortText | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_empty(cls, message: Any) -> Any:
        """An answer that is sent back has `refusal`, `annotations`, `tool_calls` and the like, all empty."""
        if not isinstance(message, dict):
            return message
        return {name: value for name, value in message.items() if name in cls.model_fields or value not in (None, [])}

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def stop_list(stop: str | list[str] | None) -> list[str]:
    """Stop strings, however many."""
    return [text for text in ([stop] if isinstance(stop, str) else stop or []) if text]


def first_fault(fault: RequestValidationError) -> tuple[str, str | None]:
    """What is wrong with a body, and in which field."""
    first = fault.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    what = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"unknown field {'.'.join(where)}", where[0]
    if first["type"] == "json_invalid":
        return "the body is no JSON", None
    return (f"{where[0]}: {what[:1].lower()}{what[1:]}", where[0]) if where else (what, None)


def end_ids(service: Service) -> tuple[int, ...]:
    """The ids that end this model's answers."""
    return tuple(sorted(service.work.base.stop_ids))


def encode(service: Service, text: str, special: bool = True) -> list[int]:
    """The ids of a text, `special` with the tokens that the tokenizer puts around one."""
    if len(text) > CHARACTERS_A_TOKEN * service.base.context:
        raise Refusal(f"the prompt has {len(text)} characters, more than this model's context can hold")
    ids: list[int] = service.base.renderer.tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def conversation(service: Service, messages: Sequence[ChatMessage]) -> list[int]:
    """A conversation as the model's chat template renders it. Raises `DataError` where it cannot."""
    said = [("system" if message.role == "developer" else message.role, message.text) for message in messages]
    if sum(len(text) for _, text in said) > CHARACTERS_A_TOKEN * service.base.context:
        raise Refusal("the conversation is longer than this model's context can hold")
    return list(service.base.renderer.conversation(said))


def check_ids(service: Service, ids: Sequence[int], what: str) -> None:
    """Raise `Refusal` for an id that has no embedding."""
    wrong = next((i for i in ids if not 0 <= i < service.base.vocabulary), None)
    if wrong is not None:
        raise Refusal(f"{what}: token id {wrong} is not in the vocabulary of {service.base.vocabulary}")


def check_length(service: Service, ids: Sequence[int], room: int = 1) -> None:
    """Raise `Refusal` for a prompt without a token, or one that leaves less than `room` in the context."""
    if not ids:
        raise Refusal("prompt: it has no token")
    if len(ids) + room > service.base.context:
        raise Refusal(f"the prompt has {len(ids)} tokens; this model's context is {service.base.context}")
