"""Tasks that a tiny model learns: fine-tuned on a teacher of mixed quality, it finds out what pays."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_gsm8k.evals.accuracy import read_rows
from tests.toys import cli

GAIN = 0.20


def pipeline(folder: Path, *more: str) -> dict[str, Any]:
    done = cli("pipeline", "--preset", "tiny", "--out_dir", folder, "--seed", "0", "--json", *more)
    sys.stderr.write(done.stderr[-2000:])
    assert done.returncode == 0
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"stages": {stage["name"]: stage for stage in found["stages"]}}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sort_words", "countdown"])
def test_grpo_gains_what_imitation_left(task: str, tmp_path: Path) -> None:
    stages = pipeline(tmp_path / task, "--task", task)["stages"]
    assert stages["grpo"]["accuracy"] >= stages["sft"]["accuracy"] + GAIN
    assert stages["grpo"]["ci95"][0] > stages["ei"]["ci95"][1]


@pytest.mark.slow
def test_the_calculator_is_called_where_guessing_fails(tmp_path: Path) -> None:
    stages = pipeline(tmp_path / "calls", "--task", "gsm8k_calculator")["stages"]
    assert stages["grpo"]["accuracy"] >= stages["sft"]["accuracy"] + 0.15
    before, after = (
        [row for rows in read_rows(Path(stages[name]["results_path"])).values() for row in rows]
        for name in ("sft", "grpo")
    )
    guessed = [row["correct"] for row in before if "<<" not in row["response"]]
    assert sum(guessed) < 0.1 * len(guessed)
    assert sum("<<" in row["response"] for row in after) > 0.9 * len(after)
