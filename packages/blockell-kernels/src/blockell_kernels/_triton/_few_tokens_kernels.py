# mypy: ignore-errors
"""Triton kernels for few tokens, where a product is the time it takes to read the weight.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens, a few times BM
at most. Programs own a strip of the result for BM tokens and a part of the sum; parts are added up
by `add_parts`, in order: deterministic. Those that read the same blocks follow one another, so that
memory is read once.

The column (slot) of the next step is loaded one step ahead and carried, as in the other kernels.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["N"])
def few_forward(
    x_ptr,  # [N, C*B], any strides
    values_ptr,  # [R, slots, B, B]
    cols_ptr,  # [R, slots]
    bias_ptr,  # [R*B] or unused
    out_ptr,  # [N, R*B], or float32 [parts, N, R*B]
    N,
    slots,
    num_live,
    out_features,
    stride_xn,
    stride_xk,
    steps_per_part,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BN_LIVE: tl.constexpr,  # below BN only where a tile of 8 is padded
    BK: tl.constexpr,
    EVEN: tl.constexpr,  # every part is a whole number of steps
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FAR: tl.constexpr = False,  # columns of x lie more than 2^31 elements apart
    OVERLAPS: tl.constexpr = False,
):
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    RUN: tl.constexpr = B if B < BK else BK
    token_tiles = tl.cdiv(N, BM)
    pn, part = tl.program_id(0) // token_tiles, tl.program_id(1)
    m = (tl.program_id(0) % token_tiles) * BM + tl.arange(0, BM)
    n, kk = tl.arange(0, BN), tl.arange(0, BK)
    # Masked, not repeated: sixteen copies of one line cost more than sixteen lines.
    inside = (m < N)[:, None]
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_xn
    out = pn * BN_LIVE + n % BN_LIVE
    w_rows = values_ptr + ((out // B).to(tl.int64) * slots * B + out % B)[None, :] * B
    row_cols = cols_ptr + ((pn * BN_LIVE) // B).to(tl.int64) * slots
    begin = part * steps_per_part * BK
    end = tl.minimum(begin + steps_per_part * BK, num_live * B)
    acc = tl.zeros((BM, BN), tl.float32)
    c = tl.load(row_cols + tl.minimum((begin + kk) // B, num_live - 1))
    for q0 in range(begin, end, BK):
        q = q0 + kk
        x_cols = tl.max_contiguous(tl.multiple_of(c * B + q % B, RUN), RUN)
        if FAR:
            x_cols = x_cols.to(tl.int64)
        c = tl.load(row_cols + tl.minimum((q + BK) // B, num_live - 1))
        w_cols = (q // B) * (B * B) + q % B
        w_cols = tl.max_contiguous(tl.multiple_of(w_cols, RUN), RUN)
        if EVEN:
            x = tl.load(x_rows + x_cols[None, :] * stride_xk, inside, other=0.0)
            w = tl.load(w_rows + w_cols[:, None])
        else:
            present = inside & (q < end)[None, :]
            x = tl.load(x_rows + x_cols[None, :] * stride_xk, present, other=0.0)
            w = tl.load(w_rows + w_cols[:, None], (q < end)[:, None], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + out).to(tl.float32)[None, :]
    base = out_ptr + part.to(tl.int64) * N * out_features
    target = base + m.to(tl.int64)[:, None] * out_features + out[None, :]
    tl.store(target, acc.to(out_ptr.dtype.element_ty), inside & (n < BN_LIVE)[None, :])


@triton.jit(do_not_specialize=["N"])
def few_grad_input(
    dy_ptr,  # [N, R*B], any strides
    values_ptr,  # [R, slots, B, B]
    order_ptr,  # [R*slots] slot ids, by column then row
    col_start_ptr,  # [C+1]
    out_ptr,  # [N, C*B], or float32 [parts, N, C*B]
    N,
    slots,
    in_features,
    stride_dn,
    stride_dk,
    parts,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BN_LIVE: tl.constexpr,  # divides B
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    RUN: tl.constexpr = B if B < BK else BK
    token_tiles = tl.cdiv(N, BM)
    pn, part = tl.program_id(0) // token_tiles, tl.program_id(1)
    m = (tl.program_id(0) % token_tiles) * BM + tl.arange(0, BM)
    n, kk = tl.arange(0, BN), tl.arange(0, BK)
    inside = (m < N)[:, None]
    dy_rows = dy_ptr + m.to(tl.int64)[:, None] * stride_dn
    c, offset = (pn * BN_LIVE) // B, (pn * BN_LIVE) % B
    w_cols = tl.max_contiguous(tl.multiple_of(offset + n % BN_LIVE, BN_LIVE), BN_LIVE)
    start = tl.load(col_start_ptr + c)
    depth = (tl.load(col_start_ptr + c + 1) - start) * B
    last = tl.maximum(depth // B - 1, 0)
    per_part = tl.cdiv(tl.cdiv(depth, BK), parts) * BK
    begin = part * per_part
    end = tl.minimum(begin + per_part, depth)
    acc = tl.zeros((BM, BN), tl.float32)
    slot = tl.load(order_ptr + start + tl.minimum((begin + kk) // B, last), depth > 0, other=0)
    for q0 in range(begin, end, BK):
        q = q0 + kk
        dy_cols = tl.max_contiguous(tl.multiple_of((slot // slots) * B + q % B, RUN), RUN)
        w_rows = slot.to(tl.int64) * (B * B) + (q % B) * B
        slot = tl.load(order_ptr + start + tl.minimum((q + BK) // B, last))
        present = q < end
        valid = inside & present[None, :]
        dy = tl.load(dy_rows + dy_cols[None, :] * stride_dk, valid, other=0.0)
        w = tl.load(values_ptr + w_rows[:, None] + w_cols[None, :], present[:, None], other=0.0)
        if UPCAST:
            dy, w = dy.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(dy, w, acc, input_precision=PRECISION)
    base = out_ptr + part.to(tl.int64) * N * in_features
    target = base + m.to(tl.int64)[:, None] * in_features + (c * B + offset + n)[None, :]
    tl.store(target, acc.to(out_ptr.dtype.element_ty), inside & (n < BN_LIVE)[None, :])


@triton.jit(do_not_specialize=["N"])
def few_grad_values(
    dy_ptr,  # [N, R*B], any strides
    x_ptr,  # [N, C*B], any strides
    cols_ptr,  # [R, slots]
    out_ptr,  # [R, slots, B, B]
    N,
    slots,
    num_live,
    stride_dn,
    stride_dk,
    stride_xn,
    stride_xk,
    B: tl.constexpr,
    BR: tl.constexpr,
    BR_LIVE: tl.constexpr,  # below BR only where a tile of 8 is padded
    KB: tl.constexpr,  # slots per program
    BM: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FAR: tl.constexpr = False,  # columns of x lie more than 2^31 elements apart
    OVERLAPS: tl.constexpr = False,
):
    """Writes every slot once; zeros in the spare ones."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    pr, chunk = tl.program_id(0), tl.program_id(1)
    m, i, q = tl.arange(0, BM), tl.arange(0, BR), tl.arange(0, KB * B)
    row = pr * BR_LIVE + i % BR_LIVE
    k = chunk * KB + q // B
    live = k < num_live
    row_cols = cols_ptr + ((pr * BR_LIVE) // B).to(tl.int64) * slots
    c = tl.load(row_cols + k, live, other=0)
    x_cols = tl.max_contiguous(tl.multiple_of(c * B + q % B, B), B)
    if FAR:
        x_cols = x_cols.to(tl.int64)
    acc = tl.zeros((BR, KB * B), tl.float32)
    for t0 in range(0, N, BM):
        inside = (t0 + m < N)[:, None]
        tokens = (t0 + m).to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + tokens * stride_dn + row[None, :] * stride_dk, inside, other=0.0)
        x = tl.load(x_ptr + tokens * stride_xn + x_cols[None, :] * stride_xk, inside, other=0.0)
        if UPCAST:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
    acc = tl.where(live[None, :], acc, 0.0)
    rows = ((row // B).to(tl.int64) * slots * B + row % B)[:, None] * B
    target = out_ptr + rows + (k * (B * B) + q % B)[None, :]
    tl.store(
        target, acc.to(out_ptr.dtype.element_ty), (i < BR_LIVE)[:, None] & (k < slots)[None, :]
    )


@triton.jit(do_not_specialize=["size"])
def add_parts(
    parts_ptr,  # float32 [parts, N, features]
    bias_ptr,  # [features] or unused
    out_ptr,  # [N, features]
    size,  # N*features
    parts,
    features,
    PARTS: tl.constexpr,  # parts rounded up to a power of two
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)
    source = parts_ptr + part.to(tl.int64)[:, None] * size + i[None, :]
    total = tl.sum(
        tl.load(source, (part < parts)[:, None] & (i < size)[None, :], other=0.0), axis=0
    )
    if HAS_BIAS:
        total += tl.load(bias_ptr + i % features, i < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), i < size)
