# mypy: ignore-errors
"""Triton kernels that move or measure whole blocks.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def scatter_blocks(
    values_ptr,  # [R, slots, B, B]
    cols_ptr,  # [R, slots]
    dense_ptr,  # [R*B, C*B]
    slots,
    num_live,
    C,
    B: tl.constexpr,
    LINES: tl.constexpr,  # lines of a block row per program; divides B
    KB: tl.constexpr,  # blocks at a time
    ZEROS: tl.constexpr,  # elements zeroed at a time
    OVERLAPS: tl.constexpr = False,
):
    """The dense matrix: a program zeroes its lines, then lays the blocks over them.

    The lines are still in L2 when they are written again, so memory sees them once.
    """
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    r = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * LINES
    width = C * B
    lines = dense_ptr + (r * B + first) * width
    i = tl.arange(0, LINES)[None, :, None]
    j = tl.arange(0, B)[None, None, :]
    source = values_ptr + r * slots * (B * B) + (first + i) * B + j
    # The first blocks are on their way while the lines are zeroed.
    k = tl.arange(0, KB)
    c = tl.load(cols_ptr + r * slots + k, k < num_live, other=0)[:, None, None]
    k = k[:, None, None]
    live = (k < num_live) & (i >= 0) & (j >= 0)
    blocks = tl.load(source + k * (B * B), live)
    z = tl.arange(0, ZEROS)
    zeros = tl.zeros((ZEROS,), dense_ptr.dtype.element_ty)
    for z0 in range(0, LINES * width, ZEROS):
        tl.store(lines + z0 + z, zeros, z0 + z < LINES * width)
    tl.debug_barrier()
    tl.store(lines + i * width + c * B + j, blocks, live)
    for k0 in range(KB, num_live, KB):
        k = k0 + tl.arange(0, KB)
        c = tl.load(cols_ptr + r * slots + k, k < num_live, other=0)[:, None, None]
        k = k[:, None, None]
        live = (k < num_live) & (i >= 0) & (j >= 0)
        blocks = tl.load(source + k * (B * B), live)
        tl.store(lines + i * width + c * B + j, blocks, live)


@triton.jit
def expand_blocks(
    values_ptr,  # [R, slots, B, B]
    cols_ptr,  # [R, slots]
    dense_ptr,  # [R*B, C*B]
    map_ptr,  # int32 [R, chunks, CB]
    slots,
    num_live,
    C,
    chunks,
    B: tl.constexpr,
    LINES: tl.constexpr,  # lines of a block row at a time; divides B
    CB: tl.constexpr,  # block columns per program
    KB: tl.constexpr,  # slots looked through at a time
    OVERLAPS: tl.constexpr = False,
):
    """The dense matrix, every element written once: a program notes who fills its columns."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    chunk, r = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    place = map_ptr + (r * chunks + chunk) * CB
    n = tl.arange(0, CB)
    tl.store(place + n, tl.full((CB,), -1, tl.int32))
    tl.debug_barrier()
    for k0 in range(0, num_live, KB):
        k = k0 + tl.arange(0, KB)
        c = tl.load(cols_ptr + r * slots + k, k < num_live, other=-1) - chunk * CB
        tl.store(place + c, k, (c >= 0) & (c < CB) & (k < num_live))
    tl.debug_barrier()
    slot = tl.load(place + n)[None, :, None]
    c = (chunk * CB + n)[None, :, None]
    j = tl.arange(0, B)[None, None, :]
    for i0 in range(0, B, LINES):
        i = i0 + tl.arange(0, LINES)[:, None, None]
        source = values_ptr + (r * slots + slot) * (B * B) + i * B + j
        blocks = tl.load(source, (slot >= 0) & (i >= 0) & (j >= 0), other=0.0)
        target = dense_ptr + (r * B + i) * C * B + c * B + j
        tl.store(target, blocks, (c < C) & (i >= 0) & (j >= 0))


