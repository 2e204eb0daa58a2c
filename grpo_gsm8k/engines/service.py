"""A training service behind the Tinker wire: ours (`grpo-gsm8k serve`), or Tinker's cloud.

The one module that imports the `tinker` client. What the client raises becomes an error of ours in one line: a
`RefusedError` for what the service will not do, a `ServiceError` for one that fails or cannot be reached. The client
itself repeats what is lost on the way, for minutes, and the service applies each request once.

The key is read from the environment variable TINKER_API_KEY, and stands in no config and no log.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from grpo_gsm8k.config import SERVICE, SERVICE_FILE, PromptConfig
from grpo_gsm8k.errors import CheckpointError, ConfigError, GrpoError, ModelError, RefusedError, ServiceError
from grpo_gsm8k.runs.files import read_json
from grpo_gsm8k.runs.progress import say

KEY = "TINKER_API_KEY"
HASH = "weights_sha256"  # a key of user_metadata that is sent empty
UNFETCHED = "Error retrieving result"  # begins what the client says of a result that the service no longer has
PATIENCE_S = 5.0  # for a first connection: the client itself would try for minutes
PATHS = ("weights", "sampler_weights")  # what of a checkpoint's name says which kind it is
Ends = Literal["success", "errored", "interrupted"]


@dataclass(frozen=True)
class BaseModel:
    """A model that the service has, by its name there; `context` in tokens, 0 where the service does not say."""

    name: str
    context: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A model at a service, as `SERVICE_FILE` records it.

    Attributes:
        base_model: its base, by the service's name.
        lora_rank: of its adapter; 0 where every weight is trained.
        training_run: the id of the model that was trained.
        state: the tinker:// path of weights and optimizer; "" where only a sampler's are named.
        sampler: the tinker:// path of the weights to sample from.
        weights_sha256: of the weights, where the service tells it, else of `sampler`, which names them.
        origin: the state that the run began with; "" for the base model.
        address: of the service that holds it; "" for Tinker's cloud.
    """

    base_model: str
    lora_rank: int = 0
    training_run: str = ""
    state: str = ""
    sampler: str = ""
    weights_sha256: str = ""
    origin: str = ""
    address: str = ""

    def identity(self) -> str:
        """Which weights these are: their hash, else that of their name."""
        return self.weights_sha256 or name_sha256(self.sampler or self.base_model)


