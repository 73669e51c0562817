# mypy: ignore-errors
"""A Triton kernel that inverts many small unit lower triangular matrices at once.

cuBLAS and MAGMA solve batches of triangular systems far below the speed of a product, and again for
the gradient; with the inverse at hand all of that is products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _invert_unit_lower(
    lower_ptr,  # float32 [N, b, b], what is on and above the diagonal is not read
    inverse_ptr,  # float32 [N, b, b]
    b,
    SIZE: tl.constexpr,  # power of two, at least b
):
    start = tl.program_id(0).to(tl.int64) * b * b
    row = tl.arange(0, SIZE)
    column = tl.arange(0, SIZE)
    inverse = (row[:, None] == column[None, :]).to(tl.float32)
    # forward substitution: row i of the inverse is e_i minus the rows before it, weighted
    for i in range(1, b):
        weights = tl.load(lower_ptr + start + i * b + row, row < i, other=0.0)
        known = tl.sum(weights[:, None] * inverse, axis=0)
        inverse = tl.where((row == i)[:, None], inverse - known[None, :], inverse)
    inside = (row < b)[:, None] & (column < b)[None, :]
    tl.store(inverse_ptr + start + row[:, None] * b + column[None, :], inverse, inside)


def invert_unit_lower(lower: Tensor) -> Tensor:
    """(I + L)^-1 [..., b, b] of float32 ``lower`` L, read below its diagonal only.

    Row t of the result depends on rows up to t only, to the bit.
    """
    lower = lower.contiguous()
    inverse = torch.empty_like(lower)
    b = lower.shape[-1]
    count = lower.numel() // (b * b)
    if count:
        size = triton.next_power_of_2(b)
        _invert_unit_lower[(count,)](lower, inverse, b, SIZE=size, num_warps=4 if b <= 64 else 8)
    return inverse
