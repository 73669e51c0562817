"""Which tiling a product takes: rules read off `benchmarks/tune_gpu.py` on one H200.

Legend: B tile side, N tokens; width: outputs that share a column list (row_group*B, its power of
two, at most 128); depth: length of the sums.

What decides, roughly. Two programs of 128 x 128 on a multiprocessor overlap one's epilogue with the
other's loop, and win wherever there are many tiles; with few tiles, one program with more stages
balances better. Deep sums like 256 tokens per program: fewer bytes from L2 per product. Blocks
below 32 are too narrow for descriptors: their weight is packed first. Few tokens: whatever launches
cheaply, and enough programs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from blockell_kernels._backends import Case
from blockell_kernels._triton import _mid_forward, _mid_grad_input, _mid_grad_values
from blockell_kernels._triton._device import capability, num_sms
from blockell_kernels._triton._few_tokens import SMALL_WEIGHT
from blockell_kernels._triton._tiling import (
    Tiling,
    ceil_div,
    power_of_two_divisor,
    round_up_to_power_of_two,
)
from blockell_kernels._triton._tilings_gluon import (
    DEEP,
    LONG_TOKENS,
    MANY_TOKENS,
    narrows_long,
    prefer_gluon,
)

FEW_TOKENS = 512
"""Below this many tokens a product is bound by its launch and by the weight's traffic."""
MANY_OF_LARGE = 128
"""Of a weight of `SMALL_WEIGHT` elements more tokens than this are many: 256 with the tiling of 512
take two thirds of the time."""
_MIDDLE = {
    "forward": _mid_forward,
    "grad_input": _mid_grad_input,
    "grad_values": _mid_grad_values,
}


@lru_cache(maxsize=4096)
def tiling_for(case: Case) -> Tiling:
    """The tiling of a case. Launchers adapt what the operands do not allow (see `_forward`)."""
    hopper = capability(case.device)[0] == 9
    if hopper and case.dtype.itemsize == 2 and case.N < LONG_TOKENS:
        found = _MIDDLE[case.direction].tiling_for(case)
        if found is not None and found.path.startswith("gluon") and found.otherwise is None:
            general = _general(case)
            return replace(found, otherwise=general.otherwise or general)
        if found is not None:
            return found
    return _general(case)


def _general(case: Case) -> Tiling:
    if MANY_OF_LARGE < case.N < FEW_TOKENS and case.R * case.C * case.B**2 >= SMALL_WEIGHT:
        case = case._replace(N=FEW_TOKENS)
    if case.N < FEW_TOKENS:
        return _few_tokens(case)
    if capability(case.device)[0] != 9:
        return _portable(case)
    if case.dtype == torch.float32:
        return _wide_floats(case)
    rules = {"forward": _forward, "grad_input": _grad_input, "grad_values": _grad_values}
    return prefer_gluon(case, rules[case.direction](case))


def _width(case: Case) -> int:
    return min(128, power_of_two_divisor(case.row_group * case.B))


def _few_tokens(case: Case) -> Tiling:
    BM = min(64, max(16, round_up_to_power_of_two(max(case.N, 1))))
    BK = 32 if case.dtype == torch.float32 else 64
    if case.direction == "grad_values":
        return Tiling(BM=_width(case), BN=128, BK=32, warps=4, stages=3)
    return Tiling(BM=BM, BN=32, BK=BK, warps=4, stages=4, group_m=1)


def _portable(case: Case) -> Tiling:
    """GPUs without TMA: pointers, and shared memory of 100 KiB (48 before Ampere)."""
    ampere = capability(case.device) >= (8, 0)
    wide = case.dtype == torch.float32
    BK = (32 if ampere else 16) if wide else (64 if ampere else 32)
    if case.direction == "grad_values":
        return Tiling(BM=_width(case), BN=128, BK=BK, warps=8, stages=2, waves=2)
    BN = _width(case) if case.direction == "forward" else case.B
    return Tiling(BM=128, BN=BN, BK=BK, warps=8 if BN >= 64 else 4, stages=3 if ampere else 2)


def _token_tile(case: Case, columns: int, largest: int) -> int:
    """The largest token tile, 64 at least, with which every multiprocessor gets a tile."""
    BM = largest
    while BM > 64 and ceil_div(case.N, BM) * columns < num_sms(case.device):
        BM //= 2
    return BM


