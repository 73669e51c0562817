# mypy: ignore-errors
"""Triton kernel that adds up the rows of a matrix, for bias gradients."""

import triton
import triton.language as tl


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
):
    """Row p of the result: the sum, in float32, of rows p*rows_per_part and what follows."""
    part = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BW + tl.arange(0, BW)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, N)
    total = tl.zeros((BT, BW), tl.float32)
    for first in range(begin, end, BT):
        rows = first + tl.arange(0, BT)
        inside = (rows < end)[:, None] & (cols < width)[None, :]
        offsets = rows[:, None] * stride_n + cols.to(tl.int64)[None, :] * stride_k
        total += tl.load(t_ptr + offsets, inside, other=0.0).to(tl.float32)
    sums = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + part * width + cols, sums, cols < width)
