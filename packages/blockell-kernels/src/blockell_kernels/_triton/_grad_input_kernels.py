# mypy: ignore-errors
"""Triton kernels of the input gradient dx = dy W.

Legend: R block rows, C block columns, B tile side, N tokens; a program owns BM tokens and BN
columns of x inside one block column, and walks the list of blocks in that column (the transposed
index). No atomics: deterministic. A column that no row holds gives zeros.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blockell_kernels._triton._forward_kernels import store_in_parts, tile_of


@triton.jit
def column_of_rank(col_start_ptr, rank, C, COLUMNS: tl.constexpr):
    """(column, its first entry in the index, its entries) by number of blocks, the fullest first.

    Long columns started last would leave the GPU idle behind them. COLUMNS is C rounded up to a
    power of two, or 0: columns as they come (where they are many, their order hardly matters).
    """
    if COLUMNS == 0:
        column = rank
        start = tl.load(col_start_ptr + rank)
        entries = tl.load(col_start_ptr + rank + 1) - start
    else:
        c = tl.arange(0, COLUMNS)
        starts = tl.load(col_start_ptr + c, c < C, other=0)
        counts = tl.load(col_start_ptr + c + 1, c < C, other=-1) - starts
        fuller = counts[None, :] > counts[:, None]
        earlier = (counts[None, :] == counts[:, None]) & (c[None, :] < c[:, None])
        found = tl.sum((fuller | earlier).to(tl.int32), axis=1) == rank
        # From what is at hand: loading the column's own entries would be a second wait for memory.
        column = tl.sum(tl.where(found, c, 0), axis=0)
        start = tl.sum(tl.where(found, starts, 0), axis=0)
        entries = tl.sum(tl.where(found, counts, 0), axis=0)
    return column, start, entries


@triton.jit(do_not_specialize=["N"])
def grad_input_pointers(
    dy_ptr,  # [N, R*B], any strides
    values_ptr,  # [R, slots, B, B]
    order_ptr,  # [R*slots] slot ids, by column then row
    col_start_ptr,  # [C+1]
    dx_ptr,  # [N, C*B]
    N,
    slots,
    in_features,
    stride_dn,
    stride_dk,
    B: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BN_LIVE: tl.constexpr,  # below BN only where a tile of 8 is padded
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,  # row_group*B is a multiple of BK
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    CONTIGUOUS: tl.constexpr = B if B < BK else BK
    pm, pn = tile_of(tl.program_id(0), tl.cdiv(N, BM), in_features // BN_LIVE, GROUP_M)
    tokens = pm * BM + tl.arange(0, BM)
    dy_rows = dy_ptr + tl.minimum(tokens, N - 1).to(tl.int64)[:, None] * stride_dn
    n = tl.arange(0, BN)
    offset = (pn * BN_LIVE) % B
    rank = (pn * BN_LIVE) // B
    c, start, entries = column_of_rank(col_start_ptr, rank, in_features // B, COLUMNS)
    w_cols = offset + n % BN_LIVE
    w_cols = values_ptr + tl.max_contiguous(tl.multiple_of(w_cols, BN_LIVE), BN_LIVE)[None, :]
    last = tl.maximum(entries - 1, 0)

    kk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    if BK <= B:
        slot = tl.load(order_ptr + start, mask=entries > 0, other=0)
        for q0 in range(0, entries * B, BK):
            i = q0 % B + kk
            dy_cols = (slot // slots) * B + i
            dy_cols = tl.max_contiguous(tl.multiple_of(dy_cols, CONTIGUOUS), CONTIGUOUS)
            w_rows = slot.to(tl.int64) * (B * B) + i * B
            slot = tl.load(order_ptr + start + tl.minimum((q0 + BK) // B, last))
            dy = tl.load(dy_rows + dy_cols[None, :] * stride_dk)
            w = tl.load(w_cols + w_rows[:, None])
            if UPCAST:
                dy, w = dy.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(dy, w, acc, input_precision=PRECISION)
    else:
        slot = tl.load(
            order_ptr + start + tl.minimum(kk // B, last), mask=kk // B < entries, other=0
        )
        for q0 in range(0, entries * B, BK):
            q = q0 + kk
            dy_cols = (slot // slots) * B + kk % B
            dy_cols = tl.max_contiguous(tl.multiple_of(dy_cols, CONTIGUOUS), CONTIGUOUS)
            w_rows = slot.to(tl.int64) * (B * B) + (kk % B) * B
            slot = tl.load(order_ptr + start + tl.minimum((q + BK) // B, last))
            if EVEN_K:
                dy = tl.load(dy_rows + dy_cols[None, :] * stride_dk)
                w = tl.load(w_cols + w_rows[:, None])
            else:
                present = q < entries * B
                dy = tl.load(dy_rows + dy_cols[None, :] * stride_dk, present[None, :], other=0.0)
                w = tl.load(w_cols + w_rows[:, None], present[:, None], other=0.0)
            if UPCAST:
                dy, w = dy.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(dy, w, acc, input_precision=PRECISION)
    inside = (tokens < N)[:, None] & (n < BN_LIVE)[None, :]
    dx_rows = dx_ptr + tokens.to(tl.int64)[:, None] * in_features
    tl.store(dx_rows + (c * B + offset + n)[None, :], acc.to(dx_ptr.dtype.element_ty), inside)


@triton.jit
def tile_by_descriptors(
    pid,
    dy_desc,
    w_desc,
    dx_desc,
    parts_ptr,
    order_ptr,
    col_start_ptr,
    N,
    slots,
    in_features,
    parts,
    B: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    STORE_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The tile of that number; see `grad_input_descriptors`."""
    pm, pn = tile_of(pid, tl.cdiv(N, BM), in_features // BN, GROUP_M)
    offset = (pn * BN) % B
    c, start, entries = column_of_rank(col_start_ptr, (pn * BN) // B, in_features // B, COLUMNS)
    last = tl.maximum(entries - 1, 0)
    begin = 0
    end = entries * B
    if PARTS:
        per_part = tl.cdiv(tl.cdiv(end, BK), parts) * BK
        begin = tl.program_id(1) * per_part
        end = tl.minimum(begin + per_part, end)
    acc = tl.zeros((BM, BN), tl.float32)
    slot = tl.load(order_ptr + start + tl.minimum(begin // B, last), entries > 0, other=0)
    for q0 in range(begin, end, BK):
        # BK rows of one group when BK >= B, a part of one block when BK < B.
        r, k = slot // slots, slot % slots
        slot = tl.load(order_ptr + start + tl.minimum((q0 + BK) // B, last))
        dy = dy_desc.load([pm * BM, r * B + q0 % B])
        w = w_desc.load([r, k, q0 % B, offset]).reshape(BK, BN)
        if UPCAST:
            dy, w = dy.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(dy, w, acc, input_precision=PRECISION)
    if PARTS:
        m = pm * BM + tl.arange(0, BM)
        rows = parts_ptr + (tl.program_id(1).to(tl.int64) * N + m)[:, None] * in_features
        columns = c * B + offset + tl.arange(0, BN)
        tl.store(rows + columns[None, :], acc, (m < N)[:, None])
    else:
        store_in_parts(dx_desc, pm * BM, c * B + offset, acc, BM, BN, STORE_PARTS)


@triton.jit(do_not_specialize=["N", "slots", "parts"])
def grad_input_descriptors(
    dy_desc,  # [N, R*B] in boxes [BM, BK]
    w_desc,  # [R, slots, B, B] in boxes [rows, 1, BK/rows, BN]
    dx_desc,  # [N, C*B] in boxes [BM, BN / STORE_PARTS]
    parts_ptr,  # float32 [parts, N, C*B]; unused unless PARTS
    order_ptr,
    col_start_ptr,
    N,
    slots,
    in_features,
    parts,
    B: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # divides B
    BK: tl.constexpr,  # divides row_group*B
    GROUP_M: tl.constexpr,
    STORE_PARTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PARTS: tl.constexpr,  # program_id(1) owns a part of the sum
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    # fmt: off
    if PROGRAMS:
        tiles = tl.cdiv(N, BM) * (in_features // BN)
        for pid in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
            tile_by_descriptors(
                pid, dy_desc, w_desc, dx_desc, parts_ptr, order_ptr, col_start_ptr, N, slots,
                in_features, parts, B, COLUMNS, BM, BN, BK, GROUP_M, STORE_PARTS, PARTS, PRECISION,
                UPCAST,
            )
    else:  # not a loop of one turn: what it stores would have shared memory of its own
        tile_by_descriptors(
            tl.program_id(0), dy_desc, w_desc, dx_desc, parts_ptr, order_ptr, col_start_ptr, N,
            slots, in_features, parts, B, COLUMNS, BM, BN, BK, GROUP_M, STORE_PARTS, PARTS,
            PRECISION, UPCAST,
        )
    # fmt: on
