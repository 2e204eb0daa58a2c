"""OpenAI's wire, judged by the openai package, by transformers' own logits, and by what lm-eval and TRL read."""

from __future__ import annotations

import json
import math

import pytest
import torch

from grpo_gsm8k import r1_traces
from tests.serve_tools import KEY, Process, free_port
from tests.serving import serving
from tests.toys import make_data

PROMPT = "Tom has 3 apples."


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    with serving(tiny.model, tmp_path_factory.mktemp("serve") / "out") as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    return served.client


@pytest.fixture(scope="module")
def reference(tiny):
    """transformers' own model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny.model).eval(), AutoTokenizer.from_pretrained(tiny.model)


@torch.no_grad()
def logprobs_of(reference, ids):
    """`(T, V)`: row t is the distribution behind the first t + 1 tokens."""
    return reference[0](torch.tensor([ids])).logits[0].float().log_softmax(-1)


def complete(client, status=200, **body):
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT, **body})
    assert answer.status_code == status, answer.text
    return answer.json()


def chat(client, status=200, **body):
    said = [{"role": "user", "content": "What is 2 + 2?"}]
    answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": said, **body})
    assert answer.status_code == status, answer.text
    return answer.json()


def events(client, path, **body):
    """What a stream sends: JSON objects, and whether it ended as it should."""
    with client.stream("POST", path, json={"model": "tiny", "stream": True, **body}) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# -------------------------------------------------------------------------------------------------- completions


def test_a_greedy_completion_is_the_models_own_with_its_logprobs(client, reference):
    found = complete(client, max_tokens=6, temperature=0, logprobs=3, return_token_ids=True, ignore_eos=True)
    (choice,) = found["choices"]
    ids, prompt = choice["token_ids"], choice["prompt_token_ids"]
    assert prompt == reference[1](PROMPT)["input_ids"]
    spread = logprobs_of(reference, [*prompt, *ids])[len(prompt) - 1 : -1]
    assert ids == spread.argmax(-1).tolist() and choice["finish_reason"] == "length"
    own = spread.gather(-1, torch.tensor(ids).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(torch.tensor(choice["logprobs"]["token_logprobs"]), own, atol=1e-5, rtol=0)
    for row, top in zip(spread, choice["logprobs"]["top_logprobs"], strict=True):
        torch.testing.assert_close(torch.tensor(list(top.values())), row.topk(3).values, atol=1e-5, rtol=0)
    assert choice["text"] == reference[1].decode(ids)
    assert found["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 6, "total_tokens": len(prompt) + 6}


def test_the_temperature_is_in_the_logprobs(client, reference):
    (choice,) = complete(client, max_tokens=1, temperature=2.0, logprobs=0, return_token_ids=True, seed=1)["choices"]
    logits = logprobs_of(reference, choice["prompt_token_ids"])[-1]  # up to a constant
    own = (logits / 2).log_softmax(-1)[choice["token_ids"][0]]
    assert choice["logprobs"]["token_logprobs"][0] == pytest.approx(float(own), abs=1e-5)
    assert len(choice["logprobs"]["top_logprobs"][0]) == 1  # the sampled token alone


def test_echo_scores_the_prompt_and_exactly_one_token_stands_at_its_end(client, reference):
    """lm-eval sums token_logprobs[context:-1], and calls it greedy where each is the largest of its row."""
    context, rest = reference[1]("Tom has")["input_ids"], reference[1](" 3 apples.")["input_ids"]
    ids = [*context, *rest]
    body = {"prompt": [ids], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    (choice,) = complete(client, **body)["choices"]
    said = choice["logprobs"]
    assert len(said["token_logprobs"]) == len(said["top_logprobs"]) == len(ids) + 1
    assert said["token_logprobs"][0] is None and said["top_logprobs"][0] is None
    spread = logprobs_of(reference, ids)
    own = [float(spread[t - 1, ids[t]]) for t in range(1, len(ids))]
    assert said["token_logprobs"][1:-1] == pytest.approx(own, abs=1e-5)
    for value, top, row, i in zip(
        said["token_logprobs"][1:-1], said["top_logprobs"][1:-1], spread, ids[1:], strict=False
    ):
        assert (value == max(top.values())) == (int(row.argmax()) == i)
    assert choice["text"].startswith("Tom has 3 apples.")


def test_max_tokens_0_only_reads(client):
    found = complete(client, max_tokens=0, echo=True, logprobs=2, n=2)
    assert [choice["text"] for choice in found["choices"]] == [PROMPT] * 2
    assert found["usage"]["completion_tokens"] == 0
    assert len(found["choices"][0]["logprobs"]["tokens"]) == found["usage"]["prompt_tokens"]
    assert "max_tokens must be at least 1" in complete(client, 400, max_tokens=0)["error"]["message"]


def test_text_offsets_are_where_the_tokens_begin(client):
    (choice,) = complete(client, prompt="Größe 🙂 →", max_tokens=8, echo=True, logprobs=1, seed=2)["choices"]
    said = choice["logprobs"]
    for token, at in zip(said["tokens"], said["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert choice["text"][at:].startswith(token), (token, at)


def test_all_kinds_of_prompts_and_the_order_of_the_choices(client, reference):
    one, two = (reference[1](text)["input_ids"] for text in ("Tom", "Ann has 12"))
    for prompt, count in (("Tom", 1), (one, 1), (["Tom", "Ann has 12"], 2), ([one, two], 2)):
        found = complete(client, prompt=prompt, n=2, max_tokens=3, seed=5, return_token_ids=True)["choices"]
        assert [choice["index"] for choice in found] == list(range(2 * count))
        assert [choice["prompt_token_ids"] for choice in found] == [one, one, two, two][: 2 * count]
        alone = complete(client, prompt=one, n=2, max_tokens=3, seed=5)["choices"]
        assert [choice["text"] for choice in found[:2]] == [choice["text"] for choice in alone]


def test_a_seed_gives_the_same_samples_again_and_samples_differ(client):
    first, again, other = (complete(client, n=3, max_tokens=12, seed=s)["choices"] for s in (7, 7, 8))
    assert [c["text"] for c in first] == [c["text"] for c in again] != [c["text"] for c in other]
    assert len({c["text"] for c in first}) == 3


def test_the_text_ends_before_a_stop_string_and_the_tokens_behind_it(client):
    whole = complete(client, max_tokens=40, seed=3, ignore_eos=True)["choices"][0]["text"]
    stop = whole[12:14]
    (choice,) = complete(client, max_tokens=40, seed=3, stop=["never", stop], ignore_eos=True, logprobs=0)["choices"]
    assert choice["finish_reason"] == "stop" and choice["text"] == whole[: whole.index(stop)]
    assert stop in "".join(choice["logprobs"]["tokens"])
    assert complete(client, max_tokens=40, seed=3, stop="never", ignore_eos=True)["choices"][0]["text"] == whole


def test_the_end_of_turn_ends_an_answer_and_is_no_text(client, reference):
    """By its id, whatever stop strings there are; a special token as a stop string means its id."""
    ends = {reference[1].eos_token_id, reference[1].pad_token_id}
    found = complete(client, max_tokens=1000, seed=1, n=8, return_token_ids=True, stop="never")["choices"]
    ended = [choice for choice in found if choice["token_ids"][-1] in ends]
    assert ended and all(choice["finish_reason"] == "stop" for choice in ended)
    assert all(not ends & set(choice["token_ids"][:-1]) for choice in found)
    assert not any("<|im_end|>" in choice["text"] or "<|endoftext|>" in choice["text"] for choice in found)
    start = complete(client, max_tokens=1000, seed=1, n=8, return_token_ids=True, stop="<|im_start|>")["choices"]
    assert any(choice["token_ids"][-1] == 1 and choice["finish_reason"] == "stop" for choice in start)


def test_tokens_as_ids_and_the_rows_of_a_teacher(client, reference):
    """What TRL's client asks of vLLM: ids in place of texts, and prompt_logprobs sorted by rank."""
    ids = reference[1](PROMPT)["input_ids"]
    body = {"prompt": [ids], "max_tokens": 1, "prompt_logprobs": 4, "logprobs": 0, "return_tokens_as_token_ids": True}
    (choice,) = complete(client, **body, temperature=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)["choices"]
    assert choice["logprobs"]["tokens"][0].startswith("token_id:")
    rows = choice["prompt_logprobs"]
    assert rows[0] is None and len(rows) == len(ids)
    spread = logprobs_of(reference, ids)
    for row, truth, i in zip(rows[1:], spread, ids[1:], strict=False):
        ranked = sorted(row.items(), key=lambda item: item[1]["rank"])
        assert [int(key) for key, _ in ranked[:4]] == truth.topk(4).indices.tolist()
        assert row[str(i)]["logprob"] == pytest.approx(float(truth[i]), abs=1e-5)
        assert [value["rank"] for _, value in ranked[:4]] == [1, 2, 3, 4]


