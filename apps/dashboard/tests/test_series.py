"""Series of a run: few reads, and metrics that grow."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from blockell_dashboard.series import LayerSeries, MetricLog, monotone_levels


@given(st.lists(st.integers(0, 3), max_size=200).map(sorted))
def test_monotone_levels_equal_the_sequence(values: list[int]) -> None:
    assert monotone_levels(len(values), values.__getitem__).tolist() == values


def test_monotone_levels_read_little() -> None:
    values = [5] * 4000 + [9] * 6000
    reads: list[int] = []

    def read(at: int) -> int:
        reads.append(at)
        return values[at]

    assert monotone_levels(len(values), read).tolist() == values
    assert len(reads) < 20


def test_metrics_put_the_training_loss_first() -> None:
    log = MetricLog()
    log.update([{"step": 1, "eval/loss": 2.0, "loss": 1.0, "lr": 0.1, "note": "x", "ok": True}])
    assert log.names == ["loss", "eval/loss", "lr"]


def test_metrics_are_sorted_by_step_and_keep_what_is_not_finite() -> None:
    log = MetricLog()
    records = [{"step": 3, "loss": 1.0}, {"step": 1, "loss": float("nan")}]
    log.update(records)
    records = [*records, {"step": 2, "loss": 5}]
    log.update(records)
    steps, values = log.get("loss")
    assert steps.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(values, [np.nan, 5, 1])
    assert log.get("unknown")[0].size == 0


def test_metrics_start_anew_when_history_changed() -> None:
    log = MetricLog()
    log.update([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}])
    log.update([{"step": 1, "loss": 7.0}])
    assert log.get("loss")[1].tolist() == [7.0]


def test_series_of_nothing_have_usable_ranges() -> None:
    series = LayerSeries.from_rows([], [], sampled=False)
    assert (series.age_limit, series.age_scale) == (10.0, 10.0)
    assert series.score_range == (0.0, 1.0)


def test_few_old_blocks_do_not_darken_the_rest() -> None:
    rows = [(1.0, 0.0, 20.0, 70.0, 4000.0, 0.0, 1.0), (1.0, 0.0, 20.0, 75.0, 900.0, 0.0, 1.0)]
    series = LayerSeries.from_rows([100, 200], rows, sampled=False)
    assert (series.age_limit, series.age_scale) == (4000.0, 80.0)
