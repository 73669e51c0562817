"""MAC's attention by kernels: over persistent tokens, what a segment retrieved, and the segment.

Legend: S batch, H heads, P persistent tokens, T tokens, L = P + T rows, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import _segment_ops

TILE = 64
"""Segments shorter than a sequence must be a multiple of it."""


def attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    retrieved: tuple[Tensor, Tensor],
    window: int,
    segment: int,
    plain: Callable[..., Tensor],
) -> Tensor:
    """[S, H, L, D] of queries, keys and values [S, H, L, D] and ``retrieved`` ones [S, H, T, D].

    ``plain`` computes the same from the five tensors in operators that can be differentiated twice.
    """
    out: Tensor
    if torch.compiler.is_compiling():
        out, _ = _segment_ops.attend(query, key, value, *retrieved, window, segment)
        return out
    out = _Attend.apply(query, key, value, *retrieved, window, segment, plain)
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        retrieved_key: Tensor,
        retrieved_value: Tensor,
        window: int,
        segment: int,
        plain: Callable[..., Tensor],
    ) -> Tensor:
        from ._segment_kernels import attend

        inputs = (query, key, value, retrieved_key, retrieved_value)
        out, log = attend(*inputs, window, segment)
        ctx.save_for_backward(*inputs, out, log)
        ctx.options = window, segment, plain
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, (out, log) = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        window, segment, plain = ctx.options
        if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
            with sdpa_kernel(SDPBackend.MATH):
                again = plain(*inputs)
            grads = torch.autograd.grad(again, inputs, grad, create_graph=True)
        else:
            from ._segment_kernels import attend_backward

            q, k, v, rk, rv = inputs
            grads = attend_backward(grad, q, k, v, rk, rv, out, log, window, segment)
        return *grads, None, None, None
