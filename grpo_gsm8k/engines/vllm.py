"""vLLM as a sampler, inside the engine process. The only importer of vllm.

Token ids in, token ids and log-probabilities out. Conventions are those of `engines.hf`: log-softmax(logits /
temperature) of every sampled token. One differs: with top_p < 1 vLLM reports them after the truncation.

Each sample is a request with its own seed, so what it draws does not depend on its neighbours' seeds; prefix
caching reads a prompt once for all its samples. The engine starts with dummy weights: what it samples from can
only have come through a hand-over, and one that did not arrive shows in the first probe. With LoRA it loads the base
model itself, and is handed adapters.
"""

from __future__ import annotations

import base64
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from grpo_gsm8k.config import PolicyConfig
from grpo_gsm8k.datatypes import Completion, FinishReason, Request, SamplingParams, WeightsRef
from grpo_gsm8k.engines import handover
from grpo_gsm8k.engines.channel import Pulse
from grpo_gsm8k.engines.handover import HandoverError
from grpo_gsm8k.errors import EngineError, ModelError
from grpo_gsm8k.tasks.render import Renderer
from grpo_gsm8k.trainer import adapter, architecture, costs

GPU_ROWS = 1024  # requests at once: vLLM's own default on an H100
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is in a process of its own already: this one
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # a GPU would take the second; what was tested is the first
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # its draws do not follow a request's seed
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; read by the CPU build only
}


