"""Tilings of the weight gradient below `LONG_TOKENS` tokens, of 16-bit operands on Hopper.

Legend: R block rows, K live blocks per row, B tile side, N tokens.

By a model of the time: every cut has a few times of its own, fitted to what 1180 products of 128 to
8192 tokens took on one H200. The cut, and the number of parts of the tokens, that would take the
least is chosen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from blockell_kernels._backends import Case
from blockell_kernels._triton._device import num_sms
from blockell_kernels._triton._tiling import (
    Path,
    Tiling,
    ceil_div,
    power_of_two_divisor,
    round_up_to_power_of_two,
)


class Cut(NamedTuple):
    """A kernel, and what it takes in us."""

    path: Path
    rows: int
    columns: int
    warps: int
    stages: int
    step: float
    """Of 64 tokens, where a multiprocessor works on one program."""
    shared: float
    """Of a step for each of the programs that it works on at a time; of "streamed" kernels, what
    passes between the steps of two tiles."""
    start: float
    """Until the first step."""
    store: float
    """Of results."""
    store_part: float
    """Of float32 sums over a part of the tokens."""

    @property
    def by_program(self) -> bool:
        """Whether a program is a tile: several run on a multiprocessor at a time."""
        return self.path in ("pointers", "descriptors")


# fmt: off
WIDE = (
    Cut("descriptors", 64, 64, 4, 4, 0.356, 0.12, 0.75, 0.43, 0.4),
    Cut("descriptors", 64, 64, 4, 6, 0.219, 0.139, 1.33, 0.24, 0.18),
    Cut("descriptors", 64, 128, 4, 4, 0.36, 0.209, 1.91, 0.23, 0.09),
    Cut("descriptors", 64, 128, 4, 8, 0.249, 0.075, 1.83, 0.63, 0.8),
    Cut("descriptors", 64, 256, 4, 5, 0.319, 0.338, 1.84, 0.96, 1.22),
    Cut("descriptors", 128, 64, 4, 4, 0.363, 0.207, 1.41, 0.54, 0.87),
    Cut("descriptors", 128, 64, 4, 8, 0.247, 0.234, 1.71, 0.52, 0.98),
    Cut("descriptors", 128, 128, 4, 3, 0.552, 0.345, 1.52, 0.87, 0.82),
    Cut("descriptors", 128, 128, 4, 6, 0.346, 0.338, 1.92, 1.01, 1.19),
    Cut("descriptors", 128, 256, 8, 4, 0.5, 0.626, 1.58, 2.14, 2.24),
    Cut("gluon", 64, 384, 4, 3, 0.628, 0.515, 3.03, 3.28, 1.73),
    Cut("gluon", 64, 512, 4, 3, 0.771, 0.751, 3.73, 4.43, 2.36),
    Cut("gluon", 128, 192, 4, 3, 0.496, 0.311, 3.18, 3.47, 1.35),
    Cut("gluon streamed", 64, 256, 4, 3, 0.485, 0.535, 2.87, 0.5, 0.5),
    Cut("gluon streamed", 128, 128, 4, 3, 0.348, 0.496, 3.46, 0.5, 0.5),
    Cut("gluon streamed", 128, 256, 4, 3, 0.71, 1.466, 3.75, 1, 1),
)
TILE_32 = (
    Cut("gluon", 128, 64, 4, 3, 0.307, 0.171, 1.99, 0.63, 1.48),
    Cut("gluon", 128, 128, 4, 3, 0.38, 0.251, 1.94, 2.44, 2.95),
    Cut("gluon", 128, 160, 4, 3, 0.437, 0.287, 2.17, 2.88, 3.64),
    Cut("gluon", 128, 192, 4, 3, 0.495, 0.435, 3.54, 2.02, 1.99),
    Cut("gluon", 128, 320, 4, 3, 0.774, 0.669, 3.58, 3.92, 4.63),
    Cut("gluon streamed", 128, 128, 4, 3, 0.344, 0.684, 3.4, 0.5, 0.5),
    Cut("gluon streamed", 128, 256, 4, 3, 0.736, 1.385, 4.13, 1, 1),
    Cut("pointers", 64, 64, 4, 4, 0.375, 0.162, 1.09, 0.45, 0.55),
    Cut("pointers", 64, 64, 4, 6, 0.181, 0.223, 1.92, 0.01, 0.17),
    Cut("pointers", 128, 128, 4, 3, 0.615, 0.429, 1.07, 1.39, 1.64),
    Cut("pointers", 128, 128, 4, 6, 0.45, 0.399, 2.04, 1.21, 1.43),
)
TILE_16 = (
    Cut("gluon", 128, 64, 4, 3, 0.333, 0.065, 1.41, 0.6, 2.07),
    Cut("gluon", 128, 192, 4, 3, 0.73, 0.727, 2.51, 1.58, 3.71),
    Cut("gluon packed", 128, 128, 4, 3, 0.338, 0.224, 1.9, 1.35, 0.95),
    Cut("gluon packed", 128, 256, 4, 3, 0.531, 0.586, 2.05, 2.12, 3.11),
    Cut("gluon streamed packed", 128, 128, 4, 3, 0.363, 0.968, 2.74, 0.5, 0.5),
    Cut("gluon streamed packed", 128, 256, 4, 3, 0.642, 2.319, 3.83, 1, 1),
    Cut("pointers", 64, 64, 4, 4, 0.163, 0.218, 2.12, 0.01, 0.08),
    Cut("pointers", 64, 64, 4, 6, 0.26, 0.244, 1.78, 0.15, 0.45),
    Cut("pointers", 128, 64, 4, 4, 0.431, 0.316, 1.61, 0.63, 0.84),
    Cut("pointers", 128, 128, 4, 3, 0.645, 0.438, 1.12, 1.47, 1.85),
    Cut("pointers", 128, 128, 4, 6, 0.485, 0.391, 1.86, 1.44, 2.49),
)
# fmt: on
MOST_PARTS = 12
SUM_US, SUM_US_PER_MB = 1.6, 0.35
"""Of adding up the parts."""
PACK_US, PACK_US_PER_MB = 1.2, 0.67
"""Of a packed copy of x."""
MB_PER_US = 3.6
"""From and to memory."""
FEWEST = 64
"""Up to this many tokens, writing the blocks once decides: `_few_tokens`."""
STEP = 64
SHARED_BYTES = 227 * 1024


def tiling_for(case: Case) -> Tiling | None:
    """The tiling of a case, None: that of the general rules."""
    width = min(128, power_of_two_divisor(case.row_group * case.B))
    if case.N <= FEWEST or case.B < 16 or width < 64:
        return None
    cuts = [cut for cut in {16: TILE_16, 32: TILE_32}.get(case.B, WIDE) if _fits(cut, case, width)]
    best = _fastest(case, cuts)
    if best.path in ("pointers", "descriptors"):
        return best
    return replace(best, otherwise=_fastest(case, [cut for cut in cuts if cut.by_program]))


def _fits(cut: Cut, case: Case, width: int) -> bool:
    if cut.rows > width or (not cut.by_program and cut.rows < width):
        return False
    return cut.path != "descriptors" or cut.columns in (case.B, 2 * case.B)


def _fastest(case: Case, cuts: list[Cut]) -> Tiling:
    sms, steps = num_sms(case.device), ceil_div(case.N, STEP)
    ways = []
    for cut in cuts:
        tiles = tiles_of(case, cut)
        for parts in range(1, MOST_PARTS + 1 if "streamed" not in cut.path else 2):
            if parts == 1 or (2 * parts <= steps and tiles * parts <= 4 * sms):
                ways.append((product_us(case, cut, parts), cut, parts))
    _, cut, parts = min(ways, key=lambda way: way[0])
    return Tiling(
        path=cut.path, BM=cut.rows, BN=cut.columns, BK=STEP, warps=cut.warps, stages=cut.stages,
        parts=parts,
    )  # fmt: skip


def tiles_of(case: Case, cut: Cut) -> int:
    """Programs, or what they take one after the other, for every part of the tokens."""
    columns = cut.columns
    if cut.by_program:
        columns = min(columns, round_up_to_power_of_two(case.K) * case.B)
    return case.R * case.B // cut.rows * ceil_div(case.K * case.B, columns)


def product_us(case: Case, cut: Cut, parts: int) -> float:
    """What a product takes, beyond what every way takes."""
    N, inputs, outputs = case.N, case.C * case.B, case.R * case.B
    steps = ceil_div(ceil_div(N, STEP), parts)
    turns = ceil_div(tiles_of(case, cut) * parts, num_sms(case.device))
    store = cut.store if parts == 1 else cut.store_part
    if "streamed" in cut.path:
        us = cut.start + turns * max(steps * cut.step + cut.shared, cut.store)
    else:
        at_a_time = 1
        if cut.by_program:
            of_one = (cut.rows + cut.columns) * STEP * 2 * cut.stages
            at_a_time = max(1, min(4, SHARED_BYTES // of_one))
        us = 0.0
        for programs in [at_a_time] * (turns // at_a_time) + [turns % at_a_time]:
            step = max(cut.step, programs * cut.shared)
            us += (cut.start + steps * step + programs * store) * (programs > 0)
    megabytes = outputs * case.K * case.B / 1e6
    read = N * (min(inputs, 3 * case.K * case.B) + outputs) / 1e6
    us = max(us, 2 * (read + megabytes) / MB_PER_US)
    if parts > 1:
        us += SUM_US + SUM_US_PER_MB * 4 * parts * megabytes
    if "packed" in cut.path:
        us += PACK_US + PACK_US_PER_MB * 2 * N * inputs / 1e6
    return us
