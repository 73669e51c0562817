# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon concatenates tuples, but does not unpack them)
"""The input gradient dx = dy W of tiles below 128, for Hopper.

Legend: R block rows, C block columns, B tile side, N tokens; a unit: `ROWS` block rows that share
their columns, ROWS*B = 64 or 128 outputs.

A program owns 128 tokens x COLUMNS block columns of dx and goes through the units. Of every unit it
loads the slice of dy once, and of the weight the blocks that lie in its columns; then, for every
column that the unit holds, one product of depth ROWS*B is added to that column's accumulator.
Walking one column at a time instead, as the Triton kernels do, loads dy again for every column, and
reads it from shared memory at every step: for tiles of 16, 256 bytes per clock and multiprocessor.

Whether a column is held is a branch around 4 or 8 tensor core instructions, which costs about 20
cycles. Three partitions hide that: two warpgroups with 64 tokens each, which keep dy in registers,
and one warp that loads. The order of additions is fixed: deterministic.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

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

# No slot: above every slot id.
NONE = gl.constexpr(0x7FFFFFFF)
# A stage's word: bit j says that column j is held; then the number of them; then whether it is the
# last stage of its tile.
COUNT = gl.constexpr(24)
LAST = gl.constexpr(30)


@gluon.jit
def tile_of(pid, token_tiles, column_tiles, GROUP_M: gl.constexpr):
    """(token tile, column tile) of a program; GROUP_M token tiles share the L2 at a time."""
    width = GROUP_M * column_tiles
    first = (pid // width) * GROUP_M
    height = gl.minimum(token_tiles - first, GROUP_M)
    return first + (pid % width) % height, (pid % width) // height


@gluon.jit
def _load(
    dy_desc,
    w_desc,
    order_ptr,
    col_start_ptr,
    dy_smem,
    w_smem,
    held_smem,
    slot_smem,
    full,
    empty,
    N,
    slots,
    C,
    units,
    B: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCKS: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """The loading warp; each lane keeps where one column stands in the transposed index.

    dy has a ring of `STAGES` buffers, the weight one of `BLOCKS`, of which a stage takes as many as
    it has blocks: `freed` counts the blocks of the stages up to `oldest`, which have been read.
    """
    DEPTH: gl.constexpr = ROWS * B
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 32, lanes)
    token_tiles, column_tiles = gl.cdiv(N, 128), gl.cdiv(C, COLUMNS)
    step = 0
    oldest = 0
    taken, freed, buffer = 0, 0, 0
    for pid in range(gl.program_id(0), token_tiles * column_tiles, gl.num_programs(0)):
        pm, pn = tile_of(pid, token_tiles, column_tiles, GROUP_M)
        c = pn * COLUMNS + lane
        mine = (lane < COLUMNS) & (c < C)
        at = gl.load(col_start_ptr + c, mask=mine, other=0)
        end = gl.load(col_start_ptr + c + 1, mask=mine, other=0)
        slot = gl.load(order_ptr + at, mask=at < end, other=NONE)
        for unit in range(units):
            k = slot - unit * (ROWS * slots)  # the slot within the unit's first row, if held
            here = k < ROWS * slots
            held = gl.sum(here.to(gl.int32) << lane, 0)
            count = gl.sum(here.to(gl.int32), 0)
            at += gl.where(here, ROWS, 0)
            slot = gl.load(order_ptr + at, mask=at < end, other=NONE)
            last = unit == units - 1
            if (held != 0) | last:
                while (step - oldest >= STAGES) | (taken + count - freed > BLOCKS):
                    mbarrier.wait(empty.index(oldest % STAGES), (oldest // STAGES) & 1)
                    word = gl.max(held_smem.index(oldest % STAGES).load(lanes), 0)
                    freed += (word >> COUNT) & 31
                    oldest += 1
                stage = step % STAGES
                word = held | (count << COUNT) | (last.to(gl.int32) << LAST)
                held_smem.index(stage).store(gl.full([32], 0, gl.int32, lanes) + word)
                slot_smem.store(k)
                bar = full.index(stage)
                mbarrier.expect(bar, 128 * DEPTH * 2)
                # The bytes of `count` blocks, in powers of two: they have to be constants.
                for bit in gl.static_range(5):
                    mbarrier.expect(bar, (DEPTH * B * 2) << bit, pred=((count >> bit) & 1) != 0)
                    mbarrier.arrive(bar, count=1, pred=((count >> bit) & 1) == 0)
                for half in gl.static_range(2):
                    tma.async_copy_global_to_shared(
                        dy_desc,
                        [pm * 128 + half * 64, unit * DEPTH],
                        bar,
                        dy_smem.index(half * STAGES + stage),
                    )
                for j in gl.static_range(COLUMNS):
                    if ((held >> j) & 1) != 0:
                        block = gl.max(slot_smem.slice(j, 1).load(lanes), 0)
                        tma.async_copy_global_to_shared(
                            w_desc,
                            [unit * ROWS, block * w_desc.block_shape[1], 0],
                            bar,
                            w_smem.index(buffer)._reinterpret(
                                w_smem.dtype, w_desc.block_shape, w_desc.layout
                            ),
                        )
                        buffer = gl.where(buffer == BLOCKS - 1, 0, buffer + 1)
                taken += count
                step += 1


@gluon.jit
def _multiply(
    half: gl.constexpr,
    dx_desc,
    dy_smem,
    w_smem,
    held_smem,
    out_smem,
    full,
    empty,
    N,
    C,
    B: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCKS: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """A multiplying warpgroup: 64 tokens, one accumulator [64, B] per column."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, B, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    OUTS: gl.constexpr = (COLUMNS + 1) // 2
    token_tiles, column_tiles = gl.cdiv(N, 128), gl.cdiv(C, COLUMNS)
    step = 0
    block = 0
    for pid in range(gl.program_id(0), token_tiles * column_tiles, gl.num_programs(0)):
        pm, pn = tile_of(pid, token_tiles, column_tiles, GROUP_M)
        accs = ()
        for _j in gl.static_range(COLUMNS):
            accs = accs + (accumulator(gl.zeros([64, B], gl.float32, mma)),)
        going = 1
        while going != 0:
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            held = gl.max(held_smem.index(stage).load(lanes), 0)
            dy = dy_smem.index(half * STAGES + stage).load(operand)
            pending = ()
            for j in gl.static_range(COLUMNS):
                acc = accs[j]
                if ((held >> j) & 1) != 0:
                    acc = warpgroup_mma(dy, w_smem.index(block), acc, is_async=True)
                    block = gl.where(block == BLOCKS - 1, 0, block + 1)
                pending = pending + (acc,)
            done = warpgroup_mma_wait(0, deps=pending)
            accs = ()
            for j in gl.static_range(COLUMNS):
                accs = accs + (accumulator(done[j]),)
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
            going = (held >> LAST) ^ 1
        done = warpgroup_mma_wait(0, deps=accs)
        # In two parts: half the shared memory.
        for part in gl.static_range(2):
            tma.store_wait(0)
            for j in gl.static_range(OUTS):
                if part * OUTS + j < COLUMNS:
                    out_smem[half * OUTS + j].store(done[part * OUTS + j].to(dx_desc.dtype))
            fence_async_shared()
            for j in gl.static_range(OUTS):
                if part * OUTS + j < COLUMNS:
                    tma.async_copy_shared_to_global(
                        dx_desc,
                        [pm * 128 + half * 64, (pn * COLUMNS + part * OUTS + j) * B],
                        out_smem[half * OUTS + j],
                    )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["N", "slots", "C", "units"])
