"""Rotary positions: queries and keys are turned by angles that grow with the position.

Su et al. 2021, "RoFormer", section 3.2.

Legend: S batch, L rows, n parts of a projection, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._triton import has_triton

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of some positions, [positions, 1, 1, D] each; see :func:`rotate`."""


def rotary_table(
    length: int, head_width: int, base: float, device: torch.device | None = None, start: int = 0
) -> Rotary:
    """Cosines and sines for :func:`rotate`, float32 [length, 1, 1, head_width] each."""
    pairs = torch.arange(0, head_width, 2, device=device, dtype=torch.float32)
    frequency = base ** (-pairs / head_width)
    row = torch.arange(start, start + length, device=device, dtype=torch.float32)
    angle = (row[:, None] * frequency)[:, None, None]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of ``x`` [S, L, n, H, D] by the angles of its positions.

    Left half l and right half r become ``l cos - r sin`` and ``r cos + l sin``.
    """
    left, right = x.chunk(2, dim=-1)
    swapped = torch.cat((right, left), dim=-1)
    return torch.addcmul(x * cos.to(x.dtype), swapped, sin.to(x.dtype))


def turned_parts(heads: Tensor, rotary: Rotary) -> tuple[Tensor, ...]:
    """The n parts of ``heads`` [S, L, n, H, D], as [S, H, L, D]: all but the last are rotated.

    On a GPU one pass over memory, by a Triton kernel, and one in the backward pass: written with
    torch's operators this costs several times what the attention's matrix products do. Compiled,
    torch fuses those operators itself.
    """
    if _on_gpu(heads):
        parts = _Turn.apply(heads, *rotary)
    else:
        turning, last = heads.split((heads.shape[2] - 1, 1), dim=2)
        parts = (*rotate(turning, *rotary).unbind(2), last.squeeze(2))
    return tuple(part.transpose(1, 2) for part in parts)


def _on_gpu(heads: Tensor) -> bool:
    """Whether the Triton kernel takes these heads."""
    if torch.compiler.is_compiling() or not heads.is_cuda:
        return False
    return heads.dtype != torch.float64 and has_triton()


class _Turn(torch.autograd.Function):
    """[S, L, n, H, D] -> n times [S, L, H, D]. Linear, so its derivative is a turn back."""

    @staticmethod
    def forward(heads: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        from ._rotary_kernels import turn

        parts = tuple(
            torch.empty(part.shape, dtype=part.dtype, device=part.device)
            for part in heads.unbind(2)
        )
        turn(heads.unbind(2), cos, sin, parts, sign=1)
        return parts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _TurnBack.apply(*ctx.saved_tensors, *grads), None, None


class _TurnBack(torch.autograd.Function):
    """n times [S, L, H, D] -> [S, L, n, H, D]: the transpose of :class:`_Turn`."""

    @staticmethod
    def forward(cos: Tensor, sin: Tensor, *parts: Tensor) -> Tensor:
        from ._rotary_kernels import turn

        S, L, H, D = parts[0].shape
        heads = parts[0].new_empty(S, L, len(parts), H, D)
        turn(parts, cos, sin, heads.unbind(2), sign=-1)
        return heads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_Turn.apply(grad, *ctx.saved_tensors)