class Service:
    """One session at a training service."""

    def __init__(self, base_url: str = "") -> None:
        """Connect. `base_url` empty: that of $TINKER_BASE_URL, else Tinker's cloud.

        Raises:
            ConfigError: the client is not installed, there is no key, or the address is none.
            ServiceError: nothing answers there.
            RefusedError: the service refuses the key or this version of the client.
        """
        self.address = (base_url or os.environ.get("TINKER_BASE_URL", "")).rstrip("/")
        key = os.environ.get(KEY, "")
        if not key:
            raise ConfigError(f"a training service needs a key: put it into the environment variable {KEY}")
        os.environ.setdefault("TINKER_TELEMETRY", "0")  # nothing is sent that was not asked for
        try:
            import tinker
            from tinker.lib.base_url import resolve_base_url
            from tinker.lib.retryable_exception import RetryableException
        except ImportError:
            raise ConfigError(
                "a training service is reached through the `tinker` client, which is not installed: "
                "uv sync --extra tinker, or pip install 'grpo-gsm8k[tinker]'"
            ) from None
        self.sdk: Any = tinker
        self._gone: Any = RetryableException
        self.lost = ""  # why nothing more can be had from the service
        _knock(self.address or resolve_base_url())
        where = {"base_url": self.address or None, "api_key": key}
        self.rest = self.call("connecting", lambda: tinker.RestClient(**where))
        self.client: Any = tinker.ServiceClient(**where)  # opens its session at first use
        self._snapshots: dict[str, Any] = {}

    def close(self, end: Ends = "success") -> None:
        """End the session; the service keeps what it was told to keep."""
        if not self.lost:
            self.call("ending the session", lambda: self.client.close(end).result())

    # ---------------------------------------------------------------------------------------- what there is

    def base_model(self, wanted: str) -> BaseModel:
        """The service's model that is meant by `wanted`, a name there or a folder called so.

        The only one that it has is meant by nothing, and by a folder of another name, which has the tokenizer.

        Raises:
            ModelError: none is meant.
        """
        found = self.call("asking for the service's models", lambda: self.rest.get_server_capabilities().result())
        models = {m.model_name: BaseModel(m.model_name, m.max_context_length or 0) for m in found.supported_models}
        asked = wanted.rstrip("/")
        meant = [name for name in models if asked == name or asked.endswith(f"/{name.lstrip('/')}")]
        if meant:
            return models[max(meant, key=len)]
        if len(models) == 1 and (not wanted or Path(wanted).is_dir()):
            (only,) = models.values()
            if wanted:
                say(f"{self}: has one model, {only.name}; it is asked with the tokenizer of {wanted}")
            return only
        few = ", ".join(list(models)[:10]) or "none"
        raise ModelError(
            f"--model_id {wanted!r}: {self} has no model of this name; it has: {few}. Give one of them, or where there "
            "is only one, a folder with its tokenizer"
        )

    def checkpoint(self, path: str) -> Checkpoint:
        """What a tinker:// path names. Raises `ModelError` for what is no path, `RefusedError` for an unknown one."""
        parts = path.removeprefix(SERVICE).split("/")
        if not path.startswith(SERVICE) or len(parts) != 3 or not all(parts) or parts[1] not in PATHS:
            raise ModelError(f"{path}: must read tinker://RUN/weights/NAME or tinker://RUN/sampler_weights/NAME")
        info = self.call(f"asking for {path}", lambda: self.rest.get_weights_info_by_tinker_path(path).result())
        return Checkpoint(
            base_model=info.base_model,
            lora_rank=info.lora_rank or 0,
            training_run=parts[0],
            state=path if parts[1] == "weights" else "",
            sampler=path,
            weights_sha256=self.recorded_sha256(path),
            address=self.address,
        )

    def recorded_sha256(self, path: str) -> str:
        """The hash of a checkpoint's weights, where the service tells it; else "". Ours fills it in, see `HASH`."""
        run = path.removeprefix(SERVICE).split("/")[0]
        listed = self.call(f"listing the checkpoints of {run}", lambda: self.rest.list_checkpoints(run).result())
        for one in listed.checkpoints:
            if one.tinker_path == path:
                return str((one.user_metadata or {}).get(HASH, ""))
        return ""

    def delete(self, path: str) -> None:
        """Delete a checkpoint; one that is gone is no fault."""
        try:
            self.call(f"deleting {path}", lambda: self.rest.delete_checkpoint_from_tinker_path(path).result())
        except RefusedError as refusal:
            say(f"{refusal}; the local record of it is deleted")

    # ------------------------------------------------------------------------------------- training, sampling

    def create(self, base_model: str, rank: int, seed: int) -> Any:
        """A training client of a new adapter on the base's layers, its head left out, as a local run has it."""
        how = {"base_model": base_model, "rank": rank, "seed": seed, "train_unembed": False}
        make = self.client.create_lora_training_client
        return self.call(f"making a model on {base_model}", lambda: make(**how).result())

    def restore(self, path: str, optimizer: bool) -> Any:
        """A training client of a new model with the weights of a state, and the optimizer's where that is asked for."""
        make = (
            self.client.create_training_client_from_state_with_optimizer
            if optimizer
            else self.client.create_training_client_from_state
        )
        return self.call(f"loading {path}", lambda: make(path).result())

    def snapshot(self, training: Any, name: str) -> str:
        """Keep a training client's weights as they are to be sampled from while this session lasts; returns `name`."""
        what = f"saving weights of {training.model_id} for sampling"
        made = self.call(what, lambda: training.save_weights_and_get_sampling_client().result())
        self._snapshots = {name: made}  # nobody samples from an earlier one again
        return name

    def sampler(self, where: str) -> Any:
        """A sampling client of a snapshot, a tinker:// path, or a base model."""
        if where in self._snapshots:
            return self._snapshots[where]
        named = {"model_path": where} if where.startswith(SERVICE) else {"base_model": where}
        return self.call(f"sampling from {where}", lambda: self.client.create_sampling_client(**named).result())

    def datum(self, tokens: Sequence[int], inputs: Mapping[str, Any]) -> Any:
        """One row of a training request; `inputs` are one-dimensional numpy arrays."""
        return self.sdk.Datum(model_input=self.sdk.ModelInput.from_ints(list(tokens)), loss_fn_inputs=dict(inputs))

    def call(self, doing: str, request: Any) -> Any:
        """`request()`, with what the client raises as an error of ours.

        Raises:
            RefusedError, ServiceError: with `doing` and the service's own words.
        """
        if self.lost:
            raise ServiceError(self.lost)
        sdk = self.sdk
        try:
            return request()
        except sdk.RequestFailedError as fault:
            said = f"{self}: {doing}: {_line(fault)}"
            if fault.category == "user":
                raise RefusedError(said) from None
            raise ServiceError(f"{said}; checkpoints are good") from None
        except sdk.APIStatusError as fault:
            if 400 <= fault.status_code < 500:
                raise RefusedError(f"{self}: {doing}: {_detail(fault)}") from None
            self.lost = f"{self}: {doing}: status {fault.status_code}, again and again: {_detail(fault)}"
            raise ServiceError(self.lost) from None
        except sdk.APIConnectionError as fault:
            self.lost = f"{self}: {doing}: cannot be reached any more ({_line(fault)}); continue with --resume"
            raise ServiceError(self.lost) from None
        except sdk.APIError as fault:  # an answer that is not understood
            raise ServiceError(f"{self}: {doing}: {_line(fault)}") from None
        except sdk.TinkerError as fault:  # a key that can be none
            raise RefusedError(f"{self}: {doing}: {_line(fault)}") from None
        except (ValueError, self._gone) as fault:
            if isinstance(fault, ValueError) and not str(fault).startswith(UNFETCHED):
                raise
            self.lost = f"{self}: {doing}: the result is gone ({_line(fault)}); continue with --resume"
            raise ServiceError(self.lost) from None

    def __str__(self) -> str:
        return self.address or "Tinker"


