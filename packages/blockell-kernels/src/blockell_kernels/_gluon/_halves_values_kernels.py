# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon concatenates tuples, but does not unpack them)
"""Weight gradient of float32, as three float16 products, for Hopper.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens; a unit: block
rows that share their columns, 128 outputs.

As `_halves_kernels`, but both operands come as float32: two warpgroups multiply, 64 outputs each,
and split dy in registers; a third one splits x into shared memory for both. Every column of either
is scaled by a power of two of its own at every step of `BT` tokens. A program owns a unit, `WIDTH`
columns of its blocks and a part of the tokens.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from blockell_kernels._gluon._halves_kernels import halves, scales
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
def _steps(N, tokens_per_part, BT: gl.constexpr):
    """(first token, number of steps) of the program's part."""
    begin = gl.program_id(1) * tokens_per_part
    return begin, gl.cdiv(gl.minimum(tokens_per_part, N - begin), BT)


@gluon.jit
def _load(
    dy_desc,
    x_desc,
    cols_ptr,
    dy_smem,
    x_smem,
    dy_full,
    dy_empty,
    x_full,
    x_empty,
    N,
    slots,
    num_live,
    C,
    units,
    tokens_per_part,
    B: gl.constexpr,
    PANEL: gl.constexpr,
    PANELS: gl.constexpr,
    BT: gl.constexpr,
    STAGES: gl.constexpr,
    DENSE: gl.constexpr,
):
    """The loading warp."""
    PER_BLOCK: gl.constexpr = B // PANEL
    unit, chunk = gl.program_id(0) % units, gl.program_id(0) // units
    cols = ()
    for s in gl.static_range(PANELS):
        k = (chunk * PANELS + s) // PER_BLOCK
        c = k
        if not DENSE:
            # Behind the last column: reads zeros.
            c = gl.load(cols_ptr + unit * 128 // B * slots + k, mask=k < num_live, other=C)
        cols = cols + (c * B + s % PER_BLOCK * PANEL,)
    begin, steps = _steps(N, tokens_per_part, BT)
    for step in range(steps):
        stage = step % STAGES
        phase = ((step // STAGES) & 1) ^ 1
        token = begin + step * BT
        mbarrier.wait(dy_empty.index(stage), phase)
        bar = dy_full.index(stage)
        mbarrier.expect(bar, BT * 128 * 4)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                dy_desc, [token, unit * 128 + half * 64], bar, dy_smem.index(stage * 2 + half)
            )
        mbarrier.wait(x_empty.index(stage), phase)
        bar = x_full.index(stage)
        mbarrier.expect(bar, BT * PANELS * PANEL * 4)
        for s in gl.static_range(PANELS):
            tma.async_copy_global_to_shared(
                x_desc, [token, cols[s]], bar, x_smem.index(stage * PANELS + s)
            )


@gluon.jit
def _split(
    x_smem,
    xh_smem,
    xl_smem,
    inverse_smem,
    x_full,
    x_empty,
    ready,
    free,
    N,
    tokens_per_part,
    PANEL: gl.constexpr,
    PANELS: gl.constexpr,
    BT: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The splitting warpgroup: x as halves, scaled by column, and 1/scale."""
    # A warp takes 32 columns, so that a column's largest value is found inside it.
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [1, 4], [1, 0])
    x_layout: gl.constexpr = gl.NVMMASharedLayout(PANEL * 4, 32, 2)
    _begin, steps = _steps(N, tokens_per_part, BT)
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(x_full.index(stage), (step // STAGES) & 1)
        x = x_smem.index(stage * PANELS)._reinterpret(gl.float32, [BT, PANELS * PANEL], x_layout)
        # In pieces, read twice: a step's columns do not fit into the registers.
        largest = gl.zeros([32, PANELS * PANEL], gl.float32, layout)
        for i in gl.static_range(BT // 32):
            piece = x.slice(i * 32, 32, 0).load(layout)
            largest = gl.maximum(largest, gl.abs(piece))
        scale, inverse = scales(gl.max(largest, 0))
        mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
        for i in gl.static_range(BT // 32):
            piece = x.slice(i * 32, 32, 0).load(layout)
            high, low = halves(piece * scale[None, :])
            xh_smem.index(stage).slice(i * 32, 32, 0).store(high)
            xl_smem.index(stage).slice(i * 32, 32, 0).store(low)
        mbarrier.arrive(x_empty.index(stage), count=1)
        inverse_smem.index(stage).store(inverse)
        fence_async_shared()
        mbarrier.arrive(ready.index(stage), count=1)


@gluon.jit
def _multiply(
    half: gl.constexpr,
    out_ptr,
    dy_smem,
    xh_smem,
    xl_smem,
    inverse_smem,
    dy_full,
    dy_empty,
    ready,
    free,
    N,
    num_live,
    out_slots,
    part_size,
    units,
    rows,
    tokens_per_part,
    B: gl.constexpr,
    WIDTH: gl.constexpr,
    BT: gl.constexpr,
    STAGES: gl.constexpr,
    DENSE: gl.constexpr,
):
    """A multiplying warpgroup: 64 outputs."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    unit, chunk = gl.program_id(0) % units, gl.program_id(0) // units
    acc = gl.zeros([64, WIDTH], gl.float32, mma)
    _begin, steps = _steps(N, tokens_per_part, BT)
    for step in range(steps):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        mbarrier.wait(dy_full.index(stage), phase)
        dy = dy_smem.index(stage * 2 + half).permute((1, 0)).load(operand)
        scale, inverse = scales(gl.max(gl.abs(dy), 1))
        high, low = halves(dy * scale[:, None])
        mbarrier.arrive(dy_empty.index(stage), count=1)
        mbarrier.wait(ready.index(stage), phase)
        part = accumulator(gl.zeros([64, WIDTH], gl.float32, mma))
        part = warpgroup_mma(low, xh_smem.index(stage), part, use_acc=False, is_async=True)
        part = warpgroup_mma(high, xl_smem.index(stage), part, is_async=True)
        part = warpgroup_mma(high, xh_smem.index(stage), part, is_async=True)
        inverse = gl.convert_layout(inverse, gl.SliceLayout(1, mma))
        done = warpgroup_mma_wait(0, deps=(part, high, low))
        inverse_x = inverse_smem.index(stage).load(gl.SliceLayout(0, mma))
        mbarrier.arrive(free.index(stage), count=1)
        acc += (done[0] * inverse[:, None]) * inverse_x[None, :]
    m = unit * 128 + half * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma))
    n = chunk * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, mma))
    out_ptr += gl.program_id(1).to(gl.int64) * part_size
    if DENSE:
        to = out_ptr + m.to(gl.int64)[:, None] * num_live + n[None, :]
        mask = (m < rows)[:, None] & (n < num_live)[None, :]
    else:
        row = (m // B).to(gl.int64) * out_slots * (B * B) + m % B * B
        to = out_ptr + row[:, None] + (n // B * (B * B) + n % B)[None, :]
        mask = (m < rows)[:, None] & (n // B < num_live)[None, :]
    gl.store(to, acc, mask=mask)


@gluon.jit(
    do_not_specialize=[
        "N", "slots", "num_live", "C", "out_slots", "part_size", "units", "rows", "tokens_per_part"
    ]
)  # fmt: skip
def grad_values_of_halves(
    dy_desc,  # float32 [N, R*B] in boxes [BT, 64]
    x_desc,  # float32 [N, C*B] in boxes [BT, PANEL]
    cols_ptr,  # [R, slots]; unused if dense
    out_ptr,  # float32 [parts, R, out_slots, B, B], or [parts, R*B, C*B] if dense
    N,
    slots,
    num_live,  # blocks of a row; columns of x if dense
    C,
    out_slots,
    part_size,  # elements
    units,
    rows,  # R*B
    tokens_per_part,  # a multiple of BT
    B: gl.constexpr,
    PANEL: gl.constexpr,  # columns of x that lie side by side: divides B
    WIDTH: gl.constexpr,
    BT: gl.constexpr,
    STAGES: gl.constexpr,
    DENSE: gl.constexpr,
    OVERLAPS: gl.constexpr = False,
):
    """The present blocks of dy^T x, or all of it; parts of the tokens apart."""
    PANELS: gl.constexpr = WIDTH // PANEL
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dy_smem = gl.allocate_shared_memory(gl.float32, [STAGES * 2, BT, 64], dy_desc.layout)
    x_smem = gl.allocate_shared_memory(gl.float32, [STAGES * PANELS, BT, PANEL], x_desc.layout)
    xh_smem = gl.allocate_shared_memory(gl.float16, [STAGES, BT, WIDTH], wide)
    xl_smem = gl.allocate_shared_memory(gl.float16, [STAGES, BT, WIDTH], wide)
    inverse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, WIDTH], flat)
    dy_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    dy_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    x_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    x_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(dy_full.index(i), count=1)
        mbarrier.init(dy_empty.index(i), count=2)
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=1)
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    if OVERLAPS:
        let_the_next_one_start()
        wait_for_the_one_before()
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (0, out_ptr, dy_smem, xh_smem, xl_smem, inverse_smem, dy_full, dy_empty,
                         ready, free, N, num_live, out_slots, part_size,
                         units, rows, tokens_per_part, B, WIDTH, BT, STAGES, DENSE)),
            (_multiply, (1, out_ptr, dy_smem, xh_smem, xl_smem, inverse_smem, dy_full, dy_empty,
                         ready, free, N, num_live, out_slots, part_size,
                         units, rows, tokens_per_part, B, WIDTH, BT, STAGES, DENSE)),
            (_split, (x_smem, xh_smem, xl_smem, inverse_smem, x_full, x_empty, ready, free,
                      N, tokens_per_part, PANEL, PANELS, BT, STAGES)),
            (_load, (dy_desc, x_desc, cols_ptr, dy_smem, x_smem, dy_full, dy_empty, x_full,
                     x_empty, N, slots, num_live, C, units, tokens_per_part, B, PANEL, PANELS, BT,
                     STAGES, DENSE)),
        ],
        [4, 4, 1],
        [192, 104, 24],
    )
    # fmt: on
