"""Scores in one currency: the change of the loss, in nats, that a block is worth.

Legend: N tokens of a step, R block rows, C block columns, K slots per row, B tile side; G_rc the
gradient of the mean loss by block (r, c), g_t that of one token's loss.

To second order, with the curvature of a block taken as lambda times the identity, the loss falls by
at most |G|^2 / (2 lambda) when an absent block is put in place and trained, and rises by
-<G, W> + lambda |W|^2 / 2 when a present one is taken away (optimal brain damage, LeCun et al.
1990, with the Fisher information as curvature). lambda is the mean diagonal of the Fisher
information, E|g_t|^2 / B^2. The mean gradient is known only with noise,
E|G|^2 = |E G|^2 + E|g_t|^2 / N, so the noise is taken off before it can pass for gain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blockell_kernels import block_fisher


class FisherTap(torch.autograd.Function):
    """Passes a layer's output on; the "gradient" of its probe is the Fisher trace of the blocks.

    The probe is float32 [R * C + 1]: sum over tokens of |dy_r|^2 |x_c|^2, then the number of
    tokens. Like the operator's own probe it adds up over micro-batches, ignores recomputation and
    collects nothing in evaluation.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, probe: Tensor, B: int) -> Tensor:
        """y [..., R * B], the output for x [..., C * B]; returned as it is."""
        ctx.save_for_backward(x)
        ctx.B, ctx.size = B, probe.numel()
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, None]:
        """The gradient of y as it is, and the statistics."""
        (dy,) = gradients
        (x,) = ctx.saved_tensors
        trace = block_fisher(dy, x.to(dy.dtype), ctx.B).float().flatten()
        tokens = trace.new_full((1,), float(dy.numel() // dy.shape[-1]))
        return dy, None, torch.cat((trace, tokens)), None


def tap_fisher(y: Tensor, x: Tensor, probe: Tensor, B: int) -> Tensor:
    """`FisherTap`, as a function."""
    result: Tensor = FisherTap.apply(y, x, probe, B)
    return result


class LossStatistics:
    """Squared mean gradient and curvature of every block, means of the sampled steps.

    Plain tensors, not buffers: they are a rank's own (see `_scorer`).
    """

    def __init__(self, R: int, C: int, B: int, device: torch.device | str | None) -> None:
        self.R, self.C, self.B = R, C, B
        self.sums = torch.zeros(2 * R * C + 1, dtype=torch.float32, device=device)
        self.means = torch.zeros_like(self.sums)

    @property
    def signal(self) -> Tensor:
        """float32 [R, C]: |E G|^2, free of noise on average, so it may be below zero."""
        return self.means[: self.R * self.C].view(self.R, self.C)

    @property
    def curvature(self) -> Tensor:
        """float32 [R, C]: E|g_t|^2 / B^2."""
        return self.means[self.R * self.C : -1].view(self.R, self.C)

    @torch.no_grad()
    def add(self, norms_sq: Tensor, fisher: Tensor, present: Tensor, finite: Tensor) -> None:
        """Count one sampled step.

        Args:
            norms_sq: [R * C], ||G_rc||^2 as the probe saw it.
            fisher: [R * C + 1], see `FisherTap`.
            present: [2], sum of ||G_rc||^2 over the live blocks by the gradients that the optimizer
                gets, and by the probe: their ratio undoes a loss scale and clipping.
            finite: 0-d bool; False skips the step.
        """
        scale = (present[0] / present[1]).nan_to_num(0.0, 0.0, 0.0)
        noise, tokens = fisher[:-1] * scale, fisher[-1]
        signal = norms_sq * scale - noise
        step = torch.cat((signal, noise * tokens / self.B**2, signal.new_ones(1)))
        self.sums += torch.where(finite, step, 0.0)

    def fold(self) -> None:
        """Turn the sums since the last fold into means; with no sample since, keep the old ones."""
        count = self.sums[-1]
        means = self.sums / count.clamp(min=1)
        self.means = torch.where(count > 0, means, self.means)
        self.sums.zero_()

    def damped(self, damping: float) -> Tensor:
        """Curvature plus a share of its mean over the layer, float32 [R, C]."""
        return self.curvature + damping * self.curvature.mean()

    def gain(self, damping: float) -> Tensor:
        """Nats that putting a block in its place may gain, float32 [R, C]; 0 where unknown."""
        gain = 0.5 * self.signal.clamp(min=0) / self.damped(damping)
        return gain.nan_to_num(0.0, 0.0, 0.0)

    def cost(self, slope: Tensor, size_sq: Tensor, columns: Tensor, damping: float) -> Tensor:
        """Nats that taking a present block away costs, float32 [R, k].

        Args:
            slope: <G, W>, [R, k].
            size_sq: |W|^2, [R, k].
            columns: int32 [R, k].
            damping: as in `gain`.
        """
        curvature = self.damped(damping).gather(1, columns.long())
        return (0.5 * curvature * size_sq - slope).abs()
