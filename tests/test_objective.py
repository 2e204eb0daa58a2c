"""`objective check`: known results to 1e-6, every bug of the table found where it is planted, the page's figures."""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo_gsm8k import cli, config, grpo, objective
from grpo_gsm8k.config import ALGORITHMS, GrpoConfig
from grpo_gsm8k.engines import hf
from grpo_gsm8k.engines.hf import HFSampler
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.evals import evaluator
from grpo_gsm8k.evals.evaluator import InlineEvaluator
from grpo_gsm8k.evals.tables import objective_lines
from grpo_gsm8k.objective import checks, kl, settings_of, small, stack, table, table_row
from grpo_gsm8k.objective.estimate import compare, moments, neutral, row_gradients, updates_of
from grpo_gsm8k.objective.world import (
    COMPLETIONS,
    END,
    PROMPTS,
    make_world,
    policy_gradient,
    probability,
)
from grpo_gsm8k.tasks.render import Renderer
from grpo_gsm8k.trainer import data, losses
from grpo_gsm8k.trainer.optimizer import MasterAdamW
from grpo_gsm8k.trainer.policy import weights_sha256
from tests import test_bug_table

EXACT = 1e-6
ROOT = Path(__file__).resolve().parent.parent


def settings(size=4, **flags):
    return small(config.resolve("grpo", flags=flags), size)


def found(off_policy=False, **flags):
    cfg, world = settings(**flags), make_world(off_policy)
    return compare(cfg, world, moments(cfg, world))


# ------------------------------------------------------------------------------------------- the world is exact


@pytest.mark.parametrize("off_policy", [False, True])
def test_probabilities_are_whole(off_policy):
    world = make_world(off_policy)
    for group in world.sampled_P:
        assert math.fsum(one.probability for one in group) == pytest.approx(1, abs=1e-12)
    assert len(COMPLETIONS) == 7
    for flags in ({}, {"algorithm": "dapo"}, {"mask_truncated": True}):
        whole = math.fsum(update.probability for update in updates_of(settings(3, **flags), world))
        assert whole == pytest.approx(1, abs=1e-12)


def test_the_policy_gradient_by_finite_differences():
    world, size = make_world(), 1e-6

    def mean_reward(table):
        each = [
            one.grade.reward * float(probability(table, prompt, one.trajectory.token_ids, world.temperature))
            for prompt, group in zip(PROMPTS, world.sampled_P, strict=True)
            for one in group
        ]
        return math.fsum(each) / len(PROMPTS)

    flat = world.policy.table.detach().flatten()
    numeric = [
        (mean_reward((flat + h).view_as(world.policy.table)) - mean_reward((flat - h).view_as(world.policy.table)))
        / (2 * size)
        for h in size * torch.eye(len(flat), dtype=torch.float64)
    ]
    assert policy_gradient(world).tolist() == pytest.approx(numeric, abs=1e-8)


def test_a_sampled_mean_comes_close_to_the_exact_one():
    """The expectation, by the same code on groups that are drawn instead of enumerated."""
    cfg, world = settings(3, algorithm="grpo"), make_world(True)
    exact, updates = moments(cfg, world), updates_of(cfg, world)
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([update.probability for update in updates], dtype=torch.float64)
    drawn = torch.multinomial(shares, 40_000, replacement=True, generator=generator).bincount(minlength=len(updates))
    loss, mean = grpo.objective_of(cfg), torch.zeros_like(exact.mean)
    for update, count in zip(updates, drawn.tolist(), strict=True):
        if count and update.rows:
            mean += count / 40_000 * row_gradients(update.rows, loss, world).sum(0)
    assert float((mean - exact.mean).norm()) < 4 * exact.deviation / math.sqrt(40_000)


# --------------------------------------------------------------------------------------------- known results


