"""Losses and gradients against TRL, Liger and transformers, on the same weights and tensors, in float32.

Theirs are called as they are installed: `GRPOTrainer._compute_loss` and `RLOOTrainer._compute_loss` on a real
(tiny) model, `LigerFusedLinearGRPOLoss` on a hidden state and a head, transformers' own loss of a model. Ours goes
the way of training: `weighted`, `TorchLearner.forward_backward` in small microbatches. This prints the
table of docs/algorithms.md:

    uv run python -m tests.test_parity
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_gsm8k import distill
from grpo_gsm8k.datatypes import Datum
from grpo_gsm8k.trainer.batch import Batch, make_batch
from grpo_gsm8k.trainer.data import ImportanceCorrection, Values, weighted, with_old_logprobs, with_ref_logprobs
from grpo_gsm8k.trainer.learner import TorchLearner
from grpo_gsm8k.trainer.logprobs import token_logprobs
from grpo_gsm8k.trainer.losses import KL_ESTIMATORS, GrpoClip, Objective, Reinforce, make_loss, per_token_loss
from grpo_gsm8k.trainer.teacher import FrozenTeacher
from tests.test_losses import POLICY, REFERENCE, STALE, exact_kl, expected_kl_term, numeric_gradient
from tests.toys import datum, gradient, make_data, make_model, tensor_of, train_config, values_of

LIMIT = 1e-5
TEMPERATURE = 0.7
TERMS = ("kl_bias_correction", "entropy_coef")
LONGEST = 20  # the constant of Dr.GRPO's mean
NO_GROUP = "TRL and Liger are not installed: uv run --group parity pytest tests/test_parity.py"


@dataclass(frozen=True)
class Case:
    """One objective in our settings and in theirs.

    Attributes:
        theirs: settings that TRL and Liger have in common, by TRL's names.
        on_policy: the old log-probabilities are those of the policy itself.
        kl: weight of the KL term.
        liger: Liger has it, and not otherwise than its paper.
    """

    name: str
    ours: Objective
    aggregation: str
    theirs: dict[str, Any]
    on_policy: bool = False
    kl: float = 0.0
    liger: bool = True


def case(name: str, loss: str, aggregation: str, theirs: dict[str, Any], **more: Any) -> Case:
    flags = {key: more.pop(key) for key in ("on_policy", "kl", "liger") if key in more}
    terms = {"kl_coef": flags.get("kl", 0.0)} | {key: more.pop(key) for key in TERMS if key in more}
    ours = Objective(make_loss(loss, {"clip_eps": 0.2, "clip_eps_high": 0.2} | more), TEMPERATURE, **terms)
    return Case(name, ours, aggregation, theirs, **flags)


SEQUENCE = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
PLAIN_KL = {"kl_bias_correction": False}
CASES = [
    case("GRPO", "grpo_clip", "sequence", {"loss_type": "grpo"}),
    case("GRPO, KL as in its paper", "grpo_clip", "sequence", {"loss_type": "grpo"}, kl=0.3, **PLAIN_KL),
    case("GRPO, KL", "grpo_clip", "sequence", {"loss_type": "grpo", "use_bias_correction_kl": True}, kl=0.3),
    case("GRPO, mean over tokens", "grpo_clip", "token", {"loss_type": "bnpo"}),
    case("Dr.GRPO", "grpo_clip", "constant", {"loss_type": "dr_grpo"}),
    case("DAPO", "grpo_clip", "token", {"loss_type": "dapo", "epsilon_high": 0.28}, clip_eps_high=0.28),
    case("GSPO", "gspo", "sequence", {**SEQUENCE, "epsilon_high": 0.28}, clip_eps_high=0.28),
    case("GSPO, KL as in GRPO's paper", "gspo", "sequence", SEQUENCE, kl=0.3, **PLAIN_KL),
    case(
        "CISPO", "cispo", "token", {"loss_type": "cispo", "epsilon_high": 1.5}, clip_eps=1.0, clip_eps_high=0.5
    ),  # theirs is the bound itself
    case("PPO dual clip", "grpo_clip", "token", {"loss_type": "dapo", "delta": 1.6}, dual_clip=1.6),
    case("SAPO", "sapo", "sequence", {"loss_type": "sapo"}),
    case("LUSPO", "luspo", "sequence", {**SEQUENCE, "loss_type": "luspo"}, liger=False),
    case("VESPO", "vespo", "token", {"loss_type": "vespo"}),
    case(
        "entropy bonus", "grpo_clip", "token", {"loss_type": "dapo", "entropy_coef": 0.5}, entropy_coef=0.5, liger=False
    ),
    # CISPO's weight is 1 on-policy, which leaves REINFORCE.
    case("REINFORCE", "reinforce", "token", {"loss_type": "cispo", "epsilon_high": 5.0}, on_policy=True),
]


@dataclass(frozen=True)
class Setting:
    """A tiny model and one update's rows, `prompts[b]` tokens of each being its prompt."""

    model: Path
    rows: list[Datum]
    prompts: list[int]


