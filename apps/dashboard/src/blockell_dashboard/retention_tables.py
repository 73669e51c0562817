"""The data of the retention page's charts as columns, and the table of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import retention_stats as numbers
from .retention_stats import Group, Statistic
from .tables import Table

__all__ = [
    "cell_table",
    "lines_table",
    "matrix_table",
    "method_table",
    "own_table",
    "statistics_table",
]


def method_table(groups: Sequence[Group]) -> Table:
    """One line per method and dial, for people: mean ± sd [lowest to highest] over seeds."""
    exact = groups[0].cells[0].metrics[0] == "exact_match"
    share, plain = "{:.1%}", "{:.3f}"
    several = {}
    if len(groups[0].cells[0].tasks) > 2:
        several = {"of all old tasks": [_text(_mean_forgetting(group), share) for group in groups]}
    rehearsing = [any(cell.uses_old_data for cell in group.cells) for group in groups]
    return {
        "method": [group.label for group in groups],
        **({"old data": ["yes" if it else "no" for it in rehearsing]} if any(rehearsing) else {}),
        "seeds": [len(group.cells) for group in groups],
        "relative forgetting": [_text(_forgetting(group), share) for group in groups],
        **several,
        "lowest": [_text(_lowest(group), share if exact else plain) for group in groups],
        "new task's loss, nats": [_text(_nats(group), plain) for group in groups],
        "seconds": [_text(_seconds(group), "{:.1f}") for group in groups],
        "kept, MB": [_text(_kept_bytes(group), "{:.2f}", scale=1e-6) for group in groups],
        "block overlap (chance)": [_overlap_text(group) for group in groups],
        "void seeds": [", ".join(map(str, group.void)) for group in groups],
    }


def statistics_table(groups: Sequence[Group]) -> Table:
    """The numbers of `method_table`, every statistic in its own column."""
    columns: dict[str, Callable[[Group], Statistic]] = {
        "relative_forgetting": _forgetting,
        "mean_relative_forgetting": _mean_forgetting,
        "lowest": _lowest,
        "new_task_nats": _nats,
        "seconds": _seconds,
        "kept_bytes": _kept_bytes,
        "block_overlap": lambda group: _overlap(group, "used"),
        "block_overlap_shuffled": lambda group: _overlap(group, "used_shuffled"),
    }
    table: dict[str, list[Any]] = {
        **_names(groups),
        "seeds": [len(group.cells) for group in groups],
    }
    for name, measure in columns.items():
        statistics = [measure(group) for group in groups]
        for field in ("mean", "sd", "min", "max"):
            table[f"{name}_{field}"] = [getattr(value, field) for value in statistics]
    table["void_seeds"] = [" ".join(map(str, group.void)) for group in groups]
    return table


def cell_table(groups: Sequence[Group]) -> Table:
    """One line per seed: the points of the trade-off."""
    each = [(group, cell) for group in groups for cell in group.cells]
    return {
        **_names([group for group, _ in each]),
        "seed": [cell.seed for _, cell in each],
        "new_task_nats": [numbers.new_nats(cell) for _, cell in each],
        "old_task_kept": [numbers.kept(cell) for _, cell in each],
        "relative_forgetting": [numbers.relative_forgetting(cell) for _, cell in each],
        "lowest": [numbers.lowest(cell) for _, cell in each],
        "seconds": [cell.seconds for _, cell in each],
        "kept_bytes": [cell.kept_bytes for _, cell in each],
    }


def own_table(group: Group) -> Table:
    """Figures of a method's own after the last task, a line each: over the seeds that have it."""
    names = dict.fromkeys(name for cell in group.cells for name in cell.own)
    found = [
        numbers.statistic([cell.own.get(name, np.nan) for cell in group.cells]) for name in names
    ]
    return {
        "figure": list(names),
        **{
            field: [getattr(value, field) for value in found]
            for field in ("mean", "sd", "min", "max", "n")
        },
    }


def lines_table(groups: Sequence[Group], task: int | None = None) -> Table:
    """One line per measurement: of one task after it was learned, or of every task."""
    each = []
    for group in groups:
        for cell in group.cells:
            for line in numbers.task_lines(cell):
                if task not in (None, line.task):
                    continue
                start = 0 if task is None else sum(cell.steps[: task + 1])
                points = zip(line.steps, line.values, line.scores, strict=True)
                each += [(group, cell, line.task, *point) for point in points if point[0] >= start]
    return {
        **_names([row[0] for row in each]),
        "seed": [row[1].seed for row in each],
        "task": [row[1].tasks[row[2]] for row in each],
        "metric": [row[1].metrics[row[2]] for row in each],
        "step": [int(row[3]) for row in each],
        "value": [float(row[4]) for row in each],
        "score": [float(row[5]) for row in each],
    }


def matrix_table(group: Group) -> Table:
    """One line per seed, moment and task."""
    each = [
        (cell, row, column)
        for cell in group.cells
        for row, column in np.ndindex(*cell.matrix.shape)
    ]
    return {
        **_names([group] * len(each)),
        "seed": [cell.seed for cell, _, _ in each],
        "after": [cell.tasks[row - 1] if row else "untrained" for cell, row, _ in each],
        "task": [cell.tasks[column] for cell, _, column in each],
        "value": [float(cell.matrix[row, column]) for cell, row, column in each],
        "score": [float(numbers.score_matrix(cell)[row, column]) for cell, row, column in each],
        "change": [float(numbers.change_matrix(cell)[row, column]) for cell, row, column in each],
        "nats": [float(cell.nats[row, column]) for cell, row, column in each],
    }


def _names(groups: Sequence[Group]) -> dict[str, list[Any]]:
    return {
        "method": [group.method for group in groups],
        "arch": [group.arch for group in groups],
        "dial": ["auto" if group.dial is None else group.dial for group in groups],
    }


def _forgetting(group: Group) -> Statistic:
    return numbers.statistic([numbers.relative_forgetting(cell) for cell in group.cells])


def _mean_forgetting(group: Group) -> Statistic:
    return numbers.statistic([numbers.mean_forgetting(cell) for cell in group.cells])


def _lowest(group: Group) -> Statistic:
    return numbers.statistic([numbers.lowest(cell) for cell in group.cells])


def _nats(group: Group) -> Statistic:
    return numbers.statistic([numbers.new_nats(cell) for cell in group.cells])


def _seconds(group: Group) -> Statistic:
    return numbers.statistic([cell.seconds for cell in group.cells])


def _kept_bytes(group: Group) -> Statistic:
    return numbers.statistic([cell.kept_bytes for cell in group.cells])


def _overlap(group: Group, key: str) -> Statistic:
    return numbers.statistic([cell.overlap.get(key, np.nan) for cell in group.cells])


def _overlap_text(group: Group) -> str:
    used, shuffled = _overlap(group, "used"), _overlap(group, "used_shuffled")
    return f"{used.mean:.0%} ({shuffled.mean:.0%})" if used.n and shuffled.n else ""


def _text(value: Statistic, form: str, *, scale: float = 1.0) -> str:
    if value.n == 0:
        return "unknown"
    mean, sd, low, high = (form.format(part * scale) for part in value[:4])
    if low == high:  # to the digits shown
        return mean
    return f"{mean} ± {sd} [{low} to {high}]"