@pytest.mark.parametrize("size", [2, 3, 5])
def test_leave_one_out_is_unbiased_and_the_groups_mean_scales(size):
    assert found(size=size, algorithm="rloo").bias < EXACT
    scaled = found(size=size, algorithm="reinforce_baseline")
    assert scaled.scale == pytest.approx((size - 1) / size, abs=EXACT) and scaled.sideways < EXACT
    assert found(size=size, algorithm="dr_grpo").scale == pytest.approx((size - 1) / size, abs=EXACT)


def test_without_a_baseline_it_is_unbiased_and_noisier():
    plain, helped = found(algorithm="reinforce"), found(algorithm="rloo")
    assert plain.bias < EXACT and plain.noise > helped.noise * 1.02


def test_the_deviation_biases():
    """arXiv 2503.20783: prompts of small deviation weigh more. The exact mean by hand, over ordered groups of two."""
    cfg, world = neutral(settings(2), baseline="group", std_norm=True, advantage_eps=0.0), make_world()
    answer = compare(cfg, world, moments(cfg, world))
    assert answer.sideways > 0.1
    expected = torch.zeros_like(policy_gradient(world))
    for prompt, group in zip(PROMPTS, world.sampled_P, strict=True):
        for one in group:
            for other in group:
                if one.grade.reward != other.grade.reward:  # of two, a normalised advantage is +-1 / sqrt(2)
                    sign = 1.0 if one.grade.reward > other.grade.reward else -1.0
                    share = one.probability * other.probability / len(PROMPTS)
                    expected += share * sign / math.sqrt(2) * score(world, prompt, one) / 2  # "constant": two tokens
    assert -moments(cfg, world).mean.numpy() == pytest.approx(expected.numpy(), abs=EXACT)


def score(world, prompt, one):
    """d log probability of a completion in the table."""
    leaf = world.policy.table.detach().clone().requires_grad_()
    value = probability(leaf, prompt, one.trajectory.token_ids, world.temperature).log()
    return torch.autograd.grad(value, leaf)[0].flatten()


def test_length_normalisation_biases_and_a_constant_length_does_not():
    for aggregation in ("sequence", "token"):
        cfg = neutral(settings(), aggregation=aggregation)
        assert compare(cfg, make_world(), moments(cfg, make_world())).sideways > 0.01
    expected, world = torch.zeros_like(policy_gradient(make_world())), make_world()
    for prompt, group in zip(PROMPTS, world.sampled_P, strict=True):
        for one in group:  # the mean over a response's tokens divides its own score by its length
            share = one.probability * one.grade.reward / len(one.trajectory.token_ids) / len(PROMPTS)
            expected += share * score(world, prompt, one)
    cfg = neutral(settings(), aggregation="sequence", baseline="none")
    assert -moments(cfg, world).mean.numpy() == pytest.approx(expected.numpy(), abs=EXACT)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("off_policy", [False, True])
def test_what_the_kl_term_pulls_along(estimator, correction, off_policy):
    cfg = replace(settings(2), kl_estimator=estimator, kl_bias_correction=correction)
    along = kl(cfg, make_world(off_policy))["pulls_along"]
    alone = {"k1": "nothing", "k2": "KL(pi || pi_ref)", "k3": "KL(pi_ref || pi)"}[estimator]
    if correction:
        assert along == "KL(pi || pi_ref)"
    else:
        assert along == ("none of these" if off_policy else alone)


def test_off_policy_only_the_ratio_of_the_whole_response_is_unbiased():
    how = {"old_logprobs": "recompute", "importance_cap": 1e6}
    assert found(True, algorithm="rloo").sideways > 0.1
    assert found(True, algorithm="rloo", importance_correction="truncate", **how).sideways > 0.1
    assert found(True, algorithm="rloo", importance_correction="sequence_truncate", **how).bias < EXACT


def test_maxrl_follows_its_own_objective_and_fresh_prompts_only_scale():
    cfg = neutral(settings(), resample_zero_variance=10)
    answer = compare(cfg, make_world(), moments(cfg, make_world()))
    assert answer.sideways < EXACT and answer.scale > 1
    assert found(algorithm="maxrl").verdict == "biased"


