"""Launches the products of few tokens: the time it takes to read (or write) the live blocks once.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.

For inference and small batches. What decides is how many bytes are on their way at a time: enough
programs for every multiprocessor, sums split into parts where there are too few, several stages of
loads each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from blockell_kernels._backends import Case, Pattern
from blockell_kernels._triton import _mid_forward, _mid_grad_input, _mid_grad_values
from blockell_kernels._triton._arithmetic import arithmetic
from blockell_kernels._triton._device import (
    capability,
    far_apart,
    num_sms,
    on_its_device,
)
from blockell_kernels._triton._few_tokens_kernels import (
    add_parts,
    few_forward,
    few_grad_input,
    few_grad_values,
)
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._tiling import (
    ceil_div,
    power_of_two_divisor,
    round_up_to_power_of_two,
)

MAX_TOKENS = 512
TOKEN_TILE = 64
"""Tokens that one program holds, at most."""
SMALL_WEIGHT = 2**22
"""Elements of the dense weight below which launches and latency decide, not memory."""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One way to run a product of few tokens: BN results by BK terms a step, in parts."""

    BN: int
    BK: int
    parts: int = 1
    warps: int = 4
    stages: int = 4


@lru_cache(maxsize=4096)
def strip_for(case: Case) -> Strip | None:
    """How to run a case, None: not here. Rules read off searches on one H200, half full."""
    if not 0 < case.N <= MAX_TOKENS or _has_another(case):
        return None
    strip = _one_tile(case) if case.N <= TOKEN_TILE else _several_tiles(case)
    if strip is None or case.direction == "grad_values":
        return strip
    wide = case.dtype.itemsize == 4
    if wide:
        strip = replace(strip, BK=max(32, strip.BK // 2))
    if capability(case.device)[0] < 9:  # 48 KiB of shared memory will do
        strip = replace(strip, BK=min(strip.BK, 32 if wide else 64), stages=min(strip.stages, 3))
    return strip


def _has_another(case: Case) -> bool:
    """Whether the product has a tiling of its own."""
    rules = {
        "forward": _mid_forward,
        "grad_input": _mid_grad_input,
        "grad_values": _mid_grad_values,
    }[case.direction]
    if case.dtype.itemsize != 2 or capability(case.device)[0] != 9:
        return False
    return rules.tiling_for(case) is not None


def _one_tile(case: Case) -> Strip:
    """Up to 64 tokens: always here."""
    if case.direction == "grad_values":
        BR = min(64, power_of_two_divisor(case.row_group * case.B))
        return Strip(BN=BR, BK=max(case.B, 128 if BR == 64 else 256), stages=1)
    if case.direction == "forward":
        width, results = power_of_two_divisor(case.row_group * case.B), case.R * case.B
        depth = case.K * case.B
    else:
        width, results = case.B, case.C * case.B
        depth = ceil_div(case.R * case.K, case.C) * case.B
        if case.dtype.itemsize == 2 and capability(case.device)[0] >= 9:
            strip = _long_sums(min(width, 64), results, depth, case.N, num_sms(case.device))
            if strip is not None:
                return strip
    return _strip(min(width, 64), results, depth, case.N, num_sms(case.device), case.direction)


def _several_tiles(case: Case) -> Strip | None:
    """Up to 512 tokens, where this is faster than the kernels for many."""
    N, sms = case.N, num_sms(case.device)
    width = power_of_two_divisor(case.row_group * case.B)
    small = case.R * case.C * case.B**2 < SMALL_WEIGHT
    if case.direction == "grad_values":
        return Strip(BN=64, BK=128, stages=3) if width >= 64 and small else None
    if case.direction == "forward":
        results = case.R * case.B
        if results < 12 * sms:  # few strips: all of a sum's loads at once
            if N <= 128:
                return Strip(BN=16, BK=256) if width >= 32 else Strip(BN=width, BK=128)
            return Strip(BN=32, BK=64, stages=5) if width >= 32 else None
        if width >= 64 and (N <= 128 or (N <= 256 and small)):
            return Strip(BN=64, BK=64, stages=4 if small else 5)
        return None
    results = case.C * case.B
    if results < 12 * sms:
        if case.B >= 64 and N <= 128 and case.dtype.itemsize == 4:
            return Strip(BN=32, BK=64, parts=8)
        if case.B >= 64:
            return Strip(BN=64, BK=64, parts=4, stages=3) if N <= 256 else Strip(BN=32, BK=128)
        if case.B == 32:
            return Strip(BN=32, BK=128, parts=2, stages=3)
        return Strip(BN=case.B, BK=128) if N <= 256 else None
    if case.B >= 64 and not small and N <= 256 and results < 96 * sms:
        return Strip(BN=64, BK=64, parts=4, stages=3)
    return None


def _strip(width: int, results: int, depth: int, N: int, sms: int, direction: str) -> Strip:
    if width >= 64 and results // 64 >= 1.5 * sms:
        return Strip(BN=64, BK=64, stages=5)
    BN = min(width, 32)
    strips = results // BN
    if strips >= 1.5 * sms and BN == 16 and N <= 32 and direction == "forward":
        return Strip(BN=16, BK=64, warps=2, stages=5)
    if strips * BN >= 32 * 1.5 * sms or depth <= 512:
        return Strip(BN=BN, BK=128)
    if results >= 24 * sms:  # a program or two for every multiprocessor
        return Strip(BN=BN, BK=128, parts=4 if BN < 32 else 2)
    if direction == "forward" and depth <= 2048 and width >= 32:
        return Strip(BN=16, BK=256)
    return Strip(BN=min(width, 16), BK=128, parts=8, stages=3)


def _long_sums(width: int, results: int, depth: int, N: int, sms: int) -> Strip | None:
    """Of an input gradient, 16-bit, on Hopper, from a search of 16 and 32 tokens; else None."""
    if results >= 48 * sms or depth <= 512 or width < 16:
        return None
    if depth <= 1024 and results >= 12 * sms:
        return Strip(BN=min(width, 32), BK=128)
    if width == 64:
        return Strip(BN=64, BK=64, parts=8)
    if width == 32:
        return Strip(BN=32, BK=128, parts=8 if results < 15 * sms else 4)
    return Strip(BN=16, BK=128, parts=4 if N <= 16 else 2) if results >= 24 * sms else None


def _token_tile(N: int) -> int:
    return min(TOKEN_TILE, round_up_to_power_of_two(max(16, N)))


@on_its_device
def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, strip: Strip
) -> Tensor:
    """y [N, R*B] from x [N, C*B], values [R, slots, B, B], bias [R*B]."""
    N, B, out_features = x.shape[0], pattern.B, pattern.R * pattern.B
    y = x.new_empty(N, out_features)
    BN = min(strip.BN, power_of_two_divisor(pattern.row_group * B))
    depth = pattern.num_live * B
    steps = ceil_div(ceil_div(depth, strip.BK), strip.parts)
    parts = ceil_div(depth, steps * strip.BK)
    target = y if parts == 1 else x.new_empty(parts, N, out_features, dtype=torch.float32)
    launch(
        few_forward,
        (out_features // BN * ceil_div(N, TOKEN_TILE), parts),
        x,
        values,
        pattern.col_indices,
        y if bias is None else bias,
        target,
        N,
        pattern.slots,
        pattern.num_live,
        out_features,
        x.stride(0),
        x.stride(1),
        steps,
        B=B,
        BM=_token_tile(N),
        BN=max(BN, 16),
        BN_LIVE=BN,
        BK=strip.BK,
        EVEN=depth % (steps * strip.BK) == 0,
        HAS_BIAS=bias is not None and parts == 1,
        FAR=far_apart(x),
        **arithmetic(x, strip),
    )
    if parts > 1:
        add_parts_of(target, bias, y)
    return y


@on_its_device
def grad_input(dy: Tensor, values: Tensor, pattern: Pattern, strip: Strip) -> Tensor:
    """dx [N, C*B] from dy [N, R*B] and values [R, slots, B, B]."""
    N, B, in_features = dy.shape[0], pattern.B, pattern.C * pattern.B
    order, col_start = pattern.transposed()
    dx = dy.new_empty(N, in_features)
    BN, parts = min(strip.BN, B), strip.parts
    target = dx if parts == 1 else dy.new_empty(parts, N, in_features, dtype=torch.float32)
    launch(
        few_grad_input,
        (in_features // BN * ceil_div(N, TOKEN_TILE), parts),
        dy,
        values,
        order,
        col_start,
        target,
        N,
        pattern.slots,
        in_features,
        dy.stride(0),
        dy.stride(1),
        parts,
        B=B,
        BM=_token_tile(N),
        BN=max(BN, 16),
        BN_LIVE=BN,
        BK=strip.BK,
        **arithmetic(dy, strip),
    )
    if parts > 1:
        add_parts_of(target, None, dx)
    return dx


@on_its_device
def grad_values(dy: Tensor, x: Tensor, pattern: Pattern, strip: Strip) -> Tensor:
    """dv [R, slots, B, B] from dy [N, R*B] and x [N, C*B]; zeros in the spare slots."""
    R, slots, B = pattern.R, pattern.slots, pattern.B
    out = x.new_empty(R, slots, B, B)
    BR = min(strip.BN, power_of_two_divisor(pattern.row_group * B))
    KB = max(1, min(strip.BK // B, round_up_to_power_of_two(slots)))
    KB = max(KB, 16 // B)
    launch(
        few_grad_values,
        (R * B // BR, ceil_div(slots, KB)),
        dy,
        x,
        pattern.col_indices,
        out,
        x.shape[0],
        slots,
        pattern.num_live,
        dy.stride(0),
        dy.stride(1),
        x.stride(0),
        x.stride(1),
        B=B,
        BR=max(BR, 16),
        BR_LIVE=BR,
        KB=KB,
        BM=_token_tile(x.shape[0]),
        FAR=far_apart(x),
        **arithmetic(x, strip),
    )
    return out


def add_parts_of(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [N, features] = sum of parts [count, N, features] + bias [features]."""
    size, count, BLOCK = out.numel(), parts.shape[0], 256
    launch(
        add_parts,
        (ceil_div(size, BLOCK),),
        parts,
        out if bias is None else bias,
        out,
        size,
        count,
        out.shape[1],
        PARTS=round_up_to_power_of_two(count),
        BLOCK=BLOCK,
        HAS_BIAS=bias is not None,
        num_warps=4,
    )
