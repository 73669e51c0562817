# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon concatenates tuples, but does not unpack them)
"""The forward product y = x W^T, for Hopper, with token tiles that are no power of two.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens; a unit:
`OUTPUTS` outputs, of block rows that share their columns.

With few tiles it decides how they divide among the multiprocessors: 8192 tokens x 640 outputs are
320 tiles of 128 x 128, three rounds on 132 multiprocessors, but 130 tiles of 320 x 128, one round.
A program owns 64 tokens times (`PIECES0` + `PIECES1`): the first warpgroup multiplies `PIECES0`
pieces of 64 tokens, the second, if there is one, `PIECES1`; they share the tensor cores, so they
need not be equal. One warp loads.
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
    PIECES: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    OUTPUTS: gl.constexpr,
    PACKED: gl.constexpr,
    SWIZZLED: gl.constexpr,
):
    """The loading warp: `PANELS` panels of x and of the weight to a stage, `PANEL` wide.

    Columns are loaded a step ahead, and the weight, whose place is known, before x.
    """
    PER_BLOCK: gl.constexpr = B // PANEL
    # Of a block in the weight's descriptor, and of a panel of a packed x.
    LINES: gl.constexpr = B * B // 256 if SWIZZLED else B
    ROWS: gl.constexpr = 64 * PANEL // 256
    token_tiles = gl.cdiv(N, 64 * PIECES)
    panels = num_live * PER_BLOCK
    step = 0
    for pid in range(gl.program_id(0), token_tiles * units, gl.num_programs(0)):
        pm, pn = tile_of(pid, token_tiles, units, GROUP_M)
        row = pn * OUTPUTS // B
        row_cols = cols_ptr + row * slots
        cols = ()
        for s in gl.static_range(PANELS):
            cols = cols + (gl.load(row_cols + gl.minimum(s // PER_BLOCK, num_live - 1)),)
        for first in range(0, panels, PANELS):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, PANELS * (64 * PIECES + OUTPUTS) * PANEL * 2)
            for s in gl.static_range(PANELS):
                k = (first + s) // PER_BLOCK
                k = gl.where(k < num_live, k, slots)  # behind the last slot: reads zeros
                offset = ((first + s) % PER_BLOCK) * PANEL
                tma.async_copy_global_to_shared(
                    w_desc,
                    [row, k * LINES + pn * OUTPUTS % B, offset],
                    bar,
                    w_smem.index(stage * PANELS + s)._reinterpret(
                        w_smem.dtype, w_desc.block_shape, w_desc.layout
                    ),
                )
            following = ()
            for s in gl.static_range(PANELS):
                k = gl.minimum((first + PANELS + s) // PER_BLOCK, num_live - 1)
                following = following + (gl.load(row_cols + k),)
            for s in gl.static_range(PANELS):
                column = cols[s] * B + ((first + s) % PER_BLOCK) * PANEL
                for piece in gl.static_range(PIECES):
                    token = pm * PIECES + piece
                    x = x_smem.index((stage * PIECES + piece) * PANELS + s)
                    if PACKED:
                        panel = token * C + cols[s]
                        flat = x._reinterpret(x_smem.dtype, [ROWS, 256], x_desc.layout)
                        tma.async_copy_global_to_shared(x_desc, [panel * ROWS, 0], bar, flat)
                    else:
                        tma.async_copy_global_to_shared(x_desc, [token * 64, column], bar, x)
            cols = following
            step += 1


@gluon.jit
def _wait(pending: gl.constexpr, accs, pieces: gl.constexpr):
    """The accumulators, as a tuple, once no more than `pending` products are under way."""
    done = warpgroup_mma_wait(pending, deps=accs)
    return (done,) if pieces == 1 else done


@gluon.jit
def _multiply(
    first: gl.constexpr,
    pieces: gl.constexpr,
    y_desc,
    bias_ptr,
    x_smem,
    w_smem,
    out_smem,
    full,
    empty,
    N,
    num_live,
    units,
    B: gl.constexpr,
    PANEL: gl.constexpr,
    PANELS: gl.constexpr,
    PIECES: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    OUTPUTS: gl.constexpr,
):
    """A multiplying warpgroup: `pieces` of 64 tokens, from the `first` on."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OUTPUTS, 16])
    token_tiles = gl.cdiv(N, 64 * PIECES)
    steps = gl.cdiv(num_live * B, PANEL * PANELS)
    step = 0
    for pid in range(gl.program_id(0), token_tiles * units, gl.num_programs(0)):
        pm, pn = tile_of(pid, token_tiles, units, GROUP_M)
        accs = ()
        for _p in gl.static_range(pieces):
            accs = accs + (accumulator(gl.zeros([64, OUTPUTS], gl.float32, mma)),)
        for _q in range(steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            for s in gl.static_range(PANELS):
                w = w_smem.index(stage * PANELS + s).permute((1, 0))
                pending = ()
                for p in gl.static_range(pieces):
                    x = x_smem.index((stage * PIECES + first + p) * PANELS + s)
                    pending = pending + (warpgroup_mma(x, w, accs[p], is_async=True),)
                accs = pending
            done = _wait(pieces * PANELS, accs, pieces)
            accs = ()
            for p in gl.static_range(pieces):
                accs = accs + (accumulator(done[p]),)
            # The stage before this one has been read.
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
            step += 1
        done = _wait(0, accs, pieces)
        n = pn * OUTPUTS + gl.arange(0, OUTPUTS, gl.SliceLayout(0, mma))
        for p in gl.static_range(pieces):
            y = done[p]
            if HAS_BIAS:
                y += gl.load(bias_ptr + n).to(gl.float32)[None, :]
            tma.store_wait(0)
            out_smem.store(y.to(y_desc.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(
                y_desc, [(pm * PIECES + first + p) * 64, pn * OUTPUTS], out_smem
            )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["N", "slots", "num_live", "C", "units"])
def forward_by_pieces(
    x_desc,  # [N, C*B] in boxes [64, PANEL], or packed in boxes [PANEL/4, 256], see `_panels`
    w_desc,  # [R, slots*B, B] in boxes [OUTPUTS/B, B, PANEL], or swizzled, in rows of 256 elements
    y_desc,  # [N, R*B] in boxes [64, OUTPUTS]
    cols_ptr,  # [R, slots]
    bias_ptr,  # [R*B] or unused
    N,
    slots,
    num_live,
    C,
    units,
    B: gl.constexpr,
    PANEL: gl.constexpr,
    PANELS: gl.constexpr,
    PIECES0: gl.constexpr,
    PIECES1: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    PACKED: gl.constexpr,
    SWIZZLED: gl.constexpr,
    OVERLAPS: gl.constexpr = False,
):
    PIECES: gl.constexpr = PIECES0 + PIECES1
    dtype: gl.constexpr = x_desc.dtype
    w_layout: gl.constexpr = gl.NVMMASharedLayout(PANEL * 2, 16, 2)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    x_layout: gl.constexpr = gl.NVMMASharedLayout(PANEL * 2, 16, 2)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES * PIECES * PANELS, 64, PANEL], x_layout)
    w_smem = gl.allocate_shared_memory(dtype, [STAGES * PANELS, OUTPUTS, PANEL], w_layout)
    out0 = gl.allocate_shared_memory(dtype, [64, OUTPUTS], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2 if PIECES1 else 1)
    fence_async_shared()
    if OVERLAPS:
        let_the_next_one_start()
        wait_for_the_one_before()
    # fmt: off
    if PIECES1:
        out1 = gl.allocate_shared_memory(dtype, [64, OUTPUTS], y_desc.layout)
        gl.warp_specialize(
            [
                (_multiply, (0, PIECES0, y_desc, bias_ptr, x_smem, w_smem, out0, full, empty, N,
                             num_live, units, B, PANEL, PANELS, PIECES, STAGES, GROUP_M, HAS_BIAS,
                             OUTPUTS)),
                (_multiply, (PIECES0, PIECES1, y_desc, bias_ptr, x_smem, w_smem, out1, full, empty,
                             N, num_live, units, B, PANEL, PANELS, PIECES, STAGES, GROUP_M,
                             HAS_BIAS, OUTPUTS)),
                (load_rows, (x_desc, w_desc, cols_ptr, x_smem, w_smem, full, empty, N, slots,
                             num_live, C, units, B, PANEL, PANELS, PIECES, STAGES, GROUP_M,
                             OUTPUTS, PACKED, SWIZZLED)),
            ],
            [4, 1],
            [208 if PIECES1 == 3 else 168, 56],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (0, PIECES0, y_desc, bias_ptr, x_smem, w_smem, out0, full, empty, N,
                             num_live, units, B, PANEL, PANELS, PIECES, STAGES, GROUP_M, HAS_BIAS,
                             OUTPUTS)),
                (load_rows, (x_desc, w_desc, cols_ptr, x_smem, w_smem, full, empty, N, slots,
                             num_live, C, units, B, PANEL, PANELS, PIECES, STAGES, GROUP_M,
                             OUTPUTS, PACKED, SWIZZLED)),
            ],
            [1],
            [56],
        )
    # fmt: on
