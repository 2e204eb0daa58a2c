"""The training service over the Tinker wire: what it trains, samples, keeps, and refuses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from grpo_gsm8k.serve import codec
from tests.serve_tools import HEADERS, NAME, Client, Failed, datum, in_process, loss_input, tensor

IDS = [5, 9, 14, 7, 22, 31, 8, 40, 12, 6]


@pytest.fixture(scope="module")
def client(tiny, tmp_path_factory):
    with in_process(tiny.model, tmp_path_factory.mktemp("serve")) as made:
        yield made


def logprobs_of(result: Any) -> list[Any]:
    return [np.array(o["logprobs"]["data"]).reshape(o["logprobs"]["shape"]) for o in result["loss_fn_outputs"]]


# ------------------------------------------------------------------------------------------------- training


def test_the_loss_falls(client: Client) -> None:
    model = client.model()
    losses = []
    for _ in range(6):
        losses.append(client.learn(model, [datum(IDS)])["metrics"]["loss:sum"])
        assert client.step(model, lr=5e-2)["metrics"]["grad_norm"] > 0
    assert losses[-1] < 0.6 * losses[0]


def test_a_new_adapter_leaves_the_base_as_it_is(client: Client) -> None:
    session = client.session()
    found = logprobs_of(client.forward(client.model(session), [datum(IDS)]))[0]
    base = client.sample(client.sampler(session), IDS, prompt_logprobs=True, max_tokens=1)["prompt_logprobs"]
    assert base[0] is None
    assert found == pytest.approx(base[1:], abs=1e-5)


def numpy_loss(name: str, logp: Any, x: dict[str, Any], config: dict[str, float]) -> float:
    """The losses of the wire, written a second time."""
    if name == "cross_entropy":
        return float(-(x["weights"] * logp).sum())
    q, a, low, high = x["logprobs"], x["advantages"], *config.get("clip", (0.8, 1.2))
    ratio = np.exp(logp - q)
    if name == "importance_sampling":
        return float(-(ratio * a).sum())
    if name == "ppo":
        return float(-np.minimum(ratio * a, np.clip(ratio, low, high) * a).sum())
    if name == "cispo":
        return float(-(np.clip(ratio, *config.get("clip", (0.0, 4.0))) * logp * a).sum())
    if name == "dro":
        return float(-(logp * a - config.get("beta", 0.05) / 2 * (logp - q) ** 2).sum())
    mask = x["sequence_ratio_mask"]
    s = np.exp(((logp - q) * mask).sum() / mask.sum())
    return float(-np.minimum(s * a, np.clip(s, low, high) * a).sum())


@pytest.mark.parametrize(
    ("name", "sent", "config"),
    [
        ("cross_entropy", None, {}),
        ("importance_sampling", {}, {}),
        ("ppo", None, {}),
        ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 3.0}, {"clip": (0.5, 3.0)}),
        ("cispo", None, {}),
        ("cispo", {"clip_high_threshold": 1.1}, {"clip": (0.0, 1.1)}),
        ("dro", {"beta": 0.3}, {"beta": 0.3}),
        ("gspo", None, {}),
    ],
)
def test_losses_as_numpy_has_them(client: Client, name: str, sent: Any, config: Any) -> None:
    rng = np.random.default_rng(3)
    rows, model = [], client.model()
    logp = logprobs_of(client.forward(model, [datum(IDS), datum(IDS[3:])]))
    for length in (9, 6):
        inputs: dict[str, Any] = {"logprobs": logp[len(rows)] + rng.normal(0, 0.4, length)}
        inputs["advantages"] = rng.normal(0, 1, length)
        if name == "cross_entropy":
            inputs = {"weights": rng.normal(0, 2, length)}
        elif name == "gspo":
            inputs["sequence_ratio_mask"] = (rng.random(length) < 0.7).astype(float)
        rows.append({k: v.astype(np.float32) for k, v in inputs.items()})
    data = [datum(IDS, **rows[0]), datum(IDS[3:], **rows[1])]
    found = client.learn(model, data, name, sent)
    logp = logprobs_of(found)
    expected = sum(numpy_loss(name, logp[i].astype(np.float64), rows[i], config) for i in range(2))
    assert found["metrics"]["loss:sum"] == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"])
@pytest.mark.parametrize("unembed", [True, False])
def test_the_gradient_is_autograds(client: Client, name: str, unembed: bool) -> None:
    """Held against the model's own logits and autograd, with every weight of the adapter away from 0."""
    model = client.model(rank=2, train_unembed=unembed)
    client.forward(model, [datum(IDS)])
    trained = client.service.work.models[model]  # type: ignore[attr-defined]
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for weight in trained.parameters.values():
            weight += torch.from_numpy(rng.normal(0, 0.1, weight.shape)).float()
    logp = logprobs_of(client.forward(model, [datum(IDS)]))[0]
    inputs: dict[str, Any] = {"logprobs": logp + rng.normal(0, 0.3, 9), "advantages": rng.normal(0, 1, 9)}
    inputs["advantages"][:3] = 0
    if name == "cross_entropy":
        inputs = {"weights": np.array([0, 0, 1, -2, 0, 0.5, 3, 1, 1.0])}
    if name == "gspo":
        inputs["sequence_ratio_mask"] = np.array([0, 0, 0, 1, 1, 1, 0, 1, 1.0])
    x = {key: torch.from_numpy(value).float() for key, value in inputs.items()}
    logits = trained.model()(input_ids=torch.tensor([IDS[:-1]])).logits[0]
    own = logits.log_softmax(-1)[torch.arange(9), torch.tensor(IDS[1:])]
    wanted = torch.autograd.grad(torch_loss(name, own, x), list(trained.parameters.values()))
    client.learn(model, [datum(IDS, **inputs)], name)
    for weight, expected in zip(trained.parameters.values(), wanted, strict=True):
        assert weight.grad.numpy() == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-4)


