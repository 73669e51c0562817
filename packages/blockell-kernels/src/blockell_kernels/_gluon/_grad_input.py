"""Launches the input gradient of tiles below 128.

Legend: R block rows, C block columns, B tile side, N tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from blockell_kernels._backends import Pattern
from blockell_kernels._gluon._support import runs_on
from blockell_kernels._triton._device import describable, num_sms
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._tiling import Tiling, ceil_div, power_of_two_divisor

BM = 128
"""Tokens of a program: two warpgroups of 64."""
SHARED_BYTES = 224 * 1024
"""Of a program, less the barriers."""


def takes(dy: Tensor, values: Tensor, dx: Tensor, pattern: Pattern, tiling: Tiling) -> bool:
    """Whether the kernel can run a product by this tiling."""
    B = pattern.B
    return (
        tiling.path == "gluon"
        and runs_on(dy)
        and 16 <= B <= 64
        and tiling.BN >= 2 * B  # Gluon waits for one product, alone, in another way
        and power_of_two_divisor(pattern.row_group * B) % tiling.BK == 0
        and describable(dy)
        and values.is_contiguous()
        and describable(values)
        and describable(dx)
    )


def constants(B: int, tiling: Tiling, density: float) -> dict[str, int]:
    """The kernel's compile-time parameters: `BN` columns, `BK` outputs to a unit."""
    columns = tiling.BN // B
    outs = 2 * ceil_div(columns, 2) * 64 * B * 2
    room = SHARED_BYTES - outs
    block = tiling.BK * B * 2
    # A stage of dy with as many blocks as its columns hold on average, but room for all of one.
    stage = BM * tiling.BK * 2
    held = max(1.0, columns * density)
    stages = min(6, int(room / (stage + held * block)), (room - columns * block) // stage)
    return {
        "B": B,
        "ROWS": tiling.BK // B,
        "COLUMNS": columns,
        "STAGES": stages,
        "BLOCKS": (room - stages * stage) // block,
        "GROUP_M": tiling.group_m,
    }


def density_class(density: float) -> float:
    """Densities that share a compiled kernel, by the upper end of their range."""
    return next(d for d in (0.125, 0.25, 0.5, 1.0) if density <= d or d == 1.0)


def grad_input(
    dy: Tensor,
    values: Tensor,
    order: Tensor,
    col_start: Tensor,
    dx: Tensor,
    pattern: Pattern,
    tiling: Tiling,
) -> None:
    """Write dx [N, C*B] from dy [N, R*B] and values [R, slots, B, B]; see `takes`."""
    from blockell_kernels._gluon._descriptors import descriptor, rearranged, weight_descriptor
    from blockell_kernels._gluon._grad_input_kernels import grad_input_by_units

    B, C = pattern.B, pattern.C
    compile_time: dict[str, Any] = constants(B, tiling, density_class(pattern.num_live / C))
    rows = compile_time["ROWS"]
    if rearranged(B):
        # Programs that waited for the swizzled weight would fill multiprocessors that the weight
        # gradient, on the other branch of a graph, could use: 2 us of a step of 8192 tokens.
        compile_time["OVERLAPS"] = False
    tiles = ceil_div(dy.shape[0], BM) * ceil_div(C, compile_time["COLUMNS"])
    launch(
        grad_input_by_units,
        (min(tiles, num_sms(dy.device)),),
        descriptor(dy, [64, tiling.BK]),
        weight_descriptor(values, rows, B),
        descriptor(dx, [64, B]),
        order,
        col_start,
        dy.shape[0],
        pattern.slots,
        C,
        pattern.R // rows,
        **compile_time,
        num_warps=4,
    )
