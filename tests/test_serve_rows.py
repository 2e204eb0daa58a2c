"""Rows that are decoded side by side have the bits that each has alone, under every adapter; or they are not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_gsm8k import config
from grpo_gsm8k.serve import decoders
from grpo_gsm8k.serve.adapters import BaseModel, ModelSpec
from grpo_gsm8k.serve.jobs import Refusal, SampleJob
from grpo_gsm8k.serve.sampling import Sampler
from grpo_gsm8k.serve.weights import SampleWeights
from tests.serve_tools import in_process


@pytest.fixture(scope="module")
def base(tiny) -> BaseModel:
    flags = {"model_id": str(tiny.model), "device": "cpu", "dtype": "float32"}
    return BaseModel(config.build(config.ModelConfig, flags))


@pytest.fixture(scope="module")
def sampler(base: BaseModel) -> Sampler:
    return Sampler(base)


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> Iterator[None]:
    decoders.sums_alike.cache_clear()
    yield
    decoders.sums_alike.cache_clear()


def jobs_of(draw: random.Random, longest: int = 40) -> list[SampleJob]:
    """A few requests of different lengths, with several samples each."""
    prompts = [tuple(draw.randrange(3, 300) for _ in range(draw.randrange(1, longest))) for _ in range(5)]
    asked: dict[str, Any] = {"stop_ids": (), "prompt_logprobs": True}
    return [SampleJob(ids, draw.randrange(1, 4), 6, seed=draw.randrange(2**30), **asked) for ids in prompts]


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8, 32])
def test_rows_under_an_adapter_have_the_bits_that_they_have_alone(base, sampler, rank: int) -> None:
    """With two or three columns, a product of eight rows is summed in another order than one of sixteen."""
    spec = ModelSpec(rank)
    base.put("adapter", spec)
    draws = torch.Generator().manual_seed(rank)
    for parameter in base.parameters("adapter").values():
        parameter.data.normal_(0, 0.3, generator=draws)
    assert sampler.rowwise and sampler.adapted(base.model, base.targets(spec), rank)
    model, draw = base.activate("adapter"), random.Random(rank)
    for _ in range(4):
        jobs = jobs_of(draw)
        assert sampler.decode(model, jobs) == [sampler.decode(model, [job])[0] for job in jobs]
    base.drop("adapter")


def test_prompts_that_are_read_in_parts_are_read_the_same(base, sampler, monkeypatch) -> None:
    jobs, model = jobs_of(random.Random(0), 90), base.activate("")
    whole, parts, prefill = sampler.decode(model, jobs), [], decoders.RowDecoder._prefill
    monkeypatch.setattr(decoders, "MOST_ROWS", 128)
    monkeypatch.setattr(decoders.RowDecoder, "_prefill", lambda *given: parts.append(given[1]) or prefill(*given))
    assert sampler.decode(model, jobs) == whole
    assert sorted(map(len, parts))[-1] > 1 and len(parts) > 1
    lengths = [len(part) * decoders.up(len(part[-1]), sampler.align) for part in parts]
    assert all(cells <= 128 or len(part) == 1 for cells, part in zip(lengths, parts, strict=True))


@pytest.mark.parametrize("other", [48, 288, 2048])
def test_a_product_that_sums_in_another_order_is_found(monkeypatch, other: int) -> None:
    linear = torch.nn.functional.linear
    sizes = (8, 3, torch.float32, 16, 1)
    assert decoders.sums_alike(*sizes)
    decoders.sums_alike.cache_clear()

    def turned(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear(x.flip(1), weight.flip(1)) if len(x) == other else linear(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", turned)
    assert not decoders.sums_alike(*sizes)


def test_where_rows_are_not_independent_each_request_is_decoded_by_itself(tiny, tmp_path: Path, monkeypatch) -> None:
    found = []
    for together in (True, False):
        monkeypatch.setattr(Sampler, "adapted", lambda *_, verdict=together: verdict)
        with in_process(tiny.model, tmp_path / str(together)) as client:
            engine = client.service.engine  # type: ignore[attr-defined]
            monkeypatch.setattr("grpo_gsm8k.serve.engine.GATHER_S", 1.0)
            model = client.model(rank=2)
            saved = client.submit("save_weights_for_sampler", model, sampling_session_seq_id=0, kind="snapshot")
            sampling, most = client.result(saved)["sampling_session_id"], []
            advance = engine._advance
            engine._advance = lambda batch, a=advance, m=most: m.append(len(batch.jobs)) or a(batch)
            sent = [client.submit_sample(sampling, [5, 9, 14], k, seed=k, stop=[]) for k in range(6)]
            found.append([client.result(each) for each in sent])
        assert max(most) == (6 if together else 1)
    assert found[0] == found[1]


def test_weights_that_were_deleted_while_samples_waited_stop_nothing(base, tmp_path: Path) -> None:
    weights = SampleWeights(base, tmp_path)
    assert weights.together("gone")
    with pytest.raises(Refusal, match="deleted"):
        weights.model("gone")
