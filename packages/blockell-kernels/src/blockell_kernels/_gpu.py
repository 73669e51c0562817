"""The door from the portable code to the GPU kernels that move and measure whole blocks."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

TILE_SIZES = (8, 16, 32, 64, 128)
"""Tiles that the Triton kernels take."""


def gpu_blocks(t: Tensor, B: int) -> ModuleType | None:
    """The module of Triton kernels for blocks of side B on the device of `t`; None: torch's own.

    The kernels need one launch where torch's operations need several.
    """
    if not t.is_cuda or B not in TILE_SIZES:
        return None
    try:
        from blockell_kernels._triton import _blocks
    except ImportError:  # no Triton on this platform
        return None
    return _blocks
