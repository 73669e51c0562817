# mypy: ignore-errors
# ruff: noqa: SIM113  (Gluon knows no enumerate)
"""The loading warps of the products of an MLP that an activation rides on.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.

The last tokens come first: the product that follows begins with the first ones, which are in the
cache then.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from blockell_kernels._gluon._grad_input_kernels import tile_of
from blockell_kernels._gluon._language import mbarrier, tma

# Tiles whose whereabouts the loading warp tells ahead.
PLANS = gl.constexpr(4)
# Words of such a note: the column, the tile's first step, the number of its steps.
COLUMN = gl.constexpr(0)
FIRST = gl.constexpr(1)
STEPS = gl.constexpr(2)


@gluon.jit
def tile_from_the_end(pid, token_tiles, columns, GROUP_M: gl.constexpr):
    """(token tile, column tile) of a program, the last tokens first."""
    pm, pn = tile_of(pid, token_tiles, columns, GROUP_M)
    return token_tiles - 1 - pm, pn


@gluon.jit
def load_rows(
    x_desc,
    w_desc,
    cols_ptr,
    x_smem,
    w_smem,
    full,
    empty,
    N,
    slots,
    num_live,
    C,
    units,
    B: gl.constexpr,
    PANEL: gl.constexpr,
    PANELS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """The forward product's: `PANELS` panels of x and of the weight to a stage, `PANEL` wide."""
    PER_BLOCK: gl.constexpr = B // PANEL
    token_tiles = gl.cdiv(N, 128)
    panels = num_live * PER_BLOCK
    step = 0
    for pid in range(gl.program_id(0), token_tiles * units, gl.num_programs(0)):
        pm, pn = tile_from_the_end(pid, token_tiles, units, GROUP_M)
        row_cols = cols_ptr + pn * (128 // B) * slots
        for first in range(0, panels, PANELS):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, PANELS * 256 * PANEL * 2)
            for s in gl.static_range(PANELS):
                k = (first + s) // PER_BLOCK
                offset = ((first + s) % PER_BLOCK) * PANEL
                # Behind the last column and the last slot: reads zeros.
                c = gl.load(row_cols + k, mask=k < num_live, other=C)
                k = gl.where(k < num_live, k, slots)
                for p in gl.static_range(2):
                    tma.async_copy_global_to_shared(
                        x_desc,
                        [pm * 128 + p * 64, c * B + offset],
                        bar,
                        x_smem.index((stage * 2 + p) * PANELS + s),
                    )
                tma.async_copy_global_to_shared(
                    w_desc,
                    [pn * (128 // B), k * w_desc.block_shape[1], offset],
                    bar,
                    w_smem.index(stage * PANELS + s)._reinterpret(
                        w_smem.dtype, w_desc.block_shape, w_desc.layout
                    ),
                )
            step += 1


@gluon.jit
def load_columns(
    dy_desc,
    w_desc,
    order_ptr,
    col_start_ptr,
    dy_smem,
    w_smem,
    plan_smem,
    full,
    empty,
    plan_full,
    plan_empty,
    N,
    slots,
    C,
    depth,
    DENSE: gl.constexpr,
    SORTED: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """The loading warp of the middle: 64 of dy's features and their rows of the weight a stage.

    The fullest columns come first: started last they would leave the GPU idle behind them.
    """
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    square: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [1, 1], [1, 0])
    lane = gl.arange(0, 32, lanes)
    token_tiles = gl.cdiv(N, 128)
    if SORTED:
        i = gl.arange(0, 32, gl.SliceLayout(1, square))
        count = gl.load(col_start_ptr + i + 1, mask=i < C, other=-1)
        count -= gl.load(col_start_ptr + i, mask=i < C, other=0)
        ranks = gl.zeros([32], gl.int32, gl.SliceLayout(1, square))
        for first in gl.static_range(0, 32, 8):  # in parts: registers
            j = first + gl.arange(0, 8, gl.SliceLayout(0, square))
            other = gl.load(col_start_ptr + j + 1, mask=j < C, other=-1)
            other -= gl.load(col_start_ptr + j, mask=j < C, other=0)
            fuller = other[None, :] > count[:, None]
            earlier = (other[None, :] == count[:, None]) & (j[None, :] < i[:, None])
            ranks += gl.sum((fuller | earlier).to(gl.int32), 1)
    step = 0
    tile = 0
    for pid in range(gl.program_id(0), token_tiles * C, gl.num_programs(0)):
        pm, c = tile_from_the_end(pid, token_tiles, C, GROUP_M)
        if SORTED:
            c = gl.sum(gl.where(ranks == c, i, 0), 0)
        if DENSE:
            start = 0
            steps = gl.cdiv(depth, 64)
        else:
            start = gl.load(col_start_ptr + c)
            # An empty column takes one step, behind the last row: of zeros.
            steps = gl.maximum((gl.load(col_start_ptr + c + 1) - start) * 2, 1)
            empty_column = gl.load(col_start_ptr + c + 1) == start
        plan = tile % PLANS
        mbarrier.wait(plan_empty.index(plan), ((tile // PLANS) & 1) ^ 1)
        note = gl.where(lane == STEPS, steps, gl.where(lane == FIRST, step, c))
        plan_smem.index(plan).store(note)
        mbarrier.arrive(plan_full.index(plan), count=1)
        tile += 1
        for q in range(steps):
            if DENSE:
                feature, w_row, w_col = q * 64, q * 64, c * 128
            else:
                slot = gl.load(order_ptr + start + q // 2, mask=empty_column == 0, other=0)
                half = (q % 2) * 64
                feature = gl.where(empty_column, depth, (slot // slots) * 128 + half)
                w_row = gl.where(empty_column, depth * slots, slot * 128 + half)
                w_col = 0
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, 2 * 128 * 64 * 2)
            for p in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    dy_desc, [pm * 128 + p * 64, feature], bar, dy_smem.index(stage * 2 + p)
                )
            tma.async_copy_global_to_shared(w_desc, [w_row, w_col], bar, w_smem.index(stage))
            step += 1
