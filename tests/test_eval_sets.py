"""Evaluation sets by name: small files of the shape that each has on the hub, one table of several, paired drops."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from grpo_gsm8k import config, eval_sets, fast_eval_vllm
from grpo_gsm8k.errors import ConfigError, DataError
from grpo_gsm8k.evals import tables
from grpo_gsm8k.evals.drops import drops_of
from grpo_gsm8k.evals.stats import paired_drop
from grpo_gsm8k.tasks import load_task
from grpo_gsm8k.tasks.base import load_examples, seed_id
from tests import fake_hub
from tests.toys import REPOSITORY, cli

KINDS = ("numerical substitution", "distraction insertion", "critical thinking")


def question(i: int) -> str:
    return f"Ann has {i} apples and buys 2 more. How many does she have?"


def gsm8k_row(i: int) -> dict[str, Any]:
    return {"question": question(i), "answer": f"She has {i}+2=<<{i}+2={i + 2}>>{i + 2} apples.\n#### {i + 2}"}


def plus_rows(n: int) -> list[dict[str, Any]]:
    seeds = [(i, gsm8k_row(i)) for i in range(1, n + 1)]
    return [
        {
            "question": f"{kind}: {seed['question']}",
            "solution": f"It is {i + 3}.",
            "answer": "None" if kind == "critical thinking" else str(i + 3),
            "perturbation_type": kind,
            "seed_question": seed["question"],
            "seed_solution": seed["answer"].partition("\n####")[0],
            "seed_answer": str(i + 2),
        }
        for i, seed in seeds
        for kind in KINDS
    ]


def symbolic_rows(n: int, instances: int = 2) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "instance": k,
            "question": f"Instance {k}: {question(10 * i + k)}",
            "answer": f"#### {10 * i + k + 2}",
            "original_id": 100 + i,
            "original_question": question(i),
            "original_answer": gsm8k_row(i)["answer"],
            "canary": "keep me out of training data",
        }
        for i in range(1, n + 1)
        for k in range(instances)
    ]


def math_row(i: int, **more: Any) -> dict[str, Any]:
    return {"problem": f"What is $\\frac{{{i}}}{{7}}$?", "solution": f"It is $\\boxed{{\\frac{{{i}}}{{7}}}}$.", **more}


ROWS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "gsm8k": {
        "main/train-00000-of-00001.parquet": [gsm8k_row(i) for i in range(20, 30)],
        "main/test-00000-of-00001.parquet": [gsm8k_row(i) for i in range(1, 5)],
    },
    "gsm8k_platinum": {
        "main/test-00000-of-00001.parquet": [{**gsm8k_row(i), "cleaning_status": "verified"} for i in range(1, 5)]
    },
    "gsm_plus": {"data/test-00000-of-00001.jsonl": plus_rows(4)},
    "gsm_symbolic": {"main/test.jsonl": symbolic_rows(3)},
    "math": {
        f"{subject}/{split}-00000-of-00001.parquet": [
            math_row(100 * s + k, level="Level 1", type=subject) for k in range(1, 4 if split == "train" else 3)
        ]
        for split in ("train", "test")
        for s, subject in enumerate(eval_sets.SUBJECTS)
    },
    "math500": {
        "test.jsonl": [
            math_row(i, answer=f"\\frac{{{i}}}{{7}}", subject="Algebra", level=2, unique_id=f"test/algebra/{i}.json")
            for i in range(1, 6)
        ]
    },
}
"""Name of a set → its files on the hub, with rows of the true columns."""


def written(path: Path, rows: list[dict[str, Any]]) -> bytes:
    """The bytes of a file of rows, parquet or JSON lines by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.read_bytes()


