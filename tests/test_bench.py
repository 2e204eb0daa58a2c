"""The benchmarks: what they compare is the same work, and torch and transformers are enough to run them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo_gsm8k import bench
from grpo_gsm8k.bench import gpu as bench_gpu
from grpo_gsm8k.bench import sample as bench_sample
from grpo_gsm8k.bench import update as bench_update
from grpo_gsm8k.datatypes import Datum
from grpo_gsm8k.trainer import costs
from tests.rehearsal import Pretend
from tests.toys import REPOSITORY

SMALL = ["--hidden=16", "--heads=2", "--kv_heads=1", "--layers=1", "--intermediate=32", "--vocabulary=700"]
UPDATE = ["--prompts=2", "--group=4", "--mean_tokens=8", "--max_tokens=12", "--prompt_tokens=5"]


@pytest.fixture
def args(tmp_path):
    return bench.parser().parse_args(["update", *SMALL, *UPDATE, "--gradients", str(tmp_path / "g.safetensors")])


def test_ours_and_trls_update_have_the_same_gradient(args):
    pytest.importorskip("trl")
    bench_update.compare_gradients("ours", args)
    errors = [bench_update.compare_gradients(peer, args)["gradient_error"] for peer in bench_update.PEERS]
    assert 0 < max(errors) < 1e-5
    args.prompt_tokens = 6  # another update, and the error says so
    assert bench_update.compare_gradients("trl", args)["gradient_error"] > 0.1


def test_what_the_ablation_leaves_out_changes_no_gradient(args):
    args.flat = 0.5
    bench_update.compare_gradients("ours", args)
    ours = load_file(args.gradients)
    for name, without in bench_update.WITHOUT.items():
        with without(args):
            bench_update.compare_gradients(name, args)
        other = load_file(args.gradients)
        assert all(torch.allclose(other[k], ours[k], rtol=1e-4, atol=1e-7) for k in ours), name


@pytest.mark.parametrize("name", ["activation_checkpointing", pytest.param("compile", marks=pytest.mark.slow)])
def test_what_the_ablation_puts_in_changes_no_gradient(args, name):
    bench_update.compare_gradients("ours", args)
    ours = load_file(args.gradients)
    bench_update.compare_gradients(f"with:{name}", args)
    other = load_file(args.gradients)
    assert all(torch.allclose(other[k], ours[k], rtol=1e-4, atol=1e-7) for k in ours)


def test_the_ablation_says_how_noisy_it_was(args):
    ours, theirs = (
        [{"cpu_seconds": 1.0, "peak_rss_mb": 5.0}] * 3,
        [{"cpu_seconds": s, "peak_rss_mb": 5.0} for s in (2, 4, 3)],
    )
    found = bench_update._against_ours("x", {"ours": ours, "x": theirs}, args)
    assert found["seconds"] == 3 and (found["seconds_min"], found["seconds_max"], found["memory"]) == (2, 4, 1)
    assert "with:optimizer_on_cpu" not in bench_update.variants(args)


def test_shares_of_a_peak_by_hand(args):
    """The model of SMALL: a layer of 16 x (16 + 2 x 8 + 16) + 3 x 16 x 32 weights, a head of 700 x 16."""
    shape = costs.Shape(0, 1, 16, 32, 2, 1, 8, 700)
    rows = [Datum((1, 2, 3, 4), (0, 0, 1, 1)), Datum((1, 2), (0, 1))]
    # 3 + 1 inputs, 3 targets, 6 + 1 pairs of 2 heads of 8
    assert bench_update.operations(shape, rows) == 6 * (2304 * 4 + 11200 * 3) + 12 * 16 * 7
    # Two completions of 3 and 1 tokens after prompts of 5 and 6: two steps, of 6 and 7 tokens' keys and values.
    assert bench_sample.bytes_read(shape, 2, [(5, 3), (6, 1)]) == 2 * (2 * (2304 + 11200) + 2 * 8 * (6 + 7))
    assert bench.gpu_of(args) is None  # so that on a CPU there is no such figure
    drivers = "H100 PCIe, H100 NVL, H200, B200, A100-SXM4-40GB, A100 80GB PCIe, L40S, L4, GeForce RTX 4090"
    known = {costs.gpu_called(f"NVIDIA {name}") for name in f"{drivers}, GeForce RTX 5090, H100 80GB HBM3".split(", ")}
    assert None not in known and len(known | {costs.gpu_called("AMD Instinct MI300X")}) == 12
    assert costs.gpu_called("NVIDIA H100 80GB HBM3") is costs.GPUS["H100"]
    assert costs.gpu_called("NVIDIA H100 PCIe") is costs.GPUS["H100-PCIe"] and costs.gpu_called("NVIDIA T4") is None


def test_the_samplers_logprobs_are_those_of_a_full_pass():
    args = bench.parser().parse_args(["sample", *SMALL, "--prompts=3", "--group=2", "--max_new_tokens=9", "--ends=7"])
    found = bench_sample.measure("ours", args)
    assert found["logprob_error"] < 1e-5 and 6 <= found["tokens"] < 54  # some rows end early
    assert 6 <= bench_sample.measure("generate", args)["tokens"] < 54


def test_a_ratio_is_taken_within_each_round():
    ours, theirs = [{"s": 1.0}, {"s": 10.0}, {"s": 2.0}], [{"s": 3.0}, {"s": 50.0}, {"s": 8.0}]
    assert bench.ratio(theirs, ours, "s") == {"median": 4.0, "min": 3.0, "max": 5.0}


def test_torch_and_transformers_are_enough():
    code = (
        "import sys\n"
        "for name in ('typer', 'datasets', 'wandb', 'rich', 'trl', 'peft', 'scipy', 'aiohttp', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        f"from grpo_gsm8k.bench import main; main({['update', *UPDATE, *SMALL, '--alone=ours']!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"seconds", "cpu_seconds", "tokens_per_s", "peak_rss_mb"} and found["peak_rss_mb"] > 100


def first_hour(out, *more):
    args = bench.parser().parse_args(["gpu", "--sizes=toy", f"--out={out}", *more])
    return bench_gpu.run(args)["parts"]


def test_the_first_hour_goes_on_where_it_was_and_survives_a_part_that_fails(tmp_path, monkeypatch, capsys):
    def broken(args):
        yield "first", {"ms": 1.0}
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(bench_gpu.PARTS, "attention", broken)
    parts = first_hour(tmp_path, "--device=cpu", "--parts=attention,head,vllm")
    assert parts["attention"]["status"] == "failed" and parts["attention"]["rows"] == {"first": {"ms": 1.0}}
    assert "test_bench.py" in parts["attention"]["reason"] and "no kernel image" in parts["attention"]["reason"]
    assert parts["head"]["status"] == "ok" and parts["head"]["rows"]["toy correctness"]["weight_error"] < 0.01
    assert (parts["vllm"]["status"], parts["vllm"]["reason"]) == ("skipped", "vLLM is not installed")
    seen = capsys.readouterr().err
    assert "attention: failed" in seen
    again = first_hour(tmp_path, "--device=cpu", "--parts=attention,head,vllm")
    assert again["head"] == parts["head"] and "head:" not in capsys.readouterr().err
    table = (tmp_path / "gpu.md").read_text()
    assert "### head: ok" in table and "no kernel image" in table and table.count("- `") == 2


def test_the_first_hour_ends_with_its_budget(tmp_path, monkeypatch, capsys):
    def long(args):
        time.sleep(2)
        yield "one", {"ms": 1.0}
        raise AssertionError("the budget was over")

    monkeypatch.setitem(bench_gpu.PARTS, "peaks", long)
    parts = first_hour(tmp_path, "--device=cpu", "--budget_s=1.5", "--parts=peaks,head")
    assert parts["peaks"]["status"] == "skipped" and parts["peaks"]["rows"] and "head" not in parts
    assert "head: left out" in capsys.readouterr().err


@pytest.mark.slow
def test_the_first_hour_runs_through_on_a_cpu_and_on_a_pretended_gpu(tmp_path, tiny):
    AutoModelForCausalLM.from_pretrained(tiny.model)
    may_skip = {"attention", "vllm", "offload", "devices"}
    for where, device in ((contextlib.nullcontext(), "cpu"), (Pretend(), "cuda")):
        with where:
            parts = first_hour(tmp_path / device, f"--device={device}", "--dtype=bfloat16", "--budget_s=3000")
        assert parts.keys() == bench_gpu.PARTS.keys()
        for name, part in parts.items():
            assert part["status"] == "ok" or (part["status"] == "skipped" and name in may_skip), (name, part)
            assert not [row for row in part["rows"].values() if "failed" in row], part
