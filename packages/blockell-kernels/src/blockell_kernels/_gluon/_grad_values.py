"""Launches the weight gradient.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels._backends import Pattern
from blockell_kernels._gluon._support import runs_on
from blockell_kernels._triton._device import describable, num_sms
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._tiling import Tiling, ceil_div, power_of_two_divisor

BT = 64
"""Tokens of a step."""
SHARED_BYTES = 226 * 1024
TOGETHER = 8
"""Units that pass over their columns together where x is wider than dy, and falls out of L2: up to
half the time there; where it is not, one after the other is faster by a few percent."""
MIN_STEPS = 4
"""Of a part: fewer cost more in partial sums than they gain."""
LINES = 8
"""Outputs that one program adds the parts of."""


def outputs_of(B: int, row_group: int) -> int:
    """Outputs of a unit: 128 or 64 that share their columns, or 0 if fewer do."""
    width = min(128, power_of_two_divisor(row_group * B))
    return width if width >= 64 else 0


def product_of(outputs: int, columns: int) -> int:
    """Columns of one product of a tile: a warpgroup takes 64 outputs, or half of the columns."""
    return min(256, power_of_two_divisor(columns * outputs // 128))


def takes(dy: Tensor, x: Tensor, pattern: Pattern, tiling: Tiling) -> bool:
    """Whether the kernel can run a product by this tiling."""
    B, outputs = pattern.B, outputs_of(pattern.B, pattern.row_group)
    return (
        tiling.path in ("gluon", "gluon packed")
        and runs_on(dy)
        and (16 <= B <= 32 or (B > 32 and tiling.path == "gluon"))
        and outputs > 0
        and product_of(min(tiling.BM, outputs), tiling.BN) >= min(B, 64)
        and describable(dy)
        and describable(x)
    )


def together(pattern: Pattern) -> int:
    """Units that pass over their columns together."""
    return TOGETHER if pattern.C > pattern.R else 1


def constants(B: int, outputs: int, columns: int, packed: bool) -> dict[str, int | bool]:
    """The kernel's compile-time parameters."""
    panel = min(B, 64)
    return {
        "B": B,
        "OUTPUTS": outputs,
        "PANEL": panel,
        "PANELS": columns // panel,
        "BT": BT,
        "WIDTH": product_of(outputs, columns),
        "STAGES": min(6, SHARED_BYTES // ((outputs + columns) * BT * 2)),
        "PACKED": packed,
    }


def split(tiles: int, steps: int, programs: int) -> tuple[int, int]:
    """(tiles that are split, steps of a part): those of the last round, to fill it."""
    rest = tiles % programs
    if rest == 0:
        return 0, steps
    parts = max(1, min(programs // rest, steps // MIN_STEPS))
    per_part = ceil_div(steps, parts)
    return (rest, per_part) if per_part < steps else (0, steps)


def grad_values(dy: Tensor, x: Tensor, out: Tensor, pattern: Pattern, tiling: Tiling) -> None:
    """Write the live slots of out [R, slots, B, B] from dy [N, R*B] and x [N, C*B]; see `takes`."""
    from blockell_kernels._gluon._descriptors import descriptor
    from blockell_kernels._gluon._grad_values_kernels import (
        add_parts,
        grad_values_by_items,
    )
    from blockell_kernels._gluon._panels import packed

    B, K, slots = pattern.B, pattern.num_live, pattern.slots
    outputs, columns = min(tiling.BM, outputs_of(B, pattern.row_group)), tiling.BN
    chunks, steps = ceil_div(K * B, columns), ceil_div(x.shape[0], BT)
    units, programs = pattern.R * B // outputs, num_sms(x.device)
    tiles = units * chunks
    if tiling.parts:
        per_part = ceil_div(steps, tiling.parts)
        rest = tiles if per_part < steps else 0
    else:
        rest, per_part = split(tiles, steps, programs)
    parts = ceil_div(steps, per_part)
    items = tiles - rest + rest * parts
    boxes = descriptor(x, [BT, min(B, 64)])
    if tiling.path == "gluon packed":
        boxes = descriptor(packed(x, B), [BT * B // 256, 256], swizzled=False)
    work = torch.empty(rest * parts, outputs, columns, dtype=torch.float32, device=x.device)
    launch(
        grad_values_by_items,
        (min(programs, items),),
        descriptor(dy, [BT, 64]),
        boxes,
        pattern.col_indices,
        out,
        work,
        slots,
        K,
        pattern.C,
        units,
        chunks,
        together(pattern),
        steps,
        items,
        tiles - rest,
        max(rest, 1),
        per_part,
        **constants(B, outputs, columns, tiling.path == "gluon packed"),
        num_warps=4,
    )
    if rest:
        launch(
            add_parts,
            (rest, outputs // LINES),
            work,
            out,
            slots,
            K,
            units,
            chunks,
            together(pattern),
            tiles - rest,
            rest,
            parts,
            B=B,
            OUTPUTS=outputs,
            WIDTH=columns,
            COLUMNS=1 << (columns - 1).bit_length(),
            LINES=LINES,
            num_warps=4,
        )