@functools.cache
def setting(folder: Path) -> Setting:
    """Weights with nothing left at zero, and six responses of unlike lengths, good and bad."""
    model = make_model(folder / "model", make_data(folder / "data"))
    policy = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    policy.save_pretrained(model)
    sizes = [(4, 9), (2, 3), (5, 12), (3, 1), (6, 7), (2, 11)]
    advantages = [1.2, -0.7, -1.5, 0.4, 0.9, -0.3]
    rows = []
    for (prompt, n), advantage in zip(sizes, advantages, strict=True):
        ids = tuple(torch.randint(3, 300, (prompt + n,)).tolist())
        rows.append(datum(ids, (0,) * prompt + (1,) * n, advantage=advantage))
    return Setting(model, rows, [prompt for prompt, _ in sizes])


def learner_of(at: Setting) -> TorchLearner:
    """Ours, with a budget that splits the update into several microbatches."""
    model = AutoModelForCausalLM.from_pretrained(at.model, dtype=torch.float32)
    return TorchLearner(model, AutoTokenizer.from_pretrained(at.model), train_config(max_tokens_per_microbatch=35))


def update_of(at: Setting, aggregation: Any, on_policy: bool, longest: int = LONGEST) -> list[Datum]:
    """One update. Old and reference policy lie a random step away from the model, far enough for every clip."""
    data = weighted(at.rows, aggregation, longest)
    return with_other_policies(data, learner_of(at).logprobs(data, TEMPERATURE), on_policy)


def with_other_policies(data: list[Datum], logp: Values, on_policy: bool) -> list[Datum]:
    noise, near = torch.Generator().manual_seed(2), tensor_of(logp)
    old, ref = (values_of(near + 0.6 * torch.randn(near.shape, generator=noise), data) for _ in range(2))
    return with_ref_logprobs(with_old_logprobs(data, logp if on_policy else old), ref)


def relative(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of theirs, over all tensors together."""
    assert ours.keys() == theirs.keys() and all(ours[name].dtype == torch.float32 for name in ours)
    off = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours)
    return (off / sum(float(x.double().square().sum()) for x in theirs.values())) ** 0.5


# -------------------------------------------------------------------------------------------------------- TRL


def trl_trainer(at: Setting, folder: Path, kind: str, **settings: Any) -> Any:
    """A trainer of TRL's on the same weights, in training mode, outside its own loop."""
    trl = pytest.importorskip("trl", reason=NO_GROUP)
    from datasets import Dataset

    args = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=len(at.rows),
        num_generations=len(at.rows),
        max_completion_length=LONGEST,
        temperature=TEMPERATURE,
        **settings,
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=str(at.model),
        reward_funcs=lambda **_: [0.0],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * len(at.rows)),
        processing_class=AutoTokenizer.from_pretrained(at.model),
    )
    trainer.current_gradient_accumulation_steps = 1  # what its loop would set
    trainer.model.train()
    return trainer


def trl_inputs(at: Setting, batch: Batch) -> dict[str, torch.Tensor]:
    """Our batch in TRL's layout: prompts padded on the left, completions on the right, log-probabilities of them."""
    longest = max(at.prompts)
    lengths = [len(row.token_ids) - prompt for row, prompt in zip(at.rows, at.prompts, strict=True)]
    shape = (len(at.rows), max(lengths))
    out = {name: torch.zeros(shape) for name in ("completion_mask", "old_per_token_logps", "ref_per_token_logps")}
    out |= {"completion_ids": torch.zeros(shape), "prompt_ids": torch.zeros(len(at.rows), longest)}
    out["prompt_mask"] = torch.zeros_like(out["prompt_ids"])
    for b, (row, prompt, n) in enumerate(zip(at.rows, at.prompts, lengths, strict=True)):
        out["prompt_ids"][b, longest - prompt :] = torch.tensor(row.token_ids[:prompt])
        out["prompt_mask"][b, longest - prompt :] = 1
        out["completion_ids"][b, :n] = torch.tensor(row.token_ids[prompt:])
        out["completion_mask"][b, :n] = 1
        out["old_per_token_logps"][b, :n] = batch.old_logprobs[b, prompt - 1 : prompt - 1 + n]
        out["ref_per_token_logps"][b, :n] = batch.ref_logprobs[b, prompt - 1 : prompt - 1 + n]
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
        out[name] = out[name].long()
    out["advantages"] = torch.tensor([row.advantages[-1] for row in at.rows])
    out["num_items_in_batch"] = out["completion_mask"].sum()
    return out


