"""What is known of a run over time, as arrays. S recorded steps, L layers, C block columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockell_format import column_entropy, column_usage
from blockell_format.snapshots import LayerInfo, LayerSnapshot

from . import stats

__all__ = ["LayerSeries", "MetricLog", "SwapHistory", "is_loss", "monotone_levels", "summarise"]

Row = tuple[float, ...]
_SHORTEST_AGE_AXIS = 10.0
SUMMARY_FIELDS = ("col_indices", "block_age_steps", "block_score")


@dataclass(frozen=True)
class LayerSeries:
    """One layer at the steps that were read; arrays of length S."""

    steps: NDArray[np.int64]
    entropy: NDArray[np.float64]
    """Normalised column entropy."""
    dead_columns: NDArray[np.int64]
    """Columns without a block."""
    median_age: NDArray[np.float64]
    p90_age: NDArray[np.float64]
    max_age: NDArray[np.float64]
    score_low: NDArray[np.float64]
    """2nd percentile of the finite scores."""
    score_high: NDArray[np.float64]
    """95th percentile of the finite scores."""
    sampled: bool = False
    """True when only some of the run's steps were read."""

    @classmethod
    def from_rows(cls, steps: list[int], rows: list[Row], sampled: bool) -> LayerSeries:
        """Series from what `summarise` gave for each step."""
        table = np.array(rows, dtype=np.float64).reshape(len(rows), 7)
        entropy, dead, median, p90, oldest, low, high = table.T
        return cls(
            steps=np.array(steps, dtype=np.int64),
            entropy=entropy,
            dead_columns=dead.astype(np.int64),
            median_age=median,
            p90_age=p90,
            max_age=oldest,
            score_low=low,
            score_high=high,
            sampled=sampled,
        )

    @property
    def age_limit(self) -> float:
        """End of an age axis that fits every step."""
        finite = self.max_age[np.isfinite(self.max_age)]
        return stats.nice_ceiling(float(finite.max(initial=_SHORTEST_AGE_AXIS)))

    @property
    def age_scale(self) -> float:
        """End of a scale of colours for every step; few very old blocks do not darken the rest."""
        finite = self.p90_age[np.isfinite(self.p90_age)]
        return stats.nice_ceiling(float(finite.max(initial=_SHORTEST_AGE_AXIS)))

    @property
    def score_range(self) -> tuple[float, float]:
        """Ends of a score scale for every step; single wild steps do not stretch it."""
        low = self.score_low[np.isfinite(self.score_low)]
        high = self.score_high[np.isfinite(self.score_high)]
        if not low.size:
            return 0.0, 1.0
        ends = np.array([np.percentile(low, 5), np.percentile(high, 95)])
        return stats.robust_range(ends, 0, 100)


def summarise(layer: LayerSnapshot, C: int) -> Row:
    """One row of a `LayerSeries`, from a snapshot that has the `SUMMARY_FIELDS`."""
    live = layer.col_indices >= 0
    usage = column_usage(layer.col_indices, C)
    ages = stats.age_summary(layer.block_age_steps[live])
    scores = layer.block_score[live]
    scores = scores[np.isfinite(scores)]
    low, high = np.percentile(scores, [2, 95]) if scores.size else (np.nan, np.nan)
    return (
        column_entropy(layer.col_indices, C),
        float((usage == 0).sum()),
        ages.median,
        ages.p90,
        ages.maximum,
        float(low),
        float(high),
    )


