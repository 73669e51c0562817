# mypy: ignore-errors
"""Forward product and input gradient of float32, as three float16 products, for Hopper.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.

x W^T = (xh + xl)(wh + wl)^T, without the product of the two low halves, which is below 2**-22 of
the whole: three float16 products, each at twice the rate of TF32. The weight comes as halves, see
`_triton._halves_kernels`; x is split in registers, where the `DEPTH` values of a token that one
step takes are scaled by a power of two of their own: no pass over x beforehand, and no copy of it.
Tensor cores truncate what they add to an accumulator (measured: an error of 2.5e-5 after sums of
7168 terms), so one step is all they add up: its sum is scaled back and added to the result in
ordinary float32, rounded to nearest.

A program owns 128 tokens x BN outputs: two warpgroups of 64 tokens, of which one can split x while
the other multiplies, and a warp that loads. The input gradient is the same product, of dy and W by
the transposed index. A dense weight goes as blocks of 64, all of them live.
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
from blockell_kernels._triton._activation_kernels import activated

GROUPS = gl.constexpr(2)


@gluon.jit
def scales(largest):
    """(scale, 1/scale), powers of two: as of `_triton._halves_kernels`."""
    exponent = gl.maximum((largest.to(gl.int32, bitcast=True) >> 23) & 255, 15)
    scale = ((268 - exponent) << 23).to(gl.float32, bitcast=True)
    inverse = ((exponent - 14) << 23).to(gl.float32, bitcast=True)
    return scale, inverse


@gluon.jit
def halves(x):
    """(high, low) of scaled x, in float16. Of infinity the high half is finite, the low one not."""
    high = gl.inline_asm_elementwise(
        "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.float16, is_pure=True, pack=2
    )
    return high, (x - high.to(gl.float32)).to(gl.float16)


@gluon.jit
def _extent(pn, col_start_ptr, blocks, B: gl.constexpr, BN: gl.constexpr, LISTED: gl.constexpr):
    """(first entry of the transposed index, depth of the sums) of the outputs of `pn`."""
    first = 0
    depth = blocks * B
    if LISTED:
        c = (pn * BN) // B
        first = gl.load(col_start_ptr + c)
        depth = (gl.load(col_start_ptr + c + 1) - first) * B
    return first, depth


@gluon.jit
def _lifts(
    lifts_ptr,
    list_ptr,
    pn,
    first,
    q,
    depth,
    slots,
    B: gl.constexpr,
    BN: gl.constexpr,
    FORWARD: gl.constexpr,
    DENSE: gl.constexpr,
):
    """What the columns of x at `q` of the sum are multiplied by, as `split_rows` says."""
    at = q
    if not DENSE:
        if FORWARD:
            c = gl.load(list_ptr + (pn * BN) // B * slots + q // B, mask=q < depth, other=0)
            at = c * B + q % B
        else:
            slot = gl.load(list_ptr + first + q // B, mask=q < depth, other=0)
            at = slot // slots * B + q % B
    return gl.load(lifts_ptr + 1 + at, mask=q < depth, other=1.0)


@gluon.jit
def _load(
    x_desc,
    wh_desc,
    wl_desc,
    list_ptr,
    col_start_ptr,
    x_smem,
    wh_smem,
    wl_smem,
    full,
    empty,
    N,
    slots,
    blocks,
    C,
    column_tiles,
    B: gl.constexpr,
    BN: gl.constexpr,
    PANEL: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    FORWARD: gl.constexpr,
    DENSE: gl.constexpr,
):
    """The loading warp."""
    PANELS: gl.constexpr = DEPTH // PANEL
    token_tiles = gl.cdiv(N, 64 * GROUPS)
    step = 0
    for pid in range(gl.program_id(0), token_tiles * column_tiles, gl.num_programs(0)):
        pm, pn = tile_of(pid, token_tiles, column_tiles, GROUP_M)
        first, depth = _extent(pn, col_start_ptr, blocks, B, BN, not FORWARD and not DENSE)
        cols = list_ptr
        if FORWARD and not DENSE:
            cols = list_ptr + (pn * BN) // B * slots
        for q0 in range(0, depth, DEPTH):
            # Where the step's part of the weight lies.
            row, column = pn * BN, q0
            if not FORWARD:
                slot = q0 // B * slots + (pn * BN) // B
                if not DENSE:
                    slot = gl.load(list_ptr + first + q0 // B)
                row, column = slot // slots * B + q0 % B, slot % slots * B + (pn * BN) % B
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, DEPTH * (64 * GROUPS * 4 + BN * 4))
            tma.async_copy_global_to_shared(wh_desc, [row, column], bar, wh_smem.index(stage))
            tma.async_copy_global_to_shared(wl_desc, [row, column], bar, wl_smem.index(stage))
            for s in gl.static_range(PANELS):
                x_column = row + s * PANEL
                if FORWARD:
                    q = q0 + s * PANEL
                    x_column = q
                    if not DENSE:
                        # Behind the last column: reads zeros.
                        c = gl.load(cols + q // B, mask=q < depth, other=C)
                        x_column = c * B + q % B
                for g in gl.static_range(GROUPS):
                    tma.async_copy_global_to_shared(
                        x_desc,
                        [(pm * GROUPS + g) * 64, x_column],
                        bar,
                        x_smem.index((stage * GROUPS + g) * PANELS + s),
                    )
            step += 1


@gluon.jit
def _multiply(
    group: gl.constexpr,
    y_ptr,
    pre_ptr,
    factors_ptr,
    lifts_ptr,
    bias_ptr,
    list_ptr,
    col_start_ptr,
    x_smem,
    wh_smem,
    wl_smem,
    full,
    empty,
    N,
    slots,
    blocks,
    columns,
    column_tiles,
    B: gl.constexpr,
    BN: gl.constexpr,
    PANEL: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    FORWARD: gl.constexpr,
    DENSE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    KEEP_PRE: gl.constexpr,
):
    """A multiplying warpgroup: 64 tokens."""
    PANELS: gl.constexpr = DEPTH // PANEL
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    x_layout: gl.constexpr = gl.NVMMASharedLayout(PANEL * 4, 32, 2)
    token_tiles = gl.cdiv(N, 64 * GROUPS)
    lifted = gl.load(lifts_ptr) != 0
    step = 0
    for pid in range(gl.program_id(0), token_tiles * column_tiles, gl.num_programs(0)):
        pm, pn = tile_of(pid, token_tiles, column_tiles, GROUP_M)
        first, depth = _extent(pn, col_start_ptr, blocks, B, BN, not FORWARD and not DENSE)
        acc = gl.zeros([64, BN], gl.float32, mma)
        for q0 in range(0, depth, DEPTH):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            x = x_smem.index((stage * GROUPS + group) * PANELS)
            x = x._reinterpret(gl.float32, [64, DEPTH], x_layout).load(operand)
            if lifted:
                q = q0 + gl.arange(0, DEPTH, gl.SliceLayout(0, operand))
                lifts = _lifts(
                    lifts_ptr, list_ptr, pn, first, q, depth, slots, B, BN, FORWARD, DENSE
                )
                x = x * lifts[None, :]
            scale, inverse = scales(gl.max(gl.abs(x), 1))
            high, low = halves(x * scale[:, None])
            wh, wl = wh_smem.index(stage), wl_smem.index(stage)
            if FORWARD:
                wh, wl = wh.permute((1, 0)), wl.permute((1, 0))
            part = accumulator(gl.zeros([64, BN], gl.float32, mma))
            part = warpgroup_mma(low, wh, part, use_acc=False, is_async=True)
            part = warpgroup_mma(high, wl, part, is_async=True)
            part = warpgroup_mma(high, wh, part, is_async=True)
            done = warpgroup_mma_wait(0, deps=(part, high, low))
            mbarrier.arrive(empty.index(stage), count=1)
            # 2**-14: the weight's halves are so much larger than its factor says.
            inverse = gl.convert_layout(inverse * 0.00006103515625, gl.SliceLayout(1, mma))
            acc += done[0] * inverse[:, None]
            step += 1
        n = pn * BN + gl.arange(0, BN, gl.SliceLayout(0, mma))
        first_token = (pm * GROUPS + group) * 64
        t = gl.arange(0, 64, gl.SliceLayout(1, mma))
        acc = acc * gl.load(factors_ptr + n, mask=n < columns, other=0.0)[None, :]
        if HAS_BIAS:
            acc += gl.load(bias_ptr + n, mask=n < columns, other=0.0)[None, :]
        before = first_token.to(gl.int64) * columns
        to = t[:, None] * columns + n[None, :]
        inside = (t < N - first_token)[:, None] & (n < columns)[None, :]
        if KEEP_PRE:
            gl.store(pre_ptr + before + to, acc, mask=inside)
        if ACTIVATION != "none":
            acc = activated(acc, ACTIVATION, "exact")
        gl.store(y_ptr + before + to, acc, mask=inside)


@gluon.jit(do_not_specialize=["N", "slots", "blocks", "C", "column_tiles"])
def product_of_halves(
    x_desc,  # float32 [N, C*B] in boxes [64, PANEL]; dy [N, R*B] for the input gradient
    wh_desc,  # float16 [R*B, K*B] in boxes [BN, DEPTH], or [DEPTH, BN] for the input gradient
    wl_desc,  # as wh_desc
    list_ptr,  # [R, slots] columns, or [R*slots] slot ids, by column then row
    col_start_ptr,  # [C+1], or unused
    y_ptr,  # float32 [N, columns]
    pre_ptr,  # as y, or None
    factors_ptr,  # float32 [columns]
    lifts_ptr,  # float32 [1 + columns of x]: whether they are multiplied, and by what
    bias_ptr,  # float32 [columns] or unused
    N,
    slots,  # of a row; of a dense weight its blocks across
    blocks,  # to a sum where all are as long: live ones of a row, or those of a dense weight
    C,
    columns,
    column_tiles,
    B: gl.constexpr,
    BN: gl.constexpr,
    PANEL: gl.constexpr,  # columns of x that lie side by side: divides B
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    FORWARD: gl.constexpr,
    DENSE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    KEEP_PRE: gl.constexpr,  # store the pre-activation, too
    OVERLAPS: gl.constexpr = False,
):
    """y = f(x W^T + bias), or dx = dy W; see `_halves`."""
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    rows: gl.constexpr = wh_desc.block_shape[0]
    width: gl.constexpr = wh_desc.block_shape[1]
    panels: gl.constexpr = STAGES * GROUPS * (DEPTH // PANEL)
    x_smem = gl.allocate_shared_memory(gl.float32, [panels, 64, PANEL], x_desc.layout)
    wh_smem = gl.allocate_shared_memory(gl.float16, [STAGES, rows, width], wh_desc.layout)
    wl_smem = gl.allocate_shared_memory(gl.float16, [STAGES, rows, width], wl_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    if OVERLAPS:
        let_the_next_one_start()
        wait_for_the_one_before()
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (0, y_ptr, pre_ptr, factors_ptr, lifts_ptr, bias_ptr, list_ptr,
                         col_start_ptr, x_smem, wh_smem, wl_smem, full, empty, N, slots, blocks,
                         columns, column_tiles, B, BN, PANEL, DEPTH, STAGES, GROUP_M, FORWARD,
                         DENSE, HAS_BIAS, ACTIVATION, KEEP_PRE)),
            (_multiply, (1, y_ptr, pre_ptr, factors_ptr, lifts_ptr, bias_ptr, list_ptr,
                         col_start_ptr, x_smem, wh_smem, wl_smem, full, empty, N, slots, blocks,
                         columns, column_tiles, B, BN, PANEL, DEPTH, STAGES, GROUP_M, FORWARD,
                         DENSE, HAS_BIAS, ACTIVATION, KEEP_PRE)),
            (_load, (x_desc, wh_desc, wl_desc, list_ptr, col_start_ptr, x_smem, wh_smem, wl_smem,
                     full, empty, N, slots, blocks, C, column_tiles, B, BN, PANEL, DEPTH, STAGES,
                     GROUP_M, FORWARD, DENSE)),
        ],
        [4, 1],
        [232, 40],
    )
    # fmt: on
