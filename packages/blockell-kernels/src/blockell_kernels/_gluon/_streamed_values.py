"""Launches the weight gradient of few tokens and many blocks.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

from torch import Tensor

from blockell_kernels._backends import Pattern
from blockell_kernels._gluon._grad_values import outputs_of, product_of, together
from blockell_kernels._gluon._support import runs_on
from blockell_kernels._triton._device import describable, num_sms
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._tiling import Tiling, ceil_div

SHARED_BYTES = 223 * 1024


def takes(dy: Tensor, x: Tensor, pattern: Pattern, tiling: Tiling) -> bool:
    """Whether the kernel can run a product by this tiling."""
    B, outputs = pattern.B, outputs_of(pattern.B, pattern.row_group)
    return (
        tiling.path in ("gluon streamed", "gluon streamed packed")
        and runs_on(dy)
        and (16 <= B <= 32 or (B > 32 and tiling.path == "gluon streamed"))
        and outputs > 0
        and product_of(min(tiling.BM, outputs), tiling.BN) >= min(B, 64)
        and describable(dy)
        and describable(x)
    )


def constants(B: int, outputs: int, columns: int, packed: bool) -> dict[str, int | bool]:
    """The kernel's compile-time parameters, of a tile of 64 to 256 columns."""
    panel = min(B, 64)
    stage = (outputs + columns) * 64 * 2
    return {
        "B": B,
        "OUTPUTS": outputs,
        "PANEL": panel,
        "PANELS": columns // panel,
        "WIDTH": min(128, product_of(outputs, columns)),
        "STAGES": min(6, (SHARED_BYTES - outputs * columns * 2) // stage),
        "PACKED": packed,
    }


def grad_values(dy: Tensor, x: Tensor, out: Tensor, pattern: Pattern, tiling: Tiling) -> None:
    """Write the live slots of out [R, slots, B, B] from dy [N, R*B] and x [N, C*B]; see `takes`."""
    from blockell_kernels._gluon._descriptors import descriptor
    from blockell_kernels._gluon._panels import packed
    from blockell_kernels._gluon._streamed_values_kernels import grad_values_streamed

    R, B, K, slots = pattern.R, pattern.B, pattern.num_live, pattern.slots
    outputs = min(tiling.BM, outputs_of(B, pattern.row_group))
    kernel = constants(B, outputs, tiling.BN, tiling.path == "gluon streamed packed")
    chunks = ceil_div(K * B, tiling.BN)
    units = R * B // outputs
    tiles = units * chunks
    if kernel["PACKED"]:
        boxes = descriptor(packed(x, B), [B // 4, 256], swizzled=False)
    else:
        boxes = descriptor(x, [64, kernel["PANEL"]])
    launch(
        grad_values_streamed,
        (min(tiles, num_sms(x.device)),),
        descriptor(dy, [64, 64]),
        boxes,
        descriptor(out.view(R * slots * B, B), [64, kernel["WIDTH"]] if B == 128 else [B, B]),
        pattern.col_indices,
        x.shape[0],
        slots,
        K,
        pattern.C,
        units,
        chunks,
        together(pattern),
        tiles,
        R * slots * B,
        **kernel,
        num_warps=4,
    )
