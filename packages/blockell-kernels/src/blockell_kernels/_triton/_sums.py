"""Launches sums over tokens: the bias gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels._triton._device import num_sms, on_its_device
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._sum_kernels import sum_rows
from blockell_kernels._triton._tiling import ceil_div

_TILES = {2: (64, 64), 4: (256, 32)}
"""Rows and columns that a program adds up at a time, by bytes of an element."""
_FEW_ROWS = 512
"""Up to this many rows are added up in one launch."""
_WAVES = 16
"""Programs per multiprocessor, at most."""


@on_its_device
def column_sums(t: Tensor, dtype: torch.dtype) -> Tensor:
    """[width] of that dtype: the rows of t [N, width] added up in float32, in a fixed order."""
    N, width = t.shape
    BT, BW = _TILES[t.element_size()]
    if N > _FEW_ROWS:
        most = ceil_div(_WAVES * num_sms(t.device), ceil_div(width, BW))
        t = _summed(t, min(ceil_div(N, BT), most, _FEW_ROWS), torch.float32)
    return _summed(t, 1, dtype).view(width)


def _summed(t: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """[parts, width] of t [N, width], or fewer parts."""
    N, width = t.shape
    BT, BW = _TILES[t.element_size()]
    rows_per_part = max(BT, ceil_div(ceil_div(N, parts), BT) * BT)
    parts = max(1, ceil_div(N, rows_per_part))
    out = torch.empty(parts, width, dtype=dtype, device=t.device)
    if width:
        launch(
            sum_rows,
            (ceil_div(width, BW), parts),
            t,
            out,
            N,
            width,
            t.stride(0),
            t.stride(1),
            rows_per_part,
            BT=BT,
            BW=BW,
            num_warps=8 if BT > 64 else 4,
        )
    return out
