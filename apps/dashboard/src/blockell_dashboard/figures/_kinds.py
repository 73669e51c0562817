"""Cells of a heatmap by kind: what became of each block, or which task it was born in.

R block rows, C block columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from .. import stats
from ..tasks import TaskSpan
from ._cells import CellGrid, legend_entry
from ._theme import Theme, palette, series_style

__all__ = ["draw_changes", "draw_tasks"]

_MAX_SYMBOLS = 4000
_MAX_SYMBOL_SIDE = 200
_TASK_SYMBOLS = ("", "cross-thin", "x-thin", "line-ns", "line-ew", "y-up")


def draw_changes(
    fig: go.Figure,
    cells: CellGrid,
    changes: NDArray[np.uint8],
    counts: NDArray[np.int64],
    age: NDArray[np.float32],
    score: NDArray[np.float32],
    *,
    when: str,
    theme: Theme,
    height: int,
) -> None:
    """Draw born, died and kept blocks.

    Args:
        changes: codes of `stats.CHANGE_NAMES`, one per cell.
        counts: block positions of each code, [4].
        age, score: one number per cell.
        when: ends the hover text, such as "at this decision".
    """
    colours = palette(theme)
    kept, born = changes == stats.KEPT, changes == stats.BORN
    died, absent = changes == stats.DIED, changes == stats.ABSENT
    if not cells.large:
        cells.add_plain(fig, absent, colours.absent, stats.CHANGE_NAMES[stats.ABSENT])
    cells.add_plain(fig, died, colours.second, f"<b>died</b> {when}")
    z = np.full(changes.shape, np.nan, dtype=np.float32)
    z[kept], z[born] = 0, 1
    scale = _steps((colours.kept, colours.first))
    cells.add_blocks(
        fig,
        z,
        age,
        score,
        kind=f"<b>%{{text}}</b> {when}",
        text=np.select([born, kept], ["born", "kept"], ""),
        colorscale=scale,
        zmin=0,
        zmax=1,
        showscale=False,
    )
    if _drawable(changes, born | died):
        cells.add_symbols(fig, born, "cross-thin", colours.background, height)
        cells.add_symbols(fig, died, "x-thin", colours.background, height)
    legend_entry(fig, f"born ({counts[stats.BORN]:,})", "square-cross", colours.first, colours)
    legend_entry(fig, f"died ({counts[stats.DIED]:,})", "square-x", colours.second, colours)
    legend_entry(fig, f"kept ({counts[stats.KEPT]:,})", "square", colours.kept, colours)
    legend_entry(fig, "no block", "square", colours.absent, colours)


def draw_tasks(
    fig: go.Figure,
    cells: CellGrid,
    tasks: NDArray[np.uint8],
    counts: NDArray[np.int64],
    age: NDArray[np.float32],
    score: NDArray[np.float32],
    *,
    spans: Sequence[TaskSpan],
    theme: Theme,
    height: int,
) -> None:
    """Draw the task in whose training each block was born.

    Args:
        tasks: 0 without a block, else 1 + the position in `spans`, one per cell.
        counts: blocks per code, [1 + len(spans)].
        age, score: one number per cell.
    """
    colours = palette(theme)
    absent = tasks == 0
    if not cells.large:
        cells.add_plain(fig, absent, colours.absent, stats.CHANGE_NAMES[stats.ABSENT])
    z = np.where(absent, np.float32(np.nan), tasks.astype(np.float32) - 1)
    names = [escape(span.name) for span in spans]
    marks = [_task_colour(number, theme) for number in range(len(spans))]
    cells.add_blocks(
        fig,
        z,
        age,
        score,
        kind="born in the training on <b>%{text}</b>",
        text=np.array(["", *names])[tasks],
        colorscale=_steps(marks),
        zmin=-0.5,
        zmax=len(spans) - 0.5,
        showscale=False,
    )
    later = tasks > 1
    drawable = _drawable(tasks, later)
    for number, name in enumerate(names):
        symbol = _TASK_SYMBOLS[number % len(_TASK_SYMBOLS)]
        if drawable and symbol:
            cells.add_symbols(fig, tasks == number + 1, symbol, colours.background, height)
        legend_entry(fig, f"{name} ({counts[number + 1]:,})", "square", marks[number], colours)
    legend_entry(fig, "no block", "square", colours.absent, colours)


def _task_colour(number: int, theme: Theme) -> str:
    return palette(theme).kept if number == 0 else series_style(number - 1, theme)[0]


def _steps(colours: Sequence[str]) -> list[list[Any]]:
    """A colour scale of equal steps."""
    edges = np.linspace(0, 1, len(colours) + 1).tolist()
    return [
        [edge, colour]
        for colour, left, right in zip(colours, edges, edges[1:], strict=False)
        for edge in (left, right)
    ]


def _drawable(cells: NDArray[Any], marked: NDArray[np.bool_]) -> bool:
    small = max(cells.shape, default=0) <= _MAX_SYMBOL_SIDE
    return small and int(marked.sum()) <= _MAX_SYMBOLS