def source_of(name: str, folder: Path) -> Path:
    for file, rows in ROWS[name].items():
        written(folder / file, rows)
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- making them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ROWS if name != "gsm8k"])
def test_a_set_from_its_own_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = source_of(name, tmp_path / "source"), tmp_path / "out"
    made = eval_sets.prepare(name, out, source, eval_n=5)
    wanted = eval_sets.SETS[name]
    said = capsys.readouterr().err
    assert wanted.licence in said and made["licence"] == wanted.licence and made["dataset"] == name
    manifest = json.loads((out / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("dataset", "licence", "task")} == {
        "dataset": name,
        "licence": wanted.licence,
        "task": wanted.task,
    }
    examples = load_examples(load_task(wanted.task), out / "test.jsonl")
    expected = [row for file, rows in ROWS[name].items() if "train" not in file for row in rows]
    graded = [row for row in expected if row.get("answer") != "None"]
    assert [e.text for e in examples] == [row.get("question", row.get("problem")) for row in graded]
    golds = [str(row.get("answer", row.get("solution"))).rpartition("#### ")[2] for row in graded]
    task = load_task(wanted.task)
    assert all(task.grade(e, f"\\boxed{{{e.answer}}}").correct for e in examples)
    assert wanted.task == "math" or [e.answer for e in examples] == golds
    assert made["test"] == len(examples) and sum(made["left_out"].values()) == len(expected) - len(graded)

    before = {path: path.read_bytes() for path in out.iterdir()}
    assert eval_sets.prepare(name, out, source, eval_n=5)["verified"]
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(DataError, match="was made with"):
        other = "math500" if name != "math500" else "gsm_plus"
        eval_sets.prepare(other, out, source_of(other, tmp_path / "other"))


def test_rewritten_problems_name_their_originals(tmp_path: Path) -> None:
    out = tmp_path / "plus"
    made = eval_sets.prepare("gsm_plus", out, source_of("gsm_plus", tmp_path / "source"))
    assert made["left_out"] == {"critical thinking: no number to grade against": 4}
    rows, seeds = read(out / "test.jsonl"), read(out / "seeds.jsonl")
    assert [row["perturbation"] for row in rows] == [*KINDS[:2]] * 4
    assert [row["id"] for row in rows[:3]] == ["gsm_plus-test-00000", "gsm_plus-test-00001", "gsm_plus-test-00003"]
    assert [(s["id"], s["question"], s["gold"]) for s in seeds] == [
        (seed_id(question(i)), question(i), str(i + 2)) for i in range(1, 5)
    ]
    assert [row["seed_id"] for row in rows] == [s["id"] for s in seeds for _ in range(2)]
    symbolic = tmp_path / "symbolic"
    eval_sets.prepare("gsm_symbolic", symbolic, source_of("gsm_symbolic", tmp_path / "source2"))
    assert [row["seed_id"] for row in read(symbolic / "test.jsonl")] == [s["id"] for s in seeds[:3] for _ in range(2)]
    assert read(symbolic / "seeds.jsonl") == [
        {**s, "answer": gsm8k_row(i)["answer"]} for i, s in enumerate(seeds[:3], 1)
    ]
    assert all("canary" not in row for row in read(symbolic / "test.jsonl"))


def test_math_reserves_validation_problems_and_keeps_its_columns(tmp_path: Path) -> None:
    out = tmp_path / "math"
    made = eval_sets.prepare("math", out, source_of("math", tmp_path / "source"), eval_n=5, seed=3)
    assert (made["train"], made["val"], made["test"]) == (16, 5, 14)
    order = list(range(21))
    random.Random(3).shuffle(order)
    assert [row["id"] for row in read(out / "val.jsonl")] == [f"math-train-{i:05d}" for i in sorted(order[:5])]
    row = read(out / "test.jsonl")[2]
    assert (row["id"], row["type"], row["answer"]) == ("math-test-00002", "counting_and_probability", "\\frac{101}{7}")
    with pytest.raises(ConfigError, match="leave a problem to train on, of 21"):
        eval_sets.prepare("math", tmp_path / "none", tmp_path / "source", eval_n=21)


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("gsm_plus", {"seed_question": None}, r"test\.jsonl:2: 'seed_question' must be text"),
        ("gsm_symbolic", {"answer": "none"}, r"test\.jsonl:2: no '####' in the answer"),
        ("gsm8k_platinum", {"question": ""}, r"test\.jsonl:2: 'question' is empty"),
        ("math500", {"problem": 3}, r"test\.jsonl:2: 'problem' must be text"),
    ],
)
def test_a_row_of_another_form_is_named(name: str, change: dict[str, Any], what: str, tmp_path: Path) -> None:
    rows = [row for rows in ROWS[name].values() for row in rows]
    written(tmp_path / "source/test.jsonl", [rows[0], {**rows[1], **change}])
    with pytest.raises(DataError, match=what):
        eval_sets.prepare(name, tmp_path / "out", tmp_path / "source")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--dataset gsm9k: known are gsm8k, gsm8k_platinum, gsm_plus"):
        eval_sets.prepare("gsm9k", tmp_path)
    with pytest.raises(DataError, match=r"a source folder has the hub's files, or test\.jsonl"):
        eval_sets.prepare("gsm_plus", tmp_path / "out", tmp_path)
    with pytest.raises(ConfigError, match="keeps GSM8K's source files"):
        eval_sets.prepare("gsm_plus", tmp_path / "out", tmp_path, snapshot_dir=tmp_path / "kept")
    done = cli("data", "--dataset", "math500", "--task", "countdown", "--out_dir", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "its task is math" in done.stderr


class SetsHub(fake_hub.FakeHub):
    """A hub with data sets, at any commit."""

    def app(self) -> web.Application:
        app = super().app()
        app.router.add_get("/api/datasets/{owner}/{name}/revision/{revision}", self.model)
        app.router.add_get("/datasets/{owner}/{name}/resolve/{revision}/{path:.*}", self.resolve)
        return app


def data(url: str, home: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    own = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": "", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "grpo_gsm8k.cli", "data", *map(str, args)]
    environment = {**os.environ, **own, "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


def test_from_the_hub_at_a_pinned_commit_and_at_one_that_is_found_out(tmp_path: Path) -> None:
    hub, home = SetsHub("hf_token"), tmp_path / "home"
    for name, files in ROWS.items():
        hub.files[eval_sets.SETS[name].repo] = {
            file: written(tmp_path / "source" / name / file, rows) for file, rows in files.items()
        }
    with fake_hub.serve(hub) as running:
        done = data(running.url, home, "--dataset", "gsm_plus", "--out_dir", tmp_path / "plus", "--json")
        assert done.returncode == 0, done.stderr
        made, pin = json.loads(done.stdout), eval_sets.SETS["gsm_plus"].revision
        assert (made["test"], made["revision"], made["source"]) == (8, pin, "qintongli/GSM-Plus")
        assert f"gsm_plus: qintongli/GSM-Plus at {pin}, licence CC-BY-SA-4.0" in done.stderr
        done = data(running.url, home, "--dataset", "gsm8k_platinum", "--out_dir", tmp_path / "platinum", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["revision"] == "c" * 40 and "not pinned to a commit here" in done.stderr
    # Without the hub: the manifest has the commit, and the hub's cache the files.
    again = data(
        "http://127.0.0.1:9", home, "--dataset", "gsm8k_platinum", "--out_dir", tmp_path / "platinum", "--json"
    )
    assert again.returncode == 0 and json.loads(again.stdout)["verified"], again.stderr


def test_every_pin_is_a_commit_and_the_missing_one_is_known() -> None:
    pins = {name: one.revision for name, one in eval_sets.SETS.items()}
    assert [name for name, pin in pins.items() if not pin] == ["gsm8k_platinum"]
    assert all(len(pin) == 40 and int(pin, 16) for pin in pins.values() if pin)


# --- drops --------------------------------------------------------------------------------------------------


def test_a_drop_by_hand() -> None:
    """Originals 1, 0, 1 against means 1/2, 0, 0: each original counts once, however many forms it has."""
    found = paired_drop({"a": 1.0, "b": 0.0, "c": 1.0, "alone": 0.0}, {"a": [1, 0], "b": [0], "c": [0, 0, 0], "x": [1]})
    assert (found.original, found.perturbed, found.drop) == (
        pytest.approx(2 / 3),
        pytest.approx(1 / 6),
        pytest.approx(0.5),
    )
    assert (found.seeds, found.problems) == (3, 6)
    assert found.ci95[0] <= 0.0 + 1e-9 and found.ci95[1] == pytest.approx(
        1.0
    )  # the worst and the best resample of three


@pytest.mark.slow
def test_the_interval_of_a_drop_holds_the_true_one_in_19_of_20_tables() -> None:
    """Forms of one problem share its difficulty; over 300 tables the interval misses 3 to 8 % of the time."""
    rng, missed, tables_drawn = random.Random(0), 0, 300
    for _ in range(tables_drawn):
        originals, variants = {}, {}
        for i in range(120):
            ease = rng.random()
            originals[str(i)] = float(rng.random() < ease)
            variants[str(i)] = [float(rng.random() < ease * 0.8) for _ in range(4)]
        low, high = paired_drop(originals, variants).ci95
        missed += not low <= 0.1 <= high  # the mean of ease is 0.5, that of 0.8 ease is 0.4
    assert 0.03 * tables_drawn <= missed <= 0.08 * tables_drawn


def row(id: str, text: str, correct: bool, **more: Any) -> dict[str, Any]:
    return {"id": id, "question": text, "correct": correct, "reward": float(correct), **more}


def test_forms_find_their_originals_by_the_question() -> None:
    """In GSM8K's own split, whose ids are other ones, and though blanks differ."""
    gsm8k = [row(f"gsm8k-test-{i}", question(i).replace(" ", "  "), i != 2) for i in (1, 2, 3)]
    rows = [
        row(f"plus-{i}-{k}", f"{kind} {i}", i == 1 and k == 0, seed_id=seed_id(question(i)), perturbation=kind)
        for i in (1, 2, 3, 4)
        for k, kind in enumerate(KINDS[:2])
    ]
    (found,) = drops_of({"gsm_plus": rows, "math500": [row("m", "other", True)], "gsm8k": gsm8k})
    assert (found["set"], found["originals"], found["seeds"], found["unpaired"]) == ("gsm_plus", "gsm8k", 3, 1)
    assert found["drop"] == pytest.approx(2 / 3 - 1 / 6) and found["problems"] == 6
    by_kind = {kind: part["drop"] for kind, part in found["by_perturbation"].items()}
    assert by_kind == {KINDS[0]: pytest.approx(1 / 3), KINDS[1]: pytest.approx(2 / 3)}
    assert drops_of({"gsm_plus": rows}) == []


# --- evaluating several -------------------------------------------------------------------------------------


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where three sets lie under their usual names."""
    monkeypatch.chdir(tmp_path)
    for name in ("gsm_plus", "math500", "gsm_symbolic"):
        eval_sets.prepare(name, Path(config.EVAL_SETS) / name, source_of(name, tmp_path / "source" / name))
    return tmp_path


def eval_config(tiny: SimpleNamespace, **flags: Any) -> Any:
    small = {"model_id": str(tiny.model), "max_new_tokens": 4, "device": "cpu", "prompt_style": "gsm8k"}
    return config.resolve("eval", flags={**small, **flags})


def test_several_sets_are_one_table_with_drops(
    tiny: SimpleNamespace, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = fast_eval_vllm.command(eval_config(tiny, dataset="gsm_plus,math500", out_dir="results"))
    assert [one["name"] for one in result["sets"]] == ["gsm_plus seeds", "gsm_plus", "math500"]
    assert [one["n"] for one in result["sets"]] == [4, 8, 5]
    assert [one["task"] for one in result["sets"]] == ["gsm8k", "gsm8k", "math"]
    (drop,) = result["drops"]
    seeds, plus = (read(Path(one["results_path"])) for one in result["sets"][:2])
    right = {r["id"]: r["correct"] for r in seeds}
    by_seed = {key: [r["correct"] for r in plus if r["seed_id"] == key] for key in right}
    assert drop["drop"] == pytest.approx(fmean(right[key] - fmean(own) for key, own in by_seed.items()))
    assert (drop["set"], drop["originals"], drop["seeds"], drop["problems"]) == ("gsm_plus", "gsm_plus seeds", 4, 8)
    assert set(drop["by_perturbation"]) == set(KINDS[:2])
    assert json.loads((Path(result["run_dir"]) / "data.json").read_text()).keys() == {
        "gsm_plus seeds",
        "gsm_plus",
        "math500",
    }
    capsys.readouterr()
    tables.print_eval(result)
    printed = capsys.readouterr().out
    for words in (
        "gsm_plus seeds",
        "math500",
        "drop in points",
        "gsm_plus against gsm_plus seeds: 4 originals, 8 forms",
    ):
        assert words in printed


def test_which_files_are_evaluated(tiny: SimpleNamespace, sets: Path) -> None:
    def paths(**flags: Any) -> list[str]:
        return fast_eval_vllm.eval_paths(eval_config(tiny, **flags))

    usual, at = "artifacts/data/test.jsonl", config.EVAL_SETS
    assert paths() == [usual]
    assert paths(eval_path="a.jsonl, b.jsonl") == ["a.jsonl", "b.jsonl"]
    assert paths(dataset="math500") == [f"{at}/math500/test.jsonl"]
    assert paths(dataset="gsm8k,gsm_plus") == [usual, f"{at}/gsm_plus/test.jsonl"]
    assert paths(dataset="gsm_symbolic", eval_path="a.jsonl") == [
        "a.jsonl",
        f"{at}/gsm_symbolic/seeds.jsonl",
        f"{at}/gsm_symbolic/test.jsonl",
    ]
    Path("with,comma.jsonl").write_text("{}")
    assert paths(eval_path="with,comma.jsonl") == ["with,comma.jsonl"]
    for wrong in ("a.jsonl,a.jsonl", "a.jsonl,"):
        with pytest.raises(ConfigError, match="named twice, or not at all"):
            paths(eval_path=wrong)
    with pytest.raises(ConfigError, match="known are gsm8k"):
        paths(dataset="gsm8k,gsm9k")


def test_the_flag_may_be_given_several_times(tiny: SimpleNamespace, tmp_path: Path) -> None:
    flags = ["--eval_path", tiny.data / "val.jsonl", "--eval_path", tiny.data / "test.jsonl", "--limit", "2"]
    flags += ["--max_new_tokens", "4", "--prompt_style", "gsm8k", "--device", "cpu", "--out_dir", tmp_path / "out"]
    done = cli(
        "eval",
        "--model_id",
        tiny.model,
        *flags,
        "--json",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [one["n"] for one in result["sets"]] == [2, 2] and result["drops"] == []
    assert [one["name"] for one in result["sets"]] == [f"{tiny.data.name}/val", f"{tiny.data.name}/test"]
