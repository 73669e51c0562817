# mypy: ignore-errors
"""Triton kernel that adds up the rows of a matrix, for bias gradients."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["N", "rows_per_part"])
def sum_rows(
    t_ptr,  # [N, width], any strides
    out_ptr,  # [parts, width]
    N,
    width,
    stride_n,
    stride_k,
    rows_per_part,
    BT: tl.constexpr,
    BW: tl.constexpr,
    TILES: tl.constexpr,  # that are on their way at a time
    OVERLAPS: tl.constexpr = False,
):
    """Row p of the result: the sum, in float32, of rows p*rows_per_part and what follows."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    part = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BW + tl.arange(0, BW)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, N)
    total = tl.zeros((BT, BW), tl.float32)
    for first in range(begin, end, BT * TILES):
        for i in tl.static_range(TILES):
            rows = first + i * BT + tl.arange(0, BT)
            inside = (rows < end)[:, None] & (cols < width)[None, :]
            offsets = rows[:, None] * stride_n + cols.to(tl.int64)[None, :] * stride_k
            total += tl.load(t_ptr + offsets, inside, other=0.0).to(tl.float32)
    sums = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + part * width + cols, sums, cols < width)
