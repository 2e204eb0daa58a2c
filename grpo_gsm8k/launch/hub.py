"""What the hub is asked before money is spent: may we push, may we load, and how large is the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from grpo_gsm8k.errors import ConfigError, ModelError
from grpo_gsm8k.runs.files import read_json
from grpo_gsm8k.trainer.costs import Shape

# The first base of the hub's error is HTTPError of httpx or of httpx2, by the hub client's version; a connection that
# fails is one of those, and no OSError. ValueError: a reply that is not what was asked for.
UNREACHABLE: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError, ValueError)


@dataclass(frozen=True)
class ModelFacts:
    """A model on the hub; `gated` is "" for an open one."""

    model_id: str
    sha: str
    gated: str
    shape: Shape


def api() -> Any:
    """The client; HF_ENDPOINT and HF_TOKEN say where and who."""
    return HfApi()


def check_push(repo_id: str) -> None:
    """Make sure that HF_TOKEN may write to the repository; a missing one is made, private. Raises `ConfigError`."""
    if repo_id.count("/") != 1:
        raise ConfigError(f"--repo_id {repo_id}: must read owner/name")
    hub = api()
    try:
        try:
            hub.auth_check(repo_id, write=True)
        except RepositoryNotFoundError:
            hub.create_repo(repo_id, private=True, exist_ok=True)
            hub.auth_check(repo_id, write=True)
    except UNREACHABLE as fault:
        raise ConfigError(
            f"--repo_id {repo_id}: cannot be pushed to with this HF_TOKEN ({_short(fault)}); nothing was rented"
        ) from None


def model_facts(model_id: str) -> ModelFacts:
    """Size and shape of a model, and whether this token may load it.

    Raises:
        ModelError: there is no such model, it is gated against this token, or it does not say its size.
    """
    hub = api()
    try:
        info = hub.model_info(model_id, expand=["safetensors", "gated", "config", "sha"])
        if info.gated:
            hub.auth_check(model_id)
        path = hub.hf_hub_download(model_id, "config.json", revision=info.sha)
    except GatedRepoError:
        raise ModelError(f"{model_id}: gated, and this HF_TOKEN has no access; ask for it on its page") from None
    except RepositoryNotFoundError:
        raise ModelError(f"{model_id}: no such model, or it is private and HF_TOKEN does not open it") from None
    except UNREACHABLE as fault:
        raise ModelError(f"{model_id}: the hub does not answer: {_short(fault)}") from None
    if not info.safetensors:
        raise ModelError(f"{model_id}: has no safetensors weights, so the hub does not know its size")
    return _facts(model_id, info, path)


def _facts(model_id: str, info: Any, path: str) -> ModelFacts:
    try:
        shape = Shape.of(read_json(Path(path)), int(info.safetensors.total))
    except (KeyError, TypeError, ValueError) as fault:
        raise ModelError(f"{model_id}: its config.json does not describe a dense transformer: {fault}") from None
    return ModelFacts(model_id, str(info.sha), str(info.gated or ""), shape)


def _short(fault: Exception) -> str:
    return " ".join(str(fault).split())[:200] or type(fault).__name__
