"""On-policy distillation: its advantages, its teacher, the cache, and whole runs with toys."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_gsm8k import cli, config, distill, grpo, pipeline, report, sft
from grpo_gsm8k.audit.fork import fork
from grpo_gsm8k.audit.replay import replay
from grpo_gsm8k.audit.verify import Options, verify
from grpo_gsm8k.datatypes import Datum
from grpo_gsm8k.engines.process import Engine
from grpo_gsm8k.engines.teacher import EngineTeacher, opened
from grpo_gsm8k.errors import CheckpointError, ConfigError, DataError, ModelError
from grpo_gsm8k.runs import diagnosis, rollouts
from grpo_gsm8k.trainer import teacher as teacher_module
from grpo_gsm8k.trainer.losses import Objective, make_loss, update_loss
from grpo_gsm8k.trainer.teacher import CachedTeacher, FrozenTeacher, config_of, load_teacher
from grpo_gsm8k.trainer.tiny_model import make_tiny_model
from tests.test_resume import story
from tests.toys import SMALL, attentive, batch_of, datum, make_model, renderer_for, stage_config

# ------------------------------------------------------------------------------------------------ the advantages


def test_each_token_has_its_own_advantage_by_hand():
    row = Datum((5, 6, 7, 8), (0, 1, 0, 1), (0.0, -1.0, 0.0, -0.5), (0.0, 2.0, 0.0, 2.0))
    scores = [(0.0, -0.25, 0.0, -3.0)]
    (alone,), (mixed,) = distill.taught([row], scores), distill.taught([row], scores, 0.5)
    assert alone.advantages == (0.0, 0.75, 0.0, -2.5)  # teacher less student; nothing where the environment spoke
    assert mixed.advantages == (0.0, 1.75, 0.0, -1.5)  # and half of the task's
    assert replace(alone, advantages=row.advantages) == row


def test_metrics_by_hand():
    rows = [datum((1, 2, 3), (0, 1, 1), (0.0, -1.0, -2.0)), datum((1, 4), (0, 1), (0.0, -0.5))]
    found = distill.teacher_metrics(rows, [(0.0, -1.5, -1.0), (0.0, -2.0)])
    assert found == pytest.approx(
        {
            "distill/reverse_kl": (0.5 - 1.0 + 1.5) / 3,
            "distill/response_kl": (-0.5 + 1.5) / 2,
            "distill/surprise_max": 1.5,
            "distill/teacher_logp": -4.5 / 3,
        }
    )
    assert distill.teacher_metrics([], []) == {}


@pytest.mark.parametrize("loss", ["reinforce", "grpo_clip", "cispo"])
def test_its_expected_gradient_is_that_of_the_reverse_kl(loss):
    """All next tokens at once, each with its probability, against autograd through the exact KL."""
    torch.manual_seed(0)
    logits, theirs = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64).log_softmax(-1)
    student = logits.clone().requires_grad_()
    logp = student.log_softmax(-1)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - theirs)).sum(), student)
    own = logits.log_softmax(-1)
    rows = [replace(datum((0, v), (0, 1), (0.0, float(own[v]))), weights=(0.0, float(own[v].exp()))) for v in range(7)]
    batch = batch_of(rows)
    data = distill.taught(rows, [(0.0, float(theirs[v])) for v in range(7)])
    batch = replace(
        batch,
        advantages=torch.tensor([[row.advantages[1]] for row in data], dtype=torch.float64),
        weights=own.exp().unsqueeze(1),
        old_logprobs=own.unsqueeze(1),
    )
    student = logits.clone().requires_grad_()
    objective = Objective(make_loss(loss, {"clip_eps": 0.2, "clip_eps_high": 0.2}))
    update_loss(student.log_softmax(-1).unsqueeze(1), batch, objective).backward()
    torch.testing.assert_close(student.grad, exact, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------- the teacher


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory, tiny):
    """A wider model with the student's vocabulary, whose tokens depend on what it attends to."""
    texts = [json.loads(line)["question"] for line in (tiny.data / "train.jsonl").read_text().splitlines()]
    folder = make_tiny_model(tmp_path_factory.mktemp("teacher") / "model", texts, 3, **{**SMALL, "hidden_size": 48})
    attentive(AutoModelForCausalLM.from_pretrained(folder)).save_pretrained(folder)
    return folder


