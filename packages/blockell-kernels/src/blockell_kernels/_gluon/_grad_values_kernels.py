# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon concatenates tuples, but does not unpack them)
"""The weight gradient, the present blocks of dy^T x, for Hopper.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens; a unit: block
rows that share their columns, 64 or 128 outputs; a tile: a unit and `BLOCKS` of its blocks.

Programs take whole tiles, all tokens of each, as long as these fill a round: one tile for every
multiprocessor. The tiles of the last round are split into parts of the tokens instead, as many as
fill it; parts are written in float32, and `add_parts` adds them in their order: deterministic, no
atomics. At any time all programs are at about the same tokens, so that they share dy and x in L2.
Two warpgroups multiply, one warp loads.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blockell_kernels._gluon._language import (
    accumulator,
    fence_async_shared,
    let_the_next_one_start,
    mbarrier,
    tma,
    wait_for_the_one_before,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def tile_of(tile, units, chunks, together):
    """(unit, chunk) of a tile: so many units pass over their columns together, for reuse in L2."""
    first = tile // (together * chunks) * together
    height = gl.minimum(units - first, together)
    rest = tile - first * chunks
    return first + rest % height, rest // height


@gluon.jit
def _part(item, steps, whole, rest, per_part):
    """(tile, first step, end) of an item: whole tiles first, then the parts of the others."""
    split = item >= whole
    behind = gl.maximum(item - whole, 0)
    tile = gl.where(split, whole + behind % rest, item)
    t0 = gl.where(split, (behind // rest) * per_part, 0)
    t1 = gl.where(split, gl.minimum(t0 + per_part, steps), steps)
    return tile, t0, t1


@gluon.jit
def _load(
    dy_desc,
    x_desc,
    cols_ptr,
    dy_smem,
    x_smem,
    full,
    empty,
    slots,
    num_live,
    C,
    units,
    chunks,
    together,
    steps,
    items,
    whole,
    rest,
    per_part,
    B: gl.constexpr,
    OUTPUTS: gl.constexpr,
    PANEL: gl.constexpr,
    PANELS: gl.constexpr,
    BT: gl.constexpr,
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
):
    """The loading warp: `OUTPUTS` columns of dy, and `PANELS` panels of x, `PANEL` wide."""
    PER_BLOCK: gl.constexpr = B // PANEL
    HALVES: gl.constexpr = OUTPUTS // 64
    # A packed x: panels of 64 tokens one after the other, in rows of 512 bytes.
    LINES: gl.constexpr = BT * PANEL // 256 if PACKED else PANEL
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, t0, t1 = _part(item, steps, whole, rest, per_part)
        unit, chunk = tile_of(tile, units, chunks, together)
        row_cols = cols_ptr + unit * OUTPUTS // B * slots
        cols = ()
        for s in gl.static_range(PANELS):
            panel = chunk * PANELS + s
            k = panel // PER_BLOCK
            # Behind the last column: reads zeros, or what is not stored.
            c = gl.load(row_cols + k, mask=k < num_live, other=C)
            cols = cols + ((c * PER_BLOCK + panel % PER_BLOCK) * LINES,)
        for t in range(t0, t1):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, BT * (OUTPUTS + PANELS * PANEL) * 2)
            for half in gl.static_range(HALVES):
                tma.async_copy_global_to_shared(
                    dy_desc,
                    [t * BT, unit * OUTPUTS + half * 64],
                    bar,
                    dy_smem.index(stage * HALVES + half),
                )
            for s in gl.static_range(PANELS):
                x = x_smem.index(stage * PANELS + s)
                if PACKED:
                    flat = x._reinterpret(x_smem.dtype, [LINES, 256], x_desc.layout)
                    at = t * C * (PER_BLOCK * LINES) + cols[s]
                    tma.async_copy_global_to_shared(x_desc, [at, 0], bar, flat)
                else:
                    tma.async_copy_global_to_shared(x_desc, [t * BT, cols[s]], bar, x)
            step += 1


@gluon.jit
def _multiply(
    group: gl.constexpr,
    out_ptr,
    work_ptr,
    dy_smem,
    x_smem,
    full,
    empty,
    slots,
    num_live,
    units,
    chunks,
    together,
    steps,
    items,
    whole,
    rest,
    per_part,
    B: gl.constexpr,
    OUTPUTS: gl.constexpr,
    PANEL: gl.constexpr,
    PANELS: gl.constexpr,
    BT: gl.constexpr,
    WIDTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A multiplying warpgroup: half of 128 outputs, or all of 64 outputs and half the columns."""
    HALVES: gl.constexpr = OUTPUTS // 64
    COLUMNS: gl.constexpr = PANELS * PANEL * HALVES // 2
    ACCS: gl.constexpr = COLUMNS // WIDTH
    FIRST: gl.constexpr = group * (PANELS // 2) if HALVES == 1 else 0
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    x_layout: gl.constexpr = gl.NVMMASharedLayout(PANEL * 2, 16, 2)
    half: gl.constexpr = group if HALVES == 2 else 0
    m = half * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma))
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, t0, t1 = _part(item, steps, whole, rest, per_part)
        unit, chunk = tile_of(tile, units, chunks, together)
        accs = ()
        for _j in gl.static_range(ACCS):
            accs = accs + (accumulator(gl.zeros([64, WIDTH], gl.float32, mma)),)
        for _t in range(t0, t1):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            dy = dy_smem.index(stage * HALVES + half).permute((1, 0)).load(operand)
            pending = ()
            for j in gl.static_range(ACCS):
                x = x_smem.index(stage * PANELS + FIRST + j * (WIDTH // PANEL))
                x = x._reinterpret(x_smem.dtype, [BT, WIDTH], x_layout)
                pending = pending + (warpgroup_mma(dy, x, accs[j], is_async=True),)
            done = warpgroup_mma_wait(0, deps=pending)
            accs = ()
            for j in gl.static_range(ACCS):
                accs = accs + (accumulator(done if ACCS == 1 else done[j]),)
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
        part = work_ptr + gl.maximum(item - whole, 0).to(gl.int64) * (OUTPUTS * PANELS * PANEL)
        row = unit * OUTPUTS + m
        row = (row // B).to(gl.int64) * slots * (B * B) + row % B * B
        for j in gl.static_range(ACCS):
            acc = warpgroup_mma_wait(0, deps=(accs[j],))
            n = FIRST * PANEL + j * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, mma))
            if item < whole:
                q = chunk * (PANELS * PANEL) + n
                k = q // B
                present = (m >= 0)[:, None] & (k < num_live)[None, :]
                to = row[:, None] + (k * (B * B) + q % B)[None, :]
                gl.store(out_ptr + to, acc.to(out_ptr.dtype.element_ty), mask=present)
            else:
                gl.store(part + m[:, None] * (PANELS * PANEL) + n[None, :], acc)


@gluon.jit(
    do_not_specialize=[
        "slots", "num_live", "C", "units", "chunks", "together", "steps", "items", "whole", "rest",
        "per_part",
    ]
)  # fmt: skip
def grad_values_by_items(
    dy_desc,  # [N, R*B] in boxes [BT, 64]
    x_desc,  # [N, C*B] in boxes [BT, PANEL], or packed in boxes [BT*PANEL/256, 256]
    cols_ptr,  # [R, slots]
    out_ptr,  # [R, slots, B, B]
    work_ptr,  # float32 [parts, rest, OUTPUTS, PANELS*PANEL]
    slots,
    num_live,
    C,
    units,
    chunks,  # tiles to a unit
    together,  # units, see `tile_of`
    steps,  # to a tile
    items,
    whole,  # tiles that are not split
    rest,  # tiles that are
    per_part,  # steps of a part
    B: gl.constexpr,
    OUTPUTS: gl.constexpr,
    PANEL: gl.constexpr,
    PANELS: gl.constexpr,
    BT: gl.constexpr,
    WIDTH: gl.constexpr,
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
    OVERLAPS: gl.constexpr = False,
):
    dtype: gl.constexpr = x_desc.dtype
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    dy_smem = gl.allocate_shared_memory(dtype, [STAGES * OUTPUTS // 64, BT, 64], dy_desc.layout)
    x_layout: gl.constexpr = gl.NVMMASharedLayout(PANEL * 2, 16, 2)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES * PANELS, BT, PANEL], x_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    if OVERLAPS:
        let_the_next_one_start()
        wait_for_the_one_before()
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (0, out_ptr, work_ptr, dy_smem, x_smem, full, empty, slots, num_live,
                         units, chunks, together, steps, items, whole, rest, per_part,
                         B, OUTPUTS, PANEL, PANELS, BT, WIDTH, STAGES)),
            (_multiply, (1, out_ptr, work_ptr, dy_smem, x_smem, full, empty, slots, num_live,
                         units, chunks, together, steps, items, whole, rest, per_part,
                         B, OUTPUTS, PANEL, PANELS, BT, WIDTH, STAGES)),
            (_load, (dy_desc, x_desc, cols_ptr, dy_smem, x_smem, full, empty, slots, num_live, C,
                     units, chunks, together, steps, items, whole, rest, per_part,
                     B, OUTPUTS, PANEL, PANELS, BT, STAGES, PACKED)),
        ],
        [4, 1],
        [208, 88],
    )
    # fmt: on


