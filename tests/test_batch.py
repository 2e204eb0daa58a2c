"""Masks and the shift: who is trained, who is not, and what each token weighs."""

from __future__ import annotations

import pytest
import torch

from grpo_gsm8k.trainer.batch import make_batch
from grpo_gsm8k.trainer.data import loss_weights, weighted, with_ref_logprobs
from grpo_gsm8k.trainer.logprobs import token_logprobs
from grpo_gsm8k.trainer.losses import CrossEntropy
from tests.toys import TableModel, rows, tensor_of, values_of

PAD = END = 9  # padding shares its id with the end of turn, as in many tokenizers


def trained_cells(sequences):
    """(row, token id) of every target whose logits get a gradient, by asking autograd."""
    torch.manual_seed(0)
    model = TableModel(torch.randn(10, 10))
    batch = make_batch(weighted(rows(*sequences, advantage=1.0), "token"), PAD)
    logp, _ = token_logprobs(model, batch)
    logp.retain_grad()
    (batch.weights * CrossEntropy()(logp, batch)).sum().backward()
    cells = logp.grad.nonzero().tolist()
    return [(b, int(batch.targets[b, t])) for b, t in cells]


def test_first_response_token_and_end_of_turn_are_trained_prompt_and_padding_are_not():
    assert trained_cells([([1, 2, 3, 4, END], 2), ([5, 6, END], 1)]) == [(0, 3), (0, 4), (0, END), (1, 6), (1, END)]


def test_a_truncated_row_has_no_gradient_on_a_token_that_was_not_sampled():
    assert trained_cells([([1, 2, 3, 4], 2), ([1, 2, 3, 4, 5, 6], 2)])[:2] == [(0, 3), (0, 4)]
    assert (0, END) not in trained_cells([([1, 2, 3, 4], 2), ([1, 2, 3, 4, 5, 6], 2)])


def test_mask_does_not_come_from_the_padding_id():
    # The end-of-turn id (= padding) inside a response and at its end is trained like any other.
    assert trained_cells([([1, 2, END, 4, END], 2)]) == [(0, END), (0, 4), (0, END)]


def test_known_logits_give_known_log_probabilities():
    table = torch.zeros(4, 4)
    table[1] = torch.tensor([0.0, 1.0, 2.0, 3.0]).log().nan_to_num(neginf=-1e9)  # after 1: 0, 1/6, 2/6, 3/6
    batch = make_batch(rows(([1, 3, 0], 1)))
    logp, said = token_logprobs(TableModel(table), batch)
    assert logp[0].tolist() == pytest.approx([-0.6931472, -1.3862944], abs=1e-6)  # log 1/2, log 1/4
    # -(1/6 log 1/6 + 1/3 log 1/3 + 1/2 log 1/2) and log 4, by hand
    assert said["entropy"].tolist() == pytest.approx([1.0114043, 1.3862944], abs=1e-6)
    assert said["top_prob"].tolist() == pytest.approx([0.5, 0.25])


def test_temperature_is_part_of_the_distribution():
    table = torch.tensor([[0.0, 0.6931472], [0.0, 0.0]])  # T = 1: 1/3, 2/3; T = 0.5: 1/5, 4/5
    batch = make_batch(rows(([0, 1], 1)))
    assert float(token_logprobs(TableModel(table), batch, 0.5)[0]) == pytest.approx(-0.2231436, abs=1e-6)


def test_weights_of_the_three_aggregations_by_hand():
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.float32)  # the last is masked out
    third, quarter, sixth = 1 / 3, 1 / 4, 1 / 6
    for how, first, second in [("sequence", quarter, sixth), ("token", 1 / 5, 1 / 5), ("constant", 1 / 20, 1 / 20)]:
        weights = loss_weights(mask, how, max_tokens=10)
        assert weights[0].tolist() == pytest.approx([0, first, first, 0]), how
        assert weights[1].tolist() == pytest.approx([0, second, second, second]), how
        assert weights[2].tolist() == [0, 0, 0, 0], how
    assert third  # the masked row is in no denominator: two responses count, not three


def test_an_all_masked_update_weighs_nothing_and_stays_finite():
    weights = loss_weights(torch.zeros(2, 3), "sequence")
    assert weights.tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_data_carry_the_weights_and_figures_that_the_tensors_have(aggregation):
    """To the last bit, so that data may be cut, reordered and sent elsewhere."""
    data = rows(([1, 2, 3, 4, END], 2), ([5, 6, END], 1), ([7, 8], 2), advantage=0.1, logprob=-0.3)
    whole = weighted(data, aggregation, 7)
    logp = torch.tensor([[0.0, -0.1, -0.2, -0.3], [-0.7, -0.9, 0.0, 0.0], [0.0] * 4])
    whole = with_ref_logprobs(whole, values_of(logp, data))
    batch = make_batch(whole)
    assert torch.equal(batch.weights, loss_weights(batch.mask, aggregation, 7))
    assert torch.equal(batch.ref_logprobs, logp) and torch.equal(tensor_of(values_of(logp, data)), logp)
    part = make_batch([whole[2], whole[1]])
    assert torch.equal(part.weights, batch.weights[[2, 1], :2])
    assert torch.equal(part.old_logprobs, batch.old_logprobs[[2, 1], :2])
    assert torch.equal(part.advantages, batch.advantages[[2, 1], :2])


def test_without_weights_a_loss_is_the_sum_over_the_trained_tokens():
    batch = make_batch(rows(([1, 2, 3, 4], 2), ([5, 6], 1)))
    assert torch.equal(batch.weights, batch.mask) and batch.mask.sum() == 3
