"""Tables of addresses and sizes, by which one launch of a kernel reaches many layers' tensors."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

Row = tuple[int, ...]


@functools.lru_cache(maxsize=256)
def address_table(rows: tuple[Row, ...], device: torch.device) -> Tensor:
    """int64 [len(rows), len(rows[0])] on the device, without waiting for it.

    Kept: a training meets the same addresses again and again, so most steps copy nothing.
    """
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
