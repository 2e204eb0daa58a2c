"""Our grading beside lm-evaluation-harness: hand-made completions of every class in docs/lm-eval.md.

Their half runs where lm-eval is installed (`uv run --extra lm-eval pytest tests/test_lm_eval.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_gsm8k.tasks.gsm8k.grading import grade
from tests.toys import REPOSITORY, make_data, make_model

CASES = [json.loads(line) for line in (Path(__file__).parent / "data/grading/lm_eval.jsonl").read_text().splitlines()]
SCRIPT = REPOSITORY / "scripts" / "against_lm_eval.py"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["response"][:30])
def test_our_half(case):
    assert [grade(case["response"], case["gold"], mode) for mode in ("strict", "flexible")] == [
        case["strict"],
        case["flexible"],
    ]


def test_every_class_is_explained():
    explained, script = (REPOSITORY / "docs" / "lm-eval.md").read_text(), SCRIPT.read_text()
    named = {case["class"] for case in CASES} - {"agree"}
    assert all(f"**{name}**" in explained and f'"{name}"' in script for name in named)


def results_file(path: Path) -> Path:
    rows = [
        {"id": f"c{i:02}", "question": f"q{i}", "answer": f"work\n#### {case['gold']}", "gold": case["gold"]}
        | {"prompt": f"q{i}", "response": case["response"], "tokens": 9, "sample": 0}
        | {"correct": case["flexible"], "correct_strict": case["strict"], "correct_flexible": case["flexible"]}
        for i, case in enumerate(CASES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def against(*args, cwd):
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, args)], cwd=cwd, capture_output=True, text=True, check=False
    )
    return done, json.loads(done.stdout) if done.stdout else None


@pytest.mark.slow
def test_their_half_and_the_classes(tmp_path):
    pytest.importorskip("lm_eval")
    done, report = against(results_file(tmp_path / "r.jsonl"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = report["same completions"]
    for mode, name in (("strict", "strict-match / strict"), ("flexible", "flexible-extract / flexible")):
        pairs = [(case[f"lm_{mode}"], case[mode]) for case in CASES]
        entry = found[name]
        counts = (entry["both_right"], entry["only_lm_eval_right"], entry["only_we_right"], entry["both_wrong"])
        assert counts == tuple(
            pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))
        )
        differ = [
            case.get(f"class_{mode}", case["class"])
            for case, (theirs, ours) in zip(CASES, pairs, strict=True)
            if theirs != ours
        ]
        assert entry["classes"] == {name: differ.count(name) for name in dict.fromkeys(differ)}


@pytest.mark.slow
def test_a_suite_is_held_against_an_earlier_one(tmp_path):
    """A local task, run twice; its earlier values are raised in between."""
    pytest.importorskip("lm_eval")
    data = make_data(tmp_path / "data", test=40)
    model = make_model(tmp_path / "model", data)
    task = {
        "task": "longer",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data / "test.jsonl")}},
    }
    task |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "num_fewshot": 0}
    task |= {"doc_to_choice": ["#### {{gold}}", "no"], "doc_to_target": 1, "metric_list": [{"metric": "acc"}]}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "longer.yaml").write_text(json.dumps(task))
    suite = ("--model_id", model, "--suite", "longer", "--tasks_dir", tmp_path / "tasks")
    done, _ = against(*suite, "--out", tmp_path / "before.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    before = json.loads((tmp_path / "before.json").read_text())
    ((name, values),) = before["values"].items()
    assert name.startswith("longer acc") and len(values) == 40
    before["values"][name] = dict.fromkeys(values, 2.0)  # as if it had been better on every document
    (tmp_path / "before.json").write_text(json.dumps(before))
    done, report = against(*suite, "--baseline", tmp_path / "before.json", cwd=tmp_path)
    assert done.returncode == 1 and report["compared"][0]["significant"] and "worse than" in done.stderr
    assert report["compared"][0]["difference"] == pytest.approx(sum(values.values()) / 40 - 2)
