"""Launches the forward product, with an activation function in its epilogue if asked.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels._backends import Pattern
from blockell_kernels._gluon import _forward as _by_pieces
from blockell_kernels._gluon import _halves
from blockell_kernels._triton._activate import arithmetic
from blockell_kernels._triton._blocks import pack
from blockell_kernels._triton._device import (
    describable,
    dot_precision,
    far_apart,
    num_sms,
    on_its_device,
    upcast,
)
from blockell_kernels._triton._forward_kernels import (
    forward_descriptors,
    forward_packed,
    forward_pointers,
)
from blockell_kernels._triton._launch import descriptor, launch
from blockell_kernels._triton._tiling import Tiling, ceil_div, power_of_two_divisor


def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, tiling: Tiling
) -> Tensor:
    """y [N, R*B] from x [N, C*B], values [R, slots, B, B], bias [R*B]."""
    return forward_activated(x, values, bias, pattern, tiling, "none", False)[0]


@on_its_device
def forward_activated(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    tiling: Tiling,
    activation: str,
    keep_pre: bool,
) -> tuple[Tensor, Tensor | None]:
    """(f(h), h) for h = x W^T + bias [N, R*B]; None instead of h unless `keep_pre`."""
    y = torch.empty(x.shape[0], pattern.R * pattern.B, dtype=x.dtype, device=x.device)
    pre = torch.empty_like(y) if keep_pre and activation != "none" else None
    if y.numel() == 0:
        return y, y if keep_pre else None
    if activation == "none" and _by_pieces.takes(x, values, y, pattern, tiling):
        _by_pieces.forward(x, values, bias, y, pattern, tiling)
        return y, y if keep_pre else None
    if _halves.takes("forward", x, values, pattern, tiling):
        _halves.forward(x, values, bias, y, pre, pattern, tiling, activation)
        return y, y if keep_pre and pre is None else pre
    tiling = tiling.otherwise or tiling
    BN = min(tiling.BN, power_of_two_divisor(pattern.row_group * pattern.B))
    by_descriptors = (
        tiling.path == "descriptors"
        and pattern.B % tiling.BK == 0
        and BN >= 16
        and describable(x)
        and describable(values)
        and describable(y)
    )
    if tiling.path == "packed" and BN >= 16 and describable(y):
        run = _by_packing
    else:
        run = _by_descriptors if by_descriptors else _by_pointers
    run(x, values, bias, y, pre, pattern, tiling, BN, activation)
    return y, y if keep_pre and pre is None else pre


def _by_pointers(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    y: Tensor,
    pre: Tensor | None,
    pattern: Pattern,
    tiling: Tiling,
    BN: int,
    activation: str,
) -> None:
    N, out_features = y.shape
    live = pattern.num_live * pattern.B
    grid = (ceil_div(N, tiling.BM) * (out_features // BN),)
    launch(
        forward_pointers,
        grid,
        x,
        values,
        pattern.col_indices,
        y if bias is None else bias,
        y,
        pre,
        N,
        pattern.slots,
        pattern.num_live,
        out_features,
        x.stride(0),
        x.stride(1),
        B=pattern.B,
        BM=tiling.BM,
        BN=max(BN, 16),
        BN_LIVE=BN,
        BK=tiling.BK,
        EVEN_K=live % tiling.BK == 0,
        GROUP_M=tiling.group_m,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        ARITHMETIC=arithmetic(y),
        KEEP_PRE=pre is not None,
        PRECISION=dot_precision(x.dtype, x.device),
        UPCAST=upcast(x),
        FAR=far_apart(x),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )


def _by_descriptors(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    y: Tensor,
    pre: Tensor | None,
    pattern: Pattern,
    tiling: Tiling,
    BN: int,
    activation: str,
) -> None:
    N, out_features = y.shape
    B, BM, BK = pattern.B, tiling.BM, tiling.BK
    rows = max(1, BN // B)
    tiles = ceil_div(N, BM) * (out_features // BN)
    programs = tiling.persistent * num_sms(x.device)
    parts = tiling.store_parts if BN >= 32 else 1
    y_desc = descriptor(y, [BM, BN // parts])
    launch(
        forward_descriptors,
        (min(programs, tiles) if programs else tiles,),
        descriptor(x, [BM, BK]),
        descriptor(values, [rows, 1, BN // rows, BK]),
        y_desc,
        None if pre is None else descriptor(pre, [BM, BN // parts]),
        pattern.col_indices,
        y if bias is None else bias,
        N,
        pattern.slots,
        pattern.num_live,
        out_features,
        B=B,
        BM=BM,
        BN=BN,
        BK=BK,
        GROUP_M=tiling.group_m,
        STORE_PARTS=parts,
        PROGRAMS=programs,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        ARITHMETIC=arithmetic(y),
        KEEP_PRE=pre is not None,
        PRECISION=dot_precision(x.dtype, x.device),
        UPCAST=upcast(x),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )


def _by_packing(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    y: Tensor,
    pre: Tensor | None,
    pattern: Pattern,
    tiling: Tiling,
    BN: int,
    activation: str,
) -> None:
    N, out_features = y.shape
    B, BM, BK = pattern.B, tiling.BM, max(tiling.BK, pattern.B)
    packed = pack(values, pattern, BK)
    parts = tiling.store_parts if BN >= 32 else 1
    y_desc = descriptor(y, [BM, BN // parts])
    launch(
        forward_packed,
        (ceil_div(N, BM) * (out_features // BN),),
        x,
        descriptor(packed, [BN, BK]),
        y_desc,
        None if pre is None else descriptor(pre, [BM, BN // parts]),
        pattern.col_indices,
        y if bias is None else bias,
        N,
        pattern.slots,
        pattern.num_live,
        out_features,
        x.stride(0),
        x.stride(1),
        B=B,
        BM=BM,
        BN=BN,
        BK=BK,
        EVEN_K=pattern.num_live * B % BK == 0,
        GROUP_M=tiling.group_m,
        STORE_PARTS=parts,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        ARITHMETIC=arithmetic(y),
        KEEP_PRE=pre is not None,
        PRECISION=dot_precision(x.dtype, x.device),
        UPCAST=upcast(x),
        FAR=far_apart(x),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
