"""What the hub is asked before money is spent: may we push, may we load, and how large is the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from grpo_gsm8k.errors import ConfigError, ModelError
from grpo_gsm8k.runs.clean import one_line
from grpo_gsm8k.runs.files import read_json
from grpo_gsm8k.trainer.costs import Shape

# The first base of the hub's error is HTTPError of httpx or of httpx2, by the hub client's version; a connection that
# fails is one of those, and no OSError. ValueError: a reply that is not what was asked for.
UNREACHABLE: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError, ValueError)


# Never pushed, wherever they lie (`*` also stands for slashes): what usually holds keys.
SECRET = [
    *(f"{start}{name}" for start in ("", "*/") for name in (".env", ".env.*", ".netrc", ".npmrc", ".pypirc", ".git/*")),
    *(f"{start}{name}" for start in ("", "*/") for name in (".ssh/*", ".aws/*", "id_rsa*", "id_ed25519*", "id_ecdsa*")),
    *(f"{start}{name}" for start in ("", "*/") for name in ("credentials*", "secrets*", "token", ".git-credentials")),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx"),
]


@dataclass(frozen=True)
class ModelFacts:
    """A model on the hub; `gated` is "" for an open one."""

    model_id: str
    sha: str
    gated: str
    shape: Shape


def api() -> Any:
    """The client; HF_ENDPOINT and HF_TOKEN say where and who."""
    session = get_session()
    if _refuse_other_origin not in session.event_hooks["response"]:
        hooks = session.event_hooks
        session.event_hooks = hooks | {"response": [*hooks["response"], _refuse_other_origin]}
    return HfApi()


def _refuse_other_origin(response: Any) -> None:
    """Files may come from elsewhere, without the token; whether we may push, and what we push, is the hub's alone."""
    request = response.request
    if response.has_redirect_location and request.url.path.startswith("/api/"):
        target = request.url.join(response.headers["location"])
        if (target.scheme, target.host, target.port) != (request.url.scheme, request.url.host, request.url.port):
            raise ConnectionError(f"a redirect to {target.scheme}://{target.host}, which is not followed")


def check_push(repo_id: str, public: bool = False) -> None:
    """Make sure that HF_TOKEN may write to the repository; a missing one is made, private.

    Args:
        public: it may be public.

    Raises:
        ConfigError: it may not be written, or everybody can read what would be pushed there.
    """
    if repo_id.count("/") != 1:
        raise ConfigError(f"--repo_id {repo_id}: must read owner/name")
    hub = api()
    try:
        try:
            hub.auth_check(repo_id, write=True)
            is_public = not public and hub.model_info(repo_id).private is not True
        except RepositoryNotFoundError:
            hub.create_repo(repo_id, private=True, exist_ok=True)
            hub.auth_check(repo_id, write=True)
            is_public = False  # as it has just been made
    except UNREACHABLE as fault:
        raise ConfigError(
            f"--repo_id {repo_id}: cannot be pushed to with this HF_TOKEN ({_short(fault)}); nothing was rented. The "
            "model that is trained is --model_id"
        ) from None
    if is_public:
        raise ConfigError(
            f"--repo_id {repo_id}: is a public repository, and everything that is pushed would be published: make it "
            "private on its page, or add --public"
        )


def model_facts(model_id: str) -> ModelFacts:
    """Size and shape of a model that this token may load.

    Raises:
        ModelError: there is no such model, it is gated against this token, or it does not say its size.
    """
    facts, why = facts_of(check_access(model_id))
    if facts is None:
        raise ModelError(f"{model_id}: {why}")
    return facts


def check_access(model_id: str) -> Any:
    """What the hub says of a model, that this token may load. Raises `ModelError` as `model_facts` does."""
    hub = api()
    try:
        info = hub.model_info(model_id, expand=["safetensors", "gated", "config", "sha"])
        if info.gated:
            hub.auth_check(model_id)
    except GatedRepoError:
        raise ModelError(f"{model_id}: gated, and this HF_TOKEN has no access; ask for it on its page") from None
    except RepositoryNotFoundError:
        raise ModelError(f"{model_id}: no such model, or it is private and HF_TOKEN does not open it") from None
    except UNREACHABLE as fault:
        raise ModelError(f"{model_id}: the hub does not answer: {_short(fault)}") from None
    return info


def facts_of(info: Any) -> tuple[ModelFacts | None, str]:
    """A model's size and shape; or None, and why they are not known. Raises `ModelError` if the hub does not answer."""
    if not info.safetensors:
        return None, "it has no safetensors weights, so the hub does not know its size"
    try:
        path = api().hf_hub_download(info.id, "config.json", revision=info.sha)
    except UNREACHABLE as fault:
        raise ModelError(f"{info.id}: the hub does not answer: {_short(fault)}") from None
    try:
        shape = Shape.of(read_json(Path(path)), int(info.safetensors.total))
    except (KeyError, TypeError, ValueError) as fault:
        return None, f"its config.json does not describe a dense transformer: {fault}"
    return ModelFacts(info.id, str(info.sha), str(info.gated or ""), shape), ""


def _short(fault: Exception) -> str:
    return one_line(str(fault), 200) or type(fault).__name__