@contextmanager
def connected(cfg: PromptConfig) -> Iterator[tuple[Service, Checkpoint]]:
    """A session at the config's service, and the model there that it means; ended with how the context ended."""
    service = Service(address_of(cfg))
    try:
        yield service, locate(cfg, service)
    except BaseException as fault:
        with suppress(GrpoError):  # the error on its way out is the one to be seen
            service.close("errored" if isinstance(fault, Exception) else "interrupted")
        raise
    service.close("success")


def locate(cfg: PromptConfig, service: Service) -> Checkpoint:
    """The model that `cfg.model_id` means at the service: a checkpoint there or one made there, or a base model."""
    record = Path(cfg.model_id) / SERVICE_FILE
    if record.is_file():
        return recorded(record.parent)
    if cfg.model_id.startswith(SERVICE):
        return service.checkpoint(cfg.model_id)
    base = service.base_model(cfg.model_id)
    return Checkpoint(base.name, address=service.address)


def recorded(folder: Path) -> Checkpoint:
    """What a checkpoint's folder says of where its weights are. Raises `CheckpointError` if it does not."""
    try:
        return Checkpoint(**read_json(folder / SERVICE_FILE))
    except TypeError as fault:
        raise CheckpointError(f"{folder / SERVICE_FILE}: does not say where the weights are: {fault}") from None


def address_of(cfg: PromptConfig) -> str:
    """The service's address: as configured, else where the checkpoint that the config names was made, else ""."""
    folder = Path(cfg.model_id)
    return cfg.base_url or (recorded(folder).address if (folder / SERVICE_FILE).is_file() else "")


def tokenizer_of(cfg: PromptConfig) -> str:
    """Where the tokenizer of a config's model is: of one named tinker://…, under its base model's name."""
    if cfg.tokenizer_id or not cfg.model_id.startswith(SERVICE):
        return cfg.tokenizer_id or cfg.model_id
    return Service(cfg.base_url).checkpoint(cfg.model_id).base_model


def name_sha256(name: str) -> str:
    """What stands for the hash of weights whose service tells none: the hash of their name there."""
    return hashlib.sha256(name.encode()).hexdigest()


def _knock(address: str) -> None:
    """Raise unless something listens at the address. Behind a proxy nobody can tell."""
    parts = urlsplit(address)
    if os.environ.get(f"{parts.scheme}_proxy".upper()) or os.environ.get(f"{parts.scheme}_proxy"):
        return
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (KeyError, ValueError):
        raise ConfigError(f"--base_url {address}: must read http://HOST:PORT or https://HOST") from None
    try:
        socket.create_connection((parts.hostname or "", port), PATIENCE_S).close()
    except OSError as fault:
        raise ServiceError(
            f"{address}: no training service answers there ({fault.strerror or fault}); start one with `grpo-gsm8k "
            "serve`, or give another --base_url"
        ) from None


def _detail(fault: Any) -> str:
    """What the service says of an HTTP status."""
    body = fault.body
    return " ".join(str(body["detail"]).split()) if isinstance(body, dict) and "detail" in body else _line(fault)


def _line(fault: BaseException) -> str:
    return " ".join(str(fault).split())[:500] or type(fault).__name__