def _forward(case: Case) -> Tiling:
    B, width = case.B, _width(case)
    columns = case.R * B // width
    few_tiles = ceil_div(case.N, 128) * columns <= 4 * num_sms(case.device)
    depth = case.K * B
    BM = _token_tile(case, columns, 128)
    if B < 32 or (B == 32 and narrows_long(case)):
        return Tiling(path="packed", BM=BM, BN=width, BK=64, warps=4, stages=3)
    by: dict[str, Any] = {"path": "descriptors", "BN": width, "BK": min(64, B)}
    narrow = 64 // min(64, B)  # narrow boxes: as many bytes in flight, in more stages
    if BM < 128:
        return Tiling(**by, BM=BM, warps=4, stages=4 * narrow)
    if width < 128:
        long = case.N >= LONG_TOKENS
        rounds = ceil_div(ceil_div(case.N, 256) * columns, num_sms(case.device))
        deep = depth >= DEEP or (case.N >= MANY_TOKENS and depth >= 300)
        if deep and (rounds > 4 if long else not few_tiles):
            by |= {"persistent": 1, "group_m": 4 if long else 8}
            return Tiling(**by, BM=256, warps=4, stages=4 * narrow)
        return Tiling(**by, BM=128, warps=4, stages=4 * narrow, persistent=2, store_parts=2)
    if few_tiles or (case.N >= MANY_TOKENS and depth <= 160 and narrow == 1):
        if narrow > 1:
            return Tiling(**by, BM=128, warps=4, stages=8)
        return Tiling(**by, BM=128, warps=4, stages=5, persistent=1)
    if narrow > 1 and depth >= DEEP:
        return Tiling(**by, BM=256, warps=8, stages=6)
    return Tiling(**by, BM=128, warps=4, stages=3 * narrow, persistent=2, store_parts=2)


def _grad_input(case: Case) -> Tiling:
    B = case.B
    if B < 64:
        BM = _token_tile(case, case.C, 256)
        return Tiling(BM=BM, BN=B, BK=64, warps=4, stages=3)
    by: dict[str, Any] = {"path": "descriptors", "BN": B, "BK": 64}
    few_tiles = ceil_div(case.N, 128) * case.C <= 4 * num_sms(case.device)
    long = case.N >= LONG_TOKENS
    depth = case.R * B * case.density  # the average one of a column's sum
    if B == 64:
        BM = _token_tile(case, case.C, 128 if few_tiles or case.density < 0.4 else 256)
        if BM == 256:
            return Tiling(**by, BM=BM, warps=4, stages=4)
        if long and case.C >= 64:
            return Tiling(**by, BM=BM, warps=4, stages=4, persistent=2, store_parts=2)
        return Tiling(**by, BM=BM, warps=4, stages=4)
    BM = _token_tile(case, case.C, 256)
    if BM < 256:
        return Tiling(**by, BM=BM, warps=4, stages=4)
    if depth >= (500 if few_tiles and long else 768) and (case.C <= 64 or not long):
        group_m = 1024 if few_tiles else 8
        return Tiling(**by, BM=256, warps=8, stages=4, store_parts=2, group_m=group_m)
    return Tiling(**by, BM=128, warps=4, stages=3, persistent=2, store_parts=2)


def _grad_values(case: Case) -> Tiling:
    """Few tiles are split into more parts, whose sums are written and read: one program then."""
    B, width = case.B, _width(case)
    sms, long = num_sms(case.device), case.N >= LONG_TOKENS
    tiles = case.R * B // width * ceil_div(case.K * B, 128)  # of 128 columns
    if B == 128:
        BN = 256 if case.K % 2 == 0 else 128
        stages = 5 if long and BN == 128 and case.K > 1 else 4
        return Tiling(path="descriptors", BM=128, BN=BN, BK=64, warps=8, stages=stages)
    if B == 64:
        by: dict[str, Any] = {"path": "descriptors", "BM": width, "BN": 128, "BK": 64}
        parts = sms // tiles
        full = parts * tiles >= (0.75 if case.N < MANY_TOKENS else 0.9) * sms
        if long and 1 <= parts <= width // 64 and full:  # nearly a round, of few parts
            return Tiling(**by, warps=4, stages=8 if width == 64 else 6)
        if width == 128 and long and 3 * tiles <= sms:
            return Tiling(**by, warps=8, stages=4)
        deep = width == 64 and long and (case.N < MANY_TOKENS or case.density >= 0.4)
        return Tiling(**by, warps=4, stages=4 if deep else 3, waves=2)
    if B == 32:
        stages = 5 if long and tiles < sms < 4 * tiles else 4
        return Tiling(BM=width, BN=128, BK=64, warps=4, stages=stages)
    if width == 128 and long and 3 * tiles <= sms:
        return Tiling(BM=width, BN=128, BK=64, warps=4, stages=4)
    return Tiling(BM=width, BN=128, BK=64, warps=4, stages=3, waves=2)


def _wide_floats(case: Case) -> Tiling:
    """float32 on Hopper: 3xTF32 takes three products and twice the shared memory."""
    B = case.B
    by: dict[str, Any] = {"path": "descriptors", "BM": 128, "BK": 32}
    if case.direction == "forward":
        if B < 32:
            return Tiling(BM=128, BN=_width(case), BK=32, warps=8, stages=3)
        return Tiling(**by, BN=_width(case), warps=8, stages=4, persistent=1)
    if case.direction == "grad_input":
        if B < 64:
            return Tiling(**by, BN=B, warps=4, stages=4)
        if B == 64:
            return Tiling(**by | {"BM": 256}, BN=B, warps=8, stages=3)
        return Tiling(BM=128, BN=B, BK=32, warps=8, stages=3, group_m=1024)
    if B >= 64:
        return Tiling(**by | {"BM": _width(case)}, BN=128, warps=8, stages=4)
    return Tiling(BM=_width(case), BN=128, BK=32, warps=4, stages=3, waves=2)
