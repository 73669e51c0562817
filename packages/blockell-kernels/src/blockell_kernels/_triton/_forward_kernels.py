# mypy: ignore-errors
"""Triton kernels of the forward product y = f(x W^T + bias).

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens; a program owns
BM tokens and BN outputs. All outputs of a program share one list of columns (BN divides
row_group*B), so the loop over the list has no branch. Tokens lie on M and W^T on N: with the tile
as the M operand anything below 64 rows would leave the tensor core's fast path.

The column index of the next step is loaded one step ahead and carried by the loop. Loaded in the
step that uses it, it makes the load of x an indirect one, which the pipeliner prefetches one stage
less deep.

The activation is applied to the sum rounded to the result's dtype, as if it had been stored and
read again: recomputed from a stored pre-activation it comes out the same.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blockell_kernels._triton._activation_kernels import activated


@triton.jit
def tile_of(pid, token_tiles, column_tiles, GROUP_M: tl.constexpr):
    """(token tile, column tile) of a program; GROUP_M token tiles share the L2 at a time."""
    width = GROUP_M * column_tiles
    first = (pid // width) * GROUP_M
    height = tl.minimum(token_tiles - first, GROUP_M)
    return first + (pid % width) % height, (pid % width) // height


@triton.jit
def store_in_parts(
    desc, row, col, acc, BM: tl.constexpr, BN: tl.constexpr, STORE_PARTS: tl.constexpr
):
    """Store a tile whole or as two halves: half the shared memory, so one more stage of loads."""
    if STORE_PARTS == 1:
        desc.store([row, col], acc.to(desc.dtype))
    else:
        left, right = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        desc.store([row, col], left.to(desc.dtype))
        desc.store([row, col + BN // 2], right.to(desc.dtype))


@triton.jit
def store_activated_part(
    desc,
    pre_desc,
    row,
    col,
    part,
    ACTIVATION: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    KEEP_PRE: tl.constexpr,
):
    """Store f(part) and, if asked, the part itself."""
    h = part.to(desc.dtype)
    if KEEP_PRE:
        pre_desc.store([row, col], h)
    desc.store([row, col], activated(h.to(tl.float32), ACTIVATION, ARITHMETIC).to(desc.dtype))


@triton.jit
def store_activated(
    desc,
    pre_desc,
    row,
    col,
    acc,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STORE_PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    KEEP_PRE: tl.constexpr,
):
    """As `store_in_parts`, through the activation; the pre-activation, too, if it is to be kept."""
    if ACTIVATION == "none":
        store_in_parts(desc, row, col, acc, BM, BN, STORE_PARTS)
    elif STORE_PARTS == 1:
        store_activated_part(desc, pre_desc, row, col, acc, ACTIVATION, ARITHMETIC, KEEP_PRE)
    else:
        left, right = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        store_activated_part(desc, pre_desc, row, col, left, ACTIVATION, ARITHMETIC, KEEP_PRE)
        col += BN // 2
        store_activated_part(desc, pre_desc, row, col, right, ACTIVATION, ARITHMETIC, KEEP_PRE)


@triton.jit(do_not_specialize=["N"])
def forward_pointers(
    x_ptr,  # [N, C*B], any strides
    values_ptr,  # [R, slots, B, B]
    cols_ptr,  # [R, slots]
    bias_ptr,  # [R*B] or unused
    y_ptr,  # [N, R*B]
    pre_ptr,  # [N, R*B] or None
    N,
    slots,
    num_live,
    out_features,
    stride_xn,
    stride_xk,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BN_LIVE: tl.constexpr,  # below BN only where a tile of 8 is padded
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,  # num_live*B is a multiple of BK
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ARITHMETIC: tl.constexpr,  # of the activation
    KEEP_PRE: tl.constexpr,  # store the pre-activation, too
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FAR: tl.constexpr = False,  # columns of x lie more than 2^31 elements apart
    OVERLAPS: tl.constexpr = False,
):
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    CONTIGUOUS: tl.constexpr = B if B < BK else BK
    pm, pn = tile_of(tl.program_id(0), tl.cdiv(N, BM), out_features // BN_LIVE, GROUP_M)
    tokens = pm * BM + tl.arange(0, BM)
    # Rows past the end repeat the last token and are dropped at the store.
    x_rows = x_ptr + tl.minimum(tokens, N - 1).to(tl.int64)[:, None] * stride_xn
    n = tl.arange(0, BN)
    out = pn * BN_LIVE + (n % BN_LIVE)
    w_rows = values_ptr + ((out // B).to(tl.int64) * slots * B + out % B)[None, :] * B
    row_cols = cols_ptr + ((pn * BN_LIVE) // B).to(tl.int64) * slots

    kk = tl.arange(0, BK)
    live = num_live * B
    acc = tl.zeros((BM, BN), tl.float32)
    if BK <= B:
        c = tl.load(row_cols)
        for q0 in range(0, live, BK):
            j = q0 % B + kk
            x_cols = tl.max_contiguous(tl.multiple_of(c * B + j, CONTIGUOUS), CONTIGUOUS)
            if FAR:
                x_cols = x_cols.to(tl.int64)
            c = tl.load(row_cols + tl.minimum((q0 + BK) // B, num_live - 1))
            w_cols = (q0 // B) * (B * B) + j
            w_cols = tl.max_contiguous(tl.multiple_of(w_cols, CONTIGUOUS), CONTIGUOUS)
            x = tl.load(x_rows + x_cols[None, :] * stride_xk)
            w = tl.load(w_rows + w_cols[:, None])
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    else:
        c = tl.load(row_cols + tl.minimum(kk // B, num_live - 1))
        for q0 in range(0, live, BK):
            q = q0 + kk
            x_cols = tl.max_contiguous(tl.multiple_of(c * B + kk % B, CONTIGUOUS), CONTIGUOUS)
            if FAR:
                x_cols = x_cols.to(tl.int64)
            c = tl.load(row_cols + tl.minimum((q + BK) // B, num_live - 1))
            w_cols = (q // B) * (B * B) + kk % B
            w_cols = tl.max_contiguous(tl.multiple_of(w_cols, CONTIGUOUS), CONTIGUOUS)
            if EVEN_K:
                x = tl.load(x_rows + x_cols[None, :] * stride_xk)
                w = tl.load(w_rows + w_cols[:, None])
            else:
                x = tl.load(x_rows + x_cols[None, :] * stride_xk, (q < live)[None, :], other=0.0)
                w = tl.load(w_rows + w_cols[:, None], (q < live)[:, None], other=0.0)
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + out).to(tl.float32)[None, :]
    offsets = tokens.to(tl.int64)[:, None] * out_features + out[None, :]
    inside = (tokens < N)[:, None] & (n < BN_LIVE)[None, :]
    h = acc.to(y_ptr.dtype.element_ty)
    if KEEP_PRE:
        tl.store(pre_ptr + offsets, h, inside)
    if ACTIVATION != "none":
        h = activated(h.to(tl.float32), ACTIVATION, ARITHMETIC).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, h, inside)


@triton.jit(do_not_specialize=["N"])
def forward_packed(
    x_ptr,  # [N, C*B], any strides
    w_desc,  # [R*B, K*B rounded up to BK] in boxes [BN, BK]: the live blocks side by side
    y_desc,  # [N, R*B] in boxes [BM, BN / STORE_PARTS]
    pre_desc,  # as y_desc, or None
    cols_ptr,
    bias_ptr,
    N,
    slots,
    num_live,
    out_features,
    stride_xn,
    stride_xk,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,  # a multiple of B
    EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STORE_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ARITHMETIC: tl.constexpr,  # of the activation
    KEEP_PRE: tl.constexpr,  # store the pre-activation, too
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FAR: tl.constexpr = False,  # columns of x lie more than 2^31 elements apart
    OVERLAPS: tl.constexpr = False,
):
    """For small tiles: their rows are too short to be loaded well one block at a time."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    pm, pn = tile_of(tl.program_id(0), tl.cdiv(N, BM), out_features // BN, GROUP_M)
    tokens = pm * BM + tl.arange(0, BM)
    x_rows = x_ptr + tl.minimum(tokens, N - 1).to(tl.int64)[:, None] * stride_xn
    row_cols = cols_ptr + ((pn * BN) // B).to(tl.int64) * slots
    kk = tl.arange(0, BK)
    live = num_live * B
    acc = tl.zeros((BM, BN), tl.float32)
    c = tl.load(row_cols + tl.minimum(kk // B, num_live - 1))
    for q0 in range(0, live, BK):
        x_cols = tl.max_contiguous(tl.multiple_of(c * B + kk % B, B), B)
        if FAR:
            x_cols = x_cols.to(tl.int64)
        c = tl.load(row_cols + tl.minimum((q0 + BK + kk) // B, num_live - 1))
        if EVEN_K:
            x = tl.load(x_rows + x_cols[None, :] * stride_xk)
        else:
            x = tl.load(x_rows + x_cols[None, :] * stride_xk, (q0 + kk < live)[None, :], other=0.0)
        w = w_desc.load([pn * BN, q0])
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + pn * BN + tl.arange(0, BN)).to(tl.float32)[None, :]
    row, col = pm * BM, pn * BN
    store_activated(
        y_desc, pre_desc, row, col, acc, BM, BN, STORE_PARTS, ACTIVATION, ARITHMETIC, KEEP_PRE
    )


@triton.jit
def tile_by_descriptors(
    pid,
    x_desc,
    w_desc,
    y_desc,
    pre_desc,
    cols_ptr,
    bias_ptr,
    N,
    slots,
    num_live,
    out_features,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    STORE_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    KEEP_PRE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The tile of that number; see `forward_descriptors`."""
    STEPS: tl.constexpr = B // BK
    pm, pn = tile_of(pid, tl.cdiv(N, BM), out_features // BN, GROUP_M)
    r = (pn * BN) // B
    row_cols = cols_ptr + r.to(tl.int64) * slots
    acc = tl.zeros((BM, BN), tl.float32)
    c = tl.load(row_cols)
    for t in range(num_live * STEPS):
        x_col = c * B + (t % STEPS) * BK
        c = tl.load(row_cols + tl.minimum((t + 1) // STEPS, num_live - 1))
        x = x_desc.load([pm * BM, x_col])
        w = w_desc.load([r, t // STEPS, (pn * BN) % B, (t % STEPS) * BK]).reshape(BN, BK)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + pn * BN + tl.arange(0, BN)).to(tl.float32)[None, :]
    row, col = pm * BM, pn * BN
    store_activated(
        y_desc, pre_desc, row, col, acc, BM, BN, STORE_PARTS, ACTIVATION, ARITHMETIC, KEEP_PRE
    )


@triton.jit(do_not_specialize=["N"])
def forward_descriptors(
    x_desc,  # [N, C*B] in boxes [BM, BK]
    w_desc,  # [R, slots, B, B] in boxes [rows, 1, BN/rows, BK]
    y_desc,  # [N, R*B] in boxes [BM, BN / STORE_PARTS]
    pre_desc,  # as y_desc, or None
    cols_ptr,
    bias_ptr,
    N,
    slots,
    num_live,
    out_features,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,  # divides B
    GROUP_M: tl.constexpr,
    STORE_PARTS: tl.constexpr,
    PROGRAMS: tl.constexpr,  # 0: one tile per program; else a persistent grid of that size
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ARITHMETIC: tl.constexpr,  # of the activation
    KEEP_PRE: tl.constexpr,  # store the pre-activation, too
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    # fmt: off
    if PROGRAMS:
        tiles = tl.cdiv(N, BM) * (out_features // BN)
        for pid in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
            tile_by_descriptors(
                pid, x_desc, w_desc, y_desc, pre_desc, cols_ptr, bias_ptr, N, slots, num_live,
                out_features, B, BM, BN, BK, GROUP_M, STORE_PARTS, HAS_BIAS, ACTIVATION, ARITHMETIC,
                KEEP_PRE, PRECISION, UPCAST,
            )
    else:  # not a loop of one turn: what it stores would have shared memory of its own
        tile_by_descriptors(
            tl.program_id(0), x_desc, w_desc, y_desc, pre_desc, cols_ptr, bias_ptr, N, slots,
            num_live, out_features, B, BM, BN, BK, GROUP_M, STORE_PARTS, HAS_BIAS, ACTIVATION,
            ARITHMETIC, KEEP_PRE, PRECISION, UPCAST,
        )
    # fmt: on