def loss_and_gradient(trainer: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in trainer.model.named_parameters()}


def against_trl(one: Case, folder: Path) -> tuple[float, float]:
    """Relative errors of the loss and of the gradient in every weight."""
    at = setting(folder)
    data, learner = update_of(at, one.aggregation, one.on_policy), learner_of(at)
    settings = {"use_bias_correction_kl": False, "beta": one.kl} | one.theirs
    theirs, their_gradient = loss_and_gradient(
        trl_trainer(at, folder / "trl", "GRPO", **settings), trl_inputs(at, make_batch(data))
    )
    metrics = learner.forward_backward(data, one.ours)
    soft = one.on_policy or not hasattr(one.ours.loss, "clip_eps")
    assert soft or 0 < metrics["policy/clip_frac"] < 1  # the clip is in play
    return abs(metrics["loss"] - theirs) / abs(theirs), relative(gradient(learner), their_gradient)


CORRECTIONS = {"truncate": "token_truncate", "mask": "token_mask"} | {
    kind: kind for kind in ("sequence_truncate", "sequence_mask")
}


def against_trl_corrected(kind: str, folder: Path) -> tuple[float, float]:
    """GRPO with an importance correction of the sampler: the ratio by TRL's formula, the rest by TRL."""
    at = setting(folder)
    sampled = update_of(at, "token", on_policy=False)  # its old policy stands in for the sampler
    batch = make_batch(sampled)
    noise = 0.3 * torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(5))
    frozen = values_of((batch.old_logprobs + noise) * batch.mask, sampled)
    correction = ImportanceCorrection(cast(Any, kind), 1.5, 0.6)
    ours, learner = with_old_logprobs(sampled, frozen, correction), learner_of(at)
    trainer = trl_trainer(at, folder / "trl", "GRPO", beta=0.0, loss_type="dapo", use_bias_correction_kl=False)
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    inputs, sampler = trl_inputs(at, make_batch(ours)), trl_inputs(at, batch)["old_per_token_logps"]
    log_ratio = (inputs["old_per_token_logps"] - sampler) * inputs["completion_mask"]
    ratio = (log_ratio.sum(-1, keepdim=True) if kind.startswith("sequence") else log_ratio).exp()
    kept = ratio.masked_fill((ratio < 0.6) | (ratio > 1.5), 0.0)
    inputs["importance_sampling_ratio"] = ratio.clamp(0.6, 1.5) if kind.endswith("truncate") else kept
    theirs, their_gradient = loss_and_gradient(trainer, inputs)
    metrics = learner.forward_backward(ours, Objective(GrpoClip(), TEMPERATURE))
    return abs(metrics["loss"] - theirs) / abs(theirs), relative(gradient(learner), their_gradient)


def against_trl_rloo(folder: Path) -> float:
    """Relative error of the gradient. TRL's loss is one ratio a response, whose gradient on-policy is REINFORCE's."""
    at = setting(folder)
    data, learner = update_of(at, "constant", on_policy=True, longest=1), learner_of(at)
    inputs, trainer = trl_inputs(at, make_batch(data)), trl_trainer(at, folder / "trl", "RLOO", beta=0.0)
    ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    width = inputs["completion_ids"].shape[1]
    own = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)[0].detach()
    inputs["old_logps"] = (own * inputs["completion_mask"]).sum(1)
    _, theirs = loss_and_gradient(trainer, inputs)
    learner.forward_backward(data, Objective(Reinforce(), temperature=TEMPERATURE))
    return relative(gradient(learner), theirs)


def teacher_of(at: Setting) -> Any:
    """The same architecture with weights a random step away."""
    model = AutoModelForCausalLM.from_pretrained(at.model, dtype=torch.float32)
    noise = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=noise))
    return model


