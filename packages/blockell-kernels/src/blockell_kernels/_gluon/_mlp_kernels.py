# mypy: ignore-errors
# ruff: noqa: RUF005, SIM113  (Gluon does not unpack tuples, and knows no enumerate)
"""The two products of an MLP that an activation rides on, for Hopper.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens; h
pre-activation, a = f(h), dh the gradient of h.

A tile is 128 tokens x 128 hidden features. Two warpgroups take turns: while one applies the
activation to its tile and stores it, the other multiplies the next one. One warp loads, tile after
tile into one ring. The activation is applied in a loop over chunks of the tile in shared memory:
written out for all 128 elements that a thread holds of an accumulator, its instructions, of which
no warp ran any twice per tile, made fc1 take 14 to 25% longer (H200, 8192 tokens, 640 -> 2560).

A warpgroup waits for its turn, until the other one has seen its last stage arrive. Without that it
could take a stage of the other's for its own: a barrier tells only odd from even uses of a stage,
and stages may arrive out of order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from blockell_kernels._gluon._forward_kernels import load_rows
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
from blockell_kernels._triton._activation_kernels import activated, activated_and_slope

# Tiles whose whereabouts the loading warp tells ahead.
PLANS = gl.constexpr(4)
# Words of such a note: the column, the tile's first step, the number of its steps.
COLUMN = gl.constexpr(0)
FIRST = gl.constexpr(1)
STEPS = gl.constexpr(2)


@gluon.jit
def _forward_turn(
    which: gl.constexpr,
    y_desc,
    pre_desc,
    bias_ptr,
    x_smem,
    w_smem,
    out_smem,
    full,
    empty,
    turn,
    N,
    num_live,
    units,
    B: gl.constexpr,
    PANEL: gl.constexpr,
    PANELS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    ROWS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    KEEP_PRE: gl.constexpr,
    ACTIVATION: gl.constexpr,
    ARITHMETIC: gl.constexpr,
):
    """A multiplying warpgroup of the forward product: every other tile."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    chunks = out_smem._reinterpret(out_smem.dtype, [256 // ROWS, ROWS, 64], y_desc.layout)
    token_tiles = gl.cdiv(N, 128)
    steps = gl.cdiv(num_live * (B // PANEL), PANELS)
    programs = gl.num_programs(0)
    step = which * steps
    tile = which
    for pid in range(gl.program_id(0) + which * programs, token_tiles * units, 2 * programs):
        pm, pn = tile_of(pid, token_tiles, units, GROUP_M)
        if HAS_BIAS:
            n = pn * 128 + gl.arange(0, 128, gl.SliceLayout(0, mma))
            bias = gl.load(bias_ptr + n).to(gl.float32)[None, :]
        accs = ()
        for _p in gl.static_range(2):
            accs = accs + (accumulator(gl.zeros([64, 128], gl.float32, mma)),)
        mbarrier.wait(turn.index(which), ((tile // 2) & 1) ^ (1 - which))
        tile += 2
        for q in range(steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            for s in gl.static_range(PANELS):
                w = w_smem.index(stage * PANELS + s).permute((1, 0))
                pending = ()
                for p in gl.static_range(2):
                    x = x_smem.index((stage * 2 + p) * PANELS + s)
                    pending = pending + (warpgroup_mma(x, w, accs[p], is_async=True),)
                accs = pending
            done = warpgroup_mma_wait(2 * PANELS, deps=accs)
            accs = ()
            for p in gl.static_range(2):
                accs = accs + (accumulator(done[p]),)
            # The stage before this one has been read.
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=q > 0)
            step += 1
        mbarrier.arrive(turn.index(1 - which), count=1)
        done = warpgroup_mma_wait(0, deps=accs)
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        step += steps  # the other warpgroup's
        tma.store_wait(0)
        for p in gl.static_range(2):
            y = done[p]
            if HAS_BIAS:
                y += bias
            out_smem.index(p).store(y.to(y_desc.dtype))
            if KEEP_PRE:
                fence_async_shared()
                tma.async_copy_shared_to_global(
                    pre_desc, [pm * 128 + p * 64, pn * 128], out_smem.index(p)
                )
        for p in range(2):
            if KEEP_PRE:
                tma.store_wait(1)  # h has left the piece, into which f(h) comes now
            for i in range(128 // ROWS):
                chunk = chunks.index(p * (128 // ROWS) + i)
                h = chunk.load(lines).to(gl.float32)
                chunk.store(activated(h, ACTIVATION, ARITHMETIC).to(y_desc.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(
                y_desc, [pm * 128 + p * 64, pn * 128], out_smem.index(p)
            )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["N", "slots", "num_live", "C", "units"])
def forward_by_turns(
    x_desc,  # [N, C*B] in boxes [64, PANEL]
    w_desc,  # [R, slots*B, B] in boxes [128/B, B, PANEL], or swizzled, in rows of 256 elements
    y_desc,  # [N, R*B] in boxes [64, 128]
    pre_desc,  # as y_desc, or unused
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
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    ROWS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    KEEP_PRE: gl.constexpr,
    ACTIVATION: gl.constexpr,
    ARITHMETIC: gl.constexpr,
    OVERLAPS: gl.constexpr = False,
):
    """a = f(x W^T + bias), and the sum itself if asked."""
    dtype: gl.constexpr = x_desc.dtype
    w_layout: gl.constexpr = gl.NVMMASharedLayout(PANEL * 2, 16, 2)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    x_smem = gl.allocate_shared_memory(dtype, [STAGES * 2 * PANELS, 64, PANEL], x_desc.layout)
    w_smem = gl.allocate_shared_memory(dtype, [STAGES * PANELS, 128, PANEL], w_layout)
    out0 = gl.allocate_shared_memory(dtype, [2, 64, 128], y_desc.layout)
    out1 = gl.allocate_shared_memory(dtype, [2, 64, 128], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    if OVERLAPS:
        let_the_next_one_start()
        wait_for_the_one_before()
    # fmt: off
    gl.warp_specialize(
        [
            (_forward_turn, (0, y_desc, pre_desc, bias_ptr, x_smem, w_smem, out0, full, empty, turn,
                             N, num_live, units, B, PANEL, PANELS, STAGES, GROUP_M, ROWS, HAS_BIAS,
                             KEEP_PRE, ACTIVATION, ARITHMETIC)),
            (_forward_turn, (1, y_desc, pre_desc, bias_ptr, x_smem, w_smem, out1, full, empty, turn,
                             N, num_live, units, B, PANEL, PANELS, STAGES, GROUP_M, ROWS, HAS_BIAS,
                             KEEP_PRE, ACTIVATION, ARITHMETIC)),
            (load_rows, (x_desc, w_desc, cols_ptr, x_smem, w_smem, full, empty, N, slots, num_live,
                         C, units, B, PANEL, PANELS, 2, STAGES, GROUP_M, 128, False, B < 64)),
        ],
        [4, 1],
        [216, 72],
    )
    # fmt: on


@gluon.jit
def _load_columns(
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
        pm, c = tile_of(pid, token_tiles, C, GROUP_M)
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


@gluon.jit
def _middle_turn(
    which: gl.constexpr,
    dh_desc,
    pre_desc,
    a_desc,
    sums_ptr,
    dy_smem,
    w_smem,
    h_smem,
    d_smem,
    plan_smem,
    full,
    empty,
    plan_full,
    plan_empty,
    arrived,
    turn,
    N,
    C,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    ROWS: gl.constexpr,
    KEEP_A: gl.constexpr,
    NEED_SUMS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    ARITHMETIC: gl.constexpr,
):
    """A multiplying warpgroup of the middle: every other tile."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    PER: gl.constexpr = 64 // ROWS
    shape: gl.constexpr = [256 // ROWS, ROWS, 64]
    d_chunks = d_smem._reinterpret(d_smem.dtype, shape, dh_desc.layout)
    h_chunks = h_smem._reinterpret(h_smem.dtype, shape, dh_desc.layout)
    token_tiles = gl.cdiv(N, 128)
    programs = gl.num_programs(0)
    tile = which
    bar = arrived.index(which)
    for pid in range(gl.program_id(0) + which * programs, token_tiles * C, 2 * programs):
        pm, _rank = tile_of(pid, token_tiles, C, GROUP_M)
        plan = tile % PLANS
        mbarrier.wait(plan_full.index(plan), (tile // PLANS) & 1)
        note = plan_smem.index(plan)
        c = gl.max(note.slice(COLUMN, 1).load(lanes), 0)
        step = gl.max(note.slice(FIRST, 1).load(lanes), 0)
        steps = gl.max(note.slice(STEPS, 1).load(lanes), 0)
        mbarrier.arrive(plan_empty.index(plan), count=1)
        accs = ()
        for _p in gl.static_range(2):
            accs = accs + (accumulator(gl.zeros([64, 128], gl.float32, mma)),)
        mbarrier.wait(turn.index(which), ((tile // 2) & 1) ^ (1 - which))
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        pending = ()
        for p in gl.static_range(2):
            dy = dy_smem.index(stage * 2 + p)
            pending = pending + (warpgroup_mma(dy, w_smem.index(stage), accs[p], is_async=True),)
        # What this warpgroup stored last has left its memory by now, into which h comes.
        tma.store_wait(0)
        mbarrier.expect(bar, 2 * 64 * 128 * 2)
        for p in gl.static_range(2):
            tma.async_copy_global_to_shared(
                pre_desc, [pm * 128 + p * 64, c * 128], bar, h_smem.index(p)
            )
        done = warpgroup_mma_wait(2, deps=pending)
        accs = ()
        for p in gl.static_range(2):
            accs = accs + (accumulator(done[p]),)
        step += 1
        for _q in range(1, steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            pending = ()
            for p in gl.static_range(2):
                dy = dy_smem.index(stage * 2 + p)
                pending = pending + (
                    warpgroup_mma(dy, w_smem.index(stage), accs[p], is_async=True),
                )
            done = warpgroup_mma_wait(2, deps=pending)
            accs = ()
            for p in gl.static_range(2):
                accs = accs + (accumulator(done[p]),)
            # The stage before this one has been read.
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
            step += 1
        mbarrier.arrive(turn.index(1 - which), count=1)
        done = warpgroup_mma_wait(0, deps=accs)
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        for p in gl.static_range(2):
            d_smem.index(p).store(done[p].to(dh_desc.dtype))
        mbarrier.wait(bar, (tile // 2) & 1)
        for p in range(2):
            for panel in range(2):
                sums = gl.zeros([ROWS, 64], gl.float32, lines)
                for i in range(PER):
                    at = (p * 2 + panel) * PER + i
                    h = h_chunks.index(at).load(lines).to(gl.float32)
                    da = d_chunks.index(at).load(lines).to(gl.float32)
                    a, slope = activated_and_slope(h, ACTIVATION, ARITHMETIC)
                    dh = da * slope
                    d_chunks.index(at).store(dh.to(dh_desc.dtype))
                    if KEEP_A:
                        h_chunks.index(at).store(a.to(dh_desc.dtype))
                    if NEED_SUMS:
                        sums += dh
                if NEED_SUMS:
                    # Past token N dy and h read as zeros, and so does dh. One row for each warp:
                    # no exchange between warps.
                    rows = gl.sum(gl.sum(gl.reshape(sums, [ROWS // 16, 4, 4, 64]), 0), 1)
                    row = gl.arange(0, 4, gl.SliceLayout(1, rows.type.layout)) + pm * 8 + p * 4
                    n = gl.arange(0, 64, gl.SliceLayout(0, rows.type.layout)) + c * 128 + panel * 64
                    gl.store(sums_ptr + row.to(gl.int64)[:, None] * (C * 128) + n[None, :], rows)
            fence_async_shared()
            where = [pm * 128 + p * 64, c * 128]
            tma.async_copy_shared_to_global(dh_desc, where, d_smem.index(p))
            if KEEP_A:
                tma.async_copy_shared_to_global(a_desc, where, h_smem.index(p))
        tile += 2
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["N", "slots", "C", "depth"])
def middle_by_turns(
    dy_desc,  # [N, depth] in boxes [64, 64]
    w_desc,  # values as [R*slots*128, 128], or the dense weight [depth, C*128], in boxes [64, 128]
    dh_desc,  # [N, C*128] in boxes [64, 128]
    pre_desc,  # as dh_desc
    a_desc,  # as dh_desc, or unused
    sums_ptr,  # float32 [8 * token tiles, C*128], or unused
    order_ptr,  # [R*slots] slot ids, by column then row
    col_start_ptr,  # [C+1]
    N,
    slots,
    C,
    depth,
    DENSE: gl.constexpr,
    SORTED: gl.constexpr,  # C is at most 32
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    ROWS: gl.constexpr,
    KEEP_A: gl.constexpr,
    NEED_SUMS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    ARITHMETIC: gl.constexpr,
):
    """dh = (dy W) f'(h), and if asked a = f(h) and the sums of dh over the tokens of a tile."""
    dtype: gl.constexpr = dy_desc.dtype
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    dy_smem = gl.allocate_shared_memory(dtype, [STAGES * 2, 64, 64], dy_desc.layout)
    w_smem = gl.allocate_shared_memory(dtype, [STAGES, 64, 128], w_desc.layout)
    d0 = gl.allocate_shared_memory(dtype, [2, 64, 128], dh_desc.layout)
    d1 = gl.allocate_shared_memory(dtype, [2, 64, 128], dh_desc.layout)
    h0 = gl.allocate_shared_memory(dtype, [2, 64, 128], dh_desc.layout)
    h1 = gl.allocate_shared_memory(dtype, [2, 64, 128], dh_desc.layout)
    plan_smem = gl.allocate_shared_memory(gl.int32, [PLANS, 32], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    plan_full = gl.allocate_shared_memory(gl.int64, [PLANS, 1], bars)
    plan_empty = gl.allocate_shared_memory(gl.int64, [PLANS, 1], bars)
    arrived = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(PLANS):
        mbarrier.init(plan_full.index(i), count=1)
        mbarrier.init(plan_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(arrived.index(i), count=1)
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    # fmt: off
    gl.warp_specialize(
        [
            (_middle_turn, (0, dh_desc, pre_desc, a_desc, sums_ptr, dy_smem, w_smem, h0, d0,
                            plan_smem, full, empty, plan_full, plan_empty, arrived, turn, N, C,
                            STAGES, GROUP_M, ROWS, KEEP_A, NEED_SUMS, ACTIVATION, ARITHMETIC)),
            (_middle_turn, (1, dh_desc, pre_desc, a_desc, sums_ptr, dy_smem, w_smem, h1, d1,
                            plan_smem, full, empty, plan_full, plan_empty, arrived, turn, N, C,
                            STAGES, GROUP_M, ROWS, KEEP_A, NEED_SUMS, ACTIVATION, ARITHMETIC)),
            (_load_columns, (dy_desc, w_desc, order_ptr, col_start_ptr, dy_smem, w_smem, plan_smem,
                             full, empty, plan_full, plan_empty, N, slots, C, depth, DENSE, SORTED,
                             STAGES, GROUP_M)),
        ],
        [4, 1],
        [216, 80],
    )
    # fmt: on
