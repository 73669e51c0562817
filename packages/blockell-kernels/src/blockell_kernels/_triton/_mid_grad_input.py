"""Tilings of the input gradient below `LONG_TOKENS` tokens, of 16-bit operands on Hopper.

Legend: R block rows, C block columns, B tile side, N tokens; width: outputs that share a column
list (row_group*B).

By a model of the time, in microseconds, fitted to the products of 1400 layers (17 to 6000 tokens,
25 to 100% density, 640 to 14336 features, some 35 tilings each, one H200). Of tiles 64 and 128 its
choice takes 2% more than the best of them all does; the rules that it replaced took 7 to 57% more,
but for tile 64 in pairs of rows from 1100 tokens on (1%). On 30 products of layers that it was not
fitted to it took 2% more than the best of a dozen, the rules before 9% more than it.

A program takes a while to find its column and to fetch the first blocks, then so long per step:
`alone` on a multiprocessor what its loads take to arrive, beside others no less than a share of
what the multiprocessor multiplies and L2 gives (`busy`). Programs come in rounds. Where there are
few, several share a column's sum, and a second kernel adds their parts up.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

from blockell_kernels._backends import Case
from blockell_kernels._triton._device import num_sms
from blockell_kernels._triton._tiling import Tiling, ceil_div, power_of_two_divisor

FEWEST, FEWEST_OF_SMALL = 16, 32
"""Up to so many tokens the kernels for few tokens are taken, the latter for tiles below 64."""
FEWEST_OF_NARROW, NARROW = 64, 12
"""As `FEWEST`, where results are fewer than the latter times multiprocessors: 3 to 8% less time."""
FEWEST_OF_SHORT, SHORT = 32, 512
"""As `FEWEST`, where sums are no longer than the latter."""
MANY_FOR_SMALL = 1024
"""Beyond, the general rules are as good for tiles below 64."""
MOST_PARTS, FEWEST_STEPS = 8, 3
"""Of a column's sum, and the steps that a part has at least."""
MOST_PROGRAMS = 2.5
"""Per multiprocessor, where sums are split."""
MOST_SUMMED = 2**23
"""Elements of all parts."""

BEGIN = 1.74
"""us until a program's first step: its column, that column's blocks, their first bytes."""
END = 0.39
"""us that storing 128 x 128 outputs takes."""
SPREAD = 1.78
"""Standard deviations by which the longest column is longer than the mean."""
WHOLE = 0.84
"""Share in which rounds count as whole; for the rest, programs follow one another at once."""
ADD, ADD_MB = 0.84, 0.43
"""us of the kernel that adds parts up, and per megabyte of them that is written and read."""


class Tile(NamedTuple):
    """What a program of the Triton kernel owns, and what its steps take."""

    tokens: int
    columns: int
    depth: int
    stages: int
    resident: int
    """Programs that a multiprocessor holds."""
    alone: float
    busy: float

    def tiling(self, parts: int) -> Tiling:
        """As the launchers take it."""
        return Tiling(
            path="descriptors", BM=self.tokens, BN=self.columns, BK=self.depth,
            stages=self.stages, parts=parts,
        )  # fmt: skip


WIDE = (
    Tile(64, 64, 64, 6, 2, 0.23, 0.18),
    Tile(64, 64, 128, 4, 1, 0.33, 0.33),
    Tile(128, 64, 64, 3, 3, 0.44, 0.25),
    Tile(128, 64, 64, 5, 1, 0.26, 0.26),
    Tile(256, 64, 64, 4, 1, 0.44, 0.44),
    Tile(128, 128, 64, 3, 2, 0.5, 0.34),
    Tile(128, 128, 64, 4, 1, 0.36, 0.36),
)
TILES = {
    128: WIDE,
    64: tuple(tile for tile in WIDE if tile.columns == 64),
    32: (
        Tile(64, 32, 128, 4, 2, 0.34, 0.3),
        Tile(128, 32, 64, 5, 2, 0.27, 0.26),
        Tile(256, 32, 64, 4, 1, 0.4, 0.4),
    ),
    16: (
        Tile(64, 16, 128, 4, 2, 0.37, 0.28),
        Tile(128, 16, 128, 4, 1, 0.43, 0.43),
        Tile(128, 16, 64, 6, 2, 0.33, 0.24),
    ),
}

UNITS_CUTS = {
    128: ((256, 128), (128, 128), (64, 128), (320, 64)),
    64: ((320, 64), (256, 64), (128, 64)),
}
"""Columns of a program and outputs of a unit of the Gluon kernel, by width."""
UNITS_START = {64: 1.2, 32: 1.9, 16: 2.2}
"""us by which the Gluon kernel begins later, by tile."""
UNITS_ROUND = 0.9
"""us that a round takes beside its units."""
UNIT, UNIT_COLUMN, UNIT_PASSED = 0.24, 0.03, 0.12
"""us that a unit of 64 outputs takes for its slice of dy, for each column, held or not, and where
none is held."""
UNIT_MULTIPLIED = {64: 0.53, 32: 0.68, 16: 1.1}
"""Share of its products' time at full rate that a unit adds, by tile."""
UNIT_SHARE = {(256, 128): 1.13, (128, 128): 0.92}
"""As much longer units of tile 64 take that are cut so: four columns leave few stages."""
FEWEST_HELD = 0.3
"""Density below which the Gluon kernel was not measured, at tile 64."""
REARRANGED_MB = 0.25
"""us per megabyte of blocks below 64, which are rearranged first, to write and read."""
TRAFFIC_MB = 0.09
"""us per megabyte of operands and result by which the Triton kernels take longer."""
MULTIPLIED, LOADED = 3.6e6, 80e3
"""Products, and bytes from L2, to a us and multiprocessor."""
COMMON, SLACK = 5.6, 1.06
"""us of every product; and as much more time in all may be taken to leave more of the GPU to what
runs beside: the weight gradient, as a rule."""


