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
from blockell_kernels._triton._activate import arithmetic
from blockell_kernels._triton._device import (
    capability,
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
from blockell_kernels._triton._tiling import Tiling, ceil_div
from blockell_kernels._triton._tilings import tiling_for as forward_tiling_for

FEW_TOKENS = 512
"""Below this many tokens the passes over memory cost nothing next to the launches."""
PATHS = ("pointers", "descriptors", "packed")
"""Ways of the forward product that take an activation."""
DEEP, DEEP_ALONE = 1024, 256
"""Products summed per element of da from which f' rides on them, where a is computed again with it
and where not. On shorter sums the epilogue takes longer than the products and nothing runs beside
it; a pass of its own through L2 is faster then. Measured at 8192 tokens, 640 -> 2560, half dense
(320 products): 74 us with it and 100 with a, too; without 36 and 34 to 46 for the pass."""


SHALLOW = 1024
"""Products summed per element up to which the Gluon kernels "by turns" win, from `TURNS_TOKENS` on:
their tiles are 128 x 128, which longer sums pay for in bytes from L2. Measured with 2048 to 65536
tokens in tile 128: up to 1536 -> 6144 they gained 7 to 15% of a whole step, of 4096 -> 14336 they
lost 4 to 6%."""
TURNS_TOKENS = 2048


class Middle(NamedTuple):
    """What the kernel returns."""

    dh: Tensor
    """[N, C*B]"""
    a: Tensor | None
    """f(h), if it was asked for."""
    sums: Tensor | None
    """Float32 [any, C*B], which add up to the sum of dh over the tokens, if that was asked for."""


def forward_activated(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    activation: str,
    keep_pre: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """(f(h), h or None) for h = x W^T + bias [N, R*B]; None where two passes are better."""
    if x.shape[0] < FEW_TOKENS:
        return None
    case = _case("forward", x, pattern)
    if (halves := _halves.chosen(case, x, values)) is not None:
        return _forward_activated(x, values, bias, pattern, halves, activation, keep_pre)
    turns = case.N >= TURNS_TOKENS and case.K * case.B <= SHALLOW and activation != "none"
    if turns and _by_turns.forward_takes(x, values, pattern):
        return _by_turns.forward(x, values, bias, pattern, activation, keep_pre)
    tiling = forward_tiling_for(case)
    # A pass over h costs more than the Gluon kernels, which take no activation, save.
    tiling = tiling.otherwise or tiling
    if tiling.path not in PATHS:
        return None
    return _forward_activated(x, values, bias, pattern, tiling, activation, keep_pre)


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
    case = _case("grad_input", dy, pattern)
    if case.N < FEW_TOKENS or _halves.chosen(case, dy, values) is not None:
        return None
    wants = {"keep_a": keep_a, "need_bias": need_bias, "overwrite": overwrite}
    turns, depth = case.N >= TURNS_TOKENS, case.R * case.B
    shallow = turns and case.density * depth < SHALLOW
    if sparse and shallow and _by_turns.middle_takes(dy, values, pattern, pre):
        return Middle(*_by_turns.middle(dy, values, pattern, pre, activation, **wants))
    wide_blocks = sparse and case.B == 128  # which another kernel takes without a copy
    dense = dense and turns and depth <= SHALLOW and not wide_blocks
    if dense and _by_turns.dense_middle_takes(dy, pre):
        weight = to_dense(values, pattern) if weight is None else weight
        return Middle(*_by_turns.middle(dy, weight, None, pre, activation, **wants))
    tiling = middle_tiling_for(case, keep_a) if sparse else None
    if tiling is None:
        return None
    return grad_input_activated(dy, values, pattern, pre, activation, tiling=tiling, **wants)


def _case(direction: Direction, operand: Tensor, pattern: Pattern) -> Case:
    p = pattern
    sizes = (operand.shape[0], p.R, p.C, p.num_live, p.B, p.row_group)
    return Case(direction, operand.device, operand.dtype, *sizes)


def middle_tiling_for(case: Case, keep_a: bool) -> Tiling | None:
    """The tiling of fc2's grad_input with this epilogue; None: two passes are better."""
    B, N = case.B, case.N
    if capability(case.device)[0] != 9 or B < 64 or N < FEW_TOKENS or case.dtype == torch.float32:
        return None
    if case.R * B * case.density < (DEEP if keep_a else DEEP_ALONE):
        return None
    if B == 64:
        return Tiling(path="descriptors", BM=128, BN=64, BK=64, warps=4, stages=4)
    return Tiling(
        path="descriptors", BM=128, BN=128, BK=64, warps=4, stages=3, store_parts=2, persistent=2
    )


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
