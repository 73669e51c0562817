# mypy: ignore-errors
"""Triton kernels of the weight gradient: the present blocks of dy^T x.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens. A program owns
BR rows of one row group and NB of its blocks, [BR, NB*B] of the gradient, and a part of the tokens
(there are too few tiles to fill a GPU otherwise). Each part writes a float32 partial;
`reduce_parts` adds them in a fixed order: deterministic, no atomics.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# One compiled kernel for all of them.
SIZES = ["N", "slots", "num_live", "out_slots", "part_blocks", "row_tiles", "tokens_per_part"]


@triton.jit(do_not_specialize=SIZES)
def grad_values_pointers(
    dy_ptr,  # [N, R*B], any strides
    x_ptr,  # [N, C*B], any strides
    cols_ptr,  # [R, slots]
    out_ptr,  # [parts, R, out_slots, B, B]
    N,
    slots,
    num_live,
    out_slots,
    part_blocks,  # R*out_slots
    row_tiles,
    tokens_per_part,
    stride_dn,
    stride_dk,
    stride_xn,
    stride_xk,
    B: tl.constexpr,
    BR: tl.constexpr,
    BR_LIVE: tl.constexpr,  # below BR only where a tile of 8 is padded
    NB: tl.constexpr,  # blocks of a row group per program; NB*B >= 16
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    pr, chunk, part = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles, tl.program_id(1)
    m = tl.arange(0, BR)
    rows = pr * BR_LIVE + m % BR_LIVE
    n = tl.arange(0, NB * B)
    k = chunk * NB + n // B
    row_cols = cols_ptr + ((pr * BR_LIVE) // B).to(tl.int64) * slots
    x_cols = tl.load(row_cols + tl.minimum(k, num_live - 1)) * B + n % B
    x_cols = tl.max_contiguous(tl.multiple_of(x_cols, B), B)
    dy_cols = dy_ptr + rows[None, :] * stride_dk
    x_cols = x_ptr + x_cols.to(tl.int64)[None, :] * stride_xk

    acc = tl.zeros((BR, NB * B), tl.float32)
    begin = part * tokens_per_part
    end = tl.minimum(begin + tokens_per_part, N)
    for t0 in range(begin, end, BT):
        tokens = t0 + tl.arange(0, BT)
        inside = (tokens < end)[:, None]
        tokens64 = tokens.to(tl.int64)[:, None]
        dy = tl.load(dy_cols + tokens64 * stride_dn, inside, other=0.0)
        x = tl.load(x_cols + tokens64 * stride_xn, inside, other=0.0)
        if UPCAST:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
    out_rows = ((rows // B).to(tl.int64) * out_slots * B + rows % B)[:, None] * B
    out_cols = k * (B * B) + n % B
    mask = (m < BR_LIVE)[:, None] & (k < num_live)[None, :]
    base = out_ptr + part.to(tl.int64) * part_blocks * (B * B)
    tl.store(base + out_rows + out_cols[None, :], acc.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=SIZES)
def grad_values_descriptors(
    dy_desc,  # [N, R*B] in boxes [BT, BR]
    x_desc,  # [N, C*B] in boxes [BT, B]
    cols_ptr,
    out_ptr,
    N,
    slots,
    num_live,
    out_slots,
    part_blocks,
    row_tiles,
    tokens_per_part,  # a multiple of BT
    B: tl.constexpr,
    BR: tl.constexpr,
    NB: tl.constexpr,  # 1 or 2
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    pr, chunk, part = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles, tl.program_id(1)
    row_cols = cols_ptr + ((pr * BR) // B).to(tl.int64) * slots
    k = chunk * NB
    x_col = tl.load(row_cols + k) * B
    x_col1 = x_col
    if NB == 2:
        x_col1 = tl.load(row_cols + tl.minimum(k + 1, num_live - 1)) * B
    acc = tl.zeros((BR, B), tl.float32)
    acc1 = tl.zeros((BR, B), tl.float32)
    begin = part * tokens_per_part
    # Boxes past token N read zeros.
    for t0 in range(begin, tl.minimum(begin + tokens_per_part, N), BT):
        dy = dy_desc.load([t0, pr * BR])
        x = x_desc.load([t0, x_col])
        if UPCAST:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(dy.T, x, acc, input_precision=PRECISION)
        if NB == 2:
            x = x_desc.load([t0, x_col1])
            if UPCAST:
                x = x.to(tl.float32)
            acc1 = tl.dot(dy.T, x, acc1, input_precision=PRECISION)
    rows = pr * BR + tl.arange(0, BR)
    out_rows = ((rows // B).to(tl.int64) * out_slots * B + rows % B)[:, None] * B
    base = out_ptr + part.to(tl.int64) * part_blocks * (B * B) + out_rows + tl.arange(0, B)[None, :]
    tl.store(base + k * (B * B), acc.to(out_ptr.dtype.element_ty))
    if NB == 2:
        mask = tl.full((BR, B), True, tl.int1) & (k + 1 < num_live)
        tl.store(base + (k + 1) * (B * B), acc1.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["parts", "part_blocks", "num_live", "slots"])
def reduce_parts(
    parts_ptr,  # float32 [parts, R, num_live, B, B]
    out_ptr,  # [R, slots, B, B]
    parts,
    part_blocks,  # R*num_live
    num_live,
    slots,
    BB: tl.constexpr,  # B*B
    PARTS: tl.constexpr,  # parts rounded up to a power of two
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    """out = sum over parts, all loaded at once; zeros in the spare slots."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    r = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)
    parts_at = part.to(tl.int64)[:, None] * part_blocks * BB
    source = parts_ptr + r * num_live * BB + parts_at + i[None, :]
    live = (part < parts)[:, None] & (i < num_live * BB)[None, :]
    total = tl.sum(tl.load(source, live, other=0.0), axis=0)
    tl.store(out_ptr + r * slots * BB + i, total.to(out_ptr.dtype.element_ty), i < slots * BB)
