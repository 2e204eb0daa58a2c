"""Rewards over HTTP: what is refused and in which order, what is trained, and what a crash leaves."""

from __future__ import annotations

import io
import json
import random
import signal
import threading
import time
import zipfile

import httpx
import numpy as np
import pytest
import torch

from grpo_gsm8k.serve.rollouts.run import Group, Sample, Settings, advantages, data_of
from tests.serve_tools import KEY, Process, free_port
from tests.serving import serving

SMALL = {"n": 2, "groups_per_batch": 2, "max_tokens": 4, "learning_rate": 1e-2, "lora_rank": 4}


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    with serving(tiny.model, tmp_path_factory.mktemp("serve") / "out") as found:
        yield found


@pytest.fixture
def client(served):
    """The server with a run of small settings that has just begun."""
    post(served.client, "start", **SMALL)
    return served.client


def post(client, path, status=200, /, **body):
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    found = answer.json()
    assert status == 200 or set(found) == {"error"}
    return found


def status(client):
    return client.get("/v1/status").json()


def rollouts(client, prompts=("Tom", "Ann"), **body):
    """The groups, each as the ids of its rollouts."""
    found = post(client, "rollouts", prompts=list(prompts), **body)
    return [[one["rollout_id"] for one in group["completions"]] for group in found["rollouts"]]


def reward(client, ids, values=(), code=200):
    values = values or [k % 2 for k in range(len(ids))]
    body = {"rewards": [{"rollout_id": i, "reward": v} for i, v in zip(ids, values, strict=True)]}
    return post(client, "rewards", code, **body)


# ---------------------------------------------------------------------------------------------- the life of a run


def test_a_run_from_its_start_to_its_end(client, served):
    begun = status(client)
    run, version = begun["model_version"]
    assert begun["state"] == "running" and version == 0 and begun["open_rollouts"] == begun["complete_groups"] == 0
    assert begun["last_update"] == {} and {key: begun["settings"][key] for key in SMALL} == SMALL

    found = post(client, "rollouts", prompts=["Tom", "Ann"])
    assert found["model_version"] == [run, 0]
    assert [group["prompt"] for group in found["rollouts"]] == ["Tom", "Ann"]
    assert len({group["group_id"] for group in found["rollouts"]}) == 2
    every = [one for group in found["rollouts"] for one in group["completions"]]
    assert len({one["rollout_id"] for one in every}) == 4
    assert all(one["finish_reason"] in ("stop", "length") and 1 <= one["num_tokens"] <= 4 for one in every)
    assert status(client)["open_rollouts"] == 4

    first, second = ([one["rollout_id"] for one in group["completions"]] for group in found["rollouts"])
    said = reward(client, first[:1], [1.0])
    assert said == {"accepted": 1, "updates": 0, "model_version": [run, 0], "complete_groups": 0}
    said = reward(client, [second[0], first[1]], [0.5, 0])
    assert said == {"accepted": 2, "updates": 0, "model_version": [run, 0], "complete_groups": 1}
    assert (status(client)["open_rollouts"], status(client)["complete_groups"]) == (1, 1)
    said = reward(client, second[1:], [-1])
    assert said == {"accepted": 1, "updates": 1, "model_version": [run, 1], "complete_groups": 0}

    after = status(client)
    assert after["model_version"] == [run, 1] and after["open_rollouts"] == 0
    assert after["last_update"]["reward/mean"] == pytest.approx(0.125)
    assert after["last_update"]["groups"] == 2
    assert post(client, "stop")["state"] == status(client)["state"] == "stopped"
    assert post(client, "stop")["model_version"] == [run, 1]
    again = post(client, "start", **SMALL)
    assert again["model_version"][0] != run and again["model_version"][1] == 0 and again["state"] == "running"


def test_an_update_changes_what_is_sampled_and_a_new_run_begins_at_the_base(client):
    drawn = post(client, "rollouts", prompts=["Tom"], seed=5, max_tokens=12)["rollouts"][0]["completions"]
    for _ in range(4):
        first, second = rollouts(client)
        assert reward(client, [*first, *second], [3, 0, 1, 2])["updates"] == 1
    after = post(client, "rollouts", prompts=["Tom"], seed=5, max_tokens=12)["rollouts"][0]["completions"]
    assert [one["text"] for one in after] != [one["text"] for one in drawn]
    post(client, "start", **SMALL)
    fresh = post(client, "rollouts", prompts=["Tom"], seed=5, max_tokens=12)["rollouts"][0]["completions"]
    assert [one["text"] for one in fresh] == [one["text"] for one in drawn]


