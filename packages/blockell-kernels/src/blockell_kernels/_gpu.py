"""The doors from the portable code to GPU kernels that are used beside any product."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

TILE_SIZES = (8, 16, 32, 64, 128)
"""Tiles that the Triton kernels take."""
_SUMMED = (torch.float32, torch.float16, torch.bfloat16)


@cache
def _kernels(name: str) -> ModuleType | None:
    """A module of Triton kernels, looked up once; None: no Triton on this platform."""
    try:
        return importlib.import_module(f"blockell_kernels._triton.{name}")
    except ImportError:
        return None


def gpu_blocks(t: Tensor, B: int) -> ModuleType | None:
    """The module of Triton kernels for blocks of side B on the device of `t`; None: torch's own.

    The kernels need one launch where torch's operations need several.
    """
    return _kernels("_blocks") if t.is_cuda and B in TILE_SIZES else None


def gpu_sums(t: Tensor) -> ModuleType | None:
    """The module of the Triton kernel that adds up rows, for `t`; None: torch's own."""
    return _kernels("_sums") if t.is_cuda and t.dtype in _SUMMED else None


def gpu_activations(t: Tensor) -> ModuleType | None:
    """The module of Triton kernels that apply an activation to `t`; None: torch's own."""
    taken = t.is_cuda and t.dtype in _SUMMED and t.is_contiguous()
    return _kernels("_activate") if taken else None


def gpu_mlp() -> ModuleType | None:
    """The module of the products that an activation rides on; None: no Triton on this platform."""
    return _kernels("_mlp")


def gpu_replay(t: Tensor) -> ModuleType | None:
    """The module that runs recorded launches again, on the device of `t`; None: there are none."""
    return _kernels("_replay") if t.is_cuda else None