def against_trl_distillation(folder: Path) -> tuple[float, float]:
    """Distillation on the sampled tokens: TRL's IW-OPD with its importance weights off is the same loss."""
    trainer = pytest.importorskip("trl.experimental.iw_opd.iw_opd_trainer", reason=NO_GROUP).IWOPDTrainer
    at = setting(folder)
    data, learner, teacher = update_of(at, "token", on_policy=False), learner_of(at), teacher_of(at)
    scores = FrozenTeacher(teacher).logprobs(data, TEMPERATURE)
    model, batch = AutoModelForCausalLM.from_pretrained(at.model, dtype=torch.float32), make_batch(data)
    state = SimpleNamespace(
        temperature=TEMPERATURE,
        iw_opd_gamma=0.0,
        iw_opd_epsilon=1e-8,
        model=model,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    theirs = trainer._compute_iw_opd_loss(
        state,
        model(input_ids=batch.input_ids).logits,
        batch.targets,
        torch.where(batch.mask.bool(), batch.targets, -100),
        tensor_of(scores),
        batch.old_logprobs,
    )
    theirs.backward()
    metrics = learner.forward_backward(distill.taught(data, scores), Objective(Reinforce(), TEMPERATURE))
    error = abs(metrics["loss"] - float(theirs.detach())) / abs(float(theirs.detach()))
    return error, relative(gradient(learner), {name: p.grad for name, p in model.named_parameters()})


def against_trl_gkd(folder: Path) -> float:
    """Our gradient, in expectation over each next token, against TRL's of the reverse KL over the vocabulary (GKD)."""
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason=NO_GROUP).GKDTrainer
    at, teacher = setting(folder), teacher_of(setting(folder))
    model, learner = AutoModelForCausalLM.from_pretrained(at.model, dtype=torch.float32), learner_of(at)
    rows = at.rows[:2]
    batch = make_batch(rows)
    logits = model(input_ids=batch.input_ids).logits
    with torch.no_grad():
        their_logits = teacher(input_ids=batch.input_ids).logits
    labels = torch.where(batch.mask.bool(), batch.targets, -100)
    gkd.generalized_jsd_loss(logits, their_logits, labels, beta=1.0, temperature=TEMPERATURE).backward()
    own = (logits.detach() / TEMPERATURE).log_softmax(-1)
    every, positions = [], int(batch.mask.sum())
    for b, row in enumerate(rows):
        for t in (t for t, trained in enumerate(row.mask) if trained):
            zeros = (0.0,) * t
            for token, logp in enumerate(own[b, t - 1].tolist()):
                one = Datum((*row.token_ids[:t], token), (*(0,) * t, 1), (*zeros, logp), (*zeros, 0.0))
                every.append(replace(one, weights=(*zeros, math.exp(logp) / positions)))
    data = distill.taught(every, FrozenTeacher(teacher).logprobs(every, TEMPERATURE))
    learner.forward_backward(data, Objective(Reinforce(), TEMPERATURE))
    return relative(gradient(learner), {name: p.grad for name, p in model.named_parameters()})


def against_transformers(folder: Path) -> tuple[float, float]:
    """Cross-entropy against the loss of transformers' model."""
    at = setting(folder)
    data, learner = weighted(at.rows, "token"), learner_of(at)
    batch = make_batch(data)
    model = AutoModelForCausalLM.from_pretrained(at.model, dtype=torch.float32)
    ids = torch.cat([batch.input_ids[:, :1], batch.targets], 1)
    labels = torch.cat([torch.full((len(batch), 1), -100), batch.targets.where(batch.mask.bool(), -100)], 1)
    theirs = model(input_ids=ids, labels=labels).loss
    theirs.backward()
    metrics = learner.forward_backward(data, Objective())
    error = abs(metrics["loss"] - float(theirs.detach())) / float(theirs.detach())
    return error, relative(gradient(learner), {name: p.grad for name, p in model.named_parameters()})


# ------------------------------------------------------------------------------------------------------ Liger