def torch_loss(name: str, logp: Any, x: dict[str, Any]) -> Any:
    """The losses once more, for autograd; a stop-gradient is `detach`."""
    if name == "cross_entropy":
        return -(x["weights"] * logp).sum()
    q, a, ratio = x["logprobs"], x["advantages"], (logp - x["logprobs"]).exp()
    if name == "gspo":
        mean = ((logp.detach() - q) * x["sequence_ratio_mask"]).sum() / x["sequence_ratio_mask"].sum()
        ratio = mean.exp() * torch.exp(logp - logp.detach())
    if name in ("ppo", "gspo"):
        return -torch.min(ratio * a, ratio.clip(0.8, 1.2) * a).sum()
    if name == "cispo":
        return -(ratio.clip(0, 4).detach() * logp * a).sum()
    return -(ratio * a).sum() if name == "importance_sampling" else -(logp * a - 0.025 * (logp - q) ** 2).sum()


def test_chunks_add_up_to_the_whole(client: Client) -> None:
    data = [datum(IDS[k:]) for k in range(5)]
    one, two = client.model(), client.model()
    client.learn(one, data)
    for part in (data[:2], data[2:]):
        client.learn(two, part)
    norms = [client.step(model)["metrics"]["grad_norm"] for model in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    after = [client.forward(model, data)["metrics"]["loss:sum"] for model in (one, two)]
    assert after[0] == pytest.approx(after[1], rel=1e-4)


def test_forward_leaves_no_gradient(client: Client) -> None:
    model = client.model()
    client.forward(model, [datum(IDS)])
    assert client.step(model)["metrics"]["grad_norm"] == 0
    client.learn(model, [datum(IDS)])
    assert client.step(model)["metrics"]["grad_norm"] > 0
    assert client.step(model)["metrics"]["grad_norm"] == 0  # the step has cleared it


def test_several_targets_a_position(client: Client) -> None:
    model, n = client.model(), 4
    targets = [[7, 8, 9], [1, 2, 3], [30, 31, 32], [5, 5, 6]]
    weights = [[0.5, 0.3, 0.2], [1.0, 0.0, -1.0], [0.1, 0.1, 0.8], [0.0, 2.0, 1.0]]
    flat_t, flat_w = list(itertools.chain(*targets)), list(itertools.chain(*weights))
    row = {
        "model_input": {"chunks": [{"tokens": IDS[:n]}]},
        "loss_fn_inputs": {"target_tokens": tensor(flat_t, [n, 3]), "weights": tensor(flat_w, [n, 3])},
    }
    found = client.learn(model, [row, datum(IDS)])
    logp = logprobs_of(found)
    assert [a.shape for a in logp] == [(n, 3), (9,)]
    expected = -(np.array(weights) * logp[0]).sum() - logp[1].sum()
    assert found["metrics"]["loss:sum"] == pytest.approx(expected, rel=1e-5)
    single = logprobs_of(client.forward(model, [datum(IDS[:n], [t[1] for t in targets])]))[0]
    assert single == pytest.approx(logp[0][:, 1], abs=1e-5)
    sparse = {  # the same, as CSR: what it does not list is 0
        "data": [1.0, 2.0],
        "dtype": "float32",
        "shape": [n, 3],
        "sparse_crow_indices": [0, 0, 1, 1, 2],
        "sparse_col_indices": [0, 1],
    }
    row["loss_fn_inputs"]["weights"] = sparse
    found = client.learn(model, [row])
    assert found["metrics"]["loss:sum"] == pytest.approx(-(logp[0][1, 0] + 2 * logp[0][3, 1]), rel=1e-5)


def test_adam_is_torchs_adamw(client: Client) -> None:
    """Of one weight of the full model: two steps, against AdamW by hand."""
    session = client.session()
    model = client.model(session, rank=0)
    adam = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.1, "grad_clip_norm": 0.0}
    trained = None
    m = v = 0.0
    for t in (1, 2):
        client.learn(model, [datum(IDS)])
        trained = client.service.work.models[model]  # type: ignore[attr-defined]
        weight = trained.parameters["model.norm.weight"]
        g, w = weight.grad[3].item(), weight[3].item()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        step = (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.9**t)) + 1e-6)
        client.step(model, lr=1e-2, **adam)
        assert weight[3].item() == pytest.approx(w * (1 - 1e-2 * 0.1) - 1e-2 * step, rel=1e-5)