def test_settings_of_the_request_win_over_the_runs(client):
    found = post(client, "rollouts", prompts=["Tom"], n=3, max_tokens=2, temperature=0.5, seed=1)
    every = found["rollouts"][0]["completions"]
    assert len(every) == 3 and all(one["num_tokens"] <= 2 for one in every)
    again = post(client, "rollouts", prompts=["Tom"], n=3, max_tokens=2, temperature=0.5, seed=1)
    assert [one["text"] for one in again["rollouts"][0]["completions"]] == [one["text"] for one in every]
    long = post(client, "rollouts", prompts=["Tom"], max_tokens=30, seed=2)["rollouts"][0]["completions"][0]
    stop = long["text"][4:6]
    cut = post(client, "rollouts", prompts=["Tom"], max_tokens=30, seed=2, stop=stop)["rollouts"][0]["completions"][0]
    assert cut["finish_reason"] == "stop" and cut["text"] == long["text"][: long["text"].index(stop)]


def test_a_start_without_a_body_takes_the_defaults(client):
    for body in ({}, None):
        answer = client.post("/v1/start", json=body)
        assert answer.status_code == 200 and answer.json()["settings"]["max_staleness"] == 0


def test_a_prompt_may_be_a_conversation(client):
    said = [{"role": "user", "content": "hi"}]
    group = post(client, "rollouts", prompts=["Tom", said])["rollouts"][1]
    assert group["prompt"] == said and len(group["completions"]) == 2
    assert reward(client, [one["rollout_id"] for one in group["completions"]])["complete_groups"] == 1


def test_several_batches_in_one_request_are_several_updates(client):
    groups = rollouts(client, ["a", "b", "c", "d", "e"])
    said = reward(client, [i for group in groups for i in group])
    assert said["accepted"] == 10 and said["updates"] == 2 and said["model_version"][1] == 2
    assert said["complete_groups"] == 1  # it was accepted, so it is trained with the next
    assert reward(client, [i for group in rollouts(client, ["f"]) for i in group])["updates"] == 1


# ------------------------------------------------------------------------------------------------ what is refused


def test_unknown_duplicate_and_stale_rewards_in_this_order(client):
    first, second = rollouts(client)
    other = f"{'0' * 16}-0-0"
    for strange in (other, "x", "", f"{first[0]}0", first[0].rsplit("-", 1)[0], first[0].replace("-0-0", "-00-0")):
        found = reward(client, [first[0], strange], code=404)["error"]
        assert found["type"] == "unknown_rollout" and found["rollout_ids"] == [strange]
    assert status(client)["open_rollouts"] == 4  # all or nothing

    found = reward(client, [first[0], first[1], first[0]], code=409)["error"]
    assert found["type"] == "duplicate_reward" and found["rollout_ids"] == [first[0]]
    assert status(client)["open_rollouts"] == 4
    reward(client, first[:1])
    assert reward(client, [first[0], second[0]], code=409)["error"]["type"] == "duplicate_reward"
    assert reward(client, [first[0], other], code=404)["error"]["type"] == "unknown_rollout"

    late = rollouts(client, ["late", "partly"])
    reward(client, late[1][:1])
    assert reward(client, [first[1], *second])["updates"] == 1
    assert status(client)["open_rollouts"] == 0
    found = reward(client, late[0], code=409)["error"]
    assert found["type"] == "stale_rollout" and found["rollout_ids"] == late[0]
    assert reward(client, [late[1][1]], code=409)["error"]["type"] == "stale_rollout"
    assert reward(client, [late[1][0]], code=409)["error"]["type"] == "duplicate_reward"
    assert reward(client, [late[0][0], first[0]], code=409)["error"]["type"] == "duplicate_reward"
    assert reward(client, [late[0][0], other], code=404)["error"]["type"] == "unknown_rollout"