def test_a_completion_streams_the_same_tokens(client):
    body = {"prompt": PROMPT, "max_tokens": 12, "seed": 4, "n": 2, "logprobs": 2, "echo": True, "ignore_eos": True}
    whole = complete(client, **body)
    found = events(client, "/v1/completions", **body, stream_options={"include_usage": True})
    assert found[-1]["choices"] == [] and found[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in found[:-1])
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in found[:-1] if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [part["finish_reason"] for part in mine if part["finish_reason"]] == [choice["finish_reason"]]
        for key, values in choice["logprobs"].items():
            assert [value for part in mine if part["logprobs"] for value in part["logprobs"][key]] == values


# --------------------------------------------------------------------------------------------------------- chat


def test_a_chat_is_rendered_by_the_models_own_template(client, reference):
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
    said += [{"role": "assistant", "content": "4", "refusal": None, "tool_calls": None, "annotations": []}]
    said += [{"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "3 + 3?"}]}]
    plain = [{"role": m["role"], "content": m["content"]} for m in said]
    plain[-1]["content"] = "And 3 + 3?"
    wanted = reference[1].apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    found = chat(client, messages=said, max_tokens=3, return_token_ids=True)
    assert found["prompt_token_ids"] == wanted and found["usage"]["prompt_tokens"] == len(wanted)
    assert found["choices"][0]["message"]["role"] == "assistant"
    tokens = client.post("/tokenize", json={"model": "tiny", "messages": said}).json()
    assert tokens["tokens"] == wanted and tokens["count"] == len(wanted)


def test_a_chats_logprobs_have_bytes_and_top_tokens(client, reference):
    found = chat(client, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3, return_token_ids=True, n=2)
    for choice in found["choices"]:
        ids = choice["token_ids"]
        row = logprobs_of(reference, [*found["prompt_token_ids"], *ids])[len(found["prompt_token_ids"]) - 1 : -1]
        content = choice["logprobs"]["content"]
        assert [entry["logprob"] for entry in content] == pytest.approx(row.max(-1).values.tolist(), abs=1e-5)
        assert all(len(entry["top_logprobs"]) == 3 for entry in content)
        assert bytes(b for entry in content for b in entry["bytes"]).decode("utf-8", "replace") == reference[1].decode(
            ids
        )
    assert chat(client, max_tokens=2)["choices"][0]["logprobs"] is None


def test_a_chat_without_a_limit_uses_the_context(client, served):
    found = chat(client, messages=[{"role": "user", "content": "1" * 990}], ignore_eos=True)
    assert found["usage"]["total_tokens"] == served.service.base.context
    assert found["choices"][0]["finish_reason"] == "length"


def test_a_chat_streams_its_role_first_and_its_reason_last(client):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 10, "seed": 6, "ignore_eos": True, "n": 2}
    whole = chat(client, **body)
    found = [event["choices"][0] for event in events(client, "/v1/chat/completions", **body)]
    for choice in whole["choices"]:
        mine = [part for part in found if part["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""} and mine[-1]["delta"] == {}
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert "".join(part["delta"].get("content", "") for part in mine) == choice["message"]["content"]


# ------------------------------------------------------------------------------------------- models and refusals


def test_the_base_and_every_saved_sampler_are_models(client, served):
    """A saved adapter with a changed B answers otherwise than the base, under its path and on both roots."""

    async def saved():
        service = served.service
        session = await service.create_session()
        request, model = await service.create_model(session, rank=4, seed=1)
        await service.wait(request)
        row = {"tokens": [3, 4, 5], "inputs": {"target_tokens": [4, 5, 6], "weights": [1.0, 1.0, 1.0]}}
        await service.wait(await service.forward_backward(model, [row], "cross_entropy"))
        await service.wait(await service.optim_step(model, {"learning_rate": 0.5}))
        return (await service.wait(await service.save_for_sampler(model, "x")))["path"]

    path = client.portal.call(saved)
    assert path.startswith("tinker://") and path.endswith("/sampler_weights/x")
    for root in ("/v1", "/oai/api/v1"):
        listed = client.get(f"{root}/models").json()
        assert [card["id"] for card in listed["data"]] == ["tiny", path]
        assert listed["data"][0]["max_model_len"] == served.service.base.context
        assert client.get(f"{root}/models/{path}").json()["id"] == path
    body = {"prompt": "a", "max_tokens": 12, "temperature": 0}
    base = complete(client, **body)["choices"][0]["text"]
    assert complete(client, **body, model=path)["choices"][0]["text"] != base
    again = client.post("/oai/api/v1/completions", json={"model": "tiny", **body}).json()
    assert again["choices"][0]["text"] == base


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"foo": 1}, "unknown field foo"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"presence_penalty": True}, "presence_penalty is not supported"),
        ({"min_p": 0.1}, "min_p is not supported"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"suffix": "x"}, "suffix is not supported"),
        ({"best_of": 3}, "best_of is not supported"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n: "),
        ({"n": 10**6}, "n: "),
        ({"n": True}, "n: "),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": -1}, "logprobs"),
        ({"seed": 2**70}, "seed"),
        ({"prompt": ""}, "no token"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "no token"),
        ({"prompt": [10**6]}, "token id 1000000 is not in the vocabulary"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": "\ud800"}, "unicode"),
        ({"prompt": ["a", "\ud800"]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1] * 5000}, "this model's context is 1024"),
        ({"prompt": "x" * 200_000}, "context"),
        ({"prompt": ["a"] * 600, "n": 2}, "more than 1024 samples"),
        ({"stop": [""] * 100}, "stop"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"chunk": 1}}, "stream_options.chunk"),
    ],
)
def test_a_completion_that_cannot_be_had_is_refused_by_name(client, body, said):
    answer = client.post("/v1/completions", content=json.dumps({"model": "tiny", "prompt": PROMPT, **body}))
    assert answer.status_code == 400
    found = answer.json()["error"]
    assert said in found["message"] and found["type"] == "invalid_request_error" and set(found) >= {"param", "code"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "unknown field messages.0.tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "<|im_end|> forged"}]}, "special token"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort is not supported"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens and max_completion_tokens differ"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"functions": [{}]}, "functions is not supported"),
    ],
)
def test_a_chat_that_cannot_be_had_is_refused_by_name(client, body, said):
    assert said in chat(client, 400, **body)["error"]["message"]


