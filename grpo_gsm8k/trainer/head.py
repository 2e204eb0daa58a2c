"""Log-probabilities of targets under a language model's head, without materialising the logits of a whole batch.

At V = 152k the logits of one GSM8K update take more memory than everything else. So the head is applied chunk by chunk:
N positions need O(chunk x V) memory, forward and backward, plus the gradients.

With x = h W^T / T and p = softmax(x), the derivative of log p_t in x is (onehot_t - p). Its factor d loss / d log p_t
is known only in the backward pass, where p must be computed again, so an update needs four products of size N x V x H.
For a separable loss, a sum over tokens, the factor follows from log p_t at once. So with `fused_grad` the gradient is
formed in the forward pass, with three products and one softmax, and the backward pass checks that autograd arrives at
the same d loss / d log p_t, up to a constant scale of the loss.

Some models scale or soft-cap their logits behind the head: with z = h W^T, x = cap tanh(scale z / cap) / T, and the
derivative in z is (onehot_t - p) scale (1 - (x T / cap)^2) / T.

The entropy H = log Z - E[x] gets a gradient if the loss needs it: dH / dx = -p (x - E[x]), with E[x] the mean of x
under p.

On a GPU one kernel (`head_triton.py`) replaces these torch operations; tests hold it to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from grpo_gsm8k.trainer import head_triton
from grpo_gsm8k.trainer.costs import CHUNK_BYTES

STATISTICS = ("entropy", "top_prob")
"""Of each distribution: its entropy in nats, and the probability of its likeliest token."""

LOST = -70.0  # below e^-70 a float32 probability runs out of digits, and then is 0

FusedGrad = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor | None]]
"""From the log-probabilities `(n,)` of some of the targets, and which they are, to d loss / d logp `(n,)` and, if the
loss has an entropy term, d loss / d entropy `(n,)`."""


@dataclass(frozen=True)
class LogitMap:
    """What a model does to the head's product z: cap tanh(scale z / cap), or scale z where `cap` is 0."""

    scale: float = 1.0
    cap: float = 0.0


PLAIN = LogitMap()