ROWS = [
    datum((3, 9, 11, 4, 7), (0, 0, 1, 1, 1), (0.0, 0.0, -1.0, -2.0, -0.5)),
    datum((3, 9, 11, 4, 8, 20, 5), (0, 0, 1, 1, 0, 1, 1)),  # shares a prefix; the environment said 8
    datum((3, 6), (0, 1)),
]


@pytest.mark.parametrize("packs", ["on", "off"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_the_log_probabilities_of_the_teachers_own_logits(teacher_folder, packs, temperature):
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    expected = []
    for row in ROWS:
        with torch.no_grad():
            logp = (model(torch.tensor([row.token_ids])).logits[0].float() / temperature).log_softmax(-1)
        here = [0.0, *(float(logp[t, i]) for t, i in enumerate(row.token_ids[1:]))]
        expected.append([value * m for value, m in zip(here, row.mask, strict=True)])
    for cells in (0, 6):  # all in one pass, and one by one
        found = FrozenTeacher(model, cells, packs).logprobs(ROWS, temperature)
        assert [list(row) for row in found] == [pytest.approx(row, abs=2e-6) for row in expected]


def test_a_teacher_is_refused_whose_words_or_context_are_not_the_students(tiny, teacher_folder, tmp_path, capsys):
    other = make_model(tmp_path / "other", tiny.data, vocab_size=300)
    words = ["distill", "--model_id", str(tiny.model), "--data", str(tiny.data), "--device", "cpu"]
    words += ["--out_dir", str(tmp_path / "run"), "--max_new_tokens", "4", "--prompt_style", "gsm8k"]
    cases = {
        str(other): "has another vocabulary than the student (300 tokens against",
        str(tmp_path / "nowhere"): "nowhere",
        "no/such-model": "no/such-model",
        "tinker://model": "training service",
        "": "needs a teacher: pass --teacher",
    }
    for teacher, message in cases.items():
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, "--teacher", teacher])
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and message in lines[-1] and not (tmp_path / "run").exists(), (teacher, lines)
    cfg = stage_config("distill", teacher=str(teacher_folder), model_id=str(tiny.model))
    with pytest.raises(ModelError, match="lower --max_new_tokens"):
        load_teacher(cfg, 10_000)
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    with pytest.raises(ModelError, match="the student sampled id 5000, its teacher has"):
        FrozenTeacher(model).logprobs([datum((3, 5000), (0, 1))])


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"resample_zero_variance": 2}, "resample_zero_variance"),
        ({"top_p": 0.9}, "top_p"),
        ({"temperature": 0.0}, "temperature"),
        ({"group_size": 1, "reward_coef": 0.5}, "group of one"),
        ({"reward_coef": -1.0}, "at least 0"),
        ({"loss": "cross_entropy"}, "advantages"),
        ({"teacher_engine": "vllm", "temperature": 0.7}, "vLLM scores at temperature 1 alone"),
    ],
)
def test_settings_that_cannot_mean_what_they_say_are_refused(flags, word):
    with pytest.raises(ConfigError, match=word):
        distill.check(stage_config("distill", teacher="somewhere", **flags))


def test_without_the_tasks_reward_a_group_may_be_of_one():
    distill.check(stage_config("distill", teacher="somewhere", group_size=1))