def test_one_update_after_the_other_gives_the_same():
    cfg, world = settings(2, algorithm="gspo"), make_world(True)
    apart = moments(cfg, world).mean - moments(cfg, world, together=False).mean
    assert float(apart.abs().max()) < 1e-12


def test_a_loss_that_couples_rows_is_taken_update_by_update(mine):
    """`OwnMean` divides by the tokens of its batch, so under `sequence` it is what one update at a time makes of it."""
    cfg, world = neutral(settings(2), loss="own_losses:OwnMean", aggregation="sequence"), make_world()
    alone = moments(cfg, world, together=False)
    assert torch.equal(moments(cfg, world).mean, alone.mean)
    assert float((moments(cfg, world, together=True).mean - alone.mean).abs().max()) > 1e-5


# --------------------------------------------------------------------------------------------- planted bugs


def per_microbatch_mean(patch):
    inner = losses.per_token_loss
    patch.setattr(losses, "per_token_loss", lambda logp, batch, *more: inner(logp, batch, *more) / batch.mask.sum())


def denominator_counts_masked_rows(patch):
    inner = data.loss_weights
    patch.setattr(data, "loss_weights", lambda m, *how: inner(m, *how) * m.sum(1).gt(0).sum() / len(m))


def fully_masked_rows(patch):
    patch.setattr(data, "loss_weights", lambda mask, *how: mask / mask.sum(1, keepdim=True) / len(mask))


def amplified_deviation(patch):
    def advantages(rewards, std_norm=True, eps=1e-6, baseline="group"):
        mean = sum(rewards) / len(rewards)
        return [(r - mean) / (math.sqrt(sum((r - mean) ** 2 for r in rewards)) + 1e-20) for r in rewards]

    patch.setattr(grpo, "group_advantages", advantages)


def population_deviation(patch):
    patch.setattr(statistics, "stdev", statistics.pstdev)


def changed_rows(patch, change):
    inner = grpo.sampled_datum
    patch.setattr(grpo, "sampled_datum", lambda trajectory, advantage=0.0: change(inner(trajectory, advantage)))


def shifted_mask(patch):
    changed_rows(
        patch,
        lambda row: replace(
            row, mask=(*row.mask[1:], 0), advantages=(*row.advantages[1:], 0.0), logprobs=(*row.logprobs[1:], 0.0)
        ),
    )


def forced_end(patch):
    def change(row):
        if row.token_ids[-1] == END:
            return row
        more = {"logprobs": (*row.logprobs, 0.0), "advantages": (*row.advantages, row.advantages[-1])}
        return replace(row, token_ids=(*row.token_ids, END), mask=(*row.mask, 1), **more)

    changed_rows(patch, change)


def pad_is_end(patch):
    def change(row):
        mask = tuple(m * (i != END) for m, i in zip(row.mask, row.token_ids, strict=True))
        return replace(row, mask=mask, advantages=tuple(a * m for a, m in zip(row.advantages, mask, strict=True)))

    changed_rows(patch, change)


def one_end_only(patch):
    inner = HFSampler._append

    def append(self, row, token, logprob, stop):
        self.stop_ids = {self.renderer.end_id}
        return inner(self, row, token, logprob, stop)

    patch.setattr(HFSampler, "_append", append)


def tokenised_again(patch):
    def change(row):
        if row.token_ids[-2:] != (1, 1):  # "x" "x" is spelled "xx"
            return row
        return replace(
            row,
            token_ids=(*row.token_ids[:-2], 2),
            **{name: getattr(row, name)[:-1] for name in ("mask", "logprobs", "advantages")},
        )

    changed_rows(patch, change)


def double_bos(patch):
    patch.setattr(Renderer, "_encode", lambda self, text: self.tokenizer(text)["input_ids"])