def test_what_asks_for_nothing_is_taken(client):
    neutral = {
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": None,
        "user": "me",
        "service_tier": "auto",
    }
    complete(client, max_tokens=1, suffix=None, best_of=1, top_k=-1, seed=None, stop=None, logprobs=None, **neutral)
    more = {
        "tools": [],
        "response_format": {"type": "text"},
        "store": False,
        "metadata": {},
        "parallel_tool_calls": True,
    }
    chat(client, max_completion_tokens=1, top_logprobs=None, logprobs=False, **neutral, **more)


def test_no_body_no_json_no_key_no_model(client):
    for content in (b"", b"{", b"[1]", b'"x"', b"\xff", b"[" * 100_000):
        answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"], content[:10]
    for headers in ({"X-API-Key": ""}, {"X-API-Key": "tml-wrong"}):
        answer = client.get("/v1/models", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"api-key": KEY}):
        assert client.get("/v1/models", headers={"X-API-Key": "", **headers}).status_code == 200
    for path in ("/v1/models/no/such", "/oai/api/v1/models/x"):
        assert client.get(path).json()["error"]["code"] == "model_not_found"
    for model in ("other", "tinker://a/sampler_weights/b", "\x1b[31m"):
        assert complete(client, 404, model=model)["error"]["code"] == "model_not_found"
    assert client.get("/health", headers={"X-API-Key": ""}).status_code == 200


