# mypy: ignore-errors
"""A Triton kernel for rotary positions: one pass, whatever the strides of what it reads.

Attention returns gradients head by head while a projection wants them row by row, so the same pass
also changes the order in memory.
"""

import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
"""Rows of one head each that a program turns."""


@triton.jit
def _rotary_turn(
    x_ptr,  # [S, L, H, D], D contiguous
    y_ptr,  # [S, L, H, D], D contiguous
    cos_ptr,  # float32 [L, D]
    sin_ptr,  # float32 [L, D], the first half negated
    count,  # S L H
    L,
    H,
    x_batch,
    x_row,
    x_head,
    y_batch,
    y_row,
    y_head,
    HALF: tl.constexpr,
    SIGN: tl.constexpr,  # 1: turn; -1: turn back; 0: copy
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = index % H
    row = (index // H) % L
    batch = index // H // L
    lane = tl.arange(0, BLOCK)
    inside = (index < count)[:, None] & (lane < HALF)[None, :]
    x = x_ptr + (batch * x_batch + row * x_row + head * x_head)[:, None] + lane[None, :]
    y = y_ptr + (batch * y_batch + row * y_row + head * y_head)[:, None] + lane[None, :]
    left = tl.load(x, inside, other=0.0).to(tl.float32)
    right = tl.load(x + HALF, inside, other=0.0).to(tl.float32)
    if SIGN != 0:
        angle = (row * (2 * HALF))[:, None] + lane[None, :]
        cos = tl.load(cos_ptr + angle, inside, other=0.0)
        sin = tl.load(sin_ptr + angle + HALF, inside, other=0.0) * SIGN
        left, right = left * cos - right * sin, right * cos + left * sin
    kind = y_ptr.dtype.element_ty
    tl.store(y, left.to(kind), inside)
    tl.store(y + HALF, right.to(kind), inside)


def turn(x: Tensor, cos: Tensor, sin: Tensor, into: Tensor, *, sign: int) -> None:
    """`_rotary.rotate` of ``x`` [S, L, H, D], written to ``into`` (same shape).

    ``sign`` -1 writes its inverse, 0 a copy, for which torch's takes three times as long. float32,
    bfloat16 or float16; computed in float32. ``cos`` and ``sin`` are a rotary table.
    """
    S, L, H, D = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()  # gradients of a reduction come with stride 0
    half = D // 2
    _rotary_turn[(triton.cdiv(S * L * H, ROWS),)](
        x,
        into,
        cos,
        sin,
        S * L * H,
        L,
        H,
        *x.stride()[:3],
        *into.stride()[:3],
        HALF=half,
        SIGN=sign,
        ROWS=ROWS,
        BLOCK=triton.next_power_of_2(half),
    )
