# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon concatenates tuples, but does not unpack them)
"""The forward product y = x W^T, for Hopper, with token tiles that are no power of two.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens; a unit: block
rows that share their columns, 128 outputs.

With few tiles it decides how they divide among the multiprocessors: 8192 tokens x 640 outputs are
320 tiles of 128 x 128, three rounds on 132 multiprocessors, but 130 tiles of 320 x 128, one round.
A program owns 64 tokens times (`PIECES0` + `PIECES1`): the first warpgroup multiplies `PIECES0`
pieces of 64 tokens, the second `PIECES1`; they share the tensor cores, so they need not be equal.
One warp loads.
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
):
    """The loading warp: `PANELS` panels of x and of the weight to a stage, `PANEL` wide."""
    PER_BLOCK: gl.constexpr = B // PANEL
    token_tiles = gl.cdiv(N, 64 * PIECES)
    panels = num_live * PER_BLOCK
    step = 0
    for pid in range(gl.program_id(0), token_tiles * units, gl.num_programs(0)):
        pm, pn = tile_of(pid, token_tiles, units, GROUP_M)
        row_cols = cols_ptr + pn * (128 // B) * slots
        for first in range(0, panels, PANELS):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, PANELS * (64 * PIECES + 128) * PANEL * 2)
            for s in gl.static_range(PANELS):
                k = (first + s) // PER_BLOCK
                offset = ((first + s) % PER_BLOCK) * PANEL
                # Behind the last column and the last slot: reads zeros.
                c = gl.load(row_cols + k, mask=k < num_live, other=C)
                k = gl.where(k < num_live, k, slots)
                for piece in gl.static_range(PIECES):
                    tma.async_copy_global_to_shared(
                        x_desc,
                        [(pm * PIECES + piece) * 64, c * B + offset],
                        bar,
                        x_smem.index((stage * PIECES + piece) * PANELS + s),
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
):
    """A multiplying warpgroup: `pieces` of 64 tokens, from the `first` on."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    token_tiles = gl.cdiv(N, 64 * PIECES)
    steps = gl.cdiv(num_live * (B // PANEL), PANELS)
    step = 0
    for pid in range(gl.program_id(0), token_tiles * units, gl.num_programs(0)):
        pm, pn = tile_of(pid, token_tiles, units, GROUP_M)
        accs = ()
        for _p in gl.static_range(pieces):
            accs = accs + (accumulator(gl.zeros([64, 128], gl.float32, mma)),)
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
            done = warpgroup_mma_wait(pieces * PANELS, deps=accs)
            accs = ()
            for p in gl.static_range(pieces):
                accs = accs + (accumulator(done[p]),)
            # The stage before this one has been read.
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
            step += 1
        done = warpgroup_mma_wait(0, deps=accs)
        n = pn * 128 + gl.arange(0, 128, gl.SliceLayout(0, mma))
        for p in gl.static_range(pieces):
            y = done[p]
            if HAS_BIAS:
                y += gl.load(bias_ptr + n).to(gl.float32)[None, :]
            tma.store_wait(0)
            out_smem.store(y.to(y_desc.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(
                y_desc, [(pm * PIECES + first + p) * 64, pn * 128], out_smem
            )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["N", "slots", "num_live", "C", "units"])
def forward_by_pieces(
    x_desc,  # [N, C*B] in boxes [64, PANEL]
    w_desc,  # [R, slots*B, B] in boxes [128/B, B, PANEL], or swizzled, in rows of 256 elements
    y_desc,  # [N, R*B] in boxes [64, 128]
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
    OVERLAPS: gl.constexpr = False,
):
    PIECES: gl.constexpr = PIECES0 + PIECES1
    dtype: gl.constexpr = x_desc.dtype
    w_layout: gl.constexpr = gl.NVMMASharedLayout(PANEL * 2, 16, 2)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    x_smem = gl.allocate_shared_memory(dtype, [STAGES * PIECES * PANELS, 64, PANEL], x_desc.layout)
    w_smem = gl.allocate_shared_memory(dtype, [STAGES * PANELS, 128, PANEL], w_layout)
    out0 = gl.allocate_shared_memory(dtype, [64, 128], y_desc.layout)
    out1 = gl.allocate_shared_memory(dtype, [64, 128], y_desc.layout)
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
            (_multiply, (0, PIECES0, y_desc, bias_ptr, x_smem, w_smem, out0, full, empty, N,
                         num_live, units, B, PANEL, PANELS, PIECES, STAGES, GROUP_M, HAS_BIAS)),
            (_multiply, (PIECES0, PIECES1, y_desc, bias_ptr, x_smem, w_smem, out1, full, empty, N,
                         num_live, units, B, PANEL, PANELS, PIECES, STAGES, GROUP_M, HAS_BIAS)),
            (_load, (x_desc, w_desc, cols_ptr, x_smem, w_smem, full, empty, N, slots, num_live, C,
                     units, B, PANEL, PANELS, PIECES, STAGES, GROUP_M)),
        ],
        [4, 1],
        [208 if PIECES1 == 3 else 168, 56],
    )
    # fmt: on
