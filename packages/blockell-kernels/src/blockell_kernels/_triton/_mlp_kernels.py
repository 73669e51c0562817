# mypy: ignore-errors
"""Triton kernel of an MLP's middle: the input gradient of fc2, through the activation.

Legend: R block rows, C block columns, B tile side of fc2, N tokens; h pre-activation [N, C*B],
a = f(h), dh = (dy W) f'(h). A program owns BM tokens and BN columns of h inside one block column,
and walks the list of blocks in that column (the transposed index). No atomics: deterministic.

The gradient of a is never stored. Where the tile of h is at hand anyway, a is computed again and
dh is summed over the program's tokens, for the bias of fc1.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from blockell_kernels._triton._activation_kernels import activated_and_slope
from blockell_kernels._triton._forward_kernels import tile_of
from blockell_kernels._triton._grad_input_kernels import column_of_rank


@triton.jit
def finish_part(
    dh_desc,
    pre_desc,
    a_desc,
    sums_row,
    row,
    col,
    da,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):
    """From a tile of da: dh, a (unless a_desc is None), sums of dh (unless sums_row is None)."""
    h = pre_desc.load([row, col]).to(tl.float32)
    a, slope = activated_and_slope(h, ACTIVATION, ARITHMETIC)
    if a_desc is not None:
        a_desc.store([row, col], a.to(a_desc.dtype))
    dh = (da * slope).to(dh_desc.dtype)
    dh_desc.store([row, col], dh)
    if sums_row is not None:
        # Past token N dy and h read as zeros, and so does dh.
        tl.store(sums_row + col + tl.arange(0, WIDTH), tl.sum(dh.to(tl.float32), axis=0))


@triton.jit(do_not_specialize=["N"])
def grad_input_activated(
    dy_desc,  # [N, R*B] in boxes [BM, BK]
    w_desc,  # [R, slots, B, B] in boxes [rows, 1, BK/rows, BN]
    dh_desc,  # [N, C*B] in boxes [BM, BN / STORE_PARTS]
    pre_desc,  # as dh_desc
    a_desc,  # as dh_desc, or None
    sums_ptr,  # float32 [token tiles, C*B], or None
    order_ptr,
    col_start_ptr,
    N,
    slots,
    in_features,
    B: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # divides B
    BK: tl.constexpr,  # divides row_group*B
    GROUP_M: tl.constexpr,
    STORE_PARTS: tl.constexpr,
    PROGRAMS: tl.constexpr,  # 0: one tile per program; else a persistent grid of that size
    ACTIVATION: tl.constexpr,
    ARITHMETIC: tl.constexpr,  # of the activation
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    if OVERLAPS:
        gdc_wait()
    token_tiles, column_tiles = tl.cdiv(N, BM), in_features // BN
    first = tl.program_id(0)
    tiles = first + 1
    if PROGRAMS:
        tiles = token_tiles * column_tiles
    for pid in tl.range(first, tiles, PROGRAMS if PROGRAMS else 1, flatten=PROGRAMS > 0):
        pm, pn = tile_of(pid, token_tiles, column_tiles, GROUP_M)
        offset = (pn * BN) % B
        rank = (pn * BN) // B
        c, start, entries = column_of_rank(col_start_ptr, rank, in_features // B, COLUMNS)
        length = entries * B
        last = tl.maximum(entries - 1, 0)
        acc = tl.zeros((BM, BN), tl.float32)
        slot = tl.load(order_ptr + start, mask=length > 0, other=0)
        for q0 in range(0, length, BK):
            # BK rows of one group when BK >= B, a part of one block when BK < B.
            r, k = slot // slots, slot % slots
            slot = tl.load(order_ptr + start + tl.minimum((q0 + BK) // B, last))
            dy = dy_desc.load([pm * BM, r * B + q0 % B])
            w = w_desc.load([r, k, q0 % B, offset]).reshape(BK, BN)
            if UPCAST:
                dy, w = dy.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(dy, w, acc, input_precision=PRECISION)
        row, col = pm * BM, c * B + offset
        sums_row = None
        if sums_ptr is not None:
            sums_row = sums_ptr + pm.to(tl.int64) * in_features
        if STORE_PARTS == 1:
            finish_part(
                dh_desc, pre_desc, a_desc, sums_row, row, col, acc, BN, ACTIVATION, ARITHMETIC
            )
        else:
            HALF: tl.constexpr = BN // 2
            left, right = acc.reshape(BM, 2, HALF).permute(0, 2, 1).split()
            finish_part(
                dh_desc, pre_desc, a_desc, sums_row, row, col, left, HALF, ACTIVATION, ARITHMETIC
            )
            col += HALF
            finish_part(
                dh_desc, pre_desc, a_desc, sums_row, row, col, right, HALF, ACTIVATION, ARITHMETIC
            )
