"""Our losses on the Tinker wire: for each, value and gradient are the local ones, by the wire's losses written anew."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from grpo_gsm8k import config
from grpo_gsm8k.datatypes import Datum
from grpo_gsm8k.engines.service import Checkpoint
from grpo_gsm8k.errors import CheckpointError, ConfigError, NonFiniteError
from grpo_gsm8k.trainer import wire
from grpo_gsm8k.trainer.batch import make_batch
from grpo_gsm8k.trainer.data import ImportanceCorrection, weighted
from grpo_gsm8k.trainer.losses import (
    Cispo,
    CrossEntropy,
    GrpoClip,
    Gspo,
    Luspo,
    Objective,
    Reinforce,
    Sapo,
    Vespo,
    make_loss,
    rows_to_train,
    update_loss,
)
from grpo_gsm8k.trainer.remote import RemoteLearner
from tests.fake_training import FakeService, Table
from tests.toys import stage_config

V = 11
LOGITS = torch.randn(V, V, generator=torch.Generator().manual_seed(0))


def squared(logp, batch):
    """A loss of a user's own, which no wire has."""
    return (logp - batch.old_logprobs).square() * batch.advantages.abs() * batch.mask


def rows(aggregation="sequence", spread=1.0, same=True):
    """Five rows off-policy by `spread`: two of a prompt, one of several turns, one without advantage, one masked out.

    Args:
        same: one advantage a response.
    """
    noise, drawn = torch.Generator().manual_seed(2), []
    logp = LOGITS.log_softmax(-1)
    for ids, mask, advantage in (
        ((1, 2, 3, 4, 5, 6), (0, 0, 1, 1, 1, 1), 1.2),
        ((1, 2, 7, 8), (0, 0, 1, 1), -0.7),
        ((3, 9, 10, 2, 4, 1, 8, 3), (0, 1, 1, 0, 0, 1, 1, 1), -1.5),
        ((5, 6, 7, 1), (0, 1, 1, 1), 0.0),
        ((5, 6, 9), (0, 0, 0), 2.0),
    ):
        own = [0.0, *(float(logp[a, b]) for a, b in pairwise(ids))]
        moved = (torch.randn(len(ids), generator=noise) * spread).tolist()
        old = tuple(m * (x + d) for m, x, d in zip(mask, own, moved, strict=True))
        ref = tuple(m * (x - 0.3 * d + 0.1) for m, x, d in zip(mask, own, moved, strict=True))
        each = tuple(m * advantage * (1 if same else 1 + 0.1 * k) for k, m in enumerate(mask))
        drawn.append(Datum(ids, mask, old, each, ref))
    return weighted(drawn, aggregation, 16)


def local(objective, data):
    """The loss and its gradient in the table, by autograd through `update_loss` alone."""
    logits = LOGITS.clone().double().requires_grad_()
    batch = make_batch(data)
    logp = logits[batch.input_ids].log_softmax(-1).gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
    loss = update_loss(logp.float() * batch.mask, batch, objective)
    loss.backward()
    return float(loss.detach()), logits.grad


def learner(service=None, section="sft", start=None, **flags):
    cfg = stage_config(section, learner="tinker", lora_rank=4, **flags)
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    return RemoteLearner(service or FakeService(LOGITS), start or Checkpoint("base"), tokenizer, cfg)


