"""Golden runs: the numbers that short runs log, stored. A refactor leaves them bitwise alone.

On the platform where they were written they must be equal to the last bit, on another within 1e-6. A change that is
meant to change numbers writes new ones, and says why in artifacts/RESULTS.md:

    OMP_NUM_THREADS=1 uv run python -m tests.test_golden
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from grpo_gsm8k import ei, grpo, repro, sft
from tests.toys import make_data, make_model, stage_config

FILE = Path(__file__).parent / "golden" / "runs.json"
RUNS = {
    "sft": (sft.run, {"epochs": 1, "batch_size": 8, "lr": 1e-3, "eval_every": 6}),
    "ei": (ei.run, {"rounds": 2, "steps_per_round": 3, "prompts_per_round": 12, "batch_size": 4, "lr": 1e-3}),
    "grpo": (grpo.run, {"steps": 6, "rollouts_per_step": 16, "group_size": 4, "minibatches": 2, "lr": 1e-3}),
    "one_step_off": (grpo.run, {"steps": 6, "rollouts_per_step": 16, "group_size": 4, "lr": 1e-3}),
}
MORE = {
    "grpo": {"epochs": 2, "kl_coef": 0.1, "reward": "tests.toys:even_tokens", "temperature": 0.8},
    "one_step_off": {
        "mode": "one_step_off",
        "old_logprobs": "recompute",
        "importance_correction": "truncate",
        "reward": "tests.toys:even_tokens",
    },
}
METRICS = ("loss", "policy/grad_norm", "policy/entropy", "reward/mean", "length/mean", "val/mean_tokens")


def numbers_of(name: str, model: Path, data: Path, out: Path) -> list[list[float | None]]:
    """What a run logs, a row a step, in the order of `METRICS`."""
    call, flags = RUNS[name]
    where = {"model_id": str(model), "data": str(data), "out_dir": str(out), "seed": 7, "deterministic": True}
    stage = "grpo" if name == "one_step_off" else name
    call(stage_config(stage, **{"eval_every": 3, "warmup_steps": 0, **where, **flags, **MORE.get(name, {})}))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[row.get(metric) for metric in METRICS] for row in rows]


def here() -> str:
    """What decides the order of sums, so far as a program can tell."""
    found = repro.machine()
    return ", ".join(str(found[key]) for key in ("torch", "machine", "cpu_model", "cpu_capability", "torch_threads"))


@pytest.fixture
def every_answer_right(monkeypatch):
    """A random model solves nothing; for expert iteration to have something to learn from, say it does."""
    monkeypatch.setattr(ei, "keep_right", lambda cfg, group: list(group[:2]))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_logs_the_numbers_that_it_always_did(name, tiny, tmp_path, every_answer_right):
    golden = json.loads(FILE.read_text())
    found, expected = numbers_of(name, tiny.model, tiny.data, tmp_path / "run"), golden["runs"][name]
    assert len(found) == len(expected) == 6
    for row, wanted in zip(found, expected, strict=True):
        if golden["platform"] == here():
            assert row == wanted
        else:
            near = [value if value is None else pytest.approx(value, rel=1e-6, abs=1e-6) for value in wanted]
            assert row == near


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ei, "keep_right", lambda cfg, group: list(group[:2]))
        data = make_data(Path(folder) / "data")
        model = make_model(Path(folder) / "model", data)
        runs = {name: numbers_of(name, model, data, Path(folder) / name) for name in RUNS}
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps({"platform": here(), "metrics": METRICS, "runs": runs}, indent=1) + "\n")
