"""MAC's attention by kernels: over persistent tokens, what a segment retrieved, and the segment.

Legend: S batch, H heads, P persistent tokens, T tokens, L = P + T rows, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from titanmac_integration._layers._rotary import Rotary, rotate

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
        saved = ctx.saved_tensors  # once: checkpointing computes them again
        inputs, (out, log) = saved[:5], saved[5:]
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


def turned_segments_(
    heads: Tensor,
    retrieved: Tensor,
    rotary: tuple[Rotary, Rotary],
    window: int,
    segment: int,
    plain: Callable[..., Tensor],
) -> Tensor:
    """`attend_segments` of the turned parts of ``heads`` [S, L, 3, H, D]: [S, H, L, D].

    ``retrieved`` are keys and values [S, T, 2, H, D]; ``rotary`` tables are those of both. Queries
    and keys are turned in place, and their gradients turned back: so both tensors must be the
    caller's own, and nobody's afterwards.
    """
    tables = (*rotary[0], *rotary[1])
    out: Tensor = _TurnAndAttend.apply(heads, retrieved, *tables, window, segment, plain)
    return out


class _TurnAndAttend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        heads: Tensor,
        retrieved: Tensor,
        cos: Tensor,
        sin: Tensor,
        retrieved_cos: Tensor,
        retrieved_sin: Tensor,
        window: int,
        segment: int,
        plain: Callable[..., Tensor],
    ) -> Tensor:
        from ._segment_kernels import attend

        _turn_(heads, cos, sin, 1)
        _turn_(retrieved, retrieved_cos, retrieved_sin, 1)
        q, k, v = _by_head(heads)
        rk, rv = _by_head(retrieved)
        out, log = attend(q, k, v, rk, rv, window, segment)
        tables = cos, sin, retrieved_cos, retrieved_sin
        ctx.save_for_backward(heads, retrieved, out, log, *tables)
        ctx.options = window, segment, plain
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        heads, retrieved, out, log, cos, sin, retrieved_cos, retrieved_sin = ctx.saved_tensors
        window, segment, plain = ctx.options
        if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
            turned = _turned(heads, cos, sin)
            told = _turned(retrieved, retrieved_cos, retrieved_sin)
            with sdpa_kernel(SDPBackend.MATH):
                again = plain(*_by_head(turned), *_by_head(told))
            found = torch.autograd.grad(again, (heads, retrieved), grad, create_graph=True)
        else:
            from ._segment_kernels import attend_backward

            found = torch.empty_like(heads), torch.empty_like(retrieved)
            into = (*_by_head(found[0]), *_by_head(found[1]))
            q, k, v = _by_head(heads)
            rk, rv = _by_head(retrieved)
            attend_backward(grad, q, k, v, rk, rv, out, log, window, segment, into)
            _turn_(found[0], cos, sin, -1)
            _turn_(found[1], retrieved_cos, retrieved_sin, -1)
        return *found, *[None] * 7


def _turn_(parts: Tensor, cos: Tensor, sin: Tensor, sign: int) -> None:
    """Turn all parts of [S, L, parts, H, D] but the last, in place."""
    from titanmac_integration._layers._rotary_kernels import turn

    turn(parts.unbind(2), cos, sin, parts.unbind(2), sign=sign, copy_last=False)


def _turned(parts: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What was turned in place, with the derivative of the turning."""
    # autograd knows the tensor from before it was turned
    change = parts - parts.detach()
    change = torch.cat((rotate(change[:, :, :-1], cos, sin), change[:, :, -1:]), 2)
    return parts.detach() + change


def _by_head(parts: Tensor) -> tuple[Tensor, ...]:
    """[S, L, parts, H, D] -> views [S, H, L, D]."""
    return parts.transpose(1, 3).unbind(2)