def test_the_gradient_is_clipped(client: Client) -> None:
    norms = []
    for clip in (0.0, 1e-3):
        model = client.model()
        for _ in range(2):
            client.learn(model, [datum(IDS)])
            # Adam does not see a scale, but for its eps: a large one lets the clip show
            found = client.step(model, lr=1.0, eps=1.0, grad_clip_norm=clip)["metrics"]
        norms.append(found["update_to_weight"])
    assert norms[1] < 0.1 * norms[0]


# ------------------------------------------------------------------------------------------------- checkpoints


def test_resuming_gives_the_same_next_loss(client: Client) -> None:
    session = client.session()
    model = client.model(session)
    for _ in range(3):
        client.learn(model, [datum(IDS)])
        client.step(model)
    path = client.train("save_weights", model, path="here")["path"]
    assert path == f"tinker://{model}/weights/here"

    def go_on(which: str) -> list[float]:
        losses = []
        for _ in range(3):
            losses.append(client.learn(which, [datum(IDS)])["metrics"]["loss:sum"])
            client.step(which)
        return losses

    expected = go_on(model)
    made = client.post("load_weights", {"session_id": session, "model_seq_id": 1, "path": path, "optimizer": True})
    assert client.result(made)["model_id"] == made["model_id"] == f"{session}:train:1"
    assert go_on(made["model_id"]) == expected  # bitwise
    older = client.model(session, number=2)  # clients before 0.38 make the model first
    client.train("load_weights", older, path=path, optimizer=True)
    assert go_on(older) == expected
    fresh = client.model(session, number=3)
    client.train("load_weights", fresh, path=path, optimizer=False)
    found = go_on(fresh)
    assert found[0] == expected[0] and found[2] != expected[2]  # Adam began anew


def test_a_checkpoint_is_loaded_into_a_model_while_another_one_is_at_work(client: Client) -> None:
    """Older clients make a model and load into it, and another client's request may come between."""
    model = client.model()
    client.learn(model, [datum(IDS)])
    client.step(model)
    path = client.train("save_weights", model, path="mid")["path"]
    expected = client.learn(model, [datum(IDS)])["metrics"]
    late, other = client.model(), client.model()
    client.learn(other, [datum(IDS)])
    client.train("load_weights", late, path=path, optimizer=True)
    assert client.learn(late, [datum(IDS)])["metrics"] == expected


def test_a_taken_name_is_refused(client: Client) -> None:
    model = client.model()
    client.train("save_weights", model, path="x")
    with pytest.raises(Failed, match="exists already"):
        client.train("save_weights", model, path="x")
    client.train("save_weights", model, path="x", overwrite=True)
    client.train("save_weights_for_sampler", model, path="x")  # another kind


def test_lists_and_deletion(client: Client) -> None:
    model = client.model()
    for kind in ("save_weights", "save_weights_for_sampler", "save_weights_external"):
        client.train(kind, model, path="a b", ttl_seconds=604800, user_metadata={"k": "v"})
    run = f"training_runs/{model}"
    found = client.get(f"{run}/checkpoints")["checkpoints"]
    assert {c["checkpoint_id"]: c["checkpoint_type"] for c in found} == {
        "weights/a b": "training",
        "sampler_weights/a b": "sampler",
        "external_weights/a b": "external",
    }
    assert all(c["size_bytes"] > 0 and c["expires_at"] and c["user_metadata"] == {"k": "v"} for c in found)
    old = client.get(f"{run}/checkpoints", headers={**HEADERS, "X-Stainless-Package-Version": "0.25.0"})
    assert {c["checkpoint_type"] for c in old["checkpoints"]} == {"training", "sampler"}
    client.send("PUT", f"{run}/checkpoints/weights/a b/ttl", 204, json={"ttl_seconds": None})
    client.send("POST", f"{run}/checkpoints/weights/a b/publish", 204)
    newest = client.get(run)["last_checkpoint"]
    assert newest["public"] and newest["expires_at"] is None
    info = client.post("weights_info", {"tinker_path": f"tinker://{model}/weights/a b"})
    assert (info["base_model"], info["lora_rank"], info["train_attn"]) == (NAME, 4, True)
    client.send("DELETE", f"{run}/checkpoints/weights/a b", 204)
    client.send("DELETE", f"{run}/checkpoints/weights/a b", 404)
    assert client.get(run)["last_checkpoint"] is None
    cursor = client.get("training_runs?limit=1&offset=0")
    assert len(cursor["training_runs"]) == 1 and cursor["cursor"]["total_count"] >= 1


