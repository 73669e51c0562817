"""A sum whose order of additions is known."""

from __future__ import annotations

import torch
from torch import Tensor


def ordered_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over `dim`, halves onto halves; same bits whatever else the tensor holds, on any device.

    `torch.sum` adds up in an order that depends on the other dimensions, on the number of threads,
    and on the device: then layers summed together and layers summed alone could swap other blocks.
    """
    size = 1 << (x.shape[dim] - 1).bit_length() if x.shape[dim] > 0 else 1
    missing = list(x.shape)
    missing[dim] = size - x.shape[dim]
    if missing[dim] > 0:
        x = torch.cat((x, x.new_zeros(missing)), dim)
    while size > 1:
        size //= 2
        x = x.narrow(dim, 0, size) + x.narrow(dim, size, size)
    return x.squeeze(dim)
