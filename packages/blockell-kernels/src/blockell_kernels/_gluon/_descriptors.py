"""Tensor descriptors as Gluon takes them: with the layout that a box has in shared memory."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@cache
def _layout(width_bytes: int, rank: int) -> Any:
    """Swizzled over the whole width of a box, up to the 128 bytes that the hardware swizzles."""
    return NVMMASharedLayout(min(128, width_bytes), 16, rank)


def descriptor(t: Tensor, box: list[int]) -> TensorDescriptor:
    """Boxes of a 16-bit tensor that is `describable`, unchecked."""
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = t, t.shape, t.stride(), box
    made.layout, made.padding = _layout(2 * box[-1], len(box)), "zero"
    return made
