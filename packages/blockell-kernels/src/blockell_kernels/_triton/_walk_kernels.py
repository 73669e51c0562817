# mypy: ignore-errors
"""Triton kernels that walk the whole weight as a dense product does, and look its blocks up.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.

Where most of a tile of the weight is present, multiplying the absent blocks too costs less than
finding the present ones, and writing a dense copy of the weight first costs more than either. So a
program notes in memory of its own which slot holds which block of its tile (-1: none), and then
loads the tile in lines of CH elements through these notes, zeros for what is absent. The weight's
gradient is the dense product of a tile, of which only the present blocks are stored.

No atomics and no order that depends on timing: deterministic.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blockell_kernels._triton._forward_kernels import tile_of


@triton.jit
def clear(map_ptr, entries, Z: tl.constexpr):
    """Note that no block is present."""
    z = tl.arange(0, Z)
    for first in range(0, entries, Z):
        tl.store(map_ptr + first + z, tl.full((Z,), -1, tl.int32), first + z < entries)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["N", "R", "slots", "num_live", "C", "steps_per_part"])
def walk_forward(
    x,  # [N, C*B]: a pointer, or a descriptor in boxes [BM, BK]
    values_ptr,
    cols_ptr,
    bias_ptr,
    out_ptr,  # [N, R*B], or float32 [parts, N, R*B]
    map_ptr,  # int32 [parts, programs, BN / B, C]
    N,
    R,
    slots,
    num_live,
    C,
    out_features,
    stride_xn,
    steps_per_part,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # a multiple of B
    BK: tl.constexpr,
    CH: tl.constexpr,  # divides B
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BOXES: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    """y = x W^T + bias, or the part of the sum that program_id(1) owns."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    ROWS: tl.constexpr = BN // B
    token_tiles, column_tiles = tl.cdiv(N, BM), tl.cdiv(out_features, BN)
    pm, pn = tile_of(tl.program_id(0), token_tiles, column_tiles, GROUP_M)
    part = tl.program_id(1)
    mine = part.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    place = map_ptr + mine * ROWS * C
    clear(place, ROWS * C, 1024)
    row = tl.arange(0, ROWS)[:, None]
    r = pn * ROWS + row
    for k0 in range(0, num_live, 64):
        k = k0 + tl.arange(0, 64)[None, :]
        live = (k < num_live) & (r < R)
        c = tl.load(cols_ptr + r * slots + k, live, other=0)
        tl.store(place + row * C + c, r * slots + k, live)
    tl.debug_barrier()
    m = pm * BM + tl.arange(0, BM)
    inside = (m < N)[:, None]
    n, k = tl.arange(0, BN), tl.arange(0, BK)
    line = tl.arange(0, BK // CH) * CH
    within = tl.arange(0, CH)[None, None, :]
    if not BOXES:
        x_rows = x + m.to(tl.int64)[:, None] * stride_xn
    place_rows = place + tl.minimum(n // B, R - 1 - pn * ROWS)[:, None] * C
    begin = part * steps_per_part * BK
    end = tl.minimum(begin + steps_per_part * BK, C * B)
    acc = tl.zeros((BM, BN), tl.float32)
    slot = tl.load(place_rows + (begin + line)[None, :] // B, (begin + line)[None, :] < end, -1)
    for q0 in range(begin, end, BK):
        q = (q0 + line)[None, :]
        offset = slot.to(tl.int64) * (B * B) + (n % B)[:, None] * B + q % B
        slot = tl.load(place_rows + (q + BK) // B, q + BK < end, -1)
        # The offsets of an absent block's lines are negative.
        lines = tl.reshape(offset[:, :, None] + within, (BN, BK))
        lines = tl.max_contiguous(tl.multiple_of(lines, (1, CH)), (1, CH))
        w = tl.load(values_ptr + lines, lines >= 0, other=0.0)
        if BOXES:
            a = x.load([pm * BM, q0])
        else:
            a = tl.load(x_rows + (q0 + k)[None, :], inside & (q0 + k < end)[None, :], other=0.0)
        if UPCAST:
            a, w = a.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(a, w.T, acc, input_precision=PRECISION)
    col = pn * BN + n
    if HAS_BIAS:
        acc += tl.load(bias_ptr + col, col < out_features, other=0.0).to(tl.float32)[None, :]
    base = out_ptr + part.to(tl.int64) * N * out_features
    target = base + m.to(tl.int64)[:, None] * out_features + col[None, :]
    tl.store(target, acc.to(out_ptr.dtype.element_ty), inside & (col < out_features)[None, :])


@triton.jit(do_not_specialize=["N", "R", "slots", "C", "steps_per_part"])
def walk_grad_input(
    dy,  # [N, R*B]: a pointer, or a descriptor in boxes [BM, BK]
    values_ptr,
    order_ptr,
    col_start_ptr,
    out_ptr,  # [N, C*B], or float32 [parts, N, C*B]
    map_ptr,  # int32 [parts, programs, R, BN / B]
    N,
    R,
    slots,
    C,
    in_features,
    stride_dn,
    steps_per_part,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # a multiple of B
    BK: tl.constexpr,
    CH: tl.constexpr,  # divides B
    GROUP_M: tl.constexpr,
    BOXES: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    """dx = dy W, or the part of the sum that program_id(1) owns."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    COLUMNS: tl.constexpr = BN // B
    token_tiles, column_tiles = tl.cdiv(N, BM), tl.cdiv(in_features, BN)
    pm, pn = tile_of(tl.program_id(0), token_tiles, column_tiles, GROUP_M)
    part = tl.program_id(1)
    mine = part.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    place = map_ptr + mine * COLUMNS * R
    # All columns at once: their entries are the second of two waits for memory.
    CHUNK: tl.constexpr = 2048 // COLUMNS
    column = tl.arange(0, COLUMNS)
    c = pn * COLUMNS + column
    start = tl.load(col_start_ptr + tl.minimum(c, C))
    stop = tl.load(col_start_ptr + tl.minimum(c + 1, C))
    clear(place, COLUMNS * R, 1024)
    for e0 in range(0, tl.max(stop - start, axis=0), CHUNK):
        e = start[:, None] + e0 + tl.arange(0, CHUNK)[None, :]
        found = tl.load(order_ptr + e, e < stop[:, None], other=0)
        tl.store(place + (found // slots) * COLUMNS + column[:, None], found, e < stop[:, None])
    tl.debug_barrier()
    m = pm * BM + tl.arange(0, BM)
    inside = (m < N)[:, None]
    k = tl.arange(0, BK)
    line = (tl.arange(0, BN // CH) * CH)[None, :]
    within = tl.arange(0, CH)[None, None, :]
    if not BOXES:
        dy_rows = dy + m.to(tl.int64)[:, None] * stride_dn
    begin = part * steps_per_part * BK
    end = tl.minimum(begin + steps_per_part * BK, R * B)
    acc = tl.zeros((BM, BN), tl.float32)
    q = (begin + k)[:, None]
    slot = tl.load(place + (q // B) * COLUMNS + line // B, q < end, -1)
    for q0 in range(begin, end, BK):
        q = (q0 + k)[:, None]
        offset = slot.to(tl.int64) * (B * B) + (q % B) * B + line % B
        slot = tl.load(place + ((q + BK) // B) * COLUMNS + line // B, q + BK < end, -1)
        # The offsets of an absent block's lines are negative.
        lines = tl.reshape(offset[:, :, None] + within, (BK, BN))
        lines = tl.max_contiguous(tl.multiple_of(lines, (1, CH)), (1, CH))
        w = tl.load(values_ptr + lines, lines >= 0, other=0.0)
        if BOXES:
            a = dy.load([pm * BM, q0])
        else:
            a = tl.load(dy_rows + (q0 + k)[None, :], inside & (q0 + k < end)[None, :], other=0.0)
        if UPCAST:
            a, w = a.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    col = pn * BN + tl.arange(0, BN)
    base = out_ptr + part.to(tl.int64) * N * in_features
    target = base + m.to(tl.int64)[:, None] * in_features + col[None, :]
    tl.store(target, acc.to(out_ptr.dtype.element_ty), inside & (col < in_features)[None, :])


@triton.jit(do_not_specialize=["N", "R", "slots", "num_live", "C", "row_tiles", "col_tiles"])
def walk_grad_values(
    dy_desc,  # [N, R*B] in boxes [BT, BM]
    x_desc,  # [N, C*B] in boxes [BT, BN]
    cols_ptr,
    out_ptr,  # [R, slots, B, B]
    map_ptr,  # int32 [programs, BM / B, BN / B]
    N,
    R,
    slots,
    num_live,
    C,
    row_tiles,
    col_tiles,
    B: tl.constexpr,
    BM: tl.constexpr,  # a multiple of B
    BN: tl.constexpr,  # a multiple of B
    BT: tl.constexpr,
    CH: tl.constexpr,  # divides B
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    """The present blocks of dy^T x, tile by tile."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    ROWS: tl.constexpr = BM // B
    COLUMNS: tl.constexpr = BN // B
    pid = tl.program_id(0)
    pr, pc = tile_of(pid, row_tiles, col_tiles, GROUP)
    place = map_ptr + pid.to(tl.int64) * (ROWS * COLUMNS)
    row = tl.arange(0, ROWS)[:, None]
    r = pr * ROWS + row
    tl.store(
        place + row * COLUMNS + tl.arange(0, COLUMNS)[None, :],
        tl.full((ROWS, COLUMNS), -1, tl.int32),
    )
    tl.debug_barrier()
    for k0 in range(0, num_live, 64):
        k = k0 + tl.arange(0, 64)[None, :]
        live = (k < num_live) & (r < R)
        c = tl.load(cols_ptr + r * slots + k, live, other=-1) - pc * COLUMNS
        tl.store(place + row * COLUMNS + c, r * slots + k, live & (c >= 0) & (c < COLUMNS))
    acc = tl.zeros((BM, BN), tl.float32)
    for t0 in range(0, N, BT):
        a = dy_desc.load([t0, pr * BM])
        b = x_desc.load([t0, pc * BN])
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    tl.debug_barrier()
    i = tl.arange(0, BM)[:, None]
    j = (tl.arange(0, BN // CH) * CH)[None, :]
    slot = tl.load(place + (i // B) * COLUMNS + j // B)
    offset = slot.to(tl.int64) * (B * B) + (i % B) * B + j % B
    lines = offset[:, :, None] + tl.arange(0, CH)[None, None, :]
    lines = tl.max_contiguous(tl.multiple_of(lines, (1, 1, CH)), (1, 1, CH))
    held = tl.reshape(acc.to(out_ptr.dtype.element_ty), (BM, BN // CH, CH))
    present = tl.broadcast_to((slot >= 0)[:, :, None], (BM, BN // CH, CH))
    tl.store(out_ptr + lines, held, present)
