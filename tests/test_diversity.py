"""Diversity and repetition by hand."""

from __future__ import annotations

import pytest

from grpo_gsm8k.evals.diversity import distinct, diversity


def test_by_hand():
    groups = [[[1, 2, 1, 2], [1, 2, 1, 2]], [[3, 4, 5], [6]]]
    found = diversity(groups)
    # First group: ids 1, 2 of 8; pairs 12, 21 of 6. Second: 3, 4, 5, 6 of 4; 34, 45 of 2.
    assert found["diversity/distinct_1"] == pytest.approx((2 / 8 + 1) / 2)
    assert found["diversity/distinct_2"] == pytest.approx((2 / 6 + 1) / 2)
    assert found["diversity/unique_frac"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["diversity/repeated_4grams"] == 0  # one 4-gram a completion, or none at all


def test_a_phrase_over_and_over():
    loop, free = [1, 2, 3, 4] * 5, list(range(20))
    # 17 windows; the loop has 4 distinct ones
    assert diversity([[loop, free]])["diversity/repeated_4grams"] == pytest.approx((13 / 17 + 0) / 2)


def test_the_batch_size_does_not_move_it():
    group = [[1, 2, 3], [1, 2, 4]]
    assert diversity([group]) == pytest.approx(diversity([group] * 7))


def test_empty_completions_count_as_completions():
    assert distinct([[]], 1) is None
    assert diversity([[[], []]]) == {"diversity/unique_frac": 0.5}


def test_grpo_logs_it_where_it_keeps_samples(tiny, tmp_path):
    import json

    from grpo_gsm8k import grpo
    from tests.toys import stage_config

    flags = {"steps": 3, "rollouts_per_step": 8, "group_size": 4, "eval_every": 2, "max_new_tokens": 8}
    grpo.run(stage_config("grpo", **flags, model_id=str(tiny.model), data=str(tiny.data), out_dir=str(tmp_path / "r")))
    rows = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert ["diversity/unique_frac" in row for row in rows] == [False, True, True]
    kept = [json.loads(line) for line in (tmp_path / "r/samples/step_000002.jsonl").read_text().splitlines()]
    texts = [{row["response"] for row in kept if row["group"] == g} for g in (0, 1)]
    assert rows[1]["diversity/unique_frac"] >= sum(map(len, texts)) / 8  # texts may coincide where ids do not
