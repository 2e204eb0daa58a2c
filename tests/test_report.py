"""The report page, from synthetic pipeline directories whose numbers are known."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from grpo_gsm8k.errors import RunDirError
from grpo_gsm8k.report import write_report
from grpo_gsm8k.report.figures import draw
from grpo_gsm8k.report.headline import comparison_sentence, headline
from grpo_gsm8k.report.page import page
from grpo_gsm8k.report.panels import Line, Panel
from grpo_gsm8k.report.read import read_run
from grpo_gsm8k.report.words import p_value

HOSTILE = "</pre></script><img onerror=alert(1) src=x><svg onload=alert(2)> & \"quoted\" 'single' $x^2$"
STAGES = ("base", "sft", "ei", "grpo")
SHA = {name: (name[0] * 3 + "0123456789abcdef" * 4)[:64] for name in STAGES}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sft_rows(rng: random.Random, steps: int, start: float, floor: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = floor + (start - floor) * math.exp(-step / (steps / 5)) + rng.gauss(0, 0.02)
        row: dict[str, Any] = {
            "step": step,
            "progress/sft_step": step,
            "progress/done_frac": step / steps,
            "loss": loss,
            "policy/grad_norm": 0.3 + loss * abs(rng.gauss(1, 0.2)),
            "policy/lr": 1e-3 * min(1, step / 10) * (1 - step / (steps + 1)),
            "perf/tokens_per_s": 20_000 + rng.gauss(0, 800),
        }
        if step % (steps // 5) == 0:
            p = 0.85 * (1 - math.exp(-3 * step / steps))
            row |= {"val/accuracy": p, "val/ci_low": p - 0.06, "val/ci_high": p + 0.05, "val/n": 200}
            row["val/format_accuracy"] = min(1.0, p + 0.12)
        rows.append(row)
    return rows


def grpo_rows(rng: random.Random, steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        t = step / steps
        right = min(0.99, max(0.0, 0.62 + 0.33 * (1 - math.exp(-3 * t)) + rng.gauss(0, 0.03)))
        all_right = max(0.0, right**3 + rng.gauss(0, 0.02))
        all_wrong = max(0.0, (1 - right) ** 2 + rng.gauss(0, 0.01))
        cut, form = 0.04 * (1 - t), 0.06 * (1 - t)
        sampling, training = 1.1 + 0.2 * rng.random(), 0.7 + 0.1 * rng.random()
        mismatch = 2e-3 * math.exp(rng.gauss(0, 0.3))
        length = 78 + 14 * t + rng.gauss(0, 2)
        row: dict[str, Any] = {
            "step": step,
            "progress/grpo_step": step,
            "reward/mean": right + 0.1 * (1 - form),
            "reward/answer": right,
            "reward/format": 0.1 * (1 - form),
            "reward/std": 0.3 * (1 - t) + 0.1,
            "reward/min": 0.0,
            "reward/max": 1.1,
            "groups/zero_std_frac": all_right + all_wrong,
            "groups/all_right_frac": all_right,
            "groups/all_wrong_frac": all_wrong,
            "outcome/right_frac": right,
            "outcome/wrong_frac": max(0.0, 1 - right - cut - form),
            "outcome/format_error_frac": form,
            "outcome/truncated_frac": cut,
            "length/mean": length,
            "length/right_mean": length - 4,
            "length/wrong_mean": length + 22 + rng.gauss(0, 5),
            "policy/entropy": 0.15 + 0.4 * math.exp(-2 * t) + rng.gauss(0, 0.01),
            "policy/clip_frac": 0.01 + 0.004 * rng.random(),
            "policy/clip_frac_low": 0.004,
            "policy/clip_frac_high": 0.006 + 0.004 * rng.random(),
            "policy/approx_kl": 1e-3 * rng.random(),
            "policy/grad_norm": 0.4 + 0.2 * abs(rng.gauss(0, 1)) + (3 if step == 37 else 0),
            "policy/lr": 3e-5,
            "policy/update_to_weight": 2e-5 * (1 + 0.2 * rng.random()),
            "mismatch/logp_abs_mean": mismatch,
            "mismatch/logp_abs_max": mismatch * 40 * (1 + rng.random()),
            "mismatch/ess": 0.98,
            "time/sampling": sampling,
            "time/training": training,
            "time/compute_rewards": 0.05,
            "time/build_data": 0.03,
            "time/save_weights": 0.12,
            "time/eval": 0.9 if step % 10 == 0 else 0.0,
            "perf/tokens_per_s": 9000 + rng.gauss(0, 300),
            "novel/thing": float(step * step),
        }
        row["time/total"] = sum(v for k, v in row.items() if k.startswith("time/")) + 0.08
        if step % 10 == 0:
            p = 0.9 + 0.06 * t
            row |= {"val/accuracy": p, "val/ci_low": p - 0.04, "val/ci_high": p + 0.03, "val/n": 200}
            row["val/format_accuracy"] = 0.99
        rows.append(row)
    return rows


def eval_rows(stage: str, skill: float, n: int, seed: int) -> list[dict[str, Any]]:
    """Rows of one stage; a problem's difficulty is the same for every stage, give or take some luck."""
    rows = []
    for i in range(n):
        rng = random.Random(f"{seed}:{i}")
        a, b, hard = rng.randint(2, 60), rng.randint(2, 60), rng.random()
        right = hard + random.Random(f"{seed}:{i}:{stage}").gauss(0, 0.03) < skill
        guess = a * b if right else a * b + rng.randint(1, 9)
        steps = "".join(f"\nCheck {k}: {a} × {k} = {a * k}." for k in range(1, 2 + (i % 5) * 6))
        response = f"Each of {b} boxes holds {a} pens.{steps}\n{a} × {b} = {guess}\n#### {guess}"
        if stage == "base":
            response = f"pens pens {a} the the {b} of {a}"
        rows.append(
            {
                "id": f"test-{i}",
                "prompt": f"<user>Ann has {b} boxes of {a} pens.</user>",
                "question": f"Ann has {b} boxes of {a} pens each. How many pens does she have in all?",
                "gold": str(a * b),
                "response": response + (HOSTILE if i % 3 == 0 else ""),
                "extracted": None if stage == "base" else str(guess),
                "correct": stage != "base" and right,
                "format_ok": stage != "base",
                "finish_reason": "length" if stage == "base" else "stop",
                "tokens": len(response) // 4,
                "sample": 0,
                "weights_sha256": SHA[stage],
            }
        )
    return rows


