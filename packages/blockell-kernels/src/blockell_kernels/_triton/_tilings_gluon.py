"""Where the Gluon kernels beat the Triton ones on Hopper: rules read off one H200.

Legend: B tile side, N tokens; width: outputs that share a column list; depth: length of the sums.

What decides, roughly. A round is the time in which every multiprocessor works off one tile; the
last one is rarely full, so the tile that needs the least work in all rounds wins, even where it is
itself a little less efficient (factors below, measured). In the forward product Triton's kernels
overlap epilogues better, which short sums want. In the input gradient a program of the Gluon
kernel serves several columns with one load of dy; where blocks are few, most of what it loads is
not used, and walking single columns wins.
"""

from __future__ import annotations

from dataclasses import replace

from blockell_kernels._backends import Case
from blockell_kernels._triton._device import num_sms
from blockell_kernels._triton._tiling import Tiling, ceil_div, power_of_two_divisor

MANY_TOKENS = 32768
LONG_TOKENS = 8192
LONG_STEPS = 100
"""Of 64 tokens, per multiprocessor: shorter weight gradients are bound by their partial sums."""


PROVEN = ("forward", "grad_input")
"""Directions whose kernels have passed every test on a device in their present form. Weight
gradients join them once tests/gpu/test_cuda_gluon.py has run to its end."""


def prefer_gluon(case: Case, triton: Tiling) -> Tiling:
    """The Gluon kernel's tiling, where it wins, with Triton's behind it; else Triton's."""
    if case.direction not in PROVEN:
        return triton
    rules = {"forward": _forward, "grad_input": _grad_input, "grad_values": _grad_values}
    found = rules[case.direction](case)
    return triton if found is None else replace(found, path="gluon", otherwise=triton)


def _width(case: Case) -> int:
    return min(128, power_of_two_divisor(case.row_group * case.B))


def _rounds(case: Case, tiles: int) -> int:
    return ceil_div(tiles, num_sms(case.device))


def _forward(case: Case) -> Tiling | None:
    if case.B < 16 or _width(case) < 128:
        return None
    units, depth = case.R * case.B // 128, case.K * case.B
    by_128 = ceil_div(ceil_div(case.N, 128) * units, 2 * num_sms(case.device)) * 256
    tiles = ceil_div(case.N, 256) * units
    by_256 = _rounds(case, tiles) * 256
    by_320 = _rounds(case, ceil_div(case.N, 320) * units) * 345
    if by_320 < 0.9 * min(by_128, by_256):
        return Tiling(BM=320, BN=128, BK=64)
    if tiles < 4 * num_sms(case.device):
        return None
    if case.B == 16:
        wins = depth <= 512
    elif case.B == 32:
        wins = depth >= 300 or case.N >= MANY_TOKENS
    else:
        wins = depth >= 640 or (case.N >= MANY_TOKENS and depth >= 300)
    return Tiling(BM=256, BN=128, BK=64) if wins else None


def _grad_input(case: Case) -> Tiling | None:
    B, width = case.B, _width(case)
    if not 16 <= B <= 64 or width < 64:
        return None
    outputs = case.R * B
    if outputs > 1024:
        held = case.density * outputs  # what a column's sums are long, on average
        if held < 300 or (B == 64 and case.density < 0.3):
            return None
    cuts = {(320, 64): 1.0 if B == 64 else 1.3 if B == 32 else 1.6}
    if width == 128:
        cuts |= {(256, 128): 1.0 if case.density < 0.3 else 1.02, (128, 128): 1.2}

    def cost(cut: tuple[int, int]) -> float:
        tiles = ceil_div(case.N, 128) * ceil_div(case.C * B, cut[0])
        return _rounds(case, tiles) * cut[0] * cuts[cut]

    columns, deep = min(cuts, key=cost)
    return Tiling(BM=128, BN=columns, BK=deep)


def _grad_values(case: Case) -> Tiling | None:
    """Long sums, in tiles of 256 or 320 columns with little padding; or a last round to split."""
    if case.B < 16 or _width(case) < 128:
        return None
    width = case.K * case.B
    columns = 320 if width == 320 else 256
    chunks = ceil_div(width, columns)
    tiles, sms = case.R * case.B // 128 * chunks, num_sms(case.device)
    if chunks * columns > 1.06 * width:
        return None
    split_last = case.N >= LONG_TOKENS and sms < tiles < 1.5 * sms
    steps = tiles * ceil_div(case.N, 64)
    long = case.N >= LONG_TOKENS and steps >= LONG_STEPS * sms
    if split_last or (long and case.B in (32, 64)):
        return Tiling(BM=128, BN=columns, BK=64)
    return None