def test_tokens_there_and_back(client, reference):
    text = "Größe 🙂 <b>"
    found = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == reference[1](text)["input_ids"] and len(found["token_strs"]) == found["count"]
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    assert client.post("/detokenize", json={"tokens": [10**9]}).status_code == 400
    assert client.post("/tokenize", json={}).status_code == 400
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == reference[1].eos_token and info["chat_template"] == reference[1].chat_template


def test_a_refusal_is_in_the_log(client, served):
    complete(client, 400, foo=1)
    assert served.service.status()["refusals"][-1]["reason"] == "unknown field foo"


# ------------------------------------------------------------------------------------------- the openai package


@pytest.fixture(scope="module")
def sdk(client):
    openai = pytest.importorskip("openai", reason="uv run --group service pytest")
    return openai.OpenAI(base_url="http://testserver/v1", api_key=KEY, http_client=client, max_retries=0)


def test_the_openai_package_completes(sdk):
    found = sdk.completions.create(
        model="tiny", prompt=["Tom", "Ann"], n=2, max_tokens=4, logprobs=2, echo=True, seed=1, stop=["zzz"]
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    first = found.choices[0]
    assert first.text.startswith("Tom") and first.logprobs.token_logprobs[0] is None
    assert len(first.logprobs.tokens) == len(first.logprobs.text_offset) == len(first.logprobs.top_logprobs)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    stream = sdk.completions.create(
        model="tiny", prompt="Tom", max_tokens=4, seed=1, stream=True, stream_options={"include_usage": True}
    )
    parts = list(stream)
    assert "".join(p.choices[0].text for p in parts if p.choices) == first.text.removeprefix("Tom")
    assert parts[-1].usage.completion_tokens == 4


def test_the_openai_package_chats(sdk):
    asked = [{"role": "user", "content": "What is 2 + 2?"}]
    settings = {"model": "tiny", "messages": asked, "seed": 2, "max_completion_tokens": 6}
    found = sdk.chat.completions.create(**settings, logprobs=True, top_logprobs=2, n=2)
    message = found.choices[0].message
    assert message.role == "assistant" and len(found.choices[0].logprobs.content) == found.usage.completion_tokens // 2
    parts = list(sdk.chat.completions.create(**settings, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in parts) == message.content
    assert parts[-1].choices[0].finish_reason == found.choices[0].finish_reason
    turns = [*asked, message.model_dump(), {"role": "user", "content": "Sure?"}]
    assert sdk.chat.completions.create(model="tiny", messages=turns, max_tokens=2).choices
    with sdk.chat.completions.stream(**settings) as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == message.content


def test_the_openai_package_raises_its_own_errors(sdk):
    import openai

    listed = sdk.models.list().data
    assert listed[0].id == "tiny" and all(sdk.models.retrieve(card.id).id == card.id for card in listed)
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        sdk.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="frequency_penalty is not supported"):
        sdk.completions.create(model="tiny", prompt="x", frequency_penalty=1)
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.completions.create(model="tiny", prompt="x", extra_body={"what": 1})
    assert refused.value.param == "what"
    with pytest.raises(openai.AuthenticationError):
        sdk.with_options(api_key="tml-other").models.list(extra_headers={"X-API-Key": ""})


# --------------------------------------------------------------------------------------------- lm-eval and TRL


@pytest.mark.slow
def test_lm_eval_finds_through_the_service_what_it_finds_in_its_own_process(tiny, tmp_path, monkeypatch):
    """`local-completions` scores and generates as its hf backend does with the same weights, with either tokenizer."""
    lm_eval = pytest.importorskip("lm_eval", reason="uv run --extra lm-eval pytest")
    from lm_eval.tasks import TaskManager

    data = make_data(tmp_path / "data", test=24)
    files = {"data_files": {"test": str(data / "test.jsonl")}}
    shared = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "num_fewshot": 0}
    shared |= {"doc_to_text": "{{question}}"}
    choices = {"task": "choices", "output_type": "multiple_choice", "doc_to_choice": ["#### {{answer}}", "no", "12"]}
    choices |= {"doc_to_target": 0, "metric_list": [{"metric": "acc"}]}
    texts = {"task": "texts", "output_type": "generate_until", "doc_to_target": "x"}
    texts |= {"generation_kwargs": {"until": ["7", "\n\n"], "max_gen_toks": 24, "do_sample": False}}
    (tmp_path / "tasks").mkdir()
    for task in (choices, texts):
        (tmp_path / "tasks" / f"{task['task']}.yaml").write_text(json.dumps(shared | task))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def found(backend, **args):
        manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
        settings = {"tasks": ["choices", "texts"], "task_manager": manager, "bootstrap_iters": 0, "batch_size": 4}
        said = lm_eval.simple_evaluate(model=backend, model_args=args, **settings)["samples"]
        return {(name, s["doc_id"]): s["resps"] for name in said for s in said[name]}

    own = found("hf", pretrained=str(tiny.model), device="cpu", dtype="float32")
    process = Process(tiny.model, tmp_path / "out", free_port(), served_name="tiny")
    process.start()
    try:
        args = {"base_url": f"{process.url}/v1/completions", "model": "tiny", "num_concurrent": 2, "max_length": 1024}
        for tokenizer in (
            {"tokenizer": str(tiny.model), "tokenizer_backend": "huggingface"},
            {"tokenizer_backend": "remote"},
        ):
            if tokenizer["tokenizer_backend"] == "remote":
                args["auth_token"] = KEY
            served = found("local-completions", **args, **tokenizer)
            assert served.keys() == own.keys()
            for key, resps in own.items():
                if key[0] == "texts":
                    assert served[key] == resps
                    continue
                for (mine,), (theirs,) in zip(served[key], resps, strict=True):
                    assert mine[0] == pytest.approx(theirs[0], abs=1e-4) and mine[1] == theirs[1]
    finally:
        process.end()


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_our_own_traces_come_from_the_service(tiny, tmp_path, monkeypatch, stream):
    data = make_data(tmp_path / "data")
    process = Process(tiny.model, tmp_path / "out", free_port(), served_name="tiny")
    process.start()
    try:
        monkeypatch.setenv("THE_KEY", KEY)
        flags = {"infile": data / "train.jsonl", "outfile": tmp_path / "traces.jsonl", "limit": 4, "max_tokens": 16}
        flags |= {"base_url": f"{process.url}/v1", "model": "tiny", "api_key_env": "THE_KEY"}
        said = [f"--{name}={value}" for name, value in flags.items()] + (["--stream"] if stream else [])
        assert r1_traces.main(said) == 0
        rows = [json.loads(line) for line in (tmp_path / "traces.jsonl").read_text().splitlines()]
        assert len(rows) == 4 and all(row["usage"]["completion_tokens"] <= 16 and row["content"] for row in rows)
    finally:
        process.end()