def interval(p: float, n: int) -> list[float]:
    """Wilson's 95 % interval."""
    z = 1.959964
    middle, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))]


def make_pipeline(
    root: Path,
    skills: tuple[float, ...] = (0.0, 0.81, 0.92, 0.965),
    n: int = 600,
    steps: int = 60,
    seed: int = 3,
    lr: float = 3e-5,
) -> dict[str, Any]:
    """A finished pipeline directory as the pipeline writes it. Returns its pipeline.json."""
    rng = random.Random(seed)
    stages, right = [], {}
    for name, skill in zip(STAGES, skills, strict=True):
        rows = eval_rows(name, skill, n, seed)
        jsonl(root / "evals" / f"{name}.jsonl", rows)
        right[name] = {r["id"] for r in rows if r["correct"]}
        p = len(right[name]) / n
        stages.append(
            {
                "name": name,
                "model": f"{name}/final",
                "accuracy": p,
                "ci95": interval(p, n),
                "n": n,
                "seconds": {"base": 8.0, "sft": 95.0, "ei": 210.0, "grpo": 172.0}[name],
                "format_accuracy": 0.0 if name == "base" else 0.99,
                "truncated": 1.0 if name == "base" else 0.002,
                "mean_tokens": sum(r["tokens"] for r in rows) / n,
                "weights_sha256": SHA[name],
                "results_path": f"evals/{name}.jsonl",
            }
        )
    comparisons = []
    for a, b in (("base", "sft"), ("sft", "ei"), ("ei", "grpo"), ("base", "grpo")):
        won, lost = len(right[b] - right[a]), len(right[a] - right[b])
        d, half = (won - lost) / n, 1.96 * math.sqrt(won + lost) / n
        p = min(1.0, 2 * sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost))
        pair = {"a": a, "b": b, "difference": d, "ci95": [d - half, d + half], "p_value": p, "n": n}
        comparisons.append({**pair, "won": won, "lost": lost})
    summary = {
        "run_dir": root.name,
        "data": "toy problems",
        "preset": "tiny",
        "seed": seed,
        "seconds": 491.3,
        "model_id": "tiny-llama-1m",
        "stages": stages,
        "comparisons": comparisons,
    }
    (root / "pipeline.json").write_text(json.dumps(summary))
    (root / "command.txt").write_text("grpo-gsm8k pipeline --preset tiny --seed 3\n")
    jsonl(root / "sft" / "metrics.jsonl", sft_rows(rng, 100, 4.2, 0.4))
    ei: list[dict[str, Any]] = []
    for k in (1, 2, 3):
        rows = sft_rows(rng, 30, 0.7 - 0.1 * k, 0.3 - 0.04 * k)
        for row in rows:
            row["step"] += 30 * (k - 1)
        ei += rows
        rows[-1] |= {"ei/round": k, "ei/yield": 0.55 + 0.1 * k, "ei/kept": 1500 + 200 * k}
        rows[-1] |= {"ei/solved_frac": 0.8 + 0.05 * k, "ei/distinct_per_problem": 3.1 - 0.5 * k}
    jsonl(root / "ei" / "metrics.jsonl", ei)
    jsonl(root / "grpo" / "metrics.jsonl", grpo_rows(rng, steps))
    for name in STAGES[1:]:
        (root / name / "config.toml").write_text(f'[train]\nlr = {lr}\nstage = "{name}"\n')
        (root / name / "data.json").write_text('{"train.jsonl": "ab12"}')
        (root / name / "sys").mkdir()
        (root / name / "sys" / "packages.txt").write_text("torch==2.13.0\n")
        (root / name / "sys" / "env.txt").write_text("HOME=/home/somebody\n")
    for step in (20, 60):
        rows = [{**r, "reward": 1.1, "components": {"answer": 1.0}} for r in eval_rows("grpo", 0.9, 6, step)]
        jsonl(root / "grpo" / "samples" / f"step_{step:06d}.jsonl", rows)
    return summary