@pytest.mark.parametrize("fault", ["", "die_in_score", "fewer_scores"])
def test_a_teacher_in_an_engine_is_asked_again_when_it_fails(fault, tiny, teacher_folder, tmp_path):
    """A stand-in engine says minus each id: the trained tokens' are kept, and an answer of other lengths is none."""
    cfg = stage_config("distill", model_id=str(teacher_folder))
    renderer = renderer_for(AutoTokenizer.from_pretrained(teacher_folder))
    how = {"module": "tests.fake_engine", "fault": fault, "marker": str(tmp_path / "marker")}
    frozen = FrozenTeacher(AutoModelForCausalLM.from_pretrained(teacher_folder))
    teacher = EngineTeacher(frozen, Engine(cfg, renderer, ["cpu"], **how), tmp_path / "handover")
    with closing(teacher):
        expected = [tuple(-float(i) if m else 0.0 for i, m in zip(r.token_ids, r.mask, strict=True)) for r in ROWS]
        assert teacher.logprobs(ROWS) == expected and teacher.sha256 == frozen.sha256
        assert teacher.engine.restarts == bool(fault)


def test_a_teacher_is_here_wherever_the_student_samples(teacher_folder):
    """The engine's devices are the student's; a teacher in vLLM reads what vLLM is told."""
    cfg = stage_config("distill", teacher=str(teacher_folder), engine="vllm", vllm_device="cuda:1", gpu_mem_util=0.5)
    theirs = config_of(replace(cfg, teacher_device="cpu"))
    assert (theirs.engine, theirs.vllm_device, theirs.device) == ("hf", "", "cpu")
    alone = stage_config("distill", teacher="t", engine="hf", tp_size=2)
    assert alone.unread == ["--tp_size 2"] and replace(alone, teacher_engine="vllm").unread == []


def test_a_teacher_that_is_handed_to_vllm_has_the_dtype_of_its_gpu(teacher_folder, monkeypatch):
    """It is loaded into main memory, where `auto` means float32."""
    monkeypatch.setattr(teacher_module, "pick_device", torch.device)
    cfg = stage_config("distill", teacher=str(teacher_folder), teacher_engine="vllm", teacher_device="cuda:1")
    model = load_teacher(replace(cfg, dtype="auto"), 8).model
    assert (model.device.type, model.dtype) == ("cpu", torch.bfloat16)


def test_a_teacher_in_vllm_has_a_gpu_of_its_own_and_is_a_model(teacher_folder, tmp_path):
    cfg = stage_config("distill", teacher=str(teacher_folder), teacher_engine="vllm")
    with (
        pytest.raises(ConfigError, match="name the teacher's GPU"),
        opened(cfg, None, None, "cuda:0", tmp_path / "log"),
    ):
        pass
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigError, match="is an adapter; make it a model"):
        distill.check(replace(cfg, teacher=str(tmp_path)))
    with pytest.raises(ModelError, match="lower --max_new_tokens"):  # vLLM draws a token behind the row
        load_teacher(cfg, SMALL.get("context", 1024))


# ----------------------------------------------------------------------------------------------------- the cache


class Counting:
    """A teacher that notes what it is asked, and never gives the same number twice."""

    sha256 = "a" * 64

    def __init__(self):
        self.asked, self.told = [], 0

    def logprobs(self, data, temperature=1.0):
        self.asked.append([row.token_ids for row in data])
        out = []
        for row in data:
            self.told += 1
            out.append(tuple(-self.told / 7 - i if m else 0.0 for i, m in enumerate(row.mask)))
        return out


def test_equal_rows_are_scored_once_also_by_another_process(tmp_path):
    teacher = Counting()
    cached = CachedTeacher(teacher, tmp_path, 1 << 20)
    first, metrics = cached.logprobs([ROWS[0], ROWS[1], ROWS[0]], 1.0)
    assert [len(asked) for asked in teacher.asked] == [2] and first[0] == first[2] != first[1]
    assert metrics == {"perf/teacher_cached_frac": pytest.approx(3 / 10)}
    assert all(value == 0.0 for value, m in zip(first[1], ROWS[1].mask, strict=True) if not m)
    again, metrics = cached.logprobs(ROWS[:2], 1.0)
    assert again == first[:2] and metrics == {"perf/teacher_cached_frac": 1.0} and len(teacher.asked) == 1
    cached.logprobs(ROWS[:1], 0.5)  # another temperature, and another mask, are other rows
    cached.logprobs([replace(ROWS[0], mask=(0, 1, 1, 1, 1))], 1.0)
    assert len(teacher.asked) == 3
    fresh = CachedTeacher(other := Counting(), tmp_path, 1 << 20)
    assert fresh.logprobs(ROWS[:2], 1.0)[0] == first[:2] and not other.asked
    assert fresh.logprobs(ROWS, 1.0)[0][:2] == first[:2] and other.asked == [[ROWS[2].token_ids]]


