"""The clock of a continuum memory system: which levels are due at a step."""

from __future__ import annotations

import operator
from dataclasses import dataclass


@dataclass(frozen=True)
class CMSClock:
    """Level l is due at step s, counted from 1, when s is a multiple of `periods[l]`.

    Levels of a continuum memory system update at their own frequency (Behrouz et al. 2025,
    "Nested Learning", section on continuum memory systems). Here level 0 accumulates scores,
    level 1 folds them, level 2 decides about the topology.

    Args:
        periods: steps between two updates of each level, fastest first.

    Raises:
        ValueError: not three whole numbers, a period below 1, or one that is not a multiple of the
            period before it (the levels must nest, so that a slow level sees complete work of
            the faster one).
    """

    periods: tuple[int, int, int] = (1, 10, 100)

    def __post_init__(self) -> None:
        try:
            whole = tuple(operator.index(period) for period in self.periods)
        except TypeError:
            whole = ()
        if len(whole) != 3:
            raise ValueError(
                f"periods (={self.periods!r}) must have three entries, whole numbers of steps: "
                "accumulate, score, decide."
            )
        object.__setattr__(self, "periods", whole)  # no numbers of numpy in checkpoints
        previous = 1
        for level, period in enumerate(self.periods):
            if period < 1:
                raise ValueError(f"periods[{level}] (={period}) must be at least 1.")
            if period % previous:
                raise ValueError(
                    f"periods[{level}] (={period}) must be a multiple of the faster level's "
                    f"period (={previous}); nearest: {_nearest_multiple(period, previous)}."
                )
            previous = period

    def due(self, step: int) -> tuple[int, ...]:
        """Levels due at `step` (counted from 1), fastest first."""
        return tuple(level for level, period in enumerate(self.periods) if step % period == 0)

    def steps_to_decision(self, step: int) -> int:
        """Steps from `step` to the next decision; 0 when `step` itself decides."""
        return -step % self.periods[2]


def _nearest_multiple(value: int, base: int) -> int:
    return max(base, round(value / base) * base)
