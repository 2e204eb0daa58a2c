"""Before a study is run: what it will take (`--dry_run`), and how often it would be wrong (`--simulate N`)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_gsm8k import config
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.evals import crossed
from grpo_gsm8k.evals.stats import LEVEL, wilson
from grpo_gsm8k.repro import derive_seed
from grpo_gsm8k.study.analysis import decide
from grpo_gsm8k.study.jobs import START, Job, base_settings, jobs_of, material_of, spent_by
from grpo_gsm8k.study.plan import Arm, Plan, price
from grpo_gsm8k.trainer import costs

PROMPT = 100  # tokens that a prompt is taken to have
CPU_FLOPS, MFU = 20e9, 0.4  # of one core on small models; share of a GPU's peak
SIZES = (100, 200, 500, 1319)  # problems of the table of seeds


def dry_run(plan: Plan, folder: Path) -> dict[str, Any]:
    """Runs, tokens, time and cost of a plan, and its power. Makes nothing.

    Tokens are the most that the settings allow: as many completions as are sampled, each as long as it may be.
    """
    settings = base_settings(plan)
    jobs = jobs_of(plan, folder, material_of(plan, folder))
    speed, basis = _speed(plan, jobs, settings)
    counted = Counter(job.arm for job in jobs)
    rows = [_row(plan, name, n, speed, next(job for job in jobs if job.arm == name)) for name, n in counted.items()]

    def total(key: str) -> Any:
        known = [row[key] for row in rows]
        return None if None in known else round(sum(known), 2)

    seconds = total("seconds")
    return {
        "plan": str(plan.path),
        "plan_sha256": plan.sha256,
        "arms": rows,
        "runs": len(jobs),
        "done": sum(job.done for job in jobs),
        "tokens": total("tokens"),
        "seconds": seconds,
        "hours": None if seconds is None else round(seconds / 3600, 2),
        "dollars": total("dollars"),
        "basis": basis,
        "power": power_of(plan, _test_size(plan, settings)),
    }


def _row(plan: Plan, name: str, runs: int, speed: float | None, job: Job) -> dict[str, Any]:
    tokens = runs * _most_tokens(plan, job)
    seconds = tokens / speed if speed else None
    rate = price(plan, plan.arm(name)) if name != START else plan.cost.dollars_per_hour
    return {
        "arm": name,
        "label": plan.arm(name).label if name != START else "what arms start from",
        "stage": job.stage,
        "runs": runs,
        "tokens": tokens,
        "seconds": None if seconds is None else round(seconds, 1),
        "dollars": None if seconds is None else round(seconds / 3600 * rate, 2),
    }


def _most_tokens(plan: Plan, job: Job) -> int:
    """Of one run: sampled ones in GRPO and expert iteration, trained ones in SFT."""
    values = job.content["config"]
    if job.content["budget"]:
        reference = {**plan.settings(plan.reference.stage, plan.reference.settings)}
        return _sampled(plan.reference, reference)
    if job.stage == "sft":
        rows = _train_size(plan, values)
        return int(values["epochs"] * rows * (PROMPT + values["max_new_tokens"]))
    return _sampled(job.stage, values)


def _sampled(arm: Arm | str, values: dict[str, Any]) -> int:
    stage = arm if isinstance(arm, str) else arm.stage
    if stage == "grpo":
        return int(values["steps"] * values["rollouts_per_step"] * values["max_new_tokens"])
    completions = values.get("rounds", 1) * values.get("prompts_per_round", 0) * values.get("samples_per_prompt", 0)
    return int(completions * values["max_new_tokens"])


def _train_size(plan: Plan, values: dict[str, Any]) -> int:
    path = Path(values["data"]) / "train.jsonl"
    if path.is_file():
        with path.open("rb") as lines:
            return sum(1 for _ in lines)
    return int(plan.settings("toy", {})["train"])


def _test_size(plan: Plan, settings: dict[str, Any]) -> int:
    """Problems that each run answers; 0 where that is not known."""
    if plan.problems:
        return plan.problems
    path = Path(settings["data"] or "made") / "test.jsonl"
    if path.is_file():
        with path.open("rb") as lines:
            return sum(1 for _ in lines)
    return 0 if settings["data"] else int(plan.settings("toy", {})["test"])


# ------------------------------------------------------------------------------------------------ speed


def _speed(plan: Plan, jobs: Sequence[Job], settings: dict[str, Any]) -> tuple[float | None, str]:
    """Tokens of training a second, and how that is known."""
    used = [spent_by(job.content) for job in jobs if job.done and job.stage != "sft"]
    if (tokens := sum(one.tokens for one in used)) and (seconds := sum(one.seconds for one in used)):
        return tokens / seconds, f"measured: {tokens / seconds:,.0f} tokens/s in {len(used)} runs of this study"
    if plan.cost.tokens_per_s:
        return plan.cost.tokens_per_s, f"the plan: {plan.cost.tokens_per_s:,.0f} tokens/s"
    parameters = _parameters(plan, settings["model_id"])
    if parameters is None:
        return None, "unknown: the plan gives no tokens_per_s, and the model's size is not known before it is loaded"
    flops, where = _flops(plan, settings["device"])
    speed = flops / (8 * parameters)  # 2 operations a parameter to sample a token, 6 to train on it
    return speed, f"a rough guess: {speed:,.0f} tokens/s, of {parameters / 1e6:,.3g} M parameters on {where}"


def _parameters(plan: Plan, model_id: str) -> float | None:
    """By the settings of a model that is made, the config of one that is here, or the size in its name."""
    path = Path(model_id) / "config.json"
    if not model_id or path.is_file():
        tiny = plan.settings("tiny_model", {})
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        hidden = found.get("hidden_size", tiny["hidden_size"])
        layers = found.get("num_hidden_layers", tiny["layers"])
        vocabulary = found.get("vocab_size", tiny["vocab_size"])
        inner = found.get("intermediate_size", 8 * hidden // 3)
        return float(layers * hidden * (4 * hidden + 3 * inner) + 2 * vocabulary * hidden)
    billions = re.search(r"(\d+(?:\.\d+)?)[bB](?![a-zA-Z])", Path(model_id).name)
    return float(billions[1]) * 1e9 if billions else None


def _flops(plan: Plan, device: str) -> tuple[float, str]:
    import torch

    gpu = plan.cost.gpu
    if gpu:
        config.check_known(gpu, costs.GPUS, f"{plan.path}: [cost] gpu: unknown")
        return MFU * costs.GPUS[gpu].flops, gpu
    if device != "cpu" and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        known = costs.gpu_called(name)
        return MFU * (known or costs.GPUS["A100"]).flops, name
    return CPU_FLOPS, "a CPU core"


# ------------------------------------------------------------------------------------------------ power


def power_of(plan: Plan, problems: int) -> dict[str, Any]:
    """What the plan can find, and how many seeds the effect needs on other numbers of problems."""
    asked = plan.power
    found: dict[str, Any] = {"effect": asked.effect, "goal": asked.power, "seeds": len(plan.seeds)}
    found |= {"problems": problems or None, "comparisons": len(plan.others), "looks": plan.looks}
    found["level"] = round(plan.strictest, 6)
    found["power"] = (
        round(crossed.power(asked.effect, plan.noise, len(plan.seeds), problems, plan.strictest), 3)
        if problems
        else None
    )
    found["planned"] = list(plan.planned)
    sizes = sorted({*SIZES, *([problems] if problems else [])})
    found["seeds_needed"] = {
        str(n): crossed.seeds_needed(asked.effect, plan.noise, n, plan.strictest, asked.power) for n in sizes
    }
    return found


def simulate(plan: Plan, studies: int) -> dict[str, Any]:
    """How often studies of this plan name a false winner, and how often they find the planned effect.

    Half of the studies have arms without any difference (A/A), half one arm that is better by the planned effect, all
    with the plan's noise. The answers are right or wrong, and are drawn from a model of their own.
    """
    problems = _test_size(plan, base_settings(plan))
    if not problems:
        raise ConfigError(f"{plan.path}: --simulate needs to know how many problems: problems = 500")
    import numpy as np

    effect, others = plan.power.effect, len(plan.others)
    if plan.power.accuracy + effect >= 1:
        effect = -effect
    shares, rng = crossed.copula(plan.noise), np.random.default_rng(derive_seed("study", studies))
    false, found = 0, 0
    for planted in (False, True):
        gains = [0.0, effect if planted else 0.0, *[0.0] * (others - 1)]
        for _ in range(studies):
            drawn = crossed.simulate(gains, plan.noise, len(plan.seeds), problems, rng, shares)
            verdicts = decide(drawn[0], {str(k): drawn[k] for k in range(1, others + 1)}, plan.looks)
            if planted:
                found += verdicts["1"].sign == (1 if effect > 0 else -1)
            else:
                false += any(one.sign for one in verdicts.values())
    return {
        "plan": str(plan.path),
        "plan_sha256": plan.sha256,
        "studies": studies,
        "seeds": len(plan.seeds),
        "problems": problems,
        "comparisons": others,
        "looks": plan.looks,
        "level": LEVEL,
        "false_winners": {"studies": false, "rate": false / studies, "ci95": wilson(false, studies)},
        "planted": {"effect": effect, "found": found, "rate": found / studies, "ci95": wilson(found, studies)},
        "power_planned": power_of(plan, problems)["power"],
    }
