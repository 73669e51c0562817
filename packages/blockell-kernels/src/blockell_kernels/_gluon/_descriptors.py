"""Tensor descriptors as Gluon takes them: with the layout that a box has in shared memory.

Legend: R block rows, B tile side.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from blockell_kernels._gluon._swizzle_kernels import swizzle
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._tiling import ceil_div

SWIZZLE_BLOCK = 2048
"""Elements per program of the kernel that swizzles the weight."""


@cache
def _layout(width_bytes: int, rank: int) -> Any:
    """Swizzled over the whole width of a box, up to the 128 bytes that the hardware swizzles."""
    return NVMMASharedLayout(min(128, width_bytes), 16, rank)


def descriptor(t: Tensor, box: list[int], swizzled: bool = True) -> TensorDescriptor:
    """Boxes of a 16-bit tensor that is `describable`, unchecked."""
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = t, t.shape, t.stride(), box
    made.layout, made.padding = _layout(2 * box[-1] if swizzled else 0, len(box)), "zero"
    return made


def rearranged(B: int) -> bool:
    """Whether the weight is swizzled first, so that its blocks are loaded in rows of 512 bytes.

    The copy engine takes a row in some 1.6 clocks, however short; those of small tiles are.
    """
    return B < 64


def block_descriptor(values: Tensor, rows: int, lines: int, width: int) -> TensorDescriptor:
    """Boxes of `rows` block rows times `lines` of one slot of values [R, slots, B, B]."""
    R, slots, B, _ = values.shape
    return descriptor(values.view(R, slots * B, B), [rows, lines, width])


def weight_descriptor(values: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Boxes of `rows` block rows times one slot of values [R, slots, B, B].

    Of tiles of 64 and above, boxes `width` wide; of tiles below, whole blocks, which lie in shared
    memory as if they had been swizzled on the way.
    """
    R, B = values.shape[0], values.shape[-1]
    if not rearranged(B):
        return block_descriptor(values, rows, B, width)
    image = torch.empty_like(values)
    grid = (ceil_div(values.numel(), SWIZZLE_BLOCK),)
    launch(swizzle, grid, values, image, values.numel(), B=B, BLOCK=SWIZZLE_BLOCK, num_warps=4)
    return descriptor(image.view(R, -1, 256), [rows, B * B // 256, 256], swizzled=False)
