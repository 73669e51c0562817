# mypy: ignore-errors
"""Puts blocks into the order in which the tensor core reads them from shared memory.

Legend: R block rows, B tile side.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def swizzle(
    values_ptr, out_ptr, size, B: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr = False
):
    """Swap 16-byte pieces of blocks of 16-bit elements as the swizzle of 2*B bytes does.

    Address bits 4 and 5 (4 alone for tiles of 16) are xored with bits 7 and 8.
    """
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    PIECES: tl.constexpr = B // 8 - 1
    i = (tl.program_id(0).to(tl.int64) * BLOCK) + tl.arange(0, BLOCK)
    source = i ^ (((i >> 6) & PIECES) << 3)
    source = tl.max_contiguous(tl.multiple_of(source, 8), 8)
    tl.store(out_ptr + i, tl.load(values_ptr + source, mask=i < size), mask=i < size)


@triton.jit(do_not_specialize=["N"])
def pack_panels(
    x_ptr,  # [N, columns], 16-bit, rows contiguous
    out_ptr,  # [N/BT, columns/B, BT, B]
    N,
    columns,
    stride_n,
    B: tl.constexpr,
    BT: tl.constexpr,
    BW: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    """Panels of BT tokens by B columns, one behind the other, swizzled; zeros behind token N."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    PIECES: tl.constexpr = B // 8 - 1
    t = tl.arange(0, BT)
    token = tl.program_id(0).to(tl.int64) * BT + t
    n = tl.program_id(1) * BW + tl.arange(0, BW)
    inside = (n < columns)[None, :]
    source = x_ptr + token[:, None] * stride_n + n[None, :]
    x = tl.load(source, (token < N)[:, None] & inside, other=0.0)
    at = t[:, None] * B + (n % B)[None, :]
    at = at ^ (((at >> 6) & PIECES) << 3)
    at = tl.max_contiguous(tl.multiple_of(at, (1, 8)), (1, 8))
    panel = (tl.program_id(0).to(tl.int64) * (columns // B) + n // B) * (BT * B)
    tl.store(out_ptr + panel[None, :] + at, x, inside)