def test_staleness_is_allowed_as_far_as_the_run_says(served):
    client = served.client
    post(client, "start", **SMALL, max_staleness=1)
    old, mid = rollouts(client, ["old", "mid"])
    for _ in range(2):
        assert reward(client, [i for group in rollouts(client, ["x", "y"]) for i in group])["updates"] == 1
        if status(client)["model_version"][1] == 1:
            assert reward(client, mid)["complete_groups"] == 1
            post(client, "rollouts", prompts=["z"])
    assert reward(client, old, code=409)["error"]["type"] == "stale_rollout"


def test_rollouts_of_an_earlier_run_are_void(client):
    first, _ = rollouts(client)
    post(client, "start", **SMALL)
    assert reward(client, first, code=404)["error"]["type"] == "unknown_rollout"
    assert status(client)["open_rollouts"] == 0


def test_nothing_is_taken_unless_a_run_is_on(client):
    first, _ = rollouts(client)
    post(client, "stop")
    assert post(client, "rollouts", 409, prompts=["x"])["error"]["type"] == "not_running"
    assert reward(client, first, code=409)["error"]["type"] == "not_running"
    assert post(client, "rewards", 422, rewards=[])["error"]["type"] == "invalid_request"  # the shape comes first


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("start", {"foo": 1}),
        ("start", {"n": 1}),
        ("start", {"n": 2.5}),
        ("start", {"groups_per_batch": 0}),
        ("start", {"learning_rate": "fast"}),
        ("start", {"learning_rate": float("nan")}),
        ("start", {"temperature": -0.1}),
        ("start", {"loss_fn": "cross_entropy"}),
        ("start", {"loss_fn": "reinforce"}),
        ("start", {"normalize": True}),
        ("start", {"max_staleness": -1}),
        ("start", {"lora_rank": -1}),
        ("start", {"lora_rank": 100_000}),
        ("rollouts", {}),
        ("rollouts", {"prompts": []}),
        ("rollouts", {"prompts": "Tom"}),
        ("rollouts", {"prompts": [""]}),
        ("rollouts", {"prompts": [5]}),
        ("rollouts", {"prompts": [[]]}),
        ("rollouts", {"prompts": [[{"role": "user"}]]}),
        ("rollouts", {"prompts": [[{"role": "user", "content": "<|im_end|>"}]]}),
        ("rollouts", {"prompts": ["x" * 200_000]}),
        ("rollouts", {"prompts": ["Tom"], "n": 1}),
        ("rollouts", {"prompts": ["Tom"], "max_tokens": 0}),
        ("rollouts", {"prompts": ["Tom"], "temperature": -1}),
        ("rollouts", {"prompts": ["Tom"], "foo": 1}),
        ("rollouts", {"prompts": ["Tom"] * 200, "n": 100}),
        ("rewards", {}),
        ("rewards", {"rewards": {}}),
        ("rewards", {"rewards": [{"rollout_id": "x"}]}),
        ("rewards", {"rewards": [{"rollout_id": 5, "reward": 1}]}),
        ("rewards", {"rewards": [{"rollout_id": "x", "reward": "1"}]}),
        ("rewards", {"rewards": [{"rollout_id": "x", "reward": True}]}),
        ("rewards", {"rewards": [{"rollout_id": "x", "reward": float("nan")}]}),
        ("rewards", {"rewards": [{"rollout_id": "x", "reward": float("inf")}]}),
        ("rewards", {"rewards": [{"rollout_id": "x", "reward": 1e300}]}),
        ("rewards", {"rewards": [{"rollout_id": "x", "reward": 1, "why": "?"}]}),
    ],
)
def test_what_has_not_the_right_shape_is_an_invalid_request(served, path, body):
    client = served.client
    if status(client)["state"] != "running":
        post(client, "start", **SMALL)
    before = status(client)
    answer = client.post(f"/v1/{path}", content=json.dumps(body))
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["type"] == "invalid_request" and answer.json()["error"]["message"]
    assert status(client) == before


def test_the_key_is_asked_for_in_each_header(served):
    client = served.client
    for headers in ({"api-key": KEY}, {"X-API-Key": KEY}, {"Authorization": f"Bearer {KEY}"}):
        assert client.get("/v1/status", headers={"X-API-Key": "", **headers}).status_code == 200
    for headers in ({"X-API-Key": ""}, {"X-API-Key": "tml-no"}):
        answer = client.get("/v1/status", headers=headers)
        assert answer.status_code == 401 and set(answer.json()["error"]) >= {"type", "message"}