def test_an_adapter_taken_home_is_the_model_that_was_served(client: Client, tmp_path) -> None:
    """Merged into its base, an untied head included: plain transformers finds the served log-probabilities."""
    from transformers import AutoModelForCausalLM

    from grpo_gsm8k import config, workbench

    model = client.model()
    for _ in range(3):
        client.learn(model, [datum(IDS)])
        client.step(model, lr=3e-2)
    client.train("save_weights_external", model, path="home")
    service = client.service  # type: ignore[attr-defined]
    folder = service.folder / service.books.checkpoints[model, "external_weights", "home"].folder
    workbench.merge(config.build(config.ModelConfig, {"model_id": str(folder), "device": "cpu"}), tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    logits = plain(input_ids=torch.tensor([IDS[:-1]])).logits[0].log_softmax(-1)
    own = logits[torch.arange(9), torch.tensor(IDS[1:])].detach().numpy()
    assert logprobs_of(client.forward(model, [datum(IDS)]))[0] == pytest.approx(own, abs=1e-4)


def test_downloads_need_a_signature_and_no_key(client: Client, tmp_path) -> None:
    import io
    import tarfile

    model = client.model()
    client.train("save_weights_external", model, path="out")
    where = f"training_runs/{model}/checkpoints/external_weights/out"
    urls = client.get(f"{where}/external_weights_urls")["urls"]
    assert set(urls) == {"adapter_config.json", "adapter_model.safetensors"}
    url = urls["adapter_config.json"]
    assert client.http.get(url).json()["r"] == 4
    assert client.http.get(url.replace("adapter_config", "adapter_model")).status_code == 403
    assert client.http.get(url[:-1] + ("0" if url[-1] != "0" else "1")).status_code == 403
    sent = client.http.get(f"/api/v1/{where}/archive", headers=HEADERS, follow_redirects=False)
    assert sent.status_code == 302 and sent.headers["expires"]
    with tarfile.open(fileobj=io.BytesIO(client.http.get(sent.headers["location"]).content)) as tar:
        assert sorted(tar.getnames()) == ["adapter_config.json", "adapter_model.safetensors"]


# ------------------------------------------------------------------------------------------------- sampling


def test_samples_repeat_with_their_seed(client: Client) -> None:
    sampler = client.sampler(client.session())
    first = client.sample(sampler, IDS, 0, num_samples=3, seed=5)["sequences"]
    again = client.sample(sampler, IDS, 1, num_samples=3, seed=5)["sequences"]
    other = client.sample(sampler, IDS, 2, num_samples=3, seed=6)["sequences"]
    assert first == again != other
    assert first[0]["tokens"] != first[1]["tokens"]
    assert [client.sample(sampler, IDS, 3 + k, num_samples=1, seed=5)["sequences"][0] for k in range(1)] == first[:1]


def test_samples_are_from_the_trainers_distribution(client: Client) -> None:
    session = client.session()
    model = client.model(session)
    for _ in range(3):
        client.learn(model, [datum(IDS)])
        client.step(model, lr=3e-2)
    path = client.train("save_weights_for_sampler", model, path="s")["path"]
    sampler = client.sampler(session, path=path)
    found = client.sample(sampler, IDS[:4], max_tokens=5, stop=[])["sequences"][0]
    whole = IDS[:4] + found["tokens"]
    trainer = logprobs_of(client.forward(model, [datum(whole)]))[0]
    assert found["logprobs"] == pytest.approx(trainer[-5:], abs=2e-5)
    prompt = client.sample(sampler, whole, 1, max_tokens=1, prompt_logprobs=True)["prompt_logprobs"]
    assert prompt[1:] == pytest.approx(trainer, abs=2e-5)
    client.learn(model, [datum(IDS)])
    client.step(model, lr=3e-2)  # a sampler is a snapshot
    assert client.sample(sampler, IDS[:4], 2, max_tokens=5, stop=[])["sequences"][0] == found


def test_an_unnamed_snapshot(client: Client) -> None:
    session = client.session()
    model = client.model(session)
    made = client.train("save_weights_for_sampler", model, sampling_session_seq_id=4, kind="snapshot")
    assert made["path"] is None
    assert len(client.sample(made["sampling_session_id"], IDS)["sequences"][0]["tokens"]) == 6
    assert client.get(f"samplers/{made['sampling_session_id']}")["base_model"] == NAME
    assert client.get(f"training_runs/{model}/checkpoints")["checkpoints"] == []
    assert client.get(f"sessions/{session}")["sampler_ids"] == [made["sampling_session_id"]]


def test_what_ends_a_sample(client: Client) -> None:
    sampler = client.sampler(client.session())
    free = client.sample(sampler, IDS, 0, max_tokens=40, stop=[])["sequences"][0]
    assert free["stop_reason"] == "length" and len(free["tokens"]) == 40
    stop = free["tokens"][9]
    at = free["tokens"].index(stop)
    by_id = client.sample(sampler, IDS, 1, max_tokens=40, stop=[stop])["sequences"][0]
    assert by_id["tokens"] == free["tokens"][: at + 1] and by_id["stop_reason"] == "stop"
    spell = client.service.base.renderer.spell  # type: ignore[attr-defined]
    text = spell(free["tokens"])
    word = next(c for c in text if c.isalnum())
    by_text = client.sample(sampler, IDS, 2, max_tokens=40, stop=word)["sequences"][0]["tokens"]
    assert word in spell(by_text) and word not in spell(by_text[:-1])
    ends = client.service.weights.sampler.stop_ids  # type: ignore[attr-defined]
    by_end = client.sample(sampler, IDS, 3, max_tokens=1000, temperature=3.0)["sequences"][0]
    assert by_end["stop_reason"] == "length" or by_end["tokens"][-1] in ends


def test_top_k_and_top_p(client: Client) -> None:
    sampler = client.sampler(client.session())
    greedy = client.sample(sampler, IDS, 0, temperature=0.0)["sequences"][0]["tokens"]
    assert client.sample(sampler, IDS, 1, top_k=1)["sequences"][0]["tokens"] == greedy
    assert client.sample(sampler, IDS, 2, top_p=1e-6)["sequences"][0]["tokens"] == greedy
    found = client.sample(sampler, IDS, 3, num_samples=40, max_tokens=1, top_k=3, topk_sample_logprobs=3)["sequences"]
    likeliest = {token for token, _ in found[0]["topk_logprobs"][0]}
    assert {s["tokens"][0] for s in found} <= likeliest


def test_the_likeliest_tokens_of_a_prompt(client: Client) -> None:
    sampler = client.sampler(client.session())
    found = client.sample(sampler, IDS, prompt_logprobs=True, topk_prompt_logprobs=3, max_tokens=1)
    assert found["topk_prompt_logprobs"][0] is None and len(found["topk_prompt_logprobs"]) == len(IDS)
    for (token, logp), row in zip(
        zip(IDS[1:], found["prompt_logprobs"][1:], strict=True), found["topk_prompt_logprobs"][1:], strict=True
    ):
        values = [value for _, value in row]
        assert len(row) == 3 and values == sorted(values, reverse=True)
        assert dict(map(tuple, row)).get(token, values[-1]) >= logp - 1e-6
    last = client.sample(sampler, IDS, 1, prompt_logprobs=True, prompt_logprobs_last_n=2, max_tokens=1)
    assert last["prompt_logprobs"][:-2] == [None] * (len(IDS) - 2)
    assert last["prompt_logprobs"][-2:] == pytest.approx(found["prompt_logprobs"][-2:], abs=1e-6)


# ------------------------------------------------------------------------------------------------- order, repeats


def test_a_repeated_request_is_done_once(client: Client) -> None:
    model = client.model()
    sent = client.submit("forward_backward", model, 1, **loss_input([datum(IDS)]))
    assert client.submit("forward_backward", model, 1, **loss_input([datum(IDS)])) == sent
    first = client.result(sent)
    assert client.submit("forward_backward", model, 1, **loss_input([datum(IDS)])) == sent
    assert client.result(sent) == first  # may be fetched again
    once = client.result(client.submit("optim_step", model, 2, adam_params={}))["metrics"]["grad_norm"]
    other = client.model()
    client.learn(other, [datum(IDS)])
    assert client.step(other, lr=1e-4)["metrics"]["grad_norm"] == once
    session = client.session()
    body = {"session_id": session, "model_seq_id": 0, "base_model": NAME, "lora_config": {"rank": 4}}
    assert client.post("create_model", body) == client.post("create_model", body)
    sampler = client.sampler(session)
    assert client.submit_sample(sampler, IDS, 9) == client.submit_sample(sampler, IDS, 9)


def test_a_number_that_another_request_has_is_a_future_that_fails(client: Client) -> None:
    """While the first one waits, when it is done, and when its bytes are gone; in each case nothing is applied."""
    model, other, waits = client.model(), client.model(), client.model()
    client.submit("optim_step", waits, 2, adam_params={"learning_rate": 1e-2})
    with pytest.raises(Failed, match="seq_id 2 was given"):
        client.result(client.submit("optim_step", waits, 2, adam_params={"learning_rate": 1.0}))
    first = client.submit("forward_backward", model, 1, **loss_input([datum(IDS)]))
    client.result(first)
    for op, fields in (("optim_step", {}), ("forward_backward", loss_input([datum(IDS[2:])]))):
        again = client.submit(op, model, 1, **fields)
        assert again["request_id"] != first["request_id"]
        with pytest.raises(Failed, match="seq_id 1 was given to another request already") as failed:
            client.result(again)
        assert failed.value.category == "user"
    client.learn(other, [datum(IDS)])
    step = client.result(client.submit("optim_step", model, 2, adam_params={"learning_rate": 1e-2}))
    assert step["metrics"]["grad_norm"] == client.step(other, lr=1e-2)["metrics"]["grad_norm"]
    forward = {"forward_input": loss_input([datum(IDS)])["forward_backward_input"]}
    client.result(client.submit("forward", model, 3, **forward))
    with pytest.raises(Failed, match="seq_id 3"):
        client.result(client.submit("optim_step", model, 3, adam_params={}))
    session = client.session()
    body = {"session_id": session, "model_seq_id": 0, "base_model": NAME, "lora_config": {"rank": 4}}
    client.result(client.post("create_model", body))
    with pytest.raises(Failed, match="this number was given to another"):
        client.result(client.post("create_model", {**body, "lora_config": {"rank": 8}}))
    sampler = client.sampler(session)
    client.sample(sampler, IDS, 9)
    with pytest.raises(Failed, match="seq_id 9"):
        client.sample(sampler, IDS[1:], 9)
    path = client.result(client.submit("save_weights_for_sampler", model, 4, path="x"))["path"]
    other_weights = {"session_id": session, "sampling_session_seq_id": 100, "model_path": path}
    client.post("create_sampling_session", other_weights, status=400)


def test_requests_wait_for_their_turn(client: Client) -> None:
    model, expected = client.model(), client.model()
    for rows in ([datum(IDS)], [datum(IDS[2:])]):
        client.learn(expected, rows)
    norm = client.step(expected)["metrics"]["grad_norm"]
    third = client.submit("optim_step", model, 3, adam_params={"learning_rate": 1e-2})
    second = client.submit("forward_backward", model, 2, **loss_input([datum(IDS[2:])]))
    client.submit("forward_backward", model, 1, **loss_input([datum(IDS)]))
    client.result(second)
    assert client.result(third)["metrics"]["grad_norm"] == norm


def test_a_gap_fails_after_a_while_and_the_next_goes_on(client: Client) -> None:
    model = client.model()
    late = [client.submit("optim_step", model, seq, adam_params={}) for seq in (3, 5)]
    for sent in late:
        with pytest.raises(Failed, match="seq_id 1 to 2 did not arrive") as failed:
            client.result(sent)
        assert failed.value.category == "user"
    client.result(client.submit("forward_backward", model, 6, **loss_input([datum(IDS)])))
    with pytest.raises(Failed, match="comes too late"):
        client.result(client.submit("optim_step", model, 2, adam_params={}))


# ------------------------------------------------------------------------------------------------- refusals

GOOD = {"weights": [1.0] * 9}
IMAGE = {"model_input": {"chunks": [{"type": "image", "data": "x"}]}, "loss_fn_inputs": {}}


@pytest.mark.parametrize(
    ("data", "loss", "config", "what"),
    [
        ([], "cross_entropy", None, "0 data in one call"),
        ([datum(IDS, weights=[math.nan] * 9)], "cross_entropy", None, "holds NaN"),
        ([datum(IDS, advantages=[math.inf] * 9, logprobs=[0] * 9)], "ppo", None, "holds NaN or infinite"),
        ([datum([1, 2, 99999], [2, 3, 4])], "cross_entropy", None, "99999 is not in the vocabulary"),
        ([datum([1, 2, -4], [2, 3, 4])], "cross_entropy", None, "-4 is not in the vocabulary"),
        ([datum(IDS, [2, 3, 10**6])], "cross_entropy", None, "not in the vocabulary"),
        ([datum(IDS, weights=[1.0] * 8)], "cross_entropy", None, r"shape \[8\], the targets have \[9\]"),
        ([datum(IDS, advantages=[1.0] * 9)], "cross_entropy", None, "does not use advantages"),
        ([datum(IDS, advantages=[1.0] * 9)], "ppo", None, "needs logprobs"),
        ([datum(IDS, **GOOD)], "stable_reinforce", None, "not served"),
        ([datum(IDS, **GOOD)], "custom", None, "not served"),
        ([datum(IDS, **GOOD)], "nonsense", None, "must be one of"),
        ([datum(IDS, **GOOD)], "cross_entropy", {"beta": 1.0}, "no setting 'beta'"),
        ([datum(IDS, logprobs=[0] * 9, advantages=[1] * 9)], "ppo", {"clip_low_threshold": "x"}, "finite number"),
        ([datum(IDS, logprobs=[0] * 9, advantages=[1] * 9)], "ppo", {"clip_low_threshold": 2.0}, "low <= high"),
        (
            [{"model_input": {"chunks": [{"type": "image", "data": "x"}]}, "loss_fn_inputs": {}}],
            "cross_entropy",
            None,
            "'image' are not served",
        ),
        ([datum([7] * 2000)], "cross_entropy", None, "the model reads 1 to 1024"),
        ([{"model_input": 3}], "cross_entropy", None, "must be an object"),
        ("nothing", "cross_entropy", None, "must be a list"),
    ],
)
def test_a_mistake_fails_the_future_and_changes_nothing(client: Client, data, loss, config, what) -> None:
    model = client.model()
    import json

    body = {"model_id": model, "seq_id": 1, **loss_input(data, loss, config)}
    sent = client.send("POST", "forward_backward", content=json.dumps(body))
    with pytest.raises(Failed, match=what) as failed:
        client.result(sent)
    assert failed.value.category == "user" and "\n" not in str(failed.value)
    assert client.result(client.submit("optim_step", model, 2, adam_params={}))["metrics"]["grad_norm"] == 0


@pytest.mark.parametrize(
    ("adam", "what"),
    [
        ({"adam_params": {"learning_rate": -1}}, "learning_rate is -1"),
        ({"adam_params": {"beta1": 1.0}}, "beta1 is 1.0"),
        ({"adam_params": {"learning_rate": "big"}}, "learning_rate is big"),
        ({"adam_params": {"momentum": 1}}, "has no 'momentum'"),
        ({"adam_params": []}, "must be an object"),
        ({"optimizer_params": {"type": "dimuon", "learning_rate": 1e-3}}, "'dimuon' is not served"),
        ({"adam_params": {}, "novelty": 3}, "novelty is not served"),
    ],
)
def test_settings_of_the_optimizer_that_are_none(client: Client, adam, what) -> None:
    model = client.model()
    with pytest.raises(Failed, match=what):
        client.train("optim_step", model, **adam)


def test_a_loss_that_is_not_finite_keeps_the_gradient_before_it(client: Client) -> None:
    model, other = client.model(), client.model()
    huge = datum(IDS, logprobs=[-1e30] * 9, advantages=[1.0] * 9)
    for which in (model, other):
        client.learn(which, [datum(IDS)])
    with pytest.raises(Failed, match="the loss is"):
        client.learn(model, [huge], "importance_sampling")
    assert client.step(model) == client.step(other)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("create_model", {"model_seq_id": 0, "base_model": "Other/Model", "lora_config": {"rank": 4}}, 404),
        ("create_model", {"model_seq_id": 0, "base_model": NAME, "lora_config": {"rank": 10**6}}, 400),
        ("create_model", {"model_seq_id": 0, "base_model": NAME, "lora_config": {"rank": "x"}}, 400),
        ("create_model", {"model_seq_id": 0, "base_model": NAME, "lora_config": {"rank": 4, "alpha": 3}}, 400),
        (
            "create_model",
            {
                "model_seq_id": 0,
                "base_model": NAME,
                "lora_config": {"rank": 4, "train_attn": False, "train_mlp": False, "train_unembed": False},
            },
            400,
        ),
        ("create_model", {"model_seq_id": 0, "base_model": NAME, "optimizer_config": {"type": "dimuon"}}, 400),
        ("create_sampling_session", {"sampling_session_seq_id": 0, "base_model": "Other/Model"}, 404),
        ("create_sampling_session", {"sampling_session_seq_id": 0, "model_path": "tinker://a/weights/b"}, 404),
        ("create_sampling_session", {"sampling_session_seq_id": 0, "model_path": "tinker://../../etc"}, 400),
        ("load_weights", {"model_seq_id": 5, "path": "tinker://a/weights/b", "optimizer": True}, 404),
        ("weights_info", {"tinker_path": "/etc/passwd"}, 400),
    ],
)
def test_what_has_no_number_is_refused_at_once(client: Client, path, body, status) -> None:
    body = body if path == "weights_info" else {"session_id": client.session(), **body}
    answer = client.post(path, body, status)
    assert isinstance(answer["detail"], str) and "\n" not in answer["detail"]


