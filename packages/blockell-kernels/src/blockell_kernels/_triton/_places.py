"""Where the blocks of the whole weight lie, for products that load them one by one.

Legend: R block rows, C block columns, B tile side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from blockell_kernels._backends import Pattern
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._place_kernels import note_places
from blockell_kernels._triton._tiling import ceil_div

UNIT, STEP = 128, 64
"""Features of the result that a tile of the weight covers, and features that are summed over, of
which a step covers a whole block where blocks are wider."""


class Places(NamedTuple):
    """What `places_of` notes."""

    table: Tensor
    """int32 [units, steps, UNIT/B, blocks to a step]: the first row of a block in values
    [R*slots*B, B], or R*slots*B, behind the last one, where there is none."""
    units: int
    steps: int


def places_of(pattern: Pattern, forward: bool) -> Places:
    """Units of block rows and steps of block columns if `forward`, else the other way round."""
    R, C, B, slots = pattern.R, pattern.C, pattern.B, pattern.slots
    outputs, depth = (R * B, C * B) if forward else (C * B, R * B)
    step = max(STEP, B)
    units, steps = ceil_div(outputs, UNIT), ceil_div(depth, step)
    rows_deep = UNIT // B, step // B
    across, along = units * rows_deep[0], steps * rows_deep[1]
    rows, columns = (across, along) if forward else (along, across)
    table = torch.empty(
        units, steps, *rows_deep, dtype=torch.int32, device=pattern.col_indices.device
    )
    launch(
        note_places,
        (rows,),
        pattern.col_indices,
        table,
        R,
        slots,
        pattern.num_live,
        columns,
        steps,
        R * slots * B,
        B=B,
        ROWS=rows_deep[0],
        DEEP=rows_deep[1],
        FORWARD=forward,
        BLOCK=256,
        num_warps=4,
    )
    return Places(table, units, steps)
