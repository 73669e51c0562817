# mypy: ignore-errors
# ruff: noqa: RUF005, SIM113  (Gluon concatenates tuples, does not unpack them, has no `enumerate`)
"""The weight gradient of the whole weight, for Hopper, of which the present blocks are stored.

Legend: R block rows, C block columns, B tile side, N tokens.

A dense product dy^T x in tiles of 128 x 256; there is no dense gradient in memory. One warp loads,
two warpgroups multiply, 64 rows each, and leave their sums in shared memory, from where four more
warps have the copy engine store them block by block, while the next tile is multiplied. Where a
block belongs was noted before (`_triton._places`); an absent one is stored behind the last block,
that is nowhere.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from blockell_kernels._gluon._grad_input_kernels import tile_of
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
    dy_smem,
    x_smem,
    full,
    empty,
    N,
    row_tiles,
    col_tiles,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """The loading warp: 64 tokens of a tile's features to a stage."""
    step = 0
    for pid in range(gl.program_id(0), row_tiles * col_tiles, gl.num_programs(0)):
        pr, pc = tile_of(pid, row_tiles, col_tiles, GROUP)
        for t in range(gl.cdiv(N, 64)):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, 64 * (128 + 256) * 2)
            for half in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    dy_desc,
                    [t * 64, pr * 128 + half * 64],
                    bar,
                    dy_smem.index(stage * 2 + half),
                )
                tma.async_copy_global_to_shared(
                    x_desc,
                    [t * 64, pc * 256 + half * 128],
                    bar,
                    x_smem.index(stage * 2 + half),
                )
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
    row_tiles,
    col_tiles,
    STAGES: gl.constexpr,
):
    """A multiplying warpgroup: 64 of a tile's rows."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    step = 0
    tile = 0
    for _pid in range(gl.program_id(0), row_tiles * col_tiles, gl.num_programs(0)):
        accs = ()
        for _half in gl.static_range(2):
            accs = accs + (accumulator(gl.zeros([64, 128], gl.float32, mma)),)
        for _t in range(gl.cdiv(N, 64)):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            dy = dy_smem.index(stage * 2 + group).permute((1, 0))
            pending = ()
            for half in gl.static_range(2):
                x = x_smem.index(stage * 2 + half)
                pending = pending + (warpgroup_mma(dy, x, accs[half], is_async=True),)
            done = warpgroup_mma_wait(2, deps=pending)
            accs = ()
            for half in gl.static_range(2):
                accs = accs + (accumulator(done[half]),)
            # The stage before this one has been read.
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
            step += 1
        done = warpgroup_mma_wait(0, deps=accs)
        mbarrier.wait(out_empty.index(group), (tile & 1) ^ 1)
        for half in gl.static_range(2):
            out_smem.index(group * 2 + half).store(done[half].to(out_smem.dtype))
        fence_async_shared()
        mbarrier.arrive(out_full.index(group), count=1)
        tile += 1


@gluon.jit
def _store(
    group: gl.constexpr,
    half: gl.constexpr,
    out_desc,
    place_ptr,
    out_smem,
    out_full,
    out_empty,
    row_tiles,
    col_tiles,
    steps,
    absent,
    B: gl.constexpr,
    GROUP: gl.constexpr,
):
    """A storing warp: the blocks of one warpgroup's rows in half of a tile's columns."""
    ROWS: gl.constexpr = 64 // B if B < 128 else 1
    COLUMNS: gl.constexpr = 128 // B
    tile = 0
    for pid in range(gl.program_id(0), row_tiles * col_tiles, gl.num_programs(0)):
        pr, pc = tile_of(pid, row_tiles, col_tiles, GROUP)
        sums = out_smem.index(group * 2 + half)
        if B == 128:
            step = pc * 2 + half
            row = gl.load(place_ptr + pr * steps + step, mask=step < steps, other=absent)
            mbarrier.wait(out_full.index(group), tile & 1)
            tma.async_copy_shared_to_global(out_desc, [row + group * 64, 0], sums)
        else:
            rows = ()
            for e in gl.static_range(ROWS * COLUMNS):
                step = pc * 4 + half * 2 + (e // ROWS) // ROWS
                entry = (group * ROWS + e % ROWS) * ROWS + (e // ROWS) % ROWS
                at = place_ptr + (pr * steps + step) * (COLUMNS * ROWS) + entry
                rows = rows + (gl.load(at, mask=step < steps, other=absent),)
            mbarrier.wait(out_full.index(group), tile & 1)
            # Panels as wide as a block lie one behind the other.
            blocks = sums._reinterpret(out_smem.dtype, [ROWS * COLUMNS, B, B], out_desc.layout)
            for e in gl.static_range(ROWS * COLUMNS):
                tma.async_copy_shared_to_global(out_desc, [rows[e], 0], blocks.index(e))
        tma.store_wait(0)
        mbarrier.arrive(out_empty.index(group), count=1)
        tile += 1


@gluon.jit(do_not_specialize=["N", "row_tiles", "col_tiles", "steps", "absent"])
def whole_values(
    dy_desc,  # [N, R*B] in boxes [64, 64]
    x_desc,  # [N, C*B] in boxes [64, 128]
    out_desc,  # [R*slots*B, B] in boxes [B, B]; of tile 128 [64, 128]
    place_ptr,  # int32 [row_tiles, steps, 128/B, 64/B or 1]: blocks' first rows in out_desc
    N,
    row_tiles,
    col_tiles,
    steps,  # C*B / 64 rounded up; of tile 128 C
    absent,
    B: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    OVERLAPS: gl.constexpr = False,
):
    dtype: gl.constexpr = x_desc.dtype
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    dy_smem = gl.allocate_shared_memory(dtype, [STAGES * 2, 64, 64], dy_desc.layout)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES * 2, 64, 128], x_desc.layout)
    out_smem = gl.allocate_shared_memory(dtype, [4, 64, 128], out_desc.layout)
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
            (_multiply, (0, dy_smem, x_smem, out_smem, full, empty, out_full, out_empty, N,
                         row_tiles, col_tiles, STAGES)),
            (_multiply, (1, dy_smem, x_smem, out_smem, full, empty, out_full, out_empty, N,
                         row_tiles, col_tiles, STAGES)),
            (_load, (dy_desc, x_desc, dy_smem, x_smem, full, empty, N, row_tiles, col_tiles,
                     STAGES, GROUP)),
            (_store, (0, 0, out_desc, place_ptr, out_smem, out_full, out_empty, row_tiles,
                      col_tiles, steps, absent, B, GROUP)),
            (_store, (0, 1, out_desc, place_ptr, out_smem, out_full, out_empty, row_tiles,
                      col_tiles, steps, absent, B, GROUP)),
            (_store, (1, 0, out_desc, place_ptr, out_smem, out_full, out_empty, row_tiles,
                      col_tiles, steps, absent, B, GROUP)),
            (_store, (1, 1, out_desc, place_ptr, out_smem, out_full, out_empty, row_tiles,
                      col_tiles, steps, absent, B, GROUP)),
        ],
        [4, 1, 1, 1, 1, 1],
        [168, 56, 72, 72, 72, 72],
    )
    # fmt: on
