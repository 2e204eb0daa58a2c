"""Drives a server with the real `tinker` SDK, any version from 0.16 on: `python sdk_checks.py URL MODEL_NAME`.

Runs in the SDK's own environment and imports nothing of this project. Prints one JSON object: what was found, for a
test to compare between versions. An assertion that fails is a failed check.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
import urllib.request
from typing import Any

import numpy as np

URL, NAME = sys.argv[1:3]
os.environ.update(TINKER_BASE_URL=URL, TINKER_TELEMETRY="0", HF_HUB_OFFLINE="1")
VERSION = tuple(map(int, importlib.metadata.version("tinker").split(".")[:2]))

import tinker  # noqa: E402
from tinker import types  # noqa: E402

IDS = [5, 9, 14, 7, 22, 31, 8, 40, 12, 6, 77, 3]
FOUND: dict[str, Any] = {}


def of(x: Any) -> Any:
    """The value of a future; older versions return some things at once."""
    return x.result() if hasattr(x, "result") else x


def prompt(ids: list[int]) -> Any:
    return types.ModelInput.from_ints(ids)


def row(ids: list[int] = IDS, **inputs: Any) -> Any:
    given = {name: np.asarray(values, dtype=np.float32) for name, values in inputs.items()}
    return types.Datum(model_input=prompt(ids[:-1]), loss_fn_inputs={"target_tokens": ids[1:], **given})


def logprobs(output: Any) -> list[Any]:
    return [np.array(o["logprobs"].to_numpy(), dtype=np.float64) for o in output.loss_fn_outputs]


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    assert np.allclose(a, b, rtol=tolerance, atol=tolerance), (a, b)


def fails(call: Any, *words: str, within: float = 20.0) -> str:
    """The message of what must fail at once, in one line."""
    began = time.time()
    try:
        call()
    except Exception as fault:  # noqa: BLE001  (each version has its own)
        took, text = time.time() - began, str(fault)
        assert took < within, (took, text)
        assert all(any(one in text for one in word.split("|")) for word in words), (words, text)
        return text
    raise AssertionError(f"did not fail: {words}")


service = tinker.ServiceClient(user_metadata={"who": "checks"})


def trainer(**more: Any) -> Any:
    return of(service.create_lora_training_client(base_model=NAME, **{"rank": 4, "seed": 7, **more}))


def step(client: Any, lr: float = 3e-2, **adam: Any) -> Any:
    return client.optim_step(types.AdamParams(learning_rate=lr, **adam)).result()


# ------------------------------------------------------------------------------------------------------ training

models = [m.model_name for m in service.get_server_capabilities().supported_models]
assert models == [NAME], models
client = trainer(user_metadata={"renderer": "x"})
info = client.get_info()
assert (info.is_lora, info.lora_rank, info.model_name) == (True, 4, NAME), info
losses = []
for _ in range(8):
    first = client.forward_backward([row(), row(IDS[2:])], "cross_entropy")
    second = client.optim_step(types.AdamParams(learning_rate=3e-2))
    losses.append(first.result().metrics["loss:sum"])
    second.result()
assert losses[-1] < 0.6 * losses[0], losses
FOUND["losses"] = losses

many = [row(IDS[k % 5 :]) for k in range(1500)]  # more than a chunk
whole = client.forward_backward(many, "cross_entropy").result()
assert len(whole.loss_fn_outputs) == 1500
close(whole.metrics["loss:sum"], -sum(x.sum() for x in logprobs(whole)), 1e-4)
step(client, 1e-3)

q = [
    logp + d
    for logp, d in zip(
        logprobs(client.forward([row(), row(IDS[2:])], "cross_entropy").result()), (0.2, -0.3), strict=True
    )
]
a = [np.linspace(-1, 1.5, len(x)) for x in q]
FORMULAS: dict[str, tuple[Any, Any]] = {
    "importance_sampling": (lambda logp, q, a: -np.exp(logp - q) * a, None),
    "ppo": (lambda logp, q, a: -np.minimum(np.exp(logp - q) * a, np.clip(np.exp(logp - q), 0.8, 1.2) * a), None),
    "cispo": (
        lambda logp, q, a: -np.clip(np.exp(logp - q), 0.9, 1.05) * logp * a,
        {"clip_low_threshold": 0.9, "clip_high_threshold": 1.05},
    ),
    "dro": (lambda logp, q, a: -(logp * a - 0.05 / 2 * (logp - q) ** 2), {"beta": 0.05}),
}
for name, (formula, config) in FORMULAS.items():
    data = [row(IDS, logprobs=q[0], advantages=a[0]), row(IDS[2:], logprobs=q[1], advantages=a[1])]
    out = client.forward_backward(data, name, config).result()
    expected = sum(
        formula(logp, np.float32(x), np.float32(y)).sum() for logp, x, y in zip(logprobs(out), q, a, strict=True)
    )
    close(out.metrics["loss:sum"], expected)
    FOUND[name] = out.metrics["loss:sum"]
if VERSION >= (0, 34):
    data = [row(IDS, logprobs=q[0], advantages=a[0], sequence_ratio_mask=np.ones(len(q[0])))]
    out = trainer().forward_backward(data, "gspo").result()
    logp = logprobs(out)[0]
    s = np.exp((logp - np.float32(q[0])).mean())
    close(out.metrics["loss:sum"], -np.minimum(s * np.float32(a[0]), np.clip(s, 0.8, 1.2) * np.float32(a[0])).sum())
FOUND["grad_norm"] = step(client, 1e-3, grad_clip_norm=1.0, weight_decay=0.01, beta2=0.99).metrics["grad_norm"]

twin = [trainer(), trainer()]  # gradients add up until a step, and forward leaves none
twin[0].forward_backward([row(), row(IDS[2:])], "cross_entropy").result()
for k in (0, 2):
    twin[1].forward([row()], "cross_entropy").result()
    twin[1].forward_backward([row(IDS[k:])], "cross_entropy").result()
close(step(twin[0]).metrics["grad_norm"], step(twin[1]).metrics["grad_norm"])
soft = np.stack([IDS[1:], IDS[:-1]], 1), np.stack([np.full(11, 0.7), np.full(11, -0.3)], 1).astype(np.float32)
tensors = {name: types.TensorData.from_numpy(x) for name, x in zip(("target_tokens", "weights"), soft, strict=True)}
datum = types.Datum(model_input=prompt(IDS[:-1]), loss_fn_inputs=tensors)
out = trainer().forward_backward([datum], "cross_entropy").result()
assert logprobs(out)[0].shape == (11, 2)
close(out.metrics["loss:sum"], -(logprobs(out)[0] * soft[1]).sum())

# ------------------------------------------------------------------------------------------------------ resuming

path = client.save_state("mid").result().path
assert path == f"tinker://{client.model_id}/weights/mid", path


def go_on(which: Any) -> list[float]:
    found = []
    for _ in range(3):
        found.append(which.forward_backward([row()], "cross_entropy").result().metrics["loss:sum"])
        step(which)
    return found


expected = go_on(client)
FOUND["resumed"] = expected
assert go_on(of(service.create_training_client_from_state_with_optimizer(path))) == expected
if VERSION < (0, 38):  # deprecated from then on
    assert of(client.load_state_with_optimizer(path)).path == path
    assert go_on(client) == expected
fresh = go_on(of(service.create_training_client_from_state(path)))
assert fresh[0] == expected[0] and fresh[2] != expected[2], (fresh, expected)
fails(lambda: client.save_state("mid").result(), "exists already")
fails(lambda: of(service.create_training_client_from_state(path[:-1] + "x")), "no checkpoint")

# ------------------------------------------------------------------------------------------------------ sampling

named = client.save_weights_for_sampler("s").result().path
unnamed = of(client.save_weights_and_get_sampling_client(*(["t"] if VERSION < (0, 17) else [])))
sampler = of(service.create_sampling_client(model_path=named))
base = of(service.create_sampling_client(base_model=NAME))
params = types.SamplingParams(max_tokens=7, seed=5, temperature=1.0, stop=[])
one = sampler.sample(prompt=prompt(IDS[:4]), num_samples=3, sampling_params=params).result()
two = unnamed.sample(prompt=prompt(IDS[:4]), num_samples=3, sampling_params=params).result()
assert [s.tokens for s in one.sequences] == [s.tokens for s in two.sequences]
assert len({tuple(s.tokens) for s in one.sequences}) > 1
sequence = one.sequences[0]
row_of_it = IDS[:4] + list(sequence.tokens)
current = logprobs(client.forward([row(row_of_it)], "cross_entropy").result())[0]
close(sequence.logprobs, current[3:], 5e-5)
scored = sampler.compute_logprobs(prompt(row_of_it)).result()
assert scored[0] is None
close(scored[1:], current, 5e-5)
FOUND["sample"] = [list(s.tokens) for s in one.sequences]
FOUND["base"] = list(
    base.sample(prompt=prompt(IDS[:4]), num_samples=1, sampling_params=params).result().sequences[0].tokens
)
stop = types.SamplingParams(max_tokens=40, seed=5, stop=[sequence.tokens[2]])
stopped = sampler.sample(prompt=prompt(IDS[:4]), num_samples=1, sampling_params=stop).result().sequences[0]
until = list(sequence.tokens).index(sequence.tokens[2]) + 1
assert stopped.stop_reason == "stop" and list(stopped.tokens) == list(sequence.tokens)[:until]
likeliest = sampler.sample(
    prompt=prompt(IDS), num_samples=1, sampling_params=params, include_prompt_logprobs=True, topk_prompt_logprobs=2
).result()
assert len(likeliest.prompt_logprobs) == len(IDS) == len(likeliest.topk_prompt_logprobs)
assert not likeliest.topk_prompt_logprobs[0] and len(likeliest.topk_prompt_logprobs[1]) == 2
futures = [
    sampler.sample(
        prompt=prompt(IDS[: 2 + k % 6]), num_samples=2, sampling_params=types.SamplingParams(max_tokens=5, seed=k)
    )
    for k in range(40)
]
FOUND["many"] = [[list(s.tokens) for s in f.result().sequences] for f in futures]
again = [
    sampler.sample(
        prompt=prompt(IDS[: 2 + k % 6]), num_samples=2, sampling_params=types.SamplingParams(max_tokens=5, seed=k)
    ).result()
    for k in range(40)
]
assert [[list(s.tokens) for s in r.sequences] for r in again] == FOUND["many"]
assert sampler.get_base_model() == NAME
snapshot = sampler.compute_logprobs(prompt(IDS)).result()
client.forward_backward([row()], "cross_entropy").result()
step(client)
assert sampler.compute_logprobs(prompt(IDS)).result() == snapshot != base.compute_logprobs(prompt(IDS)).result()
greedy = types.SamplingParams(max_tokens=6, temperature=0.0, stop=[])
narrow = types.SamplingParams(max_tokens=6, temperature=1.0, top_k=1, stop=[])
both = [
    base.sample(prompt=prompt(IDS), num_samples=1, sampling_params=p).result().sequences[0] for p in (greedy, narrow)
]
assert list(both[0].tokens) == list(both[1].tokens)
ends = base.sample(prompt=prompt(IDS), num_samples=2, sampling_params=types.SamplingParams(seed=1)).result()
assert all(s.stop_reason == "stop" or len(s.tokens) > 100 for s in ends.sequences)  # max_tokens may be absent
if VERSION >= (0, 26):
    import pickle

    copied = pickle.loads(pickle.dumps(base)).sample(prompt=prompt(IDS), num_samples=1, sampling_params=greedy).result()
    assert list(copied.sequences[0].tokens) == list(both[0].tokens)

# ------------------------------------------------------------------------------------------------------ lists

rest = service.create_rest_client()
run = of(rest.get_training_run(client.model_id))
assert (run.base_model, run.is_lora, run.lora_rank, run.user_metadata) == (NAME, True, 4, {"renderer": "x"}), run
assert run.last_checkpoint.tinker_path == path
assert of(rest.get_training_run_by_tinker_path(named)).training_run_id == client.model_id
assert client.model_id in [r.training_run_id for r in of(rest.list_training_runs(limit=50)).training_runs]
paths = {c.tinker_path for c in of(rest.list_checkpoints(client.model_id)).checkpoints}
assert {path, named} <= paths, paths
assert of(rest.list_user_checkpoints(limit=50)).checkpoints
weights = of(rest.get_weights_info_by_tinker_path(path))
assert (weights.base_model, weights.is_lora, weights.lora_rank) == (NAME, True, 4)
of(rest.publish_checkpoint_from_tinker_path(named))
of(rest.unpublish_checkpoint_from_tinker_path(named))
of(rest.set_checkpoint_ttl_from_tinker_path(named, 3600))
assert next(c for c in of(rest.list_checkpoints(client.model_id)).checkpoints if c.tinker_path == named).expires_at
of(rest.set_checkpoint_ttl_from_tinker_path(named, None))
session = client.model_id.split(":")[0]
assert session in of(rest.list_sessions(limit=100)).sessions
assert client.model_id in of(rest.get_session(session)).training_run_ids
assert of(rest.get_sampler(of(rest.get_session(session)).sampler_ids[0])).base_model == NAME
if VERSION < (0, 36):
    url = of(rest.get_checkpoint_archive_url_from_tinker_path(named)).url
    assert urllib.request.urlopen(url).read(20).startswith(b"adapter_config.json")
if VERSION >= (0, 28):
    external = client.save_weights_external("out").result().path
    links = of(rest.get_external_weights_urls(external)).urls
    assert set(links) == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(urllib.request.urlopen(links["adapter_config.json"]).read())["r"] == 4
of(rest.delete_checkpoint_from_tinker_path(named))
fails(lambda: of(rest.delete_checkpoint_from_tinker_path(named)), "no checkpoint")
fails(lambda: of(service.create_sampling_client(model_path=named)), "no checkpoint")

# ------------------------------------------------------------------------------------------------------ mistakes

fails(lambda: of(service.create_lora_training_client(base_model="Nobody/Nothing", rank=4)), "is not served here")
fails(lambda: of(service.create_sampling_client(base_model="Nobody/Nothing")), "no model")
fails(lambda: client.forward_backward([row([999999, 2, 3])], "cross_entropy").result(), "not in the vocabulary")
fails(lambda: client.forward_backward([row(logprobs=q[0])], "ppo").result(), "needs advantages")
fails(lambda: client.forward_backward([row(weights=np.ones(3))], "cross_entropy").result(), "shape")
fails(
    lambda: client.forward_backward([row(logprobs=q[0], advantages=a[0])], "ppo", {"nonsense": 1.0}).result(),
    "nonsense",
)
fails(lambda: client.optim_step(types.AdamParams(learning_rate=-1.0)).result(), "learning_rate")
fails(
    lambda: base.sample(prompt=prompt([999999]), num_samples=1, sampling_params=params).result(),
    "not in the vocabulary",
)
fails(lambda: base.sample(prompt=prompt([1] * 5000), num_samples=1, sampling_params=params).result(), "context")
if VERSION >= (0, 25):
    fails(
        lambda: client.forward_backward([row(weights=np.full(len(IDS) - 1, np.nan))], "cross_entropy").result(), "NaN"
    )
    fails(lambda: client.forward_backward([row()], "stable_reinforce").result(), "stable_reinforce")


def numbered(number: int) -> Any:
    """A training client whose next request bears this seq_id."""
    made = trainer()
    made._request_id_counter = made._turn_counter = number - 1
    return made


for negative in (-3, 0):
    fails(lambda n=negative: numbered(n).optim_step(types.AdamParams()).result(), "seq_id", "at least 1|or equal to 1")
gap = numbered(2)
hanging = [gap.forward_backward([row()], "cross_entropy"), gap.optim_step(types.AdamParams())]
for future in hanging:
    fails(future.result, "seq_id 1 did not arrive in time", within=40)
assert np.isfinite(gap.forward([row()], "cross_entropy").result().metrics["loss:sum"])
reused = trainer()
reused.forward([row()], "cross_entropy").result()
reused._request_id_counter = reused._turn_counter = 0
fails(lambda: reused.optim_step(types.AdamParams()).result(), "seq_id 1 was given to another request")
assert np.isfinite(client.forward([row()], "cross_entropy").result().metrics["loss:sum"])  # it lives

os.environ["TINKER_API_KEY"] = "tml-wrong"
fails(lambda: of(tinker.ServiceClient().create_lora_training_client(base_model=NAME, rank=4)), "key")
print(json.dumps(FOUND))
sys.stdout.flush()
os._exit(0)