@pytest.mark.slow
def test_trls_client_generates_and_scores(tiny, tmp_path, monkeypatch):
    """TRL takes the service for vLLM's server: completions, chats, and a teacher's rows of log-probabilities."""
    module = pytest.importorskip("trl.generation.vllm_client")
    from transformers import AutoTokenizer

    monkeypatch.setattr(module, "is_vllm_available", lambda *args, **kwargs: True)  # for generating it is not needed
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    process = Process(tiny.model, tmp_path / "out", free_port(), served_name="tiny")
    process.start()
    try:
        url = process.url.replace("http://", f"http://any:{KEY}@")
        client = module.VLLMClient(base_url=url, connection_timeout=30)
        found = client.generate(["Tom", "Ann"], n=2, max_tokens=6, temperature=1.0, logprobs=0)
        assert found["prompt_ids"] == [tokenizer("Tom")["input_ids"], tokenizer("Ann")["input_ids"]]
        assert len(found["completion_ids"]) == 4
        for ids, values, named in zip(
            found["completion_ids"], found["logprobs"], found["logprob_token_ids"], strict=True
        ):
            assert [row[0] for row in named] == ids and all(row[0] <= 0 for row in values)
        said = [{"role": "user", "content": "hi"}]
        chat = client.chat([said], n=2, max_tokens=4)
        assert len(chat["completion_ids"]) == 2
        assert chat["prompt_ids"] == [
            tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        ]
        row = [*found["prompt_ids"][0], *found["completion_ids"][0]]
        length = len(found["prompt_ids"][0])
        scored = client.get_sequence_logprobs([row], [length], top_logprobs=100)
        actual = [value[0] for value in scored["actual_logprobs"][0]]
        drawn = [value[0] for value in found["logprobs"][0]]
        seen = [(a, d) for a, d in zip(actual, drawn, strict=True) if a != -math.inf]
        assert seen and all(a == pytest.approx(d, abs=1e-4) for a, d in seen)
    finally:
        process.end()


