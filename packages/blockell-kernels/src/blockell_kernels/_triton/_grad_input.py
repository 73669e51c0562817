"""Launches the input gradient.

Legend: R block rows, C block columns, B tile side, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels._backends import Pattern
from blockell_kernels._gluon import _grad_input as _by_units
from blockell_kernels._gluon import _halves
from blockell_kernels._triton._arithmetic import arithmetic
from blockell_kernels._triton._device import describable, num_sms, on_its_device
from blockell_kernels._triton._few_tokens import add_parts_of
from blockell_kernels._triton._grad_input_kernels import (
    grad_input_descriptors,
    grad_input_pointers,
)
from blockell_kernels._triton._launch import descriptor, launch
from blockell_kernels._triton._tiling import (
    Tiling,
    ceil_div,
    power_of_two_divisor,
    round_up_to_power_of_two,
)

# With more columns than this, their order matters little and sorting them costs too much.
MAX_SORTED_COLUMNS = 32


def _sorted_columns(pattern: Pattern) -> int:
    return round_up_to_power_of_two(pattern.C) if pattern.C <= MAX_SORTED_COLUMNS else 0


@on_its_device
def grad_input(dy: Tensor, values: Tensor, pattern: Pattern, tiling: Tiling) -> Tensor:
    """dx [N, C*B] from dy [N, R*B] and values [R, slots, B, B]."""
    B = pattern.B
    dx = torch.empty(dy.shape[0], pattern.C * B, dtype=dy.dtype, device=dy.device)
    if dx.numel() == 0:
        return dx
    order, col_start = pattern.transposed()
    if _by_units.takes(dy, values, dx, pattern, tiling):
        _by_units.grad_input(dy, values, order, col_start, dx, pattern, tiling)
        return dx
    if _halves.takes("grad_input", dy, values, pattern, tiling):
        _halves.grad_input(dy, values, order, col_start, dx, pattern, tiling)
        return dx
    tiling = tiling.otherwise or tiling
    # A step of descriptors covers whole blocks of one row group, or a part of one block.
    by_descriptors = (
        tiling.path == "descriptors"
        and B >= 16
        and power_of_two_divisor(pattern.row_group * B) % tiling.BK == 0
        and describable(dy)
        and describable(values)
        and describable(dx)
    )
    run = _by_descriptors if by_descriptors else _by_pointers
    run(dy, values, order, col_start, dx, pattern, tiling)
    return dx


def _by_pointers(
    dy: Tensor,
    values: Tensor,
    order: Tensor,
    col_start: Tensor,
    dx: Tensor,
    pattern: Pattern,
    tiling: Tiling,
) -> None:
    N, in_features = dx.shape
    BN = min(tiling.BN, pattern.B)
    launch(
        grad_input_pointers,
        (ceil_div(N, tiling.BM) * (in_features // BN),),
        dy,
        values,
        order,
        col_start,
        dx,
        N,
        pattern.slots,
        in_features,
        dy.stride(0),
        dy.stride(1),
        B=pattern.B,
        COLUMNS=_sorted_columns(pattern),
        BM=tiling.BM,
        BN=max(BN, 16),
        BN_LIVE=BN,
        BK=tiling.BK,
        EVEN_K=pattern.row_group * pattern.B % tiling.BK == 0,
        GROUP_M=tiling.group_m,
        **arithmetic(dy, tiling),
    )


def _by_descriptors(
    dy: Tensor,
    values: Tensor,
    order: Tensor,
    col_start: Tensor,
    dx: Tensor,
    pattern: Pattern,
    tiling: Tiling,
) -> None:
    N, in_features = dx.shape
    B, BM, BK = pattern.B, tiling.BM, tiling.BK
    BN = min(tiling.BN, B)
    rows = max(1, BK // B)
    tiles = ceil_div(N, BM) * (in_features // BN)
    programs = tiling.persistent * num_sms(dy.device)
    store_parts = tiling.store_parts if BN >= 32 else 1
    parts, summed = max(1, tiling.parts), dx
    if parts > 1:
        summed = torch.empty(parts, N, in_features, dtype=torch.float32, device=dx.device)
    launch(
        grad_input_descriptors,
        (min(programs, tiles) if programs else tiles, parts),
        descriptor(dy, [BM, BK]),
        descriptor(values, [rows, 1, BK // rows, BN]),
        descriptor(dx, [BM, BN // store_parts]),
        summed,
        order,
        col_start,
        N,
        pattern.slots,
        in_features,
        parts,
        B=B,
        COLUMNS=_sorted_columns(pattern),
        BM=BM,
        BN=BN,
        BK=BK,
        GROUP_M=tiling.group_m,
        STORE_PARTS=store_parts,
        PROGRAMS=programs,
        PARTS=parts > 1,
        **arithmetic(dy, tiling),
    )
    if parts > 1:
        add_parts_of(summed, None, dx)
