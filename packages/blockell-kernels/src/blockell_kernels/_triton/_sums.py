"""Launches sums over tokens: the bias gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels._triton._device import num_sms, on_its_device
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._replay import replayed
from blockell_kernels._triton._sum_kernels import sum_rows
from blockell_kernels._triton._tiling import ceil_div

_FEW_ROWS = 512
"""Up to this many rows are added up in one launch."""
_WAVES = 16
"""Programs per multiprocessor, at most."""


def _tiling(t: Tensor) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, tiles that a program adds up at a time, its warps.

    8192 x 640 in bfloat16 take 5.9 us by this, by one tile of 64 x 64 8.4 (H200, hot L2).
    """
    if t.element_size() == 2:
        return 16, 64, 8, 2
    return (64, 32, 1, 4) if t.shape[0] <= 64 else (256, 32, 1, 8)


@replayed
@on_its_device
def column_sums(t: Tensor, dtype: torch.dtype) -> Tensor:
    """[width] of that dtype: the rows of t [N, width] added up in float32, in a fixed order."""
    N, width = t.shape
    BT, BW, tiles, _ = _tiling(t)
    if N > _FEW_ROWS:
        most = ceil_div(_WAVES * num_sms(t.device), ceil_div(width, BW))
        t = _summed(t, min(ceil_div(N, BT * tiles), most, _FEW_ROWS), torch.float32)
    return _summed(t, 1, dtype).view(width)


def _summed(t: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """[parts, width] of t [N, width], or fewer parts."""
    N, width = t.shape
    BT, BW, tiles, warps = _tiling(t)
    rows_per_part = max(1, ceil_div(ceil_div(N, parts), BT * tiles)) * BT * tiles
    parts = max(1, ceil_div(N, rows_per_part))
    out = torch.empty(parts, width, dtype=dtype, device=t.device)
    if width:
        launch(
            sum_rows,
            (parts, ceil_div(width, BW)),
            t,
            out,
            N,
            width,
            t.stride(0),
            t.stride(1),
            rows_per_part,
            BT=BT,
            BW=BW,
            TILES=tiles,
            num_warps=warps,
        )
    return out
