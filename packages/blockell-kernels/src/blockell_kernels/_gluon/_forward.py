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

DEPTH = 64
"""Of a stage."""
SHARED_BYTES = 226 * 1024
MAX_STAGES = 10


def takes(x: Tensor, values: Tensor, y: Tensor, pattern: Pattern, tiling: Tiling) -> bool:
    """Whether a kernel can run a product by this tiling: 64 to 320 tokens x 64 or 128 outputs."""
    B = pattern.B
    return (
        tiling.path in ("gluon", "gluon direct", "gluon packed")
        and (B < DEPTH or tiling.path != "gluon packed")
        and tiling.BM in (64, 128, 192, 256, 320)
        and tiling.BN in (64, 128)
        and runs_on(x)
        and B >= 16
        and power_of_two_divisor(pattern.row_group * B) % tiling.BN == 0
        and values.is_contiguous()
        and describable(x)
        and describable(values)
        and describable(y)
    )


def swizzles(B: int, tiling: Tiling) -> bool:
    """Whether the weight is swizzled first, see `_descriptors`."""
    return tiling.path == "gluon" and B < DEPTH


def constants(B: int, tiling: Tiling, has_bias: bool) -> dict[str, int | bool]:
    """The kernel's compile-time parameters."""
    pieces, panel, outputs = tiling.BM // 64, min(B, DEPTH), tiling.BN
    stage = (tiling.BM + outputs) * DEPTH * 2
    outs = min(2, pieces) * 64 * outputs * 2
    return {
        "B": B,
        "PANEL": panel,
        "PANELS": DEPTH // panel,
        "PIECES0": (pieces + 1) // 2,
        "PIECES1": pieces // 2,
        "STAGES": min(MAX_STAGES, (SHARED_BYTES - outs) // stage),
        "GROUP_M": tiling.group_m,
        "HAS_BIAS": has_bias,
        "OUTPUTS": outputs,
        "PACKED": tiling.path == "gluon packed",
        "SWIZZLED": swizzles(B, tiling),
    }


def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, y: Tensor, pattern: Pattern, tiling: Tiling
) -> None:
    """Write y [N, R*B] from x [N, C*B], values [R, slots, B, B], bias [R*B]; see `takes`."""
    from blockell_kernels._gluon._descriptors import block_descriptor, descriptor, weight_descriptor
    from blockell_kernels._gluon._forward_kernels import forward_by_pieces
    from blockell_kernels._gluon._panels import ROW, packed

    B, outputs, panel = pattern.B, tiling.BN, min(pattern.B, DEPTH)
    units, rows = pattern.R * B // outputs, max(1, outputs // B)
    if swizzles(B, tiling):
        w = weight_descriptor(values, rows, panel)
    else:
        w = block_descriptor(values, rows, min(B, outputs), panel)
    if tiling.path == "gluon packed":
        boxes = descriptor(packed(x, B), [64 * B // ROW, ROW], swizzled=False)
    else:
        boxes = descriptor(x, [64, panel])
    launch(
        forward_by_pieces,
        (min(ceil_div(x.shape[0], tiling.BM) * units, num_sms(x.device)),),
        boxes,
        w,
        descriptor(y, [64, outputs]),
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
