# mypy: ignore-errors
"""Puts blocks into the order in which the tensor core reads them from shared memory.

Legend: R block rows, B tile side.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def swizzle(
    values_ptr, out_ptr, size, B: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr = False
):
    """Swap 16-byte pieces of blocks of 16-bit elements as the swizzle of 2*B bytes does.

    Address bits 4 and 5 (4 alone for tiles of 16) are xored with bits 7 and 8.
    """
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    PIECES: tl.constexpr = B // 8 - 1
    i = (tl.program_id(0).to(tl.int64) * BLOCK) + tl.arange(0, BLOCK)
    source = i ^ (((i >> 6) & PIECES) << 3)
    source = tl.max_contiguous(tl.multiple_of(source, 8), 8)
    tl.store(out_ptr + i, tl.load(values_ptr + source, mask=i < size), mask=i < size)