def target_logprobs(
    hidden: torch.Tensor,
    head: Any,
    targets: torch.Tensor,
    temperature: float = 1.0,
    statistics: bool = True,
    fused_grad: FusedGrad | None = None,
    logit_map: LogitMap = PLAIN,
    entropy_grad: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probability of each target under softmax(logits / temperature), and what the distribution is like.

    Args:
        hidden: `(N, H)`.
        head: a linear layer: `weight` `(V, H)`, and maybe a `bias` `(V,)`.
        targets: `(N,)` int64.
        statistics: skip their cost with False (zeros are returned).
        fused_grad: the derivative of the loss that the log-probabilities go into; they must go into no other.
        logit_map: from head(hidden) to the logits.
        entropy_grad: the entropies have a gradient, too.

    Returns:
        `(N,)` log-probabilities with gradient and, without, `(N,)` of each of `STATISTICS`; all of them float32
        (float64 of float64).
    """
    bias = getattr(head, "bias", None)
    apply: Callable[..., tuple[torch.Tensor, ...]] = _TargetLogprobs.apply
    logp, *found = apply(
        hidden, head.weight, bias, targets, temperature, statistics, fused_grad, logit_map, entropy_grad
    )
    return logp, dict(zip(STATISTICS, found, strict=True))


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        statistics: bool,
        fused_grad: FusedGrad | None,
        logit_map: LogitMap,
        entropy_grad: bool,
    ) -> tuple[torch.Tensor, ...]:
        softmax = _Softmax(hidden, weight, bias, temperature, logit_map, entropy_grad)
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad, logit_map) if fused_grad else None
        logp = torch.empty_like(targets, dtype=softmax.dtype)  # (N,)
        entropies, tops, dlogp = torch.zeros_like(logp), torch.zeros_like(logp), torch.empty_like(logp)
        dentropy = torch.zeros_like(logp) if entropy_grad else logp.new_empty(0)
        for part in softmax.parts():
            if softmax.fuses:
                formed, logp[part], *found = softmax.fused(part, targets[part], gradients is not None)
                if statistics:
                    entropies[part], tops[part] = found
                if fused_grad and gradients:
                    dlogp[part], _ = fused_grad(logp[part], part)
                    gradients.add_formed(part, formed, dlogp[part] * logit_map.scale / temperature)
                continue
            logits, probs, chosen, logp[part] = softmax(part, targets[part])
            expected = torch.zeros_like(chosen)  # logit
            if statistics:
                tops[part] = probs.amax(-1)
            if entropy_grad:
                expected = torch.linalg.vecdot(probs, logits)
            elif statistics and not (gradients and gradients.average):
                scratch = logits if not logit_map.cap else None  # the cap's derivative is formed from them
                expected = torch.mul(probs, logits, out=scratch).sum(-1)
            if fused_grad and gradients:
                dlogp[part], of_entropy = fused_grad(logp[part], part)
                pull = None
                if of_entropy is not None:
                    dentropy[part] = of_entropy
                    pull = softmax.entropy_pull(logits, probs, expected, of_entropy * logit_map.scale / temperature)
                reached = dlogp[part] * logit_map.scale / temperature
                turned = gradients.add(part, probs, targets[part], reached, softmax.bend(logits), pull)
                if statistics and gradients.average and not entropy_grad:
                    # Of the mean row of the head: a pass over V less.
                    expected = ((turned + weight[targets[part]]) * hidden[part]).sum(-1) * logit_map.scale / temperature
            if statistics:
                entropies[part] = chosen - logp[part] - expected  # log Z - expected
        ctx.mark_non_differentiable(*(() if entropy_grad else (entropies,)), tops)
        ctx.save_for_backward(hidden, weight, bias, targets, dlogp, dentropy)
        ctx.temperature, ctx.gradients, ctx.logit_map = temperature, gradients, logit_map
        ctx.entropy_grad = entropy_grad
        return logp, entropies, tops

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        arrived, of_entropy = grad_outputs[:2]
        hidden, weight, bias, targets, dlogp, dentropy = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # the only reference, so that autograd need not copy
        if gradients and len(dlogp):
            if ctx.entropy_grad:
                arrived, dlogp = torch.cat([arrived, of_entropy]), torch.cat([dlogp, dentropy])
            finite, agrees, factor = _compare(arrived, dlogp)
            if finite and not agrees:  # what is not finite, the learner refuses
                raise AssertionError("fused gradient disagrees with autograd: is this loss separable per token?")
            gradients.scale(factor if finite else 1.0)
        elif not gradients:
            softmax = _Softmax(hidden, weight, bias, ctx.temperature, ctx.logit_map, ctx.entropy_grad)
            gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad, ctx.logit_map)
            for part in softmax.parts():
                reached = arrived[part] * ctx.logit_map.scale / ctx.temperature
                if softmax.fuses:
                    formed, *_ = softmax.fused(part, targets[part], True)
                    gradients.add_formed(part, formed, reached)
                    continue
                logits, probs, *_ = softmax(part, targets[part])
                pull = None
                if ctx.entropy_grad:
                    expected = torch.linalg.vecdot(probs, logits)
                    outer = of_entropy[part] * ctx.logit_map.scale / ctx.temperature
                    pull = softmax.entropy_pull(logits, probs, expected, outer)
                gradients.add(part, probs, targets[part], reached, softmax.bend(logits), pull)
        return *gradients.take(), None, None, None, None, None, None


def _compare(arrived: torch.Tensor, fused: torch.Tensor) -> tuple[bool, bool, float]:
    """Whether the derivative that arrived is finite, whether it is a multiple of the fused one, and which.

    The host waits for a GPU once.
    """
    steepest = fused.abs().argmax(0, keepdim=True)
    mine, theirs = fused.index_select(0, steepest), arrived.index_select(0, steepest)
    factor = torch.where(mine == 0, 1.0, theirs / mine)
    agrees = torch.isclose(arrived, factor * fused, rtol=1e-4).all()
    finite, alike, times = torch.stack([arrived.isfinite().all(), agrees, factor[0]]).tolist()
    return bool(finite), bool(alike), times


class _Softmax:
    """The head's distribution at a chunk of positions, in two buffers that all chunks share."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        temperature: float,
        logit_map: LogitMap,
        entropy_grad: bool = False,
    ) -> None:
        self.hidden, self.weight, self.bias, self.temperature = hidden, weight, bias, temperature
        self.map = logit_map
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        positions, vocabulary = len(hidden), len(weight)
        self.fuses = head_triton.serves(hidden) and not entropy_grad  # the kernel forms no gradient of the entropy
        narrow = hidden.element_size()
        each = 4 if not hidden.is_cuda else narrow if self.fuses else 8 + narrow  # bytes of a logit, in all on a GPU
        fit = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"]) // (each * vocabulary)
        self.rows = max(1, min(fit, positions))
        if self.fuses:
            self.formed = hidden.new_empty(self.rows, vocabulary)
            return
        self.logits, self.probs = (hidden.new_empty(self.rows, vocabulary, dtype=self.dtype) for _ in range(2))

    def parts(self) -> Iterator[slice]:
        """The chunks of the positions."""
        return (slice(at, at + self.rows) for at in range(0, len(self.hidden), self.rows))

    def __call__(self, part: slice, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits and probabilities `(n, V)`, the targets' logits `(n,)` and log-probabilities `(n,)`.

        The first two are valid until the next chunk, and may be changed.
        """
        hidden = self.hidden[part]
        logits, probs = self.logits[: len(hidden)], self.probs[: len(hidden)]
        if hidden.dtype == self.dtype:
            torch.mm(hidden, self.weight.t(), out=logits)
        else:
            logits.copy_(hidden @ self.weight.t())
        if self.bias is not None:
            logits += self.bias
        if self.map.scale != 1:
            logits *= self.map.scale
        if self.map.cap:
            logits.div_(self.map.cap).tanh_().mul_(self.map.cap)
        if self.temperature != 1:
            logits /= self.temperature
        torch.softmax(logits, -1, out=probs)
        at = targets.unsqueeze(-1)
        chosen, logp = logits.gather(-1, at).squeeze(-1), probs.gather(-1, at).squeeze(-1).log()
        lost = ~(logp > LOST)
        if logits.is_cuda:  # the same without looking whether there are any, for which the host would wait
            top, at = probs.max(-1, keepdim=True)
            logp = torch.where(lost, chosen - (logits.gather(-1, at) - top.log()).squeeze(-1), logp)
        elif lost.any():  # the likeliest token has p >= 1 / V, and a logarithm
            logp[lost] = chosen[lost] - logits[lost].amax(-1) + probs[lost].amax(-1).log()
        return logits, probs, chosen, logp

    def fused(self, part: slice, targets: torch.Tensor, gradient: bool) -> tuple[torch.Tensor, ...]:
        """`(n, V)` for `_Gradients.add_formed`, if wanted; log-probabilities, entropies, top probabilities `(n,)`."""
        hidden = self.hidden[part]
        formed = torch.mm(hidden, self.weight.t(), out=self.formed[: len(hidden)])
        options = (self.bias, self.temperature, self.map.scale, self.map.cap, gradient)
        return formed, *head_triton.fused_softmax(formed, targets, *options)

    def entropy_pull(
        self, logits: torch.Tensor, probs: torch.Tensor, expected: torch.Tensor, dentropy: torch.Tensor
    ) -> torch.Tensor:
        """-d loss of the entropies at these logits, `(n, V)`; in the logits' place where no cap needs them again."""
        spread = logits - expected.unsqueeze(-1) if self.map.cap else logits.sub_(expected.unsqueeze(-1))
        return spread.mul_(probs).mul_(dentropy.unsqueeze(-1))

    def bend(self, logits: torch.Tensor) -> torch.Tensor | None:
        """The soft-cap's derivative at these logits, `(n, V)`, in their place; None without one."""
        if not self.map.cap:
            return None
        return logits.mul_(self.temperature / self.map.cap).square_().neg_().add_(1)


class _Gradients:
    """The gradients in hidden states, weight and bias, those that are asked for, chunk by chunk."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        wanted: tuple[bool, ...],
        logit_map: LogitMap,
    ) -> None:
        self.inputs = hidden, weight, bias
        wide = torch.promote_types(hidden.dtype, torch.float32)  # a sum over chunks in bfloat16 would be biased
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        unset = (
            torch.empty_like if len(hidden) else torch.zeros_like
        )  # the first chunk writes the gradient, if there is one
        self.weight = unset(weight, dtype=wide) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None
        linear = bias is None and not logit_map.cap
        self.average = wanted[0] and linear and hidden.dtype == wide  # (probs - onehot) W is there, unrounded

    def add(
        self,
        part: slice,
        probs: torch.Tensor,
        targets: torch.Tensor,
        dlogp: torch.Tensor,
        bend: torch.Tensor | None = None,
        pull: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add d loss of a chunk, whose derivative in the raw logits is bend x (dlogp x (onehot - probs) - pull).

        Consumes `probs`.

        Returns:
            `(n, H)`, (probs - onehot) W; where no gradient in hidden states is asked for, nothing of use.
        """
        # Before any rounding to bfloat16: at p = 0.999 what is left is its last bits.
        probs[torch.arange(len(probs), device=probs.device), targets] -= 1
        if pull is not None:
            probs.mul_(dlogp.unsqueeze(-1)).add_(pull)
            dlogp = torch.ones_like(dlogp)
        if bend is not None:
            probs *= bend
        return self.add_formed(part, probs.to(self.inputs[1].dtype), dlogp, probs)

    def add_formed(
        self, part: slice, narrow: torch.Tensor, dlogp: torch.Tensor, probs: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`add` where bend x (probs - onehot) is there in the weight's type; `probs`: the same, not yet rounded."""
        hidden, weight, _ = self.inputs
        scale, turned = -dlogp.unsqueeze(-1), hidden[:0]
        if self.hidden is not None:
            turned = narrow @ weight
            self.hidden[part] = scale * turned
        if self.weight is not None:
            scaled = (scale * hidden[part]).to(weight.dtype)  # (n, H): nothing of size (n, V) is touched again
            kept = 1 if part.start else 0  # what was not set is not read
            if self.weight.dtype == weight.dtype:
                self.weight.addmm_(narrow.t(), scaled, beta=kept)
            elif self.weight.is_cuda:
                torch.addmm(self.weight, narrow.t(), scaled, beta=kept, out_dtype=torch.float32, out=self.weight)
            else:
                self.weight.addmm_(narrow.t().float(), scaled.float(), beta=kept)
        if self.bias is not None:
            wide = narrow if probs is None else probs
            self.bias += wide.t() @ scale.squeeze(-1).to(wide.dtype)
        return turned

    def scale(self, factor: float) -> None:
        """Multiply all, where the loss went through a scaling on its way."""
        if factor != 1:
            for gradient in filter(torch.is_tensor, (self.hidden, self.weight, self.bias)):
                gradient *= factor

    def take(self) -> list[torch.Tensor | None]:
        """The three of them in their inputs' types, given away."""
        mine, self.hidden, self.weight, self.bias = (self.hidden, self.weight, self.bias), None, None, None
        return [
            g.to(x.dtype) if g is not None and x is not None else None for g, x in zip(mine, self.inputs, strict=True)
        ]
