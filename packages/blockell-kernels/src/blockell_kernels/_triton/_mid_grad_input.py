"""Tilings of the input gradient below `LONG_TOKENS` tokens, of 16-bit operands on Hopper."""

from __future__ import annotations

from blockell_kernels._backends import Case
from blockell_kernels._triton._tiling import Tiling


def tiling_for(case: Case) -> Tiling | None:
    """The tiling of a case, None: that of the general rules."""
    return None