class Cost(NamedTuple):
    """What a product takes by one way."""

    us: float
    """Beyond what all of them take."""
    occupied: float
    """us times multiprocessors."""


def tiling_for(case: Case) -> Tiling | None:
    """The tiling of a case, None: that of the general rules."""
    B, width = case.B, min(128, power_of_two_divisor(case.row_group * case.B))
    if B not in TILES or _few(case):
        return None
    if B < 64 and (width < 128 or case.N > MANY_FOR_SMALL):
        return None
    found = {
        tile.tiling(parts): tile_cost(case, tile, parts)
        for tile in TILES[B]
        if tile.depth <= width and tile.tokens <= max(64, 2 * case.N - 1)
        for parts in _parts(case, tile)
    }
    if B < 128 and case.N >= 128 and (B < 64 or case.density >= FEWEST_HELD):
        for columns, outputs in UNITS_CUTS[width]:
            if columns < 2 * B:  # the kernel takes no fewer than two block columns
                continue
            tiling = Tiling(path="gluon", BM=128, BN=columns, BK=outputs)
            found[tiling] = units_cost(case, columns, outputs)
    enough = SLACK * (COMMON + min(found.values()).us) - COMMON
    near = {tiling: cost for tiling, cost in found.items() if cost.us <= enough}
    return min(near, key=lambda tiling: near[tiling].occupied)


def _few(case: Case) -> bool:
    """Whether the kernels for few tokens are as good or better."""
    tokens, results = case.N, case.C * case.B
    if case.B < 64:
        return tokens <= FEWEST_OF_SMALL
    if tokens <= FEWEST_OF_SHORT and case.R * case.density * case.B <= SHORT:
        return True
    narrow = results < NARROW * num_sms(case.device)
    return tokens <= FEWEST_OF_NARROW if narrow else tokens <= FEWEST


def _programs(case: Case, tile: Tile) -> int:
    return ceil_div(case.N, tile.tokens) * (case.C * case.B // tile.columns)


def _parts(case: Case, tile: Tile) -> list[int]:
    """Into how many parts sums may be split."""
    most = min(
        MOST_PARTS,
        int(MOST_PROGRAMS * num_sms(case.device)) // _programs(case, tile),
        int(case.R * case.density * case.B / tile.depth / FEWEST_STEPS),
        MOST_SUMMED // (case.N * case.C * case.B),
    )
    return list(range(1, max(1, most) + 1))


def tile_cost(case: Case, tile: Tile, parts: int) -> Cost:
    """By the Triton kernels."""
    B, density = case.B, case.density
    programs, sms = _programs(case, tile) * parts, num_sms(case.device)
    per_sm = ceil_div(programs, sms)
    beside = min(tile.resident, per_sm)
    steps = case.R * density * B / tile.depth / parts
    spread = SPREAD * sqrt(case.R * case.row_group * density * (1 - density))
    spread *= B / tile.depth / parts
    end = END * tile.tokens * tile.columns / 128**2
    alone = BEGIN + steps * tile.alone + end
    busy = steps * tile.busy + end
    rounds, left = divmod(per_sm, beside)
    whole = rounds * max(alone, beside * busy) + (max(alone, left * busy) if left else 0.0)
    flowing = max(1.0, programs / sms) * max(alone / beside, busy)
    mean = WHOLE * whole + (1 - WHOLE) * flowing + spread * tile.busy
    taken = max(alone + spread * tile.alone, mean)
    occupied = programs * max(alone / tile.resident, busy)
    if parts > 1:
        adding = ADD + ADD_MB * parts * case.N * case.C * B * 4e-6
        taken, occupied = taken + adding, occupied + sms * adding
    return Cost(taken + TRAFFIC_MB * _traffic_mb(case), occupied)


def _traffic_mb(case: Case) -> float:
    features = case.C * case.B, case.R * case.B
    return 2e-6 * (case.N * sum(features) + case.density * features[0] * features[1])


def units_cost(case: Case, columns: int, outputs: int) -> Cost:
    """By units, on the Gluon kernel."""
    B, density = case.B, case.density
    across = min(columns // B, case.C)
    tiles = ceil_div(case.N, 128) * ceil_div(case.C * B, columns)
    some, held = 1 - (1 - density) ** across, across * density * B
    multiplied = UNIT_MULTIPLIED[B] * 128 * held * outputs / MULTIPLIED
    loaded = (128 * some + held) * outputs * 2 / LOADED
    unit = max(some * UNIT * sqrt(outputs / 64) + UNIT_COLUMN * across + multiplied, loaded)
    unit += (1 - some) * UNIT_PASSED
    if B == 64:
        unit *= UNIT_SHARE.get((columns, outputs), 1.0)
    rounds = ceil_div(tiles, num_sms(case.device))
    running = rounds * (UNITS_ROUND + case.R * B / outputs * unit)
    taken = UNITS_START[B] + BEGIN + running
    if B < 64:
        taken += REARRANGED_MB * density * case.R * case.C * B**2 * 4e-6
    return Cost(taken, min(tiles, num_sms(case.device)) * running)
