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
from functools import lru_cache

from blockell_kernels._backends import Case
from blockell_kernels._triton._device import num_sms
from blockell_kernels._triton._tiling import Tiling, ceil_div, power_of_two_divisor

MANY_TOKENS = 32768
LONG_TOKENS = 8192
"""From here on tilings were searched again with launches that overlap (8192 and 65536 tokens)."""
DEEP = 1024
"""Weights in a row from which tile 128, and tile 64 with free rows, gain: 1.04 to 1.4 times."""
LONG_STEPS = 100
"""Of 64 tokens, per multiprocessor: shorter weight gradients are bound by their partial sums."""
PACKED = 940
"""Products per element of x from which a packed copy of it costs less than its gathering."""
LONG_SUMS, MANY_OUTPUTS = 768, 4096
"""From both on, if x is no wider than the result, the forward product of tile 16 gains from a
packed copy of x: 5 to 16% measured."""
STREAMED = 6
"""Tiles of 128 columns, per multiprocessor, of which results are stored beside the products."""
PACKED_FREELY = 2**23
"""Elements that a packed copy of x may have anyhow: 16 MiB, what partial sums take at most."""


def prefer_gluon(case: Case, triton: Tiling) -> Tiling:
    """The Gluon kernel's tiling, where it wins, with Triton's behind it; else Triton's."""
    rules = {"forward": _forward, "grad_input": _grad_input, "grad_values": _grad_values}
    found = rules[case.direction](case)
    if found is None:
        return triton
    path = "gluon" if found.path == "pointers" else found.path
    return replace(found, path=path, otherwise=triton)


def may_pack(case: Case) -> bool:
    """Whether a weight gradient may hold a packed copy of x, for the sake of memory.

    The copy lies beside the gradient of x. Blocks that are absent save a weight, its gradient and
    two moments each: a training step then takes no more memory than a dense one.
    """
    saved = 4 * (1 - case.density) * case.R * case.C * case.B**2
    return max(PACKED_FREELY, saved) >= case.N * case.C * case.B


def _width(case: Case) -> int:
    return min(128, power_of_two_divisor(case.row_group * case.B))


def _rounds(case: Case, tiles: int) -> int:
    return ceil_div(tiles, num_sms(case.device))


def narrows_long(case: Case) -> bool:
    """Many tokens, few blocks, and an output much narrower than the input.

    Its few row groups take other columns each, which lie scattered over x: tile 32 gains 12% where
    it reads them as tile 16 does.
    """
    return case.N >= MANY_TOKENS and case.density < 0.3 and case.C > 2 * case.R


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
    many = case.R * case.B >= MANY_OUTPUTS and case.R >= case.C
    if case.B == 16 and depth >= LONG_SUMS and many:
        return Tiling(path="gluon packed", BM=256, BN=128, BK=64)
    if case.B == 16:
        wins = depth <= 512
    elif case.B == 32:
        wins = (depth >= 300 or case.N >= MANY_TOKENS) and not narrows_long(case)
    else:
        wins = depth >= 640 or (case.N >= MANY_TOKENS and depth >= 300)
    return Tiling(BM=256, BN=128, BK=64) if wins else None


def _grad_input(case: Case) -> Tiling | None:
    B, width = case.B, _width(case)
    if not 16 <= B <= 64 or width < 64:
        return None
    outputs = case.R * B
    one_round = _rounds(case, ceil_div(case.N, 128) * ceil_div(case.C * B, 320)) == 1
    if outputs > 1024:
        held = case.density * outputs  # what a column's sums are long, on average
        if held < 300:
            return None
        if B == 64 and case.density < 0.3 and not (case.N >= LONG_TOKENS and one_round):
            return None
    cuts = {(320, 64): 1.0 if B == 64 else 1.3 if B == 32 else 1.6}
    if width == 128:
        even = case.density < 0.3 and (B == 16 or case.N < LONG_TOKENS)
        cuts |= {(256, 128): 1.0 if even else 1.02, (128, 128): 1.2}

    def cost(cut: tuple[int, int]) -> float:
        tiles = ceil_div(case.N, 128) * ceil_div(case.C * B, cut[0])
        return _rounds(case, tiles) * cut[0] * cuts[cut]

    columns, deep = min(cuts, key=cost)
    return Tiling(BM=128, BN=columns, BK=deep)


@lru_cache(maxsize=1024)
def columns_of(B: int, outputs: int, K: int) -> int:
    """Columns of a tile of the weight gradient: least work, padding included.

    Products 64 wide take a fifth longer than wider ones (measured); dy counts as 64 columns.
    """
    wide = [(256, 256), (320, 64), (192, 64), (128, 128)]
    if outputs == 64:
        wide = [(512, 256), (640, 64), (384, 64), (256, 128)]

    def cost(option: tuple[int, int]) -> float:
        columns, product = option
        return ceil_div(K * B, columns) * (columns + 64) * (1.2 if product == 64 else 1.0)

    return min((o for o in wide if o[0] % B == 0 and o[1] >= min(B, 64)), key=cost)[0]


def _grad_values(case: Case) -> Tiling | None:
    """Long sums, in tiles of 256 or 320 columns with little padding; or a last round to split.

    Of many tiles results leave while the next tile is multiplied, 4% faster, unless x is the wider
    one and falls out of L2. Tile 16 has x packed where that is short beside the product and memory
    allows it.
    """
    B, width = case.B, _width(case)
    if B < 16 or width < 64:
        return None
    depth, outputs, sms = case.K * B, case.R * B, num_sms(case.device)
    columns = 320 if depth == 320 else 256
    chunks = ceil_div(depth, columns)
    taken = Tiling(BM=width, BN=columns_of(B, width, case.K), BK=64)
    if (
        case.N >= MANY_TOKENS
        and B <= 32
        and width == 128
        and 128 < depth <= 256
        and case.R > case.C
    ):
        return taken
    if chunks * columns > 1.06 * depth or case.N < LONG_TOKENS:
        return None
    if width < 128:
        return taken if B == 64 and depth >= DEEP else None
    tiles = outputs // 128 * chunks
    widens = case.R > case.C
    long = tiles * ceil_div(case.N, 64) >= LONG_STEPS * sms
    if B == 16:
        if not long or outputs * depth < PACKED * case.C * B:
            return None
        if may_pack(case):
            return replace(taken, path="gluon packed")
        return taken if widens else None
    if widens and outputs // 128 * ceil_div(depth, 128) >= STREAMED * sms:
        return Tiling(path="gluon streamed", BM=128, BN=128, BK=64)
    gains = B < 128 or (widens and depth >= DEEP)
    return taken if sms < tiles < 1.5 * sms or (long and gains) else None