def text_crosses(patch):
    inner = HFSampler.sample

    def sample(self, requests, params):
        texts = [" ".join(self.renderer.decode(request.token_ids).split()) for request in requests]
        ids = [(0, *self.renderer.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
        return inner(self, [replace(r, token_ids=i) for r, i in zip(requests, ids, strict=True)], params)

    patch.setattr(HFSampler, "sample", sample)


def without_temperature(patch):
    inner = hf._choose

    def choose(logits, uniforms, params, *more, **how):
        chosen, _ = inner(logits, uniforms, params, *more, **how)
        return chosen, logits.float().log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)

    patch.setattr(hf, "_choose", choose)


def truncated_sampling(patch):
    patch.setattr(grpo, "check", lambda cfg: None)


def groups_by_text(patch):
    inner = grpo.with_advantages

    def by_text(cfg, groups):
        keys = ["".join(map(str, group[0].trajectory.prompt.token_ids)) for group in groups]
        merged = {key: [r for k, g in zip(keys, groups, strict=True) if k == key for r in g] for key in keys}
        values = {key: iter(inner(cfg, [group])[0]) for key, group in merged.items()}
        return [[next(values[key]) for _ in group] for key, group in zip(keys, groups, strict=True)]

    patch.setattr(grpo, "with_advantages", by_text)


def stale_weights(patch):
    patch.setattr(HFSampler, "load", lambda self, ref, tensors=None: vars(self).update(version=ref.version))


def no_masters(patch):
    inner = MasterAdamW.step

    def step(self, lr):
        metrics = inner(self, lr)
        with torch.no_grad():
            for master in self.masters.values():
                master.copy_(master.bfloat16())
        return metrics

    patch.setattr(MasterAdamW, "step", step)


def live_ratio(patch):
    patch.setattr(losses, "importance_ratio", lambda logp, batch: ((logp - logp.detach()) * batch.mask).exp())


def clip_sign(patch):
    def call(self, logp, batch):
        ratio = self.ratio(logp, batch)
        clipped = ratio.clamp(1 - self.clip_eps, 1 + self.clip_eps_high)
        return -torch.maximum(ratio * batch.advantages, clipped * batch.advantages)

    patch.setattr(losses.GrpoClip, "__call__", call)


def kl_alone(patch):
    def term(logp, batch, objective):
        return losses.KL_ESTIMATORS[objective.kl_estimator]((logp - batch.ref_logprobs) * batch.mask)

    patch.setattr(losses, "kl_to_reference", term)


def exploding_ratio(patch):
    patch.setattr(losses, "importance_ratio", lambda logp, batch: ((logp - batch.old_logprobs) * batch.mask).exp())


def lost_moments(patch):
    patch.setattr(MasterAdamW, "load_state", lambda self, flat: None)


def late_hash(patch):
    def submit(self, step, weights):
        digest = weights_sha256(self.sampler.weights())
        self.sync(step)
        self._done.append((step, evaluator.evaluate(self.sampler, self.prompts, self.params, self.renderer, digest)))

    patch.setattr(InlineEvaluator, "submit", submit)


def gold_counts_right(patch):
    task = type(stack.make_stack().renderer.task)
    inner = task.grade

    def grade(self, example, response):
        try:
            return inner(self, example, response)
        except ValueError:
            return replace(inner(self, replace(example, answer="7"), response), correct=True)

    patch.setattr(task, "grade", grade)


PLANTS = {
    "per-microbatch token mean": (per_microbatch_mean, checks.microbatches),
    "denominator ignores the truncation mask": (denominator_counts_masked_rows, checks.masked_rows),
    "fully masked rows": (fully_masked_rows, checks.all_masked),
    "std near 0 amplified": (amplified_deviation, checks.flat_groups),
    "std convention": (population_deviation, checks.deviation),
    "mask off by one": (shifted_mask, checks.pipeline),
    "forced EOS on truncation": (forced_end, checks.pipeline),
    "PAD == EOS": (pad_is_end, checks.pipeline),
    "several EOS ids": (one_end_only, stack.every_end),
    "re-tokenising text": (tokenised_again, checks.pipeline),
    "double BOS": (double_bos, stack.one_bos),
    "text crosses the boundary": (text_crosses, stack.ids_cross),
    "temperature in log-probs": (without_temperature, checks.sampler),
    "top_p with importance ratios": (truncated_sampling, checks.sampler),
    "group index by text": (groups_by_text, checks.groups_apart),
    "stale weights": (stale_weights, stack.fresh_weights),
    "low precision": (no_masters, stack.small_updates),
    "clip never active": (live_ratio, checks.clip),
    "sign of the clip": (clip_sign, checks.direction),
    "gradient of the KL term": (kl_alone, checks.kl_term),
    "ratio explosion": (exploding_ratio, checks.extremes),
    "resume": (lost_moments, stack.resumed),
    "evaluation under the wrong step": (late_hash, stack.evaluated_weights),
    "unparsable gold counted right": (gold_counts_right, stack.readable_gold),
}


def answer_of(check, **flags):
    if check.__module__ == stack.__name__:  # on the real sampler and learner
        return check(stack.make_stack())
    return check(settings(3, **flags))


@pytest.fixture(autouse=True)
def fresh_worlds():
    """A world's log-probabilities come from the sampler, so a planted bug makes others."""
    make_world.cache_clear()
    yield
    make_world.cache_clear()


@pytest.mark.parametrize("bug", PLANTS)
def test_a_planted_bug_is_flagged(bug, monkeypatch):
    plant, check = PLANTS[bug]
    assert answer_of(check).ok
    make_world.cache_clear()
    plant(monkeypatch)
    flags = {"top_p": 0.8} if plant is truncated_sampling else {}
    assert not answer_of(check, **flags).ok


def test_every_row_of_the_bug_table_is_planted():
    rows = [
        line.split("|")[1].split("(")[0].strip() for line in test_bug_table.__doc__.splitlines() if "| test_" in line
    ]
    assert rows == list(PLANTS)


def test_settings_with_top_p_are_refused():
    with pytest.raises(ConfigError, match="top_p"):
        settings(top_p=0.8)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_shipped_algorithm_passes_every_check(algorithm):
    assert [one for one in checks.all_checks(settings(4, algorithm=algorithm)) if not one.ok] == []


# --------------------------------------------------------------------------------------------- a loss of one's own

LOSSES = """
from dataclasses import dataclass
import torch

@dataclass(frozen=True)
class Good:
    clip_eps: float = 0.2
    def __call__(self, logp, batch):
        ratio = ((logp - batch.old_logprobs) * batch.mask).clamp(-20, 20).exp()
        clipped = ratio.clamp(1 - self.clip_eps, 1 + self.clip_eps)
        return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)

class OwnMean(Good):
    def __call__(self, logp, batch):
        return super().__call__(logp, batch) * len(batch) / batch.mask.sum()

class OtherSign(Good):
    def __call__(self, logp, batch):
        return -super().__call__(logp, batch)

class ClampedRatio(Good):
    def __call__(self, logp, batch):
        ratio = ((logp - batch.old_logprobs) * batch.mask).clamp(-20, 20).exp()
        return -ratio.clamp(1 - self.clip_eps, 1 + self.clip_eps) * batch.advantages

class Unclamped(Good):
    def __call__(self, logp, batch):
        ratio = ((logp - batch.old_logprobs) * batch.mask).exp()
        clipped = ratio.clamp(1 - self.clip_eps, 1 + self.clip_eps)
        return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)

class LiveRatio(Good):
    def __call__(self, logp, batch):
        ratio = (logp - logp.detach()).exp()
        clipped = ratio.clamp(1 - self.clip_eps, 1 + self.clip_eps)
        return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)

class OnlyGood(Good):
    def __call__(self, logp, batch):
        return -logp * batch.advantages.clamp(min=0)

class SaysSeparable(Good):
    separable = True
    def __call__(self, logp, batch):
        return super().__call__(logp, batch) * logp.exp().sum(1, keepdim=True)

class SaysZero(Good):
    zero_without_advantage = True
    def __call__(self, logp, batch):
        return super().__call__(logp, batch) + 0.1 * logp

class NotANumber(Good):
    def __call__(self, logp, batch):
        return super().__call__(logp, batch) * float("nan")

class Longer(Good):
    def __call__(self, logp, batch):
        return super().__call__(logp, batch) * batch.mask.sum(1, keepdim=True) ** 2
"""

FLAWS = {
    "OwnMean": checks.microbatches,
    "OtherSign": checks.direction,
    "ClampedRatio": checks.direction,
    "Unclamped": checks.extremes,
    "LiveRatio": checks.clip,
    "OnlyGood": checks.loss_alone,
    "SaysSeparable": checks.fused,
    "SaysZero": checks.skipped_rows,
    "Longer": checks.loss_alone,
}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "own_losses", raising=False)