def grad_input_by_units(
    dy_desc,  # [N, R*B] in boxes [64, ROWS*B]
    w_desc,  # [R, slots*B, B] in boxes [ROWS, B, B], or swizzled, in rows of 256 elements
    dx_desc,  # [N, C*B] in boxes [64, B]
    order_ptr,  # [R*slots] slot ids, by column then row
    col_start_ptr,  # [C+1]
    N,
    slots,
    C,
    units,  # R / ROWS
    B: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCKS: gl.constexpr,
    GROUP_M: gl.constexpr,
    OVERLAPS: gl.constexpr = False,
):
    DEPTH: gl.constexpr = ROWS * B
    dtype: gl.constexpr = dy_desc.dtype
    w_layout: gl.constexpr = gl.NVMMASharedLayout(B * 2, 16, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    dy_smem = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, DEPTH], dy_desc.layout)
    w_smem = gl.allocate_shared_memory(dtype, [BLOCKS, DEPTH, B], w_layout)
    out_smem = ()
    for _j in gl.static_range(2 * ((COLUMNS + 1) // 2)):
        out_smem = out_smem + (gl.allocate_shared_memory(dtype, [64, B], dx_desc.layout),)
    held_smem = gl.allocate_shared_memory(gl.int32, [STAGES, 32], flat)
    slot_smem = gl.allocate_shared_memory(gl.int32, [32], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=6)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    if OVERLAPS:
        let_the_next_one_start()
        wait_for_the_one_before()
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (0, dx_desc, dy_smem, w_smem, held_smem, out_smem, full, empty, N, C,
                         B, COLUMNS, STAGES, BLOCKS, GROUP_M)),
            (_multiply, (1, dx_desc, dy_smem, w_smem, held_smem, out_smem, full, empty, N, C,
                         B, COLUMNS, STAGES, BLOCKS, GROUP_M)),
            (_load, (dy_desc, w_desc, order_ptr, col_start_ptr, dy_smem, w_smem, held_smem,
                     slot_smem, full, empty, N, slots, C, units,
                     B, ROWS, COLUMNS, STAGES, BLOCKS, GROUP_M)),
        ],
        [4, 1],
        [208, 88],
    )
    # fmt: on
