# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon concatenates tuples, but does not unpack them)
"""Forward and input gradient by the whole weight, for Hopper: block by block, no dense copy.

Legend: R block rows, C block columns, B tile side, N tokens; a unit: 128 outputs, that is block
rows (forward) or block columns (input gradient); a step: 64 of the features that are summed over.

A dense product whose weight tiles of 128 x 64 the copy engine puts together from single blocks.
Where they lie was noted before (`_triton._places`); in place of an absent one the engine reads
behind the last, which gives zeros. A row of a block costs it 1.6 clocks, however short: 128 x 64
weights are 128 rows in tile 64, 256 in tile 32, 512 in tile 16, beside 64 rows to 64 tokens, for
which the tensor cores take 256 clocks. Several warps load: one takes longer to issue a step of
small blocks.

A program owns 64 tokens times (`PIECES0` + `PIECES1`) x 128 outputs x a part of the sum. The order
of additions is fixed: deterministic.
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


@gluon.constexpr_function
def _place(entry, rows, deep, forward):
    """Where an entry's block lies in a stage: panels as wide as a block, one behind the other."""
    return (entry % deep) * rows + entry // deep if forward else entry


@gluon.jit
def _load(
    worker: gl.constexpr,
    a_desc,
    w_desc,
    place_ptr,
    a_smem,
    w_smem,
    full,
    empty,
    N,
    units,
    steps,
    steps_per_part,
    B: gl.constexpr,
    FORWARD: gl.constexpr,
    LOADERS: gl.constexpr,
    PIECES: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """One of the loading warps: its share of the blocks and of the pieces of tokens."""
    ROWS: gl.constexpr = 128 // B
    DEEP: gl.constexpr = 64 // B if B < 128 else 1
    MINE: gl.constexpr = ROWS * DEEP // LOADERS
    PIECES_MINE: gl.constexpr = (PIECES - worker + LOADERS - 1) // LOADERS
    token_tiles = gl.cdiv(N, 64 * PIECES)
    tiles = token_tiles * units
    step = 0
    for pid in range(gl.program_id(0), tiles * gl.cdiv(steps, steps_per_part), gl.num_programs(0)):
        pm, pn = tile_of(pid % tiles, token_tiles, units, GROUP_M)
        begin = (pid // tiles) * steps_per_part
        for q in range(begin, gl.minimum(begin + steps_per_part, steps)):
            if B == 128:  # two steps to a block
                entries = place_ptr + (pn * steps + q) // 2
            else:
                entries = place_ptr + (pn * steps + q) * (ROWS * DEEP) + worker * MINE
            rows = ()
            for e in gl.static_range(MINE):
                rows = rows + (gl.load(entries + e),)
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, (PIECES_MINE * 64 + 128 // LOADERS) * 64 * 2)
            for p in gl.static_range(PIECES_MINE):
                tma.async_copy_global_to_shared(
                    a_desc,
                    [(pm * PIECES + p * LOADERS + worker) * 64, q * 64],
                    bar,
                    a_smem.index(stage * PIECES + p * LOADERS + worker),
                )
            if B == 128:
                half = (q % 2) * 64
                at = [rows[0], half] if FORWARD else [rows[0] + half, 0]
                tma.async_copy_global_to_shared(w_desc, at, bar, w_smem.index(stage))
            else:
                blocks = w_smem.index(stage)._reinterpret(
                    w_smem.dtype, [ROWS * DEEP, B, B], w_desc.layout
                )
                for e in gl.static_range(MINE):
                    tma.async_copy_global_to_shared(
                        w_desc,
                        [rows[e], 0],
                        bar,
                        blocks.index(_place(worker * MINE + e, ROWS, DEEP, FORWARD)),
                    )
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
    parts_ptr,
    bias_ptr,
    a_smem,
    w_smem,
    out_smem,
    full,
    empty,
    N,
    outputs,
    units,
    steps,
    steps_per_part,
    FORWARD: gl.constexpr,
    PIECES: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PARTS: gl.constexpr,
):
    """A multiplying warpgroup: `pieces` of 64 tokens, from the `first` on."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    token_tiles = gl.cdiv(N, 64 * PIECES)
    tiles = token_tiles * units
    step = 0
    for pid in range(gl.program_id(0), tiles * gl.cdiv(steps, steps_per_part), gl.num_programs(0)):
        pm, pn = tile_of(pid % tiles, token_tiles, units, GROUP_M)
        part = pid // tiles
        begin = part * steps_per_part
        n = pn * 128 + gl.arange(0, 128, gl.SliceLayout(0, mma))
        y = gl.zeros([64, 128], gl.float32, mma)
        if HAS_BIAS:  # first: after the sum there are no registers left for it
            y += gl.load(bias_ptr + gl.minimum(n, outputs - 1)).to(gl.float32)[None, :]
        accs = ()
        for _p in gl.static_range(pieces):
            accs = accs + (accumulator(y),)
        for _q in range(begin, gl.minimum(begin + steps_per_part, steps)):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            w = w_smem.index(stage)
            if FORWARD:
                w = w.permute((1, 0))
            pending = ()
            for p in gl.static_range(pieces):
                a = a_smem.index(stage * PIECES + first + p)
                pending = pending + (warpgroup_mma(a, w, accs[p], is_async=True),)
            done = _wait(pieces, pending, pieces)
            accs = ()
            for p in gl.static_range(pieces):
                accs = accs + (accumulator(done[p]),)
            # The stage before this one has been read.
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
            step += 1
        done = _wait(0, accs, pieces)
        for p in gl.static_range(pieces):
            if PARTS:
                n = pn * 128 + gl.arange(0, 128, gl.SliceLayout(0, mma))
                m = (pm * PIECES + first + p) * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma))
                row = parts_ptr + (part.to(gl.int64) * N + m) * outputs
                inside = (m < N)[:, None] & (n < outputs)[None, :]
                gl.store(row[:, None] + n[None, :], done[p], mask=inside)
            else:
                tma.store_wait(0)
                out_smem.store(done[p].to(y_desc.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(
                    y_desc, [(pm * PIECES + first + p) * 64, pn * 128], out_smem
                )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["N", "units", "steps", "steps_per_part"])
def whole_weight(
    a_desc,  # x [N, C*B] or dy [N, R*B], in boxes [64, 64]
    w_desc,  # [R*slots*B, B], in boxes [B, B]; of tile 128 [128, 64] or [64, 128]
    y_desc,  # y [N, R*B] or dx [N, C*B], in boxes [64, 128]
    parts_ptr,  # float32 [parts, N, outputs]; unused unless PARTS
    place_ptr,  # int32 [units, steps, 128/B, 64/B], or [units, steps/2]: first rows in w_desc
    bias_ptr,  # [R*B] or unused
    N,
    outputs,
    units,
    steps,
    steps_per_part,
    B: gl.constexpr,
    FORWARD: gl.constexpr,  # weights are summed over along their rows, else along their columns
    LOADERS: gl.constexpr,
    PIECES0: gl.constexpr,
    PIECES1: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PARTS: gl.constexpr,
    OVERLAPS: gl.constexpr = False,
):
    PIECES: gl.constexpr = PIECES0 + PIECES1
    dtype: gl.constexpr = a_desc.dtype
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    w_shape: gl.constexpr = [STAGES, 128, 64] if FORWARD else [STAGES, 64, 128]
    a_smem = gl.allocate_shared_memory(dtype, [STAGES * PIECES, 64, 64], a_desc.layout)
    w_smem = gl.allocate_shared_memory(dtype, w_shape, w_desc.layout)
    out0 = gl.allocate_shared_memory(dtype, [64, 128], y_desc.layout)
    out1 = gl.allocate_shared_memory(dtype, [64, 128], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=LOADERS)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    if OVERLAPS:
        let_the_next_one_start()
        wait_for_the_one_before()
    # fmt: off
    if LOADERS == 1:
        gl.warp_specialize(
            [
                (_multiply, (0, PIECES0, y_desc, parts_ptr, bias_ptr, a_smem, w_smem, out0, full,
                             empty, N, outputs, units, steps, steps_per_part, FORWARD, PIECES,
                             STAGES, GROUP_M, HAS_BIAS, PARTS)),
                (_multiply, (PIECES0, PIECES1, y_desc, parts_ptr, bias_ptr, a_smem, w_smem, out1,
                             full, empty, N, outputs, units, steps, steps_per_part, FORWARD,
                             PIECES, STAGES, GROUP_M, HAS_BIAS, PARTS)),
                (_load, (0, a_desc, w_desc, place_ptr, a_smem, w_smem, full, empty, N, units, steps,
                         steps_per_part, B, FORWARD, LOADERS, PIECES, STAGES, GROUP_M)),
            ],
            [4, 1],
            [168, 56],
        )
    elif LOADERS == 2:
        gl.warp_specialize(
            [
                (_multiply, (0, PIECES0, y_desc, parts_ptr, bias_ptr, a_smem, w_smem, out0, full,
                             empty, N, outputs, units, steps, steps_per_part, FORWARD, PIECES,
                             STAGES, GROUP_M, HAS_BIAS, PARTS)),
                (_multiply, (PIECES0, PIECES1, y_desc, parts_ptr, bias_ptr, a_smem, w_smem, out1,
                             full, empty, N, outputs, units, steps, steps_per_part, FORWARD,
                             PIECES, STAGES, GROUP_M, HAS_BIAS, PARTS)),
                (_load, (0, a_desc, w_desc, place_ptr, a_smem, w_smem, full, empty, N, units, steps,
                         steps_per_part, B, FORWARD, LOADERS, PIECES, STAGES, GROUP_M)),
                (_load, (1, a_desc, w_desc, place_ptr, a_smem, w_smem, full, empty, N, units, steps,
                         steps_per_part, B, FORWARD, LOADERS, PIECES, STAGES, GROUP_M)),
            ],
            [4, 1, 1],
            [168, 56, 56],
        )
    elif LOADERS == 4:
        gl.warp_specialize(
            [
                (_multiply, (0, PIECES0, y_desc, parts_ptr, bias_ptr, a_smem, w_smem, out0, full,
                             empty, N, outputs, units, steps, steps_per_part, FORWARD, PIECES,
                             STAGES, GROUP_M, HAS_BIAS, PARTS)),
                (_multiply, (PIECES0, PIECES1, y_desc, parts_ptr, bias_ptr, a_smem, w_smem, out1,
                             full, empty, N, outputs, units, steps, steps_per_part, FORWARD,
                             PIECES, STAGES, GROUP_M, HAS_BIAS, PARTS)),
                (_load, (0, a_desc, w_desc, place_ptr, a_smem, w_smem, full, empty, N, units, steps,
                         steps_per_part, B, FORWARD, LOADERS, PIECES, STAGES, GROUP_M)),
                (_load, (1, a_desc, w_desc, place_ptr, a_smem, w_smem, full, empty, N, units, steps,
                         steps_per_part, B, FORWARD, LOADERS, PIECES, STAGES, GROUP_M)),
                (_load, (2, a_desc, w_desc, place_ptr, a_smem, w_smem, full, empty, N, units, steps,
                         steps_per_part, B, FORWARD, LOADERS, PIECES, STAGES, GROUP_M)),
                (_load, (3, a_desc, w_desc, place_ptr, a_smem, w_smem, full, empty, N, units, steps,
                         steps_per_part, B, FORWARD, LOADERS, PIECES, STAGES, GROUP_M)),
            ],
            [4, 1, 1, 1, 1],
            [168, 56, 56, 56, 56],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (0, PIECES0, y_desc, parts_ptr, bias_ptr, a_smem, w_smem, out0, full,
                             empty, N, outputs, units, steps, steps_per_part, FORWARD, PIECES,
                             STAGES, GROUP_M, HAS_BIAS, PARTS)),
                (_multiply, (PIECES0, PIECES1, y_desc, parts_ptr, bias_ptr, a_smem, w_smem, out1,
                             full, empty, N, outputs, units, steps, steps_per_part, FORWARD,
                             PIECES, STAGES, GROUP_M, HAS_BIAS, PARTS)),
                (_load, (0, a_desc, w_desc, place_ptr, a_smem, w_smem, full, empty, N, units, steps,
                         steps_per_part, B, FORWARD, LOADERS, PIECES, STAGES, GROUP_M)),
                (_load, (1, a_desc, w_desc, place_ptr, a_smem, w_smem, full, empty, N, units, steps,
                         steps_per_part, B, FORWARD, LOADERS, PIECES, STAGES, GROUP_M)),
                (_load, (2, a_desc, w_desc, place_ptr, a_smem, w_smem, full, empty, N, units, steps,
                         steps_per_part, B, FORWARD, LOADERS, PIECES, STAGES, GROUP_M)),
                (_load, (3, a_desc, w_desc, place_ptr, a_smem, w_smem, full, empty, N, units, steps,
                         steps_per_part, B, FORWARD, LOADERS, PIECES, STAGES, GROUP_M)),
                (_load, (4, a_desc, w_desc, place_ptr, a_smem, w_smem, full, empty, N, units, steps,
                         steps_per_part, B, FORWARD, LOADERS, PIECES, STAGES, GROUP_M)),
                (_load, (5, a_desc, w_desc, place_ptr, a_smem, w_smem, full, empty, N, units, steps,
                         steps_per_part, B, FORWARD, LOADERS, PIECES, STAGES, GROUP_M)),
                (_load, (6, a_desc, w_desc, place_ptr, a_smem, w_smem, full, empty, N, units, steps,
                         steps_per_part, B, FORWARD, LOADERS, PIECES, STAGES, GROUP_M)),
                (_load, (7, a_desc, w_desc, place_ptr, a_smem, w_smem, full, empty, N, units, steps,
                         steps_per_part, B, FORWARD, LOADERS, PIECES, STAGES, GROUP_M)),
            ],
            [4, 1, 1, 1, 1, 1, 1, 1, 1],
            [168, 56, 56, 56, 56, 56, 56, 56, 56],
        )
    # fmt: on