TRUNCATED = ImportanceCorrection("truncate", 1.3, 0.8)
CLIP = GrpoClip(0.2, 0.3)
CASES = {
    "cross_entropy": (Objective(CrossEntropy()), "cross_entropy"),
    "reinforce": (Objective(Reinforce()), "cross_entropy"),
    "grpo_clip": (Objective(CLIP), "ppo"),
    "no lower clip": (Objective(GrpoClip(1.5, 0.3)), "ppo"),
    "importance_sampling": (Objective(GrpoClip(1.0, 1e9)), "importance_sampling"),
    "cispo": (Objective(Cispo(0.4, 0.5)), "cispo"),
    "gspo": (Objective(Gspo(0.05, 0.08)), "gspo"),
    "dual_clip": (Objective(GrpoClip(0.2, 0.2, 1.4)), "custom"),
    "luspo": (Objective(Luspo(0.05, 0.08)), "custom"),
    "sapo": (Objective(Sapo()), "custom"),
    "vespo": (Objective(Vespo()), "custom"),
    "of one's own": (Objective(make_loss("tests.test_wire:squared", {})), "custom"),
    "on-policy": (Objective(CLIP, on_policy=True), "cross_entropy"),
    "sapo on-policy": (Objective(Sapo(), on_policy=True), "cross_entropy"),
    "gspo on-policy": (Objective(Gspo(), on_policy=True), "custom"),
    "truncated": (Objective(CLIP, on_policy=True, correction=TRUNCATED), "custom"),
    **{
        f"kl {kind} {'' if corrected else 'alone'}": (
            Objective(CLIP, kl_coef=0.3, kl_estimator=kind, kl_bias_correction=corrected),
            "custom",
        )
        for kind in ("k1", "k2", "k3")
        for corrected in (True, False)
    },
}


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("name", CASES)
def test_a_loss_on_the_wire_has_the_value_and_the_gradient_that_it_has_here(name, aggregation):
    objective, expected = CASES[name]
    data = rows(aggregation)
    loss, gradient = local(objective, data)
    assert gradient.abs().max() > 1e-3
    for wire_loss in ("auto", "custom"):
        mine = learner(wire_loss=wire_loss)
        found = mine.forward_backward(data, objective)
        assert found["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert mine.client.logits.grad == pytest.approx(gradient, rel=1e-5, abs=1e-6)
        if type(objective.loss) in (GrpoClip, Gspo, Cispo) and not objective.on_policy and "import" not in name:
            assert found["policy/clip_frac"] > 0
        alone = wire_loss == "custom" or expected == "custom"
        assert mine.client.sent == ["cross_entropy" if alone else expected]


def test_a_gspo_whose_tokens_differ_in_advantage_shares_the_ratio_and_is_computed_here():
    objective, data = Objective(Gspo(0.05, 0.08)), rows(same=False)
    mine = learner()
    mine.forward_backward(data, objective)
    assert mine.client.sent == ["cross_entropy"]
    assert mine.client.logits.grad == pytest.approx(local(objective, data)[1], rel=1e-5, abs=1e-6)


def test_a_clipped_target_stays_a_target_on_the_wire():
    """Which targets are trained decides how a service of ours packs rows, and so the order of its sums."""
    batch = make_batch(rows(spread=2.0))
    kept, logp = rows_to_train(batch, Objective(CLIP)), learner().logprobs(rows())
    tensor = torch.zeros_like(batch.mask)
    for row, values in enumerate(logp):
        tensor[row, : batch.lengths[row]] = torch.tensor(values[1:])
    sent = wire.surrogate(tensor, batch, kept, Objective(CLIP), wire.Layout(64, True)).inputs["weights"]
    assert (sent[kept] != 0).equal(batch.mask[kept].bool())
    assert (sent[kept].abs() == wire.TINY).any()
    assert torch.tensor(1.0) + wire.TINY == 1 and not sent[batch.mask == 0].any()


def test_an_update_may_be_split_as_one_likes():
    objective, data = Objective(CLIP), rows()
    whole, parts = learner(), learner()
    loss = whole.forward_backward(data, objective)["loss"]
    both = sum(parts.forward_backward(data[k : k + 1], objective)["loss"] for k in range(3))
    assert both == pytest.approx(loss, rel=1e-5)
    assert parts.client.logits.grad == pytest.approx(whole.client.logits.grad, rel=1e-5, abs=1e-7)


def test_figures_of_the_policy_are_those_of_a_local_run_but_for_the_whole_distribution():
    found = learner().forward_backward(rows(), Objective(CLIP, kl_coef=0.1))
    assert 0 < found["policy/clip_frac"] < 1 and found["mismatch/logp_abs_max"] > 0 and found["policy/kl_ref"] > 0
    assert found["perf/skipped_rows_frac"] == pytest.approx(1 / 5)
    assert "policy/entropy" not in found
    assert learner().forward_backward(rows(), Objective(CLIP))["perf/skipped_rows_frac"] == pytest.approx(2 / 5)


def test_log_probabilities_stand_at_the_trained_tokens_and_nowhere_else():
    data = rows()
    found = learner().logprobs(data)
    logp = LOGITS.log_softmax(-1)
    for row, values in zip(data, found, strict=True):
        assert len(values) == len(row.token_ids)
        for k, mask in enumerate(row.mask):
            expected = float(logp[row.token_ids[k - 1], row.token_ids[k]]) if mask else 0.0
            assert values[k] == pytest.approx(expected, abs=1e-6)


def test_the_reference_is_a_model_of_its_own_that_nobody_trains():
    service = FakeService(LOGITS)
    mine = learner(service)
    mine.forward_backward(rows(), Objective(CLIP))
    assert mine.reference_logprobs(rows()) == mine.logprobs(rows())
    assert mine.reference is not mine.client and mine.reference.logits.grad is None
    assert service.made == [("base", 4, 0), ("base", 4, 0)]


def test_a_loss_that_is_no_number_stops_the_run_before_a_gradient_is_sent():
    broken = rows()
    broken[0] = replace(broken[0], logprobs=(0.0, 0.0, math.nan, 0.0, 0.0, 0.0))
    mine = learner(wire_loss="custom")
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        mine.forward_backward(broken, Objective(CLIP))
    assert mine.client.sent == []


def test_the_optimizer_has_the_settings_that_a_local_one_has():
    mine = learner(beta1=0.8, beta2=0.99, weight_decay=0.1, grad_clip=0.5)
    assert mine.step(0.25) == {"policy/lr": 0.25, "policy/grad_norm": 1.5}
    sent = vars(mine.client.adam)
    assert sent == {
        "learning_rate": 0.25,
        "beta1": 0.8,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "grad_clip_norm": 0.5,
    }


# ------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_names_its_state_and_is_continued_with_the_optimizer(tmp_path):
    service = FakeService(LOGITS)
    mine, folder = learner(service), tmp_path / ".writing_000003"
    folder.mkdir()
    before = mine.publish(3)
    assert before is mine.publish(3) and isinstance(before.where, str)
    mine.save(folder)
    assert mine.publish(3).where == "tinker://run1/sampler_weights/step_000003"
    again = learner(service)
    again.load(folder)
    assert service.made[-1] == ("tinker://run1/weights/step_000003", True)
    again.save(folder)  # the same step once more, by another model
    again.save(folder)
    again.forget(folder)
    assert service.deleted == [
        "tinker://run2/weights/step_000003_2",
        "tinker://run2/sampler_weights/step_000003_2",
    ]


def test_a_stage_goes_on_from_the_weights_of_another_one_with_a_fresh_optimizer(tmp_path):
    service = FakeService(LOGITS)
    start = Checkpoint("base", 8, "run0", "tinker://run0/weights/x", "tinker://run0/sampler_weights/x")
    cfg = stage_config("sft", learner="tinker")
    mine = RemoteLearner(service, start, SimpleNamespace(save_pretrained=lambda folder: None), cfg)
    assert isinstance(mine.client, Table) and mine.rank == 8
    assert service.made == [("tinker://run0/weights/x", False)]
    with pytest.raises(ConfigError, match="was trained with --lora_rank 8: leave --lora_rank 4 out"):
        learner(service, start=start)
    with pytest.raises(ConfigError, match="can only be sampled from; to train on, name tinker://RUN/weights/NAME"):
        learner(service, start=replace(start, state=""))
    mine.save(tmp_path)
    with pytest.raises(CheckpointError, match="its run began from other weights: tinker://run0/weights/x"):
        learner(service).load(tmp_path)


# ------------------------------------------------------------------------------------- what cannot be said there


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"lora_alpha": 16}, "--lora_alpha 16: the wire does not carry it"),
        ({"lora_targets": "q_proj"}, "--lora_targets q_proj: the service puts adapters on all"),
        ({"dtype": "bfloat16"}, "--dtype bfloat16: the service decides"),
        ({"compile": "on"}, "--compile on: the service decides"),
        ({"head": "plain"}, "--head plain: the service decides"),
        ({"packing": "on"}, "--packing on: the service decides"),
        ({"activation_checkpointing": True}, "--activation_checkpointing True: the service"),
        ({"optimizer_device": "cpu"}, "--optimizer_device cpu: the service decides"),
        ({"eval_mode": "async"}, "--eval_mode async: the service that trains also validates"),
        ({"weight_decay": 0.1, "lora_rank": 0}, "--weight_decay 0.1: of all weights"),
        ({"temperature": 0.7}, "--temperature 0.7: the service trains the distribution at temperature 1"),
        ({"entropy_coef": 0.01}, "--entropy_coef 0.01: its gradient needs whole distributions"),
    ],
)
def test_what_the_wire_cannot_say_is_refused_by_name(flags, words):
    cfg = stage_config("grpo", learner="tinker", **{"lora_rank": 4, **flags})
    with pytest.raises(ConfigError, match=words):
        RemoteLearner(FakeService(LOGITS), Checkpoint("base"), None, cfg)


def test_who_trains_at_a_service_samples_there():
    assert config.resolve("grpo", flags={"learner": "tinker"}).engine == "tinker"
    named = config.resolve("sft", flags={"model_id": "tinker://run/weights/x"})
    assert (named.learner, named.engine) == ("tinker", "tinker")
    assert config.resolve("eval", flags={"model_id": "tinker://run/sampler_weights/x"}).engine == "tinker"
    vllm = [{"learner": "tinker", "engine": "vllm"}, {"learner": "tinker", "vllm_device": "cpu"}]
    for flags in ({"engine": "tinker"}, *vllm):
        with pytest.raises(ConfigError, match="samples from the weights that it trains"):
            config.resolve("grpo", flags=flags)
    with pytest.raises(ConfigError, match="which samples itself: leave --engine and"):
        config.resolve("eval", flags={"model_id": "tinker://run/weights/x", "engine": "vllm"})