class VLLMSampler:
    """Samples as `datatypes.Sampler` does, with weights from files."""

    def __init__(self, cfg: PolicyConfig, renderer: Renderer, pulse: Pulse, sleep_when_idle: bool = False) -> None:
        """Start the engine on the devices that this process sees.

        Args:
            pulse: called after every step of the engine, so that a hang is noticed.
            sleep_when_idle: sleep between calls, because the learner is on the same GPU.
        """
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        native = {"weight_transfer_config": {"backend": cfg.weight_transfer}} if cfg.weight_transfer != "file" else {}
        if cfg.weight_transfer == "ipc":
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # its handles are pickled, by our own parent
        if cfg.deterministic and cfg.device != "cpu":
            os.environ["VLLM_BATCH_INVARIANT"] = "1"
        from vllm import LLM

        self.renderer, self.pulse, self.sleep_when_idle, self.version = renderer, pulse, sleep_when_idle, -1
        self.held: WeightsRef | None = None
        self.busy_s = 0.0
        on_cpu = cfg.device == "cpu"
        held = adapter.in_folder(cfg.model_id)
        self._adapter: Any = held or (adapter.settings(cfg) if cfg.lora_rank else None)
        self._adapters, self._request = 0, None  # how many were loaded, and the one that is sampled with
        lora = {"enable_lora": True, "max_lora_rank": _rank_for(self._adapter.r)} if self._adapter else {}
        try:
            self.llm = LLM(
                held.base_model_name_or_path if held else cfg.model_id,
                revision=(held.revision if held else cfg.revision) or None,
                download_dir=cfg.cache_dir or None,
                dtype=cfg.dtype,
                load_format="auto" if self._adapter else "dummy",
                trust_remote_code=False,
                seed=0,
                max_model_len=max_model_len(cfg, held),
                max_num_seqs=cfg.sample_rows if on_cpu else max(cfg.sample_rows, GPU_ROWS),
                tensor_parallel_size=cfg.tp_size,
                gpu_memory_utilization=cfg.gpu_mem_util or costs.ENGINE_MOST,
                enforce_eager=on_cpu,
                # A prompt cut into chunks rewinds its request's generator, which a CPU generator cannot (vLLM 0.32).
                enable_chunked_prefill=not on_cpu,
                enable_prefix_caching=True,
                enable_sleep_mode=sleep_when_idle,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",  # no sampling defaults from the model's folder
                worker_extension_cls=f"{__name__}.Weights",
                **native,
                **lora,
            )
        except ValueError as fault:  # vLLM's own word for a model or a setting that it does not take
            raise ModelError(
                f"vLLM cannot run {cfg.model_id}: {' '.join(str(fault).split())[:500]}; --engine hf may"
            ) from None
        self.context: int = self.llm.llm_engine.model_config.max_model_len
        ends = (self.llm.llm_engine.model_config.try_get_generation_config() or {}).get("eos_token_id")
        self.stop_ids = renderer.stop_ids | set([ends] if isinstance(ends, int) else ends or [])
        self._asleep = False
        self._rest()

    def load(self, ref: WeightsRef, tensors: Any = None) -> None:
        """Replace the weights by those of a file, and forget what was cached under the old ones; free for those held.

        Raises:
            HandoverError: the file is damaged or gone; nothing is changed.
        """
        if ref.same_as(self.held):
            return
        self._wake()
        if self._adapter:
            handover.read(ref)  # a small file, which vLLM reads itself
            self._replace_adapter(ref.where)
        else:
            self._replace_weights(ref)
        self.hold(ref.version)
        self.held = ref

    def _replace_weights(self, ref: WeightsRef) -> None:
        """Every worker reads the file once, checks its hash, and only then touches its model."""
        refusals = self.llm.collective_rpc("replace_weights", args=(str(ref.where), ref.version, ref.sha256))
        if all(refusals):
            raise HandoverError(refusals[0])
        if any(refusals):  # some workers have changed their model: no answer of theirs may be used
            raise EngineError(f"the workers of vLLM read different weights: {next(filter(None, refusals))}")

    def _replace_adapter(self, path: Path | str | None) -> None:
        """Another adapter in the place of the one before, under a number that was never used."""
        from vllm.lora.request import LoRARequest

        self._adapters += 1
        with tempfile.TemporaryDirectory() as folder:
            self._adapter.save_pretrained(folder)
            (Path(folder) / adapter.WEIGHTS_FILE).symlink_to(str(path))
            request = LoRARequest(f"adapter-{self._adapters}", self._adapters, folder)
            if self._request:
                self.llm.llm_engine.remove_lora(self._request.lora_int_id)
            if not self.llm.llm_engine.add_lora(request):
                raise EngineError("vLLM did not take the adapter")
        self._request = request

    def transfer(self, method: str, payload: Any = None) -> None:
        """One call of vLLM's own weight transfer, whose other end is `NativeTransfer`."""
        self._wake()
        self.llm.collective_rpc(method, args=() if payload is None else (payload,))

    def hold(self, version: int) -> None:
        """New weights are in: nothing that was computed with the old ones may be used."""
        if not self.llm.reset_prefix_cache():  # vLLM does not do it by itself
            raise EngineError("vLLM kept its prefix cache of the old weights")
        self.version = version

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        """A completion for each seed of each request, in order."""
        began = time.monotonic()
        asked = [(request.token_ids, seed) for request in requests for seed in request.seeds]
        outputs = self._answered([(ids, self._params(params, ids, seed)) for ids, seed in asked])
        drawn = iter([self._completion(out.outputs[0], seed) for out, (_, seed) in zip(outputs, asked, strict=True)])
        self.busy_s += time.monotonic() - began
        return [[next(drawn) for _ in request.seeds] for request in requests]

    def score(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probability of each id of each row behind those before it, at temperature 1; 0 for a row's first."""
        from vllm import SamplingParams as VLLMParams
        from vllm.sampling_params import RequestOutputKind

        how = {"prompt_logprobs": 0, "max_tokens": 1, "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
        read = [out.prompt_logprobs for out in self._answered([(ids, VLLMParams(**how)) for ids in rows])]
        return [
            [0.0 if known is None else known[i].logprob for known, i in zip(found, ids, strict=True)]
            for found, ids in zip(read, rows, strict=True)
        ]

    def _answered(self, asked: Sequence[tuple[Sequence[int], Any]]) -> list[Any]:
        """vLLM's output for each prompt and its parameters, in order."""
        self._wake()
        engine, outputs = self.llm.llm_engine, dict[str, Any]()
        for number, (ids, params) in enumerate(asked):
            engine.add_request(str(number), {"prompt_token_ids": list(ids)}, params, lora_request=self._request)
        while engine.has_unfinished_requests():
            outputs |= {out.request_id: out for out in engine.step() if out.finished}
            self.pulse()
        self._rest()
        return [outputs[str(number)] for number in range(len(asked))]

    def _params(self, params: SamplingParams, token_ids: Sequence[int], seed: int) -> Any:
        from vllm import SamplingParams as VLLMParams
        from vllm.sampling_params import RequestOutputKind

        return VLLMParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            max_tokens=min(params.max_new_tokens, self.context - len(token_ids)),
            seed=seed,
            logprobs=0,  # of the sampled token alone
            stop=list(params.stop),
            include_stop_str_in_output=True,
            stop_token_ids=sorted(self.stop_ids),
            detokenize=bool(params.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, output: Any, seed: int) -> Completion:
        ids = tuple(output.token_ids)
        reasons: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
        return Completion(
            token_ids=ids,
            logprobs=tuple(step[i].logprob for step, i in zip(output.logprobs, ids, strict=True)),
            text=self.renderer.decode(ids),
            finish_reason=reasons[output.finish_reason],
            policy_version=self.version,
            seed=seed,
        )

    def _wake(self) -> None:
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False

    def _rest(self) -> None:
        if self.sleep_when_idle:
            self.llm.sleep(level=1)
            self._asleep = True


def max_model_len(cfg: PolicyConfig, held: Any = None) -> int | None:
    """vLLM's `max_model_len`: as configured, None for the model's own; never beyond what long RoPE turns alike.

    With more than the original context vLLM takes the factors of long rows for all, the learner those of short ones.

    Args:
        held: the adapter's config, where `cfg.model_id` is one.
    """
    from transformers import AutoConfig

    named, revision = (held.base_model_name_or_path, held.revision) if held else (cfg.model_id, cfg.revision)
    config = AutoConfig.from_pretrained(named, revision=revision or None, cache_dir=cfg.cache_dir or None)
    limit = architecture.rope_limit(config)
    return min(cfg.max_model_len or limit, limit) if limit else cfg.max_model_len or None


def _rank_for(rank: int) -> int:
    """The least rank that vLLM has room sizes for."""
    from vllm.config.lora import MaxLoRARanks

    sizes: tuple[int, ...] = get_args(MaxLoRARanks)
    if rank > max(sizes):
        raise ModelError(f"vLLM takes LoRA adapters up to rank {max(sizes)}, this one has {rank}")
    return min(size for size in sizes if size >= rank)


class NativeTransfer:
    """The learner's end of vLLM's own weight transfer: GPU to GPU, without a file (vllm.distributed.weight_transfer).

    It is a collective: an engine that dies in it leaves the other end waiting, so `ProcessSampler` runs it under a
    deadline. The probe proves what arrived, as for files; there is no hash of it. Not run on GPUs yet.
    """

    def __init__(self, kind: str, model: Any, workers: int, call: Callable[..., Any]) -> None:
        """Connect to an engine.

        Args:
            kind: "nccl" or "ipc".
            model: the learner's; its parameters are what is sent.
            workers: the engine's ranks.
            call: `call("transfer", method=…, payload=…)` reaches `VLLMSampler.transfer`.
        """
        from vllm.distributed.weight_transfer.base import ModuleSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        self._call = call
        info = (
            NCCLTrainerInitInfo(rank=0, master_address="127.0.0.1", master_port=get_open_port(), world_size=1 + workers)
            if kind == "nccl"
            else IPCTrainerInitInfo(rank=0, packed=True)
        )
        self._trainer = WeightTransferTrainerFactory.trainer_init(info, client=self, source=ModuleSource(model))

    def send(self) -> None:
        """All weights, once."""
        self._trainer.send_weights()

    # What vLLM's trainer end asks of its client:

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Both ends meet."""
        self._call("transfer", method="init_weight_transfer_engine", payload=init_info)

    def start_weight_update(self) -> None:
        """The engine expects weights."""
        self._call("transfer", method="start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The engine receives, while the trainer sends."""
        if handles := update_info.pop("ipc_handles", None):  # tuples, which JSON does not know
            update_info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        self._call("transfer", method="update_weights", payload=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The engine makes them its own."""
        self._call("transfer", method="finish_weight_update")

    def shutdown_weight_transfer_engine(self) -> None:
        """The engine ends with its process."""


class Weights:
    """What vLLM's workers gain: see `worker_extension_cls`."""

    def replace_weights(self, path: str, version: int, sha256: str) -> str:
        """New weights from a file, under the names of the checkpoint format; "", or why the file was refused."""
        try:
            tensors = handover.read(WeightsRef(version, sha256, Path(path)))
        except HandoverError as fault:
            return str(fault)
        self.reload_weights(weights_iterator=iter(tensors.items()))  # type: ignore[attr-defined]
        self.repack_tied_head()
        return ""

    def repack_tied_head(self) -> None:
        """On a CPU the head is packed when the model is loaded; a tied one keeps the old weights on a reload."""
        from vllm.platforms import current_platform

        head = getattr(self.get_model(), "lm_head", None)  # type: ignore[attr-defined]
        if current_platform.is_cpu() and head is not None:
            head.quant_method.process_weights_after_loading(head)