@triton.jit(
    do_not_specialize=["slots", "num_live", "units", "chunks", "together", "whole", "rest", "parts"]
)
def add_parts(
    work_ptr,  # float32 [parts, rest, OUTPUTS, WIDTH]
    out_ptr,  # [R, slots, B, B]
    slots,
    num_live,
    units,
    chunks,
    together,
    whole,
    rest,
    parts,
    B: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of a tile
    COLUMNS: tl.constexpr,  # WIDTH rounded up to a power of two
    LINES: tl.constexpr,  # outputs of a program
    OVERLAPS: tl.constexpr = False,
):
    """Add the parts of the tiles that were split, in their order."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    m = tl.program_id(1) * LINES + tl.arange(0, LINES)
    n = tl.arange(0, COLUMNS)
    inside = (m >= 0)[:, None] & (n < WIDTH)[None, :]
    at = work_ptr + tl.program_id(0).to(tl.int64) * (OUTPUTS * WIDTH)
    at = at + m[:, None] * WIDTH + n[None, :]
    acc = tl.zeros((LINES, COLUMNS), tl.float32)
    for _p in range(parts):
        acc += tl.load(at, inside, other=0.0)
        at += rest.to(tl.int64) * (OUTPUTS * WIDTH)
    tile = whole + tl.program_id(0)
    first = tile // (together * chunks) * together  # as `tile_of`
    height = tl.minimum(units - first, together)
    unit = first + (tile - first * chunks) % height
    n += (tile - first * chunks) // height * WIDTH  # of the unit's columns
    k = n // B
    row = unit * OUTPUTS + m
    to = (row // B).to(tl.int64) * slots * (B * B) + row % B * B
    to = to[:, None] + (k * (B * B) + n % B)[None, :]
    tl.store(out_ptr + to, acc.to(out_ptr.dtype.element_ty), inside & (k < num_live)[None, :])