@triton.jit
def gather_blocks(
    dense_ptr,  # [R*B, C*B]
    cols_ptr,  # [R, slots]
    out_ptr,  # [R, slots, B, B]
    slots,
    num_live,
    C,
    chunks,
    B: tl.constexpr,
    KB: tl.constexpr,  # slots per program
    OVERLAPS: tl.constexpr = False,
):
    """The present blocks of a dense matrix; zeros in the spare slots.

    Lines outside of slots: what a warp loads together then lies in few lines of the matrix.
    """
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    r = (tl.program_id(0) // chunks).to(tl.int64)
    k = tl.program_id(0) % chunks * KB + tl.arange(0, KB)
    c = tl.load(cols_ptr + r * slots + k, k < num_live, other=0)[None, :, None]
    k = k[None, :, None]
    i = tl.arange(0, B)[:, None, None]
    j = tl.arange(0, B)[None, None, :]
    source = dense_ptr + (r * B + i) * C * B + c * B + j
    blocks = tl.load(source, (k < num_live) & (i >= 0) & (j >= 0), other=0.0)
    target = out_ptr + r * slots * (B * B) + k * (B * B) + i * B + j
    tl.store(target, blocks, (k < slots) & (i >= 0) & (j >= 0))


@triton.jit
def pack_rows(
    values_ptr,  # [R, slots, B, B]
    packed_ptr,  # [R*B, width]
    slots,
    num_live,
    width,  # at least num_live*B
    B: tl.constexpr,
    KB: tl.constexpr,  # slots per program
    OVERLAPS: tl.constexpr = False,
):
    """The live blocks of every row side by side; zeros up to the width."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    r = tl.program_id(0).to(tl.int64)
    k = (tl.program_id(1) * KB + tl.arange(0, KB))[None, :, None]
    i = tl.arange(0, B)[:, None, None]
    j = tl.arange(0, B)[None, None, :]
    source = values_ptr + r * slots * (B * B) + k * (B * B) + i * B + j
    blocks = tl.load(source, (k < num_live) & (i >= 0) & (j >= 0), other=0.0)
    target = packed_ptr + (r * B + i) * width + k * B + j
    tl.store(target, blocks, (k * B + j < width) & (i >= 0))


@triton.jit(do_not_specialize=["N"])
def block_norms(
    dy_ptr,  # [N, R*B], any strides
    x_ptr,  # [N, C*B], any strides
    out_ptr,  # float32 [R, C]
    N,
    R,
    C,
    row_tiles,
    stride_dn,
    stride_dk,
    stride_xn,
    stride_xk,
    B: tl.constexpr,
    RB: tl.constexpr,  # block rows per program
    CB: tl.constexpr,  # block columns per program
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    """Squared Frobenius norms of RB x CB blocks of dy^T x, which stays in registers."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    pr, pc = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    # Blocks past the end repeat the last one, whole, so that loads stay contiguous and aligned.
    m, n = tl.arange(0, RB * B), tl.arange(0, CB * B)
    rows = tl.minimum(pr * RB + m // B, R - 1) * B + m % B
    cols = tl.minimum(pc * CB + n // B, C - 1) * B + n % B
    rows = tl.max_contiguous(tl.multiple_of(rows, B), B)
    cols = tl.max_contiguous(tl.multiple_of(cols, B), B)
    dy_cols = dy_ptr + rows.to(tl.int64)[None, :] * stride_dk
    x_cols = x_ptr + cols.to(tl.int64)[None, :] * stride_xk
    acc = tl.zeros((RB * B, CB * B), tl.float32)
    for t0 in range(0, N, BT):
        tokens = t0 + tl.arange(0, BT)
        inside = (tokens < N)[:, None]
        tokens = tokens.to(tl.int64)[:, None]
        dy = tl.load(dy_cols + tokens * stride_dn, inside, other=0.0)
        x = tl.load(x_cols + tokens * stride_xn, inside, other=0.0)
        if UPCAST:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
    squares = tl.sum((acc * acc).reshape(RB, B, CB * B), axis=1)
    squares = tl.sum(squares.reshape(RB, CB, B), axis=2)
    r = pr * RB + tl.arange(0, RB)
    c = pc * CB + tl.arange(0, CB)
    target = out_ptr + r.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(target, squares, (r < R)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["N", "tokens_per_part"])
def square_sums(
    t_ptr,  # [N, M*B], any strides
    parts_ptr,  # float32 [parts, M]
    N,
    M,
    tokens_per_part,
    stride_n,
    stride_k,
    B: tl.constexpr,
    MB: tl.constexpr,  # blocks per program
    BT: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    """Sums of squares per block over a part of the tokens."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    blocks = tl.program_id(0) * MB + tl.arange(0, MB)
    part = tl.program_id(1)
    cols = tl.program_id(0) * MB * B + tl.arange(0, MB * B)
    inside = (cols < M * B)[None, :]
    acc = tl.zeros((BT, MB * B), tl.float32)
    end = tl.minimum((part + 1) * tokens_per_part, N)
    for t0 in range(part * tokens_per_part, end, BT):
        tokens = t0 + tl.arange(0, BT)
        offsets = tokens.to(tl.int64)[:, None] * stride_n + cols.to(tl.int64)[None, :] * stride_k
        t = tl.load(t_ptr + offsets, inside & (tokens < end)[:, None], other=0.0).to(tl.float32)
        acc += t * t
    sums = tl.sum(tl.sum(acc, axis=0).reshape(MB, B), axis=1)
    tl.store(parts_ptr + part * M + blocks, sums, blocks < M)


@triton.jit
def index_column(
    cols_ptr,  # [R*slots], -1 in spare slots
    order_ptr,  # [R*slots]
    col_start_ptr,  # [C+1]
    entries,  # R*slots
    C,
    BLOCK: tl.constexpr,
):
    """One column's slots by ascending row, after those of all columns before it.

    Program C does the spare slots, which come last. Every program looks through all entries, twice:
    for the sizes of layers that is less than one more launch.
    """
    c = tl.program_id(0)
    start = 0
    i = tl.arange(0, BLOCK)
    for e0 in range(0, entries, BLOCK):
        held = tl.load(cols_ptr + e0 + i, e0 + i < entries, other=-1)
        start += tl.sum(((held >= 0) & (held < c)).to(tl.int32), axis=0)
    tl.store(col_start_ptr + c, start)
    for e0 in range(0, entries, BLOCK):
        inside = e0 + i < entries
        held = tl.load(cols_ptr + e0 + i, inside, other=C)
        mine = inside & ((held == c) | ((held < 0) & (c == C)))
        place = tl.cumsum(mine.to(tl.int32), axis=0)
        tl.store(order_ptr + start + place - 1, e0 + i, mine)
        start += tl.sum(mine.to(tl.int32), axis=0)
