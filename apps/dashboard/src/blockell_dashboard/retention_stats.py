"""Numbers of the retention page: scores, forgetting, statistics over seeds. Plain numpy.

n tasks; a score of 0 is chance and 1 is perfect, whatever the task's own metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .retention import Cell

__all__ = [
    "LEARNED",
    "Group",
    "Statistic",
    "TaskLine",
    "change_matrix",
    "group_cells",
    "kept",
    "lowest",
    "mean_forgetting",
    "new_nats",
    "relative_forgetting",
    "score_matrix",
    "statistic",
    "task_lines",
]

Floats = NDArray[np.float64]
LEARNED = 0.95
"""A first task with exact answers must be learned this well, or the comparison is void."""


@dataclass(frozen=True)
class Group:
    """One method, architecture and dial, over seeds."""

    method: str
    arch: str
    dial: float | None
    cells: tuple[Cell, ...]
    """By seed."""

    @property
    def curve(self) -> str:
        """The method and architecture; groups of one curve differ in the dial."""
        return f"{self.method} · {self.arch}"

    @property
    def label(self) -> str:
        """Method, architecture and, where it was set, the dial."""
        if self.dial is None:
            return self.curve
        return f"{self.curve} · {self.cells[0].dial_name} {self.dial:g}"

    @property
    def void(self) -> tuple[int, ...]:
        """Seeds whose first task was not learned well enough to be forgotten."""
        return tuple(
            cell.seed
            for cell in self.cells
            if cell.metrics[0] == "exact_match" and cell.matrix[1, 0] < LEARNED
        )


class Statistic(NamedTuple):
    """Over seeds; sd is NaN for a single one, everything NaN for none."""

    mean: float
    sd: float
    min: float
    max: float
    n: int


class TaskLine(NamedTuple):
    """A task of one cell over steps: [P] points at rising steps, counted over all trainings."""

    task: int
    steps: Floats
    values: Floats
    """On the task's own scale."""
    scores: Floats


def group_cells(cells: Sequence[Cell]) -> list[Group]:
    """Cells of one setting by method, architecture and dial; dials of a curve ascend."""
    found: dict[tuple[str, str, float | None], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.method, cell.arch, cell.dial), []).append(cell)
    order = {key[:2]: i for i, key in reversed(list(enumerate(found)))}
    keys = sorted(found, key=lambda k: (order[k[:2]], k[2] is not None, k[2] or 0.0))
    return [Group(*key, tuple(sorted(found[key], key=lambda cell: cell.seed))) for key in keys]


def statistic(values: Sequence[float]) -> Statistic:
    """Mean, standard deviation, lowest and highest of the finite values."""
    known = np.array([value for value in values if np.isfinite(value)])
    if known.size == 0:
        return Statistic(np.nan, np.nan, np.nan, np.nan, 0)
    sd = float(known.std(ddof=1)) if known.size > 1 else np.nan
    return Statistic(
        float(known.mean()), sd, float(known.min()), float(known.max()), int(known.size)
    )


def relative_forgetting(cell: Cell, task: int = 0) -> float:
    """(before - after) / (before - chance): 0 nothing lost, 1 all.

    NaN if nothing was learned, that is if the task was no better than chance after its training:
    the share of nothing that is lost would be any number.
    """
    before, after = cell.matrix[task + 1, task], cell.matrix[-1, task]
    if score_matrix(cell)[task + 1, task] <= 0:
        return np.nan
    return float((before - after) / (before - cell.chance[task]))


def mean_forgetting(cell: Cell) -> float:
    """Mean relative forgetting of all tasks but the last; NaN if one was not learned."""
    return float(np.mean([relative_forgetting(cell, task) for task in range(len(cell.tasks) - 1)]))


def kept(cell: Cell) -> float:
    """Share of the first task that is left at the end; 0 if nothing had been learned."""
    lost = relative_forgetting(cell)
    return 1.0 - lost if np.isfinite(lost) else 0.0


def lowest(cell: Cell) -> float:
    """The worst value of the first task at any time after it was learned, on its own scale."""
    values = [cell.matrix[-1, 0]]
    values += [point.values[0] for phase in cell.path for point in phase]
    return float(min(values) if cell.perfect[0] > cell.chance[0] else max(values))


def new_nats(cell: Cell) -> float:
    """Mean loss of the later tasks, each right after it was trained."""
    return float(np.mean([cell.nats[j + 1, j] for j in range(1, len(cell.tasks))]))


def score_matrix(cell: Cell) -> Floats:
    """[n + 1, n] scores of every task (column) before the first and after every training (row)."""
    return (cell.matrix - cell.chance) / (cell.perfect - cell.chance)


def change_matrix(cell: Cell) -> Floats:
    """[n + 1, n] score minus the score right after the task was learned; NaN before that."""
    scores = score_matrix(cell)
    n = len(cell.tasks)
    learned = scores[np.arange(1, n + 1), np.arange(n)]
    return np.where(np.tri(n + 1, n, -1, dtype=bool), scores - learned, np.nan)


def task_lines(cell: Cell) -> list[TaskLine]:
    """Every task over the steps of all trainings.

    All tasks are measured between the trainings, tasks learned before also during them.
    """
    bounds = np.concatenate([[0], np.cumsum(cell.steps)])
    lines = []
    for task in range(len(cell.tasks)):
        points = {float(step): cell.matrix[row, task] for row, step in enumerate(bounds)}
        for training, phase in enumerate(cell.path, 1):
            for point in phase:
                if task < training:
                    points.setdefault(float(bounds[training] + point.step), point.values[task])
        steps = np.array(sorted(points))
        values = np.array([points[step] for step in steps])
        scores = (values - cell.chance[task]) / (cell.perfect[task] - cell.chance[task])
        lines.append(TaskLine(task, steps, values, scores))
    return lines
