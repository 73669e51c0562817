"""Launches the forward product.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

from torch import Tensor

from blockell_kernels._backends import Pattern
from blockell_kernels._gluon._support import runs_on
from blockell_kernels._triton._device import describable, num_sms
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._tiling import Tiling, ceil_div, power_of_two_divisor

OUTPUTS = 128
"""Of a unit."""
DEPTH = 64
"""Of a stage."""
SHARED_BYTES = 226 * 1024


def takes(x: Tensor, values: Tensor, y: Tensor, pattern: Pattern, tiling: Tiling) -> bool:
    """Whether the kernel can run a product by this tiling: tiles of 256 or 320 tokens."""
    return (
        tiling.path == "gluon"
        and tiling.BM in (256, 320)
        and runs_on(x)
        and pattern.B >= 16
        and power_of_two_divisor(pattern.row_group * pattern.B) % OUTPUTS == 0
        and values.is_contiguous()
        and describable(x)
        and describable(values)
        and describable(y)
    )


def constants(B: int, tiling: Tiling, has_bias: bool) -> dict[str, int | bool]:
    """The kernel's compile-time parameters."""
    pieces, panel = tiling.BM // 64, min(B, 64)
    stage = (tiling.BM + OUTPUTS) * DEPTH * 2
    outs = 2 * 64 * OUTPUTS * 2
    return {
        "B": B,
        "PANEL": panel,
        "PANELS": DEPTH // panel,
        "PIECES0": (pieces + 1) // 2,
        "PIECES1": pieces // 2,
        "STAGES": (SHARED_BYTES - outs) // stage,
        "GROUP_M": tiling.group_m,
        "HAS_BIAS": has_bias,
    }


def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, y: Tensor, pattern: Pattern, tiling: Tiling
) -> None:
    """Write y [N, R*B] from x [N, C*B], values [R, slots, B, B], bias [R*B]; see `takes`."""
    from blockell_kernels._gluon._descriptors import descriptor, weight_descriptor
    from blockell_kernels._gluon._forward_kernels import forward_by_pieces

    B, units = pattern.B, pattern.R * pattern.B // OUTPUTS
    tiles = ceil_div(x.shape[0], tiling.BM) * units
    launch(
        forward_by_pieces,
        (min(tiles, num_sms(x.device)),),
        descriptor(x, [64, min(B, 64)]),
        weight_descriptor(values, OUTPUTS // B, min(B, 64)),
        descriptor(y, [64, OUTPUTS]),
        pattern.col_indices,
        y if bias is None else bias,
        x.shape[0],
        pattern.slots,
        pattern.num_live,
        pattern.C,
        units,
        **constants(B, tiling, bias is not None),
        num_warps=4,
    )