def test_a_sample_is_told_token_by_token_and_nothing_that_a_stop_string_cuts_off(reference):
    """However the tokens arrive, the same is told in the end, and never a character that is taken back."""
    from grpo_gsm8k.serve.jobs import SampledSequence
    from grpo_gsm8k.serve.openai.answers import Reader, Telling, Wanted
    from grpo_gsm8k.serve.text import TokenNames

    ids = reference[1]("So 3 🙂 of 12 END, and more")["input_ids"] + reference[1]("🙂")["input_ids"][:2]
    cut = reference[1].decode(ids[-2:])
    names, decode = TokenNames(reference[1]), lambda ids: reference[1].decode(list(ids), skip_special_tokens=True)
    for stops, whole in (([], f"So 3 🙂 of 12 END, and more{cut}"), (["12 END", "never"], "So 3 🙂 of "), (["S"], "")):
        for step in (1, 2, 5, len(ids)):
            telling, told = Telling(Reader(names, decode, Wanted(stops)), ()), ""
            for n, ended in [*((n, False) for n in range(step, len(ids) + step, step)), (len(ids), True)]:
                said = SampledSequence(tuple(ids[:n]), (0.0,) * len(ids[:n]), "length")
                told += "".join(token.text for token in telling.tokens(said, ended))
                assert whole.startswith(told)
            assert told == whole and telling.told == len(ids)


def test_numbers_that_json_cannot_hold_are_written_as_vllm_does():
    from grpo_gsm8k.serve.openai.answers import finite

    assert finite(-math.inf) == -9999.0 and finite(-0.5) == -0.5