def test_a_full_cache_stays_as_it_is_for_good(tmp_path):
    """Nothing is evicted and nothing squeezed in later: a resumed run finds what the first one found."""
    size = 24 + 4 * 3
    cached = CachedTeacher(Counting(), tmp_path, size + 30)
    first, _ = cached.logprobs(ROWS[:1], 1.0)
    cached.logprobs(ROWS[1:2], 1.0)  # 24 + 4 * 4 bytes: too many
    cached.logprobs(ROWS[2:], 1.0)  # 24 + 4 bytes would fit, but the cache is closed
    for one in (cached, CachedTeacher(Counting(), tmp_path, size + 30)):
        asked = one.teacher.asked
        asked.clear()
        assert one.logprobs(ROWS[:1], 1.0)[0] == first and not asked
        assert one.logprobs(ROWS[2:], 1.0)[1] == {"perf/teacher_cached_frac": 0.0} and len(asked) == 1
        assert one.bytes == size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "part_000001.safetensors"]
    nothing = CachedTeacher(Counting(), tmp_path / "none", 0)
    nothing.logprobs(ROWS, 1.0)
    assert not (tmp_path / "none").exists()


def test_a_cache_of_another_teacher_or_a_damaged_one_is_refused(tmp_path):
    CachedTeacher(Counting(), tmp_path, 1 << 20).logprobs(ROWS, 1.0)
    other = Counting()
    other.sha256 = "b" * 64
    with pytest.raises(CheckpointError, match="weights have changed since the run began"):
        CachedTeacher(other, tmp_path, 1 << 20)
    part = tmp_path / "part_000001.safetensors"
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="damaged"):
        CachedTeacher(Counting(), tmp_path, 1 << 20)


# ------------------------------------------------------------------------------------------------------ whole runs

RUN = {"steps": 4, "rollouts_per_step": 8, "group_size": 4, "lr": 1e-2, "eval_every": 2, "save_every": 1}


def settings(tiny, teacher, out, **flags):
    where = {"model_id": str(tiny.model), "data": str(tiny.data), "teacher": str(teacher), "out_dir": str(out)}
    return stage_config("distill", **{**RUN, **where, "deterministic": True, "resume": True, "keep_last": 10, **flags})


def metrics_of(run: Path):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


VARIANTS = {
    "plain": {},
    "one_step_off": {"mode": "one_step_off"},
    "lora": {"lora_rank": 4},
    "mixed": {
        "reward_coef": 0.5,
        "reward": "tests.toys:even_tokens",
        "minibatches": 2,
        "epochs": 2,
        "old_logprobs": "recompute",
        "kl_coef": 0.1,
        "teacher_cache_mb": 0,
    },
}
LONG = ("one_step_off", "lora")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in VARIANTS])
def test_a_run_in_pieces_is_the_run_in_one(name, tiny, teacher_folder, tmp_path):
    flags = VARIANTS[name]
    whole = distill.run(settings(tiny, teacher_folder, tmp_path / "whole", **flags))
    for stop in (1, 0):
        pieces = distill.run(settings(tiny, teacher_folder, tmp_path / "pieces", max_steps=stop, **flags))
    assert pieces["weights_sha256"] == whole["weights_sha256"] and whole["step"] == 4
    assert story(tmp_path / "pieces") == story(tmp_path / "whole")
    rows = metrics_of(tmp_path / "whole")
    assert all(row["policy/grad_norm"] > 0 and row["time/teacher"] > 0 for row in rows)
    assert (tmp_path / "whole" / "teacher").is_dir() == (name != "mixed")


