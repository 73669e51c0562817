"""Launches the weight gradient of the whole weight, of which the present blocks are stored.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

from torch import Tensor

from blockell_kernels._backends import Pattern
from blockell_kernels._triton._device import num_sms, on_its_device
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._places import places_of
from blockell_kernels._triton._tiling import ceil_div

COLUMNS = 256
"""Of a tile."""
STAGES = 3


@on_its_device
def grad_values(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """dv [R, slots, B, B] from operands that `_whole.takes`; zeros in the spare slots."""
    from blockell_kernels._gluon._descriptors import descriptor
    from blockell_kernels._gluon._whole_values_kernels import whole_values

    N, R, B, slots = x.shape[0], pattern.R, pattern.B, pattern.slots
    out = x.new_empty(R, slots, B, B)
    if N == 0:
        return out.zero_()
    places, row_tiles, steps = places_of(pattern, forward=True)
    col_tiles = ceil_div(pattern.C * B, COLUMNS)
    launch(
        whole_values,
        (min(row_tiles * col_tiles, num_sms(x.device)),),
        descriptor(dy, [64, 64]),
        descriptor(x, [64, 128]),
        descriptor(out.view(R * slots * B, B), [min(B, 64), B]),
        places,
        N,
        row_tiles,
        col_tiles,
        steps,
        R * slots * B,
        B=B,
        STAGES=STAGES,
        GROUP=8,
        num_warps=4,
    )
    if slots > pattern.num_live:
        out[:, pattern.num_live :].zero_()
    return out
