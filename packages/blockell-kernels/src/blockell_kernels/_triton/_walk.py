"""Launches the products that walk the whole weight and look its blocks up.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens; width: outputs
that share a column list (row_group*B).

Between 32 and 2048 tokens, where rows share too few columns for the other kernels and the dense
product spends more on copying the weight, or its gradient, than on multiplying.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from blockell_kernels._backends import Case, Pattern
from blockell_kernels._triton._arithmetic import arithmetic
from blockell_kernels._triton._device import (
    capability,
    describable,
    num_sms,
    on_its_device,
)
from blockell_kernels._triton._few_tokens import SMALL_WEIGHT, add_parts_of
from blockell_kernels._triton._launch import descriptor, launch
from blockell_kernels._triton._tiling import ceil_div
from blockell_kernels._triton._walk_kernels import (
    walk_forward,
    walk_grad_input,
    walk_grad_values,
)

LARGE_WEIGHT = 2**23
"""Elements of the dense weight from which reading it once, not the launch, is what a few tokens
take."""
LINE = 8
"""Elements loaded or stored together: 16 bytes."""


@dataclass(frozen=True, kw_only=True)
class Walk:
    """One way to run a product.

    forward and grad_input own BM tokens x BN results per program and step BK deep; grad_values owns
    BM rows of the weight x BN columns and steps over BK tokens.
    """

    BM: int
    BN: int
    BK: int = 64
    parts: int = 1
    """Into which the sums are split."""
    boxes: bool = False
    """Whether x or dy is read through a descriptor; grad_values always does."""
    warps: int = 4
    stages: int = 4


@lru_cache(maxsize=4096)
def walk_for(case: Case) -> Walk | None:
    """How to run a case, None: not here."""
    if capability(case.device)[0] != 9:
        return None
    found = _rule(case)
    return found[0] if found is not None and case.density > found[1] else None


def least_density(case: Case) -> float:
    """From which density Hopper GPUs walk; 1 where they never do."""
    found = _rule(case)
    return 1.0 if found is None else found[1]


def _rule(case: Case) -> tuple[Walk, float] | None:
    """A walk and the density from which it wins. Rules read off one H200, at 10 to 100% density.

    A walk takes as long at any density, the other kernels in proportion: hence a density from which
    it wins, by tile.
    """
    if case.dtype.itemsize != 2 or case.N == 0 or case.B > 64:
        return None
    rules = {"forward": _forward, "grad_input": _grad_input, "grad_values": _grad_values}
    return rules[case.direction](case)


def _by_tokens(N: int, *rows: tuple[int, Walk, dict[int, float]]) -> tuple[Walk, dict[int, float]]:
    """The walk and the densities of the first row whose limit N does not exceed."""
    return next((walk, least) for limit, walk, least in rows if limit >= N)


def _rows(N: int) -> int:
    return 16 if N <= 16 else 32 if N <= 32 else 64


def _forward(case: Case) -> tuple[Walk, float] | None:
    N, B = case.N, case.B
    if N > 256 or case.R * case.C * B**2 < LARGE_WEIGHT:
        return None
    walk, least = _by_tokens(
        N,
        (32, Walk(BM=_rows(N), BN=64, BK=128, stages=3), {8: 0.17, 16: 0.4, 32: 0.65}),
        (64, Walk(BM=64, BN=64, BK=128, stages=3), {8: 0.08, 16: 0.32, 32: 0.55}),
        (128, Walk(BM=128, BN=64, boxes=True), {8: 0.08, 16: 0.2, 32: 0.4, 64: 0.65}),
        (256, Walk(BM=128, BN=128, boxes=True, warps=8), {8: 0.08, 16: 0.22, 32: 0.48}),
    )
    if case.row_group * B >= 64 and B < 64:  # the other kernels are faster on such rows
        least = {8: 0.25, 16: 0.42, 32: 0.58} if 64 < N <= 128 else {}
    return walk, least.get(B, 1.0)


def _grad_input(case: Case) -> tuple[Walk, float] | None:
    N, B = case.N, case.B
    if N > 256 or case.R * case.C * B**2 < LARGE_WEIGHT:
        return None
    # Beyond 64 tokens, as many parts as fill the multiprocessors twice, of four at most.
    programs = ceil_div(N, 128) * ceil_div(case.C * B, 64)
    parts = max(1, min(4, int(2.5 * num_sms(case.device)) // programs))
    walk, least = _by_tokens(
        N,
        (32, Walk(BM=_rows(N), BN=64, parts=4), {8: 0.2, 16: 0.52, 32: 0.65}),
        (64, Walk(BM=64, BN=64, parts=4), {8: 0.08, 16: 0.48, 32: 0.6}),
        (128, Walk(BM=128, BN=64, parts=parts, boxes=True), {8: 0.08, 16: 0.35, 32: 0.6}),
        (256, Walk(BM=128, BN=64, parts=parts, boxes=True), {8: 0.08, 16: 0.35, 32: 0.45}),
    )
    if case.row_group > 1 and B >= 16:
        least = {16: 0.35, 32: 0.5} if N > 64 else {}
    return walk, least.get(B, 1.0)


def _grad_values(case: Case) -> tuple[Walk, float] | None:
    N, B, width = case.N, case.B, case.row_group * case.B
    if case.R * case.C * B**2 < SMALL_WEIGHT:
        walk, least = _by_tokens(
            N,
            (16, Walk(BM=64, BN=64), {}),  # the kernels for few tokens
            (32, Walk(BM=64, BN=64, BK=32, stages=2), {8: 0.2, 16: 0.2}),
            (128, Walk(BM=64, BN=64, stages=3), {8: 0.08, 16: 0.2, 32: 0.2}),
            (511, Walk(BM=64, BN=64, stages=3), {8: 0.04, 16: 0.08, 32: 0.08}),
            (2048, Walk(BM=64, BN=128), {8: 0.04, 16: 0.08, 32: 0.08}),
            (16384, Walk(BM=64, BN=128), {8: 0.04, 16: 0.15, 32: 0.2}),
            (N, Walk(BM=64, BN=128), {}),
        )
        if width >= 64:
            least = {8: 0.2, 16: 0.2, 32: 0.6} if 512 <= N <= 4096 else {}
        return walk, least.get(B, 1.0)
    square = Walk(BM=128, BN=128, warps=8 if B == 8 else 4, stages=3)
    walk, least = _by_tokens(
        N,
        (16, square, {}),
        (32, square, {8: 0.45}),
        (64, square, {8: 0.2, 16: 0.46}),
        (128, square, {8: 0.08, 16: 0.2}),
        (512, square, {8: 0.06, 16: 0.2, 32: 0.4}),
        (16384, Walk(BM=128, BN=256, warps=8, stages=3), {8: 0.06, 16: 0.08, 32: 0.2}),
        (N, square, {}),
    )
    if width >= 64:
        least = {8: 0.6 if N <= 512 else 0.4, 16: 0.8, 32: 0.8} if 128 < N <= 2048 else {}
    return walk, least.get(B, 1.0)


def takes(a: Tensor, b: Tensor, B: int) -> bool:
    """Whether x and dy [N, features], among a product's operands, are read as they lie."""
    return describable(a) and (b.ndim > 2 or describable(b))


