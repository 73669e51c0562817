# mypy: ignore-errors
# ruff: noqa: RUF005, SIM113  (Gluon concatenates tuples, does not unpack them, has no `enumerate`)
"""The weight gradient of few tokens and many blocks, for Hopper: results leave while others come.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens; a unit: block
rows that share their columns, 64 or 128 outputs; a tile: a unit and `PANELS` panels of its columns.

Sums over few tokens are short: storing a tile takes as long as its products. As in
`_whole_values_kernels`, one warp loads, two warpgroups multiply, and leave their sums in shared
memory, from where four more warps have the copy engine store them block by block, while
the next tile is multiplied. Blocks behind the last one are stored behind the gradient, that is
nowhere.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from blockell_kernels._gluon._grad_values_kernels import tile_of
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
def _load(
    dy_desc,
    x_desc,
    cols_ptr,
    dy_smem,
    x_smem,
    full,
    empty,
    N,
    slots,
    num_live,
    C,
    units,
    chunks,
    together,
    tiles,
    B: gl.constexpr,
    OUTPUTS: gl.constexpr,
    PANEL: gl.constexpr,
    PANELS: gl.constexpr,
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
):
    """The loading warp: 64 tokens of a tile's outputs and columns to a stage."""
    PER_BLOCK: gl.constexpr = B // PANEL
    HALVES: gl.constexpr = OUTPUTS // 64
    # A packed x: panels of 64 tokens one after the other, in rows of 512 bytes.
    LINES: gl.constexpr = PANEL // 4 if PACKED else PANEL
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        unit, chunk = tile_of(tile, units, chunks, together)
        row_cols = cols_ptr + unit * OUTPUTS // B * slots
        cols = ()
        for s in gl.static_range(PANELS):
            panel = chunk * PANELS + s
            k = panel // PER_BLOCK
            # Behind the last column: reads zeros, or what is not stored.
            c = gl.load(row_cols + k, mask=k < num_live, other=C)
            cols = cols + ((c * PER_BLOCK + panel % PER_BLOCK) * LINES,)
        for t in range(gl.cdiv(N, 64)):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, 64 * (OUTPUTS + PANELS * PANEL) * 2)
            for half in gl.static_range(HALVES):
                tma.async_copy_global_to_shared(
                    dy_desc,
                    [t * 64, unit * OUTPUTS + half * 64],
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
                    tma.async_copy_global_to_shared(x_desc, [t * 64, cols[s]], bar, x)
            step += 1


@gluon.jit
def _multiply(
    group: gl.constexpr,
    dy_smem,
    x_smem,
    out_smem,
    full,
    empty,
    out_full,
    out_empty,
    N,
    tiles,
    OUTPUTS: gl.constexpr,
    PANEL: gl.constexpr,
    PANELS: gl.constexpr,
    WIDTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A multiplying warpgroup: half of 128 outputs, or all of 64 outputs and half the columns."""
    HALVES: gl.constexpr = OUTPUTS // 64
    ACCS: gl.constexpr = PANELS * PANEL * HALVES // 2 // WIDTH
    FIRST: gl.constexpr = group * (PANELS // 2) if HALVES == 1 else 0
    half: gl.constexpr = group if HALVES == 2 else 0
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    x_layout: gl.constexpr = gl.NVMMASharedLayout(PANEL * 2, 16, 2)
    step = 0
    done_tiles = 0
    for _tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        accs = ()
        for _j in gl.static_range(ACCS):
            accs = accs + (accumulator(gl.zeros([64, WIDTH], gl.float32, mma)),)
        for _t in range(gl.cdiv(N, 64)):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            dy = dy_smem.index(stage * HALVES + half).permute((1, 0))
            pending = ()
            for j in gl.static_range(ACCS):
                x = x_smem.index(stage * PANELS + FIRST + j * (WIDTH // PANEL))
                x = x._reinterpret(x_smem.dtype, [64, WIDTH], x_layout)
                pending = pending + (warpgroup_mma(dy, x, accs[j], is_async=True),)
            done = warpgroup_mma_wait(ACCS, deps=pending)
            accs = ()
            for j in gl.static_range(ACCS):
                accs = accs + (accumulator(done if ACCS == 1 else done[j]),)
            # The stage before this one has been read.
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
            step += 1
        done = warpgroup_mma_wait(0, deps=accs)
        mbarrier.wait(out_empty.index(group), (done_tiles & 1) ^ 1)
        for j in gl.static_range(ACCS):
            acc = done if ACCS == 1 else done[j]
            out_smem.index(group * ACCS + j).store(acc.to(out_smem.dtype))
        fence_async_shared()
        mbarrier.arrive(out_full.index(group), count=1)
        done_tiles += 1


@gluon.jit
def _store(
    group: gl.constexpr,
    first: gl.constexpr,
    out_desc,
    out_smem,
    out_full,
    out_empty,
    slots,
    num_live,
    units,
    chunks,
    together,
    tiles,
    absent,
    B: gl.constexpr,
    OUTPUTS: gl.constexpr,
    ACCS: gl.constexpr,
    WIDTH: gl.constexpr,
):
    """A storing warp: of one warpgroup every second product, from the `first`."""
    HALVES: gl.constexpr = OUTPUTS // 64
    half: gl.constexpr = group if HALVES == 2 else 0
    FIRST: gl.constexpr = group * ACCS * WIDTH if HALVES == 1 else 0
    ROWS: gl.constexpr = 64 // B if B < 128 else 1
    COLUMNS: gl.constexpr = WIDTH // B if B < 128 else 1
    tile_number = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        unit, chunk = tile_of(tile, units, chunks, together)
        mbarrier.wait(out_full.index(group), tile_number & 1)
        for j in gl.static_range(first, ACCS, 2):
            sums = out_smem.index(group * ACCS + j)
            column = chunk * (ACCS * WIDTH * 2 // HALVES) + FIRST + j * WIDTH
            if B == 128:
                k = column // B
                row = (unit * slots + k) * B + half * 64
                row = gl.where(k < num_live, row, absent)
                tma.async_copy_shared_to_global(out_desc, [row, column % B], sums)
            else:
                # Panels as wide as a block lie one behind the other.
                blocks = sums._reinterpret(out_smem.dtype, [ROWS * COLUMNS, B, B], out_desc.layout)
                for e in gl.static_range(ROWS * COLUMNS):
                    k = column // B + e // ROWS
                    r = unit * (OUTPUTS // B) + half * ROWS + e % ROWS
                    row = gl.where(k < num_live, (r * slots + k) * B, absent)
                    tma.async_copy_shared_to_global(out_desc, [row, 0], blocks.index(e))
        tma.store_wait(0)
        mbarrier.arrive(out_empty.index(group), count=1)
        tile_number += 1


@gluon.jit(
    do_not_specialize=[
        "N", "slots", "num_live", "C", "units", "chunks", "together", "tiles", "absent"
    ]
)  # fmt: skip
def grad_values_streamed(
    dy_desc,  # [N, R*B] in boxes [64, 64]
    x_desc,  # [N, C*B] in boxes [64, PANEL], or packed in boxes [PANEL/4, 256]
    out_desc,  # [R*slots*B, B] in boxes [B, B]; of tile 128 [64, WIDTH]
    cols_ptr,  # [R, slots]
    N,
    slots,
    num_live,
    C,
    units,
    chunks,  # tiles to a unit
    together,  # units, see `tile_of`
    tiles,
    absent,  # R*slots*B
    B: gl.constexpr,
    OUTPUTS: gl.constexpr,
    PANEL: gl.constexpr,
    PANELS: gl.constexpr,
    WIDTH: gl.constexpr,  # of a product: 64 or 128
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
    OVERLAPS: gl.constexpr = False,
):
    dtype: gl.constexpr = dy_desc.dtype
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    HALVES: gl.constexpr = OUTPUTS // 64
    ACCS: gl.constexpr = PANELS * PANEL * HALVES // 2 // WIDTH
    x_layout: gl.constexpr = gl.NVMMASharedLayout(PANEL * 2, 16, 2)
    dy_smem = gl.allocate_shared_memory(dtype, [STAGES * HALVES, 64, 64], dy_desc.layout)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES * PANELS, 64, PANEL], x_layout)
    out_smem = gl.allocate_shared_memory(dtype, [2 * ACCS, 64, WIDTH], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    out_full = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    out_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(out_full.index(i), count=1)
        mbarrier.init(out_empty.index(i), count=2)
    fence_async_shared()
    if OVERLAPS:
        let_the_next_one_start()
        wait_for_the_one_before()
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (0, dy_smem, x_smem, out_smem, full, empty, out_full, out_empty, N, tiles,
                         OUTPUTS, PANEL, PANELS, WIDTH, STAGES)),
            (_multiply, (1, dy_smem, x_smem, out_smem, full, empty, out_full, out_empty, N, tiles,
                         OUTPUTS, PANEL, PANELS, WIDTH, STAGES)),
            (_load, (dy_desc, x_desc, cols_ptr, dy_smem, x_smem, full, empty, N, slots, num_live,
                     C, units, chunks, together, tiles, B, OUTPUTS, PANEL, PANELS, STAGES,
                     PACKED)),
            (_store, (0, 0, out_desc, out_smem, out_full, out_empty, slots, num_live, units,
                      chunks, together, tiles, absent, B, OUTPUTS, ACCS, WIDTH)),
            (_store, (0, 1, out_desc, out_smem, out_full, out_empty, slots, num_live, units,
                      chunks, together, tiles, absent, B, OUTPUTS, ACCS, WIDTH)),
            (_store, (1, 0, out_desc, out_smem, out_full, out_empty, slots, num_live, units,
                      chunks, together, tiles, absent, B, OUTPUTS, ACCS, WIDTH)),
            (_store, (1, 1, out_desc, out_smem, out_full, out_empty, slots, num_live, units,
                      chunks, together, tiles, absent, B, OUTPUTS, ACCS, WIDTH)),
        ],
        [4, 1, 1, 1, 1, 1],
        [168, 56, 72, 72, 72, 72],
    )
    # fmt: on