@pytest.mark.parametrize("fails", ["forward_backward", "optim_step"])
def test_an_update_that_fails_drops_its_groups_and_the_run_goes_on(client, monkeypatch, fails):
    """The failure is in the journal too, and the next batch of the same version is not taken for a repetition."""
    from grpo_gsm8k.errors import NonFiniteError
    from grpo_gsm8k.serve.learn import Trained

    def not_finite(self, *args):
        raise NonFiniteError("the loss is not finite")

    first, second = rollouts(client)
    with monkeypatch.context() as patched:
        patched.setattr(Trained, fails, not_finite)
        found = reward(client, [*first, *second], code=409)["error"]
    assert found["type"] == "update_failed" and "the loss is not finite" in found["message"]
    assert status(client)["complete_groups"] == 0 and status(client)["model_version"][1] == 0
    assert reward(client, first, code=409)["error"]["type"] == "duplicate_reward"
    assert reward(client, [i for group in rollouts(client) for i in group])["updates"] == 1


def test_weights_that_find_no_room_are_saved_with_the_next_request(client, monkeypatch):
    """The step was taken, and is not taken twice."""
    from grpo_gsm8k.errors import DiskError
    from grpo_gsm8k.serve.learn import Trained

    def full(self, folder, optimizer):
        raise DiskError("no space left")

    first, second = rollouts(client)
    with monkeypatch.context() as patched:
        patched.setattr(Trained, "save", full)
        assert reward(client, [*first, *second])["updates"] == 0
    assert status(client)["complete_groups"] == 2
    assert reward(client, first[:1], code=409)["error"]["type"] == "duplicate_reward"
    found = status(client)
    assert found["complete_groups"] == 0 and found["model_version"][1] == 1 and found["last_update"]["step"] == 1


# -------------------------------------------------------------------------------------------------- what is trained


def test_advantages_are_the_rewards_within_their_group():
    assert advantages([1, 2, 6], "mean") == [-2, -1, 3]
    assert advantages([0.3] * 7, "std") == advantages([0.3] * 7, "mean") == [0.0] * 7
    torch.testing.assert_close(
        torch.tensor(advantages([1, 2, 6], "std")),
        (torch.tensor([1.0, 2, 6]) - 3) / torch.tensor([1.0, 2, 6]).std(),
        atol=1e-5,
        rtol=0,
    )


def test_a_batch_is_shifted_once_and_divided_by_its_tokens():
    samples = [Sample([7, 8], [-0.1, -0.2], "", "stop", 1.0), Sample([9], [-0.3], "", "length", 0.0)]
    first, second = data_of([Group(0, 0, "p", [1, 2, 3], samples)], Settings())
    assert first["tokens"] == [1, 2, 3, 7] and second["tokens"] == [1, 2, 3]
    assert first["inputs"]["target_tokens"] == [2, 3, 7, 8]
    assert first["inputs"]["logprobs"] == [0, 0, -0.1, -0.2]
    assert first["inputs"]["advantages"] == [0, 0, 0.5 / 3, 0.5 / 3]
    assert second["inputs"]["advantages"] == [0, 0, -0.5 / 3]


def test_what_is_trained_is_what_was_sampled(client, served):
    """On policy and at any temperature, the learner's log-probabilities are those that were kept with the rollouts."""
    for heat in (1.0, 0.6):
        first, second = rollouts(client, temperature=heat, max_tokens=8)
        assert reward(client, [*first, *second])["updates"] == 1
        (model,) = [m for m in served.service.status()["models"] if m["queued"] == 0][:1]
        assert 0 <= model["last"]["logprob_gap:max"] < 1e-5


def test_the_loss_is_the_sum_over_tokens_of_ratio_times_advantage(client, served, monkeypatch):
    kept = {}
    forward = served.service.forward_backward

    async def seen(model_id, rows, loss_fn, *args, **kwargs):
        kept["rows"], kept["loss_fn"] = rows, loss_fn
        return await forward(model_id, rows, loss_fn, *args, **kwargs)

    monkeypatch.setattr(served.service, "forward_backward", seen)
    first, second = rollouts(client)
    reward(client, [*first, *second], [1, 0, 0, 4])
    total = sum(np.sum(row["inputs"]["advantages"]) for row in kept["rows"])  # all ratios are 1
    assert kept["loss_fn"] == "importance_sampling" and len(kept["rows"]) == 4
    assert status(client)["last_update"]["loss"] == pytest.approx(-total, abs=1e-6)


