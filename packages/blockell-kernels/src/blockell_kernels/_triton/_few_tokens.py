"""Launches the products of few tokens: the time it takes to read (or write) the live blocks once.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.

For inference and small batches. What decides is how many bytes are on their way at a time: enough
programs for every multiprocessor, sums split into parts where there are too few, several stages of
loads each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from blockell_kernels._backends import Case, Pattern, Verdict
from blockell_kernels._triton._device import dot_precision, num_sms, on_its_device, upcast
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

MAX_TOKENS = 64
"""What one program holds."""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One way to run a product of few tokens: BN results by BK terms a step, in parts."""

    BN: int
    BK: int
    parts: int = 1
    warps: int = 4
    stages: int = 4


def takes(case: Case) -> bool:
    """Whether this module computes the case."""
    return 0 < case.N <= MAX_TOKENS


@lru_cache(maxsize=1024)
def strip_for(case: Case) -> Strip:
    """How to run a case."""
    size = case.dtype.itemsize
    tokens = round_up_to_power_of_two(max(16, case.N))
    deepest = (256 if tokens <= 32 else 128) * 2 // size
    if case.direction == "grad_values":
        BR = min(64, power_of_two_divisor(case.row_group * case.B))
        # As wide as 32 KiB of results, but two programs for every multiprocessor.
        width = max(case.B, 16384 // max(BR, 16))
        fewest = 2 * num_sms(case.device)
        rows = case.R * case.B // BR
        while width > max(case.B, 64) and rows * ceil_div(case.K * case.B, width) < fewest:
            width //= 2
        return Strip(BN=BR, BK=width, warps=4, stages=1)
    if case.direction == "forward":
        BN = min(32, power_of_two_divisor(case.row_group * case.B))
        strips, depth = case.R * case.B // BN, case.K * case.B
    else:
        BN = min(32, case.B)
        strips, depth = case.C * case.B // BN, ceil_div(case.R * case.K, case.C) * case.B
    BK = min(deepest, max(64, round_up_to_power_of_two(depth)))
    # Parts for at least two programs a multiprocessor, of at least a step each.
    parts = max(1, min(2 * num_sms(case.device) // strips, depth // BK, 16))
    return Strip(BN=BN, BK=BK, parts=parts)


def verdict(case: Case) -> Verdict:
    """Reading the live blocks beats reading and writing them to be read again by a dense product.

    Where nearly all are live a dense layer would be as fast, but scattering into one is not.
    """
    return Verdict(
        True,
        f"{case.N} tokens: bound by the weight's memory traffic, of which this is the least; "
        "counted, not measured",
    )


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
        (out_features // BN, parts),
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
        BM=round_up_to_power_of_two(max(16, N)),
        BN=max(BN, 16),
        BN_LIVE=BN,
        BK=strip.BK,
        EVEN=depth % (steps * strip.BK) == 0,
        HAS_BIAS=bias is not None and parts == 1,
        PRECISION=dot_precision(x.dtype, x.device),
        UPCAST=upcast(x),
        num_warps=strip.warps,
        num_stages=strip.stages,
    )
    if parts > 1:
        _add(target, bias, y, parts)
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
        (in_features // BN, parts),
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
        BM=round_up_to_power_of_two(max(16, N)),
        BN=max(BN, 16),
        BN_LIVE=BN,
        BK=strip.BK,
        PRECISION=dot_precision(dy.dtype, dy.device),
        UPCAST=upcast(dy),
        num_warps=strip.warps,
        num_stages=strip.stages,
    )
    if parts > 1:
        _add(target, None, dx, parts)
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
        BM=round_up_to_power_of_two(max(16, x.shape[0])),
        PRECISION=dot_precision(x.dtype, x.device),
        UPCAST=upcast(x),
        num_warps=strip.warps,
    )
    return out


def _add(parts: Tensor, bias: Tensor | None, out: Tensor, count: int) -> None:
    """out [N, features] = sum of parts [count, N, features] + bias [features]."""
    size, BLOCK = out.numel(), 512
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
