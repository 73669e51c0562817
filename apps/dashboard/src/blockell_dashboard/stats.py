"""The numbers behind the charts: numpy in, numpy out, no reading and no drawing.

R block rows, C block columns, K slots per row, S steps of a series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ABSENT",
    "BORN",
    "CHANGE_NAMES",
    "DIED",
    "HEALTHY_SWAP_RATE",
    "KEPT",
    "AgeSummary",
    "Tiles",
    "age_histogram",
    "age_summary",
    "block_grid",
    "bucket_indices",
    "change_grid",
    "change_since",
    "loss_spikes",
    "nice_ceiling",
    "outside_band",
    "robust_range",
    "rolling_mean",
    "swap_rates",
    "tile_grid",
]

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]

HEALTHY_SWAP_RATE = (0.01, 0.10)
"""Share of blocks replaced per decision: below it the topology is frozen, above it churns."""

ABSENT, KEPT, BORN, DIED = 0, 1, 2, 3
CHANGE_NAMES = ("no block", "kept", "born", "died")
"""Names of the codes in `change_grid`, in order."""


def block_grid(
    col_indices: IntArray, values: NDArray[Any], C: int, dtype: Any = np.float32
) -> NDArray[Any]:
    """Spread a quantity per slot over the [R, C] grid of block positions.

    Args:
        col_indices: [R, K] block columns, -1 in spare slots.
        values: [R, K] one number per slot.
        C: block columns.
        dtype: of the result; float32 holds whole numbers below 16.7 million.

    Returns:
        [R, C]; NaN where there is no block, so that absent never looks like zero.
    """
    grid = np.full((col_indices.shape[0], C), np.nan, dtype=dtype)
    rows, slots = np.nonzero(_present(col_indices, C))
    grid[rows, col_indices[rows, slots]] = values[rows, slots]
    return grid


def change_grid(
    col_indices: IntArray, swapped: NDArray[np.bool_], previous_columns: IntArray, C: int
) -> NDArray[np.uint8]:
    """What this decision did at every block position.

    Args:
        col_indices: [R, K] block columns after the decision, -1 in spare slots.
        swapped: [R, K] True for slots whose block was replaced.
        previous_columns: [R, K] the column each slot held before.
        C: block columns.

    Returns:
        uint8 [R, C] of ABSENT, KEPT, BORN, DIED. A position that one slot left and another
        took in the same decision is BORN: its weights are new.
    """
    grid = np.full((col_indices.shape[0], C), ABSENT, dtype=np.uint8)
    left = swapped & _present(previous_columns, C)
    present = _present(col_indices, C)
    for mask, columns, code in (
        (left, previous_columns, DIED),
        (present & ~swapped, col_indices, KEPT),
        (present & swapped, col_indices, BORN),
    ):
        rows, slots = np.nonzero(mask)
        grid[rows, columns[rows, slots]] = code
    return grid


def change_since(
    before: IntArray, ages_before: IntArray, after: IntArray, ages_after: IntArray, C: int
) -> NDArray[np.uint8]:
    """What became of every block position between two snapshots of one layer.

    Args:
        before, after: [R, K] block columns at the earlier and the later one, -1 in spare slots.
        ages_before, ages_after: [R, K] block ages in steps.
        C: block columns.

    Returns:
        uint8 [R, C] of ABSENT, KEPT, BORN, DIED. A position that was given up and taken again in
        between is BORN, since its weights are new: all blocks that live on age by the same number
        of steps, and what aged by less was born in between.
    """
    old = block_grid(before, ages_before, C, dtype=np.float64)
    new = block_grid(after, ages_after, C, dtype=np.float64)
    there, here = np.isfinite(old), np.isfinite(new)
    grid = np.full(old.shape, ABSENT, dtype=np.uint8)
    grid[there & ~here] = DIED
    grid[here] = BORN
    both = there & here
    if both.any():
        aged = np.where(both, new - old, -np.inf)
        grid[both & (aged == aged.max())] = KEPT
    return grid


def _present(columns: IntArray, C: int) -> NDArray[np.bool_]:
    return np.asarray((columns >= 0) & (columns < C))


@dataclass(frozen=True)
class Tiles:
    """A grid made small enough to draw.

    Attributes:
        values: the grid, one entry per tile of cells.
        row_step: block rows per tile.
        column_step: block columns per tile.
    """

    values: NDArray[Any]
    row_step: int
    column_step: int

    @property
    def aggregated(self) -> bool:
        """True when a tile stands for more than one block position."""
        return self.row_step > 1 or self.column_step > 1


def tile_grid(grid: NDArray[Any], max_cells_per_side: int = 500) -> Tiles:
    """Aggregate a grid of more than `max_cells_per_side` rows or columns.

    Float grids give the mean over the blocks present (NaN where a tile has none); grids of
    change codes give the most notable code (died over born over kept over absent), so that no
    change vanishes.
    """
    if max_cells_per_side < 1:
        raise ValueError(f"max_cells_per_side (={max_cells_per_side}) must be at least 1.")
    steps = tuple(max(1, -(-side // max_cells_per_side)) for side in grid.shape)
    if steps == (1, 1):
        return Tiles(grid, 1, 1)
    starts = [np.arange(0, side, step) for side, step in zip(grid.shape, steps, strict=True)]

    def pooled(ufunc: np.ufunc, cells: NDArray[Any]) -> NDArray[Any]:
        by_rows = ufunc.reduceat(cells, starts[0], axis=0)
        return np.asarray(ufunc.reduceat(by_rows, starts[1], axis=1))

    if np.issubdtype(grid.dtype, np.floating):
        there = np.isfinite(grid)
        total = pooled(np.add, np.where(there, grid, 0).astype(np.float64))
        count = pooled(np.add, there.astype(np.int64))
        mean = np.full(total.shape, np.nan, dtype=np.float32)
        np.divide(total, count, out=mean, where=count > 0, casting="same_kind")
        return Tiles(mean, *steps)
    return Tiles(pooled(np.maximum, grid), *steps)


@dataclass(frozen=True)
class AgeSummary:
    """Block ages of one layer at one step, in training steps; NaN when there is no block."""

    median: float
    p90: float
    maximum: float
    blocks: int


def age_summary(ages: NDArray[Any]) -> AgeSummary:
    """Median, 90th percentile and maximum of the ages (1-D, live blocks only)."""
    if ages.size == 0:
        return AgeSummary(float("nan"), float("nan"), float("nan"), 0)
    median, p90 = np.percentile(ages, [50, 90])
    return AgeSummary(float(median), float(p90), float(ages.max()), int(ages.size))


def age_histogram(
    ages: NDArray[Any], upper: float, bins: int = 24
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Count blocks per age.

    `upper` fixes the range, so that histograms of different steps can be compared; older blocks
    fall into the last bin. Bins are whole steps wide.

    Returns:
        left edges [n], right edges [n], counts [n]; n is `bins` or less.
    """
    width = max(1, int(np.ceil((upper + 1) / bins)))
    n = max(1, int(np.ceil((upper + 1) / width)))
    edges = np.arange(n + 1, dtype=np.float64) * width
    counts = np.bincount(np.clip(ages // width, 0, n - 1).astype(np.int64), minlength=n)
    return edges[:-1], edges[1:], counts


def nice_ceiling(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 6, 8, 10 times a power of ten.

    Axis and colour ranges that end here stay put while a live run grows a little.
    """
    if not np.isfinite(value) or value <= 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    for factor in (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0):
        if value <= factor * power * (1 + 1e-9):
            return float(factor * power)
    return float(10.0 * power)


def robust_range(values: NDArray[Any], low: float = 2.0, high: float = 95.0) -> tuple[float, float]:
    """Percentiles (low, high) of the finite values, as the ends of a colour scale.

    A few huge scores would otherwise leave one colour for all the rest. Never empty: equal ends
    are moved apart; (0, 1) when nothing is finite.
    """
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    lower, upper = (float(v) for v in np.percentile(finite, [low, high]))
    if upper <= lower:
        margin = abs(lower) * 0.5 or 0.5
        return lower - margin, upper + margin
    return lower, upper


def swap_rates(swap_counts: NDArray[Any], blocks: NDArray[Any]) -> NDArray[np.float64]:
    """Share of blocks replaced per decision [S]; NaN where a layer has no block."""
    rates = np.full(len(swap_counts), np.nan)
    np.divide(swap_counts, blocks, out=rates, where=np.asarray(blocks) > 0)
    return rates


def outside_band(
    rates: FloatArray, band: tuple[float, float] = HEALTHY_SWAP_RATE
) -> NDArray[np.bool_]:
    """True where a swap rate lies outside the band; NaN counts as inside."""
    with np.errstate(invalid="ignore"):
        return np.asarray((rates < band[0]) | (rates > band[1]))


def rolling_mean(
    values: FloatArray, window: int, starts: Sequence[int] | IntArray = ()
) -> NDArray[np.float64]:
    """Mean of the last `window` finite values at each position (fewer at the start).

    At the positions `starts` the mean begins anew, as where another task begins.
    """
    if window < 1:
        raise ValueError(f"window (={window}) must be at least 1.")
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    end = np.arange(1, len(values) + 1)
    begun = np.zeros(len(values) + 1, dtype=np.int64)
    begun[np.asarray(starts, dtype=np.int64)] = np.asarray(starts, dtype=np.int64)
    start = np.maximum(end - window, np.maximum.accumulate(begun)[: len(values)])
    mean = np.full(len(values), np.nan)
    seen = count[end] - count[start]
    np.divide(total[end] - total[start], seen, out=mean, where=seen > 0)
    return mean


def loss_spikes(
    losses: FloatArray,
    factor: float = 2.0,
    window: int = 50,
    starts: Sequence[int] | IntArray = (),
) -> NDArray[np.bool_]:
    """True where a loss exceeds `factor` times the mean of the `window` losses before it.

    A loss that is not finite is a spike too. `starts` are positions at which another task begins:
    its losses are not compared with those of the task before.
    """
    before = np.concatenate([[np.nan], rolling_mean(losses, window, starts)[:-1]])[: len(losses)]
    first = np.asarray(starts, dtype=np.int64)
    before[first[first < len(losses)]] = np.nan
    with np.errstate(invalid="ignore"):
        return np.asarray((losses > factor * before) | ~np.isfinite(losses))


def bucket_indices(values: FloatArray, max_points: int = 2000) -> NDArray[np.int64]:
    """Choose positions of a long series to draw so that no spike vanishes.

    The series is cut into equal buckets; of each the first, the smallest, the largest and the
    last value are kept. Short series are kept whole.
    """
    if len(values) <= max_points:
        return np.arange(len(values))
    keep: set[int] = set()
    for bucket in np.array_split(np.arange(len(values)), max(1, max_points // 4)):
        inside = values[bucket]
        keep.update((int(bucket[0]), int(bucket[-1])))
        if np.isfinite(inside).any():
            keep.update((int(bucket[np.nanargmin(inside)]), int(bucket[np.nanargmax(inside)])))
        keep.update(int(i) for i in bucket[~np.isfinite(inside)][:1])
    return np.array(sorted(keep), dtype=np.int64)
