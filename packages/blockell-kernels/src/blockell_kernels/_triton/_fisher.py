"""Launches the Fisher trace's reductions.

Legend: M blocks of a row, B tile side, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels._triton._device import on_its_device
from blockell_kernels._triton._fisher_kernels import token_square_sums
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._tiling import ceil_div

_WIDTH, _TOKENS = 256, 32


@on_its_device
def token_sums_sq(t: Tensor, B: int) -> Tensor:
    """float32 [N, M]: sum of squares of every token's blocks, t [N, M*B]."""
    N, M = t.shape[0], t.shape[1] // B
    sums = torch.empty(N, M, dtype=torch.float32, device=t.device)
    MB = max(1, _WIDTH // B)
    if N:
        launch(
            token_square_sums,
            (ceil_div(N, _TOKENS), ceil_div(M, MB)),
            t,
            sums,
            N,
            M,
            t.stride(0),
            t.stride(1),
            B=B,
            MB=MB,
            BT=_TOKENS,
            num_warps=8,
        )
    return sums
