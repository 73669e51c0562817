"""The numbers, against values worked out by hand or by plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockell_dashboard import stats
from blockell_format.snapshots import LayerSnapshot


def test_block_grid_leaves_absent_positions_nan(small_layer: LayerSnapshot) -> None:
    grid = stats.block_grid(small_layer.col_indices, small_layer.block_age_steps, 4)
    nan = np.nan
    np.testing.assert_array_equal(grid, [[30, 0, nan, nan], [nan, nan, 10, 20], [30, 30, nan, nan]])


def test_change_grid_names_born_died_kept(small_layer: LayerSnapshot) -> None:
    grid = stats.change_grid(
        small_layer.col_indices, small_layer.swapped, small_layer.previous_columns, 4
    )
    names = [[stats.CHANGE_NAMES[code] for code in row] for row in grid]
    assert names == [
        ["kept", "born", "no block", "died"],
        ["no block", "no block", "kept", "kept"],
        ["kept", "kept", "no block", "no block"],
    ]


def test_a_position_left_and_taken_in_one_decision_is_born() -> None:
    grid = stats.change_grid(np.array([[1, 2]]), np.array([[True, True]]), np.array([[0, 1]]), 3)
    assert grid.tolist() == [[stats.DIED, stats.BORN, stats.BORN]]


def test_a_slot_taken_from_the_spare_ones_kills_nothing() -> None:
    grid = stats.change_grid(np.array([[0, 1]]), np.array([[False, True]]), np.array([[0, -1]]), 3)
    assert grid.tolist() == [[stats.KEPT, stats.BORN, stats.ABSENT]]


def test_columns_outside_the_grid_are_ignored() -> None:
    grid = stats.block_grid(np.array([[0, 9, -7]]), np.ones((1, 3)), 2)
    np.testing.assert_array_equal(grid, [[1, np.nan]])


def test_small_grids_are_not_aggregated() -> None:
    grid = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    tiles = stats.tile_grid(grid, 3)
    assert not tiles.aggregated
    assert tiles.values is grid


@pytest.mark.parametrize("shape", [(7, 5), (10, 3), (3, 11), (1, 9)])
def test_tiles_hold_the_mean_of_the_blocks_present(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    grid = rng.random(shape).astype(np.float32)
    grid[rng.random(shape) < 0.5] = np.nan
    tiles = stats.tile_grid(grid, 4)
    assert max(tiles.values.shape) <= 4
    for i in range(tiles.values.shape[0]):
        for j in range(tiles.values.shape[1]):
            r, c = i * tiles.row_step, j * tiles.column_step
            cells = grid[r : r + tiles.row_step, c : c + tiles.column_step]
            cells = cells[~np.isnan(cells)]
            want = cells.mean() if cells.size else np.nan
            np.testing.assert_allclose(tiles.values[i, j], want, rtol=1e-5)


def test_tiles_of_changes_keep_the_most_notable() -> None:
    grid = np.zeros((4, 4), dtype=np.uint8)
    grid[0, 0], grid[1, 1] = stats.KEPT, stats.BORN
    grid[2, 3] = stats.DIED
    assert stats.tile_grid(grid, 2).values.tolist() == [
        [stats.BORN, stats.ABSENT],
        [stats.ABSENT, stats.DIED],
    ]


def test_tile_grid_refuses_zero_cells() -> None:
    with pytest.raises(ValueError, match=r"max_cells_per_side \(=0\) must be at least 1"):
        stats.tile_grid(np.zeros((2, 2)), 0)


def test_age_summary() -> None:
    summary = stats.age_summary(np.arange(11))
    assert (summary.median, summary.p90, summary.maximum, summary.blocks) == (5, 9, 10, 11)


def test_age_summary_of_no_blocks_is_nan() -> None:
    summary = stats.age_summary(np.empty(0))
    assert summary.blocks == 0
    assert np.isnan(summary.median)


@given(st.lists(st.integers(0, 5000), max_size=60), st.integers(1, 6000))
def test_age_histogram_counts_every_block_once(ages: list[int], upper: int) -> None:
    left, right, counts = stats.age_histogram(np.array(ages, dtype=np.int64), float(upper))
    assert counts.sum() == len(ages)
    assert len(left) <= 24
    assert right[-1] > upper
    np.testing.assert_array_equal(left[1:], right[:-1])
    for start, stop, count in zip(left[:-1], right[:-1], counts[:-1], strict=True):
        assert count == sum(start <= age < stop for age in ages)


def test_age_histogram_puts_older_blocks_into_the_last_bin() -> None:
    _, right, counts = stats.age_histogram(np.array([0, 5, 99]), 9.0, bins=5)
    assert right.tolist() == [2, 4, 6, 8, 10]
    assert counts.tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("value", "ceiling"),
    [(1, 1), (1.2, 1.5), (975, 1000), (101, 150), (7, 8), (8.5, 10), (0, 1), (-3, 1), (np.nan, 1)],
)
def test_nice_ceiling(value: float, ceiling: float) -> None:
    assert stats.nice_ceiling(value) == pytest.approx(ceiling)


def test_robust_range_ignores_outliers_and_rubbish() -> None:
    values = np.concatenate([np.linspace(0, 1, 1000), [1e9, np.nan, np.inf]])
    low, high = stats.robust_range(values)
    assert 0 <= low < 0.05
    assert 0.9 < high < 1.1


@pytest.mark.parametrize("values", [[], [np.nan], [3.0, 3.0], [0.0]])
def test_robust_range_is_never_empty(values: list[float]) -> None:
    low, high = stats.robust_range(np.array(values))
    assert low < high


def test_swap_rates_without_blocks_are_nan() -> None:
    rates = stats.swap_rates(np.array([5, 0, 1]), np.array([100, 0, 10]))
    np.testing.assert_array_equal(rates, [0.05, np.nan, 0.1])


def test_outside_band_takes_its_ends_as_inside() -> None:
    rates = np.array([0.0099, 0.01, 0.05, 0.10, 0.11, np.nan])
    assert stats.outside_band(rates).tolist() == [True, False, False, False, True, False]


def test_rolling_mean_is_the_mean_of_the_last_values() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 8.0])
    np.testing.assert_allclose(stats.rolling_mean(values, 2), [1, 1.5, 2, 4, 6])
    assert np.isnan(stats.rolling_mean(np.array([np.nan, 1.0]), 3)[0])
    with pytest.raises(ValueError, match=r"window \(=0\)"):
        stats.rolling_mean(values, 0)


def test_loss_spikes_compare_with_the_mean_before() -> None:
    losses = np.array([1.0, 1.0, 1.9, 2.7, 1.0, np.nan, 1.0])
    assert np.flatnonzero(stats.loss_spikes(losses)).tolist() == [3, 5]


def test_short_series_are_kept_whole() -> None:
    assert stats.bucket_indices(np.zeros(2000)).tolist() == list(range(2000))


def test_bucketing_keeps_extremes_ends_and_holes() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(50_000)
    values[12_345], values[40_000], values[777] = 99.0, -99.0, np.nan
    keep = stats.bucket_indices(values, 1000)
    assert len(keep) <= 1300
    assert {0, 777, 12_345, 40_000, 49_999} <= set(keep.tolist())
    assert (np.diff(keep) > 0).all()
