"""Tilings of the weight gradient below `LONG_TOKENS` tokens, of 16-bit operands on Hopper.

Legend: R block rows, K live blocks per row, B tile side, N tokens.

By a model of the time: every cut has a few times of its own, fitted to 1700 products of 32 to 8192
tokens on one H200, some 15 cuts each. Of the cut, and the number of parts of the tokens, that would
take the least, the time was 2.4% above the least of all that were measured, on average over 200
products that the fit had not seen.
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
    alone: float
    """Of a step of 64 tokens."""
    shared: float
    """Of a step for each program of a multiprocessor, where all multiprocessors load."""
    start: float
    """Until the first step."""
    store: float
    """Of results; of "streamed" kernels, no tile takes less."""
    store_part: float
    """Of float32 sums over a part of the tokens; of "streamed" kernels, between two tiles."""

    @property
    def persistent(self) -> bool:
        """Whether a program takes one tile after the other."""
        return self.path not in ("pointers", "descriptors")


# fmt: off
WIDE = (
    Cut("descriptors", 64, 64, 4, 4, 0.335, 0.158, 0.98, 0.28, 0.15),
    Cut("descriptors", 64, 64, 4, 6, 0.234, 0.168, 0.63, 0.54, 0.4),
    Cut("descriptors", 64, 128, 4, 3, 0.054, 0.288, 1.54, 0.01, 0.09),
    Cut("descriptors", 64, 128, 4, 4, 0.358, 0.224, 1.61, 0.4, 0.22),
    Cut("descriptors", 64, 128, 4, 8, 0.249, 0.13, 1.75, 0.65, 0.7),
    Cut("descriptors", 128, 64, 4, 4, 0.362, 0.274, 1.33, 0.5, 0.51),
    Cut("descriptors", 128, 128, 4, 3, 0.542, 0.382, 1.39, 0.94, 1.01),
    Cut("descriptors", 128, 128, 4, 6, 0.317, 0.377, 1.76, 1.09, 1.16),
    Cut("descriptors", 128, 256, 8, 4, 0.601, 0.666, 1.78, 1.86, 2.22),
    Cut("gluon", 64, 384, 4, 3, 0.674, 0.594, 2.55, 2.83, 1.11),
    Cut("gluon", 64, 512, 4, 3, 0.501, 0.889, 3.51, 4.09, 2.24),
    Cut("gluon", 128, 192, 4, 3, 0.508, 0.492, 2.58, 3.09, 1.12),
    Cut("gluon", 128, 256, 4, 3, 0.654, 0.367, 3.23, 4.18, 1.36),
    Cut("gluon", 128, 320, 4, 3, 0.823, 0.653, 3.71, 4.69, 2.53),
    Cut("gluon streamed", 64, 256, 4, 3, 0.375, 0.477, 2.09, 0.5, 0.51),
    Cut("gluon streamed", 128, 128, 4, 3, 0.308, 0.363, 2.45, 0.53, 0.39),
    Cut("gluon streamed", 128, 256, 4, 3, 0.661, 0.727, 1.58, 1, 1.68),
)
TILE_32 = (
    Cut("gluon", 128, 64, 4, 3, 0.289, 0.257, 1.17, 0.58, 0.1),
    Cut("gluon", 128, 192, 4, 3, 0.515, 0.499, 2.09, 2.26, 2.24),
    Cut("gluon", 128, 256, 4, 3, 0.608, 0.692, 2.52, 3.14, 3.53),
    Cut("gluon", 128, 320, 4, 3, 0.835, 0.796, 2.82, 3.61, 4.42),
    Cut("gluon streamed", 128, 128, 4, 3, 0.35, 0.01, 2.08, 0.5, 0.68),
    Cut("gluon streamed", 128, 256, 4, 3, 0.733, 0.507, 1.72, 1, 1.67),
    Cut("pointers", 64, 64, 4, 4, 0.375, 0.211, 1.15, 0.33, 0.3),
    Cut("pointers", 64, 64, 4, 6, 0.374, 0.168, 0.04, 1.05, 1.07),
    Cut("pointers", 128, 128, 4, 3, 0.609, 0.468, 1.17, 1.36, 1.65),
    Cut("pointers", 128, 128, 4, 6, 0.453, 0.127, 1.87, 1.28, 1.43),
)
TILE_16 = (
    Cut("gluon", 128, 64, 4, 3, 0.326, 0.216, 0.93, 0.3, 0.23),
    Cut("gluon packed", 128, 256, 4, 3, 0.675, 0.675, 1.84, 1.01, 2.84),
    Cut("gluon packed", 128, 320, 4, 3, 0.828, 0.764, 1.85, 2.07, 4.99),
    Cut("gluon streamed packed", 128, 128, 4, 3, 0.383, 0.148, 1.35, 0.5, 1),
    Cut("gluon streamed packed", 128, 256, 4, 3, 0.623, 0.701, 1.5, 1.14, 2.52),
    Cut("pointers", 64, 64, 4, 4, 0.4, 0.229, 1.01, 0.43, 0.53),
    Cut("pointers", 64, 64, 4, 6, 0.414, 0.204, 0.01, 1.1, 1.25),
    Cut("pointers", 128, 64, 4, 4, 0.444, 0.353, 1.11, 0.92, 1.06),
    Cut("pointers", 128, 128, 4, 3, 0.637, 0.494, 1.1, 1.47, 1.92),
    Cut("pointers", 128, 128, 4, 6, 0.486, 0.202, 2.25, 1, 2.01),
)
# fmt: on
BASE, PERSISTENT = 5.0, 1.2
"""us of any product, and of a persistent kernel more."""
MOST_PARTS = 12
SPLIT = 1.05
"""Parts have to gain this much: other kernels, beside, then find more of the GPU free."""
ADD, ADD_MB = 2.2, 0.3
"""us of adding up the parts, and per MB of them."""
PACK, PACK_MB = 1.6, 0.45
"""us of packing x, and per MB of it."""
L2_BYTES, BEYOND_L2 = 35e6, 1.25
"""Of x and dy, beyond which steps that are bound by loads take longer."""
MEMORY = 3.0
"""MB per us."""
FEWEST = 32
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
    return replace(best, otherwise=_fastest(case, [cut for cut in cuts if not cut.persistent]))


def _fits(cut: Cut, case: Case, width: int) -> bool:
    if cut.rows > width or (cut.persistent and cut.rows < width):
        return False
    return cut.path != "descriptors" or cut.columns in (case.B, 2 * case.B)


def _fastest(case: Case, cuts: list[Cut]) -> Tiling:
    sms, steps = num_sms(case.device), ceil_div(case.N, STEP)
    ways = []
    for cut in cuts:
        tiles = tiles_of(case, cut)
        most = 1 if "streamed" in cut.path else min(MOST_PARTS, steps // 2, 4 * sms // tiles)
        ways += [(product_us(case, cut, parts), cut, parts) for parts in range(1, max(most, 1) + 1)]
        if cut.persistent and most and sms < tiles < 4 * sms and tiles % sms:
            ways.append((product_us(case, cut, 0), cut, 0))
    _, cut, parts = min(ways, key=lambda way: way[0])
    return Tiling(
        path=cut.path, BM=cut.rows, BN=cut.columns, BK=STEP, warps=cut.warps, stages=cut.stages,
        parts=parts,
    )  # fmt: skip


def tiles_of(case: Case, cut: Cut) -> int:
    """Tiles of the gradient."""
    columns = cut.columns
    if not cut.persistent:
        columns = min(columns, round_up_to_power_of_two(case.K) * case.B)
    return case.R * case.B // cut.rows * ceil_div(case.K * case.B, columns)


def product_us(case: Case, cut: Cut, parts: int) -> float:
    """What a product takes by one cut, its tokens in parts; 0: those of the last round's tiles."""
    sms, steps, items = num_sms(case.device), ceil_div(case.N, STEP), tiles_of(case, cut)
    megabytes = case.R * case.K * case.B**2 / 1e6
    inputs, outputs = case.C * case.B, case.R * case.B
    if not cut.persistent and 2 * case.N * (inputs + outputs) > L2_BYTES:
        cut = cut._replace(shared=cut.shared * BEYOND_L2)
    us, summed, per_part = 0.0, 0.0, ceil_div(steps, max(parts, 1))
    if parts == 0:
        rest = items % sms
        us = items // sms * (cut.start + steps * max(cut.alone, cut.shared) + cut.store)
        per_part = ceil_div(steps, max(1, min(sms // rest, steps // 4)))
        pieces = ceil_div(steps, per_part)
        summed, items = (pieces > 1) * pieces * megabytes * rest / items, rest * pieces
    elif parts > 1:
        summed, items = parts * megabytes, items * parts
    us += _rounds_us(cut, items, sms, per_part, cut.store_part if summed else cut.store)
    read = case.N * (min(inputs, 3 * case.K * case.B) + outputs) / 1e6
    us = max(us, 2 * (read + megabytes) / MEMORY) + BASE + PERSISTENT * cut.persistent
    if summed:
        us += ADD + ADD_MB * 4 * summed
    if "packed" in cut.path:
        us += PACK + PACK_MB * 2 * case.N * inputs / 1e6
    return us * SPLIT if parts > 1 else us


def _rounds_us(cut: Cut, items: int, sms: int, steps: int, store: float) -> float:
    """Items in rounds of as many programs as the multiprocessors hold at a time."""
    held = 1
    if not cut.persistent:
        of_one = (cut.rows + cut.columns) * STEP * 2 * cut.stages
        held = max(1, min(4, SHARED_BYTES // of_one))
    rounds, rest = divmod(items, held * sms)
    last = ceil_div(rest, sms)
    busy = rest / (sms * max(last, 1))
    if "streamed" in cut.path:
        whole = max(steps * max(cut.alone, cut.shared) + cut.store_part, cut.store)
        part = max(steps * max(cut.alone, busy * cut.shared) + cut.store_part, cut.store)
        return cut.start + rounds * whole + (last > 0) * part
    us = rounds * (cut.start + steps * max(cut.alone, held * cut.shared) + held * store)
    if last:
        us += cut.start + steps * max(cut.alone, last * busy * cut.shared) + last * store
    return us