class Checker(HTMLParser):
    """Balanced tags, and everything an attacker or a network would need."""

    VOID = frozenset({"meta", "br", "img", "input", "link", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        self.ids += [v or "" for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"unexpected </{tag}>"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def check(document: str) -> str:
    """Assert that the page is well formed, inert and self-contained; return its text."""
    parser = Checker()
    parser.feed(document)
    parser.close()
    assert parser.open == []
    assert not parser.seen & {"script", "img", "link", "iframe", "object", "embed", "foreignobject", "base"}
    assert len(parser.ids) == len(set(parser.ids))
    for tag, key, value in parser.attributes:
        assert not key.startswith("on") and key not in {"src", "srcset", "action", "xmlns"}, (tag, key, value)
        assert not key.endswith("href") or value.startswith("#"), (tag, key, value)
        assert "url(" not in value.replace("url(#", ""), (tag, key, value)
        if key.endswith("href"):
            assert value[1:] in parser.ids, value
    assert "http://" not in document and "https://" not in document and "@import" not in document
    for svg in re.findall(r"<svg.*?</svg>", document, flags=re.S):
        root = ET.fromstring(svg)
        assert root.attrib["viewBox"] and "font-family" not in svg and "#" not in re.sub(r'(href="|url\()#', "", svg)
    return re.sub(r"[\s\u00a0]+", " ", " ".join(parser.text))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    root = tmp_path_factory.mktemp("runs") / "20260101T120000_abc1234"
    summary = make_pipeline(root)
    return root, summary, write_report([root]).read_text()


def test_page_is_valid_inert_and_small(finished: tuple[Path, dict[str, Any], str]) -> None:
    root, _, document = finished
    assert (root / "report.html").read_text() == document
    check(document)
    assert len(document) < 1_500_000
    assert "Incomplete" not in document


def test_values_are_those_of_the_files(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, summary, document = finished
    text = check(document)
    scores = [f"{100 * s['accuracy']:.1f} %" for s in summary["stages"]]
    assert f"From {scores[0]} to {scores[-1]} on 600 held-out problems" in text
    assert scores[0] == "0.0 %" and all(score in text for score in scores)
    for pair in summary["comparisons"]:
        assert f"solved {pair['won']} that" in text and f"missed {pair['lost']} that" in text
        assert f"{100 * pair['difference']:+.1f} points" in text
    for word in ("tiny-llama-1m", "toy problems", "abc1234", "8 min", "grpo-gsm8k pipeline --preset tiny"):
        assert word in text
    assert SHA["grpo"][:12] in text and "env.txt" not in text and "somebody" not in document


def test_signals_and_unknown_metrics(finished: tuple[Path, dict[str, Any], str]) -> None:
    root, _, document = finished
    text = check(document)
    rows = [json.loads(line) for line in (root / "grpo/metrics.jsonl").read_text().splitlines()]
    start, end = (sum(r["reward/mean"] for r in part) / 6 for part in (rows[:6], rows[-6:]))
    assert f"Mean reward what is optimised; should rise {start:.3g} {end:.3g}" in re.sub(" +", " ", text)
    assert re.search(r"novel/thing +60 1 3600 1 3600", re.sub(" +", " ", text))
    sampling = sum(r["time/sampling"] for r in rows)
    share = sampling / sum(r["time/total"] for r in rows)
    assert f"sampling 1 min {sampling - 60:.0f} s {100 * share:.1f} %" in re.sub(" +", " ", text)


def test_model_output_is_text(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, _, document = finished
    assert "&lt;/script&gt;&lt;img onerror=alert(1)" in document
    assert "<img" not in document and "</script" not in document
    assert HOSTILE[:30] in check(document)


def test_problem_mix(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, summary, document = finished
    text = check(document)
    last = summary["comparisons"][2]
    assert f"Fixed by GRPO: {last['won']}" in text and f"Broken by GRPO: {last['lost']}" in text
    both = 600 * summary["stages"][3]["accuracy"] - last["won"]
    assert f"Right before and after: {both:.0f}" in text


def test_same_files_same_bytes(finished: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    root, _, document = finished
    copy = tmp_path / "elsewhere" / root.name
    shutil.copytree(root, copy)
    assert write_report([copy], tmp_path / "again.html").read_text() == document
    assert not list(tmp_path.glob("*tmp*"))


def scored(accuracy: float, low: float, high: float) -> dict[str, Any]:
    return {"name": "base", "accuracy": accuracy, "ci95": [low, high], "n": 1319}


@pytest.mark.parametrize(
    ("last", "paired", "says"),
    [
        (scored(0.60, 0.57, 0.63), None, "From 50.0 % to 60.0 % on 1,319 held-out problems"),
        (scored(0.40, 0.37, 0.43), None, "It got worse: from 50.0 % to 40.0 % on 1,319 held-out problems"),
        (scored(0.52, 0.49, 0.55), None, "No measurable change: 50.0 % before, 52.0 % after, on 1,319 held-out"),
        (scored(0.52, 0.49, 0.55), [0.01, 0.03], "From 50.0 % to 52.0 %"),  # pairs tell what intervals cannot
        (scored(0.60, 0.57, 0.63), [-0.01, 0.2], "No measurable change"),
        ({"name": "sft", "accuracy": 0.52}, None, "From 50.0 % to 52.0 % on an unknown number of held-out"),
    ],
)
def test_headline_is_honest(tmp_path: Path, last: dict[str, Any], paired: Any, says: str) -> None:
    pairs = [{"a": "base", "b": "sft", "ci95": paired}] if paired else []
    summary = {"stages": [scored(0.5, 0.47, 0.53), {**last, "name": "sft"}], "comparisons": pairs}
    (tmp_path / "pipeline.json").write_text(json.dumps(summary))
    assert headline(read_run(tmp_path)).replace("\u00a0", " ").startswith(says)


def test_comparison_in_words() -> None:
    pair = {"a": "sft", "b": "ei", "difference": 0.1133, "ci95": [0.08, 0.147], "p_value": 1e-9, "n": 600}
    text = comparison_sentence({**pair, "won": 80, "lost": 12}).replace("\u00a0", " ")
    assert text == (
        "EI solved 80 that SFT missed and missed 12 that SFT solved: +11.3 points "
        "(95 % CI +8.0 to +14.7; exact McNemar p = 1.0 × 10⁻⁹; n = 600)."
    )
    assert "may be luck" in comparison_sentence({**pair, "ci95": [-0.01, 0.02]})
    assert [p_value(p).replace("\u00a0", " ") for p in (0.04, 0.0, None)] == ["= 0.040", "< 10⁻¹²", "not recorded"]


def stuck_rows(steps: int) -> list[dict[str, Any]]:
    """A run whose rewards are all 0: half of the completions are cut off, half have no well-formed answer."""
    zeros = (
        "reward/mean",
        "reward/min",
        "reward/max",
        "outcome/right_frac",
        "groups/all_right_frac",
        "policy/grad_norm",
    )
    halves = ("outcome/truncated_frac", "outcome/format_error_frac")
    ones = ("groups/zero_std_frac", "groups/all_wrong_frac")
    row = dict.fromkeys(zeros, 0.0) | dict.fromkeys(halves, 0.5) | dict.fromkeys(ones, 1.0)
    return [{"step": step, **row} for step in range(1, steps + 1)]


def test_what_holds_the_reward_back(tmp_path: Path) -> None:
    root = tmp_path / "run"
    jsonl(root / "metrics.jsonl", stuck_rows(20))
    (root / "config.toml").write_text('[grpo]\nmax_new_tokens = 33\nprompt_style = "r1_zero"\n')
    rows = [
        {**row, "id": f"{kind}-{i}", "finish_reason": reason, "response": f"{kind} {i} {HOSTILE}", "reward": 0.0}
        for kind, reason in (("rambling", "length"), ("shapeless", "stop"))
        for i, row in enumerate(eval_rows("base", 0.0, 5, 1))
    ]
    jsonl(root / "samples" / "step_000010.jsonl", [{**row, "response": "too old"} for row in rows])
    jsonl(root / "samples" / "step_000020.jsonl", rows)
    document = write_report([root]).read_text()
    text = check(document)
    part = text[text.index("What holds the reward back", text.index("Judged over the last 10 steps") - 40) :]
    part = part[: part.index("GRPO: is it learning")]
    found = (
        "100 % of the groups all rewards are equal",
        "50 % of the completions were cut off",
        "50 % of the completions ended",
    )
    assert [part.index(words) for words in found] == sorted(part.index(words) for words in found)
    assert "max_new_tokens = 33" in part and "prompt_style = r1_zero" in part and "too old" not in part
    assert [f"{kind} {i}" in part for kind in ("rambling", "shapeless") for i in range(5)] == [True] * 3 + [
        False
    ] * 2 + [True] * 3 + [False] * 2
    assert "Nothing is seen" not in text and "<img" not in document


def test_a_healthy_run_gets_one_calm_line(tmp_path: Path) -> None:
    rows = [row | {"loss": 1e-8} for row in grpo_rows(random.Random(0), 60)]
    jsonl(tmp_path / "metrics.jsonl", rows)
    text = check(write_report([tmp_path]).read_text())
    assert "What holds the reward back" not in text
    assert "Nothing is seen that holds the reward back. The loss is near 0 (1e-08), and that is as it should be" in text
    jsonl(tmp_path / "metrics.jsonl", stuck_rows(9))
    text = check(write_report([tmp_path]).read_text())
    assert "holds the reward back" not in text and "Only 9 steps" in text


def test_unfinished_run(tmp_path: Path) -> None:
    root = tmp_path / "run"
    make_pipeline(root, n=50, steps=8)
    (root / "pipeline.json").unlink()
    (root / "evals/grpo.jsonl").unlink()
    shutil.rmtree(root / "ei")
    with (root / "grpo/metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "reward/mean": NaN, "policy/entropy": 0.2}\n[1, 2]\n{"step": 10, "rewa')
    right = sum(json.loads(line)["correct"] for line in (root / "evals/ei.jsonl").read_text().splitlines())
    text = check(write_report([root]).read_text())
    assert "grpo/metrics.jsonl: 2 unreadable lines skipped" in text and "1 values are NaN" in text
    assert "No evaluation yet of GRPO" in text
    assert f"From 0.0 % to {2 * right:.1f} % on 50" in text  # the answers that were kept give the interval


@pytest.mark.parametrize("part", ["sft", "ei", "grpo"])
def test_single_run_directory(finished: tuple[Path, dict[str, Any], str], tmp_path: Path, part: str) -> None:
    text = check(write_report([finished[0] / part], tmp_path / "page.html").read_text())
    assert "on 200 validation problems" in text
    assert {"sft": "Loss", "ei": "Yield per round", "grpo": "Groups by outcome"}[part] in text


def test_just_started(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("seed = 1\n")
    assert "Nothing recorded yet" in check(write_report([tmp_path]).read_text())
    jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.5, "mismatch/logp_abs_mean": 0.0, "x": "text"}])
    assert "Loss from 2.5 to 2.5 in 1 step;" in check(write_report([tmp_path]).read_text())


def test_exact_sampler_on_a_log_axis(tmp_path: Path) -> None:
    rows: list[Any] = [{"step": i, "reward/mean": 0.5, "mismatch/logp_abs_mean": 0.0} for i in range(5)]
    jsonl(tmp_path / "metrics.jsonl", rows)
    assert "Zero at every step." in check(write_report([tmp_path]).read_text())


def test_late_rows_of_a_step_are_merged(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 9.0},
        {"step": 2, "loss": 2.0},
        {"step": 1, "val/n": 5},
    ]
    jsonl(tmp_path / "metrics.jsonl", rows)
    curves = read_run(tmp_path).parts["sft"]
    assert curves.series("loss") == ([1.0, 2.0], [3.0, 2.0]) and curves.series("val/n") == ([1.0], [5.0])


def test_several_runs(finished: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    other = tmp_path / '20260102T120000_def5678<b>" onload="x'
    summary = make_pipeline(other, (0.0, 0.7, 0.8, 0.85), n=100, steps=40, seed=4, lr=1e-4)
    runs = [finished[0], other, finished[0]]
    text = check(write_report(runs, tmp_path / "both.html").read_text())
    assert "2 runs side by side" in text and "def5678<b>" in text
    assert f"{100 * summary['stages'][3]['accuracy']:.1f} %" in text
    differ, same = text[text.index("Settings that differ, by stage") :].split("Settings that are the same", 1)
    assert re.search(r"grpo\.train\.lr +3e-05 +0\.0001", differ)
    assert "grpo.train.stage" in same and "grpo.train.stage" not in differ
    assert text.index("Settings that differ") < text.index("Scores of each run")


def test_several_runs_are_compared_problem_by_problem(tmp_path: Path) -> None:
    """Two runs over the same test problems, one over others, one that kept no answers."""
    roots = [tmp_path / name for name in ("first", "second", "other", "bare")]
    for root, skill, seed in zip(roots, (0.80, 0.90, 0.80, 0.8), (3, 3, 4, 3), strict=True):
        make_pipeline(root, (0.0, 0.5, 0.6, skill), n=200, steps=20, seed=seed)
    shutil.rmtree(roots[3] / "evals")
    one_page = write_report([roots[0]]).read_text()
    target = write_report(roots)
    assert target == roots[0] / "comparison.html"
    assert (roots[0] / "report.html").read_text() == one_page  # the first run's own page is left alone
    text = check(target.read_text())
    right = [
        {r["id"] for r in map(json.loads, (root / "evals/grpo.jsonl").read_text().splitlines()) if r["correct"]}
        for root in roots[:2]
    ]
    won, lost = len(right[1] - right[0]), len(right[0] - right[1])
    p = binomtest(won, won + lost).pvalue
    gain = 100 * (won - lost) / 200
    assert won > lost
    cells = r"second ([\d.]+) % ([\d.]+) % ([+−\d.]+) [+−\d.]+ to [+−\d.]+ better GRPO, test 200 (\d+) (\d+) (\S+)"
    row = re.search(cells, text)
    scores = [f"{len(solved) / 2:.1f}" for solved in reversed(right)]
    assert row and row.groups()[:5] == (*scores, f"{gain:+.1f}", str(won), str(lost))
    assert row[6] == (f"{p:.3f}" if p >= 0.001 else f"{p:.1e}".split("e")[0])
    assert "other is not compared: its last evaluation (GRPO, test) has other problems." in text
    assert "bare is not compared: no evaluation of bare kept its answers." in text


def test_training_runs_are_compared_on_their_last_validation(tmp_path: Path) -> None:
    rng = random.Random(1)
    for name, skill in (("a", 0.5), ("b", 0.95)):
        jsonl(tmp_path / name / "metrics.jsonl", grpo_rows(rng, 30))
        for step in (10, 20):
            jsonl(tmp_path / name / f"evals/step_{step:06d}.jsonl", eval_rows("grpo", skill * step / 20, 60, 3))
    text = check(write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "c.html").read_text())
    assert "Each run against a" in text
    assert re.search(r"b [\d.]+ % [\d.]+ % \+[\d.]+ .*? better GRPO, validation, step 20 60", text)


def test_diversity_is_drawn(tmp_path: Path) -> None:
    rows = grpo_rows(random.Random(0), 30)
    for row in rows[9::10]:
        row |= {"diversity/unique_frac": 1 - row["step"] / 40, "diversity/repeated_4grams": 0.1}
        row |= {"diversity/distinct_1": 0.2, "diversity/distinct_2": 0.5}
    jsonl(tmp_path / "metrics.jsonl", rows)
    text = check(write_report([tmp_path]).read_text())
    assert "Diversity of a group's samples" in text and "distinct samples 25.0 %" in text
    assert "repeated 4-grams 10.0 %" in text


def test_damaged_summary(tmp_path: Path) -> None:
    (tmp_path / "evals").mkdir()
    (tmp_path / "pipeline.json").write_text('{"stages": [')
    assert "pipeline.json cannot be read" in check(write_report([tmp_path]).read_text())
    stages: list[Any] = [{"name": "base", "accuracy": None}, 7, {"name": "sft", "accuracy": 0.5, "ci95": [None, 1]}]
    (tmp_path / "pipeline.json").write_text(
        json.dumps({"stages": stages, "comparisons": [{"a": "x", "ci95": [0, 1]}, None]})
    )
    assert "SFT: 50.0 % on" in check(write_report([tmp_path]).read_text())


@pytest.mark.parametrize("text", ['{"stages": 7, "comparisons": "x"}', "[1]", '{"stages": [{"accuracy": 1}]}', ""])
def test_odd_summary(tmp_path: Path, text: str) -> None:
    (tmp_path / "pipeline.json").write_text(text)
    assert "Nothing recorded yet" in check(write_report([tmp_path]).read_text())


def test_half_surrogates_and_control_characters(tmp_path: Path) -> None:
    row = {"id": 1, "question": "\ud800?", "response": "\x00\x1b[31m", "correct": False, "extracted": None}
    jsonl(tmp_path / "evals" / "base.jsonl", [row])
    assert "Base: 0.0 % on 1 held-out" in check(write_report([tmp_path]).read_text("utf-8"))


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="not a run directory"):
        write_report([tmp_path])
    with pytest.raises(RunDirError, match="no such directory"):
        write_report([tmp_path / "absent"])
    with pytest.raises(RunDirError, match="no run directory given"):
        write_report([])


def test_long_runs_stay_small(tmp_path: Path) -> None:
    jsonl(tmp_path / "metrics.jsonl", grpo_rows(random.Random(0), 4000))
    assert len(page({"long": read_run(tmp_path)})) < 2_500_000


def test_import_is_light() -> None:
    code = "import grpo_gsm8k.report, sys; print({'matplotlib', 'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("ys", "label"),
    [
        ([1e-4] * 8, "1.2e-4"),
        ([13800.0, 14400.0, 12000.0], "14,400"),
        ([0.00012, 0.0021], "0.0005"),
        ([3.0, -2e5], "-200,000"),
    ],
)
def test_the_text_beside_each_tick_has_room_within_the_figure(ys, label):
    """Measured with the font that the figure was laid out in; a text ends 3.5 points left of the axis."""
    from matplotlib.textpath import TextPath

    panel = Panel("Learning rate", (("lr", "rate"),), "")
    svg = draw(panel, [Line("rate", "c1", list(range(len(ys))), ys)])
    texts = re.findall(r'text-anchor: end[^>]* x="([\d.]+)"[^>]*>([^<]+)<', svg)
    assert len(texts) > 2 and label in [text for _, text in texts], svg
    for right, text in texts:
        assert float(right) - TextPath((0, 0), text, size=9).get_extents().width > 0, text
