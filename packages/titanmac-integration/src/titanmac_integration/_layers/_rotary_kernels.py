# mypy: ignore-errors
"""A Triton kernel for rotary positions: one pass, whatever the strides of what it reads.

Attention returns gradients head by head while a projection wants them row by row, so the same pass
also changes the order in memory.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
"""Rows of one head each that a program turns."""


@triton.jit
def _rows_of_part(
    x_ptr, y_ptr, cos_ptr, sin_ptr, count, L, H,
    x_batch, x_row, x_head, y_batch, y_row, y_head,
    HALF: tl.constexpr, SIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn a program's rows of one part; SIGN -1 turns them back, 0 copies."""
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


@triton.jit
def _rotary_turn(
    x0_ptr, x1_ptr, x_last_ptr,  # [S, L, H, D], D contiguous
    y0_ptr, y1_ptr, y_last_ptr,  # [S, L, H, D], D contiguous
    cos_ptr,  # float32 [L, D]
    sin_ptr,  # float32 [L, D], the first half negated
    count,  # S L H
    L,
    H,
    x_batch, x_row, x_head, y_batch, y_row, y_head,
    last,  # 1, and part 1 is not there, or 2
    HALF: tl.constexpr, SIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    if part == last:
        _rows_of_part(
            x_last_ptr, y_last_ptr, cos_ptr, sin_ptr, count, L, H,
            x_batch, x_row, x_head, y_batch, y_row, y_head, HALF, 0, ROWS, BLOCK,
        )  # fmt: skip
    elif part == 0:
        _rows_of_part(
            x0_ptr, y0_ptr, cos_ptr, sin_ptr, count, L, H,
            x_batch, x_row, x_head, y_batch, y_row, y_head, HALF, SIGN, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _rows_of_part(
            x1_ptr, y1_ptr, cos_ptr, sin_ptr, count, L, H,
            x_batch, x_row, x_head, y_batch, y_row, y_head, HALF, SIGN, ROWS, BLOCK,
        )  # fmt: skip


def turn(
    parts: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    into: Sequence[Tensor],
    *,
    sign: int,
    copy_last: bool = True,
) -> None:
    """`_rotary.rotate` of two or three parts [S, L, H, D] but the last, which is copied, or not.

    Written to ``into`` (same shapes, all with the same strides), which may be ``parts``. ``sign``
    -1 writes the inverse. float32, bfloat16 or float16; computed in float32. ``cos`` and ``sin``
    are a rotary table.
    """
    S, L, H, D = parts[0].shape
    if len({part.stride() for part in parts}) > 1 or parts[0].stride(3) != 1:
        # gradients of a reduction come with stride 0
        parts = [part.contiguous() for part in parts]
    last = len(parts) - 1
    half = D // 2
    _rotary_turn[(triton.cdiv(S * L * H, ROWS), len(parts) if copy_last else last)](
        parts[0],
        parts[last - 1],
        parts[last],
        into[0],
        into[last - 1],
        into[last],
        cos,
        sin,
        S * L * H,
        L,
        H,
        *parts[0].stride()[:3],
        *into[0].stride()[:3],
        last,
        HALF=half,
        SIGN=sign,
        ROWS=ROWS,
        BLOCK=triton.next_power_of_2(half),
    )