@dataclass(frozen=True)
class SwapHistory:
    """Swapped and live blocks of every layer at every recorded step."""

    names: tuple[str, ...]
    steps: NDArray[np.int64]
    """[S]"""
    swaps: NDArray[np.int64]
    """[S, L] blocks replaced at the decision."""
    blocks: NDArray[np.int64]
    """[S, L] live blocks."""

    def rates(self, name: str) -> NDArray[np.float64]:
        """[S] share of a layer's blocks replaced at each decision; NaN where there was none."""
        column = self.names.index(name)
        return self._rates(self.swaps[:, column], self.blocks[:, column])

    def pooled_rates(self) -> NDArray[np.float64]:
        """[S] share of the blocks of all layers together; NaN where there was no decision."""
        return self._rates(self.swaps.sum(axis=1), self.blocks.sum(axis=1))

    def density(self, info: LayerInfo) -> NDArray[np.float64]:
        """[S] live blocks of a layer as a share of its block positions."""
        return np.asarray(self.blocks[:, self.names.index(info.name)] / (info.R * info.C))

    def outside(self, name: str) -> NDArray[np.bool_]:
        """[S] decisions at which a layer's rate left the healthy band.

        A snapshot at which no layer swapped anything is none: recorders also write them where the
        topology stands still on purpose, in the last part of a task for example.
        """
        return stats.outside_band(self.rates(name)) & ~self.still

    def pooled_outside(self) -> NDArray[np.bool_]:
        """The same for all layers together."""
        return stats.outside_band(self.pooled_rates()) & ~self.still

    @property
    def still(self) -> NDArray[np.bool_]:
        """[S] snapshots at which no layer swapped a block."""
        return np.asarray(self.swaps.sum(axis=1) == 0)

    def _rates(self, swaps: NDArray[np.int64], blocks: NDArray[np.int64]) -> NDArray[np.float64]:
        rates = stats.swap_rates(swaps, blocks)
        # A snapshot of the start, before any training, records no decision.
        rates[(self.steps == 0) & (swaps == 0)] = np.nan
        return rates


def monotone_levels(count: int, read: Callable[[int], int]) -> NDArray[np.int64]:
    """Values of a sequence that never falls, from as few reads as possible.

    The number of live blocks of a layer only grows, and hardly ever: where both ends of a stretch
    agree, everything between them does.

    Args:
        count: length of the sequence.
        read: gives the value at a position.
    """
    values = np.zeros(count, dtype=np.int64)
    if count == 0:
        return values
    stretches = [(0, count - 1, read(0), read(count - 1))]
    while stretches:
        start, stop, first, last = stretches.pop()
        if first == last or stop - start <= 1:
            values[start : stop + 1] = first
            values[stop] = last
            continue
        middle = (start + stop) // 2
        value = read(middle)
        stretches += [(start, middle, first, value), (middle, stop, value, last)]
    return values


def is_loss(name: str) -> bool:
    """Whether a metric is one that should fall: only there a high value is worth an alarm."""
    return any(word in name.lower() for word in ("loss", "nats", "bits_per", "perplexity"))


class MetricLog:
    """Numeric metrics by name, extended as a run grows."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._values: dict[str, tuple[list[int], list[float]]] = {}

    def update(self, records: list[dict[str, Any]]) -> None:
        """Take the records of `Run.metrics`; only those after the known ones are looked at."""
        known = len(self._records)
        if known > len(records) or (known and records[known - 1] is not self._records[-1]):
            self._values.clear()  # a resumed run dropped what it had superseded
            known = 0
        for record in records[known:]:
            for name, value in record.items():
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if number and name != "step":
                    steps, values = self._values.setdefault(name, ([], []))
                    steps.append(record["step"])
                    values.append(float(value))
        self._records = records

    @property
    def names(self) -> list[str]:
        """Names of numeric metrics; losses first, and among them the plain training loss."""

        def order(name: str) -> tuple[bool, bool, int, str]:
            lower = name.lower()
            aside = any(word in lower for word in ("eval", "val", "test"))
            return "loss" not in lower, aside, len(name), name

        return sorted(self._values, key=order)

    @property
    def newest_step(self) -> int | None:
        """The last step of any metric."""
        return max((steps[-1] for steps, _ in self._values.values()), default=None)

    def get(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Steps and values of a metric, ascending by step."""
        steps, values = self._values.get(name, ([], []))
        step_array = np.array(steps, dtype=np.int64)
        order = np.argsort(step_array, kind="stable")
        return step_array[order], np.array(values, dtype=np.float64)[order]