@pytest.mark.parametrize("loss_fn", ["ppo", "cispo", "dro", "gspo"])
def test_every_loss_of_advantages_can_be_chosen(served, loss_fn):
    post(served.client, "start", **SMALL, loss_fn=loss_fn)
    first, second = rollouts(served.client)
    assert reward(served.client, [*first, *second])["updates"] == 1


def test_the_weights_can_be_taken_home(client):
    from safetensors.torch import load

    def weights():
        answer = client.get("/v1/model")
        assert answer.headers["content-type"] == "application/zip"
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert archive.testzip() is None and {"tokenizer.json", "adapter_config.json"} <= set(archive.namelist())
            return load(archive.read("adapter_model.safetensors"))

    before = weights()
    assert all(not tensor.any() for name, tensor in before.items() if "lora_B" in name)
    first, second = rollouts(client)
    reward(client, [*first, *second])
    after = weights()
    assert before.keys() == after.keys() and any(tensor.any() for name, tensor in after.items() if "lora_B" in name)


# ------------------------------------------------------------------------------------------------- after a crash


def test_a_run_goes_on_where_it_was(tiny, tmp_path):
    """Another server on the same folder knows the run, the rewards so far, and which rollouts had theirs."""
    with serving(tiny.model, tmp_path / "out") as one:
        post(one.client, "start", **SMALL)
        trained = [i for group in rollouts(one.client) for i in group]
        reward(one.client, trained)
        first, second = rollouts(one.client)
        reward(one.client, [*first, second[0]])
        said, shown = status(one.client), one.client.get("/page/status").json()["rollouts"]["history"]
    with serving(tiny.model, tmp_path / "out") as two:
        assert status(two.client) == said
        assert two.client.get("/page/status").json()["rollouts"]["history"] == shown
        assert reward(two.client, trained[:1], code=409)["error"]["type"] == "duplicate_reward"
        assert reward(two.client, first[:1], code=409)["error"]["type"] == "duplicate_reward"
        new = rollouts(two.client)
        assert not {i for group in new for i in group} & {*trained, *first, *second}
        assert reward(two.client, second[1:])["updates"] == 1


def test_an_update_that_a_crash_interrupted_is_made_once(tiny, tmp_path, monkeypatch):
    """The rewards are on disk, the gradient is taken, and then the server dies: its next start takes the one step."""
    from grpo_gsm8k.serve.rollouts.facade import Rollouts

    def run(folder, dies):
        with serving(tiny.model, folder) as one:
            post(one.client, "start", **SMALL)
            first, second = rollouts(one.client)
            if not dies:
                reward(one.client, [*first, *second], [3, 0, 1, 2])
                return samples(one.client), status(one.client)["last_update"]
            with monkeypatch.context() as patched:

                async def dying(self, run):
                    raise RuntimeError("killed")

                patched.setattr(Rollouts, "_published", dying)
                with pytest.raises(RuntimeError, match="killed"):
                    reward(one.client, [*first, *second], [3, 0, 1, 2])
        with serving(tiny.model, folder) as two:
            assert reward(two.client, first[:1], code=409)["error"]["type"] == "duplicate_reward"
            found = status(two.client)
            assert found["model_version"][1] == 1 and found["complete_groups"] == 0
            return samples(two.client), found["last_update"]

    def samples(client):
        found = post(client, "rollouts", prompts=["Tom"], seed=5, max_tokens=12)
        return [one["text"] for one in found["rollouts"][0]["completions"]]

    undisturbed, killed = run(tmp_path / "a", False), run(tmp_path / "b", True)
    assert undisturbed[0] == killed[0]
    assert undisturbed[1] | {"seconds": 0} == killed[1] | {"seconds": 0}


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_kills_at_random_moments_change_nothing(tiny, tmp_path):
    """kill -9 of the process while a client trains: weights and samples are bitwise those of the undisturbed run."""
    undisturbed = trained_through(tiny.model, tmp_path / "a", kills=0)
    killed = trained_through(tiny.model, tmp_path / "b", kills=6)
    assert undisturbed == killed