def test_a_steps_rollouts_are_written_once(tiny, teacher_folder, tmp_path, monkeypatch):
    written, write = [], rollouts.write
    monkeypatch.setattr(rollouts, "write", lambda run, stored: (written.append(stored.step), write(run, stored))[1])
    distill.run(settings(tiny, teacher_folder, tmp_path / "run", max_steps=2))
    assert written == [1, 2]


def test_a_run_that_was_killed_scores_nothing_again(tiny, teacher_folder, tmp_path, monkeypatch):
    whole = distill.run(settings(tiny, teacher_folder, tmp_path / "whole"))
    run = tmp_path / "killed"
    distill.run(settings(tiny, teacher_folder, run, max_steps=3))
    for step in (2, 3):
        shutil.rmtree(run / f"checkpoints/step_{step:06d}")
    again = distill.run(settings(tiny, teacher_folder, run))
    assert again["weights_sha256"] == whole["weights_sha256"] and story(run) == story(tmp_path / "whole")
    assert [row["perf/teacher_cached_frac"] for row in metrics_of(run)[1:3]] == [1.0, 1.0]


def test_a_teacher_that_has_changed_is_refused(tiny, teacher_folder, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_folder, teacher)
    for cache in (0, 1):
        distill.run(settings(tiny, teacher, tmp_path / str(cache), max_steps=1, teacher_cache_mb=cache))
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    model.save_pretrained(teacher)
    for cache in (0, 1):
        with pytest.raises(CheckpointError, match="teacher's weights have changed"):
            distill.run(settings(tiny, teacher, tmp_path / str(cache), teacher_cache_mb=cache))


def test_a_run_is_replayed_verified_and_forked_without_its_teacher(tiny, teacher_folder, tmp_path):
    run, teacher = tmp_path / "run", tmp_path / "teacher"
    shutil.copytree(teacher_folder, teacher)
    flags = {"reward_coef": 0.5, "reward": "tests.toys:even_tokens", "save_every": 2, "engine": "hf"}
    distill.run(settings(tiny, teacher, run, **flags))
    found = fork(run, 2, [], tmp_path / "fork")
    assert found["weights_sha256"] == json.loads((run / "result.json").read_text())["weights_sha256"]
    shutil.rmtree(teacher)
    again = replay(run, 4, own_code=True)
    assert (again["verdict"], again["from_step"]) == ("bitwise", 2) and not again["metrics_that_differ"]
    whole = verify(run, Options(steps=2, own_code=True))
    assert whole["ok"], whole["damage"]
    part = run / "teacher" / "part_000003.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    damaged = verify(run, Options(steps=0, own_code=True))
    assert [one["file"] for one in damaged["damage"]] == ["teacher/part_000003.safetensors"]
    shutil.rmtree(run / "teacher")
    with pytest.raises(DataError, match="does not hold the teacher's scores"):
        replay(run, 4, own_code=True)


def test_a_student_comes_nearer_to_its_teacher(tiny, teacher_folder, tmp_path, capsys):
    """From random weights to those after six steps of SFT; the page shows it."""
    out, fitted = tmp_path / "run", {"epochs": 1, "batch_size": 8, "lr": 1e-2, "warmup_steps": 0, "eval_every": 99}
    where = {"model_id": str(tiny.model), "data": str(tiny.data), "out_dir": str(tmp_path / "sft")}
    teacher = sft.run(stage_config("sft", **where, **fitted))["model"]
    flags = {"steps": 12, "rollouts_per_step": 32, "group_size": 1, "lr": 1e-2, "eval_every": 12, "save_every": 12}
    distill.run(settings(tiny, teacher, out, **flags))
    kl = [row["distill/reverse_kl"] for row in metrics_of(out)]
    assert sum(kl[-3:]) < 0.75 * sum(kl[:3]), kl
    assert all(row["groups/zero_std_frac"] == 1.0 for row in metrics_of(out))  # GRPO would have learned nothing
    assert "warning" not in capsys.readouterr().err
    page = report.write_report([out], tmp_path / "page.html").read_text()
    for text in ("Distance from the teacher, nats per token", "The reverse KL to the teacher fell", "teacher"):
        assert text in page
    assert "Only mixed groups carry a gradient" not in page and "The loss is near 0" not in page