@pytest.mark.parametrize("seq", [-1, 0, "1", 1.5, None, 2**70])
def test_a_number_that_is_none_is_refused_at_once(client: Client, seq) -> None:
    model = client.model()
    for path, more in (("optim_step", {"adam_params": {}}), ("forward_backward", loss_input([datum(IDS)]))):
        answer = client.post(path, {"model_id": model, "seq_id": seq, **more}, 422)
        assert "seq_id" in answer["detail"]


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 10**7}, "num_samples"),
        ({"stop": [1, "a"]}, "stop must be"),
        ({"stop": [""]}, "stop must be"),
        ({"seed": 2**80}, "seed"),
        ({"target_prompt_logprobs": {"data": [1], "dtype": "int64"}}, "shape [N, K]"),
        ({"target_prompt_logprobs": tensor([1, 2], [2, 1])}, "must be [9, K]"),
        ({"record_stability_info": True}, "record_stability_info is not served"),
        ({"prompt_alt_tokens_k": 1000}, "prompt_alternatives"),
        ({"prompt": {"chunks": []}}, "empty"),
        ({"prompt": {"chunks": [{"tokens": [320]}]}}, "not in the vocabulary"),
        ({"prompt": {"chunks": [{"tokens": [1] * 1024}]}}, "context is 1024"),
        ({"prompt": {"chunks": [{"tokens": [1.5]}]}}, "whole numbers"),
    ],
)
def test_samples_that_cannot_be_drawn(client: Client, fields, what) -> None:
    sampler = client.sampler(client.session())
    params = {k: fields[k] for k in fields if k in ("max_tokens", "temperature", "top_p", "top_k", "stop", "seed")}
    body = {
        "sampling_session_id": sampler,
        "seq_id": 0,
        "prompt": {"chunks": [{"tokens": IDS}]},
        "sampling_params": params,
        **{k: v for k, v in fields.items() if k not in params},
    }
    assert what in client.post("asample", body, 400)["detail"]


