"""The doors from the portable code to GPU kernels that are used beside any product."""

from __future__ import annotations

from types import ModuleType

import torch
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


def gpu_sums(t: Tensor) -> ModuleType | None:
    """The module of the Triton kernel that adds up rows, for `t`; None: torch's own."""
    if not t.is_cuda or t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    try:
        from blockell_kernels._triton import _sums
    except ImportError:  # no Triton on this platform
        return None
    return _sums


def gpu_mlp() -> ModuleType | None:
    """The module of the products that an activation rides on; None: no Triton on this platform."""
    try:
        from blockell_kernels._triton import _mlp
    except ImportError:
        return None
    return _mlp
