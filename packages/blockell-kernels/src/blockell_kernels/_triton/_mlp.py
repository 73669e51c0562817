"""Launches the products that an MLP's activation rides on: fc1, and fc2's input gradient.

Legend: R block rows, C block columns, B tile side of fc2, N tokens; h pre-activation, a = f(h).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from blockell_kernels._backends import Case, Direction, Pattern
from blockell_kernels._dense import to_dense
from blockell_kernels._gluon import _halves
from blockell_kernels._gluon import _mlp as _by_turns
from blockell_kernels._triton import _mlp_rule as rule
from blockell_kernels._triton._activate import arithmetic
from blockell_kernels._triton._device import (
    describable,
    dot_precision,
    num_sms,
    on_its_device,
    upcast,
)
from blockell_kernels._triton._forward import forward_activated as _forward_activated
from blockell_kernels._triton._grad_input import _sorted_columns
from blockell_kernels._triton._launch import descriptor, launch
from blockell_kernels._triton._mlp_kernels import grad_input_activated as kernel
from blockell_kernels._triton._mlp_rule import Way
from blockell_kernels._triton._replay import replayed
from blockell_kernels._triton._tiling import Tiling, ceil_div


class Middle(NamedTuple):
    """What the kernel returns."""

    dh: Tensor
    """[N, C*B]"""
    a: Tensor | None
    """f(h), if it was asked for."""
    sums: Tensor | None
    """Float32 [any, C*B], which add up to the sum of dh over the tokens, if that was asked for."""


@replayed
def forward_activated(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    activation: str,
    keep_pre: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """(f(h), h or None) for h = x W^T + bias [N, R*B]; None where two passes are better."""
    way = forward_way(x, values, pattern, activation)
    if way.kernel == "turns":
        return _by_turns.forward(x, values, bias, pattern, activation, keep_pre)
    if way.tiling is None:
        return None
    return _forward_activated(x, values, bias, pattern, way.tiling, activation, keep_pre)


def forward_way(x: Tensor, values: Tensor, pattern: Pattern, activation: str) -> Way:
    """How `forward_activated` computes."""
    case = _case("forward", x, pattern)
    halves = _halves.chosen(case)
    if halves is not None and not _halves.reads(x, values, pattern.B):
        halves = None
    by_turns = _by_turns.forward_takes(x, values, pattern)
    return rule.forward_way(case, activation, halves, by_turns)


@replayed
def middle(
    dy: Tensor,
    values: Tensor,
    weight: Tensor | None,
    pattern: Pattern,
    pre: Tensor,
    activation: str,
    *,
    sparse: bool,
    dense: bool,
    keep_a: bool,
    need_bias: bool,
    overwrite: bool = False,
) -> Middle | None:
    """See `grad_input_activated`; None where two passes are better, or the only way.

    Args:
        dy, values, pattern, pre, activation, keep_a, need_bias, overwrite: see
            `grad_input_activated`.
        weight: the dense weight [out, hidden], if there is one already.
        sparse: whether the input gradient alone is chosen to be sparse.
        dense: whether it may be computed by a dense weight.
    """
    way = middle_way(dy, values, pattern, pre, sparse=sparse, dense=dense, keep_a=keep_a)
    wants = {"keep_a": keep_a, "need_bias": need_bias, "overwrite": overwrite}
    if way.kernel == "turns":
        return Middle(*_by_turns.middle(dy, values, pattern, pre, activation, **wants))
    if way.kernel == "dense turns":
        weight = to_dense(values, pattern) if weight is None else weight
        return Middle(*_by_turns.middle(dy, weight, None, pre, activation, **wants))
    if way.tiling is None:
        return None
    return grad_input_activated(dy, values, pattern, pre, activation, tiling=way.tiling, **wants)


def middle_way(
    dy: Tensor,
    values: Tensor,
    pattern: Pattern,
    pre: Tensor,
    *,
    sparse: bool,
    dense: bool,
    keep_a: bool,
) -> Way:
    """How `middle` computes."""
    case = _case("grad_input", dy, pattern)
    return rule.middle_way(
        case,
        sparse=sparse,
        dense=dense,
        keep_a=keep_a,
        halves=_halves.chosen(case) is not None and _halves.reads(dy, values, pattern.B),
        by_turns=_by_turns.middle_takes(dy, values, pattern, pre),
        dense_by_turns=_by_turns.dense_middle_takes(dy, pre),
    )


def _case(direction: Direction, operand: Tensor, pattern: Pattern) -> Case:
    p = pattern
    sizes = (operand.shape[0], p.R, p.C, p.num_live, p.B, p.row_group)
    return Case(direction, operand.device, operand.dtype, *sizes)


@on_its_device
def grad_input_activated(
    dy: Tensor,
    values: Tensor,
    pattern: Pattern,
    pre: Tensor,
    activation: str,
    *,
    keep_a: bool,
    need_bias: bool,
    tiling: Tiling,
    overwrite: bool = False,
) -> Middle | None:
    """From dy [N, R*B], values [R, slots, B, B] and h [N, C*B]; None where TMA cannot read them.

    `overwrite`: a, or dh where a is not asked for, may take the memory of h, of which a program
    reads a tile before it writes it.
    """
    N, in_features = pre.shape
    B, BM, BK = pattern.B, tiling.BM, tiling.BK
    BN = min(tiling.BN, B)
    if not all(map(describable, (dy, values, pre))) or (BK > B and pattern.row_group * B < BK):
        return None
    spare = pre if overwrite else torch.empty_like(pre)
    dh, a = (torch.empty_like(pre), spare) if keep_a else (spare, None)
    token_tiles = ceil_div(N, BM)
    sums = None
    if need_bias:
        sums = torch.empty(token_tiles, in_features, dtype=torch.float32, device=dy.device)
    if N == 0:
        return Middle(dh, a, sums)
    order, col_start = pattern.transposed()
    tiles = token_tiles * (in_features // BN)
    programs = tiling.persistent * num_sms(dy.device)
    parts = tiling.store_parts if BN >= 32 else 1
    rows = max(1, BK // B)
    box = [BM, BN // parts]
    launch(
        kernel,
        (min(programs, tiles) if programs else tiles,),
        descriptor(dy, [BM, BK]),
        descriptor(values, [rows, 1, BK // rows, BN]),
        descriptor(dh, box),
        descriptor(pre, box),
        None if a is None else descriptor(a, box),
        sums,
        order,
        col_start,
        N,
        pattern.slots,
        in_features,
        B=B,
        COLUMNS=_sorted_columns(pattern),
        BM=BM,
        BN=BN,
        BK=BK,
        GROUP_M=tiling.group_m,
        STORE_PARTS=parts,
        PROGRAMS=programs,
        ACTIVATION=activation,
        ARITHMETIC=arithmetic(dh),
        PRECISION=dot_precision(dy.dtype, dy.device),
        UPCAST=upcast(dy),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return Middle(dh, a, sums)
