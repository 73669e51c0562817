"""Which blocks a task uses, and which it has changed.

Legend: R block rows, C block columns, B tile side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cms_topology._retention._consolidation import LayerMemory


def used_blocks(memory: LayerMemory, share: float = 0.9) -> Tensor:
    """Smallest set of blocks that carries `share` of a layer's usage: bool [R, C].

    Blocks that were absent at the consolidation do not count. Pass the memory of one task alone.

    Raises:
        ValueError: the memory holds no usage (`consolidate(usage="none")`).
    """
    if memory.usage is None:
        raise ValueError(
            "memory.usage (=None) must hold the usage of the blocks; consolidate with usage='loss' "
            "or 'sampled'."
        )
    usage = memory.usage
    return largest_share(usage if memory.live is None else usage * memory.live, share)


def changed_blocks(before: Tensor, after: Tensor, tile: int, share: float = 0.9) -> Tensor:
    """Smallest set of blocks that carries `share` of the squared change of a weight: bool [R, C].

    Args:
        before, after: dense weights [R * B, C * B], from `CMSBlockLinear.to_dense()` for example.
        tile: B.
        share: in (0, 1].
    """
    if before.shape != after.shape or before.shape[0] % tile or before.shape[1] % tile:
        raise ValueError(
            f"before (shape {tuple(before.shape)}) and after (shape {tuple(after.shape)}) must be "
            f"weights of one layer, their sides multiples of tile (={tile})."
        )
    change = (after - before).detach().double().square()
    R, C = before.shape[0] // tile, before.shape[1] // tile
    return largest_share(change.view(R, tile, C, tile).sum((1, 3)), share)


def largest_share(amount: Tensor, share: float) -> Tensor:
    """Smallest set of entries whose sum is at least `share` of the total; bool, same shape."""
    if not 0 < share <= 1:
        raise ValueError(f"share (={share}) must be in (0, 1].")
    flat, order = amount.flatten().double().sort(descending=True, stable=True)
    # an entry belongs if those before it do not suffice, and it is not nothing
    needed = (flat.cumsum(0) - flat < share * flat.sum()) & (flat > 0)
    return torch.zeros_like(needed).scatter_(0, order, needed).view(amount.shape)
