"""A packed copy of an operand, from which narrow panels are loaded in long rows.

Legend: C block columns, B tile side, N tokens.
"""

from __future__ import annotations

from torch import Tensor

from blockell_kernels._gluon._swizzle_kernels import pack_panels
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._tiling import ceil_div

TOKENS = 64
"""Of a panel."""
ROW = 256
"""Elements of a row of the copy: what a box of it is wide."""
COLUMNS = 128
"""Of a program of the kernel that packs."""


def packed(x: Tensor, B: int) -> Tensor:
    """x [N, C*B], 16-bit, as panels [N/64, C, 64, B] in rows of 256; zeros behind the last token.

    Panels lie as the tensor core reads them from shared memory, swizzled over their width. The copy
    engine takes a row in some 1.6 clocks, however short: panels of tile 16 are loaded in rows of
    512 bytes instead of 32.
    """
    N, columns = x.shape
    blocks = ceil_div(N, TOKENS)
    image = x.new_empty(blocks * columns * TOKENS // ROW, ROW)
    launch(
        pack_panels,
        (blocks, ceil_div(columns, COLUMNS)),
        x,
        image,
        N,
        columns,
        x.stride(0),
        B=B,
        BT=TOKENS,
        BW=COLUMNS,
        num_warps=4,
    )
    return image
