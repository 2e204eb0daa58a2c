"""Bodies of the Tinker wire that are JSON. What a training request holds beside its number is checked in its turn."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr
from starlette.responses import Response

from grpo_gsm8k.serve.bodies import refuse_unknown
from grpo_gsm8k.serve.core import Service

MOST_SEQ = 2**62
PROTOBUF = "application/x-protobuf"


class Body(BaseModel):
    """A JSON body; fields that are not known are refused unless they ask for nothing."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    def refuse_others(self) -> None:
        """Raise `Refusal` for a field that asks for something that is not done here."""
        refuse_unknown(self.model_extra or {}, {"type"})


class CreateSession(Body):
    """A client's visit begins."""

    tags: list[str] = Field(default_factory=list)
    user_metadata: dict[str, Any] | None = None
    sdk_version: StrictStr = ""
    project_id: StrictStr | None = None
    display_name: StrictStr | None = None


class SessionId(Body):
    """A session."""

    session_id: StrictStr


class CreateModel(SessionId):
    """A new LoRA adapter; without a lora_config, or with rank 0, all weights."""

    model_seq_id: StrictInt = Field(ge=0, le=MOST_SEQ)
    base_model: StrictStr
    user_metadata: dict[str, Any] | None = None
    lora_config: dict[str, Any] | None = None
    optimizer_config: dict[str, Any] | None = None


class ModelId(Body):
    """A training run."""

    model_id: StrictStr


class Op(ModelId):
    """A training request with its number; what else it holds is checked when its turn comes."""

    seq_id: StrictInt = Field(ge=1, le=MOST_SEQ)


class LoadWeights(Body):
    """Into a model (with model_id and seq_id), or as a new one (with session_id and model_seq_id)."""

    model_id: StrictStr | None = None
    seq_id: StrictInt | None = Field(default=None, ge=1, le=MOST_SEQ)
    session_id: StrictStr | None = None
    model_seq_id: StrictInt | None = Field(default=None, ge=0, le=MOST_SEQ)
    path: Any = None
    optimizer: Any = False


class SamplingSession(SessionId):
    """Sample from the base or from a path."""

    sampling_session_seq_id: StrictInt = Field(ge=0, le=MOST_SEQ)
    base_model: StrictStr | None = None
    model_path: StrictStr | None = None


class SamplerId(Body):
    """A sampling session."""

    sampling_session_id: StrictStr


class RequestId(Body):
    """A future."""

    request_id: StrictStr
    allow_metadata_only: bool = False


class Target(Body):
    """The requests of a sampling session whose ends are watched for."""

    sampling_session_id: StrictStr
    cloned_sampler_id: StrictInt = 0


class RetrieveFutures(Body):
    """Which requests of a sampling session have ended since `prev_cursor`."""

    target: Target
    prev_cursor: StrictInt = Field(default=0, ge=0, le=MOST_SEQ)
    timeout: float | None = None
    retrieved_request_ids: list[str] = Field(default_factory=list)


def service_of(request: Request) -> Service:
    """The service that this application stands on."""
    found: Service = request.app.state.service
    return found


Answer = dict[str, Any] | Response


def client_version(request: Request) -> tuple[int, ...]:
    """The first two numbers of the client's version; large ones for a client that does not say."""
    parts = request.headers.get("x-stainless-package-version", "").split(".")[:2]
    return tuple(map(int, parts)) if len(parts) == 2 and all(map(str.isdecimal, parts)) else (1 << 30, 0)