def test_fields_that_ask_for_nothing_are_let_pass(client: Client) -> None:
    sampler = client.sampler(client.session())
    found = client.sample(sampler, IDS, target_prompt_logprobs=None, record_stability_info=False, prompt_alt_tokens_k=0)
    assert len(found["sequences"]) == 1


def test_named_tokens_and_draws_at_each_position_of_a_prompt(client: Client) -> None:
    session = client.session()
    sampler = client.sampler(session)
    asked = [[IDS[i + 1], 3 + i, -1] for i in range(9)]
    dense = tensor(list(itertools.chain(*asked)), [9, 3])
    sparse = {
        **tensor([IDS[1], 7], [9, 3]),
        "sparse_crow_indices": [0, 1, 1, 1, 2, 2, 2, 2, 2, 2],
        "sparse_col_indices": [0, 2],
    }
    found = []
    for number, targets in enumerate((dense, sparse)):
        sent = client.submit_sample(
            sampler, IDS, number, target_prompt_logprobs=targets, prompt_logprobs=True, prompt_alt_tokens_k=50
        )
        client.result(sent)
        accept = {**HEADERS, "Accept": "application/x-protobuf"}
        found.append(codec.decode("sample", client.post("retrieve_future", sent, headers=accept).content))
    logp = found[0].prompt_logprobs
    named = np.array(found[0].targets.values).reshape(9, 3)
    assert named[:, 0].tolist() == list(logp[1:]) and (named[:, 2] == 0).all() and (named[:, 1] < 0).all()
    assert (found[1].targets.crow, found[1].targets.col) == ((0, 1, 1, 1, 2, 2, 2, 2, 2, 2), (0, 2))
    assert found[1].targets.values[0] == logp[1]
    tokens, logprobs = (np.array(table.values).reshape(9, 50) for table in found[0].alternatives)
    wanted = {"target_tokens": tensor(tokens.ravel().tolist(), [9, 50])}
    row = {"model_input": {"chunks": [{"tokens": IDS[:9]}]}, "loss_fn_inputs": wanted}
    trainer = logprobs_of(client.forward(client.model(session), [row]))[0]
    assert logprobs == pytest.approx(trainer, abs=1e-5) and len(set(tokens[0].tolist())) > 10


def test_what_is_not_there_is_404(client: Client) -> None:
    client.post("optim_step", {"model_id": "nobody", "seq_id": 1}, 404)
    client.post("get_info", {"model_id": "nobody"}, 404)
    client.post("retrieve_future", {"request_id": "nobody"}, 404)
    client.post("session_heartbeat", {"session_id": "nobody"}, 404)
    client.post("asample", {"sampling_session_id": "x", "seq_id": 0, "prompt": {"chunks": [{"tokens": [1]}]}}, 404)
    for path in ("sessions/x", "samplers/x", "training_runs/x", "training_runs/x/checkpoints", "billing/usage"):
        assert isinstance(client.get(path, 404)["detail"], str)
