"""Tasks that a run learned one after another, as its configuration states them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["TaskSpan", "birth_tasks", "task_spans", "task_starts"]

MAX_TASKS = 50
"""More cannot be told apart in a chart."""
MAX_STEP = 2**53


class TaskSpan(NamedTuple):
    """One task's training, in steps counted over all trainings of the run."""

    name: str
    start: int
    """The step it begins after: blocks grown for it are born here."""
    stop: int


def task_spans(config: Mapping[str, Any]) -> tuple[TaskSpan, ...]:
    """The trainings of a run, from `tasks` (names) and `steps` (one number each).

    `titanmac continual` writes both. Anything else, and a single task, gives none: there is
    nothing to tell apart then. So do more than `MAX_TASKS`.
    """
    names, steps = config.get("tasks"), config.get("steps")
    if not isinstance(names, list) or not isinstance(steps, list):
        return ()
    if not 2 <= len(names) <= MAX_TASKS or len(names) != len(steps):
        return ()
    if not all(type(n) is int and 0 <= n <= MAX_STEP for n in steps):
        return ()
    if not all(isinstance(name, str) for name in names):
        return ()
    stops = list(accumulate(steps))
    return tuple(map(TaskSpan, names, [0, *stops[:-1]], stops))


def birth_tasks(
    ages: NDArray[Any], step: int, spans: Sequence[TaskSpan]
) -> NDArray[np.integer[Any]]:
    """During which training each block was born, as a position in `spans`.

    A block born at the step where one training ends and the next begins belongs to the next, the
    first that it is trained in.

    Args:
        ages: block ages in steps, any shape.
        step: of the snapshot that holds them.
        spans: at least one training.
    """
    starts = np.array([span.start for span in spans], dtype=np.int64)
    births = step - ages.astype(np.int64)
    return np.maximum(np.searchsorted(starts, births, side="right") - 1, 0)


def task_starts(steps: NDArray[Any], spans: Sequence[TaskSpan]) -> NDArray[np.int64]:
    """Positions in `steps` [S] (ascending) of the first entry of each task but the first."""
    return np.searchsorted(steps, [span.start for span in spans[1:]], side="right")
