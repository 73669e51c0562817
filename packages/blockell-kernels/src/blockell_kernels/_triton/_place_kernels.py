# mypy: ignore-errors
"""Notes where every block of the whole weight lies, for the products that load single blocks.

Legend: R block rows, C block columns, B tile side.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["slots", "num_live", "R", "steps", "absent"])
def note_places(
    cols_ptr,  # int32 [R, slots]
    places_ptr,  # int32 [units, steps, ROWS, DEEP]
    R,
    slots,
    num_live,
    columns,  # noted: C, rounded up to whole units and steps
    steps,
    absent,
    B: tl.constexpr,
    ROWS: tl.constexpr,  # blocks across a unit
    DEEP: tl.constexpr,  # blocks across a step
    FORWARD: tl.constexpr,  # units of block rows, steps of block columns; else the other way round
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    """The first row of each block in values [R*slots*B, B], `absent` where there is none.

    One program per block row, also of those behind the last one.
    """
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    r = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    for c0 in range(0, columns, BLOCK):
        c = c0 + i
        if FORWARD:
            at = ((r // ROWS) * steps + c // DEEP) * (ROWS * DEEP) + (r % ROWS) * DEEP + c % DEEP
        else:
            at = ((c // ROWS) * steps + r // DEEP) * (ROWS * DEEP) + (c % ROWS) * DEEP + r % DEEP
        tl.store(places_ptr + at, tl.full((BLOCK,), 0, tl.int32) + absent, c < columns)
    tl.debug_barrier()
    for k0 in range(0, num_live, BLOCK):
        k = k0 + i
        live = (k < num_live) & (r < R)
        c = tl.load(cols_ptr + r * slots + k, live, other=0)
        if FORWARD:
            at = ((r // ROWS) * steps + c // DEEP) * (ROWS * DEEP) + (r % ROWS) * DEEP + c % DEEP
        else:
            at = ((c // ROWS) * steps + r // DEEP) * (ROWS * DEEP) + (c % ROWS) * DEEP + r % DEEP
        tl.store(places_ptr + at, (r * slots + k) * B, live)