def test_a_right_loss_of_ones_own_passes(mine):
    assert [one for one in checks.all_checks(settings(2, loss="own_losses:Good")) if not one.ok] == []


@pytest.mark.parametrize("name", FLAWS)
def test_a_flaw_of_a_loss_is_flagged(name, mine):
    assert not FLAWS[name](settings(3, loss=f"own_losses:{name}")).ok


# --------------------------------------------------------------------------------------------- command and page


@pytest.fixture
def call(capsys):
    def run(*words):
        code = 0
        try:
            cli.main(["objective", "check", *words])
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def test_the_command_prints_one_object(call, mine, monkeypatch):
    code, out, _ = call("--algorithm", "rloo", "--group_size", "2", "--json")
    result = json.loads(out)
    assert code == 0 and result["ok"] and result["gradient"]["on_policy"]["verdict"] == "unbiased"
    assert result["objective"] == {
        **{"algorithm": "rloo", "loss": "reinforce", "baseline": "leave_one_out", "std_norm": False},
        "aggregation": "constant",
    }
    assert len(result["checks"]) == len(checks.CHECKS) + len(stack.CHECKS)
    monkeypatch.setattr(objective, "stack_checks", list)
    code, out, _ = call("own_losses:OtherSign", "--group_size", "2")
    assert code == 1 and "FAIL the loss pushes along the advantage" in out
    code, out, _ = call("own_losses:NotANumber", "--group_size", "2", "--json")
    assert code == 1 and "NaN" not in out
    assert json.loads(out)["gradient"]["on_policy"]["verdict"] == "not finite"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--group_size", "9"), "error: --group_size 9: must be from 2 to 6: all groups are enumerated\n"),
        (("--top_p", "0.9"), "error: top_p < 1 truncates what is sampled, so ratios would be wrong; use top_p = 1\n"),
        (("--algorithm", "rlo"), "error: unknown algorithm 'rlo'; did you mean 'rloo'?\n"),
        (("cross_entropy",), "error: loss 'cross_entropy' does not use advantages"),
        (("nowhere:Loss",), "error: loss 'nowhere:Loss': no module 'nowhere'"),
    ],
)
def test_mistakes_end_with_a_line(call, words, line):
    code, out, err = call(*words)
    assert code == 2 and out == "" and err.startswith(line) and err.count("\n") == 1


def test_settings_of_an_objective_are_those_that_differ():
    assert settings_of(settings()) == {"algorithm": "", "loss": "grpo_clip"}
    assert settings_of(small(replace(GrpoConfig(), kl_coef=0.1), 2))["kl_coef"] == 0.1


def test_the_page_has_the_commands_rows():
    page = (ROOT / "docs" / "objective-check.md").read_text()
    lines = objective_lines([table_row(name, 4) for name in ("rloo", "dr_grpo", "maxrl")])
    assert all(f"{line}\n" in page for line in lines)
    assert all(f"\n| `{name}` |" in page for name in ALGORITHMS)


@pytest.mark.slow
def test_the_page_has_the_whole_table():
    page = (ROOT / "docs" / "objective-check.md").read_text()
    assert "\n".join(objective_lines(table(4)["algorithms"])) in page
