"""Tilings of the weight gradient below `LONG_TOKENS` tokens, of 16-bit operands on Hopper.

Legend: R block rows, K live blocks per row, B tile side, N tokens.

By a model of the time: every cut has a few times of its own, fitted to 2400 products of 33 to 8191
tokens on one H200, some 15 cuts each. Of the cut, and the number of parts of the tokens, that would
take the least, the time is 1.8% above the least of all that were measured, on average over 280
products of layers that the fit had not seen. 240 products of 12 other layers took 0.89 of what the
rules before had taken, 1.13 at most (81bece4, 2026-11-28).
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
from blockell_kernels._triton._tilings_gluon import may_pack


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
    Cut("descriptors", 64, 64, 4, 4, 0.358, 0.136, 0.45, 0.54, 0.39),
    Cut("descriptors", 64, 64, 4, 6, 0.252, 0.147, 0.36, 0.75, 0.62),
    Cut("descriptors", 64, 128, 4, 3, 0.494, 0.199, 1.03, 0.55, 0.78),
    Cut("descriptors", 64, 128, 4, 4, 0.354, 0.202, 1.56, 0.49, 0.38),
    Cut("descriptors", 64, 128, 4, 8, 0.239, 0.21, 1.9, 0.55, 0.67),
    Cut("descriptors", 64, 256, 4, 5, 0.327, 0.311, 1.71, 1.06, 1.23),
    Cut("descriptors", 128, 64, 4, 4, 0.37, 0.237, 1.1, 0.71, 0.92),
    Cut("descriptors", 128, 128, 4, 3, 0.547, 0.31, 0.92, 1.39, 1.58),
    Cut("descriptors", 128, 128, 4, 6, 0.332, 0.304, 1.84, 1.07, 1.28),
    Cut("descriptors", 128, 256, 8, 4, 0.616, 0.534, 1.88, 1.82, 2.14),
    Cut("gluon", 64, 512, 4, 3, 0.52, 0.88, 3.47, 4.13, 2.48),
    Cut("gluon", 128, 192, 4, 3, 0.509, 0.379, 2.58, 3.1, 1.46),
    Cut("gluon", 128, 256, 4, 3, 0.579, 0.678, 3.28, 4.34, 1.94),
    Cut("gluon", 128, 320, 4, 3, 0.742, 0.849, 3.75, 4.9, 3.19),
    Cut("gluon streamed", 64, 256, 4, 3, 0.427, 0.278, 1.77, 0.56, 0.74),
    Cut("gluon streamed", 128, 128, 4, 3, 0.334, 0.259, 2.13, 0.56, 0.61),
    Cut("gluon streamed", 128, 256, 4, 3, 0.687, 0.528, 1.21, 1.06, 1.92),
)
TILE_32 = (
    Cut("gluon", 128, 64, 4, 3, 0.268, 0.21, 1.38, 0.46, 0.37),
    Cut("gluon", 128, 160, 4, 3, 0.478, 0.434, 2.16, 1.68, 1.97),
    Cut("gluon", 128, 192, 4, 3, 0.518, 0.495, 2.48, 1.87, 2.15),
    Cut("gluon", 128, 256, 4, 3, 0.648, 0.655, 2.64, 2.97, 3.42),
    Cut("gluon", 128, 320, 4, 3, 0.825, 0.661, 2.87, 3.58, 4.84),
    Cut("gluon streamed", 128, 128, 4, 3, 0.34, 0.206, 1.99, 0.56, 0.79),
    Cut("gluon streamed", 128, 256, 4, 3, 0.721, 0.694, 1.59, 1.06, 1.8),
    Cut("pointers", 64, 64, 4, 4, 0.473, 0.12, 0.05, 0.8, 0.66),
    Cut("pointers", 64, 64, 4, 6, 0.378, 0.018, 0.01, 1.06, 1.08),
    Cut("pointers", 128, 128, 4, 3, 0.616, 0.382, 0.48, 1.99, 2.57),
    Cut("pointers", 128, 128, 4, 4, 0.445, 0.256, 1.95, 0.87, 0.98),
    Cut("pointers", 128, 128, 4, 6, 0.445, 0.236, 2, 1.21, 1.4),
    Cut("pointers", 128, 256, 8, 4, 0.949, 0.099, 1.82, 2.31, 1.26),
)
TILE_16 = (
    Cut("gluon", 128, 64, 4, 3, 0.302, 0.195, 1.18, 0.11, 0.52),
    Cut("gluon", 128, 192, 4, 3, 0.605, 0.813, 1.91, 1.36, 3.29),
    Cut("gluon packed", 128, 128, 4, 3, 0.387, 0.351, 1.28, 0.48, 1.37),
    Cut("gluon packed", 128, 256, 4, 3, 0.658, 0.169, 2.12, 0.82, 3.26),
    Cut("gluon packed", 128, 320, 4, 3, 0.821, 0.528, 2.57, 1.38, 4.86),
    Cut("gluon streamed packed", 128, 128, 4, 3, 0.361, 0.254, 1.36, 0.56, 1.11),
    Cut("gluon streamed packed", 128, 256, 4, 3, 0.657, 0.554, 0.91, 1.06, 2.92),
    Cut("pointers", 64, 64, 4, 4, 0.513, 0.022, 0.01, 0.87, 0.79),
    Cut("pointers", 64, 64, 4, 6, 0.412, 0.163, 0.01, 1.11, 1.26),
    Cut("pointers", 128, 64, 4, 4, 0.576, 0.193, 0.01, 1.52, 1.44),
    Cut("pointers", 128, 128, 4, 3, 0.637, 0.401, 0.45, 2.09, 2.86),
    Cut("pointers", 128, 128, 4, 6, 0.476, 0.311, 2.36, 0.95, 2.06),
    Cut("pointers", 128, 256, 8, 4, 0.994, 0.631, 2.12, 2.55, 1.83),
)
# fmt: on
BASE, PERSISTENT = 5.0, 1.2
"""us of any product, and of a persistent kernel more."""
MOST_PARTS = 24
SPLIT = 1.05
"""Parts have to gain this much: other kernels, beside, then find more of the GPU free."""
ADD, ADD_MB = 2.2, 0.3
"""us of adding up the parts, and per MB of them."""
PACK, PACK_MB = 1.6, 0.45
"""us of packing x, and per MB of it."""
L2_BYTES, LOADED_AGAIN, WIDE_X = 35e6, 1.25, 1.15
"""x and dy of more bytes are loaded again from memory: factors of a program's steps that are bound
by loads, and of all steps of small tiles where x is the wider one."""
MEMORY = 3.6
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
    if "packed" in cut.path and not may_pack(case):
        return False
    return cut.path != "descriptors" or cut.columns in (case.B, 2 * case.B)


def _fastest(case: Case, cuts: list[Cut]) -> Tiling:
    sms, steps = num_sms(case.device), ceil_div(case.N, STEP)
    ways = []
    for cut in cuts:
        tiles = tiles_of(case, cut)
        splits = "streamed" not in cut.path
        most = min(MOST_PARTS, steps // 2, 4 * sms // tiles) if splits else 1
        ways += [(product_us(case, cut, parts), cut, parts) for parts in range(1, max(most, 1) + 1)]
        if splits and cut.persistent and sms < tiles < 4 * sms and tiles % sms:
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
    cut = _beyond_l2(cut, 2 * case.N * inputs, 2 * case.N * outputs)
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


def _beyond_l2(cut: Cut, x_bytes: int, dy_bytes: int) -> Cut:
    """What a cut takes with operands of that size."""
    if not cut.persistent and x_bytes + dy_bytes > L2_BYTES:
        cut = cut._replace(shared=cut.shared * LOADED_AGAIN)
    if x_bytes > max(dy_bytes, L2_BYTES) and cut.rows * cut.columns <= 128 * 128:
        cut = cut._replace(alone=cut.alone * WIDE_X, shared=cut.shared * WIDE_X)
    return cut


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
