# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon concatenates tuples, but does not unpack them)
"""The forward product y = x W^T of tiles of 16 and 32, for Hopper, from a packed copy of x.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens; a unit:
`OUTPUTS` outputs, of block rows that share their columns.

Lines of such blocks are 32 or 64 bytes long, and a multiprocessor asks for one of them in the time
in which it could get 128 bytes: x as it lies, 16 columns at a time, arrives at a quarter of the
rate, slower than it is multiplied (measured: 1350 clocks for 128 x 128 x 64, which take 512 to
multiply). So x comes packed, its panels one behind the other. Blocks of the weight lie that way
from the start: a warpgroup copies them into shared memory by `cp.async`, swizzled on the way.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from blockell_kernels._gluon._forward_kernels import multiply
from blockell_kernels._gluon._grad_input_kernels import tile_of
from blockell_kernels._gluon._language import (
    async_copy,
    fence_async_shared,
    let_the_next_one_start,
    mbarrier,
    tma,
    wait_for_the_one_before,
)


@gluon.jit
def _load(
    x_desc,
    values_ptr,
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
    PANELS: gl.constexpr,
    PIECES: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    OUTPUTS: gl.constexpr,
):
    """The loading warpgroup: `PANELS` panels of x and blocks of every row of the unit a stage."""
    LINES: gl.constexpr = 64 * B // 256  # of a panel of x
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // B, B // 8], [4, 1], [1, 0])
    token_tiles = gl.cdiv(N, 64 * PIECES)
    n = gl.arange(0, OUTPUTS, gl.SliceLayout(1, layout))[:, None]
    j = gl.arange(0, B, gl.SliceLayout(0, layout))[None, :]
    w_at = (n // B * slots * B + n % B) * B + j
    w_at = gl.max_contiguous(gl.multiple_of(w_at, (1, 8)), (1, 8))
    step = 0
    for pid in range(gl.program_id(0), token_tiles * units, gl.num_programs(0)):
        pm, pn = tile_of(pid, token_tiles, units, GROUP_M)
        row = pn * (OUTPUTS // B)
        row_cols = cols_ptr + row * slots
        w_unit = values_ptr + row.to(gl.int64) * slots * (B * B)
        cols = ()
        for s in gl.static_range(PANELS):
            cols = cols + (gl.load(row_cols + gl.minimum(s, num_live - 1)),)
        for first in range(0, num_live, PANELS):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, PANELS * PIECES * 64 * B * 2)
            for s in gl.static_range(PANELS):
                # Behind the last block: zeros.
                live = (w_at >= 0) & (first + s < num_live)
                w = w_unit + (first + s) * (B * B) + w_at
                async_copy.async_copy_global_to_shared(w_smem.index(stage * PANELS + s), w, live)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            following = ()
            for s in gl.static_range(PANELS):
                k = gl.minimum(first + PANELS + s, num_live - 1)
                following = following + (gl.load(row_cols + k),)
            for s in gl.static_range(PANELS):
                for piece in gl.static_range(PIECES):
                    panel = (pm * PIECES + piece) * C + cols[s]
                    x = x_smem.index((stage * PIECES + piece) * PANELS + s)
                    tma.async_copy_global_to_shared(
                        x_desc,
                        [panel * LINES, 0],
                        bar,
                        x._reinterpret(x_smem.dtype, [LINES, 256], x_desc.layout),
                    )
            cols = following
            step += 1


@gluon.jit(do_not_specialize=["N", "slots", "num_live", "C", "units"])
def forward_by_panels(
    x_desc,  # x packed, [N/64 * C * 64*B/256, 256] in boxes [64*B/256, 256]; see `_panels`
    values_ptr,  # [R, slots, B, B]
    y_desc,  # [N, R*B] in boxes [64, OUTPUTS]
    cols_ptr,  # [R, slots]
    bias_ptr,  # [R*B] or unused
    N,
    slots,
    num_live,
    C,
    units,
    B: gl.constexpr,
    PIECES0: gl.constexpr,
    PIECES1: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    OVERLAPS: gl.constexpr = False,
):
    """Partitions as of `forward_by_pieces`, but that a warpgroup loads."""
    PIECES: gl.constexpr = PIECES0 + PIECES1
    PANELS: gl.constexpr = 64 // B
    dtype: gl.constexpr = x_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(2 * B, 16, 2)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    x_smem = gl.allocate_shared_memory(dtype, [STAGES * PIECES * PANELS, 64, B], layout)
    w_smem = gl.allocate_shared_memory(dtype, [STAGES * PANELS, OUTPUTS, B], layout)
    out0 = gl.allocate_shared_memory(dtype, [64, OUTPUTS], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for i in gl.static_range(STAGES):
        # Every loading thread, once its copies have arrived; and the copy engine.
        mbarrier.init(full.index(i), count=128 + 1)
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
                (multiply, (0, PIECES0, y_desc, bias_ptr, x_smem, w_smem, out0, full, empty, N,
                            num_live, units, B, B, PANELS, PIECES, STAGES, GROUP_M, HAS_BIAS,
                            OUTPUTS, True)),
                (multiply, (PIECES0, PIECES1, y_desc, bias_ptr, x_smem, w_smem, out1, full, empty,
                            N, num_live, units, B, B, PANELS, PIECES, STAGES, GROUP_M, HAS_BIAS,
                            OUTPUTS, True)),
                (_load, (x_desc, values_ptr, cols_ptr, x_smem, w_smem, full, empty, N, slots,
                         num_live, C, units, B, PANELS, PIECES, STAGES, GROUP_M, OUTPUTS)),
            ],
            [4, 4],
            [168, 96],
        )
    else:
        gl.warp_specialize(
            [
                (multiply, (0, PIECES0, y_desc, bias_ptr, x_smem, w_smem, out0, full, empty, N,
                            num_live, units, B, B, PANELS, PIECES, STAGES, GROUP_M, HAS_BIAS,
                            OUTPUTS, True)),
                (_load, (x_desc, values_ptr, cols_ptr, x_smem, w_smem, full, empty, N, slots,
                         num_live, C, units, B, PANELS, PIECES, STAGES, GROUP_M, OUTPUTS)),
            ],
            [4],
            [96],
        )
    # fmt: on