def trained_through(model, folder, kills, updates=24):
    """The adapter's bytes and the samples' texts at the end of a run whose server is killed now and then."""
    process = Process(model, folder, free_port(), snapshot_every=3)
    drawn, ended, left = random.Random(kills), threading.Event(), [kills]

    def kill():
        while left[0] and not ended.wait(drawn.uniform(0.2, 1.5)):
            process.end()
            left[0] -= 1
            process.start()

    def call(method, path, body=None):
        """Asked again until a server answers."""
        while True:
            try:
                return httpx.request(method, process.url + path, json=body, headers={"X-API-Key": KEY}, timeout=60)
            except httpx.TransportError:
                time.sleep(0.1)

    process.start()
    assert call("POST", "/v1/start", {**SMALL, "groups_per_batch": 2}).status_code == 200
    killer = threading.Thread(target=kill)
    killer.start()
    texts, update = [], 0
    while update < updates or left[0]:
        update += 1
        print(f"update {update}, {left[0]} kills left", flush=True)
        found = call("POST", "/v1/rollouts", {"prompts": ["Tom", "Ann"], "seed": update, "max_tokens": 8}).json()
        every = [one for group in found["rollouts"] for one in group["completions"]]
        if update <= updates:
            texts.append([one["text"] for one in every])
        rewards = [{"rollout_id": one["rollout_id"], "reward": len(set(one["text"]))} for one in every]
        answer = call("POST", "/v1/rewards", {"rewards": rewards}).json()
        assert "updates" in answer or answer["error"]["type"] == "duplicate_reward", answer
        if update == updates:
            weights = call("GET", "/v1/model").content
    ended.set()
    killer.join()
    process.end(signal.SIGTERM)
    with zipfile.ZipFile(io.BytesIO(weights)) as archive:
        return archive.read("adapter_model.safetensors"), texts


# ------------------------------------------------------------------------------------------- grpo_server's client


def test_grpo_servers_routes(served):
    """Every route of that project's client, with its bodies and answers."""
    client = served.client

    def call(path, body=None, code=200):
        answer = client.post(path, json=body, headers={"X-API-Key": "", "api-key": KEY})
        assert answer.status_code == code, answer.text
        return answer

    post(client, "start", **SMALL)
    call("/stop")
    call("/completions", {"prompt": "Tom"}, 409)
    call("/rewards", {"prompt": "Tom", "completions": [], "completion_tokens": [[1]], "rewards": [1]}, 409)
    call("/stop", code=409)
    settings = {"model_id": "./models/other", "max_completion_length": 4, "num_completions_per_prompt": 3}
    settings |= {"training_batch_size": 1, "learning_rate": 1e-3, "gradient_accumulation_steps": 1}
    settings |= {"logging_steps": 1, "max_steps": 2}
    assert call("/start", settings).json() == {"status": "started"}
    found = client.get("/status").json()
    assert found == {"training_settings": settings, "completion_requests_served": 0, "reward_requests_served": 0}
    assert "not the model_id ./models/other" in served.service.status()["refusals"][-1]["reason"]
    versions = []
    for _ in range(2):
        made = call("/completions", {"prompt": "Tom has"}).json()
        assert made["prompt"] == "Tom has" and len(made["completions"]) == len(made["completion_tokens"]) == 3
        prompt = client.post("/tokenize", json={"prompt": "Tom has"}).json()["tokens"]
        assert all(ids[: len(prompt)] == prompt and len(ids) > len(prompt) for ids in made["completion_tokens"])
        said = {key: made[key] for key in ("prompt", "completions", "completion_tokens")}
        wrong = {**said, "completion_tokens": [[*ids, 5] for ids in made["completion_tokens"]], "rewards": [1, 2, 3]}
        assert call("/rewards", wrong, 404).json()["error"]["type"] == "unknown_rollout"
        call("/rewards", {**said, "rewards": [1, 2]}, 422)
        versions += [made["model_version"], call("/rewards", {**said, "rewards": [1, 2.5, 0]}).json()["model_version"]]
        call("/rewards", {**said, "rewards": [1, 2, 3]}, 404 if len(versions) == 2 else 409)
    run = versions[0][0]
    assert versions == [[run, 0], [run, 1], [run, 1], [run, 2]]
    call("/completions", {"prompt": "Tom"}, 409)  # max_steps updates were made
    with zipfile.ZipFile(io.BytesIO(call("/model", {}).content)) as archive:
        assert "adapter_model.safetensors" in archive.namelist()
    assert client.get("/status", headers={"X-API-Key": ""}).status_code == 401