class HeadModel(torch.nn.Module):
    """A language model whose hidden states `(B, T, H)` are parameters, under a head of `V` tokens."""

    def __init__(self, batch: Batch, vocabulary: int, width: int = 16) -> None:
        super().__init__()
        self.hidden = torch.nn.Parameter(torch.randn(*batch.mask.shape, width))
        self.head = torch.nn.Linear(width, vocabulary, bias=False)

    def base_model(self, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


def against_liger(one: Case, folder: Path) -> tuple[float, float]:
    """Relative errors of the loss and of the gradient in hidden states and head."""
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason=NO_GROUP)
    at = setting(folder)
    data: list[Datum] = weighted(at.rows, cast(Any, one.aggregation), LONGEST)
    torch.manual_seed(3)
    model = HeadModel(make_batch(data), vocabulary=320)
    logp, _ = token_logprobs(model, make_batch(data), TEMPERATURE)
    batch = make_batch(with_other_policies(data, values_of(logp.detach(), data), one.on_policy))
    ours = (batch.weights * per_token_loss(logp, batch, one.ours)).sum()
    names = dict(model.named_parameters())
    our_gradient = dict(zip(names, torch.autograd.grad(ours, list(names.values())), strict=True))

    settings = {"epsilon_low": 0.2, "epsilon_high": 0.2, "use_bias_correction_kl": False} | one.theirs
    liger = chunked.LigerFusedLinearGRPOLoss(
        beta=one.kl,
        use_ref_model=one.kl > 0,
        compiled=False,
        temperature=TEMPERATURE,
        max_completion_length=LONGEST,
        **settings,
    )
    theirs, _ = liger(
        model.hidden,
        model.head.weight,
        batch.targets,
        batch.mask,
        torch.tensor([row.advantages[-1] for row in at.rows]),
        ref_per_token_logps=batch.ref_logprobs if one.kl else None,
        old_per_token_logps=batch.old_logprobs,
    )
    their_gradient = dict(zip(names, torch.autograd.grad(theirs, list(names.values())), strict=True))
    value = float(theirs.detach())
    return abs(float(ours.detach()) - value) / abs(value), relative(our_gradient, their_gradient)


# ------------------------------------------------------------------------------------------------------ tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.mark.parametrize("against", [against_trl, against_liger])
@pytest.mark.parametrize("one", CASES, ids=lambda one: one.name)
def test_loss_and_gradient(one: Case, against: Callable[[Case, Path], tuple[float, float]], folder: Path) -> None:
    if against is against_liger and not one.liger:
        pytest.skip("Liger has it not, or otherwise")
    loss, gradient_ = against(one, folder)
    assert loss <= LIMIT and gradient_ <= LIMIT


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_a_corrected_update_is_trls(kind, folder):
    assert max(against_trl_corrected(kind, folder)) <= LIMIT


def test_rloo_has_the_gradient_of_trls(folder):
    assert against_trl_rloo(folder) <= LIMIT


def test_distillation_is_trls_on_the_sampled_tokens(folder):
    assert max(against_trl_distillation(folder)) <= LIMIT


def test_distillation_is_trls_gkd_in_expectation(folder):
    assert against_trl_gkd(folder) <= LIMIT


def test_cross_entropy_is_that_of_transformers(folder):
    assert max(against_transformers(folder)) <= LIMIT


def table(folder: Path) -> Iterator[str]:
    """What docs/algorithms.md quotes: objective, against what, largest relative errors of loss and gradient."""
    yield "| objective | against | loss | gradient |\n|---|---|---|---|"
    for one in CASES:
        found = [against(one, folder) for against in (against_trl, against_liger)[: 1 + one.liger]]
        whom = "TRL, Liger" if one.liger else "TRL"
        yield "| {} | {} | {:.1e} | {:.1e} |".format(one.name, whom, *map(max, zip(*found, strict=True)))
    for kind in CORRECTIONS:
        yield "| {} | TRL | {:.1e} | {:.1e} |".format(kind, *against_trl_corrected(kind, folder))
    yield f"| RLOO | TRL | | {against_trl_rloo(folder):.1e} |"
    yield "| distillation | TRL's IW-OPD, gamma 0 | {:.1e} | {:.1e} |".format(*against_trl_distillation(folder))
    yield f"| distillation, all next tokens | TRL's GKD, beta 1 | | {against_trl_gkd(folder):.1e} |"
    yield "| cross-entropy | transformers | {:.1e} | {:.1e} |".format(*against_transformers(folder))
    exact = torch.tensor(numeric_gradient(lambda p: exact_kl(p, REFERENCE)))
    for estimator in KL_ESTIMATORS:
        found = [torch.tensor(expected_kl_term(p, estimator, True)[1]) for p in (POLICY.softmax(0), STALE)]
        error = max(float((g - exact).norm() / exact.norm()) for g in found)
        yield f"| KL term, {estimator} | finite differences of the exact KL | | {error:.1e} |"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for line in table(Path(scratch)):
            print(line)
