"""The GPU's kernel for the head under triton's interpreter, against the same in torch's operations.

triton decides at its import whether it interprets, and another test may have imported it: all run in a process of
their own, which one test here starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from grpo_gsm8k.trainer import head, head_triton
from grpo_gsm8k.trainer.head import LogitMap, target_logprobs
from tests.toys import REPOSITORY

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="run by test_the_head_under_tritons_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="it is the one that starts the others")
def test_the_head_under_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-4000:]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(head_triton, "BLOCK", 64)


CASES = {
    "plain": (1.0, LogitMap(), False),
    "temperature": (0.7, LogitMap(), False),
    "scale and bias": (1.3, LogitMap(scale=0.25), True),
    "cap": (0.8, LogitMap(scale=2.0, cap=3.0), False),
    "cap and bias": (1.0, LogitMap(cap=5.0), True),
}


def both_ways(monkeypatch, dtype, temperature, logit_map, biased, foretold=True, n=7, vocabulary=150, std=1.0):
    torch.manual_seed(0)
    weight = (torch.randn(vocabulary, 16) * std).to(dtype)
    bias = torch.randn(vocabulary).to(dtype) if biased else None
    hidden, targets = torch.randn(n, 16).to(dtype), torch.randint(0, vocabulary, (n,))
    slopes = torch.linspace(-1, 2, n)
    found = []
    for fuses in (False, True):
        monkeypatch.setattr(head_triton, "serves", lambda hidden, fuses=fuses: fuses)
        monkeypatch.setattr(
            head, "CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), 3 * 4 * vocabulary)
        )  # three rows at once, or six
        linear = SimpleNamespace(weight=weight.clone().requires_grad_(), bias=None)
        linear.bias = bias.clone().requires_grad_() if biased else None
        states = hidden.clone().requires_grad_()
        foretell = (lambda logp, part: (slopes[part], None)) if foretold else None
        logp, said = target_logprobs(states, linear, targets, temperature, True, foretell, logit_map)
        (logp * slopes).sum().backward()
        gradients = [states.grad, linear.weight.grad, *([linear.bias.grad] if biased else [])]
        found.append([logp.detach(), *said.values(), *gradients])
    return found


@inside
@pytest.mark.parametrize("foretold", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_torchs_operations(case, foretold, monkeypatch):
    for a, b in zip(*both_ways(monkeypatch, torch.float32, *CASES[case], foretold), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@inside
def test_in_bfloat16(monkeypatch):
    """The same logits, rounded once; their derivative is rounded where torch's operations round it."""
    for a, b in zip(*both_ways(monkeypatch, torch.bfloat16, *CASES["temperature"]), strict=True):
        torch.testing.assert_close(b.float(), a.float(), rtol=2e-2, atol=2e-2)


@inside
def test_extremes(monkeypatch):
    """Logits in the hundreds: probabilities of 1, and of nothing."""
    for a, b in zip(*both_ways(monkeypatch, torch.float32, 0.1, LogitMap(), False, std=30.0), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)
    assert both_ways(monkeypatch, torch.float32, *CASES["plain"], n=0)[1][0].shape == (0,)


@inside
def test_what_is_no_number_is_told():
    logits = torch.randn(2, 100)
    logits[1, 70] = float("nan")
    logp, _, _ = head_triton.fused_softmax(logits, torch.tensor([3, 4]), None, 1.0, 1.0, 0.0, False)
    assert logp[0].isfinite() and not logp[1].isfinite()