def _steps(depth: int, walk: Walk) -> tuple[int, int]:
    """(steps of a part, parts): parts that are left empty are left out."""
    steps = ceil_div(ceil_div(depth, walk.BK), walk.parts)
    return steps, ceil_div(ceil_div(depth, walk.BK), steps)


@on_its_device
def forward(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, walk: Walk) -> Tensor:
    """y [N, R*B] from x [N, C*B], values [R, slots, B, B], bias [R*B]."""
    N, R, C, B = x.shape[0], pattern.R, pattern.C, pattern.B
    y = x.new_empty(N, R * B)
    BN = max(walk.BN, B)
    steps, parts = _steps(C * B, walk)
    target = y if parts == 1 else x.new_empty(parts, N, R * B, dtype=torch.float32)
    programs = ceil_div(N, walk.BM) * ceil_div(R * B, BN)
    place = torch.empty(programs * parts * (BN // B) * C, dtype=torch.int32, device=x.device)
    launch(
        walk_forward,
        (programs, parts),
        descriptor(x, [walk.BM, walk.BK]) if walk.boxes else x,
        values,
        pattern.col_indices,
        y if bias is None else bias,
        target,
        place,
        N,
        R,
        pattern.slots,
        pattern.num_live,
        C,
        R * B,
        x.stride(0),
        steps,
        B=B,
        BM=walk.BM,
        BN=BN,
        BK=walk.BK,
        CH=min(LINE, B),
        GROUP_M=8,
        HAS_BIAS=bias is not None and parts == 1,
        BOXES=walk.boxes,
        **arithmetic(x, walk),
    )
    if parts > 1:
        add_parts_of(target, bias, y)
    return y


@on_its_device
def grad_input(dy: Tensor, values: Tensor, pattern: Pattern, walk: Walk) -> Tensor:
    """dx [N, C*B] from dy [N, R*B] and values [R, slots, B, B]."""
    N, R, C, B = dy.shape[0], pattern.R, pattern.C, pattern.B
    dx = dy.new_empty(N, C * B)
    order, col_start = pattern.transposed()
    BN = max(walk.BN, B)
    steps, parts = _steps(R * B, walk)
    target = dx if parts == 1 else dy.new_empty(parts, N, C * B, dtype=torch.float32)
    programs = ceil_div(N, walk.BM) * ceil_div(C * B, BN)
    place = torch.empty(programs * parts * (BN // B) * R, dtype=torch.int32, device=dy.device)
    launch(
        walk_grad_input,
        (programs, parts),
        descriptor(dy, [walk.BM, walk.BK]) if walk.boxes else dy,
        values,
        order,
        col_start,
        target,
        place,
        N,
        R,
        pattern.slots,
        C,
        C * B,
        dy.stride(0),
        steps,
        B=B,
        BM=walk.BM,
        BN=BN,
        BK=walk.BK,
        CH=min(LINE, B),
        GROUP_M=8,
        BOXES=walk.boxes,
        **arithmetic(dy, walk),
    )
    if parts > 1:
        add_parts_of(target, None, dx)
    return dx


@on_its_device
def grad_values(dy: Tensor, x: Tensor, pattern: Pattern, walk: Walk) -> Tensor:
    """dv [R, slots, B, B] from dy [N, R*B], x [N, C*B]; zeros in the spare slots."""
    N, R, C, B, slots = x.shape[0], pattern.R, pattern.C, pattern.B, pattern.slots
    out = x.new_empty(R, slots, B, B)
    BM, BN = max(walk.BM, B), max(walk.BN, B)
    row_tiles, col_tiles = ceil_div(R * B, BM), ceil_div(C * B, BN)
    tiles = row_tiles * col_tiles
    place = torch.empty(tiles * (BM // B) * (BN // B), dtype=torch.int32, device=x.device)
    launch(
        walk_grad_values,
        (tiles,),
        descriptor(dy, [walk.BK, BM]),
        descriptor(x, [walk.BK, BN]),
        pattern.col_indices,
        out,
        place,
        N,
        R,
        slots,
        pattern.num_live,
        C,
        row_tiles,
        col_tiles,
        B=B,
        BM=BM,
        BN=BN,
        BT=walk.BK,
        CH=min(LINE, B),
        GROUP=8,
        **arithmetic(x, walk),
    )
    if slots > pattern.num_live:
        out[:, pattern.num_live :].zero_()
    return out