def test_a_student_that_does_not_move_is_told_why_and_not_of_its_groups():
    row = {"groups/zero_std_frac": 1.0, "groups/all_wrong_frac": 1.0, "groups/all_right_frac": 0.0, "reward/mean": 0.0}
    row |= {"policy/grad_norm": 1.0, "outcome/right_frac": 0.0, "outcome/wrong_frac": 1.0}
    rows = [{"step": k, **row, "distill/reverse_kl": 2 - k / 20, "policy/update_to_weight": 1e-3} for k in range(20)]
    assert diagnosis.diagnose(rows, {"teacher": "t", "lr": 1e-3}) == []
    of_grpo = [{name: value for name, value in r.items() if not name.startswith("distill/")} for r in rows]
    assert "flat_groups" in {finding.name for finding in diagnosis.diagnose(of_grpo, {"lr": 1e-3})}
    still = [{**r, "policy/update_to_weight": 0.0, "distill/reverse_kl": 2.0} for r in rows]
    assert [f.name for f in diagnosis.diagnose(still, {"teacher": "t", "lr": 0.0})] == ["frozen"]


def test_its_settings_have_all_layers():
    cfg = config.resolve("distill", preset="tiny", flags={"teacher": "t"}, sets=["distill.reward_coef=0.5"])
    assert (cfg.rollouts_per_step, cfg.aggregation, cfg.group_size, cfg.reward_coef) == (128, "token", 4, 0.5)
    assert config.resolve("distill", preset="tiny").max_new_tokens == 96  # of [common]
    assert config.resolve("grpo").aggregation == "sequence"


# ------------------------------------------------------------------------------------------------------ the toy


def over_tokens(rows: list[dict[str, float]], completions: int, most: float) -> float:
    """The share of right samples, averaged over the tokens that had been sampled before each step, up to `most`."""
    spent = np.cumsum([0.0, *(row["length/mean"] * completions for row in rows)])[:-1]
    grid = np.linspace(0, most, 101)
    return float(np.interp(grid, spent, [row["outcome/right_frac"] for row in rows]).mean())


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_student_learns_faster_from_the_demos_grpo_model_than_by_grpo_alone(tmp_path):
    """From the demo's SFT model, with the same prompts, at equal tokens, three seeds.

    Each at the learning rate of the preset: GRPO's was tuned for the demo.
    """
    demo = pipeline.run(config.build(config.PipelineConfig, {"preset": "tiny", "out_dir": str(tmp_path / "demo")}))
    models = {stage["name"]: stage["model"] for stage in demo["stages"]}
    where = {"model_id": models["sft"], "data": demo["data"], "rollouts_per_step": 64, "group_size": 8}
    for seed in range(3):
        found = {}
        for stage, module in (("distill", distill), ("grpo", grpo)):
            out = tmp_path / f"{stage}-{seed}"
            own = {"teacher": models["grpo"]} if stage == "distill" else {}
            flags = {**where, **own, "seed": seed, "max_steps": 8, "eval_every": 0, "out_dir": str(out)}
            module.run(config.resolve(stage, preset="tiny", flags=flags))
            found[stage] = metrics_of(out)
        first = [rows[0]["reward/mean"] for rows in found.values()]
        assert first[0] == first[1]  # the same samples, from the same weights
        most = min(sum(row["length/mean"] for row in rows[:-1]) for rows in found.values()) * 64
        taught, alone = (over_tokens(found[stage], 64, most) for stage in ("distill", "grpo"))
        assert taught > alone, (seed, taught, alone)
